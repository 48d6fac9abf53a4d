"""The loaders: each source, each fault, and what is kept out of training."""

import os
import threading
import time
import warnings
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Sequence, Value
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score

from emoformer import data
from emoformer.data import (
    EMOTIONS,
    SPLITS,
    TASKS,
    comparison_key,
    held_out_keys,
    load_go_emotions,
    load_sample,
    load_six_emotions,
    load_tweet_eval,
    read_lines,
    read_mapping,
    remove_held_out,
    source_of,
    to_dataset,
)

REAL = os.environ.get("EMOFORMER_DATA")
needs_real_data = pytest.mark.skipif(
    not REAL, reason="set EMOFORMER_DATA to the folder with the real posts"
)
SHORT = {"train": "train", "validation": "val", "test": "test"}
FOUR = {  # our own posts, two a split
    "train": [("not sad, just happy", 1), ("not happy, just sad", 3)],
    "validation": [("who took my bicycle", 0), ("one line\u2028or two\x85", 2)],
    "test": [("tab\there", 3), ("👩\u200d🍳 again", 1)],
}
MAPPING = "0\tanger\n1\tjoy\n2\toptimism\n3\tsadness"
GO_NAMES = ["neutral", "love", "fear", "sadness", "pride", "optimism", "joy", "anger"]
GO = {  # text and GoEmotions' numbers
    "train": [("no label of ours", [0]), ("late again", [7]), ("both", [7, 3])],
    "validation": [("one of ours, one not", [4, 1]), ("my old dog", [1])],
    "test": [("steps behind me", [2]), ("we will manage", [5]), ("sun", [6])],
}
SIX = {
    "train": [("late again", 0)],
    "validation": [("my old dog", 5)],
    "test": [("steps behind me", 4), ("we will manage", 2), ("sun", 1)],
}


@pytest.fixture(autouse=True)
def a_machine_with_nothing(monkeypatch, tmp_path):
    """No folder, no network, an empty cache."""
    monkeypatch.delenv("EMOFORMER_DATA", raising=False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(data.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(data.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(data, "hub_answers", lambda: False)


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """A folder with the task emotion and GoEmotions, named by the variable."""
    write_task(tmp_path / "tweeteval" / "emotion", MAPPING)
    go = tmp_path / "go_emotions"
    go.mkdir()
    (go / "labels.txt").write_text("\n".join(GO_NAMES))
    for split, short in zip(SPLITS, ("train", "dev", "test"), strict=True):
        lines = [
            f"{text}\t{','.join(map(str, labels))}\tid{i}\n"
            for i, (text, labels) in enumerate(GO[split])
        ]
        (go / f"{short}.tsv").write_text("".join(lines), encoding="utf-8")
    monkeypatch.setenv("EMOFORMER_DATA", str(tmp_path))
    return tmp_path


def write_task(where, mapping):
    """Write FOUR in TweetEval's layout."""
    where.mkdir(parents=True)
    if mapping:
        (where / "mapping.txt").write_text(mapping, encoding="utf-8")
    for split, short in SHORT.items():
        texts, labels = zip(*FOUR[split], strict=True)
        for kind, lines in (("text", texts), ("labels", labels)):
            content = "".join(f"{line}\n" for line in lines)
            path = where / f"{short}_{kind}.txt"
            path.write_text(content, encoding="utf-8", newline="")


def rows(dataset):
    """The rows of a DatasetDict as plain pairs."""
    return {
        split: list(zip(part["text"], part["label"], strict=True))
        for split, part in dataset.items()
    }


def names(dataset):
    return dataset["train"].features["label"].names


def on_the_hub(monkeypatch, answer):
    """Let the Hub answer, and give or raise ``answer``; return the calls."""
    calls = []

    def load(*arguments):
        calls.append((*arguments, data.config.HF_HUB_OFFLINE))
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(data, "load_dataset", load)
    monkeypatch.setattr(data, "hub_answers", lambda: True)
    return calls


def hub_tweet_eval():
    """FOUR, with the features that the Hub's dataset has."""
    features = Features({
        "text": Value("string"), "label": ClassLabel(names=list(EMOTIONS[:4])),
    })
    return DatasetDict({
        split: Dataset.from_dict(
            {"text": [t for t, _ in part], "label": [i for _, i in part]}, features
        )
        for split, part in FOUR.items()
    })


def hub_go_emotions():
    """GO, with the features that the Hub's dataset has."""
    features = Features({
        "text": Value("string"),
        "labels": Sequence(ClassLabel(names=GO_NAMES)),
        "id": Value("string"),
    })
    return DatasetDict({
        split: Dataset.from_dict({
            "text": [t for t, _ in part], "labels": [i for _, i in part],
            "id": [str(i) for i in range(len(part))],
        }, features)
        for split, part in GO.items()
    })


# The folder


def test_folder_gives_texts_labels_and_names(folder):
    dataset = load_tweet_eval()
    assert list(dataset) == list(SPLITS)
    assert rows(dataset) == FOUR
    assert names(dataset) == ["anger", "joy", "optimism", "sadness"]
    assert dataset["train"].column_names == ["text", "label"]
    assert source_of(dataset) == "folder"


def test_label_names_come_from_the_mapping(folder):
    path = folder / "tweeteval" / "emotion" / "mapping.txt"
    path.write_text("0\twut\n1\tfreude\n2\tmut\n3\ttrauer\n", encoding="utf-8")
    assert names(load_tweet_eval()) == ["wut", "freude", "mut", "trauer"]


def test_stance_targets_share_one_mapping(folder):
    write_task(folder / "tweeteval" / "stance" / "climate", None)
    stance = folder / "tweeteval" / "stance" / "mapping.txt"
    with pytest.raises(FileNotFoundError, match=r"1 of 7.*stance.mapping\.txt"):
        load_tweet_eval("stance_climate")
    stance.write_text("0\tnone\n1\tagainst\n2\tfavor\n3\tmore\n")
    dataset = load_tweet_eval("stance_climate")
    assert names(dataset) == ["none", "against", "favor", "more"]
    assert rows(dataset) == FOUR


def test_further_columns_of_a_mapping_are_ignored(tmp_path):
    path = tmp_path / "mapping.txt"  # as the task emoji has it
    path.write_text("0\t❤\t_red_heart_\t\n1\t😂\t_joy_\t\n", encoding="utf-8")
    assert read_mapping(path) == ["❤", "😂"]


@pytest.mark.parametrize("task", ["stance", "Emotion", "", "../emotion", None])
def test_unknown_task_lists_the_known_ones(folder, task):
    with pytest.raises(ValueError, match=r"emoji, emotion.*stance_hillary") as error:
        load_tweet_eval(task)
    assert repr(task) in str(error.value)


@pytest.mark.parametrize("load", [load_tweet_eval, load_six_emotions])
def test_variable_that_names_no_folder(monkeypatch, tmp_path, load):
    monkeypatch.setenv("EMOFORMER_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match=r"EMOFORMER_DATA.*nowhere"):
        load()


@pytest.mark.parametrize("lost", [
    "mapping.txt", "train_text.txt", "train_labels.txt", "val_text.txt",
    "val_labels.txt", "test_text.txt", "test_labels.txt",
])
def test_each_missing_file_is_named_alone(folder, lost):
    (folder / "tweeteval" / "emotion" / lost).unlink()
    with pytest.raises(FileNotFoundError, match="^1 of 7 files") as error:
        load_tweet_eval()
    assert str(error.value).count(".txt") == 1
    assert lost in str(error.value)


def test_half_present_split_lists_all_missing_files(folder):
    for lost in ("train_text.txt", "train_labels.txt"):
        (folder / "tweeteval" / "emotion" / lost).unlink()
    with pytest.raises(FileNotFoundError, match="train_text.*train_labels"):
        load_tweet_eval()


def test_missing_task_and_missing_go_emotions_list_every_file(folder):
    with pytest.raises(FileNotFoundError, match="^7 of 7"):
        load_tweet_eval("irony")
    for path in (folder / "go_emotions").iterdir():
        path.unlink()
    with pytest.raises(FileNotFoundError, match="^4 of 4.*labels.*train.*dev.*test"):
        load_six_emotions()


@pytest.mark.parametrize(("name", "content", "counts"), [
    ("val_labels.txt", "0\n", "2 texts and 1 labels"),
    ("test_labels.txt", "0\n1\n2\n", "2 texts and 3 labels"),
    ("train_text.txt", "alone\n", "1 texts and 2 labels"),
])
def test_lengths_that_differ(folder, name, content, counts):
    (folder / "tweeteval" / "emotion" / name).write_text(content)
    label_file = name.replace("text", "labels")
    with pytest.raises(ValueError, match=f"{label_file}.*{counts}"):
        load_tweet_eval()


def test_an_empty_split_is_refused(folder):
    for kind in ("text", "labels"):
        (folder / "tweeteval" / "emotion" / f"test_{kind}.txt").write_text("")
    with pytest.raises(ValueError, match=r"test_labels.*0 texts"):
        load_tweet_eval()


@pytest.mark.parametrize("label", ["4", "-1", "joy", "", "1,2", "1.0", " 1 2", "²"])
def test_label_outside_the_mapping(folder, label):
    path = folder / "tweeteval" / "emotion" / "val_labels.txt"
    path.write_text(f"0\n{label}\n", encoding="utf-8")
    with pytest.raises(ValueError, match="val_labels.txt, line 2:.*0 to 3") as error:
        load_tweet_eval()
    assert label in str(error.value)


@pytest.mark.parametrize("name", [
    "tweeteval/emotion/mapping.txt", "tweeteval/emotion/test_text.txt",
    "tweeteval/emotion/train_labels.txt", "go_emotions/dev.tsv",
    "go_emotions/labels.txt",
])
def test_invalid_utf8_names_file_and_line(folder, name):
    path = folder / name
    path.write_bytes(path.read_bytes().rstrip(b"\n") + b"\ncaf\xe9\nmore\n")
    line = path.read_bytes().split(b"caf")[0].count(b"\n") + 1
    load = load_tweet_eval if "tweeteval" in name else load_six_emotions
    with pytest.raises(ValueError, match=f"UTF-8, but its line {line} ") as error:
        load()
    assert str(path) in str(error.value)


@pytest.mark.parametrize("content", [
    "", "anger\njoy\n", "0\tanger\n2\tjoy\n", "1\tanger\n", "0 anger\n",
    "0\tanger\n\n1\tjoy\n",
])
def test_malformed_mapping(folder, content):
    (folder / "tweeteval" / "emotion" / "mapping.txt").write_text(content)
    with pytest.raises(ValueError, match="mapping.txt must hold lines number<TAB>"):
        load_tweet_eval()


def test_only_a_newline_ends_a_line(tmp_path):
    path = tmp_path / "posts.txt"
    posts = ["a\u2028b", "c\x85d", "e\x0bf\x0cg\x1ch", "\u2029", "", "i\rj"]
    path.write_bytes("\n".join(posts).encode() + b"\n")
    assert read_lines(path) == posts
    path.write_bytes("\n".join(posts).encode())
    assert read_lines(path) == posts
    path.write_bytes(b"")
    assert read_lines(path) == []


# Six emotions


def test_six_keeps_single_labels_and_renumbers_them(folder):
    dataset = load_six_emotions()
    assert rows(dataset) == SIX
    assert names(dataset) == list(EMOTIONS)
    assert list(dataset) == list(SPLITS)
    assert source_of(dataset) == "folder"


def test_go_emotions_keeps_all_labels_in_their_order(folder):
    dataset = load_go_emotions()
    known = (folder / "go_emotions" / "labels.txt").read_text().split()
    assert names(dataset) == known
    assert len(known) > len(EMOTIONS)
    six = load_six_emotions()
    for split in SPLITS:
        kept = [
            (text, known[label]) for text, label in rows(dataset)[split]
            if known[label] in EMOTIONS
        ]
        assert kept == [(text, EMOTIONS[label]) for text, label in rows(six)[split]]
    assert sum(map(len, rows(dataset).values())) > sum(map(len, rows(six).values()))


def test_some_splits_alone_need_only_their_files(folder):
    (folder / "tweeteval" / "emotion" / "train_text.txt").unlink()
    whole = ("validation", "test")
    assert list(load_tweet_eval("emotion", whole)) == list(whole)
    with pytest.raises(FileNotFoundError, match="1 of 3.*train_text"):
        load_tweet_eval("emotion", ["train"])
    for splits in ((), ["dev"], ["test", "dev"]):
        with pytest.raises(ValueError, match="splits must be some of train, validation"):
            load_tweet_eval("emotion", splits)


@pytest.mark.parametrize("line", [
    "text\t8\tid", "text\t-1\tid", "text\tjoy\tid", "text\t\tid", "text\t1,\tid",
    "text", "text\t1", "text\t1\tid\tmore", "",
])
def test_malformed_comment_names_file_and_line(folder, line):
    path = folder / "go_emotions" / "dev.tsv"
    path.write_text(f"fine\t1\tid0\n{line}\n")
    with pytest.raises(ValueError, match=r"dev.tsv, line 2: .*from 0 to 7"):
        load_six_emotions()


def test_go_emotions_without_one_of_the_six(folder):
    path = folder / "go_emotions" / "labels.txt"
    path.write_text(path.read_text().replace("love", "like"))
    with pytest.raises(ValueError, match="'love'.* must be among .*'like'"):
        load_six_emotions()


def test_to_dataset_checks_and_keeps():
    texts, labels = ["a", "b", "c"], [0, [2], [1, 2]]
    kept = to_dataset(texts, labels, ["x", "y", "z"], keep=["z", "x"])
    assert list(kept["text"]) == ["a", "b"]
    assert list(kept["label"]) == [1, 0]
    with pytest.raises(ValueError, match=r"line 3: .*\[\]"):
        to_dataset(texts, [0, 1, []], ["x", "y"])


# The Hub


@pytest.mark.parametrize(("load", "answer", "asked"), [
    (load_tweet_eval, hub_tweet_eval, ("cardiffnlp/tweet_eval", "emotion")),
    (load_six_emotions, hub_go_emotions,
     ("google-research-datasets/go_emotions", "simplified")),
])
def test_hub_and_folder_give_the_same(monkeypatch, folder, load, answer, asked):
    from_folder = load()
    monkeypatch.delenv("EMOFORMER_DATA")
    calls = on_the_hub(monkeypatch, answer())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        from_hub = load()
    assert calls == [(*asked, False)]
    assert source_of(from_hub) == "hub"
    assert list(from_hub) == list(from_folder)
    for split in SPLITS:
        assert from_hub[split].to_dict() == from_folder[split].to_dict()
        assert from_hub[split].features == from_folder[split].features


def test_the_folder_goes_before_the_hub(monkeypatch, folder):
    calls = on_the_hub(monkeypatch, hub_tweet_eval())
    assert source_of(load_tweet_eval()) == "folder"
    assert calls == []


@pytest.mark.parametrize("value", ["1", "true", "ON"])
@pytest.mark.parametrize("how", ["at start", "later"])
def test_offline_asks_the_cache_and_never_the_hub(monkeypatch, how, value):
    calls = on_the_hub(monkeypatch, hub_tweet_eval())
    monkeypatch.setattr(data, "hub_answers", lambda: pytest.fail("the Hub was asked"))
    if how == "later":
        monkeypatch.setenv("HF_HUB_OFFLINE", value)
    else:
        monkeypatch.setattr(data.config, "HF_HUB_OFFLINE", True)
    assert source_of(load_tweet_eval()) == "hub"
    assert calls == [("cardiffnlp/tweet_eval", "emotion", True)]
    assert data.config.HF_HUB_OFFLINE is (how == "at start")


def test_a_silent_hub_leaves_the_cache(monkeypatch):
    calls = on_the_hub(monkeypatch, hub_tweet_eval())
    monkeypatch.setattr(data, "hub_answers", lambda: False)
    assert source_of(load_tweet_eval()) == "hub"
    assert calls == [("cardiffnlp/tweet_eval", "emotion", True)]
    assert data.config.HF_HUB_OFFLINE is False


# The sample as the last resort


@pytest.mark.parametrize(("load", "labels"), [
    (load_tweet_eval, EMOTIONS[:4]), (load_six_emotions, EMOTIONS),
])
def test_without_anything_the_sample_with_a_notice(load, labels):
    with pytest.warns(UserWarning, match="Hub is silent.*600 bundled") as record:
        dataset = load()
    assert [warning.filename for warning in record] == [__file__]
    assert source_of(dataset) == "sample"
    assert names(dataset) == list(labels)
    assert {s: len(part) for s, part in dataset.items()} == {
        "train": 60 * len(labels), "validation": 20 * len(labels),
        "test": 20 * len(labels),
    }
    whole = load_sample()
    for split in SPLITS:
        kept = [pair for pair in rows(whole)[split] if pair[1] < len(labels)]
        assert rows(dataset)[split] == kept


def test_offline_notice_says_offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.warns(UserWarning, match="HF_HUB_OFFLINE is set.*not in the cache"):
        load_tweet_eval()


@pytest.mark.parametrize("fault", [
    ConnectionError("reset"), OSError("no space"), ValueError("bad"),
    RuntimeError("odd"), TimeoutError("slow"),
])
def test_a_download_that_fails_is_quoted(monkeypatch, fault):
    on_the_hub(monkeypatch, fault)
    with pytest.warns(UserWarning, match=rf"Hub answers.*\({fault}\).*600 bundled"):
        assert source_of(load_six_emotions()) == "sample"
    assert data.config.HF_HUB_OFFLINE is False


def test_without_anything_some_splits_come_from_the_sample():
    with pytest.warns(UserWarning, match="600 bundled"):
        assert list(load_tweet_eval("emotion", ["test"])) == ["test"]
    with pytest.raises(ConnectionError, match=r"EMOFORMER_DATA.*\(simplified\)"):
        load_go_emotions()


@pytest.mark.parametrize("task", [task for task in TASKS if task != "emotion"])
def test_other_tasks_have_no_sample(task):
    with pytest.raises(ConnectionError, match=rf"EMOFORMER_DATA.*\({task}\)"):
        load_tweet_eval(task)


def test_a_network_that_swallows_everything_costs_seconds(monkeypatch):
    monkeypatch.undo()  # the real question, to a Hub that never answers
    monkeypatch.delenv("EMOFORMER_DATA", raising=False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(data.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(data.config, "HF_DATASETS_CACHE", Path("/nonexistent"))
    ended = threading.Event()
    monkeypatch.setattr(
        data.HfApi, "dataset_info", lambda *_, **__: ended.wait(60)
    )
    start = time.perf_counter()
    with pytest.warns(UserWarning, match="Hub is silent"):
        dataset = load_tweet_eval()
    seconds = time.perf_counter() - start
    ended.set()
    assert source_of(dataset) == "sample"
    assert seconds < 10


def test_hub_answers(monkeypatch):
    monkeypatch.undo()

    def fail(*_, **__):
        raise OSError("no route")

    ended = threading.Event()
    api = data.HfApi
    monkeypatch.setattr(api, "dataset_info", lambda *_, **__: object())
    assert data.hub_answers() is True
    monkeypatch.setattr(api, "dataset_info", fail)
    assert data.hub_answers() is False
    monkeypatch.setattr(api, "dataset_info", lambda *_, **__: ended.wait(60))
    start = time.perf_counter()
    assert data.hub_answers(seconds=0.2) is False
    assert time.perf_counter() - start < 5
    ended.set()


# The same text in two places


@pytest.mark.parametrize(("one", "other"), [
    ("Not sad, just happy!", "not sad   just HAPPY"),
    ("bread &amp; butter", "bread & butter"),
    ("don&#39;t", "don't"),
    ("done ✅", "done."),
    ("STRASSE", "straße"),
])
def test_same_words_same_key(one, other):
    assert comparison_key(one) == comparison_key(other)


@pytest.mark.parametrize(("one", "other"), [
    ("not sad, just happy", "not happy, just sad"),
    ("so sad", "so so sad"),
    ("🙂", "🙁"),
    ("every day", "everyday"),
])
def test_other_words_other_key(one, other):
    assert comparison_key(one) != comparison_key(other)


@given(st.lists(st.text("abcäßж1", min_size=1), min_size=1), st.data())
@settings(deadline=None)
def test_key_is_blind_to_what_stands_between_words(words, drawn):
    gap = st.text(" ,.!?-#\n🙂", min_size=1)
    text = "".join(word + drawn.draw(gap) for word in words)
    assert comparison_key(text) == comparison_key(" ".join(words))
    assert comparison_key(comparison_key(text)) == comparison_key(text)


def test_held_out_are_validation_and_test_of_both_tasks(folder):
    expected = {
        comparison_key(text)
        for part in (FOUR, SIX)
        for split in ("validation", "test")
        for text, _ in part[split]
    }
    assert held_out_keys() == expected
    assert comparison_key("not sad, just happy") not in expected  # train
    assert comparison_key("one of ours, one not") not in expected  # no test of ours


def test_remove_held_out_keeps_the_rest_in_order():
    texts = ["b", "A test!", "a", "a TEST", "b", "test a"]
    dataset = to_dataset(texts, [0, 1, 2, 3, 4, 5], EMOTIONS, source="folder")
    clean = remove_held_out(dataset, {comparison_key("a test")})
    assert list(clean["text"]) == ["b", "a", "b", "test a"]
    assert list(clean["label"]) == [0, 2, 4, 5]
    assert clean.info.description == "folder"


# The real posts, where they are


@pytest.fixture
def real(monkeypatch):
    monkeypatch.setenv("EMOFORMER_DATA", REAL)


@needs_real_data
@pytest.mark.parametrize(("load", "labels", "sizes", "majority"), [
    (load_tweet_eval, EMOTIONS[:4], (3257, 374, 1421), 0.1410),
    (load_six_emotions, EMOTIONS, (5413, 649, 658), 0.0652),
])
def test_official_sizes_names_and_majority(real, load, labels, sizes, majority):
    dataset = load()
    assert names(dataset) == list(labels)
    assert tuple(len(dataset[split]) for split in SPLITS) == sizes
    train = list(dataset["train"]["label"])
    commonest = max(set(train), key=train.count)
    truth = list(dataset["test"]["label"])
    score = f1_score(
        truth, [commonest] * len(truth), average="macro", zero_division=0
    )
    assert abs(score - majority) < 5e-5


@needs_real_data
@pytest.mark.parametrize("task", [t for t in TASKS if t != "sentiment"])
def test_every_other_task_loads(real, task):
    dataset = load_tweet_eval(task)
    assert all(len(dataset[split]) > 30 for split in SPLITS)
    assert max(dataset["train"]["label"]) == len(names(dataset)) - 1


@needs_real_data
def test_sentiment_without_its_train_split(real):
    train = Path(REAL) / "tweeteval" / "sentiment" / "train_text.txt"
    if train.exists():
        pytest.skip("this folder has sentiment's train split")
    with pytest.raises(FileNotFoundError, match="2 of 7.*train_text.*train_labels"):
        load_tweet_eval("sentiment")


@needs_real_data
def test_nothing_held_out_is_left_to_train_on(real):
    keys = held_out_keys()
    removed = {}
    for name, dataset in (("emotion", load_tweet_eval()), ("six", load_six_emotions())):
        clean = remove_held_out(dataset["train"], keys)
        assert not keys & set(map(comparison_key, clean["text"]))
        removed[name] = len(dataset["train"]) - len(clean)
    assert removed == {"emotion": 2, "six": 58}
