"""`s4nb convert`: checkpoints with code in them, of both versions, of the example script; one line for what cannot be done."""
import io
import json
import os
import pickle
import zipfile

import pytest
import torch

from s4nb.convert import Inert, convert, inert_pickle, load_converted, main, plain, read, resolve, understand
from s4nb.interop import build_state_spaces, load_state_spaces
from s4nb.training.run import main as s4nb

MODEL = {"_name_": "model", "d_model": 4, "n_layers": 2, "prenorm": True, "residual": "R", "norm": "layer",
         "layer": {"_name_": "s4", "d_state": 4, "n_ssm": 1}}


class Bomb:
    def __init__(self, call, *args): self.call, self.args = call, args
    def __reduce__(self): return self.call, self.args


class BombState:
    "Calls through BUILD, SETITEMS and APPENDS rather than REDUCE alone."
    def __init__(self, fuse): self.fuse = fuse
    def __reduce__(self):
        touch = Bomb(os.system, f"touch {self.fuse}")
        return dict, (), {"state": touch}, iter([touch]), iter([("key", touch)])


def tiny(params=MODEL):
    torch.manual_seed(0)
    return build_state_spaces("seqmodel", {**params, "d_input": 2, "d_output": 3}).eval()


def theirs(model, enc="encoder.0", dec="decoder.0.output_transform"):
    "The state dict of the reference's training script for a model of S4 blocks, written out."
    found = {f"{enc}.weight": model.encoder.weight, f"{enc}.bias": model.encoder.bias,
             f"{dec}.weight": model.decoder.linear.weight, f"{dec}.bias": model.decoder.linear.bias,
             "model.norm.norm.weight": model.backbone.norm.weight, "model.norm.norm.bias": model.backbone.norm.bias}
    for i, block in enumerate(model.backbone.layers):
        layer, p = block.layer, f"model.layers.{i}"
        kernel = layer.kernel.state_dict()
        found |= {f"{p}.layer.layer.kernel.{k}": v[None] if k == "B" else v for k, v in kernel.items()}
        found |= {f"{p}.layer.layer.D": layer.D, f"{p}.layer.output_linear.0.weight": layer.mix[0].weight,
                  f"{p}.layer.output_linear.0.bias": layer.mix[0].bias,
                  f"{p}.norm.norm.weight": block.norm.weight, f"{p}.norm.norm.bias": block.norm.bias}
    return {k: v.detach() for k, v in found.items()}


def save(path, content):
    torch.save(content, path)
    return path


def same(converted, model):
    x = torch.randn(2, 17, 2)
    torch.testing.assert_close(load_converted(converted)(x), model(x), rtol=0, atol=0)


@pytest.mark.parametrize("legacy", [False, True])
def test_nothing_in_a_checkpoint_runs(tmp_path, legacy):
    fuse, model = tmp_path / "ran", tiny()
    touch = f"touch {fuse}"
    inner = pickle.dumps(Bomb(os.system, touch))
    bombs = [Bomb(os.system, touch), Bomb(eval, f"open({str(fuse)!r}, 'w')"), Bomb(torch.storage._load_from_bytes, inner),
             Bomb(pickle.loads, inner), Bomb(os.popen, touch), BombState(fuse)]
    content = {"state_dict": theirs(model), "hyper_parameters": {"model": MODEL, "decoder": {"_name_": "sequence", "mode": "pool"}},
               "callbacks": bombs}
    path = tmp_path / "bad.ckpt"
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    convert(path)
    assert not fuse.exists()
    same(tmp_path / "bad.s4nb.pt", model)
    torch.save(bombs[0], tmp_path / "lit.pt", _use_new_zipfile_serialization=not legacy)
    torch.load(tmp_path / "lit.pt", weights_only=False)
    assert fuse.exists()                         # what it protects from is real


def test_stand_ins_keep_what_they_get():
    found = inert_pickle.load(io.BytesIO(pickle.dumps([Bomb(os.system, "a"), BombState("b"), {1}, slice(1, 2)], 2)))
    assert isinstance(found[0], Inert) and found[0].args == ("a",) and type(found[0]).__name__ == "system"
    assert isinstance(found[1].state["state"], Inert) and len(found[1].items) == 2
    assert found[0]("again").args[0] is found[0]
    assert plain(found[0]) is None


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_program_is_not_opened(tmp_path):
    path = tmp_path / "script.pt"
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    with pytest.raises(ValueError, match="TorchScript"): read(path)
    (tmp_path / "text.pt").write_text("no checkpoint")
    with pytest.raises(ValueError, match="no checkpoint"): read(tmp_path / "text.pt")
    with zipfile.ZipFile(tmp_path / "zip.pt", "w") as z: z.writestr("a", "b")
    with pytest.raises(ValueError, match="no checkpoint"): read(tmp_path / "zip.pt")


def test_lightning_checkpoint_with_omegaconf(tmp_path):
    omegaconf = pytest.importorskip("omegaconf")
    config = {"model": {**MODEL, "d_model": "${size}", "dropout": 0.1}, "size": 4, "decoder": [{"_name_": "sequence", "mode": "pool"}],
              "optimizer": {"lr": 1e-3}}
    model = tiny()
    content = {"state_dict": theirs(model), "hyper_parameters": omegaconf.OmegaConf.create(config), "epoch": 3}
    report = convert(save(tmp_path / "last.ckpt", content))
    same(tmp_path / "last.s4nb.pt", model)
    assert "2 layer(s) of S4Block" in report and '"d_model": 4' in report and "ignored: nothing" in report
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last.ckpt", "last.s4nb.pt"]


def test_version_3(tmp_path):
    model, found = tiny(), {}
    for key, value in theirs(model).items():
        key = key.replace(".layer.layer.D", ".layer.D").replace(".layer.layer.kernel.", ".layer.kernel.kernel.")
        for new, old in (("inv_dt", "log_dt"), ("A_real", "inv_w_real"), ("A_imag", "w_imag")): key = key.replace(new, old)
        if key.endswith("log_dt"): value = value[:, 0]
        found[key] = -value if key.endswith("w_imag") else value
    layer = {"_name_": "s4", "d_state": 4, "n_ssm": 1, "measure": "legs", "mode": "nplr", "postact": "glu", "hyper_act": None,
             "trainable": {"dt": True}, "lr": 1e-3, "hurwitz": True}
    config = {"model": {**MODEL, "layer": layer}, "decoder": {"_name_": "sequence", "mode": "pool"}}
    convert(save(tmp_path / "v3.ckpt", {"state_dict": found, "hyper_parameters": config}), tmp_path / "out.pt")
    same(tmp_path / "out.pt", model)
    assert torch.load(tmp_path / "out.pt", weights_only=True)["params"]["layer"]["init"] == "legs"
    config["model"]["layer"]["hurwitz"] = False
    with pytest.raises(NotImplementedError, match="hurwitz"):
        convert(save(tmp_path / "v3.ckpt", {"state_dict": found, "hyper_parameters": config}), tmp_path / "out.pt")


def test_version_3_diagonal_kernels(tmp_path):
    "Bilinear unless said otherwise, an A that was never used, B without a leading axis, and a linear map without activation."
    arguments = {"d_model": 4, "d_state": 4, "init": "diag-lin", "mode": "diag", "final_act": "id"}
    block = build_state_spaces("layer", {"_name_": "s4", **arguments, "disc": "bilinear"}).eval()
    kernel, mix = block.kernel.state_dict(), block.mix[0]
    old = {"log_dt": kernel["inv_dt"][:, 0], "inv_A_real": kernel["A_real"], "A_imag": -kernel["A_imag"], "B": kernel["B"], "C": kernel["C"],
           "A": torch.stack([-kernel["A_real"].exp(), -kernel["A_imag"]], -1)}
    found = {"D": block.D.detach(), "output_linear.weight": mix.weight.detach()[..., None], "output_linear.bias": mix.bias.detach()}
    found |= {f"kernel.kernel.{k}": v for k, v in old.items()}
    config = {"_name_": "s4", "d_model": 4, "d_state": 4, "measure": "diag-lin", "measure_args": {}, "mode": "diag", "postact": None}
    x = torch.randn(2, 9, 4)
    torch.testing.assert_close(load_file(tmp_path, found, config)(x)[0], block(x)[0], rtol=0, atol=0)
    ffn = build_state_spaces("layer", {"_name_": "ffn", "d_model": 4}).eval()
    found = {f"layers.0.layer.{k}": v for k, v in found.items()} | {f"layers.1.layer.{k}": v.detach() for k, v in ffn.state_dict().items()}
    both = load_file(tmp_path, found, {"d_model": 4, "layer": [config, {"_name_": "ff"}]})
    torch.testing.assert_close(both(x)[0], ffn(block(x)[0])[0], rtol=0, atol=0)


def test_version_4_keeps_its_arguments():
    "An old name that version 4 left at None does not override the new one."
    layer = {"_name_": "s4", "d_model": 4, "final_act": "glu", "postact": None, "measure": None, "init": "legt", "rank": 2, "mode": "diag"}
    block = build_state_spaces("layer", layer)
    found = {f"layer.kernel.{k}": v for k, v in block.kernel.state_dict().items()}
    kind, params, *_ = understand(found | {"layer.D": block.D, "output_linear.0.weight": block.mix[0].weight}, layer)
    assert (kind, params) == ("layer", layer) and (block.kernel.disc, block.kernel.options.init) == ("zoh", "legt")


def test_the_example_script(tmp_path):
    "example.py saves {model, acc, epoch} of a model whose sizes its shapes tell; here against a literal forward."
    h, n, d_in, d_out = 4, 3, 2, 5
    g = torch.Generator().manual_seed(0)
    rand = lambda *s: torch.randn(*s, generator=g, dtype=torch.float64)
    w = {"encoder.weight": rand(h, d_in), "encoder.bias": rand(h), "decoder.weight": rand(d_out, h), "decoder.bias": rand(d_out)}
    for i in range(2):
        p = f"s4_layers.{i}."
        w |= {p + "D": rand(h), p + "kernel.C": rand(h, n, 2), p + "kernel.log_dt": rand(h) - 3, p + "kernel.log_A_real": rand(h, n),
              p + "kernel.A_imag": 3 * rand(h, n).abs(), p + "output_linear.0.weight": rand(2 * h, h, 1), p + "output_linear.0.bias": rand(2 * h),
              f"norms.{i}.weight": rand(h), f"norms.{i}.bias": rand(h)}

    def layer(u, p):
        A, dt = torch.complex(-w[p + "kernel.log_A_real"].exp(), w[p + "kernel.A_imag"]), w[p + "kernel.log_dt"].exp()[:, None]
        C, L = torch.view_as_complex(w[p + "kernel.C"]) * (torch.exp(dt * A) - 1) / A, u.shape[1]
        K = 2 * torch.einsum("hn,hnl->hl", C, torch.exp((dt * A)[..., None] * torch.arange(L))).real
        y = torch.stack([sum(K[:, j] * u[:, t - j] for j in range(t + 1)) for t in range(L)], 1) + w[p + "D"] * u
        y = torch.nn.functional.gelu(y) @ w[p + "output_linear.0.weight"][..., 0].T + w[p + "output_linear.0.bias"]
        return torch.nn.functional.glu(y)

    x = rand(2, 9, d_in)
    y = x @ w["encoder.weight"].T + w["encoder.bias"]
    for i in range(2):
        y = torch.nn.functional.layer_norm(y + layer(y, f"s4_layers.{i}."), (h,), w[f"norms.{i}.weight"], w[f"norms.{i}.bias"])
    y = y.mean(1) @ w["decoder.weight"].T + w["decoder.bias"]
    torch.set_default_dtype(torch.float64)
    convert(save(tmp_path / "ckpt.pth", {"model": w, "acc": 88.0, "epoch": 7}))
    torch.testing.assert_close(load_converted(tmp_path / "ckpt.s4nb.pt")(x), y, rtol=0, atol=1e-12)


def test_other_layouts(tmp_path):
    model = tiny()
    own = theirs(model, "enc", "dec.output_transform")
    arguments = {**MODEL, "layer": [MODEL["layer"]]}
    assert understand(own, arguments)[0] == "seqmodel"
    bare = {k.removeprefix("model."): v for k, v in own.items() if k.startswith("model.")}
    kind, params, state_dict, _ = understand(bare, arguments)
    assert kind == "backbone"
    backbone = build_state_spaces(kind, params).eval()
    load_state_spaces(backbone, state_dict)
    x = torch.randn(2, 7, 4)
    torch.testing.assert_close(backbone(x)[0], model.backbone(x)[0], rtol=0, atol=0)
    block = {k.removeprefix("layers.0.layer."): v for k, v in bare.items() if k.startswith("layers.0.layer.")}
    assert understand(block, {"d_model": 4, **MODEL["layer"]})[0] == "layer"
    tokens = {**own, "enc.weight": torch.randn(11, 4)}
    tokens.pop("enc.bias")
    converted = load_file(tmp_path, tokens, arguments)
    assert converted(torch.randint(11, (2, 7))).shape == (2, 3)


def load_file(tmp_path, content, config):
    convert(save(tmp_path / "a.pt", content), config=config)
    return load_converted(tmp_path / "a.s4nb.pt")


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = save(tmp_path / "a.pt", theirs(tiny()))
    convert(path, config=MODEL)
    before = (tmp_path / "a.s4nb.pt").read_bytes()

    def full(source, target): raise OSError("disk full")
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError): convert(path, config=MODEL)
    assert (tmp_path / "a.s4nb.pt").read_bytes() == before and len(list(tmp_path.iterdir())) == 2


def test_references_in_a_configuration():
    root = {"a": {"b": 3}, "c": "${a.b}", "d": ["${c}", {"e": "${a}"}]}
    assert resolve(root, root) == {"a": {"b": 3}, "c": 3, "d": [3, {"e": {"b": 3}}]}
    with pytest.raises(ValueError, match="a.x"): resolve({"c": "${a.x}"}, root)


@pytest.mark.parametrize("content,config,text", [
    (None, None, "--config"), (None, {**MODEL, "n_layers": 3}, "n_layers"), (None, {**MODEL, "_name_": "sashimi"}, "sashimi"),
    ({"epoch": 1}, None, "no parameters"), ([1], None, "no state dict"), (None, {**MODEL, "layer": {"_name_": "h3"}}, "h3"),
    ({"model.layers.0.x": torch.ones(1)}, MODEL, "enc.weight"), ({"layers.0.x": torch.ones(1)}, MODEL, "layers 0")])
def test_a_mistake_is_one_line_and_no_file(tmp_path, capsys, content, config, text):
    path = save(tmp_path / "a.pt", theirs(tiny()) if content is None else content)
    arguments = ["convert", str(path)]
    if config:
        (tmp_path / "c.json").write_text(json.dumps(config))
        arguments += ["--config", str(tmp_path / "c.json")]
    assert s4nb(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and text in err, err
    assert not list(tmp_path.glob("*.s4nb.pt"))


def test_the_command(tmp_path, capsys):
    model = tiny()
    path = save(tmp_path / "a.pt", theirs(model))
    (tmp_path / "c.json").write_text(json.dumps(MODEL))
    assert main([str(path), "--config", str(tmp_path / "c.json"), "-o", str(tmp_path / "b.pt")]) == 0
    assert "written: b.pt" in capsys.readouterr().out
    same(tmp_path / "b.pt", model)
    with pytest.raises(ValueError, match="not a file of"): load_converted(path)
