"""The `s4nb` command: a run, a sweep, and one clear line for each mistake."""
import json
import os
import subprocess
import sys

import pytest
from house import ROOT

from s4nb.training.experiments import EXPERIMENTS, Constant, experiment
from s4nb.training.run import main

SMALL = ["experiment=listops-mini", "dataset.sizes=[640,32,32]", "model.d_model=8", "model.n_layers=1", "trainer.max_epochs=1", "trainer.threads=1"]
COMMAND = "import sys; from s4nb.training.run import main; sys.exit(main())"


def shell(*arguments, cwd, setup=""):
    return subprocess.run([sys.executable, "-c", setup + COMMAND, *arguments], cwd=cwd, capture_output=True, text=True,
                          timeout=300, env={**os.environ, "PYTHONPATH": str(ROOT)})


def test_twenty_steps_in_an_empty_folder(tmp_path):
    done = shell("train", *SMALL, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    card = json.loads((tmp_path / "results" / "listops-mini" / "card.json").read_text())
    assert card["steps"] == 20 and card["state"] == "measured"
    assert card["command"] == "s4nb train " + " ".join(SMALL)
    assert f"test accuracy {100 * card['test_accuracy']:.2f} %" in done.stdout and "majority class" in done.stdout
    assert "kernel.inv_dt" in done.stdout and "Traceback" not in done.stderr
    assert {p.name for p in tmp_path.iterdir()} == {"data", "results"}
    assert {p.name for p in (tmp_path / "results" / "listops-mini").iterdir()} == {
        "card.json", "config.yaml", "curve.png", "metrics.csv", "checkpoints", "tensorboard"}


def test_a_sweep_makes_a_folder_for_each_job(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = [a for a in SMALL if not a.startswith("model.d_model")]
    assert main(["train", *arguments, "model.d_model=4,8", "trainer.progress=false", "trainer.max_steps=1", "--multirun"]) == 0
    cards = [json.loads(p.read_text()) for p in sorted((tmp_path / "results").glob("*/card.json"))]
    assert [c["config"]["model"]["d_model"] for c in cards] == [4, 8]


def test_hydra_shows_the_configuration(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "experiment=lra-listops", "model/layer=s4d", "--cfg", "job"]) == 0
    shown = capsys.readouterr().out
    assert "init: diag-lin" in shown and "n_layers: 6" in shown and list(tmp_path.iterdir()) == []


def test_a_constant_learning_rate(tmp_path, monkeypatch, capsys):
    "Another choice of a group replaces the experiment's, and what it has no field for."
    monkeypatch.chdir(tmp_path)
    assert main(["train", "experiment=listops-mini", "scheduler=constant", "--cfg", "job"]) == 0
    assert "warmup" not in capsys.readouterr().out
    e = experiment("listops-mini", "scheduler=constant")
    assert isinstance(e.scheduler, Constant) and e.scheduler.warmup is None
    assert experiment("listops-mini").scheduler == EXPERIMENTS["listops-mini"].scheduler


@pytest.mark.parametrize("arguments,text", [
    (["trian"], "did you mean 'train'"),
    (["train", "experiment=listop-mini"], "did you mean 'listops-mini'"),
    (["train", "experiment=none-such"], "allowed: lra-listops"),
    (["train", "model.d_model=64"], "experiment=NAME"),
    (["train", "listops-mini"], "did you mean experiment=listops-mini"),
    (["train", "experiment=listops-mini", "model.d_modle=64"], "did you mean 'model.d_model'"),
    (["train", "experiment=listops-mini", "modle.d_model=64"], "did you mean 'model.d_model'"),
    (["train", "experiment=listops-mini", "+model.width=64"], "unknown key 'model.width'"),
    (["train", "experiment=listops-mini", "model/layer=s4x"], "allowed: s4, s4d, lssl, custom"),
    (["train", "experiment=listops-mini", "model.d_model=wide"], "could not be converted to Integer"),
    (["train", "experiment=listops-mini", "model.layer.lr.C=0.1"], "write +model.layer.lr.C=0.1"),
    (["train", "experiment=listops-mini", "model.norm=bath"], "did you mean 'batch'"),
    (["train", "experiment=listops-mini", "model.d_model=4,8"], "multirun"),
    (["train", "experiment=listops-mini", "model.d_modle=4,8", "--multirun"], "did you mean 'model.d_model'"),
    (["train", "experiment=listops-mini", "model.layer.mode=dplx", "dataset.sizes=[4,4,4]"], "dplr"),
    (["train", "experiment=listops-mini", "dataset.sizes=[4,4]"], "sizes"),
    (["data", "listops-mni"], "did you mean 'listops-mini'"),
])
def test_a_mistake_is_one_line(arguments, text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DATA_PATH", str(tmp_path / "data"))
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("s4nb: ") and err.count("\n") == 1 and text in err
    assert not (tmp_path / "results").exists()


def test_help_and_lists(tmp_path, capsys):
    assert main([]) == main(["--help"]) == 0
    assert main(["train", "--help"]) == 0
    shown = capsys.readouterr().out
    for text in ("experiment=NAME", "model/layer=s4d", "trainer.", "max_epochs=40", "--multirun", "lra-listops"):
        assert text in shown
    assert main(["experiments"]) == 0 and "59.60 %" in capsys.readouterr().out
    assert main(["data", "--list"]) == 0 and "listops-mini" in capsys.readouterr().out


def test_without_hydra_all_but_train_works(tmp_path):
    block = "import sys; sys.modules.update(dict.fromkeys(['hydra', 'omegaconf', 'lightning', 'torchmetrics'])); "
    assert shell("experiments", cwd=tmp_path, setup=block).returncode == 0
    done = shell("train", "experiment=listops-mini", cwd=tmp_path, setup=block)
    assert done.returncode == 2 and 's4nb[train]' in done.stderr and done.stderr.count("\n") == 1


def test_data_prints_the_card(tmp_path, monkeypatch, capsys):
    from s4nb.data import tasks
    monkeypatch.setitem(tasks.TASKS, "tiny", lambda data_dir=None: tasks.ListOps(sizes=[8, 4, 4], data_dir=data_dir))
    assert main(["data", "tiny", "--data-dir", str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith("generate: ")
    assert main(["data", "tiny", "--data-dir", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("ready: ") and "majority class" in out


def test_data_that_cannot_be_had_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DATA_PATH", str(tmp_path))
    assert main(["data", "manpages", "--data-dir", str(tmp_path / "nowhere")]) == 2
    assert main(["data", "adding", "--data-dir", "x"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2 and all(e.startswith("s4nb: ") for e in errors) and "no option" in errors[1]

    def full(**options): raise OSError(28, "No space left on device")
    monkeypatch.setitem(__import__("s4nb.data.tasks").data.tasks.TASKS, "full", full)
    assert main(["data", "full"]) == 1 and "No space left" in capsys.readouterr().err
