"""The backbone: whole == chunks == steps, padding changes nothing, before and after training."""
import pytest
import torch
from torch import nn

from s4nb.models import SequenceModel
from s4nb.module import length_mask
from s4nb.s4.block import S4Block
from s4nb.ssm.lssl import LSSL

LAYERS = {"dplr": lambda h, **k: S4Block(h, d_state=6, mode="dplr", **k), "diag": lambda h, **k: S4Block(h, d_state=6, mode="diag", **k),
          "dense": lambda h, **k: LSSL(h, d_state=5, **k)}
NORMS = ("layer", "batch", "instance", "group", "none")


def model(kind, norm="layer", prenorm=True, h=4, **options):
    torch.manual_seed(0)
    return SequenceModel(h, 2, lambda i: LAYERS[kind](h, **options), norm=norm, prenorm=prenorm).double()


def close(a, b, tolerance=1e-9):
    a, b = torch.as_tensor(a), torch.as_tensor(b)
    assert (a - b).abs().max() <= tolerance * max(1.0, a.abs().max())


def train(f, steps=20, lengths=None):
    "Some optimiser steps on a random regression, so that no parameter has its initial value."
    optimizer = torch.optim.AdamW([p for p in f.parameters() if p.requires_grad], lr=1e-2)
    u, target = torch.randn(3, 16, f.d_model, dtype=torch.double), torch.randn(3, 16, f.d_output, dtype=torch.double)
    for _ in range(steps):
        loss = (f(u, lengths=lengths, return_state=False)[0] - target).square().mean()
        optimizer.zero_grad(), loss.backward(), optimizer.step()



@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("norm,prenorm", [("layer", True), ("batch", False), ("none", True)])
@pytest.mark.parametrize("steps", [0, 20])
def test_whole_chunks_and_steps_agree(kind, norm, prenorm, steps):
    f = model(kind, norm, prenorm)
    train(f, steps)
    f.eval()
    u = torch.randn(2, 23, 4, dtype=torch.double)
    with torch.no_grad():
        whole, end = f(u)
        state, parts = None, []
        for part in u.split([9, 1, 13], 1):
            y, state = f(part, state)
            parts.append(y)
        stepped, ys = f.default_state(2), []
        for x in u.unbind(1):
            y, stepped = f.step(x, stepped)
            ys.append(y)
    close(whole, torch.cat(parts, 1)), close(whole, torch.stack(ys, 1))
    for a, b, c in zip(end, state, stepped):
        close(a, b), close(a, c)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_padding_changes_no_output_state_gradient_or_running_average(norm, bidirectional):
    generator = torch.Generator().manual_seed(1)
    for trial in range(4):
        lengths = torch.randint(1, 15, (3,), generator=generator)
        lengths[trial % 3] = 14
        u = torch.randn(3, 14, 4, dtype=torch.double, generator=generator)
        wider = torch.cat([u, 0 * u], 1)
        wider = torch.where(length_mask(lengths, 28), wider, 1e3 * torch.randn(wider.shape, dtype=torch.double, generator=generator))
        results = []
        for x in (u, wider):
            f = model("diag", norm, prenorm=trial % 2 == 0, bidirectional=bidirectional)
            x = x.clone().requires_grad_()
            y, state = f(x, lengths=lengths)
            valid = y[length_mask(lengths, x.shape[1]).squeeze(-1)]
            valid.square().sum().backward()
            states = [s for s in state if s is not None]
            assert not x.grad[~length_mask(lengths, x.shape[1]).squeeze(-1)].any()
            results.append([valid, x.grad[:, :14], *states, *(p.grad for p in f.parameters()), *(b for b in f.buffers() if b.is_floating_point())])
        for a, b in zip(*results):
            close(a, b)


def test_state_after_padding_continues_each_row():
    f = model("dplr")
    u, lengths = torch.randn(2, 12, 4, dtype=torch.double), torch.tensor([12, 7])
    _, state = f(u, lengths=lengths)
    more = torch.randn(2, 5, 4, dtype=torch.double)
    y, _ = f(more, state)
    for i, n in enumerate(lengths):
        whole, _ = f(torch.cat([u[i:i + 1, :n], more[i:i + 1]], 1))
        close(y[i], whole[0, n:])


def test_the_blocks_are_the_formulas():
    u = torch.randn(2, 9, 4, dtype=torch.double)
    for prenorm in (True, False):
        f, x = model("diag", "layer", prenorm), u
        norm = lambda x: (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        for block in f.layers:
            x = x + block.layer(norm(x))[0] if prenorm else norm(x + block.layer(x)[0])
        close(f(u)[0], norm(x) if prenorm else x)


def test_dropout_only_in_training_and_tied_over_the_length():
    class Ones(nn.Module):
        d_model = d_output = 64

        def forward(self, u, state=None, lengths=None, rate=1.0, return_state=True):
            return torch.ones_like(u), None
    u = torch.zeros(2, 10, 64)
    for tie in (True, False):
        f = SequenceModel(64, 1, [Ones()], norm="none", dropout=0.5, tie_dropout=tie)
        y, _ = f(u)
        assert set(y.unique().tolist()) == {0.0, 2.0} and bool((y == y[:, :1]).all()) == tie
        assert (f.eval()(u)[0] == 1).all()


def test_unequal_sizes_and_no_residual():
    layers = [S4Block(4, d_state=4, final_act=None, channels=2), S4Block(8, d_state=4)]
    with pytest.raises(ValueError, match="residual"):
        SequenceModel(4, 2, layers)
    f = SequenceModel(4, 2, layers, residual=None)
    assert f.d_output == 8 and f(torch.randn(2, 6, 4))[0].shape == (2, 6, 8)


def test_autocast_and_rate():
    f = model("diag", "batch", False).float()
    u, lengths = torch.randn(2, 16, 4), torch.tensor([16, 9])
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = f(u, lengths=lengths, return_state=False)
    assert torch.isfinite(y).all()
    f = f.double().eval()
    assert not torch.allclose(f(u.double(), rate=2.0)[0], f(u.double())[0])


@pytest.mark.parametrize("wrong,text", [(lambda: model("diag", "instance").step(torch.zeros(2, 4).double(), [None, None]), "whole sequence"),
                                        (lambda: model("diag", "layr"), "layer"),
                                        (lambda: SequenceModel(4, 3, [S4Block(4)]), "n_layers=3"),
                                        (lambda: SequenceModel(4, 2, S4Block(4)), "one layer object"),
                                        (lambda: model("diag")(torch.zeros(2, 5, 4).double(), [None]), "2 layers")])
def test_errors_say_what_to_do(wrong, text):
    with pytest.raises(ValueError, match=text):
        wrong()
