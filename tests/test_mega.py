"""Mega: promises of every form, chunks against one dense mask, rows of unequal length, biases, precision, errors."""
import pytest
import torch
import torch.nn.functional as F

from s4nb.models.backbone import SequenceModel
from s4nb.models.check import check_model, run_chunks, run_steps
from s4nb.models.mega import ChunkAttention, Mega, MegaBlock, RotaryBias, SimpleBias, aligned, take
from s4nb.module import Laplace

FORMS = ("softmax", "relu2", "laplace")
AHEAD = {"step", "state"}


def gap(ours, theirs): return (ours - theirs).abs().max().item()


def shaken(module, size=0.3):
    "The module in float64 with noise on its parameters: far from equal weights."
    with torch.no_grad():
        for p in module.double().parameters(): p.add_(size * torch.randn_like(p))
    return module


def dense(f, z, v, lengths=None):
    "ChunkAttention by one l x l mask: z (b l Z), v (b l V) -> (b l V)."
    l, (g, h), (b, c) = z.shape[1], f.gamma, f.beta
    t = torch.arange(l)
    chunk = t if f.chunk < 0 else t // f.chunk
    sees = (chunk[:, None] == chunk) if f.chunk > 0 else torch.ones(l, l, dtype=torch.bool)
    sees = sees.tril() if f.causal else sees
    sees = sees.expand(len(z), l, l)
    if lengths is not None and not f.causal: sees = sees & (t < lengths[:, None])[:, None]
    scores = torch.einsum("bie,bje->bij", z * g + b, z * h + c)
    bias = f.rel_pos_bias(t[:, None] - t)
    if f.act is None:
        return F.scaled_dot_product_attention(z * g + b, z * h + c, v, torch.where(sees, bias, -torch.inf))
    scores = scores / sees.sum(-1, keepdim=True).clamp(min=1) + bias
    laplace = torch.distributions.Normal(*torch.tensor([0.5, 0.25 / torch.pi], dtype=torch.double).sqrt())
    w = laplace.cdf(scores) if isinstance(f.act, Laplace) else scores.relu() ** 2
    return torch.where(sees, w, 0.0) @ v


# ---- promises --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("chunk", [-1, 2, 5, 23, 24, 25, 100])
def test_promises_of_chunks(chunk, causal):
    found = check_model(Mega(8, chunk=chunk, causal=causal), compile=chunk == 5)
    assert {p for p, said in found.items() if said != "yes"} == (set() if causal else AHEAD)


@pytest.mark.parametrize("bias", ["simple", "rotary"])
@pytest.mark.parametrize("attention", FORMS)
@pytest.mark.parametrize("bidirectional", [True, False])
def test_promises_of_forms(attention, bias, bidirectional):
    f = Mega(8, 4, 6, 2, 5, attention=attention, rel_pos_bias=bias, bidirectional=bidirectional, max_positions=3)
    assert {p for p, said in check_model(f).items() if said != "yes"} == (AHEAD if bidirectional else set())


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("mode", ["diag", "dplr", "dense"])
def test_promises_of_kernels(mode, bidirectional):
    f = Mega(6, d_state=8, mode=mode, bidirectional=bidirectional, chunk=7)
    assert {p for p, said in check_model(f).items() if said != "yes"} == (AHEAD if bidirectional else set())


def test_kernel_options_and_their_limits():
    assert {p for p, said in check_model(Mega(6, mode="conv", l_max=4)).items() if said != "yes"} == set()
    found = check_model(Mega(6, mode="diag", disc="dss"))
    assert {p for p, said in found.items() if said != "yes"} == AHEAD | {"padding"}


def test_blocks_in_a_model():
    model = SequenceModel(8, 2, lambda i: MegaBlock(Mega(8, chunk=5)), norm="none", residual="F")
    assert set(check_model(model, compile=True).values()) == {"yes"}
    both = SequenceModel(8, 1, lambda i: MegaBlock(Mega(8, bidirectional=True)), norm="none", residual="F")
    found = check_model(both)
    assert {p for p, said in found.items() if said != "yes"} == AHEAD


# ---- attention in chunks ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("attention", FORMS)
@pytest.mark.parametrize("chunk", [-1, 4, 30])
@pytest.mark.parametrize("l", [1, 3, 4, 8, 21])
def test_equals_one_dense_mask(l, chunk, attention, causal):
    torch.manual_seed(l)
    f = shaken(ChunkAttention(4, 5, chunk, attention, causal=causal, max_positions=6), 0.7)
    z, v = torch.randn(3, l, 4, dtype=torch.double), torch.randn(3, l, 5, dtype=torch.double)
    lengths = torch.tensor([l, max(1, l // 2), 1])
    valid = torch.arange(l) < lengths[:, None]
    y, _ = f(z, v, lengths=lengths)
    assert gap(f(z, v)[0], dense(f, z, v)) <= 1e-12
    assert y.isfinite().all() and gap(y[valid], dense(f, z, v, lengths)[valid]) <= 1e-12


@pytest.mark.parametrize("sizes", [[1] * 23, [3, 20], [4, 4, 15], [9, 1, 1, 12], [5, 3, 15], [22, 1]])
@pytest.mark.parametrize("chunk", [-1, 2, 4, 7, 22, 23])
def test_any_split_is_the_whole(chunk, sizes):
    f, u = shaken(Mega(4, chunk=chunk, attention="laplace")), torch.randn(2, 23, 4, dtype=torch.double)
    whole, end = f(u)
    parts, state = run_chunks(f, u, sizes)
    assert gap(parts, whole) <= 1e-12 and all(gap(a, b) <= 1e-12 for a, b in zip(state, end) if a.numel())


@pytest.mark.parametrize("mode", ["ema", "diag"])
@pytest.mark.parametrize("chunk", [-1, 5, 12])
def test_rows_continue_after_their_own_length(chunk, mode):
    "Padding within a cache: a row that ended early goes on as if the padding had never been."
    f, u = shaken(Mega(8, chunk=chunk, mode=mode)), torch.randn(3, 30, 8, dtype=torch.double)
    for _ in range(3):
        lengths = torch.randint(0, 11, (2, 3))
        state = f.default_state(3)
        for part, n in zip((u[:, :10].clone(), u[:, 10:20].clone()), lengths):
            part[torch.arange(10) >= n[:, None]] = float("nan")
            y, state = f(part, state, n)
            assert y.isfinite().all() and all(s.isfinite().all() for s in state)
        tail, state = f(u[:, 20:26], state)
        steps, state = run_steps(f, u[:, 26:], state)
        for i in range(3):
            row = torch.cat([u[i, :lengths[0, i]], u[i, 10:10 + lengths[1, i]], u[i, 20:]])[None]
            assert gap(torch.cat([tail[i], steps[i]]), f(row)[0][0, -10:]) <= 1e-12
            assert state[3][i] == (row.shape[1] if chunk == -1 else row.shape[1] % chunk)


@pytest.mark.parametrize("f", [Mega(6), Mega(6, chunk=4), Mega(6, bidirectional=True, chunk=2, attention="laplace"),
                               Mega(6, causal=False)])
def test_empty_rows_are_finite(f):
    u = torch.full((2, 9, 6), float("nan"))
    u[1, :3] = 1.0
    y, _ = f(u, lengths=torch.tensor([0, 3]))
    y.sum().backward()
    assert y.isfinite().all() and all(p.grad.isfinite().all() for p in f.parameters())


def test_chunks_do_not_see_each_other():
    f, z, v = shaken(ChunkAttention(4, 4, 6)), *torch.randn(2, 1, 24, 4, dtype=torch.double)
    alone = torch.cat([f(*part)[0] for part in zip(z.split(6, 1), v.split(6, 1))], 1)
    assert gap(f(z, v)[0], alone) <= 1e-12


def test_the_future_is_invisible():
    for f in (shaken(Mega(8)), shaken(Mega(8, chunk=16)), shaken(Mega(8, mode="dplr"))):
        u = torch.randn(2, 40, 8, dtype=torch.double)
        v = u.clone()
        v[:, 25:] = 30 * torch.randn(2, 15, 8)
        assert gap(f(u)[0][:, :25], f(v)[0][:, :25]) <= 1e-12              # rounding in the convolution


def test_state_of_chunks_has_a_fixed_size():
    f = Mega(8, 4, 6, chunk=10)
    shapes = {tuple(s.shape for s in f(torch.randn(2, l, 8))[1]) for l in (1, 9, 10, 57)}
    assert shapes == {tuple(s.shape for s in f.default_state(2))} == {((2, 8, 16), (2, 9, 4), (2, 9, 6), (2,))}
    assert f.default_state(2, 3)[1].shape == (2, 3, 9, 4)


def test_alignment():
    x = torch.arange(6.0).view(2, 3, 1)
    assert take(x, torch.tensor([[0, 2]]))[..., 0].tolist() == [[0, 2], [3, 5]]
    laid = aligned(x, 10 + x[:, :2], torch.tensor([0, 2]), 4)[..., 0]
    assert laid[0, :2].tolist() == [10, 11] and laid[1].tolist() == [3, 4, 13, 14]
    assert aligned(None, x, None, 5)[..., 0].tolist() == [[0, 1, 2, 0, 0], [3, 4, 5, 0, 0]]


# ---- biases ----------------------------------------------------------------------------------------------------------
def test_biases_work_at_any_length():
    f = SimpleBias(3)
    assert torch.equal(f(torch.tensor([0, 1, 2, 3, 10**6])), f.weight[[0, 1, 2, 2, 2]])
    f, angle = shaken(RotaryBias(4)), 10**6 * torch.tensor([1.0, 0.01], dtype=torch.double)
    alpha, beta = (torch.complex(*x.chunk(2)) for x in (f.alpha, f.beta))
    product = alpha * beta.conj() * torch.polar(torch.ones_like(angle), angle)
    assert gap(f(torch.tensor(10**6)), product.real.sum()) <= 1e-9        # cos(10^6) loses 6 of 16 digits
    sizes = [{k: p.shape for k, p in Mega(8, rel_pos_bias=b, chunk=c, max_positions=7).state_dict().items()}
             for b in ("simple", "rotary") for c in (-1, 50)]
    assert sizes[0] == sizes[1] and sizes[2] == sizes[3]


def test_longer_than_the_table():
    f, u = shaken(Mega(8, max_positions=4)), torch.randn(1, 50, 8, dtype=torch.double)
    assert gap(run_steps(f, u, f.default_state(1))[0], f(u)[0]) <= 1e-12


# ---- gradients, precision, rate, dropout -----------------------------------------------------------------------------
@pytest.mark.parametrize("chunk", [-1, 3, 4])
def test_gradients(chunk):
    f, lengths = shaken(Mega(2, 2, 2, 2, chunk, attention="laplace")), torch.tensor([7, 4])
    u = torch.randn(2, 7, 2, dtype=torch.double, requires_grad=True)
    _, state = f(torch.randn(2, 5, 2, dtype=torch.double), lengths=torch.tensor([2, 5]))
    assert torch.autograd.gradcheck(lambda u: f(u, [s.detach() for s in state], lengths)[0][0], u)


@pytest.mark.parametrize("attention", FORMS)
def test_weights_and_state_are_float32_under_autocast(attention):
    f, seen = Mega(8, chunk=5, attention=attention), []
    weights = f.attention.weights
    f.attention.weights = lambda *given: seen.append(weights(*given)) or seen[-1]
    u = torch.randn(2, 17, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = f(u)
        y, state = f(u[:, :3], state)
    assert y.dtype == torch.float32 and {w.dtype for w in seen} == {torch.float32}
    assert {s.dtype for s in state} == {torch.float32, torch.long}
    if attention == "softmax": assert all(gap(w.sum(-1), torch.ones(())) < 1e-6 for w in seen)


def test_rate_is_the_kernels_business():
    f, u = Mega(4, mode="diag").double(), torch.randn(1, 30, 4, dtype=torch.double)
    y, _ = f(u, rate=2.0)
    with torch.no_grad(): f.ssm.kernel.inv_dt += torch.tensor(2.0).log()
    assert gap(f(u)[0], y) <= 1e-6                                         # log 2 in float32
    with pytest.raises(ValueError, match="rate"): Mega(4)(u.float(), rate=2.0)


def test_dropout_acts_in_training_alone():
    f, u = Mega(8, dropout=0.5), torch.randn(2, 9, 8)
    assert gap(f(u)[0], f(u)[0]) > 0.01
    f.eval()
    assert gap(f(u)[0], f(u)[0]) == 0


def test_a_closed_update_gate_is_the_identity():
    f, u = Mega(4), torch.randn(2, 9, 4)
    with torch.no_grad(): f.mx_proj.bias[:4] = -1e4
    assert gap(f(u)[0], u) == 0


# ---- errors ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("options, message", [
    ({"mode": "emma"}, "did you mean 'ema'"), ({"attention": "laplce"}, "did you mean 'laplace'"),
    ({"rel_pos_bias": "rotatory"}, "did you mean 'rotary'"), ({"chunk": 0}, "2 or more"), ({"chunk": 1}, "2 or more"),
    ({"max_positions": 0}, "max_positions"), ({"d_attin": 3, "rel_pos_bias": "rotary"}, "even"),
    ({"d_attin": 0}, "d_attin=0"), ({"d_attout": 0}, "d_attout=0"),
    ({"bidirectional": True, "causal": True}, "drop one"), ({"dropout": 1.5}, "1.5"),
    ({"channels": 2}, "leave channels at 1"), ({"measure": "legs"}, "measure")])
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message): Mega(8, **options)


def test_what_looks_ahead_has_no_state():
    f, u = Mega(8, bidirectional=True), torch.randn(2, 5, 8)
    assert f.default_state(2) is None and f(u)[1] is None
    with pytest.raises(ValueError, match="state"): f(u, Mega(8).default_state(2))
    with pytest.raises(ValueError, match="step"): f.step(u[:, 0], None)
