"""Scores, prediction files, intervals, noise, calibration."""

import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import (
    accuracy_score,
    classification_report,
    f1_score,
    precision_recall_fscore_support,
)
from sklearn.metrics import confusion_matrix as sklearn_confusion

from emoformer import evaluation
from emoformer.evaluation import (
    add_typos,
    bootstrap,
    confusion_matrix,
    expected_calibration_error,
    fit_temperature,
    interval,
    macro_f1,
    paired_bootstrap,
    precision_recall_f1,
    read_predictions,
    reliability,
    remove_emoji,
    remove_hashtags,
    score,
    write_predictions,
)


@st.composite
def answered(draw):
    """Random labels and answers, classes missing now and then."""
    num_labels = draw(st.integers(1, 6))
    texts = draw(st.integers(1, 40))
    ids = st.lists(st.integers(0, num_labels - 1), min_size=texts, max_size=texts)
    return draw(ids), draw(ids), num_labels


def invented(texts, num_labels, share, seed):
    """Labels, and answers that are right about so often."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(num_labels, size=texts)
    wrong = (labels + generator.integers(1, num_labels, size=texts)) % num_labels
    return labels, np.where(generator.random(texts) < share, labels, wrong)


# -- scores -----------------------------------------------------------------
def test_ten_posts_by_hand():
    labels = [0, 0, 0, 0, 0, 1, 1, 1, 2, 2]
    chosen = [0, 0, 0, 0, 1, 1, 1, 0, 0, 2]
    confusion = confusion_matrix(labels, chosen, 3)
    assert confusion.tolist() == [[4, 1, 0], [1, 2, 0], [1, 0, 1]]
    assert confusion.dtype == torch.int64
    precision, recall, f1 = precision_recall_f1(confusion)
    assert precision.tolist() == pytest.approx([4 / 6, 2 / 3, 1])
    assert recall.tolist() == pytest.approx([4 / 5, 2 / 3, 1 / 2])
    assert f1.tolist() == pytest.approx([8 / 11, 2 / 3, 2 / 3])
    assert macro_f1(confusion) == pytest.approx((8 / 11 + 4 / 3) / 3)
    assert score(labels, chosen, 3)["accuracy"] == pytest.approx(0.7)


@given(answered())
@settings(deadline=None)
def test_scores_equal_scikit_learn(case):
    labels, chosen, num_labels = case
    every = range(num_labels)
    confusion = confusion_matrix(labels, chosen, num_labels)
    assert confusion.tolist() == sklearn_confusion(labels, chosen, labels=every).tolist()
    theirs = precision_recall_fscore_support(labels, chosen, labels=every, zero_division=0)
    for mine, other in zip(precision_recall_f1(confusion), theirs, strict=False):
        assert mine.shape == (num_labels,)
        np.testing.assert_allclose(mine, other, rtol=0, atol=1e-12)
    scores = score(labels, chosen, num_labels)
    expected = f1_score(labels, chosen, labels=every, average="macro", zero_division=0)
    assert scores["macro_f1"] == pytest.approx(expected, abs=1e-12)
    assert scores["accuracy"] == pytest.approx(accuracy_score(labels, chosen), abs=1e-12)
    assert all(type(value) is float for value in scores.values())


@given(answered())
@settings(deadline=None)
def test_the_official_scoring_where_every_class_is_seen(case):
    """TweetEval's script reads the line "macro avg" of scikit-learn's report."""
    labels, chosen, num_labels = case
    labels, chosen = [*labels, *range(num_labels)], [*chosen, *range(num_labels)]
    lines = [str(i) for i in labels], [str(i) for i in chosen]  # it compares strings
    report = classification_report(*lines, output_dict=True, zero_division=0)
    official = report["macro avg"]["f1-score"]
    assert score(labels, chosen, num_labels)["macro_f1"] == pytest.approx(official, abs=1e-12)


def test_a_class_that_is_nowhere_counts_as_zero():
    assert score([0, 1], [0, 1], 3) == {"macro_f1": pytest.approx(2 / 3), "accuracy": 1.0}
    for numbers in precision_recall_f1(torch.zeros(3, 3, dtype=torch.int64)):
        assert numbers.tolist() == [0, 0, 0]


def test_one_class_and_one_text():
    assert score([0], [0], 1) == {"macro_f1": 1.0, "accuracy": 1.0}
    assert score([1], [0], 2) == {"macro_f1": 0.0, "accuracy": 0.0}


def test_axes_in_front_are_other_matrices():
    matrices = torch.randint(9, (2, 5, 3, 3), generator=torch.Generator().manual_seed(0))
    together = precision_recall_f1(matrices)
    for i in range(2):
        for j in range(5):
            for whole, alone in zip(together, precision_recall_f1(matrices[i, j]), strict=True):
                assert torch.equal(whole[i, j], alone)


@pytest.mark.parametrize("make", [
    list, tuple, np.array, torch.tensor, lambda ids: np.array(ids, dtype=np.uint8),
    lambda ids: torch.tensor(ids, dtype=torch.int32),
    lambda ids: np.array(ids[::-1])[::-1],  # a view that runs backwards
    lambda ids: [np.int64(i) for i in ids],
], ids=["list", "tuple", "numpy", "torch", "uint8", "int32", "backwards", "scalars"])
def test_labels_of_many_kinds(make):
    ids, other = [0, 2, 1, 5, 5], [0, 1, 1, 5, 2]
    assert score(make(ids), make(other), 6) == score(ids, other, 6)
    # 6 · 5 + 5 must not run over in a small integer type
    assert confusion_matrix(make([199, 0]), make([199, 0]), 200)[199, 199] == 1


def test_a_column_of_a_dataset():
    from emoformer.data import load_sample

    labels = load_sample()["test"]["label"]
    assert score(labels, list(labels), 6)["macro_f1"] == 1.0


@pytest.mark.parametrize(("labels", "chosen", "message"), [
    ([0, 1, 2], [0, 1], "one answer for each label, but there are 3 labels and 2 answers"),
    ([0, 3], [0, 1], "labels must be from 0 to 2, but one is 3"),
    ([0, 1], [0, -1], "chosen must be from 0 to 2, but one is -1"),
    ([], [], r"labels must be a list of at least one label, but its shape is \(0,\)"),
    ([[0, 1]], [0], r"labels must be a list .* its shape is \(1, 2\)"),
    ([0.0, 1.0], [0, 1], "labels must be whole numbers, but they are float64"),
    ([0, 1], torch.tensor([0.2, 0.8]), "chosen must be whole numbers, but they are float32"),
    ([True], [0], "labels must be whole numbers, but they are bool"),
    (["anger"], [0], "labels must be whole numbers, but they are <U5"),
])
def test_what_cannot_be_scored_is_refused(labels, chosen, message):
    for function in (score, confusion_matrix, bootstrap):
        with pytest.raises(ValueError, match=message):
            function(labels, chosen, 3)


@pytest.mark.parametrize("shape", [(3,), (2, 3), (4, 3, 2)])
def test_a_matrix_must_be_square(shape):
    with pytest.raises(ValueError, match=r"must be square, but its shape is \(\d"):
        precision_recall_f1(torch.ones(shape, dtype=torch.int64))


# -- files ------------------------------------------------------------------
def test_predictions_survive_the_round_trip(tmp_path):
    path = tmp_path / "emotion.txt"
    for ids in ([0, 3, 1], np.array([2]), torch.tensor([5] * 11)):
        write_predictions(path, ids, 6)
        again = read_predictions(path, num_labels=6, length=len(ids))
        assert again == list(ids)
        assert all(type(i) is int for i in again)
    assert read_predictions(path, num_labels=6) == [5] * 11
    assert [p.name for p in tmp_path.iterdir()] == ["emotion.txt"]


def test_the_file_is_what_the_official_script_reads(tmp_path):
    write_predictions(tmp_path / "x.txt", [3, 0, 10], 20)
    assert (tmp_path / "x.txt").read_bytes() == b"3\n0\n10\n"


def test_a_refused_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "emotion.txt"
    write_predictions(path, [1, 2], 4)
    with pytest.raises(ValueError, match="chosen must be from 0 to 3, but one is 4"):
        write_predictions(path, [1, 4], 4)

    def full(source, target):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="disk full"):
        write_predictions(path, [3, 3], 4)
    assert read_predictions(path, num_labels=4) == [1, 2]


@pytest.mark.parametrize(("content", "message"), [
    (b"0\n1\n", r"must hold 3 lines, one for each text, but it holds 2"),
    (b"0\n1\n2\n2\n", r"must hold 3 lines, one for each text, but it holds 4"),
    (b"", r"must hold 3 lines, one for each text, but it holds 0"),
    (b"0\n1\n2", r"must end with a newline, but it ends with '2'"),
    (b"0\n1\n4\n", r"line 3: .* from 0 to 3 and nothing else, but it is '4'"),
    (b"0\n-1\n2\n", r"line 2: .* but it is '-1'"),
    (b"0\njoy\n2\n", r"line 2: .* but it is 'joy'"),
    (b"0\n\n2\n", r"line 2: .* but it is ''"),
    (b"0\n1.0\n2\n", r"line 2: .* but it is '1\.0'"),
    (b"0\n 1\n2\n", r"line 2: .* but it is ' 1'"),
    (b"0\n01\n2\n", r"line 2: .* but it is '01'"),
    (b"0\r\n1\r\n2\r\n", r"line 1: .* but it is '0\\r'"),
    ("0\n٣\n2\n".encode(), r"line 2: .* but it is '٣'"),
    (b"0\n\xff\n2\n", r"line 2: "),
    (b"0\n1\tjoy\n2\n", r"line 2: .* but it is '1\\tjoy'"),
])
def test_a_file_that_does_not_fit_is_refused(tmp_path, content, message):
    path = tmp_path / "emotion.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_predictions(path, num_labels=4, length=3)
    assert str(path) in str(caught.value)


def test_an_empty_file_is_refused_whatever_the_length(tmp_path):
    (tmp_path / "x.txt").write_text("")
    with pytest.raises(ValueError, match="must hold at least one line, .* but it holds 0"):
        read_predictions(tmp_path / "x.txt", num_labels=4)
    with pytest.raises(FileNotFoundError):
        read_predictions(tmp_path / "y.txt", num_labels=4)


def test_an_error_quotes_a_little_and_not_a_whole_text(tmp_path):
    (tmp_path / "x.txt").write_text("somebody's words " * 20 + "\n")
    with pytest.raises(ValueError) as caught:
        read_predictions(tmp_path / "x.txt", num_labels=4)
    assert str(caught.value).count("somebody") <= 2
    (tmp_path / "x.txt").write_text("somebody's words " * 20)
    with pytest.raises(ValueError) as caught:
        read_predictions(tmp_path / "x.txt", num_labels=4)
    assert str(caught.value).count("somebody") <= 2


# -- intervals --------------------------------------------------------------
def test_bootstrap_scores_the_texts_it_draws():
    labels, chosen = invented(23, 4, 0.6, seed=0)
    drawn = bootstrap(labels, chosen, 4, resamples=7, seed=5)
    rows = torch.randint(23, (7, 23), generator=torch.Generator().manual_seed(5))
    expected = [score(labels[row], chosen[row], 4)["macro_f1"] for row in rows.numpy()]
    np.testing.assert_allclose(drawn, expected, rtol=0, atol=1e-12)


def test_bootstrap_follows_its_seed_and_leaves_the_global_one():
    labels, chosen = invented(50, 3, 0.7, seed=1)
    state = torch.get_rng_state()
    one, same = (bootstrap(labels, chosen, 3, resamples=20, seed=4) for _ in range(2))
    assert torch.equal(one, same)
    assert not torch.equal(one, bootstrap(labels, chosen, 3, resamples=20, seed=5))
    assert one.shape == (20,)
    assert bootstrap(labels, chosen, 3).shape == (1000,)
    assert torch.equal(torch.get_rng_state(), state)


def test_bootstrap_of_certain_answers_does_not_scatter():
    labels = [0, 1, 2] * 30
    assert bootstrap(labels, labels, 3, resamples=50).tolist() == [1.0] * 50
    assert bootstrap([0] * 9, [1] * 9, 2, resamples=50).tolist() == [0.0] * 50
    assert bootstrap([0], [0], 1, resamples=1).tolist() == [1.0]


def test_bootstrap_scatters_as_the_formula_says():
    """With one F1 that is all, the spread is that of a plain share."""
    labels = np.zeros(400, dtype=int)
    chosen = (np.arange(400) < 100).astype(int)  # 300 of 400 right
    drawn = bootstrap(labels, chosen, 2, resamples=4000) * 2  # the other F1 is 0
    share = drawn / (2 - drawn)  # F1 = 2s / (1 + s)
    assert share.mean().item() == pytest.approx(0.75, abs=0.003)
    assert share.std().item() == pytest.approx((0.75 * 0.25 / 400) ** 0.5, rel=0.06)


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    generator, held = np.random.default_rng(3), 0
    for _ in range(200):
        labels, chosen = invented(300, 4, 0.7, seed=int(generator.integers(1 << 30)))
        low, high = interval(bootstrap(labels, chosen, 4, resamples=200), 0.9)
        held += low <= 0.7 <= high  # symmetric classes: macro-F1 is the accuracy
    assert 165 <= held <= 194


def test_interval_cuts_both_ends():
    values = torch.arange(101).double()
    assert interval(values) == pytest.approx((2.5, 97.5))
    assert interval(values.tolist(), 0.5) == (25.0, 75.0)
    assert interval(np.array([4, 4])) == (4.0, 4.0)
    assert interval(values.flip(0), coverage=0.9) == pytest.approx((5.0, 95.0))
    assert all(type(end) is float for end in interval([1, 2]))


@pytest.mark.parametrize(("values", "coverage", "message"), [
    ([], 0.95, "at least one number, all finite, but of 0 values 0 are finite"),
    ([1.0, float("nan")], 0.95, "of 2 values 1 are finite"),
    ([1.0], 0, r"coverage must be in \(0, 1\), but it is 0"),
    ([1.0], 1.0, r"coverage must be in \(0, 1\), but it is 1.0"),
    ([1.0], 95, r"coverage must be in \(0, 1\), but it is 95"),
])
def test_no_interval_without_numbers_and_coverage(values, coverage, message):
    with pytest.raises(ValueError, match=message):
        interval(values, coverage)


def test_no_resamples_is_refused():
    with pytest.raises(ValueError, match="resamples must be at least 1, but it is 0"):
        bootstrap([0], [0], 2, resamples=0)


def test_paired_differences_are_those_on_the_same_texts():
    labels, first = invented(40, 3, 0.8, seed=2)
    second = invented(40, 3, 0.5, seed=3)[1] % 3
    drawn = paired_bootstrap(labels, first, second, 3, resamples=9, seed=6)
    rows = torch.randint(40, (9, 40), generator=torch.Generator().manual_seed(6)).numpy()
    for value, row in zip(drawn.tolist(), rows, strict=True):
        one, two = (score(labels[row], ids[row], 3)["macro_f1"] for ids in (first, second))
        assert value == pytest.approx(one - two, abs=1e-12)


def test_paired_differences_have_a_sign_and_equal_systems_none():
    labels, good = invented(600, 4, 0.8, seed=4)
    _, bad = invented(600, 4, 0.6, seed=4)
    assert interval(paired_bootstrap(labels, good, bad, 4))[0] > 0
    assert interval(paired_bootstrap(labels, bad, good, 4))[1] < 0
    assert paired_bootstrap(labels, good, good.copy(), 4, resamples=30).tolist() == [0.0] * 30


def test_pairing_pays_where_systems_are_alike():
    labels, first = invented(500, 4, 0.7, seed=5)
    second = first.copy()
    second[:15] = labels[:15]
    paired = paired_bootstrap(labels, first, second, 4).std()
    alone = bootstrap(labels, first, 4, seed=1) - bootstrap(labels, second, 4, seed=2)
    assert paired < 0.5 * alone.std()


def test_pairs_must_fit():
    with pytest.raises(ValueError, match="3 labels and 2 answers"):
        paired_bootstrap([0, 1, 1], [0, 1, 1], [0, 1], 2)


# -- noise ------------------------------------------------------------------
@pytest.mark.parametrize(("text", "expected"), [
    ("so happy #joy today", "so happy today"),
    ("#one #two3 left #über", "left"),
    ("C#sharp and &#39;quotes&#39;", "C#sharp and &#39;quotes&#39;"),
    ("no tag # here", "no tag # here"),
    ("end.#tag", "end."),
    ("", ""),
])
def test_hashtags_go(text, expected):
    assert remove_hashtags(text) == expected


@pytest.mark.parametrize(("text", "expected"), [
    ("great 😀 day 🎉🎉", "great day"),
    ("love ❤️you", "love you"),
    ("family 👨‍👩‍👧 wave 👋🏽 flag 🇫🇷", "family wave flag"),
    ("key 1️⃣ number 1 #1", "key number 1 #1"),
    ("sign ☺ and star ⭐ :) ©", "sign and star :) ©"),
    ("日本語 naïve – “quote”", "日本語 naïve – “quote”"),
])
def test_emoji_go_and_the_rest_stays(text, expected):
    assert remove_emoji(text) == expected


def test_typos_follow_the_generator_and_the_share():
    text = "@username several words become misspelt but not all of them 12345"
    assert add_typos(text, random.Random(1), 0.0) == text
    one, same = (add_typos(text, random.Random(2), 1.0) for _ in range(2))
    assert one == same != add_typos(text, random.Random(3), 1.0)
    pairs = list(zip(text.split(), one.split(), strict=True))
    for before, after in pairs:
        if len(before) < 4 or not before.isalpha():
            assert before == after
        else:
            assert abs(len(before) - len(after)) <= 1
            assert set(after) <= set(before)


def test_typos_depend_on_the_generator_alone():
    text = " ".join(["several", "words", "become", "misspelt"] * 10)
    random.seed(0)
    one = add_typos(text, random.Random(2), 0.5)
    state = random.getstate()
    assert add_typos(text, random.Random(2), 0.5) == one
    assert random.getstate() == state


def test_each_kind_of_typo_is_one_slip():
    seen = {add_typos("abcd", random.Random(seed), 1.0) for seed in range(300)}
    swaps = {"bacd", "acbd", "abdc"}
    losses = {"acd", "abd", "abc"}
    doubles = {"aabcd", "abbcd", "abccd"}
    # the letter at the chosen place or its right neighbour: one of these
    assert swaps <= seen
    assert doubles <= seen
    assert seen - swaps - doubles <= losses | {"bcd"}
    assert len(seen - swaps - doubles) == 3


def test_typos_hit_about_their_share():
    words = " ".join(f"word{'abcdefghij'[i % 10]}xyz" for i in range(2000))
    hit = sum(a != b for a, b in zip(
        words.split(), add_typos(words, random.Random(0), 0.3).split(), strict=True))
    assert abs(hit - 600) < 5 * (2000 * 0.3 * 0.7) ** 0.5


# -- calibration ------------------------------------------------------------
FOUR = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.6, 0.4]])


def test_calibration_error_by_hand():
    assert expected_calibration_error(FOUR, [0, 1, 0, 0]) == pytest.approx(0.4)
    assert expected_calibration_error(FOUR, [0, 0, 0, 0]) == pytest.approx(0.25)
    # one bin: too sure in one half, too modest in the other, and it cancels
    assert expected_calibration_error(FOUR, [0, 1, 0, 0], bins=1) == pytest.approx(0.0, abs=1e-7)
    sure = torch.eye(3)[[0, 1, 2, 2]]
    assert expected_calibration_error(sure, [0, 1, 2, 2]) == 0.0
    assert expected_calibration_error(sure, [1, 2, 0, 0]) == 1.0


def test_reliability_shows_the_bins():
    share, confidence, accuracy = reliability(FOUR, [0, 1, 0, 0], bins=5)
    assert share.tolist() == [0, 0, 0, 0.5, 0.5]  # 0.6 in float32 lies above 0.6
    assert confidence.tolist() == pytest.approx([0, 0, 0, 0.6, 0.9])
    assert accuracy.tolist() == [0, 0, 0, 1, 0.5]


def test_a_bin_holds_its_upper_edge():
    rows = torch.tensor([[0.5, 0.5], [0.75, 0.25], [1.0, 0.0]], dtype=torch.float64)
    share, confidence, _ = reliability(rows, [0, 0, 0], bins=4)
    assert share.tolist() == pytest.approx([0, 1 / 3, 1 / 3, 1 / 3])
    assert confidence.tolist() == [0, 0.5, 0.75, 1]


def test_a_sum_a_hair_above_one_stays_in_the_last_bin():
    rows = torch.tensor([[1.0000002, 0.0]])
    assert rows[0, 0] > 1
    assert expected_calibration_error(rows, [0]) == pytest.approx(0, abs=1e-6)


@given(st.integers(1, 60), st.integers(2, 6), st.integers(1, 20), st.integers(0, 999))
@settings(deadline=None)
def test_calibration_error_equals_a_loop(texts, num_labels, bins, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(texts, num_labels, generator=generator).double().softmax(-1)
    labels = torch.randint(num_labels, (texts,), generator=generator)
    sure, chosen = rows.max(-1)
    total = 0.0
    for b in range(bins):
        inside = [i for i in range(texts) if b / bins < sure[i] <= (b + 1) / bins]
        if inside:
            gap = sum(sure[i].item() - float(chosen[i] == labels[i]) for i in inside)
            total += abs(gap) / texts
    assert expected_calibration_error(rows, labels, bins=bins) == pytest.approx(total, abs=1e-9)


@pytest.mark.parametrize(("rows", "labels", "bins", "message"), [
    (torch.tensor([[2.0, -1.0]]), [0], 10, "at least 0 .* but the smallest is -1"),
    (torch.tensor([[0.5, 0.5], [0.5, 0.1]]), [0, 0], 10, "the sums go from 0.6 to 1"),
    (torch.tensor([[float("nan"), 0.5]]), [0], 10, "the sums go from nan to nan"),
    (torch.tensor([0.5, 0.5]), [0], 10, r"but their shape is \(2,\)"),
    (torch.zeros(0, 4), [], 10, r"at least one text, but their shape is \(0, 4\)"),
    (FOUR, [0, 1], 10, "2 labels and 4 answers"),
    (FOUR, [0, 1, 2, 0], 10, "labels must be from 0 to 1, but one is 2"),
    (FOUR, [0, 1, 0, 0], 0, "bins must be at least 1, but it is 0"),
])
def test_no_calibration_error_without_probabilities(rows, labels, bins, message):
    with pytest.raises(ValueError, match=message):
        expected_calibration_error(rows, labels, bins=bins)


def drawn_from(logits, seed):
    """Labels that follow the probabilities that the logits say."""
    generator = torch.Generator().manual_seed(seed)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


@pytest.mark.parametrize("factor", [0.2, 1.0, 4.0])
@pytest.mark.parametrize("num_labels", [2, 5])
def test_temperature_is_recovered(factor, num_labels):
    logits = torch.randn(20_000, num_labels, generator=torch.Generator().manual_seed(1))
    labels = drawn_from(logits, 2)
    assert fit_temperature(factor * logits, labels) == pytest.approx(factor, rel=0.04)


@given(st.integers(0, 999))
@settings(deadline=None, max_examples=20)
def test_temperature_is_the_best_of_many(seed):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(60, 4, generator=generator, dtype=torch.float64)
    labels = torch.randint(4, (60,), generator=generator)
    labels[:30] = logits[:30].argmax(-1)
    found = fit_temperature(logits, labels)

    def loss(t):
        return torch.nn.functional.cross_entropy(logits / t, labels).item()

    assert all(loss(found) <= loss(t) + 1e-9 for t in np.geomspace(0.05, 50, 200))


def test_at_the_temperature_belief_equals_truth():
    """The slope is zero there, to the precision of float64, whatever comes in."""
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(300, 3, generator=generator).mul(3).requires_grad_()
    labels = drawn_from(logits.detach() / 2, 6)
    exact = logits.detach().double()
    believed = (exact / fit_temperature(logits, labels)).softmax(-1)
    gap = (believed * exact).sum(-1) - exact.gather(1, labels[:, None])[:, 0]
    assert abs(gap.mean().item()) < 1e-12


def test_temperature_changes_no_answer_and_takes_log_probabilities():
    logits = torch.randn(500, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    labels = drawn_from(logits, 4)
    shifted = fit_temperature((3 * logits).log_softmax(-1), labels)
    assert shifted == pytest.approx(fit_temperature(3 * logits, labels))
    assert torch.equal((3 * logits / shifted).argmax(-1), logits.argmax(-1))
    before, after = (
        expected_calibration_error((3 * logits / t).softmax(-1), labels) for t in (1, shifted)
    )
    assert after < 0.5 * before


def test_temperature_stays_in_its_range():
    logits = torch.tensor([[5.0, 0.0], [0.0, 5.0]])
    assert fit_temperature(logits, [0, 1]) == pytest.approx(0.01)  # always right
    assert fit_temperature(logits, [1, 0]) == pytest.approx(100)  # always wrong


@pytest.mark.parametrize(("logits", "labels", "message"), [
    (torch.tensor([[0.0, float("-inf")]]), [0], r"finite, but their shape is \(1, 2\) and 1 are"),
    (torch.zeros(2), [0, 1], r"must be \(texts, num_labels\) and finite"),
    (torch.zeros(3, 2), [0, 1], "2 labels and 3 answers"),
    (torch.zeros(2, 2), [0, 2], "labels must be from 0 to 1, but one is 2"),
])
def test_no_temperature_without_logits(logits, labels, message):
    with pytest.raises(ValueError, match=message):
        fit_temperature(logits, labels)


def test_the_code_has_no_bare_assert_and_stays_small():
    lines = Path(evaluation.__file__).read_text("utf-8").splitlines()
    assert not any(line.strip().startswith("assert ") for line in lines)
    assert len(lines) < 500
