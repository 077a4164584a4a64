"""
The machine: which device and type, the allocator, several processes, and FSDP.

Under torchrun every process runs the same script; RANK and WORLD_SIZE tell them apart. Alone, every
function here that speaks to other processes does nothing.
"""

import ctypes
import importlib.util
import inspect
import os
import platform
import re
import shutil
from contextlib import contextmanager
from datetime import timedelta

import torch

import quant
from lib.checks import check, shown

RANK = int(os.environ.get("RANK", 0))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))

# -----------------------------------------------------------------------------
# device and type


def pick_device(name):
    """
    The torch.device of "auto", "cpu", "cuda" or "cuda:1"; under torchrun this process's GPU. ValueError if
    it is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    known = re.fullmatch(r"cpu|cuda(:\d{1,3})?", name)
    check(known, f"device is {shown(name)}; it must be auto, cpu, cuda or cuda:N")
    device = torch.device(name)
    if device.type != "cuda":
        return device
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (device.index or 0) >= count:                                                            # fault 36
        raise ValueError(f"device is {name!r}, but there are {count} GPUs here; --device cpu runs without")
    if WORLD_SIZE > 1:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        if device.index >= count:
            raise ValueError(f"process {RANK} is number {device.index + 1} here, where there are {count} GPUs; start one a GPU")
    return device


def pick_dtype(name, device):
    """
    The torch.dtype of "float32" or "bfloat16"; of "auto", bfloat16 where the hardware multiplies it
    natively, else float32.
    """
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        native = any(getattr(torch.cpu, f"_is_{kind}_supported", bool)() for kind in ("amx_tile", "avx512_bf16"))
    return torch.bfloat16 if native else torch.float32


def dtype_name(dtype):
    """torch.bfloat16 -> "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def compile_model(model, device):
    """
    Compiles the blocks' forward and backward pass where there is a compiler; returns whether there is one.

    A block is compiled once for all of its kind, which takes a fraction of the time that a whole model
    would. What lies around the blocks, the loss above all, is fast as it is.
    """
    if device.type == "cuda":
        compiler = importlib.util.find_spec("triton")
    else:
        compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is not None:
        # A block has some dozen variants: first or later one, training or not, one row or several, by window.
        torch._dynamo.config.cache_size_limit = 64
        for block in model.blocks:
            # The lengths of sequences side by side are other ones in every batch.
            block.attn.attend_apart = torch.compiler.disable(block.attn.attend_apart)
            block.forward = compiled_without_cache(block.forward)
    return bool(compiler)


def compiled_without_cache(forward):
    """A block's forward pass that is compiled, but not where it generates, a token at a time."""
    # Random numbers are those of the uncompiled step.
    compiled = torch.compile(forward, dynamic=True, options={"fallback_random": True})

    def run(x, rope=None, mask=None, cache=None):
        if cache is None:
            return compiled(x, rope, mask)
        return forward(x, rope, mask, cache)

    return run


# -----------------------------------------------------------------------------
# memory


def prepare(device):
    """What a process does once, before its first product on the device."""
    if device.type == "cpu":
        tune_memory()
    elif device.index is not None:
        torch.cuda.set_device(device)


def tune_memory():
    """
    Tells the C library to keep freed memory, because on a CPU the page faults of fresh allocations cost as
    much as the arithmetic.

    Also tells oneDNN to keep fewer of the kernels that it compiles, one for every shape of a bfloat16
    product: the 1,024 that it keeps by itself take half a gigabyte where lengths vary. Both work only
    before the first product.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
    os.environ.setdefault("LRU_CACHE_CAPACITY", "64")            # Torch's own cache, in front of oneDNN's.
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return                                                   # This C library is not glibc.
    M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
    for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 2**26)):
        mallopt(option, value)


def resident_bytes():
    """Bytes in use now: of the GPU by tensors, or of this process's memory."""
    if torch.cuda.is_initialized():
        return torch.cuda.memory_allocated()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


_earlier_peak = 0                # of a GPU, before its allocator began to count anew


def count_peak_anew():
    """From here on torch.cuda.max_memory_allocated tells of what follows; peak_bytes still tells of all."""
    global _earlier_peak
    _earlier_peak = max(_earlier_peak, torch.cuda.max_memory_allocated())
    torch.cuda.reset_peak_memory_stats()


def peak_bytes():
    """
    The most bytes that were in use at any time. (getrusage's maximum begins with what the starting process
    had.)
    """
    if torch.cuda.is_initialized():
        return max(_earlier_peak, torch.cuda.max_memory_allocated())
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def hardware(device):
    """What computes, for a table of measurements: "NVIDIA H100 80GB HBM3", "AMD EPYC 9B14, 2 threads"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with open("/proc/cpuinfo") as file:
        names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} threads"


# -----------------------------------------------------------------------------
# several processes

_waiting_group = None            # a process group for when one process works for minutes and the others wait


@contextmanager
def processes(device):
    """
    Joins the other processes, where torchrun has started several.

    A process that is lost ends the others: at once where its connection breaks, after a minute where it
    only falls silent.
    """
    global _waiting_group
    distributed = torch.distributed
    try:
        if WORLD_SIZE > 1:
            backend = "nccl" if device.type == "cuda" else "gloo"
            distributed.init_process_group(backend, timeout=timedelta(minutes=1))
            _waiting_group = distributed.new_group(timeout=timedelta(minutes=30), backend="gloo")
        yield
    except RuntimeError as error:
        if not isinstance(error, distributed.DistError) and "gloo" not in str(error):
            raise
        reason = str(error).splitlines()[0]
        raise ValueError(f"another process has ended or does not answer ({reason}); torchrun's report names its rank; "
                         "what was saved is whole, and --resume goes on from it where the run has begun") from None
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()
            # The last reference joins gloo's threads: one that lets go of a tensor after Python's end would
            # abort the process.
            _waiting_group = None


def say(*lines):
    """Prints lines, in the first process alone."""
    if RANK == 0:
        print(*lines, sep="\n", flush=True)


def gathered(value):
    """[what every process gives, by rank]; nobody goes on before all have come here."""
    values = [value] * WORLD_SIZE
    if WORLD_SIZE > 1:
        torch.distributed.all_gather_object(values, value, _waiting_group)
    return values


def agree(values):
    """ValueError unless every process has the same {what: value}, because all must do the same work."""
    told = gathered(values)
    for rank, other in enumerate(told):
        for name, value in told[0].items():
            if other[name] != value:
                raise ValueError(f"process {rank} has {name} {other[name]!r}, process 0 has {value!r}; start all with the same")


def anybody(asked, device):
    """Whether any process is asked to end; all then end after the same step."""
    if WORLD_SIZE == 1:
        return asked
    return bool(sum_over_processes(torch.tensor(float(asked), device=device)))


def sum_over_processes(first, *rest):
    """Sums tensors over the processes, in place and as one message of float32; returns the first."""
    if WORLD_SIZE > 1:
        tensors = first, *rest
        flat = torch.cat([t.reshape(-1).float() for t in tensors])
        torch.distributed.all_reduce(flat)
        for t, part in zip(tensors, flat.split([t.numel() for t in tensors])):
            t.copy_(part.view(t.shape))
    return first


def shard(model, device):
    """
    FSDP2: a block's tensors lie divided among the processes, in storage, and come together as bytes while
    the block computes.

    What is trained is attached afterwards and stays whole everywhere, like embedding, norm and head, so
    that optimizer, saving and sum_over_processes notice nothing. The model comes on the CPU and goes to the
    device a block at a time.
    """
    from torch.distributed.fsdp import fully_shard               # It takes half a second to import.
    if "ignored_params" not in inspect.signature(fully_shard).parameters:
        raise ValueError(f"fsdp needs torch 2.7 or newer, this is {torch.__version__}; several processes without --fsdp need none")
    mesh = torch.distributed.init_device_mesh(device.type, (WORLD_SIZE,))
    blocks = model.blocks
    model.blocks = torch.nn.ModuleList()
    model.to(device)
    whole = set(model.parameters())
    model.blocks = blocks
    for block in blocks:
        for module in block.modules():
            if isinstance(module, quant.QuantLinear):
                module.make_parameters()
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    # The outer one holds nothing, and fetches a block while the one before it computes.
    fully_shard(model, mesh=mesh, ignored_params=whole)
