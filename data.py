"""
Text in, batches out: examples in splits (lib/records.py reads the files), sequences with their masks,
batches.

    python data.py                               # a look at the embedded data
    python data.py download e2e DIR              # the E2E challenge's files, checked
    python data.py download e2e DIR --archive ZIP                    # the same without a network

    corpus = load("embedded")                                        # .train, .val, .test: lists of Example
    encoded = encode(corpus.train, tokenizer, block_size=256)
    tokens, targets = next(Batches(encoded, batch_size=16, seed=1))  # (B, T) int64 both; target -1 is ignored

In training as in generation the tokens of a prompt never depend on what follows it, so that the mask is
a position. Plain prompts and completions are therefore tokenized apart (their concatenation may merge
across the border); how conversations keep to it is said in lib/template.py.
"""

import argparse
import hashlib
import json
import re
import sys
from array import array
from collections import Counter
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from lib import waiter, world
from lib.checks import Parser, check
from lib.config import run_main
from lib.download import E2E_FILES, download
from lib.records import CONVERSATIONS, MR, READERS, Example, Listed, in_groups, read, shortened, turns
from lib.tokenizer import Tokenizer


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
        """SHA-256 of the content as JSON, [[[prompt, references], ..], ..]. All examples are read for it."""
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
    """Draws groups at random for each of `parts` splits until it has `size` units or more. weights: how many units
    each group has. Returns the indices of each split's groups; None where there are too few groups, or a split
    gets more than twice `size`."""
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
    hint = " (empty lines divide a text)" if source.form == "text" else ""
    check(n > parts, f"{name}: {n} examples cannot be divided into {parts + 1} splits; add more{hint}, or files for the other splits")
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

    "embedded" is the corpus of lib/world.py, "plain" its plain text, "waiter" the conversations of
    lib/waiter.py. Paths: a folder with the E2E challenge's devset.csv or trainset.csv and
    testset_w_refs.csv, or with train, val and test, each .jsonl, .json, .csv or .txt; or one such file.
    JSON holds pairs of prompt and completion, or conversations (messages, ShareGPT, Alpaca). A split
    without a file is cut off the train split.

    ValueError where nothing known is there, or where a file is empty, broken (the message names the
    line) or without the columns.
    """
    name, path = str(name_or_path), Path(name_or_path)
    if name == "embedded":
        splits = [[Example(*pair, is_representation=True) for pair in split] for split in world.embedded()]
        return Data(*splits, "representations")
    if name == "waiter":
        talks = waiter.conversations()
        return Data(*([example for talk in split for example in turns(talk, Counter())] for split in talks), "messages")
    if name == "plain":
        return with_splits(name, Listed("text", [Example("", [text]) for text in world.plain_text()]))
    if path.is_dir():
        return load_folder(path, name)
    check(path.is_file(), f"{name}: no such file or folder, nor one of the names embedded, plain, waiter")
    check(path.suffix in READERS, f"{name}: a data file ends in {', '.join(READERS)}")
    return with_splits(name, read(path))


# -----------------------------------------------------------------------------
# how prompts become tokens, in training and in generation alike


class Format:
    """A tokenizer with the run's template. chat: a lib.template.Chat, or None where prompts are texts that
    the model goes on with."""

    def __init__(self, tokenizer: Tokenizer, template="pipe", chat=None):
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
#   supervised   0  0  0  0   1  1  1  1               whether the model learns to write the token
#   tokens     bos  p  p  p   c  c  c                  ids[:-1]
#   targets     -1 -1 -1  c   c  c eos                 ids[1:], -1 where not supervised


@dataclass
class Encoded:
    """A split as sequences of token ids, one behind the other, and what was left out of it."""

    tokens: np.ndarray           # int32, the ids of all sequences
    supervised: np.ndarray       # bool, whether the model learns to write the token
    starts: np.ndarray           # where each sequence begins in these; behind the last one stands the end
    block_size: int              # the most targets of a sequence, and of a row of a batch
    n_cut: int = 0               # sequences that lost their end to block_size
    n_dropped: int = 0           # sequences left out because they are longer than block_size
    n_empty: int = 0             # sequences left out because nothing in them is supervised

    @classmethod
    def of(cls, sequences, block_size):
        """From (ids, supervised) pairs, which may come one by one. One without a supervised target is left out."""
        tokens, supervised, starts = array("i"), bytearray(), array("q", [0])
        n_empty = 0
        for ids, which in sequences:
            if not any(which[1:]):  # fault 26
                n_empty += 1
                continue
            tokens.extend(ids)
            supervised += b"\0" + bytes(map(bool, which[1:]))       # Nothing stands before the first token.
            starts.append(len(tokens))
        kind = np.int32 if len(tokens) < 2**31 else np.int64
        tokens = np.array(tokens, np.int32)
        supervised = np.frombuffer(bytes(supervised), bool)
        return cls(tokens, supervised, np.array(starts, kind), block_size, n_empty=n_empty)

    def __len__(self):
        return len(self.starts) - 1

    def sequence(self, i):
        """(ids, supervised) of sequence i: int32 and bool, both of its length."""
        span = slice(self.starts[i], self.starts[i + 1])
        return self.tokens[span], self.supervised[span]

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
        """Targets that the model learns to write."""
        return int(self.supervised.sum())


def check_vocabulary(ids, vocab_size, text):
    """ValueError that names the first token without an embedding, and the text that it is of."""
    if 0 <= min(ids) and max(ids) < vocab_size:
        return
    for i, token in enumerate(ids):
        if not 0 <= token < vocab_size:  # fault 25
            raise ValueError(f"token {token} at index {i} of {shortened(text)!r} is beyond the vocabulary of {vocab_size}")


def pieces(ids, supervised, block_size):
    """A sequence as a list of (ids, supervised), each of at most block_size targets. The last token of one is
    the first of the next, where it is no target."""
    starts = range(0, max(len(ids) - 1, 1), block_size)
    spans = [slice(start, start + block_size + 1) for start in starts]
    return [(ids[span], supervised[span]) for span in spans]


TRAIN_ON = ("completion", "prompt+completion")
TOO_LONG = ("refuse", "cut", "drop")


def encode(examples, tokenizer, block_size, template="pipe", too_long="refuse", all_references=True,
           vocab_size=None, train_on="completion", chat=None):
    """Examples -> Encoded. Each reference makes a sequence; without all_references only the first.

    A sequence of more than block_size tokens is refused, or cut, or dropped, and counted (too_long). Text
    without a prompt is none of these: it goes on in the next sequence. vocab_size is the model's, where
    it differs from the tokenizer's. train_on: whether the prompt is supervised too. chat: a lib.template.Chat,
    which conversations need.
    """
    check(too_long in TOO_LONG, f"too_long is {too_long!r}; it must be one of {', '.join(TOO_LONG)}")
    check(train_on in TRAIN_ON, f"train_on is {train_on!r}; it must be one of {', '.join(TRAIN_ON)}")
    check(block_size >= 1, f"block_size is {block_size}; it must be at least 1")
    check(len(examples), "there are no examples to encode: the split is empty")
    rendering = Format(tokenizer, template, chat)
    lost = Counter()

    def sequences():
        for i, example in enumerate(examples):
            references = example.references if all_references else example.references[:1]
            for reference in references:
                with located_in(examples, i):
                    ids, n_prompt = rendering.sequence(example, reference)
                    if chat is None and ids[n_prompt:] in ([], [tokenizer.eos]):
                        lost["empty"] += 1                       # The end alone would teach to say nothing.
                        continue
                    check_vocabulary(ids, vocab_size or tokenizer.vocab_size, example.prompt or reference)
                    n_masked = n_prompt if train_on == "completion" else 0
                    supervised = [False] * n_masked + [True] * (len(ids) - n_masked)
                    is_text = not example.prompt and example.messages is None
                    parts = fitted(pieces(ids, supervised, block_size), example, too_long, lost, is_text)
                yield from parts

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


def fitted(parts, example, too_long, lost, is_text):
    """Those pieces of a sequence that are trained on. ValueError where too_long says so."""
    if len(parts) == 1 or is_text:
        return parts
    tokens = sum(len(ids) - 1 for ids, _ in parts)
    block_size = len(parts[0][0]) - 1
    check(too_long != "refuse", f"{shortened(example.prompt)!r} and its text have {tokens} tokens, block_size is {block_size}; "
                                "raise it, or set too_long to cut or drop")  # fault 27
    if too_long == "drop":
        lost["dropped"] += 1
        return []
    lost["cut"] += 1
    return parts[:1]


def padded(length, block_size):
    """The length of a batch: a multiple of 8, at most block_size. So there are fewer shapes to
    prepare kernels for, and none that is slow."""
    return np.minimum(-(-length // 8) * 8, block_size)


def collate(sequences, block_size):
    """[(ids, supervised)] -> tokens, targets: (B, T) int64, padded at the right with 0 and -1."""
    B = len(sequences)
    T = padded(max(len(ids) for ids, _ in sequences) - 1, block_size)
    tokens = np.zeros((B, T), np.int64)
    targets = np.full((B, T), -1, np.int64)
    for row, (ids, supervised) in enumerate(sequences):
        end = len(ids) - 1
        tokens[row, :end] = ids[:-1]
        targets[row, :end] = np.where(supervised[1:], ids[1:], -1)
    return torch.from_numpy(tokens), torch.from_numpy(targets)


def collate_packed(sequences, block_size):
    """[(ids, supervised)] -> tokens, targets: (1, T) int64 with the sequences side by side, and their lengths. A last
    sequence without targets fills the row up to a multiple of 64 tokens, so that fewer lengths occur."""
    lengths = [len(ids) - 1 for ids, _ in sequences]
    rest = -sum(lengths) % min(64, block_size)
    tokens = [ids[:-1] for ids, _ in sequences]
    targets = [np.where(supervised[1:], ids[1:], -1) for ids, supervised in sequences]
    tokens = np.concatenate([*tokens, np.zeros(rest)]).astype(np.int64)
    targets = np.concatenate([*targets, np.full(rest, -1)]).astype(np.int64)
    lengths += [rest] if rest else []
    return torch.from_numpy(tokens)[None], torch.from_numpy(targets)[None], lengths


# -----------------------------------------------------------------------------
# batches


class Batches:
    """Batches of sequences of similar length, without end. An epoch is a permutation of the sequences. Those left
    over at its end open the next epoch's first batch, so that every batch is full. Every process
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
        stream of permutations. It depends on seed and epoch alone, so that (epoch, index) is the whole state."""
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
        plan = self.plan_of(min(max(epoch, 0), 2**31))
        exists = 0 <= epoch < 2**31 and 0 <= index <= len(plan)
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
    parser = Parser(description=__doc__.strip(), formatter_class=argparse.RawDescriptionHelpFormatter)
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
