"""model.py against float64 arithmetic written out, and (test_hub.py) against the transformers library."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

import model as model_file
from lib import kernels
from conftest import FAMILIES, saved_bytes, tiny
from lib.generation import Cache, sample
from lib.kernels import causal_mask, cross_entropy
from model import GPT, PRESETS, GPTConfig

FAMILY = pytest.mark.parametrize("family", FAMILIES)


def build(family, dtype=torch.float32, **changes):
    torch.manual_seed(0)
    model = GPT(tiny(family, **changes), dtype)
    for p in model.parameters():                                 # biases and norms too, and larger than at a real start
        p.data += 0.1 * torch.randn_like(p)
    return model


def written_out(model, tokens):
    """The families' definitions, a token and a head at a time, in float64. tokens: list of ids -> logits (T, V)."""
    c, w = model.config, {n: p.double() for n, p in model.named_parameters()}
    w.setdefault("head.weight", w["embed.tokens.weight"])
    d, T = c.d_head, len(tokens)

    def linear(name, x):
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)

    def normed(x, weight, bias=0):
        if c.norm == "layer":
            x = x - x.mean(-1, keepdim=True)
        return x / (x.pow(2).mean(-1, keepdim=True) + c.norm_eps).sqrt() * (weight + c.norm_offset) + bias

    def norm(name, x):
        return normed(x, w[f"{name}.weight"], w.get(f"{name}.bias", 0)) if f"{name}.weight" in w else x

    def act(x):
        return {"relu": lambda: x.clamp(min=0), "relu2": lambda: x.clamp(min=0) ** 2, "silu": lambda: x / (1 + (-x).exp()),
                "gelu": lambda: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
                "gelu_tanh": lambda: 0.5 * x * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).tanh())}[c.activation]()

    def frequency(rope, i, n):
        plain = rope.theta ** (-2 * i / n)
        if rope.scaling == "none":
            return plain
        turns = rope.original * plain / (2 * math.pi)            # in the original context
        if rope.scaling == "llama3":
            kept = min(max((turns - rope.slow) / (rope.fast - rope.slow), 0), 1)
        elif rope.scaling == "yarn":
            pair = lambda turns: n * math.log(rope.original / turns / 2 / math.pi) / 2 / math.log(rope.theta)
            first, last = max(math.floor(pair(rope.fast)), 0), min(math.ceil(pair(rope.slow)), n - 1)
            kept = 1 - min(max((i - first) / (last - first), 0), 1)
        else:
            kept = 0
        return plain * kept + plain / rope.factor * (1 - kept)

    def turn(x, t, layer):
        if c.position != "rope" or layer in c.unrotated:
            return x
        rope, out = c.local_rope if c.local_rope and c.windows[layer] else c.rope, x.clone()
        n = rope.dim or d
        for i in range(n // 2):
            angle = t * frequency(rope, i, n)
            a, b = x[i], x[i + n // 2]
            out[i], out[i + n // 2] = a * math.cos(angle) - b * math.sin(angle), a * math.sin(angle) + b * math.cos(angle)
        out[:n] *= rope.magnitude
        return out

    def attention(layer, h):
        name = f"blocks.{layer}.attn"
        q, k, v = (linear(f"{name}.{n}", h) for n in "qkv")
        if c.qk_norm == "width":
            q, k = norm(f"{name}.q_norm", q), norm(f"{name}.k_norm", k)
        q, k, v = (x.view(T, -1, d) for x in (q, k, v))
        if c.qk_norm in ("head", "heads"):
            q, k = norm(f"{name}.q_norm", q), norm(f"{name}.k_norm", k)
        y, window = torch.zeros_like(q), c.windows[layer] if c.windows else 0
        for head in range(c.n_head):
            shared = head // (c.n_head // c.kv_heads)
            for t in range(T):
                first = max(0, t + 1 - window) if window else 0
                scale = c.attention_scale or 1 / math.sqrt(d)
                scores = torch.stack([turn(q[t, head], t, layer) @ turn(k[s, shared], s, layer) * scale for s in range(first, t + 1)])
                y[t, head] = sum(p * v[first + s, shared] for s, p in enumerate(scores.softmax(0)))
        return linear(f"{name}.out", y.flatten(1))

    def ffn(layer, h):
        up = linear(f"blocks.{layer}.ffn.up", h)
        return linear(f"blocks.{layer}.ffn.down", act(linear(f"blocks.{layer}.ffn.gate", h)) * up if c.gated else act(up))

    x = torch.stack([w["embed.tokens.weight"][t] for t in tokens]) * c.embed_scale
    if c.position == "learned":
        x = x + torch.stack([w["embed.positions.weight"][t + c.position_offset] for t in range(T)])
    for i in range(c.n_layer):
        y = x + c.residual_scale * norm(f"blocks.{i}.after1", attention(i, norm(f"blocks.{i}.norm1", x)))
        second = f"blocks.{i}.norm1" if c.shared_norm else f"blocks.{i}.norm2"
        x = y + c.residual_scale * norm(f"blocks.{i}.after2", ffn(i, norm(second, x if c.parallel else y)))
    return norm("norm", x) @ w["head.weight"].T * c.logit_scale


@FAMILY
def test_the_definition(family):
    model = build(family, torch.float64).double()
    tokens = [3, 1, 4, 1, 5, 9, 2]
    rotary = model.config.position == "rope"                     # its frequencies are float32
    assert torch.allclose(model(torch.tensor([tokens]))[0][0], written_out(model, tokens), atol=1e-5 if rotary else 1e-12)


@given(st.integers(1, 40), st.integers(2, 90), st.integers(0, 3), st.sampled_from([0.0, 0.1]), st.booleans())
@settings(max_examples=40, deadline=None, derandomize=True)
def test_loss_in_chunks(N, V, masked, smoothing, train_weight):
    torch.manual_seed(N * V)
    x, W = torch.randn(N, 7, dtype=torch.float64, requires_grad=True), torch.randn(V, 7, dtype=torch.float64, requires_grad=train_weight)
    targets = torch.randint(V, (N,))
    targets[torch.rand(N) < masked / 3] = -1
    loss = cross_entropy(x, W, targets, smoothing)
    if bool((targets >= 0).any()):
        expected = F.cross_entropy(x @ W.T, targets, ignore_index=-1, label_smoothing=smoothing)
    else:
        expected = (x * 0).sum() + (W * 0).sum()
    assert torch.allclose(loss, expected, atol=1e-12)
    leaves = [x, W] if train_weight else [x]
    for ours, theirs in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves)):
        assert torch.allclose(ours, theirs, atol=1e-12)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape, out", [((5, 7), 3), ((2, 1, 64), 129), ((0, 8), 4), ((130, 96), 300), ((7,), 3)])
def test_linear_against_float64(shape, out, dtype, grad):
    """Also of weights and inputs that are not contiguous, with and without a bias."""
    g = torch.Generator().manual_seed(0)
    x, W, b = (torch.randn(*size, generator=g, dtype=torch.float64).to(dtype) for size in (shape, (out, shape[-1]), (out,)))
    apart = torch.stack((x, x), -1)[..., 0], W.t().contiguous().t()
    for inputs, weight, bias in ((x, W, None), (x, W, b), (*apart, b)):
        with torch.set_grad_enabled(grad):
            y = kernels.linear(inputs, weight, bias)
        exact = F.linear(inputs.double(), weight.double(), None if bias is None else bias.double())
        bound = shape[-1] * torch.finfo(dtype).eps * (inputs.double().abs() @ weight.double().abs().T + 1)
        assert y.dtype == dtype and y.shape == exact.shape and bool(((y - exact).abs() <= bound).all())


def test_linear_is_differentiated():
    x, W, b = (torch.randn(*size, requires_grad=True) for size in ((6, 8), (5, 8), (5,)))
    g = torch.randn(6, 5)
    found = torch.autograd.grad(kernels.linear(x, W, b), (x, W, b), g)
    for gradient, expected in zip(found, (g @ W, g.T @ x, g.sum(0))):
        assert torch.allclose(gradient, expected, atol=1e-5)


def test_rms_norm():
    from lib.kernels import RMSNorm, rms_norm
    x, w = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 5, 8), (8,)))
    assert torch.allclose(RMSNorm.apply(x, w, 1e-6), F.rms_norm(x, (8,), w, 1e-6), atol=1e-12)
    assert torch.autograd.gradcheck(lambda x, w: RMSNorm.apply(x, w, 1e-6), (x, w))
    with torch.no_grad():
        assert torch.equal(rms_norm(x, w, 1e-6), RMSNorm.apply(x, w, 1e-6))
    kept, _ = saved_bytes(lambda: RMSNorm.apply(x, w, 1e-6))
    assert sum(kept.values()) == 8 * (3 * 5 * 8 + 8 + 3 * 5)     # x, w and a number a row


@pytest.mark.parametrize("B, H, K, T, S", [(2, 4, 4, 128, 128), (2, 6, 2, 300, 300), (1, 3, 1, 129, 150), (3, 2, 2, 1, 7), (2, 2, 1, 257, 257)])
@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-14), (torch.float32, 2e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("window", [0, 1, 50, 128, 200])
@pytest.mark.parametrize("attention", [kernels.causal_attention, kernels.traced_attention])
def test_attention_in_parts(B, H, K, T, S, dtype, bound, window, attention, monkeypatch):
    """Heads that share keys, parts of queries and of heads, keys before the queries' own, windows: against the softmax written out
    in float64."""
    monkeypatch.setattr(kernels, "cache_chunks", lambda rows, width: rows.split(3))
    torch.manual_seed(0)
    q, k, v = (torch.randn(B, t, h, 8, dtype=dtype).transpose(1, 2).requires_grad_() for t, h in ((T, H), (S, K), (S, K)))
    g = torch.randn(B, H, T, 8, dtype=dtype)
    y = attention(q, k, v, window)
    double = [t.detach().double().requires_grad_() for t in (q, k, v)]
    Q, (K_, V_) = double[0], (t.repeat_interleave(H // K, 1) for t in double[1:])
    seen = torch.zeros(T, S, dtype=torch.bool)
    for query in range(T):
        first = max(0, query + 1 - window) if window else 0
        seen[query, :S - T] = seen[query, S - T + first:S - T + query + 1] = True
    assert torch.equal(causal_mask(T, S, window, "cpu"), seen)
    expected = (Q @ K_.mT / math.sqrt(8)).masked_fill(~seen, -math.inf).softmax(-1) @ V_
    for ours, theirs in zip((y, *torch.autograd.grad(y, (q, k, v), g)), (expected, *torch.autograd.grad(expected, double, g.double()))):
        assert ours.dtype == dtype and (ours - theirs).norm() <= bound * theirs.norm()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_loss_in_several_chunks(dtype, tolerance):
    """As in float64, or as torch's own: MKL's float32, where that multiplies, is off by 5e-6 after 262,144 terms."""
    torch.manual_seed(0)
    x, W, targets = torch.randn(300, 8, dtype=dtype, requires_grad=True), torch.randn(2**18, 8, dtype=dtype), torch.randint(2**18, (300,))
    loss = cross_entropy(x, W, targets)                          # 64 rows a chunk
    losses = [F.cross_entropy(x.double() @ W.double().T, targets), F.cross_entropy(x @ W.T, targets)]
    assert all(torch.allclose(loss, expected.to(dtype)) for expected in losses)
    found, *gradients = (torch.autograd.grad(l, x)[0] for l in (loss, *losses))
    assert any(torch.allclose(found, expected, atol=tolerance) for expected in gradients)


def test_logits_never_exist_at_once():
    """At 4 x 512 tokens of GPT-2's vocabulary they would take 412 MB; a chunk takes 64 MB, and no operation makes more."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.seen = max(self.seen, out.untyped_storage().nbytes())
            return out
    x, W = torch.randn(2048, 4, requires_grad=True), torch.randn(50257, 4)
    with Largest() as largest:
        cross_entropy(x, W, torch.randint(50257, (2048,))).backward()
    assert largest.seen <= 2**26 + 2**20 < 2048 * 50257 * 4


@FAMILY
def test_cache_is_the_same_function(family):
    model = build(family)
    tokens = torch.randint(61, (3, 20))
    whole = model(tokens)[0]
    cache = Cache(2, 48)
    parts = [model.head(model.hidden(part, cache)) for part in tokens.split([7, 1, 1, 11], 1)]
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-5)


@FAMILY
def test_prompts_of_different_lengths(family):
    model = build(family)
    prompts = [[1], [2, 3, 4, 5, 6, 7, 8], [9, 10, 11]]
    together = model.generate(prompts, 12, temperature=0)
    assert together == [model.generate([p], 12, temperature=0)[0] for p in prompts]
    for prompt, out in zip(prompts, together):
        assert out[:len(prompt)] == prompt and len(out) == len(prompt) + 12
        logits = model(torch.tensor([out[:-1]]))[0][0]
        assert logits.argmax(-1).tolist()[len(prompt) - 1:] == out[len(prompt):]


def test_generation_stops():
    model = build("gpt2")
    free = model.generate([[1], [2, 3]], 20, temperature=0)
    stop = free[0][4]
    stopped = model.generate([[1], [2, 3]], 20, temperature=0, stop=[stop, 60])
    for a, b in zip(stopped, free):
        assert b[:len(a)] == a and (stop not in a[2:-1]) and (len(a) == len(b) or a[-1] in (stop, 60))
    assert len(model.generate([[1] * 40], 100, temperature=0)[0]) <= 49          # at the context's end, one beyond it


def test_sampling():
    torch.manual_seed(0)
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).expand(40000, -1)
    p = logits[0].softmax(-1)
    share = torch.bincount(sample(logits), minlength=4) / 40000
    assert torch.allclose(share, p, atol=0.01)
    assert sample(logits, temperature=0).unique().tolist() == [0]
    share = torch.bincount(sample(logits, temperature=0.5), minlength=4) / 40000
    assert torch.allclose(share, (logits[0] / 0.5).softmax(-1), atol=0.01)
    assert sample(logits, top_k=2).unique().tolist() == [0, 1]
    assert sample(logits, top_p=0.7).unique().tolist() == [0, 1]                 # .64 + .24: the one that crosses stays
    assert sample(logits, top_p=0.6).unique().tolist() == [0]


@FAMILY
def test_checkpointing_changes_nothing(family):
    results = []
    for checkpointing in (False, True):
        model = build(family)
        model.checkpointing = checkpointing
        tokens = torch.arange(40).view(2, 20)
        loss = model(tokens, tokens.roll(-1, 1))[1]
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_presets_have_their_published_sizes():
    with torch.device("meta"):
        sizes = {name: GPT(PRESETS[name]).num_params() for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "opt-1.3b", "tinyllama-1.1b", "llama-7b", "llama-65b")}
    assert sizes == {"gpt2": 124439808, "gpt2-medium": 354823168, "gpt2-large": 774030080, "gpt2-xl": 1557611200, "opt-1.3b": 1315758080,
                     "tinyllama-1.1b": 1100048384, "llama-7b": 6738415616, "llama-65b": 65285660672}


@pytest.mark.parametrize("changes, words", [
    (dict(n_layer=0), "n_layer is 0"), (dict(n_head=5), "n_embd 32 is not a multiple of n_head 5"), (dict(n_kv_head=3), "n_head 4 is not a multiple of n_kv_head 3"),
    (dict(activation="swish"), "activation is 'swish'"), (dict(position="alibi"), "position is 'alibi'")])
def test_impossible_configurations(changes, words):
    with pytest.raises(ValueError, match=words):
        tiny("gpt2", **changes)


def test_beyond_the_context():
    model = build("gpt2")
    with pytest.raises(ValueError, match="49 positions, but the model's context is 48"):
        model(torch.zeros(1, 49, dtype=torch.long))
    with pytest.raises(ValueError, match="an empty prompt"):
        model.generate([[]], 3)


def test_the_file_knows_nothing_of_the_others():
    assert not {"peft", "quant", "hub", "train"} & set(vars(model_file))
    assert GPTConfig() == PRESETS["gpt2"]


@FAMILY
@pytest.mark.parametrize("lengths", [[7], [3, 9, 9, 1, 20], [5, 5, 5], [1, 1]])
def test_sequences_side_by_side_are_apart(family, lengths):
    """Losses and gradients of sequences in one row are those of the sequences one by one."""
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(61, (2, n), generator=generator) for n in lengths]
    results = []
    for packed in (True, False):
        model = build(family, torch.float64).double()
        if packed:
            tokens, targets = torch.cat(rows, 1).unsqueeze(1)
            loss = model(tokens, targets, lengths=lengths)[1] * sum(lengths)
        else:
            loss = sum(model(row[:1], row[1:])[1] * row.size(1) for row in rows)
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    for a, b in zip(*results):
        assert torch.allclose(a, b, atol=1e-10)


def test_sequences_side_by_side_each_have_the_whole_context():
    model = build("gpt2")
    model(torch.zeros(1, 96, dtype=torch.long), lengths=[48, 48])
    with pytest.raises(ValueError, match="49 positions, but the model's context is 48"):
        model(torch.zeros(1, 50, dtype=torch.long), lengths=[1, 49])
