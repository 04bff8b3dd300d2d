"""Generation: choosing tokens, steps against the convolution, loops with and without a state, refusals, wav files."""

import errno
import math
import pathlib
import wave

import pytest
import torch
from torch import nn

from s4nb.data.next_step import mu_expand
from s4nb.data.synthetic import seeded
from s4nb.models import (GRU, Decoder, LinearEncoder, Model, MultiHeadAttention, Positions, SaShiMi, SequenceModel,
                         StateDecoder, TokenEncoder)
from s4nb.s4.block import S4D, S4Block
from s4nb.ssm.lssl import LSSL
from s4nb.training.generation import check_steps, choose, evaluating, forecast, generate, nucleus, save_wav

LAYERS = {"S4": lambda d: S4Block(d, d_state=4), "S4D": lambda d: S4D(d, d_state=4),
          "LSSL": lambda d: LSSL(d, d_state=4), "GRU": lambda d: GRU(d, d),
          "attention": lambda d: MultiHeadAttention(d, 2)}


def model_of(name="S4D", d=8, tokens=5):
    torch.manual_seed(0)
    encoder = TokenEncoder(tokens, d)
    if name == "attention": encoder = nn.Sequential(encoder, Positions(d))
    backbone = SaShiMi(d, n_layers=1) if name == "SaShiMi" else SequenceModel(d, 2, lambda i: LAYERS[name](d))
    return Model(encoder, backbone, Decoder(d, tokens, "all"))


def one_layer(layer=S4D, decoder=("all",), **options):
    "A model of one layer of 8 features, 5 tokens."
    return Model(TokenEncoder(5, 8), SequenceModel(8, 1, lambda i: layer(8, **options)), Decoder(8, 5, *decoder))


def both_ways(): return one_layer(bidirectional=True)


class Forgetful(S4D):
    "Its step says a little too much."
    def step(self, u, state):
        y, state = super().step(u, state)
        return 1.01 * y, state


# -- choosing

def nucleus_loop(logits, top_p):
    p = logits.double().softmax(-1).tolist()
    kept, total = set(), 0.0
    for i in sorted(range(len(p)), key=lambda i: (-p[i], i)):
        kept.add(i)
        total += p[i]
        if total >= top_p: break
    return kept


def test_nucleus_is_the_loop():
    generator = torch.Generator().manual_seed(0)
    for size in (1, 2, 3, 17, 256):
        rows = torch.randn(20, size, dtype=torch.float64, generator=generator) * 4
        rows[3] = 0                                                     # all alike
        for top_p in (1e-6, 0.25, 0.5, 0.9, 0.99):
            for row, cut in zip(rows, nucleus(rows, top_p)):
                kept = set(cut.isfinite().nonzero().flatten().tolist())
                if row.any(): assert kept == nucleus_loop(row, top_p)
                else: assert kept == set(range(len(kept))) and abs(len(kept) - math.ceil(top_p * size)) <= 1
                assert cut[sorted(kept)].equal(row[sorted(kept)])
        assert nucleus(rows, 1) is rows
    for wrong in (0, -0.1, 1.01, math.nan):
        with pytest.raises(ValueError, match="top_p"): nucleus(rows, wrong)


def test_choices_divide_the_unit_interval_as_the_probabilities():
    logits, N = torch.tensor([0.3, -torch.inf, 2.0, -1.0, 0.0, -torch.inf]), 100_000
    u = (torch.arange(N, dtype=torch.float64) + 1) / N
    for T, top_p in ((1, 1), (0.3, 1), (3, 1), (1, 0.7), (2, 0.5)):
        scaled = logits.double() / T
        p = torch.zeros(6, dtype=torch.float64)
        kept = sorted(nucleus_loop(scaled, top_p))
        p[kept] = scaled.exp()[kept] / scaled.exp()[kept].sum()
        share = choose(logits.expand(N, 6), u, T, top_p).bincount(minlength=6) / N
        assert (share - p).abs().max() <= 1.01 / N and (share[p == 0] == 0).all()
    assert choose(logits.expand(2, 6), u[[0, -1]], temperature=0).tolist() == [2, 2]
    with pytest.raises(ValueError, match="temperature=-0.5"): choose(logits[None], u[:1], -0.5)


# -- the check

@pytest.mark.parametrize("name", [*LAYERS, "SaShiMi"])
def test_steps_are_forward_also_after_training(name):
    model, x = model_of(name), torch.randint(0, 5, (2, 70))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x)[:, :-1].flatten(0, 1), x[:, 1:].flatten()).backward()
        optimizer.step()
    assert check_steps(model, x) < 1e-4 and check_steps(model.double(), x) < 1e-11


def test_long_float32_steps():
    assert check_steps(model_of("S4"), torch.randint(0, 5, (1, 2000))) < 1e-4


def test_a_wrong_step_is_refused_with_its_figure():
    torch.manual_seed(0)
    model, x = one_layer(Forgetful), torch.zeros(1, 9).long()
    with evaluating(model):
        whole, state = model(x), None
        ys = []
        for i in range(9):
            y, state = model.step(x[:, i], state)
            ys.append(y)
        error = float((torch.stack(ys, 1) - whole).abs().max() / whole.abs().max())
    for call in (lambda: check_steps(model, x), lambda: check_steps(model, x, tol=error / 2)):
        with pytest.raises(ValueError, match=f"{error:.1e}"): call()
    assert check_steps(model, x, tol=1.1 * error) == pytest.approx(error)
    with pytest.raises(ValueError, match="other outputs than forward"): generate(model, x[0, :3], 4)
    assert generate(model, x[0, :3], 4, check=False).shape == (1, 4)


def test_numbers_that_are_none_are_refused():
    model = model_of()
    model.decoder.linear.bias.data[2] = torch.nan
    with pytest.raises(ValueError, match="nan"): generate(model, steps=3)
    with pytest.raises(ValueError, match="not finite"): generate(model, steps=3, check=False)


@pytest.mark.parametrize("call, text", [
    (lambda: generate(both_ways(), steps=3), "bidirectional layer needs the future"),
    (lambda: check_steps(both_ways(), torch.zeros(1, 3).long()), "cannot generate"),
    (lambda: forecast(both_ways(), torch.zeros(1, 3, 1), 3), "cannot generate"),
    (lambda: generate(one_layer(decoder=("pool",)), steps=3), "pool"),
    (lambda: generate(one_layer(decoder=("last", 7))), "7 times"),
    (lambda: generate(model_of(), [1, 9]), "token 9"), (lambda: generate(model_of(), start=-1), "token -1"),
    (lambda: generate(model_of(), [0.5]), "whole numbers"), (lambda: generate(model_of(), [[[1]]]), r"\(1, 1, 1\)"),
    (lambda: generate(model_of(), [[1], [2]], n=3), "2 prompts for n=3"),
    (lambda: generate(model_of(), steps=0), "steps=0"), (lambda: generate(model_of(), n=0), "n=0"),
    (lambda: generate(model_of(), top_p=2), "top_p=2"), (lambda: generate(model_of(), temperature=-1), "temperature"),
])
def test_refusals(call, text):
    with pytest.raises(ValueError, match=text): call()


def test_refused_before_anything_is_computed():
    model = both_ways()
    model.forward = model.advance = model.step = lambda *a, **k: pytest.fail("computed")
    with pytest.raises(ValueError, match="cannot generate"): generate(model, torch.zeros(10_000).long(), 10)


def test_a_decoder_that_answers_once_is_refused_even_unchecked():
    backbone = SequenceModel(8, 1, lambda i: S4D(8))
    model = Model(TokenEncoder(5, 8), backbone, StateDecoder(backbone, 5))
    for check in (True, False):
        with pytest.raises(ValueError, match="answer at every step"): generate(model, [1, 2], 3, check=check)


# -- the loop

def literally(model, x, steps, seed, T, top_p, rate):
    "Without any state: all of x (n l) convolved again for every token."
    numbers = [1 - torch.rand(steps, dtype=torch.float64, generator=seeded("generate", seed, i)) for i in range(len(x))]
    with evaluating(model):
        for i in range(steps):
            logits = model(x, rate=rate)[:, -1]
            x = torch.cat([x, choose(logits, torch.stack([u[i] for u in numbers]), T, top_p)[:, None]], 1)
    return x[:, -steps:]


@pytest.mark.parametrize("name", [*LAYERS, "SaShiMi"])
def test_the_loop_gives_what_convolving_everything_gives(name):
    model = model_of(name).double()
    other_rate = ((1.0, 1.0, 0.5),) * (name in ("S4", "S4D", "LSSL"))
    for T, top_p, rate in ((1.0, 1.0, 1), (0.7, 0.8, 1), (0.0, 1.0, 1)) + other_rate:
        expected = literally(model, torch.tensor([[3, 2, 2], [3, 1, 4]]), 25, 7, T, top_p, rate)
        got = generate(model, [[2, 2], [1, 4]], 25, temperature=T, top_p=top_p, seed=7, rate=rate, start=3)
        assert got.equal(expected) and got.dtype == torch.int64


def test_sequences_depend_on_seed_and_number_alone():
    model, state = model_of(), torch.get_rng_state()
    five = generate(model, steps=30, n=5)
    assert torch.get_rng_state().equal(state)                           # the caller's random numbers are left alone
    assert generate(model, steps=12, n=2).equal(five[:2, :12]) and generate(model, steps=30).equal(five[:1])
    assert len(generate(model, steps=30, n=5, seed=1).unique(dim=0)) == 5 == len(five.unique(dim=0))
    assert not any(a.equal(b) for a in five for b in generate(model, steps=30, n=5, seed=1))
    assert generate(model, [], 30).equal(five[:1]) and generate(model, [4], 9, n=2).shape == (2, 9)


def test_going_on_is_going_through():
    model = model_of().double()
    first = generate(model, [1, 2], 20, temperature=0)
    more = generate(model, torch.cat([torch.tensor([[1, 2]]), first], 1), 15, temperature=0)
    assert torch.cat([first, more], 1).equal(generate(model, [1, 2], 35, temperature=0))


def test_the_model_is_left_as_it_was():
    model = model_of()
    model.train()
    model.decoder.eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    tokens = generate(model, steps=5)
    assert model.training and model.backbone.training and not model.decoder.training and torch.is_grad_enabled()
    assert all(v.equal(before[k]) for k, v in model.state_dict().items()) and not tokens.requires_grad
    model.step = None
    with pytest.raises(TypeError): generate(model, steps=5)
    assert model.training and torch.is_grad_enabled()                   # after an error too


def test_states_do_not_grow():
    def numbers(state): return state.numel() if torch.is_tensor(state) else sum(map(numbers, state or ()))
    for name in ("S4", "S4D", "LSSL", "GRU", "SaShiMi"):
        model = model_of(name)
        with evaluating(model): few, many = (numbers(model.advance(torch.zeros(1, l).long())[1]) for l in (3, 600))
        assert few == many > 0


def test_forecast_feeds_answers_back():
    torch.manual_seed(0)
    model = Model(LinearEncoder(2, 8), SequenceModel(8, 2, lambda i: S4D(8)), Decoder(8, 2, "all")).double()
    x = torch.randn(3, 20, 2, dtype=torch.float64)
    for rate in (1.0, 2.0):
        whole = x
        with evaluating(model):
            for _ in range(15): whole = torch.cat([whole, model(whole, rate=rate)[:, -1:]], 1)
        assert torch.allclose(forecast(model, x, 15, rate=rate), whole[:, 20:], rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match="1 values with 2"):
        forecast(Model(LinearEncoder(1, 8), model.backbone, Decoder(8, 2, "all")).double(), x[..., :1], 3)


# -- sound

def read(path):
    with wave.open(str(path)) as f:
        assert (f.getnchannels(), f.getsampwidth()) == (1, 2)
        data = torch.frombuffer(bytearray(f.readframes(f.getnframes())), dtype=torch.int16)
        return f.getframerate(), data.double() / 32767


def test_wav_files(tmp_path):
    pytest.importorskip("soundfile")
    x = torch.linspace(-1, 1, 1001)
    assert save_wav(tmp_path / "a" / "x.wav", x, 16_000) == tmp_path / "a" / "x.wav"
    rate, got = read(tmp_path / "a" / "x.wav")
    assert rate == 16_000 and (got - x).abs().max() < 0.51 / 32767
    for levels in (256, 16):
        save_wav(tmp_path / "t.wav", torch.arange(levels), 8000, levels=levels)
        assert (read(tmp_path / "t.wav")[1] - mu_expand(torch.arange(levels), levels)).abs().max() < 0.51 / 32767


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    pytest.importorskip("soundfile")
    path = save_wav(tmp_path / "x.wav", torch.zeros(10), 8000)
    old = path.read_bytes()

    def full(self, data):
        with open(self, "wb") as f: f.write(data[:5])
        raise OSError(errno.ENOSPC, "No space left on device", str(self))

    monkeypatch.setattr(pathlib.Path, "write_bytes", full)
    with pytest.raises(OSError, match="Make room"): save_wav(path, torch.ones(10), 8000)
    assert path.read_bytes() == old and [p.name for p in tmp_path.iterdir()] == ["x.wav"]


@pytest.mark.parametrize("sound, text", [
    (torch.tensor([0.0, 1.5]), "largest is 1.5"), (torch.tensor([0.0, torch.nan]), "nan"), (torch.zeros(0), r"\(0,\)"),
    (torch.zeros(2, 5), r"\(2, 5\)"), (torch.tensor([256]), "0…255"), (torch.tensor([-1]), "0…255")])
def test_sounds_that_are_none(sound, text, tmp_path):
    with pytest.raises(ValueError, match=text): save_wav(tmp_path / "x.wav", sound, 8000)
    assert not list(tmp_path.iterdir())
