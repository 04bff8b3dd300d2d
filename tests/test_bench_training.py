"""The training benchmark runs at tiny sizes, and its ways compute the same steps. No time is asserted."""
import json
import re

import pytest
import torch

from s4nb import bench_training
from s4nb.bench_training import GPU, PLAN, QUICK, Size, compared, described, line, training_step, turns, with_sums
from s4nb.baselines import literal_sums
from s4nb.training.record import load_card


def test_the_whole_in_small(tmp_path, capsys):
    before = torch.get_num_threads()
    assert bench_training.main(["--quick", "--note", "shared", "--out", str(tmp_path / "card")]) == 0
    shown, card = capsys.readouterr().out, load_card(tmp_path / "card")
    assert torch.get_num_threads() == before
    assert (card["name"], card["state"], card["threads"], card["note"]) == ("training", "trial", 1, "shared")
    assert card["versions"]["torch"] and card["device"] and card["command"]
    assert [r["experiment"] for r in card["turns"]] == ["lra-listops", "lra-cifar", "sc35"]
    for row in card["turns"] + card["alone"] + card["apart"]:
        assert line(row) in shown and all(rate > 0 for rate in row["steps_per_s"].values())
    for row in card["turns"] + card["apart"]:
        assert "naive" in row["ms"] and set(row["faster"]) == set(row["ms"]) - {"naive"}
    assert all(0 < row["peak_mb"]["native"] < row["peak_mb"]["naive"] for row in card["apart"]) and card["apart"]
    assert not re.search(r"/(work|tmp|home|root)/|20\d\d-\d\d", json.dumps(card))


def test_what_a_row_says():
    assert described(Size("lra-cifar"))["published"] == {}
    said = described(Size("sc35", 1, 4))
    assert (said["batch"], said["length"], said["published"]) == (4, 16000, {"n_layers": 6, "batch": 16})
    row = compared(said | {"ms": {"native": {"cpu": 500.0}, "naive": {"cpu": 2000.0}}})
    assert row["steps_per_s"] == {"native": 2.0, "naive": 0.5} and row["faster"] == {"native": 4.0}
    assert line(row | {"peak_mb": {"native": 3.0}}).endswith("native 2/s (4x naive)  naive 0.5/s  peak native 3 MB")
    assert compared(said | {"ms": {"native": {"cpu": 500.0}}})["faster"] == {}


@pytest.mark.parametrize("size", QUICK.turns, ids=lambda size: size.experiment)
def test_the_ways_take_the_same_steps(size):
    with literal_sums():
        losses = {way: [step() for _ in range(3)] for way in ("torch", "naive") if (step := training_step(size, way))}
    assert len(set(losses["torch"])) == 3 and losses["torch"] == pytest.approx(losses["naive"], rel=1e-4)


def test_the_published_models_of_a_gpu():
    "All of them, small, in every way that a CPU knows: the sizes of the plan are the published ones."
    assert all(described(size)["published"] == {} for size in GPU.turns) and len(GPU.turns) == 8 and not GPU.apart
    for size in GPU.turns:
        row = turns(Size(size.experiment, 1, 2, 4, 64), ("torch", "torch, bfloat16", "naive"), 1)
        assert set(row["ms"]) == {"torch", "torch, bfloat16", "naive"} and "failed" not in row, size


def test_what_cannot_be_run_is_told(monkeypatch):
    def step(size, way, device="cpu"):
        if way == "naive": raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
        return lambda: 0.0
    monkeypatch.setattr(bench_training, "training_step", step)
    row = turns(Size("lra-cifar"), ("torch", "naive"), 1)
    assert row["failed"] == {"naive": "CUDA out of memory."} and set(row["ms"]) == {"torch"} and row["faster"] == {}
    assert line(row).endswith("naive: CUDA out of memory.")


def test_only_some_and_a_mistake(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert bench_training.main(["--quick", "--only", "lra-pathx"]) == 0
    card = load_card(tmp_path / "results/tmp/training")
    assert card["turns"] == card["apart"] == [] and len(card["alone"]) == 1
    with pytest.raises(ValueError, match="did you mean 'lra-cifar'"): bench_training.main(["--only", "lra-cifer"])
    with pytest.raises(ValueError, match="did you mean 'cpu'"): bench_training.main(["--device", "tpu"])


def test_the_plan_is_of_published_models():
    assert all(described(size)["published"] == {} for size, _ in PLAN.apart[3:])
    less = [described(size)["published"] for size in PLAN.turns[:3]]
    assert less == [{"n_layers": 6}, {"n_layers": 6}, {"n_layers": 6, "length": 16000}]


def test_what_was_measured_is_kept(tmp_path, monkeypatch):
    def break_off(size, ways): raise KeyboardInterrupt
    monkeypatch.setattr(bench_training, "apart", break_off)
    with pytest.raises(KeyboardInterrupt): bench_training.main(["--quick", "--out", str(tmp_path)])
    card = load_card(tmp_path)
    assert card["state"] == "partial" and len(card["turns"]) == 3 and "apart" not in card
