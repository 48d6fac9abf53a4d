"""Print one row a mistake: python -m tests.bank."""

import sys

from tests.bank import hint_given, load, quietly


def main():
    """Check the whole bank; return how many rows are not as they should be."""
    mistakes, variants = load()
    bad = 0
    for entry in mistakes:
        hint, fits = hint_given(entry, quietly(entry.thing, entry.layer))
        verdict = "caught" if fits else "WRONG HINT" if hint else "SLIPPED THROUGH"
        bad += not fits
        print(f"{entry.layer:29} {entry.name:44} {verdict:15} {hint[:90]}")
    for layer, name, thing in variants:
        report = quietly(thing, layer)
        bad += not report.passed
        hint = report.failures[0].hint if report.failures else ""
        verdict = "passes" if report.passed else "REFUSED"
        print(f"{layer:29} {'right: ' + name:44} {verdict:15} {hint[:90]}")
    print(f"{len(mistakes)} mistakes, {len(variants)} right variants, {bad} not as "
          "they should be")
    return bad


if __name__ == "__main__":
    sys.exit(bool(main()))
