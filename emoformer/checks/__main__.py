"""Check a file of a reader's: python -m emoformer.checks my_layers.py."""

import argparse
import importlib
import importlib.util
import inspect
import os
import sys
from pathlib import Path
from xml.etree import ElementTree

from . import check
from .bench import describe, find_battery


def load_file(path):
    """Import a Python file, as part of its package where it is in one.

    Files beside it can be imported by it, as if it were run.

    Raises:
        SystemExit: there is no such file, or it cannot be imported.
    """
    path = Path(path)
    if path.suffix != ".py" or not path.is_file():
        sys.exit(f"the file must be an existing .py file, but it is {path}")
    path = path.resolve()
    name, folder = path.stem, path.parent
    while (folder / "__init__.py").is_file():
        name, folder = f"{folder.name}.{name}", folder.parent
    sys.path.insert(0, str(folder))
    try:
        if name != path.stem:
            return importlib.import_module(name)
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    except (Exception, SystemExit) as error:
        sys.exit(f"{path.name} cannot be imported: it {describe(error)}")


def checkable(module):
    """List what a module defines itself and there is a check for."""
    found = []
    for name, thing in vars(module).items():
        own = getattr(thing, "__module__", None) == module.__name__
        if name.startswith("_") or not own:
            continue
        if inspect.isclass(thing) or inspect.isfunction(thing):
            try:
                find_battery(thing)
            except ValueError:
                continue
            found.append(thing)
    return found


def write_junit(path, reports):
    """Write reports as JUnit XML, whole or not at all."""
    root = ElementTree.Element("testsuites")
    for report in reports:
        suite = ElementTree.SubElement(
            root, "testsuite", name=report.name, tests=str(len(report.rows)),
            failures=str(len(report.failures)),
            skipped=str(sum(row.passed is None for row in report.rows)),
        )
        for row in report.rows:
            case = ElementTree.SubElement(
                suite, "testcase", classname=report.name, name=row.name
            )
            if row.passed is False:
                ElementTree.SubElement(case, "failure", message=row.hint)
            elif row.passed is None:
                ElementTree.SubElement(case, "skipped", message=row.hint)
    draft = Path(f"{path}.part")
    ElementTree.ElementTree(root).write(draft, "utf-8", xml_declaration=True)
    os.replace(draft, path)


def main(arguments=None):
    """Check what a file defines; return the exit status.

    0: all hold. 1: a property fails. 2: there was nothing to check.
    """
    parser = argparse.ArgumentParser(
        prog="python -m emoformer.checks", description=main.__doc__.splitlines()[0]
    )
    parser.add_argument("file", help="a .py file with your layers or functions")
    parser.add_argument("--junit", metavar="FILE", help="write a JUnit report too")
    options = parser.parse_args(arguments)
    found = checkable(load_file(options.file))
    reports = []
    for thing in found:
        reports.append(check(thing))
        print()
    if options.junit:
        write_junit(options.junit, reports)
    if not found:
        print(f"{options.file} defines nothing that there is a check for: the name "
              "must hold the book's name of it, as MyMultiHeadSelfAttention does")
        return 2
    failed = [report.name for report in reports if not report.passed]
    print(f"{len(reports)} checked, {len(failed)} failed"
          + (": " + ", ".join(failed) if failed else ""))
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
