"""Checks for chapter 09: scores, prediction files, intervals, noise, calibration."""

import contextlib
import inspect
import itertools
import math
import os
import random
import re
import tempfile
from pathlib import Path

import numpy as np
import torch

from .bench import Battery, Broke, Skip, Wrong, expect, expect_tensor, explain, near, sample

REFUSALS = (ValueError, TypeError, AssertionError)


# What all of them use


def refuses(subject, hint, *arguments, kinds=REFUSALS, error="ValueError", **named):
    """Refuse a function that takes what it must not take."""
    try:
        result = subject(*arguments, **named)
    except Broke:
        if isinstance(subject.last_error, (*kinds, NotImplementedError)):
            return
        name = type(subject.last_error).__name__
        raise Wrong(
            f"{hint}. It raises {name}, as if by accident: look at what comes in "
            f"first, and raise a {error} that says what is wrong with it"
        ) from None
    shown = " ".join(str(result).split())[:80]
    raise Wrong(f"{hint}. Raise a {error}; it gives {shown}")


def expect_float(value, what="the result"):
    """Refuse what is no plain float."""
    expect(value is not None, f"{what} is None: is there a return at the end?")
    if isinstance(value, (torch.Tensor, np.ndarray)):
        raise Wrong(
            f"{what} must be one plain float, but it is a {type(value).__name__} of "
            f"shape {tuple(value.shape)}"
            + (": end with .item()" if value.size == 1 or value.ndim == 0 else "")
        )
    expect(
        isinstance(value, (float, int)) and not isinstance(value, bool),
        f"{what} must be a plain float, but it is a {type(value).__name__}",
    )
    return float(value)


def explain_number(value, wanted, causes, otherwise, what="the result", tolerance=1e-7):
    """As `explain`, for a float; causes may be numbers or functions."""
    value = expect_float(value, what)
    expect(
        not math.isnan(value),
        f"{what} is NaN: somewhere 0 is divided by 0. Where there is nothing to "
        "divide by, the number is 0",
    )

    def double(x):
        return torch.tensor(float(x), dtype=torch.float64)

    explain(
        double(value), double(wanted),
        [(hint, lambda v=v: double(v() if callable(v) else v)) for hint, v in causes],
        otherwise, tolerance,
    )


def default_of(subject, name):
    """The default of an argument of the reader's function, None if it has none."""
    try:
        default = inspect.signature(subject.thing).parameters[name].default
    except (KeyError, TypeError, ValueError):
        return None
    return None if default is inspect.Parameter.empty else default


@contextlib.contextmanager
def own_generators(hint):
    """Refuse code that touches the generators which everybody shares."""
    def states():
        return (random.getstate(), np.random.get_state()[1].tobytes(),
                np.random.get_state()[2], torch.get_rng_state().numpy().tobytes())

    before = states()
    yield
    expect(states() == before, hint)


# Confusion matrices and what is read off them, in float64


def tally(labels, chosen, num_labels):
    """(…, texts) labels and answers -> (…, num_labels, num_labels) counts."""
    labels, chosen = np.broadcast_arrays(labels, chosen)
    cells = (labels * num_labels + chosen).reshape(-1, labels.shape[-1])
    kinds = num_labels**2
    offsets = kinds * np.arange(len(cells))[:, None]
    counts = np.bincount((cells + offsets).ravel(), minlength=kinds * len(cells))
    return counts.reshape(*labels.shape[:-1], num_labels, num_labels)


def ratio(above, below, empty=0.0):
    """Divide; where there is nothing to divide by, give ``empty``."""
    above, below = np.broadcast_arrays(np.asarray(above, float), np.asarray(below, float))
    return np.where(below == 0, empty, above / np.where(below == 0, 1, below))


def hits(c):
    return np.diagonal(c, axis1=-2, axis2=-1).astype(float)


def total(c):
    return c.sum((-2, -1))


def precision_of(c, empty=0.0):
    return ratio(hits(c), c.sum(-2), empty)


def recall_of(c, empty=0.0):
    return ratio(hits(c), c.sum(-1), empty)


def f1_of(c, empty=0.0):
    return ratio(2 * hits(c), c.sum(-1) + c.sum(-2), empty)


def harmonic(a, b):
    return ratio(2 * a * b, a + b)


def macro_of(c):
    return f1_of(c).mean(-1)


def mean_where(values, there):
    """Mean over the classes that are there."""
    return ratio((values * there).sum(-1), there.sum(-1))


def matthews(c):
    t, p, n = c.sum(-1).astype(float), c.sum(-2).astype(float), total(c).astype(float)
    return ratio(hits(c).sum(-1) * n - (t * p).sum(-1),
                 np.sqrt((n**2 - (t**2).sum(-1)) * (n**2 - (p**2).sum(-1))))


def kappa(c):
    chance = ratio((c.sum(-1) * c.sum(-2)).sum(-1), total(c) ** 2.0)
    return ratio(ratio(hits(c).sum(-1), total(c)) - chance, 1 - chance)


SAME = "Macro-F1 is the F1 of each class, then their plain mean"
ABSENT = (
    "a class is left out of the mean if {}: the mean runs over all num_labels "
    "classes, and such a class counts as 0. (scikit-learn averages over the classes "
    "that it sees, unless it is told labels=)"
)
# Hints, and what somebody who makes that mistake takes for macro-F1.
NOT_MACRO = [
    (f"this is the accuracy, which is also micro-F1. {SAME}",
     lambda c: ratio(hits(c).sum(-1), total(c))),
    ("this is weighted F1: each class counts by how many texts it has. In macro-F1 "
     "each counts the same", lambda c: (f1_of(c) * ratio(c.sum(-1), total(c)[..., None])).sum(-1)),
    ("the classes are weighted by how often they were answered. In macro-F1 each "
     "counts the same",
     lambda c: (f1_of(c) * ratio(c.sum(-2), total(c)[..., None])).sum(-1)),
    ("this is the F1 of the mean precision and the mean recall. It goes by the same "
     f"name, but is another number. {SAME}",
     lambda c: harmonic(precision_of(c).mean(-1), recall_of(c).mean(-1))),
    ("this is the mean recall (balanced accuracy), not the mean F1",
     lambda c: recall_of(c).mean(-1)),
    ("this is the mean precision, not the mean F1", lambda c: precision_of(c).mean(-1)),
    (ABSENT.format("it is neither there nor answered"),
     lambda c: mean_where(f1_of(c), c.sum(-1) + c.sum(-2) > 0)),
    (ABSENT.format("it has no texts"), lambda c: mean_where(f1_of(c), c.sum(-1) > 0)),
    (ABSENT.format("it is never answered"),
     lambda c: mean_where(f1_of(c), c.sum(-2) > 0)),
    (ABSENT.format("its precision or its recall is 0 / 0"),
     lambda c: mean_where(f1_of(c), (c.sum(-1) > 0) & (c.sum(-2) > 0))),
    (ABSENT.format("its F1 is 0"), lambda c: mean_where(f1_of(c), f1_of(c) > 0)),
    ("a class that is neither there nor answered counts as 1: it must count as 0",
     lambda c: f1_of(c, 1.0).mean(-1)),
    ("0 / 0 counts as 1: a class that is never answered has precision 0, one "
     "without texts has recall 0",
     lambda c: harmonic(precision_of(c, 1.0), recall_of(c, 1.0)).mean(-1)),
    ("it is not divided by the number of classes: the sum of the F1s, not the mean",
     lambda c: f1_of(c).sum(-1)),
    ("it is divided by something else than the number of classes",
     lambda c: f1_of(c).sum(-1) / (c.shape[-1] - 1)),
    ("precision and recall are averaged by a plain mean: F1 is their harmonic mean, "
     "2PR / (P + R)", lambda c: ((precision_of(c) + recall_of(c)) / 2).mean(-1)),
    ("the root of P · R is a geometric mean: F1 is the harmonic one, 2PR / (P + R)",
     lambda c: np.sqrt(precision_of(c) * recall_of(c)).mean(-1)),
    ("the factor 2 is missing: F1 = 2PR / (P + R)", lambda c: f1_of(c).mean(-1) / 2),
    ("the numerator is P · R without P + R below it",
     lambda c: (2 * precision_of(c) * recall_of(c)).mean(-1)),
    ("hits over hits and misses is the Jaccard index: F1 counts hits twice, above and "
     "below the line",
     lambda c: ratio(hits(c), c.sum(-1) + c.sum(-2) - hits(c)).mean(-1)),
    ("the hits are not counted twice: F1 is 2 · hits over texts of the class plus "
     "answers of it", lambda c: ratio(hits(c), c.sum(-1) + c.sum(-2)).mean(-1)),
    ("this is the F1 of class 1 alone: average over all classes",
     lambda c: f1_of(c)[..., 1]),
    ("this is the F1 of class 0 alone: average over all classes",
     lambda c: f1_of(c)[..., 0]),
    ("this is the F1 of the last class alone: average over all classes",
     lambda c: f1_of(c)[..., -1]),
    ("class 0 is left out of the mean", lambda c: f1_of(c)[..., 1:].mean(-1)),
    ("the last class is left out of the mean", lambda c: f1_of(c)[..., :-1].mean(-1)),
    ("this is the median of the F1s, not their mean", lambda c: np.median(f1_of(c), -1)),
    ("this is the best class's F1, not the mean", lambda c: f1_of(c).max(-1)),
    ("this is the worst class's F1, not the mean", lambda c: f1_of(c).min(-1)),
    ("this is the geometric mean of the F1s: take the plain one",
     lambda c: np.prod(f1_of(c), -1) ** (1 / c.shape[-1])),
    ("this is the harmonic mean of the F1s: take the plain one",
     lambda c: ratio(c.shape[-1], ratio(1, f1_of(c), np.inf).sum(-1))),
    ("the sum of the F1s is divided by the number of texts, not of classes",
     lambda c: ratio(f1_of(c).sum(-1), total(c))),
    ("this is F2, which weighs recall more than precision: F1 weighs them alike",
     lambda c: ratio(5 * hits(c), 4 * c.sum(-1) + c.sum(-2)).mean(-1)),
    ("this is F½, which weighs precision more than recall: F1 weighs them alike",
     lambda c: ratio(1.25 * hits(c), 0.25 * c.sum(-1) + c.sum(-2)).mean(-1)),
    ("this is Matthews' coefficient, not macro-F1", matthews),
    ("this is Cohen's kappa, not macro-F1", kappa),
    ("this is the share of wrong answers", lambda c: 1 - ratio(hits(c).sum(-1), total(c))),
    ("this is 1 minus macro-F1", lambda c: 1 - macro_of(c)),
]
PERCENT = "it is in percent: scores are in [0, 1] here"
ROUNDED = "it is rounded: keep all digits, and round where you print"


def number_causes(wanted, measures, *matrix):
    """Causes for one number: other measures, in percent, rounded."""
    found = [(hint, lambda m=m: m(*matrix)) for hint, m in measures]
    found += [(PERCENT, 100 * wanted)]
    return found + [(ROUNDED, round(wanted, digits)) for digits in (4, 3, 2, 1)]


MATRIX = np.array([[5, 2, 3, 0, 1], [0, 7, 1, 2, 0], [2, 0, 12, 1, 0], [1, 3, 0, 2, 1],
                   [1, 0, 1, 4, 9]])
# Class 1 is never answered, 2 and 5 have no texts, 4 is nowhere, 6 has no hit.
HOLES = np.zeros((7, 7), dtype=int)
HOLES[0, [0, 2, 3, 5, 6]] = 5, 2, 1, 1, 1
HOLES[1, [0, 2]] = 4, 1
HOLES[3, [0, 3, 5]] = 1, 7, 1
HOLES[6, 3] = 2


def spread_out(matrix, seed=0):
    """Turn a confusion matrix into shuffled labels and answers."""
    pairs = [(i, j) for i, row in enumerate(matrix.tolist())
             for j, count in enumerate(row) for _ in range(count)]
    random.Random(seed).shuffle(pairs)
    return [i for i, _ in pairs], [j for _, j in pairs]


# confusion_matrix

confusion_battery = Battery(
    "confusion_matrix",
    "confusion_matrix(labels, chosen, num_labels) -> (num_labels, num_labels) int64",
    chapter=9, takes=("labels", "chosen", "num_labels"),
)


def counted(function, labels, chosen, num_labels):
    """Call the reader's confusion_matrix; expect a square tensor."""
    try:
        result = function(labels, chosen, num_labels)
    except Broke as broke:
        if "invalid for input of size" not in str(broke):
            raise
        raise Wrong(
            "bincount gives as many counts as the largest number asks for, so a class that "
            f"is nowhere shortens it: say minlength=num_labels ** 2. It {broke}"
        ) from None
    expect_tensor(result)
    seen = 1 + int(max(np.max(np.asarray(labels)), np.max(np.asarray(chosen))))
    distinct = len(set(np.asarray(labels).tolist()) | set(np.asarray(chosen).tolist()))
    if tuple(result.shape) in {(seen, seen), (distinct, distinct)} - {(num_labels,) * 2}:
        raise Wrong(
            f"the matrix is {tuple(result.shape)}: the number of classes is taken from "
            "the data, so a class that happens to be nowhere has no row. Take "
            f"num_labels (here {num_labels}) for both axes; with bincount say "
            "minlength=num_labels ** 2"
        )
    expect_tensor(result, (num_labels, num_labels), what="the matrix")
    return result


@confusion_battery.property("counts: rows are true classes, columns answers")
def confusion_counts(function):
    labels, chosen = spread_out(MATRIX)
    wanted = torch.from_numpy(MATRIX)
    c = MATRIX.astype(float)

    def only(keep):
        return torch.from_numpy(tally(*np.array(keep).T, len(MATRIX)))

    pairs = list(zip(labels, chosen, strict=True))
    result = counted(function, labels, chosen, len(MATRIX))
    explain(result, wanted, [
        ("the matrix is transposed: rows are the true classes, columns the answers, so "
         "entry (i, j) counts texts of class i that were called j",
         lambda: wanted.T),
        ("each pair is counted once at most: m[labels, chosen] += 1 adds 1 to a cell "
         "however often it comes up. Use bincount, index_put_ with accumulate=True, "
         "or a loop", lambda: (wanted > 0).long()),
        ("only right answers are counted: the wrong ones belong beside the diagonal",
         lambda: wanted.diagonal().diag()),
        ("only wrong answers are counted: the right ones stand on the diagonal",
         lambda: wanted - wanted.diagonal().diag()),
        ("the rows are divided by their sums: these are shares, not counts",
         lambda: torch.from_numpy(c / c.sum(1, keepdims=True))),
        ("the columns are divided by their sums: these are shares, not counts",
         lambda: torch.from_numpy(c / c.sum(0))),
        ("everything is divided by the number of texts: these are shares, not counts",
         lambda: torch.from_numpy(c / c.sum())),
        ("each text is counted in both directions: add it to (true, answer) only",
         lambda: wanted + wanted.T),
        ("each text is counted twice", lambda: 2 * wanted),
        ("the classes stand in reverse order: row and column 0 are class 0",
         lambda: wanted.flip(0, 1)),
        ("the rows stand in reverse order: row 0 is class 0", lambda: wanted.flip(0)),
        ("the columns stand in reverse order: column 0 is class 0",
         lambda: wanted.flip(1)),
        ("the classes are off by one: class 0 has row 0 and column 0",
         lambda: wanted.roll((1, 1), (0, 1))),
        ("labels are compared with labels: the answers are not used",
         lambda: only([(i, i) for i in labels])),
        ("answers are compared with answers: the labels are not used",
         lambda: only([(i, i) for i in chosen])),
        ("the last text is not counted", lambda: only(pairs[:-1])),
        ("the first text is not counted", lambda: only(pairs[1:])),
        ("labels and answers are sorted, each alone: a text's label and its answer "
         "must stay together",
         lambda: only(list(zip(sorted(labels), sorted(chosen), strict=True)))),
        ("the counts start at 1: start with zeros", lambda: wanted + 1),
    ], "the counts are wrong: entry (i, j) must count the texts whose label is i and "
       f"whose answer is j. They add up to {float(result.sum()):g}, for "
       f"{len(labels)} texts")
    expect(
        result.dtype == torch.int64,
        f"counts are whole numbers: the matrix must be int64, but it is {result.dtype}",
    )


@confusion_battery.property("has a row and a column for every class")
def confusion_absent(function):
    for labels, chosen in (([0, 1, 1], [0, 1, 0]), ([0, 3, 3], [3, 0, 3]), ([2], [2])):
        result = counted(function, labels, chosen, 5)
        true, answers = np.array(labels), np.array(chosen)
        stride = 1 + max(labels + chosen)

        def narrow(cells=true * stride + answers):
            return torch.from_numpy(np.bincount(cells, minlength=25)[:25].reshape(5, 5))

        explain(
            result, torch.from_numpy(tally(true, answers, 5)), [(
                "the pairs become numbers by the largest label seen, not by num_labels: "
                "true · num_labels + answer", narrow)],
            f"with labels {labels}, answers {chosen} and 5 classes the counts stand in "
            "the wrong places: class k has row k and column k, whichever classes are "
            "seen",
        )


@confusion_battery.property("takes lists, arrays and tensors of any whole type")
def confusion_kinds(function):
    labels, chosen = spread_out(MATRIX, seed=1)
    wanted = torch.from_numpy(MATRIX)
    for name, make in (
        ("an array", np.array), ("a tensor", torch.tensor), ("a tuple", tuple),
        ("an int32 tensor", lambda v: torch.tensor(v, dtype=torch.int32)),
    ):
        try:
            result = counted(function, make(labels), make(chosen), len(MATRIX))
        except Broke as broke:
            raise Wrong(f"with {name} in place of a list it {broke}") from None
        expect(near(result, wanted), f"with {name} in place of a list it gives another "
               "matrix")
    small = np.array([19, 3, 19], dtype=np.uint8)
    explain(
        counted(function, small, small, 20),
        torch.from_numpy(tally(small.astype(int), small.astype(int), 20)), [],
        "with labels of a small type (uint8) the numbers run over: 19 · 20 + 19 does "
        "not fit into 8 bits. Convert to int64 before you compute with them",
    )


def refuse_bad_labels(function, call):
    """The refusals that every function of labels and answers owes."""
    refuses(
        function, "3 labels and 2 answers must be refused: here the rest is silently "
        "left out (zip stops at the shorter one)", *call([0, 1, 2], [0, 1]),
    )
    refuses(
        function, "2 labels and 3 answers must be refused: here the rest is silently "
        "left out (zip stops at the shorter one)", *call([0, 1], [0, 1, 2]),
    )
    refuses(
        function, "one label and three answers must be refused: one is compared with "
        "all, by broadcasting", *call([0], [0, 1, 2]),
    )
    refuses(function, "a label 3 where there are 3 classes, 0 to 2, must be refused",
            *call([0, 3], [0, 1]))
    refuses(function, "an answer 3 where there are 3 classes, 0 to 2, must be refused",
            *call([0, 1], [0, 3]))
    refuses(function, "a label -1 must be refused: as an index it means the last class",
            *call([0, -1], [0, 1]))
    refuses(function, "an answer -1 must be refused: as an index it means the last "
            "class", *call([0, 1], [0, -1]))
    refuses(function, "no texts at all must be refused: there is nothing to score",
            *call([], []))
    refuses(function, "labels that are no whole numbers (0.5) must be refused: they are "
            "cut off to whole ones, or taken for a class", *call([0.5, 1.0], [0, 1]))
    refuses(function, "answers of two axes must be refused, such as logits before their "
            "argmax", *call([0, 1], torch.tensor([[0, 1], [1, 0]])))


@confusion_battery.property("refuses what cannot be counted")
def confusion_refuses(function):
    refuse_bad_labels(function, lambda labels, chosen: (labels, chosen, 3))


# precision_recall_f1

prf_battery = Battery(
    "precision_recall_f1",
    "precision_recall_f1(confusion) -> precision, recall, f1, each (…, num_labels)",
    chapter=9, takes=("confusion",),
)


def three(function, matrix):
    """Call the reader's function; expect three tensors of (…, num_labels)."""
    result = function(torch.as_tensor(matrix).clone())
    expect(
        isinstance(result, (tuple, list, torch.Tensor)) and len(result) == 3,
        "it must return three tensors: return precision, recall, f1",
    )
    for value, what in zip(result, ("the precision", "the recall", "the F1"), strict=True):
        if isinstance(value, (float, int)) or (
            isinstance(value, torch.Tensor) and value.ndim == 0
        ):
            raise Wrong(
                f"{what} is a single number: it must be one for each class, "
                f"{matrix.shape[:-1]}. Averaging is macro_f1's part"
            )
        if isinstance(value, torch.Tensor) and value.ndim == matrix.ndim - 1 \
                and value.shape[-1] < matrix.shape[-1]:
            raise Wrong(
                f"{what} has {value.shape[-1]} numbers for {matrix.shape[-1]} classes: "
                "a class that is absent or never answered keeps its place, with a 0"
            )
        expect_tensor(value, matrix.shape[:-1], what=what)
    return result


def class_measures(c):
    """What is mistaken for precision, recall or F1 of a class."""
    p, r, t, a, h = precision_of(c), recall_of(c), c.sum(-1), c.sum(-2), hits(c)
    n = total(c)[..., None]
    wrong = n - t - a + h  # neither of the class nor called it
    return [
        ("the accuracy stands in each class", ratio(h.sum(-1, keepdims=True), n) + 0 * h),
        ("the hits are divided by the number of all texts", ratio(h, n)),
        ("true negatives count as hits: this is the accuracy of class against rest",
         ratio(h + wrong, n)),
        ("this is the Jaccard index, hits over everything that was there or answered",
         ratio(h, t + a - h)),
        ("this is the specificity, of the texts of other classes", ratio(wrong, n - t)),
        ("these are the hits, divided by nothing", h),
        ("the wrong answers stand above the line: 1 minus precision", 1 - p),
        ("the wrong answers stand above the line: 1 minus recall", 1 - r),
        ("hits over misses: the hits themselves must be counted below the line too "
         "(the whole row or column)", ratio(h, t - h)),
        ("hits over false alarms: the hits themselves must be counted below the line "
         "too (the whole row or column)", ratio(h, a - h)),
        *(("a small number is added below the line (eps, smoothing), so the result is "
           "not exact: divide by at least 1 instead, clamp_min(1)", h / (d + eps))
          for d in (a, t) for eps in (1, 0.1, 0.01, 1e-3, 1e-4, 1e-5)),
        ("this is how often the class was answered", ratio(a, n)),
        ("this is how often the class is there", ratio(t, n)),
        ("the numbers are in percent: they must be in [0, 1]", 100 * p),
        ("the numbers are in percent: they must be in [0, 1]", 100 * r),
        ("the numbers are in percent: they must be in [0, 1]", 100 * f1_of(c)),
        ("the division is a whole one (//, or an integer type): divide as float64",
         np.floor(p)),
        ("the division is a whole one (//, or an integer type): divide as float64",
         np.floor(r)),
    ]


def f1_measures(c):
    """What is mistaken for the F1 of a class."""
    p, r = precision_of(c), recall_of(c)
    return [
        ("this is the plain mean of precision and recall: F1 is the harmonic one, "
         "2PR / (P + R), which lies near the smaller of the two", (p + r) / 2),
        ("this is the geometric mean, the root of P · R: F1 is the harmonic one, "
         "2PR / (P + R)", np.sqrt(p * r)),
        ("the factor 2 is missing: F1 = 2PR / (P + R)", f1_of(c) / 2),
        ("P + R is missing below the line: F1 = 2PR / (P + R)", 2 * p * r),
        ("P · R is missing above the line: F1 = 2PR / (P + R)", ratio(2, p + r)),
        ("this is the smaller of precision and recall: F1 is 2PR / (P + R)",
         np.minimum(p, r)),
        ("this is the precision: F1 is 2PR / (P + R)", p),
        ("this is the recall: F1 is 2PR / (P + R)", r),
        ("this is F2, which weighs recall more", ratio(5 * p * r, 4 * p + r)),
        ("this is F½, which weighs precision more", ratio(1.25 * p * r, 0.25 * p + r)),
        ("below the line stand P · R: it must be P + R", ratio(p + r, 2 * p * r)),
        *class_measures(c),
    ]


def rounded(wanted):
    return [(ROUNDED, np.round(wanted, digits)) for digits in (4, 3, 2, 1)]


def as_causes(pairs):
    return [(hint, lambda v=v: torch.tensor(v)) for hint, v in pairs]


def as_tensors(pairs):
    return [(hint, lambda v=v: v) for hint, v in pairs]


@prf_battery.property("precision: hits over all that was answered")
def prf_precision(function):
    precision, recall, _ = three(function, torch.from_numpy(MATRIX))
    p, r = precision_of(MATRIX), recall_of(MATRIX)
    if near(precision, torch.tensor(r)):
        raise Wrong(
            "what stands as precision is the recall: of the texts that were *called* k, "
            "how many are k? So divide by the sum of column k, confusion.sum(dim=-2)"
            + ("; and the two have changed places" if near(recall, torch.tensor(p)) else "")
        )
    explain(precision, torch.tensor(p),
            as_causes([("what stands as precision is the F1: is the order precision, "
                        "recall, f1?", f1_of(MATRIX)),
                       *class_measures(MATRIX), *rounded(p)]),
            "the precision of class k is C[k, k] over the sum of column k, "
            "confusion.sum(dim=-2)", tolerance=1e-6)


@prf_battery.property("recall: hits over all that is there")
def prf_recall(function):
    _, recall, _ = three(function, torch.from_numpy(MATRIX))
    r = recall_of(MATRIX)
    explain(recall, torch.tensor(r),
            as_causes([("what stands as recall is the precision: of the texts that "
                        "*are* k, how many were found? So divide by the sum of row k, "
                        "confusion.sum(dim=-1)", precision_of(MATRIX)),
                       ("what stands as recall is the F1: is the order precision, "
                        "recall, f1?", f1_of(MATRIX)),
                       *class_measures(MATRIX), *rounded(r)]),
            "the recall of class k is C[k, k] over the sum of row k, "
            "confusion.sum(dim=-1)", tolerance=1e-6)


@prf_battery.property("F1: the harmonic mean of the two, class by class")
def prf_f1(function):
    f1 = three(function, torch.from_numpy(MATRIX))[2]
    wanted = f1_of(MATRIX)
    p, r = precision_of(MATRIX), recall_of(MATRIX)
    explain(f1, torch.tensor(wanted),
            as_causes([*f1_measures(MATRIX), *rounded(wanted),
                       ("F1 is computed from the mean precision and the mean recall",
                        harmonic(p.mean(), r.mean()) + 0 * wanted)]),
            "the F1 of a class is 2PR / (P + R), or 2 C[k, k] over the sum of row k plus "
            "the sum of column k", tolerance=1e-6)


@prf_battery.property("gives 0 where there is nothing to divide by")
def prf_empty(function):
    good = near(three(function, torch.from_numpy(MATRIX))[2], torch.tensor(f1_of(MATRIX)), 1e-6)
    for matrix in (HOLES, np.zeros((3, 3), dtype=int), np.array([[0, 3], [2, 0]])):
        result = three(function, torch.from_numpy(matrix))
        for value, what, wanted, one in zip(
            result, ("precision", "recall", "F1"),
            (precision_of(matrix), recall_of(matrix), f1_of(matrix)),
            (precision_of(matrix, 1.0), recall_of(matrix, 1.0), f1_of(matrix, 1.0)),
            strict=True,
        ):
            expect(
                not value.isnan().any(),
                f"the {what} is NaN where there is nothing to divide by: a class that is "
                "never answered has precision 0, one that is absent has recall 0, and "
                "where both are 0 the F1 is 0. Divide by at least 1, or fill in a 0",
            )
            expect(bool(value.isfinite().all()), f"the {what} is infinite where there is "
                   "nothing to divide by")
            explain(value, torch.tensor(wanted), as_causes([
                (f"the {what} of a class with nothing to divide by counts as 1: it must "
                 "count as 0", one),
                ("0 / 0 counts as 1 in precision or recall, so F1 isn't 0",
                 harmonic(precision_of(matrix, 1.0), recall_of(matrix, 1.0))),
                ("1 is added below the line even where there is something to divide by",
                 ratio(hits(matrix), matrix.sum(-2) + 1)),
            ]), f"the {what} is wrong for a matrix with empty rows or columns"
                if good else "the matrix without empty rows fails as well; mend that first",
                tolerance=1e-6)


@prf_battery.property("works for many matrices at once")
def prf_axes(function):
    matrices = (10 * sample(2, 5, 3, 3, seed=3).abs()).long()
    try:
        result = three(function, matrices)
    except Broke as broke:
        raise Wrong(
            "it takes one matrix, but axes in front must be other matrices, "
            "(…, num_labels, num_labels): count axes from the end (dim=-1, dim=-2, "
            f"diagonal(dim1=-2, dim2=-1)), and avoid .T and .diag(). It {broke}"
        ) from None
    for value, of in zip(result, (precision_of, recall_of, f1_of), strict=True):
        expect(
            near(value, torch.tensor(of(matrices.numpy())), 1e-6),
            "with axes in front of the matrix the numbers are wrong: count axes from the "
            "end (dim=-1, dim=-2, diagonal(dim1=-2, dim2=-1)); dim=0 and dim=1 are "
            "other axes there",
        )


@prf_battery.property("computes in float64")
def prf_dtype(function):
    for value in three(function, torch.from_numpy(MATRIX)):
        expect(
            value.dtype == torch.float64,
            f"the numbers are {value.dtype}: make the counts float64 (.double()) before "
            "dividing. In float32 two scores that are equal differ in the eighth digit",
        )


@prf_battery.property("refuses a matrix that is not square")
def prf_square(function):
    refuses(function, "a matrix of 2 rows and 3 columns must be refused: no class would "
            "stand on its diagonal", torch.ones(2, 3, dtype=torch.int64))


# macro_f1

macro_battery = Battery(
    "macro_f1", "macro_f1(confusion) -> float", chapter=9, takes=("confusion",),
)


@macro_battery.property("is the mean of the classes' F1s")
def macro_plain(function):
    value = function(torch.from_numpy(MATRIX).clone())
    wanted = float(macro_of(MATRIX))
    explain_number(
        value, wanted, number_causes(wanted, NOT_MACRO, MATRIX),
        f"it is not the mean of the F1s {np.round(f1_of(MATRIX), 3).tolist()}, which is "
        f"{wanted:.4f}; it gives {value}", "macro-F1",
    )


@macro_battery.property("counts every class the same, absent ones as 0")
def macro_empty(function):
    for matrix in (HOLES, np.array([[4, 0, 0], [0, 4, 0], [0, 0, 0]]),
                   np.array([[0, 3, 1], [0, 5, 0], [0, 0, 0]])):
        value = function(torch.from_numpy(matrix).clone())
        wanted = float(macro_of(matrix))
        explain_number(
            value, wanted, number_causes(wanted, NOT_MACRO, matrix),
            "with a class that is absent or never answered macro-F1 is wrong: such a "
            "class counts as 0, and the mean runs over all classes", "macro-F1",
        )


@macro_battery.property("runs from 0 to 1")
def macro_ends(function):
    explain_number(function(torch.eye(3).long() * 4), 1.0, [(PERCENT, 100)],
                   "if every answer is right, macro-F1 must be 1", "macro-F1")
    explain_number(function(torch.tensor([[0, 2], [3, 0]])), 0.0, [],
                   "if every answer is wrong, macro-F1 must be 0", "macro-F1")


# score

score_battery = Battery(
    "score", 'score(labels, chosen, num_labels) -> {"macro_f1": …, "accuracy": …}',
    chapter=9, takes=("labels", "chosen", "num_labels"),
)
NOT_ACCURACY = [
    ("what stands as accuracy is macro-F1", macro_of),
    ("what stands as accuracy is the mean recall: divide all hits by all texts",
     lambda c: recall_of(c).mean(-1)),
    ("what stands as accuracy is the mean precision: divide all hits by all texts",
     lambda c: precision_of(c).mean(-1)),
    ("the accuracy is the number of right answers: divide it by the number of texts",
     lambda c: hits(c).sum(-1)),
    ("the accuracy is the share of wrong answers", lambda c: 1 - hits(c).sum() / c.sum()),
    ("the accuracy is of each class against the rest: count a text once",
     lambda c: (1 - (c.sum(-1) + c.sum(-2) - 2 * hits(c)) / c.sum()).mean()),
    ("the right answers are divided by the number of classes",
     lambda c: hits(c).sum() / len(c)),
]


def scores(function, matrix):
    """Call the reader's score; expect a dict of two floats."""
    labels, chosen = spread_out(matrix)
    result = function(labels, chosen, len(matrix))
    expect(isinstance(result, dict), "it must return a dict with the keys macro_f1 and "
           f"accuracy, but it returns {type(result).__name__}")
    missing = {"macro_f1", "accuracy"} - set(result)
    expect(not missing, f"the dict lacks {sorted(missing)}: it has {sorted(result)}")
    right = macro_of(matrix), hits(matrix).sum() / matrix.sum()
    swapped = float(result["accuracy"]), float(result["macro_f1"])
    if right[0] != right[1] and np.allclose(swapped, right):
        raise Wrong("macro_f1 and accuracy have changed places")
    return result["macro_f1"], result["accuracy"]


@score_battery.property("gives accuracy: the share of right answers")
def score_accuracy(function):
    _, accuracy = scores(function, MATRIX)
    wanted = float(hits(MATRIX).sum() / MATRIX.sum())
    explain_number(accuracy, wanted, number_causes(wanted, NOT_ACCURACY, MATRIX),
                   f"the accuracy must be {wanted:.4f}, right answers over texts, counted "
                   f"once over all of them and not batch by batch, but it is {accuracy}",
                   "the accuracy")


@score_battery.property("gives macro-F1: the mean of the classes' F1s")
def score_macro(function):
    macro, _ = scores(function, MATRIX)
    wanted = float(macro_of(MATRIX))
    explain_number(macro, wanted, number_causes(wanted, NOT_MACRO, MATRIX),
                   "computed once over all texts (not averaged over batches) macro-F1 must be "
                   f" {wanted:.4f}, the mean of the F1s "
                   f"{np.round(f1_of(MATRIX), 3).tolist()}, but it is {macro}", "macro-F1")


@score_battery.property("averages over all num_labels classes, absent ones too")
def score_absent(function):
    for matrix in (HOLES, np.array([[4, 0, 0], [0, 4, 0], [0, 0, 0]]),
                   np.array([[0, 3, 1], [0, 5, 0], [0, 0, 0]])):
        macro, accuracy = scores(function, matrix)
        wanted, share = float(macro_of(matrix)), float(hits(matrix).sum() / matrix.sum())
        explain_number(macro, wanted, number_causes(wanted, NOT_MACRO, matrix),
                       "with a class that is absent or never answered macro-F1 is wrong: "
                       "it counts as 0, and the mean runs over all num_labels classes",
                       "macro-F1")
        explain_number(accuracy, share, number_causes(share, NOT_ACCURACY, matrix),
                       "with an absent class the accuracy is wrong", "the accuracy")


@score_battery.property("takes lists, arrays and tensors")
def score_kinds(function):
    labels, chosen = spread_out(MATRIX)
    for name, make in (("arrays", np.array), ("tensors", torch.tensor)):
        try:
            result = function(make(labels), make(chosen), len(MATRIX))
        except Broke as broke:
            raise Wrong(f"with {name} in place of lists it {broke}") from None
        expect(abs(result["macro_f1"] - macro_of(MATRIX)) < 1e-7,
               f"with {name} in place of lists macro-F1 is another one")


@score_battery.property("refuses what cannot be scored")
def score_refuses(function):
    refuse_bad_labels(function, lambda labels, chosen: (labels, chosen, 3))


# write_predictions

write_battery = Battery(
    "write_predictions", "write_predictions(path, chosen, num_labels) writes a file",
    chapter=9, takes=("path", "chosen", "num_labels"),
)


def written(function, folder, chosen, num_labels=20, before=None):
    """Let the reader write a file; return its bytes."""
    path = Path(folder) / "emotion.txt"
    if before is not None:
        path.write_bytes(before)
    function(path, chosen, num_labels)
    others = [p.name for p in Path(folder).iterdir() if p.name != path.name]
    if not path.is_file():
        raise Wrong(
            f"there is no file at the path given{f', but {others[0]}' if others else ''}: "
            "take the path as it comes, and add no ending to it"
        )
    return path.read_bytes()


@write_battery.property("writes one label id a line, in order, the last line ended too")
def write_lines(function):
    chosen = [3, 0, 10, 0]
    with tempfile.TemporaryDirectory() as folder:
        content = written(function, folder, list(chosen))
    right = "3\n0\n10\n0\n"
    text = content.decode("utf-8", "replace")
    causes = {
        "the last line has no newline: the board's script cuts at newlines and drops "
        "what follows the last one, so the last answer is lost": right[:-1],
        "there is an empty line at the end: the board reads it as one answer too "
        "many": right + "\n",
        "the answers are sorted: they must stay in the order of the texts":
            "0\n0\n3\n10\n",
        "the answers stand in reverse order": "0\n10\n0\n3\n",
        "the lines end in \\r\\n: the board's script takes the \\r for a part of the "
        "answer. Write \\n (newline=\"\\n\")": right.replace("\n", "\r\n"),
        "the ids are written as floats: 3, not 3.0": "3.0\n0.0\n10.0\n0.0\n",
        "the answers stand in one line: one answer a line": "3 0 10 0\n",
        "there is a blank at the end of each line": right.replace("\n", " \n"),
        "a Python list is written (str of it): one answer a line, nothing else":
            "[3, 0, 10, 0]",
        "there is no newline between the answers": "30100",
        "the lines are numbered: nothing but the id": "0\t3\n1\t0\n2\t10\n3\t0\n",
        "the ids are counted from 1: they are 0 … num_labels - 1": "4\n1\n11\n1\n",
        "each answer is written once (a set, a dict), or the last one is missing":
            "3\n0\n10\n",
        "the first answer is missing": "0\n10\n0\n",
        "numbers are written as np.savetxt does by default: say fmt=\"%d\"":
            "".join(f"{v:.18e}\n" for v in chosen),
    }
    for separator in (",", ", ", " ", ";", "\t"):
        causes[f"the answers are separated by {separator!r}: one answer a line"] = \
            separator.join(map(str, chosen))
    if text != right:
        for hint, wrong in causes.items():
            if wrong in (text, text + "\n", text.rstrip("\n")) and right not in (
                    text + "\n",) or text == wrong:
                raise Wrong(hint)
        if "tensor" in text:
            raise Wrong("tensors are written: take their numbers by .tolist() or int()")
        if not text.strip():
            raise Wrong("the file is empty: is it closed (with open(…) as f), and is "
                        "the text written?")
        lines = [line.split() for line in text.replace(",", " ").split("\n") if line]
        if sorted(text.split()) == sorted(right.split()):
            raise Wrong(f"the order of the answers is changed: {chosen} becomes {text!r}")
        if {line[0] for line in lines if len(line) == 1} == set("30") | {"10"}:
            raise Wrong("each answer is written once: a set or dict loses repeated answers "
                        "and their order")
        if len(lines) == 4 and all(str(i) in line for i, line in zip(chosen, lines, strict=True)):
            raise Wrong(f"there is more than the id in a line ({text[:20]!r}): the board's "
                        "script wants nothing but the id")
        if not re.search(r"\d", text):
            raise Wrong(f"names are written, {text[:20]!r}: the board wants ids")
        for first in ("label\n", "prediction\n"):
            if text.lower().endswith(right) or first in text.lower():
                raise Wrong("there is a head line: nothing but one answer a line")
        raise Wrong(f"for the answers {chosen} the file must hold {right!r}, but it holds "
                    f"{text[:60]!r}")


@write_battery.property("takes lists, arrays and tensors, and a path as a string")
def write_kinds(function):
    for name, make in (("an array", np.array), ("a tensor", torch.tensor)):
        with tempfile.TemporaryDirectory() as folder:
            content = written(function, folder, make([3, 0, 10]))
        if b"tensor" in content:
            raise Wrong("given a tensor it writes 'tensor(…)': take the numbers by "
                        ".tolist() or int()")
        expect(content.split() == [b"3", b"0", b"10"],
               f"given {name} in place of a list it writes {content[:60]!r}")
    with tempfile.TemporaryDirectory() as folder:
        function(os.path.join(folder, "x.txt"), [1, 2], 4)
        expect(os.path.isfile(os.path.join(folder, "x.txt")),
               "given the path as a string it writes no file there")


@write_battery.property("replaces an old file, whole or not at all")
def write_whole(function):
    old = b"1\n" * 50
    with tempfile.TemporaryDirectory() as folder:
        content = written(function, folder, [2, 3], 4, before=old)
        expect(not content.startswith(old), "it adds to a file that is there already: "
               "open it anew (mode \"w\", not \"a\")")
        expect(content.split() == [b"2", b"3"], "of an old, longer file something is "
               f"left: it holds {len(content.split())} lines for 2 answers")
        left = [p.name for p in Path(folder).iterdir() if p.name != "emotion.txt"]
        expect(not left, f"a draft is left beside the file: {', '.join(left)}. Rename it "
               "(os.replace), or delete it")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "emotion.txt"
        path.write_bytes(old)
        refused = False
        try:
            function(path, [1, 2, 9], 4)
        except Broke:
            refused = True
        expect(
            not refused or path.is_file() and path.read_bytes() == old,
            "an answer that is refused costs the old file: it is opened before all "
            "answers are looked at, and then half of it is there. Check first, write "
            "afterwards",
        )
        left = [p.name for p in Path(folder).iterdir() if p.name != "emotion.txt"]
        expect(not left, f"after a refused write {', '.join(left)} is left behind")
        path.write_bytes(old)
        # A second name of the old file: it shows whether that was written into.
        try:
            os.link(path, Path(folder) / "old.txt")
        except OSError:
            raise Skip("this disk has no hard links to see by") from None
        function(path, [2, 3], 4)
        expect(
            (Path(folder) / "old.txt").read_bytes() == old,
            "it writes straight into the file: if the disk is full or the program is "
            "stopped in between, half a file is there and looks whole. Write to a draft "
            "beside it and rename that (os.replace); save_atomically of chapter 08 does",
        )


@write_battery.property("refuses answers that are no label ids")
def write_refuses(function):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.txt"
        for hint, chosen in (
            ("an answer 4 where there are 4 classes, 0 to 3, must be refused", [1, 4]),
            ("an answer -1 must be refused", [1, -1]),
            ("answers that are no whole numbers (0.5) must be refused: they are cut off "
             "to whole ones", [0.5, 1.5]),
            ("names in place of ids must be refused", ["joy", "anger"]),
            ("no answers at all must be refused: an empty file is no prediction", []),
        ):
            refuses(function, hint, path, chosen, 4)
            expect(not path.exists(), "of answers that it refuses it leaves a file "
                   "behind: check first, write afterwards")


# read_predictions

read_battery = Battery(
    "read_predictions",
    "read_predictions(path, *, num_labels, length=None) -> list of ints",
    chapter=9, takes=("path", "num_labels", "length"),
)


@read_battery.property("reads the answers back, in order, as a list of ints")
def read_back(function):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "emotion.txt"
        path.write_bytes(b"3\n0\n10\n0\n7\n")
        for named in ({"length": 5}, {}):
            result = function(path, num_labels=20, **named)
            expect(result is not None, "it returns None: is there a return at the end?")
            if isinstance(result, (torch.Tensor, np.ndarray, tuple)):
                raise Wrong("it must return a list of ints, but it returns a "
                            f"{type(result).__name__}: end with .tolist() or list(…)")
            expect(isinstance(result, list), "it must return a list of ints, but it "
                   f"returns a {type(result).__name__}")
            kinds = {type(v).__name__ for v in result}
            expect("str" not in kinds, "the answers are strings: turn each line into an "
                   "int. A string is equal to no label")
            expect(kinds == {"int"}, f"the answers must be ints, but they are {kinds}")
            for hint, wrong in (
                ("the last answer is missing: split(\"\\n\") gives an empty piece after "
                 "the last newline; drop that and no line", [3, 0, 10, 0]),
                ("the first answer is missing: the file has no head line", [0, 10, 0, 7]),
                ("the answers are sorted: they must stay in order", [0, 0, 3, 7, 10]),
                ("repeated answers are lost (a set)", [3, 0, 10, 7]),
                ("repeated answers are lost (a set)", [0, 3, 7, 10]),
                ("the answers stand in reverse order", [7, 0, 10, 0, 3]),
                ("the ids are shifted by one", [2, -1, 9, -1, 6]),
                ("the ids are shifted by one", [4, 1, 11, 1, 8]),
                ("it reads single characters: 10 is one answer", [3, 0, 1, 0, 0, 7]),
            ):
                expect(result != wrong, hint)
            expect(result == [3, 0, 10, 0, 7], f"it must give [3, 0, 10, 0, 7], but it "
                   f"gives {result}")
        function(str(path), num_labels=20)


@read_battery.property("refuses a file of another length")
def read_length(function):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "emotion.txt"
        for content, hint in (
            (b"0\n1\n", "2 lines where 3 are asked for must be refused: from the gap on "
             "each answer would be compared with somebody else's label"),
            (b"0\n1\n2\n2\n", "4 lines where 3 are asked for must be refused"),
            (b"", "an empty file must be refused"),
        ):
            path.write_bytes(content)
            refuses(function, hint, path, num_labels=4, length=3)
        refuses(function, "an empty file must be refused, also where no length is asked "
                "for", path, num_labels=4)


@read_battery.property("refuses a last line without its newline")
def read_newline(function):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "emotion.txt"
        for content in (b"0\n1\n2", b"0\n1\n1"):
            path.write_bytes(content)
            refuses(
                function, "a file that does not end with a newline must be refused: the "
                "board would drop its last line, and it may be cut off. (splitlines and "
                "iterating over a file do not tell)", path, num_labels=4, length=3,
            )


@read_battery.property("refuses lines that are no label id")
def read_lines(function):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "emotion.txt"
        for content, hint in (
            (b"0\n1\n4\n", "a 4 where there are 4 classes, 0 to 3, must be refused"),
            (b"0\n-1\n2\n", "a -1 must be refused: as an index it means the last class"),
            (b"0\njoy\n2\n", "a name in place of an id must be refused"),
            (b"0\n1.0\n2\n", "1.0 must be refused: ids are whole numbers"),
            (b"0\n1\tjoy\n2\n", "a line with more than the id must be refused"),
            (b"0\n1 2\n2\n", "a line with two numbers must be refused"),
        ):
            path.write_bytes(content)
            refuses(function, hint, path, num_labels=4, length=3)
        for named in ({"length": 3}, {"length": 2}, {}):
            path.write_bytes(b"0\n\n2\n")
            refuses(
                function, "an empty line in the middle must be refused, not skipped: it "
                "is an answer that is missing, and the rest would move up",
                path, num_labels=4, **named,
            )


@read_battery.property("says that a file is not there")
def read_missing(function):
    with tempfile.TemporaryDirectory() as folder:
        refuses(
            function, "a file that is not there must raise FileNotFoundError: an empty "
            "list would look like an answer", Path(folder) / "none.txt", num_labels=4,
            kinds=(FileNotFoundError,), error="FileNotFoundError",
        )


# bootstrap

bootstrap_battery = Battery(
    "bootstrap",
    "bootstrap(labels, chosen, num_labels, *, resamples=1000, seed=0) -> (resamples,) "
    "float64",
    chapter=9, takes=("labels", "chosen", "num_labels", "resamples", "seed"),
)
# So few texts that every test set that can be drawn from them can be listed.
FEW, FEW_CHOSEN, FEW_OTHER = (
    np.array([0, 0, 1, 2]), np.array([0, 2, 1, 2]), np.array([1, 0, 0, 2])
)
DRAWS = 200  # few enough for a loop over scikit-learn's slow scores


def every_draw():
    """All ways to draw so few texts with replacement, (n ** n, n)."""
    return np.array(list(itertools.product(range(len(FEW)), repeat=len(FEW))))


def apart(values, others):
    """By how much two samples differ in distribution: 0 alike, 1 disjoint."""
    both = [np.round(np.asarray(v, float).ravel() + 1.3e-8, 6) for v in (values, others)]
    kinds = np.unique(np.concatenate(both))
    one, two = (np.bincount(np.searchsorted(kinds, v), minlength=len(kinds)) / len(v)
                for v in both)
    return np.abs(one - two).sum() / 2


def alike(values, others, limit=0.22):
    """Whether two samples may come from one distribution."""
    values, others = np.ravel(values), np.ravel(others)
    many = len(np.unique(np.round(others, 6)))
    if apart(values, others) < limit:
        return True
    if many < 30 or (many < 300 and apart(values, others) > 0.55):
        return False
    # So many different values that few come twice: compare the shares below each.
    places = np.sort(np.concatenate([values, others]))
    below = [np.searchsorted(np.sort(v), places, "right") / len(v) for v in (values, others)]
    return np.abs(below[0] - below[1]).max() < 0.11


def odd_draws():
    """Hints, and (labels' rows, answers' rows) of drawing with that mistake."""
    n, many = len(FEW), 4000
    rng = np.random.default_rng(0)

    def again(size):
        rows = rng.integers(n, size=(many, size))
        return rows, rows

    def subset(size):
        rows = rng.permuted(np.tile(np.arange(n), (many, 1)), axis=1)[:, :size]
        return rows, rows

    def by_class(which):
        rows = np.stack([
            rng.choice(np.flatnonzero(which == which[i]), size=many) for i in range(n)
        ], axis=1)
        return rows, rows

    straight = np.tile(np.arange(n), (many, 1))
    fewer = ("the test sets drawn have {} texts instead of " + f"{n}, as many as there "
             "are: smaller ones scatter more, larger ones less")
    without = ("it draws without replacement: then each text comes up once at most. "
               "Put each back before the next draw (replace=True, randint, choices)")
    def distinct():
        rows = [np.unique(row) for row in rng.integers(n, size=(many, n))]
        # Repeating the texts of a set all alike changes no score.
        rows = np.array([np.resize(np.tile(r, 12 // len(r)), 12) for r in rows])
        return rows, rows

    return [
        ("texts that are drawn twice count once (unique, a set): they must count twice",
         distinct),
        (without, lambda: subset(n)),
        (without, lambda: subset(n - 1)),
        (without, lambda: subset(n // 2)),
        *((fewer.format(size), lambda size=size: again(size))
          for size in (1, 2, 3, n - 1, n + 1, 2 * n, 100, 1000)),
        ("label and answer of a text are drawn apart: draw the texts (one set of "
         "indices), and take labels and answers of the same ones",
         lambda: (again(n)[0], again(n)[0])),
        ("only the answers are drawn, the labels stay: draw texts, and take label and "
         "answer of each", lambda: (straight, again(n)[0])),
        ("only the labels are drawn, the answers stay: draw texts, and take label and "
         "answer of each", lambda: (again(n)[0], straight)),
        ("the answers are shuffled against the labels: that asks what chance would do, "
         "not what other texts would", lambda: (straight, subset(n)[0])),
        ("the draw is made within each true class, so that its share never changes: "
         "draw from all texts alike", lambda: by_class(FEW)),
        ("the draw is made within each answer's class: draw from all texts alike",
         lambda: by_class(FEW_CHOSEN)),
        *(("one text is never drawn: look at the bounds of randint. The first text is 0, "
           "and torch's and numpy's leave out the upper bound (random.randint does not)",
           lambda low=low: (rows := rng.integers(low, low + n - 1, size=(many, n)), rows))
          for low in (0, 1)),
    ]


def drawn_values(function, *arguments, resamples, **named):
    """Call the reader's bootstrap; expect (resamples,) float64."""
    values = function(*arguments, resamples=resamples, **named)
    expect(
        not isinstance(values, (float, int, tuple, dict)) and not (
            isinstance(values, torch.Tensor) and values.ndim == 0),
        "it must return the score on every test set drawn, (resamples,), and nothing "
        "else: interval makes two ends of them afterwards",
    )
    if isinstance(values, (np.ndarray, list)):
        raise Wrong(f"it must return a float64 tensor, but it returns a "
                    f"{type(values).__name__}: torch.from_numpy(…) or torch.tensor(…)")
    expect_tensor(values, (resamples,))
    expect(not values.isnan().any(), "there are NaNs among the scores: a test set drawn "
           "may lack a class, and then 0 is divided by 0. It counts as 0")
    expect(
        values.dtype == torch.float64,
        f"the scores must be float64, but they are {values.dtype}: torch.tensor of "
        "Python floats is float32 unless dtype=torch.float64 is said",
    )
    return values


def explain_draws(values, wanted, causes, otherwise):
    """As `explain`, for samples that must have the same distribution."""
    if apart(values, wanted) < 0.22:
        return
    for hint, mistaken in causes:
        if alike(values, mistaken()):
            raise Wrong(hint)
    raise Wrong(otherwise)


@bootstrap_battery.property("gives macro-F1 on test sets drawn with replacement")
def bootstrap_draws(function):
    values = drawn_values(function, FEW.tolist(), FEW_CHOSEN.tolist(), 3,
                          resamples=DRAWS, seed=1)
    expect(
        len(values.unique()) > 1,
        "all test sets have the same score: does it draw without replacement (a "
        "permutation of all texts is the same test set), or one set for all?",
    )
    rows = every_draw()
    c = tally(FEW[rows], FEW_CHOSEN[rows], 3)
    causes = [(hint, lambda draw=draw: macro_of(tally(
        *(a[r] for a, r in zip((FEW, FEW_CHOSEN), draw(), strict=True)), 3)))
        for hint, draw in odd_draws()]
    causes += [(f"on each test set {hint}", lambda m=m: m(c)) for hint, m in NOT_MACRO]
    real, spread = macro_of(tally(FEW, FEW_CHOSEN, 3)), macro_of(c).std()
    causes += [(PERCENT, lambda: 100 * macro_of(c)),
               ("these are normal numbers around the score: the bootstrap scores test sets",
                lambda: np.random.default_rng(0).normal(real, spread, 4000)),
               ("the score of the real test set is subtracted: give the scores "
                "themselves",
                lambda: macro_of(c) - macro_of(tally(FEW, FEW_CHOSEN, 3)))]
    explain_draws(
        values, macro_of(c), causes,
        "these are not the macro-F1s of test sets of as many texts, drawn with "
        "replacement: draw indices, take labels and answers there, score them",
    )


@bootstrap_battery.property("keeps each answer with its label, and scatters as it must")
def bootstrap_spread(function):
    labels = [i % 3 for i in range(90)]
    values = drawn_values(function, labels, list(labels), 3, resamples=20)
    expect(
        near(values, torch.ones(20).double()),
        "if every answer is right, each test set must score 1, but here some score "
        f"{values.min():.2f}: label and answer of a text are drawn apart, or a row is "
        "mixed with another",
    )
    n = 400
    labels, chosen = [0] * n, [0 if i < 300 else 1 for i in range(n)]
    values = drawn_values(function, labels, chosen, 2, resamples=DRAWS) * 2
    spread = (values / (2 - values)).std().item()  # F1 = 2s / (1 + s), s: the share
    theory = math.sqrt(0.75 * 0.25 / n)
    size = 0.75 * 0.25 / max(spread, 1e-9) ** 2
    expect(
        abs(spread / theory - 1) < 0.22,
        f"on {n} texts the scores scatter {'less' if spread < theory else 'more'} than "
        f"they must, as if {size:.0f} texts were drawn: draw as many as there are, "
        "with replacement",
    )


@bootstrap_battery.property("draws by its seed alone, the same texts for everybody")
def bootstrap_seed(function):
    labels = np.random.default_rng(5).integers(3, size=60)
    chosen = np.where(np.arange(60) % 3 > 0, labels, (labels + 1) % 3)
    arguments = labels.tolist(), chosen.tolist(), 3

    def draw(seed, resamples=25):
        return drawn_values(function, *arguments, resamples=resamples, seed=seed)

    with own_generators(
        "it draws from a generator that everybody shares, or seeds it: whatever is "
        "drawn elsewhere changes. Make one of its own: torch.Generator()"
        ".manual_seed(seed), or np.random.default_rng(seed)"
    ):
        one = draw(4)
    torch.manual_seed(99)
    np.random.seed(99)
    random.seed(99)
    expect(near(one, draw(4)), "the same seed gives other test sets the second time: the "
           "seed is not used for the generator that draws")
    expect(not near(one, draw(5)), "another seed gives the same test sets: the seed is not "
           "used")
    expect(
        near(drawn_values(function, *arguments, resamples=15),
             drawn_values(function, *arguments, resamples=15)),
        "without a seed it gives other values each time: the default is seed=0",
    )
    changed = chosen.copy()
    changed[0] = (changed[0] + 1) % 3
    other = drawn_values(function, labels.tolist(), changed.tolist(), 3, resamples=25,
                         seed=4)
    pair = torch.stack([one, other])
    expect(
        torch.corrcoef(pair)[0, 1] > 0.8,
        "with the same seed two systems that differ on one text are scored on other "
        "texts: the draw may depend on the seed and the number of texts only",
    )
    expect(
        not bool((one.diff() >= 0).all()),
        "the scores are sorted: then number k of one system and number k of another "
        "are not on the same test set",
    )
    expect(default_of(function, "resamples") in (None, 1000),
           "by default it must draw 1,000 test sets")


@bootstrap_battery.property("refuses what cannot be scored, and no resamples")
def bootstrap_refuses(function):
    refuses(function, "resamples=0 must be refused: there would be nothing to look at",
            [0, 1], [0, 1], 2, resamples=0)
    refuse_bad_labels(function, lambda labels, chosen: (labels, chosen, 3))


# interval

interval_battery = Battery(
    "interval", "interval(values, coverage=0.95) -> (low, high), floats",
    chapter=9, takes=("values", "coverage"),
)


def skewed(n, seed=11):
    """Values with a long tail to the right, in no order."""
    return sample(n, seed=seed, dtype=torch.float64).exp()


def two_ends(function, values, *coverage):
    """Call the reader's interval; expect two floats."""
    result = function(values, *coverage)
    expect(
        isinstance(result, (tuple, list, torch.Tensor, np.ndarray)) and len(result) == 2,
        "it must return two floats: return low, high",
    )
    low, high = result
    return (expect_float(low, "the lower end"), expect_float(high, "the upper end"))


def interval_causes(values, coverage):
    """What wrong intervals give: pairs of ends."""
    mean, n = values.mean(), len(values)
    q, tail = torch.quantile, (1 - coverage) / 2
    z = torch.distributions.Normal(0, 1).icdf(torch.tensor(1 - tail))
    ends = values.sort().values
    width = int(coverage * n)
    densest = int((ends[width:] - ends[:n - width]).argmin())

    def pair(low, high):
        return torch.stack([torch.as_tensor(low), torch.as_tensor(high)]).double()

    full = f"cut (1 - coverage) / 2 off each end, here {tail:.4g} and {1 - tail:.4g}"
    spread = ("this is mean ± {} standard deviations: what was drawn need not be "
              "symmetric. Take quantiles of the values: " + full)
    return [
        ("the whole of 1 - coverage is cut off at both ends: halve it, so that the "
         f"share kept is the coverage: {full}",
         lambda: pair(q(values, 2 * tail), q(values, 1 - 2 * tail))),
        (f"it is one-sided: nothing is cut off below. {full.capitalize()}",
         lambda: pair(values.min(), q(values, coverage))),
        (f"it is one-sided: nothing is cut off above. {full.capitalize()}",
         lambda: pair(q(values, 1 - coverage), values.max())),
        ("the ends are the smallest and the largest value: nothing is cut off. "
         f"{full.capitalize()}", lambda: pair(values.min(), values.max())),
        *((spread.format(f"{z:.3g}"),
           lambda z=z, c=c, at=at: pair(at - z * values.std(correction=c),
                                        at + z * values.std(correction=c)))
          for z in (float(z), 1.96, 2, 1, 3) for c in (0, 1)
          for at in (mean, values.median(), q(values, 0.5))),
        *(("this is an interval for the mean of the values (their standard deviation "
           "over √n): it shrinks with more resamples. Take quantiles of the values: "
           + full,
           lambda z=z, c=c: pair(mean - z * values.std(correction=c) / math.sqrt(n),
                                 mean + z * values.std(correction=c) / math.sqrt(n)))
          for z in (float(z), 1.96, 2.0, 1.0) for c in (0, 1)),
        ("these are the quartiles, which keep half of the values: " + full,
         lambda: pair(q(values, 0.25), q(values, 0.75))),
        ("the ends are turned around the middle (the basic bootstrap, 2 · middle - "
         "quantile)",
         lambda: pair(2 * q(values, 0.5) - q(values, 1 - tail),
                      2 * q(values, 0.5) - q(values, tail))),
        ("the coverage is taken for a percentage: it is a share in (0, 1)",
         lambda: pair(q(values, 0.5 - coverage / 200), q(values, 0.5 + coverage / 200))),
        ("the quantiles are given in percent to a function that takes shares, or the "
         "other way round: np.percentile takes 2.5, np.quantile and torch.quantile "
         "take 0.025",
         lambda: pair(q(values, tail / 100), q(values, (1 - tail) / 100))),
        ("low and high have changed places",
         lambda: pair(q(values, 1 - tail), q(values, tail))),
        ("the lower end is right, the upper is not: it is the quantile 1 - tail",
         lambda: pair(q(values, tail), q(values, coverage))),
        ("the values are not sorted before the ends are taken by their place",
         lambda: pair(values[int(tail * n)], values[int((1 - tail) * n)])),
        ("the values are not sorted before the ends are taken by their place",
         lambda: pair(values[int(tail * n)], values[int((1 - tail) * n) - 1])),
        ("this is the shortest interval that holds the share: cut the same share off "
         "both ends instead", lambda: pair(ends[densest], ends[densest + width])),
        ("the ends are turned around the mean (the basic bootstrap, 2 · mean - quantile)",
         lambda: pair(2 * mean - q(values, 1 - tail), 2 * mean - q(values, tail))),
        ("the coverage is taken for the share that is cut off",
         lambda: pair(q(values, coverage / 2), q(values, 1 - coverage / 2))),
        ("the ends are distances from the mean: give the ends themselves",
         lambda: pair(q(values, tail) - mean, q(values, 1 - tail) - mean)),
        ("it always cuts off 2.5 %: the argument coverage is not used",
         lambda: pair(q(values, 0.025), q(values, 0.975))),
    ]


def within_a_rank(value, values, share):
    """Whether a value lies where a quantile may lie, by any definition."""
    ends, place = values.sort().values, share * (len(values) - 1)
    low, high = max(math.floor(place) - 1, 0), min(math.ceil(place) + 1, len(ends) - 1)
    return ends[low] - 1e-9 <= value <= ends[high] + 1e-9


def expect_quantiles(function, values, *coverage):
    """Compare the reader's two ends with the quantiles, to a rank."""
    share = coverage[0] if coverage else 0.95
    low, high = two_ends(function, values.clone(), *coverage)
    tail = (1 - share) / 2
    if within_a_rank(low, values, tail) and within_a_rank(high, values, 1 - tail):
        return
    ends = torch.tensor([low, high], dtype=torch.float64)
    for hint, mistaken in interval_causes(values, share):
        if near(ends, mistaken(), 1e-5):
            raise Wrong(hint)
    inside = ((values >= low) & (values <= high)).double().mean()
    middle = (low + high) / 2
    if abs(middle - values.mean()) < 1e-4 * (high - low) and not near(
            values.mean(), values.median(), 1e-3):
        raise Wrong(
            "the ends lie alike on both sides of the mean, but what was drawn need not be "
            f"symmetric: take the quantiles {tail:.4g} and {1 - tail:.4g}, and no standard "
            "deviations"
        )
    raise Wrong(
        f"between its ends lie {100 * inside:.1f} % of the values instead of "
        f"{100 * share:g} %, or not the same share outside on both sides: take the "
        f"quantiles {tail:.4g} and {1 - tail:.4g}"
    )


@interval_battery.property("cuts 2.5 % off each end by default")
def interval_default(function):
    given = default_of(function, "coverage")
    expect(given in (None, 0.95), f"its default coverage is {given}: it must be 0.95")
    expect_quantiles(function, skewed(1001))
    expect_quantiles(function, -skewed(801, seed=12))


@interval_battery.property("keeps the share that is asked for")
def interval_coverage(function):
    for coverage in (0.5, 0.9, 0.99):
        expect_quantiles(function, skewed(1001), coverage)


@interval_battery.property("takes lists, arrays and tensors, and one value")
def interval_kinds(function):
    values = skewed(301)
    wanted = two_ends(function, values.clone())
    for name, make in (("a list", torch.Tensor.tolist), ("an array", torch.Tensor.numpy),
                       ("a float32 tensor", torch.Tensor.float)):
        try:
            found = two_ends(function, make(values.clone()))
        except Broke as broke:
            raise Wrong(f"with {name} in place of a float64 tensor it {broke}") from None
        expect(np.allclose(found, wanted, rtol=1e-5), f"with {name} in place of a float64 "
               "tensor the ends are others")
    expect(two_ends(function, [4, 4, 4]) == (4.0, 4.0), "of equal values both ends must be "
           "that value")
    expect(two_ends(function, [7.5]) == (7.5, 7.5), "of a single value both ends must be "
           "that value")


@interval_battery.property("refuses no values, NaN, and a coverage outside (0, 1)")
def interval_refuses(function):
    refuses(function, "no values at all must be refused", [])
    for bad in (float("nan"), float("inf")):
        refuses(function, f"values with {bad} among them must be refused: it is sorted to "
                "one end, or spoils both", [1.0, bad, 2.0, 3.0])
    for coverage in (0, 1, 1.0, 95, -0.5):
        refuses(function, f"coverage={coverage} must be refused: it is a share in (0, 1), "
                "not a percentage", [1.0, 2.0, 3.0], coverage)


# paired_bootstrap

paired_battery = Battery(
    "paired_bootstrap",
    "paired_bootstrap(labels, first, second, num_labels, *, resamples=1000, seed=0) -> "
    "(resamples,) float64",
    chapter=9, takes=("labels", "first", "second", "num_labels", "resamples", "seed"),
)
FEW_THREE = FEW.tolist(), FEW_CHOSEN.tolist(), FEW_OTHER.tolist()


def differences(measure=macro_of):
    """The difference on every test set that can be drawn, by some measure."""
    rows = every_draw()
    return measure(tally(FEW[rows], FEW_CHOSEN[rows], 3)) - measure(
        tally(FEW[rows], FEW_OTHER[rows], 3))


@paired_battery.property("gives first minus second on the same test sets")
def paired_draws(function):
    values = drawn_values(function, *FEW_THREE, 3, resamples=DRAWS, seed=1)
    expect(
        abs(values.mean()) > 1e-9 or not values.any(),
        "the mean difference is subtracted: give the differences themselves",
    )
    rows = every_draw()
    one, two = (macro_of(tally(FEW[rows], ids[rows], 3)) for ids in (FEW_CHOSEN, FEW_OTHER))
    rng = np.random.default_rng(1)
    n, many = len(FEW), 4000
    mixed = one[:, None] - two[None, :]

    def drawn(draw):
        a, b = draw()
        return macro_of(tally(FEW[a], FEW_CHOSEN[b], 3)) - macro_of(
            tally(FEW[a], FEW_OTHER[b], 3))

    def swapped():
        flip = rng.random((many, n)) < 0.5
        first, second = (np.where(flip, *p) for p in (
            (FEW_CHOSEN, FEW_OTHER), (FEW_OTHER, FEW_CHOSEN)))
        return macro_of(tally(FEW, first, 3)) - macro_of(tally(FEW, second, 3))

    real = macro_of(tally(FEW, FEW_CHOSEN, 3)) - macro_of(tally(FEW, FEW_OTHER, 3))
    explain_draws(values, one - two, [
        ("the two systems are scored on different test sets: draw the texts once and "
         "score both on them (the same seed for both)", lambda: mixed),
        ("the sign is wrong: first minus second, so that above 0 the first is better",
         lambda: two - one),
        ("the sign is lost: take the difference, not its absolute value",
         lambda: abs(one - two)),
        ("these are the scores of the first system: subtract those of the second",
         lambda: one),
        ("these are the scores of the second system", lambda: two),
        ("the scores are added: subtract them", lambda: one + two),
        ("these are the means of the two scores: subtract them", lambda: (one + two) / 2),
        ("it is a ratio: take the difference", lambda: ratio(one, two)),
        ("the scores of each system are sorted before they were subtracted: number k must "
         "be the same test set for both", lambda: np.sort(one) - np.sort(two)),
        ("it only says who wins: give the difference itself", lambda: (one > two) * 1.0),
        ("it only says who wins: give the difference itself", lambda: np.sign(one - two)),
        ("the difference on the real test set is subtracted: give the differences "
         "themselves", lambda: one - two - real),
        ("the differences are squared: give them as they are", lambda: (one - two)**2),
        ("one system is scored against the other: score both against the labels",
         lambda: macro_of(tally(FEW_CHOSEN[rows], FEW_OTHER[rows], 3))),
        ("answers are swapped between the systems: that is another test (exercise 5), "
         "which asks whether they are equal", swapped),
        (PERCENT, lambda: 100 * (one - two)),
        *((f"both are measured by something else: {hint}", lambda m=m: differences(m))
          for hint, m in NOT_MACRO),
        *((hint, lambda d=d: drawn(d)) for hint, d in odd_draws()),
    ], "these are not the differences in macro-F1 on test sets of as many texts, drawn "
       "with replacement, the same for both systems")


@paired_battery.property("of two equal systems the difference is always 0")
def paired_equal(function):
    rng = np.random.default_rng(2)
    labels, answers = rng.integers(3, size=50).tolist(), rng.integers(3, size=50).tolist()
    values = drawn_values(function, labels, list(answers), list(answers), 3, resamples=30)
    expect(
        bool((values.abs() < 1e-9).all()),
        "a system compared with itself must differ by 0 on every test set, but here the "
        f"differences scatter by {values.std():.3f}: each draws its own texts. Draw once, "
        "and score both on it",
    )
    fixed = [true if i < 4 else answer
             for i, (true, answer) in enumerate(zip(labels, answers, strict=True))]
    values = drawn_values(function, labels, fixed, answers, 3, resamples=60)
    expect(bool((values > -0.02).all()), "a system some of whose mistakes were put right must "
           "be no worse on any test set (or by a hair): the test sets are not the same "
           "for both, or the sign is wrong")


@paired_battery.property("draws by its seed alone")
def paired_seed(function):
    def draw(seed):
        return drawn_values(function, *FEW_THREE, 3, resamples=25, seed=seed)

    with own_generators(
        "it draws from a generator that everybody shares, or seeds it: make one of its "
        "own, torch.Generator().manual_seed(seed) or np.random.default_rng(seed)"
    ):
        one = draw(4)
    torch.manual_seed(98)
    np.random.seed(98)
    random.seed(98)
    expect(near(one, draw(4)), "the same seed gives other differences the second time")
    expect(not near(one, draw(5)), "another seed gives the same test sets: the seed is not "
           "passed on")
    expect(not bool((one.diff() >= 0).all()), "the differences are sorted, or the scores "
           "were before they were subtracted")
    expect(default_of(function, "resamples") in (None, 1000),
           "by default it must draw 1,000 test sets")
    expect(default_of(function, "seed") in (None, 0), "the default is seed=0")


@paired_battery.property("refuses systems of different length")
def paired_refuses(function):
    for arguments, who in (
        (([0, 1, 1], [0, 1, 1], [0, 1], 2), "3 labels and 2 answers of the second"),
        (([0, 1, 1], [0, 1], [0, 1, 1], 2), "3 labels and 2 answers of the first"),
        (([0, 1], [0, 1], [0, 2], 2), "an answer 2 where there are 2 classes"),
    ):
        refuses(function, f"{who} must be refused", *arguments)
    refuses(function, "resamples=0 must be refused", [0, 1], [0, 1], [0, 0], 2, resamples=0)


# remove_hashtags


def changed_text(function, text, *arguments):
    """Call a reader's function of a text; expect a string."""
    result = function(text, *arguments)
    expect(result is not None, "it returns None: is there a return at the end?")
    expect(isinstance(result, str), "it must return a string, but it returns a "
           f"{type(result).__name__}" + (": join the words again" if isinstance(
               result, list) else ""))
    return result


def expect_text(function, text, wanted, causes=(), otherwise=""):
    """Compare a text with what must come out of it."""
    result = changed_text(function, text)
    if result == wanted:
        return
    for hint, wrong in causes:
        if (wrong(result) if callable(wrong) else result == wrong):
            raise Wrong(f"{hint}. {text!r} must become {wanted!r}, but it becomes {result!r}")
    raise Wrong(f"{otherwise + '. ' if otherwise else ''}{text!r} must become {wanted!r}, "
                f"but it becomes {result!r}")


def untidy(result):
    return "  " in result or result != result.strip()


SPACES = ("where something was taken out, two blanks are left, or one at an end: make "
          "runs of blanks one, as by \" \".join(text.split())", untidy)

hashtags_battery = Battery(
    "remove_hashtags", "remove_hashtags(text) -> str", chapter=9, takes=("text",),
)


@hashtags_battery.property("takes hashtags out, word and all")
def hashtags_go(function):
    expect_text(function, "so happy #joy today", "so happy today", [
        ("only the sign # is taken out: its word goes as well", "so happy joy today"),
        ("it takes out all the rest of the text as well: a hashtag ends with its word "
         "(\\w+, not .*)", "so happy"),
        ("the word before goes as well", "so today"),
        ("the word after goes as well", "so happy"),
        ("nothing is taken out: with str.replace a pattern is plain text; use re.sub",
         "so happy #joy today"),
        ("it gives the hashtags: give the rest", "#joy"),
        ("it gives the hashtags: give the rest", "joy"),
        ("the blanks on both sides go, and two words run together", "so happytoday"),
        SPACES,
    ])
    expect_text(function, "#one day #two left #three", "day left", [
        ("only the first hashtag is taken out: re.sub takes all unless count= is given",
         lambda r: "#two" in r),
        ("a hashtag at the beginning of a text stays", lambda r: "#one" in r),
        ("a hashtag at the end of a text stays", lambda r: "#three" in r),
        ("it takes out all between the first # and the last: the pattern is too greedy",
         lambda r: "left" not in r or "day" not in r),
        SPACES,
    ])


@hashtags_battery.property("takes the whole tag: digits, _ and letters of all languages")
def hashtags_whole(function):
    for text, left in (
        ("yes #Team_2024 no", "Team or 2024 is left"),
        ("yes #über no", "after # come letters beyond a to z: use \\w, not [a-zA-Z]"),
        ("yes #日本 no", "after # come letters beyond a to z: use \\w, not [a-zA-Z]"),
        ("yes #HAPPY no", "capitals are no part of the tag here"),
        ("yes #x no", "a tag of one letter stays"),
        ("yes #4you no", "a tag that begins with a digit stays"),
    ):
        expect_text(function, text, "yes no", [SPACES],
                    f"not all of the tag goes: {left}")


@hashtags_battery.property("eats nothing of what stands around a tag")
def hashtags_around(function):
    for text, sign in (("what a day #win!", "!"), ("(#win) now", ")"), ("#win, then", ","),
                       ("was it #win? yes", "?")):
        result = changed_text(function, text)
        expect(
            "win" not in result and "#" not in result,
            f"a tag with a sign after it stays: {text!r} becomes {result!r}",
        )
        expect(
            sign in result,
            f"it eats what follows the tag: {text!r} becomes {result!r}, and the {sign} is "
            "lost. A tag ends where its word ends (\\w+, not \\S+, and no split at "
            "blanks)",
        )
    result = changed_text(function, "what a day\n#win\nfor all")
    expect("for" in result and "all" in result and "win" not in result,
           "with line breaks around the tag it goes wrong: a tag ends with its word, not "
           "with the text")


@hashtags_battery.property("leaves everything else as it is")
def hashtags_rest(function):
    for text, hint in (
        ("I can&#39;t, you &#34;know&#34;", "&#39; is an apostrophe as the files write it, "
         "and no hashtag: it is destroyed. Don't take a # after & (a lookbehind, "
         "(?<!&)#)"),
        ("we are number # one", "a lonely # without a word is no hashtag: ask for at least "
         "one letter (\\w+, not \\w*)"),
        ("@user said: naïve, “quote” http://t.co/x :)", "a text without a hashtag is "
         "changed"),
        ("50% off - a + b = $5 *now* \\ ~ <3 [x] {y} ^_^", "signs are taken out that are no "
         "part of a hashtag"),
        ("Keep My Capitals", "capitals are changed"),
        ("", "the empty text must stay empty"),
    ):
        expect_text(function, text, text, [], hint)
    expect_text(function, "two  blanks", "two blanks", [], "runs of blanks become one")


# remove_emoji

emoji_battery = Battery(
    "remove_emoji", "remove_emoji(text) -> str", chapter=9, takes=("text",),
)


@emoji_battery.property("takes emoji out, old and new ones")
def emoji_go(function):
    expect_text(function, "great 😀 day", "great day", [
        ("nothing is taken out", "great 😀 day"),
        ("all but letters goes, or all blanks", "greatday"),
        ("it takes out all the rest of the text", "great"),
        ("it gives the emoji: give the rest", "😀"),
        ("the emoji is replaced, not taken out", lambda r: len(r) > 11),
        SPACES,
    ])
    expect_text(function, "😀😀 well done 😀", "well done", [
        ("only the first emoji is taken out", lambda r: "😀" in r), SPACES])
    others = {"🎉": "U+1F389", "🚀": "U+1F680", "🤔": "U+1F914", "🥺": "U+1F97A",
              "🫠": "U+1FAE0", "☀": "U+2600", "❤": "U+2764", "⭐": "U+2B50"}
    left = [f"{sign} ({code})" for sign, code in others.items()
            if changed_text(function, f"a {sign} b") != "a b"]
    expect(not left, "some emoji stay, because they stand in other blocks of Unicode than "
           f"the faces: {', '.join(left)}")


@emoji_battery.property("leaves digits, #, emoticons and other languages")
def emoji_rest(function):
    for text, hint in (
        ("number 1 #1 *2*", "digits, # and * are taken for emoji (in Unicode's list they "
         "may begin a key): only with U+20E3 after them are they"),
        ("fine :) ;-) <3 :D", "emoticons of letters and signs stay"),
        ("naïve café über", "letters beyond a to z are lost: encoding to ASCII is too "
         "much. Take out the blocks of emoji only"),
        ("日本語 한국어 русский عربي", "other scripts are lost: take out the blocks of emoji "
         "only"),
        ("– “quote” … it’s", "quotes, dashes and dots are lost: take out the blocks of "
         "emoji only"),
        ("@user &amp; #tag http://t.co/x?y=1", "signs that are no emoji are lost"),
        ("Keep My Capitals", "capitals are changed"),
        ("", "the empty text must stay empty"),
    ):
        expect_text(function, text, text, [], hint)
    expect_text(function, "two  blanks", "two blanks", [], "runs of blanks become one")


@emoji_battery.property("takes whole sequences: hearts, families, skin, flags, keys")
def emoji_sequences(function):
    for what, text, hint in (
        ("❤️", "love ❤️ you", "after it stands an invisible U+FE0F, which asks for a "
         "coloured picture, and it is left behind"),
        ("👨‍👩‍👧", "love 👨‍👩‍👧 you", "it is three people joined by an invisible U+200D, "
         "which is left behind"),
        ("👋🏽", "love 👋🏽 you", "the colour of the skin is a sign of its own, U+1F3FD, and "
         "it is left behind"),
        ("🇫🇷", "love 🇫🇷 you", "a flag is two signs, U+1F1E6 to U+1F1FF"),
        ("🏴󠁧󠁢󠁳󠁣󠁴󠁿", "love 🏴󠁧󠁢󠁳󠁣󠁴󠁿 you", "after the flag stand invisible signs, U+E0020 to "
         "U+E007F, which are left behind"),
        ("1️⃣", "love 1️⃣ you", "a key is a digit, U+FE0F and U+20E3, and a part of it is "
         "left behind"),
    ):
        expect_text(function, text, "love you", [SPACES],
                    f"not all of {what} goes: {hint}")


# add_typos

typos_battery = Battery(
    "add_typos", "add_typos(text, rng, share=0.2) -> str, with a random.Random",
    chapter=9, takes=("text", "rng", "share"),
)
WORDS = ["monday", "planet", "frying", "blanket", "upset", "churns", "wisdom"]


def slips(word):
    """All that one slip makes of a word: (swapped, lost, doubled)."""
    swapped = {word[:i] + word[i + 1] + word[i] + word[i + 2:] for i in range(len(word) - 1)}
    lost = {word[:i] + word[i + 1:] for i in range(len(word))}
    doubled = {word[:i] + word[i] + word[i:] for i in range(len(word))}
    return swapped - {word}, lost, doubled


@typos_battery.property("misspells each longer word by one slip where share is 1")
def typos_slips(function):
    text = " ".join(WORDS * 12)
    result = changed_text(function, text, random.Random(3), 1.0).split()
    expect(len(result) == 12 * len(WORDS), "words are lost, split or run together")
    kinds, hit = [0, 0, 0], np.mean([a != b for a, b in zip(WORDS * 12, result, strict=True)])
    expect(hit > 0, "with share 1 nothing changes")
    expect(hit > 0.9, f"with share 1 every longer word is hit, but only {100 * hit:.0f} % are: "
           "the share is not used as it is, or the draw may leave a word as it was")
    for before, after in zip(WORDS * 12, result, strict=True):
        expect(before != after, f"with share 1 every longer word is hit, but {before!r} is not")
        ways = slips(before)
        for k, way in enumerate(ways):
            kinds[k] += after in way
        if any(after in way for way in ways):
            continue
        hint = f"{before!r} becomes {after!r}"
        if sorted(before) == sorted(after):
            hint += ": the letters are shuffled, but only two neighbours may change places"
        elif len(before) == len(after):
            hint += ": a letter is replaced by another; in a slip of ours two neighbours " \
                    "change places, or one letter is lost or doubled"
        elif len(after) == len(before) + 1 and set(after) - set(before):
            hint += ": a new letter comes in; a letter may only be doubled"
        else:
            hint += ": more than one slip in a word. One slip: two neighbours change " \
                    "places, or one letter is lost or doubled"
        raise Wrong(hint)
    names = "two neighbours change places", "a letter is lost", "a letter is doubled"
    for count, what in zip(kinds, names, strict=True):
        expect(count < len(result), f"there is one kind of slip only: {what}. The others "
               "never come")
    for count, what in zip(kinds, names, strict=True):
        expect(count > 0, f"of the three kinds of slips one never comes: {what}")
    found = {changed_text(function, "planet", random.Random(seed), 1.0) for seed in range(60)}
    spots = {next((i for i, (a, b) in enumerate(zip("planet", word, strict=False)) if a != b), 5)
             for word in found}
    expect(len(spots) > 2 or len(found) == 1, "the slip always comes at the same place of a "
           "word: draw the place too")


@typos_battery.property("leaves short words, mentions, numbers and signs alone")
def typos_leave(function):
    for text, hint in (
        ("the cat sat on my new bed", "words of fewer than four letters are hit"),
        ("@username @mondays hi @planet", "mentions are hit: they are names, not words. "
         "Leave a word after an @"),
        ("12345 2024 100000", "numbers are hit: only letters are misspelt"),
        ("??!! ....... -----", "signs are hit: only letters are misspelt"),
        ("", "the empty text must stay empty"),
    ):
        for seed in range(5):
            result = changed_text(function, text, random.Random(seed), 1.0)
            expect(result == text, f"{hint}. {text!r} becomes {result!r}")
    hit = changed_text(function, "word word word word", random.Random(0), 1.0)
    expect(hit != "word word word word", "words of exactly four letters are left alone: only "
           "those of fewer than four are (>= 4, not > 4)")
    text = "Planet,  wisdom!\n(upset) “frying”; monday."
    result = changed_text(function, text, random.Random(1), 1.0)
    expect(
        re.sub(r"[^\W\d_]", "", result) == re.sub(r"[^\W\d_]", "", text),
        "signs, blanks and line breaks between the words are changed or moved: touch "
        f"letters only. {text!r} becomes {result!r}. (Splitting at blanks and joining "
        "loses double blanks and takes a comma for a part of its word)",
    )
    expect(
        sorted(set(re.sub(r"[a-z\W]", "", result))) in ([], ["P"]) and "p" not in result[:2],
        f"capitals are changed: {text!r} becomes {result!r}",
    )
    hit = changed_text(function, "größte fröhlich", random.Random(1), 1.0)
    expect(hit != "größte fröhlich", "words with letters beyond a to z are not hit")


@typos_battery.property("hits the share of words that is asked for")
def typos_share(function):
    words = WORDS * 300
    text = " ".join(words)

    def hit(*share):
        result = changed_text(function, text, random.Random(0), *share).split()
        return sum(a != b for a, b in zip(words, result, strict=False)) / len(words)

    for share in (0.3, 0.8, 0.0):
        found = hit(share)
        if abs(found - share) < 0.06:
            continue
        for wrong, hint in (
            (1 - share, "it is the wrong way round: hit a word if rng.random() < share"),
            (1.0, "every word is hit: the share is not used"),
            (0.0, "no word is hit"),
            (0.2, "it always hits 20 %: the share is not used"),
            (1 - (1 - share) ** 6.2, "each letter is hit with that chance, not each word"),
        ):
            if abs(found - wrong) < 0.07:
                raise Wrong(f"with share {share} it hits {100 * found:.0f} % of the longer "
                            f"words: {hint}")
        raise Wrong(f"with share {share} it hits {100 * found:.0f} % of the longer words")
    expect(abs(hit() - 0.2) < 0.06, f"by default it must hit 20 % of the longer words, but it "
           f"hits {100 * hit():.0f} %")


@typos_battery.property("draws from the generator that it is given, and no other")
def typos_generator(function):
    text = " ".join(WORDS * 8)
    random.seed(1)
    with own_generators(
        "it draws from a generator that everybody shares (random.random() and the like) "
        "or seeds it: draw from rng, as in rng.random()"
    ):
        one = changed_text(function, text, random.Random(2), 0.5)
    random.seed(77)
    np.random.seed(77)
    expect(one == changed_text(function, text, random.Random(2), 0.5),
           "with the same rng it gives another text the second time: something is drawn "
           "elsewhere than from rng")
    expect(one != changed_text(function, text, random.Random(3), 0.5),
           "another rng gives the same text: rng is not used")
    rng = random.Random(2)
    first, second = (changed_text(function, text, rng, 0.5) for _ in range(2))
    expect(first != second, "called twice with one rng it makes the same slips: it copies "
           "or reseeds rng, so every text gets the same ones. Let rng run on")


# reliability and expected_calibration_error

reliability_battery = Battery(
    "reliability",
    "reliability(probabilities, labels, *, bins=10) -> share, confidence, accuracy, "
    "each (bins,)",
    chapter=9, takes=("probabilities", "labels", "bins"),
)
BELIEFS = (1.6 * sample(90, 4, seed=21, dtype=torch.float64)).softmax(-1)
# Right in three of five, whatever the confidence: too modest here, too sure there.
TRUTH = torch.where(
    sample(90, seed=22) < 0.3, BELIEFS.argmax(-1),
    (BELIEFS.argmax(-1) + 1 + torch.arange(90) % 3) % 4,
)
# Confidences that stand on the edges of four bins.
EDGES = torch.tensor([[0.5, 0.25, 0.25], [0.75, 0.125, 0.125], [1.0, 0.0, 0.0],
                      [0.5, 0.5, 0.0], [0.625, 0.375, 0.0]], dtype=torch.float64)
EDGE_TRUTH = [0, 1, 0, 2, 0]


def in_bins(sure, right, bins, *, upper=True, edges=None, place=None):
    """share, confidence, accuracy of each bin, by a loop."""
    if place is None:
        edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64) if edges is None else edges
        place = torch.full((len(sure),), -1)
        for b in range(bins):
            low, high = edges[b], edges[b + 1]
            inside = (sure > low) & (sure <= high) if upper else (sure >= low) & (sure < high)
            place[inside] = b
    share, confidence, accuracy = torch.zeros(3, bins, dtype=torch.float64)
    for b in range(bins):
        inside = place == b
        if inside.any():
            share[b] = inside.double().mean()
            confidence[b], accuracy[b] = sure[inside].mean(), right[inside].mean()
    return torch.stack([share, confidence, accuracy])


def binnings(rows, labels, bins):
    """Hints, and what in_bins gives with that mistake."""
    labels = torch.as_tensor(labels)
    sure, chosen = rows.max(-1)
    right = (chosen == labels).double()
    of_label = rows.gather(1, labels[:, None])[:, 0]
    order = sure.argsort()
    by_count = torch.empty_like(order)
    by_count[order] = torch.arange(len(order)) * bins // len(order)
    least = 1 / rows.shape[-1]
    spread = torch.linspace(float(sure.min()), float(sure.max()), bins + 1).double()
    two = rows.topk(2, dim=-1).values
    centres = (torch.arange(bins).double() + 0.5) / bins
    plain = in_bins(sure, right, bins)
    every = in_bins(rows.flatten(), (torch.arange(rows.shape[-1]) == labels[:, None])
                    .double().flatten(), bins)
    return [
        ("the confidence is the probability of the true label: take that of the answer, "
         "the largest of the row",
         lambda: in_bins(of_label, right, bins)),
        ("a bin holds its lower edge, not its upper one: a confidence of 0.5 with four "
         "bins belongs to the second, (0.25, 0.5]; and 1.0 must not fall out",
         lambda: in_bins(sure, right, bins, upper=False)),
        ("a bin holds its lower edge, not its upper one: a confidence of 0.5 with four "
         "bins belongs to the second, (0.25, 0.5]",
         lambda: in_bins(sure, right, bins,
                         place=(sure * bins).long().clamp(max=bins - 1))),
        ("the bins hold equally many texts: they must be equal steps from 0 to 1",
         lambda: in_bins(sure, right, bins, place=by_count)),
        ("the bins run from 1 / num_labels to 1: they are equal steps from 0 to 1",
         lambda: in_bins(sure, right, bins, edges=torch.linspace(least, 1, bins + 1).double()
                         - torch.tensor([1e-12] + [0.0] * bins))),
        ("the bins run from the smallest confidence to the largest (as np.histogram "
         "makes them): they are equal steps from 0 to 1",
         lambda: in_bins(sure, right, bins, edges=spread - torch.tensor(
             [1e-9] + [0.0] * (bins - 1) + [-1e-9]))),
        ("the confidence of a bin is the middle of the bin: it is the mean of what lies "
         "in it",
         lambda: torch.stack([plain[0], centres * (plain[0] > 0), plain[2]])),
        ("the confidence of a bin is the middle of the bin: it is the mean of what lies "
         "in it", lambda: torch.stack([plain[0], centres, plain[2]])),
        ("the probabilities of all classes are sorted into bins: only the answer's, the "
         "largest of each row", lambda: every),
        ("the confidence is the smallest probability of the row: it is the largest",
         lambda: in_bins(rows.min(-1).values, right, bins)),
        ("the confidence is the distance of the two largest probabilities: it is the "
         "largest itself", lambda: in_bins(two[:, 0] - two[:, 1], right, bins)),
        ("answers whose confidence is exactly 1 fall out: they belong to the last bin",
         lambda: in_bins(sure[sure < 1], right[sure < 1], bins)),
        ("answers whose confidence is exactly 1 fall out: they belong to the last bin",
         lambda: in_bins(sure[sure < 1], right[sure < 1], bins)
         * torch.tensor([(sure < 1).double().mean(), 1, 1])[:, None]),
        ("the accuracy is the probability of the true label: an answer is right or wrong, "
         "1 or 0", lambda: in_bins(sure, of_label, bins)),
        ("the confidence is the probability of class 1: take that of the answer, the "
         "largest of the row", lambda: in_bins(rows[:, 1], right, bins)),
        ("an answer counts as right if the label is among the two largest: only the "
         "largest counts", lambda: in_bins(
             sure, (rows.topk(2, -1).indices == labels[:, None]).any(-1).double(), bins)),
        ("the bins stand in reverse order", lambda: plain.flip(1)),
        ("right and wrong have changed places: the accuracy is the share that is right",
         lambda: in_bins(sure, 1 - right, bins)),
        ("softmax is applied once more: these are probabilities already",
         lambda: in_bins(rows.softmax(-1).max(-1).values, right, bins)),
        ("it is not weighted: an answer counts by its confidence in the accuracy",
         lambda: torch.stack([plain[0], plain[1], plain[1] * plain[2]])),
        ("there is one bin more or less than asked for", lambda: torch.cat(
            [in_bins(sure, right, bins - 1), torch.zeros(3, 1).double()], 1)),
    ]


def three_bins(function, rows, labels, **bins):
    """Call the reader's reliability; expect three tensors of (bins,)."""
    result = function(rows.clone(), labels, **bins)
    count = bins.get("bins", 10)
    expect(
        isinstance(result, (tuple, list, torch.Tensor)) and len(result) == 3,
        "it must return three tensors: return share, confidence, accuracy",
    )
    for value, what in zip(result, ("the share", "the confidence", "the accuracy"),
                           strict=True):
        if isinstance(value, (list, np.ndarray)):
            raise Wrong(f"{what} must be a tensor of ({count},), but it is a "
                        f"{type(value).__name__}")
        if not bins and default_of(function, "bins") not in (None, 10):
            raise Wrong(f"by default it has {default_of(function, 'bins')} bins: it must "
                        "be 10")
        if isinstance(value, torch.Tensor) and value.ndim == 1 and len(value) < count:
            raise Wrong(f"{what} has {len(value)} numbers for {count} bins: an empty bin "
                        "keeps its place, with a 0")
        expect_tensor(value, (count,), what=what)
        expect(not value.isnan().any(), f"{what} is NaN in an empty bin: 0 / 0. An empty "
               "bin has zeros; divide by at least 1")
    return torch.stack([value.double() for value in result])


def explain_bins(found, rows, labels, bins, otherwise):
    """Compare three bins' numbers with the right ones, with causes."""
    sure, chosen = rows.double().max(-1)
    wanted = in_bins(sure, (chosen == torch.as_tensor(labels)).double(), bins)
    share, confidence, accuracy = wanted
    explain(found, wanted, [
        *binnings(rows.double(), labels, bins),
        ("the shares are counts: divide them by the number of texts",
         lambda: torch.stack([share * len(rows), confidence, accuracy])),
        ("confidence and accuracy are sums, not means of each bin",
         lambda: torch.stack([share, confidence * share * len(rows),
                              accuracy * share * len(rows)])),
        ("confidence and accuracy are divided by the number of all texts: divide by "
         "that of the bin",
         lambda: torch.stack([share, confidence * share, accuracy * share])),
        ("confidence and accuracy have changed places: the order is share, confidence, "
         "accuracy", lambda: torch.stack([share, accuracy, confidence])),
        ("the order is share, confidence, accuracy",
         lambda: torch.stack([confidence, accuracy, share])),
        ("the order is share, confidence, accuracy",
         lambda: torch.stack([confidence, share, accuracy])),
        ("the order is share, confidence, accuracy",
         lambda: torch.stack([accuracy, confidence, share])),
    ], otherwise, tolerance=1e-6)


@reliability_battery.property("sorts answers by confidence: shares and means of each bin")
def reliability_plain(function):
    for bins in ({}, {"bins": 5}, {"bins": 7}):
        found = three_bins(function, BELIEFS, TRUTH.clone(), **bins)
        explain_bins(found, BELIEFS, TRUTH, bins.get("bins", 10),
                     "the numbers of the bins are wrong: the share of the texts in each, "
                     "the mean of their largest probability, the share of them that is "
                     "right")


@reliability_battery.property("a bin holds its upper edge, and 1 stays in the last")
def reliability_edges(function):
    found = three_bins(function, EDGES, list(EDGE_TRUTH), bins=4)
    lost = 1 - found[0].sum().item()
    good = near(three_bins(function, BELIEFS, TRUTH.clone())[0], in_bins(
        BELIEFS.max(-1).values, torch.zeros(90).double(), 10)[0], 1e-6)
    if abs(lost) > 1e-6 and good:
        raise Wrong(
            f"the shares add up to {1 - lost:.2f}: answers whose confidence is exactly 1, or "
            "on an edge, fall out of all bins, or into two. A bin is (lower, upper]"
        )
    explain_bins(found, EDGES, EDGE_TRUTH, 4,
                 "confidences on the edges of bins land in the wrong ones: a bin is "
                 "(lower, upper]")
    nearly = torch.tensor([[1.0000002, 0.0]])
    found = three_bins(function, nearly, [0])
    expect(abs(found[0, -1].item() - 1) < 1e-6, "a confidence a hair above 1, as rounding "
           "makes them, falls out of the last bin")


@reliability_battery.property("gives zeros for empty bins")
def reliability_empty(function):
    rows = torch.tensor([[0.9, 0.1], [0.2, 0.8]])
    for bins in (10, 1, 40):
        found = three_bins(function, rows, [0, 0], bins=bins)
        explain_bins(found, rows, [0, 0], bins,
                     f"with {bins} bins for two texts the numbers are wrong")


@reliability_battery.property("computes in float64, and takes float32")
def reliability_dtype(function):
    result = function(BELIEFS.float(), TRUTH.tolist())
    for value in result:
        expect(isinstance(value, torch.Tensor) and value.dtype == torch.float64,
               "the numbers must be float64 tensors, also for float32 probabilities")


def refuse_bad_probabilities(function):
    """The refusals that both functions of probabilities owe."""
    two = torch.tensor([[0.9, 0.1], [0.4, 0.6]])
    for hint, rows, labels, bins in (
        ("rows that do not sum to 1 must be refused: these may be logits",
         torch.tensor([[2.0, 3.0], [0.1, 0.2]]), [0, 1], 10),
        ("rows that sum to 1 by accident, with a negative number, must be refused",
         torch.tensor([[2.0, -1.0], [0.5, 0.5]]), [0, 1], 10),
        ("NaN among the probabilities must be refused: no comparison with it is true",
         torch.tensor([[float("nan"), 0.5], [0.5, 0.5]]), [0, 1], 10),
        ("2 rows and 3 labels must be refused", two, [0, 1, 1], 10),
        ("2 rows and 1 label must be refused: it is compared with all, by broadcasting",
         two, [0], 10),
        ("a label 2 where there are 2 classes must be refused: it would count as a "
         "wrong answer", two, [0, 2], 10),
        ("bins=0 must be refused", two, [0, 1], 0),
        ("no texts must be refused", torch.zeros(0, 4), [], 10),
        ("one axis must be refused: (texts, num_labels)", torch.tensor([0.5, 0.5]),
         [0, 1], 10),
    ):
        refuses(function, hint, rows, labels, bins=bins)


@reliability_battery.property("refuses what are no probabilities")
def reliability_refuses(function):
    refuse_bad_probabilities(function)


ece_battery = Battery(
    "expected_calibration_error",
    "expected_calibration_error(probabilities, labels, *, bins=10) -> float",
    chapter=9, takes=("probabilities", "labels", "bins"),
)


def gap(binned):
    """Mean distance of confidence and accuracy, weighted by the bins' shares."""
    share, confidence, accuracy = binned
    return (share * (confidence - accuracy).abs()).sum().item()


def ece_causes(rows, labels, bins):
    """What is mistaken for the expected calibration error."""
    rows, labels = rows.double(), torch.as_tensor(labels)
    sure, chosen = rows.max(-1)
    right = (chosen == labels).double()
    share, confidence, accuracy = binned = in_bins(sure, right, bins)
    apart_, used = (confidence - accuracy).abs(), share > 0
    one_hot = torch.nn.functional.one_hot(labels, rows.shape[-1]).double()
    found = [
        ("the bins are not weighted: a bin of one text counts as much as one of a "
         "hundred. Weigh each by its share of the texts",
         lambda: apart_[used].mean().item()),
        ("the bins are not weighted, and empty ones count: weigh each by its share of "
         "the texts", lambda: apart_.mean().item()),
        ("the differences are added up without weights: weigh each bin by its share of "
         "the texts", lambda: apart_.sum().item()),
        ("the weighted differences are divided by the number of bins once more: the "
         "shares are weights enough", lambda: (share * apart_).mean().item()),
        ("the weighted differences are divided by the number of bins once more: the "
         "shares are weights enough", lambda: (share * apart_)[used].mean().item()),
        ("the bins are weighted by their counts: divide by the number of texts",
         lambda: (len(rows) * share * apart_).sum().item()),
        ("the differences keep their signs, so too sure and too modest cancel: take the "
         "absolute value in each bin, before the sum",
         lambda: (share * (confidence - accuracy)).sum().item()),
        ("the differences keep their signs, so too sure and too modest cancel: take the "
         "absolute value in each bin, before the sum",
         lambda: (share * (accuracy - confidence)).sum().item()),
        ("the absolute value is taken after the sum: too sure and too modest cancel. "
         "Take it in each bin", lambda: abs((share * (confidence - accuracy)).sum().item())),
        ("the differences are squared: take absolute values",
         lambda: (share * apart_.square()).sum().item()),
        ("the differences are squared: take absolute values",
         lambda: (share * apart_.square()).sum().sqrt().item()),
        ("this is the largest difference of all bins (the maximum calibration error): "
         "take the weighted mean", lambda: apart_.max().item()),
        ("each text is compared alone (confidence against 0 or 1): first take the means "
         "of a bin, then their difference", lambda: (sure - right).abs().mean().item()),
        ("this is the Brier score, mean squared distances of probabilities",
         lambda: (rows - one_hot).square().sum(-1).mean().item()),
        ("this is the Brier score, mean squared distances of probabilities",
         lambda: (rows - one_hot).square().mean().item()),
        ("this is the cross-entropy",
         lambda: -rows.gather(1, labels[:, None]).log().mean().item()),
        ("this is the mean confidence: subtract the accuracy", lambda: sure.mean().item()),
        ("this is the accuracy", lambda: right.mean().item()),
        ("this is 1 minus the error", lambda: 1 - gap(binned)),
        ("it is in percent: it must be in [0, 1]", lambda: 100 * gap(binned)),
    ]
    found += [
        ("only answers that are too sure count: take the absolute value",
         lambda: (share * (confidence - accuracy).clamp_min(0)).sum().item()),
        ("only answers that are too modest count: take the absolute value",
         lambda: (share * (accuracy - confidence).clamp_min(0)).sum().item()),
    ]
    found += [(hint, lambda b=b: gap(b())) for hint, b in binnings(rows, labels, bins)]
    if bins != 10:  # after the edges, which look the same for confidences on them
        found.insert(-len(binnings(rows, labels, bins)) + 3, (
            "it always has 10 bins: the argument bins is not used",
            lambda: gap(in_bins(sure, right, 10))))
    found += [
        (f"it has {other} bins instead of {bins}",
         lambda other=other: gap(in_bins(sure, right, other)))
        for other in (10, 15, 20, 5, bins + 1, bins - 1) if other != bins and other > 0
    ]
    return found + [(ROUNDED, lambda d=d: round(gap(binned), d)) for d in (4, 3, 2)]


def expect_error(function, rows, labels, otherwise, edges=False, **bins):
    """Compare the reader's calibration error with the right one."""
    value = function(rows.clone(), labels, **bins)
    sure, chosen = rows.double().max(-1)
    count = bins.get("bins", 10)
    wanted = gap(in_bins(sure, (chosen == torch.as_tensor(labels)).double(), count))
    causes = ece_causes(rows, labels, count)
    if edges:  # so few numbers that other causes may fit by accident
        causes = [(hint, lambda b=b: gap(b()))
                  for hint, b in binnings(rows.double(), labels, count)[1:3]]
    explain_number(value, wanted, causes,
                   f"{otherwise}: it must be {wanted:.4f}, but it is {value}",
                   "the calibration error", 1e-6)


@ece_battery.property("is the weighted mean of |confidence - accuracy| over ten bins")
def ece_plain(function):
    expect_error(function, BELIEFS, TRUTH.clone(), "the error is wrong")


@ece_battery.property("takes the number of bins")
def ece_bins(function):
    for bins in (5, 15, 1):
        expect_error(function, BELIEFS, TRUTH.clone(), f"with {bins} bins it is wrong",
                     bins=bins)


@ece_battery.property("too sure and too modest do not cancel; upper edges count")
def ece_by_hand(function):
    four = torch.tensor([[0.95, 0.05], [0.95, 0.05], [0.65, 0.35], [0.65, 0.35]])
    expect_error(function, four, [0, 1, 0, 0], "for two answers of 0.95, one of them right, "
                 "and two of 0.65, both right, it is wrong")
    for bins in (4, 8):
        expect_error(function, EDGES, list(EDGE_TRUTH), "with confidences on the edges of "
                     "bins it is wrong (a bin is (lower, upper])", edges=True, bins=bins)
    # Two neighbouring confidences that only the right edges tell apart.
    tilted = torch.tensor([[0.5, 0.3, 0.2], [0.5, 0.25, 0.25], [0.625, 0.375, 0.0],
                           [0.375, 0.375, 0.25], [1.0, 0.0, 0.0]], dtype=torch.float64)
    for pair in ([[0.5, 0.5], [0.375, 0.625]], [[0.75, 0.25], [0.625, 0.375]],
                 [[0.5, 0.5], [0.75, 0.25]]):
        expect_error(function, torch.tensor(pair, dtype=torch.float64), [0, 1],
                     f"with confidences on the edges of bins, {pair}, it is wrong (a bin is "
                     "(lower, upper])", edges=True, bins=4)
    expect_error(function, tilted, [0, 1, 1, 2, 0], "with confidences on the edges of bins "
                 "it is wrong (a bin is (lower, upper])", edges=True, bins=4)


@ece_battery.property("is 0 for sure and right answers, 1 for sure and wrong ones")
def ece_ends(function):
    sure = torch.eye(3)[[0, 1, 2, 2]]
    explain_number(function(sure.clone(), [0, 1, 2, 2]), 0.0, [
        ("answers whose confidence is exactly 1 go wrong: they belong to the last bin", 1.0),
    ], "if every answer is sure and right it must be 0", "the calibration error", 1e-6)
    explain_number(function(sure.clone(), [1, 2, 0, 0]), 1.0, [
        ("answers whose confidence is exactly 1 fall out of all bins: the last one holds "
         "its upper edge", 0.0), (PERCENT, 100),
    ], "if every answer is sure and wrong it must be 1", "the calibration error", 1e-6)


@ece_battery.property("refuses what are no probabilities")
def ece_refuses(function):
    refuse_bad_probabilities(function)


# fit_temperature

temperature_battery = Battery(
    "fit_temperature", "fit_temperature(logits, labels) -> float in [0.01, 100]",
    chapter=9, takes=("logits", "labels"),
)


def drawn_labels(logits, seed=0):
    """Labels that follow the probabilities that the logits say."""
    generator = torch.Generator().manual_seed(seed)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


def minimum(loss, low=0.01, high=100.0):
    """The argument in a range with the smallest loss, by a grid twice refined."""
    low, high = math.log(low), math.log(high)
    for _ in range(4):
        grid = torch.linspace(low, high, 25, dtype=torch.float64)
        best = int(torch.stack([loss(t) for t in grid.exp()]).argmin())
        step = (high - low) / 24
        low, high = grid[best].item() - step, grid[best].item() + step
    return math.exp((low + high) / 2)


def temperature_causes(logits, labels, best):
    """What other fits give."""
    entropy = torch.nn.functional.cross_entropy
    one_hot = torch.nn.functional.one_hot(labels, logits.shape[-1]).double()
    chosen = logits.argmax(-1)
    return [
        ("the logits are multiplied by T, not divided: this is 1 / T", lambda: 1 / best),
        ("it is the logarithm of T: take its exponential", lambda: math.log(best)),
        ("it is the root of T", lambda: math.sqrt(best)),
        ("it is T squared", lambda: best**2),
        ("it fits the model's own answers, not the true labels",
         lambda: minimum(lambda t: entropy(logits / t, chosen))),
        ("it makes squared distances smallest (the Brier score): use the cross-entropy",
         lambda: minimum(lambda t: ((logits / t).softmax(-1) - one_hot).square().mean())),
        ("softmax is applied before the cross-entropy, which applies it once more: "
         "give it logits / T",
         lambda: minimum(lambda t: entropy((logits / t).softmax(-1), labels))),
        ("softmax is applied to the logits before they are divided: divide first",
         lambda: minimum(lambda t: entropy(logits.softmax(-1) / t, labels))),
        ("it makes the mean confidence equal to the accuracy: use the cross-entropy",
         lambda: minimum(lambda t: ((logits / t).softmax(-1).amax(-1).mean()
                                    - (chosen == labels).double().mean()).abs())),
        ("it makes the calibration error smallest, which jumps with the bins: use the "
         "cross-entropy", lambda: minimum(lambda t: torch.tensor(gap(in_bins(
             *_sure_and_right((logits / t).softmax(-1), labels), 10))))),
    ]


def _sure_and_right(rows, labels):
    sure, chosen = rows.max(-1)
    return sure, (chosen == labels).double()


@temperature_battery.property("finds the T whose logits / T have the least cross-entropy")
def temperature_fits(function):
    entropy = torch.nn.functional.cross_entropy
    cases = []
    for factor, seed in ((3.0, 1), (0.4, 2), (12.0, 4)):
        plain = 1.2 * sample(300, 4, seed=30 + seed, dtype=torch.float64)
        labels = drawn_labels(plain, seed)
        logits = factor * plain
        value = function(logits.clone(), labels.clone())
        expect(
            not isinstance(value, torch.Tensor),
            "the temperature must be a plain float, but it is a tensor: end with .item()",
        )
        cases.append((factor, logits, labels, expect_float(value, "the temperature")))
    values = [value for *_, value in cases]
    expect(
        max(values) - min(values) > 1e-6,
        f"it gives {values[0]:g} whatever the logits and labels are: nothing is fitted. "
        "If it fits accuracy, no T is better than another, for none changes an answer: "
        "use the cross-entropy. If the model's own answers stand in place of the labels, "
        "the surest model is always best",
    )
    for factor, logits, labels, value in cases:
        best = minimum(lambda t, lo=logits, la=labels: entropy(lo / t, la))
        if abs(value / best - 1) < 0.02:
            continue
        fits = []
        for hint, mistaken in temperature_causes(logits, labels, best):
            other = mistaken()
            fits.append((abs(value - other) / abs(other), hint))
        if min(fits)[0] < 0.02:
            raise Wrong(min(fits)[1])
        text = (f"for logits that are {factor:g} times what they should be, T must be "
                f"{best:.3f}, but it is {value:.3f}")
        if value <= 0.0101 or value >= 99:
            text += (": that is an end of the range, so the search goes the wrong way (it "
                     "makes the loss large, not small), or the labels are not used")
        else:
            text += (
                ", where the cross-entropy is larger: too few steps or too small a rate, a "
                "grid too coarse, a range that does not reach that far (it is 0.01 to 100), "
                "or something else than the cross-entropy is made small"
            )
        raise Wrong(text)


@temperature_battery.property("does as well with logarithms of probabilities")
def temperature_shift(function):
    logits = 3 * sample(400, 3, seed=41, dtype=torch.float64)
    labels = drawn_labels(logits / 3, 7)
    one = expect_float(function(logits.clone(), labels.clone()), "the temperature")
    for name, other, truth in (
        ("logarithms of probabilities", logits.log_softmax(-1), labels),
        ("float32 logits", logits.float(), labels),
        ("labels as a list", logits.clone(), labels.tolist()),
        ("logits that need a gradient", logits.clone().requires_grad_(), labels),
    ):
        try:
            found = function(other, truth)
        except Broke as broke:
            raise Wrong(f"with {name} it {broke}") from None
        expect(abs(found / one - 1) < 0.01, f"with {name} it finds another temperature: "
               f"{found:.3f} and {one:.3f}. Adding a number to a row of logits changes "
               "nothing")


@temperature_battery.property("stays within 0.01 and 100")
def temperature_range(function):
    logits = torch.tensor([[5.0, 0.0], [0.0, 5.0]])
    for labels, what in (([0, 1], "always right"), ([1, 0], "always wrong")):
        value = expect_float(function(logits.clone(), labels), "the temperature")
        expect(
            math.isfinite(value) and 0.0099 <= value <= 101,
            f"for a model that is {what} there is no best T, and it runs off to {value:g}: "
            "keep it within 0.01 and 100",
        )
        expect((value < 1) == (what == "always right"), f"for a model that is {what} it finds "
               f"{value:g}: T above 1 makes it less sure, below 1 more sure. The search "
               "goes the wrong way")


@temperature_battery.property("refuses what is not finite, and labels that do not fit")
def temperature_refuses(function):
    two = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    for hint, logits, labels in (
        ("minus infinity among the logits must be refused (the logarithm of a "
         "probability of 0)", torch.tensor([[0.0, float("-inf")], [1.0, 0.0]]), [0, 0]),
        ("NaN among the logits must be refused", two * float("nan"), [0, 1]),
        ("2 rows and 3 labels must be refused", two, [0, 1, 0]),
        ("2 rows and 1 label must be refused", two, [0]),
        ("a label 2 where there are 2 classes must be refused", two, [0, 2]),
        ("logits of one axis must be refused: (texts, num_labels)", torch.zeros(2), [0, 1]),
    ):
        refuses(function, hint, logits, labels)


# The exercises of the chapter


def expect_seeded(call):
    """Refuse a ``call(seed)`` that draws from elsewhere than its seed."""
    with own_generators(
        "it draws from a generator that everybody shares, or seeds it: make one of its "
        "own, torch.Generator().manual_seed(seed) or np.random.default_rng(seed)"
    ):
        one = torch.as_tensor(call(4))
    torch.manual_seed(97)
    np.random.seed(97)
    random.seed(97)
    expect(near(one, torch.as_tensor(call(4))), "the same seed gives something else the second "
           "time: the seed is not used for the generator that draws")
    expect(not near(one, torch.as_tensor(call(5))), "another seed changes nothing: the seed is "
           "not used")


weighted_battery = Battery(
    "weighted_f1", "weighted_f1(confusion) -> float", chapter=9,
    takes=("confusion",),
)


def weighted_of(c):
    return (f1_of(c) * ratio(c.sum(-1), total(c)[..., None])).sum(-1)


@weighted_battery.property("weighs each class's F1 by its share of the texts")
def weighted_plain(function):
    for matrix in (MATRIX, HOLES):
        wanted = float(weighted_of(matrix))
        measures = [(hint, m) for hint, m in NOT_MACRO if "this is weighted" not in hint]
        measures = [
            ("this is macro-F1, in which each class counts the same", macro_of),
            ("the weights are the counts: divide them by their sum",
             lambda c: (f1_of(c) * c.sum(-1)).sum(-1)),
            ("the weighted F1s are divided by the number of classes once more: the shares "
             "are weights enough", lambda c: weighted_of(c) / c.shape[-1]),
            ("the classes are weighted by how often they were answered (column sums): take "
             "the row sums", lambda c: (f1_of(c) * ratio(c.sum(-2), total(c)[..., None])).sum(-1)),
            ("the weights go the wrong way: the more texts, the more a class counts",
             lambda c: (f1_of(c) * (1 - ratio(c.sum(-1), total(c)[..., None]))).sum(-1)),
            ("precision is weighted, not F1",
             lambda c: (precision_of(c) * ratio(c.sum(-1), total(c)[..., None])).sum(-1)),
            ("it is the accuracy: weighted recall. Weigh the F1s",
             lambda c: ratio(hits(c).sum(-1), total(c))), *measures,
        ]
        explain_number(
            function(torch.from_numpy(matrix).clone()), wanted,
            number_causes(wanted, measures, matrix),
            "it is not the sum of each class's F1 times the share of the texts that it "
            f"has, which is {wanted:.4f}", "weighted F1", 1e-6,
        )


wilson_battery = Battery(
    "wilson", "wilson(share, n, z=1.96) -> (low, high)", chapter=9, takes=("share", "n", "z"),
)


def wilson_ends(p, n, z=1.96, centre=1.0, inner=1.0, below=1.0):
    """Wilson's interval, or with a part of the formula left out (0)."""
    middle = p + centre * z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + inner * z * z / (4 * n * n))
    return torch.tensor([middle - half, middle + half]).double() / (1 + below * z * z / n)


def wilson_causes(p, n, z):
    """What is mistaken for Wilson's interval."""
    whole = wilson_ends(p, n, z, below=0)
    middle, half = whole.mean(), (whole[1] - whole[0]) / 2
    tilt = torch.tensor([-1.0, 1.0]).double()
    return as_tensors([
        ("this is the plain interval, share ± z √(share (1 - share) / n): Wilson's adds "
         "z² / 2n to the share and divides by 1 + z² / n",
         wilson_ends(p, n, z, centre=0, inner=0, below=0)),
        ("the division by 1 + z² / n is missing", whole),
        ("only the half is divided by 1 + z² / n: divide the middle too",
         middle + tilt * half / (1 + z * z / n)),
        ("only the middle is divided by 1 + z² / n: divide the half too",
         middle / (1 + z * z / n) + tilt * half),
        ("the middle is not moved: z² / 2n is missing", wilson_ends(p, n, z, centre=0)),
        ("z² / 4n² is missing in the root", wilson_ends(p, n, z, inner=0)),
        ("in the root stands z² / 4n: it must be z² / 4n²", wilson_ends(p, n, z, inner=n)),
        ("z² / n is added to the share: it must be z² / 2n", wilson_ends(p, n, z, centre=2)),
        ("low and high have changed places", wilson_ends(p, n, z).flip(0)),
        ("z is always 1.96: the argument is not used", wilson_ends(p, n)),
        ("z is 2: by default it is 1.96", wilson_ends(p, n, 2.0)),
        ("it is in percent", 100 * wilson_ends(p, n, z)),
    ])


@wilson_battery.property("gives both ends of the formula")
def wilson_formula(function):
    for p, n, *z in ((0.7, 30), (0.2, 11), (0.6, 25, 1.0)):
        result = function(p, n, *z)
        expect(isinstance(result, (tuple, list)) and len(result) == 2,
               "it must return two numbers, low and high")
        ends = torch.tensor([expect_float(v, "an end") for v in result]).double()
        wanted = wilson_ends(p, n, *z)
        explain(ends, wanted, wilson_causes(p, n, *(z or [1.96])),
                f"for a share of {p} on {n} texts it gives {ends.tolist()} instead of "
                f"{wanted.tolist()}", 1e-4)


@wilson_battery.property("stays within 0 and 1, also where all is right")
def wilson_edge(function):
    low, high = function(1.0, 20)
    expect(0.8 < low < 0.9 and abs(high - 1) < 1e-6, "where 20 of 20 are right the ends must be "
           f"about 0.84 and 1, but they are {low:.3f} and {high:.3f}")


counts_battery = Battery(
    "bootstrap_counts", "bootstrap_counts(confusion, resamples, seed=0) -> (resamples,)",
    chapter=9, takes=("confusion", "resamples", "seed"),
)


@counts_battery.property("gives the macro-F1 of matrices drawn by their counts")
def counts_draws(function):
    matrix = tally(FEW, FEW_CHOSEN, 3)
    values = function(torch.from_numpy(matrix).clone(), 1000)
    expect(not isinstance(values, (np.ndarray, list)), "it must return a tensor: "
           "torch.from_numpy(…)")
    expect_tensor(values, (1000,))
    expect(not values.isnan().any(), "there are NaNs among the scores: a matrix drawn may lack "
           "a class, and then 0 is divided by 0")
    rng, n, many = np.random.default_rng(0), len(FEW), 4000

    def of(chances, texts=n):
        return macro_of(rng.multinomial(texts, np.ravel(chances), size=many).reshape(-1, 3, 3))

    def row_by_row():
        rows = [rng.multinomial(row.sum(), row / row.sum(), size=many) for row in matrix]
        return macro_of(np.stack(rows, axis=1))

    rows = every_draw()
    c = tally(FEW[rows], FEW_CHOSEN[rows], 3)
    explain_draws(values, macro_of(c), [
        ("each row is drawn alone, so that the number of texts of a class never changes: "
         "draw all cells at once", row_by_row),
        ("the cells all have the same chance: it is the count over the number of texts",
         lambda: of(np.ones((3, 3)) / 9)),
        *((f"the matrices drawn hold {k} texts instead of {n}, as many as there are",
           lambda k=k: of(matrix / n, k)) for k in (1, 2, 3, 5, 8, 9, 100, 1000)),
        ("each cell is drawn alone (Poisson or binomial), so that the number of texts "
         "changes: draw from one multinomial",
         lambda: macro_of(rng.poisson(np.broadcast_to(matrix, (many, 3, 3))))),
        ("each cell is drawn alone (Poisson or binomial), so that the number of texts "
         "changes: draw from one multinomial",
         lambda: macro_of(rng.binomial(n, np.broadcast_to(matrix / n, (many, 3, 3))))),
        *((f"of each matrix {hint}", lambda m=m: m(c)) for hint, m in NOT_MACRO),
    ], "these are not the macro-F1s of matrices drawn from a multinomial distribution with "
       "the counts over the number of texts as chances")


@counts_battery.property("draws by its seed alone")
def counts_seed(function):
    matrix = torch.from_numpy(MATRIX)
    expect_seeded(lambda seed: function(matrix.clone(), 20, seed))


swap_battery = Battery(
    "swap_test", "swap_test(labels, first, second, num_labels, rounds=500, seed=0) -> float",
    chapter=9, takes=("labels", "first", "second", "num_labels", "rounds", "seed"),
)
EIGHT = np.array([0, 1, 2, 0, 1, 2, 0, 1])
EIGHT_FIRST, EIGHT_SECOND = np.array([0, 1, 2, 0, 1, 0, 1, 1]), np.array([1, 1, 0, 0, 2, 2, 1, 0])


def gaps(first, second):
    """Macro-F1 of first minus second, for many systems."""
    return macro_of(tally(EIGHT, first, 3)) - macro_of(tally(EIGHT, second, 3))


@swap_battery.property("gives the share of swaps with a difference at least as large")
def swap_share(function):
    rounds = 200
    value = expect_float(function(EIGHT, EIGHT_FIRST, EIGHT_SECOND, 3, rounds=rounds), "p")
    flips = np.array(list(itertools.product((False, True), repeat=8)))
    real = gaps(EIGHT_FIRST, EIGHT_SECOND)
    drawn = gaps(np.where(flips, EIGHT_SECOND, EIGHT_FIRST),
                 np.where(flips, EIGHT_FIRST, EIGHT_SECOND))
    alone = gaps(np.where(flips, EIGHT_SECOND, EIGHT_FIRST), EIGHT_SECOND)
    close = 4 * 0.5 / rounds**0.5 * 0.9

    def share(condition):
        return float(np.mean(condition))

    wanted = share(abs(drawn) >= abs(real) - 1e-9)
    if abs(value - wanted) < close:
        return
    for hint, other in (
        ("the sign counts: take absolute values of both differences, for either system may "
         "be the better one", share(drawn >= real - 1e-9)),
        ("it counts the differences that are smaller: at least as large as the real one",
         share(abs(drawn) < abs(real) - 1e-9)),
        ("equal differences do not count: at least as large (>=) as the real one",
         share(abs(drawn) > abs(real) + 1e-9)),
        ("only one of the two gets the other's answers: exchange them",
         share(abs(alone) >= abs(real) - 1e-9)),
        ("all texts are swapped together, so nothing but the sign changes: draw for each "
         "text", 1.0),
        ("it is the number of rounds, not their share", wanted * rounds),
        ("it is the other way round: 1 minus p", 1 - wanted),
    ):
        if abs(value - other) < close * max(1, rounds * (other > 1)):
            raise Wrong(hint)
    raise Wrong(f"for eight texts with a difference of {real:.3f} about {wanted:.2f} of the swaps "
                f"reach it, but p is {value:.3f}")


@swap_battery.property("is 1 for equal systems, and small, but not 0, for unlike ones")
def swap_ends(function):
    value = expect_float(function(EIGHT, EIGHT_FIRST, EIGHT_FIRST.copy(), 3, rounds=20), "p")
    expect(value > 0.99, f"two equal systems differ by 0, and every swap reaches that: p must "
           f"be 1, but it is {value:.3f}. Equal differences count (>=)")
    labels = np.arange(90) % 3
    wrong = np.where(np.arange(90) % 2 > 0, (labels + 1) % 3, labels)
    value = expect_float(function(labels, labels.copy(), wrong, 3, rounds=49), "p")
    expect(value > 0, "p is 0, as if it could never happen: the answers as they are count as "
           "one of the rounds, (reached + 1) / (rounds + 1)")
    expect(value < 0.05, "perfect answers against half wrong ones on 90 texts: hardly any swap "
           f"reaches that difference, but p is {value:.2f}")


@swap_battery.property("draws by its seed alone")
def swap_seed(function):
    rng = np.random.default_rng(8)
    labels, one, two = rng.integers(3, size=(3, 60))
    expect_seeded(lambda seed: [
        function(labels, one, other, 3, rounds=30, seed=seed)
        for other in (two, np.where(np.arange(60) < 30, two, one), np.roll(two, 1))
    ])


perfect_battery = Battery(
    "perfect_error", "perfect_error(texts, bins=10, seed=0) -> float",
    chapter=9, takes=("texts", "bins", "seed"),
)


@perfect_battery.property("is the error of a model whose labels are drawn from its beliefs")
def perfect_band(function):
    values = [expect_float(function(374, seed=seed), "the error") for seed in range(6)]
    mean = sum(values) / 6
    if not 0.02 < mean < 0.06:
        raise Wrong(
            f"on 374 texts and ten bins it is {mean:.3f} on average; 0.02 to 0.06 was "
            "expected. " + (
                "So large an error means that the labels do not follow the probabilities: "
                "draw each from its own row (torch.multinomial), not as the argmax, and "
                "not all alike" if mean > 0.06 else
                "So small an error, on so few texts? Look at how many are drawn, and take "
                "the expected calibration error")
        )


@perfect_battery.property("shrinks with more texts, and grows with more bins")
def perfect_trend(function):
    one, many, fine = (
        expect_float(function(*a), "the error") for a in ((374, 10), (20_000, 10), (374, 50)))
    expect(many < 0.6 * one, f"on 20,000 texts it must be much smaller than on 374, but it is "
           f"{many:.3f} and {one:.3f}: the number of texts is not used, or the labels do not "
           "follow the probabilities")
    expect(fine > 1.5 * one, f"with 50 bins it must be much larger than with 10, but it is "
           f"{fine:.3f} and {one:.3f}: the argument bins is not used")


@perfect_battery.property("draws by its seed alone")
def perfect_seed(function):
    expect_seeded(lambda seed: [function(50, 10, seed)])


luck_battery = Battery(
    "winners_luck", "winners_luck(systems, texts, share=0.65, worlds=2000, seed=0) -> float",
    chapter=9, takes=("systems", "texts", "share", "worlds", "seed"),
)


def best_of(systems, texts, share):
    """The mean of the best of so many equal systems, exactly."""
    k = np.arange(texts + 1)
    logs = np.cumsum(np.log(np.concatenate([[1], (texts - k[:-1]) / (k[1:])])))
    below = np.cumsum(np.exp(logs + k * math.log(share) + (texts - k) * math.log(1 - share)))
    return (1 - below[:-1] ** systems).sum() / texts


@luck_battery.property("is by how many points the best of equal systems seems better")
def luck_points(function):
    for systems, texts, share in ((20, 374, 0.65), (5, 100, 0.8)):
        value = expect_float(function(systems, texts, share), "the luck")
        best = best_of(systems, texts, share)
        wanted, sd = 100 * (best - share), 100 * math.sqrt(share * (1 - share) / texts)
        if abs(value - wanted) < 0.12 * sd:
            continue
        for hint, other in (
            ("it is a share: give points, times 100", wanted / 100),
            ("it is the score of the best: subtract what it is truly worth", 100 * best),
            ("it is the score of the best: subtract what it is truly worth", best),
            ("it is the mean of the systems, and not the best of them: the maximum over the "
             "systems, then the mean over the worlds", 0.0),
            ("it is the luck of a single system", sd),
            ("it is the best of one system more or less",
             100 * (best_of(systems - 1, texts, share) - share)),
            ("it is the best minus the worst",
             100 * (best - 1 + best_of(systems, texts, 1 - share))),
            ("it is the number of texts, not points", (best - share) * texts),
            ("the sign is wrong", -wanted),
        ):
            if abs(value - other) < 0.1 * sd / (1 if abs(other) > 0.5 else 30) + 1e-9:
                raise Wrong(hint)
        raise Wrong(
            f"the best of {systems} systems, each worth {100 * share:g} %, seems "
            f"{wanted:.1f} points better on {texts} texts, but it gives {value:.2f}"
            + (": the maximum runs over the worlds as well? Take it over the systems, then the "
               "mean over the worlds" if value > wanted else "")
        )


@luck_battery.property("draws by its seed alone")
def luck_seed(function):
    expect_seeded(lambda seed: [function(3, 50, 0.6, 40, seed)])


runs_battery = Battery(
    "bootstrap_runs",
    "bootstrap_runs(labels, runs, num_labels, *, resamples=1000, seed=0) -> (resamples,)",
    chapter=9, takes=("labels", "runs", "num_labels", "resamples", "seed"),
)
# Two runs of a model on the few texts: a good one and a poor one.
FEW_RUNS = np.stack([FEW_CHOSEN, FEW_OTHER])


@runs_battery.property("draws texts and runs, and averages the runs on the same texts")
def runs_draws(function):
    values = function(FEW.tolist(), FEW_RUNS.tolist(), 3, resamples=300)
    expect(not isinstance(values, (np.ndarray, list, tuple)), "it must return a tensor of "
           "(resamples,)")
    expect_tensor(values, (300,))
    rows = every_draw()
    f1 = np.stack([macro_of(tally(FEW[rows], run[rows], 3)) for run in FEW_RUNS])
    pairs = np.array(list(itertools.product(range(2), repeat=2)))  # runs that are drawn
    pooled = np.stack([
        macro_of(sum(tally(FEW[rows], FEW_RUNS[k][rows], 3) for k in pair))
        for pair in pairs
    ])
    rng = np.random.default_rng(0)
    own = (f1[pairs[:, 0], :, None] + f1[pairs[:, 1], None, :]) / 2
    alone = rng.choice(own.ravel(), 4000)
    real = np.array([macro_of(tally(FEW, run, 3)) for run in FEW_RUNS])
    explain_draws(values, f1[pairs].mean(1), [
        ("only the texts are drawn: draw the runs too, as many as there are, with "
         "replacement (without, all of them come every time)", lambda: f1.mean(0)),
        ("only the runs are drawn: draw the texts too", lambda: real[pairs].mean(1)),
        ("one run is drawn for each test set: draw as many as there are, and take the mean "
         "of their scores", lambda: f1),
        ("the answers of the runs are pooled before they are scored: score each run, then "
         "take the mean", lambda: pooled),
        ("the answers of all runs are pooled, and no runs drawn",
         lambda: macro_of(sum(tally(FEW[rows], run[rows], 3) for run in FEW_RUNS))),
        ("each run has test sets of its own: draw the texts once, and score every run on "
         "the same", lambda: alone),
        ("the best of the runs drawn is taken: take their mean",
         lambda: f1[pairs].max(1)),
        (PERCENT, lambda: 100 * f1[pairs].mean(1)),
    ], "these are not means of macro-F1 over as many runs as there are, drawn with "
       "replacement, on texts drawn with replacement, the same for all runs")


@runs_battery.property("with a single run it is the bootstrap of its texts")
def runs_one(function):
    values = function(FEW.tolist(), [FEW_CHOSEN.tolist()], 3, resamples=200)
    rows = every_draw()
    expect(
        apart(values, macro_of(tally(FEW[rows], FEW_CHOSEN[rows], 3))) < 0.22,
        "with a single run only the texts can be drawn, but the scores are spread otherwise",
    )


@runs_battery.property("draws by its seed alone")
def runs_seed(function):
    expect_seeded(lambda seed: function(
        FEW.tolist(), FEW_RUNS.tolist(), 3, resamples=30, seed=seed))
