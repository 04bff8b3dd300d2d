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

from s4nb.data import base
from s4nb.data.base import (ArrayDataset, DataModule, EpochOrder, TaskCard, TokenDataset, cache_base, cached_folder,
                            data_root, dataset_dir, encode, fingerprint, map_rows, new_rows, pad_batch, random_slices,
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
    x, _, lengths, _ = pad_batch([(torch.tensor(i), 0) for i in ids])
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


def save_array(tmp):
    with open(tmp, "wb") as f: np.save(f, np.zeros(9000))


@pytest.mark.parametrize("write", [lambda tmp: tmp.write_bytes(b"x" * 50_000), save_array,
                                   lambda tmp: torch.save(torch.zeros(9000), tmp),
                                   lambda tmp: new_rows(tmp, (9000, 8), "uint8")], ids=["bytes", "numpy", "torch", "rows"])
def test_a_write_that_the_system_refuses(tmp_path, write):
    """Each library says it in a way of its own; numpy without an errno, torch with a RuntimeError."""
    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            write_atomically(tmp_path / "big", write)
        except OSError as e:
            (tmp_path / "error").write_text(f"{e.errno} {e}")
    start(limited).join(60)
    text = (tmp_path / "error").read_text()
    assert "big could not be written" in text and "nothing half-written was kept" in text and text[0] in "123456789"
    assert [p.name for p in tmp_path.iterdir()] == ["error"]


def test_other_errors_are_passed_on_as_they_are(tmp_path):
    (tmp_path / "a.png").write_text("no picture")
    image = pytest.importorskip("PIL.Image")
    for error, text, make in ((FileNotFoundError, "raw.txt", lambda tmp: open(tmp_path.parent / "raw.txt")),
                              (OSError, "cannot identify image file", lambda tmp: image.open(tmp_path / "a.png")),
                              (RuntimeError, "shapes", lambda tmp: torch.zeros(2) @ torch.zeros(3, 4))):
        with pytest.raises(error, match=text) as e: cached_folder(tmp_path, "c", {}, make)
        assert "could not be written" not in str(e.value)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="could not be written"): write_atomically(tmp_path / "file/x", print)


def test_new_rows_have_their_space_on_the_disk(tmp_path):
    """Otherwise a disk that fills up kills the process (SIGBUS) at some later row."""
    new_rows(tmp_path / "x.npy", (1000, 1000), "uint8")
    assert (tmp_path / "x.npy").stat().st_blocks * 512 >= 1_000_000 and not map_rows(tmp_path / "x.npy").any()


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
    path = folder / "manifest.json"
    whole = path.read_text()
    for was, now in ('"n": 3', '"n": 4'), ("files", "file"), ("digest", "d"), (whole, "[]"), (whole, "null"), (whole, "{}"):
        path.write_text(whole.replace(was, now))
        with pytest.raises(ValueError, match="manifest.json: other content.* delete the folder"): verify(folder)
    path.write_text("{")
    with pytest.raises(ValueError, match="manifest.json: unreadable .* delete the folder"): verify(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(ValueError, match="manifest.json: unreadable"): verify(folder)


def test_data_root(monkeypatch, tmp_path):
    monkeypatch.setenv("DATA_PATH", str(tmp_path))
    assert data_root() == tmp_path
    monkeypatch.delenv("DATA_PATH")
    monkeypatch.chdir(tmp_path)
    assert data_root() == tmp_path / "data"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert dataset_dir("aan", "~/x") == tmp_path / "x"
    monkeypatch.setenv("DATA_PATH", "~/y")
    assert dataset_dir("aan") == tmp_path / "y/aan"


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
    assert [len(y) for _, y, _, _ in batches[0]] == [6, 6, 6, 2]
    for a, b in zip(*batches):
        assert torch.equal(a.x, b.x) and torch.equal(a.y, b.y) and a.rate == b.rate == 1
        assert (a.lengths is b.lengths is None) or torch.equal(a.lengths, b.lengths)
    for x, _, lengths, _ in batches[0]:
        for row, l in zip(x, [x.shape[1]] * len(x) if lengths is None else lengths):
            assert row[l - 1] == 2 and (row[:l - 1] == 3).all() and (row[l:] == 0).all()
    assert [b.x.shape[1] for b in batches[0]] == [7, 13, 15, 15] and batches[0][-1].lengths is None


def test_floats_are_padded_too():
    x, y, lengths, _ = pad_batch([(torch.ones(2, 3), 1), (torch.ones(4, 3), 0)])
    assert x.shape == (2, 4, 3) and x[0, 2:].abs().sum() == 0 and lengths.tolist() == [2, 4]


@pytest.mark.parametrize("rate", [1, 2, 3, 5])
def test_rate_keeps_every_rate_th_step(rate):
    xs = [torch.randn(l, 2, generator=torch.Generator().manual_seed(l)) for l in (1, 7, 10)]
    batch = pad_batch([(x, torch.tensor([0.5])) for x in xs], rate)
    assert batch.rate == rate and batch.y.shape == (3, 1)
    for x, row, l in zip(xs, batch.x, batch.lengths):
        kept = x[[t for t in range(len(x)) if t % rate == 0]]
        assert int(l) == len(kept) and torch.equal(row[:l], kept) and row[l:].abs().sum() == 0


@pytest.mark.parametrize("x, rate", [(torch.ones(4, 1), 1.5), (torch.ones(4, 1), 0), (torch.ones(4).long(), 2)],
                         ids=["1.5", "0", "tokens"])
def test_a_rate_that_is_none(x, rate):
    with pytest.raises(ValueError, match=f"rate={rate} "): pad_batch([(x, 0)], rate)


def test_more_than_256_kinds_of_tokens():
    data = TokenDataset(torch.tensor([300, 7, 65000]), torch.tensor([2, 1]), torch.tensor([0, 1]), l_max=9, eos=2)
    assert [x.tolist() for x, _ in data] == [[300, 7, 2], [65000, 2]]


@pytest.mark.parametrize("sizes", [(45_000, 5_000), (160_000, 20_000, 20_000), (54_000, 6_000)], ids=str)
def test_splits_are_those_of_random_split(sizes):
    """First indices of the reference's splits of CIFAR, Pathfinder and MNIST (its seed 42)."""
    starts = {50_000: ([37542, 44491, 216, 43688, 41558], [17408, 40845, 3378, 22188, 44921]),
              60_000: ([37542, 43087, 2992, 25810, 39634], [33841, 37977, 40521, 16882, 50296]),
              200_000: ([37542, 143173, 127710, 58234, 152906], [122036, 135593, 30913, 110858, 149407],
                        [143170, 45464, 153084, 73281, 46339])}[sum(sizes)]
    slices = random_slices(sizes)
    assert [s[:5].tolist() for s in slices] == [list(s) for s in starts] and [len(s) for s in slices] == list(sizes)


def test_a_folder_one_cannot_write_to(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own"))
    assert cache_base(tmp_path / "data" / "aan") == tmp_path / "data" / "aan"
    (tmp_path / "file").write_text("")
    assert cache_base(tmp_path / "file" / "aan") == tmp_path / "own/s4nb/aan"


def test_a_cache_made_where_others_only_read_is_used(monkeypatch, tmp_path):
    shared, own, make = tmp_path / "shared", tmp_path / "own", lambda tmp: {"n": (tmp / "x").write_text("abc")}
    ready, _ = cached_folder(shared, "c", {"a": 1}, make)
    assert ready.parent == shared
    monkeypatch.setenv("XDG_CACHE_HOME", str(own))
    monkeypatch.setattr(base.os, "access", lambda *_: False)                # root may write anywhere
    before = sorted(shared.rglob("*"))
    assert cached_folder(shared, "c", {"a": 1}, None)[0] == ready
    assert cached_folder(shared, "c", {"a": 2}, make)[0].parent == own / "s4nb/shared"
    assert cached_folder(shared, "c", {"a": 2}, None)[0].parent == own / "s4nb/shared"
    assert sorted(shared.rglob("*")) == before


def test_a_lock_where_nobody_writes(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(OSError, match="one cannot write to .* choose another folder"):
        cached_folder(tmp_path / "file" / "x", "c", {}, lambda tmp: None)


def test_fingerprint_changes_with_names_sizes_and_times(tmp_path):
    (tmp_path / "b").mkdir()
    paths = [tmp_path / "a.png", tmp_path / "b/c.png"]
    for p in paths: p.write_text("12")
    seen = [fingerprint(paths, tmp_path), fingerprint(paths[:1], tmp_path)]
    assert fingerprint(paths[::-1], tmp_path) == seen[0]
    os.utime(paths[0], (1, 1))
    seen.append(fingerprint(paths, tmp_path))
    paths[0].write_text("123")
    os.utime(paths[0], (1, 1))
    seen.append(fingerprint(paths, tmp_path))
    assert len(set(seen)) == 4


def test_a_large_file_is_hashed_again_only_when_it_was_touched(monkeypatch, tmp_path):
    monkeypatch.setattr(base, "LARGE", 1000)
    folder, _ = cached_folder(tmp_path, "c", {}, lambda tmp: (tmp / "x").write_bytes(bytes(2000)) and None)
    hashed, real = [], base.file_sha256
    monkeypatch.setattr(base, "file_sha256", lambda path: hashed.append(path.name) or real(path))
    verify(folder)
    assert hashed == []
    (folder / "x").write_bytes(bytes(1999) + b"1")
    with pytest.raises(ValueError, match="other content"): verify(folder)
    (folder / "x").write_bytes(bytes(2000))                                 # touched, but whole
    verify(folder)
    assert hashed == ["x", "x"]


def test_mapped_rows_are_read_and_never_written(tmp_path):
    rows = new_rows(tmp_path / "x.npy", (5, 2), "uint8")
    rows[:] = np.arange(10).reshape(5, 2)
    rows.flush()
    data = ArrayDataset(map_rows(tmp_path / "x.npy"), range(5), torch.tensor([4, 2]), lambda x: x.float()[:, None])
    assert [(x.tolist(), int(y)) for x, y in data] == [([[8.0], [9.0]], 4), ([[4.0], [5.0]], 2)]
    data.x[2] = 0
    assert map_rows(tmp_path / "x.npy")[2].tolist() == [4, 5] and data.labels.tolist() == [4, 2]


def test_a_module_without_load_says_so():
    with pytest.raises(NotImplementedError, match="DataModule must define load"): DataModule().train
    assert "train 20" in Toy.card._repr_markdown_()


def test_data_imports_no_model():
    for path in (ROOT / "s4nb/data").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ImportFrom) or not (node.level or node.module.startswith("s4nb")): continue
            assert node.level == 1 or node.module.startswith("s4nb.data"), f"{path.name} imports {node.module}"
