"Small training runs for the tests, here and in processes of their own."
import logging
import multiprocessing
import os
import socket
from functools import partial
from pathlib import Path

import lightning as L
import torch

from s4nb.data.base import DataModule, TokenDataset
from s4nb.models.backbone import SequenceModel
from s4nb.models.coders import Decoder, Model, TokenEncoder
from s4nb.s4.block import S4Block
from s4nb.training.architectures import Facts, S4DLayer, SequenceBackbone
from s4nb.training.callbacks import callbacks_of
from s4nb.training.configs import AdamW, Callbacks, CosineWarmup, Experiment, Train, Trainer
from s4nb.training.datasets import ListOpsData
from s4nb.training.devices import Devices, batches
from s4nb.training.optimization import param_groups
from s4nb.training.resume import AtomicCheckpointIO, Checkpoints, History, Keep
from s4nb.training.task import Task

logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)


def processes():
    "A maker of processes that have imported everything and have used nothing: they start at once, on any machine."
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["runs", "test_devices", "s4nb.training.fit", "torch.utils.tensorboard"])
    return context


class Toy(DataModule):
    "50, 21 and 16 sequences of 3 to 10 tokens with labels at random."
    name, n_tokens, d_output, l_max = "toy", 7, 3, 12

    def load(self, split):
        n = {"train": 50, "val": 21, "test": 16}[split]
        g = torch.Generator().manual_seed(len(split))
        lengths = torch.randint(3, 11, (n,), generator=g)
        tokens = torch.randint(1, 7, (int(lengths.sum()),), generator=g)
        return TokenDataset(tokens, lengths, torch.randint(3, (n,), generator=g), 12, 0)


def toy_model(norm="layer", dropout=0.1):
    torch.manual_seed(0)
    layer = lambda i: S4Block(8, d_state=4, l_max=12)
    return Model(TokenEncoder(7, 8), SequenceModel(8, 1, layer, norm=norm, dropout=dropout), Decoder(8, 3))


def toy_run(folder, checkpoint=None, data=None, model=None, norm="layer", dropout=0.1, workers=0, batch_size=8,
            bucket=2, scheduler=None, extras=None, minutes=1e9, max_time=None, clock=None, spies=(), accumulate=1,
            sync_batchnorm=True, environment=None, **trainer):
    "Trains for three epochs; returns (trainer, weights, rows of metrics.csv)."
    data, scheduler, train = data or Toy(), scheduler or CosineWarmup(warmup=3), Train(monitor="val/loss")
    task = Task(model or toy_model(norm, dropout), Facts.of(data), lambda m: AdamW().build(param_groups(m, 0.01, 0.01)),
                partial(scheduler.build, train=train))
    clock = {"clock": clock} if clock else {}
    own = [c for c in callbacks_of(extras or Callbacks(), None, "val/loss", "min")
           if not isinstance(c, L.pytorch.callbacks.LearningRateMonitor)]
    history = History(folder)
    own += [Devices(sync_batchnorm), history, Keep({}, {}),
            Checkpoints(folder, "val/loss", "min", minutes, max_time, **clock), *spies]
    settings = {"max_epochs": 3, "accelerator": "cpu", "devices": 1} | trainer
    plugins = [AtomicCheckpointIO(), *([environment] if environment else [])]
    trainer = L.Trainer(**settings, accumulate_grad_batches=accumulate, callbacks=own, default_root_dir=folder,
                        plugins=plugins, logger=False, enable_progress_bar=False,
                        enable_model_summary=False, num_sanity_val_steps=0, use_distributed_sampler=False)
    trainer.fit(task, batches(data, "train", batch_size, 0, bucket, workers, 1, accumulate),
                batches(data, "val", 8, workers=workers), ckpt_path=checkpoint)
    rows = [{key: value for key, value in row.items() if key != "seconds"} for row in history.rows]
    return trainer, {name: value.detach().clone() for name, value in task.model.state_dict().items()}, rows


def experiment(folder, **train):
    "A small experiment on short lists, in folder/toy."
    return Experiment(
        name="toy", output_dir=str(folder / "toy"), seed=1,
        dataset=ListOpsData(name="listops-mini", batch_size=8, bucket=2, sizes=[44, 20, 16], data_dir=str(folder)),
        model=SequenceBackbone(layer=S4DLayer(d_state=4), d_model=8, n_layers=1, dropout=0.1),
        optimizer=AdamW(lr=0.01, weight_decay=0.01), scheduler=CosineWarmup(warmup=2),
        trainer=Trainer(max_epochs=3, accelerator="cpu", devices=1, threads=1, progress=False),
        train=Train(**{"resume": "auto", "checkpoint_minutes": 0} | train))


def silent():
    "Sends what this process prints to nowhere."
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1), os.dup2(nowhere, 2)
    torch.set_num_threads(1)


def run_experiment(e, steps):
    "In a process: runs an experiment and tells the pipe `steps` of each batch that begins."
    silent()
    from s4nb.training.fit import run
    begin = Task.on_train_batch_start

    def tell(self, batch, index):
        steps.send(self.global_step)
        return begin(self, batch, index)
    Task.on_train_batch_start = tell
    run(e)


def start(e):
    "(process, pipe) of an experiment that runs on its own."
    context = processes()
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=run_experiment, args=(e, there))
    process.start()
    there.close()
    return process, here


def finish(process, seconds=120):
    "The exit code of a process; one that hangs is killed."
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        raise AssertionError(f"the process hangs after {seconds} s")
    return process.exitcode


def wait_for(steps, n):
    "Reads a pipe of steps until one is n; False where the run ends before."
    try:
        while steps.recv() < n:
            pass
        return True
    except EOFError:
        return False


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def rank_of_two(rank, port, folder, expect, make, arguments):
    "In a process: one of two processes of a run. An error of the expected type is exit code 3."
    silent()
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port)}
    try:
        _, weights, rows = toy_run(folder, **make(), **arguments, devices=2, strategy="ddp")
    except expect:
        os._exit(3)
    if rank == 0:
        torch.save({"weights": weights, "rows": rows}, Path(folder) / "done.pt")


def on_two(folder, expect=(), make=dict, **arguments):
    "toy_run on two processes: (exit codes, {weights, rows} or None)."
    Path(folder).mkdir(exist_ok=True)
    port = free_port()
    ranks = [processes().Process(target=rank_of_two, args=(r, port, folder, expect, make, arguments)) for r in range(2)]
    for process in ranks:
        process.start()
    codes = [finish(process) for process in ranks]
    done = Path(folder) / "done.pt"
    return codes, torch.load(done) if done.exists() else None
