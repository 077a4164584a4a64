"""
Rotary positions (Su et al. 2021): what a configuration says of them, how fast they turn, and the turning.
"""

import math
from dataclasses import dataclass

import torch

from lib.checks import ROPE, bounded


@dataclass(frozen=True)
class Rope:
    """Rotary positions: how fast the pairs of a head's numbers turn, and how that was changed for a longer context."""
    theta: float = 10000.0
    dim: int = 0                    # numbers of a head that are rotated, its first ones; 0: all
    scaling: str = "none"           # or "linear", "llama3", "yarn", "longrope"
    factor: float = 1.0             # by which the context was stretched
    original: int = 0               # the context before that
    slow: float = 1.0               # turns in that context up to which a pair is slowed down by the factor
    fast: float = 4.0               # and from which on it is left as it was
    truncate: bool = True           # yarn: these two are rounded to whole pairs
    factors: tuple = ()             # longrope: a factor for each pair
    magnitude: float = 1.0          # of cos and sin

    def __post_init__(self):
        scalings = ("none", "linear", "llama3", "yarn", "longrope")
        if self.scaling not in scalings:
            raise ValueError(f"rotary scaling is {self.scaling!r}; it must be one of {', '.join(scalings)}")
        for name in ROPE:
            bounded(name, getattr(self, name), "rotary ", ROPE)


def frequencies(rope, d_head):
    """
    How fast the pairs of a head's numbers turn, in radians a position, (rotated / 2,) float32.

    Su et al. 2021, eq. 15; scaling: linear (Chen et al. 2023), llama3 (its report of 2024), yarn (Peng et
    al. 2023, eq. 23), longrope (Ding et al. 2024).
    """
    d = rope.dim or d_head
    turns = rope.theta ** (torch.arange(0, d, 2).float() / d)
    if rope.scaling == "longrope":
        return 1.0 / (torch.tensor(rope.factors, dtype=torch.float32) * turns)
    frequency = 1.0 / turns
    if rope.scaling == "linear":
        return frequency / rope.factor
    if rope.scaling == "llama3":
        wavelength = 2 * math.pi / frequency
        kept = ((rope.original / wavelength - rope.slow) / (rope.fast - rope.slow)).clamp(0, 1)
        return (1 - kept) * frequency / rope.factor + kept * frequency
    if rope.scaling == "yarn":
        kept = 1 - yarn_ramp(rope, d)
        return 1.0 / (rope.factor * turns) * (1 - kept) + frequency * kept
    return frequency


def yarn_ramp(rope, d):
    """By how much yarn stretches each pair, from 0 to 1, (d // 2,) float32."""
    def pair(n):                # the one that turns n times in the original context
        return d * math.log(rope.original / (n * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair(rope.fast), pair(rope.slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, d - 1)
    if low == high:
        high += 0.001
    return ((torch.arange(d // 2).float() - low) / (high - low)).clamp(0, 1)


def rotate(x, rope):
    """
    Rotary positions (Su et al. 2021, eq. 34), the first half of the rotated numbers paired with the second.
    x: (B, heads, T, head_dim).
    """
    cos, sin = rope
    half = cos.size(-1)
    a, b, rest = x.split((half, half, x.size(-1) - 2 * half), -1)
    turned_a = a * cos - b * sin
    turned_b = b * cos + a * sin
    return torch.cat((turned_a, turned_b, rest), -1)
