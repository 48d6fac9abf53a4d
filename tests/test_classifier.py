"""Pooling, config, parameter count, and the whole model's behaviour."""

import dataclasses
import importlib.util
import math
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy, pad

from emoformer.attention import MultiHeadSelfAttention
from emoformer.classifier import EmoformerConfig, count_parameters, pool
from emoformer.classifier import TransformerForSequenceClassification as Model
from emoformer.data import load_sample
from emoformer.embedding import Embedding
from emoformer.encoder import EncoderLayer, LayerNorm, TransformerEncoder
from emoformer.feedforward import FeedForward
from emoformer.tokens import CLS_ID, SEP_ID, encode, make_batch, train_tokenizer

POOLINGS = ("mean", "max", "cls")
POSITIONS = ("learned", "sinusoidal", "none")
VOCAB = 23


def tiny_config(**changes):
    """A config of tiny, odd sizes, without dropout unless asked for."""
    numbers = {
        "vocab_size": VOCAB, "d_model": 6, "num_heads": 3, "num_layers": 2,
        "d_ff": 11, "max_len": 13, "num_labels": 5, "dropout": 0.0,
    }
    return EmoformerConfig(**(numbers | changes))


def loud_model(seed=0, **changes):
    """A model whose weights are large enough for differences to show."""
    torch.manual_seed(seed)
    model = Model(tiny_config(**changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.5)
    return model


def exact(actual, expected, atol=1e-5):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


# Pooling

HIDDEN = torch.tensor([
    [[1.0, 0.0], [-3.0, 4.0], [2.0, 2.0], [9.0, -9.0]],
    [[-1.0, -2.0], [-5.0, -1.0], [7.0, 7.0], [8.0, 8.0]],
])
MASK = torch.tensor([[True, True, True, False], [True, True, False, False]])


@pytest.mark.parametrize(("how", "expected"), [
    ("mean", [[0.0, 2.0], [-3.0, -1.5]]),
    ("max", [[2.0, 4.0], [-1.0, -1.0]]),  # below 0: padding is no zero
    ("cls", [[1.0, 0.0], [-1.0, -2.0]]),
])
def test_pool_by_hand(how, expected):
    assert torch.equal(pool(HIDDEN, MASK, how), torch.tensor(expected))


def test_pool_takes_the_mean_by_default():
    assert torch.equal(pool(HIDDEN, MASK), pool(HIDDEN, MASK, "mean"))


@pytest.mark.parametrize("how", POOLINGS)
def test_pool_without_mask_takes_all_tokens(how):
    everyone = torch.ones(2, 4, dtype=torch.bool)
    exact(pool(HIDDEN, None, how), pool(HIDDEN, everyone, how))
    if how != "cls":
        assert not torch.equal(pool(HIDDEN, None, how), pool(HIDDEN, MASK, how))


@pytest.mark.parametrize("how", ["mean", "max"])
def test_pool_of_nothing_but_padding_is_zeros_with_finite_gradient(how):
    hidden = HIDDEN.clone().requires_grad_()
    mask = MASK.clone()
    mask[1] = False
    pooled = pool(hidden, mask, how)
    assert torch.equal(pooled[1], torch.zeros(2))
    pooled.sum().backward()
    assert torch.equal(hidden.grad[1], torch.zeros(4, 2))
    assert hidden.grad[0].abs().sum() > 0


@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("how", POOLINGS)
def test_pool_ignores_whatever_the_padding_holds(how, junk):
    hidden = HIDDEN.masked_fill(~MASK[:, :, None], junk)
    assert torch.equal(pool(hidden, MASK, how), pool(HIDDEN, MASK, how))


@pytest.mark.parametrize("how", POOLINGS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_pool_keeps_dtype(how, dtype):
    assert pool(HIDDEN.to(dtype), MASK, how).dtype == dtype


@given(st.data(), st.integers(1, 4), st.integers(1, 6))
@settings(deadline=None, max_examples=25)
def test_pool_equals_loop(data, batch, seq_len):
    lengths = data.draw(
        st.lists(st.integers(1, seq_len), min_size=batch, max_size=batch)
    )
    generator = torch.Generator().manual_seed(seq_len)
    hidden = torch.randn(batch, seq_len, 3, generator=generator)
    mask = torch.arange(seq_len) < torch.tensor(lengths)[:, None]
    rows = [hidden[b, :n] for b, n in enumerate(lengths)]
    exact(pool(hidden, mask, "mean"), torch.stack([r.mean(dim=0) for r in rows]))
    exact(pool(hidden, mask, "max"), torch.stack([r.amax(dim=0) for r in rows]))


@pytest.mark.parametrize(("arguments", "error", "message"), [
    ((HIDDEN, MASK, "sum"), ValueError, "mean, max or cls, but it is 'sum'"),
    ((HIDDEN[0], None), ValueError, r"\(batch, seq_len, d_model\).*\(4, 2\)"),
    ((HIDDEN, MASK.long()), TypeError, "must be bool.*torch.int64"),
    ((HIDDEN, MASK[:, :1]), ValueError, r"\(2, 4\), but its shape is \(2, 1\)"),
    ((HIDDEN, MASK[:1]), ValueError, r"\(2, 4\), but its shape is \(1, 4\)"),
])
def test_pool_quotes_rule_and_value(arguments, error, message):
    with pytest.raises(error, match=message):
        pool(*arguments)


# Config

def test_config_defaults_are_the_books():
    config = EmoformerConfig(vocab_size=1000)
    assert config.num_labels == 6
    assert not config.norm_first
    assert (config.pooling, config.positions) == ("mean", "learned")
    assert config.layer_norm_eps == 1e-12


@pytest.mark.parametrize(("changes", "message"), [
    ({"vocab_size": 0}, "vocab_size must be a whole .* least 1, but it is 0"),
    ({"d_model": 0}, "d_model must be a whole number of at least 1"),
    ({"num_heads": 0}, "num_heads must be a whole number of at least 1"),
    ({"num_layers": -1}, "num_layers must be .* at least 1, but it is -1"),
    ({"num_layers": 2.5}, "num_layers must be a whole .*, but it is 2.5"),
    ({"d_ff": 0}, "d_ff must be a whole number of at least 1, but it is 0"),
    ({"max_len": 0}, "max_len must be a whole number of at least 1"),
    ({"num_labels": 0}, "num_labels must be a whole number of at least 1"),
    ({"num_segments": -1}, "num_segments must be .* least 0, but it is -1"),
    ({"d_model": 10, "num_heads": 4}, "num_heads .* d_model=10, but it is 4"),
    ({"dropout": 1.0}, r"dropout must be in \[0, 1\), but it is 1.0"),
    ({"dropout": -0.1}, r"dropout must be in \[0, 1\), but it is -0.1"),
    ({"dropout": math.nan}, r"dropout must be in \[0, 1\), but it is nan"),
    ({"layer_norm_eps": 0.0}, "layer_norm_eps must be above 0, but it is 0.0"),
    ({"positions": "rotary"}, "positions .* learned, .*, but it is 'rotary'"),
    ({"pooling": "sum"}, "pooling must be one of mean, .*, but it is 'sum'"),
    ({"norm_first": "no"}, "norm_first must be .*True, False.*, but it is 'no'"),
    (
        {"positions": "sinusoidal", "d_model": 9, "num_heads": 3},
        "d_model must be even for sinusoidal positions, but it is 9",
    ),
])
def test_config_quotes_rule_and_value(changes, message):
    with pytest.raises(ValueError, match=message):
        EmoformerConfig(**({"vocab_size": 10} | changes))


def test_config_is_frozen_and_checked_again_when_replaced():
    config = tiny_config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.d_model = 8
    with pytest.raises(ValueError, match="divisor of d_model=8"):
        dataclasses.replace(config, d_model=8)


# Parameters

@st.composite
def configs(draw):
    """Any config that its own rules allow, tiny."""
    num_heads = draw(st.integers(1, 3))
    d_model = 2 * num_heads * draw(st.integers(1, 3))
    return EmoformerConfig(
        vocab_size=draw(st.integers(1, 9)), d_model=d_model,
        num_heads=num_heads, num_layers=draw(st.integers(1, 3)),
        d_ff=draw(st.integers(1, 9)), max_len=draw(st.integers(1, 9)),
        num_labels=draw(st.integers(1, 7)),
        positions=draw(st.sampled_from(POSITIONS)),
        num_segments=draw(st.integers(0, 3)), norm_first=draw(st.booleans()),
        pooling=draw(st.sampled_from(POOLINGS)),
    )


def real_counts(model):
    """Count what is really there, part by part."""
    def size(*modules):
        return sum(p.numel() for m in modules for p in m.parameters())

    layers = model.encoder.layers
    parts = {
        "embedding": size(model.embedding, model.embedding_norm),
        "attention": size(*(layer.attention for layer in layers)),
        "feed-forward": size(*(layer.feedforward for layer in layers)),
        "norms": size(
            *(layer.attention_norm for layer in layers),
            *(layer.feedforward_norm for layer in layers),
            *([model.encoder.final_norm] if model.config.norm_first else []),
        ),
        "head": size(model.head),
    }
    return parts | {"total": size(model)}


@given(configs())
@settings(deadline=None, max_examples=40)
def test_parameter_count_is_the_formula(config):
    assert count_parameters(config) == real_counts(Model(config))


def test_parameter_count_of_bert_base():
    bert = EmoformerConfig(
        vocab_size=30_522, d_model=768, num_heads=12, num_layers=12, d_ff=3072,
        max_len=512, num_segments=2,
    )
    counts = count_parameters(bert)
    # Google's checkpoint without the pooler has 108,891,648.
    assert counts["total"] - counts["head"] == 108_891_648


# Behaviour

def random_rows(seed, lengths):
    """Lists of ids between [CLS] and [SEP], of the given lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [
        [CLS_ID, *torch.randint(5, VOCAB, (n,), generator=generator).tolist(), SEP_ID]
        for n in lengths
    ]


@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=4), st.integers(0, 5),
    st.integers(0, VOCAB - 1), st.sampled_from(POOLINGS),
    st.sampled_from(POSITIONS), st.booleans(),
)
@settings(deadline=None, max_examples=40)
def test_padding_and_company_never_change_an_answer(
    lengths, extra, pad_id, pooling, positions, norm_first
):
    model = loud_model(pooling=pooling, positions=positions, norm_first=norm_first)
    rows = random_rows(1, lengths)
    with torch.no_grad():
        alone = torch.cat([model(torch.tensor([row])) for row in rows])
        batch = make_batch(rows, vocab_size=VOCAB)
        ids = pad(batch["input_ids"], (0, extra))
        mask = pad(batch["attention_mask"], (0, extra))
        ids = ids.masked_fill(~mask, pad_id)  # whatever stands there
        together = model(ids, mask)
    exact(together, alone)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_the_loud_model_hears_every_real_token(pooling):
    """Without this, the test above could pass on a model that is deaf."""
    model = loud_model(pooling=pooling)
    ids = torch.tensor(random_rows(2, [5]))
    with torch.no_grad():
        before = model(ids)
        for place in range(ids.shape[1]):
            changed = ids.clone()
            changed[0, place] = (changed[0, place] + 7) % VOCAB
            assert (model(changed) - before).abs().max() > 1e-3


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("mask", [None, "all real"])
def test_order_is_heard_only_through_positions(pooling, mask):
    ids = torch.tensor(random_rows(3, [6]))
    order = torch.tensor([0, 3, 6, 1, 5, 2, 4, 7])  # [CLS] stays in front
    if mask:
        mask = torch.ones_like(ids, dtype=torch.bool)
    for positions in POSITIONS:
        model = loud_model(pooling=pooling, positions=positions)
        with torch.no_grad():
            moved = (model(ids, mask) - model(ids[:, order], mask)).abs().max()
        if positions == "none":
            assert moved < 1e-5
        else:
            assert moved > 1e-3


def test_the_twins():
    tokenizer = train_tokenizer(load_sample()["train"]["text"])
    vocab_size = tokenizer.get_vocab_size()
    rows = encode(tokenizer, ["not sad, just happy", "not happy, just sad"])
    assert sorted(rows[0]) == sorted(rows[1])
    assert len(rows[0]) == 7
    batch = make_batch(rows, vocab_size=vocab_size)
    for positions in POSITIONS:
        model = loud_model(vocab_size=vocab_size, positions=positions)
        with torch.no_grad():
            first, second = model(**batch)
        assert torch.allclose(first, second, atol=1e-5) == (positions == "none")


def test_segments_are_heard():
    model = loud_model(num_segments=2)
    ids = torch.tensor(random_rows(4, [4]))
    zeros = torch.zeros_like(ids)
    with torch.no_grad():
        exact(model(ids, None, zeros), model(ids))
        assert (model(ids, None, zeros + 1) - model(ids)).abs().max() > 1e-3


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_row_of_nothing_but_padding_stays_finite(pooling, norm_first):
    model = loud_model(pooling=pooling, norm_first=norm_first)
    ids = torch.tensor(random_rows(5, [3, 3]))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1] = False
    logits = model(ids, mask)
    assert logits.isfinite().all()
    logits.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    if pooling != "cls":
        exact(logits[1], model.head.bias)


def test_eval_is_deterministic_and_training_is_not():
    torch.manual_seed(0)
    model = Model(tiny_config(dropout=0.5))
    ids = torch.tensor(random_rows(6, [5]))
    with torch.no_grad():
        assert not torch.equal(model.train()(ids), model(ids))
        assert torch.equal(model.eval()(ids), model(ids))


@pytest.mark.parametrize("place", ["after the embedding", "before the head"])
def test_dropout_stands_where_bert_has_it(place):
    torch.manual_seed(0)
    model = Model(tiny_config(dropout=0.5)).train()
    seen = []
    model.dropout.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    ids = torch.tensor(random_rows(7, [5, 5]))
    model(ids)
    if place == "after the embedding":
        exact(seen[0], model.embedding_norm(model.embedding(ids)))
    else:
        assert seen[1].shape == (2, 6)
    assert model.dropout.p == 0.5
    assert all(
        m.p == 0.5 for m in model.modules() if isinstance(m, nn.Dropout)
    )


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_every_parameter_gets_a_gradient(pooling, norm_first):
    model = loud_model(
        pooling=pooling, norm_first=norm_first, num_segments=2, max_len=8
    )
    ids = torch.tensor(random_rows(8, [6, 6]))
    segments = torch.tensor([[0] * 4 + [1] * 4] * 2)
    cross_entropy(model(ids, None, segments), torch.tensor([0, 4])).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        # A bias on all keys moves every score of a row alike: softmax and
        # gradient do not notice.
        if not name.endswith("attention.key.bias"):
            assert parameter.grad.abs().max() > 1e-8, name


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_keeps_dtype_and_agrees_with_float32(dtype, pooling):
    torch.manual_seed(0)
    model = Model(tiny_config(pooling=pooling, positions="sinusoidal")).eval()
    ids = torch.tensor(random_rows(9, [5]))
    expected = model(ids)
    out = model.to(dtype)(ids)
    assert out.dtype == dtype
    exact(out.float(), expected, 1e-5 if dtype == torch.float64 else 0.02)


def test_weights_come_one_a_layer_and_change_nothing():
    model = loud_model()
    batch = make_batch(random_rows(10, [5, 2]), vocab_size=VOCAB)
    with torch.no_grad():
        logits, weights = model(**batch, return_weights=True)
        exact(logits, model(**batch))
        hidden, again = model.encode(**batch, return_weights=True)
        exact(hidden, model.encode(**batch))
    assert [w.shape for w in weights] == [(2, 3, 7, 7)] * 2
    for one, other in zip(weights, again, strict=True):
        assert torch.equal(one, other)
        assert (one[1, :, :, 4:] == 0).all()  # the padding of the short text


def test_forward_is_encode_then_pool_then_head():
    for pooling in POOLINGS:
        model = loud_model(pooling=pooling)
        batch = make_batch(random_rows(11, [5, 2]), vocab_size=VOCAB)
        pooled = pool(model.encode(**batch), batch["attention_mask"], pooling)
        exact(model(**batch), model.head(pooled))


def test_first_loss_is_near_the_log_of_the_number_of_labels():
    for num_labels in (2, 6, 28):
        torch.manual_seed(0)
        model = Model(EmoformerConfig(vocab_size=50, num_labels=num_labels)).eval()
        ids = torch.randint(5, 50, (64, 12))
        labels = torch.randint(0, num_labels, (64,))
        loss = cross_entropy(model(ids), labels).item()
        assert abs(loss - math.log(num_labels)) < 0.1


def test_eight_texts_are_memorised():
    torch.manual_seed(0)
    model = Model(tiny_config(d_model=24, d_ff=48, num_labels=4))
    batch = make_batch(
        random_rows(12, range(1, 9)), vocab_size=VOCAB,
        labels=[0, 1, 2, 3] * 2, num_labels=4,
    )
    labels = batch.pop("labels")
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(80):
        optimizer.zero_grad()
        cross_entropy(model(**batch), labels).backward()
        optimizer.step()
    assert torch.equal(model(**batch).argmax(dim=-1), labels)


def test_state_dict_round_trip(tmp_path):
    model = loud_model(seed=1, positions="sinusoidal")
    torch.save(model.state_dict(), tmp_path / "model.pt")
    other = loud_model(seed=2, positions="sinusoidal")
    ids = torch.tensor(random_rows(13, [5]))
    assert not torch.allclose(model(ids), other(ids))
    other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert torch.equal(model(ids), other(ids))


# Errors

IDS = torch.ones(2, 4, dtype=torch.int64)


@pytest.mark.parametrize(("arguments", "error", "message"), [
    ({"input_ids": IDS.float()}, TypeError, "must be int64.*torch.float32"),
    ({"input_ids": IDS[0]}, ValueError, r"\(batch, seq_len\).*\(4,\)"),
    ({"input_ids": IDS[None]}, ValueError, r"\(batch, seq_len\).*\(1, 2, 4\)"),
    (
        {"input_ids": IDS.repeat(1, 4)}, ValueError,
        "at most max_len=13, but it is 16",
    ),
    (
        {"input_ids": IDS, "attention_mask": IDS}, TypeError,
        "must be bool.*torch.int64",
    ),
    (
        {"input_ids": IDS, "attention_mask": IDS[:1].bool()}, ValueError,
        r"\(2, 4\), but its shape is \(1, 4\)",
    ),
    (
        {"input_ids": IDS, "segment_ids": IDS}, ValueError,
        "num_segments of at least 1, but it is 0",
    ),
])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_model_quotes_rule_and_value(arguments, error, message, pooling):
    with pytest.raises(error, match=message):
        loud_model(pooling=pooling)(**arguments)


# The reader's own parts

@pytest.mark.parametrize(("argument", "base", "times"), [
    ("embedding", Embedding, 1),
    ("encoder", TransformerEncoder, 1),
    ("layer", EncoderLayer, 2),
    ("attention", MultiHeadSelfAttention, 2),
    ("feedforward", FeedForward, 2),
    ("norm", LayerNorm, 1 + 2 * 2 + 1),
])
def test_own_class_is_really_used(argument, base, times):
    calls = []

    class Own(base):
        def forward(self, *args, **kwargs):
            calls.append(self)
            return super().forward(*args, **kwargs)

    torch.manual_seed(0)
    config = tiny_config(norm_first=True)
    model = Model(config, **{argument: Own}).eval()
    ids = torch.tensor(random_rows(14, [5]))
    logits = model(ids)
    assert len(calls) == len({id(call) for call in calls}) == times
    assert not any(type(module) is base for module in model.modules())
    torch.manual_seed(0)
    exact(logits, Model(config).eval()(ids))


def test_own_attention_decides():
    """An attention that hears nothing makes the model a bag of words."""
    class Deaf(nn.Module):
        def __init__(self, *, d_model, num_heads, dropout):
            super().__init__()

        def forward(self, x, attention_mask=None, return_weights=False):
            return torch.zeros_like(x)

    torch.manual_seed(0)
    model = Model(tiny_config(), attention=Deaf).eval()
    ids = torch.tensor(random_rows(15, [5]))
    changed = ids.clone()
    changed[0, -1] = 9
    moved = (model.encode(ids) - model.encode(changed)).abs().amax(dim=-1)[0]
    assert (moved[:-1] == 0).all()
    assert moved[-1] > 0


def test_numbers_of_the_config_reach_the_parts():
    config = tiny_config(dropout=0.25, layer_norm_eps=0.5, norm_first=True)
    model = Model(config)
    norms = [m for m in model.modules() if isinstance(m, LayerNorm)]
    assert len(norms) == 1 + 2 * 2 + 1
    assert all(norm.eps == 0.5 for norm in norms)
    assert all(layer.norm_first for layer in model.encoder.layers)
    assert all(
        m.num_heads == 3 for m in model.modules()
        if isinstance(m, MultiHeadSelfAttention)
    )
    drops = [m for m in model.modules() if isinstance(m, nn.Dropout)]
    assert drops
    assert all(drop.p == 0.25 for drop in drops)


# torch.compile

def has_compiler():
    """Whether inductor can build code for this CPU."""
    return importlib.util.find_spec("torch._inductor") is not None and any(
        shutil.which(name) for name in ("g++", "clang++")
    )


def test_traced_graph_equals_eager_with_gradients():
    torch._dynamo.reset()
    model = loud_model(num_layers=1)
    traced = torch.compile(model, backend="aot_eager", fullgraph=True)
    batch = make_batch(random_rows(16, [5, 2]), vocab_size=VOCAB)
    exact(traced(**batch), model(**batch))
    gradients = []
    for each in (traced, model):
        model.zero_grad()
        each(**batch).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for mine, eager in zip(*gradients, strict=True):
        exact(mine, eager, 1e-4)


@pytest.mark.skipif(
    not has_compiler(), reason="inductor needs g++ or clang++: install one"
)
def test_compiled_code_equals_eager():
    torch._dynamo.reset()
    model = loud_model(num_layers=1)
    compiled = torch.compile(model, backend="inductor", fullgraph=True)
    batch = make_batch(random_rows(16, [5, 2]), vocab_size=VOCAB)
    with torch.no_grad():  # compiling a second graph would double the wait
        exact(compiled(**batch), model(**batch))
