"""The committed package is what the chapters export, and nothing else."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BY_HAND = {"__init__.py", "__main__.py", "sample", "checks"}


def copy_tree(root, target):
    """Copy what the export reads and writes."""
    ignore = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "_*")
    shutil.copytree(root / "chapters", target / "chapters", ignore=ignore)
    keep = shutil.ignore_patterns("__pycache__")
    shutil.copytree(root / "emoformer", target / "emoformer", ignore=keep)
    (target / "book" / "_tools").mkdir(parents=True)
    shutil.copy(root / "book" / "_tools" / "export.py", target / "book" / "_tools")
    shutil.copy(root / "pyproject.toml", target)
    return target


def differences(root, scratch):
    """Export the chapters of a tree again and list what differs."""
    copy = copy_tree(root, scratch / "again")
    for path in (copy / "emoformer").iterdir():
        if path.name not in BY_HAND:
            path.unlink() if path.is_file() else shutil.rmtree(path)
    subprocess.run(
        [sys.executable, copy / "book" / "_tools" / "export.py"], check=True,
        cwd=copy,
    )
    found = []
    folders = (root / "emoformer", copy / "emoformer")
    names = {p.name for folder in folders for p in folder.iterdir()}
    for name in sorted(names - BY_HAND - {"__pycache__"}):
        ours, fresh = (folder / name for folder in folders)
        if not fresh.exists():
            found.append(f"emoformer/{name} is written by no chapter")
        elif not ours.exists():
            found.append(f"emoformer/{name} is missing")
        elif ours.read_bytes() != fresh.read_bytes():
            found.append(f"emoformer/{name} is not what its chapter exports")
    return found


def test_package_is_what_the_chapters_export(tmp_path):
    assert differences(ROOT, tmp_path) == [], "run: make export"


def test_each_module_says_where_it_comes_from():
    for path in (ROOT / "emoformer").glob("*.py"):
        if path.name not in BY_HAND:
            text = path.read_text("utf-8")
            origin = re.search(r"File to edit: \.\./(.*\.ipynb)", text)
            assert origin, path
            assert (ROOT / origin[1]).exists()


@pytest.fixture
def tree(tmp_path):
    """A copy of the tree, in step, to be spoilt."""
    tree = copy_tree(ROOT, tmp_path / "tree")
    subprocess.run(
        [sys.executable, tree / "book" / "_tools" / "export.py"], check=True,
        cwd=tree,
    )
    return tree


def test_notices_a_stale_module(tree, tmp_path):
    path = tree / "chapters" / "05_feedforward.ipynb"
    notebook = json.loads(path.read_text("utf-8"))
    cell = next(c for c in notebook["cells"] if c["id"] == "relu")
    cell["source"] = "".join(cell["source"]).replace("min=0", "min=1")
    path.write_text(json.dumps(notebook), "utf-8")
    assert "emoformer/feedforward.py is not what its chapter exports" in (
        differences(tree, tmp_path))


def test_notices_an_edit_by_hand(tree, tmp_path):
    path = tree / "emoformer" / "feedforward.py"
    path.write_text(path.read_text("utf-8") + "\n# quick fix\n", "utf-8")
    assert "emoformer/feedforward.py is not what its chapter exports" in (
        differences(tree, tmp_path))


def test_notices_an_orphan(tree, tmp_path):
    (tree / "emoformer" / "helpers.py").write_text("x = 1\n", "utf-8")
    assert "emoformer/helpers.py is written by no chapter" in (
        differences(tree, tmp_path))
