"""Recurrent cells against the reference's numbers and against torch's own networks."""
import copy
import pickle

import pytest
import torch
from s4nb.models.check import check_model
from s4nb.models.rnn import GATES, GRU, LSTM, RNN, Gate, GatedSRNNCell, GRUCell, MinimalRNNCell, OrthogonalLinear, RNNCell
from test_parity import cases, gap
from torch import nn

CELLS = {"rnn": RNNCell, "gru": GRUCell, "mrnn": MinimalRNNCell, "grus": GatedSRNNCell}


@pytest.mark.parametrize("file", ["e_cells", "e_hippocode_cells"])
def test_parity(vectors, file):
    checked = 0
    for name, (p, a, params) in cases(vectors, file).items():
        kind = name.split("_")[0]
        if kind not in CELLS or "y" not in a:
            continue                                                   # memory cells: test_memory_rnn; orthogonal: the reference raises
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
    "orthogonal": lambda: RNN(RNNCell(4, 6, "modrelu", orthogonal=True)), "odd": lambda: RNN(RNNCell(4, 5, orthogonal=True)),
    **{f"gru-{g}": lambda g=g: RNN(GRUCell(4, 6, gate=g, reset=g)) for g in GATES},
    "gru-UR-N": lambda: RNN(GRUCell(4, 6, gate="UR", reset="N")), "gru-orthogonal": lambda: RNN(GRUCell(4, 6, orthogonal=True)),
    "mrnn": lambda: RNN(MinimalRNNCell(4, 6)), "mrnn-UR": lambda: RNN(MinimalRNNCell(4, 6, gate="UR")),
    "grus": lambda: RNN(GatedSRNNCell(4, 6)), "grus-N": lambda: RNN(GatedSRNNCell(4, 6, gate=None)),
    "GRU": lambda: GRU(4, 6), "LSTM": lambda: LSTM(4, 6), "LSTM-same": lambda: LSTM(4),
}


@pytest.mark.parametrize("name", MODELS)
def test_promises(name):
    found = check_model(MODELS[name](), L=11, compile=name in ("orthogonal", "gru-UR", "grus"))
    assert set(found.values()) == {"yes"}, found
