"""What .ci/gpu and .ci/gpu-train do on a GPU is tried on the CPU: the same commands, at sizes of no meaning."""
import os
import subprocess
import sys

import pytest
from house import ROOT

from s4nb.training.record import load_card


def script(name, out, *args, **env):
    "A script of .ci with DEVICE=cpu, its logs and what it trains in the folder `out`."
    env = os.environ | {"DEVICE": "cpu", "OUT": str(out), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"} | env
    return subprocess.run([ROOT / ".ci" / name, *args], env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)


def test_steps_leave_a_card(tmp_path):
    done = script("gpu", tmp_path, "build", "paint", S4NB_BUILD="none")
    assert done.returncode == 1 and "failed: paint" in done.stdout and "unknown step paint" in done.stdout
    card = load_card(tmp_path / "gpu")
    assert {step: of["state"] for step, of in card["steps"].items()} == {"build": "passed", "paint": "failed"}
    assert card["name"] == "gpu" and card["state"] == "trial" and card["versions"]["torch"] and card["device"]
    assert (tmp_path / "logs/build.log").exists() and str(ROOT) not in (tmp_path / "gpu/card.json").read_text()
    again = script("gpu", tmp_path, "build", S4NB_BUILD="none")
    assert again.returncode == 0 and set(load_card(tmp_path / "gpu")["steps"]) == {"build", "paint"}


def test_training_says_what_it_wants(tmp_path):
    done = script("gpu-train", tmp_path)
    assert done.returncode != 0 and "usage: .ci/gpu-train SECONDS [RUN …]" in done.stderr
    done = script("gpu-train", tmp_path, "60", "listops-129")
    assert done.returncode == 2 and "unknown run listops-129; there are listops-128" in done.stdout
    done = script("gpu-train", tmp_path, "10", "listops-128")
    assert done.returncode == 0 and "listops-128: no time left" in done.stdout


@pytest.mark.stress
def test_a_run_goes_on_from_its_pieces(tmp_path):
    env = {"DATA_PATH": str(tmp_path / "data")}
    first = script("gpu-train", tmp_path / "one", "300", "listops-128", **env)
    assert first.returncode == 0 and "listops-128: partial" in first.stdout, first.stdout + first.stderr
    assert (tmp_path / "one/runs.tar.gz.00").exists()
    second = script("gpu-train", tmp_path / "two", "300", "listops-128", PIECES=str(tmp_path / "one"), **env)
    assert second.returncode == 0 and (tmp_path / "two/tried/listops-128/card.json").exists()
    assert not (tmp_path / "two/tried/listops-128-2").exists()
