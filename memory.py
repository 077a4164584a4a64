"""
Where the bytes go, before the run and without the GPU.

    python memory.py --slide                                              # the lecture's table for OPT-1.3B, beside ours
    python memory.py --bert                                               # the lecture's table of BERT's largest batches
    python memory.py --model llama-7b --method qlora --seq 512 --batch 1  # the peak, and what it consists of
    python memory.py --model gpt2-xl --method lora --seq 1024 --fit 16GB  # the largest batch; --grow seq: the longest sequence
    python memory.py --model gpt2-medium --method full,lora,qlora --plot memory.png
    python memory.py --table                                              # the README's

The simulation runs the very step that train.py runs, on fake tensors that have shapes and no storage, and counts live storage
at every operation. On the device "cuda" sizes are rounded as its caching allocator does, and the attention is torch's flash kernel
for a CPU, which keeps the same tensors as the GPU's (the `meta` device would take the unfused path instead).
"""

import argparse
import functools
import json
import sys
import weakref
from contextlib import nullcontext

import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import peft
import quant
from lib import checkpoint, kernels, run
from lib.config import Config, run_main
from lib.files import check
from model import GPT, PRESETS

# -----------------------------------------------------------------------------
# the slide's formula

LECTURE = {"CUDA context": 1.0, "weights": 2.6, "gradients": 2.6, "hidden states": 1.0, "optimizer states": 5.2, "total": 12.4}     # GB; measured there: 11.0


def estimate(config, seq=512, batch=1, float_size=2, trainable=None):
    """The slide "GPU Memory breakdown", in bytes: {row: bytes}. trainable: parameters that are trained, default all."""
    with torch.device("meta"):
        N = GPT(config).num_params()
    trainable = N if trainable is None else trainable
    L, h = config.n_layer, config.n_embd
    rows = {"CUDA context": 10**9, "weights": float_size * N, "gradients": float_size * trainable,
            "hidden states": batch * float_size * L * (20 * h * seq + 3 * seq**2), "optimizer states": 2 * float_size * trainable}
    return rows | {"total": sum(rows.values())}


# -----------------------------------------------------------------------------
# counting

CUDA_CONTEXT = 500 * 10**6      # bytes that a process with CUDA takes before its first tensor; outside of what the allocator counts
CUBLAS = 8_519_680              # workspace that cuBLAS asks of the allocator at the first product; 32 MiB on Hopper
ROUND = {"cuda": 512, "cpu": 1}
PARTS = {"attn": "attention", "ffn": "ffn", "norm1": "norms", "norm2": "norms", "norm": "norms", "adapter1": "adapters", "adapter2": "adapters", "embed": "embedding"}


class Tracker(TorchDispatchMode):
    """Live storage at every operation, real or fake. `with Tracker(model, optimizer) as t: step(...)`, then t.report().

    A storage is counted from the operation that returns it to its last reference. What it is for is where it was made: in the
    forward of which layer, in the loss, or in the backward pass. Memory that a kernel takes and gives back within is not seen.
    """

    def __init__(self, model, optimizer=None, device="cpu"):
        super().__init__()
        self.model, self.round = model, ROUND[device]
        self.names = {id(m): name for name, m in model.named_modules()}
        self.kind, self.events, self.known, self.serial = {}, [], {}, 0      # kind: serial -> (part, layer)
        self.stack = []
        for name, p, method in peft.parameters_by_method(model):
            self.add(p, ("adapter" if method and method not in peft.UNFREEZING else "weights " + str(p.dtype).removeprefix("torch."), ""))
            if p.grad is not None:
                self.add(p.grad, ("gradients", ""))
        for module in model.modules():
            scheme = module.meta[1] if isinstance(module, quant.QuantLinear) else None
            for b in module.buffers(recurse=False):
                self.add(b, (f"weights {scheme or str(b.dtype).removeprefix('torch.')}", ""))
        for state in optimizer.state.values() if optimizer else ():
            for t in state.values():
                self.add(t, ("optimizer states", ""))
        for t in quant.kept():
            self.add(t, ("temporaries", ""))

    def add(self, tensor, place):
        """Counts a tensor's storage, once, as made at that (part, layer)."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.known or not (n := storage.nbytes()):
            return
        n = -(-n // self.round) * self.round
        self.known[key] = serial = self.serial = self.serial + 1
        self.kind[serial] = place
        self.events.append((serial, n))
        weakref.finalize(storage, self.drop, key, serial, n).atexit = False

    def drop(self, key, serial, n):
        """A storage has lost its last reference."""
        self.events.append((serial, -n))
        if self.known.get(key) == serial:
            del self.known[key]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor):
                self.add(t, self.where())
        return out

    def where(self):
        """(part, layer) of what is being computed."""
        if self.stack:
            return self.stack[-1]
        return "temporaries", ""                                 # the backward pass, the optimizer, the batch

    def enter(self, module, *_):
        name = self.names.get(id(module))
        parts = [] if name is None else [part for part in name.split(".") if part != "base"]
        if module is self.model:
            self.stack.append(("logits and loss", ""))
        elif parts[:1] == ["blocks"]:
            part = next((PARTS[p] for p in parts[2:] if p in PARTS), "residuals")
            self.stack.append((part, ".".join(parts[:2])))
        else:
            self.stack.append((PARTS.get(parts[0], "logits and loss") if parts else self.where()[0], self.where()[1]))

    def leave(self, *_):
        self.stack.pop()

    def became_gradient(self, p):
        self.add(p.grad, ("gradients", ""))
        self.kind[self.known[p.grad.untyped_storage()._cdata]] = "gradients", ""

    def __enter__(self):
        modules = torch.nn.modules.module
        self.hooks = [modules.register_module_forward_pre_hook(self.enter), modules.register_module_forward_hook(self.leave, always_call=True)]
        self.hooks += [p.register_post_accumulate_grad_hook(self.became_gradient) for p in self.model.parameters() if p.requires_grad]
        return super().__enter__()

    def __exit__(self, *args):
        for hook in self.hooks:
            hook.remove()
        return super().__exit__(*args)

    def report(self):
        """{"peak": bytes, "parts": {part: bytes}, "layers": {layer: bytes of its activations}}; the parts sum to the peak exactly."""
        total = peak = at = 0
        for i, (_, n) in enumerate(self.events):
            total += n
            if total > peak:
                peak, at = total, i
        live = {}
        for serial, n in self.events[:at + 1]:
            live[serial] = live.get(serial, 0) + n
        parts, layers = {}, {}
        for serial, n in live.items():
            part, layer = self.kind[serial]
            if n:
                parts[part] = parts.get(part, 0) + n
                if layer:
                    layers[layer] = layers.get(layer, 0) + n
        order = sorted(parts, key=lambda part: (not part.startswith("weights"), part != "adapter", part != "gradients", part != "optimizer states", -parts[part]))
        return {"peak": peak, "parts": {part: parts[part] for part in order}, "layers": layers}


# -----------------------------------------------------------------------------
# the simulation


def fake_model(config, method, dtype, storage, options):
    """A GPT as checkpoint.load_base leaves it and peft.apply changes it, of whatever tensors the current mode makes."""
    model = GPT(config, dtype)
    model.base_fingerprint = "simulated"
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            setattr(module, name, torch.nn.Parameter(torch.empty_like(p, dtype=dtype), requires_grad=False))
    if config.tied:
        model.head.weight = model.embed.tokens.weight
    if storage:
        quant.store(model, storage, empty=True)
    peft.apply(model, method, **options)
    return model


def simulate(config, method="lora", batch=1, seq=512, dtype=torch.bfloat16, device="cuda", storage=None, checkpointing=False,
             gradient_accumulation_steps=1, grad_clip=1.0, label_smoothing=0.0, offload=False, **options):
    """The peak of one training step, without the memory: {"peak", "parts", "layers"}, bytes.

    config: GPTConfig or a name of PRESETS; method and options as for peft.apply; batch x seq: a micro-batch, of which
    gradient_accumulation_steps make a step; storage: quant.Storage of the base (None: as the method has it); device: "cuda" or "cpu", whose rounding and
    kernels are assumed. On "cuda" the parts hold the context and cuBLAS's workspace as constants. The first step's own peak can be
    lower: Adam's states are counted as being there.
    """
    config = preset(config) if isinstance(config, str) else config
    check_shape(config, method, batch, seq, options)
    storage = storage or peft.default_storage(method)
    with FakeTensorMode(), kernels.simulated_device(device), quant.simulated():
        model = fake_model(config, method, dtype, storage, options)
        model.checkpointing = checkpointing
        optimizer = run.make_optimizer(model, Config())
        for p in model.parameters():
            p.grad = torch.empty_like(p) if p.requires_grad else None
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        model.train()
        with Tracker(model, optimizer, device) as tracker:
            tokens = [torch.zeros(2, batch, seq, dtype=torch.int64) for _ in range(gradient_accumulation_steps)]
            run.step(model, optimizer, [tuple(t) for t in tokens], grad_clip, label_smoothing,
                     saving=(lambda: elsewhere(model)) if offload else nullcontext)
        report = tracker.report()
    if device == "cuda":
        report["parts"] |= {"cuBLAS workspace": CUBLAS, "CUDA context": CUDA_CONTEXT}
        report["peak"] += CUBLAS + CUDA_CONTEXT
    return report | {"method": method, "batch": batch, "seq": seq}


def elsewhere(model):
    """train.offload as the device sees it: what is saved is gone, and comes back as new memory."""
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    return torch.autograd.graph.saved_tensors_hooks(lambda t: t if t.untyped_storage()._cdata in own else (t.shape, t.dtype),
                                                    lambda kept: kept if isinstance(kept, torch.Tensor) else torch.empty(kept[0], dtype=kept[1]))


def check_shape(config, method, batch, seq, options):
    """ValueError unless a batch of that shape can go through the model."""
    for name, value in (("batch", batch), ("seq", seq)):
        check(value >= 1, f"{name} is {value}; it must be at least 1")
    context = config.block_size - peft.virtual_positions(method, options)
    check(seq <= context, f"seq is {seq}; the model's context leaves {context}")


def largest(need, memory, limit=2**20):
    """The largest n in 1 .. limit with need(n) <= memory, where need never falls; 0 if there is none.

    A bracket by doubling, then, because need is nearly a line, by turns the point where a line would cross, and the middle.
    """
    low, high = 0, 1
    while high <= limit and need(high) <= memory:
        low, high = high, high * 2
    if high > limit:
        if need(limit) <= memory:
            return limit
        high = limit
    by_line = True
    while high - low > 1:
        share = (memory - need(low)) / max(need(high) - need(low), 1) if by_line and low else 0.5
        n = min(max(low + int((high - low) * share), low + 1), high - 1)
        low, high = (n, high) if need(n) <= memory else (low, n)
        by_line = not by_line
    return low


@functools.cache
def peak(config, method, batch, seq, *more):
    """simulate's peak, bytes. more: (name, value) of its other arguments."""
    return simulate(config, method, batch, seq, **dict(more))["peak"]


def max_batch(config, memory, method="lora", seq=512, grow="batch", batch=1, **kwargs):
    """The largest batch (grow "seq": the longest sequence) whose step's peak is at most `memory` bytes; 0 if not even 1 fits."""
    config = preset(config) if isinstance(config, str) else config
    options = {k: v for k, v in kwargs.items() if k in peft.DEFAULTS}
    if grow == "seq":
        limit = config.block_size - peft.virtual_positions(method, options)
        return largest(lambda n: peak(config, method, batch, n, *kwargs.items()), memory, limit)
    return largest(lambda n: peak(config, method, n, seq, *kwargs.items()), memory)


# -----------------------------------------------------------------------------
# command line

UNITS = {"": 1, "B": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def preset(name):
    """The GPTConfig of that name; ValueError with the nearest names."""
    if name not in PRESETS:
        import difflib
        raise ValueError(f"unknown model {name!r}; the nearest are {', '.join(difflib.get_close_matches(name, PRESETS, 3, 0.0))}")
    return PRESETS[name]


def parse_size(text):
    """ "16GB", "16 GiB", "2e9" -> bytes."""
    import re
    match = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([KMGT]i?|)B?\s*", text, re.IGNORECASE)
    units = {unit.lower(): n for unit, n in UNITS.items()}
    try:
        n = float(match[1]) * units[match[2].lower()]
    except (TypeError, ValueError):
        n = 0
    if not 0 < n < 1e18:
        raise ValueError(f"{text!r} is not a size; 16GB or 24GiB is")
    return int(n)


def load_config(name):
    """A preset, or the config.json of a folder in Hugging Face layout."""
    from pathlib import Path
    if Path(name, "config.json").is_file():
        return checkpoint.read_config(name)
    return preset(name)


def gb(n):
    """Bytes for people, in GB or MB."""
    return f"{n / 1e9:,.2f} GB" if n >= 1e7 else f"{n / 1e6:,.2f} MB"


def align(rows):
    """Lists of cells as lines, the first column to the left."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))).rstrip() for row in rows)


def slide():
    """The lecture's table beside the formula's and the simulation's."""
    ours, exact = estimate(PRESETS["opt-1.3b"]), simulate("opt-1.3b", "full", 1, 512)
    rows = [["OPT-1.3B, 16-bit, sequence 512", "lecture", "formula"]]
    rows += [[name, f"{LECTURE[name]:.2f} GB", gb(n)] for name, n in ours.items()]
    n = ours["weights"] // 2
    return align(rows) + f"""

The lecture measured 11.0 GB. Its optional row, a float32 copy of the gradients, is 4 N = {gb(4 * n)}, not the 10.2 GB printed. Its attention
term 3 seq^2 leaves out the number of heads ({PRESETS['opt-1.3b'].n_head}), and fused attention has no such term at all.

This project trains in float32 with the products in bfloat16 (weights, gradients and Adam's moments 4 bytes each). The same step, simulated:

""" + describe(exact)


def describe(report):
    """A report of simulate as lines."""
    rows = [[name, gb(n), f"{n / report['peak']:.1%}"] for name, n in report["parts"].items()]
    return align(rows + [["peak", gb(report["peak"]), "100.0%"]])


BERT = [("bert-base", 64, 64), ("bert-base", 128, 32), ("bert-base", 256, 16), ("bert-base", 320, 14), ("bert-base", 384, 12), ("bert-base", 512, 6),
        ("bert-large", 64, 12), ("bert-large", 128, 6), ("bert-large", 256, 2), ("bert-large", 320, 1), ("bert-large", 384, 0), ("bert-large", 512, 0)]


def bert(memory):
    """The lecture's table of BERT's batches beside ours on that much memory, bytes."""
    rows = [["system", "seq", "lecture", "ours"]]
    rows += [[name, str(seq), str(batch), str(max_batch(name, memory, "full", seq, dtype=torch.float32))] for name, seq, batch in BERT]
    return align(rows) + f"""

Ours: a decoder of that shape on {gb(memory)}, all trained, float32, Adam, fused attention, the loss in chunks, every token supervised. The
lecture's (google-research/bert) is TensorFlow's of 2018, whose attention keeps (heads, seq, seq) several times over and whose allocator
held back what it had once taken: the numbers should differ, and the more so the longer the sequence."""


def table():
    """The README's, a line at a time: models by methods, the peak at sequence 512 and batch 1, and the largest batches."""
    yield "| model | method | peak at 1 x 512 | batch on 16 GB | 24 GB | 80 GB |"
    yield "|---|---|---|---|---|---|"
    for name in ("gpt2-medium", "gpt2-xl", "llama-7b", "llama-65b"):
        for method in ("full", "adapter", "prefix", "lora", "qlora"):
            batches = [max_batch(name, n * 10**9, method, 512) for n in (16, 24, 80)]
            yield f"| {name} | {method} | {gb(peak(PRESETS[name], method, 1, 512))} | {' | '.join(str(b) if b else '-' for b in batches)} |"


def parse(args):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gpt2", help="a preset, or a folder with config.json")
    parser.add_argument("--method", default="full,lora,qlora", help="as for train.py; several, joined by commas, are compared")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seq", type=int, default=512)
    parser.add_argument("--gradient_accumulation_steps", type=int, default=1)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--offload", action="store_true", help="saved activations go to the host")
    parser.add_argument("--quant", default="", choices=("", *quant.SCHEMES), help="the base in storage; qlora: nf4")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="whose memory; none is needed here")
    parser.add_argument("--fit", metavar="SIZE", help="the largest batch in that much memory, such as 16GB")
    parser.add_argument("--grow", default="batch", choices=("batch", "seq"), help="what --fit makes as large as it can be")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--plot", metavar="FILE", help="stacked bars as .png, .svg or .pdf; needs matplotlib")
    for name in ("slide", "bert", "table"):
        parser.add_argument(f"--{name}", action="store_true")
    for name, default in peft.DEFAULTS.items():
        if name != "prompt_ids":
            parser.add_argument(f"--{name}", default=default, **({"action": "store_true"} if type(default) is bool else {"type": type(default)}))
    return parser.parse_args(args)


def fitting(config, method, memory, args, settings):
    """A line: what fits."""
    n = max_batch(config, memory, method, args.seq, args.grow, args.batch, **settings)
    if n:
        return f"{method}: {'batch ' + str(n) + f' of {args.seq} tokens' if args.grow == 'batch' else f'sequences of {n} tokens, batch {args.batch}'}"
    least = {other: simulate(config, other, 1, 1 if args.grow == "seq" else args.seq, **settings | {"storage": None})["peak"] for other in ("lora", "qlora")}
    best = min(least, key=least.get)
    would = f"{best} would fit" if least[best] <= memory else f"not even {best}, which takes {gb(least[best])}, fits"
    return f"{method}: does not fit at batch 1; {would}"


def main(args):
    """Prints what was asked for, and draws it with --plot."""
    if args.slide or args.bert or args.table:
        for line in [slide()] if args.slide else [bert(parse_size(args.fit or "12GB"))] if args.bert else table():
            print(line, flush=True)
        return
    config, memory = load_config(args.model), parse_size(args.fit) if args.fit else None
    settings = {name: getattr(args, name) for name in (*peft.DEFAULTS, "device", "checkpointing", "gradient_accumulation_steps", "offload") if name != "prompt_ids"}
    settings |= {"dtype": getattr(torch, args.dtype), "storage": quant.Storage(args.quant, double=True) if args.quant else None}
    methods = args.method.split(",")
    if args.fit:
        for method in methods:
            check_shape(config, method, args.batch, args.seq, settings)
            print(fitting(config, method, memory, args, settings), flush=True)
        return
    reports = [simulate(config, method, args.batch, args.seq, **settings) | {"model": args.model} for method in methods]
    if args.json:
        print(json.dumps(reports, indent=1))
    else:
        parts = dict.fromkeys(part for report in reports for part in report["parts"])
        rows = [[f"{args.model}, {args.batch} x {args.seq}, {args.dtype}", *methods]]
        rows += [[part, *(gb(r["parts"].get(part, 0)) if part in r["parts"] else "-" for r in reports)] for part in parts]
        print(align(rows + [["peak", *(gb(r["peak"]) for r in reports)]]))
    if args.plot:
        import plot
        plot.save(plot.memory(reports), args.plot)


if __name__ == "__main__":
    ARGS = parse(sys.argv[1:])
    run_main(main, ARGS)
