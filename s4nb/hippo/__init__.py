"HiPPO: measures and projections, transition matrices, discretisation, the online memory."
from .discretization import discretize
from .memory import HiPPO, white_signal
from .projection import basis, density, project, reconstruct
from .transition import rank_correction
