"""HiPPO, LSSL and S4, derived in notebooks and exported as a package."""
__version__ = "0.1.0"

from .diagnose import doctor
from .hippo.memory import HiPPO
from .models.backbone import SequenceModel
from .module import SequenceModule
from .ops import cauchy, log_vandermonde
from .s4.block import S4D, S4Block
from .ssm.lssl import LSSL

__all__ = ["HiPPO", "LSSL", "S4Block", "S4D", "SequenceModel", "SequenceModule", "cauchy", "doctor", "log_vandermonde"]
