"State space models as layers: the three views, Krylov kernels, the SSM layer and LSSL."
from s4nb.ssm.layer import Kernel, SSMLayer
from s4nb.ssm.lssl import LSSL, DenseKernel
