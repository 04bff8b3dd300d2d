"""Models: the residual backbone, encoders and decoders."""

from s4nb.models.backbone import SequenceModel
from s4nb.models.coders import Decoder, LinearEncoder, Model, TokenEncoder

__all__ = ["Decoder", "LinearEncoder", "Model", "SequenceModel", "TokenEncoder"]
