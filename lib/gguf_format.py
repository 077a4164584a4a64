"""
LoRA adapters as llama.cpp loads them: a GGUF file with MODULE.weight.lora_a (r, in) and .lora_b (out, r) in its own names.

    write_gguf(folder, content, base)        # content: of peft.read_adapter, base: a lib.origin.Origin

The optional package gguf, of llama.cpp's authors, writes it. That library takes h = W x + alpha / r B A x, where r is the
tensor's own. For Llama its rotary positions turn neighbours and not halves, so that the rows of W_q and W_k lie in another
order in its bases, and those of B with them.
"""

from lib.files import check
from lib.peft_format import linear_layers, module_name, to_peft

# family -> its name there, of those that were tried
ARCHITECTURES = {
    "llama": "LLAMA", "mistral": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3", "gpt2": "GPT2",
    "starcoder2": "STARCODER2", "olmo2": "OLMO2"}
NEIGHBOURS = ("llama", "mistral")


def gguf_package():
    """The optional package gguf. ValueError where it is not installed."""
    try:
        import gguf
    except ImportError:
        raise ValueError("--layout gguf needs the gguf package: pip install gguf") from None
    return gguf


def write_gguf(folder, content, base):
    """Writes adapter.gguf into a folder. ValueError for all but LoRA, and for families that were not tried."""
    check(content["method"] == "lora", f"{content['method']} has no place in a GGUF file; lora has, and python hub.py merge writes "
          "a model that llama.cpp's own converter takes")
    name = ARCHITECTURES.get(base.family.name)
    check(name, f"adapters over {base.family.name} are not written as GGUF; over {', '.join(ARCHITECTURES)} they are, and python hub.py "
          "merge writes a model that llama.cpp's own converter takes")
    gguf = gguf_package()
    architecture = gguf.MODEL_ARCH[name]
    names = gguf.get_tensor_name_map(architecture, base.config.n_layer)
    settings, tensors = to_peft(content, base)
    folder.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(folder / "adapter.gguf", gguf.MODEL_ARCH_NAMES[architecture])
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", settings["lora_alpha"])
    for i in range(base.config.n_layer):
        for module, layers in linear_layers(base).items():
            theirs = module_name(base, i, module)
            if f"{theirs}.lora_A.weight" in tensors:
                own = names.get_name(theirs.removeprefix("base_model.model."))
                A, B = (tensors[f"{theirs}.lora_{half}.weight"] for half in "AB")
                B = rearranged(base, B, layers)
                writer.add_tensor(f"{own}.weight.lora_a", A.contiguous().numpy())
                writer.add_tensor(f"{own}.weight.lora_b", B.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return settings


def rearranged(base, B, layers):
    """B (out, r) of a module with its rows as llama.cpp has them."""
    heads = {"attn.q": base.config.n_head, "attn.k": base.config.kv_heads}.get(next(iter(layers)))
    if base.family.name not in NEIGHBOURS or not heads:
        return B
    halves = B.view(heads, 2, -1, B.size(1))                     # (heads, half, pair, r)
    return halves.transpose(1, 2).reshape(B.shape)               # (heads, pair, half, r)
