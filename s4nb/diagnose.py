"""What this machine can do: versions, tools, devices, and every backend with "ok" or the real reason and the fix."""
import argparse
import ctypes
import importlib.metadata
import os
import platform
import re
import sys
import textwrap

import torch

import s4nb.build as build

from .ops.cauchy_sum import PREFERENCE, backends

OPTIONAL = {"pykeops": "keops", "triton": "", "lightning": "train", "hydra-core": "train", "torchvision": "train",
            "torchaudio": "train", "wandb": "wandb", "jupyterlab": "book"}    # and the extra that brings it


def version(name):
    "The installed version of a distribution, without importing it; None: it is not installed."
    try: return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError: return None


def packages():
    "Optional packages that are here, and the extras that would bring those that are not."
    have = [f"{name} {version(name)}" for name in OPTIONAL if version(name)]
    lack = [name + (f" (s4nb[{extra}])" if extra else "") for name, extra in OPTIONAL.items() if not version(name)]
    return ", ".join(have) + (f"; not installed: {', '.join(lack)}" if lack else "")


def first_line(command, pattern):
    "What `pattern` finds in the output of a command."
    found = re.search(pattern, build.run(command).stdout, re.M)
    return found[0] if found else "version unknown"


def compiler():
    try: command = build.find_compiler()
    except build.NotBuilt as e: return str(e)
    return f"{' '.join(command)}: {first_line([*command, '--version'], '^.+')}"


def nvcc():
    try: kit = build.find_toolkit(build.find_torch("cuda").root)
    except build.NotBuilt as e: return str(e)
    return f"{kit.nvcc} ({first_line([kit.nvcc, '--version'], 'release [0-9.]+')}), headers in {kit.include}"


def gpu():
    "The GPUs as torch sees them, and the driver."
    smi = build.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    driver = f"driver {smi.stdout.split()[0]}" if smi.returncode == 0 and smi.stdout.split() else "no NVIDIA driver"
    wants = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
    if not torch.cuda.is_available(): return f"none that torch sees; {driver}, {wants}"
    devices = range(torch.cuda.device_count())
    names = [torch.cuda.get_device_name(i) + " (sm_%d%d)" % torch.cuda.get_device_capability(i) for i in devices]
    return f"{', '.join(names)}; {driver}, {wants}"


def native(kind):
    "(state, 'ok' or the reason) of one native library."
    path, reason = build.library(kind)
    if path is None: return f"none: {reason}"
    if kind == "cuda": return str(path)
    try: name = ctypes.CDLL(str(path)).s4nb_instruction_set
    except (OSError, AttributeError) as e: return f"{path} cannot be used: {e}; compile it again: s4nb build --force"
    name.restype = ctypes.c_char_p
    return f"{path}, running {name().decode()} here"


def facts():
    "Lines about the machine: (name, text)."
    processor = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    chosen = [f"{k}={v}" for k, v in sorted(os.environ.items()) if k.startswith("S4NB_") or k in ("CXX", "CUDA_HOME")]
    return [
        ("s4nb", f"{version('s4nb') or '(not installed)'} in {build.HERE}"),
        ("Python", f"{platform.python_version()} on {platform.platform()}, torch {torch.__version__}"),
        ("packages", packages()),
        ("processor", processor),
        ("GPU", gpu()),
        ("compiler", compiler()),
        ("nvcc", nvcc()),
        ("CPU kernels", native("cpu")),
        ("CUDA kernels", native("cuda")),
        ("environment", " ".join(chosen) or "nothing set for s4nb"),
    ]


def keops_cache():
    return os.environ.get("KEOPS_CACHE_FOLDER") or os.path.expanduser(f"~/.cache/keops{version('keopscore') or '*'}")


def fix(backend, state):
    "What to do about a backend that is not ok; None: there is nothing to be done, or the reason says it."
    install = {"keops": 'pip install "s4nb[keops]"', "triton": "pip install triton"}
    if "No module named" in state: return install.get(backend)
    if backend == "keops": return f"KeOps compiles again once {keops_cache()} is deleted"
    if "wrong by" in state: return "please report it, with this text; PyTorch computes instead"


def states():
    "{device: {op: {backend: 'ok' or the reason}}} of the devices that are here."
    return {device: backends(device) for device in ["cpu"] + ["cuda"] * torch.cuda.is_available()}


def default(device, of):
    "The backend that an op takes on a device, given its states; None: there is none that works."
    order = [os.environ["S4NB_BACKEND"]] if os.environ.get("S4NB_BACKEND") else PREFERENCE.get(device, ["torch"])
    return next((b for b in order if of.get(b) == "ok"), None)


def examine():
    "(report as text, does everything work that is used by default?)"
    lines = [f"{name:13} " + textwrap.indent(text, " " * 14).strip() for name, text in facts()]
    reasons, good = {}, True
    for device, ops in states().items():
        names = list(dict.fromkeys(b for of in ops.values() for b in of))
        lines += ["", f"{device:28}" + "".join(f"{b:12}" for b in names) + "used"]
        for op, of in ops.items():
            def mark(b, s): return s if s == "ok" else f"no [{reasons.setdefault((b, s), len(reasons) + 1)}]"
            marks, used = {b: mark(b, s) for b, s in of.items()}, default(device, of)
            good = good and used is not None
            lines.append(f"  {op:26}" + "".join(f"{marks.get(b, '-'):12}" for b in names) + (used or "NONE"))
    for (backend, state), i in reasons.items():
        lines += ["" if i == 1 else None, f"[{i}] {backend}: " + textwrap.indent(state, "    ").strip()]
        if what := fix(backend, state): lines.append(f"    to change that: {what}")
    verdict = "Everything used by default works." if good else "There is an op without a backend that works: see NONE."
    return "\n".join([*(line for line in lines if line is not None), "", verdict]), good


def doctor(file=None):
    "Print what this machine can do: versions, tools, devices, each op's backends with 'ok' or the reason and the fix."
    print(examine()[0], file=file)


def main(arguments=None):
    "`s4nb doctor`: returns 0 if everything that is used by default works."
    argparse.ArgumentParser("s4nb doctor", description=doctor.__doc__).parse_args(arguments)
    if version("pykeops"): print("trying every backend; KeOps compiles for minutes the first time", file=sys.stderr)
    text, good = examine()
    print(text)
    return 0 if good else 1
