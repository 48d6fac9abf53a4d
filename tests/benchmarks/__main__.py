"""Measure results/speed.json and costs.json: python -m tests.benchmarks [part …].

Parts: layers, memory, training, inference, growth, share. The first two are
the cells of speed.json, the others are parts of costs.json. Each is saved when
it is done. The tables: make speed.
"""

import json
import platform
import sys
from importlib.metadata import version
from pathlib import Path

import torch

from emoformer.training import save_atomically
from tests.benchmarks import growth, jobs, layers

RESULTS = Path(__file__).resolve().parents[2] / "results"
THREADS = 2
CELLS = {
    "layers": layers.time_encoders,
    "memory": lambda: layers.measure_memory(read("speed.json")),
}
COSTS = {
    "training": jobs.train_an_epoch,
    "inference": jobs.classify,
    "growth": growth.measure_growth,
    "share": lambda: growth.share_of_peak(read("speed.json")),
}
PARTS = CELLS | COSTS
ONE_CALL = {"memory_of": layers.memory_of, "one_point": growth.one_point}


def read(name):
    """What has been measured so far."""
    return json.loads((RESULTS / name).read_text())


def write(name, measured):
    """Write a file of results/ whole or not at all."""
    save_atomically(json.dumps(measured, indent=1) + "\n", RESULTS / name)


def main(arguments):
    """Measure the named parts, or all."""
    torch.set_num_threads(THREADS)
    if arguments and arguments[0] in ONE_CALL:
        print(json.dumps(ONE_CALL[arguments[0]](*json.loads(arguments[1]))))
        return
    for part in arguments or PARTS:
        if part not in PARTS:
            sys.exit(f"a part must be one of {', '.join(PARTS)}: {part!r}")
        measured = PARTS[part]()
        if part in CELLS:
            write("speed.json", measured)
            continue
        kept = read("costs.json") if (RESULTS / "costs.json").exists() else {}
        write("costs.json", kept | {part: measured, "machine": {
            "threads": THREADS, "processor": platform.machine(),
            "instructions": torch.backends.cpu.get_cpu_capability(),
            **{name: version(name) for name in ("torch", "transformers", "accelerate")},
        }})


if __name__ == "__main__":
    main(sys.argv[1:])
