"""
Takes out each guard against the forty faults, one at a time in a copy of the repository, and runs that fault's test: it must fail.

    python tests/guards.py [12 33 ..]       # the faults; default all, about five minutes

A guard is named by words of the statement that is taken out, or by a piece of code and what it is replaced with.
"""

import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GUARDS = [      # fault, file, words of the statement | (code, replacement)
    (1, "peft.py", ("        raw = Path(path).read_bytes()\n    except OSError", "        raw = Path(path).read_bytes()\n    except ZeroDivisionError")),
    (2, "train.py", ('if not (folder / "state.before.pt").is_file():', "if True:")),
    (3, "peft.py", "its checksum is wrong"),
    (4, "peft.py", ("weights_only=True)", "weights_only=False)")),
    (4, "hub.py", ("weights_only=True", "weights_only=False")),
    (5, "peft.py", ('path.with_name(f".{path.name}.{os.getpid()}.tmp")', "path")),
    (6, "peft.py", "temporary.unlink(missing_ok=True)"),
    (7, "train.py", ("except (ValueError, OSError) as error:", "except ValueError as error:")),
    (8, "train.py", '(folder / "state.link").unlink(missing_ok=True)'),
    (9, "peft.py", "lacks {len(missing)} tensors"),
    (10, "peft.py", "; here it is {tuple(shape)}"),
    (11, "peft.py", "it must be torch.float32"),
    (12, "peft.py", "{where}: {name} holds NaN or infinity"),
    (13, "peft.py", "made for the base"),
    (14, "train.py", "when the state was saved"),
    (15, "train.py", "its optimizer state does not fit"),
    (16, "train.py", "or 'the state of the random generator'"),
    (17, "peft.py", "is newer than this code's"),
    (18, "train.py", ('while progress["step"] < config.max_iters and', 'while progress["step"] <= config.max_iters and')),
    (19, "train.py", "has changed since that run"),
    (20, "train.py", "cannot become"),
    (21, "train.py", "fcntl.flock("),
    (22, "hub.py", "leads out of the folder"),
    (23, "data.py", "the file is empty"),
    (24, "data.py", ('raw.decode("utf-8-sig")', 'raw.decode("utf-8-sig", "replace")')),
    (24, "data.py", ("except (ValueError, RecursionError) as error:\n            raise ValueError(f\"{path}, line", "except RecursionError as error:\n            raise ValueError(f\"{path}, line")),
    (25, "data.py", "is beyond the vocabulary of"),
    (26, "data.py", "if supervised < 1:"),
    (27, "data.py", ('too_long == "refuse":', 'too_long == "":')),
    (28, "train.py", ("(count / total)", "(1 / len(micro_batches))")),
    (29, "train.py", "positions of the context and leaves none"),
    (29, "peft.py", "it must be at least 1 and below the context of"),
    (30, "hub.py", "{theirs} holds NaN or infinity"),
    (31, "quant.py", ("if not bool(scale.isinf().any()):", "if True:")),
    (32, "quant.py", ("    if whole < x.numel():\n        parts.append(x[whole:].view(1, -1))\n", "")),
    (32, "quant.py", ("    values[whole:m].mul_(scales[-1])\n", "")),
    (33, "quant.py", "it must be a power of two"),
    (33, "train.py", ('CHOICES = {"quant": ("", "nf4", "linear4", "int4", "int8"), ', "CHOICES = {")),
    (33, "train.py", (', "dtype": ("auto", "float32", "bfloat16")', "")),
    (33, "hub.py", "leaves no layer to quantize"),
    (33, "hub.py", "quant_skip: no linear layer"),
    (34, "quant.py", "values; {self.scheme} of shape"),
    (35, "train.py", 'if progress["skipped_in_a_row"] == 10:'),
    (36, "train.py", "GPUs here; --device cpu runs without"),
    (37, "train.py", ('if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):', "if True:")),
    (38, "train.py", "signal.signal(number, self.handle)"),
    (38, "train.py", "signal.signal(number, signal.SIG_DFL)"),
    (39, "peft.py", "this model has {' '.join(there)}"),
    (39, "train.py", "it must be above 0"),
    (39, "train.py", "it must be a number, at least 0"),
    (39, "train.py", ("getattr(self, name)}; it must be at least 1", "getattr(self, name)}")),
    (39, "peft.py", "unknown method {name!r}"),
    (40, "peft.py", "the model is merged already"),
    (40, "hub.py", "holds something already"),
]


def without(source, guard):
    """The source with that guard taken out, wherever it stands."""
    if isinstance(guard, tuple):
        old, new = guard
        assert old in source, f"{old!r} is nowhere"
        return source.replace(old, new)
    lines = source.splitlines(keepends=True)
    smallest = {}       # line of the words -> the statement that holds them
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.stmt) and not isinstance(node, ast.Raise):
            for i in range(node.lineno, node.end_lineno + 1):
                if guard in lines[i - 1]:
                    smallest[i] = min(smallest.get(i, node), node, key=lambda n: n.end_lineno - n.lineno)
    assert smallest, f"{guard!r} is nowhere"
    for node in smallest.values():
        indent = " " * node.col_offset
        lines[node.lineno - 1:node.end_lineno] = [indent + "pass\n"] + ["\n"] * (node.end_lineno - node.lineno)
    return "".join(lines)


def survives(fault, file, guard):
    """Whether the fault's test passes without the guard, and pytest's last words."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "copy")
        copy.mkdir()
        for path in [*ROOT.glob("*.py"), ROOT / "pytest.ini"]:
            shutil.copy(path, copy)
        shutil.copytree(ROOT / "tests", copy / "tests", ignore=shutil.ignore_patterns("__pycache__"))
        (copy / file).write_text(without((copy / file).read_text(), guard))
        done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/test_faults.py", "-k", f"test_{fault:02}"],
                              cwd=copy, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(copy)})
    words = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr[-200:]
    return done.returncode != 1 or not re.match(r"\d+ failed|.* error", words), words


def main(chosen):
    passed = 0
    for fault, file, guard in GUARDS:
        if not chosen or fault in chosen:
            bad, words = survives(fault, file, guard)
            passed += bad
            print(f"{fault:>2}  {'STILL PASSES' if bad else 'fails, as it must':18} {file}: {guard if isinstance(guard, str) else guard[0].strip().splitlines()[0]}  ({words})", flush=True)
    print(f"{passed} guards are not tested" if passed else "every guard is tested")
    return bool(passed)


if __name__ == "__main__":
    sys.exit(main(list(map(int, sys.argv[1:]))))
