"""The inner loops of the CUDA kernels as machine code: how many instructions a mode and a node cost, without a GPU.

A processor of a GPU issues one instruction a cycle for each 32 lanes, whatever it does; so the instructions of a loop
beside the multiply-adds that cannot be avoided bound the share of the arithmetic floor that a kernel can reach."""
import importlib.util
import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from s4nb.bench_time import SLOTS
from s4nb.build import library


def disassembler():
    "cuobjdump, which comes with Triton."
    spec = importlib.util.find_spec("triton")
    found = Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump" if spec else None
    return found if found and found.exists() else None


@pytest.fixture(scope="module")
def functions():
    "{mangled name: [(address, instruction)]} of the compiled library, for sm_90."
    path, reason = library("cuda")
    if path is None: pytest.skip(f"no CUDA library here: {reason}")
    if disassembler() is None: pytest.skip("no cuobjdump here")
    text = subprocess.run([disassembler(), "-sass", "-arch", "sm_90", path], capture_output=True, text=True).stdout
    found, name = {}, None
    for line in text.splitlines():
        if m := re.search(r"Function : (\S+)", line): name, found[m[1]] = m[1], []
        elif m := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", line): found[name].append((int(m[1], 16), m[2]))
    if not found: pytest.skip("the library has no code for sm_90")
    return found


def inner_loop(functions, *words):
    "Counts of the instructions in the loop of a kernel that multiplies and adds most; words: of its name."
    [name] = [n for n in functions if all(word in n for word in words)]
    code = functions[name]
    ends = [(int(m[1], 16), at) for at, text in code if (m := re.search(r"BRA.*?(0x[0-9a-f]+)", text)) and int(m[1], 16) < at]
    innermost = [(a, b) for a, b in ends if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in ends)]
    bodies = [Counter(re.sub(r"^@!?U?P\w+\s+", "", text).split()[0].split(".")[0] for at, text in code if a <= at <= b)
              for a, b in innermost]
    return max(bodies, key=lambda body: body["FFMA"])


def test_spectrum(functions):
    "Four numerators over one reciprocal: in the loop at least 85 % of the instructions are the floor's."
    body = inner_loop(functions, "spectrum_kernelIfLi4ELb1E")
    pairs = body["MUFU"]                                     # a reciprocal for each mode and node
    assert pairs >= 4 and SLOTS["DPLR spectrum"][0] * pairs >= 0.85 * sum(body.values()), body


def test_spectrum_backward(functions):
    body = inner_loop(functions, "slopes_kernelILb1EfdLi4E")
    assert body["MUFU"] >= 2 and SLOTS["DPLR spectrum"][1] * body["MUFU"] >= 0.85 * sum(body.values()), body


@pytest.mark.parametrize("tile, share", [(8, 0.9), (4, 0.75)])
def test_vandermonde(functions, tile, share):
    "Two multiply-adds for a mode and a position; all else of the loop is loads, which large tiles share."
    body = inner_loop(functions, f"vandermonde_kernelILb1EfLi{tile}E")
    assert body["FFMA"] % (2 * tile**2) == 0 and body["FFMA"] >= share * sum(body.values()), body
