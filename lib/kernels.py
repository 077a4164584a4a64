"""
Hand-written autograd Functions.
"""

from contextlib import contextmanager

import torch

# -----------------------------------------------------------------------------
# which device's path is taken

_simulated_device = None


def device_type(tensor):
    """ "cpu" or "cuda": the device whose path a tensor's computation takes. Within simulated_device it is the simulated one's."""
    return _simulated_device or tensor.device.type


def simulating():
    """Whether a device is simulated: tensors then have shapes and no content."""
    return _simulated_device is not None


@contextmanager
def simulated_device(kind):
    """Within it every tensor takes the path of the device of that kind, "cpu" or "cuda" (memory.py, whose fake tensors lie nowhere)."""
    global _simulated_device
    before, _simulated_device = _simulated_device, kind
    try:
        yield
    finally:
        _simulated_device = before


def representatives(chunks):
    """
    The chunks that have to be computed. A simulation runs the first two and the last one alone, because the others reuse the
    memory of the second.
    """
    if not simulating() or len(chunks) < 4:
        return chunks
    return *chunks[:2], chunks[-1]


class RMSNorm(torch.autograd.Function):
    """
    y = w x r,  r = 1 / sqrt(mean(x^2) + eps),  dx = r (w g) - x r^3 mean(w g x),  dw = sum of g x r

    On a CPU F.rms_norm is put together from a dozen operations and keeps two float32 copies of x; this keeps x.
    """

    @staticmethod
    def forward(ctx, x, w, eps):
        r = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32)).square_().div_(x.size(-1)).add_(eps).rsqrt_()
        ctx.save_for_backward(x, w, r)
        return (x * r).to(x.dtype).mul_(w)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        x, w, r = ctx.saved_tensors
        dw = (g * x * r).flatten(0, -2).sum(0).to(w.dtype) if ctx.needs_input_grad[1] else None
        g = g * w
        mean = (g * x).mean(-1, keepdim=True, dtype=r.dtype)
        return (g * r).addcmul_(x, mean.mul_(r * r * r), value=-1).to(x.dtype) if ctx.needs_input_grad[0] else None, dw, None


def chunks(rows, n, device=None):
    """rows, that take n numbers each, in chunks of 64 MB of float32, multiples of 64 rows; with a device, in parts that stay in a CPU's cache."""
    return representatives(rows.split(max(64, 2 ** 24 // n // 64 * 64) if device is None else max(1, 2 ** 20 // n) if device == "cpu" else len(rows)))


class CausalAttention(torch.autograd.Function):
    """
    S = Q K^T / sqrt(d),  P = softmax(S),  O = P V                          (Dao et al. 2022, appendix B)
    dV = P^T dO,  dP = dO V^T,  dS = P x (dP - rowsum(P x dP)),  dQ = dS K / sqrt(d),  dK = dS^T Q / sqrt(d)

    A few heads and 128 queries at a time, which skips most of what the mask hides; P is made again in the backward pass. Torch's
    own kernel for a CPU takes twice the time in bfloat16, three times for short sequences. S is in float32, like there.
    """
    ROWS = 128

    @staticmethod
    def parts(*tensors):
        """
        tensors: q (n, G, T, d), whose G heads share one of k (n, S, d), then any (n, ..). Yields (queries, keys, P, heads): two slices,
        P (heads, G x queries, keys), and the heads that it is of, of every tensor.
        """
        (_, G, T, D), S, rows = tensors[0].shape, tensors[1].size(1), CausalAttention.ROWS
        accurate = torch.promote_types(tensors[0].dtype, torch.float32)
        hidden = torch.full((rows, rows), -torch.inf, dtype=accurate, device=tensors[0].device).triu_(1)
        for heads in zip(*(chunks(t, G * min(T, rows) * S, device_type(t)) for t in tensors)):
            q, k = heads[0].to(accurate) * D ** -0.5, heads[1].to(accurate)
            for end in range(T, 0, -rows):
                queries, keys = slice(max(0, end - rows), end), slice(S - T + end)
                s = q[:, :, queries].flatten(1, 2) @ k[:, keys].mT
                n = end - queries.start
                s.view(-1, G, n, s.size(-1))[..., -n:] += hidden[:n, :n]
                yield queries, keys, s.softmax(-1).to(tensors[0].dtype), heads

    @staticmethod
    def forward(ctx, q, k, v):
        ctx.save_for_backward(q, k, v)
        y = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        q, k, v = CausalAttention.group(q, k, v)
        for queries, keys, p, (_, _, v, o) in CausalAttention.parts(q, k, v, y.view(q.shape)):
            o[:, :, queries] = (p @ v[:, keys]).view_as(o[:, :, queries])
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        saved = ctx.saved_tensors
        q, k, v = CausalAttention.group(*saved)
        scale, accurate = q.size(-1) ** -0.5, torch.promote_types(q.dtype, torch.float32)
        whole = torch.empty_like(q), torch.zeros_like(k, dtype=accurate), torch.zeros_like(v, dtype=accurate)
        for queries, keys, p, (q, k, v, do, dq, dk, dv) in CausalAttention.parts(q, k, v, g.reshape(q.shape), *whole):
            q, do = q[:, :, queries].flatten(1, 2), do[:, :, queries].flatten(1, 2)
            dv[:, keys] += p.mT @ do
            ds = torch._softmax_backward_data(do @ v[:, keys].mT, p, -1, p.dtype)
            dq[:, :, queries] = (ds @ k[:, keys]).mul_(scale).view_as(dq[:, :, queries])
            dk[:, keys] += ds.mT @ q
        whole[1].mul_(scale)
        return tuple(d.to(p.dtype).view(t.shape) for d, t in zip(whole, saved))

    @staticmethod
    def group(q, k, v):
        """q (B, n_head, T, head_dim) -> (B x n_kv_head, G, T, head_dim); k and v without G."""
        B, H, T, D = q.shape
        K = k.size(1)
        return q.reshape(B * K, H // K, T, D), k.reshape(B * K, -1, D), v.reshape(B * K, -1, D)


class ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of the cross-entropy of softmax(x W^T) over the rows whose target is not -1, a chunk of rows at a time.

    z = W x,  p = softmax(z),  loss = (1 - e) (logsumexp(z) - z_target) + e (logsumexp(z) - mean(z))
    dloss/dz = p - (1 - e) onehot(target) - e / V,  dx = dz W,  dW = dz^T x

    The gradients are made in the forward pass while a chunk's logits exist, so that nothing is computed twice.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, smoothing, need_x, need_weight):
        V = weight.size(0)
        rows = torch.arange(len(targets), device=targets.device)
        keep = targets >= 0
        if device_type(x) == "cpu" and not simulating() and not torch.compiler.is_compiling():
            rows = keep.nonzero().squeeze(1)             # masked prompts cost nothing; elsewhere the sync costs more
            rows = torch.cat((rows, (~keep).nonzero().squeeze(1)[:-len(rows) % 64]))       # oneDNN makes and keeps a kernel for every number of rows
        accurate = torch.promote_types(x.dtype, torch.float32)
        dx = torch.zeros_like(x) if need_x else None
        dW = torch.zeros(weight.shape, dtype=accurate, device=x.device) if need_weight else None
        W = weight.to(x.dtype)
        total = torch.zeros((), dtype=accurate, device=x.device)
        for r in chunks(rows, V):
            xr = x[r]
            z = xr @ W.t()
            for part, s in zip(chunks(z, V, device_type(z)), chunks(r, V, device_type(z))):
                t, kept = targets[s].clamp(min=0).unsqueeze(1), keep[s].unsqueeze(1).to(accurate)
                p = part.to(accurate, copy=True)
                top, at_target = p.amax(-1, keepdim=True), p.gather(1, t)
                mean = p.mean(-1, keepdim=True) if smoothing else None
                norm = p.sub_(top).exp_().sum(-1, keepdim=True)
                lse = norm.log() + top
                nll = lse - at_target if mean is None else lse - (1 - smoothing) * at_target - smoothing * mean
                total += (nll * kept).sum()
                if need_x or need_weight:
                    p.mul_(kept / norm).scatter_add_(1, t, kept * (smoothing - 1))
                    if smoothing:
                        p.sub_(kept * (smoothing / V))
                    part.copy_(p)                        # the gradient takes the place of the logits
            if need_x:
                dx[r] = z @ W
            if need_weight:
                dW += z.t() @ xr
        ctx.save_for_backward(dx, dW)
        return total

    @staticmethod
    def backward(ctx, grad):
        dx, dW = ctx.saved_tensors
        return (None if dx is None else dx * grad.to(dx.dtype), None if dW is None else dW * grad.to(dW.dtype),
                None, None, None, None)


def cross_entropy(x, weight, targets, label_smoothing=0.0):
    """Mean over the targets that are not -1. x (N, C), weight (V, C), targets (N,) -> float32 scalar."""
    grad = torch.is_grad_enabled()
    total = ChunkedCrossEntropy.apply(x, weight, targets, label_smoothing, grad and x.requires_grad, grad and weight.requires_grad)
    return total / (targets >= 0).sum().clamp(min=1)
