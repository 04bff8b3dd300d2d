"""How ways to one result are timed: in turns in one process, on a GPU also as replayed graphs, and beside their floor."""
import time
from functools import partial
from statistics import median
from typing import NamedTuple

import torch

BOTH = "forward + backward"
SLOTS = {    # multiply-adds, or what takes as long, of a mode and a node: forward, backward; a reciprocal hides behind
    "Cauchy sum": (10, 18), "DPLR spectrum": (22, 48), "S4 kernel": (22, 48),    # one numerator; four
    "Vandermonde sum": (2, 4), "S4D kernel": (2, 4),
}


class Rates(NamedTuple):
    "What a device does at most: float32 multiply-adds a second, bytes a second (read and written)."
    fma: float
    bytes: float


class Case(NamedTuple):
    "Ways to one result, {name: function without arguments}; the others are compared with `base`; work: (fma, bytes)."
    what: str
    ways: dict
    base: str
    size: dict
    work: tuple | None = None


# ---- clocks ----------------------------------------------------------------------------------------------------------
def digits(x): return float(f"{x:.3g}")


def clock(run, repeats, device):
    "Milliseconds of one run: of the process, summed over its threads (CPU only), and on the wall."
    def now():
        if device == "cuda": torch.cuda.synchronize()
        return {**({"cpu": time.process_time()} if device == "cpu" else {}), "wall": time.perf_counter()}
    start = now()
    for _ in range(repeats): run()
    return {k: 1e3 * (t - start[k]) / repeats for k, t in now().items()}


def captured(run):
    "(A function that replays a run as a CUDA graph, None), or (None, the reason why there is no graph of it)."
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side): run()                          # libraries take their workspaces for this stream
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph): run()
    except RuntimeError as error:
        torch.cuda.synchronize()
        return None, first_line(error)
    return graph.replay, None


def first_line(error): return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__


class Way:
    "A way and its clocks: as it is called, and on a GPU, where it can be captured, as a graph that is replayed."
    def __init__(self, run, slice_ms, device):
        self.device, self.runs, self.failed = device, {}, {}
        try: clock(run, 1, device)                               # tables, compilations, memory
        except RuntimeError as error:                            # no memory, or it cannot be done here: told in the row
            self.failed["run"] = first_line(error)
            return
        self.add("", run, slice_ms)
        if device == "cuda":
            replay, self.failed["graph"] = captured(run)
            if replay: self.add("graph", replay, slice_ms)
        self.failed = {k: why for k, why in self.failed.items() if why}

    def add(self, name, run, slice_ms):
        "What is shorter than slice_ms is repeated within its turn."
        repeats = max(1, min(1000, int(slice_ms / max(clock(run, 1, self.device)["wall"], 1e-3))))
        self.runs[name] = (run, repeats)

    def turn(self):
        found = {name: clock(run, repeats, self.device) for name, (run, repeats) in self.runs.items()}
        return {name or k: t for name, of in found.items() for k, t in of.items()}


def in_turns(ways, plan, device):
    "({way: {clock: median ms}}, {way: what failed}): in every round each way has its turn."
    made = {name: Way(run, plan.slice_ms, device) for name, run in ways.items()}
    rounds = [{name: way.turn() for name, way in made.items() if way.runs} for _ in range(plan.rounds)]
    ms = {name: {k: digits(median(r[name][k] for r in rounds)) for k in rounds[0][name]} for name in rounds[0]}
    return ms, {name: way.failed for name, way in made.items() if way.failed}


# ---- floors ----------------------------------------------------------------------------------------------------------
def work_of(what, both, H, L, B=None, N=64):
    """(multiply-adds, bytes) that cannot be avoided: each input read and each output written once.

    Sums: SLOTS for each mode and node. Convolutions and blocks: u, y and in the backward pass du, dy and u again, in
    float32; of a block also its mixing, H to 2 H, and the sums of its kernel. None for what has no floor here."""
    if what in SLOTS:
        nodes = L if what in ("Vandermonde sum", "S4D kernel") else L // 2 + 1
        out = (4 if nodes == L else 8) * H * nodes
        return H * N // 2 * nodes * sum(SLOTS[what][:1 + both]), (out + 16 * H * N // 2) * (1 + both)
    if what == "convolution": return 0, 4 * B * H * L * (5 if both else 2)
    if what in ("S4 block", "S4D block"):
        fma, _ = work_of(what.replace("block", "kernel"), both, H, L)
        return fma + 2 * B * L * H * H * (3 if both else 1), 4 * B * H * L * (5 if both else 2)


def floor_ms(work, rates):
    "The least time for (multiply-adds, bytes)."
    return 1e3 * max(work[0] / rates.fma, work[1] / rates.bytes)


# ---- rows ------------------------------------------------------------------------------------------------------------
def title_of(what, size): return f"{what}, " + " ".join(f"{k}={n}" for k, n in size.items())


def measure(case, plan, device, rates=None):
    """The row of a case: times, how many times faster than the base each other way is, and with `rates` the floor and
    the share of it that each way reaches by its fastest clock."""
    ms, failed = in_turns(case.ways, plan, device)
    base = ms.get(case.base, {})
    faster = {n: {k: digits(base[k] / t) for k, t in of.items() if k in base} for n, of in ms.items() if n != case.base}
    row = {"title": title_of(case.what, case.size), "what": case.what, **case.size, "base": case.base, "ms": ms,
           "faster": {n: of for n, of in faster.items() if of}} | ({"failed": failed} if failed else {})
    if not (rates and case.work): return row
    floor = floor_ms(case.work, rates)
    return row | {"floor_ms": digits(floor), "of_floor": {n: digits(floor / min(of.values())) for n, of in ms.items()}}


def timed(cases):
    "The rows of a table of cases."
    return lambda plan, device, names, rates: (measure(case, plan, device, rates) for case in cases(plan, device, names))


def forward(f):
    with torch.no_grad(): return f()


def backward(f, leaves):
    y = f()
    return torch.autograd.grad(y, leaves, torch.ones_like(y))


def passes(what, functions, base, only_both=False, **size):
    "Cases of forward and of forward + backward; functions: {name: (function, leaves that want gradients)}."
    def case(name, both, ways): return Case(f"{what}, {name}", ways, base, size, work_of(what, both, **size))
    if not only_both: yield case("forward", False, {n: partial(forward, f) for n, (f, _) in functions.items()})
    yield case(BOTH, True, {n: partial(backward, f, leaves) for n, (f, leaves) in functions.items()})
