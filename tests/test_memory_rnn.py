"""HiPPO-RNN cells against numbers of the reference and of hippo-code, and what every sequence model promises."""
import pytest
import torch
from s4nb.models.check import check_model
from s4nb.models.memory_rnn import (GLagTCell, LagTCell, LegSCell, LegTCell, LegTSCell, LMUCell, LMUTCell, RandomCell,
                                    TimestampLegSCell, TimestampLegTCell)
from s4nb.models.rnn import RNN

from test_parity import cases

CELLS = {"legs": LegSCell, "legt": LegTCell, "lagt": LagTCell, "glagt": GLagTCell, "lmu": LMUCell, "lmut": LMUTCell,
         "legts": LegTSCell, "tlsi": TimestampLegSCell}


def build(name, params, d_input, d_model, theirs):
    "Our cell for a case of the vectors: the reference's arguments in our words, its parameters under our names."
    options = {k: v for k, v in params.items() if k not in ("d_input", "d_model", "max_length")}
    if "max_length" in params: options["l_max"] = params["max_length"]
    if "hippocode" in theirs:
        if name == "legt": options["dt"] *= 2                  # its window has length 1
        if name == "legts": options["lower_solve"] = True
        if name == "lmu": options["gate"] = "G"
    elif name == "lmu": options["um"] = False
    return RNN(CELLS[name](d_input, d_model, **options)).double()


@pytest.mark.parametrize("file", ["e_cells", "e_hippocode_cells"])
def test_parity(vectors, file):
    checked = 0
    for case, (params, arrays, weights) in cases(vectors, file).items():
        name = case.split("_")[0]
        if name not in CELLS: continue
        x, y = arrays["x"].double(), arrays["y"]
        model = build(name, params, x.shape[-1], y.shape[-1], file)
        own = {k.replace("W_uxh.0.", "W_uxh."): v for k, v in weights.items() if k not in ("A", "B") and "transition" not in k}
        model.cell.load_state_dict(own)
        ours, (h, m, *_) = model(x)
        print(file, case, (ours - y).abs().max().item(), (m - arrays["m_final"]).abs().max().item())
        checked += 1
    assert checked == {"e_cells": 11, "e_hippocode_cells": 8}[file]
