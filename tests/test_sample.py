"""What the README of the bundled sample promises."""

import os
import re
from collections import Counter
from itertools import groupby
from pathlib import Path

import pytest

import emoformer
from emoformer.data import EMOTIONS, SPLITS, comparison_key, load_sample

FOLDER = Path(emoformer.__file__).parent / "sample"
RAW = (FOLDER / "posts.tsv").read_bytes()
ROWS = [tuple(line.split("\t")) for line in RAW.decode("utf-8").split("\n")[1:-1]]
POSTS = [text for _, _, text in ROWS]
PER_LABEL = {"train": 60, "validation": 20, "test": 20}
OWN_WORD = {  # a label's word and what grows from it, hashtags included
    "anger": r"ang(?:er|ry|ri)", "joy": r"joy", "optimism": r"optimis",
    "sadness": r"\bsad", "fear": r"\bfear", "love": r"\bun?lov|\blov|belov",
}
EMOJI = re.compile("[\U0001f300-\U0001faff\u2600-\u27bf\u26a1]")


def runs(text, length):
    """All runs of so many words in a text."""
    words = re.findall(r"[a-z0-9']+", text.lower())
    return {
        " ".join(words[i : i + length]) for i in range(len(words) - length + 1)
    }


def test_file_is_plain_utf8_with_a_header_and_three_columns():
    text = RAW.decode("utf-8")
    assert text.startswith("split\tlabel\ttext\n")
    assert text.endswith("\n") and not text.endswith("\n\n")
    assert not set("\r\ufeff\ufffd\u2028\u2029\x85") & set(text)
    assert {len(row) for row in ROWS} == {3}


def test_counts_per_split_and_label():
    expected = {(s, name): PER_LABEL[s] for s in SPLITS for name in EMOTIONS}
    assert Counter((split, label) for split, label, _ in ROWS) == expected


def test_splits_stand_in_order_and_labels_are_mixed():
    assert [key for key, _ in groupby(split for split, _, _ in ROWS)] == list(SPLITS)
    longest = max(len(list(group)) for _, group in groupby(r[1] for r in ROWS))
    assert longest <= 5


def test_loader_gives_what_the_file_says():
    sample = load_sample()
    got = [
        (split, EMOTIONS[label], text)
        for split in SPLITS
        for text, label in zip(
            sample[split]["text"], sample[split]["label"], strict=True
        )
    ]
    assert got == ROWS


def test_no_two_posts_share_five_words_in_a_row():
    seen = {}
    for post in POSTS:
        for run in runs(post, 5):
            assert run not in seen, (run, seen.get(run), post)
            seen[run] = post
    assert len(seen) > 5000
    assert len(set(map(comparison_key, POSTS))) == len(POSTS)


@pytest.mark.parametrize("label", EMOTIONS)
def test_at_least_seventy_percent_do_without_the_own_word(label):
    posts = [text.lower() for _, name, text in ROWS if name == label]
    without = sum(not re.search(OWN_WORD[label], post) for post in posts)
    assert without >= 0.7 * len(posts)


def test_posts_are_short_clean_and_nobodys():
    for post in POSTS:
        assert post == post.strip() and "  " not in post, post
        assert 1 <= len(post.split()) <= 46, post
        assert all(ord(character) >= 32 for character in post), post
        assert not re.search(r"@(?!user\b)|http\S|www\.", post), post


def test_hashtags_emoji_and_entities_occur():
    def share(pattern):
        return sum(bool(re.search(pattern, post)) for post in POSTS) / len(POSTS)

    assert 0.20 <= share(r"#\w") <= 0.25
    assert 0.17 <= share(EMOJI) <= 0.23
    assert share(r"&(?:amp|lt|gt|quot|#39);") > 0


def test_licence_and_origin_stand_beside_it():
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert "CC BY 4.0" in readme
    assert "no post was\ntaken from anybody" in readme
    licence = (FOLDER / "LICENSE").read_text(encoding="utf-8")
    assert "Creative Commons Attribution 4.0 International" in licence


@pytest.mark.skipif(
    not os.environ.get("EMOFORMER_DATA"),
    reason="set EMOFORMER_DATA to the folder with the real posts",
)
def test_no_post_quotes_a_real_one():
    ours = {run for post in POSTS for run in runs(post, 7)}
    root = Path(os.environ["EMOFORMER_DATA"])
    paths = [*root.glob("tweeteval/**/*_text.txt"), *root.glob("go_emotions/*.tsv")]
    real = 0
    for path in paths:
        for line in path.read_text(encoding="utf-8").split("\n"):
            theirs = runs(line.split("\t")[0], 7)
            real += len(theirs)
            assert not ours & theirs
    assert real > 100_000
