"""Write README.md from nbs/index.ipynb: its text, its code and the outputs stored in it. python .ci/readme.py"""
import json
import posixpath
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DIRECTIVE = re.compile(r"^\s*#\s*\|.*\n?", re.M)
LINK = re.compile(r"(\]\()(?![a-z]+:|#)([^)\s]+)")
NOTE = "<!-- Written by `make readme` from nbs/index.ipynb; change that. -->\n"


def from_root(markdown):
    "Relative links, which start from nbs/ in the notebook, starting from the repository's root."
    return LINK.sub(lambda m: m[1] + posixpath.normpath(posixpath.join("nbs", m[2])), markdown)


def output(out):
    "One output of a cell as markdown: rich text as it is, plain text fenced."
    data = out.get("data", {})
    if "text/markdown" in data: return from_root("".join(data["text/markdown"])).rstrip()
    text = "".join(out.get("text", data.get("text/plain", ""))).rstrip()
    return f"```\n{text}\n```" if text else ""


def parts(cell):
    "The pieces of markdown that a cell gives."
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown": return [from_root(source)]
    if re.search(r"^#\|\s*hide\b", source, re.M): return []
    code = [] if re.search(r"^#\|\s*echo: false", source, re.M) else [f"```python\n{DIRECTIVE.sub('', source).strip()}\n```"]
    return code + [output(o) for o in cell["outputs"]]


def render(nb):
    "README text of a notebook given as a dict."
    pieces = [p.strip() for cell in nb["cells"] if cell["cell_type"] != "raw" for p in parts(cell)]
    return NOTE + "\n" + "\n\n".join(p for p in pieces if p) + "\n"


if __name__ == "__main__":
    nb = json.loads((ROOT / "nbs/index.ipynb").read_text(encoding="utf-8"))
    (ROOT / "README.md").write_text(render(nb), encoding="utf-8")
