"""Shared by all tests: fixed seeds, process-wide state put back after each, scripts of the house as modules."""
import importlib.util
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def load(path):
    "The Python file at `path` (from the root) as a module, whatever its folder."
    name = "house_" + Path(path).stem
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / path)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@pytest.fixture(autouse=True)
def untouched():
    "Seeds are 0 at the start of every test; dtype, environment, warnings, ... are what they were afterwards."
    with load("nbs/conftest.py").untouched(): yield


@pytest.fixture
def runner():
    "nbs/conftest.py, which runs notebooks as tests."
    return load("nbs/conftest.py")


@pytest.fixture(scope="session")
def vectors():
    "Folder with the numbers of the reference implementation; S4NB_VECTORS names it, absent: the test is skipped."
    folder = os.environ.get("S4NB_VECTORS")
    if not folder or not Path(folder).is_dir(): pytest.skip("set S4NB_VECTORS to the folder with the reference's vectors")
    return Path(folder)
