"""S4 kernels and blocks against the dense float64 oracle of chapter 2, built here from the parameters by other means than the package's own."""
import copy
import io
import pickle
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from s4nb import S4D, S4Block
from s4nb.hippo.transition import transition
from s4nb.s4.kernels import DiagKernel, DPLRKernel
from s4nb.s4.nplr import nplr
from s4nb.ssm.krylov import krylov


def dense_system(k, rate=1.0):
    "Ab (h N N), Bb (h N), C (c h N) of a float64 kernel: complex128, both halves of each pair, the discretisation written out."
    both = lambda x: torch.cat([x, x.conj()], -1)
    if isinstance(k, DPLRKernel):
        Lambda, P, B, dt = k.system(rate)
        C, P, dt = k.true_C(), both(P), both(dt.expand(Lambda.shape).to(Lambda.dtype))
        A = torch.diag_embed(both(Lambda)) - torch.einsum("rhi,rhj->hij", P, P.conj())
    else:
        Lambda, B, C, dt = k.system(rate)
        dt = both(dt.expand(Lambda.shape).to(Lambda.dtype))
        A = torch.diag_embed(both(Lambda))
    I = torch.eye(A.shape[-1], dtype=A.dtype)
    if k.disc == "zoh":
        Ab = torch.matrix_exp(dt[..., None] * A)
        return Ab, torch.linalg.solve(A, (Ab - I) @ both(B)[..., None])[..., 0], both(C)
    inverse = torch.linalg.inv(I - dt[..., None] / 2 * A)
    return inverse @ (I + dt[..., None] / 2 * A), (inverse @ (dt * both(B))[..., None])[..., 0], both(C)


def dense_kernel(k, L, rate=1.0):
    Ab, Bb, C = dense_system(k, rate)
    return torch.einsum("chn,hnl->chl", C, krylov(Ab, Bb, None, L)).real


def gap(a, b):
    return ((a - b).norm() / b.norm()).item()


KERNELS = {
    "legs": lambda: DPLRKernel(4, 16), "legt rank 2": lambda: DPLRKernel(4, 16, init="legt", rank=2), "rank 3": lambda: DPLRKernel(4, 16, rank=3),
    "lagt": lambda: DPLRKernel(4, 16, init="lagt"), "fout": lambda: DPLRKernel(4, 16, init="fout"), "hippo, shared": lambda: DPLRKernel(4, 16, init="hippo", n_ssm=2),
    "all": lambda: DPLRKernel(8, 16, init="all"), "dplr-inv": lambda: DPLRKernel(4, 16, init="dplr-inv", channels=3),
    "softplus": lambda: DPLRKernel(4, 16, dt_transform="softplus", real_transform="softplus", imag_transform="relu"),
    "untied": lambda: DPLRKernel(4, 16, dt_tie=False), "N 2": lambda: DPLRKernel(2, 2), "stored length": lambda: DPLRKernel(4, 16, l_max=50),
    "lin": lambda: DiagKernel(4, 16, init="diag-lin"), "inv bilinear": lambda: DiagKernel(4, 16, init="diag-inv", disc="bilinear"),
    "real": lambda: DiagKernel(4, 16, init="diag-real"), "is_real": lambda: DiagKernel(4, 16, init="diag-real", is_real=True),
    "untied diag": lambda: DiagKernel(4, 16, init="diag-quad", dt_tie=False, dt_fast=True), "shared diag": lambda: DiagKernel(4, 16, init="diag", n_ssm=2, channels=2),
}


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("L", [1, 2, 33, 128])
def test_kernel_equals_dense_powers(name, L):
    k = KERNELS[name]().double()
    for rate in (1.0, 0.5, 2.0):
        with torch.no_grad():
            assert gap(k(L, rate=rate)[0], dense_kernel(k, L, rate)) < 1e-9, rate


@pytest.mark.parametrize("name", ["legs", "legt rank 2", "fout", "stored length", "lin", "inv bilinear", "hippo, shared"])
def test_gradients_equal_those_of_the_dense_form(name):
    "Autograd through FFT, Woodbury and Cauchy sums, against autograd through dense powers."
    k = KERNELS[name]().double()
    G = torch.randn(k.channels, k.d_model, 40, dtype=torch.float64)
    if name == "stored length":
        k.set_length(0)
    (k(40)[0] * G).sum().backward()
    ours = {n: p.grad.clone() for n, p in k.named_parameters()}
    k.zero_grad()
    (dense_kernel(k, 40) * G).sum().backward()
    for n, p in k.named_parameters():
        assert gap(ours[n], p.grad) < 1e-7, n


def test_float32_kernel_at_16384():
    "Relative L2 error over all heads, LegS N = 64, dt log-uniform in 1e-3 … 1e-1, the same float32 parameters."
    errors = []
    for seed in range(10):
        torch.manual_seed(seed)
        k = DPLRKernel(4, 64)
        with torch.no_grad():
            K, exact = k(16384)[0], dense_kernel(copy.deepcopy(k).double(), 16384)
        errors.append(gap(K.double(), exact))
    errors = torch.tensor(errors)
    print(f"median {errors.median():.2e}, worst {errors.max():.2e}")
    assert errors.median() <= 1e-5 and errors.max() <= 3e-5


@pytest.mark.parametrize("make", [lambda: S4Block(2, 64, activation=None, final_act=None), lambda: S4D(2, 64, activation=None, final_act=None)])
def test_float32_forward_step_and_chunks_at_16384(make):
    layer, u = make(), torch.randn(1, 16384, 2)
    with torch.no_grad():
        exact = copy.deepcopy(layer).double()(u.double(), return_state=False)[0]
        whole, end = layer(u)
        state, pieces = None, []
        for chunk in u.split([5000, 1, 11383], 1):
            y, state = layer(chunk, state)
            pieces.append(y)
        assert gap(whole.double(), exact) < 1e-4 and gap(torch.cat(pieces, 1).double(), exact) < 1e-4 and gap(state, end) < 1e-4
        state, steps = layer.default_state(1), []
        for u_l in u.unbind(1):
            y, state = layer.step(u_l, state)
            steps.append(y)
        assert gap(torch.stack(steps, 1).double(), exact) < 1e-4


def test_forward_leaves_parameters_alone_and_lengths_mix():
    for l_max in (None, 64):
        k = DPLRKernel(3, 16, l_max=l_max).double()
        before = copy.deepcopy(k.state_dict())
        with torch.no_grad():
            K = {L: k(L)[0] for L in (200, 10, 64, 65, 128, 1)}
        assert all(torch.equal(v, before[n]) for n, v in k.state_dict().items())
        assert all(gap(K[L], K[200][..., :L]) < 1e-9 for L in K)


def test_training_with_a_stored_length_keeps_all_views_equal():
    block = S4Block(3, 16, l_max=40).double()
    optimiser = torch.optim.Adam(block.parameters(), lr=1e-2)
    for _ in range(20):
        u = torch.randn(2, 40, 3, dtype=torch.float64)
        loss = (block(u)[0] - u.roll(5, 1)).square().mean()
        optimiser.zero_grad(); loss.backward(); optimiser.step()
    u = torch.randn(2, 40, 3, dtype=torch.float64)
    with torch.no_grad():
        y, end = block(u)
        state, steps = block.default_state(2), []
        for u_l in u.unbind(1):
            out, state = block.step(u_l, state)
            steps.append(out)
    assert gap(torch.stack(steps, 1), y) < 1e-9 and gap(state, end) < 1e-9
    assert gap(block.kernel(40)[0], dense_kernel(block.kernel, 40)) < 1e-9


def test_checkpoint_from_1024_runs_at_4096_and_100():
    block = S4Block(4, 16, l_max=1024)
    file = io.BytesIO()
    torch.save(block.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert not any(1024 in v.shape for v in state.values()) and int(state["kernel.l_kernel"]) == 1024
    other = S4Block(4, 16)
    other.load_state_dict(state)
    with torch.no_grad():
        for L in (4096, 100):
            u = torch.randn(1, L, 4)
            assert gap(other(u)[0].double(), copy.deepcopy(other).double()(u.double())[0]) < 1e-4
            assert gap(other.kernel(L)[0].double(), dense_kernel(copy.deepcopy(other.kernel).double(), L)) < 3e-5
    with pytest.raises(RuntimeError, match="l_kernel"):
        other.load_state_dict({k: v for k, v in state.items() if "l_kernel" not in k})


@settings(max_examples=20, deadline=None)
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=4), mode=st.sampled_from(["dplr", "diag", "dense", "conv", "ema"]), bidirectional=st.booleans(),
       extra=st.integers(0, 9))
def test_padding_changes_nothing(lengths, mode, bidirectional, extra):
    torch.manual_seed(0)
    block = S4Block(3, 8, mode=mode, bidirectional=bidirectional, l_max=12 if mode == "conv" else None).double()
    n, L = torch.tensor(lengths), max(lengths)
    valid = (torch.arange(L) < n[:, None])[..., None]
    u = torch.randn(len(lengths), L, 3, dtype=torch.float64)
    short = u.clone().requires_grad_()
    padded = torch.cat([torch.where(valid, u, torch.randn_like(u) * 1e3), torch.full((len(lengths), extra, 3), 7.0, dtype=torch.float64)], 1)
    padded.requires_grad_()
    y, state = block(short, lengths=n)
    y2, state2 = block(padded, lengths=n)
    G = torch.randn_like(y) * valid
    (y * G).sum().backward()
    grads = [p.grad.clone() for p in block.parameters()]
    block.zero_grad()
    (y2[:, :L] * G).sum().backward()
    assert torch.allclose(y * valid, y2[:, :L] * valid, atol=1e-10)
    assert torch.allclose(short.grad, padded.grad[:, :L], atol=1e-10) and not padded.grad[:, :L].masked_select(~valid).any()
    for a, p in zip(grads, block.parameters()):
        assert torch.allclose(a, p.grad, rtol=1e-8, atol=1e-9)
    for row, m in enumerate(lengths):
        alone, end = block(u[row:row + 1, :m])
        assert torch.allclose(alone[0], y[row, :m], atol=1e-10) and (end is None or torch.allclose(end[0], state[row], atol=1e-9))
        assert state is None or torch.allclose(state[row], state2[row], atol=1e-9)


MODES = {"dplr": {}, "diag": {}, "dense": {}, "conv": {"l_max": 9}, "ema": {}}


@pytest.mark.parametrize("mode", MODES)
def test_gradient_flows_through_the_state(mode):
    block = S4Block(2, 8, mode=mode, **MODES[mode]).double()
    u = torch.randn(1, 20, 2, dtype=torch.float64, requires_grad=True)
    whole = block(u)[0][:, 12:].square().sum()
    g_whole, = torch.autograd.grad(whole, u)
    _, state = block(u[:, :12])
    g_chunks, = torch.autograd.grad(block(u[:, 12:], state)[0].square().sum(), u)
    assert torch.allclose(g_whole, g_chunks, atol=1e-10)


@pytest.mark.parametrize("mode", MODES)
def test_copies_pickles_two_instances_autocast(mode):
    block, u = S4Block(4, 8, mode=mode, **MODES[mode]), torch.randn(2, 30, 4)
    with torch.no_grad():
        y = block(u)[0]
        block.step(u[:, 0], block.default_state(2))                       # fills the cache
        for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
            assert torch.equal(other(u)[0], y)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = block(u.bfloat16())[0]
        assert half.dtype == torch.bfloat16 and gap(half.float(), y) < 0.05
        assert block.kernel(30)[0].dtype == torch.float32
    two = torch.nn.ModuleList([block, S4Block(4, 8, mode=mode, **MODES[mode])])
    two[1](two[0](u)[0])[0].sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in two.parameters())


def test_options_that_matter_later():
    frozen = DPLRKernel(4, 8, lr={"A": 0.0, "dt": 1e-3})
    assert not any(n in dict(frozen.named_parameters()) for n in ("A_real", "A_imag", "P")) and frozen.param_options["inv_dt"]["lr"] == 1e-3
    even = DPLRKernel(4, 8, deterministic=True)
    assert torch.allclose(even.dt().squeeze().float(), torch.tensor([1e-3, 4.6416e-3, 2.15443e-2, 1e-1]), rtol=1e-4)
    limited = DiagKernel(4, 32, init="diag-lin", bandlimit=0.5, dt_min=0.01, dt_max=0.2).double()
    A, _, C, dt = limited.system()
    assert ((dt * A.imag.abs() / (2 * torch.pi) >= 0.25) == (C == 0)[0]).all() and (C == 0).any() and (C != 0).any()
    assert (DPLRKernel(2, 8, init="fout").A().real <= -1e-4 * 0.999).all()


BAD = [(dict(mode="dplrr"), "dplr"), (dict(init="legz"), "legs"), (dict(dt_mni=1), "dt_min"), (dict(init="legt"), "rank"), (dict(d_state=7), "even"),
       (dict(n_ssm=3), "n_ssm"), (dict(init="all", n_ssm=2), "multiple"), (dict(disc="zoh"), "bilinear"), (dict(bandlimit=0.5), "diag"),
       (dict(lr={"a": 1.0}), "dt"), (dict(activation="gelo"), "gelu"), (dict(dt_min=0.2), "dt_min"), (dict(l_max=0), "l_max"), (dict(real_transform="ex"), "exp"),
       (dict(mode="conv"), "l_max"), (dict(mode="ema", init="legs"), "EMAKernel"), (dict(mode="dense", dt_mni=1), "dt_min")]


@pytest.mark.parametrize("bad, hint", BAD)
def test_one_clear_error(bad, hint):
    with pytest.raises(ValueError, match=hint):
        S4Block(4, **{"d_state": 8, **bad})


def test_errors_at_run_time():
    block = S4Block(4, 8)
    for u in (torch.zeros(2, 4, 10), torch.zeros(10, 4), torch.zeros(2, 10, 4, dtype=torch.long)):
        with pytest.raises(ValueError, match="input"):
            block(u)
    with pytest.raises(ValueError, match="lengths"):
        block(torch.zeros(2, 10, 4), lengths=torch.tensor([11, 3]))
    dss = S4D(4, 8, disc="dss")
    with pytest.raises(ValueError, match="dss"):
        dss.step(torch.zeros(2, 4), dss.default_state(2))
    y, state = dss(torch.randn(2, 7, 4))
    assert y.shape == (2, 7, 4) and state is None and dss.default_state(2) is None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        S4Block(4, 8, l_max=5)(torch.zeros(1, 10, 4))
    assert any("l_max" in str(w.message) for w in caught)


def test_nplr_where_tiny_numbers_count_as_zero():
    "Training loops switch denormal numbers off: a spectrum of zeros is recognised all the same."
    torch.set_flush_denormal(True)
    try:
        Lambda, P, B, V = nplr("fout", 2)
    finally:
        torch.set_flush_denormal(False)
    p = 2 * (P @ V.mT).real
    assert torch.allclose(2 * (V @ torch.diag(Lambda) @ V.mH).real - p.mT @ p, transition("fout", 2)[0], atol=1e-12)
