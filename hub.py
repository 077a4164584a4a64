"""
The door for adapters: out to PEFT's and AdapterHub's layouts and in from there, looked at, added, merged.

    python hub.py show out/qlora                            # what is in an adapter
    python hub.py export out/qlora DIR --layout peft         # or adapterhub, gguf; loads with PeftModel.from_pretrained
    python hub.py export out/qlora DIR --adapter last        # not the best: the last, or that of a step
    python hub.py import DIR out/x --base DIR                # the same layouts in, as a run for sample.py and evaluate.py
    python hub.py add out/x out/y out/z --weights 1 0.5      # LoRA adapters of one base added up, as the run out/z
    python hub.py merge out/qlora DIR                        # base and adapter as one plain checkpoint, with its tokenizer
    python hub.py merge out/qlora DIR --dtype float16        # in another type than the base's
    python hub.py merge out/qlora DIR --requantize           # in the base's storage, and what that does to the logits

Nothing that is there already is written over.
"""

import argparse
import sys

from lib.checks import Parser, check
from lib.config import (FIELDS, METHOD_OPTIONS, Config, as_folder, convert, read_run_config, run_main,
                        write_toml)

LAYOUTS = ("peft", "adapterhub", "gguf")


def parse(args):
    """The command line: a command and its folders."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    show, export, import_, add, merge = map(commands.add_parser, ("show", "export", "import", "add", "merge"))
    add.add_argument("runs", nargs="+", help="runs with LoRA alone; the first one's configuration is kept")
    for command in (show, export, add, merge):
        command.add_argument("run")
    for command in (export, import_, merge):
        command.add_argument("folder")
    import_.add_argument("run")
    export.add_argument("--layout", default="peft", choices=LAYOUTS)
    export.add_argument("--name", default="nanopeft", help="of the adapter, in AdapterHub's layout")
    import_.add_argument("--base", required=True)
    for command in (export, merge):
        command.add_argument("--base", default="", help="where the run's base lies now, if it has moved")
    for command in (show, export, merge):
        command.add_argument("--adapter", default="best", metavar="last|best|STEP", help="which of the run's (default: best)")
    merge.add_argument("--dtype", default="", choices=("float32", "float16", "bfloat16"), help="of the weights; none: the base's")
    add.add_argument("--weights", nargs="+", type=float, help="a number for each run; none: 1 for each")
    merge.add_argument("--requantize", action="store_true", help="store the merged weights as the base was stored")
    return parser.parse_args(args)


if __name__ == "__main__":      # --help and mistakes answer here, before torch is imported
    ARGS = run_main(parse, sys.argv[1:])

import dataclasses
import functools
import shlex
from pathlib import Path

import torch

import data
import peft
from lib import run as runs
from lib.adapterhub import from_adapterhub, write_adapterhub
from lib.checkpoint import load_base
from lib.files import (entries_of, found_in, read_json, save_file, stored_type, write_atomic, write_json,
                       write_safetensors)
from lib.gguf_format import write_gguf
from lib.hollow import hollow
from lib.model_folder import write_generation, write_model, write_tokenizer
from lib.origin import read_origin
from lib.peft_format import to_peft
from lib.peft_import import from_peft, rows_of
from lib.template import KEPT, read_template, source_in

# -----------------------------------------------------------------------------
# what a new run starts from

OF_THE_RUN = ("base", "quant", "quant_block", "quant_double", "quant_skip", "add_tokens")    # what it takes over


def read_start(path, base):
    """
    (Config or None, adapter's content) of what a new run can start from: a run's folder, an adapter's file, or a folder in
    PEFT's or AdapterHub's layout, for `base`. Only a run has a Config; a foreign layout's content names no base.
    """
    folder = Path(path)
    check(folder.exists(), f"{path}: nothing is there to start from")
    config = None
    if folder.is_file():
        content = peft.read_adapter(path)
    elif (folder / "config.toml").is_file():
        from_nothing = read_run_config(folder).base == "new"
        check(not from_nothing, f"{path}: trained a model from nothing, which is a base now: --base {path}")
        config = runs.find_base(read_run_config(folder), folder, base)
        content = runs.adapter_of(folder)      # It is compared with the base when it is loaded.
    else:
        is_model = (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file()
        check(not is_model, f"{path}: a whole model and no adapter; a new run starts from it by --base {path}")
        check(base, f"{path}: an adapter alone; --base DIR must name the model that it is for")
        method, options, tensors = read_layout(path, base)
        content = {"method": method, "options": options, "base": None, "tensors": tensors}
    methods = peft.method_names(content["method"])
    options = {}
    for method in methods:
        defaults = peft.options_of(peft.METHODS[method])
        options |= {name: value for name, value in defaults.items() if value is not None}
    return config, content | {"method": "+".join(methods), "options": options | content["options"]}


def adopted(config):
    """
    (configuration, adapter's content or None) where init_from names an adapter: its methods and their options
    are the new run's, and a run's base and storage too where no others are given.
    """
    if not config.init_from or config.resume:
        return config, None
    path, given = config.init_from, config.given
    for name in ("add_tokens", "prompt_init"):
        check(not getattr(config, name), f"{name} is for a new adapter; this run starts from {path}")
    before, content = read_start(path, config.base)
    method = method_of(config, before, content)
    options = {name: convert(name, value, path) for name, value in content["options"].items()}
    for name in sorted(given & METHOD_OPTIONS.keys()):
        ours, theirs = getattr(config, name), options.get(name, "no option of its method")
        check(ours == theirs, f"{path}: {name} is {theirs!r} there and cannot become {ours!r}")
    taken = {}
    for name in OF_THE_RUN if before else ():
        if name not in given and getattr(config, name) == FIELDS[name].default:
            taken[name] = getattr(before, name)
    kept = Path(path, KEPT)
    learnt = kept.is_file() if before else own_template(path, config.base)
    if learnt and config.template == "auto":                     # What was learnt was learnt in this form.
        taken["template"] = str(kept)
    config = dataclasses.replace(config, method=method, **options | taken)
    check(config.base, f"{path}: an adapter alone; --base DIR must name the model that it was made for")
    rows = rows_of(content["tensors"].get(peft.TABLE))
    known = rows <= read_origin(config.base).config.vocab_size or config.add_tokens
    check(known, f"{path}: has {rows} rows for tokens, more than its base; start from its run's folder, which holds their tokenizer")
    return config, content


def kept_template(folder):
    """The text of the chat template that lies in a folder as a file of its own, "" where there is none."""
    path = Path(folder, KEPT)
    return read_template(path) if path.is_file() else ""


def own_template(folder, base):
    """The same of an adapter's folder, where it is not its base's, of which a copy says nothing about the adapter."""
    text = kept_template(folder)
    return text if text and text != source_in(base) else ""


def method_of(config, before, content):
    """The run's method: as it is given, else as in the run before, else as in the adapter, which must be the same."""
    def plain(method):
        return set(method.replace("qlora", "lora").split("+"))   # A quantized base changes nothing in the adapter.

    theirs = before.method if before else content["method"]
    check(plain(theirs) == plain(content["method"]), f"{config.init_from}: config.toml says {theirs}, adapter.pt {content['method']}")
    if not config.given & {"method", "train_also"}:
        return theirs
    same = plain(config.method) == plain(theirs)
    check(same, f"{config.init_from}: method is {theirs!r} there and cannot become {config.method!r}")
    return config.method


# -----------------------------------------------------------------------------
# doors


def read_run(run, base="", adapter="best"):
    """(Config, adapter's content) of a run's folder. base and adapter: as in lib.run.load_run."""
    check(Path(run, "config.toml").is_file(), f"{run}: no run there, it has no config.toml")
    config, content = runs.find_base(read_run_config(run), run, base), runs.adapter_of(run, adapter)
    check_fits(content, config, run)
    return config, content


def check_fits(content, config, where):
    """ValueError unless the adapter's tensors are those of its methods over the run's base, of which the shape alone is read."""
    shape = read_origin(config.base).config
    rows = max(shape.vocab_size, rows_of(content["tensors"].get(peft.TABLE)))            # with added tokens
    model = hollow(dataclasses.replace(shape, vocab_size=rows))
    model.base_fingerprint = content["base"]
    peft.apply(model, content["method"], **content["options"])
    peft.check_tensors(content["tensors"], peft.adapter_state_dict(model), where)


def unused(path):
    """The path of a folder that is empty or not there yet; ValueError where something would be written over."""
    check(not any(Path(path).glob("*")), f"{path}: holds something already; choose another folder")    # fault 40
    return Path(path)


def write_run(config, content, chat_template=""):
    """Writes an adapter's content as the run that config says, for sample.py and evaluate.py. chat_template: the text
    of the template that the run keeps."""
    folder = Path(config.out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    data.Tokenizer.load(config.base).save(folder)
    if chat_template:
        write_atomic(folder / KEPT, chat_template.encode())
    save_file(folder / "adapter.pt", content)
    write_atomic(folder / "config.toml", write_toml(config).encode())


def export(run, path, layout="peft", name="nanopeft", base="", adapter="best"):
    """
    A run's adapter as a folder in one of the LAYOUTS, with its tokenizer and its ends; returns its
    adapter_config. Nothing that is there is written over.
    """
    config, content = read_run(run, base, adapter)
    origin, path = read_origin(config.base), unused(path)
    check(layout in LAYOUTS, f"layout is {layout!r}; it must be one of {', '.join(LAYOUTS)}")
    if layout == "peft":
        settings = write_peft(path, content, origin, config.base)
    elif layout == "gguf":
        settings = write_gguf(path, content, origin)
    else:
        settings = write_adapterhub(path, content, origin, name)
    tokenizer, chat = runs.tokenizer_of(config, run)
    write_tokenizer(path, tokenizer, config.base, chat, bool(config.add_tokens))
    write_generation(path, tokenizer, chat, config.base)
    return settings


def write_peft(path, content, origin, base):
    """Writes an adapter as a folder in PEFT's layout, for the base in a folder; returns its adapter_config."""
    settings, tensors = to_peft(content, origin)
    settings["base_model_name_or_path"] = str(Path(base).resolve())
    path.mkdir(parents=True, exist_ok=True)
    write_safetensors(path / "adapter_model.safetensors", entries_of(tensors))
    write_json(path / "adapter_config.json", settings)
    return settings


def read_layout(path, base, model=None):
    """(method, options, tensors) of a folder in PEFT's or AdapterHub's layout, for the base in a folder. model: that base,
    where it is loaded already."""
    file = Path(path, "adapter_config.json")
    check(file.is_file(), f"{path}: in no known layout, it has no adapter_config.json; found {found_in(path)}")
    if "peft_type" not in read_json(file):
        return from_adapterhub(path, read_origin(base))

    @functools.cache
    def weights():
        return dict((model or load_base(base)).named_parameters())

    return from_peft(path, read_origin(base), weights)


def import_adapter(path, base, out):
    """A folder in PEFT's or AdapterHub's layout -> a run's folder `out` over `base`; returns the model."""
    out = unused(out)
    model = load_base(base)
    method, options, tensors = read_layout(path, base, model)
    peft.apply(model, method, **options)
    peft.load_state(model, tensors, path)
    own = own_template(path, base)
    template = "base" if own else "auto"
    config = Config(method=method, base=as_folder(base), out_dir=str(out), template=template, **options)
    write_run(config, peft.pack_adapter(model), own)
    return model


def add_runs(folders, out, weights=None):
    """The LoRA adapters of runs over one base, times their weights and added, as the run `out`; returns its Config.

    weights: a number for each run, None for 1. The configuration is the first run's, with the rank and scale of the sum,
    and the chat template that it keeps, from which no other run's may differ.
    """
    weights = weights or [1.0] * len(folders)
    check(len(weights) == len(folders), f"{len(weights)} weights for {len(folders)} runs; give one for each")
    configs, contents = zip(*map(read_run, folders))
    first, *others = map(kept_template, folders)
    for folder, other in zip(folders[1:], others):
        same = first == other or not (first and other)
        check(same, f"{folder}: learnt another chat template than {folders[0]} ({KEPT}); add up runs of one template")
    content = peft.add_adapters(contents, weights)
    options = {name: content["options"][name] for name in ("rank", "alpha", "rslora")}
    config = dataclasses.replace(configs[0], out_dir=str(unused(out)), **options)
    write_run(config, content, first)
    return config


def merge_run(run, path, requantize=False, dtype="", base="", adapter="best"):
    """
    Base and adapter as one plain checkpoint with its tokenizer and its ends, each tensor in the base's type, or in that of
    the name dtype; returns peft.merge's report. base and adapter: as in lib.run.load_run.

    requantize: the merged weights are first stored as the base was stored, and the report says what that does to the logits.
    """
    path = unused(path)
    is_run = Path(run, "config.toml").is_file()
    source = runs.find_base(read_run_config(run), run, base).base if is_run else run
    computed = "float32" if requantize or dtype else stored_type(source)     # It is rounded once.
    model, tokenizer, config = runs.load_run(run, "cpu", computed, base, adapter)
    possible = not requantize or runs.storage_of(config)
    check(possible, f"{run}: its base is not quantized; merge it without --requantize")
    report = peft.merge(model, requantize)
    chat = runs.chat_of(config, tokenizer, run)
    wanted = getattr(torch, dtype) if dtype else None
    write_model(model, path, tokenizer, config.base, chat, wanted, bool(config.add_tokens))
    return report


def show(run, adapter="best"):
    """What is in an adapter, as lines: what it is, and each layer's change with its norm and effective rank."""
    path = Path(run)
    content = runs.adapter_of(run, adapter) if path.is_dir() else peft.read_adapter(path)
    peft.check_alone(content, path)
    tensors, options = content["tensors"], content["options"]
    yield (f"{path}: {content['method']}, format {content['format']}, {content['parameters']:,} parameters "
           f"in {len(tensors)} tensors, base {content['base'][:12]}")
    yield "options: " + (", ".join(f"{name} {value}" for name, value in options.items()) or "none")
    for name, t in tensors.items():
        layer, _, leaf = name.rpartition(".")
        lora = {f"{layer}.A", f"{layer}.B"} <= tensors.keys()
        if lora and leaf == "B":
            values = singular_values(tensors[f"{layer}.A"], t) * peft.scale_of(options)
            rank = f"effective rank {effective_rank(values):5.2f} of {len(values)}"
            yield f"{layer:24} |s B A| {values.norm():9.4f}   {rank}"
        elif not (lora and leaf == "A"):
            yield f"{name:40} {str(tuple(t.shape)):16} norm {t.norm():9.4f}"


def singular_values(A, B):
    """Those of B A that may differ from zero, (r,), largest first."""
    core = torch.linalg.qr(B).R @ torch.linalg.qr(A.T).R.T    # (r, r): B A = Q core P^T, Q and P orthogonal
    return torch.linalg.svdvals(core)


def effective_rank(values):
    """The exponential of the entropy of normalized singular values (Roy and Vetterli 2007)."""
    p = values / values.sum().clamp(min=1e-30)
    entropy = (-p * p.clamp(min=1e-30).log()).sum()
    return float(entropy.exp())


def main(args):
    """Runs the command; ValueError where a folder does not hold what it should."""
    if args.command == "show":
        print(*show(args.run, args.adapter), sep="\n")
    elif args.command == "export":
        settings = export(args.run, args.folder, args.layout, args.name, args.base, args.adapter)
        ends = read_json(Path(args.folder, "generation_config.json"))["eos_token_id"]
        print(f"{args.folder}: {settings.get('peft_type', 'bottleneck adapters')} in {args.layout}'s layout, with its tokenizer")
        print(f"Its texts end with {ends}, as its generation_config.json says. A library that loads the base's "
              "has to be told: model.generation_config = GenerationConfig.from_pretrained(DIR).")
        if read_run_config(args.run).add_tokens:
            rows = rows_of(runs.adapter_of(args.run, args.adapter)["tensors"][peft.TABLE])
            print(f"Its tables have rows for added tokens: call model.resize_token_embeddings({rows}) before "
                  "PeftModel.from_pretrained; the tokenizer that knows them is in the folder, too.")
    elif args.command == "import":
        counts = peft.count_parameters(import_adapter(args.folder, args.base, args.run))
        print(f"{args.run}: {' and '.join(counts['by_method'])}, {counts['trainable']:,} parameters; {next_line(args.run)}")
    elif args.command == "add":
        config = add_runs(args.runs, args.run, args.weights)
        print(f"{args.run}: the sum of {len(args.runs)} adapters, rank {config.rank}; {next_line(args.run)}")
    else:
        report = merge_run(args.run, args.folder, args.requantize, args.dtype, args.base, args.adapter)
        print(f"{args.folder}: {report['layers']} layers merged; a plain checkpoint with its tokenizer")
        if args.requantize:
            print("On average the merged layers change a logit by {adapter:.4g}; quantized again they change it by {kept:.4g}, "
                  "which is {error:.4g} away from what they make of it unquantized.".format(**report))


def next_line(run):
    """The command that tries a run, as a shell takes it."""
    return f"python sample.py {shlex.quote(run)} --prompt ..."


if __name__ == "__main__":
    run_main(main, ARGS)
