"""
One GPT-style transformer: GPT-2, OPT and Llama by configuration. It knows nothing of PEFT or quantization.

    from model import GPT, PRESETS
    model = GPT(PRESETS["gpt2"])
    logits, _ = model(tokens)             # tokens (B, T) int64 -> (B, T, vocab_size)
    _, loss = model(tokens, targets)      # mean cross-entropy where targets != -1; the logits never exist at once

Three things are left open for others to replace, and are written so that they can be: a linear layer is
only called and asked for `in_features` and `out_features`; `Attention.forward` and `Block.forward` read
like the slides; and `Embed` may put positions of its own in front of the tokens', because the model keeps
the last T.

The weights may lie in another type than the computation's (float32 masters, bfloat16 activations): every
layer casts its weight to the type of its input. Autocast does the same, but keeps a cast copy of each
weight until the step ends.
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from lib.kernels import CausalAttention, RMSNorm, cross_entropy, device_type, simulating

# -----------------------------------------------------------------------------
# configuration

ACTIVATIONS = {
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
}
CHOICES = {"position": ("learned", "rope"), "norm": ("layer", "rms"), "activation": tuple(ACTIVATIONS)}


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
    position_offset: int = 0        # OPT's table of positions begins with two unused rows
    norm: str = "layer"             # or "rms"
    norm_eps: float = 1e-5
    activation: str = "gelu_tanh"   # or "gelu", "relu", "silu"
    gated: bool = False             # down(act(gate(x)) * up(x)) instead of down(act(up(x)))
    bias: bool = True               # in linear layers and LayerNorms
    tied: bool = True               # the head is the token embedding
    rope_theta: float = 10000.0

    def __post_init__(self):
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd", "kv_heads", "d_ffn", "d_head"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        for name, allowed in CHOICES.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(allowed)}")
        if self.n_head % self.kv_heads:
            raise ValueError(f"n_head {self.n_head} is not a multiple of n_kv_head {self.kv_heads}")
        if not self.head_dim and self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")
        if self.position == "rope" and self.d_head % 2:
            raise ValueError(f"rotary positions need an even head_dim, not {self.d_head}")

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


_opt = GPTConfig(vocab_size=50272, block_size=2048, n_layer=24, n_head=32, n_embd=2048, position_offset=2,
                 activation="relu")
_llama = GPTConfig(vocab_size=32000, block_size=2048, n_layer=32, n_head=32, n_embd=4096, n_ffn=11008, position="rope",
                   norm="rms", norm_eps=1e-6, activation="silu", gated=True, bias=False, tied=False)
_bert = GPTConfig(vocab_size=30522, block_size=512, activation="gelu", norm_eps=1e-12)     # the shape alone: BERT is post-LN
PRESETS = {
    "gpt2": GPTConfig(),
    "gpt2-medium": GPTConfig(n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": GPTConfig(n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl": GPTConfig(n_layer=48, n_head=25, n_embd=1600),
    "opt-1.3b": _opt,
    "tinyllama-1.1b": replace(_llama, n_layer=22, n_embd=2048, n_kv_head=4, n_ffn=5632, norm_eps=1e-5),
    "llama-7b": _llama,
    "llama-13b": replace(_llama, n_layer=40, n_head=40, n_embd=5120, n_ffn=13824),
    "llama-33b": replace(_llama, n_layer=60, n_head=52, n_embd=6656, n_ffn=17920),
    "llama-65b": replace(_llama, n_layer=80, n_head=64, n_kv_head=64, n_embd=8192, n_ffn=22016, norm_eps=1e-5),
    "bert-base": _bert,
    "bert-large": replace(_bert, n_layer=24, n_head=16, n_embd=1024),
}

# -----------------------------------------------------------------------------
# parts


class Linear(nn.Linear):
    """nn.Linear that casts its weight to the type of its input."""

    def forward(self, x):
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class Norm(nn.Module):
    """LayerNorm (Ba et al. 2016) or RMSNorm (Zhang and Sennrich 2019); statistics in float32."""

    def __init__(self, config):
        super().__init__()
        self.kind, self.eps = config.norm, config.norm_eps
        has_bias = config.bias and config.norm == "layer"
        self.weight = nn.Parameter(torch.ones(config.n_embd))
        self.bias = nn.Parameter(torch.zeros(config.n_embd)) if has_bias else None

    def forward(self, x):
        weight = self.weight.to(x.dtype)
        if self.kind == "layer":
            bias = None if self.bias is None else self.bias.to(x.dtype)
            return F.layer_norm(x, weight.shape, weight, bias, self.eps)
        if device_type(x) == "cpu" or simulating():      # A GPU's fused kernel keeps what RMSNorm keeps.
            return RMSNorm.apply(x, weight, self.eps)
        return F.rms_norm(x, weight.shape, weight, self.eps)


class Embed(nn.Module):
    """Tokens and positions to vectors."""

    def __init__(self, config):
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.n_embd)
        self.offset = config.position_offset
        rows = config.block_size + self.offset
        self.positions = nn.Embedding(rows, config.n_embd) if config.position == "learned" else None

    def forward(self, tokens, pos, past):
        """
        tokens (B, T); pos (T,) or (B, T), negative for padding; past: tokens already in the cache.

        Returns x (B, T', n_embd) and its positions, T' >= T: a replacement may prepend what it likes where
        past is 0.
        """
        x = self.tokens(tokens)
        if self.positions is not None:
            x = x + self.positions(pos.clamp(min=0) + self.offset)
        return x, pos


def rotate(x, rope):
    """
    Rotary positions (Su et al. 2021, eq. 34), the halves paired as in Llama. x: (B, heads, T, head_dim).
    """
    cos, sin = rope
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


class Attention(nn.Module):
    """Causal self-attention with n_kv_head shared keys and values."""

    def __init__(self, config):
        super().__init__()
        self.head_dim = config.d_head
        queries, keys = config.n_head * config.d_head, config.kv_heads * config.d_head
        self.q = Linear(config.n_embd, queries, bias=config.bias)
        self.k = Linear(config.n_embd, keys, bias=config.bias)
        self.v = Linear(config.n_embd, keys, bias=config.bias)
        self.out = Linear(queries, config.n_embd, bias=config.bias)

    def heads(self, x):
        """(B, T, heads * head_dim) -> (B, heads, T, head_dim)"""
        return x.view(x.size(0), x.size(1), -1, self.head_dim).transpose(1, 2)

    def project(self, x, rope):
        """x (B, T, n_embd) -> q, k, v as (B, heads, T, head_dim), positions applied."""
        q, k, v = self.heads(self.q(x)), self.heads(self.k(x)), self.heads(self.v(x))
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        return q, k, v

    def attend(self, q, k, v, mask):
        """
        softmax(q k^T / sqrt(head_dim)) v.

        mask: bool (B or 1, 1, T, S), True where seen; None for causal, where the first S - T keys are seen
        by all.
        """
        T, S = q.size(2), k.size(2)
        if mask is None and device_type(q) == "cpu" and not torch.compiler.is_compiling():
            return CausalAttention.apply(q, k, v)
        if mask is None and S > T:
            mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
        shared = {"enable_gqa": True} if q.size(1) != k.size(1) else {}
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, **shared)

    def forward(self, x, rope, mask, cache):
        q, k, v = self.project(x, rope)
        if cache is not None:
            k, v = cache.append(k, v)
        y = self.attend(q, k, v, mask)
        return self.out(y.transpose(1, 2).flatten(2))            # (B, heads, T, d) -> (B, T, heads * d)


class FFN(nn.Module):
    """down(act(up(x))), or gated as in Shazeer 2020: down(act(gate(x)) * up(x))."""

    def __init__(self, config):
        super().__init__()
        self.act = ACTIVATIONS[config.activation]
        self.gate = Linear(config.n_embd, config.d_ffn, bias=config.bias) if config.gated else None
        self.up = Linear(config.n_embd, config.d_ffn, bias=config.bias)
        self.down = Linear(config.d_ffn, config.n_embd, bias=config.bias)

    def forward(self, x):
        if self.gate is None:
            return self.down(self.act(self.up(x)))
        return self.down(self.act(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """
    The slides' transformer block, with the LayerNorms before the parts (pre-LN) as GPT-2, OPT and Llama
    have them.
    """

    def __init__(self, config):
        super().__init__()
        self.norm1, self.attn = Norm(config), Attention(config)
        self.norm2, self.ffn = Norm(config), FFN(config)

    def forward(self, x, rope=None, mask=None, cache=None):
        x = x + self.attn(self.norm1(x), rope, mask, cache)
        return x + self.ffn(self.norm2(x))


# -----------------------------------------------------------------------------
# the key-value cache


class LayerCache:
    """Keys and values of one layer, (B, n_kv_head, size, head_dim), filled from the left."""

    def __init__(self, size):
        self.size, self.length, self.k, self.v = size, 0, None, None

    def append(self, k, v):
        """Adds (B, heads, T, head_dim) and returns all keys and values so far."""
        if self.k is None:
            B, heads, _, head_dim = k.shape
            self.k = k.new_empty(B, heads, self.size, head_dim)
            self.v = v.new_empty(B, heads, self.size, head_dim)
        start, end = self.length, self.length + k.size(2)
        self.k[:, :, start:end] = k
        self.v[:, :, start:end] = v
        self.length = end
        return self.k[:, :, :end], self.v[:, :, :end]


class Cache:
    """One LayerCache a layer, and the position of every cached key (B, S), negative for padding."""

    def __init__(self, n_layer, size):
        self.layers = [LayerCache(size) for _ in range(n_layer)]
        self.pos = None
        self.seen = 0                                             # tokens so far
        self.next = None                                          # position (B, 1) of the next token

    def mask(self, pos):
        """Adds the positions (B, T) of new tokens; returns who sees whom, bool (B, 1, T, S)."""
        self.pos = pos if self.pos is None else torch.cat((self.pos, pos), 1)
        key, query = self.pos[:, None, None, :], pos[:, None, :, None]
        # Padding sees padding, because a query that sees nothing would be NaN.
        return (key <= query) & (key >= 0) | (key == query)

    def select(self, rows):
        """Reorders the batch: row i becomes what row rows[i] was (beam search, finished rows)."""
        self.pos, self.next = self.pos[rows], self.next[rows]
        for layer in self.layers:
            layer.k, layer.v = layer.k[rows], layer.v[rows]


# -----------------------------------------------------------------------------
# the model


class GPT(nn.Module):
    """
    The transformer. `checkpointing` recomputes each block in the backward pass instead of keeping its
    activations.
    """

    def __init__(self, config, dtype=torch.float32):
        """
        config: GPTConfig; dtype: the type of the computation, not of the weights (they are float32 here).
        """
        super().__init__()
        self.config, self.dtype, self.checkpointing = config, dtype, False
        self.reserved = 0                                        # positions that the tokens cannot have
        self.attached = None                                     # what peft.py has put on the model
        self.base_fingerprint = None                             # hash of the weights as they came
        self.embed = Embed(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = Norm(config)
        self.head = Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tied:
            self.head.weight = self.embed.tokens.weight
        if config.position == "rope":
            cos, sin = self._rope_table()
            self.register_buffer("cos", cos, persistent=False)
            self.register_buffer("sin", sin, persistent=False)
        self.reset()

    def reset(self):
        """
        GPT-2's initialization: normal of deviation 0.02, divided by sqrt(2 n_layer) where a part ends in a
        residual.
        """
        for name, p in self.named_parameters():
            if p.dim() == 2:
                ends_in_residual = name.endswith(("out.weight", "down.weight"))
                shrink = math.sqrt(2 * self.config.n_layer) if ends_in_residual else 1
                nn.init.normal_(p, std=0.02 / shrink)

    def _rope_table(self):
        d = self.config.d_head
        frequency = 1.0 / self.config.rope_theta ** (torch.arange(0, d, 2).float() / d)
        angle = torch.outer(torch.arange(self.config.block_size).float(), frequency)
        return angle.cos(), angle.sin()

    def rope(self, pos):
        """
        cos and sin for positions (T,) or (B, T): (1 or B, 1, T, head_dim / 2) in the type of the computation.
        """
        if self.config.position != "rope":
            return None
        pos = pos if pos.dim() == 2 else pos.unsqueeze(0)
        pos = pos.clamp(min=0)
        return self.cos[pos].unsqueeze(1).to(self.dtype), self.sin[pos].unsqueeze(1).to(self.dtype)

    def hidden(self, tokens, cache=None, pos=None):
        """The last block's output after the final norm. tokens (B, T) -> (B, T, n_embd)."""
        B, T = tokens.shape
        past = cache.seen if cache is not None else 0
        needed = past + T + self.reserved
        if needed > self.config.block_size:
            raise ValueError(f"{needed} positions, but the model's context is {self.config.block_size}")
        if pos is None:
            pos = past + torch.arange(T, device=tokens.device)
        if cache is not None:
            cache.seen = past + T
            cache.next = pos.expand(B, -1)[:, -1:] + 1
        x, pos = self.embed(tokens, pos, past)
        mask = None if cache is None else cache.mask(pos.expand(B, -1))
        x, rope = x.to(self.dtype), self.rope(pos)
        recompute = self.checkpointing and torch.is_grad_enabled() and cache is None
        for i, block in enumerate(self.blocks):
            if recompute:
                x = checkpoint(block, x, rope, mask, None, use_reentrant=False)
            else:
                x = block(x, rope, mask, cache.layers[i] if cache is not None else None)
        return self.norm(x[:, -T:])

    def forward(self, tokens, targets=None, label_smoothing=0.0):
        """
        tokens (B, T) int64. Without targets: (logits (B, T, vocab_size), None).

        With targets (B, T), -1 where ignored: (None, mean cross-entropy), the logits in chunks.
        """
        x = self.hidden(tokens)
        if targets is None:
            return self.head(x), None
        return None, cross_entropy(x.flatten(0, 1), self.head.weight, targets.flatten(), label_smoothing)

    def num_params(self):
        """Parameters by their logical shapes, the tied head once."""
        return sum(p.numel() for p in self.parameters())

    @torch.inference_mode()
    def stream(self, prompts, max_new_tokens, temperature=1.0, top_k=None, top_p=None, stop=None,
               generator=None):
        """
        Yields the next token of every prompt, (B,) int64 on the CPU, -1 for rows that have ended.

        prompts: lists of token ids of any lengths. stop: an id or several; the stop token is yielded.
        """
        tokens, pos = pad_left(prompts, self.head.weight.device)
        stops = torch.tensor([stop] if isinstance(stop, int) else list(stop or ()), dtype=torch.long)
        cache = Cache(self.config.n_layer, self.config.block_size)
        ended = torch.zeros(len(prompts), dtype=torch.bool)
        for _ in range(max_new_tokens):
            x = self.hidden(tokens, cache, pos)
            token = sample(self.head(x[:, -1]), temperature, top_k, top_p, generator)
            yield torch.where(ended, -1, token.cpu())
            ended |= torch.isin(token.cpu(), stops)
            if ended.all() or cache.seen + self.reserved == self.config.block_size:
                return
            tokens, pos = token[:, None], cache.next

    def generate(self, tokens, max_new_tokens, temperature=1.0, top_k=None, top_p=None, stop=None,
                 generator=None):
        """
        Continues prompts with a key-value cache. Returns lists, one a prompt: the prompt and what follows.

        tokens: (B, T) int64, or a list of lists of different lengths. temperature 0 is greedy; top_k keeps
        the k likeliest tokens, top_p the fewest whose probability reaches p. Generation ends at `stop`
        (kept in the result), after max_new_tokens, or at the context's end.
        """
        prompts = tokens.tolist() if isinstance(tokens, torch.Tensor) else [list(p) for p in tokens]
        results = [list(p) for p in prompts]
        for step in self.stream(prompts, max_new_tokens, temperature, top_k, top_p, stop, generator):
            for row, token in zip(results, step.tolist()):
                if token >= 0:
                    row.append(token)
        return results


def pad_left(prompts, device):
    """
    Lists of token ids -> tokens and positions, (B, T) int64 both; padding stands at the left and has
    negative positions.
    """
    longest = max(map(len, prompts))
    if min(map(len, prompts)) < 1:
        raise ValueError("an empty prompt: give at least the beginning-of-sequence token")
    padding = [longest - len(p) for p in prompts]
    tokens = torch.tensor([[0] * n + list(p) for n, p in zip(padding, prompts)], device=device)
    return tokens, torch.arange(longest, device=device) - torch.tensor(padding, device=device)[:, None]


def sample(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """Draws a token from each row of logits (B, V): (B,) int64. temperature 0 takes the largest."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.size(-1):
        least = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p is not None:
        ordered, index = logits.softmax(-1).sort(descending=True)
        beyond = ordered.cumsum(-1) - ordered >= top_p           # The token that crosses p stays.
        logits = logits.masked_fill(beyond.scatter(1, index, beyond), -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)
