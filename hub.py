"""
The door to Hugging Face's world: checkpoints in and out, adapters in PEFT's and AdapterHub's layout in and out.

    python hub.py show out/qlora                             # what is in an adapter
    python hub.py export out/qlora DIR --layout peft         # or adapterhub; loads with PeftModel.from_pretrained
    python hub.py import DIR out/x --base DIR                # the same layouts in, as a run for sample.py and evaluate.py
    python hub.py merge out/qlora DIR                        # base and adapter as one plain checkpoint, with its tokenizer

A base is read strictly: every tensor is used and every parameter is set, or it is refused with the names. The safetensors
format is a length, a JSON header and bytes; it is read here by hand, so that a tensor is in memory once and not mapped
as well, and its sizes are checked before anything is allocated.
"""

import argparse
import io
import json
import math
import re
import sys
from pathlib import Path

import torch

import peft
import data
from lib import run as runs
from lib.checkpoint import PREFIX, family_of, layout, load_base, long_name, read_config, save_base
from lib.config import Config, read_toml, run_main, write_toml
from lib.files import check, read_json, read_tensors, some, write_atomic, write_safetensors

# -----------------------------------------------------------------------------
# configurations: the key in config.json for each of our fields, and what must hold of the other keys


# -----------------------------------------------------------------------------
# names: their tensor -> our tensors. Several of ours lie in one of theirs side by side; GPT-2's Conv1D keeps weights as (in, out)


# -----------------------------------------------------------------------------
# files of tensors


#   safetensors:  8 bytes: N, little-endian  |  N bytes of JSON {name: {dtype, shape, data_offsets [begin, end)}}  |  data


# -----------------------------------------------------------------------------
# bases


# -----------------------------------------------------------------------------
# adapters in PEFT's layout: adapter_config.json and adapter_model.safetensors
#
#   LoRA    h = W x + s B A x of several of our layers that lie in one of theirs (GPT-2's c_attn): A stacked, B in blocks, zero rows
#           for a layer without; the rank is then the sum, and alpha grows with it
#   (IA)3   GPT-2's c_attn scales [ones; l_k; l_v]
#   prefix  (n, 2 L kv) viewed as (n, 2 L, heads, head_dim): keys of layer l at 2 l, values at 2 l + 1

ALWAYS = {"task_type": "CAUSAL_LM", "inference_mode": True}


def their_linears(config):
    """{their module name: our module names} of the linear layers of block 0, without "h.0." or "layers.0."."""
    start = "h.0." if family_of(config) == "gpt2" else "layers.0."
    return {name.removeprefix(start).removesuffix(".weight"): [n.removeprefix("blocks.0.").removesuffix(".weight") for n in ours]
            for name, (ours, _) in layout(config).items() if name.startswith(start) and name.endswith("weight") and len(ours[0].split(".")) == 5}


def in_peft(config, i, name):
    """blocks' layer i, module or tensor name as PEFT writes it."""
    return f"base_model.model.{PREFIX[family_of(config)]}{'h' if family_of(config) == 'gpt2' else 'layers'}.{i}.{name}"


def to_peft(content, config):
    """(adapter_config, tensors) of an adapter (peft.read_adapter). ValueError for what PEFT has no place for."""
    methods, options, t = set(content["method"].replace("qlora", "lora").split("+")), content["options"], content["tensors"]
    if family_of(config) == "opt":
        raise ValueError("export of adapters is for gpt2 and llama bases, not opt")
    layers, gpt2 = range(config.n_layer), family_of(config) == "gpt2"
    if methods == {"prompt"}:
        return virtual_config("PROMPT_TUNING", len(t["embed.P"]), config), {"prompt_embeddings": t["embed.P"]}
    if methods == {"prefix"}:
        if options["prefix_style"] != "after":
            raise ValueError("a prefix before the projection has no place in PEFT's layout, which stores keys and values; train with --prefix_style after")
        rows = [t[f"blocks.{i}.attn.prefix.{s}"] for i in layers for s in ("s_k", "s_v")]
        return virtual_config("PREFIX_TUNING", options["prefix_length"], config) | {"prefix_projection": False, "encoder_hidden_size": config.n_embd}, {"prompt_embeddings": torch.cat(rows, 1)}
    if methods == {"ia3"}:
        return ia3_to_peft(t, config, layers, gpt2)
    if methods in ({"lora"}, {"bitfit"}, {"lora", "bitfit"}):
        return lora_to_peft(methods, options, t, config, layers, gpt2)
    reason = {"adapter": "bottleneck adapters go to --layout adapterhub", "full": "a tuned base is written by python hub.py merge", "top": "a tuned base is written by python hub.py merge"}
    raise ValueError(f"{content['method']} has no place in PEFT's layout" + "".join(f"; {why}" for method, why in reason.items() if method in methods))


def virtual_config(kind, n, config):
    """adapter_config.json of n virtual tokens: a prompt's or a prefix's."""
    return ALWAYS | {"peft_type": kind, "num_virtual_tokens": n, "token_dim": config.n_embd, "num_layers": config.n_layer, "num_transformer_submodules": 1,
                     "num_attention_heads": config.kv_heads if kind == "PREFIX_TUNING" and config.kv_heads == config.n_head else config.n_head}


def ia3_to_peft(t, config, layers, gpt2):
    """(tensors, configuration) of (IA)3; GPT-2's fused c_attn gets ones for the queries."""
    c_attn = "attn.c_attn" if gpt2 else None
    names = {"k": c_attn or "self_attn.k_proj", "v": c_attn or "self_attn.v_proj", "down": "mlp.c_proj" if gpt2 else "mlp.down_proj"}
    tensors = {}
    for i in layers:
        l_k, l_v, l_ff = (t[f"blocks.{i}.{n}"] for n in ("attn.k.l_k", "attn.v.l_v", "ffn.down.l_ff"))
        if gpt2:
            tensors[in_peft(config, i, c_attn) + ".ia3_l"] = torch.cat((torch.ones(config.n_embd), l_k, l_v))[:, None]
        else:
            tensors |= {in_peft(config, i, names[n]) + ".ia3_l": l[:, None] for n, l in (("k", l_k), ("v", l_v))}
        tensors[in_peft(config, i, names["down"]) + ".ia3_l"] = l_ff[None]
    return ALWAYS | {"peft_type": "IA3", "target_modules": sorted(set(names.values())), "feedforward_modules": [names["down"]], "fan_in_fan_out": gpt2}, tensors


def lora_to_peft(methods, options, t, config, layers, gpt2):
    """(tensors, configuration) of LoRA, BitFit or both; what is apart here and fused there becomes one LoRA of the ranks' sum."""
    tensors, ranks, sizes = {}, {}, {}
    s = peft.scale_of(options) if "lora" in methods else 1.0
    linears = their_linears(config)
    for theirs, ours in linears.items():
        present = [n for n in ours if f"blocks.0.{n}.A" in t]
        for i in layers if present else ():
            A = torch.cat([t[f"blocks.{i}.{n}.A"] for n in present])
            out = {n: len(t[f"blocks.{i}.{present[0]}.B"]) for n in ours}      # GPT-2's q, k and v are of one size; elsewhere there is one
            B = torch.block_diag(*(t[f"blocks.{i}.{n}.B"] if n in present else torch.zeros(out[n], 0) for n in ours))
            name = in_peft(config, i, theirs)
            tensors |= {f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B}
            ranks[theirs] = len(A)
    if not ranks:                                                # BitFit: PEFT trains biases beside a LoRA, here one of zeros
        theirs, ours = next((theirs, ours) for theirs, ours in linears.items())
        for i in layers:
            name = in_peft(config, i, theirs)
            tensors |= {f"{name}.lora_A.weight": torch.zeros(1, config.n_embd), f"{name}.lora_B.weight": torch.zeros(3 * config.n_embd, 1)}
        ranks[theirs] = 1
    r = max(ranks.values())
    if "bitfit" in methods:
        for theirs, (ours, _) in layout(config).items():
            if theirs.endswith(".bias"):
                module = theirs.removesuffix(".bias")
                wrapped = any(module.endswith("." + target) for target in ranks)
                tensors[f"base_model.model.{long_name(module, config)}{'.base_layer' if wrapped else ''}.bias"] = torch.cat([t[n] for n in ours])
    differ = {name: n for name, n in ranks.items() if n != r}
    return ALWAYS | {"peft_type": "LORA", "r": r, "lora_alpha": s * r, "target_modules": sorted(ranks), "lora_dropout": options.get("dropout", 0.0),
                     "bias": "all" if "bitfit" in methods else "none", "fan_in_fan_out": gpt2, "use_rslora": False, "use_dora": False, "modules_to_save": None,
                     "rank_pattern": differ, "alpha_pattern": {name: s * n for name, n in differ.items()}}, tensors


# what an adapter_config.json may say without changing what is computed; anything else that is set is refused
KNOWN = set("""peft_type task_type base_model_name_or_path inference_mode auto_mapping revision peft_version lora_dropout init_lora_weights init_ia3_weights loftq_config
    eva_config corda_config lora_ga_config megatron_core runtime_config num_virtual_tokens token_dim num_layers num_attention_heads num_transformer_submodules
    prompt_tuning_init prompt_tuning_init_text tokenizer_name_or_path tokenizer_kwargs encoder_hidden_size r lora_alpha target_modules fan_in_fan_out bias use_rslora
    rank_pattern alpha_pattern feedforward_modules layers_pattern random_init encoder_reparameterization_type qalora_group_size""".split())


def from_peft(folder, config):
    """(method, options, tensors) of a folder in PEFT's layout."""
    said = read_json(Path(folder, "adapter_config.json"))
    files = [Path(folder, name) for name in ("adapter_model.safetensors", "adapter_model.bin")]
    file = next((f for f in files if f.is_file()), None)
    if file is None:
        raise ValueError(f"{folder}: neither adapter_model.safetensors nor adapter_model.bin is there")
    strange = [key for key, value in said.items() if key not in KNOWN and value not in (None, False, [], {}, "")]
    if strange:
        raise ValueError(f"{folder}/adapter_config.json: {strange[0]} is {said[strange[0]]!r}, which this code does not know")
    tensors = {name: t.float() for name, t in read_tensors(file)}
    kind, gpt2 = said.get("peft_type"), family_of(config) == "gpt2"
    if kind in ("PROMPT_TUNING", "PREFIX_TUNING"):
        check(tensors.keys() == {"prompt_embeddings"} and tensors["prompt_embeddings"].dim() == 2, f"{file}: must hold prompt_embeddings (n, width) alone, found {some(tensors)}")
        P = tensors["prompt_embeddings"]
        width = config.n_embd if kind == "PROMPT_TUNING" else 2 * config.n_layer * config.kv_heads * config.d_head
        check(P.size(1) == width, f"{file}: prompt_embeddings has shape {tuple(P.shape)}; this base makes it (n, {width})")
        if kind == "PROMPT_TUNING":
            return "prompt", {"prompt_length": len(P)}, {"embed.P": P}
        names = [f"blocks.{i}.attn.prefix.{s}" for i in range(config.n_layer) for s in ("s_k", "s_v")]
        return "prefix", {"prefix_length": len(P), "prefix_style": "after"}, dict(zip(names, P.chunk(2 * config.n_layer, 1)))
    check(kind in ("LORA", "IA3"), f"{folder}/adapter_config.json: peft_type is {kind!r}; LORA, IA3, PROMPT_TUNING and PREFIX_TUNING can be read")
    modules = {}
    start = in_peft(config, 0, "").split("0.")[0]
    for name, t in tensors.items():
        match = re.fullmatch(re.escape(start) + r"(\d+)\.(.+)\.(lora_A|lora_B|ia3_l)(?:\.weight)?", name)
        if match and int(match[1]) < config.n_layer and match[2] in their_linears(config):
            modules.setdefault(match[2], {}).setdefault(int(match[1]), {})[match[3]] = t
        elif not (name.endswith(".bias") and said.get("bias") in ("all", "lora_only")):
            raise ValueError(f"{file}: {name} is no tensor of a {family_of(config)} adapter with {config.n_layer} layers")
    for module, found in modules.items():
        wanted = {"lora_A", "lora_B"} if kind == "LORA" else {"ia3_l"}
        check(len(found) == config.n_layer and all(part.keys() == wanted for part in found.values()), f"{file}: {module} is not complete in all {config.n_layer} layers")
    return ia3_from_peft(modules, config, file, gpt2) if kind == "IA3" else lora_from_peft(said, modules, tensors, config, file)


def ia3_from_peft(modules, config, file, gpt2):
    """(IA)3's vectors under our names, from {module: {layer: {suffix: tensor}}}."""
    k, v, down = ("attn.c_attn", "attn.c_attn", "mlp.c_proj") if gpt2 else ("self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj")
    check(modules.keys() == {k, v, down}, f"{file}: (IA)3 on {', '.join(sorted(modules))}; only {', '.join(sorted({k, v, down}))} can be read")
    tensors = {}
    for i in range(config.n_layer):
        l = {name: modules[name][i]["ia3_l"].flatten() for name in (k, v, down)}
        if gpt2:
            one, l_k, l_v = l[k].chunk(3)
            check(bool((one == 1).all()), f"{file}: layer {i} scales the queries as well, which (IA)3 here does not")
        else:
            l_k, l_v = l[k], l[v]
        tensors |= {f"blocks.{i}.attn.k.l_k": l_k, f"blocks.{i}.attn.v.l_v": l_v, f"blocks.{i}.ffn.down.l_ff": l[down]}
    return "ia3", {}, {name: t.contiguous() for name, t in tensors.items()}


def lora_from_peft(said, modules, tensors, config, file):
    """One rank and scale for all: a smaller rank is filled up with zeros, another scale goes into B."""
    check(modules, f"{file}: no LoRA in it")
    for key in ("r", "lora_alpha"):
        check(isinstance(said.get(key), (int, float)) and said[key] > 0, f"{file.parent}/adapter_config.json: {key} is {said.get(key)!r}; it must be a positive number")
    linears, out = their_linears(config), {}
    rank = max(len(found[0]["lora_A"]) for found in modules.values())
    s = said["lora_alpha"] / (math.sqrt(rank) if said.get("use_rslora") else rank)
    pattern = lambda key, module, default: next((n for end, n in (said.get(key) or {}).items() if re.fullmatch(rf"(.*\.)?{end}", module)), default)
    for module, found in modules.items():
        r, alpha = pattern("rank_pattern", module, said["r"]), pattern("alpha_pattern", module, said["lora_alpha"])
        ratio = alpha / (math.sqrt(r) if said.get("use_rslora") else r) / s
        for i, part in found.items():
            A, B = part["lora_A"], part["lora_B"]
            check(len(A) == r == B.size(-1), f"{file}: {module} of layer {i} has rank {len(A)} and {B.size(-1)}; adapter_config.json says {r}")
            check(B.size(0) % len(linears[module]) == 0, f"{file}: {module} of layer {i} has {B.size(0)} rows")
            for ours, rows in zip(linears[module], B.chunk(len(linears[module]))):
                out[f"blocks.{i}.{ours}.A"] = torch.cat((A, A.new_zeros(rank - r, A.size(1))))
                out[f"blocks.{i}.{ours}.B"] = torch.cat((rows * ratio, rows.new_zeros(len(rows), rank - r)), 1)
    targets = ",".join(dict.fromkeys(name.split(".")[3] for name in out))
    options = {"rank": rank, "alpha": s * rank, "targets": targets, "dropout": float(said.get("lora_dropout", 0.0))}
    biases = {name: t for name, t in tensors.items() if name.endswith(".bias")}
    if not biases:
        return "lora", options, out
    for theirs, (ours, _) in layout(config).items():
        if theirs.endswith(".bias"):
            module = f"base_model.model.{long_name(theirs.removesuffix('.bias'), config)}"
            t = biases.pop(f"{module}.bias", biases.pop(f"{module}.base_layer.bias", None))
            check(t is not None and t.dim() == 1 and len(t) % len(ours) == 0, f"{file}: the bias of {theirs.removesuffix('.bias')} is missing; only bias \"all\" can be read")
            out |= dict(zip(ours, t.chunk(len(ours))))
    check(not biases, f"{file}: {len(biases)} biases that this base does not have: {some(biases)}")
    if all(not t.any() for name, t in out.items() if name.endswith(".B")):
        return "bitfit", {}, {name: t for name, t in out.items() if name.endswith(".bias")}
    return "bitfit+lora", options, out


# -----------------------------------------------------------------------------
# adapters in AdapterHub's layout: adapter_config.json and pytorch_adapter.bin

HUB_STYLES = {   # our style: mh_adapter, original_ln_before, ln_before
    "houlsby": (True, False, False), "pfeiffer": (False, True, False), "lin": (False, True, True)}


def hub_names(config, style, name):
    """{their key: our key}"""
    names, start = {}, f"{PREFIX[family_of(config)]}{'h' if family_of(config) == 'gpt2' else 'layers'}"
    for i in range(config.n_layer):
        for place, ours in (("attention_adapters", "adapter1"), ("output_adapters", "adapter2")) if style == "houlsby" else (("output_adapters", "adapter2"),):
            for kind in ("weight", "bias"):
                theirs, our = f"{start}.{i}.{place}.adapters.{name}.", f"blocks.{i}.{ours}."
                names |= {f"{theirs}adapter_down.{int(style == 'lin')}.{kind}": f"{our}down.{kind}", f"{theirs}adapter_up.{kind}": f"{our}up.{kind}"}
                if style == "lin":
                    names[f"{theirs}adapter_down.0.{kind}"] = f"{our}norm.{kind}"
    return names


def to_adapterhub(content, config, name):
    """(adapter_config, tensors)"""
    if content["method"] != "adapter":
        raise ValueError(f"{content['method']} has no place in AdapterHub's layout here; --layout peft takes lora, ia3, prompt, prefix and bitfit")
    if family_of(config) == "opt":
        raise ValueError("export of adapters is for gpt2 and llama bases, not opt")
    options = content["options"]
    mh, original, before = HUB_STYLES[options["adapter_style"]]
    model = {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM"}[family_of(config)]
    inner = {"mh_adapter": mh, "output_adapter": True, "reduction_factor": config.n_embd / options["adapter_size"], "non_linearity": options["adapter_activation"],
             "original_ln_before": original, "original_ln_after": True, "ln_before": before, "ln_after": False, "is_parallel": False, "scaling": 1.0,
             "adapter_residual_before_ln": False, "residual_before_ln": True, "cross_adapter": False, "dropout": 0.0, "factorized_phm_W": True, "factorized_phm_rule": False,
             "hypercomplex_nonlinearity": "glorot-uniform", "init_weights": "bert", "inv_adapter": None, "inv_adapter_reduction_factor": None, "learn_phm": True, "leave_out": [],
             "phm_bias": True, "phm_c_init": "normal", "phm_dim": 4, "phm_init_range": 0.0001, "phm_layer": False, "phm_rank": 1, "shared_W_phm": False, "shared_phm_rule": True,
             "stochastic_depth": 0.0, "use_gating": False}
    said = {"name": name, "config": inner, "config_id": "", "hidden_size": config.n_embd, "model_class": model, "model_type": family_of(config), "model_name": "", "version": "adapters.1.3.0"}
    return said, {theirs: content["tensors"][ours] for theirs, ours in hub_names(config, options["adapter_style"], name).items()}


def from_adapterhub(folder, config):
    """(method, options, tensors) of a folder in AdapterHub's layout."""
    said = read_json(Path(folder, "adapter_config.json"))
    inner, name = said.get("config"), said.get("name")
    check(isinstance(inner, dict) and isinstance(name, str), f"{folder}/adapter_config.json: has no name and config, so it is not AdapterHub's")
    found = (bool(inner.get("mh_adapter")), bool(inner.get("original_ln_before")), bool(inner.get("ln_before")))
    style = next((style for style, values in HUB_STYLES.items() if values == found), None)
    check(style, f"{folder}: mh_adapter, original_ln_before, ln_before are {found}; only Houlsby's, Pfeiffer's and Lin's adapters can be read")
    for key, wanted in (("output_adapter", True), ("is_parallel", False), ("phm_layer", False), ("ln_after", False), ("scaling", 1.0), ("use_gating", False), ("inv_adapter", None)):
        check(inner.get(key, wanted) == wanted, f"{folder}: {key} is {inner.get(key)!r}; only {wanted!r} can be read")
    activation = inner.get("non_linearity")
    check(activation in peft.Adapter.ACTIVATIONS, f"{folder}: non_linearity is {activation!r}; it must be one of {', '.join(peft.Adapter.ACTIVATIONS)}")
    tensors = {n: t.float() for n, t in read_tensors(Path(folder, "pytorch_adapter.bin"))}
    names = hub_names(config, style, name)
    for twin in [n for n in tensors if ".adapter_norm_before." in n]:      # that library writes Lin's LayerNorm under two names
        if torch.equal(tensors[twin], tensors.get(twin.replace("adapter_norm_before", "adapter_down.0"), torch.zeros(0))):
            del tensors[twin]
    check(tensors.keys() == names.keys(), f"{folder}: missing {some(names.keys() - tensors.keys()) or 'nothing'}, not known {some(tensors.keys() - names.keys()) or 'nothing'}")
    out = {names[n]: t for n, t in tensors.items()}
    return "adapter", {"adapter_style": style, "adapter_size": len(out["blocks.0.adapter2.down.weight"]), "adapter_activation": activation}, out


# -----------------------------------------------------------------------------
# doors


def read_run(run):
    """(Config, adapter, GPTConfig of the base) of a run's folder."""
    if not Path(run, "config.toml").is_file():
        raise ValueError(f"{run}: no run there, it has no config.toml")
    config = Config(**read_toml(Path(run, "config.toml")))
    return config, peft.read_adapter(Path(run, "adapter.pt")), read_config(config.base)


def export(run, path, layout="peft", name="nanopeft"):
    """A run's adapter as a folder in the layout "peft" or "adapterhub". Nothing that is there is written over."""
    config, content, base = read_run(run)
    if layout not in ("peft", "adapterhub"):
        raise ValueError(f"layout is {layout!r}; it must be peft or adapterhub")
    said, tensors = to_peft(content, base) if layout == "peft" else to_adapterhub(content, base, name)
    path = Path(path)
    if path.is_dir() and any(path.iterdir()):
        raise ValueError(f"{path}: holds something already; choose another folder")
    path.mkdir(parents=True, exist_ok=True)
    if layout == "peft":
        said["base_model_name_or_path"] = str(Path(config.base).resolve())
        write_safetensors(path / "adapter_model.safetensors", {n: (torch.float32, tuple(t.shape), lambda t=t: t) for n, t in tensors.items()})
    else:
        buffer = io.BytesIO()
        torch.save({n: t.clone() for n, t in tensors.items()}, buffer)
        write_atomic(path / "pytorch_adapter.bin", buffer.getvalue())
    write_atomic(path / "adapter_config.json", (json.dumps(said, indent=2) + "\n").encode())
    return said


def import_adapter(path, base, out):
    """A folder in PEFT's or AdapterHub's layout -> a run's folder `out` over `base`, for sample.py, evaluate.py and load_adapter."""
    if not Path(path, "adapter_config.json").is_file():
        there = sorted(p.name for p in Path(path).iterdir())[:6] if Path(path).is_dir() else []
        raise ValueError(f"{path}: in no known layout, it has no adapter_config.json" + (f"; found {', '.join(there)}" if there else ""))
    if Path(out, "config.toml").is_file():
        raise ValueError(f"{out}: holds a run already; choose another folder")
    config = read_config(base)
    method, options, tensors = (from_adapterhub if "peft_type" not in read_json(Path(path, "adapter_config.json")) else from_peft)(path, config)
    model = load_base(base)
    peft.apply(model, method, **options)
    peft.load_state(model, {n: t.contiguous() for n, t in tensors.items()}, path)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    data.Tokenizer.load(base).save(out)
    peft.save_adapter(model, out / "adapter.pt")
    run = Config(method=method, base=str(base), out_dir=str(out), **{k: v for k, v in options.items()})
    write_atomic(out / "config.toml", write_toml(run).encode())
    return model


def merge_run(run, path):
    """Base and adapter as one plain checkpoint with its tokenizer, in the run's computation type."""
    if Path(path).is_dir() and any(Path(path).iterdir()):
        raise ValueError(f"{path}: holds something already; choose another folder")
    model, tokenizer, config = runs.load_run(run, "cpu", "auto")
    report = peft.merge(model)
    base = read_json(Path(config.base, "config.json"))
    save_base(model, path, {k: v for k, v in base.items() if k.endswith("_token_id")})
    tokenizer.save(path)
    return report


def show(run):
    """What is in an adapter, as lines: what it is, and each layer's change with its norm and effective rank.

    The effective rank of s B A is the exponential of the entropy of its normalized singular values (Roy and Vetterli 2007).
    """
    path = Path(run, "adapter.pt") if Path(run).is_dir() else Path(run)
    content = peft.read_adapter(path)
    t, options = content["tensors"], content["options"]
    yield f"{path}: {content['method']}, format {content['format']}, {content['parameters']:,} parameters in {len(t)} tensors, base {content['base'][:12]}"
    yield "options: " + (", ".join(f"{k} {v}" for k, v in options.items()) or "none")
    for name in t:
        if name.endswith(".B") and name[:-1] + "A" in t:
            values = torch.linalg.svdvals(torch.linalg.qr(t[name]).R @ torch.linalg.qr(t[name[:-1] + "A"].T).R.T) * peft.scale_of(options)
            p = values / values.sum().clamp(min=1e-30)
            yield f"{name[:-2]:24} |s B A| {values.norm():9.4f}   effective rank {float((-p * p.clamp(min=1e-30).log()).sum().exp()):5.2f} of {len(values)}"
        elif not (name.endswith(".A") and name[:-1] + "B" in t):
            yield f"{name:40} {str(tuple(t[name].shape)):16} norm {t[name].norm():9.4f}"


def main(args):
    """Runs the command; ValueError where a folder does not hold what it should."""
    if args.command == "show":
        print(*show(args.run), sep="\n")
    elif args.command == "export":
        said = export(args.run, args.folder, args.layout, args.name)
        print(f"{args.folder}: {said.get('peft_type', 'bottleneck adapters')} in {args.layout}'s layout")
    elif args.command == "import":
        counts = peft.count_parameters(import_adapter(args.folder, args.base, args.run))
        print(f"{args.run}: {' and '.join(counts['by_method'])}, {counts['trainable']:,} parameters; python sample.py {args.run} --prompt ...")
    else:
        report = merge_run(args.run, args.folder)
        print(f"{args.folder}: {report['layers']} layers merged; a plain checkpoint with its tokenizer")


def parse(args):
    """The command line: a command and its folders."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, arguments in (("show", ["run"]), ("export", ["run", "folder"]), ("import", ["folder", "run"]), ("merge", ["run", "folder"])):
        command = commands.add_parser(name)
        for argument in arguments:
            command.add_argument(argument)
        if name == "export":
            command.add_argument("--layout", default="peft", choices=("peft", "adapterhub"))
            command.add_argument("--name", default="nanopeft", help="of the adapter, in AdapterHub's layout")
        if name == "import":
            command.add_argument("--base", required=True)
    return parser.parse_args(args)


if __name__ == "__main__":
    ARGS = parse(sys.argv[1:])
    run_main(main, ARGS)
