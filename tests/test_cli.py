"""The `s4nb` command: a run, a sweep, and one clear line for each mistake."""
import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from house import ROOT

from s4nb.data import tasks
from s4nb.training.configs import GROUPS, Constant
from s4nb.training.experiments import experiment
from s4nb.training.run import WIDTH, evaluate, main
from s4nb.training.tables import EXPERIMENTS, FAMILIES

SMALL = ["experiment=listops-mini", "dataset.sizes=[640,32,32]", "model.d_model=8", "model.n_layers=1", "trainer.max_epochs=1", "trainer.threads=1"]
COMMAND = "import sys; from s4nb.training.run import main; sys.exit(main())"


def shell(*arguments, cwd):
    return subprocess.run([sys.executable, "-c", COMMAND, *arguments], cwd=cwd, capture_output=True, text=True,
                          timeout=300, env={**os.environ, "PYTHONPATH": str(ROOT)})


def test_twenty_steps_in_an_empty_folder(tmp_path):
    done = shell("train", *SMALL, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    card = json.loads((tmp_path / "results" / "listops-mini" / "card.json").read_text())
    assert card["steps"] == 20 and card["state"] == "measured"
    assert card["command"] == "s4nb train " + " ".join(SMALL)
    assert f"test accuracy {100 * card['test_accuracy']:.2f} %" in done.stdout and "majority class" in done.stdout
    assert "kernel.inv_dt" in done.stdout and "Traceback" not in done.stderr
    assert {p.name for p in tmp_path.iterdir()} == {"data", "results"}
    assert {p.name for p in (tmp_path / "results" / "listops-mini").iterdir()} == {
        "card.json", "config.yaml", "curve.png", "metrics.csv", "checkpoints", "tensorboard", "weights"}


def test_hydra_shows_the_configuration(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "experiment=lra-listops", "model/layer=s4d", "--cfg", "job"]) == 0
    shown = capsys.readouterr().out
    assert "init: diag-lin" in shown and "n_layers: 6" in shown and list(tmp_path.iterdir()) == []


def test_another_schedule_keeps_what_it_has_a_field_for(tmp_path, monkeypatch, capsys):
    "Another choice of a group replaces the experiment's, and what it has no field for."
    monkeypatch.chdir(tmp_path)
    assert main(["train", "experiment=listops-mini", "scheduler=constant", "--cfg", "job"]) == 0
    assert "warmup: 120" in capsys.readouterr().out
    assert experiment("listops-mini", "scheduler=constant").scheduler == Constant(warmup=120)
    assert experiment("listops-mini").scheduler == EXPERIMENTS["listops-mini"].scheduler


@pytest.mark.parametrize("arguments,text", [
    (["trian"], "did you mean 'train'"),
    (["train", "experiment=listop-mini"], "did you mean 'listops-mini'"),
    (["train", "experiment=none-such"], "allowed: lra-listops"),
    (["train", "model.d_model=64"], "experiment=NAME"),
    (["train", "listops-mini"], "did you mean experiment=listops-mini"),
    (["train", "experiment=listops-mini", "model.d_modle=64"], "did you mean 'model.d_model'"),
    (["train", "experiment=listops-mini", "modle.d_model=64"], "did you mean 'model.d_model'"),
    (["train", "experiment=listops-mini", "+model.width=64"], "unknown key 'model.width'"),
    (["train", "experiment=listops-mini", "model/layer=s4x"], "allowed: s4, s4d, lssl, gss"),
    (["train", "experiment=listops-mini", "model.d_model=wide"], "could not be converted to Integer"),
    (["train", "experiment=listops-mini", "model/layer=custom", "model.layer.arguments.size=3"], "write +model.layer.arguments.size=3"),
    (["train", "experiment=listops-mini", "model.norm=bath"], "did you mean 'batch'"),
    (["train", "experiment=listops-mini", "model.d_model=4,8"], "multirun"),
    (["train", "experiment=listops-mini", "model.d_modle=4,8", "--multirun"], "did you mean 'model.d_model'"),
    (["train", "experiment=listops-mini", "model.layer.mode=dplx", "dataset.sizes=[4,4,4]"], "dplr"),
    (["train", "experiment=listops-mini", "dataset.sizes=[4,4]"], "sizes"),
    (["data", "listops-mni"], "did you mean 'listops-mini'"),
    (["data", "--lst"], "unrecognized arguments: --lst (see `s4nb data --help`)"),
    (["experiments", "lra-listop"], "did you mean 'lra-listops'"),
    (["eval"], "required: checkpoint"),
    (["eval", "nowhere"], "nowhere is not there"),
    (["generate", "nowhere", "--out", "song.mp3"], "allowed: .txt, .wav, .png"),
    (["generate", "nowhere", "--n", "two"], "invalid int value: 'two'"),
    (["generate", "nowhere", "--prompt", "a", "--prefix", "3"], "choose one"),
    (["report", "nowhere"], "nowhere is no folder"),
])
def test_a_mistake_is_one_line(arguments, text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DATA_PATH", str(tmp_path / "data"))
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("s4nb: ") and err.count("\n") == 1 and text in err
    assert not (tmp_path / "results").exists()


def test_help_and_lists(tmp_path, capsys):
    assert main([]) == main(["--help"]) == 0
    assert main(["train", "--help"]) == main(["train", "experiment=listops-mini", "--help"]) == 0
    shown = capsys.readouterr().out
    for text in ("experiment=NAME", "trainer. max_epochs=40", "--multirun", *EXPERIMENTS, *GROUPS["dataset"], *GROUPS["model/layer"]):
        assert text in shown
    assert main(["data", "--list"]) == 0 and "listops-mini" in capsys.readouterr().out


def test_help_is_no_wall_of_text(capsys):
    main(["train", "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 80 and max(map(len, lines)) <= WIDTH


def test_every_experiment_is_listed_with_what_was_published(capsys):
    assert main(["experiments"]) == 0
    shown = capsys.readouterr().out
    lines = {line.split()[0]: line for line in shown.splitlines() if line.startswith("  ")}
    assert list(lines) == list(EXPERIMENTS) and all(f"\n{family}\n" in shown for family in FAMILIES)
    for name, e in EXPERIMENTS.items():
        assert e.about in lines[name] and all(f"{value:.2f} %" in lines[name] for value in list(e.published.values())[:1])


@pytest.mark.parametrize("name", ["pmnist-lssl", "digits-next"])
def test_what_is_shown_of_an_experiment_is_what_one_can_type(name, capsys):
    assert main(["experiments", name]) == 0
    shown, e = capsys.readouterr().out, EXPERIMENTS[name]
    assert all(f"{value:g} % ({source})" in shown for source, value in e.published.items())
    typed, group = [], None
    for line in shown.partition("\n\n")[2].partition("\n\n")[0].splitlines():
        if line.startswith(" "): typed += [f"{group.replace('/', '.')}.{text}" for text in line.replace("*", "").split()]
        else:
            group = line.partition("=")[0]
            typed.append(line)
    typed = [f"++{text}" if ".options_of." in text else text for text in typed]
    same = experiment("listops-mini", *typed)
    assert replace(same, name=name, about=e.about, published=e.published) == e
    starred = " ".join(line for line in shown.splitlines() if "*" in line)
    assert f"batch_size={e.dataset.batch_size}" in starred and "eps=" not in starred


def test_without_hydra_all_but_train_works(tmp_path):
    code = ("import sys; sys.modules.update(dict.fromkeys(['hydra', 'omegaconf', 'lightning', 'torchmetrics']))\n"
            "from s4nb.training.run import main\n"
            "print([main(['experiments']), main(['report', '.']), main(['train', 'experiment=digits']), main(['eval', 'x'])])")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.stdout.endswith("[0, 0, 2, 2]\n"), done.stderr
    assert done.stderr.count("\n") == 2 == done.stderr.count('pip install "s4nb[train]"')


# ---- what is done with the weights of a run ----------------------------------------------------------------------------
@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A folder with a run of listops-mini at two epochs and one of digits-next, both very small."
    folder, before = tmp_path_factory.mktemp("runs"), os.getcwd()
    os.chdir(folder)
    try:
        assert main(["train", *SMALL, "trainer.max_epochs=2", "trainer.progress=false", "callbacks.ema=0.9"]) == 0
        assert main(["train", "experiment=digits-next", "model.d_model=8", "model.n_layers=1", "trainer.max_steps=3",
                     "trainer.progress=false", "trainer.threads=1", "trainer.limit_val_batches=1", "trainer.limit_test_batches=1"]) == 0
        yield folder
    finally: os.chdir(before)


@pytest.fixture
def here(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    capsys.readouterr()
    return place


def test_eval_gives_the_numbers_of_the_card(here, capsys):
    card = json.loads((here / "results" / "listops-mini" / "card.json").read_text())
    found = evaluate("results/listops-mini", "trainer.progress=false")
    assert {k: v for k, v in found.items() if k.startswith("test/")} == card["result"]
    monitor = card["config"]["train"]["monitor"]
    assert found[monitor] == card["best_epoch"][monitor]
    other = evaluate("results/listops-mini/checkpoints/best.ckpt", "trainer.progress=false", "dataset.batch_size=5")
    assert other == pytest.approx(found, abs=1e-5)  # float32, other batches
    assert main(["eval", "results/listops-mini", "trainer.progress=false", "trainer.accelerator=cpu"]) == 0
    shown = capsys.readouterr().out
    assert f"test/accuracy  {100 * card['test_accuracy']:.2f} %" in shown and "val/loss" in shown


@pytest.mark.parametrize("change,text", [
    ("dataset.batchsize=5", "did you mean 'dataset.batch_size'"), ("model=sashimi", "saved weights keep their experiment"),
    ("+dataset.x=1", "saved weights keep"), ("dataset.batch_size=many", "could not be converted to Integer"),
    ("model.d_model=16", "does not fit its configuration"), ("dataset.rates=[1,2]", "tokens have no other rate than 1"),
    ("experiment=lra-imdb", "saved weights keep"), ("batch", "is no override")])
def test_eval_refuses_in_one_line(here, change, text, capsys):
    assert main(["eval", "results/listops-mini", change, "trainer.progress=false"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("s4nb: ") and err.count("\n") == 1 and text in err


def test_eval_at_another_rate(tmp_path, monkeypatch):
    "Every second step of images, by hand and by eval."
    from s4nb.training.pretrained import from_pretrained
    monkeypatch.chdir(tmp_path)
    assert main(["train", "experiment=digits", "model.d_model=8", "model.n_layers=1", "trainer.max_steps=3", "trainer.progress=false"]) == 0
    found = evaluate("results/digits", "dataset.rates=[1,2]", "trainer.progress=false")
    data, model = experiment("digits").dataset.build().prepare(), from_pretrained("results/digits")
    for rate, name in ((1, "test/accuracy"), (2, "test/2/accuracy")):
        right = [model(b.x, b.lengths, b.rate).argmax(-1) == b.y for b in data.loader("test", 50, rate=rate)]
        assert found[name] == pytest.approx(float(torch.cat(right).float().mean()), abs=1e-6)


def test_generate_prints_and_writes(here, capsys):
    run = "results/digits-next"
    assert main(["generate", run, "--n", "2", "--seed", "3"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.strip().split("\n\n")]
    assert len(rows) == 2 and all(len(row) == 64 and all(0 <= int(t) <= 16 for t in row) for row in rows)
    assert main(["generate", run, "--n", "2", "--seed", "3", "--out", "two.txt"]) == 0
    assert capsys.readouterr().out == "two.txt\n" and (here / "two.txt").read_text().split() == sum(rows, [])
    assert main(["generate", run, "--n", "5", "--prefix", "32", "--out", "five.png", "--temperature", "0.5", "--top-p", "0.9"]) == 0
    from matplotlib.image import imread
    sheet = imread(here / "five.png")
    assert sheet.shape[:2] == (2 * 9, 3 * 9)
    given = experiment("digits-next").dataset.build().prepare().test[0][1][:32]
    assert torch.allclose(torch.tensor(sheet[:4, :8, 0]).flatten(), given / 16, atol=1 / 128)
    for change, text in ((["--out", "a.wav"], "choose .txt or .png"), (["--prompt", "7"], "leave --prompt out"),
                         (["--steps", "60", "--out", "a.png"], "as many steps as a picture has"), (["--steps", "0"], "at least 1"),
                         (["--top-p", "2"], "top_p=2")):
        assert main(["generate", run, *change]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and text in err, err
    assert main(["generate", "results/listops-mini"]) == 2 and "dataset=next-step" in capsys.readouterr().err


def test_generate_speaks_and_writes(tmp_path, monkeypatch, capsys):
    "Sound into wav files, letters into texts that begin with the prompt; straight from new weights."
    from s4nb.data.audio import read_wav
    from s4nb.training.architectures import Facts
    from s4nb.training.pretrained import save_pretrained
    monkeypatch.chdir(tmp_path)

    def saved(name, *overrides):
        e = experiment("digits-next", "model.d_model=8", "model.n_layers=1", *overrides)
        facts = Facts.of(e.dataset.build().prepare())
        save_pretrained(name, e.model.build(facts), e, facts)

    saved("symbols", "dataset.of=listops-mini", "~dataset.options_of.tokenize", "+dataset.options_of.sizes=[64,8,8]")
    assert main(["generate", "symbols", "--prompt", "12", "--steps", "5", "--n", "3", "--out", "out.txt"]) == 0
    texts = (tmp_path / "out.txt").read_text().split("\n\n")
    assert len(texts) == 3 and all(text.startswith("12") for text in texts)
    monkeypatch.setattr("s4nb.training.trained.SpokenDigits", Tone)
    monkeypatch.setattr("s4nb.data.tasks.TASKS", {"tone": Tone})
    saved("sound", "dataset.of=tone", "dataset.quantize=mu-law", "~dataset.options_of.tokenize")
    assert main(["generate", "sound", "--n", "2", "--steps", "300", "--out", "say.wav"]) == 0
    assert capsys.readouterr().out.endswith("say-1.wav\nsay-2.wav\n")
    assert all(len(read_wav(tmp_path / f"say-{i}.wav", 8000)) == 300 for i in (1, 2))
    assert main(["generate", "sound", "--steps", "300", "--out", "say.png"]) == 2


class Tone(tasks.OwnData):
    "Forty short sounds."
    def __init__(self):
        torch.manual_seed(0)
        super().__init__([(torch.randn(400), 0) for _ in range(40)], name="tone")


def test_report_has_the_run(here, capsys):
    assert main(["report"]) == 0
    shown = capsys.readouterr().out
    assert "| [listops-mini](listops-mini/card.json)" in shown and "[digits-next]" in shown
    assert main(["report", "results", "--write"]) == 0
    assert capsys.readouterr().out == "results/README.md\n" and shown in (here / "results" / "README.md").read_text()


# ---- runs that fail, or are stopped ------------------------------------------------------------------------------------
def test_a_run_that_fails_is_one_line_and_1(tmp_path, monkeypatch, capsys):
    "In a sweep each job has its folder, and the others go on."
    monkeypatch.chdir(tmp_path)
    quick = [a for a in SMALL if not a.startswith("trainer.max_epochs")] + ["trainer.max_epochs=1", "trainer.progress=false", "scheduler=constant", "scheduler.warmup=0"]
    assert main(["train", *quick, "optimizer.lr=1e30,0.01", "--multirun"]) == 1
    err, states = capsys.readouterr().err, {}
    for path in (tmp_path / "results").glob("*/card.json"):
        card = json.loads(path.read_text())
        states[card["config"]["optimizer"]["lr"]] = card["state"]
    assert err.startswith("s4nb train: the loss is") and "Traceback" not in err
    assert states == {1e30: "failed", 0.01: "measured"}


def test_a_full_disk_is_one_line_and_1(tmp_path, monkeypatch, capsys):
    def full(*arguments): raise OSError(28, "No space left on device")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("s4nb.training.fit.run", full)
    assert main(["train", *SMALL]) == 1
    assert capsys.readouterr().err == "s4nb train: [Errno 28] No space left on device\n"


def test_a_bug_keeps_its_traceback(tmp_path, monkeypatch):
    def wrong(*arguments): raise ZeroDivisionError("a bug")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("s4nb.training.fit.run", wrong)
    with pytest.raises(ZeroDivisionError): main(["train", *SMALL, "seed=0,1", "--multirun"])


def test_a_stopped_run_says_why_and_has_its_code(tmp_path, monkeypatch, capsys):
    from s4nb.training.resume import Stopped
    def stopped(*arguments): raise Stopped("SIGTERM came: stopped at step 3", 143)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("s4nb.training.fit.run", stopped)
    for more in ([], ["seed=0,1", "--multirun"]):  # a sweep ends, too
        assert main(["train", *SMALL, *more]) == 143
        assert capsys.readouterr().err == "s4nb train: SIGTERM came: stopped at step 3\n"


def test_a_run_from_other_weights(here, capsys):
    "train.pretrained, and its mistakes."
    begin = ["train", *SMALL, "trainer.max_steps=1", "trainer.progress=false", "output_dir=results/second"]
    assert main([*begin, "train.pretrained=results/listops-mini"]) == 0
    assert "all weights" in capsys.readouterr().out
    for path, text in (("nowhere", "is not there"), ("results/digits-next", "only the decoder may differ")):
        assert main([*begin, f"train.pretrained={path}"]) == 2
        assert text in capsys.readouterr().err


def test_data_prints_the_card(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(tasks.TASKS, "tiny", lambda data_dir=None: tasks.ListOps(sizes=[8, 4, 4], data_dir=data_dir))
    assert main(["data", "tiny", "--data-dir", str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith("generate: ")
    assert main(["data", "tiny", "--data-dir", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("ready: ") and "majority class" in out


def test_data_that_cannot_be_had_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DATA_PATH", str(tmp_path))
    assert main(["data", "manpages", "--data-dir", str(tmp_path / "nowhere")]) == 2
    assert main(["data", "adding", "--data-dir", "x"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2 and all(e.startswith("s4nb: ") for e in errors) and "no option" in errors[1]

    def full(**options): raise OSError(28, "No space left on device")
    monkeypatch.setitem(__import__("s4nb.data.tasks").data.tasks.TASKS, "full", full)
    assert main(["data", "full"]) == 1 and "No space left" in capsys.readouterr().err
