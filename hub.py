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
import os
import re
import struct
import sys
from pathlib import Path

import torch
import torch.nn as nn

import peft
import quant
from model import GPT, GPTConfig

# -----------------------------------------------------------------------------
# configurations: the key in config.json for each of our fields, and what must hold of the other keys

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


def read_json(path):
    """The object in a JSON file; ValueError for whatever else it may be."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, not an object")
    return content


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
# names: their tensor -> our tensors. Several of ours lie in one of theirs side by side; GPT-2's Conv1D keeps weights as (in, out)


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
# files of tensors

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32,
          "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}
KINDS = {dtype: kind for kind, dtype in DTYPES.items()}

#   safetensors:  8 bytes: N, little-endian  |  N bytes of JSON {name: {dtype, shape, data_offsets [begin, end)}}  |  data


def read_safetensors(path):
    """Yields (name, tensor) one at a time. The whole header is checked before the first."""
    with open(path, "rb") as file:
        file_size = os.fstat(file.fileno()).st_size
        start = file.read(8)
        n = struct.unpack("<Q", start)[0] if len(start) == 8 else math.inf
        if n > min(file_size - 8, 10**8):
            raise ValueError(f"{path}: truncated or not safetensors")
        try:
            header = json.loads(file.read(n))
            header.pop("__metadata__", None)
            entries = sorted(((name, DTYPES[e["dtype"]], [int(d) for d in e["shape"]], *map(int, e["data_offsets"])) for name, e in header.items()),
                             key=lambda entry: entry[3])
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path}: its header is damaged ({type(error).__name__}: {error})") from None
        place = 0
        for name, dtype, shape, begin, end in entries:
            if begin != place or min(shape, default=0) < 0 or end - begin != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"{path}: {name} of shape {shape} does not fit its bytes {begin} to {end}")
            place = end
        if 8 + n + place != file_size:
            raise ValueError(f"{path}: truncated or too long: {file_size} bytes, its header says {8 + n + place}")
        for name, dtype, shape, begin, end in entries:
            tensor = torch.empty(shape, dtype=dtype)
            if end > begin and file.readinto(tensor.view(-1).view(torch.uint8).numpy()) != end - begin:
                raise ValueError(f"{path}: truncated at {name}")
            yield name, tensor


def write_safetensors(path, tensors, metadata=None):
    """tensors: {name: (dtype, shape, function that makes it)}, made one at a time as they are written."""
    header, place = {"__metadata__": {"format": "pt"} | (metadata or {})}, 0
    for name, (dtype, shape, _) in tensors.items():
        size = math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": KINDS[dtype], "shape": list(shape), "data_offsets": [place, place + size]}
        place += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)

    def chunks():
        yield struct.pack("<Q", len(text)) + text
        for dtype, shape, make in tensors.values():
            yield make().detach().to("cpu", dtype).contiguous().view(-1).view(torch.uint8).numpy()
    peft.write_atomic(path, chunks())


def read_bin(path):
    """(name, tensor) of a pytorch_model.bin, nothing in it run."""
    try:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:                                     # from before 2020: not a zip file, cannot be mapped
            content = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, dict) or not all(isinstance(t, torch.Tensor) for t in content.values()):
            raise TypeError("it does not hold tensors by name")
    except Exception as error:                                   # unpickling raises whatever the bytes make it raise
        raise ValueError(f"{path}: truncated, damaged or not a checkpoint ({str(error).strip().splitlines()[0][:80] if str(error).strip() else type(error).__name__})") from None
    return content.items()


def weight_files(folder):
    """The files that hold a checkpoint's tensors."""
    folder = Path(folder)
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if (folder / index).is_file():
            names = read_json(folder / index).get("weight_map")
            if not isinstance(names, dict) or not all(isinstance(n, str) for n in names.values()):
                raise ValueError(f"{folder / index}: has no weight_map of file names")
            names = sorted(set(names.values()))
            if climbing := [n for n in names if Path(n).name != n]:
                raise ValueError(f"{folder / index}: {climbing[0]!r} leads out of the folder")
            return [folder / n for n in names]
    for pattern in ("model.safetensors", "*.safetensors", "pytorch_model*.bin"):
        if files := sorted(folder.glob(pattern)):
            return files
    raise ValueError(f"{folder}: no weights there; it must hold *.safetensors or pytorch_model.bin")


def read_tensors(path):
    """(name, tensor) of every tensor in a folder or file, one at a time. A name that comes twice is refused."""
    seen = set()
    for file in weight_files(path) if Path(path).is_dir() else [Path(path)]:
        if not file.is_file():
            raise ValueError(f"{file}: no such file")
        for name, tensor in read_safetensors(file) if file.suffix == ".safetensors" else read_bin(file):
            if name in seen:
                raise ValueError(f"{file}: {name} comes a second time")
            seen.add(name)
            yield name, tensor


# -----------------------------------------------------------------------------
# bases


def load_base(path, dtype=torch.float32, scheme=None, block_size=64, double=True, skip=(), device="cpu"):
    """A checkpoint's folder -> GPT, frozen, in storage: linear layers of the blocks by scheme (None: in dtype), all else in dtype.

    dtype: of the computation. block_size: None for per row. skip: names of linear layers to leave dense, last components or whole
    ones. Weights are read, checked and quantized one at a time.
    """
    config = read_config(path)
    names, hashes = layout(config), {}
    with torch.device("meta"):
        model = GPT(config, dtype)
    wanted = {name: p.shape for name, p in model.named_parameters()}
    if scheme:
        quantized = quantized_names(model, skip)
    head = None
    extra = []
    for theirs, tensor in read_tensors(path):
        name = short_name(theirs, config)
        if name == "lm_head.weight" and config.tied:
            head = tensor
        elif name in names:
            ours, transposed = names[name]
            place(model, ours, tensor.T if transposed else tensor, theirs, wanted, hashes, device,
                  lambda n, t: quant.quantize(t, scheme, block_size, double, name=theirs) if scheme and n in quantized else t.to(dtype))
        elif not BUFFERS.fullmatch(name):
            extra.append(theirs)
    missing = [long_name(name, config) for name, (ours, _) in names.items() if not hashes.keys() >= set(ours)]
    if missing or extra:
        raise ValueError(f"{path}: " + "; ".join(f"{len(found)} tensors {what}: {peft.some(found)}" for found, what in ((missing, "missing"), (extra, "not known")) if found))
    if head is not None and not torch.equal(head.to(dtype), model.embed.tokens.weight.cpu()):
        raise ValueError(f"{path}: tie_word_embeddings is true, but lm_head.weight differs from the embedding")
    quant.forget()
    if config.tied:
        model.head.weight = model.embed.tokens.weight
    if config.position == "rope":
        model.cos, model.sin = (table.to(device) for table in model._rope_table())
    model.base_fingerprint = peft.combine_hashes(hashes)
    return model.requires_grad_(False)


def quantized_names(model, skip):
    """Names of the weights that are stored quantized."""
    names = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and name.startswith("blocks.")]
    unknown = [s for s in skip if not any(s in (name, name.split(".")[-1]) for name in names)]
    if unknown:
        raise ValueError(f"quant_skip: no linear layer {unknown[0]!r}; there are {', '.join(dict.fromkeys(n.split('.')[-1] for n in names))}")
    chosen = {f"{name}.weight" for name in names if not {name, name.split(".")[-1]} & set(skip)}
    if not chosen:
        raise ValueError("quant_skip leaves no layer to quantize")
    return chosen


def place(model, names, tensor, theirs, wanted, hashes, device, store):
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
        hashes[name] = peft.sample_hash(part)
        stored = store(name, part.contiguous().to(device))
        *path, module_name, leaf = name.split(".")
        parent = model.get_submodule(".".join(path))
        module = getattr(parent, module_name)
        if isinstance(stored, quant.QuantizedTensor):
            new = quant.QuantLinear.from_quantized(stored)
            new.bias = module.bias
            setattr(parent, module_name, new)
        else:
            setattr(module, leaf, nn.Parameter(stored, requires_grad=False))


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
    peft.write_atomic(folder / "config.json", (json.dumps(content, indent=2) + "\n").encode())


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


def scale_of(options):
    """s of LoRA's options."""
    return options["alpha"] / (math.sqrt(options["rank"]) if options["rslora"] else options["rank"])


def lora_to_peft(methods, options, t, config, layers, gpt2):
    """(tensors, configuration) of LoRA, BitFit or both; what is apart here and fused there becomes one LoRA of the ranks' sum."""
    tensors, ranks, sizes = {}, {}, {}
    s = scale_of(options) if "lora" in methods else 1.0
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
        peft.check(tensors.keys() == {"prompt_embeddings"} and tensors["prompt_embeddings"].dim() == 2, f"{file}: must hold prompt_embeddings (n, width) alone, found {peft.some(tensors)}")
        P = tensors["prompt_embeddings"]
        width = config.n_embd if kind == "PROMPT_TUNING" else 2 * config.n_layer * config.kv_heads * config.d_head
        peft.check(P.size(1) == width, f"{file}: prompt_embeddings has shape {tuple(P.shape)}; this base makes it (n, {width})")
        if kind == "PROMPT_TUNING":
            return "prompt", {"prompt_length": len(P)}, {"embed.P": P}
        names = [f"blocks.{i}.attn.prefix.{s}" for i in range(config.n_layer) for s in ("s_k", "s_v")]
        return "prefix", {"prefix_length": len(P), "prefix_style": "after"}, dict(zip(names, P.chunk(2 * config.n_layer, 1)))
    peft.check(kind in ("LORA", "IA3"), f"{folder}/adapter_config.json: peft_type is {kind!r}; LORA, IA3, PROMPT_TUNING and PREFIX_TUNING can be read")
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
        peft.check(len(found) == config.n_layer and all(part.keys() == wanted for part in found.values()), f"{file}: {module} is not complete in all {config.n_layer} layers")
    return ia3_from_peft(modules, config, file, gpt2) if kind == "IA3" else lora_from_peft(said, modules, tensors, config, file)


def ia3_from_peft(modules, config, file, gpt2):
    """(IA)3's vectors under our names, from {module: {layer: {suffix: tensor}}}."""
    k, v, down = ("attn.c_attn", "attn.c_attn", "mlp.c_proj") if gpt2 else ("self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj")
    peft.check(modules.keys() == {k, v, down}, f"{file}: (IA)3 on {', '.join(sorted(modules))}; only {', '.join(sorted({k, v, down}))} can be read")
    tensors = {}
    for i in range(config.n_layer):
        l = {name: modules[name][i]["ia3_l"].flatten() for name in (k, v, down)}
        if gpt2:
            one, l_k, l_v = l[k].chunk(3)
            peft.check(bool((one == 1).all()), f"{file}: layer {i} scales the queries as well, which (IA)3 here does not")
        else:
            l_k, l_v = l[k], l[v]
        tensors |= {f"blocks.{i}.attn.k.l_k": l_k, f"blocks.{i}.attn.v.l_v": l_v, f"blocks.{i}.ffn.down.l_ff": l[down]}
    return "ia3", {}, {name: t.contiguous() for name, t in tensors.items()}


def lora_from_peft(said, modules, tensors, config, file):
    """One rank and scale for all: a smaller rank is filled up with zeros, another scale goes into B."""
    peft.check(modules, f"{file}: no LoRA in it")
    for key in ("r", "lora_alpha"):
        peft.check(isinstance(said.get(key), (int, float)) and said[key] > 0, f"{file.parent}/adapter_config.json: {key} is {said.get(key)!r}; it must be a positive number")
    linears, out = their_linears(config), {}
    rank = max(len(found[0]["lora_A"]) for found in modules.values())
    s = said["lora_alpha"] / (math.sqrt(rank) if said.get("use_rslora") else rank)
    pattern = lambda key, module, default: next((n for end, n in (said.get(key) or {}).items() if re.fullmatch(rf"(.*\.)?{end}", module)), default)
    for module, found in modules.items():
        r, alpha = pattern("rank_pattern", module, said["r"]), pattern("alpha_pattern", module, said["lora_alpha"])
        ratio = alpha / (math.sqrt(r) if said.get("use_rslora") else r) / s
        for i, part in found.items():
            A, B = part["lora_A"], part["lora_B"]
            peft.check(len(A) == r == B.size(-1), f"{file}: {module} of layer {i} has rank {len(A)} and {B.size(-1)}; adapter_config.json says {r}")
            peft.check(B.size(0) % len(linears[module]) == 0, f"{file}: {module} of layer {i} has {B.size(0)} rows")
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
            peft.check(t is not None and t.dim() == 1 and len(t) % len(ours) == 0, f"{file}: the bias of {theirs.removesuffix('.bias')} is missing; only bias \"all\" can be read")
            out |= dict(zip(ours, t.chunk(len(ours))))
    peft.check(not biases, f"{file}: {len(biases)} biases that this base does not have: {peft.some(biases)}")
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
    peft.check(isinstance(inner, dict) and isinstance(name, str), f"{folder}/adapter_config.json: has no name and config, so it is not AdapterHub's")
    found = (bool(inner.get("mh_adapter")), bool(inner.get("original_ln_before")), bool(inner.get("ln_before")))
    style = next((style for style, values in HUB_STYLES.items() if values == found), None)
    peft.check(style, f"{folder}: mh_adapter, original_ln_before, ln_before are {found}; only Houlsby's, Pfeiffer's and Lin's adapters can be read")
    for key, wanted in (("output_adapter", True), ("is_parallel", False), ("phm_layer", False), ("ln_after", False), ("scaling", 1.0), ("use_gating", False), ("inv_adapter", None)):
        peft.check(inner.get(key, wanted) == wanted, f"{folder}: {key} is {inner.get(key)!r}; only {wanted!r} can be read")
    activation = inner.get("non_linearity")
    peft.check(activation in peft.Adapter.ACTIVATIONS, f"{folder}: non_linearity is {activation!r}; it must be one of {', '.join(peft.Adapter.ACTIVATIONS)}")
    tensors = {n: t.float() for n, t in read_tensors(Path(folder, "pytorch_adapter.bin"))}
    names = hub_names(config, style, name)
    for twin in [n for n in tensors if ".adapter_norm_before." in n]:      # that library writes Lin's LayerNorm under two names
        if torch.equal(tensors[twin], tensors.get(twin.replace("adapter_norm_before", "adapter_down.0"), torch.zeros(0))):
            del tensors[twin]
    peft.check(tensors.keys() == names.keys(), f"{folder}: missing {peft.some(names.keys() - tensors.keys()) or 'nothing'}, not known {peft.some(tensors.keys() - names.keys()) or 'nothing'}")
    out = {names[n]: t for n, t in tensors.items()}
    return "adapter", {"adapter_style": style, "adapter_size": len(out["blocks.0.adapter2.down.weight"]), "adapter_activation": activation}, out


# -----------------------------------------------------------------------------
# doors


def read_run(run):
    """(train.Config, adapter, GPTConfig of the base) of a run's folder."""
    import train
    if not Path(run, "config.toml").is_file():
        raise ValueError(f"{run}: no run there, it has no config.toml")
    config = train.Config(**train.read_toml(Path(run, "config.toml")))
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
        peft.write_atomic(path / "pytorch_adapter.bin", buffer.getvalue())
    peft.write_atomic(path / "adapter_config.json", (json.dumps(said, indent=2) + "\n").encode())
    return said


def import_adapter(path, base, out):
    """A folder in PEFT's or AdapterHub's layout -> a run's folder `out` over `base`, for sample.py, evaluate.py and load_adapter."""
    import data
    import train
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
    run = train.Config(method=method, base=str(base), out_dir=str(out), **{k: v for k, v in options.items()})
    peft.write_atomic(out / "config.toml", train.write_toml(run).encode())
    return model


def merge_run(run, path):
    """Base and adapter as one plain checkpoint with its tokenizer, in the run's computation type."""
    import train
    if Path(path).is_dir() and any(Path(path).iterdir()):
        raise ValueError(f"{path}: holds something already; choose another folder")
    model, tokenizer, config = train.load_run(run, "cpu", "auto")
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
            values = torch.linalg.svdvals(torch.linalg.qr(t[name]).R @ torch.linalg.qr(t[name[:-1] + "A"].T).R.T) * scale_of(options)
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
    from train import run_main
    run_main(main, ARGS)
