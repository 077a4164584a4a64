"""
SmolLM2-135M-Instruct, a model that people use, beside transformers. NANOPEFT_SMOLLM2 names its folder, which
../shared/data/smollm2.py makes.
"""

import json

import pytest
import torch

from conftest import named_folder
from lib import files, run
from lib.config import Config

TEXT = """Low-rank adaptation keeps the pretrained weights of a model as they are and trains two thin matrices beside
each of them. Their product is added to the frozen weight, so that nothing is slower once both are merged. In 2021
this was shown to match full fine-tuning on the E2E challenge with 0.1 percent of the parameters."""
PROMPT = "The capital of France is"
TEXTS = (TEXT, "name : The Plough | food : Café || £20-25, 1984!", "def f(x):\n    return x**2  # naïve", " two  spaces ", "日本語 🙂")


@pytest.fixture(scope="module")
def smollm2():
    """The folder."""
    return named_folder("NANOPEFT_SMOLLM2", "SmolLM2-135M-Instruct")


@pytest.fixture(scope="module")
def loaded(smollm2):
    """(model, tokenizer) in float32, as every script loads them."""
    model, tokenizer = run.load_base(Config(base=str(smollm2)), torch.device("cpu"), torch.float32)
    return model.eval(), tokenizer


@pytest.fixture(scope="module")
def theirs(smollm2, peer, tmp_path_factory):
    """What transformers makes of the same: logits, the ids of a greedy text and of TEXTS, and the end."""
    folder = tmp_path_factory.mktemp("theirs")
    (folder / "texts.json").write_text(json.dumps([TEXT, PROMPT, *TEXTS]))
    out = peer("""
import json, sys
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(2)
base, folder = sys.argv[1:]
text, prompt, *texts = json.load(open(f"{folder}/texts.json"))
tokenizer = AutoTokenizer.from_pretrained(base)
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
ids = torch.tensor([tokenizer(text).input_ids[:64]])
start = tokenizer(prompt, return_tensors="pt")
with torch.no_grad():
    save_file({"logits": model(ids).logits[0].contiguous()}, f"{folder}/logits.safetensors")
    greedy = model.generate(**start, max_new_tokens=40, do_sample=False)[0].tolist()
print(json.dumps({"ids": ids[0].tolist(), "greedy": greedy, "eos": tokenizer.eos_token_id,
                  "texts": [tokenizer(text).input_ids for text in texts]}))
""", smollm2, folder)
    return json.loads(out) | {"logits": dict(files.read_tensors(folder / "logits.safetensors"))["logits"]}


@pytest.mark.peers
def test_ids_are_those_of_transformers(loaded, theirs):
    _, tokenizer = loaded
    assert [tokenizer.encode_prompt(text) for text in TEXTS] == theirs["texts"]
    assert all(tokenizer.decode(tokenizer.encode(text)) == text for text in TEXTS)
    assert tokenizer.eos == theirs["eos"] and tokenizer.stops == [tokenizer.eos] and tokenizer.begin == []
    assert tokenizer.decode([tokenizer.eos]) == "" and json.loads(tokenizer._files["tokenizer_config.json"])["eos_token"] == "<|im_end|>"


@pytest.mark.peers
def test_logits_are_those_of_transformers(loaded, theirs):
    model, tokenizer = loaded
    ids = tokenizer.encode_prompt(TEXT)[:64]
    assert ids == theirs["ids"] and len(ids) == 64
    with torch.no_grad():
        logits, _ = model(torch.tensor([ids]))
    difference = float((logits[0] - theirs["logits"]).abs().max())
    assert difference < 1e-4, difference


@pytest.mark.peers
def test_greedy_text_is_that_of_transformers(loaded, theirs):
    model, tokenizer = loaded
    prompt = tokenizer.encode_prompt(PROMPT)
    written = model.generate([prompt], 40, temperature=0, stop=tokenizer.stops)[0]
    assert written == theirs["greedy"] and "Paris" in tokenizer.decode(written)
    first = written[len(prompt):len(prompt) + 8]
    assert run.sample_text(model, tokenizer, [PROMPT], 8) == [tokenizer.decode(first)]


@pytest.mark.slow
def test_qlora_learns_e2e(smollm2, real_data, script, tmp_path):
    """10 steps of 2 sequences take the loss on sequences that training has not seen down by a quarter."""
    done = script("train.py", "--method", "qlora", "--base", smollm2, "--data", real_data / "e2e", "--out_dir", tmp_path / "run",
                  "--max_iters", 10, "--warmup_iters", 2, "--batch_size", 2, "--eval_sequences", 4, "--sample_count", 0,
                  "--dtype", "float32", "--device", "cpu", timeout=900)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["val_loss"] < 0.75 * metrics["loss_before"], metrics
