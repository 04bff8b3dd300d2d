"""Images: the reference's numbers; CIFAR batches, idx files, folders and archives in their true forms; every fault."""

import gzip
import io
import json
import os
import pickle
import random
import shutil
import struct
import tarfile
from dataclasses import replace
from functools import partial
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image

from s4nb.data import images
from s4nb.data.image_files import (CIFAR_BATCHES, CIFAR_CLASSES, IDX_FILES, cifar_batches, decode_image, idx_blocks,
                                   idx_images, image_folder, load_batch, luma, members, source_files, store)
from s4nb.data.images import (COLLECTIONS, IMAGE_TASKS, ORDERS, Images, Pixels, bit_reversal, coarser, crop_and_flip,
                              hilbert, pixel_order, snake)

ROWS = 20                                               # images in a small batch of CIFAR-10


@pytest.fixture(autouse=True)
def data_path(monkeypatch, tmp_path):
    monkeypatch.setenv("DATA_PATH", str(tmp_path / "data"))
    return tmp_path / "data"


@pytest.fixture
def small(monkeypatch):
    "The collections as small as the archives made here."
    for name, (train, test) in {"cifar": (5 * ROWS, ROWS), "mnist": (50, 30), "fashion-mnist": (50, 30)}.items():
        monkeypatch.setitem(COLLECTIONS, name, replace(COLLECTIONS[name], count={"train": train, "test": test}))
    monkeypatch.setattr(images, "cifar_batches", partial(cifar_batches, rows=ROWS))


@pytest.fixture(scope="module")
def numbers(vectors):
    arrays = np.load(vectors / "f_data.npz")
    return {k: arrays[k] for k in arrays.files if k.startswith(("permutations/", "cifar_"))}


def compress(x, kind="png"):
    out = io.BytesIO()
    Image.fromarray(x).save(out, kind)
    return out.getvalue()


def pictures(n, shape=(32, 32, 3), seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), dtype=np.uint8)


def tar(path, files, mode="w:gz"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def unpack(folder, files):
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def cifar_files(n=ROWS, top="cifar-10-batches-py/"):
    "({path: bytes}, images (6n 32 32 3), labels (6n)); the batches' order is train 1…5, test."
    x, y, files = pictures(6 * n), np.random.default_rng(1).integers(0, 10, 6 * n), {}
    for k, name in enumerate(CIFAR_BATCHES):
        rows = slice(k * n, (k + 1) * n)
        batch = {b"batch_label": name.encode(), b"labels": y[rows].tolist(),
                 b"data": x[rows].transpose(0, 3, 1, 2).reshape(n, 3072)}
        files[top + name] = pickle.dumps(batch, 2)
    return files | {f"{top}batches.meta": pickle.dumps({b"label_names": list(CIFAR_CLASSES)}, 2)}, x, y


def jpeg_files(train=5 * ROWS // 10, test=ROWS // 10, kind="jpg"):
    "A small copy of CIFAR-10 as image files."
    return {f"{split}/{name}/{i:04}.{kind}": compress(pictures(1, seed=7 * i + k)[0], "jpeg" if kind == "jpg" else kind)
            for split, n in {"train": train, "test": test}.items()
            for k, name in enumerate(CIFAR_CLASSES) for i in range(n)}


def idx(x, dims):
    return struct.pack(f">BBBB{dims}I", 0, 0, 8, dims, *x.shape) + x.astype(np.uint8).tobytes()


def idx_set(packed=True, train=50, test=30):
    "{file name: bytes}, images of train, labels of train."
    x, y = pictures(train + test, (28, 28)), np.arange(train + test) % 10
    parts = (x[:train], y[:train], x[train:], y[train:])
    files = {name: idx(part, part.ndim) for name, part in zip(IDX_FILES, parts)}
    return {f"{n}.gz" * packed or n: gzip.compress(d) if packed else d for n, d in files.items()}, parts[0], parts[1]


def prepared(task):
    "What lies in the caches below a task's folder: nothing damaged may."
    base = task.home()[0]
    there = base.iterdir() if base.exists() else ()
    return [p.name for p in there if (p / "manifest.json").exists() or p.name.endswith(".tmp")]


# ---- parity

def test_permutations_of_the_reference(numbers):
    for n in (16, 784, 1024): assert bit_reversal(n).tolist() == numbers[f"permutations/bitrev_{n}"].tolist()
    for n in (4, 32):
        assert snake(n, n).tolist() == numbers[f"permutations/snake_{n}"].tolist()
        assert hilbert(n).tolist() == numbers[f"permutations/hilbert_{n}"].tolist()
        assert pixel_order("transpose", n, n).tolist() == numbers[f"permutations/transpose_{n}"].tolist()


def test_grey_and_colour_of_the_reference(numbers):
    task, image = Images("lra-cifar"), numbers["cifar_gray/image"]
    grey = decode_image(compress(image), "x.png", "L")
    assert np.array_equal(grey, numbers["cifar_gray/gray"]) and np.array_equal(grey, luma(image))
    constants = lambda name: [torch.tensor(getattr(IMAGE_TASKS[name], key)) for key in ("mean", "std")]
    x = Pixels(task.order, 255, *constants("lra-cifar"))(torch.from_numpy(luma(image)))
    assert np.array_equal(x, numbers["cifar_gray/x"])                               # to the last bit
    assert x.equal(Pixels(slice(None), 255, *constants("lra-cifar"))(torch.from_numpy(luma(image))))
    tokens = Pixels(task.order, tokens=True)(torch.from_numpy(luma(image)))
    assert np.array_equal(tokens, numbers["cifar_gray/tokens"]) and tokens.dtype == torch.int64
    image = torch.from_numpy(numbers["cifar_rgb/image"].copy())
    colour = Pixels(Images("cifar").order, 255, *constants("cifar"))(image)
    assert np.array_equal(colour, numbers["cifar_rgb/x"])


def test_splits_of_the_reference():
    train, val = (images.rows_of(split, {"train": 60_000, "test": 10_000})[1] for split in ("train", "val"))
    assert train[:5].tolist() == [37542, 43087, 2992, 25810, 39634] and len(train) == 54_000
    assert val[:5].tolist() == [33841, 37977, 40521, 16882, 50296] and len(val) == 6_000
    assert images.rows_of("test", {"train": 60_000, "test": 10_000}) == ("test", None)
    assert images.rows_of("train", {"train": 6, "val": 3, "test": 3}) == ("train", None)


def test_every_order_is_a_permutation():
    for name in ORDERS:
        for h, w in ((8, 8), (6, 10)):
            if name == "hilbert" and h != w: continue
            assert sorted(pixel_order(name, h, w).tolist()) == list(range(h * w))
    assert pixel_order("random", 28, 28)[:4].tolist() == [319, 576, 323, 107]


# ---- CIFAR-10

@pytest.mark.parametrize("form", ["archive", "folder", "beside"])
def test_official_batches(small, data_path, form):
    files, x, y = cifar_files()
    if form == "folder": unpack(data_path / "cifar", files)
    else: tar(data_path / ("cifar" if form == "archive" else "") / "cifar-10-python.tar.gz", files)
    grey, colour = Images("lra-cifar").prepare(), Images("cifar").prepare()
    index = torch.cat([grey.train.index, grey.val.index])
    assert sorted(index.tolist()) == list(range(5 * ROWS)) and [len(grey.train), len(grey.val)] == [90, 10]
    i = int(grey.val.index[3])
    value, label = grey.val[3]
    assert label == y[i] and np.allclose(value[:, 0], (luma(x[i]).ravel() / 255 - 122.6 / 255) / (61 / 255), atol=1e-6)
    value, label = colour.test[ROWS - 1]
    mean, std = (0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)
    assert label == y[-1] and np.allclose(value, (x[-1].reshape(1024, 3) / 255 - mean) / std, atol=1e-5)
    assert grey.card.variant == "CIFAR-10" and "S4-LegS (HTTYH)" in grey.card.published
    assert grey.cache.parent == data_path / "cifar" and grey.cache != colour.cache
    assert not Images("lra-cifar", permute="br").card.published                 # another task than the published one


def test_the_source_is_chosen_in_order_and_named(small, data_path):
    cifar = data_path / "cifar"
    assert Images("cifar").state() == "download: 170 MB" and not data_path.exists()
    tar(cifar / "cifar10-jpeg.tar.xz", {f"top/{name}": data for name, data in jpeg_files().items()}, "w:xz")
    streamed = Images("cifar").prepare()
    assert streamed.card.variant.startswith("CIFAR-10 (JPEG copy)") and not streamed.card.published
    assert streamed.card.splits == {"train": 90, "val": 10, "test": 20}
    unpack(cifar / "cifar10-jpeg", jpeg_files())
    assert Images("cifar").find().path == cifar / "cifar10-jpeg"
    unpacked = Images("cifar").prepare()
    assert unpacked.cache != streamed.cache and all(
        (unpacked.cache / p.name).read_bytes() == p.read_bytes() for p in streamed.cache.glob("*.npy"))
    tar(cifar / "cifar-10-python.tar.gz", cifar_files()[0])
    assert Images("cifar").find().path == cifar / "cifar-10-python.tar.gz"
    unpack(cifar, cifar_files()[0])
    assert Images("cifar").find().path == cifar / "cifar-10-batches-py"
    unpack(data_path / "png", jpeg_files(kind="png"))
    assert Images("cifar", data_dir=data_path / "png").find().what == "CIFAR-10 (PNG copy)"
    for place in ("cifar10-jpeg.tar.xz", "cifar-10-python.tar.gz", "cifar-10-batches-py", "cifar10-jpeg"):
        assert Images("cifar", data_dir=cifar / place).find().path == cifar / place


def test_batches_as_python_2_wrote_them():
    "The opcodes of the published files: byte strings without a type, the old name of NumPy's module."
    x = pictures(2).transpose(0, 3, 1, 2).reshape(2, 3072)
    text = lambda s: b"U" + bytes([len(s)]) + s
    name = lambda module, name: f"c{module}\n{name}\n".encode()
    dtype = name("numpy", "dtype") + text(b"u1") + b"K\0K\1\x87R(K\3" + text(b"|")
    dtype += b"NNN" + 2 * b"J\xff\xff\xff\xff" + b"K\0tb"
    empty = name("numpy.core.multiarray", "_reconstruct") + name("numpy", "ndarray") + b"K\0\x85" + text(b"b")
    array = empty + b"\x87R(K\1K\2M\0\x0c\x86" + dtype + b"\x89T" + struct.pack("<i", x.size) + x.tobytes() + b"tb"
    data = b"\x80\2}(" + text(b"data") + array + text(b"labels") + b"](K\3K\7eu."
    got, labels = load_batch(data, "x", 2, CIFAR_CLASSES)
    assert np.array_equal(got, pictures(2)) and labels.tolist() == [3, 7]


class Bomb:
    def __init__(self, path): self.path = str(path)
    def __reduce__(self): return os.mkdir, (self.path,)


class Nested:
    "A harmless name called by the array's own machinery with a bomb inside."
    def __init__(self, path): self.path = str(path)
    def __reduce__(self): return eval, (f"__import__('os').mkdir({self.path!r})",)


@pytest.mark.parametrize("bomb", [Bomb, Nested])
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_bomb_is_refused_and_does_not_go_off(small, data_path, bomb, protocol):
    files, *_ = cifar_files()
    path = "cifar-10-batches-py/data_batch_3"
    batch = {b"data": np.zeros((ROWS, 3072), np.uint8), b"labels": [0] * ROWS, b"extra": [bomb(data_path / "exploded")]}
    tar(data_path / "cifar/cifar-10-python.tar.gz", {**files, path: pickle.dumps(batch, protocol)})
    task = Images("cifar")
    with pytest.raises(ValueError, match=r"data_batch_3 in .*tar\.gz.*(posix\.mkdir|builtin.*\.eval)"): task.prepare()
    assert not (data_path / "exploded").exists() and prepared(task) == []


def broken_batch(fault):
    x, y = np.zeros((ROWS, 3072), np.uint8), [0] * ROWS
    if fault == "list": return [x, y]
    x, y = {"shape": (x[:, :-1], y), "rows": (x[1:], y[1:]), "labels": (x, y[1:]), "type": (x.astype(float), y),
            "range": (x, y[1:] + [10]), "objects": (x, [[], *y[1:]]), "strings": (x, ["cat"] * ROWS)}[fault]
    return {b"data": x, b"labels": y}


@pytest.mark.parametrize("fault, says", [
    ("shape", r"\(20, 3071\)"), ("rows", r"\(19, 3072\)"), ("type", "float64"), ("list", "NoneType"),
    ("labels", "labels are .* a list of 20 whole numbers"), ("range", "row 19: label 10, allowed are 0…9"),
    ("objects", "labels are"), ("strings", "labels are .*'cat'")])
def test_wrong_batches(small, data_path, fault, says):
    broken = {"cifar-10-batches-py/test_batch": pickle.dumps(broken_batch(fault), 2)}
    unpack(data_path / "cifar", {**cifar_files()[0], **broken})
    task = Images("lra-cifar")
    with pytest.raises(ValueError, match=f"test_batch in .*{says}"): task.prepare()
    assert prepared(task) == []


def test_damaged_batches_give_one_clear_error():
    data = next(iter(cifar_files(2)[0].values()))
    rng = random.Random(0)
    for _ in range(300):
        broken = bytearray(data)
        for _ in range(3): broken[rng.choice([rng.randrange(300), rng.randrange(len(data))])] = rng.randrange(256)
        if rng.random() < 0.5: del broken[rng.randrange(len(data)):]
        try:
            load_batch(bytes(broken), "data_batch_1", 2, CIFAR_CLASSES)
        except ValueError as e:
            assert "data_batch_1" in str(e) and ("again" in str(e))


@pytest.mark.parametrize("form", ["archive", "folder"])
def test_a_missing_batch_is_named(small, data_path, form):
    files, *_ = cifar_files()
    del files["cifar-10-batches-py/data_batch_4"]
    if form == "folder": unpack(data_path / "cifar", files)
    else: tar(data_path / "cifar/cifar-10-python.tar.gz", files)
    task = Images("cifar")
    with pytest.raises(ValueError, match="holds no data_batch_4; get it again"): task.prepare()
    assert prepared(task) == []


def test_batches_that_lie_there_twice_are_read_once(small, data_path):
    files, x, y = cifar_files()
    unpack(data_path / "cifar", files)
    unpack(data_path / "cifar/cifar-10-batches-py", files)                          # as after unpacking it twice
    assert [len(Images("cifar").prepare().dataset(s)) for s in ("train", "test")] == [90, 20]


def test_a_cut_archive(small, data_path):
    path = tar(data_path / "cifar/cifar-10-python.tar.gz", cifar_files()[0])
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(ValueError, match="cifar-10-python.tar.gz is damaged or incomplete"): Images("cifar").prepare()


def test_an_incomplete_copy(small, data_path):
    files = jpeg_files()
    del files["train/frog/0003.jpg"]
    unpack(data_path / "cifar/cifar10-jpeg", files)
    with pytest.raises(ValueError, match=r"'train': 99.*CIFAR-10 has .*'train': 100"): Images("cifar").prepare()


# ---- MNIST

@pytest.mark.parametrize("place, packed", [("mnist", True), ("mnist/MNIST/raw", False), ("mnist/raw", True)])
def test_idx_files_where_they_lie(small, data_path, place, packed):
    files, x, y = idx_set(packed)
    unpack(data_path / place, files)
    plain, permuted = Images("mnist").prepare(), Images("pmnist").prepare()
    assert plain.cache == permuted.cache and (len(plain.train), len(plain.val), len(plain.test)) == (45, 5, 30)
    i = int(plain.val.index[2])
    assert np.allclose(plain.val[2][0][:, 0], x[i].ravel() / 255, atol=1e-7) and plain.val[2][1] == y[i]
    assert permuted.val[2][0].equal(plain.val[2][0][bit_reversal(784)])
    assert plain.card.published != permuted.card.published and "HiPPO-LegS (HiPPO)" in permuted.card.published


@pytest.mark.parametrize("fault, says", [
    ("cut", "cut short after row 0, 50 are promised"), ("long", "goes on after the 50 rows"),
    ("html", "begins with 3c68746d.*00000803"), ("empty", "begins with nothing"), ("gz", "damaged or incomplete"),
    ("floats", "begins with 00000d03"), ("labels", "begins with 00000801"), ("count", "50 images.*49 labels"),
    ("range", "train-labels.*row 4: label 77")])
def test_wrong_idx_files(small, data_path, fault, says):
    files, x, y = idx_set(packed=False)
    image, label = IDX_FILES[:2]
    good = files[image]
    files[image] = {"cut": good[:-1], "long": good + b"\0", "html": b"<html>", "empty": b"", "labels": files[label],
                    "gz": gzip.compress(good)[:-9], "floats": b"\0\0\x0d\3" + good[4:]}.get(fault, good)
    if fault == "range": files[label] = idx(np.where(np.arange(50) == 4, 77, y), 1)
    if fault == "count": files[label] = idx(y[1:], 1)
    unpack(data_path / "mnist", files)
    task = Images("mnist")
    with pytest.raises(ValueError, match=says): task.prepare()
    assert prepared(task) == []


def test_a_download_that_broke_off_between_two_files_goes_on(small, data_path, monkeypatch):
    files, *_ = idx_set()
    unpack(data_path / "mnist", dict(list(files.items())[:2]))
    with pytest.raises(ValueError, match="holds no t10k-images-idx3-ubyte, t10k-labels"):
        idx_images(data_path / "mnist", range(10), "MNIST")
    fetch = lambda source, folder: unpack(folder, {source.name: files[source.name]})
    monkeypatch.setattr(images, "fetch", fetch)
    task = Images("mnist")
    assert task.state() == "download: 12 MB" and len(task.prepare().test) == 30


def test_a_file_that_no_collection_is_read_from(small, tmp_path):
    (tmp_path / "cifar.zip").write_bytes(b"x")
    for name, expected in {"cifar": "cifar-10-python.tar.gz", "mnist": "train-images-idx3-ubyte.gz"}.items():
        with pytest.raises(ValueError, match=f"cifar.zip is no known form of {name}; .*{expected}"):
            Images(name, data_dir=tmp_path / "cifar.zip").prepare()


def test_idx_files_are_read_in_pieces(tmp_path):
    x = pictures(10, (3, 2))
    (tmp_path / "x").write_bytes(gzip.compress(idx(x, 3)))
    blocks = list(idx_blocks(tmp_path / "x", 3, rows=4))
    assert [len(b) for b in blocks] == [4, 4, 2] and np.array_equal(np.concatenate(blocks), x)


def test_a_download_lands_where_it_is_looked_for(small, data_path, monkeypatch):
    files, *_ = idx_set()
    asked = []

    def fetch(source, folder):
        asked.append(source.url)
        unpack(folder, {source.name: files[source.name]})
    monkeypatch.setattr(images, "fetch", fetch)
    elsewhere = data_path / "elsewhere"
    task = Images("fashion-mnist", data_dir=elsewhere)
    assert task.state() == "download: 31 MB" and not data_path.exists() and not asked
    task.prepare()
    assert len(asked) == 4 and task.state() == f"ready: {task.cache}" and len(task.test) == 30
    assert task.cache.parent == elsewhere and Images("fashion-mnist", data_dir=elsewhere).prepare().cache == task.cache
    assert len(asked) == 4


# ---- folders

def own(folder, n=6, shape=(8, 8, 3), splits=("train", "test")):
    "A folder of classes a, b with n images each, in every split; split all: no folder above."
    image = lambda i, k: compress(pictures(1, shape, seed=10 * i + ord(k))[0])
    return unpack(folder, {f"{s}/{k}/{i}.png".removeprefix("all/"): image(i, k)
                           for s in splits for k in ("b", "a") for i in range(n)})


def test_own_images(tmp_path, data_path):
    task = Images("images", own(tmp_path / "mine"), grey=True, tokenize=True).prepare()
    assert task.classes == ("a", "b") and (task.d_output, task.l_max, task.n_tokens, task.d_input) == (2, 64, 256, None)
    assert {s: len(task.dataset(s)) for s in ("train", "val", "test")} == {"train": 10, "val": 2, "test": 12}
    x, y = task.test[6]
    image = decode_image((tmp_path / "mine/test/b/0.png").read_bytes(), "", "L")
    assert y == 1 and x.tolist() == image.ravel().tolist()
    assert task.cache.parent == data_path / "images" and "own images, mine" in str(task.card)
    flat = Images("images", own(tmp_path / "flat", 10, splits=("all",))).prepare()
    assert [len(flat.dataset(s)) for s in ("train", "val", "test")] == [16, 2, 2] and flat.card.splits["val"] == 2
    given = Images("images", own(tmp_path / "given", splits=("train", "val", "test"))).prepare()
    assert [len(given.dataset(s)) for s in ("train", "val", "test")] == [12, 12, 12]
    no_test = Images("images", own(tmp_path / "none", splits=("train",))).prepare()
    assert set(no_test.card.splits) == {"train", "val"}
    with pytest.raises(ValueError, match="no test images"): no_test.test
    nowhere = Images("images", tmp_path / "nowhere")
    assert nowhere.state().startswith("missing") and nowhere.card.variant == "not there yet"
    with pytest.raises(ValueError, match="nowhere does not exist"): nowhere.prepare()


@pytest.mark.parametrize("fault, says", [
    ("empty", r"train/a/1\.png in .* is empty \(0 bytes\)"), ("truncated", r"(?i)train/a/2\.jpg in .*truncated"),
    ("text", "unknown format"), ("size", "12 x 8 pixels.*8 x 8; give size="), ("deep", "more than 8 bits"),
    ("class", "fits nowhere"), ("root", "lies in no class folder"), ("mixed", "fits nowhere")])
@pytest.mark.parametrize("archived", [False, True])
def test_wrong_folders(tmp_path, fault, says, archived):
    folder, jpeg = own(tmp_path / "mine"), compress(pictures(1, (8, 8, 3))[0], "jpeg")
    wide, deep = (compress(x) for x in (pictures(1, (12, 8, 3))[0], pictures(1, (8, 8))[0].astype(np.uint16) * 256))
    name, data = {"empty": ("train/a/1.png", b""), "truncated": ("train/a/2.jpg", jpeg[:-100]),
                  "text": ("train/a/3.png", b"text"), "size": ("train/a/9.png", wide), "deep": ("test/a/7.png", deep),
                  "class": ("test/c/1.jpg", jpeg), "root": ("train/1.jpg", jpeg), "mixed": ("a/1.jpg", jpeg)}[fault]
    unpack(folder, {name: data})
    if archived:
        files = {f"mine/{p.relative_to(folder)}": p.read_bytes() for p in folder.rglob("*.*g")}
        folder = tar(tmp_path / "mine.tar", files, "w")
    task = Images("images", folder)
    with pytest.raises(ValueError, match=says) as e: task.prepare()
    assert str(folder) in str(e.value) and prepared(task) == []


@pytest.mark.parametrize("kind", ["png", "jpeg", "gif", "webp"])
def test_damaged_images_are_read_or_refused_with_their_name(kind):
    data, rng, refused = compress(pictures(1)[0], kind), random.Random(0), 0
    for _ in range(300):
        broken = bytearray(data)
        for _ in range(3): broken[min(int(rng.expovariate(0.02)), len(broken) - 1)] = rng.randrange(256)
        if rng.random() < 0.3: del broken[rng.randrange(len(data)):]
        try:
            assert decode_image(bytes(broken), "cat/7", size=(8, 8)).shape == (8, 8, 3)
        except ValueError as e:
            assert str(e).startswith("cat/7 ")
            refused += 1
    assert refused > 50


def test_images_of_several_sizes_are_resized_when_asked(tmp_path):
    folder = unpack(own(tmp_path / "mine"), {"train/a/9.png": compress(pictures(1, (12, 9, 3))[0])})
    task = Images("images", folder, size=[4, 6]).prepare()
    assert task.l_max == 24 and task.train[0][0].shape == (24, 3)
    want = Image.open(folder / "test/a/0.png").resize((6, 4), Image.Resampling.BILINEAR)
    assert np.allclose(task.test[0][0].view(4, 6, 3), np.asarray(want) / 255, atol=1e-6)


def test_folder_and_archive_give_the_same_rows_whatever_their_order(tmp_path):
    folder = own(tmp_path / "mine")
    unpack(folder, {"train/.hidden/x.png": b"", "train/a/._1.png": b"", "__MACOSX/train/a/1.png": b"",
                    "train/a/Thumbs.db": b"x"})
    names = sorted(p.relative_to(tmp_path).as_posix() for p in folder.rglob("*") if p.is_file())
    random.Random(1).shuffle(names)
    archive = tar(tmp_path / "mine.tar.xz", {f"./{name}": (tmp_path / name).read_bytes() for name in names}, "w:xz")
    for place, out in ((folder, tmp_path / "1"), (archive, tmp_path / "2")):
        out.mkdir()
        assert store(image_folder(place), out)["count"] == {"train": 12, "test": 12}
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in "12")
    assert one == two and len(one) == 4


def test_class_folders_may_be_links(tmp_path):
    own(tmp_path / "elsewhere", splits=("all",))
    (tmp_path / "mine").mkdir()
    for k in "ab": (tmp_path / "mine" / k).symlink_to(tmp_path / "elsewhere" / k)
    assert image_folder(tmp_path / "mine").count == {"all": 12} and len(source_files(tmp_path / "mine")) == 12


def test_a_source_that_changes_while_it_is_read(tmp_path):
    source = image_folder(own(tmp_path / "mine"))
    (tmp_path / "mine/train/a/0.png").unlink()
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="23 images came, 24 were there before"): store(source, tmp_path / "out")


# ---- caches

def test_the_cache_depends_on_the_source_and_on_what_shapes_it(tmp_path):
    folder = own(tmp_path / "mine")
    caches = [Images("images", folder, **options).prepare().cache for options in
              ({}, {"grey": True}, {"size": (4, 4)}, {"size": (4, 6)}, {"permute": "br", "augment": True, "mean": 0.5})]
    assert len(set(caches)) == 4 and caches[0] == caches[-1]                        # the order of pixels shapes no file
    (folder / "train/a/0.png").write_bytes(compress(pictures(1, (8, 8, 3), seed=5)[0]))
    assert Images("images", folder).prepare().cache not in caches
    (folder / "notes.txt").write_text("not read")
    assert Images("images", folder).prepare().cache == Images("images", folder).prepare().cache


def test_a_damaged_cache_is_named(tmp_path):
    task = Images("images", own(tmp_path / "mine")).prepare()
    with open(task.cache / "train_images.npy", "r+b") as f:
        f.seek(-5, os.SEEK_END)
        f.write(b"!")
    with pytest.raises(ValueError, match=r"train_images\.npy: other content.*delete the folder"):
        Images("images", tmp_path / "mine").prepare()


def test_preparing_again_takes_what_has_changed(tmp_path):
    task = Images("images", own(tmp_path / "mine")).prepare()
    before, cache = task.test[0][0], task.cache
    image = pictures(1, (8, 8, 3), seed=99)[0]
    (tmp_path / "mine/test/a/0.png").write_bytes(compress(image))
    assert task.test[0][0].equal(before)                                            # what is loaded stays as it is
    assert task.prepare().cache != cache and not task.test[0][0].equal(before)
    assert np.allclose(task.test[0][0], image.reshape(64, 3) / 255)


def test_where_one_cannot_write(tmp_path, data_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    there = Images("digits").prepare().cache
    access = os.access
    monkeypatch.setattr(os, "access", lambda p, mode: not str(p).startswith(str(data_path)) and access(p, mode))
    task = Images("digits")
    assert task.state() == f"ready: {there}" and task.prepare().cache == there      # made before, while one could
    shutil.rmtree(there)
    task = Images("digits").prepare()
    assert task.cache.parent == tmp_path / "home/s4nb/digits" and task.state() == f"ready: {task.cache}"


def test_a_cache_lies_beside_the_archive_it_is_made_of(small, data_path):
    path = tar(data_path / "mine/cifar-10-python.tar.gz", cifar_files()[0])
    task = Images("cifar", data_dir=path).prepare()
    assert task.cache.parent == path.parent and task.state() == f"ready: {task.cache}"


def test_preparing_twice_reads_once(small, data_path, monkeypatch):
    unpack(data_path / "mnist", idx_set()[0])
    first = Images("mnist").prepare()
    monkeypatch.setattr(images, "store", None)                                      # would fail if it were called
    assert Images("mnist").prepare().cache == first.cache
    manifest = json.loads((first.cache / "manifest.json").read_text())
    assert manifest["facts"]["count"] == {"train": 50, "test": 30} and manifest["settings"]["grey"] is True


# ---- what a model reads

@pytest.fixture
def digits():
    return lambda **options: Images("digits", **options).prepare()


def test_digits_are_those_of_scikit_learn(digits):
    task, seen = digits(), torch.zeros(1797, 64)
    for split in ("train", "val", "test"):
        data = task.dataset(split)
        seen[data.index] = torch.stack([x[:, 0] for x, _ in data])
    labels = torch.cat([task.dataset(split).labels for split in ("train", "val", "test")])
    assert labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]     # as is documented
    assert (seen[0, :16] * 16).tolist() == [0, 0, 5, 13, 9, 1, 0, 0, 0, 0, 13, 15, 10, 15, 5, 0] and seen.max() == 1
    assert task.majority("test")[1] == task.test.labels.bincount().max() / 179


@pytest.mark.parametrize("permute", list(ORDERS), ids=str)
def test_orders_tokens_and_images_hold_the_same_pixels(digits, permute):
    image = digits(sequence=False).val[3][0]
    steps = digits(permute=permute).val[3][0]
    order = pixel_order(permute, 8, 8)
    rows = image.view(64, 1)
    assert steps.equal(torch.cat([rows, rows[order]], -1) if permute == "transpose" else rows[order])
    assert Images("digits", permute=permute).d_input == steps.shape[-1]
    if permute == "transpose": return
    assert digits(permute=permute, tokenize=True).val[3][0].equal((steps[:, 0] * 16).round().long())


def test_rates(digits):
    full = next(iter(digits(sequence=False).loader("test", 7))).x
    batch = next(iter(digits().loader("test", 7, rate=2)))
    assert batch.x.equal(full.view(7, 64, 1)[:, ::2]) and batch.rate == 2 and batch.lengths is None
    assert next(iter(digits(permute="transpose").loader("test", 7, rate=4))).x.shape == (7, 16, 2)
    for order in (None, "br", "hilbert"):
        pixels = next(iter(digits(permute=order, resample="pixels").loader("test", 7, rate=2)))
        assert pixels.x.equal(full[:, ::2, ::2].reshape(7, 16, 1)[:, pixel_order(order, 4, 4)]) and pixels.rate == 4
        resized = next(iter(digits(permute=order, resample="resize").loader("test", 7, rate=2)))
        want = np.stack([Image.fromarray(x[..., 0].numpy()).resize((4, 4), Image.Resampling.BILINEAR) for x in full])
        assert np.allclose(resized.x[..., 0], want.reshape(7, 16)[:, pixel_order(order, 4, 4)], atol=1e-6)
    image = next(iter(digits(sequence=False, resample="resize").loader("test", 7, rate=2)))
    assert np.allclose(image.x[..., 0], want, atol=1e-6) and image.rate == 2 and image.x.shape == (7, 4, 4, 1)
    assert next(iter(digits(sequence=False).loader("test", 7, rate=8))).x.equal(full[:, :1, :1])
    for rate in (3, 1.5, 0.5):
        loader = digits(resample="pixels").loader("test", rate=rate)
        with pytest.raises(ValueError, match=f"rate={rate}"): next(iter(loader))
    loader = digits(tokenize=True).loader("test", rate=2)
    with pytest.raises(ValueError, match="tokens have no other rate"): next(iter(loader))


def test_only_train_is_augmented_and_a_seed_repeats_it(digits):
    plain, task = digits(), digits(augment=True)
    assert all(task.val[i][0].equal(plain.val[i][0]) and task.test[i][0].equal(plain.test[i][0]) for i in range(20))
    torch.manual_seed(3)
    once = [task.train[i][0] for i in range(20)]
    torch.manual_seed(3)
    assert all(x.equal(task.train[i][0]) for i, x in enumerate(once))
    assert sum(x.equal(plain.train[i][0]) for i, x in enumerate(once)) < 5


@pytest.mark.parametrize("h, w", [(6, 5), (2, 3)], ids=["6x5", "2x3"])                # also less than the window moves
def test_every_crop_and_flip_comes(h, w):
    x = pictures(1, (h, w))[0]
    mirror = np.pad(x, 4, mode="symmetric")
    wanted = {mirror[i:i + h, j:j + w][:, ::s].tobytes() for s in (1, -1) for i in range(9) for j in range(9)}
    torch.manual_seed(0)
    seen = {crop_and_flip(torch.from_numpy(x)).numpy().tobytes() for _ in range(3000)}
    assert seen == wanted                                           # 3000 draws miss one of 162 with p < 1e-5


def test_workers_give_the_same_batches(digits):
    task = digits(permute="br")
    one, two = (list(task.loader("val", 32, workers=workers)) for workers in (0, 1))
    assert all(a.x.equal(b.x) and a.y.equal(b.y) for a, b in zip(one, two)) and len(one) == len(two) == 6


def test_workers_augment_as_the_seed_says_and_each_epoch_anew(digits):
    loader = digits(augment=True).loader("train", 500, shuffle=False, workers=2)
    torch.manual_seed(5)
    first, second = (torch.cat([b.x for b in loader]) for _ in range(2))
    torch.manual_seed(5)
    again = torch.cat([b.x for b in loader])
    assert again.equal(first) and not second.equal(first)


def test_constants_of_ones_own(digits):
    x, plain = digits(mean=0.5, std=[0.25]).val[0][0], digits().val[0][0]
    assert torch.allclose(x, (plain - 0.5) / 0.25)
    assert "minus 0.5, divided by 0.25" in str(digits(mean=0.5, std=0.25).card)


@pytest.mark.parametrize("options, says", [
    ({"name": "minst"}, "'minst' is unknown: one of lra-cifar"), ({"name": "images"}, "data_dir names"),
    ({"permute": "spiral"}, "spiral"), ({"name": "cifar", "tokenize": True}, "in colour"), ({"grey": True}, "own"),
    ({"size": (4, 4)}, "own"), ({"sequence": False, "permute": "br"}, "sequence=False"),
    ({"name": "images", "data_dir": "x", "size": 32}, "two whole numbers"),
    ({"mean": (1, 2)}, "give a tuple"), ({"permute": "transpose", "resample": "pixels"}, "one of steps"),
    ({"sequence": False, "tokenize": True}, "sequence=False"), ({"name": "mnist", "permute": "hilbert"}, "28 x 28"),
    ({"resample": "nearest"}, "one of steps"), ({"tokenize": True, "permute": "transpose"}, "tokens have none"),
    ({"tokenize": True, "resample": "resize"}, "one of steps"),
    ({"sequence": False, "resample": "steps"}, "one of pixels, resize")],
    ids=lambda v: "says" if isinstance(v, str) else "-".join(v))
def test_options_that_make_no_sense(options, says):
    with pytest.raises(ValueError, match=says): Images(**{"name": "digits", **options})


def test_coarser_is_exact_where_it_can_be():
    x = torch.arange(16.0).view(1, 4, 4, 1)
    assert coarser(x, 2, "pixels").flatten().tolist() == [0, 2, 8, 10] and coarser(x, 1, "resize").equal(x)


# ---- the real copy

def test_the_first_images_of_the_real_copy(real_data):
    got = list(islice(members(real_data / "cifar10-jpeg.tar.xz", lambda name: name.endswith(".jpg")), 3))
    assert len(got) == 3
    for name, read in islice(members(real_data / "cifar10-jpeg.tar.xz", lambda name: name.endswith(".jpg")), 50):
        assert decode_image(read(), name).shape == (32, 32, 3) and name.split("/")[-2] in CIFAR_CLASSES
