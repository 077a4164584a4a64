"""
What a run consists of.
"""

import dataclasses
import fcntl
import json
import math
import signal
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch

import data
import peft
import quant
from lib import checkpoint, machine
from lib.config import FIELDS, MAY_CHANGE, Config, read_toml
from lib.files import read_file, write_atomic
from lib.machine import gathered, pick_device, pick_dtype, sum_over_processes
from model import GPT, GPTConfig


# -----------------------------------------------------------------------------
# the step


def numbers_are_finite(loss, norm):
    """Whether a step may be taken."""
    return math.isfinite(loss) and math.isfinite(norm)


def step(model, optimizer, micro_batches, grad_clip, label_smoothing=0.0, finite=numbers_are_finite, saving=nullcontext):
    """One optimizer step. micro_batches: list of (tokens, targets), each (B, T) int64; returns (loss, grad_norm), float32 tensors.
    saving: makes the context in which the forward pass saves for the backward pass.

    The loss is the mean over the supervised tokens of all micro-batches and processes, however they are divided. Where loss or
    gradient is not finite nothing is changed.
    """
    counts = [(targets >= 0).sum() for _, targets in micro_batches]
    total = sum_over_processes(torch.stack(counts).sum()).clamp(min=1)
    loss = torch.zeros((), device=total.device)
    for (tokens, targets), count in zip(micro_batches, counts):
        with saving():
            part = model(tokens, targets, label_smoothing)[1] * (count / total)
        part.backward()
        loss += part.detach()
    trained = [p for p in model.parameters() if p.grad is not None]
    loss = sum_over_processes(loss, *(p.grad for p in trained))
    norm = torch.nn.utils.clip_grad_norm_(trained, grad_clip or math.inf)
    if finite(loss, norm):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss, norm


def offload(model):
    """Context in which everything that the backward pass needs, but for the model's own tensors, waits in the host's memory."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}

    def pack(t):
        if t.untyped_storage().data_ptr() in own:
            return t
        return t.device, torch.empty(t.shape, dtype=t.dtype, pin_memory=t.is_cuda).copy_(t, non_blocking=True)

    def unpack(kept):
        return kept if isinstance(kept, torch.Tensor) else kept[1].to(kept[0], non_blocking=True)
    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def make_optimizer(model, config):
    """AdamW over what is trained, fused: one pass over the states instead of a dozen."""
    groups = peft.param_groups(model, config.learning_rate, config.weight_decay, config.lora_plus_ratio)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True)


def learning_rate(config, i):
    """At step i, 0 .. max_iters - 1: linear warm-up, then down to min_lr."""
    if i < config.warmup_iters:
        return config.learning_rate * (i + 1) / (config.warmup_iters + 1)
    ratio = (i - config.warmup_iters) / max(config.max_iters - config.warmup_iters, 1)
    share = {"cosine": 0.5 * (1 + math.cos(math.pi * ratio)), "linear": 1 - ratio, "constant": 1.0}[config.lr_schedule]
    return config.min_lr + share * (config.learning_rate - config.min_lr)


@torch.no_grad()
def evaluate(model, batches, device):
    """Mean loss over the supervised tokens of all batches."""
    model.eval()
    total = count = 0
    for tokens, targets in batches:
        n = int((targets >= 0).sum())
        total += float(model(tokens.to(device), targets.to(device))[1]) * n
        count += n
    model.train()
    return total / max(count, 1)


# -----------------------------------------------------------------------------
# folder and state


@contextmanager
def only_writer(folder):
    """One process a folder: an advisory lock that ends with the process, however it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder}: another process is writing there; choose another --out_dir") from None
        yield


def run_folder(config):
    """The folder to write to. One that holds a run already is never written over."""
    if config.resume:
        return Path(config.resume)
    if config.out_dir:
        if Path(config.out_dir, "config.toml").is_file():
            raise ValueError(f"{config.out_dir}: holds a run already; --resume {config.out_dir} goes on with it, another --out_dir starts anew")
        return Path(config.out_dir)
    stem = f"out/{config.method}"
    return next(path for path in map(Path, (stem, *(f"{stem}-{n}" for n in range(2, 10**6)))) if not Path(path, "config.toml").is_file())


def generators():
    """The state of every process's random generators: {"cpu": [by rank], "cuda": [by rank]}."""
    own = {"cpu": torch.get_rng_state()} | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_initialized() else {})
    states = gathered(own)
    return {kind: [state[kind] for state in states] for kind in own}


def snapshot(model, optimizer, batches, config, progress, fingerprints, rng):
    """Everything that the next step depends on."""
    return {"config": dataclasses.asdict(config), "tensors": peft.adapter_state_dict(model), "optimizer": optimizer.state_dict(),
            "rng": rng, "data": batches.state_dict(), "progress": dict(progress), "fingerprints": fingerprints}


def newest_state(folder):
    """The last state that was saved whole: state.pt, or the one before it with a warning."""
    try:
        return read_file(folder / "state.pt")
    except ValueError as error:
        if not (folder / "state.before.pt").is_file():
            raise
        print(f"{error}; going on from state.before.pt", file=sys.stderr)
        return read_file(folder / "state.before.pt")


def restore(path, model, optimizer, batches, config, progress, fingerprints):
    """The inverse of snapshot; whatever does not fit is refused before anything is changed."""
    state = newest_state(path)
    missing = {"config", "tensors", "optimizer", "rng", "data", "progress", "fingerprints"} - state.keys()
    if missing or type(state["rng"].get("cpu")) is not list:
        raise ValueError(f"{path}: lacks {', '.join(sorted(missing)) or 'the state of the random generator'}; it cannot be resumed")
    for what, value in fingerprints.items():
        if state["fingerprints"].get(what) != value:
            raise ValueError(f"{path}: the {what} has changed since that run (its fingerprint differs)")
    for name, value in dataclasses.asdict(config).items():
        if name not in (*MAY_CHANGE, "out_dir") and state["config"].get(name) != value:      # a folder may have moved
            raise ValueError(f"{path}: {name} was {state['config'].get(name)!r} when the state was saved; config.toml says {value!r}")
    own, new = optimizer.state_dict(), state["optimizer"]
    shapes = [p.shape for group in optimizer.param_groups for p in group["params"]]
    if [len(g["params"]) for g in own["param_groups"]] != [len(g["params"]) for g in new["param_groups"]] or any(
            new["state"][i][name].shape != shape for i, shape in enumerate(shapes) if i in new["state"] for name in ("exp_avg", "exp_avg_sq")):
        raise ValueError(f"{path}: its optimizer state does not fit the trained tensors")
    peft.load_state(model, state["tensors"])
    optimizer.load_state_dict(new)
    batches.load_state_dict(state["data"])
    progress.update(state["progress"])
    if machine.RANK >= len(state["rng"]["cpu"]):                         # more processes than before
        torch.manual_seed(state["config"]["seed"] + machine.RANK + 10**6 * progress["step"])
        return
    torch.set_rng_state(state["rng"]["cpu"][machine.RANK])
    if torch.cuda.is_initialized() and "cuda" in state["rng"]:
        torch.cuda.set_rng_state(state["rng"]["cuda"][machine.RANK])


class Log:
    """log.jsonl and the progress line. Resuming drops the lines of the steps that are done again."""

    def __init__(self, path, first_step):
        kept = []
        if first_step and path.is_file():
            entries = [(line, json.loads(line)) for line in path.read_text().splitlines()]
            kept = [line for line, entry in entries if entry["step"] + ("lr" in entry) <= first_step]      # step i and its evaluation come before i + 1
        write_atomic(path, "".join(line + "\n" for line in kept).encode())
        self.path = path

    def write(self, **line):
        """Adds a line of JSON."""
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")


class Interrupt:
    """The first SIGINT or SIGTERM asks for an end after this step; the second ends at once."""

    def __init__(self):
        self.asked = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.handle)

    def handle(self, number, frame):
        self.asked = True
        signal.signal(number, signal.SIG_DFL)
        if machine.RANK == 0:
            print("\nsaving after this step; once more to stop at once", file=sys.stderr)


# -----------------------------------------------------------------------------
# base


SMALL = GPTConfig(vocab_size=2048, block_size=256, n_layer=3, n_head=4, n_embd=256)    # 3 M parameters


def storage_of(config):
    """The quant.Storage that a run's configuration asks for, or None."""
    default = peft.default_storage(config.method)
    scheme = config.quant or default and default.scheme
    if not scheme:
        return None
    skip = tuple(filter(None, config.quant_skip.split(",")))
    return quant.Storage(scheme, config.quant_block or None, config.quant_double, skip)


def load_base(config, device, dtype):
    """(model, tokenizer) without a method: from a folder in Hugging Face layout, or new."""
    if config.base == "new":
        texts = [text for example in data.load(config.data).train for text in (example.prompt, *example.references)]
        tokenizer = data.Tokenizer.train(texts, SMALL.vocab_size)
        return GPT(dataclasses.replace(SMALL, vocab_size=tokenizer.vocab_size), dtype).to(device), tokenizer
    model = checkpoint.load_base(config.base, dtype, storage_of(config), device)
    tokenizer = data.Tokenizer.load(config.base)
    if tokenizer.eos is not None and tokenizer.bos is not None and is_twin(model.head.weight, tokenizer.eos):
        tokenizer.eos = tokenizer.bos                            # bases that were trained on texts divided by bos alone
    return model, tokenizer


def is_twin(table, i):
    """Whether row i points where another row points: a token that training has never seen, and that a frozen head cannot tell apart."""
    if i >= len(table):
        return False
    alike = torch.nn.functional.cosine_similarity(table[i].float()[None], table.float())
    return int((alike > 0.9999).sum()) > 1


def attach(model, tokenizer, config):
    """The run's methods, in place; returns the lines that say what was done."""
    options = {name: getattr(config, name) for name in peft.DEFAULTS if name in FIELDS}
    if config.prompt_init:
        options["prompt_ids"] = tokenizer.encode(config.prompt_init)
    return peft.apply(model, config.method, **options)


def load_run(folder, device="auto", dtype="auto"):
    """(model, tokenizer, config) of a run with its best adapter, or of a model in Hugging Face layout, ready to generate."""
    device = pick_device(device)
    if Path(folder, "config.json").is_file():
        config = Config(base=str(folder))
    elif Path(folder, "config.toml").is_file():
        config = Config(**read_toml(Path(folder, "config.toml")))
    else:
        raise ValueError(f"{folder}: neither a run (config.toml) nor a model (config.json) is there")
    model, tokenizer = load_base(config, device, pick_dtype(dtype if dtype != "auto" else config.dtype, device))
    if config.base != str(folder):
        peft.load_adapter(model, Path(folder, "adapter.pt"))
    return model.eval(), tokenizer, config


def sample_text(model, tokenizer, prompts, max_new_tokens=100, **options):
    """Continues prompts, greedily unless told: list of str."""
    prompts = [tokenizer.encode_pair(prompt, "")[0] for prompt in prompts]
    mode = model.training
    out = model.eval().generate(prompts, max_new_tokens, **{"temperature": 0, "stop": tokenizer.eos} | options)
    model.train(mode)
    return [tokenizer.decode([t for t in ids[len(prompt):] if t != tokenizer.eos]) for ids, prompt in zip(out, prompts)]


def storage_by_type(model):
    """{'nf4': bytes, 'bfloat16': bytes, ...} of weights and buffers, quantized ones with their scales; of this process's share under fsdp."""
    found = {}
    for module in model.modules():
        scheme = getattr(module, "weight_q", None)
        own = list(module.named_parameters(recurse=False)) + list(module.named_buffers(recurse=False))
        for name, tensor in own:
            tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
            kind = scheme.scheme if scheme is not None and name != "bias" else str(tensor.dtype).removeprefix("torch.")
            found.setdefault(kind, {})[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
    return {kind: sum(sizes.values()) for kind, sizes in found.items()}


def check_processes(config):
    """Refuses what several processes, or one, cannot do."""
    if config.batch_size % machine.WORLD_SIZE:
        below = config.batch_size // machine.WORLD_SIZE * machine.WORLD_SIZE
        raise ValueError(f"batch_size is {config.batch_size}, which {machine.WORLD_SIZE} processes cannot share equally; --batch_size {below or machine.WORLD_SIZE} can be, or start another number")
    if not config.fsdp:
        return
    if machine.WORLD_SIZE == 1:
        raise ValueError("fsdp divides the base among processes, but there is one; start it as torchrun --nproc_per_node=2 train.py .., or with --fsdp false")
    training = {"full", "top", "bitfit"} & set(peft.method_names(config.method))
    if training:
        raise ValueError(f"fsdp divides a frozen base, but {training.pop()} trains it; lora, adapter, prefix, prompt and ia3 can, or several processes without --fsdp")
    for name in ("compile", "offload"):
        if getattr(config, name):
            raise ValueError(f"fsdp and {name} do not go together; leave one of them out")
