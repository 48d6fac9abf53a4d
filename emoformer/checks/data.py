"""Checks for chapter 01: reading labelled posts, and keeping splits apart.

Loaders are tried on folders that are made for the occasion, never on real posts.
"""

import contextlib
import html
import os
import random
import re
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path
from unittest.mock import patch

import numpy as np

from .bench import Battery, Broke, Skip, TimeUp, Wrong, describe, expect

EMOTIONS = ("anger", "joy", "optimism", "sadness", "fear", "love")
SPLITS = ("train", "validation", "test")
SAMPLE = Path(__file__).parents[1] / "sample" / "posts.tsv"


# Plain values: what `explain` is for tensors


def short(value, room=200):
    """A value in few characters, for a hint."""
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= room else text[: room - 2] + " …"


def same(one, other):
    """Whether two plain values are equal, whatever they are."""
    try:
        return bool(one == other)
    except Exception:
        return False


def tell(actual, wanted, causes=(), otherwise="the result is wrong", given=None):
    """Raise `Wrong` with the cause that gives the same wrong value.

    Args:
        actual: what the reader's function gave.
        wanted: what is right.
        causes: pairs of a hint and a value, or a function that gives it.
        otherwise: the hint where none of them fits.
        given: what it was called with, to be quoted.
    """
    if same(actual, wanted):
        return
    about = "" if given is None else f"for {short(repr(given), 120)} "
    shown = (f". It gives {about}{short(repr(actual))}, but must give "
             f"{short(repr(wanted))}")
    if actual is None:
        raise Wrong("it gives None: is there a return at the end?")
    for hint, value in causes:
        try:
            value = value() if callable(value) else value
        except Exception:
            continue
        if same(actual, value):
            raise Wrong(hint + shown)
    raise Wrong(otherwise + shown)


def refuses(subject, call, hint, kinds=(ValueError, TypeError, AssertionError)):
    """Expect an error of one of these kinds; return its text."""
    try:
        got = subject.run(call)
    except Broke:
        error = subject.last_error
        if isinstance(error, NotImplementedError):
            raise
        if isinstance(error, kinds):
            return str(error)
        raise Wrong(
            f"{hint}. An error does come, but not from a check that names the rule: "
            f"it {describe(error)}"
        ) from None
    raise Wrong(f"{hint}. It gives {short(repr(got), 120)}")


# Folders and machines that exist for one check only


@contextlib.contextmanager
def folder_with(files):
    """A temporary folder; ``files`` from a name to text or bytes."""
    with tempfile.TemporaryDirectory() as name:
        for path, content in files.items():
            path = Path(name) / path
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(
                content if isinstance(content, bytes) else content.encode("utf-8")
            )
        yield Path(name)


@contextlib.contextmanager
def no_bars():
    """No progress bars of the library datasets."""
    import datasets

    were_off = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not were_off:
            datasets.enable_progress_bars()


@contextlib.contextmanager
def machine(data=None, hub=None):
    """A machine without a network; EMOFORMER_DATA names ``data``.

    Args:
        data: a folder, or None where the variable is not set.
        hub: stands in for ``load_dataset``, which then asks a cache.
    """
    import datasets
    import huggingface_hub.constants

    with (
        no_bars(),
        tempfile.TemporaryDirectory() as empty,
        patch.dict(os.environ),
        patch.object(datasets.config, "HF_HUB_OFFLINE", True),
        patch.object(datasets.config, "HF_DATASETS_CACHE", Path(empty)),
        patch.object(huggingface_hub.constants, "HF_HUB_OFFLINE", True),
        patch.object(datasets, "load_dataset", hub or datasets.load_dataset),
    ):
        os.environ.pop("EMOFORMER_DATA", None)
        os.environ["HF_HUB_OFFLINE"] = "1"
        if data is not None:
            os.environ["EMOFORMER_DATA"] = str(data)
        yield


def names_of(subject):
    """The global names that the reader's function sees."""
    return getattr(subject.thing, "__globals__", {})


def label_names(dataset):
    """The names in the label column of a Dataset."""
    return list(getattr(dataset.features["label"], "names", []))


def pairs(dataset):
    """The rows of a Dataset as (text, label)."""
    return list(zip(list(dataset["text"]), list(dataset["label"]), strict=True))


def expect_dataset(value, what="the result"):
    """Refuse what is no Dataset with the columns text and label."""
    from datasets import ClassLabel, Dataset

    if value is None:
        raise Wrong(f"{what} is None: is there a return at the end?")
    expect(
        isinstance(value, Dataset),
        f"{what} must be a datasets.Dataset, but it is a {type(value).__name__}: "
        "Dataset.from_dict({'text': …, 'label': …}, …) makes one",
    )
    expect(
        set(value.column_names) == {"text", "label"},
        f"{what} must have the columns text and label, but it has "
        f"{value.column_names}",
    )
    expect(
        isinstance(value.features["label"], ClassLabel),
        f"the label column of {what} is of the type {value.features['label']}: it "
        "must be a ClassLabel, which remembers the names behind the numbers. Pass "
        "features=Features({'text': Value('string'), 'label': ClassLabel(names=…)})",
    )


def expect_splits(value, splits=SPLITS):
    """Refuse what is no DatasetDict with these splits."""
    from datasets import DatasetDict

    if value is None:
        raise Wrong("it gives None: is there a return at the end?")
    expect(
        isinstance(value, DatasetDict),
        "it must give a DatasetDict, the splits by name, but it gives a "
        f"{type(value).__name__}",
    )
    expect(
        set(value) == set(splits),
        f"the splits must be named {', '.join(splits)}, but they are named "
        f"{', '.join(value)}: the files say val or dev, we say validation",
    )
    for split in splits:
        expect_dataset(value[split], f"the split {split}")


# read_lines

lines_battery = Battery(
    "read_lines", "read_lines(path) -> a list of strings", chapter=1, takes=("path",)
)
LINE_PROBES = (
    ("a newline ends a line", "two\nOne\n", ["two", "One"], [
        ("the line ends are still there: take the newline off each line",
         ["two\n", "One\n"]),
        ("the newline at the end of the file is taken for the start of one more, "
         "empty line: only what stands between newlines is a line, so take one "
         "newline off the end before you split", ["two", "One", ""]),
        ("the whole text comes back in one piece: split it at newlines",
         "two\nOne\n"),
        ("only the first line comes back: is the return inside the loop?", ["two"]),
        ("only the first line comes back: readline, not readlines?", "two"),
        ("only the first line comes back: readline, not readlines?", "two\n"),
        ("these are bytes: decode them as UTF-8", [b"two", b"One"]),
        ("it splits into characters, not at newlines", list("two\nOne\n")),
        ("the lines are in another order: keep that of the file", ["One", "two"]),
        ("the text is lower-cased: leave it as it is", ["two", "one"]),
    ], "lines are not found"),
    ("the last line needs no newline", "one\ntwo", ["one", "two"], [
        ("the last line is lost where no newline follows it: the last item is "
         "thrown away without looking whether it is empty", ["one"]),
        ("the last character is cut off without looking whether it is a newline",
         ["one", "tw"]),
    ], "a file whose last line has no newline is read wrongly"),
    ("the file is UTF-8", "café 🙂\n", ["café 🙂"], [
        ("it splits at all white space, not at newlines", ["café", "🙂"]),
        ("the file is read as Latin-1 or Windows-1252: pass encoding='utf-8'",
         lambda: ["café 🙂".encode().decode("latin-1")]),
        ("the file is read as Windows-1252: pass encoding='utf-8'",
         lambda: ["café 🙂".encode().decode("cp1252", errors="replace")]),
        ("what is not ASCII is thrown away: pass encoding='utf-8'", ["caf "]),
        ("what is not ASCII is replaced: pass encoding='utf-8'", ["caf�� ����"]),
    ], "characters beyond ASCII are read wrongly: pass encoding='utf-8'"),
    ("spaces and tabs belong to the line", " a \tb \nc\t\n", [" a \tb ", "c\t"], [
        ("lines are stripped: spaces and tabs at their ends belong to them, and a "
         "tab may part two fields of which the last is empty. Take off the newline "
         "only", ["a \tb", "c"]),
        ("the whole text is stripped before it is split: only one newline may be "
         "taken off its end", ["a \tb ", "c"]),
        ("the lines are stripped on the right", [" a \tb", "c"]),
        ("the end of the whole text is stripped, not only a newline",
         [" a \tb ", "c"]),
        ("it splits at all white space, not at newlines", ["a", "b", "c"]),
    ], "spaces or tabs get lost"),
    ("an empty line is a line", "one\n\nthree\n", ["one", "", "three"], [
        ("empty lines are left out: from there on every text gets its neighbour's "
         "label", ["one", "three"]),
        ("a newline at the end makes an empty line more",
         ["one", "", "three", ""]),
    ], "an empty line in the middle is not kept"),
    ("only one newline is taken off the end", "one\n\n", ["one", ""], [
        ("all newlines at the end are taken off, and an empty last line with them: "
         "removesuffix takes one, rstrip or strip takes all", ["one"]),
        ("all newlines at the end are taken off, or none", ["one", "", ""]),
    ], "an empty line at the end is not kept"),
    ("only a newline ends a line",
     "a\u2028b\nc\x85d\ne\x0bf\x0cg\x1ch\n", ["a\u2028b", "c\x85d", "e\x0bf\x0cg\x1ch"],
     [], "characters such as U+2028 or U+0085 are taken for line ends: "
     "str.splitlines knows ten kinds of them, and each makes one post into two. "
     "Split at '\\n' only"),
    ("a carriage return ends no line", "i\rj\nk\n", ["i\rj", "k"], [
        ("a carriage return is turned into a newline: that is what text mode does. "
         "Open with newline='\\n', or read bytes and decode", ["i", "j", "k"]),
    ], "a carriage return inside a line is not left alone"),
    ("an empty file has no lines", "", [], [
        ("an empty file gives one empty line: ''.split('\\n') is ['']", [""]),
    ], "an empty file must give an empty list"),
)


def expect_list(value, of=str):
    """Refuse what is no list of such things."""
    if value is None:
        raise Wrong("it gives None: is there a return at the end?")
    expect(
        isinstance(value, list),
        f"it must give a list, but it gives a {type(value).__name__}"
        + (": wrap it in list(…)" if hasattr(value, "__iter__") else ""),
    )
    expect(
        all(isinstance(item, of) for item in value),
        f"the list must hold {of.__name__}s, but it holds "
        f"{sorted({type(item).__name__ for item in value})}",
    )


def add_line_probe(name, content, wanted, causes, otherwise):
    """One property of `read_lines`."""
    @lines_battery.property(name)
    def test(function):
        with folder_with({"posts.txt": content}) as folder:
            lines = function(folder / "posts.txt")
        if not isinstance(lines, str) and not isinstance(lines, list):
            expect_list(lines)
        tell(lines, wanted, causes, otherwise, content)


for _probe in LINE_PROBES:
    add_line_probe(*_probe)


@lines_battery.property("takes a path as str and as Path")
def lines_path(function):
    with folder_with({"posts.txt": "one\n"}) as folder:
        try:
            lines = function(str(folder / "posts.txt"))
        except Broke as broke:
            raise Wrong(
                f"it takes no str as a path: write Path(path). It {broke}"
            ) from None
    tell(lines, ["one"], given="a str")


@lines_battery.property("refuses what is no UTF-8, and a file that is not there")
def lines_errors(function):
    with folder_with({"posts.txt": b"so sad\ncaf\xe9\n"}) as folder:
        refuses(
            function, lambda: function.thing(folder / "posts.txt"),
            "bytes that are no UTF-8 must be refused by a ValueError: with "
            "errors='ignore' or 'replace', or read as Latin-1, text is spoilt and "
            "nobody hears of it", (ValueError,),
        )
        refuses(
            function, lambda: function.thing(folder / "none.txt"),
            "a file that is not there must raise FileNotFoundError: an empty list "
            "looks like an empty file", (FileNotFoundError,),
        )


# to_dataset and source_of

dataset_battery = Battery(
    "to_dataset",
    "to_dataset(texts, labels, names, *, keep=None, source='', where='the data') -> "
    "Dataset with the columns text and label; source stands in its info.description",
    chapter=1, takes=("texts", "labels", "names", "keep", "source", "where"),
)
NAMES = ["x", "y", "z", "w"]
TEXTS = ["one", "two", "three", "four", "five"]


@dataset_battery.property("puts texts and labels side by side")
@no_bars()
def dataset_plain(function):
    data = function(list(TEXTS), [3, 0, 2, 0, 1], list(NAMES))
    expect_dataset(data)
    tell(label_names(data), NAMES, [
        ("the names are in alphabetical order: number 0 must stay the first of the "
         "names given, so leave their order alone", sorted(NAMES)),
        ("the names are made from the labels that occur", ["0", "1", "2", "3"]),
    ], "the names behind the numbers are not those given, in their order")
    tell(list(data["text"]), TEXTS, [
        ("the texts are sorted", sorted(TEXTS)),
    ], "the texts are not those given, in their order")
    tell(list(data["label"]), [3, 0, 2, 0, 1], [
        ("the labels are sorted, the texts are not", [0, 0, 1, 2, 3]),
        ("the labels are counted from 1", [4, 1, 3, 1, 2]),
        ("the labels are numbered anew, as they occur or by alphabet: the number "
         "must stay the place in names", [2, 0, 1, 0, 3]),
    ], "the labels are not those given")


@dataset_battery.property("leaves out a text with several labels")
@no_bars()
def dataset_several(function):
    data = function(list(TEXTS), [[0], [2], [1, 2], [3], [0, 1]], list(NAMES))
    expect_dataset(data)
    tell(pairs(data), [("one", 0), ("two", 2), ("four", 3)], [
        ("a text with several labels is kept under its first one: it has no single "
         "answer, so leave it out", list(zip(TEXTS, [0, 2, 1, 3, 0], strict=True))),
        ("a text with several labels is kept under its last one: leave it out",
         list(zip(TEXTS, [0, 2, 2, 3, 1], strict=True))),
        ("a text with several labels is kept once for each: leave it out",
         [("one", 0), ("two", 2), ("three", 1), ("three", 2), ("four", 3),
          ("five", 0), ("five", 1)]),
        ("labels are left out, but their texts are not, so they slip against each "
         "other", list(zip(TEXTS, [0, 2, 3], strict=False))),
    ], "a text with several labels must be left out, its label and itself, and the "
       "others stay")
    data = function(list(TEXTS), [0, [2], [1, 2], 3, [0]], list(NAMES))
    expect_dataset(data)
    tell(pairs(data), [("one", 0), ("two", 2), ("four", 3), ("five", 0)], (),
         "labels may be numbers and lists of numbers, even mixed")


@dataset_battery.property("keeps some names and numbers them anew")
@no_bars()
def dataset_keep(function):
    labels = [3, [0], 2, 1, [1, 3]]
    data = function(list(TEXTS), labels, list(NAMES), keep=["z", "x", "w"])
    expect_dataset(data)
    tell(label_names(data), ["z", "x", "w"], [
        ("all names stay, although only some are to be kept", NAMES),
        ("the names to keep are put into the order of all names: keep gives the new "
         "order", ["x", "z", "w"]),
        ("the names to keep are sorted: keep gives the new order", ["w", "x", "z"]),
    ], "the names must be those of keep, in that order")
    tell(pairs(data), [("one", 2), ("two", 1), ("three", 0)], [
        ("the old numbers stay: after keeping ['z', 'x', 'w'], z is number 0. Look "
         "up the name of the old number, and that name's place in keep",
         [("one", 3), ("two", 0), ("three", 2)]),
        ("the labels are numbered in the order of all names, while the names stand in "
         "the order of keep", [("one", 2), ("two", 0), ("three", 1)]),
        ("a text with several labels is kept because only one of them is among those "
         "to keep: count its labels first, and choose names after",
         [("one", 2), ("two", 1), ("three", 0), ("five", 2)]),
        ("texts with other labels are kept as well",
         [("one", 2), ("two", 1), ("three", 0), ("four", 1)]),
        ("-1 is given to the labels that are not kept: leave those texts out",
         [("one", 2), ("two", 1), ("three", 0), ("four", -1)]),
    ], "the texts kept, or their new numbers, are wrong")


@dataset_battery.property("says where the posts come from")
@no_bars()
def dataset_source(function):
    data = function(["one"], [0], ["x"], source="hub")
    expect_dataset(data)
    tell(data.info.description, "hub", [
        ("the source is not kept: pass info=DatasetInfo(description=source, …)", ""),
    ], "source must stand in the Dataset's info.description")


@dataset_battery.property("refuses what cannot be right, and names the place")
@no_bars()
def dataset_refuses(function):
    def attempt(texts, labels, hint, **options):
        options = {"where": "val_labels.txt", **options}
        text = refuses(
            function, lambda: function.thing(texts, labels, list(NAMES), **options),
            hint, (ValueError, AssertionError),
        )
        expect(
            "val_labels.txt" in text,
            "the error must name the file or split that was passed as where, or "
            f"nobody finds the line; it says: {short(text)}",
        )

    attempt(["one", "two"], [0], "more texts than labels must be refused: zip stops "
            "at the shorter one, and a lost line shifts all labels after it")
    attempt(["one"], [0, 1], "more labels than texts must be refused: zip stops at "
            "the shorter one")
    attempt([], [], "no texts at all must be refused: an empty file is no data set")
    attempt(["one", "two"], [0, 4], "a label of 4 must be refused where there are "
            "the names 0 to 3: compare with len(names) - 1")
    attempt(["one", "two"], [0, -1], "a label of -1 must be refused: to a list, -1 "
            "is its last item, and to a ClassLabel it means unknown, so nobody hears")
    attempt(["one", "two"], [0, "joy"], "a label that is no number must be refused")
    attempt(["one", "two"], [[0], []], "a text without a label must be refused, not "
            "left out: something is wrong with its line")
    attempt(["one", "two"], [[0], [1, 9]], "the labels of a text that is left out "
            "must be checked too: 9 is none of them, so the file is broken")
    attempt(["one"], [0], "a name to keep that is none of the names must be refused: "
            "it would become a class without an example", keep=["x", "love"])


source_battery = Battery(
    "source_of", "source_of(dataset) -> 'folder', 'hub' or 'sample'", chapter=1,
    takes=("dataset",),
)


def made(rows, names, source=""):
    """A Dataset of ours."""
    from datasets import ClassLabel, Dataset, DatasetInfo, Features, Value

    features = Features({"text": Value("string"), "label": ClassLabel(names=list(names))})
    return Dataset.from_dict(
        {"text": [t for t, _ in rows], "label": [i for _, i in rows]},
        info=DatasetInfo(description=source, features=features),
    )


@source_battery.property("reads it off the train split")
def source_read(function):
    from datasets import DatasetDict

    for source in ("folder", "hub", "sample"):
        data = DatasetDict({
            split: made([("one", 0)], ["x"], source) for split in SPLITS
        })
        # Not passed directly: copies of a Dataset never compare equal.
        tell(function.run(lambda data=data: function.thing(data)), source, [
            ("it always gives the same answer", "sample"),
            ("it always gives the same answer", "folder"),
            ("it always gives the same answer", "hub"),
            ("it gives the whole info: its description is meant",
             lambda data=data: data["train"].info),
        ], "it must give the description in dataset['train'].info")


# load_sample

sample_battery = Battery(
    "load_sample", "load_sample(names=EMOTIONS) -> DatasetDict", chapter=1,
    takes=("names",),
)


def sample_rows():
    """(split, name, text) of each bundled post."""
    lines = SAMPLE.read_bytes().decode("utf-8").split("\n")
    return [tuple(line.split("\t")) for line in lines[1:] if line]


def expect_sample(data, names, splits=SPLITS):
    """Expect the bundled posts of these emotions."""
    expect_splits(data, splits)
    for split in splits:
        tell(label_names(data[split]), list(names), [
            ("the emotions are in alphabetical order: a number must mean the same "
             "everywhere, so keep the order of names", sorted(names)),
            ("all six emotions are named, although only some were asked for",
             list(EMOTIONS)),
        ], "the names behind the labels are wrong")
        rows = [(t, n) for where, n, t in sample_rows() if where == split]
        wanted = [(t, names.index(n)) for t, n in rows if n in names]
        order = sorted(EMOTIONS)
        everything = [(t, n) for _, n, t in sample_rows()]
        actual = pairs(data[split])
        if same(actual, wanted):
            continue
        for hint, mistaken in (
            ("the numbers come from an alphabetical list of the emotions",
             lambda rows=rows, order=order: [
                 (t, order.index(n)) for t, n in rows if n in names]),
            ("the numbers stay those among all six: number the names asked for "
             "anew, in their order",
             lambda rows=rows: [(t, EMOTIONS.index(n)) for t, n in rows if n in names]),
            ("the emotions that were not asked for are not left out",
             lambda rows=rows: [(t, EMOTIONS.index(n)) for t, n in rows]),
            ("every split holds all posts: the first column says which split a post "
             "belongs to",
             lambda rows=everything: [
                 (t, names.index(n)) for t, n in rows if n in names]),
        ):
            expect(not same(actual, mistaken()), hint)
        texts = [t for t, _ in actual]
        expect("text" not in texts, "the first line of the file is taken for a post: "
               "it only names the columns")
        expect(
            len(actual) == len(wanted),
            f"the split {split} must hold {len(wanted)} posts, but it holds "
            f"{len(actual)}: is each post put where its first column says, all of "
            "them, and the last line too?",
        )
        expect(
            sorted(texts) != sorted(t for t, _ in wanted) or texts == [
                t for t, _ in wanted],
            "the posts are in another order than in the file: leave it, or results "
            "differ from the page",
        )
        expect(
            texts == [t for t, _ in wanted],
            "the texts are not those of the file: the columns are split, label, "
            "text, with a tab between, and nothing is stripped or lower-cased",
        )
        raise Wrong("the labels do not fit the texts: a label is the place of the "
                    "post's emotion in names")


@sample_battery.property("gives the 600 posts, each in its split")
def sample_plain(function):
    expect_sample(function(), EMOTIONS)


@sample_battery.property("gives only the emotions asked for, numbered anew")
def sample_names(function):
    expect_sample(function(("love", "anger", "joy")), ("love", "anger", "joy"))


# read_mapping

mapping_battery = Battery(
    "read_mapping", "read_mapping(path) -> a list of names", chapter=1, takes=("path",)
)
MAPPING_PROBES = (
    ("gives the names in the order of their numbers",
     "0\tanger\n1\tjoy\n2\toptimism\n", ["anger", "joy", "optimism"], [
         ("it gives the numbers, the first column: names are the second",
          ["0", "1", "2"]),
         ("it gives the numbers, the first column: names are the second", [0, 1, 2]),
         ("it gives a dict: a list is wanted, whose places are the numbers",
          {0: "anger", 1: "joy", 2: "optimism"}),
         ("it gives a dict: a list is wanted, whose places are the numbers",
          {"0": "anger", "1": "joy", "2": "optimism"}),
         ("it gives a dict from names to numbers: a list is wanted",
          {"anger": 0, "joy": 1, "optimism": 2}),
         ("the line ends are still in the names", ["anger\n", "joy\n", "optimism\n"]),
         ("it gives whole lines: take what stands after the tab",
          ["0\tanger", "1\tjoy", "2\toptimism"]),
         ("the first line is skipped: the file has no header", ["joy", "optimism"]),
         ("the last line is lost", ["anger", "joy"]),
     ], "the names are wrong"),
    ("does not sort them", "0\tsad\n1\tbad\n2\tmad\n", ["sad", "bad", "mad"], [
        ("the names are sorted by alphabet: their order is that of their numbers",
         ["bad", "mad", "sad"]),
    ], "the order is wrong"),
    ("sorts twelve numbers as numbers", "".join(f"{i}\tn{i}\n" for i in range(12)),
     [f"n{i}" for i in range(12)], [
         ("the numbers are sorted as text: '10' comes before '2'",
          [f"n{i}" for i in sorted(range(12), key=str)]),
     ], "with more than ten names it goes wrong"),
    ("ignores further columns", "0\t❤\t_red_heart_\t\n1\t😂\t_joy_\t\n", ["❤", "😂"], [
        ("it takes the last column that holds something: the name is the second",
         ["_red_heart_", "_joy_"]),
        ("it takes the last column: the name is the second", ["", ""]),
        ("it keeps the further columns: split at every tab, and take the second "
         "field", ["❤\t_red_heart_\t", "😂\t_joy_\t"]),
        ("it keeps the further columns", ["❤\t_red_heart_", "😂\t_joy_"]),
    ], "the task emoji has more columns; they must be ignored"),
    ("keeps spaces in a name", "0\tnot sad\n1\tjust happy\n", ["not sad", "just happy"],
     [("it splits at any white space, so a name of two words is cut: split('\\t')",
       ["not", "just"]),
      ("it splits at any white space and takes the last word", ["sad", "happy"])],
     "a name of two words is read wrongly"),
    ("needs no newline at the end", "0\tanger\n1\tjoy", ["anger", "joy"], [
        ("the last name is lost where no newline follows it", ["anger"]),
        ("the last letter is lost where no newline follows it", ["anger", "jo"]),
    ], "without a newline at the end it goes wrong"),
)


def add_mapping_probe(name, content, wanted, causes, otherwise):
    """One property of `read_mapping`."""
    @mapping_battery.property(name)
    def test(function):
        with folder_with({"mapping.txt": content}) as folder:
            tell(function(folder / "mapping.txt"), wanted, causes, otherwise, content)


for _probe in MAPPING_PROBES:
    add_mapping_probe(*_probe)


@mapping_battery.property("refuses a file that is no such list")
def mapping_refuses(function):
    for content, hint in (
        ("", "an empty file must be refused: no names, no classes"),
        ("0\tanger\n2\tjoy\n", "a number that is missing must be refused: with 0 and "
         "2 the second name would be called 1, and every label of it is wrong"),
        ("1\tanger\n2\tjoy\n", "numbers that begin at 1 must be refused: labels "
         "count from 0"),
        ("1\tjoy\n0\tanger\n", "numbers out of order must be refused: the rule is 0, "
         "1, 2, …, line by line"),
        ("0\tanger\n0\tjoy\n", "the same number twice must be refused"),
        ("anger\njoy\n", "lines without a number must be refused"),
        ("0 anger\n1 joy\n", "a space instead of a tab must be refused"),
        ("0\tanger\n\n1\tjoy\n", "an empty line must be refused, not skipped"),
        ("a\tanger\nb\tjoy\n", "what is no number must be refused"),
    ):
        with folder_with({"mapping.txt": content}) as folder:
            refuses(
                function, lambda folder=folder: function.thing(folder / "mapping.txt"),
                f"{hint}, by a ValueError (the file: {content!r})",
                (ValueError, AssertionError),
            )


# hub_answers

hub_battery = Battery(
    "hub_answers", "hub_answers(seconds=5.0) -> bool", chapter=1, takes=("seconds",)
)


@contextlib.contextmanager
def a_hub(answer):
    """Stand between the reader's question and the network.

    Args:
        answer: called for each question; it returns, raises, or waits.

    Yields:
        A list that grows by one for each question.
    """
    import socket

    from huggingface_hub import HfApi

    asked = []

    def reply(*_arguments, **_options):
        asked.append(1)
        return answer()

    def unreachable(*_arguments, **_options):
        asked.append(1)
        answer()
        raise OSError("no route to the network in this check")

    with contextlib.ExitStack() as stack:
        for name in ("dataset_info", "repo_info", "repo_exists", "list_datasets",
                     "list_models", "model_info", "file_exists"):
            if hasattr(HfApi, name):
                stack.enter_context(patch.object(HfApi, name, reply))
        for name in ("getaddrinfo", "create_connection"):
            stack.enter_context(patch.object(socket, name, unreachable))
        stack.enter_context(patch.dict(os.environ))
        os.environ.pop("HF_HUB_OFFLINE", None)
        yield asked


@hub_battery.property("says True when the Hub answers")
def hub_yes(function):
    with a_hub(object) as asked:
        answer = function(1.0)
    if not asked and answer is False:
        raise Wrong("it says False without asking anybody")
    if answer is False:
        raise Skip(
            "it asks the Hub in a way that this check cannot answer: it knows "
            "HfApi().dataset_info and the like"
        )
    tell(answer, True, [], "it must say True, a bool, when an answer came")
    expect(answer is True, "it must give True or False, not what the Hub answered: "
           f"it gives a {type(answer).__name__}")


@hub_battery.property("says False when the question fails")
def hub_no(function):
    def fail():
        raise OSError("no route")

    with a_hub(fail) as asked:
        try:
            answer = function(1.0)
        except Broke as broke:
            raise Wrong(
                "when the Hub cannot be reached an error comes out: catch it, the "
                f"answer is False. It {broke}"
            ) from None
    if asked:
        expect(answer is not True, "it says True although the question failed: the "
               "answer counts only if no error came")
        tell(answer, False, [], "it must say False when the question fails")
    else:
        raise Wrong("it asks nobody: HfApi().dataset_info(…) would be a question")


@hub_battery.property("says False after the seconds that it may wait")
def hub_slow(function):
    ended = threading.Event()
    start = time.perf_counter()
    try:
        with a_hub(lambda: ended.wait(1.6)):
            answer = function(0.2)
            took = time.perf_counter() - start
    finally:
        ended.set()
    expect(
        took < 1.0,
        f"the Hub never answers, it may wait 0.2 seconds, and it waits {took:.1f}: "
        "looking up a name can hang longer than any timeout that is passed along. "
        "Ask in a daemon thread and join it with the timeout",
    )
    expect(answer is not True, "it says True although no answer came in time")
    tell(answer, False, [], "it must say False when no answer came in time")


# The loaders

TWEETS = {  # two posts of ours a split
    "train": [("not sad, just happy", 1), ("not happy, just sad", 3)],
    "validation": [("who took my bicycle", 0), ("one line\u2028or two\x85", 2)],
    "test": [(" tab\there ", 3), ("👩\u200d🍳 again", 1), ("so proud of her", 2)],
}
# Not our names and not in alphabetical order: they must come from the file.
TWEET_NAMES = ["wut", "freude", "mut", "trauer"]
GO_NAMES = ["neutral", "love", "fear", "sadness", "pride", "optimism", "joy", "anger"]
COMMENTS = {  # text and GoEmotions' numbers
    "train": [("no label of ours", [0]), ("late again", [7]), ("both", [7, 3]),
              ("sun, at last", [6])],
    "validation": [("one of ours, one not", [4, 1]), ("my old dog", [1])],
    "test": [("steps behind me", [2]), ("we will manage", [5]), ("rain", [3]),
             ("well done", [4])],
}
TWEET_FILES = {"train": "train", "validation": "val", "test": "test"}
COMMENT_FILES = {"train": "train", "validation": "dev", "test": "test"}


def tweet_files(task="emotion", names=TWEET_NAMES, rows=TWEETS):
    """One task in TweetEval's layout, as files."""
    files = {f"tweeteval/{task}/mapping.txt": "".join(
        f"{i}\t{name}\n" for i, name in enumerate(names))}
    for split, part in rows.items():
        stem = f"tweeteval/{task}/{TWEET_FILES[split]}"
        files[f"{stem}_text.txt"] = "".join(f"{text}\n" for text, _ in part)
        files[f"{stem}_labels.txt"] = "".join(f"{label}\n" for _, label in part)
    return files


def comment_files():
    """GoEmotions, as files."""
    files = {"go_emotions/labels.txt": "\n".join(GO_NAMES)}
    for split, part in COMMENTS.items():
        files[f"go_emotions/{COMMENT_FILES[split]}.tsv"] = "".join(
            f"{text}\t{','.join(map(str, labels))}\tid{i}\n"
            for i, (text, labels) in enumerate(part)
        )
    return files


def all_pairs(data, wanted):
    """The rows of every split; refuse them in another order than wanted."""
    rows = {split: pairs(part) for split, part in data.items()}
    for split, part in rows.items():
        expect(
            part == wanted[split] or sorted(part) != sorted(wanted[split]),
            f"the posts of {split} are there, but in another order than in the file: "
            "leave it, or predictions line by line belong to other posts",
        )
    return rows


def load_from(subject, files, *arguments, **options):
    """Call a loader with EMOFORMER_DATA naming a folder of such files."""
    with folder_with(files) as folder, machine(folder):
        return subject.run(subject.thing, *arguments, **options)


def refuses_files(subject, files, hint, kinds, *arguments):
    """Expect a loader to refuse a folder; return the error's text."""
    with folder_with(files) as folder, machine(folder):
        return refuses(subject, lambda: subject.thing(*arguments), hint, kinds)


def with_notice(subject, *arguments, **options):
    """Call a loader on a machine with nothing; give data and warnings."""
    def call():
        with warnings.catch_warnings(record=True) as notices:
            warnings.simplefilter("always")
            data = subject.thing(*arguments, **options)
        return data, notices

    with machine():
        return subject.run(call)


def hub_of(*answers):
    """A ``load_dataset`` that knows some repositories, and what it was asked."""
    calls = []

    def load_dataset(path, name=None, **options):
        calls.append((path, name or options.get("name")))
        for repository, config, data in answers:
            if path == repository and calls[-1][1] == config:
                split = options.get("split")
                return data[split] if split else data
        raise FileNotFoundError(f"no {calls[-1]} in this check")

    return load_dataset, calls


def from_hub(subject, *answers):
    """Call a loader where only a cache of the Hub has its data."""
    from datasets import load_dataset as original

    load_dataset, calls = hub_of(*answers)
    with contextlib.ExitStack() as stack:
        stack.enter_context(machine(hub=load_dataset))
        spaces = [getattr(module, "__dict__", {}) for module in sys.modules.values()]
        for space in [names_of(subject), *spaces]:
            if space.get("load_dataset") is original:
                stack.enter_context(patch.dict(space, load_dataset=load_dataset))
        try:
            data = subject.run(subject.thing)
        except Broke as broke:
            if calls and calls[-1] not in [a[:2] for a in answers]:
                raise Wrong(
                    f"it asks the Hub for {calls[-1]}, where "
                    f"{answers[0][:2]} is meant"
                ) from None
            raise Wrong(
                "without a folder, and with the data in the cache of the Hub, it "
                f"{broke}"
            ) from None
    expect(
        bool(calls),
        "without a folder it never calls datasets.load_dataset: earlier downloads lie "
        "in its cache, and with HF_HUB_OFFLINE=1 it looks there only",
    )
    expect(
        calls[-1] in [a[:2] for a in answers],
        f"it asks the Hub for {calls[-1]}, where {answers[0][:2]} is meant",
    )
    return data


def expect_no_folder(subject):
    """Refuse a loader that takes something else for a folder it was promised."""
    with folder_with({}) as folder, machine(folder / "nowhere"):
        refuses(
            subject, subject.thing,
            "EMOFORMER_DATA names a folder that is not there: that must raise "
            "FileNotFoundError. Whoever asked for a folder and silently gets other "
            "posts believes a wrong number", (FileNotFoundError, NotADirectoryError),
        )


def missing_causes(subject, files, lost, hint, *arguments):
    """Expect FileNotFoundError for each lost file, and its name in the text."""
    for name in lost:
        rest = {path: text for path, text in files.items() if path != name}
        text = refuses_files(
            subject, rest, f"{name} is missing, and that must raise "
            f"FileNotFoundError: {hint}", (FileNotFoundError,), *arguments
        )
        expect(
            Path(name).name in text,
            f"{name} is missing, but the error does not name it: {short(text)}",
        )


tweet_battery = Battery(
    "load_tweet_eval",
    "load_tweet_eval(task='emotion', splits=SPLITS) -> DatasetDict", chapter=1,
    takes=("task", "splits"),
)


def tweet_causes():
    """What wrong ways through the folder give."""
    def swapped(one, other):
        rows = dict(TWEETS)
        rows[one], rows[other] = rows[other], rows[one]
        return rows

    return [
        ("validation and test have changed places", swapped("validation", "test")),
        ("validation is read from the test files: its files are called val_…",
         {**TWEETS, "validation": TWEETS["test"]}),
        ("test is read from the val files", {**TWEETS, "test": TWEETS["validation"]}),
        ("every split is read from the train files: a name was not changed",
         dict.fromkeys(SPLITS, TWEETS["train"])),
        ("texts are stripped: spaces at their ends belong to them. Take off the "
         "newline only",
         {s: [(t.strip(), i) for t, i in rows] for s, rows in TWEETS.items()}),
        ("the labels are numbered anew: they must stay as they stand in the file",
         {s: [(t, sorted(TWEET_NAMES).index(TWEET_NAMES[i])) for t, i in rows]
          for s, rows in TWEETS.items()}),
    ]


@tweet_battery.property("reads texts, labels and names from the folder")
def tweet_folder(function):
    try:
        data = load_from(function, tweet_files())
    except Broke as broke:
        two = "\u2028" in str(broke) or "label" in str(broke)
        raise Wrong(
            "a proper folder is refused: "
            + ("is a text cut in two at a character such as U+2028, as splitlines "
               "does? Split at '\\n' only. " if two else "")
            + f"It {broke}"
        ) from None
    expect_splits(data)
    for split in SPLITS:
        tell(label_names(data[split]), TWEET_NAMES, [
            ("the names are written into the code: they must come from the task's "
             "mapping.txt", list(EMOTIONS[:4])),
            ("the names are written into the code: they must come from the task's "
             "mapping.txt", list(EMOTIONS)),
            ("the names are sorted: their order is that of mapping.txt",
             sorted(TWEET_NAMES)),
        ], "the names must come from mapping.txt")
    tell(all_pairs(data, TWEETS), TWEETS, tweet_causes(),
         "texts and labels are not those of the files, line by line")


@tweet_battery.property("looks for the folder when it is called, and uses it")
def tweet_when(function):
    data = load_from(function, tweet_files())
    expect_splits(data)
    expect(
        data["train"].info.description == "folder",
        "the data came from the folder, but train.info.description (what source_of "
        f"reads) says {data['train'].info.description!r}: pass source='folder'",
    )
    other = {s: [(f"other {t}", i) for t, i in rows] for s, rows in TWEETS.items()}
    again = load_from(function, tweet_files(rows=other))
    expect_splits(again)
    tell(all_pairs(again, other), other, [
        ("the second folder is not read: the first result is remembered, or the "
         "variable is read once, when the module is loaded. Read os.environ inside "
         "the function", TWEETS),
    ], "a second folder gives wrong posts")
    expect_no_folder(function)


@tweet_battery.property("finds other tasks, and the stances under one mapping")
def tweet_tasks(function):
    names = ["none", "against", "favor", "more"]
    files = tweet_files("irony", ["no", "yes", "maybe", "both"])
    data = load_from(function, {**tweet_files(), **files}, "irony")
    expect_splits(data)
    tell(label_names(data["train"]), ["no", "yes", "maybe", "both"], [
        ("the task is ignored: emotion was read, irony was asked for", TWEET_NAMES),
    ], "the task irony has other names")
    files = {
        path.replace("stance/climate/mapping", "stance/mapping"): text
        for path, text in tweet_files("stance/climate", names).items()
    }
    try:
        data = load_from(function, files, "stance_climate")
    except Broke as broke:
        raise Wrong(
            "stance_climate must be read from tweeteval/stance/climate, and its names "
            "from tweeteval/stance/mapping.txt, which the five targets share. It "
            f"{broke}"
        ) from None
    expect_splits(data)
    tell(label_names(data["train"]), names, (), "the names of a stance are wrong")


@tweet_battery.property("reads only the splits asked for")
def tweet_splits(function):
    files = {p: t for p, t in tweet_files().items() if "/train_" not in p}
    try:
        data = load_from(function, files, "emotion", ("test", "validation"))
    except Broke as broke:
        raise Wrong(
            "validation and test were asked for and are there, but it wants the "
            f"train files too: look at splits before you look for files. It {broke}"
        ) from None
    expect_splits(data, ("test", "validation"))
    tell(all_pairs(data, TWEETS), {s: TWEETS[s] for s in ("test", "validation")},
         tweet_causes(), "the two splits are read wrongly")


@tweet_battery.property("refuses unknown tasks and splits, and broken folders")
def tweet_refuses(function):
    files = tweet_files()
    for task in ("Emotion", "anger", "../emotion", ""):
        refuses_files(
            function, files, f"the task {task!r} must be refused by a ValueError that "
            "lists those there are, before any file is looked for", (ValueError,
            AssertionError), task,
        )
    for splits in (("dev",), ("test", "val"), ()):
        refuses_files(
            function, files, f"the splits {splits!r} must be refused by a ValueError: "
            "they are called train, validation and test, and there must be one",
            (ValueError, AssertionError), "emotion", splits,
        )
    missing_causes(
        function, files, list(files)[:3] + list(files)[-1:],
        "the sample, or an empty split, would be a quiet lie",
    )
    broken = "tweeteval/emotion/val_labels.txt"
    for content, hint in (
        ("0\n", "two texts and one label must be refused: zip stops at the shorter"),
        ("0\n1\n2\n", "two texts and three labels must be refused"),
        ("0\n4\n", "a label 4 that no name has must be refused"),
        ("0\n-1\n", "a label -1 must be refused: to a list it is the last item"),
        ("0\njoy\n", "a label that is no number must be refused"),
        ("0\n\n", "an empty label must be refused"),
    ):
        refuses_files(function, {**files, broken: content},
                      f"{hint}, by a ValueError", (ValueError, AssertionError))
    refuses_files(function, {**files, "tweeteval/emotion/mapping.txt": "anger\njoy\n"},
                  "a mapping.txt without numbers must be refused by a ValueError",
                  (ValueError, AssertionError))


def the_notice(data, notices, splits=SPLITS, names=EMOTIONS):
    """Expect the sample, and a warning that says so."""
    expect_sample(data, names, splits)
    expect(
        bool(notices),
        "the sample stands in for the real data, and no warning says so: whoever "
        "trains on it believes wrong numbers. Call warnings.warn",
    )
    source = data[splits[0]].info.description
    expect(source == "sample", "the sample stands in, but train.info.description "
           f"(what source_of reads) says {source!r}")


@tweet_battery.property("without folder and Hub gives the sample, and says so")
def tweet_sample(function):
    try:
        data, notices = with_notice(function)
    except Broke as broke:
        raise Wrong(
            "without a folder, Hub and cache it must give the sample's posts of the "
            f"first four emotions, with a warning. It {broke}"
        ) from None
    the_notice(data, notices, names=EMOTIONS[:4])
    data, notices = with_notice(function, "emotion", ["test"])
    the_notice(data, notices, ("test",), EMOTIONS[:4])
    with machine():
        refuses(
            function, lambda: function.thing("irony"),
            "the sample holds no irony: without folder, Hub and cache that task must "
            "raise ConnectionError, not give emotions", (ConnectionError,),
        )


@tweet_battery.property("asks the Hub, or its cache, where there is no folder")
def tweet_hub(function):
    from datasets import DatasetDict

    answer = DatasetDict({
        split: made(rows, EMOTIONS[:4]) for split, rows in TWEETS.items()
    })
    data = from_hub(function, ("cardiffnlp/tweet_eval", "emotion", answer))
    expect_splits(data)
    tell(all_pairs(data, TWEETS), TWEETS, (), "what the Hub gives is changed")
    tell(label_names(data["train"]), list(EMOTIONS[:4]), (), "the names are wrong")
    source = data["train"].info.description
    expect(source == "hub", "the data came from the Hub, but train.info.description "
           f"(what source_of reads) says {source!r}: pass source='hub'")


six_battery = Battery(
    "load_six_emotions", "load_six_emotions() -> DatasetDict", chapter=1
)
go_battery = Battery(
    "load_go_emotions", "load_go_emotions() -> DatasetDict", chapter=1
)


def comment_rows(names, number=None, keep=None):
    """The rows of each split with one label among ``names``."""
    number = number or (lambda i: names.index(GO_NAMES[i]))
    keep = keep or (lambda labels: len(labels) == 1 and GO_NAMES[labels[0]] in names)
    return {
        split: [(t, number(labels[0])) for t, labels in rows if keep(labels)]
        for split, rows in COMMENTS.items()
    }


def comment_causes(names):
    """What wrong ways of choosing comments give."""
    def any_of_ours(labels):
        return any(GO_NAMES[i] in names for i in labels)

    def only_one_of_ours(labels):
        return sum(GO_NAMES[i] in names for i in labels) == 1

    def ours_first(labels):
        return GO_NAMES[labels[0]] in names

    def first(rule):
        return {
            split: [(t, names.index(next(GO_NAMES[i] for i in labels
                                         if GO_NAMES[i] in names)))
                    for t, labels in rows if rule(labels)]
            for split, rows in COMMENTS.items()
        }

    right = comment_rows(names)
    order = sorted(names)
    return [
        ("a comment with several labels is kept under its first: it has no single "
         "answer, so leave it out", lambda: first(any_of_ours)),
        ("a comment with several labels is kept under its first: it has no single "
         "answer, so leave it out", lambda: comment_rows(names, keep=ours_first)),
        ("a comment with two labels is kept because one of them is not ours: count "
         "its labels before you choose", lambda: first(only_one_of_ours)),
        ("the labels keep GoEmotions' numbers: they must be the places among the "
         "emotions that are kept", lambda: comment_rows(names, number=lambda i: i)),
        ("the numbers come from an alphabetical list",
         lambda: comment_rows(names, number=lambda i: order.index(GO_NAMES[i]))),
        ("validation and test have changed places",
         {"train": right["train"], "validation": right["test"],
          "test": right["validation"]}),
        ("every split is read from the train file",
         dict.fromkeys(SPLITS, right["train"])),
    ]


def add_comment_loader(battery, names, source):
    """The properties of a loader of GoEmotions."""
    @battery.property("reads the comments with exactly one label")
    def folder_read(function):
        try:
            data = load_from(function, comment_files())
        except Broke as broke:
            raise Wrong(
                f"a proper folder is refused (a line is text, labels such as 2,27, "
                f"id, with tabs between). It {broke}"
            ) from None
        expect_splits(data)
        tell(label_names(data["train"]), list(names), [
            ("the names are sorted", sorted(names)),
            ("the names stand in the order of labels.txt: ours is anger, joy, "
             "optimism, sadness, fear, love", [n for n in GO_NAMES if n in names]),
            ("all labels of the file are named, where six are wanted", GO_NAMES),
        ], f"the names must be {', '.join(names)}, in this order")
        wanted = comment_rows(list(names))
        tell(all_pairs(data, wanted), wanted, comment_causes(list(names)),
             "the comments kept, or their labels, are wrong")
        where = data["train"].info.description
        expect(where == "folder", "the data came from the folder, but "
               f"train.info.description (what source_of reads) says {where!r}")

    @battery.property("refuses a folder that is missing, incomplete or broken")
    def folder_broken(function):
        expect_no_folder(function)
        files = comment_files()
        missing_causes(function, files, list(files), "nothing else may stand in")
        for line, hint in (
            ("text\t8\tid", "a label 8 that no name has"),
            ("text\t-1\tid", "a label -1"),
            ("text\t\tid", "a comment without a label"),
            ("text\tjoy\tid", "a label that is no number"),
            ("text", "a line without tabs"),
        ):
            refuses_files(
                function, {**files, "go_emotions/dev.tsv": f"fine\t1\tid0\n{line}\n"},
                f"{hint} must be refused by a ValueError", (ValueError, AssertionError),
            )

    @battery.property("asks the Hub, or its cache, where there is no folder")
    def hub_read(function):
        from datasets import ClassLabel, Dataset, DatasetDict, Features, Sequence, Value

        features = Features({
            "text": Value("string"), "labels": Sequence(ClassLabel(names=GO_NAMES)),
            "id": Value("string"),
        })
        answer = DatasetDict({
            split: Dataset.from_dict({
                "text": [t for t, _ in rows], "labels": [i for _, i in rows],
                "id": [str(i) for i in range(len(rows))],
            }, features) for split, rows in COMMENTS.items()
        })
        data = from_hub(
            function, ("google-research-datasets/go_emotions", "simplified", answer)
        )
        expect_splits(data)
        wanted = comment_rows(list(names))
        tell(all_pairs(data, wanted), wanted, comment_causes(list(names)),
             "the comments kept, or their labels, are wrong")
        where = data["train"].info.description
        expect(where == "hub", "the data came from the Hub, but "
               f"train.info.description (what source_of reads) says {where!r}")

    @battery.property(source)
    def last_resort(function):
        if battery is go_battery:
            with machine():
                refuses(
                    function, function.thing, "without folder, Hub and cache there "
                    "are no such labels: ConnectionError must say so. The sample "
                    "holds six emotions only", (ConnectionError,),
                )
            return
        try:
            data, notices = with_notice(function)
        except Broke as broke:
            raise Wrong(
                "without a folder, Hub and cache it must give the sample, with a "
                f"warning. It {broke}"
            ) from None
        the_notice(data, notices)


add_comment_loader(
    six_battery, EMOTIONS, "without folder and Hub gives the sample, and says so"
)
add_comment_loader(go_battery, GO_NAMES, "without folder and Hub raises ConnectionError")


# comparison_key

key_battery = Battery(
    "comparison_key", "comparison_key(text) -> str", chapter=1, takes=("text",)
)


def key_of(text):
    """The key of a text."""
    return " ".join(re.findall(r"\w+", html.unescape(text).casefold())) or text.strip()


def their_key(subject):
    """The reader's own comparison_key where it works, else ours."""
    key = names_of(subject).get("comparison_key", key_of)
    try:
        subject.run(key, "so sad")
    except Broke:
        return key_of
    return key


def add_key_probe(name, alike, probes):
    """Pairs of texts whose keys must be equal, or must differ."""
    @key_battery.property(name)
    def test(function):
        for one, other, hint in probes:
            keys = [function(text) for text in (one, other)]
            for key in keys:
                expect(
                    isinstance(key, str),
                    f"the key must be a string, but it is a {type(key).__name__}: "
                    "' '.join(words) makes one",
                )
            expect(
                (keys[0] == keys[1]) == alike,
                f"{hint}. The keys of {one!r} and {other!r} must "
                f"{'be the same' if alike else 'differ'}, but they are "
                f"{keys[0]!r} and {keys[1]!r}",
            )


add_key_probe("differs for other words", False, (
    ("not sad", "sad", "common words such as not must count: nothing may be left "
     "out"),
    ("not sad, just happy", "not happy, just sad", "the order of the words must "
     "count: they are sorted, or put into a set"),
    ("so sad", "so so sad", "how often a word stands there must count: no set"),
    ("every day", "everyday", "words must not grow together: join with a space"),
    ("🙂", "🙁", "texts without words all get the same key, such as the empty "
     "string: such a text must stand for itself"),
    ("!!!", "???", "texts without words all get the same key: such a text must "
     "stand for itself"),
    ("7 days", "8 days", "digits count as words"),
    ("cafe", "café", "letters beyond ASCII are dropped or changed: \\w+ knows them"),
    ("привет", "здравствуй", "letters beyond ASCII are dropped: \\w+ knows them, "
     "[a-z]+ does not"),
    ("I am sad", "a am sad", "short words must count"),
    ("so sad", "so glad", "the words must count"),
    ("a b", "a c", "the last word is lost"),
    ("one two three four five six", "one two three four five seven", "only the first "
     "words count: all must"),
    ("two three four five six", "one three four five six", "the first word is lost"),
))
add_key_probe("is the same for the same words", True, (
    ("Not Sad", "not sad", "case must not count: casefold the text"),
    ("so  sad\ttoday", "so sad today", "spacing must not count: take the words and "
     "join them with one space"),
    (" so sad ", "so sad", "spaces at the ends must not count"),
    ("so sad.", "so sad", "punctuation at the end must not count"),
    ("«so», “sad”…", "so sad", "punctuation beyond ASCII must not count: "
     "string.punctuation knows ASCII only. Take the words, \\w+"),
    ("so,sad", "so sad", "punctuation is deleted, so two words grow together: it "
     "must count as a gap, as a space does"),
    ("done ✅", "done", "an emoji beside words must not count"),
    ("bread &amp; butter", "bread & butter", "HTML entities must not count: "
     "html.unescape first, or amp counts as a word"),
    ("don&#39;t", "don't", "HTML entities by number must not count: html.unescape "
     "knows them all"),
    ("so&nbsp;sad &hearts;", "so sad", "HTML entities by name must not count: "
     "html.unescape knows them all, a list of five does not"),
    ("STRASSE", "straße", "lower() leaves ß as it is: casefold() is made for "
     "comparing"),
    ("  🙂", "🙂 ", "spaces around a text without words must not count"),
))


# held_out_keys and remove_held_out

held_battery = Battery("held_out_keys", "held_out_keys() -> a set of str", chapter=1)


@held_battery.property("holds validation and test of both tasks")
def held_all(function):
    key = their_key(function)
    with folder_with({**tweet_files(), **comment_files()}) as folder, machine(folder):
        found = function()
        texts = {
            (task, split): [text for text, *_ in rows[split]]
            for task, rows in (
                ("tweets", TWEETS), ("comments", comment_rows(list(EMOTIONS))))
            for split in SPLITS
        }
        raw = {
            ("comments", split): [text for text, _ in COMMENTS[split]]
            for split in SPLITS
        }

        def keys(tasks=("tweets", "comments"), splits=SPLITS[1:], rule=key, of=texts):
            return {
                rule(text) for task in tasks for split in splits
                for text in (of.get((task, split)) or texts[task, split])
            }

        wanted = keys()
        any_label = {
            ("comments", split): [t for t, labels in COMMENTS[split] if len(labels) == 1]
            for split in SPLITS
        }
        raw_keys = keys(of={**texts, **raw})
        causes = [
            ("only the test splits are held out: choices are made on validation, so "
             "its texts must not be trained on either", keys(splits=("test",))),
            ("only the validation splits are held out: test is missing",
             keys(splits=("validation",))),
            ("the train splits are held out too: nothing would be left to train on",
             keys(splits=SPLITS)),
            ("only the tweets are held out: a text may be test in one task and "
             "training in the other", keys(("tweets",))),
            ("only the comments are held out: a text may be test in one task and "
             "training in the other", keys(("comments",))),
            ("these are the texts themselves: take comparison_key of each",
             keys(rule=str)),
            ("comments that bear none of our labels, or several, are held out as "
             "well: use load_six_emotions", raw_keys),
            ("comments with labels of others than the six are held out as well: use "
             "load_six_emotions, not load_go_emotions",
             keys(of={**texts, **any_label})),
            ("train and test of the tasks are held out: validation is meant",
             keys(splits=("train", "test"))),
        ]
        expect(
            not isinstance(found, (list, tuple)),
            "it gives a list: looking into a list takes time for each text of a "
            "large collection, so give a set",
        )
        expect(
            found is None or isinstance(found, (set, frozenset)),
            f"it must give a set, but it gives a {type(found).__name__}",
        )
        tell(found, wanted, causes, "the keys are not those of all validation and "
             "test texts")


remove_battery = Battery(
    "remove_held_out", "remove_held_out(dataset, keys) -> Dataset", chapter=1,
    takes=("dataset", "keys"),
)
REMOVE_ROWS = [("b", 0), ("A test!", 1), ("a", 2), ("a TEST", 3), ("b", 4), ("test a", 5)]


@remove_battery.property("takes out every text whose key is held out")
@no_bars()
def remove_rows(function):
    data = made(REMOVE_ROWS, EMOTIONS, "folder")
    key = their_key(function)
    keys = {key("a test"), key("something else")}
    clean = function(data, keys)
    if clean is not None:
        expect_dataset(clean)
    kept = [REMOVE_ROWS[i] for i in (0, 2, 4, 5)]
    tell(clean if clean is None else pairs(clean), kept, [
        ("nothing is taken out: texts are compared letter for letter, but keys are "
         "keys. Take comparison_key of each text", REMOVE_ROWS),
        ("the choice is inverted: it keeps what is held out",
         [REMOVE_ROWS[i] for i in (1, 3)]),
        ("only the first copy of a held-out text is taken out",
         [REMOVE_ROWS[i] for i in (0, 2, 3, 4, 5)]),
        ("texts that stand twice are taken out as well: only held-out ones may go",
         [REMOVE_ROWS[i] for i in (0, 2, 5)]),
        ("it looks for the key inside the text, or for shared words: only texts whose "
         "whole key is held out may go", [REMOVE_ROWS[i] for i in (0, 4)]),
        ("it looks for texts inside a key, or for keys inside a text: only texts whose "
         "whole key is held out may go", [REMOVE_ROWS[i] for i in (0, 4, 5)]),
        ("the rows are in another order", sorted(kept)),
        ("texts are only lower-cased: punctuation counts too then. Take "
         "comparison_key of each", [REMOVE_ROWS[i] for i in (0, 1, 2, 4, 5)]),
        ("the order of words is ignored: take comparison_key of each text",
         [REMOVE_ROWS[i] for i in (0, 2, 4)]),
        ("texts and labels slip against each other: take whole rows out, with "
         "select or filter",
         list(zip([t for t, _ in kept], range(4), strict=True))),
    ], "the rows left are wrong")


@remove_battery.property("leaves the rest as it was")
@no_bars()
def remove_rest(function):
    data = made(REMOVE_ROWS, EMOTIONS, "folder")
    clean = function(data, set())
    expect_dataset(clean)
    tell(pairs(clean), REMOVE_ROWS, [], "with no keys nothing may be taken out")
    tell(label_names(clean), list(EMOTIONS), [], "the label names got lost: select "
         "keeps them, a new Dataset from lists does not")
    tell(clean.info.description, "folder", [], "the description, which says where the "
         "posts come from, got lost: select keeps it, a new Dataset does not")
    tell(len(data), len(REMOVE_ROWS), [], "the dataset passed in was changed")


# Exercises

guess_battery = Battery(
    "guess_like_the_data",
    "guess_like_the_data(labels, times=100, seed=0) -> (accuracy, macro-F1)",
    chapter=1, takes=("labels", "times", "seed"),
)


@guess_battery.property("guesses each label as often as it occurs")
def guess_band(function):
    labels = 80 * [0] + 30 * [1] + 10 * [2]
    random.Random(0).shuffle(labels)
    result = function(list(labels), times=20, seed=0)
    expect(
        isinstance(result, (tuple, list)) and len(result) == 2,
        f"it must give two numbers, accuracy and macro-F1, but it gives {result!r}",
    )
    accuracy, macro = (float(x) for x in result)
    shares = np.bincount(labels) / len(labels)
    right = float((shares**2).sum())  # 0.51; macro-F1 comes out near 1/3

    def between(value, middle, width=0.04):
        return abs(value - middle) < width

    if between(accuracy, right) and between(macro, 1 / 3):
        return
    for holds, hint in (
        (accuracy > 0.99, "the guesses are the labels themselves"),
        (accuracy == macro, "both numbers are the same: accuracy comes first, then "
         "macro-F1 with average='macro' (micro-F1 is the accuracy)"),
        (between(macro, right) and between(accuracy, 1 / 3),
         "the two numbers have changed places: accuracy comes first"),
        (between(accuracy, 1 / 3), "the guesses are even: every label must be drawn "
         "as often as it occurs in labels, so pass its shares as p="),
        (between(accuracy, shares.max(), 0.01), "it always says the commonest label: "
         "draw each one as often as it occurs"),
        (between(accuracy, right), "the accuracy is as it must be, but macro-F1 must "
         "be near 1/3: average='macro', not 'micro' or 'weighted'"),
    ):
        expect(not holds, f"{hint}. It gives {accuracy:.2f} and {macro:.2f}")
    raise Wrong(
        f"for labels with the shares {shares.round(2).tolist()} the accuracy must be "
        f"near {right:.2f}, the sum of the squared shares, and macro-F1 near 0.33, but "
        f"they are {accuracy:.2f} and {macro:.2f}"
    )


@guess_battery.property("gives the same for the same seed, and a mean of many")
def guess_seed(function):
    labels = 4 * [0] + 3 * [1] + [2]
    one, same_, other = (
        tuple(map(float, function(list(labels), times=5, seed=s))) for s in (1, 1, 2)
    )
    expect(one == same_, "the same seed gives another answer: make a generator from "
           "seed inside the function")
    expect(one != other, "every seed gives the same answer: is seed used?")
    few = {float(function(list(labels), times=1, seed=s)[0])
           for s in range(4)}
    expect(all(abs(8 * x - round(8 * x)) < 1e-6 for x in few),
           "times=1 must be one set of guesses: its accuracy is a number of eighths")
    many = [float(function(list(labels), times=20, seed=s)[0])
            for s in range(3)]
    expect(max(many) - min(many) < 0.2, "20 sets of guesses scatter as widely as "
           "single ones: give the mean over all sets, not the last")


named_battery = Battery(
    "emotion_named", "emotion_named(text) -> the number of an emotion", chapter=1,
    takes=("text",),
)
NAMED = (
    ("pure joy", 1, "the name of the emotion stands in the text"),
    ("the sadness of it", 3, "the name of the emotion stands in the text"),
    ("nothing named", 1, "no emotion is named: the answer must be joy, number 1"),
    ("", 1, "an empty text names nothing: the answer must be joy, number 1"),
    ("full of LOVE", 5, "case must not count: compare words of comparison_key"),
    ("so much love!", 5, "punctuation sticks to the word: compare words of "
     "comparison_key, not text.split()"),
    ("my lovely fearless angel", 1, "it looks for the name anywhere in the text, so "
     "lovely counts as love: compare whole words"),
    ("love and fear", 4, "several are named: the first in the order of EMOTIONS "
     "counts, so go through the emotions, not through the words"),
    ("sadness, then anger", 0, "several are named: the first in the order of EMOTIONS "
     "counts. And number 0 is an answer: `or` takes it for none"),
)


@named_battery.property("answers with the first emotion named, else joy")
def named_right(function):
    for text, wanted, hint in NAMED:
        answer = function(text)
        tell(answer, wanted, [
            ("it answers with the name: its number in EMOTIONS is wanted",
             EMOTIONS[wanted]),
            ("it gives nothing where no emotion is named: joy is the answer", -1),
        ], hint, text)


torn_battery = Battery(
    "torn_texts", "torn_texts(texts, labels) -> (texts, posts, best)", chapter=1,
    takes=("texts", "labels"),
)


@torn_battery.property("counts texts with more than one label")
def torn_right(function):
    texts = ["So sad!", "so sad", "so SAD.", "well", "well!", "oh", "oh", "alone", "me"]
    labels = [3, 3, 0, 1, 2, 5, 5, 4, 0]
    result = function(list(texts), list(labels))
    expect(
        isinstance(result, (tuple, list)) and len(result) == 3,
        "it must give three numbers: different texts, posts, and how many of those "
        f"posts can be right at best; it gives {result!r}",
    )
    tell(tuple(result), (2, 5, 3), [
        ("the same text with the same label twice is counted as torn", (3, 7, 5)),
        ("texts are compared letter for letter: compare by comparison_key", (0, 0, 0)),
        ("texts are only lower-cased: compare by comparison_key", (0, 0, 0)),
        ("best counts one right for each text: the best answer to a text is its "
         "commonest label, and it is right as often as that occurs", (2, 5, 2)),
        ("all texts are counted, not only those with several labels", (5, 9, 7)),
        ("posts counts labels, not posts", (2, 4, 3)),
        ("best is a share: give the number of posts", (2, 5, 0.6)),
        ("all posts are counted in the second number", (2, 9, 3)),
        ("the smallest count is taken for the best answer", (2, 5, 2)),
    ], "the three numbers are wrong", texts)
    tell(tuple(function(["a", "b"], [0, 1])), (0, 0, 0), (),
         "where no text is torn, all three are 0")


own_battery = Battery(
    "load_own_posts", "load_own_posts(path) -> Dataset", chapter=1, takes=("path",)
)


@own_battery.property("reads label and text, and numbers as EMOTIONS does")
def own_right(function):
    content = "joy\tnot sad, just happy\nsadness\tnot happy,\u2028just sad\nlove\t you \n"
    with folder_with({"mine.tsv": content}) as folder:
        data = function(folder / "mine.tsv")
    expect_dataset(data)
    tell(label_names(data), list(EMOTIONS), [
        ("only the names that occur are known: use all six, in their order",
         ["joy", "sadness", "love"]),
    ], "the names must be EMOTIONS, in their order")
    tell(pairs(data), [("not sad, just happy", 1), ("not happy,\u2028just sad", 3),
                       (" you ", 5)], [
        ("the labels are numbered as they occur: use their place in EMOTIONS",
         [("not sad, just happy", 0), ("not happy,\u2028just sad", 1), (" you ", 2)]),
        ("texts are stripped", [("not sad, just happy", 1),
                                ("not happy,\u2028just sad", 3), ("you", 5)]),
    ], "texts or labels are wrong: a line is label, tab, text")


@own_battery.property("names the line of a misspelt label")
def own_wrong(function):
    with folder_with({"mine.tsv": "joy\ta\njoy\tb\nsadnes\tc\n"}) as folder:
        text = refuses(
            function, lambda: function.thing(folder / "mine.tsv"),
            "a misspelt label must be refused by a ValueError, not be left out or "
            "become another emotion", (ValueError,),
        )
    expect("3" in text, "the error does not say in which line the misspelt label "
           f"stands: hand the name to to_dataset, whose check counts lines. It says: "
           f"{short(text)}")
    expect("sadnes" in text, f"the error does not quote the label: {short(text)}")


copies_battery = Battery(
    "near_copies",
    "near_copies(texts, others, threshold=0.6) -> a list of pairs (i, j)", chapter=1,
    takes=("texts", "others", "threshold"),
)


def overlap_of(one, other, key=key_of):
    """Shared words by all words."""
    one, other = set(key(one).split()), set(key(other).split())
    return len(one & other) / max(len(one | other), 1)


def brute(texts, others, threshold, how=overlap_of):
    """All pairs, one by one."""
    return [
        (i, j) for i, a in enumerate(texts) for j, b in enumerate(others)
        if how(a, b) >= threshold
    ]


COPY_TEXTS = ["so happy to be here today", "Who took my BICYCLE?", "one two three four",
              "rain rain rain again", "never seen", "a b c d e", "🙂"]
COPY_OTHERS = ["so happy to be here, today!", "who took my old bicycle",
               "one two five six", "rain again", "seen never", "a b c",
               "happy to be here", "a b", "a b c d e f g h i", "🙁", "🙂"]


@copies_battery.property("finds the pairs that share enough words")
def copies_right(function):
    for threshold in (0.6, 0.3, 1.0):
        pairs_ = function(list(COPY_TEXTS), list(COPY_OTHERS), threshold=threshold)
        expect(isinstance(pairs_, (list, set, tuple)),
               f"it must give a list of pairs, not a {type(pairs_).__name__}")
        found = sorted(tuple(int(i) for i in pair[:2]) for pair in pairs_)

        def with_rule(rule, threshold=threshold, split=lambda t: set(key_of(t).split())):
            return brute(COPY_TEXTS, COPY_OTHERS, threshold,
                         lambda a, b: rule(split(a), split(b)))

        def jaccard(a, b):
            return len(a & b) / max(len(a | b), 1)

        tell(found, brute(COPY_TEXTS, COPY_OTHERS, threshold), [
            ("each pair is found twice: once for each word that is shared",
             sorted(2 * brute(COPY_TEXTS, COPY_OTHERS, threshold))),
            ("what is shared is divided by the words of the first text, not by all "
             "different words of both",
             lambda: with_rule(lambda a, b: len(a & b) / len(a))),
            ("what is shared is divided by the words of the second text, not by all "
             "different words of both",
             lambda: with_rule(lambda a, b: len(a & b) / len(b))),
            ("what is shared is divided by the shorter text, so a piece of a text "
             "counts as a copy: divide by all different words of both",
             lambda: with_rule(lambda a, b: len(a & b) / min(len(a), len(b)))),
            ("what is shared is divided by the longer text: divide by all different "
             "words of both",
             lambda: with_rule(lambda a, b: len(a & b) / max(len(a), len(b)))),
            ("this is the Dice coefficient, twice the shared words by the sum: "
             "divide the shared words by all different words of both",
             lambda: with_rule(lambda a, b: 2 * len(a & b) / (len(a) + len(b)))),
            ("words are split at spaces as they stand: take comparison_key first",
             lambda: with_rule(jaccard, split=lambda t: set(t.split()))),
            ("words are only lower-cased: take comparison_key first",
             lambda: with_rule(jaccard, split=lambda t: set(t.lower().split()))),
            ("letters are compared, not words",
             lambda: with_rule(jaccard, split=lambda t: set(key_of(t)))),
            ("a pair exactly at the threshold must be found: >=, not >",
             brute(COPY_TEXTS, COPY_OTHERS, threshold + 1e-9)),
            ("the pairs are turned round: (place in texts, place in others)",
             sorted((j, i) for i, j in brute(COPY_TEXTS, COPY_OTHERS, threshold))),
        ], f"with a threshold of {threshold} other pairs are found than by comparing "
           "each with each")


@copies_battery.property("does not compare every text with every other")
def copies_fast(function):
    chance = random.Random(0)
    words = [f"w{i}" for i in range(4000)]
    texts = [" ".join(chance.choices(words, k=12)) for _ in range(500)]
    others = [" ".join(chance.choices(words, k=12)) for _ in range(490)] + texts[:10]
    sets = [set(t.split()) for t in others]
    start = time.process_time()
    for text in texts[:80]:
        one = set(text.split())
        [j for j, other in enumerate(sets) if len(one & other) >= 0.6 * len(one | other)]
    limit = 0.5 * (time.process_time() - start) * len(texts) / 80
    hint = (
        "comparing 500 texts with 500 takes as long as comparing each with each. Most "
        "pairs share no word at all: note for each word which texts hold it, and look "
        "at those only"
    )
    start = time.process_time()
    try:
        found = function(texts, others)
    except TimeUp:
        raise Wrong(hint) from None
    took = time.process_time() - start
    tell(sorted(tuple(map(int, p)) for p in found), [(i, 490 + i) for i in range(10)],
         (), "on 500 texts against 500 it finds other pairs than the ten copies")
    expect(took < limit, hint)
