"""Estimates against direct measurements; the SLURM script, run with stand-ins; sweeps through launchers."""
import json
import os
import shlex
import stat
import subprocess
from dataclasses import replace

import pytest
import torch

from s4nb.training.architectures import Facts
from s4nb.training.estimate import (Footprint, accumulation, estimate_memory, estimate_time, kept_bytes,
                                    optimizer_bytes, slurm_script, training_loss)
from s4nb.training.experiments import compose, experiment
from s4nb.training.resume import seconds_of
from s4nb.training.run import main

GB = 2**30
SMALL = ("model.d_model=16", "model.n_layers=2")
TINY = ["experiment=listops-mini", "dataset.sizes=[8,8,8]", "model.n_layers=1", "trainer.max_epochs=1",
        "trainer.progress=false", "trainer.accelerator=cpu"]


# ---- memory ----------------------------------------------------------------------------------------------------------
def test_a_linear_layer_keeps_its_input_once():
    layer, x = torch.nn.Linear(30, 20), torch.randn(50, 30)
    assert kept_bytes(layer, lambda: layer(x).sum()) == x.nbytes
    assert kept_bytes(layer, lambda: layer(x).relu().sum()) == x.nbytes + 50 * 20 * 4
    assert kept_bytes(layer, lambda: (layer(x) + layer(x.view(5, 10, 30)).view(50, 20)).sum()) == x.nbytes


@pytest.mark.parametrize("name, changes", [
    ("lra-listops", ()), ("lra-aan", ()), ("sc35", ("model/layer=s4d",)), ("pmnist", ("model/layer=gss",)),
    ("lra-pathfinder", ("trainer.precision=bf16-mixed",)), ("adding", ()), ("lra-cifar", ("model.ff=2",)),
])
def test_estimates_hold_at_other_sizes(name, changes):
    e = experiment(name, *SMALL, *changes)
    facts = Facts("classification", 97, None, 2, 4000, pairs=True) if name == "lra-aan" else Facts.of(e.dataset.build())
    before = torch.get_rng_state()
    m = estimate_memory(e, facts)
    assert torch.equal(before, torch.get_rng_state())
    for b, l in ((5, 1024), (3, 2000), (1, 4096)):
        assert m.kept(b, l) == pytest.approx(kept_bytes(*training_loss(e, facts, b, l)), rel=0.02)
    assert m.total(5, 1024) == pytest.approx(2 * m.parameters + m.optimizer + m.kept(5, 1024) + m.spectra * 5 * 1024)
    assert m.spectra == 24 * 16 * (2 if facts.pairs else 1)


@pytest.mark.parametrize("optimizer, copies", [("adamw", 2), ("sgd", 1), ("lamb", 2)])
def test_what_the_optimiser_remembers(optimizer, copies):
    e = experiment("lra-cifar", *SMALL, f"optimizer={optimizer}", *(["optimizer.momentum=0.9"] * (optimizer == "sgd")))
    model = e.model.build(Facts("classification", None, 1, 10))
    size = sum(p.nbytes for p in model.parameters())
    assert copies * size <= optimizer_bytes(e, model) <= copies * size + 8 * len(list(model.parameters()))


def test_refusals():
    with pytest.raises(ValueError, match="not linear in the length"):
        estimate_memory(experiment("lra-listops", *SMALL, "model/layer=mega"))
    with pytest.raises(ValueError, match="known when they are prepared"):
        estimate_memory(experiment("lra-cifar"), Facts("classification", None, None, 10))


def test_the_batch_that_fits():
    m = Footprint(GB // 4, GB // 2, each=0.9 * GB / 100, kernels=0.0, rest=0.0, spectra=0)  # GB: 1 + 0.9 b
    assert [m.largest_batch(100, gb) for gb in (1, 2, 3, 11)] == [0, 0, 1, 9]
    e = experiment("lra-pathx")                                                               # batches of 16
    assert m.total(16, 100) == pytest.approx(15.4 * GB)
    assert [accumulation(e, m, 100, gb) for gb in (80, 11, 6, 3)] == [1, 2, 4, 16]
    assert accumulation(e, m, 100, 6, devices=4) == 1 and accumulation(e, m, 100, 3, devices=4) == 4
    with pytest.raises(ValueError, match="1.9 GB of 2; train in pieces"): accumulation(e, m, 100, 2)
    with pytest.raises(ValueError, match="evenly to 3 devices"): accumulation(e, m, 100, 80, devices=3)


def test_accumulation_is_what_the_trainer_takes():
    e = experiment("lra-pathx", *SMALL)
    m = estimate_memory(e)
    n = accumulation(e, m, 16384, m.total(5, 16384) / GB / 0.9)
    assert n == experiment("lra-pathx", f"trainer.accumulate_grad_batches={n}").trainer.accumulate_grad_batches == 4


# ---- time ------------------------------------------------------------------------------------------------------------
def test_time_is_steps_times_seconds():
    e = experiment("lra-cifar")
    found = estimate_time(e, 3.6, 45_000)
    assert found == pytest.approx({"steps_per_epoch": 900, "steps": 180_000, "hours_per_epoch": 0.9, "hours": 180.0})
    assert estimate_time(e, 1.0, 45_049)["steps"] == 180_000 and estimate_time(e, 1.0, 49)["steps_per_epoch"] == 1
    few = replace(e, trainer=replace(e.trainer, max_steps=10))
    assert estimate_time(few, 1.0, 45_000)["steps"] == 10


# ---- SLURM -----------------------------------------------------------------------------------------------------------
def command_of(script):
    "The arguments of `s4nb train` in a script."
    line = next(line for line in script.splitlines() if line.startswith("srun "))
    return shlex.split(line.replace("$folder", "results/x"))[3:]


def test_the_command_in_the_script_composes():
    script = slurm_script("lra-listops", "dataset.sizes=[96, 32, 32]", "trainer.accumulate_grad_batches=2", nodes=2,
                          gpus=8, hours=30.5, spare_minutes=10)
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    e = compose(command_of(script))
    assert (e.trainer.num_nodes, e.trainer.devices, e.trainer.strategy, e.trainer.accelerator) == (2, 8, "ddp", "gpu")
    assert (e.train.resume, e.trainer.max_time, e.dataset.sizes) == ("auto", "1:6:20:0", [96, 32, 32])
    assert seconds_of(e.trainer.max_time) == 60 * (30 * 60 + 30 - 10)
    for line in ("--nodes=2", "--ntasks-per-node=8", "--gpus-per-node=8", "--time=1830", "--requeue"):
        assert f"#SBATCH {line}\n" in script
    assert compose(command_of(slurm_script("lra-listops"))).trainer.strategy == "auto"


@pytest.mark.parametrize("arguments, options, said", [
    (["lra-pathx"], {"nodes": 3}, "cannot be dealt evenly to 3 parts"), (["lra-pathx"], {"hours": 0.25}, "no time"),
    (["lra-pathx", "trainer.accumulate_grad_batches=4"], {"gpus": 8}, "32 parts"),
    (["lra-pathx", "model.d_modle=3"], {}, "did you mean 'model.d_model'"), (["pathx"], {}, "unknown experiment"),
])
def test_a_script_that_cannot_run_is_not_written(arguments, options, said):
    with pytest.raises(ValueError, match=said): slurm_script(*arguments, **options)


@pytest.mark.parametrize("state, code, restarts, queued", [
    ("partial", 0, 0, True), ("partial", 143, 3, True), ("measured", 0, 3, False), ("failed", 1, 0, False),
    ("partial", 0, 50, False), (None, 2, 0, False),
])
def test_the_job_queues_itself_again_while_partial(state, code, restarts, queued, tmp_path):
    "bash runs the script; srun and scontrol are stand-ins: a run that leaves a card, and a queue that takes notes."
    card = f"mkdir -p $folder; echo '{json.dumps({'state': state}, indent=1)}' > $folder/card.json" if state else "true"
    stand_ins = {"srun": f'for a in "$@"; do folder=${{a#output_dir=}}; done; {card}; echo "$@" > command; exit {code}',
                 "scontrol": 'echo "$@" > queue'}
    for name, text in stand_ins.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(stat.S_IRWXU)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "17", "SLURM_RESTART_COUNT": str(restarts),
           "SLURM_CPUS_PER_TASK": "8"}
    script = slurm_script("lra-pathx", gpus=4)
    done = subprocess.run(["bash"], input=script, text=True, cwd=tmp_path, env=env, capture_output=True)
    assert done.returncode == code and done.stderr == "" and (tmp_path / "queue").exists() == queued
    assert "output_dir=results/lra-pathx-17" in (tmp_path / "command").read_text()
    if queued: assert (tmp_path / "queue").read_text() == "requeue 17\n"


# ---- sweeps ----------------------------------------------------------------------------------------------------------
def sweep(tmp_path, monkeypatch, *arguments):
    "Two jobs of a tiny run, each in a process of its own that the launcher starts."
    monkeypatch.chdir(tmp_path)
    given = ["train", *TINY, f"dataset.data_dir={tmp_path}/data", "model.d_model=4,8", *arguments, "--multirun"]
    assert main(given) == 0
    cards = {path.parent.name: json.loads(path.read_text()) for path in (tmp_path / "results").glob("*/card.json")}
    assert set(cards) == {"listops-mini", "listops-mini-2"}
    assert {card["state"] for card in cards.values()} == {"measured"}
    assert {card["config"]["model"]["d_model"] for card in cards.values()} == {4, 8}
    for name in cards:
        files = {path.name for path in (tmp_path / "results" / name).iterdir()}
        assert {"metrics.csv", "config.yaml", "curve.png", "checkpoints"} <= files


def test_two_jobs_at_once_by_joblib(tmp_path, monkeypatch):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    sweep(tmp_path, monkeypatch, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2")


@pytest.mark.stress
def test_two_jobs_by_submitit_on_this_machine(tmp_path, monkeypatch):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    sweep(tmp_path, monkeypatch, "hydra/launcher=submitit_local", "hydra.launcher.timeout_min=10")


@pytest.mark.parametrize("launcher, package, setting", [
    ("submitit_slurm", "hydra_submitit_launcher", "gpus_per_node=4"),
    ("submitit_local", "hydra_submitit_launcher", "timeout_min=5"),
    ("joblib", "hydra_joblib_launcher", "n_jobs=3"), ("ray", "hydra_ray_launcher", "ray.init.num_cpus=2"),
])
def test_launchers_compose(launcher, package, setting, tmp_path, monkeypatch, capsys):
    pytest.importorskip(f"hydra_plugins.{package}")
    monkeypatch.chdir(tmp_path)
    plus = "+" if launcher == "ray" else ""
    shown = ["--cfg", "hydra", "--package", "hydra.launcher"]
    assert main(["train", *TINY, f"hydra/launcher={launcher}", f"{plus}hydra.launcher.{setting}", *shown]) == 0
    key, _, value = setting.rpartition(".")[2].partition("=")
    assert f"{key}: {value}\n" in capsys.readouterr().out and not list(tmp_path.iterdir())
