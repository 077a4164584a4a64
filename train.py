"""
Fine-tunes a model on little hardware. One process on a CPU or a GPU, or several:

    python train.py --method qlora --rank 8                   # no network, no files needed
    python train.py configs/e2e_lora.toml --seed 1            # a file first, flags after it win
    python train.py --method lora --quant int8 --base DIR --data DIR --out_dir out/x
    python train.py --resume out/x
    python train.py --method qlora --base DIR --dry_run       # parameters and memory, then stop
    torchrun --nproc_per_node=2 train.py ...                  # each a share of every batch; with --fsdp of the base as well

The run's folder then holds config.toml, log.jsonl, adapter.pt (the best by validation loss), the tokenizer, state.pt (the
last, for resuming), metrics.json and samples.txt.
"""

import dataclasses
import json
import math
import os
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from lib.config import FIELDS, Config, command_line, help_text, run_main, write_toml

if __name__ == "__main__":      # --help and mistakes answer here, before torch is imported
    if {"-h", "--help"} & set(sys.argv[1:]):
        sys.exit(run_main(lambda: print(help_text(__doc__), flush=True)))
    CONFIG = run_main(command_line, sys.argv[1:])

import torch

import data
import memory
import peft
from lib import checkpoint, machine
from lib.files import save_file, write_atomic
from lib.machine import (agree, anybody, compiled, gathered, peak, pick_device, pick_dtype, processes, resident, say, shard,
                         tune_memory)
from lib.run import (Interrupt, Log, attach, check_processes, evaluate, generators, learning_rate, load_base, make_optimizer, numbers_are_finite, offload,
                     only_writer, restore, run_folder, sample_text, snapshot, step, storage_by_type, storage_of)
from model import GPT

# -----------------------------------------------------------------------------
# what a run consists of

BASE = "out/base"

PRETRAIN = Config(method="full", base="new", data="plain", out_dir=BASE, max_iters=3600, learning_rate=2e-3, warmup_iters=100,
                  eval_interval=1200, eval_batches=10, weight_decay=0.1, beta2=0.95, sample_count=2)


def default_base():
    """Path of the small base, pretrained by this same code the first time that it is needed."""
    if not gathered(Path(BASE, "config.json").is_file())[0]:
        say(f"no --base given: a small one is pretrained once on the embedded text into {BASE}, about three minutes on 2 cores")
        half_done = Path(BASE, "state.pt").is_file()
        train(dataclasses.replace(PRETRAIN, resume=BASE if half_done else ""))
        if not Path(BASE, "config.json").is_file():
            sys.exit(0)                                          # interrupted, and saved
        say("")
    return BASE


def size(n):
    """Bytes for people: 1536 -> '1.5 kB' (powers of ten)."""
    for unit in ("B", "kB", "MB", "GB"):
        if n < 999.5 or unit == "GB":
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000


# -----------------------------------------------------------------------------
# the run


@dataclass
class Task:
    """What a configuration comes to: the base with its tokenizer, and the data as batches."""
    model: GPT
    tokenizer: data.Tokenizer
    corpus: data.Data
    encoded: dict               # split -> data.Encoded
    fingerprints: dict          # of base, data and tokenizer
    base_bytes: int

    @classmethod
    def of(cls, config, device):
        """Reads, checks and encodes all that the configuration names."""
        model, tokenizer = load_base(config, torch.device("cpu") if config.fsdp else device, getattr(torch, config.dtype))
        corpus = data.load(config.data)
        context = model.config.block_size
        taken = peft.virtual_positions(config.method, dataclasses.asdict(config))
        if taken >= context:
            raise ValueError(f"{config.method} takes {taken} of the {context} positions of the context and leaves none to the tokens")
        length = min(config.block_size or context, context - taken)
        encoded = {split: data.encode(getattr(corpus, split), tokenizer, length, config.template, config.too_long,
                                      vocab_size=model.config.vocab_size) for split in ("train", "val")}
        fingerprints = {"base": peft.fingerprint(model), "data": corpus.fingerprint, "tokenizer": tokenizer.fingerprint}
        agree(fingerprints)
        base_bytes = sum(storage_by_type(model).values())
        if config.fsdp:
            shard(model, device)
        return cls(model, tokenizer, corpus, encoded, fingerprints, base_bytes)

    def losses(self, config, splits=("train", "val")):
        """{"train_loss": .., "val_loss": ..}"""
        device = self.model.head.weight.device
        return {f"{split}_loss": evaluate(self.model, data.eval_batches(self.encoded[split], config.batch_size, config.eval_batches or None), device)
                for split in splits}

    def samples(self, config):
        """[(prompt, continuation)] of the first validation examples."""
        prompts = [data.format_prompt(example.prompt, config.template) for example in self.corpus.val[:config.sample_count]]
        return list(zip(prompts, sample_text(self.model, self.tokenizer, prompts))) if prompts else []


def describe(config, folder, task, report):
    """What the run is about to do."""
    counts, encoded = peft.count_parameters(task.model), task.encoded["train"]
    storage = ", ".join(f"{size(n)} {kind}" for kind, n in storage_by_type(task.model).items())
    c = task.model.config
    per_step = config.batch_size * config.gradient_accumulation_steps
    say(f"base       {config.base}: {c.n_layer} layers x {c.n_embd}, {counts['base']:,} parameters"
        + (f", linear layers in {config.quant}" if config.quant else ""),
        *(f"method     {line}" for line in report),
        f"trained    {counts['trainable']:,} of {counts['total']:,} parameters ({counts['trainable'] / counts['total']:.2%})",
        f"storage    {storage}{' in each process' * config.fsdp}; computed in {config.dtype} on {task.model.head.weight.device}",
        f"data       {config.data}: {len(task.corpus.train)} / {len(task.corpus.val)} / {len(task.corpus.test)} train / val / test, "
        f"{len(encoded.sequences)} training sequences, {encoded.n_supervised / max(encoded.n_tokens, 1):.0%} of tokens supervised"
        + (f", {encoded.n_cut} cut" if encoded.n_cut else "") + (f", {encoded.n_empty} empty ones skipped" if encoded.n_empty else ""),
        f"step       {per_step} sequences, about {per_step * encoded.n_tokens / max(len(encoded.sequences), 1):.0f} tokens; {config.max_iters} steps",
        *(["end        the base has never seen its own end token; texts end with its beginning-of-sequence token"] if config.base != "new" and data.Tokenizer.load(config.base).eos != task.tokenizer.eos else []),
        f"folder     {folder}")


def predict(task, config, device, shape):
    """memory.simulate of a step of micro-batches of that shape: the peak in bytes."""
    options = {name: getattr(config, name) for name in peft.DEFAULTS if name in FIELDS}
    return memory.simulate(task.model.config, config.method, *shape, getattr(torch, config.dtype), device.type, storage_of(config), config.checkpointing, config.gradient_accumulation_steps, config.grad_clip,
                           config.label_smoothing, config.offload, **options)["peak"]


@contextmanager
def measured(task, config, device, optimizer, micro_batches, i):
    """Says how much memory the step within took at its peak, and what was predicted for its shape."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        yield
        found = torch.cuda.max_memory_allocated() + memory.CUDA_CONTEXT
    else:
        with memory.Tracker(task.model, optimizer) as tracker:
            yield
        found = tracker.report()["peak"]
    shape = micro_batches[0][0].size(0), max(t.size(1) for t, _ in micro_batches)
    expected = predict(task, config, device, shape)
    say(f"memory     step {i + 1}, {shape[0]} x {shape[1]}: measured {size(found)}, predicted {size(expected)} (ratio {found / expected:.2f}); resident {size(resident())}")


def train(config):
    """Runs a configuration; returns the metrics, or None after --dry_run or an interruption."""
    check_processes(config)
    device = pick_device(config.device)
    if device.type == "cpu":
        tune_memory()
    elif device.index is not None:
        torch.cuda.set_device(device)
    config = dataclasses.replace(config, dtype=str(pick_dtype(config.dtype, device)).removeprefix("torch."))
    agree(dataclasses.asdict(config))
    folder = Path(gathered(str(run_folder(config)))[0])          # chosen before anybody writes
    with only_writer(folder) if machine.RANK == 0 and not config.dry_run else nullcontext():
        if not config.base:
            dry = config.dry_run and not Path(BASE, "config.json").is_file()
            config = dataclasses.replace(config, base="new" if dry else default_base())
        torch.manual_seed(config.seed)
        task = Task.of(config, device)
        progress = {"step": 0, "best": math.inf, "skipped": 0, "skipped_in_a_row": 0, "seconds": 0.0, "tokens": 0}
        if not config.resume and not config.dry_run:
            progress |= {"before": task.losses(config, ["val"])["val_loss"], "samples": task.samples(config)}
        report = attach(task.model, task.tokenizer, config)
        describe(config, folder, task, report)
        shape = config.batch_size // machine.WORLD_SIZE, int(data.padded(max(len(ids) - 1 for ids, _ in task.encoded["train"].sequences), task.encoded["train"].block_size))
        say(f"memory     {size(predict(task, config, device, shape))} predicted at the peak{' without fsdp' * config.fsdp}, for {shape[0]} x {shape[1]} tokens")
        task.model.checkpointing = config.checkpointing
        if config.compile and not compiled(task.model, device):
            say("compile    there is no compiler here; running without")
        if config.dry_run:
            return None
        optimizer = make_optimizer(task.model, config)
        batches = data.Batches(task.encoded["train"], config.batch_size // machine.WORLD_SIZE, config.seed, machine.RANK, machine.WORLD_SIZE)
        if config.resume:
            restore(folder, task.model, optimizer, batches, config, progress, task.fingerprints)
            say(f"resumed    at step {progress['step']}")
        elif machine.RANK == 0:
            task.tokenizer.save(folder)
            write_atomic(folder / "config.toml", write_toml(config).encode())
        done = loop(config, folder, device, task, optimizer, batches, progress)
        metrics = finish(config, folder, task, progress) if done and (machine.RANK == 0 or config.fsdp) else None
        gathered(None)                                           # nobody leaves before all is written
        return metrics


def loop(config, folder, device, task, optimizer, batches, progress):
    """Trains until max_iters (True) or until somebody asks for an end (False); saves either way."""
    interrupt, model, ended = Interrupt(), task.model, False
    log = Log(folder / "log.jsonl", progress["step"]) if machine.RANK == 0 else None
    torch.manual_seed(config.seed + machine.RANK) if not progress["step"] else None      # dropout differs between processes

    def save():
        rng = generators()
        if machine.RANK == 0:
            if (folder / "state.pt").is_file():
                (folder / "state.link").unlink(missing_ok=True)
                os.link(folder / "state.pt", folder / "state.link")
                os.replace(folder / "state.link", folder / "state.before.pt")
            save_file(folder / "state.pt", snapshot(model, optimizer, batches, config, progress, task.fingerprints, rng))
        gathered(None)                                           # a large state takes longer to write than a step may last

    def check():
        losses = task.losses(config)
        say(f"step {progress['step']}: train loss {losses['train_loss']:.4f}, val loss {losses['val_loss']:.4f}")
        if machine.RANK == 0:
            log.write(step=progress["step"], **losses)
            if losses["val_loss"] < progress["best"]:
                progress["best"] = losses["val_loss"]
                peft.save_adapter(model, folder / "adapter.pt")
        save()

    saving, taken = (lambda: offload(model)) if config.offload else nullcontext, 0
    model.train()
    while progress["step"] < config.max_iters and not (ended := anybody(interrupt.asked, device)):
        start, i = time.perf_counter(), progress["step"]
        lr = learning_rate(config, i)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["ratio"]
        micro_batches = [tuple(t.to(device) for t in next(batches)) for _ in range(config.gradient_accumulation_steps)]
        watched = machine.RANK == 0 and not config.compile and not config.fsdp and (not taken or i + 1 == config.max_iters)
        with measured(task, config, device, optimizer, micro_batches, i) if watched else nullcontext():
            loss, norm = (float(t) for t in step(model, optimizer, micro_batches, config.grad_clip, config.label_smoothing, saving=saving))
        taken += 1
        seconds, tokens = time.perf_counter() - start, sum(t.numel() for t, _ in micro_batches) * machine.WORLD_SIZE
        progress.update(step=i + 1, seconds=progress["seconds"] + seconds, tokens=progress["tokens"] + tokens)
        skip_or_stop(folder, progress, loss, norm, micro_batches)
        if log:
            log.write(step=i, loss=loss, lr=lr, grad_norm=norm, tokens_per_second=round(tokens / seconds), bytes=resident())
        if i % config.log_interval == 0 or i + 1 == config.max_iters:
            left = (config.max_iters - i - 1) * progress["seconds"] / (i + 1)
            say(f"step {i + 1:>5}/{config.max_iters} | loss {loss:.4f} | lr {lr:.2e} | {tokens / seconds:>7,.0f} tokens/s | "
                f"{size(resident())} | {left // 60:.0f}:{left % 60:02.0f} left")
        if (i + 1) % config.eval_interval == 0 or i + 1 == config.max_iters:
            check()
        elif config.save_interval and (i + 1) % config.save_interval == 0:
            save()
    if ended:
        save()
        say(f"interrupted after step {progress['step']}; python train.py --resume {folder} goes on")
    return not ended


def skip_or_stop(folder, progress, loss, norm, micro_batches):
    """Counts steps whose loss or gradient was not finite; after ten in a row keeps the batch for a look, and gives up."""
    if numbers_are_finite(loss, norm):
        progress["skipped_in_a_row"] = 0
        return
    progress["skipped"] += 1
    progress["skipped_in_a_row"] += 1
    say(f"step {progress['step']}: loss {loss}, gradient norm {norm}: skipped")
    if progress["skipped_in_a_row"] == 10:
        all_batches = [pair for own in gathered([[t.cpu() for t in pair] for pair in micro_batches]) for pair in own]
        if machine.RANK == 0:
            save_file(folder / "bad_batch.pt", {"step": progress["step"], "batches": all_batches})
        raise ValueError(f"ten steps in a row had no finite loss or gradient; the last batch is in {folder / 'bad_batch.pt'}, the last good state in state.pt")


def finish(config, folder, task, progress):
    """Best adapter, samples, metrics, and what to do next."""
    peft.load_adapter(task.model, folder / "adapter.pt", replace=True)
    if config.base == "new":
        checkpoint.save_base(task.model, folder)
    after = task.samples(config)
    if machine.RANK:
        return None                                              # under fsdp: it was needed for the samples
    text = "\n".join(f"prompt: {prompt}\nbefore: {old}\nafter:  {new}\n" for (prompt, old), (_, new) in zip(progress["samples"], after))
    write_atomic(folder / "samples.txt", text.encode())
    metrics = {"method": config.method, "seed": config.seed, "trainable": peft.count_parameters(task.model)["trainable"],
               "loss_before": progress["before"], "val_loss": progress["best"], "steps": progress["step"], "skipped": progress["skipped"],
               "seconds": round(progress["seconds"], 2), "tokens_per_second": round(progress["tokens"] / max(progress["seconds"], 1e-9)),
               "peak_bytes": peak(), "adapter_bytes": (folder / "adapter.pt").stat().st_size, "base_bytes": task.base_bytes}
    write_atomic(folder / "metrics.json", (json.dumps(metrics, indent=1) + "\n").encode())
    say("", text, f"val loss   {progress['before']:.4f} -> {progress['best']:.4f}" + (f"; {progress['skipped']} steps skipped" if progress["skipped"] else ""),
        f"adapter    {folder / 'adapter.pt'}, {size(metrics['adapter_bytes'])}; the base takes {size(task.base_bytes)}",
        f"peak       {size(metrics['peak_bytes'])}",
        f"next       python sample.py {folder} --prompt {json.dumps(task.corpus.val[0].prompt, ensure_ascii=False)}")
    return metrics


def main(config):
    """Trains among the processes there are; running out of memory becomes a ValueError that names the next thing to try."""
    try:
        with processes(pick_device(config.device)):
            train(config)
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        less = max(config.batch_size // machine.WORLD_SIZE // 2, 1) * machine.WORLD_SIZE
        raise ValueError(f"out of memory at batch_size {config.batch_size}; try --batch_size {less} --gradient_accumulation_steps {config.gradient_accumulation_steps * 2}"
                         + ("" if config.batch_size > machine.WORLD_SIZE else " --checkpointing") + "; the last saved state is intact") from None


if __name__ == "__main__":
    run_main(main, CONFIG)
