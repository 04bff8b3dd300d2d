"""Chapter 2, s4nb.ssm.krylov: against numpy's powers, the scan, and the reference."""
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from s4nb.hippo.discretization import discretize
from s4nb.hippo.transition import transition
from s4nb.ssm.krylov import advance, krylov, power
from s4nb.ssm.views import scan


def legs(h, n):
    return discretize(*transition("legs", n), torch.logspace(-3, -1, h, dtype=torch.float64))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 70), st.integers(1, 7))
def test_krylov_and_power_are_numpys_powers(L, n):
    A, b, c = (torch.randn(*s, dtype=torch.float64) for s in ((2, n, n), (2, n), (2, n)))
    A = A / torch.linalg.matrix_norm(A, 2)[:, None, None]
    X, K, P = krylov(A, b, None, L), krylov(A, b, c, L), power(A, L)
    assert X.shape == (2, n, L) and K.shape == (2, L)
    for i in range(2):
        for l in range(L):
            x = np.linalg.matrix_power(A[i].numpy(), l) @ b[i].numpy()
            assert np.abs(X[i, :, l].numpy() - x).max() < 1e-12 and abs(K[i, l].item() - c[i].numpy() @ x) < 1e-12
        assert np.abs(P[i].numpy() - np.linalg.matrix_power(A[i].numpy(), L)).max() < 1e-12


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 60).flatmap(lambda L: st.tuples(st.just(L), st.lists(st.integers(0, L), min_size=1, max_size=4))))
def test_advance_is_the_scan_of_the_valid_inputs(case):
    L, lengths = case
    (Ab, Bb), b = legs(3, 6), len(lengths)
    u, s = torch.randn(b, 3, L, dtype=torch.float64), torch.randn(b, 3, 6, dtype=torch.float64)
    padded = u.clone()
    for row, n in zip(padded, lengths): row[:, n:] = float("nan")
    after = advance(Ab, Bb, padded, s, torch.tensor(lengths))
    for i, n in enumerate(lengths):
        want = scan(Ab, Bb, Bb, u[i, :, :n], s[i])[1] if n else s[i]
        assert torch.allclose(after[i], want, atol=1e-12)
    assert torch.allclose(advance(Ab, Bb, u), scan(Ab, Bb, Bb, u)[1], atol=1e-12)


def test_gradients():
    A, b, c = (torch.randn(*s, dtype=torch.float64) / 2 for s in ((3, 3), (3,), (3,)))
    args = [x.requires_grad_() for x in (A, b, c)]
    assert torch.autograd.gradcheck(lambda *a: krylov(*a, 9), args)
    assert torch.autograd.gradcheck(lambda A: power(A, 6), args[:1])
    args = [x.detach()[None].requires_grad_() for x in (A, b)]
    args += [torch.randn(2, 1, 5, dtype=torch.float64, requires_grad=True), torch.randn(2, 1, 3, dtype=torch.float64, requires_grad=True)]
    assert torch.autograd.gradcheck(lambda *a: advance(*a, torch.tensor([5, 2])), args)


def test_complex_and_errors():
    A = torch.diag(torch.tensor([0.5 + 0.5j, -0.9], dtype=torch.complex128))
    b = torch.ones(2, dtype=torch.complex128)
    assert torch.allclose(krylov(A, b, None, 30), A.diagonal()[:, None] ** torch.arange(30), atol=1e-14)
    with pytest.raises(ValueError, match="L=0"): krylov(A, b, b, 0)
    with pytest.raises(ValueError, match="negative"): power(A, -1)


def test_long_sequences_in_float32():
    Ab, Bb = legs(4, 64)
    c = torch.randn(4, 64, dtype=torch.float64)
    exact = krylov(Ab.float().double(), Bb.float().double(), c.float().double(), 16384)
    assert (krylov(Ab.float(), Bb.float(), c.float(), 16384) - exact).norm() < 1e-4 * exact.norm()


def test_parity_with_the_reference(vectors):
    data, cases = np.load(vectors / "c_func.npz"), json.loads((vectors / "c_func.json").read_text())["cases"]
    seen = 0
    for name, case in cases.items():
        get, L = (lambda key: torch.tensor(data[f"{name}/{key}"])), case["params"].get("L")
        if name.startswith("krylov_H"):
            assert torch.allclose(krylov(get("A"), get("b"), get("c"), L), get("k"), atol=1e-12)
            assert torch.allclose(krylov(get("A"), get("b"), None, L), get("Kb"), atol=1e-12)
        elif name.startswith("power_"):
            assert torch.allclose(power(get("A"), L), get("A_L"), atol=1e-12)
            A, v = get("A"), get("v")                        # sum_i A^i v_i, one unit input vector after the other
            units = torch.eye(A.shape[-1], dtype=A.dtype)
            total = sum(advance(A, e.expand(A.shape[:-1]), v_j.flip(-1)[None]) for e, v_j in zip(units, v.unbind(-2)))
            assert torch.allclose(total[0], get("scan"), atol=1e-11)
        elif name.startswith("krylov_toeplitz_"):
            a = get("a")
            i = torch.arange(a.shape[-1])
            T = torch.where(i[:, None] >= i, a[:, (i[:, None] - i).clamp(min=0)], 0)
            assert torch.allclose(krylov(T, get("b"), get("c"), L), get("k"), atol=1e-11)
        else: continue
        seen += 1
    assert seen >= 9


def test_parity_with_dense_kernels(vectors):
    data, cases = np.load(vectors / "d_misc.npz"), json.loads((vectors / "d_misc.json").read_text())["cases"]
    names = [n for n in cases if n.startswith(("dense_", "real_"))]
    assert len(names) >= 4
    for name in names:
        get = lambda key: torch.tensor(data[f"{name}/{key}"]).double()
        A, B, C = (torch.view_as_complex(get(f"param/{p}")) for p in "ABC")
        Ab, Bb = discretize(A, B, get("param/inv_dt")[:, 0].exp())
        want = get("K")                                                  # float32 inside the reference
        K = torch.stack([krylov(Ab, Bb, c, want.shape[-1]) for c in C]).real
        assert (K - want).norm() < 1e-6 * want.norm(), name
