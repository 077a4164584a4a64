"""
A prompt in, text out.

    python sample.py out/qlora --prompt "name[The Plough], eatType[pub], food[French]"  # a run of train.py
    python sample.py out/qlora out/lora --prompt "..."                                  # the same from each
    python sample.py DIR --prompt "Once upon a time" --temperature 0.8 --top_k 50       # a base, or merged
"""

import argparse
import sys

from lib.config import run_main


def parse(args):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="+",
                        help="folders: runs of train.py, or models in Hugging Face layout")
    parser.add_argument("--prompt", action="append",
                        help="may be given several times; none: only the beginning-of-sequence token")
    parser.add_argument("--max_new_tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    parser.add_argument("--top_k", type=int)
    parser.add_argument("--top_p", type=float)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    return parser.parse_args(args)


if __name__ == "__main__":      # --help and mistakes answer here, before torch is imported
    ARGS = parse(sys.argv[1:])

import torch

from data import format_prompt
from lib.run import load_run


def stream(model, tokenizer, prompt, args):
    """Yields the text of the continuation in pieces, as soon as they are certain."""
    generator = torch.Generator(model.head.weight.device).manual_seed(args.seed)
    prompts = [tokenizer.encode_prompt(prompt)]
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


def main(args):
    """Prints how every model continues every prompt."""
    for folder in args.model:
        model, tokenizer, config = load_run(folder, args.device, args.dtype)
        for prompt in args.prompt or [""]:
            if len(args.model) > 1:
                print(f"--- {folder}")
            print(prompt, end=" " if prompt else "")
            for piece in stream(model, tokenizer, format_prompt(prompt, config.template), args):
                print(piece, end="", flush=True)
            print()


if __name__ == "__main__":
    run_main(main, ARGS)
