"""hub.py against the transformers, safetensors and peft libraries, and against damaged folders."""

import json
import shutil
import struct
import subprocess
import sys

import pytest
import torch

import peft
import quant
from conftest import FAMILIES, ROOT, tiny
from lib import checkpoint, files, origin
from lib.generation import Cache
from model import GPT

FAMILY = pytest.mark.parametrize("family", FAMILIES)

# -----------------------------------------------------------------------------
# bases

WRITE = """
import sys, torch
from transformers import GPT2Config, OPTConfig, LlamaConfig, AutoModelForCausalLM
folder, family, kind = sys.argv[1:]
torch.manual_seed(0)
config = {"gpt2": lambda: GPT2Config(vocab_size=83, n_positions=37, n_embd=39, n_layer=3, n_head=3, n_inner=71),
          "opt": lambda: OPTConfig(vocab_size=83, max_position_embeddings=37, hidden_size=39, word_embed_proj_dim=39, num_hidden_layers=3, num_attention_heads=3, ffn_dim=71),
          "llama": lambda: LlamaConfig(vocab_size=83, max_position_embeddings=37, hidden_size=36, num_hidden_layers=3, num_attention_heads=6,
                                       num_key_value_heads=2, head_dim=10, intermediate_size=71, rope_parameters={"rope_type": "default", "rope_theta": 5000.0})}[family]()
model = AutoModelForCausalLM.from_config(config).eval()
for p in model.parameters():
    p.data += 0.1 * torch.randn_like(p)
if kind == "bin":
    config.save_pretrained(folder)
    torch.save(model.state_dict(), folder + "/pytorch_model.bin")
else:
    model.save_pretrained(folder, max_shard_size="20KB" if kind == "shards" else "1GB")
tokens = torch.randint(83, (2, 19), generator=torch.Generator().manual_seed(1))
with torch.no_grad():
    torch.save({"tokens": tokens, "logits": model(tokens).logits, "text": model.generate(tokens[:, :5], max_new_tokens=12, min_new_tokens=12, do_sample=False)}, folder + "/expected.pt")
"""


@pytest.mark.peers
@pytest.mark.parametrize("family, kind", [("gpt2", "one"), ("gpt2", "bin"), ("opt", "one"), ("opt", "shards"), ("llama", "one"), ("llama", "shards")])
def test_checkpoints_of_transformers(family, kind, peer, tmp_path):
    peer(WRITE, tmp_path, family, kind)
    expected = torch.load(tmp_path / "expected.pt", weights_only=True)
    model, tokens = checkpoint.load_base(tmp_path), expected["tokens"]
    assert (model(tokens)[0] - expected["logits"]).abs().max() < 1e-4
    cache = Cache(model.config.n_layer, 37)
    parts = [model.head(model.hidden(part, cache)) for part in tokens.split([11, 1, 7], 1)]
    assert (torch.cat(parts, 1) - expected["logits"]).abs().max() < 1e-4
    assert model.generate(tokens[:, :5], 12, temperature=0) == expected["text"].tolist()


READ = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
with torch.no_grad():
    torch.save(model(torch.load(sys.argv[1] + "/tokens.pt")).logits, sys.argv[1] + "/logits.pt")
"""


@pytest.mark.peers
@FAMILY
def test_transformers_reads_what_we_write(family, peer, tmp_path):
    torch.manual_seed(0)
    model, tokens = GPT(tiny(family)), torch.randint(61, (2, 19))
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    checkpoint.save_base(model, tmp_path)
    torch.save(tokens, tmp_path / "tokens.pt")
    peer(READ, tmp_path)
    assert (torch.load(tmp_path / "logits.pt") - model(tokens)[0]).abs().max() < 1e-4


@FAMILY
def test_round_trip(family, tmp_path):
    torch.manual_seed(0)
    model = GPT(tiny(family))
    checkpoint.save_base(model, tmp_path)
    again = checkpoint.load_base(tmp_path)
    assert origin.new_origin(again.config).content == origin.new_origin(model.config).content
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    assert again.base_fingerprint == peft.fingerprint(model)
    assert checkpoint.load_base(tmp_path, torch.bfloat16, quant.Storage("nf4", 32, True)).base_fingerprint == peft.fingerprint(model)


def test_quantized_while_read(tmp_path):
    model = GPT(tiny("llama"))
    checkpoint.save_base(model, tmp_path)
    loaded = checkpoint.load_base(tmp_path, torch.float32, quant.Storage("nf4", 32, True, ("down", "blocks.0.attn.q")))
    expected = quant.quantize(model.blocks[1].attn.q.weight, "nf4", 32, True)
    assert torch.equal(loaded.blocks[1].attn.q.weight_q.packed, expected.packed)
    dense = [name for name, m in loaded.named_modules() if isinstance(m, torch.nn.Linear)]
    assert dense == ["blocks.0.attn.q", "blocks.0.ffn.down", "blocks.1.ffn.down", "head"]
    with pytest.raises(ValueError, match="quant_skip: no linear layer 'dwon'"):
        checkpoint.load_base(tmp_path, torch.float32, quant.Storage("nf4", 32, True, ("dwon",)))


PEAK = """
import sys; sys.path.insert(0, sys.argv[1])
import torch, quant
from lib import checkpoint, machine, origin, run
machine.tune_memory()
checkpoint.load_base(sys.argv[3], torch.bfloat16, quant.Storage("nf4", 64, True))      # the code that this needs is in memory then
before = machine.peak_bytes()
model = checkpoint.load_base(sys.argv[2], torch.bfloat16, quant.Storage("nf4", 64, True))
stored = sum(v for v in run.storage_by_type(model).values())
print(before, machine.peak_bytes(), stored)
"""


def test_memory_while_a_large_base_is_read(tmp_path):
    """The quantized model, its largest tensor in float32, and 200 MB, for a checkpoint of 0.6 GB."""
    config = tiny("llama", vocab_size=3000, n_layer=12, n_head=16, n_kv_head=16, n_embd=1024, n_ffn=3072)
    with torch.device("meta"):
        model = GPT(config)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    block = torch.randn(3072 * 1024) * 0.02
    tensors = {theirs: (torch.float32, shapes[ours[0]], lambda s=shapes[ours[0]]: block[:torch.Size(s).numel()].view(s))
             for theirs, (ours, _) in checkpoint.layout(origin.new_origin(config).family, shapes).items()}
    files.write_safetensors(tmp_path / "model.safetensors", tensors)
    (tmp_path / "config.json").write_text(json.dumps(origin.new_origin(config).content))
    assert (tmp_path / "model.safetensors").stat().st_size > 0.6e9
    (tmp_path / "small").mkdir()
    checkpoint.save_base(GPT(tiny("llama")), tmp_path / "small")
    done = subprocess.run([sys.executable, "-c", PEAK, ROOT, tmp_path, tmp_path / "small"], capture_output=True, text=True, check=True)
    before, peak, stored = map(int, done.stdout.split())
    assert peak - before < stored + 3072 * 1024 * 4 + 200e6, (before, peak, stored)
    shutil.rmtree(tmp_path)


def test_the_real_model(real_data):
    import data
    folder = real_data / "stories260k"
    model, tokenizer = checkpoint.load_base(folder), data.Tokenizer.load(folder)
    text = tokenizer.decode(model.generate([[tokenizer.bos]], 60, temperature=0)[0])
    assert text.startswith("Once upon a time, there was a little girl named Lily")


def test_safetensors_by_hand(tmp_path):
    tensors = {"a": torch.randn(3, 5), "b": torch.randn(7).bfloat16(), "scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3), "i": torch.arange(4)}
    files.write_safetensors(tmp_path / "x.safetensors", files.entries_of(tensors))
    again = dict(files.read_safetensors(tmp_path / "x.safetensors"))
    assert again.keys() == tensors.keys() and all(torch.equal(tensors[n], again[n]) and tensors[n].dtype == again[n].dtype for n in tensors)
    library = pytest.importorskip("safetensors.torch")
    theirs = library.load_file(tmp_path / "x.safetensors")
    assert theirs.keys() == tensors.keys() and all(torch.equal(tensors[n], theirs[n]) for n in tensors)
    library.save_file(tensors, tmp_path / "y.safetensors", {"some": "metadata"})
    again = dict(files.read_safetensors(tmp_path / "y.safetensors"))
    assert again.keys() == tensors.keys() and all(torch.equal(tensors[n], again[n]) for n in tensors)


# -----------------------------------------------------------------------------
# what is refused


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    checkpoint.save_base(GPT(tiny("gpt2")), tmp_path)
    return tmp_path


def change(folder, **keys):
    content = json.loads((folder / "config.json").read_text()) | keys
    (folder / "config.json").write_text(json.dumps({k: v for k, v in content.items() if v != "gone"}))


@pytest.mark.parametrize("keys, words", [
    (dict(model_type="bloom"), "model_type is 'bloom': ALiBi"), (dict(model_type="bloomy"), "model_type is 'bloomy'; it must be one of gpt2, opt, llama"),
    (dict(n_layer="gone"), "n_layer is missing"), (dict(n_layer="two"), "n_layer is 'two'; it must be a whole number"),
    (dict(activation_function="mish"), "activation_function is 'mish'"), (dict(n_head=5), "n_embd 32 is not a multiple of n_head 5"),
    (dict(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx is True; only False is supported"),
    (dict(new_idea=3), "unknown key 'new_idea'"), (dict(n_layer=3), "12 tensors missing: transformer.h.2"), (dict(n_layer=1), "12 tensors not known: transformer.h.1"),
    (dict(n_embd=64), "has shape")])
def test_configurations_refused(folder, keys, words):
    change(folder, **keys)
    with pytest.raises(ValueError, match=words):
        checkpoint.load_base(folder)


def rewrite(folder, edit):
    tensors = dict(files.read_tensors(folder))
    edit(tensors)
    files.write_safetensors(folder / "model.safetensors", files.entries_of(tensors))


def test_tensors_refused(folder):
    rewrite(folder, lambda t: t.update({"extra.weight": torch.ones(2)}))
    with pytest.raises(ValueError, match="1 tensors not known: extra.weight"):
        checkpoint.load_base(folder)
    rewrite(folder, lambda t: (t.pop("extra.weight"), t.pop("transformer.ln_f.bias")))
    with pytest.raises(ValueError, match="1 tensors missing: transformer.ln_f.bias"):
        checkpoint.load_base(folder)
    rewrite(folder, lambda t: t.update({"transformer.ln_f.bias": torch.full((32,), float("nan"))}))
    with pytest.raises(ValueError, match="transformer.ln_f.bias holds NaN"):
        checkpoint.load_base(folder)
    rewrite(folder, lambda t: t.update({"transformer.ln_f.bias": torch.zeros(32, dtype=torch.int64)}))
    with pytest.raises(ValueError, match="transformer.ln_f.bias is torch.int64"):
        checkpoint.load_base(folder)
    rewrite(folder, lambda t: t.update({"transformer.ln_f.bias": torch.zeros(32), "lm_head.weight": torch.zeros(61, 32)}))
    with pytest.raises(ValueError, match="lm_head.weight differs from the embedding"):
        checkpoint.load_base(folder)


def test_old_names_are_understood(folder):
    expected = checkpoint.load_base(folder)
    rewrite(folder, lambda t: [t.update({name.removeprefix("transformer."): t.pop(name)}) for name in list(t)] + [t.update({"h.0.attn.bias": torch.ones(1, 1, 48, 48)})])
    assert checkpoint.load_base(folder).base_fingerprint == expected.base_fingerprint


def test_broken_files(folder):
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    n = struct.unpack("<Q", raw[:8])[0]
    for broken in (b"", raw[:5], raw[:8], raw[:8 + n], raw[:-1], raw + b"x", struct.pack("<Q", 2**60) + raw[8:], raw[:8] + b"{" * n + raw[8 + n:],
                   raw.replace(b'"F32"', b'"F64"', 1), raw.replace(b'"shape": [', b'"shape": [9', 1)):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match="model.safetensors"):
            checkpoint.load_base(folder)
    path.unlink()
    with pytest.raises(ValueError, match="no weights there"):
        checkpoint.load_base(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../../etc/passwd"}}))
    with pytest.raises(ValueError, match="leads out of the folder"):
        checkpoint.load_base(folder)


def test_a_pickle_is_never_run(folder, tmp_path):
    import os
    import pickle

    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "run"),)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"a": Payload()}))
    with pytest.raises(ValueError, match="pytorch_model.bin"):
        checkpoint.load_base(folder)
    assert not (tmp_path / "run").exists()


def test_a_folder_without_a_model(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match="has no config.json .it has notes.txt"):
        checkpoint.load_base(tmp_path)
