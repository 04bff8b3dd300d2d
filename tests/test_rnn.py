"""Recurrent cells against the reference's numbers and against torch's own networks."""
import copy
import math

import pytest
import torch
from s4nb.models.check import check_model
from s4nb.models.rnn import (GATES, GRU, LSTM, RNN, Gate, GatedSRNNCell, GRUCell, MinimalRNNCell, OrthogonalLinear,
                              RNNCell)
from test_parity import cases, gap

CELLS = {"rnn": RNNCell, "gru": GRUCell, "mrnn": MinimalRNNCell, "grus": GatedSRNNCell}


@pytest.mark.parametrize("file", ["e_cells", "e_hippocode_cells"])
def test_parity(vectors, file):
    checked = 0
    for name, (p, a, params) in cases(vectors, file).items():
        kind = name.split("_")[0]
        if kind not in CELLS or "y" not in a:
            continue                                     # memory cells: test_memory_rnn; orthogonal: it raises there
        options = {k: v for k, v in p.items() if k not in ("d_input", "d_model")}
        if file == "e_hippocode_cells" and kind == "gru":
            options["reset"] = "N"                                     # hippo-code's GRU had no reset gate
        model = RNN(CELLS[kind](a["x"].shape[-1], a["y"].shape[-1], **options)).double()
        model.cell.load_state_dict(params)
        assert gap(model(a["x"].double())[0], a["y"]) < 1e-12, name
        assert gap(torch.stack([y for y, _ in steps(model, a["x"].double())], 1), a["y"]) < 1e-12, name
        checked += 1
    assert checked == 4


def steps(model, u):
    state = model.default_state(len(u))
    for x in u.unbind(1):
        y, state = model.step(x, state)
        yield y, state


MODELS = {
    "rnn": lambda: RNN(RNNCell(4, 6)), "relu": lambda: RNN(RNNCell(4, 6, hidden_activation="relu")),
    "orthogonal": lambda: RNN(RNNCell(4, 6, "modrelu", orthogonal=True)),
    "odd": lambda: RNN(RNNCell(4, 5, orthogonal=True)),
    **{f"gru-{g}": lambda g=g: RNN(GRUCell(4, 6, gate=g, reset=g)) for g in GATES},
    "gru-UR-N": lambda: RNN(GRUCell(4, 6, gate="UR", reset="N")),
    "gru-orthogonal": lambda: RNN(GRUCell(4, 6, orthogonal=True)),
    "mrnn": lambda: RNN(MinimalRNNCell(4, 6)), "mrnn-UR": lambda: RNN(MinimalRNNCell(4, 6, gate="UR")),
    "grus": lambda: RNN(GatedSRNNCell(4, 6)), "grus-N": lambda: RNN(GatedSRNNCell(4, 6, gate=None)),
    "GRU": lambda: GRU(4, 6), "LSTM": lambda: LSTM(4, 6), "LSTM-same": lambda: LSTM(4),
}


@pytest.mark.parametrize("name", MODELS)
def test_promises(name):
    found = check_model(MODELS[name](), L=11, compile=name in ("orthogonal", "gru-UR", "grus"))
    assert set(found.values()) == {"yes"}, found


def test_rotation_stays_one_through_training_and_in_a_checkpoint():
    model = RNN(GRUCell(2, 33, orthogonal=True))
    start = model.cell.W_hh.weight.detach()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2, weight_decay=0.1)
    for _ in range(10):
        u = torch.randn(4, 12, 2)
        optimizer.zero_grad(); (model(u)[0][..., :2] - u.cumsum(1)).square().mean().backward(); optimizer.step()
    W = model.cell.W_hh.weight.detach()
    assert (W.T @ W - torch.eye(33)).abs().max() < 1e-5 and (W - start).norm() > 0.3 and torch.linalg.det(W) > 0
    assert {k for k in model.state_dict() if "W_hh" in k} == {"cell.W_hh.A", "cell.W_hh.bias"}
    assert OrthogonalLinear(1).weight.tolist() == [[1.0]]              # a single feature has nothing to turn into
    x, f = torch.randn(5, 33), model.cell.W_hh
    assert torch.allclose(f(x) - f.bias, x @ W.T, atol=1e-5)


def test_rotation_is_remembered_until_A_changes():
    f = OrthogonalLinear(6)
    fresh = lambda: torch.linalg.matrix_exp(f.A.triu(1) - f.A.triu(1).T)
    with torch.no_grad():
        assert f.weight is f.weight and torch.equal(f.weight, fresh())
        f.A[0, 3] += 0.5
        assert torch.equal(f.weight, fresh())
        f.A.data = torch.randn(6, 6)
        assert torch.equal(f.weight, fresh())
        f.load_state_dict(OrthogonalLinear(6).state_dict())
        assert torch.equal(f.weight, fresh())
        other = copy.deepcopy(f).double()
        assert other.weight.dtype == torch.double and other.weight is not f.weight
    with torch.inference_mode():
        assert torch.equal(f.weight, fresh())
    f.weight.sum().backward()                                          # gradients: formed anew
    assert f.A.grad.any()


def test_gates():
    x = torch.randn(50, 7).double()
    for name in ("UT", "UR", "U"):
        gate = Gate(400, 7, name)
        start = torch.sigmoid(gate.b_g)
        assert not gate.b_g.requires_grad and abs(start.mean() - 0.5) < 0.1
        assert 0 < start.min() < 0.02 and 0.98 < start.max() < 1
    gate = Gate(4, 7, "GT").double()
    s = torch.sigmoid(gate.W_g(x))
    assert torch.allclose(gate(x), (1 - 2 * s) * s ** 2 + 2 * s ** 2)
    for name, value in {"BR": 2 / 3, "TR": 1.0, "ZR": 1 - math.exp(-2), "FS": 1 / (1 + math.exp(-2))}.items():
        gate = Gate(1, 1, name)
        gate.load_state_dict({"W_g.weight": torch.ones(1, 1), "W_g.bias": torch.zeros(1)})
        assert abs(gate(torch.tensor([[2.0]])).item() - value) < 1e-6, name
    for name in GATES[1:]:                                             # far out: finite values and gradients
        gate = Gate(3, 2, name)
        far = torch.tensor([[1e4, -1e4], [-1e4, 1e4]], requires_grad=True)
        gate(far).sum().backward()
        assert gate(far).isfinite().all() and far.grad.isfinite().all(), name
    assert Gate(3, 2, "UR", bias=False).W_r.bias is None


@pytest.mark.parametrize("make", [
    lambda: Gate(3, 2, "XX"), lambda: GRUCell(3, 2, reset="r"), lambda: RNNCell(3, 2, "tann"),
    lambda: RNN(RNNCell(3, 2))(torch.zeros(1, 4, 2)), lambda: LSTM(3)(torch.zeros(1, 4, 3), rate=0.5),
    lambda: GRU(3).step(torch.zeros(1, 4, 3), None)])
def test_refusals(make):
    with pytest.raises(ValueError):
        make()


@pytest.mark.parametrize("kind", [LSTM, GRU])
def test_empty_rows_keep_their_state(kind):
    model, u = kind(3, 5), torch.randn(2, 6, 3)
    _, state = model(u)
    y, after = model(u, state, lengths=[0, 3])
    parts = [(after, state)] if kind is GRU else list(zip(after, state))
    assert all(torch.equal(new[0], old[0]) and not torch.equal(new[1], old[1]) for new, old in parts)
    assert y.isfinite().all()
