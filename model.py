"""
One GPT-style transformer by configuration. It knows nothing of PEFT, quantization or checkpoints.

    from model import GPT, GPTConfig
    model = GPT(GPTConfig(n_layer=2))
    logits, _ = model(tokens)             # tokens (B, T) int64 -> (B, T, vocab_size)
    _, loss = model(tokens, targets)      # mean cross-entropy where targets != -1; the logits never exist at once

Models differ by orthogonal features of GPTConfig, each of which acts in one place.

Three things are written to be replaced by others. A linear layer is only called, and asked by
lib/generation.py for `dense` or `factors` if it has them; `Attention.forward` and `Block.forward` read like
the slides; what takes the place of `Embed` may put vectors in front of the tokens', because the model keeps
the last T positions.

The weights may lie in another type than the computation's (float32 masters, bfloat16 activations): every
layer casts its weight to the type of its input. Autocast does the same, but keeps a cast copy of each
weight until the step ends.
"""

import math
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from lib import generation, presets
from lib.checks import SHAPE, bounded
from lib.kernels import (
    accurate, attention_of_one, causal_attention, causal_mask, cross_entropy, device_type, linear, rms_norm,
    simulated_attention, simulating)
from lib.rope import Rope, frequencies, rotate

# -----------------------------------------------------------------------------
# configuration

ACTIVATIONS = {
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "silu": F.silu,
}
CHOICES = {
    "position": ("learned", "rope"),
    "norm": ("layer", "rms"),
    "norm_place": ("before", "after", "both"),
    "qk_norm": ("none", "head", "heads", "width"),
    "activation": tuple(ACTIVATIONS),
}
PARTS_WITH_BIAS = ("q", "k", "v", "out", "gate", "up", "down", "norm")


@dataclass(frozen=True)
class GPTConfig:
    """
    The architecture. Where n_kv_head, n_ffn or head_dim is 0 it follows from the others: read kv_heads,
    d_ffn and d_head.
    """
    vocab_size: int = 50257
    block_size: int = 1024          # longest sequence, in tokens
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    n_kv_head: int = 0              # fewer than n_head: grouped-query attention
    n_ffn: int = 0                  # hidden width of the FFN; 4 * n_embd
    head_dim: int = 0               # n_embd // n_head
    position: str = "learned"       # or "rope"
    position_offset: int = 0        # unused rows at the beginning of the table of learned positions
    rope: Rope = Rope()
    local_rope: Rope | None = None  # of the layers with a window; None: the same
    windows: tuple = ()             # for each layer how many tokens one sees, itself included, or 0 for all
    unrotated: tuple = ()           # indices of the layers without rotary positions
    norm: str = "layer"             # or "rms"
    norm_eps: float = 1e-5
    norm_offset: float = 0.0        # what is added to the norms' weights
    norm_place: str = "before"      # attention and FFN, or "after" them, or "both"
    parallel: bool = False          # the FFN reads what the attention reads, not its sum
    shared_norm: bool = False       # the FFN reads through the attention's norm
    qk_norm: str = "none"           # of q and k: by "head", by "heads" with a weight for each, over the "width"
    activation: str = "gelu_tanh"   # or "gelu", "relu", "relu2", "silu"
    gated: bool = False             # down(act(gate(x)) * up(x)) instead of down(act(up(x)))
    bias: str = " ".join(PARTS_WITH_BIAS)       # the linear layers that have one, and "norm" for LayerNorms
    tied: bool = True               # the head is the token embedding
    embed_scale: float = 1.0        # of the token embeddings
    attention_scale: float = 0.0    # of q k^T; 1 / sqrt(head_dim)
    residual_scale: float = 1.0     # of what attention and FFN add
    logit_scale: float = 1.0

    def __post_init__(self):
        for name in SHAPE:
            bounded(name, getattr(self, name), table=SHAPE)
        if self.d_head < 1:
            raise ValueError(f"n_embd is {self.n_embd}, less than n_head, {self.n_head}")
        for name, allowed in CHOICES.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(allowed)}")
        unknown = set(self.bias.split()) - set(PARTS_WITH_BIAS)
        if unknown:
            raise ValueError(f"bias names {' '.join(sorted(unknown))}; it can name {' '.join(PARTS_WITH_BIAS)}")
        if self.n_head % self.kv_heads:
            raise ValueError(f"n_head {self.n_head} is not a multiple of n_kv_head {self.kv_heads}")
        if not self.head_dim and self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")
        rotated = self.rope.dim or self.d_head
        if self.position == "rope" and rotated + rotated % 2 > self.d_head:
            raise ValueError(f"rotary positions need pairs: {rotated} numbers of a head of {self.d_head} have none")
        if self.windows and (len(self.windows) != self.n_layer or min(self.windows) < 0):
            raise ValueError(f"windows is {self.windows}; it must name one, or 0, for each of {self.n_layer} layers")

    @property
    def d_head(self):
        """Width of a head."""
        return self.head_dim or self.n_embd // max(self.n_head, 1)

    @property
    def kv_heads(self):
        """Heads of keys and values: fewer than n_head in grouped-query attention."""
        return self.n_kv_head or self.n_head

    @property
    def d_ffn(self):
        """Width of the FFN's inside."""
        return self.n_ffn or 4 * self.n_embd

    def has_bias(self, part):
        """Whether a part, one of PARTS_WITH_BIAS, has a bias."""
        return part in self.bias.split()


def preset(fields):
    """The GPTConfig of plain fields, where rope and local_rope are dicts of Rope's."""
    ropes = {name: Rope(**fields[name]) for name in ("rope", "local_rope") if name in fields}
    return GPTConfig(**fields | ropes)


PRESETS = {name: preset(fields) for name, fields in presets.PRESETS.items()}

# -----------------------------------------------------------------------------
# parts


class Linear(nn.Linear):
    """nn.Linear that casts its weight to the type of its input."""

    def forward(self, x):
        return linear(x, *self.dense(x.dtype))

    def dense(self, dtype):
        """Weight (out, in) and bias (out,) or None in a type; generation makes them once."""
        return self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype)


class Norm(nn.Module):
    """
    LayerNorm (Ba et al. 2016) or RMSNorm (Zhang and Sennrich 2019) over the last dimension; statistics in
    float32. A weight of two dimensions holds one for each head of x (B, heads, T, head_dim).
    """

    def __init__(self, config, *shape, bias):
        super().__init__()
        self.kind, self.eps, self.offset = config.norm, config.norm_eps, config.norm_offset
        self.weight = nn.Parameter(torch.full(shape, 1 - self.offset))
        self.bias = nn.Parameter(torch.zeros(shape)) if bias and config.norm == "layer" else None

    def forward(self, x):
        weight = self.weight
        # The weight is stored without its offset: it is small, and a sum in bfloat16 would round it away.
        weight = weight.to(accurate(x.dtype)) + self.offset if self.offset else weight.to(x.dtype)
        if weight.dim() == 2:
            return self.normed(x, weight.new_ones(x.size(-1))) * weight.unsqueeze(1)
        return self.normed(x, weight)

    def normed(self, x, weight):
        """x with statistics and a weight (width,) applied."""
        if self.kind == "layer":
            bias = None if self.bias is None else self.bias.to(x.dtype)
            return F.layer_norm(x, weight.shape, weight, bias, self.eps)
        # A GPU's fused kernel keeps what RMSNorm keeps, but takes only a weight of the type of x.
        if device_type(x) == "cpu" or simulating() or weight.dtype != x.dtype:
            return rms_norm(x, weight, self.eps)
        return F.rms_norm(x, weight.shape, weight, self.eps)


class Embed(nn.Module):
    """Tokens and positions to vectors."""

    def __init__(self, config, dtype):
        """dtype: of the computation, to which the scale is rounded."""
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.n_embd)
        self.scale = round_to(config.embed_scale, dtype)
        self.offset = config.position_offset
        rows = config.block_size + self.offset
        self.positions = nn.Embedding(rows, config.n_embd) if config.position == "learned" else None

    def forward(self, tokens, pos, past, lengths=None):
        """
        tokens (B, T); pos (T,) or (B, T), negative for padding; past: tokens already in the cache; lengths: of
        sequences that lie side by side, with B = 1.

        Returns x (B, T', n_embd) and its positions, T' >= T: a replacement may prepend what it likes to each
        sequence where past is 0.
        """
        return self.at(self.tokens(tokens), pos), pos

    def at(self, x, pos):
        """Vectors (.., n_embd) as they enter the first block when they stand at positions pos."""
        x = scaled(x, self.scale)
        if self.positions is not None:
            x = x + self.positions(pos.clamp(min=0) + self.offset)
        return x


def round_to(number, dtype):
    """A number as a type of floating point has it."""
    return torch.tensor(number, dtype=dtype, device="cpu").item()


def scaled(x, scale):
    """x times a number, without work where that is 1."""
    return x if scale == 1 else x * scale


class Attention(nn.Module):
    """Causal self-attention with n_kv_head shared keys and values. layer: its index."""

    def __init__(self, config, layer):
        super().__init__()
        self.head_dim = config.d_head
        self.window = config.windows[layer] if config.windows else 0
        self.rope_kind = self.kind_of_rope(config, layer)
        self.scale = config.attention_scale * math.sqrt(config.d_head) or 1.0     # beside attend's own
        queries, keys = config.n_head * config.d_head, config.kv_heads * config.d_head
        self.q = Linear(config.n_embd, queries, bias=config.has_bias("q"))
        self.k = Linear(config.n_embd, keys, bias=config.has_bias("k"))
        self.v = Linear(config.n_embd, keys, bias=config.has_bias("v"))
        self.out = Linear(queries, config.n_embd, bias=config.has_bias("out"))
        self.by_width = config.qk_norm == "width"
        self.q_norm = self.k_norm = None
        if config.qk_norm != "none":
            shapes = {"head": [(self.head_dim,)] * 2, "width": [(queries,), (keys,)],
                      "heads": [(config.n_head, self.head_dim), (config.kv_heads, self.head_dim)]}
            self.q_norm, self.k_norm = (Norm(config, *shape, bias=False) for shape in shapes[config.qk_norm])

    def kind_of_rope(self, config, layer):
        """Which of the model's rotary positions this layer has: "rope", "local_rope" or "none"."""
        if config.position != "rope" or layer in config.unrotated:
            return "none"
        return "local_rope" if self.window and config.local_rope else "rope"

    def heads(self, x, norm=None):
        """(B, T, heads * head_dim) -> (B, heads, T, head_dim), through a norm where there is one."""
        if norm is not None and self.by_width:
            x = norm(x)
        x = x.view(x.size(0), x.size(1), -1, self.head_dim).transpose(1, 2)
        return x if norm is None or self.by_width else norm(x)

    def project(self, x, rope):
        """x (B, T, n_embd) -> q, k, v as (B, heads, T, head_dim), positions applied."""
        q, k, v = generation.each(x, self.q, self.k, self.v)
        q, k, v = self.heads(q, self.q_norm), self.heads(k, self.k_norm), self.heads(v)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        return scaled(q, self.scale), k, v

    def attend(self, q, k, v, mask):
        """
        softmax(q k^T / sqrt(head_dim)) v.

        mask: bool (B or 1, 1, T, S), True where seen; None for causal within the window, where the first
        S - T keys are seen by all; or the lengths of sequences that lie side by side, each on its own.
        """
        T, S = q.size(2), k.size(2)
        if isinstance(mask, list):
            return self.attend_apart(q, k, v, mask)
        if T == 1 < S and device_type(q) == "cpu":               # Without a mask it sees all keys.
            return attention_of_one(q, k, v, mask)
        # In float32 a compiler takes torch's own kernel along with what is around it.
        traced = torch.compiler.is_compiling() and q.dtype == torch.float32
        if mask is None and device_type(q) == "cpu" and not traced:
            return causal_attention(q, k, v, self.window)
        if mask is None and T > 1 and (S > T or 0 < self.window < T):
            mask = causal_mask(T, S, self.window, q.device)
        groups = q.size(1) // k.size(1)
        if groups > 1 and T > 1 and (mask is not None or q.dtype == torch.float32) and device_type(q) != "cpu":
            # For masks or float32 a GPU's kernels without scores want as many heads of keys as of queries.
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        if simulating():
            return simulated_attention(q, k, v, mask)
        causal = {"is_causal": True} if mask is None and T > 1 else {}       # True, not a compiler's symbol
        shared = {"enable_gqa": True} if q.size(1) != k.size(1) else {}
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **causal, **shared)

    def attend_apart(self, q, k, v, lengths):
        """attend for sequences side by side; those of one length that follow each other go together."""
        shared = k.size(2) - q.size(2)                           # keys that all of them see
        own = (runs(q, lengths), runs(k[:, :, shared:], lengths), runs(v[:, :, shared:], lengths))
        results = []
        for q_run, k_run, v_run in zip(*own):
            k_shared = k[:, :, :shared].expand(len(q_run), -1, -1, -1)
            v_shared = v[:, :, :shared].expand(len(q_run), -1, -1, -1)
            k_run = torch.cat((k_shared, k_run), 2)
            v_run = torch.cat((v_shared, v_run), 2)
            y = self.attend(q_run, k_run, v_run, None)
            results.append(y.transpose(0, 1).flatten(1, 2))      # (n, heads, T, d) -> (heads, n * T, d)
        return torch.cat(results, 1).unsqueeze(0)

    def forward(self, x, rope, mask, cache):
        q, k, v = self.project(x, rope)
        if cache is not None:
            k, v = cache.append(k, v)
        y = self.attend(q, k, v, mask)
        return self.out(y.transpose(1, 2).flatten(2))            # (B, heads, T, d) -> (B, T, heads * d)


def runs(x, lengths):
    """(1, heads, T, head_dim) of sequences side by side -> for each n of one length (n, heads, T, head_dim)."""
    start = 0
    for length, run in groupby(lengths):
        n = len(list(run))
        yield x[0, :, start:start + n * length].unflatten(1, (n, length)).transpose(0, 1)
        start += n * length


class FFN(nn.Module):
    """down(act(up(x))), or gated as in Shazeer 2020: down(act(gate(x)) * up(x))."""

    def __init__(self, config):
        super().__init__()
        d, width = config.n_embd, config.d_ffn
        self.act = ACTIVATIONS[config.activation]
        self.gate = Linear(d, width, bias=config.has_bias("gate")) if config.gated else None
        self.up = Linear(d, width, bias=config.has_bias("up"))
        self.down = Linear(width, d, bias=config.has_bias("down"))

    def forward(self, x):
        if self.gate is None:
            return self.down(self.act(self.up(x)))
        gate, up = generation.each(x, self.gate, self.up)
        return self.down(self.act(gate) * up)


class Block(nn.Module):
    """The slides' transformer block; the norms stand before the parts, after them, or both."""

    def __init__(self, config, layer):
        super().__init__()
        def norm(place):
            there = config.norm_place in (place, "both")
            return Norm(config, config.n_embd, bias=config.has_bias("norm")) if there else nn.Identity()

        self.parallel, self.residual_scale = config.parallel, config.residual_scale
        self.norm1, self.attn, self.after1 = norm("before"), Attention(config, layer), norm("after")
        self.norm2 = self.norm1 if config.shared_norm else norm("before")
        self.ffn, self.after2 = FFN(config), norm("after")

    def attention(self, x, rope, mask, cache):
        """What the attention adds to x."""
        return scaled(self.after1(self.attn(self.norm1(x), rope, mask, cache)), self.residual_scale)

    def feed_forward(self, x):
        """What the FFN adds."""
        return scaled(self.after2(self.ffn(self.norm2(x))), self.residual_scale)

    def forward(self, x, rope=None, mask=None, cache=None):
        y = x + self.attention(x, rope, mask, cache)
        return y + self.feed_forward(x if self.parallel else y)


# -----------------------------------------------------------------------------
# the model


class GPT(nn.Module):
    """
    The transformer. `checkpointing` recomputes each block in the backward pass instead of keeping its
    activations.
    """

    def __init__(self, config, dtype=torch.float32):
        """config: GPTConfig; dtype: of the computation, not of the weights, which are float32 here."""
        super().__init__()
        self.config, self.dtype, self.checkpointing = config, dtype, False
        self.reserved = 0                                        # positions that the tokens cannot have
        self.attached = None                                     # what peft.py has put on the model
        self.origin = None                                       # the checkpoint that it was read from
        self.base_fingerprint = None                             # hash of the weights as they came
        self.embed = Embed(config, dtype)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.norm = Norm(config, config.n_embd, bias=config.has_bias("norm"))
        self.head = Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tied:
            self.head.weight = self.embed.tokens.weight
        self.make_frequencies()
        self.reset()

    def make_frequencies(self, device=None):
        """Makes the frequencies of the rotary positions, buffers named after the configuration's fields."""
        if self.config.position != "rope":
            return
        device = device or self.embed.tokens.weight.device
        for name in ("rope", "local_rope"):
            rope = getattr(self.config, name)
            with torch.device("cpu"):                            # For "meta" torch would import its compiler, a second.
                frequency = None if rope is None else frequencies(rope, self.config.d_head).to(device)
            self.register_buffer(f"{name}_frequencies", frequency, persistent=False)

    def reset(self):
        """
        Normal weights of deviation 0.02, divided by sqrt(2 n_layer) where a part ends in a residual
        (Radford et al. 2019).
        """
        for name, p in self.named_parameters():
            if p.dim() == 2 and "norm" not in name:
                ends_in_residual = name.endswith(("out.weight", "down.weight"))
                shrink = math.sqrt(2 * self.config.n_layer) if ends_in_residual else 1
                nn.init.normal_(p, std=0.02 / shrink)

    def rope(self, pos):
        """
        {kind of positions: (cos, sin)} for positions (T,) or (B, T): (1 or B, 1, T, rotated / 2) each, in the
        type of the computation; None for layers without.
        """
        pos = pos if pos.dim() == 2 else pos.unsqueeze(0)
        pos = pos.clamp(min=0).unsqueeze(-1)
        ropes = {"none": None}
        for name in dict.fromkeys(block.attn.rope_kind for block in self.blocks):
            if name == "none":
                continue
            frequency = self.get_buffer(f"{name}_frequencies")
            angle = (pos.to(frequency.dtype) * frequency).unsqueeze(1)
            magnitude = getattr(self.config, name).magnitude
            ropes[name] = tuple(scaled(turn, magnitude).to(self.dtype) for turn in (angle.cos(), angle.sin()))
        return ropes

    def hidden(self, tokens, cache=None, pos=None, lengths=None):
        """The last block's output after the final norm. tokens (B, T) -> (B, T, n_embd); the rest as in forward."""
        B, T = tokens.shape
        past = cache.seen if cache is not None else 0
        needed = past + (max(lengths) if lengths else T) + self.reserved
        # Behind padding a sequence has fewer positions than the cache; lib/generation.py ends each in time.
        if needed > self.config.block_size and not (past and cache.padded):
            raise ValueError(f"{needed} positions, but the model's context is {self.config.block_size}")
        if lengths:
            pos = torch.cat([torch.arange(n, device=tokens.device) for n in lengths])
        if pos is None:
            pos = past + torch.arange(T, device=tokens.device)
        if cache is not None:
            cache.seen = past + T
            cache.next = pos.expand(B, -1)[:, -1:] + 1
        x, pos = self.embed(tokens, pos, past, lengths)
        x, ropes = x.to(self.dtype), self.rope(pos)
        before = (x.size(1) - T) // len(lengths or [T])          # positions that embed put before a sequence
        apart = [before + n for n in lengths] if lengths else None
        masks = self.masks(cache, pos.expand(B, -1))
        recompute = self.checkpointing and torch.is_grad_enabled() and cache is None
        for i, block in enumerate(self.blocks):
            rope, mask = ropes[block.attn.rope_kind], masks.get(block.attn.window, apart)
            if recompute:
                x = checkpoint(block, x, rope, mask, None, use_reentrant=False)
            else:
                x = block(x, rope, mask, cache.layers[i] if cache is not None else None)
        if before and lengths:
            x = torch.cat([sequence[:, before:] for sequence in x.split(apart, 1)], 1)
        return scaled(self.norm(x[:, -T:]), self.config.logit_scale)

    def masks(self, cache, pos):
        """{window: mask} of tokens at positions (B, T) that are added to a cache; {} without one."""
        if cache is None:
            return {}
        cache.add(pos)
        return {window: cache.mask(pos, window) for window in {block.attn.window for block in self.blocks}}

    def forward(self, tokens, targets=None, label_smoothing=0.0, lengths=None):
        """
        tokens (B, T) int64. Without targets: (logits (B, T, vocab_size), None).

        With targets (B, T), -1 where ignored: (None, mean cross-entropy), the logits in chunks. lengths: where
        B is 1, those of sequences that lie side by side in the row and know nothing of each other.
        """
        x = self.hidden(tokens, lengths=lengths)
        if targets is None:
            return self.head(x), None
        return None, cross_entropy(x.flatten(0, 1), self.head.weight, targets.flatten(), label_smoothing)

    def num_params(self):
        """Parameters, the tied head once."""
        return sum(p.numel() for p in self.parameters())

    def stream(self, prompts, max_new_tokens, temperature=1.0, top_k=None, top_p=None, stop=None,
               generator=None):
        """
        Yields the next token of every prompt, (B,) int64 on the CPU, -1 for rows that have ended.

        prompts: lists of token ids of any lengths. stop: an id or several; the stop token is yielded.
        """
        return generation.stream(self, prompts, max_new_tokens, temperature, top_k, top_p, stop, generator)

    def generate(self, tokens, max_new_tokens, temperature=1.0, top_k=None, top_p=None, stop=None,
                 generator=None):
        """
        Continues prompts with a key-value cache. Returns lists, one a prompt: the prompt and what follows.

        tokens: (B, T) int64, or a list of lists of different lengths. temperature 0 is greedy; top_k keeps
        the k likeliest tokens, top_p the fewest whose probability reaches p. Generation ends at `stop`
        (kept in the result), after max_new_tokens, or at the context's end, for each prompt on its own.
        """
        prompts = tokens.tolist() if isinstance(tokens, torch.Tensor) else [list(p) for p in tokens]
        results = [list(p) for p in prompts]
        for step in self.stream(prompts, max_new_tokens, temperature, top_k, top_p, stop, generator):
            for row, token in zip(results, step.tolist()):
                if token >= 0:
                    row.append(token)
        return results
