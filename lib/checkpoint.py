"""
Hugging Face checkpoints in and out: a folder of config.json and tensors <-> a GPT.

    model = load_base("gpt2", torch.bfloat16, quant.Storage("nf4", double=True))
    save_base(model, "copy")                                   # transformers loads this folder

A base is read strictly: every key of config.json is honoured, known to be harmless or refused; every tensor is used
and every parameter is set, or the folder is refused with the names. Tensors are read, checked and stored one at a time.
What differs between families is said in the table FAMILIES and nowhere else.
"""

import dataclasses
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn

import quant
from lib.files import (check, combine_hashes, found_in, located, read_json, read_tensors, sample_hash, some,
                       write_json, write_safetensors)
from model import GPT, GPTConfig


# -----------------------------------------------------------------------------
# families


@dataclass(frozen=True)
class Family:
    """How one family's checkpoints say what a GPTConfig and a GPT hold.

    keys            key of config.json -> field of GPTConfig; where two keys name one field they must agree
    fixed           field of GPTConfig -> its value in all models of the family
    defaults        key -> its value where config.json lacks it; the other keys must be there
    required        key -> the only value that is supported, and the meaning of its absence
    modules         their module outside the blocks -> ours
    block_modules   their module in a block -> ours, or several of ours that lie one on top of the other in theirs
    """
    name: str                     # model_type in config.json
    architecture: str             # the class in transformers, for `architectures`
    prefix: str                   # of every tensor but lm_head; the file of a base model may lack it
    blocks: str                   # the name of the list of blocks
    keys: dict
    fixed: dict
    defaults: dict
    required: dict
    modules: dict
    block_modules: dict
    transposed: bool = False      # whether the linear layers of the blocks hold their weights as (in, out)
    adapters: bool = True         # whether hub.py exports adapters over such a base

    def block(self, i):
        """The beginning of the names in block i."""
        return f"{self.prefix}{self.blocks}.{i}."

    def linears(self):
        """{their module: [our modules]} of a block's linear layers."""
        modules = {theirs: ours.split() for theirs, ours in self.block_modules.items()}
        return {theirs: ours for theirs, ours in modules.items() if last(ours[0]) in quant.LINEAR_LAYERS}


def last(name):
    """The last part of a dotted name."""
    return name.rpartition(".")[2]


KEYS = {"vocab_size": "vocab_size", "max_position_embeddings": "block_size", "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head", "hidden_size": "n_embd", "tie_word_embeddings": "tied"}      # of all but GPT-2
ATTENTION = {"self_attn.q_proj": "attn.q", "self_attn.k_proj": "attn.k", "self_attn.v_proj": "attn.v"}

GPT2 = Family(
    name="gpt2", architecture="GPT2LMHeadModel", prefix="transformer.", blocks="h", transposed=True,
    keys={"vocab_size": "vocab_size", "n_positions": "block_size", "n_layer": "n_layer", "n_head": "n_head",
          "n_embd": "n_embd", "n_inner": "n_ffn", "activation_function": "activation", "layer_norm_epsilon": "norm_eps",
          "tie_word_embeddings": "tied"},
    defaults={"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True, "n_inner": None},
    fixed={},
    required={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
    modules={"wte": "embed.tokens", "wpe": "embed.positions", "ln_f": "norm"},
    block_modules={"ln_1": "norm1", "ln_2": "norm2", "attn.c_attn": "attn.q attn.k attn.v", "attn.c_proj": "attn.out",
                   "mlp.c_fc": "ffn.up", "mlp.c_proj": "ffn.down"})
OPT = Family(
    name="opt", architecture="OPTForCausalLM", prefix="model.decoder.", blocks="layers", adapters=False,
    keys=KEYS | {"ffn_dim": "n_ffn", "activation_function": "activation", "word_embed_proj_dim": "n_embd"},
    fixed={"position_offset": 2},
    defaults={"activation_function": "relu", "tie_word_embeddings": True},
    required={"do_layer_norm_before": True, "_remove_final_layer_norm": False, "enable_bias": True,
              "layer_norm_elementwise_affine": True},
    modules={"embed_tokens": "embed.tokens", "embed_positions": "embed.positions", "final_layer_norm": "norm"},
    block_modules=ATTENTION | {"self_attn.out_proj": "attn.out", "fc1": "ffn.up", "fc2": "ffn.down",
                               "self_attn_layer_norm": "norm1", "final_layer_norm": "norm2"})
LLAMA = Family(
    name="llama", architecture="LlamaForCausalLM", prefix="model.", blocks="layers",
    keys=KEYS | {"num_key_value_heads": "n_kv_head", "intermediate_size": "n_ffn", "head_dim": "head_dim",
                 "hidden_act": "activation", "rms_norm_eps": "norm_eps", "rope_theta": "rope_theta"},
    fixed={"position": "rope", "norm": "rms", "gated": True, "bias": False},
    defaults={"hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False,
              "num_key_value_heads": None, "head_dim": None},
    required={"attention_bias": False, "mlp_bias": False, "rope_scaling": None, "rope_interleaved": False},
    modules={"embed_tokens": "embed.tokens", "norm": "norm"},
    block_modules=ATTENTION | {"self_attn.o_proj": "attn.out", "mlp.gate_proj": "ffn.gate", "mlp.up_proj": "ffn.up",
                               "mlp.down_proj": "ffn.down", "input_layernorm": "norm1",
                               "post_attention_layernorm": "norm2"})

# A family that differs from another in a few words is replace(LLAMA, name=.., fixed=LLAMA.fixed | {..}), with
# replace from dataclasses.

FAMILIES = {family.name: family for family in (GPT2, OPT, LLAMA)}

ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu", "silu": "silu"}
ACTIVATION_NAMES = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}

# keys that change nothing in what the model computes without dropout, in the versions of transformers up to 5
HARMLESS = set("""
    _name_or_path architectures attn_pdrop embd_pdrop resid_pdrop dropout attention_dropout
    activation_dropout layerdrop initializer_range model_type n_ctx bos_token_id eos_token_id pad_token_id
    sep_token_id decoder_start_token_id unk_token_id torch_dtype dtype transformers_version use_cache
    pretraining_tp prefix id2label label2id task_specific_params tokenizer_class summary_type
    summary_use_proj summary_activation summary_first_dropout summary_proj_to_labels reorder_and_upcast_attn
    init_std _attn_implementation_autoset return_dict max_length do_sample temperature top_k top_p num_beams
    repetition_penalty length_penalty early_stopping no_repeat_ngram_size chunk_size_feed_forward
    diversity_penalty encoder_no_repeat_ngram_size min_length num_beam_groups num_return_sequences typical_p
    exponential_decay_length_penalty problem_type max_sequence_length
""".split())

# tensors in old checkpoints that this code computes
BUFFERS = re.compile(r"\bh\.\d+\.attn\.(masked_)?bias$|\blayers\.\d+\.self_attn\.rotary_emb\.inv_freq$")

TYPES = {field.name: field.type for field in dataclasses.fields(GPTConfig)}
DEFAULTS = {field.name: field.default for field in dataclasses.fields(GPTConfig)}
DERIVED = {"n_kv_head": "kv_heads", "n_ffn": "d_ffn", "head_dim": "d_head"}      # field that may be 0 -> what it then is


def family_of(config):
    """The first Family whose config.json can say all of a GPTConfig. ValueError where there is none."""
    values = dataclasses.asdict(config)
    if config.kv_heads == config.n_head:
        values["n_kv_head"] = 0
    if config.d_head * config.n_head == config.n_embd:
        values["head_dim"] = 0
    for family in FAMILIES.values():
        expected = DEFAULTS | family.fixed
        unsaid = expected.keys() - family.keys.values()
        if all(values[name] == expected[name] for name in unsaid):
            return family
    raise ValueError(f"this architecture is none of {', '.join(FAMILIES)}")


# -----------------------------------------------------------------------------
# config.json


def read_config(folder):
    """config.json of a checkpoint -> GPTConfig. ValueError for a key that would change the computation unseen."""
    path = Path(folder, "config.json")
    check(path.is_file(), f"{folder}: no model there, it has no config.json (it has {found_in(folder)})")
    content = read_json(path)
    with located(path):
        return parse_config(content)


def parse_config(content):
    """The content of a config.json -> GPTConfig."""
    kind = content.get("model_type")
    check(kind in list(FAMILIES), f"model_type is {kind!r}; it must be one of {', '.join(FAMILIES)}")
    family, rest = FAMILIES[kind], plain_rope(content)
    fields = dict(family.fixed)
    for key, name in family.keys.items():
        check(key in rest or key in family.defaults or name in fields, f"{key} is missing")
        value = rest.pop(key, family.defaults.get(key, fields.get(name)))
        value = parse_value(key, name, value)
        agreed = fields.setdefault(name, value)
        check(value == agreed, f"{key} is {value!r}; only {agreed!r} is supported")
    for key, wanted in family.required.items():
        value = rest.pop(key, wanted)
        check(value == wanted, f"{key} is {value!r}; only {wanted!r} is supported")
    for key, value in rest.items():
        harmless = key in HARMLESS or key.startswith("_") or value in (None, False, [], {})
        check(harmless, f"unknown key {key!r}, and what it changes is not known either; remove it if it changes nothing")
    return GPTConfig(**fields)


def plain_rope(content):
    """config.json with rope_theta, as transformers 4 wrote it, in place of the rope_parameters of transformers 5."""
    content = dict(content)
    rope = content.pop("rope_parameters", None) or {}
    plain = isinstance(rope, dict) and rope.get("rope_type", "default") == "default"
    check(plain and rope.keys() <= {"rope_type", "rope_theta"},
          f"rope_parameters {rope} are not supported, only rope_type default is")
    if "rope_theta" in rope:
        content.setdefault("rope_theta", rope["rope_theta"])
    return content


def parse_value(key, name, value):
    """The value of a key as GPTConfig's field of that name holds it."""
    if value is None and name in DERIVED:
        return 0
    if name == "activation":
        check(value in list(ACTIVATIONS), f"{key} is {value!r}; it must be one of {', '.join(ACTIVATIONS)}")
        return ACTIVATIONS[value]
    kinds = (int, float) if TYPES[name] is float else (TYPES[name],)
    check(type(value) in kinds, f"{key} is {value!r}; it must be {TYPES[name].__name__}")
    return value


def config_json(config):
    """GPTConfig -> the content of config.json."""
    family = family_of(config)
    content = {"model_type": family.name, "architectures": [family.architecture]}
    for key, name in family.keys.items():
        value = getattr(config, DERIVED.get(name, name))
        content[key] = ACTIVATION_NAMES[value] if name == "activation" else value
    return content


# -----------------------------------------------------------------------------
# names


def layout(config):
    """{their name: (our names, transposed)} of the tensors in a whole checkpoint of the config's family.

    Several of ours lie one on top of the other in theirs; transposed: theirs is (in, out).
    """
    family = family_of(config)
    modules = {family.prefix + theirs: [ours] for theirs, ours in family.modules.items()}
    for i in range(config.n_layer):
        for theirs, ours in family.block_modules.items():
            modules[family.block(i) + theirs] = [f"blocks.{i}.{name}" for name in ours.split()]
    if not config.tied:
        modules["lm_head"] = ["head"]
    names = {}
    for theirs, ours in modules.items():
        linear = last(ours[0]) in quant.LINEAR_LAYERS
        names[f"{theirs}.weight"] = [f"{name}.weight" for name in ours], linear and family.transposed
        if config.bias and (linear or "norm" in ours[0]):
            names[f"{theirs}.bias"] = [f"{name}.bias" for name in ours], False
    return names


# -----------------------------------------------------------------------------
# reading and writing


def load_base(path, dtype=torch.float32, storage=None, device="cpu"):
    """A checkpoint's folder -> GPT, frozen.

    dtype: of the computation, and of all weights but those in storage. storage: a quant.Storage for the linear layers of
    the blocks, or None. ValueError names what is missing, not known or damaged.
    """
    config = read_config(path)
    with torch.device("meta"):
        model = GPT(config, dtype)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    if storage:
        quant.store(model, storage, empty=True)
    starts = "", family_of(config).prefix, "model."      # a base model's file lacks the prefix or its beginning
    names, hashes, unknown, head = layout(config), {}, [], None
    for theirs, tensor in read_tensors(path):
        name = next((start + theirs for start in starts if start + theirs in names), None)
        if theirs == "lm_head.weight" and config.tied:
            head = tensor
        elif name:
            ours, transposed = names[name]
            tensor = tensor.T if transposed else tensor
            check_weight(tensor, stacked_shape([shapes[n] for n in ours]), theirs)
            for our_name, part in zip(ours, tensor.split([shapes[n][0] for n in ours])):
                hashes[our_name] = sample_hash(part)
                set_parameter(model, our_name, part.contiguous().to(device), dtype, storage)
        elif not BUFFERS.search(theirs):
            unknown.append(theirs)
    missing = [name for name, (ours, _) in names.items() if not hashes.keys() >= set(ours)]
    lists = {"missing": missing, "not known": unknown}
    problems = [f"{len(found)} tensors {what}: {some(found)}" for what, found in lists.items() if found]
    check(not problems, f"{path}: {'; '.join(problems)}")
    same = head is None or torch.equal(head.to(dtype), model.embed.tokens.weight.cpu())
    check(same, f"{path}: tie_word_embeddings is true, but lm_head.weight differs from the embedding")
    if config.tied:
        model.head.weight = model.embed.tokens.weight
    if config.position == "rope":
        model.cos, model.sin = (table.to(device) for table in model._rope_table())
    model.base_fingerprint = combine_hashes(hashes)
    return model.requires_grad_(False)


def stacked_shape(shapes):
    """The shape of tensors that lie one on top of the other."""
    rows = sum(shape[0] for shape in shapes)
    return (rows, *shapes[0][1:])


def check_weight(tensor, shape, name):
    """ValueError unless a checkpoint's tensor has that shape, is of a floating type and finite."""
    check(tensor.shape == shape, f"{name} has shape {tuple(tensor.shape)}; the configuration makes it {tuple(shape)} (as (out, in))")
    check(tensor.is_floating_point(), f"{name} is {tensor.dtype}; weights must be floating point")
    check(bool(tensor.isfinite().all()), f"{name} holds NaN or infinity")    # fault 30


def set_parameter(model, name, value, dtype, storage):
    """Puts a tensor where its name says: into a stored layer quantized, elsewhere in dtype."""
    module_name, _, leaf = name.rpartition(".")
    module = model.get_submodule(module_name)
    if leaf == "weight" and isinstance(module, quant.QuantLinear):
        module.fill(storage.quantize(value, name))
    else:
        setattr(module, leaf, nn.Parameter(value.to(dtype), requires_grad=False))


def save_base(model, folder, extra=None):
    """Writes a model without methods (or merged) as a checkpoint for transformers: config.json and model.safetensors.

    The type is the embedding's. extra: more keys for config.json.
    """
    folder, config = Path(folder), model.config
    folder.mkdir(parents=True, exist_ok=True)
    weights = dict(model.named_parameters())
    for name, module in model.named_modules():
        if isinstance(module, quant.QuantLinear):
            weights[f"{name}.weight"] = module.weight_q
    dtype, tensors = model.head.weight.dtype, {}
    for name, (ours, transposed) in layout(config).items():
        parts = [weights[n] for n in ours]
        shape = stacked_shape([part.shape for part in parts])
        shape = shape[::-1] if transposed else shape
        tensors[name] = dtype, shape, partial(stacked, parts, transposed, dtype)
    write_safetensors(folder / "model.safetensors", tensors)
    dtype_name = str(dtype).removeprefix("torch.")
    write_json(folder / "config.json", config_json(config) | {"torch_dtype": dtype_name} | (extra or {}))


def stacked(parts, transposed, dtype):
    """Tensors, quantized ones in dtype, one on top of the other as a checkpoint holds them."""
    dense = [part.dequantize(dtype) if isinstance(part, quant.QuantizedTensor) else part for part in parts]
    whole = torch.cat(dense)
    return whole.T if transposed else whole
