"""Adapters out to PEFT and AdapterHub and back, merged checkpoints, what is in an adapter; with the peers' own libraries as oracles."""

import json
import os
import subprocess

import pytest
import torch

import data
import hub
import peft
import train
from conftest import tiny
from model import GPT
from lib import checkpoint, run
from lib.config import Config, write_toml

PEFT_METHODS = [("lora", {}), ("lora", dict(targets="q,v", rslora=True)), ("lora", dict(targets="k,up")), ("ia3", {}), ("prompt", dict(prompt_length=3)),
                ("prefix", dict(prefix_length=3, prefix_style="after")), ("prefix", dict(prefix_length=3, prefix_style="after", prefix_mlp=8)), ("bitfit", {}), ("bitfit+lora", {})]
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
        for _, p, m in peft.named(model):
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
    return not (family == "llama" and "bitfit" in method)


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
           "prompt": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), "prefix": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)}
for name, config in configs.items():
    torch.manual_seed(3)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, weight_decay=0.0)
    for _ in range(3):
        model(tokens, labels=tokens).loss.backward()
        if gpt2 and name == "ia3":
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
    for name in ("lora", "rslora", "ia3", "prompt", "prefix"):
        hub.import_adapter(tmp_path / name, bases[family], tmp_path / f"{name}_run")
        model, _, _ = run.load_run(tmp_path / f"{name}_run", "cpu", "float32")
        theirs = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        assert (logits(model) - theirs).abs().max() < 1e-5, (name, (logits(model) - theirs).abs().max())


ADAPTERS_LOGITS = """
import sys, json, torch, adapters
from transformers import AutoModelForCausalLM
base, out, tokens = sys.argv[1], sys.argv[2], torch.tensor(json.loads(sys.argv[3]))
for style in ("houlsby", "pfeiffer", "lin"):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapters.init(model)
    name = model.load_adapter(out + "/out_" + style)
    model.set_active_adapters(name)
    torch.save(model.eval()(tokens).logits.detach(), out + "/logits_" + style)
    model.save_adapter(out + "/back_" + style, name)
"""


@pytest.mark.peers
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_adapterhub_computes_the_same(bases, tmp_path, family):
    if "NANOPEFT_ADAPTERS" not in os.environ:
        pytest.skip("NANOPEFT_ADAPTERS does not name a Python with the adapters package")
    expected = {}
    for style in hub.HUB_STYLES:
        expected[style] = make_run(bases[family], tmp_path / f"run_{style}", "adapter", dict(adapter_style=style, adapter_activation="swish"))
        hub.export(tmp_path / f"run_{style}", tmp_path / f"out_{style}", "adapterhub", "tuned")
    done = subprocess.run([os.environ["NANOPEFT_ADAPTERS"], "-I", "-W", "ignore", "-c", ADAPTERS_LOGITS, bases[family], tmp_path, json.dumps(TOKENS.tolist())],
                          cwd="/", capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    for style, ours in expected.items():
        theirs = torch.load(tmp_path / f"logits_{style}", weights_only=True)
        assert (ours - theirs).abs().max() < 1e-5, (style, (ours - theirs).abs().max())
        hub.import_adapter(tmp_path / f"back_{style}", bases[family], tmp_path / f"again_{style}")      # as that library writes it
        model, _, _ = run.load_run(tmp_path / f"again_{style}", "cpu", "float32")
        assert torch.equal(logits(model), ours)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("method, options", PEFT_METHODS + [("adapter", dict(adapter_style=style)) for style in hub.HUB_STYLES])
def test_out_and_in_again(bases, tmp_path, family, method, options):
    if not possible(family, method):
        pytest.skip("no biases")
    ours = make_run(bases[family], tmp_path / "run", method, options)
    hub.export(tmp_path / "run", tmp_path / "out", "adapterhub" if method == "adapter" else "peft")
    hub.import_adapter(tmp_path / "out", bases[family], tmp_path / "again")
    model, _, config = run.load_run(tmp_path / "again", "cpu", "float32")
    torch.testing.assert_close(logits(model), ours, rtol=0, atol=1e-5)
    assert config.method == method


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
    for family, method in (("gpt2", "lora+ia3"), ("llama", "lora"), ("gpt2", "bitfit"), ("llama", "top")):
        name = f"{family}_{method}"
        expected[name] = make_run(bases[family], tmp_path / f"run_{name}", method, {})
        hub.merge_run(tmp_path / f"run_{name}", tmp_path / name)
    peer(MERGED_LOGITS, json.dumps(TOKENS.tolist()), *(tmp_path / name for name in expected))
    for name, ours in expected.items():
        assert (torch.load(tmp_path / name / "logits.pt", weights_only=True) - ours).abs().max() < 1e-5
        assert torch.allclose(logits(checkpoint.load_base(tmp_path / name)), ours, atol=1e-5)
        assert data.Tokenizer.load(tmp_path / name).encode("the cat")


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
# refused


def test_what_a_layout_has_no_place_for(bases, tmp_path):
    for i, (method, options, layout, words) in enumerate([
            ("prefix", {}, "peft", "--prefix_style after"), ("adapter", {}, "peft", "--layout adapterhub"), ("full", {}, "peft", "python hub.py merge"),
            ("lora+prompt", {}, "peft", "has no place"), ("lora", {}, "adapterhub", "--layout peft takes lora"), ("lora", {}, "x", "layout is 'x'")]):
        make_run(bases["gpt2"], tmp_path / str(i), method, options)
        with pytest.raises(ValueError, match=words):
            hub.export(tmp_path / str(i), tmp_path / "out", layout)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change, words", [
    (dict(use_dora=True), "use_dora is True"), (dict(peft_type="LOHA"), "peft_type is 'LOHA'"), (dict(layers_to_transform=[0]), "layers_to_transform"),
    (dict(modules_to_save=["lm_head"]), "modules_to_save"), (dict(r=5), "rank 9; adapter_config.json says 5"), (dict(lora_alpha=None), "lora_alpha is None")])
def test_configurations_that_are_refused(bases, tmp_path, change, words):
    make_run(bases["gpt2"], tmp_path / "run", "lora", dict(targets="q,k,v"))
    hub.export(tmp_path / "run", tmp_path / "out")
    said = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    (tmp_path / "out" / "adapter_config.json").write_text(json.dumps(said | change))
    with pytest.raises(ValueError, match=words):
        hub.import_adapter(tmp_path / "out", bases["gpt2"], tmp_path / "again")
    assert not (tmp_path / "again").exists()


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
