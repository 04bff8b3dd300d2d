"""Pathfinder images: functions of their index, of the law that was measured on the original; files that survive a kill."""
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest

from s4nb.data import contour_files, contours
from s4nb.data.contour_files import generate
from s4nb.data.contours import PathfinderSettings, draw_image, draw_images

Image = pytest.importorskip("PIL.Image")
HARD, EASY = PathfinderSettings.of(32), PathfinderSettings.of(32, 6)


@pytest.fixture(scope="module")
def drawn(): return draw_images(HARD, 0, range(400))


def files(folder): return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


def test_an_image_is_a_function_of_settings_seed_and_index(drawn):
    some = [7, 399, 0, 31]
    images, labels, infos = draw_images(HARD, 0, some)
    assert np.array_equal(images, drawn[0][some]) and np.array_equal(labels, drawn[1][some])
    assert [i["dots"] for i in infos] == [drawn[2][k]["dots"] for k in some]
    assert [i["attempts"] for i in infos] == [drawn[2][k]["attempts"] for k in some]
    image, label, info = draw_image(HARD, 0, 31)
    assert np.array_equal(image, drawn[0][31]) and label == drawn[1][31] and image.dtype == np.uint8
    assert not np.array_equal(draw_image(HARD, 1, 31)[0], image)
    assert len({i.tobytes() for i in drawn[0]}) == 400


def test_slots_do_not_matter(monkeypatch):
    "However many attempts are run side by side, the first in order counts."
    before = draw_images(EASY, 3, range(20))[0]
    monkeypatch.setattr(contours, "SLOTS", 7)
    assert np.array_equal(draw_images(EASY, 3, range(20))[0], before)


def test_label_says_whether_the_dots_are_on_one_path(drawn):
    clear = 0
    for label, info in zip(*drawn[1:]):
        first = [i for i, path in enumerate(info["paths"]) if np.allclose(path[0, 0], info["dots"][0])]
        last = [i for i, path in enumerate(info["paths"]) if np.allclose(path[-1, 1], info["dots"][1])]
        assert len(first) == 1 and (first[0] if label else 1 - first[0]) in last
        clear += len(last) == 1
    assert clear > 0.97 * len(drawn[1])             # the last two paddles may collide: the original does not look


def test_paths_are_chains_of_lit_paddles_with_gaps(drawn):
    s = HARD
    for image, _, info in zip(*(x[:100] for x in drawn)):
        paths = info["paths"]
        assert paths.shape == (2, 14, 2, 2) and paths.min() > 0 and paths.max() < 31
        assert np.allclose(np.linalg.norm(paths[:, :, 1] - paths[:, :, 0], axis=-1), s.paddle_length)
        gap = np.linalg.norm(paths[:, 1:, 0] - paths[:, :-1, 1], axis=-1)
        assert gap.max() < 2 * s.paddle_margins[0] + 2.5                # 2 margins, and what rounding adds
        turn = np.abs((np.diff(info["bearings"]) + np.pi) % (2 * np.pi) - np.pi)
        assert turn.max() < np.pi / 2 / s.continuity
        starts = np.concatenate((paths[:, :1, 0], paths[:, 1:, 1]), 1).astype(int)      # integer ends: drawn from there
        assert (image[starts[..., 0], starts[..., 1]] > 40).all()
        for y, x in info["dots"]: assert image[y, x] > 180


def test_statistics_of_the_original_32(drawn):
    "The table of the original's statistics (n = 200), within four standard errors of the difference."
    images, labels, infos = drawn
    x = images.reshape(400, -1).astype(float)
    attempts = np.array([i["attempts"] for i in infos]) * 360 / len(contours.geometry_of(HARD, 1).usable) - 1
    found = {"restarts": (attempts, 298), "placed": ([len(i["distractors"]) for i in infos], 1.25), "mean": (x.mean(1), 20.3),
             "std": (x.std(1), 51.1), "> 0": ((x > 0).mean(1), .343), "> 127": ((x > 127).mean(1), .085), "label": (labels, .5)}
    for name, (values, original) in found.items():
        error = np.std(values) * (1 / 400 + 1 / 200) ** 0.5
        assert abs(np.mean(values) - original) < 4 * error, (name, np.mean(values), original, error)
    share = np.histogram(x[x > 0], [1, 32, 64, 96, 128, 160, 192, 224, 256])[0] / (x > 0).sum()
    assert np.abs(share - [.574, .057, .058, .062, .117, .077, .036, .019]).max() < .012
    assert (x.max(1) == 255).all() and (x.min(1) == 0).all()


@pytest.mark.parametrize("size, mean, std, placed", [(128, 7.9, 35.6, 7.7)])
def test_statistics_of_the_original_128(size, mean, std, placed):
    images, _, infos = draw_images(PathfinderSettings.of(size), 0, range(24))
    assert abs(images.mean() - mean) < 0.4 and abs(images.std((1, 2)).mean() - std) < 0.9       # n = 10 there: ±0.13, ±0.3
    assert abs(np.mean([len(i["distractors"]) for i in infos]) - placed) < 0.8                  # ±0.2
    assert {i["margin"] for i in infos} == {2, 3}


@pytest.mark.parametrize("size", [64, 256])
@pytest.mark.parametrize("length", [6, 9])
def test_every_size_and_level_draws(size, length):
    settings = PathfinderSettings.of(size, length)
    image, label, info = draw_image(settings, 0, 0)
    assert image.shape == (size, size) and label in (0, 1) and info["paths"].shape == (2, length, 2, 2)


def test_turns_follow_the_law():
    "In an empty field, first turns from one direction: weight cos²(cδ) over the circle's points."
    g, n, kind = contours.geometry_of(PathfinderSettings.of(64), 1), 4000, 200
    growth, rows = contours.Growth(g, n, 2, 1), np.arange(n)
    growth.start(rows, contours.mix(np.full(n, 9, np.uint64)), rows, np.full((n, 1, 2), 32), np.full((n, 1), kind))
    assert growth.tick(rows).all()
    seen = np.bincount(growth.kind[:, 1], minlength=len(g.angle))[360:]
    turn = np.abs((g.angle[360:] - g.angle[kind] + np.pi) % (2 * np.pi) - np.pi) * 1.8
    law = np.where(turn < np.pi / 2, np.cos(turn) ** 2, 0)
    law = law / law.sum() * n
    assert not seen[law == 0].any() and ((seen - law)[law > 0] ** 2 / law[law > 0]).sum() < 2 * (law > 0).sum() + 10


def test_files_do_not_depend_on_workers_and_have_the_releases_layout(tmp_path):
    one, two = (generate(tmp_path / str(w), EASY, 50, seed=4, workers=w, batch=20) for w in (1, 2))
    assert one == tmp_path / "1" / "curv_baseline" and files(one) == files(two)
    images, labels, infos = draw_images(EASY, 4, range(50))
    for k, n in enumerate((20, 20, 10)):
        lines = [line.split() for line in (one / "metadata" / f"{k}.npy").read_text().splitlines()]
        assert len(lines) == n
        for i, row in enumerate(lines):
            assert row == [f"imgs/{k}", f"sample_{i}.png", str(i), str(labels[20 * k + i]), "1.0", "6", "2", "2", "0.5", "1", "1"]
            assert np.array_equal(np.asarray(Image.open(one / row[0] / row[1])), images[20 * k + i])
    assert generate(tmp_path / "n", PathfinderSettings.of(32), 1).name == "curv_contour_length_14"


def test_more_images_are_added_and_fewer_change_nothing(tmp_path):
    few = generate(tmp_path / "a", EASY, 30, batch=20, workers=1)
    before = files(few)
    generate(tmp_path / "a", EASY, 25, batch=20, workers=1)
    assert files(few) == before
    generate(tmp_path / "a", EASY, 45, batch=20, workers=1)
    assert files(few) == files(generate(tmp_path / "b", EASY, 45, batch=20, workers=1))


WORK = """import sys; from s4nb.data.contour_files import *; from s4nb.data.contours import PathfinderSettings
generate(sys.argv[1], PathfinderSettings.of(32, 6), 3000, workers=2, batch=25)"""


def test_a_killed_run_leaves_no_process_and_continues(tmp_path):
    run = subprocess.Popen([sys.executable, "-c", WORK, str(tmp_path)], start_new_session=True)
    level = tmp_path / "curv_baseline"
    end = time.monotonic() + 60
    while len(list(level.glob("metadata/*.npy"))) < 2 and time.monotonic() < end: time.sleep(0.02)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    done = {p.name: p.stat().st_mtime_ns for p in level.glob("metadata/*.npy")}
    while time.monotonic() < end:
        try: os.killpg(run.pid, 0)                                      # its workers are of its group
        except ProcessLookupError: break
        time.sleep(0.1)
    else: raise AssertionError("workers outlived the run")
    (level / "imgs" / ".9.x.tmp").mkdir()                               # what a kill leaves in the middle of a batch
    (level / "imgs" / "3").mkdir(exist_ok=True)
    kept = {p.name: p.stat().st_mtime_ns for p in level.glob("metadata/*.npy")}
    assert 2 <= len(done) <= len(kept) < 120
    generate(tmp_path, EASY, 25 * 8, workers=1, batch=25)
    for name, at in kept.items(): assert (level / "metadata" / name).stat().st_mtime_ns == at
    assert not list(level.glob("*/.*.tmp"))
    for k in range(8): assert len(list((level / "imgs" / str(k)).glob("*.png"))) == 25
    last = draw_images(EASY, 0, range(175, 200))[0]
    assert all(np.array_equal(np.asarray(Image.open(level / "imgs/7" / f"sample_{i}.png")), last[i]) for i in range(25))


def test_a_folder_is_not_mixed(tmp_path):
    generate(tmp_path, EASY, 5, batch=5, workers=1)
    for other in ({"seed": 1}, {"batch": 6}, {"settings": replace(EASY, n_distractors=1)}):
        with pytest.raises(ValueError, match="choose another folder"):
            generate(**{"folder": tmp_path, "settings": EASY, "n": 5, "batch": 5, "workers": 1, **other})


def test_a_worker_that_dies_is_an_error_and_whole_batches_stay(tmp_path, monkeypatch):
    real = contours.draw_images

    def deadly(settings, seed, indices):
        if indices[0] == 10:
            time.sleep(0.5)
            os.kill(os.getpid(), signal.SIGKILL)
        return real(settings, seed, indices)

    monkeypatch.setattr(contour_files, "draw_images", deadly)
    with pytest.raises(Exception, match="terminated abruptly"): generate(tmp_path, EASY, 15, batch=5, workers=2)
    assert not (tmp_path / "curv_baseline/metadata/2.npy").exists()
    monkeypatch.undo()
    assert len(list(generate(tmp_path, EASY, 15, batch=5, workers=1).glob("imgs/*/*.png"))) == 15


@pytest.mark.parametrize("change, says", [
    ({"paddle_margins": ()}, "margins"), ({"paddle_margins": (0,)}, "margins"), ({"seed_distance": 8}, "seed_distance"),
    ({"seed_distance": 3}, "seed_distance"), ({"contour_length": 2}, "contour_length"), ({"padding": 0}, "padding"),
    ({"paddle_thickness": 0.75}, "whole")])
def test_bad_settings_are_refused(change, says):
    with pytest.raises(ValueError, match=says): replace(HARD, **change)


def test_bad_calls_are_refused(tmp_path):
    with pytest.raises(ValueError, match="32, 64, 128, 256"): PathfinderSettings.of(100)
    for bad in ({"n": 0}, {"n": 2.5}, {"seed": -1}, {"workers": 0}, {"batch": 0}):
        with pytest.raises(ValueError, match=next(iter(bad))): generate(tmp_path, EASY, **{"n": 2, **bad})
    for seed, indices in ((0, []), (0, [-1]), (-1, [0]), (0, [[1]])):
        with pytest.raises(ValueError, match="indices from 0 on"): draw_images(EASY, seed, indices)
