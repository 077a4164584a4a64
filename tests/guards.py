"""
Takes out each guard against a fault, one at a time in a copy of the repository, and runs that fault's test: it must fail.

    python tests/guards.py [12 33 ..]       # the faults; default all, about ten minutes

A guard is a statement marked with a comment such as `# fault 33` on its first or its last line; it is taken out whole. Where a
statement cannot go, REPLACED says which words of the marked line become which.
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
REPLACED = {                                # file and fault: words of a marked line, and what they become
    ("lib/config.py", 7): ("OSError, ", ""),
    ("lib/records.py", 24): ("raise ValueError", "raise KeyError"),
    ("lib/checks.py", 1): ("OSError", "ZeroDivisionError"),
    ("lib/files.py", 4): ("weights_only=True", "weights_only=False"),
    ("lib/files.py", 5): ('path.with_name(f".{path.name}.{os.getpid()}.tmp")', "path"),
    ("lib/run.py", 48): ("run.state_is_whole", "state.is_file()"),
    ("train.py", 47): ('count_parameters(run.model)["trainable"]', "count_kept(run.model)"),
    ("train.py", 18): ("<", "<="),
    ("lib/run.py", 37): ("if not out_of_memory(error)", "if True"),
}


def marks():
    """[(fault, file, line number)] of every guard."""
    found = []
    for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("lib/*.py")]):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            for fault in re.findall(r"# fault (\d+)$", line):
                found.append((int(fault), path.relative_to(ROOT).as_posix(), number))
    return sorted(found)


def without(source, number):
    """The source without the smallest statement that begins or ends on that line."""
    statements = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.stmt) and not isinstance(node, ast.Raise)]
    marked = [node for node in statements if number in (node.lineno, node.end_lineno)]
    guard = min(marked, key=lambda node: node.end_lineno - node.lineno)
    lines = source.splitlines(keepends=True)
    blank = ["\n"] * (guard.end_lineno - guard.lineno)
    lines[guard.lineno - 1:guard.end_lineno] = [" " * guard.col_offset + "pass\n", *blank]
    return "".join(lines)


def unguarded(source, fault, file, number):
    """The source without the guard on that line."""
    lines = source.splitlines(keepends=True)
    old, new = REPLACED.get((file, fault), (None, None))
    if old is None or old not in lines[number - 1]:
        return without(source, number)
    lines[number - 1] = lines[number - 1].replace(old, new)
    return "".join(lines)


def check_replaced():
    """Every entry of REPLACED must be about a line that is marked."""
    for (file, fault), (old, _) in REPLACED.items():
        lines = (ROOT / file).read_text().splitlines()
        marked = [lines[number - 1] for marked_fault, marked_file, number in marks() if (marked_file, marked_fault) == (file, fault)]
        assert any(old in line for line in marked), f"{file}, fault {fault}: {old!r} is on no marked line"


def survives(fault, file, number):
    """
    Whether the fault's test does not fail without the guard, and pytest's last words. An error before the test began says nothing
    about the guard: too much was taken out.
    """
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "copy")
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns("__pycache__", ".git", ".venv*", "out"))
        (copy / file).write_text(unguarded((copy / file).read_text(), fault, file, number))
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/test_faults.py", "-k", f"test_{fault:02}"]
        done = subprocess.run(command, cwd=copy, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(copy)})
    words = (done.stdout.strip().splitlines() or [done.stderr[-200:]])[-1]
    return done.returncode != 1 or not re.match(r"\d+ failed", words), words


def main(chosen):
    """Tries the guards against the chosen faults; returns whether one of them is not tested."""
    check_replaced()
    untested = 0
    for fault, file, number in marks():
        if not chosen or fault in chosen:
            passes, words = survives(fault, file, number)
            untested += passes
            verdict = "STILL PASSES" if passes else "fails, as it must"
            print(f"{fault:>2}  {verdict:18} {file}:{number}  ({words})", flush=True)
    print(f"{untested} guards are not tested" if untested else "every guard is tested")
    return bool(untested)


if __name__ == "__main__":
    sys.exit(main(list(map(int, sys.argv[1:]))))
