"""
The tokenizer: SentencePiece, or a tokenizer.json by way of the optional package tokenizers.

    tokenizer = Tokenizer.load("DIR")                # tokenizer.json, tokenizer.model, or vocab.json with merges.txt
    tokenizer.encode_prompt("A pub")                 # ids: what stands before a prompt, and the prompt's
    tokenizer.encode_completion("The Plough.")       # ids, with the end after them
    Tokenizer.train(texts, 2048)                     # a byte-pair encoding of one's own
"""

import functools
import io
import itertools
import json
import re
from dataclasses import dataclass
from pathlib import Path

import sentencepiece

from lib.files import check, read_bytes, read_json, refusing, sha256_of, some, write_atomic
from lib.records import shortened
from lib.template import Added

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

    For chat templates (lib/template.py): special_tokens is {text: Added}, added_tokens the same of tokens that are found
    wherever they stand in a text, names {"bos_token": text, ..} as
    the files name them, encode_special gives the ids of a text in which the words of special tokens are
    those tokens (None where only lib/template.py can do that, with encode_at).
    """

    def __init__(self, encode, decode, vocab_size, special, files):
        self._encode, self._decode = encode, decode
        self._files = files                                      # {name: bytes}, what save writes
        self.vocab_size = vocab_size
        self.bos, self.eos, self.begin = special.bos, special.eos, special.begin
        self.ends = frozenset()
        self.special_tokens, self.added_tokens, self.names = {}, {}, named_tokens(files)
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
        for i, token in inner.get_added_tokens_decoder().items():
            tokens = made.special_tokens if token.special else made.added_tokens
            tokens[token.content] = Added(i, token.lstrip, token.rstrip)
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
