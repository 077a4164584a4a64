"""
Machine.
"""

import ctypes
import importlib.util
import inspect
import os
import shutil
from contextlib import contextmanager
from datetime import timedelta

import torch

import quant


RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))      # torchrun sets them


# -----------------------------------------------------------------------------
# several processes


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


def say(*lines):
    """Prints lines, in the first process alone."""
    if RANK == 0:
        print(*lines, sep="\n", flush=True)


# -----------------------------------------------------------------------------
# device and type


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


def compiled(model, device):
    """Compiles the forward and backward pass where there is a compiler; whether there is one."""
    there = importlib.util.find_spec("triton") if device.type == "cuda" else shutil.which(os.environ.get("CXX", "g++"))
    if there:
        model.compile(dynamic=True)
    return bool(there)


# -----------------------------------------------------------------------------
# memory


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
