"""The Triton kernels: interpreted on the CPU, compiled for a GPU that is not there, and, where one is, run on it.

A process interprets Triton or compiles it, as TRITON_INTERPRET says at import; so both are done by child processes."""
import importlib.util
import json
import math
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from house import ROOT

from s4nb.ops.cauchy_sum import CauchySum
from s4nb.ops.vandermonde_sum import Vandermonde, VandermondeT
from s4nb.s4.nplr import nplr

C64, C128 = torch.complex64, torch.complex128
TOLERANCE = {C64: 1e-6, C128: 1e-13}                   # some roundings, relative to the norm of the result

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


def child(function, cache, interpret):
    "What a function of this file prints as JSON in a process of its own."
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "TRITON_CACHE_DIR": str(cache)}
    env.pop("TRITON_INTERPRET", None)
    if interpret: env["TRITON_INTERPRET"] = "1"
    code = f"import test_triton; test_triton.{function}()"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


# ---- literal sums, and cases for them --------------------------------------------------------------------------------
def cauchy_literal(v, z, w, conj):
    if conj: return cauchy_literal(v, z, w, False) + cauchy_literal(v.conj(), z, w.conj(), False)
    return (v[..., None] / (z[:, None, None] - w[:, None, :, None])).sum(2)


def powers(x, L): return torch.exp(x[:, None, :, None] * torch.arange(L, device=x.device))


def vandermonde_literal(v, x, L, conj):
    y = (v[..., None] * powers(x, L)).sum(2)
    return 2 * y.real if conj else y


def power_sums_literal(u, x): return (u[:, :, None] * powers(x, u.shape[-1])).sum(-1)


def rounded(args, dtype): return [a.to(dtype if a.is_complex() else dtype.to_real()) for a in args]


def errors(f, literal_f, args, dtype):
    "Relative errors of the value and of every gradient against the literal sum of the same arguments in complex128."
    args = rounded(args, dtype)
    exact = rounded(args, C128)
    g = torch.randn_like(literal_f(*exact))
    got, want = with_grads(f, args, g), with_grads(literal_f, exact, g)
    assert [a.shape for a in got] == [b.shape for b in want]
    return [float((a - b).norm() / b.norm().clamp(min=1e-9)) for a, b in zip(got, want)]       # one may be exactly 0


def with_grads(f, args, g):
    args = [a.detach().clone().requires_grad_() for a in args]
    out = f(*args)
    return [out.detach(), *torch.autograd.grad(out, args, g.to(out.dtype))]


def worst(got, want):
    "Largest relative error of a row."
    return float(((got.to(C128) - want).norm(dim=-1) / want.norm(dim=-1)).max())


def nodes(L): return 2j * torch.tan(math.pi * torch.arange(L, dtype=torch.float64) / (2 * L))


def legs_poles(b):
    "dt times the 32 eigenvalues of HiPPO-LegS above the real axis, for b step sizes from 1e-3 to 1e-1."
    return nplr("legs", 64)[0].to(C128) * torch.logspace(-3, -1, b, dtype=torch.float64)[:, None]


def randn(*shape): return torch.randn(*shape, dtype=C128)
def stable(*shape): return torch.complex(-randn(*shape).abs() / 9, 3 * randn(*shape).real)


def grid(T, dtype, conj, R, M=3, L=7):
    "Errors of the three sums for one set of sizes."
    v, y, w, x = randn(2, R, M), randn(2, min(R, 2), M), randn(2, M), stable(2, M)
    z = randn(R % 2 + 1, L)                                         # nodes of their own, or one set for all rows
    u = randn(2, min(R, 2), L)
    def with_conj(f): return lambda *a: f(*a, conj)
    def with_length(f): return lambda *a: f(*a, L, conj)
    return [*errors(with_conj(T.cauchy_triton), with_conj(cauchy_literal), (v, z, w), dtype),
            *errors(with_length(T.vandermonde_triton), with_length(vandermonde_literal), (y, x), dtype),
            *errors(T.power_sums_triton, power_sums_literal, (u if conj else u.real, x), dtype)]


# ---- interpreted -----------------------------------------------------------------------------------------------------
def interpreted():
    "The module, and what Triton 3.6 lacks to be interpreted beside NumPy 2.4: there an array of one is no index."
    import triton.runtime.interpreter as interpreter
    patch = interpreter._patch_lang_tensor
    def patched(tensor, *scope):
        patch(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())
    interpreter._patch_lang_tensor = patched
    import s4nb.ops.triton_sums as T
    torch.manual_seed(0)
    return T


def short():
    T = interpreted()
    found = {str(sizes): grid(T, *sizes) for sizes in product((C64, C128), (True, False), (1, 4))}
    print(json.dumps(found | {f.__name__: f(T) for f in (empty, strided, chunks, legs, far, growing, twice, ops)}))


def long():
    T = interpreted()
    sizes = product((C64, C128), (True, False), (1, 5), (1, 33), (1, 17, 300))
    more = ops(T, "test_aot_dispatch_static", "test_aot_dispatch_dynamic")
    print(json.dumps({str(s): grid(T, *s) for s in sizes} | {"ops": more}))


def empty(T):
    "Shapes and largest entries where nothing is to be summed, or nothing to be computed."
    found = []
    for B, R, M, L in ((0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0)):
        v, z, w = (randn(*s).requires_grad_() for s in ((B, R, M), (1, L), (B, M)))
        outs = T.cauchy_triton(v, z, w), T.vandermonde_triton(v, w, L), T.power_sums_triton(randn(B, R, L), w)
        grads = torch.autograd.grad(sum(o.abs().sum() for o in outs), (v, z, w), materialize_grads=True)
        wanted = (B, R, L), (B, R, L), (B, R, M), v.shape, z.shape, w.shape
        found += [(list(t.shape) == list(s), float(t.abs().sum())) for t, s in zip((*outs, *grads), wanted)]
    return found


def strided(T):
    "Errors for conjugate, transposed and expanded arguments."
    v, z, w = randn(2, 3, 1).mT.conj().expand(2, 2, 3), randn(5, 1).T, randn(1, 3).conj().expand(2, 3)
    x = -w * w.conj()
    return [float((T.cauchy_triton(v, z, w) - cauchy_literal(v, z, w, True)).abs().max()),
            float((T.vandermonde_triton(v, x, 5) - vandermonde_literal(v, x, 5, True)).abs().max())]


def chunks(T):
    "Errors where the sums over l are made in several parts."
    v, z, w = randn(1, 1, 1), randn(1, 2100), randn(1, 1)
    return (errors(T.cauchy_triton, lambda v, z, w: cauchy_literal(v, z, w, True), (v, z, w), C128)
            + errors(T.power_sums_triton, power_sums_literal, (randn(1, 1, 4200), stable(1, 2) / 40), C128))


def legs(T):
    "Errors in complex64 where it is hard: four numerators beside the resonant poles of HiPPO-LegS."
    args = rounded((randn(1, 4, 32), nodes(513)[None], legs_poles(1)), C64)
    g = randn(1, 4, 513).to(C64)
    got = with_grads(T.cauchy_triton, args, g)
    want = with_grads(lambda *a: cauchy_literal(*a, True), rounded(args, C128), g.to(C128))
    return [worst(a, b) for a, b in zip(got, want)]


def far(T):
    "Error in complex64 of a sum far out on fast modes: its phase is a hundred thousand radians."
    v, x = randn(1, 1, 4).to(C64), torch.complex(torch.full((4,), -1e-3), torch.linspace(40, 50, 4)).to(C128)[None]
    return [worst(T.vandermonde_triton(v, x, 2048), vandermonde_literal(v.to(C128), x, 2048, True))]


def growing(T):
    "Errors of sums over powers that would overflow a little further on."
    x = torch.full((1, 2), 16 + 1j, dtype=C128)
    return errors(T.power_sums_triton, power_sums_literal, (randn(1, 1, 5), x), C64)


def ops(T, *more):
    "What PyTorch's own check says of the ops, and gradients of all three, plain and compiled."
    v, z, w, u = (randn(*s).requires_grad_() for s in ((2, 2, 3), (1, 5), (2, 3), (2, 2, 5)))
    x = (-w.detach().abs() + 1j).requires_grad_()
    found = {}
    calls = (T.cauchy_triton, (v, z, w, True)), (T.vandermonde_triton, (v, x, 5, True)), (T.power_sums, (u, x, False))
    for op, args in calls:
        tests = ("test_schema", "test_autograd_registration", "test_faketensor", *more)
        found |= {f"{op._name} {k}": s for k, s in torch.library.opcheck(op, args, test_utils=tests).items()}
    def f(v, z, w, x):
        sums = T.cauchy_triton(v, z, w), T.vandermonde_triton(v, x, 9), T.power_sums_triton(u, x)
        return sum(s.abs().sum() for s in sums)
    leaves = v, z, w, x
    for name, g in (("plain", f), ("compiled", torch.compile(f, fullgraph=True, backend="aot_eager"))):
        found[name] = [float(t.abs().sum()) for t in torch.autograd.grad(g(*leaves), leaves)]
    return found


def slope(f):
    "A function of a's gradient, for second derivatives."
    def g(*a):
        a = [t if t.requires_grad else t.detach().requires_grad_() for t in a]
        slopes = torch.autograd.grad(f(*a).abs().square().sum(), a, create_graph=True)
        return torch.stack([d.abs().square().sum() for d in slopes])
    return g


def twice(T):
    "Errors of the second derivatives of sums of powers, and what those of Cauchy sums say."
    v, x, u = randn(1, 1, 2), stable(1, 2), randn(1, 1, 3)
    def literal_f(v, x): return vandermonde_literal(v, x, 3, True)
    found = errors(slope(lambda v, x: T.vandermonde_triton(v, x, 3)), slope(literal_f), (v, x), C128)
    for input in (u, u.real): found += errors(slope(T.power_sums_triton), slope(power_sums_literal), (input, x), C128)
    with pytest.raises(RuntimeError) as refused: slope(T.cauchy_triton)(v, u[0], x).sum().backward()
    return found, str(refused.value)


@pytest.fixture(scope="module")
def found(tmp_path_factory): return child("short", tmp_path_factory.mktemp("triton"), interpret=True)


@pytest.mark.parametrize("R", [1, 4])
@pytest.mark.parametrize("conj", [True, False])
@pytest.mark.parametrize("dtype", [C64, C128], ids=str)
def test_interpreted_values_and_gradients(found, dtype, conj, R):
    assert max(found[str((dtype, conj, R))]) < TOLERANCE[dtype]


@pytest.mark.parametrize("case", ["chunks", "strided"])
def test_interpreted_cases(found, case): assert max(found[case]) < TOLERANCE[C128]


@pytest.mark.parametrize("case", ["far", "growing"])
def test_interpreted_single_precision(found, case): assert max(found[case]) < TOLERANCE[C64]


def test_interpreted_empty(found): assert all(shape and total == 0 for shape, total in found["empty"])


def test_interpreted_beside_the_poles_of_legs(found):
    value, *gradients = found["legs"]
    assert value < 2e-6 and max(gradients) < 1e-5


def test_ops_are_sound_and_compile_in_one_graph(found):
    plain, compiled = found["ops"].pop("plain"), found["ops"].pop("compiled")
    assert set(found["ops"].values()) == {"SUCCESS"} and compiled == pytest.approx(plain, rel=1e-12)


def test_second_derivatives(found):
    of_powers, of_cauchy = found["twice"]
    assert max(of_powers) < TOLERANCE[C128] and "no autograd formula was registered" in of_cauchy


@pytest.mark.stress
def test_interpreted_grid(tmp_path):
    found = child("long", tmp_path, interpret=True)
    assert sum(said == "SUCCESS" for said in found.pop("ops").values()) == 15
    for sizes, e in found.items():
        assert max(e) < 5 * TOLERANCE[C64 if "complex64" in sizes else C128], sizes


# ---- compiled for a GPU that need not be there -----------------------------------------------------------------------
def compiled(most=False):
    """Every launch of the three sums and their gradients is compiled for sm_90 instead of launched: name, size of the
    machine code, what the assembler says of spilled registers. And the error of a launch without a GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    import s4nb.ops.triton_sums as T
    assembler = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    launches, types = [], {torch.float32: "*fp32", torch.float64: "*fp64"}

    def assemble(kernel, programs, *args, **constants):
        options = {k: constants.pop(k) for k in ("num_warps", "num_stages") if k in constants}
        given = [types[a.dtype] if isinstance(a, torch.Tensor) else "i32" for a in args]
        signature = dict(zip(kernel.arg_names, given)) | dict.fromkeys(constants, "constexpr")
        source = ASTSource(kernel, signature=signature, constexprs=constants)
        asm = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm
        command = [assembler, "-v", "-arch=sm_90a", "-o", os.devnull, "-"]
        said = subprocess.run(command, input=asm["ptx"], capture_output=True, text=True).stderr
        launches.append((f"{kernel.__name__} {given[0]} {constants}", len(asm["cubin"]), said, "tf32" in asm["ptx"]))

    try: T.cauchy_triton(randn(1, 1, 1), randn(1, 1), randn(1, 1))
    except RuntimeError as e: launches.append(str(e))
    T.on_gpu = lambda t: torch.view_as_real(t.resolve_conj().contiguous()) if t.is_complex() else t.contiguous()
    T.launch = assemble
    for dtype, conj, R in product((C64, C128), (True, False), (1, 2, 4)) if most else [(C64, True, 4)]:
        v, x, z, u = rounded((randn(1, R, 32), stable(1, 32), randn(1, 4096), torch.randn(1, R, 4096)), dtype)
        for leaf in (v, x, z, u) if most else (v, x): leaf.requires_grad_()
        outs = [T.cauchy_triton(v, z, x, conj), T.vandermonde_triton(v, x, 4096, conj), T.power_sums_triton(u, x)]
        torch.autograd.backward(outs, [torch.randn_like(o) for o in outs])
    print(json.dumps(launches))


def all_compiled(): compiled(most=True)


def check(launches):
    for name, size, said, tf32 in launches:
        assert size > 1000 and "0 bytes spill stores, 0 bytes spill loads" in said and not tf32, (name, said)
    return {name.split()[0] for name, *_ in launches}


KERNELS = {"cauchy_kernel", "cauchy_grads_kernel", "vandermonde_kernel", "power_sums_kernel"}


def test_kernels_compile_for_sm_90_without_spills(tmp_path):
    reason, *launches = child("compiled", tmp_path, interpret=False)
    assert check(launches) == KERNELS
    assert "need a GPU: got a tensor on cpu" in reason and "TRITON_INTERPRET=1" in reason


@pytest.mark.stress
def test_every_kernel_compiles_for_sm_90_without_spills(tmp_path):
    assert check(child("all_compiled", tmp_path, interpret=False)[1:]) == KERNELS


# ---- on a GPU --------------------------------------------------------------------------------------------------------
def beside_torch(f, torch_f, *args):
    """Relative errors of the value and of the gradients (worst row) against the torch form in complex128.
    A second run has to give the same bits."""
    args = [a.cuda() for a in args]
    g = torch.randn_like(f(*args))
    got, again = with_grads(f, args, g), with_grads(f, args, g)
    assert all(torch.equal(a, b) for a, b in zip(got, again))
    want = with_grads(torch_f, rounded(args, C128), g.to(C128 if g.is_complex() else torch.float64))
    value, *gradients = (worst(a, b) for a, b in zip(got, want))
    return value, max(gradients)


PRECISIONS = [(C64, 2e-6, 1e-5), (C128, 1e-11, 1e-11)]    # in double: phases and products of 1e4 and more cost digits


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("L", [1, 17, 513, 4097, 16384])
@pytest.mark.parametrize("R", [1, 4])
@pytest.mark.parametrize("dtype, of_value, of_gradients", PRECISIONS)
def test_cauchy_on_a_gpu(dtype, of_value, of_gradients, R, L):
    from s4nb.ops.triton_sums import cauchy_triton
    def in_torch(v, z, w): return CauchySum.apply(v, z.expand(len(v), -1), w, True)
    args = rounded((randn(64, R, 32), nodes(L)[None], legs_poles(64)), dtype)
    value, gradients = beside_torch(cauchy_triton, in_torch, *args)
    assert value < of_value and gradients < of_gradients


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("conj", [True, False])
@pytest.mark.parametrize("L", [2, 17, 1000, 16384])
@pytest.mark.parametrize("dtype, of_value, of_gradients", PRECISIONS)
def test_powers_on_a_gpu(dtype, of_value, of_gradients, L, conj):
    from s4nb.ops.triton_sums import power_sums_triton, vandermonde_triton
    x = legs_poles(64)                                   # phases keep double precision
    v, u = randn(64, 2, 32).to(dtype), randn(64, 2, L).to(dtype)
    def sums(v, x): return vandermonde_triton(v, x, L, conj)
    def sums_in_torch(v, x): return Vandermonde.apply(v, x[:, None], L, conj)
    def transposed_in_torch(u, x): return VandermondeT.apply(u, x[:, None])
    for f, in_torch, a in ((sums, sums_in_torch, v), (power_sums_triton, transposed_in_torch, u.real if conj else u)):
        value, gradients = beside_torch(f, in_torch, a, x)
        assert value < of_value and gradients < of_gradients


@pytest.mark.gpu
@on_gpu
def test_more_rows_than_a_grid_axis_holds():
    from s4nb.ops.triton_sums import cauchy_triton, vandermonde_triton
    v, w = (t.to("cuda", C64) for t in (randn(70000, 1, 2), stable(70000, 2)))
    z = nodes(3)[None].to("cuda", C64)
    exact = v.to(C128), z.to(C128), w.to(C128)
    assert worst(cauchy_triton(v, z, w), cauchy_literal(*exact, True)) < 1e-5
    assert worst(vandermonde_triton(v, w, 3), vandermonde_literal(exact[0], exact[2], 3, True)) < 1e-5
