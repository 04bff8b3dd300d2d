"""Models built and loaded by `interop` against outputs of the reference, in float64: every case that it can run itself."""
import pytest
import torch
from test_parity import cases
from test_parity import gap as relative

from s4nb.foreign import build_s4
from s4nb.interop import KINDS, build_state_spaces, load_state_spaces
from s4nb.models.attention import linear_attention, softmax_features
from s4nb.models.backbone import NORMS
from s4nb.models.check import limits
from s4nb.module import activation

# Two things stay float32 in the reference when it is turned to float64: the step matrices of LegS, and the nodes at which
# a DPLR kernel has been evaluated before (with nodes rounded like that, our gaps shrink thirtyfold). All others: 1e-13.
ROUNDED = 1e-6


def gap(kind, params, state_dict, x, y):
    "The largest difference between our output and theirs, loaded before the turn to float64 and after it."
    first, second = build_state_spaces(kind, params), build_state_spaces(kind, params).double()
    load_state_spaces(first, state_dict), load_state_spaces(second, state_dict)
    with torch.no_grad():
        outs = [model.double().eval()(x.double()) for model in (first, second)]
    return max(((out[0] if isinstance(out, tuple) else out) - y).abs().max().item() for out in outs)


def worst(gaps, limit, count):
    name = max(gaps, key=gaps.get)
    print(f"worst of {len(gaps)}: {name} {gaps[name]:.1e}")
    assert gaps[name] < limit, (name, gaps[name])
    assert len(gaps) == count


def test_lssl(vectors):
    gaps = {}
    for name, (p, a, state_dict) in cases(vectors, "e_lssl").items():
        if not state_dict:                       # learn=3 raises in the reference, and is refused here
            with pytest.raises(NotImplementedError, match="learn=3"): build_state_spaces("lssl", {"d": 4, **p})
            continue
        gaps[name] = gap("lssl", p, state_dict, a["x"], a["y"])
    worst(gaps, 1e-13, 16)


def seqmodel(p, state_dict):
    "The arguments of a case: the number of layers and the sizes at both ends, which the vectors leave out, from its shapes."
    n = len({k.split(".")[2] for k in state_dict if k.startswith("model.layers.")}) // len(p["layer"])
    return {**p, "n_layers": n, "d_input": state_dict["enc.weight"].shape[1], "d_output": len(state_dict["dec.output_transform.bias"])}


def test_sequence_models(vectors):
    gaps = {name: gap("seqmodel", seqmodel(p, state_dict), state_dict, a["x"], a["logits"])
            for name, (p, a, state_dict) in cases(vectors, "e_seqmodel").items()}
    worst(gaps, ROUNDED, 14)
    assert max(gaps[name] for name in ("s4d", "gru", "s4_instance")) < 1e-13      # no DPLR kernel in float32 there


def test_backbones_and_decoders(vectors):
    for name, (p, a, state_dict) in cases(vectors, "e_seqmodel").items():
        model = build_state_spaces("seqmodel", seqmodel(p, state_dict)).double().eval()
        load_state_spaces(model, state_dict)
        with torch.no_grad():
            x = a["x"].double()
            h = model.backbone(model.encoder(x))[0]
            assert relative(h, a["h"]) < ROUNDED, (name, relative(h, a["h"]))
            if "lengths" in a:                   # the decoders' reductions, of their h
                for key in [k for k in a if k.startswith("dec_")]:
                    mode = key.split("_")[1]
                    if key.endswith("lo0"): assert (reduce(mode, a["h"]) - a[key]).abs().max() < 1e-13, key


def reduce(mode, h):
    return {"last": h[:, -1], "first": h[:, 0], "sum": h.sum(1), "pool": h.mean(1)}[mode]


@pytest.mark.parametrize("file,count", [("e_cells", 15), ("e_hippocode_cells", 12)])
def test_cells(vectors, file, count):
    gaps = {}
    for name, (p, a, state_dict) in cases(vectors, file).items():
        if not state_dict: continue              # orthogonal RNN: raises in the reference (torch.solve is gone)
        sizes = {"d_input": a["x"].shape[-1], "d_model": a["y"].shape[-1]}
        gaps[name] = gap("cells", {"_name_": name.split("_")[0], **sizes, **p}, state_dict, a["x"], a["y"])
    worst(gaps, ROUNDED, count)
    assert max(g for name, g in gaps.items() if not name.startswith("leg") or name.startswith("legt_")) < 1e-13


def test_the_memory_after_the_last_step(vectors):
    for file in ("e_cells", "e_hippocode_cells"):
        for name, (p, a, state_dict) in cases(vectors, file).items():
            if "m_final" not in a: continue
            sizes = {"d_input": a["x"].shape[-1], "d_model": a["y"].shape[-1]}
            model = build_state_spaces("cells", {"_name_": name.split("_")[0], **sizes, **p}).double()
            load_state_spaces(model, state_dict)
            _, m, *_ = model(a["x"].double())[1]
            assert (m - a["m_final"]).abs().max() < ROUNDED, name


def heads(x, n=2): return x.unflatten(-1, (n, -1)).transpose(1, 2)


def test_attention(vectors):
    gaps = {}
    for name, (p, a, state_dict) in cases(vectors, "e_attn").items():
        causal = name.endswith("True")
        if name.startswith("mha"):
            params = {"_name_": "mha", "d_model": a["x"].shape[-1], "n_heads": p["heads"], "causal": causal}
            gaps[name] = gap("attn", params, state_dict, a["x"], a["y"])
        elif name.startswith(("linear", "performer")):
            q, k, v = (heads(a[s]) for s in "qkv")
            phi = [torch.nn.functional.elu(x) + 1 for x in (q, k)]
            if name.startswith("performer"):
                phi = [softmax_features(x, a["projection"], is_query, reference=True) for x, is_query in ((q, True), (k, False))]
            y = linear_attention(*phi, v, causal)[0].transpose(1, 2).flatten(2)
            gaps[name] = (y - a["y"]).abs().max().item()
    worst(gaps, 1e-13, 6)


def test_norms_and_activations(vectors):
    gaps = {}
    for name, (_, a, state_dict) in cases(vectors, "e_attn").items():
        if name.startswith("act_"):
            gaps[name] = (activation(name[4:])(a["x"]) - a["y"]).abs().max().item()
        elif name.startswith("norm_"):
            kind, transposed = name.split("_")[1], name.endswith("transposedTrue")
            x, y = (a[k].mT if transposed else a[k] for k in "xy")
            norm = NORMS["scalar" if (kind, transposed) == ("layer", True) else kind](x.shape[-1]).double().eval()
            norm.load_state_dict({k.removeprefix("norm."): v for k, v in state_dict.items()})
            gaps[name] = (norm(x) - y).abs().max().item()
    assert gaps.pop("act_laplace") < 1e-6        # its constants have six digits there
    worst(gaps, 1e-13, 20)


# --- without the reference ----------------------------------------------------------------------------------------------------------

MODELS = {
    "seqmodel": {"d_model": 6, "d_input": 2, "d_output": 3, "n_layers": 1, "norm": "layer", "residual": {"_name_": "A", "gamma": 0.5},
                 "layer": [{"_name_": "s4", "d_state": 4}, {"_name_": "ffn"}, {"_name_": "rnn", "cell": "gru"}, {"_name_": "sru"},
                           {"_name_": "lstm"}, {"_name_": "mha", "n_heads": 2}, {"_name_": "lssl", "d_model": 4}, {"_name_": "id"},
                           {"_name_": "fftconv", "mode": "s4d", "init": "diag-lin", "d_state": 4}, {"_name_": "s4d", "d_state": 4}]},
    "backbone": {"d_model": 4, "n_layers": 2, "n_repeat": 2, "layer": {"_name_": "ffn"}, "residual": "H", "norm": {"_name_": "group"},
                 "pool": {"_name_": "pool", "stride": 2, "expand": 2}},
    "layer": {"_name_": "s4", "d_model": 4, "d_state": 4, "mode": "slow", "n_ssm": 2},
    "cells": {"_name_": "lagt", "input_size": 2, "hidden_size": 5, "memory_order": 4, "architecture": {"hh": True}},
    "lssl": {"d": 4, "d_model": 6, "measure": "legt", "learn": 2, "dt": {"learn": True}},
    "attn": {"_name_": "mha", "d_model": 16},
}


@pytest.mark.parametrize("kind", MODELS)
def test_every_kind_runs(kind):
    model = build_state_spaces(kind, MODELS[kind]).eval()
    if kind == "backbone": d, stride = 4, 4
    else: d, stride = {"seqmodel": (2, 0), "layer": (4, 1), "cells": (2, 1), "lssl": (4, 1), "attn": (16, 1)}[kind]
    with torch.no_grad(): y = model(torch.randn(2, 12, d))
    y = y[0] if isinstance(y, tuple) else y
    assert y.isfinite().all() and y.shape[:2] == ((2, 3) if kind == "seqmodel" else (2, 12 // stride))
    assert isinstance(limits(model), dict)


def test_every_case_has_a_kind(): assert set(MODELS) == set(KINDS)


@pytest.mark.parametrize("kind,params,text", [
    ("sashimi", {}, "sashimi"),
    ("seqmodel", {"d_model": 4, "d_input": 1, "d_output": 1, "layer": {"_name_": "mega"}}, "mega"),
    ("seqmodel", {"d_model": 4, "d_input": 1, "d_output": 1, "layer": {"_name_": "s4"}, "pool": {"_name_": "spectral"}}, "spectral"),
    ("seqmodel", {"d_model": 4, "d_input": 1, "d_output": 1, "layer": {"_name_": "s4"}, "norm": {"_name_": "layer", "eps": 1}}, "eps"),
    ("seqmodel", {"d_model": 4, "d_input": 1, "d_output": 1, "layer": {"_name_": "s4"}, "residual": "X"}, "'X'"),
    ("seqmodel", {"d_model": 4, "d_input": 1, "d_output": 1, "layer": {"_name_": "s4"}, "encoder": "patch"}, "patch"),
    ("backbone", {"d_model": 4, "layer": "ffn", "width": 3}, "width"),
    ("cells", {"_name_": "exprnn", "d_input": 2, "d_model": 3}, "exprnn"),
    ("cells", {"_name_": "legs", "d_input": 2, "d_model": 3, "memory_output": True}, "memory_output"),
    ("cells", {"_name_": "legs", "d_input": 2, "d_model": 3, "architecture": {"hx": False}}, "hx"),
    ("lssl", {"d": 4, "measure": "fourier"}, "fourier"),
    ("attn", {"_name_": "performer", "d_model": 8}, "performer"),
])
def test_what_cannot_be_built_is_named(kind, params, text):
    with pytest.raises(NotImplementedError, match=text): build_state_spaces(kind, params)


@pytest.mark.parametrize("kind,params,text", [
    ("seqmodel", {"d_model": 4, "layer": "s4"}, "d_input, d_output"), ("cells", {"_name_": "gru", "d_model": 3}, "d_input"),
    ("lssl", {"d_model": 4}, "d must"), ("attn", {"n_heads": 2}, "d_model"), ("layer", {"_name_": "s4"}, "d_model")])
def test_what_must_be_given_is_named(kind, params, text):
    with pytest.raises(ValueError, match=text): build_state_spaces(kind, params)


def test_a_memory_with_another_step_is_refused():
    params = {"_name_": "legt", "d_input": 2, "d_model": 3, "memory_order": 4, "dt": 0.05}
    model, other = build_state_spaces("cells", params), build_state_spaces("cells", {**params, "dt": 0.1})
    theirs = {k.removeprefix("cell.").removeprefix("memory.").replace("W_uxh.", "W_uxh.0."): v for k, v in model.state_dict().items()}
    load_state_spaces(model, theirs)
    with pytest.raises(ValueError, match="look at dt"): load_state_spaces(other, theirs)


def test_the_names_decide_between_the_two_repositories():
    "LegT of hippo-code has half the window; only the state dict shows which one it is. The arguments' dtype and mode stay."
    params = {"_name_": "legt", "d_input": 2, "d_model": 3, "memory_order": 4, "dt": 0.05}
    model, old = build_state_spaces("cells", params).double().eval(), build_state_spaces("cells", {**params, "dt": 0.1})
    theirs = {k.removeprefix("cell.").removeprefix("memory."): v for k, v in old.state_dict().items()}
    load_state_spaces(model, theirs)
    u = torch.randn(2, 9, 2, dtype=torch.float64)
    torch.testing.assert_close(model(u)[0], old.double()(u)[0], rtol=0, atol=1e-12)
    assert not model.cell.training and model.cell.W_hxm.weight.dtype == torch.float64


@pytest.mark.parametrize("mode", ["dplr", "diag", "conv", "dense"])
def test_every_kernel_mode_loads(mode):
    options = {"l_max": 8} if mode == "conv" else {}
    block = build_s4({"d_model": 4, "d_state": 4, "mode": mode, **options})
    found = {f"layer.kernel.{k}": v for k, v in block.kernel.state_dict().items()}
    if mode == "dense":                          # complex there
        found |= {f"layer.kernel.{k}": torch.randn(*s, 2) for k, s in {"A": (4, 4, 4), "B": (4, 4), "C": (1, 4, 4)}.items()}
    found |= {"layer.D": block.D, "output_linear.0.weight": block.mix[0].weight, "output_linear.0.bias": block.mix[0].bias}
    load_state_spaces(block, found)
    with pytest.raises(ValueError, match="not understood"): load_state_spaces(block, {**found, "layer.kernel.Q": block.D})
    with pytest.raises(ValueError, match="missing"): load_state_spaces(block, {k: v for k, v in found.items() if k != "layer.D"})
