"""The encoder against the libraries': time, and the most memory needed."""

import json
import random
import re
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from statistics import median, quantiles

import torch
from tqdm import tqdm

from tests.benchmarks.rivals import RIVALS, make_input, make_rival

BATCHES, LENGTHS = (1, 32, 128), (16, 64, 256)
WHAT = ("forward", "forward+backward")
DTYPES = ("float32", "bfloat16")
ROUNDS = 21
PADDED = {"bucketed": 0.87, "unsorted": 0.15}


def make_step(name, what, dtype):
    """Prepare what is timed.

    Inference in bfloat16 has its weights in bfloat16: PyTorch's fast path
    fails under autocast. Training in bfloat16 is autocast, as in `train`.

    Returns:
        A function of ``(input_ids, attention_mask)``.
    """
    module, encode = make_rival(name)
    half = dtype == "bfloat16"
    if what == "forward":
        module.to(torch.bfloat16 if half else torch.float32)

        def step(ids, mask):
            with torch.inference_mode():
                encode(ids, mask)
    else:
        module.train()

        def step(ids, mask):
            module.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                hidden = encode(ids, mask)
            hidden.float()[mask].square().mean().backward()
    return step


def interleave(steps, rounds=ROUNDS):
    """Time functions in turn, so that a noisy moment hits all of them.

    Args:
        steps: a dict from name to a function without arguments.
        rounds: how often each is timed, after two rounds to warm up.

    Returns:
        A dict from name to a list of seconds, one a round.
    """
    order, chance = list(steps), random.Random(0)
    seconds = {name: [] for name in steps}
    for turn in range(rounds + 2):
        chance.shuffle(order)  # nobody always comes after the same one
        for name in order:
            start = time.perf_counter()
            steps[name]()
            if turn >= 2:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def compare(seconds):
    """Summarise: how many times as fast as the faster of the others are we?"""
    medians = {name: median(times) for name, times in seconds.items()}
    rival = min((name for name in medians if name != "ours"), key=medians.get)
    a_round = [b / a for a, b in zip(seconds["ours"], seconds[rival], strict=True)]
    low, _, high = quantiles(a_round, n=4)
    return {
        **medians, "faster_rival": rival, "ratio": medians[rival] / medians["ours"],
        "quartiles": [low, high], "rounds": len(a_round),
    }


def time_encoders(rounds=ROUNDS, batches=BATCHES, lengths=LENGTHS, padded=PADDED):
    """Time all three for every batch, length, work and dtype: a list of cells."""
    can = torch.cpu.get_capabilities()
    dtypes = DTYPES if can.get("avx512_bf16") or can.get("amx_bf16") else DTYPES[:1]
    cells = []
    settings = [
        (padding, what, dtype, batch, seq_len)
        for padding in padded for what in WHAT for dtype in dtypes
        for batch in batches for seq_len in lengths
        # What lies behind the second kind of padding shows at one size.
        if padding == "bucketed" or (batch > 1 and seq_len == 64)
    ]
    for padding, what, dtype, batch, seq_len in tqdm(settings, desc="encoders"):
        ids, mask = make_input(batch, seq_len, padded[padding])
        steps = {name: make_step(name, what, dtype) for name in RIVALS}
        seconds = interleave(
            {name: partial(step, ids, mask) for name, step in steps.items()}, rounds,
        )
        cells.append({
            "what": what, "dtype": dtype, "batch": batch, "seq_len": seq_len,
            "padding": padding, **compare(seconds),
            "peak_mib": None, "peak_mib_spread": None,  # see measure_memory
        })
    return cells


def memory_of(name, what, dtype, batch, seq_len):
    """The memory that three steps need beyond what was there, in MiB."""
    step = make_step(name, what, dtype)
    ids, mask = make_input(batch, seq_len)
    before = peak()
    for _ in range(3):
        step(ids, mask)
    return peak() - before


def peak():
    """The most memory this process has held, in MiB (Linux).

    Not `getrusage`'s: on Linux that starts from what the parent process held.
    """
    status = Path("/proc/self/status").read_text("utf-8")
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024


def measure_memory(cells, runs=3):
    """Put the peaks into the large float32 cells.

    Each is the median of processes of its own, which differ by 10 %.
    """
    large = [
        cell for cell in cells
        if cell["padding"] == "bucketed" and cell["dtype"] == "float32"
        and cell["batch"] > 1 and cell["seq_len"] > 16
    ]
    for cell in tqdm(large, desc="memory"):
        setting = [cell[key] for key in ("what", "dtype", "batch", "seq_len")]
        needed = {name: [] for name in RIVALS}
        for name in [*RIVALS] * runs:
            needed[name].append(in_own_process("memory_of", name, *setting))
        cell["peak_mib"] = {name: median(found) for name, found in needed.items()}
        cell["peak_mib_spread"] = {
            name: max(found) - min(found) for name, found in needed.items()
        }
    return cells


def in_own_process(function, *arguments):
    """Call a function of this module, or of `growth`, in a fresh process."""
    command = [sys.executable, "-m", "tests.benchmarks", function, json.dumps(arguments)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])
