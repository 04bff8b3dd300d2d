"""The backbone: whole == chunks == steps, padding changes nothing, before and after training."""
import copy
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from s4nb.interop import load_state_spaces, part
from s4nb.models import SequenceModel
from s4nb.models.backbone import NORMS as NORM_CLASSES
from s4nb.models.backbone import RESIDUALS, Affine, Bidirectional, DropPath, Highway, ResidualBlock, ScalarNorm, flip_valid
from s4nb.models.check import check_model
from s4nb.models.pooling import DownAvgPool, DownLinearPool, DownSpectralPool
from s4nb.module import length_mask
from s4nb.training.optimization import param_groups
from s4nb.s4.block import S4Block
from s4nb.ssm.lssl import LSSL

LAYERS = {"dplr": lambda h, **k: S4Block(h, d_state=6, mode="dplr", **k), "diag": lambda h, **k: S4Block(h, d_state=6, mode="diag", **k),
          "dense": lambda h, **k: LSSL(h, d_state=5, **k)}
NORMS = tuple(NORM_CLASSES)


def model(kind, norm="layer", prenorm=True, h=4, stack=None, **options):
    torch.manual_seed(0)
    return SequenceModel(h, 2, lambda i: LAYERS[kind](h, **options), norm=norm, prenorm=prenorm, **(stack or {})).double()


def close(a, b, tolerance=1e-9):
    a, b = torch.as_tensor(a), torch.as_tensor(b)
    assert (a - b).abs().max() <= tolerance * max(1.0, a.abs().max())


def train(f, steps=20, lengths=None):
    "Some optimiser steps on a random regression, so that no parameter has its initial value."
    optimizer = torch.optim.AdamW([p for p in f.parameters() if p.requires_grad], lr=1e-2)
    u, target = torch.randn(3, 16, f.d_model, dtype=torch.double), torch.randn(3, 16, f.d_output, dtype=torch.double)
    for _ in range(steps):
        loss = (f(u, lengths=lengths, return_state=False)[0] - target).square().mean()
        optimizer.zero_grad(), loss.backward(), optimizer.step()



@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("norm,prenorm", [("layer", True), ("batch", False), ("none", True)])
@pytest.mark.parametrize("steps", [0, 20])
def test_whole_chunks_and_steps_agree(kind, norm, prenorm, steps):
    f = model(kind, norm, prenorm)
    train(f, steps)
    f.eval()
    u = torch.randn(2, 23, 4, dtype=torch.double)
    with torch.no_grad():
        whole, end = f(u)
        state, parts = None, []
        for part in u.split([9, 1, 13], 1):
            y, state = f(part, state)
            parts.append(y)
        stepped, ys = f.default_state(2), []
        for x in u.unbind(1):
            y, stepped = f.step(x, stepped)
            ys.append(y)
    close(whole, torch.cat(parts, 1)), close(whole, torch.stack(ys, 1))
    for a, b, c in zip(end, state, stepped):
        close(a, b), close(a, c)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_padding_changes_no_output_state_gradient_or_running_average(norm, bidirectional):
    generator = torch.Generator().manual_seed(1)
    for trial in range(4):
        lengths = torch.randint(1, 15, (3,), generator=generator)
        lengths[trial % 3] = 14
        u = torch.randn(3, 14, 4, dtype=torch.double, generator=generator)
        wider = torch.cat([u, 0 * u], 1)
        wider = torch.where(length_mask(lengths, 28), wider, 1e3 * torch.randn(wider.shape, dtype=torch.double, generator=generator))
        results = []
        for x in (u, wider):
            f = model("diag", norm, prenorm=trial % 2 == 0, bidirectional=bidirectional)
            x = x.clone().requires_grad_()
            y, state = f(x, lengths=lengths)
            valid = y[length_mask(lengths, x.shape[1]).squeeze(-1)]
            valid.square().sum().backward()
            states = [s for s in state if s is not None]
            assert not x.grad[~length_mask(lengths, x.shape[1]).squeeze(-1)].any()
            results.append([valid, x.grad[:, :14], *states, *(p.grad for p in f.parameters()), *(b for b in f.buffers() if b.is_floating_point())])
        for a, b in zip(*results):
            close(a, b)


def test_state_after_padding_continues_each_row():
    f = model("dplr")
    u, lengths = torch.randn(2, 12, 4, dtype=torch.double), torch.tensor([12, 7])
    _, state = f(u, lengths=lengths)
    more = torch.randn(2, 5, 4, dtype=torch.double)
    y, _ = f(more, state)
    for i, n in enumerate(lengths):
        whole, _ = f(torch.cat([u[i:i + 1, :n], more[i:i + 1]], 1))
        close(y[i], whole[0, n:])


def test_the_blocks_are_the_formulas():
    u = torch.randn(2, 9, 4, dtype=torch.double)
    for prenorm in (True, False):
        f, x = model("diag", "layer", prenorm), u
        norm = lambda x: (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        for block in f.layers:
            x = x + block.layer(norm(x))[0] if prenorm else norm(x + block.layer(x)[0])
        close(f(u)[0], norm(x) if prenorm else x)


def test_dropout_only_in_training_and_tied_over_the_length():
    class Ones(nn.Module):
        d_model = d_output = 64

        def forward(self, u, state=None, lengths=None, rate=1.0, return_state=True):
            return torch.ones_like(u), None
    u = torch.zeros(2, 10, 64)
    for tie in (True, False):
        f = SequenceModel(64, 1, [Ones()], norm="none", dropout=0.5, tie_dropout=tie)
        y, _ = f(u)
        assert set(y.unique().tolist()) == {0.0, 2.0} and bool((y == y[:, :1]).all()) == tie
        assert (f.eval()(u)[0] == 1).all()


def test_unequal_sizes_and_no_residual():
    layers = [S4Block(4, d_state=4, final_act=None, channels=2), S4Block(8, d_state=4)]
    with pytest.raises(ValueError, match="residual"):
        SequenceModel(4, 2, layers)
    f = SequenceModel(4, 2, layers, residual=None)
    assert f.d_output == 8 and f(torch.randn(2, 6, 4))[0].shape == (2, 6, 8)


def test_autocast_and_rate():
    f = model("diag", "batch", False).float()
    u, lengths = torch.randn(2, 16, 4), torch.tensor([16, 9])
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = f(u, lengths=lengths, return_state=False)
    assert torch.isfinite(y).all()
    f = f.double().eval()
    assert not torch.allclose(f(u.double(), rate=2.0)[0], f(u.double())[0])


POOLED = lambda: model("diag", stack={"pool": partial(DownAvgPool, stride=2)})


@pytest.mark.parametrize("wrong,text", [(lambda: model("diag", "instance").step(torch.zeros(2, 4).double(), [None, None]), "whole sequence"),
                                        (lambda: model("diag", "layr"), "layer"),
                                        (lambda: SequenceModel(4, 3, [S4Block(4)]), "n_layers=3"),
                                        (lambda: SequenceModel(4, 2, S4Block(4)), "one layer object"),
                                        (lambda: model("diag")(torch.zeros(2, 5, 4).double(), [None]), "2 layers"),
                                        (lambda: model("diag", stack={"residual": "X"}), "R, F, N, A, D, H"),
                                        (lambda: model("diag", stack={"drop_path": 1.0}), "drop path"),
                                        (lambda: model("diag", stack={"bidirectional": True}).step(torch.zeros(2, 4).double(), None), "future"),
                                        (lambda: model("diag", stack={"bidirectional": True})(torch.zeros(2, 5, 4).double(), [None, None]), "future"),
                                        (lambda: model("diag", bidirectional=True)(torch.zeros(2, 5, 4).double(), [None, None]), "future"),
                                        (lambda: Bidirectional(S4Block(4), S4Block(5)), "equal sizes"),
                                        (lambda: SequenceModel(4, 1, [S4Block(4)], bidirectional=True), "Bidirectional"),
                                        (lambda: SequenceModel(4, 1, [S4Block(4), lambda i: S4Block(4)]), "functions only"),
                                        (lambda: SequenceModel(4, 0, lambda i: S4Block(4)), "at least one"),
                                        (lambda: SequenceModel(4, 1, []), "at least one"),
                                        (lambda: SequenceModel(4, 1, lambda i: S4Block(5)), "its d_model 4"),
                                        (lambda: POOLED()(torch.zeros(2, 3, 4).double()), "pooling needs 4"),
                                        (lambda: POOLED()(torch.zeros(2, 8, 4).double(), [None, None]), "one output for every 2"),
                                        (lambda: POOLED().step(torch.zeros(2, 4).double(), [None, None]), "one output for every 2")])
def test_errors_say_what_to_do(wrong, text):
    with pytest.raises(ValueError, match=text):
        wrong()


@pytest.mark.parametrize("stack", [{"residual": r} for r in ("N", "A", "D", "H", None, partial(Affine, scalar=False, gamma=0.5))]
                         + [{"n_repeat": 2, "drop_path": 0.2, "dropinp": 0.2, "dropout": 0.2}, {"bidirectional": True}], ids=str)
def test_every_stack_keeps_the_promises(stack):
    found = check_model(model("diag", "scalar", stack=stack))
    assert set(found.values()) == ({"yes"} if "bidirectional" not in stack else {"yes", "a bidirectional layer needs the future"})


@pytest.mark.parametrize("stack", [{"residual": "H"}, {"bidirectional": True}, {"pool": partial(DownAvgPool, stride=2)}], ids=str)
def test_compile(stack):
    assert check_model(model("diag", stack=stack), compile=True)["compile"] == "yes"


def test_residual_formulas():
    x, y = torch.randn(2, 3, 5, 4, dtype=torch.double)
    h = Highway(3, 4).double()
    r = torch.sigmoid(x @ h.Wx.weight.T + h.Wx.bias + y @ h.Wy.weight.T + h.Wy.bias)
    expected = {"R": x + y, "F": y, "N": y, "A": x + y, "D": (2 / 3)**0.5 * x + (1 / 3)**0.5 * y,
                "H": (1 - r) * x + r * (y @ h.Wy.weight.T + h.Wy.bias)}
    for name, cls in RESIDUALS.items():
        f = h if name == "H" else cls(3, 4).double()
        close(f(x, y), expected[name]), close(f(x[:, 1], y[:, 1]), expected[name][:, 1])
    close(Affine(9, 4, scalar=False, beta=2.0, gamma=0.5).affine, torch.full((4,), 2 / 3), 1e-6)
    betas = [block.residual.beta for block in SequenceModel(4, 2, lambda i: S4Block(4), residual="D", n_repeat=2).layers]
    assert betas == [i**-0.5 for i in (1, 2, 3, 4)]
    close(RESIDUALS["R"](3, 4, alpha=0.5, beta=3.0)(x, y), 0.5 * x + 3 * y)
    close(RESIDUALS["D"](4, 4, power=1.0, l2=False)(x, y), 0.75 * x + 0.25 * y)
    h = Highway(3, 4, scaling_correction=True, elemwise=True).double()
    r = torch.sigmoid(x @ h.Wx.weight.T + h.Wx.bias + y * h.Wy)
    close(h(x, y), 1.732 * (1 - r) * x + r * y * h.Wy)


def test_drop_path_drops_rows_in_training_only():
    x = torch.randn(64, 5, 4)
    block = ResidualBlock(S4Block(4, d_state=4), norm="none", drop_path=0.5)
    change = (block(x)[0] - x).flatten(1)
    dropped = (change == 0).all(1)
    full = (block.eval()(x)[0] - x).flatten(1)
    assert 10 < dropped.sum() < 54 and not (full == 0).all(1).any()
    close(change[~dropped], 2 * full[~dropped], 1e-5)
    assert DropPath(0.5).eval()(x) is x


def test_input_dropout_only_in_training():
    f = SequenceModel(4, 1, lambda i: S4Block(4, d_state=4), norm="none", residual="R", dropinp=0.9, tie_dropout=True)
    f.layers[0].layer.mix[0].weight.data.zero_(), f.layers[0].layer.mix[0].bias.data.zero_()
    x = torch.ones(8, 6, 4)
    y, _ = f(x)
    assert (y == y[:, :1]).all() and (y == 0).any() and torch.equal(f.eval()(x)[0], x)


def test_norms_do_not_decay_and_a_constant_input_is_finite():
    f = model("diag", "scalar")
    groups = {name: g["weight_decay"] for g in param_groups(f, 1e-3, 0.1) for name in g["names"]}
    assert groups["layers.0.norm.m"] == groups["norm.s"] == 0.0
    x = torch.full((2, 3, 4), 0.3, requires_grad=True)
    y = ScalarNorm(4)(x)
    y.sum().backward()
    assert y.isfinite().all() and x.grad.isfinite().all()


def test_layer_norms_are_mean_squares_of_the_valid_signal():
    f = model("diag", "batch", stack={"pool": partial(DownAvgPool, stride=2)}).eval()
    u, lengths = torch.randn(3, 16, 4, dtype=torch.double), torch.tensor([16, 5, 9])
    u[1, 5:] = float("nan")
    rows = [[row[None, :n]] for row, n in zip(u, lengths)]
    for xs in rows:
        for block in f.layers:
            xs.append(block(xs[-1])[0])
    expected = [torch.cat([x.flatten() for x in level]).square().mean() for level in zip(*rows)]
    close(f.layer_norms(u, lengths), torch.stack(expected))
    close(f.layer_norms(u[:1]), torch.stack([x.square().mean() for x in rows[0]]))


def test_groups_and_repeats():
    group = [lambda i: S4Block(4, d_state=2), lambda i: S4Block(4, d_state=4)]
    f = SequenceModel(4, 3, group, n_repeat=2, pool=partial(DownAvgPool, stride=2))
    assert [b.layer.kernel.d_state for b in f.layers] == [2, 4] * 6
    assert [b.stride for b in f.layers] == [1, 1, 1, 2] * 3 and f.stride == 8
    seen = []
    SequenceModel(4, 2, lambda i: seen.append(i) or S4Block(4), n_repeat=2)
    assert seen == [0, 1, 2, 3]
    modules = nn.ModuleList(S4Block(4) for _ in range(4))
    f = SequenceModel(4, 2, modules, n_repeat=2)
    assert all(b.layer is m for b, m in zip(f.layers, modules))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("pool", [partial(DownAvgPool, stride=2), partial(DownLinearPool, stride=3), partial(DownSpectralPool, stride=2)])
def test_pooled_rows_equal_the_rows_alone(norm, bidirectional, pool):
    f = model("diag", norm, stack={"pool": pool, "bidirectional": bidirectional}).eval()
    u, lengths = torch.randn(3, 25, 4, dtype=torch.double), torch.tensor([25, 11, 9])
    wide = torch.cat([u, u], 1)
    wide[1, 11:] = float("nan")
    y, _ = f(wide, lengths=lengths)
    assert y.shape[1] == 50 // f.stride
    for i, n in enumerate(lengths):
        close(y[i, :n // f.stride], f(u[i:i + 1, :n])[0][0])


def test_a_pool_of_stride_one_can_step():
    f = model("diag", stack={"pool": partial(DownLinearPool, stride=1)})
    assert f.stride == 1 and set(check_model(f).values()) == {"yes"}


@pytest.mark.parametrize("norm,prenorm", [("layer", True), ("batch", True), ("instance", False)])
@pytest.mark.parametrize("residual", ["R", "H", None])
def test_a_block_alone_keeps_the_promises(norm, prenorm, residual):
    found = check_model(ResidualBlock(S4Block(4, d_state=4, n_ssm=1), norm, prenorm, residual))
    assert set(found.values()) <= {"yes", *ResidualBlock(S4Block(4, d_state=4), norm).limits.values()}
    with pytest.raises(ValueError, match="features come last"):
        ResidualBlock(S4Block(4, d_state=4))(torch.zeros(2, 5, 3))


def test_a_step_without_a_state_begins_at_the_default():
    f, u = model("diag"), torch.randn(2, 4, dtype=torch.double)
    close(f.step(u, None)[0], f.step(u, f.default_state(2))[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("norm", ["scalar", "instance", "group"])
def test_norms_in_half_precision(norm, dtype):
    "Those written here: one rounding of the result, whatever the sums."
    x, mask = (3 + torch.randn(2, 1000, 64)).to(dtype), length_mask(torch.tensor([1000, 700]), 1000)
    y, expected = NORM_CLASSES[norm](64).to(dtype)(x, mask), NORM_CLASSES[norm](64).double()(x.double(), mask)
    assert y.dtype == dtype
    close(torch.where(mask, y, 0).double(), torch.where(mask, expected, 0), torch.finfo(dtype).eps)
    assert NORM_CLASSES[norm](4).to(dtype)(torch.full((2, 3, 4), 0.1, dtype=dtype)).isfinite().all()


def test_flip_valid():
    u, lengths = torch.arange(12.0).view(2, 6, 1), torch.tensor([6, 4])
    assert flip_valid(u, lengths).flatten().tolist() == [5, 4, 3, 2, 1, 0, 9, 8, 7, 6, 10, 11]
    assert torch.equal(flip_valid(u, [6, 6]), flip_valid(u))


@pytest.mark.parametrize("norm", NORMS)
def test_bidirectional_padding_and_training(norm):
    "As the test above for layers that look both ways themselves: other padding, same outputs, gradients, running averages."
    lengths = torch.tensor([14, 3, 9])
    u, results = torch.randn(3, 14, 4, dtype=torch.double), []
    f = model("diag", norm, stack={"bidirectional": True})
    for x, g in ((u, f), (torch.cat([u, torch.full_like(u, 1e3)], 1), copy.deepcopy(f))):
        x = torch.where(length_mask(lengths, x.shape[1]), x, 7.0)
        y, _ = g(x, lengths=lengths)
        valid = y[length_mask(lengths, x.shape[1]).squeeze(-1)]
        valid.square().sum().backward()
        results.append([valid, *(p.grad for p in g.parameters()), *(b for b in g.buffers() if b.is_floating_point())])
    for a, b in zip(*results):
        close(a, b)


# --- against the reference ------------------------------------------------------------------------------------------------------------

def arrays(vectors, file, case):
    data = np.load(vectors / f"{file}.npz", allow_pickle=False)
    return {name[len(case) + 1:]: torch.from_numpy(np.array(data[name])) for name in data.files if name.startswith(case + "/")}


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", ["layer", "instance", "batch", "group", "none"])
def test_parity_of_norms(vectors, name, transposed):
    a = arrays(vectors, "e_attn", f"norm_{name}_transposed{transposed}")
    x, y = (a[k].mT if transposed else a[k] for k in ("x", "y"))
    norm = NORM_CLASSES["scalar" if transposed and name == "layer" else name](x.shape[-1]).double().eval()
    norm.load_state_dict(part(a, "param/norm."))
    close(norm(x), y, 1e-12)


@pytest.mark.parametrize("flip", [False, True])
def test_parity_of_the_bidirectional_model(vectors, flip):
    "The reference's reverse layer reads forward in time: only flip=False gives its numbers."
    a = arrays(vectors, "e_seqmodel", "s4_bidir_model")
    params = {k: v if k.endswith("l_kernel") else v.double() for k, v in part(a, "param/").items()}
    layers = [Bidirectional(S4Block(8, d_state=16), S4Block(8, d_state=16), flip=flip) for _ in range(2)]
    f = SequenceModel(8, 2, layers).double()
    for i, block in enumerate(f.layers):
        p = part(params, f"model.layers.{i}.")
        load_state_spaces(block.layer.forward_layer, part(p, "layer."))
        load_state_spaces(block.layer.reverse_layer, part(p, "reverse_layer."))
        block.layer.bidirectional_linear.load_state_dict(part(p, "bidirectional_linear."))
        block.norm.load_state_dict(part(p, "norm.norm."))
    f.norm.load_state_dict(part(params, "model.norm.norm."))
    y, _ = f(a["x"].double() @ params["enc.weight"].T + params["enc.bias"])
    error = (y - a["h"]).abs().max()
    assert error > 0.1 if flip else error < 1e-6
