"""Attention: against the reference's numbers, torch's own module, quadratic sums; caches of rows of unequal length."""
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from s4nb.models.attention import (LinearAttention, MultiHeadAttention, Performer, linear_attention,
                                   orthogonal_projection, softmax_features, visible)
from s4nb.models.check import check_model
from s4nb.module import activation

MODELS = (MultiHeadAttention, LinearAttention, Performer)


def cases(vectors, start):
    "name -> (heads, arrays) of the cases of e_attn whose name starts so."
    about, data = json.loads((vectors / "e_attn.json").read_text())["cases"], np.load(vectors / "e_attn.npz")
    for name in about:
        if name.startswith(start):
            arrays = {k.split("/", 1)[1]: torch.from_numpy(data[k]) for k in data.files if k.startswith(name + "/")}
            yield name, about[name]["params"].get("heads"), arrays


def gap(ours, theirs): return (ours - theirs).abs().max().item()
def split(x, heads): return rearrange(x, "b l (heads e) -> b heads l e", heads=heads)


# ---- the reference ---------------------------------------------------------------------------------------------------
def test_multi_head_attention_of_the_reference(vectors):
    found = list(cases(vectors, "mha_"))
    for name, heads, a in found:
        f = MultiHeadAttention(8, heads, causal="True" in name).double()
        f.load_state_dict({k.removeprefix("param/mha."): p for k, p in a.items() if k.startswith("param/")})
        assert gap(f(a["x"])[0], a["y"]) <= 1e-12, name
    assert len(found) == 2


@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_linear_attention_of_the_reference(vectors, chunk):
    found = list(cases(vectors, "linear_elu_"))
    for name, heads, a in found:
        q, k, v = (split(a[x], heads) for x in "qkv")
        y, _ = linear_attention(F.elu(q) + 1, F.elu(k) + 1, v, "True" in name, chunk=chunk)
        assert gap(y, split(a["y"], heads)) <= 1e-12, name
    assert len(found) == 2


def test_performer_of_the_reference(vectors):
    found = list(cases(vectors, "performer_"))
    for name, heads, a in found:
        q, k, v = (split(a[x], heads) for x in "qkv")
        phi_q = softmax_features(q, a["projection"], True, reference=True)
        phi_k = softmax_features(k, a["projection"], False, reference=True)
        assert max(gap(phi_q, a["phi_q"]), gap(phi_k, a["phi_k"])) <= 1e-12, name
        assert gap(linear_attention(phi_q, phi_k, v, "True" in name)[0], split(a["y"], heads)) <= 1e-12, name
    assert len(found) == 2


def test_activations_of_the_reference(vectors):
    found = list(cases(vectors, "act_"))
    for name, _, a in found:
        f = activation(name.removeprefix("act_"))
        if name == "act_laplace":
            assert gap(f(a["x"]), a["y"]) <= 1e-6
            f.mu, f.sigma = 0.707107, 0.282095                             # the reference rounds them to six digits
        assert gap(f(a["x"]), a["y"]) <= 1e-12, name
    assert len(found) == 11


# ---- promises --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("model", MODELS)
def test_promises(model, causal):
    found = check_model(model(12, 3, causal=causal), compile=True)
    assert {p for p, said in found.items() if said != "yes"} == (set() if causal else {"step", "state"})


@pytest.mark.parametrize("model", MODELS)
def test_rows_continue_after_their_own_length(model):
    "Padding within a cache: a row that ended early goes on as if the padding had never been."
    torch.manual_seed(0)
    f, u = model(12, 3).double(), torch.randn(3, 20, 12, dtype=torch.double)
    for _ in range(3):
        lengths = torch.randint(0, 8, (2, 3))
        first, second = u[:, :8].clone(), u[:, 8:16].clone()
        state = f.default_state(3)
        for part, n in ((first, lengths[0]), (second, lengths[1])):
            part[torch.arange(8) >= n[:, None]] = float("nan")
            y, state = f(part, state, n)
            assert y.isfinite().all()
        tail, _ = f(u[:, 16:19], state)
        last, _ = f.step(u[:, 19], f(u[:, 16:19], state)[1])
        for i in range(3):
            row = torch.cat([u[i, :lengths[0, i]], u[i, 8:8 + lengths[1, i]], u[i, 16:]])[None]
            assert gap(torch.cat([tail[i], last[i:i + 1]]), f(row)[0][0, -4:]) <= 1e-12


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("model", MODELS)
def test_empty_rows_are_finite(model, causal):
    f, u = model(12, 3, causal=causal), torch.full((2, 5, 12), float("nan"))
    u[1, :3] = 1.0
    y, _ = f(u, lengths=torch.tensor([0, 3]))
    y.sum().backward()
    assert y.isfinite().all() and all(p.grad.isfinite().all() for p in f.parameters())


def test_the_future_is_invisible():
    torch.manual_seed(0)
    for model in MODELS:
        f, u = model(12, 3).double(), torch.randn(2, 70, 12, dtype=torch.double)
        v = u.clone()
        v[:, 40:] = 30 * torch.randn(2, 30, 12)
        assert gap(f(u)[0][:, :40], f(v)[0][:, :40]) <= 1e-12


# ---- softmax attention -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_equals_torch_with_its_state_dict(causal, bias):
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(12, 3, bias=bias, batch_first=True, dtype=torch.double)
    for p in theirs.parameters(): nn.init.normal_(p)
    ours = MultiHeadAttention(12, 3, causal, bias=bias).double()
    ours.load_state_dict(theirs.state_dict())
    u, lengths = torch.randn(3, 9, 12, dtype=torch.double), torch.tensor([9, 4, 1])
    late = torch.arange(9) >= lengths[:, None]
    mask = torch.ones(9, 9, dtype=torch.bool).triu(1) if causal else None
    expected = theirs(u, u, u, key_padding_mask=late, attn_mask=mask, need_weights=False)[0]
    assert gap(ours(u, lengths=lengths)[0][~late], expected[~late]) <= 1e-12


def test_dropout_acts_on_weights_in_training_alone():
    torch.manual_seed(0)
    f, u = MultiHeadAttention(12, 3, dropout=0.5), torch.randn(2, 9, 12)
    assert gap(f(u)[0], f(u)[0]) > 0.01
    kept = torch.stack([f(u)[0] for _ in range(4000)]).mean(0)
    f.eval()
    assert gap(f(u)[0], f(u)[0]) == 0 and gap(kept, f(u)[0]) < 0.06
    with pytest.raises(ValueError, match="1.5"): MultiHeadAttention(12, 3, dropout=1.5)


def test_mask():
    valid = torch.tensor([[True, False, True, True]])
    assert visible(valid, 2, True).int().tolist() == [[[[1, 0, 1, 0], [1, 0, 1, 1]]]]
    assert visible(valid, 2, True)[0, 0, 0].tolist() == visible(valid[:, :3], 1, True)[0, 0, 0].tolist() + [False]
    valid = torch.cat([valid, torch.zeros_like(valid)])
    assert visible(valid, 4, False).int().tolist() == [[[[1, 0, 1, 1]]], [[[1, 1, 1, 1]]]]


# ---- linear attention ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("l", [1, 3, 64, 65, 130])
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_chunked_sums_are_the_quadratic_form(l, chunk):
    torch.manual_seed(l)
    q, k, v = (torch.rand(2, 3, l, e, dtype=torch.double) for e in (5, 5, 4))
    A = q @ k.mT
    for causal, w in ((True, A.tril()), (False, A)):
        y, (S, z) = linear_attention(q, k, v, causal, 0.0, chunk=chunk)
        assert gap(y, w @ v / w.sum(-1, keepdim=True)) <= 1e-12
        assert gap(S, k.mT @ v) <= 1e-12 and gap(z, k.sum(-2)) <= 1e-12


def test_gradients_of_the_sums():
    torch.manual_seed(0)
    inputs = [torch.rand(1, 2, 5, e, dtype=torch.double, requires_grad=True) for e in (3, 3, 2)]
    state = torch.rand(1, 2, 3, 2, dtype=torch.double), torch.rand(1, 2, 3, dtype=torch.double)
    for causal in (True, False):
        f = lambda q, k, v: linear_attention(q, k, v, causal, state=state if causal else None, chunk=2)[0]
        assert torch.autograd.gradcheck(f, inputs)


@pytest.mark.parametrize("model", [LinearAttention, Performer])
def test_sums_stay_float32_under_autocast(model):
    f = model(12, 3)
    with torch.autocast("cpu", torch.bfloat16):
        _, (S, z) = f(torch.randn(2, 5, 12))
    assert S.dtype == z.dtype == torch.float32
    assert f.to(torch.bfloat16)(torch.randn(2, 5, 12, dtype=torch.bfloat16))[0].dtype == torch.bfloat16


# ---- random features -------------------------------------------------------------------------------------------------
def test_features_are_unbiased():
    torch.manual_seed(0)
    q, k = torch.randn(2, 4, 8, dtype=torch.double) / 2
    w = orthogonal_projection(200_000, 8)
    phi_k = softmax_features(k, w, False, eps=0.0)
    scores = softmax_features(q, w, True, eps=0.0) @ phi_k.mT
    exact = (q @ k.mT / 8 ** 0.5).exp()
    ratio = scores / exact                                                 # one factor a query is free
    assert gap(ratio / ratio.mean(-1, keepdim=True), torch.ones(4, 4)) < 0.02


def test_projection():
    w = orthogonal_projection(20_000, 5, torch.Generator().manual_seed(0))
    assert w.dtype == torch.double and gap(w.mT @ w / len(w), torch.eye(5)) < 0.05
    block = w[:5] / w[:5].norm(dim=-1, keepdim=True)
    assert gap(block @ block.mT, torch.eye(5)) <= 1e-12
    assert orthogonal_projection(7, 5).shape == (7, 5) and orthogonal_projection(2, 5).shape == (2, 5)


def test_features_of_large_inputs_are_finite():
    w = orthogonal_projection(256, 64, torch.Generator().manual_seed(0)).float()
    worst = 64 ** 0.25 * w                                             # keys on top of their directions
    for x in (worst, 100 * torch.randn(9, 64)):
        for query in (True, False): assert softmax_features(x, w, query).isfinite().all()


def test_redraw():
    f, g, h = Performer(12, 3), Performer(12, 3), Performer(12, 3, seed=1)
    assert torch.equal(f.projection, g.projection) and not torch.equal(f.projection, h.projection)
    f.redraw(1)
    assert torch.equal(f.projection, h.projection)
    f.redraw()
    assert not torch.equal(f.projection, h.projection) and "projection" in f.state_dict()


# ---- refusals --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("model", MODELS)
def test_refusals(model):
    with pytest.raises(ValueError, match="n_heads=5"): model(12, 5)
    f, u = model(12, 3, causal=False), torch.randn(2, 4, 12)
    assert f.default_state(2) is None and f(u)[1] is None
    with pytest.raises(ValueError, match="whole sequence"): f.step(u[:, 0], None)
    with pytest.raises(ValueError, match="whole sequence"): f(u, model(12, 3).default_state(2))
    with pytest.raises(ValueError, match="shape"): f(u[..., :5])
    with pytest.raises(ValueError, match="0…4"): f(u, lengths=torch.tensor([5, 4]))


def test_performer_needs_a_feature():
    with pytest.raises(ValueError, match="n_features"): Performer(12, 3, n_features=0)
