"""Models built and loaded by `interop` against outputs of the reference, in float64: every case that it can run itself."""
import pytest
import torch
from test_parity import cases
from test_parity import gap as relative

from s4nb.foreign import build_s4
from s4nb.hippo.discretization import discretize
from s4nb.hippo.transition import transition
from s4nb.interop import KINDS, build_state_spaces, load_state_spaces
from s4nb.models.attention import linear_attention, softmax_features
from s4nb.models.backbone import NORMS
from s4nb.models.check import limits
from s4nb.module import activation

# Two things stay float32 in the reference when it is turned to float64: the step matrices of LegS, and the nodes at which
# a DPLR kernel has been evaluated before (with nodes rounded like that, our gaps shrink thirtyfold). All others: 1e-13.
ROUNDED = 1e-6


def in_words(x):
    "A parameter as part of a test's name, the same in every process; functions by pytest's own counting."
    return None if callable(x) else str(x)


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
    ("seqmodel", {"d_model": 4, "d_input": 1, "d_output": 1, "layer": {"_name_": "s4"}, "norm": {"_name_": "layer", "rms": 1}}, "rms"),
    ("seqmodel", {"d_model": 4, "d_input": 1, "d_output": 1, "layer": {"_name_": "s4"}, "residual": "X"}, "'X'"),
    ("seqmodel", {"d_model": 4, "d_input": 1, "d_output": 1, "layer": {"_name_": "s4"}, "encoder": "patch"}, "patch"),
    ("backbone", {"d_model": 4, "layer": "ffn", "width": 3}, "width"),
    ("cells", {"_name_": "exprnn", "d_input": 2, "d_model": 3}, "exprnn"),
    ("cells", {"_name_": "legs", "d_input": 2, "d_model": 3, "memory_output": True}, "memory_output"),
    ("cells", {"_name_": "legs", "d_input": 2, "d_model": 3, "architecture": {"hm": False}}, "hm"),
    ("cells", {"_name_": "legs", "d_input": 2, "d_model": 3, "discretization": "foh"}, "foh"),
    ("layer", {"_name_": "s4", "d_model": 4, "layer": "lssl"}, "lssl"),
    ("layer", {"_name_": "s4", "d_model": 4, "bandlimit": 0.5}, "bandlimit"),
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
    found = {f"layer.kernel.{'kernel' if k == 'K' else k}": v for k, v in block.kernel.state_dict().items()}
    if mode == "dense":                          # complex there
        found |= {f"layer.kernel.{k}": torch.randn(*s, 2) for k, s in {"A": (4, 4, 4), "B": (4, 4), "C": (1, 4, 4)}.items()}
    found |= {"layer.D": block.D, "output_linear.0.weight": block.mix[0].weight, "output_linear.0.bias": block.mix[0].bias}
    load_state_spaces(block, found)
    with pytest.raises(ValueError, match="not understood"): load_state_spaces(block, {**found, "layer.kernel.Q": block.D})
    with pytest.raises(ValueError, match="missing"): load_state_spaces(block, {k: v for k, v in found.items() if k != "layer.D"})


# --- what the vectors leave out, against formulas written here, under the reference's names ------------------------------------------

def run(kind, params, state_dict, x):
    model = build_state_spaces(kind, params).double().eval()
    load_state_spaces(model, state_dict)
    with torch.no_grad(): y = model(x)
    return y[0] if isinstance(y, tuple) else y


def draw(**shapes): return {k.replace("__", "."): torch.randn(s, dtype=torch.float64) for k, s in shapes.items()}


def near(ours, theirs): torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def unroll(step, x, *state):
    ys = []
    for x_t in x.unbind(1):
        y, *state = step(x_t, *state)
        ys.append(y)
    return torch.stack(ys, 1)


X = torch.randn(2, 9, 3, dtype=torch.float64)
ZERO = torch.zeros(2, 4, dtype=torch.float64)


@pytest.mark.parametrize("residual,offset,bias", [("H", True, True), ("H", False, True), ("R", True, False), ("N", True, True)])
def test_sru_cell(residual, offset, bias):
    w = draw(W__weight=(4, 3), W__bias=4, W_fx__weight=(4, 3), W_fx__bias=4, W_fc=4, residual_transform__weight=(4, 3),
             residual_transform__bias=4)
    if residual == "H": w |= draw(W_rx__weight=(4, 3), W_rx__bias=4, W_rc=4)
    if not bias: w["W.bias"] *= 0

    def step(x, c):
        f = lambda name: x @ w[name + ".weight"].T + w[name + ".bias"]
        g = torch.sigmoid(f("W_fx") + w["W_fc"] * c)
        new, skip = (1 - g) * c + g * f("W"), f("residual_transform")
        r = torch.sigmoid(f("W_rx") + w["W_rc"] * (c if offset else new)) if residual == "H" else 0
        return {"H": (1 - r) * skip + r * new, "R": new + skip, "N": new}[residual], new

    params = {"_name_": "sru", "d_input": 3, "d_model": 4, "residual": residual, "offset": offset, "architecture": {"bias": bias}}
    found = {k: v for k, v in w.items() if bias or k != "W.bias"}
    near(run("cells", params, found, X), unroll(step, X, ZERO))
    rnn = {"_name_": "rnn", "d_model": 3, "cell": {k: v for k, v in params.items() if k != "d_input"}}
    near(run("layer", rnn, {f"cell.{k}": v for k, v in found.items()}, X), unroll(step, X, ZERO))


@pytest.mark.parametrize("feedback", [True, False])
def test_sru_layer(feedback):
    w = draw(W_fused__weight=(8, 3), W_fused__bias=8) | (draw(C__W_fc=4) if feedback else {})

    def step(x, c):
        u, f = (x @ w["W_fused.weight"].T + w["W_fused.bias"]).chunk(2, -1)
        f = torch.sigmoid(f + (w["C.W_fc"] * c if feedback else 0))
        return [(1 - f) * c + f * u] * 2

    params = {"d_model": 3, "layer": {"_name_": "sru", "d_model": 4, "feedback": feedback}}     # its d_model goes out
    near(run("backbone", params, {f"layers.0.layer.{k}": v for k, v in w.items()}, X), unroll(step, X, ZERO))


@pytest.mark.parametrize("act", ["relu", "modrelu", "identity"])
def test_plain_cells_without_bias(act):
    b = torch.rand(4, dtype=torch.float64) - 0.5
    f = {"relu": torch.relu, "modrelu": lambda a: a.sign() * torch.relu(a.abs() + b), "identity": lambda a: a}[act]
    rnn, gru = draw(W_hx__weight=(4, 3), W_hh__weight=(4, 4)), draw(W_g__W_g__weight=(4, 7), W_reset__W_g__weight=(4, 7))
    update = lambda x, h: f(x @ rnn["W_hx.weight"].T + h @ rnn["W_hh.weight"].T)

    def gated(x, h):
        g, r = (torch.sigmoid(torch.cat([x, h], -1) @ gru[f"{k}.W_g.weight"].T) for k in ("W_g", "W_reset"))
        return [(1 - g) * h + g * update(x, r * h)] * 2

    extra = {"activate.b": b} if act == "modrelu" else {}
    params = {"d_input": 3, "d_model": 4, "hidden_activation": act, "architecture": {"bias": False}, "zero_bias_init": True}
    near(run("cells", {"_name_": "rnn", **params}, rnn | extra, X), unroll(lambda x, h: [update(x, h)] * 2, X, ZERO))
    near(run("cells", {"_name_": "gru", **params}, rnn | gru | extra, X), unroll(gated, X, ZERO))


def test_minimal_rnn_of_v4():
    w = draw(W_hx__0__weight=(4, 3), W_hx__0__bias=4, W_g__W_g__weight=(4, 7), W_g__W_g__bias=4)

    def step(x, h):
        g = torch.sigmoid(torch.cat([x, h], -1) @ w["W_g.W_g.weight"].T + w["W_g.W_g.bias"])
        return [(1 - g) * h + g * torch.tanh(x @ w["W_hx.0.weight"].T + w["W_hx.0.bias"])] * 2

    near(run("cells", {"_name_": "mrnn", "d_input": 3, "d_model": 4}, w, X), unroll(step, X, ZERO))


MEMORY_CASES = [({"_name_": "legt", "dt": 0.1, "discretization": "tustin"}, "legt", 0.1, "bilinear"),
                ({"_name_": "legt", "dt": 0.1, "discretization": "backward_diff", "hidden_activation": "relu"}, "legt", 0.1, "backward"),
                ({"_name_": "lmu", "theta": 10, "dt": 2.0}, "lmu", 0.2, "zoh"),
                ({"_name_": "lmu", "theta": 10, "architecture": {"um": True, "hh": False, "bias": True}}, "lmu", 0.1, "zoh"),
                ({"_name_": "legt", "dt": 0.1, "architecture": {"hx": False, "hh": True}, "memory_activation": "tanh"}, "legt", 0.1, "zoh"),
                ({"_name_": "legt", "dt": 0.1, "architecture": {"ux": False, "bias": False}, "gate": "R"}, "legt", 0.1, "zoh"),
                ({"_name_": "legt", "dt": 0.1, "memory_activation": None, "activation": "sigmoid"}, "legt", 0.1, "zoh"),
                ({"_name_": "glagt", "measure_args": {"alpha": 0.3, "beta": 0.2}}, "glagt", 1.0, "zoh")]


@pytest.mark.parametrize("given,measure,dt,rule", MEMORY_CASES, ids=in_words)
def test_memory_cells(given, measure, dt, rule):
    M, N = 2, 5
    lmu = given["_name_"] == "lmu"
    arch = {"ux": True, "hx": True, "hh": lmu, "bias": not lmu} | given.get("architecture", {})
    gate, act = given.get("gate", "N" if lmu else "G"), given.get("hidden_activation", given.get("activation", "tanh"))
    A, B = discretize(*transition(measure, N, **given.get("measure_args", {})), dt, rule)
    u_in, h_in = 3 * arch["ux"] + 4, 3 * arch["hx"] + M * N
    key = "W_uxh" if given.get("memory_activation", "id") is None else "W_uxh.0"
    sizes = {key: (M, u_in), "W_hxm": (4, h_in)} | ({"W_gxm.W_g": (4, h_in + 4 * arch["hh"])} if gate != "N" else {})
    if gate == "R": sizes["W_gxm.W_r"] = sizes["W_gxm.W_g"]
    w = {f"{k}.weight": torch.randn(s, dtype=torch.float64) for k, s in sizes.items()}
    if arch["hh"]: w |= draw(W_hh__weight=(4, 4))
    if arch["bias"]: w |= {f"{k}.bias": torch.randn(s[0], dtype=torch.float64) for k, s in sizes.items()}
    if arch["hh"] and arch["bias"]: w |= draw(W_hh__bias=4)
    f = lambda name, x: x @ w[name + ".weight"].T + w.get(name + ".bias", 0)

    def step(x, h, m):
        u = f(key, torch.cat([x, h] if arch["ux"] else [h], -1))
        u = torch.tanh(u) if given.get("memory_activation") == "tanh" else u
        m = m @ A.T + u[..., None] * B
        xm = torch.cat([x, m.flatten(1)] if arch["hx"] else [m.flatten(1)], -1)
        new = getattr(torch, act)(f("W_hxm", xm) + (f("W_hh", h) if arch["hh"] else 0))
        xm = torch.cat([xm, h], -1) if arch["hh"] else xm
        g = torch.sigmoid(f("W_gxm.W_g", xm)) if gate != "N" else 1
        if gate == "R":
            r = torch.sigmoid(f("W_gxm.W_r", xm))
            g = (1 - 2 * r) * g**2 + 2 * r * g
        h = (1 - g) * h + g * new
        return h, h, m

    stored = {"A": A - torch.eye(N, dtype=A.dtype), "B": B[:, None]}
    params = {"d_input": 3, "d_model": 4, "memory_size": M, "memory_order": N, **given}
    near(run("cells", params, w | stored, X), unroll(step, X, ZERO, torch.zeros(2, M, N, dtype=torch.float64)))


@pytest.mark.parametrize("name,measure,rule", [("tlti", None, "bilinear"), ("tlti", "legs", "euler"), ("tlsi", "lagt", "backward")])
def test_timestamp_cells(name, measure, rule):
    N, given = 5, {"discretization": rule} | ({} if measure is None else {"measure": measure})
    A, B = transition(measure or "legt", N)
    w = draw(W_uxh__0__weight=(1, 6), W_uxh__0__bias=1, W_hxm__weight=(4, 7), W_hxm__bias=4, W_gxm__W_g__weight=(4, 7), W_gxm__W_g__bias=4)
    x = torch.cat([torch.rand(2, 9, 1, dtype=torch.float64).cumsum(1), X[..., 1:]], -1)

    def step(x, h, m, before):
        f = lambda k, *parts: torch.cat(parts, -1) @ w[k + ".weight"].T + w[k + ".bias"]
        time, x = x[:, 0], x[:, 1:]
        dt = time - before if name == "tlti" else (time - before) / time
        Ab, Bb = discretize(A, B, dt, rule)
        m = torch.einsum("bmn,bn->bm", Ab, m) + f("W_uxh.0", x, h) * Bb
        g = torch.sigmoid(f("W_gxm.W_g", x, m))
        h = (1 - g) * h + g * torch.tanh(f("W_hxm", x, m))
        return h, h, m, time

    params = {"_name_": name, "d_input": 3, "d_model": 4, "memory_size": 1, "memory_order": N, "method": "dense", **given}
    ours = run("cells", params, w | {"transition.a": A, "transition.b": B, "transition.I": torch.eye(N)}, x)
    near(ours, unroll(step, x, ZERO, torch.zeros(2, N, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)))


@pytest.mark.parametrize("act,wide", [(None, 1), ("identity", 1), ("relu", 1), ("glu", 2)])
def test_ffn(act, wide):
    first = "ff.0" if act is None else "ff.0.0"
    w = draw(**{f"{first.replace('.', '__')}__weight": (6 * wide, 3), f"{first.replace('.', '__')}__bias": 6 * wide}, ff__2__weight=(3, 6), ff__2__bias=3)
    y = X @ w[first + ".weight"].T + w[first + ".bias"]
    y = {"relu": torch.relu, "glu": torch.nn.functional.glu}.get(act, lambda a: a)(y)
    near(run("layer", {"_name_": "ffn", "d_model": 3, "activation": act, "expand": 2.0}, w, X), y @ w["ff.2.weight"].T + w["ff.2.bias"])


@pytest.mark.parametrize("residual,combine", [
    (None, lambda x, y, w, i: y), ("none", lambda x, y, w, i: y), ("feedforward", lambda x, y, w, i: y), ("residual", lambda x, y, w, i: x + y),
    ({"_name_": "R", "alpha": 0.5, "beta": 2.0}, lambda x, y, w, i: 0.5 * x + 2 * y), ("decay", lambda x, y, w, i: (1 - 1 / i)**0.5 * x + i**-0.5 * y),
    ({"_name_": "D", "power": 2.0, "l2": False}, lambda x, y, w, i: (1 - i**-2) * x + i**-2 * y),
    ({"_name_": "affine", "scalar": False, "alpha": 0.5}, lambda x, y, w, i: 0.5 * x + w * y)], ids=in_words)
@pytest.mark.parametrize("norm", [None, {"_name_": "layer", "eps": 0.1}, {"_name_": "layer", "elementwise_affine": False},
                                  {"_name_": "instance", "affine": True}, {"_name_": "group", "eps": 0.01}, {"_name_": "batch", "affine": False}], ids=in_words)
def test_residuals_and_norms(residual, combine, norm):
    import torch.nn.functional as F
    given = dict(norm or {})
    kind, eps = given.get("_name_"), given.get("eps", 1e-5)
    affine = given.get("affine", given.get("elementwise_affine", kind != "instance")) and kind is not None
    w = [torch.randn(3, dtype=torch.float64) for _ in range(8)]
    found = {}
    for i, p in enumerate(("layers.0.", "layers.1.", "")):
        if affine: found |= {p + "norm.norm.weight": w[2 * i], p + "norm.norm.bias": w[2 * i + 1]}
        if kind == "batch": found |= {p + "norm.norm.running_mean": w[2 * i], p + "norm.norm.running_var": w[2 * i + 1].exp(),
                                      p + "norm.norm.num_batches_tracked": torch.tensor(3)}
        if p and "'affine'" in str(residual): found[p + "residual.affine"] = w[6 + i]

    def normed(x, i):
        weight, bias = (w[2 * i], w[2 * i + 1]) if affine else (None, None)
        if kind == "layer": return F.layer_norm(x, (3,), weight, bias, eps)
        if kind == "instance": return F.instance_norm(x.mT, weight=weight, bias=bias, eps=eps).mT
        if kind == "group": return F.group_norm(x.mT, 1, weight, bias, eps).mT
        if kind == "batch": return F.batch_norm(x.mT, w[2 * i], w[2 * i + 1].exp(), eps=eps).mT
        return x

    y = X
    for i in range(2): y = combine(y, normed(y, i), w[6 + i], i + 1)
    params = {"d_model": 3, "n_layers": 2, "layer": {"_name_": "id"}, "residual": residual, "norm": norm}
    near(run("backbone", params, found, X), normed(y, 2))


@pytest.mark.parametrize("given", [{"scaling_correction": True}, {"elemwise": True}])
def test_highway(given):
    w = draw(Wx__weight=(3, 3), Wx__bias=3) | (draw(Wy=3) if "elemwise" in given else draw(Wy__weight=(3, 3), Wy__bias=3))
    y = w["Wy"] * X if "Wy" in w else X @ w["Wy.weight"].T + w["Wy.bias"]
    r = torch.sigmoid(X @ w["Wx.weight"].T + w["Wx.bias"] + y)
    params = {"d_model": 3, "layer": {"_name_": "id"}, "residual": {"_name_": "highway", **given}}
    c = 1.732 if "scaling_correction" in given else 1
    near(run("backbone", params, {f"layers.0.residual.{k}": v for k, v in w.items()}, X), c * (1 - r) * X + r * y)


@pytest.mark.parametrize("pool,frames", [
    ({"_name_": "sample", "stride": 2}, lambda x: x[:, ::2]), ({"_name_": "sample", "stride": 4, "expand": 1}, lambda x: x[:, ::4]),
    ({"_name_": "sample", "stride": 2, "expand": 2}, lambda x: x[:, ::2, [0, 0, 1, 1, 2, 2]]), ("avg", lambda x: x),
    ({"_name_": "avg", "stride": 4}, lambda x: torch.nn.functional.avg_pool1d(x.mT, 4).mT)], ids=in_words)
def test_pools(pool, frames): near(run("backbone", {"d_model": 3, "layer": {"_name_": "id"}, "pool": pool}, {}, X), frames(X))


def test_pools_with_parameters():
    x = X[:, :8]
    for expand in (1, 2):
        w = draw(weight=(3 * expand, 3), bias=3 * expand)
        y = torch.nn.functional.avg_pool1d(x.mT, 2).mT @ w["weight"].T + w["bias"]
        params = {"d_model": 3, "layer": {"_name_": "id"}, "pool": {"_name_": "avg", "stride": 2, "expand": expand}}
        near(run("backbone", params, {f"layers.0.pool.linear.{k}": v for k, v in w.items()}, x), y)
    w = draw(weight=(6, 12), bias=6)
    y = torch.stack([x[:, t:t + 4].mT.flatten(1) @ w["weight"].T + w["bias"] for t in (0, 4)], 1)
    params["pool"] = {"_name_": "linear", "stride": 4, "expand": 2}
    near(run("backbone", params, {f"layers.0.pool.linear.{k}": v for k, v in w.items()}, x), y)


def test_transposed_layer_norm_that_is_not_scalar():
    w = draw(weight=3, bias=3)
    params = {"d_model": 3, "n_layers": 1, "layer": {"_name_": "id"}, "norm": {"_name_": "layer", "scalar": False}, "transposed": True,
              "prenorm": False}
    y = torch.nn.functional.layer_norm(X, (3,), w["weight"], w["bias"])
    near(run("backbone", params, {f"layers.0.norm.norm.ln.{k}": v for k, v in w.items()}, X), y)


def convolved(K, D, x):
    "(c h l) * (b l h) + D x, features in the order (c h)."
    L = x.shape[1]
    y = torch.stack([sum(K[:, :, j] * x[:, None, t - j] for j in range(min(t + 1, K.shape[-1]))) for t in range(L)], 1)
    return (y + D * x[:, :, None]).flatten(2)


@pytest.mark.parametrize("mode", ["conv", "slow", "real"])
@pytest.mark.parametrize("transform", ["exp", "softplus"])
def test_kernels_without_structure(mode, transform):
    L, h, c, n = 9, 3, 2, 4
    D, u = torch.randn(c, h, dtype=torch.float64), X
    if mode == "conv": inner, K = draw(kernel=(c, h, L)), None
    else:
        A = torch.complex(torch.randn(1, n, n) - 2 * torch.eye(n), torch.randn(1, n, n)).to(torch.complex128)
        B, C = torch.randn(1, n, dtype=torch.complex128), torch.randn(c, h, n, dtype=torch.complex128)
        inner = {"A": torch.view_as_real(A), "B": torch.view_as_real(B), "C": torch.view_as_real(C), "inv_dt": torch.randn(h, 1).double() - 2}
        dt = inner["inv_dt"].exp() if transform == "exp" else torch.nn.functional.softplus(inner["inv_dt"])
        Ab, Bb = discretize(A.expand(h, n, n), B.expand(h, n), dt[:, 0].to(torch.complex128))
        K = torch.stack([torch.einsum("chn,hnm,hm->ch", C, torch.linalg.matrix_power(Ab, l), Bb).real for l in range(L)], -1)
    K = inner["kernel"] if K is None else K
    params = {"_name_": "fftconv", "d_model": h, "mode": mode, "channels": c, "d_state": n, "n_ssm": 1, "dt_transform": transform,
              "l_max": L if mode == "conv" else None}
    near(run("layer", params, {"D": D, **{f"kernel.{k}": v for k, v in inner.items()}}, u), convolved(K, D, u))


@pytest.mark.parametrize("given", [{}, {"d_state": 8}, {"bandlimit": 0.05, "is_real": False}, {"dt_fast": True, "dt_tie": False, "d_state": 8},
                                   {"measure": "diag-inv", "init": None, "d_state": 8}, {"init": "diag-legsd", "B_init": "legs", "d_state": 8},
                                   {"init": ["diag-inv", "diag-lin"], "d_state": 8, "activation": "tanh"}], ids=in_words)
@pytest.mark.parametrize("is_real", [False, True])
def test_diagonal_kernels(given, is_real):
    given = {"is_real": is_real, **given}
    is_real, n = given["is_real"], given.get("d_state", 64 if not given["is_real"] else 32) // (1 if given["is_real"] else 2)
    shape = () if is_real else (2,)
    w = draw(inv_dt=(3, n if given.get("dt_tie") is False else 1), A_real=(3, n), B=(1, 3, n, *shape), C=(1, 3, n, *shape))
    w["inv_dt"] -= 2
    if not is_real: w |= {"A_imag": torch.rand(3, n, dtype=torch.float64) * 20}
    dt = (w["inv_dt"].sinh() if given.get("dt_fast") else w["inv_dt"]).exp()
    A = -w["A_real"].exp() if is_real else torch.complex(-w["A_real"].exp(), -w["A_imag"])
    B, C = (w[k] if is_real else torch.view_as_complex(w[k]) for k in "BC")
    if "bandlimit" in given: C = C * (dt * w["A_imag"] / (2 * torch.pi) < given["bandlimit"] / 2)
    v = (B * C * ((dt * A).exp() - 1) / A)[0]
    K = torch.stack([2 * (v * (l * dt * A).exp()).sum(-1).real for l in range(9)], -1)[None]
    D = torch.randn(1, 3, dtype=torch.float64)
    y = convolved(K, D, X)
    y = y.tanh() if "activation" in given else y
    params = {"_name_": "fftconv", "d_model": 3, "mode": "diag", **given}
    near(run("layer", params, {"D": D, **{f"kernel.{k}": x for k, x in w.items()}}, X), y)


def test_weight_norm_and_modrelu_after_the_layer():
    block = build_state_spaces("layer", {"_name_": "s4", "d_model": 3, "mode": "conv", "l_max": 9, "final_act": "modrelu", "weight_norm": True})
    w = {"layer.D": torch.randn(1, 3), "layer.kernel.kernel": torch.randn(1, 3, 9), "output_linear.0.weight_g": torch.rand(3, 1),
         "output_linear.0.weight_v": torch.randn(3, 3), "output_linear.0.bias": torch.randn(3), "output_linear.1.b": torch.randn(3)}
    block.double()
    load_state_spaces(block, w)                  # float32 values, but the weight is that of float64
    w = {k: v.double() for k, v in w.items()}
    v = w["output_linear.0.weight_v"]
    a = torch.nn.functional.gelu(convolved(w["layer.kernel.kernel"], w["layer.D"], X)) @ (w["output_linear.0.weight_g"] * v / v.norm(dim=1, keepdim=True)).T
    a = a + w["output_linear.0.bias"]
    near(block(X)[0], a.sign() * torch.relu(a.abs() + w["output_linear.1.b"]))


def test_lengths_that_are_none():
    for l_max in (-1, 0, None):
        layer = build_state_spaces("lssl", {"d": 3, "d_model": 0, "measure": "chebii", "l_max": l_max})
        assert layer.kernel.l_max is None and layer.kernel.d_state == 3
