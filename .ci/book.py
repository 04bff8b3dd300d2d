"""The book as HTML in _docs, one page a notebook, from the outputs that are stored in them. python .ci/book.py"""
import re
import shutil
from pathlib import Path

import nbformat
from execute import ROOT, book
from nbconvert import HTMLExporter
from readme import DIRECTIVE

TARGET = ROOT / "_docs"


def page(path):
    "The HTML of one notebook: no hidden cells, no directives, links between notebooks turned into links between pages."
    nb = nbformat.read(path, 4)
    nb.cells = [c for c in nb.cells if not re.search(r"^#\|\s*(hide\b|default_exp)", c.source, re.M)]
    for c in nb.cells:
        if c.cell_type != "code": continue
        if re.search(r"^#\|\s*echo: false", c.source, re.M): c.metadata["transient"] = {"remove_source": True}
        c.source = DIRECTIVE.sub("", c.source)
    exporter = HTMLExporter(exclude_input_prompt=True, exclude_output_prompt=True)
    html, _ = exporter.from_notebook_node(nb, {"metadata": {"name": path.stem}})
    return re.sub(r'(href="(?![a-z]+:)[^"#]*)\.ipynb', r"\1.html", html)


def main():
    shutil.rmtree(TARGET, ignore_errors=True)
    for path in book():
        out = TARGET / path.relative_to(ROOT / "nbs").with_suffix(".html")
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(page(path), encoding="utf-8")
    print(f"open {TARGET.relative_to(Path.cwd()) if TARGET.is_relative_to(Path.cwd()) else TARGET}/index.html")


if __name__ == "__main__": main()
