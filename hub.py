"""
The door for adapters: out to PEFT's and AdapterHub's layouts and in from there, looked at, added, merged.

    python hub.py show out/qlora                            # what is in an adapter
    python hub.py export out/qlora DIR --layout peft         # or adapterhub; loads with PeftModel.from_pretrained
    python hub.py import DIR out/x --base DIR                # the same layouts in, as a run for sample.py and evaluate.py
    python hub.py add out/x out/y out/z --weights 1 0.5      # LoRA adapters of one base added up, as the run out/z
    python hub.py merge out/qlora DIR                        # base and adapter as one plain checkpoint, with its tokenizer
    python hub.py merge out/qlora DIR --requantize           # in the base's storage, and what that does to the logits

Nothing that is there already is written over.
"""

import argparse
import sys

from lib.config import FIELDS, METHOD_OPTIONS, Config, convert, read_run_config, run_main, write_toml


def parse(args):
    """The command line: a command and its folders."""
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    commands = parser.add_subparsers(dest="command", required=True)
    show, export, import_, add, merge = map(commands.add_parser, ("show", "export", "import", "add", "merge"))
    add.add_argument("runs", nargs="+", help="runs with LoRA alone; the first one's configuration is kept")
    for command in (show, export, add, merge):
        command.add_argument("run")
    for command in (export, import_, merge):
        command.add_argument("folder")
    import_.add_argument("run")
    export.add_argument("--layout", default="peft", choices=("peft", "adapterhub"))
    export.add_argument("--name", default="nanopeft", help="of the adapter, in AdapterHub's layout")
    import_.add_argument("--base", required=True)
    add.add_argument("--weights", nargs="+", type=float, help="a number for each run; none: 1 for each")
    merge.add_argument("--requantize", action="store_true", help="store the merged weights as the base was stored")
    return parser.parse_args(args)


if __name__ == "__main__":      # --help and mistakes answer here, before torch is imported
    ARGS = parse(sys.argv[1:])

import dataclasses
import functools
import re
import shlex
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F

import data
import peft
from lib import run as runs
from lib.checkpoint import layout, linear_modules, load_base, save_base, shapes_of, stack, unstack
from lib.files import (check, found_in, located, read_bytes, read_json, read_tensors, save_file, some,
                       torch_bytes, write_atomic, write_json, write_safetensors)
from lib.origin import read_origin

# -----------------------------------------------------------------------------
# adapters in PEFT's layout: adapter_config.json and adapter_model.safetensors, which holds
#
#   LoRA      MODULE.lora_A.weight (r, in), MODULE.lora_B.weight (out, r); h = W x + s B A x, s = lora_alpha/r
#             GPT-2's c_attn holds W_q, W_k and W_v one on top of the other. LoRAs of q and v are there one
#             LoRA of the ranks' sum, which has the same s because lora_alpha grows as the rank does:
#
#                 A = | A_q |      B = | B_q   0  |
#                     | A_v |          |  0    0  |
#                                      |  0   B_v |
#
#   DoRA      and MODULE.lora_magnitude_vector (out,): of c_attn m_q, m_k and m_v, one after the other
#   (IA)3     MODULE.ia3_l: (out, 1) for a module's result, of c_attn ones, l_k and l_v; (1, in) for its input
#   BitFit    MODULE.bias, or MODULE.base_layer.bias where a LoRA is, beside a LoRA, which may be of zeros
#   embed, head, norm     MODULE.weight and .bias beside LoRA or (IA)3, MODULE in modules_to_save; of a
#             tied head and its embedding both are there, and equal
#   prompt    prompt_embeddings (n, n_embd)
#   prefix    prompt_embeddings (n, 2 L kv), viewed as (n, 2 L, heads, head_dim): the keys of layer l at 2 l,
#             its values at 2 l + 1
#
# where MODULE is base_model.model. and a module's name in the base's checkpoint.

LORA_SUFFIXES = {"lora_A": "A", "lora_B": "B", "lora_magnitude_vector": "m"}
IA3_VECTORS = {"attn.k": "l_k", "attn.v": "l_v", "ffn.down": "l_ff"}      # layer -> the vector that scales it
ELSEWHERE = {"adapter": "; bottleneck adapters go to --layout adapterhub",
             "full": "; a tuned base is written by python hub.py merge",
             "top": "; a tuned base is written by python hub.py merge"}


@functools.cache
def linear_layers(base):
    """{their module of a block: {our layer: rows of its weight}}, top to bottom, of the linear layers."""
    rows = {name: shape[0] for name, shape in shapes_of(base.config).items()}
    return {module: {name: rows[f"blocks.0.{name}.weight"] for name in layers}
            for module, layers in linear_modules(base.family).items()
            if f"blocks.0.{layers[0]}.weight" in rows}           # The family's row may name a gate that others have.


def peft_name(base, name):
    """The name in PEFT's layout of a tensor or module of the base's checkpoint."""
    if base.wrapped:
        name = name.replace("model.", "model.language_model.", 1)
    return f"base_model.model.{name}"


def scaled_layers(base):
    """linear_layers, but only those that (IA)3 scales."""
    return {module: layers for module, layers in linear_layers(base).items() if layers.keys() & IA3_VECTORS}


def prefix_names(base):
    """Our names of a prefix's keys and values, in the order of PEFT's layout."""
    return [f"blocks.{i}.attn.prefix.{name}" for i in range(base.config.n_layer) for name in ("s_k", "s_v")]


def bias_names(base):
    """{PEFT's name: our names} of every bias of the base."""
    tensors = layout(base.family, shapes_of(base.config)).items()
    return {peft_name(base, theirs): ours for theirs, (ours, _) in tensors if theirs.endswith(".bias")}


WHOLE = {"embed", "head", "norm"}      # methods that train modules whole, which PEFT calls modules_to_save


def whole_names(base):
    """{PEFT's name: our name} of the tensors that these methods train."""
    names = {}
    for theirs, (ours, _) in layout(base.family, shapes_of(base.config)).items():
        if ours[0] in (peft.TABLE, "head.weight") or peft.is_norm(ours[0]):
            names[peft_name(base, theirs)] = ours[0]
    if base.config.tied:
        names[head_name(base)] = peft.TABLE
    return names


def rows_of(tensor):
    """The rows of a tensor that a file holds, 0 where it is none."""
    return tensor.size(0) if isinstance(tensor, torch.Tensor) and tensor.dim() else 0


def head_name(base):
    """PEFT's name of the head's weight."""
    return peft_name(base, f"{base.family.head}.weight")


def prompt_scale(base):
    """What a prompt's vectors are multiplied by where they enter the model here and do not in PEFT: there they stand
    behind the module of the embedding, which scales its own."""
    return base.config.embed_scale if base.family.scaled_embedding else 1.0


def to_peft(content, base):
    """(adapter_config, tensors) of an adapter (peft.read_adapter). ValueError for what PEFT has no place for."""
    method, options, tensors = content["method"], content["options"], content["tensors"]
    methods = set(method.split("+"))
    others = methods - WHOLE
    if method == "prompt":
        settings, out = virtual_to_peft("PROMPT_TUNING", tensors["embed.P"] * prompt_scale(base), base)
    elif method == "prefix":
        check(options["prefix_style"] == "after", "a prefix before the projection has no place in PEFT's layout, which "
              "stores keys and values; train with --prefix_style after")
        check_prefix(base)
        keys_and_values = torch.cat([tensors[name] for name in prefix_names(base)], 1)
        settings, out = virtual_to_peft("PREFIX_TUNING", keys_and_values, base)
        settings |= {"prefix_projection": False, "encoder_hidden_size": base.config.n_embd}
    elif others == {"ia3"}:
        settings, out = ia3_to_peft(tensors, base)
    elif others - {"bitfit"} in ({"lora"}, {"dora"}, set()):
        settings, out = lora_to_peft(others, options, tensors, base)
    else:
        hint = "".join(hint for other, hint in ELSEWHERE.items() if other in methods)
        raise ValueError(f"{method} has no place in PEFT's layout{hint}")
    if methods & WHOLE:
        more, whole = whole_to_peft(methods, settings["peft_type"], tensors, base)
        settings, out = settings | more, out | whole
    return {"task_type": "CAUSAL_LM", "inference_mode": True} | settings, out


def check_prefix(base):
    """ValueError where a prefix is another function in PEFT than here."""
    window = max(base.config.windows, default=0)
    check(not window, f"a prefix over layers with a window (here of {window} tokens) has no place in PEFT's layout: there it "
          "falls out of the window, here every token sees it")


def whole_to_peft(methods, kind, tensors, base):
    """(more of an adapter_config of that peft_type, tensors) of the modules that are trained whole."""
    whole = {}
    for theirs, ours in whole_names(base).items():
        is_norm = peft.is_norm(ours)
        if ours not in tensors or is_norm and "norm" not in methods:     # BitFit trains the norms' biases alone.
            continue
        by_head = is_norm and tensors[ours].dim() == 2
        check(not by_head, f"{ours} holds a weight for each head, for which PEFT's layout has no place here")
        whole[theirs] = tensors[ours]
    modules = dict.fromkeys(theirs.rpartition(".")[0].removeprefix("base_model.model.") for theirs in whole)
    if not base.wrapped:                         # PEFT takes every module whose name ends so
        modules = dict.fromkeys(module.rpartition(".")[2] for module in modules)
    settings = {"modules_to_save": list(modules)}
    if kind == "LORA":
        settings["ensure_weight_tying"] = base.config.tied and head_name(base) in whole
    return settings, whole


def virtual_to_peft(kind, embeddings, base):
    """(adapter_config, tensors) of virtual tokens: a prompt's or a prefix's."""
    settings = {"peft_type": kind, "num_virtual_tokens": len(embeddings), "num_transformer_submodules": 1,
                "token_dim": base.config.n_embd, "num_layers": base.config.n_layer, "num_attention_heads": base.config.n_head}
    return settings, {"prompt_embeddings": embeddings}


def ia3_to_peft(tensors, base):
    """(adapter_config, tensors) of (IA)3; a layer that it does not scale gets ones where PEFT's module holds it."""
    modules, family, out = scaled_layers(base), base.family, {}
    feedforward = [module for module, layers in modules.items() if "ffn.down" in layers]
    for i in range(base.config.n_layer):
        for module, layers in modules.items():
            vectors = []
            for name, rows in layers.items():
                vector = f"blocks.{i}.{name}.{IA3_VECTORS.get(name)}"
                vectors.append(tensors.get(vector, torch.ones(rows)))
            dim = 0 if module in feedforward else 1
            out[peft_name(base, f"{family.block(i)}{module}.ia3_l")] = stack(family, base.config, vectors).unsqueeze(dim)
    settings = {"peft_type": "IA3", "target_modules": sorted(modules), "feedforward_modules": feedforward,
                "fan_in_fan_out": family.transposed}
    return settings, out


def lora_to_peft(methods, options, tensors, base):
    """(adapter_config, tensors) of LoRA or DoRA, of BitFit, of both, or of neither."""
    if methods <= {"bitfit"}:      # PEFT trains the base beside a LoRA, which is here one of zeros on the queries
        options = {"rank": 1, "alpha": 1.0, "rslora": False}
        A, B = torch.zeros(1, base.config.n_embd), torch.zeros(base.config.n_head * base.config.d_head, 1)
        for i in range(base.config.n_layer):
            tensors = tensors | {f"blocks.{i}.attn.q.A": A, f"blocks.{i}.attn.q.B": B}
    family, ranks, out = base.family, {}, {}
    for module, layers in linear_layers(base).items():
        for i in range(base.config.n_layer):
            stacked = stack_lora(base, tensors, f"blocks.{i}", layers)
            for name, t in stacked.items():
                out[peft_name(base, f"{family.block(i)}{module}.{name}")] = t
                ranks[module] = len(stacked["lora_A.weight"])
    if "bitfit" in methods:
        wrapped = tuple(f".{module}.bias" for module in ranks)
        for name, ours in bias_names(base).items():
            within = ".base_layer.bias" if name.endswith(wrapped) else ".bias"
            out[name.removesuffix(".bias") + within] = stack(family, base.config, [tensors[n] for n in ours])
    s, r = peft.scale_of(options), max(ranks.values())
    others = {module: rank for module, rank in ranks.items() if rank != r}
    settings = {
        "peft_type": "LORA", "r": r, "lora_alpha": s * r, "use_rslora": False, "use_dora": "dora" in methods,
        "rank_pattern": others, "alpha_pattern": {module: s * rank for module, rank in others.items()},
        "target_modules": sorted(ranks), "modules_to_save": None, "lora_dropout": options.get("dropout", 0.0),
        "bias": "all" if "bitfit" in methods else "none", "fan_in_fan_out": family.transposed}
    return settings, out


def stack_lora(base, tensors, block, layers):
    """{name in PEFT's layout: tensor} of the one LoRA that does what the layers' LoRAs do; {} where there are none."""
    wrapped = [f"{block}.{name}" for name in layers if f"{block}.{name}.A" in tensors]
    if not wrapped:
        return {}
    B = [tensors.get(f"{block}.{name}.B", torch.zeros(rows, 0)) for name, rows in layers.items()]
    B_of_layers = torch.block_diag(*B).split(list(layers.values()))
    stacked = {"lora_A.weight": torch.cat([tensors[f"{name}.A"] for name in wrapped]),
               "lora_B.weight": stack(base.family, base.config, B_of_layers)}
    magnitudes = [tensors[f"{name}.m"] for name in wrapped if f"{name}.m" in tensors]
    if magnitudes:
        names = ",".join(name.rpartition(".")[2] for name in layers)
        check(len(magnitudes) == len(layers), f"DoRA on a part of {names} has no place in PEFT's layout, which holds these "
              f"in one module and the magnitudes of all; train with --targets containing {names}")
        stacked["lora_magnitude_vector"] = stack(base.family, base.config, magnitudes)
    return stacked


# keys of adapter_config.json that are read below or change nothing in what is computed; any other is refused
KNOWN = set("""
    peft_type task_type base_model_name_or_path inference_mode auto_mapping revision peft_version
    lora_dropout init_lora_weights init_ia3_weights loftq_config eva_config corda_config lora_ga_config
    megatron_core runtime_config num_virtual_tokens token_dim num_layers num_attention_heads
    num_transformer_submodules prompt_tuning_init prompt_tuning_init_text tokenizer_name_or_path
    tokenizer_kwargs encoder_hidden_size r lora_alpha target_modules fan_in_fan_out bias use_rslora use_dora
    rank_pattern alpha_pattern feedforward_modules layers_pattern random_init
    encoder_reparameterization_type qalora_group_size modules_to_save ensure_weight_tying
""".split())


def from_peft(folder, base):
    """(method, options, tensors) of a folder in PEFT's layout; peft.load_state then checks that they are complete."""
    settings = read_json(Path(folder, "adapter_config.json"))
    file = Path(folder, "adapter_model.safetensors")
    if not file.is_file():
        file = Path(folder, "adapter_model.bin")
    check(file.is_file(), f"{folder}: neither adapter_model.safetensors nor adapter_model.bin is there")
    tensors = {name: t.float() for name, t in read_tensors(file)}
    with located(folder):
        for key, value in settings.items():
            harmless = key in KNOWN or value in (None, False, [], {}, "")
            check(harmless, f"{key} is {value!r}, which this code does not know")
        kind = settings.get("peft_type")
        if kind in ("PROMPT_TUNING", "PREFIX_TUNING"):
            return virtual_from_peft(kind, tensors, base)
        check(kind in ("LORA", "IA3"), f"peft_type is {kind!r}; LORA, IA3, PROMPT_TUNING and PREFIX_TUNING can be read")
        whole = take_whole(settings, tensors, base)
        if kind == "LORA":
            method, options, out = lora_from_peft(settings, tensors, base, whole)
        else:
            method, options, out = ia3_from_peft(tensors, base)
        names = {"norm" if peft.is_norm(name) else name.partition(".")[0] for name in whole}
        method = "+".join([*filter(None, [method]), *(name for name in peft.METHODS if name in names)])
        return method, options, out | whole


def take_whole(settings, tensors, base):
    """Takes what embed, head and norm train out of `tensors`: {our name: tensor}. The norms' biases alone are left: they
    are BitFit's."""
    whole = {}
    there = {theirs: ours for theirs, ours in whole_names(base).items() if theirs in tensors}
    for module in settings.get("modules_to_save") or ():
        found = any(theirs.rpartition(".")[0].endswith(module) for theirs in there)
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


def virtual_from_peft(kind, tensors, base):
    """(method, options, tensors) of a prompt or a prefix."""
    P = tensors.get("prompt_embeddings", torch.zeros(()))
    alone = len(tensors) == 1 and P.dim() == 2
    check(alone, f"must hold prompt_embeddings (n, width) alone, found {some(tensors)}")
    if kind == "PROMPT_TUNING":
        return "prompt", {"prompt_length": len(P)}, {"embed.P": P / prompt_scale(base)}
    check_prefix(base)
    keys_and_values = dict(zip(prefix_names(base), P.chunk(2 * base.config.n_layer, 1)))
    return "prefix", {"prefix_length": len(P), "prefix_style": "after"}, keys_and_values


def linear_tensors(tensors, base, suffixes):
    """Yields (module, i, suffix, tensor) of linear layers' tensors in PEFT's layout. Any other one is refused."""
    start, end = map(re.escape, peft_name(base, base.family.block(0)).split("0"))
    pattern = re.compile(rf"{start}(\d+){end}(.+)\.({suffixes})(?:\.weight)?")
    for name, t in tensors.items():
        match = pattern.fullmatch(name)
        there = match and int(match[1]) < base.config.n_layer and match[2] in linear_layers(base)
        check(there and t.dim(), f"{name} is no tensor of a {base.family.name} adapter with {base.config.n_layer} layers")
        yield match[2], match[1], match[3], t


def split_rows(base, tensor, layers, where):
    """A module's tensor -> {our layer: its rows}."""
    rows = list(layers.values())
    check(len(tensor) == sum(rows), f"{where} has {len(tensor)} rows; this base makes it {sum(rows)}")
    return dict(zip(layers, unstack(base.family, base.config, tensor, rows)))


def ia3_from_peft(tensors, base):
    """(method, options, tensors) of (IA)3, whose vectors must scale what they scale here and nothing else."""
    modules, out = scaled_layers(base), {}
    for module, i, _, l in linear_tensors(tensors, base, "ia3_l"):
        check(module in modules, f"(IA)3 on {module}; only {', '.join(sorted(modules))} can be read")
        layers, l = modules[module], l.flatten()
        vectors = {"ffn.down": l} if "ffn.down" in layers else split_rows(base, l, layers, f"{module} of layer {i}")
        for name, vector in vectors.items():
            if name in IA3_VECTORS:
                out[f"blocks.{i}.{name}.{IA3_VECTORS[name]}"] = vector
            else:
                ones = bool((vector == 1).all())
                check(ones, f"layer {i} scales the queries as well, which (IA)3 here does not")
    return "ia3", {}, out


def lora_from_peft(settings, tensors, base, whole):
    """(method, options, tensors) of LoRA, DoRA or BitFit. whole: what is trained beside them (take_whole).

    One rank and one scale are for all here: a smaller rank is filled up with zeros, another scale goes into B.
    """
    for key in ("r", "lora_alpha"):
        value = settings.get(key)
        check(isinstance(value, (int, float)) and value > 0, f"{key} is {value!r}; it must be a positive number")
    common = {"rank": settings["r"], "alpha": settings["lora_alpha"], "rslora": bool(settings.get("use_rslora"))}
    biases = take_biases(tensors, base)
    found = list(linear_tensors(tensors, base, "|".join(LORA_SUFFIXES)))
    rank = max((len(t) for _, _, suffix, t in found if suffix == "lora_A"), default=0)
    check(rank, "no LoRA in it")
    s, out = peft.scale_of(common | {"rank": rank}), {}
    for module, i, suffix, t in found:
        own = common | patterned(settings, module)
        where, padding = f"{module} of layer {i}", rank - own["rank"]
        layers = linear_layers(base)[module]
        if suffix == "lora_A":
            right = t.dim() == 2 and len(t) == own["rank"]
            check(right, f"{where} has rank {len(t)}; adapter_config.json says {own['rank']}")
            parts = dict.fromkeys(layers, F.pad(t, (0, 0, 0, padding)))
        else:
            parts = split_rows(base, t, layers, where)
        for name, part in parts.items():
            if suffix == "lora_B":
                part = F.pad(part * (peft.scale_of(own) / s), (0, padding))
            out[f"blocks.{i}.{name}.{LORA_SUFFIXES[suffix]}"] = part
    if (biases or whole) and not any(t.any() for name, t in out.items() if name.endswith(".B")):
        return "bitfit" if biases else "", {}, biases
    dora = settings.get("use_dora", False)
    magnitudes = sum(name.endswith(".m") for name in out)
    check(bool(dora) == bool(magnitudes), f"use_dora is {dora!r}, but {magnitudes} magnitude vectors are there")
    targets = ",".join(dict.fromkeys(name.split(".")[3] for name in out))
    options = {"rank": rank, "alpha": s * rank, "targets": targets, "dropout": float(settings.get("lora_dropout") or 0.0)}
    method = "dora" if dora else "lora"
    return f"bitfit+{method}" if biases else method, options, out | biases


def patterned(settings, module):
    """A module's own "rank" and "alpha", where rank_pattern and alpha_pattern name it."""
    own = {}
    for name in ("rank", "alpha"):
        for end, value in (settings.get(f"{name}_pattern") or {}).items():
            if re.fullmatch(rf"(.*\.)?{end}", module):
                own.setdefault(name, value)
    return own


def take_biases(tensors, base):
    """Takes the base's biases out of `tensors`: {our name: tensor}."""
    biases, shapes = {}, shapes_of(base.config)
    for name, ours in bias_names(base).items():
        for theirs in (name, name.removesuffix(".bias") + ".base_layer.bias"):
            if theirs in tensors:
                biases |= split_rows(base, tensors.pop(theirs), {n: shapes[n][0] for n in ours}, theirs)
    return biases


# -----------------------------------------------------------------------------
# adapters in AdapterHub's layout: adapter_config.json and pytorch_adapter.bin

HUB_STYLES = {
    "houlsby": {"mh_adapter": True, "original_ln_before": False, "ln_before": False},
    "pfeiffer": {"mh_adapter": False, "original_ln_before": True, "ln_before": False},
    "lin": {"mh_adapter": False, "original_ln_before": True, "ln_before": True}}
HUB_FIXED = {   # read, and refused where they are anything else
    "output_adapter": True, "is_parallel": False, "phm_layer": False, "ln_after": False, "scaling": 1.0,
    "use_gating": False, "inv_adapter": None}
HUB_DEFAULTS = {   # written because that library expects them; without effect beside those above
    "original_ln_after": True, "adapter_residual_before_ln": False, "residual_before_ln": True, "cross_adapter": False,
    "dropout": 0.0, "factorized_phm_W": True, "factorized_phm_rule": False, "init_weights": "bert", "learn_phm": True,
    "hypercomplex_nonlinearity": "glorot-uniform", "inv_adapter_reduction_factor": None, "leave_out": [],
    "phm_bias": True, "phm_c_init": "normal", "phm_dim": 4, "phm_init_range": 0.0001, "phm_rank": 1,
    "shared_W_phm": False, "shared_phm_rule": True, "stochastic_depth": 0.0}


def hub_names(base, style, name):
    """{their name: our name} of the tensors of an adapter called `name`."""
    family, names = base.family, {}
    adapters = {"attention_adapters": "adapter1", "output_adapters": "adapter2"}
    modules = {"adapter_down.0": "down", "adapter_up": "up"}
    if style != "houlsby":
        del adapters["attention_adapters"]
    if style == "lin":
        modules = {"adapter_down.1": "down", "adapter_up": "up", "adapter_down.0": "norm"}
    for i, adapter, kind in product(range(base.config.n_layer), adapters, ("weight", "bias")):
        for theirs, ours in modules.items():
            start = f"{family.block(i)}{adapter}.adapters.{name}"
            names[f"{start}.{theirs}.{kind}"] = f"blocks.{i}.{adapters[adapter]}.{ours}.{kind}"
    return names


def to_adapterhub(content, base, name):
    """(adapter_config, tensors) of an adapter (peft.read_adapter). ValueError for all but bottleneck adapters."""
    check(content["method"] == "adapter", f"{content['method']} has no place in AdapterHub's layout here; "
          "--layout peft takes lora, ia3, prompt, prefix and bitfit")
    options, family = content["options"], base.family
    style = options["adapter_style"]
    shape = {"reduction_factor": base.config.n_embd / options["adapter_size"], "non_linearity": options["adapter_activation"]}
    settings = {
        "name": name, "config": shape | HUB_STYLES[style] | HUB_FIXED | HUB_DEFAULTS, "config_id": "",
        "hidden_size": base.config.n_embd, "model_class": family.architecture, "model_type": family.name, "model_name": "",
        "version": "adapters.1.3.0"}
    names = hub_names(base, style, name)
    return settings, {theirs: content["tensors"][ours] for theirs, ours in names.items()}


def from_adapterhub(folder, base):
    """(method, options, tensors) of a folder in AdapterHub's layout; peft.load_state then checks that they are complete."""
    settings = read_json(Path(folder, "adapter_config.json"))
    tensors = {name: t.float() for name, t in read_tensors(Path(folder, "pytorch_adapter.bin"))}
    with located(folder):
        inner, name = settings.get("config"), settings.get("name")
        ours = isinstance(inner, dict) and isinstance(name, str)
        check(ours, "adapter_config.json has no name and config, so it is not AdapterHub's")
        flags = {key: bool(inner.get(key)) for key in HUB_STYLES["lin"]}
        style = next((style for style, needed in HUB_STYLES.items() if needed == flags), None)
        check(style, f"{flags} is not known; only Houlsby's, Pfeiffer's and Lin's adapters can be read")
        for key, wanted in HUB_FIXED.items():
            value = inner.get(key, wanted)
            check(value == wanted, f"{key} is {value!r}; only {wanted!r} can be read")
        out = {}
        for theirs, ours in hub_names(base, style, name).items():
            check(theirs in tensors, f"lacks {theirs}")
            out[ours] = tensors.pop(theirs)
            twin = theirs.replace("adapter_down.0", "adapter_norm_before")      # the library's second name of Lin's LayerNorm
            if twin in tensors and torch.equal(out[ours], tensors[twin]):
                del tensors[twin]
        check(not tensors, f"{len(tensors)} tensors are not known: {some(tensors)}")
    size = len(out["blocks.0.adapter2.down.weight"])
    activation = str(inner.get("non_linearity"))
    return "adapter", {"adapter_style": style, "adapter_size": size, "adapter_activation": activation}, out


# -----------------------------------------------------------------------------
# what a new run starts from

OF_THE_RUN = ("base", "quant", "quant_block", "quant_double", "quant_skip", "add_tokens")    # what it takes over


def read_start(path, base):
    """
    (Config or None, adapter's content) of what a new run can start from: a run's folder, an adapter's file, or a folder in
    PEFT's or AdapterHub's layout, for `base`. Only a run has a Config; a foreign layout's content names no base.
    """
    folder = Path(path)
    check(folder.exists(), f"{path}: nothing is there to start from")
    config = None
    if folder.is_file():
        content = peft.read_adapter(path)
    elif (folder / "config.toml").is_file():
        config, content = read_run(folder)
        check(config.base != "new", f"{path}: trained a model from nothing, which is a base now: --base {path}")
    else:
        is_model = (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file()
        check(not is_model, f"{path}: a whole model and no adapter; a new run starts from it by --base {path}")
        check(base, f"{path}: an adapter alone; --base DIR must name the model that it is for")
        method, options, tensors = read_layout(path, base)
        content = {"method": method, "options": options, "base": None, "tensors": tensors}
    methods = peft.method_names(content["method"])
    options = {}
    for method in methods:
        defaults = peft.options_of(peft.METHODS[method])
        options |= {name: value for name, value in defaults.items() if value is not None}
    return config, content | {"method": "+".join(methods), "options": options | content["options"]}


def adopted(config):
    """
    (configuration, adapter's content or None) where init_from names an adapter: its methods and their options
    are the new run's, and a run's base and storage too where no others are given.
    """
    if not config.init_from or config.resume:
        return config, None
    path, given = config.init_from, config.given
    for name in ("add_tokens", "prompt_init"):
        check(not getattr(config, name), f"{name} is for a new adapter; this run starts from {path}")
    before, content = read_start(path, config.base)
    method = method_of(config, before, content)
    options = {name: convert(name, value, path) for name, value in content["options"].items()}
    for name in sorted(given & METHOD_OPTIONS.keys()):
        ours, theirs = getattr(config, name), options.get(name, "no option of its method")
        check(ours == theirs, f"{path}: {name} is {theirs!r} there and cannot become {ours!r}")
    taken = {}
    for name in OF_THE_RUN if before else ():
        if name not in given and getattr(config, name) == FIELDS[name].default:
            taken[name] = getattr(before, name)
    config = dataclasses.replace(config, method=method, **options | taken)
    check(config.base, f"{path}: an adapter alone; --base DIR must name the model that it was made for")
    rows = rows_of(content["tensors"].get(peft.TABLE))
    known = rows <= read_origin(config.base).config.vocab_size or config.add_tokens
    check(known, f"{path}: has {rows} rows for tokens, more than its base; start from its run's folder, which holds their tokenizer")
    return config, content


def method_of(config, before, content):
    """The run's method: as it is given, else as in the run before, else as in the adapter, which must be the same."""
    def plain(method):
        return set(method.replace("qlora", "lora").split("+"))   # A quantized base changes nothing in the adapter.

    theirs = before.method if before else content["method"]
    check(plain(theirs) == plain(content["method"]), f"{config.init_from}: config.toml says {theirs}, adapter.pt {content['method']}")
    if not config.given & {"method", "train_also"}:
        return theirs
    same = plain(config.method) == plain(theirs)
    check(same, f"{config.init_from}: method is {theirs!r} there and cannot become {config.method!r}")
    return config.method


# -----------------------------------------------------------------------------
# doors


def read_run(run):
    """(Config, adapter's content) of a run's folder."""
    check(Path(run, "config.toml").is_file(), f"{run}: no run there, it has no config.toml")
    return read_run_config(run), peft.read_adapter(Path(run, "adapter.pt"))


def unused(path):
    """The path of a folder that is empty or not there yet; ValueError where something would be written over."""
    check(not any(Path(path).glob("*")), f"{path}: holds something already; choose another folder")    # fault 40
    return Path(path)


def write_run(config, content):
    """Writes an adapter's content as the run that config says, for sample.py and evaluate.py."""
    folder = Path(config.out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    data.Tokenizer.load(config.base).save(folder)
    save_file(folder / "adapter.pt", content)
    write_atomic(folder / "config.toml", write_toml(config).encode())


def export(run, path, layout="peft", name="nanopeft"):
    """A run's adapter as a folder in the layout "peft" or "adapterhub". Nothing that is there is written over."""
    config, content = read_run(run)
    base, path = read_origin(config.base), unused(path)
    check(layout in ("peft", "adapterhub"), f"layout is {layout!r}; it must be peft or adapterhub")
    check(base.family.adapters, f"export of adapters is not for {base.family.name} bases")
    if layout == "peft":
        settings, tensors = to_peft(content, base)
        settings["base_model_name_or_path"] = str(Path(config.base).resolve())
        path.mkdir(parents=True, exist_ok=True)
        entries = {name: (t.dtype, t.shape, lambda t=t: t) for name, t in tensors.items()}
        write_safetensors(path / "adapter_model.safetensors", entries)
    else:
        settings, tensors = to_adapterhub(content, base, name)
        path.mkdir(parents=True, exist_ok=True)
        write_atomic(path / "pytorch_adapter.bin", torch_bytes({name: t.clone() for name, t in tensors.items()}))
    write_json(path / "adapter_config.json", settings)
    if config.add_tokens:
        data.Tokenizer.load(run).save(path)
    return settings


def read_layout(path, base):
    """(method, options, tensors) of a folder in PEFT's or AdapterHub's layout, for the base in a folder."""
    file = Path(path, "adapter_config.json")
    check(file.is_file(), f"{path}: in no known layout, it has no adapter_config.json; found {found_in(path)}")
    read = from_peft if "peft_type" in read_json(file) else from_adapterhub
    return read(path, read_origin(base))


def import_adapter(path, base, out):
    """A folder in PEFT's or AdapterHub's layout -> a run's folder `out` over `base`; returns the model."""
    out = unused(out)
    method, options, tensors = read_layout(path, base)
    model = load_base(base)
    peft.apply(model, method, **options)
    peft.load_state(model, tensors, path)
    write_run(Config(method=method, base=str(base), out_dir=str(out), **options), peft.pack_adapter(model))
    return model


def add_runs(folders, out, weights=None):
    """The LoRA adapters of runs over one base, times their weights and added, as the run `out`; returns its Config.

    weights: a number for each run, None for 1. The configuration is the first run's, with the rank and scale of the sum.
    """
    weights = weights or [1.0] * len(folders)
    check(len(weights) == len(folders), f"{len(weights)} weights for {len(folders)} runs; give one for each")
    configs, contents = zip(*map(read_run, folders))
    content = peft.add_adapters(contents, weights)
    options = {name: content["options"][name] for name in ("rank", "alpha", "rslora")}
    config = dataclasses.replace(configs[0], out_dir=str(unused(out)), **options)
    write_run(config, content)
    return config


def merge_run(run, path, requantize=False):
    """Base and adapter as one plain checkpoint with its tokenizer, in the run's computation type; returns peft.merge's report.

    requantize: the merged weights are first stored as the base was stored, and the report says what that does to the logits.
    """
    path = unused(path)
    model, tokenizer, config = runs.load_run(run, "cpu", "auto")
    possible = not requantize or runs.storage_of(config)
    check(possible, f"{run}: its base is not quantized; merge it without --requantize")
    report = peft.merge(model, requantize)
    # A model that was trained whole is written as it was trained.
    save_base(model, path, {"vocab_size": model.config.vocab_size}, None if "full" in peft.methods(model) else model.dtype)
    tokenizer.save(path)
    generation = Path(config.base, "generation_config.json")     # which holds the base's ends
    if generation.is_file():
        write_json(path / generation.name, read_json(generation))
    for folder in (config.base, run):                            # The run's own chat template holds.
        template = Path(folder, "chat_template.jinja")
        if template.is_file():
            write_atomic(path / template.name, read_bytes(template))
    return report


def show(run):
    """What is in an adapter, as lines: what it is, and each layer's change with its norm and effective rank."""
    path = Path(run, "adapter.pt") if Path(run).is_dir() else Path(run)
    content = peft.read_adapter(path)
    tensors, options = content["tensors"], content["options"]
    yield (f"{path}: {content['method']}, format {content['format']}, {content['parameters']:,} parameters "
           f"in {len(tensors)} tensors, base {content['base'][:12]}")
    yield "options: " + (", ".join(f"{name} {value}" for name, value in options.items()) or "none")
    for name, t in tensors.items():
        layer, _, leaf = name.rpartition(".")
        lora = {f"{layer}.A", f"{layer}.B"} <= tensors.keys()
        if lora and leaf == "B":
            values = singular_values(tensors[f"{layer}.A"], t) * peft.scale_of(options)
            rank = f"effective rank {effective_rank(values):5.2f} of {len(values)}"
            yield f"{layer:24} |s B A| {values.norm():9.4f}   {rank}"
        elif not (lora and leaf == "A"):
            yield f"{name:40} {str(tuple(t.shape)):16} norm {t.norm():9.4f}"


def singular_values(A, B):
    """Those of B A that may differ from zero, (r,), largest first."""
    core = torch.linalg.qr(B).R @ torch.linalg.qr(A.T).R.T    # (r, r): B A = Q core P^T, Q and P orthogonal
    return torch.linalg.svdvals(core)


def effective_rank(values):
    """The exponential of the entropy of normalized singular values (Roy and Vetterli 2007)."""
    p = values / values.sum().clamp(min=1e-30)
    entropy = (-p * p.clamp(min=1e-30).log()).sum()
    return float(entropy.exp())


def main(args):
    """Runs the command; ValueError where a folder does not hold what it should."""
    if args.command == "show":
        print(*show(args.run), sep="\n")
    elif args.command == "export":
        settings = export(args.run, args.folder, args.layout, args.name)
        print(f"{args.folder}: {settings.get('peft_type', 'bottleneck adapters')} in {args.layout}'s layout")
        if read_run_config(args.run).add_tokens:
            rows = rows_of(peft.read_adapter(Path(args.run, "adapter.pt"))["tensors"][peft.TABLE])
            print(f"Its tables have rows for added tokens: call model.resize_token_embeddings({rows}) before "
                  "PeftModel.from_pretrained; the tokenizer that knows them is in the folder, too.")
    elif args.command == "import":
        counts = peft.count_parameters(import_adapter(args.folder, args.base, args.run))
        print(f"{args.run}: {' and '.join(counts['by_method'])}, {counts['trainable']:,} parameters; {next_line(args.run)}")
    elif args.command == "add":
        config = add_runs(args.runs, args.run, args.weights)
        print(f"{args.run}: the sum of {len(args.runs)} adapters, rank {config.rank}; {next_line(args.run)}")
    else:
        report = merge_run(args.run, args.folder, args.requantize)
        print(f"{args.folder}: {report['layers']} layers merged; a plain checkpoint with its tokenizer")
        if args.requantize:
            print("On average the adapter changes a logit by {adapter:.4g}; merged and quantized again it changes it by {kept:.4g}, "
                  "which is {error:.4g} away from what the adapter makes of it.".format(**report))


def next_line(run):
    """The command that tries a run, as a shell takes it."""
    return f"python sample.py {shlex.quote(run)} --prompt ..."


if __name__ == "__main__":
    run_main(main, ARGS)
