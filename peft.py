"""
The lecture's chapter on PEFT: every method a plain function that changes the model in place and reads like its slide.

    import peft
    report = peft.apply(model, "lora+prefix", rank=8, prefix_length=16)      # or add_lora(model, rank=8), add_prefix(...)
    ... train: only the method's tensors require gradients ...
    peft.save_adapter(model, "adapter.pt")                                   # these tensors alone
    peft.detach(model)                                                       # the base again, bit for bit
    peft.load_adapter(model, "adapter.pt")

Methods attach at four levels, so that any of them combine: a wrapper around a linear layer (LoRA, (IA)3), the forward of an
attention (prefix tuning), the forward of a block (adapters), the input (prompt tuning). BitFit, top and full only unfreeze.
The base stays where it was: nothing writes to a frozen tensor, and merging is a call of its own, never a side effect of eval().
"""

import difflib
import inspect
import math
from types import MethodType

import torch
import torch.nn as nn
import torch.nn.functional as F

import quant
from lib.files import check, combine_hashes, read_file, sample_hash, save_file, some

TARGETS = quant.LINEAR_LAYERS


# -----------------------------------------------------------------------------
# reparametrization: LoRA


class LoRA(nn.Module):
    """h = W_0 x + s B A x (Hu et al. 2021, eq. 3), around a dense or quantized linear layer."""
    method = "lora"

    def __init__(self, base, r, s, dropout, device):
        super().__init__()
        self.base, self.s, self.dropout = base, s, dropout
        self.in_features, self.out_features = base.in_features, base.out_features
        self.A = nn.Parameter(torch.empty(r, base.in_features, device=device))
        self.B = nn.Parameter(torch.zeros(base.out_features, r, device=device))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, x):
        base = self.base
        if isinstance(base, quant.QuantLinear) or not base.weight.requires_grad:
            weight = base.weight_q if isinstance(base, quant.QuantLinear) else base.weight
            return quant.lora_linear(x, weight, base.bias, self.A, self.B, self.s, self.dropout, self.training)
        low = F.linear(F.dropout(x, self.dropout, self.training), self.A.to(x.dtype))     # the base is trained as well
        return base(x) + self.s * F.linear(low, self.B.to(x.dtype))

    def merged(self, weight, bias):
        """weight (out, in) and bias (out,) or None, float32 -> the same with s B A added."""
        return weight + self.s * self.B @ self.A, bias


def add_lora(model, rank=8, alpha=16.0, dropout=0.0, targets="all", rslora=False):
    """LoRA (Hu et al. 2021) on the linear layers of the blocks.

    targets: "all", or names out of q k v out up gate down joined by commas. s = alpha / r, with rslora alpha / sqrt(r)
    (Kalajdzievski 2023). dropout acts on the input of A alone. B is zero at first: the model's function is unchanged.
    """
    check(rank >= 1, f"rank is {rank}; it must be at least 1")
    check(0 <= dropout < 1, f"dropout is {dropout}; it must lie in [0, 1)")
    check(alpha > 0 and math.isfinite(alpha), f"alpha is {alpha}; it must be a positive number")
    wanted = TARGETS if targets == "all" else tuple(targets.split(","))
    present = list(linears(model))
    there = list(dict.fromkeys(name for _, name, _ in present))
    for name in wanted:
        check(targets == "all" or name in there, f"targets: no layer {name!r}; this model has {' '.join(there)}")
    found = [(parent, name) for parent, name, _ in present if name in wanted]
    attach(model, "lora", rank=rank, alpha=alpha, dropout=dropout, targets=targets, rslora=rslora)
    s = alpha / (math.sqrt(rank) if rslora else rank)
    for parent, name in found:
        if isinstance(getattr(parent, name), IA3):
            parent, name = getattr(parent, name), "base"       # (IA)3 scales the result of LoRA
        setattr(parent, name, LoRA(getattr(parent, name), rank, s, dropout, device_of(model)))
    return f"lora: r {rank}, s {s:g}, wrapped {len(found)} of {len(present)} linear layers"


QLORA = quant.Storage("nf4", block=64, double=True)          # what qlora means where nothing else is asked for


def add_qlora(model, rank=8, alpha=16.0, dropout=0.0, targets="all", rslora=False):
    """QLoRA (Dettmers et al. 2023): LoRA over a base in NF4 with double quantization, quantized here where it is not yet."""
    fingerprint(model)                                         # of the base as it came
    if not any(isinstance(m, quant.QuantLinear) for m in model.modules()):
        quant.store(model, QLORA)
    return add_lora(model, rank, alpha, dropout, targets, rslora)


# -----------------------------------------------------------------------------
# additive: (IA)3


class IA3(nn.Module):
    """Scales the output (l_k, l_v) or the input (l_ff) of a linear layer."""
    method = "ia3"

    def __init__(self, base, name, device):
        super().__init__()
        self.base, self.name = base, name
        self.in_features, self.out_features = base.in_features, base.out_features
        self.register_parameter(name, nn.Parameter(torch.ones(self.in_features if name == "l_ff" else self.out_features, device=device)))

    def forward(self, x):
        l = getattr(self, self.name).to(x.dtype)
        return self.base(l * x) if self.name == "l_ff" else l * self.base(x)

    def merged(self, weight, bias):
        """weight (out, in) and bias (out,) or None, float32 -> the same, scaled."""
        l = getattr(self, self.name)
        if self.name == "l_ff":
            return weight * l, bias
        return l[:, None] * weight, None if bias is None else l * bias


def add_ia3(model):
    """(IA)3 (Liu et al. 2022): k = l_k * k, v = l_v * v, and l_ff * act(x W_1) before W_2. All ones at first."""
    attach(model, "ia3")
    for block in model.blocks:
        for parent, name, l in ((block.attn, "k", "l_k"), (block.attn, "v", "l_v"), (block.ffn, "down", "l_ff")):
            setattr(parent, name, IA3(getattr(parent, name), l, device_of(model)))
    return f"ia3: l_k, l_v, l_ff in {len(model.blocks)} layers"


# -----------------------------------------------------------------------------
# additive: bottleneck adapters


class Adapter(nn.Module):
    """x + W_up act(W_down x), Lin's with a LayerNorm before W_down. W_up is zero at first."""
    method = "adapter"
    ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "swish": F.silu, "tanh": torch.tanh}

    def __init__(self, linear, d, size, activation, norm):
        super().__init__()
        self.norm = nn.LayerNorm(d) if norm else None
        self.down, self.up = linear(d, size), linear(size, d)
        self.act = self.ACTIVATIONS[activation]
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x):
        h = x if self.norm is None else F.layer_norm(x, x.shape[-1:], self.norm.weight.to(x.dtype), self.norm.bias.to(x.dtype))
        return x + self.up(self.act(self.down(h)))


def transformer_block_with_adapter(self, x, rope=None, mask=None, cache=None):
    """The slide's block, with GPT's LayerNorms before the parts instead of after the sums."""
    residual = x
    x = self.attn(self.norm1(x), rope, mask, cache)
    x = self.adapter1(x)
    x = x + residual
    residual = x
    x = self.ffn(self.norm2(x))
    x = self.adapter2(x)
    return x + residual


def transformer_block_with_one_adapter(self, x, rope=None, mask=None, cache=None):
    """Pfeiffer's and Lin's: one adapter, over the block's result."""
    return self.adapter2(type(self).forward(self, x, rope, mask, cache))


def add_adapter(model, adapter_style="houlsby", adapter_size=64, adapter_activation="relu"):
    """Bottleneck adapters: houlsby (Houlsby et al. 2019), after the attention and after the FFN; pfeiffer (2021), after the
    FFN's sum; lin (Lin et al. 2020), the same with a LayerNorm of its own. adapter_size: the bottleneck's width."""
    check(adapter_size >= 1, f"adapter_size is {adapter_size}; it must be at least 1")
    check(adapter_style in ("houlsby", "pfeiffer", "lin"), f"adapter_style is {adapter_style!r}; it must be houlsby, pfeiffer or lin")
    check(adapter_activation in Adapter.ACTIVATIONS, f"adapter_activation is {adapter_activation!r}; it must be one of {', '.join(Adapter.ACTIVATIONS)}")
    attach(model, "adapter", adapter_style=adapter_style, adapter_size=adapter_size, adapter_activation=adapter_activation)
    for block in model.blocks:
        for place in ("adapter1", "adapter2") if adapter_style == "houlsby" else ("adapter2",):
            with device_of(model):
                setattr(block, place, Adapter(type(model.head), model.config.n_embd, adapter_size, adapter_activation, adapter_style == "lin"))
        block.forward = MethodType(transformer_block_with_adapter if adapter_style == "houlsby" else transformer_block_with_one_adapter, block)
    return f"adapter: {adapter_style}, width {adapter_size}, in {len(model.blocks)} blocks"


# -----------------------------------------------------------------------------
# soft prompts: prefix tuning in every attention


class Prefix(nn.Module):
    """s_k and s_v of one layer: (n, n_embd) before the projection, (n, keys' width) after it."""
    method = "prefix"

    def __init__(self, n, width, tied, mlp, d):
        super().__init__()
        self.tied, self.mlp = tied, None
        if mlp:      # Li and Liang 2021, section 4.3, but each layer has an MLP of its own; folded away on saving
            self.E = nn.Parameter(torch.randn(n, d) * 0.02)
            self.mlp = nn.Sequential(nn.Linear(d, mlp), nn.Tanh(), nn.Linear(mlp, 2 * width))
        else:
            self.s_k = nn.Parameter(torch.randn(n, width) * 0.02)
            self.s_v = None if tied else nn.Parameter(torch.randn(n, width) * 0.02)

    def forward(self):
        """s_k, s_v"""
        if self.mlp is not None:
            return self.mlp(self.E).chunk(2, -1)
        return self.s_k, self.s_k if self.tied else self.s_v


def prompt_tuning_attention(self, x, rope, mask, cache):
    """The slide's, whose prompt never changes and so is projected once, not once an example:

        k = cat([s_k, x]) @ W_k = cat([s_k @ W_k, x @ W_k])
    """
    s_k, s_v = (s.to(x.dtype) for s in self.prefix())
    if self.prefix_before:
        s_k, s_v = self.k(s_k), self.v(s_v)
    q, k, v = self.project(x, rope)
    if cache is not None:
        k, v = cache.append(k, v)
    s_k, s_v = (self.heads(s.unsqueeze(0)).expand(len(x), -1, -1, -1) for s in (s_k, s_v))     # (B, heads, n, head_dim)
    mask = None if mask is None else F.pad(mask, (s_k.size(2), 0), value=True)                   # all see the prefix
    y = self.attend(q, torch.cat((s_k, k), 2), torch.cat((s_v, v), 2), mask)
    return self.out(y.transpose(1, 2).flatten(2))


def add_prefix(model, prefix_length=16, prefix_style="before", prefix_tied=False, prefix_mlp=0):
    """A soft prompt in every attention.

    prefix_style "before" the projection, the slide's prompt_tuning_attention (prefix_tied: s_k = s_v, the table's PreLayer), or
    "after" it, prefix tuning (Li and Liang 2021): then the tokens' positions begin behind the prefix, whose keys are not
    rotated. prefix_mlp (after only): hidden width of the reparametrization, 0 for none.
    """
    check(1 <= prefix_length < model.config.block_size, f"prefix_length is {prefix_length}; it must be at least 1 and below the context of {model.config.block_size}")
    check(prefix_style in ("before", "after"), f"prefix_style is {prefix_style!r}; it must be before or after")
    check(not prefix_tied or prefix_style == "before", "prefix_tied: s_k = s_v makes sense only with prefix_style before, not after the projection")
    check(prefix_mlp >= 0 and (not prefix_mlp or prefix_style == "after"), f"prefix_mlp is {prefix_mlp}; the reparametrization is for prefix_style after")
    attach(model, "prefix", prefix_length=prefix_length, prefix_style=prefix_style, prefix_tied=prefix_tied, prefix_mlp=prefix_mlp)
    before, config = prefix_style == "before", model.config
    for block in model.blocks:
        width = config.n_embd if before else config.kv_heads * config.d_head
        with device_of(model):
            block.attn.prefix = Prefix(prefix_length, width, prefix_tied, prefix_mlp, config.n_embd)
        block.attn.prefix_before = before
        block.attn.forward = MethodType(prompt_tuning_attention, block.attn)
    if not before:
        virtual(model).shift = prefix_length
        model.reserved += prefix_length
    return f"prefix: {prefix_length} positions {prefix_style} the projection, in {len(model.blocks)} layers"


# -----------------------------------------------------------------------------
# soft prompts: prompt tuning at the input


class Prompt(nn.Module):
    """The embedding with n trained vectors P in front; the tokens' positions begin behind them, and behind a prefix of `shift`."""
    method = "prompt"

    def __init__(self, base):
        super().__init__()
        self.base, self.shift, self.P = base, 0, None

    def forward(self, tokens, pos, past):
        n = 0 if self.P is None else len(self.P)
        x, pos = self.base(tokens, torch.where(pos < 0, pos, pos + self.shift + n), past)       # negative: padding
        if not n or past:
            return x, pos
        place = self.shift + torch.arange(n, device=pos.device)
        P = self.P.to(x.dtype)
        if self.base.positions is not None:
            P = P + self.base.positions(place + self.base.offset)
        return torch.cat((P.expand(len(x), -1, -1), x), 1), torch.cat((place.expand(*pos.shape[:-1], -1), pos), -1)


def virtual(model):
    """The Prompt around the model's embedding, put there where there is none."""
    if not isinstance(model.embed, Prompt):
        model.embed = Prompt(model.embed)
    return model.embed


def add_prompt(model, prompt_length=16, prompt_ids=None):
    """Prompt tuning (Lester et al. 2021): prompt_length trained vectors before the input embeddings.

    They start as the embeddings of prompt_ids, token ids repeated as often as needed, or at random with the deviation of the embeddings.
    """
    check(1 <= prompt_length < model.config.block_size, f"prompt_length is {prompt_length}; it must be at least 1 and below the context of {model.config.block_size}")
    check(prompt_ids is None or len(prompt_ids) and max(prompt_ids) < model.config.vocab_size, f"prompt_ids must be tokens below {model.config.vocab_size}, at least one")
    attach(model, "prompt", prompt_length=prompt_length)
    table = virtual(model).base.tokens.weight
    if prompt_ids is None:
        P = torch.randn(prompt_length, table.size(1), device=table.device) * table.float().std()
    else:
        P = table.detach()[[prompt_ids[i % len(prompt_ids)] for i in range(prompt_length)]].float()
    model.embed.P = nn.Parameter(P)
    model.reserved += prompt_length
    return f"prompt: {prompt_length} vectors before the input"


# -----------------------------------------------------------------------------
# selective: BitFit, the last layers, everything


def add_bitfit(model):
    """BitFit (Ben Zaken et al. 2022): params = (p for n, p in model.named_parameters() if "bias" in n)."""
    params = [(n, p) for n, p in base_parameters(model) if "bias" in n]
    check(params, f"bitfit: this base has no biases (norm {model.config.norm}, bias {model.config.bias}); another method trains it")
    return unfreeze(model, "bitfit", params)


def train_top(model, top_k=2):
    """Fine-tunes the last top_k blocks, the table's FT Top2."""
    blocks = range(len(model.blocks) - top_k, len(model.blocks))
    check(1 <= top_k <= len(model.blocks), f"top_k is {top_k}; this model has {len(model.blocks)} blocks")
    return unfreeze(model, "top", [(n, p) for n, p in base_parameters(model) if n.startswith(tuple(f"blocks.{i}." for i in blocks))], blocks, top_k=top_k)


def train_full(model):
    """Fine-tunes everything, the table's FT."""
    return unfreeze(model, "full", base_parameters(model), range(len(model.blocks)))


def unfreeze(model, method, params, blocks=(), **options):
    """Makes base tensors trainable, in float32. Their originals are kept for detach, except by full, which would hold the base twice."""
    names = [name for i in blocks for name, m in model.blocks[i].named_modules() if isinstance(m, quant.QuantLinear)]
    check(not names, f"{method}: {len(names)} of the layers it trains are quantized; leave the base as it is, or use lora")
    check("full" not in methods(model), f"{method}: full trains everything already")
    attach(model, method, **options)
    params = [(n, p) for n, p in params if not p.requires_grad]
    model.unfrozen[method] = {n: None if method == "full" else p.detach().clone() for n, p in params}
    for _, p in params:
        p.data = p.data.float()
        p.requires_grad_(True)
    return f"{method}: {len(params)} tensors of the base"


# -----------------------------------------------------------------------------
# methods by name

METHODS = {"full": train_full, "top": train_top, "bitfit": add_bitfit, "lora": add_lora, "qlora": add_qlora, "ia3": add_ia3,
           "prefix": add_prefix, "adapter": add_adapter, "prompt": add_prompt}       # in the order in which they attach
UNFREEZING = ("full", "top", "bitfit")                          # these train tensors of the base and add none
DEFAULTS = {name: p.default for add in METHODS.values() for name, p in list(inspect.signature(add).parameters.items())[1:]}


def method_names(method):
    """"lora+prefix" -> ["lora", "prefix"], in the order of METHODS; refused where unknown or named twice."""
    names = method.split("+")
    for name in names:
        check(name in METHODS, f"unknown method {name!r}; the nearest is {difflib.get_close_matches(name, METHODS, 1, 0.0)[0]!r}")
    check(len({name.removeprefix("q") for name in names}) == len(names), f"method {method!r} names one twice")
    return sorted(names, key=list(METHODS).index)


def apply(model, method, **options):
    """Attaches methods joined by +, in place; returns a line about each. options: of all methods (DEFAULTS), each takes its own."""
    for name in options:
        check(name in DEFAULTS, f"unknown option {name!r}; the nearest is {difflib.get_close_matches(name, DEFAULTS, 1, 0.0)[0]!r}")
    names, report = method_names(method), []
    check(not methods(model), f"the model carries {'+'.join(methods(model))} already; detach it first")
    try:
        for name in names:
            accepted = inspect.signature(METHODS[name]).parameters
            report.append(METHODS[name](model, **{k: v for k, v in options.items() if k in accepted}))
    except ValueError:
        strip(model)
        raise
    return report


def default_storage(method):
    """The Storage that the methods' names imply: qlora's, or None."""
    return QLORA if "qlora" in method_names(method) else None


def virtual_positions(method, options):
    """Positions of the context that the methods take from the tokens."""
    names, options = method_names(method), DEFAULTS | options
    return options["prompt_length"] * ("prompt" in names) + options["prefix_length"] * ("prefix" in names and options["prefix_style"] == "after")


def methods(model):
    """{method: options} of what is attached."""
    return getattr(model, "methods", {})


def attach(model, method, **options):
    """Notes the method and its options in model.methods; the first one freezes the base."""
    check(not is_merged(model), f"{method}: the model is merged; unmerge it first")
    check(method not in methods(model), f"{method} is attached already; detach it first")
    if not methods(model):
        fingerprint(model)
        model.methods, model.unfrozen = {}, {}
        model.requires_grad_(False)
    model.methods[method] = options


def detach(model):
    """Takes every method off again and leaves the base bit for bit as it was. full is refused: it keeps no copy of the base."""
    check("full" not in methods(model), "full changed the base itself and kept no copy; load the base again")
    strip(model)


def strip(model):
    """detach, but for what full has changed."""
    if is_merged(model):
        unmerge(model)
    for parent, name, module in linears(model):
        setattr(parent, name, innermost(module))
    for block in model.blocks:
        for module, names in ((block.attn, ("prefix", "prefix_before", "forward")), (block, ("adapter1", "adapter2", "forward"))):
            for name in names:
                if name in module.__dict__ or name in module._modules:
                    delattr(module, name)
    if isinstance(model.embed, Prompt):
        model.embed = model.embed.base
    model.reserved = 0
    params = dict(base_parameters(model))
    for name, value in ((n, v) for kept in getattr(model, "unfrozen", {}).values() for n, v in kept.items()):
        params[name].data = params[name].data if value is None else value
        params[name].requires_grad_(False)
    model.methods, model.unfrozen = {}, {}


# -----------------------------------------------------------------------------
# merging


def merge(model, requantize=False, tokens=None):
    """Folds LoRA and (IA)3 into the weights: W + s B A in float32, kept in the compute type. BitFit, top and full are there already.

    requantize: stores the merged weight again as the base was stored; the small changes of an adapter can vanish in that. With
    tokens (B, T), or requantize, the result says what became of the logits, as mean absolute differences:
    "adapter" (adapter - base), "kept" (merged - base), "error" (merged - adapter). Undone by unmerge.
    """
    check(methods(model), "nothing is attached that could be merged")
    check(not is_merged(model), "the model is merged already; unmerge it first")
    for method in ("prefix", "prompt", "adapter"):
        check(method not in methods(model), f"{method} is not a change of a weight and cannot be merged; lora, ia3, bitfit, top and full can")
    wrapped = [(parent, name, module) for parent, name, module in linears(model) if isinstance(module, (LoRA, IA3))]
    if requantize and tokens is None:
        tokens = torch.arange(min(64, model.config.block_size), device=device_of(model))[None] % model.config.vocab_size
    logits = []
    for replacement in (lambda module: module, innermost, lambda module: merged_linear(module, type(model.head), model.dtype, requantize)):
        for parent, name, module in wrapped:
            setattr(parent, name, replacement(module))
        if tokens is not None:
            logits.append(logits_of(model, tokens))
    model.merged = wrapped
    report = {"layers": len(wrapped)}
    if tokens is not None:
        adapter, base, merged = logits
        report |= {what: float((a - b).abs().mean()) for what, a, b in
                   (("adapter", adapter, base), ("kept", merged, base), ("error", merged, adapter))}
    return report


def logits_of(model, tokens):
    """float32 logits (B, T, V) of tokens (B, T), without dropout."""
    mode = model.training
    with torch.no_grad():
        logits = model.eval()(tokens)[0].float()
    model.train(mode)
    return logits


@torch.no_grad()
def merged_linear(module, linear, dtype, requantize):
    """A wrapped linear layer as a plain one, in the compute type or, with requantize, stored as its base was."""
    wrappers, base = [], module
    while isinstance(base, (LoRA, IA3)):
        wrappers.insert(0, base)
        base = base.base
    quantized = isinstance(base, quant.QuantLinear)
    weight = base.dequantize(torch.float32) if quantized else base.weight.float()
    bias = None if base.bias is None else base.bias.float()
    for wrapper in wrappers:                                   # the innermost first
        weight, bias = wrapper.merged(weight, bias)
    if quantized and requantize:
        q = base.weight_q
        return quant.QuantLinear.from_quantized(quant.quantize(weight.to(q.dtype), q.scheme, q.block, q.double), bias, base.compute_dtype)
    new = linear(base.in_features, base.out_features, bias=bias is not None, device="meta")
    new.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    new.bias = None if bias is None else nn.Parameter(bias.to(dtype), requires_grad=False)
    return new


def unmerge(model):
    """Undoes merge: the wrappers, and the base bit for bit in its stored type."""
    check(is_merged(model), "the model is not merged")
    for parent, name, module in model.merged:
        setattr(parent, name, module)
    del model.merged


def is_merged(model):
    """Whether merge has put the methods into the base's weights."""
    return hasattr(model, "merged")


# -----------------------------------------------------------------------------
# accounting


def named(model):
    """(name, parameter, method) of every parameter once; method is None for what is frozen. Wrappers leave no trace in a name:
    blocks.0.attn.q.A, blocks.0.attn.q.bias. Quantized tensors are not among them, though FSDP has them be parameters."""
    owner = {id(p): m.method for m in model.modules() if hasattr(m, "method") for p in m.parameters(recurse=not hasattr(m, "base"))}
    unfrozen = {name: method for method, params in getattr(model, "unfrozen", {}).items() for name in params}
    stored = {id(p) for m in model.modules() if isinstance(m, quant.QuantLinear) for name, p in m.named_parameters() if name != "bias"}
    for name, p in model.named_parameters():
        name = ".".join(part for part in name.split(".") if part != "base")
        if id(p) not in stored:
            yield name, p, owner.get(id(p)) or unfrozen.get(name)


def base_parameters(model):
    """[(name, parameter)] of the base: what no method has added."""
    unfrozen = getattr(model, "unfrozen", {})
    return [(name, p) for name, p, method in named(model) if method is None or method in unfrozen]


def count_parameters(model):
    """{"trainable", "base", "total", "by_method", "by_layer"}, of logical shapes: 4-bit weights count as the weights that they are.

    total: the base and what was added to it; by_method and by_layer ("blocks.0", "embed", ..) sum to trainable.
    """
    base = sum(m.weight_q.numel() for m in model.modules() if isinstance(m, quant.QuantLinear))
    base += sum(p.numel() for _, p in base_parameters(model))
    total, by_method, by_layer = base, {}, {}
    for name, p, method in named(model):
        total += p.numel() * (method is not None and method not in model.unfrozen)
        if method:
            layer = ".".join(name.split(".")[:2 if name.startswith("blocks.") else 1])
            by_method[method] = by_method.get(method, 0) + p.numel()
            by_layer[layer] = by_layer.get(layer, 0) + p.numel()
    return {"trainable": sum(by_method.values()), "base": base, "total": total, "by_method": by_method, "by_layer": by_layer}


def param_groups(model, learning_rate, weight_decay, lora_plus_ratio):
    """Groups for an optimizer: matrices decay, vectors and soft prompts do not; LoRA's B at lora_plus_ratio times the learning
    rate (LoRA+, Hayou et al. 2024). A schedule keeps to that by each group's "ratio"."""
    groups = {}
    for name, p, method in named(model):
        if method:
            ratio = lora_plus_ratio if method == "lora" and name.endswith(".B") else 1.0
            decay = weight_decay if p.dim() > 1 and method not in ("prefix", "prompt") else 0.0
            groups.setdefault((ratio, decay), []).append(p)
    check(groups, "nothing is trainable: attach a method first")
    return [{"params": params, "lr": learning_rate * ratio, "ratio": ratio, "weight_decay": decay} for (ratio, decay), params in groups.items()]


def fingerprint(model):
    """SHA-256 of the base as it came, before quantization, casts and training: of 4096 values of each tensor, evenly spread.

    hub.load_base notes it in model.base_fingerprint from the files; for another model it is made here, the first time.
    """
    if not hasattr(model, "base_fingerprint"):
        tensors = dict(base_parameters(model)) | {f"{name}.{key}": t for name, m in model.named_modules() if isinstance(m, quant.QuantLinear)
                                                  for key, t in m.weight_q.tensors().items()}
        model.base_fingerprint = combine_hashes({name: sample_hash(t) for name, t in tensors.items()})
    return model.base_fingerprint


# -----------------------------------------------------------------------------
# the life of an adapter: extract, save, load, switch, add

FORMAT = 1


def adapter_state_dict(model, fold=False):
    """{name: tensor} of the trained tensors. fold: a prefix's reparametrization as the s_k and s_v that it comes to."""
    tensors = {name: p.detach() for name, p, method in named(model) if method}
    if fold:
        for i, block in enumerate(model.blocks):
            if getattr(getattr(block.attn, "prefix", None), "mlp", None) is not None:
                start = f"blocks.{i}.attn.prefix."
                tensors = {name: t for name, t in tensors.items() if not name.startswith(start)}
                tensors |= {start + name: s.detach().clone() for name, s in zip(("s_k", "s_v"), block.attn.prefix())}
    return tensors


def load_state(model, tensors, where="state"):
    """Sets the trained tensors. Keys, shapes, types and values are all checked before the first is written."""
    own = adapter_state_dict(model)
    check_tensors(tensors, {name: t.shape for name, t in own.items()}, where)
    with torch.no_grad():
        for name, t in own.items():
            t.copy_(tensors[name])


def check_tensors(tensors, shapes, where):
    """ValueError unless tensors has exactly these names and shapes, float32 and finite."""
    missing, extra = shapes.keys() - tensors.keys(), tensors.keys() - shapes.keys()
    check(not missing, f"{where}: lacks {len(missing)} tensors: {some(missing)}")
    check(not extra, f"{where}: {len(extra)} tensors too many: {some(extra)}")
    for name, shape in shapes.items():
        t = tensors[name]
        check(isinstance(t, torch.Tensor) and t.dtype == torch.float32, f"{where}: {name} is {getattr(t, 'dtype', type(t).__name__)}; it must be torch.float32")
        check(t.shape == shape, f"{where}: {name} has shape {tuple(t.shape)}; here it is {tuple(shape)}")
        check(bool(t.isfinite().all()), f"{where}: {name} holds NaN or infinity")


def pack_adapter(model):
    """What an adapter's file holds: plain values and the trained tensors."""
    check(methods(model), "nothing is attached that could be saved")
    check(not is_merged(model), "the model is merged; unmerge it first")
    options = {name: value for chosen in methods(model).values() for name, value in chosen.items()}
    tensors = {name: t.cpu() for name, t in adapter_state_dict(model, fold=True).items()}
    return {"format": FORMAT, "kind": "adapter", "method": "+".join(methods(model)), "options": options | ({"prefix_mlp": 0} if "prefix" in methods(model) else {}),
            "base": fingerprint(model), "parameters": sum(t.numel() for t in tensors.values()), "tensors": tensors}


def save_adapter(model, path):
    """Writes the trained tensors alone, with what is needed to attach them again."""
    save_file(path, pack_adapter(model))


def read_adapter(path):
    """The checked content of an adapter's file, on the CPU."""
    content = read_file(path)
    check(content.get("kind") == "adapter", f"{path}: not an adapter ({content.get('kind') or 'no kind'} in it)")
    check(type(content.get("format")) is int and content["format"] <= FORMAT, f"{path}: format {content.get('format')} is newer than this code's {FORMAT}; update nanopeft")
    types = {"method": str, "options": dict, "base": str, "parameters": int, "tensors": dict}
    for key, kind in types.items():
        check(isinstance(content.get(key), kind), f"{path}: {key} is missing or not a {kind.__name__}")
    check(content["tensors"], f"{path}: an empty adapter, no tensors in it")
    count = sum(t.numel() for t in content["tensors"].values() if isinstance(t, torch.Tensor))
    check(count == content["parameters"], f"{path}: {count} parameters, but it says {content['parameters']}")
    return content


def load_adapter(model, path, replace=False):
    """Attaches an adapter's methods and sets its tensors. path: a file, or the dict that read_adapter returns.

    A model that carries the same methods with the same options gets the tensors alone; one that carries others is refused, or
    with replace rid of them first (the base is not loaded again).
    """
    content, where = (path, "adapter") if isinstance(path, dict) else (read_adapter(path), path)
    check(content["base"] == fingerprint(model), f"{where}: made for the base {content['base'][:12]}, this one is {fingerprint(model)[:12]}")
    check(not is_merged(model), "the model is merged; unmerge it first")
    own = {name: value for chosen in methods(model).values() for name, value in chosen.items()}
    same = "+".join(methods(model)) == content["method"] and own == content["options"]
    if methods(model) and not same:
        differ = [f"{k} {content['options'].get(k)!r} (here {own.get(k)!r})" for k in content["options"] | own if content["options"].get(k) != own.get(k)]
        check(replace, f"{where}: {content['method']} with {', '.join(differ) or 'other methods'}; the model carries {'+'.join(methods(model))}: detach it first")
        detach(model)
    if not methods(model):
        apply(model, content["method"], **content["options"])
    try:
        load_state(model, content["tensors"], where)
    except ValueError:
        if not same:
            strip(model)
        raise


def add_adapters(adapters, weights):
    """Adds LoRA adapters linearly: sum_i w_i s_i B_i A_i as one LoRA of rank sum_i r_i and scale 1.

    adapters: dicts of read_adapter, all lora alone, of one base and one set of layers; weights: a number for each. Returns such a dict.
    """
    first = adapters[0]
    for other in adapters:
        check(other["method"] == "lora", f"only lora adapters can be added, not {other['method']}")
        check(other["base"] == first["base"], f"adapters of different bases: {first['base'][:12]} and {other['base'][:12]}")
        check(other["tensors"].keys() == first["tensors"].keys(), f"adapters of different layers: {first['options']['targets']} and {other['options']['targets']}")
    scales = [w * o["alpha"] / (math.sqrt(o["rank"]) if o["rslora"] else o["rank"]) for w, o in zip(weights, (a["options"] for a in adapters), strict=True)]
    rank = sum(a["options"]["rank"] for a in adapters)
    tensors = {name: torch.cat([a["tensors"][name] for a in adapters], 0) if name.endswith(".A") else
               torch.cat([s * a["tensors"][name] for s, a in zip(scales, adapters)], 1) for name in first["tensors"]}
    options = first["options"] | {"rank": rank, "alpha": float(rank), "rslora": False}
    return first | {"options": options, "tensors": tensors, "parameters": sum(t.numel() for t in tensors.values())}


# -----------------------------------------------------------------------------
# files: a crash at any instant leaves a whole one, a flipped bit is noticed, and nothing in them is ever run
#
#   torch.save's zip  |  its comment: SHA-256 of every byte before it, in 64 hexadecimal digits


# -----------------------------------------------------------------------------
# small things


def linears(model):
    """(parent, name, module) of the linear layers of the blocks, wrapped or not."""
    return [(parent, name, module) for block in model.blocks for parent in (block.attn, block.ffn)
            for name in TARGETS if (module := getattr(parent, name, None)) is not None]


def innermost(module):
    """The linear layer within its wrappers."""
    while isinstance(module, (LoRA, IA3)):
        module = module.base
    return module


def device_of(model):
    """Where the model lies."""
    return model.head.weight.device


