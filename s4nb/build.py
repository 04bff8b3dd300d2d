"""Compiles the native kernels with the tools of this machine, finds them again, and keeps the reason when that fails.

The standard library is enough, so that setup.py and make can run this file by its path, with or without torch. Nothing
here breaks anything: a library that is not there is a reason in one line, and PyTorch computes instead."""
import argparse
import hashlib
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
LIBRARIES = {"cpu": "_C", "cuda": "_cuda"}
NAMES = {"cpu": "CPU", "cuda": "CUDA"}
SUFFIXES = {"cpu": (".h", ".cpp"), "cuda": (".h", ".cuh", ".cu")}
HEADERS = (".h", ".cuh")
CHOICES = {"auto": ("cpu", "cuda"), "none": (), "cpu": ("cpu",), "cuda": ("cpu", "cuda")}

TORCH = (2, 10)    # the first with the parts of the stable ABI that the sources use
COMMON = ["-O3", "-std=c++17", f"-DTORCH_TARGET_VERSION=0x{TORCH[0]:02x}{TORCH[1]:02x}000000000000"]
CXX_FLAGS = COMMON + ["-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
NVCC_FLAGS = COMMON + ["-Xcompiler=-fPIC,-fvisibility=hidden", "-cudart=static", "-res-usage", "-t=2", "-DUSE_CUDA"]
COMPILERS = ("c++", "g++", "clang++")
ARCHITECTURES = "8.0;9.0+PTX"
INSTRUCTION_SETS = {"base": [], "avx2": ["-mavx2", "-mfma"],
                    "avx512": "-mavx512f -mavx512dq -mavx512bw -mavx512vl -mfma -mprefer-vector-width=512".split()}


class NotBuilt(Exception):
    "Why there is no library. `missing`: the machine lacks something; else `command` failed, and `log` is what it said."
    def __init__(self, reason, missing=True, command=(), log=""):
        super().__init__(reason)
        self.missing, self.command, self.log = missing, shlex.join(map(str, command)), log


# ---- where things are -----------------------------------------------------------------------------------------------
def packaged(): return (HERE / "_sources").is_dir()
def how(): return "s4nb build" if packaged() else "make kernels"


def source_folder():
    "The sources: inside an installed package, beside the package in a checkout."
    return HERE / "_sources" if packaged() else HERE.parent / "extensions" / "structured_kernels"


def source_files(kind, folder=None):
    others = "cpu_" if kind == "cuda" else "cuda_"
    found = Path(folder or source_folder()).glob("*")
    return sorted(f for f in found if f.suffix in SUFFIXES[kind] and not f.name.startswith(others))


def source_hash(kind, folder=None):
    "A digest of the sources of one kind. The library holds it too, so that a stale one is recognised."
    files = source_files(kind, folder)
    if not any(f.suffix not in HEADERS for f in files):
        raise NotBuilt(f"there are no {NAMES[kind]} sources in {folder or source_folder()}; install s4nb again")
    return hashlib.sha256(b"".join(f.name.encode() + b"\0" + f.read_bytes() for f in files)).hexdigest()[:16]


def cache(kind, folder=None):
    "The user's folder for libraries that were compiled after an installation."
    named = os.environ.get("S4NB_CACHE") or os.environ.get("XDG_CACHE_HOME") and os.environ["XDG_CACHE_HOME"] + "/s4nb"
    try: base = Path(named) if named else Path.home() / ".cache/s4nb"
    except RuntimeError as e: raise NotBuilt(f"{e}: name a folder for compiled libraries in S4NB_CACHE") from e
    return base / f"{source_hash(kind, folder)}-{sysconfig.get_platform()}"


def target(kind, folder=None):
    "Where a build puts its library unless told: beside the package in a checkout, in the user's cache otherwise."
    return cache(kind, folder) if packaged() else HERE


def asked():
    "The kinds that S4NB_BUILD asks for."
    choice = os.environ.get("S4NB_BUILD") or "auto"
    if choice not in CHOICES:
        raise ValueError(f"S4NB_BUILD is {choice!r}; allowed: {', '.join(CHOICES)}")
    return CHOICES[choice]


# ---- tools ----------------------------------------------------------------------------------------------------------
class Torch(NamedTuple):
    root: Path
    version: str
    cuda: bool


def find_torch(kind="cpu"):
    "The installed torch, read and not imported; NotBuilt when it cannot carry kernels of this kind."
    if platform.system() not in ("Linux", "Darwin"):
        raise NotBuilt(f"native kernels are not supported on {platform.system()}")
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise NotBuilt("torch cannot be imported here; with pip, install torch first and add --no-build-isolation")
    root = Path(spec.origin).parent
    facts = dict(re.findall(r"^(__version__|cuda)\b[^=\n]*= *(.*)$", (root / "version.py").read_text(), re.M))
    found = Torch(root, facts["__version__"].strip("'\""), facts.get("cuda", "None").strip() != "None")
    if tuple(map(int, re.findall(r"\d+", found.version)[:2])) < TORCH:
        raise NotBuilt(f"torch {found.version} is too old; native kernels need {TORCH[0]}.{TORCH[1]} or later")
    if kind == "cuda" and not found.cuda: raise NotBuilt(f"torch {found.version} is built without CUDA")
    return found


def run(command, **options):
    "The finished command; one that cannot be started counts as failed."
    try:
        return subprocess.run([str(c) for c in command], capture_output=True, text=True, errors="replace", **options)
    except OSError as error:
        return subprocess.CompletedProcess(command, 127, "", str(error))


def complaint(compiler, *flags):
    "What a compiler says against a small shared library; empty: it works."
    with tempfile.TemporaryDirectory() as tmp:
        command = [*compiler, *flags, "-shared", "-fPIC", "-std=c++17", "-x", "c++", "-", "-o", f"{tmp}/x.so"]
        done = run(command, input="#include <cmath>\ndouble f(double x) { return std::sqrt(x); }\n")
        said = done.stderr.strip().splitlines()
        if Path(tmp, "x.so").exists(): return ""
        return f"{shlex.join(compiler)}: {said[-1] if said else f'exit code {done.returncode}'}"


def find_compiler():
    "The command of a C++ compiler that works: the one that CXX names, else the first of COMPILERS."
    named = os.environ.get("CXX")
    candidates = [shlex.split(named)] if named else [[c] for c in COMPILERS if shutil.which(c)]
    complaints = []
    for command in candidates:
        if not (said := complaint(command)): return command
        complaints.append(said)
    fix = "let CXX name one that does" if named else "install g++ or clang++"
    raise NotBuilt(f"no C++ compiler works here ({'; '.join(complaints) or 'no ' + ', '.join(COMPILERS)}); {fix}")


def called(nvcc):
    "The file behind an nvcc: links followed, a wrapper script read for the nvcc that it calls."
    real = Path(nvcc).resolve()
    with real.open("rb") as f: start = f.read(4096)
    inner = re.search(rb"(/[^\s\"'$]+/nvcc)\b", start[2:]) if start.startswith(b"#!") else None
    inner = Path(inner[1].decode()) if inner else real
    return called(inner) if inner != real and inner.is_file() else real


def cuda_homes(root):
    "Folders that may be a CUDA toolkit: (those the environment names, the usual ones and those of Python packages)."
    named = [Path(os.environ[k]) for k in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(k)]
    versions = sorted(Path("/usr/local").glob("cuda-*"), reverse=True)
    return named, [Path("/usr/local/cuda"), *versions, Path("/opt/cuda"), *sorted(root.parent.glob("nvidia/*"))]


def find_nvcc(root):
    "The nvcc of CUDA_HOME; without that the first that runs, on the path or in the usual folders."
    named, usual = cuda_homes(root)
    onpath = [shutil.which("nvcc")] if shutil.which("nvcc") else []
    for nvcc in [h / "bin" / "nvcc" for h in named] or onpath + [h / "bin" / "nvcc" for h in usual]:
        if run([nvcc, "--version"]).returncode == 0: return str(nvcc)
    if named: raise NotBuilt(f"no nvcc that runs in {named[0]}, which CUDA_HOME names")
    raise NotBuilt("no nvcc here; install the CUDA toolkit, or let CUDA_HOME name it")


class Toolkit(NamedTuple):
    nvcc: str
    include: Path
    libraries: list


def find_toolkit(root):
    "nvcc, and the folders of headers and libraries that go with it."
    nvcc, (named, usual) = find_nvcc(root), cuda_homes(root)
    homes = [f for h in (*named, called(nvcc).parents[1], *usual) for f in (h, *h.glob("targets/*"))]
    home = next((h for h in homes if (h / "include" / "cuda_runtime.h").is_file()), None)
    if home is None: raise NotBuilt(f"{nvcc} is there, cuda_runtime.h is not; let CUDA_HOME name the whole toolkit")
    return Toolkit(nvcc, home / "include", [home / d for d in ("lib64", "lib") if (home / d).is_dir()])


def gpus():
    "Compute capabilities of the GPUs here, as (8, 6)."
    done = run(["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"])
    return [(int(a), int(b)) for a, b in re.findall(r"^(\d+)\.(\d+)$", done.stdout, re.M)]


def gencode():
    "nvcc's options for TORCH_CUDA_ARCH_LIST; without it ARCHITECTURES, and the GPUs here if they are older than those."
    older = "".join(f"{a}.{b};" for a, b in sorted(set(gpus())) if (a, b) < (8, 0))
    options = []
    for arch in re.split(r"[;,\s]+", (os.environ.get("TORCH_CUDA_ARCH_LIST") or older + ARCHITECTURES).strip("; ")):
        m = re.fullmatch(r"(\d+)\.(\d+[af]?)(\+PTX)?", arch)
        if m is None: raise NotBuilt(f"TORCH_CUDA_ARCH_LIST has {arch!r}; write numbers, such as '{ARCHITECTURES}'")
        options.append(f"-gencode=arch=compute_{m[1]}{m[2]},code=sm_{m[1]}{m[2]}")
        if m[3]: options.append(f"-gencode=arch=compute_{m[1]}{m[2]},code=compute_{m[1]}{m[2]}")
    return options


# ---- one library ----------------------------------------------------------------------------------------------------
class Plan(NamedTuple):
    compile: list    # commands without -o, one an object
    link: list       # command without objects and -o
    about: str


def plan(kind, folder):
    "The commands that make the library of one kind out of the sources in `folder`."
    torch, compiler = find_torch(kind), find_compiler()
    include = ["-isystem", torch.root / "include", f'-DS4NB_SOURCES="{source_hash(kind, folder)}"']
    link = [f"-L{torch.root / 'lib'}", "-ltorch_cpu"]
    files = [f for f in source_files(kind, folder) if f.suffix not in HEADERS]
    if kind == "cuda":
        nvcc, headers, libraries = find_toolkit(torch.root)
        host = [nvcc, "-ccbin", [c for c in compiler if not c.startswith("-")][-1], *NVCC_FLAGS, *gencode()]
        commands = [[*host, *include, "-isystem", headers, "-c", f] for f in files]
        link = [*host, "-shared", *link, "-ltorch_cuda", *(f"-L{d}" for d in libraries)]
        return Plan(commands, link, " ".join(re.findall(r",code=(\w+)", " ".join(host))))
    sets = [s for s in INSTRUCTION_SETS if s == "base" or platform.machine() in ("x86_64", "AMD64")]
    sets = [s for s in sets if not complaint(compiler, *INSTRUCTION_SETS[s])]
    loops = [f for f in files if f.stem.endswith("_kernels")]    # once an instruction set; the rest once
    commands = [[*compiler, *CXX_FLAGS, *INSTRUCTION_SETS[s], f"-DS4NB_ISA={s}", "-c", f] for f in loops for s in sets]
    have = [f"-DS4NB_{s.upper()}" for s in sets if s != "base"]
    commands += [[*compiler, *CXX_FLAGS, *have, *include, "-c", f] for f in files if f not in loops]
    symbols = ["-Wl,--no-undefined"] if platform.system() != "Darwin" else ["-undefined", "dynamic_lookup"]
    return Plan(commands, [*compiler, "-shared", *symbols, *link], " ".join(sets))


def checked(command):
    "What a command says; NotBuilt if it fails."
    done = run(command)
    if done.returncode:
        log = "\n".join((done.stderr.strip() or done.stdout.strip()).splitlines()[-20:])
        raise NotBuilt(f"{Path(str(command[0])).name} failed with exit code {done.returncode}", False, command, log)
    return done.stdout + done.stderr


def make(kind, folder, out, pool, announce):
    "Compile and link into `out`, where the library appears whole or not at all; returns facts for the record."
    todo, name = plan(kind, folder), LIBRARIES[kind]
    announce(f"s4nb: compiling the {NAMES[kind]} kernels (up to a minute, once)")
    for left in out.glob(f"{name}.tmp*"): shutil.rmtree(left, ignore_errors=True)    # by a build that was killed
    with tempfile.TemporaryDirectory(prefix=f"{name}.tmp", dir=out) as tmp:
        objects = [f"{tmp}/{i}.o" for i in range(len(todo.compile))]
        said = list(pool.map(checked, [[*c, "-o", o] for c, o in zip(todo.compile, objects)]))
        checked([*todo.link[:1], *objects, *todo.link[1:], "-o", f"{tmp}/{name}.so"])
        os.replace(f"{tmp}/{name}.so", out / f"{name}.so")
    return {"about": f"{todo.about}; {todo.link[0]}", "log": "".join(said) if kind == "cuda" else ""}


# ---- records: what was tried, and how it ended ----------------------------------------------------------------------
def fingerprint(kind, folder):
    "A digest of what a build depends on, without running anything: sources, flags, torch, environment, compilers."
    try: facts = [source_hash(kind, folder), str(find_torch(kind))]
    except NotBuilt as error: facts = [str(error)]
    tools = [shutil.which(c) for c in (*COMPILERS, *shlex.split(os.environ.get("CXX") or ""), "nvcc")]
    tools += ["/usr/local/cuda/bin/nvcc"] if kind == "cuda" else []
    facts += [[t, os.stat(t).st_mtime_ns] for t in tools if t and os.path.exists(t)]
    facts += [os.environ.get(k) for k in ("CXX", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST")]
    facts += [CXX_FLAGS, NVCC_FLAGS, INSTRUCTION_SETS, ARCHITECTURES, platform.machine()]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def record(kind, out):
    "What the last build in `out` left: a dict, empty if there was none."
    try: return json.loads((Path(out) / f"{LIBRARIES[kind]}.json").read_text())
    except (OSError, ValueError): return {}


def fresh(kind, out, folder=None):
    "The library in `out`, if there is one and it was made from these very sources."
    path = Path(out) / f"{LIBRARIES[kind]}.so"
    return path if path.is_file() and source_hash(kind, folder).encode() in path.read_bytes() else None


@contextmanager
def locked(path):
    "One build at a time. Where locks are not to be had builds may run side by side, and the last one stays."
    with open(path, "w") as f:
        try:
            import fcntl
            fcntl.flock(f, fcntl.LOCK_EX)
        except (ImportError, OSError): pass
        yield


def build_one(kind, folder, out, pool, force, retry, announce):
    "Builds one kind, unless that is done or, without `retry`, known to fail; returns the record."
    out.mkdir(parents=True, exist_ok=True)
    with locked(out / f"{LIBRARIES[kind]}.lock"):
        key, known = fingerprint(kind, folder), record(kind, out)
        if known.get("fingerprint") == key and not force:
            if fresh(kind, out, folder) if known["reason"] == "ok" else not retry: return known
        start, facts = time.monotonic(), {"fingerprint": key, "reason": "ok", "sources": source_hash(kind, folder)}
        try: facts |= make(kind, folder, out, pool, announce)
        except NotBuilt as e: facts |= {"reason": str(e), "missing": e.missing, "command": e.command, "log": e.log}
        facts["seconds"] = round(time.monotonic() - start, 1)
        if facts["reason"] == "ok" or not fresh(kind, out, folder):    # a good library keeps its record
            new = out / f"{LIBRARIES[kind]}.json.{os.getpid()}"
            new.write_text(json.dumps(facts, indent=1))
            os.replace(new, out / f"{LIBRARIES[kind]}.json")
        return facts | {"new": True}


def build_records(kinds=None, out=None, folder=None, force=False, retry=True, announce=lambda line: None):
    "{kind: record} of builds that run side by side, on all cores."
    folder, kinds = Path(folder or source_folder()), asked() if kinds is None else kinds

    def attempt(kind):
        try: return build_one(kind, folder, Path(out or target(kind, folder)), pool, force, retry, announce)
        except (NotBuilt, OSError) as e: return {"reason": str(e), "missing": True, "new": True}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with ThreadPoolExecutor(cores) as pool, ThreadPoolExecutor(2) as side:
        return dict(zip(kinds, side.map(attempt, kinds)))


def build(kinds=None, out=None, folder=None, force=False):
    "{kind: 'ok' or the reason}. kinds None: what S4NB_BUILD asks for; out None: see `target`; folder: the sources."
    return {kind: why(r) for kind, r in build_records(kinds, out, folder, force).items()}


def why(r):
    "The reason in a record, with the command that failed and what it said."
    return "\n".join([r["reason"], f"$ {r['command']}", r["log"]]) if r.get("command") else r["reason"]


def library(kind, folder=None):
    "(path of the library to load, 'ok'), or (None, why there is none and what to do)."
    try:
        find_torch(kind)
        places, sources, wanted = [HERE, cache(kind, folder)], source_hash(kind, folder), kind in asked()
    except (NotBuilt, ValueError) as e: return None, str(e)
    for path in (fresh(kind, p, folder) for p in places):
        if path: return path, "ok"
    for r in (record(kind, p) for p in places):
        if r.get("sources") == sources and r["reason"] != "ok":
            return None, why(r) + ("" if r["missing"] else f"\nto try again after a change: {how()}")
    if any((p / f"{LIBRARIES[kind]}.so").exists() for p in places):
        return None, f"the library is older than its sources: {how()}"
    return None, f"not built: {how()}" + ("" if wanted else f" (S4NB_BUILD={os.environ['S4NB_BUILD']} leaves it out)")


# ---- command line ----------------------------------------------------------------------------------------------------
def main(arguments=None):
    "`s4nb build`; returns 0 unless a compilation failed, or something is missing that was asked for by name."
    parser = argparse.ArgumentParser("s4nb build", description="Compile the native kernels.",
                                     epilog="Reads S4NB_BUILD, S4NB_CACHE, CXX, CUDA_HOME, TORCH_CUDA_ARCH_LIST.")
    parser.add_argument("kinds", nargs="*", metavar="cpu|cuda", help="default: what S4NB_BUILD asks for (auto: both)")
    parser.add_argument("--force", action="store_true", help="compile even what is up to date")
    parser.add_argument("--quiet", action="store_true", help="a line for what is compiled or cannot be, or none")
    given = parser.parse_args(arguments)
    for kind in given.kinds:
        if kind not in LIBRARIES: raise ValueError(f"no kernels of kind {kind!r}; allowed: {', '.join(LIBRARIES)}")
    if given.quiet: return quiet(given.kinds or asked())
    records = build_records(given.kinds or asked(), force=given.force, announce=lambda line: print(line, flush=True))
    for kind, r in records.items():
        state = f"compiled in {r.get('seconds')} s" if r.get("new") else "up to date"
        good = r["reason"] == "ok"
        about = f"{state}: {r['about']}; {target(kind) / LIBRARIES[kind]}.so" if good else why(r)
        print(f"{NAMES[kind]} kernels: {about}")
    if not records: print("S4NB_BUILD=none: nothing is compiled")
    strict = given.kinds or os.environ.get("S4NB_BUILD") in ("cpu", "cuda")
    return int(any(r["reason"] != "ok" and (strict or not r["missing"]) for r in records.values()))


def quiet(kinds):
    "Builds what is out of date, unless it failed before; at most one line a kind, and never a failure."
    for kind, r in build_records(kinds, retry=False, announce=lambda line: print(line, flush=True)).items():
        if r["reason"] != "ok" and (r.get("new") or not r["missing"]):
            print(f"s4nb: no {NAMES[kind]} kernels: {r['reason']}; PyTorch computes instead")
    return 0


if __name__ == "__main__":
    try: sys.exit(main())
    except ValueError as error: sys.exit(f"s4nb: {error}")
