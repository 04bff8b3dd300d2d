"""Retrieval: LRA's files and faults, ids against a literal reading, batches, caches; manual pages and their pairs."""

import gzip
import io
import random
import tarfile
import tracemalloc
from collections import Counter

import pytest
import torch

import s4nb.data.retrieval as retrieval
from s4nb.data.base import SPLITS, encode, vocabulary
from s4nb.data.retrieval import (COUNTS, FILES, Retrieval, draw_pairs, manual_pages, pair_batch, read_pairs, render,
                                 role, sections, store_pairs)


@pytest.fixture(autouse=True)
def data_path(monkeypatch, tmp_path):
    monkeypatch.setenv("DATA_PATH", str(tmp_path / "data"))
    monkeypatch.setattr(retrieval, "STANDARD_PLACE", tmp_path / "no man pages here")
    return tmp_path / "data"


ROWS = {"train": [(1, "b'On parsing \"well\"'", "b'A cited page.'"), (0, "b'A cited page.'", "\"a mark that opens"),
                  (1, "'tis one more", "b'On parsing \"well\"'"), (0, "b'A cited page.'", "b'A cited page.'")],
        "val": [(0, "b'val only: \u00e9'", "b'A cited page.'")], "test": [(1, "b'test'", "'tis one more")]}


def line(label, text1, text2, end="\n"):
    return f"{label}\t11\t7\t{text1}\t{text2}{end}".encode()


def write(folder, rows=ROWS, end="\n", number=str):
    folder.mkdir(parents=True, exist_ok=True)
    for split, name in FILES.items():
        (folder / name).write_bytes(b"".join(line(number(y), a, b, end) for y, a, b in rows[split]))
    return folder


def refused(call, *texts, error=ValueError):
    with pytest.raises(error) as e: call()
    assert all(text in str(e.value) for text in texts), e.value


# ---- the files

@pytest.mark.parametrize("number", [str, lambda y: f"{y}.0", lambda y: f" {y}"], ids=["int", "float", "space"])
@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["lf", "crlf"])
def test_rows_as_they_are(tmp_path, number, end):
    folder = write(tmp_path / "aan", end=end, number=number)
    for split in SPLITS: assert list(read_pairs(folder / FILES[split])) == ROWS[split]


def test_last_line_without_its_end_and_a_carriage_return_inside(tmp_path):
    path = tmp_path / "x.tsv"
    path.write_bytes(line(1, "a\rb", "c") + line(0, "'", '"', end=""))
    assert list(read_pairs(path)) == [(1, "a\rb", "c"), (0, "'", '"')]


@pytest.mark.parametrize("bad, what", [
    (b"1\t2\t3\n", "3 came: '1\\t2\\t3\\n' (LRA's lists of ids hold no texts"), (b"1\t2\t3\tx\n", "4 came"),
    (b"\n", "1 came"), (b"1\t2\t3\tx\ty\tz\n", "6 came"), (line("yes", "x", "y"), "label is 0 or 1, got 'yes'"),
    (line("", "x", "y"), "got ''"),
    (line(2, "x", "y"), "got '2'"), (line("nan", "x", "y"), "got 'nan'"), (line("1", "", "y"), "text1 is empty"),
    (line("1", "x", ""), "text2 is empty"), (b"1\t2\t3\tna\xefve\ty\n", "byte 0xef of a text is not UTF-8"),
    (b"1\t2\t3\tx\ty\xff\n", "byte 0xff"), (b"\xff\t2\t3\tx\ty\n", "label is 0 or 1")],
    ids=["ids only", "four", "blank", "six", "word", "no label", "two", "nan", "text1", "text2", "latin-1", "byte",
         "label byte"])
def test_bad_lines_are_named_and_nothing_is_cached(tmp_path, bad, what):
    folder = write(tmp_path / "aan")
    path = folder / FILES["val"]
    path.write_bytes(line(0, "x", "y") * 2 + bad + line(0, "x", "y"))
    refused(Retrieval(data_dir=folder).prepare, str(path), "line 3", what)
    assert not [p for p in folder.iterdir() if p.is_dir()]


def test_empty_file(tmp_path):
    folder = write(tmp_path / "aan")
    (folder / FILES["test"]).write_bytes(b"")
    refused(Retrieval(data_dir=folder).prepare, FILES["test"], "no row")


def test_a_missing_file_is_named(tmp_path):
    for split in SPLITS:
        folder = write(tmp_path / split)
        (folder / FILES[split]).unlink()
        task = Retrieval(data_dir=folder)
        refused(task.prepare, FILES[split], "complete")
        assert task.state().startswith("missing") and FILES[split] in task.state()


@pytest.mark.parametrize("place", ["aan", "lra_release/lra_release/tsv_data", "lra_release/tsv_data", "tsv_data"])
def test_every_layout_is_found(data_path, place):
    folder = write(data_path / place)
    task = Retrieval()
    assert task.state() == f"read from {folder}" and not (data_path / "aan" / "x").exists()
    assert len(task.prepare().train) == 4 and task.cache.parent == data_path / "aan"


def test_a_folder_below_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "own")
    assert len(Retrieval(data_dir="~/own").prepare().train) == len(ROWS["train"])


@pytest.mark.parametrize("own", [False, True], ids=["DATA_PATH", "data_dir"])
def test_from_the_archive(data_path, tmp_path, own):
    source, data_dir = write(tmp_path / "source"), tmp_path / "mine" if own else None
    data_path.mkdir()
    with tarfile.open(data_path / "lra_release.gz", "w:gz") as tar:
        for name in FILES.values():
            tar.add(source / name, f"lra_release/lra_release/tsv_data/{name}")
            info = tarfile.TarInfo(f"lra_release/lra_release/listops-1000/{name}")
            tar.addfile(info, io.BytesIO())
    task, place = Retrieval(data_dir=data_dir), (data_dir or data_path) / "aan"
    assert task.state() == f"read from {data_path / 'lra_release.gz'}"
    assert len(task.prepare().train) == 4 and (place / FILES["val"]).exists()
    assert not list(tmp_path.rglob("listops*")) and Retrieval(data_dir=data_dir).state() == f"read from {place}"


# ---- ids

@pytest.mark.parametrize("bos", [False, True], ids=["", "bos"])
@pytest.mark.parametrize("eos", [False, True], ids=["", "eos"])
@pytest.mark.parametrize("l_max", [5, 17, 4000])
def test_ids_are_those_of_a_literal_reading(tmp_path, l_max, bos, eos):
    task = Retrieval(data_dir=write(tmp_path / "aan"), l_max=l_max, append_bos=bos, append_eos=eos).prepare()
    room = l_max - bos - eos
    counts = Counter(c for _, *texts in ROWS["train"] for text in texts for c in text[:room])
    vocab = vocabulary(counts, ["<pad>", "<unk>"] + ["<bos>"] * bos + ["<eos>"] * eos)
    assert task.vocabulary == vocab and list(task.vocabulary) == list(vocab) and task.n_tokens == len(vocab)
    for split in SPLITS:
        data = task.dataset(split)
        assert data.labels.tolist() == [y for y, *_ in ROWS[split]] and len(data) == len(ROWS[split])
        for i, (y, *texts) in enumerate(ROWS[split]):
            xs, label = data[i]
            assert label == y and [x.tolist() for x in xs] == [encode(t, vocab, l_max) for t in texts]
            assert data.lengths[i] == max(map(len, xs)) and all(x.dtype == torch.int64 for x in xs)
    if l_max == 4000: assert vocab["<unk>"] in task.val[0][0][0]        # é is not in train


def test_a_document_is_stored_once(tmp_path):
    task = Retrieval(data_dir=write(tmp_path / "aan")).prepare()
    texts = {t for rows in ROWS.values() for _, *ts in rows for t in ts}
    assert task.facts["documents"] == len(texts) and task.facts["characters"] == sum(map(len, texts))
    assert task.train.tokens.dtype == torch.uint8 and not list(task.cache.glob("documents*"))
    short = Retrieval(data_dir=tmp_path / "aan", l_max=3).prepare()     # texts that are equal as far as they are read
    assert short.facts["documents"] == len({t[:2] for t in texts})


def test_wide_alphabet(tmp_path):
    letters = "".join(map(chr, range(0x4E00, 0x4E00 + 400))) + "\U0001F600"
    rows = {"train": [(1, letters, letters[::-1]), (0, letters[:300], "x")], "val": [(1, "x", "y")],
            "test": [(0, letters, "x")]}
    task = Retrieval(data_dir=write(tmp_path / "aan", rows)).prepare()
    assert task.n_tokens == 3 + 402 and task.train.tokens.dtype == torch.int16
    for split, part in rows.items():
        for i, (_, *texts) in enumerate(part):
            assert [x.tolist() for x in task.dataset(split)[i][0]] == [encode(t, task.vocabulary) for t in texts]


@pytest.mark.parametrize("n", [253, 254], ids=["a byte", "two bytes"])
def test_storage_at_the_edge(tmp_path, n):
    letters = "".join(map(chr, range(0x100, 0x100 + n)))
    facts = store_pairs(tmp_path, {s: [(1, letters, letters)] for s in SPLITS}, 4000)
    data = retrieval.map_rows(tmp_path / "tokens.npy")
    assert data.dtype == (torch.uint8 if n == 253 else torch.int16) and len(facts["vocabulary"]) == n + 3
    assert data.tolist() == [facts["vocabulary"][c] for c in letters]


def test_too_wide_alphabet(tmp_path):
    letters = "".join(map(chr, range(0x10000, 0x10000 + (1 << 15))))
    refused(lambda: store_pairs(tmp_path, {s: [(1, letters, letters)] for s in SPLITS}, 1 << 20), "distinct characters")


def test_memory_is_bounded(tmp_path):
    rng = random.Random(0)
    documents = ["".join(rng.choices("abcdefgh ", k=10_000)) for _ in range(20)]
    rows = [(0, *rng.choices(documents, k=2)) for _ in range(1500)]
    folder = write(tmp_path / "aan", {"train": rows, "val": rows[:1], "test": rows[:1]})
    tracemalloc.start()
    task = Retrieval(data_dir=folder).prepare()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert task.facts["documents"] == 20 and (folder / FILES["train"]).stat().st_size > 3e7 and peak < 15e6, peak


# ---- batches

def test_batch_of_the_reference(tmp_path):
    task = Retrieval(data_dir=write(tmp_path / "aan"), l_max=16).prepare()
    items = [task.train[i] for i in range(4)]
    batch = pair_batch(items)
    pad = lambda xs: torch.nn.utils.rnn.pad_sequence(xs, batch_first=True)
    first, second = (pad([item[0][k] for item in items]) for k in (0, 1))
    length = max(first.shape[1], second.shape[1])
    full = [torch.nn.functional.pad(x, (0, length - x.shape[1])) for x in (first, second)]
    assert torch.equal(batch.x, torch.cat(full)) and batch.x.dtype == batch.y.dtype == torch.int64
    assert batch.y.tolist() == [1, 0, 1, 0] and batch.rate == 1
    assert batch.lengths.tolist() == [len(item[0][k]) for k in (0, 1) for item in items]
    assert pair_batch(items[3:]).lengths is None                        # all of one length
    refused(lambda: task.collate(items, rate=2), "rate")


def test_loader_gives_each_pair_once(tmp_path):
    rng = random.Random(0)
    rows = {s: [(i % 2, "x" * rng.randint(1, 90), "y" * (i + 1)) for i in range(23)] for s in SPLITS}
    task = Retrieval(data_dir=write(tmp_path / "aan", rows)).prepare()
    assert task.pairs and task.d_output == 2 and task.kind == "classification"
    for bucket in (1, 3):
        seen = []
        for x, y, lengths, _ in task.loader("train", batch_size=4, bucket=bucket):
            assert len(x) == 2 * len(y)
            lengths = torch.full((len(x),), x.shape[1]) if lengths is None else lengths
            seen += [(int(n) - 2, int(label)) for n, label in zip(lengths[len(y):], y)]
        assert sorted(seen) == [(i, i % 2) for i in range(23)]


# ---- caches and cards

def test_cache_is_keyed_on_every_option(tmp_path):
    folder = write(tmp_path / "aan")
    options = [{}, {"l_max": 30}, {"append_bos": True}, {"append_eos": False}]
    caches = [Retrieval(data_dir=folder, **o).prepare().cache for o in options]
    assert len(set(caches)) == len(options) and caches[0] == Retrieval(data_dir=folder, seed=5).prepare().cache
    write(folder, {**ROWS, "val": ROWS["val"] * 2})
    again = Retrieval(data_dir=folder).prepare()
    assert again.cache not in caches and len(again.val) == 2
    tree = write_tree(tmp_path / "man")
    pages = [Retrieval("manpages", data_dir=tree, **o).prepare().cache for o in options + [{"seed": 1}]]
    assert len(set(pages)) == 5


def test_a_ready_made_cache_where_one_may_only_read_is_used(tmp_path, monkeypatch):
    made = Retrieval(data_dir=write(tmp_path / "aan")).prepare().cache
    monkeypatch.setattr("os.access", lambda path, mode: False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own"))
    assert Retrieval(data_dir=tmp_path / "aan").prepare().cache == made and not (tmp_path / "own").exists()
    other = Retrieval(data_dir=tmp_path / "aan", l_max=7).prepare().cache
    assert tmp_path / "own" in other.parents and len(list((tmp_path / "aan").glob("lra-aan-*"))) == 1


def test_damaged_cache(tmp_path):
    task = Retrieval(data_dir=write(tmp_path / "aan")).prepare()
    for name in ("tokens.npy", "pairs.pt", "manifest.json"):
        path = task.cache / name
        whole = path.read_bytes()
        path.write_bytes(whole[:-3])
        refused(Retrieval(data_dir=tmp_path / "aan").prepare, str(path), "delete")
        path.write_bytes(whole)
    Retrieval(data_dir=tmp_path / "aan").prepare()


def test_cards(tmp_path):
    before = Retrieval()
    assert before.state().startswith("download") and not (tmp_path / "data").exists()
    assert before.card.splits == COUNTS and before.n_tokens == 98 and "AAN" in before.card.source
    assert Retrieval(append_bos=True).n_tokens == 99 and Retrieval(append_eos=False).n_tokens == 97
    card = Retrieval(data_dir=write(tmp_path / "aan")).prepare().card
    assert card.splits == {"train": 4, "val": 1, "test": 1} and card.published["S4-LegS (HTTYH)"] == 90.90
    assert card.baseline["majority class, train"] == "50.0 %" and "distinct documents" in str(card)
    pages = Retrieval("manpages", data_dir=write_tree(tmp_path / "man"))
    assert not pages.card.splits and not pages.card.published and "twin, not AAN" in pages.card.variant
    assert "9.9" in pages.prepare().card.variant and "AAN" not in pages.card.name + pages.card.source


def test_bad_options():
    refused(lambda: Retrieval("aan"), "'aan' is unknown", "lra-aan", "manpages")
    refused(lambda: Retrieval(l_max=1), "at least 2", "got 1")
    refused(lambda: Retrieval(l_max=2, append_bos=True), "at least 3")
    refused(lambda: Retrieval(l_max="4000"), "whole number", "got '4000'")
    refused(lambda: Retrieval(l_max=4.5), "whole number", "got 4.5")
    assert Retrieval(l_max=1, append_eos=False).l_max == 1


# ---- manual pages

def page(name, section, see_also="", body="It does.", title="Linux man-pages 9.9"):
    cited = "".join(f".BR {n} ({s}),\n" for n, s in see_also)
    return f'.\\" a comment\n.TH {name} {section} 2024 "{title}"\n.SH NAME\n{name} \\- a page\n' \
           f".SH DESCRIPTION\n{body}\n" + f".SH SEE ALSO\n{cited}" * bool(cited)


def write_page(tree, name, section, *args, packed=True, **more):
    path = tree / f"man{section[0]}" / f"{name}.{section}{'.gz' * packed}"
    path.parent.mkdir(parents=True, exist_ok=True)
    data = page(name, section, *args, **more).encode()
    path.write_bytes(gzip.compress(data) if packed else data)
    return path


def write_tree(tree, n=90, seed=0):
    rng = random.Random(seed)
    names = [(f"p{i}", str(2 + i % 2)) for i in range(n)]
    for i, (name, section) in enumerate(names):
        write_page(tree, name, section, rng.sample(names[:i] + names[i + 1:], 4), body=f"This is {name} of {i}.")
    return tree


def test_pages_and_citations(tmp_path):
    write_page(tmp_path, "open", "2", [("close", "2"), ("openat", "2"), ("open", "2"), ("close", "2"), ("gone", "3")])
    write_page(tmp_path, "close", "2", packed=False)
    write_page(tmp_path, "queue", "7", [("creat", "2"), ("old", "2"), ("ls", "1")], body="See\n.BR close (2).")
    write_page(tmp_path, "ls", "1", [("open", "2")], title="GNU coreutils")
    write_page(tmp_path / "de", "open", "2", body="Deutsch")
    (tmp_path / "man2" / "creat.2.gz").symlink_to("open.2.gz")
    (tmp_path / "man2" / "broken.2.gz").symlink_to("nowhere.2.gz")
    (tmp_path / "man2" / "openat.2").write_text(".so man2/creat.2\n")
    (tmp_path / "man2" / "old.2.gz").write_bytes(gzip.compress(b'.\\" moved\n.so man2/loop.2'))
    (tmp_path / "man2" / "loop.2").write_text(".so man2/old.2\n")                # leads nowhere
    texts, links, release = manual_pages(tmp_path)
    assert sorted(texts) == ["close(2)", "open(2)", "queue(7)"] and release == "9.9"
    assert links == {"open(2)": ["close(2)"], "close(2)": [], "queue(7)": ["open(2)"]}
    assert texts["queue(7)"] == "NAME\nqueue - a page\nDESCRIPTION\nSee\nclose(2)."
    assert not any("SEE ALSO" in text or "comment" in text for text in texts.values())


def test_older_releases_are_recognised(tmp_path):
    old = page("open", "2", [("close", "2")], title="Linux Programmer's Manual") + \
        '.SH COLOPHON\nThis page is part of release 5.10 of the Linux\n.I man-pages\nproject.\n'
    (tmp_path / "man2").mkdir()
    (tmp_path / "man2" / "open.2").write_text(old)
    texts, _, release = manual_pages(tmp_path)
    assert list(texts) == ["open(2)"] and release == "5.10"


def test_damaged_page(tmp_path):
    path = write_page(tmp_path, "open", "2")
    whole = path.read_bytes()
    for data in (whole[:-9], b"not gzip", whole[:20] + b"\xff" * 9 + whole[29:]):
        path.write_bytes(data)
        refused(lambda: manual_pages(tmp_path), str(path), "install its package again")


def test_bytes_that_are_not_utf8_become_one_character(tmp_path):
    (tmp_path / "man2").mkdir()
    (tmp_path / "man2" / "x.2").write_bytes(page("x", "2", body="na\u00efve").encode("latin-1"))
    assert "na\ufffdve" in manual_pages(tmp_path)[0]["x(2)"]


@pytest.mark.parametrize("roff, text", [
    ("a\\-b \\e \\& \\fBc\\fP \\f(BId\\fR \\s-1E\\s0", "a-b \\  c d E"),
    ("\\(aqx\\(aq \\[dq]y\\[dq] \\*(lqz\\*(rq", "'x' \"y\" \"z\""),
    ('.BI "int f(int " a ", int " b );', "int f(int a, int b);"), (".B one two", "one two"), (".IP * 4", "* 4"),
    (".TP\n.PP\n.in +4\nx", "x"), ('x \\" comment', "x "), ("'\\\" t\nx", "x"), ("a \\\nb", "a b"), ("\n\nx\n", "x"),
    ("", "")])
def test_rendering(roff, text):
    assert render(roff) == text


def test_sections_are_known_by_their_title():
    roff = '.TH x\n.SH "SEE ALSO"\na\n.SH NAME\nb\n.\\".SH NO\n.SH see also\nc\n'
    assert sections(roff) == [("SEE ALSO", "a"), ("NAME", "b"), ("SEE ALSO", "c")]


@pytest.mark.parametrize("seed", range(3))
def test_pairs_of_a_random_graph(seed):
    rng = random.Random(seed)
    names = [f"p{i}({2 + i % 3})" for i in range(300)]
    cited = lambda: rng.choices(names, [1 / (9 + k) for k in range(300)], k=6)
    links = {a: sorted(set(cited()) - {a}) for a in names}
    drawn = draw_pairs(links, seed)
    assert drawn == draw_pairs(links, seed) != draw_pairs(links, seed + 1)
    pairs = {s: {frozenset(ab) for _, *ab in rows} for s, rows in drawn.items()}
    assert not pairs["train"] & pairs["val"] and not pairs["train"] & pairs["test"] and not pairs["val"] & pairs["test"]
    total = sum(map(len, drawn.values()))
    assert 0.9 * 2 * sum(map(len, links.values())) < total
    assert len({tuple(r) for rows in drawn.values() for r in rows}) == total
    for split, rows in drawn.items():
        no, yes = ([r for r in rows if r[0] == y] for y in (0, 1))
        assert len(no) == len(yes) > 100 and Counter(a for _, a, _ in no) == Counter(a for _, a, _ in yes)
        off = Counter(b for _, _, b in no)
        off.subtract(Counter(b for _, _, b in yes))
        assert sum(map(abs, off.values())) < 0.1 * len(rows)            # left-outs
        sections_ = [Counter(b[-3:] for _, _, b in part) for part in (no, yes)]
        assert sections_[0] == sections_[1]
        for y, a, b in rows:
            assert a != b and (b in links[a]) == y and (y or a not in links[b])
            roles = {role(a, seed), role(b, seed)}
            assert split == ("test" if "test" in roles else "val" if "val" in roles else "train")
    negatives = [frozenset(ab) for rows in drawn.values() for y, *ab in rows if not y]
    assert len(negatives) == len(set(negatives))


def test_roles_do_not_depend_on_what_else_is_installed():
    names = [f"p{i}(2)" for i in range(3000)]
    shares = Counter(role(name, 0) for name in names)
    assert abs(shares["test"] - 300) < 70 and abs(shares["val"] - 300) < 70        # four standard errors
    assert sum(role(n, 0) != role(n, 1) for n in names) > 500


def test_the_twin_from_pages_to_batches(tmp_path, data_path):
    tree = write_tree(tmp_path / "man")
    task = Retrieval("manpages", data_dir=tree).prepare()
    texts, links, _ = manual_pages(tree)
    by_text = {text: name for name, text in texts.items()}
    drawn = draw_pairs(links, 0)
    letters = list(task.vocabulary)
    decode = lambda x: "".join(letters[k] for k in x[:-1])
    for split in SPLITS:
        rows = [(y, *(by_text[decode(x)] for x in xs)) for xs, y in task.dataset(split)]
        assert rows == drawn[split] and task.majority(split)[1] == 0.5
    assert task.cache.parent == data_path / "manpages" and not list(tree.glob("manpages*"))
    assert next(iter(task.loader("test", batch_size=2))).x.shape[0] == 4


def test_absent_manual_pages(tmp_path, data_path, monkeypatch):
    place = write_tree(tmp_path / "standard")
    write_page(place, "intro", "2")
    for task in (Retrieval("manpages"), Retrieval("manpages", data_dir=tmp_path)):
        assert task.state().startswith("missing: install the Debian packages manpages")
        refused(task.prepare, "install the Debian packages manpages and manpages-dev")
    monkeypatch.setattr(retrieval, "STANDARD_PLACE", place)
    assert Retrieval("manpages").state() == f"generate: about 5 s, from {place}" and not data_path.exists()
    assert Retrieval("manpages").prepare().facts["pairs"]["train"] > 100
    few = write_tree(tmp_path / "few", n=6)
    refused(Retrieval("manpages", data_dir=few).prepare, "6 pages", "install the Debian packages")
