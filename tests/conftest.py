"""Shared by all tests: fixed seeds, process-wide state put back after each, the runner of notebooks, the reference's vectors."""
import os
from pathlib import Path

import pytest
from house import load


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
