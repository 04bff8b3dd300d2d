"""One file: it runs where there is no s4nb, gives the package's numbers, and needs torch and einops alone."""
import ast
import importlib.util
import subprocess
import sys

import pytest
import torch

from s4nb import standalone as module
from s4nb.models.sashimi import SaShiMi
from s4nb.s4.block import S4D, S4Block
from s4nb.ssm.lssl import LSSL
from s4nb.standalone import MODELS, in_order, origins, standalone
from s4nb.training.run import main

CLASSES = {"s4": S4Block, "s4d": S4D, "lssl": LSSL, "sashimi": SaShiMi}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("standalone")
    for choice in MODELS: (folder / f"{choice}.py").write_text(standalone(choice), encoding="utf-8")
    return folder


def alone(folder, choice):
    "The file as a module under a name of its own."
    name = f"alone_{choice}"
    spec = importlib.util.spec_from_file_location(name, folder / f"{choice}.py")
    sys.modules[name] = found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@pytest.mark.parametrize("choice", MODELS)
def test_the_file_runs_where_there_is_no_s4nb(files, choice):
    code = f"import sys, runpy; sys.modules['s4nb'] = None; runpy.run_path({choice + '.py'!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=files, capture_output=True, text=True)
    assert done.returncode == 0 and "forward and step differ" in done.stdout and done.stderr == "", done.stderr


@pytest.mark.parametrize("choice", MODELS)
def test_torch_and_einops_alone(files, choice):
    tree = ast.parse((files / f"{choice}.py").read_text(encoding="utf-8"))
    roots = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import): roots |= {a.name.split(".")[0] for a in node.names}
        if isinstance(node, ast.ImportFrom): roots.add("." * node.level + (node.module or "").split(".")[0])
    assert roots - set(sys.stdlib_module_names) == {"torch", "einops"}


@pytest.mark.parametrize("choice,options", [
    ("s4", {"d_state": 6}), ("s4", {"d_state": 8, "l_max": 20, "channels": 2, "n_ssm": 2}), ("s4", {"d_state": 6, "bidirectional": True}),
    ("s4", {"d_state": 6, "mode": "dense", "n_ssm": 1}), ("s4", {"mode": "conv", "l_max": 7}), ("s4", {"d_state": 3, "mode": "ema"}),
    ("s4", {"d_state": 6, "init": "legt", "rank": 2, "dt_fast": True}), ("s4d", {"d_state": 6}), ("s4d", {"d_state": 6, "disc": "dss"}),
    ("s4d", {"d_state": 4, "is_real": True, "disc": "bilinear"}), ("lssl", {"d_state": 5, "channels": 2}),
    ("sashimi", {"n_layers": 1, "pool": (2, 3)})])
def test_the_numbers_of_the_package(files, choice, options):
    torch.manual_seed(0)
    ours = CLASSES[choice](4, **options).double().eval()
    theirs = getattr(alone(files, choice), CLASSES[choice].__name__)(4, **options).double().eval()
    theirs.load_state_dict(ours.state_dict())
    u = torch.randn(3, 19, 4, dtype=torch.double, requires_grad=True)
    lengths = torch.tensor([19, 11, 1])
    outs = [f(u, lengths=lengths) for f in (ours, theirs)]
    assert (outs[0][0] - outs[1][0]).abs().max() < 1e-10
    grads = [torch.autograd.grad(y.square().sum(), u)[0] for y, _ in outs]
    assert (grads[0] - grads[1]).abs().max() < 1e-9 * grads[0].abs().max()


def test_backends_are_refused(files):
    s4 = alone(files, "s4")
    with pytest.raises(ValueError, match="backend of this file 'native'"):
        s4.S4Block(4, backend="native")(torch.randn(1, 5, 4))


def test_one_name_for_two_things_is_an_error():
    sources = {name: module.ModuleSource([], [({"f"}, ast.parse("def f(): return g").body[0])], {"g": (name, "g")}, {}) for name in "ab"}
    with pytest.raises(ValueError, match="the name 'f' comes from"):
        origins(sources, {"a": {"f"}, "b": {"f"}})


def test_order_is_that_of_use_even_in_a_circle():
    assert in_order("c", {"c": {"b", "a"}, "b": {"a"}}) == ["a", "b", "c"]
    assert in_order("a", {"a": {"b"}, "b": {"a"}}) == ["b", "a"]


def test_the_seams_are_functions_of_the_package():
    for where, name in module.SEAMS:
        there = importlib.import_module(f"s4nb.{where}")
        given = [list(importlib.import_module("inspect").signature(getattr(m, name)).parameters) for m in (there, module)]
        assert given[0] == given[1], name


def test_command(capsys):
    assert main(["standalone", "s4d"]) == 0
    assert capsys.readouterr().out == standalone("s4d")
    assert main(["standalone", "shashimi"]) == 2
    assert "unknown model 'shashimi', did you mean 'sashimi'?" in capsys.readouterr().err
