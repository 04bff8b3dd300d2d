"""Every experiment, made small by overrides, takes two optimisation steps, evaluates and leaves its record."""
import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from test_tables import facts_of

from s4nb.training.experiments import experiment
from s4nb.training.fit import run
from s4nb.training.record import load_card
from s4nb.training.reports import report
from s4nb.training.tables import EXPERIMENTS, FAMILIES

FEW = "dataset.sizes=[8,4,4]"
OWN = {  # what is made in place is made small; everything else gets random data with the same facts
    "copying": (FEW, "dataset.l_memorize=12", "dataset.n_tokens=8"), "adding": (FEW, "dataset.l_max=40"),
    "delay": (FEW, "dataset.l_seq=60", "dataset.l_lag=10", "dataset.dt=0.01", "dataset.freq=20"),
    "reconstruct": (FEW, "dataset.l_seq=60", "dataset.l_mem=10", "dataset.dt=0.01", "dataset.freq=20"),
    "listops-mini": (FEW, "trainer.max_time=null"),
}


def small_data(name, place):
    "The overrides that replace the data of an experiment: at most 8 sequences of 256 steps."
    e = EXPERIMENTS[name]
    if name in OWN:
        return [*OWN[name], *([f"dataset.data_dir={place}/data"] if hasattr(e.dataset, "data_dir") else [])]
    facts = facts_of(e)
    l_max = 256 if name == "lra-pathx-resnet" else 48
    facts = replace(facts, l_max=l_max, l_output=l_max if facts.l_output else None)
    values = ",".join(f"{key}:{'null' if value is None else value}" for key, value in asdict(facts).items())
    return ["dataset=custom", "dataset.target=stand_in.StandIn", f"+dataset.arguments={{{values}}}"]


def small_model(model):
    "The overrides that make a model small: 16 features, 2 layers, a state of 8."
    sizes = {"d_model": 16, "n_layers": 2, "channels": 4}
    found = [f"model.{key}={min(most, getattr(model, key))}" for key, most in sizes.items() if hasattr(model, key)]
    layer = model.layer
    found += [f"model.layer.d_state={min(8, layer.d_state)}"] if hasattr(layer, "d_state") else []
    return found + (["model.layer.n_ssm=null"] if (getattr(layer, "n_ssm", None) or 1) > 16 else [])


def shrink(name, place, *more):
    "An experiment of the tables as it is, but small."
    return experiment(name, *small_data(name, place), *small_model(EXPERIMENTS[name].model), "dataset.batch_size=4", "trainer.max_epochs=1",
                      "trainer.accelerator=cpu", "trainer.devices=1", "trainer.threads=1", "trainer.progress=false", "trainer.limit_train_batches=1.0",
                      f"output_dir={place}/{name}", *more)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_two_steps_and_an_evaluation(name, tmp_path):
    e = shrink(name, tmp_path)
    for field in ("about", "published", "seed", "optimizer", "scheduler", "callbacks", "train"):
        assert getattr(e, field) == getattr(EXPERIMENTS[name], field)
    card = run(e)
    assert card["steps"] == 2 and card["state"] == "measured" and load_card(tmp_path / name)["state"] == "measured"
    assert math.isfinite(card["test_loss"]) and (e.train.monitor == "val/loss" or 0 <= card["test_accuracy"] <= 1)
    assert set(card["result"]) >= {"test/loss"} and len(card["result"]) >= len(e.dataset.rates)
    saved = torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)
    assert all(torch.isfinite(value).all() for key, value in saved["state_dict"].items() if value.is_floating_point())
    assert Path(card["folder"], "config.yaml").exists()


@pytest.mark.parametrize("name", [family[0].name for family in FAMILIES.values()])
def test_each_family_goes_on_from_its_checkpoint_and_is_reported(name, tmp_path):
    first = run(shrink(name, tmp_path))
    again = run(shrink(name, tmp_path, "trainer.max_epochs=2", f"train.resume={tmp_path / name}"))
    assert (first["steps"], again["steps"], again["epochs"], again["state"]) == (2, 4, 2, "measured")
    table = report(tmp_path)
    assert name in table and all(f"{percent:g} ({source})" in table for source, percent in EXPERIMENTS[name].published.items())


def test_half_the_rate_is_evaluated_and_named(tmp_path):
    card = run(shrink("sc35", tmp_path))
    assert {"test/accuracy", "test/2/accuracy"} <= set(card["result"])


def test_all_families_are_run():
    assert {e.name for family in FAMILIES.values() for e in family} == set(EXPERIMENTS)
