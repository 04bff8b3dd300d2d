"""Callbacks beyond what notebook 60 shows: odd moments of a run, real checkpoints, every option of the configuration."""
import copy
import logging
import math
import warnings
from functools import partial
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader

from s4nb.data.base import Batch, pad_batch
from s4nb.models.backbone import BatchNorm, SequenceModel
from s4nb.models.coders import Decoder, LinearEncoder, Model
from s4nb.s4.block import S4Block
from s4nb.training.callbacks import (Averaging, Norms, ParamsLog, Resizing, Stage, StepTimer, averaged_tensors,
                                     callbacks_of, count_parameters, observe, read_stages, set_bandlimit, snapshot,
                                     stage_at)
from s4nb.training.configs import Callbacks
from s4nb.training.task import Task

FACTS = SimpleNamespace(kind="regression", d_output=1)


@pytest.fixture(autouse=True)
def quiet():
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Net(nn.Module):
    def __init__(self, norm=nn.Identity):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 4), norm(4), nn.Dropout(0.2), nn.Linear(4, 1))

    def forward(self, x, lengths=None, rate=1.0):
        return self.layers(x).mean(1)


def items(n=16, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 6, 2, generator=g)
    return list(zip(x, x[..., :1].sum(1)))


def task_of(net=Net, lr=0.1, **given):
    torch.manual_seed(0)
    return Task(net if isinstance(net, nn.Module) else net(), FACTS, lambda m: torch.optim.SGD(m.parameters(), lr), **given)


def trainer_of(callbacks, epochs=2, **given):
    quiet = dict(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
                 enable_model_summary=False, num_sanity_val_steps=0)
    return L.Trainer(max_epochs=epochs, callbacks=callbacks, **quiet | given)


def loaders():
    return [DataLoader(items(seed=seed), 4, collate_fn=pad_batch) for seed in (0, 1)]


class Weights(L.Callback):
    "A copy of all parameters after every training step."

    def __init__(self): self.seen = []

    def on_train_batch_end(self, trainer, module, *rest):
        self.seen.append({name: p.detach().clone() for name, p in module.named_parameters()})


# ---- averages --------------------------------------------------------------------------------------------------------
def test_averages_count_optimiser_steps_not_batches():
    task, average, weights = task_of(), Averaging(), Weights()
    trainer_of([average, weights], accumulate_grad_batches=2).fit(task, *loaders())
    stepped = weights.seen[1::2]  # 8 batches, 4 steps
    assert average.n == len(stepped) == 4
    for name, p in task.named_parameters():
        assert torch.allclose(p, torch.stack([w[name] for w in stepped]).mean(0), atol=1e-7)


def test_a_tied_parameter_is_averaged_once_and_stays_tied():
    class Tied(Net):
        def __init__(self):
            super().__init__()
            self.again = self.layers[0]

    task, average, weights = task_of(Tied), Averaging(0.7), Weights()
    trainer_of([average, weights]).fit(task, *loaders())
    a = weights.seen[0]["model.layers.0.weight"]
    for n, w in enumerate(weights.seen[1:], 1):
        a = a + max(1 / (n + 1), 0.3) * (w["model.layers.0.weight"] - a)
    assert task.model.again is task.model.layers[0] and torch.allclose(task.model.again.weight, a, atol=1e-6)


def test_an_error_within_validation_leaves_the_weights_to_continue_from():
    class Fail(Weights):
        def on_validation_batch_start(self, trainer, module, *rest): raise KeyError("disk gone")

    task, average, weights = task_of(), Averaging(), Fail()
    with pytest.raises(KeyError):
        trainer_of([average, weights]).fit(task, *loaders())
    assert average.n == 4 and average.raw is None
    assert all(torch.equal(p, weights.seen[-1][name]) for name, p in task.named_parameters())


def test_a_checkpoint_written_within_validation_holds_both_weights(tmp_path):
    class Save(Weights):
        def on_validation_batch_start(self, trainer, module, batch, index, *rest):
            if index == 1: trainer.save_checkpoint(tmp_path / f"{trainer.current_epoch}.ckpt")

        def on_train_epoch_end(self, trainer, module):
            trainer.save_checkpoint(tmp_path / f"{trainer.current_epoch}-end.ckpt")

    trainer_of([Averaging(0.5), Save()]).fit(task_of(), *loaders())
    for epoch in (0, 1):
        a, b = (torch.load(tmp_path / f"{epoch}{end}.ckpt", weights_only=True) for end in ("", "-end"))
        for name, raw in a["averaging"]["raw"].items():
            assert torch.equal(raw, b["averaging"]["raw"][name])
            assert torch.equal(a["state_dict"][name], b["state_dict"][name])
            assert not torch.equal(a["state_dict"][name], raw)


def test_the_best_epoch_is_tested_with_the_average_of_that_epoch(tmp_path):
    best = ModelCheckpoint(tmp_path, "best", monitor="val/loss", mode="max")  # the worst epoch: not the last
    seen = []

    class See(L.Callback):
        def on_test_epoch_end(self, trainer, module): seen.append(module.model.layers[0].weight.clone())

    task, trainer = task_of(lr=0.02), trainer_of([Averaging(0.9), See(), best], epochs=3, enable_checkpointing=True)
    trainer.fit(task, *loaders())
    final = task.model.layers[0].weight.clone()
    tested = trainer.test(task, loaders()[1], ckpt_path="best", verbose=False, weights_only=True)[0]
    saved = torch.load(best.best_model_path, weights_only=True)
    assert saved["epoch"] == 0 and torch.equal(seen[0], saved["state_dict"]["model.layers.0.weight"])
    assert not torch.equal(seen[0], final)
    assert tested["test/loss"] == pytest.approx(best.best_model_score.item(), rel=1e-6)  # validated and tested alike
    fresh = task_of()  # and without any callback
    assert trainer_of([]).test(fresh, loaders()[1], ckpt_path=best.best_model_path, verbose=False,
                               weights_only=True)[0]["test/loss"] == tested["test/loss"]


def test_training_goes_on_from_the_raw_weights_after_fit_and_validate():
    def run(*epochs):
        task, average, weights = task_of(partial(Net, BatchNorm)), Averaging(0.8), Weights()
        trainer = trainer_of([average, weights], epochs=epochs[0], inference_mode=False)
        for end in epochs:
            trainer.fit_loop.max_epochs = end
            trainer.fit(task, *loaders())
            trainer.validate(task, loaders()[1], verbose=False)
        return task, average

    (whole, a), (pieces, b) = run(4), run(2, 4)
    assert a.n == b.n == 16
    assert all(torch.equal(x, y) for x, y in zip(whole.model.state_dict().values(), pieces.model.state_dict().values()))


def test_a_run_without_an_average_can_be_continued_with_one(tmp_path):
    trainer = trainer_of([], epochs=1)
    trainer.fit(task_of(), *loaders())
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    task, average, weights = task_of(), Averaging(), Weights()
    trainer_of([average, weights]).fit(task, *loaders(), ckpt_path=tmp_path / "plain.ckpt", weights_only=True)
    assert average.n == len(weights.seen) == 4
    mean = torch.stack([w["model.layers.0.weight"] for w in weights.seen]).mean(0)
    assert torch.allclose(task.model.layers[0].weight, mean, atol=1e-7)


def test_a_share_of_an_endless_run_is_refused():
    with pytest.raises(ValueError, match="averaging from 50% of the run on needs the length of the run"):
        trainer_of([Averaging(start=0.5)], epochs=-1).fit(task_of(), *loaders())


@pytest.mark.parametrize("decay, start", [(0.0, 0.0), (1.0, 0.0), (-1, 0.0), (None, 1.0), (None, -0.1)])
def test_shares_and_decays_have_limits(decay, start):
    with pytest.raises(ValueError, match="averaging takes a decay"):
        Averaging(decay, start)


def test_frozen_weights_stay_the_same_bits():
    net = Net()
    net.layers[0].weight.requires_grad_(False)
    task, before = task_of(net), net.layers[0].weight.clone()
    trainer_of([Averaging(0.9)], epochs=3).fit(task, *loaders())
    assert torch.equal(task.model.layers[0].weight, before)


def test_observing_a_batch_draws_no_random_number_and_restores_the_modes():
    net = Net(BatchNorm)
    net.layers[0].eval()
    modes, state = [m.training for m in net.modules()], torch.get_rng_state()
    x = torch.randn(3, 5, 2, generator=torch.Generator().manual_seed(1))
    observe(net, Batch(x, None))
    assert [m.training for m in net.modules()] == modes and torch.equal(torch.get_rng_state(), state)
    flat = net.layers[0](x).flatten(0, 1)  # 0.9 · 0 + 0.1 · mean, 0.9 · 1 + 0.1 · var
    assert torch.allclose(net.layers[1].running_mean, 0.1 * flat.mean(0), atol=1e-6)
    assert torch.allclose(net.layers[1].running_var, 0.9 + 0.1 * flat.var(0), atol=1e-6)


def test_batch_norms_are_replaced_with_their_statistics_and_nothing_else():
    net = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), S4Block(4, d_state=4, lr={"A": 0.0}))
    names = set(averaged_tensors(net))
    parameters = {name for name, _ in net.named_parameters()}
    assert names - parameters == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    copied = snapshot(net)
    net[0].weight.data.zero_()
    assert copied["0.weight"].abs().max() > 0


# ---- progressive resizing --------------------------------------------------------------------------------------------
STAGES = [{"resolution": 4, "epochs": 2}, {"resolution": 2, "epochs": 3}, {"resolution": 1, "epochs": 1}]


def test_stage_at_agrees_with_the_list_of_all_epochs():
    written_out = [stage["resolution"] for stage in STAGES for _ in range(stage["epochs"])] + [1] * 4
    assert [stage_at(STAGES, epoch).resolution for epoch in range(10)] == written_out
    assert stage_at([{"resolution": 3, "epochs": 1, "bandlimit": None}], 7) == Stage(3, 1, None)


@pytest.mark.parametrize("stage, message", [
    ({}, "needs resolution and epochs"), ({"epochs": 1}, "needs resolution and epochs"),
    ({"resolution": 2, "epochs": 1, "scheduler": 3}, "has no others"),
    ({"resolution": "2", "epochs": 1}, "resolution is a whole number ≥ 1, got '2'"),
    ({"resolution": True, "epochs": 1}, "got True"), ({"resolution": 2, "epochs": 0}, "epochs is a whole number"),
    ({"resolution": 2, "epochs": 1, "bandlimit": -1}, "bandlimit is a positive number"),
    ({"resolution": 2, "epochs": 1, "bandlimit": math.nan}, "bandlimit is a positive number")])
def test_a_wrong_stage_is_named(stage, message):
    with pytest.raises(ValueError, match="stage 1.*" + message):
        read_stages([{"resolution": 2, "epochs": 1}, stage])


def test_a_stage_that_never_begins_is_refused_and_an_endless_run_is_not():
    with pytest.raises(ValueError, match="begins after 5 epochs, but the run has 5"):
        Resizing(STAGES, 5)
    assert len(read_stages(STAGES, -1)) == len(read_stages(STAGES, 6)) == len(read_stages(STAGES, None)) == 3


def s4d(**given):
    torch.manual_seed(0)
    return S4Block(4, d_state=16, mode="diag", dt_min=0.1, dt_max=0.3, **given)


@pytest.mark.parametrize("given", [{}, {"disc": "bilinear"}, {"disc": "dss"}, {"bidirectional": True}])
def test_a_bandlimit_set_is_a_bandlimit_built(given):
    u, a, b = torch.randn(2, 20, 4), s4d(**given).eval(), s4d(bandlimit=0.3, **given).eval()
    with torch.no_grad():
        assert not torch.equal(a(u)[0], b(u)[0])
        set_bandlimit(nn.ModuleList([a]), 0.3)
        assert torch.equal(a(u)[0], b(u)[0])


def test_a_bandlimit_needs_diagonal_kernels_only():
    for model in (nn.Linear(2, 2), S4Block(4, d_state=4), nn.ModuleList([s4d(), S4Block(4, d_state=4)])):
        with pytest.raises(ValueError, match="needs kernels of mode 'diag'"):
            set_bandlimit(model, 0.5)


def test_a_resized_run_follows_its_stages(tmp_path):
    stages = [stage | {"bandlimit": 1 / stage["resolution"]} for stage in STAGES]
    backbone = SequenceModel(4, 1, lambda i: s4d())
    seen, kernel = [], backbone.layers[0].layer.kernel

    class Data(L.LightningDataModule):
        def train_dataloader(self):
            rate = stage_at(stages, self.trainer.current_epoch).resolution
            return DataLoader(items(8), 4, collate_fn=partial(pad_batch, rate=rate))

    class See(L.Callback):
        def on_train_batch_start(self, trainer, module, batch, index):
            seen.append((trainer.current_epoch, batch.x.shape[1], batch.rate, kernel.options.bandlimit))

    task = task_of(Model(LinearEncoder(2, 4), backbone, Decoder(4, 1)))
    trainer_of([Resizing(stages, 7), See()], epochs=7, reload_dataloaders_every_n_epochs=1).fit(task, Data())
    lengths = {4: 2, 2: 3, 1: 6}  # of 6 steps
    expected = [(e, lengths[r], float(r), 1 / r) for e, r in enumerate([4, 4, 2, 2, 2, 1, 1]) for _ in range(2)]
    assert seen == expected


# ---- measurements ----------------------------------------------------------------------------------------------------
def test_a_timer_measures_pieces_of_an_epoch():
    clock = iter(range(10**6)).__next__
    trainer = trainer_of([StepTimer(clock)], val_check_interval=2)
    trainer.fit(task_of(), *loaders())
    logged = {name: float(value) for name, value in trainer.callback_metrics.items() if "timer" in name}
    assert logged["timer/step"] == logged["timer/inter_step"] == logged["timer/validation"] == 1
    assert logged["timer/epoch"] == 3 * 4 + 2 + 2 * 2 + 1  # steps, ways not cut by a validation, validations, the end


def test_a_timer_measures_real_seconds():
    trainer = trainer_of([StepTimer()])
    trainer.fit(task_of(), *loaders())
    t = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert 0 < 4 * t["timer/step"] + 3 * t["timer/inter_step"] + t["timer/validation"] < t["timer/epoch"] < 60


def test_parameters_are_counted_once_and_logged_at_the_start(tmp_path):
    net = Net()
    net.again, net.layers[0].bias.requires_grad = net.layers[0], False
    assert count_parameters(net) == {"params/total": 12 + 5, "params/trainable": 12 + 5 - 4, "params/fixed": 4}
    logger = CSVLogger(tmp_path, "", "")
    trainer = trainer_of([ParamsLog(), LearningRateMonitor()], logger=logger)
    trainer.fit(task_of(), *loaders())
    header, first, *_ = (tmp_path / "metrics.csv").read_text().splitlines()
    row = dict(zip(header.split(","), first.split(",")))
    assert row["params/total"] == row["params/trainable"] == "17" and row["params/fixed"] == "0"


def test_frozen_ssm_tensors_count_as_fixed():
    a, b = (count_parameters(s4d(lr=lr)) for lr in (None, 0.0))
    kernel = sum(p.numel() for name, p in s4d().named_parameters() if ".kernel." in f".{name}")
    assert a["params/total"] == b["params/total"] and b["params/fixed"] == kernel > 0


def test_norms_are_those_of_the_first_loader_and_of_valid_positions():
    torch.manual_seed(0)
    model = Model(LinearEncoder(2, 4), SequenceModel(4, 2, lambda i: s4d()), Decoder(4, 1))
    task = task_of(copy.deepcopy(model), lr=0.0, rates=(1, 2))
    ragged = [(x[:3 + i % 3], y) for i, (x, y) in enumerate(items())]
    val = [DataLoader(ragged, 4, collate_fn=partial(pad_batch, rate=rate)) for rate in (1, 2)]
    trainer = trainer_of([Norms()], epochs=1)
    trainer.fit(task, loaders()[0], val)
    batch = pad_batch(ragged[:4])
    with torch.no_grad():
        rows = [model.eval().encoder(x[:n]) for x, n in zip(batch.x, batch.lengths)]
        for i in range(3):
            if i: rows = [model.backbone.layers[i - 1](r[None])[0][0] for r in rows]
            expected = torch.cat(rows).square().mean()
            assert trainer.callback_metrics[f"norm/{i}"] == pytest.approx(expected.item(), rel=1e-5)


def test_norms_need_a_backbone_with_layers():
    with pytest.raises(ValueError, match="norms needs a backbone with layer_norms .* S4Block: set norms=False"):
        Norms().setup(None, task_of(Model(LinearEncoder(2, 4), s4d(), Decoder(4, 1))), "fit")


# ---- all of them -----------------------------------------------------------------------------------------------------
def test_the_configuration_names_every_callback():
    kinds = lambda **given: [type(c).__name__ for c in callbacks_of(Callbacks(**given), 10)][2:]
    assert [type(c).__name__ for c in callbacks_of(Callbacks())] == ["ParamsLog", "LearningRateMonitor"]
    assert kinds(ema=0.99) == kinds(swa=0.5) == kinds(swa=0.0) == ["Averaging"]
    assert kinds(stages=STAGES) == ["Resizing"] and kinds(early_stopping=3) == ["EarlyStopping"]
    assert kinds(timer=True, norms=True) == ["StepTimer", "Norms"]
    with pytest.raises(ValueError, match="ema=0.9 and callbacks.swa=0.5 are two averages"):
        callbacks_of(Callbacks(ema=0.9, swa=0.5))
    with pytest.raises(ValueError, match="begins after 5 epochs"):
        callbacks_of(Callbacks(stages=STAGES), 4)


@pytest.mark.parametrize("mode, epochs", [("min", 4), ("max", 10)])
def test_early_stopping_waits_as_told_and_knows_what_is_good(mode, epochs):
    stop = next(c for c in callbacks_of(Callbacks(early_stopping=3), 10, "val/score", mode)
                if isinstance(c, EarlyStopping))

    class Scored(Task):
        def on_validation_epoch_end(self): self.log("val/score", float(self.current_epoch))

    torch.manual_seed(0)
    task = Scored(Net(), FACTS, lambda m: torch.optim.SGD(m.parameters(), 0.1))
    trainer = trainer_of([stop], epochs=10)
    trainer.fit(task, *loaders())
    assert trainer.current_epoch == epochs
