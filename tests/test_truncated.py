"""Truncated back-propagation: pieces of any size, windows against an independent computation, real runs, several devices."""
import logging
import math
import os
import subprocess
import sys
import warnings
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from house import ROOT
from torch.nn import functional as F

import s4nb.training.truncated as truncated
from s4nb.data.base import Batch, DataModule
from s4nb.data.next_step import NextStep
from s4nb.data.synthetic import Copying, Delay
from s4nb.models.backbone import SequenceModel
from s4nb.models.coders import Decoder, LinearEncoder, Model, TokenEncoder
from s4nb.models.rnn import RNN, RNNCell
from s4nb.s4.block import S4Block
from s4nb.training.devices import batches
from s4nb.training.resume import AtomicCheckpointIO, Checkpoints
from s4nb.training.truncated import Carried, Chunks, TruncatedTask, cuts, each_tensor


@pytest.fixture(autouse=True)
def quiet():
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


LAYERS = {"s4": lambda i: S4Block(4, d_state=4), "s4d": lambda i: S4Block(4, d_state=4, mode="diag"),
          "rnn": lambda i: RNN(RNNCell(4, 4))}


def model_of(layer="s4d", d_input=1, d_output=1, n_tokens=None):
    torch.manual_seed(0)
    encoder = LinearEncoder(d_input, 4) if n_tokens is None else TokenEncoder(n_tokens, 4)
    return Model(encoder, SequenceModel(4, 2, LAYERS[layer], dropout=0.0), Decoder(4, d_output, "all"))


# ---- pieces ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [1, 3, 4, 11, 12, 100])
def test_cuts_cover_every_batch_with_the_same_number_of_pieces(size):
    pieces = math.ceil(12 / size)
    for l in range(pieces, 13):
        found = cuts(l, size, pieces)
        assert len(found) == pieces and found[0][0] == 0 and found[-1][1] == l
        assert all(a[1] == b[0] for a, b in zip(found, found[1:])) and all(0 < e - b <= size for b, e in found)
    assert [e - b for b, e in cuts(12, size, pieces)][:-1] == [size] * (pieces - 1)  # whole pieces, then the rest


def test_too_short_a_batch_is_refused():
    with pytest.raises(ValueError, match="longest sequence has 2 steps cannot be cut into 3 pieces"):
        cuts(2, 4, 3)


@pytest.mark.parametrize("size", [0, -1, 2.5])
def test_a_size_is_a_whole_number(size):
    with pytest.raises(ValueError, match="train.chunk is a whole number"):
        Chunks([], size, 10)


def test_pieces_put_together_are_the_batches():
    data = Delay(l_seq=30, l_lag=5, n_lag=2, dt=1 / 30, freq=5.0, sizes=(10, 4, 4))
    whole, chunks = batches(data, "train", 4), Chunks(batches(data, "train", 4), 8, 30)
    assert chunks.sampler is chunks.loader.sampler and len(chunks) == 4 * len(whole)
    for epoch in (0, 1):
        whole.set_epoch(epoch), chunks.sampler.set_epoch(epoch)  # as Lightning does
        pieces = list(chunks)
        for i, batch in enumerate(whole):
            part = pieces[4 * i:4 * i + 4]
            assert torch.equal(torch.cat([p.x for p in part], 1), batch.x)
            assert torch.equal(torch.cat([p.y for p in part], 1), batch.y)
            assert [(p.first, p.last) for p in part] == [(i == 0, i == 3) for i in range(4)]
            assert all(p.rate == 1 and p.lengths is None for p in part)


def test_a_task_without_an_answer_a_step_is_refused():
    data = Copying(l_noise=4, l_memorize=3, n_tokens=5, sizes=(4, 4, 4))
    with pytest.raises(ValueError, match=r"10 steps have answers of shape \(2, 3\): train.chunk needs one answer a step"):
        next(iter(Chunks(data.loader("train", 2), 5, 10)))


def test_pieces_go_on_where_they_were_left():
    data = Copying(l_noise=20, l_memorize=3, n_tokens=5, lag=True, sizes=(12, 4, 4))
    make = lambda: Chunks(batches(data, "train", 4), 6, 20)
    whole, chunks = make(), make()
    pieces = list(whole)
    for begin in (0, 1, 3, 4, 7, 11):
        chunks.load_state_dict({"batch": begin})
        rest = list(chunks)
        assert len(rest) == 12 - begin and chunks.state_dict() == {"batch": 12}
        assert all(torch.equal(a.x, b.x) and a.first == b.first for a, b in zip(rest, pieces[begin:]))
    assert len(list(chunks)) == 12  # the next epoch is whole


# ---- the carried state -----------------------------------------------------------------------------------------------
def gradient(model, loss):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("context", [0, 1, 3])
def test_the_gradient_is_that_of_a_window_from_a_constant_state(layer, context):
    model, size = model_of(layer).double(), 6
    x, y = torch.randn(2, 3, 20, 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    carried = Carried(context)
    for i, piece in enumerate(Chunks([Batch(x, y)], size, 20)):
        outputs = carried(model, piece)
        begin, end = max(0, (i - context) * size), min(20, (i + 1) * size)
        with torch.no_grad():
            state = model.advance(x[:, :begin])[1] if begin else None
        window, _ = model.advance(x[:, begin:end], state)
        expected = gradient(model, F.mse_loss(window[:, i * size - begin:], piece.y))
        found = gradient(model, F.mse_loss(outputs, piece.y))
        assert (found - expected).abs().max() < 1e-9 * expected.abs().max()


def test_states_are_kept_without_their_history():
    model, carried = model_of(), Carried(1)
    x = torch.randn(2, 12, 1)
    for piece in list(Chunks([Batch(x, x)], 3, 12))[:3]:
        carried(model, piece)
    seen = []
    each_tensor(lambda t: seen.append(t.requires_grad or t.grad_fn is not None), carried.state)
    assert seen and not any(seen) and len(carried.past) == 1


def test_a_state_is_needed_and_forgotten():
    model, carried = model_of(), Carried()
    x = torch.randn(2, 6, 1)
    first, last = Chunks([Batch(x, x)], 3, 6)
    with pytest.raises(ValueError, match="a piece from within a sequence came"):
        carried(model, last)
    a = carried(model, first)
    carried(model, last)
    with pytest.raises(ValueError, match="a piece from within a sequence came"):
        carried(model, last)
    assert torch.equal(carried(model, first), a)


@pytest.mark.parametrize("context", [-1, 0.5])
def test_a_context_is_a_whole_number(context):
    with pytest.raises(ValueError, match="train.context is a whole number"):
        Carried(context)


def test_a_carried_state_is_saved_as_plain_tensors(tmp_path):
    model, carried, again = model_of("rnn"), Carried(2), Carried(2)
    x = torch.randn(2, 20, 1)
    pieces = list(Chunks([Batch(x, x, torch.tensor([20, 7]))], 5, 20))
    for piece in pieces[:3]: carried(model, piece)
    torch.save(carried.state_dict(), tmp_path / "state.pt")
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True), "cpu")
    assert torch.equal(again(model, pieces[3]), carried(model, pieces[3]))


# ---- the task --------------------------------------------------------------------------------------------------------
FACTS = SimpleNamespace(kind="classification", d_output=6, l_max=24, l_output=24)


def task_of(model=None, context=0, **facts):
    return TruncatedTask(model or model_of(d_output=6, n_tokens=6), SimpleNamespace(**vars(FACTS) | facts),
                         lambda m: torch.optim.Adam(m.parameters(), 0.01), context=context)


def trainer_of(*callbacks, epochs=2, **given):
    quiet = dict(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
                 num_sanity_val_steps=0)
    return L.Trainer(max_epochs=epochs, callbacks=list(callbacks), plugins=[AtomicCheckpointIO()], **quiet | given)


LAGGED = Copying(l_noise=24, l_memorize=5, n_tokens=6, lag=True, sizes=(12, 8, 8))


def pieces(size=8): return Chunks(batches(LAGGED, "train", 4), size, 24)


def test_a_run_equals_a_loop_by_hand():
    task = task_of(context=1)
    trainer_of(epochs=1, enable_checkpointing=False).fit(task, pieces())
    model, carried = model_of(d_output=6, n_tokens=6), Carried(1)
    optimizer, losses = torch.optim.Adam(model.parameters(), 0.01), []
    for piece in pieces():
        loss = F.cross_entropy(carried(model, piece).flatten(0, 1), piece.y.flatten())
        optimizer.zero_grad(), loss.backward(), optimizer.step()
        losses.append(loss.item())
    assert all(torch.equal(p, q) for p, q in zip(task.model.parameters(), model.parameters()))
    assert task.trainer.callback_metrics["train/loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)


@pytest.mark.parametrize("stop", [2, 3, 10])
def test_a_run_resumed_within_sequences_ends_with_the_same_bits(tmp_path, stop):
    class Copy(L.Callback):
        def on_train_batch_end(self, trainer, *rest):
            if trainer.global_step == stop: trainer.save_checkpoint(tmp_path / "copy.ckpt")

    def run(*callbacks, resume=None):
        task = task_of(context=1)
        keep = Checkpoints(tmp_path, "val/loss", "min")  # it puts the loader where it was
        trainer_of(*callbacks, keep).fit(task, pieces(), LAGGED.loader("val", 8), ckpt_path=resume, weights_only=True)
        return task.model

    whole, resumed = run(Copy()), run(resume=tmp_path / "copy.ckpt")
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), resumed.parameters()))
    kept, = torch.load(tmp_path / "copy.ckpt", weights_only=True)["carried"]
    assert (kept["state"] is None and kept["past"] == []) == (stop % 3 == 0)  # three pieces a batch


def test_every_refusal_says_what_to_do():
    refusals = {"cannot continue from a state": lambda: task_of(Model(
                    TokenEncoder(6, 4), SequenceModel(4, 1, lambda i: S4Block(4, bidirectional=True)), Decoder(4, 6, "all"))),
                "model.decoder=all": lambda: task_of(Model(
                    TokenEncoder(6, 4), SequenceModel(4, 1, LAYERS["s4d"]), Decoder(4, 6, "last", 24))),
                "one a sequence: leave train.chunk out": lambda: task_of(l_output=None),
                "this task has 5: leave train.chunk out": lambda: task_of(l_output=5),
                "accumulate_grad_batches is 2, set it to 1": lambda: trainer_of(
                    accumulate_grad_batches=2, enable_checkpointing=False).fit(task_of(), pieces())}
    for message, f in refusals.items():
        with pytest.raises(ValueError, match=message):
            f()


def test_a_checkpoint_of_another_number_of_processes(tmp_path):
    within, between = {"state": torch.zeros(1), "past": []}, {"state": None, "past": []}
    task = task_of()
    task.on_load_checkpoint({"carried": [between, within]})
    with pytest.raises(ValueError, match="within sequences that 2 processes read; continue it with as many, not 1"):
        trainer_of(enable_checkpointing=False).fit(task, pieces())
    task = task_of()
    task.on_load_checkpoint({"carried": [between, between]})  # nothing was carried
    trainer_of(epochs=1, enable_checkpointing=False).fit(task, pieces())
    assert task.saved is None


def test_states_of_all_processes_are_gathered(monkeypatch):
    def gather(target, mine): target[:] = ["theirs", mine]
    several = SimpleNamespace(is_initialized=lambda: True, get_world_size=lambda: 2, get_rank=lambda: 1,
                              all_gather_object=gather)
    monkeypatch.setattr(truncated, "dist", several)
    task, checkpoint = task_of(), {}
    task.carried.state = [torch.ones(2)]
    task.on_save_checkpoint(checkpoint)
    theirs, mine = checkpoint["carried"]
    assert theirs == "theirs" and torch.equal(mine["state"][0], torch.ones(2))
    other = task_of()
    other.on_load_checkpoint(checkpoint)
    other._trainer = SimpleNamespace(accumulate_grad_batches=1)
    other.on_train_start()
    assert torch.equal(other.carried.state[0], torch.ones(2))


class Texts(DataModule):
    "Twelve texts of 7 to 19 tokens."
    n_tokens, d_output, l_max = 6, 2, 24

    def load(self, split):
        g = torch.Generator().manual_seed(0)
        items = [(torch.randint(0, 6, (int(n),), generator=g), 0) for n in torch.randint(7, 20, (12,), generator=g)]
        return Lengths(items)


class Lengths(list):
    lengths = property(lambda self: torch.tensor([len(x) for x, _ in self]))


def test_texts_of_many_lengths_train_in_pieces():
    chunks = Chunks(NextStep(Texts()).prepare().loader("train", 4), 8, 24)
    assert len(list(chunks)) == len(chunks) == 9
    trainer = trainer_of(epochs=1, enable_checkpointing=False)
    trainer.fit(task_of(), chunks)
    assert trainer.global_step == 9 and torch.isfinite(trainer.callback_metrics["train/loss"])


TWO = """
import sys, torch
sys.path.insert(0, "tests")
from test_truncated import *
if __name__ == "__main__":
    task = task_of(context=1)
    class Save(L.Callback):
        def on_train_batch_end(self, trainer, *rest):
            if trainer.global_step == 2: trainer.save_checkpoint(sys.argv[1] + "/two.ckpt")
    trainer = trainer_of(*([Save()] if len(sys.argv) < 3 else []), Checkpoints(sys.argv[1]), devices=2, strategy="ddp",
                         use_distributed_sampler=False)
    resume = None if len(sys.argv) < 3 else sys.argv[2]
    trainer.fit(task, Chunks(batches(LAGGED, "train", 4), 8, 24), ckpt_path=resume, weights_only=True)
    if trainer.is_global_zero: torch.save(task.model.state_dict(), sys.argv[1] + "/weights.pt")
"""


@pytest.mark.stress
def test_two_processes_resume_within_sequences(tmp_path):
    (tmp_path / "two.py").write_text(TWO)
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    def run(*arguments):
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, tmp_path / "two.py", *map(str, arguments)], cwd=ROOT, check=True, env=environment)

    run(tmp_path / "a")
    run(tmp_path / "b", tmp_path / "a" / "two.ckpt")
    assert len(torch.load(tmp_path / "a" / "two.ckpt", weights_only=True)["carried"]) == 2
    a, b = (torch.load(tmp_path / run / "weights.pt") for run in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)
