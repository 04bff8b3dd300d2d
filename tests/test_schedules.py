"""Schedules against torch's own schedulers, closed forms and a literal loop; every error."""
import io
import math
from functools import partial

import pytest
import torch
from torch.optim import lr_scheduler

from s4nb.training import schedules
from s4nb.training.schedules import (constant, cosine, cosine_epochs, cosine_warmup, follow, half_cosine, linear,
                                     multistep, step)

RATES = (0.01, 0.001)
ALL = {
    "constant": partial(constant, warmup=7), "linear": partial(linear, total=40, warmup=7),
    "cosine": partial(cosine, total=40, least=0.2), "cosine_warmup": partial(cosine_warmup, warmup=7, total=40),
    "step": partial(step, size=9, gamma=0.5), "multistep": partial(multistep, milestones=[4, 5, 31], gamma=0.5),
    "cosine_epochs": partial(cosine_epochs, t_initial=40, warmup_t=7),
}


def sgd(rates=RATES):
    return torch.optim.SGD([{"params": [torch.zeros(1, requires_grad=True)], "lr": lr} for lr in rates])


def record(optimizer, scheduler, n):
    "The learning rates of each of n steps."
    seen = []
    for _ in range(n):
        seen.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step(), scheduler.step()
    return seen


def rates(make, n=60, of=RATES):
    optimizer = sgd(of)
    return record(optimizer, make(optimizer), n)


def same(got, expected, rel=1e-10):
    assert len(got) == len(expected)
    for a, b in zip(got, expected):
        assert a == pytest.approx(b, rel=rel, abs=1e-14)


def after_warmup(w, then):
    "torch's own composition; LinearLR may not start at zero, and 1e-14 is as good."
    return lambda o: lr_scheduler.SequentialLR(o, [lr_scheduler.LinearLR(o, 1e-14, 1.0, w), then(o)], milestones=[w])


@pytest.mark.parametrize("factor, theirs", [
    (constant, lambda o: lr_scheduler.ConstantLR(o, 1.0)),
    (partial(constant, warmup=13), lambda o: lr_scheduler.LinearLR(o, 1e-14, 1.0, 13)),
    (partial(linear, total=41), lambda o: lr_scheduler.LinearLR(o, 1.0, 0.0, 41)),
    (partial(linear, total=41), lambda o: lr_scheduler.PolynomialLR(o, 41, power=1.0)),
    (partial(linear, total=50, warmup=9), after_warmup(9, lambda o: lr_scheduler.LinearLR(o, 1.0, 0.0, 41))),
    (partial(cosine, total=59), lambda o: lr_scheduler.CosineAnnealingLR(o, 59)),
    (partial(cosine_warmup, warmup=9, total=59), after_warmup(9, lambda o: lr_scheduler.CosineAnnealingLR(o, 50))),
    (partial(step, size=7), lambda o: lr_scheduler.StepLR(o, 7)),
    (partial(step, size=1, gamma=1.01), lambda o: lr_scheduler.ExponentialLR(o, 1.01)),
    (partial(multistep, milestones=[3, 4, 50]), lambda o: lr_scheduler.MultiStepLR(o, [3, 4, 50])),
    (partial(multistep, milestones=[10], gamma=0.7), lambda o: lr_scheduler.MultiStepLR(o, [10], 0.7)),
], ids=["constant", "warmup", "linear", "polynomial", "linear_warmup", "cosine", "cosine_warmup",
        "step", "exponential", "multistep", "gamma"])
def test_equals_torchs_own(factor, theirs):
    same(rates(lambda o: follow(o, factor)), rates(theirs))


def test_cosine_keeps_its_floor():
    got = rates(lambda o: follow(o, partial(cosine, total=30, least=0.1)), 60, of=(0.01,))
    same(got[:31], rates(lambda o: lr_scheduler.CosineAnnealingLR(o, 30, eta_min=0.001), 31, of=(0.01,)))
    same(got[30:], [[0.001]] * 30)


def test_cosine_warmup_closed_form_and_defaults():
    factors = [cosine_warmup(t, 10, 110) for t in range(130)]
    assert factors[:11] == pytest.approx([t / 10 for t in range(11)], abs=1e-15)
    assert factors[10:111] == pytest.approx([math.cos(math.pi * k / 200) ** 2 for k in range(101)], abs=1e-12)
    assert factors[110:] == pytest.approx([0.0] * 20, abs=1e-15)
    assert cosine_warmup(500) == 0.5 and cosine_warmup(1000) == 1.0 and cosine_warmup(20_500) == pytest.approx(0.5)
    assert cosine_warmup(40_000) == pytest.approx(0.0, abs=1e-15)
    assert cosine_warmup(5, 0, 10) == pytest.approx(0.5)
    assert cosine_warmup(10, 10, 10) == 1.0 and cosine_warmup(11, 10, 10) == 0.0


def test_edges():
    assert constant(0) == constant(10**9) == 1.0 and constant(0, 1) == 0.0 and constant(1, 1) == 1.0
    assert [linear(t, 1) for t in range(3)] == [1.0, 0.0, 0.0]
    assert [linear(t, 2, warmup=2) for t in range(4)] == [0.0, 0.5, 0.0, 0.0]
    assert half_cosine(0) == 1.0 and half_cosine(1.0) == half_cosine(7.0) == 0.0
    assert cosine(10**9, 5, least=1.0) == 1.0 and multistep(0, []) == 1.0
    assert [multistep(t, (1, 3), 0.5) for t in range(5)] == [1.0, 0.5, 0.5, 0.25, 0.25]


def test_it_starts_at_zero_and_the_first_update_does_nothing():
    x = torch.ones(1, requires_grad=True)
    optimizer = torch.optim.AdamW([x], lr=0.1)
    scheduler = follow(optimizer, partial(cosine_warmup, warmup=2, total=10))
    x.grad = torch.ones(1)
    optimizer.step(), scheduler.step()
    assert x.item() == 1.0
    optimizer.step()
    assert x.item() < 0.96


def test_timm_cosine_of_listops_small():
    "timm's rule spelt out as learning rates: 40 epochs of warm-up, so the cosine of 40 epochs is never reached."
    factor = partial(cosine_epochs, t_initial=40, warmup_t=40, warmup_lr=1e-6, lr_min=1e-5)
    make = lambda o: follow(o, factor, absolute=True)
    expected = [[1e-6 + t * ((lr - 1e-6) / 40) for lr in RATES] if t < 40 else [1e-5, 1e-5] for t in range(60)]
    same(rates(make), expected, rel=1e-12)
    assert rates(make)[0] == pytest.approx([1e-6, 1e-6], rel=1e-12)


def test_timm_cosine_counts_from_epoch_zero():
    factor = partial(cosine_epochs, t_initial=30, warmup_t=6, warmup_lr=1e-4, lr_min=1e-5)
    make = lambda o: follow(o, factor, absolute=True)
    expected = []
    for t in range(60):
        if t < 6: expected.append([1e-4 + (lr - 1e-4) * t / 6 for lr in RATES])
        elif t < 30: expected.append([1e-5 + (lr - 1e-5) * math.cos(math.pi * t / 60) ** 2 for lr in RATES])
        else: expected.append([1e-5, 1e-5])
    same(rates(make), expected)
    without = lambda o: follow(o, partial(cosine_epochs, t_initial=30, lr_min=1e-5), absolute=True)
    same(rates(without, 31), rates(lambda o: lr_scheduler.CosineAnnealingLR(o, 30, eta_min=1e-5), 31))


def test_timm_cosine_of_a_group_slower_than_the_floor():
    factor = partial(cosine_epochs, t_initial=10, lr_min=1e-3)
    got = rates(lambda o: follow(o, factor, absolute=True), 12, of=(0.01, 1e-4))
    assert got[0] == pytest.approx([0.01, 1e-4]) and got[11] == pytest.approx([1e-3, 1e-3])


@pytest.mark.parametrize("name", ALL)
def test_groups_stay_in_proportion(name):
    for fast, slow in rates(lambda o: follow(o, ALL[name])):
        assert fast == pytest.approx(10 * slow, rel=1e-12, abs=1e-18)


@pytest.mark.parametrize("absolute", [False, True])
def test_a_second_schedule_begins_from_the_first_ones_start(absolute):
    optimizer = sgd()
    record(optimizer, follow(optimizer, partial(cosine, total=20)), 15)
    second = partial(cosine_epochs, t_initial=10, lr_min=1e-5) if absolute else partial(step, size=3)
    got = record(optimizer, follow(optimizer, second, absolute=absolute), 12)
    same(got, rates(lambda o: follow(o, second, absolute=absolute), 12))
    assert got[0] == list(RATES)


@pytest.mark.parametrize("name", ALL)
def test_a_resumed_schedule_continues_exactly(name):
    absolute = name == "cosine_epochs"
    whole = rates(lambda o: follow(o, ALL[name], absolute=absolute), 45)
    optimizer = sgd()
    scheduler = follow(optimizer, ALL[name], absolute=absolute)
    record(optimizer, scheduler, 17)
    file = io.BytesIO()
    torch.save({"o": optimizer.state_dict(), "s": scheduler.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = sgd()
    resumed = follow(again, ALL[name], absolute=absolute)
    again.load_state_dict(saved["o"]), resumed.load_state_dict(saved["s"])
    assert record(again, resumed, 28) == whole[17:]


def test_plateau_waits_and_multiplies_every_group():
    optimizer = sgd()
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, mode="max", factor=0.2, patience=20)
    seen = []
    for epoch in range(60):
        seen.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step(), scheduler.step(0.1 * min(epoch, 5))                 # better until epoch 5, then 21 without
    drops = [t for t in range(1, 60) if seen[t] != seen[t - 1]]
    assert drops == [27, 48]
    assert seen[27] == pytest.approx([0.002, 0.0002]) and seen[48] == pytest.approx([0.0004, 0.00004])


@pytest.mark.parametrize("wrong, words", [
    (partial(constant, 0, warmup=-1), "warmup is a number of steps, 0 or more, but warmup=-1"),
    (partial(linear, 0, total=0), "within the schedule.*warmup=0, total=0"),
    (partial(linear, 0, total=4, warmup=5), "within the schedule.*warmup=5, total=4"),
    (partial(cosine_warmup, 0, 5, 4), "within the schedule.*warmup=5, total=4"),
    (partial(cosine_warmup, 0, -1, 4), "within the schedule.*warmup=-1, total=4"),
    (partial(cosine, 0, 0), "total is a number of steps, 1 or more, but total=0"),
    (partial(cosine, 0, 4, least=1.5), "least is a factor between 0 and 1, but least=1.5"),
    (partial(step, 0, 0), "size is a number of steps, 1 or more, but size=0"),
    (partial(step, 0, 1, gamma=0.0), "gamma is a positive factor, but gamma=0.0"),
    (partial(multistep, 0, [5, 5]), r"milestones are increasing steps, 1 or more, but milestones=\[5, 5\]"),
    (partial(multistep, 0, [0]), r"milestones=\[0\]"),
    (partial(multistep, 0, [1], gamma=-1), "gamma is a positive factor, but gamma=-1"),
    (partial(cosine_epochs, 0, 0), "t_initial is a number of epochs, 1 or more, but t_initial=0"),
    (partial(cosine_epochs, 0, 1, warmup_t=-2), "warmup_t is a number of epochs, 0 or more, but warmup_t=-2"),
    (partial(cosine_epochs, 0, 1, lr=0.0), "lr must be positive.*lr=0.0"),
    (partial(cosine_epochs, 0, 1, warmup_lr=-1.0), "lr must be positive.*warmup_lr=-1.0"),
    (partial(cosine_epochs, 0, 1, lr_min=-1.0), "lr must be positive.*lr_min=-1.0"),
])
def test_errors(wrong, words):
    with pytest.raises(ValueError, match=words):
        wrong()


def test_a_wrong_schedule_is_refused_before_the_first_step():
    with pytest.raises(ValueError, match="within the schedule"):
        follow(sgd(), partial(cosine_warmup, warmup=5, total=4))


def test_no_function_is_named_like_the_module():
    assert "schedules" not in schedules.__all__ and {"follow", *ALL} <= set(schedules.__all__)
