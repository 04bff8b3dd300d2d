"""Chapter 3 against numbers produced by running the reference implementation (state-spaces/s4): folder S4NB_VECTORS."""
import json

import numpy as np
import pytest
import torch
from s4nb.interop import load_state_spaces
from s4nb.s4.block import S4Block
from s4nb.s4.initialization import InitOptions, initialize
from s4nb.s4.kernels import DiagKernel, DPLRKernel, SSMOptions
from s4nb.s4.nplr import nplr
from s4nb.ssm.layer import SSMLayer
from s4nb.ssm.lssl import DenseKernel


def cases(vectors, file):
    "name -> (description, arrays as tensors, without the parameters; parameters as a state dict)."
    about = json.loads((vectors / f"{file}.json").read_text())["cases"]
    data = np.load(vectors / f"{file}.npz", allow_pickle=False)
    found = {name: ({}, {}) for name in about}
    for key in data.files:
        name, rest = key.split("/", 1)
        arrays, params = found[name]
        value = torch.from_numpy(np.array(data[key]))
        for prefix in ("param/", "param2/"):
            if rest.startswith(prefix):
                params[rest[len(prefix):]] = value
                break
        else:
            arrays[rest] = value
    return {name: (about[name]["params"], *found[name]) for name in about}


def gap(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm().clamp(min=1e-300)).item()


# --- HiPPO in diagonal coordinates ---------------------------------------------------------------------------------------------------

def test_nplr(vectors):
    for name, (p, a, _) in cases(vectors, "a_hippo").items():
        if not name.startswith("nplr_"):
            continue
        Lambda, P, B, V = nplr(p["measure"], p["N"], p["rank"])
        loose = 3e-7 if "fourier" in p["measure"] else 1e-8            # the reference rounds Fourier's P to float32
        assert (Lambda - a["W"]).abs().max() < loose * a["W"].abs().max().clamp(min=1), name
        if p["measure"] == "fourier_diag":
            continue                                                   # its DC mode is wrong in the reference
        assert (P.abs() - a["absP"]).abs().max() < loose * max(1, a["absP"].max().item()), name
        assert (B.abs() - a["absB"]).abs().max() < loose * a["absB"].max(), name
        assert (P.conj() * B - a["BP"]).abs().max() < loose * max(1, a["BP"].abs().max().item()), name
        p_real = 2 * (P @ V.mT).real
        assert (2 * (V @ torch.diag(Lambda) @ V.mH).real - p_real.T @ p_real - a["A_rec"]).abs().max() < loose * a["A_rec"].abs().max(), name


def test_initialisations(vectors):
    checked = 0
    for name, (p, a, _) in cases(vectors, "a_hippo").items():
        group = name.startswith("combination_")
        if not group and not name.startswith("ssm_") or not a or p.get("random"):
            continue                                                   # other files' cases, errors of the reference, random draws
        if name.startswith("ssm_") and p["init"] == "diag":
            continue                                                   # a law there, a group here and in the reference's kernels
        extra = {k: v for k, v in p.items() if k in InitOptions.__dataclass_fields__}
        A, P, B, _ = initialize(p["N"], 4 if group else p["H"], InitOptions(**extra))
        assert gap(A, a["A"].view_as(A)) < 1e-6, name                  # made in float32 there
        assert gap(B.abs(), a["absB"].view_as(B)) < 1e-5, name
        assert group or not name.startswith(("ssm_legs", "ssm_dplr")) or gap(P.abs(), a["absP"]) < 1e-5, name
        checked += 1
    assert checked >= 20


# --- kernels -------------------------------------------------------------------------------------------------------------------------

def build(name, p):
    "The kernel that a case describes: dplr_… or diag_<disc>_…"
    options = {k: v for k, v in p.items() if k in SSMOptions.__dataclass_fields__}
    family, disc = name.split("_")[:2]
    if family == "diag":
        options.setdefault("disc", disc)
    return (DPLRKernel if family == "dplr" else DiagKernel)(p["d_model"], p["d_state"], p.get("channels", 1), **options)


def test_kernels(vectors):
    for name, (p, a, params) in cases(vectors, "d_kernels").items():
        kernel, kernel32 = build(name, p).double(), build(name, p)
        load_state_spaces(kernel, params)
        load_state_spaces(kernel32, params)
        for L in (16, 100, 1024):
            with torch.no_grad():
                K, K32 = kernel(L)[0], kernel32(L)[0]
            best = a.get(f"K_dense_L{L}", a[f"K_f64_L{L}"])
            dss = name.startswith("diag_dss")                          # float32 inside the reference
            assert gap(K, best) < (1e-6 if dss else 1e-8), (name, L, gap(K, best))
            theirs32 = gap(a[f"K_f32_L{L}"].double(), a[f"K_f64_L{L}"])
            assert gap(K32.double(), K) < max(2e-6, theirs32), (name, L, gap(K32.double(), K), theirs32)


def test_stored_length(vectors):
    "C_tilde, truncation and doubling of DPLR kernels."
    for name, (p, a, params) in cases(vectors, "d_kernels").items():
        if "K_trunc_f64" not in a:
            continue
        kernel = build(name, p).double()
        load_state_spaces(kernel, params)
        kernel.set_length(16)
        assert gap(torch.view_as_complex(kernel.C.detach()), a["Ctilde_f64_L16"]) < 1e-8, name
        with torch.no_grad():
            assert gap(kernel(1024)[0], a["K_doubling_f64"]) < 1e-8, name
            kernel.set_length(1024)
            assert gap(kernel(100)[0], a["K_trunc_f64"]) < 1e-8, name


def test_rates(vectors):
    "Compared with the exact kernel of dt * rate; the reference resamples approximately."
    for name, (p, a, params) in cases(vectors, "d_rate").items():
        for l_max in (0, p["l_max"]):
            kernel = build(name, p).double()
            load_state_spaces(kernel, params)
            if l_max and hasattr(kernel, "set_length"):
                kernel.set_length(l_max)
            for key, K in a.items():
                if key.startswith("K_dense_rate"):
                    with torch.no_grad():
                        ours = kernel(K.shape[-1], rate=float(key.removeprefix("K_dense_rate")))[0]
                    assert gap(ours, K) < 1e-8, (name, key, gap(ours, K))


def test_gradients(vectors):
    for name, (p, a, params) in cases(vectors, "d_grads").items():
        kernel = build(name, p).double()
        load_state_spaces(kernel, params)
        K = kernel(p["L"])[0]
        tolerance = 1e-6 if "dss" in name else 1e-8
        assert gap(K, a["K"]) < tolerance, name
        (K * a["G"]).sum().backward()
        for key, grad in a.items():
            if key.startswith("grad/"):
                ours = getattr(kernel, key[5:]).grad
                assert gap(ours, grad.view_as(ours)) < tolerance, (name, key, gap(ours, grad.view_as(ours)))


# --- layers --------------------------------------------------------------------------------------------------------------------------

def conv_layer(name, p, params):
    bidirectional = name.startswith("bidir")
    options = {k: p[k] for k in ("init", "rank", "disc", "n_ssm", "dt_tie", "is_real") if k in p}
    make = DPLRKernel if "dplr" in name else DiagKernel
    if make is DPLRKernel:
        options.pop("disc", None)
    kernel = make(params["D"].shape[-1], 2 * params["kernel.C"].shape[2] // (2 if p.get("is_real") else 1), p.get("channels", 1) * (2 if bidirectional else 1), **options)
    return SSMLayer(kernel, activation="gelu" if name.startswith("lmax_short") else None, final_act=None, bidirectional=bidirectional, l_max=p.get("l_max")).double()


@pytest.mark.filterwarnings("ignore:the kernel is cut")
def test_convolution_layer(vectors):
    for name, (p, a, params) in cases(vectors, "d_fftconv").items():
        if not a:
            continue                             # the reference raises
        layer = conv_layer(name, p, params)
        load_state_spaces(layer, params)
        if name.startswith("lmax_short"):
            a = {"x": a["x"].mT, "y": a["y"].mT}                       # stored (b l h)
        u = a["x"].mT.double()
        dss = p.get("disc") == "dss"
        with torch.no_grad():
            y, end = layer(u, return_state=not dss)
            assert gap(y.mT, a["y"]) < (1e-6 if dss else 1e-8), (name, gap(y.mT, a["y"]))
            if "state0" not in a:
                continue
            y, state = layer(u, a["state0"])
            assert gap(y.mT, a["y_state"]) < 1e-8, name
            assert gap(state, a["next_state"]) < 1e-8, name
            K_state = layer.kernel(u.shape[1], state=a["state0"])[1]
            # K_state of Fourier's nearly singular I - A^L: the reference itself is off by 1e-10
            assert gap(K_state, a["K_state"]) < 1e-8, name
            state, steps = layer.default_state(len(u)), []
            for u_l in u.unbind(1):
                y_l, state = layer.step(u_l, state)
                steps.append(y_l)
            key = next((k for k in ("y_steplinear", "y_step") if k in a), None)
            if key:
                assert gap(torch.stack(steps, -1), a[key]) < 1e-8, (name, key)


@pytest.mark.filterwarnings("ignore:the kernel is cut")
def test_blocks(vectors):
    checked = 0
    for name, (p, a, params) in cases(vectors, "e_s4block").items():
        if not params:
            continue                             # the reference raises
        options = {k: p[k] for k in ("mode", "init", "rank", "disc", "bidirectional", "activation", "final_act", "mult_act", "channels",
                                     "swap_channels", "l_max") if k in p}
        block = S4Block(p["d_model"], p["d_state"], **options).double().eval()
        load_state_spaces(block, params)
        turned = name.startswith("step_") or p.get("transposed") is False
        u = a["x"].double() if turned else a["x"].mT.double()
        with torch.no_grad():
            y = block(u)[0]
            assert gap(y if turned else y.mT, a["y"]) < 1e-8, name
            if "y_lengths" in a:
                y = block(u, lengths=a["lengths"])[0]
                theirs = a["y_lengths"] if turned else a["y_lengths"].mT
                for row, expected, n in zip(y, theirs, a["lengths"]):
                    assert gap(row[:n], expected[:n]) < 1e-8, name
            if "y_f32" in a:
                y32 = block.float()(u.float())[0]
                y32 = y32 if turned else y32.mT
                assert gap(y32.double(), a["y"]) < max(2e-6, gap(a["y_f32"].double(), a["y"])), name
        checked += 1
    assert checked >= 14


def test_minimal_s4d_and_dense_kernels(vectors):
    found = cases(vectors, "d_misc")
    _, a, params = found["s4d_kernel"]
    h, m = params["C"].shape[:2]
    kernel = DiagKernel(h, 2 * m, init="diag-lin").double()
    load_state_spaces(kernel, params)
    for L in (16, 100):
        assert gap(kernel(L)[0][0].detach(), a[f"K_L{L}"]) < 1e-8
    _, a, params = found["s4d_layer"]
    block = S4Block(params["D"].shape[-1], 2 * params["kernel.C"].shape[1], mode="diag", init="diag-lin").double()
    load_state_spaces(block, params)
    assert gap(block(a["x"].mT.double())[0].mT.detach(), a["y"]) < 1e-8
    for name in ("dense_legs", "dense_legt", "dense_fourier", "real_legs"):
        _, a, params = found[name]
        c, h, n = params["C"].shape[:3]
        kernel = DenseKernel(h, n, c).double()
        load_state_spaces(kernel, params)
        assert gap(kernel(a["K"].shape[-1])[0].detach(), a["K"]) < 1e-6, name          # float32 inside the reference
