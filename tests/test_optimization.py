"""Parameter groups against the table of the experiments, and the schedule."""
import math

import pytest
import torch
from torch import nn

from s4nb.models import Decoder, Model, SequenceModel, TokenEncoder
from s4nb.s4.block import S4Block
from s4nb.training import param_groups
from s4nb.training.experiments import EXPERIMENTS
from s4nb.training.optimization import cosine_warmup, group_table, schedule


def by_name(groups):
    return {name: (g["lr"], g["weight_decay"]) for g in groups for name in g["names"]}


@pytest.mark.parametrize("mode", ["dplr", "diag", "dense"])
def test_each_trained_parameter_is_in_exactly_one_group(mode):
    model = SequenceModel(8, 2, lambda i: S4Block(8, d_state=4, mode=mode), norm="batch")
    groups = param_groups(model, 0.01, 0.05)
    ids = [id(p) for g in groups for p in g["params"]]
    assert sorted(ids) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert [n for g in groups for n in g["names"]] and set(by_name(groups)) == {n for n, p in model.named_parameters() if p.requires_grad}
    assert len({(g["lr"], g["weight_decay"]) for g in groups}) == len(groups)
    for name, (lr, decay) in by_name(groups).items():
        assert decay == (0.0 if any(s in name for s in (".kernel.", "norm", "bias")) else 0.05), name


def test_lra_listops_has_the_rates_of_the_table():
    e = EXPERIMENTS["lra-listops"]
    model = e.model.build(e.dataset.build())
    options = by_name(param_groups(model, e.optimizer.lr, e.optimizer.weight_decay))
    kernel = "backbone.layers.0.layer.kernel."
    for name in ("A_real", "A_imag", "P", "B"):
        assert options[kernel + name] == (1e-3, 0.0)
    assert options[kernel + "inv_dt"] == options[kernel + "C"] == (0.01, 0.0)
    assert options["backbone.layers.5.layer.D"] == options["encoder.weight"] == options["decoder.linear.bias"] == (0.01, 0.05)
    assert options["backbone.layers.3.norm.weight"] == (0.01, 0.0)


def test_frozen_parameters_and_zero_rates_are_left_out():
    model = nn.Sequential(S4Block(4, d_state=4, lr={"A": 0.0}), nn.Linear(4, 4))
    model[1].weight.requires_grad_(False)
    names = set(by_name(param_groups(model, 0.01, 0.05)))
    assert "1.weight" not in names and "1.bias" in names and not any(n.endswith(("A_real", "A_imag")) for n in names)


def test_a_misspelt_option_is_an_error():
    layer = nn.Linear(2, 2)
    layer.param_options = {"weight": {"wd": 0.0}}
    with pytest.raises(ValueError, match="weight_decay"):
        param_groups(layer, 0.01, 0.05)


def test_decay_acts_where_the_table_says():
    model = nn.Sequential(nn.Embedding(3, 4), nn.Linear(4, 4))
    optimizer = torch.optim.AdamW(param_groups(model, lr=0.5, weight_decay=0.1))
    before = {name: p.clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        assert torch.allclose(p, before[name] * (0.95 if name == "1.weight" else 1.0))


def test_schedule():
    factors = [cosine_warmup(s, 10, 110) for s in range(130)]
    assert factors[:11] == pytest.approx([s / 10 for s in range(11)], abs=1e-15)
    assert factors[10:111] == pytest.approx([math.cos(math.pi * k / 200) ** 2 for k in range(101)], abs=1e-12)
    assert factors[110:] == pytest.approx([0.0] * 20, abs=1e-15)
    assert cosine_warmup(5, 0, 10) == pytest.approx(0.5) and cosine_warmup(10, 10, 10) == 1.0
    optimizer = torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))], "lr": 1.0}, {"params": [nn.Parameter(torch.zeros(1))], "lr": 0.1}])
    scheduler = schedule(optimizer, 2, 4)
    for _ in range(3):
        optimizer.step(), scheduler.step()
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.5, 0.05])
    with pytest.raises(ValueError, match="warm-up"):
        schedule(optimizer, 5, 4)


def test_table_shows_every_group():
    model = Model(TokenEncoder(5, 4), SequenceModel(4, 1, lambda i: S4Block(4, d_state=4)), Decoder(4, 3))
    groups = param_groups(model, 0.01, 0.05)
    assert group_table(groups).count("\n") == len(groups) and "kernel.inv_dt" in group_table(groups)
