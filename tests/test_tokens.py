"""Merges against a trainer of our own, and the promises of each function."""

import json
import random
import subprocess
import sys
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from torch import nn

from emoformer.data import load_sample
from emoformer.tokens import (
    CLS_ID,
    MASK_ID,
    PAD_ID,
    SEP_ID,
    SPECIAL_TOKENS,
    UNK_ID,
    bucket_by_length,
    encode,
    make_batch,
    make_normalizer,
    make_pre_tokenizer,
    train_tokenizer,
)

POSTS = list(load_sample()["train"]["text"])
TOKENIZER = train_tokenizer(POSTS)
SENTENCE = "not sad, just happy"


def split_words(text):
    normal = make_normalizer().normalize_str(text)
    return [word for word, _ in make_pre_tokenizer().pre_tokenize_str(normal)]


def tokens(text, tokenizer=TOKENIZER):
    return [tokenizer.id_to_token(i) for i in encode(tokenizer, [text])[0]]


def merges(tokenizer):
    pairs = json.loads(tokenizer.to_str())["model"]["merges"]
    return [tuple(pair) for pair in pairs]


# Special tokens and the travelling sentence


def test_special_tokens_have_their_ids():
    assert (PAD_ID, UNK_ID, CLS_ID, SEP_ID, MASK_ID) == (0, 1, 2, 3, 4)
    assert [TOKENIZER.token_to_id(token) for token in SPECIAL_TOKENS] == list(range(5))


def test_travelling_sentence_and_its_twin():
    here = tokens(SENTENCE)
    assert here == ["[CLS]", "not", "sad", ",", "just", "happy", "[SEP]"]
    assert sorted(here) == sorted(tokens("not happy, just sad")) != here


# The normaliser and the words


@pytest.mark.parametrize(("before", "after"), [
    ("a\\nb", "a b"),
    ("&lt;3 &gt; &quot;x&quot; &#39;y&#039; z&apos;s", "<3 > \"x\" 'y' z's"),
    ("fish &amp; chips", "fish & chips"),
    ("&amp;lt;", "&lt;"),  # one layer, not two
    ("don´t don’t don‘t don`t", "don't don't don't don't"),
    ("“so”", '"so"'),
    ("𝓱𝓪𝓹𝓹𝔂 ｓａｄ wait…", "happy sad wait..."),
    ("❤\ufe0f ❤\ufe0e", "❤ ❤"),
    ("👩🏽\u200d🚒", "👩🏽🚒"),
    ("un\u200bse\u00aden\ufeff", "unseen"),
    ("\U0001f3f4\U000e0067\U000e0062\U000e007f", "\U0001f3f4"),  # a flag's tags
    ("RELAX", "relax"),
    ("HTTPS://x.org/A?b=c, www.x.org httpx http", "http http httpx http"),
    ("@User @Ann_B9! me@mail.org @", "@user @user! me@mail.org @"),
    ("so soo sooo soooo SOOOOOOO", "so soo sooo sooo sooo"),
    ("!!!!!! 😂😂😂😂 10000", "!!! 😂😂😂 10000"),
])
def test_normaliser(before, after):
    assert make_normalizer().normalize_str(before) == after


@pytest.mark.parametrize(("text", "words"), [
    ("#happy", ["#", "happy"]),
    ("#small_wins", ["#", "small", "_", "wins"]),
    ("@user's", ["@user", "'", "s"]),
    ("can't 'quoted' 7:42pm", ["can't", "'", "quoted", "'", "7", ":", "42", "pm"]),
    ("naïve cafe\u0301", ["naïve", "café"]),
    ("👍🏽!!", ["👍", "🏽", "!", "!"]),
    (" \t\n\x00 ", []),
])
def test_words(text, words):
    assert split_words(text) == words


def test_a_hashtag_shares_its_word():
    assert tokens("#happy") == ["[CLS]", "#", "happy", "[SEP]"]


# Training


def test_merges_equal_a_trainer_of_our_own():
    """Count, take the best pair, glue, again; ties to the lower numbers."""
    counts = Counter(word for post in POSTS[:60] for word in split_words(post))
    words = {(w[0], *("##" + c for c in w[1:])): n for w, n in counts.items()}
    tokenizer = train_tokenizer(POSTS[:60], min_frequency=1)
    expected = []
    for _ in range(60):
        pairs = Counter()
        for pieces, n in words.items():
            for pair in zip(pieces, pieces[1:], strict=False):
                pairs[pair] += n
        best = min(pairs, key=lambda p: (-pairs[p], *map(tokenizer.token_to_id, p)))
        expected.append(best)
        glued = {}
        for pieces, n in words.items():
            out, i = [], 0
            while i < len(pieces):
                if pieces[i : i + 2] == best:
                    out.append(best[0] + best[1][2:])
                    i += 2
                else:
                    out.append(pieces[i])
                    i += 1
            glued[tuple(out)] = n
        words = glued
    assert merges(tokenizer)[:60] == expected


def test_training_is_the_same_in_a_fresh_process():
    code = (
        "import json, sys\n"
        "from emoformer.tokens import train_tokenizer\n"
        "print(train_tokenizer(json.load(sys.stdin)).to_str(), end='')"
    )
    fresh = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(POSTS), check=True,
        capture_output=True, text=True, encoding="utf-8",
    ).stdout
    assert json.loads(fresh) == json.loads(TOKENIZER.to_str())
    assert train_tokenizer(POSTS).to_str() == TOKENIZER.to_str()


def test_a_smaller_vocabulary_is_the_start_of_a_larger():
    small = train_tokenizer(POSTS, vocab_size=400)
    assert small.get_vocab_size() == 400
    for i in range(400):
        assert small.id_to_token(i) == TOKENIZER.id_to_token(i)
    assert merges(small) == merges(TOKENIZER)[: len(merges(small))]


def test_a_generator_trains_like_a_list():
    assert train_tokenizer(iter(POSTS)).to_str() == TOKENIZER.to_str()


def test_ids_are_dense_and_pieces_fit_together():
    vocab = TOKENIZER.get_vocab()
    assert sorted(vocab.values()) == list(range(len(vocab)))
    assert all(len(a) and b.startswith("##") for a, b in merges(TOKENIZER))


def test_only_five_tokens_are_special():
    added = json.loads(TOKENIZER.to_str())["added_tokens"]
    assert [token["content"] for token in added] == list(SPECIAL_TOKENS)
    # were ##s still special, the text "##s" would become that piece
    assert "##s" not in tokens("a ##s")


def test_rare_characters_are_unknown_in_training_itself():
    texts = ["so sad", "so glad", "so 🦑"]
    tokenizer = train_tokenizer(texts)
    assert encode(tokenizer, texts)[2].count(UNK_ID) == 1
    everything = train_tokenizer(texts, min_frequency=1)
    assert UNK_ID not in sum(encode(everything, texts), [])


def test_a_known_letter_is_known_everywhere():
    tokenizer = train_tokenizer(["zest zeal 7", "jam ham 7"] * 2)
    assert UNK_ID not in encode(tokenizer, ["jazz 77"])[0]


@pytest.mark.parametrize(("texts", "options", "error", "message"), [
    ("sad", {}, TypeError, "list of strings.*'sad'"),
    (["sad", 7], {}, TypeError, "holds 7"),
    ([], {}, ValueError, "at least one text"),
    (["ab ab"], {"vocab_size": 8}, ValueError, "at least 9 .* is 8"),
])
def test_training_errors_quote_rule_and_value(texts, options, error, message):
    with pytest.raises(error, match=message):
        train_tokenizer(texts, **options)


def test_the_smallest_vocabulary_has_no_merges():
    tokenizer = train_tokenizer(["ab ab"], vocab_size=9)
    assert tokens("ab", tokenizer) == ["[CLS]", "a", "##b", "[SEP]"]


# Encoding

texts_with_traps = st.lists(
    st.one_of(
        st.text(max_size=12),
        st.sampled_from([*SPECIAL_TOKENS, "##s", "@user", "&lt;3", "sooooo", " "]),
    ),
    max_size=8,
).map("".join)


@given(texts_with_traps, st.integers(3, 20))
@settings(deadline=None, max_examples=150)
def test_any_text_gives_a_lawful_row(text, max_len):
    row = encode(TOKENIZER, [text], max_len=max_len)[0]
    assert 2 <= len(row) <= max_len
    assert row[0] == CLS_ID
    assert row[-1] == SEP_ID
    assert not {PAD_ID, CLS_ID, SEP_ID, MASK_ID} & set(row[1:-1])
    assert max(row) < TOKENIZER.get_vocab_size()
    full = encode(TOKENIZER, [text], max_len=1000)[0]
    assert row[:-1] == full[:-1][: max_len - 1]


@given(st.sampled_from(POSTS))
@settings(deadline=None)
def test_pieces_put_together_are_the_words(post):
    known = set(TOKENIZER.get_vocab())
    words = [word for word in split_words(post) if set(word) <= known]
    glued = []
    for token in tokens(" ".join(words))[1:-1]:
        if token.startswith("##"):
            glued[-1] += token[2:]
        else:
            glued.append(token)
    assert glued == words


@pytest.mark.parametrize(("text", "inside"), [
    ("", []),
    (" \t\n", []),
    ("\u200b\ufe0f", []),
    ("日本 日", ["[UNK]", "[UNK]"]),  # one a word
    ("🦑🦑", ["[UNK]", "[UNK]"]),  # one a sign
    ("q日q", ["q", "[UNK]", "##q"]),
])
def test_odd_texts(text, inside):
    assert tokens(text) == ["[CLS]", *inside, "[SEP]"]


@pytest.mark.parametrize("text", ["so happy " * 1112, "sohappy" * 1429, "x" * 10_000])
def test_ten_thousand_characters(text):
    row = encode(TOKENIZER, [text])[0]
    assert len(text) >= 10_000
    assert len(row) <= 128
    assert row[-1] == SEP_ID


def test_text_that_fits_exactly_keeps_its_last_token():
    assert encode(TOKENIZER, [SENTENCE], max_len=7) == encode(TOKENIZER, [SENTENCE])
    shorter = encode(TOKENIZER, [SENTENCE], max_len=6)[0]
    assert shorter == [*encode(TOKENIZER, [SENTENCE])[0][:5], SEP_ID]


def test_order_is_kept_and_any_iterable_will_do():
    rows = encode(TOKENIZER, POSTS)
    assert rows == [encode(TOKENIZER, [post])[0] for post in POSTS]
    assert encode(TOKENIZER, load_sample()["train"]["text"]) == rows
    assert encode(TOKENIZER, []) == []


def test_saved_and_loaded_it_encodes_the_same(tmp_path):
    path = str(tmp_path / "tokenizer.json")
    TOKENIZER.save(path)
    loaded = Tokenizer.from_file(path)
    texts = [*load_sample()["test"]["text"], "@Ann SOOOO &lt;3", "", "[MASK] [PAD]"]
    assert encode(loaded, texts) == encode(TOKENIZER, texts)
    assert loaded.to_str() == TOKENIZER.to_str()


@pytest.mark.parametrize("name", SPECIAL_TOKENS)
def test_a_special_token_that_somebody_typed_is_only_text(name):
    fresh = Tokenizer.from_str(TOKENIZER.to_str())  # as from a file
    row = encode(fresh, [f"a {name} b"])[0]
    assert not {PAD_ID, CLS_ID, SEP_ID, MASK_ID} & set(row[1:-1])
    assert len(row) > 5  # more than [CLS] a [MASK] b [SEP]


def test_decoding_gives_the_normalised_text_back():
    assert TOKENIZER.decode(encode(TOKENIZER, ["NOT sad, just HAPPY"])[0]) == SENTENCE


@pytest.mark.parametrize(("texts", "max_len", "error", "message"), [
    ("sad", 9, TypeError, "list of strings.*'sad'"),
    (["sad", None], 9, TypeError, "holds None"),
    (["cut \ud83d"], 9, ValueError, r"half a character: '\\ud83d'"),
    (["sad"], 2, ValueError, "at least 3.*is 2"),
])
def test_encoding_errors_quote_rule_and_value(texts, max_len, error, message):
    with pytest.raises(error, match=message):
        encode(TOKENIZER, texts, max_len=max_len)


# Batches

ROWS = st.lists(
    st.lists(st.integers(0, 12), min_size=1, max_size=9), min_size=1, max_size=7
)


@given(ROWS)
@settings(deadline=None)
def test_batch_equals_torch_padding(rows):
    before = [list(row) for row in rows]
    batch = make_batch(rows, vocab_size=13)
    padded = nn.utils.rnn.pad_sequence(
        [torch.tensor(row) for row in rows], batch_first=True, padding_value=PAD_ID
    )
    assert torch.equal(batch["input_ids"], padded)
    assert batch["attention_mask"].dtype == torch.bool
    for row, ids, mask in zip(rows, *batch.values(), strict=True):
        assert ids[mask].tolist() == row
        assert mask.tolist() == sorted(mask.tolist(), reverse=True)
    assert rows == before


def test_batch_with_labels():
    batch = make_batch([[2, 3], (2, 9, 3)], vocab_size=10, labels=(3, 0), num_labels=4)
    assert batch["input_ids"].tolist() == [[2, 3, 0], [2, 9, 3]]
    assert batch["labels"].tolist() == [3, 0]
    assert [t.dtype for t in batch.values()] == [torch.int64, torch.bool, torch.int64]
    assert "labels" not in make_batch([[2, 3]], vocab_size=10)


def test_a_real_token_may_have_the_id_of_padding():
    batch = make_batch([[2, PAD_ID, 3], [2]], vocab_size=5)
    assert batch["attention_mask"].sum().item() == 4


@pytest.mark.parametrize(("rows", "options", "error", "message"), [
    ([], {}, ValueError, r"at least one row.*\[\]"),
    ([[2, 3], []], {}, ValueError, r"at least one token.*\[2, 0\]"),
    ([[2, 13]], {}, ValueError, "0 … 12, but these lie in 2 … 13"),
    ([[2], [-1, 5]], {}, ValueError, "0 … 12, but these lie in -1 … 5"),
    ([[2.0, 3.0]], {}, TypeError, "ids must be ints.*float"),
    ([[2]], {"labels": [4]}, ValueError, "0 … 3, but these lie in 4 … 4"),
    ([[2], [2]], {"labels": [1, -100]}, ValueError, "0 … 3.*-100 … 1"),
    ([[2]], {"labels": [1, 2]}, ValueError, "2 labels, 1 rows"),
    ([[2]], {"labels": [1], "num_labels": None}, ValueError, "num_labels=None"),
    ([[2]], {"labels": [0.5]}, TypeError, "labels must be ints.*float"),
])
def test_batch_errors_quote_rule_and_values(rows, options, error, message):
    with pytest.raises(error, match=message):
        make_batch(rows, **{"vocab_size": 13, "num_labels": 4, **options})


# Buckets

LENGTHS = st.lists(st.integers(1, 60), max_size=200)


def positions(batches, lengths):
    return sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)


@given(LENGTHS, st.integers(1, 9), st.one_of(st.none(), st.integers(0, 99)))
@settings(deadline=None)
def test_each_text_stands_in_exactly_one_batch(lengths, batch_size, seed):
    batches = bucket_by_length(lengths, batch_size=batch_size, seed=seed)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    sizes = [len(batch) for batch in batches]
    assert len(sizes) == -(-len(lengths) // batch_size)
    assert all(size == batch_size for size in sorted(sizes)[1:])
    assert batches == bucket_by_length(lengths, batch_size=batch_size, seed=seed)


@given(st.lists(st.integers(1, 60), min_size=4, max_size=40), st.randoms())
@settings(deadline=None)
def test_sorted_batches_are_never_wider_than_shuffled_ones(lengths, chance):
    lengths = lengths[: len(lengths) // 4 * 4]
    order = list(range(len(lengths)))
    chance.shuffle(order)
    shuffled = [order[i : i + 4] for i in range(0, len(order), 4)]
    ours = bucket_by_length(lengths, batch_size=4)
    assert positions(ours, lengths) <= positions(shuffled, lengths)


def test_buckets_save_padding_and_still_mix():
    chance = random.Random(1)
    lengths = [chance.randint(5, 60) for _ in range(2000)]
    one = bucket_by_length(lengths, batch_size=8, seed=1)
    two = bucket_by_length(lengths, batch_size=8, seed=2)
    wasted = positions(one, lengths) - sum(lengths)
    in_order = [list(range(i, i + 8)) for i in range(0, 2000, 8)]
    assert wasted < 0.25 * (positions(in_order, lengths) - sum(lengths))
    company = {frozenset(batch) for batch in one}
    assert len(company & {frozenset(batch) for batch in two}) < 5
    # no ramp from short to long: the first half is about as long as the second
    longest = [max(lengths[i] for i in batch) for batch in one]
    first, second = sum(longest[:125]) / 125, sum(longest[125:]) / 125
    assert abs(first - second) < 8
    assert sum(b > a for a, b in zip(longest, longest[1:], strict=False)) < 175


def test_pools_hold_sixteen_batches():
    lengths = list(range(1, 65))  # two pools of 16 batches of 2
    batches = bucket_by_length(lengths, batch_size=2, seed=3)
    order = list(range(64))
    random.Random(3).shuffle(order)
    for pool in (order[:32], order[32:]):
        expected = sorted(pool, key=lengths.__getitem__)
        for i in range(0, 32, 2):
            assert expected[i : i + 2] in batches


def test_without_a_seed_short_texts_come_first():
    batches = bucket_by_length([5, 1, 4, 2, 3], batch_size=2)
    assert batches == [[1, 3], [4, 2], [0]]


def test_the_global_dice_are_not_touched():
    random.seed(7)
    before = random.getstate(), torch.get_rng_state()
    bucket_by_length(list(range(1, 50)), batch_size=4, seed=0)
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


def test_batch_size_error_quotes_rule_and_value():
    with pytest.raises(ValueError, match="at least 1, but it is 0"):
        bucket_by_length([1, 2], batch_size=0)
