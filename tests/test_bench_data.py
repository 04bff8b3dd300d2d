"""The benchmark of the data runs at tiny sizes and tells what it did not run. No time is asserted."""

import json

from s4nb import bench_data


def test_two_tasks_at_tiny_sizes(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DATA_PATH", str(tmp_path / "data"))
    names = ["adding", "lra-aan"]
    arguments = sum([["--only", name] for name in names], []) + ["--seconds", "0.05", "--out", str(tmp_path / "out")]
    assert bench_data.main(arguments) == 0
    card = json.loads((tmp_path / "out/card.json").read_text())
    done, absent = card["rows"]
    assert card["state"] == "trial" and done["task"] == "adding" and absent["task"] == "lra-aan"
    assert absent["not_run"].startswith(("download", "missing")) and "ratio" not in absent
    assert done["examples"] == 55_000 and done["length"] == 1000 and done["loader_per_s"] > 0 and done["model_per_s"] > 0
    assert abs(done["ratio"] - done["loader_per_s"] / done["model_per_s"]) < 0.06
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("adding ") and "download" in printed[1] and not (tmp_path / "data").exists()


def test_a_row_says_whether_the_goal_is_reached():
    row = {"task": "t", "examples": 10, "prepare_wall_s": 1.0, "peak_mb": 2, "disk_mb": 3.0, "loader_per_s": 40,
           "model_per_s": 10, "ratio": 4.0}
    assert "4.0x  (goal 5: NOT reached)" in bench_data.line(row)
    assert bench_data.line(row | {"ratio": 5.0}).endswith("5.0x")
    assert "FAILED: no" in bench_data.line({"task": "t", "failed": "no"})
