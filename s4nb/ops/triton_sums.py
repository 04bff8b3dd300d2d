"""Cauchy and Vandermonde sums in Triton: for a GPU on a machine without a CUDA compiler.

The formulas are those of `cauchy_sum` and `vandermonde_sum`. Triton knows no complex numbers: its kernels see
pairs of reals. b, r, l, m: rows, numerators that share the modes of a row, positions, modes. No atomics: sums over
chunks of l are written chunk by chunk and added afterwards, so that every run gives the same bits.

Why Vandermonde is not left to cuBLAS: in plain torch the product is one launch among dozens, which make the tables
of powers in complex128 and carry them through memory. Here each program makes the powers of its tile of l, from
phases reduced in float64, and a sum is one launch (gradients: one or two more).
"""
import torch
import triton
import triton.language as tl
from torch.library import custom_op

__all__ = ["cauchy_triton", "vandermonde_triton", "power_sums_triton"]


def on_gpu(t):
    "t as contiguous pairs of reals, once it is clear that a kernel can run where it is."
    if not t.is_cuda and isinstance(cauchy_kernel, triton.JITFunction):
        raise RuntimeError(f"Triton kernels need a GPU: got a tensor on {t.device}. Move it there, name another "
                           "backend, or set TRITON_INTERPRET=1 before the import to interpret them (slow, for tests)")
    t = t.resolve_conj().contiguous()
    return torch.view_as_real(t) if t.is_complex() else t


def launch(kernel, programs, *args, **constants):
    "Run the kernel on the device of its first tensor, unless there is nothing to do."
    with torch.cuda.device_of(args[0]):
        if programs: kernel[(programs,)](*args, **constants)


def width(n, most):
    "The tile size for n things: a power of two, `most` at most."
    return min(most, triton.next_power_of_2(max(n, 1)))


def total(partial):
    "The sum over the leading axis, the chunks; as complex numbers."
    return torch.view_as_complex(partial[0] if len(partial) == 1 else partial.sum(0))


def keep(ctx, inputs, output):
    "What a backward needs: the tensors, and conj where it is the last argument."
    ctx.save_for_backward(*(t for t in inputs if isinstance(t, torch.Tensor)))
    ctx.conj = inputs[-1]


# ---- Cauchy ----------------------------------------------------------------------------------------------------------
@triton.jit
def numerators(vr, vi, wr, wi, CONJ: tl.constexpr):
    """(p, q): v/(z-w) + conj(v)/(z-conj w) = (p z - q) u with p = 2 Re v, q = 2 Re(v conj w); conj=False: (Re v, Im v).

    q may cancel. A fused multiply-add knows the rounding error of a product, so that q is good to 2 ulp (Kahan)."""
    p, q = vr, vi
    if CONJ:
        t = vi * wi
        p, q = 2 * vr, 2 * (tl.fma(vr, wr, t) + tl.fma(vi, wi, -t))
    return p, q


@triton.jit
def pole(zr, zi, wr, wi, CONJ: tl.constexpr):
    "u = 1/((z-w)(z-conj w)), or 1/(z-w). From differences: next to a pole z^2 - 2 z Re w + |w|^2 would cancel."
    dr, di = zr - wr, zi - wi
    if CONJ: dr, di = dr * dr - di * (zi + wi), 2 * dr * zi
    r = 1.0 / (dr * dr + di * di)
    return dr * r, -di * r


@triton.jit
def combined(pr, pi, qr, qi, zr, zi, CONJ: tl.constexpr):
    "z p - q of two complex sums, or p + i q."
    re, im = pr - qi, pi + qr
    if CONJ: re, im = zr * pr - zi * pi - qr, zr * pi + zi * pr - qi
    return re, im


@triton.jit(do_not_specialize=["z_rows", "R", "L", "M"])
def cauchy_kernel(v, z, w, out, z_rows, R, L, M, CONJ: tl.constexpr, POWER: tl.constexpr,
                  BR: tl.constexpr, BL: tl.constexpr):
    "A program: BR numerators of one row at BL nodes, mode after mode. POWER 2 (conj=False alone): v/(z-w)^2."
    i, tiles, groups = tl.program_id(0), tl.cdiv(L, BL), tl.cdiv(R, BR)
    b = (i // tiles // groups).to(tl.int64)
    r = (i // tiles % groups * BR + tl.arange(0, BR))[:, None]
    part = 2 * BL * (i % tiles).to(tl.int64) + tl.arange(0, 2 * BL)[None, :]         # re, im, re, im, ... of the nodes
    zr, zi = tl.split(tl.reshape(tl.load(z + 2 * (b % z_rows * L) + part, part < 2 * L, 0), (1, BL, 2)))
    v += 2 * (b * R + r) * M
    w += 2 * b * M
    pr = tl.zeros((BR, BL), out.dtype.element_ty)
    pi, qr, qi = pr, pr, pr
    for m in range(M):
        wr, wi = tl.load(w + 2 * m), tl.load(w + 2 * m + 1)
        vr, vi = tl.load(v + 2 * m, r < R, 0), tl.load(v + 2 * m + 1, r < R, 0)
        p, q = numerators(vr, vi, wr, wi, CONJ)
        ur, ui = pole(zr, zi, wr, wi, CONJ)
        if POWER == 2: ur, ui = ur * ur - ui * ui, 2 * ur * ui
        pr, pi, qr, qi = pr + p * ur, pi + p * ui, qr + q * ur, qi + q * ui
    re, im = combined(pr, pi, qr, qi, zr, zi, CONJ)
    tl.store(out + 2 * ((b * R + r) * L) + part, tl.interleave(re, im), (r < R) & (part < 2 * L))


@triton.jit(do_not_specialize=["z_rows", "B", "R", "L", "M"])
def cauchy_grads_kernel(g, v, z, w, dv, dw, z_rows, B, R, L, M, CONJ: tl.constexpr,
                        BR: tl.constexpr, BM: tl.constexpr, BL: tl.constexpr, CHUNK: tl.constexpr):
    """A program: what CHUNK nodes give to the gradients of BR numerators and BM modes of one row.

    With k = conj(g), h = k u, E = u^2 sum_r k (p z - q): conj(dv) = sum h and conj(dw) = sum E; or, of pairs,
    dv = 2 Re sum h (z-Re w) - 2i Im w Re sum h, dw = 2 Re sum E (z-Re w) - 2i Im w Re sum E - 2 sum_r v Re sum h."""
    i, blocks, groups = tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(R, BR)
    r = (i // blocks % groups * BR + tl.arange(0, BR))[:, None, None]
    m = (i % blocks * BM + tl.arange(0, BM))[None, :, None]
    b, chunk = (i // blocks // groups % B).to(tl.int64), (i // blocks // groups // B).to(tl.int64)
    own, mode, numerator = (r < R) & (m < M), 2 * (b * M + m), 2 * ((b * R + r) * M + m)
    wr, wi = tl.load(w + mode, m < M, 1), tl.load(w + mode + 1, m < M, 1)
    vr, vi = tl.load(v + numerator, own, 0), tl.load(v + numerator + 1, own, 0)
    p, q = numerators(vr, vi, wr, wi, CONJ)
    h0 = tl.zeros((BR, BM, BL), dv.dtype.element_ty)
    e0 = tl.zeros((1, BM, BL), dv.dtype.element_ty)
    h1, e1 = h0, e0
    for tile in range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, L), BL):
        part = 2 * tile + tl.arange(0, 2 * BL)[None, None, :]
        zr, zi = tl.split(tl.reshape(tl.load(z + 2 * (b % z_rows * L) + part, part < 2 * L, 0), (1, 1, BL, 2)))
        k = tl.load(g + 2 * ((b * R + r) * L) + part, (r < R) & (part < 2 * L), 0)
        kr, ki = tl.split(tl.reshape(k, (BR, 1, BL, 2)))
        ki = -ki
        ur, ui = pole(zr, zi, wr, wi, CONJ)
        here = tile + tl.arange(0, BL)[None, None, :] < L
        ur, ui = tl.where(here, ur, 0), tl.where(here, ui, 0)
        nr, ni = combined(tl.sum(kr * p, 0, True), tl.sum(ki * p, 0, True),
                          tl.sum(kr * q, 0, True), tl.sum(ki * q, 0, True), zr, zi, CONJ)
        tr, ti = nr * ur - ni * ui, nr * ui + ni * ur
        er, ei = tr * ur - ti * ui, tr * ui + ti * ur
        hr, hi = kr * ur - ki * ui, kr * ui + ki * ur
        if CONJ:
            hr, hi = hr * (zr - wr) - hi * zi, hr
            er, ei = er * (zr - wr) - ei * zi, er
        h0, h1, e0, e1 = h0 + hr, h1 + hi, e0 + er, e1 + ei
    h0, h1, e0, e1 = tl.sum(h0, 2, True), tl.sum(h1, 2, True), tl.sum(e0, 2, True), -tl.sum(e1, 2, True)
    if CONJ:
        e0, e1 = 2 * (e0 - tl.sum(vr * h1, 0, True)), 2 * (wi * e1 - tl.sum(vi * h1, 0, True))
        h0, h1 = 2 * h0, 2 * wi * h1
    dv += chunk * B * R * M * 2 + numerator
    tl.store(dv, h0, own)
    tl.store(dv + 1, -h1, own)
    dw += (chunk * groups + i // blocks % groups) * B * M * 2 + mode
    tl.store(dw, e0, m < M)
    tl.store(dw + 1, e1, m < M)


def cauchy_sums(v, z, w, conj, power=1):
    "The forward kernel on v (b r m), z (b l) or (1 l), w (b m) -> (b r l)."
    (B, R, M), L, br = v.shape, z.shape[-1], width(v.shape[1], 4)
    out = v.new_empty(B, R, L)
    bl = width(L, 512 if v.dtype == torch.complex64 else 256)
    launch(cauchy_kernel, B * triton.cdiv(R, br) * triton.cdiv(L, bl), on_gpu(v), on_gpu(z), on_gpu(w), on_gpu(out),
           len(z), R, L, M, CONJ=conj, POWER=power, BR=br, BL=bl)
    return out


@custom_op("s4nb::cauchy_triton", mutates_args=())
def cauchy_triton(v: torch.Tensor, z: torch.Tensor, w: torch.Tensor, conj: bool = True) -> torch.Tensor:
    "Cauchy sums by Triton: v (b r m), z (b l) or (1 l), w (b m), all complex64 or all complex128 -> (b r l)."
    return cauchy_sums(v, z, w, conj)


@custom_op("s4nb::cauchy_triton_grads", mutates_args=())
def cauchy_triton_grads(g: torch.Tensor, v: torch.Tensor, z: torch.Tensor, w: torch.Tensor,
                        conj: bool, z_too: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    "Gradients to v, z (empty unless z_too) and w; not differentiable."
    (B, R, M), L, chunk, br = v.shape, z.shape[-1], 2048, width(v.shape[1], 4)
    chunks, groups, bm = triton.cdiv(L, chunk), triton.cdiv(R, br), width(M, 8 // max(br, 2))
    dv, dw = on_gpu(v.new_empty(chunks, B, R, M)), on_gpu(w.new_empty(chunks * groups, B, M))
    launch(cauchy_grads_kernel, chunks * B * groups * triton.cdiv(M, bm), on_gpu(g), on_gpu(v), on_gpu(z), on_gpu(w),
           dv, dw, len(z), B, R, L, M, CONJ=conj, BR=br, BM=bm, BL=128, CHUNK=chunk)
    if not z_too: return total(dv), z.new_empty(0), total(dw)
    if conj: v, w = torch.cat([v, v.conj()], -1), torch.cat([w, w.conj()], -1)
    dz = -(g * cauchy_sums(v, z, w, False, power=2).conj()).sum(1)
    return total(dv), dz.sum_to_size(z.shape), total(dw)


def cauchy_backward(ctx, g):
    dv, dz, dw = cauchy_triton_grads(g, *ctx.saved_tensors, ctx.conj, ctx.needs_input_grad[1])
    return dv, dz if ctx.needs_input_grad[1] else None, dw, None


cauchy_triton.register_autograd(cauchy_backward, setup_context=keep)
cauchy_triton.register_fake(lambda v, z, w, conj=True: v.new_empty(*v.shape[:2], z.shape[-1]))
cauchy_triton_grads.register_fake(lambda g, v, z, w, conj, z_too: (
    v.new_empty(v.shape), z.new_empty(z.shape if z_too else 0), w.new_empty(w.shape)))


# ---- Vandermonde and its transpose -----------------------------------------------------------------------------------
@triton.jit
def power(rate, angle, l, T: tl.constexpr):
    """e^(x l) in the type T; Re x, Im x in float64, l whole.

    Quarter turns are taken off the phase in float64; of the rest, below pi/4, Taylor's series gives cosine and sine."""
    quarters = angle * l * 0.6366197723675814
    whole = tl.floor(quarters + 0.5)
    phase = ((quarters - whole) * 1.5707963267948966).to(T)
    N: tl.constexpr = 5 if T == tl.float32 else 9
    square, cos, sin = phase * phase, 1.0, 1.0
    for n in tl.static_range(N, 0, -1):
        cos = 1 - cos * square * (1 / ((2 * n - 1) * (2 * n)))
        sin = 1 - sin * square * (1 / ((2 * n) * (2 * n + 1)))
    sin *= phase
    turn, size = whole.to(tl.int64) & 3, tl.exp((rate * l).to(T))
    re, im = tl.where(turn % 2 == 0, cos, sin), tl.where(turn % 2 == 0, sin, cos)
    return size * tl.where((turn == 1) | (turn == 2), -re, re), size * tl.where(turn >= 2, -im, im)


@triton.jit(do_not_specialize=["R", "L", "M"])
def vandermonde_kernel(v, x, out, R, L, M, CONJ: tl.constexpr,
                       BK: tl.constexpr, BJ: tl.constexpr, BM: tl.constexpr):
    "A program: BK BJ positions l = k + j of one numerator, as the product (v e^(xk)) e^(xj) of two tables."
    T: tl.constexpr = out.dtype.element_ty
    i, tiles = tl.program_id(0), tl.cdiv(L, BK * BJ)
    k, j = i % tiles * BK * BJ + BJ * tl.arange(0, BK), tl.arange(0, BJ)
    row = (i // tiles).to(tl.int64)
    v += 2 * row * M
    x += 2 * (row // R) * M
    re = tl.zeros((BK, BJ), T)
    im = re
    for start in range(0, M, BM):
        m = start + tl.arange(0, BM)
        rate, angle = tl.load(x + 2 * m, m < M, 0), tl.load(x + 2 * m + 1, m < M, 0)
        vr, vi = tl.load(v + 2 * m, m < M, 0)[None, :], tl.load(v + 2 * m + 1, m < M, 0)[None, :]
        gr, gi = power(rate[None, :], angle[None, :], k[:, None], T)
        gr, gi = vr * gr - vi * gi, vr * gi + vi * gr
        pr, pi = power(rate[:, None], angle[:, None], j[None, :], T)
        re = tl.dot(gr, pr, re, input_precision="ieee", out_dtype=T)
        re = tl.dot(-gi, pi, re, input_precision="ieee", out_dtype=T)
        if not CONJ:
            im = tl.dot(gr, pi, im, input_precision="ieee", out_dtype=T)
            im = tl.dot(gi, pr, im, input_precision="ieee", out_dtype=T)
    l = k[:, None] + j[None, :]
    if CONJ: tl.store(out + row * L + l, 2 * re, l < L)
    else:
        tl.store(out + 2 * (row * L + l), re, l < L)
        tl.store(out + 2 * (row * L + l) + 1, im, l < L)


@triton.jit
def product(ur, ui, pr, pi, COMPLEX: tl.constexpr, T: tl.constexpr):
    "The matrix product of a real or complex u with a complex table."
    re = tl.dot(ur, pr, input_precision="ieee", out_dtype=T)
    im = tl.dot(ur, pi, input_precision="ieee", out_dtype=T)
    if COMPLEX:
        re = tl.dot(-ui, pi, re, input_precision="ieee", out_dtype=T)
        im = tl.dot(ui, pr, im, input_precision="ieee", out_dtype=T)
    return re, im


@triton.jit(do_not_specialize=["ROWS", "R", "L", "M"])
def power_sums_kernel(u, x, sums, moments, ROWS, R, L, M, COMPLEX: tl.constexpr, MOMENTS: tl.constexpr,
                      BK: tl.constexpr, BJ: tl.constexpr, BM: tl.constexpr, CHUNK: tl.constexpr):
    """A program: sum u_l e^(xl) and sum l u_l e^(xl) over CHUNK positions, for BM modes of one input.

    l = tile + k + j: a product with e^(xj), then e^(xk) and e^(x tile) as factors. Past L they may overflow: 0 there."""
    T: tl.constexpr = sums.dtype.element_ty
    S: tl.constexpr = 2 if COMPLEX else 1
    i, blocks = tl.program_id(0), tl.cdiv(M, BM)
    m = i % blocks * BM + tl.arange(0, BM)
    row, chunk = (i // blocks % ROWS).to(tl.int64), (i // blocks // ROWS).to(tl.int64)
    x += 2 * (row // R * M + m)
    rate, angle = tl.load(x, m < M, 0)[None, :], tl.load(x + 1, m < M, 0)[None, :]
    j, k = tl.arange(0, BJ)[:, None], BJ * tl.arange(0, BK)[:, None]
    jr, ji = power(rate, angle, tl.minimum(j, L - 1), T)
    kr, ki = power(rate, angle, k, T)
    sr = tl.zeros((BK, BM), T)
    si, tr, ti = sr, sr, sr
    for tile in range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, L), BK * BJ):
        l = tile + k + tl.arange(0, BJ)[None, :]
        at = u + S * (row * L + l)
        ur, ui = tl.load(at, l < L, 0), tl.load(at + S - 1, l < L, 0)
        cr, ci = power(rate, angle, tile, T)
        gr, gi = tl.where(tile + k < L, cr * kr - ci * ki, 0), tl.where(tile + k < L, cr * ki + ci * kr, 0)
        ar, ai = product(ur, ui, jr, ji, COMPLEX, T)
        sr, si = sr + ar * gr - ai * gi, si + ar * gi + ai * gr
        if MOMENTS:
            br, bi = product(ur, ui, j.to(T) * jr, j.to(T) * ji, COMPLEX, T)
            br, bi = br + (tile + k).to(T) * ar, bi + (tile + k).to(T) * ai
            tr, ti = tr + br * gr - bi * gi, ti + br * gi + bi * gr
    to = 2 * ((chunk * ROWS + row) * M + m)
    tl.store(sums + to, tl.sum(sr, 0), m < M)
    tl.store(sums + to + 1, tl.sum(si, 0), m < M)
    if MOMENTS:
        tl.store(moments + to, tl.sum(tr, 0), m < M)
        tl.store(moments + to + 1, tl.sum(ti, 0), m < M)


@custom_op("s4nb::vandermonde_triton", mutates_args=())
def vandermonde_triton(v: torch.Tensor, x: torch.Tensor, L: int, conj: bool = True) -> torch.Tensor:
    "sum_m v_m e^(x_m l), or twice its real part, by Triton: v (b r m), x (b m) -> (b r L) in v's precision."
    B, R, M = v.shape
    out = v.new_empty(B, R, L, dtype=v.dtype.to_real() if conj else v.dtype)
    bj = 64 if conj and v.dtype == torch.complex64 else 32
    bk = max(16, width(triton.cdiv(L, bj), bj))
    launch(vandermonde_kernel, B * R * triton.cdiv(L, bk * bj), on_gpu(v), on_gpu(x.to(torch.complex128)), on_gpu(out),
           R, L, M, CONJ=conj, BK=bk, BJ=bj, BM=16, num_stages=1)
    return out


@custom_op("s4nb::power_sums_triton", mutates_args=())
def power_sums(u: torch.Tensor, x: torch.Tensor, moments: bool) -> tuple[torch.Tensor, torch.Tensor]:
    "u (b r l) real or complex, x (b m) -> sum_l u_l e^(x_m l) and, if asked, sum_l l u_l e^(x_m l): (b r m)."
    (B, R, L), M, chunk, dtype = u.shape, x.shape[-1], 4096, u.dtype.to_complex()
    chunks = triton.cdiv(L, chunk)
    sums, first = (on_gpu(u.new_empty(chunks, B, R, m, dtype=dtype)) for m in (M, M if moments else 0))
    launch(power_sums_kernel, chunks * B * R * triton.cdiv(M, 32), on_gpu(u), on_gpu(x.to(torch.complex128)),
           sums, first, B * R, R, L, M, COMPLEX=u.is_complex(), MOMENTS=moments,
           BK=32 if u.dtype == torch.float32 else 16, BJ=16, BM=32, CHUNK=chunk, num_stages=1)
    return total(sums), total(first)


def vandermonde_backward(ctx, g):
    (v, x), x_too, scale = ctx.saved_tensors, ctx.needs_input_grad[1], 2 if ctx.conj else 1
    sums, moments = power_sums(g.conj(), x, x_too)
    dx = scale * (v * moments).conj().sum(1).to(x.dtype) if x_too else None
    return scale * sums.conj(), dx, None, None


def power_sums_backward(ctx, g, g_moments):
    u, x = ctx.saved_tensors
    l, real = torch.arange(u.shape[-1], device=u.device), not u.is_complex()

    def grads(g, u):
        du = vandermonde_triton(g.conj() / (2 if real else 1), x, len(l), real).conj()
        return du, (g * power_sums(u, x, True)[1].conj()).sum(1).to(x.dtype)

    du, dx = grads(g, u)
    if g_moments.shape[-1]:                                           # the moments of u are the sums of l u
        of_lu, more = grads(g_moments, l * u)
        du, dx = du + l * of_lu, dx + more
    return du, dx, None


vandermonde_triton.register_autograd(vandermonde_backward, setup_context=keep)
vandermonde_triton.register_fake(lambda v, x, L, conj=True: v.new_empty(
    *v.shape[:2], L, dtype=v.dtype.to_real() if conj else v.dtype))
power_sums.register_autograd(power_sums_backward, setup_context=keep)
power_sums.register_fake(lambda u, x, moments: tuple(
    u.new_empty(*u.shape[:2], m, dtype=u.dtype.to_complex()) for m in (x.shape[-1], x.shape[-1] if moments else 0)))


def power_sums_triton(u, x):
    "sum_l u_l e^(x_m l) by Triton: u (b r l) real or complex, x (b m) -> complex (b r m) in u's precision."
    return power_sums(u, x, False)[0]
