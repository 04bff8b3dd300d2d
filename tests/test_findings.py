"""What a run has found: tables, curves, eigenvalues, kernels, errors, against computations of their own."""
import math
import subprocess

import matplotlib
import pytest
import torch
from matplotlib.figure import Figure

from s4nb.hippo.transition import transition
from s4nb.s4.block import S4D, S4Block
from s4nb.s4.kernels import DiagKernel, DPLRKernel
from s4nb.s4.nplr import nplr
from s4nb.ssm.lssl import LSSL, DenseKernel
from s4nb.training.experiments import experiment
from s4nb.training.findings import (before_and_after, cards_of, complete, confusion, draw_confusion, draw_curves, draw_kernels, draw_timescales,
                                    impulse, kernels_of, modes, moved, predictions, runs_below, table_of, timescales)
from s4nb.training.fit import build, run
from s4nb.training.record import save_card, save_rows

matplotlib.use("Agg")
SMALL = ("model.d_model=4", "model.n_layers=1", "model.layer.d_state=8", "trainer.max_epochs=1", "trainer.progress=false", "trainer.threads=1")


def card(name="toy", seed=0, **more):
    return {"name": name, "state": "measured", "seed": seed, "command": f"s4nb train experiment={name}", "config": {"seed": seed},
            "result": {"accuracy": 0.5 + seed / 10}, "chance": {"metric": "accuracy", "score": 0.1}} | more


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    "The folder of a run of an epoch, and its card."
    place = tmp_path_factory.mktemp("runs")
    found = run(experiment("digits", *SMALL, "seed=3", f"output_dir={place}/digits"))
    return place / "digits", found


def test_runs_are_grouped_by_what_they_measure(tmp_path):
    for path, c in (("a", card()), ("b", card(seed=1)), ("sub/c", card("other")), ("tmp/d", card()), ("e", card(state="partial")), ("f", {"what": 1})):
        save_card(tmp_path / path, c)
    runs = runs_below(tmp_path)
    assert {name: [[path for path, _ in g] for g in groups] for name, groups in runs.items()} == {"toy": [["a", "b"], ["e"]], "other": [["sub/c"]]}
    assert cards_of("other", tmp_path) == runs["other"] and cards_of("none", tmp_path) == [] and runs_below(tmp_path / "no") == {}


def test_tables_have_the_asked_columns_and_links_from_where_they_stand(tmp_path):
    save_card(tmp_path / "a", card("digits"))
    save_card(tmp_path / "b", card("digits", seed=1))
    columns = ("experiment", "ours", "state")
    lines = table_of(["lra-pathx", "digits"], tmp_path, columns).splitlines()
    assert lines == ["| experiment | ours | state |", "| --- | --- | --- |", "| lra-pathx |  | not run |",
                     f"| [digits]({tmp_path}/a/card.json) [2]({tmp_path}/b/card.json) | 55.00 ± 7.07 % | measured |"]
    with pytest.raises(KeyError, match="no-such"):
        table_of(["no-such"], tmp_path)


def test_curves_show_validation_goal_and_guess(tmp_path):
    (tmp_path / "a").mkdir()
    save_rows(tmp_path / "a" / "metrics.csv", [{"epoch": 1, "val/accuracy": 0.25}, {"epoch": 2}, {"epoch": 3, "val/accuracy": 0.5}])
    axes = Figure().add_subplot()
    draw_curves(axes, tmp_path, [("a", card(config={"goal": 60.0}))])
    curve, goal, guess = axes.lines
    assert list(curve.get_xdata()) == [1, 3] and list(curve.get_ydata()) == [25, 50]
    assert goal.get_ydata()[0] == 60 and guess.get_ydata()[0] == 10 and "(%)" in axes.get_ylabel()
    save_rows(tmp_path / "a" / "metrics.csv", [{"epoch": 1, "val/loss": 0.25}])
    axes = Figure().add_subplot()
    draw_curves(axes, tmp_path, [("a", card(chance={"metric": "mse", "score": 0.5}))], "mine")
    assert list(axes.lines[0].get_ydata()) == [0.25] and axes.get_ylabel() == "validation mse" and len(axes.lines) == 2


def test_before_is_what_the_seed_made_and_after_what_was_saved(done):
    folder, _ = done
    before, after = before_and_after(folder)
    e = experiment("digits", *SMALL, "seed=3")
    assert all(torch.equal(p, q) for p, q in zip(before.parameters(), build(e)[1].parameters(), strict=True))
    saved = torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(p, saved[f"model.{name}"]) for name, p in after.named_parameters())
    state = torch.get_rng_state()
    before_and_after(folder)
    assert torch.equal(state, torch.get_rng_state())


def test_modes_of_each_kind():
    dplr = DPLRKernel(3, 8, dt_min=0.02, dt_max=0.02).double()
    assert (modes(dplr) / 0.02 - nplr("legs", 8)[0]).abs().max() < 1e-5 and modes(dplr).shape == (3, 4)
    decay, period = timescales(DiagKernel(2, 8, init="diag-lin", dt_min=0.01, dt_max=0.01))
    assert (decay - 200).abs().max() < 1e-2 and math.isinf(period[0, 0]) and abs(period[0, 1] - 200) < 1e-2
    real = DiagKernel(2, 4, init="diag-real", is_real=True, dt_min=0.01, dt_max=0.01)
    assert timescales(real)[1].isinf().all() and modes(real).shape == (2, 4)
    untied = modes(DiagKernel(2, 8, dt_tie=False))
    assert untied.shape == (2, 4)
    with pytest.raises(ValueError, match="modes is for DPLRKernel and DiagKernel, got DenseKernel"):
        modes(DenseKernel(1, 4))


def test_eigenvalues_of_legs_are_at_the_mercy_of_rounding():
    A = transition("legs", 32)[0]
    noise = torch.randn(32, 32, generator=torch.Generator().manual_seed(0), dtype=A.dtype)
    assert (torch.linalg.eigvals(A * (1 + 1e-7 * noise)).real.sort().values + torch.arange(32, 0, -1)).abs().max() < 1e-4  # still triangular
    noisy = A + 1e-7 * noise
    assert (torch.linalg.eigvals(noisy).real.sort().values + torch.arange(32, 0, -1)).abs().max() > 1


@pytest.mark.parametrize("layer", [S4Block(4, 8), S4D(4, 8), LSSL(4, 8)])
def test_kernels_are_the_impulse_responses(layer):
    (kernel,) = kernels_of(layer)
    u = torch.zeros(1, 30, 4)
    u[:, 0] = 1
    with torch.no_grad():
        y = layer.eval().convolve(u.mT, None, 1.0, False)[0].reshape(-1, 30)[:4] - layer.D.reshape(4, 1) * u[0].T
    assert (y - impulse(kernel, 30)).abs().max() < 1e-5


def test_moved_is_zero_for_what_is_frozen():
    torch.manual_seed(0)
    before = S4Block(4, 8, lr={"dt": 1e-3, "A": 0.0, "B": 1e-3, "C": None})
    after = S4Block(4, 8, lr={"dt": 1e-3, "A": 0.0, "B": 1e-3, "C": None})
    after.load_state_dict(before.state_dict())
    assert all(v == 0 for v in moved(before, after)[0].values())
    after.kernel.set_length(16)                                          # another form of the same C
    with torch.no_grad():
        after.kernel.B.mul_(1.5)
    (row,) = moved(before, after)
    assert row["A_real"] == row["A_imag"] == row["dt"] == 0 and abs(row["B"] - 0.5) < 1e-6 and row["C"] < 1e-4
    a, b = LSSL(4, 8), LSSL(4, 8)
    b.load_state_dict(a.state_dict())
    b.kernel.inv_dt.data += math.log(2)
    assert abs(moved(a, b)[0]["dt"] - 1) < 1e-6                          # an octave


def test_plots_have_a_panel_for_each_layer(done):
    before, after = before_and_after(done[0])
    axes = draw_timescales(Figure(), before, after, 64)
    assert len(axes) == 1 and [len(line.get_xdata()) for line in axes[0].lines[:2]] == [16, 16]
    axes = draw_kernels(Figure(), before, after, 64, 2)
    largest = impulse(kernels_of(after)[0], 64).square().sum(-1).argmax()
    assert axes.shape == (2, 1) and axes[0, 0].get_title() == f"layer 1, feature {largest}"


def test_predictions_and_confusion_agree_with_the_card(done):
    folder, found = done
    data = experiment("digits").dataset.build().prepare()
    answers, truth = predictions(before_and_after(folder)[1], data)
    assert abs((answers == truth).double().mean().item() - found["test_accuracy"]) < 1e-6
    counts = confusion(answers, truth, 10)
    assert all(counts[i, j] == ((truth == i) & (answers == j)).sum() for i in range(10) for j in range(10))
    axes = Figure().add_subplot()
    draw_confusion(axes, torch.tensor([[3, 1], [0, 0]]), ["a", "b"])
    assert [t.get_text() for t in axes.texts] == ["1"] and axes.images[0].get_array()[0, 0] == 0.75


def test_complete_fails_with_its_command(tmp_path):
    complete("python -c \"open('made', 'w')\"", tmp_path)
    assert (tmp_path / "made").exists()
    with pytest.raises(subprocess.CalledProcessError):
        complete("python -c 'raise SystemExit(2)'", tmp_path)
