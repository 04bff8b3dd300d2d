"""Pooling: frames by hand, steps and chunks at every phase, rows out of phase, causality, the hourglass."""
import math

import pytest
import torch

from s4nb.models.check import CHECKS, check_model
from s4nb.models.pooling import (DOWN_POOLS, UP_POOLS, DownAvgPool, DownPool, DownSpectralPool, Hourglass, UpAvgPool,
                                 UpPool, resample, select, window)
from s4nb.s4.block import S4Block

STREAMING = [name for name in DOWN_POOLS if name != "spectral"]


def close(a, b, tolerance=1e-12):
    assert a.shape == b.shape
    assert not a.numel() or (a - b).abs().max() <= tolerance


def inputs(*shape): return torch.randn(*shape, dtype=torch.double, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", STREAMING)
@pytest.mark.parametrize("stride", [1, 2, 5])
def test_frames_by_hand(name, stride):
    f, u = DOWN_POOLS[name](3, stride, 2).double(), inputs(2, 13, 3)
    parts = [f(u[:, j * stride:(j + 1) * stride])[0] for j in range(13 // stride)]
    close(f(u)[0], torch.cat(parts, 1))
    weight, bias = (f.linear.weight_v, f.linear.bias) if name == "sashimi" else (f.linear.weight, f.linear.bias)
    x = u[:, stride * (13 // stride - 1):][:, :stride]
    x = {"sample": x[:, 0], "pool": x.sum(1) / stride}.get(name, torch.cat([x[:, :, h] for h in range(3)], 1))
    close(f(u)[0][:, -1], x @ weight.T + bias, 1e-6)              # weight_g starts as |v|, rounded in float32


@pytest.mark.parametrize("name", STREAMING)
@pytest.mark.parametrize("cut", range(1, 12))
def test_a_cut_anywhere_changes_nothing(name, cut):
    f, u = DOWN_POOLS[name](3, 4, 2).double(), inputs(2, 12, 3)
    whole, end = f(u)
    first, state = f(u[:, :cut])
    second, state = f(u[:, cut:], state)
    close(torch.cat([first, second], 1), whole), close(state[0], end[0])
    assert torch.equal(state[1], end[1])
    _, state = f(u[:, :cut])
    stepped = []
    for x in u[:, cut:].unbind(1):
        y, state = f.step(x, state)
        stepped += [] if y is None else [y]
    close(torch.stack(stepped, 1), second)


@pytest.mark.parametrize("lengths", [[0, 3, 10], [4, 4, 9], [1, 2, 3]])
def test_rows_out_of_phase(lengths):
    lengths, f = torch.tensor(lengths), DownPool(3, 4, 2).double()
    u, more = inputs(3, 10, 3), inputs(3, 6, 3)
    padded = u.clone()
    for i, n in enumerate(lengths): padded[i, n:] = float("nan")
    y, state = f(padded, lengths=lengths)
    y2, end = f(more, state)
    assert y.isfinite().all() and y2.isfinite().all()
    for i, n in enumerate(lengths):
        alone, alone_end = f(torch.cat([u[i:i + 1, :n], more[i:i + 1]], 1))
        k, k2 = f.count(u, None, lengths)[i], f.count(more, state)[i]
        close(torch.cat([y[i:i + 1, :k], y2[i:i + 1, :k2]], 1), alone)
        close(end[0][i:i + 1], alone_end[0])
        assert end[1][i] == (n + 6) % 4


@pytest.mark.parametrize("l, k", [(12, 4), (13, 4), (9, 3), (5, 5), (4, 1), (1, 1)])
def test_spectral_pooling_samples_a_slow_signal(l, k):
    t = torch.arange(l, dtype=torch.double)
    f = (k - 1) // 2
    signal = lambda t: 0.3 + torch.cos(2 * math.pi * f * t / l + 0.4)
    close(resample(signal(t), k), signal(torch.arange(k, dtype=torch.double) * l / k))
    if 2 * (k // 2 + 1) <= l:                                     # a faster one leaves no trace
        close(resample(torch.cos(2 * math.pi * (k // 2 + 1) * t / l), k), torch.zeros(k, dtype=torch.double))


def test_spectral_pooling_sees_each_rows_valid_part():
    f, u, lengths = DownSpectralPool(3, 3, 2).double(), inputs(3, 20, 3), torch.tensor([20, 13, 2])
    u[1, 13:] = float("nan")
    y, state = f(u, lengths=lengths)
    close(y[1:2, :4], f(u[1:2, :13])[0])
    assert state is None and y.shape == (3, 6, 6) and y.isfinite().all()
    with pytest.raises(ValueError, match="whole sequence"): f.step(u[:, 0], None)
    with pytest.raises(ValueError, match="whole sequence"): f(u, state=())


@pytest.mark.parametrize("name", UP_POOLS)
def test_up_pools_hold_back_one_frame(name):
    f, z = UP_POOLS[name](6, 3, 2).double(), inputs(2, 5, 6)
    at_once = UP_POOLS[name](6, 3, 2, causal=False).double()
    at_once.load_state_dict(f.state_dict())
    y, end = f(z)
    now = at_once(z)[0]
    close(y[:, 3:], now[:, :-3]), close(y[:, :3], torch.zeros_like(y[:, :3])), close(end, now[:, -3:])
    state, parts = f.default_state(2), []
    for x in z.unbind(1):
        part, state = f.step(x, state)
        parts.append(part)
    close(torch.cat(parts, 1), y), close(state, end)
    lengths = torch.tensor([0, 4])
    close(f(z, lengths=lengths)[1], torch.stack([torch.zeros_like(end[0]), f(z[1:, :4])[1][0]]))
    with pytest.raises(ValueError, match="before they are complete"): at_once.step(z[:, 0], None)
    with pytest.raises(ValueError, match="before they are complete"): at_once(z, end)


@pytest.mark.parametrize("make", [*DOWN_POOLS.values(), *UP_POOLS.values()])
def test_checks_that_do_not_look_at_the_length(make):
    f = make(6, 3, 2).double()
    with torch.no_grad():
        for name in ("gradients", "copies", "double", "autocast", "compile"): CHECKS[name](f, inputs(2, 12, 6))


@pytest.mark.parametrize("name", UP_POOLS)
@pytest.mark.parametrize("stride", [1, 2, 5])
def test_hourglass_keeps_every_promise(name, stride):
    torch.manual_seed(0)
    f = Hourglass(DOWN_POOLS[name](4, stride, 2), S4Block(8, d_state=4), UP_POOLS[name](8, stride, 2))
    assert set(check_model(f, compile=stride == 2).values()) == {"yes"}


def test_hourglass_without_delay_or_with_an_inner_model_that_looks_ahead():
    both = S4Block(8, d_state=4, bidirectional=True)
    causal, nested = UpAvgPool(8, 3, 2), Hourglass(DownAvgPool(8, 2), both, UpAvgPool(8, 2, causal=False))
    for inner, up in [(both, causal), (both, UpAvgPool(8, 3, 2, causal=False)), (nested, causal)]:
        f = Hourglass(DownAvgPool(4, 3, 2), inner, up)
        found = check_model(f)
        assert found.pop("step") != "yes" and found.pop("state") != "yes" and set(found.values()) == {"yes"}
        with pytest.raises(ValueError, match="pass state=None"): f(inputs(1, 4, 4).float(), state=())


def test_no_state_is_the_default_state():
    u, inner = inputs(2, 9, 4), S4Block(4, d_state=4)
    for f in (DownPool(4, 1), UpPool(4, 3), Hourglass(DownPool(4, 1), inner, UpPool(4, 1))):
        f = f.double()
        (y, state), (y2, state2) = f.step(u[:, 0], None), f.step(u[:, 0], f.default_state(2))
        close(y, y2), close(f.step(u[:, 1], state)[0], f.step(u[:, 1], state2)[0])


def test_hourglass_steps_rows_out_of_phase():
    torch.manual_seed(0)
    inner = Hourglass(DownPool(6, 2, 1), S4Block(6, d_state=4), UpPool(6, 2, 1))
    f = Hourglass(DownPool(3, 4, 2, activation="glu"), inner, UpPool(6, 4, 2, activation="tanh")).double()
    lengths, u, more = torch.tensor([0, 5, 18]), inputs(3, 18, 3), inputs(3, 13, 3)
    with torch.no_grad():
        _, state = f(u, lengths=lengths)
        chunk, _ = f(more, state)
        for t, x in enumerate(more.unbind(1)):
            y, state = f.step(x, state)
            close(y, chunk[:, t], 1e-9)
        for i, n in enumerate(lengths):
            close(chunk[i], f(torch.cat([u[i, :n], more[i]])[None])[0][0, n:], 1e-9)


def test_refusals():
    with pytest.raises(ValueError, match="stride must be an integer"): DownAvgPool(4, 1.5)
    with pytest.raises(ValueError, match="expand must be None"): DownAvgPool(4, 2, 0)
    with pytest.raises(ValueError, match="cannot be divided"): UpPool(5, 2, 2)
    inner = S4Block(4, d_state=4)
    with pytest.raises(ValueError, match="do not fit"): Hourglass(DownAvgPool(4, 2), inner, UpAvgPool(4, 3))
    with pytest.raises(ValueError, match="features come last"): DownAvgPool(4, 2)(inputs(2, 4, 5))


def test_window_and_select():
    x = inputs(2, 5, 3)
    rows = window(x, torch.tensor([-1, 3]), 4)
    assert torch.equal(rows[0, 1:], x[0, :3]) and not rows[0, 0].any()
    assert torch.equal(rows[1, :2], x[1, 3:]) and not rows[1, 2:].any()
    picked = select(torch.tensor([True, False]), (x + 1, None), (x, None))
    assert torch.equal(picked[0], torch.stack([x[0] + 1, x[1]])) and picked[1] is None
