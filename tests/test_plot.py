"""Every picture is drawn from what runs leave on disk; what cannot be drawn is refused. Looking at them is a person's work."""

import json

import pytest
import torch

import memory
import peft
import plot
import quant
from conftest import tiny
from model import GPT
from lib import checkpoint, results

pytest.importorskip("matplotlib")


@pytest.fixture
def run(tmp_path):
    torch.manual_seed(0)
    model = GPT(tiny("gpt2"))
    peft.apply(model, "lora", rank=2)
    for name, p, _ in peft.parameters_by_method(model):
        if name.endswith(".B"):
            p.data.normal_()
    peft.save_adapter(model, tmp_path / "adapter.pt")
    lines = [{"step": i, "loss": 3 - i / 10} for i in range(20)] + [{"step": 10, "val_loss": 2.0, "train_loss": 1.9}, {"step": 20, "val_loss": 1.5, "train_loss": 1.4}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def test_loss(run):
    ax = plot.loss([run]).axes[0]
    smooth, val = (line.get_ydata() for line in ax.lines)
    assert list(val) == [2.0, 1.5] and len(smooth) == 20 and smooth[0] == 3 and smooth[19] == pytest.approx(sum(3 - i / 10 for i in range(20)) / 20)
    assert ax.get_xlabel() and "nats" in ax.get_ylabel()


def test_spectra(run):
    fig = plot.spectra([run])
    t = peft.read_adapter(run / "adapter.pt")["tensors"]
    drawn = sorted(tuple(float(v) for v in line.get_ydata()) for line in fig.axes[0].lines if len(line.get_ydata()))
    expected = sorted(tuple(torch.linalg.svdvals(t[n[:-1] + "B"] @ t[n])[:2].tolist()) for n in t if n.endswith(".A"))
    assert len(drawn) == 12
    for a, b in zip(drawn, expected):
        assert a == pytest.approx(b, rel=1e-3)


def test_memory_adds_up(tmp_path):
    reports = [memory.simulate(tiny("gpt2"), method, 1, 16) for method in ("qlora", "adapter")]
    (tmp_path / "a.json").write_text(json.dumps(reports))
    ax = plot.memory([tmp_path / "a.json"]).axes[0]
    for column, report in enumerate(reports):
        assert sum(bar.get_height() for bar in ax.patches if round(bar.get_center()[0]) == column) == pytest.approx(report["peak"] / 1e9)
    assert {text.get_text() for text in ax.get_legend().get_texts()} <= set(plot.KINDS)


def test_codebooks(tmp_path):
    checkpoint.save_base(GPT(tiny("gpt2")), tmp_path)
    fig = plot.codebooks([tmp_path / "model.safetensors"])
    assert [ax.get_title().split(":")[0] for ax in fig.axes] == [name for name, code in quant.CODES.items() if code.bits <= 4]


def test_files(run, script, refused):
    assert script("plot.py", "loss", run, "-o", run / "a.svg").stdout.strip() == str(run / "a.svg") and "<svg" in (run / "a.svg").read_text()
    assert "a picture is .png, .svg or .pdf" in refused("plot.py", "loss", run, "-o", run / "a.gif")
    assert "the folder of a run?" in refused("plot.py", "loss", run / "x")
    assert "nothing to draw" in refused("plot.py", "loss")
    (run / "b.json").write_text("[1]")
    assert "not what memory.py --json prints" in refused("plot.py", "memory", run / "b.json")
    (run / "b.json").write_text('[{"method": "lora", "parts": {}}]')
    assert "b.json: no bytes in any part of a report" in refused("plot.py", "memory", run / "b.json")


def test_results(tmp_path):
    rows = [{"run": f"lora-{seed}", "settings": "a", "trainable": 1000, "BLEU": 0.5 + seed / 10, "val_loss": 1.0} for seed in (1, 2)]
    rows += [{"run": "full-1", "settings": "b", "trainable": 10**6, "BLEU": 0.7, "val_loss": 0.9}]
    results.add(tmp_path / "r.jsonl", rows)
    bleu, val = plot.results([tmp_path / "r.jsonl"]).axes
    assert {text.get_text() for text in bleu.texts} == {"full", "lora"} and bleu.get_xscale() == "log"
    heights = [float(container.lines[0].get_ydata()[0]) for container in bleu.containers]
    assert heights == pytest.approx([70, 65]) and len(val.containers) == 2
