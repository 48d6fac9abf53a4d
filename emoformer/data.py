"""Labelled posts from three sources behind one small API."""
# ---- imports
import html
import os
import re
import threading
import warnings
from pathlib import Path

from datasets import ClassLabel, Dataset, DatasetDict, DatasetInfo
from datasets import Features, Value, load_dataset
from huggingface_hub import HfApi, constants

# ---- names
EMOTIONS = ("anger", "joy", "optimism", "sadness", "fear", "love")
TASKS = (
    "emoji", "emotion", "hate", "irony", "offensive", "sentiment",
    "stance_abortion", "stance_atheism", "stance_climate",
    "stance_feminist", "stance_hillary",
)
SPLITS = ("train", "validation", "test")

_SAMPLE = Path(__file__).parent / "sample" / "posts.tsv"
_TWEET_EVAL = "cardiffnlp/tweet_eval"
_GO_EMOTIONS = "google-research-datasets/go_emotions"


# ---- read_lines
def read_lines(path):
    """Read the lines of a UTF-8 text file, without their line ends.

    Only a newline ends a line. Posts hold other characters at which
    ``str.splitlines`` would cut them in two.

    Args:
        path: the file.

    Returns:
        A list of strings.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not valid UTF-8.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} must be UTF-8, but its byte {error.start} is not"
        ) from error
    return text.removesuffix("\n").split("\n") if text else []


# ---- read_mapping
def read_mapping(path):
    """Read label names from a TweetEval ``mapping.txt``.

    Args:
        path: a file with one ``number<TAB>name`` a line, from 0 upwards.

    Returns:
        A list of names, in the order of their numbers.

    Raises:
        ValueError: a line is malformed, or the numbers are not 0, 1, 2, …
    """
    rows = [line.split("\t") for line in read_lines(path) if line.strip()]
    numbers = [row[0] for row in rows if len(row) == 2]
    if numbers != [str(i) for i in range(len(rows))] or not rows:
        raise ValueError(
            f"{path} must hold lines 'number<TAB>name', numbered 0, 1, 2, …, "
            f"but it begins with {rows[:3]}"
        )
    return [name.strip() for _, name in rows]


# ---- read_labels
def read_labels(path, num_labels):
    """Read one label number a line.

    Args:
        path: the file.
        num_labels: each label must lie in 0 … ``num_labels`` - 1.

    Returns:
        A list of ints.

    Raises:
        ValueError: a line is not a number in that range.
    """
    valid = {str(i): i for i in range(num_labels)}
    labels = []
    for number, line in enumerate(read_lines(path), start=1):
        if line.strip() not in valid:
            raise ValueError(
                f"{path}, line {number}: a label must be a number from 0 to "
                f"{num_labels - 1}, but this one is {line!r}"
            )
        labels.append(valid[line.strip()])
    return labels


# ---- to_dataset
def to_dataset(texts, labels, names, source):
    """Put texts and their labels into one ``datasets.Dataset``.

    Args:
        texts: a list of strings.
        labels: a list of ints in 0 … ``len(names)`` - 1, as long as
            ``texts``.
        names: the label names, in the order of their numbers.
        source: where the posts come from: folder, hub or sample.

    Returns:
        A Dataset with the columns ``text`` and ``label`` (a ClassLabel).

    Raises:
        ValueError: the two lists differ in length, or a label is out of
            range.
    """
    if len(texts) != len(labels):
        raise ValueError(
            "every text needs one label, but there are "
            f"{len(texts)} texts and {len(labels)} labels"
        )
    if labels and not 0 <= min(labels) <= max(labels) < len(names):
        raise ValueError(
            f"labels must lie in 0 … {len(names) - 1}, but these lie in "
            f"{min(labels)} … {max(labels)}"
        )
    return Dataset.from_dict(
        {"text": texts, "label": labels},
        features=Features(
            {"text": Value("string"), "label": ClassLabel(names=list(names))}
        ),
        info=DatasetInfo(description=source),
    )


def source_of(dataset):
    """Say where a dataset of this module comes from.

    Args:
        dataset: a DatasetDict returned by one of the loaders.

    Returns:
        ``"folder"``, ``"hub"`` or ``"sample"``.
    """
    return dataset["train"].info.description


# ---- folder
def _data_folder():
    """The folder named by EMOFORMER_DATA, or None where it is not set."""
    name = os.environ.get("EMOFORMER_DATA")
    if not name:
        return None
    if not Path(name).is_dir():
        raise FileNotFoundError(
            f"EMOFORMER_DATA must name a folder, but there is none at {name!r}: "
            "correct it, or unset it to use the Hub or the bundled sample"
        )
    return Path(name)


def _must_exist(*paths):
    """Raise FileNotFoundError unless every path is a file."""
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(paths)} files are missing: "
            + ", ".join(missing)
        )


def _tweet_eval_from_folder(root, task):
    """Read one task in TweetEval's own release layout."""
    folder = root / "tweeteval" / task.replace("_", "/")
    mapping = folder / "mapping.txt"
    if task.startswith("stance"):  # the five targets share one mapping
        mapping = folder.parent / "mapping.txt"
    pairs = [
        (folder / f"{short}_text.txt", folder / f"{short}_labels.txt")
        for short in ("train", "val", "test")
    ]
    _must_exist(mapping, *(path for pair in pairs for path in pair))
    names = read_mapping(mapping)
    result = DatasetDict()
    for split, (text_path, label_path) in zip(SPLITS, pairs):
        texts = read_lines(text_path)
        labels = read_labels(label_path, len(names))
        if len(texts) != len(labels):
            raise ValueError(
                f"every text needs one label, but {text_path} has "
                f"{len(texts)} lines and {label_path} has {len(labels)}"
            )
        result[split] = to_dataset(texts, labels, names, "folder")
    return result


# ---- six
def _go_emotions_from_folder(root):
    """Read GoEmotions' files: for each split its texts and label lists."""
    folder = root / "go_emotions"
    paths = [folder / f"{short}.tsv" for short in ("train", "dev", "test")]
    _must_exist(folder / "labels.txt", *paths)
    names = read_lines(folder / "labels.txt")
    valid = {str(i) for i in range(len(names))}
    splits = {}
    for split, path in zip(SPLITS, paths):
        rows = [line.split("\t") for line in read_lines(path)]
        for number, row in enumerate(rows, start=1):
            if len(row) != 3 or not set(row[1].split(",")) <= valid:
                raise ValueError(
                    f"{path}, line {number} must be text<TAB>labels<TAB>id "
                    f"with labels from 0 to {len(names) - 1}, but after its "
                    f"text it holds {row[1:]}"
                )
        splits[split] = (
            [row[0] for row in rows],
            [[int(i) for i in row[1].split(",")] for row in rows],
        )
    return splits, names


def _only_six(splits, names, source):
    """Keep the posts whose only label is one of the six, renumbered."""
    number = {names.index(name): i for i, name in enumerate(EMOTIONS)}
    result = DatasetDict()
    for split, (texts, labels) in splits.items():
        kept = [
            (text, number[row[0]])
            for text, row in zip(texts, labels)
            if len(row) == 1 and row[0] in number
        ]
        result[split] = to_dataset(
            [text for text, _ in kept], [i for _, i in kept], EMOTIONS, source
        )
    return result


# ---- hub
def hub_answers(seconds=5.0):
    """Ask whether the Hugging Face Hub can be reached.

    The question is asked in a thread of its own, so that a network that
    swallows packets costs ``seconds`` and not a minute of retries.

    Args:
        seconds: how long to wait.

    Returns:
        True when the Hub answered in time.
    """
    answers = []

    def ask():
        try:
            answers.append(HfApi().dataset_info(_TWEET_EVAL, timeout=seconds))
        except Exception:  # whatever went wrong, the Hub did not answer
            pass

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(answers)


def _from_hub(repository, name):
    """Load from the Hub or its cache; None where neither can give it.

    HF_HUB_OFFLINE=1 means: the cache only.
    """
    if not constants.HF_HUB_OFFLINE and not hub_answers():
        return None
    try:
        return load_dataset(repository, name)
    except (ConnectionError, FileNotFoundError):
        if constants.HF_HUB_OFFLINE:  # not in the cache
            return None
        raise


# ---- sample
def load_sample():
    """Load the 600 posts that come with the book: six emotions, 100 each.

    Returns:
        A DatasetDict with train (360), validation (120) and test (120).
    """
    header, *rows = [line.split("\t") for line in read_lines(_SAMPLE)]
    if header != ["split", "label", "text"]:
        raise ValueError(f"{_SAMPLE} must begin split, label, text: {header}")
    return DatasetDict({
        split: to_dataset(
            [text for where, _, text in rows if where == split],
            [EMOTIONS.index(name) for where, name, _ in rows if where == split],
            EMOTIONS,
            "sample",
        )
        for split in SPLITS
    })


def _fall_back(wanted):
    """Load the sample in place of a dataset, and say so."""
    warnings.warn(
        f"{wanted}: the Hub cannot be reached and EMOFORMER_DATA is not set, "
        "so this is the book's bundled sample of 600 posts. Numbers will "
        "differ from the page. (HF_HUB_OFFLINE=1 uses what was downloaded "
        "before.)",
        stacklevel=3,
    )
    return load_sample()


# ---- load
def load_tweet_eval(task="emotion"):
    """Load one task of TweetEval.

    The posts come from the folder named by the environment variable
    ``EMOFORMER_DATA``; where that is not set, from the Hugging Face Hub;
    where that cannot be reached, from the bundled sample (the task emotion
    only), with a warning.

    Args:
        task: one of ``TASKS``.

    Returns:
        A DatasetDict with the official train, validation and test splits,
        each with the columns ``text`` and ``label``.

    Raises:
        ValueError: the task is unknown, or a file is malformed.
        FileNotFoundError: the folder lacks a file of the task.
        ConnectionError: the Hub cannot be reached and the sample does not
            hold the task.

    Source: Barbieri et al. (2020), TweetEval.
    """
    if task not in TASKS:
        raise ValueError(
            f"task must be one of {', '.join(TASKS)}, but it is {task!r}"
        )
    folder = _data_folder()
    if folder:
        return _tweet_eval_from_folder(folder, task)
    loaded = _from_hub(_TWEET_EVAL, task)
    if loaded:
        return DatasetDict({
            split: to_dataset(
                list(loaded[split]["text"]), list(loaded[split]["label"]),
                loaded[split].features["label"].names, "hub",
            )
            for split in SPLITS
        })
    if task != "emotion":
        raise ConnectionError(
            f"the Hub cannot be reached, EMOFORMER_DATA is not set, and the "
            f"bundled sample holds only the task emotion, not {task!r}"
        )
    sample = _fall_back("load_tweet_eval")
    four = EMOTIONS[:4]
    return DatasetDict({
        split: to_dataset(
            [row["text"] for row in sample[split] if row["label"] < 4],
            [row["label"] for row in sample[split] if row["label"] < 4],
            four, "sample",
        )
        for split in SPLITS
    })


def load_six_emotions():
    """Load the comments of GoEmotions that bear exactly one of six labels.

    The labels are anger, joy, optimism, sadness, fear and love. Sources and
    their order are those of `load_tweet_eval`.

    Returns:
        A DatasetDict with the official train, validation and test splits,
        filtered.

    Raises:
        ValueError: a file is malformed.
        FileNotFoundError: the folder lacks a file.

    Source: Demszky et al. (2020), GoEmotions.
    """
    folder = _data_folder()
    if folder:
        return _only_six(*_go_emotions_from_folder(folder), "folder")
    loaded = _from_hub(_GO_EMOTIONS, "simplified")
    if loaded:
        splits = {
            split: (list(loaded[split]["text"]), list(loaded[split]["labels"]))
            for split in SPLITS
        }
        names = loaded["train"].features["labels"].feature.names
        return _only_six(splits, names, "hub")
    return _fall_back("load_six_emotions")


# ---- overlap
def comparison_key(text):
    """Reduce a text to what makes it the same text: its words, in order.

    Case, punctuation, spacing and HTML entities do not count. A text
    without words stands for itself.
    """
    words = re.findall(r"\w+", html.unescape(text).casefold())
    return " ".join(words) or text.strip()


def held_out_keys():
    """Collect the keys of all texts on which this book reports a score.

    Returns:
        The set of `comparison_key` of every validation and test text of
        both reported tasks.
    """
    return {
        comparison_key(text)
        for dataset in (load_tweet_eval("emotion"), load_six_emotions())
        for split in ("validation", "test")
        for text in dataset[split]["text"]
    }


def remove_held_out(dataset, keys):
    """Take out of a training set what stands among the held-out texts.

    Args:
        dataset: a Dataset with a column ``text``.
        keys: what `held_out_keys` returned.

    Returns:
        The Dataset without those rows, in the same order.
    """
    kept = [
        i for i, text in enumerate(dataset["text"])
        if comparison_key(text) not in keys
    ]
    return dataset.select(kept)
