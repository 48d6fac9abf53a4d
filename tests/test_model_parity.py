"""The whole model against Hugging Face's BERT, and against its own past."""

import json

import pytest
import torch
from reference.make_classifier import PATH, POOLINGS, run, tiny_batch, tiny_model
from transformers import BertConfig, BertModel

from emoformer.classifier import EmoformerConfig
from emoformer.classifier import TransformerForSequenceClassification as Model

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
OURS_TO_THEIRS = {
    "embedding.token": "embeddings.word_embeddings",
    "embedding.position": "embeddings.position_embeddings",
    "embedding.segment": "embeddings.token_type_embeddings",
    "embedding_norm": "embeddings.LayerNorm",
    "attention.query": "attention.self.query",
    "attention.key": "attention.self.key",
    "attention.value": "attention.self.value",
    "attention.output": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "feedforward.expand": "intermediate.dense",
    "feedforward.contract": "output.dense",
    "feedforward_norm": "output.LayerNorm",
}


def their_name(name):
    """Translate the name of one of our parameters into BERT's."""
    module, _, kind = name.rpartition(".")
    prefix = ""
    if module.startswith("encoder.layers."):
        number, module = module.removeprefix("encoder.layers.").split(".", 1)
        prefix = f"encoder.layer.{number}."
    return f"{prefix}{OURS_TO_THEIRS[module]}.{kind}"


def encoder_parameters(model):
    """Our parameters without the head, under BERT's names."""
    return {
        their_name(name): parameter
        for name, parameter in model.named_parameters()
        if not name.startswith("head.")
    }


def build_bert(config, dtype, attention):
    """A BERT of the same size, without pooler and dropout."""
    return BertModel(BertConfig(
        vocab_size=config.vocab_size, hidden_size=config.d_model,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads, intermediate_size=config.d_ff,
        max_position_embeddings=config.max_len,
        type_vocab_size=config.num_segments,
        layer_norm_eps=config.layer_norm_eps,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        attn_implementation=attention,
    ), add_pooling_layer=False).to(dtype).eval()


def random_pair(dtype, attention):
    """A random BERT, and our model with its weights copied by name."""
    torch.manual_seed(0)
    config = EmoformerConfig(
        vocab_size=31, d_model=12, num_heads=3, num_layers=3, d_ff=29,
        max_len=17, num_segments=2, dropout=0.0,
    )
    theirs = build_bert(config, dtype, attention)
    with torch.no_grad():
        for parameter in theirs.parameters():  # biases and norms too
            parameter.add_(0.2 * torch.randn_like(parameter))
    ours = Model(config).to(dtype).eval()
    source = dict(theirs.named_parameters())
    mine = encoder_parameters(ours)
    assert mine.keys() == source.keys()
    with torch.no_grad():
        for name, parameter in mine.items():
            parameter.copy_(source[name])
    return ours, theirs


def random_batch():
    """Three texts of 9, 4 and 1 tokens, in two segments."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.arange(9) < torch.tensor([[9], [4], [1]])
    ids = torch.randint(1, 31, (3, 9), generator=generator).masked_fill(~mask, 0)
    segments = torch.randint(0, 2, (3, 9), generator=generator)
    return ids, mask, segments


def their_states(theirs, ids, mask, segments):
    """What leaves BERT's embedding and each of its layers."""
    return theirs(
        input_ids=ids, attention_mask=mask.long(), token_type_ids=segments,
        output_hidden_states=True,
    ).hidden_states


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_equals_bert_with_gradients(attention, dtype):
    ours, theirs = random_pair(dtype, attention)
    ids, mask, segments = random_batch()
    tolerance = {"rtol": 0, "atol": TOLERANCE[dtype]}

    mine = []
    for part in (ours.embedding_norm, *ours.encoder.layers):
        part.register_forward_hook(lambda _, __, output: mine.append(output))
    ours.encode(ids, mask, segments)
    states = their_states(theirs, ids, mask, segments)
    assert len(mine) == len(states) == 4
    for one, other in zip(mine, states, strict=True):
        torch.testing.assert_close(one[mask], other[mask], **tolerance)

    # A fixed direction per number: the plain sum of a normalised vector
    # would have no gradient.
    probe = torch.randn(int(mask.sum()), 12, dtype=dtype) / mask.sum()
    (mine[-1][mask] * probe).sum().backward()
    (states[-1][mask] * probe).sum().backward()
    others = dict(theirs.named_parameters())
    for name, parameter in encoder_parameters(ours).items():
        assert name.endswith("key.bias") or parameter.grad.abs().max() > 1e-4, name
        torch.testing.assert_close(
            parameter.grad, others[name].grad, **tolerance,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def test_parity_would_notice_a_swapped_weight():
    ours, theirs = random_pair(torch.float64, "eager")
    ids, mask, segments = random_batch()
    layer = ours.encoder.layers[1]
    with torch.no_grad():
        layer.attention.key.weight.copy_(layer.attention.query.weight)
        mine = ours.encode(ids, mask, segments)
        other = their_states(theirs, ids, mask, segments)[-1]
    assert (mine - other)[mask].abs().max() > 1e-3


# The reference file

REFERENCE = json.loads(PATH.read_text())


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_equals_the_reference(dtype):
    with torch.no_grad():
        shapes, values = run(tiny_model(dtype), tiny_batch())
    assert shapes == REFERENCE["shapes"]
    assert values.keys() == REFERENCE["values"].keys()
    for name, value in values.items():
        torch.testing.assert_close(
            value.flatten(0, -2),
            torch.tensor(REFERENCE["values"][name], dtype=dtype),
            rtol=0, atol=TOLERANCE[dtype],
            msg=lambda text, name=name: f"{name}: {text}",
        )


@pytest.mark.parametrize("how", POOLINGS)
def test_forward_gives_the_referenced_scores(how):
    with torch.no_grad():
        scores = tiny_model(pooling=how)(**tiny_batch())
    expected = torch.tensor(REFERENCE["values"][f"logits {how}"])
    torch.testing.assert_close(scores, expected.to(scores), rtol=0, atol=1e-6)


def test_the_reference_is_what_bert_answers():
    ours = tiny_model()
    theirs = build_bert(ours.config, torch.float64, "eager")
    theirs.load_state_dict({
        name: parameter.detach()
        for name, parameter in encoder_parameters(ours).items()
    })
    batch = tiny_batch()
    with torch.no_grad():
        states = their_states(
            theirs, batch["input_ids"], batch["attention_mask"],
            batch["segment_ids"],
        )
    stages = {"embedding_norm": 0, "encoder.layers.0": 1, "encoder": 2}
    for name, number in stages.items():
        expected = torch.tensor(REFERENCE["values"][name], dtype=torch.float64)
        real = batch["attention_mask"].flatten()
        torch.testing.assert_close(
            states[number].flatten(0, 1)[real], expected[real],
            rtol=0, atol=1e-10,
        )


def test_padding_holds_whatever_it_likes():
    """The reference would not change with other ids in the padding."""
    batch = tiny_batch()
    batch["input_ids"][1, 3:] = 6
    with torch.no_grad():
        scores = tiny_model()(**batch)
    expected = torch.tensor(REFERENCE["values"]["logits mean"])
    torch.testing.assert_close(scores, expected.to(scores), rtol=0, atol=1e-6)
