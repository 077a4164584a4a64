"""
Bottleneck adapters in AdapterHub's layout: adapter_config.json, and the tensors as adapter.safetensors or
pytorch_adapter.bin.

    write_adapterhub(folder, content, base, "tuned")               # content: of peft.read_adapter
    method, options, tensors = from_adapterhub(folder, base)       # base: a lib.origin.Origin

That library loads the .bin file unless it is told use_safetensors, so both files are written; the safetensors file
is read where there is one.
"""

from itertools import product
from pathlib import Path

import torch
import torch.nn as nn

from lib.checks import check, shown, typed
from lib.files import (entries_of, located, read_json, read_tensors, some, torch_bytes, write_atomic,
                       write_json, write_safetensors)

FILES = ("adapter.safetensors", "pytorch_adapter.bin")
HUB_STYLES = {
    "houlsby": {"mh_adapter": True, "original_ln_before": False, "ln_before": False},
    "pfeiffer": {"mh_adapter": False, "original_ln_before": True, "ln_before": False},
    "lin": {"mh_adapter": False, "original_ln_before": True, "ln_before": True}}
HUB_FIXED = {   # read, and refused where they are anything else
    "output_adapter": True, "is_parallel": False, "phm_layer": False, "ln_after": False, "scaling": 1.0,
    "use_gating": False, "inv_adapter": None}
HUB_DEFAULTS = {   # written because that library expects them; without effect beside those above
    "original_ln_after": True, "adapter_residual_before_ln": False, "residual_before_ln": True,
    "cross_adapter": False, "dropout": 0.0, "factorized_phm_W": True, "factorized_phm_rule": False,
    "init_weights": "bert", "learn_phm": True, "hypercomplex_nonlinearity": "glorot-uniform",
    "inv_adapter_reduction_factor": None, "leave_out": [], "phm_bias": True, "phm_c_init": "normal", "phm_dim": 4,
    "phm_init_range": 0.0001, "phm_rank": 1, "shared_W_phm": False, "shared_phm_rule": True,
    "stochastic_depth": 0.0}


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
          "--layout peft takes lora, dora, vera, ia3, prompt, prefix and bitfit")
    check_name(name)
    options, family = content["options"], base.family
    style = options["adapter_style"]
    factor = reduction_factor(base.config.n_embd, options["adapter_size"])
    shape = {"reduction_factor": factor, "non_linearity": options["adapter_activation"]}
    settings = {
        "name": name, "config": shape | HUB_STYLES[style] | HUB_FIXED | HUB_DEFAULTS, "config_id": "",
        "hidden_size": base.config.n_embd, "model_class": family.architecture, "model_type": family.name,
        "model_name": "", "version": "adapters.1.3.0"}
    names = hub_names(base, style, name)
    return settings, {theirs: content["tensors"][ours] for theirs, ours in names.items()}


def check_name(name):
    """ValueError for a name that no module can have, as which that library keeps an adapter."""
    possible = name and "." not in name and not hasattr(nn.ModuleDict(), name)
    check(possible, f"name is {name!r}, with which AdapterHub's library cannot load an adapter; give one without dots as --name NAME")


def reduction_factor(width, size):
    """
    The factor from which that library makes the size again, as int(width // factor): the quotient, or where this
    is rounded so that one less comes out, that of half a row more.
    """
    factor = width / size
    return factor if width // factor == size else width / (size + 0.5)


def write_adapterhub(folder, content, base, name):
    """Writes an adapter as a folder of that library; returns its adapter_config."""
    settings, tensors = to_adapterhub(content, base, name)
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / FILES[0], entries_of(tensors))
    copies = {theirs: t.clone() for theirs, t in tensors.items()}
    write_atomic(folder / FILES[1], torch_bytes(copies))
    write_json(folder / "adapter_config.json", settings)
    return settings


def from_adapterhub(folder, base):
    """(method, options, tensors) of a folder in AdapterHub's layout; peft.load_state then checks that they are
    complete. ValueError for what is no bottleneck adapter of the three styles."""
    settings = read_json(Path(folder, "adapter_config.json"))
    file = next((path for path in (Path(folder, name) for name in FILES) if path.is_file()), None)
    check(file, f"{folder}: neither {' nor '.join(FILES)} is there")
    tensors = {name: t.float() for name, t in read_tensors(file)}
    with located(folder):
        inner, name = settings.get("config"), settings.get("name")
        ours = isinstance(inner, dict) and isinstance(name, str)
        check(ours, "adapter_config.json has no name and config, so it is not AdapterHub's")
        flags = {key: bool(inner.get(key)) for key in HUB_STYLES["lin"]}
        style = next((style for style, needed in HUB_STYLES.items() if needed == flags), None)
        check(style, f"{flags} is not known; only Houlsby's, Pfeiffer's and Lin's adapters can be read")
        for key, wanted in HUB_FIXED.items():
            value = inner.get(key, wanted)
            check(value == wanted, f"{key} is {shown(value)}; only {wanted!r} can be read")
        out = take_all(tensors, hub_names(base, style, name))
        activation = typed("non_linearity", inner.get("non_linearity"), str)
        down = out["blocks.0.adapter2.down.weight"]
        check(down.dim() == 2, f"adapter_down has shape {tuple(down.shape)}; it must be (adapter_size, width)")
    size = len(down)
    return "adapter", {"adapter_style": style, "adapter_size": size, "adapter_activation": activation}, out


def take_all(tensors, names):
    """{our name: tensor} of the names {theirs: ours}. ValueError where one is missing, or one is left over."""
    out = {}
    for theirs, ours in names.items():
        check(theirs in tensors, f"lacks {theirs}")
        out[ours] = tensors.pop(theirs)
        twin = theirs.replace("adapter_down.0", "adapter_norm_before")   # the library's second name of Lin's LayerNorm
        if twin in tensors and torch.equal(out[ours], tensors[twin]):
            del tensors[twin]
    check(not tensors, f"{len(tensors)} tensors are not known: {some(tensors)}")
    return out
