"""
Tables of scores and of what training came to, and the file that keeps them: results/NAME.jsonl, a line a run.
Without torch, so that a table is there in a moment.

    rows = read("results/e2e.jsonl")
    print(table(rows, RESULT_COLUMNS))              # seeds of one method are one row: 61.0 ± 0.4
"""

import json
import re
import statistics
from collections import Counter, defaultdict
from pathlib import Path

from lib import report
from lib.checks import check, parse_json, regular, typed

# The columns of a table: the key of a row -> its title, the factor of the number, the digits after the point.
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
RESULT_COLUMNS = SCORE_COLUMNS | {
    "val_loss": ("val loss", 1, 3),
    "seconds": ("seconds", 1, 0),
    "peak_bytes": ("peak, MB", 1e-6, 0),
}


# -----------------------------------------------------------------------------
# the table


def name_of(row):
    """What a row is called: the folder of its run without the seed, so that out/lora-1 and out/lora-2 are "lora"."""
    return re.sub(r"-\d+$", "", Path(row["run"]).name) if "run" in row else row["method"]


def by_settings(rows):
    """The rows in lists, one for each name and settings: what differs within a list is the seed.

    Two rows of one seed are never in one list: something else differs, such as data of the same name.
    """
    groups, times = defaultdict(list), Counter()
    for row in rows:
        method = name_of(row), row["settings"]
        seed = row.get("seed")
        groups[method, times[method, seed]].append(row)
        times[method, seed] += seed is not None
    return list(groups.values())


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
    """
    The lecture's table: runs that differ in their seed alone become one row with mean and deviation. Where two rows would have
    one name, they have that of their first run.
    """
    columns = {key: column for key, column in columns.items()
               if key not in OF_SOME_DATA or any(row[key] is not None for row in rows)}
    titles = [title for title, _, _ in columns.values()]
    table_rows = [["run", "trained", *titles, "runs"]]
    groups = by_settings(rows)
    times = Counter(name_of(group[0]) for group in groups)
    for group in groups:
        first = group[0]
        name = name_of(first)
        cells = [name if times[name] == 1 else first.get("run", name), f"{first['trainable']:,}"]
        for key, (_, factor, digits) in columns.items():
            cells.append(mean_and_deviation([row[key] for row in group], factor, digits))
        table_rows.append([*cells, str(len(group))])
    return report.table(table_rows, markdown)


# -----------------------------------------------------------------------------
# the file


def add(path, rows):
    """Adds rows to a file of results, a line each. ValueError, and the file is as it was, where it holds anything else."""
    rows_in(path)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    before = Path(path).read_bytes() if Path(path).exists() else b""
    start = "" if before.endswith(b"\n") or not before else "\n"
    lines = [json.dumps(row) + "\n" for row in rows]
    with open(path, "ab") as file:
        file.write((start + "".join(lines)).encode())


def rows_in(path):
    """All rows of a file of results as they stand in it, none where there is no file. ValueError names a line that is none."""
    if not Path(path).exists():
        return []
    lines = Path(regular(path)).read_bytes().splitlines()
    return [checked_row(line, f"{path}, line {number}") for number, line in enumerate(lines, 1)]


def identity(row):
    """What a row is the result of: a later row of the same run, settings and seed takes its place."""
    return row["run"], row["settings"], row.get("seed")


def read(path):
    """The rows of a file of results, those with most trained parameters first; of rows with one identity the last.

    ValueError names a line that is none.
    """
    rows = rows_in(regular(path))
    check(rows, f"{path}: no results in it")
    last = {identity(row): row for row in rows}
    return sorted(last.values(), key=lambda row: (-row["trainable"], row["run"]))


def checked_row(line, where):
    """A row of RESULT_COLUMNS out of a line of JSON."""
    row = parse_json(line, where)
    for key, kind in {"run": str, "settings": str, "trainable": int}.items():
        typed(key, row.get(key), kind, f"{where}: ")
    if row.get("seed") is not None:
        typed("seed", row["seed"], int, f"{where}: ")
    for key in RESULT_COLUMNS:
        value = row.setdefault(key, None)
        row[key] = value if value is None else typed(key, value, float, f"{where}: ")
    return row
