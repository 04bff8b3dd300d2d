"The dispatcher: what is usable is decided by running it, broken or missing packages give a reason, and nobody pays for what is not used."
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from s4nb.ops import backends, cauchy, log_vandermonde, log_vandermonde_transpose
from s4nb.ops.cauchy_sum import OPS, PREFERENCE, pick, usable
from s4nb.ops.vandermonde_sum import vandermonde_torch

ROOT = Path(__file__).resolve().parents[1]
SUMS = ["cauchy", "log_vandermonde", "log_vandermonde_transpose"]
STEPS = ["diag_step", "dplr_step"]
ALL = [*SUMS, "dplr_spectrum", *STEPS]
DTYPES = [torch.complex64, torch.complex128]


def python(code, tmp_path, stub=None):
    "Output of a fresh Python that finds `stub` as the package pykeops."
    if stub is not None:
        (tmp_path / "pykeops").mkdir()
        (tmp_path / "pykeops" / "__init__.py").write_text(textwrap.dedent(stub))
        (tmp_path / "pykeops" / "torch.py").write_text("from pykeops import LazyTensor\n")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def backend():
    "Enters a backend of the Vandermonde sum for one test."
    entered = []
    def enter(name, f): OPS["log_vandermonde"].backends[name] = f; entered.append(name)
    yield enter
    for name in entered: del OPS["log_vandermonde"].backends[name]
    usable.cache_clear()


def args(): return torch.randn(2, 3), torch.complex(-torch.rand(2, 3), torch.randn(2, 3))


@pytest.mark.parametrize("op", ALL)
@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_is_always_usable(op, dtype): assert usable(op, "torch", "cpu", dtype) == "ok"


def test_every_op_has_its_backends():
    assert list(OPS) == ALL
    assert all(list(op.backends) == (["native", "torch"] if name in STEPS else ["native", "triton", "torch", "keops"])
               for name, op in OPS.items())
    assert all("torch" in order for order in PREFERENCE.values())


BROKEN = """
    class LazyTensor:
        def __init__(self, x): raise RuntimeError("nvrtc said no")
    """
MISSING = "raise ModuleNotFoundError(\"No module named 'pykeops'\", name='pykeops')"
WRONG = """
    import torch
    class LazyTensor:
        def __init__(self, x): self.x = x
        def __getattr__(self, name): return lambda *a, **k: self
        def __sub__(self, other): return self
        __mul__ = __truediv__ = __sub__
        def sum(self, dim): return self.x.new_zeros(self.x.shape[0], 4, 1)
    """


@pytest.mark.parametrize("stub, reason", [(BROKEN, "nvrtc said no"), (MISSING, "No module named"), (WRONG, "")])
def test_a_pykeops_that_fails_is_a_reason_not_an_error(tmp_path, stub, reason):
    "backends() tells it, the sums fall back to torch even where KeOps comes first, and a forced KeOps says why not."
    out = python("""
        import json, torch
        import s4nb.ops.cauchy_sum as c
        import s4nb
        states = s4nb.ops.backends()
        c.PREFERENCE["cpu"] = ["keops", "torch"]
        v, z, w = torch.randn(2, 3), 1j * torch.randn(5), torch.randn(2, 3) - 5
        assert torch.equal(c.cauchy(v, z, w), c.cauchy(v, z, w, backend="torch"))
        try: c.cauchy(v, z, w, backend="keops")
        except RuntimeError as e: states["forced"] = str(e)
        print(json.dumps(states))
        """, tmp_path, stub)
    states = json.loads(out.splitlines()[-1])
    forced = states.pop("forced")
    assert "'keops' cannot do cauchy" in forced and reason in forced
    assert list(states) == ALL
    for op in ALL:
        assert states[op]["torch"] == "ok"
        assert op in STEPS or states[op]["keops"] != "ok" and reason in states[op]["keops"]
    assert not reason or "empty its cache" in states["cauchy"]["keops"] and "empty its cache" in forced


def test_nothing_optional_is_imported_by_default(tmp_path):
    python("""
        import sys, torch
        from s4nb.ops import cauchy, log_vandermonde, log_vandermonde_transpose
        v, x = torch.randn(2, 3), torch.complex(-torch.rand(2, 3), torch.randn(2, 3))
        cauchy(v, x, x - 1), log_vandermonde(v, x, 5), log_vandermonde_transpose(torch.randn(2, 5), v, x, 5)
        assert not any(m.split(".")[0] in ("pykeops", "keopscore", "triton") for m in sys.modules if sys.modules[m])
        """, tmp_path)


def test_environment_names_the_backend(monkeypatch, backend):
    v, x = args()
    unnamed = log_vandermonde(v, x, 8)
    backend("seven", lambda v, x, L, conj=True: vandermonde_torch(v, x, L, conj) * (1 if L == 5 else 7))       # L = 5: the examples
    monkeypatch.setenv("S4NB_BACKEND", "seven")
    assert torch.allclose(log_vandermonde(v, x, 8), 7 * log_vandermonde(v, x, 8, backend="torch"))            # the argument wins
    monkeypatch.setenv("S4NB_BACKEND", "cuda9")
    with pytest.raises(ValueError, match="S4NB_BACKEND.*cuda9.*native, triton, torch, keops"): log_vandermonde(v, x, 8)
    monkeypatch.setenv("S4NB_BACKEND", "")
    assert torch.equal(log_vandermonde(v, x, 8), unnamed)


@pytest.mark.parametrize("f", [lambda: cauchy(*args(), args()[1], backend="kops"), lambda: log_vandermonde(*args(), 4, backend="kops"),
                               lambda: log_vandermonde_transpose(torch.randn(4), *args(), 4, backend="kops")])
def test_unknown_backend_lists_the_names(f):
    with pytest.raises(ValueError, match="kops.*native, triton, torch, keops"): f()


def test_one_entry_adds_a_backend(backend, monkeypatch):
    calls = []
    def mine(v, x, L, conj=True): calls.append(v.dtype); return vandermonde_torch(v, x, L, conj)
    backend("mine", mine)
    monkeypatch.setitem(PREFERENCE, "cpu", ["mine", "torch"])
    log_vandermonde(*args(), 4)
    n = len(calls)
    log_vandermonde(*args(), 4)
    assert len(calls) == n + 1                                     # tried once, then only used
    assert pick("cauchy", None, "cpu", torch.complex64) is OPS["cauchy"].backends["torch"]   # the other ops do without


@pytest.mark.parametrize("fault, says", [
    (lambda v, x, L, conj: vandermonde_torch(v.detach(), x, L, conj), "RuntimeError"),                       # no gradient
    (lambda v, x, L, conj: vandermonde_torch(v, x.detach() + 0 * x, L, conj), "wrong by"),                   # a wrong gradient
    (lambda v, x, L, conj: vandermonde_torch(v, x, L, conj) + 1e-2, "wrong by"),                             # a wrong value
    (lambda v, x, L, conj: vandermonde_torch(v, x, L, conj) * float("nan"), "wrong by"),
    (lambda v, x, L, conj: vandermonde_torch(v, x, L - 1, conj), "RuntimeError")])
def test_what_is_wrong_is_not_used(backend, monkeypatch, fault, says):
    backend("faulty", fault)
    monkeypatch.setitem(PREFERENCE, "cpu", ["faulty", "torch"])
    assert says in usable("log_vandermonde", "faulty", "cpu", torch.complex64)
    v, x = args()
    assert torch.equal(log_vandermonde(v, x, 8), log_vandermonde(v, x, 8, backend="torch"))


def test_single_precision_only_is_said(backend):
    def single(v, x, L, conj=True):
        if v.dtype != torch.complex64: raise TypeError("complex64 only")
        return vandermonde_torch(v, x, L, conj)
    backend("single", single)
    assert usable("log_vandermonde", "single", "cpu", torch.complex64) == "ok"
    with pytest.raises(RuntimeError, match="complex64 only"): log_vandermonde(*(a.to(torch.complex128) for a in args()), 4, backend="single")


def test_probing_disturbs_nothing():
    usable.cache_clear()
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16): assert usable("cauchy", "torch", "cpu", torch.complex64) == "ok"
    usable.cache_clear()
    with torch.inference_mode(): assert usable("cauchy", "torch", "cpu", torch.complex64) == "ok"
    assert torch.equal(before, torch.random.get_rng_state()) and not torch.is_autocast_enabled("cpu")


@pytest.mark.stress
def test_keops_really_runs():
    "Compiles six formulas (a minute or two the first time), then compares every op with torch, shapes of one included."
    pytest.importorskip("pykeops")
    assert all(state == {"torch": "ok", "keops": "ok"} for state in backends("cpu").values())
    def randn(*shape): return torch.randn(*shape, dtype=torch.complex128, requires_grad=True)
    def same(f, *a):
        out, want = f(*a, backend="keops"), f(*a, backend="torch")
        leaves, g = [t for t in a if isinstance(t, torch.Tensor)], torch.randn_like(want)
        for p, q in zip([out, *torch.autograd.grad(out, leaves, g)], [want, *torch.autograd.grad(want, leaves, g)]):
            assert p.shape == q.shape and torch.allclose(p, q, rtol=1e-9, atol=1e-11)
    for v, z, w in [((1,), (1,), (1,)), ((2,), (1,), (2,)), ((1,), (4,), (1,)), ((2, 4, 3), (5,), (2, 1, 3)), ((2, 3), (2, 5), (1, 3)),
                    ((0, 3), (4,), (0, 3)), ((2, 0), (4,), (2, 0)), ((2, 3), (0,), (2, 3))]:
        for conj in (True, False): same(lambda *a, backend: cauchy(*a, conj, backend=backend), randn(*v), randn(*z), randn(*w))
    for v, x, L in [((1,), (1,), 1), ((3,), (3,), 1), ((1,), (1,), 4), ((2, 2, 3), (2, 3), 5), ((0, 3), (0, 3), 2), ((2, 0), (2, 0), 2), ((3,), (3,), 0)]:
        a = randn(*v), randn(*x)
        for conj in (True, False): same(lambda *a, backend: log_vandermonde(*a, L, conj, backend=backend), *a)
        same(lambda *a, backend: log_vandermonde_transpose(*a, L, backend=backend), randn(L), *a)
    a = randn(2, 3), randn(4), randn(2, 3)
    assert torch.autograd.gradcheck(lambda *a: cauchy(*a, backend="keops"), a) and torch.autograd.gradgradcheck(lambda *a: cauchy(*a, backend="keops"), a)
