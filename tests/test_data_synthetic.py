"""Synthetic tasks: definitions checked another way, examples that depend on nothing but their place, bad settings."""
import hashlib
import math

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from s4nb.data.synthetic import (Adding, Copying, Delay, FreshOrder, Reconstruct, Stream, band_limited, draw_copying,
                                 seeded)

SMALL = {"sizes": (24, 12, 10)}
TASKS = {"adding": lambda **k: Adding(l_max=20, **SMALL | k), "copying": lambda **k: Copying(4, 5, 9, **SMALL | k),
         "delay": lambda **k: Delay(40, 7, 3, dt=0.1, freq=1.0, **SMALL | k),
         "reconstruct": lambda **k: Reconstruct(41, 10, dt=0.1, freq=1.0, **SMALL | k)}


@pytest.fixture(params=TASKS)
def make(request):
    return TASKS[request.param]


def flat(batches):
    return [row for b in batches for row in zip(b.x.tolist(), b.y.tolist())]


# ---- definitions -----------------------------------------------------------------------------------------------------
def white(g, l, dt, freq, rms=0.5):
    "The white signal by numpy, from normals g (2 n+1): imaginary and real parts."
    n = math.ceil(l / 2)
    z = rms * np.sqrt(0.5) * (g[1] + 1j * g[0])
    z[0], z[-1] = 0, z[-1].real
    cut = np.fft.rfftfreq(2 * n, d=dt) > freq + 1e-9
    z[cut] = 0
    x = np.fft.irfft(z / np.sqrt(1 - cut.sum() / n) * np.sqrt(2 * n))
    return (x - x[0])[:l]


@pytest.mark.parametrize("l,dt,freq", [(40, .1, 1), (41, .1, 1), (4000, .00025, 1000), (4000, .001, 100), (16, 1, .5)])
def test_white_signal(l, dt, freq):
    g = torch.randn(2, math.ceil(l / 2) + 1, dtype=torch.float64, generator=seeded(l)).numpy()
    x = band_limited(seeded(l), l, dt, freq)
    assert x.shape == (l,) and x.dtype == torch.float32 and x[0] == 0
    np.testing.assert_allclose(x, white(g, l, dt, freq), atol=2e-6)     # values up to about 2, float32


def test_the_published_delay_keeps_its_highest_frequency():
    spectrum = torch.fft.rfft(band_limited(seeded(0), 4000, 0.00025, 1000).double()).abs()
    assert spectrum[1000] > 1 and spectrum[1001:].max() < 1e-2    # the rest is float32 rounding


def test_copying():
    for i in range(50):
        x, y = draw_copying(seeded(i), l_noise=6, M=4, A=7, variable=bool(i % 2))
        assert x.dtype == y.dtype == torch.int64 and x.shape == (14,) and y.shape == (4,)
        assert [t for t in x[:10].tolist() if t] == y.tolist() and set(y.tolist()) <= set(range(1, 6))
        assert x[10:].tolist() == [6] * 4
        assert i % 2 or x[4:10].eq(0).all()
    places = [draw_copying(seeded(i), 6, 4, 7, variable=True)[0][:10].nonzero().flatten().tolist() for i in range(2000)]
    counts = torch.tensor(places).flatten().bincount(minlength=10)
    assert (counts - 800).abs().max() < 5 * (2000 * 0.4 * 0.6)**0.5     # each place is taken with probability 4/10


def test_lag_mode():
    task = Copying(l_noise=30, l_memorize=8, n_tokens=12, lag=True, **SMALL)
    x, y = task.test[3]
    assert (len(x), len(y), task.l_max, task.l_output) == (30, 30, 30, 30)
    assert y.tolist() == [0] * 8 + x.tolist()[:22] and 0 < x.min() and x.max() < 11


@pytest.mark.parametrize("l", [2, 3, 20, 21])
def test_adding(l):
    places = []
    for i in range(200):
        x, y = Adding(l_max=l, sizes=(200, 1, 1)).train[i]
        assert x.shape == (l, 2) and y.shape == (1,) and x.dtype == y.dtype == torch.float32
        a, b = (k for k, mark in enumerate(x[:, 1].tolist()) if mark)
        assert a < l // 2 <= b and y == x[a, 0] + x[b, 0] and 0 <= x[:, 0].min() and x[:, 0].max() < 1
        places += [a, b]
    assert l > 3 or set(places) == set(range(l))


def test_delay_and_reconstruct():
    x, y = TASKS["delay"]().test[1]
    assert x.shape == (40, 1) and y.shape == (40, 3)
    for t in range(40):
        for i in range(3): assert y[t, i] == (x[t - 7 * (i + 1), 0] if t >= 7 * (i + 1) else 0)
    x, y = TASKS["reconstruct"]().test[1]
    assert x.shape == (41, 1) and y.tolist() == x[31:, 0].tolist()


def test_published_sizes():
    shapes = {"adding": ((1000, 2), (1,)), "copying": ((2048,), (1024,)), "delay": ((4000, 1), (4000, 1)),
              "reconstruct": ((4000, 1), (1000,))}
    sizes = {"adding": [45_000, 5_000], "copying": [10_000, 1_000], "delay": [16_384, 1_024],
             "reconstruct": [16_384, 1_024]}
    for task in (Adding(), Copying(), Delay(), Reconstruct()):
        x, y = task.train[0]
        assert (tuple(x.shape), tuple(y.shape)) == shapes[task.name] and len(x) == task.l_max
        assert [len(task.train), len(task.val)] == sizes[task.name]
        answers = len(x) if task.name == "delay" else 1024 if task.name == "copying" else None
        assert task.l_output == answers
        assert task.d_output == (64 if task.name == "copying" else y.shape[-1])


# ---- an example depends on task, seed, split and index alone ---------------------------------------------------------
def test_fixed_by_seed_split_and_index(make):
    a, b = make(), make(sizes=(7, 50, 60))
    for split in ("val", "test"):
        assert all(p[0].equal(q[0]) and p[1].equal(q[1]) for p, q in zip(a.dataset(split), b.dataset(split)))
    firsts = [make(seed=s).dataset(split)[0][0] for s in (0, 1) for split in ("train", "val", "test")]
    assert len({str(x.tolist()) for x in firsts}) == 6
    with pytest.raises(IndexError): a.test[10]
    with pytest.raises(IndexError): a.train[-1]
    for i in (torch.tensor(3), np.int64(3)): assert a.train[i][0].equal(a.train[3][0])       # as Subset may give them


@pytest.mark.parametrize("workers", [0, 2])
def test_epochs_and_workers(make, workers):
    task = make()
    loader = task.loader("train", batch_size=5, workers=workers)
    epochs = {}
    for e in (0, 1):
        loader.sampler.set_epoch(e)
        epochs[e] = flat(loader)
        first = 24 * e if task.endless else 0
        drawn = [(x.tolist(), y.tolist()) for x, y in (task.train[i] for i in range(first, first + 24))]
        assert sorted(map(str, epochs[e])) == sorted(map(str, drawn)) and epochs[e] != drawn    # all of them, shuffled
    assert (set(map(str, epochs[0])) == set(map(str, epochs[1]))) == (task.name == "adding")
    ordered = flat(task.loader("test", batch_size=4, workers=workers))
    assert ordered == [(x.tolist(), y.tolist()) for x, y in task.test]


def test_epochs_reach_workers_that_keep_running():
    task = TASKS["copying"]()
    order = FreshOrder([1] * 24, 8)
    loader = DataLoader(task.train, 8, sampler=order, collate_fn=list, num_workers=1, persistent_workers=True)
    for e in (0, 1, 5):
        order.set_epoch(e)
        seen = {str(x.tolist()) for batch in loader for x, _ in batch}
        assert seen == {str(task.train[i][0].tolist()) for i in range(24 * e, 24 * e + 24)}


@pytest.mark.filterwarnings("ignore:.*returned `None`", "ignore:.*LeafSpec")
def test_lightning_sets_the_epoch():
    lightning = pytest.importorskip("lightning")
    task, seen = TASKS["copying"](), []

    class Reads(lightning.LightningModule):
        def training_step(self, batch, i): seen.append(batch.x)
        def configure_optimizers(self): return None

    trainer = lightning.Trainer(max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False,
                                enable_progress_bar=False, enable_model_summary=False)
    trainer.fit(Reads(), task.loader("train", 24))
    sets = [{str(r) for r in x.tolist()} for x in seen]
    assert sets == [{str(task.train[i][0].tolist()) for i in range(24 * e, 24 * e + 24)} for e in (0, 1)]


def test_the_seed_is_a_hash_of_the_words():
    digest = hashlib.sha256(b"copying 0 train 5").hexdigest()
    assert seeded("copying", 0, "train", 5).initial_seed() == int(digest[:16], 16) // 2


def test_nothing_is_stored():
    stream = Stream(lambda g: torch.rand(10**6, generator=g), 10**9, ("large",))
    assert stream[10**9 - 1].shape == (10**6,) and len(stream) == 10**9


# ---- what the task says of itself ------------------------------------------------------------------------------------
def test_batches_and_cards(make):
    task = make()
    assert "baseline" not in dict(task.card.rows()) and task.state().startswith("generate")
    batch = next(iter(task.prepare().loader("val", 12)))
    assert batch.lengths is None and batch.rate == 1 and batch.x.shape[:2] == (12, task.l_max)
    assert (batch.x.dtype == torch.int64) == (task.n_tokens is not None)
    assert (batch.y.dtype == torch.int64) == (task.kind == "classification")
    if task.d_input: assert batch.x.shape[2] == task.d_input
    assert batch.y.shape[1] == task.l_output if task.l_output else batch.y.shape == (12, task.d_output)
    card = str(task.card)
    assert task.name in card and "baseline" in card and ("new in each epoch" in card) == (task.name != "adding")


def test_blind_guesses():
    adding = Adding(l_max=10, sizes=(1, 1, 20_000)).prepare()
    assert float(adding.blind["always 1, test"]) == pytest.approx(1 / 6, abs=0.007)         # 5 deviations
    copying = Copying(0, 100, 12, sizes=(1, 1, 200)).prepare()
    assert float(copying.blind["most frequent token, test"].split()[0]) == pytest.approx(10, abs=1)
    token, share = copying.majority("test")
    y = torch.stack([y for _, y in copying.test])
    assert share == (y == token).float().mean() == max((y == t).float().mean() for t in range(12))


BAD = {"sizes": (lambda: Adding(sizes=(0, 1, 1)), "the size of train is a whole number, at least 1; got 0"),
       "broken size": (lambda: Adding(sizes=(9, 9, 1.5)), "the size of test"),
       "two sizes": (lambda: Delay(sizes=(5, 5)), "train, val, test"), "seed": (lambda: Adding(seed="one"), "'one'"),
       "one step": (lambda: Adding(l_max=1), "at least 2; got 1"),
       "float": (lambda: Delay(l_seq=4e3), "l_seq is a whole number"),
       "float tokens": (lambda: Copying(n_tokens=64.0), "n_tokens is a whole number"),
       "no symbol": (lambda: Copying(n_tokens=2), "at least 3"),
       "nothing": (lambda: Copying(l_memorize=0), "at least 1"),
       "negative": (lambda: Copying(l_noise=-1), "got -1"),
       "short lag": (lambda: Copying(5, 5, lag=True), "longer than l_memorize"),
       "both modes": (lambda: Copying(50, 5, lag=True, variable=True), "variable is off"),
       "long delay": (lambda: Delay(l_lag=4000), "got 4000"), "no delay": (lambda: Delay(l_lag=0), "got 0"),
       "twice negative": (lambda: Delay(l_lag=-5, n_lag=-1), "got -5"), "no time": (lambda: Delay(dt=0), "above 0"),
       "long memory": (lambda: Reconstruct(l_mem=4001), "got 4001"),
       "too slow": (lambda: Delay(freq=0.5), "1/(l_seq·dt) = 1"),
       "too fast": (lambda: Delay(freq=2001), "1/(2·dt) = 2000"),
       "rate": (lambda: next(iter(Delay().loader("val", rate=2))), "choose")}


@pytest.mark.parametrize("case", BAD)
def test_bad_settings(case):
    call, text = BAD[case]
    with pytest.raises(ValueError) as e: call()
    assert text in str(e.value)


def test_extremes_that_are_allowed():
    assert Reconstruct(l_seq=10, l_mem=10, dt=0.1, freq=5).test[0][1].shape == (10,)  # all frequencies and samples
    assert Copying(0, 1, 3, **SMALL).test[0][0].tolist() == [1, 2]
