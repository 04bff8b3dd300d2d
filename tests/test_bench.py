"`s4nb bench`: all of it runs at tiny sizes, the card has what the book draws, mistakes are one line. No time is asserted."
import importlib.util
import json
import re
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch

from s4nb.baselines import LITERAL, Attention, fft_conv, literal_sums
from s4nb import bench_lengths, bench_time
from s4nb.bench import (FASTER, FASTER_ON_GPU, GPU, OF_FLOOR, QUICK, TABLES, Plan, bench, failed, judged, line, make_block,
                        sums, variants)
from s4nb.bench_lengths import computing_in, over_lengths, part_of, text_of
from s4nb.bench_rates import measured_rates
from s4nb.bench_time import SLOTS, Case, Rates, clock, floor_ms, in_turns, measure, work_of
from s4nb.ops.cauchy_sum import OPS, usable
from s4nb.ops.convolution import long_conv
from s4nb.training.record import load_card
from s4nb.training.run import main


FLOORED = ("convolution", "S4 block", "S4D block", *SLOTS)


def test_the_whole_in_small(tmp_path, capsys):
    before = torch.get_num_threads()
    assert main(["bench", "--quick", "--device", "cpu", "--threads", "1", "--out", str(tmp_path / "card")]) == 0
    shown, card = capsys.readouterr().out, load_card(tmp_path / "card")
    assert torch.get_num_threads() == before and "literal" not in OPS["cauchy"].backends
    assert (card["name"], card["state"], card["threads"]) == ("kernels", "trial", dict.fromkeys(TABLES, 1))
    assert all(card[t] for t in TABLES) and "torch" in card["backends"] and card["versions"]["torch"]
    for row in [row for t in ("kernel", "convolution", "block", "step") for row in card[t]]:
        assert row["title"] in shown and {row["base"], *row["faster"]} == set(row["ms"]) and row["base"] not in row["faster"]
        numbers = [x for of in (*row["ms"].values(), *row["faster"].values()) for x in (of["cpu"], of["wall"])]
        assert all(0 < x < float("inf") for x in numbers)
    assert all(row["peak_mb"] > 0 and row["saved_mb"] > 0 for row in card["memory"])
    assert all(0 < row["forward"] < 1e-4 for row in card["accuracy"] if row["backend"] != "literal")
    timed = [row for t in ("kernel", "convolution", "block") for row in card[t] if row["what"].partition(",")[0] in FLOORED]
    assert timed and all(row["floor_ms"] > 0 and set(row["of_floor"]) == set(row["ms"]) for row in timed)
    reached = {(row["layer"], row["L"]) for row in card["length"] if row["precision"] == "float32"}
    assert reached == {(name, L) for name in bench_lengths.LAYERS for L in QUICK.reach[2]}
    assert all(sum(row["part_ms"].values()) > 0 and row["part_ms"]["kernel"] > 0 for row in card["profile"])
    assert not re.search(r"/(work|tmp|home|root)/|20\d\d-\d\d", json.dumps(card))


def test_one_table_is_a_trial(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "--quick", "--only", "accuracy", "--only", "step", "--device", "cpu"]) == 0
    card = load_card(tmp_path / "results/tmp/kernels")
    assert set(TABLES) & set(card) == {"accuracy", "step"} and card["state"] == "trial"
    assert [p.name for p in tmp_path.iterdir()] == ["results"] and "memory" not in capsys.readouterr().out


@pytest.mark.parametrize("arguments, text", [
    (["--only", "kernels"], "did you mean 'kernel'"), (["--device", "tpu"], "allowed: cpu"),
])
def test_a_mistake_is_one_line(arguments, text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and text in err and not list(tmp_path.iterdir())


def test_goals_are_measured_and_judged():
    def titles(what, sizes, names): return {f"{what}, " + " ".join(f"{k}={n}" for k, n in zip(names, s)) for s in sizes}
    plan, both = Plan(), "forward + backward"
    planned = {t for op in ("Cauchy", "Vandermonde") for t in titles(f"{op} sum, {both}", plan.sums, ("H", "L", "N"))}
    planned |= titles(f"S4 kernel, {both}", plan.kernels, ("H", "L", "N"))
    planned |= {t for k in ("S4", "S4D") for t in titles(f"{k} block, {both}", plan.blocks, ("B", "H", "L"))}
    planned |= {t for k in ("S4 ", "S4D ") for w in ("step", "block step") for t in titles(k + w, plan.steps, ("B", "H"))}
    assert set(FASTER) <= planned
    wide = titles("DPLR spectrum, forward", GPU.spectra, "HLN") | titles("Vandermonde sum, forward", GPU.sums, "HLN")
    assert set(OF_FLOOR) <= wide
    assert set(FASTER_ON_GPU) <= {t for k in ("S4", "S4D") for t in titles(f"{k} block, {both}", GPU.blocks, "BHL")}
    times = {"cpu": 8.0, "wall": 9.0}
    row = {"title": "x", "base": "literal", "goal": 4, "ms": {"literal": times, "native": times}}
    assert "(goal 4: reached)" in line({**row, "faster": {"native": {"cpu": 4.0, "wall": 4.5}}})
    assert "(goal 4: NOT reached)" in line({**row, "faster": {"native": {"cpu": 4.5, "wall": 3.9}}})
    error = {"what": "Cauchy sum", "measure": "legs", "L": 8, "backend": "torch", "forward": 1e-6, "backward": 2e-5}
    assert re.search(r"2e-06: reached.*1e-05: NOT reached", line(error))


def test_turns_are_taken():
    order = []
    ways = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    in_turns(ways, Plan(rounds=3, slice_ms=0.0), "cpu")
    assert "".join(order) == "aabb" + "ab" * 3
    ways = {"slow": lambda: torch.randn(10**6), "fast": lambda: torch.randn(10**3)}
    row = measure(Case("numbers", ways, "slow", {"n": 1}), QUICK, "cpu")
    assert row["title"] == "numbers, n=1" and row["faster"]["fast"]["cpu"] > 3 and "goal" not in row
    assert set(clock(lambda: None, 1, "cpu")) == {"cpu", "wall"}


def test_literal_sums_are_right_and_leave():
    with literal_sums():
        assert all(usable(op, "literal", "cpu", torch.complex128) == "ok" for op in LITERAL)
        for f, *leaves in sums("legt", 2, 33, 8, "cpu").values():
            leaves = [x.to(torch.complex128) for x in leaves]
            assert torch.allclose(f(*leaves, "literal"), f(*leaves, "torch"), rtol=1e-9)
        with literal_sums(): pass
        f(*leaves, "literal")                                                  # still there: it is the outer one's
    with pytest.raises(ValueError, match="literal"): f(*leaves, "literal")


def test_the_other_baselines():
    u, K, D = torch.randn(2, 3, 33), torch.randn(1, 3, 33), torch.randn(1, 3)
    assert torch.allclose(fft_conv(u, K, D), long_conv(u, K, D=D), atol=1e-4)
    attention, x = Attention(64), torch.randn(2, 9, 64)
    y, late = attention(x), x.clone()
    late[:, 5:] += 1
    assert y.shape == x.shape and torch.allclose(attention(late)[:, :5], y[:, :5], atol=1e-6)
    assert not torch.allclose(attention(late)[:, 5:], y[:, 5:], atol=1e-3)


def test_a_plan_without_compiled_kernels(capsys, monkeypatch):
    monkeypatch.setattr("s4nb.bench.usable", lambda op, b, device: "ok" if b == "torch" else "no compiler")
    card = bench(["step"], QUICK, "cpu")
    assert "without native: no compiler" in capsys.readouterr().out
    assert card["backends"] == ["torch"] and all(set(row["ms"]) == {"torch"} for row in card["step"])


# ---- floors ----------------------------------------------------------------------------------------------------------
def test_floors():
    "The published estimates for a GPU of 132 x 128 x 1.98 GHz and 4.3 TB/s: H = 256, N = 64, L = 16384, in microseconds."
    gpu, size = Rates(132 * 128 * 1.98e9, 4.3e12), {"H": 256, "L": 16384}
    for what, expected in {"DPLR spectrum": 44, "Cauchy sum": 20, "Vandermonde sum": 8.0}.items():
        assert 1e3 * floor_ms(work_of(what, False, **size), gpu) == pytest.approx(expected, rel=0.03)
    assert 1e3 * floor_ms(work_of("Vandermonde sum", True, **size), gpu) == pytest.approx(8 + 16, rel=0.03)
    assert 1e3 * floor_ms(work_of("convolution", False, B=16, **size), gpu) == pytest.approx(125, rel=0.01)
    fma, moved = work_of("S4 block", False, B=16, **size)
    assert fma > 2 * 16 * 16384 * 256**2 and moved == 8 * 16 * 16384 * 256
    assert work_of("LSTM", False, **size) is None
    rates, found = measured_rates("cpu", quick=True)
    assert 1e8 < rates.fma < 1e13 and 1e8 < rates.bytes < 1e13 and set(found) == {"matrices", "copies"}


def test_shares_of_the_floor_are_judged():
    case = Case("DPLR spectrum, forward", {"native": lambda: None}, "torch", {"H": 256, "L": 16384, "N": 64}, (1e9, 1.0))
    row = judged(measure(case, QUICK, "cpu", Rates(1e12, 1e12)), "cuda")
    assert row["floor_ms"] == 1.0 and row["floor_goal"] == 0.6 and row["of_floor"]["native"] > 1 and row["faster"] == {}
    assert line(row).endswith("(goal 0.6: reached)") and "torch failed" in line(row)
    assert line(row | {"of_floor": {"native": 0.59}}).endswith("native 59 % (goal 0.6: NOT reached)")
    assert "floor_goal" not in judged(measure(case, QUICK, "cpu", Rates(1e12, 1e12)), "cpu")


# ---- what only a GPU does, without one -------------------------------------------------------------------------------
@pytest.fixture
def pretended_gpu(monkeypatch):
    "torch.cuda as far as the clocks use it: what is captured is called again by each replay; some calls cannot be."
    class Graph:
        def replay(self): self.call()

    @contextmanager
    def graph(g):
        calls = []
        monkeypatch.setattr(torch.cuda, "capturing", calls, raising=False)
        yield
        if "refused" in calls: raise RuntimeError("operation not permitted when stream is capturing\nand more")
        g.call = lambda: None
    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, value in {"synchronize": lambda: None, "Stream": lambda: stream, "current_stream": lambda: stream,
                        "stream": lambda s: nullcontext(), "CUDAGraph": Graph, "graph": graph, "capturing": []}.items():
        monkeypatch.setattr(torch.cuda, name, value, raising=False)


def test_ways_on_a_gpu(pretended_gpu):
    def out_of_memory(): raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB\nfree: 1 GiB")
    def broken(): raise RuntimeError("no kernel image is available")
    ways = {"good": lambda: torch.ones(3), "uncaptured": lambda: torch.cuda.capturing.append("refused"),
            "large": out_of_memory, "broken": broken}
    ms, told = in_turns(ways, QUICK, "cuda")
    assert set(ms["good"]) == {"wall", "graph"} and set(ms["uncaptured"]) == {"wall"} and set(ms) == {"good", "uncaptured"}
    assert told == {"uncaptured": {"graph": "operation not permitted when stream is capturing"},
                    "large": {"run": "CUDA out of memory. Tried to allocate 3 GiB"},
                    "broken": {"run": "no kernel image is available"}}
    row = measure(Case("x", ways, "good", {"L": 1}), QUICK, "cuda")
    assert "broken: no run (no kernel image is available)" in line(row) and set(row["faster"]) == {"uncaptured"}
    assert failed({"kernel": [row]}) == ["x, L=1"]
    row["failed"].pop("broken")
    assert failed({"kernel": [row], "block": [{"title": "y"}]}) == []
    row = measure(Case("x", ways, "large", {"L": 1}), QUICK, "cuda")
    assert row["faster"] == {} and "large failed" in line(row)


# ---- lengths and parts -----------------------------------------------------------------------------------------------
def test_a_layer_ends_where_it_takes_too_long(monkeypatch):
    seconds = iter([1.0, 4.0, 15.0, 1e9])
    monkeypatch.setattr(bench_lengths, "timed_runs", lambda *_: {"wall": 1e3 * next(seconds)})
    plan = Plan(reach=(64, 2, (8, 16, 32, 64), 20.0))
    *rows, last = over_lengths("LSTM", "float32", "torch", plan, "cpu")
    assert [(r["B"], r["L"], r["pass_ms"]["wall"]) for r in rows] == [(8, 8, 1e3), (4, 16, 4e3), (2, 32, 15e3)]
    assert last["L"] == 64 and last["left_out"] == "would take about 56 s, after 15.0 s" and "56 s" in text_of(last)
    def no_memory(*_): raise torch.OutOfMemoryError("no memory")
    monkeypatch.setattr(bench_lengths, "timed_runs", no_memory)
    assert [row["left_out"] for row in over_lengths("S4D", "float32", "torch", plan, "cpu")] == ["no memory"]


def test_parts_by_their_names():
    names = {"void s4nb::cuda::spectrum_kernel<float, 4>": "kernel", "s4nb::vandermonde": "kernel",
             "cauchy_backward_kernel": "kernel", "void vector_fft<32768u>": "FFT", "aten::_fft_r2c": "FFT",
             "sm90_xmma_gemm_f32f32_tf32f32_f32": "matrix products", "aten::addmm": "matrix products",
             "void at::native::vectorized_elementwise_kernel<4>": "pointwise", "triton_poi_fused_gelu_0": "pointwise"}
    assert {name: part_of(name) for name in names} == names


def test_output_and_gradients_of_a_pass():
    for name in bench_lengths.LAYERS:
        grads = bench_lengths.training_pass(name, "torch", 2, 4, 16, "float32", "cpu")()
        assert grads[0].shape == (2, 16, 4) and all(g is None or g.isfinite().all() for g in grads), name


def test_precisions_begin_and_end():
    for precision, matmul, half in [("float32", "highest", False), ("tf32", "high", False), ("bfloat16", "highest", True)]:
        with computing_in(precision, "cpu"):
            assert torch.get_float32_matmul_precision() == matmul and torch.is_autocast_enabled("cpu") == half
        assert torch.get_float32_matmul_precision() == "highest" and not torch.is_autocast_enabled("cpu")


def test_variants_of_a_block(monkeypatch):
    "With a compiler that compiles nothing: each gives the gradients of the block, to its own precision."
    monkeypatch.setattr(torch, "compile", lambda module: module.forward)
    u, block = torch.randn(2, 64, 4, requires_grad=True), make_block("S4D", "torch", 4, "cpu")
    found = {name: run()[0] for name, run in variants(block, u).items()}
    assert set(found) == {"float32", "tf32", "bfloat16", "tf32, compiled", "bfloat16, compiled"}
    want = found["float32"]
    for name, du in found.items(): assert (du - want).norm() <= (2e-2 if "bfloat16" in name else 1e-6) * want.norm(), name


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_the_chains_are_multiply_adds():
    "Compiled for a GPU that is not there: 16 steps of 8 chains a thread, and no other arithmetic on floats."
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from s4nb.bench_triton import chains
    if not isinstance(chains, triton.JITFunction): pytest.skip("Triton interprets here")
    types = {"x_ptr": "*fp32", "a": "fp32", "b": "fp32", "steps": "i32", "BLOCK": "constexpr"}
    text = triton.compile(ASTSource(chains, types, {"BLOCK": 1024}), target=GPUTarget("cuda", 90, 32)).asm["ptx"]
    assert text.count("fma.rn.f32") == 128 and "mul.f32" not in text and "add.f32" not in text
