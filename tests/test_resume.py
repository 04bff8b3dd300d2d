"Checkpoints are whole or absent, and a run that was killed anywhere ends like one that was not."
import dataclasses
import json
import os
import random
import resource
import signal
import time
from pathlib import Path

import lightning as L
import pytest
import runs
import torch
from lightning.pytorch.plugins.environments import SLURMEnvironment
from runs import Toy, experiment, finish, start, toy_model, toy_run, wait_for

from s4nb.training.configs import Callbacks, Constant, Plateau
from s4nb.training.devices import Batches
from s4nb.training.record import load_card, load_rows
from s4nb.training.resume import (AtomicCheckpointIO, Stopped, canonical, claim, find_run, readable, seconds_of,
                                  settings_of)


def equal(a, b): return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def last(folder): return Path(folder) / "checkpoints" / "last.ckpt"


# ---- processes that are killed ---------------------------------------------------------------------------------------
def outcome(folder):
    "What a run leaves that must not depend on its interruptions."
    checkpoint = torch.load(last(folder / "toy"), weights_only=True)
    rows, card = load_rows(folder / "toy/metrics.csv"), load_card(folder / "toy")
    rows = [{key: value for key, value in row.items() if key != "seconds"} for row in rows]
    return checkpoint["state_dict"], checkpoint["optimizer_states"][0]["state"], rows, card["state"], card.get("result")


def assert_same(a, b):
    assert equal(a[0], b[0])
    assert all(equal(a[1][i], b[1][i]) for i in a[1]) and a[1].keys() == b[1].keys()
    assert a[2:] == b[2:]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    process, steps = start(experiment(folder))
    assert finish(process) == 0 and not wait_for(steps, 10**9)
    result = outcome(folder)
    assert result[3] == "measured" and len(result[2]) == 3
    return result


def run_with_kills(folder, kills, rng):
    "Kills a run of 15 steps at random moments, so many times, and then lets it end. Returns the steps of the kills."
    struck = []
    while True:
        process, steps = start(experiment(folder))
        at = steps.recv() + rng.randrange(max(2, 12 // kills))
        if len(struck) < kills and wait_for(steps, at):
            time.sleep(rng.uniform(0, 0.02))
            process.kill()
            finish(process)
            struck.append(at)
        else:
            assert finish(process) == 0
            return struck


def test_two_kills_change_nothing(tmp_path, uninterrupted):
    assert len(run_with_kills(tmp_path, 2, random.Random(0))) == 2
    assert_same(outcome(tmp_path), uninterrupted)
    assert sorted(p.name for p in tmp_path.glob("toy*")) == ["toy"]


@pytest.mark.stress
def test_twenty_kills_change_nothing(tmp_path, uninterrupted):
    rng, struck = random.Random(1), []
    while len(struck) < 20:
        folder = tmp_path / str(len(struck))
        struck += run_with_kills(folder, 20, rng)
        assert_same(outcome(folder), uninterrupted)
    assert len(set(struck)) > 5


def test_sigterm_saves_the_step_at_hand(tmp_path, uninterrupted):
    process, steps = start(experiment(tmp_path, checkpoint_minutes=1e9))
    assert wait_for(steps, 7)
    os.kill(process.pid, signal.SIGTERM)
    assert finish(process) == 128 + signal.SIGTERM
    assert torch.load(last(tmp_path / "toy"), weights_only=True)["global_step"] >= 8
    assert load_card(tmp_path / "toy")["state"] == "partial"
    process, _ = start(experiment(tmp_path))
    assert finish(process) == 0
    assert_same(outcome(tmp_path), uninterrupted)


# ---- in this process: where a run can be cut -------------------------------------------------------------------------
class Crash(RuntimeError): pass


class Crasher(L.Callback):
    "Raises before batch n of all, or in the middle or at the end of the validation of an epoch."

    def __init__(self, **at):
        self.at = at

    def on_train_batch_start(self, trainer, module, batch, index):
        if "batch" in self.at and trainer.fit_loop.epoch_loop.batch_progress.total.ready > self.at["batch"]: raise Crash

    def on_validation_batch_start(self, trainer, module, batch, index, dataloader_idx=0):
        if self.at.get("within") == trainer.current_epoch and index: raise Crash

    def on_validation_end(self, trainer, module):
        if self.at.get("validated") == trainer.current_epoch: raise Crash


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "Weights and rows of uninterrupted runs, each made once."
    made = {}

    def run(name, **arguments):
        if name not in made:
            made[name] = toy_run(tmp_path_factory.mktemp(name), **arguments)[1:]
        return made[name]
    return run


CASES = {"plain": {}, "max_steps": {"max_steps": 15, "max_epochs": -1}, "accumulate": {"accumulate": 2},
         "batch norm": {"norm": "batch"}, "average": {"extras": Callbacks(ema=0.9)}, "workers": {"workers": 1},
         "plateau": {"scheduler": Plateau(patience=0, factor=0.5), "max_epochs": 4},
         "early stop": {"extras": Callbacks(early_stopping=1), "max_epochs": 6},
         "limits": {"limit_train_batches": 4, "limit_val_batches": 2},
         "rare validation": {"check_val_every_n_epoch": 2, "max_epochs": 4}}
CUTS = [[{"batch": 2}, {"batch": 8}], [{"batch": 7}, {"within": 1}, {"validated": 1}], [{"within": 0}, {"batch": 13}]]


@pytest.mark.parametrize("case", CASES)
def test_a_run_of_pieces_is_the_whole_run(tmp_path, whole, case):
    weights, rows = whole(case, **CASES[case])
    cuts = CUTS[list(CASES).index(case) % len(CUTS)]
    for at in cuts:
        checkpoint = last(tmp_path) if last(tmp_path).exists() else None
        try:
            toy_run(tmp_path, checkpoint, minutes=0, spies=[Crasher(**at)], **CASES[case])
        except Crash:
            assert last(tmp_path).exists()
    _, resumed, resumed_rows = toy_run(tmp_path, last(tmp_path), minutes=0, **CASES[case])
    assert equal(resumed, weights) and resumed_rows == rows


@pytest.mark.stress
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("cuts", CUTS)
def test_every_cut_of_every_run(tmp_path, whole, case, cuts):
    weights, rows = whole(case, **CASES[case])
    for at in cuts:
        try:
            toy_run(tmp_path, last(tmp_path) if last(tmp_path).exists() else None, minutes=0, spies=[Crasher(**at)],
                    **CASES[case])
        except Crash:
            pass
    _, resumed, resumed_rows = toy_run(tmp_path, last(tmp_path), minutes=0, **CASES[case])
    assert equal(resumed, weights) and resumed_rows == rows


class Ticks:
    "A clock that is asked some fixed number of times a step, and goes on by one second each time."

    def __init__(self): self.now = 0

    def __call__(self):
        self.now += 1
        return self.now


def test_pieces_of_max_time_add_up(tmp_path, whole):
    weights, rows = whole("plain")
    stops = []
    for _ in range(20):
        try:
            _, resumed, resumed_rows = toy_run(tmp_path, last(tmp_path) if stops else None, clock=Ticks(),
                                               max_time="00:00:00:05")
            break
        except Stopped as end:
            stops.append(str(end))
            assert end.code == 0 and "max_time is over: stopped at step" in str(end) and str(last(tmp_path)) in str(end)
    assert len(stops) > 2 and equal(resumed, weights) and resumed_rows == rows


def test_a_piece_makes_at_least_one_step(tmp_path):
    with pytest.raises(Stopped, match="stopped at step 1;"):
        toy_run(tmp_path, max_time="00:00:00:00")


class Signal(L.Callback):
    "A signal comes in the middle of a step, or of the validation."

    def __init__(self, number, step=None, validation=None):
        self.number, self.step, self.validation = number, step, validation

    def on_before_optimizer_step(self, trainer, module, optimizer):
        if trainer.global_step == self.step: signal.raise_signal(self.number)

    def on_validation_batch_end(self, trainer, module, outputs, batch, index, dataloader_idx=0):
        if trainer.current_epoch == self.validation: signal.raise_signal(self.number)


@pytest.mark.parametrize("number, at, said", [(signal.SIGINT, {"step": 3}, "SIGINT came: stopped at step 4;"),
                                              (signal.SIGTERM, {"validation": 1}, "SIGTERM came: stopped at step 12;")])
def test_signals_stop_after_the_step(tmp_path, whole, number, at, said):
    before = signal.getsignal(number)
    with pytest.raises(Stopped, match=said) as stopped:
        toy_run(tmp_path, spies=[Signal(number, **at)])
    assert stopped.value.code == 128 + number and signal.getsignal(number) == before
    _, resumed, rows = toy_run(tmp_path, last(tmp_path))
    assert (resumed.keys(), rows) == (whole("plain")[0].keys(), whole("plain")[1]) and equal(resumed, whole("plain")[0])


def test_slurm_s_signal_waits_for_the_step(tmp_path, whole, monkeypatch):
    "Lightning's handler saves and queues the job again; here, with the counts of a step that is done."
    commands = []
    monkeypatch.setattr("lightning.pytorch.trainer.connectors.signal_connector.call", lambda c: commands.append(c) or 0)
    for key, value in {"JOB_ID": "7", "NTASKS": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{key}", value)
    _, weights, _ = toy_run(tmp_path, spies=[Signal(signal.SIGUSR1, step=3)], environment=SLURMEnvironment())
    assert commands == [["scontrol", "requeue", "7"]] and equal(weights, whole("plain")[0])
    assert torch.load(tmp_path / "hpc_ckpt_1.ckpt", weights_only=True)["global_step"] == 4
    _, resumed, rows = toy_run(tmp_path, tmp_path / "hpc_ckpt_1.ckpt", environment=SLURMEnvironment())
    assert equal(resumed, weights) and rows == whole("plain")[1]


def test_early_stopping_is_final(tmp_path):
    trainer, weights, rows = toy_run(tmp_path, extras=Callbacks(early_stopping=1), max_epochs=9)
    assert len(rows) < 9
    again, resumed, same = toy_run(tmp_path, last(tmp_path), extras=Callbacks(early_stopping=1), max_epochs=9)
    assert (again.global_step, same) == (trainer.global_step, rows) and equal(resumed, weights)


def test_a_finished_run_can_be_made_longer(tmp_path):
    scheduler = Constant()
    toy_run(tmp_path, scheduler=scheduler, max_epochs=2)
    _, longer, rows = toy_run(tmp_path, last(tmp_path), scheduler=scheduler, max_epochs=3)
    _, at_once, same = toy_run(tmp_path / "at once", scheduler=scheduler, max_epochs=3)
    assert equal(longer, at_once) and rows == same


def test_rows_have_the_metrics_of_their_own_epoch(whole):
    rows = whole("rare validation", **CASES["rare validation"])[1]
    assert [("val/loss" in row, "train/loss" in row) for row in rows] == [(False, True), (True, True)] * 2


def test_checkpoints_come_in_time(tmp_path):
    class Spy(L.Callback):
        saved = []

        def on_save_checkpoint(self, trainer, module, checkpoint):
            self.saved.append((trainer.global_step, self.stage(trainer)))

        def stage(self, trainer):
            return "best" if trainer.fit_loop.epoch_progress.current.processed > trainer.current_epoch else "last"

    clock = Ticks()
    toy_run(tmp_path, clock=clock, minutes=4 / 60, spies=[Spy()])
    assert [s for s, kind in Spy.saved if kind == "last"][-1] == 18                     # the end of the run
    assert {6, 12} <= {s for s, kind in Spy.saved if kind == "last"}                    # the ends of the epochs
    assert any(s % 6 for s, kind in Spy.saved)                                          # within epochs
    assert len(Spy.saved) < 18
    assert (6, "best") in Spy.saved


def test_best_is_the_best_epoch(tmp_path):
    trainer, _, rows = toy_run(tmp_path)
    best = torch.load(tmp_path / "checkpoints/best.ckpt", weights_only=True)
    assert best["epoch"] + 1 == min(rows, key=lambda row: row["val/loss"])["epoch"]


# ---- one epoch by hand -----------------------------------------------------------------------------------------------
def test_one_epoch_is_the_plain_loop(tmp_path):
    """The trainer, resumed twice in the epoch, against a loop of torch's own parts.

    Equal to the last bit but for the order in which AdamW's groups are stepped; 1e-7 allows for one rounding."""
    for at in ({"batch": 2}, {"batch": 4}, None):
        spies, checkpoint = [Crasher(**at)] if at else [], last(tmp_path) if last(tmp_path).exists() else None
        try:
            _, weights, _ = toy_run(tmp_path, checkpoint, dropout=0.0, max_epochs=1, minutes=0, spies=spies)
        except Crash:
            continue
    model, data = toy_model(dropout=0.0), Toy()
    groups = runs.param_groups(model, 0.01, 0.01)
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    base, steps = [group["lr"] for group in groups], len(data.dataset("train")) // 8
    for step, batch in enumerate(data.loader("train", 8, seed=0, bucket=2)):
        if step == steps: break                                                         # two examples are left
        factor = step / 3 if step < 3 else (1 + torch.cos(torch.tensor((step - 3) / (steps - 3) * torch.pi)).item()) / 2
        for group, lr in zip(optimizer.param_groups, base): group["lr"] = lr * factor
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(batch.x, batch.lengths), batch.y).backward()
        optimizer.step()
    for name, value in model.state_dict().items():
        assert torch.allclose(value, weights[name], rtol=0, atol=1e-7), name


# ---- files -----------------------------------------------------------------------------------------------------------
def test_checkpoints_are_plain(tmp_path):
    toy_run(tmp_path, max_epochs=1, scheduler=Plateau(), extras=Callbacks(ema=0.9, early_stopping=2))
    checkpoint = torch.load(last(tmp_path), weights_only=True)
    assert checkpoint["s4nb"] == {"experiment": {}, "facts": {}}
    assert not list(last(tmp_path).parent.glob("*.tmp"))


class FileLimit:
    "No file may grow beyond so many bytes."

    def __init__(self, size): self.size = size

    def __enter__(self):
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.before[1]))

    def __exit__(self, *error): resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path):
    io, path = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    with FileLimit(20_000), pytest.raises(OSError, match="there is none before it"):
        io.save_checkpoint({"x": torch.zeros(100_000)}, path)
    io.save_checkpoint({"x": torch.ones(3)}, path)
    with FileLimit(20_000), pytest.raises(OSError, match="could not be written.*the one before it is whole. Make room"):
        io.save_checkpoint({"x": torch.zeros(100_000)}, path)
    assert torch.load(path, weights_only=True)["x"].tolist() == [1, 1, 1]
    assert os.listdir(tmp_path) == ["last.ckpt"]


def test_a_run_on_a_full_disk_goes_on_when_there_is_room(tmp_path, whole):
    class Full(L.Callback):
        def on_train_batch_start(self, trainer, module, batch, index):
            if trainer.global_step == 8: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))

    with FileLimit(resource.RLIM_INFINITY), pytest.raises(OSError, match="the one before it is whole"):
        toy_run(tmp_path, minutes=0, spies=[Full()])
    _, resumed, rows = toy_run(tmp_path, last(tmp_path))
    assert equal(resumed, whole("plain")[0]) and rows == whole("plain")[1]


@pytest.mark.parametrize("damage", ["cut", "text", "empty"])
def test_a_broken_checkpoint_is_named(tmp_path, damage):
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"loops": {}, "x": torch.zeros(1000)}, path)
    assert readable(path) == path
    whole = path.read_bytes()
    path.write_bytes({"cut": whole[:len(whole) // 2], "text": b"no checkpoint", "empty": b""}[damage])
    with pytest.raises(ValueError, match=f"{path} is no whole checkpoint.*train.resume=PATH"):
        readable(path)


def test_weights_are_no_run(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "weights.ckpt")
    with pytest.raises(ValueError, match="holds weights, not a run to continue: start from them with train.pretrained"):
        readable(tmp_path / "weights.ckpt")


@pytest.mark.parametrize("text, seconds", [("00:00:00:10", 10), ("01:02:03:04", 93784), (None, float("inf"))])
def test_max_time(text, seconds):
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["8h", "08:00:00", "-1:00:00:00", 60])
def test_max_time_is_days_to_seconds(text):
    with pytest.raises(ValueError, match="DD:HH:MM:SS"):
        seconds_of(text)


# ---- folders ---------------------------------------------------------------------------------------------------------
def leave(root, name, e, state="partial", checkpoint=True):
    "A run's folder as a process leaves it that was killed (partial) or went to the end (measured)."
    folder = Path(root) / name
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "card.json").write_text(json.dumps({"name": "toy", "state": state, "config": dataclasses.asdict(e)}))
    if checkpoint: AtomicCheckpointIO().save_checkpoint({"loops": {}}, last(folder))
    return folder


def test_never_makes_a_new_folder(tmp_path):
    e = experiment(tmp_path)
    assert find_run(tmp_path, "toy", e) == (tmp_path / "toy", None)
    assert find_run(tmp_path, "toy", e) == (tmp_path / "toy-2", None)


def test_auto_takes_the_newest_unfinished_run_of_the_same_settings(tmp_path):
    e = experiment(tmp_path)
    for n in ("toy", "toy-2", "toy-9", "toy-10"): leave(tmp_path, n, e)
    leave(tmp_path, "toy-11", e, state="measured")
    leave(tmp_path, "toy-12", dataclasses.replace(e, seed=2))
    leave(tmp_path, "toybox", e)
    assert find_run(tmp_path, "toy", e, "auto") == (tmp_path / "toy-10", last(tmp_path / "toy-10"))


def test_auto_begins_where_there_is_nothing_to_continue(tmp_path):
    e = experiment(tmp_path)
    assert find_run(tmp_path, "toy", e, "auto") == (tmp_path / "toy", None)
    leave(tmp_path, "toy-2", e, state="measured")
    leave(tmp_path, "toy-3", e, checkpoint=False)
    assert find_run(tmp_path, "toy", e, "auto") == (tmp_path / "toy-3", None)


def test_what_does_not_change_a_run(tmp_path):
    e = experiment(tmp_path)
    other = experiment(tmp_path / "elsewhere", resume="never", checkpoint_minutes=3.0)
    other.dataset.data_dir, other.wandb = e.dataset.data_dir, "project"
    other.trainer = dataclasses.replace(e.trainer, max_time="00:08:00:00", devices=4, strategy="ddp", progress=True)
    assert settings_of(e) == settings_of(other) == settings_of(json.loads(json.dumps(dataclasses.asdict(e))))
    assert settings_of(e) != settings_of(dataclasses.replace(e, trainer=dataclasses.replace(e.trainer, max_epochs=4)))


def test_a_path_goes_on_in_its_folder(tmp_path):
    e = experiment(tmp_path)
    folder = leave(tmp_path, "toy", e)
    assert find_run(tmp_path, "toy", e, str(folder)) == (folder, last(folder))
    assert find_run(tmp_path, "toy", e, str(last(folder))) == (folder, last(folder))


@pytest.mark.parametrize("state, seed", [("measured", 1), ("partial", 2)])
def test_a_path_of_a_measured_or_other_run_gets_a_new_folder(tmp_path, state, seed):
    e = experiment(tmp_path)
    folder = leave(tmp_path, "toy", dataclasses.replace(e, seed=seed), state)
    (folder / "checkpoints/best.ckpt").write_text("best")
    assert find_run(tmp_path, "toy", e, str(folder)) == (tmp_path / "toy-2", last(folder))
    assert (tmp_path / "toy-2/checkpoints/best.ckpt").read_text() == "best"


def test_a_path_that_is_none(tmp_path):
    with pytest.raises(ValueError, match="there is no .*nothing.ckpt; give never, auto, or a checkpoint"):
        find_run(tmp_path, "toy", experiment(tmp_path), str(tmp_path / "nothing.ckpt"))


def claim_and_tell(folder, pipe):
    pipe.send(claim(folder))
    pipe.recv()


def test_a_run_belongs_to_one_process(tmp_path):
    e, (here, there) = experiment(tmp_path), runs.processes().Pipe()
    folder = leave(tmp_path, "toy", e)
    process = runs.processes().Process(target=claim_and_tell, args=(folder, there))
    process.start()
    assert here.recv()
    assert find_run(tmp_path, "toy", e, "auto") == (tmp_path / "toy-2", None)
    process.kill()
    finish(process)
    assert claim(folder) and claim(folder)


# ---- the order of the data -------------------------------------------------------------------------------------------
class Noisy(Toy):
    "Labels are drawn anew each time an example is read."

    def load(self, split):
        class Rows(torch.utils.data.Dataset):
            labels = torch.arange(20)

            def __len__(self): return 20

            def __getitem__(self, i): return torch.tensor([i]), int(torch.randint(10**6, ()))
        return Rows()


def labels(loader, epoch, begin=0):
    loader.set_epoch(epoch)
    loader.load_state_dict({"batch": begin})
    return [list(zip(batch.x.flatten().tolist(), batch.y.tolist())) for batch in loader]


def test_what_an_example_draws_depends_on_seed_epoch_and_example_alone():
    loader = lambda **k: Batches(Noisy(), "train", 4, **k)
    torch.manual_seed(1)
    first = labels(loader(), 3)
    torch.manual_seed(2)
    assert torch.rand(()) == torch.rand((), generator=torch.Generator().manual_seed(2))
    assert labels(loader(workers=2), 3) == first and labels(loader(), 3, begin=2) == first[2:]
    assert dict(sum(labels(Batches(Noisy(), "train", 10), 3), [])) == dict(sum(first, []))
    assert dict(sum(labels(loader(seed=1), 3), [])) != dict(sum(first, [])) != dict(sum(labels(loader(), 2), []))


def test_reading_leaves_the_generator_alone():
    torch.manual_seed(5)
    labels(Batches(Noisy(), "train", 4), 0)
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(5)))


def test_position_counts_batches_handed_out():
    loader = Batches(Toy(), "train", 8, workers=2)
    batches = iter(loader)
    next(batches), next(batches)
    assert loader.state_dict() == {"batch": 2}                                          # the workers have read further


def test_counters_of_another_version_are_refused_by_key():
    with pytest.raises(KeyError):
        canonical({})
