"""The dataclasses of an experiment: each builds what it says, each option arrives, and what cannot be is refused."""
import dataclasses

import pytest
import torch

from s4nb.data.next_step import NextStep
from s4nb.data.tasks import TASKS, OwnData, task
from s4nb.models.coders import PairDecoder, Positions, StateDecoder
from s4nb.training.architectures import (CELLS, AttentionLayer, CustomLayer, Facts, LSSLLayer, Picture, ResNet, RNNLayer, S4DLayer, S4Layer,
                                         SaShiMiBackbone, SequenceBackbone, WaveGAN)
from s4nb.training.configs import GROUPS, Constant, CosineEpochs, CosineWarmup, Plateau, Train
from s4nb.training.datasets import DATASETS, CustomData, NextStepData

TOKENS = Facts("classification", 20, None, 5, l_max=32)
SIGNAL = Facts("classification", None, 3, 5, l_max=64)


def test_a_choice_is_a_dataclass_whose_copy_equals_it():
    for options in GROUPS.values():
        for name, option in options.items():
            assert dataclasses.is_dataclass(option) and type(option).__doc__, name
            assert dataclasses.replace(option) == option and option is not dataclasses.replace(option)


@pytest.mark.parametrize("name", [name for name in GROUPS["model/layer"] if name != "custom"])
def test_every_layer_trains_on_tokens_and_signals(name):
    torch.manual_seed(0)
    for facts, x in ((TOKENS, torch.randint(20, (3, 32))), (SIGNAL, torch.randn(3, 64, 3))):
        model = SequenceBackbone(layer=GROUPS["model/layer"][name], d_model=16, n_layers=2, dropout=0.1, norm="batch").build(facts)
        loss = model(x).square().mean()
        loss.backward()
        assert model(x).shape == (3, 5) and torch.isfinite(loss)
        assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name,options", [
    ("s4", {"d_state": 6, "rank": 2, "n_ssm": 4, "channels": 2, "bidirectional": True, "init": "fourier"}),
    ("s4d", {"d_state": 6, "init": "diag-inv", "deterministic": True, "bandlimit": 0.5, "real_transform": "relu"})])
def test_options_reach_the_kernel(name, options):
    layer = dataclasses.replace(GROUPS["model/layer"][name], **options).build(8)
    kernel = layer.kernel
    assert kernel.d_state == 6 and kernel.n_ssm == options.get("n_ssm", 1)
    for key in ("init", "bandlimit", "deterministic", "real_transform"):
        if key in options:
            assert getattr(kernel.options, key) == options[key]
    assert kernel.channels == options.get("channels", 1) * (2 if options.get("bidirectional") else 1)


def test_learning_rates_of_a_layer():
    rates = {"dt": 0.0, "A": 1e-4, "B": None, "C": 3e-3}
    kernel = S4Layer(lr=rates).build(4).kernel
    assert "inv_dt" not in dict(kernel.named_parameters())  # frozen
    assert kernel.param_options["A_real"]["lr"] == 1e-4 and kernel.param_options["C"]["lr"] == 3e-3
    assert "lr" not in kernel.param_options["B"]
    kernel = LSSLLayer(lr=None).build(4).kernel
    assert all("lr" not in options for options in kernel.param_options.values())


def test_recurrent_cells_take_a_memory_order():
    for cell in CELLS:
        assert RNNLayer(cell).build(4)(torch.randn(2, 5, 4))[0].shape == (2, 5, 4)
    assert RNNLayer("legs", memory_order=7).build(4).cell.memory.N == 7
    with pytest.raises(ValueError, match="gru has no memory_order; that is for legs"):
        RNNLayer("gru", memory_order=7).build(4)
    with pytest.raises(ValueError, match="did you mean 'legs'"):
        RNNLayer("leggs").build(4)


def test_a_transformer_is_attention_with_positions_and_ff():
    model = SequenceBackbone(layer=AttentionLayer(n_heads=2), d_model=8, n_layers=3, ff=2, position="learned").build(TOKENS)
    assert len(model.backbone.layers) == 6 and isinstance(model.encoder[1], Positions) and model.encoder[1].pe.shape == (1, 32, 8)
    torch.manual_seed(0)
    x = torch.randint(20, (1, 32))
    assert not torch.allclose(model(x), model(x.flip(1)), atol=1e-4)  # without positions both would be equal
    blind = SequenceBackbone(layer=AttentionLayer(n_heads=2), d_model=8, n_layers=1).build(TOKENS)
    assert torch.allclose(blind(x), blind(x.flip(1)), atol=1e-5)


def test_decoders_follow_from_the_facts():
    pairs = dataclasses.replace(TOKENS, pairs=True)
    assert isinstance(SequenceBackbone(layer=S4DLayer(), d_model=8).build(pairs).decoder, PairDecoder)
    state = SequenceBackbone(layer=S4DLayer(d_state=4), d_model=8, n_layers=1, decoder="state").build(TOKENS)
    assert isinstance(state.decoder, StateDecoder) and state(torch.randint(20, (2, 9))).shape == (2, 5)
    steps = dataclasses.replace(SIGNAL, l_output=10)
    assert SequenceBackbone(layer=S4DLayer(), d_model=8, decoder="last").build(steps)(torch.randn(2, 64, 3)).shape == (2, 10, 5)
    for mode in ("pool", "last", "first", "sum"):
        assert SequenceBackbone(layer=S4DLayer(), d_model=8, decoder=mode).build(TOKENS)(torch.randint(20, (2, 9))).shape == (2, 5)


def test_hourglasses_and_baselines():
    x = torch.randn(2, 64, 3)
    for unet in (False, True):
        model = SaShiMiBackbone(layer=S4DLayer(d_state=4), d_model=4, n_layers=1, pool=[2, 4], unet=unet).build(SIGNAL)
        assert model(x).shape == (2, 5)
    network = ResNet(depth=18).build(SIGNAL)
    assert network.eval()(x).shape == (2, 5) and network.network.conv1.in_channels == 3
    with pytest.raises(ValueError, match="square pictures"):
        network(torch.randn(2, 60, 3))
    with pytest.raises(ValueError, match="needs images as real values"):
        ResNet().build(TOKENS)
    with pytest.raises(ValueError, match="did you mean|allowed: 18, 34, 50"):
        ResNet(depth=19).build(SIGNAL)
    assert WaveGAN(channels=4, n_layers=2).build(SIGNAL)(x, torch.tensor([64, 20]), rate=2.0).shape == (2, 5)
    with pytest.raises(ValueError, match="needs a signal"):
        WaveGAN().build(TOKENS)


def test_a_picture_is_folded_row_by_row():
    image = Picture(torch.nn.Identity())(torch.arange(192.0).view(1, 64, 3))
    assert image.shape == (1, 3, 8, 8) and torch.equal(image[0, 2, 1], 3 * torch.arange(8.0, 16.0) + 2)


@pytest.mark.parametrize("field,value", [("norm", "bath"), ("residual", "Q"), ("position", "sine"), ("decoder", "mean")])
def test_a_backbone_refuses_what_does_not_exist(field, value):
    with pytest.raises(ValueError, match=f"unknown model.{field} '{value}'"):
        SequenceBackbone(**{field: value})


def test_facts_are_those_of_the_data():
    data = task("delay", l_seq=50, l_lag=10, dt=0.02, freq=10.0, sizes=(4, 2, 2))
    assert Facts.of(data) == Facts("regression", None, 1, 1, 50, 50, False)
    assert Facts.of(task("listops-mini")) == Facts("classification", 18, None, 10, 257, None, False)


def test_every_task_has_a_dataset_of_its_name():
    assert set(TASKS) < set(DATASETS)
    copying = dataclasses.replace(DATASETS["copying"], l_memorize=5, n_tokens=7).build()
    assert copying.train[0][0].shape == (10,) and copying.n_tokens == 7
    nexts = NextStepData(of="listops-mini", batch_size=4).build()
    assert isinstance(nexts, NextStep)


def test_data_of_your_own(tmp_path, monkeypatch):
    (tmp_path / "my_data.py").write_text(
        "import torch\nfrom s4nb.data.tasks import OwnData\n\n\ndef noise(n):\n"
        "    g = torch.Generator().manual_seed(0)\n"
        "    return OwnData([(torch.randn(12, 2, generator=g), i % 3) for i in range(n)])\n")
    monkeypatch.syspath_prepend(tmp_path)
    data = CustomData(target="my_data.noise", arguments={"n": 30}).build()
    assert isinstance(data, OwnData) and Facts.of(data) == Facts("classification", None, 2, 3, 12, None, False)
    with pytest.raises(ValueError, match="dataset.target=my_data.nose cannot be imported"):
        CustomData(target="my_data.nose").build()
    with pytest.raises(ValueError, match="model.layer.target=nothing cannot be imported"):
        CustomLayer(target="nothing").build(4)


def test_schedules_that_need_more_than_a_step():
    optimizer = torch.optim.SGD([{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (0.01, 0.001)])
    made = CosineEpochs(t_initial=40, warmup_t=40, warmup_lr=1e-6, lr_min=1e-5).build(optimizer, 1000)
    assert made["interval"] == "epoch"
    optimizer.step(), made["scheduler"].step()
    rates = [group["lr"] for group in optimizer.param_groups]
    assert rates == pytest.approx([1e-6 + (0.01 - 1e-6) / 40, 1e-6 + (0.001 - 1e-6) / 40], rel=1e-12)
    plateau = Plateau(patience=3).build(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0), 10, Train(monitor="val/loss"))
    assert plateau["monitor"] == "val/loss" and plateau["scheduler"].mode == "min" and plateau["scheduler"].patience == 3
    assert Constant().build(optimizer, 10) is None
    short = CosineWarmup(warmup=50).build(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0), 10)  # longer than the run
    assert short["interval"] == "step"


def test_the_monitor_says_which_way_is_up():
    assert Train().mode == "max" and Train(monitor="val/loss").mode == "min" and Train(monitor="val/f1").mode == "max"
