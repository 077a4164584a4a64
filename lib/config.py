"""
What a run can be told: one flat dataclass as flags, as a TOML file and as help. Without torch, so that
--help answers at once.

    config = command_line(["configs/small.toml", "--method", "lora", "--rank=4"])       # a Config, checked
    print(help_text(doc))                                                               # every flag with its meaning

A knob of the run is declared in the class below, an option of a method in the signature of the method's
function in peft.py. Either is one line: name, default, and a comment that is its help.
"""

import ast
import dataclasses
import gc
import json
import os
import re
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

from lib.checks import KINDS, check, check_known, checked, regular, shown

ROOT = Path(__file__).resolve().parents[1]

# -----------------------------------------------------------------------------
# knobs


@dataclass
class Knobs:
    """What every run can be told, whatever its method."""

    # what is trained on what
    method: str = "lora"              # one of peft.METHODS, or several joined by +
    train_also: str = ""              # embed, head, norm, joined by commas: beside the method, as if joined to it by +
    base: str = ""                    # folder in Hugging Face layout; none: a small one, pretrained once into out/base
    data: str = "embedded"            # embedded, plain, waiter, or a path: a folder, .jsonl, .json, .csv, .txt
    out_dir: str = ""                 # the run's folder; none: out/METHOD, numbered where that is taken
    resume: str = ""                  # the folder of a run to go on with
    init_from: str = ""               # a run, an adapter.pt or a folder of PEFT's: the new run starts with its tensors
    dry_run: bool = False             # report parameters and memory, then stop
    # the base in storage
    quant: str = ""                   # a code of quant.CODES, such as nf4 or int8; none: as it is (qlora: nf4)
    quant_block: int = 64             # weights that share a scale: 16 .. 4096; 0: a row
    quant_double: bool = True         # the scales in 8 bits (QLoRA, section 3)
    quant_skip: str = ""              # linear layers to leave as they are, by name, joined by commas
    # data
    add_tokens: str = ""              # a file, one new token a line; embed is trained then (and head, if untied)
    block_size: int = 0               # longest sequence; 0: the base's context
    template: str = "auto"            # representations: pipe, raw, none; chat: base, chatml, a .jinja file
    too_long: str = "refuse"          # or cut, or drop
    train_on: str = "completion"      # or prompt+completion
    packing: bool = False             # sequences side by side in one row, each on its own, instead of padded
    prompt_init: str = ""             # prompt: text the soft prompt starts from; none: random
    # optimization
    batch_size: int = 8               # sequences a micro-batch, shared among the processes
    gradient_accumulation_steps: int = 1    # micro-batches a step
    max_iters: int = 1200             # optimizer steps
    epochs: float = 0.0               # passes over the training sequences; 0: max_iters says how many steps
    patience: int = 0                 # evaluations without a better loss after which the run stops; 0: none
    learning_rate: float = 2e-3       # at its highest
    lora_plus_ratio: float = 16.0     # LoRA+: learning rate of B over that of A; 1: plain LoRA
    lr_schedule: str = "cosine"       # cosine, linear or constant, after the warm-up
    warmup_iters: int = 20            # steps until the learning rate is at its highest
    min_lr: float = 0.0               # where the schedule ends
    optimizer: str = "adamw"          # or adamw8bit: moments in 8 bits (Dettmers et al. 2022)
    weight_decay: float = 0.01        # of matrices; vectors and soft prompts do not decay
    beta1: float = 0.9                # Adam's mean
    beta2: float = 0.999              # Adam's mean of squares
    grad_clip: float = 1.0            # norm of all gradients; 0: none
    label_smoothing: float = 0.0      # share of the target that all tokens have alike
    # evaluation and saving
    eval_interval: int = 300          # steps; the state is saved then too
    eval_sequences: int = 320         # sequences of each split; 0: all
    save_interval: int = 0            # steps between saves beside those; 0: none
    log_interval: int = 20            # steps between progress lines
    keep_adapters: bool = False       # the adapter of each evaluation too, as adapter-STEP.pt
    sample_count: int = 3             # representations to write about before and after
    # machine
    device: str = "auto"              # auto, cpu, cuda, cuda:1
    dtype: str = "auto"               # of the computation: auto, float32, bfloat16, float16 (with a scaled loss)
    param_dtype: str = "float32"      # or bfloat16: what is trained, its gradients and moments, rounded at random
    compile: bool = False             # torch.compile the blocks: a minute, and not faster everywhere
    checkpointing: bool = False       # recompute each block in the backward pass
    offload: bool = False             # keep what the backward pass needs in the host's memory (GPU)
    fsdp: bool = False                # divide the frozen base among the processes (torchrun)
    seed: int = 1                     # of everything that is drawn

    given = frozenset()               # what a file or a flag has set, by name; not a field

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = checked(field.name, getattr(self, field.name), field.type)
            setattr(self, field.name, value)
        for name, allowed in CHOICES.items():
            value = getattr(self, name)
            is_file = name == "template" and value.endswith(".jinja")
            if value not in allowed and not is_file:                                        # fault 33
                raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(allowed)}")
        for name in filter(None, self.train_also.split(",")):
            if name not in TRAIN_ALSO:
                raise ValueError(f"train_also is {self.train_also!r}; it can name {', '.join(TRAIN_ALSO)}")
            self.method = with_methods(self.method, name)
        self.train_also = ""


def with_methods(method, *names):
    """Methods joined by +, and these among them."""
    return "+".join(dict.fromkeys([*method.split("+"), *names]))


TRAIN_ALSO = ("embed", "head", "norm")
CHOICES = {
    "lr_schedule": ("cosine", "linear", "constant"),
    "too_long": ("refuse", "cut", "drop"),
    "train_on": ("completion", "prompt+completion"),
    "template": ("auto", "pipe", "raw", "none", "base", "chatml"),
    "dtype": ("auto", "float32", "bfloat16", "float16"),
    "param_dtype": ("float32", "bfloat16"),
    "optimizer": ("adamw", "adamw8bit"),
}
MAY_CHANGE = (   # on resuming
    "max_iters", "epochs", "patience", "eval_interval", "save_interval", "log_interval", "keep_adapters",
    "sample_count", "checkpointing", "offload", "device", "fsdp",
    "base", "data")              # as paths; what lies there must be the same

# -----------------------------------------------------------------------------
# options of methods, read from the source of peft.py


@dataclass(frozen=True)
class Option:
    """A keyword argument of the functions of some methods."""
    name: str
    default: bool | int | float | str
    help: str
    methods: tuple


def comment_of(line):
    """The comment at a line's end."""
    return line.partition("  # ")[2].strip()


def read_method_options(path):
    """
    {name: Option} of the functions that the table METHODS in the file names, the arguments after the model.
    """
    source = path.read_text(encoding="utf-8")
    tree, lines = ast.parse(source), source.splitlines()
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    assignments = [node for node in tree.body if isinstance(node, ast.Assign)]
    table = next(node.value for node in assignments if getattr(node.targets[0], "id", "") == "METHODS")
    options = {}
    for method, function in zip(table.keys, table.values):
        arguments = functions[function.id].args
        for argument, value in zip(arguments.args[1:], arguments.defaults, strict=True):
            default = ast.literal_eval(value)
            if default is None:                                  # Not a flag: only a caller can give it.
                continue
            name = argument.arg
            option = options.get(name) or Option(name, default, comment_of(lines[argument.lineno - 1]), ())
            if option.default != default:
                raise ValueError(f"{path}: {name} is {option.default!r} and {default!r}; its default must be one")
            options[name] = dataclasses.replace(option, methods=(*option.methods, method.value))
    return options


METHOD_OPTIONS = read_method_options(ROOT / "peft.py")
Config = dataclasses.make_dataclass(
    "Config", [(option.name, type(option.default), option.default) for option in METHOD_OPTIONS.values()], bases=(Knobs,),
    namespace={"__doc__": "Every knob of the run and every option of the methods."})
FIELDS = {field.name: field for field in dataclasses.fields(Config)}


def method_options(config):
    """{name: value} of the options that the configuration's methods have."""
    chosen = set(config.method.split("+"))
    names = [name for name, option in METHOD_OPTIONS.items() if chosen & set(option.methods)]
    return {name: getattr(config, name) for name in names}


HEEDED = {"lora_plus_ratio": ("lora", "qlora", "dora"), "prompt_init": ("prompt",)}      # knobs -> the methods that heed them


def check_options(values, method, where, knobs=()):
    """ValueError where values name an option that none of the methods has, or one of the knobs, of HEEDED, that none heeds."""
    owners = {name: option.methods for name, option in METHOD_OPTIONS.items()}
    owners |= {name: HEEDED[name] for name in knobs}
    for name in values.keys() & owners.keys():
        heeded = set(owners[name]) & set(method.split("+"))
        known = ", ".join(owners[name])
        check(heeded, f"{where}: {name} is an option of {known}; the method is {method}")      # fault 46


def check_given(flags, config):
    """ValueError where a flag would change nothing in this run. A file of flags may be for several methods."""
    check_options(flags, config.method, "command line", HEEDED)
    for name in flags.keys() & {"quant_block", "quant_double", "quant_skip"}:
        stored = config.quant or "qlora" in config.method.split("+")
        check(stored, f"command line: {name} is of a base in few bits; --quant says which")


# -----------------------------------------------------------------------------
# values from text

SWITCH = {"true": True, "1": True, "false": False, "0": False}


FORMER = "eval_batches"          # It was a number of batches, so that losses changed with the batch size.


def renamed(values):
    """Keys and values, where batches to evaluate become as many sequences. eval_sequences holds beside them."""
    values = dict(values)
    batches = values.pop(FORMER, None)
    if batches is not None and "eval_sequences" not in values:
        values["eval_sequences"] = batches * values.get("batch_size", FIELDS["batch_size"].default)
    return values


def convert(name, value, where):
    """The value of a key, from TOML or from a flag's string, in the field's type."""
    if name == FORMER:
        return convert("max_iters", value, where)                # Another whole number.
    check_known("key", name, FIELDS, f"{where}: ")
    kind = FIELDS[name].type
    try:
        if kind is bool and isinstance(value, str):
            value = SWITCH[value.lower()]
        if kind in (int, float) and isinstance(value, str):
            value = kind(value)
    except (ValueError, KeyError, OverflowError):
        raise ValueError(f"{where}: {name} is {shown(value)}; it must be {KINDS[kind]}") from None
    return checked(name, value, kind, f"{where}: ")


def read_toml(path):
    """A file's keys and values, checked."""
    try:
        values = tomllib.loads(Path(regular(path)).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from None
    return {name: convert(name, value, path) for name, value in values.items()}


def write_toml(config):
    """
    The text of a config.toml that read_toml reads back: every knob, and the options of the chosen methods.
    """
    options = method_options(config)
    lines = []
    for name, value in dataclasses.asdict(config).items():
        if name in options or name not in METHOD_OPTIONS:
            text = json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
            lines.append(f"{name} = {text}\n")
    return "".join(lines)


def read_run_config(folder):
    """The Config of a run's folder."""
    return Config(**renamed(read_toml(Path(folder, "config.toml"))))


# -----------------------------------------------------------------------------
# the command line


def parse_flags(args):
    """["--key", "value", "--key=value", "--a-b", "v", "--switch"] -> {key: value}."""
    args, flags = list(args), {}
    while args:
        flag, equals, value = args.pop(0).partition("=")
        if not flag.startswith("--"):
            raise ValueError(f"{flag!r} is neither a flag nor the first argument; flags are --key value")
        name = flag[2:].replace("-", "_")
        is_switch = name in FIELDS and FIELDS[name].type is bool
        if not equals and is_switch and (not args or args[0].startswith("--")):
            value = "true"
        elif not equals and args:
            value = args.pop(0)
        elif not equals and name in FIELDS:
            raise ValueError(f"{flag} needs a value")
        flags[name] = convert(name, value, "command line")
    return flags


def command_line(args):
    """[FILE.toml] --key value ... -> Config. A resumed run's own configuration comes first."""
    args, values = list(args), {}
    if args and not args[0].startswith("-"):
        path = args.pop(0)
        values = read_toml(path)
    flags = parse_flags(args)
    for given, where in ((values, "the file"), (flags, "command line")):
        both = given.get("max_iters") and given.get("epochs")
        check(not both, f"{where}: max_iters and epochs are both given; one of them says how long the run is")
    if "max_iters" in flags:
        values.pop("epochs", None)                               # A flag wins against the file's word for the same.
    if "resume" in values | flags:
        return resumed(values | flags)
    if FORMER in flags:
        values.pop("eval_sequences", None)
    config = Config(**renamed(values | flags))
    config.given = frozenset(values | flags)
    if Path("new", "config.json").is_file():
        config.base = as_folder(config.base)
    if config.init_from:                                         # The adapter says which method it is of.
        return config
    check_options(values, config.method, "the file")
    check_given(flags, config)
    return config


def as_folder(path):
    """A folder's path, which cannot be taken for the word "new" that asks for a model from nothing."""
    return "./new" if str(path) == "new" else str(path)


def can_resume(folder):
    """Whether a run's folder holds a state to go on from."""
    return any(Path(folder, name).is_file() for name in ("state.pt", "state.before.pt"))


def way_on(folder):
    """How one goes on with what a run's folder holds, for a message."""
    if can_resume(folder):                                                                  # fault 42
        steps = read_run_config(folder).max_iters
        return f"--resume {folder} goes on with it up to its {steps} steps, --max_iters N further"
    if Path(folder, "config.json").is_file():
        return f"--base {folder} starts a new run from its model"
    if Path(folder, "adapter.pt").is_file():
        return f"--init_from {folder} starts a new run from its adapter"
    return "there is nothing in it to go on with"


def resumed(values):
    """The Config of the run that values name, with what of it may change."""
    folder = values["resume"]
    check("init_from" not in values, f"--init_from starts a new run and --resume goes on with {folder}; give one of them")
    check(Path(folder, "config.toml").is_file(), f"{folder}: no run to resume there (it has no config.toml)")
    kept = read_run_config(folder)
    check(can_resume(folder), f"{folder}: has no state.pt to resume from; {way_on(folder)}")
    check_options(values, kept.method, "command line", HEEDED)
    before = dataclasses.asdict(kept)
    values = renamed({"batch_size": before["batch_size"]} | values)
    before |= {"out_dir": folder, "dry_run": False}
    for name, value in values.items():
        if name not in (*MAY_CHANGE, "resume", "dry_run") and before[name] != value:            # fault 20
            raise ValueError(f"{folder}: {name} was {before[name]!r} and cannot become {value!r} in a resumed run; "
                             f"only {', '.join(MAY_CHANGE)} can change")
    config = Config(**before | values)
    config.given = frozenset(values)
    return config


def help_text(doc):
    """A script's doc, then every field with its default and its comment."""
    lines = [doc.strip(), "", "flags, as --key value or --key=value:"]

    def add(name, default, comment):
        lines.append(f"  --{name:28} {json.dumps(default):12} {comment}".rstrip())

    source = Path(__file__).read_text(encoding="utf-8").split("class Knobs:")[1].split("def __post_init__")[0]
    for line in source.splitlines():
        field, section = re.match(r"    (\w+): ", line), re.match(r"    # (.*)", line)
        if field:
            add(field[1], FIELDS[field[1]].default, comment_of(line))
        elif section:
            lines.append(f"\n{section[1]}")
    lines.append("\nmethods (their functions in peft.py)")
    for option in METHOD_OPTIONS.values():
        add(option.name, option.default, option.help)
    return "\n".join(lines)


def out_of_memory(error):
    """Whether an error says that memory has run out, as Python, torch's allocators or the system say it."""
    return isinstance(error, MemoryError) or "allocate memory" in str(error) or "out of memory" in str(error)


def run_main(main, *args):
    """
    main(*args). A user's mistake is told in one line on standard error, with exit status 2, and so is running out
    of memory; NANOPEFT_DEBUG=1 shows the traceback.
    """
    script = Path(sys.argv[0]).name
    gc.freeze()             # What is imported stays: to look for garbage in it takes torch half a second.
    sys.stdout.reconfigure(errors="backslashreplace")            # A terminal may not know every character.
    try:
        return main(*args)
    except BrokenPipeError:                                      # Whoever read has gone, as head does.
        os._exit(0)
    except (ValueError, OSError, MemoryError, RuntimeError) as error:                           # fault 7
        is_bug = isinstance(error, RuntimeError) and not out_of_memory(error)
        if is_bug or os.environ.get("NANOPEFT_DEBUG"):
            raise
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            script += f", process {os.environ['RANK']}"
        words = " ".join(str(error).split())
        if not isinstance(error, (ValueError, OSError)):
            words = f"out of memory ({str(error).partition(chr(10))[0]})"     # torch adds where in its own code it was.
        print(f"{script}: {words[:2000]}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{script}: interrupted", file=sys.stderr)
        sys.exit(130)
    finally:
        gc.freeze()                                              # Python looks once more before it ends.
