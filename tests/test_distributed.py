"""
Several processes, over gloo on the CPU: the same curve by one, two and four, with DDP and with FSDP2; what they send and hold;
resuming; what they refuse; the loss of one.

    python -m pytest -q tests/test_distributed.py

A process takes seconds to start, so all runs of one number of processes share one launch of this file (`work`); the tests look
at what it left. What concerns the ends of processes runs the real command under torchrun.
"""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch

import peft
import train
from conftest import ROOT, tiny
from lib import checkpoint, files, machine, run
from lib.config import command_line

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
ENV = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
COMMON = "--data data.jsonl --max_iters 8 --batch_size 8 --eval_interval 4 --eval_sequences 16 --warmup_iters 1 --sample_count 1 --dtype float32 --device cpu".split()
METHODS = {"lora": ["--base", "llama", "--method", "lora", "--rank", "2", "--quant", "nf4"],
           "dora": ["--base", "llama", "--method", "dora", "--rank", "2", "--quant", "nf4"],
           "vera": ["--base", "gpt2", "--method", "vera", "--rank", "2"],
           "dense": ["--base", "gpt2", "--method", "adapter+prefix", "--adapter_size", "4", "--checkpointing", "--gradient_accumulation_steps", "2"]}

# -----------------------------------------------------------------------------
# in every process


class Interrupt:
    """Asks the last process, and no other, for an end after some steps."""
    after = steps = None

    @property
    def asked(self):
        return machine.RANK == machine.WORLD_SIZE - 1 and self.after is not None and Interrupt.steps >= self.after


def counted(function, note):
    def call(*args, **kwargs):
        note(*args)
        return function(*args, **kwargs)
    return call


def work(jobs):
    """Runs the jobs one after another in one process group, and writes what this process saw: {job: {"sent", "held", "error"}}."""
    torch.set_num_threads(1)                                     # conftest's two, in four processes on two cores, would wait for each other
    seen, home = {}, os.getcwd()
    all_reduce, step, finish = torch.distributed.all_reduce, train.step, train.finish
    train.Interrupt, train.predict = Interrupt, lambda *_: 1      # (a prediction takes a second)
    run.SMALL = tiny("gpt2", vocab_size=300)
    with machine.processes(torch.device("cpu")):
        for job in jobs:
            saw = seen[job["name"]] = {"sent": 0, "held": [], "error": ""}
            hold = lambda a_run: saw["held"].append(run.storage_by_type(a_run.model))
            torch.distributed.all_reduce = counted(all_reduce, lambda t: saw.update(sent=saw["sent"] + t.numel() * t.element_size()))
            train.step = counted(step, lambda *_: setattr(Interrupt, "steps", Interrupt.steps + 1))
            train.finish = counted(finish, hold)
            Interrupt.after, Interrupt.steps = job.get("after"), 0
            other = machine.RANK == 1 and job.get("other") or {}
            os.chdir(other.get("folder", home))
            try:
                config = command_line(job["args"] + other.get("args", []))
                train.PRETRAIN = dataclasses.replace(config, method="full", base="new", data="data.jsonl", out_dir=str(train.BASE))
                with mock.patch.object(train, "describe", counted(train.describe, lambda a_run, report: hold(a_run))):
                    train.train(config)
            except ValueError as error:
                saw["error"] = str(error)
    Path(home, f"seen.{machine.WORLD_SIZE}.{machine.RANK}.json").write_text(json.dumps(seen))


# -----------------------------------------------------------------------------
# the launches


def make_base(folder, family, tokenizer, seed=0):
    from model import GPT
    torch.manual_seed(seed)
    folder.mkdir(parents=True)
    checkpoint.save_base(GPT(tiny(family, vocab_size=tokenizer.vocab_size, n_layer=3)), folder)
    tokenizer.save(folder)


def launch(folder, n, jobs):
    """-> what each of n processes saw, by rank"""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [*TORCHRUN, f"--nproc_per_node={n}"] if n > 1 else [sys.executable]
    done = subprocess.run([*command, __file__, "jobs.json"], cwd=folder, env=ENV, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads((folder / f"seen.{n}.{rank}.json").read_text()) for rank in range(n)]


def job(name, *args, **more):
    return {"name": name, "args": [*args, *COMMON, "--out_dir", name]} | more


def resume(name, *args):
    return {"name": f"{name} again", "args": ["--resume", name, *args]}


def curves(n, *flags):
    return [job(f"{method}{n}{''.join(flags)}", *chosen, *flags) for method, chosen in METHODS.items()]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Two tiny bases and data."""
    import data
    folder = tmp_path_factory.mktemp("world")
    lines = [{"prompt": f"item {i}", "completion": f"text {i % 7} of {i}"} for i in range(60)]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    tokenizer = data.Tokenizer.train([line[k] for line in lines for k in line], 300)
    for family in ("llama", "gpt2"):
        make_base(folder / family, family, tokenizer)
    make_base(folder / "elsewhere" / "llama", "llama", tokenizer, seed=1)
    shutil.copy(folder / "data.jsonl", folder / "elsewhere")
    return folder


@pytest.fixture(scope="module")
def two(world):
    lora = METHODS["lora"]
    dropout = [*lora, "--dropout", "0.3", "--gradient_accumulation_steps", "2"]
    seen = launch(world, 2, [*curves(2), *curves(2, "--fsdp"),
                             job("whole", *dropout), job("parts", *dropout, "--fsdp", after=5), resume("parts", "--fsdp", "false"),
                             job("moved", *lora, "--fsdp", after=4),
                             job("config", *lora, other={"args": ["--rank", "3"]}), job("base", *lora, "--fsdp", other={"folder": "elsewhere"}),
                             job("taken", *lora, "--fsdp") | {"args": [*lora, *COMMON, "--out_dir", "whole"]},
                             job("pretrained", "--method", "lora") | {"args": ["--method", "lora", *COMMON]}])
    for n in (1, 4):
        shutil.copytree(world / "moved", world / f"moved{n}")
    return seen


@pytest.fixture(scope="module")
def four(world, two):
    return launch(world, 4, [*curves(4), *curves(4, "--fsdp"), resume("moved4")])


@pytest.fixture(scope="module")
def one(world, two):
    return launch(world, 1, [*curves(1), resume("moved1", "--fsdp", "false")])


def logged(folder):
    keys = "step", "loss", "lr", "grad_norm", "train_loss", "val_loss"
    return [{k: v for k, v in json.loads(line).items() if k in keys} for line in (folder / "log.jsonl").read_text().splitlines()]


def apart(a, b):
    """The largest difference of two logs."""
    a, b = logged(a), logged(b)
    assert [line.keys() for line in a] == [line.keys() for line in b] and sum("lr" in line for line in a) == 8
    return max(abs(x[k] - y[k]) for x, y in zip(a, b) for k in x)


# -----------------------------------------------------------------------------
# the same run


@pytest.mark.parametrize("method", METHODS)
def test_any_number_of_processes_gives_the_curve_of_one(world, one, two, four, method):
    for n in (2, 4):
        assert apart(world / f"{method}1", world / f"{method}{n}") < 1e-5
        assert apart(world / f"{method}1", world / f"{method}{n}--fsdp") < 1e-5
        assert logged(world / f"{method}{n}") == logged(world / f"{method}{n}--fsdp")          # to the bit
        assert (world / f"{method}{n}" / "samples.txt").read_text() == (world / f"{method}{n}--fsdp" / "samples.txt").read_text()
    assert {p.name for p in (world / f"{method}4--fsdp").iterdir()} == {p.name for p in (world / f"{method}1").iterdir()}


@pytest.mark.parametrize("method", METHODS)
def test_only_the_adapters_gradients_travel(world, two, four, method):
    """Beside them 4 bytes each a step: the loss, the number of supervised tokens, and whether somebody asks for an end."""
    for n, seen in ((2, two), (4, four)):
        parameters = peft.read_adapter(world / f"{method}{n}" / "adapter.pt")["parameters"]
        for flags in ("", "--fsdp"):
            assert [saw[f"{method}{n}{flags}"]["sent"] for saw in seen] == [8 * (4 * parameters + 12)] * n


def test_fsdp_holds_its_share_in_quantized_form(one, two, four):
    whole = one[0]["lora1"]["held"][0]["nf4"]
    offsets = 4 * 3 * 7                                          # one number a layer stays whole everywhere
    for n, seen in ((2, two), (4, four)):
        assert all(saw[f"lora{n}"]["held"][0]["nf4"] == whole for saw in seen)
        shares = [saw[f"lora{n}--fsdp"]["held"] for saw in seen]
        assert all(before == after for before, after in shares)  # nothing is left gathered after training
        shares = [before["nf4"] - offsets for before, _ in shares]
        assert sum(shares) == whole - offsets and max(shares) < 1.05 * whole / n


# -----------------------------------------------------------------------------
# resuming


def test_exact_resume_by_two_with_dropout(world, two):
    """Eight steps in one go are five with FSDP, an interruption that only one process noticed, and three without FSDP."""
    one, other = (files.read_file(world / name / "state.pt") for name in ("whole", "parts"))
    assert all(torch.equal(t, other["tensors"][name]) for name, t in one["tensors"].items())
    assert all(torch.equal(t, other["optimizer"]["state"][i][name]) for i, state in one["optimizer"]["state"].items() for name, t in state.items())
    assert one["data"] == other["data"] and len(one["rng"]["cpu"]) == 2
    assert all(map(torch.equal, one["rng"]["cpu"], other["rng"]["cpu"])) and not torch.equal(*one["rng"]["cpu"])
    assert logged(world / "whole") == logged(world / "parts")
    first, second = (peft.read_adapter(world / name / "adapter.pt")["tensors"] for name in ("whole", "parts"))
    assert all(torch.equal(t, second[name]) for name, t in first.items())


@pytest.mark.parametrize("n", [1, 4])
def test_a_run_of_two_goes_on_by_another_number(world, one, four, n):
    assert sum("lr" in line for line in logged(world / "moved")) == 4 and apart(world / "lora1", world / f"moved{n}") < 1e-5


# -----------------------------------------------------------------------------
# refusals


def test_processes_that_disagree(world, two):
    assert [saw["config"]["error"] for saw in two] == ["process 1 has rank 3, process 0 has 2; start all with the same"] * 2
    assert all(saw["base"]["error"].startswith("process 1 has base ") for saw in two)
    assert not (world / "config").exists()


def test_a_folder_that_holds_a_run(two):
    assert all(saw["taken"]["error"].startswith("whole: holds a run already") for saw in two)


def test_the_small_base_is_pretrained_once_by_all(world, two):
    assert not any(saw["pretrained"]["error"] for saw in two)
    assert (world / "out/base/config.json").is_file() and (world / "out/lora/metrics.json").is_file() and not (world / "out/lora-2").exists()


@pytest.mark.parametrize("n, flags, words", [
    (3, [], "batch_size is 8, which 3 processes cannot share equally; --batch_size 6 can be"), (32, [], "--batch_size 32 can be"),
    (1, ["--fsdp"], "but there is one; start it as torchrun --nproc_per_node=2"),
    (2, ["--fsdp", "--method", "lora+bitfit"], "but bitfit trains it"), (2, ["--fsdp", "--method", "full"], "but full trains it"),
    (2, ["--fsdp", "--compile"], "fsdp and compile do not go together"), (2, ["--fsdp", "--offload"], "fsdp and offload do not go together")])
def test_what_cannot_be_shared(monkeypatch, n, flags, words):
    monkeypatch.setattr(machine, "WORLD_SIZE", n)
    with pytest.raises(ValueError, match=words):
        train.train(command_line(flags))


def test_a_world_that_does_not_divide_the_batch(world):
    done = subprocess.run([*TORCHRUN, "--nproc_per_node=2", ROOT / "train.py", *METHODS["lora"], *COMMON, "--batch_size", "9", "--out_dir", "nine"],
                          cwd=world, env=ENV, capture_output=True, text=True, timeout=60)
    ours = [line for line in done.stderr.splitlines() if line.startswith("train.py, process")]
    assert ours and all("batch_size is 9, which 2 processes cannot share equally; --batch_size 8 can be" in line for line in ours)
    assert done.returncode and "exitcode  : 2" in done.stderr and not (world / "nine").exists()


# -----------------------------------------------------------------------------
# a process is lost


def child(process, rank):
    """The id of torchrun's child of that rank."""
    for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        if f"RANK={rank}" in Path(f"/proc/{pid}/environ").read_text().split("\0"):
            return int(pid)


@pytest.mark.skipif(not Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").exists(), reason="needs Linux's list of children")
def test_a_killed_process_ends_the_others_and_is_named(world, tmp_path):
    command = [*TORCHRUN, "--nproc_per_node=2", ROOT / "train.py", *METHODS["lora"], *COMMON, "--fsdp", "--max_iters", "1000000", "--eval_interval", "1000000",
               "--save_interval", "1", "--log_interval", "1", "--out_dir", "killed"]
    with open(tmp_path / "err", "w+") as err:
        process = subprocess.Popen(command, cwd=world, env=ENV, stdout=subprocess.PIPE, stderr=err, text=True)
        [next(line for line in process.stdout if line.startswith("step")) for _ in range(4)]     # "step  8 sequences", and three steps
        survivor, start = child(process, 0), time.monotonic()
        os.kill(child(process, 1), signal.SIGKILL)
        process.communicate(timeout=60)
        seconds = time.monotonic() - start
        err.seek(0)
        text = err.read()
    assert process.returncode and seconds < 60 and not Path(f"/proc/{survivor}").exists()
    assert "rank      : 1 (local_rank: 1)" in text and "Signal 9 (SIGKILL)" in text, text
    assert files.read_file(world / "killed" / "state.pt")["progress"]["step"] >= 2


if __name__ == "__main__":
    work(json.loads(Path(sys.argv[1]).read_text()))
