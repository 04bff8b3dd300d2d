"""ListOps: parity with LRA's generator and the reference's tokens, an independent evaluation, statistics, faults."""

import csv
import hashlib
import json
import multiprocessing
import os
import random
import signal
import statistics
import time
from collections import Counter

import numpy as np
import pytest
import torch

from s4nb.data.base import encode, vocabulary
from s4nb.data.listops import (DIGITS, OPERATORS, SYMBOLS, ListOps, apply, apply_batch, evaluate, flat_tokens, generate,
                               grow_block, lra_text, nest, read_tsv, tokenize, tsv)

TINY = {"sizes": (60, 20, 20), "workers": 1}


@pytest.fixture(autouse=True)
def data_path(monkeypatch, tmp_path):
    monkeypatch.setenv("DATA_PATH", str(tmp_path / "data"))
    return tmp_path / "data"


@pytest.fixture(scope="module")
def numbers(vectors):
    arrays = np.load(vectors / "f_data.npz")
    arrays = {k.split("/")[1]: arrays[k] for k in arrays.files if k.startswith("listops/")}
    return vectors / "listops_basic.tsv", arrays, json.loads((vectors / "f_data_text.json").read_text())["listops"]


# An evaluation that shares nothing with the package: LRA's text as what it is, a binary tree of partial applications.
def binary(source):
    stack = [[]]
    for token in source.split():
        if token == "(": stack.append([])
        elif token == ")":
            left, right = stack.pop()
            stack[-1].append(saturate(left, right))
        else: stack[-1].append(int(token) if token.isdigit() else token)
    return stack[0][0]


def saturate(left, right):
    if right != "]": return (left, [right]) if isinstance(left, str) else (left[0], left[1] + [right])
    name, values = left
    median, total = lambda v: int(statistics.median(v)), lambda v: sum(v) % 10
    return {"[MIN": min, "[MAX": max, "[MED": median, "[SM": total}[name](values)


# ---- parity

def test_values_lengths_and_text_of_lra(numbers):
    path, arrays, text = numbers
    with open(path, newline="") as f: rows = list(csv.reader(f, delimiter="\t"))[1:]
    assert len(rows) == 50
    for i, (source, target) in enumerate(rows):
        tokens = tokenize(source)
        assert evaluate(source) == evaluate(" ".join(tokens)) == binary(source) == int(target) == arrays["labels"][i]
        assert len(tokens) == arrays["tree_length"][i] and nest(tokens) == source
        assert hashlib.sha256(source.encode()).hexdigest() == text["sha256_50"][i]
    for source, value, stored in zip(text["small_lines"], text["small_labels"], arrays["small_labels"]):
        assert evaluate(source) == binary(source) == value == stored
    assert [(len(s), v) for s, v in read_tsv(path)] == list(zip(arrays["tree_length"], arrays["labels"]))


def test_ids_of_the_reference(numbers):
    path, arrays, text = numbers
    counts = Counter(SYMBOLS[i] for symbols, _ in read_tsv(path) for i in symbols)
    vocab, bos = vocabulary(counts), vocabulary(counts, ("<pad>", "<unk>", "<bos>", "<eos>"))
    assert vocab == text["vocab"] and bos == text["vocab_bos"]
    for i, source in enumerate(text["lines"]):
        assert encode(tokenize(source), vocab, l_max=2048) == list(arrays[f"ids_{i}"])
        assert encode(tokenize(source), bos, l_max=2048) == list(arrays[f"ids_bos_{i}"])
    for i in range(10): assert encode(tokenize(text["small_lines"][i]), vocab) == list(arrays[f"small_ids_{i}"])


# ---- evaluation

def test_evaluate_equals_the_binary_tree():
    for shortest, longest in (64, 256), (3, 30), (501, 1999):
        for node_bytes, value in grow_block(5, 1, shortest, longest, 1500):
            assert evaluate(lra_text(node_bytes)) == binary(lra_text(node_bytes)) == value
            assert evaluate(" ".join(flat_tokens(node_bytes))) == value
            assert evaluate(lra_text(node_bytes).replace("]", "X")) == value


def test_operators_in_batch():
    rng = random.Random(0)
    values = [[rng.randrange(10) for _ in range(rng.randint(2, 10))] for _ in range(500)]
    junk = [[rng.randrange(10) for _ in range(10 - len(v))] for v in values]             # beyond the arguments: ignored
    padded = torch.tensor([v + j for v, j in zip(values, junk)])
    for i, op in enumerate(OPERATORS):
        got = apply_batch(torch.full((500,), i), padded, torch.tensor([len(v) for v in values]))
        assert got.tolist() == [apply(op, v) for v in values] == [saturate((op, v), "]") for v in values]


@pytest.mark.parametrize("source", ["", "  ", "[MAX", "[MAX ]", "3 4", "[MAX 3 4", "[MAX 3 4 ] ]", "]", "[FIRST 3 4 ]",
                                    "[MAX 10 2 ]", "[max 1 2 ]", "( [MAX 3 ) 4 ]", "( ( [MAX 3 ) 4 ) ] )", "()", "-3",
                                    "( ( ( [MAX 3 ) 4 ) ] ) )", "( ( ( [MAX 3 ) 4 ) ]", "٣", "²"])
def test_malformed_is_refused_with_a_position(source):
    with pytest.raises(ValueError, match="at character [0-9]+ got .*expected"): evaluate(source)


@pytest.mark.parametrize("source", [None, 3, b"[MAX 1 2 ]", ["[MAX", "1"]])
def test_what_is_no_text_is_refused(source):
    with pytest.raises(ValueError, match="an expression is a text"): evaluate(source)


# ---- statistics of the generator against those measured on LRA's procedure (spec: 4000 accepted trees)

@pytest.fixture(scope="module")
def sample():
    return list(generate(8000, 11, 501, 1999))


def test_acceptance():
    trees = 20 * 8192
    accepted = sum(len(grow_block(1, i, 501, 1999)) for i in range(20))
    error = (0.0824 * 0.9176 * (1 / trees + 1 / 48_500)) ** 0.5         # 4000 accepted at 8.24 % are 48,500 trees
    assert abs(accepted / trees - 0.0824) < 4 * error


def length_law(longest):
    """The exact probability of each length 0…longest of a tree: lengths of children add, so their laws convolve."""
    leaf = np.zeros(longest + 1)
    leaf[1] = 1
    law = leaf
    for _ in range(9):
        forest, operator = law, np.zeros_like(leaf)
        for k in range(2, 11):
            forest = np.convolve(forest, law)[:longest + 1]
            operator[2:] += forest[:-2] / 9
        law = 0.75 * leaf + 0.25 * operator
    return law


def test_lengths_follow_the_exact_law(sample):
    """Not the deciles of spec C.1 (mean 1062): its 4000 trees lie 4.7 standard errors off the law of the grammar (mean
    1035.0), which 33,000 trees drawn node by node in LRA's order confirm (1034.6 ± 2.2)."""
    law = length_law(1999)
    assert abs(law[501:].sum() - 0.0824) < 4 * (0.0824 * 0.9176 / 48_500) ** 0.5
    assert abs(law[:501].sum() - 0.906) < 4 * (0.906 * 0.094 / 48_500) ** 0.5
    law = law[501:] / law[501:].sum()
    edges = 501 + np.searchsorted(law.cumsum(), np.arange(0, 1, 0.05))
    counts = np.histogram([len(t) for t, _ in sample], [*edges, 2000])[0]
    expected = np.add.reduceat(law, edges - 501) * 8000
    assert counts.sum() == 8000                                          # none outside 501…1999
    assert ((counts - expected) ** 2 / expected).sum() < 50.8            # 19 degrees of freedom, p = 1e-4
    rng, lengths = random.Random(2), []
    while len(lengths) < 400:
        n = len(literal(rng))
        if 501 <= n <= 1999: lengths.append(n)
    counts, expected = np.histogram(lengths, [*edges[::4], 2000])[0], np.add.reduceat(law, edges[::4] - 501) * 400
    assert ((counts - expected) ** 2 / expected).sum() < 23.5            # 4 degrees of freedom, p = 1e-4


def test_labels_root_operators_and_depth(sample):
    labels = np.bincount([v for _, v in sample], minlength=10) / 8000
    for digit, share in {0: 0.173, 9: 0.175, 1: 0.094, 4: 0.091, 5: 0.088}.items():
        assert abs(labels[digit] - share) < 4 * (share * (1 - share) * (1 / 8000 + 1 / 4000)) ** 0.5
    assert all(0.06 < labels[d] < 0.095 for d in (2, 3, 6, 7, 8))
    roots = Counter(flat_tokens(t)[0] for t, _ in sample)
    assert all(abs(roots[op] / 8000 - 0.25) < 4 * (0.1875 / 8000) ** 0.5 for op in OPERATORS)
    for node_bytes, _ in sample[:300]:
        brackets = np.cumsum([(t in OPERATORS) - (t == "X") for t in flat_tokens(node_bytes)])
        assert brackets.max() == 9                                     # operators at depths 1…9, digits down to 10


def literal(rng, depth=1):
    if depth == 10 or rng.random() > 0.25: return [rng.choice(DIGITS)]
    children = [literal(rng, depth + 1) for _ in range(rng.randint(2, 10))]
    return [rng.choice(OPERATORS), *sum(children, []), "X"]


def test_the_same_law_as_node_by_node():
    """Two samples of trees of 64…256 tokens, one drawn literally: arities, operators and values must look alike."""
    rng, mine = random.Random(3), [flat_tokens(t) for t, _ in generate(2000, 4, 64, 256)]
    theirs = []
    while len(theirs) < 400:
        tokens = literal(rng)
        if 64 <= len(tokens) <= 256: theirs.append(tokens)

    def features(tokens):
        opened, arities = [], Counter()
        for t in tokens:
            if t == "X": arities[opened.pop()] += 1
            if t != "X" and opened: opened[-1] += 1
            if t in OPERATORS: opened.append(0)
        return [len(tokens), tokens.count("X"), sum(t in DIGITS for t in tokens), evaluate(" ".join(tokens)),
                *(arities[k] for k in range(2, 11)), *(tokens.count(op) for op in OPERATORS)]
    a, b = np.array([features(t) for t in mine]), np.array([features(t) for t in theirs])
    z = (a.mean(0) - b.mean(0)) / np.sqrt(a.var(0) / len(a) + b.var(0) / len(b))
    assert np.abs(z).max() < 4


def test_reproducible_distinct_and_independent_of_workers():
    a, b, c = (list(generate(700, 1, 64, 256, workers=w)) for w in (1, 2, 5))
    assert a == b == c and len({t for t, _ in a}) == 700
    assert a[:300] == list(generate(300, 1, 64, 256, workers=2))         # a shorter request is a prefix
    assert not {t for t, _ in a} & {t for t, _ in generate(700, 2, 64, 256)}
    assert len({t for t, _ in generate(3000, 0, 4, 6)}) == 3000          # duplicates abound here and are dropped


def test_torch_threads_and_random_states_are_left_alone():
    torch.manual_seed(0)
    random.seed(0)
    before, threads = (torch.get_rng_state(), random.getstate()), torch.get_num_threads()
    ListOps(**TINY).prepare()
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()
    assert torch.get_num_threads() == threads


# ---- the task and its files

def test_the_task(data_path):
    task = ListOps("listops-mini", seed=3, **TINY)
    assert task.made is None and "LRA's files where they lie" in str(task.card)
    x, y, lengths, _ = next(iter(task.loader("train", batch_size=20, bucket=3)))         # prepares by itself
    assert x.dtype == torch.int64 and x.shape == (20, lengths.max()) and 65 <= lengths.min() and lengths.max() <= 257
    names = {i: t for t, i in task.vocabulary.items()}
    for row, label, l in zip(x.tolist(), y.tolist(), lengths.tolist()):
        assert row[l - 1] == 2 and evaluate(" ".join(names[i] for i in row[:l - 1])) == label
    everything = [read_tsv(tsv(task.cache, s)) for s in ("train", "val", "test")]
    assert [len(rows) for rows in everything] == [60, 20, 20]
    assert len({symbols for rows in everything for symbols, _ in rows}) == 100
    counts = Counter(SYMBOLS[i] for s, _ in everything[0] for i in s)
    assert task.vocabulary == vocabulary(counts) and task.l_max == 257 and task.n_tokens == 18 and task.d_output == 10
    for split, rows in zip(("train", "val", "test"), everything):
        data = task.dataset(split)
        for (x, label), (symbols, value) in zip((data[i] for i in range(len(data))), rows):
            assert label == value and x.tolist() == encode([SYMBOLS[i] for i in symbols], task.vocabulary, task.l_max)
    assert "no published number applies" in str(task.card) and "seed 3" in str(task.card) and not task.card.published
    label, share = task.majority("val")
    assert share == max(Counter(v for _, v in everything[1]).values()) / 20


def test_other_settings_are_other_caches_and_the_same_are_found():
    base = ListOps(**TINY).prepare()
    stamp = base.cache.stat().st_mtime_ns
    assert ListOps(**TINY, l_max=100).prepare().cache == base.cache and base.cache.stat().st_mtime_ns == stamp
    others = [ListOps(seed=1, **TINY), ListOps(sizes=(60, 20, 21)), ListOps("lra-listops", **TINY)]
    assert len({base.cache, *(o.prepare().cache for o in others)}) == 4
    assert max(ListOps(**TINY, l_max=100).train.lengths) == 100


@pytest.mark.parametrize("kwargs, complaint", [
    ({"name": "listop"}, "one of lra-listops, listops-mini"), ({"sizes": (10, 0, 5)}, "each at least 1"),
    ({"sizes": (10, 5)}, "sizes are"), ({"l_max": 1}, "l_max is at least 2")])
def test_bad_settings(kwargs, complaint):
    with pytest.raises(ValueError, match=complaint): ListOps(**kwargs)


def released_files(folder, seed=5):
    """Files of LRA's making: CRLF, nested text, no manifest."""
    folder.mkdir(parents=True)
    trees = list(generate(45, seed, 501, 1999))
    for split, rows in zip(("train", "val", "test"), (trees[:30], trees[30:40], trees[40:])):
        with open(tsv(folder, split), "w", newline="") as f:
            csv.writer(f, delimiter="\t").writerows([("Source", "Target"), *((lra_text(t), v) for t, v in rows)])


@pytest.mark.parametrize("where", ["listops", "listops/listops-1000", "listops-1000", "lra_release/listops-1000",
                                   "lra_release/lra_release/listops-1000"])
def test_released_files_are_read_in_every_layout(data_path, where):
    released_files(data_path / where)
    task = ListOps("lra-listops").prepare()
    assert (len(task.train), len(task.val), len(task.test)) == (30, 10, 5)
    assert str(data_path / where) in task.card.variant
    assert "generated" not in task.card.variant and task.card.published
    again = ListOps("lra-listops", data_dir=data_path / where).prepare()
    assert again.cache == task.cache and torch.equal(again.test[4][0], task.test[4][0])
    assert ListOps("listops-mini", **TINY).prepare().made.startswith("generated")


def test_released_files_on_a_read_only_disk(data_path, tmp_path, monkeypatch):
    released_files(tmp_path / "shared")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own"))
    task = ListOps("lra-listops", data_dir=tmp_path / "shared").prepare()
    assert task.cache.parent == tmp_path / "own/s4nb/shared" and not list((tmp_path / "shared").glob("tokens*"))


def test_state_says_where_the_data_come_from(data_path):
    task = ListOps("lra-listops", **TINY)
    assert task.state().startswith("generate: ") and not (data_path / "listops").exists()
    task.prepare()
    assert task.state() == f"ready: {task.cache}"
    released_files(data_path / "listops/listops-1000")
    assert ListOps("lra-listops").state() == f"read from {data_path / 'listops/listops-1000'}"


def test_a_changed_released_file_is_read_anew(data_path):
    released_files(data_path / "listops")
    first = ListOps("lra-listops").prepare().cache
    for split in ("train", "val", "test"): tsv(data_path / "listops", split).unlink()
    (data_path / "listops").rename(data_path / "old")
    released_files(data_path / "listops", seed=6)
    assert ListOps("lra-listops").prepare().cache != first


def test_part_of_a_release_is_refused(data_path):
    released_files(data_path / "listops")
    tsv(data_path / "listops", "val").unlink()
    with pytest.raises(ValueError, match="not basic_val.tsv: complete or remove"): ListOps("lra-listops").prepare()


def test_generated_files_handed_over_as_data_dir_keep_their_name():
    made = ListOps("lra-listops", seed=9, **TINY).prepare()
    task = ListOps("lra-listops", data_dir=made.cache).prepare()
    assert "seed 9; not LRA's released files" in task.card.variant and len(task.test) == 20
    mini = ListOps("listops-mini", **TINY).prepare()
    with pytest.raises(ValueError, match="holds listops-mini, asked was lra-listops"):
        ListOps("lra-listops", data_dir=mini.cache).prepare()
    tsv(made.cache, "val").write_text("x")
    with pytest.raises(ValueError, match="delete the folder"): ListOps("lra-listops", data_dir=made.cache).prepare()


def cut(text): return text[:-200]
def relabel(text): return text[:-3] + str((int(text[-3]) + 1) % 10) + text[-2:]
def drop_line(text): return text[:text[:-2].rindex("\r\n") + 2]


@pytest.mark.parametrize("damage, complaint", [
    (cut, "line 21: expected an expression, a tab"), (relabel, "line 21: the expression's value"),
    (drop_line, "each line is valid by itself"), (lambda t: "", "line 1: expected the header"),
    (lambda t: t.replace("[MAX", "[FOO"), r"got '\[FOO'"),
    (lambda t: t.replace("\t", " "), "line 1: expected the header")])
def test_a_damaged_cache_names_file_line_and_fix(damage, complaint):
    task = ListOps(**TINY).prepare()
    path = tsv(task.cache, "test")
    whole = path.read_bytes().decode()
    path.write_bytes(damage(whole).encode())
    with pytest.raises(ValueError, match=complaint) as error: ListOps(**TINY).prepare()
    assert str(path) in str(error.value) and f"delete the folder {task.cache}" in str(error.value)
    path.write_bytes(whole.encode())
    ListOps(**TINY).prepare()                                            # restored: accepted again


@pytest.mark.parametrize("damage, complaint", [
    (cut, "line 6: expected an expression, a tab"), (relabel, "line 6: the expression's value")])
def test_a_damaged_release_names_file_line_and_fix(data_path, damage, complaint):
    released_files(data_path / "listops")
    path = tsv(data_path / "listops", "test")
    path.write_bytes(damage(path.read_bytes().decode()).encode())
    with pytest.raises(ValueError, match=complaint) as error: ListOps("lra-listops").prepare()
    assert f"{path}, line" in str(error.value) and "restore the file or delete it" in str(error.value)
    assert not list((data_path / "listops").glob("tokens*"))


def test_damaged_tokens_are_not_read():
    task = ListOps(**TINY).prepare()
    data = bytearray((task.cache / "tokens.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (task.cache / "tokens.pt").write_bytes(data)
    with pytest.raises(ValueError, match="tokens.pt: other content"): ListOps(**TINY).prepare()


def start(folder, *sizes):
    def job():
        task = ListOps("lra-listops", data_dir=folder, sizes=sizes).prepare()
        (folder / f"seen by {os.getpid()}").write_text(f"{len(task.train)} {task.cache.name}")
    process = multiprocessing.get_context("fork").Process(target=job)
    process.start()
    return process


def test_kill_while_generating_then_two_processes_at_once(tmp_path):
    victim, until = start(tmp_path, 90_000, 10, 10), time.monotonic() + 60
    while not list(tmp_path.glob(".*.tmp/basic_train.tsv")) and time.monotonic() < until: time.sleep(0.02)
    os.kill(victim.pid, signal.SIGKILL)
    victim.join()
    assert list(tmp_path.glob(".*.tmp/basic_train.tsv")) and not list(tmp_path.glob("lra-listops-*"))
    rivals = [start(tmp_path, 100, 10, 10) for _ in range(2)]
    for p in rivals: p.join(120)
    made, = tmp_path.glob("lra-listops-*")
    assert [p.read_text() for p in tmp_path.glob("seen by *")] == [f"100 {made.name}"] * 2
