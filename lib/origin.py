"""
config.json <-> GPTConfig: what a checkpoint in Hugging Face layout says of its architecture.

    read_origin("gpt2").config.n_layer           # 12

Every key is honoured, known to be harmless or refused by name. Both layouts are read in which the transformers
library has written rotary positions, version 4 (rope_theta, rope_scaling) and 5 (rope_parameters). What differs between
families is said in lib/families.py.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path

from lib.families import ACTIVATION_NAMES, ACTIVATIONS, CONVERSIONS, FAMILIES, GPT2, LLAMA, OPT, ROPE_KEYS, Family
from lib.files import check, found_in, located, read_json
from lib.keys import HARMLESS, OUT_OF_SCOPE
from lib.rope import Rope
from model import GPTConfig

TYPES = {field.name: field.type for field in dataclasses.fields(GPTConfig)}
DEFAULTS = {field.name: field.default for field in dataclasses.fields(GPTConfig)}
DERIVED = {"n_kv_head": "kv_heads", "n_ffn": "d_ffn", "head_dim": "d_head"}      # field that may be 0 -> what it then is


@dataclass(frozen=True)
class Origin:
    """Where a model comes from: its family, its architecture, and what its config.json says."""
    family: Family
    config: GPTConfig
    content: dict = field(compare=False)
    wrapped: bool = False         # whether it is the text part of a model of several parts


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
        content = {"model_type": f"{content.get('model_type')}_text"} | content["text_config"]
    kind = content.get("model_type")
    reason = OUT_OF_SCOPE.get(kind) if isinstance(kind, str) else None
    check(not reason, f"model_type is {kind!r}: {reason}, which this code does not have")
    check(kind in list(FAMILIES), f"model_type is {kind!r}; it must be one of {', '.join(FAMILIES)}")
    family = FAMILIES[kind]
    rest = family.defaults | content
    fields = plain_fields(family, rest)
    config = GPTConfig(**fields)
    fields |= biases(family, rest) | switches(family, rest) | positions(family, rest, config)
    for key, wanted in family.required.items():
        value = rest.pop(key, wanted)
        check(value == wanted, f"{key} is {value!r}; only {wanted!r} is supported")
    refuse_unknown(rest)
    return Origin(family, GPTConfig(**fields), content, wrapped)


def refuse_quantized(content):
    """ValueError where the checkpoint's weights are stored in a form of quantization of others."""
    found = content.get("quantization_config") or {}
    method = found.get("quant_method", "an unknown method") if isinstance(found, dict) else found
    check(not found, f"the checkpoint is quantized already ({method}); take the unquantized one, and --quant stores it in few bits")


def plain_fields(family, rest):
    """The fields of GPTConfig that a key of config.json says; such keys are taken out of rest."""
    fields = dict(family.fixed)
    for key, name in family.keys.items():
        check(key in rest, f"{key} is missing")
        value = parse_value(family, key, name, rest.pop(key))
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
    if name == "activation":
        known = ACTIVATIONS | family.activations
        check(value is None or value in list(known), f"{key} is {value!r}; it must be one of {', '.join(known)}")
        return known.get(value)
    kinds = (int, float) if TYPES[name] is float else (TYPES[name],)
    check(type(value) in kinds, f"{key} is {value!r}; it must be {TYPES[name].__name__}")
    if key not in CONVERSIONS:
        return value
    check(value > 0, f"{key} is {value!r}; it must be positive")
    return CONVERSIONS[key](value)


def truth(rest, key):
    """The value of a key that must be true, false or absent; it is taken out of rest."""
    value = rest.pop(key, None)
    check(value in (True, False, None), f"{key} is {value!r}; it must be true or false")
    return bool(value)


def biases(family, rest):
    """The field `bias`: the parts that have one by the family and by its keys."""
    parts = family.fixed.get("bias", DEFAULTS["bias"]).split()
    for key, more in family.biases.items():
        if truth(rest, key):
            parts += more.split()
    return {"bias": " ".join(dict.fromkeys(parts))}


def switches(family, rest):
    """The fields that keys of truth turn on."""
    fields = {}
    for key, changes in family.switches.items():
        if truth(rest, key):
            fields |= changes
    return fields


def refuse_unknown(rest):
    """ValueError for the first of the keys that nothing has read and that is not known to change nothing."""
    for key, value in rest.items():
        harmless = key in HARMLESS or key.startswith("_") or value in (None, False, [], {})
        check(harmless, f"unknown key {key!r}, and what it changes is not known either; remove it if it changes nothing")


# -----------------------------------------------------------------------------
# config.json: what differs by layer, and rotary positions


def positions(family, rest, config):
    """The fields windows, unrotated, rope and local_rope, and the context where it has to be shorter."""
    n_layer = config.n_layer
    unrotated = unrotated_layers(rest, n_layer)
    windows = windows_of_layers(family, rest, n_layer, unrotated)
    fields = {"windows": windows if any(windows) else (), "unrotated": unrotated}
    if config.position != "rope":
        return fields
    rope, local, context = parse_ropes(family, rest, config)
    if not any(windows) or local == rope:
        local = None
    return fields | {"rope": rope, "local_rope": local, "block_size": context}


def unrotated_layers(rest, n_layer):
    """Indices of the layers without rotary positions."""
    interval = rest.pop("no_rope_layer_interval", None)
    rotated = rest.pop("no_rope_layers", None)           # for each layer 1 where it has them, whatever the name says
    if rotated:
        check(isinstance(rotated, list) and len(rotated) == n_layer, f"no_rope_layers is {rotated!r}; it must hold 0 or 1 for each of {n_layer} layers")
        return tuple(i for i, has in enumerate(rotated) if not has)
    if not interval:
        return ()
    check(type(interval) is int and interval > 0, f"no_rope_layer_interval is {interval!r}; it must be a positive number of layers")
    return tuple(range(interval - 1, n_layer, interval))


def windows_of_layers(family, rest, n_layer, unrotated):
    """For each layer how many tokens one sees in it, 0 where all."""
    window = rest.pop("sliding_window", None) or 0
    pattern = rest.pop("sliding_window_pattern", None) or rest.pop("_sliding_window_pattern", None) or family.windows
    late = rest.pop("max_window_layers", 0)
    types = rest.pop("layer_types", None)
    has_switch = family.windows in ("late", "unrotated")
    if has_switch and not truth(rest, "use_sliding_window"):
        window = 0
    check(type(window) is int and window >= 0, f"sliding_window is {window!r}; it must be a number of tokens")
    check(not window or family.windows != "none", f"sliding_window is {window}, which {family.name} does not have")
    layers = {"none": (), "all": range(n_layer), "given": range(n_layer), "late": range(late, n_layer), "unrotated": unrotated}
    if family.windows in layers:
        local_layers = layers[family.windows]
    else:
        local_layers = [i for i in range(n_layer) if (i + 1) % pattern]
    local = [bool(window and i in local_layers) for i in range(n_layer)]
    if types is not None:
        kinds = {"full_attention": False, "sliding_attention": True}
        known = isinstance(types, list) and all(kind in list(kinds) for kind in types)
        check(known and len(types) == n_layer, f"layer_types must name {' or '.join(kinds)} for each of {n_layer} layers, it is {types}")
        said = [kinds[kind] for kind in types]
        check(window or not any(said), "layer_types names sliding_attention, but no sliding_window is in force")
        fits = said == local or family.windows not in ("none", "all")
        check(fits, f"layer_types is {types}, which {family.name} does not follow")
        local = said
    return tuple(window if is_local else 0 for is_local in local)


def parse_ropes(family, rest, config):
    """(Rope, the Rope of the layers with a window, the context up to which they are exact)."""
    for theirs, ours in ROPE_KEYS.items():
        if theirs in rest:
            value = rest.pop(theirs)
            rest[ours] = rest[ours] if rest.get(ours, family.defaults.get(ours)) != family.defaults.get(ours) else value
            check(rest[ours] == value, f"{theirs} is {value!r}, but {ours} is {rest[ours]!r}")
    new, old = rest.pop("rope_parameters", None) or {}, rest.pop("rope_scaling", None) or {}
    for name, value in (("rope_parameters", new), ("rope_scaling", old)):
        check(isinstance(value, dict), f"{name} is {value!r}; it must be an object")
    general = {key: rest.pop(key) for key in ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
               if key in rest}
    local_theta = rest.pop("rope_local_base_freq", family.local_theta)
    by_layer = {"full_attention", "sliding_attention"} & new.keys()
    full = new.get("full_attention") or {} if by_layer else new
    for key, value in old.items():
        check(key not in full or full[key] == value, f"rope_scaling and rope_parameters contradict each other: {key} is {value!r} and {full.get(key)!r}")
    for key in general.keys() & full.keys():
        said = general[key] == full[key] or general[key] == family.defaults.get(key)
        check(said, f"{key} is {general[key]!r}, but rope_parameters says {full[key]!r}")
    rope, context = parse_rope(general | old | full, config)
    if by_layer:
        local, _ = parse_rope({"rope_theta": general.get("rope_theta")} | (new.get("sliding_attention") or {}), config)
    elif local_theta is None:
        local = rope
    else:
        theta = rope.theta if local_theta == "same" else local_theta
        local = Rope(theta=float(theta), dim=rope.dim)
    return rope, local, context


# kind of rotary scaling -> its keys, beside those of all
ROPE_KINDS = {
    "default": (), "dynamic": ("factor",), "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", "attention_factor", "mscale", "mscale_all_dim", "beta_fast", "beta_slow", "truncate",
             "llama_4_scaling_beta", "max_position_embeddings"),
    "longrope": ("factor", "attention_factor", "short_factor", "long_factor", "short_mscale", "long_mscale")}
ROPE_COMMON = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings"}


def parse_rope(said, config):
    """(Rope, context) of what config.json says of rotary positions in one kind of layers."""
    kind = said.get("rope_type", said.get("type")) or "default"
    kind = "longrope" if kind == "su" or kind == "yarn" and "short_factor" in said else kind
    check(kind in list(ROPE_KINDS), f"rotary scaling {kind!r} is not supported; {', '.join(ROPE_KINDS)} are")
    unknown = {key for key, value in said.items() if value is not None} - ROPE_COMMON - {*ROPE_KINDS[kind]}
    check(not unknown, f"rotary scaling {kind}: unknown {', '.join(sorted(unknown))}")
    share = number(said, "partial_rotary_factor", 1.0)
    check(0 < share <= 1, f"partial_rotary_factor is {share}; it must lie in (0, 1]")
    dim = int(config.d_head * share)
    rope = {"theta": number(said, "rope_theta"), "dim": 0 if dim == config.d_head else dim}
    if kind in ("default", "dynamic"):       # a dynamic one changes nothing within the context
        return Rope(**rope), config.block_size
    original = int(number(said, "original_max_position_embeddings", config.block_size))
    rope |= {"scaling": kind, "factor": number(said, "factor", config.block_size / original)}
    if kind == "linear":
        return Rope(**rope), config.block_size
    rope["original"] = original
    if kind == "llama3":
        slow, fast = number(said, "low_freq_factor"), number(said, "high_freq_factor")
        return Rope(**rope, slow=slow, fast=fast), config.block_size
    magnitude = number(said, "attention_factor", default_magnitude(kind, said, rope["factor"], original))
    if kind == "yarn":
        rope |= {"slow": number(said, "beta_slow", 1.0), "fast": number(said, "beta_fast", 32.0),
                 "truncate": said.get("truncate", True) is not False}
        # Beyond the original context such a model also scales its queries by the position.
        context = min(config.block_size, original) if said.get("llama_4_scaling_beta") else config.block_size
        return Rope(**rope, magnitude=magnitude), context
    factors = said.get("short_factor")
    n_pairs = (dim + 1) // 2
    whole = isinstance(factors, list) and len(factors) == n_pairs and all(type(f) in (int, float) for f in factors)
    check(whole, f"short_factor must hold {n_pairs} numbers, one for each pair that is rotated")
    # Beyond the original context other factors hold, for all positions, even those that were computed before.
    context = config.block_size if said.get("long_factor") == factors else min(config.block_size, original)
    return Rope(**rope, factors=tuple(map(float, factors)), magnitude=magnitude), context


def number(said, key, default=None):
    """A number that must be positive, float; the default, if there is one, where it is not said."""
    value = said.get(key)
    value = default if value is None else value
    check(type(value) in (int, float) and 0 < value < math.inf, f"{key} is {value!r}; it must be a positive number")
    return float(value)


def default_magnitude(kind, said, factor, original):
    """How much longer cos and sin become with the context: of yarn (Peng et al. 2023, eq. 22) or longrope."""
    if factor <= 1:
        return 1.0
    if kind == "longrope":
        return math.sqrt(1 + math.log(factor) / math.log(original))

    def of_scale(mscale):
        return 0.1 * mscale * math.log(factor) + 1.0

    if said.get("mscale") and said.get("mscale_all_dim"):
        return of_scale(said["mscale"]) / of_scale(said["mscale_all_dim"])
    return of_scale(1.0)


# -----------------------------------------------------------------------------
# what a new model is written as


def origin_of(model):
    """The Origin that a model came with, or of the first family that can say all of a new one's configuration."""
    return model.origin or new_origin(model.config)


def new_origin(config):
    """The Origin of a GPTConfig that was not read from a checkpoint. ValueError where no family can say it."""
    values = dataclasses.asdict(config) | {"rope": config.rope, "local_rope": config.local_rope}
    if config.kv_heads == config.n_head:
        values["n_kv_head"] = 0
    if config.d_head * config.n_head == config.n_embd:
        values["head_dim"] = 0
    for family in (GPT2, OPT, LLAMA):
        expected = DEFAULTS | family.fixed | {"rope": Rope(theta=config.rope.theta)}
        unsaid = expected.keys() - family.keys.values()
        if all(values[name] == expected[name] for name in unsaid):
            return Origin(family, config, config_json(family, config))
    raise ValueError(f"this architecture is none of {GPT2.name}, {OPT.name}, {LLAMA.name}")


def config_json(family, config):
    """GPTConfig -> the content of config.json."""
    content = {"model_type": family.name, "architectures": [family.architecture]}
    for key, name in family.keys.items():
        value = getattr(config, DERIVED.get(name, name))
        content[key] = ACTIVATION_NAMES[value] if name == "activation" else value
    if config.position == "rope":
        content["rope_theta"] = config.rope.theta
    return content
