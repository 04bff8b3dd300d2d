"""S4ND: against one matrix for each axis, block means at half resolution, rows of different sizes, state dict and refusals."""
import math

import pytest
import torch
from rows import Rows

from s4nb.models.check import check_model
from s4nb.models.s4nd import S4ND, per_axis
from s4nb.s4.block import S4D


MODELS = {"1d": lambda: S4ND(4, 6, dim=1), "2d": lambda: Rows(S4ND(2, 6)),
          "rank": lambda: Rows(S4ND(2, 6, mode="diag", trank=3, channels=2, mult_act="tanh")),
          "one way": lambda: Rows(S4ND(2, 6, mode="diag", bidirectional=False, final_act=None)),
          "glu": lambda: Rows(S4ND(2, 6, activation="glu", final_act="id", swap_channels=True)),
          "dense": lambda: Rows(S4ND(2, 5, mode="dense", l_max=(6, None)))}


@pytest.mark.parametrize("name", MODELS)
def test_check_model(name):
    found = check_model(MODELS[name](), L=12, compile=name == "2d")
    assert {key for key, said in found.items() if said != "yes"} == {"step", "state"}


def toeplitz(K, K_back, l, offset):
    "T (… l l) with T_ts = K_{t-s}, and K_back_{s-t-offset} added."
    T = K.new_zeros(*K.shape[:-1], l, l)
    for t in range(l):
        for s in range(l):
            if s <= t < s + K.shape[-1]: T[..., t, s] += K[..., t - s]
            if K_back is not None and 0 <= s - t - offset < K_back.shape[-1]: T[..., t, s] += K_back[..., s - t - offset]
    return T


@pytest.mark.parametrize("rate,rates", [(1.0, (1.0, 1.0)), (2.0, (2.0, 2.0)), ((0.5, 3.0), (0.5, 3.0))])
@pytest.mark.parametrize("options", [dict(), dict(offset=0, trank=2), dict(mode="diag", l_max=(3, 5), channels=2),
                                     dict(mode="dense", trank=2, channels=3, bidirectional=False)])
def test_matrices(options, rate, rates):
    f = S4ND(2, 6, activation=None, final_act=None, **options).double()
    u, c = torch.randn(2, 6, 7, 2, dtype=torch.double), len(f.D)
    Ts = []
    for kernel, l, reach, r in zip(f.kernel, (6, 7), f.l_max, rates):
        k = l if reach is None else min(l, max(1, round(reach / r)))
        K = kernel(k, r)[0].detach()
        K, K_back = K.chunk(2) if f.bidirectional else (K, None)
        Ts.append(toeplitz(K, K_back, l, f.offset).unflatten(0, (c, f.trank)))
    y = torch.einsum("crhts,crhvw,bswh->btvch", *Ts, u) / f.trank + f.D * u.unsqueeze(-2)
    assert torch.allclose(f(u, rate=rate)[0], y.flatten(-2), atol=1e-12)


def test_transposing_the_image_exchanges_the_axes():
    f, u = S4ND(3, 6, mode="diag").double(), torch.randn(1, 5, 8, 3, dtype=torch.double)
    y = f(u)[0]
    f.kernel[0], f.kernel[1] = f.kernel[1], f.kernel[0]
    assert torch.allclose(f(u.transpose(1, 2))[0].transpose(1, 2), y, atol=1e-12)


def test_three_axes_one_of_them_a_point():
    torch.manual_seed(0)
    f, g = S4ND(2, 6, dim=3, mode="diag").double(), S4ND(2, 6, mode="diag").double()
    for i in range(2): g.kernel[i] = f.kernel[i]
    g.D, g.mix = torch.nn.Parameter(f.D / f.kernel[2](1)[0][0, :, 0]), torch.nn.Identity()
    f.mix, f.act, g.act = g.mix, torch.nn.Identity(), torch.nn.Identity()
    u = torch.randn(2, 5, 4, 2, dtype=torch.double)
    point = f.kernel[2](1)[0][0, :, 0]                            # the third kernel at lag 0, its only one here
    assert torch.allclose(f(u.unsqueeze(3))[0].squeeze(3), g(u)[0] * point, atol=1e-12)


def test_images_of_different_sizes():
    f, sizes = S4ND(2, 6, trank=2).double(), [(6, 5), (1, 4), (3, 1)]
    u = torch.full((3, 6, 5, 2), float("nan"), dtype=torch.double)
    alone = [torch.randn(1, *size, 2, dtype=torch.double) for size in sizes]
    for row, x in zip(u, alone): row[:x.shape[1], :x.shape[2]] = x[0]
    y = f(u, lengths=torch.tensor(sizes))[0]
    for row, x in zip(y, alone): assert torch.allclose(row[:x.shape[1], :x.shape[2]], f(x)[0][0], atol=1e-12)


def half_resolution(offset, width):
    "Relative difference between the block means of the answer to a Gaussian blob and the answer at rate 2."
    torch.manual_seed(0)
    f = S4ND(4, 8, mode="diag", init="diag-lin", dt_min=0.02, dt_max=0.02, activation=None, final_act=None, offset=offset).double()
    f.D.data.zero_()
    g = (-((torch.arange(96, dtype=torch.double) - 48) / width) ** 2 / 2).exp()
    u = torch.outer(g, g)[None, :, :, None].expand(1, 96, 96, 4)
    with torch.no_grad(): fine, half = f(u)[0], f(u[:, ::2, ::2], rate=2)[0]
    fine = fine.unflatten(1, (48, 2)).unflatten(3, (48, 2)).mean((2, 4))
    return ((half - fine).norm() / fine.norm()).item()


def test_half_resolution_of_a_smooth_image():
    "The wider the blob, the smaller the error; kernels whose two halves disagree about half a pixel stay far behind."
    errors = [half_resolution(1, width) for width in (2, 4, 8)]
    assert errors[0] > 2 * errors[1] > 4 * errors[2] and errors[2] < 2e-3
    assert half_resolution(0, 8) > 20 * errors[2]


def test_options_of_the_kernels_go_one_level_down():
    f = S4ND(4, 8, mode="diag", init="diag-lin", bandlimit=0.5, n_ssm=1, lr=1e-3)
    for kernel in f.kernel:
        assert kernel.options.bandlimit == 0.5 and kernel.n_ssm == 1 and kernel.param_options["A_real"]["lr"] == 1e-3
    assert [k.l_kernel for k in S4ND(2, 4, dim=3, l_max=(4, 5, 6)).kernel] == [4, 5, 6]
    with pytest.raises(ValueError, match="did you mean 'bandlimit'"): S4ND(4, bandlimt=1.0, mode="diag")


def test_training_mode_drops_one_mask_for_a_whole_image():
    torch.manual_seed(0)
    f = S4ND(4, 4, mode="diag", dropout=0.5, tie_dropout=True, final_act=None)
    dropped = f(torch.randn(3, 5, 6, 4))[0] == 0
    assert torch.equal(dropped, dropped[:, :1, :1].expand_as(dropped)) and 0 < dropped[:, 0, 0].sum() < 12


def test_one_axis_is_s4d():
    torch.manual_seed(0)
    block, f = S4D(3, 8, bidirectional=True, channels=2).double(), S4ND(3, 8, dim=1, mode="diag", init="diag-lin", channels=2).double()
    f.load_state_dict({name.replace("kernel.", "kernel.0."): x for name, x in block.state_dict().items()})
    u = torch.randn(2, 20, 3, dtype=torch.double)
    assert torch.allclose(f(u)[0], block(u)[0], atol=1e-12)
    f.kernel[0].inv_dt.data += math.log(3)
    assert torch.allclose(f(u)[0], block(u, rate=3)[0], atol=1e-12)


@pytest.mark.parametrize("call,said", [
    (lambda: S4ND(2, dim=0), "at least 1"), (lambda: S4ND(2, trank=0), "at least 1"), (lambda: S4ND(2, mode="s4"), "unknown mode"),
    (lambda: S4ND(2, l_max=(3, 3, 3)), "3 values for 2 axes"), (lambda: S4ND(2, offset=2), "offset"),
    (lambda: S4ND(2, mode="conv"), "l_max"), (lambda: S4ND(2, 4)(torch.zeros(1, 3, 4, 2), rate=(1, 2, 3)), "rate has 3 values"),
    (lambda: S4ND(2, 4)(torch.zeros(1, 3, 2)), "features come last"), (lambda: S4ND(2, 4)(torch.zeros(1, 3, 4, 2).int()), "floats"),
    (lambda: S4ND(2, 4)(torch.zeros(1, 3, 4, 2), torch.zeros(1)), "no last pixel"),
    (lambda: S4ND(2, 4)(torch.zeros(1, 3, 4, 2), lengths=torch.tensor([3])), "2 axes"),
    (lambda: S4ND(2, 4, dim=1, bidirectional=False).step(torch.zeros(1, 2), None), "no last pixel")])
def test_refusals(call, said):
    with pytest.raises(ValueError, match=said): call()


def test_per_axis():
    assert per_axis("x", 3, 2) == (3, 3) and per_axis("x", [1, None], 2) == (1, None) and per_axis("x", None, 1) == (None,)
