"""The reader's bench: check your own layer, and carry it through the book.

``check(MyLayer)`` looks at a class or a function; ``use(Layer=MyLayer)`` runs
the book on it. Written by hand, unlike the modules beside this folder: one
file a chapter, none of which imports the chapters' own code.
"""

import importlib
import pkgutil

from .bench import find_battery, run_battery
from .swap import Refused, use  # noqa: F401

for _module in pkgutil.iter_modules(__path__):
    if _module.name != "__main__":
        importlib.import_module(f"{__name__}.{_module.name}")


def check(thing, name=None):
    """Check a class or a function of the reader's, and print what was found.

    Args:
        thing: the class or the function.
        name: what to check it as, one of the book's names; None to find out
            from the name it has.

    Returns:
        A ``Report``; its ``.passed`` says whether all is well.

    Raises:
        ValueError: the name fits none of the checks.
    """
    report = run_battery(thing, find_battery(thing, name))
    print(report)
    return report
