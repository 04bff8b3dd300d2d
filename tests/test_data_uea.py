"""The UEA archive: the format and its faults, folders and zips, the twin, splits, rates, missing values."""

import pickle
import zipfile

import numpy as np
import pytest
import torch

from s4nb.data import uea
from s4nb.data.uea import UEA, TsFile, find_ts, stratified, write_ts

HEADER = ["@problemName X", "@timeStamps false", "@missing false", "@univariate false", "@dimensions 2",
          "@equalLength true", "@seriesLength 3", "@classLabel true red blue", "@data"]


def ts(path, rows, **header):
    "A file of HEADER with some lines replaced, or left out (''): ts(…, missing='true')."
    lines = [f"@{w} {header.get(w, rest)}" if rest else line
             for line in HEADER for w, _, rest in [line[1:].partition(" ")] if header.get(w) != ""]
    path.write_text("\n".join(["# a comment", *lines, *rows]) + "\n")
    return path


def problem(folder, name="Mine", n=20, d=2, seed=0, lengths=(8, 20), gaps=False):
    "A random problem of two classes in two files."
    rng = np.random.default_rng(seed)
    for split in ("TRAIN", "TEST"):
        series = [rng.normal(3, 2, (int(rng.integers(*lengths)), d)).astype(np.float32) for _ in range(n)]
        if gaps: series[0][2, 0] = np.nan
        examples = [(x, ("red", "blue")[i % 2]) for i, x in enumerate(series)]
        write_ts(folder / f"{name}_{split}.ts", name, ["red", "blue"], examples)
    return folder


# ---- the format -----------------------------------------------------------------------------------------------------
def test_values_missing_ones_comments_and_blank_lines(tmp_path):
    file = TsFile(ts(tmp_path / "a.ts", ["1,2,3:4, 5 ,?:red", "", "# more", "-1e3,0,NaN:0,0,0: blue "]))
    assert file.header["dimensions"] == 2 and file.header["equallength"] and file.classes == ["red", "blue"]
    (a, red), (b, blue) = file
    assert (red, blue) == ("red", "blue") and a.dtype == np.float32
    assert np.array_equal(a, [[1, 4], [2, 5], [3, np.nan]], equal_nan=True)
    assert np.array_equal(b, [[-1000, 0], [0, 0], [np.nan, 0]], equal_nan=True)


def test_letters_of_the_header_may_be_large_or_small_and_marks_of_the_order_of_bytes_stand_before_it(tmp_path):
    ts(tmp_path / "a.ts", ["1,2,3:4,5,6:red"])
    text = (tmp_path / "a.ts").read_text().replace("# a comment\n", "").replace("@data", "@DATA")
    (tmp_path / "a.ts").write_text("\ufeff" + text.replace("@classLabel", "@CLASSLABEL"), encoding="utf-8")
    assert len(list(TsFile(tmp_path / "a.ts"))) == 1


def test_a_file_as_the_documentation_of_the_format_shows_it(tmp_path):
    text = "#Four classes.\n#\n@problemName BasicMotions\n@timeStamps false\n@missing false\n@univariate false\n" \
        "@dimension 2\n@equalLength true\n@seriesLength 4\n@classLabel true Standing Running\n  @data\n" \
        "-0.740653,-0.740653,10.208449,2.867009:-0.194301,-0.194301,-0.249618,0.516079:Standing\n"
    (tmp_path / "a.ts").write_text(text.replace("\n", "\r\n"))
    file = TsFile(tmp_path / "a.ts")
    (x, label), = file
    assert label == "Standing" and x.shape == (4, 2) and x[2, 0] == np.float32(10.208449) and file.header["dimensions"] == 2


def test_a_short_channel_ends_with_missing_values(tmp_path):
    file = TsFile(ts(tmp_path / "a.ts", ["1,2,3:4:red", "1:2,3:blue"], equalLength="false"))
    (a, _), (b, _) = file
    assert np.array_equal(a, [[1, 4], [2, np.nan], [3, np.nan]], equal_nan=True)
    assert np.array_equal(b, [[1, 2], [np.nan, 3]], equal_nan=True)


NO_SIZES = {"dimensions": "", "seriesLength": ""}
FAULTS = {
    "value": (["1,2,x:4,5,6:red"], {}, 11, "not a number: .*'x'"),
    "empty": (["1,2,:4,5,6:red"], {}, 11, "not a number"),
    "class": (["1,2,3:4,5,6:red", "1,2,3:4,5,6:green"], {}, 12, "the class 'green' is none of red, blue"),
    "channels": (["1,2,3:red"], {}, 11, "1 channels, 2 are expected"),
    "univariate": (["1,2,3:4,5,6:red"], {"univariate": "true"}, 11, "2 channels, 1 are expected"),
    "uneven": (["1,2,3:4,5:red"], {}, 11, "the channels have 3, 2 values, all must have 3"),
    "length": (["1,2:4,5:red"], {}, 11, "2, 2 values, all must have 3"),
    "no label": (["1,2,3:4,5,6"], {}, 11, "the class '4,5,6' is none of"),
    "infinite": (["1,2,3:4,inf,6:red"], {}, 11, "value 2 of a channel is infinite"),
    "too large": (["1,2,3:4,5,1e39:red"], {}, 11, "value 3 of a channel is infinite"),
    "other channels": (["1,2,3:4,5,6:red", "1,2,3:red"], NO_SIZES, 10, "1 channels, 2 are expected"),
    "other length": (["1,2,3:4,5,6:red", "1,2:4,5:red"], NO_SIZES, 10, "2, 2 values, all must have 3"),
    "times": ([], {"timeStamps": "true"}, 3, "values with times of their own are not read"),
    "flag": ([], {"missing": "perhaps"}, 4, "@missing is true or false, got perhaps"),
    "number": ([], {"dimensions": "two"}, 6, "@dimensions is a number"),
    "unlabelled": ([], {"classLabel": "false"}, 10, "no '@classLabel true"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_names_file_and_line(tmp_path, fault):
    rows, header, line, said = FAULTS[fault]
    with pytest.raises(ValueError, match=f"bad.ts, line {line}: .*{said}.*; restore the file or correct the line"):
        list(TsFile(ts(tmp_path / "bad.ts", rows, **header)))


def test_no_data_and_text_before_it(tmp_path):
    (tmp_path / "a.ts").write_text("@problemName X\n@classLabel true a\n")
    with pytest.raises(ValueError, match="line 2: the file ends without @data"): TsFile(tmp_path / "a.ts")
    (tmp_path / "a.ts").write_text("<html>\n")
    with pytest.raises(ValueError, match="line 1: '<html>.*stands before @data"): TsFile(tmp_path / "a.ts")


def test_what_is_written_is_read(tmp_path):
    x = np.float32([[1.5, np.nan], [-2.25, 1e-7], [3, 1e6]])
    write_ts(tmp_path / "a.ts", "A", ["p", "q"], [(x, "q")])
    (y, label), = TsFile(tmp_path / "a.ts")
    assert np.allclose(x, y, rtol=1e-4, equal_nan=True) and label == "q"


# ---- the task -------------------------------------------------------------------------------------------------------
def test_normalised_by_train_alone_and_missing_values_are_the_mean(tmp_path):
    task = UEA("Mine", data_dir=problem(tmp_path, gaps=True), val=0.2).prepare()
    assert (task.d_input, task.d_output, task.facts["train"]["missing"]) == (2, 2, 1)
    raw = [torch.from_numpy(x) for x, _ in TsFile(tmp_path / "Mine_TRAIN.ts")]
    train = torch.cat([raw[i] for i in task.train.index])
    mean = torch.tensor([c[~c.isnan()].double().mean() for c in train.T]).float()
    std = torch.tensor([c[~c.isnan()].double().std(correction=0) for c in train.T]).float()
    for part in (task.train, task.val):
        for k, i in enumerate(part.index):
            x, y = part[k]
            assert y == int(i) % 2 and torch.allclose(x, ((raw[i] - mean) / std).nan_to_num(), atol=1e-5)
    (test, _), *_ = TsFile(tmp_path / "Mine_TEST.ts")
    assert torch.allclose(task.test[0][0], ((torch.from_numpy(test) - mean) / std).nan_to_num(), atol=1e-5)
    assert len(task.val) == 4 and task.majority("val")[1] == 0.5
    assert not set(task.train.index.tolist()) & set(task.val.index.tolist())


def test_a_constant_channel_does_no_harm(tmp_path):
    for split in ("TRAIN", "TEST"):
        write_ts(tmp_path / f"C_{split}.ts", "C", ["a"], [(np.float32([[7, i]] * 5), "a") for i in range(4)])
    x, _ = UEA("C", data_dir=tmp_path).train[0]
    assert torch.isfinite(x).all() and (x[:, 0] == 0).all()


def test_found_in_folders_and_zips(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="has one of Mine_TRAIN.ts and Mine_TEST.ts; add the other"):
        problem(tmp_path)
        (tmp_path / "Mine_TEST.ts").unlink()
        UEA("Mine", data_dir=tmp_path).prepare()
    problem(tmp_path)
    with zipfile.ZipFile(tmp_path / "Mine.zip", "w") as z:
        for name in ("Mine_TRAIN.ts", "Mine_TEST.ts"): z.write(tmp_path / name, f"some/folder/{name}")
        z.writestr("Mine_TRAIN.arff", "not wanted")
    plain = UEA("Mine", data_dir=tmp_path).test[0]
    for name in ("Mine_TRAIN.ts", "Mine_TEST.ts"): (tmp_path / name).unlink()
    monkeypatch.setenv("DATA_PATH", str(tmp_path))                           # the zip lies in DATA_PATH itself
    task = UEA("Mine")
    assert task.state() == f"read from {tmp_path / 'Mine.zip'}"
    assert torch.equal(task.test[0][0], plain[0])
    assert sorted(p.name for p in (tmp_path / "uea/Mine").iterdir()) == ["Mine_TEST.ts", "Mine_TRAIN.ts"]
    assert find_ts("Mine", None) == tmp_path / "uea/Mine"
    (tmp_path / "uea/Multivariate_ts").mkdir()                               # as the archive of all problems unpacks
    (tmp_path / "uea/Mine").rename(tmp_path / "uea/Multivariate_ts/Mine")
    assert find_ts("Mine", None) == tmp_path / "uea/Multivariate_ts/Mine"
    assert UEA("character-trajectories").state() == "download: CharacterTrajectories.zip, size unknown"


def test_what_is_nowhere_is_fetched_under_its_own_name(tmp_path, monkeypatch):
    asked = []
    def fetched(source, folder):
        asked.append(source.url)
        problem(tmp_path, "Heartbeat")
        folder.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(folder / "Heartbeat.zip", "w") as z:
            for split in ("TRAIN", "TEST"): z.write(tmp_path / f"Heartbeat_{split}.ts", f"Heartbeat_{split}.ts")
        return folder / "Heartbeat.zip"
    monkeypatch.setattr(uea, "fetch", fetched)
    assert len(UEA("Heartbeat", data_dir=tmp_path / "data").test) == 20
    assert asked == ["https://www.timeseriesclassification.com/aeon-toolkit/Heartbeat.zip"]


def test_a_damaged_file_is_never_cached(tmp_path):
    problem(tmp_path)
    good = (tmp_path / "Mine_TEST.ts").read_text()
    (tmp_path / "Mine_TEST.ts").write_text(good + "1,2:3,4,5:6:red\n")
    with pytest.raises(ValueError, match="Mine_TEST.ts, line 28: 3 channels, 2 are expected"):
        UEA("Mine", data_dir=tmp_path).prepare()
    assert not list(tmp_path.glob("Mine-*")) and not list(tmp_path.glob(".*.tmp"))
    (tmp_path / "Mine_TEST.ts").write_text(good)
    assert len(UEA("Mine", data_dir=tmp_path).test) == 20


def test_two_files_that_do_not_belong_together(tmp_path):
    problem(tmp_path)
    problem(tmp_path, "Three", d=3)
    (tmp_path / "Three_TEST.ts").rename(tmp_path / "Mine_TEST.ts")
    with pytest.raises(ValueError, match="TRAIN.ts has 2 channels, .*TEST.ts 3; are they of one problem"): UEA("Mine", data_dir=tmp_path).prepare()
    write_ts(tmp_path / "Mine_TEST.ts", "Mine", ["red", "green"], [(np.ones((4, 2), np.float32), "green")])
    with pytest.raises(ValueError, match="the class 'green' is none of train's red, blue"):
        UEA("Mine", data_dir=tmp_path).prepare()


def test_a_zip_with_one_of_the_two(tmp_path):
    problem(tmp_path)
    with zipfile.ZipFile(tmp_path / "Mine.zip", "w") as z: z.write(tmp_path / "Mine_TEST.ts", "Mine_TEST.ts")
    for name in ("Mine_TRAIN.ts", "Mine_TEST.ts"): (tmp_path / name).unlink()
    with pytest.raises(ValueError, match="has one of Mine_TRAIN.ts and Mine_TEST.ts; add the other"):
        UEA("Mine", data_dir=tmp_path).prepare()


def test_a_folder_one_only_reads(tmp_path, monkeypatch):
    cache, data = tmp_path / "cache", tmp_path / "data"
    monkeypatch.setattr(uea, "cache_base", lambda folder: cache)
    data.mkdir()
    problem(tmp_path)
    with zipfile.ZipFile(data / "Mine.zip", "w") as z:
        for name in ("Mine_TRAIN.ts", "Mine_TEST.ts"): z.write(tmp_path / name, name)
    for name in ("Mine_TRAIN.ts", "Mine_TEST.ts"): (tmp_path / name).unlink()
    assert uea.get_ts("Mine", data) == cache / "Mine" == find_ts("Mine", data)
    assert [p.name for p in data.iterdir()] == ["Mine.zip"]


def test_the_card_before_and_after(tmp_path):
    card = UEA("character-trajectories", data_dir=tmp_path).card
    assert "CC BY 4.0" in card.licence and card.size == "download: size unknown; prepared up to 6.2 MB"
    card = UEA("Heartbeat", data_dir=tmp_path).card
    assert "None" not in str(card) and card.size == "download: size unknown"
    task = UEA("Mine", data_dir=problem(tmp_path, n=200)).prepare()
    made = sum(p.stat().st_size for p in task.cache.glob("*.f32"))
    assert f"prepared {made / 1e6:.1f} MB" in task.card.size and task.card.length == "8–19 steps"


@pytest.fixture(scope="module")
def pen(tmp_path_factory):
    "The twin in small: its folder and its arguments."
    return {"data_dir": tmp_path_factory.mktemp("pen"), "sizes": {"train": 60, "test": 40}}


def test_the_twin_is_named_so_and_the_same_every_time(pen, tmp_path):
    assert UEA("pen-twin", data_dir=tmp_path).state().startswith("generate")
    a, b = UEA("pen-twin", **pen).prepare(), UEA("pen-twin", data_dir=tmp_path, sizes=pen["sizes"])
    assert torch.equal(a.test[3][0], b.test[3][0]) and a.test[3][1] == b.test[3][1]
    assert not torch.equal(UEA("pen-twin", seed=1, **pen).test[3][0][:50], a.test[3][0][:50])
    assert "twin" in a.card.variant and "no handwriting" in a.card.variant and not a.card.published
    assert sorted(np.bincount(a.test.labels)) == [2] * 20 and a.card.splits == {"train": 40, "val": 20, "test": 40}
    assert not list(a.cache.glob("*.ts")) and a.state() == f"ready: {a.cache}"


@pytest.mark.parametrize("train_rate, test_rate, told", [(1, 2, True), (2, 1, True), (1, 2, False)])
def test_rates_of_train_and_test(pen, train_rate, test_rate, told):
    task = UEA("pen-twin", train_rate=train_rate, test_rate=test_rate, told=told, **pen)
    for split, rate in (("train", train_rate), ("val", train_rate), ("test", test_rate)):
        batch = next(iter(task.loader(split, 8, shuffle=False)))
        assert batch.rate == (rate if told else 1)
        for k, (x, l) in enumerate(zip(batch.x, batch.lengths)):
            assert torch.equal(x[:l], task.dataset(split)[k][0][::rate]) and (x[l:] == 0).all()
    assert next(iter(task.loader("test", 8, rate=4))).rate == (4 if told else 1)


def test_missing_steps(pen):
    task, full = UEA("pen-twin", missing=0.4, **pen), UEA("pen-twin", **pen)
    assert task.d_input == 4 and "40 % of the steps left out" in task.card.variant
    seen = []
    for k in range(8):
        (x, _), (z, _) = task.test[k], full.test[k]
        assert len(x) == len(z) - int(0.4 * len(z)) == task.test.lengths[k] and torch.equal(x, task.test[k][0])
        at = (x[:, 0] * (task.facts["train"]["longest"] - 1)).round().long()
        assert (at.diff() > 0).all() and torch.equal(x[:, 1:], z[at])
        seen.append(tuple(at.tolist()))
    assert len(set(seen)) == 8
    batch = next(iter(task.loader("test", 8)))
    assert torch.equal(batch.lengths, task.test.lengths[:8])


def test_workers_and_pickle_give_the_same(pen):
    task = UEA("pen-twin", missing=0.4, **pen)
    for a, b in zip(task.loader("train", 8, workers=2), task.loader("train", 8), strict=True):
        assert torch.equal(a.x, b.x) and torch.equal(a.y, b.y)
    again = pickle.loads(pickle.dumps(task.val))
    assert torch.equal(again[3][0], task.val[3][0])


def test_options_that_are_refused():
    for bad in ({"val": 0}, {"val": 1}, {"missing": 1}):
        with pytest.raises(ValueError, match="val is a share between 0 and 1"): UEA("pen-twin", **bad)
    for bad in ({"train_rate": 0}, {"test_rate": 1.5}, {"missing": 0.1, "test_rate": 2}):
        with pytest.raises(ValueError, match="rates are whole numbers"): UEA("pen-twin", **bad)


@pytest.mark.parametrize("share", [0.1, 0.25])
def test_the_split_keeps_the_proportions(share):
    labels = np.repeat([0, 1, 2], [40, 100, 8])
    rest, part = stratified(labels, share, seed=3)
    assert sorted([*rest.tolist(), *part.tolist()]) == list(range(148))
    assert np.bincount(labels[part]).tolist() == [round(share * n) for n in (40, 100, 8)]
    assert torch.equal(part, stratified(labels, share, seed=3)[1])


def test_the_split_leaves_each_class_on_both_sides_where_it_can():
    labels = np.array([0, 0, 1, 2, 2, 2])
    for share in (0.01, 0.99):
        rest, part = stratified(labels, share, 0)
        assert set(labels[rest]) == {0, 1, 2} and set(labels[part]) == {0, 2}
    with pytest.raises(ValueError, match="every class has a single series"): stratified(np.arange(4), 0.5, 0)
