"""The dataclasses of an experiment: each builds what it says, each option arrives, and what cannot be is refused."""
import dataclasses
import shutil

import pytest
import torch

from s4nb.data.base import DataModule
from s4nb.data.next_step import NextStep
from s4nb.data.tasks import TASKS, OwnData, task
from s4nb.models.coders import PairDecoder, Positions, StateDecoder
from s4nb.training.architectures import (CELLS, AttentionLayer, CustomLayer, Facts, LSSLLayer, Picture, ResNet, RNNLayer, S4DLayer, S4Layer,
                                         SaShiMiBackbone, SequenceBackbone, WaveGAN)
from s4nb.ssm.layer import SSMLayer
from s4nb.training.configs import (GROUPS, SGD, AdamW, Callbacks, Constant, CosineEpochs, CosineWarmup, Experiment, Plateau, RMSprop, Train,
                                   Trainer)
from s4nb.training.datasets import DATASETS, CustomData, NextStepData
from s4nb.training.datasets import Data as DataBase
from s4nb.training.experiments import experiment
from s4nb.training.fit import build, run

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


@pytest.mark.parametrize("make,message", [
    (lambda: SequenceBackbone(d_model=0), "model.d_model is a whole number at least 1, got 0"),
    (lambda: SequenceBackbone(d_model=None), "model.d_model is a whole number"),
    (lambda: SequenceBackbone(n_layers="4"), "model.n_layers is a whole number at least 1, got '4'"),
    (lambda: SequenceBackbone(dropout=1.0), "model.dropout is a number at least 0 and below 1"),
    (lambda: SequenceBackbone(ff=0.0), "model.ff is a number above 0"),
    (lambda: SaShiMiBackbone(pool=[4, 0]), r"model.pool.1 is a whole number at least 1, got 0"),
    (lambda: S4Layer(lr={"A": -1e-3}), "model.layer.lr.A is a number at least 0"),
    (lambda: S4DLayer(wd={"C": float("nan")}), "model.layer.wd.C is a number at least 0, got nan"),
    (lambda: S4Layer(channels=0), "model.layer.channels"), (lambda: LSSLLayer(lr=-1.0), "model.layer.lr is a number"),
    (lambda: RNNLayer("legs", memory_order=0), "model.layer.memory_order"), (lambda: AttentionLayer(n_heads=0), "model.layer.n_heads"),
    (lambda: DataBase(batch_size=0), "dataset.batch_size is a whole number at least 1"), (lambda: DataBase(bucket=0), "dataset.bucket"),
    (lambda: DataBase(workers=-1), "dataset.workers"), (lambda: DataBase(rates=[]), "one rate or more, each once"),
    (lambda: DataBase(rates=[1, 1]), "one rate or more, each once"), (lambda: DataBase(rates=[1, 0]), "dataset.rates.1 is a whole number"),
    (lambda: AdamW(lr=0.0), "optimizer.lr is a number above 0"), (lambda: AdamW(betas=[0.9]), "optimizer.betas are two numbers"),
    (lambda: AdamW(betas=[0.9, 1.0]), "optimizer.betas.1"), (lambda: AdamW(weight_decay=-1.0), "optimizer.weight_decay"),
    (lambda: SGD(momentum=-1.0), "optimizer.momentum"), (lambda: RMSprop(alpha=2.0), "optimizer.alpha"),
    (lambda: CosineWarmup(warmup=-1), "scheduler.warmup"), (lambda: CosineWarmup(total=0), "scheduler.total"),
    (lambda: Plateau(factor=1.0), "scheduler.factor"), (lambda: Plateau(patience=-1), "scheduler.patience"),
    (lambda: Callbacks(ema=1.0), "callbacks.ema"), (lambda: Callbacks(ema=0.9, swa=0.5), "two averages of one model"),
    (lambda: Callbacks(early_stopping=0), "callbacks.early_stopping"), (lambda: Trainer(max_epochs=0), "trainer.max_epochs"),
    (lambda: Trainer(max_steps=-5), "trainer.max_steps"), (lambda: Trainer(max_epochs=-1), "a run without end"),
    (lambda: Trainer(limit_train_batches=0), "trainer.limit_train_batches is a number of batches"),
    (lambda: Trainer(limit_val_batches=1.5), "share of them"), (lambda: Trainer(limit_test_batches="x"), "share of them, got 'x'|got 'x'"),
    (lambda: Trainer(precision="bf17"), "unknown trainer.precision 'bf17'"), (lambda: Trainer(matmul="exact"), "unknown trainer.matmul 'exact'"),
    (lambda: Trainer(gradient_clip_val=-1.0), "gradient_clip_val"),
    (lambda: Trainer(gradient_clip_algorithm="hard"), "gradient_clip_algorithm"), (lambda: Trainer(threads=0), "trainer.threads"),
    (lambda: Trainer(accumulate_grad_batches=0), "accumulate_grad_batches"), (lambda: Trainer(check_val_every_n_epoch=0), "check_val_every"),
    (lambda: Train(chunk=0), "train.chunk"), (lambda: Train(context=-1), "train.context"), (lambda: Train(checkpoint_minutes=-1), "minutes"),
    (lambda: Experiment(seed=-1), "Experiment.seed")])
def test_numbers_that_cannot_be_are_refused_at_once(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_ends_of_ranges_and_null_are_allowed():
    SequenceBackbone(dropout=0, ff=None, d_model=1), Callbacks(ema=None, swa=0.0), Trainer(max_epochs=-1, max_steps=1, limit_val_batches=1)
    S4Layer(lr={"A": 0.0, "B": None}), CosineWarmup(warmup=0, total=None), AdamW(betas=[0.0, 0.5]), Train(checkpoint_minutes=0)


COPYING = ("copying", "dataset.sizes=[8,4,4]", "dataset.l_memorize=12", "dataset.n_tokens=8", "dataset.batch_size=4",
           "model.d_model=8", "model.n_layers=1", "model.layer.d_state=8", "trainer.accelerator=cpu", "trainer.devices=1",
           "trainer.threads=1", "trainer.progress=false", "trainer.max_epochs=1")


@pytest.mark.parametrize("override,message", [
    ("train.monitor=val/acuracy", "copying is a classification, which has no val/acuracy: train.monitor is one of .*val/accuracy"),
    ("train.monitor=test/accuracy", "which has no test/accuracy"), ("train.metrics=[mse]", "'mse' is not for a classification"),
    ("train.loss=hinge", "unknown train.loss 'hinge'"), ("model.layer.dt_max=0.001", "0 < dt_min <= dt_max"),
    ("model.layer.n_ssm=3", "must divide d_model=8"), ("dataset.rates=[1,2]", "tokens have no other sampling rate"),
    ("callbacks.stages=[{resolution:2,epochs:1}]", "tokens have no other sampling rate"),
    ("callbacks.stages=[{resolution:2}]", "needs resolution and epochs"),
    ("scheduler.warmup=-1", "scheduler.warmup is a whole number"), ("trainer.max_time=soon", "DD:HH:MM:SS"),
    ("trainer.devices=0", "trainer: .*devices=0"), ("trainer.devices=-2", "trainer: .*devices"), ("trainer.accelerator=abacus", "abacus"),
    ("trainer.strategy=dpd", "dpd"), ("trainer.accumulate_grad_batches=3", "multiple of 3")])
def test_what_does_not_go_together_ends_before_the_data_are_read(override, message, monkeypatch):
    monkeypatch.setattr(DataModule, "prepare", lambda self: pytest.fail("the data were prepared"))
    with pytest.raises(ValueError, match=message):
        build(experiment(*COPYING, override))


@pytest.mark.parametrize("matmul, after", [("null", "medium"), ("highest", "highest"), ("high", "high")])
def test_exactness_of_matrix_products(matmul, after):
    "As the experiment says, and without a word what torch was told before."
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        build(experiment(*COPYING, f"trainer.matmul={matmul}"))
        assert torch.get_float32_matmul_precision() == after
    finally: torch.set_float32_matmul_precision(before)


def test_a_text_without_vocabulary_is_rehearsed_too(monkeypatch):
    monkeypatch.setattr(DATASETS["reviews"].build().__class__, "prepare", lambda self: pytest.fail("the data were prepared"))
    with pytest.raises(ValueError, match="needs images as real values"):
        build(experiment("reviews", "model=resnet"))
    with pytest.raises(ValueError, match="model.decoder=all answers each step"):
        build(experiment("reviews", "model.decoder=all"))


@pytest.mark.parametrize("changes", [
    ("model/layer=lssl",), ("model/layer=s4d", "optimizer=sgd", "scheduler=plateau"), ("callbacks.ema=0.99", "scheduler=linear"),
    ("optimizer=lamb", "callbacks.swa=0.5"), ("train.monitor=val/accuracy", "trainer.accumulate_grad_batches=2")])
def test_choices_that_go_together_run(changes, tmp_path):
    card = run(experiment(*COPYING, *changes, f"output_dir={tmp_path}/run"))
    assert (card["steps"], card["state"]) == (2, "measured") and card["test_loss"] < 10


def test_a_model_without_its_layer_is_asked_for_one():
    with pytest.raises(ValueError, match="this model needs a layer: add model/layer=NAME, one of s4, "):
        experiment("lra-pathx-resnet", "model=sequence")
    assert experiment("lra-pathx-resnet", "model=sequence", "model/layer=s4d").model.layer == S4DLayer()
    with pytest.raises(ValueError, match="model.layer.target has no value here: add model.layer.target="):
        experiment("copying", "model/layer=custom")


@pytest.mark.parametrize("layer", ["s4", "s4d"])
def test_in_16_bits_the_kernels_stay_in_32(layer, tmp_path, monkeypatch):
    seen = {"u": set(), "K * u": set(), "linear": set()}
    convolve, linear = SSMLayer.convolve, torch.nn.Linear.forward

    def spy(self, u, *args, **options):
        y = convolve(self, u, *args, **options)
        seen["u"].add(u.dtype), seen["K * u"].add(y.dtype)
        return y

    def linear_spy(self, x):
        y = linear(self, x)
        seen["linear"].add(y.dtype)
        return y
    monkeypatch.setattr(SSMLayer, "convolve", spy)
    monkeypatch.setattr(torch.nn.Linear, "forward", linear_spy)
    card = run(experiment(*COPYING, f"model/layer={layer}", "trainer.precision=bf16-mixed", f"output_dir={tmp_path}/run"))
    assert card["state"] == "measured" and card["test_loss"] < 10
    assert seen["u"] == seen["K * u"] == {torch.float32} and seen["linear"] == {torch.bfloat16}


@pytest.mark.stress
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs g++")
@pytest.mark.parametrize("layer", ["s4", "s4d"])
def test_a_compiled_model_takes_the_same_steps(layer, tmp_path):
    common = (*COPYING, f"model/layer={layer}", "trainer.max_steps=2")
    plain, compiled = (run(experiment(*common, f"trainer.compile={on}", f"output_dir={tmp_path}/{on}")) for on in ("false", "true"))
    assert compiled["state"] == "measured" and compiled["test_loss"] == pytest.approx(plain["test_loss"], rel=1e-4)
