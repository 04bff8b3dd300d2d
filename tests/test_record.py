"""The record of a run: cards, rows, blind guesses, curves, loggers and the report, against computations of their own."""
import math
import re
import shutil
import subprocess
import threading

import numpy as np
import pytest
import torch

from house import ROOT
from s4nb.data.base import DataModule
from s4nb.data.next_step import IGNORE
from s4nb.data.synthetic import Adding, Copying, Delay, Reconstruct
from s4nb.training import record as module
from s4nb.training.configs import Experiment
from s4nb.training.record import (Record, answers, blind, end_wandb, first_above_chance, learning_curve, load_card, load_rows, loggers, new_folder,
                                  save_card, save_curve, save_rows, wandb_id)
from s4nb.training.reports import BEGIN, END, report, write_report
from s4nb.training.tables import EXPERIMENTS


# ---- folder, card, rows ----------------------------------------------------------------------------------------------
def test_folders_of_runs_that_start_together_differ(tmp_path):
    found = []
    threads = [threading.Thread(target=lambda: found.append(new_folder(tmp_path, "a").name)) for _ in range(8)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert sorted(found) == sorted(["a", *(f"a-{i}" for i in range(2, 9))])


def test_a_card_is_whole_or_the_one_before(tmp_path):
    save_card(tmp_path, {"state": "partial"})
    with pytest.raises(TypeError):
        save_card(tmp_path, {"state": torch.nn})
    assert load_card(tmp_path) == {"state": "partial"} and [p.name for p in tmp_path.iterdir()] == ["card.json"]


@pytest.mark.parametrize("text", ["", "{\"state\": ", "[1]", "\x00"])
def test_what_is_no_card_is_named(tmp_path, text):
    (tmp_path / "card.json").write_text(text)
    with pytest.raises(ValueError, match=r"card\.json is no card: .*; restore it, or move its folder away"):
        load_card(tmp_path)


def test_pieces_add_up(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    first = Record(tmp_path, {"name": "toy", "seed": 3, "commit": "c1", "command": "one", "device": "cpu", "config": {}})
    assert load_card(tmp_path)["state"] == "partial" and first.card["wall_seconds"] == 0
    now[0] += 30
    first.update(epochs=1)
    now[0] += 500                                                       # killed: nothing tells of these
    second = Record(tmp_path, {"name": "toy", "seed": 3, "commit": "c2", "command": "two", "device": "gpu", "config": {}})
    now[0] += 12.34
    second.update(state="measured", result={"accuracy": 0.5})
    card = load_card(tmp_path)
    assert card["wall_seconds"] == 42.3 and card["state"] == "measured" and card["result"] == {"accuracy": 0.5}
    assert card["pieces"] == [{"command": "one", "commit": "c1", "device": "cpu", "wall_seconds": 30.0},
                              {"command": "two", "commit": "c2", "device": "gpu", "wall_seconds": 12.3}]
    assert "epochs" not in card and card["commit"] == "c2"


def test_other_processes_of_a_run_write_nothing(tmp_path):
    assert Record(tmp_path, {"name": "toy"}, write=False).update(state="measured")["state"] == "measured"
    assert list(tmp_path.iterdir()) == []


def test_rows_come_back_as_they_were(tmp_path):
    rows = [{"epoch": k, "step": 10 * k, "val/loss": 1 / k} | ({"val/accuracy": 0.1 * k} if k % 2 else {}) for k in range(1, 6)]
    rows[3]["val/loss"] = math.nan
    save_rows(tmp_path / "metrics.csv", rows)
    again = load_rows(tmp_path / "metrics.csv")
    assert again[:3] == rows[:3] and math.isnan(again[3]["val/loss"]) and "val/accuracy" not in again[1]
    save_rows(tmp_path / "metrics.csv", [*rows[:3], rows[4] | {"val/mae": 1.0}])  # a column more, a row less
    again = load_rows(tmp_path / "metrics.csv")
    assert [row["epoch"] for row in again] == [1, 2, 3, 5] and again[3]["val/mae"] == 1


# ---- the blind guess -------------------------------------------------------------------------------------------------
class Labelled:
    "A dataset of labels whose inputs must not be read."
    def __init__(self, labels): self.labels = torch.as_tensor(labels)
    def __len__(self): return len(self.labels)
    def __getitem__(self, i): raise AssertionError("an input was read")


class Task(DataModule):
    "Given datasets."
    def __init__(self, kind, **splits): self.kind, self.splits = kind, splits
    def load(self, split): return self.splits[split]


def test_blind_of_classes_reads_no_inputs():
    y = np.random.default_rng(0).choice(4, 500, p=[0.1, 0.2, 0.4, 0.3])
    found = blind(Task("classification", val=Labelled(y)), "val")
    p = (y == 2).mean()
    assert (found["metric"], found["guess"], found["examples"], found["split"]) == ("accuracy", 2, 500, "val")
    assert found["score"] == pytest.approx(p, abs=1e-12) and found["error"] == pytest.approx(math.sqrt(p * (1 - p) / 500), abs=1e-12)


def test_blind_of_classes_at_many_steps_leaves_out_what_does_not_count():
    y = torch.tensor([[1, 1, 2, IGNORE], [1, IGNORE, IGNORE, IGNORE]])
    for dataset in (Labelled(y), [(None, y[0]), (None, y[1, :1])]):     # labels at hand; answers of different lengths
        found = blind(Task("classification", test=dataset))
        assert found["score"] == 0.75 and found["guess"] == 1 and found["error"] == pytest.approx(math.sqrt(0.75 * 0.25 / 2))


def test_blind_of_copying_is_that_of_its_card():
    for data in (Copying(l_noise=5, l_memorize=4, n_tokens=6, sizes=(3, 7, 60)), Copying(l_noise=20, l_memorize=4, n_tokens=6, lag=True, sizes=(3, 7, 60))):
        label, share = data.majority("test")
        found = blind(data, "test")
        assert found["score"] == pytest.approx(share, abs=1e-12) and found["guess"] == label and found["examples"] == 60


@pytest.mark.parametrize("data", [Adding(l_max=12, sizes=(4, 4, 300)), Delay(l_seq=40, l_lag=8, n_lag=2, dt=0.01, freq=20.0, sizes=(4, 4, 50)),
                                  Reconstruct(l_seq=60, l_mem=20, dt=0.01, freq=20.0, sizes=(4, 4, 50))])
def test_blind_of_the_synthetic_regressions_is_that_of_their_cards(data):
    (stated,) = data.prepare().card.baseline.values()
    found = blind(data, "test")
    assert f"{found['score']:.4f}" == stated and found["metric"] == "mse"
    data.loaded.pop("train", None)
    blind(data, "val")
    assert "train" not in data.loaded                                   # endless or not: the constant is known


@pytest.mark.parametrize("shape", [(), (3,), (5, 3)])
def test_blind_of_a_regression_is_the_mean_of_train_for_each_number(shape):
    rng = np.random.default_rng(1)
    train, test = rng.normal(2.0, 1.0, (70, *shape)), rng.normal(2.0, 1.0, (40, *shape))
    if shape: train[..., 0] += 5
    found = blind(Task("regression", train=Labelled(train), test=Labelled(test)))
    mean = train.reshape(-1, shape[-1]).mean(0) if shape else train.mean()
    errors = ((test - mean) ** 2).reshape(40, -1).mean(1)
    assert found["score"] == pytest.approx(errors.mean(), rel=1e-12) and found["error"] == pytest.approx(errors.std() / math.sqrt(40), rel=1e-12)


def test_blind_of_an_endless_set_makes_a_bounded_number_of_examples():
    class Endless:
        made = 0
        def __len__(self): return 10**9

        def __getitem__(self, i):
            Endless.made += 1
            return None, torch.tensor([float(i % 2)])
    data = Task("regression", train=Endless(), test=Endless())
    assert blind(data, "test")["score"] == pytest.approx(0.25) and Endless.made == 4000
    assert len(answers(data, "train", most=5)) == 5


def test_above_chance_needs_two_standard_errors():
    chance = {"metric": "accuracy", "score": 0.10, "error": 0.03}
    rows = [{"epoch": e, "val/accuracy": a} for e, a in ((1, 0.11), (2, 0.159), (4, 0.161), (5, 0.3))]
    assert first_above_chance(rows, chance) == 4                        # the epoch, not the number of the row
    assert first_above_chance(rows[:2], chance) is None and first_above_chance([], chance) is None
    rows.insert(0, {"epoch": 0, "val/loss": 2.0})                       # an epoch without this metric
    assert first_above_chance(rows, chance) == 4
    assert first_above_chance([{"epoch": 1, "val/accuracy": math.nan}, {"epoch": 2, "val/2/accuracy": 0.9}], chance) is None


def test_better_than_the_blind_constant():
    chance = {"metric": "mse", "score": 0.5, "error": 0.1}
    rows = [{"epoch": 1, "val/loss": 0.31}, {"epoch": 2, "val/loss": 0.29}, {"epoch": 3, "val/loss": 0.1}]
    assert first_above_chance(rows, chance) == 2
    with_mse = [row | {"val/mse": mse} for row, mse in zip(rows, (0.6, 0.4, 0.2))]  # the loss is another one then
    assert first_above_chance(with_mse, chance) == 3


# ---- the curve -------------------------------------------------------------------------------------------------------
def lines_of(axes): return {line.get_label(): [list(map(float, v)) for v in line.get_data()] for line in axes.lines}


def test_curve_of_classes_at_two_rates(tmp_path):
    rows = [{"epoch": e, "lr": 0.1, "train/loss": 1 / e, "val/loss": 2 / e, "val/accuracy": 0.01 * e, "val/2/loss": 3 / e, "val/2/accuracy": 0.005 * e}
            for e in (1, 2, 40)]
    figure = learning_curve(rows, {"metric": "accuracy", "score": 0.25}, "title")
    loss, accuracy = figure.axes
    assert (loss.get_ylabel(), loss.get_yscale(), accuracy.get_ylabel(), accuracy.get_yscale()) == ("loss", "log", "accuracy", "linear")
    assert list(lines_of(loss)) == ["train", "val", "val, rate 2"] and lines_of(loss)["val, rate 2"] == [[1, 2, 40], [3, 1.5, 3 / 40]]
    assert lines_of(accuracy)["val"] == [[1, 2, 40], [0.01, 0.02, 0.4]] and lines_of(accuracy)["blind guess"][1] == [0.25, 0.25]
    save_rows(tmp_path / "metrics.csv", rows)
    assert save_curve(tmp_path, {"metric": "accuracy", "score": 0.25}).read_bytes()[:4] == b"\x89PNG"


def test_curve_of_a_regression_has_no_panel_of_accuracy():
    rows = [{"epoch": e, "train/loss": 0.5 / e, "val/loss": math.nan if e == 2 else 0.6 / e} for e in (1, 2, 3)]
    (axes,) = learning_curve(rows, {"metric": "mse", "score": 0.55}).axes
    assert axes.get_yscale() == "linear" and lines_of(axes)["val"] == [[1, 3], [0.6, pytest.approx(0.2)]] and "blind guess" in lines_of(axes)
    loss, mse = learning_curve([row | {"val/mse": 1.0} for row in rows], {"metric": "mse", "score": 0.55}).axes
    assert "blind guess" not in lines_of(loss) and "blind guess" in lines_of(mse)


def test_curve_of_nothing_and_of_negative_losses():
    assert len(learning_curve([]).axes) == 1
    (axes,) = learning_curve([{"epoch": e, "val/loss": v} for e, v in ((1, 30.0), (2, -1.0))]).axes
    assert axes.get_yscale() == "linear"


def test_curve_of_one_epoch_and_of_no_finite_number():
    (axes,) = learning_curve([{"epoch": 1, "val/loss": 1.0}]).axes
    low, high = axes.get_xlim()
    assert [tick for tick in axes.get_xticks() if low <= tick <= high] == [1]          # not 0.96, 0.98, …
    (axes,) = learning_curve([{"epoch": 1, "val/loss": math.nan, "val/accuracy": math.inf}]).axes
    assert axes.get_ylabel() == "loss" and not axes.lines


def test_curve_of_many_metrics_has_rows_and_rates_have_marks():
    names = ("loss", "accuracy", "accuracy@3", "f1", "auc")
    figure = learning_curve([{"epoch": e, **{f"val/{name}": 1 / e for name in names}} for e in (1, 2)])
    places = [axes.get_subplotspec() for axes in figure.axes]
    assert [(place.rowspan.start, place.colspan.start) for place in places] == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0)]
    assert figure.get_figwidth() < 15 and figure.get_figheight() > 5
    (axes,) = learning_curve([{"epoch": e, "val/loss": 1 / e, "val/2/loss": 2 / e, "val/4/loss": 3 / e} for e in (1, 2)]).axes
    assert len({line.get_marker() for line in axes.lines}) == 3


# ---- loggers ---------------------------------------------------------------------------------------------------------
def test_tensorboard_always_and_wandb_when_asked(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    (tensorboard,) = loggers(tmp_path)
    tensorboard.log_metrics({"val/loss": 0.5}, step=7)
    tensorboard.save()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("val/loss")] == [(7, 0.5)]
    end_wandb(tmp_path)
    assert not (tmp_path / "wandb").exists()
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'wandb=mine needs Weights & Biases: pip install "s4nb\[wandb\]", or leave wandb=null'):
        loggers(tmp_path, wandb="mine")


def test_wandb_offline_goes_on_in_the_same_run(tmp_path, monkeypatch):
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_DISABLE_CODE": "true", "WANDB_DISABLE_GIT": "true"}.items():
        monkeypatch.setenv(name, value)
    import wandb
    for folder in (tmp_path / "a", tmp_path / "b", tmp_path / "a"):     # b in between: another run of this process
        _, logger = loggers(folder, wandb="project", name="toy", config={"seed": 3})
        logger.log_metrics({"val/loss": 1.0}, step=1)
        assert wandb.run.id == wandb_id(folder)
        end_wandb(tmp_path / "c")                                       # not the folder's run: it stays open
        assert wandb.run is not None
        end_wandb(folder)
        assert wandb.run is None
    wandb.teardown()                                                    # its service writes a moment later
    pieces = {name: [path.read_bytes() for path in (tmp_path / name).glob("wandb/offline-run-*/run-*.wandb")] for name in "ab"}
    assert [len(pieces[name]) for name in "ab"] == [2, 1] and wandb_id(tmp_path / "a") != wandb_id(tmp_path / "b")
    for name in "ab":
        for content in pieces[name]:                                    # what W&B uploads later: one id, all that was logged
            assert [text for text in (wandb_id(tmp_path / name), "project", "toy", "seed", "val/loss") if text.encode() not in content] == []


def test_of_several_processes_one_names_the_wandb_run(tmp_path, monkeypatch):
    from lightning.pytorch.utilities import rank_zero_only
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    assert loggers(tmp_path, wandb="project")[1].version is None and not (tmp_path / "wandb").exists()
    monkeypatch.setattr(rank_zero_only, "rank", 0)
    assert loggers(tmp_path, wandb="project")[1].version == wandb_id(tmp_path)


# ---- the report ------------------------------------------------------------------------------------------------------
def card(name="toy", seed=0, state="measured", accuracy=0.5, config=None, **more):
    found = {"name": name, "state": state, "seed": seed, "command": f"s4nb train experiment={name} seed={seed}", "device": "a CPU", "wall_seconds": 60.0,
             "published": {"paper": 61.2}, "config": {"seed": seed, "output_dir": f"x{seed}", "model": {"d_model": 8}} | (config or {}),
             "chance": {"metric": "accuracy", "score": 0.1}}
    if state == "measured":
        found |= {"result": {"accuracy": accuracy, "loss": 1.0}, "best_epoch": {"rule": "highest val/accuracy", "epoch": 4 + seed},
                  "first_epoch_above_chance": None if seed == 1 else 2}
    return found | more


def table(folder):
    "The rows of the report's first table as lists of cells."
    lines = report(folder).partition("\n## Other")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("| [")]


def test_seeds_are_one_row(tmp_path):
    for i, (seed, accuracy) in enumerate(((0, 0.50), (1, 0.60), (2, 0.70), (2, 0.80))):
        save_card(tmp_path / f"toy-{i}", card(seed=seed, accuracy=accuracy, config={"trainer": {"progress": bool(i)}}))
    (row,) = table(tmp_path)
    assert row[0] == "[toy](toy-0/card.json) [2](toy-1/card.json) [3](toy-2/card.json) [4](toy-3/card.json)" and row[1] == "61.2 (paper)"
    per_seed = [50, 60, 75]                                             # seed 2 was run twice: its mean
    assert row[2] == f"{np.mean(per_seed):.2f} ± {np.std(per_seed, ddof=1):.2f} %" and row[4] == "10.00 %"
    assert row[5] == "4, 5, 6, 6: highest val/accuracy" and row[6] == "2, never, 2, 2" and row[7] == "0, 1, 2"
    assert row[8:11] == ["a CPU", "60.0 s", "measured"] and row[11].count("<br>") == 2 and "`s4nb train experiment=toy seed=2`" in row[11]


def test_other_settings_are_another_row(tmp_path):
    save_card(tmp_path / "a", card())
    save_card(tmp_path / "b", card(seed=1, config={"model": {"d_model": 9}}))
    save_card(tmp_path / "c", card(name="another", seed=2))
    assert [row[0] for row in table(tmp_path)] == ["[another](c/card.json)", "[toy](a/card.json)", "[toy](b/card.json)"]


def test_only_what_was_measured_has_a_number(tmp_path):
    save_card(tmp_path / "a", card(state="partial", result={"accuracy": 0.987}, epochs=3))
    save_card(tmp_path / "b", card(state="failed", error="OSError: no room\nleft | here", result={"accuracy": 0.987}))
    partial, failed = table(tmp_path)
    assert partial[2] == failed[2] == "" and "98.7" not in report(tmp_path)
    assert partial[10] == "partial" and failed[10] == r"failed: OSError: no room left \| here"


def test_units_rates_and_a_card_of_before(tmp_path):
    save_card(tmp_path / "a", card(result={"accuracy": 0.5, "loss": 1.0, "2/accuracy": 0.25, "2/loss": 3.0, "bits": 1.5}))
    save_card(tmp_path / "b", card(name="zadding", result={"loss": 0.01234}, chance={"metric": "mse", "score": 0.1667}, published={}))
    old = card(name="zzold", test_accuracy=0.473, majority_class={"share": 0.151}, command=None)
    save_card(tmp_path / "c", {key: value for key, value in old.items() if key not in ("result", "chance")})
    toy, adding, before = table(tmp_path)
    assert toy[2] == "50.00 %<br>25.00 % at rate 2<br>bits 1.5"
    assert adding[1:5] == ["", "mse 0.01234", "", "mse 0.1667"]
    assert before[2:5] == ["47.30 %", "", "15.10 %"] and before[11] == "in Python: see its card"


def test_the_goal_is_compared_with_the_mean_of_the_seeds(tmp_path):
    aim = {"goal": 55.0}
    for seed, accuracy in enumerate((0.50, 0.60)):                      # the mean reaches it, though a seed does not
        save_card(tmp_path / f"toy-{seed}", card(seed=seed, accuracy=accuracy, config=aim))
    save_card(tmp_path / "worse", card(name="worse", accuracy=0.5499, config=aim))
    save_card(tmp_path / "cut", card(name="cut", accuracy=0.9, state="partial", config=aim))
    mse = {"metric": "mse", "score": 0.2}
    save_card(tmp_path / "error", card(name="error", config={"goal": 0.1}, chance=mse, result={"test/mse": 0.1, "test/loss": 0.3}))
    save_card(tmp_path / "large", card(name="large", config={"goal": 0.1}, chance=mse, result={"test/loss": 0.11}))
    assert {row[0].split("]")[0][1:]: row[3] for row in table(tmp_path)} == {
        "toy": "≥ 55 %: reached", "worse": "≥ 55 %: not reached", "cut": "≥ 55 %", "error": "mse ≤ 0.1: reached",
        "large": "mse ≤ 0.1: not reached"}


def test_words_about_an_experiment_do_not_part_its_runs(tmp_path):
    for seed, more in enumerate(({"goal": 1.0, "about": "old"}, {"goal": None, "about": "new", "published": {"a paper": 2.0}})):
        save_card(tmp_path / f"{seed}", card(seed=seed, config=more))
    (row,) = table(tmp_path)
    assert row[7] == "0, 1"


def test_what_nobody_ran_has_a_row_with_its_command(tmp_path):
    save_card(tmp_path / "a", card())
    planned = [Experiment("toy"), Experiment("lra-x", published={"a paper": 96.35}), Experiment("ours", goal=75.0)]
    lines = [line for line in report(tmp_path, planned).splitlines() if "not run" in line]
    assert lines == ["| lra-x | 96.35 (a paper) |  |  |  |  |  |  |  |  | not run | `s4nb train experiment=lra-x` |",
                     "| ours |  |  | 75 |  |  |  |  |  |  | not run | `s4nb train experiment=ours` |"]
    assert write_report(tmp_path, planned).read_text().count("not run") == 2


def test_cards_of_other_measurements_are_listed(tmp_path):
    save_card(tmp_path / "kernels", {"name": "kernels", "state": "measured", "command": "s4nb bench", "rows": [1]})
    save_card(tmp_path / "deep" / "er", {"what": "seconds"})
    save_card(tmp_path / "tmp" / "trial", card())
    (tmp_path / "notes").mkdir()
    text = report(tmp_path)
    assert "No run yet" in text and "trial" not in text
    assert "| [kernels](kernels/card.json) | measured |  | s4nb bench |" in text and "| [deep/er](deep/er/card.json) |  | seconds |  |" in text
    assert "No run yet" in report(tmp_path / "none")


def test_a_broken_card_stops_the_report_and_is_named(tmp_path):
    save_card(tmp_path / "a", card())
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "card.json").write_text('{"name": "toy", "st')
    with pytest.raises(ValueError, match=r"b/card\.json is no card: Unterminated string"):
        report(tmp_path)


@pytest.mark.parametrize("odd, words", [({"config": None}, "AttributeError"), ({"result": {"accuracy": None}}, "NoneType"),
                                        ({"result": {"accuracy": "good"}}, "must be real number, not str"), ({"chance": 0.1}, "float"),
                                        ({"best_epoch": {"epoch": 3}}, "KeyError: 'rule'"), ({"published": {"a paper": "61"}}, "str"),
                                        ({"state": "failed", "error": {"a": 1}}, "TypeError"), ({"seed": "one"}, "one")])
def test_a_card_that_gives_no_row_stops_the_report_and_is_named(tmp_path, odd, words):
    save_card(tmp_path / "a", card())
    save_card(tmp_path / "odd" / "one", card() | odd)
    with pytest.raises(ValueError, match=rf"odd/one/card\.json is not the card of a run \(.*{words}.*correct it, or move its folder"):
        report(tmp_path)


def test_cards_that_lack_something_say_nothing_of_it(tmp_path):
    save_card(tmp_path / "bare", {"name": "bare", "state": "measured", "config": {}})
    save_card(tmp_path / "empty", card(name="empty") | dict.fromkeys(("published", "result", "chance", "best_epoch", "wall_seconds", "error", "device")))
    save_card(tmp_path / "unknown", card(name="unknown", state="dreamt", result={"accuracy": 0.987}))
    bare, empty, unknown = table(tmp_path)
    assert bare == ["[bare](bare/card.json)", "", "", "", "", "", "", "", "", "", "measured", "in Python: see its card"]
    assert empty[1:6] == [""] * 5 and empty[6] == "2" and empty[8:11] == ["", "", "measured"]
    assert unknown[2] == "" and unknown[10] == "dreamt"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_results_that_are_no_numbers_are_shown(tmp_path, value):
    for seed, accuracy in enumerate((0.5, value)):
        save_card(tmp_path / f"{seed}", card(seed=seed, accuracy=accuracy))
    (row,) = table(tmp_path)
    assert row[2] == f"{value} ± nan %" and row[7] == "0, 1"


def test_names_with_bars_and_letters_of_all_kinds(tmp_path):
    save_card(tmp_path / "a", card(name="Δ|数字", device="a\nb|c", command="s4nb train 'x|y'"))
    save_card(tmp_path / "b", {"state": None, "what": "a|b\nc", "command": 7})
    save_card(tmp_path / "c", {})
    text = report(tmp_path)
    runs, others = text.split("\n## Other measurements\n")
    for part, columns in ((runs, 12), (others, 4)):
        rows = [line for line in part.splitlines() if line.startswith("|")]
        assert len(rows) == 3 and all(len(re.split(r"(?<!\\)\|", line)) == columns + 2 for line in rows)
    assert "Δ\\|数字" in runs and "a b\\|c" in runs and "|  | a\\|b c | 7 |" in others
    assert write_report(tmp_path).read_text() == write_report(tmp_path).read_text()


def test_seeds_stand_in_their_order(tmp_path):
    for seed in (10, 9, 2, 1):
        save_card(tmp_path / f"toy-{seed}", card(seed=seed))
    (row,) = table(tmp_path)
    assert row[7] == "1, 2, 9, 10" and row[5].startswith("5, 6, 13, 14:") and row[0].startswith("[toy](toy-1/card.json) [2](toy-2/")


def test_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file/toy cannot be made .*set output_dir"):
        new_folder(tmp_path / "file", "toy")
    for write in (lambda: Record(tmp_path / "file", {"name": "toy"}), lambda: write_report(tmp_path / "file")):
        with pytest.raises(OSError, match=r"file/(card\.json|README\.md)"):
            write()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_readme_keeps_what_stands_around_the_report(tmp_path):
    save_card(tmp_path / "a", card())
    assert write_report(tmp_path).read_text().startswith(f"# results\n\n{BEGIN}\n")
    (tmp_path / "README.md").write_text(f"# Mine\n\nabove\n\n{BEGIN}\nold\n{END}\n\nbelow\n")
    text = write_report(tmp_path).read_text()
    assert text == f"# Mine\n\nabove\n\n{BEGIN}\n{report(tmp_path)}{END}\n\nbelow\n" and write_report(tmp_path).read_text() == text
    (tmp_path / "README.md").write_text(f"# Mine\n{END}\n")
    with pytest.raises(ValueError, match="has one of the marks"):
        write_report(tmp_path)
    assert (tmp_path / "README.md").read_text() == f"# Mine\n{END}\n"


def test_the_committed_report_is_that_of_the_committed_cards(tmp_path):
    listed = subprocess.run(["git", "-C", ROOT, "ls-files", "results"], capture_output=True, text=True)
    if listed.returncode: pytest.skip("no git checkout: which cards are committed is not known")
    paths = [path for path in listed.stdout.split() if path.endswith("card.json") and (ROOT / path).exists()]
    for path in paths:                                                  # without those of runs made here
        (tmp_path / path).parent.mkdir(parents=True)
        shutil.copy(ROOT / path, tmp_path / path)
    stored = (ROOT / "results" / "README.md").read_text().partition(f"{BEGIN}\n")[2].partition(END)[0]
    assert paths and stored == report(tmp_path / "results", EXPERIMENTS.values()), "results/README.md is not what its cards give; run `s4nb report`"
