"""Encoders and decoders: each row equals the row alone, padding changes nothing."""
from functools import partial

import numpy as np
import pytest
import torch

from s4nb.models import Decoder, LinearEncoder, Model, SequenceModel, TokenEncoder
from s4nb.models.coders import last, pool
from s4nb.models.pooling import DownAvgPool
from s4nb.s4.block import S4Block


def test_each_row_equals_the_row_alone():
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        x = torch.randn(4, 11, 3, dtype=torch.double, generator=generator)
        lengths = torch.randint(1, 12, (4,), generator=generator)
        for f, alone in ((pool, lambda r: r.mean(0)), (last, lambda r: r[-1])):
            expected = torch.stack([alone(row[:n]) for row, n in zip(x, lengths)])
            assert torch.allclose(f(x, lengths), expected, rtol=0, atol=1e-14)
            assert torch.allclose(f(x), torch.stack([alone(row) for row in x]), rtol=0, atol=1e-14)


def test_empty_rows_pool_to_zero():
    assert (pool(torch.ones(2, 3, 4), torch.tensor([0, 3])) == torch.tensor([0.0, 1.0])[:, None]).all()


@pytest.mark.parametrize("norm", ["batch", "layer"])
@pytest.mark.parametrize("mode", ["pool", "last"])
def test_logits_and_gradients_do_not_know_the_padding(norm, mode):
    torch.manual_seed(0)
    layer = lambda i: S4Block(8, d_state=4, n_ssm=1, bidirectional=True)
    f = Model(TokenEncoder(18, 8), SequenceModel(8, 2, layer, norm=norm, prenorm=False), Decoder(8, 10, mode)).double()
    x, lengths, results = torch.randint(3, 18, (5, 20)), torch.tensor([20, 3, 11, 8, 20]), []
    for tokens in (x, torch.cat([x.masked_fill(torch.arange(20) >= lengths[:, None], 0), torch.randint(18, (5, 30))], 1)):
        f.zero_grad()
        logits = f(tokens, lengths)
        torch.nn.functional.cross_entropy(logits, torch.arange(5)).backward()
        results.append([logits, *(p.grad for p in f.parameters())])
    for a, b in zip(*results):
        assert (a - b).abs().max() <= 1e-9 * max(1.0, a.abs().max())


def test_shapes_and_errors():
    assert Decoder(4, 7, "all")(torch.randn(2, 5, 4)).shape == (2, 5, 7)
    assert LinearEncoder(3, 4)(torch.randn(2, 5, 3)).shape == (2, 5, 4)
    with pytest.raises(ValueError, match="pool, last, first, sum, all"):
        Decoder(4, 7, "mean")
    with pytest.raises(ValueError, match="LinearEncoder"):
        TokenEncoder(18, 4)(torch.randn(2, 5))
    with pytest.raises(ValueError, match="lengths"):
        pool(torch.randn(2, 5, 4), torch.tensor([6, 5]))


@pytest.mark.parametrize("mode", ["pool", "last", "first", "sum"])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_several_outputs_are_those_of_shorter_sequences(mode, k):
    "Output j of k is the one output of the row cut to its first n - k + j positions (first: position j)."
    generator = torch.Generator().manual_seed(1)
    x, lengths = torch.randn(4, 11, 3, dtype=torch.double, generator=generator), torch.tensor([11, 4, 7, 5])
    one, several = Decoder(3, 2, mode).double(), Decoder(3, 2, mode, k).double()
    several.load_state_dict(one.state_dict())
    x[1, 4:] = float("nan")
    y = several(x, lengths)
    assert y.shape == (4, k, 2)
    for i, n in enumerate(lengths):
        for j in range(1, k + 1):
            row = x[i:i + 1, j - 1:n] if mode == "first" else x[i:i + 1, :n - k + j]
            assert torch.allclose(y[i, j - 1], one(row)[0], rtol=0, atol=1e-13)
    every = Decoder(3, 2, mode, None).double()
    every.load_state_dict(one.state_dict())
    assert every(x, lengths).shape == (4, 11, 2) and every(x, lengths).isfinite().all()
    assert torch.allclose(every(x[:1])[0, -k:] if mode != "first" else every(x[:1])[0, :k], several(x[:1])[0], rtol=0, atol=1e-13)


def test_too_few_positions_for_the_outputs():
    x = torch.randn(2, 5, 3)
    for mode in ("pool", "last", "first", "sum"):
        with pytest.raises(ValueError, match="3 outputs were asked for, but a row has 2 positions"):
            Decoder(3, 2, mode, 3)(x, torch.tensor([5, 2]))
        with pytest.raises(ValueError, match="6 outputs"):
            Decoder(3, 2, mode, 6)(x)
    with pytest.raises(ValueError, match="l_output"):
        Decoder(3, 2, "last", -1)


def test_pooled_backbone_hands_shorter_lengths_to_the_decoder():
    torch.manual_seed(0)
    backbone = SequenceModel(6, 2, lambda i: S4Block(6, d_state=4), pool=partial(DownAvgPool, stride=2))
    for mode in ("pool", "last"):
        f = Model(TokenEncoder(9, 6), backbone, Decoder(6, 3, mode)).double()
        x, lengths = torch.randint(9, (3, 21)), torch.tensor([21, 9, 4])
        rows = torch.cat([f(row[None, :n]) for row, n in zip(x, lengths)])
        assert torch.allclose(f(x, lengths), rows, rtol=0, atol=1e-12)
        assert torch.allclose(f(torch.cat([x, x], 1), lengths), rows, rtol=0, atol=1e-12)


def test_parity_of_decoder_modes(vectors):
    data, case = np.load(vectors / "e_seqmodel.npz", allow_pickle=False), "s4_layernorm_prenorm/"
    a = {name[len(case):]: torch.from_numpy(data[name]) for name in data.files if name.startswith(case)}
    h, checked = a["h"], 0
    for name, expected in a.items():
        if name.startswith("dec_") and "_lo" in name:
            mode, l_output = name[4:].split("_lo")
            decoder = Decoder(8, 8, mode, None if l_output == "None" else int(l_output)).double()
            decoder.linear = torch.nn.Identity()
            assert (decoder(h) - expected).abs().max() < 1e-12, name
            checked += 1
    assert checked >= 10 and (pool(h, a["lengths"]) - a["dec_pool_lengths"]).abs().max() < 1e-12
