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

@pytest.fixture(scope="session")
def real_data():
    "Folder with cifar10-jpeg.tar.xz and fsdd.tar.xz (data/README.md); S4NB_DATA names it, absent: the test is skipped."
    folder = Path(os.environ.get("S4NB_DATA") or "nowhere")
    missing = [name for name in ("cifar10-jpeg.tar.xz", "fsdd.tar.xz") if not (folder / name).is_file()]
    if missing: pytest.skip(f"set S4NB_DATA to a folder with {' and '.join(missing)}")
    return folder
