"""Next-step prediction: pairs, padding, codes and their inverse, tasks that can be wrapped and tasks that cannot."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from s4nb.data import DataModule, TaskCard, pad_batch
from s4nb.data.base import SPLITS, ArrayDataset
from s4nb.data.images import Images
from s4nb.data.next_step import (IGNORE, NEXT_TASKS, NextStep, NextSteps, equal_steps, equal_values, mu_expand, mu_law,
                                 next_task, pad_pairs, text_of, text_tokens)
from s4nb.data.retrieval import Retrieval
from s4nb.data.spoken import SpokenDigits
from s4nb.data.synthetic import Adding, Copying
from s4nb.data.text import Text


class Ramps(DataModule):
    "Signals of different lengths, or tokens of different lengths: example i has 3 + i steps."
    name, d_output = "ramps", 2

    def __init__(self, tokens=None, top=1.0, value=None):
        self.n_tokens, self.d_input, self.l_max, self.top, self.value = tokens, None if tokens else 1, 12, top, value

    def load(self, split):
        n, scale = (10, 1) if split == "train" else (4, 2)
        xs = [scale * self.top * torch.linspace(-1, 1, 3 + i)[:, None] for i in range(n)]
        if self.value is not None: xs = [torch.full_like(x, self.value) for x in xs]
        if self.n_tokens: xs = [torch.arange(3 + i) % self.n_tokens for i in range(n)]
        data = ArrayDataset(xs, torch.arange(n) % 2)
        data.lengths = torch.tensor([len(x) for x in xs])
        return data

    @property
    def card(self):
        blind, published = {"coin": "50 %"}, {"us": 99.0}
        return TaskCard("ramps", "up?", "made", {}, "at most 12", "a channel", "accuracy", "-", "-", blind, published)


# -- codes

def test_codes_are_those_of_torchaudio():
    functional = pytest.importorskip("torchaudio.functional")
    x = torch.rand(50_000, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for levels in (2, 3, 16, 256, 1024):
        assert mu_law(x, levels).equal(functional.mu_law_encoding(x, levels))
        codes = torch.arange(levels)
        expected = functional.mu_law_decoding(codes.double(), levels)
        assert torch.allclose(mu_expand(codes, levels).double(), expected, rtol=1e-7)


@pytest.mark.parametrize("levels", [2, 3, 17, 255, 256, 4096])
def test_every_code_survives_and_codes_are_in_order(levels):
    codes = torch.arange(levels)
    for code, value in ((mu_law, mu_expand), (equal_steps, equal_values)):
        values = value(codes, levels)
        assert code(values, levels).equal(codes) and (values.diff() > 0).all() and values[0] == -1 and values[-1] == 1
        assert torch.allclose(values, -values.flip(0), atol=1e-6)               # silence is in the middle
        assert code(torch.tensor([-3.0, 3.0]), levels).tolist() == [0, levels - 1]


def test_linear_codes_are_the_nearest():
    x = torch.rand(1000, dtype=torch.float64) * 2 - 1
    nearest = (x[:, None] - torch.linspace(-1, 1, 16, dtype=torch.float64)).abs().argmin(1)
    assert equal_steps(x, 16).equal(nearest)


# -- pairs and padding

def test_the_model_sees_the_sequence_one_step_late():
    data = NextSteps([(torch.tensor([4, 2, 9]), 0)], torch.Tensor.long, start=7)
    x, y = data[0]
    assert (x.tolist(), y.tolist()) == ([7, 4, 2], [4, 2, 9]) and x.dtype == y.dtype == torch.int64 and len(data) == 1


def test_padded_steps_do_not_count():
    torch.manual_seed(0)
    data = NextStep(Ramps(tokens=5)).prepare()
    batch = next(iter(data.loader("train", 10, shuffle=False)))
    assert batch.lengths.tolist() == list(range(3, 13)) and batch.rate == 1
    steps = torch.arange(12)[None] < batch.lengths[:, None]
    assert ((batch.y == IGNORE) == ~steps).all() and (batch.x[~steps] == 0).all()
    logits = torch.randn(10, 12, 5, dtype=torch.float64)
    rows = [(logits[i, :n], data.train[i][1]) for i, n in enumerate(batch.lengths)]
    expected = torch.cat([F.cross_entropy(row, y, reduction="none") for row, y in rows])
    assert abs(F.cross_entropy(logits.flatten(0, 1), batch.y.flatten()) - expected.mean()) < 1e-14
    metrics = pytest.importorskip("torchmetrics.classification")
    accuracy = metrics.MulticlassAccuracy(5, average="micro", ignore_index=IGNORE)
    right = sum(int((row.argmax(-1) == y).sum()) for row, y in rows)
    assert abs(accuracy(logits.flatten(0, 1), batch.y.flatten()) - right / 75) < 1e-6


def test_every_example_comes_once_with_buckets_and_workers():
    data = NextStep(Ramps(tokens=5)).prepare()
    for options in ({}, {"bucket": 2}, {"workers": 1}):
        batches = list(data.loader("train", 3, **options))
        assert sorted(int((row != IGNORE).sum()) for b in batches for row in b.y) == list(range(3, 13))
        for b in batches: assert b.lengths is None or int(b.lengths.max()) == b.x.shape[1]


def test_full_batches_have_no_lengths():
    item = (torch.arange(4), torch.arange(4))
    assert pad_pairs([item, item]).lengths is None and pad_batch([(item[0], 0)]).lengths is None


# -- wrapped tasks

def test_images_as_tokens_and_quantised_agree(tmp_path):
    tokens = NextStep(Images("digits", tokenize=True, data_dir=tmp_path))
    real = NextStep(Images("digits", data_dir=tmp_path, mean=0.3, std=0.5), levels=17, quantize="linear")
    assert (tokens.n_tokens, tokens.d_output, tokens.d_input, tokens.l_max, tokens.l_output) == (17, 17, None, 64, 64)
    assert tokens.kind == "classification" and not tokens.pairs and tokens.name == "next-digits"
    for split in SPLITS:                                                # also: loading prepares by itself
        for i in (0, 5, 99):
            assert all(a.equal(b) for a, b in zip(tokens.dataset(split)[i], real.dataset(split)[i]))
    x = real.task.test[3][0]
    assert torch.allclose(real.decode(real.encode(x)), x[:, 0], atol=1e-6) and real.span == pytest.approx((-0.6, 1.4))


def noise(folder, write):
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for digit in range(10):
        for n in range(12):
            write(folder / f"{digit}_ada_{n}.wav", (rng.normal(size=500 + 10 * n) * 3000).astype("int16"))


def test_spoken_digits_by_the_mu_law(tmp_path):
    soundfile = pytest.importorskip("soundfile")
    noise(tmp_path / "fsdd" / "recordings", lambda path, x: soundfile.write(path, x, 8000, subtype="PCM_16"))
    data = NextStep(SpokenDigits(data_dir=tmp_path / "fsdd"), quantize="mu-law", start=128).prepare()
    assert (data.n_tokens, data.d_input, data.l_max, data.span[0]) == (256, None, 8000, -data.span[1])
    peak = max(float(x.abs().max()) for x, _ in data.task.train)
    assert data.span[1] == pytest.approx(peak)
    signal = data.task.train[4][0][:, 0]
    x, y = data.train[4]
    assert x[0] == 128 and len(y) == len(signal)
    error = (data.decode(y) - signal).abs()
    assert (error <= 1.05 / 255 * math.log(256) / 255 * (peak + 255 * signal.abs()) + 1e-6).all()     # half a code
    batch = next(iter(data.loader("train", 4)))
    assert batch.x.shape == batch.y.shape and int(batch.y.max()) < 256


def folder_of_texts(root):
    for half in ("train", "test"):
        for c in ("neg", "pos"):
            (root / half / c).mkdir(parents=True)
            for n in range(12): (root / half / c / f"{n}.txt").write_text(f"né {half} {c} {n} " + "ab" * n)
    return root


def test_texts(tmp_path):
    root = folder_of_texts(tmp_path)
    for level in ("char", "byte"):
        data = NextStep(Text("text-folder", data_dir=root, min_freq=1, level=level, l_max=100))
        assert data.n_tokens is None and data.l_max == 100              # known once prepared, as of the task itself
        data.prepare()
        assert data.n_tokens == data.d_output == data.task.n_tokens
        x, y = data.test[3]
        text = data.decode(y)
        assert text.startswith("né test") and text.endswith("<eos>") and x[1:].equal(y[:-1]) and x[0] == 0
        assert data.encode(text.removesuffix("<eos>")).equal(y[:-1])
        assert data.decode(torch.stack([y, y])) == [text, text] and len(x) < 60
    assert "<unk>" in text_of(text_tokens("aЖ", {"<unk>": 0, "a": 1}), {"<unk>": 0, "a": 1})


def test_copying_and_other_token_tasks():
    data = NextStep(Copying(l_noise=5, l_memorize=3, n_tokens=8, sizes=(6, 2, 2))).prepare()
    x, y = data.val[1]
    assert y.equal(data.task.val[1][0]) and data.decode(y) is y and len(x) == data.l_output == 11
    assert data.encode(y).equal(y)


def test_span_given_or_measured():
    assert NextStep(Ramps(top=3.0), quantize="linear").prepare().span == (-3.0, 3.0)
    own = NextStep(Ramps(), levels=5, quantize="linear", span=(0, 2)).prepare()
    assert own.span == (0, 2) and own.train[0][1].tolist() == [0, 0, 2] and own.val[0][1].tolist() == [0, 0, 4]
    assert own.decode(torch.arange(5)).tolist() == [0, 0.5, 1, 1.5, 2]
    lopsided = Ramps()
    lopsided.loaded = {"train": [(torch.tensor([[-0.5], [2.0]]), 0)]}
    lopsided.prepare = lambda: lopsided
    assert NextStep(lopsided, quantize="mu-law").prepare().span == (-2.0, 2.0)
    assert NextStep(lopsided, quantize="linear").prepare().span == (-0.5, 2.0)
    wrapped = NextStep(Ramps(), quantize="linear").prepare()
    assert wrapped.val[0][1].tolist() == [0, 128, 255]                  # beyond the span of train: cut


def test_blind_guesses_by_hand():
    data = NextStep(Ramps(tokens=3)).prepare()
    targets = {s: torch.cat([y for _, y in data.dataset(s)]) for s in ("train", "val")}
    q = [(int((targets["train"] == t).sum()) + 1) / (len(targets["train"]) + 3) for t in range(3)]
    bits = -sum(math.log2(q[t]) for t in targets["val"].tolist()) / len(targets["val"])
    assert data.unigram("val") == pytest.approx(bits, abs=1e-12)
    token, share = data.majority("val")
    shares = [float((targets["val"] == t).double().mean()) for t in range(3)]
    assert share == pytest.approx(shares[token]) and share == pytest.approx(max(shares))


def test_card_says_what_changed():
    data = NextStep(Ramps(), levels=32, quantize="mu-law")
    assert data.card.baseline == {} and data.state() == data.task.state()
    card = data.prepare().card
    assert (card.name, card.vocabulary, card.published) == ("next-ramps", "32 levels, mu-law", {})
    assert "bits" in card.metric
    assert card.baseline["unigram, test"] == f"{data.unigram('test'):.3f} bits" and "coin" not in card.baseline


def test_prepared_again_reads_again():
    data = NextStep(Ramps(), quantize="linear").prepare()
    first = data.train
    data.task.top, data.task.loaded = 5.0, {}
    assert data.prepare().span == (-5.0, 5.0) and data.train is not first


@pytest.mark.parametrize("make, text", [
    (lambda: NextStep(Ramps()), "choose quantize='mu-law'"),
    (lambda: NextStep(Ramps(), quantize="mulaw"), "mu-law"),
    (lambda: NextStep(Ramps(tokens=4), quantize="linear"), "has tokens already"),
    (lambda: NextStep(Adding(), quantize="linear"), "2 real channels"),
    (lambda: NextStep(Images("cifar"), quantize="linear"), "only one can be quantised"),
    (lambda: NextStep(Retrieval("manpages")), "two sequences"),
    (lambda: NextStep(Ramps(), levels=1, quantize="linear"), "at least 2"),
    (lambda: NextStep(Ramps(), quantize="linear", start=256), "one of 0…255"),
    (lambda: NextStep(Ramps(tokens=4), start=-1), "one of 0…3"),
    (lambda: NextStep(Ramps(), quantize="linear", span=(1, 1)), "lowest, highest"),
    (lambda: NextStep(Ramps(value=2.0), quantize="linear").prepare(), "lies within"),
    (lambda: NextStep(Ramps(value=torch.nan), quantize="mu-law").prepare(), "lies within"),
    (lambda: next(iter(NextStep(Ramps(tokens=4)).loader("val", rate=2))), "no other rate"),
    (lambda: next_task("next-digit"), "next-digits"),
])
def test_what_cannot_be_wrapped_says_why(make, text):
    with pytest.raises(ValueError, match=text.replace("(", r"\(")): make()


def test_images_that_stay_images_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"examples \(8, 8, 1\)"):
        NextStep(Images("digits", sequence=False, data_dir=tmp_path), quantize="linear", span=(0, 1)).train


def test_names():
    assert {next_task(name).name for name in NEXT_TASKS} == set(NEXT_TASKS)
    assert next_task("next-spoken-digits").start == 128 and next_task("next-reviews").n_tokens is None


def test_the_real_recordings(real_data, tmp_path):
    (tmp_path / "fsdd.tar.xz").symlink_to(real_data / "fsdd.tar.xz")
    data = next_task("next-spoken-digits", tmp_path).prepare()
    assert len(data.train) == 2400 and data.span[0] == -data.span[1]
    assert 5 < data.unigram("val") < 8
    code, share = data.majority("val")
    assert abs(code - 128) <= 16 and share > 0.01                       # near silence: codes finer than a 16-bit sample
