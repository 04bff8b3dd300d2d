"""The rules of the house: modules and notebooks in step, imports downward only, nothing too long, nothing stale."""
import ast
import importlib.metadata
import json
import posixpath
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from itertools import zip_longest
from pathlib import Path

import nbformat
import pytest
from house import ROOT, load
from packaging.markers import default_environment
from packaging.requirements import Requirement

# Engineering that derives nothing is written by hand; each with the notebook's module before which it may be imported.
HANDMADE = {"build": None, "ops.native": "ops.cauchy_sum", "ops.triton_sums": "ops.cauchy_sum", "diagnose": "training.run",
            **dict.fromkeys(["baselines", "bench_triton", "bench_time", "bench_rates", "bench_lengths", "bench", "bench_data",
                             "bench_training"], "training.run")}
CORE = ("hippo", "module", "ssm", "ops", "s4")  # torch and einops alone; names unique across them
BIN = Path(sys.executable).parent


def files(*suffixes):
    "Files of the checkout that git does not ignore, relative to the root; of results only the runs that git knows."
    def git(*options):
        command = ["git", "ls-files", *options]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()

    new = [f for f in git("-o", "--exclude-standard") if not f.startswith("results/")]
    found = sorted({Path(f) for f in git("-c") + new if (ROOT / f).is_file()})
    return [f for f in found if not suffixes or f.suffix in suffixes]


def text(path): return (ROOT / path).read_text(encoding="utf-8")
def cells(path): return json.loads(text(path))["cells"]
def source(cell): return "".join(cell["source"])
def notebooks(): return [f for f in files(".ipynb") if f.parts[0] == "nbs"]
def exported(path): return re.search(r"^#\|\s*default_exp (\S+)", "\n".join(source(c) for c in cells(path)), re.M)


def modules():
    "{module without the package name: notebook it comes from}, in reading order."
    return {m[1]: f for f in sorted(notebooks(), key=lambda f: f.name) if (m := exported(f))}


def reading_order():
    "Modules in the order in which they may import each other, those written by hand at their places."
    order = list(modules())
    for name, before in HANDMADE.items(): order.insert(order.index(before) if before else 0, name)
    return {m: i for i, m in enumerate(order)}


def module_file(name): return Path("s4nb") / (name.replace(".", "/") + ".py")


def settings():
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return config["DEFAULT"]


def report(problems): assert not problems, "\n" + "\n".join(problems)


# ---- notebooks and modules in step -----------------------------------------------------------------------------------
def first_difference(a, b):
    "Where two texts part, in one line."
    for n, (x, y) in enumerate(zip_longest(a.split("\n"), b.split("\n"), fillvalue="(end)"), 1):
        if x != y: return f"line {n}: {x.strip()[:90]!r} should be {y.strip()[:90]!r}"


def test_export_and_clean_change_nothing(tmp_path):
    for f in files():
        (tmp_path / f).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / f, tmp_path / f)
    for command in ("nbdev_export", "nbdev_clean"):
        done = subprocess.run([BIN / command], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, f"{command} failed:\n{done.stderr[-2000:]}"
    def fresh(f): return (tmp_path / f).read_text(encoding="utf-8")

    changed = [f for f in files(".py", ".ipynb", ".ini") if fresh(f) != text(f)]
    made = [f.relative_to(tmp_path) for f in (tmp_path / "s4nb").rglob("*.py")]
    report([f"{f}: {first_difference(text(f), fresh(f))}; run `make export`" for f in changed]
           + [f"{f} is missing; run `make export`" for f in made if not (ROOT / f).exists()])


def test_every_module_has_its_notebook():
    known = {module_file(m): f for m, f in modules().items()}
    handmade = {module_file(m) for m in HANDMADE}
    report([f"{f}: no notebook exports it; delete it, or say `#| default_exp` in its notebook" for f in files(".py")
            if f.parts[0] == "s4nb" and f.name not in ("__init__.py", "_modidx.py") and f not in {*known, *handmade}])


def test_notebooks_have_a_number_of_their_own():
    numbered = [f for f in notebooks() if f != Path("nbs/index.ipynb")]
    problems = [f"{f}: a notebook is named NN_name.ipynb" for f in numbered
                if not re.match(r"\d\d_[a-z0-9_]+\.ipynb$", f.name)]
    seen = {}
    for f in numbered:
        if f.name[:2] in seen: problems.append(f"{f}: the number {f.name[:2]} is taken by {seen[f.name[:2]]}")
        seen[f.name[:2]] = f
    report(problems)


def test_init_files_only_reexport():
    allowed = (ast.Import, ast.ImportFrom, ast.Assign, ast.Expr)
    problems = []
    for f in [f for f in files(".py") if f.parts[0] == "s4nb" and f.name == "__init__.py"]:
        for node in ast.parse(text(f)).body:
            lazy = isinstance(node, ast.FunctionDef) and node.name in ("__getattr__", "__dir__")
            if not isinstance(node, allowed) and not lazy:
                problems.append(f"{f}:{node.lineno}: an __init__ only re-exports")
    report(problems)


# ---- the layer rule --------------------------------------------------------------------------------------------------
def imports(path):
    "Every import of a module of ours, as (line, dotted name, names or None, at module level?), relative ones resolved."
    tree = ast.parse(text(path))
    functions = [f for f in ast.walk(tree) if isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef))]
    deferred = {id(n) for f in functions for n in ast.walk(f)}
    package = path.with_suffix("").parts[:-1]
    for node in ast.walk(tree):
        top = id(node) not in deferred
        if isinstance(node, ast.Import):
            yield from ((node.lineno, a.name, None, top) for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[:len(package) - node.level + 1]) if node.level else ""
            yield node.lineno, ".".join(p for p in (base, node.module) if p), [a.name for a in node.names], top


def problems_of_imports(path, name, order):
    "What the imports of module `name` do against the layer rule."
    layer = name.split(".")[0]
    for line, target, names, top in imports(path):
        where, root = f"{path}:{line}", target.split(".")[0]
        if names == ["*"]: yield f"{where}: import * hides what is used; name it"
        if root == "s4nb":
            known = target.removeprefix("s4nb").lstrip(".")
            if known == "" and names == ["__version__"]: continue
            if known not in order:
                yield f"{where}: {target} is no notebook's module; import from the one that defines {', '.join(names or ['it'])}"
            elif order[known] >= order[name]:
                yield f"{where}: {target} comes later in the book; a module imports from lower-numbered notebooks only"
            elif layer == "data" and known.split(".")[0] not in ("data", "hippo"):
                yield f"{where}: data knows nothing of the models"
        elif layer in CORE and top and root not in {"torch", "einops"} | sys.stdlib_module_names and name != "ops.triton_sums":
            yield f"{where}: {layer} imports torch and einops alone, not {root}"
        elif root in ("hydra", "omegaconf") and layer != "training":
            yield f"{where}: only training imports {root}"


def test_layer_rule():
    order = reading_order()
    report([p for m in order for p in problems_of_imports(module_file(m), m, order)])


def test_layer_rule_sees_what_it_forbids(tmp_path, monkeypatch):
    (tmp_path / "s4nb/ops").mkdir(parents=True)
    bad = ("import numpy\nfrom s4nb.s4.later import f\nfrom ..ssm import scan\nfrom .first import *\n"
           "def g():\n    import scipy, hydra\n")
    (tmp_path / "s4nb/ops/second.py").write_text(bad)
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    order = {"ops.first": 0, "ops.second": 1, "s4.later": 2}
    found = "\n".join(problems_of_imports(Path("s4nb/ops/second.py"), "ops.second", order))
    expected = ("not numpy", "s4.later comes later", "s4nb.ssm is no notebook's", "import * hides", "only training imports")
    assert [said for said in expected if said not in found] == []
    assert "scipy" not in found


def public(name):
    "The names in `__all__` of a module."
    for node in ast.parse(text(module_file(name))).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return ast.literal_eval(node.value)
    return []


def test_public_names_of_the_core_are_unique():
    problems, seen = [], {}
    for m in [m for m in modules() if m.split(".")[0] in CORE]:
        for n in public(m):
            if n in seen: problems.append(f"{module_file(m)}: {n} is also a name of s4nb.{seen[n]}")
            seen[n] = m
    report(problems)


def test_no_reexport_hides_a_module():
    problems = []
    for f in [f for f in files(".py") if f.parts[0] == "s4nb" and f.name == "__init__.py"]:
        siblings = {p.stem for p in (ROOT / f).parent.iterdir() if p.is_dir() or p.suffix == ".py"}
        package = ".".join(f.parent.parts)
        problems += [f"{f}:{line}: {n} hides the module {package}.{n}; leave it to `from {package}.{n} import {n}`"
                     for line, target, names, _ in imports(f) if target != package for n in names or [] if n in siblings]
    report(problems)


# ---- sizes -----------------------------------------------------------------------------------------------------------
def test_limits():
    problems = [f"{f}: {n} lines; a module has at most 400" for f in files(".py")
                if f.parts[0] == "s4nb" and f.name != "_modidx.py" and (n := len(text(f).splitlines())) > 400]
    for f in notebooks():
        for i, c in enumerate(cells(f)):
            if c["cell_type"] != "code": continue
            lines = source(c).splitlines()
            limit = 100 if any(line.startswith("class ") for line in lines) else 40
            if len(lines) > limit: problems.append(f"{f} cell {i}: {len(lines)} lines; the limit is {limit}")
    report(problems)


def test_notebooks_are_light():
    report([f"{f}: {size / 1e6:.1f} MB; draw fewer or smaller plots" for f in notebooks()
            if (size := (ROOT / f).stat().st_size) > 3e6])


def test_committed_outputs_are_without_errors():
    report([f"{f} cell {i}: its stored output is an error" for f in notebooks() for i, c in enumerate(cells(f))
            if any(o["output_type"] == "error" for o in c.get("outputs", []))])


# ---- text: nothing stale, nothing private ----------------------------------------------------------------------------
PRIVATE = re.compile(r"(?<![\w.~/-])/(?:work|tmp|home|root|Users)/\w")
DATED = re.compile(r"\b(?:19|20)\d\d-\d\d-\d\d\b|\b\d\d:\d\d:\d\d\b")


def test_no_path_of_a_machine():
    readable = files(".py", ".ipynb", ".md", ".ini", ".txt", ".yaml", ".yml", ".json", ".csv", ".cpp", ".cu", ".cuh", ".h", "")
    report([f"{f}: the path {m[0]}..." for f in readable if (m := PRIVATE.search(text(f)))])


def plain_outputs(cell):
    "The text in a cell's outputs, pictures left out."
    for o in cell.get("outputs", []):
        yield "".join(o.get("text", ""))
        yield from ("".join(v) for k, v in o.get("data", {}).items() if k in ("text/plain", "text/markdown"))


def test_no_date_in_what_notebooks_show():
    report([f"{f} cell {i}: shows {m[0]}, which changes from run to run"
            for f in notebooks() for i, c in enumerate(cells(f))
            for out in plain_outputs(c) if (m := DATED.search(out))])


def anchors(path):
    "The sections of a notebook as Jupyter names them in links."
    heads = [line.lstrip("#").strip() for c in cells(path) if c["cell_type"] == "markdown"
             for line in source(c).splitlines() if re.match(r"#{1,6} ", line)]
    return {h.replace(" ", "-") for h in heads}


def broken_links(path, markdown):
    "Links of a piece of markdown to files or sections that are not there."
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", markdown)):
        if re.match(r"[a-z]+:", target): continue
        name, _, section = target.partition("#")
        file = Path(posixpath.normpath(posixpath.join(path.parent, name))) if name else path
        if not (ROOT / file).exists(): yield f"{path}: links to {target}, which is not there"
        elif section and file.suffix == ".ipynb" and section not in anchors(file):
            yield f"{path}: {file} has no section {section}"


def test_links():
    written = [(f, source(c)) for f in notebooks() for c in cells(f) if c["cell_type"] == "markdown"]
    report([p for f, markdown in written for p in broken_links(f, markdown)]
           + [p for f in files(".md") for p in broken_links(f, text(f))])


def plain(nb): return [(c.source, c.get("outputs")) for c in nb.cells]


def test_readme_is_the_index_run_now():
    readme = load(".ci/readme.py")
    now, stored = readme.fresh_index(), nbformat.read(ROOT / "nbs/index.ipynb", 4)
    assert plain(stored) == plain(now), "nbs/index.ipynb: its outputs are not what it gives now; run `make readme`"
    assert text("README.md") == readme.render(now), "README.md is not what nbs/index.ipynb gives; run `make readme`"


# ---- the package -----------------------------------------------------------------------------------------------------
OPTIONAL = ("lightning", "hydra", "pykeops", "matplotlib", "torchvision", "torchaudio", "nbdev", "fastcore", "IPython")


def python(code):
    "stdout and stderr of a Python process that runs `code` at the root."
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def test_import_is_silent_and_light():
    out, errors = python(f"import sys, s4nb; print([m for m in {OPTIONAL} if m in sys.modules], s4nb.__version__)")
    assert (out, errors) == (f"[] {settings()['version']}\n", ""), "import s4nb prints, imports optional packages, or has another version"


@pytest.mark.stress
def test_import_takes_two_seconds_beyond_torch():
    code = "import time, torch; t = time.perf_counter(); import s4nb; print(time.perf_counter() - t)"
    assert min(float(python(code)[0]) for _ in range(3)) < 2


def requirements(*keys): return [Requirement(r) for k in keys for r in settings()[k].split()]


def pins():
    "{name: pinned version} of constraints.txt for this Python."
    lines = [Requirement(line) for line in text("constraints.txt").splitlines() if line and not line.startswith("#")]
    here = [r for r in lines if not r.marker or r.marker.evaluate(default_environment())]
    return {r.name.lower(): next(iter(r.specifier)).version for r in here}


def test_constraints_pin_what_settings_ask_for():
    installed = ("requirements", "train_requirements", "keops_requirements", "book_requirements", "dev_requirements")
    pinned = pins()
    report([f"settings.ini asks for {r}, constraints.txt has {pinned.get(r.name.lower(), 'no pin')}; run `make lock`"
            for r in requirements(*installed) if pinned.get(r.name.lower(), "none") not in r.specifier])
    assert [pinned[n] for n in ("torch", "torchvision", "torchaudio")] == ["2.11.0", "0.26.0", "2.11.0"]


def test_changelog_knows_the_version():
    version = settings()["version"]
    assert f"## {version}" in text("CHANGELOG.md"), f"CHANGELOG.md says nothing of {version}"


def imported_packages(path):
    "Top-level packages that a module or the code cells of a notebook import."
    code = [text(path)] if path.suffix == ".py" else [source(c) for c in cells(path) if c["cell_type"] == "code"]
    for piece in code:
        for line in re.findall(r"^[ \t]*(?:from|import)[ \t]+([\w.]+)", re.sub(r'"""[\s\S]*?"""', "", piece), re.M):
            if not line.startswith("."): yield line.split(".")[0]


def test_what_is_imported_is_required():
    own = {"s4nb"} | {f.stem for f in files(".py") if f.parts[0] in ("tests", ".ci", "nbs")}
    keys = [k for k in settings() if k.endswith("requirements")]
    asked = {r.name.lower().replace("_", "-") for r in requirements(*keys)}
    implied = {"ipython", "traitlets", "omegaconf", "triton"}  # come with JupyterLab, Hydra and torch
    provided = importlib.metadata.packages_distributions()
    provided |= {"pywt": ["PyWavelets"], "sklearn": ["scikit-learn"], "hydra": ["hydra-core"]}    # Python 3.10 misses them
    for f in [f for f in files(".py", ".ipynb") if f.parts[0] in ("s4nb", "nbs", "tests", ".ci")]:
        for name in set(imported_packages(f)) - own - set(sys.stdlib_module_names):
            given = {d.lower().replace("_", "-") for d in provided.get(name, [])} | {name.lower()}
            assert given & (asked | implied), f"{f} imports {name}, which no line of settings.ini asks for"
