"""SaShiMi and UNet: every promise for every wiring, rows out of phase, training, sizes, refusals."""
import pytest
import torch
from torch import nn

from s4nb.models.check import check_model
from s4nb.models.sashimi import Chain, SaShiMi, UNet
from s4nb.s4.block import S4D, S4Block


def layer(d): return S4Block(d, d_state=4)


def close(a, b, tolerance=1e-9):
    assert a.shape == b.shape and (a - b).abs().max() <= tolerance


def inputs(*shape): return torch.randn(*shape, dtype=torch.double, generator=torch.Generator().manual_seed(1))


MODELS = {
    "two pools": lambda: SaShiMi(4, 1, layer=layer),
    "one pool, two layers": lambda: SaShiMi(4, 2, (3,), 3, layer=layer),
    "no pool": lambda: SaShiMi(4, 1, (), layer=layer),
    "no ffn": lambda: SaShiMi(4, 1, (2, 2), ff=0, layer=layer),
    "diagonal": lambda: SaShiMi(4, 1, (2, 3), layer=lambda d: S4D(d, 4)),
    "whole rows normalised": lambda: SaShiMi(4, 1, (2,), layer=layer, norm="instance"),
    "postnorm": lambda: SaShiMi(4, 1, (2, 3), layer=layer, prenorm=False, norm="batch"),
    "layers on both ways": lambda: SaShiMi(4, 1, (2, 3), layer=layer, unet=True),
    "unet": lambda: UNet(4, 1, (2, 3), layer=layer),
    "unet, no ffn in the neck": lambda: UNet(4, 1, (2, 3), layer=layer, cff=0),
    "unet, averages": lambda: UNet(4, 1, (2, 3), layer=layer, pool_mode="pool"),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_promise(name):
    torch.manual_seed(0)
    found = check_model(MODELS[name](), compile=name in ("one pool, two layers", "unet, averages"))
    if name == "whole rows normalised": assert found.pop("step") == found.pop("state") != "yes"
    assert set(found.values()) == {"yes"}


@pytest.mark.parametrize("make", [SaShiMi, UNet])
def test_both_directions(make):
    torch.manual_seed(0)
    f = make(4, 1, (2, 3), bidirectional=True)
    found = check_model(f)
    assert {name for name, yes in found.items() if yes != "yes"} == {"step", "state"}
    g, = torch.autograd.grad(f(u := inputs(1, 20, 4).float().requires_grad_())[0][0, 3, 0], u)
    assert g[0, 19].abs().max() > 0                               # the first outputs hear the last inputs
    assert f.default_state(1) is None and f(u)[1] is None
    with pytest.raises(ValueError, match="cannot continue from a state"): f(u, [])
    with pytest.raises(ValueError, match="cannot step"): f.step(u[:, 0], None)


def test_rows_out_of_phase_after_training():
    torch.manual_seed(0)
    f = SaShiMi(4, 1, (2, 3), layer=layer).double()
    optimizer = torch.optim.AdamW(f.parameters(), lr=1e-2)
    u, target, lengths = inputs(3, 20, 4), inputs(3, 20, 4).flip(1), torch.tensor([1, 8, 19])
    for _ in range(10):
        loss = (f(u, return_state=False)[0] - target).square().mean()
        optimizer.zero_grad(), loss.backward(), optimizer.step()
    more = inputs(3, 17, 4)
    with torch.no_grad():
        _, state = f.eval()(u, lengths=lengths)
        chunk, end = f(more, state)
        for t, x in enumerate(more.unbind(1)):
            y, state = f.step(x, state)
            close(y, chunk[:, t])
        for i, n in enumerate(lengths):
            close(chunk[i], f(torch.cat([u[i, :n], more[i]])[None])[0][0, n:])


def test_inner_tiers_step_at_their_own_rate():
    calls = {}

    class Counted(S4D):
        def step(self, u, state):
            calls[self.d_model] = calls.get(self.d_model, 0) + 1
            return super().step(u, state)

    f = SaShiMi(4, 1, (4, 4), layer=lambda d: Counted(d, 4))
    state = f.default_state(2)
    with torch.no_grad():
        for x in inputs(70, 2, 4).float(): _, state = f.step(x, state)
    assert calls == {4: 70, 8: 17, 16: 4}


def test_rate_reaches_every_layer():
    torch.manual_seed(0)
    f = SaShiMi(4, 1, (2,), layer=lambda d: S4D(d, 4)).double()
    u = inputs(1, 16, 4)
    y = f(u, rate=2.0)[0]
    with torch.no_grad():
        for name, p in f.named_parameters():
            if name.endswith("inv_dt"): p += torch.tensor(2.0).log()     # dt = exp(inv_dt)
    close(f(u)[0], y)


def test_dropout_only_in_training():
    torch.manual_seed(0)
    f, u = SaShiMi(4, 1, (2,), layer=layer, dropout=0.5, tie_dropout=True).double(), inputs(2, 12, 4)
    assert (f(u)[0] - f(u)[0]).abs().max() > 1e-3
    f.eval()
    close(f(u)[0], f(u)[0], 0)


@pytest.mark.parametrize("h, n, pool, e, N", [(4, 1, (2,), 2, 4), (8, 3, (4, 4), 2, 16), (6, 2, (3, 1, 2), 1, 8)])
def test_number_of_parameters(h, n, pool, e, N):
    P = lambda d: 6 * d ** 2 + (11 + 4 * N) * d
    want = 2 * h + n * sum(P(h * e ** k) for k in range(len(pool) + 1))
    want += sum(2 * s * e * d * d + 2 * e * d + 2 * s * d for k, s in enumerate(pool) for d in [h * e ** k])
    assert sum(p.numel() for p in SaShiMi(h, n, pool, e, layer=lambda d: S4Block(d, N)).parameters()) == want


def test_chain():
    torch.manual_seed(0)
    parts = [layer(3), layer(3)]
    f, u = Chain(parts, skip=True).double(), inputs(2, 9, 3)
    close(f(u)[0], u + parts[1](parts[0](u)[0])[0], 0)
    assert set(check_model(f).values()) == {"yes"} and isinstance(f.layers, nn.ModuleList)


@pytest.mark.parametrize("wrong, message", [
    (dict(pool_mode="linaer"), "did you mean 'linear'"), (dict(pool_mode="spectral"), "allowed: sample"),
    (dict(n_layers=0), "at least 1"), (dict(layer=S4Block(4, 4)), "one layer cannot serve"),
    (dict(pool=(0,)), "stride"), (dict(norm="lyer"), "did you mean 'layer'"),
    (dict(layer=lambda d: S4Block(d, 4, final_act=None, channels=2)), "sum"),
])
def test_refusals(wrong, message):
    with pytest.raises(ValueError, match=message): SaShiMi(4, **{"layer": layer, **wrong})
