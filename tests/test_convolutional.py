"""Short convolutions: against PyTorch's own with its own padding, states of every reach, boxes of padded images, what is refused."""
import pytest
import torch
from rows import Rows
from torch.nn import functional as F

from s4nb.models.check import check_model, run_chunks, run_steps
from s4nb.models.convolutional import Conv1d, Conv2d, mask_grid


MODELS = {"centred": lambda: Conv1d(4), "causal": lambda: Conv1d(4, 6, causal=True),
          "dilated glu": lambda: Conv1d(4, kernel_size=3, causal=True, dilation=4, activation="glu"),
          "one tap": lambda: Conv1d(4, kernel_size=1, causal=True, activation=None),
          "depthwise": lambda: Conv1d(4, 8, kernel_size=5, depthwise=True, activation="modrelu"),
          "2d": lambda: Rows(Conv2d(2, 3)), "2d depthwise": lambda: Rows(Conv2d(2, 4, kernel_size=5, depthwise=True))}


@pytest.mark.parametrize("name", MODELS)
def test_check_model(name):
    found = check_model(MODELS[name](), compile=name in ("dilated glu", "2d"))
    declared = {"step", "state"} if name in ("centred", "depthwise", "2d", "2d depthwise") else set()
    assert {key for key, said in found.items() if said != "yes"} == declared


@pytest.mark.parametrize("k,dilation", [(1, 1), (3, 1), (25, 1), (3, 5)])
def test_centred_is_torchs_same_padding(k, dilation):
    f, u = Conv1d(3, 5, kernel_size=k, dilation=dilation).double(), torch.randn(2, 17, 3, dtype=torch.double)
    expected = F.gelu(F.conv1d(u.mT, f.conv1d.weight, f.conv1d.bias, padding="same", dilation=dilation)).mT
    assert torch.allclose(f(u)[0], expected, atol=1e-12)


def test_defaults_are_those_of_the_reference():
    f = Conv1d(3)
    assert f.conv1d.kernel_size == (25,) and isinstance(f.act, torch.nn.GELU) and not f.causal
    assert Conv2d(3).conv2d.kernel_size == (3, 3)


@pytest.mark.parametrize("k,dilation", [(1, 1), (2, 1), (5, 3), (40, 1)])
@pytest.mark.parametrize("sizes", [[30], [1, 2, 27], [13, 17]])
def test_causal_in_any_chunks(k, dilation, sizes):
    f, u = Conv1d(3, kernel_size=k, dilation=dilation, causal=True).double(), torch.randn(2, 30, 3, dtype=torch.double)
    whole, state = f(u)
    assert state.shape == (2, (k - 1) * dilation, 3) == f.default_state(2).shape
    for y, s in (run_chunks(f, u, sizes), run_steps(f, u, f.default_state(2))):
        assert torch.allclose(y, whole, atol=1e-12) and torch.equal(s, state)
    assert not torch.autograd.functional.jacobian(lambda u: f(u)[0][0, :, 0], u[:1])[:, 0].sum(-1).triu(1).any()


def test_state_of_rows_of_any_length():
    f, u = Conv1d(2, kernel_size=6, causal=True).double(), torch.randn(4, 9, 2, dtype=torch.double)
    before, lengths = torch.randn(4, 5, 2, dtype=torch.double), torch.tensor([9, 3, 0, 7])
    y, state = f(u, before, lengths=lengths)
    for i, n in enumerate(lengths):
        expected = torch.cat([before[i], u[i, :n]])[-5:]
        assert torch.equal(state[i], expected)
        if n: assert torch.allclose(y[i, :n], f(u[i:i + 1, :n], before[i:i + 1])[0][0], atol=1e-12)


def test_steps_begin_without_a_state():
    f, u = Conv1d(3, causal=True).double(), torch.randn(2, 1, 3, dtype=torch.float64)
    (y, state), (whole, end) = f.step(u[:, 0], None), f(u)
    assert torch.allclose(y, whole[:, 0], atol=1e-12) and torch.equal(state, end)


def test_state_stays_float32_under_autocast():
    f, u = Conv1d(4, causal=True), torch.randn(2, 30, 4)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = f(u.bfloat16())
        assert y.dtype == torch.bfloat16 and state.dtype == torch.float32
        y, state = f.step(u[:, 0], state)
    assert y.dtype == state.dtype == torch.float32


def test_padded_images_are_the_images_alone():
    f, u = Conv2d(2, 3).double(), torch.randn(3, 6, 5, 2, dtype=torch.double)
    sizes = torch.tensor([[6, 5], [2, 5], [4, 1]])
    u = u + torch.where(mask_grid(torch.ones_like(u), sizes) > 0, 0.0, float("nan"))
    y = f(u, lengths=sizes)[0]
    assert y.isfinite().all()
    for i, (a, b) in enumerate(sizes.tolist()):
        assert torch.allclose(y[i, :a, :b], f(u[i:i + 1, :a, :b])[0][0], atol=1e-12)


def test_images_move_with_their_content():
    f, u = Conv2d(2).double(), torch.zeros(1, 12, 14, 2, dtype=torch.double)
    u[:, 2:5, 3:6] = torch.randn(3, 3, 2)
    moved = f(u.roll((4, 6), (1, 2)))[0]
    assert torch.allclose(moved, f(u)[0].roll((4, 6), (1, 2)), atol=1e-12)


@pytest.mark.parametrize("call,said", [
    (lambda: Conv1d(3, kernel_size=2), "odd number of taps"), (lambda: Conv2d(3, kernel_size=4), "odd number of taps"),
    (lambda: Conv1d(3, kernel_size=0, causal=True), "positive number of taps"),
    (lambda: Conv1d(3, dilation=0), "at least 1"), (lambda: Conv1d(3, 4, depthwise=True), "multiple"),
    (lambda: Conv1d(3, activation="gellu"), "did you mean 'gelu'"),
    (lambda: Conv1d(3)(torch.zeros(1, 5, 3), rate=0.5), "rate must be 1"),
    (lambda: Conv1d(3)(torch.zeros(1, 5, 3), torch.zeros(1, 24, 3)), "causal=True"),
    (lambda: Conv1d(3)(torch.zeros(1, 5, 4)), "expected"), (lambda: Conv1d(3).step(torch.zeros(1, 3), None), "future"),
    (lambda: Conv2d(3)(torch.zeros(1, 3, 5, 5)), "features come last"), (lambda: Conv2d(3)(torch.zeros(1, 5, 3)), "l2"),
    (lambda: Conv2d(3)(torch.zeros(1, 5, 5, 3), rate=2), "rate must be 1"),
    (lambda: Conv2d(3)(torch.zeros(1, 5, 5, 3), torch.zeros(1)), "as a whole"),
    (lambda: Conv2d(3)(torch.zeros(1, 5, 5, 3), lengths=torch.tensor([3])), "2 axes"),
    (lambda: Conv2d(3)(torch.zeros(1, 5, 5, 3), lengths=torch.tensor([[6, 5]])), "0…5")])
def test_refusals(call, said):
    with pytest.raises(ValueError, match=said): call()
