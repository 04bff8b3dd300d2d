"Several processes compute what one does."
from pathlib import Path

import lightning as L
import pytest
import runs
import torch
from runs import Toy, finish, on_two, silent, toy_model, toy_run
from torch import distributed as dist

from s4nb.data.base import DataModule, pad_batch
from s4nb.data.synthetic import Copying
from s4nb.models.backbone import BatchNorm
from s4nb.training.devices import (Batches, SyncedBatchNorm, SyncedChannels, agreed, batches, deals, processes, shares,
                                   synchronise)
from s4nb.training.task import IGNORED, NonFiniteLoss


# ---- dealing batches -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("world, accumulate", [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2)])
def test_a_step_has_the_same_examples_however_many_share_it(world, accumulate):
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0)).tolist()
    dealt = [shares(order, 8, r, world, accumulate) for r in range(world)]
    assert {len(own) for own in dealt} == {6 * accumulate}
    assert all(len(batch) == 8 // world // accumulate for own in dealt for batch in own)
    for step in range(6):
        parts = [own[step * accumulate + i] for own in dealt for i in range(accumulate)]
        assert sorted(sum(parts, [])) == sorted(order[8 * step:8 * step + 8])


def test_the_only_batch_is_not_dropped():
    assert shares(range(5), 8, 0, 1) == [[0, 1, 2, 3, 4]]
    assert [shares(range(5), 8, r, 2) for r in range(2)] == [[[0, 2, 4]], [[1, 3]]]
    assert shares(range(17), 8, 0, 1) == [list(range(8)), list(range(8, 16))]


@pytest.mark.parametrize("n, batch_size, world, accumulate", [(50, 9, 2, 1), (50, 4, 3, 1), (50, 6, 2, 2),
                                                              (1, 8, 2, 1)])
def test_what_cannot_be_dealt_evenly(n, batch_size, world, accumulate):
    with pytest.raises(ValueError, match=f"batch_size={batch_size} of {n} examples cannot be dealt evenly to "
                                         f"{world * accumulate} batches.*multiple of {world * accumulate}"):
        shares(range(n), batch_size, 0, world, accumulate)


@pytest.mark.parametrize("n, world", [(21, 1), (21, 2), (21, 3), (8, 4), (5, 4), (16, 2)])
def test_evaluation_meets_every_example_once(n, world):
    dealt = [deals(range(n), 8, r, world) for r in range(world)]
    assert sorted(i for own in dealt for batch in own for i in batch) == list(range(n))
    assert all(own for own in dealt) and max(len(batch) for own in dealt for batch in own) <= 8


def test_too_few_to_evaluate():
    with pytest.raises(ValueError, match="4 processes cannot share 3 examples to evaluate: use fewer devices"):
        deals(range(3), 8, 0, 4)


def test_batches_are_those_of_the_data_s_own_loader():
    own = Toy().loader("train", 8, seed=3, bucket=2)
    own.sampler.set_epoch(5)
    ours = Batches(Toy(), "train", 8, seed=3, bucket=2)
    ours.set_epoch(5)
    ours, own = list(ours), list(own)
    assert len(ours) == 6 == len(own) - 1                                               # the last one is not full
    for a, b in zip(ours, own):
        assert torch.equal(a.x, b.x) and torch.equal(a.y, b.y) and torch.equal(a.lengths, b.lengths)


def test_new_examples_each_epoch_stay_new():
    own = Copying(l_noise=4, l_memorize=3, n_tokens=6, sizes=(16, 8, 8)).prepare()
    ours = Batches(own, "train", 8)
    ours.set_epoch(2)
    seen = sorted(tuple(x.tolist()) for batch in ours for x in batch.x)
    train = own.dataset("train")
    assert seen == sorted(tuple(train[i][0].tolist()) for i in range(32, 48))


def test_rate_of_the_epoch():
    class Ramp(DataModule):
        name, d_input, d_output, l_max = "ramp", 1, 2, 8

        def load(self, split): return [(torch.arange(8.0)[:, None], 0)] * 8

    loader = Batches(Ramp(), "train", 4, rate=lambda epoch: 4 if epoch < 2 else 1)
    shapes = {}
    for epoch in (0, 1, 2):
        loader.set_epoch(epoch)
        shapes[epoch] = {(tuple(batch.x.shape), batch.rate) for batch in loader}
    assert shapes == {0: {((4, 2, 1), 4.0)}, 1: {((4, 2, 1), 4.0)}, 2: {((4, 8, 1), 1.0)}}


def test_evaluation_reads_in_one_order_and_little_padding():
    loader = Batches(Toy(), "val", 8)
    first = [batch.x for batch in loader]
    loader.set_epoch(7)
    assert all(torch.equal(a, b.x) for a, b in zip(first, loader)) and sum(len(x) for x in first) == 21
    plain = sum(batch.x.numel() for batch in Toy().loader("val", 8))
    assert sum(x.numel() for x in first) < plain


def test_alone():
    assert processes() == (0, 1)


# ---- two processes are one -------------------------------------------------------------------------------------------
class Steps(DataModule):
    "An answer for each step; many do not count."
    name, n_tokens, d_output, l_max, l_output = "steps", 7, 3, 8, 8

    def load(self, split):
        g = torch.Generator().manual_seed(len(split))
        x, y = torch.randint(7, (20, 8), generator=g), torch.randint(3, (20, 8), generator=g)
        y[torch.rand(20, 8, generator=g) < torch.linspace(0, 1, 20)[:, None]] = IGNORED
        return list(zip(x, y))


class Pairs(DataModule):
    "Two sequences an answer: first all first ones, then all second ones."
    name, n_tokens, d_output, l_max, pairs = "pairs", 7, 3, 10, True

    def load(self, split):
        g = torch.Generator().manual_seed(len(split))
        row = lambda: torch.randint(7, (int(torch.randint(3, 11, (), generator=g)),), generator=g)
        return [((row(), row()), i % 3) for i in range(22)]

    def collate(self, items, rate=1):
        (pairs, y) = zip(*items)
        batch = pad_batch([(x, 0) for x in [a for a, _ in pairs] + [b for _, b in pairs]])
        return batch._replace(y=torch.tensor(y))


class Halves(torch.nn.Module):
    "A model of pairs: the outputs of the two, summed."

    def __init__(self, norm):
        super().__init__()
        self.own = toy_model(norm, 0.0)

    def forward(self, x, lengths=None, rate=1.0):
        return sum(self.own(x, lengths).chunk(2))


def per_step():
    model = toy_model(dropout=0.0)
    model.decoder.l_output = None
    return {"data": Steps(), "model": model}


def in_pairs(): return {"data": Pairs(), "model": Halves("batch")}


CASES = {"layer norm": {"norm": "layer"}, "batch norm": {"norm": "batch"}, "one uneven batch": {"batch_size": 60},
         "accumulate": {"accumulate": 2}, "uneven answers": {"make": per_step}, "pairs": {"make": in_pairs},
         "saving": {"norm": "batch", "minutes": 0}}


@pytest.mark.parametrize("case", CASES)
def test_two_processes_are_one(tmp_path, case):
    "1e-5: the sums of the gradients are taken in another order, through 18 steps of AdamW."
    codes, got = on_two(tmp_path / "two", dropout=0.0, **CASES[case])
    assert codes == [0, 0]
    arguments = dict(CASES[case])
    make = arguments.pop("make", dict)
    _, weights, rows = toy_run(tmp_path / "one", dropout=0.0, **make(), **arguments)
    for name, value in weights.items():
        assert torch.allclose(got["weights"][name], value, rtol=0, atol=1e-5), name
    for one, two in zip(rows, got["rows"], strict=True):
        assert one.keys() == two.keys() and all(abs(one[key] - two[key]) < 1e-5 for key in one)


def test_batch_norm_that_is_not_shared_differs(tmp_path):
    "The test above can fail."
    codes, got = on_two(tmp_path / "two", dropout=0.0, norm="batch", sync_batchnorm=False)
    _, weights, _ = toy_run(tmp_path / "one", dropout=0.0, norm="batch")
    assert codes == [0, 0]
    assert max((got["weights"][name] - value).abs().max() for name, value in weights.items()) > 1e-3


class Cut(L.Callback):
    "Ends both processes before a batch."

    def on_train_batch_start(self, trainer, module, batch, index):
        if trainer.global_step == 9: raise SystemExit(7)


def test_one_process_goes_on_where_two_stopped(tmp_path):
    codes, _ = on_two(tmp_path, dropout=0.0, norm="batch", minutes=0, spies=[Cut()])
    assert codes == [7, 7]
    _, weights, rows = toy_run(tmp_path, tmp_path / "checkpoints/last.ckpt", dropout=0.0, norm="batch")
    _, whole, whole_rows = toy_run(tmp_path / "whole", dropout=0.0, norm="batch")
    assert all(torch.allclose(weights[name], value, rtol=0, atol=1e-5) for name, value in whole.items())
    assert [abs(a["train/loss"] - b["train/loss"]) < 1e-5 for a, b in zip(rows, whole_rows)] == [True] * 3


class Poison(L.Callback):
    "The second process meets a number that is none."

    def on_train_batch_start(self, trainer, module, batch, index):
        if trainer.global_step == 3 and trainer.global_rank == 1:
            module.loss = lambda outputs, y: outputs.sum() * float("nan")


def test_a_bad_loss_in_one_process_ends_both(tmp_path):
    codes, got = on_two(tmp_path, spies=[Poison()], expect=NonFiniteLoss)
    assert codes == [3, 3] and got is None


# ---- batch norm ------------------------------------------------------------------------------------------------------
def norms_of_one(rank, port, folder):
    "In a process: the halves of a batch through synchronised norms; writes outputs, gradients and running statistics."
    silent()
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    found = {}
    for name, (norm, x, mask) in norms().items():
        own = slice(0, 3) if rank == 0 else slice(3, 8)
        part = x[own].clone().requires_grad_()
        norm = synchronise(torch.nn.Sequential(norm))[0]
        y = norm(part) if mask is None else norm(part, mask[own])
        y.pow(3).sum().backward()
        for p in norm.parameters(): dist.all_reduce(p.grad)
        found[name] = (y.detach(), part.grad, norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var,
                       norm.num_batches_tracked)
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.barrier()


def norms():
    torch.manual_seed(0)
    x = torch.randn(8, 5, 4) * torch.tensor([1, 2, 3, 4.0]) + 3
    mask = (torch.arange(5) < torch.tensor([5, 1, 3, 2, 5, 4, 1, 2])[:, None])[..., None]
    image = torch.randn(8, 4, 3, 2) + 1
    cumulative = BatchNorm(4)
    cumulative.momentum = None
    return {"ours": (BatchNorm(4), x.clone(), None), "masked": (BatchNorm(4), x * mask, mask),
            "cumulative": (cumulative, x.clone(), None), "torch 1d": (torch.nn.BatchNorm1d(4), x.mT.contiguous(), None),
            "torch 2d": (torch.nn.BatchNorm2d(4), image, None)}


def test_synchronised_norms_are_those_of_the_whole_batch(tmp_path):
    "1e-5: torch's batch norm, in one process, adds in another order."
    port = runs.free_port()
    ranks = [runs.processes().Process(target=norms_of_one, args=(r, port, tmp_path)) for r in range(2)]
    for process in ranks: process.start()
    assert [finish(process) for process in ranks] == [0, 0]
    halves = [torch.load(tmp_path / f"{r}.pt") for r in range(2)]
    for name, (norm, x, mask) in norms().items():
        x.requires_grad_()
        y = norm(x) if mask is None else norm(x, mask)
        y.pow(3).sum().backward()
        valid = torch.ones(()) if mask is None else mask
        for i, whole in enumerate((y * valid, x.grad * valid)):
            got = torch.cat([half[name][i] for half in halves])
            assert torch.allclose(got * valid, whole, atol=2e-5), (name, i)
        for i, whole in enumerate((norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var), 2):
            for half in halves: assert torch.allclose(half[name][i], whole, atol=1e-4, rtol=1e-5), (name, i)
        assert halves[0][name][6] == norm.num_batches_tracked == 1


def test_synchronise_keeps_the_parameters():
    model = torch.nn.Sequential(BatchNorm(3), torch.nn.BatchNorm2d(3), torch.nn.LayerNorm(3))
    before = list(model.parameters())
    synchronise(model)
    assert all(a is b for a, b in zip(before, model.parameters()))
    assert [type(m) for m in model] == [SyncedBatchNorm, SyncedChannels, torch.nn.LayerNorm]


def test_alone_a_synchronised_norm_is_the_plain_one():
    x, mask = torch.randn(4, 5, 3), torch.arange(5)[:, None] < 4
    plain, synced = BatchNorm(3), synchronise(torch.nn.Sequential(BatchNorm(3)))[0]
    assert torch.equal(plain(x, mask.expand(4, 5, 1)), synced(x, mask.expand(4, 5, 1)))
    picture, synced = torch.randn(4, 3, 2, 2), synchronise(torch.nn.Sequential(torch.nn.BatchNorm2d(3)))[0]
    assert torch.equal(torch.nn.BatchNorm2d(3)(picture), synced(picture))


# ---- one decision for all --------------------------------------------------------------------------------------------
def test_what_lightning_starts_finds_the_choice_of_the_first(monkeypatch, tmp_path):
    monkeypatch.delenv("S4NB_RUN", raising=False), monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert agreed(lambda: (tmp_path, None)) == (tmp_path, None)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert agreed(lambda: pytest.fail("only the first process chooses")) == (tmp_path, None)
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert agreed(lambda: (tmp_path / "b", tmp_path / "c")) == (tmp_path / "b", tmp_path / "c")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert agreed(lambda: None) == (tmp_path / "b", tmp_path / "c")


def choose_together(rank, port, pipe):
    silent()
    import os
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "x", "GROUP_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    pipe.send(agreed(lambda: (Path(f"chosen by {rank}"), None)))


def test_what_torchrun_starts_meets(tmp_path):
    port, pipes = runs.free_port(), [runs.processes().Pipe() for _ in range(2)]
    ranks = [runs.processes().Process(target=choose_together, args=(r, port, pipes[r][1])) for r in range(2)]
    for process in ranks: process.start()
    assert [finish(process) for process in ranks] == [0, 0]
    assert [here.recv() for here, _ in pipes] == [(Path("chosen by 0"), None)] * 2


def test_a_task_may_have_a_rate_of_its_own():
    from s4nb.data.tasks import task
    data = task("pen-twin", train_rate=1, test_rate=2, sizes={"train": 40, "test": 40}).prepare()
    assert next(iter(batches(data, "train", 8))).rate == 1.0 and next(iter(batches(data, "test", 8))).rate == 2.0
    assert next(iter(batches(data, "test", 8, rate=4))).rate == 4.0
