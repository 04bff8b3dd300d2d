"""Chapter 2, s4nb.ops.convolution: against numpy, the oracle, and the reference's Toeplitz products."""
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from s4nb.ops.convolution import MANY, SHORT, fast_length, long_conv


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


def literal(u, K, K_back=None, offset=1, D=None):
    "Every output as its sum, differentiable: the lags of all pairs (t, s), gathered from the kernels."
    l = u.shape[-1]
    lag = torch.arange(l)[:, None] - torch.arange(l)
    def matrix(kernel, lag):
        kernel = F.pad(kernel, (0, 1))                                                      # whatever lies outside is 0
        return kernel[..., torch.where((0 <= lag) & (lag < kernel.shape[-1] - 1), lag, kernel.shape[-1] - 1)]

    T = matrix(K, lag)
    if K_back is not None: T = T + matrix(K_back, -lag - offset)
    y = torch.einsum("chts,bhs->bcht", T, u)
    return y if D is None else y + D[..., None] * u[:, None]


SIZES = [(1, 1, 1, 1, 1, 1), (2, 1, 3, 5, 5, 5), (1, 3, 2, 7, 3, 12), (3, 2, 1, 150, 200, 4), (2, 2, 3, 1, 4, 4),
         (MANY, 1, 2, 20, 20, 9), (MANY, 2, 1, 129, 30, 129), (2, 1, 2, 1100, 1100, 300)]


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("back, skip", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("b, c, h, l, k, kb", SIZES)
def test_values_and_gradients(b, c, h, l, k, kb, back, skip, offset):
    u, K, K_back, D = (torch.randn(*s, dtype=torch.float64) for s in ((b, l, h), (c, h, k), (c, h, kb), (c, h)))
    args = [u.mT, K, K_back if back else None, D if skip else None]                         # features next to each other
    for x in args:
        if x is not None: x.requires_grad_()
    given = [x for x in args if x is not None]
    y, want = long_conv(*args[:3], offset, args[3]), literal(*args[:3], offset, args[3])
    g = torch.randn_like(want)
    pairs = zip([y, *torch.autograd.grad(y, given, g)], [want, *torch.autograd.grad(want, given, g)])
    for ours, theirs in pairs: assert torch.allclose(ours, theirs, atol=1e-10), (ours - theirs).abs().max()


@pytest.mark.parametrize("stored", ["b h l", "b l h", "h l b", "every other"])
def test_the_order_in_memory_changes_nothing_and_is_kept(stored):
    u, K = torch.randn(3, 40, 1500, dtype=torch.float64), torch.randn(2, 40, 1500, dtype=torch.float64, requires_grad=True)
    views = {"b h l": u, "b l h": u.mT.contiguous().mT, "h l b": u.permute(1, 2, 0).contiguous().permute(2, 0, 1),
             "every other": u.repeat_interleave(2, -1)[..., ::2]}
    view, u = views[stored].requires_grad_(), u.clone().requires_grad_()
    y, want = long_conv(view, K), long_conv(u, K)
    g = torch.randn_like(want).expand(3, 2, 40, 1500)
    assert torch.equal(y, want) and (stored != "b l h" or y.permute(0, 3, 1, 2).is_contiguous())
    for a, b in zip(torch.autograd.grad(y, (view, K), g), torch.autograd.grad(want, (u, K), g)): assert torch.equal(a, b)


def test_gradients_of_broadcast_and_empty():
    u, K = torch.randn(1, 2, 200, dtype=torch.float64, requires_grad=True), torch.randn(1, 2, 200, dtype=torch.float64)
    many = torch.autograd.grad(long_conv(u.expand(4, 2, 200), K).sum(), u)[0]
    assert torch.allclose(many, 4 * torch.autograd.grad(long_conv(u, K).sum(), u)[0], atol=1e-10)
    K.requires_grad_()
    y = long_conv(u[:0], K)
    assert y.shape == (0, 1, 2, 200) and not torch.autograd.grad(y.sum(), K)[0].any()


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("b, l", [(1, 5), (MANY, 4), (1, 20)])
def test_first_and_second_gradients(b, l, offset):
    args = [torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((b, l, 1), (2, 1, 3), (2, 1, l), (2, 1))]
    conv = lambda u, K, K_back, D: long_conv(u.mT, K, K_back, offset, D)[..., ::3]
    assert torch.autograd.gradcheck(conv, args, fast_mode=True) and torch.autograd.gradgradcheck(conv, args, fast_mode=True)


def test_only_the_gradients_that_are_needed():
    u, K = torch.randn(2, 3, 300, dtype=torch.float64), torch.randn(1, 3, 300, dtype=torch.float64)
    both = torch.autograd.grad(long_conv(u.requires_grad_(), K.requires_grad_()).square().sum(), (u, K))
    for i in (0, 1):
        pair = [x.detach().requires_grad_(i == j) for j, x in enumerate((u, K))]
        assert torch.equal(torch.autograd.grad(long_conv(*pair).square().sum(), pair[i])[0], both[i])
    assert not long_conv(u.detach(), K.detach()).requires_grad
    flow = torch.func.grad(lambda u: long_conv(u, K.detach()).square().sum())(u.detach())
    assert torch.equal(flow, both[0])


def test_what_is_kept_for_the_backward_pass():
    b, h, l = 8, 16, 1000
    u, K, D = torch.randn(b, h, l, requires_grad=True), torch.randn(1, h, l, requires_grad=True), torch.randn(1, h)
    kept = {}
    def keep(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x): y = long_conv(u, K, D=D)
    assert y.requires_grad and u.untyped_storage().data_ptr() in kept
    assert sum(kept.values()) == 4 * (b * h * l + h * fast_length(2 * l - 1))               # u itself, and the circle


@pytest.mark.parametrize("b, l", [(2, 300), (MANY, 30)])
def test_compiles_into_one_graph(b, l):
    args = [torch.randn(*s, requires_grad=True) for s in ((b, l, 3), (1, 3, 350), (1, 3, 50), (1, 3))]
    conv = lambda u, K, K_back, D: long_conv(u.mT, K, K_back, 1, D)
    fast = torch.compile(conv, fullgraph=True, backend="aot_eager")
    for length in (l, l - 7):                                                               # the second: any length
        args[0] = torch.randn(b, length, 3, requires_grad=True)
        y, want = fast(*args), conv(*args)
        assert torch.allclose(y, want, atol=1e-5)
        for a, b_ in zip(torch.autograd.grad(y.sin().sum(), args), torch.autograd.grad(want.sin().sum(), args)):
            assert torch.allclose(a, b_, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("l", [64, 1000])
def test_number_formats(l):
    u, K = torch.randn(2, 3, l), torch.randn(2, 3, l)
    exact = long_conv(u.double(), K.double())
    assert exact.dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        y = long_conv(u, K)
    assert y.dtype == torch.float32 and (y - exact).norm() < 1e-6 * exact.norm()
    v, kernel = u.bfloat16().requires_grad_(), K.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16): z = long_conv(v, kernel, D=K[..., 0])
    dv, dK = torch.autograd.grad(z, (v, kernel), torch.ones_like(z))
    w, k = v.detach().double().requires_grad_(), K.double().requires_grad_()
    want = torch.autograd.grad(long_conv(w, k, D=K[..., 0].double()).sum(), (w, k))
    assert z.dtype == dv.dtype == torch.bfloat16 and dK.dtype == torch.float32
    assert (dv - want[0]).norm() < 2**-8 * want[0].norm() and (dK - want[1]).norm() < 1e-6 * want[1].norm()
    low = long_conv(u.bfloat16(), K.bfloat16())
    want = long_conv(u.bfloat16().double(), K.bfloat16().double())
    assert low.dtype == torch.bfloat16 and (low - want).abs().max() < 2**-8 * want.abs().max()
    assert long_conv(u, K.double()).dtype == torch.float32
    assert torch.allclose(long_conv(u.double(), K), long_conv(u.double(), K.double()), atol=1e-11)


def test_long_sequence_in_float32():
    u, K, D = torch.randn(1, 2, 16384), torch.randn(1, 2, 16384) / 128, torch.randn(1, 2)
    exact = long_conv(u.double(), K.double()) + D[..., None].double() * u.double()[:, None]
    assert (long_conv(u, K, D=D) - exact).norm() < 1e-6 * exact.norm()


@pytest.mark.parametrize("b, l", [(MANY, SHORT["cpu"]), (MANY - 1, SHORT["cpu"]), (MANY, SHORT["cpu"] + 1)])
def test_short_sequences_in_large_batches_never_hear_the_future(b, l):
    u, K, D = torch.randn(b, 2, l), torch.randn(1, 2, l), torch.randn(1, 2)
    loud = u.clone()
    loud[..., l // 2:] *= 1e4
    same = torch.equal(long_conv(u, K, D=D)[..., :l // 2], long_conv(loud, K, D=D)[..., :l // 2])
    assert same == (b >= MANY and l <= SHORT["cpu"])


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
    with pytest.raises(ValueError, match=r"D \(3,\) must match"): long_conv(u, K, D=K[0, :, 0])


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
