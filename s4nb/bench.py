"""What the kernels are worth on this machine: ratios of times taken in turns in one process, memory, and errors."""
import argparse
import ctypes
import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from .baselines import LITERAL, Attention, fft_conv, literal_sums
from .bench_lengths import computing_in, length_rows, profile_rows, text_of
from .bench_rates import measured_rates
from .bench_time import BOTH, Case, digits, forward, passes, timed, title_of
from .build import library
from .module import one_of
from .ops.cauchy_sum import OPS, PREFERENCE, cauchy, usable
from .ops.convolution import long_conv
from .ops.vandermonde_sum import log_vandermonde
from .s4.block import S4Block
from .s4.fused import fast_diag_step, fast_dplr_step, fast_spectrum
from .s4.generating import discrete_real, nodes
from .s4.nplr import nplr
from .ssm.krylov import krylov
from .training.record import commit, processor, save_card, versions

KINDS = {"S4": {"mode": "dplr"}, "S4D": {"mode": "diag", "init": "diag-lin"}}
FASTER = {    # how many times faster than the baseline the native way should be on a CPU
    f"Cauchy sum, {BOTH}, H=64 L=4096 N=64": 60,
    f"Cauchy sum, {BOTH}, H=32 L=16384 N=64": 80,
    f"Vandermonde sum, {BOTH}, H=64 L=4096 N=64": 55,
    f"Vandermonde sum, {BOTH}, H=32 L=16384 N=64": 90,
    f"S4 kernel, {BOTH}, H=64 L=4096 N=64": 20,
    f"S4 block, {BOTH}, B=8 H=128 L=1024": 4,
    f"S4D block, {BOTH}, B=8 H=128 L=1024": 2.5,
    **{f"{kind} {what}, B={B} H=256": 2.5 for kind in KINDS for what in ("step", "block step") for B in (1, 16)},
}
FASTER_ON_GPU = {f"{kind} block, {BOTH}, B=16 H=256 L=16384": 1.5 for kind in KINDS}    # than plain torch
OF_FLOOR = {"DPLR spectrum, forward, H=256 L=16384 N=64": 0.6, "Vandermonde sum, forward, H=256 L=16384 N=64": 0.5}
MOST = {"peak_mb": 500, "forward": 2e-6, "backward": 1e-5}    # native kernel of LARGE; relative errors in complex64
LARGE = (256, 16384, 64)
MANY_THREADS = ("block", "length", "profile")
RANK = {"legt": 2}    # of the low-rank terms, where it is not 1


class Plan(NamedTuple):
    "What is measured: sums and kernels of sizes (h, l, n), convolutions and blocks (b, h, l), steps (b, h)."
    rounds: int = 5
    slice_ms: float = 20.0      # what is shorter is repeated within its turn
    spectra: tuple = ((64, 4096, 64),)
    sums: tuple = ((128, 1024, 64), (64, 4096, 64), (32, 16384, 64), (64, 4096, 16), (64, 4096, 256))
    kernels: tuple = ((64, 1024, 64), (64, 4096, 64), (256, 4096, 64))
    convolutions: tuple = ((8, 128, 1024), (8, 128, 4096), (2, 128, 16384))
    parts: tuple = (8, 128, 1024)
    blocks: tuple = ((8, 128, 256), (8, 128, 1024), (8, 128, 4096))
    steps: tuple = ((1, 256), (16, 256))
    memory: tuple = tuple((b, kind, 8 if b == "literal" else 256, *size)    # literal: bytes are proportional to h
                          for kind in KINDS for b in ("native", "triton", "torch", "literal")
                          for size in ((1024, 64), (4096, 64), (16384, 16), (16384, 64), (16384, 256)))
    lengths: tuple = (256, 1024, 4096, 16384)
    measures: tuple = ("legs", "legt", "fourier")
    reach: tuple = (2**14, 64, (256, 1024, 4096, 16384), 10.0)    # tokens, h, lengths, seconds that a run may take
    profile: tuple = (2, 128, 4096)
    compiled: tuple | None = None    # the block (b, h, l) that is tried with a compiler, and in bfloat16, too


QUICK = Plan(1, 0.1, ((2, 64, 8),), ((2, 64, 8),), ((2, 64, 8),), ((2, 2, 64),), (2, 4, 32), ((2, 4, 32),), ((2, 4),),
             (("torch", "S4D", 4, 64, 8),), (64,), ("legs",), (128, 4, (32, 128), 10.0), (2, 4, 64))
WIDE = ((256, 1024, 64), (256, 4096, 64), (256, 16384, 64))
BATCHES = tuple((16, 256, L) for L in (1024, 4096, 16384))
GPU = Plan(spectra=WIDE, sums=(*WIDE, (256, 4096, 16), (256, 4096, 256)), kernels=WIDE, convolutions=BATCHES,
           parts=BATCHES[-1], blocks=BATCHES, reach=(2**18, 256, (2**10, 2**12, 2**14, 2**16, 2**18), 10.0),
           profile=BATCHES[-1], compiled=BATCHES[-1])


# ---- what is timed ---------------------------------------------------------------------------------------------------
def sums(measure, H, L, N, device):
    """{op: (the sum of v, poles, backend; v; poles)} for HiPPO's poles times step sizes from 1e-3 to 1e-1, v complex64;
    poles: complex64, but exponents of powers stay complex128."""
    torch.manual_seed(0)
    w, dt = nplr(measure, N, RANK.get(measure, 1))[0], torch.logspace(-3, -1, H, dtype=torch.float64)[:, None]
    w = (dt * torch.complex(w.real.clamp(max=-1e-4), w.imag)).to(device)
    v, z = torch.randn(H, N // 2, dtype=torch.complex64).to(device), nodes(L, torch.complex64, device)
    return {"Cauchy sum": (lambda v, w, b: cauchy(v, z.to(v.dtype), w, backend=b), v, w.to(v.dtype)),
            "Vandermonde sum": (lambda v, x, b: log_vandermonde(v, x, L, backend=b), v, w)}


def make_block(kind, backend, H, device, N=64, l_max=None):
    torch.manual_seed(0)
    return S4Block(H, N, **KINDS[kind], backend=backend, l_max=l_max).to(device)


def kernels(kind, names, H, L, N, device):
    "{backend: (its kernel of length L, the parameters)}."
    made = {b: make_block(kind, b, H, device, N, L).kernel for b in names}
    return {b: (lambda k=k: k(L)[0], list(k.parameters())) for b, k in made.items()}


def base_of(device):
    "What ways are compared with: on a GPU plain torch, as tables of all pairs may not fit there."
    return "literal" if device == "cpu" else "torch"


def spectra(names, H, L, N, device):
    "{backend: (the spectrum of a DPLR kernel of rank 1, its four numerators and poles)}, for HiPPO-LegS."
    w = sums("legs", H, L, N, device)["Vandermonde sum"][2].requires_grad_()
    v = torch.randn(H, 2, 2, N // 2, dtype=w.dtype, device=device, requires_grad=True)
    return {b: (partial(fast_spectrum, v, w, L, 1, torch.complex64, b), [v, w]) for b in names}


def kernel_cases(plan, device, names):
    base = base_of(device)
    for H, L, N in plan.spectra: yield from passes("DPLR spectrum", spectra(names, H, L, N, device), base, H=H, L=L, N=N)
    for H, L, N in plan.sums:
        for what, (f, *leaves) in sums("legs", H, L, N, device).items():
            for x in leaves: x.requires_grad_()
            yield from passes(what, {b: (partial(f, *leaves, b), leaves) for b in names}, base, H=H, L=L, N=N)
    for H, L, N in plan.kernels:
        for kind in KINDS:
            yield from passes(f"{kind} kernel", kernels(kind, names, H, L, N, device), base, H=H, L=L, N=N)


def convolution_cases(plan, device, names):
    for B, H, L in plan.convolutions:
        leaves = [torch.randn(*shape, device=device, requires_grad=True) for shape in ((B, H, L), (1, H, L), (1, H))]
        ours = partial(lambda u, K, D: long_conv(u, K, D=D), *leaves)
        ways = {"long_conv": (ours, leaves), "torch.fft": (partial(fft_conv, *leaves), leaves)}
        yield from passes("convolution", ways, "torch.fft", B=B, H=H, L=L)
    B, H, L = plan.parts
    for kind in KINDS:
        ways = parts(kind, names, B, H, L, device)
        yield from passes(f"parts of the {kind} block", ways, "block", True, B=B, H=H, L=L)


def parts(kind, names, B, H, L, device):
    "The parts of a block (the kernel by each backend), and the whole with the first backend."
    block, u = make_block(kind, names[0], H, device, l_max=L), torch.randn(B, L, H, device=device, requires_grad=True)
    K, y = (torch.randn(*shape, device=device, requires_grad=True) for shape in ((1, H, L), (B, L, 1, H)))
    return {**{f"kernel {b}": way for b, way in kernels(kind, names, H, L, 64, device).items()},
            "convolution": (lambda: long_conv(u.transpose(1, 2), K, D=block.D), [u, K, block.D]),
            "pointwise": (lambda: block.output(y, u.dtype), [y, *block.mix.parameters()]),
            "block": (lambda: block(u, return_state=False)[0], [u, *block.parameters()])}


def block_cases(plan, device, names):
    "S4 blocks by each backend; the best of them beside an LSTM and attention."
    for B, H, L in plan.blocks:
        u = torch.randn(B, L, H, device=device, requires_grad=True)
        def ways(run, modules): return {n: (partial(run, m), [u, *m.parameters()]) for n, m in modules.items()}
        def ours(m): return m(u, return_state=False)[0]
        blocks = {kind: {b: make_block(kind, b, H, device, l_max=L) for b in names} for kind in KINDS}
        for kind in KINDS:
            yield from passes(f"{kind} block", ways(ours, blocks[kind]), base_of(device), True, B=B, H=H, L=L)
            if (B, H, L) == plan.compiled and kind == "S4":      # a compilation takes half a minute
                size = {"B": B, "H": H, "L": L}
                yield Case(f"{kind} block, variants", variants(blocks[kind][names[0]], u), "float32", size)
        best = {kind: blocks[kind][names[0]] for kind in KINDS}
        best["S4 without l_max"] = make_block("S4", names[0], H, device)
        lstm, attention = torch.nn.LSTM(H, H, batch_first=True).to(device), Attention(H).to(device)
        others = ways(lambda m: m(u)[0], {"LSTM": lstm}) | ways(lambda m: m(u), {"attention": attention})
        yield from passes("equal width", ways(ours, best) | others, "attention", True, B=B, H=H, L=L)


def variants(block, u):
    "More ways to run the best block: pointwise parts fused by a compiler, matrix products in TF32, all in bfloat16."
    compiled, leaves = torch.compile(block), [u, *block.parameters()]
    def whole(run, precision):
        with computing_in(precision, u.device.type):
            y = run(u.to(torch.bfloat16) if precision == "bfloat16" else u, return_state=False)[0]
            return torch.autograd.grad(y, leaves, torch.ones_like(y))
    ways = {precision: partial(whole, block, precision) for precision in ("float32", "tf32", "bfloat16")}
    return ways | {f"{precision}, compiled": partial(whole, compiled, precision) for precision in ("tf32", "bfloat16")}


def step_cases(plan, device, names):
    "Without gradients: the op alone, the kernel's step, which looks after the terms of the op, and the block's."
    names = [b for b in names if b in OPS["dplr_step"].backends]
    for B, H in plan.steps:
        for kind, op in {"S4": fast_dplr_step, "S4D": fast_diag_step}.items():
            blocks = {b: make_block(kind, b, H, device) for b in names}
            u, state = torch.randn(B, H, device=device), torch.randn_like(blocks["torch"].default_state(B))
            terms = forward(blocks["torch"].kernel.step_terms)
            levels = {"step op": {b: partial(op, *terms, u, state, b) for b in names},
                      "step": {b: partial(x.kernel.step, u, state) for b, x in blocks.items()},
                      "block step": {b: partial(x.step, u, state) for b, x in blocks.items()}}
            for what, ways in levels.items():
                ways = {b: partial(forward, f) for b, f in ways.items()}
                yield Case(f"{kind} {what}", ways, "torch", {"B": B, "H": H})


# ---- memory ----------------------------------------------------------------------------------------------------------
def memory_mb(field, device):
    "VmRSS (now) or VmHWM (the most so far) of this process; on a GPU, what torch has allocated there."
    if device == "cpu": return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) / 1024
    return {"VmRSS": torch.cuda.memory_allocated, "VmHWM": torch.cuda.max_memory_allocated}[field]() / 2**20


def peak(backend, kind, H, L, N, device):
    """MB over what a fresh process has after its imports, or over what is allocated on a GPU: the most that making a
    kernel, forward and backward take, the same of the smallest kernel, what of it is saved for backward, and output."""
    torch.set_num_threads(1)
    start, saved = memory_mb("VmRSS", device), {}
    def keep(x):
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes() / 2**20
        return x
    def run(H, L, N):
        if device == "cuda": torch.cuda.reset_peak_memory_stats()
        kernel = make_block(kind, backend, H, device, N, L).kernel
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x): K = kernel(L)[0]
        K.square().sum().backward()
        for p in kernel.parameters(): saved.pop(p.untyped_storage().data_ptr(), 0)
        return memory_mb("VmHWM", device) - start, K.nbytes / 2**20
    with literal_sums():
        floor, _ = run(1, 8, 4)
        saved.clear()
        most, output = run(H, L, N)
    sizes = map(digits, (most, floor, sum(saved.values()), output))
    return dict(zip(("peak_mb", "floor_mb", "saved_mb", "output_mb"), sizes))


def memory_rows(plan, device, names, rates):
    "Peak memory: of a CPU each in a process of its own, of a GPU by torch's count, which can be set back."
    for way in [way for way in plan.memory if way[0] in names]:
        goal = {"goal": MOST["peak_mb"]} if device == "cpu" and way[0] == "native" and way[2:] == LARGE else {}
        found = apart(*way, device) if device == "cpu" else peak(*way, device)
        yield {**dict(zip(("backend", "kernel", "H", "L", "N"), way)), **found, **goal}


def apart(*way):
    "`peak` in a process of its own."
    child = "import sys, json; from s4nb.bench import peak; print(json.dumps(peak(*json.loads(sys.argv[1]))))"
    done = subprocess.run([sys.executable, "-c", child, json.dumps(way)], capture_output=True, text=True)
    if done.returncode: raise RuntimeError(f"the memory of {way} could not be measured:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout)


# ---- errors ----------------------------------------------------------------------------------------------------------
def worst(got, want):
    "The largest relative L2 error of a feature."
    return digits(float(((got.to(want.dtype) - want).norm(dim=-1) / want.norm(dim=-1)).max()))


def with_grads(f, leaves):
    "The value of f and its gradients, for a seeded gradient of the output."
    leaves = [x.detach().requires_grad_() for x in leaves]
    y = f(*leaves)
    g = torch.randn(y.shape, dtype=torch.complex128, generator=torch.Generator().manual_seed(1)).to(y.device)
    return [y.detach(), *torch.autograd.grad(y, leaves, (g if y.is_complex() else g.real).to(y.dtype))]


@torch.no_grad()
def kernel_error(measure, L, backend, device):
    "The float32 kernel of S4 against the float64 Krylov sequence c A^l b of the same parameters."
    torch.manual_seed(0)
    kernel = S4Block(8, 64, init=measure, rank=RANK.get(measure, 1), backend=backend).to(device).kernel
    (Lambda, P, B, dt), C = kernel.system(), kernel.true_C()[0].to(torch.complex128)
    return worst(kernel(L)[0][0], krylov(*discrete_real(Lambda, P, B, dt), 2 * torch.cat([C.real, -C.imag], -1), L))


def accuracy_rows(plan, device, names, rates):
    "complex64 against the literal formula in complex128 with the same arguments; N = 64, the worst of 8 step sizes."
    for measure, L in [(m, L) for m in plan.measures for L in plan.lengths]:
        for what, (f, *leaves) in sums(measure, 8, L, 64, device).items():
            want = with_grads(partial(f, b="literal"), [x.to(torch.complex128) for x in leaves])
            for b in names:
                value, *grads = [worst(x, y) for x, y in zip(with_grads(partial(f, b=b), leaves), want)]
                yield {"what": what, "measure": measure, "L": L, "backend": b, "forward": value, "backward": max(grads)}
        for b in names:
            error = kernel_error(measure, L, b, device)
            yield {"what": "S4 kernel", "measure": measure, "L": L, "backend": b, "forward": error}


# ---- the whole -------------------------------------------------------------------------------------------------------
TABLES = {"kernel": timed(kernel_cases), "convolution": timed(convolution_cases), "block": timed(block_cases),
          "step": timed(step_cases), "memory": memory_rows, "accuracy": accuracy_rows,
          "length": length_rows, "profile": profile_rows}


def verdict(goal, reached): return f" (goal {goal:g}: {'reached' if reached else 'NOT reached'})"


def judged(row, device):
    "The row with its goals, if it has any: how many times faster than the base, and what share of the floor."
    faster = FASTER if device == "cpu" else FASTER_ON_GPU
    goals = {"goal": faster.get(row["title"]), "floor_goal": OF_FLOOR.get(row["title"]) if device == "cuda" else None}
    return row | {k: x for k, x in goals.items() if x is not None and "native" in row["ms"]}


def line(row):
    "One row as text, with its goals. Of the ratios of CPU time and of wall time the lower one counts."
    if "ms" in row: return line_of_times(row)
    if "layer" in row: return text_of(row)
    if "peak_mb" in row:
        text = ("{kernel:4} {backend:8} H={H:<4} L={L:<6} N={N:<4} peak {peak_mb:>6g} MB"
                "  saved {saved_mb:>8g} MB  output {output_mb:g} MB").format(**row)
        return text + (verdict(row["goal"], row["peak_mb"] <= row["goal"]) if "goal" in row else "")
    asked, errors = row["what"] != "S4 kernel" and row["backend"] != "literal", [k for k in MOST if k in row]
    text = "  ".join(f"{k} {row[k]:.1e}" + (verdict(MOST[k], row[k] <= MOST[k]) if asked else "") for k in errors)
    return f"{row['what']:16} {row['measure']:8} L={row['L']:<6} {row['backend']:8} {text}"


def line_of_times(row):
    "A row of times: the base, each way's ratio to it, the floor and the shares of it, and what failed."
    least = {n: min(of.values()) for n, of in row["faster"].items()}
    said = {n: verdict(row["goal"], x >= row["goal"]) for n, x in least.items() if n == "native" and "goal" in row}
    base, ways = row["base"], [f"{n} {x:g}x{said.get(n, '')}" for n, x in least.items()]
    parts = [f"{base} {row['ms'][base]['wall']:g} ms" if base in row["ms"] else f"{base} failed", *ways]
    if "floor_ms" in row:
        shares = "  ".join(f"{n} {100 * x:.0f} %" for n, x in row["of_floor"].items())
        parts.append(f"floor {row['floor_ms']:g} ms: {shares}")
    if "floor_goal" in row: parts[-1] += verdict(row["floor_goal"], row["of_floor"].get("native", 0) >= row["floor_goal"])
    parts += [f"{n}: no {what} ({why})" for n, of in row.get("failed", {}).items() for what, why in of.items()]
    return f"{row['title']:58} " + "  ".join(parts)


def instruction_set():
    "The one that the compiled CPU kernels use here, or 'none'."
    path, _ = library("cpu")
    if path is None: return "none"
    name = ctypes.CDLL(str(path)).s4nb_instruction_set
    name.restype = ctypes.c_char_p
    return name().decode()


def found_backends(device, keops):
    "Those that work on the device, the best first; says why the others don't."
    asked = [b for b in PREFERENCE[device] if b != "keops" or keops]
    states = {b: next((s for op in LITERAL if (s := usable(op, b, device)) != "ok"), "ok") for b in asked}
    for b in asked:
        if states[b] != "ok": print(f"without {b}: {states[b]}")
    return [b for b in asked if states[b] == "ok"]


def bench(tables, plan, device, threads=None, keops=False, keep=lambda card: None):
    "Measure the named tables, print each row as it comes, return the card; `keep` gets what there is after each table."
    machine, before = processor() if device == "cpu" else torch.cuda.get_device_name(), torch.get_num_threads()
    used = {t: threads or (before if t in MANY_THREADS else 1) for t in tables}
    print(f"{machine}; compiled CPU kernels: {instruction_set()}; in turns, medians of {plan.rounds}")
    names = found_backends(device, keops)
    rates, found = measured_rates(device, plan == QUICK) if device == "cuda" or plan == QUICK else (None, {})
    card = {"name": "kernels", "state": "measured", "command": "s4nb bench", "seed": 0, "device": machine,
            "instruction_set": instruction_set(), "threads": used, "backends": names, "rates": found, "commit": commit(),
            "versions": versions()}
    for what, rate in found.items():
        print(f"{what}: {rate / 1e9:g} G {'bytes' if what == 'copies' else 'multiply-adds'} a second")
    with literal_sums():
        for table in tables:
            print(f"\n{table}, {used[table]} thread(s)")
            torch.set_num_threads(used[table])
            card[table] = []
            for row in TABLES[table](plan, device, [*names, "literal"], rates):
                card[table].append(judged(row, device) if "ms" in row else row)
                print(line(card[table][-1]), flush=True)
            keep(card)
    torch.set_num_threads(before)
    return card


def failed(card):
    "Titles of what should have run and did not; a way without memory or without a graph is no failure."
    rows = [row for table in TABLES for row in card.get(table, []) if "failed" in row]
    said = {row["title"]: [of["run"] for of in row["failed"].values() if "run" in of] for row in rows}
    return [title for title, reasons in said.items() if any("out of memory" not in why for why in reasons)]


def main(arguments=None):
    "`s4nb bench`: measure, print the tables, write card.json; returns 1 if something failed that should have run."
    parser = argparse.ArgumentParser("s4nb bench", description=__doc__)
    parser.add_argument("--only", action="append", metavar="TABLE", help=f"repeat for more: {', '.join(TABLES)}")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run? The numbers mean nothing")
    parser.add_argument("--device", help="cpu or cuda (default: all that are here)")
    parser.add_argument("--threads", type=int, help="for every table (default: torch's own number for blocks, else 1)")
    parser.add_argument("--keops", action="store_true", help="KeOps too; it compiles for minutes the first time")
    parser.add_argument("--out", help="folder of card.json (results/kernels; --only, --quick: results/tmp/kernels)")
    given = parser.parse_args(arguments)
    state = "trial" if given.quick or given.only else "measured"
    here = ["cpu"] + ["cuda"] * torch.cuda.is_available()
    tables, broken = [one_of("table of s4nb bench", t, TABLES) for t in given.only or TABLES], []
    for device in [one_of("device of s4nb bench", given.device, here)] if given.device else here:
        folder = Path(given.out or f"results/{'tmp/' * (state == 'trial')}kernels")
        if device == "cuda": folder = folder.with_name(f"{folder.name}-cuda")
        folder.mkdir(parents=True, exist_ok=True)
        plan = QUICK if given.quick else Plan() if device == "cpu" else GPU
        def keep(card, folder=folder): save_card(folder, card | {"state": "partial"})
        card = bench(tables, plan, device, given.threads, given.keops, keep)
        print(f"\n{save_card(folder, card | {'state': state})}")
        broken += failed(card)
    for title in broken: print(f"failed: {title}")
    return 1 if broken else 0
