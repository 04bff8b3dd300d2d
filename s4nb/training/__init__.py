"""Training: parameter groups, the experiments' tables, runs and their records. Only `task` and `fit` import lightning."""

from s4nb.training.optimization import param_groups

__all__ = ["param_groups"]
