"""CKConv, UnICORNN, LipschitzRNN and WaveGAN's discriminator: the shared check, other rates, their invariants, refusals."""
import copy
import math

import pytest
import torch
from torch import nn

from s4nb.models.backbone import SequenceModel
from s4nb.models.baselines import (CKConv, LipschitzRNN, Siren, UnICORNN, WaveGANDiscriminator, mixing_conv, phase_shuffle,
                                   shaped)
from s4nb.models.check import check_model

MODELS = {"ckconv": lambda: CKConv(4, 3, l_max=16), "ckconv wide": lambda: CKConv(2, l_max=100, activation="modrelu"),
          "unicornn": lambda: UnICORNN(4, 6), "lipschitz": lambda: LipschitzRNN(4, 3),
          "stack": lambda: SequenceModel(4, 2, lambda i: [CKConv(4, l_max=9), LipschitzRNN(4)][i])}


@pytest.mark.parametrize("name", MODELS)
def test_check_model(name):
    found = check_model(MODELS[name](), L=12, compile=name in ("ckconv", "unicornn"))
    declared = {"step", "state"} if name in ("ckconv", "ckconv wide", "stack") else set()
    assert {key for key, said in found.items() if said != "yes"} == declared


def slope(f, u, rate):
    "The change over the last two inputs of the answer to a slow signal u (l h), in units of time."
    return f(u[None, ::rate], rate=float(rate))[0][0, -1]


def test_ckconv_at_another_rate():
    "A slow input at half, a quarter of the samples: the same integral, up to the step; and exactly the kernel's every rth value."
    torch.manual_seed(0)
    f = CKConv(2, l_max=512, omega_0=5.0, activation=None).double()
    t = torch.arange(2049, dtype=torch.double) / 2048
    u = torch.stack([(4 * t).sin(), (3 * t).cos()], -1)
    errors = [(slope(f, u, r) - slope(f, u, 1)).norm() / slope(f, u, 1).norm() for r in (2, 4, 8)]
    assert errors[0] < 0.02 and errors[2] < 0.1, errors
    for r in (2, 4): assert torch.allclose(f.kernel(4096, rate=r), r * f.kernel(4096)[..., ::r], atol=1e-12)
    assert f.kernel(4096, rate=0.5).shape[-1] == 1024 and f.kernel(100).shape[-1] == 100
    assert f.kernel(4096, rate=3).shape[-1] == math.ceil(512 / 3) and f.kernel(4096, rate=1e6).shape[-1] == 1


def test_ckconv_reaches_l_max_and_no_further():
    f, u = CKConv(1, l_max=30, activation=None).double(), torch.zeros(1, 80, 1, dtype=torch.double)
    u[0, 10] = 1
    y = f(u)[0][0, :, 0].abs() > 1e-13
    assert y[10:40].all() and not y[:10].any() and not y[40:].any()


def test_siren_starts_with_the_variance_it_is_asked_for():
    torch.manual_seed(0)
    p = torch.linspace(-1, 1, 500)[:, None]
    for omega_0 in (10.0, 30.0):
        K = torch.stack([Siren(1, 64, 64, omega_0, variance=0.01)(p) for _ in range(20)])
        assert 0.008 < K.square().mean() < 0.012
    hidden = Siren(1, 256, 1)
    inner = 30 * nn.functional.linear(torch.sin(30 * hidden.first(p)), hidden.second.weight)
    assert 0.7 < inner.std() < 1.3


def test_mixing_conv_with_kernels_longer_and_shorter_than_the_input():
    u = torch.randn(2, 3, 7, dtype=torch.double)
    for k in (1, 4, 7, 20):
        K = torch.randn(5, 3, k, dtype=torch.double)
        expected = nn.functional.conv1d(nn.functional.pad(u, (k - 1, 0)), K.flip(-1))
        assert torch.allclose(mixing_conv(u, K), expected, atol=1e-12)


def test_unicornn_follows_its_equation():
    "At small steps the layer is the solution of y'' = -(tanh(w y + V u + b) + alpha y): halving the step halves the error."
    torch.manual_seed(0)
    f = UnICORNN(2, 3, dt=0.01, alpha=2.0).double()
    w, dt, u = f.cell.w, 0.01 * f.cell.c.sigmoid(), torch.ones(1, 2, dtype=torch.double)
    drive = f.cell.project(u)

    def slopes(y, z): return z, -(torch.tanh(w * y + drive) + 2.0 * y)
    y, z = f.default_state(1)
    with torch.no_grad():
        for _ in range(800):                                   # fourth order Runge-Kutta: exact for our purposes
            a = slopes(y, z)
            b = slopes(y + dt / 2 * a[0], z + dt / 2 * a[1])
            c = slopes(y + dt / 2 * b[0], z + dt / 2 * b[1])
            d = slopes(y + dt * c[0], z + dt * c[1])
            y, z = (x + dt / 6 * (i + 2 * j + 2 * k + l) for x, i, j, k, l in zip((y, z), a, b, c, d))
        errors = [(f(u[:, None].expand(1, 800 * n, 2), rate=1 / n)[1][0] - y).abs().max() for n in (1, 2, 4)]
    assert 1.8 < errors[0] / errors[1] < 2.2 and 1.8 < errors[1] / errors[2] < 2.2 and errors[0] < 0.02


def test_unicornn_units_are_independent():
    f = UnICORNN(2, 3).double()
    y0, z0 = torch.randn(1, 3, dtype=torch.double), torch.randn(1, 3, dtype=torch.double)
    J = torch.autograd.functional.jacobian(lambda y0: f(torch.zeros(1, 9, 2, dtype=torch.double), (y0, z0))[0][0, -1], y0)[:, 0]
    assert J.diagonal().abs().min() > 0 and not (J - J.diagonal().diag()).any()


def test_lipschitz_shape_and_rate():
    M = torch.randn(5, 5, dtype=torch.double)
    assert torch.allclose(shaped(M, 0.5, 0.0), M) and torch.allclose(shaped(M, 1.0, 0.0), M - M.T)
    assert torch.allclose(torch.linalg.eigvals(shaped(M, 1.0, 0.3)).real, torch.tensor(-0.3, dtype=torch.double))
    f, u = LipschitzRNN(3, 4, dt=0.02).double(), torch.randn(2, 9, 3, dtype=torch.double)
    g = copy.deepcopy(f)
    g.cell.dt = 0.04
    (y, h), (y2, h2) = f(u, rate=2.0), g(u)
    assert torch.equal(y, y2) and torch.equal(h, h2) and f.cell.dt == 0.02
    lengths = torch.tensor([9, 4])
    assert torch.equal(f(u, h, lengths, rate=2.0)[0], g(u, h, lengths)[0])


# ---- WaveGAN ---------------------------------------------------------------------------------------------------------
def test_wavegan_sizes():
    with torch.device("meta"):
        paper = WaveGANDiscriminator(1, 1, l_input=16384)
        assert sum(p.numel() for p in paper.parameters()) == 17_427_969
        assert [c.out_channels for c in paper.convs] == [64, 128, 256, 512, 1024] and paper.linear.in_features == 256 * 64
        assert WaveGANDiscriminator(1, 10, l_input=16000).linear.in_features == 16 * 1024
    f = WaveGANDiscriminator(2, 3, channels=2, n_layers=2, l_input=37)
    assert f(torch.randn(4, 37, 2)).shape == (4, 3)


def test_wavegan_layers_literally():
    torch.manual_seed(0)
    f, x = WaveGANDiscriminator(1, 3, channels=2, n_layers=2).double().eval(), torch.randn(1, 50, 1, dtype=torch.double)
    h = x[0]
    for conv in f.convs:
        y = conv.bias.repeat(math.ceil(len(h) / 4), 1)
        for t in range(len(y)):
            for j in range(25):
                if 0 <= 4 * t + j - 12 < len(h): y[t] = y[t] + conv.weight[:, :, j] @ h[4 * t + j - 12]
        h = torch.where(y > 0, y, 0.2 * y)
    assert torch.allclose(f(x)[0], f.linear(h.mean(0)), atol=1e-12)


@pytest.mark.parametrize("training", [False, True])
def test_wavegan_ignores_padding(training):
    "Also in training, where the same random shifts mirror each row at its own end; and gradients stay finite."
    torch.manual_seed(0)
    f = WaveGANDiscriminator(2, 3, channels=4, n_layers=3).double().train(training)
    lengths, u = torch.tensor([90, 31, 1]), torch.randn(3, 90, 2, dtype=torch.double)
    results = []
    for extra, fill in ((0, 0.0), (0, float("nan")), (70, 1e5)):
        x = nn.functional.pad(u, (0, 0, 0, extra))
        for row, n in zip(x, lengths): row[n:] = fill
        torch.manual_seed(1), f.zero_grad()
        y = f(x, lengths=lengths)
        y.square().sum().backward()
        results.append(torch.cat([y.detach().flatten(), *(p.grad.flatten() for p in f.parameters())]))
    for other in results[1:]: assert torch.allclose(other, results[0], atol=1e-10)


def test_phase_shuffle_moves_and_mirrors():
    x = torch.randn(5, 11, 3)
    assert torch.equal(phase_shuffle(x, torch.zeros(5, dtype=torch.long)), x)
    y = phase_shuffle(x, torch.tensor([3, -3, 1, 0, 2]))
    assert torch.equal(y[0, 3:], x[0, :-3]) and torch.equal(y[0, :3], x[0, 1:4].flip(0))
    assert torch.equal(y[1, :-3], x[1, 3:]) and torch.equal(y[1, -3:], x[1, -4:-1].flip(0))


def test_phase_shuffle_of_the_model_is_per_row_and_in_training_only():
    torch.manual_seed(0)
    f, x = WaveGANDiscriminator(1, 3, channels=4, n_layers=2), torch.randn(1, 64, 1).expand(30, 64, 1)
    y = f.eval()(x)
    assert torch.allclose(y, y[:1].expand_as(y), atol=1e-6)
    rows = f.train()(x).detach()
    assert len({tuple(row.tolist()) for row in (rows * 1e4).round()}) == 5              # shifts -2 … 2 behind one layer
    f.shuffle = 0
    assert torch.allclose(f(x), y, atol=1e-6)


@pytest.mark.parametrize("call,said", [
    (lambda: CKConv(3, omega_0=0), "greater than 0"), (lambda: CKConv(3, l_max=0), "at least 1"), (lambda: CKConv(3, activation="glu-relu"), "halves"),
    (lambda: CKConv(3, activation="rellu"), "did you mean 'relu'"), (lambda: CKConv(3).step(torch.zeros(1, 3), None), "no recurrence"),
    (lambda: CKConv(3)(torch.zeros(1, 5, 3), torch.zeros(1)), "no recurrence"), (lambda: CKConv(3)(torch.zeros(1, 5, 4)), "expected"),
    (lambda: UnICORNN(3, dt=0.0), "stable"), (lambda: UnICORNN(3, alpha=-1.0), "stable"),
    (lambda: LipschitzRNN(3, beta=-0.1), r"\[0, 1\]"), (lambda: LipschitzRNN(3, gamma=-1.0), "not negative"),
    (lambda: WaveGANDiscriminator(2)(torch.zeros(1, 64, 1)), "expected"),
    (lambda: WaveGANDiscriminator(1, l_input=64, channels=2)(torch.zeros(1, 64, 1), lengths=torch.tensor([3])), "averages over any"),
    (lambda: WaveGANDiscriminator(1, l_input=64, channels=2)(torch.zeros(1, 65, 1)), "fixes the length")])
def test_refusals(call, said):
    with pytest.raises(ValueError, match=said): call()
