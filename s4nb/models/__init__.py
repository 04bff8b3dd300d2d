"""Models: the residual backbone, encoders and decoders, and the family of layers that it stacks."""

from s4nb.models.attention import LinearAttention, MultiHeadAttention, Performer
from s4nb.models.backbone import Bidirectional, ResidualBlock, SequenceModel
from s4nb.models.baselines import CKConv, LipschitzRNN, UnICORNN, WaveGANDiscriminator
from s4nb.models.blocks import DSS, FFN, GSS, DSSExp, S4DReal
from s4nb.models.check import check_model
from s4nb.models.coders import (ClassEncoder, Decoder, LinearEncoder, Model, NDDecoder, OneHotEncoder, PairDecoder, Patches, Positions, StateDecoder,
                                TimeEncoder, TokenEncoder)
from s4nb.models.convolutional import Conv1d, Conv2d
from s4nb.models.mega import Mega
from s4nb.models.memory_rnn import GLagTCell, LagTCell, LegSCell, LegTCell, LMUCell
from s4nb.models.rnn import GRU, LSTM, RNN, GRUCell, RNNCell
from s4nb.models.s4nd import S4ND
from s4nb.models.sashimi import SaShiMi, UNet
from s4nb.models.scan_rnn import QRNN, SRU, MinGRU

__all__ = ["Bidirectional", "CKConv", "ClassEncoder", "Conv1d", "Conv2d", "DSS", "DSSExp", "Decoder", "FFN", "GLagTCell", "GRU", "GRUCell", "GSS",
           "LMUCell", "LSTM", "LagTCell", "LegSCell", "LegTCell", "LinearAttention", "LinearEncoder", "LipschitzRNN", "Mega", "MinGRU", "Model",
           "MultiHeadAttention", "NDDecoder", "OneHotEncoder", "PairDecoder", "Patches", "Performer", "Positions", "QRNN", "RNN", "RNNCell",
           "ResidualBlock", "S4DReal", "S4ND", "SRU", "SaShiMi", "SequenceModel", "StateDecoder", "TimeEncoder", "TokenEncoder", "UNet", "UnICORNN",
           "WaveGANDiscriminator", "check_model"]
