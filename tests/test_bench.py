"`s4nb bench`: all of it runs at tiny sizes, the card has what the book draws, mistakes are one line. No time is asserted."
import json
import re

import pytest
import torch

from s4nb.baselines import LITERAL, Attention, fft_conv, literal_sums
from s4nb.bench import FASTER, QUICK, TABLES, Case, Plan, bench, clock, in_turns, line, measure, sums
from s4nb.ops.cauchy_sum import OPS, usable
from s4nb.ops.convolution import long_conv
from s4nb.training.record import load_card
from s4nb.training.run import main


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
