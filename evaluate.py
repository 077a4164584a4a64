"""
Writes texts about the test split and scores them as the lecture's table does.

    python evaluate.py out/lora out/full                     # one row a run
    python evaluate.py out/lora-*                            # seeds of one method become mean and deviation
    python evaluate.py out/lora --beams 10 --length_penalty 0.8 --no_repeat_ngram 4   # the LoRA paper's
    python evaluate.py --training out/lora-*                 # what training came to, without writing any text
    python evaluate.py out/lora-* --results results/e2e.jsonl         # adds the rows to a file, and prints it all
    python evaluate.py --results results/e2e.jsonl           # prints it, in a moment
    python evaluate.py --predictions FILE --references FILE  # texts from elsewhere, in the official layout

The scores are those of the E2E challenge's own script: BLEU, NIST, METEOR, ROUGE-L and CIDEr. METEOR needs
the pycocoevalcap package and Java, and is a dash without. SER, slot errors, is the share of the names, types,
foods, areas and neighbours in the representations that the text does not contain. For other data the share of
texts that equal their reference stands in its place.

Texts are kept as they are written: the same command goes on where it was stopped, and scores a run whose texts
are all there without its model.
"""

import argparse
import csv
import json
import re
import shlex
import sys
import time
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path

from lib import results
from lib.checks import Parser, check, checked
from lib.config import FIELDS, read_run_config, run_main
from lib.results import RESULT_COLUMNS, SCORE_COLUMNS, TRAINING_COLUMNS


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
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    parser.add_argument("--base", default="", help="where the runs' base lies now, if it has moved")
    parser.add_argument("--adapter", default="best", metavar="last|best|STEP", help="which of a run's (default: best)")
    parser.add_argument("--training", action="store_true",
                        help="losses, time, memory and size of the runs instead of scores")
    parser.add_argument("--results", default="", metavar="FILE",
                        help="a file of rows, a line a run; those of the runs are put into it, all are printed")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--predictions", help="a file of texts, one a line, or a .csv or .tsv with mr and output")
    parser.add_argument("--references", help="references: groups separated by an empty line, one a line, or a .csv or .tsv with mr and ref")
    parsed = parser.parse_args(args)
    check(not (parsed.results and parsed.training), "--results holds scores; leave out --training")
    searches = parsed.beams > 1 or parsed.no_repeat_ngram or parsed.length_penalty == 1
    check(searches, "--length_penalty is of beam search; --beams says how wide it is")
    places = [Path(folder).resolve() for folder in parsed.runs]
    twice = [folder for folder, place in zip(parsed.runs, places) if places.count(place) > 1]
    check(not twice, f"{', '.join(twice)}: one run, named more than once")
    files_alone = not (parsed.runs or parsed.results or parsed.training)
    check(files_alone or not (parsed.predictions or parsed.references),
          "--predictions and --references are scored alone; leave out the folders of runs, --results and --training")
    return parsed


def show(rows, columns, args):
    """Prints rows as a table, or as JSON."""
    print(json.dumps(rows, indent=1) if args.json else results.table(rows, columns, args.markdown))


def parse_or_show(args):
    """The command line; where it asks for nothing but the table of a file, prints that and ends."""
    parsed = parse(args)
    if parsed.results and not parsed.runs:
        show(results.read(parsed.results), RESULT_COLUMNS, parsed)
        sys.exit()
    if parsed.results:
        results.rows_in(parsed.results)      # What is no file of results is refused before all work.
    return parsed


if __name__ == "__main__":      # --help, mistakes and tables answer here, before torch is imported
    ARGS = run_main(parse_or_show, sys.argv[1:])

import data
import peft
from lib.beam import beam_search
from lib.files import read_bytes, read_json, read_json_lines, sha256_of, write_atomic
from lib.run import chat_of, config_of, load_run, sample_text
from lib.scores import score

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


def write_texts(model, tokenizer, prompts, args, keep):
    """Writes a text for each of the prompts, {index: prompt}, in batches of similar length.

    Prompts are texts or lists of token ids. keep is called with {index: text} after each batch.
    """
    def length(i):
        return len(tokenizer.encode(prompts[i]) if isinstance(prompts[i], str) else prompts[i])

    order = sorted(prompts, key=length)
    for start in range(0, len(order), args.batch_size):
        batch = order[start:start + args.batch_size]
        found = continue_prompts(model, tokenizer, [prompts[i] for i in batch], args)
        keep({i: text.strip() for i, text in zip(batch, found)})


class Kept:
    """
    The texts of an evaluation in a file, a line each, under a line of what was asked for: those that are there
    already if the same was asked, and those that are added.
    """

    def __init__(self, path, asked):
        lines = read_json_lines(path) if path.is_file() else []
        same = lines and lines[0] == asked
        self.texts = {line["index"]: line["text"] for line in lines[1:]} if same else {}
        self.path, self.asked = path, asked

    def add(self, texts):
        """texts: {index: text}. The file is written anew: what is refused before the first text leaves it alone."""
        self.texts |= texts
        write_atomic(self.path, [(json.dumps(self.asked) + "\n").encode(), lines_of(self.texts)])


def lines_of(texts):
    """{index: text} as lines of JSON, bytes."""
    return "".join(json.dumps({"index": i, "text": text}) + "\n" for i, text in texts.items()).encode()


# -----------------------------------------------------------------------------
# rows: a dict a run with its name, its settings and its numbers


def settings_but_seed(config):
    """All that two runs must have in common to be seeds of one method, as JSON: what differs from the defaults."""
    differing = ("seed", "out_dir", "resume", "device", "fsdp")
    settings = {name: value for name, value in asdict(config).items()
                if name not in differing and value != FIELDS[name].default}
    places = {name: settings[name].rstrip("/") for name in ("base", "data") if name in settings}
    return json.dumps(settings | places, sort_keys=True)


def lines(texts):
    """The texts, a line each."""
    return "".join(" ".join(text.split()) + "\n" for text in texts)


WRITTEN = ("predictions.txt", "references.txt", "scores.json")    # beside texts.jsonl, which is there before them
DECODING = ("max_new_tokens", "beams", "length_penalty", "no_repeat_ngram")


def asked_of(folder, test, args):
    """What the texts of a run depend on: its training, what they are about, and how they are searched for.

    A run that has not ended may go on, so that its texts are never the same.
    """
    prompts = json.dumps([[example.prompt, example.messages] for example in test])
    ended = Path(folder, "metrics.json").is_file()
    training = sha256_of(read_bytes(Path(folder, "log.jsonl"))) if ended else time.time()
    decoding = {name: getattr(args, name) for name in DECODING}
    return {"training": training, "adapter": args.adapter, "dtype": args.dtype,
            "prompts": sha256_of(prompts.encode())} | decoding


def evaluate_run(folder, args):
    """Writes predictions.txt and references.txt (the official layout) and scores.json into the folder.

    Returns the row. ValueError where the data has no references. Texts that an earlier call has written are in
    texts.jsonl, and are not written again.
    """
    config, is_run = config_of(folder)
    source = args.data or config.data
    corpus = data.load(source)
    test = corpus.test[:args.limit or None]
    if not any(example.references for example in test):
        raise ValueError(f"{source}: no test split with references there")
    kept = Kept(Path(folder, "texts.jsonl"), asked_of(folder, test, args))
    if len(kept.texts) < len(test):
        trainable = write_rest(kept, folder, test, corpus.form, args)
    else:
        trainable = training_row(folder)["trainable"]
    predictions = [kept.texts[i] for i in range(len(test))]
    references = [example.references for example in test]
    row = {"method": config.method, "trainable": trainable} if is_run else {"method": "base", "trainable": 0}
    row |= score(predictions, references, [example.prompt for example in test if example.is_representation])
    row["texts"] = len(test)
    texts = lines(predictions), "\n".join(map(lines, references)), json.dumps(row, indent=1) + "\n"
    for name, text in zip(WRITTEN, texts):
        write_atomic(Path(folder, name), text.encode())
    return row | origin_of(folder, config)


def origin_of(folder, config):
    """What a row says of where it comes from: the run's folder, its settings and its seed."""
    return {"run": str(folder), "settings": settings_but_seed(config), "seed": config.seed}


def write_rest(kept, folder, test, form, args):
    """Writes the texts about the examples of test that are not kept yet. Returns how many parameters were trained."""
    model, tokenizer, config = load_run(folder, args.device, args.dtype, args.base, args.adapter)
    config = replace(config, template=data.resolved_template(config.template, form))
    made = data.Format(tokenizer, config.template, chat_of(config, tokenizer, folder))
    prompts = {i: made.prompt(example) for i, example in enumerate(test) if i not in kept.texts}
    room = model.config.block_size - model.reserved
    too_long = {i: "" for i, prompt in prompts.items() if len(prompt) > room}
    if too_long:
        print(f"{folder}: {len(too_long)} of {len(test)} prompts do not fit into the context of {room} tokens; their texts are "
              "empty", file=sys.stderr)
        kept.add(too_long)
    prompts = {i: prompt for i, prompt in prompts.items() if i not in too_long}
    start, first = time.perf_counter(), len(kept.texts)

    def keep(texts):
        kept.add(texts)
        done = len(kept.texts)
        rate = (done - first) / (time.perf_counter() - start)
        end = "\n" if done == len(test) else ""
        if sys.stderr.isatty():
            print(f"\r{folder}: {done}/{len(test)}, {rate:.1f}/s ", end=end, file=sys.stderr)

    write_texts(model, tokenizer, prompts, args, keep)
    return peft.count_parameters(model)["trainable"]


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
    return row | origin_of(folder, config)


def portable(row):
    """The row for a file of results, where the run, its base and its data have their names alone.

    On another machine they lie elsewhere; the row of a run that is repeated there takes this one's place.
    """
    settings = json.loads(row["settings"])
    names = {key: Path(settings[key]).name for key in ("base", "data") if key in settings}
    run = Path(row["run"]).resolve().name
    return row | {"run": run, "settings": json.dumps(settings | names, sort_keys=True)}


def result_row(row, args):
    """A row of evaluate_run for a file of results: what training came to beside it, and how both are done again."""
    folder = row["run"]
    metrics = read_json(Path(folder, "metrics.json"))
    training = {name: value for name, value in training_row(folder).items() if name in ("seed", *TRAINING_COLUMNS)}
    origin = {name: metrics.get(name) for name in ("steps", "hardware", "date")}
    flags = {"seed": training["seed"]} | json.loads(row["settings"])
    decoding = {name: getattr(args, name) for name in DECODING}
    commands = [f"python train.py {as_flags(flags)} --out_dir {folder}", f"python evaluate.py {folder} {as_flags(decoding)}"]
    return portable(row) | training | origin | {"commands": commands}


def as_flags(values):
    """{"rank": 8, "packing": True} -> "--rank 8 --packing true"."""
    return " ".join(f"--{name} {shlex.quote(str(value).lower() if value is True or value is False else str(value))}"
                    for name, value in values.items())


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


def check_runs(args):
    """ValueError where what evaluate_run or results.add would do at the end is refused: before the first text."""
    for folder in args.runs:
        own = not Path(folder, "texts.jsonl").exists()
        there = [name for name in WRITTEN if own and Path(folder, name).exists()]
        check(not there, f"{folder}: {', '.join(there)} would be overwritten, and no texts.jsonl says that evaluate.py wrote it; move it away")
    if args.results:
        ended = [Path(folder, "metrics.json").is_file() for folder in args.runs]
        others = [folder for folder, end in zip(args.runs, ended) if not end]
        check(not others, f"{', '.join(others)}: no metrics.json there, so no run of train.py that has ended; leave out --results to score it")
        keys = [results.identity(portable(training_row(folder))) for folder in args.runs]
        twice = [folder for folder, key in zip(args.runs, keys) if keys.count(key) > 1]
        check(not twice, f"{', '.join(twice)}: one name, settings and seed, so that {args.results} would show only the last; rename a folder")


def main(args):
    """Scores runs, or files of predictions, and prints them."""
    if args.predictions or args.references:
        if not (args.predictions and args.references):
            raise ValueError("--predictions and --references belong together")
        rows = [files_row(args.predictions, args.references)]
    elif args.training:
        rows = [training_row(folder) for folder in args.runs]
    else:
        check_runs(args)
        rows = [evaluate_run(folder, args) for folder in args.runs]
    if not rows:
        raise ValueError("nothing to evaluate: give the folders of runs, or --predictions and --references")
    if args.results:
        results.add(args.results, [result_row(row, args) for row in rows])
        show(results.read(args.results), RESULT_COLUMNS, args)
    else:
        show(rows, TRAINING_COLUMNS if args.training else SCORE_COLUMNS, args)


if __name__ == "__main__":
    run_main(main, ARGS)
