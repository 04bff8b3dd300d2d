"""HiPPO-RNN cells against numbers of the reference and of hippo-code, and what every sequence model promises."""
import copy
import subprocess
import sys
import warnings

import pytest
import torch
from s4nb.models.check import check_model
from s4nb.models.memory_rnn import (GLagTCell, LagTCell, LegSCell, LegSTCell, LegTCell, LegTSCell, LMUCell, LMUTCell,
                                    MemoryCell, RandomCell, ScaledMemory, SlidingMemory, TimestampLegSCell, TimestampLegTCell, scaled_chunk)
from s4nb.models.rnn import RNN

from test_parity import cases

CELLS = {"legs": LegSCell, "legt": LegTCell, "lagt": LagTCell, "glagt": GLagTCell, "lmu": LMUCell, "lmut": LMUTCell,
         "legts": LegTSCell, "legst": LegSTCell, "tlsi": TimestampLegSCell, "tlti": TimestampLegTCell, "random": RandomCell}


def build(file, name, params, d_input, d_model):
    "Our cell for a case of the vectors: the reference's arguments in our words."
    given = {k: v for k, v in params.items() if k not in ("d_input", "d_model", "max_length")}
    if "max_length" in params: given["l_max"] = params["max_length"]
    if name == "lmu": given |= {"gate": "G"} if file == "e_hippocode_cells" else {"um": False}
    if file == "e_hippocode_cells" and name == "legt": given["dt"] *= 2        # its window has length 1
    if name == "legts": given["lower_solve"] = True
    return RNN(CELLS[name](d_input, d_model, **given)).double()


def memory_cases(vectors, file):
    "case, our model with the case's parameters, arrays, the case's state dict."
    for case, (params, arrays, weights) in cases(vectors, file).items():
        name = case.split("_")[0]
        if name not in CELLS: continue
        model = build(file, name, params, arrays["x"].shape[-1], arrays["y"].shape[-1])
        computed = {k for k in weights if k in ("A", "B") or k.startswith("transition.")}
        model.cell.load_state_dict({k.replace("W_uxh.0.", "W_uxh."): v for k, v in weights.items() if k not in computed})
        yield case, model, arrays, weights


@pytest.mark.parametrize("file, count", [("e_cells", 11), ("e_hippocode_cells", 8)])
def test_parity(vectors, file, count):
    checked = 0
    for case, model, arrays, _ in memory_cases(vectors, file):
        y, (h, m, *_) = model(arrays["x"].double())
        assert (y - arrays["y"]).abs().max() < 1e-6, case
        assert (m - arrays["m_final"]).abs().max() < 1e-6, case
        checked += 1
    assert checked == count


@pytest.mark.parametrize("file", ["e_cells", "e_hippocode_cells"])
def test_matrices_are_the_reference_s(vectors, file):
    for case, model, _, weights in memory_cases(vectors, file):
        if "A" not in weights: continue
        memory, A, B = model.cell.memory, weights["A"].double(), weights["B"].double()[..., 0]
        if A.ndim == 2: ours = [X[None] for X in memory.matrices(torch.float64)]
        else: ours = [torch.stack(X) for X in zip(*[memory.at(t, A) for t in range(1, len(A) + 1)])]
        for X, Y in zip(ours, (A, B)): assert (X - Y).abs().max() < 1e-7 * Y.abs().max(), case


class Clocked(RNN):
    "A timestamp cell whose first input channel is any number, made a time that grows: for random inputs."
    def forward(self, u, state=None, **given):
        gaps = torch.nn.functional.softplus(u[..., :1]).nan_to_num()
        last, inner = self.default_state(len(u), device=u.device) if state is None else state
        times = last[:, None] + gaps.cumsum(1)
        y, new = super().forward(torch.cat([times, u[..., 1:]], -1), inner, **given)
        return y, None if new is None else (new[2][:, None], new)

    def step(self, u, state):
        y, state = self.forward(u[:, None], state)
        return y[:, 0], state

    def default_state(self, *batch, device=None):
        inner = super().default_state(*batch, device=device)
        return inner[2][..., None], inner


@pytest.mark.parametrize("name", CELLS)
def test_promises(name):
    model = RNN(CELLS[name](3, 6, 5))
    found = check_model(model, compile=name in ("legt", "legs"))
    assert set(found.values()) == {"yes"}
    if name in ("tlsi", "tlti"):
        clocked = Clocked(CELLS[name](3, 6, 5))
        assert set(check_model(clocked).values()) == {"yes"}


@pytest.mark.parametrize("given", [dict(memory_size=2, gate="UR", hh=True, um=True), dict(gate=None, bias=False),
                                   dict(activation="modrelu", memory_activation="tanh"), dict(init_t=1, l_max=7)])
def test_promises_of_variants(given):
    assert set(check_model(RNN(LegSCell(3, 6, 5, **given))).values()) == {"yes"}


def test_rows_of_different_age_go_on():
    "Prompts of different lengths, then more input: each row as if it were alone."
    model, u = RNN(LegSCell(2, 5, 6)).double(), torch.randn(4, 30, 2, dtype=torch.float64)
    lengths = torch.tensor([3, 10, 3, 0])
    _, state = model(u[:, :10], lengths=lengths)
    assert state[2].tolist() == lengths.tolist()
    y, _ = model(u[:, 10:], state)
    for i, l in enumerate(lengths):
        alone, _ = model(torch.cat([u[i, :l], u[i, 10:]])[None])
        assert (y[i] - alone[0, l:]).abs().max() < 1e-12


def test_no_longest_sequence():
    "A constant stays (1, 0, …) for ever, at a time far beyond any table."
    memory, m = ScaledMemory("legs", 8), torch.eye(8, dtype=torch.float64)[:1, None]
    new, (t,) = memory.write(m, torch.ones(1, 1).double(), (torch.tensor([10 ** 7]),), None)
    assert (new - m).abs().max() < 1e-12 and t.item() == 10 ** 7 + 1


def test_tables_made_for_inference_serve_training():
    scaled_chunk.cache_clear()
    model, u = RNN(LegSCell(2, 4, 5)), torch.randn(1, 4, 2)
    with torch.inference_mode(): model(u)
    model(u)[0].sum().backward()
    assert model.cell.W_uxh.weight.grad.any()


def test_tables_are_bounded_and_shared():
    scaled_chunk.cache_clear()
    a, b = RNN(LegSCell(2, 4, 5)), RNN(LegSCell(2, 7, 5))
    a(torch.randn(1, 6, 2)), b(torch.randn(1, 6, 2))
    assert scaled_chunk.cache_info().currsize == 1 and scaled_chunk.cache_info().maxsize == 16
    assert not list(a.buffers())


def test_double_restores_nothing_lost():
    "The matrices of a sliding memory are float64 until the model itself is cast."
    model = RNN(LegTCell(2, 4, 6))
    exact = SlidingMemory("legt", 6, 0.01).A
    assert torch.equal(copy.deepcopy(model).double().cell.memory.A, exact)
    assert model.cell.weights()[3].dtype == torch.float32


def test_random_matrices_are_saved():
    torch.manual_seed(0)
    a, b, u = RNN(RandomCell(2, 4, 5)), RNN(RandomCell(2, 4, 5)), torch.randn(2, 9, 2)
    assert not torch.equal(a.cell.memory.A, b.cell.memory.A)
    b.load_state_dict(a.state_dict())
    assert torch.equal(a(u)[0], b(u)[0])


def test_sizes_of_the_reference():
    "The numbers of parameters of the reference's cells at 3 → 16."
    for kind in (LegSCell, LegTCell, LagTCell, RandomCell):
        assert sum(p.numel() for p in kind(3, 16).parameters()) == 660
    assert sum(p.numel() for p in LMUCell(3, 16, um=False).parameters()) == 579


def test_refusals():
    with pytest.raises(ValueError, match="memory_size"): LegSCell(2, 4, memory_siz=2)
    with pytest.raises(ValueError, match="measure"): ScaledMemory("fout", 4)
    with pytest.raises(ValueError, match="bilinear"): LegTSCell(2, 4, discretization="zoh", lower_solve=True)
    with pytest.raises(ValueError, match="init_t"): LegSCell(2, 4, init_t=-1)
    with pytest.raises(ValueError, match="dt"): LegTCell(2, 4, dt=-1.0)
    with pytest.raises(ValueError, match="time stamp"): TimestampLegSCell(1, 4)
    with pytest.raises(ValueError, match="method"): MemoryCell(2, 4, SlidingMemory("legt", 4, 0.1, "exact"))
    with pytest.raises(ValueError, match="rate"): RNN(LegSCell(2, 4))(torch.zeros(1, 2, 2), rate=0.5)


def test_compiled_models_use_the_tables():
    "The matrices are looked up, not traced: no warning about the cache, one table."
    scaled_chunk.cache_clear()
    torch._dynamo.reset()
    model, u = RNN(LegSCell(2, 4, 5)), torch.randn(2, 12, 2)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*lru_cache.*")
        y, _ = torch.compile(model, backend="aot_eager")(u)
    assert torch.allclose(y, model(u)[0], atol=1e-6) and scaled_chunk.cache_info().misses == 1


def test_import_leaves_the_compiler_alone():
    code = "import sys, s4nb.models.memory_rnn, s4nb.models.scan_rnn; assert 'torch._dynamo' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_rows_of_different_lengths_share_their_matrices():
    "All rows run on to the end of the batch, so that each step looks up one time; the states are those at the lengths."
    model, u, looked_up = RNN(LegSCell(2, 5, 6)).double(), torch.randn(4, 12, 2, dtype=torch.float64), []
    at = model.cell.memory.at
    model.cell.memory.at = lambda t, m: looked_up.append(t) or at(t, m)
    _, (h, m, t) = model(u, lengths=torch.tensor([12, 3, 7, 0]))
    assert looked_up == list(range(12)) and t.tolist() == [12, 3, 7, 0]
    assert (h[1] - model(u[1:2, :3])[1][0]).abs().max() < 1e-12 and not m[3].any()
