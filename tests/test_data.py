"""The embedded corpus, the readers, the tokenizer, masks and batches."""

import csv
import hashlib
import io
import json
import re
import shutil
import sys
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

import data
from lib import download, files, origin, waiter, world
from data import Batches, Encoded, Example, Tokenizer, collate, encode, eval_batches, format_prompt, load, parse_mr
from lib.tokenizer import end_ids


@pytest.fixture(scope="module")
def tokenizer():
    corpus = load("embedded")
    return Tokenizer.train([t for e in corpus.train[:300] for t in e.references], 600)


# -----------------------------------------------------------------------------
# the embedded world


def test_embedded_corpus_tests_generalization():
    corpus = load("embedded")
    prompts = [{e.prompt for e in split} for split in (corpus.train, corpus.val, corpus.test)]
    assert [len(p) for p in prompts] == [1500, 100, 100] and len(set().union(*prompts)) == 1700
    names = [{parse_mr(p)["name"] for p in split} for split in prompts]
    assert len(names[1] - names[0]) > 20 and len(names[2] - names[0]) > 20       # names that training never shows
    texts = [t for e in corpus.train for t in e.references]
    assert len(texts) > 4000 and len(set(texts)) > 0.98 * len(texts)
    assert all(len(set(e.references)) == len(e.references) >= 3 for e in corpus.train)
    assert corpus.fingerprint == load("embedded").fingerprint


def test_embedded_texts_say_what_the_representation_says():
    told = []
    for example in load("embedded").test:
        mr = parse_mr(example.prompt)
        for text in example.references:
            assert mr["name"].lower() in text.lower(), (mr, text)
            told += [mr[key].lower() in text.lower() for key in ("food", "near", "area") if key in mr]
            assert text[0] == text[0].upper() and text[-1] in ".!?" and "  " not in text and not re.search(r" [,.]|\ba [aeio]", text), text
    assert len(told) > 500 and sum(told) > 0.98 * len(told)      # as in E2E, a text may leave something out


def test_plain_text_never_shows_the_mapping():
    corpus, plain = load("embedded"), "\n".join(world.plain_text())
    assert "[" not in plain and 1_500_000 < len(plain) < 4_000_000
    heads = [line.split("||")[0] for line in plain.splitlines() if "||" in line]       # what stands before a sentence says nothing of it
    assert heads and all(re.fullmatch(r"paper : [\w ]+ \| day : \w+day \| page : \d+", head) for head in heads)
    held_out = {parse_mr(e.prompt)["name"] for e in corpus.test} - {parse_mr(e.prompt)["name"] for e in corpus.train}
    assert not [name for name in held_out if re.search(rf"(?<!The ){name}", plain)]      # "The Blue Oven" is another place


def test_a_waiter_says_what_the_menu_says():
    train, val, test = waiter.conversations()
    systems = [{talk[0]["content"] for talk in split} for split in (train, val, test)]
    assert [len(s) for s in systems] == [800, 30, 60] and len(set().union(*systems)) == 890
    dishes = [dish for course in waiter.COURSES for dish in waiter.dishes(course)]
    kinds = set()
    for system, *turns in train + val + test:
        menu = json.loads(system["content"].split(": ", 1)[1])
        prices = {dish: price for course in menu.values() for dish, price in course.items()}
        for guest, answer in zip(turns[::2], turns[1::2]):
            said, question = answer["content"], guest["content"].lower()
            mentioned = sorted((dish for dish in dishes if dish in said), key=said.index)
            kinds.add((said.split()[0], len(mentioned)))
            if said.startswith("Our"):
                assert mentioned == list(menu[said.split()[1]]) and said.split()[1] in question
                continue
            assert all(dish in question for dish in mentioned)
            assert re.findall("£([0-9]+)", said) == [str(prices[dish]) for dish in mentioned if dish in prices]
            assert said.startswith("I am sorry") == (mentioned[0] not in prices)
    assert kinds == {("The", 1), ("I", 1), ("Yes,", 1), ("Our", 2), ("One", 2)}


# -----------------------------------------------------------------------------
# files


def test_real_csv(real_data):
    corpus = load(real_data / "e2e")
    text = (real_data / "e2e" / "testset_w_refs.csv").read_text(encoding="utf-8-sig")
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    groups = {}
    for row in rows:
        groups.setdefault(row["mr"], []).append(row["ref"])
    assert {e.prompt: e.references for e in corpus.test} == groups and len(corpus.test) == 630
    assert not {e.prompt for e in corpus.train} & {e.prompt for e in corpus.val}
    assert len(corpus.train) + len(corpus.val) == 547


def test_templates():
    mr = "name[The Plough], eatType[pub], priceRange[£20-25], familyFriendly[no], customer rating[5 out of 5]"
    assert format_prompt(mr, "pipe") == "name : The Plough | Type : pub | price : £20-25 | family friendly : no | customer rating : 5 out of 5||"
    assert format_prompt(mr, "raw") == mr + "\n" and format_prompt("Write a poem.", "pipe") == "Write a poem."
    assert format_prompt("food[Thai], food[Indian]", "pipe") == "food : Thai | food : Indian||"


def test_json_lines_and_text(tmp_path):
    lines = [{"prompt": f"p{i // 2}", "completion": f"c{i}"} for i in range(8)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    corpus = load(tmp_path / "a.jsonl")
    assert sorted((e.prompt, *e.references) for s in (corpus.train, corpus.val, corpus.test) for e in s) == [(f"p{i}", f"c{2 * i}", f"c{2 * i + 1}") for i in range(4)]
    (tmp_path / "a.txt").write_bytes(b"One\r\nline.\r\n\r\nTwo.\n\n\nThree.\n\nTwo.\n")
    corpus = load(tmp_path / "a.txt")
    assert sorted(e.references[0] for s in (corpus.train, corpus.val, corpus.test) for e in s) == ["One\nline.", "Three.", "Two."]


@pytest.mark.parametrize("name, content, words", [
    ("a.csv", b"mr,text\nname[x],y\n", "no column ref; found mr, text"), ("a.csv", b'mr,ref\n"name[x]",a\n"name[y]",a,b\n', "line 3: 3 columns where the header has 2"),
    ("a.csv", b'mr,ref\nname[x],"a\n', "line 2"), ("a.csv", b"mr,ref\nname[x],\n", "line 2: ref is empty"), ("a.csv", b"mr,ref\nhello,a\n", "line 2: 'hello' is no representation"),
    ("a.csv", b"mr,ref\n", "no examples"), ("a.csv", b"", "empty"), ("a.csv", b"mr,ref\nname[x],\xff\n", "line 2: byte 0xff is not UTF-8"),
    ("a.jsonl", b'{"prompt": "a", "completion": "b"}\n{"prompt"\n', "line 2: not JSON"), ("a.jsonl", b'{"prompt": "a"}\n', "line 1: needs prompt and completion; found prompt"),
    ("a.jsonl", b'{"prompt": 3, "completion": "b"}\n', "line 1: prompt is not text"), ("a.jsonl", b'{"prompt": "", "completion": " "}\n', "line 1: completion is empty"),
    ("a.csv", b"prompt,completion,prompt\na,b,c\n", "prompt is the name of two columns"), ("a.csv", b"q,a\nb,c\n", "prompt and completion, or instruction and output would do"),
    ("a.jsonl", b'{"prompt": "a", "completion": ' + b"1" * 5000 + b"}\n", "a.jsonl, line 1: not JSON: Exceeds the limit"),
    ("a.jsonl", b'{"instruction": "a", "input": 0, "output": "b"}\n', "line 1: input is not text"), ("a.jsonl", b'{"instruction": "a", "output": null}\n', "line 1: output is not text"),
    ("a.jsonl", b'{"conversations": [{"from": "human", "value": 1}], "system": "s"}\n', "line 1: message 1: its content is not text"),
    ("a.txt", b" \n", "empty"), ("a.txt", b"one", "1 examples cannot be divided"), ("a.xyz", b"x", "ends in .csv, .json, .jsonl, .txt"),
])
def test_files_that_are_refused(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(words)):
        load(tmp_path / name)


def test_folders_that_hold_no_data(tmp_path):
    with pytest.raises(ValueError, match="found nothing"):
        load(tmp_path)
    (tmp_path / "x.md").touch()
    with pytest.raises(ValueError, match="no data there; it must hold trainset.csv or devset.csv, or train.jsonl; found x.md"):
        load(tmp_path)
    with pytest.raises(ValueError, match="no such file or folder, nor one of the names embedded, plain"):
        load("nothing")


# -----------------------------------------------------------------------------
# tokenizers


@settings(derandomize=True, deadline=None, max_examples=100)
@given(st.text(st.characters(codec="utf-8", exclude_characters="\0")))
def test_every_text_survives(tokenizer, text):
    text = text.replace("▁", "")                            # SentencePiece's own sign for a space
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text.removeprefix(" ") or tokenizer.decode(ids) == text
    assert not {tokenizer.bos, tokenizer.eos} & set(ids)


def test_a_saved_tokenizer_is_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert (again.fingerprint, again.vocab_size, again.bos, again.eos) == (tokenizer.fingerprint, tokenizer.vocab_size, 1, 2)


def test_gpt2s_tokenizer(real_data, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    ours, theirs = Tokenizer.load(real_data / "gpt2"), tokenizers.Tokenizer.from_file(str(real_data / "gpt2" / "tokenizer.json"))
    text = "name : The Plough | Type : pub||The Plough costs £20, doesn't it? <|endoftext|>"
    assert ours.encode("Hello world") == [15496, 995] and (ours.bos, ours.eos) == (50256, 50256)
    assert ours.encode("hi there") == theirs.encode("hi there").ids and 50256 not in ours.encode(text) and ours.decode(ours.encode(text)) == text
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((real_data / "gpt2" / name).read_bytes())
    assert Tokenizer.load(tmp_path).encode("The Plough costs £20") == ours.encode("The Plough costs £20")


@pytest.mark.parametrize("name, content", [("tokenizer.model", b""), ("tokenizer.model", b"abc"), ("tokenizer.json", b"{}"), ("tokenizer.json", b"\xff")])
def test_tokenizers_that_are_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match="not a"):
        Tokenizer.load(tmp_path)
    with pytest.raises(ValueError, match="no tokenizer there"):
        Tokenizer.load(tmp_path / "none")


# -----------------------------------------------------------------------------
# special tokens

TEXT = "The Plough costs £20 in time"


def spelled_in_bytes(tokenizers, special):
    """A byte-level tokenizer of GPT-2's kind with these special tokens, the first ids."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator([TEXT] * 3, trainer)
    return made


def spelled_in_pieces(tokenizers, special):
    """A tokenizer of Llama 2's kind, as it is converted from SentencePiece."""
    normalizers, decoders = tokenizers.normalizers, tokenizers.decoders
    made = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    all_bytes = [f"<0x{i:02X}>" for i in range(256)]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=330, special_tokens=special + all_bytes, show_progress=False)
    made.train_from_iterator([TEXT] * 3, trainer)
    return made


def post_processor(tokenizers, made, bos):
    """What puts bos before a text, or nothing where bos is "", or does not say where it is None."""
    spelling = tokenizers.processors.ByteLevel(trim_offsets=False)
    if bos is None:
        return spelling
    tokens = [(bos, made.token_to_id(bos))] if bos else []
    single = f"{bos} $A".strip()
    template = tokenizers.processors.TemplateProcessing(single=single, pair=f"{single} $B", special_tokens=tokens)
    in_pieces = made.token_to_id("<unk>") is not None
    return template if in_pieces else tokenizers.processors.Sequence([spelling, template])


# name: (special tokens, what makes the tokenizer, bos in the template or None for no template, tokenizer_config.json)
PUBLISHED = {
    "llama3": (["<|begin_of_text|>", "<|eot_id|>"], spelled_in_bytes, "<|begin_of_text|>",
               {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "tokenizer_class": "PreTrainedTokenizerFast"}),
    "qwen2.5": (["<|endoftext|>", "<|im_end|>"], spelled_in_bytes, None,
                {"bos_token": None, "eos_token": "<|im_end|>", "add_bos_token": False, "tokenizer_class": "PreTrainedTokenizerFast"}),
    "pythia": (["<|endoftext|>", "<|padding|>"], spelled_in_bytes, None,
               {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "tokenizer_class": "GPTNeoXTokenizer"}),
    "smollm2": (["<|endoftext|>", "<|im_start|>", "<|im_end|>"], spelled_in_bytes, None,
                {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "add_bos_token": False, "tokenizer_class": "GPT2Tokenizer"}),
    "gemma": (["<pad>", "<eos>", "<bos>", "<unk>"], spelled_in_pieces, "<bos>",
              {"bos_token": {"content": "<bos>", "__type": "AddedToken"}, "eos_token": "<eos>", "unk_token": "<unk>",
               "add_bos_token": True, "tokenizer_class": "PreTrainedTokenizerFast"}),
    "mistral": (["<unk>", "<s>", "</s>"], spelled_in_pieces, "<s>",
                {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True, "tokenizer_class": "LlamaTokenizer"}),
    "phi3": (["<unk>", "<s>", "</s>", "<|endoftext|>"], spelled_in_pieces, "",
             {"bos_token": "<s>", "eos_token": "<|endoftext|>", "unk_token": "<unk>", "add_bos_token": False,
              "tokenizer_class": "PreTrainedTokenizerFast"}),
}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder with a small tokenizer of each family's kind, in its published form."""
    tokenizers = pytest.importorskip("tokenizers")
    root = tmp_path_factory.mktemp("published")
    for name, (special, make, bos, config) in PUBLISHED.items():
        made = make(tokenizers, special)
        made.post_processor = post_processor(tokenizers, made, bos)
        (root / name).mkdir()
        made.save(str(root / name / "tokenizer.json"))
        (root / name / "tokenizer_config.json").write_text(json.dumps(config))
    return root


@pytest.mark.peers
def test_ids_are_those_of_transformers(peer, published):
    """Prompts begin with bos where transformers would put it, and are the same tokens."""
    lines = peer("""
import json, sys
from transformers import AutoTokenizer
for name in sys.argv[3:]:
    tokenizer = AutoTokenizer.from_pretrained(f"{sys.argv[1]}/{name}")
    print(json.dumps([tokenizer(sys.argv[2]).input_ids, tokenizer.bos_token_id, tokenizer.eos_token_id]))
""", published, TEXT, *PUBLISHED).splitlines()
    theirs = dict(zip(PUBLISHED, map(json.loads, lines), strict=True))
    ours = {name: Tokenizer.load(published / name) for name in PUBLISHED}
    assert theirs == {name: [t.encode_prompt(TEXT), t.bos, t.eos] for name, t in ours.items()}
    begins = {name for name, t in ours.items() if t.begin}
    assert begins == {"llama3", "gemma", "mistral"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_copy_of_the_tokenizers_files_says_the_same(published, tmp_path, name):
    """The copy in a run's folder, which has no config.json beside it, and the copy of the copy."""
    (tmp_path / "base").mkdir()
    for file in (published / name).iterdir():
        shutil.copy(file, tmp_path / "base")
    (tmp_path / "base" / "config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": 1}))
    first, folder = Tokenizer.load(tmp_path / "base"), tmp_path / "base"
    for copy in ("one", "two"):
        (tmp_path / copy).mkdir()
        Tokenizer.load(folder).save(tmp_path / copy)
        folder = tmp_path / copy
        again = Tokenizer.load(folder)
        assert (again.fingerprint, again.bos, again.eos, again.begin) == (first.fingerprint, first.bos, first.eos, first.begin)
    assert again.decode(again.encode_prompt(TEXT)) == TEXT and again.decode(again.encode_completion(TEXT)) == TEXT


def test_a_folder_that_names_nothing_is_of_gpt2s_kind(published, tmp_path):
    """Its bos is eos and stands before prompts, also after saving; a bos of null is none, and eos of null is the model's."""
    shutil.copy(published / "pythia" / "tokenizer.json", tmp_path)
    bare = Tokenizer.load(tmp_path)
    assert (bare.bos, bare.eos, bare.begin) == (0, 0, [0])
    (tmp_path / "copy").mkdir()
    bare.save(tmp_path / "copy")
    assert Tokenizer.load(tmp_path / "copy").begin == [0]
    (tmp_path / "config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": [1, 0]}))
    assert (Tokenizer.load(tmp_path).bos, Tokenizer.load(tmp_path).eos) == (1, 1)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": None, "eos_token": None}))
    none = Tokenizer.load(tmp_path)
    assert (none.bos, none.eos, none.begin) == (None, 1, []) and none.encode_prompt("a") == none.encode("a")
    assert none.encode_prompt("") == [1]                 # something must stand before the first token
    (tmp_path / "config.json").unlink()
    assert Tokenizer.load(tmp_path).encode_completion("a") == none.encode("a")


@pytest.mark.parametrize("file, content, words", [
    ("tokenizer_config.json", {"eos_token": "<|im_end|>"}, "eos_token is '<|im_end|>', which the vocabulary of the tokenizer lacks"),
    ("tokenizer_config.json", {"bos_token": {"content": "<s>"}}, "bos_token is '<s>', which the vocabulary of the tokenizer lacks"),
    ("tokenizer_config.json", {"eos_token": 3}, "eos_token is 3; it must be text or null"),
    ("special_tokens_map.json", {"eos_token": "</s>"}, "eos_token is '</s>', which the vocabulary of the tokenizer lacks"),
    ("config.json", {"eos_token_id": 4000}, "eos_token_id is 4000, which the vocabulary of the tokenizer lacks"),
    ("generation_config.json", {"eos_token_id": [4000]}, "eos_token_id is 4000, which the vocabulary of the tokenizer lacks"),
    ("config.json", {"eos_token_id": "</s>"}, "eos_token_id is '</s>'; it must be a token's id or a list of them"),
    ("config.json", {"text_config": {"eos_token_id": [True]}}, "eos_token_id is [True]; it must be a token's id"),
])
def test_an_end_that_the_vocabulary_lacks_is_refused(published, tmp_path, file, content, words):
    shutil.copy(published / "pythia" / "tokenizer.json", tmp_path)
    (tmp_path / file).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / file}: {words}")):
        Tokenizer.load(tmp_path)


def test_a_sentencepiece_model_goes_by_the_files_beside_it(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "the", "add_bos_token": False}))
    with pytest.raises(ValueError, match="eos_token is 'the', which the vocabulary"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "▁the", "add_bos_token": False}))
    loaded = Tokenizer.load(tmp_path)
    assert (loaded.bos, loaded.begin, tokenizer.begin) == (1, [], [1]) and [loaded.eos] == tokenizer.encode("the")
    (tmp_path / "copy").mkdir()
    loaded.save(tmp_path / "copy")
    again = Tokenizer.load(tmp_path / "copy")
    assert (again.fingerprint, again.eos, again.begin) == (loaded.fingerprint, loaded.eos, []) and again.fingerprint != tokenizer.fingerprint


@pytest.fixture
def both(published, tokenizer, tmp_path):
    """A folder with tokenizer.json and tokenizer.model, of the same special tokens."""
    tokenizer.save(tmp_path)
    for file in (published / "mistral").iterdir():
        shutil.copy(file, tmp_path)
    return tmp_path


def test_of_both_files_the_one_with_added_tokens_is_read(both, published, tokenizer, monkeypatch):
    """And tokenizer.model without the package, where the special tokens are the same."""
    expected = Tokenizer.load(published / "mistral").encode_prompt(TEXT)
    assert Tokenizer.load(both).encode_prompt(TEXT) == expected != tokenizer.encode_prompt(TEXT)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    trim_bytes(both)
    loaded = Tokenizer.load(both)
    assert loaded.encode_prompt(TEXT) == tokenizer.encode_prompt(TEXT) and (loaded.bos, loaded.eos) == (1, 2)
    loaded.save(both / "..")
    with pytest.raises(ValueError, match="tokenizer.json needs the tokenizers package: pip install tokenizers"):
        Tokenizer.load(published / "mistral")


def trim_bytes(folder):
    """Takes the bytes out of tokenizer.json's added tokens, which the trainer of this file has put there."""
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"] = [token for token in content["added_tokens"] if not token["content"].startswith("<0x")]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return content


@pytest.mark.parametrize("what", ["added token", "moved token", "decoder", "eos", "template"])
def test_without_the_package_a_difference_says_what_to_install(both, monkeypatch, what):
    content = trim_bytes(both)
    config = json.loads((both / "tokenizer_config.json").read_text())
    if what == "added token":
        content["added_tokens"].append({"id": 600, "content": "<|im_end|>"})
    elif what == "moved token":
        content["added_tokens"][2]["id"] = 3
    elif what == "decoder":
        config["added_tokens_decoder"] = {"601": {"content": "<|end|>"}}
    elif what == "eos":
        config["eos_token"] = "<s>"
    else:
        content["post_processor"]["special_tokens"]["<s>"]["ids"] = [2]
    (both / "tokenizer.json").write_text(json.dumps(content))
    (both / "tokenizer_config.json").write_text(json.dumps(config))
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match="tokenizer.json needs the tokenizers package: pip install tokenizers"):
        Tokenizer.load(both)


def test_all_ends_that_a_base_names(tokenizer, tmp_path):
    assert end_ids(tmp_path, 600) == set() and tokenizer.stops == [2]
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 5, "text_config": {"eos_token_id": [6, 7]}}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 106]}))
    assert end_ids(tmp_path, 600) == {5, 6, 7, 106}
    assert end_ids(tmp_path, 106) == {5, 6, 7}              # a model never writes what it has no row for
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": None}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, "</s>"]}))
    with pytest.raises(ValueError, match=r"generation_config.json: eos_token_id is \[7, '</s>'\]; it must be"):
        end_ids(tmp_path, 600)


def test_no_stop_is_left_in_the_text(tokenizer):
    ids = tokenizer.encode_prompt("the pub")
    assert tokenizer.decode([*ids, 2, 77, 78]) == tokenizer.decode([*ids, 77, 78]) != "the pub"
    tokenizer.ends = frozenset({77, 78})
    try:
        assert tokenizer.stops == [2, 77, 78] and tokenizer.decode([*ids, 2, 77, 78]) == "the pub"
    finally:
        tokenizer.ends = frozenset()


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json", "config.json", "vocab.json", "data.jsonl",
                                  "model.safetensors", "pytorch_model.bin", "model.safetensors.index.json"])
def test_a_pointer_of_git_lfs_is_told_as_what_it_is(tmp_path, name):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 17209920\n"
    (tmp_path / name).write_text(pointer)
    read = {"config.json": origin.read_config, "data.jsonl": lambda folder: load(folder / name)}
    if "model." in name and name != "tokenizer.model":
        read[name] = lambda folder: list(files.read_tensors(folder))
    with pytest.raises(ValueError, match=f"^{re.escape(str(tmp_path / name))}: a Git LFS pointer, .* `git lfs pull`"):
        read.get(name, Tokenizer.load)(tmp_path)


# -----------------------------------------------------------------------------
# sequences


def test_mask_is_a_position(tokenizer):
    """Prompt tokens are masked also where the completion has the same ones, and the end token is supervised."""
    encoded = encode([Example("the the", ["the the"])], tokenizer, 64)
    tokens, targets = collate([encoded.sequence(0)], 64)
    prompt, completion = tokenizer.encode_prompt("the the"), tokenizer.encode_completion("the the")
    n, m = len(prompt), len(completion)
    assert tokens[0, :n + m - 1].tolist() == (prompt + completion)[:-1]
    assert targets[0].tolist() == [-1] * (n - 1) + completion + [-1] * (tokens.size(1) - n - m + 1) and completion[-1] == tokenizer.eos
    assert encoded.n_supervised == m and encoded.n_tokens == n + m - 1


def test_a_long_cell(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,completion\n" + "".join(f"p{i},{'x' * 200_000}\n" for i in range(3)))
    assert {len(example.references[0]) for example in everything(load(tmp_path / "a.csv"))} == {200_000}


def test_where_a_text_is_too_long(tokenizer, tmp_path):
    lines = [{"prompt": f"p{i}", "completion": "word " * (1 + 99 * (i == 7))} for i in range(30)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ValueError, match=r"a.jsonl, line 8: 'p7' and its text have \d+ tokens"):
        corpus = load(tmp_path / "a.jsonl")
        for split in (corpus.train, corpus.val, corpus.test):
            encode(split, tokenizer, 12)


def test_too_long(tokenizer):
    example = Example("name[x]", ["a very long text " * 9])
    with pytest.raises(ValueError, match=r"'name\[x\]' and its text have \d+ tokens, block_size is 12"):
        encode([example], tokenizer, 12)
    cut = encode([example, Example("b", ["c"])], tokenizer, 12, too_long="cut")
    assert cut.n_cut == 1 and max(cut.lengths) == 12
    goes_on = encode([Example("", ["a very long text " * 9])], tokenizer, 12)
    assert sum(goes_on.lengths) == goes_on.n_supervised and goes_on.n_cut == 0


def test_nothing_to_learn(tokenizer):
    with pytest.raises(ValueError, match="split is empty"):
        encode([], tokenizer, 12)
    with pytest.raises(ValueError, match="nothing to learn from in 1 examples"):
        encode([Example("a prompt that fills the whole context", ["x"])], tokenizer, 3, too_long="cut")
    with pytest.raises(ValueError, match="token .* at index 1 of 'hello' is beyond the vocabulary of 2"):
        encode([Example("hello", ["x"])], tokenizer, 12, vocab_size=2)


# -----------------------------------------------------------------------------
# forms of data


def write_lines(path, records):
    """A file of JSON lines."""
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    return path


def chat_record(*texts, system=None):
    """A record of messages: user, assistant, user, .."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return {"messages": ([{"role": "system", "content": system}] if system else []) + messages}


def sharegpt(record):
    """The same record in ShareGPT's form."""
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return {"id": 7, "conversations": [{"from": names[m["role"]], "value": m["content"]} for m in record["messages"]]}


def everything(corpus):
    """All examples of all splits."""
    return [example for split in (corpus.train, corpus.val, corpus.test) for example in split]


TALKS = [chat_record(f"Hi {i}", f"Ho {i}", f"And {i}?", f"So {i} 🍲", system="Be kind" if i % 2 else None) for i in range(12)]


@pytest.mark.parametrize("form", ["messages", "ShareGPT"])
@pytest.mark.parametrize("ending", [".jsonl", ".json", " pretty.json"])
def test_conversations(tmp_path, form, ending):
    """Each turn of the assistant is an example, and those of one conversation share a split."""
    records = TALKS if form == "messages" else list(map(sharegpt, TALKS))
    path = tmp_path / f"a{ending}"
    if ending == ".jsonl":
        write_lines(path, records)
    else:
        path.write_text(json.dumps(records, indent=2 if "pretty" in ending else None, ensure_ascii="pretty" in ending))
    corpus = load(path)
    assert corpus.form == form and [len(split) for split in (corpus.train, corpus.val, corpus.test)] == [20, 2, 2]
    found = {(json.dumps(example.messages), *example.references) for example in everything(corpus)}
    assert found == {(json.dumps(talk["messages"][:i]), talk["messages"][i]["content"]) for talk in TALKS
                     for i, message in enumerate(talk["messages"]) if message["role"] == "assistant"}
    for split in (corpus.train, corpus.val, corpus.test):
        numbers = [example.references[0].split()[1] for example in split]
        assert all(numbers.count(number) == 2 for number in numbers)
    assert corpus.train[-1].messages == corpus.train[len(corpus.train) - 1].messages and len(corpus.train[3:9:2]) == 3
    with pytest.raises(IndexError):
        corpus.train[20]


def test_alpaca(tmp_path):
    records = [{"instruction": "Add", "input": "1 and 2", "output": "3"}, {"instruction": "Say hi", "input": "", "output": "hi"},
               {"instruction": "Go on", "output": "", "system": "Be kind"}]
    corpus = load(write_lines(tmp_path / "a.jsonl", records))
    assert corpus.form == "Alpaca"
    found = {example.prompt: (example.messages, example.references) for example in everything(corpus)}
    assert found == {
        "Add\n\n1 and 2": ([{"role": "user", "content": "Add\n\n1 and 2"}], ["3"]), "Say hi": ([{"role": "user", "content": "Say hi"}], ["hi"]),
        "Go on": ([{"role": "system", "content": "Be kind"}, {"role": "user", "content": "Go on"}], [""])}
    rows = "instruction,input,output\n" + "".join(f"Do {i},,done\n" for i in range(3))
    (tmp_path / "a.csv").write_text(rows)
    assert {example.messages[0]["content"] for example in everything(load(tmp_path / "a.csv"))} == {"Do 0", "Do 1", "Do 2"}


def lone(*messages, **more):
    """One line of messages, given as (role, content)."""
    return {"messages": [{"role": role, "content": content} for role, content in messages], **more}


GOOD = lone(("user", "a"), ("assistant", "b"))
TEXT_PART = {"type": "text", "text": "c"}


@pytest.mark.parametrize("record, words", [
    (lone(("assistant", "a")), "line 2: message 1: assistant after nothing; the order is system (or none), user, assistant"),
    (lone(("user", "a"), ("system", "b")), "line 2: message 2: system after user"),
    (lone(("system", "a"), ("assistant", "b")), "line 2: message 2: assistant after system"),
    (lone(("system", "a"), ("system", "b")), "line 2: message 2: system after system"),
    (lone(("tool", "a")), "line 2: message 1: role is 'tool'; it must be one of system, user"),
    (lone((["user"], "a")), "line 2: message 1: role is ['user']"),
    (lone(("user", None)), "line 2: message 1: its content is not text"),
    (lone(("user", "\ud800")), "line 2: message 1: its content is not text"),
    (lone(("user", [TEXT_PART, {"type": "image_url"}])), "line 2: message 1: a part of its content is of type 'image_url'; only text"),
    (lone(("user", ["a"])), "line 2: message 1: a part of its content is of type 'str'"),
    (lone(("user", [{"type": "text"}])), "line 2: message 1: a part of its content is not text"),
    (lone(("user", "a"), tools=[{"name": "f"}]), "line 2: has tools; tools, images and sounds are not supported"),
    ({"messages": [{"role": "user", "content": "a", "tool_calls": [1]}]}, "line 2: message 1: has tool_calls"),
    ({"messages": [{"role": "assistant", "content": "a", "reasoning_content": "b"}]}, "line 2: message 1: has reasoning_content; thoughts belong into"),
    ({"messages": [{"role": "assistant", "content": "a", "weight": 0}]}, "line 2: message 1: has weight 0, but every message"),
    ({"messages": [{"role": "user"}]}, "line 2: message 1: has no content"), ({"messages": ["a"]}, "line 2: message 1: is no object"),
    ({"messages": "a"}, "line 2: its messages are no list"),
    ({"instruction": "a", "output": "b"}, "line 2: a record of Alpaca, while the first of the file is of messages; put each form into a file"),
    ({"text": "a"}, "line 2: needs prompt and completion; found text (messages, conversations, or instruction and output would do"),
    ([1], "line 2: needs prompt and completion; found list"),
])
def test_conversations_that_are_refused(tmp_path, record, words):
    path = tmp_path / "a.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n{json.dumps(record)}\n{json.dumps(GOOD)}\n")
    with pytest.raises(ValueError, match=re.escape(f"{path}, {words}")):
        load(path)


@pytest.mark.parametrize("content, words", [
    ('[{"prompt": "a", "completion": "b"}\n{"prompt": "c"}]', "line 2: not JSON: no comma or ] after an element"),
    ('[{"prompt": "a", "completion": "b"},\n\n{"prompt" "c"}]', "line 3: not JSON: Expecting ':' delimiter"),
    ('[{"prompt": "a", "completion": "b"}', "line 1: not JSON: no comma or ] after an element"),
    ('[{"prompt": "a", "completion": "b"},', "not JSON: the array does not end where the file does"),
    ('[{"prompt": "a", "completion": "b"}] x', "not JSON: the array does not end where the file does"),
    ('[{"prompt": "a", "completion": "b"},\n{"prompt": "c"}]', "element 2, line 2: needs prompt and completion; found prompt"),
    ("[]", "empty"), ("[" * 100000, "not JSON"), ('{"prompt": ' + "[" * 100000, "line 1: not JSON"), (" \n\n", "empty"),
])
def test_arrays_that_are_refused(tmp_path, content, words):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=re.escape(words)):
        load(tmp_path / "a.json")


def test_what_is_joined_skipped_and_ended_is_told(tmp_path):
    records = [
        lone(("user", "a"), ("user", "b"), ("assistant", "c"), ("assistant", "d</s>"), ("user", "e")),
        lone(("user", "a")), lone(("user", [TEXT_PART, TEXT_PART]), ("assistant", "It is <|im_end|> they say<|im_end|>\n"))]
    corpus = load(write_lines(tmp_path / "train.jsonl", records * 2).parent)
    by_prompt = {example.prompt: example.references for example in everything(corpus)}
    assert by_prompt == {"a\n\nb": ["c\n\nd"], "cc": ["It is <|im_end|> they say"]}
    assert set(corpus.told) == {"4 messages joined with the one before them, of the same role", "4 ends of text written out in the data are taken as ends",
                                "2 conversations skipped, in which the assistant says nothing"}
    with pytest.raises(ValueError, match="no conversation has a message of the assistant"):
        load(write_lines(tmp_path / "none.jsonl", [lone(("user", "a"))] * 3))


def test_ends_that_are_written_out(tmp_path):
    endings = {"a</s>": "a", "b <|endoftext|>\n": "b", "c</s></s>": "c", "<s>20</s> for <s>9</s>": "<s>20</s> for <s>9</s>", "d </s> d": "d </s> d", "e ": "e "}
    records = [{"prompt": f"p{i}", "completion": text} for i, text in enumerate(endings)]
    corpus = load(write_lines(tmp_path / "a.jsonl", records))
    assert {example.prompt: example.references for example in everything(corpus)} == {f"p{i}": [text] for i, text in enumerate(endings.values())}
    assert corpus.told == ("3 ends of text written out in the data are taken as ends",)
    (tmp_path / "a.txt").write_text("One.\n\nStill one.\n<|endoftext|>\nTwo.\n<|endoftext|>\nThree.<|endoftext|>")
    corpus = load(tmp_path / "a.txt")
    assert sorted(example.references[0] for example in everything(corpus)) == ["One.\n\nStill one.", "Three.", "Two."]
    assert corpus.told == ("3 ends of text written out in the data are taken as ends",)


@pytest.mark.parametrize("template", ["pipe", "raw", "auto", "none"])
@pytest.mark.parametrize("prompt", ["items[3]", "Optional[str]", "a[1], a[2]", " padded \n"])
def test_a_prompt_is_what_it_is(tokenizer, tmp_path, prompt, template):
    corpus = load(write_lines(tmp_path / "a.jsonl", [{"prompt": prompt, "completion": f"{i}"} for i in range(3)]))
    resolved = data.resolved_template(template, corpus.form)
    assert resolved == "none" and {example.prompt for example in everything(corpus)} == {prompt}
    for name in (resolved, template):
        ids, counts = encode(corpus.train, tokenizer, 64, name).sequence(0)
        assert ids[~counts].tolist() == tokenizer.encode_prompt(prompt)


def test_templates_by_form_of_data():
    expected = {"representations": "pipe", "prompt/completion": "none", "text": "none", "messages": "base", "ShareGPT": "base", "Alpaca": "base"}
    assert {form: data.resolved_template("auto", form) for form in expected} == expected
    assert data.resolved_template("raw", "representations") == "raw" and data.resolved_template("chatml", "Alpaca") == "chatml"
    with pytest.raises(ValueError, match="template is chatml, which is of conversations; the data are texts without prompts"):
        data.resolved_template("chatml", "text")


# -----------------------------------------------------------------------------
# splits


def pairs_of(counts):
    """A pair for each of counts[prompt] answers, all different."""
    return [{"prompt": prompt, "completion": f"{prompt.strip()} {i}"} for prompt, n in counts.items() for i in range(n)]


def split_sizes(corpus):
    """The number of texts in each split."""
    return [sum(len(example.references) for example in split) for split in (corpus.train, corpus.val, corpus.test)]


def test_examples_of_one_prompt_share_a_split(tmp_path):
    counts = {f"prompt {i}": 1 + i % 4 for i in range(80)} | {f" prompt {i}\n": 1 for i in range(80)}
    corpus = load(write_lines(tmp_path / "a.jsonl", pairs_of(counts)))
    prompts = [{example.prompt.strip() for example in split} for split in (corpus.train, corpus.val, corpus.test)]
    assert sum(map(len, prompts)) == len(set().union(*prompts)) == 80 and sum(split_sizes(corpus)) == 280
    assert all(28 <= size <= 32 for size in split_sizes(corpus)[1:])         # a tenth of the examples, not of the prompts
    assert data.overlap(corpus) == (0, 0)


@pytest.mark.parametrize("counts", [{"one": 50}, {"one": 30, "two": 20}, {"big": 40, "large": 40, "huge": 40, "a": 1}, {"": 50}])
def test_prompts_that_are_too_frequent_are_divided_by_line(tmp_path, counts):
    corpus = load(write_lines(tmp_path / "a.jsonl", pairs_of(counts)))
    n = sum(counts.values())
    assert split_sizes(corpus) == [n - 2 * (n // 10), n // 10, n // 10]
    texts = [text for example in everything(corpus) for text in example.references]
    assert len(texts) == len(set(texts)) == n
    same_prompt, same_text = data.overlap(corpus)
    assert (same_prompt, same_text) == (len(corpus.val), 0)


def test_a_split_has_500_examples_at_most(tmp_path):
    corpus = load(write_lines(tmp_path / "a.jsonl", pairs_of({f"{i}": 2 for i in range(4000)})))
    assert split_sizes(corpus) == [7000, 500, 500]


def test_overlap_is_counted_in_prompt_and_answer(tmp_path):
    train = [{"prompt": f"p{i}", "completion": f"c{i}"} for i in range(9)]
    write_lines(tmp_path / "train.jsonl", train)
    write_lines(tmp_path / "dev.jsonl", [{"prompt": " p1", "completion": "c1 "}, {"prompt": "p2", "completion": "x"}, {"prompt": "q", "completion": "c3"}])
    corpus = load(tmp_path)
    assert data.overlap(corpus) == (2, 1) and len(corpus.val) == 3
    talks = [chat_record("Hi", f"Ho {i}", system=system) for i in range(4) for system in (None, "Be kind")]
    write_lines(tmp_path / "train.jsonl", talks[:6])
    write_lines(tmp_path / "dev.jsonl", [*talks[5:], chat_record("Hi", "Ho 1", system="Be rude")])
    assert data.overlap(load(tmp_path)) == (3, 1)


@pytest.mark.parametrize("name", ["val", "valid", "validation", "dev"])
@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".txt"])
def test_names_of_the_splits(tmp_path, name, ending):
    for split, n in (("train", 4), (name, 2), ("test", 3)):
        pairs = pairs_of({f"{split} {i}": 1 for i in range(n)})
        if ending == ".jsonl":
            write_lines(tmp_path / f"{split}.jsonl", pairs)
        elif ending == ".json":
            (tmp_path / f"{split}.json").write_text(json.dumps(pairs))
        elif ending == ".csv":
            rows = [f"{pair['prompt']},{pair['completion']}" for pair in pairs]
            (tmp_path / f"{split}.csv").write_text("\n".join(["prompt,completion", *rows]))
        else:
            (tmp_path / f"{split}.txt").write_text("\n\n".join(pair["completion"] for pair in pairs))
    corpus = load(tmp_path)
    assert [len(split) for split in (corpus.train, corpus.val, corpus.test)] == [4, 2, 3]
    assert all(example.references[0].startswith(name) for example in corpus.val) and not corpus.told
    (tmp_path / "dev.json").write_text('[{"prompt": "a", "completion": "b"}]')
    if (name, ending) != ("dev", ".json"):
        with pytest.raises(ValueError, match="are both there for one split; keep one"):
            load(tmp_path)


def test_splits_of_different_forms_are_refused(tmp_path):
    write_lines(tmp_path / "train.jsonl", TALKS)
    write_lines(tmp_path / "val.jsonl", pairs_of({"a": 3}))
    with pytest.raises(ValueError, match="the splits are of different forms: messages, prompt/completion; they must be of one"):
        load(tmp_path)


# -----------------------------------------------------------------------------
# memory


def test_encoded_data_take_six_bytes_a_token(tokenizer, tmp_path):
    corpus = load(write_lines(tmp_path / "a.jsonl", pairs_of({f"what is {i}": 1 for i in range(3000)})))
    encoded = encode(corpus.train, tokenizer, 64)
    arrays = encoded.tokens, encoded.supervised, encoded.starts
    assert sum(part.nbytes for part in arrays) <= 6 * len(encoded.tokens) and all(part.base is None or part is encoded.supervised for part in arrays)
    again = [tokenizer.encode_prompt(example.prompt) + tokenizer.encode_completion(example.references[0]) for example in corpus.train]
    assert [encoded.sequence(i)[0].tolist() for i in range(len(encoded))] == again


def test_many_conversations_are_not_copied_into_memory(tmp_path):
    """What loading leaves behind does not grow with the texts: 40 bytes a conversation of 2 kB."""
    n = 5_000
    with open(tmp_path / "a.jsonl", "w") as file:
        for i in range(n):
            file.write(json.dumps(chat_record(f"Question {i}? " * 60, f"Answer {i}. " * 80)) + "\n")
    load(write_lines(tmp_path / "b.jsonl", TALKS))               # What numpy imports at its first use is not meant.
    tracemalloc.start()
    corpus = load(tmp_path / "a.jsonl")
    left, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(corpus.train) == n - 1000 and corpus.train[7].references[0].startswith("Answer ")
    assert left < 100 * n and peak < 400 * n < (tmp_path / "a.jsonl").stat().st_size / 4


def test_too_long_ones_are_dropped_and_counted(tokenizer):
    examples = [Example("a", ["a very long text " * 9]), Example("b", ["c"])]
    dropped = encode(examples, tokenizer, 12, too_long="drop")
    assert (dropped.n_dropped, dropped.n_cut, len(dropped)) == (1, 0, 1)
    with pytest.raises(ValueError, match="nothing to learn from in 1 examples: .*, 1 longer than block_size 12"):
        encode(examples[:1], tokenizer, 12, too_long="drop")
    with pytest.raises(ValueError, match="too_long is 'skip'; it must be one of refuse, cut, drop"):
        encode(examples, tokenizer, 12, too_long="skip")


def test_the_prompt_counts_where_that_is_asked(tokenizer):
    encoded = encode([Example("the pub", ["the the"])], tokenizer, 64, train_on="prompt+completion")
    ids, counts = encoded.sequence(0)
    assert counts.tolist() == [False] + [True] * (len(ids) - 1) and encoded.n_supervised == len(ids) - 1
    tokens, targets = collate([(ids, counts)], 64)
    assert targets[0, :len(ids) - 1].tolist() == ids[1:].tolist() and tokens[0, :len(ids) - 1].tolist() == ids[:-1].tolist()


# -----------------------------------------------------------------------------
# batches


def sequences(lengths):
    return Encoded.of((([i + 1] * (n + 1), [True] * (n + 1)) for i, n in enumerate(lengths)), 1024)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=40), st.integers(1, 9), st.integers(0, 3), st.integers(0, 60))
def test_every_sequence_comes_once_an_epoch_and_resuming_goes_on(lengths, batch_size, seed, stop):
    encoded, n = sequences(lengths), len(lengths)
    batches, seen = Batches(encoded, batch_size, seed), []
    for _ in range(3 * n):
        seen += next(batches)[0][:, 0].tolist()
    full_epochs = len(seen) // n
    counts = np.bincount(seen, minlength=n + 1)[1:]
    assert counts.max() <= full_epochs + 2 and counts.min() >= full_epochs - 2 and len(seen) == 3 * n * batch_size
    one, two = Batches(encoded, batch_size, seed), Batches(encoded, batch_size, seed)
    for _ in range(stop):
        next(one)
    two.load_state_dict(one.state_dict())
    for _ in range(5):
        assert torch.equal(next(one)[0], next(two)[0])


@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_share_one_batch(world_size):
    encoded = sequences(range(1, 60))
    whole, parts = Batches(encoded, 8, 3), [Batches(encoded, 8 // world_size, 3, rank, world_size) for rank in range(world_size)]
    for _ in range(30):
        assert sorted(next(whole)[0][:, 0].tolist()) == sorted(i for part in parts for i in next(part)[0][:, 0].tolist())


def test_padding_on_e2e(real_data):
    corpus = load(real_data / "e2e")
    tokenizer = Tokenizer.load(real_data / "stories260k")
    for batch_size in (8, 16, 32):
        batches = Batches(encode(corpus.train, tokenizer, 512), batch_size, 1)
        tokens = [next(batches)[0] for _ in range(len(batches.plan))]
        real = sum(int(batches.lengths[row].sum()) for row in batches.plan)
        assert 1 - real / sum(t.numel() for t in tokens) < 0.10


def test_a_position_in_other_data_is_refused():
    batches = Batches(sequences(range(1, 30)), 4, 0)
    for change, words in (({"sequences": 5}, "sequences 5, this run has 29"), ({"seed": 1}, "seed 1"), ({"global_batch": 8}, "global_batch 8"), ({"index": 99}, "does not exist")):
        with pytest.raises(ValueError, match=words):
            batches.load_state_dict(batches.state_dict() | change)


def test_evaluation_batches_are_always_the_same():
    encoded = sequences([5, 3, 9, 1, 7, 2])
    assert [t.tolist() for t, _ in eval_batches(encoded, 2, 2)] == [t.tolist() for t, _ in eval_batches(encoded, 2, 2)]
    for batch_size in (1, 2, 3, 4):                              # as many of the same sequences, whatever the batch size
        shown = [row[0].item() for tokens, _ in eval_batches(encoded, batch_size, 3) for row in tokens]
        assert shown == [1, 5, 3] and sum(len(t) for t, _ in eval_batches(encoded, batch_size)) == 6


# -----------------------------------------------------------------------------
# download


def archive(path, **files):
    with zipfile.ZipFile(path, "w") as z:
        for name, content in files.items():
            z.writestr(name.replace("__", "/"), content)
    return path


def test_download_from_an_archive(tmp_path):
    wanted = {name: hashlib.sha256(name.encode()).hexdigest() for name in ("a.csv", "b.csv")}
    path = archive(tmp_path / "x.zip", **{"e2e__a.csv": "a.csv", "e2e__b.csv": "b.csv", "e2e__README": "more"})
    data.download(tmp_path / "to", path, files=wanted)
    assert {f.name: f.read_text() for f in (tmp_path / "to").iterdir()} == {"a.csv": "a.csv", "b.csv": "b.csv"}
    (tmp_path / "to" / "a.csv").write_text("mine")
    with pytest.raises(ValueError, match="is there already and differs"):
        data.download(tmp_path / "to", path, files=wanted)


@pytest.mark.parametrize("files, words", [({"..__a.csv": "a.csv"}, "climbs out"), ({"__a.csv": "a.csv"}, "climbs out"), ({"a.csv": "other"}, "SHA-256 is"), ({"b.csv": "a.csv"}, "no a.csv in it"),
                                          ({"a.csv": "a.csv", "x__a.csv": "a.csv"}, "twice")])
def test_archives_that_are_refused(tmp_path, files, words):
    path = archive(tmp_path / "x.zip", **files)
    with pytest.raises(ValueError, match=words):
        data.download(tmp_path / "to", path, files={"a.csv": hashlib.sha256(b"a.csv").hexdigest()})
    assert not (tmp_path / "to").exists()
    with pytest.raises(ValueError, match="SHA-256 is .*, wanted 00"):
        data.download(tmp_path / "to", path, sha256="00", files={})


def test_without_a_network(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("no network")
    monkeypatch.setattr(download.urllib.request, "urlopen", fail)
    with pytest.raises(ValueError, match="put trainset.csv, devset.csv, testset_w_refs.csv into .* by hand, or pass the file with --archive"):
        data.download(tmp_path)
    (tmp_path / "x.zip").write_bytes(io.BytesIO(b"PK").read())
    with pytest.raises(ValueError, match="not a readable zip"):
        data.download(tmp_path, tmp_path / "x.zip")
