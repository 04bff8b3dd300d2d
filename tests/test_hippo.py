"""HiPPO: matrices, rank corrections, projection, memory; against independent computations and against the reference's numbers."""
import json
import math

import numpy as np
import pytest
import torch
from s4nb.hippo import HiPPO, basis, density, discretize, project, rank_correction, reconstruct, white_signal
from s4nb.hippo.memory import white_from_normals
from s4nb.hippo.projection import WINDOWS, laguerre, legendre, quadrature, window
from s4nb.hippo.transition import TRANSITIONS, transition
from scipy import integrate, special

F64 = torch.float64
FIXED = [m for m in TRANSITIONS if m not in ("random", "diagonal")]
NORMAL = ["legs", "legsd", "legt", "lagt", "fout", "fourier", "fourier_decay", "fourier2", "foud", "fourier_diag"]


def cases(vectors, file, *prefixes):
    "(name, parameters, arrays) of the reference's cases whose names begin with a prefix."
    about = json.loads((vectors / f"{file}.json").read_text())["cases"]
    data = np.load(vectors / f"{file}.npz", allow_pickle=False)
    found = [(k, c["params"], {a: torch.from_numpy(np.array(data[f"{k}/{a}"])) for a in c["arrays"]})
             for k, c in about.items() if k.startswith(prefixes)]
    assert found, prefixes
    return found


# --- matrices ------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("alpha, beta", [(0.0, 0.01), (0.5, 0.1), (0.2, 1.0)])
def test_glagt_kernel_is_a_generalised_laguerre_function(alpha, beta):
    N, t = 10, torch.linspace(0.1, 6, 30, dtype=F64)
    A, B = transition("glagt", N, alpha=alpha, beta=beta)
    kernel = torch.linalg.matrix_exp(t[:, None, None] * A) @ B
    scale = math.sqrt(beta ** (1 - alpha) / special.gamma(1 - alpha))
    for n in range(N):
        norm = math.sqrt(special.gamma(n + alpha + 1) / special.factorial(n))
        expected = scale * torch.exp(-(1 + beta) / 2 * t) * torch.from_numpy(special.eval_genlaguerre(n, alpha, t.numpy())) / norm
        torch.testing.assert_close(kernel[:, n], expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("measure, beta", [("lagt", 0.5), ("lagt", 1.0), ("tlagt", 0.3), ("tlagt", 1.0)])
def test_laguerre_kernels(measure, beta):
    N, t = 10, torch.linspace(0, 6, 30, dtype=F64)
    A, B = transition(measure, N, beta=beta)
    kernel = torch.linalg.matrix_exp(t[:, None, None] * A) @ B
    decay = 0.5 if measure == "lagt" else (1 + beta) / 2
    expected = np.stack([beta * np.exp(-decay * t.numpy()) * special.eval_laguerre(n, t.numpy()) for n in range(N)], -1)
    np.testing.assert_allclose(kernel.numpy(), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("measure", FIXED)
@pytest.mark.parametrize("N", [1, 2, 3, 8, 33])
def test_shapes_nesting_stability(measure, N):
    A, B = transition(measure, N)
    bigger = transition(measure, N + 2)
    assert A.shape == (N, N) and B.shape == (N,) and A.dtype == B.dtype == F64
    torch.testing.assert_close(bigger[0][:N, :N], A)
    torch.testing.assert_close(bigger[1][:N], B)
    assert torch.linalg.eigvals(A).real.max() < 1e-9


def test_random_measures():
    draw = lambda measure: transition(measure, 200, generator=torch.Generator().manual_seed(3))
    A, B = draw("random")
    assert abs(A.std().item() * 200 - 1) < 0.02 and 0.8 < B.std() < 1.2
    assert all(torch.equal(x, y) for x, y in zip(draw("random"), (A, B)))
    A, _ = draw("diagonal")
    assert torch.equal(A, torch.diag(A.diagonal())) and (A.diagonal() < 0).all()
    assert abs(A.diagonal().neg().log().mean()) < 0.2


@pytest.mark.parametrize("arguments", [
    dict(measure="legendre", N=4), dict(measure="legs", N=0), dict(measure="legs", N=2.5), dict(measure="legs", N=4, beta=1.0),
    dict(measure="lagt", N=4, alpha=0.5), dict(measure="legs", N=4, generator=torch.Generator())])
def test_transition_refuses(arguments):
    with pytest.raises(ValueError):
        transition(**arguments)


def test_unknown_measure_names_all():
    with pytest.raises(ValueError) as e:
        transition("legendre", 4)
    assert all(m in str(e.value) for m in TRANSITIONS)


@pytest.mark.parametrize("measure", NORMAL)
@pytest.mark.parametrize("N", [1, 2, 5, 64])
def test_rank_correction_makes_normal(measure, N):
    least = 2 if measure == "legt" else 1
    for rank in (least, least + 1):
        A, P = transition(measure, N)[0], rank_correction(measure, N, rank)
        assert P.shape == (rank, N) and P.dtype == F64 and not P[least:].any()
        M = A + P.T @ P
        symmetric = (M + M.T) / 2
        assert (symmetric - symmetric[0, 0] * torch.eye(N, dtype=F64)).abs().max() < 1e-14 * max(1, A.abs().max().item())
        assert (M @ M.T - M.T @ M).abs().max() <= 1e-14 * N * A.abs().max() ** 2
    with pytest.raises(ValueError, match=f"rank {least}"):
        rank_correction(measure, N, least - 1)


@pytest.mark.parametrize("measure", ["lmu", "tlagt", "glagt", "random", "nothing"])
def test_rank_correction_refuses(measure):
    with pytest.raises(ValueError):
        rank_correction(measure, 4, 3)


# --- projection ----------------------------------------------------------------------------------------------------------------------

def test_polynomials():
    x = torch.linspace(-1, 1, 41, dtype=F64)
    for n in range(30):
        np.testing.assert_allclose(legendre(30, x)[:, n], special.eval_legendre(n, x.numpy()), atol=1e-13)
    x = torch.linspace(0, 90, 41, dtype=F64)
    for n in range(30):
        expected = special.eval_laguerre(n, x.numpy()) * np.exp(-x.numpy() / 2)
        np.testing.assert_allclose(laguerre(30, x, decay=0.5)[:, n], expected, atol=1e-12)


def test_quadrature():
    nodes, weights = quadrature(-1, 1, order=24)
    x, w = np.polynomial.legendre.leggauss(24)
    np.testing.assert_allclose(nodes, x, atol=1e-14)
    np.testing.assert_allclose(weights, w, atol=1e-14)


@pytest.mark.parametrize("measure", WINDOWS)
def test_orthogonal_and_projection_is_scipys(measure):
    N, T = 7, 3.0
    u = lambda t: np.sin(3 * t) + t / 2
    norms = 2 * np.arange(N) + 1 if measure == "lmu" else np.ones(N)
    c = project(lambda t: torch.sin(3 * t) + t / 2, measure, N, T)
    at = lambda f, t: f(torch.tensor(float(t), dtype=F64)).numpy()
    for n in range(N):
        integrand = lambda tau: u(T - tau) * at(lambda t: basis(measure, N, t), tau)[n] * at(lambda t: density(measure, t), tau)
        expected = integrate.quad(integrand, 0, min(T, window(measure)), epsabs=1e-11, limit=200)[0] * norms[n]
        assert abs(c[n] - expected) < 1e-9
    t, w = quadrature(0, min(window(measure), 160.0), 400)
    phi = basis(measure, N, t)
    gram = torch.einsum("tn,tm,t->nm", phi, phi, w * density(measure, t)) * torch.tensor(norms)
    expected = torch.eye(N, dtype=F64)
    if measure.startswith("fou"):
        expected[1, 1] = 0                                              # sin 0
    assert (gram - expected).abs().max() < 1e-11


def test_reconstruct_inverts_project():
    c = torch.randn(6, dtype=F64)
    u = lambda time: reconstruct(c, "legt", 5.0 - time)
    torch.testing.assert_close(project(u, "legt", 6, 5.0), c)


def test_measures_without_basis():
    for measure in ("legsd", "foud", "random", "nothing"):
        with pytest.raises(ValueError, match="legt"):
            basis(measure, 4, torch.zeros(3))


# --- memory --------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("measure", FIXED)
def test_memory_is_a_dense_loop(measure):
    u = torch.randn(2, 3, 40, dtype=F64)
    A, B = transition(measure, 6)
    Ab, Bb = discretize(A, B, 0.05, "zoh")
    c = torch.zeros(2, 3, 6, dtype=F64)
    out = HiPPO(measure, 6, 0.05, "zoh")(u)
    for k in range(40):
        c = torch.einsum("nm,bhm->bhn", Ab, c) + u[..., k, None] * Bb
        torch.testing.assert_close(out[..., k, :], c)


def test_scaled_memory_is_the_solution_of_the_scaled_equation():
    "ZOH in log t is exact for a piecewise constant input: compare with an ODE solver that knows nothing of it."
    A, B = (x.numpy() for x in transition("legs", 5))
    u = np.random.default_rng(0).standard_normal(12)
    ours = HiPPO("legs", 5, method="zoh", scaled=True)(torch.tensor(u))
    c = np.zeros(5)
    for k in range(1, 13):
        c = integrate.solve_ivp(lambda t, c: (A @ c + B * u[k - 1]) / t, (k, k + 1), c, rtol=1e-11, atol=1e-12).y[:, -1]
        np.testing.assert_allclose(ours[k - 1], c, atol=1e-8)


@pytest.mark.parametrize("measure", ["legs", "lagt", "tlagt", "glagt"])
def test_memory_converges_to_projection(measure):
    u = lambda t: torch.sin(2 * t) * (1 - torch.exp(-t))
    T, N = 3.0, 6
    exact = project(u, measure, N, T)
    error = [(HiPPO(measure, N, T / n)(u((torch.arange(n, dtype=F64) + 0.5) * T / n))[-1] - exact).norm() for n in (200, 400, 800)]
    assert 3.7 < error[0] / error[1] < 4.3 and 3.7 < error[1] / error[2] < 4.3


def test_memory_dtypes_and_gradient():
    memory = HiPPO("legs", 4, 0.1)
    u = torch.randn(3, 20)
    assert memory(u).dtype == torch.float32
    torch.testing.assert_close(memory(u), memory(u.double()).float())
    assert HiPPO("legs", 4, 0.1).float()(u).dtype == torch.float32
    assert torch.autograd.gradcheck(memory, torch.randn(2, 5, dtype=F64, requires_grad=True))
    assert not memory.state_dict() and not list(memory.parameters())


def test_memory_reconstructs_polynomials():
    "A polynomial of degree < N is in the span of the scaled memory's basis at all times: zoh with tiny steps recalls it."
    L = 4000
    x = (torch.arange(L, dtype=F64) + 0.5) / L
    u = 1 - 2 * x + 3 * x**2
    memory = HiPPO("legs", 4, method="bilinear", scaled=True)
    recalled = memory.reconstruct(memory(u)[-1], 1 - x)
    assert (recalled - u).abs().max() < 0.01


@pytest.mark.parametrize("arguments", [dict(measure="x"), dict(N=0), dict(dt=0.0), dict(dt=math.inf), dict(dt=-1.0), dict(method="rk"),
                                       dict(method="gbt")])
def test_memory_refuses_arguments(arguments):
    with pytest.raises(ValueError):
        HiPPO(**arguments)


@pytest.mark.parametrize("u", [torch.tensor([0.0, math.inf]), torch.tensor([math.nan]), torch.ones(0), torch.tensor(1.0),
                               torch.ones(3, dtype=torch.complex64), torch.ones(3, dtype=torch.int64)])
def test_memory_refuses_signals(u):
    for scaled in (False, True):
        with pytest.raises(ValueError, match="real, finite"):
            HiPPO("legs", 4, scaled=scaled)(u)


def test_white_signal():
    g = lambda: torch.Generator().manual_seed(0)
    u = white_signal(4.0, 0.01, 5.0, rms=2.0, batch=(50, 2), generator=g())
    assert u.shape == (50, 2, 400) and u.dtype == F64 and (u[..., 0] == 0).all()
    assert torch.equal(u, white_signal(4.0, 0.01, 5.0, rms=2.0, batch=(50, 2), generator=g()))
    assert torch.fft.rfft(u)[..., 21:].abs().max() < 1e-11 and torch.fft.rfft(u)[..., 20].abs().min() > 0
    assert abs((u - u.mean(-1, keepdim=True)).square().mean().sqrt() / 2 - 1) < 0.05
    with pytest.raises(ValueError, match="freq"):
        white_signal(1.0, 0.01, 0.5)


# --- against the reference's numbers -------------------------------------------------------------------------------------------------

def test_transition_vectors(vectors):
    for name, p, a in cases(vectors, "a_hippo", "transition_"):
        measure, keywords = p["measure"], {k: v for k, v in p.items() if k in ("alpha", "beta")}
        scale = 1.0
        if measure == "legt" and not name.startswith("transition_repo"):
            scale = 2.0                                                 # window 1 instead of 2
        if measure == "fourier" and name.startswith("transition_viz"):
            measure = "fourier2"                                        # window 1 instead of 2
        A, B = transition(measure, p["N"], **keywords)
        torch.testing.assert_close(scale * A, a["A"], rtol=1e-12, atol=1e-12, msg=name)
        torch.testing.assert_close(scale * B, a["B"][:, 0], rtol=1e-12, atol=1e-12, msg=name)


def test_rank_correction_vectors(vectors):
    for name, p, a in cases(vectors, "a_hippo", "nplr_"):
        tolerance = 2e-7 if "fourier" in name else 1e-13                # the reference keeps Fourier's P in float32
        torch.testing.assert_close(rank_correction(**p), a["P"], rtol=0, atol=tolerance, msg=name)


def test_basis_vectors(vectors):
    renamed = {"fourier": ("fourier2", 1), "legt": ("legt", 2)}         # its windows have length 1
    for name, p, a in cases(vectors, "b_disc", "basis_"):
        measure, stretch = renamed.get(m := name.split("_")[1], (m, 1))
        expected = a["E_nomeasure"].flip(0) if m == "lagt" else a["E_nomeasure"]   # its lagt basis runs backwards
        torch.testing.assert_close(basis(measure, p["N"], stretch * a["vals"]), expected, rtol=0, atol=1e-13, msg=name)


def test_memory_vectors(vectors):
    "The reference rounds its matrices to float32: 1e-6 relative."
    renamed = {"fourier": ("fourier2", 1), "legt": ("legt", 2)}
    for name, p, a in cases(vectors, "b_disc", "HiPPO_"):
        if p["c"]:
            A, B = transition("legt", p["N"])                           # tilted: A + cI, which only plots use there
            Ab, Bb = discretize(2 * A + p["c"] * torch.eye(p["N"], dtype=F64), 2 * B, 1 / p["L"], p["disc"])
            torch.testing.assert_close(Ab, a["dA"], rtol=0, atol=1e-7, msg=name)
            torch.testing.assert_close(Bb, a["dB"], rtol=0, atol=1e-6, msg=name)
            continue
        measure, stretch = renamed.get(p["measure"], (p["measure"], 1))
        memory = HiPPO(measure, p["N"], stretch / p["L"], p["disc"])
        c = memory(a["u"])
        assert (c - a["c"]).norm() < 1e-6 * a["c"].norm(), name
        if measure == "lagt":
            continue                                                    # reconstructed there from the reversed basis
        back = memory.reconstruct(c[-1], stretch * a["vals"]).flip(-1)
        inside = a["measure"].flip(-1) > 0                              # its window is open at age 0
        assert (back - a["rec_last"])[inside].norm() < 1e-6 * a["rec_last"].norm(), name


def test_scaled_memory_vectors(vectors):
    for name, p, a in cases(vectors, "b_disc", "HiPPOScale_"):
        memory = HiPPO("legs", p["N"], method={"forward": "euler"}.get(p["disc"], p["disc"]), scaled=True)
        c, L = memory(a["u"]), p["L"]
        Ab, Bb = memory.matrices(torch.tensor([1, 2, L // 2 + 1, L]))
        torch.testing.assert_close(Ab, a["A_t"], rtol=1e-6, atol=1e-6, msg=name)
        torch.testing.assert_close(Bb, a["B_t"], rtol=1e-6, atol=1e-6, msg=name)
        assert (c - a["c"]).norm() < 1e-6 * a["c"].norm(), name
        back = memory.reconstruct(c[-1], 1 - torch.linspace(0, 1, L, dtype=F64))
        assert (back - a["rec_last"]).norm() < 1e-6 * a["rec_last"].norm(), name


def test_hippocode_legt_vectors(vectors):
    for name, p, a in cases(vectors, "b_disc", "hippocode_LegT"):
        memory, L = HiPPO("lmu", p["N"], 1 / p["L"], "bilinear"), p["L"]
        c = memory(a["u"])
        assert (c - a["c"]).norm() < 1e-6 * a["c"].norm(), name
        back = memory.reconstruct(a["c"][-1], 1 - torch.arange(L, dtype=F64) / L)
        assert (back - a["rec_last"]).norm() < 1e-6 * a["rec_last"].norm(), name


def test_white_signal_vector(vectors):
    (_, _, a), = cases(vectors, "b_disc", "whitesignal")
    np.random.seed(5)
    g = torch.from_numpy(np.stack([np.random.normal(size=33), np.random.normal(size=33)]))
    torch.testing.assert_close(white_from_normals(g, 8, 1 / 64), a["x"], rtol=0, atol=1e-12)
