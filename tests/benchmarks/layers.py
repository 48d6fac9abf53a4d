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
WORK = ("forward", "forward + backward")
PRECISIONS = ("float32", "bfloat16")
ROUNDS = 21
PADDED = {"bucketed": 0.87, "unsorted": 0.15}


def make_step(name, work, precision):
    """Prepare what is timed.

    Inference in bfloat16 has its weights in bfloat16: PyTorch's fast path
    fails under autocast. Training in bfloat16 is autocast, as in `train`.

    Returns:
        A function of ``(input_ids, attention_mask)``.
    """
    module, encode = make_rival(name)
    half = precision == "bfloat16"
    if work == "forward":
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
        "milliseconds": {name: 1000 * value for name, value in medians.items()},
        "faster_rival": rival, "ratio": medians[rival] / medians["ours"],
        "quartiles": [low, high], "rounds": len(a_round),
    }


def time_encoders(rounds=ROUNDS, batches=BATCHES, lengths=LENGTHS, padded=PADDED):
    """Time all three for every batch, length, work and precision."""
    can = torch.cpu.get_capabilities()
    precisions = PRECISIONS if can.get("avx512_bf16") or can.get("amx_bf16") else PRECISIONS[:1]
    rows = []
    settings = [
        (padding, work, precision, batch, seq_len)
        for padding in padded for work in WORK for precision in precisions
        for batch in batches for seq_len in lengths
        # What lies behind the second kind of padding shows at one size.
        if padding == "bucketed" or (batch > 1 and seq_len == 64)
    ]
    for padding, work, precision, batch, seq_len in tqdm(settings, desc="encoders"):
        ids, mask = make_input(batch, seq_len, padded[padding])
        steps = {name: make_step(name, work, precision) for name in RIVALS}
        seconds = interleave(
            {name: partial(step, ids, mask) for name, step in steps.items()}, rounds,
        )
        rows.append({
            "padding": padding, "work": work, "precision": precision,
            "batch": batch, "seq_len": seq_len, **compare(seconds),
        })
    return rows


MEMORY = [(work, batch, seq_len) for work in WORK for batch in (32, 128) for seq_len in (64, 256)]


def memory_of(name, work, precision, batch, seq_len):
    """The memory that three steps need beyond what was there, in MiB."""
    step = make_step(name, work, precision)
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


def measure_memory(runs=3):
    """Compare the peaks, each in processes of its own: medians, for they differ by 10 %."""
    rows = []
    for work, batch, seq_len in tqdm(MEMORY, desc="memory"):
        needed = {name: [] for name in RIVALS}
        for name in [*RIVALS] * runs:
            needed[name].append(
                in_own_process("memory_of", name, work, "float32", batch, seq_len)
            )
        rows.append({
            "work": work, "batch": batch, "seq_len": seq_len,
            "mib": {name: median(found) for name, found in needed.items()},
            "spread": {name: max(found) - min(found) for name, found in needed.items()},
        })
    return rows


def in_own_process(function, *arguments):
    """Call a function of this module, or of `growth`, in a fresh process."""
    command = [sys.executable, "-m", "tests.benchmarks", function, json.dumps(arguments)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])
