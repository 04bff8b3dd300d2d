"""What a device does at most, measured: float32 multiply-adds a second and bytes a second. Floors are made of these."""
import importlib.util

import torch

from .bench_time import Rates, clock, digits
from .ops.cauchy_sum import full_precision


def best_of(run, work, device, rounds=5):
    "Units of work a second, in the fastest of some rounds after one to warm up."
    clock(run, 1, device)
    return work / min(clock(run, 1, device)["wall"] for _ in range(rounds)) * 1e3


def by_matrices(device, n):
    "Multiply-adds a second in a float32 matrix product of size n."
    a, b = torch.randn(2, n, n, device=device)
    with full_precision(a.device): return best_of(lambda: a @ b, n**3, device)


def by_chains(device, steps=4096, BLOCK=1024):
    "Multiply-adds a second in registers: what no matrix library reaches, and no kernel exceeds."
    from .bench_triton import chains    # imports Triton, which takes seconds
    programs = 16 * torch.cuda.get_device_properties(device).multi_processor_count
    x = torch.randn(programs * BLOCK, device=device)
    return best_of(lambda: chains[(programs,)](x, 0.999, 0.001, steps, BLOCK), 16 * steps * x.numel(), device)


def by_copies(device, n):
    "Bytes a second, read and written, in a copy of n floats."
    x = torch.randn(n, device=device)
    y = torch.empty_like(x)
    return best_of(lambda: y.copy_(x), 8 * n, device)


def measured_rates(device, quick=False):
    "(Rates of the device, what each way measured): the best of the ways counts."
    n = 256 if quick else 2048 if device == "cpu" else 8192
    found = {"matrices": by_matrices(device, n), "copies": by_copies(device, n * n)}
    if device == "cuda" and importlib.util.find_spec("triton"): found["chains"] = by_chains(device)
    fma = max(found["matrices"], found.get("chains", 0))
    return Rates(fma, found["copies"]), {k: digits(x) for k, x in found.items()}
