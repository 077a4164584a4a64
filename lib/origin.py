"""
config.json <-> GPTConfig: what a checkpoint in Hugging Face layout says of its architecture.

    read_origin("gpt2").config.n_layer           # 12

Every key is honoured, known to be harmless or refused by name. Both layouts are read in which the transformers
library has written rotary positions, version 4 (rope_theta, rope_scaling) and 5 (rope_parameters). What differs between
families is said in lib/families.py.
"""

import dataclasses
import math
from dataclasses import dataclass, field, replace
from pathlib import Path

from lib.families import (ACTIVATION_NAMES, ACTIVATIONS, CONVERSIONS, FAMILIES, INVERSES,
                          Family)
from lib.checks import SHAPE, bounded, checked, typed
from lib.files import check, found_in, located, read_json
from lib.keys import HARMLESS, HARMLESS_AT, OUT_OF_SCOPE, OUT_OF_SCOPE_KEYS, QUANTIZED
from lib.rope import Rope
from model import PARTS_WITH_BIAS, GPTConfig

TYPES = {field.name: field.type for field in dataclasses.fields(GPTConfig)}
DEFAULTS = {field.name: field.default for field in dataclasses.fields(GPTConfig)}
DERIVED = ("n_kv_head", "n_ffn", "head_dim")      # fields that follow from the others where they are 0


@dataclass(frozen=True)
class Origin:
    """Where a model comes from: its family, its architecture, and what its config.json says."""
    family: Family
    config: GPTConfig
    content: dict = field(compare=False)
    wrapped: bool = False         # whether it is the text part of a model of several parts
    types: dict = field(compare=False, default_factory=dict)     # {our name: torch.dtype} in its files


# -----------------------------------------------------------------------------
# config.json


def read_config(folder):
    """config.json of a checkpoint -> GPTConfig. ValueError for a key that would change the computation unseen."""
    return read_origin(folder).config


def read_origin(folder):
    """config.json of a checkpoint -> Origin."""
    path = Path(folder, "config.json")
    check(path.is_file(), f"{folder}: no model there, it has no config.json (it has {found_in(folder)})")
    content = read_json(path)
    with located(path):
        return parse_origin(content)


def parse_config(content):
    """The content of a config.json -> GPTConfig."""
    return parse_origin(content).config


def parse_origin(content):
    """The content of a config.json -> Origin."""
    refuse_quantized(content)
    wrapped = isinstance(content.get("text_config"), dict)
    if wrapped:
        content = text_part(content)
        refuse_quantized(content)
    kind = content.get("model_type")
    reason = OUT_OF_SCOPE.get(kind) if isinstance(kind, str) else None
    check(not reason, f"model_type is {kind!r}: {reason}, which this code does not have")
    check(kind in list(FAMILIES), f"model_type is {kind!r}; it must be one of {', '.join(FAMILIES)}")
    family, rest = FAMILIES[kind], dict(content)
    fields = plain_fields(family, rest) | biases(family, rest) | switches(family, rest)
    fields |= positions(family, rest, GPTConfig(**fields))
    for key, wanted in family.required.items():
        value = rest.pop(key, wanted)
        check(value == wanted, f"{key} is {value!r}; only {wanted!r} is supported")
    refuse_unknown(rest)
    return Origin(family, GPTConfig(**fields), content, wrapped)


def text_part(content):
    """What config.json of a model of several parts says of its text part; the head belongs to the whole."""
    said = {"model_type": f"{content.get('model_type')}_text"}
    if content.get("tie_word_embeddings") is not None:
        said["tie_word_embeddings"] = content["tie_word_embeddings"]
    return agreeing(said, content["text_config"], ["tie_word_embeddings"])


def refuse_quantized(content):
    """ValueError where the checkpoint's weights lie in the quantized form of another library."""
    for key, usual in QUANTIZED.items():
        found = content.get(key) or {}
        found = found if isinstance(found, dict) else {"quant_method": found} if found else {}
        method = found.get("quant_method", usual)
        if "load_in_4bit" in found or "load_in_8bit" in found:
            method = "bitsandbytes"
        check(not found, f"the checkpoint is quantized already ({method}); take the unquantized one, and --quant stores it in few bits")


def refuse_unknown(rest):
    """ValueError for the first of the keys that nothing has read and that is not known to change nothing."""
    for key, value in rest.items():
        wanted = HARMLESS_AT.get(key, value)
        check(value is None or value == wanted, f"{key} is {value!r}; only {wanted!r} is supported")
        if key in HARMLESS or key in HARMLESS_AT or value in (None, False, [], {}):
            continue
        reason = OUT_OF_SCOPE_KEYS.get(key)
        check(not reason, f"{key} is {value!r}: {reason}, which this code does not have")
        raise ValueError(f"unknown key {key!r}, and what it changes is not known either; remove it if it changes nothing")


def take(family, rest, key):
    """The value of a key, which is taken out of rest; where it is absent the family's default, or None."""
    return rest.pop(key, family.defaults.get(key))


def take_truth(family, rest, key):
    """The same of a key that must be true, false or null."""
    value = take(family, rest, key)
    check(value in (True, False, None), f"{key} is {value!r}; it must be true or false")
    return bool(value)


def plain_fields(family, rest):
    """The fields of GPTConfig that one key says each."""
    fields = dict(family.fixed)
    for key, name in family.keys.items():
        check(key in rest or key in family.defaults or name in fields, f"{key} is missing")
        value = parse_value(family, key, name, take(family, rest, key))
        if value is None:
            continue
        agreed = fields.setdefault(name, value)
        check(value == agreed, f"{key} is {value!r}; only {agreed!r} is supported")
    if family.scaled_embedding:
        fields["embed_scale"] = math.sqrt(fields["n_embd"])
    return fields


def parse_value(family, key, name, value):
    """The value of a key as GPTConfig's field of that name holds it, or None where it says nothing."""
    if value is None and name in DERIVED:
        return 0
    if value is None and family.defaults.get(key, 0) is None:
        return None
    if name == "activation":
        known = ACTIVATIONS | family.activations
        check(value is None or value in list(known), f"{key} is {value!r}; it must be one of {', '.join(known)}")
        return known.get(value)
    value = typed(key, value, TYPES[name])
    if key in CONVERSIONS:
        value = CONVERSIONS[key](bounded(key, value, table={key: (1e-9, 10**9)}))
    return bounded(key, value, table={key: SHAPE[name]}) if name in SHAPE else value


def biases(family, rest):
    """The field `bias`: the parts that have one by the family and by its keys."""
    parts = family.fixed.get("bias", DEFAULTS["bias"]).split()
    for key, more in family.biases.items():
        if take_truth(family, rest, key):
            parts += more.split()
    return {"bias": " ".join(dict.fromkeys(parts))}


def switches(family, rest):
    """The fields that keys turn on by being true."""
    fields = {}
    for key, changes in family.switches.items():
        if take_truth(family, rest, key):
            fields |= changes
    return fields


# -----------------------------------------------------------------------------
# what differs by layer


def positions(family, rest, config):
    """The fields windows, unrotated, rope and local_rope, and the context where it has to be shorter."""
    unrotated = unrotated_layers(family, rest, config.n_layer)
    windows = windows_of_layers(family, rest, config.n_layer, unrotated)
    fields = {"windows": windows if any(windows) else (), "unrotated": unrotated}
    if config.position == "rope":
        rope, local, context = parse_ropes(family, rest, config)
        has_own = any(windows) and local != rope
        fields |= {"rope": rope, "local_rope": local if has_own else None, "block_size": context}
        if not has_own:
            fields["windows"] = windows_in_force(windows, context)
    return fields


def windows_in_force(windows, context):
    """The same windows without those that hide nothing within the context; () where none is left."""
    shorter = tuple(window if window < context else 0 for window in windows)
    return shorter if any(shorter) else ()


def unrotated_layers(family, rest, n_layer):
    """Indices of the layers without rotary positions."""
    interval = take(family, rest, "no_rope_layer_interval")
    if interval is None:                                 # which the families with such layers have by default
        return ()
    rotated = rest.pop("no_rope_layers", None)           # 1 for each layer that has them, whatever the name says
    if rotated is not None:
        check(is_list_of(rotated, n_layer, (0, 1)), f"no_rope_layers is {rotated!r}; it must hold 0 or 1 for each of {n_layer} layers")
        return tuple(i for i, has in enumerate(rotated) if not has)
    check(type(interval) is int and interval > 0, f"no_rope_layer_interval is {interval!r}; it must be a number of layers")
    return tuple(range(interval - 1, n_layer, interval))


def windows_of_layers(family, rest, n_layer, unrotated):
    """For each layer how many tokens one sees in it, 0 where all."""
    window = take(family, rest, "sliding_window") or 0
    bounded("sliding_window", typed("sliding_window", window, int), table={"sliding_window": (0, 2**30)})
    if family.windows in ("late", "unrotated") and not take_truth(family, rest, "use_sliding_window"):
        window = 0
    rule = layers_by_rule(family, rest, n_layer, unrotated)
    check(not window or family.windows != "none", f"sliding_window is {window}, which {family.name} does not have")
    types = rest.pop("layer_types", None)
    if types is None:
        return tuple(window if i in rule else 0 for i in range(n_layer))
    kinds = ("full_attention", "sliding_attention")
    check(is_list_of(types, n_layer, kinds), f"layer_types is {types!r}; it must hold {' or '.join(kinds)} for each of {n_layer} layers")
    local = [i for i, kind in enumerate(types) if kind == "sliding_attention"]
    check(window or not local, "layer_types holds sliding_attention, but there is no sliding_window, or it is not in use")
    follows = family.windows not in ("none", "all") or local == list(rule if window else ())
    check(follows, f"layer_types is {types!r}, which {family.name} does not follow")
    return tuple(window if i in local else 0 for i in range(n_layer))


def layers_by_rule(family, rest, n_layer, unrotated):
    """The indices of the layers with a window, where layer_types does not say."""
    late = take(family, rest, "max_window_layers")
    names = ("sliding_window_pattern", "_sliding_window_pattern")
    nth = next(filter(None, [rest.pop(name, None) for name in names]), family.windows)
    if family.windows == "late":
        check(type(late) is int and late >= 0, f"max_window_layers is {late!r}; it must be a number of layers")
        return range(late, n_layer)
    if isinstance(family.windows, int):
        check(type(nth) is int and nth > 0, f"sliding_window_pattern is {nth!r}; it must be a number of layers")
        return [i for i in range(n_layer) if (i + 1) % nth]
    return {"none": (), "all": range(n_layer), "given": range(n_layer), "unrotated": unrotated}[family.windows]


def is_list_of(value, n, allowed):
    """Whether a value of a JSON file is a list of n of the allowed values."""
    return isinstance(value, list) and len(value) == n and all(item in list(allowed) for item in value)


# -----------------------------------------------------------------------------
# rotary positions

ROPE_GENERAL = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
ROPE_KINDS = {                   # kind of scaling -> its keys, beside the general ones
    "default": ("factor",), "dynamic": ("factor",), "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", "attention_factor", "mscale", "mscale_all_dim", "beta_fast", "beta_slow", "truncate",
             "llama_4_scaling_beta", "max_position_embeddings"),
    "longrope": ("factor", "attention_factor", "short_factor", "long_factor")}


def parse_ropes(family, rest, config):
    """(Rope, Rope of the layers with a window, the context up to which they are exact)."""
    general = {key: rest.pop(key) for key in ROPE_GENERAL if key in rest}
    for theirs, ours in family.rope_keys.items():
        if theirs in rest:
            general = agreeing(general, {ours: rest.pop(theirs)})
    parameters = take_object(rest, "rope_parameters")            # of transformers 5, by kind of layer in some families
    full = parameters.get("full_attention", parameters)
    local = parameters.get("sliding_attention")
    said = agreeing(agreeing(general, take_object(rest, "rope_scaling")), typed("full_attention", full or {}, dict))
    defaults = {key: family.defaults[key] for key in ROPE_GENERAL if key in family.defaults}
    share = said.get("partial_rotary_factor")
    possible = share in (None, 1) or "partial_rotary_factor" in defaults
    check(possible, f"partial_rotary_factor is {share!r}, which {family.name} does not have")
    rope, context = parse_rope(defaults | said, config)
    local_theta = take(family, rest, "rope_local_base_freq")
    if local is not None:
        local = typed("sliding_attention", local, dict)
        return rope, parse_rope(defaults | general | local, config)[0], context
    if family.plain_windows:
        theta = rope.theta if local_theta is None else typed("rope_local_base_freq", local_theta, float)
        return rope, Rope(theta=theta, dim=rope.dim), context
    return rope, rope, context


def take_object(rest, key):
    """The object of a key, {} where it is null or absent; it is taken out of rest."""
    return typed(key, rest.pop(key, None) or {}, dict)


def agreeing(first, second, keys=None):
    """Two dicts as one. ValueError where they contradict each other, in those keys or in any."""
    for key in first.keys() & second.keys() & set(first if keys is None else keys):
        same = first[key] == second[key]
        check(same, f"{key} is {first[key]!r} in one place of config.json and {second[key]!r} in another")
    return first | second


def parse_rope(said, config):
    """What config.json says of the rotary positions of one kind of layers, as a dict -> (Rope, context)."""
    kind = said.get("rope_type") or said.get("type") or "default"
    if kind == "su" or "short_factor" in said:                   # earlier names of longrope
        kind = "longrope"
    check(kind in list(ROPE_KINDS), f"rotary scaling {kind!r} is not supported; {', '.join(ROPE_KINDS)} are")
    known = {"rope_type", "type", *ROPE_GENERAL, *ROPE_KINDS[kind]}
    unknown = [key for key, value in said.items() if value is not None and key not in known]
    check(not unknown, f"rotary scaling {kind} does not have {', '.join(unknown)}")
    share = number(said, "partial_rotary_factor", 1.0)
    dim = int(config.d_head * share)
    check(0 < dim <= config.d_head, f"partial_rotary_factor is {share}; of {config.d_head} numbers of a head it rotates {dim}")
    plain = Rope(theta=number(said, "rope_theta"), dim=0 if dim == config.d_head else dim)
    context = config.block_size
    original = number(said, "original_max_position_embeddings", context)
    factor = number(said, "factor", context / original)
    check(kind != "default" or said.get("factor") in (None, 1), f"rotary scaling of factor {factor}, but no rope_type says which")
    if kind in ("default", "dynamic"):                           # a dynamic one acts beyond the context alone
        return plain, context
    rope = replace(plain, scaling=kind, factor=factor)
    if kind == "linear":
        return rope, context
    rope = replace(rope, original=max(int(original), 1))
    if kind == "llama3":
        return replace(rope, slow=number(said, "low_freq_factor"), fast=number(said, "high_freq_factor")), context
    magnitude = number(said, "attention_factor", default_magnitude(kind, said, rope))
    rope = replace(rope, magnitude=magnitude)
    return yarn(said, rope, context) if kind == "yarn" else longrope(said, rope, context, (dim + 1) // 2)


def yarn(said, rope, context):
    """(Rope, context) of yarn. A model whose queries are also scaled by their position, beyond the original
    context, is exact up to that."""
    if said.get("llama_4_scaling_beta"):
        context = min(context, rope.original)
    truncate = typed("truncate", said.get("truncate", True), bool)
    return replace(rope, slow=number(said, "beta_slow", 1.0), fast=number(said, "beta_fast", 32.0), truncate=truncate), context


def longrope(said, rope, context, n_pairs):
    """(Rope, context) of longrope, by its factors for short texts. For a text beyond the original context others hold, and
    for all of its positions, even those that have been computed: it is exact up to that."""
    factors = said.get("short_factor")
    fits = isinstance(factors, list) and len(factors) == n_pairs
    check(fits, f"short_factor must hold {n_pairs} numbers, one for each pair that is rotated")
    if said.get("long_factor") != factors:
        context = min(context, rope.original)
    return replace(rope, factors=tuple(number({"short_factor": factor}, "short_factor") for factor in factors)), context


def number(said, key, default=None):
    """A number that must be positive; the default, if there is one, where it is not said. float."""
    value = said.get(key)
    value = default if value is None else value
    return checked(key, value, float, table={key: (1e-9, 10**15)})


def default_magnitude(kind, said, rope):
    """By how much cos and sin grow with the factor: of longrope, or of yarn (Peng et al. 2023, eq. 22)."""
    if rope.factor <= 1:
        return 1.0
    if kind == "longrope":
        return math.sqrt(1 + math.log(rope.factor) / math.log(rope.original))
    growth = 0.1 * math.log(rope.factor)
    if said.get("mscale") and said.get("mscale_all_dim"):
        return (growth * number(said, "mscale") + 1) / (growth * number(said, "mscale_all_dim") + 1)
    return growth + 1


# -----------------------------------------------------------------------------
# what a new model is written as


def origin_of(model):
    """The Origin that a model came with, or one that says a new model's configuration."""
    return model.origin or new_origin(model.config)


def new_origin(config):
    """The Origin of a GPTConfig that was not read: of the first family whose config.json says all of it. ValueError where
    there is none."""
    for family in FAMILIES.values():
        content = config_json(family, config)
        try:
            again = parse_config(content)
        except ValueError:
            continue
        if resolved(again) == resolved(config):
            return Origin(family, config, content)
    raise ValueError(f"no family of checkpoints can say this architecture: {config}")


def resolved(config):
    """The same architecture, with the values that follow from others written out."""
    parts = [part for part in PARTS_WITH_BIAS if config.has_bias(part)]
    missing = {"gate": not config.gated, "norm": config.norm != "layer"}
    bias = " ".join(part for part in parts if not missing.get(part))
    windows = config.windows if config.local_rope else windows_in_force(config.windows, config.block_size)
    scale = config.attention_scale or config.d_head**-0.5
    return replace(
        config, windows=windows, n_kv_head=config.kv_heads, n_ffn=config.d_ffn, head_dim=config.d_head,
        attention_scale=scale, bias=bias)


def config_json(family, config):
    """GPTConfig -> the content of config.json, as far as the family can say it."""
    content = {"model_type": family.name, "architectures": [family.architecture]}
    # A class of transformers has ids of its own where config.json has none.
    content |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    for key, name in family.keys.items():
        content[key] = value_json(key, name, getattr(resolved(config), name))
    for key, parts in family.biases.items():
        content[key] = all(map(config.has_bias, parts.split()))
    for key, changes in family.switches.items():
        content[key] = all(getattr(config, name) == value for name, value in changes.items())
    if config.position == "rope":
        content |= rope_json(family, config)
    if family.windows != "none":
        content["sliding_window"] = max(config.windows, default=None)
    if any(config.windows) and family.windows != "all":
        kinds = {True: "sliding_attention", False: "full_attention"}
        content["layer_types"] = [kinds[window > 0] for window in config.windows]
    if family.windows in ("late", "unrotated"):
        content["use_sliding_window"] = any(config.windows)
    if "no_rope_layer_interval" in family.defaults:
        content["no_rope_layers"] = [int(i not in config.unrotated) for i in range(config.n_layer)]
    return content


def value_json(key, name, value):
    """The value of GPTConfig's field as a key of config.json holds it."""
    if name == "activation":
        return ACTIVATION_NAMES[value]
    return INVERSES[key](value) if key in INVERSES else value


def rope_json(family, config):
    """The keys that say rotary positions."""
    rope, local = config.rope, config.local_rope
    content = {"rope_theta": rope.theta}
    if rope.dim or "partial_rotary_factor" in family.defaults:
        content["partial_rotary_factor"] = (rope.dim or config.d_head) / config.d_head
    content |= {theirs: content[ours] for theirs, ours in family.rope_keys.items()}
    if local:
        content["rope_local_base_freq"] = local.theta
    if rope.scaling == "none":
        return content
    scaling = {"rope_type": rope.scaling, "factor": rope.factor}
    if rope.original:
        scaling["original_max_position_embeddings"] = rope.original
    if rope.scaling == "llama3":
        scaling |= {"low_freq_factor": rope.slow, "high_freq_factor": rope.fast}
    if rope.scaling in ("yarn", "longrope"):
        scaling["attention_factor"] = rope.magnitude
    if rope.scaling == "yarn":
        scaling |= {"beta_slow": rope.slow, "beta_fast": rope.fast, "truncate": rope.truncate}
    if rope.scaling == "longrope":
        scaling |= {"short_factor": list(rope.factors), "long_factor": list(rope.factors)}
    return content | {"rope_scaling": scaling}
