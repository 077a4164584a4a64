"""
Tokens that a run adds to its base's (--add_tokens FILE, one a line): to the tokenizer, and as rows to the model's tables.

They are found wherever they stand in a text, by this code and by transformers alike. So they are not marked as special: what
is special here is text within a text, and leaves no trace in what is decoded. The run's folder holds the tokenizer that
has them, and from there they come when the run is loaded again; FILE is read once.
"""

import dataclasses
from collections import Counter
from pathlib import Path

import torch

import data
from lib.config import with_methods
from lib.files import check, some
from lib.origin import read_origin
from lib.records import read_text


def read_tokens(path):
    """The tokens in a file, one a line; blank lines are none. ValueError where it holds none, one twice, or no UTF-8."""
    lines = read_text(path).splitlines()
    tokens = [line.strip() for line in lines if line.strip()]
    twice = [repr(token) for token, n in Counter(tokens).items() if n > 1]
    check(not twice, f"{path}: {some(twice)} is there twice; one line for each token")
    return tokens


def trains_tables(config):
    """The configuration with the methods that new tokens need: embed and, where the base does not tie it, head."""
    if not config.add_tokens or config.resume:
        return config
    known = config.base not in ("", "new")
    check(known, "add_tokens needs a --base with a tokenizer.json; a base made here has a tokenizer without one")
    if "full" in config.method.split("+"):
        return config
    tables = ("embed",) if read_origin(config.base).config.tied else ("embed", "head")
    return dataclasses.replace(config, method=with_methods(config.method, *tables))


def add_tokens(model, tokenizer, config, saved=""):
    """The base's tokenizer with the run's new tokens, for which the model's tables get rows.

    tokenizer: the base's own. saved: the folder of a run that has it already; "" where config.add_tokens is to be read.
    """
    known = tokenizer.vocab_size
    if saved:
        wider = data.Tokenizer.load(saved)
    else:
        tokens = read_tokens(config.add_tokens)
        wider = data.Tokenizer.from_json(json_file(config.base), tokens)
        found = wider.vocab_size - known
        check(found == len(tokens), f"{config.base}: its tokenizer has gaps between its ids, where new tokens would get lost")
    widen(model, known, wider.vocab_size - known)
    return wider


def json_file(folder):
    """The file in a folder to which tokens can be added."""
    files = [Path(folder, name) for name in ("tokenizer.json", "vocab.json")]
    found = [file for file in files if file.is_file()]
    check(found, f"{folder}: has a SentencePiece model alone, to which no tokens can be added; transformers' "
          "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR) writes the tokenizer.json that is needed")
    return found[0]


@torch.no_grad()
def widen(model, known, n):
    """
    Gives the model n tokens whose ids begin at `known`. Their rows in the embedding, and in a head of its own, are the mean
    of the rows before; a tied head stays tied. A table that has such rows already, as padding, keeps its size.
    """
    size = max(model.config.vocab_size, known + n)
    head = [] if model.config.tied else [model.head]
    for module in (model.embed.tokens, *head):
        old = module.weight
        mean = old[:known].mean(0, dtype=torch.float32).to(old.dtype)
        table = mean.repeat(size, 1)
        table[:len(old)] = old
        table[known:known + n] = mean
        old.data = table
    model.embed.tokens.num_embeddings = model.head.out_features = size
    model.config = dataclasses.replace(model.config, vocab_size=size)
