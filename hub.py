"""
The door for adapters: out to PEFT's and AdapterHub's layouts and in from there, looked at, added, merged.

    python hub.py show out/qlora                             # what is in an adapter
    python hub.py export out/qlora DIR --layout peft         # or adapterhub; loads with PeftModel.from_pretrained
    python hub.py import DIR out/x --base DIR                # the same layouts in, as a run for sample.py and evaluate.py
    python hub.py add out/x out/y out/z --weights 1 0.5      # LoRA adapters of one base added up, as the run out/z
    python hub.py merge out/qlora DIR                        # base and adapter as one plain checkpoint, with its tokenizer
    python hub.py merge out/qlora DIR --requantize           # in the base's storage, and what that does to the logits

Nothing that is there already is written over.
"""

import argparse
import sys

from lib.config import Config, read_toml, run_main, write_toml


def parse(args):
    """The command line: a command and its folders."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    show, export, import_, add, merge = map(commands.add_parser, ("show", "export", "import", "add", "merge"))
    add.add_argument("runs", nargs="+", help="runs whose adapters are LoRA's alone; the first one's configuration is kept")
    for command, folders in ((show, ["run"]), (export, ["run", "folder"]), (import_, ["folder", "run"]), (add, ["run"]), (merge, ["run", "folder"])):
        for folder in folders:
            command.add_argument(folder)
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
import math
import re
import shlex
from pathlib import Path

import torch
import torch.nn.functional as F

import data
import peft
from lib import run as runs
from lib.checkpoint import FAMILIES, family_of, layout, load_base, read_config, save_base
from lib.files import (check, found_in, located, read_json, read_tensors, save_file, some, torch_bytes, write_atomic,
                       write_json, write_safetensors)
from model import GPT

# -----------------------------------------------------------------------------
# adapters in PEFT's layout: adapter_config.json and adapter_model.safetensors, which holds for each module of the base
#
#   LoRA      MODULE.lora_A.weight (r, in) and MODULE.lora_B.weight (out, r), where h = W x + s B A x and s = lora_alpha / r.
#             GPT-2's c_attn holds W_q, W_k and W_v one on top of the other. LoRAs of q and v alone are there one LoRA of the
#             ranks' sum, which has the same s if lora_alpha grows as the rank does:
#
#                 A = | A_q |      B = | B_q   0  |
#                     | A_v |          |  0    0  |
#                                      |  0   B_v |
#
#   DoRA      and MODULE.lora_magnitude_vector (out,): of c_attn m_q, m_k and m_v, one after the other
#   (IA)3     MODULE.ia3_l (out, 1) where it scales the result, of c_attn ones, l_k and l_v; (1, in) where it scales the input
#   BitFit    MODULE.bias of every module (MODULE.base_layer.bias where a LoRA is), beside a LoRA, which may be of zeros
#   prompt    prompt_embeddings (n, n_embd)
#   prefix    prompt_embeddings (n, 2 L kv), viewed as (n, 2 L, heads, head_dim): keys of layer l at 2 l, values at 2 l + 1

LORA_SUFFIXES = {"lora_A": "A", "lora_B": "B", "lora_magnitude_vector": "m"}
IA3_VECTORS = {"attn.k": "l_k", "attn.v": "l_v", "ffn.down": "l_ff"}      # layer of a block -> the vector that scales it


@functools.cache
def linear_layers(config):
    """{their module of a block: {our layer: rows of its weight}}, top to bottom, of the linear layers."""
    with torch.device("meta"):
        block = GPT(dataclasses.replace(config, n_layer=1)).blocks[0]
    return {module: {name: block.get_submodule(name).out_features for name in layers}
            for module, layers in family_of(config).linears().items()}


def scaled_layers(config):
    """linear_layers, but only those that (IA)3 scales."""
    return {module: layers for module, layers in linear_layers(config).items() if layers.keys() & IA3_VECTORS}


def prefix_names(config):
    """Our names of a prefix's keys and values, in the order of PEFT's layout."""
    return [f"blocks.{i}.attn.prefix.{name}" for i in range(config.n_layer) for name in ("s_k", "s_v")]


def bias_names(config):
    """{PEFT's name: our names} of every bias of the base."""
    return {f"base_model.model.{theirs}": ours for theirs, (ours, _) in layout(config).items() if theirs.endswith(".bias")}


def scale_of(options):
    """s of LoRA's options."""
    return options["alpha"] / (math.sqrt(options["rank"]) if options["rslora"] else options["rank"])


def to_peft(content, config):
    """(adapter_config, tensors) of an adapter (peft.read_adapter). ValueError for what PEFT has no place for."""
    method, options, tensors = content["method"], content["options"], content["tensors"]
    methods = set(method.split("+"))
    if method == "prompt":
        said, out = virtual_to_peft("PROMPT_TUNING", tensors["embed.P"], config)
    elif method == "prefix":
        check(options["prefix_style"] == "after", "a prefix before the projection has no place in PEFT's layout, which stores "
              "keys and values; train with --prefix_style after")
        keys_and_values = torch.cat([tensors[name] for name in prefix_names(config)], 1)
        said, out = virtual_to_peft("PREFIX_TUNING", keys_and_values, config)
        said |= {"prefix_projection": False, "encoder_hidden_size": config.n_embd}
    elif method == "ia3":
        said, out = ia3_to_peft(tensors, config)
    elif methods - {"bitfit"} in ({"lora"}, {"dora"}, set()):
        said, out = lora_to_peft(methods, options, tensors, config)
    else:
        hint = "".join(hint for other, hint in ELSEWHERE.items() if other in methods)
        raise ValueError(f"{method} has no place in PEFT's layout{hint}")
    return {"task_type": "CAUSAL_LM", "inference_mode": True} | said, out


ELSEWHERE = {"adapter": "; bottleneck adapters go to --layout adapterhub",
             "full": "; a tuned base is written by python hub.py merge",
             "top": "; a tuned base is written by python hub.py merge"}


def virtual_to_peft(kind, embeddings, config):
    """(adapter_config, tensors) of virtual tokens: a prompt's or a prefix's."""
    said = {"peft_type": kind, "num_virtual_tokens": len(embeddings), "token_dim": config.n_embd, "num_layers": config.n_layer,
            "num_transformer_submodules": 1, "num_attention_heads": config.n_head}
    return said, {"prompt_embeddings": embeddings}


def ia3_to_peft(tensors, config):
    """(adapter_config, tensors) of (IA)3; what it does not scale, but PEFT's module holds, gets ones."""
    modules, family, out = scaled_layers(config), family_of(config), {}
    feedforward = [module for module, layers in modules.items() if "ffn.down" in layers]
    for i in range(config.n_layer):
        for module, layers in modules.items():
            vectors = [tensors.get(f"blocks.{i}.{name}.{IA3_VECTORS.get(name)}", torch.ones(n)) for name, n in layers.items()]
            dim = 0 if module in feedforward else 1
            out[f"base_model.model.{family.block(i)}{module}.ia3_l"] = torch.cat(vectors).unsqueeze(dim)
    return {"peft_type": "IA3", "target_modules": sorted(modules), "feedforward_modules": feedforward,
            "fan_in_fan_out": family.transposed}, out


def lora_to_peft(methods, options, tensors, config):
    """(adapter_config, tensors) of LoRA or DoRA, of BitFit, or of both."""
    if methods == {"bitfit"}:      # PEFT trains biases beside a LoRA, which is here one of zeros on the queries
        options = {"rank": 1, "alpha": 1.0, "rslora": False}
        zeros = {"A": torch.zeros(1, config.n_embd), "B": torch.zeros(config.n_head * config.d_head, 1)}
        tensors = tensors | {f"blocks.{i}.attn.q.{half}": t for i in range(config.n_layer) for half, t in zeros.items()}
    family, ranks, out = family_of(config), {}, {}
    for module, layers in linear_layers(config).items():
        for i in range(config.n_layer):
            stacked = stack_lora(tensors, f"blocks.{i}", layers)
            out |= {f"base_model.model.{family.block(i)}{module}.{name}": t for name, t in stacked.items()}
            if stacked:
                ranks[module] = len(stacked["lora_A.weight"])
    if "bitfit" in methods:
        wrapped = tuple(f".{module}.bias" for module in ranks)
        for name, ours in bias_names(config).items():
            within = ".base_layer.bias" if name.endswith(wrapped) else ".bias"
            out[name.removesuffix(".bias") + within] = torch.cat([tensors[n] for n in ours])
    s, r = scale_of(options), max(ranks.values())
    others = {module: rank for module, rank in ranks.items() if rank != r}
    return {"peft_type": "LORA", "r": r, "lora_alpha": s * r, "target_modules": sorted(ranks),
            "lora_dropout": options.get("dropout", 0.0), "bias": "all" if "bitfit" in methods else "none",
            "fan_in_fan_out": family.transposed, "use_rslora": False, "use_dora": "dora" in methods, "modules_to_save": None,
            "rank_pattern": others, "alpha_pattern": {module: s * rank for module, rank in others.items()}}, out


def stack_lora(tensors, block, layers):
    """{name in PEFT's layout: tensor} of the one LoRA that does what those of a module's layers do; {} where none has one."""
    wrapped = [name for name in layers if f"{block}.{name}.A" in tensors]
    magnitudes = [tensors[f"{block}.{name}.m"] for name in wrapped if f"{block}.{name}.m" in tensors]
    if not wrapped:
        return {}
    halves = [tensors.get(f"{block}.{name}.B", torch.zeros(rows, 0)) for name, rows in layers.items()]
    stacked = {"lora_A.weight": torch.cat([tensors[f"{block}.{name}.A"] for name in wrapped]),
               "lora_B.weight": torch.block_diag(*halves)}
    if magnitudes:
        names = [name.rpartition(".")[2] for name in layers]
        check(len(wrapped) == len(layers), f"DoRA on {len(wrapped)} of the layers {', '.join(names)} has no place in PEFT's "
              f"layout, where these are one module of this base; train with --targets containing {','.join(names)}")
        stacked["lora_magnitude_vector"] = torch.cat(magnitudes)
    return stacked


# what an adapter_config.json may say without changing what is computed, or what is read below; anything else that is set is refused
KNOWN = set("""peft_type task_type base_model_name_or_path inference_mode auto_mapping revision peft_version lora_dropout init_lora_weights init_ia3_weights loftq_config
    eva_config corda_config lora_ga_config megatron_core runtime_config num_virtual_tokens token_dim num_layers num_attention_heads num_transformer_submodules
    prompt_tuning_init prompt_tuning_init_text tokenizer_name_or_path tokenizer_kwargs encoder_hidden_size r lora_alpha target_modules fan_in_fan_out bias use_rslora
    use_dora rank_pattern alpha_pattern feedforward_modules layers_pattern random_init encoder_reparameterization_type qalora_group_size""".split())


def from_peft(folder, config):
    """(method, options, tensors) of a folder in PEFT's layout. peft.load_state tells whether the tensors are complete."""
    said = read_json(Path(folder, "adapter_config.json"))
    file = Path(folder, "adapter_model.safetensors")
    if not file.is_file():
        file = Path(folder, "adapter_model.bin")
    check(file.is_file(), f"{folder}: neither adapter_model.safetensors nor adapter_model.bin is there")
    tensors = {name: t.float() for name, t in read_tensors(file)}
    with located(folder):
        for key, value in said.items():
            check(key in KNOWN or value in (None, False, [], {}, ""), f"{key} is {value!r}, which this code does not know")
        kind = said.get("peft_type")
        if kind == "LORA":
            return lora_from_peft(said, tensors, config)
        if kind == "IA3":
            return ia3_from_peft(tensors, config)
        check(kind in ("PROMPT_TUNING", "PREFIX_TUNING"),
              f"peft_type is {kind!r}; LORA, IA3, PROMPT_TUNING and PREFIX_TUNING can be read")
        P = tensors.get("prompt_embeddings")
        check(len(tensors) == 1 and P is not None and P.dim() == 2, f"must hold prompt_embeddings (n, width) alone, found {some(tensors)}")
        if kind == "PROMPT_TUNING":
            return "prompt", {"prompt_length": len(P)}, {"embed.P": P}
        keys_and_values = P.chunk(2 * config.n_layer, 1)
        return "prefix", {"prefix_length": len(P), "prefix_style": "after"}, dict(zip(prefix_names(config), keys_and_values))


def linear_tensors(tensors, config, suffixes):
    """Yields (module, i, suffix, tensor) of linear layers' tensors in PEFT's layout. Any other one is refused."""
    start, end = map(re.escape, family_of(config).block(0).split("0"))
    pattern = re.compile(rf"base_model\.model\.{start}(\d+){end}(.+)\.({suffixes})(?:\.weight)?")
    for name, t in tensors.items():
        match = pattern.fullmatch(name)
        known = match and int(match[1]) < config.n_layer and match[2] in linear_layers(config) and t.dim()
        check(known, f"{name} is no tensor of a {family_of(config).name} adapter with {config.n_layer} layers")
        yield match[2], match[1], match[3], t


def split_rows(tensor, layers, where):
    """A module's tensor -> {our layer: its rows}."""
    rows = list(layers.values())
    check(len(tensor) == sum(rows), f"{where} has shape {tuple(tensor.shape)}; this base makes it {sum(rows)} rows")
    return dict(zip(layers, tensor.split(rows)))


def ia3_from_peft(tensors, config):
    """(method, options, tensors) of (IA)3, whose vectors must scale what they scale here and nothing else."""
    modules, out = scaled_layers(config), {}
    for module, i, _, l in linear_tensors(tensors, config, "ia3_l"):
        check(module in modules, f"(IA)3 on {module}; only {', '.join(sorted(modules))} can be read")
        layers, l = modules[module], l.flatten()
        vectors = {"ffn.down": l} if "ffn.down" in layers else split_rows(l, layers, f"{module} of layer {i}")
        for name, vector in vectors.items():
            if name in IA3_VECTORS:
                out[f"blocks.{i}.{name}.{IA3_VECTORS[name]}"] = vector
            else:
                check(bool((vector == 1).all()), f"layer {i} scales the queries as well, which (IA)3 here does not")
    return "ia3", {}, out


def lora_from_peft(said, tensors, config):
    """(method, options, tensors) of LoRA, DoRA or BitFit.

    One rank and one scale are for all here: a smaller rank is filled up with zeros, another scale goes into B.
    """
    for key in ("r", "lora_alpha"):
        number = isinstance(said.get(key), (int, float)) and said[key] > 0
        check(number, f"{key} is {said.get(key)!r}; it must be a positive number")
    biases = take_biases(tensors, config)
    found = list(linear_tensors(tensors, config, "|".join(LORA_SUFFIXES)))
    rank = max((len(t) for _, _, suffix, t in found if suffix == "lora_A"), default=0)
    check(rank, "no LoRA in it")
    common = {"rank": said["r"], "alpha": said["lora_alpha"], "rslora": bool(said.get("use_rslora"))}
    s, out = scale_of(common | {"rank": rank}), {}
    for module, i, suffix, t in found:
        own, where = common | said_by_patterns(said, module), f"{module} of layer {i}"
        layers, padding = linear_layers(config)[module], rank - own["rank"]
        if suffix == "lora_A":
            check(t.dim() == 2 and len(t) == own["rank"], f"{where} has rank {len(t)}; adapter_config.json says {own['rank']}")
            parts = dict.fromkeys(layers, F.pad(t, (0, 0, 0, padding)))
        else:
            parts = split_rows(t, layers, where)
        for name, part in parts.items():
            if suffix == "lora_B":
                part = F.pad(part * (scale_of(own) / s), (0, padding))
            out[f"blocks.{i}.{name}.{LORA_SUFFIXES[suffix]}"] = part
    if biases and not any(t.any() for name, t in out.items() if name.endswith(".B")):
        return "bitfit", {}, biases
    method = "dora" if said.get("use_dora") else "lora"
    targets = dict.fromkeys(name.split(".")[3] for name in out)
    options = {"rank": rank, "alpha": s * rank, "targets": ",".join(targets), "dropout": float(said.get("lora_dropout") or 0.0)}
    return f"bitfit+{method}" if biases else method, options, out | biases


def said_by_patterns(said, module):
    """A module's own "rank" and "alpha" where rank_pattern and alpha_pattern name it."""
    own = {}
    for name in ("rank", "alpha"):
        for end, value in (said.get(f"{name}_pattern") or {}).items():
            if re.fullmatch(rf"(.*\.)?{end}", module):
                own.setdefault(name, value)
    return own


def take_biases(tensors, config):
    """Takes the base's biases out of `tensors`: {our name: tensor}."""
    biases = {}
    for name, ours in bias_names(config).items():
        for theirs in (name, name.replace(".bias", ".base_layer.bias")):
            if theirs in tensors:
                biases |= zip(ours, tensors.pop(theirs).chunk(len(ours)))
    return biases


# -----------------------------------------------------------------------------
# adapters in AdapterHub's layout: adapter_config.json and pytorch_adapter.bin

HUB_STYLES = {
    "houlsby": {"mh_adapter": True, "original_ln_before": False, "ln_before": False},
    "pfeiffer": {"mh_adapter": False, "original_ln_before": True, "ln_before": False},
    "lin": {"mh_adapter": False, "original_ln_before": True, "ln_before": True}}
HUB_FIXED = {   # read, but never anything else
    "output_adapter": True, "is_parallel": False, "phm_layer": False, "ln_after": False, "scaling": 1.0, "use_gating": False,
    "inv_adapter": None}
HUB_DEFAULTS = {   # written, but not read: without effect beside those above
    "original_ln_after": True, "adapter_residual_before_ln": False, "residual_before_ln": True, "cross_adapter": False,
    "dropout": 0.0, "factorized_phm_W": True, "factorized_phm_rule": False, "hypercomplex_nonlinearity": "glorot-uniform",
    "init_weights": "bert", "inv_adapter_reduction_factor": None, "learn_phm": True, "leave_out": [], "phm_bias": True,
    "phm_c_init": "normal", "phm_dim": 4, "phm_init_range": 0.0001, "phm_rank": 1, "shared_W_phm": False,
    "shared_phm_rule": True, "stochastic_depth": 0.0}


def hub_names(config, style, name):
    """{their name: our name} of the tensors of an adapter called `name`."""
    places = {"attention_adapters": "adapter1", "output_adapters": "adapter2"}
    modules = {"adapter_down.0": "down", "adapter_up": "up"}
    if style != "houlsby":
        del places["attention_adapters"]
    if style == "lin":
        modules = {"adapter_down.1": "down", "adapter_up": "up", "adapter_down.0": "norm"}
    return {f"{family_of(config).block(i)}{place}.adapters.{name}.{theirs}.{kind}": f"blocks.{i}.{adapter}.{ours}.{kind}"
            for i in range(config.n_layer) for place, adapter in places.items()
            for kind in ("weight", "bias") for theirs, ours in modules.items()}


def to_adapterhub(content, config, name):
    """(adapter_config, tensors) of an adapter (peft.read_adapter). ValueError for all but bottleneck adapters."""
    check(content["method"] == "adapter", f"{content['method']} has no place in AdapterHub's layout here; "
          "--layout peft takes lora, ia3, prompt, prefix and bitfit")
    options, family = content["options"], family_of(config)
    style = options["adapter_style"]
    inner = {"reduction_factor": config.n_embd / options["adapter_size"], "non_linearity": options["adapter_activation"]}
    said = {"name": name, "config": inner | HUB_STYLES[style] | HUB_FIXED | HUB_DEFAULTS, "config_id": "", "hidden_size": config.n_embd,
            "model_class": family.architecture, "model_type": family.name, "model_name": "", "version": "adapters.1.3.0"}
    return said, {theirs: content["tensors"][ours] for theirs, ours in hub_names(config, style, name).items()}


def from_adapterhub(folder, config):
    """(method, options, tensors) of a folder in AdapterHub's layout."""
    said = read_json(Path(folder, "adapter_config.json"))
    tensors = {n: t.float() for n, t in read_tensors(Path(folder, "pytorch_adapter.bin"))}
    with located(folder):
        inner, name = said.get("config"), said.get("name")
        check(isinstance(inner, dict) and isinstance(name, str), "adapter_config.json has no name and config, so it is not AdapterHub's")
        flags = {key: bool(inner.get(key)) for key in HUB_STYLES["lin"]}
        style = next((style for style, needed in HUB_STYLES.items() if needed == flags), None)
        check(style, f"{flags} is not known; only Houlsby's, Pfeiffer's and Lin's adapters can be read")
        for key, wanted in HUB_FIXED.items():
            check(inner.get(key, wanted) == wanted, f"{key} is {inner.get(key)!r}; only {wanted!r} can be read")
        activation = inner.get("non_linearity")
        activations = list(peft.Adapter.ACTIVATIONS)
        check(activation in activations, f"non_linearity is {activation!r}; it must be one of {', '.join(activations)}")
        for twin in [n for n in tensors if ".adapter_norm_before." in n]:      # that library writes Lin's LayerNorm under two names
            original = twin.replace("adapter_norm_before", "adapter_down.0")
            if original in tensors and torch.equal(tensors[twin], tensors[original]):
                del tensors[twin]
        names = hub_names(config, style, name)
        missing, extra = names.keys() - tensors.keys(), tensors.keys() - names.keys()
        check(not missing and not extra, f"missing {some(missing) or 'nothing'}, not known {some(extra) or 'nothing'}")
    out = {names[n]: t for n, t in tensors.items()}
    size = len(out["blocks.0.adapter2.down.weight"])
    return "adapter", {"adapter_style": style, "adapter_size": size, "adapter_activation": activation}, out


# -----------------------------------------------------------------------------
# doors


def read_run(run):
    """(Config, adapter's content) of a run's folder."""
    path = Path(run, "config.toml")
    check(path.is_file(), f"{run}: no run there, it has no config.toml")
    return Config(**read_toml(path)), peft.read_adapter(Path(run, "adapter.pt"))


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
    base, path = read_config(config.base), unused(path)
    families = [family.name for family in FAMILIES.values() if family.adapters]
    check(layout in ("peft", "adapterhub"), f"layout is {layout!r}; it must be peft or adapterhub")
    check(family_of(base).adapters, f"export of adapters is for {' and '.join(families)} bases, not {family_of(base).name}")
    said, tensors = to_peft(content, base) if layout == "peft" else to_adapterhub(content, base, name)
    path.mkdir(parents=True, exist_ok=True)
    if layout == "peft":
        said["base_model_name_or_path"] = str(Path(config.base).resolve())
        entries = {n: (t.dtype, t.shape, lambda t=t: t) for n, t in tensors.items()}
        write_safetensors(path / "adapter_model.safetensors", entries)
    else:
        write_atomic(path / "pytorch_adapter.bin", torch_bytes({n: t.clone() for n, t in tensors.items()}))
    write_json(path / "adapter_config.json", said)
    return said


def import_adapter(path, base, out):
    """A folder in PEFT's or AdapterHub's layout -> a run's folder `out` over `base`, for sample.py, evaluate.py and load_adapter."""
    path, out, said = Path(path), unused(out), Path(path, "adapter_config.json")
    check(said.is_file(), f"{path}: in no known layout, it has no adapter_config.json; found {found_in(path)}")
    read = from_peft if "peft_type" in read_json(said) else from_adapterhub
    method, options, tensors = read(path, read_config(base))
    model = load_base(base)
    peft.apply(model, method, **options)
    peft.load_state(model, tensors, path)
    write_run(Config(method=method, base=str(base), out_dir=str(out), **options), peft.pack_adapter(model))
    return model


def add_runs(folders, out, weights=None):
    """The LoRA adapters of runs over one base, times weights (default 1) and added, as the run `out`; returns its Config."""
    weights = weights or [1.0] * len(folders)
    check(len(weights) == len(folders), f"{len(weights)} weights for {len(folders)} runs; give one for each")
    configs, contents = zip(*map(read_run, folders))
    content = peft.add_adapters(contents, weights)
    options = {name: content["options"][name] for name in ("rank", "alpha", "rslora")}
    config = dataclasses.replace(configs[0], out_dir=str(unused(out)), **options)
    write_run(config, content)
    return config


def merge_run(run, path, requantize=False):
    """Base and adapter as one plain checkpoint with its tokenizer, in the run's computation type. Returns peft.merge's report."""
    path = unused(path)
    model, tokenizer, config = runs.load_run(run, "cpu", "auto")
    check(not requantize or runs.storage_of(config), f"{run}: its base is not quantized; merge it without --requantize")
    report = peft.merge(model, requantize)
    base = read_json(Path(config.base, "config.json"))
    save_base(model, path, {key: value for key, value in base.items() if key.endswith("_token_id")})
    tokenizer.save(path)
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
            values = singular_values(tensors[f"{layer}.A"], t) * scale_of(options)
            yield f"{layer:24} |s B A| {values.norm():9.4f}   effective rank {effective_rank(values):5.2f} of {len(values)}"
        elif not (lora and leaf == "A"):
            yield f"{name:40} {str(tuple(t.shape)):16} norm {t.norm():9.4f}"


def singular_values(A, B):
    """Those of B A that may differ from zero, (r,), largest first."""
    small = torch.linalg.qr(B).R @ torch.linalg.qr(A.T).R.T      # (r, r), and B A is this between two orthogonal matrices
    return torch.linalg.svdvals(small)


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
        said = export(args.run, args.folder, args.layout, args.name)
        print(f"{args.folder}: {said.get('peft_type', 'bottleneck adapters')} in {args.layout}'s layout")
    elif args.command == "import":
        counts = peft.count_parameters(import_adapter(args.folder, args.base, args.run))
        methods = " and ".join(counts["by_method"])
        print(f"{args.run}: {methods}, {counts['trainable']:,} parameters; python sample.py {shlex.quote(args.run)} --prompt ...")
    elif args.command == "add":
        config = add_runs(args.runs, args.run, args.weights)
        print(f"{args.run}: {len(args.runs)} adapters added, rank {config.rank}; python sample.py {shlex.quote(args.run)} --prompt ...")
    else:
        report = merge_run(args.run, args.folder, args.requantize)
        print(f"{args.folder}: {report['layers']} layers merged; a plain checkpoint with its tokenizer")
        if args.requantize:
            print(f"The adapter changes a logit by {report['adapter']:.4f} on average; merged and quantized again it changes it by "
                  f"{report['kept']:.4f}, and that is {report['error']:.4f} away from what the adapter alone makes of it.")


if __name__ == "__main__":
    run_main(main, ARGS)
