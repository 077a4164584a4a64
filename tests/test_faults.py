"""
The faults of the table in tests/README.md: one test each, the real fault in the real command where there is one. R: refused in one line, exit 2, nothing
that was there is changed.

    python -m pytest -q tests/test_faults.py
    python -m pytest -q tests/test_faults.py -m slow       # 200 kills, a full disk at every write, 2000 mutants a kind of file
"""

import dataclasses
import fcntl
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import data
import hub
import peft
import quant
import train
from conftest import ROOT, tiny
from model import GPT
from lib import checkpoint, files, origin, run
from lib.config import Config, command_line, read_toml

SHORT = ["--max_iters", 4, "--batch_size", 4, "--eval_interval", 2, "--eval_sequences", 4, "--warmup_iters", 1, "--sample_count", 0, "--dtype", "float32"]


@pytest.fixture(scope="module")
def world(tmp_path_factory, script):
    """A tiny base, data, and a finished run."""
    folder = tmp_path_factory.mktemp("world")
    lines = [{"prompt": f"item {i}", "completion": f"text {i % 7} of {i}"} for i in range(40)]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    tokenizer = data.Tokenizer.train([line[k] for line in lines for k in line], 300)
    torch.manual_seed(0)
    (folder / "base").mkdir()
    checkpoint.save_base(GPT(tiny("gpt2", vocab_size=tokenizer.vocab_size)), folder / "base")
    tokenizer.save(folder / "base")
    done = script("train.py", "--base", "base", "--data", "data.jsonl", "--out_dir", "run", "--rank", 2, *SHORT, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def here(world, tmp_path):
    """A copy of it that a test may spoil."""
    shutil.copytree(world, tmp_path / "w")
    return tmp_path / "w"


def tree(folder):
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file() and p.name != ".lock"}


@pytest.fixture
def refuse(refused, here):
    """Runs a command in the spoiled world; it must say so in one line, exit 2 and change nothing. Returns the line."""
    def run(*args, **kwargs):
        before = tree(here)
        line = refused(*args, cwd=here, **kwargs)
        assert tree(here) == before
        return line
    return run


def change(path, edit):
    """Edits the content of one of our files and writes it with a right checksum."""
    content = files.read_file(path)
    edit(content)
    files.save_file(path, content)


TRAIN = ["train.py", "--base", "base", "--data", "data.jsonl", "--out_dir", "new", *SHORT]
SAMPLE = ["sample.py", "run", "--max_new_tokens", 3]
RESUME = ["train.py", "--resume", "run", "--max_iters", 6]


def test_01_checkpoint_missing(refuse, here):
    for name in ("state.pt", "state.before.pt"):
        (here / "run" / name).unlink()
    assert "run: has no state.pt to resume from" in refuse(*RESUME)
    (here / "run" / "adapter.pt").unlink()
    assert "run/adapter.pt: No such file" in refuse(*SAMPLE)
    assert "gone.jsonl: No such file" in refuse("evaluate.py", "--results", "gone.jsonl")


def test_02_checkpoint_truncated(refuse, here, script):
    (here / "run" / "adapter.pt").write_bytes((here / "run" / "adapter.pt").read_bytes()[:-100])
    assert "adapter.pt: truncated, damaged or not a file" in refuse(*SAMPLE)
    (here / "run" / "state.pt").write_bytes((here / "run" / "state.pt").read_bytes()[:5000])
    done = script(*RESUME, cwd=here)                             # the one before it is taken, with a warning
    assert done.returncode == 0 and "going on from state.before.pt" in done.stderr and "resumed    at step 2" in done.stdout
    (here / "run" / "adapter.pt").write_bytes(b"")


def test_03_a_flipped_bit(refuse, here):
    raw = bytearray((here / "run" / "adapter.pt").read_bytes())
    raw[len(raw) // 2] ^= 4
    (here / "run" / "adapter.pt").write_bytes(raw)
    assert "its checksum is wrong" in refuse(*SAMPLE)


class Payload:
    def __reduce__(self):
        return Path.touch, (Path("payload_ran"),)


def test_04_a_pickle_payload(refuse, here):
    files.save_file(here / "run" / "adapter.pt", {"format": 1, "kind": "adapter", "tensors": Payload()})
    assert "adapter.pt" in refuse(*SAMPLE)
    (here / "base" / "model.safetensors").unlink()
    torch.save({"transformer.wte.weight": Payload()}, here / "base" / "pytorch_model.bin")
    assert "pytorch_model.bin" in refuse(*TRAIN)
    assert not (here / "payload_ran").exists()


def drill(here, kills, seed):
    """The steps of the states that tests/kill_drill.py resumed from."""
    done = subprocess.run([sys.executable, ROOT / "tests" / "kill_drill.py", str(kills), str(seed), "--base", "base", "--data", "data.jsonl", *map(str, SHORT)],
                          cwd=here, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    steps = json.loads(done.stdout)
    assert len(steps) == kills and all(a < b for a, b in zip(steps, steps[1:]))
    return steps


def test_05_kill_while_saving(here):
    assert drill(here, 20, 0)[-1] >= 20


@pytest.mark.slow
def test_05_two_hundred_kills(here):
    assert drill(here, 200, 1)[-1] >= 200


def test_06_disk_full(here, script):
    before = tree(here / "run")
    done = script(*RESUME, cwd=here, limit=("RLIMIT_FSIZE", 10_000))     # adapter.pt and state.pt are larger
    assert done.returncode == 2 and "cannot be written: File too large" in done.stderr and len(done.stderr.strip().splitlines()) == 1
    after = tree(here / "run")
    assert all(after[name] == before[name] for name in before if name.suffix == ".pt" and name.name != "state.before.pt") and not [p for p in after if p.suffix == ".tmp"]


@pytest.mark.slow
def test_06_disk_full_at_every_write(here, script):
    for n in range(0, 60_000, 1500):
        before = tree(here / "run")
        done = script("train.py", "--resume", "run", "--max_iters", 8, cwd=here, limit=("RLIMIT_FSIZE", n))
        after = tree(here / "run")
        assert not [p for p in after if p.suffix == ".tmp"] and files.read_file(here / "run" / "state.pt") and peft.read_adapter(here / "run" / "adapter.pt")
        assert done.returncode in (0, 2) and len(before) <= len(after)


def test_07_folder_that_cannot_be_written(refuse):
    assert "/proc/nanopeft" in refuse("train.py", "--base", "base", "--data", "data.jsonl", "--out_dir", "/proc/nanopeft")


def test_08_leftover_temporary_files(here, script):
    for name in (".state.pt.77.tmp", ".adapter.pt.77.tmp", "state.link"):
        (here / "run" / name).write_bytes(b"half")
    done = script(*RESUME, cwd=here)
    assert done.returncode == 0 and "resumed    at step 4" in done.stdout


def test_09_missing_and_extra_keys(refuse, here):
    def edit(c):
        c["tensors"]["blocks.9.attn.q.A"] = c["tensors"].pop("blocks.0.attn.q.A")
    change(here / "run" / "adapter.pt", edit)
    assert "lacks 1 tensors: blocks.0.attn.q.A" in refuse(*SAMPLE)


def test_10_wrong_shape(refuse, here):
    change(here / "run" / "adapter.pt", lambda c: c["tensors"].update({"blocks.0.attn.q.A": torch.zeros(32, 2)}))
    assert "blocks.0.attn.q.A has shape (32, 2); here it is (2, 32)" in refuse(*SAMPLE)


def test_11_wrong_dtype(refuse, here):
    change(here / "run" / "adapter.pt", lambda c: c["tensors"].update({"blocks.0.attn.q.A": torch.zeros(2, 32).bfloat16()}))
    assert "blocks.0.attn.q.A is torch.bfloat16; it must be torch.float32" in refuse(*SAMPLE)


def test_12_not_finite(refuse, here):
    change(here / "run" / "adapter.pt", lambda c: c["tensors"]["blocks.0.attn.q.A"][0, 0].fill_(math.nan))
    assert "blocks.0.attn.q.A holds NaN or infinity" in refuse(*SAMPLE)


def test_13_adapter_on_the_wrong_base(refuse, here):
    tensors = dict(files.read_tensors(here / "base"))
    tensors["transformer.h.1.mlp.c_fc.bias"] += 1
    files.write_safetensors(here / "base" / "model.safetensors", files.entries_of(tensors))
    assert "made for the base" in refuse(*SAMPLE)
    assert "the base has changed since that run" in refuse(*RESUME)


def test_14_another_rank(refuse, here):
    path = here / "run" / "config.toml"
    for key, old, new in (("rank", "2", "3"), ("alpha", "16.0", "8.0"), ("targets", '"all"', '"q,v"')):
        was = path.read_text()
        path.write_text(was.replace(f"\n{key} = {old}\n", f"\n{key} = {new}\n"))
        assert f"{key} was " in refuse(*RESUME)
        path.write_text(was)


def test_15_optimizer_state_that_does_not_fit(refuse, here):
    for name in ("state.pt", "state.before.pt"):
        change(here / "run" / name, lambda c: c["optimizer"]["state"][0].update(exp_avg=torch.zeros(3)))
    assert "its optimizer state does not fit the trained tensors" in refuse(*RESUME)


def test_16_random_state_missing(refuse, here):
    change(here / "run" / "state.pt", lambda c: c["rng"].pop("cpu"))
    assert "lacks the state of the random generator" in refuse(*RESUME)


def test_17_newer_format(refuse, here):
    change(here / "run" / "adapter.pt", lambda c: c.update(format=peft.FORMAT + 1))
    assert f"format {peft.FORMAT + 1} is newer than this code's {peft.FORMAT}; update nanopeft" in refuse(*SAMPLE)


def test_18_resume_past_the_end(here, script):
    before = tree(here / "run")
    done = script("train.py", "--resume", "run", cwd=here)
    assert done.returncode == 0 and "resumed    at step 4" in done.stdout
    after = tree(here / "run")
    assert all(after[Path(name)] == before[Path(name)] for name in ("adapter.pt", "state.pt", "log.jsonl"))


def test_19_data_changed(refuse, here):
    (here / "data.jsonl").write_text((here / "data.jsonl").read_text().replace("text 3 of 3\"", "text 3 of three\""))
    assert "the data has changed since that run" in refuse(*RESUME)


def test_20_batch_or_accumulation_changed(refuse):
    assert "batch_size was 4 and cannot become 8 in a resumed run" in refuse(*RESUME, "--batch_size", 8)
    assert "gradient_accumulation_steps was 1 and cannot become 2" in refuse(*RESUME, "--gradient_accumulation_steps", 2)


def test_21_two_writers(refuse, here):
    with open(here / "run" / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another process is writing there" in refuse(*RESUME)


def test_22_paths_that_climb(refuse, here):
    (here / "base" / "model.safetensors").rename(here / "model.safetensors")
    (here / "base" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}}))
    assert "'../model.safetensors' leads out of the folder" in refuse(*TRAIN)


@pytest.mark.parametrize("name", ["data.jsonl", "data.csv"])
def test_23_empty_data(refuse, here, name):
    (here / name).write_text("")
    assert f"{name}: the file is empty" in refuse(*TRAIN, "--data", name)


@pytest.mark.parametrize("name, content, words", [("data.jsonl", b'{"prompt": "a", "completion": "b"}\n\xff\n', "line 2: byte 0xff is not UTF-8"),
                                                  ("data.jsonl", b'{"prompt": "a", "completion": "b"}\n{"x"\n', "line 2: not JSON"),
                                                  ("data.csv", b"mr,ref\n\xff,text\n", "line 2: byte 0xff is not UTF-8")])
def test_24_bad_text(refuse, here, name, content, words):
    (here / name).write_bytes(content)
    assert words in refuse(*TRAIN, "--data", name)


def test_25_token_beyond_the_vocabulary(refuse, here):
    torch.manual_seed(0)
    checkpoint.save_base(GPT(tiny("gpt2", vocab_size=40)), here / "base")
    assert "is beyond the vocabulary of 40" in (line := refuse(*TRAIN)) and "at index" in line


def test_26_nothing_supervised(here, script):
    more = [json.dumps({"prompt": f"item {i} " * 60, "completion": "text"}) for i in range(9)]      # more than the val and test splits take
    (here / "data.jsonl").write_text("\n".join([(here / "data.jsonl").read_text(), *more]))
    done = script(*TRAIN, "--too_long", "cut", cwd=here)
    assert done.returncode == 0 and re.search(r", \d empty ones skipped", done.stdout)


def test_27_too_long(refuse, here, script):
    more = [json.dumps({"prompt": f"item {i} again", "completion": "text 1 of 2 " * 60}) for i in range(9)]
    (here / "data.jsonl").write_text("\n".join([(here / "data.jsonl").read_text(), *more]))
    assert "block_size is 48; raise it, or set too_long to cut" in refuse(*TRAIN)
    done = script(*TRAIN, "--too_long", "cut", cwd=here)
    assert done.returncode == 0 and re.search(r", \d cut", done.stdout)


def test_28_partial_accumulation_is_weighted_by_tokens():
    from test_train import batch, lora_model
    tokens, targets = batch(7)
    losses = []
    for n in (7, 3, 1):                                          # 7; 3 + 3 + 1; seven of 1
        model = lora_model()
        losses.append(float(run.step(model, run.make_optimizer(model, Config()), list(zip(tokens.split(n), targets.split(n))), 0.0)[0]))
    assert max(losses) - min(losses) < 1e-5


def test_29_prompt_as_long_as_the_context(refuse):
    assert "prompt takes 48 of the 48 positions" in refuse(*TRAIN, "--method", "prompt", "--prompt_length", 48)
    assert "prefix takes 48 of the 48 positions" in refuse(*TRAIN, "--method", "prefix", "--prefix_style", "after", "--prefix_length", 48)
    assert "prefix_length is 48" in refuse(*TRAIN, "--method", "prefix", "--prefix_length", 48)


def test_30_not_finite_weight(refuse, here):
    tensors = dict(files.read_tensors(here / "base"))
    tensors["transformer.h.1.mlp.c_fc.weight"][3, 3] = math.inf
    files.write_safetensors(here / "base" / "model.safetensors", files.entries_of(tensors))
    assert "transformer.h.1.mlp.c_fc.weight holds NaN or infinity" in refuse(*TRAIN)


@pytest.mark.parametrize("scheme", quant.CODES)
def test_31_zero_and_denormal_blocks(scheme):
    zero = quant.quantize(torch.zeros(3, 64), scheme).dequantize()
    assert torch.isfinite(zero).all() and (zero.abs().max() == 0)
    tiny_ = quant.quantize(torch.full((2, 64), 1e-44), scheme).dequantize()
    assert torch.isfinite(tiny_).all() and torch.equal(tiny_, torch.full((2, 64), 1e-44))


@pytest.mark.parametrize("shape", [(7,), (3, 37), (1,), (5, 13, 3)])
def test_32_partial_blocks_and_odd_counts(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for scheme in quant.CODES:
        q = quant.quantize(x, scheme, 16, True)
        widest = torch.tensor(quant.CODES[scheme].levels).sort().values.diff().max()
        assert q.dequantize().shape == x.shape and (q.dequantize() - x).abs().max() < (widest / 2 + 0.048) * x.abs().max()
        assert torch.equal(quant.QuantizedTensor(*q.meta, *q.tensors().values()).dequantize(), q.dequantize())


@pytest.mark.parametrize("flags, words", [("--quant nf4 --quant_block 48", "block is 48"), ("--quant nf5", "unknown scheme 'nf5'"), ("--dtype float64", "dtype is 'float64'"),
                                          ("--quant nf4 --quant_skip q,k,v,out,up,down", "leaves no layer to quantize"), ("--quant nf4 --quant_skip x", "no linear layer 'x'")])
def test_33_bad_quantization(refuse, flags, words):
    assert words in refuse(*TRAIN, *flags.split())


def test_34_lengths_that_disagree():
    q = quant.quantize(torch.randn(4, 64), "nf4")
    for name, value in (("packed", q.packed[:-1]), ("absmax", q.absmax[:-1]), ("shape", torch.Size([2**30, 2**30]))):
        with pytest.raises(ValueError, match="holds .* values; nf4 of shape .* needs"):
            dataclasses.replace(q, **{name: value})


def test_35_losses_that_are_not_finite(here, refused):
    tensors = dict(files.read_tensors(here / "base"))
    for name, t in tensors.items():
        t.mul_(1e30 if "wte" in name else 1)
    files.write_safetensors(here / "base" / "model.safetensors", files.entries_of(tensors))
    line = refused(*TRAIN, "--max_iters", 30, cwd=here)
    assert "ten steps in a row had no finite loss or gradient; the last batch is in new/bad_batch.pt" in line
    assert files.read_file(here / "new" / "bad_batch.pt")["step"] == 10
    assert len([l for l in (here / "new" / "log.jsonl").read_text().splitlines()]) >= 10


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_36_a_gpu_that_is_not_there(refuse):
    assert "device is 'cuda', but there are 0 GPUs here" in refuse(*TRAIN, "--device", "cuda")


def test_37_out_of_memory(here, script):
    done = script(*TRAIN, "--batch_size", "60000", cwd=here, limit=("RLIMIT_AS", 2**31))
    assert done.returncode == 2 and "out of memory at batch_size 60000; try --batch_size 30000 --gradient_accumulation_steps 2" in done.stderr, (done.stdout, done.stderr)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_38_interrupts(here, number):
    command = [sys.executable, ROOT / "train.py", *map(str, TRAIN[1:]), "--max_iters", "1000000", "--eval_interval", "1000000", "--log_interval", "1"]
    process = subprocess.Popen(command, cwd=here, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    next(line for line in process.stdout if re.match(r"step +\d+/", line))
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "python train.py --resume new goes on" in out and "once more to stop at once" in err
    assert files.read_file(here / "new" / "state.pt")["progress"]["step"] >= 1


def test_38_a_second_interrupt_ends_at_once():
    code = "import signal, time; from lib import run; run.Interrupt(); print('ready', flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    process.stderr.readline(), process.stderr.readline()         # it has been heard
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == -signal.SIGTERM
    process.communicate()


@pytest.mark.parametrize("flags, words", [("--targets gate", "no layer 'gate'; this model has q k v out up down"), ("--learning_rate -1", "learning_rate is -1.0"), ("--learning_rate nan", "learning_rate is nan"), ("--learning_rate 0", "it must be at least 1e-30"),
                                          ("--rank 0", "rank is 0; it must be at least 1"), ("--method nothing", "unknown method 'nothing'")])
def test_39_nothing_to_train(refuse, flags, words):
    assert words in refuse(*TRAIN, *flags.split())


def test_40_merging_twice(refuse, here, monkeypatch):
    monkeypatch.chdir(here)
    model = checkpoint.load_base(here / "base")
    peft.load_adapter(model, here / "run" / "adapter.pt")
    peft.merge(model)
    with pytest.raises(ValueError, match="the model is merged already"):
        peft.merge(model)
    hub.merge_run(here / "run", here / "merged")
    assert "merged: holds something already" in refuse("hub.py", "merge", "run", "merged")


class Stop(Exception):
    """An end of a run that no program can see coming."""


@pytest.fixture
def stopped(here, monkeypatch):
    """stopped(n, *flags): a run in "new" whose process ends at its step n, as by a kill, or by `error`."""
    monkeypatch.chdir(here)

    def stop(n, *flags, error=Stop):
        steps = iter(range(n))

        def step(*args):
            if next(steps, None) is None:
                raise error("out of memory" if error is MemoryError else "no more")
            return run.step(*args)
        with monkeypatch.context() as patch:
            patch.setattr(train, "step", step)
            with pytest.raises((error, ValueError)) as raised:
                train.train(command_line([*map(str, (*TRAIN[1:], *flags))]))
        return str(raised.value)
    return stop


def interrupt(monkeypatch, after, *flags):
    """A run in "new" that is asked to end after that many steps."""
    counting = type("Counting", (), {"asks": 0, "asked": property(lambda self: setattr(self, "asks", self.asks + 1) or self.asks > after)})
    with monkeypatch.context() as patch:
        patch.setattr(train, "Interrupt", counting)
        train.train(command_line([*map(str, (*TRAIN[1:], *flags))]))


@pytest.mark.parametrize("error", [Stop, MemoryError])
def test_41_a_run_that_stops_at_once(here, stopped, script, error):
    stopped(0, error=error)
    assert files.read_file(here / "new" / "state.pt")["progress"]["step"] == 0 and peft.read_adapter(here / "new" / "adapter.pt")
    resumed, whole = script("train.py", "--resume", "new", cwd=here), script(*TRAIN, "--out_dir", "whole", cwd=here)
    assert resumed.returncode == whole.returncode == 0, resumed.stderr
    one, two = (peft.read_adapter(here / name / "adapter.pt")["tensors"] for name in ("new", "whole"))
    assert all(torch.equal(t, two[n]) for n, t in one.items())


def test_41_no_step_at_all(here, script):
    done = script(*TRAIN, "--max_iters", 0, cwd=here)
    metrics = json.loads((here / "new" / "metrics.json").read_text())
    assert done.returncode == 0 and metrics["steps"] == 0 and metrics["val_loss"] == metrics["loss_before"] > 0
    assert script("sample.py", "new", "--prompt", "item", "--max_new_tokens", 2, cwd=here).returncode == 0


def test_41_an_interruption_before_the_first_evaluation(here, monkeypatch, capsys):
    monkeypatch.chdir(here)
    interrupt(monkeypatch, 1)
    assert "adapter.pt is untrained yet" in capsys.readouterr().out
    assert files.read_file(here / "new" / "state.pt")["progress"]["step"] == 1 and peft.read_adapter(here / "new" / "adapter.pt")


def test_42_advice_leads_somewhere(refuse, here, stopped, script):
    """Each command that a message names works; none is named that does not."""
    line = stopped(1, "--batch_size", 8, error=MemoryError)
    assert "try --batch_size 4 --gradient_accumulation_steps 2 with another --out_dir or --resume new --checkpointing" in line
    assert script("train.py", "--resume", "new", "--checkpointing", cwd=here).returncode == 0
    done = Config(batch_size=1, checkpointing=True)
    assert run.what_needs_less(done, here / "new") == run.what_needs_less(done, here / "nowhere") == ["a base in fewer bits (--quant nf4) or shorter sequences (--block_size)"]
    assert "--resume new goes on with it up to its 4 steps" in refuse(*TRAIN)
    for name in ("state.pt", "state.before.pt"):
        (here / "new" / name).unlink()
    for command in (TRAIN, ["train.py", "--resume", "new"]):
        assert "--init_from new starts a new run from its adapter" in (line := refuse(*command)) and "--resume new" not in line
    assert script(*TRAIN, "--init_from", "new", "--out_dir", "other", cwd=here).returncode == 0
    (here / "new" / "adapter.pt").unlink()
    assert "nothing in it to go on with" in refuse(*TRAIN)


def test_43_an_interrupted_run_that_is_resumed_past_its_end(here, script, monkeypatch):
    monkeypatch.chdir(here)
    interrupt(monkeypatch, 3, "--max_iters", 8, "--eval_interval", 8)
    done = script("train.py", "--resume", "new", "--max_iters", 3, cwd=here)
    metrics, state = json.loads((here / "new" / "metrics.json").read_text()), files.read_file(here / "new" / "state.pt")
    assert done.returncode == 0 and metrics["steps"] == 3 and metrics["val_loss"] == state["progress"]["best"] < metrics["loss_before"]
    kept = peft.read_adapter(here / "new" / "adapter.pt")["tensors"]
    assert all(torch.equal(t, kept[n]) for n, t in state["tensors"].items())


def test_44_what_was_changed_is_remembered(refuse, here, script):
    before = read_toml(here / "run" / "config.toml")
    refuse(*RESUME, "--rank", 3)
    assert script(*RESUME, "--log_interval", 3, "--device", "cpu", cwd=here).returncode == 0
    assert read_toml(here / "run" / "config.toml") == before | {"max_iters": 6, "log_interval": 3, "device": "cpu"}
    done = script("train.py", "--resume", "run", cwd=here)
    assert done.returncode == 0 and "resumed    at step 6" in done.stdout and "step     6/6" not in done.stdout


def test_45_a_longer_schedule(here, script):
    done = script(*RESUME, cwd=here)
    rates = [json.loads(line)["lr"] for line in (here / "run" / "log.jsonl").read_text().splitlines() if '"lr"' in line]
    assert f"schedule   6 steps instead of 4: the learning rate was {rates[3]:.2e} at the last step and goes on at {rates[4]:.2e}" in done.stdout and rates[3] < rates[4]
    assert "schedule" not in script("train.py", "--resume", "run", cwd=here).stdout


@pytest.mark.parametrize("method, flag, value", [("ia3", "targets", "q"), ("ia3", "lora_plus_ratio", "4"), ("lora", "prompt_init", "a"), ("bitfit", "rank", "2"), ("lora", "quant_block", "32"), ("vera", "alpha", "1")])
def test_46_an_option_of_another_method(refuse, here, method, flag, value):
    line = refuse(*TRAIN, "--method", method, f"--{flag}", value)
    assert f"command line: {flag} is " in line and (f"the method is {method}" in line or "--quant says which" in line)
    (here / "flags.toml").write_text("rank = 2\n")
    assert "rank is an option of lora" in refuse("train.py", "flags.toml", *TRAIN[1:], "--method", "ia3")


def test_47_counts(here, script):
    flags = ["--method", "prefix", "--prefix_style", "after", "--prefix_length", 4, "--prefix_mlp", 8]
    done = script(*TRAIN, *flags, cwd=here)
    metrics, held = json.loads((here / "new" / "metrics.json").read_text()), peft.read_adapter(here / "new" / "adapter.pt")["parameters"]
    assert metrics["trainable"] > metrics["adapter_parameters"] == held == 2 * 2 * 4 * 32
    assert f"trained    {metrics['trainable']:,} of " in done.stdout and f"; the adapter keeps {held:,}" in done.stdout
    done = script(*TRAIN, "--lora_plus_ratio", 4, "--out_dir", "plus", cwd=here)
    steps = [entry for entry in map(json.loads, (here / "plus" / "log.jsonl").read_text().splitlines()) if "lr" in entry]
    assert "B of LoRA learns at 4 times the learning rate" in done.stdout and steps and all(entry["lr_B"] == 4 * entry["lr"] for entry in steps)
    done = script(*TRAIN, "--lora_plus_ratio", 1, "--out_dir", "plain", cwd=here)
    assert "LoRA+" not in done.stdout and "lr_B" not in (here / "plain" / "log.jsonl").read_text()
    done = script(*TRAIN, "--method", "prompt", "--prompt_length", 2, "--prompt_init", "item 3 text", "--out_dir", "prompt", cwd=here)
    assert re.search(r"prompt: 2 vectors before the input, from the first 2 of \d+ tokens", done.stdout)


def test_48_the_disk_fills_while_a_torn_state_is_replaced(here, script):
    folder = here / "run"
    whole = (folder / "state.before.pt").read_bytes()
    (folder / "state.pt").write_bytes((folder / "state.pt").read_bytes()[:5000])
    resume = "train.py", "--resume", "run", "--max_iters", 5
    full = script(*resume, cwd=here, limit=("RLIMIT_FSIZE", 30_000))                         # adapter.pt has room, state.pt has not
    assert full.returncode == 2 and "state.pt: cannot be written" in full.stderr
    assert (folder / "state.before.pt").read_bytes() == whole
    done = script(*resume, cwd=here)
    assert done.returncode == 0 and files.read_file(folder / "state.pt")["progress"]["step"] == 5
    with open(folder / "log.jsonl", "a") as log:                 # The disk was full in the middle of a line.
        log.write('{"step": 5, "lo')
    assert script("train.py", "--resume", "run", "--max_iters", 6, cwd=here).returncode == 0


def test_49_a_folder_with_something_else_in_it(refuse, here, script):
    (here / "new").mkdir()
    for name in ("thesis.tex", "config.json", "adapter.pt"):
        (here / "new" / name).write_text("work of years")
        assert f"new: holds something that is no run's: {name}" in refuse(*TRAIN)
        (here / "new" / name).unlink()
    (here / "new" / ".lock").touch()
    for name in ("state.pt", ".state.pt.77.tmp", "adapter.pt", "tokenizer.model"):          # A run was killed at its beginning.
        (here / "new" / name).write_bytes(b"half")
    assert script(*TRAIN, cwd=here).returncode == 0
    assert not (here / "new" / "state.before.pt").read_bytes() == b"half"


def test_50_two_first_runs(here, script):
    """Both pretrain out/base: the second waits for the first."""
    (here / "out" / "base").mkdir(parents=True)
    lock = open(here / "out" / "base" / ".lock", "w")
    fcntl.flock(lock, fcntl.LOCK_EX)

    def finish():
        shutil.copytree(here / "base", here / "out" / "base", dirs_exist_ok=True)
        lock.close()
    timer = threading.Timer(2, finish)
    timer.start()
    done = script("train.py", "--data", "data.jsonl", *SHORT, cwd=here)
    timer.join()
    assert done.returncode == 0 and "another process is writing out/base; waiting for it" in done.stdout and "base       out/base: 2 layers" in done.stdout


# -----------------------------------------------------------------------------
# exact resume: N steps in one go are k steps, an end, and N - k more


@pytest.mark.parametrize("method, flags", [("lora", ["--dropout", 0.3, "--gradient_accumulation_steps", 2, "--checkpointing"]), ("qlora", ["--dropout", 0.3]), ("full", []),
                                           ("prefix+ia3", []), ("adapter", ["--gradient_accumulation_steps", 2]), ("prompt+bitfit", ["--checkpointing"]), ("top", ["--top_k", 1])])
def test_exact_resume(here, method, flags, monkeypatch, capsys):
    monkeypatch.chdir(here)
    start = ["--base", "base", "--data", "data.jsonl", *SHORT, "--method", method, "--eval_interval", 3, *flags]
    run = lambda *args: train.train(command_line(list(map(str, args))))
    run(*start, "--out_dir", "whole", "--max_iters", 8)
    # the schedule looks at max_iters: an interruption, not a shorter run
    monkeypatch.setattr(train, "Interrupt", lambda: type("Soon", (), {"asked": property(lambda self: peft_steps() >= 5)})())
    peft_steps = lambda: sum('"lr"' in line for line in Path("parts/log.jsonl").read_text().splitlines()) if Path("parts/log.jsonl").exists() else 0
    run(*start, "--out_dir", "parts", "--max_iters", 8)
    monkeypatch.setattr(train, "Interrupt", lambda: type("Never", (), {"asked": False})())
    run("--resume", "parts")
    one, two = (files.read_file(here / name / "state.pt") for name in ("whole", "parts"))
    assert all(torch.equal(t, two["tensors"][n]) for n, t in one["tensors"].items())
    assert all(torch.equal(t, two["optimizer"]["state"][i][n]) for i, s in one["optimizer"]["state"].items() for n, t in s.items())
    assert len(one["rng"]["cpu"]) == 1 and torch.equal(*one["rng"]["cpu"], *two["rng"]["cpu"]) and one["data"] == two["data"]
    lines = [[{k: v for k, v in json.loads(line).items() if k in ("step", "loss", "lr", "grad_norm", "val_loss", "train_loss")} for line in (here / name / "log.jsonl").read_text().splitlines()]
             for name in ("whole", "parts")]
    assert lines[0] == lines[1]
    first, second = (peft.read_adapter(here / name / "adapter.pt")["tensors"] for name in ("whole", "parts"))
    assert all(torch.equal(t, second[n]) for n, t in first.items())


# -----------------------------------------------------------------------------
# mutants: every file that is read is refused in one line, or loads to the same values


def mutants(raw, n, seed):
    rng = random.Random(seed)
    for _ in range(n):
        b = bytearray(raw)
        kind = rng.randrange(4)
        if kind == 0 and b:
            b[rng.randrange(len(b))] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del b[rng.randrange(len(b) + 1):]
        elif kind == 2:
            i = rng.randrange(len(b) + 1)
            b[i:i] = rng.randbytes(rng.randrange(1, 9))
        elif b:
            i, k = rng.randrange(len(b)), rng.randrange(1, 64)
            b[i:i + k] = rng.randbytes(min(k, len(b) - i))
        yield bytes(b)


def read_quietly(read, path):
    """
    What reading gives, or None where it is refused with a ValueError of one line; anything else fails the test, and so does to
    allocate more than twice the file and 8 MB, touched or not.
    """
    start, unlimited = time.perf_counter(), resource.getrlimit(resource.RLIMIT_AS)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + 2 * path.stat().st_size + 2**23, unlimited[1]))
    try:
        return read(path)
    except ValueError as error:
        assert str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, unlimited)
        assert time.perf_counter() - start < 10
    return None


FILES = {   # kind: file in the world, and what reads it
    "adapter": ("run/adapter.pt", peft.read_adapter), "state": ("run/state.pt", files.read_file), "config": ("run/config.toml", lambda p: Config(**read_toml(p))),
    "config.json": ("base/config.json", lambda p: origin.read_config(p.parent)), "tokenizer": ("base/tokenizer.model", lambda p: data.Tokenizer.load(p)), "jsonl": ("data.jsonl", data.load),
    "safetensors": ("base/model.safetensors", lambda p: list(files.read_tensors(p))), "csv": ("data.csv", data.load), "peft": ("peft/adapter_config.json", lambda p: hub.from_peft(p.parent, origin.read_origin(p.parents[1] / "base")))}


def fuzz(here, kind, n, monkeypatch):
    monkeypatch.chdir(here)
    (here / "data.csv").write_text("mr,ref\n" + "\n".join(f'"name[A {i}], food[B]",A {i} serves B.' for i in range(12)) + "\n")
    if kind == "peft":
        hub.export(here / "run", here / "peft")
    name, read = FILES[kind]
    path = here / name
    raw, loaded = path.read_bytes(), 0
    assert read(path) is not None
    for mutant in mutants(raw, n, 0):
        path.write_bytes(mutant)
        loaded += read_quietly(read, path) is not None
    path.write_bytes(raw)
    assert read(path) is not None
    return loaded


@pytest.mark.parametrize("kind", FILES)
def test_a_hundred_mutants(here, kind, monkeypatch):
    loaded = fuzz(here, kind, 100, monkeypatch)
    assert kind not in ("adapter", "state") or loaded == 0       # checksummed: none of them passes


@pytest.mark.slow
@pytest.mark.parametrize("kind", FILES)
def test_two_thousand_mutants(here, kind, monkeypatch):
    fuzz(here, kind, 2000, monkeypatch)
