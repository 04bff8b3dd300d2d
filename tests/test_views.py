"""Chapter 2, s4nb.ssm.views: the dense oracle, against scipy and against itself."""
import json

import numpy as np
import torch
from hypothesis import given, settings, strategies as st
from s4nb.hippo.discretization import discretize
from s4nb.hippo.transition import transition
from s4nb.ssm.views import causal_conv, kernel, scan, step
from scipy.signal import dlsim


def system(n=6, measure="legs", dt=0.05):
    return (*discretize(*transition(measure, n), dt), torch.randn(n, dtype=torch.float64))


def test_scan_is_what_scipy_simulates():
    for measure in ("legs", "legt", "lagt"):
        Ab, Bb, C = system(measure=measure)
        u, s = torch.randn(40, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
        A, B, C_ = Ab.numpy(), Bb[:, None].numpy(), C[None].numpy()
        _, y, x = dlsim((A, B, C_ @ A, C_ @ B, 1.0), u.numpy(), x0=s.numpy())       # scipy reads the state before the input
        y_ours, s_ours = scan(Ab, Bb, C, u, s)
        assert torch.allclose(y_ours, torch.tensor(y[:, 0]), atol=1e-12)
        assert torch.allclose(s_ours, torch.tensor(A @ x[-1] + B[:, 0] * u[-1].item()), atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 40), st.data())
def test_three_views_agree_in_any_two_pieces(L, data):
    cut = data.draw(st.integers(1, L - 1))
    Ab, Bb, C = system()
    u, s = torch.randn(2, L, dtype=torch.float64), torch.randn(2, 6, dtype=torch.float64)
    y, end = scan(Ab, Bb, C, u, s)
    echo = kernel(Ab, (Ab @ s.mT).mT, C, L)
    assert torch.allclose(causal_conv(u, kernel(Ab, Bb, C, L)) + echo, y, atol=1e-12)
    y1, middle = scan(Ab, Bb, C, u[:, :cut], s)
    y2, last = scan(Ab, Bb, C, u[:, cut:], middle)
    assert torch.allclose(torch.cat([y1, y2], 1), y, atol=1e-12) and torch.allclose(last, end, atol=1e-12)
    assert torch.allclose(step(Ab, Bb, C, u[:, 0], s)[0], y[:, 0], atol=1e-14)


def test_complex_systems_and_leading_dimensions():
    lam = torch.tensor([0.9 + 0.3j, -0.5j, 0.2], dtype=torch.complex128)
    b, c, u = torch.randn(3, 2, 3, dtype=torch.complex128).unbind(0)[0], torch.randn(3, dtype=torch.complex128), torch.randn(5, 1, 20).double()
    y, s = scan(torch.diag(lam), b, c, u)
    assert y.shape == (5, 2, 20) and s.shape == (5, 2, 3)
    powers = lam[:, None] ** torch.arange(20)
    K = torch.einsum("n,hn,nl->hl", c, b, powers)
    assert torch.allclose(kernel(torch.diag(lam), b, c, 20), K, atol=1e-12) and torch.allclose(causal_conv(u, K), y, atol=1e-12)


def test_parity_with_time_varying_scans(vectors):
    "x_t = A_t x_{t-1} + v_t is a step whose input vector is v_t and whose input is 1."
    data, cases = np.load(vectors / "c_func.npz"), json.loads((vectors / "c_func.json").read_text())["cases"]
    names = [n for n in cases if n.startswith("scan_")]
    assert names
    for name in names:
        A, v, state, x = (torch.tensor(data[f"{name}/{key}"]) for key in ("A", "u", "s", "x"))
        for A_t, v_t, x_t in zip(A, v, x):
            y, state = step(A_t, v_t, torch.ones_like(v_t), torch.ones(len(v_t), dtype=v_t.dtype), state)
            assert torch.allclose(state, x_t, atol=1e-12) and torch.allclose(y, x_t.sum(-1), atol=1e-12)
