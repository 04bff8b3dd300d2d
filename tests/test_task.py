"""The training step by itself: losses and metrics against literal ones, what is ignored, where numbers stop."""
import math

import pytest
import torch
from torch import nn

from s4nb.training.architectures import Facts, S4DLayer, SequenceBackbone
from s4nb.training.task import (IGNORED, LOSSES, METRICS, REAL, BitsPerStep, NonFiniteLoss, Task, binary_cross_entropy, count, cross_entropy,
                                label_smoothing, require_finite, step_seed)

CLASSES = Facts("classification", None, 2, 6, 12)
NUMBERS = Facts("regression", None, 2, 3, 12, 12)


def model_of(facts):
    torch.manual_seed(0)
    return SequenceBackbone(layer=S4DLayer(d_state=4), d_model=8, n_layers=1, decoder="all" if facts.l_output else "pool").build(facts)


def adam(model): return torch.optim.Adam(model.parameters(), 0.01)


def test_cross_entropy_leaves_out_what_does_not_count():
    z, y = torch.randn(4, 5, 6, dtype=torch.double), torch.randint(6, (4, 5))
    y[0, 2:] = y[3, 4] = IGNORED
    terms = [-z[i, j].log_softmax(-1)[y[i, j]] for i in range(4) for j in range(5) if y[i, j] >= 0]
    assert len(terms) == 16 and torch.allclose(cross_entropy(z, y), sum(terms) / 16)
    smooth = [0.9 * t + 0.1 * (-z[i, j].log_softmax(-1)).mean() for t, (i, j) in zip(terms, [(i, j) for i in range(4) for j in range(5)
                                                                                             if y[i, j] >= 0])]
    assert torch.allclose(label_smoothing(z, y), sum(smooth) / 16)


def test_other_losses():
    z, y = torch.randn(3, 4, dtype=torch.double), torch.randint(2, (3, 4))
    p = torch.sigmoid(z)
    assert torch.allclose(binary_cross_entropy(z, y), -(y * p.log() + (1 - y) * (1 - p).log()).mean())
    t = torch.randn(3, 4, dtype=torch.double)
    assert torch.allclose(LOSSES["mse"](z, t), ((z - t) ** 2).mean()) and torch.allclose(LOSSES["mae"](z, t), (z - t).abs().mean())


def test_metrics_over_unequal_batches():
    torch.manual_seed(0)
    z, y = torch.randn(11, 7, 6), torch.randint(6, (11, 7))
    y[2, 3:] = IGNORED
    meters = {name: METRICS[name](CLASSES) for name in ("accuracy", "accuracy@3", "f1", "ppl", "bits")}
    for rows in (slice(0, 2), slice(2, 9), slice(9, 11)):
        for meter in meters.values():
            count(meter, z[rows], y[rows])
    flat, labels = z[y >= 0], y[y >= 0]
    order = flat.argsort(-1, descending=True)
    assert meters["accuracy"].compute() == pytest.approx((order[:, 0] == labels).double().mean().item(), abs=1e-6)
    assert meters["accuracy@3"].compute() == pytest.approx((order[:, :3] == labels[:, None]).any(1).double().mean().item(), abs=1e-6)
    nats = -flat.log_softmax(-1).gather(1, labels[:, None]).double().mean().item()
    assert meters["ppl"].compute() == pytest.approx(math.exp(nats), rel=1e-4)
    assert isinstance(meters["bits"], BitsPerStep) and meters["bits"].compute() == pytest.approx(nats / math.log(2), rel=1e-4)
    f1 = [2 * ((order[:, 0] == c) & (labels == c)).sum() / ((order[:, 0] == c).sum() + (labels == c).sum()) for c in range(6)]
    assert meters["f1"].compute() == pytest.approx((sum(f1) / 6).item(), abs=1e-5)
    a, b = torch.randn(9, 5, 3), torch.randn(9, 5, 3)
    for name, value in (("mse", (a - b).square().mean()), ("mae", (a - b).abs().mean()), ("rmse", (a - b).square().mean().sqrt())):
        meter = METRICS[name](NUMBERS)
        count(meter, a[:4], b[:4]), count(meter, a[4:], b[4:])
        assert meter.compute() == pytest.approx(value.item(), rel=1e-5)


def test_area_under_the_curve_of_two_classes():
    meter = METRICS["auc"](Facts("classification", None, 1, 2))
    z, y = torch.tensor([[3.0, 0.0], [0.0, 1.0], [0.0, 3.0], [1.0, 0.0]]), torch.tensor([0, 0, 1, 1])
    count(meter, z, y)
    share = sum(z[i, 1] - z[i, 0] > z[j, 1] - z[j, 0] for i in (2, 3) for j in (0, 1)) / 4  # ordered pairs that are right
    assert meter.compute() == pytest.approx(share.item(), abs=0.01)


def test_area_under_the_curve_does_not_depend_on_the_batches():
    "Of a single row with both logits in [0, 1], torchmetrics would take the logits for probabilities."
    torch.manual_seed(0)
    z = torch.rand(80, 2)
    y = (torch.rand(80) < torch.sigmoid(4 * (z[:, 1] - z[:, 0]))).long()
    p = z.softmax(-1)
    of_class = [(p[y == c, c][:, None] > p[y != c, c]).double().mean().item() for c in (0, 1)]
    for rows in (80, 7, 1):
        meter = METRICS["auc"](Facts("classification", None, 1, 2))
        for one, labels in zip(z.split(rows), y.split(rows)):
            count(meter, one, labels)
        assert meter.compute() == pytest.approx(sum(of_class) / 2, abs=0.01)


@pytest.mark.parametrize("loss", ["cross_entropy", "label_smoothing"])
def test_a_batch_without_answers_changes_nothing(loss):
    task = Task(model_of(CLASSES), CLASSES, adam, loss=loss, metrics=["accuracy@3", "f1", "auc", "ppl", "bits"])
    x, y = torch.randn(4, 12, 2), torch.tensor([0, 5, IGNORED, 3])
    for stage in ("train", "val"):
        task.measure(stage, task(x), y)
        before = {name: meter.compute() for name, meter in task.meters.items() if name.startswith(stage)}
        task.zero_grad()
        nothing = task.measure(stage, task(x), torch.full((4,), IGNORED))
        nothing.backward()
        assert nothing == 0 and all((p.grad == 0).all() for p in task.model.parameters() if p.grad is not None)
        assert len(before) == 7 and all(task.meters[name].compute() == value for name, value in before.items())


def test_the_loss_is_a_mean_over_answers_not_over_batches():
    task = Task(model_of(CLASSES), CLASSES, adam)
    x, y = torch.randn(5, 12, 2), torch.randint(6, (5,))
    losses = [task.measure("val", task(x[rows]), y[rows]) for rows in (slice(0, 4), slice(4, 5))]
    assert task.meters["val/loss"].compute() == pytest.approx(((4 * losses[0] + losses[1]) / 5).item(), rel=1e-6)


def test_meters_of_every_rate_and_their_counts_are_saved():
    task = Task(model_of(NUMBERS), NUMBERS, adam, rates=(1, 2, 4), metrics=["mae"])
    assert set(task.meters) == {f"{place}/{name}" for place in ("train", "val", "val/2", "val/4", "test", "test/2", "test/4")
                                for name in ("loss", "mae")}
    task.measure("train", torch.zeros(2, 12, 3), torch.ones(2, 12, 3))
    other = Task(model_of(NUMBERS), NUMBERS, adam, rates=(1, 2, 4), metrics=["mae"])
    assert other.metrics == ["mae"] and Task(model_of(NUMBERS), NUMBERS, adam, loss="mae").metrics == ["mse"]
    other.load_state_dict(task.state_dict())
    assert other.meters["train/loss"].compute() == 1 and other.meters["train/mae"].compute() == 1


def test_a_loss_that_is_no_number_stops_and_shows():
    task = Task(model_of(CLASSES), CLASSES, adam)
    task.model.decoder.linear.weight.data[2, 1] = math.nan
    with pytest.raises(NonFiniteLoss, match="step 0, batch 0: the first bad parameter is decoder.linear.weight"):
        task.measure("train", task(torch.randn(2, 12, 2)), torch.tensor([0, 1]))
    task.measure("val", task(torch.randn(2, 12, 2)), torch.tensor([0, 1]))
    assert not torch.isfinite(task.meters["val/loss"].compute())  # shown, not hidden
    with pytest.raises(NonFiniteLoss, match="all parameters are finite, so the forward pass overflowed"):
        require_finite(torch.tensor(math.nan), nn.Linear(2, 2), 3, 4)


@pytest.mark.parametrize("given,text", [({"loss": "hinge"}, "unknown train.loss 'hinge'"), ({"metrics": ["acuracy"]}, "did you mean 'accuracy'")])
def test_unknown_names(given, text):
    with pytest.raises(ValueError, match=text):
        Task(model_of(CLASSES), CLASSES, adam, **given)


@pytest.mark.parametrize("facts", [CLASSES, NUMBERS])
def test_losses_and_metrics_of_the_other_kind_are_refused(facts):
    real = facts is NUMBERS
    for name in LOSSES:
        if (name in REAL) == real:
            Task(nn.Linear(2, 2), facts, adam, loss=name)
        else:
            with pytest.raises(ValueError, match=f"train.loss '{name}' is not for a {facts.kind}; allowed: {'binary' if real else 'cross'}"):
                Task(nn.Linear(2, 2), facts, adam, loss=name)
    for name in METRICS:
        if (name in REAL) == real:
            Task(nn.Linear(2, 2), facts, adam, metrics=[name])
        else:
            with pytest.raises(ValueError, match=f"metric in train.metrics '{name}' is not for a {facts.kind}; allowed"):
                Task(nn.Linear(2, 2), facts, adam, metrics=[name])


def test_too_few_classes():
    two = Facts("classification", None, 2, 2, 12)
    with pytest.raises(ValueError, match="accuracy@3 needs 3 classes or more, but the data have 2"):
        Task(nn.Linear(2, 2), two, adam, metrics=["accuracy@3"])
    with pytest.raises(ValueError, match="two classes or more, but d_output=1"):
        Task(nn.Linear(2, 1), Facts("classification", None, 2, 1, 12), adam)


@pytest.mark.parametrize("kind, outputs, y, expected", [
    ("regression", (5, 1), torch.zeros(5), r"\(5, 1\), but torch.float32 of shape \(5,\)"),             # torch: 25 differences
    ("regression", (5, 3), torch.zeros(5, 1), r"numbers of shape \(5, 3\)"),                          # torch: 15
    ("regression", (5, 7, 3), torch.zeros(5, 3), r"numbers of shape \(5, 7, 3\)"),
    ("classification", (5, 7, 3), torch.zeros(5, dtype=torch.long), r"classes of shape \(5, 7\)"),
    ("classification", (5, 3), torch.zeros(5), r"classes of shape \(5,\), but torch.float32")])
def test_answers_that_do_not_go_with_the_outputs(kind, outputs, y, expected):
    task = Task(nn.Linear(3, 3), Facts(kind, None, 3, 3, 12), adam)
    with pytest.raises(ValueError, match=expected):
        task.measure("train", torch.zeros(outputs), y)


def test_yes_or_no_labels_may_be_integers():
    z, y = torch.randn(6, 4), torch.randint(2, (6, 4))
    tasks = [Task(nn.Linear(4, 4), Facts("regression", None, 4, 4, 12), adam, loss="binary_cross_entropy") for _ in range(2)]
    a, b = tasks[0].measure("val", z, y), tasks[1].measure("val", z, y.double())
    assert a == pytest.approx(b.item(), rel=1e-6)
    assert tasks[0].meters["val/mse"].compute() == pytest.approx((z - y).square().mean().item(), rel=1e-5)


@pytest.mark.parametrize("facts", [CLASSES, Facts("classification", None, 2, 2, 12), Facts("regression", None, 2, 1, 12)])
def test_a_batch_of_one(facts):
    y = torch.tensor([1]) if facts.kind == "classification" else torch.tensor([[0.5]])
    task = Task(nn.Linear(3, facts.d_output), facts, adam)
    task.measure("train", task.model(torch.randn(1, 3)), y).backward()
    assert torch.isfinite(task.model.weight.grad).all() and torch.isfinite(task.meters["train/loss"].compute())


def test_seeds_of_steps_are_spread():
    seeds = [step_seed(0, e, i, r) for e in range(10) for i in range(50) for r in range(2)]
    assert len(set(seeds)) == 1000 and 0 <= min(seeds) and max(seeds) < 2**63
    bits = torch.tensor([[s >> k & 1 for k in range(63)] for s in seeds], dtype=torch.double).mean(0)
    assert (bits - 0.5).abs().max() < 5 * 0.5 / math.sqrt(1000)
