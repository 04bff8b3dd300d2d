"The Vandermonde sums against the literal sums in complex128, the reference's numbers, gradcheck, and what must not disturb them."
import math
from itertools import product

import numpy as np
import pytest
import torch

from s4nb.ops.vandermonde_sum import Vandermonde, VandermondeT, log_vandermonde, log_vandermonde_transpose, powers
from s4nb.s4.nplr import nplr

C64, C128 = torch.complex64, torch.complex128
SHAPES = [((3,), (3,)), ((2, 2, 3), (2, 3)), ((3,), (2, 3)), ((2, 1, 3), (2, 3))]


def literal(v, x, L, conj=True):
    y = (v[..., None, :] * torch.exp(x[..., None, :] * torch.arange(L, dtype=torch.float64)[:, None])).sum(-1)
    return 2 * y.real if conj else y


def literal_transpose(u, v, x, L):
    return v * (u[..., None] * torch.exp(x[..., None, :] * torch.arange(L, dtype=torch.float64)[:, None])).sum(-2)


def randn(*shape): return torch.randn(*shape, dtype=C128, requires_grad=True)
def small(*shape): return (0.3 * torch.randn(*shape, dtype=C128)).requires_grad_()


def with_grads(f, args, g):
    args = [a.detach().clone().requires_grad_() for a in args]
    out = f(*args)
    return [out.detach(), *torch.autograd.grad(out, args, g.to(out.dtype))]


def wide(t): return t.to(C128 if t.is_complex() else torch.float64)


def legs(b, m):
    "dt times HiPPO-LegS eigenvalues for b step sizes, in complex64: phases up to 128 radians a step."
    dt = torch.exp(torch.rand(b, 1, dtype=torch.float64) * math.log(100) + math.log(1e-3))
    return (nplr("legs", 2 * m)[0] * dt).to(C64)


@pytest.mark.parametrize("conj", [True, False])
@pytest.mark.parametrize("L", [0, 1, 2, 5, 7])
@pytest.mark.parametrize("shapes", SHAPES)
def test_values_and_gradients(shapes, L, conj):
    v, x = randn(*shapes[0]), small(*shapes[1])
    out, want = log_vandermonde(v, x, L, conj), literal(v, x, L, conj)
    assert out.shape == want.shape and out.dtype == want.dtype and torch.allclose(out, want, rtol=1e-11, atol=1e-13)
    if L in (2, 5):
        assert torch.autograd.gradcheck(lambda *a: log_vandermonde(*a, L, conj), (v, x))
        assert torch.autograd.gradgradcheck(lambda *a: log_vandermonde(*a, L, conj), (v, x))


@pytest.mark.parametrize("real", [True, False])
@pytest.mark.parametrize("L", [0, 1, 2, 5, 7])
@pytest.mark.parametrize("lead, shapes", [((), SHAPES[0]), ((2, 2), SHAPES[2]), ((2, 1), SHAPES[1]), ((4, 2), ((2, 3), (2, 3)))])
def test_transpose_values_and_gradients(lead, shapes, L, real):
    u = torch.randn(*lead, L, dtype=torch.float64 if real else C128, requires_grad=True)
    v, x = randn(*shapes[0]), small(*shapes[1])
    out, want = log_vandermonde_transpose(u, v, x, L), literal_transpose(u, v, x, L)
    assert out.shape == want.shape and torch.allclose(out, want, rtol=1e-11, atol=1e-13)
    if L == 5:
        assert torch.autograd.gradcheck(lambda *a: log_vandermonde_transpose(*a, L), (u, v, x))
        assert torch.autograd.gradgradcheck(lambda *a: log_vandermonde_transpose(*a, L), (u, v, x))


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_empty(shape):
    v, x, u = randn(*shape), randn(*shape), randn(6)
    for out in (log_vandermonde(v, x, 6), log_vandermonde_transpose(u, v, x, 6)):
        assert out.shape == (shape[0], 6 if out.dtype == torch.float64 else shape[1]) and (out == 0).all()
        assert all((d == 0).all() for d in torch.autograd.grad(out.abs().sum(), (v, x)))


def test_transpose_is_a_recurrence():
    u, x, state = torch.randn(2, 3, 100, dtype=torch.float64), small(3, 4).detach() - 0.5, torch.zeros(2, 3, 4, dtype=C128)
    for l in range(100): state = x.exp() * state + u[..., l, None]
    assert torch.allclose(log_vandermonde_transpose(u.flip(-1), torch.ones(4), x, 100), state, rtol=1e-11)


def test_adjoint():
    "<u, V v> = <T u, v>: the two sums are one matrix, seen from both sides."
    v, x, u = randn(3, 8), small(3, 8) - 0.3, randn(3, 50)
    assert torch.allclose((u * log_vandermonde(v, x, 50, conj=False)).sum(), log_vandermonde_transpose(u, v, x, 50).sum(), rtol=1e-11)


@pytest.mark.parametrize("m", [1, 2, 31, 64])
def test_complex64_on_fast_phases(m):
    "Phases of thousands of radians: 2e-6 forward, 1e-5 backward, relative L2 over each array."
    for b, L in product((1, 3), (1, 15, 16, 513, 4097, 16384)):
        args, g = (torch.randn(b, m, dtype=C64), legs(b, m)), torch.randn(b, L)
        got, want = with_grads(lambda *a: log_vandermonde(*a, L), args, g), with_grads(lambda *a: log_vandermonde(*a, L), map(wide, args), g)
        args, g = (torch.randn(b, L), *args), torch.randn(b, m, dtype=C64)
        got += with_grads(lambda *a: log_vandermonde_transpose(*a, L), args, g)
        want += with_grads(lambda *a: log_vandermonde_transpose(*a, L), map(wide, args), g)
        for i, (p, q) in enumerate(zip(got, want)):
            if q.norm() > 0: assert (p - q).norm() <= (2e-6 if i in (0, 3) else 1e-5) * q.norm(), (b, L, i)


def test_the_judge_is_right():
    v, x, L = torch.randn(2, 32, dtype=C128), legs(2, 32).to(C128), 4097
    g = torch.randn(2, L, dtype=torch.float64)
    for got, want in zip(with_grads(lambda *a: log_vandermonde(*a, L), (v, x), g), with_grads(lambda *a: literal(*a, L), (v, x), g)):
        assert (got - want).norm() <= 1e-10 * want.norm()


def test_powers_stay_accurate():
    x = torch.complex(torch.zeros(3), torch.tensor([1.0, -3.0, 100.0]))
    t = torch.arange(1000, dtype=torch.float64)
    exact = torch.polar(torch.ones(1000, 3, dtype=torch.float64), t[:, None] * x.imag.double())
    assert (powers(x, 1000) - exact).abs().max() < 1e-10                  # 1e5 radians, float64


def test_reference_numbers(vectors):
    data, n = np.load(vectors / "c_func.npz", allow_pickle=False), 0
    for case in sorted({k.split("/")[0] for k in data if k.startswith("logvand")}):
        t = {k.split("/")[1]: torch.tensor(data[k]) for k in data if k.startswith(case + "/")}
        v, x = t["v"].requires_grad_(), t["x"].requires_grad_()
        if "u" in t: pairs = [(log_vandermonde_transpose(t["u"], v, x, t["u"].shape[-1]), t["y"])]
        else:
            L = t["y"].shape[-1]
            y = log_vandermonde(v, x, L)
            dv, dx = torch.autograd.grad((t["g"] * y).sum(), (v, x))
            pairs = [(y, t["y"]), (log_vandermonde(v, x, L, conj=False), t["y_noconj"]), (dv, t["grad_v"]), (dx, t["grad_x"])]
        for got, want in pairs: assert (got - want).norm() <= 1e-10 * want.norm(), case
        n += 1
    assert n >= 8


def test_growth_and_overflow():
    x = torch.tensor([0.01])
    assert torch.allclose(log_vandermonde(torch.ones(1), x, 5000)[-1].double(), 2 * torch.tensor(49.99).double().exp(), rtol=1e-5)
    assert not log_vandermonde(torch.ones(1), x, 20_000)[-1].isfinite()                       # e^200 is no float32 …
    assert log_vandermonde(torch.ones(1).double(), x, 20_000).isfinite().all()                # … and a float64
    assert (log_vandermonde(torch.ones(1), torch.tensor([-1.0]), 20_000)[1000:] == 0).all()   # decay just underflows


def test_dtypes():
    v, x, u = torch.randn(3), torch.randn(3, dtype=C64), torch.randn(2, 7)
    assert log_vandermonde(v, x, 7).dtype == torch.float32 and log_vandermonde(v.double(), x, 7).dtype == torch.float64
    assert log_vandermonde(v, x, 7, conj=False).dtype == C64 and log_vandermonde_transpose(u.bfloat16(), v, x, 7).dtype == C64
    assert log_vandermonde_transpose(u.double(), v, x, 7).dtype == C128


@pytest.mark.parametrize("conj", [True, False])
def test_phase_has_the_precision_of_x(conj):
    "complex64 weights, complex128 x: right to 3e-7 (5e-7 where 16384 inputs add up); a rounded x loses three digits."
    L, m = 2**14, 32
    v, u, g = torch.randn(2, m, dtype=C64), torch.randn(2, L), torch.randn(2, L)
    x = torch.complex(-torch.rand(m, dtype=torch.float64) / L, 3 * torch.rand(m, dtype=torch.float64))
    y, dv, dx = with_grads(lambda *a: log_vandermonde(*a, L, conj), (v, x), g)
    s, du, sv, sx = with_grads(lambda *a: log_vandermonde_transpose(*a, L), (u, v, x), v)
    assert [t.dtype for t in (y, dv, dx)] == [torch.float32 if conj else C64, C64, C128]
    assert [t.dtype for t in (s, du, sv, sx)] == [C64, torch.float32, C64, C128]
    want = with_grads(lambda *a: literal(*a, L, conj), (wide(v), x), g)
    want += with_grads(lambda *a: literal_transpose(*a, L), (wide(u), wide(v), x), v)
    for i, (p, q) in enumerate(zip((y, dv, dx, s, du, sv, sx), want)):
        assert (p - q).norm() <= {0: 3e-7, 3: 5e-7}.get(i, 1e-6) * q.norm(), i
    assert (log_vandermonde(v, x.to(C64), L, conj) - want[0]).norm() > 1e-5 * want[0].norm()


def test_gradients_of_a_more_precise_x():
    "Gradients of mixed arguments are those of the rounded results, also the second ones and those of broadcast leading dims."
    v, x, u = torch.randn(2, 1, 4, dtype=C64), small(3, 4), torch.randn(5, 1, 1, 9)
    for f, a in ((lambda v, x: log_vandermonde(v, x, 9), (v, x)), (lambda u, v, x: log_vandermonde_transpose(u, v, x, 9), (u, v, x))):
        def twice(*a):
            a = [t.detach().requires_grad_() for t in a]
            first = torch.autograd.grad(f(*a).abs().square().sum(), a, create_graph=True)
            return *first, *torch.autograd.grad(sum(d.abs().square().sum() for d in first), a)
        for p, q, t in zip(twice(*a), twice(*map(wide, a)), a + a):
            assert p.dtype == t.dtype and p.shape == t.shape and (p - q).norm() <= 1e-5 * q.norm()


def test_bad_arguments():
    v, x, u = torch.ones(2, 3), torch.ones(2, 3), torch.ones(2, 5)
    for L in (-1, 2.0, "4", True, None):
        with pytest.raises(ValueError, match="give an int"): log_vandermonde(v, x, L)
    with pytest.raises(ValueError, match="modes"): log_vandermonde(v[:, :2], x, 5)
    with pytest.raises(ValueError, match="equal or 1"): log_vandermonde(torch.ones(3, 3), x, 5)
    with pytest.raises(ValueError, match="L=4"): log_vandermonde_transpose(u, v, x, 4)
    with pytest.raises(ValueError, match="equal or 1"): log_vandermonde_transpose(torch.ones(3, 5), v, x, 5)


def test_autocast_and_low_precision_settings_change_nothing():
    v, x, u = torch.randn(2, 32, dtype=C64), legs(2, 32), torch.randn(2, 500)
    def run():
        a = with_grads(lambda *a: log_vandermonde(*a, 500), (v, x), u)
        return a + with_grads(lambda *a: log_vandermonde_transpose(*a, 500), (u, v, x), v)
    want = run()
    with torch.autocast("cpu", dtype=torch.bfloat16): inside = run()
    torch.set_float32_matmul_precision("medium")
    try: medium = run()
    finally: torch.set_float32_matmul_precision("highest")
    for a, b, c in zip(want, inside, medium): assert torch.equal(a, b) and torch.equal(a, c)


def test_keeps_its_arguments_only():
    v, x, u, saved = randn(4, 16), randn(4, 16), randn(4, 900), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.untyped_storage().nbytes()) or t, lambda t: t):
        Vandermonde.apply(v, x, 900, True)
        assert sum(saved) == 16 * (v.numel() + x.numel())
        VandermondeT.apply(u, x)
    assert sum(saved) == 16 * (v.numel() + 2 * x.numel() + u.numel())
