"""
Adapters in from PEFT's layout, which lib/peft_format.py describes.

    method, options, tensors = from_peft(folder, base, weights)

What comes in computes here what it computes in PEFT, or is refused in words that name it. A module is a target, and
has a rank and an alpha of its own, by PEFT's own rules. What PEFT trains in a part of the model alone, and a method
here in all of it, is completed with what changes nothing: zeros, ones, or what the base has there.
"""

import re
from pathlib import Path

import torch
import torch.nn.functional as F

import peft
from lib.checkpoint import shapes_of, unstack
from lib.checks import BOUNDS, bounded, check, shown, timed, typed
from lib.files import located, read_json, read_tensors, some
from lib.hollow import hollow
from lib.peft_format import (IA3_VECTORS, LORA_SUFFIXES, VERA_SHARED, VERA_SUFFIXES, bias_names, check_prefix,
                             check_single, head_names, linear_layers, module_name, peft_name, prefix_names,
                             prompt_scale, scaled_layers, shapes_of_targets, whole_names)

# -----------------------------------------------------------------------------
# what is known

# keys of adapter_config.json that are read below or change nothing in what is computed
KNOWN = set("""
    peft_type task_type base_model_name_or_path inference_mode auto_mapping revision peft_version
    lora_dropout init_lora_weights init_ia3_weights init_weights loftq_config eva_config corda_config lora_ga_config
    megatron_core runtime_config num_virtual_tokens token_dim num_layers num_attention_heads
    num_transformer_submodules prompt_tuning_init prompt_tuning_init_text tokenizer_name_or_path
    tokenizer_kwargs encoder_hidden_size encoder_num_layers encoder_dropout encoder_reparameterization_type
    prefix_projection r lora_alpha target_modules exclude_modules layers_to_transform layers_pattern
    fan_in_fan_out bias use_rslora use_dora rank_pattern alpha_pattern feedforward_modules random_init
    qalora_group_size modules_to_save ensure_weight_tying trainable_token_indices velora_config
    projection_prng_key save_projection vera_dropout d_initial
""".split())
VARIANTS = {        # keys that make another method of a LoRA -> its name
    "alora_invocation_tokens": "aLoRA", "use_qalora": "QALoRA", "use_bdlora": "BD-LoRA", "arrow_config": "Arrow",
    "monteclora_config": "MonteCLoRA", "kasa_config": "KaSA", "layer_replication": "a LoRA over replicated layers",
    "lora_bias": "a LoRA with biases of its own", "megatron_config": "a LoRA over Megatron's layers",
    "target_parameters": "a LoRA on parameters without a module"}
KINDS = {           # peft_type -> the method's name, where that is written otherwise
    "ADALORA": "AdaLoRA", "LOHA": "LoHa", "LOKR": "LoKr", "FOURIERFT": "FourierFT", "XLORA": "X-LoRA",
    "VBLORA": "VB-LoRA", "RANDLORA": "RandLoRA", "ADAPTION_PROMPT": "LLaMA-Adapter", "LN_TUNING": "LayerNorm tuning",
    "MULTITASK_PROMPT_TUNING": "multitask prompt tuning", "TRAINABLE_TOKENS": "trainable tokens", "BONE": "Bone",
    "MISS": "MiSS", "POLY": "Poly", "SHIRA": "SHiRA", "ROAD": "RoAd", "WAVEFT": "WaveFT", "DELORA": "DeLoRA",
    "GRALORA": "GraLoRA", "GLORA": "GLoRA", "HIRA": "HiRA", "PVERA": "PVeRA", "TINYLORA": "TinyLoRA"}
HARMLESS_STARTS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")     # of A and B; the base stays


def option(settings, key, name, default=None):
    """The value of a key that is the option of that name here, in its type and within its bounds. ValueError for anything
    else, and where the key is absent or null unless there is a default."""
    value = settings.get(key)
    value = default if value is None else value
    return bounded(key, typed(key, value, type(peft.DEFAULTS[name])), table={key: BOUNDS[name]})


def flag(settings, key):
    """Whether a key is true; false where it is absent or null."""
    return typed(key, settings.get(key) or False, bool)


def pattern(settings, key, name):
    """The {regular expression: value of that option here} of a key."""
    found = typed(key, settings.get(key) or {}, dict)
    return {expression: option(found, expression, name) for expression in found}


def names_in(settings, key):
    """The list of names of a key; [] where it is absent or null. A text is a list of itself."""
    found = settings.get(key) or []
    found = [found] if isinstance(found, str) else found
    are_names = isinstance(found, list) and all(isinstance(name, str) for name in found)
    check(are_names, f"{key} is {shown(found)}; it must be a list of names")
    return found


def matches(expression, text, key):
    """Whether a regular expression of that key matches a whole text."""
    try:
        with timed(f"{key}: the regular expression {shown(expression)}"):
            return re.match(rf"(?:{expression})$", text) is not None
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{key}: {shown(expression)} is no regular expression: {error}") from None


# -----------------------------------------------------------------------------
# which modules, by PEFT's rules (its check_target_module_exists and get_pattern_key)


def is_named(settings, key, name):
    """Whether target_modules or exclude_modules names a module: a text is a regular expression for the whole of
    the name, a list holds ends of names."""
    found = settings.get(key)
    if isinstance(found, str):
        return matches(found, name, key)
    return any(f".{name}".endswith(f".{end}") for end in names_in(settings, key))


def is_target(settings, name, i):
    """Whether PEFT wraps the module of that name, in block i."""
    if settings.get("exclude_modules") and is_named(settings, "exclude_modules", name):
        return False
    for saved in names_in(settings, "modules_to_save"):
        if matches(rf"(.*\.)?{saved}(\..*)?", name, "modules_to_save"):
            return False
    layers = settings.get("layers_to_transform")
    if layers not in (None, []) and not isinstance(settings.get("target_modules"), str):
        layers = layers if isinstance(layers, list) else [layers]
        are_numbers = all(type(layer) is int for layer in layers)
        check(are_numbers, f"layers_to_transform is {shown(layers)}; it must hold numbers of layers")
        if i not in layers:
            return False
    return is_named(settings, "target_modules", name)


def own_value(settings, option_name, name, default):
    """A module's own rank or alpha: of the first name in the pattern that its name ends with."""
    key = f"{option_name}_pattern"
    for expression, value in pattern(settings, key, option_name).items():
        if matches(rf"(.*\.)?({expression})", name, key):
            return value
    return default


def check_targets(settings, found, base):
    """ValueError unless the tensors are of those modules that adapter_config.json selects. found: {(module, i)}."""
    if settings.get("target_modules") in (None, "all-linear"):
        return
    for i in range(base.config.n_layer):
        for module in linear_layers(base):
            name = module_name(base, i, module).removeprefix("base_model.model.")
            wanted, there = is_target(settings, name, i), (module, i) in found
            check(there or not wanted, f"lacks the tensors of {name}, which adapter_config.json selects")
            check(wanted or not there, f"holds tensors of {name}, which adapter_config.json does not select (target_modules, "
                  "exclude_modules, layers_to_transform), so that PEFT would leave them out")


# -----------------------------------------------------------------------------
# the folder


def from_peft(folder, base, weights=None):
    """
    (method, options, tensors) of a folder in PEFT's layout, complete but for what is damaged, which peft.load_state
    finds. weights: a function that returns {our name: tensor} of the base; it is called only where it is needed.
    """
    settings = read_json(Path(folder, "adapter_config.json"))
    with located(folder):
        kind = settings.get("peft_type")
        known = isinstance(kind, str) and kind in READERS
        name = KINDS.get(kind, kind) if isinstance(kind, str) else "that"
        check(known, f"peft_type is {shown(kind)}: {name} cannot be read; {', '.join(READERS)} can")
        check_settings(settings)
    file = Path(folder, "adapter_model.safetensors")
    if not file.is_file():
        file = Path(folder, "adapter_model.bin")
    check(file.is_file(), f"{folder}: neither adapter_model.safetensors nor adapter_model.bin is there")
    tensors = {name: t.float() for name, t in read_tensors(file)}
    with located(folder):
        empty = [name for name, t in tensors.items() if t.numel() == 0]
        check(not empty, f"{len(empty)} tensors are empty: {some(empty)}; DeepSpeed's ZeRO-3 or FSDP divided them and they were "
              "saved without being gathered; save the adapter again with all of its tensors")
        whole = {}
        if kind not in VIRTUAL:
            whole = take_whole(settings, tensors, base) | take_tokens(settings, tensors, base, weights)
        method, options, out = READERS[kind](settings, tensors, base, whole)
        names = {"norm" if peft.is_norm(name) else name.partition(".")[0] for name in whole}
        method = "+".join([*filter(None, [method]), *(name for name in peft.METHODS if name in names)])
        return method, options, completed(method, options, out | whole, base, weights)


def check_settings(settings):
    """ValueError for what changes the computation in a way that is not known here."""
    for key, name in VARIANTS.items():
        value = settings.get(key)
        check(not value, f"{name} cannot be read ({key} is {shown(value)})")
    for key, value in settings.items():
        harmless = key in KNOWN or value in (None, False, [], {}, "")
        check(harmless, f"{key} is {shown(value)}, which this code does not know")
    start = settings.get("init_lora_weights")
    harmless = isinstance(start, (str, bool, type(None))) and start in HARMLESS_STARTS
    check(harmless, f"init_lora_weights is {shown(start)}, with which PEFT changes the base's weights when it loads the adapter; save it "
          "there with path_initial_model_for_weight_conversion, which makes a plain LoRA of it")


def completed(method, options, tensors, base, weights):
    """The tensors, and those of the method that PEFT left alone, so that they change nothing: zeros of LoRA's kin,
    ones of (IA)3, what the base has of its own."""
    model = hollow(base.config)
    model.base_fingerprint = "none yet"
    peft.apply(model, method, **options)
    whole = dict(tensors)
    for name, wanted in peft.adapter_state_dict(model).items():
        layer, _, leaf = name.rpartition(".")
        if name in tensors:
            continue
        if leaf in ("A", "B", "d", "b"):
            whole[name] = torch.zeros(wanted.shape)
        elif leaf in IA3_VECTORS.values():
            whole[name] = torch.ones(wanted.shape)
        elif weights is not None:
            own = weights()
            whole[name] = own[f"{layer}.weight"].float().norm(dim=1) if leaf == "m" else own[name].float()
    return whole


def take_whole(settings, tensors, base):
    """Takes what embed, head and norm train out of `tensors`: {our name: tensor}. The norms' biases alone are left:
    they are BitFit's."""
    whole, names = {}, whole_names(base)
    take_second_head(tensors, base)
    there = {theirs: ours for theirs, ours in names.items() if theirs in tensors}
    readable = [theirs for theirs, ours in names.items() if ours in there.values()]
    for module in names_in(settings, "modules_to_save"):
        found = any(theirs.rpartition(".")[0].endswith(module) for theirs in readable)
        check(found, f"modules_to_save names {module!r}, of which no tensor is there that this code can read")
    has_norms = any(peft.is_norm(ours) and ours.endswith(".weight") for ours in there.values())
    tables = [theirs for theirs, ours in there.items() if ours == peft.TABLE]
    if base.config.tied and tables:
        together = len(tables) == 2 and torch.equal(*map(tensors.get, tables))
        check(together, "embedding and head were trained apart, but this base has one table for both; train with "
              "ensure_weight_tying, or over a base that does not tie them")
    for theirs, ours in there.items():
        if peft.is_norm(ours) and not has_norms:
            continue
        t = whole[ours] = tensors.pop(theirs)
        rows, wanted = rows_of(t), base.config.vocab_size
        is_table = ours in (peft.TABLE, "head.weight")
        check(not is_table or rows == wanted, f"{theirs} has {rows} rows for tokens, this base {wanted}; an adapter with added "
              "tokens cannot be read: merge it where it was made, and take the result as the base")
    return whole


def take_second_head(tensors, base):
    """Takes the head out of `tensors` where it is there under a second name."""
    found = [name for name in head_names(base) if name in tensors]
    if len(found) == 2:
        first, second = found
        same = torch.equal(tensors[first], tensors[second])
        check(same, f"{first} and {second} differ, but both are the head")
        del tensors[second]


def take_tokens(settings, tensors, base, weights):
    """Takes the rows of trainable_token_indices out of `tensors`: {our name: the whole table with them in it}."""
    end, tables = ".token_adapter.trainable_tokens_delta", {}
    for theirs, ours in whole_names(base).items():
        module = theirs.removesuffix(".weight")
        rows = tensors.pop(module + end, None)
        if rows is None:
            continue
        said = settings.get("trainable_token_indices")
        last = module.rpartition(".")[2]
        indices = said.get(last, said.get(module.removeprefix("base_model.model."))) if isinstance(said, dict) else said
        are_ids = isinstance(indices, list) and all(type(i) is int for i in indices)
        fits = are_ids and len(indices) == rows_of(rows) and max(indices, default=0) < base.config.vocab_size
        check(fits, f"trainable_token_indices is {shown(said)}, but {module} holds {rows_of(rows)} rows for tokens")
        check(weights is not None, f"trainable_token_indices is {shown(said)}: the base's table is needed to read it")
        tables[ours] = weights()[ours].float().clone()
        tables[ours][indices] = rows
    return tables


def rows_of(tensor):
    """The rows of a tensor that a file holds, 0 where it is none."""
    return tensor.size(0) if isinstance(tensor, torch.Tensor) and tensor.dim() else 0


# -----------------------------------------------------------------------------
# kinds: each (settings, tensors, base, what is trained whole beside it) -> (method, options, tensors)


def prompt_from_peft(settings, tensors, base, whole):
    """Of prompt tuning, or P-tuning, whose reparametrization PEFT has folded into what it saved."""
    P = virtual_tokens(tensors)
    return "prompt", {"prompt_length": len(P)}, {"embed.P": P / prompt_scale(base)}


def prefix_from_peft(settings, tensors, base, whole):
    """Of prefix tuning, with or without a projection, which PEFT has folded into what it saved."""
    P = virtual_tokens(tensors)
    check_prefix(base)
    keys_and_values = dict(zip(prefix_names(base), P.chunk(2 * base.config.n_layer, 1)))
    return "prefix", {"prefix_length": len(P), "prefix_style": "after"}, keys_and_values


def virtual_tokens(tensors):
    """The one tensor of a prompt or a prefix."""
    P = tensors.get("prompt_embeddings", torch.zeros(()))
    alone = len(tensors) == 1 and P.dim() == 2
    check(alone, f"must hold prompt_embeddings (n, width) alone, found {some(tensors)}")
    return P


def linear_tensors(settings, tensors, base, suffixes):
    """[(module, i, suffix, tensor)] of linear layers' tensors in PEFT's layout. Any other one is refused."""
    start, end = map(re.escape, peft_name(base, base.family.block(0)).split("0"))
    name_of = re.compile(rf"{start}(\d+){end}(.+)\.({'|'.join(suffixes)})(?:\.weight)?")
    found = []
    tables = [theirs.removesuffix("weight") for theirs, ours in whole_names(base).items() if not peft.is_norm(ours)]
    for name, t in tensors.items():
        table = next((start for start in tables if name.startswith(start)), "")
        check(not table, f"LoRA on {table.split('.')[-2:][0]} cannot be read; here embedding and head are trained whole (modules_to_save)")
        match = name_of.fullmatch(name)
        there = match and int(match[1]) < base.config.n_layer and match[2] in linear_layers(base)
        check(there and t.dim(), f"{name} is no tensor of a {base.family.name} adapter with {base.config.n_layer} layers")
        found.append((match[2], int(match[1]), match[3], t))
    check_targets(settings, {(module, i) for module, i, _, _ in found}, base)
    return found


def split_rows(base, tensor, layers, where):
    """A module's tensor -> {our layer: its rows}."""
    rows = list(layers.values())
    check(len(tensor) == sum(rows), f"{where} has {len(tensor)} rows; this base makes it {sum(rows)}")
    return dict(zip(layers, unstack(base.family, base.config, tensor, rows)))


def ia3_from_peft(settings, tensors, base, whole):
    """Of (IA)3, whose vectors must scale what they scale here and nothing else."""
    modules, out = scaled_layers(base), {}
    for module, i, _, l in linear_tensors(settings, tensors, base, ["ia3_l"]):
        check(module in modules, f"(IA)3 on {module}; only {', '.join(sorted(modules))} can be read")
        layers = modules[module]
        scales_input = "ffn.down" in layers
        shape = (1, -1) if scales_input else (-1, 1)
        side = "input" if scales_input else "result"
        right = t_shape_is(l, shape)
        check(right, f"(IA)3 on {module} of layer {i} has shape {tuple(l.shape)}; here it scales the {side} (feedforward_modules)")
        l = l.flatten()
        vectors = {"ffn.down": l} if scales_input else split_rows(base, l, layers, f"{module} of layer {i}")
        for name, vector in vectors.items():
            if name in IA3_VECTORS:
                out[f"blocks.{i}.{name}.{IA3_VECTORS[name]}"] = vector
            else:
                ones = bool((vector == 1).all())
                check(ones, f"layer {i} scales the queries as well, which (IA)3 here does not")
    check(out, "no (IA)3 in it")
    return "ia3", {}, out


def t_shape_is(tensor, shape):
    """Whether a tensor has that shape, where -1 stands for any size."""
    sizes = list(tensor.shape)
    return len(sizes) == len(shape) and all(wanted in (-1, size) for size, wanted in zip(sizes, shape))


def vera_from_peft(settings, tensors, base, whole):
    """Of VeRA. Its shared projections must be those that are drawn here, from PEFT's seed 0."""
    shared = [tensors.pop(name, None) for name in VERA_SHARED]
    found = linear_tensors(settings, tensors, base, VERA_SUFFIXES)
    modules = list(dict.fromkeys(module for module, *_ in found))
    check(modules, "no VeRA in it")
    rank = option(settings, "r", "rank")
    for module in modules:
        check_single(module, linear_layers(base)[module])
    ours = peft.shared_projections(rank, shapes_of_targets(base, modules))
    same = settings.get("projection_prng_key", 0) == 0
    for one, other in zip(shared, ours):
        same &= one is None or torch.equal(one, other)
    check(same, "its shared projections vera_A and vera_B are not those of projection_prng_key 0, which are drawn here")
    out = {}
    for module, i, suffix, t in found:
        name = next(iter(linear_layers(base)[module]))
        out[f"blocks.{i}.{name}.{VERA_SUFFIXES[suffix]}"] = t
    options = {"rank": rank, "targets": targets_in(out), "dropout": option(settings, "vera_dropout", "dropout", 0.0)}
    return "vera", options, out


def targets_in(tensors):
    """The layers' names, joined by commas, as LoRA's kin takes them."""
    return ",".join(dict.fromkeys(name.split(".")[3] for name in tensors))


def lora_from_peft(settings, tensors, base, whole):
    """Of LoRA, DoRA or BitFit. One rank and one scale are for all here: a smaller rank is filled up with zeros,
    another scale goes into B."""
    common = {"rank": option(settings, "r", "rank"), "alpha": option(settings, "lora_alpha", "alpha"),
              "rslora": flag(settings, "use_rslora")}
    biases = take_biases(tensors, base)
    # VeLoRA's alone, for the backward pass.
    tensors = {name: t for name, t in tensors.items() if not name.endswith(".lora_velora_embed")}
    found = linear_tensors(settings, tensors, base, LORA_SUFFIXES)
    rank = max((len(t) for _, _, suffix, t in found if suffix == "lora_A"), default=0)
    check(rank, "no LoRA in it")
    s, out = peft.scale_of(common | {"rank": rank}), {}
    for module, i, suffix, t in found:
        name = module_name(base, i, module).removeprefix("base_model.model.")
        own = common | {key: own_value(settings, key, name, common[key]) for key in ("rank", "alpha")}
        parts = lora_parts(base, own, module, i, suffix, t)
        for layer, part in parts.items():
            if suffix == "lora_A":
                part = F.pad(part, (0, 0, 0, rank - own["rank"]))
            elif suffix == "lora_B":
                part = F.pad(part * (peft.scale_of(own) / s), (0, rank - own["rank"]))
            out[f"blocks.{i}.{layer}.{LORA_SUFFIXES[suffix]}"] = part
    check_pairs(out)
    if (biases or whole) and not any(t.any() for name, t in out.items() if name.endswith(".B")):
        return "bitfit" if biases else "", {}, biases
    dora = flag(settings, "use_dora")
    magnitudes = sum(name.endswith(".m") for name in out)
    check(dora == bool(magnitudes), f"use_dora is {dora}, but {magnitudes} magnitude vectors are there")
    options = {"rank": rank, "alpha": s * rank, "targets": targets_in(out),
               "dropout": option(settings, "lora_dropout", "dropout", 0.0)}
    method = "dora" if dora else "lora"
    return f"bitfit+{method}" if biases else method, options, out | biases


def lora_parts(base, own, module, i, suffix, t):
    """{our layer: its part} of a tensor of a module's LoRA. own: the module's rank."""
    where, layers, r = f"{module} of layer {i}", linear_layers(base)[module], own["rank"]
    wanted = {"lora_A": (r, -1), "lora_B": (-1, r)}.get(suffix, (-1,))
    is_A = suffix == "lora_A" and t.dim() == 2
    check(not is_A or len(t) == r, f"{where} has rank {len(t)}; adapter_config.json says {r}")
    check(t_shape_is(t, wanted), f"{where}: {suffix} has shape {tuple(t.shape)}, which no LoRA of rank {r} has")
    return dict.fromkeys(layers, t) if is_A else split_rows(base, t, layers, where)


def check_pairs(tensors):
    """ValueError where a LoRA lacks one of its halves."""
    for name in tensors:
        layer, _, leaf = name.rpartition(".")
        other = {"A": "B", "B": "A"}.get(leaf, "A")
        check(f"{layer}.{other}" in tensors, f"the LoRA of {layer} lacks its {other}")


def take_biases(tensors, base):
    """Takes the base's biases out of `tensors`: {our name: tensor}."""
    biases, shapes = {}, shapes_of(base.config)
    for name, ours in bias_names(base).items():
        for theirs in (name, name.removesuffix(".bias") + ".base_layer.bias"):
            if theirs in tensors:
                biases |= split_rows(base, tensors.pop(theirs), {n: shapes[n][0] for n in ours}, theirs)
    return biases


VIRTUAL = {"PROMPT_TUNING": prompt_from_peft, "P_TUNING": prompt_from_peft, "PREFIX_TUNING": prefix_from_peft}
READERS = {"LORA": lora_from_peft, "VERA": vera_from_peft, "IA3": ia3_from_peft} | VIRTUAL
