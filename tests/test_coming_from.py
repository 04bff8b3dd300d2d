"""The page for those who come from state-spaces/s4: what it says is here, is, and no name of their READMEs is missing."""
import json
import os
import re
from pathlib import Path

import pytest
from house import ROOT

PAGE = ROOT / "nbs/4_models/39_coming_from.ipynb"
CODE = re.compile(r"`([^`]+)`")


def cells(): return json.loads(PAGE.read_text(encoding="utf-8"))["cells"]
def source(cell): return "".join(cell["source"])


def rows():
    "(owner or None, theirs, ours, state, note) of every row of the tables as they are stored."
    found = []
    for cell in cells():
        shown = "".join("".join(o.get("data", {}).get("text/markdown", "")) for o in cell.get("outputs", []))
        if not shown.startswith("| state-spaces |"): continue
        head, _, *lines = shown.splitlines()
        owner = re.search(r"argument of `s4nb\.([\w.]+)`", head)
        for line in lines:
            theirs, ours, state, note = (part.strip() for part in line.strip("|").split(" | "))
            found.append((owner and owner[1], CODE.findall(theirs), CODE.findall(ours), state, note))
    return found


@pytest.fixture(scope="module")
def check():
    "The judge of the notebook: its cells before the first table."
    space, before = {}, os.getcwd()
    os.chdir(PAGE.parent)
    try:
        for text in (source(c) for c in cells() if c["cell_type"] == "code"):
            if text.startswith("table("): return space["check"]
            exec(compile(text, str(PAGE), "exec"), space)
    finally: os.chdir(before)


def test_every_row_says_where():
    assert len(rows()) > 200
    for owner, theirs, ours, state, note in rows():
        assert theirs and state in ("here", "not offered"), theirs
        assert ours if state == "here" else note, f"{theirs}: {state}, and no word why or what instead"


def test_what_is_named_is_here(check):
    wrong = []
    for owner, theirs, ours, _, _ in rows():
        for entry in ours:
            try: check(entry.removeprefix("s4nb."), owner)
            except Exception as error: wrong.append(f"{theirs[0]}: {entry}: {type(error).__name__}: {error}")
    assert not wrong, "\n".join(wrong)


def test_the_judge_can_say_no(check):
    for entry, owner in [("S4Blok", None), ("models.rnn.GRUCel", None), ("S4Block(d_stat=4)", None), ("s4nb trian", None),
                         ("s4nb train experiment=lra", None), ("s4nb eval --gently x", None), ("s4nb generate x --louder", None), ("make coffee", None), ("model.nrom", None), ("d_stat", "S4Block"),
                         ("s4nb convert --gently", None), ("training.task.Tsk", None), ("memory", "LSSL")]:
        with pytest.raises((AssertionError, AttributeError, ImportError, TypeError, ValueError)): check(entry, owner)


def test_links_in_the_tables_lead_somewhere():
    notes = " ".join(note for *_, note in rows())
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", notes)
    assert len(targets) > 5
    assert [t for t in targets if not (PAGE.parent / Path(t)).exists()] == []


# What their READMEs name: experiments, scripts, modules, options. Each has to be in a left column.
NAMES = """
pipeline=mnist pipeline=cifar lra/s4-lra-listops lra/s4-lra-imdb lra/s4-lra-cifar lra/s4-lra-aan lra/s4-lra-pathfinder lra/s4-lra-pathx
lra/s4-listops lra/old/s4-lra- lra/old/v3-s4-listops s4-lra-listops-new cifar/s4-cifar cifar/s4-cifar-ablation cifar/s4d-minimal-cifar
s4-simple-cifar sc/s4-sc sc/s4-sc-ablation dataset=sc10 dataset.all_classes old/s4-sc bidmc/s4-bidmc-ablation lm/s4-wt103
forecasting/s4-informer- {sashimi,samplernn,wavenet} {sc09,youtubemix,beethoven} mega/lra-image s4nd/cifar s4nd/progres s4nd/vit s4nd/convnext
s4nd/celeba hmdb synthetic model=rnn/hippo-legs model=rnn/hippo-legt model=rnn/gru model=lstm model=transformer ckconv unicornn lipschitzrnn wavegan
model/layer=s4d model/layer=lssl model.layer.learn=0 example.py n_samples l_sample l_prefix load_data n_reps n_batch save_dir
convert_pl_to_pt port_v3_to_v4 extensions/kernels extensions/cauchy pykeops test_cauchy.py test_vandermonde.py
models/s4/s4.py models/s4/s4d.py models/sashimi/sashimi.py ssm_kernels.ipynb hippo_function_approximation.ipynb visualizations.py
train_speech_commands.py test_speech_commands.py prepare_sc09.py turk_create_batch.py template_music.py template_speech.py diffwave-sashimi
model.cell=legs model.cell=tlsi dataset=ct runner.ntrials csrc/setup.py test_legs_extension.py DATA_PATH dataset.data_dir pathfinder aan listops
getdata.sh informer.zip process_data.py links.py eigenworms registry.py wandb=null wandb.project train.ckpt train.seed trainer.gpus trainer.devices
trainer.weights_summary trainer.limit_train_batches trainer.accumulate_grad_batches loader.batch_size loader.train_resolution loader.eval_resolutions
scheduler.num_training_steps optimizer.weight_decay train.ema _name_ hydra.run.dir SequenceModule SequenceModel Sashimi UNet setup_step setup_rnn
default_state S4Block S4D FFTConv SSMKernelDPLR SSMKernelDiag SSKernelDPLR SSKernelDiag SSKernelNPLR OptimModule register EMAKernel ConvKernel
cauchy_naive cauchy_slow log_vandermonde_naive structured_kernels transition nplr HiPPO LSSL S4ND MegaBlock GSS DSS H3 SGConv S5 force_real
DropoutNd Activation _optim setup_optimizer configure_optimizers SequenceLightningModule SequenceDataset legs legt lagt glagt lmu tlti gru exprnn sru
mha Performer LinearAttention Conv1d Conv2d vit resnet convnext_timm nonaka segmentation odelstm nrde samplernn wavenet
gate bottleneck transposed measure postact mode='nplr' init='diag-lin' init='diag-inv' init='fout' disc='bilinear' lr.B real_transform bandlimit
n_ssm rank dt_min dt_max d_state channels bidirectional l_max tie_dropout dropout prenorm norm residual pool track_norms memory_order hidden_size
""".split() + ["python -m train", "python -m generate", "python -m evaluate", "python setup.py install", "Liquid S4"]


def test_no_name_of_their_readmes_is_missing():
    theirs = " ".join(entry for _, entries, *_ in rows() for entry in entries)
    assert [name for name in NAMES if name not in theirs] == []
