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

from s4nb.s4.recurrence import dplr_step

OPS = ["cauchy", "cauchy_backward", "spectrum", "spectrum_backward", "vandermonde", "power_sums", "diag_step",
       "dplr_step"]
BORDER = 64                       # numbers around each array that must not be read (they are nan) nor written
C64, C128 = DTYPES = torch.complex64, torch.complex128
FORWARD, BACKWARD = {C64: 2e-6, C128: 1e-13}, {C64: 1e-5, C128: 1e-12}


class Emulator:
    "The kernels' launches as functions of tensors. Each call runs twice, threads and blocks forward and backwards."
    def __init__(self, library):
        self.library = ctypes.CDLL(library)
        self.library.run_backwards.argtypes = [ctypes.c_bool]
        for pick in (self.library.op_float, self.library.op_double): pick.restype = ctypes.c_void_p
        self.library.test_barrier.restype = ctypes.c_char_p

    def __call__(self, op, dtype, *args):
        "args: tensors, sizes, flags, and an Output where the op writes. Returns the tensors written."
        pick = self.library.op_float if dtype == C64 else self.library.op_double
        results = []
        for backwards in (False, True):
            self.library.run_backwards(backwards)
            given = [a.fresh() if isinstance(a, Output) else a for a in args]
            given = [Bordered(a) if isinstance(a, torch.Tensor) else a for a in given]
            kinds = [KINDS[type(a)] for a in given]
            error = ctypes.CFUNCTYPE(ctypes.c_char_p, *kinds)(pick(OPS.index(op)))(*map(raw, given))
            assert error is None, error.decode()
            assert all(a.intact() for a in given if isinstance(a, Bordered)), f"{op} wrote outside of an array"
            results.append([a.inside() for a, kind in zip(given, args) if isinstance(kind, Output)])
        for one, other in zip(*results): np.testing.assert_array_equal(one.numpy(), other.numpy())   # a race shows here
        return results[0] if len(results[0]) > 1 else results[0][0]


class Bordered:
    "A copy of a tensor with nan on both sides in memory."
    def __init__(self, t):
        self.shape, self.n = t.shape, t.numel()
        self.memory = torch.full((self.n + 2 * BORDER,), torch.nan, dtype=t.dtype)
        self.memory[BORDER:BORDER + self.n] = t.flatten()
    def inside(self): return self.memory[BORDER:BORDER + self.n].reshape(self.shape).clone()
    def intact(self): return bool(self.memory[:BORDER].isnan().all() and self.memory[BORDER + self.n:].isnan().all())


class Output:
    "Memory for an output, full of nan."
    def __init__(self, *shape, dtype): self.shape, self.dtype = shape, dtype
    def fresh(self): return torch.full(self.shape, torch.nan, dtype=self.dtype)


KINDS = {Bordered: ctypes.c_void_p, type(None): ctypes.c_void_p, bool: ctypes.c_bool, int: ctypes.c_int64}
def raw(a): return a.memory[BORDER:].data_ptr() if isinstance(a, Bordered) else a
def like(*tensors): return [Output(*t.shape, dtype=t.dtype) for t in tensors]


@pytest.fixture(scope="session")
def emulator(tmp_path_factory):
    compiler = shutil.which("g++")
    if not compiler or sys.platform != "linux": pytest.skip("the emulator of CUDA threads needs Linux and g++")
    library = tmp_path_factory.mktemp("emulator") / "emulator.so"
    done = subprocess.run([compiler, "-std=c++17", "-O1", "-fPIC", "-shared", ROOT / "tests/cuda_emulator.cpp",
                           "-I", ROOT / "extensions/structured_kernels", "-o", library], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return Emulator(library)


def numbers(*shape, seed=0, dtype=C128):
    g = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, dtype=C128, generator=g).to(dtype)


def modes(*shape, dtype=C128):
    w = numbers(*shape, seed=1)
    return torch.complex(-0.1 - w.real.abs(), 3 * w.imag).to(dtype)


def real(x): return x.real.contiguous()


def close(got, want, tolerance):
    assert got.shape == want.shape and bool(torch.view_as_real(got.to(C128)).isfinite().all())
    if want.numel():
        error = (got.to(want.dtype) - want).abs().max() / want.abs().max().clamp(min=1e-300)
        assert error <= tolerance, f"{error:.1e} relative"


def all_close(got, want, tolerance):
    for g, w in zip(got, want, strict=True): close(g, w, tolerance)


def cauchy(v, z, w, pairs):
    "v (B,R,M), z (B|1,L), w (B,M) -> (B,R,L), literally"
    def half(v, w): return (v.unsqueeze(-1) / (z[:, None, None] - w[:, None, :, None])).sum(2)
    return half(v, w) + half(v.conj(), w.conj()) if pairs else half(v, w)


def with_gradients(f, grad, *inputs):
    "f and the gradients of its inputs, in complex128"
    leaves = [t.to(C128).requires_grad_() for t in inputs]
    out = f(*leaves)
    return out.detach(), torch.autograd.grad(out, leaves, grad.to(out.dtype))


# ---- the emulator itself ---------------------------------------------------------------------------------------------
def test_emulator_sees_a_missing_barrier(emulator):
    def run(kind, backwards):
        emulator.library.run_backwards(backwards)
        x = np.arange(64.0)
        return emulator.library.test_barrier(kind, x.ctypes.data_as(ctypes.c_void_p)), x
    assert (run(0, False)[1] == run(0, True)[1]).all() and run(0, False)[1][1] == 2
    assert (run(1, False)[1] != run(1, True)[1]).any()
    assert run(2, False)[0] is None                          # threads that have ended are not waited for
    assert b"never come" in run(3, False)[0]


# ---- Cauchy sums -----------------------------------------------------------------------------------------------------
def check_cauchy(emulator, v, z, w, grad, pairs):
    (B, R, M), (rows, L), dtype = v.shape, z.shape, v.dtype
    want, wanted = with_gradients(lambda *a: cauchy(*a, pairs), grad, v, z, w)
    sizes = B, R, M, L, rows, pairs
    close(emulator("cauchy", dtype, v, z, w, Output(B, R, L, dtype=dtype), *sizes), want, FORWARD[dtype])
    all_close(emulator("cauchy_backward", dtype, grad, v, z, w, *like(v, z, w), *sizes), wanted, BACKWARD[dtype])


@pytest.mark.parametrize("R, M, L", [(1, 1, 1), (2, 33, 17), (3, 3, 100), (4, 33, 2), (6, 3, 17), (4, 1, 300),
                                     (5, 65, 3), (1, 300, 1)])
def test_cauchy(emulator, R, M, L):
    for dtype, pairs, rows in itertools.product(DTYPES, (True, False), (1, 2)):
        data = numbers(2, R, M), 4 * numbers(rows, L), modes(2, M), numbers(2, R, L, seed=5)
        check_cauchy(emulator, *(t.to(dtype) for t in data), pairs)


@pytest.mark.parametrize("B, R, M, L", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0)])
def test_cauchy_empty(emulator, B, R, M, L):
    check_cauchy(emulator, numbers(B, R, M), numbers(1, L), modes(B, M), numbers(B, R, L), True)


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1e12])
def test_cauchy_beyond_float(emulator, scale):
    "|z-w|^4 leaves the range of float32, the sums do not."
    data = numbers(1, 2, 3), scale * numbers(1, 5), scale * modes(1, 3), min(scale, 1) ** 2 * numbers(1, 2, 5, seed=5)
    check_cauchy(emulator, *(t.to(C64) for t in data), True)


def spectrum(v, w, L):
    "v (H,I,J,M), w (H,M) -> the spectrum (H,I-1,J-1,L//2+1) and the sums (H,I,J,(L+1)//2), literally"
    z = 2j * torch.tan(torch.pi * torch.arange((L + 1) // 2, dtype=torch.float64) / L)
    def half(v, w): return (v.unsqueeze(-1) / (z - w[:, None, None, :, None])).sum(3)
    k = half(v, w) + half(v.conj(), w.conj())
    out = (1 + z / 2) * (k[:, :-1, :-1] - k[:, :-1, -1:] * k[:, -1:, :-1] / (1 + k[:, -1:, -1:]))
    if L % 2: return out, k
    return torch.cat([out, v[:, :-1, :-1].real.sum(-1, keepdim=True).to(out.dtype)], -1), k


@pytest.mark.parametrize("I, J, M, L", [(2, 2, 33, 100), (2, 2, 3, 1), (2, 2, 1, 2), (3, 2, 3, 17), (2, 4, 33, 18),
                                        (1, 1, 3, 8), (2, 1, 3, 8), (2, 2, 32, 601)])
def test_spectrum(emulator, I, J, M, L):
    check_spectrum(emulator, numbers(2, I, J, M), modes(2, M), L)


@pytest.mark.parametrize("scale", [1e8, 1e10, 1e18, 1e30])
@pytest.mark.parametrize("I, J, M, L", [(2, 2, 3, 17), (3, 2, 3, 300)])
def test_spectrum_beyond_float(emulator, I, J, M, L, scale):
    "Squares of poles leave the range of float32, the sums do not; of all poles, and of one."
    for far in (1, M):
        v, w = numbers(2, I, J, M), modes(2, M)
        v[..., :far] *= scale; w[..., :far] *= scale
        check_spectrum(emulator, v, w, L, DTYPES[:1])


def check_spectrum(emulator, v, w, L, dtypes=DTYPES):
    (_, I, J, M), grad = v.shape, numbers(2, v.shape[1] - 1, v.shape[2] - 1, L // 2 + 1, seed=5)
    v[:, -1, -1] = v[:, -1, -1].abs()                           # |p|^2: 1 + k_IJ stays away from 0, as in S4
    sizes = 2, I, J, M, L
    for dtype in dtypes:
        want, k = spectrum(v, w, L)
        sums, out = emulator("spectrum", dtype, v, w, *like(k.to(dtype), want.to(dtype)), *sizes)
        all_close([sums, out], [k, want], FORWARD[dtype])
        wanted = [torch.zeros_like(v), torch.zeros_like(w)]
        if want.numel(): wanted = with_gradients(lambda *a: spectrum(*a, L)[0], grad.to(dtype), v, w)[1]
        got = emulator("spectrum_backward", dtype, grad.to(dtype), sums, v, w, *like(v, w), *sizes)
        all_close(got, wanted, BACKWARD[dtype])


# ---- sums of powers --------------------------------------------------------------------------------------------------
POWERS = [(1, 1, 1), (2, 3, 2), (1, 33, 100), (2, 3, 5000), (3, 0, 4), (0, 2, 4), (1, 2, 0), (1, 65, 1025),
          (1, 33, 4095), (1, 16, 4096), (1, 17, 4097), (2, 1, 8191), (1, 15, 8192), (1, 1, 8193), (1, 17, 12289),
          (1, 2, 16384), (2, 1, 16385)]


@pytest.mark.parametrize("R, M, L", POWERS)
def test_vandermonde(emulator, R, M, L):
    x = modes(2, M) / 10
    for dtype, pairs in itertools.product(DTYPES, (True, False)):
        v = numbers(2, R, M, dtype=dtype)
        want = torch.einsum("brm,bml->brl", v.to(C128), torch.exp(x[..., None] * torch.arange(L)))
        out = Output(2, R, L, dtype=v.real.dtype if pairs else dtype)
        got = emulator("vandermonde", dtype, v, x, out, 2, R, M, L, pairs)
        close(got, 2 * want.real if pairs else want, FORWARD[dtype])


@pytest.mark.parametrize("R, M, L", POWERS)
def test_power_sums(emulator, R, M, L):
    x, t = modes(2, M) / 10, torch.arange(L)
    powers = torch.exp(x[..., None] * t)
    for dtype, is_real in itertools.product(DTYPES, (True, False)):
        u = numbers(2, R, L, dtype=dtype)
        if is_real: u = real(u)
        first, second = (torch.einsum("brl,bml->brm", p * u.to(C128), powers) for p in (1, t))
        out, sizes = Output(2, R, M, dtype=dtype), (2, R, M, L, is_real)
        close(emulator("power_sums", dtype, u, x, out, None, *sizes), first, 2 * FORWARD[dtype])
        all_close(emulator("power_sums", dtype, u, x, out, out, *sizes), [first, second], 2 * FORWARD[dtype])


def test_powers_that_grow(emulator):
    "Powers beyond the last position overflow; those before it do not."
    x, L, M = torch.tensor([[3 + 1j, 0.5 - 2j, -torch.inf]], dtype=C128), 20, 3
    powers = torch.exp(x[..., None] * torch.arange(1, L))
    powers = torch.cat([torch.ones_like(powers[..., :1]), powers.nan_to_num(0)], -1)
    v, u = numbers(1, 1, M, dtype=C64), numbers(1, 1, L, dtype=C64)
    K = emulator("vandermonde", C64, v, x, Output(1, 1, L, dtype=C64), 1, 1, M, L, False)
    close(K, torch.einsum("brm,bml->brl", v.to(C128), powers), FORWARD[C64])
    sums = emulator("power_sums", C64, u, x, Output(1, 1, M, dtype=C64), None, 1, 1, M, L, False)
    close(sums, torch.einsum("brl,bml->brm", u.to(C128), powers), FORWARD[C64])


# ---- steps -----------------------------------------------------------------------------------------------------------
def read(C, state): return 2 * torch.einsum("chm,bhm->bch", C.to(C128), state).real


@pytest.mark.parametrize("b, c, h, m", [(1, 1, 1, 1), (2, 3, 5, 33), (3, 1, 2, 100), (0, 1, 2, 3), (2, 1, 3, 0),
                                        (1, 0, 2, 3)])
def test_diag_step(emulator, b, c, h, m):
    for dtype in DTYPES:
        shapes = (h, m), (h, m), (c, h, m), (b, h, m), (b, h)
        A, B, C, state, u = (numbers(*s, dtype=dtype, seed=i) for i, s in enumerate(shapes))
        u, new = real(u), (A * state + B * real(u)[..., None]).to(C128)
        outputs = Output(b, c, h, dtype=u.dtype), *like(state)
        got = emulator("diag_step", dtype, A, B, C, u, state, *outputs, b, h, m, c)
        all_close(got, [read(C, new), new], BACKWARD[dtype])


@pytest.mark.parametrize("r, b, c, h, m", [(1, 2, 1, 3, 33), (2, 1, 2, 2, 3), (3, 2, 1, 1, 40), (0, 1, 1, 2, 3),
                                           (1, 0, 1, 2, 3)])
def test_dplr_step(emulator, r, b, c, h, m):
    for dtype in DTYPES:
        shapes = (h, m), (h, m), (r, h, m), (r, h, m), (h, m), (c, h, m), (b, h), (b, h, m)
        D, E, P, Q, B2, C, u, state = (numbers(*s, dtype=dtype, seed=i) for i, s in enumerate(shapes))
        P, Q, u = P / (m + 1), Q / (m + 1), real(u)
        new = dplr_step([t.to(C128) for t in (D, E, P, Q, B2)], u.double(), state.to(C128))
        outputs = Output(b, c, h, dtype=u.dtype), *like(state)
        got = emulator("dplr_step", dtype, D, E, P, Q, B2, C, u, state, *outputs, b, h, m, c, r)
        all_close(got, [read(C, new), new], BACKWARD[dtype])
