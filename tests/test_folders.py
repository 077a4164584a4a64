"""Merged folders in transformers 5 and 4: from nothing but the folder the same ids, the same greedy text, the same end."""

import json
import os
import shutil
import subprocess

import pytest
import torch

import data
import hub
import train
from conftest import named_folder
from lib import checkpoint, files, origin, run
from lib.config import Config
from model import GPT, GPTConfig

TEXTS = ["The Plough is a pub.", " two  spaces ", "name : Café || £20-25, 1984!", "def f(x):\n    return x**2", "日本語 🙂"]
CHAT = [{"role": "system", "content": "You are a waiter."}, {"role": "user", "content": "A table for two?"},
        {"role": "assistant", "content": "Yes."}, {"role": "user", "content": "Thanks!"}]
ASKED = [{"role": "user", "content": "say cat"}]
PAIRS = [{"prompt": f"say {word}", "completion": " it is"} for word in "cat dog bird fish worm ant bee fly".split()]
TALKS = [{"messages": [{"role": "user", "content": f"say {word}"}, {"role": "assistant", "content": "it is"}]}
         for word in "cat dog bird fish worm ant bee fly".split()]
OPT_SPECIAL = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
SHAPE = dict(n_layer=2, n_head=2, n_embd=48, block_size=256)
LLAMA = SHAPE | dict(n_kv_head=1, n_ffn=48, position="rope", norm="rms", activation="silu", gated=True, bias="", tied=True)

READ = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(2)
texts, chat, asked, folders = map(json.loads, sys.argv[1:])
found = {}
for folder in folders:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    has_template = bool(tokenizer.chat_template)
    def prompt(messages):
        if not has_template:
            return tokenizer(messages[-1]["content"]).input_ids
        return tokenizer(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False), add_special_tokens=False).input_ids
    start = torch.tensor([prompt(asked)])
    with torch.no_grad():
        text = model.generate(start, max_new_tokens=40, do_sample=False)[0].tolist()
    found[folder] = {"ids": [tokenizer(text).input_ids for text in texts], "chat": prompt(chat), "text": text}
print(json.dumps(found))
"""


def write_gpt2(folder, real):
    """GPT-2's own tokenizer, as it is published: no file says that <|endoftext|> stands before a text."""
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        shutil.copy(real / "gpt2" / name, folder)
    return GPTConfig(vocab_size=50257, **SHAPE), {"bos_token_id": 50256, "eos_token_id": 50256}


def write_opt(folder, real):
    """OPT's kind: the vocabulary in two files, and in the settings a beginning that is also the end."""
    theirs = json.loads((real / "gpt2" / "vocab.json").read_text())
    special = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}
    (folder / "vocab.json").write_text(json.dumps(special | {token: i + 4 for token, i in theirs.items()}))
    shutil.copy(real / "gpt2" / "merges.txt", folder)
    settings = OPT_SPECIAL | {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True, "errors": "replace"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "special_tokens_map.json").write_text(json.dumps(OPT_SPECIAL))
    config = GPTConfig(vocab_size=50261, position_offset=2, activation="relu", **SHAPE)
    return config, {"bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1}


def write_smollm2(folder, real):
    """SmolLM2's tokenizer and chat template over a small model."""
    source = named_folder("NANOPEFT_SMOLLM2", "SmolLM2-135M-Instruct")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"):
        if (source / name).is_file():
            shutil.copy(source / name, folder)
    return GPTConfig(vocab_size=49152, **LLAMA), {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}


BASES = {"gpt2": write_gpt2, "opt": write_opt, "llama": None, "smollm2": write_smollm2}


def make_base(name, folder, real):
    """A base of that kind in the folder; returns where it lies."""
    if BASES[name] is None:                                      # tokenizer.model alone, a model that has learnt
        return real / "stories260k"
    folder.mkdir()
    config, ids = BASES[name](folder, real)
    torch.manual_seed(0)
    checkpoint.save_base(GPT(config), folder, ids)
    return folder


@pytest.fixture(scope="module")
def merged(real_data, tmp_path_factory):
    """{kind: (merged folder, what we make of the run)} after 20 steps each."""
    root, found = tmp_path_factory.mktemp("merged"), {}
    for form, records in (("pairs", PAIRS), ("talks", TALKS)):
        (root / f"{form}.jsonl").write_text("\n".join(map(json.dumps, records)))
    for name in BASES:
        if name == "smollm2" and "NANOPEFT_SMOLLM2" not in os.environ:
            continue
        base = make_base(name, root / name, real_data)
        form = "talks" if name == "smollm2" else "pairs"
        train.train(Config(method="full", base=str(base), data=str(root / f"{form}.jsonl"), out_dir=str(root / f"{name}_run"),
                           max_iters=20, warmup_iters=0, learning_rate=1e-2 if name == "llama" else 3e-2, eval_interval=20, sample_count=0, batch_size=8,
                           dtype="float32", device="cpu"))
        hub.merge_run(root / f"{name}_run", root / f"{name}_merged")
        found[name] = root / f"{name}_merged", ours(root / f"{name}_run")
    return found


def ours(folder):
    """What a run makes of the texts, as the scripts of transformers report it."""
    model, tokenizer, config = run.load_run(folder, "cpu", "float32")
    chat = run.chat_of(config, tokenizer, folder)
    prompt = chat.prompt if chat else lambda messages: tokenizer.encode_prompt(messages[-1]["content"])
    start = prompt(ASKED)
    text = model.generate([start], 40, temperature=0, stop=tokenizer.stops)[0]
    assert len(text) < len(start) + 40, "it has not learnt to stop"
    return {"ids": [tokenizer.encode_prompt(text) for text in TEXTS], "chat": prompt(CHAT), "text": text, "stops": tokenizer.stops}


@pytest.mark.peers
@pytest.mark.parametrize("variable", ["NANOPEFT_PEERS", "NANOPEFT_ADAPTERS"])
def test_transformers_does_the_same(merged, variable):
    """Version 5, and version 4."""
    python = named_folder(variable, "the packages of its requirements")
    args = [json.dumps(value) for value in (TEXTS, CHAT, ASKED, [str(folder) for folder, _ in merged.values()])]
    done = subprocess.run([python, "-I", "-W", "ignore", "-c", READ, *args], cwd="/", capture_output=True, text=True,
                          env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    for name, found in zip(merged, json.loads(done.stdout).values(), strict=True):
        _, expected = merged[name]
        assert (found["ids"], found["chat"]) == (expected["ids"], expected["chat"]), name
        assert found["text"] == expected["text"] and found["text"][-1] in expected["stops"], name


# -----------------------------------------------------------------------------
# what stands in the files


def of(folder, name):
    """The object in a JSON file."""
    return json.loads((folder / name).read_text())


def test_ends_are_those_of_the_training(merged):
    """stories260K has never seen its own end: a run on it ends with 1, which its base calls the beginning."""
    expected = {"llama": (1, [1, 2]), "gpt2": (50256, 50256), "opt": (2, 2), "smollm2": (2, 2)}
    for name, (folder, run_says) in merged.items():
        end, stops = expected[name]
        assert (of(folder, "config.json")["eos_token_id"], of(folder, "generation_config.json")["eos_token_id"]) == (end, stops)
        assert sorted(run_says["stops"]) == sorted(stops if isinstance(stops, list) else [stops])
    assert of(merged["llama"][0], "tokenizer_config.json")["eos_token"] == "<s>"
    assert of(merged["opt"][0], "config.json")["pad_token_id"] == 1


def test_a_template_that_the_base_does_not_have_brings_its_end(tmp_path):
    """ChatML over a base whose end is another token, and a generation_config.json with settings that stay."""
    base = tmp_path / "base"
    base.mkdir()
    tokenizers = pytest.importorskip("tokenizers")
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    inner.train_from_iterator(["say cat it is"], tokenizers.trainers.BpeTrainer(
        vocab_size=290, special_tokens=special, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    inner.save(str(base / "tokenizer.json"))
    (base / "tokenizer_config.json").write_text(json.dumps({"eos_token": special[0], "pad_token": special[0], "chat_template": None}))
    (base / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": special[0]}}))
    (base / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "eos_token_id": 0, "_from_model_config": True}))
    torch.manual_seed(0)
    checkpoint.save_base(GPT(GPTConfig(vocab_size=300, **LLAMA)), base, {"eos_token_id": 0})
    (tmp_path / "talks.jsonl").write_text("\n".join(map(json.dumps, TALKS)))
    train.train(Config(method="lora", base=str(base), data=str(tmp_path / "talks.jsonl"), out_dir=str(tmp_path / "run"), template="chatml",
                       max_iters=1, eval_interval=1, sample_count=0, batch_size=2, dtype="float32", device="cpu"))
    hub.merge_run(tmp_path / "run", tmp_path / "merged")
    hub.export(tmp_path / "run", tmp_path / "peft")
    for folder in (tmp_path / "merged", tmp_path / "peft"):
        assert of(folder, "generation_config.json") == {"temperature": 0.6, "bos_token_id": 0, "eos_token_id": [2, 0], "pad_token_id": 0}
        assert of(folder, "tokenizer_config.json")["eos_token"] == of(folder, "special_tokens_map.json")["eos_token"] == "<|im_end|>"
        assert (folder / "chat_template.jinja").read_text() == (tmp_path / "run" / "chat_template.jinja").read_text()
        assert (folder / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    assert of(tmp_path / "merged", "config.json")["eos_token_id"] == 2
    assert data.Tokenizer.load(tmp_path / "merged").eos == 2


@pytest.mark.parametrize("types", [(torch.float32, torch.float32), (torch.float16, torch.float16), (torch.bfloat16, torch.float32)])
@pytest.mark.parametrize("quantized", ["", "nf4"])
def test_what_no_method_touched_is_the_bases_to_the_bit(tmp_path, types, quantized):
    """Of one type, or with norms of another, whatever the run computed in."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=300, **LLAMA))
    tables = {name: types["norm" in name] for name, _ in model.named_parameters()}
    model.origin = origin.new_origin(model.config)
    model.origin.types.update(tables)
    checkpoint.save_base(model, tmp_path / "base")
    data.Tokenizer.train(["say cat it is"], 300).save(tmp_path / "base")
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, PAIRS)))
    train.train(Config(method="lora", targets="q,down", base=str(tmp_path / "base"), data=str(tmp_path / "pairs.jsonl"), out_dir=str(tmp_path / "run"),
                       max_iters=2, eval_interval=2, warmup_iters=0, learning_rate=0.5, sample_count=0, batch_size=2, dtype="bfloat16", quant=quantized, device="cpu"))
    hub.merge_run(tmp_path / "run", tmp_path / "merged")
    before, after = (dict(files.read_tensors(tmp_path / name)) for name in ("base", "merged"))
    assert before.keys() == after.keys()
    for name, t in before.items():
        touched = "q_proj" in name or "down_proj" in name or quantized and "_proj" in name
        assert after[name].dtype == t.dtype and torch.equal(after[name], t) == (not touched), name
    hub.merge_run(tmp_path / "run", tmp_path / "half", dtype="float16")
    assert {t.dtype for t in dict(files.read_tensors(tmp_path / "half")).values()} == {torch.float16}
