"""The command line, the step, and whole runs of the real command."""

import dataclasses
import inspect
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st

import data
import evaluate
import peft
import quant
import train
from conftest import ROOT
from model import GPT, GPTConfig
from lib import checkpoint, run
from lib.config import FIELDS, METHOD_OPTIONS, Config, command_line, read_toml, write_toml
from lib.run import learning_rate, step
from lib.scores import SCORES

TINY = GPTConfig(vocab_size=61, block_size=32, n_layer=2, n_head=2, n_embd=16)

# -----------------------------------------------------------------------------
# the command line


def test_help_is_quick_and_does_without_torch():
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-X", "importtime", ROOT / "train.py", "--help"], capture_output=True, text=True)
        seconds.append(time.perf_counter() - start)
    assert done.returncode == 0 and min(seconds) < 0.5
    assert "import time" in done.stderr and "torch" not in done.stderr
    for name in FIELDS:
        assert f"--{name} " in done.stdout


@pytest.mark.parametrize("flags", ["--learning_rate 0.5", "--learning-rate 0.5", "--learning_rate=0.5", "--learning-rate=0.5"])
def test_flag_forms(flags):
    assert command_line(flags.split()).learning_rate == 0.5


@pytest.mark.parametrize("flags, value", [("--compile", True), ("--compile --seed 3", True), ("--compile true", True), ("--compile=False", False)])
def test_switches(flags, value):
    assert command_line(flags.split()).compile is value


def test_a_file_comes_first_and_flags_win(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text("rank = 4\nalpha = 8\n")
    config = command_line([str(path), "--rank", "2"])
    assert (config.rank, config.alpha) == (2, 8.0) and type(config.alpha) is float


def test_options_come_from_the_signatures():
    """Every default and every owner that the command line knows is the function's own; every flag has a help."""
    for name, option in METHOD_OPTIONS.items():
        assert option.default == FIELDS[name].default and option.help, name
        for method, function in peft.METHODS.items():
            parameters = inspect.signature(function).parameters
            assert (method in option.methods) == (name in parameters), (method, name)
            if name in parameters:
                assert parameters[name].default == option.default, (method, name)
    assert set(METHOD_OPTIONS) == set(peft.DEFAULTS) - {"prompt_ids"}


def test_a_file_keeps_the_options_of_its_methods_alone(tmp_path):
    text = write_toml(Config(method="prefix+ia3"))
    assert "prefix_length = 16" in text and "rank" not in text and "prompt_init" in text
    path = tmp_path / "a.toml"
    path.write_text('method = "ia3"\nrank = 4\n')
    with pytest.raises(ValueError, match="the file: rank is an option of lora.*; the method is ia3"):
        command_line([str(path)])


def test_a_flag_wins_against_the_files_other_word_for_the_same(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text("epochs = 5.0\n")
    assert command_line([str(path), "--max_iters", "20"]).epochs == 0 and command_line([str(path)]).epochs == 5
    path.write_text("epochs = 5.0\nmax_iters = 20\n")
    with pytest.raises(ValueError, match="the file: max_iters and epochs are both given"):
        command_line([str(path)])


def test_qlora_is_lora_on_nf4():
    assert run.storage_of(Config()) is None and run.storage_of(Config(method="lora", quant="int8")).scheme == "int8"
    assert run.storage_of(Config(method="qlora")) == quant.Storage("nf4", 64, True)
    assert run.storage_of(Config(method="qlora", quant="int8", quant_block=0)) == quant.Storage("int8", None, True)


@pytest.mark.parametrize("flags, words", [
    ("--rnk 3", "unknown key 'rnk'; the nearest is 'rank'"),
    ("--rank x", "rank is 'x'; it must be a whole number"),
    ("--rank 0", "rank is 0; it must be at least 1"),
    ("--rank", "--rank needs a value"),
    ("--learning_rate nan", "learning_rate is nan"),
    ("--learning_rate -1", "learning_rate is -1.0; it must be at least 1e-30 and at most 1,000"),
    ("--learning_rate 0", "learning_rate is 0.0; it must be at least 1e-30 and at most 1,000"),
    ("--dropout 1", "dropout is 1.0"),
    ("--quant nf5", "unknown scheme 'nf5'; nearest: nf4"),
    ("rank 3", "rank: No such file"),
    ("--rank 3 stray", "'stray' is neither a flag"),
    ("--resume nowhere", "nowhere: no run to resume there"),
    ("--compile maybe", "compile is 'maybe'; it must be true or false"),
    ("--method ia3 --rank 4", "command line: rank is an option of "),
    ("--method ia3 --rank 4", "; the method is ia3"),
    ("--method prefix+lora --adapter_size 4", "adapter_size is an option of adapter; the method is prefix+lora"),
])
def test_mistakes_are_told_in_one_line(refused, tmp_path, flags, words):
    assert words in refused("train.py", *flags.split(), cwd=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text, words", [("rnk = 3", "unknown key 'rnk'"), ("rank = 'a'", "rank is 'a'"), ("rank = ", "a.toml"), ("rank = true", "rank is True")])
def test_mistakes_in_a_file(tmp_path, text, words):
    (tmp_path / "a.toml").write_text(text)
    with pytest.raises(ValueError, match=words):
        command_line([str(tmp_path / "a.toml")])


@settings(deadline=None, derandomize=True, max_examples=50)
@given(st.text(st.characters(codec="utf-8", exclude_characters="\0")), st.floats(1e-12, 1000), st.booleans())
def test_configuration_survives_its_file(tmp_path_factory, text, number, switch):
    path = tmp_path_factory.mktemp("toml") / "config.toml"
    config = Config(prompt_init=text, learning_rate=number, compile=switch)
    path.write_text(write_toml(config), encoding="utf-8")
    assert Config(**read_toml(path)) == config


def test_defaults_agree_with_peft():
    ours = {name: field.default for name, field in FIELDS.items()}
    assert {name: value for name, value in peft.DEFAULTS.items() if name in ours} == {name: ours[name] for name in peft.DEFAULTS if name in ours}
    assert set(peft.DEFAULTS) - set(ours) <= {"prompt_ids"}


# -----------------------------------------------------------------------------
# the step


def batch(n, seed=0, length=12):
    g = torch.Generator().manual_seed(seed)
    tokens, targets = torch.randint(61, (2, n, length), generator=g)
    for row, masked in enumerate(torch.randint(1, length, (n,), generator=g)):
        targets[row, :masked] = -1                       # rows with very different numbers of supervised tokens
    return tokens, targets


def lora_model():
    torch.manual_seed(0)
    model = GPT(TINY)
    peft.apply(model, "lora", rank=2)
    return model


@pytest.mark.parametrize("sizes", [(1,) * 8, (2, 6), (3, 3, 2)])
def test_accumulation_gives_what_one_batch_gives(sizes):
    tokens, targets = batch(8)
    results = []
    for parts in ((8,), sizes):
        model = lora_model()
        optimizer = run.make_optimizer(model, Config(learning_rate=5e-3, lora_plus_ratio=1.0))
        for _ in range(3):
            loss, norm = step(model, optimizer, list(zip(tokens.split(parts), targets.split(parts))), 1.0)
        results.append((loss, norm, *peft.adapter_state_dict(model).values()))
    for one, many in zip(*results):
        torch.testing.assert_close(one, many, rtol=1e-4, atol=1e-6)


def test_loss_is_the_mean_over_supervised_tokens():
    model, (tokens, targets) = lora_model(), batch(5)
    expected = torch.nn.functional.cross_entropy(model(tokens)[0].flatten(0, 1), targets.flatten(), ignore_index=-1)
    loss, _ = step(model, run.make_optimizer(model, Config()), [(tokens, targets)], 0.0)
    torch.testing.assert_close(loss, expected.detach())


def test_a_step_that_is_not_finite_changes_nothing():
    model = lora_model()
    optimizer = run.make_optimizer(model, Config())
    step(model, optimizer, [batch(2)], 1.0)
    before = {name: t.clone() for name, t in peft.adapter_state_dict(model).items()}
    moments = [t.clone() for state in optimizer.state.values() for t in state.values()]
    model.norm.weight.data[0] = math.nan
    loss, norm = step(model, optimizer, [batch(2)], 1.0)
    assert not run.numbers_are_finite(loss, norm)
    assert all(torch.equal(before[name], t) for name, t in peft.adapter_state_dict(model).items())
    assert all(torch.equal(a, b) for a, b in zip(moments, (t for state in optimizer.state.values() for t in state.values())))


def test_a_batch_with_nothing_supervised_is_harmless():
    model, (tokens, targets) = lora_model(), batch(2)
    loss, norm = step(model, run.make_optimizer(model, Config()), [(tokens, torch.full_like(targets, -1))], 1.0)
    assert loss == 0 and norm == 0


@pytest.mark.parametrize("schedule, middle", [("cosine", 0.55), ("linear", 0.55), ("constant", 1.0)])
def test_schedule(schedule, middle):
    config = Config(learning_rate=1.0, min_lr=0.1, warmup_iters=10, max_iters=110, lr_schedule=schedule)
    assert learning_rate(config, 0) == pytest.approx(1 / 11) and learning_rate(config, 10) == 1.0
    assert learning_rate(config, 60) == pytest.approx(middle)
    assert learning_rate(config, 110) == pytest.approx(1.0 if schedule == "constant" else 0.1)


# -----------------------------------------------------------------------------
# whole runs


def test_a_real_base_learns_real_data(script, real_data, tmp_path):
    done = script("train.py", "--method", "qlora", "--rank", 8, "--base", real_data / "stories260k", "--data", real_data / "e2e", "--out_dir", "run",
                  "--max_iters", 40, "--eval_interval", 40, "--eval_sequences", 32, "--sample_count", 1, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["val_loss"] < 0.5 * metrics["loss_before"] and metrics["steps"] == 40 and metrics["trainable"] > 0
    assert {p.name for p in (tmp_path / "run").iterdir()} == {".lock", "adapter.pt", "config.toml", "log.jsonl", "metrics.json", "samples.txt", "state.pt",
                                                            "state.before.pt", "tokenizer.model"}
    assert all(words in done.stdout for words in ("linear layers in nf4", "wrapped 35 of 35 linear layers", "predicted at the peak", "before:", "after:", "python sample.py run"))
    assert "Aromi" in script("sample.py", "run", "--prompt", "name[Aromi], eatType[pub]", "--max_new_tokens", 5, cwd=tmp_path).stdout


def test_dry_run_writes_nothing(script, real_data, tmp_path):
    done = script("train.py", "--dry_run", "--base", real_data / "stories260k", "--data", real_data / "e2e", cwd=tmp_path)
    assert done.returncode == 0 and "trained " in done.stdout and "predicted at the peak" in done.stdout and not list(tmp_path.iterdir())


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A folder with a base of 64 positions and data, where one is."""
    monkeypatch.chdir(tmp_path)
    long = {5, 6, 7}                                             # Their prompts fill the context, or nearly.
    lines = [{"prompt": f"item {i} " + "the word " * 40 * (i in long), "completion": f"text {i % 5}"} for i in range(40)]
    (tmp_path / "data").mkdir()
    for split, part in (("train", lines[10:]), ("val", lines[5:10]), ("test", lines[:10])):
        (tmp_path / "data" / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in part))
    tokenizer = data.Tokenizer.train([line[key] for line in lines for key in line], 300)
    checkpoint.save_base(GPT(dataclasses.replace(TINY, vocab_size=tokenizer.vocab_size, block_size=64)), tmp_path / "base")
    tokenizer.save(tmp_path / "base")
    return Config(base="base", data="data", max_iters=2, batch_size=2, eval_interval=1, eval_sequences=4, sample_count=2, dtype="float32", device="cpu", out_dir="run")


@pytest.mark.parametrize("too_long", ["cut", "drop"])
def test_samples_are_of_prompts_that_fit(small, too_long, monkeypatch, capsys):
    train.train(dataclasses.replace(small, too_long=too_long))
    texts = Path("run", "samples.txt").read_text()
    assert texts.count("before:") == 2 and "item 8 \n" in texts and "item 9 \n" in texts
    monkeypatch.setitem(SCORES, "METEOR", lambda *texts: None)   # Java takes seconds to start.
    evaluate.main(evaluate.parse(["run", "--max_new_tokens", "3", "--device", "cpu"]))
    found = capsys.readouterr()
    assert "run: 3 of 10 prompts do not fit into the context of 64 tokens; their texts are empty" in found.err
    predictions = Path("run", "predictions.txt").read_text().splitlines()
    assert len(predictions) == 10 and not any(predictions[5:8]) and "scores" in " ".join(os.listdir("run"))
    assert "of val's sequences, " + ("3 cut and 0 dropped" if too_long == "cut" else "0 cut and 3 dropped") in found.out


def test_data_that_goes_while_a_run_learns(small, monkeypatch):
    """What the end shows is kept from the beginning; the sequences are in memory anyway."""
    def loop(run, loop=train.loop):
        for path in Path("data").iterdir():
            path.write_text("")
        return loop(run)
    monkeypatch.setattr(train, "loop", loop)
    train.train(dataclasses.replace(small, too_long="drop"))
    assert Path("run", "samples.txt").read_text().count("after:") == 2


@pytest.mark.parametrize("options", [dict(prefix_style="after", prefix_mlp=4), {}], ids=str)
def test_full_beside_what_is_kept_otherwise_than_trained(small, options):
    """The best adapter, with its prefix folded, comes back onto a base that full has changed."""
    metrics = train.train(dataclasses.replace(small, method="full+prefix", too_long="drop", **options))
    assert metrics["steps"] == 2 and Path("run", "metrics.json").is_file()


def test_a_model_from_nothing_is_trained_as_a_whole(small):
    with pytest.raises(ValueError, match="base new is written as a whole model, in which lora has no place; use --method full"):
        train.train(dataclasses.replace(small, base="new", method="lora"))


def test_a_folder_that_holds_a_run_is_never_written_over(refused, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text("")
    words = "run: holds a run already; there is nothing in it to go on with, another --out_dir starts anew"
    assert words in refused("train.py", "--out_dir", "run", cwd=tmp_path)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.toml"]
