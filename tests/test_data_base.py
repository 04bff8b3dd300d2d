"""The base of the data: caches under kill, full disks and rivals; vocabulary and padding against the reference."""

import ast
import json
import multiprocessing
import os
import resource
import signal
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from s4nb.data.base import (DataModule, EpochOrder, TaskCard, TokenDataset, cached_folder, data_root, encode, pad_batch,
                            verify, vocabulary, write_atomically)

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("min_freq", [1, 2, 3])
def test_vocabulary_and_padding_match_the_reference(vectors, min_freq):
    arrays = np.load(vectors / "f_data.npz")
    facts, text = (json.loads((vectors / f).read_text()) for f in ("f_data.json", "f_data_text.json"))
    case = f"imdb_minfreq{min_freq}"
    strings = facts["cases"][case]["params"]["strings"]
    vocab = vocabulary(Counter("".join(strings)), min_freq=min_freq)
    assert vocab == text[f"imdb_vocab_minfreq{min_freq}"]
    ids = [encode(s, vocab) for s in strings]
    assert [list(arrays[f"{case}/ids_{i}"]) for i in (0, 1)] == ids
    assert list(arrays[f"{case}/ids_lmax10_0"]) == encode(strings[0], vocab, l_max=10)
    x, _, lengths = pad_batch([(torch.tensor(i), 0) for i in ids])
    assert np.array_equal(x, arrays[f"{case}/padded"]) and np.array_equal(lengths, arrays[f"{case}/lengths"])


def test_bos_takes_a_place_of_its_own():
    vocab = vocabulary(Counter("aab"), specials=("<pad>", "<unk>", "<bos>", "<eos>"))
    assert encode("abb", vocab) == [2, 4, 5, 5, 3] and encode("abb", vocab, l_max=4) == [2, 4, 5, 3]


def start(target, *args):
    """A real process of its own (forked: it need not import anything)."""
    process = multiprocessing.get_context("fork").Process(target=target, args=args)
    process.start()
    return process


def slow(base, seconds):
    def make(tmp):
        with open(base / "makers", "a") as f: f.write(f"{os.getpid()}\n")
        (tmp / "data").write_text("half")
        time.sleep(seconds)
        (tmp / "data").write_text("whole")
    folder, _ = cached_folder(base, "cache", {"a": 1}, make)
    (base / f"read by {os.getpid()}").write_text((folder / "data").read_text())


def wait_for(path, seconds=60):
    until = time.monotonic() + seconds
    while not path.exists() and time.monotonic() < until: time.sleep(0.02)
    assert path.exists()


def test_kill_in_the_middle_of_making_leaves_nothing_that_is_read(tmp_path):
    first = start(slow, tmp_path, 600)
    wait_for(tmp_path / "makers")
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    assert any(p.suffix == ".tmp" for p in tmp_path.iterdir())              # half a folder, under a name nobody reads
    made = []
    folder, _ = cached_folder(tmp_path, "cache", {"a": 1}, lambda tmp: made.append((tmp / "data").write_text("new")))
    assert (folder / "data").read_text() == "new" and made
    assert not any(p.suffix == ".tmp" for p in tmp_path.iterdir())          # swept away


def test_rival_processes_make_a_cache_once(tmp_path):
    rivals = [start(slow, tmp_path, 0.5) for _ in range(3)]
    for p in rivals: p.join(60)
    assert [p.read_text() for p in tmp_path.glob("read by *")] == ["whole"] * 3
    assert len((tmp_path / "makers").read_text().split()) == 1


def test_a_write_that_the_system_refuses(tmp_path):
    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            write_atomically(tmp_path / "big", lambda tmp: tmp.write_bytes(b"x" * 5000))
        except OSError as e:
            (tmp_path / "error").write_text(str(e))
    start(limited).join(60)
    text = (tmp_path / "error").read_text()
    assert "big could not be written" in text and "nothing half-written was kept" in text
    assert [p.name for p in tmp_path.iterdir()] == ["error"]


def test_keyboard_interrupt_is_passed_on_and_cleaned(tmp_path):
    def interrupted(tmp):
        tmp.mkdir()
        (tmp / "part").write_text("x")
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): write_atomically(tmp_path / "f", interrupted)
    assert not list(tmp_path.iterdir())


def test_manifest_damaged_or_missing(tmp_path):
    folder, manifest = cached_folder(tmp_path, "c", {"a": [1, 2]}, lambda tmp: {"n": (tmp / "x").write_text("abc")})
    assert manifest["facts"] == {"n": 3} and manifest["settings"] == {"a": [1, 2]} and verify(folder) == manifest
    (folder / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="manifest.json: unreadable .* delete the folder"): verify(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(ValueError, match="manifest.json: unreadable"): verify(folder)


def test_data_root(monkeypatch, tmp_path):
    monkeypatch.setenv("DATA_PATH", str(tmp_path))
    assert data_root() == tmp_path
    monkeypatch.delenv("DATA_PATH")
    monkeypatch.chdir(tmp_path)
    assert data_root() == tmp_path / "data"


@pytest.mark.parametrize("n, size, bucket", [(1, 4, 3), (7, 8, 5), (64, 8, 4), (103, 10, 3), (103, 10, 100)])
def test_order_is_a_permutation_set_by_seed_and_epoch(n, size, bucket):
    lengths = torch.randint(1, 50, (n,), generator=torch.Generator().manual_seed(0)).tolist()
    orders = set()
    for seed in range(2):
        for epoch in range(2):
            order = EpochOrder(lengths, size, seed=seed, bucket=bucket)
            order.set_epoch(epoch)
            assert sorted(order) == list(range(n)) and list(order) == list(order)
            orders.add(tuple(order))
    assert len(orders) == (4 if n > 7 else len(orders))


class Toy(DataModule):
    card = TaskCard("toy", "w", "v", {"train": 20}, "1", "v", "m", "l", "s")

    def load(self, split):
        n = torch.arange(1, 21)
        return TokenDataset(torch.full((int(n.sum()),), 3), n, n % 2, l_max=15, eos=2)


def test_loader_gives_every_example_in_any_number_of_workers():
    batches = [list(Toy().loader("val", batch_size=6, workers=w)) for w in (0, 1)]
    assert [len(y) for _, y, _ in batches[0]] == [6, 6, 6, 2]
    for a, b in zip(*batches): assert all(torch.equal(p, q) for p, q in zip(a, b))
    for x, _, lengths in batches[0]:
        for row, l in zip(x, lengths): assert row[l - 1] == 2 and (row[:l - 1] == 3).all() and (row[l:] == 0).all()
    assert max(int(lengths.max()) for _, _, lengths in batches[0]) == 15


def test_floats_are_padded_too():
    x, y, lengths = pad_batch([(torch.ones(2, 3), 1), (torch.ones(4, 3), 0)])
    assert x.shape == (2, 4, 3) and x[0, 2:].abs().sum() == 0 and lengths.tolist() == [2, 4]


def test_a_module_without_load_says_so():
    with pytest.raises(NotImplementedError, match="DataModule must define load"): DataModule().train
    assert "train 20" in Toy.card._repr_markdown_()


def test_data_imports_no_model():
    for path in (ROOT / "s4nb/data").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ImportFrom) or not (node.level or node.module.startswith("s4nb")): continue
            assert node.level == 1 or node.module.startswith("s4nb.data"), f"{path.name} imports {node.module}"
