"""
The lecture's chapter on quantization: NF4, int8, int4, sixteen evenly spaced levels; double quantization; the quantized
linear layer; and QLoRA's autograd Function by hand. Plain torch operations, so on any device.

    python quant.py                                       # the slide's example, the codes, the error table
    python -m pytest -q tests/test_quant.py               # bit for bit with bitsandbytes where it is installed

    q = quantize(weight, "nf4", block=64, double=True)     # QuantizedTensor
    w = q.dequantize(torch.bfloat16)                            # Tensor of weight's shape
    n_stored, n_linear = store(model, Storage("nf4"))           # in place

Every scheme here is absmax quantization: a block of weights is divided by its largest magnitude and each quotient
becomes the index of the nearest level. What is stored is the index and, once a block, the magnitude.
"""

import difflib
import functools
import importlib.util
import math
import threading
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils._python_dispatch import _disable_current_modes

from lib.kernels import device_type, simulating

# -----------------------------------------------------------------------------
# levels

# Quantiles of the normal distribution with an exact zero (QLoRA, Dettmers et al. 2023, appendix E), as bitsandbytes stores them
NF4 = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
       -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
       0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)
LEVELS = {
    "nf4": NF4,
    "linear4": tuple(-1 + 2 * k / 15 for k in range(16)),   # the slide's sixteen evenly spaced levels
    "int4": tuple((k - 8) / 7 for k in range(16)),          # integers [-8, 7] over 7, so that absmax and zero are exact;
}                                                           # -8 is therefore never written. |error| <= absmax / 14
SCHEMES = (*LEVELS, "int8")
BLOCKS = tuple(2**i for i in range(4, 13))
NESTED_BLOCK = 256        # scales a group of double quantization
CHUNK = 2**19             # elements worked on at a time on a CPU, so that intermediate results stay in its cache


def dynamic_levels():
    """The 255 + 1 levels of bitsandbytes' signed 8-bit "dynamic" type, float32 (Dettmers 2016): a sign, a decimal exponent, a linear fraction."""
    positive = []
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1)
        positive += (10.0 ** (i - 6) * (edges[:-1] + edges[1:]) / 2).tolist()
    return torch.tensor(sorted([-v for v in positive] + [0.0, 1.0] + positive))


DYNAMIC = tuple(dynamic_levels().tolist())      # plain numbers, so that a compiler can trace what uses them


def _levels(scheme):
    return torch.tensor(DYNAMIC if scheme == "dynamic" else LEVELS[scheme])


def _boundaries(scheme):
    levels = _levels(scheme)
    return (levels[:-1] + levels[1:]) / 2


# -----------------------------------------------------------------------------
# packing

# byte i of `packed`:   bit 7 6 5 4 | 3 2 1 0
#                       code[2i]    | code[2i+1]        an odd count leaves 7 (NF4's zero) in the last low nibble


def pack4(codes):
    """codes (n,) uint8 in 0..15 -> packed (ceil(n / 2),) uint8."""
    if codes.numel() % 2:
        codes = torch.cat((codes, codes.new_full((1,), 7)))
    return torch.add(codes[1::2], codes[::2], alpha=16)


def unpack4(packed, n):
    """packed (ceil(n / 2),) uint8 -> codes (n,) uint8 in 0..15."""
    return torch.stack((packed >> 4, packed & 15), 1).view(-1)[:n]


# -----------------------------------------------------------------------------
# memory and tables that are kept


_tables, _local = {}, threading.local()


@contextmanager
def simulated():
    """Within it tables and buffers are its own, because they are fake ones (memory.py)."""
    global _tables, _local
    before, (_tables, _local) = (_tables, _local), ({}, threading.local())
    try:
        yield
    finally:
        _tables, _local = before


def kept():
    """Tensors that this thread keeps from call to call."""
    return [*_tables.values(), *_local.__dict__.values()]


def forget():
    """Lets go of this thread's buffers, of which quantizing takes more than training; the next call makes its own anew."""
    _local.__dict__.clear()


def _table(make, scheme, device):
    """make(scheme) on device, made once; traced code gets it as a constant."""
    if torch.compiler.is_compiling():
        return make(scheme).to(device)
    key = make, scheme, device
    if key not in _tables:
        with torch.inference_mode(False), _disable_current_modes():
            table = make(scheme)
        with torch.inference_mode(False):
            _tables[key] = torch.empty(table.shape, dtype=table.dtype, device=device)       # in two steps: a fake one has no content
            if not simulating():
                _tables[key].copy_(table)
    return _tables[key]


def _buffer(use, n, dtype):
    """n elements of a CPU's memory, good until this thread asks for the same use again.

    Fresh memory comes from the system page by page, and that costs more than the arithmetic that is done in it.
    """
    kept = _local.__dict__
    key = f"{use} {dtype}"
    if key not in kept or kept[key].numel() < n:
        with torch.inference_mode(False):
            kept[key] = torch.empty(n, dtype=dtype)
    return kept[key][:n]


def _plain(tensor):
    """Whether this is a CPU's memory, to work on in place: not an accelerator's, not being traced."""
    return device_type(tensor) == "cpu" and (simulating() or type(tensor) in (torch.Tensor, nn.Parameter)) and not torch.compiler.is_compiling()


def _step(block, device):
    """Elements to work on at a time: whole blocks, and whole bytes of two codes."""
    return max((CHUNK if device.type == "cpu" else 64 * CHUNK) // (2 * block), 1) * 2 * block


def _lookup(table, index, out):
    """out = table[index], all flat. gather shares its rows among the cores; index_select on a flat table keeps to one."""
    rows = 16 if index.numel() % 16 == 0 else 1
    return torch.gather(table.expand(rows, -1), 1, index.view(rows, -1), out=out.view(rows, -1)).view(-1)


# -----------------------------------------------------------------------------
# quantize: flat weights -> codes and absmax


def _nearest(y, scheme):
    """y (n,) float32 in [-1, 1] -> (n,) uint8, the index of the nearest level, of two equally near the lower one.

    That is the number of boundaries below y. On a CPU two tables find it: no cell of width 1/128 holds two boundaries, so the
    number below the cell and one comparison inside it are enough. 4096 x 4096 on 2 cores takes 36 ms in all;
    torch.bucketize alone 190, fifteen comparisons 95.
    """
    if scheme == "dynamic" or not _plain(y):
        return torch.bucketize(y, _table(_boundaries, scheme, y.device), out_int32=True).to(torch.uint8)
    n = y.numel()
    edge, codes = _buffer("values", n, torch.float32), _buffer("codes", n, torch.uint8)
    cell = _buffer("index", n, torch.int32).copy_(torch.mul(y, 128, out=edge).add_(128))      # (to int64 at once is slower)
    cell = _buffer("index", n, torch.int64).copy_(cell)
    _lookup(_table(_boundary_in, scheme, y.device), cell, edge)
    _lookup(_table(_boundaries_below, scheme, y.device), cell, codes)
    return codes.add_(torch.gt(y, edge, out=_buffer("above", n, torch.bool)).view(torch.uint8))


def _cells(scheme):
    """(15,) int64, the cell of each boundary, by the very operations of _nearest, which never fall as y rises. One of int4's lies below -1."""
    return _boundaries(scheme).mul(128).add_(128).clamp_(min=0).int().long()


def _boundary_in(scheme):
    """(257,) float32: the boundary in each cell, infinity where there is none."""
    return torch.full((257,), math.inf).index_put_((_cells(scheme),), _boundaries(scheme))


def _boundaries_below(scheme):
    """(257,) uint8: how many boundaries lie in the cells before each one."""
    return torch.bucketize(torch.arange(257), _cells(scheme)).to(torch.uint8)


def _normalize(x, absmax, top, whole=True):
    """x (rows, block) float32 times top / absmax, in [-top, top], also where the reciprocal is infinite.

    whole is False for a partial last block, where bitsandbytes divides; it may differ in the last bit.
    """
    if not whole:
        return x / torch.where(absmax == 0, 1, absmax)[:, None]
    scale = top / absmax
    if not bool(scale.isinf().any()):
        y = torch.mul(x, scale[:, None], out=_buffer("normal", x.numel(), x.dtype).view(x.shape) if _plain(x) else None)
    else:
        lift = torch.where(scale.isinf(), 2.0**100, 1.0)                   # an exact power of two
        lifted = absmax * lift
        y = (x * lift[:, None]) * torch.where(lifted == 0, 0, top / lifted)[:, None]
    return y.clamp_(-top, top)


def _encode(x, scheme, block):
    """x (n,) of any floating type -> (codes as they are stored, absmax (ceil(n / block),) float32); None where x is not finite."""
    whole = x.numel() // block * block
    parts = [part.view(-1, block) for part in x[:whole].split(_step(block, x.device))] if whole else []
    if whole < x.numel():
        parts.append(x[whole:].view(1, -1))
    codes, absmaxes = [], []
    for part in parts:
        part = _buffer("float", part.numel(), torch.float32).view(part.shape).copy_(part) if _plain(x) else part.float()
        absmax = (torch.abs(part, out=_buffer("normal", part.numel(), part.dtype).view(part.shape)) if _plain(x) else part.abs()).amax(1)
        if not bool(absmax.isfinite().all()):
            return None
        if scheme == "int8":
            code = _normalize(part, absmax, 127.0).round_().to(torch.int8).view(-1)
        else:
            code = _nearest(_normalize(part, absmax, 1.0, part.size(1) == block).view(-1), scheme)
        codes.append(code if scheme in ("int8", "dynamic") else pack4(code))
        absmaxes.append(absmax)
    return torch.cat(codes), torch.cat(absmaxes)


# -----------------------------------------------------------------------------
# dequantize: codes and scales -> out (n,) of any floating type

# 4096 x 4096 NF4 to bfloat16 on 2 cores, into memory that is kept: 6.5 ms by a table of the 256 bytes, whose entry is
# two float32 levels read as one 64-bit word. levels[unpack4(packed)] took 30 ms; 65536 pairs of bytes, a table that leaves
# the nearest cache, no less than 256; torch.compile 50 to 60 ms, after 20 s of compiling. The levels stay float32
# because the product with absmax is rounded once.


def _decode(packed, scales, scheme, m, block, out):
    """The formula in whole tensors, for accelerators and compilers."""
    values = packed.float() / 127 if scheme == "int8" else _table(_levels, scheme, packed.device)[unpack4(packed, m).int()]
    out.copy_((_blocks(values, block) * scales[:, None]).view(-1)[:m])


def _decode_cpu(packed, scales, scheme, m, block, out):
    if scheme == "int8":
        values = _buffer("values", m, torch.float32).copy_(packed).div_(127)
    else:
        values = _buffer("values", 2 * packed.numel(), torch.float32)
        _lookup(_table(_pairs, scheme, out.device), _buffer("index", packed.numel(), torch.int64).copy_(packed), values.view(torch.int64))
    whole = m // block * block
    values[:whole].view(-1, block).mul_(scales[:whole // block, None])
    values[whole:m].mul_(scales[-1])
    out.copy_(values[:m])


def _pairs(scheme):
    """(256,) int64: the two float32 levels of each byte."""
    return _levels(scheme)[unpack4(torch.arange(256, dtype=torch.uint8), 512).int()].view(torch.int64)


def _blocks(x, block):
    """x (n,) -> (ceil(n / block), block), a partial last block filled up with zeros."""
    return torch.cat((x, x.new_zeros(-x.numel() % block))).view(-1, block) if x.numel() % block else x.view(-1, block)


@functools.cache
def _fused():
    """_decode as one kernel of an accelerator, or None where there is no compiler."""
    return torch.compile(_decode, dynamic=True) if importlib.util.find_spec("triton") else None


_compiler_failed = []


def _decode_fused(*arguments):
    """Whether a kernel did it; a compiler that fails once is not asked again."""
    if _compiler_failed or _fused() is None:
        return False
    try:
        _fused()(*arguments)
    except Exception as error:      # whatever a compiler raises that finds no C compiler, or does not know the device
        _compiler_failed.append(error)
        return False
    return True


def _decode_all(packed, scales, scheme, n, block, out):
    """A chunk at a time, so that no intermediate result is as large as the weight."""
    if device_type(out) == "cuda" and (simulating() or _decode_fused(packed, scales, scheme, n, block, out)):
        return
    decode = _decode_cpu if _plain(packed) else _decode
    per_byte = 1 if scheme == "int8" else 2
    step = _step(block, out.device)
    for i in range(0, min(n, step) if simulating() else n, step):     # for memory one chunk is like another
        m = min(step, n - i)
        decode(packed[i // per_byte:-(-(i + m) // per_byte)], scales[i // block:-(-(i + m) // block)], scheme, m, block, out[i:i + m])


# -----------------------------------------------------------------------------
# the stored weight


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A weight in storage. Made by `quantize`; immutable: do not write into its tensors.

        packed    (ceil(n / 2),) uint8, two codes a byte (pack4); or (n,) int8
        absmax    (n_blocks,) float32; with double quantization uint8, indices into dynamic_levels(), and then also
        absmax2   (ceil(n_blocks / 256),) float32, the scales of the scales
        offset    () float32, the mean that was taken off
    """
    shape: torch.Size
    scheme: str
    block: int | None        # None: per row
    dtype: torch.dtype            # of the weight it came from
    packed: torch.Tensor
    absmax: torch.Tensor
    absmax2: torch.Tensor | None = None
    offset: torch.Tensor | None = None

    def __post_init__(self):
        lengths = _lengths(self.shape, self.scheme, self.block, self.double)
        for name, tensor in self.tensors().items():
            if tensor.numel() != lengths[name]:
                raise ValueError(f"{name} holds {tensor.numel()} values; {self.scheme} of shape {tuple(self.shape)} needs {lengths[name]}")

    @property
    def double(self):
        """Whether the scales are quantized too."""
        return self.absmax2 is not None

    @property
    def weights_per_scale(self):
        """How many weights share a scale: the block, or the length of a row."""
        return _block(self.shape, self.block)

    @property
    def nbytes(self):
        """Bytes of everything that is stored."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    @property
    def device(self):
        return self.packed.device

    @property
    def meta(self):
        """(shape, scheme, block, dtype): what is not a tensor."""
        return self.shape, self.scheme, self.block, self.dtype

    def numel(self):
        """Number of weights, not of bytes."""
        return math.prod(self.shape)

    def tensors(self):
        """name -> tensor, of those there are."""
        named = {"packed": self.packed, "absmax": self.absmax, "absmax2": self.absmax2, "offset": self.offset}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def to(self, device):
        """The same on another device."""
        return QuantizedTensor(*self.meta, *(t.to(device) for t in self.tensors().values()))

    def scales(self):
        """The absmax of each block, (n_blocks,) float32, double quantization undone."""
        if not self.double:
            return self.absmax
        values = _table(_levels, "dynamic", self.device)[self.absmax.int()]
        return (_blocks(values, NESTED_BLOCK) * self.absmax2[:, None]).view(-1)[:self.absmax.numel()] + self.offset

    def dequantize(self, dtype=None, out=None):
        """float32 level times float32 absmax, then one rounding to dtype (default: the weight's own). Returns a Tensor of `shape`.

        out: a contiguous Tensor of `shape` to fill, whose dtype then counts.
        """
        if out is None:
            out = self.packed.new_empty(self.shape, dtype=dtype or self.dtype)
        arguments = self.packed, self.scales(), self.scheme, self.numel(), self.weights_per_scale, out.view(-1)
        _decode(*arguments) if torch.compiler.is_compiling() else _decode_all(*arguments)
        return out

    @classmethod
    def empty(cls, shape, scheme, block=64, double=False, dtype=torch.float32, device=None):
        """One of that shape with nothing in it yet."""
        block = None if block == "row" else block
        _check_spec(scheme, block)
        kinds = {"packed": torch.int8 if scheme == "int8" else torch.uint8, "absmax": torch.uint8 if double else torch.float32}
        tensors = [torch.empty(() if name == "offset" else n, dtype=kinds.get(name, torch.float32), device=device)
                   for name, n in _lengths(shape, scheme, block, double).items()]
        return cls(torch.Size(shape), scheme, block, dtype, *tensors)

    def state_dict(self):
        """Plain values and tensors: torch.load(weights_only=True) reads it back."""
        meta = {"shape": list(self.shape), "scheme": self.scheme, "block": self.block, "dtype": str(self.dtype).removeprefix("torch.")}
        return meta | self.tensors()

    @classmethod
    def from_state(cls, state):
        """The inverse of state_dict. ValueError where keys, types or lengths do not fit, before anything is allocated."""
        missing = {"shape", "scheme", "block", "dtype", "packed", "absmax"} - state.keys()
        if missing:
            raise ValueError(f"quantized tensor lacks {', '.join(sorted(missing))}")
        dtype = getattr(torch, str(state["dtype"]), None)
        _check_spec(state["scheme"], state["block"])
        return cls(torch.Size(state["shape"]), state["scheme"], state["block"], dtype, state["packed"], state["absmax"],
                   state.get("absmax2"), state.get("offset"))


def _block(shape, block):
    return block or (shape[-1] if len(shape) else 1)


def _lengths(shape, scheme, block, double):
    n = math.prod(shape)
    blocks = -(-n // _block(shape, block))
    lengths = {"packed": n if scheme == "int8" else (n + 1) // 2, "absmax": blocks}
    return lengths | ({"absmax2": -(-blocks // NESTED_BLOCK), "offset": 1} if double else {})


def _check_spec(scheme, block):
    if scheme not in SCHEMES:
        near = difflib.get_close_matches(str(scheme), SCHEMES) or SCHEMES
        raise ValueError(f"unknown scheme {scheme!r}; nearest: {', '.join(near)}")
    if block is not None and (type(block) is not int or block not in BLOCKS):
        raise ValueError(f"block is {block!r}; it must be a power of two from 16 to 4096, or 'row'")


def quantize(weight, scheme, block=64, double=False, name="weight"):
    """Tensor of any shape, float32, bfloat16 or float16 -> QuantizedTensor.

    scheme: "nf4", "linear4", "int4" or "int8". block: 16 .. 4096, elements in row-major order that share a scale;
    None or "row": the last dimension (with int8: LLM.int8, Dettmers et al. 2022). double: the scales in 8 bits (QLoRA, section 3).
    ValueError for anything else, and for a weight that is not finite (`name` says which).
    """
    block = None if block == "row" else block
    _check_spec(scheme, block)
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"{name} is {weight.dtype}; only float32, bfloat16 and float16 weights can be quantized")
    if weight.numel() == 0:
        raise ValueError(f"{name} is empty: shape {tuple(weight.shape)}")
    weight = weight.detach()
    encoded = _encode(weight.reshape(-1), scheme, _block(weight.shape, block))
    if encoded is None:
        bad = (~weight.isfinite()).nonzero()
        raise ValueError(f"{name} holds NaN or infinity: {len(bad)} of {weight.numel()} values, the first at {bad[0].tolist()}")
    packed, absmax = encoded
    return QuantizedTensor(weight.shape, scheme, block, weight.dtype, packed, *(_encode_scales(absmax) if double else (absmax,)))


def _encode_scales(absmax):
    """Double quantization: absmax (n,) float32 -> codes (n,) uint8, their scales (ceil(n / 256),), offset ()."""
    offset = absmax.mean()
    if not bool(offset.isfinite()):
        offset = absmax.double().mean().float()       # the sum was beyond float32
    return *_encode(absmax - offset, "dynamic", NESTED_BLOCK), offset


# -----------------------------------------------------------------------------
# the layer


def _dense(weight, dtype):
    """weight, a Tensor or QuantizedTensor (out, in), as a Tensor of dtype that is good until this thread's next call."""
    if isinstance(weight, torch.Tensor) and weight.dtype == dtype:
        return weight
    if not _plain(weight if isinstance(weight, torch.Tensor) else weight.packed):
        return weight.to(dtype) if isinstance(weight, torch.Tensor) else weight.dequantize(dtype)
    out = _buffer("weight", math.prod(weight.shape), dtype).view(weight.shape)
    return out.copy_(weight) if isinstance(weight, torch.Tensor) else weight.dequantize(out=out)


def _dropped(mask, p, seed):
    """Fills mask, which is contiguous, with what seed stands for: 0 or 1 / (1 - p)."""
    generator = torch.Generator(mask.device).manual_seed(seed)
    return mask.bernoulli_(1 - p, generator=generator).div_(1 - p)


class LoRALinear(torch.autograd.Function):
    """
    QLoRA's linear layer (Dettmers et al. 2023, eq. 5 and 6). W lies in storage and is dequantized when used, twice.

        forward     x' = m * x                       m: dropout's mask over 1 - p, or 1
                    u  = x' A^T                      (N, r)
                    y  = x W^T + b + s u B^T         (N, out)

        backward    v  = g B                         (N, r), g = dL/dy
                    dx = g W + s m * (v A)
                    dA = s v^T x'
                    dB = s g^T u                     u computed again
                    db = sum of g over N             where b is trained (BitFit)

    Saved: x, once (not at all without A and B), the parameters and the stored W. The mask comes back from its seed.
    """

    @staticmethod
    def forward(ctx, x, A, B, bias, s, p, seed, meta, *tensors):
        weight = tensors[0] if meta is None else QuantizedTensor(*meta, *tensors)
        x2 = x.reshape(-1, x.shape[-1])
        W = _dense(weight, x.dtype)
        y = x2 @ W.T if bias is None else torch.addmm(bias.to(x.dtype), x2, W.T)
        if A is not None:
            low = x2 if seed is None else x2 * _dropped(x2.new_empty(x2.shape), p, seed)
            y.addmm_(low @ A.to(x.dtype).T, B.to(x.dtype).T, alpha=s)
        ctx.save_for_backward(x if A is not None and any(ctx.needs_input_grad[1:3]) else None, A, B, *tensors)
        ctx.dtype, ctx.rest = x.dtype, (s, p, seed, meta, None if bias is None else bias.dtype, x.shape)
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        x, A, B, *tensors = ctx.saved_tensors
        s, p, seed, meta, bias_dtype, shape = ctx.rest
        need_x, need_A, need_B, need_bias = ctx.needs_input_grad[:4]
        g = g.reshape(-1, g.shape[-1])
        dx = dA = dB = None
        mask = None if seed is None else _dropped(g.new_empty(len(g), shape[-1]), p, seed)
        if A is not None:
            a, b = A.to(g.dtype), B.to(g.dtype)
            v = g @ b
            if need_A or need_B:
                low = x.reshape(-1, shape[-1]) if mask is None else x.reshape(-1, shape[-1]) * mask
                dA = (v.T @ low).to(A.dtype).mul_(s) if need_A else None
                dB = (g.T @ (low @ a.T)).to(B.dtype).mul_(s) if need_B else None
        if need_x:
            dx = g @ _dense(tensors[0] if meta is None else QuantizedTensor(*meta, *tensors), g.dtype)
            if A is not None and mask is None:
                dx.addmm_(v, a, alpha=s)
            elif A is not None:
                dx.addcmul_(v @ a, mask, value=s)
            dx = dx.view(shape)
        db = g.sum(0, dtype=bias_dtype) if need_bias else None
        return dx, dA, dB, db, None, None, None, None, *(None for _ in tensors)


def lora_linear(x, W, bias, A, B, s, dropout=0.0, training=False):
    """y = x W^T + bias + s (x' A^T) B^T with x' = dropout(x); see LoRALinear. y is of x's type, the compute type.

    x (..., in); W: Tensor or QuantizedTensor (out, in), frozen; bias (out,) or None; A (r, in) and B (out, r), or both None;
    s: float.
    """
    seed = None
    if dropout and training and A is not None:
        if torch.compiler.is_compiling():               # a compiler keeps track of the mask itself
            low = F.linear(F.dropout(x, dropout), A.to(x.dtype))
            return lora_linear(x, W, bias, None, None, s) + s * F.linear(low, B.to(x.dtype))
        seed = 0 if simulating() else int(torch.randint(2**62, ()))            # on the CPU's generator, so that checkpointing restores it
    meta, tensors = (None, (W,)) if isinstance(W, torch.Tensor) else (W.meta, W.tensors().values())
    return LoRALinear.apply(x, A, B, bias, s, dropout, seed, meta, *tensors)


class QuantLinear(nn.Module):
    """A frozen nn.Linear in storage: its quantized tensors are buffers, so they move, save and broadcast with the model."""

    def __init__(self, q, bias=None, compute_dtype=None):
        super().__init__()
        self.out_features, self.in_features = q.shape
        self.meta, self.names = q.meta, tuple(q.tensors())
        self.compute_dtype = compute_dtype
        for name, tensor in q.tensors().items():
            self.register_buffer(name, tensor)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @classmethod
    def from_quantized(cls, q, bias=None, compute_dtype=None):
        """q: QuantizedTensor (out, in); compute_dtype: None for the type of the input."""
        return cls(q, bias, compute_dtype)

    @classmethod
    def from_linear(cls, linear, scheme, block=64, double=False, name="weight", compute_dtype=None):
        """An nn.Linear in storage; name is told where its weight is refused."""
        return cls(quantize(linear.weight, scheme, block, double, name), linear.bias, compute_dtype)

    @property
    def weight_q(self):
        """The weight, (out, in), as a QuantizedTensor on the layer's own memory."""
        return QuantizedTensor(*self.meta, *(getattr(self, name) for name in self.names))

    def fill(self, q):
        """Takes over the content of q, a QuantizedTensor of the same shape and storage."""
        for name, tensor in q.tensors().items():
            setattr(self, name, tensor)

    def make_parameters(self):
        """Makes frozen parameters of the stored tensors, because FSDP divides parameters alone; not of `offset`, one number."""
        for name in self.names:
            if (tensor := getattr(self, name)).dim():
                delattr(self, name)
                self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))

    def dequantize(self, dtype=None):
        """The weight, (out, in), in dtype."""
        return self.weight_q.dequantize(dtype)

    def forward(self, x):
        return lora_linear(x.to(self.compute_dtype or x.dtype), self.weight_q, self.bias, None, None, 0.0)

    def _apply(self, fn, recurse=True):
        """model.bfloat16() must move the scales but not round them."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            if self._buffers[name].dtype != old.dtype:
                self._buffers[name] = old.to(self._buffers[name].device)
        return self

    def extra_repr(self):
        q = self.weight_q
        return f"{self.in_features}, {self.out_features}, {q.scheme}, block={q.block or 'row'}, double={q.double}, bias={self.bias is not None}"


@dataclass(frozen=True)
class Storage:
    """How a base's linear layers are stored. skip: layers that stay as they are, by their last names or in full."""
    scheme: str
    block: int | None = 64        # weights that share a scale; None: a row
    double: bool = False          # the scales in 8 bits
    skip: tuple = ()

    def __post_init__(self):
        _check_spec(self.scheme, self.block)

    def quantize(self, weight, name="weight"):
        """The weight in this storage, as a QuantizedTensor."""
        return quantize(weight, self.scheme, self.block, self.double, name)

    def empty_like(self, weight):
        """A QuantizedTensor of the weight's shape with nothing in it yet."""
        return QuantizedTensor.empty(weight.shape, self.scheme, self.block, self.double, weight.dtype, weight.device)


LINEAR_LAYERS = ("q", "k", "v", "out", "up", "gate", "down")     # those of a block, as model.py names them


def layers_to_store(model, storage):
    """Names of the linear layers that storage is for. ValueError where a name in skip means nothing, or nothing is left."""
    layers = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and name.split(".")[-1] in LINEAR_LAYERS]
    there = ", ".join(dict.fromkeys(name.split(".")[-1] for name in layers))
    if not layers:
        raise ValueError(f"no linear layer matched {', '.join(LINEAR_LAYERS)}")
    for skipped in storage.skip:                                                                            # fault 33
        if not any(skipped in (name, name.split(".")[-1]) for name in layers):
            raise ValueError(f"quant_skip: no linear layer {skipped!r}; there are {there}")
    chosen = [name for name in layers if not {name, name.split(".")[-1]} & set(storage.skip)]
    if not chosen:                                                                                          # fault 33
        raise ValueError("quant_skip leaves no layer to quantize")
    return chosen


def store(model, storage, empty=False):
    """
    Puts the linear layers of the blocks into storage, in place and one at a time: each becomes a QuantLinear. With empty the
    stored tensors have their shapes and no content yet. Returns (layers stored, linear layers there were).
    """
    total = sum(isinstance(m, nn.Linear) for m in model.modules())
    chosen = layers_to_store(model, storage)
    for name in chosen:
        parent_name, _, leaf = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        linear = getattr(parent, leaf)
        quantized = storage.empty_like(linear.weight) if empty else storage.quantize(linear.weight, f"{name}.weight")
        setattr(parent, leaf, QuantLinear(quantized, linear.bias))
    forget()
    return len(chosen), total


# -----------------------------------------------------------------------------
# python quant.py


def example():
    """The slide's example, step by step."""
    w, absmax = 0.42, 1.0
    levels = _levels("linear4")
    q = quantize(torch.tensor([w, absmax]), "linear4", 16)
    code, value = int(q.packed[0] >> 4), float(q.dequantize()[0])
    yield "The slide's example: w = 0.42 in a block whose largest magnitude is 1.0, sixteen evenly spaced levels"
    yield f"  normalize    {w} / {absmax} = {w / absmax}"
    yield f"  quantize     nearest of {' '.join(f'{v:.2f}' for v in levels.tolist())}"
    yield f"               is {levels[code]:.4f}: code {code} counted from zero (the slide's 12 counts from one)"
    yield f"  dequantize   {levels[code]:.4f} * {absmax} = {value:.4f}"
    yield f"  error        {value:.4f} - {w} = {value - w:.4f} (the slide, from rounded levels: 0.04)"


def codebooks():
    """The levels side by side."""
    yield "code " + " ".join(f"{scheme:>9}" for scheme in LEVELS)
    for i, levels in enumerate(zip(*LEVELS.values())):
        yield f"{i:4} " + " ".join(f"{v:9.4f}" for v in levels)


def errors(blocks=(32, 64, 128, 256, 1024, 4096), n=2**22):
    """Mean absolute and root mean square error for weights from N(0, 1), by block size."""
    x = torch.randn(n, generator=torch.Generator().manual_seed(0))
    yield "block  " + "".join(f"{scheme:>18}" for scheme in SCHEMES) + f"{'nf4, double':>18}"
    for block in blocks:
        deltas = [(quantize(x, scheme, block, double).dequantize() - x).double() for scheme, double in [(s, False) for s in SCHEMES] + [("nf4", True)]]
        yield f"{block:5}  " + "".join(f"{d.abs().mean():9.5f} {d.square().mean().sqrt():8.5f}" for d in deltas)


if __name__ == "__main__":
    for part in (example(), codebooks(), ["Mean absolute and root mean square error, weights from N(0, 1), in units of the deviation"], errors()):
        print(*part, sep="\n", end="\n\n" if not isinstance(part, list) else "\n")
