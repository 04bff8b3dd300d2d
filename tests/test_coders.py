"""Encoders, decoders, models: each row equals the row alone, padding changes nothing, pieces and steps equal the whole."""
import math
from functools import partial

import numpy as np
import pytest
import torch

from s4nb.models import (GRU, LSTM, S4ND, ClassEncoder, Conv1d, Decoder, LinearEncoder, Model, NDDecoder, OneHotEncoder, PairDecoder,
                         Patches, Positions, SaShiMi, SequenceModel, StateDecoder, TimeEncoder, TokenEncoder)
from s4nb.models.coders import flatten_state, last, pool, sinusoids
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


# ---- encoders --------------------------------------------------------------------------------------------------------
def close(a, b, tolerance=1e-12):
    assert a.shape == b.shape and a.dtype == b.dtype, (a.shape, b.shape, a.dtype, b.dtype)
    assert (a - b).abs().max() <= tolerance


@pytest.mark.parametrize("d", [6, 7])
@pytest.mark.parametrize("rate", [1, 2, 0.5])
def test_sinusoids_are_those_of_the_paper(d, rate):
    u = torch.zeros(2, 40, d, dtype=torch.double)
    p, state = Positions(d)(u, rate=rate)
    for t in range(40):
        for j in range(d):
            phase = t * rate / 10000 ** ((j - j % 2) / d)
            assert abs(p[1, t, j] - (math.cos(phase) if j % 2 else math.sin(phase))) < 1e-12
    assert state.tolist() == [40 * rate] * 2


def test_sinusoids_far_out_are_rounded_once():
    t = torch.tensor([999_999.0])
    w = torch.tensor([10000 ** (-2 * i / 64) for i in range(32)], dtype=torch.double)
    close(Positions(64)(torch.zeros(1, 1, 64), t.double())[0][0, 0, ::2], (t.double() * w).sin().float(), 1e-6)
    assert ((t * w.float()).sin() - (t.double() * w).sin()).abs().max() > 1e-3  # what float32 phases would give


def test_learned_positions_end_at_l_max():
    f, u = Positions(4, 6, "learned"), torch.randn(3, 6, 4)
    assert list(f.state_dict()) == ["pe"] and f.pe.shape == (1, 6, 4) and not Positions(4).state_dict()
    close(f(u)[0], u + f.pe, 0)
    _, state = f(u, lengths=torch.tensor([2, 5, 0]))
    y, end = f(u[:, :1], state)
    close(y[:, 0], u[:, 0] + f.pe[0, [2, 5, 0]], 0)
    assert end.tolist() == [3, 6, 1]
    for wrong in (lambda: f(u[:, :2], state), lambda: f.step(u[:, 0], torch.tensor([6.0, 0, 0]).double()), lambda: f(torch.cat([u, u], 1))):
        with pytest.raises(ValueError, match="l_max=6 rows"):
            wrong()
    f(u[:, :3], state, lengths=torch.tensor([1, 1, 3]))  # only padding lies beyond
    with pytest.raises(ValueError, match="rate must be 1"):
        f(u, rate=2)
    with pytest.raises(ValueError, match="give its length"):
        Positions(4, kind="learned")
    with pytest.raises(ValueError, match="sin, learned"):
        Positions(4, 6, "sine")


def test_one_hot():
    x = torch.tensor([[0, 3, 1]])
    f = OneHotEncoder(4, 6).double()
    assert f(x).tolist() == [[[1, 0, 0, 0, 0, 0], [0, 0, 0, 1, 0, 0], [0, 1, 0, 0, 0, 0]]] and f(x).dtype == torch.double
    assert OneHotEncoder(4)(x).shape == (1, 3, 4) and not f.state_dict() and not list(f.parameters())
    with pytest.raises(ValueError, match="d_model=3"):
        OneHotEncoder(4, 3)
    with pytest.raises(ValueError, match="tokens are integers"):
        f(x.double())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("encoder", [TokenEncoder(5, 8), OneHotEncoder(5)])
def test_tokens_of_any_integer_type(encoder, dtype):
    x = torch.tensor([[4, 0, 2]])
    assert torch.equal(encoder(x.to(dtype)), torch.stack([torch.stack([(encoder.weight if isinstance(encoder, TokenEncoder) else torch.eye(5))[i]
                                                                       for i in row]) for row in x]))


@pytest.mark.parametrize("encoder", [TokenEncoder(5, 8), OneHotEncoder(5)])
@pytest.mark.parametrize("wrong, came", [([[5, 1]], "1…5"), ([[-100, 4]], "-100…4")])
def test_tokens_beyond_the_table(encoder, wrong, came):
    with pytest.raises(ValueError, match=f"tokens lie in 0…4, but {came} came; raise n_tokens"):
        encoder(torch.tensor(wrong))


@pytest.mark.parametrize("shape", [(2, 5), (2, 5, 4), (2,)])
def test_samples_without_the_right_features(shape):
    with pytest.raises(ValueError, match=r"input of shape \(2.*3 features are expected, and come last"):
        LinearEncoder(3, 8)(torch.zeros(shape))


def test_times_are_positions_at_given_times():
    x, t = torch.randn(2, 5, 3, dtype=torch.double), torch.arange(5).double().expand(2, 5) * 0.25
    f = TimeEncoder(LinearEncoder(3, 8), 8, unit=0.25).double()
    y = f(torch.cat([t[..., None], x], -1))
    close(y, Positions(8)(f.encoder(x))[0])
    close(f(torch.cat([t[:, 3, None], x[:, 3]], -1)), y[:, 3])
    close(f(torch.cat([t[..., None] + 100, x], -1)), f.encoder(x) + sinusoids(4 * t + 400, 8))
    with pytest.raises(ValueError, match="put it behind"):
        TimeEncoder(Positions(8), 8)


def test_labels_are_added_everywhere():
    x, label = torch.randint(9, (3, 5)), torch.tensor([1, 0, 1])
    f = ClassEncoder(TokenEncoder(9, 4), 2, 4)
    assert list(f.state_dict()) == ["encoder.weight", "labels.weight"]
    for i in range(3):
        for t in range(5):
            close(f((x, label))[i, t], f.encoder.weight[x[i, t]] + f.labels.weight[label[i]], 0)
    close(f([x[:, 2], label]), f((x, label))[:, 2], 0)
    for wrong in (x, (x,), (x, label, label)):
        with pytest.raises(ValueError, match="pair"):
            f(wrong)
    with pytest.raises(ValueError, match="ClassEncoder works position by position, but Positions"):
        ClassEncoder(Positions(4), 2, 4)


def test_patches_are_a_convolution_with_stride():
    x, f = torch.randn(2, 6, 8, 3, dtype=torch.double), Patches(3, 5, (3, 2), shape=(6, 8)).double()
    kernel = f.linear.weight.view(5, 3, 2, 3).movedim(-1, 1)
    expected = torch.nn.functional.conv2d(x.movedim(-1, 1), kernel, f.linear.bias, stride=(3, 2))
    close(f(x)[0], expected.flatten(2).mT)
    close(f(x.flatten(1, 2))[0], expected.flatten(2).mT)
    grid = Patches(3, 5, (3, 2), grid=True).double()
    grid.load_state_dict(f.state_dict())
    close(grid(x)[0], expected.movedim(1, -1))
    for wrong in (x[:, :5], x[..., :2], x.flatten(1, 2)[:, :47], x[0, 0]):
        with pytest.raises(ValueError, match="does not split into patches of 3 x 2 x 3"):
            f(wrong)
    for options in ({"lengths": torch.tensor([3, 3])}, {"state": torch.zeros(2)}):
        with pytest.raises(ValueError, match="without state or lengths"):
            f(x, **options)
    with pytest.raises(ValueError, match="rate must be 1"):
        f(x, rate=2)
    with pytest.raises(ValueError, match="Patches cannot step"):
        f.step(x[:, 0, 0], None)


def test_any_sequence_module_is_an_encoder():
    "The convolution over 25 neighbours of state-spaces/s4: no leak from the padding, gradients included."
    torch.manual_seed(0)
    backbone = SequenceModel(6, 1, lambda i: S4Block(6, d_state=4, bidirectional=True))
    f = Model(torch.nn.Sequential(Conv1d(3, 6, 25, activation=None), Positions(6)), backbone, Decoder(6, 2)).double()
    same = torch.nn.Conv1d(3, 6, 25, padding="same").double()
    same.load_state_dict(f.encoder[0].conv1d.state_dict())
    x, lengths, results = torch.randn(3, 30, 3, dtype=torch.double), torch.tensor([30, 9, 17]), []
    close(f.encode(x)[0], Positions(6)(same(x.mT).mT)[0])
    spoilt = x.masked_fill((torch.arange(30) >= lengths[:, None])[..., None], float("nan"))
    for v in (x, spoilt, torch.cat([spoilt, spoilt], 1)):
        f.zero_grad()
        f(v, lengths).square().sum().backward()
        results.append([f(v, lengths), *(p.grad.clone() for p in f.parameters())])
    for other in results[1:]:
        for a, b in zip(results[0], other):
            close(a, b, 1e-9)
    close(f(x, lengths)[1:2], f(x[1:2, :9]), 1e-12)


# ---- decoders --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("mode", ["pool", "last", "first", "sum"])
def test_pairs_by_a_literal_loop(mode):
    torch.manual_seed(0)
    x, lengths = torch.randn(8, 7, 3, dtype=torch.double), torch.tensor([7, 2, 5, 1, 3, 7, 7, 6])
    f = PairDecoder(3, 2, mode).double()
    x = x.masked_fill((torch.arange(7) >= lengths[:, None])[..., None], float("nan"))
    reduce = {"pool": lambda r: r.mean(0), "last": lambda r: r[-1], "first": lambda r: r[0], "sum": lambda r: r.sum(0)}[mode]
    y = f(x, lengths)
    assert y.shape == (4, 2)
    for i in range(4):
        a, b = reduce(x[i, :lengths[i]]), reduce(x[i + 4, :lengths[i + 4]])
        v = f.linear.weight @ torch.cat([a, b, a - b, a * b]) + f.linear.bias
        v = torch.tensor([0.5 * z * (1 + math.erf(z / math.sqrt(2))) for z in v.tolist()], dtype=torch.double)
        close(y[i], f.head.weight @ v + f.head.bias)
    assert {n: tuple(p.shape) for n, p in f.named_parameters()} == {
        "linear.weight": (3, 12), "linear.bias": (3,), "head.weight": (2, 3), "head.bias": (2,)}


def test_pair_errors():
    with pytest.raises(ValueError, match="5 rows are no pairs"):
        PairDecoder(3, 2)(torch.randn(5, 7, 3))
    with pytest.raises(ValueError, match="pool, last, first, sum"):
        PairDecoder(3, 2, "all")
    with pytest.raises(ValueError, match="PairDecoder cannot step: a pair"):
        PairDecoder(3, 2).step(torch.randn(2, 3))


def test_pairs_swap_and_padding_through_a_model():
    torch.manual_seed(0)
    backbone = SequenceModel(6, 1, lambda i: S4Block(6, d_state=4, bidirectional=True))
    f = Model(TokenEncoder(9, 6), backbone, PairDecoder(6, 2)).double()
    x, lengths = torch.randint(9, (6, 20)), torch.tensor([20, 9, 4, 7, 20, 1])
    y = f(x, lengths)
    close(y, torch.cat([f(torch.stack([torch.cat([r[:n], r[n:] * 0]) for r, n in ((x[i], lengths[i]), (x[i + 3], lengths[i + 3]))]),
                          lengths[[i, i + 3]]) for i in range(3)]), 1e-12)
    close(f(torch.cat([x, x], 1), lengths), y, 1e-12)


def test_nd_decoder_is_the_mean_over_each_box():
    torch.manual_seed(0)
    f, x = NDDecoder(3, 2).double(), torch.randn(3, 4, 5, 6, 3, dtype=torch.double)
    lengths = torch.tensor([[4, 5, 6], [1, 5, 2], [3, 2, 6]])
    means = []
    for row, (a, b, c) in zip(x, lengths):
        means.append(row[:a, :b, :c].flatten(0, 2).mean(0))
        row[a:], row[:, b:], row[:, :, c:] = float("nan"), float("nan"), float("nan")
    close(f(x, lengths), f.linear(torch.stack(means)))
    close(f(x[:1]), f.linear(x[:1].mean((1, 2, 3))))
    image = Model(Patches(3, 4, 2, grid=True), S4ND(4, d_state=4), NDDecoder(4, 2))
    assert image(torch.randn(2, 6, 8, 3)).shape == (2, 2)
    with pytest.raises(ValueError, match="the encoder, Patches, cannot step"):
        image.step(torch.randn(2, 3))
    with pytest.raises(ValueError, match="the encoder, Patches, cannot continue from a state"):
        image.advance(torch.randn(2, 6, 8, 3))


def test_state_decoder_reads_all_numbers_of_the_last_valid_state():
    torch.manual_seed(0)
    block = S4Block(4, d_state=6)
    f = Model(LinearEncoder(2, 4), block, StateDecoder(block, 3)).double()
    assert f.decoder.linear.in_features == 4 * 3 * 2  # features, conjugate pairs, real and imaginary parts
    x, lengths = torch.randn(3, 12, 2, dtype=torch.double), torch.tensor([12, 5, 1])
    for y, row, n in zip(f(x, lengths), x, lengths):
        _, state = block(f.encoder(row[None, :n]))
        expected = f.decoder.linear(torch.stack([state.real, state.imag], -1).flatten())
        close(y, expected)
    f(x).sum().backward()
    assert f.encoder.weight.grad.abs().max() > 0
    lstm = SequenceModel(4, 2, lambda i: LSTM(4, 4))
    assert StateDecoder(lstm, 3).linear.in_features == 2 * 2 * 4
    hidden = Model(LinearEncoder(2, 4), lstm, StateDecoder(4, 3, read=lambda state: state[-1][0])).double()
    close(hidden(x), hidden.decoder.linear(lstm(hidden.encoder(x))[1][-1][0]))


def test_state_decoder_errors():
    x, both = torch.randn(2, 5, 4), S4Block(4, d_state=4, bidirectional=True)
    with pytest.raises(ValueError, match="returns no state"):
        StateDecoder(both, 3)
    with pytest.raises(ValueError, match="returns no state"):
        Model(torch.nn.Identity(), both, StateDecoder(4, 3))(x)
    with pytest.raises(ValueError, match="holds 16 numbers, StateDecoder takes 4"):
        Model(torch.nn.Identity(), S4Block(4, d_state=4), StateDecoder(4, 3))(x)
    assert flatten_state([torch.zeros(2, dtype=torch.long), None]) is None


# ---- pieces and steps ------------------------------------------------------------------------------------------------
ENCODERS = {"token": lambda: TokenEncoder(9, 6), "sin": lambda: torch.nn.Sequential(TokenEncoder(9, 6), Positions(6)),
            "learned": lambda: torch.nn.Sequential(OneHotEncoder(9), LinearEncoder(9, 6), Positions(6, 16, "learned")),
            "causal": lambda: torch.nn.Sequential(TokenEncoder(9, 6), Conv1d(6, 6, 3, causal=True), Positions(6))}
BACKBONES = {"s4": lambda: SequenceModel(6, 2, lambda i: S4Block(6, d_state=4), norm="batch"), "gru": lambda: GRU(6, 6),
             "sashimi": lambda: SaShiMi(6, 1, pool=(2,), ff=0, layer=lambda d: S4Block(d, d_state=4))}


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_pieces_and_steps_equal_the_whole(encoder, backbone):
    torch.manual_seed(0)
    f = Model(ENCODERS[encoder](), BACKBONES[backbone](), Decoder(6, 4, "all")).double().eval()
    x = torch.randint(9, (3, 15))
    whole, state = f(x), None
    pieces = []
    for piece in x[:, :9].split([4, 1, 4], 1):
        y, state = f.advance(piece, state)
        pieces.append(y)
    for t in range(9, 15):
        y, state = f.step(x[:, t], state)
        pieces.append(y[:, None])
    close(torch.cat(pieces, 1), whole, 1e-10)
    for state in (None, f.default_state(3)):
        for t in range(15):
            y, state = f.step(x[:, t], state)
            close(y, whole[:, t], 1e-10)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_rows_of_different_lengths_go_on_where_each_was(encoder):
    torch.manual_seed(0)
    f = Model(ENCODERS[encoder](), BACKBONES["s4"](), Decoder(6, 4, "last")).double().eval()
    x, lengths = torch.randint(9, (3, 12)), torch.tensor([12, 3, 7])
    first, state = f.advance(x, lengths=lengths)
    second, state = f.advance(x[:, :3], state, lengths=torch.tensor([3, 2, 1]))
    third, _ = f.step(x[:, 5], state)
    for i, (n, m) in enumerate(zip(lengths, (3, 2, 1))):
        row = torch.cat([x[i, :n], x[i, :m], x[i, 5:6]])[None]
        close(first[i:i + 1], f(row[:, :n]), 1e-10), close(second[i:i + 1], f(row[:, :n + m]), 1e-10)
        close(third[i:i + 1], f(row), 1e-10)


def test_rate_reaches_encoder_and_backbone():
    torch.manual_seed(0)
    f = Model(ENCODERS["sin"](), S4Block(6, d_state=4), Decoder(6, 4, "all")).double()
    x = torch.randint(9, (2, 10))
    u = f.encoder[0](x) + sinusoids(2 * torch.arange(10), 6)
    close(f(x, rate=2), f.decoder(f.backbone(u, rate=2)[0]))
    first, state = f.advance(x[:, :4], rate=2)
    close(torch.cat([first, f.advance(x[:, 4:], state, rate=2)[0]], 1), f(x, rate=2), 1e-10)


def test_labels_and_times_step_too():
    torch.manual_seed(0)
    x, label, t = torch.randint(9, (2, 6)), torch.tensor([0, 2]), torch.rand(2, 6, 1, dtype=torch.double).cumsum(1)
    f = Model(torch.nn.Sequential(ClassEncoder(TokenEncoder(9, 6), 3, 6), Positions(6)), GRU(6, 6), Decoder(6, 4, "all")).double()
    g = Model(TimeEncoder(LinearEncoder(6, 6), 6), GRU(6, 6), Decoder(6, 4, "all")).double()
    samples, states = torch.cat([t, torch.randn(2, 6, 6, dtype=torch.double)], -1), [None, None]
    for i in range(6):
        y, states[0] = f.step((x[:, i], label), states[0])
        z, states[1] = g.step(samples[:, i], states[1])
        close(y, f((x, label))[:, i], 1e-12), close(z, g(samples)[:, i], 1e-12)


@pytest.mark.parametrize("mode, l_output", [("last", 0), ("last", None), ("all", 0), ("first", None), ("state", 0)])
def test_answers_at_each_step(mode, l_output):
    torch.manual_seed(0)
    backbone = SequenceModel(6, 1, lambda i: S4Block(6, d_state=4))
    decoder = StateDecoder(backbone, 4) if mode == "state" else Decoder(6, 4, mode, l_output)
    f, x = Model(TokenEncoder(9, 6), backbone, decoder).double().eval(), torch.randint(9, (2, 8))
    state = None
    for t in range(8):
        y, state = f.step(x[:, t], state)
        want = f(x[:, :t + 1])
        close(y, want if want.ndim == 2 else want[:, -1], 1e-10)


def test_parts_that_cannot_step_are_named():
    causal, both = (lambda i: S4Block(6, d_state=4)), (lambda i: S4Block(6, d_state=4, bidirectional=True))
    token, x = torch.zeros(2, dtype=torch.long), torch.zeros(2, 5, dtype=torch.long)
    parts = TokenEncoder(9, 6), SequenceModel(6, 1, causal), Decoder(6, 4, "all")
    centred = torch.nn.Sequential(TokenEncoder(9, 6), Conv1d(6, 6, 3))
    for i, part, name in [(0, centred, "encoder, Sequential"), (1, SequenceModel(6, 1, both), "backbone, SequenceModel"),
                          (2, Decoder(6, 4), "decoder, Decoder"), (2, Decoder(6, 4, "sum", None), "decoder, Decoder"),
                          (2, Decoder(6, 4, "first"), "decoder, Decoder"), (2, PairDecoder(6, 4), "decoder, PairDecoder"),
                          (2, NDDecoder(6, 4), "decoder, NDDecoder"), (2, torch.nn.Identity(), "decoder, Identity")]:
        f = Model(*parts[:i], part, *parts[i + 1:]).eval()
        with pytest.raises(ValueError, match=f"the {name}, cannot step: .*whole sequences"):
            f.step(token)
        if i < 2:
            with pytest.raises(ValueError, match=f"the {name}, cannot continue from a state"):
                f.advance(x)
        elif isinstance(part, Decoder):
            with pytest.raises(ValueError, match="cannot step"):
                f.step(token, f.default_state(2))


def test_names_in_checkpoints():
    "Interop and saved runs depend on them."
    f = Model(TokenEncoder(9, 6), GRU(6, 6), Decoder(6, 4))
    assert [n for n in f.state_dict() if "rnn" not in n] == ["encoder.weight", "decoder.linear.weight", "decoder.linear.bias"]
    g = Model(torch.nn.Sequential(LinearEncoder(3, 6), Positions(6, 9, "learned")), GRU(6, 6), NDDecoder(6, 4))
    assert [n for n in g.state_dict() if "rnn" not in n] == [
        "encoder.0.weight", "encoder.0.bias", "encoder.1.pe", "decoder.linear.weight", "decoder.linear.bias"]
