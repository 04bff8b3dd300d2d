"""The scan against the loop, and the layers built on it against what every sequence model promises."""
import pytest
import torch
from s4nb.models.check import check_model
from s4nb.models.scan_rnn import QRNN, SRU, SRURNN, MinGRU, linear_scan

LAYERS = {
    "minGRU": lambda: MinGRU(4, 6), "QRNN": lambda: QRNN(4, 6, kernel_size=3), "QRNN of width 1": lambda: QRNN(4, kernel_size=1),
    "SRURNN": lambda: SRURNN(4, 5), "SRURNN without feedback": lambda: SRURNN(4, 5, feedback=False), "SRU H": lambda: SRU(4, 6),
    "SRU H of one size": lambda: SRU(4), "SRU offset": lambda: SRU(4, 6, offset=False), "SRU R": lambda: SRU(4, 4, "R"),
    "SRU N": lambda: SRU(4, 6, "N"),
}


def loop(a, x, h):
    path = []
    for a_t, x_t in zip(a.unbind(1), x.unbind(1)):
        h = a_t * h + x_t
        path.append(h)
    return torch.stack(path, 1)


@pytest.mark.parametrize("L", [1, 2, 3, 6, 7, 63, 64, 65])
def test_scan_is_the_loop(L):
    a, x, h = torch.rand(2, L, 3).double(), torch.randn(2, L, 3).double(), torch.randn(2, 3).double()
    assert (linear_scan(a, x, h) - loop(a, x, h)).abs().max() < 1e-12
    assert (linear_scan(a, x) - loop(a, x, 0 * h)).abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("L", [1, 2, 5])
def test_gradients(L, dtype):
    given = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in [(2, L, 2), (2, L, 2), (2, 2)]]
    assert torch.autograd.gradcheck(linear_scan, given)
    assert torch.autograd.gradgradcheck(linear_scan, given)


def test_float32_at_great_length():
    a, x = 1 - torch.rand(1, 16384, 4).double() ** 4, torch.randn(1, 16384, 4).double()
    exact = loop(a, x, torch.zeros(1, 4).double())
    assert (linear_scan(a.float(), x.float()) - exact).norm() < 1e-5 * exact.norm()


@pytest.mark.parametrize("shape", [(2, 5), (2, 6, 3), (2, 0, 3)])
def test_shapes_are_checked(shape):
    x = torch.zeros(2, 5, 3) if shape != (2, 0, 3) else torch.zeros(shape)
    with pytest.raises(ValueError, match="one shape"): linear_scan(torch.zeros(shape), x)


@pytest.mark.parametrize("name", LAYERS)
def test_promises(name):
    found = check_model(LAYERS[name](), compile=name in ("minGRU", "QRNN"))
    assert set(found.values()) == {"yes"}


@pytest.mark.parametrize("name", ["minGRU", "QRNN", "SRU H"])
def test_a_row_without_input_keeps_its_state(name):
    layer = LAYERS[name]().double()
    _, before = layer(torch.randn(2, 5, layer.d_model, dtype=torch.float64))
    _, after = layer(torch.randn(2, 4, layer.d_model, dtype=torch.float64), before, lengths=torch.tensor([0, 4]))
    for b, a in zip(before, after) if isinstance(before, tuple) else [(before, after)]:
        assert torch.equal(b[0], a[0]) and not torch.equal(b[1], a[1])


def test_gates_stay_wide_under_autocast():
    layer = MinGRU(4)
    with torch.no_grad(): layer.W_z.weight.zero_(), layer.W_z.bias.fill_(-6.9), layer.W_h.weight.zero_(), layer.W_h.bias.fill_(1)
    with torch.autocast("cpu", torch.bfloat16): y, state = layer(torch.zeros(1, 1000, 4))
    z = torch.sigmoid(torch.tensor(-6.9).bfloat16().double())
    assert state.dtype == torch.float32 and (y[0, -1] - (1 - (1 - z) ** 1000)).abs().max() < 1e-3


def test_refusals():
    with pytest.raises(ValueError, match="residual"): SRU(4, residual="X")
    with pytest.raises(ValueError, match="kernel_size"): QRNN(4, kernel_size=0)
    with pytest.raises(ValueError, match="rate"): MinGRU(4)(torch.zeros(1, 2, 4), rate=2.0)
    with pytest.raises(ValueError, match="input"): SRURNN(4).step(torch.zeros(1, 2, 4), torch.zeros(1, 4))


def test_parameters_of_the_unit():
    "The number the reference's cell has."
    assert sum(p.numel() for p in SRU(3, 16).parameters()) == 288


@pytest.mark.parametrize("kind", [MinGRU, QRNN, SRURNN, SRU])
def test_models_in_bfloat16(kind):
    "A whole model in 16 bits: outputs as the input, states in at least float32, which may come back in."
    model, u = kind(4, 6).bfloat16(), torch.randn(2, 7, 4, dtype=torch.bfloat16)
    y, state = model(u)
    y, state = model(u, state, lengths=torch.tensor([3, 0]))
    assert y.dtype == model.step(u[:, 0], state)[0].dtype == torch.bfloat16 and y.isfinite().all()
