"""What the kernels are compared with: the literal sums as one more backend, convolution by plain FFTs, attention."""
from contextlib import contextmanager

import torch
from torch import nn

from .ops.cauchy_sum import OPS
from .s4.generating import cauchy_naive, dplr_spectrum


def cauchy_literal(v, z, w, conj):
    "The table of all pairs, summed: v, w (... m), z (l) -> (... l)."
    return cauchy_naive(v, z, w) if conj else (v[..., None] / (z[..., None, :] - w[..., None])).sum(-2)


def vandermonde_literal(v, x, L, conj):
    "The table of all powers in the precision of v, times v, summed: v, x (... m) -> (... L)."
    K = (v[..., None] * torch.exp(x.to(v.dtype)[..., None] * torch.arange(L, device=v.device))).sum(-2)
    return 2 * K.real if conj else K


LITERAL = {"cauchy": cauchy_literal, "log_vandermonde": vandermonde_literal, "dplr_spectrum": dplr_spectrum}


@contextmanager
def literal_sums():
    "Inside, every op and kernel has one more backend, 'literal': the broadcast formula under autograd."
    new = [op for op in LITERAL if "literal" not in OPS[op].backends]    # none of them where one stands within another
    try:
        for op in new: OPS[op].backends["literal"] = LITERAL[op]
        yield
    finally:
        for op in new: OPS[op].backends.pop("literal", None)


def fft_conv(u, K, D):
    "y = K * u + D u as it is usually written: u (b h l), K (1 h l), D (1 h) -> (b 1 h l)."
    l, n = u.shape[-1], 2 * u.shape[-1]
    return torch.fft.irfft(torch.fft.rfft(u, n)[:, None] * torch.fft.rfft(K, n), n)[..., :l] + u[:, None] * D[..., None]


class Attention(nn.Module):
    "Causal attention with heads of 32 features, and the mixing of an S4 block: (b l h) -> (b l h)."

    def __init__(self, H):
        super().__init__()
        self.heads, self.qkv = max(1, H // 32), nn.Linear(H, 3 * H)
        self.mix = nn.Sequential(nn.Linear(H, 2 * H), nn.GLU())

    def forward(self, u):
        q, k, v = self.qkv(u).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.mix(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
