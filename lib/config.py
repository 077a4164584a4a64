"""
Config.
"""

import dataclasses
import difflib
import json
import math
import os
import re
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path


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


def help_text(doc):
    """The fields above with their comments."""
    source = Path(__file__).read_text(encoding="utf-8").split("class Config:")[1].split("def __post_init__")[0]
    lines = [doc.strip(), "", "flags, as --key value or --key=value:"]
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
        process = f", process {os.environ['RANK']}" if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
        print(f"{Path(sys.argv[0]).name}{process}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{Path(sys.argv[0]).name}: interrupted", file=sys.stderr)
        sys.exit(130)
