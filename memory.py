"""
Where the bytes go, before the run and without the GPU.

    python memory.py --slide                               # the lecture's table for OPT-1.3B, beside ours
    python memory.py --bert                                # the lecture's table of BERT's largest batches
    python memory.py --model llama-3.1-8b --method qlora   # the peak of a step, and what it consists of
    python memory.py --model llama-3.1-8b --method full,lora --json > a.json # for plot.py memory a.json
    python memory.py --model llama-3.1-8b --method lora,qlora --fit 24GB     # the largest batch
    python memory.py --model gpt2-xl --fit 16GB --grow seq           # the longest sequence
    python memory.py --table                               # the table of results/README.md

The simulation runs the very step that train.py runs, on tensors of torch's device "meta", which have shapes and
no content, and counts live storage at every operation. On the device "cuda" sizes are rounded as its caching
allocator does, and the attention is torch's flash kernel for a CPU, which keeps the same tensors as the GPU's.
"""

import argparse
import dataclasses
import difflib
import functools
import itertools
import json
import math
import re
import sys
import weakref
from collections import Counter
from contextlib import contextmanager, nullcontext
from pathlib import Path

from lib import presets
from lib.checks import Parser, bounded, check, shown
from lib.config import CHOICES, METHOD_OPTIONS, Config, check_options, run_main
from lib.report import size, table

# -----------------------------------------------------------------------------
# command line


def parse(args):
    """The command line, with --fit as bytes."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = ", ".join(presets.PRESETS)
    parser.add_argument("--model", default="gpt2", help=f"a folder with config.json, or one of {models}")
    parser.add_argument("--method", default="full,lora,qlora", help="several are joined by commas")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seq", type=int, default=512)
    parser.add_argument("--gradient_accumulation_steps", type=int, default=1)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--offload", action="store_true", help="saved activations go to the host")
    for name in ("optimizer", "param_dtype"):
        parser.add_argument(f"--{name}", default=getattr(Config, name), choices=CHOICES[name])
    parser.add_argument("--quant", default="", help="the code that the base is stored in")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32", "float16"))
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="none is needed here")
    parser.add_argument("--fit", metavar="SIZE", help="the largest batch in that much memory: 16GB")
    parser.add_argument("--grow", default="batch", choices=("batch", "seq"), help="what --fit enlarges")
    parser.add_argument("--json", action="store_true")
    for name in ("slide", "bert", "table"):
        parser.add_argument(f"--{name}", action="store_true")
    for option in METHOD_OPTIONS.values():
        kind = {"action": "store_true"} if option.default is False else {"type": type(option.default)}
        parser.add_argument(f"--{option.name}", default=argparse.SUPPRESS, help=option.help, **kind)
    parsed = parser.parse_args(args)
    check_options(vars(parsed), parsed.method.replace(",", "+"), "command line")
    for option in METHOD_OPTIONS.values():
        setattr(parsed, option.name, getattr(parsed, option.name, option.default))
    parsed.fit = parse_size(parsed.fit) if parsed.fit else None
    return parsed


UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12,
         "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_size(text):
    """Bytes of a text such as "16GB", "16 GiB" or "2e9". ValueError where it is no size."""
    match = re.fullmatch(r"\s*(\d*\.?\d+(?:e\d+)?)\s*([kmgt]i?|)b?\s*", text.lower())
    n = float(match[1]) * UNITS[match[2]] if match else 0
    check(1 <= n <= 10**18, f"{shown(text)} is not a size; 16GB or 24GiB is")
    return int(n)


if __name__ == "__main__":      # --help and mistakes answer here, before torch is imported
    ARGS = run_main(parse, sys.argv[1:])

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import peft
import quant
from lib import kernels, origin, run
from lib.generation import Cache, next_logits, ready_layers, sample
from lib.hollow import NothingDrawn, hollow
from lib.machine import dtype_name
from model import GPT, PRESETS, GPTConfig

# -----------------------------------------------------------------------------
# the slide's formula

LECTURE = {"CUDA context": 1.0, "weights": 2.6, "gradients": 2.6, "hidden states": 1.0,
           "optimizer states": 5.2, "total": 12.4}      # GB; the lecture measured 11.0


def estimate(config, seq=512, batch=1, float_size=2, trainable=None):
    """The slide "GPU Memory breakdown": {row: bytes}. trainable: parameters that are trained (None: all)."""
    N = hollow(config).num_params()
    trainable = N if trainable is None else trainable
    L, h = config.n_layer, config.n_embd
    rows = {
        "CUDA context": 10**9,
        "weights": float_size * N,
        "gradients": float_size * trainable,
        "hidden states": batch * float_size * L * (20 * h * seq + 3 * seq**2),
        "optimizer states": 2 * float_size * trainable,
    }
    return rows | {"total": sum(rows.values())}


# -----------------------------------------------------------------------------
# counting

CUDA_CONTEXT = 500 * 10**6      # bytes of a process with CUDA beside those of the allocator
ALLOCATION_UNIT = {"cuda": 512, "cpu": 1}       # an allocation takes a multiple of this many bytes


def cublas_workspaces(n_threads):
    """
    Bytes of cuBLAS's workspaces, one for each thread that multiplies; the backward pass has a thread of its own.
    Their size is that of the GPU in use, and of GPUs before Hopper where none is.
    """
    hopper = torch.cuda.is_initialized() and torch.cuda.get_device_capability() == (9, 0)
    return n_threads * (2**25 if hopper else 8_519_680)


PART_OF_MODULE = {"attn": "attention", "ffn": "ffn", "norm": "norms", "norm1": "norms", "norm2": "norms",
                  "after1": "norms", "after2": "norms",
                  "adapter1": "adapters", "adapter2": "adapters", "embed": "embedding"}
GROUPS = {"weights": 0, "adapter": 1, "gradients": 2, "optimizer": 3}    # first words of parts, in order


def origin_of_forward(name):
    """(part, layer) of what the forward pass of the module makes. Outside of the blocks the layer is ""."""
    words = name.split(".")
    if words[0] != "blocks":
        return PART_OF_MODULE.get(words[0], "logits and loss"), ""
    part = next((PART_OF_MODULE[word] for word in words if word in PART_OF_MODULE), "residuals")
    return part, ".".join(words[:2])


def part_of_weight(scheme):
    """The part of a weight in that torch.dtype, or stored in that code."""
    return "weights " + str(scheme).removeprefix("torch.")


_made = {}                      # (operation, shapes of arguments) -> shape, stride, dtype of the result


def without_content(operation, args, kwargs):
    """
    What an operation returns where tensors lie on "meta". There its Python takes a hundred microseconds, so of those
    that make one new tensor each is run once a shape, and those that write into their first argument never.
    """
    schema = operation._schema
    changes_shape = torch.Tag.inplace_view in operation.tags
    if [str(output.type) for output in schema.returns] != ["Tensor"] or changes_shape:
        return operation(*args, **kwargs)
    if schema.is_mutable:
        writes = schema.arguments[0].alias_info is not None and args[0].is_meta
        return args[0] if writes else operation(*args, **kwargs)
    shapes = operation, *map(shape_of, args), *((name, shape_of(arg)) for name, arg in kwargs.items())
    if shapes in _made:
        shape, stride, dtype = _made[shapes]
        return torch.empty_strided(shape, stride, dtype=dtype, device="meta")
    result = operation(*args, **kwargs)
    if result.is_meta and not is_view(result, args):
        _made[shapes] = result.shape, result.stride(), result.dtype
    return result


def is_view(result, args):
    """Whether an operation's result lies in the storage of one of its arguments."""
    storages = [leaf.untyped_storage()._cdata for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
    return result.untyped_storage()._cdata in storages


def shape_of(argument):
    """An operation's argument without its content, to be compared."""
    if isinstance(argument, torch.Tensor):
        return argument.shape, argument.stride(), argument.dtype, argument.device
    if isinstance(argument, (list, tuple)):
        return tuple(map(shape_of, argument))
    return type(argument), argument


class Tracker(TorchDispatchMode):
    """
    Counts live storage at every operation, real or simulated: with Tracker(model, optimizer) as tracker: step(..);
    tracker.report().

    A storage is counted from the operation that returns it to its last reference. What it is for is where it
    was made: in the forward pass of which layer, in the loss, or in the backward pass. Memory that a kernel
    takes and gives back within is not seen.
    """

    def __init__(self, model, optimizer=None, device="cpu", outside="temporaries"):
        """outside: the part of what is made outside of every module's forward pass."""
        super().__init__()
        self.model, self.device, self.unit = model, device, ALLOCATION_UNIT[device]
        self.forwards = {module: origin_of_forward(name) for name, module in model.named_modules()}
        self.running = [(outside, "")]           # (part, layer) of the running forward passes, innermost last
        self.live = {}                           # address of a storage -> its serial number
        self.origins = []                        # serial number -> (part, layer)
        self.changes = []                        # (serial number, bytes), negative where a storage is freed
        self.blocks = {block: k for k, block in enumerate(model.blocks)}
        self.marks = [(0, ("beginning", 0))]     # (changes so far, what begins there and of which block)
        self.add_resident(optimizer)

    def add_resident(self, optimizer):
        """Counts what is there before the step."""
        for _, p, method in peft.parameters_by_method(self.model):
            added = method and method not in peft.UNFREEZING
            self.add(p, "adapter" if added else part_of_weight(p.dtype))
        for module in self.model.modules():
            for buffer in module.buffers(recurse=False):
                stored = isinstance(module, quant.QuantLinear)
                self.add(buffer, part_of_weight(module.weight_q.scheme if stored else buffer.dtype))
        if self.device == "cpu" and self.model.attached:         # A GPU's host keeps what detach puts back.
            for _, _, copy in self.model.attached.unfrozen:
                if copy is not None:
                    self.add(copy, "weights kept for detach")
        for state in optimizer.state.values() if optimizer else ():
            for tensor in state.values():
                self.add(tensor, "optimizer states")

    def add(self, tensor, part, layer=""):
        """Counts a tensor's storage, unless it is counted already."""
        storage = tensor.untyped_storage()
        address, n = storage._cdata, storage.nbytes()
        if address in self.live or not n:
            return
        serial, rounded = len(self.origins), -(-n // self.unit) * self.unit
        self.live[address] = serial
        self.origins.append((part, layer))
        self.changes.append((serial, rounded))
        weakref.finalize(storage, self.free, address, serial, rounded).atexit = False

    def free(self, address, serial, n):
        """A storage has lost its last reference."""
        self.changes.append((serial, -n))
        if self.live.get(address) == serial:
            del self.live[address]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = without_content(func, args, kwargs) if kernels.simulating() else func(*args, **kwargs)
        if kernels.simulating() and self.device == "cpu" and func is torch.ops.aten.native_layer_norm.default:
            y, *statistics = result                              # On "meta" their type is a GPU's.
            result = y, *(t.to(y.dtype) for t in statistics)
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.add(leaf, *self.running[-1])
        return result

    def enter(self, module, inputs):
        """A module's forward pass begins."""
        self.running.append(self.forwards.get(module, self.running[-1]))
        if module in self.blocks:
            self.mark("forward", self.blocks[module])

    def leave(self, module, inputs, output):
        """A module's forward pass ends."""
        self.running.pop()
        if module in self.blocks:
            self.mark("after", self.blocks[module])
            if output is not None and output.requires_grad:      # None: it was left by an exception.
                output.register_hook(functools.partial(self.mark_backward, self.blocks[module]))

    def mark(self, what, k=0):
        """Notes that something begins of block k."""
        self.marks.append((len(self.changes), (what, k)))

    def mark_backward(self, k, gradient):
        """The backward pass comes to block k."""
        self.mark("backward", k)
        if k == len(self.blocks) - 1:
            at_the_end = functools.partial(self.mark, "optimizer")
            torch.autograd.Variable._execution_engine.queue_callback(at_the_end)

    def add_gradient(self, p):
        """The backward pass has made the gradient of a parameter."""
        self.add(p.grad, "gradients")
        serial = self.live[p.grad.untyped_storage()._cdata]
        self.origins[serial] = "gradients", ""       # It was counted as a temporary of the backward pass.

    def __enter__(self):
        modules = torch.nn.modules.module
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.hooks = [p.register_post_accumulate_grad_hook(self.add_gradient) for p in trained]
        self.hooks.append(modules.register_module_forward_pre_hook(self.enter))
        self.hooks.append(modules.register_module_forward_hook(self.leave, always_call=True))
        return super().__enter__()

    def __exit__(self, *args):
        for hook in self.hooks:
            hook.remove()
        return super().__exit__(*args)

    def totals(self):
        """The bytes that were live after 0, 1, 2 .. changes."""
        return list(itertools.accumulate((n for _, n in self.changes), initial=0))

    def report(self):
        """
        {"peak": bytes, "parts": {part: bytes}, "layers": {layer: bytes of its activations}} when most bytes
        were live. The parts sum to the peak exactly.
        """
        totals = self.totals()
        return ordered(*self.content(totals.index(max(totals))))

    def content(self, n_changes):
        """({part: bytes}, {layer: bytes}) that were live after that many changes."""
        parts, layers = Counter(), Counter()
        for serial, n in self.changes[:n_changes]:
            part, layer = self.origins[serial]
            parts[part] += n
            layers[layer] += n
        return parts, layers

    def maxima(self, near):
        """
        {moment: after how many changes most bytes were live within it}. A moment lasts from one mark to the next.
        Of the blocks' moments those of blocks at most `near` blocks from the first or the last one count. The key
        holds that distance, so that models of different depth have the same moments.
        """
        totals, found, last = self.totals(), {}, len(self.blocks) - 1
        seen = Counter()
        ends = [start for start, _ in self.marks[1:]] + [len(self.changes)]
        for (start, (what, k)), end in zip(self.marks, ends):
            seen[what, k] += 1
            most = max(range(start, end + 1), key=totals.__getitem__)
            for side, distance in (("first", k), ("last", last - k)):
                if distance <= near:
                    found[what, side, distance, seen[what, k]] = most
        return found


def ordered(parts, layers):
    """A report of what was live."""
    del layers[""]
    by_size = (+parts).most_common()
    parts = dict(sorted(by_size, key=lambda item: GROUPS.get(item[0].split()[0], 4)))
    return {"peak": sum(parts.values()), "parts": parts, "layers": dict(+layers)}


# -----------------------------------------------------------------------------
# many blocks from a few: all blocks of a kind take the same memory

# The bytes that are live at a moment of the first or the last block's pass grow by the same amount with every
# block that is added, and no block in between peaks higher than both ends. So two models with few blocks tell
# the peak of one with many.


def period(config, method, storage):
    """After how many blocks their kinds come again; 0 where they do not."""
    by_name = storage is not None and any("." in name for name in storage.skip)
    if by_name or "top" in peft.method_names(method):
        return 0
    L = config.n_layer
    windows = config.windows or (0,) * L
    kinds = [(windows[i], i in config.unrotated) for i in range(L)]
    return next((P for P in range(1, L) if kinds[P:] == kinds[:-P]), 0)


def shallow(config, n_layer):
    """The architecture with its first n_layer blocks alone."""
    unrotated = tuple(i for i in config.unrotated if i < n_layer)
    return dataclasses.replace(config, n_layer=n_layer, windows=config.windows[:n_layer], unrotated=unrotated)


def report_by_few_blocks(track, config, method, storage):
    """
    Tracker.report of track(config), where track makes a Tracker of some pass of a model: from two models of few
    blocks if the kinds of the blocks allow it, else from the whole one.
    """
    L, P = config.n_layer, period(config, method, storage)
    n_small = 2 * P + 2 + (L - 2) % P if P else L
    if n_small + P >= L:
        return track(config).report()
    small, large = (track(shallow(config, n)) for n in (n_small, n_small + P))
    times = (L - n_small) // P
    moments = [maxima.values() for maxima in (small.maxima(P), large.maxima(P))]
    totals = small.totals(), large.totals()
    best = max(zip(*moments, strict=True), key=lambda at: grown(totals[0][at[0]], totals[1][at[1]], times))
    (parts, _), (more_parts, layers) = small.content(best[0]), large.content(best[1])
    parts = Counter({part: grown(parts[part], n, times) for part, n in more_parts.items()})
    return ordered(parts, stretched(layers, n_small + P, P, times - 1))


def grown(of_small, of_large, times):
    """The value after `times` more periods, where of_small is that of the small model, of_large of one with a period more."""
    return of_small + (of_large - of_small) * times


def stretched(layers, n_layer, P, times):
    """{layer: bytes} of n_layer blocks -> the same where the P blocks behind the first P + 1 come `times` more times."""
    result = Counter({"": layers[""]})
    for k in range(n_layer + times * P):
        beyond = max(0, k - 2 * P)                               # behind the period's first time
        own = k - min(-(-beyond // P), times) * P
        result[f"blocks.{k}"] = layers[f"blocks.{own}"]
    return result


# -----------------------------------------------------------------------------
# the simulation


@contextmanager
def simulation(device):
    """Within it tensors have no content and take the path of a "cpu" or "cuda" device."""
    import torch._dynamo        # Torch's optimizers import it; within, torch 2.6 fails to.
    with torch.device("meta"), kernels.simulated_device(device), quant.fresh_tables():
        yield


def simulated_model(config, method, dtype, storage, options, param_dtype="float32"):
    """A GPT as load_base leaves it and peft.apply changes it, of whatever tensors the current mode makes."""
    with NothingDrawn():
        model = GPT(config, dtype).requires_grad_(False)
    model.base_fingerprint = "simulated"
    for p in model.parameters():
        p.data = torch.empty_like(p, dtype=dtype)
    if storage:
        quant.store(model, storage, empty=True)
    peft.apply(model, method, **options)
    peft.keep_trained_in(model, getattr(torch, param_dtype))
    return model


def make_states(model, optimizer):
    """Makes the optimizer's states, as the first step of a run does (torch's own asks for a device that it knows)."""
    for p in model.parameters():
        if p.requires_grad:
            optimizer.state[p] = run.new_state(optimizer, p)


def simulated_offload(model):
    """run.offload as the device sees it: what is saved is gone, and comes back as new memory."""
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}

    def pack(t):
        if t.untyped_storage()._cdata in own:
            return t
        return functools.partial(torch.empty, t.shape, dtype=t.dtype, device=t.device)

    def unpack(saved):
        return saved if isinstance(saved, torch.Tensor) else saved()

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def simulate(config, method="lora", batch=1, seq=512, dtype=torch.bfloat16, device="cuda", storage=None,
             checkpointing=False, gradient_accumulation_steps=1, grad_clip=1.0, label_smoothing=0.0,
             offload=False, packed=None, optimizer="adamw", param_dtype="float32", **options):
    """
    The peak of one training step, without the memory: {"peak", "parts", "layers"} in bytes, as Tracker.report
    has them, with the method, batch and seq.

    config: GPTConfig or a name of PRESETS. method and options: as for peft.apply. batch x seq: a micro-batch,
    of which gradient_accumulation_steps make a step; packed: instead of these, for each micro-batch the lengths of
    the sequences that lie side by side in it. storage: quant.Storage of the base (None: as the method
    has it). optimizer, param_dtype: the knobs of a run. device: "cuda" or "cpu", whose rounding and kernels are
    assumed; on "cuda" the parts hold the context and cuBLAS's workspaces as constants. The first step's own
    peak can be lower, because Adam's states are counted as being there. ValueError where such a batch does not
    fit into the model's context.
    """
    config = architecture(config)
    check_shape(config, method, batch, seq, options)
    storage = storage or peft.default_storage(method)
    settings = checkpointing, gradient_accumulation_steps, grad_clip, label_smoothing, offload, packed
    knobs = Config(optimizer=optimizer, param_dtype=param_dtype)

    def track(config):
        with simulation(device):
            model = simulated_model(config, method, dtype, storage, options, param_dtype)
            return tracked_step(model, knobs, batch, seq, device, *settings)

    report = report_by_few_blocks(track, config, method, storage)
    with_constants(report, device, n_threads=2)
    return report | {"method": method, "batch": batch, "seq": seq}


def with_constants(report, device, n_threads):
    """Adds to a report what a process on a GPU takes beside its tensors. n_threads: how many of it multiply."""
    if device == "cuda":
        constants = {"cuBLAS workspaces": cublas_workspaces(n_threads), "CUDA context": CUDA_CONTEXT}
        report["parts"] |= constants
        report["peak"] += sum(constants.values())


def tracked_step(model, knobs, batch, seq, device, checkpointing, accumulation, grad_clip, smoothing,
                 offload, packed):
    """A Tracker of one step of a simulated model; the arguments are simulate's. knobs: a Config with the optimizer's."""
    model.checkpointing = checkpointing
    optimizer = run.make_optimizer(model.train(), knobs)
    make_states(model, optimizer)
    saving = functools.partial(simulated_offload, model) if offload else nullcontext
    scaler = run.make_scaler(dtype_name(model.dtype), "cpu")
    scaler.scale(torch.zeros(()))                                # Its two numbers are made by its first use.
    # The step makes the codes' tables anew, so that they count in it.
    with quant.fresh_tables(), Tracker(model, optimizer, device) as tracker:
        micro_batches = [torch.zeros(2, batch, seq, dtype=torch.int64)           # tokens and targets
                         for _ in range(accumulation)]
        if packed:
            rows = [torch.zeros(2, 1, sum(lengths), dtype=torch.int64) for lengths in packed]
            micro_batches = [(*row, lengths) for row, lengths in zip(rows, packed)]
        run.step(model, optimizer, micro_batches, grad_clip, smoothing, saving, scaler)
    return tracker


def simulate_generation(config, method="lora", batch=1, seq=512, dtype=torch.bfloat16, device="cuda",
                        storage=None, param_dtype="float32", **options):
    """
    The peak of writing up to seq tokens in each of batch rows, the prompts among them: {"peak", "parts"} in
    bytes. It is of the first token, from a prompt of all seq tokens but one, and the last one; the copies of the
    layers count as made, though a process that lacks the memory goes on without. Arguments as for simulate.
    """
    config = architecture(config)
    check_shape(config, method, batch, seq, options)
    storage = storage or peft.default_storage(method)

    def track(config):
        with simulation(device):
            model = simulated_model(config, method, dtype, storage, options, param_dtype)
            return tracked_generation(model, batch, seq, device)

    report = report_by_few_blocks(track, config, method, storage)
    with_constants(report, device, n_threads=1)
    return {"peak": report["peak"], "parts": report["parts"]}


@torch.no_grad()
def tracked_generation(model, batch, seq, device):
    """A Tracker of the first token after seq - 1 of them in each of batch rows, and of the next one."""
    model.eval()
    with Tracker(model, device=device, outside="copies of the layers") as tracker:
        cache = Cache(model.config.n_layer, seq)
        with ready_layers(model, batch):
            tracker.running.append(("temporaries", ""))          # Outside of modules it was copies until here.
            for n_tokens in (seq - 1, 1):
                tokens = torch.zeros(batch, n_tokens, dtype=torch.int64)
                sample(next_logits(model, tokens, cache), temperature=0)
    return tracker


def architecture(model):
    """The GPTConfig that model is or, as a name of PRESETS, stands for; ValueError with the nearest names."""
    if isinstance(model, GPTConfig):
        return model
    nearest = difflib.get_close_matches(model, PRESETS, 3, 0.0)
    check(model in PRESETS, f"unknown model {model!r}; the nearest are {', '.join(nearest)}")
    return PRESETS[model]


def longest_sequence(config, method, options):
    """The tokens that fit into the model's context beside the methods' virtual ones."""
    return config.block_size - peft.virtual_positions(method, options)


def check_shape(config, method, batch, seq, options):
    """ValueError unless a batch of that shape can go through the model."""
    for name, value in (("batch", batch), ("seq", seq)):
        bounded(name, value)
    longest = longest_sequence(config, method, options)
    check(seq <= longest, f"seq is {seq}; the model's context leaves {longest}")


# -----------------------------------------------------------------------------
# what fits


FARTHEST = 16       # times what is known to fit


def largest(need, memory, limit):
    """
    The largest n in 1 .. limit with need(n) <= memory, where need never falls; 0 if there is none.

    need is nearly a line but costs seconds. So after 1 and 2 it is asked, by turns, where a line through its
    last two answers crosses the memory, and for the double or the middle, in case it is no line. A line that
    begins nearly flat would lead far beyond the answer, where the cost grows: no question leaps further than
    by FARTHEST.
    """
    low, high = 0, limit + 1                 # low fits, high does not
    answers = []                             # (n, need(n)), the last two
    by_line = False
    while high - low > 1:
        n = min(2 * low or 1, (low + high) // 2)
        if by_line:
            n = crossing(*answers, memory, n)
        n = min(max(n, low + 1), high - 1, FARTHEST * low or 1)
        answers = [*answers[-1:], (n, need(n))]
        if answers[-1][1] <= memory:
            low = n
        else:
            high = n
        by_line = len(answers) == 2 and not by_line
    return low


def crossing(point, other, y, default):
    """The largest whole x at which the line through two points (x, y) is not above y; a default if it is flat."""
    (x1, y1), (x2, y2) = point, other
    if y1 == y2:
        return default
    return math.floor(x1 + (y - y1) * (x2 - x1) / (y2 - y1))


@functools.cache
def predicted_peak(config, method, batch, seq, **settings):
    """The bytes of simulate's peak."""
    return simulate(config, method, batch, seq, **settings)["peak"]


def max_batch(config, memory, method="lora", seq=512, grow="batch", batch=1, **settings):
    """
    The largest batch (grow "seq": the longest sequence of that batch) whose step's peak is at most memory,
    bytes; 0 if not even 1 fits. settings: the other arguments of simulate.
    """
    config = architecture(config)
    limit = 2**20 if grow == "batch" else longest_sequence(config, method, settings)

    def need(n):
        shape = (n, seq) if grow == "batch" else (batch, n)
        return predicted_peak(config, method, *shape, **settings)

    return largest(need, memory, limit)


# -----------------------------------------------------------------------------
# tables


def slide():
    """The lecture's table beside the formula's and the simulation's."""
    ours = estimate(PRESETS["opt-1.3b"])
    rows = [["OPT-1.3B, 16-bit, sequence 512", "lecture", "formula"]]
    rows += [[name, f"{LECTURE[name]:.2f} GB", size(n, 2)] for name, n in ours.items()]
    return f"""{table(rows)}

The lecture measured 11.0 GB. Its optional row, a float32 copy of the gradients, is
4 N = {size(2 * ours["gradients"], 2)}, not the 10.2 GB printed. Its attention term 3 seq^2 leaves out
the number of heads ({PRESETS["opt-1.3b"].n_head}), and fused attention has no such term at all.

This project trains in float32 with the products in bfloat16 (weights, gradients and Adam's
moments 4 bytes each) unless told otherwise. The same step, simulated; the lecture's is the second:

{breakdown(slide_reports(), "OPT-1.3B")}"""


def slide_reports():
    """Reports of full fine-tuning of OPT-1.3B with the knobs that say what is stored, which stand for the method."""
    in_16_bits, in_8_bits = {"param_dtype": "bfloat16"}, {"optimizer": "adamw8bit"}
    for knobs in ({}, in_16_bits, in_8_bits, in_16_bits | in_8_bits):
        yield simulate("opt-1.3b", "full", **knobs) | {"method": " ".join(knobs.values()) or "float32"}


def breakdown(reports, title):
    """A table of reports of simulate: a column each, a row a part."""
    reports = list(reports)
    rows = [[title, *(report["method"] for report in reports)]]
    for part in dict.fromkeys(part for report in reports for part in report["parts"]):
        sizes = [report["parts"].get(part) for report in reports]
        rows.append([part, *(size(n, 2) if n else "-" for n in sizes)])
    return table([*rows, ["peak", *(size(report["peak"], 2) for report in reports)]])


BERT = {        # sequence length -> the lecture's batch
    "bert-base": {64: 64, 128: 32, 256: 16, 320: 14, 384: 12, 512: 6},
    "bert-large": {64: 12, 128: 6, 256: 2, 320: 1, 384: 0, 512: 0},
}


def bert(memory):
    """The lecture's table of BERT's batches beside ours on that much memory, bytes."""
    rows = [["system", "seq", "lecture", "ours"]]
    for name, batches in BERT.items():
        for seq, batch in batches.items():
            ours = max_batch(name, memory, "full", seq, dtype=torch.float32)
            rows.append([name, str(seq), str(batch), str(ours)])
    return f"""{table(rows)}

Ours: a decoder of that shape on {size(memory, 2)}, all trained, float32, Adam, fused attention, the loss in
chunks, every token supervised. The lecture's (google-research/bert) is TensorFlow's of 2018, whose
attention keeps (heads, seq, seq) several times over and whose allocator held back what it had once
taken: the numbers should differ, and the more so the longer the sequence."""


TABLE = {       # model -> its methods in the table of results/README.md
    "gpt2-medium": ("full", "adapter", "prefix", "lora", "qlora"),
    "gemma-3-4b": ("full", "lora", "qlora"),
    "llama-3.1-8b": ("full", "adapter", "prefix", "lora", "qlora"),
    "qwen3-8b": ("full", "lora", "qlora"),
    "llama-65b": ("lora", "qlora"),
    "llama-3.1-70b": ("full", "lora", "qlora"),
}


def results_table():
    """
    Yields the table of results/README.md, each line as soon as it is known: models by methods, the peak at
    sequence 512 and batch 1, and the largest batch on three sizes of card.
    """
    header = ["model", "method", "peak at 1 x 512", "batch on 16 GB", "24 GB", "80 GB"]
    yield table([header], markdown=True)
    for name, methods in TABLE.items():
        for method in methods:
            batches = [max_batch(name, n * 10**9, method) for n in (16, 24, 80)]
            peak = predicted_peak(PRESETS[name], method, 1, 512)
            row = [name, method, size(peak, 2), *map(str, batches)]
            yield "| " + " | ".join(row) + " |"


# -----------------------------------------------------------------------------
# a model of the user's


def load_config(name):
    """The GPTConfig of a preset, or of the config.json of a folder in Hugging Face layout."""
    return origin.read_config(name) if Path(name, "config.json").is_file() else architecture(name)


def settings_of(args):
    """The keyword arguments of simulate that the command line gives."""
    names = (*METHOD_OPTIONS, "device", "checkpointing", "gradient_accumulation_steps", "offload", "optimizer",
             "param_dtype")
    settings = {name: getattr(args, name) for name in names}
    storage = quant.Storage(args.quant, double=True) if args.quant else None
    return settings | {"dtype": getattr(torch, args.dtype), "storage": storage}


def fitting(config, method, args, settings):
    """A line: the largest batch or sequence in the memory of args.fit, or what would fit instead."""
    check_shape(config, method, args.batch, args.seq, settings)
    n = max_batch(config, args.fit, method, args.seq, args.grow, args.batch, **settings)
    if n and args.grow == "batch":
        return f"{method}: batch {n} of {args.seq} tokens"
    if n:
        return f"{method}: sequences of {n} tokens, batch {args.batch}"
    seq = 1 if args.grow == "seq" else args.seq
    peaks = {}
    for other in ("lora", "qlora"):
        peaks[other] = predicted_peak(config, other, 1, seq, **settings | {"storage": None})
    other = min(peaks, key=peaks.get)
    advice = f"{other} would fit"
    if peaks[other] > args.fit:
        advice = f"not even {other}, which takes {size(peaks[other], 2)}, fits"
    return f"{method}: does not fit at batch 1; {advice}"


def main(args):
    """Prints what was asked for."""
    if args.slide:
        print(slide())
    elif args.bert:
        print(bert(args.fit or 12 * 10**9))
    elif args.table:
        for line in results_table():
            print(line, flush=True)
    else:
        own_model(args)


def own_model(args):
    """Prints what fits, or the peak by parts, for the model and the methods of the command line."""
    config, settings, methods = load_config(args.model), settings_of(args), args.method.split(",")
    if args.fit:
        for method in methods:
            print(fitting(config, method, args, settings), flush=True)
        return
    reports = [simulate(config, method, args.batch, args.seq, **settings) for method in methods]
    if args.json:
        print(json.dumps([report | {"model": args.model} for report in reports], indent=1))
    else:
        print(breakdown(reports, f"{args.model}, {args.batch} x {args.seq}, {args.dtype}"))


if __name__ == "__main__":
    run_main(main, ARGS)
