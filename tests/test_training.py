"""Runs from Experiment to record, in a temporary folder: seeds, checkpoints, the best epoch, failures."""
import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from s4nb.training.experiments import EXPERIMENTS, experiment
from s4nb.training.fit import Loaders, build, run, summary, trim_memory
from s4nb.training.optimization import param_groups
from s4nb.training.record import load_card, load_rows
from s4nb.training.task import NonFiniteLoss, require_finite, set_length


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("training")


def small(place, *more, name="run"):
    "A demo of one narrow layer on a few expressions."
    return experiment("listops-mini", "dataset.sizes=[96,40,40]", f"dataset.data_dir={place}/data", "model.d_model=8", "model.n_layers=1",
                      "trainer.max_epochs=2", "trainer.limit_train_batches=1.0", "trainer.threads=1", "trainer.progress=false", f"output_dir={place}/{name}", *more)


def without_times(rows):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def test_overfits_a_tiny_batch(place):
    data, model = build(small(place, "model.d_model=16"))
    x, y, lengths, _ = next(iter(data.loader("train", 16)))
    optimizer = torch.optim.AdamW(param_groups(model, 0.01, 0.0))
    for _ in range(80):
        loss = nn.functional.cross_entropy(model(x, lengths), y)
        optimizer.zero_grad(), loss.backward(), optimizer.step()
    assert (model(x, lengths).argmax(-1) == y).all() and loss < 0.1


def test_the_record_of_a_run_and_the_same_seed_again(place):
    e = small(place, "scheduler.warmup=2", name="same")
    a, b = run(e), run(e)
    first, second = place / "same", place / "same-2"
    assert b["folder"] == str(second) and a["folder"] == str(first)
    assert without_times(load_rows(first / "metrics.csv")) == without_times(load_rows(second / "metrics.csv"))
    assert a["test_loss"] == b["test_loss"] and a["test_accuracy"] == b["test_accuracy"]
    other = run(dataclasses.replace(e, seed=1))
    assert other["test_loss"] != a["test_loss"]

    card = load_card(first)
    rows = load_rows(first / "metrics.csv")
    assert card["state"] == "measured" and card["epochs"] == len(rows) == 2 and card["steps"] == rows[-1]["step"]
    assert card["config"] == json.loads(json.dumps(dataclasses.asdict(e))) and card["seed"] == 0
    assert rows[-1]["lr"] == pytest.approx(0.0, abs=1e-12) and card["wall_seconds"] > 0
    assert card["best_epoch"]["val/accuracy"] == max(row["val/accuracy"] for row in rows)
    assert (first / "curve.png").read_bytes()[:4] == b"\x89PNG" and "d_model: 8" in (first / "config.yaml").read_text()
    assert f"{100 * card['test_accuracy']:.2f} %" in summary(a) and "majority class" in summary(a)


def test_checkpoint_is_plain_and_gives_the_test_accuracy_of_the_card(place):
    e = small(place, name="checked")
    card = run(e)
    saved = torch.load(place / "checked" / "checkpoints" / "best.ckpt", weights_only=True)
    assert saved["epoch"] + 1 == card["best_epoch"]["epoch"] and (place / "checked" / "checkpoints" / "last.ckpt").exists()
    data, model = build(e)
    weights = {name.removeprefix("model."): value for name, value in saved["state_dict"].items() if name.startswith("model.")}
    model.load_state_dict(weights)
    model.eval()
    with torch.no_grad():
        right = [int(model(x[None], torch.tensor([len(x)])).argmax()) == y for x, y in data.test]
    assert card["test_accuracy"] == pytest.approx(sum(right) / len(right), abs=1e-6)
    counts = torch.bincount(data.test.labels)
    assert card["chance"]["score"] == pytest.approx(counts.max().item() / len(right))
    assert not any(data.l_max in value.shape for value in weights.values())


def test_evaluation_sees_every_example_once(place):
    e = small(place)
    data, _ = build(e)
    loaders = Loaders(e, data)
    for split, loader in (("train", loaders.train_dataloader()), ("val", loaders.val_dataloader()[0]), ("test", loaders.test_dataloader()[0])):
        labels = torch.cat([batch.y for batch in loader])  # 96 = 3 · 32 for training: nothing is dropped
        assert torch.equal(labels.sort().values, getattr(data, split).labels.sort().values)


def test_a_run_that_is_cut_is_partial(place):
    card = run(small(place, "trainer.max_time=00:00:00:00", name="cut"))
    assert card["state"] == "partial" and load_card(place / "cut")["state"] == "partial"
    assert "test_accuracy" not in card and "no result" in summary(card)
    assert run(small(place, "trainer.limit_test_batches=1", name="cut"))["state"] == "partial"


def test_a_loss_that_is_not_a_number_stops_and_is_named(place):
    e = small(place, name="bad")
    data, model = build(e)
    model.backbone.layers[0].layer.kernel.B.data[0] = float("inf")
    with pytest.raises(NonFiniteLoss, match=r"step 0, batch 0: the first bad parameter is backbone.layers.0.layer.kernel.B\."):
        run(e, built=(data, model))
    card = load_card(place / "bad")
    assert card["state"] == "failed" and "kernel.B" in card["error"] and "test_accuracy" not in card
    with pytest.raises(NonFiniteLoss, match="step 7, batch 3: all parameters are finite"):
        require_finite(torch.tensor(float("inf")), nn.Linear(2, 2), 7, 3)


def test_kernels_learn_the_length_of_the_task_once(place):
    _, model = build(small(place, "model.n_layers=2"))
    assert [block.layer.kernel.l_kernel for block in model.backbone.layers] == [257, 257]
    assert set_length(model, 100) == 0
    _, diagonal = build(small(place, "model/layer=s4d"))
    assert set_length(diagonal, 100) == 0


@pytest.mark.parametrize("layer", ["s4", "s4d", "lssl"])
def test_every_layer_trains(place, layer):
    card = run(small(place, f"model/layer={layer}", "trainer.max_epochs=1", name=layer))
    assert card["state"] == "measured" and card["steps"] > 0


def test_a_layer_of_your_own(place, monkeypatch):
    (place / "my_layers.py").write_text(
        "from s4nb.s4.block import S4D\n\n\ndef Twice(d_model, copies):\n    return S4D(d_model, d_state=copies)\n")
    monkeypatch.syspath_prepend(place)
    _, model = build(small(place, "model/layer=custom", "model.layer.target=my_layers.Twice", "+model.layer.arguments.copies=6"))
    assert model.backbone.layers[0].layer.kernel.d_state == 6
    with pytest.raises(ValueError, match="my_layers.Thrice"):
        build(small(place, "model/layer=custom", "model.layer.target=my_layers.Thrice"))


def test_lra_listops_is_the_row_of_the_specification():
    e = EXPERIMENTS["lra-listops"]
    m, s = e.model, e.model.layer
    assert (m.n_layers, m.d_model, s.d_state, s.n_ssm, s.bidirectional) == (6, 256, 4, 1, True)
    assert (s.dt_min, s.dt_max, s.lr, s.final_act) == (0.001, 0.1, {"dt": None, "A": 1e-3, "B": 1e-3, "C": None}, "glu")
    assert (s.mode, s.init, s.rank, s.dt_transform, s.channels, s.activation) == ("dplr", "legs", 1, "softplus", 1, "gelu")
    assert (m.norm, m.prenorm, m.dropout, m.decoder, m.residual) == ("batch", False, 0.0, "pool", "R")
    assert (e.dataset.batch_size, e.trainer.max_epochs, e.optimizer.lr, e.optimizer.weight_decay) == (32, 40, 0.01, 0.05)
    assert (e.scheduler.warmup, e.scheduler.total, e.seed) == (12000, 120000, 3333)
    assert e.dataset.build().l_max == 2048 and e.dataset.sizes == [96000, 2000, 2000]


def test_small_numbers_count_as_zero_only_while_a_run_lasts(place):
    "In training they only cost time; the eigenvectors of a kernel need them."
    tiny, seen = torch.tensor([1e-310], dtype=torch.double), []
    e = small(place, "trainer.max_epochs=1", name="tiny")
    data, model = build(e)
    model.register_forward_hook(lambda *_: seen.append((tiny * 1).item()))
    assert (tiny * 1).item() > 0
    run(e, built=(data, model))
    assert seen and set(seen) == {0.0} and (tiny * 1).item() > 0


def test_less_than_an_epoch_is_tested_at_its_end(place):
    card = run(small(place, "trainer.max_steps=1", name="short"))
    assert card["state"] == "partial" and card["steps"] == card["epochs"] == 1
    assert 0 <= card["test_accuracy"] <= 1 and card["best_epoch"]["rule"] == "the last weights: no epoch was validated"
    assert "no epoch was validated" in summary(card)


def test_freed_memory_is_given_back():
    if sys.platform != "linux": pytest.skip("malloc_trim is glibc's")
    def resident(): return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6
    blocks = [torch.ones(20_000) for _ in range(2000)]
    full = resident()
    del blocks[:-1]                                                      # the last lies above the others: without it the heap shrinks by itself
    trim_memory()
    assert full - resident() > 100 and blocks[0].sum() == 20_000
