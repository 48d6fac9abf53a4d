"""Run chapters in place: python book/_tools/execute.py [chapter …].

Each runs in a clean kernel. What is saved has counts 1 … n, no time stamps,
no metadata but tags and display hints. Minutes and peak memory go to
results/chapters.json.
"""

import json
import os
import sys
import threading
import time
from pathlib import Path

import nbformat
import psutil
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[2]
COSTS = ROOT / "results" / "chapters.json"
KEEP = {"tags", "mystnb", "jupyter"}
METADATA = {
    "kernelspec": {
        "display_name": "Python 3", "language": "python", "name": "python3",
    },
    "language_info": {"name": "python", "pygments_lexer": "ipython3"},
}


def peak_of_children(stop, peak):
    """Watch the memory of this process's children until told to stop."""
    while not stop.wait(0.2):
        for child in psutil.Process().children(recursive=True):
            try:
                peak[0] = max(peak[0], child.memory_info().rss)
            except psutil.NoSuchProcess:
                pass


def execute(path):
    """Run one chapter, write it back, and return its seconds and MiB."""
    notebook = nbformat.read(path, as_version=4)
    stop, peak = threading.Event(), [0]
    watch = threading.Thread(target=peak_of_children, args=(stop, peak))
    watch.start()
    start = time.perf_counter()
    try:
        NotebookClient(
            notebook, timeout=1800, kernel_name="python3",
            record_timing=False, coalesce_streams=True,
            resources={"metadata": {"path": str(path.parent)}},
        ).execute()
    finally:
        stop.set()
        watch.join()
    seconds = time.perf_counter() - start
    for cell in notebook.cells:
        cell.metadata = {k: v for k, v in cell.metadata.items() if k in KEEP}
        for output in cell.get("outputs", []):
            if "metadata" in output:
                output["metadata"] = {}
    notebook.metadata = METADATA
    nbformat.validate(notebook)
    draft = path.with_suffix(".ipynb.tmp")
    draft.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")
    draft.replace(path)
    return {"seconds": round(seconds, 1), "peak_mib": peak[0] >> 20}


def main(names):
    """Run the named chapters, or all."""
    os.environ.setdefault("PYTHONHASHSEED", "0")
    os.environ.setdefault("TQDM_DISABLE", "1")  # bars are for people
    os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"
    paths = [Path(name).resolve() for name in names] or sorted(
        (ROOT / "chapters").glob("[0-9]*.ipynb")
    )
    for path in paths:
        cost = execute(path)
        costs = json.loads(COSTS.read_text()) if COSTS.exists() else {}
        costs[path.stem] = cost
        COSTS.write_text(json.dumps(costs, indent=1, sort_keys=True) + "\n")
        print(f"{path.stem}: {cost['seconds']} s, {cost['peak_mib']} MiB")


if __name__ == "__main__":
    main(sys.argv[1:])
