"""Discretisation: against scipy, the variation-of-constants integral, and the reference's numbers."""
import numpy as np
import pytest
import torch
from s4nb.hippo import discretize
from s4nb.hippo.transition import TRANSITIONS, transition
from scipy import integrate, linalg, signal
from test_hippo import cases

F64 = torch.float64
METHODS = [("euler", None), ("backward", None), ("bilinear", None), ("gbt", 0.0), ("gbt", 0.3), ("gbt", 1), ("zoh", None)]
SCIPY = {"backward": "backward_diff"}


def random_system(*batch, n=5, dtype=F64, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*batch, n, n, dtype=dtype, generator=g) - 2 * torch.eye(n), torch.randn(*batch, n, dtype=dtype, generator=g)


@pytest.mark.parametrize("method, alpha", METHODS)
@pytest.mark.parametrize("measure", [m for m in TRANSITIONS if m not in ("random", "diagonal")])
def test_scipy(measure, method, alpha):
    A, B = transition(measure, 12)
    for dt in (1e-4, 0.03, 1.0):
        Ab, Bb = discretize(A, B, dt, method, alpha)
        a, b, *_ = signal.cont2discrete((A.numpy(), B.numpy()[:, None], np.ones((1, 12)), 0), dt, SCIPY.get(method, method), alpha)
        scale = max(1, np.abs(a).max(), np.abs(b).max())
        np.testing.assert_allclose(Ab, a, atol=1e-11 * scale)
        np.testing.assert_allclose(Bb, b[:, 0], atol=1e-11 * scale)


@pytest.mark.parametrize("N", [1, 64, 256])
def test_zoh_is_scipys_exponential(N):
    "Also for the large norms ‖A dt‖ that long sequences meet."
    A, B = transition("legs", N)
    for dt in (1e-3, 0.1):
        Ab, Bb = discretize(A, B, dt, "zoh")
        expected = linalg.expm(dt * A.numpy())
        np.testing.assert_allclose(Ab, expected, atol=1e-9)
        np.testing.assert_allclose(Bb, np.linalg.solve(A.numpy(), (expected - np.eye(N)) @ B.numpy()), atol=1e-9)


def test_zoh_singular():
    for measure in ("fout", "fourier_decay", "fourier2"):
        A, B = transition(measure, 6)
        assert torch.linalg.matrix_rank(A) < 6
        _, Bb = discretize(A, B, 0.7, "zoh")
        expected = integrate.quad_vec(lambda s: linalg.expm(s * A.numpy()) @ B.numpy(), 0, 0.7, epsabs=1e-12)[0]
        np.testing.assert_allclose(Bb, expected, atol=1e-10)


@pytest.mark.parametrize("method, alpha", METHODS)
def test_broadcasting(method, alpha):
    for dtype in (F64, torch.complex128):
        A, B = random_system(2, 3, dtype=dtype)
        dt = torch.rand(4, 1, 3, dtype=F64) + 0.01
        Ab, Bb = discretize(A, B, dt, method, alpha)
        assert Ab.shape == (4, 2, 3, 5, 5) and Bb.shape == (4, 2, 3, 5) and Ab.dtype == Bb.dtype == dtype
        one = discretize(A[1, 2], B[1, 2], dt[3, 0, 2], method, alpha)
        torch.testing.assert_close(Ab[3, 1, 2], one[0])
        torch.testing.assert_close(Bb[3, 1, 2], one[1])
    A, B = random_system()
    for dt in (torch.rand(3), torch.rand(3, 2), torch.rand(()), torch.rand(0)):
        Ab, Bb = discretize(A, B, dt, method, alpha)
        assert Ab.shape == (*dt.shape, 5, 5) and Bb.shape == (*dt.shape, 5)
    assert discretize(A, B.expand(7, 5), 0.1, method, alpha)[1].shape == (7, 5)
    assert discretize(A, B, 1, method, alpha)[0].dtype == F64


@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.complex64, torch.complex128])
def test_arguments_give_the_dtype(dtype):
    A, B = random_system(dtype=dtype)
    for dt in (0.1, torch.tensor(0.1), torch.tensor(0.1, dtype=F64)):
        Ab, Bb = discretize(A, B, dt)
        assert Ab.dtype == Bb.dtype == dtype


@pytest.mark.parametrize("method, alpha", METHODS)
@pytest.mark.parametrize("dtype", [F64, torch.complex128])
def test_gradients(method, alpha, dtype):
    A, B = random_system(n=3, dtype=dtype)
    inputs = [x.clone().requires_grad_() for x in (A, B, torch.tensor([0.1, 0.3], dtype=F64))]
    assert torch.autograd.gradcheck(lambda *x: discretize(*x, method, alpha), inputs)


@pytest.mark.parametrize("measure", ["legs", "legt", "lagt", "fout", "foud"])
@pytest.mark.parametrize("method", ["backward", "bilinear", "zoh"])
def test_stable_for_every_step(measure, method):
    "Norms instead of eigenvalues: for A + Aᵀ ≤ 0 no implicit method may enlarge any state."
    A, B = transition(measure, 16)
    assert torch.linalg.eigvalsh(A + A.T).max() < 1e-12
    for dt in (1e-3, 0.1, 10.0):
        Ab, _ = discretize(A, B, dt, method)
        assert torch.linalg.matrix_norm(Ab, 2) < 1 + 1e-9


@pytest.mark.parametrize("bad", [
    dict(method="Bilinear"), dict(method=None), dict(method="gbt"), dict(alpha=0.5), dict(method="gbt", alpha=1.1),
    dict(method="gbt", alpha=-0.1), dict(B=torch.ones(3)), dict(A=torch.ones(4, 3)), dict(A=torch.ones(4)), dict(B=torch.tensor(1.0))])
def test_refuses(bad):
    A, B = transition("legs", 4)
    with pytest.raises(ValueError):
        discretize(**{**dict(A=A, B=B, dt=0.1), **bad})


# --- against the reference's numbers -------------------------------------------------------------------------------------------------

def test_cont2discrete_vectors(vectors):
    methods = {"zoh": ("zoh", None), "bilinear": ("bilinear", None), "euler": ("euler", None), "backward_diff": ("backward", None),
               "gbt0.25": ("gbt", 0.25), "gbt0.75": ("gbt", 0.75)}
    for name, p, a in cases(vectors, "b_disc", "cont2discrete_"):
        for key, (method, alpha) in methods.items():
            Ab, Bb = discretize(a["A"], a["B"][:, 0], torch.tensor(p["dt"], dtype=F64), method, alpha)
            torch.testing.assert_close(Ab, a[f"dA_{key}"], rtol=1e-11, atol=1e-12, msg=f"{name} {key}")
            torch.testing.assert_close(Bb, a[f"dB_{key}"][..., 0], rtol=1e-11, atol=1e-12, msg=f"{name} {key}")


def test_gbt_vectors(vectors):
    "Dense and fast forms of the reference, all against our dense one (its glagt Toeplitz form is accurate to 5e-8)."
    for name, p, a in cases(vectors, "b_disc", "gbt_manual_", "lagt_", "tlagt_", "glagt_"):
        measure = p.get("measure", name.split("_")[0])
        A, B = transition(measure, p["N"], **{k: p[k] for k in ("alpha", "beta") if k in p})
        tolerance = 1e-7 if name.startswith("glagt_toeplitz") else 1e-11
        for alpha in (0.0, 0.25, 0.5, 0.75, 1.0):
            if f"dA_{alpha}" in a:
                Ab, Bb = discretize(A, B, a["dt"], "gbt", alpha)
                torch.testing.assert_close(Ab, a[f"dA_{alpha}"], rtol=0, atol=tolerance, msg=f"{name} {alpha}")
                torch.testing.assert_close(Bb, a[f"dB_{alpha}"], rtol=0, atol=tolerance, msg=f"{name} {alpha}")
        if "dense_dA" in a:
            Ab, Bb = discretize(A, B, a["dt"])
            torch.testing.assert_close(Ab, a["dense_dA"], rtol=0, atol=1e-11, msg=name)
            torch.testing.assert_close(Bb, a["dense_dB"], rtol=0, atol=1e-11, msg=name)


def test_step_vectors(vectors):
    "The reference's implicit and explicit half steps are the two ends of the family."
    for name, p, a in cases(vectors, "b_disc", "gbt_manual_"):
        A, B = transition(p["measure"], p["N"])
        for key, method in (("forward_diff", "euler"), ("backward_diff", "backward"), ("bilinear_step", "bilinear")):
            Ab, Bb = discretize(A, B, a["dt"], method)
            ours = torch.einsum("tnm,tm->tn", Ab, a["u"]) + a["v"][:, None] * Bb
            torch.testing.assert_close(ours, a[key], rtol=1e-11, atol=1e-11, msg=f"{name} {key}")
