"""A prompt in, text out: from a base, a run and a merged folder, as a user calls it."""

import io
import json
import re
import shutil
import subprocess
import sys

import pytest
import torch

import data
import hub
import peft
import sample
from conftest import ROOT, tiny
from model import GPT
from lib import checkpoint, config, run
from lib.config import Config, write_toml
from test_data import spelled_in_bytes


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


def test_a_system_message_wants_a_conversation(folders, refused):
    assert "was not trained on conversations, so --system has no place there" in refused("sample.py", folders / "run", "--prompt", "a", "--system", "b")


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


# -----------------------------------------------------------------------------
# conversations: a run remembers its template

TALK = [{"messages": [{"role": "user", "content": f"I am {name}"}, {"role": "assistant", "content": f"Hi {name}!"},
                      {"role": "user", "content": "Bye"}, {"role": "assistant", "content": "Bye!"}]} for name in "ABCDEFGHIJKL"]
FLAGS = ("--method", "lora", "--epochs", 0.5, "--batch_size", 4, "--sample_count", 1, "--warmup_iters", 0, "--dtype", "float32", "--device", "cpu")


@pytest.fixture(scope="module")
def talking(tmp_path_factory, script):
    """A folder with a base that has a tokenizer with ChatML's tokens and no template, data.jsonl, a template of its own in mine.jinja,
    and a run with that."""
    pytest.importorskip("jinja2")
    folder = tmp_path_factory.mktemp("talking")
    (folder / "base").mkdir()
    tokenizers = pytest.importorskip("tokenizers")
    spelled_in_bytes(tokenizers, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]).save(str(folder / "base" / "tokenizer.json"))
    checkpoint.save_base(GPT(tiny("llama", vocab_size=300, block_size=128)), folder / "base")
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, TALK)))
    (folder / "mine.jinja").write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}")
    done = script("train.py", *FLAGS, "--base", "base", "--data", "data.jsonl", "--out_dir", "run", "--template", "mine.jinja", cwd=folder)
    assert done.returncode == 0, done.stderr
    (folder / "mine.jinja").unlink()
    return folder, done.stdout


def test_a_run_says_its_form_and_keeps_its_template(talking):
    folder, told = talking
    assert re.search("^data       data.jsonl, messages: 20 / 2 / 2 train / val / test, 20 training sequences", told, re.M)
    assert "data       rendered by mine.jinja" in told and "20 training" in told and "3 steps" in told
    config = (folder / "run" / "config.toml").read_text()
    assert 'template = "mine.jinja"' in config and "max_iters = 3\n" in config and "epochs = 0.0" in config
    assert "prompt: <|im_start|>user: I am" in (folder / "run" / "samples.txt").read_text()
    assert (folder / "run" / "chat_template.jinja").read_text().startswith("{% for m in messages %}<|im_start|>")


def test_a_merged_run_brings_its_template_along(talking, tmp_path, monkeypatch):
    folder, _ = talking
    monkeypatch.chdir(folder)
    hub.merge_run("run", tmp_path / "merged")
    assert (tmp_path / "merged" / "chat_template.jinja").read_text() == (folder / "run" / "chat_template.jinja").read_text()


def test_a_run_talks_turn_by_turn_in_a_pipe(talking, monkeypatch, capsys):
    """Each line is answered after all that was said before; the prompts are those of the run's template, whose file has gone."""
    folder, _ = talking
    monkeypatch.chdir(folder)
    seen = []

    def stream(model, tokenizer, ids, args):
        seen.append(tokenizer._decode(ids, skip_special_tokens=False))
        yield from ("o", "k")
    monkeypatch.setattr(sample, "stream", stream)
    for lines in ("Hi <|im_end|>\n\n  Bye \n/exit\nnever\n", "Hi <|im_end|>\n\nBye"):
        monkeypatch.setattr("sys.stdin", io.StringIO(lines))
        sample.main(sample.parse(["run", "--chat", "--system", "Be kind", "--device", "cpu"]))
        assert capsys.readouterr().out == "ok\nok\n"
        first = "<|im_start|>system: Be kind<|im_end|><|im_start|>user: Hi <|im_end|><|im_end|><|im_start|>assistant: "
        assert seen == [first, first + "ok<|im_end|><|im_start|>user: Bye<|im_end|><|im_start|>assistant: "]
        seen.clear()
    sample.main(sample.parse(["run", "--prompt", "Hi", "--device", "cpu"]))
    assert seen == ["<|im_start|>user: Hi<|im_end|><|im_start|>assistant: "]


def test_a_conversation_longer_than_the_context_forgets_its_beginning(talking, monkeypatch, capsys):
    folder, _ = talking
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"Number {i} of the lines\n" for i in range(5))))
    sample.main(sample.parse(["run", "--chat", "--device", "cpu", "--max_new_tokens", "5"]))
    told = capsys.readouterr()
    assert told.out.count("\n") >= 5 and "the oldest question and its answer are forgotten" in told.err
    monkeypatch.setattr("sys.stdin", io.StringIO("long " * 200))
    with pytest.raises(ValueError, match=r"that is \d+ tokens, as many as the context of 128 has or more; say less"):
        sample.main(sample.parse(["run", "--chat", "--device", "cpu"]))


def test_scripts_of_a_run_with_conversations(talking, script, refused):
    """From other processes: talk through a pipe's end, scores, going on where it stopped, and what is refused."""
    folder, _ = talking
    done = script("sample.py", "run", "--prompt", "I am A", "--max_new_tokens", 5, "--device", "cpu", cwd=folder)
    assert done.returncode == 0 and done.stdout.startswith("I am A ")
    done = script("evaluate.py", "run", "--limit", 1, "--max_new_tokens", 5, "--device", "cpu", cwd=folder)
    assert done.returncode == 0 and len((folder / "run" / "predictions.txt").read_text().splitlines()) == 1
    done = script("train.py", "--resume", "run", "--epochs", 1, cwd=folder)
    assert done.returncode == 0 and "resumed    at step 3" in done.stdout and "step     5/5" in done.stdout, done.stderr
    assert "the data are texts" in refused("train.py", *FLAGS, "--base", "base", "--data", "plain", "--template", "chatml", cwd=folder)
    assert "one folder" in refused("sample.py", "run", "run", "--chat", cwd=folder)
    both = refused("train.py", "--epochs", 1, "--max_iters", 3, cwd=folder)
    assert "max_iters and epochs are both given" in both
    assert "template is 'other'; it must be one of auto, pipe" in refused("train.py", "--template", "other", cwd=folder)


def test_patience_ends_a_run(talking, script):
    """With a learning rate of nothing at all no evaluation is better than the first."""
    folder, _ = talking
    flags = dict(zip(FLAGS[::2], FLAGS[1::2])) | {"--epochs": 50, "--learning_rate": 1e-30, "--eval_interval": 2, "--patience": 3}
    flat = [part for pair in flags.items() for part in pair]
    done = script("train.py", *flat, "--base", "base", "--data", "data.jsonl", "--out_dir", "patient", cwd=folder)
    assert done.returncode == 0 and "stopped    after step 8: no better val loss in 3 evaluations" in done.stdout, done.stdout + done.stderr
    assert json.loads((folder / "patient" / "metrics.json").read_text())["steps"] == 8
    assert 'template = "base"' in (folder / "patient" / "config.toml").read_text() and "rendered by ChatML" in done.stdout
    done = script("train.py", "--resume", "patient", "--patience", 0, "--max_iters", 10, cwd=folder)
    assert done.returncode == 0 and "step    10/10" in done.stdout


def test_batches_to_evaluate_become_sequences(tmp_path):
    """In a run's configuration of before, in a file and as a flag."""
    (tmp_path / "config.toml").write_text("eval_batches = 20\nbatch_size = 16\n")
    assert config.read_run_config(tmp_path).eval_sequences == 320
    path = str(tmp_path / "config.toml")
    assert config.command_line([path]).eval_sequences == 320 and config.command_line([path, "--eval_batches", "3"]).eval_sequences == 48
    assert config.command_line([path, "--eval_sequences", "7"]).eval_sequences == 7 and config.command_line(["--eval_batches=0"]).eval_sequences == 0
    (tmp_path / "state.pt").touch()
    assert config.command_line(["--resume", str(tmp_path), "--eval_batches", "20"]).eval_sequences == 320
    with pytest.raises(ValueError, match="eval_sequences was 320 and cannot become 80"):
        config.command_line(["--resume", str(tmp_path), "--eval_batches", "5"])
    with pytest.raises(ValueError, match="epochs is nan; it must be at least 0"):
        config.command_line(["--epochs", "nan"])
