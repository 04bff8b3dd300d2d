"""The compiled CUDA ops and the layers on them, beside the CPU ops in double. Skipped without a GPU; .ci/gpu runs it on
a machine that has one, without conftest.py, because such a machine may lack what notebooks need."""
import itertools

import pytest
import torch

from s4nb import S4D, S4Block
from s4nb.ops.native import load, ops

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")]

C64, C128 = torch.complex64, torch.complex128
FORWARD, BACKWARD = {C64: 2e-6, C128: 1e-12}, {C64: 1e-5, C128: 1e-11}
MODES, LENGTHS = (1, 2, 3, 31, 32, 33, 64, 128), (1, 2, 15, 16, 17, 513, 1000, 4097, 16384, 16385)
GRID = [(B, M, L) for B, M, L in itertools.product((1, 3, 257), MODES, LENGTHS) if B * M * L <= 3e6]
EMPTY = [(0, 3, 4), (2, 0, 4), (2, 3, 0)]


@pytest.fixture(scope="module", autouse=True)
def libraries():
    "Both libraries; a reason for their absence is a failure here, not a skip."
    load("cpu")
    load("cuda")


def numbers(*shape, dtype=C128, seed=0):
    g = torch.Generator().manual_seed(seed + 31 * sum(shape))
    return torch.randn(*shape, dtype=C128, generator=g).to(dtype)


def modes(*shape, dtype=C128, seed=1, away=0.1):
    "Poles left of the imaginary axis, `away` from it or farther."
    w = numbers(*shape, seed=seed)
    return torch.complex(-away - w.real.abs(), 3 * w.imag).to(dtype)


def real(x): return x.real.contiguous()


def to(device, args, dtype=None):
    "Tensors to the device; complex ones of dtype `dtype` and real ones of its precision to double, if dtype is given."
    def move(a):
        if not isinstance(a, torch.Tensor): return a
        if dtype == C64: a = a.to(C128 if a.is_complex() else torch.float64)
        return a.to(device)
    return [move(a) for a in args]


def same(name, dtype, tolerance, *args, doubled=None):
    "The op on the GPU against the op on the CPU in double; two runs on the GPU agree bitwise. Returns the GPU's."
    def run(device, args, dtype=None):
        out = getattr(ops, name)(*to(device, args, dtype))
        return [out] if isinstance(out, torch.Tensor) else out
    got, again = run("cuda", args), run("cuda", args)
    want = run("cpu", args if doubled is None else doubled, dtype)
    case = f"{name} {[tuple(a.shape) if isinstance(a, torch.Tensor) else a for a in args]}"
    for i, (one, two, right) in enumerate(zip(got, again, want, strict=True)):
        assert one.shape == right.shape, case
        assert torch.equal(one, two), f"{case}, output {i}: two runs differ, or it is nan"
        if one.numel() == 0: continue
        error = float((one.cpu().to(right.dtype) - right).abs().max() / right.abs().max().clamp(min=1e-300))
        assert error <= tolerance, f"{case}, output {i}: off by {error:.1e}"
    return got


# ---- op by op --------------------------------------------------------------------------------------------------------
def run_cauchy(B, R, M, L, rows, dtype, pairs):
    data = numbers(B, R, M), 4 * numbers(rows, L), modes(B, M), numbers(B, R, L, seed=5)
    v, z, w, grad = (t.to(dtype) for t in data)
    same("cauchy", dtype, FORWARD[dtype], v, z, w, pairs)
    same("cauchy_backward", dtype, BACKWARD[dtype], grad, v, z, w, pairs, True)


def run_spectrum(H, I, J, M, L, dtype):
    "In single precision poles and nodes are rounded once; near a pole -a + bi that counts |b| / a times, here 25."
    wider = 4 if dtype == C64 else 1
    v, w = numbers(H, I, J, M) / (M + 1), modes(H, M, away=0.5)
    grad = numbers(H, I - 1, J - 1, L // 2 + 1, dtype=dtype, seed=5)
    v[:, -1, -1] = v[:, -1, -1].abs() ** 2
    _, sums = same("dplr_spectrum", dtype, wider * FORWARD[dtype], v, w, L, dtype == C64, doubled=(v, w, L, False))
    same("dplr_spectrum_backward", dtype, wider * BACKWARD[dtype], grad, sums, v, w, L)


def run_powers(B, R, M, L, dtype):
    v, x, u = numbers(B, R, M, dtype=dtype), modes(B, M) / 50, numbers(B, R, L, dtype=dtype, seed=5)
    for pairs in (True, False): same("vandermonde", dtype, FORWARD[dtype], v, x, L, pairs)
    for signal, moments in itertools.product((u, real(u)), (True, False)):
        same("power_sums", dtype, 2 * FORWARD[dtype], signal, x, moments)


def step_terms(b, c, h, m, r, dtype):
    "A, B, D, E (h m), P, Q (r h m), C (c h m), u (b h), state (b h m)"
    shapes = (h, m), (h, m), (h, m), (h, m), (r, h, m), (r, h, m), (c, h, m), (b, h), (b, h, m)
    A, B, D, E, P, Q, C, u, state = (numbers(*s, dtype=dtype, seed=i) for i, s in enumerate(shapes))
    return A, B, D, E, P / (m + 1), Q / (m + 1), C, real(u), state


def run_steps(b, c, h, m, r, dtype):
    A, B, D, E, P, Q, C, u, state = step_terms(b, c, h, m, r, dtype)
    same("diag_step", dtype, BACKWARD[dtype], A, B, C, u, state)
    same("dplr_step", dtype, BACKWARD[dtype], D, E, P, Q, B, C, u, state)


@pytest.mark.parametrize("dtype", [C64, C128])
def test_small_sizes(dtype):
    "Every kernel once, in seconds: what compute-sanitizer watches."
    for pairs in (True, False):
        for R in (1, 2, 6): run_cauchy(2, R, 33, 300, 1, dtype, pairs)
    for I, J, L in [(2, 2, 301), (3, 2, 18), (2, 1, 5), (1, 1, 4)]: run_spectrum(2, I, J, 33, L, dtype)
    run_powers(2, 2, 33, 4500, dtype)
    for r in (0, 1, 2): run_steps(2, 2, 3, 33, r, dtype)


@pytest.mark.parametrize("pairs", [True, False])
@pytest.mark.parametrize("dtype", [C64, C128])
def test_cauchy(dtype, pairs):
    for (B, M, L), R, own_nodes in zip(GRID, itertools.cycle((1, 2, 4, 5)), itertools.cycle((False, False, True))):
        run_cauchy(B, R, M, L, B if own_nodes else 1, dtype, pairs)
    for B, M, L in EMPTY: run_cauchy(B, 2, M, L, 1, dtype, pairs)


@pytest.mark.parametrize("dtype", [C64, C128])
@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1e12])
def test_cauchy_beyond_float(dtype, scale):
    "|z-w|^4 leaves the range of float32, the sums do not: they are done again in double."
    v, z, w = numbers(3, 2, 33, dtype=dtype), (scale * numbers(1, 70)).to(dtype), (scale * modes(3, 33)).to(dtype)
    grad = (min(scale, 1) ** 2 * numbers(3, 2, 70, seed=5)).to(dtype)
    same("cauchy", dtype, FORWARD[dtype], v, z, w, True)
    same("cauchy_backward", dtype, BACKWARD[dtype], grad, v, z, w, True, True)


@pytest.mark.parametrize("dtype", [C64, C128])
@pytest.mark.parametrize("I, J", [(2, 2), (3, 2), (2, 3), (4, 4), (2, 1)])
def test_spectrum(dtype, I, J):
    for H, M, L in GRID + [(0, 3, 4), (2, 0, 4)]: run_spectrum(H, I, J, M, L, dtype)


@pytest.mark.parametrize("dtype", [C64, C128])
def test_powers(dtype):
    for (B, M, L), R in zip(GRID, itertools.cycle((1, 3))): run_powers(B, R, M, L, dtype)
    for B, M, L in EMPTY: run_powers(B, 2, M, L, dtype)


@pytest.mark.parametrize("dtype", [C64, C128])
def test_steps(dtype):
    for b, c, h, m in itertools.product((1, 3, 16), (1, 3), (1, 257), MODES): run_steps(b, c, h, m, (b + m) % 4, dtype)
    for b, c, h, m in [(0, 1, 2, 3), (2, 0, 2, 3), (2, 1, 0, 3), (2, 1, 2, 0)]: run_steps(b, c, h, m, 1, dtype)


def test_more_rows_than_a_grid_is_high():
    B = 70_000
    run_cauchy(B, 1, 2, 3, 1, C64, True)
    run_spectrum(B, 2, 2, 2, 4, C64)
    run_powers(B, 1, 2, 3, C64)
    run_steps(B, 1, 2, 3, 1, C64)


def test_more_than_2_to_the_31_numbers():
    L, free = 2**31 + 12345, torch.cuda.mem_get_info()[0]
    if free < 3 * 4 * L: pytest.skip(f"takes {3 * 4 * L / 1e9:.0f} GB of the GPU's memory, {free / 1e9:.0f} are free")
    v, x = numbers(1, 1, 1, dtype=C64).cuda(), torch.tensor([[-1e-9 + 0.3j]], dtype=C128).cuda()
    K = ops.vandermonde(v, x, L, True)[0, 0]
    at = torch.tensor([0, 4096, 2**31 - 1, 2**31, L - 1])
    want = 2 * (v.cpu().to(C128)[0, 0] * torch.exp(x.cpu()[0] * at)).real
    assert (K[at.cuda()].cpu() - want).abs().max() <= 1e-6 * want.abs().max()
    del K
    u = torch.zeros(1, 1, L, device="cuda")
    u[0, 0, -1] = 1
    assert (ops.power_sums(u, x, False)[0].cpu() - torch.exp(x.cpu() * (L - 1))).abs().max() < 1e-5


# ---- how the ops are called ------------------------------------------------------------------------------------------
def test_refusals():
    v, z, w = (t.cuda() for t in (numbers(2, 3, 4, dtype=C64), numbers(1, 5, dtype=C64), numbers(2, 4, dtype=C64)))
    for args, reason in [((v, z.to(C128), w), "dtype of z"), ((v, z, w[:1]), "shape of w"), ((v, z.cpu(), w), "device"),
                         ((v.mT.contiguous().mT, z, w), "contiguous"), ((real(v), z, w), "v has to be complex")]:
        with pytest.raises((RuntimeError, NotImplementedError), match=reason): ops.cauchy(*args, True)


def calls():
    "Every op with arguments on the GPU, as functions without arguments."
    v, grad, z = numbers(3, 4, 33, dtype=C64), numbers(3, 4, 513, dtype=C64, seed=5), numbers(1, 513, dtype=C64)
    v, grad, z, w, x, V = to("cuda", (v, grad, z, modes(3, 33), modes(3, 33) / 50, numbers(3, 2, 2, 33) / 33))
    A, B, D, E, P, Q, C, u, state = to("cuda", step_terms(2, 1, 5, 33, 2, C64))
    single, spectrum_grad, sums = w.to(C64), grad[:, :1, None].contiguous(), ops.dplr_spectrum(V, w, 1024, True)[1]
    return {"cauchy": lambda: [ops.cauchy(v, z, single, True)],
            "cauchy_backward": lambda: ops.cauchy_backward(grad, v, z, single, True, True),
            "dplr_spectrum": lambda: ops.dplr_spectrum(V, w, 1024, True),
            "dplr_spectrum_backward": lambda: ops.dplr_spectrum_backward(spectrum_grad, sums, V, w, 1024),
            "vandermonde": lambda: [ops.vandermonde(v, x, 5000, True)],
            "power_sums": lambda: ops.power_sums(grad, x, True),
            "diag_step": lambda: ops.diag_step(A, B, C, u, state),
            "dplr_step": lambda: ops.dplr_step(D, E, P, Q, B, C, u, state)}


def test_current_stream_and_graphs():
    "Captured as a graph and replayed: only what runs on the current stream and never waits for the GPU can be."
    for name, call in calls().items():
        want, side = [t.clone() for t in call()], torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side): other = [t.clone() for t in call()]
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph): captured = call()
        for t in captured: t.zero_()
        graph.replay()
        torch.cuda.synchronize()
        for a, b, c in zip(want, other, captured, strict=True): assert torch.equal(a, b) and torch.equal(a, c), name


def test_a_hundred_runs_agree_bitwise():
    "Sums are made in one order: nothing depends on which block comes first."
    for name, call in calls().items():
        first = [t.clone() for t in call()]
        for _ in range(99): assert all(map(torch.equal, first, call())), name


def test_second_device():
    if torch.cuda.device_count() < 2: pytest.skip("one GPU here")
    v, z, w = (t.to("cuda:1") for t in (numbers(2, 3, 4), numbers(1, 5), modes(2, 4)))
    assert torch.cuda.current_device() == 0
    torch.testing.assert_close(ops.cauchy(v, z, w, True).cpu(), ops.cauchy(v.cpu(), z.cpu(), w.cpu(), True))
    with pytest.raises(RuntimeError, match="device"): ops.cauchy(v, z.to("cuda:0"), w, True)


# ---- layers ----------------------------------------------------------------------------------------------------------
LAYERS = {"S4": lambda: S4Block(16, 64), "S4 both ways": lambda: S4Block(16, 64, channels=2, bidirectional=True),
          "S4D": lambda: S4D(16, 64)}


@pytest.mark.parametrize("backend", ["native", "triton"])
@pytest.mark.parametrize("name", LAYERS)
def test_layers(name, backend, monkeypatch):
    "Output, gradients and steps of a layer on the GPU against the layer in plain torch on the CPU."
    torch.manual_seed(0)
    layer, twin, u = LAYERS[name](), LAYERS[name]().cuda(), torch.randn(3, 1000, 16)
    twin.load_state_dict(layer.state_dict())

    def run(layer, u):
        layer.zero_grad()
        y, state = layer(u, return_state=backend == "native" and not layer.bidirectional)
        y.square().mean().backward()
        return [y.detach(), *(p.grad for p in layer.parameters() if p.grad is not None)], state

    monkeypatch.setenv("S4NB_BACKEND", "torch")
    want, state = run(layer, u)
    monkeypatch.setenv("S4NB_BACKEND", backend)
    got, twin_state = run(twin, u.cuda())
    for a, b in zip(got, want, strict=True): assert (a.cpu() - b).norm() <= 1e-4 * b.norm()
    if layer.bidirectional or backend == "triton": return
    with torch.no_grad():
        for t in range(5):
            (y, state), (y_twin, twin_state) = layer.step(u[:, t], state), twin.step(u[:, t].cuda(), twin_state)
            assert (y_twin.cpu() - y).norm() <= 1e-4 * y.norm()
