"""Every row of the experiments' tables against the figures of the specification, typed again here, and its model built on `meta`."""
import math
from dataclasses import replace
from functools import cache

import pytest
import torch

from s4nb.training import configs, notation
from s4nb.training.architectures import Facts, ResNet, S4DLayer, S4Layer, SequenceBackbone, WaveGAN
from s4nb.training.optimization import param_groups
from s4nb.training.notation import data, markdown, row, rows, shown, stack
from s4nb.training.tables import EXPERIMENTS, FAMILIES

# L layers, H width, N state, S copies of the SSM (H: one for each feature), lr_ssm: of dt/A/B/C, g: the optimiser's, F: frozen.
S4_ROWS = """
name                 task           L H    N    S   bi  dt          lr_ssm              act  norm       drop dec  BS  Ep   lr    wd  sched           l_max seed
lra-listops          lra-listops    6 256  4    1   yes .001-.1     g/.001/.001/g       glu  batch/post 0    pool 32  40   .01   .05 cos:12000/120000 2048  3333
lra-imdb             lra-imdb       6 256  4    1   yes .001-.1     g/.001/.001/g       glu  batch/pre  0    pool 16  32   .01   .05 cos:5000/50000   4096  3333
lra-aan              lra-aan        6 256  4    1   yes .001-.1     g/.001/.001/g       glu  batch/pre  0    pool 64  20   .01   .05 cos:5000/50000   4000  3333
lra-cifar            lra-cifar      6 512  64   1   yes .001-.1     .001/.001/.001/.001 glu  batch/post .1   pool 50  200  .01   .05 cos:18000/180000 1024  2222
lra-pathfinder       lra-pathfinder 6 256  64   H   yes .001-.1     .001/.001/.001/.001 glu  batch/pre  0    pool 64  200  .004  .05 cos:50000/500000 1024  3333
lra-pathx            lra-pathx      6 256  64   H   yes .0001-.1    .001/.001/.001/.001 glu  batch/pre  0    pool 16  50   .001  .05 cos:50000/500000 16384 3333
lra-cifar-base       lra-cifar      6 512  64   1   no  .001-.1     .001/.001/.001/g    glu  layer/pre  0    pool 50  200  .01   .05 cos:1000/180000  1024  2222
lra-listops-base     lra-listops    8 128  64   1   no  .001-.1     .001/.001/.001/g    glu  layer/pre  0    pool 50  40   .01   .05 cos:1000/80000   2048  2222
lra-listops-v3       lra-listops    8 128  64   H   yes .001-.1     g/.001/.001/g       glu  batch/post 0    pool 50  40   .01   .05 cos:1000/80000   2048  2222
lra-listops-small    lra-listops    4 128  64   H   yes .001-.1     g/.001/.001/g       glu  batch/post 0    pool 50  40   .01   .05 timm:40/40/1e-6/1e-5 2048 2222
lra-imdb-v3          lra-imdb       6 256  64   H   yes .001-.1     g/.001/.001/g       glu  batch/pre  0    pool 16  32   .01   .05 cos:1000/50000   4096  2222
lra-imdb-small       lra-imdb       4 128  64   H   yes .001-.1     g/.001/.001/g       glu  batch/pre  0    last 50  50   .01   0   cos:1000/25000   4096  2222
lra-aan-v3           lra-aan        6 256  64   256 yes .001-.1     g/.001/.001/g       glu  batch/pre  0    pool 64  20   .01   .05 cos:2500/50000   4000  2222
lra-cifar-v3         lra-cifar      6 512  64   2   yes .001-.1     g/.001/.001/g       glu  layer/post .1   pool 50  200  .01   .05 cos:900/180000   1024  2222
lra-pathfinder-v3    lra-pathfinder 6 256  64   H   yes .001-.1     .001/.001/.001/.001 glu  batch/pre  0    last 64  200  .004  .03 cos:2500/500000  1024  2222
lra-pathfinder-small lra-pathfinder 6 128  64   H   yes .001-.1     g/.001/.001/g       glu  batch/pre  0    last 64  40   .004  .01 cos:2500/100000  1024  2222
lra-pathx-v3         lra-pathx      6 256  64   H   yes .0001-.1    5e-4/5e-4/5e-4/5e-4 glu  batch/pre  0    pool 16  50   .001  .05 cos:50000/500000 16384 2222
lra-pathx-small      lra-pathx      4 96   64   H   yes .0001-.01   5e-4/5e-4/5e-4/5e-4 glu  batch/pre  0    pool 32  50   5e-4  .05 cos:5000/250000  16384 2222
lra-listops-v1       lra-listops    6 128  64   1   no  .001-.1     .001/.001/.001/g    id   batch/post 0    pool 50  50   .01   .01 plateau:5        2048  1112
lra-imdb-v1          lra-imdb       4 128  64   1   no  .001-.1     .001/.001/.001/g    id   batch/pre  0    last 50  40   .01   0   plateau:10       4096  1112
lra-aan-v1           lra-aan        6 256  64   1   no  .001-.1     .001/.001/.001/g    id   batch/pre  0    pool 64  25   .002  0   plateau:20       4000  1112
lra-cifar-v1         lra-cifar      6 512  64   1   no  .001-.1     .001/.001/.001/g    id   batch/post .2   pool 50  100  .004  .01 plateau:10       1024  1112
lra-pathfinder-v1    lra-pathfinder 6 256  64   1   no  .001-.1     .001/.001/.001/g    id   batch/pre  .1   last 100 200  .004  0   plateau:10       1024  1112
lra-pathx-v1         lra-pathx      6 256  64   1   no  .0001-.1    .001/.001/.001/g    id   batch/pre  0    pool 32  100  5e-4  0   plateau:40       16384 1112
cifar-v1             cifar          6 1024 64   1   no  .001-.1     .001/.001/.001/g    id   layer/post .25  pool 50  200  .01   .01 plateau:20       1024  1112
sc10-v1              sc10           6 128  64   1   no  .001-.1     .001/.001/.001/g    id   batch/pre  .1   pool 20  200  .01   0   plateau:20       16000 1112
cifar                cifar          6 512  64   2   yes .001-.1     .001/.001/.001/g    glu  layer/post .1   pool 50  200  .01   .05 cos:900/180000   1024  2222
cifar-ablation       cifar          4 128  64   1   yes .001-.1     .001/.001/.001/g    id   layer/post .1   pool 50  100  .01   .01 cos:900/90000    1024  1111
cifar-s4d            cifar          4 128  64   H   no  .001-.1     .001/.001/F/g       glu  layer/post .1   pool 50  100  .01   .01 cos:1000/90000   1024  1111
cifar-s4d-standalone cifar          4 128  64   H   no  .001-.1     .001/.001/F/g       glu  layer/post .1   pool 64  100  .01   .01 timm:100/0/0/0   1024  0
sc35                 sc35           6 128  64   2   yes .001-.1     .001/.001/.001/g    glu  batch/pre  0    pool 16  40   .01   .05 cos:1000/200000  16000 2222
sc35-ablation        sc35           4 128  64   1   no  .001-.1     .001/.001/.001/g    id   batch/pre  0    last 32  10   .004  0   cos:1000/50000   16000 1111
sc10                 sc10           6 128  64   2   yes .001-.1     .001/.001/.001/g    glu  batch/pre  0    pool 16  40   .01   .05 cos:1000/all     16000 2222
sc10-mfcc            sc10-mfcc      6 128  64   2   yes .001-.1     .001/.001/.001/g    glu  batch/pre  0    pool 16  40   .01   .05 cos:1000/all     161   2222
sc10-dropped         sc10-dropped   6 128  64   2   yes .001-.1     .001/.001/.001/g    glu  batch/pre  0    pool 16  40   .01   .05 cos:1000/all     16000 2222
pmnist               pmnist         4 256  64   1   no  .001-.1     .001/.001/.001/g    glu  layer/pre  0    pool 50  200  .001  0   plateau:20       784   0
mnist                mnist          4 256  64   1   no  .001-.1     .001/.001/.001/g    glu  layer/pre  0    pool 50  200  .001  0   plateau:20       784   0
copying              copying        4 64   256  1   no  .00390625-.00390625 1e-4/1e-4/1e-4/1e-4 glu layer/pre 0 last 8 1000 .001 0   constant         2048  1112
delay                delay          1 4    1024 1   no  .002-.002   .001/.001/.001/g    none none/pre   0    last 64  20   .001  0   constant         4000  1112
reconstruct          reconstruct    1 256  256  1   no  .002-.002   .001/F/F/g          none none/pre   0    last 64  20   .001  0   constant         4000  1112
adding               adding         4 256  64   1   no  .001-.1     .001/.001/.001/g    glu  layer/pre  0    last 50  200  .001  0   constant         1000  0
listops-mini         listops-mini   3 64   4    1   yes .001-.1     g/.001/.001/g       glu  batch/post 0    pool 32  8    .01   .05 cos:120/all      257   0
"""
TITLES, *LINES = [line.split() for line in S4_ROWS.strip().splitlines()]
SPEC = {line[0]: dict(zip(TITLES, line, strict=True)) for line in LINES}
OTHERS = ("lra-pathx-resnet", "sc35-convnet", "sc35-transformer", "pmnist-hippo", "pmnist-hippo-paper", "pmnist-lssl", "mnist-lssl")
# Characters that occur: the specification's for the published tasks; of our own texts only the files know, any number will do.
TOKENS = {"lra-imdb": 135, "lra-aan": 98, "reviews": 120, "manpages": 120}


def facts_of(e):
    "What the model is told, with the numbers of tokens that only the files know."
    made = e.dataset.build()
    facts = Facts.of(made)
    return replace(facts, n_tokens=TOKENS[made.name]) if facts.n_tokens is None and facts.d_input is None else facts


@cache
def built(name):
    facts = facts_of(EXPERIMENTS[name])
    with torch.device("meta"):
        return EXPERIMENTS[name].model.build(facts)


def numbers(text):
    return [float(x) for x in text.split("/")]


def test_every_experiment_is_checked_by_a_row():
    ours = {e.name for e in FAMILIES["ours"]}
    assert set(EXPERIMENTS) == set(SPEC) | set(OTHERS) | ours and not ours & set(OTHERS)
    assert all(name == e.name and e.about for name, e in EXPERIMENTS.items())
    assert sum(map(len, FAMILIES.values())) == len(EXPERIMENTS)


@pytest.mark.parametrize("name", SPEC)
def test_columns_of_the_specification(name):
    e, spec = EXPERIMENTS[name], SPEC[name]
    model, layer, d = e.model, e.model.layer, e.dataset
    made = d.build()
    assert made.name == spec["task"].removesuffix("-mfcc").removesuffix("-dropped") and made.l_max == int(spec["l_max"])
    assert (model.n_layers, model.d_model, layer.d_state) == tuple(int(spec[key]) for key in "LHN")
    assert (layer.n_ssm or model.d_model) == (model.d_model if spec["S"] == "H" else int(spec["S"]))
    assert layer.bidirectional == (spec["bi"] == "yes")
    assert [layer.dt_min, layer.dt_max] == [float(x) for x in spec["dt"].split("-")]
    assert layer.final_act == (None if spec["act"] == "none" else spec["act"])
    assert f"{model.norm}/{'pre' if model.prenorm else 'post'}" == spec["norm"]
    assert (model.dropout, model.decoder) == (float(spec["drop"]), spec["dec"])
    assert (d.batch_size, e.trainer.max_epochs, e.seed) == (int(spec["BS"]), int(spec["Ep"]), int(spec["seed"]))
    assert (e.optimizer.lr, e.optimizer.weight_decay) == (float(spec["lr"]), float(spec["wd"]))
    assert type(e.optimizer) is configs.AdamW and e.optimizer.betas == [0.9, 0.999] and e.optimizer.eps == 1e-8
    stated = [{"g": None, "F": 0.0}[x] if x in "gF" else float(x) for x in spec["lr_ssm"].split("/")]
    assert list(layer.lr) == ["dt", "A", "B", "C"] and list(layer.lr.values()) == stated


@pytest.mark.parametrize("name", SPEC)
def test_schedules_of_the_specification(name):
    got, (kind, _, values) = EXPERIMENTS[name].scheduler, SPEC[name]["sched"].partition(":")
    if kind == "cos":
        warmup, total = values.split("/")
        assert type(got) is configs.CosineWarmup and got.warmup == int(warmup)
        assert got.total == (None if total == "all" else int(total))
    elif kind == "timm":
        assert type(got) is configs.CosineEpochs and [got.t_initial, got.warmup_t, got.warmup_lr, got.lr_min] == numbers(values)
    elif kind == "plateau":
        assert type(got) is configs.Plateau and (got.factor, got.patience, got.min_lr) == (0.2, int(values), 0.0)
    else:
        assert type(got) is configs.Constant and got.warmup == 0


def test_what_the_specification_says_of_whole_families():
    for name, e in EXPERIMENTS.items():
        if name not in SPEC:
            continue
        layer, minimal, linear = e.model.layer, name.startswith("cifar-s4d"), name in ("delay", "reconstruct")
        assert type(layer) is (S4DLayer if minimal else S4Layer) and layer.channels == 1 and layer.mult_act is None
        fourier = name in ("copying", "reconstruct")
        assert layer.init == ("diag-lin" if minimal else "fourier" if fourier else "legs")
        assert (layer.rank, layer.deterministic) == ((2, True) if name == "copying" else (1, False))
        assert layer.activation == (None if linear else "gelu") and e.model.residual == (None if linear else "R")
        old = name.endswith(("-v1", "-v3", "-small")) or minimal
        assert layer.dt_transform == ("exp" if old else "softplus"), name
        assert e.model.tie_dropout == (not name.endswith("-base"))
        assert e.train.monitor == ("val/loss" if e in FAMILIES["synthetic tasks"] else "val/accuracy")
        assert e.trainer.gradient_clip_val is None and e.trainer.accumulate_grad_batches == 1
        assert e.callbacks == configs.Callbacks() and e.trainer.precision == "32-true"
    centred = {name for name, e in EXPERIMENTS.items() if getattr(e.dataset, "center", False)}
    assert centred == {f"lra-{task}-{version}" for task in ("pathfinder", "pathx") for version in ("v1", "v3", "small")}
    halved = {name for name, e in EXPERIMENTS.items() if e.dataset.rates == [1, 2]}
    assert halved == {"sc35", "sc35-ablation", "sc35-convnet", "sc35-transformer", "sc10", "sc10-v1", "sc10-twin", "spoken-digits"}
    assert all(e.dataset.rates == [1] for name, e in EXPERIMENTS.items() if name not in halved)
    assert EXPERIMENTS["cifar-s4d-standalone"].dataset.std == [0.2023, 0.1994, 0.2010]
    assert EXPERIMENTS["sc10-mfcc"].dataset.features == "mfcc" and EXPERIMENTS["sc10-dropped"].dataset.dropped == 30


def test_data_of_the_synthetic_tasks():
    copying, delay, reconstruct, adding = (EXPERIMENTS[name].dataset for name in ("copying", "delay", "reconstruct", "adding"))
    assert (copying.l_noise, copying.l_memorize, copying.n_tokens, copying.sizes[:2]) == (0, 1024, 64, [10_000, 1_000])
    assert (delay.l_seq, delay.l_lag, delay.n_lag, delay.dt, delay.freq, delay.sizes[:2]) == (4000, 1000, 1, 0.00025, 1000, [16_384, 1_024])
    assert (reconstruct.l_seq, reconstruct.l_mem, reconstruct.dt, reconstruct.freq) == (4000, 1000, 0.001, 100)
    assert adding.l_max == 1000 and sum(adding.sizes[:2]) == 50_000 and adding.sizes[1] == 5_000
    facts = {name: facts_of(EXPERIMENTS[name]) for name in ("copying", "delay", "reconstruct", "adding")}
    assert (facts["copying"].l_max, facts["copying"].l_output, facts["copying"].d_output) == (2048, 1024, 64)
    assert (facts["reconstruct"].l_output, facts["reconstruct"].d_output, facts["delay"].l_output) == (None, 1000, 4000)


def test_experiments_without_s4():
    resnet, convnet, transformer, hippo, paper, lssl, _ = (EXPERIMENTS[name] for name in OTHERS)
    assert type(resnet.model) is ResNet and resnet.dataset.build().l_max == 128 * 128
    assert type(convnet.model) is WaveGAN and convnet.dataset.length == 16_384 and "broken" in convnet.about
    common = lambda e: (e.dataset.batch_size, e.trainer.max_epochs, e.optimizer.lr, e.optimizer.weight_decay)
    assert common(resnet) == (100, 100, 0.001, 0) and resnet.seed == 1111 and resnet.scheduler.patience == 10
    assert common(convnet) == (16, 40, 0.01, 0.05) and (convnet.scheduler.warmup, convnet.scheduler.total) == (1000, 200_000)
    assert common(transformer) == (16, 200, 0.001, 0) and transformer.seed == 1112 and transformer.scheduler.patience == 10
    m = transformer.model
    assert (m.n_layers, m.d_model, m.norm, m.prenorm, m.dropout, m.decoder, m.ff, m.position) == (4, 128, "layer", True, 0.0, "pool", 4, "sin")
    assert (m.layer.n_heads, m.layer.n_features, m.layer.causal) == (8, 64, False)
    for e, d_model, train in ((hippo, 256, (50, 200, 0.001, 0)), (paper, 512, (100, 50, 0.001, 0))):
        m = e.model
        assert (m.n_layers, m.d_model, m.norm, m.residual, m.dropout, m.decoder) == (1, d_model, "none", None, 0.0, "last")
        assert (m.layer.cell, m.layer.memory_order, e.seed) == ("legs", None, 0) and common(e) == train
    assert type(paper.optimizer) is configs.Adam and type(paper.scheduler) is configs.Constant
    assert type(hippo.optimizer) is configs.AdamW and hippo.scheduler.patience == 20
    assert lssl.model.layer.measure == "legs" and lssl.published["LSSL paper"] == 98.76


def expected_groups(e):
    "{kind of parameter: (lr, weight decay)}, from the typed table and the rules of the reference."
    lr, wd = e.optimizer.lr, e.optimizer.weight_decay
    dt, A, B, C = ({"F": None, "g": lr}[x] if x in "Fg" else float(x) for x in SPEC[e.name]["lr_ssm"].split("/"))
    C_decay = 0.0 if e.name == "listops-mini" else wd
    return {"dt": (dt, 0.0), "A": (A, 0.0), "B": (B, 0.0), "C": (C, C_decay), "D": (lr, wd), "linear": (lr, wd), "bias": (lr, 0.0),
            "norm": (lr, 0.0), "encoder": (lr, wd), "decoder": (lr, wd)}


def kind_of(name):
    "Which row of expected_groups a parameter of a stack belongs to."
    for end, kind in (("inv_dt", "dt"), ("A_real", "A"), ("A_imag", "A"), ("kernel.P", "A"), ("kernel.B", "B"), ("kernel.C", "C"), (".D", "D")):
        if name.endswith(end):
            return kind
    head = name.split(".")[0]
    if head in ("encoder", "decoder"):
        return head
    return "norm" if ".norm." in name else "bias" if name.endswith("bias") else "linear"


@pytest.mark.parametrize("name", SPEC)
def test_rates_and_decays_of_every_parameter(name):
    e, model = EXPERIMENTS[name], built(name)
    groups = param_groups(model, e.optimizer.lr, e.optimizer.weight_decay)
    got = {n: (group["lr"], group["weight_decay"]) for group in groups for n in group["names"]}
    assert set(got) == {n for n, p in model.named_parameters() if p.requires_grad}
    expected = expected_groups(e)
    for n, options in got.items():
        assert options == expected[kind_of(n)], (n, options)
    frozen = {"A": ("A_real", "A_imag", "P"), "B": ("B",), "dt": ("inv_dt",), "C": ("C",)}
    for kind, (lr, _) in expected.items():
        if lr is None:  # frozen: a buffer of the same name
            buffers = [n.rsplit(".", 1)[-1] for n, _ in model.named_buffers()]
            assert all(end in buffers for end in frozen[kind]) and not any(kind_of(n) == kind for n in got)
    wanted = {"dt", "C", "D", "encoder", "decoder"} | ({"linear", "bias"} if e.model.layer.final_act else set())
    assert wanted <= {kind_of(n) for n in got}


def test_rates_and_decays_of_the_others():
    keys = {"inv_dt": "dt", "A_real": "A", "A_imag": "A", "P": "A", "A": "A", "B": "B", "C": "C"}
    for name in (*OTHERS, *(e.name for e in FAMILIES["ours"])):
        e, lssl = EXPERIMENTS[name], name.endswith("-lssl")
        stated = {"dt": 1e-4, "A": 1e-4, "B": 1e-4, "C": None} if lssl else getattr(e.model.layer, "lr", {})
        for group in param_groups(built(name), e.optimizer.lr, e.optimizer.weight_decay):
            for n in group["names"]:
                end = n.rsplit(".", 1)[-1]
                rate = stated[keys[end]] if ".kernel." in n else None
                assert group["lr"] == (rate or e.optimizer.lr), (name, n)
                plain = end == "bias" or ".norm." in n or ".bn" in n or ".kernel." in n and end != "C"
                if plain and not n.startswith(("encoder", "decoder")):
                    assert group["weight_decay"] == 0.0, (name, n)


def n_parameters(name):
    "By the formula of the specification: sizes of the layers, and what stands around them."
    e, spec = EXPERIMENTS[name], SPEC[name]
    facts, L, H, n = facts_of(e), int(spec["L"]), int(spec["H"]), int(spec["N"]) // 2
    S = H if spec["S"] == "H" else int(spec["S"])
    C, R = 2 if spec["bi"] == "yes" else 1, 2 if name == "copying" else 1
    dt, A, B, _ = (rate != "F" for rate in SPEC[name]["lr_ssm"].split("/"))
    diagonal = name.startswith("cifar-s4d")
    ssm = H * dt + 2 * C * H * n + S * n * (2 * A + 2 * B + 2 * R * (A and not diagonal))
    mix = {"glu": 2 * H * H + 2 * H, "id": H * H + H, "none": 0}[spec["act"]]
    norm = 0 if spec["norm"].startswith("none") else 2 * H
    final = norm if spec["norm"].endswith("pre") else 0
    encoder = facts.n_tokens * H if facts.n_tokens else (facts.d_input + 1) * H
    decoder = (4 * H * H + H) + (2 * H + 2) if facts.pairs else (H + 1) * facts.d_output
    return L * (ssm + H + mix + norm) + final + encoder + decoder


@pytest.mark.parametrize("name", SPEC)
def test_number_of_parameters_by_formula(name):
    model = built(name)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert sum(p.numel() for p in model.parameters()) == n_parameters(name)


def count(e, model):
    facts = facts_of(e)
    with torch.device("meta"):
        return sum(p.numel() for p in model.build(facts).parameters())


def test_published_numbers_of_parameters():
    e = EXPERIMENTS["lra-cifar"]
    large = replace(e.model, layer=S4Layer(n_ssm=None, bidirectional=True))
    assert round(count(e, large) / 1e6, 2) == 4.15
    assert round(count(e, replace(large, layer=S4DLayer(n_ssm=None, bidirectional=True))) / 1e6, 2) == 3.96
    assert round(count(e, replace(large, n_layers=4, d_model=128)) / 1e3, -1) == 300
    assert round(n_parameters("sc35") / 1e6, 1) == 0.3 and round(n_parameters("cifar-s4d") / 1e3) == 201


def test_number_of_parameters_of_the_hippo_rnn():
    for name, H in (("pmnist-hippo", 256), ("pmnist-hippo-paper", 512)):
        maps = (H + H) + 1 + 2 * ((H + H) * H + H)  # x, h → u; x, m → h; x, m → gate
        assert sum(p.numel() for p in built(name).parameters()) == 2 * H + maps + (H + 1) * 10


def test_published_accuracies():
    legs = (59.60, 86.82, 90.90, 88.65, 94.20, 96.35)
    target = (59.5, 86.5, 91.0, 88.5, 94.0, 96.0)
    first = (58.35, 76.02, 87.09, 87.26, 86.05, 88.10)
    s4d = {"S4D-LegS": (60.47, 86.18, 89.46, 88.19, 93.06, 91.95), "S4D-Inv": (60.18, 87.34, 91.09, 87.83, 93.78, 92.80),
           "S4D-Lin": (60.52, 86.97, 90.96, 87.93, 93.96, None)}
    for i, task in enumerate(("listops", "imdb", "aan", "cifar", "pathfinder", "pathx")):
        now, v3, v1 = (EXPERIMENTS[f"lra-{task}{end}"].published for end in ("", "-v3", "-v1"))
        assert now["S4-LegS, How to Train Your HiPPO"] == v3["S4-LegS, How to Train Your HiPPO"] == legs[i]
        assert now["the reference's target for this configuration"] == target[i] and len(v3) == len(now) - 1
        assert list(v1.values()) == [first[i]]
        for kind, figures in s4d.items():
            found = [percent for source, percent in now.items() if source.startswith(kind)]
            assert found == ([figures[i]] if figures[i] else []) and all("s4d" in s for s in now if s.startswith(kind))
    value = lambda name, word: next(v for k, v in EXPERIMENTS[name].published.items() if word in k)
    assert [value("cifar", w) for w in ("annotated", "S4 paper", "HiPPO", "S4D-Lin", "S4D-Inv")] == [91.23, 91.13, 91.80, 90.42, 90.69]
    assert [value("sc35", w) for w in ("HiPPO", "target", "S4D-Lin", "S4D-Inv")] == [96.08, 96.5, 96.25, 96.18]
    assert (value("sc35-convnet", "ConvNet"), value("sc10", "S4"), value("sc10-mfcc", "S4")) == (95.51, 98.32, 93.96)
    assert (value("cifar-v1", "S4"), value("sc10-v1", "S4")) == (91.13, 98.32)
    assert (value("mnist", "S4 paper"), value("mnist", "annotated"), value("pmnist", "S4")) == (99.63, 99.55, 98.70)
    assert [value("pmnist-hippo-paper", w) for w in ("LegS", "LagT", "LegT", "LMU")] == [98.3, 98.15, 98.0, 97.08]
    assert [value(f"{n}-lssl", w) for n in ("mnist", "pmnist") for w in ("LSSL paper", "fixed")] == [99.53, 99.50, 98.76, 98.60]
    assert not any(e.published for e in FAMILIES["ours"] + FAMILIES["synthetic tasks"])


def test_ours_say_so_and_the_demo_is_what_it_was():
    demo, *others = FAMILIES["ours"]
    wide = {e.name for e in others if e.model.d_model > 64}
    assert all(e.about.startswith("ours: ") for e in others)
    assert wide == {"cifar-short"} | {e.name for e in others if e.about.endswith("minutes of a GPU")} and len(wide) == 4
    assert demo.dataset.bucket == 20 and demo.model.layer.wd == dict.fromkeys(("dt", "A", "B", "C"), 0.0)
    t = demo.trainer
    assert (t.max_epochs, t.limit_train_batches, t.max_time, t.threads) == (8, 300, "00:00:04:00", 2)
    steps = EXPERIMENTS["digits-next"], EXPERIMENTS["spoken-digits-next"]
    assert all(e.model.decoder == "all" and e.train.monitor == "val/loss" and not e.model.layer.bidirectional for e in steps)


def test_rows_do_not_share_what_can_be_changed():
    seen = {}
    for e in EXPERIMENTS.values():
        for owner in (e, e.dataset, e.model, e.model.layer, e.optimizer):
            for value in vars(owner).values() if owner else ():
                if isinstance(value, (list, dict)):
                    assert seen.setdefault(id(value), e.name) == e.name
    assert data("cifar", 7).batch_size == 7 and data("cifar", 7).rates is not data("cifar", 7).rates


def test_the_helpers_and_the_rendered_table():
    e = row("a", "b", data("digits", 5), stack(2, 8, S4Layer(16), "layer/post", 0.3, "last"), configs.AdamW(), configs.Constant(), 3)
    assert (e.seed, e.published, e.trainer.max_epochs, e.train.monitor) == (0, {}, 3, "val/accuracy")
    assert e.model == SequenceBackbone(S4Layer(16), 8, 2, "layer", False, dropout=0.3, decoder="last")
    table = rows([e, EXPERIMENTS["lra-pathx-resnet"]], {"experiment": "name", "N": "model.layer.d_state", "decay": "optimizer.weight_decay"})
    assert table == [("experiment", "N", "decay"), ("a", "16", "0"), ("lra-pathx-resnet", "–", "0")]
    assert markdown(table).splitlines()[:3] == ["| experiment | N | decay |", "|---|---|---|", "| a | 16 | 0 |"]
    assert [shown(x) for x in (True, False, None, 1e-3, [1, 2], {"a": None, "b": 0.5})] == ["yes", "no", "null", "0.001", "[1, 2]", "null / 0.5"]
    assert all(len(cells) == len(notation.COLUMNS) for cells in rows(EXPERIMENTS.values()))
    with pytest.raises(ValueError, match="model.norm"):
        stack(1, 8, S4Layer(), "bath/pre")
    with pytest.raises(TypeError, match="no_such"):
        data("cifar", 5, no_such=1)
    assert math.isclose(EXPERIMENTS["copying"].model.layer.dt_min, 4 / 1024)
