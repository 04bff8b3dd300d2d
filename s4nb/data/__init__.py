"""Every dataset of the experiments: prepared by one call, named for what it is. Imports nothing of the models."""

from s4nb.data.base import DataModule, TaskCard, data_root, pad_batch
from s4nb.data.listops import ListOps

__all__ = ["DataModule", "ListOps", "TaskCard", "data_root", "pad_batch"]
