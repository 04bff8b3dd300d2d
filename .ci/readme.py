"""Execute nbs/index.ipynb and write README.md from its text, code and outputs: python .ci/readme.py

It is executed in a temporary copy of the files that git knows, so that private runs and drafts do not show up.
"""
import posixpath
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(Path(__file__).parent))
from execute import clean, execute

DIRECTIVE = re.compile(r"^\s*#\s*\|.*\n?", re.M)
LINK = re.compile(r"(\]\()(?![a-z]+:|#)([^)\s]+)")
NOTE = "<!-- Written by `make readme` from nbs/index.ipynb; change that. -->"


def from_root(markdown):
    "Relative links, which start from nbs/ in the notebook, starting from the repository's root."
    return LINK.sub(lambda m: m[1] + posixpath.normpath(posixpath.join("nbs", m[2])), markdown)


def output(out):
    "One output of a cell as markdown: rich text as it is, plain text fenced."
    data = out.get("data", {})
    if "text/markdown" in data: return from_root(data["text/markdown"])
    text = out.get("text", data.get("text/plain", "")).rstrip()
    return f"```text\n{text}\n```" if text else ""


def parts(cell):
    "The pieces of markdown that a cell gives."
    if cell.cell_type == "markdown": return [from_root(cell.source)]
    if re.search(r"^#\|\s*hide\b", cell.source, re.M): return []
    shown = [output(o) for o in cell.outputs]
    if re.search(r"^#\|\s*echo: false", cell.source, re.M): return shown
    return [f"```python\n{DIRECTIVE.sub('', cell.source).strip()}\n```"] + shown


def render(nb):
    "The README of a notebook."
    pieces = [NOTE] + [p.strip() for cell in nb.cells for p in parts(cell)]
    return "\n\n".join(p for p in pieces if p) + "\n"


def fresh_index():
    "nbs/index.ipynb, executed on the files that git knows."
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    with tempfile.TemporaryDirectory() as folder:
        for f in [f for f in listed.stdout.splitlines() if (ROOT / f).is_file()]:
            (Path(folder) / f).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / f, Path(folder) / f)
        return execute(Path(folder) / "nbs/index.ipynb", root=folder)


if __name__ == "__main__":
    nb = fresh_index()
    nbformat.write(nb, ROOT / "nbs/index.ipynb")
    clean(ROOT / "nbs/index.ipynb")
    (ROOT / "README.md").write_text(render(nb), encoding="utf-8")
