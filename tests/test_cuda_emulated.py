"The CUDA kernels run thread by thread on the CPU (cuda_emulator.cpp) and are compared with the formulas in float64."
import ctypes
import itertools
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from house import ROOT

OPS = ["cauchy", "cauchy_backward", "spectrum", "spectrum_backward", "vandermonde", "power_sums", "diag_step", "dplr_step"]
BORDER = 64                       # numbers around each array that must not be read (they are nan) nor written
DTYPES = [torch.complex64, torch.complex128]
FORWARD, BACKWARD = {torch.complex64: 2e-6, torch.complex128: 1e-13}, {torch.complex64: 1e-5, torch.complex128: 1e-12}


class Emulator:
    "The kernels' launches as functions of tensors. Each call runs twice, threads and blocks forward and backwards."
    def __init__(self, library):
        self.library = ctypes.CDLL(library)
        self.library.run_backwards.argtypes = [ctypes.c_bool]
        for pick in (self.library.op_float, self.library.op_double): pick.restype = ctypes.c_void_p
        self.library.test_barrier.restype = ctypes.c_char_p

    def __call__(self, op, dtype, *args, outputs):
        "args: tensors, sizes, and None in the places of outputs, a list of (shape, dtype)."
        pick = self.library.op_float if dtype == torch.complex64 else self.library.op_double
        results = []
        for backwards in (False, True):
            self.library.run_backwards(backwards)
            made = [Bordered(torch.full(shape, torch.nan, dtype=t)) for shape, t in outputs]
            todo, given, kinds = iter(made), [], []
            for a in args:
                a = next(todo) if a is None else Bordered(a) if isinstance(a, torch.Tensor) else a
                given.append(a)
                kinds.append(ctypes.c_void_p if isinstance(a, Bordered) else ctypes.c_bool if isinstance(a, bool) else ctypes.c_int64)
            run = ctypes.CFUNCTYPE(ctypes.c_char_p, *kinds)(pick(OPS.index(op)))
            error = run(*(a.pointer() if isinstance(a, Bordered) else a for a in given))
            assert error is None, error.decode()
            assert all(a.intact() for a in given if isinstance(a, Bordered)), f"{op} wrote outside of an array"
            results.append([m.inside() for m in made])
        for one, other in zip(*results): np.testing.assert_array_equal(one.numpy(), other.numpy())   # a race shows here
        return results[0] if len(outputs) > 1 else results[0][0]


class Bordered:
    "A copy of a tensor with nan on both sides in memory."
    def __init__(self, t):
        self.shape, self.n = t.shape, t.numel()
        self.memory = torch.full((self.n + 2 * BORDER,), torch.nan, dtype=t.dtype)
        self.memory[BORDER:BORDER + self.n] = t.flatten()
    def pointer(self): return self.memory[BORDER:].data_ptr()
    def inside(self): return self.memory[BORDER:BORDER + self.n].reshape(self.shape).clone()
    def intact(self): return bool(self.memory[:BORDER].isnan().all() and self.memory[BORDER + self.n:].isnan().all())


@pytest.fixture(scope="session")
def emulator(tmp_path_factory):
    compiler = shutil.which("g++")
    if not compiler or sys.platform != "linux": pytest.skip("the emulator of CUDA threads needs Linux and g++")
    library = tmp_path_factory.mktemp("emulator") / "emulator.so"
    done = subprocess.run([compiler, "-std=c++17", "-O1", "-fPIC", "-shared", "-I", ROOT / "extensions/structured_kernels",
                           ROOT / "tests/cuda_emulator.cpp", "-o", library], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return Emulator(library)


def numbers(*shape, seed=0, dtype=torch.complex128, scale=1.0):
    g = torch.Generator().manual_seed(seed + sum(shape))
    return (scale * torch.randn(*shape, dtype=torch.complex128, generator=g)).to(dtype)


def stable_modes(*shape, seed=1, dtype=torch.complex128):
    w = numbers(*shape, seed=seed)
    return torch.complex(-0.1 - w.real.abs(), 3 * w.imag).to(dtype)


def close(got, want, tolerance):
    assert got.shape == want.shape and bool(got.isfinite().all())
    if want.numel():
        error = (got.to(want.dtype) - want).abs().max() / want.abs().max().clamp(min=1e-300)
        assert error <= tolerance, f"{error:.1e} relative"


def both_halves(f, v, w): return f(v, w) + f(v.conj(), w.conj())


def cauchy(v, z, w, pairs):
    "v (B,R,M), z (B|1,L), w (B,M) -> (B,R,L), literally"
    def half(v, w): return (v.unsqueeze(-1) / (z[:, None, None] - w[:, None, :, None])).sum(2)
    return both_halves(half, v, w) if pairs else half(v, w)


def with_gradients(f, grad, *inputs):
    "f and the gradients of its inputs, in complex128"
    leaves = [t.to(torch.complex128).requires_grad_() for t in inputs]
    out = f(*leaves)
    return out.detach(), torch.autograd.grad(out, leaves, grad.to(out.dtype))


# ---- the emulator itself -----------------------------------------------------------------------------------------------
def test_emulator_sees_a_missing_barrier(emulator):
    def run(kind, backwards):
        emulator.library.run_backwards(backwards)
        x = np.arange(64.0)
        return emulator.library.test_barrier(kind, x.ctypes.data_as(ctypes.c_void_p)), x
    assert (run(0, False)[1] == run(0, True)[1]).all() and run(0, False)[1][1] == 2
    assert (run(1, False)[1] != run(1, True)[1]).any()
    assert run(2, False)[0] is None                          # threads that have ended are not waited for
    assert b"never come" in run(3, False)[0]


# ---- Cauchy sums -------------------------------------------------------------------------------------------------------
SHAPES = [(1, 1, 1), (2, 33, 17), (3, 3, 100), (4, 33, 2), (6, 3, 17), (4, 1, 300), (5, 65, 3), (1, 300, 1)]


@pytest.mark.parametrize("R, M, L", SHAPES)
def test_cauchy(emulator, R, M, L):
    for dtype, pairs, rows in itertools.product(DTYPES, (True, False), (1, 2)):
        v, z, w, grad = (t.to(dtype) for t in (numbers(2, R, M), 4 * numbers(rows, L), stable_modes(2, M), numbers(2, R, L, seed=5)))
        want, wanted = with_gradients(lambda v, z, w: cauchy(v, z, w, pairs), grad, v, z, w)
        out = emulator("cauchy", dtype, v, z, w, None, 2, R, M, L, rows, pairs, outputs=[(want.shape, dtype)])
        close(out, want, FORWARD[dtype])
        got = emulator("cauchy_backward", dtype, grad, v, z, w, None, None, None, 2, R, M, L, rows, pairs,
                       outputs=[(t.shape, dtype) for t in (v, z, w)])
        for g, expected in zip(got, wanted, strict=True): close(g, expected, BACKWARD[dtype])


@pytest.mark.parametrize("B, R, M, L", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0)])
def test_cauchy_empty(emulator, B, R, M, L):
    v, z, w, grad = numbers(B, R, M), numbers(1, L), stable_modes(B, M), numbers(B, R, L)
    out = emulator("cauchy", v.dtype, v, z, w, None, B, R, M, L, 1, True, outputs=[((B, R, L), v.dtype)])
    assert (out == 0).all()
    got = emulator("cauchy_backward", v.dtype, grad, v, z, w, None, None, None, B, R, M, L, 1, True, outputs=[(t.shape, v.dtype) for t in (v, z, w)])
    assert all((g == 0).all() for g in got)


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1e12])
def test_cauchy_beyond_float(emulator, scale):
    "|z-w|^4 leaves the range of float32, the sums do not."
    v, z, w = numbers(1, 2, 3, dtype=torch.complex64), (scale * numbers(1, 5)).to(torch.complex64), (scale * stable_modes(1, 3)).to(torch.complex64)
    grad = scale**2 * numbers(1, 2, 5, seed=5, dtype=torch.complex64) if scale < 1 else numbers(1, 2, 5, seed=5, dtype=torch.complex64)
    want, wanted = with_gradients(lambda v, z, w: cauchy(v, z, w, True), grad, v, z, w)
    out = emulator("cauchy", v.dtype, v, z, w, None, 1, 2, 3, 5, 1, True, outputs=[(want.shape, v.dtype)])
    close(out, want, FORWARD[v.dtype])
    got = emulator("cauchy_backward", v.dtype, grad, v, z, w, None, None, None, 1, 2, 3, 5, 1, True, outputs=[(t.shape, v.dtype) for t in (v, z, w)])
    for g, expected in zip(got, wanted, strict=True): close(g, expected, BACKWARD[v.dtype])


def spectrum(v, w, L):
    "v (H,I,J,M), w (H,M) -> (H,c,b,L//2+1), literally"
    k = torch.arange((L + 1) // 2, dtype=torch.float64)
    z = 2j * torch.tan(torch.pi * k / L)
    def half(v, w): return (v.unsqueeze(-1) / (z - w[:, None, None, :, None])).sum(3)
    k = both_halves(half, v, w)
    out = (1 + z / 2) * (k[:, :-1, :-1] - k[:, :-1, -1:] * k[:, -1:, :-1] / (1 + k[:, -1:, -1:]))
    if L % 2: return out, k
    return torch.cat([out, v[:, :-1, :-1].real.sum(-1, keepdim=True).to(out.dtype)], -1), k


@pytest.mark.parametrize("I, J, M, L", [(2, 2, 33, 100), (2, 2, 3, 1), (2, 2, 1, 2), (3, 2, 3, 17), (2, 4, 33, 18), (1, 1, 3, 8), (2, 1, 3, 8), (2, 2, 32, 601)])
def test_spectrum(emulator, I, J, M, L):
    H, F, K = 2, L // 2 + 1, (L + 1) // 2
    v, w, grad = numbers(H, I, J, M), stable_modes(H, M), numbers(H, I - 1, J - 1, F, seed=5)
    v[:, -1, -1] = v[:, -1, -1].abs() ** 2                      # |p|^2: 1 + k_IJ stays away from 0, as in S4
    for dtype in DTYPES:
        grad = grad.to(dtype)
        (want, k), sums = spectrum(v, w, L), None
        out, sums = reversed(emulator("spectrum", dtype, v, w, None, None, H, I, J, M, L, outputs=[(k.shape, dtype), (want.shape, dtype)]))
        close(out, want, FORWARD[dtype])
        close(sums, k, FORWARD[dtype])
        wanted = with_gradients(lambda v, w: spectrum(v, w, L)[0], grad, v, w)[1] if want.numel() else (v * 0, w * 0)
        got = emulator("spectrum_backward", dtype, grad, sums, v, w, None, None, H, I, J, M, L, outputs=[(t.shape, t.dtype) for t in (v, w)])
        for g, expected in zip(got, wanted, strict=True): close(g, expected, BACKWARD[dtype])


# ---- sums of powers ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("R, M, L", [(1, 1, 1), (2, 3, 2), (1, 33, 100), (2, 3, 5000), (3, 0, 4), (0, 2, 4), (1, 2, 0)])
def test_vandermonde(emulator, R, M, L):
    x = stable_modes(2, M) / 10
    for dtype, pairs in itertools.product(DTYPES, (True, False)):
        v = numbers(2, R, M, dtype=dtype)
        want = torch.einsum("brm,bml->brl", v.to(x.dtype), torch.exp(x[..., None] * torch.arange(L)))
        if pairs: want = 2 * want.real
        out = emulator("vandermonde", dtype, v, x, None, 2, R, M, L, pairs, outputs=[(want.shape, v.real.dtype if pairs else dtype)])
        close(out, want, FORWARD[dtype])


@pytest.mark.parametrize("R, M, L", [(1, 1, 1), (2, 3, 2), (1, 33, 100), (2, 3, 5000), (3, 0, 4), (0, 2, 4), (1, 2, 0)])
def test_power_sums(emulator, R, M, L):
    x, t = stable_modes(2, M) / 10, torch.arange(L)
    for dtype, real, moments in itertools.product(DTYPES, (True, False), (True, False)):
        u = numbers(2, R, L, dtype=dtype)
        if real: u = u.real.contiguous()
        want = [torch.einsum("brl,bml->brm", p * u.to(x.dtype), torch.exp(x[..., None] * t)) for p in (1, t)[:1 + moments]]
        args = (u, x, None, *([None] if moments else [None]), 2, R, M, L, real)
        got = emulator("power_sums", dtype, *args, outputs=[((2, R, M), dtype)] * 2) if moments else no_moments(emulator, dtype, u, x, real)
        for g, expected in zip(got, want): close(g, expected, 2 * FORWARD[dtype])


def no_moments(emulator, dtype, u, x, real):
    "power_sums with a null pointer for the moments"
    (B, R, L), M = u.shape, x.shape[1]
    return [emulator("power_sums", dtype, u, x, None, 0, B, R, M, L, real, outputs=[((B, R, M), dtype)])]


# ---- steps -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("b, c, h, m", [(1, 1, 1, 1), (2, 3, 5, 33), (3, 1, 2, 100), (0, 1, 2, 3), (2, 1, 3, 0), (1, 0, 2, 3)])
def test_diag_step(emulator, b, c, h, m):
    for dtype in DTYPES:
        A, B, C, state = (numbers(*s, dtype=dtype, seed=i) for i, s in enumerate([(h, m), (h, m), (c, h, m), (b, h, m)]))
        u = numbers(b, h, dtype=dtype).real.contiguous()
        new = (A * state + B * u[..., None]).to(torch.complex128)
        y, got = emulator("diag_step", dtype, A, B, C, u, state, None, None, b, h, m, c, outputs=[((b, c, h), u.dtype), ((b, h, m), dtype)])
        close(got, new, FORWARD[dtype])
        close(y, 2 * torch.einsum("chm,bhm->bch", C.to(new.dtype), new).real, BACKWARD[dtype])


@pytest.mark.parametrize("r, b, c, h, m", [(1, 2, 1, 3, 33), (2, 1, 2, 2, 3), (3, 2, 1, 1, 40), (0, 1, 1, 2, 3), (1, 0, 1, 2, 3)])
def test_dplr_step(emulator, r, b, c, h, m):
    from s4nb.s4.recurrence import dplr_step
    for dtype in DTYPES:
        D, E, B2, state = (numbers(*s, seed=i) for i, s in enumerate([(h, m), (h, m), (h, m), (b, h, m)]))
        P, Q, C, u = numbers(r, h, m) / (m + 1), numbers(r, h, m, seed=9) / (m + 1), numbers(c, h, m), numbers(b, h).real.contiguous()
        new = dplr_step((D, E, P, Q, B2), u, state)
        given = [t.to(dtype) for t in (D, E, P, Q, B2, C)] + [u.to(torch.zeros((), dtype=dtype).real.dtype), state.to(dtype)]
        y, got = emulator("dplr_step", dtype, *given, None, None, b, h, m, c, r, outputs=[((b, c, h), given[-2].dtype), ((b, h, m), dtype)])
        close(got, new, FORWARD[dtype])
        close(y, 2 * torch.einsum("chm,bhm->bch", C, new).real, BACKWARD[dtype])
