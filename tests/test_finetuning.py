"""A new head, a pace for each depth, few labels, and a model to give away."""

import copy
from collections import Counter
from dataclasses import replace

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from emoformer import finetuning
from emoformer.classifier import EmoformerConfig, TransformerForSequenceClassification
from emoformer.data import load_sample
from emoformer.finetuning import (
    FINETUNING,
    finetune,
    finetuning_groups,
    save_finetuned,
    take_few,
    with_new_head,
)
from emoformer.pretraining import PretrainingModel, load_half
from emoformer.tokens import encode, make_batch, train_tokenizer
from emoformer.training import TrainingConfig, evaluate, predict

SHAPE = {"d_model": 12, "num_heads": 3, "d_ff": 20, "max_len": 24, "num_labels": 7}
CARD = {"Data": "ours", "Numbers": "none", "Limits": "many", "Intended use": "tests"}


@pytest.fixture(scope="module")
def few():
    """Forty-eight training posts of the sample."""
    sample = load_sample()
    sample["train"] = sample["train"].select(range(48))
    sample["validation"] = sample["validation"].select(range(36))
    return sample


@pytest.fixture(scope="module")
def tokenizer(few):
    return train_tokenizer(few["train"]["text"], vocab_size=200)


def make_pretrained(vocab_size=200, **changes):
    torch.manual_seed(5)
    config = EmoformerConfig(vocab_size=vocab_size, **{**SHAPE, **changes})
    model = PretrainingModel(config).eval()
    nn.init.normal_(model.classifier.head.bias)  # as after training, not zeros
    return model


@pytest.fixture
def pretrained(tokenizer):
    return make_pretrained(tokenizer.get_vocab_size())


def weights_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed(before, model):
    """Names of the weights that are no longer what they were."""
    return {n for n, w in model.state_dict().items() if not torch.equal(w, before[n])}


# -- a new head -------------------------------------------------------------
def test_only_the_head_is_new_and_the_original_stays(pretrained):
    before = weights_of(pretrained)
    model = with_new_head(pretrained, 3, dropout=0.3)
    old = weights_of(pretrained.classifier)
    assert model.head.weight.shape == (3, 12)
    assert model.head.bias.shape == (3,)
    assert set(old) == set(model.state_dict())
    for name, weight in model.state_dict().items():
        if not name.startswith("head."):
            assert torch.equal(weight, old[name]), name
    assert (model.config.num_labels, model.config.dropout) == (3, 0.3)
    assert replace(model.config, num_labels=7, dropout=0.1) == pretrained.config
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert changed(before, pretrained) == set()
    assert pretrained.config.num_labels == 7


def test_the_head_is_fresh_even_where_the_old_one_would_fit(pretrained):
    torch.manual_seed(1)
    first = with_new_head(pretrained, 7)
    torch.manual_seed(1)
    again = with_new_head(pretrained, 7)
    torch.manual_seed(2)
    other = with_new_head(pretrained, 7)
    assert torch.equal(first.head.weight, again.head.weight)
    assert not torch.equal(first.head.weight, other.head.weight)
    assert not torch.equal(first.head.weight, pretrained.classifier.head.weight)
    assert not first.head.bias.any()


def test_the_body_says_what_it_said(pretrained, tokenizer):
    batch = make_batch(
        encode(tokenizer, ["not sad, just happy", "", "so so"]),
        vocab_size=tokenizer.get_vocab_size(),
    )
    model = with_new_head(pretrained, 4).eval()
    with torch.no_grad():
        assert torch.equal(model.encode(**batch), pretrained.classifier.encode(**batch))


def test_dropout_reaches_every_layer(pretrained):
    model = with_new_head(pretrained, 4, dropout=0.45)
    rates = {m.p for m in model.modules() if isinstance(m, nn.Dropout)}
    assert rates == {0.45}


def test_sublayer_classes_are_passed_on():
    class Norm(nn.LayerNorm):
        pass

    torch.manual_seed(0)
    shape = EmoformerConfig(vocab_size=50, **SHAPE)
    model = with_new_head(PretrainingModel(shape, norm=Norm), 4, norm=Norm)
    assert isinstance(model.embedding_norm, Norm)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_labels": 0}, "num_labels must be a whole number of at least 1, but it is 0"),
        ({"num_labels": 4, "dropout": 1.0}, r"dropout must be in \[0, 1\), but it is 1.0"),
    ],
)
def test_a_head_that_makes_no_sense_is_refused(pretrained, arguments, message):
    with pytest.raises(ValueError, match=message):
        with_new_head(pretrained, **arguments)


# -- a pace for each depth --------------------------------------------------
def depth_by_hand(name, layers):
    """Written out for the shapes below, not computed as the module does."""
    for layer in range(layers):
        if f"layers.{layer}." in name:
            return layer + 1
    return {"head": layers + 1, "encoder": layers}.get(name.split(".")[0], 0)


@pytest.mark.parametrize("changes", [
    {}, {"num_layers": 1}, {"num_layers": 11, "norm_first": True},
    {"num_segments": 2, "positions": "sinusoidal"},
])
@pytest.mark.parametrize("layer_decay", [0.5, 1.0])
def test_groups_hold_every_parameter_once_at_its_pace(changes, layer_decay):
    model = make_pretrained(**changes).classifier
    layers = model.config.num_layers
    groups = finetuning_groups(
        model, weight_decay=0.3, head_scale=7.0, layer_decay=layer_decay
    )
    found = [(id(p), g["scale"], g["weight_decay"]) for g in groups for p in g["params"]]
    expected = []
    for name, parameter in model.named_parameters():
        depth = depth_by_hand(name, layers)
        pace = 7.0 if depth == layers + 1 else layer_decay ** (layers - depth)
        vector = name.endswith("bias") or "norm" in name
        expected.append((id(parameter), pytest.approx(pace), 0.0 if vector else 0.3))
    assert sorted(row[0] for row in found) == sorted(row[0] for row in expected)
    assert dict((row[0], row[1:]) for row in found) == dict(
        (row[0], row[1:]) for row in expected
    )
    assert len({(g["scale"], g["weight_decay"]) for g in groups}) == len(groups)


def test_defaults_are_one_pace_for_all():
    model = make_pretrained().classifier
    groups = finetuning_groups(model)
    assert {g["scale"] for g in groups} == {1.0}
    assert {g["weight_decay"] for g in groups} == {0.01, 0.0}
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))


@pytest.mark.parametrize("norm_first", [False, True])
def test_freezing_goes_from_the_bottom_and_can_be_undone(norm_first):
    model = make_pretrained(num_layers=3, norm_first=norm_first).classifier
    everything = {name for name, _ in model.named_parameters()}
    for frozen in (*range(5), 0):
        groups = finetuning_groups(model, frozen=frozen)
        names = {id(p): name for name, p in model.named_parameters()}
        listed = {names[id(p)] for g in groups for p in g["params"]}
        assert listed == {n for n in everything if depth_by_hand(n, 3) >= frozen}
        assert listed == {n for n, p in model.named_parameters() if p.requires_grad}
    assert listed == everything  # the last round took the freezing back


def test_with_all_frozen_the_head_still_learns():
    groups = finetuning_groups(make_pretrained(num_layers=2).classifier, frozen=3)
    assert sorted(p.shape for g in groups for p in g["params"]) == [(7,), (7, 12)]


def test_a_step_is_as_long_as_its_pace():
    model = make_pretrained(num_layers=2, dropout=0.0).classifier
    groups = finetuning_groups(model, weight_decay=0.0, head_scale=3.0, layer_decay=0.5)
    optimizer = torch.optim.SGD([g | {"lr": 0.01 * g["scale"]} for g in groups])
    before = weights_of(model)
    ids = torch.randint(5, 200, (4, 9), generator=torch.Generator().manual_seed(0))
    model(ids).square().sum().backward()
    optimizer.step()
    for name, p in model.named_parameters():
        pace = {0: 0.25, 1: 0.5, 2: 1.0, 3: 3.0}[depth_by_hand(name, 2)]
        torch.testing.assert_close(before[name] - 0.01 * pace * p.grad, p.detach())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight_decay": -0.1}, "weight_decay must be at least 0, but it is -0.1"),
        ({"head_scale": 0.0}, "head_scale must be above 0, but it is 0.0"),
        ({"layer_decay": 0.0}, r"layer_decay must be in \(0, 1\], but it is 0.0"),
        ({"layer_decay": 1.1}, r"layer_decay must be in \(0, 1\], but it is 1.1"),
        ({"frozen": -1}, "frozen must be in 0 … 3, but it is -1"),
        ({"frozen": 4}, "frozen must be in 0 … 3, but it is 4"),
    ],
)
def test_groups_quote_rule_and_value_and_change_nothing(arguments, message):
    model = make_pretrained(num_layers=2).classifier
    with pytest.raises(ValueError, match=message):
        finetuning_groups(model, **{"frozen": 2, **arguments})
    assert all(p.requires_grad for p in model.parameters())


# -- the recipe -------------------------------------------------------------
def test_frozen_parts_do_not_move_and_the_rest_does(pretrained, tokenizer, few, tmp_path):
    before = weights_of(pretrained)
    start = weights_of(pretrained.classifier)
    config = replace(FINETUNING, epochs=1, hide=0.0, bpe_dropout=0.0)
    model, history = finetune(
        pretrained, tokenizer, few, config, tmp_path, frozen=2, layer_decay=0.5
    )
    assert changed(before, pretrained) == set()
    assert all(p.requires_grad for p in pretrained.parameters())
    body = {n for n in model.state_dict() if not n.startswith("head.")}
    moved = {n for n in body if not torch.equal(model.state_dict()[n], start[n])}
    assert moved == {n for n in body if "layers.1." in n}
    assert len(history) == 1


def test_it_learns_and_returns_the_best_epoch(pretrained, tokenizer, few, tmp_path):
    config = replace(FINETUNING, epochs=12, learning_rate=3e-3, hide=0.0, bpe_dropout=0.0)
    model, history = finetune(
        pretrained, tokenizer, few, config, tmp_path, dropout=0.0
    )
    assert model.config.num_labels == 6
    assert history[-1]["train_loss"] < 0.8 * history[0]["train_loss"]
    best = max(row["macro_f1"] for row in history)
    assert evaluate(model, tokenizer, few["validation"])["macro_f1"] == pytest.approx(best)


def test_the_seed_decides_everything(pretrained, tokenizer, few, tmp_path):
    def run(seed, folder):
        torch.rand(3)  # whatever was drawn before does not matter
        config = replace(FINETUNING, epochs=1, seed=seed)
        return finetune(pretrained, tokenizer, few, config, tmp_path / folder)[0].state_dict()

    one, same = run(1, "a"), run(1, "b")
    assert all(torch.equal(one[name], same[name]) for name in one)


def test_the_head_is_drawn_from_the_seed(pretrained, tokenizer, few, tmp_path, monkeypatch):
    monkeypatch.setattr(finetuning, "train", lambda *_, **__: [])

    def head(seed):
        torch.rand(3)
        config = replace(FINETUNING, seed=seed)
        return finetune(pretrained, tokenizer, few, config, tmp_path)[0].head.weight

    assert torch.equal(head(1), head(1))
    assert not torch.equal(head(1), head(2))


def test_every_argument_reaches_the_run(pretrained, tokenizer, few, tmp_path, monkeypatch):
    seen = {}

    def train(model, *arguments, groups, tracker):
        seen.update(model=model, arguments=arguments, groups=groups, tracker=tracker)
        return ["history"]

    class Norm(nn.LayerNorm):
        pass

    monkeypatch.setattr(finetuning, "train", train)
    config = TrainingConfig(weight_decay=0.2)
    model, history = finetune(
        pretrained, tokenizer, few, config, tmp_path, dropout=0.4, head_scale=9.0,
        layer_decay=0.5, frozen=1, tracker="tensorboard", norm=Norm,
    )
    assert history == ["history"]
    assert seen["model"] is model
    assert seen["arguments"] == (tokenizer, few, config, tmp_path)
    assert {g["scale"] for g in seen["groups"]} == {9.0, 1.0, 0.5}
    assert {g["weight_decay"] for g in seen["groups"]} == {0.2, 0.0}
    assert seen["tracker"] == "tensorboard"
    assert model.config.dropout == 0.4
    assert isinstance(model.embedding_norm, Norm)


# -- few labels -------------------------------------------------------------
@pytest.mark.parametrize("other", [
    {"head_scale": 2.0}, {"layer_decay": 0.5}, {"frozen": 1},
])
def test_a_run_at_another_pace_is_not_taken_up(pretrained, tokenizer, few, tmp_path, other):
    config = TrainingConfig(epochs=1, precision="no")
    _, history = finetune(pretrained, tokenizer, few, config, tmp_path)
    assert finetune(pretrained, tokenizer, few, config, tmp_path)[1] == history
    with pytest.raises(ValueError, match="with its own settings only"):
        finetune(pretrained, tokenizer, few, config, tmp_path, **other)


def dataset_of(labels, classes):
    return Dataset.from_dict(
        {"text": [f"post {i}" for i in range(len(labels))], "label": labels},
        features=Features({
            "text": Value("string"), "label": ClassLabel(names=list("abcdefg")[:classes]),
        }),
    )


@given(
    rest=st.lists(st.integers(0, 3), max_size=30),
    seed=st.integers(0, 2**32), data=st.data(),
)
@settings(deadline=None, max_examples=40)
def test_few_are_nested_distinct_and_of_each_class(rest, seed, data):
    dataset = dataset_of([0, 1, 2, 3, *rest][::-1], 4)
    count = data.draw(st.integers(4, len(dataset)))
    more = data.draw(st.integers(count, len(dataset)))
    small, large = take_few(dataset, count, seed), take_few(dataset, more, seed)
    texts = list(small["text"])
    assert len(texts) == len(set(texts)) == count
    assert set(texts) <= set(large["text"])
    assert set(small["label"]) == {0, 1, 2, 3}
    assert list(take_few(dataset, count, seed)["text"]) == texts
    known = dict(zip(dataset["text"], dataset["label"], strict=True))
    assert [known[text] for text in texts] == list(small["label"])
    assert small.features == dataset.features


def test_few_are_drawn_from_everywhere():
    dataset = dataset_of([0] * 60 + [1] * 40, 2)
    drawn = Counter()
    for seed in range(200):
        drawn.update(take_few(dataset, 20, seed)["text"])
    assert len(drawn) == 100
    assert max(drawn.values()) < 80  # 40 expected, 5.7 their deviation
    ones = [sum(take_few(dataset, 50, seed)["label"]) for seed in range(50)]
    assert abs(sum(ones) / 50 - 20) < 2  # as frequent as in the whole


def test_a_class_of_one_post_is_never_missed():
    dataset = dataset_of([0] * 99 + [1], 2)
    assert all(1 in take_few(dataset, 2, seed)["label"] for seed in range(20))


def test_all_may_be_taken():
    assert len(take_few(dataset_of([0, 1, 1], 2), 3, 0)) == 3


@pytest.mark.parametrize("count", [1, 0, -3, 6])
def test_too_few_and_too_many_are_refused(count):
    with pytest.raises(ValueError, match=rf"count must lie in 2 … 5, but it is {count}$"):
        take_few(dataset_of([0, 1, 1, 0, 1], 2), count, 0)


# -- a model to give away ---------------------------------------------------
def test_round_trip_through_half_precision(pretrained, tokenizer, few, tmp_path):
    config = replace(FINETUNING, epochs=3, learning_rate=3e-3)
    model, _ = finetune(pretrained, tokenizer, few, config, tmp_path / "run")
    names = few["train"].features["label"].names
    save_finetuned(tmp_path / "a" / "b", model, tokenizer, names, CARD)
    loaded, same, found = load_half(tmp_path / "a" / "b")
    assert isinstance(loaded, TransformerForSequenceClassification)
    assert found == names
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight.half().float()), name
    texts = [*few["validation"]["text"], "", "x" * 10_000, "不"]
    first, second = predict(model, tokenizer, texts), predict(loaded, same, texts)
    torch.testing.assert_close(first, second, rtol=0, atol=5e-3)


def test_the_card_says_all_in_its_order(pretrained, tokenizer, tmp_path):
    model = with_new_head(pretrained, 2)
    card = {"Licence": " CC BY 4.0 \n", **CARD}
    save_finetuned(tmp_path, model, tokenizer, iter(["sad", "glad"]), card)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "README.md", "config.json", "model.safetensors", "tokenizer.json",
    ]
    assert (tmp_path / "README.md").read_text("utf-8") == (
        "# Emoformer: sad, glad\n\n## Licence\n\nCC BY 4.0\n\n## Data\n\nours\n\n"
        "## Numbers\n\nnone\n\n## Limits\n\nmany\n\n## Intended use\n\ntests\n"
    )
    assert load_half(tmp_path)[2] == ["sad", "glad"]


def refusals():
    for heading in CARD:
        yield {k: v for k, v in CARD.items() if k != heading}, f"under {heading!r}"
        yield CARD | {heading: " \n"}, f"under {heading!r}"
    yield {}, "under 'Data', but its headings are \\[\\]"


@pytest.mark.parametrize(("card", "message"), refusals())
def test_no_card_no_model(pretrained, tokenizer, tmp_path, card, message):
    model = with_new_head(pretrained, 2)
    with pytest.raises(ValueError, match=f"the card must have a text {message}"):
        save_finetuned(tmp_path / "new", model, tokenizer, ["a", "b"], card)
    assert not (tmp_path / "new").exists()


def test_what_cannot_be_saved_leaves_the_old_folder_whole(pretrained, tokenizer, tmp_path):
    good = with_new_head(pretrained, 2)
    save_finetuned(tmp_path, good, tokenizer, ["a", "b"], CARD)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    broken = copy.deepcopy(good)
    with torch.no_grad():
        broken.head.bias[0] = 1e6  # finite, but not in half precision
    for model, names, message in (
        (good, ["a"], "must be 2 label names"),
        (broken, ["a", "b"], "weights must be finite, but head.bias is not"),
    ):
        with pytest.raises(ValueError, match=message):
            save_finetuned(tmp_path, model, tokenizer, names, CARD | {"Data": "other"})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
