"""
Hugging Face checkpoints in and out: a folder of config.json and tensors <-> a GPT.

    model = load_base("gpt2", torch.bfloat16, quant.Storage("nf4", double=True))
    save_base(model, "copy")                                   # transformers loads this folder

A base is read strictly: every tensor is used and every parameter is set, or the folder is refused with the names. Tensors
are read, checked and stored one at a time. lib/origin.py reads config.json; what differs between families is said in
lib/families.py and nowhere else.
"""

import dataclasses
import functools
import re
from pathlib import Path

import torch
import torch.nn as nn

import quant
from lib.files import (check, combine_hashes, read_tensors, sample_hash, some, write_json,
                       write_safetensors)
from lib.hollow import hollow
from lib.origin import origin_of, read_origin

# -----------------------------------------------------------------------------
# names


def last(name):
    """The last part of a dotted name."""
    return name.rpartition(".")[2]


def linear_modules(family):
    """{their module: [our modules]} of a block's linear layers."""
    modules = {theirs: ours.split() for theirs, ours in family.block_modules.items()}
    return {theirs: ours for theirs, ours in modules.items() if last(ours[0]) in quant.LINEAR_LAYERS}


@functools.cache
def shapes_of(config):
    """{our name: shape} of a whole model's parameters."""
    return {name: p.shape for name, p in hollow(config).named_parameters()}


def layout(family, shapes):
    """{their name: (our names, transposed)} of the tensors in a whole checkpoint. shapes: {our name: shape}.

    Several of ours lie one on top of the other in theirs; transposed: theirs is (in, out).
    """
    n_layer = 1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("blocks."))
    modules = {family.prefix + theirs: [ours] for theirs, ours in family.modules.items()}
    for i in range(n_layer):
        for theirs, ours in family.block_modules.items():
            modules[family.block(i) + theirs] = [f"blocks.{i}.{name}" for name in ours.split()]
    modules[family.head] = ["head"]
    names = {}
    for theirs, ours in modules.items():
        for leaf in ("weight", "bias"):
            there = [f"{name}.{leaf}" for name in ours]
            if all(name in shapes for name in there):
                is_matrix = leaf == "weight" and last(ours[0]) in quant.LINEAR_LAYERS
                names[f"{theirs}.{leaf}"] = there, is_matrix and family.transposed
    return names


def stack(family, config, parts):
    """Rows of several layers -> as the family's module holds them: one after the other, or by head."""
    if len(parts) > 1 and family.interleaved:
        by_head = [part.unflatten(0, (config.n_head, -1)) for part in parts]
        return torch.cat(by_head, 1).flatten(0, 1)
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def unstack(family, config, whole, rows):
    """The inverse of stack: a tensor -> the parts that have so many rows each."""
    if len(rows) > 1 and family.interleaved:
        by_head = whole.unflatten(0, (config.n_head, -1))
        return [part.flatten(0, 1) for part in by_head.split([n // config.n_head for n in rows], 1)]
    return whole.split(rows)


# -----------------------------------------------------------------------------
# reading

# tensors in old checkpoints that this code computes
BUFFERS = re.compile(r"\b(h|layers)\.\d+\.(attn|attention)\.(masked_)?bias$|\brotary_emb\.inv_freq$|\bembed_scale$")
WRAPPERS = ("module.", "_orig_mod.")      # what DistributedDataParallel and torch.compile put before names
TEXT = ("model.language_model.", "language_model.model.", "language_model.")     # and models of several parts
OTHER_PARTS = re.compile(r"(model\.)?(vision_tower|vision_model|visual|multi_modal_projector|audio_tower|embed_vision)\.")
HEAD_NORM = re.compile(r"(.*layernorm)\.norms\.(\d+)\.weight")     # a norm that is a list of norms, one for each head


def load_base(path, dtype=torch.float32, storage=None, device="cpu"):
    """A checkpoint's folder -> GPT, frozen.

    dtype: of the computation, and of all weights but those in storage. storage: a quant.Storage for the linear layers of
    the blocks, or None. ValueError names what is missing, not known or damaged.
    """
    origin = read_origin(path)
    family, config = origin.family, origin.config
    model = hollow(config, dtype)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    if storage:
        quant.store(model, storage, empty=True)
    names, hashes, types, unknown, head = layout(family, shapes), {}, {}, [], None
    for theirs, tensor in whole_norms(read_tensors(path), shapes):
        name = known_name(theirs, names, origin)
        if config.tied and theirs.endswith(f"{family.head}.weight"):
            head = tensor
        elif name:
            ours, transposed = names[name]
            tensor = tensor.T if transposed else tensor
            check_weight(tensor, stacked_shape([shapes[n] for n in ours]), theirs)
            rows = [shapes[n][0] for n in ours]
            for our_name, part in zip(ours, unstack(family, config, tensor, rows)):
                hashes[our_name] = sample_hash(part)
                types[our_name] = tensor.dtype
                set_parameter(model, our_name, part.contiguous().to(device), dtype, storage)
        elif not BUFFERS.search(theirs) and not (origin.wrapped and OTHER_PARTS.match(theirs)):
            unknown.append(theirs)
    missing = [name for name, (ours, _) in names.items() if not hashes.keys() >= set(ours)]
    refuse_incomplete(path, missing, unknown)
    same = head is None or torch.equal(head.to(dtype), model.embed.tokens.weight.cpu())
    check(same, f"{path}: tie_word_embeddings is true, but {family.head}.weight differs from the embedding")
    if config.tied:
        model.head.weight = model.embed.tokens.weight
    model.make_frequencies(device)
    model.base_fingerprint = combine_hashes(hashes)
    model.origin = dataclasses.replace(origin, types=types)
    return model.requires_grad_(False)


def read_head(path):
    """The head's weight (vocab_size, n_embd) of a checkpoint's folder, which is the embedding's where they are tied."""
    origin = read_origin(path)
    wanted = "embed.tokens.weight" if origin.config.tied else "head.weight"
    names = layout(origin.family, shapes_of(origin.config))
    for theirs, tensor in read_tensors(path):
        name = known_name(theirs, names, origin)
        if name and names[name][0] == [wanted]:
            return tensor
    raise ValueError(f"{path}: 1 tensors missing: {wanted}")


def known_name(theirs, names, origin):
    """The name of a whole checkpoint's layout that a file's tensor has, or None."""
    starts = "", origin.family.prefix, "model."          # a base model's file lacks the prefix or its beginning
    if origin.wrapped:
        theirs = next((theirs.removeprefix(text) for text in TEXT if theirs.startswith(text)), theirs)
    return next((start + theirs for start in starts if start + theirs in names), None)


def whole_norms(tensors, shapes):
    """(name, tensor) pairs, where norms that lie in the file one for each head have become one tensor (heads, width)."""
    heads = {}
    for theirs, tensor in tensors:
        match = HEAD_NORM.fullmatch(theirs)
        if not match:
            yield theirs, tensor
            continue
        found = heads.setdefault(match[1], {})
        found[int(match[2])] = tensor
        norm = "k_norm" if match[1].endswith("k_layernorm") else "q_norm"
        n_heads = next((shape[0] for name, shape in shapes.items() if name.endswith(f"{norm}.weight")), 0)
        if len(found) == n_heads:
            yield f"{match[1]}.weight", torch.stack([found[i] for i in sorted(found)])


def refuse_incomplete(path, missing, unknown):
    """ValueError where tensors are missing or not known."""
    for start in WRAPPERS:
        wrapped = unknown and all(name.startswith(start) for name in unknown)
        check(not wrapped, f"{path}: the tensors' names begin with {start}, because a wrapped model was saved; save the model within it")
    lists = {"missing": missing, "not known": unknown}
    problems = [f"{len(found)} tensors {what}: {some(found)}" for what, found in lists.items() if found]
    check(not problems, f"{path}: {'; '.join(problems)}")


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


# -----------------------------------------------------------------------------
# writing


def save_base(model, folder, extra=None, dtype=None):
    """Writes a model without methods (or merged) as a checkpoint for transformers: config.json and model.safetensors.

    dtype: of the weights; None: of each that of the file that it came from, in a new model the head's. extra: more keys for
    config.json, which is otherwise the one that the model came with.
    """
    folder, origin = Path(folder), origin_of(model)
    folder.mkdir(parents=True, exist_ok=True)
    weights = dict(model.named_parameters())
    for name, module in model.named_modules():
        if isinstance(module, quant.QuantLinear):
            weights[f"{name}.weight"] = module.weight_q
    shapes = {name: weight.shape for name, weight in weights.items()}
    usual, tensors = dtype or model.head.weight.dtype, {}
    types = {} if dtype else origin.types
    for theirs, (ours, transposed) in layout(origin.family, shapes).items():
        parts, own = [weights[n] for n in ours], types.get(ours[0], usual)
        if ours[0].endswith("_norm.weight") and parts[0].dim() == 2:
            for i, row in enumerate(parts[0]):
                name = f"{theirs.removesuffix('.weight')}.norms.{i}.weight"
                tensors[name] = own, row.shape, functools.partial(row.to, own)
            continue
        shape = stacked_shape([part.shape for part in parts])
        shape = shape[::-1] if transposed else shape
        tensors[theirs] = own, shape, functools.partial(stacked, origin, parts, transposed, own)
    write_safetensors(folder / "model.safetensors", tensors)
    key = "dtype" if "dtype" in origin.content else "torch_dtype"
    content = {key: str(usual).removeprefix("torch.")} | origin.content | (extra or {})
    if dtype:
        content[key] = str(dtype).removeprefix("torch.")
    if origin.wrapped:                                   # The text part stands alone now.
        content["architectures"] = [origin.family.architecture]
    write_json(folder / "config.json", content)


def stacked(origin, parts, transposed, dtype):
    """Tensors, quantized ones in dtype, as a checkpoint of that origin holds them in one."""
    dense = [part.dequantize(dtype) if isinstance(part, quant.QuantizedTensor) else part for part in parts]
    whole = stack(origin.family, origin.config, dense)
    return whole.T if transposed else whole
