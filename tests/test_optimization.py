"""Parameter groups against the experiments' rules, under every optimiser; Lamb against a loop and torch's Adam."""
import copy
import io

import numpy as np
import pytest
import torch
from torch import nn

from s4nb.models import Decoder, Model, SequenceModel, TokenEncoder
from s4nb.models.coders import LinearEncoder
from s4nb.models.s4nd import S4ND
from s4nb.s4.block import S4Block
from s4nb.training import param_groups
from s4nb.training.optimization import Lamb, group_table

OPTIMIZERS = {
    "adamw": lambda groups: torch.optim.AdamW(groups), "adam": lambda groups: torch.optim.Adam(groups),
    "sgd": lambda groups: torch.optim.SGD(groups, momentum=0.9), "rmsprop": lambda groups: torch.optim.RMSprop(groups),
    "lamb": lambda groups: Lamb(groups),
}
MODES = {"dplr": {}, "diag": {}, "dense": {}, "conv": {"l_max": 16}, "ema": {}}


def by_name(groups):
    return {name: (g["lr"], g["weight_decay"]) for g in groups for name in g["names"]}


def lra(lr, n_ssm=1, **given):
    "A small model of the LRA kind; tokens unless given d_input."
    d_input = given.pop("d_input", None)
    layer = lambda i: S4Block(8, d_state=8, n_ssm=n_ssm, bidirectional=True, dt_transform="softplus", lr=lr, **given)
    backbone = SequenceModel(8, 2, layer, norm="batch", prenorm=False)
    encoder = TokenEncoder(18, 8) if d_input is None else LinearEncoder(d_input, 8)
    return Model(encoder, backbone, Decoder(8, 10))


@pytest.mark.parametrize("mode", MODES)
def test_each_trained_parameter_is_in_exactly_one_group(mode):
    model = SequenceModel(8, 2, lambda i: S4Block(8, d_state=4, mode=mode, **MODES[mode]), norm="batch")
    groups = param_groups(model, 0.01, 0.05)
    ids = [id(p) for g in groups for p in g["params"]]
    assert sorted(ids) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert set(by_name(groups)) == {n for n, p in model.named_parameters() if p.requires_grad}
    assert len({(g["lr"], g["weight_decay"]) for g in groups}) == len(groups)
    for name, (lr, decay) in by_name(groups).items():
        spared = any(s in name for s in (".kernel.", "norm", "bias")) and not name.endswith("kernel.K")  # K: weights
        assert decay == (0.0 if spared else 0.05), name


def test_named_rates_leave_C_and_dt_at_the_global_one():
    options = by_name(param_groups(lra({"dt": None, "A": 1e-3, "B": 1e-3}), 0.01, 0.05))
    kernel = "backbone.layers.0.layer.kernel."
    for name in ("A_real", "A_imag", "P", "B"):
        assert options[kernel + name] == (1e-3, 0.0)
    assert options[kernel + "inv_dt"] == options[kernel + "C"] == (0.01, 0.0)
    for name in ("backbone.layers.1.layer.D", "backbone.layers.0.layer.mix.0.weight", "encoder.weight",
                 "decoder.linear.bias"):
        assert options[name] == (0.01, 0.05), name
    assert options["backbone.layers.0.layer.mix.0.bias"] == options["backbone.layers.1.norm.weight"] == (0.01, 0.0)


def test_one_rate_holds_for_C_too():
    options = by_name(param_groups(lra(1e-3, n_ssm=None, d_input=1), 0.004, 0.05))
    kernel = "backbone.layers.1.layer.kernel."
    assert {v for name, v in options.items() if kernel in name} == {(1e-3, 0.0)}
    assert {kernel + n for n in ("A_real", "A_imag", "P", "B", "C", "inv_dt")} <= set(options)
    assert options["encoder.weight"] == options["encoder.bias"] == options["decoder.linear.weight"] == (0.004, 0.05)


def test_a_rate_of_its_own_for_C_and_dt():
    options = by_name(param_groups(lra({"C": 0.02, "dt": 0.03}), 0.01, 0.05))
    kernel = "backbone.layers.0.layer.kernel."
    assert options[kernel + "C"] == (0.02, 0.0) and options[kernel + "inv_dt"] == (0.03, 0.0)
    assert options[kernel + "B"] == (0.01, 0.0)


def test_kernels_on_two_axes_do_not_decay():
    options = by_name(param_groups(S4ND(4, d_state=4, dim=2, l_max=(8, 8)), 0.01, 0.05))
    inner = {v for name, v in options.items() if "kernel" in name}
    assert inner == {(0.01, 0.0)} and sum("kernel" in name for name in options) >= 10


@pytest.mark.parametrize("norm", [nn.LayerNorm(4), nn.GroupNorm(2, 4), nn.RMSNorm(4), nn.BatchNorm2d(4),
                                  nn.InstanceNorm1d(4, affine=True), nn.Embedding(3, 4), nn.EmbeddingBag(3, 4)],
                         ids=lambda m: type(m).__name__)
def test_normalisations_and_embeddings_do_not_decay(norm):
    groups = param_groups(norm, 0.01, 0.05)
    assert len(groups) == 1 and groups[0]["weight_decay"] == 0.0 and groups[0]["lr"] == 0.01


@pytest.mark.parametrize("norm", ["layer", "batch", "scalar", "group"])
def test_norms_of_the_backbone_do_not_decay(norm):
    options = by_name(param_groups(SequenceModel(4, 1, lambda i: S4Block(4, d_state=4), norm=norm), 0.01, 0.05))
    assert {v for name, v in options.items() if "norm" in name} == {(0.01, 0.0)}


@pytest.mark.parametrize("module, weights", [(nn.LSTM(2, 3, 2), 4), (nn.GRU(2, 3, bidirectional=True), 4), (nn.MultiheadAttention(4, 2, add_bias_kv=False), 2),
                                             (nn.Bilinear(2, 2, 3), 1)])
def test_biases_of_torchs_own_modules_do_not_decay(module, weights):
    decay = {name: group["weight_decay"] for group in param_groups(module, 1.0, 0.1) for name in group["names"]}
    assert sum(decay.values()) == pytest.approx(0.1 * weights) and len(decay) > weights
    assert all((value == 0) == ("bias" in name) for name, value in decay.items())


def test_frozen_parameters_and_zero_rates_are_left_out():
    model = nn.Sequential(S4Block(4, d_state=4, lr={"A": 0.0}), nn.Linear(4, 4))
    model[1].weight.requires_grad_(False)
    names = set(by_name(param_groups(model, 0.01, 0.05)))
    assert "1.weight" not in names and "1.bias" in names and not any(n.endswith(("A_real", "A_imag")) for n in names)


def test_a_shared_parameter_is_there_once():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    assert set(by_name(param_groups(model, 1.0, 0.1))) == {"0.weight", "0.bias", "1.bias"}


def test_copies_keep_their_options():
    model = lra(1e-3)
    assert by_name(param_groups(copy.deepcopy(model), 0.01, 0.05)) == by_name(param_groups(model, 0.01, 0.05))


def test_a_misspelt_option_is_an_error():
    layer = nn.Linear(2, 2)
    layer.param_options = {"weight": {"wd": 0.0}}
    with pytest.raises(ValueError, match=r"Linear.param_options\['weight'\] may hold .* weight_decay, but holds wd"):
        param_groups(layer, 0.01, 0.05)


def test_decay_acts_where_the_table_says():
    model = nn.Sequential(nn.Embedding(3, 4), nn.Linear(4, 4))
    optimizer = torch.optim.AdamW(param_groups(model, lr=0.5, weight_decay=0.1))
    before = {name: p.clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        assert torch.allclose(p, before[name] * (0.95 if name == "1.weight" else 1.0))


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("mode", ["dplr", "diag", "dense"])
def test_ssm_parameters_never_decay(name, mode):
    torch.manual_seed(0)
    given = dict(lr={"dt": 0.002}) if mode != "dense" else dict(lr=0.002)
    layer = S4Block(4, d_state=4, mode=mode, **given)
    groups = param_groups(layer, 0.01, 0.05)
    optimizer = OPTIMIZERS[name](groups)
    assert by_name(optimizer.param_groups) == by_name(groups)
    before = {n: p.detach().clone() for n, p in layer.named_parameters()}
    for _ in range(3):
        for p in layer.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
    moved = {n for n, p in layer.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n, (_, decay) in by_name(groups).items() if decay > 0} == {"D", "mix.0.weight"}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_group_moves_at_its_own_rate(name):
    "Two tensors of the same values and gradients, one at a tenth of the rate: a tenth of the step."
    fast, slow = (nn.Parameter(torch.linspace(1, 2, 5, dtype=torch.float64)) for _ in range(2))
    optimizer = OPTIMIZERS[name]([{"params": [fast], "lr": 0.01, "weight_decay": 0.0},
                                  {"params": [slow], "lr": 0.001, "weight_decay": 0.0}])
    start = fast.detach().clone()
    fast.grad = slow.grad = torch.tensor([1.0, -2.0, 0.5, 3.0, -0.1], dtype=torch.float64)
    optimizer.step()
    torch.testing.assert_close(slow - start, 0.1 * (fast - start), rtol=1e-9, atol=0)
    assert (fast != start).all()


def test_table_shows_every_group():
    model = Model(TokenEncoder(5, 4), SequenceModel(4, 1, lambda i: S4Block(4, d_state=4, lr=0.003)), Decoder(4, 3))
    groups = param_groups(model, 0.01, 0.05)
    lines = group_table(groups).splitlines()
    assert len(lines) == 1 + len(groups) == 4
    row = next(line for line in lines if "kernel.inv_dt" in line)
    kernel = [p for n, p in model.named_parameters() if ".kernel." in n]
    assert row.split()[:4] == ["0.003", "0", str(len(kernel)), str(sum(p.numel() for p in kernel))]


# --- Lamb

def by_hand(x, gradients, lr, beta1, beta2, eps, weight_decay, largest):
    "Algorithm 2 of You et al. 2020 in numpy, φ(z) = min(z, largest)."
    m, v = np.zeros_like(x), np.zeros_like(x)
    for t, g in enumerate(gradients, start=1):
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        d = m / (1 - beta1**t) / (np.sqrt(v / (1 - beta2**t)) + eps) + weight_decay * x
        nx, nd = np.sqrt((x * x).sum()), np.sqrt((d * d).sum())
        x = x - lr * (min(nx, largest) / nd if nx > 0 and nd > 0 else 1.0) * d
    return x


@pytest.mark.parametrize("given", [{}, {"betas": (0.5, 0.6)}, {"eps": 0.1}, {"weight_decay": 0.3}, {"largest": 0.7},
                                   {"lr": 0.2, "betas": (0.0, 0.0), "weight_decay": 1.0, "largest": 100.0}], ids=str)
def test_lamb_is_algorithm_2(given):
    values = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.0, "largest": 10.0} | given
    random = np.random.default_rng(0)
    starts = [random.standard_normal((4, 3)), random.standard_normal(50) * 5, np.zeros(3)]
    gradients = [[random.standard_normal(x.shape) for _ in range(6)] for x in starts]
    params = [nn.Parameter(torch.from_numpy(x.copy())) for x in starts]
    optimizer = Lamb(params, **given)
    for t in range(6):
        for p, g in zip(params, gradients):
            p.grad = torch.from_numpy(g[t])
        optimizer.step()
    (beta1, beta2), rest = values.pop("betas"), values
    for p, x, g in zip(params, starts, gradients):
        expected = by_hand(x, g, beta1=beta1, beta2=beta2, **rest)
        np.testing.assert_allclose(p.detach().numpy(), expected, rtol=1e-11, atol=1e-13)


def test_lamb_goes_in_adams_direction():
    "From zero, where its step is not rescaled, the first step is that of torch's Adam; its length elsewhere is lr‖x‖."
    g = torch.randn(20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ours, theirs, far = (nn.Parameter(torch.full((20,), x, dtype=torch.float64)) for x in (0.0, 0.0, 2.0))
    optimizers = Lamb([ours, far], lr=0.01), torch.optim.Adam([theirs], lr=0.01, eps=1e-6)
    ours.grad, theirs.grad, far.grad = g, g, 1e3 * g
    for optimizer in optimizers:
        optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    step = far.detach() - 2.0
    assert step.norm().item() == pytest.approx(0.01 * far.new_full((20,), 2.0).norm().item(), rel=1e-12)
    assert torch.equal(step.sign(), -g.sign())


def test_lamb_leaves_what_has_no_gradient_and_calls_the_closure_with_gradients():
    x, idle = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = Lamb([x, idle], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = x.square().sum()
        loss.backward()
        return loss
    assert optimizer.step(closure).item() == 3.0 and optimizer.step() is None
    assert torch.equal(idle, torch.ones(3)) and (x < 1).all()
    idle.grad = torch.zeros(3)                                      # neither gradient nor decay: d = 0 moves nothing
    optimizer.step()
    assert torch.equal(idle, torch.ones(3))


def test_lamb_resumes_exactly():
    def run(n, state=None):
        torch.manual_seed(1)
        layer = nn.Linear(4, 3)
        optimizer = Lamb(param_groups(layer, 0.02, 0.1))
        gradients = [[torch.randn_like(p) for p in layer.parameters()] for _ in range(8)]
        if state is not None:
            saved = torch.load(io.BytesIO(state), weights_only=True)
            layer.load_state_dict(saved["model"]), optimizer.load_state_dict(saved["optimizer"])
        for gs in gradients[:n] if state is None else gradients[n:]:
            for p, g in zip(layer.parameters(), gs):
                p.grad = g
            optimizer.step()
        file = io.BytesIO()
        torch.save({"model": layer.state_dict(), "optimizer": optimizer.state_dict()}, file)
        return layer.state_dict(), file.getvalue()
    whole, resumed = run(8)[0], run(3, run(3)[1])[0]
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)


def test_lamb_learns():
    torch.manual_seed(0)
    layer, x = nn.Linear(5, 1).double(), torch.randn(64, 5, dtype=torch.float64)
    y, optimizer = x @ torch.arange(5.0, dtype=torch.float64)[:, None], Lamb(layer.parameters(), lr=0.02)
    losses = []
    for _ in range(300):
        optimizer.zero_grad()
        loss = (layer(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.01 * losses[0]


@pytest.mark.parametrize("wrong", [{"lr": -1.0}, {"eps": -1e-6}, {"weight_decay": -0.1}, {"largest": 0.0},
                                   {"betas": (1.0, 0.9)}, {"betas": (0.9, -0.1)}], ids=str)
def test_lamb_refuses_values_outside_their_range(wrong):
    with pytest.raises(ValueError, match=f"Lamb takes .* {next(iter(wrong))}="):
        Lamb([nn.Parameter(torch.zeros(1))], **wrong)
