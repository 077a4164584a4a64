"""
Text in, batches out: the embedded corpus, the E2E challenge's CSV files, JSON lines, plain text; the tokenizer; masked batches.

    python data.py                               # a look at the embedded data
    python data.py download e2e DIR              # the E2E challenge's files, checked; --archive ZIP where there is no network

    corpus = load("embedded")                                        # .train, .val, .test: lists of Example
    encoded = encode(corpus.train, tokenizer, block_size=256)
    tokens, targets = next(Batches(encoded, batch_size=16, seed=1))  # (B, T) int64 both; target -1 is ignored

Prompt and completion are tokenized apart from each other, in training and in generation alike: so the prompt's tokens never
depend on what follows, and the mask is a position. (Tokenizing their concatenation may merge across the border.)
"""

import argparse
import csv
import hashlib
import http.client
import io
import json
import re
import stat
import sys
import urllib.request
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import sentencepiece
import torch

from lib import world
from lib.files import write_atomic


@dataclass
class Example:
    """A prompt and the texts that answer it."""

    prompt: str                  # a meaning representation, an instruction, or nothing
    references: list[str]        # different texts for it


@dataclass
class Data:
    """Examples in three splits, by what load was asked for."""

    train: list[Example]
    val: list[Example]
    test: list[Example]
    kind: str                    # "mr" (meaning representations), "pairs" or "text"
    name: str
    fingerprint: str = field(init=False)   # SHA-256 of the content

    def __post_init__(self):
        content = [[[example.prompt, example.references] for example in split] for split in (self.train, self.val, self.test)]
        self.fingerprint = hashlib.sha256(json.dumps(content).encode()).hexdigest()


# -----------------------------------------------------------------------------
# the embedded world: values


# -----------------------------------------------------------------------------
# the embedded world: phrases. Each attribute has four shapes; a sentence plan chooses among them.


# -----------------------------------------------------------------------------
# the embedded world: plain text. It tells the same things in other shapes, and tells them twice, which is what teaches a
# small model to look back and copy; a frozen base that cannot copy is beyond LoRA's help. No representation, and nothing of the
# kind "list of facts, then the sentence"; but every token of a representation, because a frozen embedding must have been trained.


# -----------------------------------------------------------------------------
# meaning representations as prompts

MR = re.compile(r"\s*[\w ]+\[[^\[\]]+\]\s*(,\s*[\w ]+\[[^\[\]]+\]\s*)*")
PIPE_KEYS = {"eatType": "Type", "priceRange": "price", "familyFriendly": "family friendly"}     # as the LoRA paper's data has them


def parse_mr(text):
    """ "name[X], eatType[pub]" -> {"name": "X", "eatType": "pub"}; None where text is of another form."""
    if not MR.fullmatch(text):
        return None
    return {key.strip(): value.strip() for key, value in re.findall(r"([\w ]+)\[([^\[\]]+)\]", text)}


def format_prompt(mr, template):
    """The prompt for a representation: "pipe" gives "name : X | Type : pub||" (Hu et al. 2021), "raw" the text and a line's end.
    A prompt of another form stays as it is."""
    if template not in ("pipe", "raw"):
        raise ValueError(f"template is {template!r}; it must be pipe or raw")
    attributes = parse_mr(mr)
    if attributes is None:
        return mr
    if template == "raw":
        return mr + "\n"
    return " | ".join(f"{PIPE_KEYS.get(key, key)} : {value}" for key, value in attributes.items()) + "||"


# -----------------------------------------------------------------------------
# files


def load(name_or_path="embedded"):
    """The data of that name or path, as Data.

    "embedded" is the corpus above, "plain" its plain text. Paths: a folder with the E2E challenge's devset.csv or trainset.csv
    and testset_w_refs.csv, or with train.jsonl, val.jsonl and test.jsonl; or one file, .csv, .jsonl or .txt (paragraphs
    divided by blank lines). A split that has no file is cut off the train split, by prompt, so that splits share none.
    ValueError: nothing known there, or a file that is empty, broken (the line is named) or without the columns.
    """
    name, path = str(name_or_path), Path(name_or_path)
    if name == "embedded":
        return Data(*([Example(*pair) for pair in split] for split in world.embedded()), "mr", name)
    if name == "plain":
        return _with_splits([Example("", [text]) for text in world.plain_text()], None, None, "text", name)
    if path.is_dir():
        return _load_folder(path, name)
    readers = {".csv": (_read_csv, "mr"), ".jsonl": (_read_jsonl, "pairs"), ".txt": (_read_txt, "text")}
    if not path.is_file():
        raise ValueError(f"{name}: no such file or folder, nor one of the names embedded, plain")
    if path.suffix not in readers:
        raise ValueError(f"{name}: a data file ends in {', '.join(readers)}")
    read, kind = readers[path.suffix]
    return _with_splits(read(path), None, None, kind, name)


def _load_folder(path, name):
    found = sorted(file.name for file in path.iterdir())

    def read(reader, *candidates):
        return next((reader(path / file) for file in candidates if file in found), None)

    if "trainset.csv" in found:
        return _with_splits(read(_read_csv, "trainset.csv"), read(_read_csv, "devset.csv"), read(_read_csv, "testset_w_refs.csv"), "mr", name)
    if "devset.csv" in found:                                    # the small half of the challenge: train on it
        return _with_splits(read(_read_csv, "devset.csv"), None, read(_read_csv, "testset_w_refs.csv"), "mr", name)
    if "train.jsonl" in found:
        return _with_splits(*(read(_read_jsonl, f"{split}.jsonl") for split in ("train", "val", "test")), "pairs", name)
    listed = ", ".join(found[:6]) + (f" and {len(found) - 6} more" if len(found) > 6 else "")
    raise ValueError(f"{name}: no data there; it must hold trainset.csv or devset.csv, or train.jsonl; found {listed or 'nothing'}")


def _with_splits(train, val, test, kind, name):
    """Cuts a tenth off train (at most 500 prompts) for each split that is None."""
    missing = (val is None) + (test is None)
    if len(train) < 1 + missing:
        raise ValueError(f"{name}: {len(train)} different prompts cannot be split in {1 + missing}; add more, or files for the other splits")
    order = world.Draw(0).shuffled(range(len(train)))
    size = min(500, max(1, len(train) // 10)) if missing else 0
    if val is None:
        val, order = [train[i] for i in sorted(order[:size])], order[size:]
    if test is None:
        test, order = [train[i] for i in sorted(order[:size])], order[size:]
    return Data([train[i] for i in sorted(order)], val, test, kind, name)


def _read_text(path):
    try:
        raw = path.read_bytes()
        text = raw.decode("utf-8-sig")
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = raw[:error.start].count(b"\n") + 1
        raise ValueError(f"{path}, line {line}: byte {raw[error.start]:#04x} is not UTF-8") from None
    if not text.strip():
        raise ValueError(f"{path}: the file is empty")
    return text


def _group(path, pairs):
    """(prompt, text) pairs -> Examples in order of first appearance."""
    examples = {}
    for prompt, text in pairs:
        examples.setdefault(prompt, Example(prompt, [])).references.append(text)
    if not examples:
        raise ValueError(f"{path}: no examples in it")
    return list(examples.values())


def _read_csv(path):
    """The E2E challenge's form: a header with mr and ref, then a pair a line, quoted where it holds commas."""
    reader = csv.reader(io.StringIO(_read_text(path), newline=""), strict=True)
    pairs, line = [], 1
    try:
        header = next(reader)
        if missing := [column for column in ("mr", "ref") if column not in header]:
            raise ValueError(f"{path}: no column {' and '.join(missing)}; found {', '.join(header) or 'nothing'}")
        line = reader.line_num + 1
        for row in reader:
            if row:                                              # a blank line is none
                if len(row) != len(header):
                    raise ValueError(f"{path}, line {line}: {len(row)} columns where the header has {len(header)}")
                cells = dict(zip(header, row))
                if empty := [column for column in ("mr", "ref") if not cells[column].strip()]:
                    raise ValueError(f"{path}, line {line}: {empty[0]} is empty")
                if not MR.fullmatch(cells["mr"]):
                    raise ValueError(f"{path}, line {line}: {_short(cells['mr'])!r} is no representation; that is attribute[value], ...")
                pairs.append((cells["mr"], cells["ref"]))
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}, line {line}: {error}") from None
    return _group(path, pairs)


def _read_jsonl(path):
    """A JSON object a line, with prompt and completion; lines of one prompt are references of one Example."""
    pairs = []
    for number, line in enumerate(_read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: not JSON: {getattr(error, 'msg', error)}") from None
        if not isinstance(record, dict) or {"prompt", "completion"} - set(record):
            found = ", ".join(map(str, record)) if isinstance(record, dict) else type(record).__name__
            raise ValueError(f"{path}, line {number}: needs prompt and completion; found {found or 'nothing'}")
        for key in ("prompt", "completion"):
            if not isinstance(record[key], str) or re.search("[\ud800-\udfff]", record[key]):
                raise ValueError(f"{path}, line {number}: {key} is not text")
        if not record["completion"].strip():
            raise ValueError(f"{path}, line {number}: completion is empty")
        pairs.append((record["prompt"], record["completion"]))
    return _group(path, pairs)


def _read_txt(path):
    """Paragraphs, each once."""
    paragraphs = re.split(r"\n\s*\n", _read_text(path).replace("\r\n", "\n"))
    return [Example("", [text]) for text in dict.fromkeys(text.strip("\n") for text in paragraphs) if text.strip()]


def _short(text, length=80):
    return text if len(text) <= length else text[:length - 3] + "..."


# -----------------------------------------------------------------------------
# tokenizer


class Tokenizer:
    """SentencePiece, or a tokenizer.json by way of the optional tokenizers package. bos and eos: ids, or None where there is none."""

    def __init__(self, encode, decode, vocab_size, bos, eos, files):
        self._encode, self._decode, self._files = encode, decode, files       # files: {name: bytes}, what save writes
        self.vocab_size, self.bos, self.eos = vocab_size, bos, eos
        self.fingerprint = hashlib.sha256(b"".join(name.encode() + b"\0" + content for name, content in sorted(files.items()))).hexdigest()

    @classmethod
    def train(cls, texts, vocab_size):
        """A byte-pair encoding of texts, with fewer pieces than vocab_size where they yield no more. Every text round-trips: nothing is
        normalized, and what is unknown is spelled in bytes."""
        texts, model = list(texts), io.BytesIO()
        if not any(texts):
            raise ValueError("there is no text to train a tokenizer on")
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(texts), model_writer=model, vocab_size=vocab_size, model_type="bpe", byte_fallback=True,
                character_coverage=1.0, required_chars="|:[]", normalization_rule_name="identity", remove_extra_whitespaces=False,
                max_sentence_length=2**24, num_threads=1, minloglevel=4, unk_id=0, bos_id=1, eos_id=2, pad_id=-1)
        except RuntimeError as error:
            if possible := re.search(r"too high \(\d+\)\. Please set it to a value <= (\d+)", str(error)):
                return cls.train(texts, int(possible[1]))
            raise ValueError(f"no tokenizer of {vocab_size} pieces can be made of these {len(texts)} texts: {str(error).split('] ')[-1]}") from None
        return cls._of_model(model.getvalue())

    @classmethod
    def load(cls, path):
        """From a folder or a file: tokenizer.model, tokenizer.json, or the pair vocab.json and merges.txt (GPT-2, OPT)."""
        path = Path(path)
        folder, names = (path, ("tokenizer.model", "tokenizer.json", "vocab.json")) if path.is_dir() else (path.parent, (path.name,))
        name = next((name for name in names if (folder / name).is_file()), None)
        if name is None:
            raise ValueError(f"{path}: no tokenizer there; it must hold tokenizer.model or tokenizer.json")
        if name.endswith(".model"):
            try:
                return cls._of_model((folder / name).read_bytes())
            except RuntimeError:
                raise ValueError(f"{folder / name}: not a SentencePiece model") from None
        return cls._of_json(folder, name)

    @classmethod
    def _of_model(cls, content):
        if not content:
            raise RuntimeError("empty")
        model = sentencepiece.SentencePieceProcessor(model_proto=content)
        bos, eos = (i if i >= 0 else None for i in (model.bos_id(), model.eos_id()))
        return cls(model.encode, model.decode, model.vocab_size(), eos if bos is None else bos, eos, {"tokenizer.model": content})

    @classmethod
    def _of_json(cls, folder, name):
        try:
            import tokenizers
        except ImportError:
            raise ValueError(f"{folder / name} needs the tokenizers package: pip install tokenizers") from None
        try:
            if name == "vocab.json":
                inner = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(str(folder / name), str(folder / "merges.txt")))
                inner.pre_tokenizer, inner.decoder = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False), tokenizers.decoders.ByteLevel()
            else:
                inner = tokenizers.Tokenizer.from_str((folder / name).read_text(encoding="utf-8"))
        except Exception as error:                               # the package raises bare Exception
            raise ValueError(f"{folder / name}: not a tokenizer: {_short(str(error), 200)}") from None
        inner.no_truncation()
        inner.no_padding()
        inner.encode_special_tokens = True                       # "<|endoftext|>" inside a text is text, never the end
        config = _read_config(folder / "tokenizer_config.json")
        eos = _special(inner, folder, config, "eos", ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>"))
        bos = _special(inner, folder, config, "bos", ("<s>", "<|begin_of_text|>", "<bos>"))
        bos = eos if bos is None else bos
        config |= {f"{role}_token": inner.id_to_token(i) for role, i in (("bos", bos), ("eos", eos)) if i is not None}
        files = {"tokenizer.json": inner.to_str().encode(), "tokenizer_config.json": json.dumps(config, indent=1).encode()}
        return cls(lambda text: inner.encode(text, add_special_tokens=False).ids, lambda ids: inner.decode(ids, skip_special_tokens=True),
                   max(inner.get_vocab().values()) + 1, bos, eos, files)

    def encode(self, text):
        """Token ids, without bos and eos."""
        return self._encode(text) if text else []

    def decode(self, ids):
        """The text of token ids; bos, eos and ids beyond the vocabulary give none."""
        return self._decode([i for i in map(int, ids) if 0 <= i < self.vocab_size and i not in (self.bos, self.eos)])

    def encode_pair(self, prompt, completion):
        """(prompt ids with bos before them, completion ids with eos after them), tokenized apart from each other."""
        return self.encode_prompt(prompt), self.encode(completion) + ([] if self.eos is None else [self.eos])

    def encode_prompt(self, prompt):
        """What generation starts from: exactly the prompt ids of encode_pair."""
        return ([] if self.bos is None else [self.bos]) + self.encode(prompt)

    def save(self, folder):
        """Writes tokenizer.model, or tokenizer.json and tokenizer_config.json, into an existing folder."""
        for name, content in self._files.items():
            write_atomic(Path(folder, name), content)


def _read_config(path):
    try:
        config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    return config if isinstance(config, dict) else {}


def _special(inner, folder, config, role, usual):
    """Id of bos or eos: by tokenizer_config.json, else by the model's config.json, else by the usual names."""
    token = config.get(f"{role}_token")
    token = token.get("content") if isinstance(token, dict) else token
    if isinstance(token, str) and inner.token_to_id(token) is not None:
        return inner.token_to_id(token)
    i = _read_config(folder / "config.json").get(f"{role}_token_id")
    i = i[0] if isinstance(i, list) and i else i
    if isinstance(i, int) and inner.id_to_token(i) is not None:
        return i
    return next((i for token in usual if (i := inner.token_to_id(token)) is not None), None)


# -----------------------------------------------------------------------------
# sequences: prompt and completion, masked by position
#
#   ids        bos  p  p  p | c  c  c  eos            n_prompt = 4
#   tokens     bos  p  p  p   c  c  c                 ids[:-1]
#   targets     -1 -1 -1  c   c  c eos                ids[1:], -1 where the target is prompt


@dataclass
class Encoded:
    """A split as sequences of token ids, and what was left out of it."""

    sequences: list              # of (ids, n_prompt)
    block_size: int              # none is longer, nor are batches of them
    n_cut: int = 0               # sequences that lost their end to block_size
    n_empty: int = 0             # sequences left out, because nothing in them was supervised
    n_supervised: int = 0        # targets that count
    n_tokens: int = 0            # tokens that go in


def encode(examples, tokenizer, block_size, template="pipe", too_long="refuse", all_references=True, vocab_size=None):
    """Examples -> Encoded. With all_references each reference is a sequence of its own, else the first one alone.

    A sequence of more than block_size tokens is refused, or cut and counted (too_long="cut"); text without a prompt is
    neither, but goes on in the next sequence. vocab_size: the model's, where it is not the tokenizer's.
    """
    if too_long not in ("refuse", "cut"):
        raise ValueError(f"too_long is {too_long!r}; it must be refuse or cut")
    if block_size < 1:
        raise ValueError(f"block_size is {block_size}; it must be at least 1")
    if not examples:
        raise ValueError("there are no examples to encode: the split is empty")
    result = Encoded([], block_size)
    vocab_size = vocab_size or tokenizer.vocab_size
    for example in examples:
        prompt = tokenizer.encode_prompt(format_prompt(example.prompt, template))
        for reference in example.references if all_references else example.references[:1]:
            ids, n_prompt = prompt + tokenizer.encode(reference), len(prompt)
            if len(ids) == n_prompt:                             # an end token alone would teach to say nothing
                result.n_empty += 1
                continue
            ids += [] if tokenizer.eos is None else [tokenizer.eos]
            if (largest := max(ids)) >= vocab_size or min(ids) < 0:
                at = next(i for i, token in enumerate(ids) if not 0 <= token < vocab_size)
                raise ValueError(f"token {ids[at]} at index {at} of {_short(example.prompt or reference)!r} is beyond the vocabulary of {vocab_size}")
            if len(ids) - 1 > block_size and not example.prompt:
                pieces = [(ids[i:i + block_size + 1], n_prompt if i == 0 else 1) for i in range(0, len(ids) - 1, block_size)]
            elif len(ids) - 1 > block_size and too_long == "refuse":
                raise ValueError(f"{_short(example.prompt)!r} and its text have {len(ids) - 1} tokens, block_size is {block_size}; "
                                 f"raise it, or set too_long to cut")
            else:
                result.n_cut += len(ids) - 1 > block_size
                pieces = [(ids[:block_size + 1], n_prompt)]
            for piece, n_prompt in pieces:
                supervised = len(piece) - max(n_prompt, 1)       # the very first token has nothing before it
                if supervised < 1:
                    result.n_empty += 1
                    continue
                result.sequences.append((piece, n_prompt))
                result.n_supervised += supervised
                result.n_tokens += len(piece) - 1
    if not result.sequences:
        raise ValueError(f"nothing to learn from in {len(examples)} examples: all {result.n_empty} sequences are empty or all prompt")
    return result


def padded(length, block_size):
    """Lengths of batches are multiples of 8 up to block_size: fewer shapes to prepare kernels for, and none that is slow."""
    return np.minimum(-(-length // 8) * 8, block_size)


def collate(sequences, block_size):
    """[(ids, n_prompt)] -> tokens, targets: (B, T) int64, padded at the right with token 0 and target -1."""
    T = padded(max(len(ids) for ids, _ in sequences) - 1, block_size)
    tokens, targets = np.zeros((len(sequences), T), np.int64), np.full((len(sequences), T), -1, np.int64)
    for row, (ids, n_prompt) in enumerate(sequences):
        start = max(n_prompt, 1)
        tokens[row, :len(ids) - 1] = ids[:-1]
        targets[row, start - 1:len(ids) - 1] = ids[start:]
    return torch.from_numpy(tokens), torch.from_numpy(targets)


class Batches:
    """Endless batches of sequences of like length. An epoch is a permutation; where the batch does not divide it, the few left
    over open the next one, so that every batch is full. A global batch of batch_size * world_size sequences is drawn alike
    in every process, each of which takes its own rows: two of batch 8 see what one of 16 sees.
    """

    POOL = 64                    # global batches sorted by length among each other: more pads less and mixes less

    def __init__(self, encoded, batch_size, seed, rank=0, world_size=1):
        if batch_size < 1 or not 0 <= rank < world_size:
            raise ValueError(f"batch_size {batch_size}, rank {rank} of {world_size}: a batch has at least 1, a rank lies below the world size")
        if not encoded.sequences:
            raise ValueError("there are no sequences to make batches of")
        self.sequences, self.block_size, self.rank, self.world_size = encoded.sequences, encoded.block_size, rank, world_size
        self.lengths = np.array([len(ids) - 1 for ids, _ in self.sequences])
        self.global_batch, self.seed = batch_size * world_size, seed
        self._open(0)

    def _permutation(self, epoch):
        return np.random.default_rng([self.seed % 2**63, epoch]).permutation(len(self.sequences))

    def _batches(self, epoch):
        """(n_batches, global_batch) indices: the full batches that end within this epoch of the stream of permutations. A function
        of seed and epoch alone, so that two numbers are all the state there is."""
        n, G = len(self.sequences), self.global_batch
        start, stop = epoch * n // G * G, (epoch + 1) * n // G * G
        if start == stop:
            return np.empty((0, G), np.int64)
        stream = np.concatenate([self._permutation(e) for e in range(start // n, epoch + 1)])[start - start // n * n:][:stop - start]
        pools = [stream[i:i + self.POOL * G] for i in range(0, len(stream), self.POOL * G)]
        plan = np.concatenate([pool[np.argsort(self.lengths[pool], kind="stable")].reshape(-1, G) for pool in pools])
        return np.random.default_rng([self.seed % 2**63, epoch, 1]).permutation(plan)

    def _open(self, epoch):
        while not len(plan := self._batches(epoch)):             # a batch larger than the data ends in a later epoch
            epoch += 1
        self.epoch, self.index, self._plan = epoch, 0, plan

    def __iter__(self):
        return self

    def __next__(self):
        if self.index == len(self._plan):
            self._open(self.epoch + 1)
        rows = self._plan[self.index][self.rank::self.world_size]
        self.index += 1
        return collate([self.sequences[i] for i in rows], self.block_size)

    @property
    def padding(self):
        """Share of the positions of this epoch's batches, as this process gets them, that are padding."""
        lengths = self.lengths[self._plan[:, self.rank::self.world_size]]                        # (n_batches, batch_size)
        return float(1 - lengths.sum() / (padded(lengths.max(1), self.block_size).sum() * lengths.shape[1]))

    def state_dict(self):
        """The position: the next batch, and what it depends on."""
        return {"epoch": self.epoch, "index": self.index, "seed": self.seed, "sequences": len(self.sequences), "global_batch": self.global_batch}

    def load_state_dict(self, state):
        """Goes on with the very next batch; refused where data, batch or seed are others."""
        for key, value in self.state_dict().items():
            if type(state.get(key)) is not int:
                raise ValueError(f"the position in the data has no {key}")
            if key not in ("epoch", "index") and state[key] != value:
                raise ValueError(f"the position in the data is for {key} {state[key]}, this run has {value}")
        if state["epoch"] < 0 or not 0 <= state["index"] <= len(plan := self._batches(state["epoch"])):
            raise ValueError(f"the position in the data, epoch {state['epoch']} batch {state['index']}, does not exist")
        self.epoch, self.index, self._plan = state["epoch"], state["index"], plan


def eval_batches(encoded, batch_size, limit=None):
    """A list of (tokens, targets), always the same: all sequences, or limit batches of them spread evenly over the split."""
    sequences = encoded.sequences
    if limit and limit * batch_size < len(sequences):
        sequences = [sequences[i * len(sequences) // (limit * batch_size)] for i in range(limit * batch_size)]
    sequences = sorted(sequences, key=lambda sequence: len(sequence[0]))
    return [collate(sequences[i:i + batch_size], encoded.block_size) for i in range(0, len(sequences), batch_size)]


# -----------------------------------------------------------------------------
# the E2E challenge's files

E2E_ADDRESS = "https://github.com/tuetschek/e2e-dataset/releases/download/v1.0.0/e2e-dataset.zip"
E2E_FILES = {   # SHA-256 of the official files; the archive's own is not published, so its content is what is checked
    "trainset.csv": "f27d48df45815288ab15619d47a79028c300fbb7f42e373668aba0b98c1d57c6",
    "devset.csv": "fc26b78cdb849c80545f513b223d1e051138b43882eeb79e3eb153e689c864f9",
    "testset_w_refs.csv": "edc8db685e39bb9824d5bd70c18b1c9b0412d14b527aa960e2d1c8251ee15ccd",
}
LARGEST = 2**26                  # bytes, of the archive and of a file in it


def download(folder, archive=None, sha256=None, files=E2E_FILES):
    """Puts the E2E challenge's CSV files into folder, out of an archive on disk or else the official one.

    Nothing is written before every file's SHA-256 (and the archive's, if given) is right. Returns the archive's SHA-256.
    """
    folder = Path(folder)
    raw = _fetch(folder, archive)
    digest = hashlib.sha256(raw).hexdigest()
    if sha256 and digest != sha256.lower():
        raise ValueError(f"{archive or 'the archive'}: SHA-256 is {digest}, wanted {sha256}; nothing was written")
    contents = _unpack(raw, archive or E2E_ADDRESS, files)
    for name, wanted in files.items():
        if (found := hashlib.sha256(contents[name]).hexdigest()) != wanted:
            raise ValueError(f"{name} in {archive or E2E_ADDRESS}: SHA-256 is {found}, wanted {wanted}; nothing was written")
        if (folder / name).exists() and (folder / name).read_bytes() != contents[name]:
            raise ValueError(f"{folder / name} is there already and differs; move it away first")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in files:
            write_atomic(folder / name, [contents[name]])
    except OSError as error:
        raise ValueError(f"{folder}: {error.strerror}") from None
    return digest


def _fetch(folder, archive):
    try:
        with open(archive, "rb") if archive else urllib.request.urlopen(E2E_ADDRESS, timeout=30) as source:
            raw = source.read(LARGEST + 1)
    except (OSError, http.client.HTTPException) as error:           # URLError is an OSError
        if archive:
            raise ValueError(f"{archive}: {error.strerror}") from None
        raise ValueError(f"cannot fetch {E2E_ADDRESS} ({getattr(error, 'reason', error)}): put {', '.join(E2E_FILES)} into {folder} by hand, "
                         f"or pass the file with --archive") from None
    if len(raw) > LARGEST:
        raise ValueError(f"{archive or E2E_ADDRESS}: larger than {LARGEST} bytes, which the data is not")
    return raw


def _unpack(raw, origin, names):
    """{name: content} of the named files, wherever in the archive they lie. Nothing but their content leaves it."""
    contents = {}
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            for entry in archive.infolist():
                parts = entry.filename.replace("\\", "/").split("/")
                if ".." in parts or parts[0] == "" or ":" in parts[0] or stat.S_ISLNK(entry.external_attr >> 16):
                    raise ValueError(f"{origin}: {entry.filename!r} climbs out of the folder or is a link; nothing was written")
                if parts[-1] in names and "__MACOSX" not in parts:
                    if parts[-1] in contents:
                        raise ValueError(f"{origin}: {parts[-1]} is in it twice")
                    with archive.open(entry) as file:
                        contents[parts[-1]] = file.read(LARGEST + 1)
                    if len(contents[parts[-1]]) > LARGEST:
                        raise ValueError(f"{origin}: {entry.filename} is larger than {LARGEST} bytes")
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError, EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{origin}: not a readable zip archive: {error}") from None
    if missing := [name for name in names if name not in contents]:
        raise ValueError(f"{origin}: no {', '.join(missing)} in it")
    return contents


# -----------------------------------------------------------------------------
# command line


def main(args):
    """The command line: shows the embedded data, or fetches E2E."""
    parser = argparse.ArgumentParser(description=__doc__.strip(), formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command")
    command = commands.add_parser("download", help="fetch, check and unpack a data set")
    command.add_argument("dataset", choices=["e2e"])
    command.add_argument("folder", nargs="?", default="e2e")
    command.add_argument("--archive", help="e2e-dataset.zip on disk, where there is no network")
    command.add_argument("--sha256", help="what the archive's SHA-256 must be; the files' own are always checked")
    options = parser.parse_args(args)
    if options.command == "download":
        digest = download(options.folder, options.archive, options.sha256)
        print(f"{options.folder}: {', '.join(E2E_FILES)}, each with the right SHA-256 (archive {digest})")
        return
    corpus, plain = load("embedded"), world.plain_text()
    print(f"embedded: {len(corpus.train)} train, {len(corpus.val)} val, {len(corpus.test)} test representations, "
          f"{sum(len(example.references) for example in corpus.train)} train texts; plain text: {sum(map(len, plain)) / 1e6:.1f} MB")
    for example in corpus.train[:5]:
        print(f"\n{format_prompt(example.prompt, 'pipe')}", *example.references, sep="\n    ")
    print("\nplain text, for pretraining the small base:", *plain[:5], sep="\n\n")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        print(f"data.py: {error}", file=sys.stderr)
        sys.exit(2)
