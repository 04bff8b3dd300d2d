"""Spoken digits, the twin of Speech Commands: layouts, splits, bad files; engines that fail or are killed."""

import multiprocessing
import os
import random
import shutil
import signal
import sys
import tarfile
import time
import wave
from collections import Counter

import numpy as np
import pytest
import torch

from s4nb.data import spoken
from s4nb.data.base import SPLITS
from s4nb.data.download import Source
from s4nb.data.speech import SC10, SC35, hash_split
from s4nb.data.spoken import (SECOND, SpeechTwin, SpokenDigits, Voice, cast, command, engines, find_recordings,
                              likeness, make_clip, make_speech_twin, pack, probe, say, speak, split_of)


def write_wav(path, x, rate=8000, channels=1):
    with wave.open(str(path), "wb") as f:
        f.setparams((channels, 2, rate, 0, "NONE", ""))
        f.writeframes(np.asarray(x).astype("<i2").tobytes())


def clip_of(digit, k, n):
    return np.random.default_rng([digit, k, n]).integers(-9000 // (k + 1), 9000 // (k + 1), 500 + 50 * digit + 10 * n)


def fill(folder, speakers=("ada", "bob", "eve"), numbers=11):
    folder.mkdir(parents=True)
    for digit in range(10):
        for k, speaker in enumerate(speakers):
            for n in range(numbers): write_wav(folder / f"{digit}_{speaker}_{n}.wav", clip_of(digit, k, n))
    return folder


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    "A folder `recordings` of noise named like spoken digits: 3 speakers, 11 numbers."
    return fill(tmp_path_factory.mktemp("digits") / "recordings")


def archive(path, folder, prefix="recordings", mode="w:xz"):
    quick = {"preset" if mode == "w:xz" else "compresslevel": 1}
    with tarfile.open(path, mode, **quick) as tar: tar.add(folder, prefix)
    return path


# -- the Free Spoken Digit Dataset

@pytest.mark.parametrize("layout", ["recordings", "itself", "checkout", "tar.xz", "tar.gz", "root"])
def test_every_layout_gives_the_same_clips(digits, tmp_path, monkeypatch, layout):
    monkeypatch.setenv("DATA_PATH", str(tmp_path))
    data_dir = tmp_path / "fsdd"
    data_dir.mkdir()
    if layout == "recordings": shutil.copytree(digits, data_dir / "recordings")
    if layout == "itself": shutil.copytree(digits, data_dir, dirs_exist_ok=True)
    if layout == "checkout": shutil.copytree(digits, data_dir / "free-spoken-digit-dataset-1.0.10" / "recordings")
    if layout == "tar.xz": archive(data_dir / "fsdd.tar.xz", digits)
    if layout == "tar.gz": archive(data_dir / "free-spoken-digit-dataset.tar.gz", digits, "fsdd-1.0/recordings", "w:gz")
    if layout == "root": archive(tmp_path / "fsdd.tar.xz", digits)
    task = SpokenDigits(data_dir=None if layout == "root" else data_dir).prepare()
    assert {s: len(task.dataset(s)) for s in SPLITS} == {"train": 30, "val": 150, "test": 150}
    task.mean, task.std = torch.zeros(1, 1), torch.ones(1, 1) - 1e-5                # normalise adds 1e-5
    assert [(s, n, d) for s, n, d, _, _ in task.clips["test"]] == [
        (s, n, d) for s in ("ada", "bob", "eve") for n in range(5) for d in range(10)]
    for i in (0, 77, 149):
        speaker, n, digit, *_ = task.clips["test"][i]
        x, y = task.test[i]
        assert y == digit and np.array_equal(x[:, 0], clip_of(digit, ("ada", "bob", "eve").index(speaker), n))


def test_other_files_in_the_folder_are_left_alone(digits, tmp_path):
    folder = shutil.copytree(digits, tmp_path / "recordings")
    (folder / "README.md").write_text("digits")
    (folder / "._3_ada_0.wav").write_text("a resource fork")
    assert pack(folder, tmp_path, "raw") == {"recordings": 330, "speakers": ["ada", "bob", "eve"]}
    packed = archive(tmp_path / "fsdd.tar.xz", tmp_path, "x")
    assert pack(packed, tmp_path, "raw")["recordings"] == 330


def test_normalisation_is_of_the_training_set_alone(digits):
    task = SpokenDigits(val="bob", held_out="eve", data_dir=digits.parent).prepare()
    every = {s: torch.cat([x for x, _ in task.dataset(s)]) for s in SPLITS}
    assert every["train"].mean().abs() < 1e-4 and (every["train"].std() - 1).abs() < 1e-4   # float32, 46,000 samples
    assert every["val"].std() < 0.6 and every["test"].std() < 0.4       # softer voices: 1/2, 1/3


def test_held_out_speaker_is_heard_nowhere_else(digits):
    task = SpokenDigits(held_out="ada", data_dir=digits.parent).prepare()
    assert [set(task.dataset(s).speakers) for s in SPLITS] == [{"bob", "eve"}, {"bob", "eve"}, {"ada"}]
    assert [len(task.dataset(s)) for s in SPLITS] == [20, 100, 110]
    assert all(n >= 5 for s in ("train", "val") for _, n, *_ in task.clips[s])      # the official test: unused
    assert "all of ada, heard nowhere else" in str(task.card)


def test_splits_cover_the_official_division():
    of = lambda **how: Counter(split_of(s, n, **how) for s in "abcdef" for n in range(50) for _ in range(10))
    assert of() == {"train": 2400, "val": 300, "test": 300}
    assert of(val="c") == {"train": 2250, "val": 450, "test": 300}
    assert of(held_out="c") == {"train": 2000, "val": 250, "test": 500, None: 250}


def test_cut_rate_and_padding(digits):
    task = SpokenDigits(length=700, data_dir=digits.parent).prepare()
    lengths = [len(clip_of(d, 0, n)) for _ in range(3) for n in range(5) for d in range(10)]
    assert task.test.lengths.tolist() == [min(l, 700) for l in lengths]
    assert f"({sum(l > 700 for s in SPLITS for *_, l in task.clips[s])} of 330 are longer)" in task.card.length
    one, two = (next(iter(task.loader("test", 16, rate=rate))) for rate in (1, 2))
    assert torch.equal(two.x, one.x[:, ::2]) and torch.equal(two.lengths, -(-one.lengths // 2)) and two.rate == 2
    assert all((x[l:] == 0).all() for x, l in zip(one.x, one.lengths))
    once = [y for batch in task.loader("train", 7, bucket=2) for y in batch.y.tolist()]
    assert Counter(once) == {d: 3 for d in range(10)}


def test_mfcc_frames(digits):
    raw, task = (SpokenDigits(features=f, data_dir=digits.parent).prepare() for f in ("raw", "mfcc"))
    assert (raw.card.name, task.card.name) == ("spoken-digits", "spoken-digits-mfcc")
    assert task.l_max == 81 and task.test.lengths.tolist() == [1 + l // 100 for l in raw.test.lengths.tolist()]
    every = torch.cat([x for x, _ in task.train])
    assert every.shape[1] == 20 and every.mean(0).abs().max() < 1e-3 and (every.std(0) - 1).abs().max() < 1e-2
    transforms = pytest.importorskip("torchaudio.transforms")
    mfcc = transforms.MFCC(8000, 20, log_mels=True, melkwargs={"n_fft": 200, "hop_length": 100, "n_mels": 32})
    x = torch.tensor(clip_of(0, 0, 10) / 32768, dtype=torch.float32)
    expected = (mfcc(x).T - task.mean) / (task.std + 1e-5)
    assert task.clips["train"][0][:3] == ["ada", 10, 0] and torch.allclose(task.train[0][0], expected, atol=1e-4)


FAULTS = {"rate": (lambda f: write_wav(f, clip_of(0, 0, 0), rate=16_000), "sox"),
          "empty": (lambda f: write_wav(f, []), "no samples"),
          "stereo": (lambda f: write_wav(f, clip_of(0, 0, 0), channels=2), "channels"),
          "short": (lambda f: write_wav(f, clip_of(0, 0, 0)[:99]), "99 samples"),
          "cut": (lambda f: f.write_bytes(f.read_bytes()[:-9]), "cut short"),
          "text": (lambda f: f.write_text("404"), "not a readable wav"),
          "name": (lambda f: f.rename(f.with_name("7_eve_x.wav")), "rename or remove")}


@pytest.mark.parametrize("fault", sorted(FAULTS))
@pytest.mark.parametrize("packed", [False, True])
def test_bad_recording_is_named_and_nothing_is_cached(digits, tmp_path, fault, packed):
    folder = shutil.copytree(digits, tmp_path / "made" / "recordings", ignore=shutil.ignore_patterns("[!7]*"))
    spoil, text = FAULTS[fault]
    spoil(folder / "7_eve_3.wav")
    data_dir = tmp_path / "data"
    data_dir.mkdir()
    archive(data_dir / "fsdd.tar.gz", folder, mode="w:gz") if packed else folder.rename(data_dir / "recordings")
    with pytest.raises(ValueError, match="7_eve_") as e: SpokenDigits(data_dir=data_dir).prepare()
    assert text in str(e.value) and str(data_dir) in str(e.value)
    assert not list(data_dir.glob("digits-*")) and not list(data_dir.glob(".digits-*.tmp"))


@pytest.mark.parametrize("keep", [40, 0.3, 0.99])
def test_truncated_archive(digits, tmp_path, keep):
    whole = archive(tmp_path / "whole.tar.xz", digits).read_bytes()
    (tmp_path / "fsdd.tar.xz").write_bytes(whole[:keep if isinstance(keep, int) else int(keep * len(whole))])
    with pytest.raises(ValueError, match="fsdd.tar.xz"): SpokenDigits(data_dir=tmp_path).prepare()
    assert not list(tmp_path.glob("digits-*"))
    (tmp_path / "fsdd.tar.xz").write_bytes(whole)
    assert len(SpokenDigits(data_dir=tmp_path).prepare().test) == 150


def test_archives_without_recordings_or_with_one_twice(digits, tmp_path):
    other = archive(tmp_path / "a.tar.xz", digits, "wavs")
    with pytest.raises(ValueError, match="no recordings"): pack(other, tmp_path, "raw")
    with tarfile.open(tmp_path / "b.tar", "w") as tar:
        for _ in range(2): tar.add(digits / "1_ada_1.wav", "recordings/1_ada_1.wav")
    with pytest.raises(ValueError, match="comes twice"): pack(tmp_path / "b.tar", tmp_path, "raw")


def test_too_few_recordings_and_wrong_options(digits, tmp_path):
    fill(tmp_path / "recordings", numbers=6)
    with pytest.raises(ValueError, match="too few"): SpokenDigits(data_dir=tmp_path).prepare()
    for options, text in [({"features": "fft"}, "raw, mfcc"), ({"length": 0}, "at least 1"),
                          ({"val": "bob", "held_out": "bob"}, "another speaker")]:
        with pytest.raises(ValueError, match=text): SpokenDigits(**options)
    with pytest.raises(ValueError, match="one of ada, bob, eve"):
        SpokenDigits(val="zoe", data_dir=digits.parent).prepare()


def test_nothing_there_is_downloaded(digits, tmp_path, monkeypatch):
    made = archive(tmp_path / "v1.0.10.tar.gz", digits, "free-spoken-digit-dataset-1.0.10/recordings", "w:gz")
    monkeypatch.setitem(spoken.SOURCES, "fsdd", Source(made.as_uri(), "", None, None, "digits"))
    task = SpokenDigits(data_dir=tmp_path / "new")
    assert task.state().startswith("download") and not (tmp_path / "new").exists()
    assert len(task.prepare().test) == 150 and find_recordings(tmp_path / "new").name == "v1.0.10.tar.gz"
    assert task.state().startswith("read from")


def test_changed_recordings_are_read_again(digits, tmp_path):
    folder = shutil.copytree(digits, tmp_path / "recordings")
    first = SpokenDigits(data_dir=tmp_path).prepare()
    write_wav(folder / "0_ada_0.wav", np.full(600, 5))
    second = SpokenDigits(data_dir=tmp_path).prepare()
    assert [len(task.test[0][0]) for task in (first, second)] == [500, 600]
    assert len(first.prepare().test[0][0]) == 600                       # nothing of the old files is kept in memory


def test_the_real_recordings(real_data, tmp_path):
    (tmp_path / "fsdd.tar.xz").symlink_to(real_data / "fsdd.tar.xz")
    task = SpokenDigits(data_dir=tmp_path).prepare()
    assert [len(task.dataset(s)) for s in SPLITS] == [2400, 300, 300]
    assert all(set(Counter(task.dataset(s).labels.tolist()).values()) == {n} for s, n in zip(SPLITS, (240, 30, 30)))
    assert Counter(task.train.speakers) == dict.fromkeys("george jackson lucas nicolas theo yweweler".split(), 400)
    assert "20 of 3,000 are longer" in task.card.length
    everything = [clip[4] for s in SPLITS for clip in task.clips[s]]
    assert min(everything) == 1148 and max(everything) == 18262


# -- the twin: an engine that hums, in place of espeak-ng

HUMMER = f"""#!{sys.executable} -ES
import array, math, os, struct, sys, time
args, word = sys.argv[1:], sys.argv[-1]
here = os.path.dirname(os.path.abspath(__file__))
variants = ["ada", "bob", "eve", "loud eve", "tall eve", "zoe"]
if args == ["--version"]: print("eSpeak NG text-to-speech: 7.8  Data at: here")
elif args == ["--voices=variant"]:
    print("Pty Language       Age/Gender VoiceName          File                 Other Languages")
    for v in variants + ["whisper", "RicishayMax2"]:
        print(f" 5  variant         --/M      {{v.replace(' ', '_'):18}} !v/{{v:18}} ")
elif args == ["--voices=en"]:
    print(" 2  en-gb           --/M      English_(Great_Britain) gmw/en               (en 2)")
    print(" 3  en-uk           --/M      English_(Great_Britain) mb/mb-en1            (en-gb 3)(en 2)")
    print(" 2  en-us           --/M      English_(America)  gmw/en-US            (en 3)")
else:
    with open(os.path.join(here, "said"), "a") as f: f.write(word + "\\n")
    if os.path.exists(os.path.join(here, "slow")): time.sleep(0.1)
    if word == "broken": sys.exit("cannot say that")
    who = variants.index(args[1].partition("+")[2]) if args[1].startswith("gmw/") else 0    # by language: not heard
    tone, loudness, pace = (110, 165, 250, 250, 212, 73)[who], (12000 if who == 3 else 7500), int(args[3]) / 165
    x, l = array.array("h", bytes(1000)), round(22050 / tone / 2 ** ((int(args[5]) - 50) / 50))
    for c in word:
        t = [2 * math.pi * i / l for i in range(l)]
        hum = [int(loudness * (math.sin(v) + math.sin(v * (2 + ord(c) % 11))) / 2) for v in t]
        x += (array.array("h", hum) * (int(1543 / pace) // l + 1))[:int(1543 / pace)]
    if word == "mute": x = array.array("h", bytes(9000))
    if word == "clip": x = array.array("h", [32767 if v > 0 else -32768 for v in x])
    if word == "void": sys.exit()
    head = b"RIFF", 2147483647, b"WAVE", b"fmt ", 16, 1, 1, 22050, 44100, 2, 16, b"data", 2147483611
    sys.stdout.buffer.write(struct.pack("<4sI4s4sIHHIIHH4sI", *head) + x.tobytes())
"""


VOICES = [Voice("espeak-ng", f"gmw/en+{v}", f"espeak {v}") for v in ("ada", "bob", "eve", "zoe")]
ADA = VOICES[0]


@pytest.fixture
def engine(tmp_path, monkeypatch):
    """A folder with a humming espeak-ng, alone on PATH, and its voices known without probing them.

    A file `slow` there slows it down; `said` lists what it said."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "espeak-ng").write_text(HUMMER)
    (folder / "espeak-ng").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(spoken, "cast", lambda engine, workers: (VOICES, {}))
    return folder


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_the_twin_has_the_official_format(engine, tmp_path, monkeypatch):
    monkeypatch.setattr(spoken, "cast", cast.__wrapped__)               # the real one, nothing remembered
    monkeypatch.setattr(spoken, "SHIFTS", [-3, 3])                      # fewer, for speed
    manifest = make_speech_twin(tmp_path / "twin", ["yes", "no"], takes=3, seed=5)
    files = contents(tmp_path / "twin")
    wavs = sorted(f for f in files if f.endswith(".wav"))
    names = {"val": "validation_list.txt", "test": "testing_list.txt"}
    assert list(manifest["dropped"]) == ["gmw/en+loud eve", "gmw/en+tall eve"]      # louder; of a lower pitch
    assert all("as gmw/en+eve" in why for why in manifest["dropped"].values())
    assert len(wavs) == 4 * 2 * 3 and set(files) - set(wavs) == {"README.md", "manifest.json", *names.values()}
    lists = {s: files[name].decode().split() for s, name in names.items()}
    assert {s: len(l) for s, l in lists.items()} == {"test": 6, "val": 6} and set(sum(lists.values(), [])) < set(wavs)
    for file in wavs:
        split = next((s for s in lists if file in lists[s]), "train")
        assert hash_split(file) == split and file.split("/")[0] in ("yes", "no")
        with wave.open(str(tmp_path / "twin" / file)) as f: assert f.getparams()[:4] == (1, 2, SECOND, SECOND)
    people = {s: {file.split("/")[1][:8] for file in lists[s]} for s in lists}
    assert len(people["test"]) == len(people["val"]) == 1 and not people["test"] & people["val"]
    assert b"NOT the Speech Commands" in files["README.md"] and manifest["engines"] == {"espeak-ng": "7.8"}
    assert {name.partition("+")[2] for name in manifest["voices"]} == {"ada", "bob", "eve", "zoe"}
    assert {name.partition("+")[0] for name in manifest["voices"]} == {"gmw/en", "gmw/en-US"}


def test_same_seed_same_bytes_whatever_the_workers(engine, tmp_path):
    made = {}
    for name, options in {"a": {"workers": 1}, "b": {"workers": 5}, "c": {"seed": 1}}.items():
        make_speech_twin(tmp_path / name, ["up"], takes=2, **options)
        made[name] = contents(tmp_path / name)
    assert made["a"] == made["b"]
    assert not set(made["a"].values()) & {v for k, v in made["c"].items() if k.endswith(".wav")}


def test_voices_can_be_fewer(engine, tmp_path):
    manifest = make_speech_twin(tmp_path / "twin", ["up"], voices=3, takes=1)
    assert len(manifest["voices"]) == 3 and {v["split"] for v in manifest["voices"].values()} == set(SPLITS)


def test_a_made_twin_needs_no_engine_and_is_not_made_again(engine, tmp_path, monkeypatch):
    manifest = make_speech_twin(tmp_path / "twin", ["up"], takes=1)
    said = (engine / "said").read_text()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert make_speech_twin(tmp_path / "twin", ["up"], takes=1) == manifest and (engine / "said").read_text() == said
    with pytest.raises(ValueError, match="'seed': 0.*another folder"):
        make_speech_twin(tmp_path / "twin", ["up"], takes=1, seed=2)


def test_no_engine_names_the_packages(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    for call in (engines, lambda: make_speech_twin(tmp_path / "twin"), lambda: SpeechTwin(data_dir=tmp_path).prepare()):
        with pytest.raises(ValueError, match="apt install espeak-ng flite"): call()
    assert not [p for p in tmp_path.iterdir() if not p.name.startswith(".")] and not list(tmp_path.glob(".*.tmp"))


@pytest.mark.parametrize("word, text", [("mute", "silence"), ("clip", "clipped"), ("void", "no sound"),
                                        ("broken", "cannot say that")])
def test_a_word_that_fails_stops_all_and_leaves_nothing(engine, tmp_path, word, text):
    with pytest.raises(ValueError, match=f"espeak-ng, voice .*{word}.*{text}"):
        make_speech_twin(tmp_path / "twin", ["up", word])
    assert {p.name for p in tmp_path.iterdir()} == {"bin", ".twin.lock"}


def test_wrong_arguments_and_places(engine, tmp_path):
    for words, options in [([], {}), (["Up"], {}), (["up", "up"], {}), (["../up"], {}), (["up", ""], {}),
                           (["up"], {"takes": 0}), (["up"], {"voices": 2}), (["up"], {"voices": -3})]:
        with pytest.raises(ValueError, match="letters a–z"): make_speech_twin(tmp_path / "twin", words, **options)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="one cannot write to .*choose another folder"):
        make_speech_twin(tmp_path / "file" / "twin")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious.txt").write_text("mine")
    with pytest.raises(ValueError, match="no twin"): make_speech_twin(tmp_path / "mine", ["up"])
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["precious.txt"]
    with pytest.raises(ValueError, match="one of sc-twin, sc10-twin"): SpeechTwin("speech-commands")


def start(folder):
    process = multiprocessing.get_context("fork").Process(target=make_speech_twin, args=(folder, ["up", "no"]))
    process.start()
    return process


def test_kill_in_the_middle_leaves_nothing_that_is_read(engine, tmp_path):
    (engine / "slow").write_text("")
    child, folder, until = start(tmp_path / "twin"), tmp_path / "twin", time.monotonic() + 30
    while len(list(tmp_path.glob(".twin.*.tmp/*/*.wav"))) < 3 and time.monotonic() < until: time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert len(list(tmp_path.glob(".twin.*.tmp"))) == 1 and not folder.exists()
    (engine / "slow").unlink()
    make_speech_twin(folder, ["up", "no"])
    assert len(list(folder.rglob("*.wav"))) == 4 * 2 * 2 and not list(tmp_path.glob(".twin.*.tmp"))


def test_two_processes_at_once_one_works(engine, tmp_path):
    (engine / "slow").write_text("")
    children = [start(tmp_path / "twin") for _ in range(2)]
    for child in children: child.join(60)
    assert [child.exitcode for child in children] == [0, 0]
    said = Counter((engine / "said").read_text().split())
    assert said == {"up": 8, "no": 8}


def test_clip_keeps_the_word_and_hides_the_silence(engine):
    word = speak(ADA, "seven")
    for seed in range(20):
        clip = make_clip(word, random.Random(seed)) / 32768
        at = torch.fft.irfft(torch.fft.rfft(clip, 2 * SECOND) * torch.fft.rfft(word, 2 * SECOND).conj()).argmax()
        part = clip[at:at + len(word)]
        assert abs(at - (SECOND - len(word)) / 2) <= 1600 and torch.dot(part, word) > 0.99 * part.norm() * word.norm()
        assert (clip[:1000] == 0).float().mean() < 0.05 and clip[:1000].abs().max() < 0.06
    whole = make_clip(torch.ones(SECOND), random.Random(0))                         # a word as long as the clip
    assert whole.dtype == torch.int16 and len(whole) == SECOND
    assert torch.equal(say(ADA, "internationally", random.Random(0)), say(ADA, "internationally", random.Random(0)))
    with pytest.raises(ValueError, match="takes more than a second"): say(ADA, "antidisestablish" * 3, random.Random(0))


def test_pace_and_pitch_reach_the_engine(engine):
    word, fast = speak(ADA, "seven"), speak(ADA, "seven", pace=1.4)
    assert abs(len(fast) / len(word) - 1 / 1.4) < 0.05
    peak = lambda x: torch.fft.rfft(x, SECOND).abs()[50:300].argmax() + 50           # Hz: one bin each
    low, high = speak(ADA, "s"), speak(ADA, "s", pitch=12)              # one letter, so one tone
    assert abs(peak(low) - 110) <= 2 and abs(peak(high) - 220) <= 4
    assert command(Voice("flite", "slt", "slt"), "up", 2.0, 12.0)[3:] == [
        "--setf", "duration_stretch=0.500", "--setf", "f0_shift=2.000", "-t", "up", "-o", "/dev/stdout"]


def test_the_task_reads_the_twin(engine, tmp_path):
    task = SpeechTwin(voices=3, takes=1, data_dir=tmp_path)
    assert task.state().startswith("generate") and not list(tmp_path.glob("twin*"))
    task.prepare()
    assert task.state().startswith("ready") and [len(task.dataset(s)) for s in SPLITS] == [35, 35, 35]
    assert task.classes == SC35 and all(hash_split(name) == s for s in SPLITS for name in task.dataset(s).names)
    card = str(task.card)
    assert all(text in card for text in ("SYNTHESISED", "flite not installed", "voices: train 1, val 1, test 1, none"))
    assert "published" not in card
    ten = SpeechTwin("sc10-twin", "mfcc", voices=3, takes=1, data_dir=tmp_path).prepare()
    assert ten.card.name == "sc10-twin-mfcc"
    assert ten.classes == SC10 and len(ten.test) == 10 and ten.train[0][0].shape == (161, 20)
    batch = next(iter(task.loader("test", 4, rate=2)))
    assert batch.x.shape == (4, 8000, 1) and batch.lengths is None


# -- real engines, where they are installed

@pytest.mark.skipif(not shutil.which("espeak-ng"), reason="espeak-ng is not installed")
def test_espeak_has_voices_and_names_for_the_same_voice():
    voices = {v.speaker: v for v in spoken.voices_of("espeak-ng")}
    assert len(voices) > 60 and "espeak whisper" not in voices and len(spoken.accents()) >= 5
    for accent in spoken.accents():                                     # each says a word differently in two variants
        f1, m3 = (probe(Voice("espeak-ng", f"{accent}+{v}", ""), ["seven"]) for v in ("f1", "m3"))
        assert likeness(f1, m3[None]) < 0.6, accent
    assert torch.equal(speak(voices["espeak f1"], "seven"), speak(voices["espeak f1"], "seven"))
    f1, steph, same, m3 = (probe(voices[f"espeak {v}"]) for v in ("f1", "steph", "steph2", "m3"))
    like = likeness(steph, torch.stack([steph, same, f1, m3]))
    assert like[0] > 0.999 and like[1] > 0.95 and like[2:].max() < 0.6
    assert len(speak(voices["espeak f1"], "seven", pace=1.3)) < 0.9 * len(speak(voices["espeak f1"], "seven"))


@pytest.mark.skipif(not shutil.which("flite"), reason="flite is not installed")
def test_flite_and_festival_share_a_speaker():
    kept = [v for v in spoken.voices_of("flite") if torch.is_tensor(probe(v))]
    assert {v.speaker for v in kept} == {"slt", "rms", "awb", "kal16"}
    if shutil.which("festival"): assert {v.speaker for v in spoken.voices_of("festival")} <= {"slt"}
    assert all(0.2 * SECOND < len(speak(v, "seven")) < 0.9 * SECOND for v in kept)
