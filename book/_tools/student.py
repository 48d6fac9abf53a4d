"""Write a copy of the book to be filled in: python book/_tools/student.py folder [chapter …].

Exported classes and functions keep signature and docstring and raise
NotImplementedError, solutions of exercises are gone, checks are in place, and the
package is made of that: what a reader has not written cannot be imported. Chapters
named by their number are left whole.
"""

import ast
import copy
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat

from emoformer.checks.bench import BATTERIES

ROOT = Path(__file__).resolve().parents[2]
SOLUTION = re.compile(
    r"<details>\s*<summary>Solution[^<]*</summary>.*?</details>\n*", re.DOTALL
)
MAKEFILE = """\
PYTHON ?= ../.venv/bin/python
export PYTHONPATH := $(CURDIR)

.PHONY: lab export check
lab:  ## open your notebooks
\t$(PYTHON) -m jupyter lab chapters

export:  ## write your package from your notebooks
\t$(PYTHON) book/_tools/export.py

check: export  ## check all that you have written (one: make check MODULE=attention)
\t@for module in emoformer/$(or $(MODULE),[a-z]*).py; do \\
\t\t$(PYTHON) -m emoformer.checks $$module || failed=1; done; exit $$failed
"""
README = """\
# Emoformer, to be filled in

Every class and function that the book exports is reduced to its signature and its
docstring. You write the rest, chapter by chapter:

1. `make lab`, and open the next chapter.
2. Where a cell says `raise NotImplementedError`, write the body. The text above it
   has all you need. Outputs under the cells are the book's: yours should match.
3. Run the cell `check(...)` below it. A hint names the likely mistake, never the
   solution.
4. `make export` puts what you wrote into `emoformer/`. Later chapters import it from
   there, and from nowhere else; restart a notebook that was open.

`make check` checks everything so far. The environment is the book's own (`../.venv`);
elsewhere: `make lab PYTHON=…`. The book itself, with its solutions, lies where this
copy was made.
"""
OWN_PACKAGE = """\
import sys

sys.path.insert(0, "..")  # this copy's emoformer, with what you have written
from emoformer.checks import check"""


def definitions(source):
    """List the functions and classes at the top of a cell."""
    kinds = (ast.FunctionDef, ast.ClassDef)
    return [node for node in ast.parse(source).body if isinstance(node, kinds)]


def reduce(source):
    """Cut the bodies of all functions and methods; keep docstrings.

    Args:
        source: the source of an exported cell.

    Returns:
        The source with ``raise NotImplementedError`` in place of each body.
    """
    cuts = []  # (first line, last line, indent) of each body, from 0
    lines = source.split("\n")

    def visit(node):
        if isinstance(node, ast.ClassDef):
            for child in node.body:
                visit(child)
        elif isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            first = body[0].lineno if body else node.body[0].end_lineno + 1
            if not body:
                cuts.append((first - 1, first - 1, node.body[0].col_offset))
                return
            # Comments above the first statement belong to the body too.
            above = node.body[0].end_lineno if body is not node.body else (
                node.body[0].lineno - 1)
            cuts.append((above, node.end_lineno, body[0].col_offset))

    for node in definitions(source):
        visit(node)
    for first, last, indent in reversed(cuts):
        lines[first:last] = [" " * indent + "raise NotImplementedError"]
    return "\n".join(lines)


def without_answer(cell):
    """Empty a solution's cell; the lines that check the answer stay."""
    checks = [line for line in cell.source.split("\n") if line.startswith("check(")]
    cell.source = "\n".join(["# your answer", *checks])
    cell.outputs, cell.execution_count = [], None
    cell.metadata.pop("tags", None)


def to_fill_in(notebook):
    """Turn a chapter into the form that a reader fills in.

    Args:
        notebook: a notebook; left as it is.

    Returns:
        A new one.
    """
    notebook = copy.deepcopy(notebook)
    cells, ready = [], False
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = SOLUTION.sub("", cell.source)
            cells.append(cell)
            continue
        if not ready:
            first = nbformat.v4.new_code_cell(OWN_PACKAGE, id="own-package")
            cells.append(first)
            ready = True
        if cell.id.startswith("solution"):
            without_answer(cell)
        cells.append(cell)
        if not cell.source.startswith("#| export") or not definitions(cell.source):
            continue
        names = [node.name for node in definitions(cell.source)]
        cell.source = reduce(cell.source)
        cell.outputs, cell.execution_count = [], None
        checks = [f"check({name})" for name in names if name in BATTERIES]
        if checks:
            cells.append(nbformat.v4.new_code_cell(
                "\n".join(checks), id=f"checked-{cell.id}"[:64]
            ))
    notebook.cells = cells
    return notebook


def copy_book(target, done=()):
    """Write the copy.

    Args:
        target: a folder that does not exist yet.
        done: numbers of chapters that stay whole, such as ``"01"``.

    Raises:
        FileExistsError: the folder exists.
        ValueError: there is no chapter with such a number.
    """
    target = Path(target).resolve()
    if target.exists():
        raise FileExistsError(
            f"{target} exists already, and may hold somebody's work: name another "
            "folder (make student STUDENT=…), or move that one away"
        )
    chapters = sorted((ROOT / "chapters").glob("[0-9]*.ipynb"))
    numbers = {path.name[:2] for path in chapters}
    if unknown := sorted(set(done) - numbers):
        raise ValueError(
            f"chapters must be among {', '.join(sorted(numbers))}, but there is "
            f"{', '.join(unknown)}"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    # All of it or nothing: a draft beside it takes its name at the end.
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        draft = Path(scratch) / target.name
        junk = shutil.ignore_patterns("__pycache__", "*.pyc", "models.tmp")
        for folder in ("emoformer/sample", "emoformer/checks", "book/_static", "results"):
            shutil.copytree(ROOT / folder, draft / folder, ignore=junk)
        for name in ("emoformer/__init__.py", "pyproject.toml", "book/_tools/export.py",
                     "tests/sanitize.cfg", "LICENSE", "LICENSE-text.md"):
            (draft / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, draft / name)
        (draft / "Makefile").write_text(MAKEFILE)
        (draft / "README.md").write_text(README)
        (draft / "chapters").mkdir()
        for path in chapters:
            notebook = nbformat.read(path, as_version=4)
            if path.name[:2] not in done:
                notebook = to_fill_in(notebook)
            (draft / "chapters" / path.name).write_text(
                nbformat.writes(notebook) + "\n", encoding="utf-8"
            )
        subprocess.run(
            [sys.executable, draft / "book" / "_tools" / "export.py"], cwd=draft,
            check=True,
        )
        draft.rename(target)


def main(arguments):
    """Write the copy, and say what to do next."""
    if not arguments:
        sys.exit(__doc__.splitlines()[0])
    try:
        copy_book(arguments[0], arguments[1:])
    except (FileExistsError, ValueError) as error:
        sys.exit(str(error))
    print(f"{arguments[0]} is ready: read its README.md, then make lab in there")


if __name__ == "__main__":
    main(sys.argv[1:])
