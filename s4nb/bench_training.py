"""What the kernels are worth in training: steps a second of published models, and of the same with naive kernels."""
import argparse
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from torch.nn import functional as F

from .baselines import fft_conv, literal_sums
from .bench import instruction_set, memory_mb
from .bench_time import clock, digits, first_line
from .module import one_of
from .ops.cauchy_sum import usable
from .ssm.layer import SSMLayer
from .training.architectures import Facts
from .training.optimization import param_groups
from .training.record import commit, processor, save_card, versions
from .training.tables import EXPERIMENTS

WAYS = {    # compiled sums; sums in plain torch; the literal formula, with plain FFTs
    "cpu": ("native", "torch", "naive"),
    "cuda": ("native", "native, bfloat16", "triton", "torch", "naive"),
}


class Size(NamedTuple):
    "An experiment and what is changed of it; None: as published."
    experiment: str
    n_layers: int | None = None
    batch: int | None = None
    d_model: int | None = None
    length: int | None = None


class TrainingPlan(NamedTuple):
    """turns: sizes whose ways take turns; alone: sizes of our way only, for the estimates of notebook 77; apart: (size,
    ways), each way in a process of its own, which shows its memory."""
    rounds: int
    turns: tuple
    alone: tuple
    apart: tuple


MODELS = ("lra-listops", "lra-cifar", "sc35")
CHARACTERS = 128    # of texts whose vocabulary is counted when they are prepared
PUBLISHED = tuple(map(Size, ("lra-listops", "lra-imdb", "lra-aan", "lra-cifar", "lra-pathfinder", "lra-pathx", "sc35",
                             "cifar")))
ONE_LAYER = (Size("lra-listops", 1), Size("lra-cifar", 1), Size("sc35", 1, length=4000))    # steps of a few seconds
PLAN = TrainingPlan(3, (*ONE_LAYER, *(size._replace(batch=4) for size in ONE_LAYER)),
                    (Size("lra-pathx", 1, 1), Size("lra-pathx", 1, 2), Size("sc35", 1, 1, 16, 2**20)),
                    tuple((size, ("native", "naive")) for size in ONE_LAYER)
                    + tuple((Size(name), ("native",)) for name in MODELS))
GPU = TrainingPlan(5, PUBLISHED, (), ())
QUICK = TrainingPlan(1, tuple(Size(name, 1, 2, 4, 64) for name in MODELS), (Size("lra-pathx", 1, 1, 4, 64),),
                     ((Size("lra-cifar", 1, 4, 64, 1024), ("native", "naive")),))    # so large that counters show it


# ---- the naive way ---------------------------------------------------------------------------------------------------
def naive_convolve(layer, u, state, rate, warn):
    "SSMLayer.convolve as it is usually written: u (b h l) -> (b 1 h l), one channel in each direction, no state."
    l, K = u.shape[-1], layer.kernel(u.shape[-1], rate)[0]
    if layer.bidirectional:
        K, K_back = K.chunk(2)
        K = F.pad(K, (0, l)) + F.pad(K_back.flip(-1), (l, 0))
    return fft_conv(u, K, layer.D)


def with_sums(model, way):
    "The model with the sums and convolutions of a way of WAYS; it trains inside `literal_sums()`."
    for layer in [m for m in model.modules() if isinstance(m, SSMLayer)]:
        layer.kernel.options.backend = "literal" if way == "naive" else way.partition(",")[0]
        if way == "naive": layer.convolve = naive_convolve.__get__(layer)
    return model


# ---- a training step -------------------------------------------------------------------------------------------------
def settings(size):
    "(experiment, facts, batch, length) of a Size."
    e = EXPERIMENTS[size.experiment]
    facts = Facts.of(e.dataset.build())
    if facts.n_tokens is None and facts.d_input is None: facts = replace(facts, n_tokens=CHARACTERS)
    model = replace(e.model, n_layers=size.n_layers or e.model.n_layers, d_model=size.d_model or e.model.d_model)
    return replace(e, model=model), facts, size.batch or e.dataset.batch_size, size.length or facts.l_max


def training_step(size, way, device="cpu"):
    "A function that does one step of a seeded model on one batch (forward, backward, optimiser) and returns the loss."
    e, facts, b, l = settings(size)
    torch.manual_seed(0)
    model = with_sums(e.model.build(facts), way).to(device)
    for kernel in [m for m in model.modules() if hasattr(m, "set_length")]: kernel.set_length(l)    # as training does
    optimizer = e.optimizer.build(param_groups(model, e.optimizer.lr, e.optimizer.weight_decay))
    rows = 2 * b if facts.pairs else b
    x = torch.randint(facts.n_tokens, (rows, l)) if facts.n_tokens else torch.randn(rows, l, facts.d_input)
    lengths = torch.randint(l // 4, l + 1, (rows,)) if facts.n_tokens else None    # tokens are padded, as in ListOps
    y = torch.randint(facts.d_output, (b,)).to(device)
    x, lengths = x.to(device), None if lengths is None else lengths.to(device)

    def step():
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled="bfloat16" in way): logits = model(x, lengths=lengths)
        loss = F.cross_entropy(logits.float(), y)
        loss.backward()
        optimizer.step()
        return loss.item()
    return step


def described(size):
    "A Size as what is said of it in a row: the sizes of the step, and which of them are not as published."
    (e, _, b, l), (p, _, b_0, l_0) = settings(size), settings(Size(size.experiment))
    used = {"n_layers": e.model.n_layers, "batch": b, "d_model": e.model.d_model, "length": l}
    published = {"n_layers": p.model.n_layers, "batch": b_0, "d_model": p.model.d_model, "length": l_0}
    return {"experiment": size.experiment, **used, "published": {k: n for k, n in published.items() if n != used[k]}}


def compared(row):
    "The row with steps a second (of CPU time; on a GPU of wall time) and how many times faster than naive each way is."
    ms = {way: of.get("cpu") or of["wall"] for way, of in row["ms"].items()}
    faster = {way: digits(ms["naive"] / t) for way, t in ms.items() if "naive" in ms and way != "naive"}
    return row | {"steps_per_s": {way: digits(1e3 / t) for way, t in ms.items()}, "faster": faster}


def first_step(size, way, device):
    "(A training step that has run once, the MB of the GPU that it took), or (None, why it cannot be run)."
    if device == "cuda": torch.cuda.reset_peak_memory_stats()
    try:
        step = training_step(size, way, device)
        step()
    except RuntimeError as error: return None, first_line(error)
    return step, digits(memory_mb("VmHWM", device)) if device == "cuda" else None


def turns(size, ways, rounds, device="cpu"):
    "The row of a size whose ways took turns in this process, after one step each: medians. What cannot be run is told."
    with literal_sums():
        made = {way: first_step(size, way, device) for way in ways}
        steps = {way: step for way, (step, _) in made.items() if step}
        taken = [{way: clock(step, 1, device) for way, step in steps.items()} for _ in range(rounds)]
    ms = {way: {k: digits(median(of[way][k] for of in taken)) for k in taken[0][way]} for way in steps}
    row = {"ms": ms, "failed": {way: why for way, (step, why) in made.items() if not step}}
    if device == "cuda": row["peak_mb"] = {way: made[way][1] for way in steps}
    return compared(described(size) | {k: of for k, of in row.items() if of})


# ---- memory ----------------------------------------------------------------------------------------------------------
def peak(size, way):
    "Milliseconds of a training step, and the MB that model and step take beyond a process that has trained a tiny one."
    torch.set_num_threads(1)
    with literal_sums():
        training_step(Size(size[0], 1, 2, 4, 64), way)()
        start = memory_mb("VmRSS", "cpu")
        ms = {k: digits(t) for k, t in clock(training_step(Size(*size), way), 1, "cpu").items()}
    return {"ms": ms, "peak_mb": digits(memory_mb("VmHWM", "cpu") - start)}


def apart(size, ways):
    "The row of a size, each way in a process of its own."
    child = "import sys, json; from s4nb.bench_training import peak; print(json.dumps(peak(*json.loads(sys.argv[1]))))"
    found = {}
    for way in ways:
        done = subprocess.run([sys.executable, "-c", child, json.dumps([size, way])], capture_output=True, text=True)
        if done.returncode: raise RuntimeError(f"{size} could not be trained the {way} way:\n{done.stderr[-2000:]}")
        found[way] = json.loads(done.stdout.splitlines()[-1])
    row = {key: {way: of[key] for way, of in found.items()} for key in ("ms", "peak_mb")}
    return compared(described(size) | row)


# ---- the whole -------------------------------------------------------------------------------------------------------
def line(row):
    "A row as text."
    size = " ".join(f"{k}={row[k]}" for k in ("n_layers", "batch", "d_model", "length"))
    rates = "  ".join(f"{way} {rate:g}/s" + (f" ({row['faster'][way]:g}x naive)" if way in row["faster"] else "")
                      for way, rate in row["steps_per_s"].items())
    memory = "  peak " + ", ".join(f"{way} {mb:g} MB" for way, mb in row["peak_mb"].items()) if "peak_mb" in row else ""
    failed = "".join(f"  {way}: {why}" for way, why in row.get("failed", {}).items())
    return f"{row['experiment']:14} {size:50} {rates}{memory}{failed}"


def bench(plan, names, folder, card, device="cpu"):
    """Measure, print each row as it comes, write the card after each; it says `state` when all are there.

    One thread: its CPU time hardly depends on who else works."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    needed = {way: way.partition(",")[0] for way in WAYS[device] if way not in ("torch", "naive")}
    states = {b: next((s for op in ("cauchy", "dplr_spectrum") if (s := usable(op, b, device)) != "ok"), "ok")
              for b in needed.values()}
    for b, state in states.items():
        if state != "ok": print(f"without {b}: {state}")
    ways = [way for way in WAYS[device] if states.get(needed.get(way), "ok") == "ok"]
    def ours(asked): return list(dict.fromkeys(ways[0] if way == "native" else way for way in asked))
    tables = {"alone": lambda size: turns(size, ours(["native"]), plan.rounds, device),
              "turns": lambda size: turns(size, ways, plan.rounds, device),
              "apart": lambda row: apart(row[0], ours(row[1]))}
    print(f"{card['device']}; compiled kernels: {card['instruction_set']}; one thread, medians of {plan.rounds} rounds")
    for table, row_of in tables.items():
        card[table] = []
        for size in [s for s in getattr(plan, table) if (s if table != "apart" else s[0]).experiment in names]:
            card[table].append(row_of(size))
            print(line(card[table][-1]), flush=True)
            save_card(folder, card | {"state": "partial"})
    torch.set_num_threads(before)
    return save_card(folder, card)


def main(arguments=None):
    "`python -m s4nb.bench_training`: measure, print a line each, write card.json."
    parser = argparse.ArgumentParser("s4nb.bench_training", description=__doc__)
    known = list(dict.fromkeys(size.experiment for size in PLAN.turns + PLAN.alone + GPU.turns))
    parser.add_argument("--only", action="append", metavar="EXPERIMENT", help=f"repeat for more: {', '.join(known)}")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run? The numbers mean nothing")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda: whole models as published")
    parser.add_argument("--note", help="a remark for the card, such as what else the machine did")
    parser.add_argument("--out", help="folder of card.json (results/training; --only, --quick: results/tmp/training)")
    given = parser.parse_args(arguments)
    device = one_of("device of the training benchmark", given.device, ["cpu"] + ["cuda"] * torch.cuda.is_available())
    state = "trial" if given.quick or given.only else "measured"
    names = [one_of("experiment of the training benchmark", name, known) for name in given.only or known]
    plan = QUICK if given.quick else PLAN if device == "cpu" else GPU
    folder = Path(given.out or f"results/{'tmp/' * (state == 'trial')}training{'-cuda' * (device == 'cuda')}")
    card = {"name": "training", "state": state,
            "command": "python -m s4nb.bench_training" + (f" --device {device}" if device != "cpu" else ""),
            "what": f"training steps (forward, backward, optimiser) a {'CPU ' * (device == 'cpu')}second, one thread, "
                    "random batches; naive: literal sums under autograd, plain FFTs",
            "device": processor() if device == "cpu" else torch.cuda.get_device_name(),
            "instruction_set": instruction_set(), "threads": 1, "rounds": plan.rounds, "seed": 0,
            "commit": commit(), "versions": versions()} | ({"note": given.note} if given.note else {})
    folder.mkdir(parents=True, exist_ok=True)
    print(bench(plan, names, folder, card, device))
    return 0


if __name__ == "__main__":
    sys.exit(main())
