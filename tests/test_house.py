"""
The house: who may import whom, and what keeps the files readable. The table of lib/README.md is the rule; this reads the imports.
"""

import ast
import re
import tokenize

import pytest
from conftest import ROOT
from lib.families import FAMILIES

FILES = [*ROOT.glob("*.py"), *(path for path in ROOT.glob("lib/*.py") if path.name != "__init__.py")]
TREES = {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text()) for path in FILES}
NAMES = {name.removesuffix(".py").replace("/", "."): name for name in TREES}             # "lib.files" -> "lib/files.py"
OPTIONAL = {"safetensors", "tokenizers", "jinja2", "matplotlib", "pycocoevalcap", "transformers", "gguf", "triton"}


def imported(node):
    """The modules of this project that an import statement names, and the packages of others."""
    if isinstance(node, ast.Import):
        found = [alias.name for alias in node.names]
    else:
        found = [f"{node.module}.{alias.name}" if f"{node.module}.{alias.name}" in NAMES else node.module for alias in node.names]
    return {name for name in found if name in NAMES}, {name.split(".")[0] for name in found if name not in NAMES}


def imports(tree):
    """[(statement, modules of ours, packages of others)] wherever in the file they stand."""
    return [(node, *imported(node)) for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]


def arrows(file):
    """The files of ours that a file imports."""
    return {NAMES[name] for _, names, _ in imports(TREES[file]) for name in names}


ROWS = [[re.findall(r"`([\w/]+\.py)`", cell) for cell in row] for row in         # ([files], [what they may import])
        re.findall(r"^\| (`[^|]+`) \| [^|]+ \|([^|]*)\|$", (ROOT / "lib" / "README.md").read_text(), re.M)]


def test_every_file_is_in_the_readmes_table():
    assert sorted(file for files, _ in ROWS for file in files) == sorted(TREES)


@pytest.mark.parametrize("files, may", ROWS, ids=[", ".join(files) for files, _ in ROWS])
def test_arrows(files, may):
    """The files of a row import what it names, and all of that."""
    assert set.union(*map(arrows, files)) == set(may)


def test_no_circle():
    settled = set()
    while free := {file for file in TREES if file not in settled and arrows(file) <= settled}:
        settled |= free
    assert settled == set(TREES), f"a circle among {set(TREES) - settled}"


@pytest.mark.parametrize("file", sorted(TREES))
def test_imports_stand_at_the_top(file):
    """Inside a function only optional packages are imported, and what would make --help wait for torch."""
    inside = [statement for function in ast.walk(TREES[file]) if isinstance(function, ast.FunctionDef)
              for statement in ast.walk(function) if isinstance(statement, (ast.Import, ast.ImportFrom))]
    for statement in inside:
        ours, others = imported(statement)
        assert not ours and others <= OPTIONAL | {"torch"}, f"{file}:{statement.lineno}"


@pytest.mark.parametrize("file", sorted(TREES))
def test_lines_are_short(file):
    """No line passes 110 characters, but for strings: messages and help."""
    with tokenize.open(ROOT / file) as source:
        quoted = {line for token in tokenize.generate_tokens(source.readline) if token.type in (tokenize.STRING, FSTRING)
                  for line in range(token.start[0], token.end[0] + 1)}
    lines = (ROOT / file).read_text().splitlines()
    long = [number for number, line in enumerate(lines, 1) if len(line) > 110 and number not in quoted]
    assert not long, f"{file}: lines {long}"


FSTRING = getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)


@pytest.mark.parametrize("file", sorted(TREES))
def test_functions_fit_a_screen(file):
    functions = [node for node in ast.walk(TREES[file]) if isinstance(node, ast.FunctionDef)]
    long = [f"{node.name} {node.end_lineno - node.lineno + 1}" for node in functions if node.end_lineno - node.lineno >= 60]
    assert not long, f"{file}: {long}"


@pytest.mark.parametrize("file", sorted(TREES))
def test_public_functions_have_docstrings(file):
    bare = [node.name for node in TREES[file].body if isinstance(node, (ast.FunctionDef, ast.ClassDef))
            and not node.name.startswith("_") and not ast.get_docstring(node)]
    assert not bare, f"{file}: {bare}"


def test_statements_are_simple():
    """At most 16 nodes of the syntax tree a statement (nanoGPT: 12.7)."""
    kinds = ast.Assign, ast.AugAssign, ast.AnnAssign, ast.Return, ast.Expr, ast.Assert, ast.Raise
    statements = [node for tree in TREES.values() for node in ast.walk(tree) if isinstance(node, kinds)]
    statements = [node for node in statements if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))]
    nodes = sum(1 for statement in statements for _ in ast.walk(statement))
    assert nodes / len(statements) <= 16


def test_files_of_a_screenful():
    lines = {file: (ROOT / file).read_text().count("\n") for file in ("train.py", "model.py")}
    assert lines["train.py"] <= 420 and lines["model.py"] <= 520


def test_model_knows_nothing_of_methods_and_quantization():
    names = {node.id for node in ast.walk(TREES["model.py"]) if isinstance(node, ast.Name)}
    assert not {"lora", "LoRA", "adapter", "prefix", "quantize", "QuantLinear"} & names


def test_model_names_no_family():
    names = {word for name in FAMILIES for word in re.split(r"[_\d]+", name) if word not in ("", "text", "gpt")} | {"gpt-?2", "pythia", "bert"}
    found = re.findall(rf"\b(?:{'|'.join(sorted(names))})\w*", (ROOT / "model.py").read_text(), re.I)
    assert not [word for word in found if word.lower() not in ("optimizer", "option", "options", "optional")]
