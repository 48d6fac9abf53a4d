"""Keep the numbers in the prose equal to results/: prose_numbers.py [--write].

A number that was measured is followed by a comment that names it, invisible
on the page: ``60.8<!--= scratch.macro_f1 -->``. Without --write the numbers
that differ are listed and the exit status is 1; with it they are rewritten.
"""

import json
import math
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


def describe_finetuning(parts):
    """Name means: few.<model>.<tweets>, choices.<setting>, and what is forgotten, distilled."""
    named, few = {}, parts.get("few", {"counts": []})
    for place, count in enumerate(few["counts"]):
        for model in ("scratch", "pretrained"):
            f1 = statistics.mean(few[model][place])
            named[f"few.{model}.{count}"] = f"{100 * f1:.1f}"
    for row in parts.get("choices", []):
        f1 = statistics.mean(row["validation_macro_f1"])
        named["choices." + row["name"].replace(" ", "-")] = f"{100 * f1:.1f}"
    for row in parts.get("forgetting", []):
        named["forgetting.before"] = f"{row['words_before']:.2f}"
        words = statistics.mean(row["words_after"])
        named["forgetting." + row["name"].replace(" ", "-")] = f"{words:.2f}"
    for row in parts.get("distilled_choices", []):
        name = row["name"].replace(",", "").replace(" ", "-")
        named[f"distilled-choices.{name}"] = f"{100 * row['macro_f1']:.1f}"
        named["distilled-choices.held"] = f"{row['held']:,}"
    if row := parts.get("distilled"):
        last = statistics.mean(losses[-1] for losses in row["train_losses"])
        named |= {
            "distilled.texts": f"{row['texts']:,}", "distilled.epochs": str(row["epochs"]),
            "distilled.loss": f"{last:.2f}", "distilled.doubt": f"{row['doubt']:.2f}",
        }
    return named


def describe_speed(parts):
    """Name speed.training-<precision> and speed.inference: times as fast."""
    named = {"speed.inference": f"{parts['inference']['ratio']:.1f}"}
    for row in parts["training"]:
        name = "bfloat16" if row["precision"] == "bf16" else "float32"
        named[f"speed.training-{name}"] = f"{row['ratio']:.1f}"
    return named


def describe_pretraining(parts):
    """Name pretraining.<what> of the full run, ablation-<start>.<what> of the race."""
    named = {}
    if main := parts.get("main"):
        history, vocabulary = main["history"], main["model"]["vocab_size"]
        named = {
            "minutes": f"{main['minutes']:.0f}",
            "tokens_per_second": f"{round(main['tokens_per_second'], -2):,.0f}",
            "tokens_millions": f"{main['tokens'] / 1e6:.1f}",
            "texts": f"{sum(main['pieces'].values()):,}",
            "parameters": f"{main['parameters']:,}",
            "peak_gib": f"{main['peak_mib'] / 1024:.1f}",
            "operations": f"{main['flops'] / 1e12:,.0f}",  # times 10 to the 12
            "epochs": str(main["config"]["epochs"]),
            "steps": f"{history[-1]['step']:,}",
            "vocab_size": f"{vocabulary:,}",
            "nothing": f"{math.log(vocabulary):.2f}",
        }
        for loss in ("words", "labels"):
            last = statistics.mean(row[loss] for row in history[-5:])
            named[f"{loss}.first"] = f"{history[0][loss]:.2f}"
            named[f"{loss}.last"] = f"{last:.2f}"
            named[f"{loss}.perplexity"] = f"{math.exp(last):.0f}"
        named = {f"pretraining.{name}": value for name, value in named.items()}
    if not (race := parts.get("ablation")):
        return named
    named["ablation.steps"] = f"{race['steps']:,}"
    for start, row in race["variants"].items():
        for key in PERCENT:
            values = [100 * value for value in row[key]]
            named[f"ablation-{start}.{key}"] = f"{statistics.mean(values):.1f}"
            named[f"ablation-{start}.{key}.spread"] = f"{statistics.stdev(values):.1f}"
        base = statistics.mean(race["variants"]["none"]["macro_f1"])
        gain = 100 * (statistics.mean(row["macro_f1"]) - base)
        named[f"ablation-{start}.gain"] = f"{gain:.1f}"
        named[f"ablation-{start}.minutes"] = f"{race['minutes'][start]:.1f}"
        named[f"ablation-{start}.seeds"] = str(len(row["seeds"]))
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
            task = "" if row["task"] == "emotion" else row["task"] + "."
            named |= describe(task + row["rung"], row)
        if "distilled.macro_f1" in named:
            own, pupil, teacher = (
                float(named[f"{rung}.macro_f1"]) for rung in ("pretrained", "distilled", "minilm")
            )
            named["distilled.kept"] = f"{100 * (pupil - own) / (teacher - own):.0f}"
    if (results / "board.json").exists():
        board = json.loads((results / "board.json").read_text())["emotion"]
        named |= {f"board.{system}": f"{f1:.1f}" for system, f1 in board.items()}
    if (results / "finetuning.json").exists():
        parts = json.loads((results / "finetuning.json").read_text())
        named |= describe_finetuning(parts)
    if (results / "pretraining.json").exists():
        parts = json.loads((results / "pretraining.json").read_text())
        named |= describe_pretraining(parts)
    if (results / "costs.json").exists():
        named |= describe_speed(json.loads((results / "costs.json").read_text()))
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
