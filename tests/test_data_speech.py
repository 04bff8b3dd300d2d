"""Speech Commands: folders and archives in the true layout, splits, caches, rates, and what can be wrong."""
import json
import os
import shutil
import tarfile

import numpy as np
import pytest
import torch

soundfile = pytest.importorskip("soundfile")

from s4nb.data import speech  # noqa: E402
from s4nb.data.audio import DROPPED  # noqa: E402
from s4nb.data.base import SPLITS, map_rows  # noqa: E402
from s4nb.data.speech import (LISTS, SC10, SC35, SpeechCommands, WavFolder, clip_name, entries,  # noqa: E402
                              folders_of_wavs, hash_percent, hash_split, list_split, stratified_split)

PEOPLE = [f"{i * 2654435761 % 2**32:08x}" for i in range(1, 21)]


def write_clip(folder, name, length=16_000, rate=16_000):
    rng = np.random.default_rng(abs(hash_percent(name)).as_integer_ratio()[0] % 2**32)
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(folder / name, (rng.standard_normal(length) * 3000).astype("int16"), rate)


def commands(folder, words=("yes", "no"), length=lambda i: 16_000 if i % 4 else 12_000):
    "A small folder in the layout of speech_commands_v0.02; one clip in four is shorter."
    names = [f"{word}/{person}_nohash_{i % 2}.wav" for word in words for i, person in enumerate(PEOPLE)]
    for i, name in enumerate(names): write_clip(folder, name, length(i))
    write_clip(folder, "_background_noise_/noise.wav", 40_000)
    (folder / "README.md").write_text("words")
    for split, file in LISTS.items():
        (folder / file).write_text("".join(f"{n}\n" for n in names if hash_split(n) == split))
    return names


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("speech")
    return root / "speech_commands_v0.02", commands(root / "speech_commands_v0.02")


@pytest.fixture
def folder(made, tmp_path):
    ours = shutil.ignore_patterns("clips-*", "features-*", ".clips*", ".features*")
    return shutil.copytree(made[0], tmp_path / "copy", ignore=ours)


def archived(made, path, prefix="./"):
    with tarfile.open(path, "w:gz", compresslevel=1) as tar:
        for file in sorted(made[0].rglob("*.*"), reverse=True):
            if file.is_file() and "clips-" not in str(file) and "features-" not in str(file):
                tar.add(file, prefix + file.relative_to(made[0]).as_posix())
    return path


def caches(folder, kind="features"):
    return sorted(p.name for p in folder.glob(f"{kind}-*"))


def whole(task):
    data = {s: task.dataset(s) for s in SPLITS}
    return {s: (d.names, torch.stack([x for x, _ in d]), d.labels.tolist()) for s, d in data.items()}


def same(a, b):
    return all(a[s][0] == b[s][0] and torch.equal(a[s][1], b[s][1]) and a[s][2] == b[s][2] for s in SPLITS)


# ---- the reference's numbers

def test_hash_rule_equals_the_reference(vectors):
    cases = json.loads((vectors / "f_data_text.json").read_text())["speech_commands_hash"]
    codes = np.load(vectors / "f_data.npz")["sc_hash/split_code"]
    for case, code in zip(cases, codes):
        assert abs(hash_percent(case["name"]) - case["percent"]) < 1e-12
        assert {"train": "training", "val": "validation", "test": "testing"}[hash_split(case["name"])] == case["split"]
        assert SPLITS[code] == hash_split(case["name"])


def test_hash_rule_sees_the_speaker_alone():
    assert hash_percent("yes/0a1b_nohash_0.wav") == hash_percent("no/0a1b_nohash_17.wav") == hash_percent("0a1b")
    assert hash_percent("yes/mine.wav") != hash_percent("yes/other.wav")


def test_stratified_split_equals_the_reference(vectors):
    pytest.importorskip("sklearn")
    v = np.load(vectors / "f_data.npz")
    index = stratified_split(torch.from_numpy(v["sc10_split/y"]))
    assert all(index[s].tolist() == v[f"sc10_split/{s}_idx"].tolist() for s in SPLITS)


def test_words():
    assert len(SC35) == len(set(SC35)) == 35 and set(SC10) < set(SC35) and len(SC10) == 10
    assert SC35[:3] == ["bed", "cat", "down"] and SC35[-1] == "zero" and SC10[0] == "yes"


# ---- reading

def test_folder_archive_and_every_prefix_are_the_same_data(made, tmp_path, monkeypatch):
    folder, names = made
    reference = whole(WavFolder("x", folder, ["yes", "no"]))
    ordered = sorted(names, key=lambda n: (n[0] != "y", n))
    for split in SPLITS: assert reference[split][0] == [n for n in ordered if hash_split(n) == split]
    for prefix in ("", "./", "a/b/speech_commands_v0.02/"):
        archive = archived(made, tmp_path / f"{len(prefix)}.tar.gz", prefix)
        assert same(whole(WavFolder("x", archive, ["yes", "no"])), reference)
    monkeypatch.chdir(folder.parent)                                   # relative, linked, and with a trailing slash
    (tmp_path / "link").symlink_to(folder)
    for place in ("speech_commands_v0.02", "./speech_commands_v0.02/", tmp_path / "link"):
        assert same(whole(WavFolder("x", place, ["yes", "no"])), reference)


def test_lists_with_whole_paths_do_not_put_everything_into_training(folder):
    before = whole(WavFolder("x", folder, ["yes", "no"]))
    for file in LISTS.values():
        lines = (folder / file).read_text().split()
        (folder / file).write_bytes("".join(f"{folder}\\{line}\r\n" for line in lines).encode())
    assert same(whole(WavFolder("x", folder, ["yes", "no"])), before)


def test_noise_hidden_files_and_other_words_are_left_out(folder):
    write_clip(folder, "maybe/0a_nohash_0.wav")
    (folder / "yes/._0a_nohash_0.wav").write_bytes(b"not sound")
    (folder / "yes/notes.txt").write_text("x")
    assert folders_of_wavs(folder) == ["maybe", "no", "yes"]
    task = WavFolder("x", folder, ["yes", "no"]).prepare()
    assert sum(task.facts["sizes"].values()) == 40


def test_padding_cutting_and_lengths(folder):
    raw = torch.from_numpy(soundfile.read(folder / f"yes/{PEOPLE[0]}_nohash_0.wav", dtype="int16")[0])
    task = WavFolder("x", folder, ["yes", "no"], length=17_000).prepare()
    rows = map_rows(task.clips / "rows.npy")
    row = torch.load(task.clips / "clips.pt")["names"].index(f"yes/{PEOPLE[0]}_nohash_0.wav")
    assert rows.shape == (40, 17_000) and torch.equal(rows[row, :12_000], raw) and (rows[row, 12_000:] == 0).all()
    cut = SpeechCommands("sc10", data_dir=folder, length=8000, partial=True)
    assert cut.l_max == 8000 and cut.train[0][0].shape == (8000, 1) and (cut.train.clip_lengths == 16_000).all()
    lengths = torch.cat([WavFolder("x", folder).dataset(s).clip_lengths for s in SPLITS])
    assert sorted(lengths.tolist()) == [12_000] * 10 + [16_000] * 30
    archive = archived((folder, None), folder / "a.tar.gz")            # in another order
    assert same(whole(SpeechCommands("sc10", data_dir=archive, length=8000, partial=True)), whole(cut))


# ---- normalisation, features, rates

@pytest.mark.parametrize("normalize", ["reference", "global"])
@pytest.mark.parametrize("dropped", [0, 30])
def test_items_are_what_the_formula_gives(folder, normalize, dropped):
    task = WavFolder("x", folder, normalize=normalize, dropped=dropped).prepare()
    clips = torch.load(task.clips / "clips.pt")
    rows = map_rows(task.made / "rows.npy" if dropped else task.clips / "rows.npy")
    x = rows.double() * (2.0**-30 if normalize == "reference" else 2.0**-15)
    if dropped:
        gone = torch.randperm(16_000, generator=torch.Generator().manual_seed(56789))[:4800].sort().values
        assert torch.equal((rows[0] == DROPPED).nonzero()[:, 0], gone) and ((rows == DROPPED).sum(1) == 4800).all()
        x[rows == DROPPED] = torch.nan
    train = x[[hash_split(n) == "train" for n in clips["names"]]]
    over = 0 if normalize == "reference" else (0, 1)
    count, mean = (~train.isnan()).sum(over, keepdim=True), train.nanmean(over, keepdim=True)
    std = ((train - mean).square().nansum(over, keepdim=True) / (count - 1)).sqrt()
    expected = ((x - mean) / (std + 1e-5)).nan_to_num(0)
    for name, (got, label) in zip(task.val.names, task.val):
        i = clips["names"].index(name)
        assert got.dtype == torch.float32 and (got[:, 0] - expected[i]).abs().max() < 1e-4
        assert label == clips["labels"][i]
        if dropped: assert torch.equal(got[:, 1] == 0, rows[i] == DROPPED)
        assert got.shape[1] == task.d_input


def test_a_full_scale_sample_is_not_taken_for_a_dropped_one(folder):
    name = f"yes/{PEOPLE[1]}_nohash_1.wav"
    soundfile.write(folder / name, np.full(16_000, -32768, "int16"), 16_000)
    task = WavFolder("x", folder).prepare()
    stored = torch.load(task.made / "splits.pt")
    train = map_rows(task.clips / "rows.npy")[stored["train"]].double()
    assert hash_split(name) == "train" and abs(stored["mean"] - train.mean() / 32_768) < 1e-7


def test_mfcc_has_unit_coefficients_over_train(folder):
    pytest.importorskip("torchaudio")
    for normalize in ("global", "reference"):
        task = WavFolder("x", folder, features="mfcc", normalize=normalize)
        assert (task.l_max, task.d_input) == (161, 20)
        x = torch.stack([x for x, _ in task.train])
        assert x.shape[1:] == (161, 20) and x.mean((0, 1)).abs().max() < 1e-3
        assert (x.std((0, 1)) - 1).abs().max() < (1e-3 if normalize == "global" else 0.02)  # tiny: the 1e-5 counts


def test_rates(folder):
    task = WavFolder("x", folder)
    one = next(iter(task.loader("train", batch_size=8, shuffle=False)))
    two = next(iter(task.loader("train", batch_size=8, shuffle=False, rate=2)))
    assert one.rate == 1 and one.lengths is None and one.x.shape == (8, 16_000, 1) and one.y.dtype == torch.int64
    assert two.rate == 2 and two.lengths is None and torch.equal(two.x, one.x[:, ::2])
    pytest.importorskip("torchaudio")
    part = next(iter(task.loader("train", batch_size=8, shuffle=False, rate=1.6)))
    assert part.rate == 1.6 and part.x.shape == (8, 10_000, 1)
    up = next(iter(task.loader("train", batch_size=2, shuffle=False, rate=0.5)))
    assert up.x.shape == (2, 32_000, 1)
    for options in (dict(features="mfcc"), dict(dropped=10)):
        other = WavFolder("x", folder, **options)
        whole_steps = next(iter(other.loader("val", batch_size=2)))
        assert torch.equal(next(iter(other.loader("val", batch_size=2, rate=2))).x, whole_steps.x[:, ::2])
        with pytest.raises(ValueError, match="rate=1.5"): next(iter(other.loader("val", rate=1.5)))


def test_loader_processes(folder):
    task = WavFolder("x", folder)
    batches = [list(task.loader("val", batch_size=2, workers=w)) for w in (0, 1)]
    assert all(torch.equal(a.x, b.x) and torch.equal(a.y, b.y) for a, b in zip(*batches, strict=True))


# ---- the official task

def test_a_partial_copy_is_refused_before_decoding(folder):
    (folder / f"yes/{PEOPLE[0]}_nohash_0.wav").write_bytes(b"")                  # decoding would stumble over this one
    with pytest.raises(ValueError, match=r"40 clips, known are 105,829: a partial copy.*partial=True"):
        SpeechCommands("sc35", data_dir=folder).prepare()
    assert not caches(folder) and not caches(folder, "clips")


def test_a_partial_copy_says_so(folder):
    task = SpeechCommands("sc35", data_dir=folder, partial=True).prepare()
    assert task.classes == SC35 and "PART of Speech Commands" in task.card.variant and not task.card.published
    assert task.facts["unlike the hash rule"] == 0 and {SC35[y] for y in task.train.labels.tolist()} == {"yes", "no"}
    for name in ("sc10", "sc35"):                                     # though its clips are decoded already
        with pytest.raises(ValueError, match="a partial copy"): SpeechCommands(name, data_dir=folder).prepare()


def test_partial_allows_lists_of_absent_clips(folder):
    gone = (folder / LISTS["val"]).read_text().split()[0]
    (folder / gone).unlink()
    with pytest.raises(ValueError, match="not there"): WavFolder("x", folder).prepare()
    assert WavFolder("x", folder, partial=True).prepare().facts["sizes"]["val"] == hash_count("val") - 1


def hash_count(split):
    return sum(2 * (hash_split(f"{person}_nohash_0.wav") == split) for person in PEOPLE)


def test_a_whole_copy_has_the_known_sizes(folder, monkeypatch):
    pytest.importorskip("sklearn")
    sizes = {s: hash_count(s) for s in SPLITS}
    monkeypatch.setattr(speech, "CLIPS", 40)
    for name, words in {"SC35": ["yes", "no"], "SC10": ["no", "yes"]}.items():
        monkeypatch.setattr(speech, name, words)
    monkeypatch.setattr(speech, "OFFICIAL", {"sc35": sizes, "sc10": {"train": 21, "val": 4, "test": 5}})
    task = SpeechCommands("sc35", data_dir=folder).prepare()
    assert task.card.splits == sizes and task.card.published
    assert task.card.variant.startswith("Speech Commands v0.02, divided by its two lists")
    ten = SpeechCommands("sc10", data_dir=folder).prepare()
    assert ten.clips != task.clips and all((ten.dataset(s).clip_lengths == 16_000).all() for s in SPLITS)
    assert "exactly 16,000" in ten.card.variant and not ten.card.published
    wrong = (folder / LISTS["val"]).read_text().split()
    (folder / LISTS["val"]).write_text("\n".join(wrong[1:]))
    with pytest.raises(ValueError, match="splits of .* known are"): SpeechCommands("sc35", data_dir=folder).prepare()


@pytest.mark.parametrize("inside", ["SpeechCommands/speech_commands_v0.02", "SpeechCommands", "speech_commands_v0.02"])
def test_unpacked_data_are_found_in_data_path(made, tmp_path, monkeypatch, inside):
    monkeypatch.setenv("DATA_PATH", str(tmp_path))
    task = SpeechCommands("sc10", partial=True)
    assert task.find() is None and task.state() == "download: 2,429 MB"
    (tmp_path / inside).parent.mkdir(exist_ok=True, parents=True)
    (tmp_path / inside).symlink_to(made[0])
    assert task.place() == tmp_path / inside and task.state() == f"read from {tmp_path / inside}"
    assert SpeechCommands("sc10", data_dir=tmp_path).find() == tmp_path / inside


@pytest.mark.parametrize("inside", ["speech_commands_v0.02.tar.gz", "SpeechCommands/speech_commands_v0.02.tar.gz",
                                    "SpeechCommands/speech_commands.tar.gz"])
def test_the_archive_is_found_and_read_where_it_lies(made, tmp_path, monkeypatch, inside):
    monkeypatch.setenv("DATA_PATH", str(tmp_path))
    (tmp_path / inside).parent.mkdir(exist_ok=True, parents=True)
    archive = archived(made, tmp_path / inside)
    task = SpeechCommands("sc35", partial=True).prepare()
    assert task.place() == archive and sum(task.facts["sizes"].values()) == 40
    assert not list(tmp_path.rglob("*.wav")) and SpeechCommands(data_dir=archive).place() == archive


def test_data_that_are_nowhere_are_downloaded(made, tmp_path, monkeypatch):
    monkeypatch.setenv("DATA_PATH", str(tmp_path))
    asked = []

    def fetch(source, folder):
        asked.append((source.url.split("/")[-1], folder))
        folder.mkdir()
        return archived(made, folder / "speech_commands_v0.02.tar.gz")

    monkeypatch.setattr(speech, "fetch", fetch)
    task = SpeechCommands("sc35", partial=True).prepare()
    assert asked == [("speech_commands_v0.02.tar.gz", tmp_path / "SpeechCommands")] and len(task.train)


# ---- what can be wrong

def spoil(folder, what):
    name = f"no/{PEOPLE[3]}_nohash_1.wav"
    if what == "rate": write_clip(folder, name, rate=8000)
    if what == "long": write_clip(folder, name, 16_001)
    if what == "stereo": soundfile.write(folder / name, np.zeros((100, 2), "int16"), 16_000)
    if what == "cut": (folder / name).write_bytes((folder / name).read_bytes()[:5000])
    if what == "empty": (folder / name).write_bytes(b"")
    if what == "gone": (folder / (folder / LISTS["test"]).read_text().split()[0]).unlink()
    if what == "no list": (folder / LISTS["val"]).unlink()
    if what == "both": (folder / LISTS["val"]).write_text((folder / LISTS["test"]).read_text())
    if what == "foreign": (folder / LISTS["val"]).write_text("1,2\n3,4\n")
    if what == "blank": (folder / LISTS["val"]).write_text("\n")


FAULTS = {"rate": "8,000 samples a second, expected 16,000; convert", "long": "16,001 samples, at most 16,000",
          "stereo": "2 channels", "cut": "cut short", "empty": "not a readable wav",
          "gone": "names clips that are not there", "no list": "lacks validation_list.txt", "both": "is in both lists",
          "foreign": "the first '1,2'", "blank": "names none of the 40 clips"}


@pytest.mark.parametrize("what", FAULTS)
def test_faults_name_the_file_and_cache_nothing(folder, what):
    spoil(folder, what)
    with pytest.raises(ValueError) as e: WavFolder("x", folder, ["yes", "no"]).prepare()
    assert FAULTS[what] in str(e.value) and str(folder) in str(e.value)
    assert not caches(folder) and not caches(folder, "clips") and not list(folder.glob(".*.tmp"))


def test_no_lists_at_all_means_the_hash_rule(folder):
    expected = whole(WavFolder("x", folder))
    for file in LISTS.values(): (folder / file).unlink()
    task = WavFolder("x", folder)
    assert same(whole(task), expected) and task.facts["split"] == "hash" and "by the hash" in task.card.variant
    with pytest.raises(ValueError, match="lacks validation_list.txt and testing_list.txt"):
        WavFolder("x", folder, split="lists").prepare()


def test_a_cut_archive_and_one_with_a_clip_twice(made, tmp_path):
    archive = archived(made, tmp_path / "a.tar.gz")
    (tmp_path / "b.tar.gz").write_bytes(archive.read_bytes()[:-5000])
    with pytest.raises(ValueError, match="b.tar.gz is damaged"):
        WavFolder("x", tmp_path / "b.tar.gz", ["yes", "no"]).prepare()
    with tarfile.open(tmp_path / "c.tar", "w") as tar:
        for prefix in ("one/", "two/"): tar.add(made[0] / "yes", prefix + "yes")
    with pytest.raises(ValueError, match="c.tar holds clips of one name twice"):
        WavFolder("x", tmp_path / "c.tar", ["yes"]).prepare()
    assert not caches(tmp_path, "clips")


def test_nothing_to_read(tmp_path):
    for classes, text in [(None, "is not a folder"), (["yes", "no"], "is not there")]:
        with pytest.raises(ValueError, match=text): WavFolder("x", tmp_path / "none", classes).prepare()
    (tmp_path / "yes").mkdir()
    with pytest.raises(ValueError, match="holds no wav files of the classes yes, no"):
        WavFolder("x", tmp_path, ["yes", "no"]).prepare()
    with pytest.raises(ValueError, match="holds 0 folders of wav files"): WavFolder("x", tmp_path)
    assert "missing: put" in WavFolder("x", tmp_path / "none", ["a", "b"]).state()


@pytest.mark.parametrize("options, text", [
    (dict(features="mel"), "features='mel'"), (dict(normalize="none"), "normalize='none'"),
    (dict(split="random"), "split='random'"), (dict(dropped=100), "dropped is in per cent"),
    (dict(dropped=5, features="mfcc"), "raw"), (dict(length=100), "at least 101")],
    ids=["features", "normalize", "split", "dropped", "mfcc", "length"])
def test_options_are_checked(tmp_path, options, text):
    with pytest.raises(ValueError, match=text): WavFolder("x", tmp_path, ["a", "b"], **options)
    with pytest.raises(ValueError, match="'sc20' is unknown: one of sc35, sc10"): SpeechCommands("sc20")


def test_a_split_without_clips_is_refused(tmp_path):
    for name in ("a/1.wav", "a/2.wav", "b/1.wav"): write_clip(tmp_path, name)
    with pytest.raises(ValueError, match="a split is empty"): WavFolder("x", tmp_path, split="hash").prepare()
    assert not caches(tmp_path)


# ---- caches

def test_options_have_their_own_features_and_share_the_clips(folder):
    pytest.importorskip("sklearn")
    tasks = [WavFolder("x", folder, **o).prepare() for o in
             ({}, {"normalize": "reference"}, {"dropped": 20}, {"features": "mfcc"}, {"split": "stratified"},
              {"exact": True})]
    assert len({t.made for t in tasks}) == 6 and len({t.clips for t in tasks}) == 1
    others = [WavFolder("x", folder, **o).prepare() for o in ({"length": 16_001}, {"classes": ["yes", "no"]})]
    assert len({t.clips for t in [tasks[0], *others]}) == 3


def test_a_second_run_decodes_nothing(folder, monkeypatch):
    first = whole(WavFolder("x", folder))
    monkeypatch.setattr(speech, "decode_wav", None)
    monkeypatch.setattr(speech, "Moments", None)
    assert same(whole(WavFolder("x", folder)), first)


def test_changed_clips_are_read_anew(folder):
    before = WavFolder("x", folder).prepare()
    write_clip(folder, f"no/{PEOPLE[3]}_nohash_1.wav", 15_000)
    assert WavFolder("x", folder).prepare().clips != before.clips


@pytest.mark.parametrize("kind, file", [("clips", "rows.npy"), ("clips", "clips.pt"), ("made", "splits.pt")])
def test_a_damaged_cache_is_refused(folder, kind, file):
    place = getattr(WavFolder("x", folder).prepare(), kind) / file
    with open(place, "r+b") as f:
        f.seek(os.path.getsize(place) // 2)
        f.write(b"damage")
    with pytest.raises(ValueError, match=f"{file}.*delete the folder"): WavFolder("x", folder).prepare()


def test_prepare_again_reads_what_has_changed(folder):
    task = WavFolder("x", folder).prepare()
    before, data = task.clips, task.train
    assert task.prepare().train is not data and task.clips == before
    name = task.train.names[0]
    write_clip(folder, name, 15_000)
    task.prepare()
    assert task.clips != before and task.train.names[0] == name and task.train.clip_lengths[0] == 15_000


def read_only(monkeypatch, place, home):
    "As if one could not write to `place` (tests may run as root, who can)."
    access = os.access
    monkeypatch.setattr(os, "access", lambda p, mode: str(place) not in str(p) and access(p, mode))
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))


def test_a_read_only_folder_keeps_its_caches_at_home(folder, tmp_path, monkeypatch):
    ready = WavFolder("x", folder).prepare()
    read_only(monkeypatch, folder, tmp_path / "home")
    assert WavFolder("x", folder).prepare().made == ready.made                        # ready-made: found where it lies
    other = WavFolder("x", folder, dropped=5).prepare()
    assert other.clips == ready.clips and other.made.parent == tmp_path / "home/s4nb" / folder.name


def test_a_download_for_a_read_only_root_is_found_again(made, tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    read_only(monkeypatch, tmp_path / "data", tmp_path / "home")
    monkeypatch.setenv("DATA_PATH", str(tmp_path / "data"))
    home = tmp_path / "home/s4nb/SpeechCommands"
    home.mkdir(parents=True)
    monkeypatch.setattr(speech, "fetch", lambda source, folder: archived(made, folder / source.name))
    assert SpeechCommands("sc35", partial=True).place() == home / "speech_commands_v0.02.tar.gz"
    assert SpeechCommands("sc35", partial=True).find() == home / "speech_commands_v0.02.tar.gz"


def test_home_is_understood(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert WavFolder("x", "~/copy").classes == ["no", "yes"] and SpeechCommands(data_dir="~/copy").find() == folder


def test_capital_endings_are_wav_files_too(tmp_path):
    for word in ("a", "b"): write_clip(tmp_path, f"{word}/1.WAV")
    assert folders_of_wavs(tmp_path) == ["a", "b"]


def test_a_class_without_clips_is_refused(folder):
    words = ["yes", "no", "mabye"]
    assert WavFolder("x", folder, words, partial=True).prepare().d_output == 3
    for _ in range(2):                                              # though its clips are decoded already
        with pytest.raises(ValueError, match="gives no clips of mabye: add"): WavFolder("x", folder, words).prepare()


# ---- small parts

def test_names():
    assert clip_name("x/y/yes/0.wav") == clip_name(" yes/0.wav\r") == clip_name("yes\\0.wav") == "yes/0.wav"
    assert clip_name("yes/0.WAV") == "yes/0.WAV"
    assert clip_name("0.wav") == clip_name("yes/0.mp3") == clip_name("yes/.0.wav") == ""


def test_entries_of_a_folder_are_sorted_within_each_class(made):
    names = [name for name, _ in entries(made[0], ["yes", "no"])]
    assert names == sorted(made[1], key=lambda n: (n[0] != "y", n)) + list(LISTS.values())


def test_lines_of_other_words_do_not_matter():
    names = ["yes/1.wav", "yes/2.wav", "yes/3.wav"]
    lists = {"val": "yes/1.wav\nbird/9.wav\n", "test": "bird/1.wav\nyes/3.wav"}
    assert list_split(names, lists, "x") == ["val", "train", "test"]
