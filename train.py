"""
Fine-tunes a model on little hardware. One process on a CPU or a GPU, or several:

    python train.py --method qlora --rank 8                   # no network, no files needed
    python train.py configs/e2e_medium_lora.toml --seed 1     # a file first, flags after it win
    python train.py --method lora --quant int8 --base DIR --data DIR --out_dir out/x
    python train.py --resume out/x
    python train.py --init_from out/x --data DIR              # a new run from an adapter's tensors
    python train.py --method qlora --base DIR --dry_run       # parameters and memory, then stop
    torchrun --nproc_per_node=2 train.py ...                  # each a share of every batch; --fsdp: of the base too

The run's folder then holds config.toml, log.jsonl, adapter.pt (the best by validation loss), the tokenizer,
state.pt (the last, for resuming), metrics.json and samples.txt. The knobs are declared in lib/config.py, a
method's in peft.py.
"""

import dataclasses
import json
import math
import shlex
import sys
import time
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

from lib.config import Config, command_line, help_text, method_options, run_main

if __name__ == "__main__":      # --help and mistakes answer here, before torch is imported
    if {"-h", "--help"} & set(sys.argv[1:]):
        sys.exit(run_main(lambda: print(help_text(__doc__), flush=True)))
    CONFIG = run_main(command_line, sys.argv[1:])

import torch

import data
import hub
import memory
import peft
from lib import machine, model_folder
from lib.files import check, located, save_file, some, write_atomic
from lib.machine import say
from lib.report import size
from lib.run import (
    Interrupt, Log, attach_methods, check_processes, find_base, learning_rate, make_optimizer, make_scaler,
    numbers_are_finite, offload, only_writer, remember, resolved, restore, run_folder, samples, save_state,
    set_up, split_loss, step, storage_by_type, storage_of, telling_what_needs_less, told_of_data,
    told_of_interruption, told_of_resuming, wait_for_writers, write_beginning)
from lib.tokens import trains_tables

# -----------------------------------------------------------------------------
# the base where none is given: a small one, pretrained by this same code the first time that it is needed

BASE = Path("out/base")
PRETRAIN = Config(
    method="full", base="new", data="plain", out_dir=str(BASE), max_iters=3600, learning_rate=2e-3, warmup_iters=100,
    eval_interval=1200, eval_sequences=80, weight_decay=0.1, beta2=0.95, sample_count=2)


def with_base(config):
    """The configuration with a base in it, which is pretrained where there is none; a dry run reports about an untrained one."""
    adding = set(peft.method_names(config.method)) - set(peft.UNFREEZING)
    check(config.base != "new" or not adding, f"base new is written as a whole model, in which {some(adding)} has no place; use --method full")
    if config.base:
        return config
    if machine.RANK == 0 and not config.dry_run:
        wait_for_writers(BASE, "config.json")                                                   # fault 50
    if machine.gathered((BASE / "config.json").is_file())[0]:
        return dataclasses.replace(config, base=str(BASE))
    if config.dry_run:
        return dataclasses.replace(config, base="new")
    say(f"no --base given: a small one is pretrained once on the embedded text into {BASE}, about three minutes on 2 cores")
    half_done = (BASE / "config.toml").is_file()
    train(dataclasses.replace(PRETRAIN, resume=str(BASE) if half_done else ""))
    if not (BASE / "config.json").is_file():
        sys.exit(0)                                              # It was interrupted, and is saved.
    say("")
    return dataclasses.replace(config, base=str(BASE))


# -----------------------------------------------------------------------------
# one run, from its configuration to its metrics


def train(config):
    """Runs a configuration; returns the metrics, or None after --dry_run or an interruption."""
    given = config.given
    config, start = hub.adopted(config)
    if config.resume:
        config = find_base(config, config.resume, config.base if "base" in given else "")
    config = trains_tables(config)
    check_processes(config)
    device = machine.pick_device(config.device)
    machine.prepare(device)
    config = resolved(config, device)
    machine.agree(dataclasses.asdict(config))
    folder = Path(machine.gathered(str(run_folder(config)))[0])  # It is chosen before anybody writes.
    writes = machine.RANK == 0 and not config.dry_run
    with only_writer(folder) if writes else nullcontext(), telling_what_needs_less(config, folder):
        config = with_base(config)
        torch.manual_seed(config.seed)
        run = set_up(config, folder, device)
        config, model = run.config, run.model                    # What depends on the data is resolved now.
        fresh = not config.resume and not config.dry_run
        if fresh and start is None:
            note_before(run)
        report = attach_methods(model, run.tokenizer, config)
        if start is not None:
            with located(config.init_from):
                peft.load_adapter(model, start | {"base": start["base"] or run.fingerprints["base"]})
        if fresh and start is not None:
            note_before(run)
        describe(run, report)
        model.checkpointing = config.checkpointing
        if config.compile and not machine.compile_model(model, device):
            say("compile    there is no compiler here; running without")
        if config.dry_run:
            return None
        rows = config.batch_size // machine.WORLD_SIZE
        run.optimizer = make_optimizer(model, config)
        run.scaler = make_scaler(config.dtype, device.type)
        run.batches = data.Batches(run.encoded["train"], rows, config.seed, machine.RANK, machine.WORLD_SIZE,
                                   config.packing)
        if config.resume:
            say(*told_of_resuming(run, restore(run)))                                           # fault 45
            remember(run, given)
        else:
            write_beginning(run)
        finished = loop(run)
        metrics = finish(run) if finished and (machine.RANK == 0 or config.fsdp) else None
        machine.gathered(None)                                   # Nobody leaves before all is written.
        return metrics


def note_before(run):
    """Notes what the model can do before training, with the adapter that the run starts from if there is one."""
    say("before     measuring the loss on val, writing the first texts (--eval_sequences and --sample_count say how many)")
    run.progress |= {"before": split_loss(run, "val"), "samples": samples(run)}


def describe(run, report):
    """Says what the run is about to do, and what memory it will need. report: the lines of peft.apply."""
    config, shape = run.config, run.model.config
    counts, encoded = peft.count_parameters(run.model), run.encoded["train"]
    trainable, total = counts["trainable"], counts["total"]
    storage = ", ".join(f"{size(n)} {kind}" for kind, n in storage_by_type(run.model).items())
    sequences, n_step = len(encoded), config.batch_size * config.gradient_accumulation_steps
    splits = " / ".join(str(len(getattr(run.corpus, split))) for split in ("train", "val", "test"))
    supervised = encoded.n_supervised / max(encoded.n_tokens, 1)
    tokens = n_step * encoded.n_tokens / max(sequences, 1)
    stored = f", linear layers in {config.quant}" if config.quant else ""
    each = " in each process" if config.fsdp else ""
    cut = f", {encoded.n_cut} cut" if encoded.n_cut else ""
    cut += f", {encoded.n_dropped} dropped, longer than {encoded.block_size}" if encoded.n_dropped else ""
    empty = f", {encoded.n_empty} empty ones skipped" if encoded.n_empty else ""
    say(f"base       {config.base}: {shape.n_layer} layers x {shape.n_embd}, {counts['base']:,} parameters{stored}")
    say(*(f"method     {line}" for line in report))
    if config.init_from and not config.resume:
        say(f"start      {config.init_from}: its {trainable:,} parameters; optimizer, schedule and data begin anew")
    if config.add_tokens:
        say(f"tokens     those of {config.add_tokens} beside the base's; {shape.vocab_size} rows in the embedding, which is trained")
    kept = peft.count_kept(run.model)
    fewer = f"; the adapter keeps {kept:,}" if kept != trainable else ""
    say(f"trained    {trainable:,} of {total:,} parameters ({trainable / total:.2%}){fewer}")
    if ratio_of_B(run) != 1:
        say(f"rates      B of LoRA learns at {ratio_of_B(run):g} times the learning rate (LoRA+)")       # fault 47
    say(f"storage    {storage}{each}; computed in {config.dtype} on {run.model.head.weight.device}")
    say(f"data       {config.data}, {run.corpus.form}: {splits} train / val / test, {sequences} training sequences, "
        f"{supervised:.0%} of tokens supervised{cut}{empty}")
    for line in told_of_data(run):
        say(f"data       {line}")
    say(f"step       {n_step} sequences, about {tokens:.0f} tokens; {config.max_iters} steps")
    if config.base != "new" and data.Tokenizer.load(config.base).eos != run.tokenizer.eos:
        say("end        the base has never seen its own end token; texts end with its beginning-of-sequence token")
    say(f"folder     {run.folder}")
    rows = config.batch_size // machine.WORLD_SIZE
    length = int(data.padded(encoded.lengths.max(), encoded.block_size))
    unlike = " of the uncompiled step" if config.compile else ""
    unlike = " without fsdp" if config.fsdp else unlike          # These two do not go together.
    say(f"memory     {size(predict(run, rows, length))} predicted at the peak{unlike}, for {rows} x {length} tokens; "
        f"{size(predict_generation(run, length))} while it writes samples")


# -----------------------------------------------------------------------------
# memory: predicted by memory.py, and measured at the first and the last step


def predict(run, batch, length, packed=None):
    """The peak in bytes of a step with micro-batches of batch x length tokens; packed as in memory.simulate."""
    config = run.config
    names = ("checkpointing", "gradient_accumulation_steps", "grad_clip", "label_smoothing", "offload",
             "optimizer", "param_dtype")
    settings = {name: getattr(config, name) for name in names} | method_options(config)
    dtype = getattr(torch, config.dtype)
    report = memory.simulate(
        run.model.config, config.method, batch, length, dtype, run.device.type, storage_of(config),
        packed=packed, **settings)
    return report["peak"]


def predict_generation(run, length):
    """The peak in bytes of writing the samples, whose prompts have at most that length."""
    config, room = run.config, run.model.config.block_size - run.model.reserved
    rows, dtype = max(config.sample_count, 1), getattr(torch, config.dtype)
    report = memory.simulate_generation(
        run.model.config, config.method, rows, min(length + 100, room), dtype, run.device.type,
        storage_of(config), config.param_dtype, **method_options(config))
    return report["peak"]


@contextmanager
def measured(run, micro_batches):
    """Says how much memory the step within took at its peak, and what was predicted for its shape."""
    if run.device.type == "cuda":
        machine.count_peak_anew()
        yield
        peak = torch.cuda.max_memory_allocated() + memory.CUDA_CONTEXT
    else:
        with memory.Tracker(run.model, run.optimizer) as tracker:
            yield
        peak = tracker.report()["peak"]
    batch = len(micro_batches[0][0])
    length = max(tokens.size(1) for tokens, *_ in micro_batches)
    if run.config.packing:
        predicted = predict(run, 1, 1, [lengths for _, _, lengths in micro_batches])
    else:
        predicted = predict(run, batch, length)
    say(f"memory     step {run.progress['step'] + 1}, {batch} x {length}: measured {size(peak)}, predicted {size(predicted)} "
        f"(ratio {peak / predicted:.2f}); resident {size(machine.resident_bytes())}")


# -----------------------------------------------------------------------------
# the loop


def loop(run):
    """
    Trains until max_iters, or until patience is at its end, and returns True; False where somebody asked for an
    end. The state is saved either way.
    """
    config, model, progress = run.config, run.model, run.progress
    interrupt, first, told = Interrupt(), progress["step"], dict(progress)
    log = Log(run.folder / "log.jsonl", first) if machine.RANK == 0 else None
    if not first:
        torch.manual_seed(config.seed + machine.RANK)            # Dropout differs between processes.
    saving = partial(offload, model) if config.offload else nullcontext
    can_measure = machine.RANK == 0 and not config.compile and not config.fsdp
    ratio = ratio_of_B(run)
    model.train()
    while progress["step"] < config.max_iters and has_patience(run):                            # fault 18
        if machine.anybody(interrupt.asked, run.device):
            save_state(run)
            say(*told_of_interruption(run))
            return False
        i, start = progress["step"], time.perf_counter()
        done, last = i + 1, i + 1 == config.max_iters
        lr = learning_rate(config, i)
        for group in run.optimizer.param_groups:
            group["lr"] = lr * group["ratio"]
        rates = {"lr": lr} if ratio == 1 else {"lr": lr, "lr_B": lr * ratio}
        micro_batches = [next_batch(run) for _ in range(config.gradient_accumulation_steps)]
        with measured(run, micro_batches) if can_measure and (i == first or last) else nullcontext():
            loss, norm = map(float, step(model, run.optimizer, micro_batches, config.grad_clip,
                                         config.label_smoothing, saving, run.scaler))
            seconds = time.perf_counter() - start
        tokens = sum(tokens.numel() for tokens, *_ in micro_batches) * machine.WORLD_SIZE
        progress["step"] = done
        progress["seconds"] += seconds
        progress["tokens"] += tokens
        skip_or_stop(run, loss, norm, micro_batches)
        if log:
            log.write(step=i, loss=loss, **rates, grad_norm=norm, tokens_per_second=round(tokens / seconds),
                      bytes=machine.resident_bytes())
        if i % config.log_interval == 0 or last:
            left = round((config.max_iters - done) * progress["seconds"] / done)
            # Since the line before: a step whose memory is measured takes longer.
            speed = (progress["tokens"] - told["tokens"]) / (progress["seconds"] - told["seconds"])
            told = dict(progress)
            say(f"step {done:>5}/{config.max_iters} | loss {loss:.4f} | lr {lr:.2e} | {speed:>7,.0f} tokens/s | "
                f"{size(machine.resident_bytes())} | {left // 60}:{left % 60:02} left")
        if done % config.eval_interval == 0:
            evaluate_and_save(run, log)
        elif config.save_interval and done % config.save_interval == 0:
            save_state(run)
    if progress["evaluated"] != progress["step"]:
        evaluate_and_save(run, log)                                                             # fault 43
    return True


def ratio_of_B(run):
    """How many times the learning rate LoRA's B learns at (LoRA+); 1 where there is none."""
    groups = peft.param_groups(run.model, 1.0, 0.0, run.config.lora_plus_ratio)
    others = [group["ratio"] for group in groups if group["ratio"] != 1]
    return others[0] if others else 1.0


def has_patience(run):
    """Whether the run goes on. After `patience` evaluations in a row without a better loss it says so, and does not."""
    patience, waited = run.config.patience, run.progress["waited"]
    goes_on = not patience or waited < patience
    if not goes_on:
        say(f"stopped    after step {run.progress['step']}: no better val loss in {waited} evaluations")
    return goes_on


def next_batch(run):
    """(tokens, targets), and with packing the lengths; the tensors on the device."""
    tokens, targets, *lengths = next(run.batches)
    return tokens.to(run.device), targets.to(run.device), *lengths


def evaluate_and_save(run, log):
    """Evaluates, keeps the adapter if it is the best so far, and saves the state."""
    progress = run.progress
    losses = {f"{split}_loss": split_loss(run, split) for split in ("train", "val")}
    say(f"step {progress['step']}: train loss {losses['train_loss']:.4f}, val loss {losses['val_loss']:.4f}")
    val_loss = machine.gathered(losses["val_loss"])[0]           # All processes stop after the same step.
    is_better = val_loss < progress["best"]
    progress["best"] = val_loss if is_better else progress["best"]
    progress["waited"] = 0 if is_better else progress["waited"] + 1
    progress["evaluated"] = progress["step"]
    if log:
        log.write(step=progress["step"], **losses)
        if is_better:
            peft.save_adapter(run.model, run.folder / "adapter.pt")
        if run.config.keep_adapters:
            peft.save_adapter(run.model, run.folder / f"adapter-{progress['step']}.pt")
    save_state(run)


def skip_or_stop(run, loss, norm, micro_batches):
    """
    Counts steps whose loss or gradient was not finite; after ten in a row keeps the batch for a look, and
    gives up.
    """
    progress = run.progress
    if numbers_are_finite(loss, norm):
        progress["skipped_in_a_row"] = 0
        return
    progress["skipped"] += 1
    progress["skipped_in_a_row"] += 1
    say(f"step {progress['step']}: loss {loss}, gradient norm {norm}: skipped")
    if progress["skipped_in_a_row"] == 10:                                                      # fault 35
        own = [[t.cpu() for t in batch[:2]] for batch in micro_batches]
        batches = [pair for process in machine.gathered(own) for pair in process]
        path = run.folder / "bad_batch.pt"
        if machine.RANK == 0:
            save_file(path, {"step": progress["step"], "batches": batches})
        raise ValueError(f"ten steps in a row had no finite loss or gradient; the last batch is in {path}, "
                         "the last saved state in state.pt")


# -----------------------------------------------------------------------------
# the end


def finish(run):
    """Puts the best adapter back, writes samples and metrics, says what to do next. Returns the metrics."""
    config, folder, progress = run.config, run.folder, run.progress
    adapter = folder / "adapter.pt"
    trainable = peft.count_parameters(run.model)["trainable"]    # fault 47
    peft.load_adapter(run.model, adapter, replace=True)
    if config.base == "new":
        model_folder.write_model(run.model, folder, run.tokenizer)
    after = samples(run)
    if machine.RANK:
        return None                                              # Under fsdp the samples need every process.
    text = "\n".join(f"prompt: {prompt}\nbefore: {old}\nafter:  {new}\n"
                     for (prompt, old), (_, new) in zip(progress["samples"], after))
    metrics = {
        "method": config.method,
        "seed": config.seed,
        "trainable": trainable,
        "adapter_parameters": peft.count_kept(run.model),
        "loss_before": finite_or_none(progress["before"]),
        "val_loss": finite_or_none(progress["best"]),
        "steps": progress["step"],
        "skipped": progress["skipped"],
        "seconds": round(progress["seconds"], 2),
        "tokens_per_second": round(progress["tokens"] / max(progress["seconds"], 1e-9)),
        "peak_bytes": machine.peak_bytes(),
        "adapter_bytes": adapter.stat().st_size,
        "base_bytes": run.base_bytes,
        "hardware": machine.hardware(run.device),
        "date": time.strftime("%Y-%m-%d"),
    }
    write_atomic(folder / "samples.txt", [text.encode()])
    write_atomic(folder / "metrics.json", [(json.dumps(metrics, indent=1) + "\n").encode()])
    skipped = f"; {progress['skipped']} steps skipped" if progress["skipped"] else ""
    say("", text, f"val loss   {progress['before']:.4f} -> {progress['best']:.4f}{skipped}")
    say(f"adapter    {adapter}, {size(metrics['adapter_bytes'])}; the base takes {size(run.base_bytes)}")
    say(f"peak       {size(metrics['peak_bytes'])}")
    first = run.shown[0] if run.shown else data.Example("", [])
    way = "--chat" if first.messages else f"--prompt {shlex.quote(first.prompt)}"
    say(f"next       python sample.py {shlex.quote(str(folder))} {way}")
    return metrics


def finite_or_none(number):
    """A number that JSON can write, None for NaN and infinity."""
    return number if math.isfinite(number) else None


def main(config):
    """Trains among the processes there are."""
    with machine.processes(machine.pick_device(config.device)):
        train(config)


if __name__ == "__main__":
    run_main(main, CONFIG)
