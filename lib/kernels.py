"""
Hand-written autograd Functions that make torch's numbers faster on a CPU or in less memory: RMSNorm, causal
attention, and cross-entropy in chunks; a linear layer's product by the faster library. And the one seam between
devices: device_type says which device's path a tensor's computation takes.

What was tried and left: scores in bfloat16 (4 % faster, two to five times the error); scores in float32 as
a sum of two bfloat16 products (no faster than one float32 product); oneDNN's own bfloat16 mode for float32
products (no effect on a CPU without AMX).
"""

from contextlib import contextmanager

import torch
import torch.nn.functional as F

# -----------------------------------------------------------------------------
# which device's path is taken

_simulated_device = None


def device_type(tensor):
    """
    "cpu" or "cuda": the device whose path a tensor's computation takes. Within simulated_device it is the
    simulated one's.
    """
    return _simulated_device or tensor.device.type


def simulating():
    """Whether a device is simulated: tensors then have shapes and no content."""
    return _simulated_device is not None


@contextmanager
def simulated_device(kind):
    """
    Within it every tensor takes the path of a "cpu" or "cuda" device (memory.py, whose tensors lie on
    "meta").
    """
    global _simulated_device
    before, _simulated_device = _simulated_device, kind
    try:
        yield
    finally:
        _simulated_device = before


def seeded_generator(device, seed):
    """A generator of random numbers; None in a simulation, where there are no numbers."""
    return None if simulating() else torch.Generator(device).manual_seed(seed)


# -----------------------------------------------------------------------------
# chunks: work that would need much memory at once is done a part at a time

CHUNK = 2**24                   # numbers of an intermediate result, 64 MB in float32
CACHE_CHUNK = 2**20             # numbers of a part that stays in a CPU's cache
ROWS_OF_PRODUCTS = 64           # oneDNN is 8 % faster where a product's rows are a multiple of this


def representatives(chunks):
    """
    The chunks that have to be computed: all of them. A simulation runs the first two and the last one
    alone, because the others reuse the memory of the second.
    """
    if not simulating() or len(chunks) < 4:
        return chunks
    return *chunks[:2], chunks[-1]


def product_chunks(rows, width):
    """The tensor rows in chunks whose product with a matrix of that width makes CHUNK numbers."""
    n = max(ROWS_OF_PRODUCTS, CHUNK // width // ROWS_OF_PRODUCTS * ROWS_OF_PRODUCTS)
    return representatives(rows.split(n))


def cache_chunks(rows, width):
    """
    The tensor rows, each standing for width numbers, in parts that stay in a CPU's cache; on another device
    in one part.
    """
    n = max(1, CACHE_CHUNK // width) if device_type(rows) == "cpu" else len(rows)
    return representatives(rows.split(n))


def accurate(dtype):
    """The type for sums and statistics: float32, or float64 where the numbers are float64."""
    return torch.promote_types(dtype, torch.float32)


# -----------------------------------------------------------------------------
# a linear layer


def linear(x, W, bias=None):
    """
    x W^T + b, x (.., in), W (out, in). Where no gradient is asked for, float32 on a CPU is multiplied by oneDNN: 1.05 to
    1.2 times as fast as by torch's own choice, MKL, with a vocabulary's rows 1.5 times, with a low rank up to four times
    (AMD EPYC, with AVX512 and with AVX2).
    """
    plain = torch.is_grad_enabled() or torch.compiler.is_compiling() or simulating()
    if plain or not onednn_is_faster(x, W):
        return F.linear(x, W, bias)
    return torch.ops.mkldnn._linear_pointwise(x, W, bias, "none", [], "")


def onednn_is_faster(x, W):
    """Whether oneDNN multiplies x by W^T faster than MKL."""
    if x.dtype != torch.float32 or x.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    # With AVX2 alone it takes up to 1.5 times as long where W is another matrix transposed.
    return W.is_contiguous() or torch.backends.cpu.get_cpu_capability() == "AVX512"


# -----------------------------------------------------------------------------
# RMSNorm


class RMSNorm(torch.autograd.Function):
    """
    y = w x r,  r = 1 / sqrt(mean(x^2) + eps),  dx = r (w g) - x r^3 mean(w g x),  dw = sum of g x r

    A weight in a wider type than x's is multiplied in that type.

    On a CPU torch's rms_norm is put together from a dozen operations and keeps two float32 copies of x;
    this keeps x.
    """

    @staticmethod
    def forward(ctx, x, w, eps):
        y, r = rms_normed(x, w, eps)
        ctx.save_for_backward(x, w, r)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        x, w, r = ctx.saved_tensors
        need_x, need_w, _ = ctx.needs_input_grad
        dx = dw = None
        if need_w:
            dw = (g * x * r).flatten(0, -2).sum(0).to(w.dtype)
        if need_x:
            wg = g * w
            mean = (wg * x).mean(-1, keepdim=True, dtype=r.dtype)
            dx = (wg * r).addcmul_(x, mean.mul_(r * r * r), value=-1).to(x.dtype)
        return dx, dw, None


def rms_normed(x, w, eps):
    """y and r, (.., 1), of RMSNorm."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=accurate(x.dtype))
    r = norm.square_().div_(x.size(-1)).add_(eps).rsqrt_()
    return (x * r).to(w.dtype).mul_(w).to(x.dtype), r


def rms_norm(x, w, eps):
    """RMSNorm of x (.., C) with a weight w (C,)."""
    if torch.compiler.is_compiling():                            # It differentiates and fuses by itself.
        square = x.to(accurate(x.dtype)).square()
        r = (square.mean(-1, keepdim=True) + eps).rsqrt()
        y = (x * r).to(w.dtype) * w
        return y.to(x.dtype)
    if torch.is_grad_enabled():
        return RMSNorm.apply(x, w, eps)
    return rms_normed(x, w, eps)[0]                     # Calling the Function costs as much as the norm.


# -----------------------------------------------------------------------------
# attention

QUERIES = 128                   # of a tile


class CausalAttention(torch.autograd.Function):
    """
    S = Q K^T / sqrt(d),  P = softmax(S),  O = P V                          (Dao et al. 2022, appendix B)
    dV = P^T dO,  dP = dO V^T,  dS = P x (dP - rowsum(P x dP)),  dQ = dS K / sqrt(d),  dK = dS^T Q / sqrt(d)

    It works on tiles of a few heads and 128 queries, which skips most of what the mask hides, and makes P
    again in the backward pass. In bfloat16 torch's own kernel for a CPU takes twice the time, three times
    for short sequences. S is in float32, as there.
    """

    @staticmethod
    def forward(ctx, q, k, v, window):
        ctx.save_for_backward(q, k, v)
        ctx.window = window
        return attention_output(q, k, v, window)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return *attention_gradients(g, *ctx.saved_tensors, ctx.window), None


def causal_attention(q, k, v, window=0):
    """
    q (B, n_head, T, head_dim), k and v (B, n_kv_head, S, head_dim); the first S - T keys are seen by all.
    window: how many of the other keys a query sees at most, its own included; 0 for all before it. Returns
    O like q; see CausalAttention.
    """
    if torch.compiler.is_compiling():
        return traced_attention(q, k, v, window)
    return CausalAttention.apply(q, k, v, window)


def attention_output(q, k, v, window):
    """O of CausalAttention."""
    y = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    q, k, v = by_shared_keys(q, k, v)
    for queries, keys, p, (_, _, v, o) in tiles(window, q, k, v, y.view(q.shape)):
        o[:, :, queries] = (p @ v[:, keys]).view_as(o[:, :, queries])
    return y


def attention_gradients(g, q, k, v, window):
    """dQ, dK and dV of CausalAttention; g = dO."""
    saved = q, k, v
    q, k, v = by_shared_keys(*saved)
    scale = q.size(-1) ** -0.5
    dq_all = torch.empty_like(q)
    dk_all = torch.zeros_like(k, dtype=accurate(k.dtype))
    dv_all = torch.zeros_like(v, dtype=accurate(v.dtype))
    do_all = g.reshape(q.shape)
    for queries, keys, p, heads in tiles(window, q, k, v, do_all, dq_all, dk_all, dv_all):
        q, k, v, do, dq, dk, dv = heads
        q, do = q[:, :, queries].flatten(1, 2), do[:, :, queries].flatten(1, 2)
        dv[:, keys] += p.mT @ do
        ds = torch._softmax_backward_data(do @ v[:, keys].mT, p, -1, p.dtype)
        dq[:, :, queries] = (ds @ k[:, keys]).mul_(scale).view_as(dq[:, :, queries])
        dk[:, keys] += ds.mT @ q
    dk_all.mul_(scale)
    return tuple(d.to(t.dtype).view(t.shape) for d, t in zip((dq_all, dk_all, dv_all), saved))


# For a compiler, which would trace every tile, both passes are operators.


@torch.library.custom_op("nanopeft::attention", mutates_args=())
def traced_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
    """causal_attention in traced code."""
    return attention_output(q, k, v, window)


@traced_attention.register_fake
def _(q, k, v, window):
    return q.new_empty(q.shape)


@torch.library.custom_op("nanopeft::attention_gradients", mutates_args=())
def traced_gradients(g: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
                     window: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """attention_gradients in traced code, contiguous."""
    dq, dk, dv = attention_gradients(g, q, k, v, window)
    dq = dq.contiguous()
    dk = dk.contiguous()
    dv = dv.contiguous()
    return dq, dk, dv


@traced_gradients.register_fake
def _(g, q, k, v, window):
    return tuple(t.new_empty(t.shape) for t in (q, k, v))


def _save_attention(ctx, inputs, output):
    *tensors, ctx.window = inputs
    ctx.save_for_backward(*tensors)


def _attention_backward(ctx, g):
    return *traced_gradients(g, *ctx.saved_tensors, ctx.window), None


traced_attention.register_autograd(_attention_backward, setup_context=_save_attention)


def attention_of_one(q, k, v, mask):
    """
    softmax(q k^T / sqrt(d)) v of one query a sequence on a CPU, q (B, n_head, 1, d), k and v (B, n_kv_head, S, d), mask
    bool (B or 1, 1, 1, S) or None. Heads that share a key are to torch's kernel the queries of one head: 1.2 to 2.7 times as
    fast as what is written out, which in bfloat16 is faster itself where every head has keys of its own (up to 3.7 times)
    or many sequences are short (1.4 times).
    """
    B, n_kv_head, S, d = k.shape
    q_shared = q.unflatten(1, (n_kv_head, -1)).squeeze(3)        # (B, n_kv_head, G, d)
    kernel_is_faster = q_shared.size(2) > 1 and (B == 1 or S >= 100)
    if q.dtype == torch.float32 or kernel_is_faster:
        attention = simulated_attention if simulating() else F.scaled_dot_product_attention
        return attention(q_shared, k, v, mask).view(q.shape)
    exact = accurate(q.dtype)
    scores = (q_shared.to(exact) * d**-0.5) @ k.to(exact).mT
    if mask is not None:
        scores.masked_fill_(~mask, -torch.inf)
    y = scores.softmax(-1) @ v.to(exact)
    return y.to(q.dtype).view(q.shape)


def simulated_attention(q, k, v, mask):
    """
    F.scaled_dot_product_attention without content: torch's flash kernel for a CPU, which keeps the same tensors as
    a GPU's; "meta" would take the unfused path. mask: bool, or None for causal.
    """
    bias = None
    if mask is not None:
        bias = torch.where(mask, q.new_zeros(()), q.new_full((), -torch.inf))
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return flash(q, k, v, is_causal=mask is None, attn_mask=bias)[0]


def by_shared_keys(q, k, v):
    """
    q (B, n_head, T, d) -> (B x n_kv_head, G, T, d), whose G heads share a key; k and v -> (B x n_kv_head,
    S, d).
    """
    B, n_head, T, d = q.shape
    n_kv_head = k.size(1)
    q = q.reshape(B * n_kv_head, n_head // n_kv_head, T, d)
    return q, k.reshape(B * n_kv_head, -1, d), v.reshape(B * n_kv_head, -1, d)


def tiles(window, q, k, *others):
    """
    Yields (queries, keys, P, heads) for every tile of the attention.

    q (n, G, T, d), k (n, S, d), others (n, ..); window as in CausalAttention. queries, keys: slices of T and
    S. P: softmax(S) of the tile, (heads, G x queries, keys), in the type of q. heads: the tile's heads of q,
    k and the others.
    """
    _, G, T, d = q.shape
    S = k.size(1)
    before = S - T                                               # keys that are seen by all
    hidden = torch.full((QUERIES, QUERIES), -torch.inf, dtype=accurate(q.dtype), device=q.device).triu_(1)
    width = G * min(T, QUERIES) * S
    for heads in zip(*(cache_chunks(t, width) for t in (q, k, *others))):
        q_heads = heads[0].to(hidden.dtype) * d**-0.5
        k_heads = heads[1].to(hidden.dtype)
        for end in range(T, 0, -QUERIES):
            start = max(0, end - QUERIES)
            first = max(0, start + 1 - window) if window and not before else 0
            queries, keys = slice(start, end), slice(first, before + end)
            scores = q_heads[:, :, queries].flatten(1, 2) @ k_heads[:, keys].mT
            n = end - start
            by_query = scores.view(-1, G, n, scores.size(-1))
            by_query[..., -n:] += hidden[:n, :n]
            if window and end - first > window:
                query = torch.arange(start, end, device=q.device).unsqueeze(1)
                key = torch.arange(first - before, end, device=q.device)
                by_query.masked_fill_(beyond(window, query, key), -torch.inf)
            yield queries, keys, scores.softmax(-1).to(q.dtype), heads


def beyond(window, query, key):
    """
    Whether keys lie before a query's window, bool (T, S). Positions: query (T, 1), key (S,). Negative keys
    are seen by all.
    """
    return (query - key >= window) & (key >= 0)


def causal_mask(T, S, window, device):
    """Who sees whom, bool (T, S): the first S - T keys are seen by all. window: 0 for none."""
    mask = torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)
    if not window:
        return mask
    query = torch.arange(T, device=device).unsqueeze(1)
    return mask & ~beyond(window, query, torch.arange(T - S, T, device=device))


# -----------------------------------------------------------------------------
# loss: the float32 logits of GPT-2 at 4 x 512 tokens would take 412 MB, their gradient as much again


class ChunkedCrossEntropy(torch.autograd.Function):
    """
    Sum of the cross-entropy of softmax(x W^T) over the rows whose target is not -1, a chunk of rows at a
    time.

    z = x W^T,  p = softmax(z),  loss = (1 - e) (logsumexp(z) - z_target) + e (logsumexp(z) - mean(z))
    dloss/dz = p - (1 - e) onehot(target) - e / V,  dx = dz W,  dW = dz^T x

    The gradients are made in the forward pass while a chunk's logits exist, so that nothing is computed
    twice.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, smoothing, need_x, need_weight):
        V = weight.size(0)
        W = weight.to(x.dtype)
        dx = torch.zeros_like(x) if need_x else None
        dW = torch.zeros(weight.shape, dtype=accurate(x.dtype), device=x.device) if need_weight else None
        total = torch.zeros((), dtype=accurate(x.dtype), device=x.device)
        for chunk in product_chunks(rows_of_loss(targets), V):
            x_chunk = x[chunk]
            z = linear(x_chunk, W)
            for z_part, part in zip(cache_chunks(z, V), cache_chunks(chunk, V)):
                total += loss_and_gradient(z_part, targets[part], smoothing, need_x or need_weight)
            if need_x:
                dx[chunk] = linear(z, W.t())                     # z holds dloss/dz by now.
            if need_weight:
                dW += z.t() @ x_chunk
        ctx.save_for_backward(dx, dW)
        return total

    @staticmethod
    def backward(ctx, grad):
        scaled = [d if d is None else d * grad.to(d.dtype) for d in ctx.saved_tensors]
        return *scaled, None, None, None, None


def rows_of_loss(targets):
    """
    Indices (N',) of the rows that go into the loss. On a CPU these are the rows with a target, so that masked
    prompts cost nothing, and as many masked rows as fill them up to a multiple of 64, where there are enough:
    oneDNN makes and keeps a kernel for every number of rows. Elsewhere they are all rows, because counting them
    would make a GPU wait.
    """
    if device_type(targets) != "cpu" or simulating() or torch.compiler.is_compiling():
        return torch.arange(len(targets), device=targets.device)
    counted = targets >= 0
    rows, others = counted.nonzero().squeeze(1), (~counted).nonzero().squeeze(1)
    return torch.cat((rows, others[:-len(rows) % ROWS_OF_PRODUCTS]))


def loss_and_gradient(z, targets, smoothing, need_gradient):
    """
    The sum of the losses of the logits z (n, V) with targets (n,); with need_gradient z becomes dloss/dz,
    in place.
    """
    V = z.size(-1)
    p = z.to(accurate(z.dtype), copy=True)
    counted = (targets >= 0).unsqueeze(1).to(p.dtype)
    targets = targets.clamp(min=0).unsqueeze(1)
    top, at_target = p.amax(-1, keepdim=True), p.gather(1, targets)
    mean = p.mean(-1, keepdim=True) if smoothing else 0.0
    norm = p.sub_(top).exp_().sum(-1, keepdim=True)
    loss = norm.log() + top - (1 - smoothing) * at_target - smoothing * mean
    if need_gradient:
        p.mul_(counted / norm).scatter_add_(1, targets, counted * (smoothing - 1))
        if smoothing:
            p.sub_(counted * (smoothing / V))
        z.copy_(p)
    return (loss * counted).sum()


def cross_entropy(x, weight, targets, label_smoothing=0.0):
    """
    Mean over the targets that are not -1. x (N, C), weight (V, C), targets (N,) int64 -> float32 scalar.
    """
    grad = torch.is_grad_enabled()
    need_x, need_weight = grad and x.requires_grad, grad and weight.requires_grad
    total = ChunkedCrossEntropy.apply(x, weight, targets, label_smoothing, need_x, need_weight)
    return total / (targets >= 0).sum().clamp(min=1)
