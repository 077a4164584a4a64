"""
The lecture's chapter on quantization: the codes (CODES: NF4, NF3, FP4, int4, int8 and sixteen evenly spaced levels); their packing;
double quantization; the linear layer in storage; and QLoRA's autograd Function. All of it is plain torch, on any device; on a GPU
one Triton kernel dequantizes, where Triton is there.

    python quant.py                                       # the slide's example, the codes, the error table
    python -m pytest -q tests/test_quant.py               # bit for bit with bitsandbytes where it is installed

    q = quantize(weight, "nf4", block=64, double=True)    # QuantizedTensor
    w = q.dequantize(torch.bfloat16)                      # Tensor of the weight's shape
    n_stored, n_linear = store(model, Storage("nf4"))     # in place

Every code here is used for absmax quantization: a block of weights is divided by its largest magnitude, and each quotient
becomes the code of the nearest level. What is stored is the codes and, once a block, the magnitude.
"""

import difflib
import functools
import math
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from typing import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F

from lib.kernels import device_type, linear, representatives, seeded_generator, simulating

# -----------------------------------------------------------------------------
# codes


@dataclass(frozen=True)
class Code:
    """A finite set of levels: the code k of a weight stands for levels[k] times the largest magnitude of its block."""
    levels: tuple               # they need no order; most lie in [-1, 1]
    bits: int                   # of a stored code, 1 .. 8
    signed: bool = False        # the integers -n .. n are stored, as int8; they stand for k / n

    @property
    def top(self):
        """What the largest magnitude of a block becomes before it is rounded: n of a signed code, else 1."""
        return len(self.levels) // 2 if self.signed else 1

    @property
    def dtype(self):
        """The type of what is stored."""
        return torch.int8 if self.signed else torch.uint8

    @functools.cached_property
    def order(self):
        """The codes from the lowest level to the highest."""
        return sorted(range(len(self.levels)), key=self.levels.__getitem__)

    @property
    def pad(self):
        """The code of the middle level, which fills up the last bytes."""
        return self.order[(len(self.levels) - 1) // 2]


# Quantiles of the normal distribution with an exact zero (QLoRA, Dettmers et al. 2023, appendix E), as
# bitsandbytes stores them.
NF4 = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
       -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
       0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
       0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)

# bitsandbytes' FP4 consists of a sign, two bits of exponent and one of mantissa, over 12. The codes are the
# bit patterns, which do not follow the order of the levels. Zero is there twice: 0 < y <= 0.0026 becomes 8.
FP4 = tuple(level / 12 for level in (0, 0.0625, 8, 12, 4, 6, 2, 3))

# NF3 is built like NF4, for three bits: with n = 4, last = 1 - (1 / 4n + 1 / (4n - 2)) / 2 and Q the quantile
# function of the normal distribution, its levels are Q(1/2 + (last - 1/2) k / n) for k = 1 .. n, zero, and
# -Q(1/2 + (last - 1/2) k / (n - 1)) for k = 1 .. n - 1, all over Q(last).
NF3 = (-1.0, -0.5350227355957031, -0.24693143367767334, 0.0,
       0.1833374798297882, 0.38199394941329956, 0.6229857206344604, 1.0)

# linear4 is the slide's sixteen evenly spaced levels. int4 divides by 7, so that absmax and zero are exact;
# -8 / 7 is therefore never the nearest level. int8 is that of LLM.int8 (Dettmers et al. 2022).
CODES = {
    "nf4": Code(NF4, bits=4),
    "linear4": Code(tuple(-1 + 2 * k / 15 for k in range(16)), bits=4),
    "int4": Code(tuple(k / 7 for k in range(-8, 8)), bits=4),
    "int8": Code(tuple(k / 127 for k in range(-127, 128)), bits=8, signed=True),
    "nf3": Code(NF3, bits=3),
    "fp4": Code((*FP4, *(-level for level in FP4)), bits=4),
}


def dynamic_levels(signed=True):
    """
    The 256 levels of bitsandbytes' 8-bit "dynamic" type (Dettmers 2016), in which double quantization stores the scales: a
    sign, a decimal exponent and a linear fraction, which has a bit more where there is no sign.
    """
    positive = []
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (i if signed else i + 1) + 1)
        middles = (edges[:-1] + edges[1:]) / 2
        positive += (10.0 ** (i - 6) * middles).tolist()
    negative = [-level for level in positive] if signed else []
    return tuple(sorted([*negative, 0.0, *positive, 1.0]))


DYNAMIC = Code(dynamic_levels(), bits=8)
UNSIGNED = Code(dynamic_levels(signed=False), bits=8)
NESTED_BLOCK = 256                                # scales that share a scale in double quantization
BLOCKS = tuple(2**i for i in range(4, 13))        # how many weights may share a scale; a whole row may, too


# -----------------------------------------------------------------------------
# constant tables of a code


@functools.cache
def _kept_table(make, code, device):
    return make(code).to(device)


def _table(make, code, device):
    """make(code) on the device. It is made once; in traced code it becomes a constant."""
    if torch.compiler.is_compiling():
        return make(code).to(device)
    return _kept_table(make, code, device)


@contextmanager
def fresh_tables():
    """Within it the tables are made anew, so that a simulation counts its own, and none of them is left afterwards (memory.py)."""
    _kept_table.cache_clear()
    try:
        yield
    finally:
        _kept_table.cache_clear()


def _levels(code):
    return torch.tensor(code.levels, device="cpu")


def _order(code):
    return torch.tensor(code.order, dtype=torch.uint8, device="cpu")


def _boundaries(code):
    """Halfway between neighbouring levels, from the lowest to the highest."""
    levels = _levels(code).sort().values
    return (levels[:-1] + levels[1:]) / 2


# -----------------------------------------------------------------------------
# packing

# The first code takes the highest bits. Codes are packed in groups that fill whole bytes; here each bit shows
# the number of the code that it belongs to:
#
#   bits   bytes of a group              codes of a group
#   8      00000000                      1
#   4      00001111                      2
#   3      00011122 23334445 55666777    8


def packed_length(n, bits):
    """How many bytes n codes take; the last group is filled up."""
    group_bits = math.lcm(bits, 8)
    n_groups = -(-n * bits // group_bits)
    return n_groups * group_bits // 8


def pack(codes, bits, pad):
    """codes (n,) uint8, each below 2**bits -> (packed_length,) uint8. The code pad fills up the last group."""
    missing = -len(codes) % (math.lcm(bits, 8) // bits)
    return _regroup(F.pad(codes, (0, missing), value=pad) if missing else codes, bits, 8)


def unpack(packed, bits, n):
    """The inverse of pack: packed (packed_length,) uint8 -> codes (n,) uint8."""
    return _regroup(packed, 8, bits)[:n]


def _regroup(numbers, bits, new_bits):
    """uint8 numbers of `bits` bits each -> the same bits in the same order as uint8 numbers of `new_bits` bits each."""
    group_bits = math.lcm(bits, new_bits)
    columns = numbers.view(-1, group_bits // bits)
    if group_bits > 8:
        columns = columns.long()
    group, *others = columns.unbind(1)
    for column in others:
        group = torch.add(column, group, alpha=2**bits)
    if group_bits == new_bits:
        return group
    shifts = range(group_bits - new_bits, -1, -new_bits)
    parts = [group >> shift & 2**new_bits - 1 for shift in shifts]
    return torch.stack(parts, 1).view(-1).to(torch.uint8)


# -----------------------------------------------------------------------------
# quantize: weights -> codes and the largest magnitude of each block

# A chunk of the weight is worked on at a time, so that no intermediate result is as large as the weight, and
# so that on a CPU it stays in the cache.


def _chunk_length(tensor, block):
    """How many weights make a chunk: whole blocks, and whole bytes of any code."""
    unit = math.lcm(block, 8)
    length = 2**19 if device_type(tensor) == "cpu" else 2**25
    return max(length // unit, 1) * unit


def _chunks(x, block):
    """x (n,) in chunks of whole blocks, (rows, block), and one of a partial last block, (1, n % block)."""
    whole = len(x) // block * block
    blocks = x[:whole].view(-1, block)
    chunks = list(blocks.split(_chunk_length(x, block) // block)) if whole else []
    if whole < len(x):                                                          # fault 32
        chunks.append(x[whole:].view(1, -1))
    return chunks


def _normalize(x, absmax, top):
    """x (rows, block) float32 times top / absmax (rows,), in [-top, top]."""
    scale = top / absmax
    y = x * scale[:, None]
    tiny = scale.isinf()                               # rows of zeros, and of denormal numbers
    if bool(tiny.any()):                                                        # fault 31
        lift = 2.0**100                                # an exact power of two
        lifted = absmax[tiny] * lift
        scale = torch.where(lifted == 0, 0, top / lifted)
        y[tiny] = x[tiny] * lift * scale[:, None]
    return y.clamp_(-top, top)


def _nearest(y, code):
    """
    y (n,) float32 in [-1, 1] -> (n,) uint8, the code of the nearest level, of two equally near the lower one. Of a signed
    code: y in [-top, top] -> int8, of two equally near the even one.

    The number of boundaries below y says which level it is, counted from the lowest. On a CPU the cell of y says how many
    lie below the cell, and one comparison is left. 4096 x 4096 on 2 cores takes 36 ms in all; torch.bucketize alone 190,
    fifteen comparisons 95.
    """
    if code.signed:
        return y.round_().to(torch.int8)
    cells = _cells(code) if device_type(y) == "cpu" else None
    if cells is None:
        boundaries = _table(_boundaries, code, y.device)
        number = torch.bucketize(y, boundaries, out_int32=True).to(torch.uint8)
    else:
        per_unit, boundary, below = cells
        cell = _cell(y, per_unit)
        above = y > _lookup(boundary, cell)
        number = _lookup(below, cell).add_(above.view(torch.uint8))
    if code.order == sorted(code.order):
        return number
    return _table(_order, code, y.device)[number.int()]


def _cell(y, per_unit):
    """The cell of each y: number 0 begins at -1, and each is 1 / per_unit wide. It never falls as y rises."""
    return (y * per_unit).add_(per_unit).int().long()                           # (to int64 at once is slower)


@functools.cache
def _cells(code):
    """
    The widest cells, of a power of two, none of which holds two boundaries: how many make 1.0; the boundary in each,
    infinity where there is none; how many boundaries lie in the cells before it. None where the tables would be large.
    """
    boundaries = _boundaries(code)
    for per_unit in (2**i for i in range(13)):
        last = 2 * per_unit
        cells = _cell(boundaries, per_unit).clamp_(0, last)                 # a boundary of int4 lies below -1
        if bool((cells.diff() > 0).all()):
            boundary = torch.full((last + 1,), math.inf)
            boundary[cells] = boundaries
            below = torch.bucketize(torch.arange(last + 1), cells)
            return per_unit, boundary, below.to(torch.uint8)
    return None


def _lookup(table, index):
    """table[index], both flat. gather shares its rows among the cores; index_select on a flat table keeps to one."""
    rows = 16 if len(index) % 16 == 0 else 1
    found = table.expand(rows, -1).gather(1, index.view(rows, -1))
    return found.view(-1)


def _encode(x, code, block):
    """x (n,) of any floating type -> (packed codes, absmax (ceil(n / block),) float32); None where x is not finite."""
    packed, scales = [], []
    for rows in _chunks(x, block):
        rows = rows.float()
        absmax = rows.abs().amax(1)
        if not bool(absmax.isfinite().all()):
            return None
        if rows.size(1) < block and not code.signed:
            # As bitsandbytes, which multiplies by the inverse in whole blocks alone; the last bit may differ.
            y = rows / torch.where(absmax == 0, 1, absmax)
        else:
            y = _normalize(rows, absmax, code.top)
        codes = _nearest(y.view(-1), code)
        packed.append(pack(codes, code.bits, code.pad))
        scales.append(absmax)
    return torch.cat(packed), torch.cat(scales)


# -----------------------------------------------------------------------------
# dequantize: codes and scales -> weights

# 4096 x 4096 NF4 to bfloat16 on 2 cores, into memory that is kept, takes 6.5 ms by a table of the 256 bytes,
# whose entry is two float32 levels read as one 64-bit word. levels[unpack(packed)] took 30 ms; a table of all
# pairs of bytes, which leaves the nearest cache, no less than 6.5; torch.compile 50 to 60 ms, after 20 s of
# compiling. The levels stay float32 because the product with absmax is rounded once.


def _decode(packed, scales, code, n, block):
    """packed codes, scales (ceil(n / block),) float32 -> weights (n,) float32."""
    values = _values(packed, code, n)
    if n % block:                                                               # fault 32
        values = F.pad(values, (0, -n % block))
    blocks = values.view(-1, block)
    blocks.mul_(scales[:, None])
    return blocks.view(-1)[:n]


def _values(packed, code, n):
    """The levels of n packed codes, (n,) float32."""
    on_cpu = device_type(packed) == "cpu"
    if on_cpu and code.signed:
        return packed.float().div_(code.top)
    if on_cpu and code.bits in (4, 8):
        of_bytes = _table(_pairs if code.bits == 4 else _levels, code, packed.device)
        return _lookup(of_bytes, packed.long()).view(torch.float32)[:n]
    levels = _table(_levels, code, packed.device)
    if code.signed:                    # A GPU divides by a number as it multiplies with its rounded inverse.
        return levels[packed.int() + code.top]
    return levels[unpack(packed, code.bits, n).int()]


def _pairs(code):
    """(256,) int64: the two float32 levels of each byte."""
    levels = F.pad(_levels(code), (0, 16 - len(code.levels)))           # a code may have fewer than sixteen
    return torch.cartesian_prod(levels, levels).view(torch.int64).view(-1)


def _fill(packed, scales, out, code, block):
    """Fills out (n,), of any floating type, with the weights; no intermediate result is much larger than a chunk."""
    length = _chunk_length(out, block)
    if len(out) <= length:                            # Splitting would take a fifth of a small layer's time.
        out.copy_(_decode(packed, scales, code, len(out), block))
        return
    packed_chunks = packed.split(length * code.bits // 8)
    scale_chunks = scales.split(length // block)
    chunks = tuple(zip(packed_chunks, scale_chunks, out.split(length)))
    for packed_chunk, scale_chunk, part in representatives(chunks):
        part.copy_(_decode(packed_chunk, scale_chunk, code, len(part), block))


@functools.cache
def _kernel():
    """
    The Triton kernel that makes a whole weight of what is stored, double quantization included. It computes each number of
    out on its own.
    """
    import triton
    import triton.language as tl

    @triton.jit
    def fill(packed, absmax, absmax2, offset, levels, levels2, out, n, bits: tl.constexpr,
             zero: tl.constexpr, block: tl.constexpr, block2: tl.constexpr, width: tl.constexpr):
        i = tl.program_id(0) * width + tl.arange(0, width)
        inside = i < n
        if 8 % bits == 0:
            per_byte: tl.constexpr = 8 // bits
            byte = tl.load(packed + i // per_byte, mask=inside, other=0).to(tl.int32) + zero
            code = (byte >> (8 - bits - i % per_byte * bits)) & (2**bits - 1)
        else:                                                    # Eight codes begin at a byte.
            bit = i % 8 * bits
            place = packed + i // 8 * bits + bit // 8
            bit = bit % 8
            word = tl.load(place, mask=inside, other=0).to(tl.int32) << 8
            word |= tl.load(place + 1, mask=inside & (bit + bits > 8), other=0).to(tl.int32)
            code = (word >> (16 - bits - bit)) & (2**bits - 1)
        j = i // block
        if block2:
            code2 = tl.load(absmax + j, mask=inside, other=0).to(tl.int32)
            scale2 = tl.load(absmax2 + j // block2, mask=inside, other=0.0)
            scale = tl.load(levels2 + code2) * scale2 + tl.load(offset)
        else:
            scale = tl.load(absmax + j, mask=inside, other=0.0)
        tl.store(out + i, tl.load(levels + code) * scale, mask=inside)

    return fill


_kernel_fails = False


def _fill_by_kernel(q, out, width=4096):
    """
    Tries to fill out (n,) with the weight that q stores; returns whether it did. The first failure, such as a missing C compiler,
    is told once, and the kernel is not tried again.
    """
    global _kernel_fails
    n = len(out)
    if _kernel_fails or n > 2**31 - width:                       # Its indices are of 32 bits.
        return False
    code = CODES[q.scheme]
    levels, levels2 = (_table(_levels, kind, out.device) for kind in (code, DYNAMIC))
    scales = (q.absmax, q.absmax2, q.offset) if q.double else (q.absmax,) * 3    # of which it reads the first
    tensors = q.packed, *scales, levels, levels2, out
    zero = code.top if code.signed else 0
    numbers = n, code.bits, zero, q.weights_per_scale, NESTED_BLOCK if q.double else 0, width
    try:
        with torch.cuda.device_of(out):
            # Product and sum are rounded one after the other, as everywhere.
            _kernel()[-(-n // width),](*tensors, *numbers, enable_fp_fusion=False)
    except Exception as error:      # Triton is missing, or lacks a compiler: errors without a common type
        _kernel_fails = True
        reason = str(error).strip().partition("\n")[0]
        print(f"dequantization has no kernel of its own here and takes longer: {reason}", file=sys.stderr)
    return not _kernel_fails


# -----------------------------------------------------------------------------
# numbers that change in storage: an optimizer's moments, a byte each


def to_bytes(x, code):
    """
    x (n,) float32, finite -> codes (n,) uint8 of DYNAMIC or UNSIGNED, and the largest magnitude of each NESTED_BLOCK, (ceil(n /
    NESTED_BLOCK),) float32. Nothing here waits for a GPU. In UNSIGNED what is not zero does not become zero, because the
    optimizer divides by it.
    """
    blocks = _filled_up(x)
    absmax = blocks.abs().amax(1)
    divisor = torch.where(absmax == 0, 1, absmax)
    y = blocks / divisor[:, None]
    boundaries = _table(_boundaries, code, x.device)
    codes = torch.bucketize(y, boundaries, out_int32=True).to(torch.uint8)
    if code is UNSIGNED:
        lost = (codes == 0) & (blocks > 0)
        codes.masked_fill_(lost, 1)
    return codes.view(-1)[:len(x)], absmax


def from_bytes(codes, absmax, code):
    """The inverse of to_bytes, (n,) float32."""
    levels = _table(_levels, code, codes.device)
    blocks = _filled_up(levels[codes.int()])
    values = blocks * absmax[:, None]
    return values.view(-1)[:len(codes)]


def _filled_up(x):
    """x (n,) -> (ceil(n / NESTED_BLOCK), NESTED_BLOCK), with zeros at the end."""
    missing = -len(x) % NESTED_BLOCK
    return F.pad(x, (0, missing)).view(-1, NESTED_BLOCK)


# -----------------------------------------------------------------------------
# the stored weight


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """
    A weight in storage. Made by `quantize`; immutable: do not write into its tensors.

        packed    (packed_length(n, bits),) uint8, or int8 where the code is signed
        absmax    (n_blocks,) float32; with double quantization uint8, codes of DYNAMIC, and there are also
        absmax2   (ceil(n_blocks / 256),) float32, the scales of the scales
        offset    () float32, the mean that was taken off
    """
    shape: torch.Size
    scheme: str
    block: int | None             # None: per row
    dtype: torch.dtype            # of the weight it came from
    packed: torch.Tensor
    absmax: torch.Tensor
    absmax2: torch.Tensor | None = None
    offset: torch.Tensor | None = None

    def __post_init__(self):
        lengths = _lengths(self.shape, self.scheme, self.block)
        for name, tensor in self.tensors().items():
            if tensor.numel() != lengths[name]:                                 # fault 34
                raise ValueError(f"{name} holds {tensor.numel()} values; "
                                 f"{self.scheme} of shape {tuple(self.shape)} needs {lengths[name]}")

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
        return sum(t.nbytes for t in self.tensors().values())

    @property
    def meta(self):
        """(shape, scheme, block, dtype): what is not a tensor."""
        return self.shape, self.scheme, self.block, self.dtype

    def numel(self):
        """Number of weights, not of bytes."""
        return math.prod(self.shape)

    def tensors(self):
        """name -> tensor, of those there are."""
        there = {"packed": self.packed, "absmax": self.absmax, "absmax2": self.absmax2, "offset": self.offset}
        return {name: tensor for name, tensor in there.items() if tensor is not None}

    def to(self, device):
        """The same on another device."""
        moved = (tensor.to(device) for tensor in self.tensors().values())
        return QuantizedTensor(*self.meta, *moved)

    def scales(self):
        """The absmax of each block, (n_blocks,) float32, double quantization undone."""
        if not self.double:
            return self.absmax
        scales = _decode(self.absmax, self.absmax2, DYNAMIC, len(self.absmax), NESTED_BLOCK)
        return scales.add_(self.offset)

    def dequantize(self, dtype=None, out=None):
        """
        float32 level times float32 absmax, then one rounding to dtype (default: the weight's own). Returns a Tensor of `shape`.
        out: a contiguous Tensor of `shape` to fill, whose dtype then counts.
        """
        if torch.compiler.is_compiling():
            stored = self.packed, self.absmax, self.absmax2, self.offset
            return stored_weight(*stored, list(self.shape), self.scheme, self.block, dtype or self.dtype)
        if out is None:
            out = self.packed.new_empty(self.shape, dtype=dtype or self.dtype)
        flat = out.view(-1)                                      # An error where it is not contiguous.
        filled = False
        if device_type(out) == "cuda":
            filled = simulating() or _fill_by_kernel(self, flat)               # It needs no memory but out.
        if not filled:
            _fill(self.packed, self.scales(), flat, CODES[self.scheme], self.weights_per_scale)
        return out


def _block(shape, block):
    return block or (shape[-1] if len(shape) else 1)


def _lengths(shape, scheme, block):
    """name -> number of values of each tensor that stores a weight of that shape."""
    n = math.prod(shape)
    n_blocks = -(-n // _block(shape, block))
    n_bytes = packed_length(n, CODES[scheme].bits)
    n_nested = -(-n_blocks // NESTED_BLOCK)
    return {"packed": n_bytes, "absmax": n_blocks, "absmax2": n_nested, "offset": 1}


def _check(scheme, block):
    """ValueError unless there is such a code, and such a block or None for a row."""
    if scheme not in CODES:
        near = difflib.get_close_matches(str(scheme), CODES) or CODES
        raise ValueError(f"unknown scheme {scheme!r}; nearest: {', '.join(near)}")
    if block is not None and (type(block) is not int or block not in BLOCKS):       # fault 33
        raise ValueError(f"block is {block!r}; it must be a power of two from 16 to 4096, or 'row'")


def quantize(weight, scheme, block=64, double=False, name="weight"):
    """
    Tensor of any shape, float32, bfloat16 or float16 -> QuantizedTensor.

    scheme: a name of CODES. block: 16 .. 4096, elements in row-major order that share a scale; None or "row": the last
    dimension (with int8: LLM.int8, Dettmers et al. 2022). double: the scales in 8 bits (QLoRA, section 3).
    ValueError for anything else, and for a weight that is not finite (`name` says which).
    """
    block = None if block == "row" else block
    _check(scheme, block)
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"{name} is {weight.dtype}; only float32, bfloat16 and float16 weights can be quantized")
    if weight.numel() == 0:
        raise ValueError(f"{name} is empty: shape {tuple(weight.shape)}")
    encoded = _encode(weight.detach().reshape(-1), CODES[scheme], _block(weight.shape, block))
    if encoded is None:
        bad = (~weight.isfinite()).nonzero()
        raise ValueError(f"{name} holds NaN or infinity: {len(bad)} of {weight.numel()} values, "
                         f"the first at {bad[0].tolist()}")
    packed, absmax = encoded
    scales = _encode_scales(absmax) if double else (absmax,)
    return QuantizedTensor(weight.shape, scheme, block, weight.dtype, packed, *scales)


def _encode_scales(absmax):
    """Double quantization: absmax (n,) float32 -> codes (n,) uint8, their scales (ceil(n / 256),), offset ()."""
    host = absmax.cpu()                                # A GPU adds in another order: the bits would differ.
    offset = host.mean()
    if not bool(offset.isfinite()):
        offset = host.double().mean().float()          # the sum was beyond float32
    offset = offset.to(absmax.device)
    return *_encode(absmax - offset, DYNAMIC, NESTED_BLOCK), offset


# -----------------------------------------------------------------------------
# QLoRA's linear layer


class LoRALinear(torch.autograd.Function):
    """
    QLoRA's linear layer (Dettmers et al. 2023, eq. 5 and 6). W lies in storage and is dequantized when used, twice.

        forward     x' = m * x                       m: dropout's mask over 1 - p, or 1
                    u  = x' A^T                      (N, r)
                    y  = x W^T + b + s u B^T         (N, out)

        backward    v  = g B                         (N, r), g = dL/dy
                    dA = s v^T x'
                    dB = s g^T u                     u computed again
                    dx = g W + s m * (v A)
                    db = sum of g over N             where b is trained (BitFit)

    Saved: x, once (not at all where neither A nor B is trained), the parameters and the stored W. The mask comes back from
    its seed. meta: None where stored is W itself, else QuantizedTensor.meta of the stored tensors.
    """

    @staticmethod
    def forward(ctx, x, A, B, bias, s, p, seed, meta, *stored):
        trained = any(ctx.needs_input_grad[1:3])
        ctx.save_for_backward(x if trained else None, A, B, bias, *stored)
        ctx.settings = s, p, seed, meta
        rows = x.reshape(-1, x.shape[-1])                                       # (N, in)
        b = None if bias is None else bias.to(x.dtype)
        y = linear(rows, _dense(meta, stored, x.dtype), b)
        if A is not None:
            mask = _dropout_mask(rows, rows.shape[1], p, seed)
            u = linear(_times(rows, mask), A.to(x.dtype))
            y.addmm_(u, B.to(x.dtype).T, alpha=s)
        return y.view(*x.shape[:-1], y.shape[1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        x, A, B, bias, *stored = ctx.saved_tensors
        s, p, seed, meta = ctx.settings
        *leading, d_out = g.shape
        g = g.reshape(-1, d_out)                                                # (N, out)
        dx = dA = dB = db = None
        if A is not None:
            a = A.to(g.dtype)
            v = linear(g, B.to(g.dtype).T.contiguous())
            mask = _dropout_mask(g, A.shape[1], p, seed)
        if x is not None:
            masked = _times(x.reshape(-1, x.shape[-1]), mask)                   # x'
            u = linear(masked, a)
            dA = (v.T @ masked).to(A.dtype).mul_(s)
            dB = (u.T @ g).T.to(B.dtype).mul_(s)               # (g^T u takes up to six times as long.)
        if ctx.needs_input_grad[0]:
            dx = linear(g, _dense(meta, stored, g.dtype).T)
            if A is not None:
                _add_low_rank(dx, v, a, mask, s)
            dx = dx.view(*leading, dx.shape[1])
        if ctx.needs_input_grad[3]:
            db = g.sum(0, dtype=bias.dtype)
        return dx, dA, dB, db, *[None] * (4 + len(stored))


def _dense(meta, stored, dtype):
    """W (out, in) in dtype."""
    if meta is None:
        return stored[0].to(dtype)
    return QuantizedTensor(*meta, *stored).dequantize(dtype)


def _dropout_mask(rows, width, p, seed):
    """m (N, width) for rows (N, ..), drawn from the seed: 0 with probability p, else 1 / (1 - p). None without a seed."""
    if seed is None:
        return None
    generator = seeded_generator(rows.device, seed)
    mask = rows.new_empty(len(rows), width)
    return mask.bernoulli_(1 - p, generator=generator).div_(1 - p)


def _times(x, mask):
    return x if mask is None else x * mask


def _add_low_rank(dx, v, A, mask, s):
    """dx += s m * (v A)"""
    if mask is None:
        dx.addmm_(v, A, alpha=s)
    else:
        dx.addcmul_(v @ A, mask, value=s)


def lora_linear(x, W, bias, A, B, s, dropout=0.0, training=False):
    """
    y = x W^T + bias + s (x' A^T) B^T with x' = dropout(x); see LoRALinear. y is of x's type, the compute type.

    x (..., in); W: Tensor or QuantizedTensor (out, in), frozen; bias (out,) or None; A (r, in) and B (out, r), or both None;
    s: float.
    """
    if torch.compiler.is_compiling():
        return traced_lora_linear(x, W, bias, A, B, s, dropout if training else 0.0)
    seed = None
    if dropout and training and A is not None:
        # The seed is drawn from the CPU's generator, so that checkpointing restores it.
        seed = 0 if simulating() else int(torch.randint(2**62, ()))
    if isinstance(W, torch.Tensor):
        return LoRALinear.apply(x, A, B, bias, s, dropout, seed, None, W)
    return LoRALinear.apply(x, A, B, bias, s, dropout, seed, W.meta, *W.tensors().values())


# -----------------------------------------------------------------------------
# the same for a compiler, which differentiates and fuses plain operations itself; what it cannot look into
# is an operator: the product with a stored weight, whose tables it would trace, and the mask of a seed


def traced_lora_linear(x, W, bias, A, B, s, dropout):
    """lora_linear in traced code, with the same dropout masks."""
    if isinstance(W, torch.Tensor):
        y = F.linear(x, W.to(x.dtype))
    else:
        stored = W.packed, W.absmax, W.absmax2, W.offset
        y = stored_product(x, *stored, list(W.shape), W.scheme, W.block)
    if A is not None:
        if dropout:
            seed = torch.randint(2**62, (), device="cpu")
            rows = math.prod(x.shape[:-1])
            x = x * seeded_mask(seed, rows, x.shape[-1], dropout, x.dtype, x.device).view(x.shape)
        y = y + s * F.linear(F.linear(x, A.to(x.dtype)), B.to(x.dtype))
    return y if bias is None else y + bias.to(y.dtype)


@torch.library.custom_op("nanopeft::seeded_mask", mutates_args=())
def seeded_mask(seed: torch.Tensor, rows: int, width: int, p: float, dtype: torch.dtype,
                device: torch.device) -> torch.Tensor:
    """The dropout mask (rows, width) of a seed, () int64."""
    return _dropout_mask(torch.empty(rows, 0, dtype=dtype, device=device), width, p, int(seed))


@seeded_mask.register_fake
def _(seed, rows, width, p, dtype, device):
    return torch.empty(rows, width, dtype=dtype, device=device)


@torch.library.custom_op("nanopeft::stored_weight", mutates_args=())
def stored_weight(packed: torch.Tensor, absmax: torch.Tensor, absmax2: torch.Tensor | None,
                  offset: torch.Tensor | None, shape: Sequence[int], scheme: str, block: int | None,
                  dtype: torch.dtype) -> torch.Tensor:
    """The weight of a QuantizedTensor's parts, in dtype."""
    q = QuantizedTensor(torch.Size(shape), scheme, block, dtype, packed, absmax, absmax2, offset)
    return q.dequantize(dtype)


@stored_weight.register_fake
def _(packed, absmax, absmax2, offset, shape, scheme, block, dtype):
    return packed.new_empty(shape, dtype=dtype)


@torch.library.custom_op("nanopeft::stored_product", mutates_args=())
def stored_product(x: torch.Tensor, packed: torch.Tensor, absmax: torch.Tensor, absmax2: torch.Tensor | None,
                   offset: torch.Tensor | None, shape: Sequence[int], scheme: str,
                   block: int | None) -> torch.Tensor:
    """x W^T, where W is stored_weight of the rest. x (.., in) -> (.., out). The backward pass needs what is stored alone."""
    return linear(x, stored_weight(packed, absmax, absmax2, offset, shape, scheme, block, x.dtype))


@stored_product.register_fake
def _(x, packed, absmax, absmax2, offset, shape, scheme, block):
    return x.new_empty(*x.shape[:-1], shape[0])


def _save_stored(ctx, inputs, output):
    _, *stored, shape, scheme, block = inputs
    ctx.save_for_backward(*stored)
    ctx.meta = shape, scheme, block


def _times_stored(ctx, g):
    return linear(g, stored_weight(*ctx.saved_tensors, *ctx.meta, g.dtype).T), *[None] * 7


stored_product.register_autograd(_times_stored, setup_context=_save_stored)


class QuantLinear(nn.Module):
    """A frozen nn.Linear in storage: its quantized tensors are buffers, so they move, save and broadcast with the model."""

    def __init__(self, q, bias=None):
        """q: QuantizedTensor (out, in); bias (out,) or None."""
        super().__init__()
        self.out_features, self.in_features = q.shape
        self.meta, self.names = q.meta, tuple(q.tensors())
        for name, tensor in q.tensors().items():
            self.register_buffer(name, tensor)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

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
        for name, tensor in self.weight_q.tensors().items():
            if tensor.dim():
                delattr(self, name)
                self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))

    def dequantize(self, dtype=None):
        """The weight, (out, in), in dtype."""
        return self.weight_q.dequantize(dtype)

    def dense(self, dtype):
        """Weight (out, in) and bias (out,) or None as the layer computes with them on inputs of that type."""
        return self.dequantize(dtype), None if self.bias is None else self.bias.to(dtype)

    def forward(self, x):
        return lora_linear(x, self.weight_q, self.bias, None, None, 0.0)

    def _apply(self, fn, recurse=True):
        """model.bfloat16() must move the scales but not round them."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            if self._buffers[name].dtype != old.dtype:
                self._buffers[name] = old.to(self._buffers[name].device)
        return self


# -----------------------------------------------------------------------------
# a model in storage

LINEAR_LAYERS = ("q", "k", "v", "out", "up", "gate", "down")     # those of a block, as model.py names them


@dataclass(frozen=True)
class Storage:
    """How a base's linear layers are stored."""
    scheme: str
    block: int | None = 64        # weights that share a scale; None: a row
    double: bool = False          # the scales in 8 bits
    skip: tuple = ()              # layers that stay as they are, by their last names or in full

    def __post_init__(self):
        _check(self.scheme, self.block)

    def quantize(self, weight, name="weight"):
        """The weight in this storage, as a QuantizedTensor."""
        return quantize(weight, self.scheme, self.block, self.double, name)

    def empty_like(self, weight):
        """A QuantizedTensor of the weight's shape, dtype and device with nothing in it yet."""
        lengths = _lengths(weight.shape, self.scheme, self.block)
        dtypes = {"packed": CODES[self.scheme].dtype, "absmax": torch.float32}
        if self.double:
            dtypes |= {"absmax": torch.uint8, "absmax2": torch.float32}
        tensors = [weight.new_empty(lengths[name], dtype=dtype) for name, dtype in dtypes.items()]
        offset = [weight.new_empty((), dtype=torch.float32)] if self.double else []
        return QuantizedTensor(weight.shape, self.scheme, self.block, weight.dtype, *tensors, *offset)


def layers_to_store(model, storage):
    """Names of the linear layers that storage is for. ValueError where a name in skip means nothing, or nothing is left."""
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    layers = {name: name.split(".")[-1] for name in linear if name.split(".")[-1] in LINEAR_LAYERS}
    if not layers:
        raise ValueError(f"no linear layer matched {', '.join(LINEAR_LAYERS)}")
    for skipped in storage.skip:
        if skipped not in {*layers, *layers.values()}:                          # fault 33
            there = ", ".join(dict.fromkeys(layers.values()))
            raise ValueError(f"quant_skip: no linear layer {skipped!r}; there are {there}")
    chosen = [name for name, last in layers.items() if not {name, last} & {*storage.skip}]
    if not chosen:                                                              # fault 33
        raise ValueError("quant_skip leaves no layer to quantize")
    return chosen


def store(model, storage, empty=False):
    """
    Puts the linear layers of the blocks into storage, in place and one at a time: each becomes a QuantLinear. With empty
    the stored tensors have their shapes and no content yet. Returns (layers stored, linear layers there were).
    """
    total = sum(isinstance(module, nn.Linear) for module in model.modules())
    chosen = layers_to_store(model, storage)
    for name in chosen:
        linear = model.get_submodule(name)
        quantized = storage.empty_like(linear.weight) if empty else storage.quantize(linear.weight, f"{name}.weight")
        model.set_submodule(name, QuantLinear(quantized, linear.bias))
    return len(chosen), total


# -----------------------------------------------------------------------------
# python quant.py


def example():
    """The slide's example, step by step."""
    w, absmax = 0.42, 1.0
    levels = CODES["linear4"].levels
    q = quantize(torch.tensor([w, absmax]), "linear4", 16)
    code = int(unpack(q.packed, 4, 2)[0])
    value = float(q.dequantize()[0])
    yield "The slide's example: w = 0.42 in a block whose largest magnitude is 1.0, sixteen evenly spaced levels"
    yield f"  normalize    {w} / {absmax} = {w / absmax}"
    yield f"  quantize     nearest of {' '.join(f'{level:.2f}' for level in levels)}"
    yield f"               is {levels[code]:.4f}: code {code} counted from zero (the slide's 12 counts from one)"
    yield f"  dequantize   {levels[code]:.4f} * {absmax} = {value:.4f}"
    yield f"  error        {value:.4f} - {w} = {value - w:.4f} (the slide, from rounded levels: 0.04)"


def codebooks():
    """The levels of the codes of at most four bits side by side."""
    small = {scheme: code.levels for scheme, code in CODES.items() if code.bits <= 4}
    yield "code " + " ".join(f"{scheme:>9}" for scheme in small)
    for k, row in enumerate(zip_longest(*small.values())):
        yield f"{k:4} " + " ".join(" " * 9 if level is None else f"{level:9.4f}" for level in row)


def errors(blocks=(32, 64, 128, 256, 1024, 4096), n=2**22):
    """Mean absolute and root mean square error for weights from N(0, 1), by block size."""
    x = torch.randn(n, generator=torch.Generator().manual_seed(0))
    columns = [*CODES, "nf4, double"]
    yield "Mean absolute and root mean square error, weights from N(0, 1), in units of the deviation"
    yield "block  " + "".join(f"{column:>18}" for column in columns)
    for block in blocks:
        row = f"{block:5}  "
        for column in columns:
            scheme, _, double = column.partition(", ")
            q = quantize(x, scheme, block, bool(double))
            error = (q.dequantize() - x).double()
            row += f"{error.abs().mean():9.5f} {error.square().mean().sqrt():8.5f}"
        yield row


if __name__ == "__main__":
    for lines in (example(), codebooks(), errors()):
        print(*lines, sep="\n", end="\n\n")
