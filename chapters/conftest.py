"""Decide which chapter outputs can be compared strictly.

A cell tagged `real-data` prints what TweetEval or GoEmotions say. With their
files at hand (EMOFORMER_DATA, or the Hub) its output is compared like every
other. On a machine that has neither, the book's own sample stands in: the cell
must run, but it cannot print the same numbers.
"""

import functools
import os
import warnings

TAG = "real-data"

# Progress bars and log lines of downloads and trainings are for people.
for name, value in (
    ("DATASETS_VERBOSITY", "error"),
    ("HF_DATASETS_DISABLE_PROGRESS_BARS", "1"),
    ("HF_HUB_DISABLE_PROGRESS_BARS", "1"),
    ("TQDM_DISABLE", "1"),
):
    os.environ.setdefault(name, value)


@functools.cache
def data_source():
    """Find out once where the posts come from: folder, hub or sample."""
    from emoformer.data import load_tweet_eval, source_of

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the summary below says it
        return source_of(load_tweet_eval())


def pytest_collection_modifyitems(items):
    """Switch the comparison off where there is only the sample."""
    for item in items:
        cell = getattr(item, "cell", None)
        if cell is None or TAG not in cell.metadata.get("tags", []):
            continue
        item.user_properties.append((TAG, data_source()))
        if data_source() == "sample":
            item.options["check"] = False


def pytest_terminal_summary(terminalreporter):
    """Say which source it was, and what that meant."""
    sources = [
        value
        for reports in terminalreporter.stats.values()
        for report in reports
        if getattr(report, "when", "") == "call"
        for name, value in report.user_properties
        if name == TAG
    ]
    if not sources:
        return
    done = "run but not compared" if sources[0] == "sample" else "compared strictly"
    terminalreporter.write_sep("-", "real data")
    terminalreporter.write_line(
        f"posts come from: {sources[0]}; {len(sources)} cells that depend on "
        f"them were {done}"
    )
