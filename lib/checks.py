"""
What every value from a flag or a file passes, and every path before it is opened. Without torch, so that a mistake on a
command line answers at once.

    rank = checked("rank", content["rank"], int, "adapter.pt")      # its type and its bounds; ValueError names them
    open(regular("data.jsonl"))                                     # ValueError for a fifo, a device, a socket, a folder
    args = Parser(description=..).parse_args(..)                    # argparse's, with both for every flag

A number's bounds are declared in BOUNDS once, whether it comes as a flag or in a file. They lie where no machine and no
model are, so that nothing is computed or allocated for a number that cannot be meant.
"""

import argparse
import difflib
import json
import math
import os
import signal
import stat
from contextlib import contextmanager


def check(condition, message):
    """ValueError(message) unless condition."""
    if not condition:
        raise ValueError(message)


def check_known(what, name, known, where=""):
    """ValueError, with the nearest of the known names, unless name is one of them."""
    if name not in known:
        nearest = difflib.get_close_matches(name, known, 1, 0.0)[0]
        raise ValueError(f"{where}unknown {what} {name!r}; the nearest is {nearest!r}")


class TooLong(BaseException):
    """Raised by the signal. No Exception, so that no `except Exception` on the way can keep it."""


@contextmanager
def timed(what, seconds=2):
    """ValueError where what is done inside, by a template or a regular expression, takes longer than that."""
    def ring(number, frame):
        raise TooLong

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except TooLong:
        raise ValueError(f"{what} ran for more than {seconds} seconds") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# -----------------------------------------------------------------------------
# bounds

LONG = 10**9                     # steps and tokens: years of work
WIDE = 2**20                     # a batch, a layer
SEED = 2**32 - 1
SHARE = math.nextafter(1, 0)     # the largest number below 1
# For each name the least value and the largest one; "or 0": 0 is allowed beside them.
RUN = {
    "batch_size": (1, 2**16), "gradient_accumulation_steps": (1, 2**16), "max_iters": (0, LONG), "epochs": (0, 10**6),
    "patience": (0, LONG), "warmup_iters": (0, LONG), "eval_interval": (1, LONG), "eval_sequences": (0, LONG),
    "save_interval": (0, LONG), "log_interval": (1, LONG), "sample_count": (0, 10**6), "block_size": (0, 2**30),
    "quant_block": (16, WIDE, "or 0"), "seed": (0, SEED)}
OPTIMIZER = {
    "learning_rate": (1e-30, 1000), "min_lr": (0, 1000), "lora_plus_ratio": (1e-9, 10**6), "weight_decay": (0, 1000),
    "beta1": (0, SHARE), "beta2": (0, SHARE), "label_smoothing": (0, SHARE), "grad_clip": (0, LONG)}
METHODS = {
    "rank": (1, 2**16), "alpha": (1e-9, 10**9), "dropout": (0, SHARE), "adapter_size": (1, 2**16),
    "prefix_length": (1, 2**16), "prefix_mlp": (0, 2**16), "prompt_length": (1, 2**16)}
GENERATION = {
    "temperature": (0.001, 1000, "or 0"), "top_k": (1, 2**30), "top_p": (1e-6, 1), "max_new_tokens": (1, LONG),
    "beams": (1, 256), "length_penalty": (-5, 5), "no_repeat_ngram": (0, LONG), "limit": (0, LONG)}
DOORS = {                        # memory.py, hub.py and bench.py
    "batch": (1, WIDE), "seq": (1, 2**30), "weights": (-10**6, 10**6), "steps": (1, LONG), "rounds": (1, LONG)}
BOUNDS = RUN | OPTIMIZER | METHODS | GENERATION | DOORS
SHAPE = {                        # of a model, as model.GPTConfig names it
    "vocab_size": (1, 2**24), "block_size": (1, 2**30), "n_layer": (1, 1024), "n_head": (1, 2**16), "n_embd": (1, WIDE),
    "n_kv_head": (1, 2**16, "or 0"), "n_ffn": (1, 2**24, "or 0"), "head_dim": (1, 2**16, "or 0"),
    "position_offset": (0, 2**16), "norm_eps": (0, 1), "norm_offset": (-1000, 1000), "embed_scale": (-10**6, 10**6),
    "attention_scale": (0, 10**6), "residual_scale": (-10**6, 10**6), "logit_scale": (-10**6, 10**6)}
ROPE = {                         # of rotary positions, as lib.rope.Rope names it
    "theta": (1.01, 10**15), "dim": (1, 2**16, "or 0"), "factor": (1e-6, 10**9), "original": (2, 2**30, "or 0"),
    "slow": (1e-6, 10**9), "fast": (1e-6, 10**9), "magnitude": (1e-6, 10**6)}


def shown(value, length=80):
    """A value for a message: its beginning, if it is long."""
    if isinstance(value, int) and value.bit_length() > 200:
        # Python refuses to write out a very long one.
        return f"a number of {int(value.bit_length() * math.log10(2))} digits"
    text = repr(value)
    return text if len(text) <= length else f"{text[:length]}.."


def bounded(name, value, where="", table=BOUNDS):
    """The number, within the bounds that the table declares for that name; ValueError else."""
    least, most, *or_zero = table[name]
    rule = f"at least {least:,} and at most {most:,}" if most != SHARE else f"at least {least} and below 1"
    if or_zero:
        rule = f"0, or {rule}"
    inside = least <= value <= most or or_zero and value == 0
    check(inside, f"{where}{name} is {shown(value)}; it must be {rule}")      # fault 39
    return value


# -----------------------------------------------------------------------------
# types

KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", list: "a list",
         dict: "an object"}


def typed(name, value, kind, where=""):
    """
    The value, if it is of that type: a whole number does for float, and becomes one; text must be Unicode. ValueError
    else; `where` stands in front of its words.
    """
    whole = kind is float and type(value) is int and abs(value) < 2**1000
    value = float(value) if whole else value
    check(type(value) is kind, f"{where}{name} is {shown(value)}; it must be {KINDS[kind]}")
    return unicode(name, value, where) if kind is str else value


def unicode(name, value, where=""):
    """
    The text; ValueError where it was made of bytes that are not UTF-8, which Python keeps as halves of characters, or
    has a zero byte, which no path can have.
    """
    check("\0" not in value, f"{where}{name} is {shown(value)}; it holds a zero byte")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}{name} is {shown(value)}, whose character {error.start + 1} is not UTF-8") from None
    return value


def checked(name, value, kind, where="", table=BOUNDS):
    """The value, of that type and, if the table has bounds for that name, within them."""
    value = typed(name, value, kind, where)
    return bounded(name, value, where, table) if name in table and kind in (int, float) else value


def parse_json(raw, where, kind=dict):
    """The value of that type in bytes or text of JSON; ValueError for whatever else they may be."""
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError) as error:                # UnicodeDecodeError is a ValueError.
        raise ValueError(f"{where}: not JSON: {' '.join(str(error).split())[:200]}") from None
    check(isinstance(content, kind), f"{where}: holds {shown(content)}, not {KINDS[kind]}")
    return content


# -----------------------------------------------------------------------------
# command lines


class Parser(argparse.ArgumentParser):
    """argparse's, whose complaints are ValueErrors of one line, and which checks every value."""

    def error(self, message):
        """Called by argparse."""
        words = message if len(message) < 300 else message[:300] + ".."
        raise ValueError(f"{words}; {self.prog} --help says more")

    def parse_args(self, args=None, namespace=None):
        """The values by name; ValueError where one is out of its bounds, or no Unicode."""
        parsed = super().parse_args(args, namespace)
        for name, given in vars(parsed).items():
            for value in given if isinstance(given, list) else [given]:
                if type(value) in (int, float):
                    bounded(name, value, "--")
                elif isinstance(value, str):
                    unicode(name, value)
        return parsed


# -----------------------------------------------------------------------------
# files

STRANGE = {stat.S_ISDIR: "a folder", stat.S_ISCHR: "a device", stat.S_ISBLK: "a device",
           stat.S_ISFIFO: "a pipe", stat.S_ISSOCK: "a socket"}


def regular(path):
    """The path of a file that has an end; ValueError where there is none, or a device, a pipe, a socket or a folder."""
    try:
        mode = os.stat(path).st_mode
    except OSError as error:      # fault 1
        raise ValueError(f"{path}: {error.strerror}") from None
    found = next((words for is_one, words in STRANGE.items() if is_one(mode)), None)
    check(not found, f"{path}: {found}, where a file is needed")
    return path
