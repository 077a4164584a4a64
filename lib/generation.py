"""
What generation needs: the key-value cache, linear layers laid out for products of few rows, prompts of
different lengths in one batch, drawing a token.
"""

import sys
from contextlib import contextmanager, nullcontext

import torch
import torch.nn as nn
import torch.nn.functional as F

from lib.kernels import device_type, linear, simulating


class LayerCache:
    """Keys and values of one layer, (B, n_kv_head, size, head_dim), filled from the left. It grows when full."""

    def __init__(self, size):
        self.size, self.length, self.k, self.v = size, 0, None, None

    def append(self, k, v):
        """Adds (B, heads, T, head_dim) and returns all keys and values so far."""
        start, end = self.length, self.length + k.size(2)
        if self.k is None or end > self.size:
            self.size = max(self.size, end if self.k is None else 2 * end)
            self.k, self.v = self.room(k, self.k), self.room(v, self.v)
        self.k[:, :, start:end] = k
        self.v[:, :, start:end] = v
        self.length = end
        return self.k[:, :, :end], self.v[:, :, :end]

    def room(self, new, old):
        """A tensor for size keys or values like new, which begins with the old ones."""
        B, heads, _, head_dim = new.shape
        whole = new.new_empty(B, heads, self.size, head_dim)
        if old is not None:
            whole[:, :, :self.length] = old[:, :, :self.length]
        return whole


class Cache:
    """One LayerCache a layer, and the position of every cached key (B, S), negative for padding."""

    def __init__(self, n_layer, size, padded=True):
        """size: for how many positions there is room at first; padded: whether prompts may have padding."""
        self.layers = [LayerCache(size) for _ in range(n_layer)]
        self.padded = padded
        self.pos = None
        self.seen = 0                                             # tokens so far
        self.next = None                                          # position (B, 1) of the next token

    def add(self, pos):
        """Adds the positions (B, T) of new tokens."""
        self.pos = pos if self.pos is None else torch.cat((self.pos, pos), 1)

    def mask(self, pos, window):
        """
        Which keys the tokens at positions (B, T) see, bool (B, 1, T, S); None where each sees all before it.
        window: 0 for none.
        """
        if not self.padded and not window:
            return None
        key, query = self.pos[:, None, None, :], pos[:, None, :, None]
        seen = (key <= query) & (key >= 0)
        if window:
            seen &= query - key < window
        # Padding sees padding, because a query that sees nothing would be NaN.
        return seen | (key == query)

    def select(self, rows):
        """Reorders the batch: row i becomes what row rows[i] was (beam search, finished rows)."""
        self.pos, self.next = self.pos[rows], self.next[rows]
        for layer in self.layers:
            layer.k, layer.v = layer.k[rows], layer.v[rows]


def cache_for(model, prompts, max_new_tokens):
    """A Cache with room for what follows the prompts, lists of ids."""
    lengths = {len(prompt) for prompt in prompts}
    most_new = min(max_new_tokens, int(room_behind(model, prompts).max()))
    size = model.reserved + max(lengths) + most_new
    return Cache(model.config.n_layer, size, padded=len(lengths) > 1)


def room_behind(model, prompts):
    """How many tokens the model's context holds behind each of the prompts, (B,) int64 on the CPU."""
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    return model.config.block_size - model.reserved - lengths


# -----------------------------------------------------------------------------
# linear layers while tokens are generated

# A token's products take as long as reading the weights. So ready_layers, below, makes a stored weight dense
# once and not for every token; adds B A to it where that is exact, and else appends B as further columns;
# makes one layer of those that read the same input; and on a CPU has oneDNN lay the weight out anew where the
# batch has several rows. A single row is fastest from the plain weight, by the right library: kernels.linear
# in float32, without_onednn in bfloat16. Milliseconds of a product with SmolLM2-135M's head (49,152 x 576),
# on 2 cores of an EPYC with AVX512-BF16:
#
#                         by torch's choice    by the other library    packed by oneDNN
#   float32     1 row     9.8 (MKL)            3.8 (oneDNN)            3.9
#   float32     32 rows   23.6 (MKL)           14.3 (oneDNN)           9.9
#   bfloat16    1 row     3.6 (oneDNN)         1.8 (torch itself)      2.3
#   bfloat16    32 rows   12.7 (oneDNN)        -                       9.2


class ReadyLinear(nn.Module):
    """
    Frozen linear layers of one input, in one product.

    y = c (W x + B A x) + b = c ([W, B] [x; A x]) + b, in the type of [W, B]. A and B are LoRA's where they stay beside
    W, c is DoRA's.
    """

    def __init__(self, weight, bias, A, c, rows, parts):
        """
        weight: [W, B] (out, in + r); bias: b (out,) or None; A: (r, in) or None; c: (out,) float32 or None; rows: of a
        batch; parts: the layers' out_features.
        """
        super().__init__()
        self.A, self.c, self.bias, self.parts = A, c, bias, parts
        self.out_features = weight.size(0)
        self.in_features = weight.size(1) - (0 if A is None else len(A))
        self.weight = self.packed = None                         # [W, B] as it is, or laid out by oneDNN
        if not has_better_place(weight, rows):
            self.weight = weight
        elif simulating():
            self.weight = weight.clone()
        else:
            self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows)

    def forward(self, x):
        weight = self.weight if self.packed is None else self.packed
        x = x.to(weight.dtype)
        if self.A is not None:
            x = torch.cat((x, linear(x, self.A)), -1)
        bias = self.bias if self.c is None else None
        if self.packed is None:
            y = linear(x, weight, bias)
        else:
            y = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        if self.c is None:
            return y
        scaled = self.c * y
        return (scaled if self.bias is None else scaled + self.bias).to(y.dtype)


def ready(layers, dtype, rows):
    """The ReadyLinear of layers with the same input."""
    weights, biases, As, Bs, cs = zip(*(terms(layer, dtype) for layer in layers))
    parts = [len(weight) for weight in weights]
    weight = torch.cat(weights) if len(weights) > 1 else weights[0]
    A = torch.cat(As)
    if len(A):
        weight = torch.cat((weight, torch.block_diag(*Bs)), 1)
    bias = end_to_end(biases, 0, parts)
    c = end_to_end(cs, 1, parts)
    return ReadyLinear(weight, bias, A if len(A) else None, c, rows, parts)


def terms(layer, dtype):
    """A layer's W (out, in), b (out,) or None, A (r, in), B (out, r) and c (out,) or None in ReadyLinear; r may be 0."""
    if is_dense(layer, dtype):
        weight, bias = layer.dense(dtype)
        return weight, bias, weight[:0], weight[:, :0], None
    weight, bias = layer.base.dense(dtype)
    A, B = layer.factors()
    c = layer.row_scale() if hasattr(layer, "row_scale") else None
    return weight, bias, A.to(dtype), B.to(dtype), c


def end_to_end(vectors, number, lengths):
    """Vectors as one, the number where there is None; None where there are none."""
    given = [vector for vector in vectors if vector is not None]
    if not given:
        return None
    filled = []
    for vector, n in zip(vectors, lengths):
        filled.append(given[0].new_full((n,), number) if vector is None else vector)
    return torch.cat(filled)


SAME_INPUT = (("q", "k", "v"), ("gate", "up"))                   # model.py calls these by `each`
JOINED_RANK = 64                # A larger rank would pay for the zeros that stand in B between joined layers.


def each(x, *layers):
    """What each of the layers makes of x; where the first one is a ReadyLinear of all of them, by its product."""
    parts = getattr(layers[0], "parts", ())
    if len(parts) > 1:
        return layers[0](x).split(parts, -1)
    return [layer(x) for layer in layers]


def with_same_input(chosen, dtype):
    """
    [(parent, name, layer)] -> [(parent, name, layers)], one for each ReadyLinear, which takes the place of the first of
    its layers.
    """
    alone = {(parent, name): layer for parent, name, layer in chosen}
    together = []
    for parent in dict.fromkeys(parent for parent, _ in alone):
        for names in SAME_INPUT:
            layers = [alone.get((parent, name)) for name in names]
            if all(layer and rank(layer, dtype) <= JOINED_RANK for layer in layers):
                together.append((parent, names[0], layers))
                for name in names:
                    del alone[parent, name]
    return together + [(parent, name, [layer]) for (parent, name), layer in alone.items()]


def rank(layer, dtype):
    """The rank of what stays beside a layer's weight; 0 for a layer that is one weight."""
    return 0 if is_dense(layer, dtype) else len(layer.A)


def is_dense(layer, dtype):
    """Whether one weight in that type computes what a module computes."""
    return hasattr(layer, "dense") and getattr(layer, "dense_only_in", dtype) == dtype


def has_better_place(weight, rows):
    """Whether products of that few rows are faster where oneDNN lays the weight out anew."""
    if rows == 1 or device_type(weight) != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32


def is_faster_ready(layer, dtype, rows):
    """Whether a ReadyLinear computes what a module computes, from a copy of its weight, and faster."""
    if not is_dense(layer, dtype):
        if not hasattr(layer, "factors"):
            return False
        return device_type(layer.A) == "cpu" or is_faster_ready(layer.base, dtype, rows)
    weight = getattr(layer, "weight", None)
    return weight is None or weight.dtype != dtype or has_better_place(weight, rows)


def places(module, dtype, rows):
    """Yields (parent, name, layer) of the layers below a module, the outermost ones first, that are faster ready."""
    for name, child in module.named_children():
        if is_faster_ready(child, dtype, rows):
            yield module, name, child
        else:
            yield from places(child, dtype, rows)


def free_bytes(device):
    """Bytes of memory that a process can still have on a device."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    with open("/proc/meminfo") as file:
        line = next(line for line in file if line.startswith("MemAvailable"))
    return int(line.split()[1]) * 1024


@contextmanager
def ready_layers(model, rows):
    """
    Within it the model generates fast, for batches of that many rows, and cannot be trained, saved or changed.
    Its linear layers are ReadyLinear where their copies take at most half of the free memory, else as they were.
    In float32 a wrapper and what it wraps become one weight, because W + s B A is as exact as computing both; in
    a narrower type the sum would round s B A away.
    """
    sharded = any(hasattr(p, "to_local") for p in model.parameters())        # FSDP's are never whole.
    chosen = [] if sharded else list(places(model, model.dtype, rows))
    chosen = with_same_input(chosen, model.dtype) if has_room(chosen, model) else []
    try:
        with torch.no_grad():
            for parent, name, layers in chosen:
                setattr(parent, name, ready(layers, model.dtype, rows))
        yield
    finally:
        for parent, name, layers in chosen:
            setattr(parent, name, layers[0])


def has_room(chosen, model):
    """Whether half of the free memory holds the copies of layers, [(parent, name, layer)]; says so where it does not."""
    needed = sum(layer.in_features * layer.out_features for _, _, layer in chosen) * model.dtype.itemsize
    if simulating() or not needed:
        return True
    free = free_bytes(model.head.weight.device)
    if 2 * needed > free:
        print(f"generation: copies of the layers, made for it, would take {needed / 1e6:,.0f} MB of the "
              f"{free / 1e6:,.0f} MB that are free, more than half; it goes on without them, more slowly", file=sys.stderr)
    return 2 * needed <= free


# -----------------------------------------------------------------------------
# prompts and tokens


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


def next_logits(model, tokens, cache, pos=None):
    """The logits (B, V) of what follows tokens at positions pos, (B, T) both, behind those in the cache."""
    # A method may put rows of its own before a prompt, so that even one of a single token has several.
    one_row = tokens.numel() == 1 and cache.seen > 0
    by_torch = one_row and model.dtype == torch.bfloat16 and device_type(tokens) == "cpu"
    with without_onednn() if by_torch else nullcontext():
        return model.head(model.hidden(tokens, cache, pos)[:, -1])


@contextmanager
def without_onednn():
    """
    Within it the process's products in bfloat16 are torch's own and not oneDNN's: of one row they take half the time,
    of several rows several times as long.
    """
    before = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = False
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = before


def sample(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """Draws a token from each row of logits (B, V): (B,) int64. temperature 0 takes the largest."""
    if temperature == 0:
        return logits.max(-1).indices                            # in bfloat16 four times as fast as argmax
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.size(-1):
        least = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p is not None:
        ordered, index = logits.softmax(-1).sort(descending=True)
        beyond = ordered.cumsum(-1) - ordered >= top_p           # The token that crosses p stays.
        logits = logits.masked_fill(beyond.scatter(1, index, beyond), -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)


@torch.inference_mode()
def stream(model, prompts, max_new_tokens, temperature, top_k, top_p, stop, generator):
    """GPT.stream."""
    tokens, pos = pad_left(prompts, next(model.parameters()).device)
    stops = torch.tensor([stop] if isinstance(stop, int) else list(stop or ()), dtype=torch.long)
    cache = cache_for(model, prompts, max_new_tokens)
    rows = torch.arange(len(prompts))                            # those that have not ended
    room = room_behind(model, prompts)
    with ready_layers(model, len(prompts)):
        for n in range(1, max_new_tokens + 1):
            logits = next_logits(model, tokens, cache, pos)
            token = sample(logits, temperature, top_k, top_p, generator)
            result = torch.full((len(prompts),), -1)
            result[rows] = on_host = token.cpu()
            yield result
            goes_on = ~torch.isin(on_host, stops) & (n <= room[rows])
            if not goes_on.any():
                return
            if not goes_on.all():
                kept = goes_on.nonzero().squeeze(1)
                rows = rows[kept]
                kept = kept.to(token.device)
                token = token[kept]
                cache.select(kept)
            tokens, pos = token[:, None], cache.next
