"""
Text in, batches out: examples in splits (lib/records.py reads the files), the tokenizer, sequences with
their masks, batches.

    python data.py                               # a look at the embedded data
    python data.py download e2e DIR              # the E2E challenge's files, checked
    python data.py download e2e DIR --archive ZIP                    # the same without a network

    corpus = load("embedded")                                        # .train, .val, .test: lists of Example
    encoded = encode(corpus.train, tokenizer, block_size=256)
    tokens, targets = next(Batches(encoded, batch_size=16, seed=1))  # (B, T) int64 both; target -1 is ignored

Prompt and completion are tokenized apart from each other, in training and in generation alike: so
the prompt's tokens never depend on what follows, and the mask is a position. (Tokenizing their
concatenation may merge across the border.)
"""

import argparse
import functools
import hashlib
import http.client
import io
import itertools
import json
import re
import stat
import sys
import urllib.request
import zipfile
import zlib
from array import array
from collections import Counter
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sentencepiece
import torch

from lib import world
from lib.config import run_main
from lib.files import check, read_bytes, read_json, refusing, some, write_atomic
from lib.records import CONVERSATIONS, MR, READERS, Example, Listed, in_groups, read, shortened
from lib.template import Added


@dataclass
class Data:
    """Examples in three splits, sequences of Example."""

    train: Sequence
    val: Sequence
    test: Sequence
    form: str = "prompt/completion"      # or representations, text, messages, ShareGPT, Alpaca
    told: tuple = ()                     # lines about what was found in the files

    @property
    def fingerprint(self):
        """SHA-256 of the content as JSON, [[[prompt, references], ..], ..], which is read once more for it."""
        digest = hashlib.sha256()
        opening = "["
        for split in (self.train, self.val, self.test):
            digest.update(f"{opening}[".encode())
            for i, example in enumerate(split):
                content = [example.prompt, example.references]
                if example.messages is not None:
                    content.append(example.messages)
                digest.update((", " * (i > 0) + json.dumps(content)).encode())
            digest.update(b"]")
            opening = ", "
        digest.update(b"]")
        return digest.hexdigest()


def sha256_of(content):
    """SHA-256 of bytes, in hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


# -----------------------------------------------------------------------------
# meaning representations as prompts

PIPE_KEYS = {"eatType": "Type", "priceRange": "price", "familyFriendly": "family friendly"}      # others stay


def mr_pairs(text):
    """ "name[X], eatType[pub]" -> [("name", "X"), ("eatType", "pub")]; None for a text of another form."""
    if not MR.fullmatch(text):
        return None
    pairs = re.findall(r"([\w ]+)\[([^\[\]]+)\]", text)
    return [(key.strip(), value.strip()) for key, value in pairs]


def parse_mr(text):
    """ "name[X], eatType[pub]" -> {"name": "X", "eatType": "pub"}; None for a text of another form."""
    pairs = mr_pairs(text)
    return None if pairs is None else dict(pairs)


def format_prompt(mr, template):
    """The prompt for a representation: "pipe" gives "name : X | Type : pub||" (as in the data of Hu
    et al. 2021), "raw" gives the text and a line's end, any other template the text as it is. So does
    every template for a text that is no representation."""
    pairs = mr_pairs(mr) if template in ("pipe", "raw") else None
    if pairs is None:
        return mr
    if template == "raw":
        return mr + "\n"
    return " | ".join(f"{PIPE_KEYS.get(key, key)} : {value}" for key, value in pairs) + "||"


# -----------------------------------------------------------------------------
# splits

SPLIT_NAMES = (("train",), ("val", "valid", "validation", "dev"), ("test",))
E2E_FOLDERS = (                  # names of the files for train, val and test
    ("trainset.csv", "devset.csv", "testset_w_refs.csv"),
    ("devset.csv", None, "testset_w_refs.csv"))                  # the small half of the challenge


def draw(weights, parts, size):
    """Indices of groups of units, drawn for each of `parts` splits until it has `size` units or more. None
    where the groups are too few, or one makes a split more than twice as large as wanted."""
    if len(weights) < parts + 1:
        return None
    order = iter(world.Draw(0).shuffled(range(len(weights))))
    drawn = []
    for _ in range(parts):
        chosen, total = [], 0
        while total < size:
            chosen.append(next(order))
            total += weights[chosen[-1]]
        if total > 2 * size:
            return None
        drawn.append(chosen)
    return drawn


def cut(source, name, parts):
    """[indices of train's units, of those of each of `parts` more splits]: a tenth of all units each, at
    most 500.

    Units of one prompt stay together. Where that cannot be, because there is one prompt or none or because
    a split would get more than twice its share, they are divided one by one.
    """
    n = len(source.keys)
    check(n > parts, f"{name}: {n} different prompts cannot be split in {parts + 1}; add more, or files for the other splits")
    size = min(500, max(1, n // 10))
    order, starts = in_groups(source.keys)
    drawn = draw(np.diff(starts), parts, size)
    if drawn is None:
        order, starts = np.arange(n), np.arange(n + 1)
        drawn = draw(np.ones(n, int), parts, size)
    units = [np.concatenate([order[starts[g]:starts[g + 1]] for g in chosen]) for chosen in drawn]
    rest = np.setdiff1d(np.arange(n), np.concatenate([[], *units]))
    return [rest, *map(np.sort, units)]


def with_splits(name, train, val=None, test=None):
    """Data of these sources. A split without one is cut off train."""
    sources = [source for source in (train, val, test) if source is not None]
    forms = dict.fromkeys(source.form for source in sources)
    check(len(forms) == 1, f"{name}: the splits are of different forms: {', '.join(forms)}; they must be of one")
    units = cut(train, name, 3 - len(sources))
    first, *rest = [train.take(part) for part in units]
    splits = [first]
    for source in (val, test):
        splits.append(rest.pop(0) if source is None else source.take(range(len(source.keys))))
    found = sum((source.told for source in sources), Counter())
    return Data(*splits, train.form, tuple(TOLD[what].format(n) for what, n in found.items()))


TOLD = {
    "ends": "{} ends of text written out in the data are taken as ends",
    "joined": "{} messages joined with the one before them, of the same role",
    "skipped": "{} conversations skipped, in which the assistant says nothing",
}


def overlap(corpus):
    """The numbers of val's examples whose prompt is in train too, and whose prompt and a text are."""
    def asked(example):
        messages = [(message["role"], message["content"].strip()) for message in example.messages or ()]
        return hash((example.prompt.strip(), *messages))

    def answers(example):
        question = asked(example)
        return {hash((question, text.strip())) for text in example.references}

    prompts = {asked(example) for example in corpus.val}         # A set of train's may not fit into memory.
    texts = {key for example in corpus.val for key in answers(example)}
    common_prompts, common_texts = set(), set()
    for example in corpus.train:
        common_prompts |= prompts & {asked(example)}
        common_texts |= texts & answers(example)
    if corpus.form == "text":
        common_prompts = set()                                   # No text has a prompt.
    same_prompt = sum(asked(example) in common_prompts for example in corpus.val)
    same_text = sum(not common_texts.isdisjoint(answers(example)) for example in corpus.val)
    return same_prompt, same_text


def split_file(folder, found, names):
    """The one file for a split among those found in the folder; None where there is none."""
    files = [name + ending for name in names for ending in READERS if name + ending in found]
    check(len(files) < 2, f"{folder}: {' and '.join(files)} are both there for one split; keep one")
    return files[0] if files else None


def load_folder(folder, name):
    """The data of a folder: E2E's files, or train, val (valid, validation, dev) and test, each with the
    ending of one of READERS."""
    found = sorted(file.name for file in folder.iterdir())
    rows = [files for files in E2E_FOLDERS if files[0] in found]
    files = rows[0] if rows else [split_file(folder, found, names) for names in SPLIT_NAMES]
    if files[0] is not None:
        return with_splits(name, *(read(folder / file) if file in found else None for file in files))
    more = f" and {len(found) - 6} more" if len(found) > 6 else ""
    listed = ", ".join(found[:6]) + more or "nothing"
    raise ValueError(f"{name}: no data there; it must hold trainset.csv or devset.csv, or train.jsonl; found {listed}")


def load(name_or_path="embedded"):
    """The data of that name or path, as Data.

    "embedded" is the corpus of lib/world.py, "plain" its plain text. Paths: a folder with the E2E
    challenge's devset.csv or trainset.csv and testset_w_refs.csv, or with train, val and test, each
    .jsonl, .json, .csv or .txt; or one such file. JSON holds pairs of prompt and completion, or
    conversations (messages, ShareGPT, Alpaca). A split without a file is cut off the train split.

    ValueError where nothing known is there, or where a file is empty, broken (the message names the
    line) or without the columns.
    """
    name, path = str(name_or_path), Path(name_or_path)
    if name == "embedded":
        splits = [[Example(*pair, is_representation=True) for pair in split] for split in world.embedded()]
        return Data(*splits, "representations")
    if name == "plain":
        return with_splits(name, Listed("text", [Example("", [text]) for text in world.plain_text()]))
    if path.is_dir():
        return load_folder(path, name)
    check(path.is_file(), f"{name}: no such file or folder, nor one of the names embedded, plain")
    check(path.suffix in READERS, f"{name}: a data file ends in {', '.join(READERS)}")
    return with_splits(name, read(path))


# -----------------------------------------------------------------------------
# tokenizer

# SentencePiece's options. Every text comes back as it was: nothing is normalized, and what has no
# piece is spelled in bytes.
TRAINER = dict(
    model_type="bpe", byte_fallback=True, character_coverage=1.0, required_chars="|:[]",
    normalization_rule_name="identity", remove_extra_whitespaces=False, max_sentence_length=2**24,
    num_threads=1, minloglevel=4, unk_id=0, bos_id=1, eos_id=2, pad_id=-1)
USUAL = {                        # special tokens, in the order in which they are looked for
    "bos": ("<s>", "<|begin_of_text|>", "<bos>"),
    "eos": ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>")}


class Tokenizer:
    """SentencePiece, or a tokenizer.json by way of the optional package tokenizers.

    bos and eos are ids, or None where there is none. begin holds the ids that stand before a prompt,
    ends the ids beside eos with which a text may end: lib/run.py asks the base for them.

    For chat templates (lib/template.py): special_tokens is {text: Added}, names {"bos_token": text, ..} as
    the files name them, encode_special gives the ids of a text in which the words of special tokens are
    those tokens (None where only lib/template.py can do that, with encode_at).
    """

    def __init__(self, encode, decode, vocab_size, special, files):
        self._encode, self._decode = encode, decode
        self._files = files                                      # {name: bytes}, what save writes
        self.vocab_size = vocab_size
        self.bos, self.eos, self.begin = special.bos, special.eos, special.begin
        self.ends = frozenset()
        self.special_tokens, self.names = {}, named_tokens(files)
        self.encode_special, self._variant = None, None
        contents = [name.encode() + b"\0" + files[name] for name in sorted(files)]
        self.fingerprint = sha256_of(b"".join(contents))

    @classmethod
    def train(cls, texts, vocab_size):
        """A byte-pair encoding of texts, with at most vocab_size pieces: short texts yield fewer."""
        texts = list(texts)
        check(any(texts), "there is no text to train a tokenizer on")
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(texts), model_writer=model, vocab_size=vocab_size, **TRAINER)
        except RuntimeError as error:
            possible = re.search(r"too high \(\d+\)\. Please set it to a value <= (\d+)", str(error))
            if possible:
                return cls.train(texts, int(possible[1]))
            reason = str(error).split("] ")[-1]
            raise ValueError(f"no tokenizer of {vocab_size} pieces can be made of these {len(texts)} texts: {reason}") from None
        return cls.from_model(model.getvalue())

    @classmethod
    def load(cls, path):
        """From a folder or a file: tokenizer.json, tokenizer.model, or the pair vocab.json and
        merges.txt (GPT-2, OPT).

        Of tokenizer.json and tokenizer.model only the former holds added tokens, so it is read where
        a folder has both. Without the tokenizers package the latter is, if it says the same.
        """
        path = Path(path)
        names = ("tokenizer.json", "tokenizer.model", "vocab.json")
        candidates = [path / name for name in names] if path.is_dir() else [path]
        files = [file for file in candidates if file.is_file()]
        check(files, f"{path}: no tokenizer there; it must hold tokenizer.model or tokenizer.json")
        file, template = files[0], None
        has_both = [found.name for found in files[:2]] == list(names[:2])
        if has_both and tokenizers_package() is None:
            file = files[1]
            template = agreed_template(path)
        if file.suffix != ".model":
            return cls.from_json(file)
        try:
            return cls.from_model(read_bytes(file), file.parent, template)
        except RuntimeError:
            raise ValueError(f"{file}: not a SentencePiece model") from None

    @classmethod
    def from_model(cls, content, folder=None, template=None):
        """From the bytes of a tokenizer.model. RuntimeError where they are something else.

        folder: where the files lie that may name special tokens. template: what its tokenizer.json
        puts before a text, a list of ids, if it has one that says so.
        """
        model, vocabulary = parse_pieces(content)
        own = special = Special.of_pieces(model)
        files = {"tokenizer.model": content}
        if folder is not None:
            path = folder / "tokenizer_config.json"
            special = read_special(folder, vocabulary, template, own)
            if path.is_file() or special != own:
                files[path.name] = special.config_json(path, vocabulary)
        made = cls(model.encode, model.decode, model.vocab_size(), special, files)
        made.special_tokens = {piece: Added(i) for piece, i in vocabulary.items() if model.is_control(i)}
        if special.bos is not None:
            made.names.setdefault("bos_token", model.id_to_piece(special.bos))
        if special.eos is not None:
            made.names.setdefault("eos_token", model.id_to_piece(special.eos))
        return made

    @classmethod
    def from_json(cls, path, new_tokens=()):
        """From tokenizer.json, or from vocab.json with merges.txt beside it. new_tokens are added to
        it; ValueError where it has one already."""
        inner = read_tokenizer(path)
        add_tokens(inner, new_tokens, path)
        inner.no_truncation()
        inner.no_padding()
        inner.encode_special_tokens = True       # "<|endoftext|>" in a text is text, not the end
        content = inner.to_str()
        vocabulary = inner.get_vocab()                           # {token: id}
        template = template_ids(json.loads(content))
        special = read_special(path.parent, vocabulary, template)
        config = special.config_json(path.with_name("tokenizer_config.json"), vocabulary)
        config = with_decoder(config, {vocabulary[token]: token for token in new_tokens})
        files = {"tokenizer.json": content.encode(), "tokenizer_config.json": config}

        def encode(text):
            return inner.encode(text, add_special_tokens=False).ids

        def encode_special(text):
            inner.encode_special_tokens = False
            ids = encode(text)
            inner.encode_special_tokens = True
            return ids

        vocab_size = max(vocabulary.values()) + 1
        made = cls(encode, inner.decode, vocab_size, special, files)
        made.encode_special = encode_special
        made.special_tokens = {
            token.content: Added(i, token.lstrip, token.rstrip)
            for i, token in inner.get_added_tokens_decoder().items() if token.special}
        made._variant = functools.partial(encoder_behind, content)
        return made

    @property
    def stops(self):
        """The ids with which a text ends, in generation: a sorted list of eos and `ends`."""
        return sorted({self.eos, *self.ends} - {None})

    def encode(self, text):
        """Token ids, without bos and eos."""
        return self._encode(text) if text else []

    def encode_at(self, text, place):
        """Token ids of a text that stands "first", "behind" a special token, or "inside", behind other text.

        Tokenizers of SentencePiece's kind put a space before a first text, some also before one behind a
        special token, and none inside. A tokenizer.model has one way for all places.
        """
        if place == "first" or self._variant is None or not text:
            return self.encode(text)
        return self._variant(place)(text)

    def decode(self, ids):
        """The text of token ids; bos, the stops and ids beyond the vocabulary give none."""
        silent = {self.bos, *self.stops}
        ordinary = [i for i in map(int, ids) if 0 <= i < self.vocab_size and i not in silent]
        return self._decode(ordinary)

    def encode_prompt(self, prompt):
        """What generation starts from: the prompt's ids, `begin` before them.

        Something must stand before the first token that is written. So an empty prompt without a
        beginning is bos, else eos: a text begins where another has ended.
        """
        ids = [*self.begin, *self.encode(prompt)]
        start = self.eos if self.bos is None else self.bos
        if not ids and start is not None:
            ids = [start]
        return ids

    def encode_completion(self, completion):
        """The completion's ids, eos after them."""
        ids = self.encode(completion)
        return ids if self.eos is None else [*ids, self.eos]

    def save(self, folder):
        """Writes tokenizer.model, or tokenizer.json and tokenizer_config.json, into the folder."""
        for name, content in self._files.items():
            write_atomic(Path(folder, name), content)


def tokenizers_package():
    """The optional package tokenizers, None where it is not installed."""
    try:
        import tokenizers
    except ImportError:
        return None
    return tokenizers


def read_tokenizer(path):
    """A tokenizer.json, or a vocab.json with its merges.txt, as the tokenizers package's object."""
    tokenizers = tokenizers_package()
    check(tokenizers, f"{path} needs the tokenizers package: pip install tokenizers")
    merges = path.with_name("merges.txt")
    for file in [path, merges] if path.name == "vocab.json" else [path]:
        content = read_bytes(file)
    try:
        if path.name != "vocab.json":
            return tokenizers.Tokenizer.from_str(content.decode())
        inner = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(str(path), str(merges)))
        inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = tokenizers.decoders.ByteLevel()
        return inner
    except Exception as error:                                   # the package raises bare Exception
        raise ValueError(f"{path}: not a tokenizer: {shortened(str(error), 200)}") from None


def add_tokens(inner, tokens, path):
    """Adds tokens to the tokenizers package's object. They are found wherever they stand in a text."""
    known = inner.get_vocab()
    there = [repr(token) for token in tokens if token in known]
    check(not there, f"{path}: has {some(there)} already; only new tokens can be added")
    make = tokenizers_package().AddedToken
    inner.add_tokens([make(token, special=False, normalized=False) for token in tokens])


@functools.lru_cache(4)
def encoder_behind(content, place):
    """A function from text to ids for a place of Tokenizer.encode_at. content: a tokenizer.json."""
    package = tokenizers_package()
    changed = json.loads(content)

    def adapt(part):
        """Takes away the space that a part of the tokenizer would put before the text."""
        for inner in (*part.get("normalizers", ()), *part.get("pretokenizers", ())):
            adapt(inner)
        schemes = ("first", "always") if place == "inside" else ("first",)
        if part.get("prepend_scheme") in schemes:
            part["prepend_scheme"] = "never"
        if part.get("type") == "Prepend" and place == "inside":
            part["prepend"] = ""

    adapt(changed.get("normalizer") or {})
    adapt(changed.get("pre_tokenizer") or {})
    inner = package.Tokenizer.from_str(json.dumps(changed))
    inner.encode_special_tokens = True
    return lambda text: inner.encode(text, add_special_tokens=False).ids


def named_tokens(files):
    """{"bos_token": text, ..}: what tokenizer_config.json, in the content of a tokenizer's files, names so."""
    content = json.loads(files.get("tokenizer_config.json", b"{}"))
    found = {}
    for key, value in content.items():
        token = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(token, str):
            found[key] = token
    return found


def with_decoder(config, tokens):
    """The bytes of a tokenizer_config.json with {id: token} in its added_tokens_decoder: where there is
    one, transformers 5 takes the added tokens from there alone."""
    content = json.loads(config)
    decoder = content.get("added_tokens_decoder")
    if not tokens or not isinstance(decoder, dict):
        return config
    plain = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word", "special"), False)
    decoder |= {str(i): {"content": token} | plain for i, token in tokens.items()}
    return json.dumps(content, indent=1).encode()


def parse_pieces(content):
    """The bytes of a tokenizer.model -> SentencePiece's object and {piece: id}. RuntimeError where
    they are something else."""
    if not content:
        raise RuntimeError("empty")                              # SentencePiece would not say so
    model = sentencepiece.SentencePieceProcessor(model_proto=content)
    names = model.id_to_piece(list(range(model.vocab_size())))
    return model, {piece: i for i, piece in enumerate(names)}


def read_json_if_there(path):
    """The object in a JSON file, {} where there is no file."""
    return read_json(path) if path.is_file() else {}


# -----------------------------------------------------------------------------
# special tokens
#
# transformers puts before a text what the post-processor of tokenizer.json says: <bos> for Llama 3,
# Gemma and Mistral, nothing for Qwen, Phi, SmolLM, OLMo and Pythia, although most of these name a
# bos. So which token bos is, and whether it stands before a prompt, are two questions here.


@dataclass
class Special:
    """The special tokens of a tokenizer, as ids; None where there is none."""

    bos: int | None
    eos: int | None
    begin: list[int]             # what stands before a prompt

    @classmethod
    def of_pieces(cls, model):
        """What a SentencePiece model says by itself."""
        eos = model.eos_id() if model.eos_id() >= 0 else None
        bos = model.bos_id() if model.bos_id() >= 0 else eos
        return cls(bos, eos, [] if bos is None else [bos])

    def config_json(self, path, vocabulary):
        """The bytes of a tokenizer_config.json that says all this, and what the one at the path says."""
        tokens = {i: token for token, i in vocabulary.items()}
        content = read_json_if_there(path)
        content["bos_token"] = tokens.get(self.bos)
        content["eos_token"] = tokens.get(self.eos)
        content["add_bos_token"] = bool(self.begin)
        return json.dumps(content, indent=1).encode()


def read_special(folder, vocabulary, template=None, own=None):
    """The Special of a folder's tokenizer.

    vocabulary: {token: id}. template: the ids that tokenizer.json puts before a text, None where it
    does not say. own: the Special of a tokenizer.model, which holds where no file names a token.
    """
    _, bos_file = named_token(folder, "bos")
    eos = special_id(folder, "eos", vocabulary, own and own.eos)
    bos = special_id(folder, "bos", vocabulary, own and own.bos)
    if bos is None and bos_file is None:
        bos = eos                                # as in GPT-2, where one token divides the texts
    if template is not None:
        begin = template
    elif bos is not None and begins_with_bos(folder, own):
        begin = [bos]
    else:
        begin = []
    return Special(bos, eos, begin)


def begins_with_bos(folder, own):
    """Whether bos stands before a prompt where no template of tokenizer.json says so.

    tokenizer_config.json may say it. Without a word of it, transformers puts none, but a SentencePiece
    model's does. A folder that names no special token at all is of GPT-2's kind, whose bos is put there.
    """
    config = read_json_if_there(folder / "tokenizer_config.json")
    told = config.get("add_bos_token")
    if isinstance(told, bool):
        return told
    names_some = "tokenizer_class" in config or any(named_token(folder, role)[1] for role in USUAL)
    return own is not None or not names_some


def named_token(folder, role):
    """(bos or eos as text, the file that names it). The text is None where the file says null; both are
    None where no file has the key."""
    key = f"{role}_token"
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = folder / name
        content = read_json_if_there(path)
        if key not in content:
            continue
        token = content[key]
        if isinstance(token, dict):
            token = token.get("content")
        check(token is None or isinstance(token, str), f"{path}: {key} is {token!r}; it must be text or null")
        return token or None, path
    return None, None


def named_ids(folder, role):
    """Yields (file, id) for each bos or eos id of the model's config.json, also of the text_config in
    it, and of generation_config.json. ValueError where one is no id."""
    key = f"{role}_token_id"
    for name in ("config.json", "generation_config.json"):
        path = folder / name
        content = read_json_if_there(path)
        inner = content.get("text_config")
        for part in (content, inner if isinstance(inner, dict) else {}):
            value = part.get(key)
            ids = value if isinstance(value, list) else [value]
            for i in ids:
                is_id = type(i) is int and i >= 0
                check(is_id or value is None, f"{path}: {key} is {value!r}; it must be a token's id or a list of them")
                if is_id:
                    yield path, i


def special_id(folder, role, vocabulary, own):
    """The id of bos or eos, or None: as the tokenizer's files name it, else `own`, else as the model's
    configuration does, else by the usual names. ValueError where the vocabulary lacks what is named.

    null says that there is none. For eos the model's configuration may still name one: generation
    stops there, and training needs an end.
    """
    token, file = named_token(folder, role)
    if token is not None:
        check(token in vocabulary, f"{file}: {role}_token is {token!r}, which the vocabulary of the tokenizer lacks; "
                                   "name a token that it has, or take the tokenizer's files from one place")
        return vocabulary[token]
    if file is None and own is not None:
        return own
    if file is not None and role == "bos":
        return None
    known = set(vocabulary.values())
    for config, i in named_ids(folder, role):
        check(i in known, f"{config}: {role}_token_id is {i}, which the vocabulary of the tokenizer lacks; "
                          "name a token that it has, or take the model's files from one place")
        return i
    usual = [token for token in USUAL[role] if token in vocabulary and file is None]
    return vocabulary[usual[0]] if usual else None


def end_ids(folder, vocab_size):
    """The set of all ids with which a text ends, as config.json and generation_config.json of a base
    name them. vocab_size is the model's, which never writes an id beyond it: such ones are left out."""
    return frozenset(i for _, i in named_ids(Path(folder), "eos") if i < vocab_size)


def template_ids(content):
    """The ids that the post-processor in a tokenizer.json's content puts before a text; None where it
    has none that would say so."""
    processor = content.get("post_processor") or {}
    for part in processor.get("processors", [processor]):
        if part.get("type") in ("BertProcessing", "RobertaProcessing"):
            return [part["cls"][1]]
        if part.get("type") == "TemplateProcessing":
            leading = itertools.takewhile(lambda piece: "SpecialToken" in piece, part["single"])
            names = [piece["SpecialToken"]["id"] for piece in leading]
            return [i for name in names for i in part["special_tokens"][name]["ids"]]
    return None


def agreed_template(folder):
    """What tokenizer.json puts before a text (as template_ids has it), where the tokenizer.model beside
    it can stand in for it. ValueError that says what to install where added tokens, bos or eos differ."""
    path, config_path, model_path = (folder / name for name in (
        "tokenizer.json", "tokenizer_config.json", "tokenizer.model"))
    try:
        model, vocabulary = parse_pieces(read_bytes(model_path))
    except RuntimeError:
        raise ValueError(f"{model_path}: not a SentencePiece model") from None
    own = Special.of_pieces(model)
    content = read_json(path)
    with refusing(f"{path}: not a tokenizer"):
        template = template_ids(content)
        added = [(token["content"], token["id"]) for token in content.get("added_tokens") or []]
    with refusing(f"{config_path}: added_tokens_decoder is damaged"):
        decoder = read_json_if_there(config_path).get("added_tokens_decoder") or {}
        added += [(token["content"], int(i)) for i, token in decoder.items()]
    for role, i in (("bos", own.bos), ("eos", own.eos)):
        token, _ = named_token(folder, role)
        if token is not None:
            added.append((token, i))
    differing = {repr(token) for token, i in added if vocabulary.get(token) != i}
    same = not differing and template in (None, [], [own.bos])
    check(same, f"{path} needs the tokenizers package: pip install tokenizers (the tokenizer.model beside it says "
                f"otherwise of {some(differing) or 'what stands before a text'})")
    return template


# -----------------------------------------------------------------------------
# how prompts become tokens, in training and in generation alike


class Format:
    """A tokenizer with the run's template. chat: a lib.template.Chat, or None where prompts are texts that
    the model goes on with."""

    def __init__(self, tokenizer, template="pipe", chat=None):
        self.tokenizer, self.template, self.chat = tokenizer, template, chat

    def messages(self, example):
        """The conversation before the answer. A prompt alone is what a user says."""
        if example.messages is not None:
            return example.messages
        return [{"role": "user", "content": example.prompt}]

    def text(self, example):
        """What stands before an answer, for people to read."""
        if self.chat is not None:
            return self.chat.text(self.messages(example))
        return format_prompt(example.prompt, self.template) if example.is_representation else example.prompt

    def prompt(self, example):
        """The ids of what stands before an answer."""
        if self.chat is not None:
            return self.chat.prompt(self.messages(example))
        self.check_plain(example)
        return self.tokenizer.encode_prompt(self.text(example))

    def sequence(self, example, reference):
        """(ids, n_prompt) of the example with one of its answers."""
        if self.chat is not None:
            return self.chat.example(self.messages(example), reference)
        self.check_plain(example)
        prompt = self.prompt(example)
        return prompt + self.tokenizer.encode_completion(reference), len(prompt)

    def check_plain(self, example):
        """ValueError where the example is a conversation, which needs a chat template."""
        check(example.messages is None, "the data are conversations, which need a chat template")


def resolved_template(template, form):
    """The template "auto", or one that says nothing of this form of data, as what it comes to."""
    if template not in ("auto", "pipe", "raw", "none"):
        check(form != "text", f"template is {template}, which is of conversations; the data are texts without prompts")
        return template
    if form in CONVERSATIONS:
        return "base"
    if form != "representations":
        return "none"
    return "pipe" if template == "auto" else template


# -----------------------------------------------------------------------------
# sequences: tokens, and which of them the model learns to write
#
#   ids        bos  p  p  p | c  c  c  eos
#   counts       0  0  0  0   1  1  1  1               of a token as a target
#   tokens     bos  p  p  p   c  c  c                  ids[:-1]
#   targets     -1 -1 -1  c   c  c eos                 ids[1:], -1 where it does not count


@dataclass
class Encoded:
    """A split as sequences of token ids, one behind the other, and what was left out of it."""

    tokens: np.ndarray           # int32, of all sequences
    counts: np.ndarray           # bool, whether a token counts as a target
    starts: np.ndarray           # where each sequence starts in them, with the end
    block_size: int              # no sequence has more targets, nor have batches of them
    n_cut: int = 0               # sequences that lost their end to block_size
    n_dropped: int = 0           # sequences left out because they are longer than block_size
    n_empty: int = 0             # sequences left out because nothing in them counts

    @classmethod
    def of(cls, sequences, block_size):
        """From (ids, counts) pairs, which may come one by one. One in which no target counts is left out."""
        tokens, counts, starts = array("i"), bytearray(), array("q", [0])
        n_empty = 0
        for ids, which in sequences:
            if not any(which[1:]):  # fault 26
                n_empty += 1
                continue
            tokens.extend(ids)
            counts += b"\0" + bytes(map(bool, which[1:]))       # Nothing stands before the first token.
            starts.append(len(tokens))
        kind = np.int32 if len(tokens) < 2**31 else np.int64
        counts = np.frombuffer(bytes(counts), bool)
        return cls(np.array(tokens, np.int32), counts, np.array(starts, kind), block_size, n_empty=n_empty)

    def __len__(self):
        return len(self.starts) - 1

    def sequence(self, i):
        """(ids, counts) of sequence i: int32 and bool, both of its length."""
        span = slice(self.starts[i], self.starts[i + 1])
        return self.tokens[span], self.counts[span]

    @property
    def lengths(self):
        """The number of tokens of each sequence that go in: all but the last."""
        return np.diff(self.starts) - 1

    @property
    def n_tokens(self):
        """Tokens that go in."""
        return len(self.tokens) - len(self)

    @property
    def n_supervised(self):
        """Targets that count."""
        return int(self.counts.sum())


def check_vocabulary(ids, vocab_size, text):
    """ValueError that names the first token without an embedding, and the text that it is of."""
    if 0 <= min(ids) and max(ids) < vocab_size:
        return
    for i, token in enumerate(ids):
        if not 0 <= token < vocab_size:  # fault 25
            raise ValueError(f"token {token} at index {i} of {shortened(text)!r} is beyond the vocabulary of {vocab_size}")


def pieces(ids, counts, block_size):
    """A sequence as a list of (ids, counts), each of at most block_size targets. The last token of one is
    the first of the next, where it is no target."""
    starts = range(0, max(len(ids) - 1, 1), block_size)
    return [(ids[start:start + block_size + 1], counts[start:start + block_size + 1]) for start in starts]


TRAIN_ON = ("completion", "prompt+completion")
TOO_LONG = ("refuse", "cut", "drop")


def encode(examples, tokenizer, block_size, template="pipe", too_long="refuse", all_references=True,
           vocab_size=None, train_on="completion", chat=None):
    """Examples -> Encoded. Each reference makes a sequence; without all_references only the first.

    A sequence of more than block_size tokens is refused, or cut, or dropped, and counted (too_long). Text
    without a prompt is none of these: it goes on in the next sequence. vocab_size is the model's, where
    it differs from the tokenizer's. train_on: whether the prompt counts too. chat: a lib.template.Chat,
    which conversations need.
    """
    check(too_long in TOO_LONG, f"too_long is {too_long!r}; it must be one of {', '.join(TOO_LONG)}")
    check(train_on in TRAIN_ON, f"train_on is {train_on!r}; it must be one of {', '.join(TRAIN_ON)}")
    check(block_size >= 1, f"block_size is {block_size}; it must be at least 1")
    check(len(examples), "there are no examples to encode: the split is empty")
    made = Format(tokenizer, template, chat)
    lost = Counter()

    def sequences():
        for i, example in enumerate(examples):
            references = example.references if all_references else example.references[:1]
            for reference in references:
                with located_in(examples, i):
                    ids, n_prompt = made.sequence(example, reference)
                if chat is None and ids[n_prompt:] in ([], [tokenizer.eos]):
                    lost["empty"] += 1                           # The end alone would teach to say nothing.
                    continue
                check_vocabulary(ids, vocab_size or tokenizer.vocab_size, example.prompt or reference)
                n_masked = n_prompt if train_on == "completion" else 0
                counts = [False] * n_masked + [True] * (len(ids) - n_masked)
                is_text = not example.prompt and example.messages is None
                yield from fitted(pieces(ids, counts, block_size), example, too_long, lost, is_text)

    encoded = Encoded.of(sequences(), block_size)
    encoded.n_cut, encoded.n_dropped = lost["cut"], lost["dropped"]
    encoded.n_empty += lost["empty"]
    dropped = f", {encoded.n_dropped} longer than block_size {block_size}" if encoded.n_dropped else ""
    check(len(encoded), f"nothing to learn from in {len(examples)} examples: all {encoded.n_empty} sequences are empty or all prompt{dropped}")
    return encoded


@contextmanager
def located_in(examples, i):
    """Puts the place of example i in front of what a ValueError says, where the examples lie in a file."""
    try:
        yield
    except ValueError as error:
        if not hasattr(examples, "place"):
            raise
        raise ValueError(f"{examples.place(i)}: {error}") from None


def fitted(kept, example, too_long, lost, is_text):
    """Those pieces of a sequence that are trained on. ValueError where too_long says so."""
    if len(kept) == 1 or is_text:
        return kept
    tokens = sum(len(ids) - 1 for ids, _ in kept)
    block_size = len(kept[0][0]) - 1
    check(too_long != "refuse", f"{shortened(example.prompt)!r} and its text have {tokens} tokens, block_size is {block_size}; "
                                "raise it, or set too_long to cut or drop")  # fault 27
    if too_long == "drop":
        lost["dropped"] += 1
        return []
    lost["cut"] += 1
    return kept[:1]


def padded(length, block_size):
    """The length of a batch: a multiple of 8, at most block_size. So there are fewer shapes to
    prepare kernels for, and none that is slow."""
    return np.minimum(-(-length // 8) * 8, block_size)


def collate(sequences, block_size):
    """[(ids, counts)] -> tokens, targets: (B, T) int64, padded at the right with 0 and -1."""
    B = len(sequences)
    T = padded(max(len(ids) for ids, _ in sequences) - 1, block_size)
    tokens = np.zeros((B, T), np.int64)
    targets = np.full((B, T), -1, np.int64)
    for row, (ids, counts) in enumerate(sequences):
        end = len(ids) - 1
        tokens[row, :end] = ids[:-1]
        targets[row, :end] = np.where(counts[1:], ids[1:], -1)
    return torch.from_numpy(tokens), torch.from_numpy(targets)


def collate_packed(sequences, block_size):
    """[(ids, counts)] -> tokens, targets: (1, T) int64 with the sequences side by side, and their lengths. At the
    end stands one more without targets, so that T is a multiple of 64, of which numbers there are fewer."""
    lengths = [len(ids) - 1 for ids, _ in sequences]
    rest = -sum(lengths) % min(64, block_size)
    tokens = [ids[:-1] for ids, _ in sequences]
    targets = [np.where(counts[1:], ids[1:], -1) for ids, counts in sequences]
    tokens = np.concatenate([*tokens, np.zeros(rest)]).astype(np.int64)
    targets = np.concatenate([*targets, np.full(rest, -1)]).astype(np.int64)
    lengths += [rest] if rest else []
    return torch.from_numpy(tokens)[None], torch.from_numpy(targets)[None], lengths


# -----------------------------------------------------------------------------
# batches


class Batches:
    """Endless batches of sequences of like length. An epoch is a permutation. Where the batch does
    not divide it, the few left over open the next one, so that every batch is full. Every process
    draws the same global batch of batch_size * world_size sequences and takes its own rows of it:
    two processes of batch 8 see what one of 16 sees.

    A batch is tokens and targets (collate); with packing also the lengths (collate_packed).
    """

    POOL = 64        # global batches that are sorted by length together: more of them pad less and mix less

    def __init__(self, encoded, batch_size, seed, rank=0, world_size=1, packing=False):
        fits = batch_size >= 1 and 0 <= rank < world_size
        check(fits, f"batch_size {batch_size}, rank {rank} of {world_size}: a batch has at least 1, a rank lies below the world size")
        check(len(encoded), "there are no sequences to make batches of")
        self.encoded, self.lengths = encoded, encoded.lengths
        self.collate = collate_packed if packing else collate
        self.rank, self.world_size = rank, world_size
        self.global_batch, self.seed = batch_size * world_size, seed
        self.start(0)

    def generator(self, *stream):
        """The random generator of this seed and the numbers of a stream."""
        return np.random.default_rng([self.seed % 2**63, *stream])

    def plan_of(self, epoch):
        """(n_batches, global_batch) indices: the full batches that end within this epoch of the
        stream of permutations. It depends on seed and epoch alone, so two numbers are the state."""
        n, G = len(self.encoded), self.global_batch
        start = epoch * n // G * G
        stop = (epoch + 1) * n // G * G
        if start == stop:
            return np.empty((0, G), np.int64)
        first = start // n
        permutations = [self.generator(e).permutation(n) for e in range(first, epoch + 1)]
        stream = np.concatenate(permutations)[start - first * n:stop - first * n]
        batches = []
        for i in range(0, len(stream), self.POOL * G):
            pool = stream[i:i + self.POOL * G]
            order = np.argsort(self.lengths[pool], kind="stable")
            batches.append(pool[order].reshape(-1, G))
        return self.generator(epoch, 1).permutation(np.concatenate(batches))

    def start(self, epoch):
        """Goes to the first batch of an epoch, or of the next one in which a batch ends: one that is
        larger than the data ends in a later epoch."""
        plan = self.plan_of(epoch)
        while not len(plan):
            epoch += 1
            plan = self.plan_of(epoch)
        self.epoch, self.index, self.plan = epoch, 0, plan

    def __iter__(self):
        return self

    def __next__(self):
        if self.index == len(self.plan):
            self.start(self.epoch + 1)
        rows = self.plan[self.index][self.rank::self.world_size]
        self.index += 1
        return self.collate([self.encoded.sequence(i) for i in rows], self.encoded.block_size)

    def state_dict(self):
        """The position: the next batch, and what it depends on."""
        return {
            "epoch": self.epoch, "index": self.index, "seed": self.seed, "sequences": len(self.encoded),
            "global_batch": self.global_batch}

    def load_state_dict(self, state):
        """Goes on with the next batch. ValueError where data, batch or seed are others."""
        for key, value in self.state_dict().items():
            check(type(state.get(key)) is int, f"the position in the data has no {key}")
            same = key in ("epoch", "index") or state[key] == value
            check(same, f"the position in the data is for {key} {state[key]}, this run has {value}")
        epoch, index = state["epoch"], state["index"]
        plan = self.plan_of(max(epoch, 0))
        exists = epoch >= 0 and 0 <= index <= len(plan)
        check(exists, f"the position in the data, epoch {epoch} batch {index}, does not exist")
        self.epoch, self.index, self.plan = epoch, index, plan


def eval_batches(encoded, batch_size, limit=None):
    """A list of (tokens, targets), always the same: of all sequences, or of `limit` of them, which are
    spread evenly over the split. Which they are does not depend on batch_size."""
    n = len(encoded)
    count = min(limit or n, n)
    chosen = np.arange(count) * n // count
    chosen = chosen[np.argsort(encoded.lengths[chosen], kind="stable")]
    sequences = [encoded.sequence(i) for i in chosen]
    starts = range(0, count, batch_size)
    return [collate(sequences[i:i + batch_size], encoded.block_size) for i in starts]


# -----------------------------------------------------------------------------
# the E2E challenge's files

E2E_ADDRESS = "https://github.com/tuetschek/e2e-dataset/releases/download/v1.0.0/e2e-dataset.zip"
E2E_FILES = {                    # SHA-256 of the official files; the archive's own is not published
    "trainset.csv": "f27d48df45815288ab15619d47a79028c300fbb7f42e373668aba0b98c1d57c6",
    "devset.csv": "fc26b78cdb849c80545f513b223d1e051138b43882eeb79e3eb153e689c864f9",
    "testset_w_refs.csv": "edc8db685e39bb9824d5bd70c18b1c9b0412d14b527aa960e2d1c8251ee15ccd"}
LARGEST = 2**26                  # bytes, of the archive and of a file in it


def download(folder, archive=None, sha256=None, files=E2E_FILES):
    """Puts the E2E challenge's CSV files into folder, from an archive on disk or the official one.

    Nothing is written before every file's SHA-256 (and the archive's, if given) is right. Returns
    the archive's SHA-256.
    """
    folder, origin = Path(folder), archive or E2E_ADDRESS
    raw = read_archive(archive, folder)
    check(len(raw) <= LARGEST, f"{origin}: larger than {LARGEST} bytes, which the data is not")
    digest = sha256_of(raw)
    check(not sha256 or digest == sha256.lower(), f"{archive or 'the archive'}: SHA-256 is {digest}, wanted {sha256}; nothing was written")
    contents = unpack(raw, origin, files)
    for name, wanted in files.items():
        found = sha256_of(contents[name])
        check(found == wanted, f"{name} in {origin}: SHA-256 is {found}, wanted {wanted}; nothing was written")
        path = folder / name
        same = not path.exists() or path.read_bytes() == contents[name]
        check(same, f"{path} is there already and differs; move it away first")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{folder}: {error.strerror}") from None
    for name in files:
        write_atomic(folder / name, contents[name])
    return digest


def read_archive(archive, folder):
    """The bytes of the archive on disk or, where archive is None, of the official one."""
    try:
        source = open(archive, "rb") if archive else urllib.request.urlopen(E2E_ADDRESS, timeout=30)
        with source:
            return source.read(LARGEST + 1)
    except (OSError, http.client.HTTPException) as error:        # URLError is an OSError
        if archive:
            raise ValueError(f"{archive}: {error.strerror}") from None
        reason = getattr(error, "reason", error)
        raise ValueError(f"cannot fetch {E2E_ADDRESS} ({reason}): put {', '.join(E2E_FILES)} into {folder} by hand, "
                         f"or pass the file with --archive") from None


def path_parts(entry, origin):
    """The folders and the name of an entry. ValueError where they lead out, or where it is a link."""
    parts = entry.filename.replace("\\", "/").split("/")
    climbs = ".." in parts or parts[0] == "" or ":" in parts[0]
    is_link = stat.S_ISLNK(entry.external_attr >> 16)
    check(not climbs and not is_link, f"{origin}: {entry.filename!r} climbs out of the folder or is a link; nothing was written")
    return parts


def unpack(raw, origin, names):
    """{name: content} of the named files, wherever they lie in the archive."""
    contents = {}
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            for entry in archive.infolist():
                *folders, name = path_parts(entry, origin)
                if name in names and "__MACOSX" not in folders:
                    check(name not in contents, f"{origin}: {name} is in it twice")
                    with archive.open(entry) as file:
                        contents[name] = file.read(LARGEST + 1)
                    check(len(contents[name]) <= LARGEST, f"{origin}: {entry.filename} is larger than {LARGEST} bytes")
    except (zipfile.BadZipFile, RuntimeError, EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{origin}: not a readable zip archive: {error}") from None
    missing = [name for name in names if name not in contents]
    check(not missing, f"{origin}: no {', '.join(missing)} in it")
    return contents


# -----------------------------------------------------------------------------
# command line


def show():
    """Prints a look at the embedded data."""
    corpus, plain = load("embedded"), world.plain_text()
    n_texts = sum(len(example.references) for example in corpus.train)
    megabytes = sum(map(len, plain)) / 1e6
    print(f"embedded: {len(corpus.train)} train, {len(corpus.val)} val, {len(corpus.test)} test representations, "
          f"{n_texts} train texts; plain text: {megabytes:.1f} MB")
    for example in corpus.train[:5]:
        prompt = format_prompt(example.prompt, "pipe")
        print(f"\n{prompt}", *example.references, sep="\n    ")
    print("\nplain text, for pretraining the small base:", *plain[:5], sep="\n\n")


def main(args):
    """The command line: shows the embedded data, or fetches E2E."""
    parser = argparse.ArgumentParser(
        description=__doc__.strip(), formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command")
    command = commands.add_parser("download", help="fetch, check and unpack a data set")
    command.add_argument("dataset", choices=["e2e"])
    command.add_argument("folder", nargs="?", default="e2e")
    command.add_argument("--archive", help="e2e-dataset.zip on disk, where there is no network")
    command.add_argument("--sha256", help="what the archive's SHA-256 must be; the files' own are always checked")
    options = parser.parse_args(args)
    if options.command is None:
        show()
        return
    digest = download(options.folder, options.archive, options.sha256)
    print(f"{options.folder}: {', '.join(E2E_FILES)}, each with the right SHA-256 (archive {digest})")


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
