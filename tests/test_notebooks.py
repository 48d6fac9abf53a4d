"""What every chapter owes its reader, read from the saved notebooks."""

import copy
import json
import re
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
CHAPTERS = sorted((ROOT / "chapters").glob("[0-9]*.ipynb"))
METADATA = {
    "kernelspec": {
        "display_name": "Python 3", "language": "python", "name": "python3",
    },
    "language_info": {"name": "python", "pygments_lexer": "ipython3"},
}
CELL_METADATA = {"tags", "mystnb", "jupyter"}
UNCOMPARED = {"nbval-ignore-output", "nbval-skip", "raises-exception"}
MACHINE_PATH = re.compile(
    r"/work/|/tmp/|/home/\w|/root/|/Users/\w|site-packages|\b[A-Z]:\\\w"
)
# "Vaswani et al. (2017)", "Kingma and Ba (2015)", "Ba, Kiros and Hinton (2016)"
CITATION = re.compile(
    r"([A-Z][\w’'-]+)"
    r"(?:,? (?:et al\.|(?:[A-Z][\w’'-]+,? )*and [A-Z][\w’'-]+))? \((\d{4})\)"
)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def prose(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "markdown"]


def tags(cell):
    return set(cell.metadata.get("tags", []))


def texts(output):
    """All text that an output shows."""
    if output.output_type == "stream":
        return [output.text]
    data = output.get("data", {})
    return [str(value) for kind, value in data.items() if kind.startswith("text/")]


def executed_in_order(notebook):
    counts = [cell.execution_count for cell in code(notebook)]
    if counts != list(range(1, len(counts) + 1)):
        yield f"cells must be run in order, from a clean kernel: {counts}"


def clean_metadata(notebook):
    if notebook.metadata != METADATA:
        yield f"metadata of the notebook: {dict(notebook.metadata)}"
    for cell in notebook.cells:
        if extra := set(cell.metadata) - CELL_METADATA:
            yield f"{cell.id}: metadata {extra}"
        for output in cell.get("outputs", []):
            if output.get("metadata"):
                yield f"{cell.id}: metadata of an output"


def no_errors(notebook):
    for cell in code(notebook):
        for output in cell.outputs:
            if output.output_type == "error":
                yield f"{cell.id}: a traceback"
            if output.get("name") == "stderr":
                yield f"{cell.id}: stderr: {output.text[:80]}"


def alt_texts(notebook):
    for cell in code(notebook):
        figure = any(
            kind.startswith("image/")
            for output in cell.outputs for kind in output.get("data", {})
        )
        alt = cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "")
        if figure and len(alt) < 40:
            yield f"{cell.id}: a figure that says too little: {alt!r}"
    for cell in prose(notebook):
        for alt, path in re.findall(r"!\[(.*?)\]\((.*?)\)", cell.source, re.S):
            if len(alt) < 40:
                yield f"{cell.id}: a picture that says too little: {alt!r}"
            if not (ROOT / "chapters" / path).is_file():
                yield f"{cell.id}: no picture at {path}"


def mostly_compared(notebook):
    cells = code(notebook)
    free = [
        cell.id for cell in cells
        if tags(cell) & UNCOMPARED or "NBVAL_" in cell.source
    ]
    if len(free) > 0.25 * len(cells):
        yield f"{len(free)} of {len(cells)} cells are not compared: {free}"


def anatomy(notebook):
    first, last = notebook.cells[0], notebook.cells[-1]
    if not re.match(r"# [^\n]+\n\n> [^\n]+\.\n\n", first.source):
        yield "must begin '# Title', '> One summary line.', promise"
    for words in ("**You will be able to**", "**You need**", "**Time**"):
        if words not in first.source:
            yield f"the first cell lacks {words}"
    recall = [c.source for c in prose(notebook) if "## Before you start" in c.source]
    if not recall or "<details>" not in recall[0] or "\n2. " not in recall[0]:
        yield "needs '## Before you start': two questions, answers folded"
    if "## Sources" not in last.source:
        yield "must end with its sources"


def exercises(notebook):
    whole = "\n".join(cell.source for cell in prose(notebook))
    part = whole.partition("## Exercises")[2].partition("## Sources")[0]
    heads = re.findall(r"^\*\*\d+\. .*?\*\* \((.*?)\)", part, re.M | re.S)
    primer = whole.startswith("# Primer")
    if not (4 if primer else 6) <= len(heads) <= 10:
        yield f"needs 6 to 10 exercises (a primer 4), has {len(heads)}"
    for head in heads:
        if not re.search(
                r"(\d+ minutes?|an hour|an afternoon),\s+(easy|medium|hard)", head):
            yield f"an exercise says minutes and difficulty, not {head!r}"
    solved = part.count("<summary>Solution</summary>") + sum(
        "hide-cell" in tags(cell) for cell in code(notebook)
    )
    if solved < len(heads):
        yield f"{len(heads)} exercises, but {solved} solutions"


def no_machine_paths(notebook):
    for cell in notebook.cells:
        shown = [text for o in cell.get("outputs", []) for text in texts(o)]
        for text in [cell.source, *shown]:
            if found := MACHINE_PATH.search(text):
                yield f"{cell.id}: a path of one machine, {found[0]!r}"


def folds_are_closed(notebook):
    for cell in prose(notebook):
        if cell.source.count("<details>") != cell.source.count("</details>"):
            yield f"{cell.id}: <details> and </details> do not match"
        if re.search(r"</summary>\n(?!\n)|(?<!\n)\n</details>", cell.source):
            yield f"{cell.id}: <details> needs empty lines inside"


def cited_works_are_listed(notebook):
    works = (ROOT / "book" / "bibliography.md").read_text("utf-8")
    entries = [" ".join(e.split()) for e in re.split(r"\n- ", works)]
    for cell in notebook.cells:
        for name, year in CITATION.findall(" ".join(cell.source.split())):
            # the entry's first author may be more than one word: Van Hee
            if not any(f"({year})" in e and e.split(",")[0].endswith(name)
                       for e in entries):
                yield f"{cell.id}: {name} ({year}) is not in the bibliography"


CHECKS = (
    executed_in_order, clean_metadata, no_errors, alt_texts, mostly_compared,
    anatomy, exercises, no_machine_paths, folds_are_closed,
    cited_works_are_listed,
)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_chapter(path, check):
    assert list(check(nbformat.read(path, as_version=4))) == []


def wrong_costs(text, cost):
    """Compare the head's promise of time and memory with what was measured."""
    text = " ".join(text.split()).replace("half a minute", "30 seconds")
    time = re.search(r"about (\d+) (second|minute)s?", text)
    memory = re.search(r"at most ([\d.]+) GB", text)
    if not time or not memory:
        return ["the head must say 'about N seconds' and 'at most X GB'"]
    seconds = int(time[1]) * (60 if time[2] == "minute" else 1)
    wrong = []
    if not seconds / 3 <= cost["seconds"] <= seconds * 3:
        wrong.append(f"says {seconds} s, measured {cost['seconds']} s")
    if float(memory[1]) * 1024 < cost["peak_mib"]:
        wrong.append(f"says {memory[1]} GB, measured {cost['peak_mib']} MiB")
    return wrong


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_head_promises_what_was_measured(path):
    costs = json.loads((ROOT / "results" / "chapters.json").read_text("utf-8"))
    head = nbformat.read(path, as_version=4).cells[0].source
    assert wrong_costs(head, costs[path.stem]) == []


def test_notices_a_wrong_promise():
    head = "The cells run in about 6\nseconds and need at most 0.5 GB"
    assert wrong_costs(head, {"seconds": 5.0, "peak_mib": 400}) == []
    assert len(wrong_costs(head, {"seconds": 50.0, "peak_mib": 700})) == 2
    assert len(wrong_costs("fast", {"seconds": 5.0, "peak_mib": 400})) == 1


def spoil_order(notebook):
    code(notebook)[2].execution_count = 99


def spoil_metadata(notebook):
    notebook.cells[1].metadata["collapsed"] = True


def spoil_with_warning(notebook):
    code(notebook)[0].outputs = [
        nbformat.v4.new_output("stream", name="stderr", text="Warning: old")]


def spoil_alt(notebook):
    for cell in code(notebook):
        cell.metadata.pop("mystnb", None)


def spoil_picture(notebook):
    notebook.cells[0].source += f"\n\n![{'long enough ' * 5}](nowhere.svg)"


def spoil_comparison(notebook):
    for cell in code(notebook)[::3]:
        cell.metadata["tags"] = ["nbval-ignore-output"]


def spoil_title(notebook):
    notebook.cells[0].source = "# Title without a promise"


def spoil_recall(notebook):
    notebook.cells.pop(1)


def spoil_sources(notebook):
    notebook.cells.pop()


def spoil_exercises(notebook):
    for cell in prose(notebook):
        cell.source = re.sub(r"^\*\*4\. ", "**", cell.source, flags=re.M)
    for cell in prose(notebook):
        cell.source = re.sub(r"^\*\*[1-3]\. ", "**", cell.source, flags=re.M)


def spoil_path(notebook):
    code(notebook)[0].outputs = [
        nbformat.v4.new_output("stream", name="stdout", text="/home/me/x.pt")]


def spoil_fold(notebook):
    notebook.cells[1].source += "\n<details><summary>More</summary>\nx"


def spoil_citation(notebook):
    notebook.cells[-1].source += "\n- Nobody et al. (1899), *Nothing*."


@pytest.mark.parametrize(("check", "spoil"), [
    (executed_in_order, spoil_order), (clean_metadata, spoil_metadata),
    (no_errors, spoil_with_warning), (alt_texts, spoil_alt),
    (alt_texts, spoil_picture), (mostly_compared, spoil_comparison),
    (anatomy, spoil_title), (anatomy, spoil_recall), (anatomy, spoil_sources),
    (exercises, spoil_exercises), (no_machine_paths, spoil_path),
    (folds_are_closed, spoil_fold), (cited_works_are_listed, spoil_citation),
], ids=lambda f: f.__name__)
def test_check_notices(check, spoil):
    notebook = nbformat.read(
        ROOT / "chapters" / "05_feedforward.ipynb", as_version=4)
    assert list(check(notebook)) == []
    spoilt = copy.deepcopy(notebook)
    spoil(spoilt)
    assert list(check(spoilt)) != []
