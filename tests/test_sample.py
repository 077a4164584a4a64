"""A prompt in, text out: from a base, a run and a merged folder, as a user calls it."""

import subprocess
import sys

import pytest
import torch

import data
import hub
import peft
from conftest import ROOT, tiny
from model import GPT
from lib import checkpoint, run
from lib.config import Config, write_toml


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny base, a run over it, and both merged."""
    folder = tmp_path_factory.mktemp("sample")
    tokenizer = data.Tokenizer.train(["the café sat on the mat – twice"] * 3, 300)
    torch.manual_seed(0)
    (folder / "base").mkdir()
    checkpoint.save_base(GPT(tiny("llama", vocab_size=tokenizer.vocab_size)), folder / "base")
    tokenizer.save(folder / "base")
    model = checkpoint.load_base(folder / "base")
    peft.apply(model, "lora", rank=2)
    for name, p, _ in peft.parameters_by_method(model):
        if name.endswith(".B"):
            p.data.normal_(std=0.3)
    (folder / "run").mkdir()
    peft.save_adapter(model, folder / "run" / "adapter.pt")
    (folder / "run" / "config.toml").write_text(write_toml(Config(method="lora", rank=2, base=str(folder / "base"), dtype="float32")))
    hub.merge_run(folder / "run", folder / "merged")
    return folder


def test_streamed_text_is_the_text(folders, monkeypatch, capsys):
    import sample
    for prompt in ("the cat", ""):
        args = sample.parse([str(folders / "run"), "--prompt", prompt, "--max_new_tokens", "25", "--dtype", "float32"])
        sample.main(args)
        model, tokenizer, _ = run.load_run(folders / "run", "cpu", "float32")
        expected = run.sample_text(model, tokenizer, [prompt], 25)[0]
        assert capsys.readouterr().out == f"{prompt} {expected}\n" if prompt else f"{expected}\n"


def test_a_merged_folder_says_what_the_run_says(folders, capsys):
    import sample
    sample.main(sample.parse([str(folders / "run"), str(folders / "merged"), str(folders / "base"), "--prompt", "the mat", "--max_new_tokens", "20", "--dtype", "float32"]))
    texts = [part.split("\n", 1)[1] for part in capsys.readouterr().out.split("--- ")[1:]]
    assert texts[0] == texts[1] != texts[2]


def test_one_seed_one_text(folders, capsys):
    import sample
    texts = []
    for seed in (1, 1, 2):
        sample.main(sample.parse([str(folders / "base"), "--temperature", "1", "--top_p", "0.9", "--seed", str(seed), "--max_new_tokens", "20"]))
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_mistakes(refused, folders, tmp_path):
    assert "neither a run (config.toml) nor a model (config.json) is there" in refused("sample.py", tmp_path)
    assert "0 GPUs here" in refused("sample.py", folders / "base", "--device", "cuda") if not torch.cuda.is_available() else True


def test_a_closed_pipe_is_no_error(folders):
    done = subprocess.run(f"{sys.executable} {ROOT / 'sample.py'} {folders / 'base'} --max_new_tokens 40 | head -c 1", shell=True, capture_output=True, text=True)
    assert not done.stderr


def test_the_real_model_tells_a_story(script, real_data):
    assert script("sample.py", real_data / "stories260k", "--max_new_tokens", 40).stdout.startswith("Once upon a time, there was a little girl named Lily")
