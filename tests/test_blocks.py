"""FFN, GSS, DSS and their relatives: formulas written out, options, errors, the promises of check_model."""
import pytest
import torch
import torch.nn.functional as F

from s4nb.models.blocks import DSS, FFN, GSS, DSSExp, S4DReal
from s4nb.models.check import check_model
from s4nb.s4.block import S4D, S4Block


def double(make):
    torch.manual_seed(0)
    return make().double().eval()


@pytest.mark.parametrize("act,formula", [
    ("gelu", F.gelu), ("relu", F.relu), ("glu", lambda x: x[..., :6] * x[..., 6:].sigmoid()),
    ("glu-silu", lambda x: x[..., :6] * F.silu(x[..., 6:])), ("glu-gelu", lambda x: x[..., :6] * F.gelu(x[..., 6:]))])
def test_ffn_is_its_formula(act, formula):
    f = double(lambda: FFN(4, expand=1.5, d_output=3, activation=act))
    first, second = f.ff[0][0], f.ff[2]
    u = torch.randn(2, 7, 4, dtype=torch.double)
    expected = formula(u @ first.weight.T + first.bias) @ second.weight.T + second.bias
    assert (f(u)[0] - expected).abs().max() < 1e-12 and f(u)[1] is None
    assert f.d_output == 3 and first.out_features == (12 if act.startswith("glu") else 6)
    assert (f.step(u[:, 2], None)[0] - expected[:, 2]).abs().max() < 1e-12


def test_ffn_drops_whole_features_when_tied():
    torch.manual_seed(0)
    f, u = FFN(4, expand=64, dropout=0.5, tie_dropout=True).train(), torch.randn(2, 9, 4)
    inside = f.ff[1](f.ff[0](u))
    assert (((inside == 0).all(1)) | ((inside != 0).all(1))).all() and (inside == 0).any() and (inside != 0).any()
    loose = FFN(4, expand=64, dropout=0.5).train()
    zero = loose.ff[1](loose.ff[0](u)) == 0
    assert not (zero.all(1) | (~zero).all(1)).all()


@pytest.mark.parametrize("bidirectional", [False, True])
def test_gss_is_its_formula(bidirectional):
    f = double(lambda: GSS(8, 6, gate=2, bottleneck=4, bidirectional=bidirectional))
    u = torch.randn(2, 11, 8, dtype=torch.double)
    down, gate, up, out = f.input_linear[0], f.input_gate[0], f.output_gate, f.output_linear
    assert (down.out_features, gate.out_features, up.out_features, out.out_features) == (2, 16, 16, 8)
    y, _ = f.layer(F.gelu(down(u)))
    expected = out(up(y) * F.gelu(gate(u)))
    assert (f(u)[0] - expected).abs().max() < 1e-12


def test_gss_has_the_settings_of_its_paper():
    kernel = GSS(8, 6).layer.kernel
    assert (kernel.dt() - 1).abs().max() < 1e-6
    trained = {name for name, _ in kernel.named_parameters()}
    assert "inv_dt" not in trained and "B" not in trained and {"A_real", "A_imag", "C"} <= trained


def test_gss_drops_in_training_only():
    torch.manual_seed(0)
    f, u = GSS(8, 6, dropout=0.5, tie_dropout=True), torch.randn(2, 5, 8)
    assert not torch.equal(f.train()(u)[0], f(u)[0]) and torch.equal(f.eval()(u)[0], f(u)[0])


def test_real_modes_only_decay():
    f = double(lambda: S4DReal(2, 5))
    assert f.kernel.A_real.shape[-1] == 5 and not hasattr(f.kernel, "A_imag")
    A, B, C, dt = f.kernel.system()
    expected = -torch.arange(1, 6, dtype=torch.double)
    assert A.imag.abs().max() == 0 and (A.real - expected).abs().max() < 1e-5
    l = torch.arange(30, dtype=torch.double)
    modes = torch.exp(A.real[..., None] * dt[..., None] * l) * ((torch.exp(A.real * dt) - 1) / A.real * B.real)[..., None]
    literal = 2 * (C.real[..., None] * modes).sum(-2)
    assert (f.kernel(30)[0] - literal).abs().max() < 1e-10


def test_dss_is_a_softmax_over_time():
    "Each mode's powers sum to one over the whole length: K_l = Re sum_n w_n e^(l a_n) / sum_k e^(k a_n), w = B C / A."
    f = double(lambda: DSS(3, 8))
    A, B, C, dt = (x.to(torch.complex128) for x in f.kernel.system())
    L = 40
    powers = torch.exp((dt * A)[..., None] * torch.arange(L))
    literal = ((C * B / A)[..., None] * powers / powers.sum(-1, keepdim=True)).sum(-2).real
    K = f.kernel(L)[0]
    assert (K - literal).abs().max() < 1e-5 * literal.abs().max()            # 1e-7 in its denominator, as published
    assert (f.kernel(2 * L)[0][..., :L] - K).abs().max() > 1e-3 * K.abs().max()


def test_dss_has_no_state():
    f, u = DSS(4, 8), torch.randn(2, 9, 4)
    y, state = f(u)
    assert y.shape == u.shape and state is None and f.default_state(2) is None
    for call in (lambda: f.step(u[:, 0], None), lambda: f(u, torch.zeros(2, 4, 4, dtype=torch.complex64))):
        with pytest.raises(ValueError, match="dss"): call()


def test_dss_exp_is_s4d_with_the_spectrum_of_s4():
    f = double(lambda: DSSExp(4, 8))
    g = double(lambda: S4D(4, 8, init="diag-legs"))
    g.load_state_dict(f.state_dict())
    u = torch.randn(2, 13, 4, dtype=torch.double)
    assert torch.equal(f(u)[0], g(u)[0]) and set(check_model(f).values()) == {"yes"}


@pytest.mark.parametrize("make", [lambda: FFN(4, activation="glu-relu"), lambda: GSS(8, 6, bottleneck=2), lambda: S4DReal(4, 6),
                                  lambda: S4Block(4, mode="conv", l_max=9), lambda: S4Block(4, mode="ema", d_state=4)])
def test_promises(make):
    assert set(check_model(make(), compile=isinstance(make(), FFN)).values()) == {"yes"}


@pytest.mark.parametrize("make,text", [
    (lambda: FFN(4, activation="gelo"), "did you mean 'gelu'"), (lambda: FFN(4, expand=0.1), "expand"), (lambda: GSS(6, 4, bottleneck=4), "must divide 6"),
    (lambda: DSS(4, 8, is_real=True), "is_real"), (lambda: S4DReal(4, 8, disc="dss"), "is_real"), (lambda: DSS(4, 8, dt_mim=1), "did you mean 'dt_min'")])
def test_errors(make, text):
    with pytest.raises(ValueError, match=text): make()
