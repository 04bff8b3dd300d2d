"""The runner of nbs/conftest.py on notebooks made here: it tests modules, isolates notebooks, names what is wrong."""
import json
import logging
import os
import random
import re
import shutil
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from house import ROOT

EXPORTED = ["#| default_exp sums", "#| export\nimport math\nfrom itertools import accumulate as running",
            "#| export\n_start, step = 0, 1\ndef add(a, b): return a + _start + step * b"]
MODULE = """
import math
from itertools import accumulate as running
_start, step = 0, 1
def add(a, b): return a + _start + step * b
"""


def write(path, sources):
    "A notebook with these code cells, after one of markdown."
    text = dict(cell_type="markdown", source=["# Title"], metadata={})
    code = [dict(cell_type="code", source=s.splitlines(keepends=True), metadata={}, outputs=[]) for s in sources]
    path.write_text(json.dumps(dict(cells=[text, *code], metadata={}, nbformat=4, nbformat_minor=5)))
    return path


@pytest.fixture
def toy(tmp_path, request):
    "A project whose package has a name of its own, with one module; its modules are forgotten afterwards."
    name = f"toy_{abs(hash(request.node.name))}"
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").touch()
    (tmp_path / name / "sums.py").write_text(MODULE)
    (tmp_path / "settings.ini").write_text(f"[DEFAULT]\nlib_name = {name}\n")
    (tmp_path / "nbs").mkdir()
    yield tmp_path
    for m in [m for m in sys.modules if m.startswith(name)]: del sys.modules[m]


@pytest.fixture
def run(toy, runner):
    "Runs a notebook with the given cells in the toy project."
    return lambda sources, flags=(): runner.run_notebook(write(toy / "nbs/01_sums.ipynb", sources), flags, toy)


USES = EXPORTED + ["assert add(1, 2) == 3 and _start == 0", "assert math.pi > 3 and list(running([1, 2])) == [1, 3]"]


def test_exported_names_come_from_the_module(run, toy):
    run(USES + ["assert add.__module__.endswith('.sums')"])


def test_a_broken_module_fails_its_notebook(run, toy, runner):
    module = next(toy.glob("toy_*/sums.py"))
    module.write_text(MODULE.replace("a + _start", "a - _start - 1"))
    said = r"(?s)cell 4:\n\n    assert add\(1, 2\) == 3.*AssertionError"
    with pytest.raises(runner.NotebookError, match=said) as e: run(USES)
    assert "IPython" not in str(e.value)


def test_a_name_missing_in_the_module_fails(run, toy, runner):
    with pytest.raises(runner.NotebookError, match="(?s)cell 4:.*ImportError: cannot import name 'gone'"):
        run(EXPORTED + ["#| export\ndef gone(): pass"])


def test_a_real_notebook_notices_its_broken_module(runner, monkeypatch):
    from s4nb.ssm import views
    scan = views.scan
    monkeypatch.setattr(views, "scan", lambda *args, **kw: (1.001 * scan(*args, **kw)[0], scan(*args, **kw)[1]))
    with pytest.raises(runner.NotebookError, match="AssertionError"):
        runner.run_notebook(ROOT / "nbs/2_lssl/06_views.ipynb")


LEAKS = """
import os, random, sys, logging, warnings, numpy as np, torch, matplotlib.pyplot as plt
torch.set_default_dtype(torch.float64); torch.manual_seed(5); torch.set_num_threads(3); torch.set_grad_enabled(False)
torch.set_default_device("meta"); torch.set_printoptions(precision=2); torch.set_float32_matmul_precision("medium")
torch.use_deterministic_algorithms(True); torch.autograd.set_detect_anomaly(True)
random.seed(5); np.random.seed(5); np.seterr(all="raise"); np.set_printoptions(precision=2)
os.environ["LEAK"] = "1"; os.environ.pop("HOME", None); os.chdir("/"); sys.path.append("leak"); sys.argv.append("leak")
warnings.simplefilter("error"); logging.root.setLevel(1); logging.root.addHandler(logging.NullHandler())
plt.rcParams["lines.linewidth"] = 9; fig = plt.figure()
leaked = 1
"""


def observed():
    "All that LEAKS changes."
    import matplotlib.pyplot as plt
    return [torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_device(),
            torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled(), torch.is_anomaly_enabled(),
            repr(torch.tensor([1 / 3])), torch.rand(2).tolist(), random.random(), np.random.rand(), np.geterr(),
            np.get_printoptions(), dict(os.environ), os.getcwd(), list(sys.path), list(sys.argv),
            list(warnings.filters), logging.root.level, list(logging.root.handlers), plt.rcParams["lines.linewidth"],
            plt.get_fignums(), sys.modules["__main__"]]


def test_nothing_leaks_out_of_a_notebook(run):
    state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    before = observed()
    random.setstate(state[0]); np.random.set_state(state[1]); torch.set_rng_state(state[2])
    run([LEAKS])
    for a, b in zip(before, observed()): assert a == b


def test_notebooks_start_alike(run, toy):
    start = """
import torch, random, numpy as np
assert "leaked" not in globals()
with open("seen", "a") as f: f.write(f"{torch.rand(1)} {random.random()} {np.random.rand()}|")
"""
    run([start, LEAKS])
    run([start])
    first, second, _ = (toy / "nbs/seen").read_text().split("|")
    assert first == second


@pytest.mark.parametrize("cells, said", [
    (["#| gpus\n1"], r"cell 1: unknown directive `#\| gpus`; did you mean `#\| gpu`\?"),
    (["#| slwo\n1"], "did you mean `#| slow`".replace("|", r"\|")),
    (["x = 1\n#| slow"], "cell 1: .*stands below code"),
    (["#| slow\nx = 1", "x + 1"], r"cell 1 is flagged \['slow'\] and defines \['x'\], which cell 2 reads"),
    (["#| slow\nx = 1", "def f():\n    return x"], r"defines \['x'\], which cell 2 reads"),
    (["#| slow\ndef f(): pass", "#| slow\nf()", "f()"], "which cell 3 reads"),
    (["#| slow\nx = 1", "#| gpu\nx"], "which cell 2 reads"),
    (["#| default_exp sums", "#| export\n#| gpu\ndef add(): pass"], "is exported and flagged"),
    (["#| export\ndef add(): pass"], "no cell says"),
    (["#| default_exp sums", "#| default_exp others"], "cell 2: a second default_exp"),
    (["#| default_exp sums", "#| export others\nx = 1"], "to a module of its own"),
    (["x = = 1"], "cell 1: invalid syntax"),
    (["1 / 0"], "ZeroDivisionError"),
    (["import sys; sys.exit(0)"], "SystemExit"),
    (["import matplotlib.pyplot as plt", "plt.plot([1]); plt.title('$\\\\frac$')"], "cell 2:.*Error"),
])
def test_what_is_wrong_is_named(run, runner, cells, said):
    with pytest.raises(runner.NotebookError) as e: run(cells)
    assert re.search(said, str(e.value), re.DOTALL), str(e.value)


def test_what_is_allowed(run):
    flagged = ["#| slow\nfig = 1/0", "fig = 2\nfig", "#| slow\n#| gpu\n1/0", "def f(fig): return fig", "#| eval: false\n1/0"]
    assert run(flagged) == {"slow": 1, "gpu+slow": 1}
    run(["%matplotlib inline\nimport matplotlib.pyplot as plt\nplt.plot([1, 2])", "assert not plt.get_fignums()",
         "%time 1", "from IPython.display import display, HTML\ndisplay(HTML('x'))", "import asyncio\nawait asyncio.sleep(0)",
         "class A: pass\nimport copy, pickle\npickle.loads(pickle.dumps(A()))"])


def test_flags_choose_cells(run, runner):
    cells = ["#| slow\n#| gpu\n1/0", "#| data\nx = 1"]
    assert run(cells, ["slow"]) == {"gpu": 1, "data": 1}
    with pytest.raises(runner.NotebookError, match="ZeroDivision"): run(cells, ["slow", "gpu"])


def test_pytest_collects_counts_and_shows(toy):
    shutil.copy(ROOT / "nbs/conftest.py", toy / "nbs")
    shutil.copy(ROOT / "pytest.ini", toy)
    write(toy / "nbs/index.ipynb", ["1", "#| slow\n1/0", "#| slow\n2"])
    write(toy / "nbs/01_good.ipynb", USES)
    write(toy / "nbs/02_bad.ipynb", ["x = 0", "y = 1\n1 / x"])
    write(toy / "nbs/draft.ipynb", ["1 / 0"])
    command = [sys.executable, "-m", "pytest", "nbs", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=toy, capture_output=True, text=True)
    for said in ("nbs/02_bad.ipynb, cell 2:", "    1 / x", "ZeroDivisionError", "by flag: 2 slow", "1 failed, 2 passed"):
        assert said in done.stdout
    assert done.returncode == 1


def test_an_unknown_flag_is_refused(runner):
    class config: getoption = staticmethod(lambda name: "slow slwo")
    with pytest.raises(pytest.UsageError, match=r"unknown \['slwo'\]; known are slow, gpu, data"):
        runner.pytest_configure(config)


def test_variables_of_comprehensions_are_no_names_of_the_module(runner):
    "From Python 3.12 on comprehensions are inlined and symtable shows their variables at the top level."
    source = "b = 1\nc = [a + b for a in range(3)]\nd = {b: e for b, e in c}\ndef f(): a = 2; return a\nimport g.h\n"
    assert runner.names(source)[0] == {"b", "c", "d", "f", "g"}
