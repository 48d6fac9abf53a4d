"""The copy that readers fill in: nothing of the solutions in it, and all passes with them."""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

import student

ROOT = Path(__file__).resolve().parents[1]
CHAPTERS = sorted((ROOT / "chapters").glob("[0-9]*.ipynb"))
NUMBERS = [path.name[:2] for path in CHAPTERS]


def read(path):
    return nbformat.read(path, as_version=4)


def run(copy, *command, folder="chapters"):
    """Run Python in a copy, without anything that points to the book."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    if folder == ".":
        environment["PYTHONPATH"] = str(copy)
    return subprocess.run(
        [sys.executable, *command], cwd=copy / folder, capture_output=True, text=True,
        env=environment,
    )


def fill_in(copy, numbers):
    """Put the book's own code back where a reader would write."""
    for path in CHAPTERS:
        if path.name[:2] not in numbers:
            continue
        ours = {cell.id: cell for cell in read(path).cells}
        notebook = read(copy / "chapters" / path.name)
        for cell in notebook.cells:
            if cell.cell_type == "code" and cell.id in ours:
                cell.source = ours[cell.id].source
                cell.outputs = ours[cell.id].outputs
                cell.execution_count = ours[cell.id].execution_count
        nbformat.write(notebook, copy / "chapters" / path.name)
    done = run(copy, "book/_tools/export.py", folder=".")
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def empty(tmp_path_factory):
    target = tmp_path_factory.mktemp("student") / "copy"
    student.copy_book(target)
    return target


@pytest.fixture(scope="module")
def filled(empty, tmp_path_factory):
    target = tmp_path_factory.mktemp("filled") / "copy"
    shutil.copytree(empty, target)
    fill_in(target, NUMBERS)
    return target


def bodies(tree):
    """What is left of every function, docstrings aside."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            has_doc = ast.get_docstring(node) is not None
            yield node.name, ast.unparse(node.body[has_doc:])


def test_no_solution_is_left(empty):
    checked = 0
    for path in CHAPTERS:
        for cell in read(empty / "chapters" / path.name).cells:
            if cell.cell_type == "markdown":
                assert "<summary>Solution" not in cell.source
            elif cell.id.startswith("solution"):
                lines = cell.source.split("\n")
                assert lines[0] == "# your answer"
                assert all(line.startswith("check(") for line in lines[1:])
                assert not cell.outputs
            elif cell.source.startswith("#| export"):
                for name, body in bodies(ast.parse(cell.source)):
                    assert body == "raise NotImplementedError", name
                    checked += 1
    assert checked > 100
    for path in (empty / "emoformer").glob("*.py"):
        for name, body in bodies(ast.parse(path.read_text("utf-8"))):
            assert body == "raise NotImplementedError", f"{path.name}: {name}"


def test_signatures_docstrings_and_fields_stay(empty):
    for path in (ROOT / "emoformer").glob("*.py"):
        ours = ast.parse(path.read_text("utf-8"))
        theirs = ast.parse((empty / "emoformer" / path.name).read_text("utf-8"))
        for mine, other in zip(ours.body, theirs.body, strict=True):
            assert type(mine) is type(other)
            if isinstance(mine, ast.ClassDef):
                assert ast.get_docstring(mine) == ast.get_docstring(other)
                fields = [ast.unparse(n) for n in mine.body if isinstance(n, ast.AnnAssign)]
                assert fields == [
                    ast.unparse(n) for n in other.body if isinstance(n, ast.AnnAssign)]
            functions = [
                (n.name, ast.unparse(n.args), ast.get_docstring(n))
                for n in ast.walk(mine) if isinstance(n, ast.FunctionDef)
            ]
            stubs = [
                (n.name, ast.unparse(n.args), ast.get_docstring(n))
                for n in ast.walk(other) if isinstance(n, ast.FunctionDef)
            ]
            # Functions inside functions are part of the body.
            assert [f for f in functions if f in stubs] == stubs


def test_the_copy_imports_itself_and_not_the_book(empty):
    code = (
        "import sys; sys.path.insert(0, '..')\n"
        "import emoformer, emoformer.attention as a\n"
        "print(emoformer.__path__[0])\n"
        "try:\n    a.masked_softmax(None)\n"
        "except NotImplementedError: print('not yet')"
    )
    done = run(empty, "-c", code)
    first, second = done.stdout.split("\n")[:2]
    assert Path(first).resolve() == (empty / "emoformer").resolve()
    assert second == "not yet"
    for path in CHAPTERS:
        cells = [c for c in read(empty / "chapters" / path.name).cells
                 if c.cell_type == "code"]
        assert cells[0].source == student.OWN_PACKAGE


def test_every_exported_function_with_a_check_is_followed_by_it(empty):
    from emoformer.checks.bench import BATTERIES

    for path in CHAPTERS:
        cells = read(empty / "chapters" / path.name).cells
        for cell, after in zip(cells, [*cells[1:], None], strict=True):
            if cell.cell_type != "code" or not cell.source.startswith("#| export"):
                continue
            names = [n.name for n in student.definitions(cell.source)]
            wanted = [f"check({n})" for n in names if n in BATTERIES]
            if wanted:
                assert after.source.split("\n") == wanted


def test_an_empty_chapter_fails_its_checks(empty):
    done = run(empty, "-m", "emoformer.checks", "emoformer/attention.py", folder=".")
    assert done.returncode == 1
    assert done.stdout.count("not written yet") == 4
    assert "Traceback" not in done.stdout + done.stderr


def test_filled_in_it_is_the_book(filled):
    for path in (ROOT / "emoformer").glob("*.py"):
        ours, theirs = path.read_text("utf-8"), filled / "emoformer" / path.name
        assert theirs.read_text("utf-8") == ours, path.name


@pytest.mark.parametrize("module", [
    "data", "tokens", "embedding", "attention", "feedforward", "encoder", "classifier",
    "training", "evaluation", "pretraining", "finetuning"])
def test_filled_in_all_checks_pass(filled, module):
    done = run(filled, "-m", "emoformer.checks", f"emoformer/{module}.py", folder=".")
    assert done.returncode == 0, done.stdout + done.stderr


def test_filled_in_the_notebooks_pass(filled):
    """Two of them here; their cells are the book's, which nbval runs."""
    done = run(
        filled, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--nbval",
        "--nbval-current-env", "--nbval-sanitize-with", "../tests/sanitize.cfg",
        "--nbval-cell-timeout", "300", "04_attention.ipynb", "05_feedforward.ipynb",
    )
    # The inserted cells have no saved output: nbval has nothing to compare there.
    assert done.returncode == 0, done.stdout[-3000:]


def test_a_strangers_path_through_attention(tmp_path):
    """From empty class to all checks green to a model trained with it."""
    copy = tmp_path / "mine"
    student.copy_book(copy, [n for n in NUMBERS if n != "04"])
    train = (
        "import sys; sys.path.insert(0, '..')\n"
        "import inspect, tempfile\n"
        "from emoformer.data import load_sample\n"
        "from emoformer.training import TrainingConfig, train_from_scratch\n"
        "data = load_sample()\n"
        "data['train'] = data['train'].select(range(128))\n"
        "model, _, history = train_from_scratch(\n"
        "    data, tempfile.mkdtemp(), TrainingConfig(epochs=2, precision='no'),\n"
        "    vocab_size=500, tracker=None, d_model=32)\n"
        "print(inspect.getfile(type(model.encoder.layers[0].attention)))\n"
        "print(history[1]['train_loss'] < history[0]['train_loss'])"
    )
    done = run(copy, "-c", train)
    assert done.returncode != 0 and "NotImplementedError" in done.stderr
    fill_in(copy, ["04"])
    done = run(copy, "-m", "emoformer.checks", "emoformer/attention.py", folder=".")
    assert done.returncode == 0 and "4 checked, 0 failed" in done.stdout
    done = run(copy, "-c", train)
    assert done.returncode == 0, done.stderr[-2000:]
    path, learned = done.stdout.split("\n")[:2]
    assert Path(path).resolve() == (copy / "emoformer" / "attention.py").resolve()
    assert learned == "True"


def test_somebodys_work_is_never_overwritten(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "work.txt").write_text("hours")
    with pytest.raises(FileExistsError, match="exists already"):
        student.copy_book(tmp_path / "mine")
    assert (tmp_path / "mine" / "work.txt").read_text() == "hours"


def test_unknown_chapters_are_refused(tmp_path):
    with pytest.raises(ValueError, match="there is 77"):
        student.copy_book(tmp_path / "mine", ["04", "77"])
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_half_written(tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise OSError("disk full")

    monkeypatch.setattr(student.subprocess, "run", fail)
    with pytest.raises(OSError, match="disk full"):
        student.copy_book(tmp_path / "mine")
    assert list(tmp_path.iterdir()) == []


def test_reducing_keeps_decorators_and_drops_comments_of_the_body():
    source = (
        "#| export\n@torch.no_grad()\ndef f(x):\n    \"\"\"Doc.\"\"\"\n"
        "    # how it is done\n    y = x + 1\n\n    def g():\n        return y\n\n"
        "    return g()\n\n\nLIMIT = 3\n\n\nclass A:\n    \"\"\"Doc.\"\"\"\n\n"
        "    size: int = 2\n\n    def __init__(self):\n        self.x = 1\n\n"
        "    def h(self):\n        \"\"\"Only a doc.\"\"\"\n"
    )
    wanted = (
        "#| export\n@torch.no_grad()\ndef f(x):\n    \"\"\"Doc.\"\"\"\n"
        "    raise NotImplementedError\n\n\nLIMIT = 3\n\n\nclass A:\n    \"\"\"Doc.\"\"\"\n\n"
        "    size: int = 2\n\n    def __init__(self):\n        raise NotImplementedError\n\n"
        "    def h(self):\n        \"\"\"Only a doc.\"\"\"\n        raise NotImplementedError\n"
    )
    assert student.reduce(source) == wanted


def test_notebooks_are_valid(empty):
    for path in sorted((empty / "chapters").glob("*.ipynb")):
        nbformat.validate(read(path))
        ids = [cell.id for cell in read(path).cells]
        assert len(ids) == len(set(ids))
        json.loads(path.read_text("utf-8"))
