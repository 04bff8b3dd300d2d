"""S4: structured kernels, their initialisation and recurrence, and the layer."""
from .block import S4D, S4Block
from .kernels import DiagKernel, DPLRKernel

__all__ = ["DPLRKernel", "DiagKernel", "S4Block", "S4D"]
