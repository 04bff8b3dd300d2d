"""Compiling the native kernels: tools may be missing, old or broken; that leaves a reason, and never half a file."""
import ctypes
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from house import ROOT

from s4nb import build

TOY = {
    "toy.h": "#ifndef S4NB_ISA\n#define S4NB_ISA base\n#endif\nnamespace S4NB_ISA { int twice(int x); }\n",
    "toy_kernels.cpp": '#include "toy.h"\nnamespace S4NB_ISA { int twice(int x) { return 2 * x; } }\n',
    "toy.cpp": '''#include "toy.h"
#define VISIBLE extern "C" __attribute__((visibility("default")))
VISIBLE const char* s4nb_sources() { return S4NB_SOURCES; }
VISIBLE const char* s4nb_instruction_set() { return "toy"; }
VISIBLE int twice(int x) { return base::twice(x); }
#ifdef S4NB_AVX2
namespace avx2 { int twice(int x); }
VISIBLE int twice_avx2(int x) { return avx2::twice(x); }
#endif
''',
    "toy.cu": '''extern "C" __attribute__((visibility("default"))) const char* s4nb_sources() { return S4NB_SOURCES; }
__global__ void twice(int* x) { x[threadIdx.x] *= 2; }
''',
}
VARIABLES = ("CXX", "CUDA_HOME", "CUDA_PATH", "S4NB_BUILD", "TORCH_CUDA_ARCH_LIST", "XDG_CACHE_HOME")


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch, tmp_path):
    for name in VARIABLES: monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("S4NB_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def toy(tmp_path):
    "Sources that compile in no time."
    return write(tmp_path / "toy", TOY)


def write(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items(): (folder / name).write_text(text)
    return folder


def script(path, text):
    "An executable shell script."
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return str(path)


def compiler():
    try: return build.find_compiler()
    except build.NotBuilt as e: pytest.skip(str(e))


def child(code, **env):
    "A Python process that has s4nb/build.py as the module b, loaded by its path."
    lines = ("import importlib.util, sys; from pathlib import Path\n"
             f"s = importlib.util.spec_from_file_location('b', {str(ROOT / 's4nb/build.py')!r})\n"
             "b = importlib.util.module_from_spec(s); s.loader.exec_module(b)\n" + code)
    return subprocess.Popen([sys.executable, "-c", lines], env={**os.environ, **env}, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)


# ---- what a build gives ----------------------------------------------------------------------------------------------
def test_a_library_is_whole_and_knows_its_sources(tmp_path, toy):
    compiler()
    out = tmp_path / "out"
    assert build.build(["cpu"], out, toy) == {"cpu": "ok"}
    assert {f.name for f in out.iterdir()} == {"_C.so", "_C.json", "_C.lock"}
    loaded = ctypes.CDLL(str(out / "_C.so"))
    loaded.s4nb_sources.restype = ctypes.c_char_p
    assert loaded.s4nb_sources().decode() == build.source_hash("cpu", toy)
    assert loaded.twice(3) == 6
    assert hasattr(loaded, "twice_avx2") == ("avx2" in build.record("cpu", out)["about"])


def test_nothing_runs_when_nothing_changed(tmp_path, toy, monkeypatch):
    compiler()
    out = tmp_path / "out"
    build.build(["cpu"], out, toy)
    before = (out / "_C.so").stat().st_mtime_ns
    with monkeypatch.context() as m:
        m.setattr(build, "run", lambda *a, **k: pytest.fail("a command was run"))
        assert build.build(["cpu"], out, toy) == {"cpu": "ok"}
    (toy / "toy_kernels.cpp").write_text(TOY["toy_kernels.cpp"].replace("2 * x", "x + x"))
    assert build.fresh("cpu", out, toy) is None
    assert build.build(["cpu"], out, toy) == {"cpu": "ok"} and (out / "_C.so").stat().st_mtime_ns > before
    key = build.fingerprint("cpu", toy)
    monkeypatch.setattr(build, "CXX_FLAGS", [*build.CXX_FLAGS, "-g"])
    assert build.fingerprint("cpu", toy) != key
    monkeypatch.setenv("CXX", "another")
    assert build.fingerprint("cpu", toy) != key


def test_a_good_library_survives_a_lost_compiler(tmp_path, toy, monkeypatch):
    compiler()
    out = tmp_path / "out"
    build.build(["cpu"], out, toy)
    monkeypatch.setenv("CXX", "/bin/false")
    assert "/bin/false" in build.build(["cpu"], out, toy)["cpu"]
    assert build.fresh("cpu", out, toy) and build.record("cpu", out)["reason"] == "ok"


# ---- the install matrix ----------------------------------------------------------------------------------------------
def test_no_compiler(tmp_path, toy, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setenv("CXX", "/bin/false")
    said = build.build(["cpu", "cuda"], out, toy)
    assert all("no C++ compiler works here (/bin/false" in s and "CXX" in s for s in said.values())
    assert not list(out.glob("*.so"))
    monkeypatch.delenv("CXX")
    monkeypatch.setattr(build, "COMPILERS", ("no-such-compiler",))
    assert build.build(["cpu"], out, toy)["cpu"].endswith("install g++ or clang++")


def test_a_compiler_that_starts_but_cannot_compile_is_passed_over(tmp_path, monkeypatch):
    good = compiler()
    broken = script(tmp_path / "broken", '[ "$1" = --version ] && exit 0\necho "no libstdc++ here" >&2\nexit 1\n')
    monkeypatch.setattr(build, "COMPILERS", (broken, *good))
    assert build.find_compiler() == good
    monkeypatch.setenv("CXX", broken)
    with pytest.raises(build.NotBuilt, match="no libstdc\\+\\+ here.*let CXX name one that does"): build.find_compiler()


def test_compiler_without_nvcc(tmp_path, toy, monkeypatch):
    compiler()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nowhere"))
    said = build.build(["cpu", "cuda"], tmp_path / "out", toy)
    assert said["cpu"] == "ok" and ("which CUDA_HOME names" in said["cuda"] or "without CUDA" in said["cuda"])
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setattr(build, "cuda_homes", lambda root: ([], []))
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    with pytest.raises(build.NotBuilt, match="no nvcc here; install the CUDA toolkit"): build.find_nvcc(tmp_path)


def test_both(tmp_path, toy):
    "The toy on the CPU and for CUDA; the real sources are looked at below."
    compiler()
    try: build.find_toolkit(build.find_torch("cuda").root)
    except build.NotBuilt as e: pytest.skip(str(e))
    out = tmp_path / "out"
    assert build.build(["cpu", "cuda"], out, toy) == {"cpu": "ok", "cuda": "ok"}
    assert build.fresh("cuda", out, toy) and "sm_90" in build.record("cuda", out)["about"]


def test_the_toolkit_behind_a_wrapper(tmp_path, monkeypatch):
    "An nvcc on the path is followed through links and scripts; one without headers is refused."
    real = script(tmp_path / "toolkit/bin/nvcc", "echo release 13\n")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/link").symlink_to(script(tmp_path / "bin/inner", f'exec {real} "$@"\n'))
    wrapper = script(tmp_path / "bin/nvcc", f'# a comment\nexec "{tmp_path}/toolkit/bin/../bin/nvcc" "$@"\n')
    assert build.called(tmp_path / "bin/link") == build.called(wrapper).resolve() == Path(real)
    monkeypatch.setattr(build, "cuda_homes", lambda root: ([], []))
    monkeypatch.setattr(build.shutil, "which", lambda name: wrapper)
    with pytest.raises(build.NotBuilt, match="cuda_runtime.h is not"): build.find_toolkit(tmp_path)
    write(tmp_path / "toolkit/include", {"cuda_runtime.h": ""})
    (tmp_path / "toolkit/lib").mkdir()
    kit = build.find_toolkit(tmp_path)
    assert kit.nvcc == wrapper and kit.include.resolve() == tmp_path / "toolkit/include" and len(kit.libraries) == 1


@pytest.mark.parametrize("asked, flags", [
    ("9.0", ["arch=compute_90,code=sm_90"]),
    ("8.0 9.0+PTX", ["arch=compute_80,code=sm_80", "arch=compute_90,code=sm_90", "arch=compute_90,code=compute_90"]),
    ("10.0;9.0a", ["arch=compute_100,code=sm_100", "arch=compute_90a,code=sm_90a"])])
def test_architectures(asked, flags, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    assert build.gencode() == [f"-gencode={f}" for f in flags]


def test_architectures_without_a_wish(monkeypatch):
    monkeypatch.setattr(build, "gpus", lambda: [(7, 5), (9, 0)])
    assert [f.split("code=")[-1] for f in build.gencode()] == ["sm_75", "sm_80", "sm_90", "compute_90"]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Hopper")
    with pytest.raises(build.NotBuilt, match="Hopper.*write numbers"): build.gencode()


@pytest.mark.parametrize("facts, kind, said", [
    ("__version__ = '2.9.1'\ncuda: Optional[str] = '12.8'\n", "cpu", "torch 2.9.1 is too old; native kernels need 2"),
    ("__version__ = '2.11.0+cpu'\ncuda: Optional[str] = None\n", "cuda", "torch 2.11.0+cpu is built without CUDA"),
    ("__version__ = '2.11.0+cpu'\ncuda: Optional[str] = None\n", "cpu", "ok"),
    (None, "cpu", "torch cannot be imported here")])
def test_torch_is_read_and_not_imported(facts, kind, said, tmp_path, monkeypatch):
    if facts: write(tmp_path / "torch", {"version.py": facts, "__init__.py": "raise RuntimeError"})
    for name in [m for m in sys.modules if m == "torch"]: monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    if said == "ok": assert build.find_torch(kind).root == tmp_path / "torch"
    else:
        with pytest.raises(build.NotBuilt, match=re.escape(said)): build.find_torch(kind)


def test_other_systems(monkeypatch):
    monkeypatch.setattr(build.platform, "system", lambda: "Windows")
    assert build.library("cpu") == (None, "native kernels are not supported on Windows")


# ---- S4NB_BUILD and the command --------------------------------------------------------------------------------------
@pytest.mark.parametrize("value, kinds", [(None, ("cpu", "cuda")), ("", ("cpu", "cuda")), ("auto", ("cpu", "cuda")),
                                          ("none", ()), ("cpu", ("cpu",)), ("cuda", ("cpu", "cuda"))])
def test_what_is_asked_for(value, kinds, monkeypatch):
    if value is not None: monkeypatch.setenv("S4NB_BUILD", value)
    assert build.asked() == kinds


def test_an_unknown_wish_is_one_clear_line(monkeypatch, tmp_path):
    monkeypatch.setenv("S4NB_BUILD", "gpu")
    with pytest.raises(ValueError, match="S4NB_BUILD is 'gpu'; allowed: auto, none, cpu, cuda"): build.asked()
    assert "S4NB_BUILD is 'gpu'" in build.library("cpu")[1]
    done = subprocess.run([sys.executable, ROOT / "s4nb/build.py"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == "s4nb: S4NB_BUILD is 'gpu'; allowed: auto, none, cpu, cuda\n"


@pytest.fixture
def installed(tmp_path, toy, monkeypatch):
    "s4nb.build as it is in an installed package that holds the toy sources."
    shutil.copytree(toy, tmp_path / "site/_sources")
    monkeypatch.setattr(build, "HERE", tmp_path / "site")
    return tmp_path / "site"


def test_command_in_an_installed_package(installed, tmp_path, monkeypatch, capsys):
    "`s4nb build` compiles into the user's cache, under the digest of the sources, and library() finds it there."
    compiler()
    assert build.library("cpu") == (None, "not built: s4nb build")
    monkeypatch.setenv("S4NB_BUILD", "none")
    assert build.main([]) == 0 and "nothing is compiled" in capsys.readouterr().out
    assert build.library("cpu") == (None, "not built: s4nb build (S4NB_BUILD=none leaves it out)")
    monkeypatch.setenv("S4NB_BUILD", "cpu")
    assert build.main([]) == 0 and "CPU kernels: compiled in" in capsys.readouterr().out
    assert build.main([]) == 0 and "CPU kernels: up to date" in capsys.readouterr().out
    path, reason = build.library("cpu")
    assert reason == "ok" and path.parent.parent == tmp_path / "cache" and build.source_hash("cpu") in path.parent.name
    assert build.main(["--quiet"]) == 0 and capsys.readouterr().out == ""
    assert {f.name for f in installed.iterdir()} == {"_sources"}
    (installed / "_sources/toy.cpp").write_text(TOY["toy.cpp"] + "// changed\n")
    assert build.library("cpu") == (None, "not built: s4nb build")      # another digest, another folder


def test_what_is_missing_fails_only_when_asked_for_by_name(installed, monkeypatch, capsys):
    monkeypatch.setenv("CXX", "/bin/false")
    assert build.main([]) == 0 and build.main(["cpu"]) == 1
    monkeypatch.setenv("S4NB_BUILD", "cpu")
    assert build.main([]) == 1 and "no C++ compiler works here" in capsys.readouterr().out
    assert "no C++ compiler works here" in build.library("cpu")[1]
    with pytest.raises(ValueError, match="'gpu'; allowed: cpu, cuda"): build.main(["gpu"])


def test_cache_folders(installed, monkeypatch, tmp_path):
    assert build.cache("cpu").parent == tmp_path / "cache"
    monkeypatch.delenv("S4NB_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert build.cache("cpu").parent == tmp_path / "xdg/s4nb"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert build.cache("cpu").parent == tmp_path / "home/.cache/s4nb"


def test_a_cache_that_cannot_be_written_is_a_reason(installed, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("S4NB_CACHE", str(tmp_path / "file"))
    assert "file" in build.build(["cpu"])["cpu"] and build.library("cpu")[0] is None


# ---- failures --------------------------------------------------------------------------------------------------------
def test_a_failed_compilation_leaves_its_reason(tmp_path, toy, monkeypatch, capsys):
    compiler()
    monkeypatch.setattr(build, "HERE", tmp_path / "package")
    monkeypatch.setattr(build, "source_folder", lambda: toy)
    monkeypatch.setenv("S4NB_BUILD", "cpu")
    (toy / "toy.cpp").write_text("#error broken on purpose\n")
    assert build.main([]) == 1
    path, reason = build.library("cpu")
    assert path is None and "failed with exit code 1\n$ " in reason and "-c" in reason and "broken on purpose" in reason
    assert reason.endswith("to try again after a change: make kernels")
    assert "broken on purpose" in capsys.readouterr().out
    assert {f.name for f in (tmp_path / "package").iterdir()} == {"_C.json", "_C.lock"}
    with monkeypatch.context() as m:                                 # make does not try again what cannot succeed
        m.setattr(build, "make", lambda *a: pytest.fail("tried again"))
        assert build.main(["--quiet"]) == 0
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "failed with exit code 1; PyTorch computes instead" in said
    (toy / "toy.cpp").write_text(TOY["toy.cpp"])
    assert build.main(["--quiet"]) == 0 and capsys.readouterr().out.count("\n") == 1
    assert build.library("cpu") == (tmp_path / "package/_C.so", "ok")
    (toy / "toy.cpp").write_text(TOY["toy.cpp"] + "int more;\n")
    assert build.library("cpu") == (None, "the library is older than its sources: make kernels")


def test_the_link_is_checked_too(tmp_path, toy):
    compiler()
    (toy / "toy.cpp").write_text(TOY["toy.cpp"].replace("base::twice(x)", "base::thrice(x)").replace(
        '#include "toy.h"', '#include "toy.h"\nnamespace base { int thrice(int); }'))
    assert "thrice" in build.build(["cpu"], tmp_path / "out", toy)["cpu"] and not (tmp_path / "out/_C.so").exists()


def counting(tmp_path, before=""):
    "A compiler that writes a line into tmp_path/log for each compilation of a file."
    real = " ".join(compiler())
    count = f'case "$*" in *" -c "*) echo "$$" >> {tmp_path}/log; {before};; esac\n'
    return script(tmp_path / "counting", f'{count}exec {real} "$@"\n')


def test_builds_at_the_same_time_compile_once(tmp_path, toy):
    code = f"print(b.build(['cpu'], {str(tmp_path / 'out')!r}, {str(toy)!r}))"
    slow = counting(tmp_path, "sleep 0.2")
    several = [child(code, CXX=slow) for _ in range(3)]
    assert [p.communicate(timeout=100)[0] for p in several] == ["{'cpu': 'ok'}\n"] * 3
    sets = len(build.record("cpu", tmp_path / "out")["about"].split(";")[0].split())
    assert len((tmp_path / "log").read_text().splitlines()) == sets + 1


def test_a_killed_build_leaves_nothing_that_counts(tmp_path, toy):
    out = tmp_path / "out"
    slow = child(f"b.build(['cpu'], {str(out)!r}, {str(toy)!r})", CXX=counting(tmp_path, "sleep 30"))
    while not (tmp_path / "log").exists() and slow.poll() is None: time.sleep(0.05)
    os.killpg(slow.pid, signal.SIGKILL)
    slow.communicate()
    assert list(out.glob("_C.tmp*")) and not (out / "_C.so").exists() and build.record("cpu", out) == {}
    assert build.build(["cpu"], out, toy) == {"cpu": "ok"}
    assert {f.name for f in out.iterdir()} == {"_C.so", "_C.json", "_C.lock"}


def test_a_spoilt_record_is_no_obstacle(tmp_path, toy):
    compiler()
    write(tmp_path / "out", {"_C.json": '{"fingerprint": "', "_C.so": "half a library"})
    assert build.fresh("cpu", tmp_path / "out", toy) is None
    assert build.build(["cpu"], tmp_path / "out", toy) == {"cpu": "ok"}


# ---- packages --------------------------------------------------------------------------------------------------------
@pytest.fixture
def tree(tmp_path):
    "A copy of what packaging reads, with toy sources in the place of the real ones."
    here = tmp_path / "tree"
    shutil.copytree(ROOT / "s4nb", here / "s4nb", ignore=shutil.ignore_patterns("__pycache__", "_C*", "_cuda*"))
    for f in ("setup.py", "settings.ini", "README.md", "MANIFEST.in", "LICENSE"): shutil.copy(ROOT / f, here)
    write(here / "extensions/structured_kernels", TOY)
    return here


def pack(tree, command="bdist_wheel", file="setup.py", **env):
    "Runs setup.py; (the one file that is made, what was said)."
    done = subprocess.run([sys.executable, file, "-q", command, "-d", "dist"], cwd=tree, capture_output=True, text=True,
                          env={**os.environ, **env})
    assert done.returncode == 0, done.stdout + done.stderr
    return next((tree / "dist").iterdir()), done.stdout


def contents(wheel):
    "What a wheel holds of the native kernels."
    names = [n.split("s4nb/", 1)[-1] for n in zipfile.ZipFile(wheel).namelist()]
    return sorted(n for n in names if n.startswith(("_C", "_cuda", "_sources")))


TOY_CONTENTS = [f"_sources/{name}" for name in sorted(TOY)]


def test_wheel_with_a_library(tree):
    compiler()
    wheel, said = pack(tree, S4NB_BUILD="cpu")
    assert re.fullmatch(r"s4nb-[\d.]+-py3-none-(?!any).+\.whl", wheel.name) and "CPU kernels: ok" in said
    assert contents(wheel) == ["_C.so", *TOY_CONTENTS]
    shutil.rmtree(tree / "dist")                           # the build folder still holds the library of the run before
    wheel, _ = pack(tree, S4NB_BUILD="none")
    assert wheel.name.endswith("py3-none-any.whl") and contents(wheel) == TOY_CONTENTS


@pytest.mark.parametrize("env, reason", [({"S4NB_BUILD": "none"}, ""), ({"CXX": "/bin/false"}, "no C++ compiler")])
def test_wheel_without_a_library(tree, env, reason):
    wheel, said = pack(tree, **env)
    assert wheel.name.endswith("py3-none-any.whl") and reason in said and (not reason or "later: s4nb build" in said)
    assert contents(wheel) == TOY_CONTENTS


def test_wheel_without_torch(tree):
    "As in pip's isolated builds: the sources alone, and a line that says how to get more."
    hide = "import sys; sys.modules['torch'] = None; __file__ = 'setup.py'; exec(open('setup.py').read())"
    wheel, said = pack(write(tree, {"hidden.py": hide}), file="hidden.py")
    assert wheel.name.endswith("py3-none-any.whl") and contents(wheel) == TOY_CONTENTS
    assert said.count("\n") == 1 and "--no-build-isolation" in said and "s4nb build" in said


def test_source_distribution_builds_a_wheel(tree, tmp_path):
    archive, _ = pack(tree, "sdist")
    shutil.unpack_archive(archive, tmp_path / "unpacked")
    unpacked = next((tmp_path / "unpacked").iterdir())
    assert (unpacked / "extensions/structured_kernels/toy.cpp").exists()
    wheel, _ = pack(unpacked, S4NB_BUILD="none")
    assert contents(wheel) == TOY_CONTENTS


# ---- the real sources, compiled once ---------------------------------------------------------------------------------
@pytest.fixture
def native():
    "Compiles what is out of date beside the package, as make does; a function from a kind to its library, or a skip."
    records = build.build_records(("cpu", "cuda"))
    def find(kind):
        r = records[kind]
        if r["reason"] != "ok" and r["missing"]: pytest.skip(r["reason"])
        assert r["reason"] == "ok", build.why(r)
        return build.target(kind) / f"{build.LIBRARIES[kind]}.so", r
    return find


def tool(*command): return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_cpu_library_needs_the_stable_interface_alone(native):
    "No symbol of torch's C++ classes: one library for all releases from 2.10 on."
    path, r = native("cpu")
    if not shutil.which("nm"): pytest.skip("no nm")
    wanted = [line.split()[-1].split("@")[0] for line in tool("nm", "-D", "--undefined-only", str(path)).splitlines()]
    assert [s for s in wanted if s.startswith("aoti_torch_")]
    assert not [s for s in wanted if re.match(r"_ZN?K?(2at|3c10|5torch)", s)]
    assert r["about"].startswith("base")


def test_cuda_library_holds_hopper_code_without_spills(native):
    path, r = native("cuda")
    import triton
    dump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    listed = tool(str(dump), "-lelf", str(path)) + tool(str(dump), "-lptx", str(path))
    assert "sm_90.cubin" in listed and "sm_80.cubin" in listed and "sm_90.ptx" in listed
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", r["log"])
    assert spills and not [s for s in spills if s != ("0", "0")], r["log"]


def test_a_step_of_make_with_nothing_to_do_is_quick_and_silent(native):
    native("cpu")
    def timed():    # processor time: the machine may be busy
        start = os.times()
        said = tool(sys.executable, str(ROOT / "s4nb/build.py"), "--quiet")
        end = os.times()
        return end.children_user + end.children_system - start.children_user - start.children_system, said
    runs = [timed() for _ in range(3)]
    assert min(t for t, _ in runs) < 0.3 and "compiling" not in runs[-1][1]
    assert json.loads((ROOT / "s4nb/_C.json").read_text())["reason"] == "ok"
