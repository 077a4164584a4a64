"""
Writes texts about the test split and scores them as the lecture's table does.

    python evaluate.py out/lora out/full                     # one row a run
    python evaluate.py out/lora-*                            # seeds of one method become mean and deviation
    python evaluate.py out/lora --beams 10 --length_penalty 0.8 --no_repeat_ngram 4   # the LoRA paper's
    python evaluate.py --training out/lora-*                 # what training came to, without writing any text
    python evaluate.py --predictions FILE --references FILE  # texts from elsewhere, in the official layout

The scores are those of the E2E challenge's own script: BLEU, NIST, METEOR, ROUGE-L and CIDEr. METEOR needs
the pycocoevalcap package and Java, and is a dash without. SER, slot errors, is the share of the names, types,
foods, areas and neighbours in the representations that the text does not contain. For other data the share of
texts that equal their reference stands in its place.
"""

import argparse
import csv
import json
import re
import statistics
import sys
import time
from collections import defaultdict
from dataclasses import replace
from itertools import groupby
from pathlib import Path

from lib.checks import Parser, check, checked
from lib.config import read_run_config, run_main


def parse(args):
    """The command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", help="folders: runs of train.py, or models in Hugging Face layout")
    parser.add_argument("--data", default="", help="whose test split; default: the run's own")
    parser.add_argument("--limit", type=int, default=0, help="only the first N representations")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--max_new_tokens", type=int, default=120)
    parser.add_argument("--beams", type=int, default=1, help="1 is greedy (default)")
    parser.add_argument("--length_penalty", type=float, default=1.0)
    parser.add_argument("--no_repeat_ngram", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--base", default="", help="where the runs' base lies now, if it has moved")
    parser.add_argument("--adapter", default="best", metavar="last|best|STEP", help="which of a run's (default: best)")
    parser.add_argument("--training", action="store_true",
                        help="losses, time, memory and size of the runs instead of scores")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--predictions", help="a file of texts, one a line, or a .csv or .tsv with mr and output")
    parser.add_argument("--references", help="references: groups separated by an empty line, one a line, or a .csv or .tsv with mr and ref")
    parsed = parser.parse_args(args)
    searches = parsed.beams > 1 or parsed.no_repeat_ngram or parsed.length_penalty == 1
    check(searches, "--length_penalty is of beam search; --beams says how wide it is")
    places = [Path(folder).resolve() for folder in parsed.runs]
    twice = [folder for folder, place in zip(parsed.runs, places) if places.count(place) > 1]
    check(not twice, f"{', '.join(twice)}: one run, named more than once")
    return parsed


if __name__ == "__main__":      # --help and mistakes answer here, before torch is imported
    ARGS = run_main(parse, sys.argv[1:])

import data
import peft
from lib import report
from lib.beam import beam_search
from lib.files import read_bytes, read_json, write_atomic
from lib.run import chat_of, load_run, sample_text
from lib.scores import score

# -----------------------------------------------------------------------------
# columns of the table: the key of a row -> its title, the factor of the number, the digits after the point

SCORE_COLUMNS = {
    "BLEU": ("BLEU", 100, 1),
    "NIST": ("NIST", 1, 2),
    "METEOR": ("METEOR", 100, 1),
    "ROUGE-L": ("ROUGE-L", 100, 1),
    "CIDEr": ("CIDEr", 1, 2),
    "SER": ("SER", 100, 1),
    "exact": ("exact, %", 100, 1),
}
OF_SOME_DATA = ("SER", "exact")          # scores that are left out where no row has them
TRAINING_COLUMNS = {
    "loss_before": ("loss before", 1, 3),
    "val_loss": ("loss after", 1, 3),
    "seconds": ("seconds", 1, 0),
    "peak_bytes": ("peak, MB", 1e-6, 0),
    "adapter_bytes": ("adapter, kB", 1e-3, 0),
}

# -----------------------------------------------------------------------------
# writing


def continue_prompts(model, tokenizer, prompts, args):
    """A text for each prompt, in one batch: greedily, or by beam search where args ask for it."""
    if args.beams <= 1 and not args.no_repeat_ngram:
        return sample_text(model, tokenizer, prompts, args.max_new_tokens)
    encoded = [tokenizer.encode_prompt(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    found = beam_search(model, encoded, args.max_new_tokens, args.beams, args.length_penalty,
                        args.no_repeat_ngram, tokenizer.stops)
    return [tokenizer.decode(ids) for ids in found]


def write_texts(model, tokenizer, prompts, args, progress):
    """A text for every prompt, in batches of similar length: list of str in the order of the prompts.

    Prompts are texts or lists of token ids. progress is called with the number of texts that are done,
    after each batch.
    """
    lengths = [len(tokenizer.encode(prompt) if isinstance(prompt, str) else prompt) for prompt in prompts]
    order = sorted(range(len(prompts)), key=lengths.__getitem__)
    texts = {}
    for start in range(0, len(order), args.batch_size):
        batch = order[start:start + args.batch_size]
        found = continue_prompts(model, tokenizer, [prompts[i] for i in batch], args)
        texts.update(zip(batch, found))
        progress(len(texts))
    return [texts[i].strip() for i in range(len(prompts))]


# -----------------------------------------------------------------------------
# rows: a dict a run with its name, its settings and its numbers


def settings_but_seed(config):
    """All that two runs must have in common to be seeds of one method, as JSON."""
    differing = ("seed", "out_dir", "resume", "device", "fsdp")
    settings = {name: value for name, value in vars(config).items() if name not in differing}
    return json.dumps(settings, sort_keys=True)


def lines(texts):
    """The texts, a line each."""
    return "".join(" ".join(text.split()) + "\n" for text in texts)


def evaluate_run(folder, args):
    """Writes predictions.txt and references.txt (the official layout) and scores.json into the folder.

    Returns the row. ValueError where the data has no references.
    """
    model, tokenizer, config = load_run(folder, args.device, args.dtype, args.base, args.adapter)
    source = args.data or config.data
    corpus = data.load(source)
    test = corpus.test[:args.limit or None]
    if not any(example.references for example in test):
        raise ValueError(f"{source}: no test split with references there")
    start = time.perf_counter()

    def progress(done):
        rate = done / (time.perf_counter() - start)
        end = "\n" if done == len(test) else ""
        if sys.stderr.isatty():
            print(f"\r{folder}: {done}/{len(test)}, {rate:.1f}/s ", end=end, file=sys.stderr)

    config = replace(config, template=data.resolved_template(config.template, corpus.form))
    made = data.Format(tokenizer, config.template, chat_of(config, tokenizer, folder))
    prompts = [made.prompt(example) for example in test]
    predictions = write_texts(model, tokenizer, prompts, args, progress)
    seconds = time.perf_counter() - start
    references = [example.references for example in test]
    row = {"method": config.method, "trainable": peft.count_parameters(model)["trainable"]}
    if config.base == str(folder):                               # a model, not a run
        row = {"method": "base", "trainable": 0}
    row |= score(predictions, references, [example.prompt for example in test if example.is_representation])
    row |= {"seconds": round(seconds, 1), "texts": len(test)}
    texts = {"predictions.txt": lines(predictions), "references.txt": "\n".join(map(lines, references)),
             "scores.json": json.dumps(row, indent=1) + "\n"}
    for name, text in texts.items():
        write_atomic(Path(folder, name), text.encode())
    return row | {"run": str(folder), "settings": settings_but_seed(config)}


def training_row(folder):
    """The row of a run that has ended, from its metrics.json."""
    path = Path(folder, "metrics.json")
    check(path.is_file(), f"{folder}: no finished run there, it has no metrics.json")
    metrics = read_json(path)
    config = read_run_config(folder)
    row = {}
    for name in ("method", "trainable", *TRAINING_COLUMNS):
        kind = {"method": str, "trainable": int}.get(name, float)
        value = metrics.get(name)
        row[name] = value if value is None and kind is float else checked(name, value, kind, f"{path}: ")
    return row | {"run": str(folder), "settings": settings_but_seed(config)}


# The columns of the official script's tables, by how their names begin, and what it mends of wrong
# encodings.
COLUMNS = {
    "prompt": r"mr|src|source|meaning([_ .-]rep(resentation)?)?|da|dial(ogue)?[_ .-]act",
    "prediction": r"out(put)?|ref(erence)?|sys(tem)?([_ .-](out(put)?|ref(erence)?))?",
    "reference": r"trg|tgt|target|ref(erence)?|human([_ .-](ref(erence)?))?"}
MISREAD = {"Ł": "£", "Â£": "£", "Ã©": "é", "ã©": "é"}


def read_lines(path):
    """The lines of a text file, without the white space around them; ValueError where it is no UTF-8."""
    try:
        text = read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: {error}") from None
    lines = [line.strip() for line in re.split(r"\r\n|\r|\n", text)]
    return lines if lines[-1] else lines[:-1]                    # Nothing follows the last line's end.


def is_table(path):
    """Whether a file is a table by its name: comma- or tab-separated, with a header."""
    return Path(path).suffix.lower() in (".csv", ".tsv")


def read_table(path, column):
    """[(prompt, text in that column of COLUMNS)] of a table's rows."""
    rows = [line for line in read_lines(path) if line]
    check(rows, f"{path}: the file is empty")
    for wrong, right in MISREAD.items():
        rows = [row.replace(wrong, right) for row in rows]
    header, *rows = csv.reader(rows, delimiter="\t" if "\t" in rows[0] else ",")
    places = []
    for name in ("prompt", column):
        found = [i for i, title in enumerate(header) if re.match(COLUMNS[name], title, re.I)]
        check(len(found) == 1, f"{path}: {len(found)} columns for the {name} in {', '.join(header)}; there must be one, such as mr and ref")
        places += found
    for number, row in enumerate(rows, 1):
        check(len(row) == len(header), f"{path}: row {number} has {len(row)} columns, the header {len(header)}")
    return [tuple(row[i] for i in places) for row in rows]


def read_predictions(path):
    """The texts of a file: a line each, which may be empty, or a row each of a table."""
    return [text for _, text in read_table(path, "prediction")] if is_table(path) else read_lines(path)


def read_references(path):
    """The groups of references in a file: lines, with an empty one between groups, or a line each where no line is
    empty; of a table, the rows in succession that have one prompt."""
    if is_table(path):
        groups = groupby(read_table(path, "reference"), key=lambda row: row[0])
        return [[text for _, text in rows] for _, rows in groups]
    groups = [[]]
    for line in read_lines(path):
        if line:
            groups[-1].append(line)
        else:
            groups.append([])
    while groups and not groups[-1]:
        groups.pop()
    return [[line] for line in groups[0]] if len(groups) == 1 else groups


def files_row(predictions, references):
    """The row of two files, in the official script's layouts."""
    scores = score(read_predictions(predictions), read_references(references))
    return {"method": Path(predictions).name, "trainable": 0, "settings": "", **scores}


# -----------------------------------------------------------------------------
# the table


def mean_and_deviation(values, factor, digits):
    """Of the values that are not None, times the factor: "61.0 ± 0.4"; "61.0" of one value, "-" of none."""
    numbers = [value * factor for value in values if value is not None]
    if not numbers:
        return "-"
    mean = f"{statistics.fmean(numbers):.{digits}f}"
    if len(numbers) == 1:
        return mean
    return f"{mean} ± {statistics.stdev(numbers):.{digits}f}"


def table(rows, columns, markdown=False):
    """The lecture's table: runs that differ in their seed alone become one row with mean and deviation."""
    seeds = defaultdict(list)                                    # settings -> rows
    for row in rows:
        seeds[row["settings"]].append(row)
    columns = {key: column for key, column in columns.items()
               if key not in OF_SOME_DATA or any(row[key] is not None for row in rows)}
    titles = [title for title, _, _ in columns.values()]
    table_rows = [["run", "trained", *titles, "runs"]]
    for group in seeds.values():
        first = group[0]
        name = first["method"]
        if "run" in first:
            name = re.sub(r"-\d+$", "", Path(first["run"]).name)     # out/lora-1 and out/lora-2 are "lora"
        cells = [name, f"{first['trainable']:,}"]
        for key, (_, factor, digits) in columns.items():
            cells.append(mean_and_deviation([row[key] for row in group], factor, digits))
        table_rows.append([*cells, str(len(group))])
    return report.table(table_rows, markdown)


def main(args):
    """Scores runs, or files of predictions, and prints them."""
    if args.predictions or args.references:
        if not (args.predictions and args.references):
            raise ValueError("--predictions and --references belong together")
        rows = [files_row(args.predictions, args.references)]
    elif args.training:
        rows = [training_row(folder) for folder in args.runs]
    else:
        rows = [evaluate_run(folder, args) for folder in args.runs]
    if not rows:
        raise ValueError("nothing to evaluate: give the folders of runs, or --predictions and --references")
    if args.json:
        print(json.dumps(rows, indent=1))
    else:
        print(table(rows, TRAINING_COLUMNS if args.training else SCORE_COLUMNS, args.markdown))


if __name__ == "__main__":
    run_main(main, ARGS)
