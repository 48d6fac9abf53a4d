"""How cost grows with length, depth, width and batch, against the FLOP formula."""

import time
from statistics import median

import numpy as np
import torch

from emoformer.classifier import EmoformerConfig, TransformerForSequenceClassification
from emoformer.pretraining import training_flops
from tests.benchmarks.layers import in_own_process, peak
from tests.benchmarks.rivals import VOCAB_SIZE

STANDARD = {"seq_len": 64, "num_layers": 3, "d_model": 192, "batch": 32}
AXES = {
    "seq_len": [64, 128, 256, 512, 1024, 2048],
    "num_layers": [1, 2, 4, 8],
    "d_model": [64, 128, 256, 512],
    "batch": [1, 4, 16, 64],
}


def one_point(axis, value, rounds=5):
    """Time a training step in float32, and the memory it needs.

    Returns:
        Seconds (median), the operations by formula, and MiB.
    """
    setting = STANDARD | {axis: value}
    if axis == "seq_len":  # the same tokens in all: what grows is per token
        setting["batch"] = max(1, 4096 // value)
    d, seq_len, batch = setting["d_model"], setting["seq_len"], setting["batch"]
    torch.manual_seed(0)
    model = TransformerForSequenceClassification(EmoformerConfig(
        vocab_size=VOCAB_SIZE, num_labels=4, d_model=d, d_ff=4 * d, num_heads=4,
        num_layers=setting["num_layers"], max_len=seq_len, dropout=0.0,
    ))
    ids = torch.randint(5, VOCAB_SIZE, (batch, seq_len))
    before, seconds = peak(), []
    for turn in range(rounds + 1):
        start = time.perf_counter()
        model.zero_grad()
        model(ids).square().mean().backward()
        if turn:
            seconds.append(time.perf_counter() - start)
    flops = training_flops(model.config, batch * seq_len, seq_len=seq_len)
    return median(seconds), flops, peak() - before


def measure_growth():
    """Measure each axis alone, each point in a process of its own."""
    rows = []
    for axis, values in AXES.items():
        for value in values:
            seconds, flops, mib = in_own_process("one_point", axis, value)
            rows.append({
                "axis": axis, "value": value, "seconds": seconds, "flops": flops,
                "mib": mib,
            })
    return {"standard": STANDARD, "points": rows, "fit": fit_length(rows)}


def fit_length(rows):
    """Fit a step's time as a + b · seq_len, for the same number of tokens.

    Time per token that grows with the length is attention's: its share of
    the whole text is the quadratic term.

    Returns:
        The length at which attention's products cost as much as all else,
        measured, and by the formula: 4 · seq_len · d = 2 · 12 · d².
    """
    points = [row for row in rows if row["axis"] == "seq_len"]
    lengths = np.array([row["value"] for row in points], dtype=float)
    slope, constant = np.polyfit(lengths, [row["seconds"] for row in points], 1)
    return {
        "constant": constant, "slope": slope, "even_at": constant / slope,
        "even_at_by_formula": 6 * STANDARD["d_model"],
    }


def matrix_peak(size=2048, rounds=7):
    """The most operations a second that a matrix product reaches here."""
    found = {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
        seconds = []
        for _ in range(rounds):
            start = time.perf_counter()
            a @ b
            seconds.append(time.perf_counter() - start)
        found[name] = 2 * size**3 / min(seconds)
    return found


def share_of_peak(cells):
    """What share of the peak a training step reaches, by the formula.

    Args:
        cells: those of `time_encoders`.

    Returns:
        The peak of each dtype, and the best share over the cells.
    """
    peaks, best = matrix_peak(), {}
    for cell in cells:
        if cell["what"] != "forward+backward" or cell["padding"] != "bucketed":
            continue
        config = EmoformerConfig(vocab_size=VOCAB_SIZE, num_labels=4, d_model=192, num_heads=4,
                                 num_layers=3, d_ff=768, max_len=256)
        # Padding is computed, too.
        flops = training_flops(config, cell["batch"] * cell["seq_len"], seq_len=cell["seq_len"])
        share = flops / cell["ours"] / peaks[cell["dtype"]]
        if share > best.get(cell["dtype"], (0,))[0]:
            best[cell["dtype"]] = (share, cell["batch"], cell["seq_len"])
    return {"peak": peaks, "best_share": best}
