"""A step of .ci/gpu into its card, beside those of earlier calls: gpu_card.py FOLDER STEP STATE LOG."""
import re
import sys
from pathlib import Path

import torch

from s4nb.training.record import commit, load_card, processor, save_card, versions

LINES = {"tests": 30, "keops": 5}    # the last ones that are kept; of other steps one


def main(folder, step, state, log):
    folder, said = Path(folder), Path(log).read_text(errors="replace").strip().splitlines()
    there = torch.cuda.is_available()
    facts = {"name": "gpu", "what": "what was built and checked on a GPU, step by step",
             "state": "measured" if there else "trial", "command": "the steps of .ci/gpu",
             "device": torch.cuda.get_device_name() if there else processor(),
             "cuda": torch.version.cuda, "capability": list(torch.cuda.get_device_capability()) if there else None}
    card = load_card(folder) if (folder / "card.json").exists() else {"steps": {}}
    last = [re.sub(r" in [0-9.]+s.*", "", line.strip("= ")) for line in said[-LINES.get(step, 1):]]
    card["steps"][step] = {"state": state, "commit": commit(), "said": [line.replace(str(Path.cwd()), ".") for line in last]}
    folder.mkdir(parents=True, exist_ok=True)
    save_card(folder, card | facts | {"versions": versions()})


main(*sys.argv[1:])
