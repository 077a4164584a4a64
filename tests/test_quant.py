"""
quant.py against oracles that share no code with it: the slide, formulas in numpy, autograd, published hashes, and bitsandbytes
(run by the interpreter that NANOPEFT_PEERS names, in a process of its own).
"""

import contextlib
import copy
import dataclasses
import hashlib
import io
import itertools
import math
import shutil
from statistics import NormalDist

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import memory
import peft
import quant
from conftest import tiny
from quant import CODES, Code, LoRALinear, QuantizedTensor, QuantLinear, lora_linear, pack, quantize, store, unpack

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCKS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
SCHEMES = tuple(CODES)
WORST = {scheme: np.diff(sorted(code.levels)).max() / 2 for scheme, code in CODES.items()}     # times absmax: half the widest gap between two levels
CAST = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SMALLEST = {torch.float32: 2.0**-149, torch.bfloat16: 2.0**-133, torch.float16: 2.0**-24}
quick = settings(derandomize=True, deadline=None, max_examples=80)


def sha(*arrays):
    return hashlib.sha256(b"".join(np.ascontiguousarray(a).tobytes() for a in arrays)).hexdigest()[:16]


def bits(tensor):
    """As integers, so that -0.0 differs from 0.0 and NaN equals itself."""
    return tensor.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


# -----------------------------------------------------------------------------
# the oracle: section 1 of the reference in numpy, a loop over blocks

NF4 = np.array([-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
                -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
                0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0], np.float32)
LEVELS = {"nf4": NF4, "linear4": np.array([-1 + 2 * k / 15 for k in range(16)], np.float32),
          "int4": np.array([k / 7 for k in range(-8, 8)], np.float32),
          "fp4": np.array([sign * level / 12 for sign in (1, -1) for level in (0.0, 0.0625, 8, 12, 4, 6, 2, 3)], np.float32)}


def dynamic_map(signs=(-1, 1)):
    values = [0.0, 1.0]
    for i in range(7):
        edges = np.linspace(np.float32(0.1), np.float32(1), 2**i * (3 - len(signs)) + 1)
        values += [sign * 10.0 ** (i - 6) * (a + b) / 2 for a, b in zip(edges, edges[1:]) for sign in signs]
    return np.array(sorted(values))


def slow_codes(block, levels, whole):
    """One block of float32 -> (codes, absmax)."""
    order = np.argsort(levels, kind="stable")
    levels = levels[order]
    absmax = np.abs(block).max()
    if absmax == 0:
        return order[np.searchsorted((levels[:-1] + levels[1:]) / 2, np.zeros_like(block))], absmax
    y = block * (np.float32(1) / absmax) if whole else block / absmax
    boundaries = (levels[:-1] + levels[1:]) / np.float32(2)
    return order[(np.clip(y, -1, 1)[:, None] > boundaries).sum(1)], absmax


def slow_quantize(x, levels, size):
    """x (n,) float32 -> codes (n,) uint8, absmax (n_blocks,) float32."""
    blocks = [slow_codes(x[i:i + size], levels, i + size <= len(x)) for i in range(0, len(x), size)]
    return np.concatenate([codes for codes, _ in blocks]).astype(np.uint8), np.array([absmax for _, absmax in blocks], np.float32)


def slow_dequantize(codes, absmax, levels, size):
    return levels[codes] * np.repeat(absmax, size)[:len(codes)]


def slow_pack(codes, pad=7):
    pairs = list(codes) + [pad] * (len(codes) % 2)
    return np.array([pairs[i] * 16 + pairs[i + 1] for i in range(0, len(pairs), 2)], np.uint8)


def uniform(n, seed):
    """n numbers in [-1, 1), the same on every machine: a linear congruential generator of 64 bits."""
    state, values = seed, []
    for _ in range(n):
        state = (6364136223846793005 * state + 1442695040888963407) % 2**64
        values.append((state >> 11) / 2.0**52 - 1)
    return np.array(values)


def case(name, n=1000, size=64):
    """float32 weights of a kind, exact on every machine."""
    u = uniform(n, len(name))
    x = {"random": lambda: u, "heavy": lambda: u**15, "tiny": lambda: u * 2.0**-100, "huge": lambda: u * 2.0**120,
         "equal": lambda: np.full(n, 0.3), "outlier": lambda: np.where(np.arange(n) == n // 2, 1000.0, u * 0.01),
         "grid": lambda: np.round(u * 128) / 128, "zeros": lambda: np.where(np.arange(n) // size % 2, u, 0)}[name.split()[0]]() \
        if name != "tied" else None
    if name == "tied":                                     # every value a boundary times its block's absmax
        boundaries = (NF4[:-1] + NF4[1:]) / np.float32(2)
        absmax = np.repeat(uniform(-(-n // size), 3).astype(np.float32) + np.float32(1.5), size)[:n]
        x = boundaries[np.arange(n) % 15] * absmax
        x[::size] = absmax[::size]
    return x.astype(np.float32)


KINDS = ("random", "heavy", "tied", "tiny", "huge", "equal", "outlier", "grid", "zeros")


def test_tables_have_the_published_hashes():
    assert hashlib.sha256(torch.tensor(quant.NF4).numpy().astype("<f4").tobytes()).hexdigest().startswith("8501941daa1b8a90")
    table = torch.tensor(quant.dynamic_levels())
    assert hashlib.sha256(table.numpy().astype("<f4").tobytes()).hexdigest().startswith("e732639a65f497b4")
    assert len(table) == 256 and (table < 0).sum() == 127 and table[127] == 0 and table[-1] == 1
    assert table[0].item() == pytest.approx(-0.992968738, abs=1e-9)
    assert np.allclose(table.numpy(), dynamic_map(), rtol=1e-6, atol=0)
    unsigned = torch.tensor(quant.UNSIGNED.levels)
    assert len(unsigned) == 256 and np.allclose(unsigned.numpy(), dynamic_map(signs=(1,)), rtol=1e-6, atol=0)


def test_slide():
    """Lecture, 'Example': 16 evenly spaced levels, w = 0.42 -> 0.46, error 0.04 (0.0467 before truncation)."""
    slide = [-1.0, -0.86, -0.73, -0.6, -0.46, -0.33, -0.2, -0.06, 0.06, 0.2, 0.33, 0.46, 0.6, 0.73, 0.86, 1.0]
    levels = torch.tensor(CODES["linear4"].levels)
    assert (torch.trunc(levels * 100 + levels.sign() * 1e-3) / 100 - torch.tensor(slide)).abs().max() < 1e-6
    q = quantize(torch.tensor([0.42, 1.0]), "linear4", 64)
    assert q.packed.tolist() == [11 * 16 + 15]             # the twelfth level; counted from zero, 11
    w = q.dequantize()[0].item()
    assert w == pytest.approx(7 / 15) and math.trunc((w - 0.42) * 100) / 100 == 0.04
    assert w - 0.42 == pytest.approx(0.0467, abs=1e-4)


def test_int4_is_the_slides_range():
    assert [round(7 * level) for level in CODES["int4"].levels] == list(range(-8, 8))
    x = torch.arange(-7.0, 8.0)
    assert (unpack(quantize(x, "int4").packed, 4, 15).int() - 8).tolist() == list(range(-7, 8))


@pytest.mark.parametrize("scheme", LEVELS)
@pytest.mark.parametrize("kind", KINDS)
def test_formula(kind, scheme):
    """Codes, packing, scales and values equal the loop, for all block sizes, odd sizes and input types."""
    for n, size, dtype in ((1000, 64, torch.float32), (1001, 32, torch.bfloat16), (63, 64, torch.float32), (1, 16, torch.float32),
                           (4096, 4096, torch.float32), (777, 256, torch.float16)):
        x = torch.from_numpy(case(kind, n, size))
        if dtype == torch.float16:
            x = x / x.abs().max() * 100
        x = x.to(dtype)
        q = quantize(x, scheme, size)
        codes, absmax = slow_quantize(x.float().numpy(), LEVELS[scheme], size)
        assert unpack(q.packed, 4, n).numpy().tolist() == codes.tolist()
        assert q.packed.numpy().tolist() == slow_pack(codes, 0 if scheme == "fp4" else 7).tolist()
        assert same(q.absmax, torch.from_numpy(absmax))
        expected = torch.from_numpy(slow_dequantize(codes, absmax, LEVELS[scheme], size))
        for out in (*DTYPES, torch.float64):
            assert same(q.dequantize(out), expected.to(out))
        assert same(q.dequantize(), expected.to(dtype))


@pytest.mark.parametrize("kind", KINDS)
def test_formula_of_double_quantization(kind):
    x = case(kind, 64 * 700 + 13)
    q, flat = quantize(torch.from_numpy(x), "nf4", double=True), quantize(torch.from_numpy(x), "nf4")
    assert q.packed.equal(flat.packed)
    assert q.offset.item() == pytest.approx(flat.absmax.double().mean().item(), rel=1e-6)
    levels = torch.tensor(quant.dynamic_levels()).numpy()
    codes, absmax2 = slow_quantize(flat.absmax.numpy() - q.offset.numpy(), levels, 256)
    assert q.absmax.tolist() == codes.tolist() and same(q.absmax2, torch.from_numpy(absmax2))
    scales = slow_dequantize(codes, absmax2, levels, 256) + q.offset.numpy()
    assert same(q.scales(), torch.from_numpy(scales))
    values = slow_dequantize(unpack(q.packed, 4, len(x)).numpy(), scales, NF4, 64)
    assert same(q.dequantize(torch.float32), torch.from_numpy(values))


def test_llm_int8():
    """By rows: round half to even of x * (127 / absmax)."""
    x = torch.from_numpy(case("heavy", 37 * 51)).view(37, 51)
    x[0, :4] = torch.tensor([127.0, 0.5, 1.5, -2.5])       # ties
    q = quantize(x, "int8", "row")
    row = x.abs().amax(1, keepdim=True)
    assert same(q.packed.view(37, 51), torch.round(x * (127.0 / row)).to(torch.int8))
    assert q.packed[:4].tolist() == [127, 0, 2, -2] and q.packed.min() >= -127
    assert same(q.absmax, row.view(-1)) and q.block is None
    assert torch.allclose(q.dequantize(), q.packed.view(37, 51) * row / 127, rtol=1e-6)


@pytest.mark.parametrize("levels, n", [(quant.NF4, 8), (quant.NF3, 4)])
def test_normal_floats_are_quantiles(levels, n):
    """QLoRA, appendix E: n positive levels, zero, n - 1 negative ones; bitsandbytes' offset is 0.9677083 for n = 8."""
    last = 1 - (1 / (4 * n) + 1 / (4 * n - 2)) / 2
    quantile = NormalDist().inv_cdf
    positive = [quantile(p) for p in np.linspace(0.5, last, n + 1)[1:]]
    negative = [-quantile(p) for p in np.linspace(last, 0.5, n)[:-1]]
    assert np.array([*negative, 0, *positive]) / quantile(last) == pytest.approx(np.array(levels), abs=3e-7)


def test_nf3_packs_eight_weights_into_three_bytes():
    q = quantize(torch.tensor(quant.NF3).repeat(8), "nf3")
    assert q.packed.tolist() == [0b00000101, 0b00111001, 0b01110111] * 8 and q.nbytes == 24 + 4
    assert torch.equal(q.dequantize(), torch.tensor(quant.NF3).repeat(8))


def test_the_worst_error_is_half_the_widest_gap():
    assert WORST["nf4"] == pytest.approx(0.1519036) and WORST["linear4"] == pytest.approx(1 / 15)
    assert WORST["int4"] == pytest.approx(1 / 14) and WORST["int8"] == pytest.approx(0.5 / 127)


# -----------------------------------------------------------------------------
# any code


def nearest(y, levels):
    """The definition: as many boundaries as lie below y are passed, from the lowest level up."""
    order = sorted(range(len(levels)), key=lambda k: levels[k])
    ordered = np.array([levels[k] for k in order], np.float32)
    boundaries = (ordered[:-1] + ordered[1:]) / np.float32(2)
    return np.array(order)[(y[:, None] > boundaries).sum(1)]


@st.composite
def codes(draw):
    """A code of 2 to 256 levels, in any order; some of them lie closer together than any table of cells could tell."""
    n = draw(st.integers(2, 256))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    kind = draw(st.sampled_from(["even", "random", "clustered", "repeated"]))
    levels = np.linspace(-1, 1, n) if kind == "even" else generator.uniform(-1, 1, n)
    if kind == "clustered":
        levels = levels ** 9
    if kind == "repeated":
        levels = np.round(levels * 8) / 8
    levels[0], levels[-1] = -1, 1
    if draw(st.booleans()):
        generator.shuffle(levels)
    fewest = (n - 1).bit_length()
    return Code(tuple(levels.tolist()), draw(st.integers(fewest, 8)))


@quick
@given(codes(), st.integers(0, 2**32))
def test_nearest_of_any_code(code, seed):
    """At random points, at every boundary and at its two neighbours, and at the levels."""
    ordered = np.sort(np.float32(code.levels))
    boundaries = (ordered[:-1] + ordered[1:]) / np.float32(2)
    near = [np.nextafter(boundaries, np.float32(side)) for side in (-2, 2)]
    y = np.concatenate([np.random.default_rng(seed).uniform(-1, 1, 500).astype(np.float32), boundaries, *near, ordered, np.float32([0, -0.0, 1e-30, -1e-30])]).clip(-1, 1)
    assert quant._nearest(torch.from_numpy(y), code).tolist() == nearest(y, code.levels).tolist()


def test_cells_are_used_where_they_can_be():
    assert all(quant._cells(code) for code in CODES.values() if code.bits <= 4)
    assert quant._cells(Code((-1.0, 0.0, 1e-6, 2e-6, 1.0), 3)) is None


@quick
@given(codes(), st.integers(1, 200), st.sampled_from([16, 64]))
def test_a_code_more_is_a_line_more(code, n, block):
    """Codes, bytes and values of a code that only the table knows."""
    x = torch.randn(n, generator=torch.Generator().manual_seed(n))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CODES, "new", code)
        q = quantize(x, "new", block)
        y = q.dequantize()
    levels, ours = np.float32(code.levels), unpack(q.packed, code.bits, n).numpy()
    for i in range(0, n, block):
        part, absmax = x[i:i + block].numpy(), x[i:i + block].abs().max().numpy()
        y_i = part * (np.float32(1) / absmax) if len(part) == block else part / absmax
        assert ours[i:i + block].tolist() == nearest(y_i.clip(-1, 1), code.levels).tolist()
        assert same(y[i:i + block], torch.from_numpy(levels[ours[i:i + block]] * absmax))


@pytest.mark.parametrize("bits", range(1, 9))
def test_packing_lays_bits_side_by_side(bits):
    """As the text of the bits says it, the first code in the highest bits."""
    for n in (1, 2, 7, 8, 9, 64, 101):
        codes = torch.randint(2**bits, (n,), generator=torch.Generator().manual_seed(n), dtype=torch.uint8)
        packed = pack(codes, bits, 1)
        text = "".join(f"{code:0{bits}b}" for code in codes.tolist())
        while len(text) % 8:
            text += f"{1:0{bits}b}"
        assert packed.tolist() == [int(text[i:i + 8], 2) for i in range(0, len(text), 8)]
        assert len(packed) == quant.packed_length(n, bits) and same(unpack(packed, bits, n), codes)


def test_tables_made_in_inference_mode_serve_training():
    quant._kept_table.cache_clear()
    quant._cells.cache_clear()
    with torch.inference_mode():
        quantize(torch.randn(256), "nf4", double=True).dequantize()
    layer = stored(nn.Linear(64, 32), "nf4", 64, True)
    x = torch.randn(3, 64, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.dequantize().sum(0).expand(3, 64))


def test_a_simulation_leaves_no_table_without_content():
    q = quantize(torch.randn(64, 64), "nf4", double=True)
    before = q.dequantize()
    memory.simulate(tiny("gpt2"), "qlora", 1, 8, device="cpu")
    assert same(q.dequantize(), before)


def stored(linear, *storage):
    """The QuantLinear of an nn.Linear."""
    return QuantLinear(quantize(linear.weight, *storage), linear.bias)


# -----------------------------------------------------------------------------
# properties


@st.composite
def weights(draw, dtypes=DTYPES, low=-20, high=10):
    """A weight of some kind, shape, scale and type."""
    shape = draw(st.sampled_from([(1,), (2,), (16,), (17,), (64,), (257,), (3, 5), (8, 64), (5, 129), (128, 16), (2, 3, 31), (4, 1, 4)]))
    kind = draw(st.sampled_from(["normal", "heavy", "ties", "constant", "outlier", "sparse", "listed"]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    x = torch.randn(shape, generator=generator)
    if kind == "heavy":
        x = x**5
    elif kind == "ties":
        x = (x * 4).round() / 4
    elif kind == "constant":
        x = torch.full(shape, draw(st.floats(-2, 2, width=32)))
    elif kind == "outlier":
        x.view(-1)[draw(st.integers(0, x.numel() - 1))] = 100.0
    elif kind == "sparse":
        x *= torch.rand(shape, generator=generator) < 0.1
    elif kind == "listed":
        few = draw(st.lists(st.floats(-2, 2, width=16), min_size=1, max_size=8))
        x = torch.tensor(few)[torch.randint(len(few), shape, generator=generator)]
    dtype = draw(st.sampled_from(dtypes))
    return (x * 2.0 ** draw(st.integers(low, high))).clamp(-(top := torch.finfo(dtype).max), top).to(dtype)


schemes, blocks = st.sampled_from(SCHEMES), st.sampled_from([*BLOCKS, "row"])


def spread(q, per_block):
    """(n_blocks,) -> one value an element, in q's shape."""
    return per_block.repeat_interleave(q.weights_per_scale)[:q.numel()].view(q.shape)


def bound(q, x, dtype):
    """The largest error that section 2 allows, each element, float64."""
    absmax = spread(q, quantize(x, q.scheme, q.block).absmax.double())
    error = WORST[q.scheme] * absmax * (1 + 2.0**-20)
    if q.double:
        error += spread(q, nested_bound(x, q))
    return error + CAST[dtype] * (absmax + error) * (1 + 2.0**-20) + SMALLEST[dtype]


def nested_bound(x, q):
    """What double quantization may change an absmax by: .0070313 times the largest deviation in its group of 256."""
    absmax = quantize(x, q.scheme, q.block).absmax.double()
    deviation = (absmax - q.offset.double()).abs()
    largest = torch.cat([part.amax().expand(len(part)) for part in deviation.split(256)])
    return 0.0070313 * largest + 2.0**-22 * (absmax + q.offset.double())


@quick
@given(weights(), schemes, blocks, st.booleans(), st.sampled_from(DTYPES))
def test_error_bound(x, scheme, block, double, dtype):
    q = quantize(x, scheme, block, double)
    y = q.dequantize(dtype)
    assert y.shape == x.shape and y.dtype == dtype
    assert ((y.double() - x.double()).abs() <= bound(q, x, dtype)).all()


@quick
@given(weights(), schemes, blocks, st.sampled_from(DTYPES))
def test_idempotent(x, scheme, block, dtype):
    q = quantize(x, scheme, block)
    y = q.dequantize(torch.promote_types(dtype, x.dtype))
    assume(dtype != torch.float16 or x.abs().max() > 2.0**-5)          # else the values are denormal
    again = quantize(y, scheme, block)
    assert same(again.dequantize(y.dtype) + 0.0, y + 0.0)              # + 0.0 makes 0 of -0
    assert same(again.absmax, q.absmax) and (again.packed.equal(q.packed) or scheme == "fp4")        # which has zero twice


@quick
@given(weights(dtypes=(torch.float32,)), schemes, blocks, st.integers(-40, 40))
def test_powers_of_two_commute(x, scheme, block, k):
    q, scaled = quantize(x, scheme, block), quantize(x * 2.0**k, scheme, block)
    assert same(q.packed, scaled.packed) and same(q.absmax * 2.0**k, scaled.absmax)
    assert same(q.dequantize() * 2.0**k, scaled.dequantize())


@quick
@given(weights(dtypes=(torch.float32,)), schemes, blocks, st.floats(0.125, 10, width=32))
def test_codes_do_not_depend_on_scale(x, scheme, block, factor):
    """But where a normalized weight lies within rounding of a boundary."""
    a, b = quantize(x, scheme, block), quantize(x * factor, scheme, block)
    assert torch.allclose(a.absmax * factor, b.absmax, rtol=1e-6)
    differ = (a.dequantize() * factor - b.dequantize()).abs() > 1e-5 * spread(a, b.absmax)
    errors = ((a.dequantize() - x).abs(), (b.dequantize() / factor - x).abs())      # then both codes are equally near
    assert ((errors[0] - errors[1]).abs()[differ] <= 1e-6 * spread(a, a.absmax)[differ]).all()


@quick
@given(weights(), schemes, blocks)
def test_absmax_is_exact(x, scheme, block):
    q = quantize(x, scheme, block)
    largest = x.float().abs() == spread(q, q.absmax)
    assert largest.any() and (q.dequantize()[largest] == x[largest]).all()


@quick
@given(weights(), schemes, blocks, st.booleans())
def test_zeros_are_exact(x, scheme, block, double):
    """Every zero where zero is a level; where it is none, as in linear4, a block of zeros."""
    x.view(-1)[::3] = 0
    q = quantize(x, scheme, block, double)
    if 0 in CODES[scheme].levels:
        assert (q.dequantize()[x == 0] == 0).all()
    if not double:
        assert (quantize(torch.zeros_like(x), scheme, block).dequantize() == 0).all()


@quick
@given(weights(), schemes, blocks, st.booleans())
def test_monotone_in_a_block(x, scheme, block, double):
    q = quantize(x, scheme, block, double)
    for a, b, scale in zip(x.reshape(-1).float().split(q.weights_per_scale), q.dequantize(torch.float32).view(-1).split(q.weights_per_scale), q.scales()):
        assert scale <= 0 or (b[a.argsort()].diff() >= 0).all()


@quick
@given(weights(dtypes=(torch.float32,), low=-3, high=3), st.integers(0, 2**32), st.sampled_from([16, 32, 64]))
def test_double_quantization_bound(x, seed, block):
    """Over several groups of 256 scales, with outlier blocks."""
    generator = torch.Generator().manual_seed(seed)
    many = torch.randn(block * 600, generator=generator) * x.view(-1)[0]
    many[::block * 97] *= 1000
    q = quantize(many, "nf4", block, double=True)
    exact = quantize(many, "nf4", block).absmax
    assert ((q.scales().double() - exact.double()).abs() <= nested_bound(many, q)).all()


@quick
@given(st.binary(min_size=1, max_size=300), st.booleans())
def test_packing_is_a_bijection(data, odd):
    packed = torch.tensor(list(data), dtype=torch.uint8)
    if odd:
        packed[-1] = packed[-1] & 0xF0 | 7
    n = 2 * len(packed) - odd
    codes = unpack(packed, 4, n)
    assert codes.shape == (n,) and codes.max() < 16 and codes.tolist() == [c for byte in data for c in (byte >> 4, byte & 15)][:n]
    assert same(pack(codes, 4, 7), packed) and pack(codes, 4, 7).numpy().tolist() == slow_pack(codes.tolist()).tolist()


@quick
@given(weights(), schemes, st.sampled_from([16, 32, 64]), st.integers(0, 2**32))
def test_permuting_blocks_commutes(x, scheme, block, seed):
    x = x.reshape(-1).repeat(block).view(-1, block) * torch.linspace(0.5, 2, x.numel())[:, None].to(x.dtype)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    a, b = quantize(x, scheme, block), quantize(x[order], scheme, block)
    assert same(a.absmax[order], b.absmax) and same(a.packed.view(len(x), -1)[order], b.packed.view(len(x), -1))
    assert same(a.dequantize()[order], b.dequantize())


TABLE = {  # by numerical integration: mean absolute and root mean square error of N(0, 1)
    32: ((0.0677, 0.0873), (0.0758, 0.0905), (0.00448, 0.00535)), 64: ((0.0728, 0.0920), (0.0852, 0.100), (0.00503, 0.00593)),
    128: ((0.0768, 0.0956), (0.0935, 0.109), (0.00552, 0.00646)), 256: ((0.0803, 0.0986), (0.101, 0.118), (0.00597, 0.00696)),
    1024: ((0.0866, 0.104), (0.115, 0.133), (0.00677, 0.00786)), 4096: ((0.0925, 0.110), (0.127, 0.147), (0.00748, 0.00867))}


def last_digit(value):
    """Half a unit in the last of value's three digits."""
    return 0.5 * 10.0 ** (math.floor(math.log10(value)) - 2)


def deviation(per_block):
    return (per_block.std() / math.sqrt(len(per_block))).item()


@pytest.mark.parametrize("block", TABLE)
def test_expected_error(block):
    x = torch.randn(2**20, generator=torch.Generator().manual_seed(block))
    for scheme, (mean, rms) in zip(("nf4", "linear4", "int8"), TABLE[block]):
        error = (quantize(x, scheme, block).dequantize() - x).double().view(-1, block)
        size, square = error.abs().mean(1), error.square().mean(1)
        assert abs(size.mean() - mean) <= 5 * deviation(size) + last_digit(mean)
        assert abs(square.mean().sqrt() - rms) <= 5 * deviation(square) / (2 * rms) + last_digit(rms)
        assert mean == TABLE[block][0][0] or scheme == "int8" or mean > TABLE[block][0][0]      # evenly spaced is worse


@pytest.mark.parametrize("block, added", [(32, 0.00015), (64, 0.00007), (128, 0.00004)])
def test_expected_error_of_double_quantization(block, added):
    x = torch.randn(2**22, generator=torch.Generator().manual_seed(block))
    more, less = ((quantize(x, "nf4", block, double).dequantize() - x).double().abs().view(-1, block).mean(1) for double in (True, False))
    assert abs((more - less).mean() - added) <= 5 * deviation(more - less) + 0.5e-5


# -----------------------------------------------------------------------------
# bit for bit with bitsandbytes: its plain-torch kernels, taken from its source so that its CPU's coarse table stays out

BITSANDBYTES = r"""
import inspect, re, sys, torch
import bitsandbytes.functional as F
import bitsandbytes.backends.default.ops as ops
kernels = {}
def collect(name, backend):
    def keep(f):
        kernels[name.split("::")[1]] = f
        return f
    return keep
source = inspect.getsource(ops).replace("from ..._ops import register_kernel", "register_kernel = collect")
exec(re.sub(r"@_try_torch_compile(\(.*?\))?\n", "", source), {"__name__": ops.__name__, "__package__": ops.__package__, "collect": collect})
code = F.create_dynamic_map()
results = []
for x, block in torch.load(sys.argv[1], weights_only=True):
    packed, absmax = kernels["quantize_4bit"](x, block, "nf4", torch.uint8)
    offset = absmax.mean()
    nested, absmax2 = kernels["quantize_blockwise"](absmax - offset, code, 256)
    scales = kernels["dequantize_blockwise"](nested, absmax2, code, 256, torch.float32) + offset
    values = [[kernels["dequantize_4bit"](packed, a, block, "nf4", list(x.shape), dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)] for a in (absmax, scales)]
    results.append([packed.flatten(), absmax, nested, absmax2, offset, *sum(values, [])])
torch.save([code, F.create_dynamic_map(signed=False), results], sys.argv[2])
"""


@pytest.mark.peers
def test_bit_for_bit_with_bitsandbytes(peer, tmp_path):
    """But for a partial block of zeros, whose scale bitsandbytes stores as 1e-38, and for a mean of scales beyond float32, which it makes infinite."""
    cases = []
    for kind, dtype, (n, block) in itertools.product(KINDS, DTYPES, ((4096 * 5, 64), (1003, 64), (777, 32), (9000, 16), (5001, 4096), (1, 64))):
        x = torch.from_numpy(case(kind, n, block))
        x = (x.clamp(-6e4, 6e4) if dtype == torch.float16 and kind == "huge" else x * (2.0**85 if dtype == torch.float16 and kind == "tiny" else 1)).to(dtype)
        if kind != "zeros" or n % block == 0:
            cases.append((x.view(5, -1) if n % 5 == 0 else x, block))
    torch.save(cases, tmp_path / "cases")
    peer(BITSANDBYTES, tmp_path / "cases", tmp_path / "results")
    code, unsigned, results = torch.load(tmp_path / "results", weights_only=True)
    assert same(code, torch.tensor(quant.dynamic_levels())) and same(unsigned, torch.tensor(quant.UNSIGNED.levels))
    for (x, block), theirs in zip(cases, results, strict=True):
        plain, double = quantize(x, "nf4", block), quantize(x, "nf4", block, double=True)
        n = len(plain.packed) - x.numel() % 2                    # its pad nibble is 7 as well, but that is checked by hand
        ours = [plain.packed, plain.absmax, double.absmax, double.absmax2, double.offset]
        ours += [q.dequantize(dtype) for q in (plain, double) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
        for what, a, b in zip("packed absmax nested absmax2 offset f32 bf16 f16 f32-double bf16-double f16-double".split(), ours, theirs, strict=True):
            a, b = (a[:n], b[:n]) if what == "packed" else (a, torch.where(b == 1e-38, 0, b).view(a.shape) if what == "absmax2" else b.view(a.shape))
            if not theirs[4].isfinite() and what in ("nested", "absmax2", "offset", "f32-double", "bf16-double", "f16-double"):
                assert ours[4].isfinite() and double.scales().isfinite().all()
                continue
            assert same(a, b), (what, x.dtype, tuple(x.shape), block, (a != b).sum())
        assert x.numel() % 2 == 0 or plain.packed[-1] & 15 == theirs[0][-1] & 15 == 7


FP4_OF_BITSANDBYTES = """
import sys, torch
import bitsandbytes.functional as F
results = []
for x, block in torch.load(sys.argv[1], weights_only=True):
    packed, state = F.quantize_fp4(x, blocksize=block)
    results.append([packed.flatten(), state.absmax, F.dequantize_fp4(packed, state)])
torch.save(results, sys.argv[2])
"""


@pytest.mark.peers
def test_fp4_bit_for_bit_with_bitsandbytes(peer, tmp_path):
    cases = []
    for kind, dtype, (n, block) in itertools.product(("random", "heavy", "tied", "grid", "equal", "outlier", "zeros"), DTYPES, ((4096 * 4, 64), (3, 64), (4096, 4096), (1003, 32))):
        if kind != "zeros" or n % block == 0:
            cases.append((torch.from_numpy(case(kind, n, block)).to(dtype), block))
    torch.save(cases, tmp_path / "cases")
    peer(FP4_OF_BITSANDBYTES, tmp_path / "cases", tmp_path / "results")
    for (x, block), (packed, absmax, values) in zip(cases, torch.load(tmp_path / "results", weights_only=True), strict=True):
        q = quantize(x, "fp4", block)
        assert same(q.packed, packed) and same(q.absmax, absmax), (x.dtype, block)
        ours, theirs = q.dequantize(), values.view(-1)
        code_8 = (ours == 0) & ours.signbit()                # -0; of its kernels some say so, some 0 (odd lengths, AVX-512)
        assert same(ours[~code_8], theirs[~code_8]) and not theirs[code_8].any(), (x.dtype, block)


# -----------------------------------------------------------------------------
# the Function


def parts(dtype=torch.float64, n=5, d_in=12, d_out=7, r=3):
    g = torch.Generator().manual_seed(0)
    make = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)
    return make(2, n, d_in), make(d_out, d_in), make(d_out), make(r, d_in), make(d_out, r)


@pytest.mark.parametrize("p, seed", [(0.0, None), (0.4, 17)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_gradcheck(p, seed, with_bias):
    x, W, b, A, B = parts()
    inputs = [t.requires_grad_() for t in (x, A, B, *([b] if with_bias else []))]
    assert torch.autograd.gradcheck(lambda x, A, B, b=None: LoRALinear.apply(x, A, B, b, 0.7, p, seed, None, W), inputs)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("double", [False, True])
def test_gradients_are_those_through_the_dequantized_weight(scheme, double):
    x, W, b, A, B = parts(d_in=32, d_out=24)
    q, g = quantize(W.float(), scheme, 16, double), torch.randn(2, 5, 24, dtype=torch.float64)
    results = []
    for weight in (q, q.dequantize(torch.float64)):
        inputs = [t.clone().requires_grad_() for t in (x, A, B)]
        y = lora_linear(inputs[0], weight, b, *inputs[1:], 0.7) if weight is q else F.linear(inputs[0], weight, b) + 0.7 * inputs[0] @ inputs[1].T @ inputs[2].T
        results.append((y, *torch.autograd.grad(y, inputs, g)))
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_dropout_acts_on_the_input_of_A_alone_and_comes_back_in_the_backward_pass():
    x, W, b, A, B = parts(n=400)
    y = LoRALinear.apply(x, A, B, b, 1.0, 0.25, 3, None, W)
    m = quant._dropout_mask(x.view(800, 12), 12, 0.25, 3).view(x.shape)
    torch.testing.assert_close(y, F.linear(x, W, b) + (m * x) @ A.T @ B.T)
    assert set(m.unique().tolist()) == {0.0, 1 / 0.75} and abs(m.mean() - 1) < 0.03
    torch.manual_seed(0)
    first = lora_linear(x, W, b, A, B, 1.0, 0.25, training=True)
    assert not torch.equal(first, lora_linear(x, W, b, A, B, 1.0, 0.25, training=True))
    assert torch.equal(lora_linear(x, W, b, A, B, 1.0, 0.25, training=False), lora_linear(x, W, b, A, B, 1.0))


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("kind", [*SCHEMES, "dense"])
def test_one_activation_is_saved(kind, dropout):
    """Over 3 layers in a row: the three inputs, and nothing else that is not a parameter or a buffer."""
    from conftest import saved_bytes
    layers = [peft.LoRA(nn.Linear(64, 64).requires_grad_(False) if kind == "dense" else QuantLinear(quantize(torch.randn(64, 64), kind, 64)), 4, 2.0, dropout, "cpu") for _ in range(3)]
    x = torch.randn(50, 64, dtype=torch.bfloat16, requires_grad=True)
    kept, _ = saved_bytes(lambda: nn.Sequential(*layers)(x))
    own = {t.untyped_storage()._cdata for layer in layers for t in (*layer.parameters(), *layer.buffers())}
    assert sorted(n for key, n in kept.items() if key not in own) == [50 * 64 * 2] * 3


def test_nothing_is_kept_of_a_frozen_layer():
    from conftest import saved_bytes
    layer = stored(nn.Linear(64, 32), "nf4")
    kept, _ = saved_bytes(lambda: layer(torch.randn(50, 64, requires_grad=True)))
    assert kept.keys() <= {t.untyped_storage()._cdata for t in (*layer.parameters(), *layer.buffers())}


# -----------------------------------------------------------------------------
# the stored tensor and the layer


@pytest.mark.parametrize("scheme, double", [(s, d) for s in SCHEMES for d in (False, True)])
def test_saved_and_moved(scheme, double):
    q = quantize(torch.randn(9, 37, generator=torch.Generator().manual_seed(0)), scheme, 32, double)
    buffer = io.BytesIO()
    torch.save(q.tensors(), buffer)
    buffer.seek(0)
    again = QuantizedTensor(*q.meta, *torch.load(buffer, weights_only=True).values())
    assert again.meta == q.meta and all(same(t, again.tensors()[name]) for name, t in q.tensors().items()) and same(again.dequantize(), q.dequantize())
    assert q.nbytes == sum(t.numel() * t.element_size() for t in q.tensors().values())
    assert q.to("meta").packed.device.type == "meta" and q.to("cpu").meta == q.meta
    with pytest.raises(Exception, match="cannot assign"):
        q.packed = None


def test_bytes_of_a_parameter():
    q = quantize(torch.randn(1024, 1024), "nf4", 64, True)
    assert round(8 * q.nbytes / q.numel(), 3) == 4.127 and q.nbytes / q.numel() < 0.53


def test_the_layer():
    torch.manual_seed(0)
    linear, x = nn.Linear(48, 20), torch.randn(3, 48)
    layer = stored(linear, "nf4", 16, True)
    torch.testing.assert_close(layer(x), F.linear(x, layer.dequantize(), linear.bias))
    assert layer(x.bfloat16()).dtype == torch.bfloat16 and not any(p.requires_grad for p in layer.parameters())
    before = layer.weight_q
    layer.bfloat16()
    assert all(same(t, layer.weight_q.tensors()[name]) for name, t in before.tensors().items()) and layer.bias.dtype == torch.bfloat16
    other = stored(nn.Linear(48, 20), "nf4", 16, True).bfloat16()
    other.load_state_dict(layer.state_dict())
    assert same(other.dequantize(), layer.dequantize())
    assert same(copy.deepcopy(layer).dequantize(), layer.dequantize())


def test_which_layers():
    from model import GPT
    model = GPT(tiny("llama"))
    assert store(model, quant.Storage("nf4", 16, skip=("gate", "blocks.1.attn.q"))) == (2 * 7 - 2 - 1, 2 * 7 + 1)
    assert type(model.head).__name__ == "Linear" and not isinstance(model.blocks[0].ffn.gate, QuantLinear) and isinstance(model.blocks[0].attn.q, QuantLinear)
    with pytest.raises(ValueError, match="no linear layer matched q, k"):
        store(torch.nn.Sequential(torch.nn.Linear(2, 2)), quant.Storage("nf4"))
    with pytest.raises(ValueError, match="quant_skip: no linear layer 'x'; there are q, k"):
        store(GPT(tiny("llama")), quant.Storage("nf4", skip=("x",)))


@pytest.mark.parametrize("weight, scheme, block, words", [
    (torch.full((4, 16), math.nan), "nf4", 64, "layer 3 holds NaN or infinity: 64 of 64 values, the first at \\[0, 0\\]"), (torch.tensor([1.0, math.inf]), "int8", 64, "1 of 2 values, the first at \\[1\\]"),
    (torch.empty(0, 4), "nf4", 64, "layer 3 is empty: shape \\(0, 4\\)"), (torch.ones(4, dtype=torch.int32), "nf4", 64, "layer 3 is torch.int32"), (torch.ones(4), "nf5", 64, "unknown scheme 'nf5'; nearest: nf4"),
    (torch.ones(4), "nf4", 48, "block is 48; it must be a power of two from 16 to 4096, or 'row'"), (torch.ones(4), "nf4", 8, "block is 8"), (torch.ones(4), "nf4", True, "block is True")])
def test_what_cannot_be_quantized(weight, scheme, block, words):
    with pytest.raises(ValueError, match=words):
        quantize(weight, scheme, block, name="layer 3")


@pytest.mark.parametrize("scheme, block, double", [("nf4", 64, True), ("int8", None, False)])
def test_empty_storage_has_the_layout_of_a_full_one(scheme, block, double):
    storage, weight = quant.Storage(scheme, block, double), torch.randn(7, 65).bfloat16()
    full, empty = storage.quantize(weight), storage.empty_like(weight)
    assert full.meta == empty.meta
    assert [(name, t.shape, t.dtype) for name, t in full.tensors().items()] == [(name, t.shape, t.dtype) for name, t in empty.tensors().items()]
    with pytest.raises(ValueError, match="unknown scheme 'nf5'"):
        quant.Storage("nf5").empty_like(weight)
    with pytest.raises(ValueError, match="block is 7"):
        quant.Storage("nf4", 7).empty_like(weight)


def test_lengths_that_do_not_fit_are_refused():
    q = quantize(torch.randn(4, 64), "nf4")
    for change in (dict(packed=q.packed[1:]), dict(absmax=q.absmax[1:]), dict(shape=torch.Size([2**40, 2**20])), dict(block=16), dict(scheme="int8")):
        with pytest.raises(ValueError, match="holds .* values; .* needs"):
            dataclasses.replace(q, **change)


def test_the_demonstration(script):
    out = script("quant.py").stdout
    assert "0.42 / 1.0 = 0.42" in out and "is 0.4667: code 11" in out and "0.4667 - 0.42 = 0.0467" in out
    row = next(line for line in out.splitlines() if line.startswith("   64 ")).split()
    assert float(row[1]) == pytest.approx(0.0728, abs=2e-4) and float(row[3]) == pytest.approx(0.0852, abs=2e-4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")        # of torch itself, by its own compiler
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=[pytest.mark.slow, pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")])])
def test_compiled_as_one_graph(backend):
    """With dropout the gradient is checked against differences of losses drawn with one seed: masks of both passes agree."""
    torch.manual_seed(0)
    layer = peft.LoRA(stored(nn.Linear(32, 24), "nf4", 64, True), 4, 2.0, 0.3, "cpu").train()
    layer.B.data.normal_(std=0.1)
    compiled, x = torch.compile(layer, fullgraph=True, backend=backend), torch.randn(5, 32)

    def loss(seed=3):
        torch.manual_seed(seed)
        return compiled(x).square().sum()
    (first := loss()).backward()
    assert torch.equal(first, loss()) and not torch.equal(first, loss(4))
    d = 1e-3 * torch.randn_like(layer.A)
    expected = (layer.A.grad * d).sum()
    layer.A.data += d
    up = loss()
    layer.A.data -= 2 * d
    torch.testing.assert_close((up - loss()) / 2, expected, rtol=1e-2, atol=1e-5)
    layer.eval()
    torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("scheme", CODES)
def test_the_gpus_kernel_interpreted(scheme, monkeypatch):
    """Triton's interpreter runs it on a CPU. (It cuts numbers to bfloat16 instead of rounding them.)"""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: contextlib.nullcontext())
    quant._kernel.cache_clear()
    cases = ((7, 33), 16, torch.float32), ((64, 100), None, torch.float16), ((300, 64), 4096, torch.float32), ((301, 64), 16, torch.float32)
    for shape, block, dtype in cases:
        for double in (False, True):
            q = quantize(torch.randn(shape).to(dtype), scheme, block, double)
            out = torch.full(shape, torch.nan, dtype=dtype)
            assert quant._fill_by_kernel(q, out.view(-1))
            assert torch.equal(out, q.dequantize())
    quant._kernel.cache_clear()
