"""Chapter 2, s4nb.module: the parts that every model shares."""
import dataclasses

import pytest
import torch
from hypothesis import given, settings, strategies as st
from s4nb.module import (ACTIVATIONS, SequenceModule, TiedDropout, activation, check_input, is_glu, length_mask,
                         mask_padding, one_of, options)


@pytest.mark.parametrize("name", [n for n in ACTIVATIONS if n not in ("glu", "modrelu")])
def test_pointwise_activations_keep_the_shape_and_work_elementwise(name):
    x, act = torch.randn(3, 4, 6, dtype=torch.float64), activation(name)
    y = act(x)
    assert y.shape == x.shape and not is_glu(name)
    assert torch.allclose(y[1, 2, 3], act(x[1, 2, 3]), atol=1e-15)


def test_activation_values():
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    F = torch.nn.functional
    for name, want in {"relu": x.clamp(min=0), "elu": F.elu(x), "silu": F.silu(x), "softplus": F.softplus(x), "tanh": x.tanh(),
                       "sqrelu": x.clamp(min=0) ** 2, "gelu": F.gelu(x, approximate="none"), "sigmoid": x.sigmoid(),
                       "laplace": 0.5 * (1 + torch.erf((x - 0.707107) / (0.282095 * 2**0.5)))}.items():
        assert torch.allclose(activation(name)(x), want, atol=1e-5 if name == "laplace" else 1e-15), name


def test_gates_halve_and_modrelu_has_a_parameter_per_feature():
    x = torch.randn(2, 8)
    assert torch.equal(activation("glu-relu")(x), x[:, :4] * x[:, 4:].relu())
    assert [tuple(p.shape) for p in activation("modrelu", 8).parameters()] == [(8,)]
    assert activation("modrelu", 8).b.abs().max() <= 0.01
    with pytest.raises(ValueError, match="size"): activation("modrelu")
    with pytest.raises(ValueError, match="glu"): activation("glu-nothing")


def test_names_are_corrected():
    with pytest.raises(ValueError, match="unknown activation 'gleu', did you mean"): activation("gleu")
    with pytest.raises(ValueError, match="did you mean 'legs'.*allowed: legs, lagt"): one_of("measure", "leggs", ["legs", "lagt"])
    with pytest.raises(ValueError, match="unknown x 'qqq'; allowed: a, b"): one_of("x", "qqq", "ab")


def test_options():
    @dataclasses.dataclass
    class O:
        rank: int = 1

    assert options(O, {}, "it") == O() and options(O, {"rank": 2}, "it") == O(2)
    with pytest.raises(ValueError, match="option of it 'rnak', did you mean 'rank'"): options(O, {"rnak": 2}, "it")


@pytest.mark.parametrize("u", [torch.zeros(2, 3), torch.zeros(2, 4, 3), torch.zeros(2, 3, 4).long(), torch.zeros(2, 0, 4)])
def test_check_input_refuses(u):
    with pytest.raises(ValueError): check_input(u, 4)


def test_sequence_module_says_what_is_missing():
    module = SequenceModule()
    assert module.default_state(2) is None
    with pytest.raises(NotImplementedError, match="SequenceModule defines no forward"): module(torch.zeros(1, 1, 1))
    with pytest.raises(NotImplementedError, match="forward"): module.step(torch.zeros(1, 1), None)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 12).flatmap(lambda L: st.tuples(st.just(L), st.lists(st.integers(0, L), min_size=1, max_size=5))))
def test_length_mask(case):
    L, lengths = case
    mask = length_mask(torch.tensor(lengths), L)
    assert mask.tolist() == [[[t < n] for t in range(L)] for n in lengths]
    u = torch.full((len(lengths), L, 2), float("inf"))
    assert mask_padding(u, torch.tensor(lengths)).isinf().sum((1, 2)).tolist() == [2 * n for n in lengths]


@pytest.mark.parametrize("bad", [torch.tensor([3.0]), torch.tensor([[3]]), torch.tensor([-1]), torch.tensor([6]), torch.tensor([True])])
def test_length_mask_refuses(bad):
    with pytest.raises(ValueError, match="lengths must"): length_mask(bad, 5)
    with pytest.raises(ValueError, match="one for each row"): mask_padding(torch.zeros(3, 5, 1), torch.tensor([2, 2]))


def test_tied_dropout():
    x, drop = torch.ones(40, 7, 50), TiedDropout(0.4)
    y = drop(x)
    assert torch.equal(y, y[:, :1].expand_as(y)) and set(y.unique().tolist()) == {0.0, torch.tensor(1 / 0.6).item()}
    assert abs((y == 0).double().mean() - 0.4) < 0.06                     # four standard errors of 2000 masks: 0.044
    assert torch.equal(drop.eval()(x), x)
    assert y.dtype == x.dtype and drop.train()(x.bfloat16()).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="probability"): TiedDropout(1.0)
