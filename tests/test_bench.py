"""bench.py measures what it says: small jobs, run as a user runs them. The figures themselves are no test."""

import json

import pytest
import torch

import bench
from conftest import tiny
from model import GPT, PRESETS
from lib import checkpoint


BASE = tiny("llama", n_embd=64, n_ffn=128)      # multiples of 64: elsewhere bitsandbytes' CPU kernel is wrong


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    torch.manual_seed(0)
    checkpoint.save_base(GPT(BASE), folder)
    return folder


def last(done):
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_step(script, base):
    report = last(script("bench.py", "step", "--base", base, "--batch", 2, "--seq", 16, "--steps", 2, "--rounds", 1, "--rank", 2))
    ours = report["result"]["nanopeft"]
    assert report["method"] == "qlora" and ours["tokens_per_second"]["least"] <= ours["tokens_per_second"]["median"] <= ours["tokens_per_second"]["most"]
    assert ours["peak"] > 1e8 and 0 < ours["share_of_it"] < 1


@pytest.mark.peers
def test_the_peers_losses_are_ours(script, peer, base):
    """Equal weights, adapters and data; NF4 with double quantization, float32."""
    report = last(script("bench.py", "loss", "--base", base, "--batch", 2, "--seq", 32, "--steps", 10, "--rank", 2, "--dtype", "float32", timeout=240))["result"]
    assert len(report["ours"]) == 11 and report["largest_difference"] < 1e-3 and len(set(report["ours"])) == 11


@pytest.mark.parametrize("flags, words", [("step --steps 0", "steps is 0"), ("step --base gpt3", "unknown model 'gpt3'")])
def test_mistakes(refused, flags, words):
    assert words in refused("bench.py", *flags.split(), NANOPEFT_PEERS="")


@pytest.mark.peers
def test_a_gpus_table(peer, monkeypatch, capsys):
    """All that is measured of a GPU, tried on a CPU."""
    config = tiny("llama", n_embd=64, n_head=2, n_ffn=128, vocab_size=64, block_size=256)
    monkeypatch.setitem(PRESETS, "small", config)
    monkeypatch.setattr(bench, "MODELS", {"small": 2})
    monkeypatch.setattr(bench, "serves_on", lambda job: True)
    bench.main(bench.parse("gpu --peer --device cpu --dtype float32 --seq 16 --steps 1 --rounds 1".split()))
    lines = capsys.readouterr().out.splitlines()
    assert not [line for line in lines if '"failed"' in line]
    report = {(what, method, side): figures for what, _, method, side, figures in json.loads(lines[-1])["result"]}
    assert len(report) == (2 + 1 + 2) * 2 and all(report.values())
    rows = [line for line in lines[:-1] if line.startswith(("small", "generate", "quantize", "dequantize", "limits"))]
    assert len(rows) == 2 + 2 + 3 + 1 and not any(" - " in row for row in rows), rows
