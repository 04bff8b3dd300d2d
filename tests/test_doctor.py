"""The doctor tells what is the case, without compilers, with broken packages and caches, and everything still works."""
import io
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec

import pytest
from house import ROOT

import s4nb
from s4nb import build, diagnose

COMMAND = "import sys; from s4nb.training.run import main; sys.exit(main())"
WORKS = """import s4nb, torch
s4nb.S4Block(4)(torch.randn(2, 300, 4))[0].sum().backward()
print("the block works")
"""
NO_KEOPS = "import sys; sys.modules['pykeops'] = None\n"
NOTHING = {op: {"torch": "ok"} for op in ("cauchy", "log_vandermonde")}


def python(code, *arguments, path=ROOT, **env):
    "A fresh process that finds s4nb in `path`: (exit code, output and errors)."
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("S4NB_") and k not in ("CXX", "CUDA_HOME")}
    env = {**inherited, "PYTHONPATH": str(path), "OMP_NUM_THREADS": "1", **env}
    done = subprocess.run([sys.executable, "-c", code, *arguments], text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, timeout=300, env=env, cwd=ROOT / "tests")
    return done.returncode, done.stdout


@pytest.fixture
def installed(tmp_path):
    "A copy of the package as pip installs it, with sources that compile in no time and without libraries."
    site = tmp_path / "site"
    shutil.copytree(ROOT / "s4nb", site / "s4nb", ignore=shutil.ignore_patterns("__pycache__", "_C.*", "_cuda.*"))
    (site / "s4nb/_sources").mkdir()
    (site / "s4nb/_sources/toy.cpp").write_text('extern "C" const char* s4nb_sources() { return S4NB_SOURCES; }\n')
    return site


def block(text, name):
    "The lines of the report that belong to one fact."
    return re.search(rf"^{name}\s+(.*(?:\n {{14}}.*)*)", text, re.M)[1]


# ---- the install matrix ----------------------------------------------------------------------------------------------
def test_without_a_compiler(installed, tmp_path):
    "Build, doctor and a block in one process, as a user without tools meets them."
    code = NO_KEOPS + "from s4nb.training.run import main\nprint(main(['build']), main(['doctor']))\n" + WORKS
    exit_code, said = python(code, path=installed, CXX="/bin/false", S4NB_CACHE=str(tmp_path))
    assert exit_code == 0 and "0 0\n" in said and "the block works" in said, said
    assert "no C++ compiler works here (/bin/false" in block(said, "compiler")
    assert "no C++ compiler works here (/bin/false" in block(said, "CPU kernels")
    assert re.search(r"^  cauchy .*torch$", said, re.M) and "Everything used by default works." in said


def test_a_compiler_that_fails_is_quoted(installed, tmp_path):
    try: build.find_compiler()
    except build.NotBuilt as e: pytest.skip(str(e))
    (installed / "s4nb/_sources/toy.cpp").write_text("#error broken on purpose\n")
    code = NO_KEOPS + "from s4nb.training.run import main\nprint(main(['build', 'cpu']), main(['doctor']))\n" + WORKS
    exit_code, said = python(code, path=installed, S4NB_CACHE=str(tmp_path))
    assert exit_code == 0 and "1 0\n" in said and "the block works" in said, said
    assert "broken on purpose" in block(said, "CPU kernels") and "s4nb build" in block(said, "CPU kernels")


def test_here(capsys, monkeypatch):
    "What this machine has, in this process: the report names the libraries that are loaded, or their reasons."
    monkeypatch.setattr(diagnose, "backends", lambda device: NOTHING)
    s4nb.doctor()
    said = capsys.readouterr().out
    for kind in build.LIBRARIES:
        path, reason = build.library(kind)
        assert (str(path) if path else reason.splitlines()[0]) in block(said, f"{build.NAMES[kind]} kernels")
    if build.library("cpu")[0]: assert re.search(r"running (base|avx2|avx512) here", said)
    assert f"torch {s4nb.diagnose.torch.__version__}" in said and "Traceback" not in said
    other = io.StringIO()
    s4nb.doctor(file=other)
    assert other.getvalue() == said and capsys.readouterr().out == ""


def test_a_library_that_cannot_be_loaded(tmp_path, monkeypatch):
    "Half a file, say of a copy that was interrupted, that has the right digest."
    monkeypatch.setattr(build, "HERE", tmp_path)
    monkeypatch.setattr(build, "source_folder", lambda: ROOT / "extensions/structured_kernels")
    (tmp_path / "_C.so").write_bytes(b"\x7fELF" + build.source_hash("cpu").encode())
    assert re.search(r"_C.so cannot be used: .*; compile it again: s4nb build --force", diagnose.native("cpu"))


# ---- KeOps -----------------------------------------------------------------------------------------------------------
def test_a_broken_pykeops(tmp_path):
    "A package that imports and then fails is a reason, with a fix."
    (tmp_path / "pykeops").mkdir()
    raising = "class LazyTensor:\n    def __init__(self, x): raise RuntimeError('nvrtc said no')\n"
    (tmp_path / "pykeops/__init__.py").write_text(raising)
    (tmp_path / "pykeops/torch.py").write_text("from pykeops import LazyTensor\n")
    exit_code, said = python(WORKS + COMMAND, "doctor", path=f"{tmp_path}{os.pathsep}{ROOT}")
    assert exit_code == 0 and "the block works" in said, said
    assert re.search(r"^\[\d\] keops: RuntimeError: nvrtc said no", said, re.M) and "compiles again once" in said


@pytest.mark.skipif(find_spec("pykeops") is None, reason="no pykeops")
def test_a_truncated_cache_of_keops(tmp_path):
    "Compilations that were cut short leave empty libraries, which KeOps then loads for ever. Deleting them is the fix."
    cut = tmp_path / "cut"
    cut.write_text('#!/bin/sh\nwhile [ $# -gt 1 ]; do [ "$1" = -o ] && : > "$2"; shift; done\n')
    cut.chmod(0o755)
    cache = {"KEOPS_CACHE_FOLDER": str(tmp_path / "keops")}
    python("import torch; from s4nb.ops.cauchy_sum import usable; usable('cauchy', 'keops', 'cpu', torch.complex64)",
           CXX=str(cut), **cache)
    assert list((tmp_path / "keops").rglob("pykeops_cpp_*.so"))
    only = "from s4nb.ops.cauchy_sum import OPS\nfor op in set(OPS) - {'cauchy'}: del OPS[op]\n"    # one formula is enough
    exit_code, said = python(WORKS + only + COMMAND, "doctor", **cache)
    assert exit_code == 0 and "the block works" in said and "Everything used by default works." in said, said
    assert re.search(r"^\[\d\] keops: ImportError: .*file too short", said, re.M)
    assert f"KeOps compiles again once {cache['KEOPS_CACHE_FOLDER']} is deleted" in said


# ---- judgement -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("states, forced, used, good", [
    ({"native": "ok", "torch": "ok"}, None, "native", True),
    ({"native": "no library", "torch": "ok"}, None, "torch", True),
    ({"native": "ok", "torch": "ok"}, "torch", "torch", True),
    ({"native": "ok", "keops": "wrong by 1e-02", "torch": "ok"}, "keops", "NONE", False),
    ({"native": "no library", "torch": "wrong by 1e+00"}, None, "NONE", False)])
def test_the_verdict_is_about_what_is_used(states, forced, used, good, monkeypatch, capsys):
    if forced: monkeypatch.setenv("S4NB_BACKEND", forced)
    else: monkeypatch.delenv("S4NB_BACKEND", raising=False)
    monkeypatch.setitem(diagnose.PREFERENCE, "cpu", ["native", "torch", "keops"])
    monkeypatch.setattr(diagnose, "backends", lambda device: {"cauchy": states})
    monkeypatch.setattr(diagnose, "facts", lambda: [("s4nb", "two\nlines")])
    assert diagnose.main([]) == int(not good)
    said = capsys.readouterr().out
    assert said.startswith("s4nb          two\n              lines\n")
    assert re.search(rf"^  cauchy .* {used}$", said, re.M)
    for reason in set(states.values()) - {"ok"}: assert said.count(reason) == 1
    assert said.endswith("works.\n" if good else "see NONE.\n")


@pytest.mark.parametrize("backend, state, what", [
    ("keops", "ModuleNotFoundError: No module named 'pykeops'", 'pip install "s4nb[keops]"'),
    ("keops", "ImportError: file too short", "is deleted"),
    ("triton", "ModuleNotFoundError: No module named 'triton'", "pip install triton"),
    ("native", "wrong by 1e-02 relative in torch.complex64", "please report it"),
    ("native", "not built: make kernels", None)])
def test_every_reason_has_its_fix(backend, state, what):
    assert diagnose.fix(backend, state) is None if what is None else what in diagnose.fix(backend, state)


def test_works_without_the_extras():
    "Neither command needs Lightning or Hydra, and none of the optional packages is imported for its version."
    code = """
import sys
sys.modules.update(dict.fromkeys(["hydra", "omegaconf", "lightning", "torchmetrics", "pykeops"]))
from s4nb import diagnose
from s4nb.training.run import main
diagnose.facts()
print("imported:", sorted({"torchvision", "torchaudio", "wandb", "triton", "jupyterlab"} & set(sys.modules)))
sys.exit(main(["build"]))
"""
    exit_code, said = python(code, S4NB_BUILD="none")
    assert exit_code == 0 and "imported: []" in said and "nothing is compiled" in said, said
