"""Write the package from the chapters: python book/_tools/export.py [folder]."""

import sys
from pathlib import Path

from nbdev.export import nb_export

ROOT = Path(__file__).resolve().parents[2]


def export(package=ROOT / "emoformer"):
    """Export every chapter that names a module into the package folder."""
    for chapter in sorted((ROOT / "chapters").glob("[0-9]*.ipynb")):
        nb_export(chapter, lib_path=package)


if __name__ == "__main__":
    export(*map(Path, sys.argv[1:]))
