"""
What a run consists of: the step, the schedule, the base with its tokenizer, the data, the folder with state
and log; and loading a run again. train.py puts these together; memory.py simulates the same step;
sample.py, evaluate.py and hub.py load runs.
"""

import dataclasses
import fcntl
import functools
import itertools
import json
import math
import os
import shlex
import signal
import sys
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

import torch

import data
import peft
import quant
from lib import checkpoint, machine, template
from lib.config import (FIELDS, MAY_CHANGE, Config, as_folder, method_options, out_of_memory,
                        read_run_config, renamed, way_on, write_toml)
from lib.checks import LONG, bounded, regular, shown, typed
from lib.files import (check, holds_tensors_by_name, located, read_file, read_json_lines, save_file, some,
                       write_atomic)
from lib.kernels import simulating
from lib.optim import AdamW
from lib.origin import read_origin
from lib.tokenizer import end_ids
from lib.tokens import add_tokens
from model import GPT, GPTConfig

# -----------------------------------------------------------------------------
# the step


def step(model, optimizer, micro_batches, grad_clip, label_smoothing=0.0, saving=nullcontext, scaler=None):
    """
    One optimizer step. micro_batches: list of (tokens, targets), each (B, T) int64, or of (tokens, targets,
    lengths) of packed ones. Returns (loss, grad_norm), tensors.

    The loss is the mean over the supervised tokens of all micro-batches and processes, however they are
    divided. Where loss or gradient is not finite, nothing is changed. saving: makes the context in which
    the forward pass saves for the backward pass. scaler: of make_scaler; None for no scaling.
    """
    scaler = scaler or make_scaler("float32", "cpu")
    counts = [(targets >= 0).sum() for _, targets, *_ in micro_batches]
    total = machine.sum_over_processes(torch.stack(counts).sum()).clamp(min=1)
    loss = torch.zeros((), device=total.device)
    for (tokens, targets, *lengths), count in zip(micro_batches, counts):
        with saving():
            _, part = model(tokens, targets, label_smoothing, *lengths)
            part = part * (count / total)                                                       # fault 28
        scaler.scale(part).backward()
        loss += part.detach()
    trained = [p for p in model.parameters() if p.grad is not None]
    loss = machine.sum_over_processes(loss, *(p.grad for p in trained))
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(trained, grad_clip or math.inf)
    if numbers_are_finite(loss, norm):
        optimizer.step()
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return loss, norm


def numbers_are_finite(loss, norm):
    """Whether a step may be taken. In a simulation, whose numbers do not exist, it is."""
    return simulating() or math.isfinite(loss) and math.isfinite(norm)


def offload(model):
    """
    The context in which what the backward pass needs, but for the model's own tensors, waits in the host's
    memory.
    """
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}

    def pack(t):
        if t.untyped_storage().data_ptr() in own:
            return t
        host = torch.empty_like(t, device="cpu", pin_memory=t.is_cuda)       # Compiled code wants its strides.
        return t.device, host.copy_(t, non_blocking=True)

    def unpack(packed):
        if isinstance(packed, torch.Tensor):
            return packed
        device, host = packed
        return host.to(device, non_blocking=True)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def make_optimizer(model, config):
    """AdamW over what is trained: torch's where all is float32, fused, one pass over the states instead of a dozen."""
    groups = peft.param_groups(model, config.learning_rate, config.weight_decay, config.lora_plus_ratio)
    settings = {"lr": config.learning_rate, "betas": (config.beta1, config.beta2)}
    if (config.optimizer, config.param_dtype) == ("adamw", "float32"):
        return torch.optim.AdamW(groups, fused=True, **settings)
    return AdamW(groups, eight_bit=config.optimizer == "adamw8bit", **settings)


def new_state(optimizer, parameter):
    """{name: tensor} of what the optimizer keeps of a parameter, before the first step."""
    if isinstance(optimizer, AdamW):
        return optimizer.new_state(parameter)
    moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
    return {"step": torch.zeros(()), **moments}


def make_scaler(dtype, device_type):
    """
    What scales the loss of a step in float16, whose gradients would else be rounded to zero: by a factor that is
    halved when they overflow, a step that is skipped, and doubled after 2,000 steps that do not. In another type
    it does nothing.
    """
    return torch.amp.GradScaler(device_type, enabled=dtype == "float16")


def learning_rate(config, i):
    """The learning rate of step i, 0 .. max_iters - 1: a linear warm-up, then down to min_lr."""
    if i < config.warmup_iters:
        return config.learning_rate * (i + 1) / (config.warmup_iters + 1)
    done = (i - config.warmup_iters) / max(config.max_iters - config.warmup_iters, 1)
    shares = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}
    return config.min_lr + shares[config.lr_schedule] * (config.learning_rate - config.min_lr)


@torch.no_grad()
def evaluate(model, batches, device):
    """Mean loss over the supervised tokens of all batches."""
    model.eval()
    total = count = 0
    for tokens, targets in batches:
        n = int((targets >= 0).sum())
        _, loss = model(tokens.to(device), targets.to(device))
        total += float(loss) * n
        count += n
    model.train()
    return total / max(count, 1)


# -----------------------------------------------------------------------------
# the base

# 3 M parameters, where no base is given
SMALL = GPTConfig(vocab_size=2048, block_size=256, n_layer=3, n_head=4, n_embd=256)


def storage_of(config):
    """The quant.Storage that a run's configuration asks for, or None."""
    default = peft.default_storage(config.method)
    scheme = config.quant or (default and default.scheme)
    if not scheme:
        return None
    skip = tuple(filter(None, config.quant_skip.split(",")))
    return quant.Storage(scheme, config.quant_block or None, config.quant_double, skip)


def resolved(config, device):
    """The configuration with "auto" and what the method implies replaced by what they come to."""
    storage = storage_of(config)
    dtype = machine.dtype_name(machine.pick_dtype(config.dtype, device))
    return dataclasses.replace(config, dtype=dtype, quant=storage.scheme if storage else "")


def load_base(config, device, dtype, saved=""):
    """
    (model, tokenizer) without a method: from a folder in Hugging Face layout, or new. saved: the folder of
    a run that holds the tokenizer with this one's added tokens.
    """
    if config.base == "new":
        examples = data.load(config.data).train
        texts = [text for example in examples for text in example.texts]
        tokenizer = data.Tokenizer.train(texts, SMALL.vocab_size)
        shape = dataclasses.replace(SMALL, vocab_size=tokenizer.vocab_size)
        return GPT(shape, dtype).to(device), tokenizer
    model = checkpoint.load_base(config.base, dtype, storage_of(config), device)
    tokenizer = data.Tokenizer.load(config.base)
    if config.add_tokens:
        tokenizer = add_tokens(model, tokenizer, config, saved)
    return model, with_ends(tokenizer, config.base, model.config.vocab_size, lambda: model.head.weight)


def tokenizer_of(config, folder):
    """(tokenizer, chat) of a run, as training used them. Of its base the head alone is read, if at all."""
    tokenizer = data.Tokenizer.load(folder if config.add_tokens else config.base)
    vocab_size = max(read_origin(config.base).config.vocab_size, tokenizer.vocab_size)
    with_ends(tokenizer, config.base, vocab_size, lambda: checkpoint.read_head(config.base))
    return tokenizer, chat_of(config, tokenizer, folder)


def with_ends(tokenizer, base, vocab_size, head):
    """The tokenizer with the ends of the base in a folder. head: a function that returns the head's weight."""
    begins_with_bos = tokenizer.bos is not None and tokenizer.begin == [tokenizer.bos]
    if begins_with_bos and tokenizer.eos is not None and has_twin(head(), tokenizer.eos):
        tokenizer.eos = tokenizer.bos                            # Its texts were divided by bos alone.
    tokenizer.ends = end_ids(base, vocab_size)
    return tokenizer


def has_twin(table, i):
    """
    Whether another row points where row i points: training has never seen the token, a frozen head cannot
    tell it apart. The table may be the model's largest tensor, so a part of it at a time is in float32.
    """
    if i >= len(table):
        return False
    row = table[i].float()[None]
    n_alike = 0
    for rows in table.split(4096):
        similarity = torch.nn.functional.cosine_similarity(row, rows.float())
        n_alike += int((similarity > 0.9999).sum())
    return n_alike > 1


def chat_of(config, tokenizer, folder):
    """
    The chat template of a run as a template.Chat, whose ends become the tokenizer's too; None where prompts
    are plain. The copy in the run's folder holds, if there is one.
    """
    if config.template in ("auto", "pipe", "raw", "none"):
        return None
    kept = Path(folder, template.KEPT)
    is_run = Path(folder, "config.toml").is_file()
    wanted = str(kept) if is_run and kept.is_file() else config.template
    own = ()
    if config.add_tokens:
        of_base = data.Tokenizer.load(config.base)
        own = tokenizer.added_tokens.keys() - of_base.added_tokens.keys()
    chat = template.load(wanted, config.base, tokenizer, own)
    tokenizer.ends = tokenizer.ends | chat.ends
    return chat


def iterations(config, n_sequences):
    """The configuration with epochs replaced by the steps that they come to, the last one full."""
    if not config.epochs:
        return config
    each = config.batch_size * config.gradient_accumulation_steps
    return dataclasses.replace(config, max_iters=math.ceil(config.epochs * n_sequences / each), epochs=0.0)


def attach_methods(model, tokenizer, config):
    """Attaches the run's methods, in place; returns the lines that say what was done."""
    options = method_options(config)
    if config.prompt_init:
        options["prompt_ids"] = tokenizer.encode(config.prompt_init)
    report = peft.apply(model, config.method, **options)
    peft.keep_trained_in(model, getattr(torch, config.param_dtype))
    return report


def storage_by_type(model):
    """
    {"nf4": bytes, "bfloat16": bytes, ..} of weights and buffers, quantized ones with their scales; under
    fsdp of this share.
    """
    found = {}
    for module in model.modules():
        stored = module.weight_q.scheme if isinstance(module, quant.QuantLinear) else ""
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
            kind = stored if stored and name != "bias" else machine.dtype_name(tensor.dtype)
            found.setdefault(kind, {})[tensor.data_ptr()] = tensor.nbytes
    return {kind: sum(sizes.values()) for kind, sizes in found.items()}


def check_processes(config):
    """ValueError for what several processes, or one, cannot do."""
    size, world = config.batch_size, machine.WORLD_SIZE
    possible = size // world * world or world
    check(size % world == 0, f"batch_size is {size}, which {world} processes cannot share equally; --batch_size {possible} "
                             "can be, or start another number")
    if not config.fsdp:
        return
    check(world > 1, "fsdp divides the base among processes, but there is one; start it as torchrun --nproc_per_node=2 "
                     "train.py .., or with --fsdp false")
    training = sorted(set(peft.UNFREEZING) & set(peft.method_names(config.method)))
    check(not training, f"fsdp divides a frozen base, but {''.join(training[:1])} trains it; lora, adapter, prefix, prompt and ia3 "
                        "can, or several processes without --fsdp")
    for name in ("compile", "offload"):
        check(not getattr(config, name), f"fsdp and {name} do not go together; leave one of them out")


# -----------------------------------------------------------------------------
# a run


@dataclass
class Run:
    """Everything that a configuration comes to."""
    config: Config
    folder: Path
    device: torch.device
    model: GPT
    tokenizer: data.Tokenizer
    corpus: data.Data
    encoded: dict                        # split -> data.Encoded
    fingerprints: dict                   # of base, data and tokenizer
    base_bytes: int
    shown: list                          # the first examples of val whose prompts fit, for samples
    chat: template.Chat | None = None
    optimizer: torch.optim.Optimizer | None = None
    scaler: torch.amp.GradScaler | None = None
    batches: data.Batches | None = None
    progress: dict = field(default_factory=lambda: {
        "step": 0, "best": math.inf, "skipped": 0, "skipped_in_a_row": 0, "seconds": 0.0, "tokens": 0, "waited": 0,
        "evaluated": -1})                # the step of the last evaluation
    state_is_whole: bool = False         # whether state.pt is this run's, to be kept as state.before.pt


def set_up(config, folder, device):
    """Reads, checks and encodes all that a configuration names: a Run without methods."""
    first_device = torch.device("cpu") if config.fsdp else device
    saved = config.resume or config.init_from                    # A run that has added tokens passes them on.
    model, tokenizer = load_base(config, first_device, getattr(torch, config.dtype), saved)
    corpus = data.load(config.data)
    config = dataclasses.replace(config, template=data.resolved_template(config.template, corpus.form))
    chat = chat_of(config, tokenizer, folder)
    context = model.config.block_size
    taken = peft.virtual_positions(config.method, method_options(config))
    check(taken < context, f"{config.method} takes {taken} of the {context} positions of the context and leaves none to the tokens")   # fault 29
    length = min(config.block_size or context, context - taken)
    encode = functools.partial(data.encode, tokenizer=tokenizer, block_size=length, template=config.template,
                               too_long=config.too_long, vocab_size=model.config.vocab_size,
                               train_on=config.train_on, chat=chat)
    encoded = {"train": encode(corpus.train), "val": encode(corpus.val)}
    config = iterations(config, len(encoded["train"]))
    fingerprints = {
        "base": peft.fingerprint(model), "data": corpus.fingerprint, "tokenizer": tokenizer.fingerprint}
    machine.agree(fingerprints)
    base_bytes = sum(storage_by_type(model).values())
    if config.fsdp:
        machine.shard(model, device)
    made = data.Format(tokenizer, config.template, chat)
    fitting = (example for example in corpus.val if len(made.prompt(example)) <= context - taken)
    shown = list(itertools.islice(fitting, max(config.sample_count, 1)))
    return Run(
        config, folder, device, model, tokenizer, corpus, encoded, fingerprints, base_bytes, shown, chat)


def told_of_data(run):
    """Lines about what was found in the data, and how conversations are rendered."""
    lines = list(run.corpus.told)
    val = run.encoded["val"]
    if val.n_cut or val.n_dropped:
        lines.append(f"of val's sequences, {val.n_cut} cut and {val.n_dropped} dropped, longer than {val.block_size}")
    same_prompt, same_text = data.overlap(run.corpus)
    if same_prompt or same_text:
        lines.append(f"of {len(run.corpus.val)} val examples, {same_prompt} have a prompt that is in train too, {same_text} prompt and text")
    if run.chat is not None:
        lines.append(f"rendered by {run.chat.name}")
    return lines


def split_loss(run, split):
    """The loss of a split, "train" or "val", over as many sequences as the configuration says."""
    batches = data.eval_batches(run.encoded[split], run.config.batch_size, run.config.eval_sequences or None)
    return evaluate(run.model, batches, run.device)


def samples(run):
    """[(prompt, continuation)] of the first validation examples, but for those that fill the context."""
    examples = run.shown[:run.config.sample_count]
    made = data.Format(run.tokenizer, run.config.template, run.chat)
    prompts = [made.text(example) for example in examples]
    ids = [made.prompt(example) for example in examples]
    return list(zip(prompts, sample_text(run.model, run.tokenizer, ids))) if prompts else []


def sample_text(model, tokenizer, prompts, max_new_tokens=100, **options):
    """Continues prompts, texts or lists of token ids, greedily unless told: list of str."""
    prompts = [tokenizer.encode_prompt(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    mode = model.training
    options = {"temperature": 0, "stop": tokenizer.stops} | options
    results = model.eval().generate(prompts, max_new_tokens, **options)
    model.train(mode)
    written = [ids[len(prompt):] for ids, prompt in zip(results, prompts)]
    return [tokenizer.decode(ids) for ids in written]


def config_of(folder):
    """(Config, whether it is a run's) of the folder of a run, or of a model in Hugging Face layout."""
    if Path(folder, "config.json").is_file():
        return Config(base=as_folder(folder)), False
    check(Path(folder, "config.toml").is_file(), f"{folder}: neither a run (config.toml) nor a model (config.json) is there")
    return read_run_config(folder), True


def load_run(folder, device="auto", dtype="auto", base="", adapter="best"):
    """
    (model, tokenizer, config) of a run with an adapter of it, or of a model in Hugging Face layout, ready to generate.

    base: where the run's base lies now, "" where find_base finds it. adapter: as adapter_of has it.
    """
    device = machine.pick_device(device)
    config, is_run = config_of(folder)
    check(is_run or not base, f"{folder}: a model and no run; leave out --base")
    config = find_base(config, folder, base) if is_run else config
    wanted = dtype if dtype != "auto" else config.dtype
    content = adapter_of(folder, adapter) if is_run else None
    model, tokenizer = load_base(config, device, machine.pick_dtype(wanted, device), folder)
    if is_run:
        with located(folder):
            peft.load_adapter(model, content)
    return model.eval(), tokenizer, config


def find_base(config, folder, given=""):
    """
    The configuration of a run with its base's folder as it is found now: `given`; else the path in config.toml, from the
    run's folder upwards, because it was said where the run's folder was named too; else that path from here.
    """
    if not given and config.base in ("", "new"):
        return config
    base = as_folder(given) if given else config.base
    if not given and not Path(base).is_absolute():
        places = [parent / base for parent in Path(folder).resolve().parents]
        found = next((place for place in places if Path(place, "config.json").is_file()), None)
        if found is not None and found.resolve() != Path(base).resolve():
            base = str(found)
    check(Path(base).is_dir(), f"{folder}: its base {base} is not there; --base DIR says where it is now")
    return dataclasses.replace(config, base=base)


def adapter_of(folder, which="best"):
    """
    The content (peft.read_adapter) of a run's adapter: the "best", in adapter.pt, the "last", in state.pt, or that of a
    step, which --keep_adapters has kept or a state holds. ValueError names the steps that there are.
    """
    if which == "best":
        return peft.read_adapter(Path(folder, "adapter.pt"))
    if which == "last":
        return adapter_in(newest_state(Path(folder)))
    kept = Path(folder, f"adapter-{which}.pt")
    if kept.is_file():
        return peft.read_adapter(kept)
    names = [path.stem.partition("-")[2] for path in Path(folder).glob("adapter-*.pt")]
    steps = {int(name) for name in names if name.isdecimal()}    # A copy may have any name.
    for name in ("state.pt", "state.before.pt"):
        if Path(folder, name).is_file():
            state = checked_state(read_file(Path(folder, name)), Path(folder, name))
            step = state["progress"]["step"]
            if str(step) == str(which):
                return adapter_in(state)
            steps.add(step)
    known = ", ".join(map(str, sorted(steps)))
    raise ValueError(f"{folder}: no adapter {which!r} there; best, last or one of the steps {known} (a run with --keep_adapters "
                     "keeps one of each evaluation)")


def adapter_in(state):
    """What a state holds of the adapter, as peft.read_adapter has it."""
    config = Config(**renamed(state["config"]))
    names = [name.replace("qlora", "lora") for name in peft.method_names(config.method)]
    return peft.packed("+".join(names), method_options(config), state["tensors"], state["fingerprints"]["base"])


# -----------------------------------------------------------------------------
# the folder


def run_folder(config):
    """The folder to write to. What somebody else has put there, or a run, is never written over."""
    if config.resume:
        return Path(config.resume)
    if config.out_dir:
        taken = why_taken(Path(config.out_dir))
        check(not taken, f"{config.out_dir}: {taken}")                                          # fault 49
        return Path(config.out_dir)
    folder, n = Path("out", config.method), 2
    while why_taken(folder):
        folder, n = Path("out", f"{config.method}-{n}"), n + 1
    return folder


# What a run that was stopped at its beginning, before it had written config.toml, leaves behind.
LEFT = (".lock", ".*.tmp", "adapter.pt", "state.pt", "tokenizer*", "vocab.json", "merges.txt", template.KEPT)


def why_taken(folder):
    """Why no new run may write into a folder; "" where it may, because nothing is there but what LEFT describes."""
    if (folder / "config.toml").is_file():
        return f"holds a run already; {way_on(folder)}, another --out_dir starts anew"
    if folder.exists() and not folder.is_dir():
        return "is a file; choose another --out_dir"
    names = [path.name for path in folder.glob("*")]
    left = [name for name in names if any(fnmatch(name, pattern) for pattern in LEFT)]
    others = set(names) - set(left if ".lock" in names else ())
    return f"holds something that is no run's: {some(others)}; choose another --out_dir" if others else ""


@contextmanager
def telling_what_needs_less(config, folder):
    """Running out of memory inside becomes a ValueError that names the next thing to try."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):                                                            # fault 37
            raise
        ways = " or ".join(what_needs_less(config, folder))
        raise ValueError(f"out of memory at batch_size {config.batch_size}; try {ways}") from None


def what_needs_less(config, folder):
    """
    What to try where memory does not suffice, as flags that such a run takes: one that has begun keeps its batch size, and its
    last saved state is whole.
    """
    world, begun = machine.WORLD_SIZE, Path(folder, "config.toml").is_file()
    half = config.batch_size // world // 2 * world
    anew = "" if config.checkpointing else "--checkpointing"
    if half:
        anew = f"--batch_size {half} --gradient_accumulation_steps {2 * config.gradient_accumulation_steps}"
    if anew and begun:
        anew += " with another --out_dir"
    ways = [anew or "a base in fewer bits (--quant nf4) or shorter sequences (--block_size)"]
    if begun and not config.checkpointing:                                                      # fault 42
        ways.append(f"--resume {folder} --checkpointing, which goes on from the last saved state")
    return ways


@contextmanager
def only_writer(folder):
    """One process a folder: an advisory lock that ends with the process, however it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = folder / ".lock"
    with open(regular(lock) if lock.exists() else lock, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)                                    # fault 21
        except BlockingIOError:
            raise ValueError(f"{folder}: another process is writing there; wait until it has ended, or start a new run elsewhere with --out_dir") from None
        yield


def wait_for_writers(folder, name):
    """Waits until the folder holds a file of that name, which somebody is writing, or nobody writes there."""
    lock = folder / ".lock"
    while lock.is_file() and not (folder / name).is_file():
        with open(lock, "rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                machine.say(f"another process is writing {folder}; waiting for it")
                fcntl.flock(file, fcntl.LOCK_SH)


def write_beginning(run):
    """
    Writes the tokenizer, and adapter and state as they are before the first step, so that there is always one to go on from;
    at last the resolved configuration, which makes the folder a run.
    """
    if machine.RANK == 0:
        run.tokenizer.save(run.folder)
        if run.chat is not None:
            write_atomic(run.folder / template.KEPT, run.chat.source.encode())
        peft.save_adapter(run.model, run.folder / "adapter.pt")                                 # fault 41
    save_state(run)                                                                             # fault 41
    if machine.RANK == 0:
        write_atomic(run.folder / "config.toml", write_toml(run.config).encode())


def remember(run, given):
    """Writes into a resumed run's config.toml what has changed by the flags of those names, and how long it is now."""
    kept = read_run_config(run.folder)
    changed = {name: getattr(run.config, name) for name in MAY_CHANGE if name in given | {"max_iters"}}
    new = dataclasses.replace(kept, **changed)
    if new != kept and machine.RANK == 0:
        write_atomic(run.folder / "config.toml", write_toml(new).encode())                      # fault 44


class Log:
    """
    log.jsonl, a line of JSON a step and an evaluation. Resuming drops the lines of the steps that are done
    again.
    """

    def __init__(self, path, first_step):
        entries = read_json_lines(path) if first_step and path.is_file() else []
        kept = [entry for entry in entries if self.is_before(entry, first_step)]
        write_atomic(path, "".join(json.dumps(entry) + "\n" for entry in kept).encode())
        self.path = path

    def is_before(self, entry, first_step):
        """
        Whether an entry tells of what was done before that step; step i - 1 and the evaluation after it come
        before step i.
        """
        is_step = "lr" in entry
        return typed("step", entry.get("step"), int, "log.jsonl: ") + is_step <= first_step

    def write(self, **entry):
        """Adds a line."""
        with open(self.path, "a") as file:
            file.write(json.dumps(entry) + "\n")


class Interrupt:
    """The first SIGINT or SIGTERM asks for an end after this step; the second ends at once."""

    def __init__(self):
        self.asked = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.handle)                                                  # fault 38

    def handle(self, number, frame):
        """Called by the system."""
        self.asked = True
        signal.signal(number, signal.SIG_DFL)                                                   # fault 38
        if machine.RANK == 0:
            print("\nsaving after this step; once more to stop at once", file=sys.stderr)


# -----------------------------------------------------------------------------
# the state that a run is resumed from


def save_state(run):
    """
    Writes state.pt, everything that the next step depends on; the one before it stays as state.before.pt.
    """
    generators = generator_states()
    if machine.RANK == 0:
        state, link = run.folder / "state.pt", run.folder / "state.link"
        if run.state_is_whole:                                                                  # fault 48
            link.unlink(missing_ok=True)                                                        # fault 8
            os.link(state, link)
            os.replace(link, run.folder / "state.before.pt")
        content = {
            "config": dataclasses.asdict(run.config), "tensors": peft.adapter_state_dict(run.model),
            "optimizer": run.optimizer.state_dict(), "rng": generators, "data": run.batches.state_dict(),
            "progress": dict(run.progress), "fingerprints": run.fingerprints, "scaler": run.scaler.state_dict()}
        save_file(state, content)
    run.state_is_whole = True
    machine.gathered(None)                                       # Writing may outlast a step's patience.


def generator_states():
    """The state of every process's random generators: {"cpu": [by rank], "cuda": [by rank]}."""
    own = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        own["cuda"] = torch.cuda.get_rng_state()
    states = machine.gathered(own)
    return {kind: [state[kind] for state in states] for kind in own}


def newest_state(folder):
    """The last state that was saved whole: state.pt, or the one before it with a warning."""
    return find_state(folder)[0]


def find_state(folder):
    """(newest_state, whether it is in state.pt)."""
    try:
        state = read_file(folder / "state.pt")
    except ValueError as error:
        before = folder / "state.before.pt"
        if before.is_file():                                                                    # fault 2
            print(f"{error}; going on from state.before.pt", file=sys.stderr)
            return checked_state(read_file(before), before), False
        raise
    return checked_state(state, folder / "state.pt"), True


PARTS = ("config", "tensors", "optimizer", "rng", "data", "progress", "fingerprints")
PROGRESS = {"step": int, "best": float, "skipped": int, "skipped_in_a_row": int, "seconds": float, "tokens": int,
            "waited": int, "evaluated": int, "before": float, "samples": list}


def checked_state(state, where):
    """The content of a state's file; ValueError unless it has the parts of such, and says of the progress what can be."""
    with located(where):
        for name in PARTS:
            typed(name, state.get(name), dict)
        unknown = [shown(name) for name in renamed(state["config"]) if name not in FIELDS]
        check(not unknown, f"its config has {some(unknown)}, which is not known")
        check(holds_tensors_by_name(state["tensors"]), "its tensors are something else than tensors by name")
        typed("base", state["fingerprints"].get("base"), str)
        progress = {"evaluated": -1} | state["progress"]
        for name, kind in PROGRESS.items():
            value = typed(name, progress.get(name), kind)
            if kind is int:
                bounded(name, value, table={name: (-1 if name == "evaluated" else 0, LONG**2)})
        for pair in progress["samples"]:
            texts = isinstance(pair, (tuple, list)) and [type(text) for text in pair] == [str, str]
            check(texts, f"samples hold {shown(pair)}, not a prompt and a text")
    return state


def restore(run):
    """
    The inverse of save_state; returns the configuration that the state was saved with. Whatever does not fit is refused
    before anything is changed.
    """
    state, run.state_is_whole = find_state(run.folder)
    check_state(run, state)
    peft.load_state(run.model, state["tensors"])
    run.optimizer.load_state_dict(state["optimizer"])
    run.scaler.load_state_dict(state.get("scaler"))
    run.batches.load_state_dict(state["data"])
    run.progress.update(state["progress"])
    rng, rank = state["rng"], machine.RANK
    if rank < len(rng["cpu"]):
        torch.set_rng_state(rng["cpu"][rank])
        if torch.cuda.is_initialized() and "cuda" in rng:
            torch.cuda.set_rng_state(rng["cuda"][rank])
    else:                                                        # There are more processes than before.
        torch.manual_seed(state["config"]["seed"] + rank + 10**6 * run.progress["step"])
    return Config(**renamed(state["config"]))


def told_of_interruption(run):
    """Lines about where an interrupted run stands."""
    folder = shlex.quote(str(run.folder))
    yield f"interrupted after step {run.progress['step']}; python train.py --resume {folder} goes on"
    if run.progress["evaluated"] < 0:
        yield f"adapter.pt is untrained yet, because nothing was evaluated; python sample.py {folder} --adapter last"


def told_of_resuming(run, before):
    """Lines about where a resumed run stands, and what another length than before, in that configuration, does to it."""
    config, step = run.config, run.progress["step"]
    yield f"resumed    at step {step}"
    if config.max_iters != before.max_iters and step < config.max_iters:
        last, following = learning_rate(before, max(step - 1, 0)), learning_rate(config, step)
        yield (f"schedule   {config.max_iters} steps instead of {before.max_iters}: the learning rate was {last:.2e} at the last "
               f"step and goes on at {following:.2e}")


def check_state(run, state):
    """ValueError unless the state belongs to the run."""
    where = run.folder
    own, generators = torch.get_rng_state(), state["rng"].get("cpu")
    kept = isinstance(generators, list) and generators and all(is_like(t, own) for t in generators)
    check(kept, f"{where}: lacks the state of the random generator; it cannot be resumed")  # fault 16
    for what, value in run.fingerprints.items():
        check(state["fingerprints"].get(what) == value, f"{where}: the {what} has changed since that run (its fingerprint differs)")  # fault 19
    config = renamed(state["config"])
    for name, value in dataclasses.asdict(run.config).items():
        before = config.get(name, FIELDS[name].default)
        may_differ = name in (*MAY_CHANGE, "resume", "dry_run", "out_dir")          # A folder may have moved.
        check(may_differ or before == value, f"{where}: {name} was {before!r} when the state was saved; config.toml says {value!r}")  # fault 14
    check(fits(run.optimizer, state["optimizer"]), f"{where}: its optimizer state does not fit the trained tensors")  # fault 15
    check(scales_alike(run.scaler.state_dict(), state.get("scaler", {})), f"{where}: lacks the scale of the loss; it cannot be resumed")


def scales_alike(own, kept):
    """Whether what a state holds of a scaler is of one like our own, whose state_dict is given."""
    if not own or not isinstance(kept, dict):
        return own == kept
    scale, steps = kept.get("scale"), kept.get("_growth_tracker")
    known = type(scale) is float and 0 < scale < math.inf and type(steps) is int and steps >= 0
    return known and kept | {"scale": own["scale"], "_growth_tracker": own["_growth_tracker"]} == own


def is_like(t, own):
    """Whether t is a tensor of own's shape and type."""
    return isinstance(t, torch.Tensor) and t.shape == own.shape and t.dtype == own.dtype


def fits(optimizer, state):
    """
    Whether an optimizer's state_dict has the optimizer's groups with their settings, but for the learning rate of the moment,
    and moments of its parameters' shapes.
    """
    own, groups = optimizer.state_dict(), state.get("param_groups")
    dicts = isinstance(groups, list) and all(isinstance(part, dict) for part in groups)
    if not dicts or len(groups) != len(own["param_groups"]):
        return False
    for mine, theirs in zip(own["param_groups"], groups):
        if any(theirs.get(name, value) != value for name, value in mine.items() if name != "lr"):
            return False
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    moments = typed("state", state.get("state"), dict)
    known = moments.keys() <= set(range(len(parameters)))
    return known and all(are_moments(part, parameters[i], optimizer) for i, part in moments.items())


def are_moments(part, parameter, optimizer):
    """Whether a part of a state is what the optimizer keeps of that parameter."""
    wanted = new_state(optimizer, parameter.detach().to("meta"))         # Their shapes need no memory.
    return isinstance(part, dict) and all(is_like(part.get(name), own) for name, own in wanted.items())
