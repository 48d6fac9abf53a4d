"""Measure results/speed.json: python -m tests.benchmarks [part …].

Parts: layers, memory, training, inference, growth, share. Each goes into the
file when it is done. The table: make speed.
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
PARTS = {
    "layers": layers.time_encoders,
    "memory": layers.measure_memory,
    "training": jobs.train_an_epoch,
    "inference": jobs.classify,
    "growth": growth.measure_growth,
    "share": lambda: growth.share_of_peak(read()["layers"]),
}
ONE_CALL = {"memory_of": layers.memory_of, "one_point": growth.one_point}


def read():
    """What has been measured so far."""
    path = RESULTS / "speed.json"
    return json.loads(path.read_text()) if path.exists() else {}


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
        kept = read() | {part: measured, "machine": {
            "threads": THREADS, "processor": platform.machine(),
            "instructions": torch.backends.cpu.get_cpu_capability(),
            **{name: version(name) for name in ("torch", "transformers", "accelerate")},
        }}
        save_atomically(json.dumps(kept, indent=1) + "\n", RESULTS / "speed.json")


if __name__ == "__main__":
    main(sys.argv[1:])
