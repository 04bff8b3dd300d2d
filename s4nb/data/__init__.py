"""Every dataset of the experiments: prepared by one call, named for what it is. Imports nothing of the models."""

from s4nb.data.base import Batch, DataModule, TaskCard, data_root, pad_batch
from s4nb.data.listops import ListOps
from s4nb.data.next_step import NextStep
from s4nb.data.tasks import TASKS, OwnData, task

__all__ = ["TASKS", "Batch", "DataModule", "ListOps", "NextStep", "OwnData", "TaskCard", "data_root", "pad_batch", "task"]
