"""Keep the numbers in the prose equal to results/: prose_numbers.py [--write].

A number that was measured is followed by a comment that names it, invisible
on the page: ``60.8<!--= scratch.macro_f1 -->``. Without --write the numbers
that differ are listed and the exit status is 1; with it they are rewritten.
"""

import json
import re
import statistics
import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[2]
MARK = re.compile(r"([+−-]?\d[\d,.]*)(\s*<!--= ([\w.-]+) -->)")
PERCENT = ("macro_f1", "accuracy", "validation_macro_f1")


def describe(name, row):
    """Name the numbers of one measured row: means, spreads, extremes."""
    named = {f"{name}.parameters": f"{row['parameters']:,}"}
    named[f"{name}.minutes"] = f"{statistics.mean(row['minutes']):.1f}"
    if "peak_mib" in row:
        named[f"{name}.peak_gib"] = f"{row['peak_mib'] / 1024:.1f}"
    for key in PERCENT:
        values = [100 * value for value in row[key]]
        named[f"{name}.{key}"] = f"{statistics.mean(values):.1f}"
        named[f"{name}.{key}.min"] = f"{min(values):.1f}"
        named[f"{name}.{key}.max"] = f"{max(values):.1f}"
        if len(values) > 1:
            named[f"{name}.{key}.spread"] = f"{statistics.stdev(values):.1f}"
    return named


def known_numbers(results=ROOT / "results"):
    """All numbers that prose may quote, as they are to be printed."""
    named = {}
    if (results / "scratch.json").exists():
        variants = json.loads((results / "scratch.json").read_text())
        base = statistics.mean(variants["scratch"]["macro_f1"])
        for name, row in variants.items():
            named |= describe(name, row)
            lost = 100 * (base - statistics.mean(row["macro_f1"]))
            named[f"{name}.lost"] = f"{lost:.1f}"
    if (results / "ladder.json").exists():
        for row in json.loads((results / "ladder.json").read_text()):
            named |= describe(row["rung"], row)
    return named


def compare(text, named):
    """Return the text with right numbers, and a line for each wrong one."""
    wrong = []

    def correct(match):
        literal, comment, name = match.groups()
        if name not in named:
            wrong.append(f"no number is called {name}")
            return match[0]
        if literal != named[name]:
            wrong.append(f"{name} is {named[name]}, but the text says {literal}")
        return named[name] + comment

    return MARK.sub(correct, text), wrong


def main(write):
    """Check, or write, every page and chapter."""
    named, faults = known_numbers(), []
    for path in [ROOT / "README.md", *sorted((ROOT / "book").glob("*.md"))]:
        text, wrong = compare(path.read_text(encoding="utf-8"), named)
        faults += [f"{path.name}: {line}" for line in wrong]
        if write and wrong:
            path.write_text(text, encoding="utf-8")
    for path in sorted((ROOT / "chapters").glob("[0-9]*.ipynb")):
        notebook, changed = nbformat.read(path, as_version=4), False
        for cell in notebook.cells:
            if cell.cell_type != "markdown":
                continue
            cell.source, wrong = compare(cell.source, named)
            faults += [f"{path.name}: {line}" for line in wrong]
            changed |= bool(wrong)
        if write and changed:
            path.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")
    return faults


if __name__ == "__main__":
    found = main("--write" in sys.argv)
    print(*found, f"{len(found)} numbers differed", sep="\n")
    sys.exit(bool(found) and "--write" not in sys.argv)
