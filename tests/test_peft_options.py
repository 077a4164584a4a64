"""
PEFT's options, all of LoraConfig and the other kinds that can be read, there and back. The tables below say what becomes
of each: EQUAL is logits within 1e-5, of what PEFT itself makes of the folder it saved, read here, and of what it makes of
our export of that; words are those with which it is refused. test_the_table_is_whole holds the first against PEFT 0.21.
"""

import json

import pytest
import torch

import hub
from lib import checkpoint
from test_doors import TOKENS, bases, logits  # noqa: F401

EQUAL = None
LAYERS_1 = "model.layers.1.self_attn.q_proj"
SIX = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
# option -> [(arguments of LoraConfig, or what is written over its adapter_config.json after saving, what becomes of it)]
OPTIONS = {
    "r": [({"r": 5}, EQUAL)],
    "lora_alpha": [({"lora_alpha": 7}, EQUAL), ({"edit": {"lora_alpha": "7"}}, "lora_alpha is '7'")],
    "target_modules": [({"target_modules": "all-linear"}, EQUAL), ({"target_modules": r".*\.0\..*(q|down)_proj"}, EQUAL),
                       ({"target_modules": ["layers.1.mlp.up_proj", "v_proj"]}, EQUAL),
                       ({"target_modules": ["q_proj", "lm_head"]}, "LoRA on lm_head cannot be read"),
                       ({"target_modules": ["q_proj", "embed_tokens"]}, "LoRA on embed_tokens cannot be read")],
    "exclude_modules": [({"target_modules": SIX, "exclude_modules": ["layers.0.self_attn.q_proj", "k_proj"]}, EQUAL),
                        ({"target_modules": SIX, "exclude_modules": r".*1\.mlp.*"}, EQUAL)],
    "layers_to_transform": [({"layers_to_transform": 1}, EQUAL), ({"layers_to_transform": [0]}, EQUAL),
                            ({"edit": {"layers_to_transform": [0]}}, "does not select"), ({"edit": {"layers_to_transform": "0"}}, "numbers of layers")],
    "layers_pattern": [({"layers_to_transform": [1], "layers_pattern": "layers"}, EQUAL)],
    "rank_pattern": [({"rank_pattern": {"q_proj": 5}}, EQUAL), ({"rank_pattern": {LAYERS_1: 2, "layers.0.self_attn.(q|v)_proj": 7}}, EQUAL),
                     ({"rank_pattern": {"^model.layers.0.*|.*v_proj": 1}, "use_rslora": True}, EQUAL), ({"edit": {"rank_pattern": [1]}}, "rank_pattern is"),
                     ({"edit": {"rank_pattern": {"q_proj": 9}}}, "has rank 3; adapter_config.json says 9"), ({"edit": {"rank_pattern": {"(": 3}}}, "is no regular expression")],
    "alpha_pattern": [({"alpha_pattern": {"layers.1.self_attn.q_proj": 99}}, EQUAL), ({"alpha_pattern": {"layers.0.*|v_proj": 40, "q_proj": 3}}, EQUAL),
                      ({"alpha_pattern": {r".*\.1\..*": 50}, "use_dora": True}, EQUAL), ({"alpha_pattern": {"_proj": 40}}, EQUAL), ({"edit": {"alpha_pattern": {"q_proj": "4"}}}, "q_proj is '4'")],
    "lora_dropout": [({"lora_dropout": 0.25}, EQUAL)],
    "fan_in_fan_out": [({"family": "gpt2", "fan_in_fan_out": True}, EQUAL)],
    "bias": [({"family": "gpt2", "bias": "all"}, EQUAL), ({"family": "gpt2", "bias": "lora_only"}, EQUAL), ({"bias": "all"}, EQUAL)],
    "use_rslora": [({"use_rslora": True}, EQUAL)],
    "modules_to_save": [({"modules_to_save": ["lm_head"]}, EQUAL), ({"modules_to_save": ["embed_tokens", "norm"]}, EQUAL), ({"modules_to_save": ["input_layernorm"]}, EQUAL),
                        ({"family": "gpt2", "modules_to_save": ["ln_f"]}, EQUAL), ({"modules_to_save": ["down_proj"]}, "modules_to_save names 'down_proj'"),
                        ({"family": "gpt2", "modules_to_save": ["wte"]}, "embedding and head were trained apart")],
    "init_lora_weights": [({"init_lora_weights": "gaussian"}, EQUAL), ({"init_lora_weights": "orthogonal", "r": 4}, EQUAL), ({"init_lora_weights": "mica"}, EQUAL), ({"init_lora_weights": True}, EQUAL),
                          ({"edit": {"init_lora_weights": "eva"}}, EQUAL),
                          *(({"init_lora_weights": start}, "PEFT changes the base's weights") for start in ("pissa", "pissa_niter_4", "olora")),
                          *(({"edit": {"init_lora_weights": start}}, "PEFT changes the base's weights") for start in ("corda", "loftq", "lora_ga"))],
    "megatron_config": [({"edit": {"megatron_config": {"x": 1}}}, "Megatron's layers")],
    "megatron_core": [({"megatron_core": "other.core"}, EQUAL)],
    "trainable_token_indices": [({"trainable_token_indices": [5, 1]}, EQUAL), ({"trainable_token_indices": {"embed_tokens": [2, 7]}}, EQUAL), ({"family": "gpt2", "trainable_token_indices": {"wte": [3]}}, EQUAL)],
    "loftq_config": [({"edit": {"loftq_config": {"loftq_bits": 4}}}, EQUAL)],
    "eva_config": [({"edit": {"eva_config": {"rho": 2.0}}}, EQUAL)],
    "corda_config": [({"edit": {"corda_config": {"sample_count": 4}}}, EQUAL)],
    "lora_ga_config": [({"edit": {"lora_ga_config": {"scale": "stable"}}}, EQUAL)],
    "use_dora": [({"use_dora": True}, EQUAL), ({"use_dora": True, "layers_to_transform": [1], "rank_pattern": {"v_proj": 2}}, EQUAL), ({"family": "gpt2", "use_dora": True}, EQUAL)],
    "velora_config": [({"velora": True}, EQUAL)],
    "alora_invocation_tokens": [({"alora_invocation_tokens": [3]}, "aLoRA cannot be read")],
    "use_qalora": [({"edit": {"use_qalora": True}}, "QALoRA cannot be read")],
    "qalora_group_size": [({"qalora_group_size": 4}, EQUAL)],
    "monteclora_config": [({"edit": {"monteclora_config": {"num_samples": 2}}}, "MonteCLoRA cannot be read")],
    "layer_replication": [({"layer_replication": [(0, 2), (1, 2)]}, "replicated layers cannot be read")],
    "runtime_config": [({}, EQUAL)],     # is not saved
    "lora_bias": [({"family": "gpt2", "lora_bias": True}, "biases of its own cannot be read")],
    "target_parameters": [({"edit": {"target_parameters": ["mlp.up_proj.weight"]}}, "without a module cannot be read")],
    "use_bdlora": [({"edit": {"use_bdlora": {"nblocks": 2}}}, "BD-LoRA cannot be read")],
    "arrow_config": [({"edit": {"arrow_config": {"top_k": 1}}}, "Arrow cannot be read")],
    "kasa_config": [({"edit": {"kasa_config": {"beta": 0.1}}}, "KaSA cannot be read")],
    "ensure_weight_tying": [({"family": "gpt2", "modules_to_save": ["wte", "lm_head"], "ensure_weight_tying": True}, EQUAL),
                            ({"family": "gpt2", "modules_to_save": ["wte"], "ensure_weight_tying": True}, "trained apart")],
}
COMMON = {"peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"}
# the other kinds: (class of its configuration, arguments, what becomes of it)
KINDS = [
    ("VeraConfig", {"r": 6, "target_modules": ["q_proj", "down_proj"]}, EQUAL),
    ("VeraConfig", {"r": 6, "target_modules": ["v_proj"], "layers_to_transform": [1], "save_projection": False}, EQUAL),
    ("VeraConfig", {"r": 6, "target_modules": ["v_proj"], "projection_prng_key": 3}, "its shared projections"),
    ("VeraConfig", {"family": "gpt2", "r": 6, "target_modules": ["attn.c_attn"]}, "VeRA over attn.c_attn"),
    ("PrefixTuningConfig", {"num_virtual_tokens": 3, "prefix_projection": True, "encoder_hidden_size": 8}, EQUAL),
    ("PromptEncoderConfig", {"num_virtual_tokens": 3, "encoder_hidden_size": 8}, EQUAL),
    ("PromptEncoderConfig", {"family": "gpt2", "num_virtual_tokens": 3, "encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 8}, EQUAL),
    ("IA3Config", {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}, EQUAL),
    ("IA3Config", {"target_modules": ["v_proj", "down_proj"], "feedforward_modules": []}, "here it scales the input"),
    ("IA3Config", {"target_modules": ["q_proj"], "feedforward_modules": []}, r"\(IA\)3 on self_attn.q_proj"),
    ("AdaLoraConfig", {"target_modules": ["q_proj"], "total_step": 9}, "AdaLoRA cannot be read"), ("LoHaConfig", {"target_modules": ["q_proj"]}, "LoHa cannot be read"),
    ("LoKrConfig", {"target_modules": ["q_proj"]}, "LoKr cannot be read"), ("OFTConfig", {"target_modules": ["q_proj"], "oft_block_size": 4}, "OFT cannot be read"), ("LNTuningConfig", {}, "LayerNorm tuning cannot be read"),
]

MAKE = """
import json, sys, dataclasses, torch, peft
from transformers import AutoModelForCausalLM
bases, cases, out, tokens = json.loads(sys.argv[1]), json.load(open(sys.argv[2])), sys.argv[3], torch.tensor(json.loads(sys.argv[4]))
load = lambda family: AutoModelForCausalLM.from_pretrained(bases[family], dtype=torch.float32)
for i, (kind, options) in enumerate(cases):
    family, edit, folder = options.pop("family", "llama"), options.pop("edit", {}), f"{out}/{i}"
    if options.pop("velora", False):
        options["velora_config"] = peft.VeloraConfig(num_groups=4)
    if kind == "LoraConfig":
        options = {"r": 3, "target_modules": ["attn.c_attn", "mlp.c_fc"] if family == "gpt2" else ["q_proj", "v_proj"]} | options
    torch.manual_seed(i)
    model = peft.get_peft_model(load(family), getattr(peft, kind)(task_type="CAUSAL_LM", **options))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):
        optimizer.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        for name, p in model.named_parameters():
            if p.requires_grad and p.grad is not None and "oft" not in name:
                p.grad = 0.05 * torch.randn_like(p) * (p.grad != 0).any()
        optimizer.step()
    model.save_pretrained(folder)
    path = folder + "/adapter_config.json"
    said = json.load(open(path)) | edit
    json.dump(said, open(path, "w"))
    if not edit:
        again = peft.PeftModel.from_pretrained(load(family), folder).eval()
        torch.save(again(tokens).logits[:, -tokens.size(1):].detach().contiguous(), folder + "/logits.pt")
    else:
        torch.save(model.eval()(tokens).logits.detach(), folder + "/logits.pt")
print(json.dumps([field.name for field in dataclasses.fields(peft.LoraConfig)]))
"""
READ = """
import json, sys, torch, peft
from transformers import AutoModelForCausalLM
bases, folders, tokens = json.loads(sys.argv[1]), json.load(open(sys.argv[2])), torch.tensor(json.loads(sys.argv[3]))
for folder, family in folders:
    model = AutoModelForCausalLM.from_pretrained(bases[family], dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(model, folder).eval()
    torch.save(model(tokens).logits[:, -tokens.size(1):].detach().contiguous(), folder + "/logits.pt")
"""
CASES = [("LoraConfig", options, end) for rows in OPTIONS.values() for options, end in rows] + KINDS


@pytest.fixture(scope="module")
def made(bases, peer, tmp_path_factory):  # noqa: F811
    """(folder of the adapters that PEFT has saved, a number each, LoraConfig's options)."""
    root = tmp_path_factory.mktemp("made")
    (root / "cases.json").write_text(json.dumps([(kind, options) for kind, options, _ in CASES]))
    places = {family: str(folder) for family, folder in bases.items()}
    printed = peer(MAKE, json.dumps(places), root / "cases.json", root, json.dumps(TOKENS.tolist()))
    return root, json.loads(printed.splitlines()[-1])


@pytest.mark.peers
def test_the_table_is_whole(made):
    _, fields = made
    assert set(OPTIONS) == set(fields) - COMMON


@pytest.mark.peers
@pytest.mark.parametrize("i", range(len(CASES)), ids=lambda i: f"{i}-{CASES[i][0]}")
def test_what_peft_saved_is_read_or_refused(made, bases, tmp_path, i):  # noqa: F811
    root, _ = made
    _, options, end = CASES[i]
    base = bases[options.get("family", "llama")]
    if end is not EQUAL:
        with pytest.raises(ValueError, match=end):
            hub.import_adapter(root / str(i), base, tmp_path / "run")
        assert not (tmp_path / "run").exists()
        return
    model = hub.import_adapter(root / str(i), base, tmp_path / "run")
    theirs = torch.load(root / str(i) / "logits.pt", weights_only=True)
    assert (logits(model) - theirs).abs().max() < 1e-5
    assert (theirs - logits(checkpoint.load_base(base))).abs().max() > 1e-3      # it does something


@pytest.mark.peers
def test_peft_reads_what_we_export_of_it(made, bases, peer, tmp_path):  # noqa: F811
    root, _ = made
    folders = []
    for i, (_, options, end) in enumerate(CASES):
        if end is EQUAL:
            family = options.get("family", "llama")
            hub.import_adapter(root / str(i), bases[family], tmp_path / f"run{i}")
            hub.export(tmp_path / f"run{i}", tmp_path / f"out{i}")
            folders.append((str(tmp_path / f"out{i}"), family, i))
    (tmp_path / "folders.json").write_text(json.dumps([pair for *pair, _ in folders]))
    peer(READ, json.dumps({family: str(folder) for family, folder in bases.items()}), tmp_path / "folders.json", json.dumps(TOKENS.tolist()))
    for folder, _, i in folders:
        ours, theirs = (torch.load(f"{place}/logits.pt", weights_only=True) for place in (folder, root / str(i)))
        assert (ours - theirs).abs().max() < 1e-5, CASES[i]
