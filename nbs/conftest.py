"""pytest runs every notebook of the book as one test.

The cells run in order in a fresh IPython shell, in the notebook's folder. An exported cell is not run: it is replaced by
an import of the names it defines from the module it was exported to, so that what the other cells test is the module.
Cells flagged `slow`, `gpu` or `data` are left out unless asked for: `pytest nbs --flags "slow gpu"`. What a notebook
changes for the whole process (default dtype, seeds, environment, plots, ...) is put back before the next one.
"""
import ast
import atexit
import difflib
import json
import linecache
import logging
import os
import random
import re
import symtable
import sys
import traceback
import warnings
from collections import Counter
from configparser import ConfigParser
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "agg")
import numpy as np
import pytest
import torch
from IPython.core.inputtransformer2 import TransformerManager
from IPython.core.interactiveshell import InteractiveShell
from traitlets.config import Config

ROOT = Path(__file__).resolve().parents[1]
FLAGS = ("slow", "gpu", "data")
EXPORTS = ("export", "exports", "exporti")
DIRECTIVES = FLAGS + EXPORTS + (
    "default_exp", "hide", "hide_input", "hide_output", "hide_line", "skip_showdoc", "filter_stream",
    "eval:", "echo:", "output:", "warning:", "include:", "code-fold:", "label:", "fig-cap:", "fig-alt:")
DIRECTIVE = re.compile(r"^\s*#\s*\|\s*(\S+)\s*(.*?)\s*$")


# ---- reading and checking --------------------------------------------------------------------------------------------
class NotebookError(Exception):
    "What is wrong with a notebook, said in one message."


@dataclass
class Cell:
    "One code cell: `binds` are the names it defines at top level, `uses` the global names it reads."
    index: int
    source: str
    directives: dict = field(default_factory=dict)
    binds: set = field(default_factory=set)
    uses: set = field(default_factory=set)

    @property
    def flags(self): return {f for f in FLAGS if f in self.directives}

    @property
    def exported(self): return any(e in self.directives for e in EXPORTS)

    @property
    def evaluated(self): return self.directives.get("eval:", "true").lower() != "false"


def directives_of(index, source):
    "The `#|` lines at the top of a cell, {name: rest}; one that is unknown, or stands below code, is an error."
    found, at_top = {}, True
    for line in source.splitlines():
        match = DIRECTIVE.match(line)
        if match and not at_top:
            raise NotebookError(f"cell {index}: `{line.strip()}` stands below code, where it has no effect; "
                                "move it to the top of the cell")
        if match and match[1] not in DIRECTIVES:
            near = difflib.get_close_matches(match[1], DIRECTIVES, 1)
            hint = f"did you mean `#| {near[0]}`?" if near else "known are " + ", ".join(DIRECTIVES)
            raise NotebookError(f"cell {index}: unknown directive `{line.strip()}`; {hint}")
        if match: found[match[1]] = match[2]
        elif line.strip(): at_top = False
    return found


def names(source):
    "(binds, uses) of a piece of Python: names defined at top level, and global names read anywhere in it."
    binds, uses = set(), set()

    def visit(table):
        top = table.get_type() == "module"
        for s in table.get_symbols():
            if (top or s.is_declared_global()) and (s.is_assigned() or s.is_imported()): binds.add(s.get_name())
            if (top or s.is_global()) and s.is_referenced(): uses.add(s.get_name())
        for child in table.get_children(): visit(child)

    visit(symtable.symtable(source, "cell", "exec"))
    inlined = comprehension_variables(ast.parse(source))
    return binds - inlined, uses - inlined


def comprehension_variables(tree):
    "Names bound at the top level by comprehensions alone: from Python 3.12 on, symtable counts them to the module."
    outer, stack = [], [tree]                                # the nodes outside functions and classes
    while stack:
        node = stack.pop()
        outer.append(node)
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)):
            stack.extend(ast.iter_child_nodes(node))
    targets = [n for c in outer if isinstance(c, ast.comprehension) for n in ast.walk(c.target) if isinstance(n, ast.Name)]
    inside = {id(n) for n in targets}
    bound = {n.id for n in outer if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store) and id(n) not in inside}
    bound |= {n.name for n in outer if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))}
    bound |= {(a.asname or a.name).split(".")[0] for n in outer if isinstance(n, (ast.Import, ast.ImportFrom)) for a in n.names}
    return {n.id for n in targets} - bound


def read_cells(path):
    "The code cells of a notebook, checked; markdown is left out but counted in the index."
    transform, cells = TransformerManager().transform_cell, []
    for i, raw in enumerate(json.loads(Path(path).read_text(encoding="utf-8"))["cells"]):
        if raw["cell_type"] != "code": continue
        source = "".join(raw["source"])
        cell = Cell(i, source, directives_of(i, source))
        try: cell.binds, cell.uses = names(transform(source))
        except SyntaxError as e: raise NotebookError(f"cell {i}: {e.msg} (line {e.lineno})\n{source}") from None
        cells.append(cell)
    check_exports(cells)
    check_flags(cells)
    return cells


def check_exports(cells):
    "At most one module to a notebook, every exported cell has one, and is neither flagged nor sent elsewhere."
    targets = [c for c in cells if "default_exp" in c.directives]
    if len(targets) > 1:
        raise NotebookError(f"cell {targets[1].index}: a second default_exp; a notebook is exported to one module")
    for c in [c for c in cells if c.exported]:
        if not targets:
            raise NotebookError(f"cell {c.index} is exported, but no cell says `#| default_exp pkg.module`")
        if c.flags:
            raise NotebookError(f"cell {c.index} is exported and flagged {sorted(c.flags)}; "
                                "a flag belongs to a cell that only shows something")
        if any(c.directives.get(e) for e in EXPORTS):
            raise NotebookError(f"cell {c.index} is exported to a module of its own; drop what follows `export`")


def check_flags(cells):
    "Flags stand on leaf cells: no later cell without that flag reads what a flagged cell defines, unless it defines it too."
    for i, flagged in enumerate(cells):
        for c in cells[i + 1:]:
            lost = (flagged.binds & c.uses) - c.binds if flagged.flags - c.flags else set()
            if lost:
                raise NotebookError(f"cell {flagged.index} is flagged {sorted(flagged.flags)} and defines {sorted(lost)}, "
                                    f"which cell {c.index} reads; it is not there when the flagged cell is left out")


def module_of(cells, root=ROOT):
    "The dotted name of the module that a notebook is exported to, or None."
    config = ConfigParser(delimiters=["="])
    config.read(root / "settings.ini", encoding="utf-8")
    target = [c.directives["default_exp"] for c in cells if "default_exp" in c.directives]
    return f"{config['DEFAULT']['lib_name']}.{target[0]}" if target else None


# ---- the process-wide state a notebook may change --------------------------------------------------------------------
def _set_environ(saved):
    for k in os.environ.keys() - saved.keys(): del os.environ[k]
    os.environ.update(saved)


def _set_filters(saved):
    warnings.filters[:] = saved
    warnings._filters_mutated()


def _set_logging(saved):
    logging.root.handlers[:] = saved[0]
    logging.root.setLevel(saved[1])
    logging.disable(saved[2])


def _set_print_options(saved): vars(torch._tensor_str.PRINT_OPTS).update(saved)


STATE = (  # (read, write back)
    (os.getcwd, os.chdir),
    (lambda: dict(os.environ), _set_environ),
    (lambda: list(sys.path), lambda v: sys.path.__setitem__(slice(None), v)),
    (lambda: list(sys.argv), lambda v: sys.argv.__setitem__(slice(None), v)),
    (lambda: sys.modules["__main__"], lambda v: sys.modules.__setitem__("__main__", v)),
    (lambda: list(warnings.filters), _set_filters),
    (lambda: (list(logging.root.handlers), logging.root.level, logging.root.manager.disable), _set_logging),
    (random.getstate, random.setstate),
    (np.random.get_state, np.random.set_state),
    (np.geterr, lambda v: np.seterr(**v)),
    (np.get_printoptions, lambda v: np.set_printoptions(**v)),
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.get_default_device, lambda v: torch.set_default_device(None if v == torch.device("cpu") else v)),
    (torch.get_rng_state, torch.set_rng_state),
    (torch.get_num_threads, torch.set_num_threads),
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    (torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms),
    (lambda: dict(vars(torch._tensor_str.PRINT_OPTS)), _set_print_options),
)


@contextmanager
def untouched():
    "Run something from fixed seeds, then put back all of STATE, matplotlib and Hydra."
    saved = [read() for read, _ in STATE]
    import matplotlib
    rc = matplotlib.rcParams.copy()
    random.seed(0); np.random.seed(0); torch.manual_seed(0)
    try: yield
    finally:
        for (_, write), value in zip(STATE, saved): write(value)
        if "matplotlib.pyplot" in sys.modules: sys.modules["matplotlib.pyplot"].close("all")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # rcParams warns of its own deprecated keys
            dict.update(matplotlib.rcParams, rc)
        hydra = sys.modules.get("hydra.core.global_hydra")
        if hydra: hydra.GlobalHydra.instance().clear()


# ---- running ---------------------------------------------------------------------------------------------------------
class Shell(InteractiveShell):
    "IPython without a terminal, a history or a traceback printer; errors are returned, not shown."
    def enable_gui(self, gui=None): pass
    def init_virtualenv(self): pass
    def showtraceback(self, *args, **kwargs): pass
    def showsyntaxerror(self, *args, **kwargs): pass
    def showindentationerror(self, *args, **kwargs): pass


@contextmanager
def shell():
    "A Shell with an empty namespace that is the current one (for magics, display, get_ipython) while it lasts."
    config = Config()
    config.HistoryManager.enabled = False
    InteractiveShell.clear_instance()
    sh = Shell.instance(config=config)
    try: yield sh
    finally:
        atexit.unregister(sh.atexit_operations)
        sh.user_ns.clear()
        Shell.clear_instance()


def draw_figures():
    "Draw and close the open figures, as Jupyter does after each cell, so that an error in a plot is one of its cell."
    plt = sys.modules.get("matplotlib.pyplot")
    if plt is None: return
    try:
        for number in plt.get_fignums(): plt.figure(number).canvas.draw()
    finally: plt.close("all")


def run_cell(sh, cell, source):
    "Run `source` for `cell`; what it raises comes out as NotebookError, with the cell and the traceback from it on."
    name = f"<cell {cell.index}>"
    sh.compile.get_code_name = lambda raw, transformed, number: name
    result = sh.run_cell(source)
    error = result.error_before_exec or result.error_in_exec
    if error is None:
        try: draw_figures()
        except Exception as e: error = e
    if error is None: return
    lines = source.splitlines(keepends=True)
    linecache.cache[name] = (len(source), None, lines, name)
    trace = traceback.TracebackException.from_exception(error)
    inner = [i for i, f in enumerate(trace.stack) if f.filename == name]
    if inner: trace.stack = traceback.StackSummary.from_list(trace.stack[inner[0]:])
    shown = "".join(f"    {line}" for line in lines).rstrip()
    raise NotebookError(f"cell {cell.index}:\n\n{shown}\n\n{''.join(trace.format())}") from None


def run_notebook(path, flags=(), root=ROOT):
    "Run a notebook against the module it is exported to; returns how many cells were left out for want of each flag."
    cells, skipped = read_cells(path), Counter()
    module = module_of(cells, root)
    with untouched(), shell() as sh:
        sys.path.insert(0, str(root))
        os.chdir(Path(path).parent)
        os.environ.setdefault("DATA_PATH", str(Path(root) / "data"))  # of the checkout, not of the notebook's folder
        for cell in cells:
            missing = cell.flags - set(flags)
            if missing: skipped["+".join(sorted(missing))] += 1
            elif not cell.evaluated: continue
            elif not cell.exported: run_cell(sh, cell, cell.source)
            elif cell.binds - {"annotations"}:
                run_cell(sh, cell, f"from {module} import {', '.join(sorted(cell.binds - {'annotations'}))}")
    return skipped


# ---- pytest ----------------------------------------------------------------------------------------------------------
def pytest_addoption(parser):
    parser.addoption("--flags", default="", help='also run notebook cells with these flags, such as "slow gpu data"')


def pytest_configure(config):
    unknown = set(config.getoption("--flags").split()) - set(FLAGS)
    if unknown: raise pytest.UsageError(f"--flags: unknown {sorted(unknown)}; known are {', '.join(FLAGS)}")


def pytest_collect_file(file_path, parent):
    if file_path.suffix == ".ipynb" and re.match(r"\d\d_|index\.", file_path.name):
        return NotebookFile.from_parent(parent, path=file_path)


class NotebookFile(pytest.File):
    def collect(self):
        item = NotebookItem.from_parent(self, name="cells")
        text = self.path.read_text(encoding="utf-8")
        for flag in FLAGS:
            if re.search(rf'"\s*#\s*\|\s*{flag}\s*(\\n)?"', text): item.add_marker(flag)
        yield item


class NotebookItem(pytest.Item):
    def runtest(self):
        skipped = run_notebook(self.path, self.config.getoption("--flags").split())
        self.user_properties.append(("skipped_cells", dict(skipped)))

    def repr_failure(self, excinfo):
        if excinfo.errisinstance(NotebookError): return f"{self.path.relative_to(ROOT)}, {excinfo.value}"
        return super().repr_failure(excinfo)

    def reportinfo(self): return self.path, 0, str(self.path.relative_to(ROOT))


def pytest_terminal_summary(terminalreporter):
    skipped = Counter()
    for report in terminalreporter.stats.get("passed", []):
        skipped.update(dict(report.user_properties).get("skipped_cells", {}) if report.when == "call" else {})
    if skipped:
        counts = ", ".join(f"{n} {flag}" for flag, n in sorted(skipped.items()))
        terminalreporter.write_line(f"notebook cells left out by flag: {counts}")
