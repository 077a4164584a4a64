"""
A prompt in, text out.

    python sample.py out/qlora --prompt "name[The Plough], eatType[pub], food[French]"  # a run of train.py
    python sample.py out/qlora out/lora --prompt "..."                                  # the same from each
    python sample.py DIR --prompt "Once upon a time" --temperature 0.8 --top_k 50       # a base, or merged
    python sample.py out/waiter --chat                                                  # line by line; /exit ends
    echo "A table for two?" | python sample.py DIR --chat --system "You are a waiter."

Where a run was trained on conversations, a prompt is what a user says.
"""

import argparse
import sys

from lib.checks import Parser, unicode
from lib.config import run_main


def parse(args):
    """The command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="+",
                        help="folders: runs of train.py, or models in Hugging Face layout")
    parser.add_argument("--base", default="", help="where the runs' base lies now, if it has moved")
    parser.add_argument("--adapter", default="best", metavar="last|best|STEP", help="which of a run's (default: best)")
    parser.add_argument("--prompt", action="append",
                        help="may be given several times; none: only the beginning-of-sequence token")
    parser.add_argument("--chat", action="store_true",
                        help="a conversation: each line of standard input is answered")
    parser.add_argument("--system", default="", help="the system message of the conversation")
    parser.add_argument("--max_new_tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    parser.add_argument("--top_k", type=int)
    parser.add_argument("--top_p", type=float)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    return parser.parse_args(args)


if __name__ == "__main__":      # --help and mistakes answer here, before torch is imported
    ARGS = run_main(parse, sys.argv[1:])

import torch

import dataclasses

from data import Example, Format, parse_mr
from lib.files import check, located
from lib.run import chat_of, load_run


def stream(model, tokenizer, prompt, args):
    """Yields the text of the continuation in pieces, as soon as they are certain. prompt: text, or ids."""
    generator = torch.Generator(model.head.weight.device).manual_seed(args.seed)
    prompts = [tokenizer.encode_prompt(prompt) if isinstance(prompt, str) else prompt]
    tokens = model.stream(prompts, args.max_new_tokens, args.temperature, args.top_k, args.top_p,
                          tokenizer.stops, generator)
    ids = []
    shown = ""
    for token in tokens:                                         # (1,)
        ids += token.tolist()
        text = tokenizer.decode(ids)
        if text.startswith(shown) and not text.endswith("\ufffd"):    # half a character waits for the rest
            yield text[len(shown):]
            shown = text
    yield tokenizer.decode(ids)[len(shown):]


def shown(pieces):
    """Prints pieces of a text as they come, and a line's end; returns the text."""
    text = ""
    for piece in pieces:
        print(piece, end="", flush=True)
        text += piece
    print(flush=True)
    return text


def prompt_ids(made, model, messages):
    """The ids of a conversation before the answer. While they fill the context, its oldest question and
    answer are left out of messages; ValueError where the last question alone does."""
    room = model.config.block_size - model.reserved
    while True:
        ids = made.chat.prompt(messages)
        if len(ids) < room:
            return ids
        first = int(messages[0]["role"] == "system")
        check(len(messages) > first + 1, f"that is {len(ids)} tokens, as many as the context of {room} has or more; say less")
        del messages[first:first + 2]
        print("(the context is full; the oldest question and its answer are forgotten)", file=sys.stderr)


def talk(model, made, args):
    """Answers the lines of standard input, each with what was said before, until /exit or its end."""
    messages = [{"role": "system", "content": args.system}] if args.system else []
    sign = "> " if sys.stdin.isatty() else ""
    while True:
        print(sign, end="", flush=True)
        with located("standard input"):
            line = unicode("a line", sys.stdin.readline())
        said = line.strip()
        if not line or said == "/exit":
            return
        if not said:
            continue
        messages.append({"role": "user", "content": said})
        ids = prompt_ids(made, model, messages)
        answer = shown(stream(model, made.tokenizer, ids, args))
        messages.append({"role": "assistant", "content": answer})


def main(args):
    """Prints how every model continues every prompt, or talks."""
    check(not args.chat or len(args.model) == 1, "--chat talks with one model; give one folder")
    check(not args.chat or not args.prompt, "--chat reads from standard input; leave out --prompt")
    for folder in args.model:
        model, tokenizer, config = load_run(folder, args.device, args.dtype, args.base, args.adapter)
        if args.chat and config.template in ("auto", "pipe", "raw", "none"):
            config = dataclasses.replace(config, template="base")
        made = Format(tokenizer, config.template, chat_of(config, tokenizer, folder))
        if args.chat:
            talk(model, made, args)
            return
        check(made.chat is not None or not args.system, f"{folder}: was not trained on conversations, so --system has no place there; leave it out")
        for prompt in args.prompt or [""]:
            if len(args.model) > 1:
                print(f"--- {folder}")
            print(prompt, end=" " if prompt else "")
            example = Example(prompt, [], is_representation=parse_mr(prompt) is not None)
            if made.chat is not None and args.system:
                system = {"role": "system", "content": args.system}
                example.messages = [system, *made.messages(example)]
            shown(stream(model, tokenizer, made.prompt(example), args))


if __name__ == "__main__":
    run_main(main, ARGS)
