"""What a run can bring along: the tensors of an adapter that it starts from, and tokens that its base does not have."""

import json
import re
import shutil

import pytest
import torch

import data
import hub
import peft
import train
from conftest import tiny
from lib import checkpoint, config as configuration, run, tokens
from lib.peft_format import WHOLE
from lib.config import Config, command_line
from model import GPT

FAST = dict(max_iters=2, eval_interval=2, eval_sequences=2, sample_count=1, batch_size=2, dtype="float32", device="cpu")
FLAGS = [str(word) for name, value in FAST.items() for word in (f"--{name}", value)]


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A folder with bases (gpt2, which ties its head; llama and gpt_neox, which do not) and data.jsonl."""
    root = tmp_path_factory.mktemp("world")
    tokenizers = pytest.importorskip("tokenizers")
    texts = [f"say {word}" for word in "cat dog bird fish worm ant bee fly".split()]
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"], show_progress=False)
    inner.train_from_iterator(texts, trainer)
    for family in ("gpt2", "llama", "gpt_neox"):
        folder = root / family
        torch.manual_seed(0)
        model = GPT(tiny(family, vocab_size=inner.get_vocab_size()))
        for p in model.parameters():
            p.data += 0.05 * torch.randn_like(p)
        checkpoint.save_base(model, folder)
        inner.save(str(folder / "tokenizer.json"))
        said = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": None, "eos_token": "<|endoftext|>"}
        if family != "gpt2":                                     # as transformers 4 writes it, and 5 reads it
            said["added_tokens_decoder"] = {"0": dict(content="<|endoftext|>", lstrip=False, normalized=False, rstrip=False, single_word=False, special=True)}
        (folder / "tokenizer_config.json").write_text(json.dumps(said))
    lines = [{"prompt": text, "completion": f" {text[::-1]} <a> <b>!"} for text in texts]
    (root / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (root / "new.txt").write_text("<a>\n<b>\n\n<never seen>\n")
    return root


def trained(world, folder, family="gpt2", **options):
    """The folder of a finished run."""
    train.train(Config(**FAST | dict(base=str(world / family), data=str(world / "data.jsonl"), out_dir=str(folder)) | options))
    return folder


def started(world, folder, *flags, family=None):
    """(Config, tensors at step 0) of a run by flags that stops before its first step."""
    base = ["--base", str(world / family)] if family else []
    config = command_line([*base, "--data", str(world / "data.jsonl"), "--out_dir", str(folder), *FLAGS, "--max_iters", "0", *map(str, flags)])
    seen = {}
    loop = train.loop

    def look(run):
        seen["tensors"] = {name: t.clone() for name, t in peft.adapter_state_dict(run.model).items()}
        seen["run"] = run
        return False
    train.loop = look
    try:
        train.train(config)
    finally:
        train.loop = loop
    return seen["run"], seen["tensors"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(t, b[name]) for name, t in a.items())


def tensors_of(path):
    return peft.read_adapter(path)["tensors"]


METHODS = [dict(method="lora", rank=3, alpha=5.0, targets="q,v"), dict(method="qlora", rank=2, quant_double=False), dict(method="prefix+ia3", prefix_length=3, prefix_style="after", prefix_mlp=4),
           dict(method="lora+prompt", prompt_length=2), dict(method="adapter", adapter_size=4, adapter_style="lin"), dict(method="lora", train_also="embed,norm")]


@pytest.mark.parametrize("options", METHODS, ids=lambda options: options["method"])
def test_a_run_starts_from_another(world, tmp_path, options):
    before = Config(**options)
    folder = trained(world, tmp_path / "a", learning_rate=0.05, **options)
    wanted = tensors_of(folder / "adapter.pt")
    second, tensors = started(world, tmp_path / "b", "--init_from", folder, "--learning_rate", "0.5", "--seed", 7)
    assert same(tensors, wanted)                                 # bit for bit; a prefix's MLP is folded
    config = second.config
    assert config.method == before.method and config.base == str(world / "gpt2") and (config.rank, config.targets) == (before.rank, before.targets)
    assert config.quant == ("nf4" if before.method == "qlora" else "") and config.quant_double == before.quant_double and config.prefix_mlp == 0
    assert second.progress["step"] == 0 and not second.optimizer.state and config.learning_rate == 0.5
    assert f'init_from = "{folder}"' in (tmp_path / "b" / "config.toml").read_text()
    assert second.progress["before"] == pytest.approx(json.loads((folder / "metrics.json").read_text())["val_loss"], rel=1e-4)


def test_from_a_file_and_from_pefts_folder(world, tmp_path):
    for method, more in (("lora", {}), ("lora+embed+norm", {}), ("ia3", {}), ("prompt", {}), ("adapter", dict(adapter_style="lin"))):
        folder = trained(world, tmp_path / method, method=method, learning_rate=0.05, **more)
        wanted = tensors_of(folder / "adapter.pt")
        _, tensors = started(world, tmp_path / f"{method} file", "--init_from", folder / "adapter.pt", family="gpt2")
        assert same(tensors, wanted)
        hub.export(folder, tmp_path / f"{method} peft", "adapterhub" if method == "adapter" else "peft")
        imported = hub.import_adapter(tmp_path / f"{method} peft", world / "gpt2", tmp_path / f"{method} imported")
        second, tensors = started(world, tmp_path / f"{method} again", "--init_from", tmp_path / f"{method} peft", family="gpt2")
        assert same(tensors, peft.adapter_state_dict(imported)) and second.config.method == method


def test_it_goes_on_exactly_and_says_where_it_began(world, tmp_path, script):
    trained(world, tmp_path / "a", method="lora")
    flags = ["--init_from", "a", "--data", world / "data.jsonl", *FLAGS, "--max_iters", 4, "--seed", 3]
    whole = script("train.py", *flags, "--out_dir", "whole", cwd=tmp_path)
    assert whole.returncode == 0 and "start      a: its" in whole.stdout, whole.stderr
    halved = [*flags, "--lr_schedule", "constant"]
    for name in ("one", "two"):
        assert script("train.py", *halved, "--out_dir", name, "--max_iters", 4 if name == "one" else 2, cwd=tmp_path).returncode == 0
    (tmp_path / "a").rename(tmp_path / "moved")                  # what a run began with is not needed again
    done = script("train.py", "--resume", "two", "--max_iters", 4, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    states = [run.newest_state(tmp_path / name)["tensors"] for name in ("one", "two")]
    assert same(*states)
    dry = script("train.py", "--init_from", "moved", "--data", world / "data.jsonl", "--dry_run", cwd=tmp_path)
    assert dry.returncode == 0 and "start      moved: its" in dry.stdout and not (tmp_path / "out").exists(), dry.stderr


def test_starts_that_are_refused(world, tmp_path, refused):
    trained(world, tmp_path / "a", method="lora", rank=3)
    hub.export(tmp_path / "a", tmp_path / "peft")
    hub.merge_run(tmp_path / "a", tmp_path / "merged")
    (tmp_path / "empty").mkdir()
    gpt2, llama = (["--base", world / family] for family in ("gpt2", "llama"))
    for flags, words in [
            (["a", "--rank", 8], "a: rank is 3 there and cannot become 8"), (["a", "--method", "ia3"], "a: method is 'lora' there and cannot become 'ia3'"),
            (["a", "--train_also", "embed"], "cannot become 'lora+embed'"), (["a", "--adapter_size", 4], "adapter_size is 'no option of its method' there"),
            (["a", *llama], "made for the base"), (["a/adapter.pt"], "--base DIR must name the model"), (["peft"], "--base DIR must name the model"),
            (["peft", *llama], "is no tensor of a llama adapter"), (["merged"], "a whole model and no adapter; a new run starts from it by --base merged"),
            (["empty"], "empty"), (["nowhere"], "nowhere: nothing is there to start from"), (["a", "--resume", "a"], "give one of them"),
            (["a/state.pt"], "not an adapter"), (["a", "--add_tokens", world / "new.txt"], "add_tokens is for a new adapter"),
            (["a", "--out_dir", "a"], "holds a run already")]:
        said = refused("train.py", "--data", world / "data.jsonl", "--init_from", *flags, cwd=tmp_path)
        assert words in said, (flags, said)
    assert "rank is 3 there" not in refused("train.py", "--init_from", "a", "--rank", 3, "--rnk", 3, cwd=tmp_path)
    assert not list(tmp_path.glob("out/*/config.toml"))


def test_an_adapter_with_tokens_needs_its_run(world, tmp_path, refused):
    trained(world, tmp_path / "a", method="lora", add_tokens=str(world / "new.txt"))
    flags = ["--base", world / "gpt2", "--data", world / "data.jsonl"]
    assert "start from its run's folder, which holds their tokenizer" in refused("train.py", "--init_from", "a/adapter.pt", *flags, cwd=tmp_path)
    hub.export(tmp_path / "a", tmp_path / "peft")
    assert "an adapter with added tokens cannot be read" in refused("train.py", "--init_from", "peft", *flags, cwd=tmp_path)


def test_what_is_given_and_agrees_is_taken(world, tmp_path):
    trained(world, tmp_path / "a", method="lora", rank=3)
    second, _ = started(world, tmp_path / "b", "--init_from", tmp_path / "a", "--rank", 3, "--method", "qlora")
    assert second.config.method == "qlora" and second.config.quant == "nf4"      # the base's storage is not the adapter's
    third, _ = started(world, tmp_path / "c", "--init_from", tmp_path / "a", "--quant", "int8")
    assert third.config.quant == "int8"


# -----------------------------------------------------------------------------
# --train_also


def test_train_also_joins_the_methods():
    assert Config(method="lora", train_also="embed,norm").method == "lora+embed+norm"
    assert command_line(["--method", "ia3+norm", "--train_also", "norm,head"]).method == "ia3+norm+head"
    with pytest.raises(ValueError, match="train_also is 'embed,lora'; it can name embed, head, norm"):
        Config(train_also="embed,lora")
    assert set(configuration.TRAIN_ALSO) <= set(peft.METHODS) and set(configuration.TRAIN_ALSO) == WHOLE


def test_a_tied_head_is_the_embedding():
    model = GPT(tiny("gpt2"))
    with pytest.raises(ValueError, match="one table for embedding and head; embed trains it"):
        peft.apply(model, "lora+head")
    report = peft.apply(model, "lora+embed+head")
    assert "head: the embedding's table, which embed trains" in report and model.head.weight is model.embed.tokens.weight
    assert peft.count_parameters(model)["by_method"]["embed"] == 61 * 32 and "head" not in peft.count_parameters(model)["by_method"]


def test_masters_are_float32_and_norms_do_not_decay():
    model = GPT(tiny("stablelm"), torch.bfloat16)                # norms of q and k with a weight for each head: two dimensions
    for p in model.parameters():
        p.data = p.data.bfloat16()
    before = {name: p.clone() for name, p in model.named_parameters()}
    peft.apply(model, "lora+embed+head+norm", rank=2)
    names = {id(p): name for name, p, _ in peft.parameters_by_method(model)}
    decaying = {names[id(p)] for group in peft.param_groups(model, 1.0, 0.1, 1.0) if group["weight_decay"] for p in group["params"]}
    assert not any(peft.is_norm(name) for name in decaying) and {"embed.tokens.weight", "head.weight"} <= decaying
    assert all(p.dtype == torch.float32 for name, p, method in peft.parameters_by_method(model) if method)
    with torch.no_grad():
        for _, p, method in peft.parameters_by_method(model):
            if method:
                p += 1
    peft.detach(model)
    assert same(dict(model.named_parameters()), before) and all(p.dtype == torch.bfloat16 for p in model.parameters())


def test_what_two_methods_would_train_is_said():
    model = GPT(tiny("gpt2"))
    report = peft.apply(model, "bitfit+norm")
    assert report[1] == "norm: 5 tensors of the base; 5 more are trained by the methods before"
    with pytest.raises(ValueError, match="full trains everything already"):
        peft.apply(GPT(tiny("gpt2")), "full+embed")


# -----------------------------------------------------------------------------
# --add_tokens


@pytest.mark.parametrize("family, method", [("gpt2", "lora+embed"), ("llama", "lora+embed+head")])
def test_a_run_with_new_tokens(world, tmp_path, family, method):
    base, own = checkpoint.load_base(world / family), data.Tokenizer.load(world / family)
    folder = trained(world, tmp_path / "a", family, method="lora", add_tokens=str(world / "new.txt"), learning_rate=0.05)
    model, tokenizer, config = run.load_run(folder, "cpu", "float32")
    n = own.vocab_size
    assert config.method == method and model.config.vocab_size == n + 3 == tokenizer.vocab_size == len(model.head.weight)
    assert tokenizer.encode("say <a><b> cat") == [*own.encode("say "), n, n + 1, *own.encode(" cat")] and tokenizer.decode([n + 2]) == "<never seen>"
    assert (model.head.weight is model.embed.tokens.weight) == base.config.tied
    assert peft.fingerprint(model) == base.base_fingerprint
    peft.detach(model)
    table = model.embed.tokens.weight
    assert torch.equal(table[:n], base.embed.tokens.weight) and torch.allclose(table[n:], base.embed.tokens.weight.mean(0).expand(3, -1), atol=1e-7)
    second, tensors = started(world, tmp_path / "b", "--init_from", folder)
    assert same(tensors, tensors_of(folder / "adapter.pt")) and second.tokenizer.encode("<b>") == [n + 1]
    again, _, _ = run.load_run(trained(world, tmp_path / "c", family, init_from=str(folder)), "cpu", "float32")
    assert again.config.vocab_size == n + 3


def test_new_tokens_are_resumed_and_sampled(world, tmp_path, script):
    (tmp_path / "tokens").write_text("<a>\n<b>\n")
    flags = ["--base", world / "gpt2", "--data", world / "data.jsonl", *FLAGS, "--add_tokens", "tokens", "--lr_schedule", "constant"]
    done = script("train.py", *flags, "--out_dir", "one", "--max_iters", 4, cwd=tmp_path)
    assert done.returncode == 0 and "tokens     those of tokens beside the base's" in done.stdout and "embed: 1 tensors" in done.stdout, done.stderr
    assert re.findall(r"measured (.+?), predicted (.+?) \(ratio 1.00", done.stdout)      # of the last step, where Adam's states are there
    assert script("train.py", *flags, "--out_dir", "two", cwd=tmp_path).returncode == 0
    (tmp_path / "tokens").unlink()
    done = script("train.py", "--resume", "two", "--max_iters", 4, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert same(*(run.newest_state(tmp_path / name)["tensors"] for name in ("one", "two")))
    for command in (["sample.py", "two", "--prompt", "say <a>", "--max_new_tokens", 3], ["evaluate.py", "two", "--max_new_tokens", 3], ["hub.py", "show", "two"]):
        done = script(*command, cwd=tmp_path)
        assert done.returncode == 0, done.stderr


def test_conversations_over_new_tokens(world, tmp_path):
    """A base that was never trained on conversations learns ChatML with two tokens of its own; the next run goes on in it."""
    (tmp_path / "tokens").write_text("<|im_start|>\n<|im_end|>\n<a>\n")
    said = [{"role": "user", "content": "say <|im_end|> cat <a>"}, {"role": "assistant", "content": "tac"}]
    talks = [{"messages": [{"role": "user", "content": f"{said[0]['content']} {i}"}, said[1]]} for i in range(12)]
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps(talk) + "\n" for talk in talks))
    known = data.Tokenizer.load(world / "gpt2").vocab_size
    folder = trained(world, tmp_path / "a", method="lora", add_tokens=str(tmp_path / "tokens"), data=str(tmp_path / "talks.jsonl"))
    _, tokenizer, config = run.load_run(folder, "cpu", "float32")
    chat = run.chat_of(config, tokenizer, folder)
    ids, n_prompt = chat.example(said[:1], "tac")
    assert [i for i in ids if i >= known] == [known, known + 2, known + 1, known, known + 1] and ids[-2:] == [known + 1, *tokenizer.encode("\n")]
    assert tokenizer.decode(ids[n_prompt:]) == "tac\n" and "say <|im_end|> cat <a>" in tokenizer.decode(ids[:n_prompt])
    assert chat.ends == {known + 1} <= set(tokenizer.stops)
    second, _ = started(world, tmp_path / "b", "--init_from", folder)        # on pairs of prompt and completion
    assert second.chat.source == chat.source and second.config.template == str(folder / "chat_template.jinja")


TEMPLATE = "{% for m in messages %}WORD {{ m['content'] }}{{ eos_token }}{% endfor %}"


def test_a_template_goes_out_and_comes_in_again(world, tmp_path):
    """That which an adapter was trained with; its base's own, of which the export holds a copy, says nothing about it."""
    base, mine = tmp_path / "base", tmp_path / "mine.jinja"
    shutil.copytree(world / "llama", base)
    (base / "chat_template.jinja").write_text(TEMPLATE.replace("WORD", "its"))
    mine.write_text(TEMPLATE.replace("WORD", "my"))
    talk = [{"role": "user", "content": "say cat"}, {"role": "assistant", "content": "tac"}]
    (tmp_path / "talks.jsonl").write_text((json.dumps({"messages": talk}) + "\n") * 12)
    talks = dict(method="lora", data=str(tmp_path / "talks.jsonl"))
    for name, options, wanted in (("chat", talks | dict(template=str(mine)), mine.read_text()), ("plain", dict(method="lora"), None)):
        folder = trained(tmp_path, tmp_path / name, "base", **dict(data=str(world / "data.jsonl")) | options)
        out, again = tmp_path / f"{name} out", tmp_path / f"{name} again"
        hub.export(folder, out)
        assert (out / "chat_template.jinja").is_file()
        hub.import_adapter(out, base, again)
        _, tokenizer, config = run.load_run(again, "cpu", "float32")
        chat = run.chat_of(config, tokenizer, again)
        assert wanted == (chat and chat.source) and config.template == ("base" if wanted else "auto")
        for start in (out, again):
            second, _ = started(world, tmp_path / f"from {start.name}", "--init_from", start, "--base", base)      # on pairs
            assert wanted == (second.chat and second.chat.source)


TOKENS_OF_TRANSFORMERS = """
import sys, json, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from peft import PeftModel
base, merged, exported, text, out = sys.argv[1:]
results = {}
for name, folder in (("merged", merged), ("exported", exported)):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(merged if name == "merged" else base, dtype=torch.float32)
    if name == "exported":
        model.resize_token_embeddings(len(tokenizer))
        model = PeftModel.from_pretrained(model, exported)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    results[name] = {"ids": ids, "logits": model.eval()(torch.tensor([ids])).logits.detach(), "vocab_size": model.config.vocab_size}
torch.save(results, out)
"""


@pytest.mark.peers
@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
def test_transformers_and_peft_read_new_tokens(world, peer, tmp_path, family, script):
    folder = trained(world, tmp_path / "a", family, method="lora", add_tokens=str(world / "new.txt"), learning_rate=0.05)
    hub.merge_run(folder, tmp_path / "merged")
    done = script("hub.py", "export", folder, tmp_path / "exported")
    assert "call model.resize_token_embeddings(" in done.stdout, done.stderr
    model, tokenizer, _ = run.load_run(folder, "cpu", "float32")
    text = "say <a> cat<b><never seen>"
    peer(TOKENS_OF_TRANSFORMERS, world / family, tmp_path / "merged", tmp_path / "exported", text, tmp_path / "results")
    ids = tokenizer.encode(text)
    for name, theirs in torch.load(tmp_path / "results", weights_only=True).items():
        assert theirs["ids"] == ids and theirs["vocab_size"] == model.config.vocab_size, name
        assert (theirs["logits"] - model(torch.tensor([ids]))[0]).abs().max() < 1e-5, name
    again = checkpoint.load_base(tmp_path / "merged")
    assert again.config.vocab_size == model.config.vocab_size and data.Tokenizer.load(tmp_path / "merged").encode(text) == ids


def test_rows_that_wait_as_padding_are_used(world):
    model = GPT(tiny("llama", vocab_size=70))
    known = model.embed.tokens.weight[:61].clone()
    tokens.widen(model, 61, 4)
    assert model.config.vocab_size == 70 and torch.equal(model.embed.tokens.weight[:61], known)
    assert torch.allclose(model.embed.tokens.weight[61:65], known.mean(0).expand(4, -1), atol=1e-7)
    assert len(model.head.weight) == 70 and model.num_params() == GPT(tiny("llama", vocab_size=70)).num_params()


@pytest.mark.parametrize("content, words", [
    (b"<a>\n<b>\n<a>\n", "'<a>' is there twice"), (b"<a>\n<|endoftext|>\n", "has '<|endoftext|>' already"), (b"", "the file is empty"), (b" \n\n", "the file is empty"),
    (b"<a>\n\xff\n", "line 2: byte 0xff is not UTF-8"), (None, "No such file")])
def test_files_of_tokens_that_are_refused(world, tmp_path, refused, content, words):
    if content is not None:
        (tmp_path / "tokens").write_bytes(content)
    said = refused("train.py", "--base", world / "gpt2", "--data", world / "data.jsonl", *FLAGS, "--add_tokens", "tokens", cwd=tmp_path)
    assert words in said


def test_bases_that_take_no_tokens(world, tmp_path, refused):
    checkpoint.save_base(GPT(tiny("gpt2", vocab_size=300)), tmp_path / "pieces")
    data.Tokenizer.train(["the cat sat on the mat"] * 3, 300).save(tmp_path / "pieces")
    flags = ["--data", world / "data.jsonl", *FLAGS, "--add_tokens", world / "new.txt"]
    assert "a SentencePiece model alone, to which no tokens can be added" in refused("train.py", "--base", tmp_path / "pieces", *flags, cwd=tmp_path)
    assert "add_tokens needs a --base" in refused("train.py", *flags, cwd=tmp_path)
    assert "fsdp" in refused("train.py", "--fsdp", "--base", world / "gpt2", *flags, cwd=tmp_path)
    assert not list(tmp_path.glob("out/*/config.toml"))
