"""What a newcomer meets first: the setup refuses in one line what cannot work, and `make` lists what it can do."""
import os
import re
import shutil
import subprocess
import sys

import pytest
from house import ROOT


@pytest.fixture
def checkout(tmp_path):
    "An empty checkout with the setup script alone."
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci/setup", tmp_path / ".ci")
    return tmp_path


def interpreter(path, before):
    "An executable that runs this Python, after the line `before`."
    path.write_text(f'#!/bin/sh\n[ "$1" = -c ] && exec "{sys.executable}" -c "{before}\n$2"\nexit 3\n')
    path.chmod(0o755)
    return str(path)


def setup(checkout, *args, **env):
    return subprocess.run([checkout / ".ci/setup", *args], cwd=checkout, capture_output=True, text=True,
                          stdin=subprocess.DEVNULL, env=env or None)


@pytest.mark.parametrize("before, said", [
    ("import sys; sys.version_info = (3, 9, 1)", "is Python 3.9; s4nb needs 3.10, 3.11, 3.12 or 3.13."),
    ("import sys; sys.version_info = (3, 14, 0)", "is Python 3.14; s4nb needs 3.10, 3.11, 3.12 or 3.13."),
    ("import sys; sys.modules['ensurepip'] = None", "lacks venv. On Debian or Ubuntu: apt-get install python3-venv"),
    ("raise SystemExit(1)", "does not run."),
])
def test_setup_refuses_in_one_line(checkout, before, said):
    done = setup(checkout, interpreter(checkout / "python", before))
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and said in done.stderr
    assert not (checkout / ".venv").exists()


def test_setup_without_any_python(checkout):
    (checkout / "bin").mkdir()
    for tool in ("bash", "env", "dirname"): (checkout / "bin" / tool).symlink_to(shutil.which(tool))
    done = setup(checkout, PATH=str(checkout / "bin"))
    assert done.returncode == 1 and "no Python 3.10 to 3.13 found" in done.stderr


def test_make_lists_its_targets():
    listed = subprocess.run(["make", "-s"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    targets = re.search(r"^\.PHONY: (.*)", (ROOT / "Makefile").read_text(), re.M)[1].split()
    assert all(re.search(rf"\b{t}\b", listed) for t in targets if t != "help"), f"`make` does not list all of {targets}"


@pytest.mark.parametrize("given, seen", [({}, "passive"), ({"OMP_WAIT_POLICY": "active"}, "active")])
def test_waiting_threads_are_passive_unless_told(given, seen):
    env = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"} | given
    asked = "include Makefile\nshow: ; @printenv OMP_WAIT_POLICY\n"
    done = subprocess.run(["make", "-sf-", "show"], cwd=ROOT, input=asked, capture_output=True, text=True, check=True, env=env)
    assert done.stdout == f"{seen}\n"


def test_scripts_are_executable_shell():
    for name in ("setup", "run"):
        assert (ROOT / ".ci" / name).stat().st_mode & 0o111, f".ci/{name} is not executable"
        subprocess.run(["bash", "-n", ROOT / ".ci" / name], check=True)
