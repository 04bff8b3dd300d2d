"""Chapter 2, s4nb.ssm.lssl: one SSM in all its views, before and after training; the cache; the reference's layer."""
import copy
import json
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from s4nb.hippo.transition import transition
from s4nb.ssm import views
from s4nb.ssm.lssl import LSSL, DenseKernel


def stepped(layer, u, state):
    ys = []
    with torch.no_grad():
        for u_t in u.unbind(1):
            y, state = layer.step(u_t, state)
            ys.append(y)
    return torch.stack(ys, 1), state


def train(layer, u, steps=20):
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        (layer(u)[0] - u.roll(3, 1)).square().mean().backward()
        optimizer.step()


def check_views(layer, u, cuts=(1, 60), tolerance=1e-9):
    "forward == step == chunks, with and without a first state, and the kernel against the scan."
    for s0 in (None, torch.randn_like(layer.default_state(len(u)))):
        y, s = layer(u, s0)
        start = layer.default_state(len(u)) if s0 is None else s0
        z, t = stepped(layer, u, start)
        assert (z - y).abs().max() < tolerance and (t - s).abs().max() < tolerance
        for cut in cuts:
            y1, s1 = layer(u[:, :cut], s0)
            y2, s2 = layer(u[:, cut:], s1)
            assert (torch.cat([y1, y2], 1) - y).abs().max() < tolerance and (s2 - s).abs().max() < tolerance
        k, v = layer.kernel, u.mT[:, None]
        y, s = views.scan(*k.discrete(), k.C, v, start[:, None])
        K, K_state = k(u.shape[1], state=start)
        assert (views.causal_conv(v, K) + K_state - y).abs().max() < tolerance
        assert (k.advance(u.mT, start) - s[:, 0]).abs().max() < tolerance


@pytest.mark.parametrize("measure", ["legs", "legt", "lagt", "fout"])
@pytest.mark.parametrize("disc", ["bilinear", "zoh"])
def test_all_views_agree_before_and_after_training(measure, disc):
    layer = LSSL(3, 8, measure, channels=2, n_ssm=1, disc=disc, dt_min=0.01).double()
    u = torch.randn(2, 140, 3, dtype=torch.float64)
    check_views(layer, u)
    train(layer, u)
    check_views(layer, u)


@settings(max_examples=15, deadline=None)
@given(st.integers(2, 50), st.data())
def test_any_cut(L, data):
    check_views(LSSL(2, 4).double(), torch.randn(2, L, 2, dtype=torch.float64), [data.draw(st.integers(1, L - 1))], 1e-11)


def test_float32_at_full_length():
    layer, u = LSSL(4, 32, final_act=None, activation=None), torch.randn(1, 4096, 4)
    y, s = layer(u)
    exact, s_exact = copy.deepcopy(layer).double()(u.double())
    assert (y - exact).norm() < 1e-4 * exact.norm() and (s - s_exact).norm() < 1e-4 * s_exact.norm()
    z, t = stepped(layer, u, layer.default_state(1))
    assert (z - exact).norm() < 1e-4 * exact.norm() and (t - s_exact).norm() < 1e-4 * s_exact.norm()


def test_what_learns():
    u = torch.randn(1, 30, 3)
    for learn in ((), ("dt",), ("A", "B"), ("A", "B", "dt")):
        layer = LSSL(3, 4, learn=learn)
        before = copy.deepcopy(layer.state_dict())
        train(layer, u, 2)
        changed = {k.split(".")[1] for k, v in layer.state_dict().items() if k.startswith("kernel") and not torch.equal(v, before[k])}
        assert changed == {"C"} | {"inv_dt" if x == "dt" else x for x in learn}


@settings(max_examples=10, deadline=None)
@given(st.floats(0.2, 4))
def test_rate_is_exact(rate):
    k = DenseKernel(3, 6).double()
    faster = copy.deepcopy(k)
    faster.inv_dt.data += np.log(rate)
    assert torch.allclose(k(40, rate)[0], faster(40)[0], atol=1e-12)
    s, u = torch.randn(2, 3, 6, dtype=torch.float64), torch.randn(2, 3, 40, dtype=torch.float64)
    assert torch.allclose(k(40, rate, s)[1], faster(40, 1.0, s)[1], atol=1e-12)
    assert torch.allclose(k.advance(u, s, rate), faster.advance(u, s), atol=1e-12)


def test_initialisation():
    k = DenseKernel(200, 6, channels=3, init="legt", n_ssm=50, dt_min=0.02, dt_max=0.5)
    A, B = transition("legt", 6)
    assert k.A.shape == (50, 6, 6) and torch.allclose(k.A[7].double(), A, atol=1e-6) and torch.allclose(k.B[7].double(), B, atol=1e-6)
    log_dt = k.inv_dt.detach()
    assert np.log(0.02) <= log_dt.min() and log_dt.max() <= np.log(0.5)
    assert abs(log_dt.mean() - np.log(0.1)) < 0.3 and abs(k.C.std() - 1) < 0.1      # log-uniform: mean log 0.1, error 0.07
    k.A.data[3] += 1                                                                # feature i runs SSM i mod s
    Ab = k.discrete()[0]
    fresh = DenseKernel(200, 6, channels=3, init="legt", n_ssm=50)
    fresh.inv_dt.data = k.inv_dt.data
    assert torch.equal((fresh.discrete()[0] != Ab).any((1, 2)).nonzero()[:, 0], torch.arange(3, 200, 50))


def test_step_cache_is_never_stale():
    k, u = DenseKernel(3, 4), torch.randn(2, 3)
    s = torch.randn(2, 3, 4)
    reference = lambda: DenseKernel.step(copy.deepcopy(k), u.to(k.C.dtype), s.to(k.C.dtype))[0]
    changes = [lambda: None, lambda: k.A.data.mul_(1.01), lambda: k.inv_dt.data.fill_(-2.0), lambda: k.double(), lambda: k.float(),
               lambda: k.load_state_dict(DenseKernel(3, 4).state_dict()), lambda: k.B.data.__setitem__((0, 0), 7.0)]
    with torch.no_grad():
        for change in changes:
            change()
            assert torch.equal(k.step(u.to(k.C.dtype), s.to(k.C.dtype))[0], reference())
            assert k._cache is not None
    assert pickle.loads(pickle.dumps(k))._cache is None and set(k.state_dict()) == {"A", "B", "C", "inv_dt"}
    k.step(u, s)[0].sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in k.parameters())


def test_errors():
    for bad, message in (({"init": "leggs"}, "legs"), ({"disc": "bilin"}, "did you mean 'bilinear'"), ({"learn": ("C",)}, "A, B, dt"),
                         ({"n_ssm": 2}, "n_ssm=2 must divide d_model=3"), ({"dt_min": 0.2}, "dt_min <= dt_max"), ({"dt_min": 0.0}, "0 < dt_min")):
        with pytest.raises(ValueError, match=message): DenseKernel(3, 4, **bad)


def test_parity_with_the_reference_layer(vectors):
    data, cases = np.load(vectors / "e_lssl.npz"), json.loads((vectors / "e_lssl.json").read_text())["cases"]
    checked = 0
    for name, case in cases.items():
        # left out: it raises; its extra bias has no counterpart here; with l_max it rescales dt in A and not in B
        if "y" not in case["arrays"] or "param/E" in case["arrays"] or "l_max" in case["params"]: continue
        get = lambda key: torch.tensor(data[f"{name}/{key}"]).double()
        p = case["params"]
        layer = LSSL(p["d"], p["N"], final_act="id" if p.get("ff", True) else None).double()
        k, dA, dt, I = layer.kernel, get("dA"), get("param/log_dt").exp()[:, None, None], torch.eye(p["N"]).double()
        k.A.data = 2 / dt * torch.linalg.solve(dA + I, dA - I)                          # undo the bilinear step: their A and B
        k.B.data = ((I / dt - k.A.data / 2) @ get("dB")[..., None])[..., 0]             # are stored in many structured forms
        k.C.data, k.inv_dt.data, layer.D.data = get("param/C").transpose(0, 1), get("param/log_dt")[:, None], get("param/D").mT
        if layer.mix is not None:
            layer.mix[0].weight.data, layer.mix[0].bias.data = get("param/output_linear.weight"), get("param/output_linear.bias")
        y = layer(get("x"))[0]
        assert (y - get("y")).abs().max() < 1e-8 * max(1, get("y").abs().max()), name
        checked += 1
    assert checked >= 14
