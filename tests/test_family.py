"""Every member of the family keeps the promises of check_model, or declares why not; and check_model sees what is broken."""
import pytest
import torch
from torch import nn

from s4nb.models import check
from s4nb.models.backbone import Bidirectional, SequenceModel
from s4nb.models.blocks import FFN
from s4nb.models.check import PROPERTIES, check_model, limits
from s4nb.models.family import FAMILY, costs
from s4nb.module import SequenceModule
from s4nb.s4.block import S4D, S4Block

ALLOWED = {"DSS": {"step", "state", "padding"}, "S4ND, one axis": {"step", "state"},
           "CKConv": {"step", "state"}}              # what a member may declare; the others keep everything


@pytest.mark.parametrize("name", FAMILY)
def test_member(name):
    torch.manual_seed(1)
    found = check_model(FAMILY[name].make(8), L=19)
    declared = {p for p, answer in found.items() if answer != "yes"}
    assert set(found) == set(PROPERTIES) - {"compile"} and declared == ALLOWED.get(name, set()), found


@pytest.mark.parametrize("name", FAMILY)
def test_member_after_training(name):
    "After some steps of an optimiser no parameter has a special value any more."
    torch.manual_seed(2)
    f = FAMILY[name].make(8).double()
    optimizer = torch.optim.Adam(f.parameters(), lr=1e-2)
    u, target = torch.randn(3, 13, 8, dtype=torch.double), torch.randn(3, 13, 8, dtype=torch.double)
    for _ in range(4):
        loss = (f(u, return_state=False)[0] - target).square().mean()
        optimizer.zero_grad(), loss.backward(), optimizer.step()
    check_model(f, L=13, seed=3)


@pytest.mark.parametrize("name", ["S4D", "GRU, own cell", "minGRU", "attention", "Conv1d", "FFN", "LegS RNN"])
def test_member_compiles(name):
    assert check_model(FAMILY[name].make(8), L=6, compile=True)["compile"] == "yes"


@pytest.mark.parametrize("name", ["S4D", "LegS RNN", "GRU", "minGRU", "attention", "Mega (EMA)", "Conv1d", "SaShiMi"])
def test_member_in_a_model(name):
    torch.manual_seed(0)
    make = FAMILY[name].make
    assert set(check_model(SequenceModel(8, 2, [lambda i: make(8), lambda i: FFN(8)], norm="layer")).values()) == {"yes"}
    two_ways = SequenceModel(8, 1, lambda i: make(8), bidirectional=True)
    found = check_model(two_ways)
    assert {p for p, answer in found.items() if answer != "yes"} == {"step", "state"}
    assert isinstance(two_ways.layers[0].layer, Bidirectional)


def test_costs_are_measured_in_turns():
    found = costs({"S4D": S4D, "FFN": FFN}, 2, 32, 8, 3)
    assert list(found) == ["S4D", "FFN"] and min(found.values()) > 0


# ---- the check itself ------------------------------------------------------------------------------------------------
class Sum(SequenceModule):
    def __init__(self, d_model=3):
        super().__init__()
        self.d_model = self.d_output = d_model
        self.w = nn.Parameter(torch.ones(d_model))

    def forward(self, u, state=None, lengths=None, rate=1.0, return_state=True):
        if lengths is not None: u = u.masked_fill(torch.arange(u.shape[1])[None, :, None] >= lengths[:, None, None], 0)
        y = (self.w * u).cumsum(1) + (0 if state is None else state[:, None])
        return y, y[:, -1] if return_state else None

    def step(self, u, state): return state + self.w * u, state + self.w * u
    def default_state(self, *batch, device=None): return self.w.new_zeros(*batch, self.d_model, device=device)


class MixesRows(Sum):
    def forward(self, u, *args, **kwargs): return super().forward(u + 0.1 * u.mean(0, keepdim=True), *args, **kwargs)


class WrongWidth(Sum):
    def forward(self, u, *args, **kwargs):
        y, state = super().forward(u, *args, **kwargs)
        return y[..., :2], state


class KeepsState(Sum):
    def forward(self, u, state=None, lengths=None, rate=1.0, return_state=True): return super().forward(u, state, lengths, rate, True)


class LeaksPadding(Sum):
    "The padding changes the gradient alone."
    def forward(self, u, state=None, lengths=None, rate=1.0, return_state=True):
        y, s = super().forward(u, state, lengths, rate, return_state)
        if lengths is None: return y, s
        leak = self.w * u.nan_to_num(5.0).sum() * (torch.arange(u.shape[1])[None, :, None] < lengths[:, None, None])
        return y + leak - leak.detach(), s


class CountsLength(Sum):
    def forward(self, u, state=None, lengths=None, rate=1.0, return_state=True):
        y, s = super().forward(u, state, lengths, rate, return_state)
        return (y + u.shape[1] * 1e-3 if lengths is not None else y + 24e-3), s


class FloatOnly(Sum):
    def forward(self, u, state=None, lengths=None, rate=1.0, return_state=True):
        return super().forward(u if u.dtype == torch.float64 else u * 1.01, state, lengths, rate, return_state)


class ReturnsHalf(Sum):
    def forward(self, u, *args, **kwargs):
        y, s = super().forward(u, *args, **kwargs)
        return (y.bfloat16() if torch.is_autocast_enabled("cpu") else y), s


@pytest.mark.parametrize("wrong,named", [(MixesRows, "shapes"), (WrongWidth, "shapes"), (KeepsState, "shapes"), (LeaksPadding, "lengths"),
                                         (FloatOnly, "double"), (ReturnsHalf, "autocast")])
def test_faults_are_named(wrong, named):
    with pytest.raises(AssertionError, match=f"^{named}"):
        check_model(wrong())


def test_the_amount_of_padding_counts():
    with pytest.raises(AssertionError, match="^padding|^state|^step|^shapes"):
        check_model(CountsLength())


def test_the_model_is_left_alone():
    f = S4D(4, 8, dropout=0.5).train()
    before = {k: v.clone() for k, v in f.state_dict().items()}
    random = torch.get_rng_state()
    check_model(f)
    assert f.training and all(torch.equal(v, before[k]) for k, v in f.state_dict().items())
    assert all(p.grad is None and p.dtype == torch.float32 for p in f.parameters()) and torch.equal(random, torch.get_rng_state())


def test_limits_are_those_of_all_parts():
    assert limits(nn.Sequential(S4Block(4), S4D(4, bidirectional=True)))["step"] == "a bidirectional layer needs the future"
    class Odd(Sum): limits = {"stepp": "a slip"}
    with pytest.raises(ValueError, match="did you mean 'step'"):
        limits(Odd())


def test_nan_is_no_agreement():
    with pytest.raises(AssertionError):
        check.agree("state", torch.tensor([float("nan")]), torch.tensor([1.0]))
    with pytest.raises(AssertionError, match="2 parts"):
        check.agree("state", [torch.ones(1)] * 2, [torch.ones(1)])
