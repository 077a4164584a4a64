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

import ctypes
import dataclasses
import difflib
import fcntl
import importlib.util
import inspect
import json
import math
import os
import re
import shutil
import signal
import sys
import time
import tomllib
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

# -----------------------------------------------------------------------------
# configuration: a field is a key of the file and a flag of the command line; the comment is its help


@dataclass
class Config:
    """Every flag, with its default and its help."""

    # what is trained on what
    method: str = "lora"              # lora qlora adapter prefix prompt ia3 bitfit top full, several joined by +
    base: str = ""                    # folder in Hugging Face layout; none: a small one, pretrained once into out/base
    data: str = "embedded"            # embedded, plain, or a path: E2E folder, .jsonl (prompt, completion), .txt
    out_dir: str = ""                 # the run's folder; none: out/METHOD, numbered where that is taken
    resume: str = ""                  # the folder of a run to go on with
    dry_run: bool = False             # report parameters and memory, then stop
    # the base in storage
    quant: str = ""                   # nf4 linear4 int4 int8; none: as it is (qlora: nf4)
    quant_block: int = 64             # weights that share a scale: 16 .. 4096; 0: a row
    quant_double: bool = True         # the scales in 8 bits (QLoRA, section 3)
    quant_skip: str = ""              # linear layers to leave as they are, by name, joined by commas
    # methods (peft.py)
    rank: int = 8                     # LoRA: r
    alpha: float = 16.0               # LoRA: s = alpha / r
    dropout: float = 0.0              # LoRA: on the input of A
    targets: str = "all"              # LoRA: which of q k v out up gate down, joined by commas
    rslora: bool = False              # LoRA: s = alpha / sqrt(r)
    lora_plus_ratio: float = 16.0     # LoRA+: learning rate of B over that of A; 1: plain LoRA
    adapter_style: str = "houlsby"    # houlsby, pfeiffer or lin
    adapter_size: int = 64            # bottleneck width
    adapter_activation: str = "relu"  # relu, gelu, swish or tanh
    prefix_length: int = 16           # s_k and s_v, in positions
    prefix_style: str = "before"      # before the projection (slide) or after (Li and Liang)
    prefix_tied: bool = False         # s_k = s_v (before only)
    prefix_mlp: int = 0               # hidden width of the reparametrization (after only); 0: none
    prompt_length: int = 16           # soft prompt, in positions
    prompt_init: str = ""             # text the soft prompt starts from; none: random
    top_k: int = 2                    # top: the last k blocks
    # data
    block_size: int = 0               # longest sequence; 0: the base's context
    template: str = "pipe"            # of meaning representations: pipe (name : X | food : Y||) or raw
    too_long: str = "refuse"          # or cut
    # optimization
    batch_size: int = 8               # sequences a micro-batch, shared among the processes
    gradient_accumulation_steps: int = 1
    max_iters: int = 1200             # optimizer steps
    learning_rate: float = 2e-3
    lr_schedule: str = "cosine"       # cosine, linear or constant, after the warm-up
    warmup_iters: int = 20
    min_lr: float = 0.0
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.999
    grad_clip: float = 1.0            # norm of all gradients; 0: none
    label_smoothing: float = 0.0
    # evaluation and saving
    eval_interval: int = 300          # steps; the state is saved then too
    eval_batches: int = 40            # batches of each split; 0: all
    save_interval: int = 0            # steps between saves beside those; 0: none
    log_interval: int = 20            # steps between progress lines
    sample_count: int = 3             # representations to write about before and after
    # machine
    device: str = "auto"              # auto, cpu, cuda, cuda:1
    dtype: str = "auto"               # of the computation: auto, float32, bfloat16
    compile: bool = False             # torch.compile the model
    checkpointing: bool = False       # recompute each block in the backward pass
    offload: bool = False             # keep what the backward pass needs in the host's memory (GPU)
    fsdp: bool = False                # divide the frozen base among the processes (torchrun)
    seed: int = 1

    def __post_init__(self):
        if "qlora" in self.method.split("+") and not self.quant:
            self.quant = "nf4"
        for name in ("batch_size", "gradient_accumulation_steps", "eval_interval", "log_interval", "rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("max_iters", "warmup_iters", "eval_batches", "save_interval", "block_size", "sample_count", "quant_block",
                     "learning_rate", "min_lr", "weight_decay", "grad_clip", "label_smoothing", "dropout"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be a number, at least 0")
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate is {self.learning_rate}; it must be above 0")
        for name in ("beta1", "beta2", "label_smoothing", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must lie in [0, 1)")
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(filter(None, allowed))}")


RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))      # torchrun sets them
CHOICES = {"quant": ("", "nf4", "linear4", "int4", "int8"), "lr_schedule": ("cosine", "linear", "constant"), "too_long": ("refuse", "cut"),
           "template": ("pipe", "raw"), "dtype": ("auto", "float32", "bfloat16")}
MAY_CHANGE = ("max_iters", "eval_interval", "save_interval", "log_interval", "sample_count", "device", "fsdp", "resume", "dry_run")    # when resuming
FIELDS = {f.name: f for f in dataclasses.fields(Config)}
KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def convert(name, value, where):
    """The value of a key, from TOML or from a flag's string, in the field's type."""
    if name not in FIELDS:
        near = difflib.get_close_matches(name, FIELDS, 1, 0.0)[0]
        raise ValueError(f"{where}: unknown key {name!r}; the nearest is {near!r}")
    kind = FIELDS[name].type
    try:
        if kind is bool and isinstance(value, str):
            return {"true": True, "1": True, "false": False, "0": False}[value.lower()]
        if kind in (int, float) and isinstance(value, str):
            return kind(value)
        if kind is float and type(value) is int:
            return float(value)
        if type(value) is not kind:
            raise ValueError
    except (ValueError, KeyError):
        raise ValueError(f"{where}: {name} is {value!r}; it must be {KINDS[kind]}") from None
    return value


def read_toml(path):
    """A file's keys and values, checked."""
    try:
        values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"{path}: {error}") from None
    return {name: convert(name, value, path) for name, value in values.items()}


def write_toml(config):
    """The text of a config.toml that read_toml reads back."""
    lines = (f"{name} = {json.dumps(value, ensure_ascii=False)}".replace("\x7f", "\\u007f") for name, value in dataclasses.asdict(config).items())
    return "\n".join(lines) + "\n"


def command_line(args):
    """[FILE.toml] --key value --key=value --a-b --switch -> Config. A resumed run's own configuration comes first."""
    values, args = {}, list(args)
    if args and not args[0].startswith("-"):
        values = read_toml(args.pop(0))
    flags = {}
    while args:
        flag, equals, value = args.pop(0).partition("=")
        if not flag.startswith("--"):
            raise ValueError(f"{flag!r} is neither a flag nor the first argument; flags are --key value")
        name = flag[2:].replace("-", "_")
        if not equals:
            bare = name in FIELDS and FIELDS[name].type is bool and (not args or args[0].startswith("--"))
            if not bare and not args and name in FIELDS:
                raise ValueError(f"{flag} needs a value")
            value = "true" if bare else args.pop(0) if args else ""
        flags[name] = convert(name, value, "command line")
    values |= flags
    if "resume" not in values:
        return Config(**values)
    folder = values["resume"]
    if not Path(folder, "config.toml").is_file():
        raise ValueError(f"{folder}: no run to resume there (it has no config.toml)")
    before = read_toml(Path(folder, "config.toml")) | {"out_dir": folder, "dry_run": False}
    changed = [name for name, value in values.items() if name not in MAY_CHANGE and before[name] != value]
    if changed:
        name = changed[0]
        raise ValueError(f"{folder}: {name} was {before[name]!r} and cannot become {values[name]!r} in a resumed run; "
                         f"only {', '.join(MAY_CHANGE[:-2])} can change")
    return Config(**before | values)


def help_text():
    """The fields above with their comments."""
    source = Path(__file__).read_text(encoding="utf-8").split("class Config:")[1].split("def __post_init__")[0]
    lines = [__doc__.strip(), "", "flags, as --key value or --key=value:"]
    for line in source.splitlines():
        if match := re.match(r"    (\w+): \w+ = (.+?)(?:\s+# (.*))?$", line):
            name, default, comment = match.groups()
            lines.append(f"  --{name:28} {default:12} {comment or ''}".rstrip())
        elif match := re.match(r"    # (.*)", line):
            lines.append("\n" + match[1])
    return "\n".join(lines)


def run_main(main, *args):
    """main(*args), a user's mistake told in one line on standard error with exit status 2. NANOPEFT_DEBUG=1 shows the traceback."""
    try:
        return main(*args)
    except BrokenPipeError:                                      # whoever read has gone, as head does
        os._exit(0)
    except (ValueError, OSError) as error:
        if os.environ.get("NANOPEFT_DEBUG"):
            raise
        print(f"{Path(sys.argv[0]).name}{f', process {RANK}' if WORLD_SIZE > 1 else ''}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{Path(sys.argv[0]).name}: interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":      # --help and mistakes answer here, before torch is imported
    if {"-h", "--help"} & set(sys.argv[1:]):
        sys.exit(run_main(lambda: print(help_text(), flush=True)))
    CONFIG = run_main(command_line, sys.argv[1:])

import torch

import data
import peft
import quant
from model import GPT, GPTConfig

# -----------------------------------------------------------------------------
# the step


def numbers_are_finite(loss, norm):
    """Whether a step may be taken."""
    return math.isfinite(loss) and math.isfinite(norm)


def step(model, optimizer, micro_batches, grad_clip, smoothing=0.0, finite=numbers_are_finite, saving=nullcontext):
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
            part = model(tokens, targets, smoothing)[1] * (count / total)
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


def compiled(model, device):
    """Compiles the forward and backward pass where there is a compiler; whether there is one."""
    there = importlib.util.find_spec("triton") if device.type == "cuda" else shutil.which(os.environ.get("CXX", "g++"))
    if there:
        model.compile(dynamic=True)
    return bool(there)


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
# machine


def sum_over_processes(first, *rest):
    """Sums tensors over the processes, in place, as one message of float32; returns the first."""
    if WORLD_SIZE > 1:
        flat = torch.cat([t.reshape(-1).float() for t in (first, *rest)])
        torch.distributed.all_reduce(flat)
        for t, part in zip((first, *rest), flat.split([t.numel() for t in (first, *rest)])):
            t.copy_(part.view(t.shape))
    return first


def gathered(value):
    """What every process gives, by rank; nobody goes on before all have come here."""
    told = [value] * WORLD_SIZE
    if WORLD_SIZE > 1:
        torch.distributed.all_gather_object(told, value, PATIENT)
    return told


def anybody(asked, device):
    """Whether any process is asked to end: all then end after the same step."""
    return asked if WORLD_SIZE == 1 else bool(sum_over_processes(torch.tensor(float(asked), device=device)))


def agree(values):
    """Every process must do the same work. values: {what: value}"""
    for rank, other in enumerate(told := gathered(values)):
        for name, value in told[0].items():
            if other[name] != value:
                raise ValueError(f"process {rank} has {name} {other[name]!r}, process 0 has {value!r}; start all with the same")


@contextmanager
def processes(device):
    """Joins the other processes, where torchrun has started several. One that is lost ends the others: at once where its connection
    breaks, after a minute where it only falls silent."""
    global PATIENT
    try:
        if WORLD_SIZE > 1:
            torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=1))
            PATIENT = torch.distributed.new_group(timeout=timedelta(minutes=30), backend="gloo")     # where one works and the others wait
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.distributed.DistError) and "gloo" not in str(error):
            raise
        raise ValueError(f"another process has ended or does not answer ({str(error).splitlines()[0]}); torchrun's report names its rank; "
                         "the last saved state is intact, --resume goes on from it") from None
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
            PATIENT = None                                       # joins gloo's threads: one that lets go of a tensor after Python's end aborts the process


def check_processes(config):
    """Refuses what several processes, or one, cannot do."""
    if config.batch_size % WORLD_SIZE:
        below = config.batch_size // WORLD_SIZE * WORLD_SIZE
        raise ValueError(f"batch_size is {config.batch_size}, which {WORLD_SIZE} processes cannot share equally; --batch_size {below or WORLD_SIZE} can be, or start another number")
    if not config.fsdp:
        return
    if WORLD_SIZE == 1:
        raise ValueError("fsdp divides the base among processes, but there is one; start it as torchrun --nproc_per_node=2 train.py .., or with --fsdp false")
    training = {"full", "top", "bitfit"} & set(peft.method_names(config.method))
    if training:
        raise ValueError(f"fsdp divides a frozen base, but {training.pop()} trains it; lora, adapter, prefix, prompt and ia3 can, or several processes without --fsdp")
    for name in ("compile", "offload"):
        if getattr(config, name):
            raise ValueError(f"fsdp and {name} do not go together; leave one of them out")


def shard(model, device):
    """FSDP2: a block's tensors lie divided among the processes, in storage, and come together as bytes while the block computes.

    What is trained is attached afterwards, and stays whole everywhere like embedding, norm and head: optimizer, saving and
    sum_over_processes do not notice. The model comes on the CPU and goes to the device a block at a time.
    """
    from torch.distributed.fsdp import fully_shard
    if "ignored_params" not in inspect.signature(fully_shard).parameters:
        raise ValueError(f"fsdp needs torch 2.7 or newer, this is {torch.__version__}; several processes without --fsdp need none")
    mesh = torch.distributed.init_device_mesh(device.type, (WORLD_SIZE,))
    blocks, model.blocks = model.blocks, torch.nn.ModuleList()
    model.to(device)
    whole, model.blocks = set(model.parameters()), blocks
    for block in blocks:
        for module in block.modules():
            if isinstance(module, quant.QuantLinear):
                module.make_parameters()
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, ignored_params=whole)          # holds nothing; fetches a block while the one before it computes


def pick_device(name):
    """The torch.device of "auto", "cpu", "cuda" or "cuda:1"; of this process's GPU under torchrun. ValueError if it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device is {name!r}; it must be auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise ValueError(f"device is {name!r}, but there are {torch.cuda.device_count()} GPUs here; --device cpu runs without")
    if device.type == "cuda" and WORLD_SIZE > 1:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        if device.index >= torch.cuda.device_count():
            raise ValueError(f"process {RANK} is number {device.index + 1} here, where there are {torch.cuda.device_count()} GPUs; start one a GPU")
    return device


def pick_dtype(name, device):
    """bfloat16 where the hardware multiplies it natively, else float32."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        native = any(getattr(torch.cpu, f"_is_{kind}_supported", bool)() for kind in ("amx_tile", "avx512_bf16"))
    return torch.bfloat16 if native else torch.float32


def tune_memory():
    """
    Tells the C library to keep freed memory: on a CPU the page faults of fresh allocations cost as much as the arithmetic. And
    oneDNN to keep fewer of the kernels that it compiles, one for every shape of a bfloat16 product: the 1,024 that it keeps
    itself are half a gigabyte, where lengths vary. Works only before the first product.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
    os.environ.setdefault("LRU_CACHE_CAPACITY", "64")            # torch's own, in front of it
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return                                                   # not glibc
    M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
    for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 2**26)):
        mallopt(option, value)


def resident():
    """Bytes in use: of the GPU by tensors, or of this process's memory."""
    if torch.cuda.is_initialized():
        return torch.cuda.memory_allocated()
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak():
    """The most bytes that were in use at any time."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    with open("/proc/self/status") as f:                         # (getrusage's begins with what the starting process had)
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith("VmHWM"))


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


class Interrupt:
    """The first SIGINT or SIGTERM asks for an end after this step; the second ends at once."""

    def __init__(self):
        self.asked = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.handle)

    def handle(self, number, frame):
        self.asked = True
        signal.signal(number, signal.SIG_DFL)
        if RANK == 0:
            print("\nsaving after this step; once more to stop at once", file=sys.stderr)


# -----------------------------------------------------------------------------
# what a run consists of

BASE = "out/base"
SMALL = GPTConfig(vocab_size=2048, block_size=256, n_layer=3, n_head=4, n_embd=256)    # 3 M parameters
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


def load_base(config, device, dtype):
    """(model, tokenizer) without a method: from a folder in Hugging Face layout, or new."""
    if config.base == "new":
        texts = [text for example in data.load(config.data).train for text in (example.prompt, *example.references)]
        tokenizer = data.Tokenizer.train(texts, SMALL.vocab_size)
        return GPT(dataclasses.replace(SMALL, vocab_size=tokenizer.vocab_size), dtype).to(device), tokenizer
    import hub                                                   # a door: the core runs without it
    model = hub.load_base(config.base, dtype, config.quant or None, config.quant_block or None, config.quant_double,
                          tuple(filter(None, config.quant_skip.split(","))), device)
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
        return peft.read_file(folder / "state.pt")
    except ValueError as error:
        if not (folder / "state.before.pt").is_file():
            raise
        print(f"{error}; going on from state.before.pt", file=sys.stderr)
        return peft.read_file(folder / "state.before.pt")


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
    if RANK >= len(state["rng"]["cpu"]):                         # more processes than before
        torch.manual_seed(state["config"]["seed"] + RANK + 10**6 * progress["step"])
        return
    torch.set_rng_state(state["rng"]["cpu"][RANK])
    if torch.cuda.is_initialized() and "cuda" in state["rng"]:
        torch.cuda.set_rng_state(state["rng"]["cuda"][RANK])


class Log:
    """log.jsonl and the progress line. Resuming drops the lines of the steps that are done again."""

    def __init__(self, path, first_step):
        kept = []
        if first_step and path.is_file():
            entries = [(line, json.loads(line)) for line in path.read_text().splitlines()]
            kept = [line for line, entry in entries if entry["step"] + ("lr" in entry) <= first_step]      # step i and its evaluation come before i + 1
        peft.write_atomic(path, "".join(line + "\n" for line in kept).encode())
        self.path = path

    def write(self, **line):
        """Adds a line of JSON."""
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")


def say(*lines):
    """Prints lines, in the first process alone."""
    if RANK == 0:
        print(*lines, sep="\n", flush=True)


def size(n):
    """Bytes for people: 1536 -> '1.5 kB' (powers of ten)."""
    for unit in ("B", "kB", "MB", "GB"):
        if n < 999.5 or unit == "GB":
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000


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


# -----------------------------------------------------------------------------
# the run


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
    import memory
    options = {name: getattr(config, name) for name in peft.DEFAULTS if name in FIELDS}
    return memory.simulate(task.model.config, config.method, *shape, getattr(torch, config.dtype), device.type, config.quant or None, config.quant_block or None,
                           config.quant_double, config.quant_skip.split(","), config.checkpointing, config.gradient_accumulation_steps, config.grad_clip,
                           config.label_smoothing, config.offload, **options)["peak"]


@contextmanager
def measured(task, config, device, optimizer, micro_batches, i):
    """Says how much memory the step within took at its peak, and what was predicted for its shape."""
    import memory
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
    with only_writer(folder) if RANK == 0 and not config.dry_run else nullcontext():
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
        shape = config.batch_size // WORLD_SIZE, int(data.padded(max(len(ids) - 1 for ids, _ in task.encoded["train"].sequences), task.encoded["train"].block_size))
        say(f"memory     {size(predict(task, config, device, shape))} predicted at the peak{' without fsdp' * config.fsdp}, for {shape[0]} x {shape[1]} tokens")
        task.model.checkpointing = config.checkpointing
        if config.compile and not compiled(task.model, device):
            say("compile    there is no compiler here; running without")
        if config.dry_run:
            return None
        optimizer = make_optimizer(task.model, config)
        batches = data.Batches(task.encoded["train"], config.batch_size // WORLD_SIZE, config.seed, RANK, WORLD_SIZE)
        if config.resume:
            restore(folder, task.model, optimizer, batches, config, progress, task.fingerprints)
            say(f"resumed    at step {progress['step']}")
        elif RANK == 0:
            task.tokenizer.save(folder)
            peft.write_atomic(folder / "config.toml", write_toml(config).encode())
        done = loop(config, folder, device, task, optimizer, batches, progress)
        metrics = finish(config, folder, task, progress) if done and (RANK == 0 or config.fsdp) else None
        gathered(None)                                           # nobody leaves before all is written
        return metrics


def loop(config, folder, device, task, optimizer, batches, progress):
    """Trains until max_iters (True) or until somebody asks for an end (False); saves either way."""
    interrupt, model, ended = Interrupt(), task.model, False
    log = Log(folder / "log.jsonl", progress["step"]) if RANK == 0 else None
    torch.manual_seed(config.seed + RANK) if not progress["step"] else None      # dropout differs between processes

    def save():
        rng = generators()
        if RANK == 0:
            if (folder / "state.pt").is_file():
                (folder / "state.link").unlink(missing_ok=True)
                os.link(folder / "state.pt", folder / "state.link")
                os.replace(folder / "state.link", folder / "state.before.pt")
            peft.save_file(folder / "state.pt", snapshot(model, optimizer, batches, config, progress, task.fingerprints, rng))
        gathered(None)                                           # a large state takes longer to write than a step may last

    def check():
        losses = task.losses(config)
        say(f"step {progress['step']}: train loss {losses['train_loss']:.4f}, val loss {losses['val_loss']:.4f}")
        if RANK == 0:
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
        watched = RANK == 0 and not config.compile and not config.fsdp and (not taken or i + 1 == config.max_iters)
        with measured(task, config, device, optimizer, micro_batches, i) if watched else nullcontext():
            loss, norm = (float(t) for t in step(model, optimizer, micro_batches, config.grad_clip, config.label_smoothing, saving=saving))
        taken += 1
        seconds, tokens = time.perf_counter() - start, sum(t.numel() for t, _ in micro_batches) * WORLD_SIZE
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
        if RANK == 0:
            peft.save_file(folder / "bad_batch.pt", {"step": progress["step"], "batches": all_batches})
        raise ValueError(f"ten steps in a row had no finite loss or gradient; the last batch is in {folder / 'bad_batch.pt'}, the last good state in state.pt")


def finish(config, folder, task, progress):
    """Best adapter, samples, metrics, and what to do next."""
    peft.load_adapter(task.model, folder / "adapter.pt", replace=True)
    if config.base == "new":
        import hub
        hub.save_base(task.model, folder)
    after = task.samples(config)
    if RANK:
        return None                                              # under fsdp: it was needed for the samples
    text = "\n".join(f"prompt: {prompt}\nbefore: {old}\nafter:  {new}\n" for (prompt, old), (_, new) in zip(progress["samples"], after))
    peft.write_atomic(folder / "samples.txt", text.encode())
    metrics = {"method": config.method, "seed": config.seed, "trainable": peft.count_parameters(task.model)["trainable"],
               "loss_before": progress["before"], "val_loss": progress["best"], "steps": progress["step"], "skipped": progress["skipped"],
               "seconds": round(progress["seconds"], 2), "tokens_per_second": round(progress["tokens"] / max(progress["seconds"], 1e-9)),
               "peak_bytes": peak(), "adapter_bytes": (folder / "adapter.pt").stat().st_size, "base_bytes": task.base_bytes}
    peft.write_atomic(folder / "metrics.json", (json.dumps(metrics, indent=1) + "\n").encode())
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
        less = max(config.batch_size // WORLD_SIZE // 2, 1) * WORLD_SIZE
        raise ValueError(f"out of memory at batch_size {config.batch_size}; try --batch_size {less} --gradient_accumulation_steps {config.gradient_accumulation_steps * 2}"
                         + ("" if config.batch_size > WORLD_SIZE else " --checkpointing") + "; the last saved state is intact") from None


if __name__ == "__main__":
    run_main(main, CONFIG)
