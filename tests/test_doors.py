"""Adapters out to PEFT and AdapterHub and back, merged checkpoints, what is in an adapter; with the peers' own libraries as oracles."""

import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys

import pytest
import torch

import data
import hub
import peft
import quant
from conftest import ROOT, tiny
from model import GPT
from lib import checkpoint, files, origin, run
from lib.adapterhub import HUB_STYLES, reduction_factor
from lib.config import Config, read_toml, write_toml

PEFT_METHODS = [("lora", {}), ("lora", dict(targets="q,v", rslora=True)), ("lora", dict(targets="k,up")), ("ia3", {}), ("prompt", dict(prompt_length=3)),
                ("prefix", dict(prefix_length=3, prefix_style="after")), ("prefix", dict(prefix_length=3, prefix_style="after", prefix_mlp=8)), ("bitfit", {}), ("bitfit+lora", {}),
                ("dora", {}), ("dora", dict(targets="q,k,v,down", rslora=True)),
                ("lora+embed", {}), ("lora+embed+head+norm", {}), ("ia3+embed+norm", {}), ("dora+norm", {}), ("lora+head", {}), ("norm", {}), ("bitfit+lora+norm", {}), ("bitfit+embed", {})]
TOKENS = torch.randint(59, (2, 11), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    """Folders of a tiny random GPT-2 and Llama, with a tokenizer."""
    tokenizer = data.Tokenizer.train(["the cat sat on the mat"] * 3, 300)
    folders = {}
    for family in ("gpt2", "llama"):
        torch.manual_seed(0)
        model = GPT(tiny(family, vocab_size=tokenizer.vocab_size))
        for p in model.parameters():
            p.data += 0.05 * torch.randn_like(p)
        folders[family] = tmp_path_factory.mktemp(family)
        checkpoint.save_base(model, folders[family])
        tokenizer.save(folders[family])
    return folders


def make_run(base, folder, method, options, seed=1):
    """A run as train.py leaves it, with random tensors; returns its logits."""
    model = checkpoint.load_base(base)
    peft.apply(model, method, **dict(rank=3, adapter_size=4) | options)
    torch.manual_seed(seed)
    with torch.no_grad():
        for _, p, m in peft.parameters_by_method(model):
            if m:
                p += 0.1 * torch.randn_like(p)
    folder.mkdir()
    peft.save_adapter(model, folder / "adapter.pt")
    config = Config(**dict(method=method, base=str(base), rank=3, adapter_size=4, dtype="float32") | options)
    (folder / "config.toml").write_text(write_toml(config))
    data.Tokenizer.load(base).save(folder)
    return logits(model)


def logits(model, tokens=TOKENS):
    with torch.no_grad():
        return model.eval()(tokens)[0]


PEFT_LOGITS = """
import sys, json, torch
from transformers import AutoModelForCausalLM
from peft import PeftModel
base, adapter, tokens, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
model = PeftModel.from_pretrained(model, adapter).eval()
logits = model(torch.tensor(json.loads(tokens))).logits
torch.save(logits[:, -len(json.loads(tokens)[0]):].detach().contiguous(), out)
"""


def possible(family, method):
    return not (family == "llama" and "bitfit" in method or family == "gpt2" and method == "lora+head")


@pytest.mark.peers
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_peft_computes_the_same_from_what_we_export(peer, bases, tmp_path, family):
    """All methods in one process: starting it takes longer than everything else."""
    script, expected = [], {}
    for i, (method, options) in enumerate(PEFT_METHODS):
        if possible(family, method):
            expected[i] = make_run(bases[family], tmp_path / f"run{i}", method, options)
            hub.export(tmp_path / f"run{i}", tmp_path / f"out{i}", "peft")
            script.append(f"sys.argv[1:] = [{str(bases[family])!r}, {str(tmp_path / f'out{i}')!r}, {json.dumps(TOKENS.tolist())!r}, {str(tmp_path / f'logits{i}')!r}]\nexec(code)")
    peer(f"import sys\ncode = {PEFT_LOGITS!r}\n" + "\n".join(script))
    for i, ours in expected.items():
        theirs = torch.load(tmp_path / f"logits{i}", weights_only=True)
        assert (ours - theirs).abs().max() < 1e-5, (PEFT_METHODS[i], (ours - theirs).abs().max())


PEFT_TRAINS = """
import sys, json, torch
from transformers import AutoModelForCausalLM
from peft import *
base, out, tokens = sys.argv[1], sys.argv[2], torch.tensor(json.loads(sys.argv[3]))
gpt2 = "gpt2" in json.load(open(base + "/config.json"))["model_type"]
linear = ["attn.c_attn", "mlp.c_fc"] if gpt2 else ["q_proj", "v_proj", "down_proj"]
configs = {"lora": LoraConfig(task_type="CAUSAL_LM", r=3, lora_alpha=7, target_modules=linear, fan_in_fan_out=gpt2, init_lora_weights=False),
           "rslora": LoraConfig(task_type="CAUSAL_LM", r=3, target_modules=linear, fan_in_fan_out=gpt2, use_rslora=True, rank_pattern={linear[1]: 2}, init_lora_weights=False),
           "ia3": IA3Config(task_type="CAUSAL_LM", target_modules=["attn.c_attn", "mlp.c_proj"] if gpt2 else ["k_proj", "v_proj", "down_proj"],
                            feedforward_modules=["mlp.c_proj"] if gpt2 else ["down_proj"], fan_in_fan_out=gpt2),
           "whole": LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=linear, fan_in_fan_out=gpt2, modules_to_save=["wte" if gpt2 else "embed_tokens", "lm_head", *(["ln_1", "ln_2", "ln_f"] if gpt2 else ["norm"])],
                               ensure_weight_tying=gpt2),
           "head": IA3Config(task_type="CAUSAL_LM", target_modules=["attn.c_attn", "mlp.c_proj"] if gpt2 else ["k_proj", "v_proj", "down_proj"],
                            feedforward_modules=["mlp.c_proj"] if gpt2 else ["down_proj"], modules_to_save=["ln_1", "ln_2", "ln_f"] if gpt2 else ["lm_head"], fan_in_fan_out=gpt2),
           "prompt": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), "prefix": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)}
for name, config in configs.items():
    torch.manual_seed(3)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, weight_decay=0.0)
    for _ in range(3):
        model(tokens, labels=tokens).loss.backward()
        if gpt2 and name in ("ia3", "head"):
            for n, p in model.named_parameters():
                if "c_attn" in n and p.grad is not None: p.grad[:len(p) // 3] = 0
        optimizer.step(); optimizer.zero_grad()
    model.eval().save_pretrained(out + "/" + name)
    torch.save(model(tokens).logits[:, -tokens.size(1):].detach().contiguous(), out + "/" + name + ".pt")
"""


@pytest.mark.peers
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_what_peft_has_trained_is_read(peer, bases, tmp_path, family):
    peer(PEFT_TRAINS, bases[family], tmp_path, json.dumps(TOKENS.tolist()))
    for name in ("lora", "rslora", "whole", "ia3", "head", "prompt", "prefix"):
        hub.import_adapter(tmp_path / name, bases[family], tmp_path / f"{name}_run")
        model, _, _ = run.load_run(tmp_path / f"{name}_run", "cpu", "float32")
        theirs = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        assert (logits(model) - theirs).abs().max() < 1e-5, (name, (logits(model) - theirs).abs().max())


TIED = """
import sys, json, torch
from transformers import AutoModelForCausalLM
from peft import LoraConfig, PeftModel, get_peft_model
base, ours, theirs, tokens, out = sys.argv[1:]
tokens = torch.tensor(json.loads(tokens))
load = lambda: AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
torch.save(PeftModel.from_pretrained(load(), ours).eval()(tokens).logits.detach(), out + "/ours")
config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True, init_lora_weights=False)
model = get_peft_model(load(), config)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
model(tokens, labels=tokens).loss.backward()
optimizer.step()
model.eval().save_pretrained(theirs)
torch.save(model(tokens).logits.detach(), out + "/theirs")
"""


@pytest.mark.peers
def test_a_tied_llamas_table_goes_to_peft_and_comes_from_there(peer, bases, tmp_path):
    torch.manual_seed(0)
    checkpoint.save_base(GPT(tiny("llama", vocab_size=300, tied=True)), tmp_path / "base")
    data.Tokenizer.load(bases["llama"]).save(tmp_path / "base")
    ours = make_run(tmp_path / "base", tmp_path / "run", "lora+embed+norm", {})
    hub.export(tmp_path / "run", tmp_path / "out")
    peer(TIED, tmp_path / "base", tmp_path / "out", tmp_path / "trained", json.dumps(TOKENS.tolist()), tmp_path)
    assert (ours - torch.load(tmp_path / "ours", weights_only=True)).abs().max() < 1e-5
    model = hub.import_adapter(tmp_path / "trained", tmp_path / "base", tmp_path / "again")
    assert list(peft.methods(model)) == ["lora", "embed"] and model.head.weight is model.embed.tokens.weight
    assert (logits(model) - torch.load(tmp_path / "theirs", weights_only=True)).abs().max() < 1e-5


ADAPTERS_LOGITS = """
import sys, json, torch, adapters
from transformers import AutoModelForCausalLM
base, out, tokens = sys.argv[1], sys.argv[2], torch.tensor(json.loads(sys.argv[3]))
for style in ("houlsby", "pfeiffer", "lin", "odd"):
    model = AutoModelForCausalLM.from_pretrained(out + "/wide" if style == "odd" else base, dtype=torch.float32)
    adapters.init(model)
    name = model.load_adapter(out + "/out_" + style)
    model.set_active_adapters(name)
    torch.save(model.eval()(tokens).logits.detach(), out + "/logits_" + style)
    model.save_adapter(out + "/back_" + style, name, use_safetensors=style == "pfeiffer")
"""


@pytest.mark.peers
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_adapterhub_computes_the_same(bases, tmp_path, family):
    if "NANOPEFT_ADAPTERS" not in os.environ:
        pytest.skip("NANOPEFT_ADAPTERS does not name a Python with the adapters package")
    expected = {}
    for style in HUB_STYLES:
        expected[style] = make_run(bases[family], tmp_path / f"run_{style}", "adapter", dict(adapter_style=style, adapter_activation="swish"))
        hub.export(tmp_path / f"run_{style}", tmp_path / f"out_{style}", "adapterhub", "tuned")
    checkpoint.save_base(GPT(tiny(family, vocab_size=300, n_embd=64)), tmp_path / "wide")
    data.Tokenizer.load(bases[family]).save(tmp_path / "wide")
    expected["odd"] = make_run(tmp_path / "wide", tmp_path / "run_odd", "adapter", dict(adapter_size=5))     # 64 // (64 / 5) is 4
    hub.export(tmp_path / "run_odd", tmp_path / "out_odd", "adapterhub")
    done = subprocess.run([os.environ["NANOPEFT_ADAPTERS"], "-I", "-W", "ignore", "-c", ADAPTERS_LOGITS, bases[family], tmp_path, json.dumps(TOKENS.tolist())],
                          cwd="/", capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    for style, ours in expected.items():
        theirs = torch.load(tmp_path / f"logits_{style}", weights_only=True)
        assert (ours - theirs).abs().max() < 1e-5, (style, (ours - theirs).abs().max())
        base = tmp_path / "wide" if style == "odd" else bases[family]
        hub.import_adapter(tmp_path / f"back_{style}", base, tmp_path / f"again_{style}")               # as that library writes it
        model, _, _ = run.load_run(tmp_path / f"again_{style}", "cpu", "float32")
        assert torch.equal(logits(model), ours)


def test_adapterhubs_factor_gives_the_size():
    """By that library's own formula, for a width's every size and beyond it; where the quotient does, it is written."""
    for width in (8, 39, 48, 64, 100, 576, 768, 1000, 2048, 4096):
        for size in range(1, 2 * width + 1):
            factor = reduction_factor(width, size)
            assert int(width // factor) == size
            assert factor == width / size or int(width // (width / size)) != size
    assert (reduction_factor(768, 48), reduction_factor(64, 5) == 64 / 5) == (16.0, False)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("method, options", PEFT_METHODS + [("adapter", dict(adapter_style=style)) for style in HUB_STYLES])
def test_out_and_in_again(bases, tmp_path, family, method, options):
    if not possible(family, method):
        pytest.skip("refused")
    ours = make_run(bases[family], tmp_path / "run", method, options)
    hub.export(tmp_path / "run", tmp_path / "out", "adapterhub" if method == "adapter" else "peft")
    hub.import_adapter(tmp_path / "out", bases[family], tmp_path / "again")
    model, _, config = run.load_run(tmp_path / "again", "cpu", "float32")
    torch.testing.assert_close(logits(model), ours, rtol=0, atol=1e-5)
    assert config.method == (method.replace("+head", "") if family == "gpt2" else method)      # there the head is the embedding


MERGED_LOGITS = """
import sys, json, torch
from transformers import AutoModelForCausalLM
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.save(model(torch.tensor(json.loads(sys.argv[1]))).logits.detach(), folder + "/logits.pt")
"""


@pytest.mark.peers
def test_a_merged_folder_is_a_checkpoint_of_transformers(peer, bases, tmp_path):
    expected = {}
    for family, method in (("gpt2", "lora+ia3"), ("llama", "lora"), ("gpt2", "bitfit"), ("llama", "top"), ("gpt2", "lora+embed"), ("llama", "lora+embed+head+norm")):
        name = f"{family}_{method}"
        expected[name] = make_run(bases[family], tmp_path / f"run_{name}", method, {})
        hub.merge_run(tmp_path / f"run_{name}", tmp_path / name)
    peer(MERGED_LOGITS, json.dumps(TOKENS.tolist()), *(tmp_path / name for name in expected))
    for name, ours in expected.items():
        assert (torch.load(tmp_path / name / "logits.pt", weights_only=True) - ours).abs().max() < 1e-5
        assert torch.allclose(logits(checkpoint.load_base(tmp_path / name)), ours, atol=1e-5)
        assert data.Tokenizer.load(tmp_path / name).encode("the cat")


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_gguf_file(bases, tmp_path, family):
    """As llama.cpp has its tensors. The oracle of the order of rows is its converter's own expression (LlamaModel.permute)."""
    gguf = pytest.importorskip("gguf")
    make_run(bases[family], tmp_path / "run", "lora", dict(rslora=True))
    settings = hub.export(tmp_path / "run", tmp_path / "out", "gguf")
    hub.export(tmp_path / "run", tmp_path / "peft")
    theirs = dict(files.read_tensors(tmp_path / "peft" / "adapter_model.safetensors"))
    reader = gguf.GGUFReader(tmp_path / "out" / "adapter.gguf")
    assert reader.fields["general.architecture"].contents() == family and reader.fields["adapter.type"].contents() == "lora"
    assert reader.fields["adapter.lora.alpha"].contents() == pytest.approx(settings["lora_alpha"])
    found = {t.name: torch.from_numpy(t.data.copy()) for t in reader.tensors}
    assert len(found) == len(theirs)
    if family == "llama":
        B = theirs["base_model.model.model.layers.1.self_attn.k_proj.lora_B.weight"].numpy()
        expected = B.reshape(2, 2, len(B) // 4, -1).swapaxes(1, 2).reshape(B.shape)
        assert (found["blk.1.attn_k.weight.lora_b"].numpy() == expected).all() and not (B == expected).all()
        assert torch.equal(found["blk.1.ffn_down.weight.lora_b"], theirs["base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"])
    else:
        assert torch.equal(found["blk.0.attn_qkv.weight.lora_a"], theirs["base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"])
    assert len({len(t) for name, t in theirs.items() if "lora_A" in name}) == 1          # one rank, so one scale


def test_what_no_gguf_file_holds(bases, tmp_path):
    make_run(bases["llama"], tmp_path / "run", "dora", {})
    with pytest.raises(ValueError, match="dora has no place in a GGUF file"):
        hub.export(tmp_path / "run", tmp_path / "out", "gguf")
    assert not (tmp_path / "out").exists()


def test_show(bases, tmp_path):
    make_run(bases["gpt2"], tmp_path / "run", "lora", dict(targets="q", rank=2))
    lines = list(hub.show(tmp_path / "run"))
    content = peft.read_adapter(tmp_path / "run" / "adapter.pt")
    delta = 8.0 * content["tensors"]["blocks.1.attn.q.B"] @ content["tensors"]["blocks.1.attn.q.A"]
    assert lines[0].split(": ")[1].startswith("lora, format 1, 256 parameters in 4 tensors") and len(lines) == 4
    values = torch.linalg.svdvals(delta)[:2]
    p = values / values.sum()
    assert f"{delta.norm():9.4f}" in lines[3] and f"effective rank {float((-p * p.log()).sum().exp()):5.2f} of 2" in lines[3]


# -----------------------------------------------------------------------------
# DoRA's layout, from made tensors: what PEFT merges is m (W + s B A) / |W + s B A|, row by row


def dora(config, names, rank=3, alpha=6.0):
    """An adapter of DoRA with random tensors on the named layers, and s."""
    with torch.device("meta"):
        blocks = GPT(config).blocks
    generator, tensors = torch.Generator().manual_seed(0), {}
    for i, block in enumerate(blocks):
        for name in names:
            rows, columns = block.get_submodule(name).weight.shape
            for key, shape in (("A", (rank, columns)), ("B", (rows, rank)), ("m", (rows,))):
                tensors[f"blocks.{i}.{name}.{key}"] = torch.randn(shape, generator=generator)
    options = {"rank": rank, "alpha": alpha, "dropout": 0.0, "rslora": False, "targets": ",".join(n.split(".")[1] for n in names)}
    return {"method": "dora", "options": options, "tensors": tensors}, alpha / rank


def write_peft(folder, settings, tensors):
    folder.mkdir()
    files.write_safetensors(folder / "adapter_model.safetensors", files.entries_of(tensors))
    (folder / "adapter_config.json").write_text(json.dumps(settings))


DORA_LAYERS = [("gpt2", ["attn.q", "attn.k", "attn.v", "ffn.down"]), ("llama", ["attn.q", "attn.v", "ffn.gate"])]
PEFT_MERGED = """
import sys, torch
from transformers import AutoModelForCausalLM
from peft import PeftModel
base, adapter, out, again = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
model.save_pretrained(again)
torch.save({name: t.contiguous() for name, t in model.merge_and_unload().state_dict().items()}, out)
"""


@pytest.mark.peers
@pytest.mark.parametrize("family, names", DORA_LAYERS)
def test_peft_merges_the_dora_that_we_write(peer, bases, tmp_path, family, names):
    base = checkpoint.load_base(bases[family])
    content, s = dora(base.config, names)
    write_peft(tmp_path / "out", *hub.to_peft(content, base.origin))
    peer(PEFT_MERGED, bases[family], tmp_path / "out", tmp_path / "merged.pt", tmp_path / "again")
    merged, t = torch.load(tmp_path / "merged.pt", weights_only=True), content["tensors"]
    for theirs, (ours, transposed) in checkpoint.layout(base.origin.family, checkpoint.shapes_of(base.config)).items():
        if ours[0].startswith("blocks.") and f"{ours[0].removesuffix('.weight')}.m" in t:
            for name, part in zip(ours, (merged[theirs].T if transposed else merged[theirs]).split([len(base.get_parameter(n)) for n in ours])):
                layer = name.removesuffix(".weight")
                V = base.get_parameter(name) + s * t[f"{layer}.B"] @ t[f"{layer}.A"]
                assert (part - t[f"{layer}.m"][:, None] * V / V.norm(dim=1, keepdim=True)).abs().max() < 1e-5
    keys = [set(dict(files.read_tensors(tmp_path / folder / "adapter_model.safetensors"))) for folder in ("out", "again")]
    assert keys[0] == keys[1]                                    # as that library writes it


@pytest.mark.parametrize("family, names", DORA_LAYERS)
def test_dora_out_and_in_again(tmp_path, family, names):
    config = tiny(family)
    content, s = dora(config, names)
    settings, tensors = hub.to_peft(content, origin.new_origin(config))
    assert settings["use_dora"] and all(t.dim() == 1 for name, t in tensors.items() if name.endswith(".lora_magnitude_vector"))
    write_peft(tmp_path / "out", settings, tensors)
    method, options, again = hub.from_peft(tmp_path / "out", origin.new_origin(config))
    before = content["tensors"]
    assert method == "dora" and again.keys() == before.keys() and set(options["targets"].split(",")) == set(content["options"]["targets"].split(","))
    for name in before:
        layer, _, leaf = name.rpartition(".")
        if leaf == "m":
            assert torch.equal(again[name], before[name])
        else:
            change = options["alpha"] / options["rank"] * again[f"{layer}.B"] @ again[f"{layer}.A"]
            assert (change - s * before[f"{layer}.B"] @ before[f"{layer}.A"]).abs().max() < 1e-5


def test_dora_that_peft_has_no_place_for(tmp_path):
    config = tiny("gpt2")
    content, _ = dora(config, ["attn.q", "attn.v"])
    with pytest.raises(ValueError, match="train with --targets containing q,k,v"):
        hub.to_peft(content, origin.new_origin(config))
    content, _ = dora(config, ["ffn.up"])
    settings, tensors = hub.to_peft(content, origin.new_origin(config))
    write_peft(tmp_path / "out", settings | {"use_dora": False}, tensors)
    with pytest.raises(ValueError, match="use_dora is False, but 2 magnitude vectors are there"):
        hub.from_peft(tmp_path / "out", origin.new_origin(config))


# -----------------------------------------------------------------------------
# added, and merged into storage


def test_adapters_added_are_a_run(bases, tmp_path, script, refused):
    expected = checkpoint.load_base(bases["llama"])
    for name, rank, weight in (("one", 2, 1.0), ("the other", 3, -0.5)):
        make_run(bases["llama"], tmp_path / name, "lora", dict(rank=rank, rslora=True, targets="q,down"), seed=rank)
        tensors = peft.read_adapter(tmp_path / name / "adapter.pt")["tensors"]
        for layer in {key.rpartition(".")[0] for key in tensors}:
            expected.get_submodule(layer).weight.data += weight * 16 / rank**0.5 * tensors[f"{layer}.B"] @ tensors[f"{layer}.A"]
    done = script("hub.py", "add", "one", "the other", "their sum", "--weights", 1, -0.5, cwd=tmp_path)
    assert done.returncode == 0 and f"python sample.py {shlex.quote('their sum')} --prompt" in done.stdout, done.stderr
    model, _, config = run.load_run(tmp_path / "their sum", "cpu", "float32")
    assert (logits(model) - logits(expected)).abs().max() < 1e-5 and (config.rank, config.rslora) == (5, False)
    assert "their sum: holds something already" in refused("hub.py", "add", "one", "the other", "their sum", cwd=tmp_path)
    assert "1 weights for 2 runs" in refused("hub.py", "add", "one", "the other", "new", "--weights", 1, cwd=tmp_path)
    make_run(bases["gpt2"], tmp_path / "third", "lora", {})
    assert "adapters of different bases" in refused("hub.py", "add", "one", "third", "new", cwd=tmp_path)
    assert not (tmp_path / "new").exists()


def test_a_sum_keeps_the_template(bases, tmp_path, refused):
    for name, template in (("one", "{{ 1 }}"), ("same", "{{ 1 }}"), ("none", ""), ("other", "{{ 2 }}")):
        make_run(bases["llama"], tmp_path / name, "lora", {})
        if template:
            (tmp_path / name / "chat_template.jinja").write_text(template)
    hub.add_runs([tmp_path / name for name in ("one", "same", "none")], tmp_path / "sum")
    assert (tmp_path / "sum" / "chat_template.jinja").read_text() == "{{ 1 }}"
    hub.add_runs([tmp_path / "none", tmp_path / "one"], tmp_path / "without")
    assert not (tmp_path / "without" / "chat_template.jinja").exists()
    said = refused("hub.py", "add", "one", "other", "new", cwd=tmp_path)
    assert "other: learnt another chat template than one (chat_template.jinja); add up runs of one template" in said
    assert not (tmp_path / "new").exists()


def test_merging_into_storage_tells_what_it_costs(bases, tmp_path, script, refused):
    make_run(bases["llama"], tmp_path / "run", "lora", {})
    assert "its base is not quantized" in refused("hub.py", "merge", "run", "merged", "--requantize", cwd=tmp_path)
    config = Config(**read_toml(tmp_path / "run" / "config.toml"))
    stored = dataclasses.replace(config, quant="nf4", quant_double=False, quant_skip="v")
    (tmp_path / "run" / "config.toml").write_text(write_toml(stored))
    done = script("hub.py", "merge", "run", "merged", "--requantize", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    tokens = torch.arange(48)[None]
    with_adapter = run.load_run(tmp_path / "run", "cpu", "float32")[0]
    base = run.load_base(stored, torch.device("cpu"), torch.float32)[0]
    merged = checkpoint.load_base(tmp_path / "merged")
    a, b, m = (logits(model, tokens) for model in (with_adapter, base, merged))
    said = [float(number) for number in re.findall(r"the merged layers change a logit by ([\d.e-]+?); |by ([\d.e-]+), |is ([\d.e-]+) away", done.stdout) for number in number if number]
    assert said == pytest.approx([(x - y).abs().mean().item() for x, y in ((a, b), (m, b), (m, a))], rel=1e-3)
    for name, weight in merged.named_parameters():
        if ".attn." in name or ".ffn." in name:
            again = quant.quantize(weight, "nf4").dequantize()
            assert torch.equal(again, weight) == (".v." not in name)      # only what is in storage already stays as it is
    make_run(bases["llama"], tmp_path / "norms", "norm", {})
    config = Config(**read_toml(tmp_path / "norms" / "config.toml"))
    (tmp_path / "norms" / "config.toml").write_text(write_toml(dataclasses.replace(config, quant="nf4")))
    done = script("hub.py", "merge", "norms", "merged norms", "--requantize", cwd=tmp_path)
    assert "0 layers merged" in done.stdout and "the merged layers change a logit by 0; " in done.stdout, done.stderr


def test_help_without_torch():
    code = "import runpy, sys; sys.argv = ['hub.py', 'add', '--help']; runpy.run_path('hub.py', run_name='__main__')"
    watch = f"import atexit, sys; atexit.register(lambda: print('torch' in sys.modules)); {code}"
    done = subprocess.run([sys.executable, "-c", watch], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "--weights" in done.stdout and done.stdout.endswith("False\n"), done.stdout + done.stderr


# -----------------------------------------------------------------------------
# refused


def test_what_a_layout_has_no_place_for(bases, tmp_path):
    for i, (method, options, layout, words) in enumerate([
            ("prefix", {}, "peft", "--prefix_style after"), ("adapter", {}, "peft", "--layout adapterhub"), ("full", {}, "peft", "python hub.py merge"),
            ("lora+prompt", {}, "peft", "has no place"), ("lora", {}, "adapterhub", "--layout peft takes lora"), ("lora", {}, "x", "layout is 'x'")]):
        make_run(bases["gpt2"], tmp_path / str(i), method, options)
        with pytest.raises(ValueError, match=words):
            hub.export(tmp_path / str(i), tmp_path / "out", layout)
        assert not (tmp_path / "out").exists()
    make_run(bases["gpt2"], tmp_path / "run", "adapter", {})
    for name in ("", "v1.0", "keys"):
        with pytest.raises(ValueError, match=f"name is '{name}', with which AdapterHub's library cannot load"):
            hub.export(tmp_path / "run", tmp_path / "out", "adapterhub", name)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change, words", [
    (dict(use_dora=True), "use_dora is True"), (dict(peft_type="LOHA"), "peft_type is 'LOHA'"), (dict(layers_to_transform=[0]), "layers_to_transform"),
    (dict(modules_to_save=["lm_head"]), "modules_to_save names 'lm_head', of which no tensor"), (dict(r=5), "rank 9; adapter_config.json says 5"), (dict(lora_alpha=None), "lora_alpha is None")])
def test_configurations_that_are_refused(bases, tmp_path, change, words):
    make_run(bases["gpt2"], tmp_path / "run", "lora", dict(targets="q,k,v"))
    hub.export(tmp_path / "run", tmp_path / "out")
    said = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    (tmp_path / "out" / "adapter_config.json").write_text(json.dumps(said | change))
    with pytest.raises(ValueError, match=words):
        hub.import_adapter(tmp_path / "out", bases["gpt2"], tmp_path / "again")
    assert not (tmp_path / "again").exists()


def edit_tensors(folder, change):
    """Rewrites a folder in PEFT's layout after change({name: tensor})."""
    tensors = dict(files.read_tensors(folder / "adapter_model.safetensors"))
    change(tensors)
    files.write_safetensors(folder / "adapter_model.safetensors", files.entries_of(tensors))


def test_tables_that_peft_trained_apart(bases, tmp_path):
    make_run(bases["gpt2"], tmp_path / "run", "lora+embed", {})
    hub.export(tmp_path / "run", tmp_path / "out")
    said = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert said["modules_to_save"] == ["wte", "lm_head"] and said["ensure_weight_tying"] is True
    head = "base_model.model.lm_head.weight"
    edit_tensors(tmp_path / "out", lambda tensors: tensors[head].add_(1))
    with pytest.raises(ValueError, match="embedding and head were trained apart, but this base has one table for both"):
        hub.import_adapter(tmp_path / "out", bases["gpt2"], tmp_path / "again")
    edit_tensors(tmp_path / "out", lambda tensors: tensors.pop(head))
    (tmp_path / "out" / "adapter_config.json").write_text(json.dumps(said | {"modules_to_save": ["wte"]}))
    with pytest.raises(ValueError, match="trained apart"):
        hub.import_adapter(tmp_path / "out", bases["gpt2"], tmp_path / "again")
    model = GPT(tiny("stablelm"))
    peft.apply(model, "lora+norm", rank=2)
    with pytest.raises(ValueError, match="a weight for each head, for which PEFT's layout has no place here"):
        hub.to_peft(peft.pack_adapter(model), origin.new_origin(model.config))


def test_a_checkpoint_is_of_the_bases_type_however_it_was_computed(bases, tmp_path):
    make_run(bases["llama"], tmp_path / "run", "lora+embed+head", {})
    config = dataclasses.replace(Config(**read_toml(tmp_path / "run" / "config.toml")), dtype="bfloat16")
    (tmp_path / "run" / "config.toml").write_text(write_toml(config))
    for dtype, expected in (("", torch.float32), ("bfloat16", torch.bfloat16)):
        hub.merge_run(tmp_path / "run", tmp_path / f"merged{dtype}", dtype=dtype)
        assert {t.dtype for _, t in files.read_tensors(tmp_path / f"merged{dtype}")} == {expected}


def test_a_wider_type_is_not_rounded_to_the_bases(bases, tmp_path):
    """The merged weights in float32 are those of the float32 computation, though the base lies in bfloat16."""
    model = checkpoint.load_base(bases["llama"], torch.bfloat16)
    checkpoint.save_base(model, tmp_path / "base", dtype=torch.bfloat16)
    data.Tokenizer.load(bases["llama"]).save(tmp_path / "base")
    ours = make_run(tmp_path / "base", tmp_path / "run", "lora", {})
    for dtype, bound in (("float32", 1e-5), ("float16", 1e-2)):
        hub.merge_run(tmp_path / "run", tmp_path / dtype, dtype=dtype)
        assert {t.dtype for _, t in files.read_tensors(tmp_path / dtype)} == {getattr(torch, dtype)}
        assert (logits(checkpoint.load_base(tmp_path / dtype)) - ours).abs().max() < bound


def test_folders_that_are_refused(bases, tmp_path, refused):
    make_run(bases["gpt2"], tmp_path / "run", "lora", {})
    hub.export(tmp_path / "run", tmp_path / "out")
    with pytest.raises(ValueError, match="holds something already"):
        hub.export(tmp_path / "run", tmp_path / "out")
    with pytest.raises(ValueError, match="is no tensor of a llama adapter"):
        hub.import_adapter(tmp_path / "out", bases["llama"], tmp_path / "again")
    assert "in no known layout, it has no adapter_config.json; found adapter.pt" in refused("hub.py", "import", tmp_path / "run", tmp_path / "again", "--base", bases["gpt2"])
    assert "no run there" in refused("hub.py", "export", tmp_path, tmp_path / "x")
    assert "neither a run (config.toml) nor a model" in refused("hub.py", "merge", tmp_path / "out", tmp_path / "x")
    (tmp_path / "out" / "adapter_model.safetensors").write_bytes((tmp_path / "out" / "adapter_model.safetensors").read_bytes()[:-5])
    assert "truncated" in refused("hub.py", "import", tmp_path / "out", tmp_path / "again", "--base", bases["gpt2"])
    assert not (tmp_path / "again").exists()
