"""How fast data arrive: seconds and memory to prepare a task, and its loader against the smallest model that trains on it."""
import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.nn import functional as F

from .data.base import data_root
from .data.tasks import TASKS, task
from .models.backbone import SequenceModel
from .models.coders import Decoder, LinearEncoder, Model, TokenEncoder
from .module import one_of
from .s4.block import S4Block
from .training.record import commit, processor, save_card, versions

GOAL = 5                # a loader should feed so many times what the smallest model consumes
OPTIONS = {             # what is made here is made in these sizes; everything else is taken whole
    "lra-pathfinder": {"n": 2000}, "pathfinder64": {"n": 300}, "lra-pathx": {"n": 300}, "pathfinder256": {"n": 100},
    "sc-twin": {"takes": 1}, "sc10-twin": {"takes": 1},
}


def batches_of(data, seconds, batch_size=32):
    "Batches of the training loader for some CPU seconds, after one epoch's start: (batches kept, examples a second)."
    loader, kept, n = data.loader("train", batch_size), [], 0
    next(iter(loader))
    start = time.process_time()
    while (spent := time.process_time() - start) < seconds:
        for batch in loader:
            n += len(batch.y)
            if len(kept) < 8: kept.append(batch)
            if (spent := time.process_time() - start) >= seconds: break
    return kept, n / spent


def smallest_model(data):
    "One S4D layer of width 16 and state size 4 between encoder and decoder: less is no model of sequences."
    encoder = TokenEncoder(data.n_tokens, 16) if data.n_tokens else LinearEncoder(data.d_input, 16)
    layer = lambda i: S4Block(16, d_state=4, mode="diag", init="diag-lin", l_max=data.l_max)
    return Model(encoder, SequenceModel(16, 1, layer), Decoder(16, data.d_output, "pool"))


def consumption(data, batches, seconds):
    "Examples a CPU second that the smallest model trains on: forward, backward, step."
    model = smallest_model(data)
    optimizer, n, start = torch.optim.AdamW(model.parameters()), 0, None
    while start is None or time.process_time() - start < seconds:
        for x, y, lengths, rate in batches:
            out = model(x, lengths=lengths, rate=rate)
            out.square().mean().backward()          # any loss does; those of the tasks cost nothing beside the layer
            optimizer.step(), optimizer.zero_grad()
            n += len(y)
        if start is None: n, start = 0, time.process_time()
    return n / (time.process_time() - start)


def measure(name, seconds):
    "One task in this process, prepared in an empty cache: a row of the card."
    torch.set_num_threads(1)
    data, options = task(name, **OPTIONS.get(name, {})), OPTIONS.get(name, {})
    row = {"task": name, "options": options, "from": data.state().partition(":")[0].split(" ")[0]}
    memory = lambda who=resource.RUSAGE_SELF: resource.getrusage(who).ru_maxrss / 1024
    before, wall, cpu = memory(), time.monotonic(), os.times()
    data.prepare().dataset("train")
    used = [b - a for a, b in zip(cpu, os.times())]
    row |= {"prepare_wall_s": round(time.monotonic() - wall, 2), "prepare_cpu_s": round(sum(used[:4]), 2),
            "examples": sum(len(data.dataset(s)) for s in ("train", "val", "test"))}
    batches, loaded = batches_of(data, seconds)
    row |= {"peak_mb": round(memory() - before), "largest_worker_mb": round(memory(resource.RUSAGE_CHILDREN)),
            "disk_mb": round(sum(p.stat().st_size for p in data_root().rglob("*") if not p.is_symlink() and p.is_file()) / 1e6, 1)}
    trained = consumption(data, batches, seconds)
    return row | {"length": int(sum(b.x.shape[1] for b in batches) / len(batches)), "loader_per_s": round(loaded),
                  "model_per_s": round(trained), "ratio": round(loaded / trained, 1)}


def isolated(name, seconds, archives):
    "`measure` in a process of its own, DATA_PATH an empty folder with links to the archives of the real one."
    with tempfile.TemporaryDirectory() as root:
        for archive in archives: os.symlink(archive, Path(root) / archive.name)
        state = "import sys; from s4nb.data.tasks import task; print(task(sys.argv[1]).state())"
        run = lambda *args: subprocess.run([sys.executable, *args], env=os.environ | {"DATA_PATH": root, "OMP_NUM_THREADS": "1"},
                                           capture_output=True, text=True)
        found = run("-c", state, name)
        if found.returncode == 0 and found.stdout.startswith(("download", "missing")):
            return {"task": name, "not_run": found.stdout.strip().replace(root, "DATA_PATH")}
        done = run("-m", "s4nb.bench_data", "--one", name, "--seconds", str(seconds))
        if done.returncode: return {"task": name, "failed": done.stderr.strip().splitlines()[-1].replace(root, "DATA_PATH")}
        return json.loads(done.stdout.splitlines()[-1])


def line(row):
    "A row as text."
    if "ratio" not in row: return f"{row['task']:24} {row.get('not_run') or 'FAILED: ' + row['failed']}"
    reached = "" if row["ratio"] >= GOAL else f"  (goal {GOAL}: NOT reached)"
    return (f"{row['task']:24} {row['examples']:8,} examples prepared in {row['prepare_wall_s']:7.1f} s, {row['peak_mb']:5} MB, "
            f"{row['disk_mb']:7.1f} MB on disk; loader {row['loader_per_s']:8,}/s, model {row['model_per_s']:6,}/s: "
            f"{row['ratio']:.1f}x{reached}")


def main(arguments=None):
    "`python -m s4nb.bench_data`: measure tasks, print a line each, write card.json."
    parser = argparse.ArgumentParser("s4nb.bench_data", description=__doc__)
    parser.add_argument("--only", action="append", metavar="TASK", help="repeat for more (default: every task)")
    parser.add_argument("--seconds", type=float, default=3.0, help="CPU seconds for each of the two rates")
    parser.add_argument("--out", help="folder of card.json (results/data; with --only: results/tmp/data)")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.one:
        print(json.dumps(measure(given.one, given.seconds)))
        return 0
    names = [one_of("task", name, TASKS) for name in given.only or TASKS]
    archives, rows = [p.absolute() for p in data_root().glob("*.*") if p.name.endswith((".gz", ".xz", ".zip"))], []
    for name in names:
        rows.append(isolated(name, given.seconds, archives))
        print(line(rows[-1]), flush=True)
    card = {"name": "data", "state": "trial" if given.only else "measured", "device": processor(), "threads": 1,
            "commit": commit(), "versions": versions(), "goal": GOAL, "rows": rows}
    folder = Path(given.out or f"results/{'tmp/' * bool(given.only)}data")
    folder.mkdir(parents=True, exist_ok=True)
    print(save_card(folder, card))
    return 0


if __name__ == "__main__":
    sys.exit(main())
