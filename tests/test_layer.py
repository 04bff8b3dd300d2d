"""Chapter 2, s4nb.ssm.layer: the layer against its formula, padding, directions, number formats, errors."""
import copy
import pickle
import warnings

import pytest
import torch
from hypothesis import given, settings, strategies as st
from s4nb.ops.convolution import MANY, fast_length
from s4nb.s4.block import S4D, S4Block
from s4nb.ssm import views
from s4nb.ssm.layer import Kernel, SSMLayer
from s4nb.ssm.lssl import DenseKernel
from torch.nn import functional as F


def layer(channels=2, **options):
    torch.manual_seed(1)
    return SSMLayer(DenseKernel(3, 4, channels, dt_min=0.01, dt_max=0.3), **options).double()


def formula(net, u, act=F.gelu):
    "Scan, D, activation, and the layer's own Linear with its gate: u (b l h)."
    k, v = net.kernel, u.mT[:, None]
    y = views.scan(*k.discrete(), k.C, v)[0] + net.D[..., None] * v                   # (b c h l)
    y = y.permute(0, 3, 2, 1) if net.swap_channels else y.permute(0, 3, 1, 2)
    a, g = net.mix[0](act(y.flatten(2))).chunk(2, -1)
    return a * torch.sigmoid(g)


@pytest.mark.parametrize("swap_channels", [False, True])
@pytest.mark.parametrize("L", [1, 30, 150])
def test_the_layer_is_its_formula(swap_channels, L):
    net, u = layer(swap_channels=swap_channels), torch.randn(2, L, 3, dtype=torch.float64)
    assert torch.allclose(net(u)[0], formula(net, u), atol=1e-12)
    net = layer(swap_channels=swap_channels, activation="silu", mult_act="tanh")
    assert torch.allclose(net(u)[0], formula(net, u, lambda y: F.silu(y).tanh()), atol=1e-12)


@pytest.mark.parametrize("batch, L", [(2, 30), (2, 150), (MANY, 30)])
def test_gradients_of_every_parameter(batch, L):
    net, u = layer(), torch.randn(batch, L, 3, dtype=torch.float64, requires_grad=True)
    g = torch.randn(batch, L, 3, dtype=torch.float64)
    given = [u, *net.parameters()]
    ours, theirs = (torch.autograd.grad(y, given, g) for y in (net(u, return_state=False)[0], formula(net, u)))
    for a, b in zip(ours, theirs): assert torch.allclose(a, b, rtol=1e-9, atol=1e-9)


class Free(Kernel):
    "K itself as the parameter."
    def __init__(self, d_model, channels, L):
        super().__init__(d_model, 0, channels)
        self.register("K", torch.randn(channels, d_model, L) / L)

    def forward(self, L, rate=1.0, state=None): return self.K[..., :L], None


@pytest.mark.parametrize("c", [1, 2])
def test_what_is_kept_for_the_backward_pass(c):
    b, L, h = 8, 500, 16
    net, u = SSMLayer(Free(h, c, L)), torch.randn(b, L, h, requires_grad=True)
    kept = {}
    def keep(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x): y = net(u, return_state=False)[0]
    features = h + c * h + c * h + 2 * h                # u, the convolution, the activation, the linear map before its gate
    parameters = c * h * fast_length(2 * L - 1) + net.mix[0].weight.numel()
    assert y.shape == u.shape and sum(kept.values()) <= 4 * (b * L * features + parameters)


def test_compiles_into_one_graph():
    net, u = SSMLayer(Free(4, 2, 300)), torch.randn(2, 300, 4, requires_grad=True)
    given = [u, *net.parameters()]
    y, want = torch.compile(net, fullgraph=True, backend="aot_eager")(u, return_state=False)[0], net(u, return_state=False)[0]
    assert torch.allclose(y, want, atol=1e-6)
    for a, b in zip(torch.autograd.grad(y.sum(), given), torch.autograd.grad(want.sum(), given)):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)


def test_the_pointwise_half():
    u = torch.randn(2, 9, 3, dtype=torch.float64)
    bare = layer(activation=None, final_act=None)
    k, v = bare.kernel, u.mT[:, None]
    y = views.scan(*k.discrete(), k.C, v)[0] + bare.D[..., None] * v
    assert bare.d_output == 6 and torch.allclose(bare(u)[0], y.permute(0, 3, 1, 2).flatten(2), atol=1e-12)
    gated = layer(activation="glu", final_act=None)
    assert gated.d_output == 3 and torch.allclose(gated(u)[0], F.glu(y.permute(0, 3, 1, 2).flatten(2)), atol=1e-12)
    linear = layer(final_act="id")
    assert linear.mix[0].out_features == 3 and linear(u)[0].shape == (2, 9, 3)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 160), st.data())
def test_padding_changes_nothing(L, data):
    lengths = data.draw(st.lists(st.integers(0, L), min_size=1, max_size=4))
    extra = data.draw(st.integers(0, 9))
    net = layer()
    s = torch.randn(len(lengths), 3, 4, dtype=torch.float64)
    u = torch.randn(len(lengths), L + extra, 3, dtype=torch.float64)
    for row, n in zip(u, lengths): row[n:] = float("nan")
    u.requires_grad_()
    y, end = net(u, s, lengths=torch.tensor(lengths))
    together = sum(row[:n].square().sum() for row, n in zip(y, lengths)) + end.square().sum()
    grads = torch.autograd.grad(together, [u, *net.parameters()], allow_unused=True)
    alone, inputs = 0, []
    for i, n in enumerate(lengths):
        if n == 0:
            assert torch.equal(end[i], s[i])
            alone = alone + s[i].square().sum()
            continue
        inputs.append((i, n, u[i:i + 1, :n].detach().requires_grad_()))
        y_i, s_i = net(inputs[-1][2], s[i:i + 1])
        assert torch.allclose(y[i, :n], y_i[0], atol=1e-9) and torch.allclose(end[i], s_i[0], atol=1e-9)
        alone = alone + y_i.square().sum() + s_i.square().sum()
    if not inputs: return
    expected = torch.autograd.grad(alone, [x for *_, x in inputs] + list(net.parameters()), allow_unused=True)
    for (i, n, _), g in zip(inputs, expected):
        assert torch.allclose(grads[0][i, :n], g[0], atol=1e-9) and not grads[0][i, n:].abs().sum()
    for g, e in zip(grads[1:], expected[len(inputs):]): assert torch.allclose(g, e, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("offset", [0, 1])
def test_bidirectional(offset):
    net, u = layer(bidirectional=True, final_act=None, activation=None, offset=offset), torch.randn(2, 150, 3).double()
    k, v = net.kernel, u.mT
    K, K_back = views.kernel(*k.discrete(), k.C, 150)
    ahead = views.causal_conv(v.flip(-1), F.pad(K_back, (offset, 0))).flip(-1)
    want = views.causal_conv(v, K) + ahead + net.D[0][:, None] * v
    y, state = net(u)
    assert state is None and net.default_state(2) is None and torch.allclose(y, want.mT, atol=1e-12)
    lengths = torch.tensor([150, 40])
    assert torch.allclose(net(u, lengths=lengths)[0][1, :40], net(u[1:, :40])[0][0], atol=1e-12)
    with pytest.raises(ValueError, match="takes no state"): net(u, torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match="cannot step"): net.step(u[:, 0], None)


def test_l_max_cuts_the_kernel_and_says_so():
    net, u = layer(l_max=10), torch.randn(1, 50, 3, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(net(u[:, :10])[0], layer()(u[:, :10])[0])
        y = net(u, return_state=False)[0]
    with pytest.warns(UserWarning, match="cut to 10 of 50 steps"): state = net(u)[1]
    assert torch.equal(state, layer()(u)[1])
    assert torch.allclose(y[:, -1], layer(l_max=10)(u[:, -10:])[0][:, -1], atol=1e-12)       # nothing older is heard
    with pytest.warns(UserWarning, match="cut to 5 of 50"): net(u, rate=2.0)


def test_autocast_and_half_precision():
    net, u = layer().float(), torch.randn(2, 200, 3)
    y, s = net(u)
    with torch.autocast("cpu", torch.bfloat16):
        for dtype in (torch.float32, torch.bfloat16):
            z, state = net(u.to(dtype))
            assert z.dtype == dtype and state.dtype == torch.float32
            assert (z - y).norm() < 0.02 * y.norm() and (state - s).norm() < 0.02 * s.norm()
            z, state = net.step(u[:, 0].to(dtype), state)
            assert z.dtype == dtype and state.dtype == torch.float32
        assert torch.equal(net(u)[1], s)                                                     # not one bit of the state


def test_dropout_is_drawn_once_after_the_activation():
    net, u = layer(activation=None, final_act=None, dropout=0.5, tie_dropout=True), torch.randn(4, 20, 3).double()
    clean = net.eval()(u)[0]
    y = net.train()(u)[0]
    kept = (y != 0).all(1)
    assert torch.equal(kept, (y != 0).any(1)) and 0 < kept.double().mean() < 1
    assert torch.allclose(y, 2 * clean * kept[:, None], atol=1e-12)


def test_copies_pickles_and_checkpoints(tmp_path):
    net, u = layer(), torch.randn(2, 20, 3, dtype=torch.float64)
    y = net(u)[0]
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))): assert torch.equal(twin(u)[0], y)
    torch.save(net.state_dict(), tmp_path / "net.pt")
    torch.manual_seed(5)
    other = SSMLayer(DenseKernel(3, 4, 2)).double()
    other.load_state_dict(torch.load(tmp_path / "net.pt", weights_only=True))
    assert torch.equal(other(u)[0], y)
    assert all(20 not in v.shape for v in net.state_dict().values())


def test_forward_changes_no_parameter():
    net = layer()
    before = copy.deepcopy(net.state_dict())
    for L in (5, 300, 20): net(torch.randn(1, L, 3, dtype=torch.float64))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_register():
    kernel = Kernel(2, 1)
    kernel.register("w", torch.zeros(2), lr=1e-3)
    kernel.register("v", torch.zeros(2), weight_decay=None)
    kernel.register("f", torch.zeros(2), lr=0.0)
    assert kernel.param_options == {"w": {"lr": 1e-3, "weight_decay": 0.0}, "v": {}}
    assert not kernel.f.requires_grad and sorted(kernel.state_dict()) == ["f", "v", "w"]
    for call in (lambda: kernel(3), lambda: kernel.advance(0), lambda: kernel.step(0, 0), lambda: kernel.default_state(1)):
        with pytest.raises(NotImplementedError): call()


def test_errors():
    net, u = layer(), torch.zeros(2, 5, 3, dtype=torch.float64)
    for bad in (u[..., :2], u[0], u.long()):
        with pytest.raises(ValueError, match="input"): net(bad)
    with pytest.raises(ValueError, match="input"): net.step(u, None)
    with pytest.raises(ValueError, match="lengths must lie"): net(u, lengths=torch.tensor([5, 6]))
    with pytest.raises(ValueError, match="one for each row"): net(u, lengths=torch.tensor([5]))
    with pytest.raises(ValueError, match="even"): layer(channels=1, bidirectional=True)
    with pytest.raises(ValueError, match="halves"): layer(channels=1, activation="glu")
    with pytest.raises(ValueError, match="l_max"): layer(l_max=0)
    with pytest.raises(ValueError, match="offset"): layer(offset=2)
    with pytest.raises(ValueError, match="unknown activation"): layer(final_act="gluu")


def test_half_precision_parameters_are_refused_clearly():
    f, u = S4D(4, 8).bfloat16(), torch.randn(2, 5, 4, dtype=torch.bfloat16)
    for call in (lambda: f(u), lambda: f.step(u[:, 0], None)):
        with pytest.raises(ValueError, match="torch.autocast"): call()


def test_a_step_without_a_state_starts_from_the_default():
    f, u = S4Block(4, 8), torch.randn(2, 4)
    for a, b in zip(f.step(u, None), f.step(u, f.default_state(2))): assert torch.equal(a, b)
