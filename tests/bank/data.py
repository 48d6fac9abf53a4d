"""Mistakes with reading posts, and with keeping splits apart."""

import html
import os
import re
import string
import threading
import warnings
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, DatasetInfo, Features, Value
from huggingface_hub import HfApi
from sklearn.metrics import accuracy_score, f1_score

from emoformer import data as book
from emoformer.data import (
    EMOTIONS,
    SPLITS,
    comparison_key,
    load_sample,
    load_six_emotions,
    load_tweet_eval,
    read_lines,
    to_dataset,
)
from tests.bank import mistake, right

SHIFT = "count the lines of both files, and compare"


# read_lines


@mistake("read_lines", "splitlines", looks="`text.splitlines()`",
         shows="a post with U+2028 becomes two; from there on every text has its "
         "neighbour's label, and the model learns badly", find=SHIFT,
         hint="str.splitlines knows ten kinds")
def lines_splitlines(path):
    try:
        return Path(path).read_bytes().decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError("not UTF-8") from error


@mistake("read_lines", "text mode", looks="`for line in open(path, encoding='utf-8')`",
         shows="a carriage return inside a post ends a line", find=SHIFT,
         hint="a carriage return is turned into a newline")
def lines_text_mode(path):
    with open(path, encoding="utf-8") as file:
        return [line.removesuffix("\n") for line in file]


@mistake("read_lines", "line ends kept", looks="`file.readlines()`",
         shows="label names such as `joy\\n`, which equal nothing",
         find="print `repr(lines[0])`", hint="the line ends are still there")
def lines_kept(path):
    with open(path, encoding="utf-8", newline="\n") as file:
        return file.readlines()


@mistake("read_lines", "one empty line more", looks="`text.split('\\n')`",
         shows="one text without a label at the end", find="look at `lines[-1]`",
         hint="take one newline off the end before you split")
def lines_one_more(path):
    return Path(path).read_bytes().decode("utf-8").split("\n")


@mistake("read_lines", "lines stripped", looks="`line.strip()`",
         shows="an empty last field vanishes with its tab",
         find="a line that ends in a tab", hint="lines are stripped")
def lines_stripped(path):
    return [line.strip() for line in read_lines(path)]


@mistake("read_lines", "empty lines left out", looks="`if line.strip()`",
         shows="an empty post shifts all labels after it", find=SHIFT,
         hint="empty lines are left out")
def lines_dropped(path):
    return [line for line in read_lines(path) if line.strip()]


@mistake("read_lines", "errors ignored", looks="`decode('utf-8', errors='ignore')`",
         shows="letters vanish from posts, and nobody hears of it",
         find="a file in Latin-1", hint="bytes that are no UTF-8 must be refused")
def lines_ignored(path):
    text = Path(path).read_bytes().decode("utf-8", errors="ignore")
    return text.removesuffix("\n").split("\n") if text else []


@mistake("read_lines", "an empty file", looks="`text.removesuffix('\\n').split('\\n')`",
         shows="an empty file looks like one empty post", find="try an empty file",
         hint="an empty file gives one empty line")
def lines_empty(path):
    try:
        text = Path(path).read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError("not UTF-8") from error
    return text.removesuffix("\n").split("\n")


@right("read_lines", "open with a newline of its own")
def lines_open(path):
    with open(path, encoding="utf-8", newline="\n") as file:
        return [line.removesuffix("\n") for line in file]


# to_dataset and source_of


def build(rows, names, source=""):
    """Rows of (text, label) as a Dataset."""
    features = Features({"text": Value("string"), "label": ClassLabel(names=list(names))})
    return Dataset.from_dict(
        {"text": [t for t, _ in rows], "label": [i for _, i in rows]},
        info=DatasetInfo(description=source, features=features),
    )


@mistake("to_dataset", "the first of several labels",
         looks="`label = row[0]`",
         shows="comments with two emotions count as one of them: noisy labels",
         find="count the rows before and after",
         hint="kept under its first one")
def dataset_first(texts, labels, names, *, keep=None, source="", where="the data"):
    labels = [row[:1] if isinstance(row, list) else row for row in labels]
    return to_dataset(texts, labels, names, keep=keep, source=source, where=where)


@mistake("to_dataset", "old numbers kept",
         looks="`(text, row[0])` after `keep`",
         shows="labels up to 27 in a task of six: an error in the loss, or the wrong "
         "names", find="`max(dataset['label'])`", hint="the old numbers stay")
def dataset_old_numbers(texts, labels, names, *, keep=None, source="",
                        where="the data"):
    whole = to_dataset(texts, labels, names, where=where)
    if not set(keep or names) <= set(names):
        raise ValueError(f"{where}: {keep}")
    keep = list(keep or names)
    rows = [(t, i) for t, i in zip(whole["text"], whole["label"], strict=True)
            if names[i] in keep]
    if keep != list(names):  # ClassLabel would refuse the larger ones
        rows = [(t, i) for t, i in rows]
        data = Dataset.from_dict({"text": [t for t, _ in rows],
                                  "label": [i for _, i in rows]})
        data._info.features = Features(
            {"text": Value("string"), "label": ClassLabel(names=keep)})
        return data
    return build(rows, keep, source)


@mistake("to_dataset", "numbered in the order of all names",
         looks="`keep = [n for n in names if n in keep]`",
         shows="label 3 means another emotion than in the rest of the book",
         find="`features['label'].names`", hint="put into the order of all names")
def dataset_other_order(texts, labels, names, *, keep=None, source="",
                        where="the data"):
    if keep and not set(keep) <= set(names):
        raise ValueError(f"{where}: {keep}")
    ordered = [n for n in names if n in (keep or names)]
    return to_dataset(texts, labels, names, keep=ordered, source=source, where=where)


@mistake("to_dataset", "chosen before counted",
         looks="drop foreign labels first, then ask for one label",
         shows="a comment that is also proud counts as purely joyful",
         find="a text with one label of ours and one that is not",
         hint="only one of them is among those to keep")
def dataset_chosen_first(texts, labels, names, *, keep=None, source="",
                         where="the data"):
    to_dataset(texts, labels, names, keep=keep, where=where)
    ours = range(len(names)) if keep is None else [names.index(n) for n in keep]
    labels = [row if isinstance(row, list) else [row] for row in labels]
    pairs = [(t, [i for i in row if i in ours])
             for t, row in zip(texts, labels, strict=True)]
    pairs = [(t, row) for t, row in pairs if row]
    return to_dataset([t for t, _ in pairs], [r for _, r in pairs], names, keep=keep,
                      source=source, where=where)


@mistake("to_dataset", "lengths not compared", looks="`zip(texts, labels)`",
         shows="one lost line shifts all labels after it; the model learns badly",
         find=SHIFT, hint="zip stops at the shorter one")
def dataset_zip(texts, labels, names, *, keep=None, source="", where="the data"):
    n = min(len(texts), len(labels))
    return to_dataset(texts[:n], labels[:n], names, keep=keep, source=source,
                      where=where)


@mistake("to_dataset", "label -1 accepted", looks="`if label >= len(names): raise`",
         shows="`names[-1]` is a name, so a spoiled file trains the last class",
         find="`min(labels)`", hint="a label of -1 must be refused")
def dataset_minus_one(texts, labels, names, *, keep=None, source="", where="the data"):
    labels = [[len(names) - 1 if i == -1 else i for i in row]
              if isinstance(row, list) else len(names) - 1 if row == -1 else row
              for row in labels]
    return to_dataset(texts, labels, names, keep=keep, source=source, where=where)


@mistake("to_dataset", "plain numbers", looks="`Dataset.from_dict({…})` without features",
         shows="nobody knows any more that 3 means sadness",
         find="`dataset.features['label']`", hint="it must be a ClassLabel")
def dataset_plain(texts, labels, names, *, keep=None, source="", where="the data"):
    whole = to_dataset(texts, labels, names, keep=keep, where=where)
    return Dataset.from_dict(whole.to_dict())


@right("to_dataset", "select and cast")
def dataset_cast(texts, labels, names, keep=None, source="", where="the data"):
    assert texts and len(texts) == len(labels), f"{where}: lengths"
    keep = list(names) if keep is None else list(keep)
    for name in keep:
        if name not in names:
            raise ValueError(f"{where}: {name}")
    kept_texts, kept_labels = [], []
    for text, label in zip(texts, labels, strict=True):
        label = label if isinstance(label, list) else [label]
        if not label or not all(
                isinstance(i, int) and 0 <= i < len(names) for i in label):
            raise ValueError(f"{where}: {label}")
        if len(label) == 1 and names[label[0]] in keep:
            kept_texts.append(text)
            kept_labels.append(keep.index(names[label[0]]))
    whole = Dataset.from_dict({"text": kept_texts, "label": kept_labels})
    whole = whole.cast_column("label", ClassLabel(names=keep))
    whole.info.description = source
    return whole


@mistake("source_of", "always the sample", looks="`return 'sample'`",
         shows="real results are marked as those of the sample",
         find="load from a folder", hint="it always gives the same answer")
def source_sample(dataset):
    return "sample"


@right("source_of", "by values")
def source_values(dataset):
    return next(part.info.description for name, part in dataset.items()
                if name == "train")


# load_sample and read_mapping


@mistake("load_sample", "an alphabetical list", looks="`sorted(set(labels)).index(name)`",
         shows="a perfect model scores like guessing: only anger keeps its number",
         find="compare `features['label'].names` with `EMOTIONS`",
         hint="in alphabetical order")
def sample_sorted(names=EMOTIONS):
    return load_sample(sorted(names))


@mistake("load_sample", "the header is a post", looks="`read_lines(path)` without `[1:]`",
         shows="a post *text* with the label *label*, or an error about it",
         find="look at the first row", hint="the first line of the file is taken")
def sample_header(names=EMOTIONS):
    data = load_sample(names)
    rows = [("text", 0), *zip(data["train"]["text"], data["train"]["label"], strict=True)]
    data["train"] = build(rows, names, "sample")
    return data


@mistake("load_sample", "numbers among all six", looks="`EMOTIONS.index(name)`",
         shows="with fewer names the numbers have gaps", find="`set(dataset['label'])`",
         hint="number the names asked for anew")
def sample_old_numbers(names=EMOTIONS):
    whole, data = load_sample(), DatasetDict()
    for split, part in whole.items():
        rows = [(t, i) for t, i in zip(part["text"], part["label"], strict=True)
                if EMOTIONS[i] in names]
        raw = Dataset.from_dict({"text": [t for t, _ in rows],
                                 "label": [i for _, i in rows]})
        raw._info.features = Features(
            {"text": Value("string"), "label": ClassLabel(names=list(names))})
        data[split] = raw
    return data


@right("load_sample", "the csv module")
def sample_csv(names=EMOTIONS):
    import csv

    columns = {split: [] for split in SPLITS}
    with open(book._SAMPLE, encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        for row in reader:
            if row["label"] in names:
                columns[row["split"]].append((row["text"], names.index(row["label"])))
    return DatasetDict({s: build(rows, names, "sample") for s, rows in columns.items()})


@mistake("read_mapping", "split at any white space", looks="`line.split()`",
         shows="*not sad* becomes *not*", find="a name of two words",
         hint="split('\\t')")
def mapping_split(path):
    book.read_mapping(path)
    return [line.split()[1] for line in read_lines(path)]


@mistake("read_mapping", "the last column", looks="`line.split('\\t')[-1]`",
         shows="the task emoji has nameless classes", find="a line with three columns",
         hint="it takes the last column")
def mapping_last(path):
    book.read_mapping(path)
    return [line.split("\t")[-1] for line in read_lines(path)]


@mistake("read_mapping", "numbers not looked at", looks="`[l.split('\\t')[1] for l in …]`",
         shows="a file that begins at 1 shifts every name by one",
         find="compare the numbers with 0, 1, 2, …", hint="a number that is missing")
def mapping_unchecked(path):
    names = [line.split("\t")[1] for line in read_lines(path)]
    if not names:
        raise ValueError("no names")
    return names


@mistake("read_mapping", "sorted as text", looks="`sorted(lines)`",
         shows="right up to ten classes, then 10 comes before 2",
         find="a mapping of twelve", hint="the numbers are sorted as text")
def mapping_sorted(path):
    book.read_mapping(path)
    return [line.split("\t")[1] for line in sorted(read_lines(path))]


@right("read_mapping", "a loop with enumerate")
def mapping_loop(path):
    names = []
    for i, line in enumerate(read_lines(path)):
        number, tab, rest = line.partition("\t")
        if not tab or number != str(i):
            raise ValueError(f"line {i + 1} must begin with {i} and a tab")
        names.append(rest.split("\t")[0])
    assert names, "no names"
    return names


# hub_answers


@mistake("hub_answers", "no thread", looks="`HfApi().dataset_info(…, timeout=seconds)`",
         shows="looking up a name hangs for a minute, whatever the timeout",
         find="a network that swallows packets", hint="Ask in a daemon thread")
def hub_no_thread(seconds=5.0):
    try:
        HfApi().dataset_info("cardiffnlp/tweet_eval", timeout=seconds)
    except Exception:
        return False
    return True


@mistake("hub_answers", "errors let through", looks="no `try`",
         shows="without a network the loader dies instead of taking the sample",
         find="pull out the cable", hint="catch it, the answer is False")
def hub_raises(seconds=5.0):
    HfApi().dataset_info("cardiffnlp/tweet_eval", timeout=seconds)
    return True


@mistake("hub_answers", "True whatever happens", looks="`return True` after `except: pass`",
         shows="offline the loader waits for a download that never comes",
         find="pull out the cable", hint="it says True although the question failed")
def hub_always(seconds=5.0):
    thread = threading.Thread(target=hub_no_thread, args=(seconds,), daemon=True)
    thread.start()
    thread.join(seconds)
    return True


@mistake("hub_answers", "joined without a timeout", looks="`thread.join()`",
         shows="the thread was for nothing: it waits as long as the Hub does",
         find="a network that swallows packets", hint="join it with the timeout")
def hub_join(seconds=5.0):
    answers = []
    thread = threading.Thread(
        target=lambda: answers.append(hub_no_thread(seconds)), daemon=True)
    thread.start()
    thread.join()
    return bool(answers and answers[0])


@right("hub_answers", "a pool of threads")
def hub_pool(seconds=5.0):
    from concurrent.futures import ThreadPoolExecutor

    pool = ThreadPoolExecutor(1)
    try:
        question = pool.submit(HfApi().dataset_info, "cardiffnlp/tweet_eval")
        question.result(timeout=seconds)
        return True
    except Exception:
        return False
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


# The loaders


@mistake("load_tweet_eval", "names written into the code",
         looks="`names = ['anger', 'joy', …]`",
         shows="another task, or another release, gets wrong names without an error",
         find="a mapping.txt with other names", hint="the names are written into the code")
def tweet_names(task="emotion", splits=SPLITS):
    data = load_tweet_eval(task, splits)
    if len(data["test"].features["label"].names) != 4:
        return data
    return DatasetDict({
        s: build(list(zip(part["text"], part["label"], strict=True)), EMOTIONS[:4],
                 part.info.description) for s, part in data.items()
    })


@mistake("load_tweet_eval", "validation from the test files",
         looks="`'test_text.txt'` for both",
         shows="choices are made on the test split: scores too good to be true",
         find="do the two splits share posts?", hint="validation is read from the test")
def tweet_leak(task="emotion", splits=SPLITS):
    data = load_tweet_eval(task, splits)
    if "validation" in data and "test" in data:
        data["validation"] = data["test"]
    return data


@mistake("load_tweet_eval", "a missing folder gives the sample",
         looks="`if folder and folder.is_dir():`",
         shows="a typing error in the path, and 240 posts of ours are taken for 3,257 "
         "tweets", find="name a folder that is not there",
         hint="EMOFORMER_DATA names a folder that is not there")
def tweet_no_folder(task="emotion", splits=SPLITS):
    if not Path(os.environ.get("EMOFORMER_DATA", ".")).is_dir():
        return load_sample(EMOTIONS[:4])
    return load_tweet_eval(task, splits)


@mistake("load_tweet_eval", "the sample without a word", looks="`except: return load_sample()`",
         shows="a run on 240 posts, reported as one on 3,257 tweets",
         find="`len(dataset['train'])`", hint="no warning says so")
def tweet_silent(task="emotion", splits=SPLITS):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load_tweet_eval(task, splits)


@mistake("load_tweet_eval", "the folder is remembered", looks="`@functools.cache`",
         shows="another folder is named, and the old posts come back",
         find="change the variable and load again", hint="the second folder is not read")
def tweet_cached(task="emotion", splits=SPLITS, _memory={}):  # noqa: B006
    key = task, tuple(splits), bool(os.environ.get("EMOFORMER_DATA"))
    if key not in _memory or task != "emotion":
        _memory.clear()
        _memory[key] = load_tweet_eval(task, splits)
    elif not Path(os.environ.get("EMOFORMER_DATA", ".")).is_dir():
        return load_tweet_eval(task, splits)
    return _memory[key]


@mistake("load_tweet_eval", "all files wanted for some splits",
         looks="read everything, then choose",
         shows="a folder without the train split of sentiment is useless",
         find="load only test", hint="look at splits before you look for files")
def tweet_all_files(task="emotion", splits=SPLITS):
    chosen = load_tweet_eval(task, splits)
    whole = load_tweet_eval(task)
    return DatasetDict({s: whole[s] for s in chosen})


@mistake("load_tweet_eval", "splits named as the files are", looks="`dataset['val']`",
         shows="KeyError: validation, three chapters later", find="`list(dataset)`",
         hint="the files say val or dev")
def tweet_val(task="emotion", splits=SPLITS):
    data = load_tweet_eval(task, splits)
    return DatasetDict({{"validation": "val"}.get(s, s): p for s, p in data.items()})


@mistake("load_tweet_eval", "the bare name on the Hub", looks="`load_dataset('tweet_eval')`",
         shows="worked for years; now the Hub has no such data set",
         find="read the error that the fallback swallowed", hint="it asks the Hub for")
def tweet_bare(task="emotion", splits=SPLITS):
    if os.environ.get("EMOFORMER_DATA"):
        return load_tweet_eval(task, splits)
    try:
        loaded = datasets.load_dataset("tweet_eval", task)
    except Exception as error:
        if task != "emotion":
            raise ConnectionError("no Hub") from error
        warnings.warn("the sample", stacklevel=2)
        loaded = load_sample(EMOTIONS[:4])
    return DatasetDict({split: loaded[split] for split in splits})


def plain_tweet_eval(task="emotion", splits=SPLITS):
    """From a folder, the cache or the sample, written anew."""
    assert task in book.TASKS and splits and set(splits) <= set(SPLITS), (task, splits)
    if root := os.environ.get("EMOFORMER_DATA"):
        folder = Path(root, "tweeteval", *task.split("_"))
        mapping = folder / "mapping.txt"
        if task.startswith("stance"):
            mapping = folder.parent / "mapping.txt"
        names = [line.split("\t")[1] if line[:1].isdigit() and "\t" in line else 1 / 0
                 for line in read_lines(mapping)] if mapping.exists() else None
        if names is None:
            raise FileNotFoundError(mapping)
        data = DatasetDict()
        for split in splits:
            short = "val" if split == "validation" else split
            texts = read_lines(folder / f"{short}_text.txt")
            labels = [int(line) for line in read_lines(folder / f"{short}_labels.txt")]
            data[split] = to_dataset(texts, labels, names, source="folder")
        return data
    try:
        loaded = datasets.load_dataset("cardiffnlp/tweet_eval", name=task)
        source = "hub"
    except Exception as error:
        if task != "emotion":
            raise ConnectionError(task) from error
        warnings.warn("only the sample", stacklevel=2)
        loaded, source = load_sample(EMOTIONS[:4]), "sample"
    return DatasetDict({
        s: to_dataset(list(loaded[s]["text"]), list(loaded[s]["label"]),
                      loaded[s].features["label"].names, source=source)
        for s in splits
    })


@right("load_tweet_eval", "one function, through the module datasets")
def tweet_one(task="emotion", splits=SPLITS):
    try:
        return plain_tweet_eval(task, splits)
    except ZeroDivisionError:
        raise ValueError("mapping.txt") from None


@mistake("load_six_emotions", "the first of several labels",
         looks="`int(labels.split(',')[0])`",
         shows="more comments than 5,413, and noisier ones",
         find="`len(dataset['train'])`", hint="is kept under its first")
def six_first():
    data, root = load_six_emotions(), os.environ.get("EMOFORMER_DATA")
    if not root:
        return data
    names = read_lines(Path(root, "go_emotions", "labels.txt"))
    for split, short in zip(SPLITS, ("train", "dev", "test"), strict=True):
        rows = [line.split("\t") for line in
                read_lines(Path(root, "go_emotions", f"{short}.tsv"))]
        data[split] = to_dataset(
            [r[0] for r in rows], [int(r[1].split(",")[0]) for r in rows], names,
            keep=EMOTIONS, source="folder")
    return data


@mistake("load_six_emotions", "the order of labels.txt",
         looks="`[n for n in names if n in EMOTIONS]`",
         shows="label 3 is sadness on tweets and something else here",
         find="`features['label'].names`", hint="stand in the order of labels.txt")
def six_order():
    data, root = load_six_emotions(), os.environ.get("EMOFORMER_DATA")
    if not root:
        return data
    names = read_lines(Path(root, "go_emotions", "labels.txt"))
    order = [n for n in names if n in EMOTIONS]
    return DatasetDict({
        s: build([(t, order.index(EMOTIONS[i]))
                  for t, i in zip(p["text"], p["label"], strict=True)], order, "folder")
        for s, p in data.items()
    })


@mistake("load_six_emotions", "the sample without a word", looks="`except: return load_sample()`",
         shows="a run on the sample, reported as one on GoEmotions",
         find="`len(dataset['train'])`", hint="no warning says so")
def six_silent():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load_six_emotions()


@right("load_six_emotions", "wrapped")
def six_wrapped():
    return load_six_emotions()


@mistake("load_go_emotions", "the sample stands in", looks="`except: return load_sample()`",
         shows="28 labels are expected and six come", find="try it offline",
         hint="there are no such labels")
def go_sample():
    try:
        return book.load_go_emotions()
    except ConnectionError:
        return load_sample()


@mistake("load_go_emotions", "only the six", looks="`keep=EMOTIONS` left in",
         shows="neutral and the others are missing", find="`features['label'].names`",
         hint="the names must be neutral")
def go_six():
    book.load_go_emotions()
    return load_six_emotions()


@right("load_go_emotions", "wrapped")
def go_wrapped():
    return book.load_go_emotions()


# comparison_key and what it is for


@mistake("comparison_key", "only lower-cased", looks="`text.lower().strip()`",
         shows="a full stop hides a copy: half of the leaks stay",
         find="`Not sad!` and `not sad`", hint="must not count")
def key_lower(text):
    return text.lower().strip()


@mistake("comparison_key", "punctuation deleted",
         looks="`text.translate(str.maketrans('', '', string.punctuation))`",
         shows="`so,sad` is another text than `so, sad`", find="a comma without a space",
         hint="two words grow together")
def key_deleted(text):
    text = html.unescape(text).casefold()
    plain = re.sub(r"[^\w\s]", "", text)
    return " ".join(plain.split()) or text.strip()


@mistake("comparison_key", "a set of words", looks="`' '.join(sorted(set(words)))`",
         shows="*not sad, just happy* and *not happy, just sad* are the same text",
         find="the sentence and its twin", hint="the order of the words must count")
def key_set(text):
    words = re.findall(r"\w+", html.unescape(text).casefold())
    return " ".join(sorted(set(words))) or text.strip()


@mistake("comparison_key", "an empty key", looks="`' '.join(words)`",
         shows="all posts of nothing but emoji are one text, and one in the test "
         "split takes all of them out of training", find="`🙂` and `🙁`",
         hint="texts without words all get the same key")
def key_empty(text):
    return " ".join(re.findall(r"\w+", html.unescape(text).casefold()))


@mistake("comparison_key", "entities left", looks="no `html.unescape`",
         shows="`&amp;` adds the word *amp*, and the copy is not found",
         find="`bread &amp; butter`", hint="HTML entities must not count")
def key_entities(text):
    return " ".join(re.findall(r"\w+", text.casefold())) or text.strip()


@mistake("comparison_key", "ASCII only", looks="`re.findall('[a-z]+', text)`",
         shows="texts in other scripts are all the same", find="two Russian words",
         hint="letters beyond ASCII are dropped")
def key_ascii(text):
    words = re.findall(r"[a-z0-9]+", html.unescape(text).casefold())
    return " ".join(words) or ("x" if re.search(r"\w", text) else text.strip())


@right("comparison_key", "letter by letter")
def key_letters(text):
    clean = "".join(c if c.isalnum() or c == "_" else " "
                    for c in html.unescape(text).casefold())
    return "|".join(clean.split()) or text.strip(string.whitespace)


@mistake("held_out_keys", "only the test splits", looks="`for split in ('test',)`",
         shows="validation texts are trained on, and every choice looks too good",
         find="count the keys", hint="only the test splits are held out")
def held_test():
    return {comparison_key(t) for d in (load_tweet_eval(), load_six_emotions())
            for t in d["test"]["text"]}


@mistake("held_out_keys", "one task only", looks="`load_tweet_eval()` alone",
         shows="a text may be test in one task and training in the other",
         find="count the keys", hint="only the tweets are held out")
def held_one():
    return {comparison_key(t) for s in SPLITS[1:] for t in load_tweet_eval()[s]["text"]}


@mistake("held_out_keys", "texts, not keys", looks="`set(dataset['test']['text'])`",
         shows="nothing is ever found, since keys are compared", find="print one",
         hint="these are the texts themselves")
def held_texts():
    return {t for d in (load_tweet_eval(), load_six_emotions()) for s in SPLITS[1:]
            for t in d[s]["text"]}


@right("held_out_keys", "by update")
def held_update():
    keys = set()
    for load in (load_six_emotions, load_tweet_eval):
        data = load()
        for split in ("test", "validation"):
            keys.update(map(comparison_key, data[split]["text"]))
    return keys


@mistake("remove_held_out", "compared letter for letter", looks="`if text not in keys`",
         shows="nothing is taken out, and the leak stays", find="count the rows",
         hint="texts are compared letter for letter")
def remove_raw(dataset, keys):
    return dataset.filter(lambda row: row["text"] not in keys)


@mistake("remove_held_out", "the choice inverted", looks="`if key in keys`",
         shows="the model trains on the exam, and on nothing else",
         find="count the rows", hint="the choice is inverted")
def remove_inverted(dataset, keys):
    return dataset.select([i for i, t in enumerate(dataset["text"])
                           if comparison_key(t) in keys])


@mistake("remove_held_out", "copies dropped too", looks="`seen.add(key)`",
         shows="fewer training posts than the table says", find="count the rows",
         hint="texts that stand twice are taken out as well")
def remove_twice(dataset, keys):
    seen, kept = set(keys), []
    for i, text in enumerate(dataset["text"]):
        key = comparison_key(text)
        if key not in seen:
            kept.append(i)
            seen.add(key)
    return dataset.select(kept)


@mistake("remove_held_out", "a new Dataset from lists", looks="`Dataset.from_dict(…)`",
         shows="label names and source get lost", find="`features['label']`",
         hint="ClassLabel")
def remove_rebuilt(dataset, keys):
    rows = [row for row in dataset if comparison_key(row["text"]) not in keys]
    return Dataset.from_list(rows)


@right("remove_held_out", "by filter")
def remove_filter(dataset, keys):
    return dataset.filter(lambda text: comparison_key(text) not in keys,
                          input_columns="text")


# Exercises


def guesses(labels, times, seed, draw):
    generator, scores = np.random.default_rng(seed), []
    for _ in range(times):
        guess = draw(generator, labels)
        scores.append((accuracy_score(labels, guess), f1_score(
            labels, guess, average="macro", zero_division=0)))
    return tuple(np.mean(scores, axis=0))


@mistake("guess_like_the_data", "even guesses", looks="`generator.integers(6, size=n)`",
         shows="rare emotions are guessed as often as common ones",
         find="count the guesses", hint="the guesses are even")
def guess_even(labels, times=100, seed=0):
    return guesses(labels, times, seed,
                   lambda g, x: g.integers(max(x) + 1, size=len(x)))


@right("guess_like_the_data", "by permutation")
def guess_permuted(labels, times=100, seed=0):
    return guesses(labels, times, seed, lambda g, x: g.permutation(x))


@mistake("emotion_named", "anywhere in the text", looks="`if name in text`",
         shows="*lovely* counts as love", find="`my lovely angel`",
         hint="compare whole words")
def named_inside(text):
    return next((i for i, n in enumerate(EMOTIONS) if n in text.lower()), 1)


@mistake("emotion_named", "0 taken for none", looks="`found or 1`",
         shows="anger is never answered", find="a text that names anger",
         hint="takes it for none")
def named_or(text):
    words = comparison_key(text).split()
    return next((i for i, n in enumerate(EMOTIONS) if n in words), 0) or 1


@right("emotion_named", "a loop")
def named_loop(text):
    words = set(re.findall(r"[a-z]+", text.lower()))
    for name in EMOTIONS:
        if name in words:
            return EMOTIONS.index(name)
    return 1


@mistake("torn_texts", "letter for letter", looks="`labels_of[text]`",
         shows="nothing is torn", find="`So sad!` and `so sad`",
         hint="letter for letter")
def torn_raw(texts, labels):
    table = {}
    for text, label in zip(texts, labels, strict=True):
        table.setdefault(text, Counter())[label] += 1
    torn = [c for c in table.values() if len(c) > 1]
    return len(torn), sum(c.total() for c in torn), sum(max(c.values()) for c in torn)


@right("torn_texts", "by lists")
def torn_lists(texts, labels):
    table = {}
    for text, label in zip(texts, labels, strict=True):
        table.setdefault(comparison_key(text), []).append(label)
    torn = [x for x in table.values() if len(set(x)) > 1]
    return len(torn), sum(map(len, torn)), sum(max(map(x.count, x)) for x in torn)


@mistake("load_own_posts", "misspelt labels left out", looks="`if name in EMOTIONS`",
         shows="posts vanish, and nobody hears of it", find="count the rows",
         hint="a misspelt label must be refused")
def own_dropped(path):
    rows = [line.split("\t") for line in read_lines(path)]
    rows = [(t, EMOTIONS.index(n)) for n, t in rows if n in EMOTIONS]
    return build(rows, EMOTIONS)


@mistake("load_own_posts", "no line named", looks="`EMOTIONS.index(name)`",
         shows="*tuple.index(x): x not in tuple*, and a thousand lines to search",
         find="misspell a label", hint="does not say in which line")
def own_index(path):
    rows = [line.split("\t") for line in read_lines(path)]
    return build([(t, EMOTIONS.index(n)) for n, t in rows], EMOTIONS)


@right("load_own_posts", "checked line by line")
def own_loop(path):
    rows = []
    for number, line in enumerate(read_lines(path), start=1):
        name, text = line.split("\t")
        if name not in EMOTIONS:
            raise ValueError(f"line {number}: no emotion is called {name!r}")
        rows.append((text, EMOTIONS.index(name)))
    return build(rows, EMOTIONS)


def word_sets(texts):
    return [set(comparison_key(text).split()) for text in texts]


@mistake("near_copies", "every pair", looks="two loops",
         shows="hours for a collection of a million posts", find="double the texts: "
         "the time is fourfold", hint="note for each word which texts hold it")
def copies_every(texts, others, threshold=0.6):
    sets = word_sets(others)
    return [(i, j) for i, a in enumerate(word_sets(texts)) for j, b in enumerate(sets)
            if len(a & b) / max(len(a | b), 1) >= threshold]


@mistake("near_copies", "divided by the shorter", looks="`len(a & b) / min(len(a), len(b))`",
         shows="*happy* is a copy of every text that says it", find="a text of one word",
         hint="divided by the shorter text")
def copies_shorter(texts, others, threshold=0.6):
    return copies_index(texts, others, threshold, lambda a, b: min(len(a), len(b)))


@right("near_copies", "an index")
def copies_index(texts, others, threshold=0.6, size=lambda a, b: len(a | b)):
    index, sets = {}, word_sets(others)
    for j, words in enumerate(sets):
        for word in words:
            index.setdefault(word, []).append(j)
    found = []
    for i, words in enumerate(word_sets(texts)):
        shared = Counter(j for word in words for j in index.get(word, ()))
        found += [(i, j) for j, n in shared.items()
                  if n / size(words, sets[j]) >= threshold]
    return found
