"""The experiment notebooks: whole in CI, complete by the README's commands, and in agreement with their cards."""
import json
import re
import shlex

import pytest
from house import ROOT

from s4nb.training.experiments import experiment
from s4nb.training.record import load_card
from s4nb.training.tables import FAMILIES

TASKS = sorted(p for p in (ROOT / "nbs" / "7_experiments").glob("8[0-9]_*.ipynb")) + [ROOT / "nbs" / "7_experiments" / "90_synthetics.ipynb"]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def code(path): return ["".join(c["source"]) for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
def flagged(cell, flag): return re.match(rf"#\|\s*{flag}\b", cell) is not None
def commands(path): return [c for cell in code(path) if flagged(cell, "gpu") for c in re.findall(r'complete\("([^"]+)"', cell)]


def test_there_is_a_notebook_for_each_task():
    names = "listops text retrieval image pathfinder pathx lra cifar speech mnist synthetics".split()
    assert [p.stem for p in TASKS] == [f"{80 + i}_{name}" for i, name in enumerate(names)]


@pytest.mark.parametrize("path", TASKS, ids=lambda p: p.stem)
def test_the_complete_run_is_the_readmes(path):
    assert commands(path), "no `#| gpu` cell with complete(…)"
    block = README.partition(f"(nbs/7_experiments/{path.name})\n```sh\n")[2].partition("\n```")[0]
    assert block.splitlines() == commands(path)
    for line in commands(path):
        program, verb, *overrides = shlex.split(line)
        assert (program, verb) == ("s4nb", "train") and "train.resume=auto" in overrides
        name = next(o for o in overrides if o.startswith("experiment=")).removeprefix("experiment=")
        e = experiment(name, *(o for o in overrides if not o.startswith("experiment=")))
        assert e.name == name and e.train.resume == "auto"


def test_every_published_experiment_is_started_somewhere():
    started = {re.search(r"experiment=(\S+)", line)[1] for path in TASKS for line in commands(path)}
    wanted = {e.name for family, experiments in FAMILIES.items() for e in experiments
              if family in ("Long Range Arena", "CIFAR-10", "Speech Commands", "MNIST", "synthetic tasks")}
    old = {name for name in wanted if name.endswith(("-v1", "-base"))}
    assert wanted - old <= started, sorted(wanted - old - started)


@pytest.mark.parametrize("path", TASKS, ids=lambda p: p.stem)
def test_the_whole_path_is_walked_in_small(path):
    walked = [cell for cell in code(path) if re.search(r"\brun\(", cell) and not re.match(r"#\|\s*(gpu|slow|data)\b", cell)]
    assert walked and '"measured"' in "\n".join(walked)


def runs():
    "The folders of committed runs of experiments."
    found = (p.parent for p in sorted((ROOT / "results").rglob("card.json")) if "tmp" not in p.parts)
    return [p for p in found if "config" in load_card(p)]


@pytest.mark.parametrize("folder", runs(), ids=lambda p: p.relative_to(ROOT / "results").as_posix())
def test_a_committed_run_is_whole_and_small(folder):
    card = load_card(folder)
    assert card["state"] in ("measured", "partial", "failed") and (folder / "metrics.csv").exists() and (folder / "config.yaml").exists()
    assert all(f.stat().st_size <= 8 << 20 for f in folder.rglob("*") if f.is_file())
    ours = card["name"] in {e.name for e in FAMILIES["ours"]} - {"listops-mini"} and folder.parent.name == "results"
    if ours and card["state"] == "measured":                                # variants, in folders below, need no goal
        assert card["config"].get("goal") is not None, "measured without a goal"
