"""Pathfinder: the release's files in small, its faults, order and splits, what a model sees, generated copies."""
import io
import os
import shutil
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from s4nb.data import pathfinder
from s4nb.data.pathfinder import (EMPTY, EXPECTED, LEVELS, Pathfinder, check_copy, decode_copy, find_copy, list_images,
                                  pixel_facts, read_metadata, splits_of, store_images, to_steps)

HARD, INNER = LEVELS["hard"], "lra_release/lra_release"


def png(image):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "png")
    return buffer.getvalue()


def release(place, size=32, folders=("0", "2", "10"), each=4, array=False, seed=0):
    "A level's folder as released, of random pixels; metadata as text, or as an array. -> images, labels in order"
    rng, X, Y = np.random.default_rng(seed), [], []
    for k in folders:
        (place / "imgs" / k).mkdir(parents=True)
        (place / "metadata").mkdir(exist_ok=True)
        rows = []
        for i in reversed(range(each)):                                 # the order is the lines', not the names'
            X.append(rng.integers(0, 256, (size, size), dtype=np.uint8))
            Y.append(int(rng.integers(2)))
            (place / f"imgs/{k}/sample_{i}.png").write_bytes(png(X[-1]))
            rows.append(f"imgs/{k} sample_{i}.png {i} {Y[-1]} 1.0 14 4 2 0.5 1 1".split())
        path = place / f"metadata/{k}.npy"
        np.save(path, np.array(rows)) if array else path.write_text("".join(" ".join(r) + "\n" for r in rows))
    return np.stack(X), np.array(Y)


@pytest.fixture
def data(monkeypatch, tmp_path):
    monkeypatch.setenv("DATA_PATH", str(tmp_path / "data"))
    return tmp_path / "data"


def everything(task):
    "All images and labels of a prepared task, put back into the order of the files."
    order = torch.cat(splits_of(task.facts["n"], task.split)).argsort()
    x, y = zip(*(item for split in ("train", "val", "test") for item in task.dataset(split)))
    return torch.stack(x)[order], torch.stack(y)[order]


# ---- files -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("array", [False, True])
def test_the_reference_s_order_and_pixels(data, array):
    X, Y = release(data / "pathfinder/pathfinder32" / HARD, array=array)
    task = Pathfinder().prepare()
    x, y = everything(task)
    assert (y.numpy() == Y).all() and np.allclose(x[..., 0], X.reshape(12, 1024) / 255, atol=1e-7)
    assert [len(task.dataset(s)) for s in ("train", "val", "test")] == [10, 1, 1]
    assert task.facts["pixel mean"] == pytest.approx(X.mean()) and task.facts["pixel std"] == pytest.approx(X.std())
    assert task.facts["pixels > 0"] == pytest.approx((X > 0).mean())
    assert task.facts["pixels > 127"] == pytest.approx((X > 127).mean())


def test_other_files_among_the_metadata_are_left_out(data):
    place = data / "pathfinder/pathfinder32" / HARD
    _, Y = release(place)
    shutil.copy(place / "metadata/0.npy", place / "metadata/combined.npy")
    assert (list_images(place, 32)[0][:, 4] == Y).all()


class Bomb:
    def __reduce__(self): return os.mkdir, ("exploded",)


def write_bomb(path):
    np.save(path, np.array([[Bomb(), "x"]], dtype=object), allow_pickle=True)


LINE = "imgs/0 sample_0.png 0 1 1.0 14 4 2 0.5 1 1\n"
ROWS = {"too few": (LINE + "imgs/0 sample_1.png 1\n", "line 2: expected 11 fields"),
        "cut": (LINE * 2 + LINE[:-5], "line 3"),
        "first": ("imgs/0 sample_0.png 0\n" + LINE, "line 1"), "label": (LINE.replace(" 0 1 ", " 0 2 "), "line 1"),
        "outside": (LINE.replace("imgs/0", "../0"), "line 1"),
        "name": (LINE.replace("sample_0.png", "a.png"), "line 1"),
        "empty": ("", "names no image"), "binary": ("\x00\x01\x02", "line 1"), "blank": ("\n\n", "names no image")}


@pytest.mark.parametrize("case", ROWS)
def test_bad_metadata_lines(tmp_path, case):
    content, text = ROWS[case]
    path = tmp_path / "3.npy"
    path.write_text(content)
    with pytest.raises(ValueError) as e: read_metadata(path)
    assert text in str(e.value) and str(path) in str(e.value)


ARRAYS = {"pickle": (write_bomb, "was not loaded"),
          "numbers": (lambda p: np.save(p, np.zeros((2, 11))), "float64 (2, 11)"),
          "flat": (lambda p: np.save(p, np.array([LINE])), "(1,)"),
          "cut": (lambda p: p.write_bytes(b"\x93NUMPY\x01"), "not loaded")}


@pytest.mark.parametrize("case", ARRAYS)
def test_bad_metadata_arrays(tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    write, text = ARRAYS[case]
    write(tmp_path / "3.npy")
    with pytest.raises(ValueError) as e: read_metadata(tmp_path / "3.npy")
    assert text in str(e.value) and "3.npy" in str(e.value) and not (tmp_path / "exploded").exists()


FAULTS = {"empty": (lambda p: p.write_bytes(b""), "empty (0 bytes)"),
          "missing": (lambda p: p.unlink(), "2.npy names it in line 3"),
          "cut": (lambda p: p.write_bytes(p.read_bytes()[:200]), "cannot be read"),
          "other": (lambda p: p.write_bytes(png(np.zeros((64, 32), np.uint8))), "32 x 64 pixels, expected 32 x 32"),
          "text": (lambda p: p.write_text("<html>"), "unknown format")}


@pytest.mark.parametrize("case", FAULTS)
def test_bad_images(data, case):
    place, (harm, text) = data / "pathfinder/pathfinder32" / HARD, FAULTS[case]
    release(place)
    image = place / "imgs/2/sample_1.png"
    good = image.read_bytes()
    harm(image)
    with pytest.raises(ValueError) as e: Pathfinder().prepare()
    assert text in str(e.value) and str(image) in str(e.value)
    assert not list((data / "pathfinder").glob("pathfinder32-*"))      # nothing damaged is cached, nothing is left
    assert not [p for p in (data / "pathfinder").glob(".*") if p.is_dir()]
    image.unlink(missing_ok=True)
    image.write_bytes(good)
    assert Pathfinder().prepare().facts["n"] == 12


def test_listed_twice(tmp_path):
    release(tmp_path / HARD)
    with open(tmp_path / HARD / "metadata/10.npy", "a") as f: f.write(LINE.replace("0 sample_0", "2 sample_3"))
    with pytest.raises(ValueError, match="imgs/2/sample_3.png is listed 2 times"): list_images(tmp_path / HARD, 32)


def test_the_known_empty_image(data):
    level = data / "pathfinder" / EMPTY.split("/imgs")[0]
    X, Y = release(level, folders=("0", "1"), each=174)
    (data / "pathfinder" / EMPTY).write_bytes(b"")
    task = Pathfinder(level="easy").prepare()
    x, y = everything(task)
    keep = np.arange(348) != 1                                          # line 2 of folder 0 is sample 172
    assert len(y) == 347 and (y.numpy() == Y[keep]).all() and np.allclose(x[..., 0], X[keep].reshape(347, -1) / 255)
    assert "1 empty image" in task.card.variant and "published" not in dict(task.card.rows())
    (level / "imgs/1/sample_172.png").write_bytes(b"")                  # any other one is an error
    with pytest.raises(ValueError, match="imgs/1/sample_172.png is empty"): Pathfinder(level="easy").prepare()


def test_a_changed_copy_is_decoded_again(data):
    place = data / "pathfinder/pathfinder32" / HARD
    release(place)
    first = Pathfinder().prepare().cache
    assert Pathfinder().prepare().cache == first
    (place / "imgs/0/sample_0.png").write_bytes(png(np.zeros((32, 32), np.uint8)))
    again = Pathfinder().prepare()
    assert again.cache != first and (everything(again)[0][3] == 0).all()


def test_a_full_disk(tmp_path, monkeypatch):
    def full(*args): raise OSError(28, "No space left on device")
    release(tmp_path / HARD)
    monkeypatch.setattr(pathfinder.os, "pwrite", full)
    (tmp_path / "out").mkdir()
    with pytest.raises(OSError, match="No space"): decode_copy(tmp_path / "out", tmp_path / HARD, 32)


def test_a_damaged_cache(data):
    release(data / "pathfinder/pathfinder32" / HARD)
    cache = Pathfinder().prepare().cache
    content = bytearray((cache / "images.npy").read_bytes())
    content[-1] ^= 1
    (cache / "images.npy").write_bytes(content)
    with pytest.raises(ValueError, match="delete the folder"): Pathfinder().prepare()


@pytest.mark.parametrize("n,workers", [(1, 1), (256, 2), (257, 3), (1500, 2)])
def test_chunks_arrive_in_their_places(tmp_path, n, workers):
    X = torch.randint(0, 256, (n, 8, 8), dtype=torch.uint8).numpy()

    def images(start, stop):
        time.sleep(0.002 * (start % 512 == 0))                          # out of order
        return X[start:stop]

    counts = store_images(tmp_path / "x.npy", n, 8, images, "test", workers)
    assert (np.load(tmp_path / "x.npy") == X).all() and (counts == np.bincount(X.reshape(-1), minlength=256)).all()


# ---- places ----------------------------------------------------------------------------------------------------------
PLACES = ["pathfinder/pathfinder32", f"{INNER}/pathfinder32", "lra_release/pathfinder32", "pathfinder32", ""]


@pytest.mark.parametrize("place", PLACES)
def test_found_in_any_layout(data, place):
    release(data / place / HARD)
    assert find_copy(data, 32, "hard") == data / place / HARD
    assert find_copy(data, 32, "easy") is None
    assert Pathfinder().state() == f"read from {data / place / HARD}"
    assert Pathfinder(data_dir=data / place).find() == data / place / HARD
    assert place == "" or Pathfinder("pathfinder64", data_dir=data / place).find() is None


def test_the_outer_pathfinder128_is_never_read(data):
    outer, inner = data / "lra_release/pathfinder128", data / INNER / "pathfinder128"
    release(outer / HARD, 128, ("0",), 1)
    for root in (data, data / "lra_release", outer):
        with pytest.raises(ValueError, match="outer copy"): find_copy(root, 128, "hard")
    assert Pathfinder("lra-pathx").state().startswith("missing: ")
    release(inner / HARD, 128, ("0",), 1)
    for root in (data, data / "lra_release", data / INNER, inner): assert find_copy(root, 128, "hard") == inner / HARD
    (data / INNER / "listops-1000").mkdir()                             # without other parts it is still the nested one
    assert find_copy(data, 128, "hard") == inner / HARD
    shutil.move(data / INNER / "pathfinder128", data / "pathfinder/pathfinder128")
    assert find_copy(data, 128, "hard") == data / "pathfinder/pathfinder128" / HARD


def test_metadata_without_images(data):
    release(data / "pathfinder/pathfinder32" / HARD)
    shutil.rmtree(data / "pathfinder/pathfinder32" / HARD / "imgs")
    with pytest.raises(ValueError, match="without imgs"): Pathfinder().prepare()
    assert "without imgs" in Pathfinder().state()


def test_lra_s_archive(data, capsys):
    source = data.parent / "source"
    X, Y = release(source / INNER / "pathfinder128" / HARD, 128, seed=1)
    release(source / "lra_release/pathfinder128" / HARD, 128, seed=2)
    for s in ("train", "val", "test"):
        (source / "lra_release/listops-1000").mkdir(exist_ok=True)
        (source / f"lra_release/listops-1000/basic_{s}.tsv").write_text("Source\tTarget\r\n")
    data.mkdir()
    with tarfile.open(data / "lra_release.gz", "w:gz") as tar: tar.add(source / "lra_release", "lra_release")
    task = Pathfinder("lra-pathx")
    assert task.state() == f"read from {data / 'lra_release.gz'}" and not (data / "pathfinder").exists()
    x, y = everything(task.prepare())
    assert (y.numpy() == Y).all() and np.allclose(x[..., 0], X.reshape(12, -1) / 255)
    assert task.place == data / "pathfinder/pathfinder128" / HARD and not (data / "lra_release").exists()


def test_a_folder_that_cannot_be_written(data, monkeypatch, tmp_path):
    release(data / "pathfinder/pathfinder32" / HARD)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("s4nb.data.base.os.access", lambda path, mode: tmp_path / "cache" in Path(path).parents)
    assert tmp_path / "cache" in Pathfinder().prepare().cache.parents


def test_a_cache_ready_made_in_a_folder_one_only_reads(data, monkeypatch, tmp_path):
    made = Pathfinder(n=12, workers=1).prepare().cache
    shutil.rmtree(data / "pathfinder/generated-12-seed0")
    monkeypatch.setattr("s4nb.data.base.os.access", lambda path, mode: False)
    again = Pathfinder(n=12)
    assert again.state() == f"ready: {made}" and again.prepare().cache == made


def test_home_in_data_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    release(tmp_path / "mine/pathfinder32" / HARD)
    task = Pathfinder(data_dir="~/mine")
    assert task.find() == tmp_path / "mine/pathfinder32" / HARD and tmp_path / "mine" in task.prepare().cache.parents


# ---- splits and steps ------------------------------------------------------------------------------------------------
def test_the_split_vectors():
    train, val, test = splits_of(200_000, "reference")
    assert train[:5].tolist() == [37542, 143173, 127710, 58234, 152906]
    assert val[:5].tolist() == [122036, 135593, 30913, 110858, 149407]
    assert test[:5].tolist() == [143170, 45464, 153084, 73281, 46339]
    assert [len(i) for i in (train, val, test)] == [160_000, 20_000, 20_000]


def test_lra_s_split(data):
    release(data / "pathfinder/pathfinder32" / HARD)
    task = Pathfinder(split="lra").prepare()
    rows = np.load(task.cache / "labels.npy")
    for split, part in (("train", rows[:9]), ("val", rows[9:10]), ("test", rows[10:])):
        assert task.dataset(split).labels.tolist() == part.tolist()


@pytest.mark.parametrize("pool", [1, 2, 3])
def test_steps(pool):
    x = torch.randint(0, 256, (12, 18), dtype=torch.uint8)
    means = x.double().reshape(12 // pool, pool, 18 // pool, pool).mean((1, 3)).flatten()
    assert torch.allclose(to_steps(x, pool)[:, 0].double(), means / 255, atol=1e-7)
    assert torch.allclose(to_steps(x, pool, center=True)[:, 0].double(), means / 127.5 - 1, atol=1e-6)
    sums = x.long().reshape(12 // pool, pool, 18 // pool, pool).sum((1, 3)).flatten()
    assert to_steps(x, pool, tokenize=True).equal(sums // pool**2)      # rounded down, exactly


@pytest.mark.parametrize("options", [{}, {"tokenize": True}, {"center": True, "pool": 2}])
def test_batches_and_rates(data, options):
    release(data / "pathfinder/pathfinder32" / HARD)
    task = Pathfinder(**options)
    side = 32 // options.get("pool", 1)
    batch = next(iter(task.loader("train", 4, shuffle=False)))
    assert task.l_max == side**2 and batch.x.shape[:2] == (4, side**2) and batch.lengths is None and batch.rate == 1
    assert (task.n_tokens, task.d_input) == ((256, None) if "tokenize" in options else (None, 1))
    coarse = next(iter(task.loader("train", 4, shuffle=False, rate=4)))
    x = batch.x.reshape(4, side, side, -1)[:, ::4, ::4].flatten(1, 2)
    assert coarse.rate == 4 and coarse.x.equal(x[..., 0] if task.n_tokens else x) and coarse.y.equal(batch.y)
    for rate in (3, 0.5, 1.5):
        with pytest.raises(ValueError, match="divides the side"): next(iter(task.loader("train", rate=rate)))


@pytest.mark.parametrize("wrong", [{"name": "pathfinder"}, {"level": "medium"}, {"split": "random"}, {"pool": 3},
                                   {"pool": 0}, {"center": True, "tokenize": True}, {"n": 9}])
def test_bad_settings(wrong):
    with pytest.raises(ValueError) as e: Pathfinder(**wrong)
    assert str(next(iter(wrong.values()))) in str(e.value) or "center or tokenize" in str(e.value)


def test_cards(data):
    release(data / "pathfinder/pathfinder32" / HARD)
    before = Pathfinder().card
    assert before.splits == {"train": 160_000, "val": 20_000, "test": 20_000} and not before.baseline
    after = Pathfinder().prepare().card
    assert "12 images found in" in after.variant and after.splits["train"] == 10 and after.baseline
    assert "16,384" in Pathfinder("lra-pathx").card.length and Pathfinder("lra-pathx").card.published


# ---- generated -------------------------------------------------------------------------------------------------------
def test_generated(data):
    a = Pathfinder(n=24, workers=1)
    assert a.state() == "generate: about 1 s" and a.prepare().place is None and a.state() == f"ready: {a.cache}"
    raw = data / "pathfinder/generated-24-seed0/pathfinder32" / HARD
    X, Y = (np.load(a.cache / f"{name}.npy") for name in ("images", "labels"))
    found = Pathfinder(data_dir=data / "pathfinder/generated-24-seed0").prepare()      # the same files, read as a copy
    assert (np.load(found.cache / "images.npy") == X).all() and (np.load(found.cache / "labels.npy") == Y).all()
    assert (np.asarray(Image.open(raw / "imgs/0/sample_5.png")) == X[5]).all() and 0 < Y.sum() < 24
    assert "generated here" in a.card.variant and "not LRA's images" in a.card.variant
    assert "generated as in s4nb.data.contours, not LRA's" in found.card.variant
    shutil.rmtree(raw)                                                  # prepared once, it needs them no more
    assert Pathfinder(n=24).prepare().cache == a.cache
    other = Pathfinder(n=24, seed=1).prepare()
    assert (np.load(other.cache / "images.npy") != X).any() and other.cache != a.cache


def test_an_interrupted_generation_goes_on(data, monkeypatch):
    def killed(*args): raise KeyboardInterrupt
    drawn = []
    with monkeypatch.context() as m:
        m.setattr(pathfinder, "decode_copy", killed)
        with pytest.raises(KeyboardInterrupt): Pathfinder(n=12, workers=1).prepare()
    monkeypatch.setattr("s4nb.data.contour_files.write_batch", lambda *a: drawn.append(a))
    assert Pathfinder(n=12, workers=1).prepare().facts["n"] == 12 and not drawn


@pytest.mark.parametrize("seconds,text", [(0.2, "1 s"), (59, "59 s"), (60, "1 min"), (7200, "2 h")])
def test_durations(seconds, text):
    assert pathfinder.duration(seconds) == text


# ---- can it be trusted -----------------------------------------------------------------------------------------------
def test_check_copy():
    good = {"n": 10_000, "label 1": 0.5, **EXPECTED[128]}
    assert check_copy(good, 128) == [] == check_copy(good | {"pixel mean": 8.6}, 128)
    wrong = check_copy(good | {"pixel mean": 8.8, "label 1": 0.53}, 128)
    assert len(wrong) == 2 and "pixel mean 8.8, expected 7.9" in wrong[0] and "label 1 0.53" in wrong[1]
    assert pixel_facts(np.bincount([0, 0, 255, 128], minlength=256))["pixels > 127"] == 0.5
