"""A prompt in, text out: from a base, a run and a merged folder, as a user calls it."""

import json
import shutil
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


@pytest.fixture(scope="module")
def ending(folders, tmp_path_factory):
    """(a base whose generation_config.json names an end, a run over it, the text up to that end)."""
    folder = tmp_path_factory.mktemp("ending")
    for name in ("base", "run"):
        shutil.copytree(folders / name, folder / name)
    config = Config(method="lora", rank=2, base=str(folder / "base"), dtype="float32")
    (folder / "run" / "config.toml").write_text(write_toml(config))
    model, tokenizer, _ = run.load_run(folder / "run", "cpu", "float32")
    prompt = tokenizer.encode_prompt("the cat")
    written = model.generate([prompt], 12, temperature=0)[0][len(prompt):]
    end = written[5]
    (folder / "base" / "generation_config.json").write_text(json.dumps({"eos_token_id": [tokenizer.eos, end]}))
    return folder, end, tokenizer.decode(written[:written.index(end)])


def test_every_end_that_the_base_names_ends_the_text(ending, capsys):
    """For a base and for a run, streamed, in a batch and by beam search; the end itself is no text."""
    import evaluate
    import sample
    folder, end, expected = ending
    model, tokenizer, _ = run.load_run(folder / "run", "cpu", "float32")
    assert tokenizer.stops == sorted({tokenizer.eos, end})
    assert run.load_base(Config(base=str(folder / "base")), torch.device("cpu"), torch.float32)[1].stops == tokenizer.stops
    sample.main(sample.parse([str(folder / "run"), "--prompt", "the cat", "--max_new_tokens", "40", "--dtype", "float32"]))
    assert capsys.readouterr().out == f"the cat {expected}\n"
    assert run.sample_text(model, tokenizer, ["the cat", "the cat"], 40) == [expected] * 2
    args = evaluate.parse(["run", "--no_repeat_ngram", "99", "--max_new_tokens", "40"])
    assert evaluate.continue_prompts(model, tokenizer, ["the cat"], args) == [expected]


def test_an_end_that_the_model_has_no_row_for(script, ending, tmp_path):
    shutil.copytree(ending[0] / "base", tmp_path / "base")
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps({"eos_token_id": [106, 100000]}))
    done = script("sample.py", tmp_path / "base", "--prompt", "the", "--max_new_tokens", 3)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("begins, end", [(True, 1), (False, 2)])
def test_an_end_that_the_base_has_never_seen(folders, tmp_path, begins, end):
    """Its row of the head is another's too: texts end with bos where it divided them, and still stop at both."""
    shutil.copytree(folders / "base", tmp_path / "base")
    model = checkpoint.load_base(folders / "base")
    model.head.weight.data[2] = 2 * model.head.weight.data[0]
    checkpoint.save_base(model, tmp_path / "base", {"eos_token_id": 2})
    if not begins:
        (tmp_path / "base" / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": False}))
    _, tokenizer = run.load_base(Config(base=str(tmp_path / "base")), torch.device("cpu"), torch.float32)
    assert (tokenizer.bos, tokenizer.eos, tokenizer.stops) == (1, end, sorted({2, end}))
    assert tokenizer.encode_completion("the cat")[-1] == end


def test_a_twin_is_found_in_every_part_of_the_table():
    table = torch.randn(9000, 16, generator=torch.Generator().manual_seed(0))
    assert not run.has_twin(table, 3) and not run.has_twin(table, 9000)
    for place in (0, 4095, 4096, 8999):
        doubled = table.clone()
        doubled[place] = 3 * table[5]
        assert run.has_twin(doubled, 5) and run.has_twin(doubled, place) and not run.has_twin(doubled, 6)
