"""Chapter 2, s4nb.ops.convolution: against numpy, the oracle, and the reference's Toeplitz products."""
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from s4nb.ops.convolution import fast_length, long_conv


def mirror(u, K, K_back, offset):
    "By numpy: the causal part, and the anticausal one as the causal part of the reversed sequence."
    b, h, l = u.shape
    y = np.zeros((b, K.shape[0], h, l))
    for i, c, j in np.ndindex(b, K.shape[0], h):
        x = u[i, j].numpy()
        y[i, c, j] = np.convolve(x, K[c, j].numpy())[:l]
        y[i, c, j] += np.convolve(x[::-1], np.r_[np.zeros(offset), K_back[c, j].numpy()])[:l][::-1]
    return torch.tensor(y)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 200), st.integers(1, 250), st.integers(1, 250), st.sampled_from([0, 1]))
def test_any_lengths(l, k, kb, offset):
    u, K, K_back = (torch.randn(*s, dtype=torch.float64) for s in ((2, 1, l), (2, 1, k), (2, 1, kb)))
    assert torch.allclose(long_conv(u, K, K_back, offset), mirror(u, K, K_back, offset), atol=1e-11)
    assert torch.allclose(long_conv(u, K), mirror(u, K, torch.zeros_like(K_back), 0), atol=1e-11)


@pytest.mark.parametrize("l", [5, 129])
def test_gradients(l):
    args = [torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((1, 1, l), (1, 1, 3), (1, 1, l))]
    assert torch.autograd.gradcheck(lambda *a: long_conv(*a)[..., ::7], args)


@pytest.mark.parametrize("l", [64, 1000])
def test_number_formats(l):
    u, K = torch.randn(2, 3, l), torch.randn(2, 3, l)
    exact = long_conv(u.double(), K.double())
    assert exact.dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        y = long_conv(u, K)
    assert y.dtype == torch.float32 and (y - exact).norm() < 1e-6 * exact.norm()
    low = long_conv(u.bfloat16(), K.bfloat16())
    want = long_conv(u.bfloat16().double(), K.bfloat16().double())
    assert low.dtype == torch.bfloat16 and (low - want).abs().max() < 2**-8 * want.abs().max()
    assert long_conv(u, K.double()).dtype == torch.float32
    assert torch.allclose(long_conv(u.double(), K), long_conv(u.double(), K.double()), atol=1e-11)


def test_long_sequence_in_float32():
    u, K = torch.randn(1, 2, 16384), torch.randn(1, 2, 16384) / 128
    exact = long_conv(u.double(), K.double())
    assert (long_conv(u, K) - exact).norm() < 1e-6 * exact.norm()


def test_fast_length():
    def smooth(n):
        for p in (2, 3, 5):
            while n % p == 0: n //= p
        return n == 1

    for n in list(range(1, 400)) + [4097, 16399, 32767]:
        m = fast_length(n)
        assert m >= n and m % 16 == 0 and smooth(m) and not any(k % 16 == 0 and smooth(k) for k in range(n, m))


def test_errors():
    u, K = torch.zeros(2, 3, 8), torch.zeros(1, 3, 8)
    for bad in ((u[0], K), (u, K[0]), (u, K[:, :2]), (u, K, K[:, :2])):
        with pytest.raises(ValueError): long_conv(*bad)
    with pytest.raises(ValueError, match="offset must be"): long_conv(u, K, K, offset=-1)


def test_parity_with_toeplitz_products(vectors):
    data, cases = np.load(vectors / "c_func.npz"), json.loads((vectors / "c_func.json").read_text())["cases"]
    names = [n for n in cases if n.startswith("toeplitz_")]
    assert names
    for name in names:
        get = lambda key: torch.tensor(data[f"{name}/{key}"])
        u, v = get("u")[None].requires_grad_(), get("v")[None].requires_grad_()
        y = long_conv(u, v)[:, 0]
        assert torch.allclose(y[0], get("y"), atol=1e-12)
        (y * get("g")).sum().backward()
        assert torch.allclose(u.grad[0], get("grad_u"), atol=1e-12) and torch.allclose(v.grad[0], get("grad_v"), atol=1e-12)
        a, inverse = get("u_inv_in"), get("inv")                # the inverse of a triangular Toeplitz matrix, as a kernel
        delta = torch.nn.functional.one_hot(torch.tensor(0), a.shape[-1]).double().expand(a.shape)
        assert torch.allclose(long_conv(a[None], inverse[None])[0, 0], delta, atol=1e-10)
