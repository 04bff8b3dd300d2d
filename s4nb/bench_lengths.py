"""Layers of equal width from short to very long sequences, and where the time of one goes."""
import time
from contextlib import contextmanager
from statistics import median

import torch
from torch.profiler import ProfilerActivity, profile

from .baselines import Attention
from .bench_time import clock, digits, first_line
from .s4.block import S4Block
from .ssm.layer import SSMLayer
from .ssm.lssl import LSSL

PRECISIONS = {    # of matrix products and, in bfloat16, of activations; sums and FFTs stay float32
    "cpu": ("float32", "bfloat16"), "cuda": ("float32", "tf32", "bfloat16"),
}
PARTS = {    # of a block's time: words in the names of what ran; the first that fits
    "kernel": ("s4nb::", "cauchy", "spectrum_kernel", "woodbury", "slopes", "gradients_kernel", "vandermonde",
               "power_sums"),
    "FFT": ("fft",), "matrix products": ("gemm", "::mm", "addmm", "bmm", "cutlass", "cublas", "xmma", "splitk"),
}


LAYERS = {    # of width H for sequences of length L; N = 64
    "S4": lambda H, L, backend: S4Block(H, 64, mode="dplr", backend=backend, l_max=L),
    "S4D": lambda H, L, backend: S4Block(H, 64, mode="diag", init="diag-lin", backend=backend, l_max=L),
    "LSSL": lambda H, L, backend: LSSL(H, 64),
    "LSTM": lambda H, L, backend: torch.nn.LSTM(H, H, batch_first=True),
    "attention": lambda H, L, backend: Attention(H),
}


@contextmanager
def computing_in(precision, device):
    "Inside, layers compute in a precision of PRECISIONS."
    before = torch.get_float32_matmul_precision()
    try:
        if precision == "tf32": torch.set_float32_matmul_precision("high")
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16"): yield
    finally: torch.set_float32_matmul_precision(before)


# ---- lengths ---------------------------------------------------------------------------------------------------------
def output(layer, u):
    "The output of a layer, none of its states."
    if isinstance(layer, SSMLayer): return layer(u, return_state=False)[0]
    return layer(u)[0] if isinstance(layer, torch.nn.LSTM) else layer(u)


def timed_runs(run, rounds, seconds, device):
    "Median milliseconds of a run by each clock, after one to warm up; no new round once `seconds` are over."
    start = time.monotonic()
    found = [clock(run, 1, device)]
    while len(found) <= rounds and time.monotonic() - start < seconds: found.append(clock(run, 1, device))
    return {k: digits(median(ms[k] for ms in found[1:] or found)) for k in found[0]}


def training_pass(name, backend, B, H, L, precision, device):
    "A function that runs a seeded layer forward and backward, to its input and to its parameters."
    torch.manual_seed(0)
    layer, u = LAYERS[name](H, L, backend).to(device), torch.randn(B, L, H, device=device, requires_grad=True)
    leaves = [u, *(p for p in layer.parameters() if p.requires_grad)]
    def run():
        with computing_in(precision, device):
            y = output(layer, u)
            return torch.autograd.grad(y, leaves, torch.ones_like(y), allow_unused=True)
    return run


def length_rows(plan, device, names, rates):
    """Forward and backward of each layer over the lengths of plan.reach, the number of tokens in a batch being the same.

    A layer whose next length would take longer than the seconds of the plan, time growing as it did last (at least
    as far as the length), ends there; so does one that cannot be run, as for want of memory. The row says why."""
    for precision in PRECISIONS[device]:
        for name in LAYERS: yield from over_lengths(name, precision, names[0], plan, device)


def over_lengths(name, precision, backend, plan, device):
    "The rows of one layer in one precision."
    tokens, H, lengths, seconds = plan.reach
    taken = []
    for L in lengths:
        row = {"layer": name, "precision": precision, "B": max(1, tokens // L), "H": H, "L": L}
        ahead = taken[-1] * max(1.0, taken[-1] / taken[-2]) / 1e3 if len(taken) > 1 else 0.0
        if ahead > seconds:
            yield row | {"left_out": f"would take about {ahead:.0f} s, after {taken[-1] / 1e3:.1f} s"}
            return
        if device == "cuda": torch.cuda.reset_peak_memory_stats()
        try:
            run = training_pass(name, backend, row["B"], H, L, precision, device)
            ms = timed_runs(run, plan.rounds, seconds / 4, device)
        except RuntimeError as error:
            yield row | {"left_out": first_line(error)}
            return
        memory = {"peak_mb": digits(torch.cuda.max_memory_allocated() / 2**20)} if device == "cuda" else {}
        taken.append(ms["wall"])
        yield row | {"pass_ms": ms, **memory}


# ---- parts -----------------------------------------------------------------------------------------------------------
def part_of(name):
    "The part of a block that a kernel of a GPU, or an operation on a CPU, belongs to."
    return next((part for part, words in PARTS.items() if any(word in name.lower() for word in words)), "pointwise")


def profiled(run, device, repeats=3):
    "{part: milliseconds of one run}: on a GPU of the kernels that ran there, on a CPU of the operations themselves."
    run()
    activity = {"cpu": ProfilerActivity.CPU, "cuda": ProfilerActivity.CUDA}[device]
    with profile(activities=[activity], acc_events=True) as recorded:
        for _ in range(repeats): run()
        if device == "cuda": torch.cuda.synchronize()
    spent = {part: 0.0 for part in (*PARTS, "pointwise")}
    for event in recorded.key_averages():
        own = event.self_cpu_time_total if device == "cpu" else event.self_device_time_total
        spent[part_of(event.key)] += own / 1e3 / repeats
    return {part: digits(ms) for part, ms in spent.items()}


def profile_rows(plan, device, names, rates):
    "The time of a block, forward and backward, in parts: what makes its kernel, FFTs, matrix products, and all else."
    for precision in PRECISIONS[device]:
        for name in ("S4", "S4D"):
            run = training_pass(name, names[0], *plan.profile, precision, device)
            size = dict(zip(("B", "H", "L"), plan.profile))
            yield {"layer": name, "precision": precision, **size, "part_ms": profiled(run, device)}


# ---- text ------------------------------------------------------------------------------------------------------------
def text_of(row):
    "A row of these tables as text."
    start = f"{row['layer']:10} {row['precision']:9} B={row['B']:<4} H={row['H']:<4} L={row['L']:<7}"
    if "left_out" in row: return f"{start} left out: {row['left_out']}"
    if "part_ms" in row: return start + "  ".join(f"{part} {ms:g} ms" for part, ms in row["part_ms"].items())
    memory = f"  peak {row['peak_mb']:g} MB" if "peak_mb" in row else ""
    return start + f"{row['pass_ms']['wall']:>9g} ms{memory}"
