"""Encoders and decoders: each row equals the row alone, padding changes nothing."""
import pytest
import torch

from s4nb.models import Decoder, LinearEncoder, Model, SequenceModel, TokenEncoder
from s4nb.models.coders import last, pool
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
    with pytest.raises(ValueError, match="pool, last, all"):
        Decoder(4, 7, "sum")
    with pytest.raises(ValueError, match="LinearEncoder"):
        TokenEncoder(18, 4)(torch.randn(2, 5))
    with pytest.raises(ValueError, match="lengths"):
        pool(torch.randn(2, 5, 4), torch.tensor([6, 5]))
