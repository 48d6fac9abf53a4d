"""Holes, labels, mixture, the run and its files: what pretraining must do."""

import dataclasses
import json
import math
import os
import warnings

import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from emoformer import data, pretraining
from emoformer.classifier import EmoformerConfig, TransformerForSequenceClassification
from emoformer.data import SPLITS, comparison_key, held_out_keys, load_sample
from emoformer.pretraining import (
    MaskedLanguageHead,
    PretrainingConfig,
    PretrainingModel,
    corrupt,
    label_table,
    load_half,
    load_mixture,
    masked_language_loss,
    pretrain,
    save_half,
    sliced_cross_entropy,
    training_flops,
)
from emoformer.tokens import (
    CLS_ID,
    MASK_ID,
    PAD_ID,
    SEP_ID,
    UNK_ID,
    encode,
    make_batch,
    train_tokenizer,
)

REAL = os.environ.get("EMOFORMER_DATA")
FILES = ("config.json", "model.safetensors", "tokenizer.json")


def dice(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(load_sample()["train"]["text"], vocab_size=300)


@pytest.fixture(scope="module")
def pieces():
    """Sixty posts with six labels, twenty with four, twenty without."""
    six, four = load_sample(), load_sample(data.EMOTIONS[:4])
    return {
        "six": six["train"].select(range(60)),
        "four": four["validation"].select(range(20)),
        "unlabelled": six["test"].select(range(20)).select_columns("text"),
    }


def make_model(num_labels=10, **changes):
    torch.manual_seed(1)
    return PretrainingModel(EmoformerConfig(**{
        "vocab_size": 300, "d_model": 16, "num_heads": 2, "num_layers": 1, "d_ff": 24,
        "max_len": 32, "num_labels": num_labels, "dropout": 0.1,
    } | changes))


def same_weights(one, two):
    pairs = zip(one.state_dict().items(), two.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


# -- spoiling ---------------------------------------------------------------
def within(count, n, p):
    """A count of n draws with chance p lies within five standard deviations."""
    return abs(count - n * p) <= 5 * math.sqrt(n * p * (1 - p)) + 1e-9


def long_batch(vocab_size=50):
    ids = torch.randint(5, vocab_size, (300, 101), generator=dice(1))
    ids[:, 0], ids[:, 50], ids[:, 51] = CLS_ID, UNK_ID, MASK_ID
    ids[:, -2], ids[:, -1] = SEP_ID, PAD_ID
    return ids


@pytest.mark.parametrize("share", [0.15, 0.5, 1.0])
def test_masking_rates_lie_within_their_bounds(share):
    ids = long_batch()
    spoilt, chosen = corrupt(ids, vocab_size=50, share=share, generator=dice())
    n, ordinary = int(chosen.sum()), int((ids >= 5).sum())
    assert within(n, ordinary, share)
    masked = chosen & (spoilt == MASK_ID)
    same = chosen & (spoilt == ids)
    assert within(int(masked.sum()), n, 0.8)
    assert within(int(same.sum()), n, 0.1 + 0.1 / 45)  # 1 of 45 is drawn as it was
    assert within(int((chosen & ~masked & ~same).sum()), n, 0.1 * 44 / 45)


def test_special_tokens_are_neither_chosen_nor_drawn():
    ids = long_batch()
    spoilt, chosen = corrupt(ids, vocab_size=50, share=1.0, generator=dice())
    assert torch.equal(chosen, ids >= 5)
    assert torch.equal(spoilt[ids < 5], ids[ids < 5])
    drawn = spoilt[chosen & (spoilt != MASK_ID) & (spoilt != ids)]
    assert drawn.min() == 5  # the whole range, both ends
    assert drawn.max() == 49


def test_corrupt_leaves_its_input_and_what_was_not_chosen():
    ids = long_batch()
    before = ids.clone()
    spoilt, chosen = corrupt(ids, vocab_size=50, share=0.3, generator=dice())
    assert torch.equal(ids, before)
    assert spoilt.data_ptr() != ids.data_ptr()
    assert torch.equal(spoilt[~chosen], ids[~chosen])
    assert (spoilt.dtype, chosen.dtype) == (torch.int64, torch.bool)


def test_corrupt_follows_its_generator_alone():
    ids = long_batch()
    first = corrupt(ids, vocab_size=50, share=0.3, generator=dice(7))
    torch.rand(3)
    again = corrupt(ids, vocab_size=50, share=0.3, generator=dice(7))
    other = corrupt(ids, vocab_size=50, share=0.3, generator=dice(8))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[1], other[1])


@pytest.mark.parametrize(("options", "message"), [
    ({"share": 1.5}, r"share must be in \[0, 1\], but it is 1.5"),
    ({"share": -0.1}, r"share must be in \[0, 1\], but it is -0.1"),
    ({"vocab_size": 5}, "vocab_size must be above 5, .* but it is 5"),
])
def test_corrupt_quotes_rule_and_value(options, message):
    with pytest.raises(ValueError, match=message):
        corrupt(long_batch(), **{"vocab_size": 50, "share": 0.1, "generator": dice()} | options)


# -- the head and its loss --------------------------------------------------
def test_head_is_tied_and_leaves_the_table_as_drawn():
    table = nn.Parameter(torch.randn(11, 6))
    before = table.detach().clone()
    head = MaskedLanguageHead(table)
    assert head.decoder.weight is table
    assert torch.equal(table, before)
    assert sum(p.numel() for p in head.parameters()) == 11 * 6 + 11 + 6 * 6 + 6 + 2 * 6
    assert (head.decoder.bias == 0).all()


def test_head_equals_its_formula():
    torch.manual_seed(0)
    table = nn.Parameter(torch.randn(11, 6))
    head = MaskedLanguageHead(table)
    nn.init.normal_(head.decoder.bias)
    nn.init.normal_(head.norm.weight)
    hidden = torch.randn(2, 3, 6)
    turned = functional.gelu(functional.linear(hidden, head.dense.weight, head.dense.bias))
    turned = functional.layer_norm(turned, (6,), head.norm.weight, head.norm.bias, 1e-12)
    torch.testing.assert_close(head(hidden), turned @ table.T + head.decoder.bias)


def test_every_word_learns_from_each_hole():
    model = make_model().eval()
    ids = torch.tensor([[CLS_ID, 9, MASK_ID, SEP_ID]])
    _, logits = model(ids, None, ids == MASK_ID)
    masked_language_loss(logits, torch.tensor([[CLS_ID, 9, 8, SEP_ID]]), ids == MASK_ID).backward()
    table = model.classifier.embedding.token.weight
    assert (table.grad.abs().sum(dim=1) > 0).all()


def test_loss_does_not_look_at_labels_that_were_not_chosen():
    ids = torch.randint(5, 50, (7, 9), generator=dice())
    chosen = torch.rand(7, 9, generator=dice(1)) < 0.3
    logits = torch.randn(int(chosen.sum()), 50, generator=dice(2))
    loss = masked_language_loss(logits, ids, chosen)
    other = torch.where(chosen, ids, (ids + 1) % 50)
    assert masked_language_loss(logits, other, chosen) == loss
    assert masked_language_loss(logits, (ids + 1) % 50, chosen) != loss


def test_loss_equals_torch_with_unchosen_places_ignored():
    ids = torch.randint(5, 50, (7, 9), generator=dice())
    chosen = torch.rand(7, 9, generator=dice(1)) < 0.3
    everywhere = torch.randn(7, 9, 50, generator=dice(2), requires_grad=True)
    ours = masked_language_loss(everywhere[chosen], ids, chosen)
    labels = ids.masked_fill(~chosen, -100)
    theirs = functional.cross_entropy(everywhere.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(ours, theirs)
    (one,) = torch.autograd.grad(ours, everywhere)
    (two,) = torch.autograd.grad(theirs, everywhere)
    torch.testing.assert_close(one, two)


def test_loss_without_a_hole_is_zero_and_can_go_back():
    logits = torch.zeros(0, 50, requires_grad=True)
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    loss = masked_language_loss(logits, torch.full((2, 3), 6), nothing)
    loss.backward()
    assert loss == 0


def test_loss_refuses_too_few_logits():
    chosen = torch.tensor([[True, True, False]])
    with pytest.raises(ValueError, match="there are 1 rows of logits and 2 positions"):
        masked_language_loss(torch.zeros(1, 50), torch.full((1, 3), 6), chosen)


def test_model_scores_chosen_places_in_reading_order_and_labels_as_the_classifier():
    model = make_model().eval()
    rows = [[CLS_ID, 9, 8, 7, SEP_ID], [CLS_ID, 11, SEP_ID]]
    batch = make_batch(rows, vocab_size=300)
    chosen = torch.tensor([[False, True, False, True, False], [False, True, False, False, False]])
    labels, words = model(**batch, chosen=chosen)
    torch.testing.assert_close(labels, model.classifier(**batch))
    hidden = model.classifier.encode(**batch)
    expected = [model.masked_head(hidden[b, t]) for b, t in ((0, 1), (0, 3), (1, 1))]
    torch.testing.assert_close(words, torch.stack(expected))
    assert model(**batch)[1].shape == (10, 300)  # None: all positions


@pytest.mark.parametrize("how", ["mean", "max", "cls"])
def test_model_pools_as_its_config_says(how):
    model = make_model(pooling=how).eval()
    batch = make_batch([[CLS_ID, 9, 8, SEP_ID], [CLS_ID, SEP_ID]], vocab_size=300)
    torch.testing.assert_close(model(**batch)[0], model.classifier(**batch))


# -- labels of several pieces -----------------------------------------------
@given(st.integers(0, 10_000))
@settings(deadline=None, max_examples=40)
def test_sliced_cross_entropy_equals_a_loop(seed):
    generator = dice(seed)
    ends = [0, 2, 5, 6]  # three pieces with 2, 3 and 1 labels
    logits = 5 * torch.randn(8, 6, generator=generator)
    piece = torch.randint(-1, 3, (8,), generator=generator)
    labels, allowed, by_loop = torch.full((8,), -1), torch.zeros(8, 6, dtype=torch.bool), 0.0
    for i, k in enumerate(piece.tolist()):
        if k < 0:
            continue
        first, end = ends[k], ends[k + 1]
        label = int(torch.randint(first, end, (), generator=generator))
        labels[i], allowed[i, first:end] = label, True
        own = logits[i, first:end]
        by_loop += (own.exp().sum().log() - logits[i, label]).item()
    loss = sliced_cross_entropy(logits, labels, allowed)
    assert loss.item() == pytest.approx(by_loop / 8, rel=1e-4, abs=1e-5)


def test_a_sliced_head_equals_separate_heads_with_gradient():
    torch.manual_seed(0)
    pooled = torch.randn(5, 4)
    heads = [nn.Linear(4, 2), nn.Linear(4, 3)]
    where = [(0, 1), (1, 2), (None, None), (1, 0), (0, 0)]
    loop = sum(
        functional.cross_entropy(heads[k](pooled[i]), torch.tensor(label))
        for i, (k, label) in enumerate(where) if k is not None
    ) / 5
    loop.backward()
    one = nn.Linear(4, 5)
    with torch.no_grad():
        one.weight.copy_(torch.cat([head.weight for head in heads]))
        one.bias.copy_(torch.cat([head.bias for head in heads]))
    labels = torch.tensor([-1 if k is None else (0, 2)[k] + label for k, label in where])
    allowed = torch.tensor([[k == 0] * 2 + [k == 1] * 3 for k, _ in where])
    loss = sliced_cross_entropy(one(pooled), labels, allowed)
    loss.backward()
    torch.testing.assert_close(loss, loop)
    torch.testing.assert_close(one.weight.grad, torch.cat([head.weight.grad for head in heads]))
    torch.testing.assert_close(one.bias.grad, torch.cat([head.bias.grad for head in heads]))


def test_no_labels_no_loss_but_a_graph():
    logits = torch.randn(3, 4, requires_grad=True)
    allowed = torch.zeros(3, 4, dtype=torch.bool)
    loss = sliced_cross_entropy(logits, torch.full((3,), -1), allowed)
    loss.backward()
    assert loss == 0
    assert (logits.grad == 0).all()


def test_label_table_numbers_the_outputs_piece_by_piece(pieces):
    names, slices = label_table(pieces)
    assert slices == {"six": range(0, 6), "four": range(6, 10)}
    assert names[0] == "six/anger"
    assert names[6:] == ["four/anger", "four/joy", "four/optimism", "four/sadness"]
    assert label_table({"unlabelled": pieces["unlabelled"]}) == ([], {})


def test_each_label_and_piece_reaches_its_own_outputs(pieces):
    texts, labels, piece, allowed = pretraining._spread_out(pieces)
    assert texts == [text for dataset in pieces.values() for text in dataset["text"]]
    assert labels.tolist() == [
        *pieces["six"]["label"], *(6 + label for label in pieces["four"]["label"]), *[-1] * 20
    ]
    assert allowed[piece].float().sum(dim=1).tolist() == [6.0] * 60 + [4.0] * 20 + [0.0] * 20
    labelled = labels >= 0
    assert allowed[piece][labelled].gather(1, labels[labelled, None]).all()


# -- what may be trained on -------------------------------------------------
def toy(rows, names):
    features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
    return Dataset.from_dict(
        {"text": [text for text, _ in rows], "label": [label for _, label in rows]}, features
    )


@pytest.fixture
def invented(monkeypatch):
    """Every task invented: each repeats all held-out texts, in a disguise."""
    held = {
        "emotion": {"validation": "Where is my bicycle?", "test": "rain, again &amp; again"},
        "six": {"validation": "the old dog", "test": "Steps behind me!"},
    }
    disguised = [
        "where IS my bicycle", "Rain again &amp; again!!", "the OLD dog", "steps behind me",
    ]
    absent = {}

    def task(name, names):
        def split_of(split):
            if error := absent.get(f"{name}/{split}"):
                raise error
            rows = [(f"{name} {split} {i}", i % len(names)) for i in range(3)]
            rows += [(text, 0) for text in disguised]
            if text := held.get(name, {}).get(split):
                rows.append((text, 0))
            return toy(rows, names)
        return split_of

    def load_tweet_eval(name="emotion", splits=SPLITS):
        names = list(data.EMOTIONS[:4]) if name == "emotion" else ["no", "yes"]
        return DatasetDict({split: task(name, names)(split) for split in splits})

    def whole(name, names):
        return lambda: DatasetDict({split: task(name, names)(split) for split in SPLITS})

    for module in (data, pretraining):
        monkeypatch.setattr(module, "load_tweet_eval", load_tweet_eval)
    monkeypatch.setattr(data, "load_six_emotions", whole("six", list(data.EMOTIONS)))
    monkeypatch.setattr(pretraining, "load_go_emotions", whole("go_emotions", list("abc")))
    return absent


def test_mixture_holds_no_held_out_text(invented):
    keys, (mixture, missing) = held_out_keys(), load_mixture()
    assert missing == []
    assert list(mixture) == [
        "go_emotions", "emoji", "sentiment", "hate", "irony", "offensive", "unlabelled",
    ]
    for name, dataset in mixture.items():
        assert not keys & set(map(comparison_key, dataset["text"])), name
    for name in list(mixture)[:-1]:  # and nothing else was taken out
        assert list(mixture[name]["text"]) == [
            f"{name} {split} {i}" for split in SPLITS for i in range(3)
        ]
    assert list(mixture["unlabelled"]["text"]) == [f"emotion train {i}" for i in range(3)]
    assert mixture["unlabelled"].column_names == ["text"]
    assert mixture["hate"]["label"][:3] == [0, 1, 0]


def test_missing_splits_are_named_and_the_others_kept(invented):
    invented["sentiment/train"] = FileNotFoundError("no such file")
    for split in SPLITS:
        invented[f"irony/{split}"] = ConnectionError("no network")
    mixture, missing = load_mixture()
    assert missing == ["sentiment/train"] + [f"irony/{split}" for split in SPLITS]
    assert "irony" not in mixture
    assert len(mixture["sentiment"]) == 6


def test_a_malformed_file_is_not_passed_over(invented):
    invented["hate/test"] = ValueError("line 3")
    with pytest.raises(ValueError, match="line 3"):
        load_mixture()


def test_without_real_data_the_sample_stands_in(monkeypatch):
    monkeypatch.delenv("EMOFORMER_DATA", raising=False)

    def nowhere(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr(data, "_from_hub", nowhere)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mixture, missing = load_mixture()
    assert list(mixture) == ["sample"]
    assert list(mixture["sample"]["text"]) == list(load_sample()["train"]["text"])
    assert len(missing) == 18


@pytest.mark.skipif(not REAL, reason="set EMOFORMER_DATA to the folder with the real posts")
def test_real_mixture_holds_no_held_out_text():
    mixture, missing = load_mixture()
    keys = held_out_keys()
    assert len(keys) > 3000
    sizes = {name: len(dataset) for name, dataset in mixture.items()}
    assert sizes["go_emotions"] > 40_000
    assert sizes["emoji"] > 90_000
    assert sizes["unlabelled"] == 3255
    for name, dataset in mixture.items():
        assert not keys & set(map(comparison_key, dataset["text"])), name
    assert all(name.split("/")[0] in ("sentiment", *mixture) for name in missing)
    names, _ = label_table(mixture)
    assert len(names) == len(set(names)) == 57


# -- the run ----------------------------------------------------------------
@pytest.mark.parametrize(("change", "message"), [
    ({"epochs": 0}, "epochs must be at least 1, but it is 0"),
    ({"steps": 0}, "steps must be None or at least 1, but it is 0"),
    ({"batch_size": 0}, "batch_size must be at least 1"),
    ({"learning_rate": 0.0}, "learning_rate must be above 0"),
    ({"warmup": 1.1}, r"warmup must be in \[0, 1\], but it is 1.1"),
    ({"weight_decay": -1.0}, "weight_decay must be at least 0"),
    ({"clip": 0.0}, "clip must be above 0"),
    ({"share": 1.0}, r"share must be in \[0, 1\), but it is 1.0"),
    ({"words": -1.0}, "words must be at least 0"),
    ({"labels": -0.5}, "labels must be at least 0, but it is -0.5"),
    ({"bpe_dropout": 1.0}, r"bpe_dropout must be in \[0, 1\)"),
    ({"precision": "fp8"}, "precision must be auto, bf16 or no, but it is 'fp8'"),
])
def test_config_quotes_rule_and_value(change, message):
    with pytest.raises(ValueError, match=message):
        PretrainingConfig(**change)


def test_it_starts_at_ln_of_what_it_chooses_among(tmp_path, tokenizer, pieces):
    config = PretrainingConfig(steps=1, batch_size=100)
    history = pretrain(make_model(dropout=0.0), tokenizer, pieces, config, tmp_path)
    assert len(history) == 1
    assert history[0]["words"] == pytest.approx(math.log(300), abs=0.1)
    expected = 0.6 * math.log(6) + 0.2 * math.log(4)
    assert history[0]["labels"] == pytest.approx(expected, abs=0.05)


def test_one_batch_can_be_memorised(tmp_path, tokenizer, pieces):
    few = {"six": pieces["six"].select(range(4))}
    config = PretrainingConfig(epochs=150, batch_size=4, learning_rate=1e-2, bpe_dropout=0.0)
    model = make_model(6, d_model=64, d_ff=128, dropout=0.0, norm_first=True)
    history = pretrain(model, tokenizer, few, config, tmp_path, report=15)
    assert history[0]["words"] > 3
    assert history[-1]["words"] < 1
    assert history[-1]["labels"] < 0.05


def test_history_counts_steps_and_real_tokens(tmp_path, tokenizer, pieces):
    config = PretrainingConfig(epochs=2, batch_size=16, bpe_dropout=0.0)  # 7 steps an epoch
    history = pretrain(make_model(), tokenizer, pieces, config, tmp_path, report=4)
    assert [row["step"] for row in history] == [4, 8, 12, 14]
    texts = [text for dataset in pieces.values() for text in dataset["text"]]
    lengths = map(len, encode(tokenizer, texts, max_len=32))
    assert history[-1]["tokens"] == 2 * sum(lengths)
    assert all(math.isfinite(row["words"] + row["labels"]) for row in history)
    again = pretrain(make_model(), tokenizer, pieces, config, tmp_path, report=4)
    assert again == history  # finished: nothing is done twice


class _PowerCutError(Exception):
    pass


@pytest.mark.parametrize("at", [3, 8, 12])  # in the first epoch, after it, in the second
def test_a_killed_run_ends_as_if_never_killed(monkeypatch, tmp_path, tokenizer, pieces, at):
    config = PretrainingConfig(epochs=2, batch_size=16)
    unbroken = make_model()
    whole = pretrain(unbroken, tokenizer, pieces, config, tmp_path / "whole", report=2)

    calls, real_loss = [], masked_language_loss

    def cut(*arguments):
        calls.append(1)
        if len(calls) == at:
            raise _PowerCutError
        return real_loss(*arguments)

    monkeypatch.setattr(pretraining, "masked_language_loss", cut)
    with pytest.raises(_PowerCutError):
        pretrain(make_model(), tokenizer, pieces, config, tmp_path / "cut", report=2)
    resumed = make_model()
    history = pretrain(resumed, tokenizer, pieces, config, tmp_path / "cut", report=2)
    assert len(calls) < at + 14  # it went on, it did not begin again
    assert history == whole
    assert same_weights(resumed, unbroken)


def test_the_seed_decides(tmp_path, tokenizer, pieces):
    def ends(seed, folder):
        model = make_model()
        config = PretrainingConfig(seed=seed, steps=3, batch_size=16)
        pretrain(model, tokenizer, pieces, config, tmp_path / folder)
        return model

    first, again, other = ends(0, "a"), ends(0, "b"), ends(1, "c")
    assert same_weights(first, again)
    assert not same_weights(first, other)


def test_each_pass_and_each_step_has_other_holes(monkeypatch, tmp_path, tokenizer, pieces):
    alike = {"six": Dataset.from_dict({"text": ["not sad, just happy today"] * 40})}
    seen, real = [], corrupt

    def watched(ids, **options):
        spoilt, chosen = real(ids, **options)
        seen.append(chosen)
        return spoilt, chosen

    monkeypatch.setattr(pretraining, "corrupt", watched)
    config = PretrainingConfig(epochs=2, batch_size=20, bpe_dropout=0.0)
    pretrain(make_model(1), tokenizer, alike, config, tmp_path)
    assert len(seen) == 4
    assert all(not torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])


@pytest.mark.parametrize("bpe_dropout", [0.0, 0.3])
def test_each_pass_is_shuffled_and_cut_anew(
    monkeypatch, tmp_path, tokenizer, pieces, bpe_dropout
):
    cuts, orders, real = [], [], pretraining.bucket_by_length

    class Watched(pretraining.WordCutter):
        def __call__(self, seed):
            cuts.append(super().__call__(seed))
            return cuts[-1]

    def watched(lengths, **options):
        orders.append(real(lengths, **options))
        return orders[-1]

    monkeypatch.setattr(pretraining, "WordCutter", Watched)
    monkeypatch.setattr(pretraining, "bucket_by_length", watched)
    config = PretrainingConfig(epochs=2, batch_size=50, bpe_dropout=bpe_dropout)
    pretrain(make_model(), tokenizer, pieces, config, tmp_path)
    assert len(cuts) == len(orders) == 2
    assert orders[0] != orders[1]
    assert (cuts[0] != cuts[1]) == (bpe_dropout > 0)


def test_a_weight_of_zero_teaches_nothing(tmp_path, tokenizer, pieces):
    words_only, labels_only = make_model(), make_model()
    config = {"steps": 3, "batch_size": 16}
    pretrain(words_only, tokenizer, pieces, PretrainingConfig(labels=0.0, **config), tmp_path / "w")
    pretrain(labels_only, tokenizer, pieces, PretrainingConfig(words=0.0, **config), tmp_path / "l")
    assert (words_only.classifier.head.bias == 0).all()
    assert (words_only.masked_head.decoder.bias != 0).any()
    assert (labels_only.masked_head.decoder.bias == 0).all()
    assert (labels_only.classifier.head.bias != 0).any()


@pytest.mark.parametrize(("precision", "dtype"), [
    ("no", torch.float32), ("bf16", torch.bfloat16),
])
def test_precisions_run_and_weights_stay_float32(
    monkeypatch, tmp_path, tokenizer, pieces, precision, dtype
):
    seen, real = [], masked_language_loss

    def watched(logits, *rest):
        seen.append(logits.dtype)
        return real(logits, *rest)

    monkeypatch.setattr(pretraining, "masked_language_loss", watched)
    model = make_model()
    config = PretrainingConfig(steps=2, batch_size=16, precision=precision)
    history = pretrain(model, tokenizer, pieces, config, tmp_path)
    assert seen == [dtype] * 2
    assert math.isfinite(history[-1]["words"])
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_steps_end_a_run_in_the_middle_of_an_epoch(monkeypatch, tmp_path, tokenizer, pieces):
    asked = []

    def nothing(step, **options):
        asked.append((step, options))
        return 0.0

    monkeypatch.setattr(pretraining, "learning_rate_factor", nothing)
    model = make_model()
    config = PretrainingConfig(steps=5, batch_size=16, warmup=0.4)  # 7 steps an epoch
    history = pretrain(model, tokenizer, pieces, config, tmp_path, report=2)
    assert [row["step"] for row in history] == [2, 4, 5]
    assert asked == [(step, {"warmup": 2, "total": 5}) for step in range(5)]
    assert same_weights(model, make_model())  # a rate of 0: nothing moved


def test_three_steps_equal_the_same_steps_by_hand(tmp_path, tokenizer, pieces):
    config = PretrainingConfig(
        steps=3, batch_size=16, clip=0.05, words=0.7, labels=1.3, weight_decay=0.1,
        precision="no",
    )
    model, own = make_model(), make_model()
    (report,) = pretrain(model, tokenizer, pieces, config, tmp_path)

    texts, labels, piece, allowed = pretraining._spread_out(pieces)
    rows = pretraining.WordCutter(tokenizer, texts, dropout=0.1, max_len=32, ways=6)(0)
    batches = pretraining.bucket_by_length([len(row) for row in rows], batch_size=16, seed=0)
    optimizer = torch.optim.AdamW([
        {"params": [p for p in own.parameters() if p.ndim == k], "weight_decay": decay}
        for k, decay in ((2, 0.1), (1, 0.0))
    ], fused=True)
    losses = []
    for step in range(3):
        batch = make_batch([rows[i] for i in batches[step]], vocab_size=300)
        torch.manual_seed(step)  # for dropout
        spoilt, chosen = corrupt(
            batch["input_ids"], vocab_size=300, share=0.15, generator=dice(step)
        )
        own.train()
        label_logits, word_logits = own(spoilt, batch["attention_mask"], chosen)
        of_words = functional.cross_entropy(word_logits, batch["input_ids"][chosen])
        of_labels = sum(
            functional.cross_entropy(
                label_logits[i].masked_fill(~allowed[piece[j]], -math.inf), labels[j]
            )
            for i, j in enumerate(batches[step]) if labels[j] >= 0
        ) / len(batches[step])
        own.zero_grad()
        (0.7 * of_words + 1.3 * of_labels).backward()
        length = nn.utils.clip_grad_norm_(own.parameters(), 0.05)
        assert length > 0.05  # or clipping would not be tested
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (3 - step) / 3
        optimizer.step()
        losses.append((of_words.item(), of_labels.item()))
    assert report["words"] == pytest.approx(sum(w for w, _ in losses) / 3, abs=1e-5)
    assert report["labels"] == pytest.approx(sum(x for _, x in losses) / 3, abs=1e-5)
    for (name, ours), theirs in zip(
        model.state_dict().items(), own.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5, msg=name)


def test_other_settings_and_other_labels_are_refused(tmp_path, tokenizer, pieces):
    pretrain(make_model(), tokenizer, pieces, PretrainingConfig(steps=1), tmp_path)
    with pytest.raises(ValueError, match="own settings only"):
        pretrain(make_model(), tokenizer, pieces, PretrainingConfig(steps=2), tmp_path)
    with pytest.raises(ValueError, match=r"all labels of the mixture, 10, but it is 6"):
        pretrain(make_model(6), tokenizer, pieces, PretrainingConfig(steps=1), tmp_path / "new")


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, tokenizer, pieces):
    model = make_model()
    with torch.no_grad():
        model.masked_head.decoder.bias.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="at step 0 it is nan: lower the learning rate"):
        pretrain(model, tokenizer, pieces, PretrainingConfig(steps=1), tmp_path)
    assert not (tmp_path / "pretraining_state.pt").exists()


# -- counting ---------------------------------------------------------------
@pytest.mark.parametrize("changes", [
    {}, {"num_layers": 3, "norm_first": True}, {"d_model": 8, "num_heads": 4, "num_labels": 1},
])
def test_flops_are_those_that_torch_counts(changes):
    model = make_model(**{"num_labels": 7} | changes)
    ids = torch.randint(5, 300, (6, 12), generator=dice())
    chosen = torch.zeros(6, 12, dtype=torch.bool)
    chosen[:, ::4] = True  # 3 of 12
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        labels, words = model(ids, None, chosen)
        (labels.square().sum() + words.square().sum()).backward()
    counted = training_flops(model.config, 72, seq_len=12, chosen_share=3 / 12)
    assert counted == counter.get_total_flops()


def test_flops_by_hand():
    config = EmoformerConfig(vocab_size=50, d_model=4, num_heads=2, num_layers=2, d_ff=8)
    layer = 2 * (4 * 16 + 2 * 32) + 2 * 2 * 3 * 4
    assert training_flops(config, 30, seq_len=3) == 3 * 30 * (2 * layer + 2 * 4 * 6 / 3)
    guess = 2 * (16 + 4 * 50) * 0.15
    more = training_flops(config, 30, seq_len=3, chosen_share=0.15)
    assert more - training_flops(config, 30, seq_len=3) == pytest.approx(3 * 30 * guess)


# -- files ------------------------------------------------------------------
@pytest.fixture
def saved(tmp_path, tokenizer):
    """A saved model, and the model."""
    model = make_model(6)
    save_half(tmp_path / "model", model, tokenizer, list("abcdef"))
    return tmp_path / "model", model


def test_round_trip(saved, tokenizer):
    folder, model = saved
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    loaded, same, names = load_half(folder, PretrainingModel)
    assert names == list("abcdef")
    assert loaded.config == model.config
    assert not loaded.training
    assert loaded.masked_head.decoder.weight is loaded.classifier.embedding.token.weight
    text = ["not sad, just happy"]
    assert encode(same, text) == encode(tokenizer, text)
    for name, value in model.state_dict().items():
        assert loaded.state_dict()[name].dtype == torch.float32
        assert torch.equal(loaded.state_dict()[name], value.half().float()), name
    save_half(folder / "again", loaded, same, names)  # half of half is the same half
    for name in FILES:
        assert (folder / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_half_precision_changes_no_answer(saved):
    folder, model = saved
    loaded, _, _ = load_half(folder, PretrainingModel)
    batch = make_batch([[CLS_ID, *range(9, 30), SEP_ID]], vocab_size=300)
    for ours, theirs in zip(model.eval()(**batch), loaded(**batch), strict=True):
        torch.testing.assert_close(ours.softmax(-1), theirs.softmax(-1), rtol=0.01, atol=1e-4)
    size = sum(p.numel() for p in model.parameters())
    assert (folder / "model.safetensors").stat().st_size < 2 * size + 5000


def test_a_classifier_alone_can_be_saved_and_its_layers_replaced(tmp_path, tokenizer):
    model = make_model(6).classifier
    save_half(tmp_path, model, tokenizer, list("abcdef"))

    class Norm(pretraining.LayerNorm):
        pass

    loaded, _, _ = load_half(tmp_path, norm=Norm)
    assert type(loaded) is TransformerForSequenceClassification
    assert isinstance(loaded.embedding_norm, Norm)
    assert torch.equal(loaded.head.weight, model.head.weight.half().float())


def test_the_wrong_class_is_refused_both_ways(tmp_path, saved, tokenizer):
    folder, model = saved
    with pytest.raises(ValueError, match=r"must be those of a TransformerForSequenceClass"):
        load_half(folder)
    save_half(tmp_path / "classifier", model.classifier, tokenizer, list("abcdef"))
    with pytest.raises(ValueError, match=r"must be those of a PretrainingModel"):
        load_half(tmp_path / "classifier", PretrainingModel)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kept", [0, 1, 0.5, 0.99])
def test_a_truncated_file_is_refused(saved, name, kept):
    folder, _ = saved
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: kept if isinstance(kept, int) else int(kept * len(whole))])
    message = "must be what save_half wrote" if name == "config.json" else "must have the SHA-256"
    with pytest.raises(ValueError, match=rf"{name} {message}"):
        load_half(folder, PretrainingModel)


@pytest.mark.parametrize("name", FILES[1:])
@pytest.mark.parametrize("place", [0, 0.5, -1])
def test_one_changed_bit_is_refused(saved, name, place):
    folder, _ = saved
    whole = bytearray((folder / name).read_bytes())
    whole[int(place * len(whole)) if place == 0.5 else place] ^= 1
    (folder / name).write_bytes(bytes(whole))
    with pytest.raises(ValueError, match=rf"{name} must have the SHA-256 .* copy the folder again"):
        load_half(folder, PretrainingModel)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(saved, name):
    folder, _ = saved
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{name} is missing"):
        load_half(folder, PretrainingModel)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.config.json is missing"):
        load_half(tmp_path / "nowhere")


@pytest.mark.parametrize(("change", "message"), [
    (lambda d: d["model"].update(d_model=32), "must be those of a PretrainingModel"),
    (lambda d: d["model"].update(vocab_size=301), "must be those of a PretrainingModel"),
    (lambda d: d["model"].update(num_layers=2), "must be those of a PretrainingModel"),
    (lambda d: d["model"].update(num_heads=3), "num_heads must be a divisor"),
    (lambda d: d["model"].update(colour="red"), "must be what save_half wrote.*colour"),
    (lambda d: d.pop("model"), "must be what save_half wrote"),
    (lambda d: d.pop("sha256"), "must be what save_half wrote"),
    (lambda d: d.update(sha256=3), "must be what save_half wrote"),
    (lambda d: d.update(sha256={}), "must have the SHA-256 that config.json names, None"),
    (lambda d: d["label_names"].pop(), "5 label names and 6 outputs"),
])
def test_a_config_that_does_not_fit_is_refused(saved, change, message):
    folder, _ = saved
    described = json.loads((folder / "config.json").read_text())
    change(described)
    (folder / "config.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match=message):
        load_half(folder, PretrainingModel)


def test_config_json_describes_the_model(saved):
    folder, model = saved
    described = json.loads((folder / "config.json").read_text())
    assert described["model"] == dataclasses.asdict(model.config)
    assert set(described["sha256"]) == set(FILES[1:])


def test_what_cannot_be_saved_is_refused(tmp_path, tokenizer):
    model = make_model(6)
    with pytest.raises(ValueError, match="must be 6 label names, .* but there are 2"):
        save_half(tmp_path / "new", model, tokenizer, ["a", "b"])
    with torch.no_grad():
        model.classifier.head.bias[2] = 1e5  # finite, but not in 16 bits
    with pytest.raises(ValueError, match=r"weights must be finite, but classifier.head.bias"):
        save_half(tmp_path / "new", model, tokenizer, list("abcdef"))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("writes", [1, 2])
def test_a_save_that_was_cut_short_is_never_loaded(monkeypatch, saved, tokenizer, writes):
    """New weights beside an old config.json: the fingerprints do not fit."""
    folder, model = saved
    real, calls = pretraining.save_atomically, []

    def cut(value, path):
        if len(calls) == writes:
            raise OSError("disk full")
        calls.append(path)
        real(value, path)

    monkeypatch.setattr(pretraining, "save_atomically", cut)
    with torch.no_grad():
        model.classifier.head.bias += 1
    with pytest.raises(OSError, match="disk full"):
        save_half(folder, model, tokenizer, list("abcdef"))
    with pytest.raises(ValueError, match="must have the SHA-256"):
        load_half(folder, PretrainingModel)
    with pytest.raises(OSError, match="disk full"):
        save_half(folder / "new", model, tokenizer, list("abcdef"))
    with pytest.raises(FileNotFoundError):
        load_half(folder / "new", PretrainingModel)
