"""
Each slide's pseudocode, transcribed literally and slowly: one example at a time, one head, plain matrix products, float64. The
model modified in place must compute the same, forward and backward.

The slides' blocks are post-LN, LN(x + part(x)), and GPT's are pre-LN, x + part(LN(x)); that is the only difference between
the two transcriptions of a block. The post-LN ones are compared through a Block whose forward is put in that order.
"""

import math

import pytest
import torch
import torch.nn.functional as F

import peft
import quant
from conftest import tiny
from model import GPT

d, T = 32, 9


def model_with(method, **options):
    """A float64 GPT of one head, everything random: biases, norms and what the method adds."""
    torch.manual_seed(0)
    model = GPT(tiny("gpt2", n_head=1), torch.float64)
    report = peft.apply(model, method, **options)
    assert report
    model.double()
    for p in model.parameters():
        p.data = p.data + 0.2 * torch.randn_like(p)
    return model


def x_in():
    return torch.randn(1, T, d, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)


def agree(ours, slide, wrt):
    """Equal within 1e-10, forward and gradients."""
    assert ours.shape == slide.shape
    torch.testing.assert_close(ours, slide, rtol=0, atol=1e-10)
    weights = torch.randn(ours.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for a, b in zip(torch.autograd.grad((ours * weights).sum(), wrt), torch.autograd.grad((slide * weights).sum(), wrt), strict=True):
        assert a.abs().max() > 1e-6
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


# the slides leave out what every attention has: causality, the scale, biases and the output projection. They stand here, once.


def softmax_attention(q, k, v, attn, visible=0):
    """softmax(q @ k.T) @ v for one example; everybody sees the first `visible` keys, and of the others its own and earlier ones."""
    scores = q @ k.T / math.sqrt(d)
    for t in range(len(q)):
        for s in range(visible + t + 1, len(k)):
            scores[t, s] = -math.inf
    return torch.softmax(scores, -1) @ v @ attn.out.weight.T + attn.out.bias


def linear(layer, x):
    return x @ layer.weight.T + layer.bias


def LN(norm, x):
    return F.layer_norm(x, (d,), norm.weight, norm.bias, 1e-5)


def gelu(x):
    return F.gelu(x, approximate="tanh")


def SelfAttention(attn, x):
    return softmax_attention(linear(attn.q, x), linear(attn.k, x), linear(attn.v, x), attn)


def transformer_FFN(ffn, x):
    return linear(ffn.down, gelu(linear(ffn.up, x)))


def adapter_FFN(adapter, x, act=F.relu):
    """The other thing that the slide calls FFN: down, nonlinearity, up, and the adapter's own skip."""
    return x + linear(adapter.up, act(linear(adapter.down, x)))


# -----------------------------------------------------------------------------
# 1) Bottleneck Adapter


def transformer_block_with_adapter(block, x):
    """The slide, LayerNorms moved before the parts."""
    residual = x
    x = SelfAttention(block.attn, LN(block.norm1, x))
    x = adapter_FFN(block.adapter1, x)
    x = x + residual
    residual = x
    x = transformer_FFN(block.ffn, LN(block.norm2, x))
    x = adapter_FFN(block.adapter2, x)
    x = x + residual
    return x


def transformer_block_with_adapter_post_LN(block, x):
    """The slide, word for word."""
    residual = x
    x = SelfAttention(block.attn, x)
    x = adapter_FFN(block.adapter1, x)
    x = LN(block.norm1, x + residual)
    residual = x
    x = transformer_FFN(block.ffn, x)
    x = adapter_FFN(block.adapter2, x)
    x = LN(block.norm2, x + residual)
    return x


def post_LN(block, adapters):
    """The same modules called in the slide's order."""
    def forward(x):
        x = block.norm1(adapters[0](block.attn(x, None, None, None)) + x)
        return block.norm2(adapters[1](block.ffn(x)) + x)
    return forward


def test_bottleneck_adapter():
    block, x = model_with("adapter", adapter_size=5).blocks[0], x_in()
    wrt = [x, *block.adapter1.parameters(), *block.adapter2.parameters()]
    agree(block(x)[0], transformer_block_with_adapter(block, x[0]), wrt)
    agree(post_LN(block, (block.adapter1, block.adapter2))(x)[0], transformer_block_with_adapter_post_LN(block, x[0]), wrt)


def test_pfeiffers_and_lins_adapters():
    x = x_in()
    block = model_with("adapter", adapter_size=5, adapter_style="pfeiffer").blocks[0]
    plain = lambda block: (lambda h: h + transformer_FFN(block.ffn, LN(block.norm2, h)))(x[0] + SelfAttention(block.attn, LN(block.norm1, x[0])))
    agree(block(x)[0], adapter_FFN(block.adapter2, plain(block)), [x, *block.adapter2.parameters()])
    block = model_with("adapter", adapter_size=5, adapter_style="lin", adapter_activation="tanh").blocks[0]
    h, a = plain(block), block.adapter2
    agree(block(x)[0], h + linear(a.up, torch.tanh(linear(a.down, LN(a.norm, h)))), [x, *a.parameters()])


# -----------------------------------------------------------------------------
# Additive/Soft prompts


def prompt_tuning_attention(attn, x, s_k, s_v):
    """The slide."""
    q = linear(attn.q, x)
    k = linear(attn.k, torch.cat([s_k, x]))     # prepend a
    v = linear(attn.v, torch.cat([s_v, x]))     # soft prompt
    return softmax_attention(q, k, v, attn, visible=len(s_k))


@pytest.mark.parametrize("tied", [False, True])
def test_prompt_tuning_attention(tied):
    attn, x = model_with("prefix", prefix_length=3, prefix_tied=tied).blocks[0].attn, x_in()
    s_k = attn.prefix.s_k
    s_v = s_k if tied else attn.prefix.s_v
    agree(attn(x, None, None, None)[0], prompt_tuning_attention(attn, x[0], s_k, s_v), [x, *attn.prefix.parameters()])


def test_prefix_after_the_projection():
    """Li and Liang: s_k and s_v are keys and values already."""
    attn, x = model_with("prefix", prefix_length=3, prefix_style="after").blocks[0].attn, x_in()
    k = torch.cat([attn.prefix.s_k, linear(attn.k, x[0])])
    v = torch.cat([attn.prefix.s_v, linear(attn.v, x[0])])
    agree(attn(x, None, None, None)[0], softmax_attention(linear(attn.q, x[0]), k, v, attn, 3), [x, *attn.prefix.parameters()])


def test_prompt_tuning():
    """"Prepend the input embeddings with trainable tensor": the model on embeddings that were put together by hand."""
    model, tokens = model_with("prompt", prompt_length=4), torch.arange(T)
    embed, P = model.embed.base, model.embed.P
    x = torch.cat([P, embed.tokens.weight[tokens]]) + embed.positions.weight[:4 + T]
    for block in model.blocks:
        x = x + SelfAttention(block.attn, LN(block.norm1, x))
        x = x + transformer_FFN(block.ffn, LN(block.norm2, x))
    agree(model(tokens[None])[0][0], LN(model.norm, x)[4:] @ model.head.weight.T, [P])


# -----------------------------------------------------------------------------
# (IA)3


def ia3_self_attention(attn, x):
    """The slide."""
    k, q, v = linear(attn.k.base, x), linear(attn.q, x), linear(attn.v.base, x)
    k = attn.k.l_k * k
    v = attn.v.l_v * v
    return softmax_attention(q, k, v, attn)


def transformer_block_with_ia3(block, x):
    """The slide, LayerNorms moved before the parts."""
    residual = x
    x = ia3_self_attention(block.attn, LN(block.norm1, x))
    x = x + residual
    residual = x
    x = linear(block.ffn.up, LN(block.norm2, x))     # FFN in
    x = block.ffn.down.l_ff * gelu(x)                # (IA)3 scaling
    x = linear(block.ffn.down.base, x)               # FFN out
    x = x + residual
    return x


def transformer_block_with_ia3_post_LN(block, x):
    """The slide, word for word."""
    residual = x
    x = ia3_self_attention(block.attn, x)
    x = LN(block.norm1, x + residual)
    residual = x
    x = linear(block.ffn.up, x)
    x = block.ffn.down.l_ff * gelu(x)
    x = linear(block.ffn.down.base, x)
    x = LN(block.norm2, x + residual)
    return x


def test_ia3():
    block, x = model_with("ia3").blocks[0], x_in()
    wrt = [x, block.attn.k.l_k, block.attn.v.l_v, block.ffn.down.l_ff]
    agree(block.attn(x, None, None, None)[0], ia3_self_attention(block.attn, x[0]), wrt[:3])
    agree(block(x)[0], transformer_block_with_ia3(block, x[0]), wrt)
    agree(post_LN(block, (lambda h: h, lambda h: h))(x)[0], transformer_block_with_ia3_post_LN(block, x[0]), wrt)


# -----------------------------------------------------------------------------
# BitFit


def test_bitfit():
    plain = GPT(tiny("gpt2"))
    params = {n for n, p in plain.named_parameters() if "bias" in n}     # the slide
    peft.add_bitfit(plain)
    assert {n for n, p in plain.named_parameters() if p.requires_grad} == params


# -----------------------------------------------------------------------------
# LoRA: h = W_0 x + Delta W x = W_0 x + B A x


@pytest.mark.parametrize("rslora", [False, True])
def test_lora(rslora):
    layer, x = model_with("lora", rank=4, alpha=6.0, rslora=rslora).blocks[0].attn.q, x_in()
    W_0, b, A, B = layer.base.weight, layer.base.bias, layer.A, layer.B
    s = 6 / (2 if rslora else 4)
    h = torch.stack([W_0 @ v + b + s * (B @ (A @ v)) for v in x[0]])     # a column vector at a time, as on the slide
    agree(layer(x)[0], h, [x, A, B])
    agree(layer(x)[0], x[0] @ (W_0 + s * B @ A).T + b, [x, A, B])        # W_0 + Delta W, the "Update Step"


def test_lora_and_ia3_on_one_matrix():
    layer, x = model_with("lora+ia3", rank=4).blocks[0].attn.k, x_in()
    lora = layer.base
    agree(layer(x)[0], layer.l_k * (linear(lora.base, x[0]) + 4 * (x[0] @ lora.A.T @ lora.B.T)), [x, lora.A, lora.B, layer.l_k])


# -----------------------------------------------------------------------------
# QLoRA: "we dequantize the storage data type to the computation data type to perform the forward and backward pass"


def test_qlora():
    torch.manual_seed(0)
    model = GPT(tiny("gpt2", n_head=1), torch.float64)
    peft.apply(model, "qlora", rank=4)
    layer, x = model.blocks[0].attn.q, x_in()
    layer.A.data, layer.B.data = layer.A.data.double(), torch.randn(d, 4, dtype=torch.float64)
    W = layer.base.dequantize(torch.float64)
    agree(layer(x)[0], x[0] @ W.T + layer.base.bias + 4 * (x[0] @ layer.A.T @ layer.B.T), [x, layer.A, layer.B])
    assert layer.base.weight_q.scheme == "nf4" and layer.base.weight_q.double


# -----------------------------------------------------------------------------
# DoRA (Liu et al. 2024): W' = m (W_0 + Delta W) / |W_0 + Delta W|, eq. 5; the norm is a constant for the gradient, section 4.3


@pytest.mark.parametrize("storage", [None, quant.Storage("nf4", 32, True), quant.Storage("int8")])
def test_dora(storage):
    torch.manual_seed(0)
    model = GPT(tiny("gpt2", n_head=1), torch.float64)
    if storage:
        quant.store(model, storage)
    peft.apply(model, "dora", rank=4, alpha=6.0)
    model.double()
    layer, x = model.blocks[0].attn.q, x_in()
    W_0 = layer.base.dequantize(torch.float64) if storage else layer.base.weight
    assert torch.allclose(layer.m, W_0.norm(dim=1), rtol=1e-5) and layer.m.shape == (d,)
    for p in (layer.A, layer.B, layer.m):
        p.data += 0.2 * torch.randn_like(p)
    V = W_0 + 6 / 4 * layer.B @ layer.A
    norm = (W_0.float() + 6 / 4 * layer.B @ layer.A).norm(dim=1).detach()      # of the weight in float32
    agree(layer(x)[0], x[0] @ (layer.m[:, None] * V / norm[:, None]).T + layer.base.bias, [x, layer.A, layer.B, layer.m])


# -----------------------------------------------------------------------------
# VeRA (Kopiczko et al. 2024): h = W_0 x + Lambda_b B Lambda_d A x, eq. 2


def test_vera():
    model, x = model_with("vera", rank=4), x_in()
    layer, other = model.blocks[0].ffn.down, model.blocks[1].attn.q
    A, B = layer.A, layer.B
    assert torch.equal(A, other.A) and A.shape == (4, 4 * d) and B.shape == (4 * d, 4)      # one pair, as large as the widest layers
    W_0, b = other.base.weight, other.base.bias
    h = torch.stack([W_0 @ v + b + torch.diag(other.b) @ B[:d] @ torch.diag(other.d) @ A[:, :d] @ v for v in x[0]])
    agree(other(x)[0], h, [x, other.d, other.b])


# -----------------------------------------------------------------------------
# the quantization example


def test_the_example():
    levels = [-1.0, -0.86, -0.73, -0.6, -0.46, -0.33, -0.2, -0.06, 0.06, 0.2, 0.33, 0.46, 0.6, 0.73, 0.86, 1.0]     # as printed
    assert all(abs(a - b) < 0.0067 for a, b in zip(levels, quant.CODES["linear4"].levels, strict=True))
    w = torch.tensor([0.42, 1.0] + [0.0] * 14)
    q = quant.quantize(w, "linear4", 16)
    code = int(quant.unpack(q.packed, 4, 16)[0])
    assert code == 11 and min(range(16), key=lambda i: abs(levels[i] - 0.42)) == 11      # the slide says 12: the twelfth
    assert q.dequantize()[0].item() == pytest.approx(7 / 15) and round(abs(7 / 15 - 0.42), 4) == 0.0467     # the slide: 0.04
    assert len(range(-8, 8)) == 16 and len(range(-127, 128)) == 255                      # the slide: 256 values


def test_nf4_is_not_evenly_spaced():
    steps = torch.tensor(quant.CODES["nf4"].levels).diff()
    assert steps.max() / steps.min() > 3
    steps = torch.tensor(quant.CODES["linear4"].levels).diff()
    assert torch.allclose(steps, steps[:1].expand(15))


def test_nothing_is_centred():
    """"0 mean and unit variance" is division by the block's largest magnitude; a shift of the weights is no shift of the codes."""
    w = torch.linspace(3, 4, 64)
    q = quant.quantize(w, "nf4", 64)
    assert q.absmax.item() == 4 and (quant.unpack(q.packed, 4, 64) >= 14).all()


# -----------------------------------------------------------------------------
# the table's parameter counts

TABLE = [   # model, method, options, parameters that follow from the method, millions on the slide
    ("gpt2-medium", "full", {}, 354_823_168, 354.92), ("gpt2-large", "full", {}, 774_030_080, 774.03),
    ("gpt2-medium", "top", dict(top_k=2), 25_192_448, 25.19),
    ("gpt2-medium", "adapter", dict(adapter_style="lin", adapter_size=6), 24 * (2 * 1024 * 6 + 6 + 1024 + 2 * 1024), 0.37),
    ("gpt2-medium", "adapter", dict(adapter_style="lin", adapter_size=224), 24 * (2 * 1024 * 224 + 224 + 1024 + 2 * 1024), 11.09),
    ("gpt2-large", "adapter", dict(adapter_style="lin", adapter_size=8), 36 * (2 * 1280 * 8 + 8 + 1280 + 2 * 1280), 0.88),
    ("gpt2-large", "adapter", dict(adapter_style="lin", adapter_size=248), 36 * (2 * 1280 * 248 + 248 + 1280 + 2 * 1280), 23.00),
    ("gpt2-medium", "lora", dict(rank=4, targets="q,v"), 24 * 2 * 2 * 1024 * 4, 0.35), ("gpt2-large", "lora", dict(rank=4, targets="q,v"), 36 * 2 * 2 * 1280 * 4, 0.77)]
DIFFER = {("gpt2-medium", "full"), ("gpt2-medium", "lora"), ("gpt2-large", "lora")}      # 354.82, 0.39, 0.74: the table's own counts do not follow


@pytest.mark.parametrize("name, method, options, count, slide", TABLE)
def test_counts_of_the_table(name, method, options, count, slide):
    from model import PRESETS
    with torch.device("meta"):
        model = GPT(PRESETS[name])
        model.base_fingerprint = "meta"
        peft.apply(model, method, **options)
    counts = peft.count_parameters(model)
    assert counts["trainable"] == count
    assert (round(count / 1e6, 2) == slide) == ((name, method) not in DIFFER)
