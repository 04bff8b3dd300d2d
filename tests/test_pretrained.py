"""Saved weights: every experiment and every layer comes back as it was; what cannot be read is one clear line."""
import copy
import dataclasses
import json
import sys

import pytest
import torch

from s4nb.training.architectures import Facts
from s4nb.training.configs import GROUPS
from s4nb.training.experiments import choices_of, compose
from s4nb.training.pretrained import (experiment_of, from_pretrained, plain, read_saved, save_pretrained, start_from,
                                      weights_file)
from s4nb.training.tables import EXPERIMENTS

TOKENS = Facts("classification", 7, None, 3, 32)
SIGNAL = Facts("classification", None, 1, 3, 1024)
LAYERS = [name for name in GROUPS["model/layer"] if name != "custom"]


def small(*overrides):
    "A small experiment, one block of eight features."
    return compose(["experiment=listops-mini", "model.d_model=8", "model.n_layers=1", *overrides])


def built(e, facts=TOKENS):
    "A model whose parameters are not those of a new one, with the kernels of facts' length."
    model = e.model.build(facts)
    for kernel in [m for m in model.modules() if hasattr(m, "set_length")]: kernel.set_length(facts.l_max)
    return model.train()


def probe(facts, l=None):
    torch.manual_seed(1)
    l = l or facts.l_max
    return torch.randint(0, facts.n_tokens, (3, l)) if facts.n_tokens else torch.randn(3, l, facts.d_input)


def refusal(call, text):
    with pytest.raises(ValueError) as error: call()
    assert text in str(error.value) and "\n" not in str(error.value), error.value


# ---- experiments as plain values -------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_goes_through_json_and_back(name):
    e = EXPERIMENTS[name]
    back = experiment_of(json.loads(json.dumps(plain(e))))
    assert back == e and choices_of(back) == choices_of(e)


@pytest.mark.parametrize("group,choice", [(g, c) for g, options in GROUPS.items() for c in options])
def test_every_choice_goes_through_json_and_back(group, choice):
    e = copy.deepcopy(EXPERIMENTS["listops-mini"])
    *path, last = group.split("/")
    owner = e
    for key in path: owner = getattr(owner, key)
    setattr(owner, last, copy.deepcopy(GROUPS[group][choice]))
    if group == "model" and e.model.layer is not None: e.model.layer = copy.deepcopy(GROUPS["model/layer"]["s4d"])
    back = experiment_of(json.loads(json.dumps(plain(e))))
    assert back == e and type(getattr(back, group.split("/")[0])) is type(getattr(e, group.split("/")[0]))


def test_nothing_is_shared_with_the_table():
    back = experiment_of(plain(EXPERIMENTS["listops-mini"]))
    back.model.layer.lr["dt"] = 7.0
    back.published["x"] = 1.0
    assert GROUPS["model/layer"]["s4"].lr["dt"] != 7.0 and "x" not in EXPERIMENTS["listops-mini"].published


def test_a_field_that_a_file_lacks_is_that_of_the_choice():
    values = plain(EXPERIMENTS["listops-mini"])
    del values["values"]["model"]["dropout"], values["values"]["wandb"]
    assert experiment_of(values) == EXPERIMENTS["listops-mini"]


def test_a_newer_version_is_refused():
    for change, text in ((lambda v: v["values"]["model"]["layer"].update(gate_bias=1.0), "model/layer has 'gate_bias'"),
                         (lambda v: v["values"].update(budget=3), "the experiment has 'budget'"),
                         (lambda v: v["choices"].update(optimizer="adamx"), "did you mean 'adam'"),
                         (lambda v: v["values"]["dataset"].update(shuffling=1), "written by s4nb 9.9")):
        values = copy.deepcopy(plain(EXPERIMENTS["listops-mini"])) | {"version": "9.9"}
        change(values)
        refusal(lambda: experiment_of(values), text)


# ---- folders ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("choices,facts", [
    *[((f"model/layer={layer}",), TOKENS) for layer in LAYERS],
    (("model/layer=s4d", "model.position=learned", "model.ff=2", "model.norm=layer"), TOKENS),
    (("model/layer=rnn", "model.layer.cell=random", "model.decoder=state"), TOKENS),
    (("model=sashimi", "model/layer=s4d", "model.n_layers=1"), dataclasses.replace(TOKENS, l_max=64)),
    (("model=unet", "model/layer=s4"), dataclasses.replace(TOKENS, l_max=64)),
    (("model/layer=s4",), dataclasses.replace(TOKENS, pairs=True)),
    (("model/layer=s4", "model.decoder=all"), dataclasses.replace(SIGNAL, kind="regression", l_max=32, l_output=32)),
    (("model=resnet",), SIGNAL), (("model=wavegan", "model.channels=2"), SIGNAL)])
def test_every_model_comes_back_as_it_was(choices, facts, tmp_path):
    overrides = [c for c in choices if not c.startswith("model=")]
    if choices[0] in ("model=resnet", "model=wavegan"):
        e = compose(["experiment=listops-mini", *choices])
    else:
        e = small(*choices[:1], *[o for o in overrides if o not in choices[:1]])
    torch.manual_seed(0)
    model, x = built(e, facts), probe(facts, facts.l_max * (1 + facts.pairs) if not facts.pairs else facts.l_max)
    x = torch.cat([x, x.flip(1)]) if facts.pairs else x
    model(x)  # batch norms take statistics
    with torch.no_grad():
        for p in model.parameters(): p += 0.01 * torch.randn_like(p)
    folder = save_pretrained(tmp_path / "saved", model, e, facts)
    torch.manual_seed(1234)
    state = torch.get_rng_state()
    back = from_pretrained(folder)
    assert torch.equal(torch.get_rng_state(), state) and not back.training
    model.eval()
    with torch.no_grad():
        assert torch.equal(back(x), model(x))
        assert {k: v.dtype for k, v in back.state_dict().items()} == {k: v.dtype for k, v in model.state_dict().items()}


def test_both_files_are_plain(tmp_path):
    from safetensors.torch import load_file
    e = small("output_dir=/somewhere/here", "wandb=me", "train.resume=auto", "dataset.data_dir=/mine")
    model = built(e)
    card = {"state": "measured", "test_accuracy": 0.5, "device": "mine", "result": {"test/accuracy": 0.5}}
    save_pretrained(tmp_path / "saved", model, e, TOKENS, card)
    assert sorted(p.name for p in (tmp_path / "saved").iterdir()) == ["config.json", "model.safetensors"]
    text = (tmp_path / "saved" / "config.json").read_text()
    values = json.loads(text)
    assert values["name"] == "listops-mini" and values["ours"] == {k: card[k] for k in ("state", "test_accuracy", "result")}
    assert values["facts"] == dataclasses.asdict(TOKENS) and "/somewhere" not in text and "/mine" not in text
    e.output_dir = e.wandb = e.dataset.data_dir = None
    e.train.resume = "never"
    assert experiment_of(values["experiment"]) == e
    tensors = load_file(tmp_path / "saved" / "model.safetensors")
    assert tensors.keys() == model.state_dict().keys()


def test_double_stays_double(tmp_path):
    e = small()
    model = built(e).double().eval()
    back = from_pretrained(save_pretrained(tmp_path / "saved", model, e, TOKENS))
    x = probe(TOKENS)
    assert back(x).dtype == torch.float64 and torch.equal(back(x), model(x))


def test_a_folder_is_whole_or_absent(tmp_path, monkeypatch):
    e, target = small(), tmp_path / "saved"

    def full(tensors, path, metadata=None):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(sys.modules["safetensors.torch"], "save_file", full)
        with pytest.raises(OSError, match="No space left"): save_pretrained(target, built(e), e, TOKENS)
    assert list(tmp_path.iterdir()) == []
    save_pretrained(target, built(e), e, TOKENS)
    refusal(lambda: save_pretrained(target, built(e), e, TOKENS), "not an empty folder")
    assert [p.name for p in tmp_path.iterdir()] == ["saved"]


# ---- other lengths ---------------------------------------------------------------------------------------------------
def test_another_length(tmp_path):
    "The same numbers at any length: as it is (the kernel doubles its length), and prepared for the new one."
    torch.manual_seed(0)
    e = small("model.layer.d_state=16")
    model = built(e).double().eval()
    folder = save_pretrained(tmp_path / "saved", model, e, TOKENS)
    for l in (5, 32, 33, 200):
        x = probe(TOKENS, l)
        prepared = from_pretrained(folder, l_max=l)
        assert {int(m.l_kernel) for m in prepared.modules() if hasattr(m, "set_length")} == {l}
        assert torch.equal(from_pretrained(folder)(x), model(x))
        assert (prepared(x) - model(x)).abs().max() < 1e-9  # float64, C folded anew


def test_learned_positions_have_a_length(tmp_path):
    e = small("model.position=learned")
    folder = save_pretrained(tmp_path / "saved", built(e), e, TOKENS)
    assert from_pretrained(folder)(probe(TOKENS, 20)).shape == (3, 3)
    refusal(lambda: from_pretrained(folder, l_max=64), "leave l_max out")


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_no_tensor_has_a_length_in_its_shape(name):
    e, shapes = EXPERIMENTS[name], []
    if getattr(e.model, "position", None) == "learned": pytest.skip("learned positions are a table")
    for l in (1024, 4096):
        with torch.device("meta"):
            model = e.model.build(Facts("classification", None, 1, 3, l, l if getattr(e.model, "decoder", "") == "all" else None))
        shapes.append({k: v.shape for k, v in model.state_dict().items()})
    assert shapes[0] == shapes[1]


# ---- checkpoints and runs --------------------------------------------------------------------------------------------
def checkpoint(path, e, model, facts=TOKENS, **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {f"model.{k}": v for k, v in model.state_dict().items()} | {"meters.val/loss.mean_value": torch.zeros(())}
    torch.save({"state_dict": state, "s4nb": {"experiment": plain(e), "facts": dataclasses.asdict(facts)}, "epoch": 3,
                "optimizer_states": [{}], **more}, path)
    return path


def test_a_checkpoint_and_the_folder_of_a_run(tmp_path):
    e = small()
    first, second, run = built(e).eval(), built(e).eval(), tmp_path / "run"
    x = probe(TOKENS)
    checkpoint(run / "checkpoints" / "last.ckpt", e, first)
    assert torch.equal(from_pretrained(run)(x), first(x)) and weights_file(run).name == "last.ckpt"
    best = checkpoint(run / "checkpoints" / "best.ckpt", e, second)
    for path in (run, best, str(best), best.parent): assert torch.equal(from_pretrained(path)(x), second(x))
    assert not torch.equal(first(x), second(x))
    compiled = checkpoint(tmp_path / "compiled.ckpt", e, second)
    content = torch.load(compiled, weights_only=True)
    content["state_dict"] = {k.replace("model.", "model._orig_mod.", 1): v for k, v in content["state_dict"].items()}
    torch.save(content, compiled)
    assert torch.equal(from_pretrained(compiled)(x), second(x))


def test_what_cannot_be_read_is_one_line(tmp_path):
    e = small()
    model = built(e)
    saved = save_pretrained(tmp_path / "saved", model, e, TOKENS)
    refusal(lambda: from_pretrained(tmp_path / "none"), "is not there")
    refusal(lambda: from_pretrained(tmp_path), "holds no model.safetensors, best.ckpt or last.ckpt")

    def damaged(name, content, text, folder="saved"):
        path = tmp_path / folder / name
        whole = path.read_bytes()
        path.write_bytes(content if isinstance(content, bytes) else content(whole))
        refusal(lambda: from_pretrained(saved), text)
        path.write_bytes(whole)

    def edited(change):
        def edit(whole):
            values = json.loads(whole)
            change(values)
            return json.dumps(values).encode()
        return edit

    damaged("model.safetensors", lambda whole: whole[:1000], "is damaged")
    damaged("model.safetensors", b"", "is damaged")
    damaged("config.json", b"{", "no json")
    damaged("config.json", b"[]", "not written by save_pretrained")
    damaged("config.json", b"\xff\xfe\x00", "no json")
    damaged("config.json", edited(lambda v: v.pop("facts")), "not written by save_pretrained")
    damaged("config.json", edited(lambda v: v["facts"].update(depth=3)), "facts has 'depth'")
    damaged("config.json", edited(lambda v: v["experiment"]["values"]["model"].update(gate=1)), "model has 'gate'")
    damaged("config.json", edited(lambda v: v["experiment"]["values"]["model"].update(d_model=16)), "encoder.weight is (7, 16)")
    damaged("config.json", edited(lambda v: v["experiment"]["values"]["model"].update(n_layers=2)), "which the model needs")
    damaged("config.json", edited(lambda v: v["experiment"]["values"]["model"].update(norm="none")), "which the model has not")
    damaged("config.json", edited(lambda v: v["experiment"]["values"]["model"].update(norm="bath")), "did you mean 'batch'")
    damaged("config.json", edited(lambda v: v["experiment"].pop("choices")), "no choices")
    (saved / "config.json").unlink()
    refusal(lambda: from_pretrained(saved), "both files")
    for name, content in (("empty.ckpt", b""), ("noise.ckpt", b"\x80\x02noise"), ("half.ckpt", None), ("text.ckpt", b"hello\nworld")):
        path = tmp_path / name
        path.write_bytes(checkpoint(tmp_path / "whole.ckpt", e, model).read_bytes()[:5000] if content is None else content)
        refusal(lambda: read_saved(path), "cannot be read as a checkpoint")
    torch.save({"state_dict": {}, "hyper_parameters": {}}, tmp_path / "foreign.ckpt")
    refusal(lambda: from_pretrained(tmp_path / "foreign.ckpt"), "s4nb convert")
    torch.save([1, 2], tmp_path / "list.pt")
    refusal(lambda: from_pretrained(tmp_path / "list.pt"), "no checkpoint of `s4nb train`")


def test_nothing_in_a_checkpoint_is_run(tmp_path):
    "A pickle that would make a file when loaded is refused, and makes none."
    import os

    class Trap:
        def __reduce__(self): return os.mkdir, (str(tmp_path / "trapped"),)
    e = small()
    path = checkpoint(tmp_path / "trap.ckpt", e, built(e), hidden=Trap())
    refusal(lambda: from_pretrained(path), "cannot be read as a checkpoint")
    assert not (tmp_path / "trapped").exists()


# ---- a layer of one's own --------------------------------------------------------------------------------------------
def test_a_layer_of_ones_own_comes_back_by_its_import_path(tmp_path, monkeypatch):
    (tmp_path / "my_layers.py").write_text(
        "from s4nb import S4D\n\n\nclass Mine(S4D):\n    def __init__(self, d_model, size=4):\n"
        "        super().__init__(d_model, d_state=size)\n")
    monkeypatch.syspath_prepend(tmp_path)
    e = small("model/layer=custom", "model.layer.target=my_layers.Mine", "+model.layer.arguments.size=6")
    model = built(e).eval()
    folder = save_pretrained(tmp_path / "saved", model, e, TOKENS)
    back, x = from_pretrained(folder), probe(TOKENS)
    assert torch.equal(back(x), model(x)) and back.backbone.layers[0].layer.kernel.d_state == 6
    monkeypatch.undo()
    del sys.modules["my_layers"]
    refusal(lambda: from_pretrained(folder), "model.layer.target=my_layers.Mine cannot be imported")


# ---- starting from other weights -------------------------------------------------------------------------------------
def test_start_from_the_same_task_and_another(tmp_path):
    torch.manual_seed(0)
    e, x = small(), probe(TOKENS)
    model = built(e).eval()
    folder = save_pretrained(tmp_path / "saved", model, e, TOKENS)
    same = built(e).eval()
    assert start_from(same, folder).endswith("all weights") and torch.equal(same(x), model(x))
    other = built(e, dataclasses.replace(TOKENS, d_output=5, l_max=100)).eval()
    head = other.decoder.linear.weight.clone()
    said = start_from(other, folder)
    assert "decoder, which is new" in said and "(5, 8)" in said and "(3, 8)" in said and "\n" not in said
    assert torch.equal(other.decoder.linear.weight, head)
    assert {int(m.l_kernel) for m in other.modules() if hasattr(m, "set_length")} == {100}
    a, b = (m.backbone(m.encoder(x))[0] for m in (model, other))
    assert (a - b).abs().max() < 1e-5  # float32, kernels folded for another length


def test_start_from_refuses_another_backbone_or_encoder(tmp_path):
    e = small()
    folder = save_pretrained(tmp_path / "saved", built(e), e, TOKENS)
    refusal(lambda: start_from(built(small("model.d_model=16")), folder), "only the decoder may differ")
    refusal(lambda: start_from(built(e, dataclasses.replace(TOKENS, n_tokens=9)), folder), "encoder.weight is (9, 8)")
    refusal(lambda: start_from(built(small("model.n_layers=2")), folder), "which the model needs")
    refusal(lambda: start_from(built(e), tmp_path / "none"), "is not there")


