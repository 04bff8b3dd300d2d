"""Execute notebooks in place, as a reader would: python .ci/execute.py [--flags "slow gpu"] [NOTEBOOK ...]

Without paths: every notebook of the book. Cells flagged slow, gpu or data are left out unless asked for, and keep the
outputs they have. Nothing that changes from run to run is written: no execution counts, times or kernel metadata;
nbdev_clean has the last word.
Unlike the tests, this runs exported cells as they stand, so export first (`make notebooks` does).
"""
import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
FLAGS = ("slow", "gpu", "data")
METADATA = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}


def book():
    "Every notebook of the book, in reading order, the index last."
    return sorted(ROOT.glob("nbs/[0-9]_*/[0-9][0-9]_*.ipynb")) + [ROOT / "nbs/index.ipynb"]


def left_out(cell, flags):
    "Is this code cell kept from running by a flag that was not asked for, or by `eval: false`?"
    found = re.findall(r"^\s*#\s*\|\s*(\w+):?[ \t]*(\w*)", cell.source, re.M)
    stops = [name for name, value in found if name in set(FLAGS) - set(flags) or (name, value) == ("eval", "false")]
    return cell.cell_type == "code" and bool(stops)


def join_streams(outputs):
    "Pieces of one stream that came one after the other, as one output: where they were cut is chance."
    joined = []
    for o in outputs:
        same = joined and o.output_type == "stream" == joined[-1].output_type and o.name == joined[-1].name
        if same: joined[-1].text += o.text
        else: joined.append(o)
    return joined


def execute(path, flags=(), root=ROOT):
    "The notebook at `path`, run in its folder with the repository `root` on the path; an error in a cell is raised."
    nb = nbformat.read(path, 4)
    kept = {i: (c.source, c.outputs) for i, c in enumerate(nb.cells) if left_out(c, flags)}
    for i in kept: nb.cells[i].source = "pass"
    os.environ.update(PYTHONPATH=str(root), OMP_NUM_THREADS="1")
    os.environ.setdefault("DATA_PATH", str(Path(root) / "data"))
    os.environ.pop("MPLBACKEND", None)  # the kernel's own: plots in the notebook
    resources = {"metadata": {"path": str(Path(path).parent)}}
    quiet = ["--log-level=ERROR"]
    NotebookClient(nb, timeout=None, kernel_name="python3", resources=resources, extra_arguments=quiet).execute()
    for i, c in enumerate(nb.cells):
        if i in kept: c.source, c.outputs = kept[i]
        if c.cell_type == "code": c.outputs, c.execution_count, c.metadata = join_streams(c.outputs), None, {}
        for o in c.get("outputs", []):
            if "execution_count" in o: o.execution_count = None
    nb.metadata = METADATA
    return nb


def clean(path):
    "nbdev_clean on one notebook."
    subprocess.run([Path(sys.executable).parent / "nbdev_clean", "--fname", path], cwd=ROOT, check=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="*", type=Path)
    parser.add_argument("--flags", default="", help='also run the cells with these flags, such as "slow gpu"')
    args = parser.parse_args()
    for path in [p.resolve() for p in args.notebooks] or book():
        print(path.relative_to(ROOT), flush=True)
        nbformat.write(execute(path, args.flags.split()), path)
        clean(path)


if __name__ == "__main__": main()
