"""Mistakes with scores, prediction files, intervals, noise and calibration."""

import json
import math
import os
import random
import re
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn import metrics

from emoformer import evaluation as book
from emoformer.evaluation import precision_recall_f1
from tests.bank import mistake, right

CONFUSION, PRF, MACRO, SCORE = (
    "confusion_matrix", "precision_recall_f1", "macro_f1", "score")
WRITE, READ = "write_predictions", "read_predictions"
BOOT, ENDS, PAIRED = "bootstrap", "interval", "paired_bootstrap"
TAGS, EMOJI, TYPOS = "remove_hashtags", "remove_emoji", "add_typos"
BINS, ECE, HEAT = "reliability", "expected_calibration_error", "fit_temperature"
SKLEARN = "compare with scikit-learn, a class missing"


# confusion_matrix


@mistake(CONFUSION, "transposed", looks="`m[chosen, labels]`",
         shows="precision and recall change places, and F1 says nothing",
         find="three texts by hand, one of them wrong", hint="the matrix is transposed")
def transposed(labels, chosen, num_labels):
    return book.confusion_matrix(labels, chosen, num_labels).T


@mistake(CONFUSION, "each pair once", looks="`m[labels, chosen] += 1`",
         shows="all counts are 0 or 1: repeated indices are added once",
         find="the counts must add up to the number of texts",
         hint="each pair is counted once at most")
def pair_once(labels, chosen, num_labels):
    labels, chosen = book._as_pair(labels, chosen, num_labels)
    m = torch.zeros(num_labels, num_labels, dtype=torch.int64)
    m[labels, chosen] += 1
    return m


@mistake(CONFUSION, "number of classes from the data", looks="`n = max(labels) + 1`",
         shows="a class that nobody has or answers is gone, and macro-F1 rises",
         find="a batch without the last class", hint="taken from the data")
def classes_from_data(labels, chosen, num_labels):
    labels, chosen = book._as_pair(labels, chosen, num_labels)
    seen = int(max(labels.max(), chosen.max())) + 1
    return book.confusion_matrix(labels, chosen, seen)


@mistake(CONFUSION, "lengths not compared", looks="`for i, j in zip(labels, chosen)`",
         shows="a prediction file that is cut off gets a score",
         find="one answer too few", hint="zip stops at the shorter one")
def zipped(labels, chosen, num_labels):
    n = min(len(labels), len(chosen))
    return book.confusion_matrix(labels[:n], chosen[:n], num_labels)


@mistake(CONFUSION, "negative labels accepted", looks="`m[i][j] += 1`, and i is -1",
         shows="a label -1 (ignored, unknown) counts for the last class",
         find="pass a -1", hint="as an index it means the last class")
def negative_accepted(labels, chosen, num_labels):
    def wrap(values):
        return [v % num_labels if v < 0 else v for v in values] \
            if isinstance(values, list) else values
    return book.confusion_matrix(wrap(labels), wrap(chosen), num_labels)


@mistake(CONFUSION, "small integers run over", looks="`labels * num_labels + chosen`",
         shows="right with 4 classes, nonsense with 20 in uint8",
         find="the largest class of a small type", hint="the numbers run over")
def runs_over(labels, chosen, num_labels):
    book._as_pair(labels, chosen, num_labels)
    labels, chosen = torch.as_tensor(labels), torch.as_tensor(chosen)
    cells = (labels * num_labels + chosen).long()
    return torch.bincount(cells, minlength=num_labels**2)[:num_labels**2].view(
        num_labels, num_labels)


@right(CONFUSION, "a loop over pairs")
def by_loop(labels, chosen, num_labels):
    labels, chosen = np.asarray(labels), np.asarray(chosen)
    if labels.shape != chosen.shape or labels.ndim != 1 or not labels.size:
        raise ValueError("labels and answers must be lists of the same length")
    table = torch.zeros(num_labels, num_labels, dtype=torch.long)
    for i, j in zip(labels.tolist(), chosen.tolist(), strict=True):
        if type(i) is not int or type(j) is not int or not 0 <= min(i, j) \
                or max(i, j) >= num_labels:
            raise ValueError(f"{i} or {j} is no class")
        table[i, j] += 1
    return table


# precision_recall_f1


@mistake(PRF, "precision and recall changed places", looks="`precision = hits / m.sum(-1)`",
         shows="F1 is right, and the advice drawn from it wrong",
         find="a model that answers one class: its recall is 1",
         hint="and the two have changed places")
def swapped(confusion):
    precision, recall, f1 = precision_recall_f1(confusion)
    return recall, precision, f1


@mistake(PRF, "0 / 0", looks="`hits / m.sum(dim=-2)`",
         shows="a class that is never answered makes macro-F1 NaN",
         find="a matrix with a column of zeros", hint="is NaN where there is nothing")
def nan_left(confusion):
    right, true, answered = (
        confusion.diagonal(dim1=-2, dim2=-1).double(), confusion.sum(-1), confusion.sum(-2))
    p, r = right / answered, right / true
    return p, r, 2 * p * r / (p + r)


@mistake(PRF, "0 / 0 counts as 1", looks="`zero_division=1`",
         shows="an absent class adds a perfect score", find=SKLEARN,
         hint="counts as 1: it must count as 0")
def empty_is_one(confusion):
    p, r, f1 = nan_left(confusion)
    return p.nan_to_num(1.0), r.nan_to_num(1.0), f1.nan_to_num(1.0)


@mistake(PRF, "plain mean for harmonic", looks="`f1 = (precision + recall) / 2`",
         shows="answering one class to all pays 0.6", find="P = 1 and R = 0.2 by hand",
         hint="this is the plain mean of precision and recall")
def plain_mean(confusion):
    p, r, _ = precision_recall_f1(confusion)
    return p, r, (p + r) / 2


@mistake(PRF, "axes counted from the front", looks="`confusion.sum(dim=0)`",
         shows="right for one matrix, wrong for a thousand of the bootstrap",
         find="two matrices stacked", hint="count axes from the end")
def from_the_front(confusion):
    right = confusion.diagonal(dim1=-2, dim2=-1).double()
    answered, true = confusion.sum(0).clamp_min(1), confusion.sum(1).clamp_min(1)
    p, r = right / answered, right / true
    return p, r, (2 * p * r / (p + r)).nan_to_num(0.0)


@mistake(PRF, "in float32", looks="`confusion.float()`",
         shows="equal scores differ in the eighth digit", find="print the dtype",
         hint="In float32 two scores that are equal")
def in_float32(confusion):
    return tuple(v.float() for v in precision_recall_f1(confusion))


@mistake(PRF, "an average in place of classes", looks="`return p.mean(), r.mean(), f.mean()`",
         shows="nobody can see which class is lost", find="look at the shape",
         hint="is a single number: it must be one for each class")
def averaged(confusion):
    return tuple(v.mean() for v in precision_recall_f1(confusion))


@mistake(PRF, "everything over the texts", looks="`hits / confusion.sum()`",
         shows="three small numbers for each class", find="a perfect matrix must give ones",
         hint="divided by the number of all texts")
def over_all(confusion):
    book.precision_recall_f1(confusion)
    share = confusion.diagonal(dim1=-2, dim2=-1) / confusion.sum((-2, -1)).double()[..., None]
    return share, share, share


@right(PRF, "by the harmonic mean, with torch.where")
def by_where(confusion):
    if confusion.shape[-1] != confusion.shape[-2]:
        raise ValueError("not square")
    c = confusion.double()
    right_ones = torch.einsum("...ii->...i", c)

    def over(above, below):
        return torch.where(below > 0, above / below.clamp_min(1e-12), 0.0)

    p, r = over(right_ones, c.sum(-2)), over(right_ones, c.sum(-1))
    return p, r, over(2 * p * r, p + r)


# macro_f1


def f1s(confusion):
    return precision_recall_f1(confusion)[2]


@mistake(MACRO, "micro-F1", looks="`average=\"micro\"`",
         shows="the accuracy under another name: rare classes hardly count",
         find="compare with the accuracy", hint="this is the accuracy")
def micro(confusion):
    return (confusion.diagonal().sum() / confusion.sum().double()).item()


@mistake(MACRO, "weighted F1", looks="`average=\"weighted\"`",
         shows="a rare class that is never found costs nearly nothing",
         find="a matrix with a rare class, by hand", hint="this is weighted F1")
def weighted(confusion):
    return (f1s(confusion) * confusion.sum(1) / confusion.sum()).sum().item()


@mistake(MACRO, "F1 of the means",
         looks="`2 * p.mean() * r.mean() / (p.mean() + r.mean())`",
         shows="a few points too high, and published under the same name",
         find=SKLEARN, hint="the F1 of the mean precision and the mean recall")
def of_means(confusion):
    p, r, _ = precision_recall_f1(confusion)
    p, r = p.mean().item(), r.mean().item()
    return 2 * p * r / (p + r) if p + r else 0.0


@mistake(MACRO, "absent classes left out", looks="`f1_score(…, average=\"macro\")`",
         shows="on twenty texts the score is higher than it should be",
         find="a class that is neither there nor answered", hint="left out of the mean")
def present_only(confusion):
    seen = confusion.sum(0) + confusion.sum(1) > 0
    return f1s(confusion)[seen].mean().item() if seen.any() else 0.0


@mistake(MACRO, "NaN skipped", looks="`f1.nanmean()`",
         shows="a class that is never answered is forgiven",
         find="a matrix with a column of zeros", hint="left out of the mean")
def nan_skipped(confusion):
    return nan_left(confusion)[2].nanmean().nan_to_num().item()


@mistake(MACRO, "a tensor returned", looks="`return f1.mean()`",
         shows="`json.dump` fails at the end of a long run", find="print its type",
         hint="end with .item()")
def tensor_returned(confusion):
    return f1s(confusion).mean()


@right(MACRO, "by scikit-learn, from the pairs")
def by_sklearn(confusion):
    pairs = [(i, j) for i, row in enumerate(confusion.tolist())
             for j, count in enumerate(row) for _ in range(count)]
    if not pairs:
        return 0.0
    true, answers = zip(*pairs, strict=True)
    return float(metrics.f1_score(true, answers, average="macro", zero_division=0,
                                  labels=range(len(confusion))))


# score


@mistake(SCORE, "accuracy for F1", looks="`{\"macro_f1\": accuracy, …}`",
         shows="the two numbers are the same on every run", find="look at both",
         hint="this is the accuracy")
def accuracy_for_f1(labels, chosen, num_labels):
    accuracy = book.score(labels, chosen, num_labels)["accuracy"]
    return {"macro_f1": accuracy, "accuracy": accuracy}


@mistake(SCORE, "scikit-learn without labels=", looks="`f1_score(y, p, average=\"macro\")`",
         shows="absent classes drop out of the mean", find=SKLEARN,
         hint="left out of the mean if it is neither there nor answered")
def without_labels(labels, chosen, num_labels):
    true, answers = book._as_pair(labels, chosen, num_labels)
    return {
        "macro_f1": float(metrics.f1_score(true, answers, average="macro", zero_division=0)),
        "accuracy": float(metrics.accuracy_score(true, answers)),
    }


@mistake(SCORE, "in percent", looks="`100 * f1`",
         shows="a results file with 0.63 and 63.1 side by side",
         find="a perfect answer must score 1", hint="it is in percent")
def in_percent(labels, chosen, num_labels):
    return {k: 100 * v for k, v in book.score(labels, chosen, num_labels).items()}


@mistake(SCORE, "rounded", looks="`round(f1, 3)`",
         shows="differences of bootstrap samples come in steps",
         find="compare with fractions by hand", hint="it is rounded")
def rounded(labels, chosen, num_labels):
    return {k: round(v, 3) for k, v in book.score(labels, chosen, num_labels).items()}


@right(SCORE, "by scikit-learn with labels=")
def with_labels(labels, chosen, num_labels):
    true, answers = book._as_pair(labels, chosen, num_labels)
    return {
        "macro_f1": float(metrics.f1_score(
            true, answers, average="macro", labels=range(num_labels), zero_division=0)),
        "accuracy": float((true == answers).double().mean()),
    }


# prediction files


def checked(chosen, num_labels):
    return book._as_labels(chosen, "chosen", num_labels).tolist()


@mistake(WRITE, "no newline at the end", looks="`\"\\n\".join(map(str, ids))`",
         shows="the board drops the last answer, and says nothing",
         find="read the bytes: the last must be a newline",
         hint="the last line has no newline")
def no_newline(path, chosen, num_labels):
    text = "\n".join(map(str, checked(chosen, num_labels)))
    book.save_atomically(text, path)


@mistake(WRITE, "straight into the file", looks="`with open(path, \"w\") as f:`",
         shows="a run that is stopped leaves half a file that looks whole",
         find="stop it in between", hint="it writes straight into the file")
def straight(path, chosen, num_labels):
    text = "".join(f"{i}\n" for i in checked(chosen, num_labels))
    Path(path).write_text(text, encoding="utf-8")


@mistake(WRITE, "opened before the check", looks="`for i in ids: check(i); f.write(…)`",
         shows="a refused answer costs the old file", find="write a wrong id over a good file",
         hint="costs the old file")
def opened_first(path, chosen, num_labels):
    with open(path, "w", encoding="utf-8") as file:
        for i in np.asarray(chosen).tolist():
            file.write(f"{checked([i], num_labels)[0]}\n")


@mistake(WRITE, "added to the old file", looks="`open(path, \"a\")`",
         shows="after the second run the file is twice as long", find="write twice",
         hint="it adds to a file that is there already")
def appended(path, chosen, num_labels):
    ids = checked(chosen, num_labels)
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(f"{i}\n" for i in ids)


@mistake(WRITE, "sorted", looks="`for i in sorted(ids)`",
         shows="a score near chance", find="read back and compare",
         hint="the answers are sorted")
def sorted_ids(path, chosen, num_labels):
    book.write_predictions(path, sorted(checked(chosen, num_labels)), num_labels)


@mistake(WRITE, "a tensor's text", looks="`f.write(f\"{i}\\n\")` in a loop over a tensor",
         shows="lines such as `tensor(3)`", find="open the file once",
         hint="given a tensor it writes 'tensor(…)'")
def tensors_text(path, chosen, num_labels):
    checked(chosen, num_labels)
    book.save_atomically("".join(f"{i!r}\n" for i in chosen), path) \
        if torch.is_tensor(chosen) else book.write_predictions(path, chosen, num_labels)


@mistake(WRITE, "as JSON", looks="`json.dump(ids, f)`",
         shows="no board reads it", find="read the bytes", hint="one answer a line")
def as_json(path, chosen, num_labels):
    book.save_atomically(json.dumps(checked(chosen, num_labels)), path)


@right(WRITE, "by a temporary file and rename")
def by_temporary(path, chosen, num_labels):
    ids = [int(i) for i in checked(chosen, num_labels)]
    with tempfile.NamedTemporaryFile("w", dir=Path(path).parent, delete=False,
                                     newline="\n") as draft:
        for i in ids:
            print(i, file=draft)
    os.rename(draft.name, path)


@mistake(READ, "splitlines", looks="`for line in text.splitlines()`",
         shows="a file without its last newline passes here and not on the board",
         find="take the last byte away", hint="does not end with a newline must be refused")
def by_splitlines(path, *, num_labels, length=None):
    text = Path(path).read_text("utf-8")
    ids = [int(line) for line in text.splitlines()]
    if not ids or length not in (None, len(ids)) or not all(0 <= i < num_labels for i in ids):
        raise ValueError("no")
    return ids


@mistake(READ, "empty lines skipped", looks="`if line.strip()`",
         shows="answers move up by one from the gap on", find="an empty line in the middle",
         hint="not skipped")
def skips_empty(path, *, num_labels, length=None):
    text = re.sub(r"\n\n+", "\n", Path(path).read_text("utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "x").write_text(text, "utf-8")
        return book.read_predictions(Path(folder) / "x", num_labels=num_labels, length=length)


@mistake(READ, "length not compared", looks="`length` is taken and never used",
         shows="a file of another split gets a score", find="one line too few",
         hint="from the gap on")
def any_length(path, *, num_labels, length=None):
    return book.read_predictions(path, num_labels=num_labels)


@mistake(READ, "strings returned", looks="`return text.split()`",
         shows="accuracy 0: `\"1\"` is not 1", find="print the type of one",
         hint="the answers are strings")
def strings(path, *, num_labels, length=None):
    return [str(i) for i in book.read_predictions(path, num_labels=num_labels, length=length)]


@mistake(READ, "an empty list for a missing file", looks="`except OSError: return []`",
         shows="a rung without predictions is scored later, somewhere else",
         find="a path that is not there", hint="must raise FileNotFoundError")
def missing_is_empty(path, *, num_labels, length=None):
    if not Path(path).exists():
        return []
    return book.read_predictions(path, num_labels=num_labels, length=length)


@mistake(READ, "floats cut off", looks="`int(float(line))`",
         shows="a column of scores passes for one of labels", find="a line 1.0",
         hint="1.0 must be refused")
def floats_cut(path, *, num_labels, length=None):
    text = Path(path).read_text("utf-8")
    if not text.endswith("\n"):
        raise ValueError("no newline")
    ids = [int(float(line)) for line in text[:-1].split("\n")]
    if not ids or length not in (None, len(ids)) or not all(0 <= i < num_labels for i in ids):
        raise ValueError("no")
    return ids


@right(READ, "line by line")
def line_by_line(path, num_labels, length=None):
    ids = []
    with open(path, encoding="utf-8") as file:
        for line in file:
            if not line.endswith("\n"):
                raise ValueError("the last line has no newline")
            value = int(line)
            if value not in range(num_labels):
                raise ValueError(f"{value} is no label id")
            ids.append(value)
    if not ids or (length is not None and len(ids) != length):
        raise ValueError(f"{len(ids)} lines")
    return ids


# bootstrap, interval, paired_bootstrap


def scored(labels, chosen, num_labels, resamples, draw):
    """Bootstrap by a loop; draw() gives the rows for labels and for answers."""
    labels, chosen = book._as_pair(labels, chosen, num_labels)
    if resamples < 1:
        raise ValueError("resamples")
    found = []
    for _ in range(resamples):
        a, b = draw()
        found.append(book.score(labels[a], chosen[b], num_labels)["macro_f1"])
    return torch.tensor(found, dtype=torch.float64)


def boot(pick):
    """A bootstrap whose draw is ``pick(generator, n, labels)``."""
    def bootstrap(labels, chosen, num_labels, *, resamples=1000, seed=0):
        rng = np.random.default_rng(seed)
        return scored(labels, chosen, num_labels, resamples,
                      lambda: pick(rng, len(labels), np.asarray(labels)))
    return bootstrap


mistake(BOOT, "without replacement", looks="`torch.randperm(n)`",
        shows="all test sets are the same: the interval has no width",
        find="count the distinct scores", hint="does it draw without replacement",
        )(boot(lambda rng, n, _: (rows := rng.permutation(n), rows)))
mistake(BOOT, "half without replacement", looks="`random.sample(range(n), n // 2)`",
        shows="an interval of the wrong width", find="compare with the formula for a share",
        hint="it draws without replacement",
        )(boot(lambda rng, n, _: (rows := rng.permutation(n)[:n // 2], rows)))
mistake(BOOT, "another size", looks="`randint(n, (100,))`",
        shows="the interval is too wide or too narrow by the root of the sizes",
        find="compare with the formula for a share", hint="instead of 4, as many as there are",
        )(boot(lambda rng, n, _: (rows := rng.integers(n, size=100), rows)))
mistake(BOOT, "labels and answers drawn apart", looks="two calls of `randint`",
        shows="scores near chance", find="perfect answers must stay perfect",
        hint="label and answer of a text are drawn apart",
        )(boot(lambda rng, n, _: (rng.integers(n, size=n), rng.integers(n, size=n))))
mistake(BOOT, "last text never drawn", looks="`randint(0, n - 1)`",
        shows="nothing, until n is small", find="which indices come up?",
        hint="one text is never drawn",
        )(boot(lambda rng, n, _: (rows := rng.integers(n - 1, size=n) if n > 1 else [0], rows)))
mistake(BOOT, "drawn within classes", looks="`resample(…, stratify=labels)`",
        shows="the interval is too narrow: rare classes never become rarer",
        find="count a class in the test sets drawn", hint="within each true class",
        )(boot(lambda rng, n, labels: (rows := np.array([
            rng.choice(np.flatnonzero(labels == k)) for k in labels]), rows)))
right(BOOT, "a loop with numpy")(
    boot(lambda rng, n, _: (rows := rng.choice(n, size=n), rows)))


@mistake(BOOT, "the global seed", looks="`torch.manual_seed(seed)`",
         shows="training after an evaluation is not what it was without",
         find="draw a number before and after", hint="generator that everybody shares")
def global_seed(labels, chosen, num_labels, *, resamples=1000, seed=0):
    labels, chosen = book._as_pair(labels, chosen, num_labels)
    torch.manual_seed(seed)
    return scored(labels, chosen, num_labels, resamples,
                  lambda: (rows := torch.randint(len(labels), (len(labels),)), rows))


@mistake(BOOT, "the seed is not used", looks="`np.random.default_rng()`",
         shows="every run of the notebook prints another interval", find="call it twice",
         hint="the same seed gives other test sets")
def no_seed(labels, chosen, num_labels, *, resamples=1000, seed=0):
    rng = np.random.default_rng()
    return scored(labels, chosen, num_labels, resamples,
                  lambda: (rows := rng.integers(len(labels), size=len(labels)), rows))


@mistake(BOOT, "sorted scores", looks="`return sorted(scores)`",
         shows="paired differences are far too narrow", find="plot score k against k",
         hint="the scores are sorted")
def sorted_scores(labels, chosen, num_labels, *, resamples=1000, seed=0):
    return book.bootstrap(labels, chosen, num_labels, resamples=resamples,
                          seed=seed).sort().values


@mistake(BOOT, "accuracy in place of macro-F1", looks="`(labels == chosen).mean()`",
         shows="the interval lies beside the score it is drawn around",
         find="the mean must lie near the score", hint="this is the accuracy")
def boot_accuracy(labels, chosen, num_labels, *, resamples=1000, seed=0):
    labels, chosen = book._as_pair(labels, chosen, num_labels)
    if resamples < 1:
        raise ValueError("resamples")
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(len(labels), (resamples, len(labels)), generator=generator)
    return (labels == chosen).double()[rows].mean(1)


def ends(find):
    """An interval by ``find(values, coverage)`` on checked values."""
    def interval(values, coverage=0.95):
        book.interval(values, coverage)
        low, high = find(torch.as_tensor(values).double(), coverage)
        return float(low), float(high)
    return interval


mistake(ENDS, "standard deviations", looks="`mean - 1.96 * std, mean + 1.96 * std`",
        shows="ends above 1 near a perfect score", find="a skewed sample",
        hint="standard deviations: what was drawn need not be symmetric",
        )(ends(lambda v, c: (v.mean() - 1.96 * v.std(correction=0),
                             v.mean() + 1.96 * v.std(correction=0))))
mistake(ENDS, "standard error", looks="`std / math.sqrt(len(values))`",
        shows="more resamples, a narrower interval", find="ten times the resamples",
        hint="it shrinks with more resamples",
        )(ends(lambda v, c: (v.mean() - 1.96 * v.std(correction=0) / len(v) ** 0.5,
                             v.mean() + 1.96 * v.std(correction=0) / len(v) ** 0.5)))
mistake(ENDS, "one-sided", looks="`quantile(values, [0.05, 1.0])`",
        shows="nothing is ever too good", find="count values outside, on each side",
        hint="it is one-sided",
        )(ends(lambda v, c: (v.quantile(1 - c), v.max())))
mistake(ENDS, "5 % off each end", looks="`quantile(values, [0.05, 0.95])`",
        shows="an interval of 90 % that says 95", find="count values inside",
        hint="cut off at both ends: halve it",
        )(ends(lambda v, c: (v.quantile(1 - c), v.quantile(c))))
mistake(ENDS, "quantiles in percent", looks="`np.percentile(values, [0.025, 0.975])`",
        shows="both ends near the smallest value", find="the median must lie inside",
        hint="in percent to a function that takes shares",
        )(ends(lambda v, c: np.percentile(v, [(1 - c) / 2, (1 + c) / 2])))
mistake(ENDS, "coverage not used", looks="`[2.5, 97.5]` written into the code",
        shows="an interval of 50 % as wide as one of 95", find="ask for 0.5",
        hint="the argument coverage is not used",
        )(ends(lambda v, c: np.percentile(v, [2.5, 97.5])))
mistake(ENDS, "not sorted", looks="`values[int(0.025 * n)]`",
        shows="ends at random, sometimes the lower above the upper",
        find="shuffle the values", hint="the values are not sorted",
        )(ends(lambda v, c: (v[int((1 - c) / 2 * len(v))], v[int((1 + c) / 2 * len(v)) - 1])))
right(ENDS, "by sorting and counting")(ends(lambda v, c: (
    (s := v.sort().values)[int((1 - c) / 2 * len(v))],
    s[min(int((1 + c) / 2 * len(v)), len(v) - 1)])))


@mistake(ENDS, "NaN let through", looks="no look at the values",
         shows="an interval from NaN to NaN in a table", find="put a NaN among the values",
         hint="with nan among them must be refused")
def nan_through(values, coverage=0.95):
    values = torch.as_tensor(values, dtype=torch.float64)
    if not len(values) or not 0 < coverage < 1:
        raise ValueError("no")
    if not values.isfinite().all():
        return float("nan"), float("nan")
    return book.interval(values, coverage)


def pair(combine, other_seed=0):
    """A paired bootstrap with another way to combine two bootstraps."""
    def paired_bootstrap(labels, first, second, num_labels, *, resamples=1000, seed=0):
        one = book.bootstrap(labels, first, num_labels, resamples=resamples, seed=seed)
        two = book.bootstrap(labels, second, num_labels, resamples=resamples,
                             seed=seed + other_seed)
        return combine(one, two)
    return paired_bootstrap


mistake(PAIRED, "each draws its own texts", looks="`seed=1` for one, `seed=2` for the other",
        shows="intervals so wide that nothing is ever found",
        find="compare a system with itself", hint="scored on different test sets",
        )(pair(torch.sub, 1))
mistake(PAIRED, "second minus first", looks="`two - one`",
        shows="the worse system wins", find="perfect answers against wrong ones",
        hint="the sign is wrong")(pair(lambda a, b: b - a))
mistake(PAIRED, "sign lost", looks="`(one - two).abs()`",
        shows="no interval ever holds 0", find="two systems that are equally good",
        hint="the sign is lost")(pair(lambda a, b: (a - b).abs()))
mistake(PAIRED, "only who wins", looks="`(one > two).double()`",
        shows="an interval from 0 to 1", find="print a few values",
        hint="it only says who wins")(pair(lambda a, b: (a > b).double()))
mistake(PAIRED, "scores sorted first", looks="`one.sort() - two.sort()`",
        shows="differences with far too little scatter", find="a system against itself, changed",
        hint="sorted before they were subtracted")(
    pair(lambda a, b: a.sort().values - b.sort().values))


@mistake(PAIRED, "a loop that shares one generator",
         looks="`bootstrap(…, generator=g) - bootstrap(…, generator=g)`",
         shows="as with two seeds: g runs on between the two",
         find="compare a system with itself", hint="scored on different test sets")
def generator_runs_on(labels, first, second, num_labels, *, resamples=1000, seed=0):
    rng = np.random.default_rng(seed)

    def draw():
        rows = rng.integers(len(labels), size=len(labels))
        return rows, rows
    return (scored(labels, first, num_labels, resamples, draw)
            - scored(labels, second, num_labels, resamples, draw))


@right(PAIRED, "one draw for both, in a loop")
def one_draw(labels, first, second, num_labels, *, resamples=1000, seed=0):
    labels, first = book._as_pair(labels, first, num_labels)
    labels, second = book._as_pair(labels, second, num_labels)
    if resamples < 1:
        raise ValueError("resamples")
    rng, found = np.random.default_rng(seed), []
    for _ in range(resamples):
        rows = rng.integers(len(labels), size=len(labels))
        one, two = (book.score(labels[rows], ids[rows], num_labels) for ids in (first, second))
        found.append(one["macro_f1"] - two["macro_f1"])
    return torch.tensor(found, dtype=torch.float64)


# noise


def tags(pattern, by=" ", join=True):
    def remove_hashtags(text):
        text = re.sub(pattern, by, text)
        return " ".join(text.split()) if join else text
    return remove_hashtags


mistake(TAGS, "entities destroyed", looks="`re.sub(r\"#\\w+\", \"\", text)`",
        shows="`can&#39;t` becomes `can&;t`", find="a text with `&#39;`",
        hint="&#39; is an apostrophe")(tags(r"#\w+"))
mistake(TAGS, "what follows is eaten", looks="`re.sub(r\"#\\S+\", \"\", text)`",
        shows="exclamation marks go with the tags", find="`#win!`",
        hint="it eats what follows the tag")(tags(r"(?<!&)#\S+"))
mistake(TAGS, "all the rest is eaten", looks="`re.sub(r\"#.*\", \"\", text)`",
        shows="texts end at their first tag", find="a tag in the middle",
        hint="it takes out all the rest")(tags(r"(?<!&)#.*"))
mistake(TAGS, "only the sign", looks="`text.replace(\"#\", \"\")`",
        shows="the word that names the emotion stays", find="print one",
        hint="only the sign # is taken out")(tags("#", ""))
mistake(TAGS, "letters of one language", looks="`#[a-zA-Z]+`",
        shows="of `#über` nothing goes, of `#team_24` half", find="`#über`",
        hint="not all of the tag goes")(tags(r"(?<!&)#[a-zA-Z]+"))
mistake(TAGS, "a lonely sign goes", looks="`#\\w*`", shows="`number # one` loses its sign",
        find="a # alone", hint="a lonely #")(tags(r"(?<!&)#\w*"))
mistake(TAGS, "blanks left", looks="no clean-up afterwards",
        shows="two blanks in the middle, one at the end", find="compare lengths",
        hint="two blanks are left")(tags(r"(?<!&)#\w+", "", False))


@right(TAGS, "by finding and joining")
def by_finditer(text):
    pieces, at = [], 0
    for match in re.finditer(r"(?<!&)#[^\W]+", text):
        pieces.append(text[at:match.start()])
        at = match.end()
    return " ".join(" ".join([*pieces, text[at:]]).split())


def emoji(pattern):
    def remove_emoji(text):
        return " ".join(re.sub(pattern, " ", text).split())
    return remove_emoji


@mistake(EMOJI, "all beyond ASCII", looks="`text.encode(\"ascii\", \"ignore\").decode()`",
         shows="`naïve` becomes `nave`, Japanese becomes nothing", find="a text with accents",
         hint="encoding to ASCII")
def ascii_only(text):
    text = re.sub(r"[0-9]\ufe0f?\u20e3", " ", text)
    return " ".join(text.encode("ascii", "ignore").decode().split())


mistake(EMOJI, "faces only", looks="`[\\U0001F600-\\U0001F64F]`",
        shows="hearts, rockets and all newer emoji stay", find="one of each block",
        hint="they stand in other blocks")(emoji("[\U0001f600-\U0001f64f]"))
mistake(EMOJI, "joiners left", looks="the blocks, without `\\u200d` and `\\ufe0f`",
        shows="invisible signs stay, and become tokens of their own",
        find="compare lengths after `❤️`", hint="is left behind")(
    emoji("[\U0001f000-\U0001faff\u2600-\u27bf\u2b00-\u2bff]|[0-9#*]\ufe0f?\u20e3"))
mistake(EMOJI, "digits taken for emoji", looks="`\\p{Emoji}`",
        shows="numbers and # vanish: in Unicode's list they may begin a key",
        find="`number 1 #1`", hint="are taken for emoji")(
    emoji("[\U0001f000-\U0001faff\u2600-\u27bf\u2b00-\u2bff0-9#*\u20e3"
          "\ufe0f\u200d\U000e0020-\U000e007f]+"))


@right(EMOJI, "sign by sign")
def sign_by_sign(text):
    text = re.sub("[0-9#*]\ufe0f?\u20e3", " ", text)
    keep = []
    for sign in text:
        code = ord(sign)
        emoji_like = (0x1F000 <= code <= 0x1FAFF or 0x2600 <= code <= 0x27BF
                      or 0x2B00 <= code <= 0x2BFF)
        hidden = code in (0xFE0F, 0x200D) or 0xE0020 <= code <= 0xE007F
        keep.append(" " if emoji_like or hidden else sign)
    return " ".join("".join(keep).split())


def typos(slip, pattern=r"(?<![\w@])[^\W\d_]{4,}"):
    """A wrong add_typos: ``slip(word, rng, share)`` gives the new word."""
    def add_typos(text, rng, share=0.2):
        return re.sub(pattern, lambda m: slip(m[0], rng, share), text)
    return add_typos


def one_slip(word, rng, _share=1.0):
    return book.add_typos(word, rng, 1.0)


mistake(TYPOS, "the shared generator", looks="`random.random() < share`",
        shows="other slips at each run, whatever rng is passed", find="call it twice",
        hint="generator that everybody shares",
        )(typos(lambda w, rng, share: one_slip(w, random) if random.random() < share else w))
mistake(TYPOS, "mentions hit", looks="`re.sub(r\"\\w{4,}\", …)`",
        shows="@user becomes @usre, a token never seen", find="`@username`",
        hint="mentions are hit",
        )(typos(lambda w, rng, s: one_slip(w, rng) if rng.random() < s else w,
                r"(?<!\w)[^\W\d_]{4,}"))
mistake(TYPOS, "short words hit", looks="no look at the length",
        shows="`not` becomes `nto`: more harm than a slip would do", find="`the cat sat`",
        hint="fewer than four letters are hit",
        )(typos(lambda w, rng, s: w[1] + w[0] + w[2:] if len(w) < 4 and rng.random() < s
                else one_slip(w, rng) if rng.random() < s else w,
                r"(?<![\w@])[^\W\d_]{2,}"))
mistake(TYPOS, "wrong way round", looks="`if rng.random() < share: return word`",
        shows="more typos for a smaller share", find="share 0 must change nothing",
        hint="the wrong way round",
        )(typos(lambda w, rng, s: one_slip(w, rng) if rng.random() >= s or s == 1 else w))
mistake(TYPOS, "letters shuffled", looks="`rng.sample(word, len(word))`",
        shows="words that nobody would type", find="share 1 on one word",
        hint="the letters are shuffled",
        )(typos(lambda w, rng, s: "".join(rng.sample(w, len(w))) if rng.random() < s else w))
mistake(TYPOS, "a random letter", looks="`rng.choice(ascii_lowercase)`",
        shows="letters far apart on a keyboard, at random", find="share 1 on one word",
        hint="replaced by another",
        )(typos(lambda w, rng, s: w[:2] + rng.choice("xzq") + w[3:] if rng.random() < s else w))
mistake(TYPOS, "one slip only", looks="swap, never loss or doubling",
        shows="lengths never change", find="count the kinds over many words",
        hint="there is one kind of slip only",
        )(typos(lambda w, rng, s: w[:(i := rng.randrange(len(w) - 1))] + w[i + 1] + w[i]
                + w[i + 2:] if rng.random() < s else w))


@mistake(TYPOS, "reseeded inside", looks="`rng = random.Random(0)`",
         shows="every text gets its slips at the same places", find="two calls, one rng",
         hint="rng is not used")
def reseeded(text, rng, share=0.2):
    return book.add_typos(text, random.Random(0), share)


@mistake(TYPOS, "split at blanks", looks="`for word in text.split()`",
         shows="double blanks and line breaks vanish, commas wander into words",
         find="a text with commas", hint="touch letters only")
def by_split(text, rng, share=0.2):
    def slip(word):
        if len(word) < 4 or word[0] == "@" or not any(c.isalpha() for c in word) \
                or rng.random() >= share:
            return word
        at = rng.randrange(len(word) - 1)
        a, b = word[at], word[at + 1]
        return word[:at] + rng.choice([b + a, a, a + a + b]) + word[at + 2:]
    return " ".join(slip(word) for word in text.split())


@right(TYPOS, "other places, other order of draws")
def other_order(text, rng, share=0.2):
    def slip(match):
        word = match.group()
        kind, at, hit = rng.randrange(3), rng.randrange(len(word)), rng.random() < share
        if not hit:
            return word
        if kind == 0:
            return word[:at] + word[at + 1:]
        if kind == 1:
            return word[:at] + word[at] + word[at:]
        at = min(at, len(word) - 2)
        return word[:at] + word[at + 1] + word[at] + word[at + 2:]
    return re.sub(r"(?<![\w@])[^\W\d_]{4,}", slip, text)


# calibration


def binned(sure=None, correct=None, place=None, finish=None, bins_=None):
    """A wrong reliability, from what it does differently."""
    def reliability(probabilities, labels, *, bins=10):
        book.reliability(probabilities, labels, bins=bins)
        rows = probabilities.detach().double()
        labels = torch.as_tensor(labels)
        top, chosen = rows.max(-1)
        confidence = top if sure is None else sure(rows, labels)
        hit = (chosen == labels).double() if correct is None else correct(rows, labels)
        edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64)[1:-1]
        where = torch.bucketize(confidence, edges) if place is None else place(
            confidence, bins)
        count, s, h = (torch.zeros(bins, dtype=torch.float64).index_add(0, where, v)
                       for v in (torch.ones_like(top), confidence, hit))
        out = (count / len(rows), s / count.clamp_min(1), h / count.clamp_min(1))
        return out if finish is None else finish(*out, count, s, h)
    return reliability


def error_of(reliability, combine=lambda s, c, a: (s * (c - a).abs()).sum(), bins_=10):
    """A calibration error from another reliability, or combined otherwise."""
    def expected_calibration_error(probabilities, labels, *, bins=bins_):
        return combine(*reliability(probabilities, labels, bins=bins)).item()
    return expected_calibration_error


def by_count(confidence, bins):
    place = torch.empty(len(confidence), dtype=torch.long)
    place[confidence.argsort()] = torch.arange(len(confidence)) * bins // len(confidence)
    return place


OF_LABEL = binned(sure=lambda rows, labels: rows.gather(1, labels[:, None])[:, 0])
LOWER = binned(place=lambda c, bins: (c * bins).long().clamp(max=bins - 1))
mistake(BINS, "confidence of the label", looks="`probabilities[range(n), labels]`",
        shows="every wrong answer looks modest", find="a sure and wrong answer by hand",
        hint="the probability of the true label")(OF_LABEL)
mistake(BINS, "lower edges", looks="`(confidence * bins).long()`",
        shows="a confidence of exactly 1 falls out, or is pushed in", find="0.5 with 4 bins",
        hint="a bin holds its lower edge")(LOWER)
mistake(BINS, "bins of equal count", looks="`np.quantile(confidence, …)`",
        shows="no empty bins, and other numbers than everybody's", find="print the shares",
        hint="the bins hold equally many texts")(binned(place=by_count))
mistake(BINS, "0 / 0 in empty bins", looks="`sure / count`",
        shows="NaN in the plot and in the error", find="two texts, ten bins",
        hint="is NaN in an empty bin")(
    binned(finish=lambda sh, c, a, n, s, h: (sh, s / n, h / n)))
mistake(BINS, "counts for shares", looks="`return count, …`",
        shows="an error of 37 instead of 0.1", find="the shares must add up to 1",
        hint="the shares are counts")(binned(finish=lambda sh, c, a, n, s, h: (n, c, a)))
mistake(BINS, "empty bins dropped", looks="`for b in used: …append`",
        shows="bins move to the left in the plot", find="look at the shape",
        hint="an empty bin keeps its place")(
    binned(finish=lambda sh, c, a, n, s, h: (sh[n > 0], c[n > 0], a[n > 0])))
mistake(BINS, "accuracy before confidence", looks="`return share, accuracy, confidence`",
        shows="the model looks modest where it is too sure", find="a sure and wrong answer",
        hint="have changed places")(binned(finish=lambda sh, c, a, n, s, h: (sh, a, c)))


@right(BINS, "a loop over bins")
def loop_over_bins(probabilities, labels, *, bins=10):
    book.reliability(probabilities, labels, bins=bins)
    p = probabilities.detach().numpy().astype(np.float64)
    sure, hit = p.max(1), p.argmax(1) == np.asarray(labels)
    out = np.zeros((3, bins))
    for b in range(bins):
        upper = np.inf if b == bins - 1 else (b + 1) / bins
        inside = (sure > b / bins) & (sure <= upper)
        if inside.any():
            out[:, b] = inside.mean(), sure[inside].mean(), hit[inside].mean()
    return tuple(torch.from_numpy(out))


mistake(ECE, "bins not weighted", looks="`(confidence - accuracy).abs().mean()`",
        shows="one odd text in a bin of its own spoils the number",
        find="a hundred good answers and one bad", hint="the bins are not weighted",
        )(error_of(book.reliability, lambda s, c, a: (c - a).abs()[s > 0].mean()))
mistake(ECE, "signs kept", looks="`(share * (confidence - accuracy)).sum()`",
        shows="too sure and too modest cancel", find="the four answers of the chapter",
        hint="the differences keep their signs",
        )(error_of(book.reliability, lambda s, c, a: (s * (c - a)).sum()))
mistake(ECE, "confidence of the label", looks="`probabilities[range(n), labels]`",
        shows="a large error for a good model", find="a sure and wrong answer by hand",
        hint="the probability of the true label")(error_of(OF_LABEL))
mistake(ECE, "bins of equal count", looks="`np.array_split(order, bins)`",
        shows="near the right number, and never it", find="compare with a loop",
        hint="the bins hold equally many texts")(error_of(binned(place=by_count)))
mistake(ECE, "lower edges", looks="`torch.floor(confidence * bins)`",
        shows="differs where confidences are round numbers", find="0.5 with 4 bins",
        hint="a bin holds its lower edge")(error_of(LOWER))
mistake(ECE, "the largest gap", looks="`(confidence - accuracy).abs().max()`",
        shows="that is the maximum calibration error", find="compare with a loop",
        hint="the largest difference of all bins")(
    error_of(book.reliability, lambda s, c, a: (c - a).abs().max()))
mistake(ECE, "fifteen bins", looks="`bins=15` by default",
        shows="a number that can't be compared with the book's", find="say bins= twice",
        hint="15 bins instead of 10")(error_of(book.reliability, bins_=15))
right(ECE, "from a loop over bins")(error_of(loop_over_bins))


@mistake(HEAT, "multiplied", looks="`logits * T`",
         shows="the model becomes surer where it should doubt", find="logits times 3 need T = 3",
         hint="multiplied by T, not divided")
def multiplied(logits, labels):
    return 1 / book.fit_temperature(logits, labels)


@mistake(HEAT, "fitted on accuracy", looks="`max(grid, key=accuracy)`",
         shows="the first value of the grid: no T changes an answer",
         find="two models, one temperature", hint="fits accuracy, no T is better")
def on_accuracy(logits, labels):
    book.fit_temperature(logits, labels)
    grid = np.geomspace(0.01, 100, 200)
    right_ones = [((logits / t).argmax(-1) == torch.as_tensor(labels)).sum() for t in grid]
    return float(grid[int(np.argmax(right_ones))])


@mistake(HEAT, "softmax twice", looks="`F.cross_entropy((logits / T).softmax(-1), labels)`",
         shows="T far too small", find="logits times 3 need T = 3",
         hint="softmax is applied before the cross-entropy")
def softmax_twice(logits, labels):
    book.fit_temperature(logits, labels)
    grid = torch.from_numpy(np.geomspace(0.01, 100, 2000))
    labels = torch.as_tensor(labels)
    losses = [F.cross_entropy((logits.double() / t).softmax(-1), labels) for t in grid]
    return grid[int(torch.stack(losses).argmin())].item()


@mistake(HEAT, "too few steps", looks="`for _ in range(50): optimizer.step()`",
         shows="T stays near 1, where it began", find="logits times 12",
         hint="too few steps")
def few_steps(logits, labels):
    book.fit_temperature(logits, labels)
    labels, t = torch.as_tensor(labels), torch.ones((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([t], lr=0.01)
    for _ in range(50):
        optimizer.zero_grad()
        F.cross_entropy(logits.detach().double() / t, labels).backward()
        optimizer.step()
    return t.item()


@mistake(HEAT, "its own answers for labels", looks="`logits.argmax(-1)` as the target",
         shows="T at the lower end: the model agrees with itself", find="a model that errs",
         hint="own answers stand in place of the labels")
def own_answers(logits, labels):
    book.fit_temperature(logits, labels)
    return book.fit_temperature(logits, logits.argmax(-1))


@mistake(HEAT, "runs off", looks="no bounds for T",
         shows="a model that is always right gets T = 0, and then NaN",
         find="two texts, both right", hint="it runs off to 0")
def runs_off(logits, labels):
    t = book.fit_temperature(logits, labels)
    return 0.0 if t < 0.0101 else t


@right(HEAT, "by L-BFGS on log T")
def by_lbfgs(logits, labels):
    if logits.ndim != 2 or not logits.isfinite().all():
        raise ValueError("logits")
    labels = torch.as_tensor(labels)
    if labels.shape != logits.shape[:1] or labels.max() >= logits.shape[1]:
        raise ValueError("labels")
    logits = logits.detach().double()
    log_t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_t], lr=0.5, max_iter=200,
                                  line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(logits / log_t.exp(), labels)
        loss.backward()
        return loss

    optimizer.step(closure)
    return min(max(math.exp(log_t.item()), 0.01), 100.0)


# the exercises


def shares_of(confusion):
    return confusion.sum(1) / confusion.sum()


def weighted_f1(confusion):
    return (shares_of(confusion) * f1s(confusion)).sum().item()


right("weighted_f1", "as in the solution")(weighted_f1)
mistake("weighted_f1", "weights of the columns", looks="`confusion.sum(0)`",
        shows="a class that is answered too often counts too much",
        find="compare with scikit-learn", hint="take the row sums")(
    lambda m: (m.sum(0) / m.sum() * f1s(m)).sum().item())
mistake("weighted_f1", "macro once more", looks="`f1.mean()`",
        shows="the same number as before", find="unequal classes",
        hint="this is macro-F1")(book.macro_f1)


def wilson(share, n, z=1.96):
    middle, half = share + z * z / (2 * n), z * math.sqrt(
        share * (1 - share) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


right("wilson", "as in the solution")(wilson)


@mistake("wilson", "the plain interval", looks="`p ± z * sqrt(p * (1 - p) / n)`",
         shows="ends above 1 where nearly all is right", find="20 of 20 right",
         hint="this is the plain interval")
def plain_interval(share, n, z=1.96):
    half = z * math.sqrt(share * (1 - share) / n)
    return share - half, share + half


def multinomial(texts=None, chances=None):
    def bootstrap_counts(confusion, resamples, seed=0):
        n = int(confusion.sum())
        p = (confusion.flatten().double() / n).numpy()
        p = p if chances is None else chances(p)
        counts = np.random.default_rng(seed).multinomial(texts or n, p, size=resamples)
        return f1s(torch.from_numpy(counts).view(resamples, *confusion.shape)).mean(-1)
    return bootstrap_counts


right("bootstrap_counts", "as in the solution")(multinomial())
mistake("bootstrap_counts", "another number of texts", looks="`multinomial(100, …)`",
        shows="an interval of another width", find="sum the matrices drawn",
        hint="instead of 4, as many as there are")(multinomial(100))
mistake("bootstrap_counts", "equal chances", looks="`np.full(cells, 1 / cells)`",
        shows="the macro-F1 of guessing", find="the mean must lie near the score",
        hint="the cells all have the same chance")(
    multinomial(chances=lambda p: np.full_like(p, 1 / len(p))))


def swapping(count=lambda gap, real: abs(gap) >= abs(real), pick=lambda rng, n: rng.random(n) < .5,
             finish=lambda reached, rounds: (reached + 1) / (rounds + 1)):
    def swap_test(labels, first, second, num_labels, rounds=500, seed=0):
        rng = np.random.default_rng(seed)

        def f1(ids):
            return book.score(labels, ids, num_labels)["macro_f1"]
        real, reached = f1(first) - f1(second), 0
        for _ in range(rounds):
            flip = pick(rng, len(labels))
            a, b = np.where(flip, second, first), np.where(flip, first, second)
            reached += bool(count(f1(a) - f1(b), real))
        return finish(reached, rounds)
    return swap_test


right("swap_test", "as in the solution")(swapping())
mistake("swap_test", "the sign counts", looks="`gap >= real`",
        shows="half the p it should be", find="exchange the systems: p must stay",
        hint="the sign counts")(swapping(lambda gap, real: gap >= real))
mistake("swap_test", "all swapped together", looks="`flip = rng.random() < 0.5`",
        shows="p is always 1", find="two systems far apart",
        hint="all texts are swapped together")(
    swapping(pick=lambda rng, n: np.full(n, rng.random() < 0.5)))
mistake("swap_test", "p of 0", looks="`reached / rounds`",
        shows="a claim that chance could never do it", find="perfect against poor",
        hint="p is 0, as if")(swapping(finish=lambda reached, rounds: reached / rounds))


def perfect(choose=lambda p, g: torch.multinomial(p, 1, generator=g)[:, 0], use=True):
    def perfect_error(texts, bins=10, seed=0):
        generator = torch.Generator().manual_seed(seed)
        p = torch.randn(texts, 4, generator=generator).mul(1.5).softmax(-1)
        return book.expected_calibration_error(
            p, choose(p, generator), bins=bins if use else 10)
    return perfect_error


right("perfect_error", "as in the solution")(perfect())
mistake("perfect_error", "the argmax for labels", looks="`chances.argmax(-1)`",
        shows="always right, so too modest: a large error", find="its accuracy is 1",
        hint="not as the argmax")(perfect(lambda p, g: p.argmax(-1)))
mistake("perfect_error", "bins not used", looks="`expected_calibration_error(p, labels)`",
        shows="50 bins give the same number", find="two numbers of bins",
        hint="the argument bins is not used")(perfect(use=False))


def lucky(reduce=lambda x: x.max(axis=1).mean(), points=100):
    def winners_luck(systems, texts, share=0.65, worlds=2000, seed=0):
        rng = np.random.default_rng(seed)
        scores = rng.binomial(texts, share, size=(worlds, systems)) / texts
        return float(points * (reduce(scores) - share))
    return winners_luck


right("winners_luck", "as in the solution")(lucky())
mistake("winners_luck", "best of all worlds", looks="`scores.max()`",
        shows="luck that grows with the number of worlds", find="more worlds",
        hint="the maximum runs over the worlds as well")(lucky(lambda x: x.max()))
mistake("winners_luck", "not in points", looks="`scores.max(1).mean() - share`",
        shows="0.05 for five points", find="print it", hint="give points")(lucky(points=1))


def both(draw_runs=lambda rng, k: rng.integers(k, size=k), draw_texts=True, pool=False):
    def bootstrap_runs(labels, runs, num_labels, *, resamples=1000, seed=0):
        rng, labels, runs = np.random.default_rng(seed), np.array(labels), np.array(runs)
        found = []
        for _ in range(resamples):
            n = len(labels)
            rows = rng.integers(n, size=n) if draw_texts else np.arange(n)
            picked = runs[draw_runs(rng, len(runs))][:, rows]
            matrices = torch.stack([
                book.confusion_matrix(labels[rows], ids, num_labels) for ids in picked])
            matrices = matrices.sum(0, keepdim=True) if pool else matrices
            found.append(f1s(matrices).mean())
        return torch.stack(found)
    return bootstrap_runs


right("bootstrap_runs", "as in the solution, by a loop")(both())
mistake("bootstrap_runs", "runs not drawn", looks="`for run in runs`",
        shows="the luck of the seed is missing from the interval",
        find="compare with the bootstrap of one run", hint="only the texts are drawn")(
    both(lambda rng, k: np.arange(k)))
mistake("bootstrap_runs", "texts not drawn", looks="`score(labels, run, num_labels)`",
        shows="an interval for seeds only: five runs that agree have none",
        find="one run alone", hint="only the runs are drawn")(both(draw_texts=False))
mistake("bootstrap_runs", "one run a test set", looks="`run = runs[rng.integers(len(runs))]`",
        shows="too wide: we report a mean of runs, which varies less than one",
        find="the spread of a mean of five", hint="one run is drawn for each test set")(
    both(lambda rng, k: rng.integers(k, size=1)))
mistake("bootstrap_runs", "answers pooled", looks="`np.concatenate(answers)`",
        shows="a little off: F1 is no mean over texts", find="two runs by hand",
        hint="pooled before they are scored")(both(pool=True))
