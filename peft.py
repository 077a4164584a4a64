"""
The lecture's chapter on PEFT: every method a plain function that changes the model in place and reads like its slide.

    import peft
    report = peft.apply(model, "lora+prefix", rank=8, prefix_length=16)      # or add_lora(model, rank=8), add_prefix(...)
    ... train: only the method's tensors require gradients ...
    peft.save_adapter(model, "adapter.pt")                                   # these tensors alone
    peft.detach(model)                                                       # the base again, bit for bit
    peft.load_adapter(model, "adapter.pt")

Methods attach at four levels, so that methods of different kinds combine: a wrapper around a linear layer (LoRA, (IA)3), the forward of an
attention (prefix tuning), the forward of a block (adapters), the input (prompt tuning). The rest, UNFREEZING, only unfreezes.
Nothing writes to a frozen tensor of the base, and only a call of merge changes a weight; train() and eval() never do.

A new method is a function here, which notes itself with note_method, and a row of METHODS. The function's arguments are the
method's options: the command line reads their names, defaults and comments from this file.
"""

import inspect
import math
from collections import Counter
from dataclasses import dataclass, field
from types import MethodType

import torch
import torch.nn as nn
import torch.nn.functional as F

import quant
from lib.checks import check_known, checked
from lib.files import (check, combine_hashes, holds_tensors_by_name, read_file, sample_hash, save_file,
                       some)

# -----------------------------------------------------------------------------
# what a model carries


@dataclass
class Attached:
    """What the methods have done to a model. It lies in model.attached, which is None where no method is."""
    methods: dict = field(default_factory=dict)     # {method: its options}, in the order of attaching
    unfrozen: list = field(default_factory=list)    # (parameter of the base, method, old value on the host)
    replaced: list = field(default_factory=list)    # (module, attribute, module that was there or None)
    merged: list | None = None                      # the same of the layers that merge has replaced, or None


UNFREEZING = ("full", "top", "bitfit", "embed", "head", "norm")     # methods that train tensors of the base and add none
LORA_KIN = ("lora", "qlora", "dora", "vera")     # methods that wrap in LoRA's way; a model carries one of them at most


def methods(model):
    """{method: its options} of what is attached; {} where nothing is."""
    return model.attached.methods if model.attached else {}


def kind_of(method):
    """The method's name, but "lora" for all of LoRA's kin. A model carries one method of a kind."""
    return "lora" if method in LORA_KIN else method


def note_method(model, method, **options):
    """
    Notes in model.attached that the method is attached with these options, whose types and bounds are checked; the first
    method freezes the base.
    """
    options = checked_options(options)
    check(not is_merged(model), f"{method}: the model is merged; unmerge it first")
    check(kind_of(method) not in map(kind_of, methods(model)), f"{method} is attached already; detach it first")
    if model.attached is None:
        fingerprint(model)
        model.attached = Attached()
        model.requires_grad_(False)
    model.attached.methods[method] = options


def put(model, parent, name, value):
    """Sets parent.name, where parent is a module of the model, and notes what was there for detach."""
    model.attached.replaced.append((parent, name, parent._modules.get(name)))
    setattr(parent, name, value)


def put_back(replaced):
    """Undoes replacements, the last one first. An attribute that was not there goes; a class's own forward is then in force."""
    for parent, name, before in reversed(replaced):
        if before is None:
            delattr(parent, name)
        else:
            setattr(parent, name, before)


class LinearWrapper(nn.Module):
    """Stands around a linear layer, which may be dense, stored (quantized) or wrapped itself."""
    dense_only_in = torch.float32        # in bfloat16 W_0 + s B A would round s B A away; the two stay apart

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.in_features = base.in_features
        self.out_features = base.out_features

    def dense(self, dtype):
        """Weight (out, in) and bias (out,) or None that compute, in float32, what the layer computes."""
        return merged_weight(self)


# -----------------------------------------------------------------------------
# reparametrization: LoRA


class LoRA(LinearWrapper):
    """h = W_0 x + s B A x (Hu et al. 2021, eq. 3)."""
    method = "lora"

    def __init__(self, base, r, s, dropout, device):
        super().__init__(base)
        self.s = s
        self.dropout = dropout
        self.A = nn.Parameter(torch.empty(r, base.in_features, device=device))
        self.B = nn.Parameter(torch.zeros(base.out_features, r, device=device))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, x):
        return low_rank_linear(self.base, x, self.A, self.B, self.s, self.dropout, self.training)

    def factors(self):
        """A (r, in) and s B (out, r)."""
        return self.A, self.s * self.B

    def merged(self, weight, bias):
        """weight (out, in) and bias (out,) or None of W_0, float32 -> those of W_0 + s B A."""
        dtype = torch.promote_types(self.A.dtype, weight.dtype)
        return weight + self.s * self.B.to(dtype) @ self.A.to(dtype), bias


def low_rank_linear(base, x, A, B, s, dropout, training):
    """W_0 x + b + s B A dropout(x), where W_0 (out, in) and b (out,) are a linear layer's. x (..., in) -> (..., out)."""
    stored = isinstance(base, quant.QuantLinear)
    weight = base.weight_q if stored else base.weight
    if stored or not weight.requires_grad:
        return quant.lora_linear(x, weight, base.bias, A, B, s, dropout, training)
    low = F.linear(F.dropout(x, dropout, training), A.to(x.dtype))     # full or top trains W_0 as well
    return base(x) + s * F.linear(low, B.to(x.dtype))


def add_lora(
    model,
    rank=8,             # LoRA: r
    alpha=16.0,         # LoRA: s = alpha / r
    dropout=0.0,        # LoRA: on the input of A
    targets="all",      # LoRA: which of q k v out up gate down, joined by commas
    rslora=False,       # LoRA: s = alpha / sqrt(r)
):
    """LoRA (Hu et al. 2021) on linear layers of the blocks. B is zero at first, so the model's function is unchanged."""
    return wrap_linears(model, LoRA, rank, alpha, dropout, targets, rslora)


def wrap_linears(model, Wrapper, rank, alpha, dropout, targets, rslora):
    """Puts a Wrapper, LoRA or one of its kin, around the layers that targets names; returns a line about it."""
    places = target_places(model, targets)
    options = {"rank": rank, "alpha": alpha, "dropout": dropout, "targets": targets, "rslora": rslora}
    note_method(model, Wrapper.method, **options)
    s = scale_of(options)
    for parent, name in places:
        wrapper = Wrapper(getattr(parent, name), rank, s, dropout, device_of(model))
        put(model, parent, name, wrapper)
    n_linear = len(list(linears(model)))
    return f"{Wrapper.method}: r {rank}, s {s:g}, wrapped {len(places)} of {n_linear} linear layers"


def target_places(model, targets):
    """[(parent, name)] of the layers to wrap. targets: "all", or their names joined by commas. Where (IA)3
    scales a layer, the place is the layer within it, because (IA)3 scales the result of LoRA."""
    known = list(dict.fromkeys(name for _, name, _ in linears(model)))
    wanted = known if targets == "all" else targets.split(",")
    for name in wanted:
        check(name in known, f"targets: no layer {name!r}; this model has {' '.join(known)}")  # fault 39
    chosen = [place for place in linears(model) if place[1] in wanted]
    return [(layer, "base") if isinstance(layer, IA3) else (parent, name) for parent, name, layer in chosen]


def scale_of(options):
    """LoRA's s, from its options: alpha / r, or with rslora alpha / sqrt(r) (Kalajdzievski 2023)."""
    r = options["rank"]
    return options["alpha"] / (math.sqrt(r) if options["rslora"] else r)


QLORA = quant.Storage("nf4", block=64, double=True)          # what qlora means where nothing else is asked for


def add_qlora(model, rank=8, alpha=16.0, dropout=0.0, targets="all", rslora=False):
    """QLoRA (Dettmers et al. 2023): LoRA over a base in NF4 with double quantization, quantized here where it is not yet."""
    fingerprint(model)                                         # of the base as it came
    if not stored_layers(model):
        quant.store(model, QLORA)
    return add_lora(model, rank, alpha, dropout, targets, rslora)


# -----------------------------------------------------------------------------
# reparametrization: DoRA


class DoRA(LoRA):
    """h = c (W_0 + s B A) x, where c = m / |W_0 + s B A| and the norm is of each row (Liu et al. 2024, eq. 5)."""
    method = "dora"

    def row_scale(self):
        """c (out,)."""
        with torch.no_grad():                        # the norm is a constant for the gradient (section 4.3)
            norm = super().merged(*merged_weight(self.base))[0].norm(dim=1)
        return self.m / unless_zero(norm)

    def forward(self, x):
        c = self.row_scale()
        y = self.base(x)
        x = F.dropout(x, self.dropout, self.training)
        W_0x = self.base(x) if self.training and self.dropout else y
        if self.base.bias is not None:
            W_0x = W_0x - self.base.bias.to(x.dtype)
        Ax = F.linear(x, self.A.to(x.dtype))
        BAx = F.linear(Ax, self.B.to(x.dtype))
        return y + (c - 1).to(x.dtype) * W_0x + (c * self.s).to(x.dtype) * BAx     # exactly y at first

    def merged(self, weight, bias):
        """weight (out, in) and bias (out,) or None of W_0, float32 -> those of c (W_0 + s B A)."""
        weight, bias = super().merged(weight, bias)
        c = self.m / unless_zero(weight.norm(dim=1))
        return c[:, None] * weight, bias


def unless_zero(norm):
    """The norms of rows, 1 for a row of zeros, which pruned and extended models have: its m is 0 as well."""
    return norm.masked_fill(norm == 0, 1)


def add_dora(model, rank=8, alpha=16.0, dropout=0.0, targets="all", rslora=False):
    """DoRA (Liu et al. 2024): LoRA turns the rows of W_0, and a trained m, |W_0| at first, is their length."""
    report = wrap_linears(model, DoRA, rank, alpha, dropout, targets, rslora)
    for block in model.blocks:
        if hasattr(block, "unshard"):                            # FSDP has divided its tensors among the processes
            block.unshard()
        for layer in block.modules():
            if isinstance(layer, DoRA):
                layer.m = nn.Parameter(merged_weight(layer.base)[0].norm(dim=1))
        if hasattr(block, "reshard"):
            block.reshard()
    return report


# -----------------------------------------------------------------------------
# reparametrization: VeRA


class VeRA(LinearWrapper):
    """h = W_0 x + (b * B) (d * A) x (Kopiczko et al. 2024, eq. 2).

    A and B are random, frozen, and shared by all layers, each of which takes as many columns of A and rows of B as it needs;
    d (r,) and b (out,), which scale the rows of A and B, are the layer's own and trained."""
    method = "vera"

    def __init__(self, base, A, B, dropout):
        super().__init__(base)
        self.dropout = dropout
        self.register_buffer("A", A, persistent=False)           # (r, at least in)
        self.register_buffer("B", B, persistent=False)           # (at least out, r)
        self.d = nn.Parameter(A.new_full((len(A),), 0.1))
        self.b = nn.Parameter(B.new_zeros(base.out_features))

    def factors(self):
        """What LoRA calls A (r, in) and B (out, r)."""
        A = self.A[:, :self.in_features]
        B = self.B[:self.out_features]
        return self.d[:, None] * A, self.b[:, None] * B

    def forward(self, x):
        return low_rank_linear(self.base, x, *self.factors(), 1.0, self.dropout, self.training)

    def merged(self, weight, bias):
        """weight (out, in) and bias (out,) or None of W_0, float32 -> those of W_0 + (b * B) (d * A)."""
        A, B = self.factors()
        return weight + B @ A, bias


def shared_projections(rank, shapes):
    """VeRA's random A (rank, widest in) and B (widest out, rank) for layers of the shapes [(out, in)], as PEFT draws them."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = map(max, zip(*shapes))
    A = torch.empty(rank, columns, device="cpu")
    B = torch.empty(rows, rank, device="cpu")
    for matrix in (A, B):
        nn.init.kaiming_uniform_(matrix, generator=generator)
    return A, B


def add_vera(model, rank=8, dropout=0.0, targets="all"):
    """VeRA (Kopiczko et al. 2024), whose ranks are higher than LoRA's: 256 to 1024 there. b is zero at first. A and B are drawn
    from a seed of their own, as the peft library draws them, so that an adapter's file need not hold them."""
    places = target_places(model, targets)
    note_method(model, "vera", rank=rank, dropout=dropout, targets=targets)
    layers = [getattr(parent, name) for parent, name in places]
    shapes = [(layer.out_features, layer.in_features) for layer in layers]
    A, B = shared_projections(rank, shapes)
    A = A.to(device_of(model))
    B = B.to(device_of(model))
    for (parent, name), layer in zip(places, layers):
        put(model, parent, name, VeRA(layer, A, B, dropout))
    n_linear = len(list(linears(model)))
    return f"vera: r {rank}, wrapped {len(places)} of {n_linear} linear layers"


# -----------------------------------------------------------------------------
# additive: (IA)3


class IA3(LinearWrapper):
    """Scales the output (by l_k, l_v) or the input (by l_ff) of a linear layer."""
    method = "ia3"

    def __init__(self, base, name, device):
        super().__init__(base)
        self.name = name
        width = base.in_features if name == "l_ff" else base.out_features
        self.register_parameter(name, nn.Parameter(torch.ones(width, device=device)))

    def forward(self, x):
        l = getattr(self, self.name).to(x.dtype)
        if self.name == "l_ff":
            return self.base(l * x)
        return l * self.base(x)

    def merged(self, weight, bias):
        """weight (out, in) and bias (out,) or None of the layer within, float32 -> the same, scaled."""
        l = getattr(self, self.name)
        if self.name == "l_ff":
            return weight * l, bias
        return l[:, None] * weight, None if bias is None else l * bias


def add_ia3(model):
    """(IA)3 (Liu et al. 2022): k = l_k * k, v = l_v * v, and l_ff * act(x W_1) before W_2. All are ones at first."""
    note_method(model, "ia3")
    device = device_of(model)
    for block in model.blocks:
        attn = block.attn
        ffn = block.ffn
        put(model, attn, "k", IA3(attn.k, "l_k", device))
        put(model, attn, "v", IA3(attn.v, "l_v", device))
        put(model, ffn, "down", IA3(ffn.down, "l_ff", device))
    return f"ia3: l_k, l_v, l_ff in {len(model.blocks)} layers"


# -----------------------------------------------------------------------------
# additive: bottleneck adapters


class Adapter(nn.Module):
    """x + W_up act(W_down x); Lin's has a LayerNorm before W_down. W_up is zero at first."""
    method = "adapter"
    ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "swish": F.silu, "tanh": torch.tanh}

    def __init__(self, Linear, d, size, activation, norm):
        """Linear: the model's class of linear layers; d: the model's width; size: the bottleneck's; norm: whether Lin's."""
        super().__init__()
        self.norm = nn.LayerNorm(d) if norm else None
        self.down = Linear(d, size)
        self.up = Linear(size, d)
        self.act = self.ACTIVATIONS[activation]
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x):
        h = x
        if self.norm is not None:
            weight = self.norm.weight.to(x.dtype)
            bias = self.norm.bias.to(x.dtype)
            h = F.layer_norm(x, weight.shape, weight, bias)
        return x + self.up(self.act(self.down(h)))


def transformer_block_with_adapter(self, x, rope=None, mask=None, cache=None):
    """The slide's block; here the norms lie within `attention` and `feed_forward`. `self` is a Block."""
    residual = block_input = x
    x = self.attention(x, rope, mask, cache)
    x = self.adapter1(x)
    x = x + residual
    residual = x
    x = self.feed_forward(block_input if self.parallel else x)
    x = self.adapter2(x)
    return x + residual


def transformer_block_with_one_adapter(self, x, rope=None, mask=None, cache=None):
    """Pfeiffer's and Lin's block: one adapter, over the block's result. `self` is a Block."""
    return self.adapter2(type(self).forward(self, x, rope, mask, cache))


def add_adapter(
    model,
    adapter_style="houlsby",    # houlsby, pfeiffer or lin
    adapter_size=64,            # bottleneck width
    adapter_activation="relu",  # relu, gelu, swish or tanh
):
    """Bottleneck adapters. houlsby (Houlsby et al. 2019): after the attention and after the FFN; pfeiffer (Pfeiffer et al.
    2021): after the FFN's sum; lin (Lin et al. 2020): the same, with a LayerNorm of its own."""
    activations = ", ".join(Adapter.ACTIVATIONS)
    check(adapter_style in ("houlsby", "pfeiffer", "lin"), f"adapter_style is {adapter_style!r}; it must be houlsby, pfeiffer or lin")
    check(adapter_activation in Adapter.ACTIVATIONS, f"adapter_activation is {adapter_activation!r}; it must be one of {activations}")
    note_method(model, "adapter", adapter_style=adapter_style, adapter_size=adapter_size, adapter_activation=adapter_activation)
    if adapter_style == "houlsby":                               # adapter1 follows the attention, adapter2 the FFN
        names, forward = ("adapter1", "adapter2"), transformer_block_with_adapter
    else:
        names, forward = ("adapter2",), transformer_block_with_one_adapter
    Linear, d, norm = type(model.head), model.config.n_embd, adapter_style == "lin"
    for block in model.blocks:
        for name in names:
            with device_of(model):
                adapter = Adapter(Linear, d, adapter_size, adapter_activation, norm)
            put(model, block, name, adapter)
        put(model, block, "forward", MethodType(forward, block))
    return f"adapter: {adapter_style}, width {adapter_size}, in {len(model.blocks)} blocks"


# -----------------------------------------------------------------------------
# soft prompts: prefix tuning in every attention


class Prefix(nn.Module):
    """s_k and s_v of one layer: (n, n_embd) before the projection, (n, width of the keys) after it."""
    method = "prefix"

    def __init__(self, config, n, before, tied, mlp):
        """config: GPTConfig; n: positions; before: whether the projection acts on them; tied: s_k = s_v; mlp: hidden width or 0."""
        super().__init__()
        self.before = before
        self.mlp = None
        d = config.n_embd
        width = d if before else config.kv_heads * config.d_head
        if mlp:      # Li and Liang 2021, section 4.3, but an MLP for each layer; saving folds it away
            self.E = nn.Parameter(torch.randn(n, d) * 0.02)
            self.mlp = nn.Sequential(nn.Linear(d, mlp), nn.Tanh(), nn.Linear(mlp, 2 * width))
        else:
            self.s_k = nn.Parameter(torch.randn(n, width) * 0.02)
            self.s_v = self.s_k if tied else nn.Parameter(torch.randn(n, width) * 0.02)

    def forward(self):
        """s_k, s_v"""
        if self.mlp is not None:
            return self.mlp(self.E).chunk(2, -1)
        return self.s_k, self.s_v


def prompt_tuning_attention(self, x, rope, mask, cache):
    """The slide's attention; `self` is an Attention. The prompt is projected once, not once an example, by

        k = cat([s_k, x]) @ W_k = cat([s_k @ W_k, x @ W_k])
    """
    q, k, v = self.project(x, rope)
    if cache is None:
        s_k, s_v = projected_prompt(self, x)
        k = torch.cat((s_k, k), 2)
        v = torch.cat((s_v, v), 2)
    else:
        if cache.length == 0:
            cache.append(*projected_prompt(self, x))
        k, v = cache.append(k, v)
    if isinstance(mask, torch.Tensor):
        n = k.size(2) - mask.size(-1)
        mask = F.pad(mask, (n, 0), value=True)                   # every token sees the prefix
    y = self.attend(q, k, v, mask)
    return self.out(y.transpose(1, 2).flatten(2))


def projected_prompt(attn, x):
    """The soft prompt's part of k and of v, (B, heads, n, head_dim), in an Attention whose input is x (B, T, n_embd)."""
    s_k, s_v = attn.prefix()
    s_k = s_k.to(x.dtype)
    s_v = s_v.to(x.dtype)
    norm = None
    if attn.prefix.before:
        s_k = attn.k(s_k)                                        # s_k @ W_k
        s_v = attn.v(s_v)
        norm = attn.k_norm                                       # which keys pass before they have positions
    s_k = attn.heads(s_k[None], norm)                            # (n, width) -> (1, heads, n, head_dim)
    s_v = attn.heads(s_v[None])
    return s_k.expand(len(x), -1, -1, -1), s_v.expand(len(x), -1, -1, -1)


def add_prefix(
    model,
    prefix_length=16,           # s_k and s_v, in positions
    prefix_style="before",      # before the projection (slide) or after (Li and Liang)
    prefix_tied=False,          # s_k = s_v (before only)
    prefix_mlp=0,               # hidden width of the reparametrization (after only); 0: none
):
    """A soft prompt in every attention: before the projection the slide's prompt_tuning_attention (with prefix_tied the table's
    PreLayer), after it prefix tuning (Li and Liang 2021), where the tokens' positions begin behind a prefix that is not rotated."""
    before = prefix_style == "before"
    check_length(model, "prefix_length", prefix_length)
    check(before or prefix_style == "after", f"prefix_style is {prefix_style!r}; it must be before or after")
    check(before or not prefix_tied, "prefix_tied: s_k = s_v makes sense only with prefix_style before, not after the projection")
    check(prefix_mlp == 0 or prefix_mlp > 0 and not before, f"prefix_mlp is {prefix_mlp}; the reparametrization is for prefix_style after")
    note_method(model, "prefix", prefix_length=prefix_length, prefix_style=prefix_style, prefix_tied=prefix_tied, prefix_mlp=prefix_mlp)
    for block in model.blocks:
        with device_of(model):
            prefix = Prefix(model.config, prefix_length, before, prefix_tied, prefix_mlp)
        put(model, block.attn, "prefix", prefix)
        put(model, block.attn, "forward", MethodType(prompt_tuning_attention, block.attn))
    if not before:
        wrap_embedding(model).shift = prefix_length
        model.reserved += prefix_length
    return f"prefix: {prefix_length} positions {prefix_style} the projection, in {len(model.blocks)} layers"


def check_length(model, option, n):
    """ValueError unless n positions leave room in the model's context."""
    context = model.config.block_size
    check(1 <= n < context, f"{option} is {n}; it must be at least 1 and below the context of {context}")  # fault 29


# -----------------------------------------------------------------------------
# soft prompts: prompt tuning at the input


class Prompt(nn.Module):
    """The embedding with n trained vectors P in front. The tokens' positions begin behind them, and behind a prefix of `shift`."""
    method = "prompt"

    def __init__(self, base):
        super().__init__()
        self.base, self.shift, self.P = base, 0, None

    def forward(self, tokens, pos, past, lengths=None):
        n = 0 if self.P is None else len(self.P)
        pos = torch.where(pos < 0, pos, pos + self.shift + n)     # a negative position is padding
        x, pos = self.base(tokens, pos, past)
        if n == 0 or past:
            return x, pos
        P_pos = self.shift + torch.arange(n, device=pos.device)
        P = self.base.at(self.P.to(x.dtype), P_pos).expand(len(x), -1, -1)
        P_pos = P_pos.expand(*pos.shape[:-1], -1)                 # (n,), or (B, n) where pos is (B, T)
        lengths = lengths or [tokens.size(1)]
        x = [part for sequence in x.split(lengths, 1) for part in (P, sequence)]
        pos = [part for sequence in pos.split(lengths, -1) for part in (P_pos, sequence)]
        return torch.cat(x, 1), torch.cat(pos, -1)                # (B, T, n_embd) -> (B, n + T, n_embd)


def wrap_embedding(model):
    """Puts a Prompt around the model's embedding, unless there is one; returns it."""
    if not isinstance(model.embed, Prompt):
        put(model, model, "embed", Prompt(model.embed))
    return model.embed


def add_prompt(
    model,
    prompt_length=16,   # soft prompt, in positions
    prompt_ids=None,
):
    """Prompt tuning (Lester et al. 2021): prompt_length trained vectors before the input embeddings. They start as the embeddings
    of prompt_ids, token ids repeated as often as needed, or at random with the deviation of the embeddings."""
    vocab_size = model.config.vocab_size
    check_length(model, "prompt_length", prompt_length)
    if prompt_ids is not None:
        known = len(prompt_ids) > 0 and max(prompt_ids) < vocab_size
        check(known, f"prompt_ids must be tokens below {vocab_size}, at least one")
    note_method(model, "prompt", prompt_length=prompt_length)
    prompt = wrap_embedding(model)
    table = prompt.base.tokens.weight
    if prompt_ids is None:
        deviation = table.float().std()
        P = torch.randn(prompt_length, table.size(1), device=table.device) * deviation
        start = "at random"
    else:
        n = len(prompt_ids)
        ids = [prompt_ids[i % n] for i in range(prompt_length)]
        P = table.detach()[ids].float()
        start = f"from the first {prompt_length} of {n} tokens" if n > prompt_length else f"from {n} tokens, repeated"     # fault 47
    prompt.P = nn.Parameter(P)
    model.reserved += prompt_length
    return f"prompt: {prompt_length} vectors before the input, {start}"


# -----------------------------------------------------------------------------
# selective: BitFit, the last layers, everything; tables and norms, mostly beside another method


def add_bitfit(model):
    """BitFit (Ben Zaken et al. 2022)."""
    params = [(n, p) for n, p in base_parameters(model) if n.endswith("bias")]
    check(params, "bitfit: this base has no biases; another method trains it")
    return unfreeze(model, "bitfit", params)


def train_top(
    model,
    top_k=2,            # top: the last k blocks
):
    """Fine-tunes the last top_k blocks, the table's FT Top2."""
    n_layer = len(model.blocks)
    check(1 <= top_k <= n_layer, f"top_k is {top_k}; this model has {n_layer} blocks")
    starts = tuple(f"blocks.{i}." for i in range(n_layer - top_k, n_layer))
    params = [(n, p) for n, p in base_parameters(model) if n.startswith(starts)]
    return unfreeze(model, "top", params, stored_layers(model.blocks[-top_k:]), top_k=top_k)


def train_full(model):
    """Fine-tunes everything, the table's FT."""
    return unfreeze(model, "full", base_parameters(model), stored_layers(model))


TABLE = "embed.tokens.weight"            # of the token embeddings, and of the head where it is tied
NORMS = ("norm", "norm1", "norm2", "after1", "after2", "q_norm", "k_norm")


def is_norm(name):
    """Whether a parameter of that name is a norm's."""
    module = name.rpartition(".")[0]
    return module.rpartition(".")[2] in NORMS


def train_embed(model):
    """Trains the table of token embeddings, with it the head of a base that ties them."""
    params = [(n, p) for n, p in base_parameters(model) if n == TABLE]
    return unfreeze(model, "embed", params)


def train_head(model):
    """Trains the head. Where the base ties it to the embedding it stays tied: embed trains the one table for both."""
    tied = model.config.tied
    check(not tied or "embed" in methods(model), "head: this base has one table for embedding and head; embed trains it")
    params = [(n, p) for n, p in base_parameters(model) if n == "head.weight"]
    report = unfreeze(model, "head", params)
    return "head: the embedding's table, which embed trains" if tied else report


def train_norm(model):
    """Trains the norms, with what biases they have (Zhao et al. 2024 train nothing else)."""
    params = [(n, p) for n, p in base_parameters(model) if is_norm(n)]
    return unfreeze(model, "norm", params)


def unfreeze(model, method, params, stored=(), **options):
    """Makes params, [(name, parameter)] of the base, trainable and float32. `stored`: quantized layers, which cannot be trained.

    What another method trains already is left to it. The old values are kept for detach, in the host's memory, but not by
    full, which would hold the whole base twice.
    """
    check(not stored, f"{method}: {len(stored)} of the layers it trains are quantized; leave the base as it is, or use lora")
    check("full" not in methods(model), f"{method}: full trains everything already")
    note_method(model, method, **options)
    own = [p for _, p in params if not p.requires_grad]
    for p in own:
        host = "meta" if p.is_meta else "cpu"
        copy = None if method == "full" else p.detach().to(host, copy=True)
        model.attached.unfrozen.append((p, method, copy))
        p.data = p.data.float()
        p.requires_grad_(True)
    others = len(params) - len(own)
    shared = f"; {others} more are trained by the methods before" if others else ""
    return f"{method}: {len(own)} tensors of the base{shared}"


# -----------------------------------------------------------------------------
# methods by name

METHODS = {     # in the order in which they attach
    "full": train_full,
    "top": train_top,
    "bitfit": add_bitfit,
    "lora": add_lora,
    "qlora": add_qlora,
    "dora": add_dora,
    "vera": add_vera,
    "ia3": add_ia3,
    "prefix": add_prefix,
    "adapter": add_adapter,
    "prompt": add_prompt,
    "embed": train_embed,
    "head": train_head,
    "norm": train_norm,
}


def options_of(add):
    """{option: its default} of a method's function."""
    arguments = inspect.signature(add).parameters.values()
    return {argument.name: argument.default for argument in arguments if argument.name != "model"}


DEFAULTS = {option: default for add in METHODS.values() for option, default in options_of(add).items()}


def method_names(method):
    """"lora+prefix" -> ["lora", "prefix"], in the order of METHODS. Unknown names and two of one kind are refused."""
    names = method.split("+")
    for name in names:
        check_known("method", name, METHODS)  # fault 39
    kinds = set(map(kind_of, names))
    check(len(kinds) == len(names), f"method {method!r} names one twice, or two of {', '.join(LORA_KIN)}")
    return [name for name in METHODS if name in names]


def checked_options(options, where=""):
    """The options, each of its default's type and within its bounds; ValueError, in front of which `where` stands, else."""
    found = {}
    for name, value in options.items():
        check_known("option", name, DEFAULTS)
        kind = type(DEFAULTS[name])
        found[name] = value if DEFAULTS[name] is None else checked(name, value, kind, where)
    return found


def apply(model, method, **options):
    """Attaches the methods, joined by +, in place; returns a line about each. Each takes its own of the options (DEFAULTS)."""
    options = checked_options(options)
    names, report = method_names(method), []
    check(not methods(model), f"the model carries {'+'.join(methods(model))} already; detach it first")
    try:
        for name in names:
            add = METHODS[name]
            own = {option: value for option, value in options.items() if option in options_of(add)}
            report.append(add(model, **own))
    except ValueError:
        remove_methods(model)
        raise
    return report


def keep_trained_in(model, dtype):
    """Casts the trained parameters, float32 until here, to dtype."""
    for _, p, method in parameters_by_method(model):
        if method:
            p.data = p.data.to(dtype).contiguous()


def default_storage(method):
    """The quant.Storage that the methods' names imply: qlora's, or None."""
    return QLORA if "qlora" in method_names(method) else None


def virtual_positions(method, options):
    """How many positions of the context the methods, joined by +, take from the tokens."""
    names = method_names(method)
    options = DEFAULTS | options
    positions = 0
    if "prompt" in names:
        positions += options["prompt_length"]
    if "prefix" in names and options["prefix_style"] == "after":
        positions += options["prefix_length"]
    return positions


def detach(model):
    """Takes every method off and leaves the base bit for bit as it was. full is refused: it keeps no copy of the base."""
    check("full" not in methods(model), "full changed the base itself and kept no copy; load the base again")
    remove_methods(model)


def remove_methods(model):
    """Takes every method off. What full has trained stays as it is; it is frozen again."""
    if model.attached is None:
        return
    if is_merged(model):
        unmerge(model)
    put_back(model.attached.replaced)
    model.reserved = 0
    for p, _, copy in model.attached.unfrozen:
        if copy is not None:
            p.data = copy.to(p.device)
        p.requires_grad_(False)
    model.attached = None


# -----------------------------------------------------------------------------
# merging

NOT_A_WEIGHT = ("prefix", "prompt", "adapter")     # methods that no change of the base's weights can stand for


def merge(model, requantize=False):
    """Replaces each layer that LoRA's kin or (IA)3 wrap by one with the merged weight, computed in float32 and kept in the compute
    type; unmerge undoes it. What the methods of UNFREEZING train is in the weights already. Returns {"layers": layers merged}.

    requantize: a merged weight is stored again as the base's was. The small changes of an adapter can vanish in that, so the
    result also holds mean absolute differences of logits, what UNFREEZING has trained left as it is: "adapter" (with the
    wrappers and without), "kept" (merged and without) and "error" (merged and with).
    """
    check(methods(model), "nothing is attached that could be merged")
    check(not is_merged(model), "the model is merged already; unmerge it first")  # fault 40
    mergeable = [method for method in METHODS if method not in NOT_A_WEIGHT]
    for method in methods(model):
        check(method in mergeable, f"{method} is not a change of a weight and cannot be merged; {', '.join(mergeable)} can")
    wrapped = [place for place in linears(model) if isinstance(place[2], LinearWrapper)]
    merged = [merged_linear(model, wrapper, requantize) for _, _, wrapper in wrapped]
    report = {"layers": len(wrapped)}
    if requantize:
        report |= change_of_logits(model, wrapped, merged)
    put_layers(wrapped, merged)
    model.attached.merged = wrapped
    return report


def put_layers(places, layers):
    """Puts a layer at each of the places (parent, name, what was there)."""
    for (parent, name, _), layer in zip(places, layers, strict=True):
        setattr(parent, name, layer)


@torch.no_grad()
def merged_linear(model, wrapper, requantize):
    """A wrapped layer as a plain one: dense in the compute type or, with requantize, stored as its base is."""
    weight, bias = merged_weight(wrapper)
    base = innermost(wrapper)
    if requantize and isinstance(base, quant.QuantLinear):
        q = base.weight_q
        stored = quant.quantize(weight.to(q.dtype), q.scheme, q.block, q.double)
        return quant.QuantLinear(stored, bias)
    layer = type(model.head)(base.in_features, base.out_features, device="meta")
    layer.weight = nn.Parameter(weight)
    layer.bias = None if bias is None else nn.Parameter(bias)
    return layer.to(model.dtype).requires_grad_(False)


def merged_weight(layer):
    """weight (out, in) and bias (out,) or None, float32, of a linear layer with its wrappers, of which the inner acts first."""
    if isinstance(layer, LinearWrapper):
        return layer.merged(*merged_weight(layer.base))
    return layer.dense(torch.float32)


def change_of_logits(model, wrapped, merged):
    """What merging the wrapped layers does to the logits, as merge reports it. The model is left with the merged layers."""
    with_adapter = some_logits(model)
    put_layers(wrapped, [innermost(wrapper) for _, _, wrapper in wrapped])
    of_base = some_logits(model)
    put_layers(wrapped, merged)
    of_merged = some_logits(model)
    return {"adapter": mean_difference(with_adapter, of_base), "kept": mean_difference(of_merged, of_base),
            "error": mean_difference(of_merged, with_adapter)}


@torch.no_grad()
def some_logits(model):
    """float32 logits (1, T, vocab_size) of the first 64 tokens of the vocabulary, in a row, without dropout."""
    training = model.training
    n = min(64, model.config.block_size)
    tokens = torch.arange(n, device=device_of(model)) % model.config.vocab_size
    logits, _ = model.eval()(tokens[None])
    model.train(training)
    return logits.float()


def mean_difference(a, b):
    """The mean of |a - b|."""
    return float((a - b).abs().mean())


def unmerge(model):
    """Undoes merge: the wrappers, and the base bit for bit in its stored type."""
    check(is_merged(model), "the model is not merged")
    put_back(model.attached.merged)
    model.attached.merged = None


def is_merged(model):
    """Whether merge has put the methods into the base's weights."""
    return model.attached is not None and model.attached.merged is not None


# -----------------------------------------------------------------------------
# accounting


def parameters_by_method(model):
    """Yields (name, parameter, method that trains it or None) of every parameter once. Wrappers leave no trace in a name:
    blocks.0.attn.q.A, blocks.0.attn.q.bias. Quantized tensors are left out, also where FSDP has made parameters of them."""
    unfrozen = model.attached.unfrozen if model.attached else ()
    method_of = {id(p): method for p, method, _ in unfrozen}
    quantized = set()                                            # ids of parameters, too
    for module in model.modules():
        if hasattr(module, "method"):
            own = module.parameters(recurse=not hasattr(module, "base"))
            method_of |= {id(p): module.method for p in own}
        if isinstance(module, quant.QuantLinear):
            quantized |= {id(p) for name, p in module.named_parameters() if name != "bias"}
    for name, p in model.named_parameters():
        if id(p) not in quantized:
            yield name.replace("base.", ""), p, method_of.get(id(p))


def base_parameters(model):
    """[(name, parameter)] of the base: what no method has added."""
    parameters = parameters_by_method(model)
    return [(name, p) for name, p, method in parameters if method is None or method in UNFREEZING]


def stored_layers(module):
    """The quantized linear layers within a module."""
    return [m for m in module.modules() if isinstance(m, quant.QuantLinear)]


def count_parameters(model):
    """{"trainable", "base", "total", "by_method"}, of logical shapes: 4-bit weights count as the weights that they are.

    total: the base and what was added to it; by_method: {method: parameters}, whose sum is trainable.
    """
    base = sum(layer.weight_q.numel() for layer in stored_layers(model))
    base += sum(p.numel() for _, p in base_parameters(model))
    by_method = Counter()
    for _, p, method in parameters_by_method(model):
        if method:
            by_method[method] += p.numel()
    added = sum(n for method, n in by_method.items() if method not in UNFREEZING)
    return {"trainable": by_method.total(), "base": base, "total": base + added, "by_method": dict(by_method)}


def param_groups(model, learning_rate, weight_decay, lora_plus_ratio):
    """Groups for an optimizer: matrices decay, vectors, norms and soft prompts do not; B of LoRA has lora_plus_ratio times the learning
    rate (LoRA+, Hayou et al. 2024), which each group keeps as its "ratio" for the schedule."""
    groups = {}
    for name, p, method in parameters_by_method(model):
        if method:
            ratio = lora_plus_ratio if name.endswith(".B") else 1.0
            decays = p.dim() > 1 and method not in ("prefix", "prompt") and not is_norm(name)
            groups.setdefault((ratio, weight_decay if decays else 0.0), []).append(p)
    check(groups, "nothing is trainable: attach a method first")
    return [{"params": params, "lr": learning_rate * ratio, "ratio": ratio, "weight_decay": decay}
            for (ratio, decay), params in groups.items()]


def fingerprint(model):
    """SHA-256 of the base as it came, before quantization, casts and training: of 4096 values of each tensor, evenly spread.

    lib.checkpoint.load_base notes it in model.base_fingerprint from the files; for another model it is made here, the first time.
    """
    if model.base_fingerprint is None:
        tensors = dict(base_parameters(model))
        for name, module in model.named_modules():
            if isinstance(module, quant.QuantLinear):
                tensors |= {f"{name}.{key}": t for key, t in module.weight_q.tensors().items()}
        model.base_fingerprint = combine_hashes({name: sample_hash(t) for name, t in tensors.items()})
    return model.base_fingerprint


# -----------------------------------------------------------------------------
# the life of an adapter: extract, save, load, switch, add

FORMAT = 1


def adapter_state_dict(model):
    """{name: tensor} of the trained tensors."""
    return {name: p.detach() for name, p, method in parameters_by_method(model) if method}


def load_state(model, tensors, where="state"):
    """Sets the trained tensors. Keys, shapes, types and values are all checked before the first is written."""
    own = adapter_state_dict(model)
    check(holds_tensors_by_name(tensors), f"{where}: holds something else than tensors by name")
    check_tensors(tensors, own, where)
    with torch.no_grad():
        for name, t in own.items():
            t.copy_(tensors[name])


def check_tensors(tensors, own, where):
    """ValueError unless tensors has the names and shapes of own, is float32 or of own's type, and finite."""
    missing = own.keys() - tensors.keys()
    extra = tensors.keys() - own.keys()
    check(not missing, f"{where}: lacks {len(missing)} tensors: {some(missing)}")  # fault 9
    check(not extra, f"{where}: {len(extra)} tensors too many: {some(extra)}")
    for name, t in tensors.items():
        shape = own[name].shape
        found = tuple(getattr(t, "shape", ()))
        check(found == shape, f"{where}: {name} has shape {found}; here it is {tuple(shape)}")  # fault 10
        check_values(name, t, where, own[name].dtype)


def check_values(name, t, where, also=torch.float32):
    """ValueError unless t is a tensor of float32, or of the type also, and finite."""
    kind = getattr(t, "dtype", type(t).__name__)
    check(kind in (torch.float32, also), f"{where}: {name} is {kind}; it must be torch.float32")  # fault 11
    check(bool(t.isfinite().all()), f"{where}: {name} holds NaN or infinity")  # fault 12


def options_attached(model):
    """{option: value} of all the methods that are attached."""
    return {option: value for options in methods(model).values() for option, value in options.items()}


def pack_adapter(model):
    """What an adapter's file holds: plain values and the trained tensors, on the CPU."""
    check(methods(model), "nothing is attached that could be saved")
    check(not is_merged(model), "the model is merged; unmerge it first")
    return packed("+".join(methods(model)), options_attached(model), adapter_state_dict(model), fingerprint(model))


def packed(method, options, tensors, base):
    """What an adapter's file holds, of methods, their options and trained tensors over a base of that fingerprint."""
    tensors = kept_tensors(tensors, options)
    options = options | {"prefix_mlp": 0} if "prefix_mlp" in options else options
    tensors = {name: t.float().cpu() for name, t in tensors.items()}
    count = sum(t.numel() for t in tensors.values())
    return {"format": FORMAT, "kind": "adapter", "method": method, "options": options, "base": base, "parameters": count,
            "tensors": tensors}


def kept_tensors(tensors, options):
    """Those that an adapter's file holds of the trained tensors, or what stands in it for them."""
    return fold_prefix(tensors) if options.get("prefix_mlp") else tensors


def count_kept(model):
    """How many parameters the adapter's file holds: fewer than are trained with a prefix's reparametrization."""
    tensors = kept_tensors(adapter_state_dict(model), options_attached(model))
    return sum(t.numel() for t in tensors.values())


PREFIX_MLP = ("E", "mlp.0.weight", "mlp.0.bias", "mlp.2.weight", "mlp.2.bias")


def fold_prefix(tensors):
    """The trained tensors, with the s_k and s_v that a prefix's reparametrization comes to in place of its E and MLP."""
    folded = {name: t for name, t in tensors.items() if ".attn.prefix." not in name}
    for name in tensors:
        start, found, _ = name.partition(".prefix.E")
        if found:
            missing = {f"{start}.prefix.{part}" for part in PREFIX_MLP} - tensors.keys()
            check(not missing, f"the prefix's reparametrization lacks {some(missing)}")
            E, W_1, b_1, W_2, b_2 = (tensors[f"{start}.prefix.{part}"].detach() for part in PREFIX_MLP)
            hidden = torch.tanh(F.linear(E, W_1, b_1))
            s_k, s_v = F.linear(hidden, W_2, b_2).chunk(2, -1)
            folded |= {f"{start}.prefix.s_k": s_k.clone(), f"{start}.prefix.s_v": s_v.clone()}
    return folded


def save_adapter(model, path):
    """Writes the trained tensors alone, with what is needed to attach them again."""
    save_file(path, pack_adapter(model))


def read_adapter(path):
    """The checked content of an adapter's file, on the CPU."""
    content = read_file(path)
    kind = content.get("kind")
    version = content.get("format")
    check(kind == "adapter", f"{path}: not an adapter ({kind or 'no kind'} in it)")
    known = type(version) is int and version <= FORMAT
    check(known, f"{path}: format {version} is newer than this code's {FORMAT}; update nanopeft")  # fault 17
    types = {"method": str, "options": dict, "base": str, "parameters": int, "tensors": dict}
    for key, kind in types.items():
        check(isinstance(content.get(key), kind), f"{path}: {key} is missing or not a {kind.__name__}")
    check(content["tensors"], f"{path}: an empty adapter, no tensors in it")
    method_names(content["method"])
    options = checked_options(content["options"], f"{path}: ")
    tensors = content["tensors"]
    check(holds_tensors_by_name(tensors), f"{path}: holds something else than tensors by name")
    count = sum(t.numel() for t in tensors.values())
    check(count == content["parameters"], f"{path}: {count} parameters, but it says {content['parameters']}")
    return content | {"options": options}


def check_alone(content, path):
    """Checks the content of an adapter (read_adapter) without its base: its values, and that each A fits its B. Returns it."""
    tensors = content["tensors"]
    for name, t in tensors.items():
        check_values(name, t, path)
        layer, _, half = name.rpartition(".")
        if half in ("A", "B"):
            A, B = (tensors.get(f"{layer}.{half}", torch.zeros(())) for half in "AB")
            fits = A.dim() == B.dim() == 2 and len(A) == B.size(1) and A.numel() and B.numel()
            check(fits, f"{path}: A and B of {layer} have the shapes {tuple(A.shape)} and {tuple(B.shape)}; (r, in) and (out, r) belong together")
    return content


def load_adapter(model, path, replace=False):
    """Attaches an adapter's methods and sets its tensors. path: a file, or the dict that read_adapter returns.

    Where the model carries the same methods with the same options, the tensors alone are set. Where it carries others, that is
    an error; with replace they are detached first.
    """
    content, where = path, "adapter"
    if not isinstance(path, dict):
        content, where = read_adapter(path), path
    base = content["base"]
    own = fingerprint(model)
    check(base == own, f"{where}: made for the base {base[:12]}, this one is {own[:12]}")  # fault 13
    check(not is_merged(model), "the model is merged; unmerge it first")
    carried = "+".join(methods(model))
    same = carried == content["method"] and options_attached(model) == content["options"]
    if carried and not same:
        differ = differing_options(content["options"], options_attached(model))
        check(replace, f"{where}: {content['method']} with {differ}; the model carries {carried}: detach it first")
        # The tensors of full replace all of the base, so that nothing need be put back before them.
        remove = remove_methods if "full" in method_names(content["method"]) else detach
        remove(model)
    if not same:
        apply(model, content["method"], **content["options"])
    try:
        load_state(model, content["tensors"], where)
    except ValueError:
        if not same:
            remove_methods(model)
        raise


def differing_options(theirs, ours):
    """The options that differ in two dicts of them, for a message."""
    differ = [name for name in theirs | ours if theirs.get(name) != ours.get(name)]
    return ", ".join(f"{name} {theirs.get(name)!r} (here {ours.get(name)!r})" for name in differ) or "other methods"


def add_adapters(adapters, weights):
    """Adds LoRA adapters linearly: sum_i w_i s_i B_i A_i as one LoRA of rank sum_i r_i and scale 1.

    adapters: dicts of read_adapter, all of lora alone, of one base and one set of layers; weights: w_i, a number for each of
    them. Returns such a dict.
    """
    first = adapters[0]
    halves = {name: [] for name in first["tensors"]}             # name of an A or a B -> the adapters' own
    for adapter, w in zip(adapters, weights, strict=True):
        method = adapter["method"]
        base = adapter["base"]
        tensors = adapter["tensors"]
        targets = adapter["options"]["targets"]
        check(method == "lora", f"only lora adapters can be added, not {method}")
        check(base == first["base"], f"adapters of different bases: {first['base'][:12]} and {base[:12]}")
        check(tensors.keys() == halves.keys(), f"adapters of different layers: {first['options']['targets']} and {targets}")
        s = scale_of(adapter["options"])
        for name, half in tensors.items():
            halves[name].append(half if name.endswith(".A") else w * s * half)
    tensors = {name: torch.cat(own, 0 if name.endswith(".A") else 1) for name, own in halves.items()}
    rank = sum(adapter["options"]["rank"] for adapter in adapters)
    options = first["options"] | {"rank": rank, "alpha": float(rank), "rslora": False}
    return first | {"options": options, "tensors": tensors, "parameters": sum(t.numel() for t in tensors.values())}


# -----------------------------------------------------------------------------
# small things


def linears(model):
    """Yields (parent, name, layer) of the linear layers of the blocks, wrapped or not."""
    for block in model.blocks:
        for parent in (block.attn, block.ffn):
            for name in quant.LINEAR_LAYERS:
                layer = getattr(parent, name, None)
                if layer is not None:
                    yield parent, name, layer


def innermost(layer):
    """The linear layer within its wrappers."""
    while isinstance(layer, LinearWrapper):
        layer = layer.base
    return layer


def device_of(model):
    """The torch.device where the model lies."""
    return model.head.weight.device
