"""The compiled ops: their schemas, shapes and gradients for torch, and the libraries that hold them."""
from functools import cache

import torch
from torch.autograd import forward_ad
from torch.library import register_autograd, register_fake

from ..build import LIBRARIES, library

SCHEMAS = """
cauchy(Tensor v, Tensor z, Tensor w, bool conj) -> Tensor
cauchy_backward(Tensor grad, Tensor v, Tensor z, Tensor w, bool conj, bool need_z) -> (Tensor, Tensor, Tensor)
dplr_spectrum(Tensor v, Tensor w, SymInt L, bool single) -> (Tensor, Tensor)
dplr_spectrum_backward(Tensor grad, Tensor sums, Tensor v, Tensor w, SymInt L) -> (Tensor, Tensor)
vandermonde(Tensor v, Tensor x, SymInt L, bool conj) -> Tensor
power_sums(Tensor u, Tensor x, bool moments) -> (Tensor, Tensor)
diag_step(Tensor A, Tensor B, Tensor C, Tensor u, Tensor state) -> (Tensor, Tensor)
dplr_step(Tensor D, Tensor E, Tensor P, Tensor Q, Tensor B2, Tensor C, Tensor u, Tensor state) -> (Tensor, Tensor)
"""
for schema in SCHEMAS.strip().splitlines():
    torch.library.define(f"s4nb::{schema.split('(')[0]}", schema[schema.index("("):])
ops = torch.ops.s4nb


def traced_once(f):
    "What torch.compiler.assume_constant_result does, which would import the whole compiler: f is called while tracing."
    f._dynamo_marked_constant = True
    return f


@cache
def loaded(device):
    "The path of the library of a device type, loaded."
    path, reason = library(device) if device in LIBRARIES else (None, f"there are no compiled ops for {device}")
    if path is None: raise RuntimeError(reason)
    torch.ops.load_library(str(path))
    return str(path)


@traced_once
def load(device):
    "Load the library of device type cpu or cuda, once; RuntimeError: why there is none, and what to do."
    return loaded(device)


def plain(x):
    "Contiguous, its conjugation carried out: what the compiled loops read."
    if torch.compiler.is_compiling() or type(x) not in (torch.Tensor, torch.nn.Parameter):   # traced: strides are only
        return x.resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)   # predicted, so always copy
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None:
        raise RuntimeError("the compiled sums know no forward-mode derivatives: use reverse mode (backward, grad, jacrev)")
    if x.is_contiguous() and not x.is_conj() and not x.is_neg(): return x
    return x.resolve_conj().resolve_neg().contiguous()


def complex_of(dtype):
    "The complex dtype of the same precision; `dtype.to_complex()` cannot be traced."
    return torch.promote_types(dtype, torch.complex64)


def real_of(dtype):
    "The real dtype of the same precision; `dtype.to_real()` cannot be traced."
    return torch.float64 if complex_of(dtype) == torch.complex128 else torch.float32


def differentiated(literal, inputs, grads):
    "Gradients of `literal(*inputs)`, to be differentiated again if need be, at the price of the literal formula's memory."
    again, wanted = torch.is_grad_enabled(), [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]
    with torch.enable_grad(): outputs = literal(*inputs)
    pairs = [(o, g) for o, g in zip(outputs, grads) if g is not None and o.requires_grad]
    if not pairs: return (None,) * len(inputs)
    used, given = zip(*pairs)
    found = iter(torch.autograd.grad(used, wanted, given, create_graph=again, allow_unused=True))
    return tuple(next(found) if isinstance(x, torch.Tensor) and x.requires_grad else None for x in inputs)


# ---- Cauchy sums: v (b r m), z (b l) or (1 l), w (b m) -> (b r l) -----------------------------------------------------
def literal_cauchy(v, z, w, conj):
    "The formula itself."
    d = z[:, None, None] - w[:, None, :, None]
    terms = v[..., None] / d
    if conj: terms = terms + v.conj()[..., None] / (z[:, None, None] - w.conj()[:, None, :, None])
    return terms.sum(-2),


@register_fake("s4nb::cauchy")
def _(v, z, w, conj): return v.new_empty(*v.shape[:2], z.shape[-1])


@register_fake("s4nb::cauchy_backward")
def _(grad, v, z, w, conj, need_z): return torch.empty_like(v), z.new_empty(z.shape if need_z else 0), torch.empty_like(w)


def cauchy_setup(ctx, inputs, output):
    v, z, w, ctx.conj = inputs
    ctx.save_for_backward(v, z, w)


def cauchy_backward(ctx, grad):
    v, z, w = ctx.saved_tensors
    if torch.is_grad_enabled(): return differentiated(literal_cauchy, (v, z, w, ctx.conj), (grad,))
    need_z = ctx.needs_input_grad[1]
    dv, dz, dw = ops.cauchy_backward(plain(grad), v, z, w, ctx.conj, need_z)
    return dv, dz if need_z else None, dw, None


register_autograd("s4nb::cauchy", cauchy_backward, setup_context=cauchy_setup)


# ---- spectra of DPLR kernels: v (h i j m), w (h m) -> (h i-1 j-1 L/2+1), sums (h i j (L+1)/2) -------------------------
def literal_spectrum(v, w, L, single):
    "The sums at the nodes, put together by Woodbury's identity: the formula itself."
    z = 2j * torch.tan(torch.pi * torch.arange((L + 1) // 2, dtype=torch.float64, device=v.device) / L)
    k = literal_cauchy(v.flatten(1, 2), z[None], w, True)[0].unflatten(1, v.shape[1:3])
    K = (1 + z / 2) * (k[:, :-1, :-1] - k[:, :-1, -1:] * k[:, -1:, :-1] / (1 + k[:, -1:, -1:]))
    if L % 2 == 0: K = torch.cat([K, v[:, :-1, :-1].real.sum(-1, keepdim=True).to(K.dtype)], -1)
    dtype = torch.complex64 if single else torch.complex128
    return K.to(dtype), k.to(dtype)


@register_fake("s4nb::dplr_spectrum")
def _(v, w, L, single):
    h, i, j, _ = v.shape
    dtype = torch.complex64 if single else torch.complex128
    return v.new_empty(h, i - 1, j - 1, L // 2 + 1, dtype=dtype), v.new_empty(h, i, j, (L + 1) // 2, dtype=dtype)


@register_fake("s4nb::dplr_spectrum_backward")
def _(grad, sums, v, w, L): return torch.empty_like(v), torch.empty_like(w)


def dplr_setup(ctx, inputs, output):
    v, w, ctx.L, ctx.single = inputs
    ctx.save_for_backward(v, w, output[1])
    ctx.mark_non_differentiable(output[1])


def dplr_backward(ctx, grad, _):
    v, w, sums = ctx.saved_tensors
    if torch.is_grad_enabled(): return differentiated(literal_spectrum, (v, w, ctx.L, ctx.single), (grad, None))
    return *ops.dplr_spectrum_backward(plain(grad), sums, v, w, ctx.L), None, None


register_autograd("s4nb::dplr_spectrum", dplr_backward, setup_context=dplr_setup)


# ---- Vandermonde sums: v (b r m), x (b m) complex128 -> (b r L); transposed: u (b r L) -> (b r m) ---------------------
def literal_powers(v, x, L, conj):
    "The formula itself."
    t = torch.arange(L, dtype=torch.float64, device=v.device)
    K = (v[..., None] * torch.exp(x[:, None, :, None] * t)).sum(-2)
    return (2 * K.real if conj else K).to(v.real.dtype if conj else v.dtype),


def literal_power_sums(u, x, moments):
    "The formula itself, and the one with l u_l for u_l."
    t = torch.arange(u.shape[-1], dtype=torch.float64, device=u.device)
    powers = torch.exp(x[:, :, None] * t)
    first = torch.einsum("brl,bml->brm", u.to(powers.dtype), powers)
    second = torch.einsum("brl,bml->brm", (t * u).to(powers.dtype), powers) if moments else first.new_empty(0)
    return first.to(complex_of(u.dtype)), second.to(complex_of(u.dtype))


@register_fake("s4nb::vandermonde")
def _(v, x, L, conj): return v.new_empty(*v.shape[:2], L, dtype=v.real.dtype if conj else v.dtype)


@register_fake("s4nb::power_sums")
def _(u, x, moments):
    out = u.new_empty(*u.shape[:2], x.shape[-1], dtype=complex_of(u.dtype))
    return out, torch.empty_like(out) if moments else out.new_empty(0)


def vandermonde_setup(ctx, inputs, output):
    v, x, ctx.L, ctx.conj = inputs
    ctx.save_for_backward(v, x)


def vandermonde_backward(ctx, grad):
    v, x = ctx.saved_tensors
    if torch.is_grad_enabled(): return differentiated(literal_powers, (v, x, ctx.L, ctx.conj), (grad,))
    sums, moments = ops.power_sums(plain(grad.conj()), x, ctx.needs_input_grad[1])
    scale = 2 if ctx.conj else 1
    dx = scale * (v * moments).sum(1).conj().to(x.dtype) if ctx.needs_input_grad[1] else None
    return scale * sums.conj(), dx, None, None


register_autograd("s4nb::vandermonde", vandermonde_backward, setup_context=vandermonde_setup)


def power_sums_setup(ctx, inputs, output):
    u, x, ctx.moments = inputs
    ctx.save_for_backward(u, x)
    ctx.set_materialize_grads(False)


def power_sums_backward(ctx, grad, grad_moments):
    u, x = ctx.saved_tensors
    if torch.is_grad_enabled() or grad is None or ctx.moments and grad_moments is not None:
        return differentiated(literal_power_sums, (u, x, ctx.moments), (grad, grad_moments))
    du = dx = None
    if ctx.needs_input_grad[0]:
        du = ops.vandermonde(plain(grad.conj()), x, u.shape[-1], not u.is_complex())
        du = du.conj() if u.is_complex() else du / 2
    if ctx.needs_input_grad[1]:
        _, moments = ops.power_sums(u, x, True)
        dx = (grad.conj() * moments).conj().sum(1).to(x.dtype)
    return du, dx, None


register_autograd("s4nb::power_sums", power_sums_backward, setup_context=power_sums_setup)


# ---- one step: state (b h m) -> y (b c h), state; for inference, without gradients ------------------------------------
@register_fake("s4nb::diag_step")
def _(A, B, C, u, state): return state.new_empty(len(u), len(C), u.shape[1], dtype=u.dtype), torch.empty_like(state)


@register_fake("s4nb::dplr_step")
def _(D, E, P, Q, B2, C, u, state): return state.new_empty(len(u), len(C), u.shape[1], dtype=u.dtype), torch.empty_like(state)
