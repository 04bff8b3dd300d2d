"The Cauchy sum against the literal sum in complex128, the reference's numbers, gradcheck, and what must not disturb it."
import math
from itertools import product

import numpy as np
import pytest
import torch

from s4nb.ops.cauchy_sum import PAIRS, CauchySum, cauchy, tiles
from s4nb.s4.nplr import nplr

C64, C128 = torch.complex64, torch.complex128
SIZES = list(product((1, 3), (1, 2, 3, 31, 32, 33, 64), (1, 2, 15, 16, 17, 513, 1000, 4097)))


def literal(v, z, w, conj=True):
    y = (v[..., None] / (z[..., None, :] - w[..., None])).sum(-2)
    return y + (v.conj()[..., None] / (z[..., None, :] - w.conj()[..., None])).sum(-2) if conj else y


def randn(*shape): return torch.randn(*shape, dtype=C128, requires_grad=True)


def nodes(L):
    "Bilinear nodes below the pole, float64, rounded once."
    return (2j * torch.tan(math.pi * torch.arange(L, dtype=torch.float64) / (2 * L))).to(C64)


def legs_poles(b, m, seed=0):
    "dt times HiPPO-LegS eigenvalues for b step sizes, in complex64."
    dt = torch.exp(torch.rand(b, 1, dtype=torch.float64) * math.log(100) + math.log(1e-3))
    return (nplr("legs", 2 * m)[0] * dt).to(C64)


def with_grads(f, args, g):
    args = [a.detach().clone().requires_grad_() for a in args]
    out = f(*args)
    return [out.detach(), *torch.autograd.grad(out, args, g.to(out.dtype))]


def worst(got, want):
    "Largest relative L2 error of a row."
    return float(((got.to(C128) - want).norm(dim=-1) / want.norm(dim=-1)).max())


@pytest.mark.parametrize("conj", [True, False])
@pytest.mark.parametrize("shapes", [((3,), (4,), (3,)), ((2, 4, 3), (5,), (2, 1, 3)), ((2, 1, 3), (2, 3, 4), (3,)), ((3,), (2, 1, 4), (2, 3)),
                                    ((4, 2, 3), (4,), (2, 3)), ((1, 3), (2, 1, 4), (1, 1, 3)), ((2, 2, 2, 3), (2, 1, 2, 1, 4), (2, 1, 3))])
def test_any_shapes_values_and_gradients(shapes, conj):
    v, z, w = (randn(*s) for s in shapes)
    out, want = cauchy(v, z, w, conj), literal(v, z, w, conj)
    assert out.shape == want.shape and torch.allclose(out, want, rtol=1e-11, atol=1e-12)
    assert torch.autograd.gradcheck(lambda *a: cauchy(*a, conj), (v, z, w))


@pytest.mark.parametrize("shapes", [((0, 3), (4,), (0, 3)), ((2, 0), (4,), (2, 0)), ((2, 3), (0,), (2, 3)), ((0, 3), (4,), (3,)), ((2, 0, 3), (4,), (2, 1, 3))])
def test_empty(shapes):
    args = [randn(*s) for s in shapes]
    out = cauchy(*args)
    assert out.shape == literal(*args).shape and (out == 0).all()
    assert all((d == 0).all() for d in torch.autograd.grad(out.abs().sum(), args))


def test_strided_and_conjugated_arguments():
    v, w, z = randn(4, 6)[:, ::2].conj(), randn(3, 4).mT, randn(10)[::2]
    assert torch.allclose(cauchy(v, z, w), literal(v, z, w), rtol=1e-11)


def test_complex64_on_resonant_poles():
    "Forward 2e-6, backward 1e-5 relative in every row. (Fewer modes or nodes: a random sum may cancel; next test.)"
    errors = torch.zeros(4)
    for b, m, L in (size for size in SIZES if size[1] > 1 and size[2] > 500):
        args = torch.randn(b, m, dtype=C64), nodes(L), legs_poles(b, m)
        g = torch.randn(b, L, dtype=C64)
        got, want = with_grads(cauchy, args, g), with_grads(cauchy, [a.to(C128) for a in args], g)
        errors = torch.maximum(errors, torch.tensor([worst(p, q) for p, q in zip(got, want)]))
    assert errors[0] <= 2e-6 and (errors[1:] <= 1e-5).all(), errors


@pytest.mark.parametrize("resonant", [True, False])
def test_complex64_of_any_size(resonant):
    "Each number to 2e-6 of the sum of the moduli of its terms, from one mode at one node on."
    for b, m, L in SIZES:
        v, w = torch.randn(b, m, dtype=C64), torch.complex(-torch.rand(b, m) - 0.05, 10 * torch.randn(b, m))
        if resonant: w = legs_poles(b, m)
        z, g = nodes(L), torch.randn(b, L, dtype=C64)
        got, want = with_grads(cauchy, (v, z, w), g), with_grads(cauchy, [a.to(C128) for a in (v, z, w)], g)
        u = sum(1 / (z.to(C128) - p[..., None]).abs() for p in (w, w.conj()))
        y, dv = (v.abs()[..., None] * u).sum(-2), (g.abs()[:, None] * u).sum(-1)
        dz, dw = (g.abs() * (v.abs()[..., None] * u**2).sum(-2)).sum(0), v.abs() * (g.abs()[:, None] * u**2).sum(-1)
        for p, q, moduli in zip(got, want, (y, dv, dz, dw)): assert ((p - q).abs() <= 2e-6 * moduli).all(), (b, m, L)


def test_long_resonant_sum():
    args = torch.randn(2, 4, 32, dtype=C64), nodes(16384), legs_poles(2, 32)[:, None]
    assert worst(cauchy(*args), cauchy(*(a.to(C128) for a in args))) <= 2e-6


def test_the_judge_is_right():
    "cauchy in complex128 is the oracle above; here it meets the literal sum on the same poles."
    args = torch.randn(2, 3, 32, dtype=C128), nodes(513).to(C128), legs_poles(2, 32)[:, None].to(C128)
    g = torch.randn(2, 3, 513, dtype=C128)
    for got, want in zip(with_grads(cauchy, args, g), with_grads(literal, args, g)): assert worst(got, want) < 1e-11


def test_reference_numbers(vectors):
    data, n = np.load(vectors / "c_func.npz", allow_pickle=False), 0
    for case in sorted({k.split("/")[0] for k in data if k.startswith("cauchy")}):
        t = {k.split("/")[1]: torch.tensor(data[k]) for k in data if k.startswith(case + "/")}
        args = [t[k].requires_grad_() for k in "vzw"]
        y = cauchy(*args)
        dv, dw = torch.autograd.grad((t["g"].conj() * y).real.sum(), (args[0], args[2]))
        pairs = (y, t["y"]), (cauchy(*args, conj=False), t["y_noconj"]), (dv, t["grad_v"]), (dw, t["grad_w"])
        for got, want in pairs: assert (got - want).norm() <= 1e-10 * want.norm(), case
        n += 1
    assert n >= 4


def test_infinite_nodes_give_zero():
    v, w, i = randn(3), randn(3), float("inf")
    z = torch.tensor([1j, complex(i), complex(0, i), complex(0, -i), complex(i, math.nan)]).to(C128).requires_grad_()
    for conj in (True, False):
        out = cauchy(v, z, w, conj)
        assert (out[1:] == 0).all() and torch.allclose(out[:1], literal(v, z[:1], w, conj))
        dv, dz, dw = torch.autograd.grad(out.abs().sum(), (v, z, w))
        assert all(d.isfinite().all() for d in (dv, dz, dw)) and (dz[1:] == 0).all() and dz[0] != 0


def test_nan_propagates():
    v, z, w = torch.ones(2, 2, dtype=C64), torch.tensor([1j, math.nan]), torch.tensor([[-1 + 1j, -1], [-1, math.nan]])
    assert cauchy(v, z, w).isnan().tolist() == [[False, True], [True, True]]


def test_dtypes_promote():
    f32, f64, c64 = torch.rand(3), torch.rand(3).double(), torch.randn(3, dtype=C64)
    assert cauchy(f32, f32, -f32 - 1).dtype == C64 and cauchy(f64, c64, -f32).dtype == C128 and cauchy(f32.bfloat16(), c64, c64).dtype == C64
    v = f32.clone().requires_grad_()
    cauchy(v, c64, -c64).abs().sum().backward()
    assert v.grad.dtype == torch.float32 and v.grad.isfinite().all()


@pytest.mark.parametrize("shapes, message", [(((2, 3), (4,), (2, 4)), "modes"), (((2, 3), (4,), (3, 3)), "equal or 1"), (((3,), (), (3,)), "dimension")])
def test_bad_shapes(shapes, message):
    with pytest.raises(ValueError, match=message): cauchy(*(torch.ones(s) for s in shapes))


def test_not_tensors_and_devices():
    with pytest.raises(ValueError, match="tensors"): cauchy([1.0], torch.ones(1), torch.ones(1))
    with pytest.raises(ValueError, match="one device"): cauchy(torch.ones(1), torch.ones(1, device="meta"), torch.ones(1))


def test_autocast_and_low_precision_settings_change_nothing():
    args, g = [torch.randn(2, 4, 32, dtype=C64), nodes(200), legs_poles(2, 32)[:, None]], torch.randn(2, 4, 200, dtype=C64)
    want = with_grads(cauchy, args, g)
    with torch.autocast("cpu", dtype=torch.bfloat16): inside = with_grads(cauchy, args, g)
    torch.set_float32_matmul_precision("medium")
    try: medium = with_grads(cauchy, args, g)
    finally: torch.set_float32_matmul_precision("highest")
    for a, b, c in zip(want, inside, medium): assert torch.equal(a, b) and torch.equal(a, c)


def test_tiles_cover_once_and_stay_small():
    for rows, l, width in [(1, 1, 1), (3, 5, 7), (300, 1, 64), (7, 100_000, 32), (2, 3, 10 * PAIRS["cpu"])]:
        count = torch.zeros(rows, l, dtype=torch.int)
        for i, j in tiles(rows, l, width, torch.device("cpu")):
            count[i, j] += 1
            assert count[i, j].numel() * width <= PAIRS["cpu"] or count[i, j].numel() == 1
        assert (count == 1).all()


def test_tile_size_does_not_matter(monkeypatch):
    args, g = [randn(5, 3, 4), randn(5, 17), randn(5, 1, 4)], torch.randn(5, 3, 17, dtype=C128)
    args[1] = args[1][:, None]
    want = with_grads(cauchy, args, g)
    monkeypatch.setitem(PAIRS, "cpu", 24)
    for got, w in zip(with_grads(cauchy, args, g), want): assert torch.allclose(got, w, rtol=1e-12)


def test_keeps_nothing_as_large_as_the_table():
    v, z, w, saved = randn(4, 2, 32), randn(600), randn(4, 1, 32), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.untyped_storage().nbytes()) or t, lambda t: t):
        CauchySum.apply(v, z.expand(4, -1), w[:, 0], True)
    assert sum(saved) == 16 * (v.numel() + z.numel() + w.numel())


@pytest.mark.parametrize("conj", [True, False])
def test_second_derivatives_in_torch(conj):
    v, z, w = randn(2, 2, 3), randn(4), randn(2, 1, 3)
    assert torch.autograd.gradgradcheck(lambda *a: cauchy(*a, conj, backend="torch"), (v, z, w))
    d, = torch.autograd.grad(cauchy(v, z, w, conj, backend="torch").abs().square().sum(), v, create_graph=True)
    d.abs().square().sum().backward()
    assert w.grad.abs().min() > 0
