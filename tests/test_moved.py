"""Runs whose folders or bases have moved, and adapters other than the best."""

import json
import os

import pytest
import torch

import data
import hub
import peft
import train
from conftest import tiny
from lib import checkpoint, files, run
from lib.config import command_line
from model import GPT

LINES = [{"prompt": f"say {word}", "completion": f" {word}"} for word in "cat dog bird fish worm ant bee fly".split()]
FLAGS = "--method prefix --prefix_style after --prefix_mlp 6 --prefix_length 2 --max_iters 4 --eval_interval 2 --warmup_iters 0 --sample_count 0 " \
        "--dtype float32 --device cpu --batch_size 2 --learning_rate 0.05 --keep_adapters"


@pytest.fixture
def moved(tmp_path, monkeypatch):
    """A folder that was elsewhere while out/run was trained there from the relative paths base and data.jsonl."""
    before = tmp_path / "before"
    before.mkdir()
    torch.manual_seed(0)
    tokenizer = data.Tokenizer.train(["say cat dog bird fish"], 300)
    checkpoint.save_base(GPT(tiny("gpt2", vocab_size=tokenizer.vocab_size)), before / "base")
    tokenizer.save(before / "base")
    (before / "data.jsonl").write_text("\n".join(map(json.dumps, LINES)))
    monkeypatch.chdir(before)
    train.train(command_line([*FLAGS.split(), "--base", "base", "--data", "data.jsonl", "--out_dir", "out/run"]))
    os.rename(before, tmp_path / "after")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "after"


def test_a_base_is_found_from_the_run(moved, capsys):
    model, _, config = run.load_run(moved / "out" / "run", "cpu", "float32")
    assert config.base == str(moved / "base") and peft.methods(model)
    os.rename(moved / "base", moved / "new place")
    with pytest.raises(ValueError, match="its base base is not there; --base DIR says where it is now"):
        run.load_run(moved / "out" / "run", "cpu", "float32")
    model, _, _ = run.load_run(moved / "out" / "run", "cpu", "float32", base=str(moved / "new place"))
    hub.export(moved / "out" / "run", moved / "peft", base=str(moved / "new place"))
    assert json.loads((moved / "peft" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(moved / "new place")
    flags = ["--resume", str(moved / "out" / "run"), "--max_iters", "6"]
    with pytest.raises(ValueError, match="--base DIR"):
        train.train(command_line(flags))
    train.train(command_line([*flags, "--base", str(moved / "new place"), "--data", str(moved / "data.jsonl")]))
    assert "resumed    at step 4" in capsys.readouterr().out


def test_another_base_is_refused_wherever_it_lies(moved):
    torch.manual_seed(1)
    other = GPT(tiny("gpt2", vocab_size=data.Tokenizer.load(moved / "base").vocab_size))
    checkpoint.save_base(other, moved / "other")
    data.Tokenizer.load(moved / "base").save(moved / "other")
    with pytest.raises(ValueError, match="made for the base"):
        run.load_run(moved / "out" / "run", "cpu", "float32", base=str(moved / "other"))
    with pytest.raises(ValueError, match="the base has changed since that run"):
        train.train(command_line(["--resume", str(moved / "out" / "run"), "--max_iters", "6", "--base", str(moved / "other"), "--data", str(moved / "data.jsonl")]))


def test_any_adapter_of_a_run(moved):
    folder = moved / "out" / "run"
    last = run.adapter_of(folder, "last")["tensors"]
    state = files.read_file(folder / "state.pt")["tensors"]
    start = "blocks.1.attn.prefix."
    hidden = torch.tanh(state[f"{start}E"] @ state[f"{start}mlp.0.weight"].T + state[f"{start}mlp.0.bias"])
    expected = hidden @ state[f"{start}mlp.2.weight"].T + state[f"{start}mlp.2.bias"]
    assert torch.allclose(torch.cat([last[f"{start}s_k"], last[f"{start}s_v"]], 1), expected, atol=1e-6)
    kept = {step: run.adapter_of(folder, step)["tensors"] for step in ("2", "4")}
    assert all(torch.allclose(kept["4"][name], t, atol=1e-6) for name, t in last.items())
    assert not torch.equal(kept["2"][f"{start}s_k"], kept["4"][f"{start}s_k"])
    (folder / "adapter-2.pt").unlink()                           # The state of that step is still there.
    assert torch.allclose(run.adapter_of(folder, "2")["tensors"][f"{start}s_k"], kept["2"][f"{start}s_k"], atol=1e-6)
    (folder / "adapter-copy.pt").write_bytes((folder / "adapter.pt").read_bytes())
    with pytest.raises(ValueError, match="no adapter '3' there; best, last or one of the steps 2, 4 "):
        run.adapter_of(folder, "3")
    hub.export(folder, moved / "peft", adapter="last")
    model = hub.import_adapter(moved / "peft", moved / "base", moved / "again")
    assert torch.allclose(model.blocks[1].attn.prefix.s_k, last[f"{start}s_k"], atol=1e-6)


def test_the_doors_say_so(moved, script, refused):
    base = moved / "new place"
    os.rename(moved / "base", base)
    run_folder = moved / "out" / "run"
    assert "--base DIR says where it is now" in refused("sample.py", run_folder, "--prompt", "say cat")
    texts = [script("sample.py", run_folder, "--prompt", "say cat", "--base", base, "--adapter", which).stdout for which in ("best", "last", "2")]
    assert all(texts)
    assert script("evaluate.py", run_folder, "--data", moved / "data.jsonl", "--base", base, "--adapter", "last").returncode == 0
    assert script("hub.py", "show", run_folder, "--adapter", "last").returncode == 0
    assert "no adapter '9' there" in refused("sample.py", run_folder, "--prompt", "say cat", "--base", base, "--adapter", 9)
