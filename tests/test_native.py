"The compiled ops: every shape against literal sums in complex128, gradients, torch's own checks of an op, each instruction set."
import os
import subprocess
import sys
from itertools import product

import pytest
import torch
from house import ROOT
from torch.autograd import gradcheck, gradgradcheck

from s4nb import S4Block
from s4nb.ops import cauchy, log_vandermonde, log_vandermonde_transpose
from s4nb.ops.cauchy_sum import usable
from s4nb.ops.native import literal_cauchy, literal_powers, ops
from s4nb.s4.fused import diag_step_torch, dplr_step_torch, fast_diag_step, fast_dplr_step, spectrum_by_sums, spectrum_native
from s4nb.s4.generating import nodes
from s4nb.s4.nplr import nplr

C64, C128 = torch.complex64, torch.complex128
pytestmark = pytest.mark.skipif((why := usable("cauchy", "native")) != "ok", reason=f"no compiled library: {why[:200]}")
NATIVE = {"backend": "native"}


def randn(*shape, dtype=C128): return torch.randn(*shape, dtype=dtype)
def poles(*shape, dtype=C128): return torch.complex(-0.01 - 0.5 * torch.rand(*shape), 10 * torch.randn(*shape)).to(dtype)
def rates(*shape): return torch.complex(-0.01 * torch.rand(*shape), 3 * torch.randn(*shape)).to(C128)
def imaginary(L, dtype): return (1j * 10 * torch.randn(L)).to(dtype)


def gap(a, b, rows=True):
    "Worst relative distance of rows; of the whole where random numbers may cancel in a row."
    a, b = a.detach().to(C128), b.detach().to(C128)
    assert a.shape == b.shape
    if not b.numel(): return 0.0
    if not rows: a, b = a.flatten(), b.flatten()
    return ((a - b).abs().square().sum(-1) / b.abs().square().sum(-1).clamp(min=1e-300)).sqrt().max().item()


def compare(f, literal, leaves, dtype, forward, backward, rows=True):
    "Outputs and gradients of f in dtype beside those of the literal formula in complex128."
    mine, judge = ([t.to(d if t.dtype == dtype else t.dtype).detach().requires_grad_() for t in leaves] for d in (dtype, C128))
    out, want = f(*mine), literal(*judge)
    assert gap(out, want, rows) <= forward
    if not out.requires_grad or not out.numel(): return
    g = torch.randn_like(out)
    wide = g.to(want.dtype)
    for a, b in zip(torch.autograd.grad(out, mine, g), torch.autograd.grad(want, judge, wide)): assert gap(a, b, rows) <= backward


TOLERANCE = {C64: (2e-6, 1e-5), C128: (1e-13, 1e-12)}                    # what the issue of these kernels promises
SIZES = [(1, 1, 1), (1, 3, 2), (3, 2, 15), (3, 31, 16), (1, 32, 17), (3, 33, 513), (257, 3, 33), (3, 64, 1000), (1, 128, 4097),
         (2, 5, 4096), (1, 2, 16384)]


@pytest.mark.parametrize("dtype", [C64, C128])
@pytest.mark.parametrize("B, M, L", SIZES)
def test_cauchy(B, M, L, dtype):
    for conj, z in product((True, False), (imaginary(L, dtype), randn(L, dtype=dtype))):
        def literal(v, z, w): return literal_cauchy(v[:, None], z[None], w, conj)[0][:, 0]
        compare(lambda v, z, w: cauchy(v, z, w, conj, "native"), literal, (randn(B, M, dtype=dtype), z, poles(B, M, dtype=dtype)),
                dtype, *TOLERANCE[dtype], rows=False)


@pytest.mark.parametrize("dtype", [C64, C128])
@pytest.mark.parametrize("B, M, L", SIZES)
def test_vandermonde(B, M, L, dtype):
    forward, backward = TOLERANCE[dtype] if dtype == C64 else (1e-11, 1e-10)    # in float64 the phase x l has that error itself
    x = rates(B, M)
    for conj in (True, False):
        def literal(v): return literal_powers(v[:, None], x, L, conj)[0][:, 0]
        compare(lambda v: log_vandermonde(v, x, L, conj, "native"), literal, (randn(B, M, dtype=dtype),), dtype, forward, backward, rows=False)
    real = torch.randn(B, L, dtype=dtype.to_real())
    v = randn(B, M, dtype=dtype)
    for u in (real, randn(B, L, dtype=dtype)):
        want = v.to(C128) * torch.einsum("bl,bml->bm", u.to(C128), torch.exp(x[..., None] * torch.arange(L)))
        assert gap(log_vandermonde_transpose(u, v, x, L, **NATIVE), want, rows=False) <= backward


@pytest.mark.parametrize("R", [1, 2, 3, 4, 5, 9])
def test_numerators_share_poles(R):
    "Any number of them, in every layout that broadcasts."
    v, w, z = randn(R, 3, 7), poles(3, 7), randn(11)
    want = (v[..., None] / (z - w[..., None]) + v.conj()[..., None] / (z - w.conj()[..., None])).sum(-2)
    assert torch.allclose(cauchy(v, z, w, **NATIVE), want)
    assert torch.allclose(cauchy(v.movedim(0, 1), z, w[:, None], **NATIVE), want.movedim(0, 1))
    assert torch.allclose(cauchy(v, z.expand(R, 3, 11), w, **NATIVE), want)
    x = rates(3, 7)
    want = 2 * (v[..., None] * torch.exp(x[..., None] * torch.arange(6))).sum(-2).real
    assert torch.allclose(log_vandermonde(v, x, 6, **NATIVE), want)


@pytest.mark.parametrize("dtype", [C64, C128])
def test_layouts(dtype):
    "Strided, expanded, conjugated and empty tensors give what their contiguous copies give."
    v, w, z = randn(6, 8, dtype=dtype), poles(6, 8, dtype=dtype), randn(10, dtype=dtype)
    views = [lambda t: t[::2], lambda t: t.mT.contiguous().mT, lambda t: t[:1].expand(6, -1), lambda t: t.conj(),
             lambda t: t[:0], lambda t: t[:, :0], lambda t: t[:, 1::3]]
    for view in views:
        a, b = (view(t) for t in (v, w))
        assert torch.equal(cauchy(a, z, b, **NATIVE), cauchy(a.resolve_conj().clone(), z, b.resolve_conj().clone(), **NATIVE))
        x = view(rates(6, 8))
        assert torch.equal(log_vandermonde(a, x, 5, **NATIVE), log_vandermonde(a.resolve_conj().clone(), x.resolve_conj().clone(), 5, **NATIVE))
    assert torch.equal(cauchy(v, z[::2], w, **NATIVE), cauchy(v, z[::2].clone(), w, **NATIVE))
    assert cauchy(v, z[:0], w, **NATIVE).shape == (6, 0) and log_vandermonde(v, rates(6, 8), 0, **NATIVE).shape == (6, 0)


def test_out_of_range_of_floats():
    "Products of distances that overflow or underflow in float32 are computed again in double, there and back."
    v = torch.tensor([1.0 + 2j, -0.5j], dtype=C64)
    for scale in (1e-13, 1e-10, 1e10, 1e13):
        w, z = scale * torch.tensor([-0.1 + 1j, -0.2 - 2j], dtype=C64), scale * torch.tensor([0.9j, 3j, 0.1 + 1j], dtype=C64)
        compare(lambda v, w: cauchy(v, z, w, **NATIVE), lambda v, w: literal_cauchy(v[None, None], z.to(C128)[None], w[None], True)[0][0, 0],
                (v, w), C64, 1e-6, 1e-6)


SPECTRA = {"legs": 1, "legt": 2, "fout": 1}


@pytest.mark.parametrize("L", [64, 513, 1024, 4097, 16384])
@pytest.mark.parametrize("name", SPECTRA)
def test_single_precision_on_hippo_spectra(name, L):
    "Resonances: poles next to the imaginary axis, |w| up to 130."
    Lambda = nplr(name, 64, SPECTRA[name])[0]
    Lambda = torch.complex(Lambda.real.clamp(max=-1e-4), Lambda.imag)
    a, v = torch.logspace(-3, -1, 4, dtype=torch.float64)[:, None] * Lambda, randn(4, 32, dtype=C64)
    z = nodes(L, C64)[1:]
    compare(lambda v, w: cauchy(v, z, w, **NATIVE), lambda v, w: literal_cauchy(v[:, None], z.to(C128)[None], w, True)[0][:, 0],
            (v, a.to(C64)), C64, *TOLERANCE[C64])
    if L <= 4097:
        compare(lambda v, x: log_vandermonde(v, x, L, **NATIVE), lambda v, x: literal_powers(v[:, None], x, L, True)[0][:, 0], (v, a), C64,
                *TOLERANCE[C64])


SYSTEMS = [(1, 2, 2, 1, 1), (2, 2, 2, 3, 2), (3, 2, 2, 32, 16), (2, 3, 2, 31, 17), (2, 2, 5, 4, 1000), (1, 3, 4, 33, 1025), (0, 2, 2, 3, 4)]


@pytest.mark.parametrize("h, i, j, m, L", SYSTEMS)
def test_spectrum(h, i, j, m, L):
    "The fused spectrum beside Cauchy sums put together by torch."
    v, w = (0.3 * randn(h, i, j, m)).requires_grad_(), poles(h, m).requires_grad_()
    for dtype, most in ((C128, 1e-11), (C64, 2e-5)):                     # the random low-rank term magnifies float32
        out, want = spectrum_native(v, w, L, 1, dtype), spectrum_by_sums(v, w, L, 1, C128, "torch")
        assert out.dtype == dtype and gap(out, want) < most
        g = torch.randn_like(want)
        g[..., [0, -1]] = g[..., [0, -1]].real + 0j                      # where a real kernel's spectrum is real
        for a, b in zip(torch.autograd.grad(out, (v, w), g.to(dtype)), torch.autograd.grad(want, (v, w), g)): assert gap(a, b) < 5 * most


@pytest.mark.parametrize("dtype", [C64, C128])
@pytest.mark.parametrize("b, c, h, m, r", [(1, 1, 1, 1, 1), (3, 2, 5, 32, 1), (2, 1, 3, 7, 2), (0, 1, 2, 3, 1)])
def test_steps(b, c, h, m, r, dtype):
    u, state, C = torch.randn(b, h, dtype=dtype.to_real()), randn(b, h, m, dtype=dtype), randn(c, h, m, dtype=dtype)
    one, low = [randn(h, m, dtype=dtype) for _ in range(3)], [randn(r, h, m, dtype=dtype) for _ in range(2)]
    tolerance = {"rtol": 1e-4, "atol": 1e-3} if dtype == C64 else {"rtol": 1e-11, "atol": 1e-10}
    for mine, theirs in [(ops.diag_step(*one[:2], C, u, state), diag_step_torch(*one[:2], C, u, state)),
                         (ops.dplr_step(*one[:2], *low, one[2], C, u, state), dplr_step_torch(*one[:2], *low, one[2], C, u, state))]:
        for x, y in zip(mine, theirs): torch.testing.assert_close(x, y, **tolerance)


def test_steps_are_differentiable():
    u, (A, B, C, state) = torch.randn(3, 2, dtype=torch.float64, requires_grad=True), leaves((2, 4), (2, 4), (1, 2, 4), (3, 2, 4))
    assert gradcheck(lambda *a: fast_diag_step(*a, **NATIVE), (A, B, C, u, state))
    D, E, B2, C, P, Q = leaves((2, 4), (2, 4), (2, 4), (1, 2, 4), (1, 2, 4), (1, 2, 4))
    assert gradcheck(lambda *a: fast_dplr_step(a[:5], *a[5:], **NATIVE), (D, E, P, Q, B2, C, u, state))


def leaves(*shapes): return [randn(*s).requires_grad_() for s in shapes]


def test_gradients_by_differences():
    x = rates(2, 3).requires_grad_()
    for conj in (True, False):
        v, z, w = leaves((2, 2, 3), (2, 4), (2, 3))
        assert gradcheck(lambda *a: ops.cauchy(*a, conj), (v, z, w)) and gradgradcheck(lambda *a: ops.cauchy(*a, conj), (v, z, w))
        v, = leaves((2, 2, 3))
        assert gradcheck(lambda *a: ops.vandermonde(*a, 5, conj), (v, x)) and gradgradcheck(lambda *a: ops.vandermonde(*a, 5, conj), (v, x))
    for u in (torch.randn(2, 2, 5, dtype=torch.float64, requires_grad=True), *leaves((2, 2, 5))):
        assert gradcheck(lambda *a: ops.power_sums(*a, True), (u, x)) and gradgradcheck(lambda *a: ops.power_sums(*a, False)[0], (u, x))
    v, w = leaves((2, 2, 3, 3), (2, 3))
    for L in (6, 7): assert gradcheck(lambda *a: torch.fft.irfft(ops.dplr_spectrum(*a, L, False)[0], n=L), (v, w))


def test_second_derivatives_of_the_fused_spectrum():
    v, w = (0.1 * randn(1, 2, 2, 3)).requires_grad_(), (randn(1, 3) - 3).requires_grad_()
    for L in (6, 7): assert gradgradcheck(lambda *a: torch.fft.irfft(ops.dplr_spectrum(*a, L, False)[0], n=L), (v, w))


def test_forward_mode_is_refused_not_wrong():
    v, x = randn(3), rates(3)
    with pytest.raises(RuntimeError, match="forward-mode"): torch.func.jvp(lambda a: log_vandermonde(a, x, 4, **NATIVE), (v,), (v,))


def examples():
    "Arguments of every op, for torch's own checks."
    g = {"requires_grad": True}
    v, z, w, x = (torch.randn(*s, dtype=C64, **g) for s in [(2, 2, 3), (1, 4), (2, 3), (2, 3)])
    x = x.to(C128).detach().requires_grad_()
    yield "cauchy", (v, z, w, True)
    yield "cauchy_backward", (torch.randn(2, 2, 4, dtype=C64), v.detach(), z.detach(), w.detach(), True, True)
    yield "vandermonde", (v, x, 5, True)
    yield "power_sums", (torch.randn(2, 2, 5, **g), x, False)
    V, W = torch.randn(2, 2, 2, 3, dtype=C128), torch.randn(2, 3, dtype=C128)
    yield "dplr_spectrum", (V, W, 6, True)
    spectrum, sums = ops.dplr_spectrum(V, W, 6, True)
    yield "dplr_spectrum_backward", (spectrum, sums, V, W, 6)
    A, B, D, E, state, C, P = (torch.randn(*s, dtype=C64) for s in [(2, 3)] * 4 + [(4, 2, 3), (1, 2, 3), (1, 2, 3)])
    yield "diag_step", (A, B, C, torch.randn(4, 2), state)
    yield "dplr_step", (D, E, P, P + 1, B, C, torch.randn(4, 2), state)


def test_opcheck():
    for name, args in examples(): torch.library.opcheck(getattr(ops, name).default, args)


def test_compile_takes_the_ops_whole():
    torch.compiler.reset()
    v, w, z, x = randn(2, 3, dtype=C64).requires_grad_(), poles(2, 3, dtype=C64), imaginary(5, C64), rates(2, 3)
    def f(v): return cauchy(v, z, w, **NATIVE).abs().sum() + log_vandermonde(v, x, 7, **NATIVE).square().sum()
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(v), f(v))
    torch.testing.assert_close(*(torch.autograd.grad(g(v), v)[0] for g in (compiled, f)))


@pytest.mark.parametrize("mode", ["dplr", "diag"])
def test_compile_takes_a_block_whole(mode):
    torch.compiler.reset()                                               # other tests' graphs count to the limit of one function
    block = S4Block(4, 8, mode=mode).eval()
    u, longer, state = torch.randn(2, 20, 4), torch.randn(2, 33, 4), block.default_state(2)
    forward, step = (torch.compile(f, fullgraph=True, backend="aot_eager") for f in (block.forward, block.step))
    for args in ((u,), (longer,), (u, state), (longer, state)):
        for a, b in zip(forward(*args), block(*args)): torch.testing.assert_close(a, b)
    with torch.no_grad():
        eager = compiled = state
        for u_l in u.unbind(1)[:3]:
            (y, eager), (z, compiled) = block.step(u_l, eager), step(u_l, compiled)
            torch.testing.assert_close(y, z)


@pytest.mark.parametrize("mode", ["dplr", "diag"])
def test_compiled_gradients_of_both_directions(mode):
    torch.compiler.reset()
    block, u = S4Block(4, 8, mode=mode, bidirectional=True).eval(), torch.randn(2, 20, 4)
    params = [p for p in block.parameters() if p.requires_grad]
    ours, theirs = (torch.autograd.grad(f(u)[0].sum(), params) for f in (torch.compile(block, backend="aot_eager"), block))
    for a, b in zip(ours, theirs): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["checkpoint", "vmap", "fake"])
def test_a_first_call_inside_a_mode_leaves_the_backend_usable(mode):
    code = f"""
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from s4nb.ops import cauchy
from s4nb.ops.cauchy_sum import usable
v, w, z = torch.randn(2, 3, dtype=torch.complex64, requires_grad=True), torch.randn(2, 3) - 4, 1j * torch.randn(5)
if "{mode}" == "checkpoint": checkpoint(cauchy, v, z, w, use_reentrant=False).abs().sum().backward()
if "{mode}" == "vmap": torch.vmap(lambda v, w: cauchy(v, z, w))(v.detach(), w)
if "{mode}" == "fake":
    with FakeTensorMode(allow_non_fake_inputs=True): cauchy(v.detach(), z, w)
print(usable("cauchy", "native"))
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "ok", done.stdout + done.stderr


@pytest.mark.parametrize("args, says", [((randn(2, 1, 3), randn(1, 4), randn(2, 4), True), "shape of w"),
                                        ((randn(2, 1, 3), randn(1, 4).to(C64), randn(2, 3), True), "dtype of z"),
                                        ((randn(2, 2, 3).mT.contiguous().mT, randn(1, 4), randn(2, 3), True), "contiguous"),
                                        ((torch.randn(2, 1, 3), randn(1, 4), randn(2, 3), True), "v has to be complex")])
def test_raw_ops_refuse_what_they_cannot_read(args, says):
    with pytest.raises(RuntimeError, match=says): ops.cauchy(*args)


def test_results_do_not_depend_on_threads():
    v, w, z = randn(5, 8, dtype=C64).requires_grad_(), poles(5, 8, dtype=C64).requires_grad_(), imaginary(9000, C64)
    def run(threads):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            out = cauchy(v, z, w, **NATIVE)
            return out, *torch.autograd.grad(out.abs().sum(), (v, w))
        finally: torch.set_num_threads(before)
    for a, b in zip(run(1), run(2)): assert torch.equal(a, b)


@pytest.mark.parametrize("isa", ["base", "avx2", "avx512"])
def test_each_instruction_set(isa):
    "S4NB_ISA asks for less than the machine has; the results agree with plain torch."
    code = f"""
import ctypes, torch
from s4nb import S4Block
from s4nb.ops import cauchy, log_vandermonde, log_vandermonde_transpose
from s4nb.ops.native import loaded
torch.manual_seed(0)
v, w, z = torch.randn(3, 33, dtype=torch.complex64), torch.randn(3, 33, dtype=torch.complex64) - 4, 1j * torch.randn(777)
x = torch.complex(-torch.rand(3, 33), torch.randn(3, 33))
for dtype in (torch.complex64, torch.complex128):
    tolerance = 2e-6 if dtype == torch.complex64 else 1e-12
    for f in (lambda b: cauchy(v.to(dtype), z, w, backend=b), lambda b: log_vandermonde(v.to(dtype), x, 777, backend=b),
              lambda b: log_vandermonde_transpose(z.imag.to(dtype.to_real()), v.to(dtype), x, 777, backend=b)):
        a, b = f("native"), f("torch")
        assert ((a - b).norm() / b.norm()) < tolerance, ((a - b).norm() / b.norm())
for scale in (1e-13, 1e13):                                              # beyond the range of floats on the way
    a, b = (cauchy(v, scale * z.to(t), scale * w.to(t), backend=f) for f, t in (("native", v.dtype), ("torch", torch.complex128)))
    assert ((a - b).norm() / b.norm()) < 1e-5
name = ctypes.CDLL(loaded("cpu")).s4nb_instruction_set
name.restype = ctypes.c_char_p
print(name().decode())
"""
    env = {**os.environ, "S4NB_ISA": isa, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    if (got := done.stdout.strip()) != isa: pytest.skip(f"this machine or library has no {isa}: {got} ran")
