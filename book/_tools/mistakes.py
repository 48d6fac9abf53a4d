"""Write the appendix of mistakes from the bank: python book/_tools/mistakes.py."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # the bank lives in tests/

from emoformer.checks.bench import BATTERIES  # noqa: E402
from tests.bank import load  # noqa: E402

PAGE = ROOT / "book" / "mistakes.md"
HEAD = """\
# Mistakes, and how to find them

<!-- Written by book/_tools/mistakes.py from tests/bank/. Do not edit. -->

Each of these {mistakes} implementations is wrong. Most raise no error, have the right
shape, and even learn something. They are kept as code in `tests/bank/`, one file a
chapter. `make test` runs the check of its layer on
each and demands that it fails with the hint for just this mistake; {right} implementations
that look different and are right must pass. `python -m tests.bank` prints every one
with the hint that it gets, and {exercises} wrong answers to exercises as well.

Read a table when something is odd, from its middle column: how it shows. To check a
layer of your own:

```python
from emoformer.checks import check
check(MyMultiHeadSelfAttention)
```
"""


def page():
    """Return the appendix as Markdown: a table for each layer, by chapter."""
    mistakes, right = load()
    exported = set()
    for path in (ROOT / "emoformer").glob("*.py"):
        listed = re.search(r"__all__ = \[(.*?)\]", path.read_text("utf-8"), re.DOTALL)
        exported |= set(re.findall(r"\w+", listed[1])) if listed else set()
    told = [m for m in mistakes if m.layer in exported]
    parts = [HEAD.format(
        mistakes=len(told), exercises=len(mistakes) - len(told), right=len(right)
    )]
    chapter = None
    for battery in sorted(BATTERIES.values(), key=lambda b: b.chapter):
        rows = [m for m in told if m.layer == battery.name]
        if not rows:
            continue
        if battery.chapter != chapter:
            chapter = battery.chapter
            parts.append(f"## Chapter {chapter:02}\n")
        parts.append(f"### {battery.name}\n")
        table = ["| mistake | how it looks | how it shows | how to find it |",
                 "|---|---|---|---|"]
        for m in rows:
            cells = (c.replace("|", "\\|") for c in (m.name, m.looks, m.shows, m.find))
            table.append("| " + " | ".join(cells) + " |")
        parts.append("\n".join([":::{container} mistakes", *table, ":::"]) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
