"""Wrong implementations that people really write, and right ones that look odd.

One file a layer. Each mistake must fail its check with its own hint; each right
variant must pass. ``python -m tests.bank`` prints them all.
"""

import contextlib
import importlib
import io
import pkgutil
from dataclasses import dataclass

from emoformer.checks import check

MISTAKES, RIGHT = [], []


@dataclass(frozen=True)
class Mistake:
    """One wrong implementation.

    Args:
        layer: the book's name of the layer or function.
        name: the mistake in a few words.
        looks: how it looks in code.
        shows: how it shows in training or use.
        find: how to find it.
        hint: a part of the hint that the check must give.
        thing: the wrong class or function.
    """

    layer: str
    name: str
    looks: str
    shows: str
    find: str
    hint: str
    thing: object


def mistake(layer, name, *, looks, shows, find, hint):
    """Put a wrong implementation into the bank."""
    def add(thing):
        MISTAKES.append(Mistake(layer, name, looks, shows, find, hint, thing))
        return thing
    return add


def right(layer, name):
    """Put a right variant into the bank: it must pass."""
    def add(thing):
        RIGHT.append((layer, name, thing))
        return thing
    return add


def load():
    """Import every file of the bank; return the mistakes and the right variants."""
    for module in sorted(m.name for m in pkgutil.iter_modules(__path__)):
        if not module.startswith("_"):
            importlib.import_module(f"{__name__}.{module}")
    return MISTAKES, RIGHT


def quietly(thing, layer):
    """Check without printing; return the report."""
    with contextlib.redirect_stdout(io.StringIO()):
        return check(thing, layer)


def hint_given(mistake, report):
    """The hint of a report that a mistake was to get, or the first one."""
    hints = [row.hint for row in report.failures]
    fitting = [hint for hint in hints if mistake.hint in hint]
    return (fitting or hints or [""])[0], bool(fitting)
