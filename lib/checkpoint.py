"""
Hugging Face checkpoints in and out.
"""

import json
import re
from pathlib import Path

import torch
import torch.nn as nn

import quant
from lib.files import combine_hashes, read_json, read_tensors, sample_hash, some, write_atomic, write_safetensors
from model import GPT, GPTConfig


# -----------------------------------------------------------------------------
# configurations


GELUS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu", "silu": "silu"}
FAMILIES = {
    "gpt2": {"fields": {"vocab_size": "vocab_size", "n_positions": "block_size", "n_layer": "n_layer", "n_head": "n_head", "n_embd": "n_embd",
                        "n_inner": "n_ffn", "activation_function": "activation", "layer_norm_epsilon": "norm_eps", "tie_word_embeddings": "tied"},
             "always": {}, "default": {"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True, "n_inner": None},
             "must_be": {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}},
    "opt": {"fields": {"vocab_size": "vocab_size", "max_position_embeddings": "block_size", "num_hidden_layers": "n_layer",
                       "num_attention_heads": "n_head", "hidden_size": "n_embd", "ffn_dim": "n_ffn", "activation_function": "activation", "tie_word_embeddings": "tied"},
            "always": {"position_offset": 2}, "default": {"activation_function": "relu", "tie_word_embeddings": True},
            "must_be": {"do_layer_norm_before": True, "_remove_final_layer_norm": False, "enable_bias": True, "layer_norm_elementwise_affine": True}},
    "llama": {"fields": {"vocab_size": "vocab_size", "max_position_embeddings": "block_size", "num_hidden_layers": "n_layer",
                         "num_attention_heads": "n_head", "num_key_value_heads": "n_kv_head", "hidden_size": "n_embd", "intermediate_size": "n_ffn",
                         "head_dim": "head_dim", "hidden_act": "activation", "rms_norm_eps": "norm_eps", "rope_theta": "rope_theta", "tie_word_embeddings": "tied"},
              "always": {"position": "rope", "norm": "rms", "gated": True, "bias": False},
              "default": {"hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False, "num_key_value_heads": None, "head_dim": None},
              "must_be": {"attention_bias": False, "mlp_bias": False, "rope_scaling": None, "rope_interleaved": False}},
}
# keys that change nothing in what the model computes without dropout, in the versions of transformers up to 5
HARMLESS = set("""_name_or_path architectures attn_pdrop embd_pdrop resid_pdrop dropout attention_dropout activation_dropout layerdrop initializer_range
    model_type n_ctx bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id unk_token_id torch_dtype dtype transformers_version use_cache
    pretraining_tp prefix id2label label2id task_specific_params tokenizer_class summary_type summary_use_proj summary_activation
    summary_first_dropout summary_proj_to_labels reorder_and_upcast_attn init_std _attn_implementation_autoset return_dict
    max_length do_sample temperature top_k top_p num_beams repetition_penalty length_penalty early_stopping no_repeat_ngram_size
    chunk_size_feed_forward diversity_penalty encoder_no_repeat_ngram_size min_length num_beam_groups num_return_sequences
    typical_p exponential_decay_length_penalty problem_type max_sequence_length""".split())


def read_config(folder):
    """config.json of a gpt2, opt or llama checkpoint -> GPTConfig. A key that would change the computation is honoured or refused."""
    path = Path(folder, "config.json")
    if not path.is_file():
        there = sorted(p.name for p in Path(folder).iterdir())[:5] if Path(folder).is_dir() else []
        raise ValueError(f"{folder}: no model there, it has no config.json" + (f" (it has {', '.join(there)})" if there else ""))
    raw = read_json(path)
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ValueError(f"{path}: model_type is {kind!r}; it must be one of {', '.join(FAMILIES)}")
    family, values = FAMILIES[kind], dict(raw)
    rope = values.pop("rope_parameters", None)                  # how transformers 5 writes rope_theta and rope_scaling
    if isinstance(rope, dict) and rope.get("rope_type", "default") == "default" and rope.keys() <= {"rope_type", "rope_theta"}:
        values.setdefault("rope_theta", rope.get("rope_theta", 10000.0))
    elif rope:
        raise ValueError(f"{path}: rope_parameters {rope} are not supported, only rope_type default is")
    fields = dict(family["always"])
    for key, field in family["fields"].items():
        value = values.pop(key, family["default"].get(key))
        if key not in raw and key not in family["default"]:
            raise ValueError(f"{path}: {key} is missing")
        if field == "activation":
            if value not in GELUS:
                raise ValueError(f"{path}: {key} is {value!r}; it must be one of {', '.join(GELUS)}")
            value = GELUS[value]
        kinds = {int: int, float: (int, float), str: str, bool: bool}[GPTConfig.__dataclass_fields__[field].type]
        if value is None and field in ("n_ffn", "n_kv_head", "head_dim"):
            value = 0
        if not isinstance(value, kinds) or isinstance(value, bool) != (kinds is bool):
            raise ValueError(f"{path}: {key} is {value!r}; it must be {GPTConfig.__dataclass_fields__[field].type.__name__}")
        fields[field] = value
    if values.pop("word_embed_proj_dim", fields["n_embd"]) != fields["n_embd"]:
        raise ValueError(f"{path}: word_embed_proj_dim differs from hidden_size, which is not supported")
    for key, wanted in family["must_be"].items():
        if values.pop(key, wanted) != wanted:
            raise ValueError(f"{path}: {key} is {raw[key]!r}; only {wanted!r} is supported")
    unknown = [key for key, value in values.items() if key not in HARMLESS and value not in (None, False, [], {}) and not key.startswith("_")]
    if unknown:
        raise ValueError(f"{path}: unknown key {unknown[0]!r}, and what it changes is not known either; remove it if it changes nothing")
    try:
        return GPTConfig(**fields)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def family_of(config):
    """The name of the family that a GPTConfig belongs to."""
    if config.position == "rope" and config.norm == "rms" and config.gated and not config.bias:
        return "llama"
    if config.position == "learned" and config.norm == "layer" and not config.gated and config.bias and config.kv_heads == config.n_head \
            and config.d_head * config.n_head == config.n_embd and config.norm_eps == (1e-5 if config.position_offset else config.norm_eps):
        return {0: "gpt2", 2: "opt"}.get(config.position_offset)
    raise ValueError("this architecture is none of gpt2, opt, llama")


def config_json(config, tokenizer_ids=None):
    """GPTConfig -> the content of config.json."""
    kind = family_of(config)
    content = {"model_type": kind, "architectures": [{"gpt2": "GPT2LMHeadModel", "opt": "OPTForCausalLM", "llama": "LlamaForCausalLM"}[kind]]}
    derived = {"n_kv_head": config.kv_heads, "n_ffn": config.d_ffn, "head_dim": config.d_head,
               "activation": next(theirs for theirs, ours in GELUS.items() if ours == config.activation)}
    content |= {key: derived.get(field, getattr(config, field)) for key, field in FAMILIES[kind]["fields"].items()}
    if kind == "opt":
        content["word_embed_proj_dim"] = config.n_embd
    return content | (tokenizer_ids or {})


# -----------------------------------------------------------------------------
# names


def layout(config):
    """{their name: (our names, transposed)} of the config's family, without the prefix that some checkpoints leave out."""
    kind = family_of(config)
    if kind == "gpt2":
        outer = {"wte": "embed.tokens", "wpe": "embed.positions", "ln_f": "norm"}
        inner = {"ln_1": "norm1", "ln_2": "norm2", "attn.c_attn": "attn.q attn.k attn.v", "attn.c_proj": "attn.out", "mlp.c_fc": "ffn.up", "mlp.c_proj": "ffn.down"}
    else:
        attention = {f"self_attn.{n}_proj": f"attn.{n}" for n in "qkv"}
        outer = {"embed_tokens": "embed.tokens", "embed_positions": "embed.positions", "final_layer_norm": "norm"}
        inner = attention | {"self_attn.out_proj": "attn.out", "fc1": "ffn.up", "fc2": "ffn.down", "self_attn_layer_norm": "norm1", "final_layer_norm": "norm2"}
        if kind == "llama":
            outer = {"embed_tokens": "embed.tokens", "norm": "norm"}
            inner = attention | {"self_attn.o_proj": "attn.out", **{f"mlp.{n}_proj": f"ffn.{n}" for n in ("gate", "up", "down")},
                                 "input_layernorm": "norm1", "post_attention_layernorm": "norm2"}
    blocks = "h" if kind == "gpt2" else "layers"
    modules = {**outer, **{f"{blocks}.{i}.{theirs}": " ".join(f"blocks.{i}.{part}" for part in ours.split())
                           for i in range(config.n_layer) for theirs, ours in inner.items()}}
    if not config.tied:
        modules["lm_head"] = "head"
    names = {}
    for theirs, ours in modules.items():
        names[f"{theirs}.weight"] = [f"{n}.weight" for n in ours.split()], kind == "gpt2" and (".attn." in theirs or ".mlp." in theirs)
        if config.bias and "embed" not in ours and ours != "head":
            names[f"{theirs}.bias"] = [f"{n}.bias" for n in ours.split()], False
    return names


PREFIX = {"gpt2": "transformer.", "opt": "model.decoder.", "llama": "model."}
BUFFERS = re.compile(r"h\.\d+\.attn\.(masked_)?bias|layers\.\d+\.self_attn\.rotary_emb\.inv_freq")     # in old checkpoints; computed here


def short_name(name, config):
    """A checkpoint's name without its prefix."""
    prefix = PREFIX[family_of(config)]
    for start in (prefix, prefix.removeprefix("model.")):
        if start and name.startswith(start):
            return name[len(start):]
    return name


def long_name(name, config):
    """A tensor's name in their whole checkpoint, from its name in the transformer."""
    return name if name.startswith("lm_head") else PREFIX[family_of(config)] + name


# -----------------------------------------------------------------------------
# reading and writing


def load_base(path, dtype=torch.float32, storage=None, device="cpu"):
    """A checkpoint's folder -> GPT, frozen: linear layers of the blocks in storage (quant.Storage; None: in dtype), all else in dtype.

    dtype: of the computation. Weights are read, checked and quantized one at a time.
    """
    config = read_config(path)
    names, hashes = layout(config), {}
    with torch.device("meta"):
        model = GPT(config, dtype)
    wanted = {name: p.shape for name, p in model.named_parameters()}
    if storage:
        quant.store(model, storage, empty=True)
    head = None
    extra = []
    for theirs, tensor in read_tensors(path):
        name = short_name(theirs, config)
        if name == "lm_head.weight" and config.tied:
            head = tensor
        elif name in names:
            ours, transposed = names[name]
            place(model, ours, tensor.T if transposed else tensor, theirs, wanted, hashes, device, dtype, storage)
        elif not BUFFERS.fullmatch(name):
            extra.append(theirs)
    missing = [long_name(name, config) for name, (ours, _) in names.items() if not hashes.keys() >= set(ours)]
    if missing or extra:
        raise ValueError(f"{path}: " + "; ".join(f"{len(found)} tensors {what}: {some(found)}" for found, what in ((missing, "missing"), (extra, "not known")) if found))
    if head is not None and not torch.equal(head.to(dtype), model.embed.tokens.weight.cpu()):
        raise ValueError(f"{path}: tie_word_embeddings is true, but lm_head.weight differs from the embedding")
    quant.forget()
    if config.tied:
        model.head.weight = model.embed.tokens.weight
    if config.position == "rope":
        model.cos, model.sin = (table.to(device) for table in model._rope_table())
    model.base_fingerprint = combine_hashes(hashes)
    return model.requires_grad_(False)


def place(model, names, tensor, theirs, wanted, hashes, device, dtype, storage):
    """Checks a checkpoint's tensor and puts it, stored, where our names say."""
    rows = [wanted[name][0] for name in names]
    shape = (sum(rows), *wanted[names[0]][1:])
    if tensor.shape != shape:
        raise ValueError(f"{theirs} has shape {tuple(tensor.shape)}; the configuration makes it {tuple(shape)} (as (out, in))")
    if not tensor.is_floating_point():
        raise ValueError(f"{theirs} is {tensor.dtype}; weights must be floating point")
    if not bool(tensor.isfinite().all()):
        raise ValueError(f"{theirs} holds NaN or infinity")
    for name, part in zip(names, tensor.split(rows)):
        hashes[name] = sample_hash(part)
        part = part.contiguous().to(device)
        module_name, _, leaf = name.rpartition(".")
        module = model.get_submodule(module_name)
        if leaf == "weight" and isinstance(module, quant.QuantLinear):
            module.fill(storage.quantize(part, theirs))
        else:
            setattr(module, leaf, nn.Parameter(part.to(dtype), requires_grad=False))


def save_base(model, folder, extra=None):
    """Writes a model without methods (or merged) as a checkpoint that transformers loads: config.json and model.safetensors.

    The type is the embedding's. extra: more keys for config.json.
    """
    folder, config = Path(folder), model.config
    folder.mkdir(parents=True, exist_ok=True)
    own = dict(model.named_parameters()) | {f"{name}.weight": m for name, m in model.named_modules() if isinstance(m, quant.QuantLinear)}
    dtype = model.head.weight.dtype

    def make(ours, transposed):
        parts = [m.dequantize(dtype) if isinstance(m := own[name], quant.QuantLinear) else m for name in ours]
        return torch.cat(parts).T if transposed else torch.cat(parts)

    tensors = {}
    for name, (ours, transposed) in layout(config).items():
        shapes = [(own[n].out_features, own[n].in_features) if isinstance(own[n], quant.QuantLinear) else tuple(own[n].shape) for n in ours]
        shape = (sum(s[0] for s in shapes), *shapes[0][1:])
        tensors[long_name(name, config)] = dtype, shape[::-1] if transposed else shape, lambda ours=ours, transposed=transposed: make(ours, transposed)
    write_safetensors(folder / "model.safetensors", tensors)
    content = config_json(config) | {"torch_dtype": str(dtype).removeprefix("torch.")} | (extra or {})
    write_atomic(folder / "config.json", (json.dumps(content, indent=2) + "\n").encode())
