"""
PEFT's layout of adapters, and out to it. lib/peft_import.py reads it.

    settings, tensors = to_peft(content, base)       # of peft.read_adapter's content, over a lib.origin.Origin

The layout is a folder with adapter_config.json, the settings, and adapter_model.safetensors, which holds

  LoRA      MODULE.lora_A.weight (r, in), MODULE.lora_B.weight (out, r); h = W x + s B A x, s = lora_alpha/r
            GPT-2's c_attn holds W_q, W_k and W_v one on top of the other. LoRAs of q and v are there one
            LoRA of the ranks' sum:

                A = | A_q |      B = | B_q   0  |
                    | A_v |          |  0    0  |
                                     |  0   B_v |

  DoRA      and MODULE.lora_magnitude_vector (out,): of c_attn m_q, m_k and m_v, one after the other
  VeRA      MODULE.vera_lambda_d (r,), MODULE.vera_lambda_b (out,); once base_model.vera_A and base_model.vera_B
  (IA)3     MODULE.ia3_l: (out, 1) for a module's result, of c_attn ones, l_k and l_v; (1, in) for its input
  BitFit    MODULE.bias, or MODULE.base_layer.bias where a LoRA is, beside a LoRA, which may be of zeros
  embed, head, norm     MODULE.weight and .bias beside LoRA or (IA)3, MODULE in modules_to_save; of a
            tied head and its embedding both are there, and equal; of GPT-NeoX's head both names, embed_out and lm_head
  prompt    prompt_embeddings (n, n_embd)
  prefix    prompt_embeddings (n, 2 L kv), viewed as (n, 2 L, heads, head_dim): the keys of layer l at 2 l,
            its values at 2 l + 1

where MODULE is base_model.model. and a module's name in the base's checkpoint.

All LoRAs of a file have one rank, the smaller ones filled up with zeros. PEFT has patterns for other ranks, but
llama.cpp takes the global lora_alpha over the tensor's own rank, and vLLM over the global one.
"""

import functools

import torch
import torch.nn.functional as F

import peft
from lib.checkpoint import layout, linear_modules, shapes_of, stack
from lib.files import check

LORA_SUFFIXES = {"lora_A": "A", "lora_B": "B", "lora_magnitude_vector": "m"}
VERA_SUFFIXES = {"vera_lambda_d": "d", "vera_lambda_b": "b"}
VERA_SHARED = ("base_model.vera_A", "base_model.vera_B")
IA3_VECTORS = {"attn.k": "l_k", "attn.v": "l_v", "ffn.down": "l_ff"}      # layer -> the vector that scales it
WHOLE = {"embed", "head", "norm"}      # methods that train modules whole, which PEFT calls modules_to_save
ELSEWHERE = {"adapter": "; bottleneck adapters go to --layout adapterhub",
             "full": "; a tuned base is written by python hub.py merge",
             "top": "; a tuned base is written by python hub.py merge"}

# -----------------------------------------------------------------------------
# names


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


def module_name(base, i, module):
    """The name in PEFT's layout of a module of block i."""
    return peft_name(base, f"{base.family.block(i)}{module}")


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


def whole_names(base):
    """{PEFT's name: our name} of the tensors that embed, head and norm train."""
    names = {}
    for theirs, (ours, _) in layout(base.family, shapes_of(base.config)).items():
        if ours[0] in (peft.TABLE, "head.weight") or peft.is_norm(ours[0]):
            names[peft_name(base, theirs)] = ours[0]
    ours = peft.TABLE if base.config.tied else "head.weight"
    return names | dict.fromkeys(head_names(base), ours)


def head_names(base):
    """PEFT's names of the head's weight: the family's, and lm_head, as transformers 5 calls the module in every family."""
    modules = dict.fromkeys([base.family.head, "lm_head"])
    return [peft_name(base, f"{module}.weight") for module in modules]


def prompt_scale(base):
    """What a prompt's vectors are multiplied by where they enter the model here and do not in PEFT: there they
    stand behind the module of the embedding, which scales its own."""
    return base.config.embed_scale if base.family.scaled_embedding else 1.0


def check_prefix(base):
    """ValueError where a prefix is another function in PEFT than here."""
    window = max(base.config.windows, default=0)
    check(not window, f"a prefix over layers with a window (here of {window} tokens) has no place in PEFT's layout: there it "
          "falls out of the window, here every token sees it")


def check_single(module, layers):
    """ValueError where VeRA is another function in PEFT than here, because a module holds several of our layers."""
    check(len(layers) == 1, f"VeRA over {module} has no place in PEFT's layout: there it holds {', '.join(layers)} in one "
          "module with one d and rows of B of their own, here each has both")


# -----------------------------------------------------------------------------
# out


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
    elif others == {"vera"}:
        settings, out = vera_to_peft(options, tensors, base)
    elif others - {"bitfit"} in ({"lora"}, {"dora"}, set()):
        settings, out = lora_to_peft(others, options, tensors, base)
    else:
        hint = "".join(hint for other, hint in ELSEWHERE.items() if other in methods)
        raise ValueError(f"{method} has no place in PEFT's layout{hint}")
    if methods & WHOLE:
        more, whole = whole_to_peft(methods, settings["peft_type"], tensors, base)
        settings, out = settings | more, out | whole
    return {"task_type": "CAUSAL_LM", "inference_mode": True} | settings, out


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
        settings["ensure_weight_tying"] = base.config.tied and peft.TABLE in tensors
    return settings, whole


def virtual_to_peft(kind, embeddings, base):
    """(adapter_config, tensors) of virtual tokens: a prompt's or a prefix's."""
    config = base.config
    settings = {"peft_type": kind, "num_virtual_tokens": len(embeddings), "num_transformer_submodules": 1,
                "token_dim": config.n_embd, "num_layers": config.n_layer, "num_attention_heads": config.n_head}
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
            out[f"{module_name(base, i, module)}.ia3_l"] = stack(family, base.config, vectors).unsqueeze(dim)
    settings = {"peft_type": "IA3", "target_modules": sorted(modules), "feedforward_modules": feedforward,
                "fan_in_fan_out": family.transposed}
    return settings, out


def vera_to_peft(options, tensors, base):
    """(adapter_config, tensors) of VeRA, with the shared projections."""
    targets, out = [], {}
    for module, layers in linear_layers(base).items():
        name, *others = layers
        if any(f"blocks.0.{layer}.d" in tensors for layer in layers):
            check_single(module, layers)
            targets.append(module)
            for i in range(base.config.n_layer):
                start = module_name(base, i, module)
                for theirs, ours in VERA_SUFFIXES.items():
                    out[f"{start}.{theirs}"] = tensors[f"blocks.{i}.{name}.{ours}"]
    shared = peft.shared_projections(options["rank"], shapes_of_targets(base, targets))
    settings = {"peft_type": "VERA", "r": options["rank"], "target_modules": sorted(targets), "bias": "none",
                "projection_prng_key": 0, "save_projection": True, "vera_dropout": options.get("dropout", 0.0),
                "fan_in_fan_out": base.family.transposed}
    return settings, dict(zip(VERA_SHARED, shared)) | out


def shapes_of_targets(base, modules):
    """[(out, in)] of the layers that modules of a block hold."""
    shapes = shapes_of(base.config)
    return [shapes[f"blocks.0.{name}.weight"] for module in modules for name in linear_layers(base)[module]]


def lora_to_peft(methods, options, tensors, base):
    """(adapter_config, tensors) of LoRA or DoRA, of BitFit, of both, or of neither."""
    config = base.config
    if methods <= {"bitfit"}:      # PEFT trains the base beside a LoRA, which is here one of zeros on the queries
        options = {"rank": 1, "alpha": 1.0, "rslora": False}
        A = torch.zeros(1, config.n_embd)
        B = torch.zeros(config.n_head * config.d_head, 1)
        for i in range(config.n_layer):
            tensors = tensors | {f"blocks.{i}.attn.q.A": A, f"blocks.{i}.attn.q.B": B}
    stacked = {}                                 # module's name -> {name in PEFT's layout: tensor}
    for module, layers in linear_layers(base).items():
        for i in range(config.n_layer):
            found = stack_lora(base, tensors, f"blocks.{i}", layers)
            if found:
                stacked[module_name(base, i, module)] = found
    r = max(len(found["lora_A.weight"]) for found in stacked.values())
    out = {}
    for module, found in stacked.items():
        fill(found, r)
        out |= {f"{module}.{name}": t for name, t in found.items()}
    if "bitfit" in methods:
        out |= biases_to_peft(tensors, base, stacked)
    targets = [module for module in linear_layers(base) if module_name(base, 0, module) in stacked]
    settings = {
        "peft_type": "LORA", "r": r, "lora_alpha": peft.scale_of(options) * r, "use_rslora": False,
        "use_dora": "dora" in methods, "target_modules": sorted(targets), "modules_to_save": None,
        "lora_dropout": options.get("dropout", 0.0), "bias": "all" if "bitfit" in methods else "none",
        "fan_in_fan_out": base.family.transposed}
    return settings, out


def fill(lora, r):
    """Fills a module's LoRA up to rank r with zeros."""
    missing = r - len(lora["lora_A.weight"])
    for name, padding in ("lora_A.weight", (0, 0, 0, missing)), ("lora_B.weight", (0, missing)):
        lora[name] = F.pad(lora[name], padding)


def biases_to_peft(tensors, base, wrapped):
    """{PEFT's name: tensor} of the base's biases, which lie deeper in modules that a LoRA wraps."""
    out = {}
    for name, ours in bias_names(base).items():
        module = name.removesuffix(".bias")
        within = f"{module}.base_layer.bias" if module in wrapped else name
        out[within] = stack(base.family, base.config, [tensors[n] for n in ours])
    return out


def stack_lora(base, tensors, block, layers):
    """{name in PEFT's layout: tensor} of the one LoRA that does what the layers' LoRAs do; {} where there are none."""
    wrapped = [f"{block}.{name}" for name in layers if f"{block}.{name}.A" in tensors]
    if not wrapped:
        return {}
    A = [tensors[f"{name}.A"] for name in wrapped]
    B = [tensors.get(f"{block}.{name}.B", torch.zeros(rows, 0)) for name, rows in layers.items()]
    if len(wrapped) == len(layers) and all(torch.equal(A[0], other) for other in A):
        A, B_of_layers = A[0], B                                 # It came from PEFT, where one A is for all.
    else:
        A = torch.cat(A)
        B_of_layers = torch.block_diag(*B).split(list(layers.values()))
    stacked = {"lora_A.weight": A, "lora_B.weight": stack(base.family, base.config, B_of_layers)}
    magnitudes = [tensors[f"{name}.m"] for name in wrapped if f"{name}.m" in tensors]
    if magnitudes:
        names = ",".join(name.rpartition(".")[2] for name in layers)
        check(len(magnitudes) == len(layers), f"DoRA on a part of {names} has no place in PEFT's layout, which holds these "
              f"in one module and the magnitudes of all; train with --targets containing {names}")
        stacked["lora_magnitude_vector"] = stack(base.family, base.config, magnitudes)
    return stacked
