"""Mistakes with pooling, the config, the whole model and its size."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from emoformer.attention import MultiHeadSelfAttention
from emoformer.classifier import EmoformerConfig, TransformerForSequenceClassification
from emoformer.classifier import count_parameters as book_count
from emoformer.classifier import pool as book_pool
from emoformer.embedding import Embedding
from emoformer.encoder import EncoderLayer, LayerNorm, TransformerEncoder, init_weights
from emoformer.feedforward import FeedForward
from tests.bank import mistake, right

POOL, CONFIG, MODEL, COUNT = (
    "pool", "EmoformerConfig", "TransformerForSequenceClassification", "count_parameters")
COMPANY = "score a text alone and in a padded batch"
BUILD = "build the model and sum `p.numel()`"


# pool


def by_parts(mean=None, top=None, cls=None):
    """Our pool with one of its branches replaced."""
    def pool(hidden, attention_mask=None, how="mean"):
        book_pool(hidden, attention_mask, how)  # refuses what ours refuses
        if attention_mask is None:
            attention_mask = torch.ones_like(hidden[:, :, 0], dtype=torch.bool)
        branch = {"mean": mean, "max": top, "cls": cls}[how]
        if branch is None:
            return book_pool(hidden, attention_mask, how)
        return branch(hidden, attention_mask)
    return pool


def the_mistake(name, *, looks, shows, find, hint, **parts):
    """Put a pool with one wrong branch into the bank."""
    mistake(POOL, name, looks=looks, shows=shows, find=find, hint=hint)(by_parts(**parts))


the_mistake(
    "padding counted", looks="`hidden.mean(dim=1)`",
    shows="a text's score depends on how long its neighbours are", find=COMPANY,
    hint="the mask is not used: padding counts", mean=lambda h, m: h.mean(1))
the_mistake(
    "divided by seq_len", looks="`(hidden * mask).mean(dim=1)`",
    shows="short texts in long batches get small vectors, unsure scores", find=COMPANY,
    hint="divided by seq_len",
    mean=lambda h, m: h.masked_fill(~m[:, :, None], 0).mean(1))
the_mistake(
    "padding filled with 0 before the maximum", looks="`(hidden * mask).amax(dim=1)`",
    shows="numbers below 0 never get through where there is padding", find=COMPANY,
    hint="where all real numbers are below 0 it wins",
    top=lambda h, m: h.masked_fill(~m[:, :, None], 0).amax(1))
the_mistake(
    "multiplied, not filled", looks="`(hidden * mask[:, :, None]).sum(1)`",
    shows="one NaN in the padding, and the text is NaN", find="put NaN into the padding",
    hint="NaN or infinity times 0 is NaN",
    mean=lambda h, m: (h * m[:, :, None]).sum(1) / m.sum(1, keepdim=True).clamp(min=1))
the_mistake(
    "an empty row gives NaN", looks="`total / mask.sum(dim=1, keepdim=True)`",
    shows="a batch filled up with empty texts, and the loss is NaN",
    find="a mask with a row of False", hint="is NaN, by 0 / 0",
    mean=lambda h, m: h.masked_fill(~m[:, :, None], 0).sum(1) / m.sum(1, keepdim=True))
the_mistake(
    "an empty row gives minus infinity", looks="`masked_fill(~mask, -inf).amax(1)`",
    shows="as above", find="a mask with a row of False", hint="is infinite",
    top=lambda h, m: h.masked_fill(~m[:, :, None], -torch.inf).amax(1))
the_mistake(
    "[CLS] along the batch", looks="`hidden[0]`",
    shows="texts mixed up, and an error only where seq_len is not batch",
    find="shapes with batch, seq_len and d_model all different",
    hint="hidden[:, 0], not hidden[0]", cls=lambda h, m: h[0])
the_mistake(
    "the last token", looks="`hidden[:, -1]`, as for GPT",
    shows="in padded batches the text is its padding", find=COMPANY,
    hint="this is the last token's vector", cls=lambda h, m: h[:, -1])
the_mistake(
    "values and places", looks="`hidden.max(dim=1)`",
    shows="an error in the head: a tuple has no shape", find="type of the result",
    hint="it returns a tuple", top=lambda h, m: h.max(dim=1))


@mistake(POOL, "mask inverted", looks="`hidden.masked_fill(mask, 0)`",
         shows="only padding is heard; without padding zeros", find=COMPANY,
         hint="the mask is inverted")
def inverted_pool(hidden, attention_mask=None, how="mean"):
    inverted = attention_mask if attention_mask is None else ~attention_mask
    return book_pool(hidden, inverted, how)


@mistake(POOL, "any how is cls", looks="`else: return hidden[:, 0]`",
         shows="a slip in the config is another model, without an error",
         find='`how="Mean"`', hint="an else that takes the rest")
def any_how_pool(hidden, attention_mask=None, how="mean"):
    return book_pool(hidden, attention_mask, how if how in ("mean", "max") else "cls")


@mistake(POOL, "a mask of another shape accepted", looks="no check, and broadcasting",
         shows="a mask of (batch, 1) makes sums of means", find="a mask of (batch, 1)",
         hint="stretched over them")
def stretched_pool(hidden, attention_mask=None, how="mean"):
    if attention_mask is not None and attention_mask.shape[1] == 1:
        attention_mask = attention_mask.expand(hidden.shape[:2])
    return book_pool(hidden, attention_mask, how)


@right(POOL, "by einsum and where")
def einsum_pool(hidden, attention_mask=None, how="mean"):
    assert how in ("mean", "max", "cls"), how
    assert hidden.ndim == 3, hidden.shape
    if attention_mask is None:
        attention_mask = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
    assert attention_mask.shape == hidden.shape[:2]
    if how == "cls":
        return hidden.select(1, 0)
    share = attention_mask.to(hidden.dtype)
    clean = torch.where(attention_mask.bool()[..., None], hidden, hidden.new_zeros(()))
    if how == "mean":
        share = share / share.sum(1, keepdim=True).clamp(min=1)
        return torch.einsum("bs,bsd->bd", share, clean)
    low = torch.finfo(hidden.dtype).min
    top = torch.where(attention_mask.bool()[..., None], hidden, low).max(dim=1).values
    return torch.where(attention_mask.bool().any(1)[:, None], top, 0.0)


# EmoformerConfig


def config_with(**rules):
    """Our config, with rules taken out of it: values that they change pass."""
    @dataclass(frozen=True)
    class Config(EmoformerConfig):
        def __post_init__(self):
            kept = {}
            for name, (broken, instead) in rules.items():
                value = getattr(self, name)
                if broken(self):
                    kept[name] = value
                    object.__setattr__(self, name, instead)
            super().__post_init__()
            for name, value in kept.items():
                object.__setattr__(self, name, value)
    return Config


mistake(CONFIG, "heads not checked", looks="no rule for `d_model % num_heads`",
        shows="an error in the middle of the model, or a lost part of each vector",
        find="d_model=130", hint="num_heads must divide d_model",
        )(config_with(num_heads=(
            lambda c: isinstance(c.num_heads, int) and c.num_heads > 0
            and isinstance(c.d_model, int) and c.d_model % c.num_heads, 1)))
mistake(CONFIG, "dropout of 1 accepted", looks="`0 <= dropout <= 1`",
        shows="everything is dropped; 0 / 0 in the rescaling", find="dropout=1.0",
        hint="dropout must be in [0, 1)")(config_with(dropout=(lambda c: c.dropout == 1, 0.0)))
mistake(CONFIG, "half numbers accepted", looks="`if self.d_ff < 1`",
        shows="an error about floats deep in a layer", find="d_ff=51.2",
        hint="d_ff must be a whole number")(config_with(d_ff=(
            lambda c: isinstance(c.d_ff, float), 8)))
mistake(CONFIG, "choices not checked", looks="no rule for `pooling`",
        shows="a slip in a word shows at the first batch, or never", find='pooling="sum"',
        hint="pooling must be mean, max or cls")(config_with(pooling=(
            lambda c: c.pooling not in ("mean", "max", "cls"), "mean")))
mistake(CONFIG, "odd width for sines accepted", looks="no rule that joins the two",
        shows="an error inside the embedding", find="d_model=7, positions='sinusoidal'",
        hint="need an even d_model")(config_with(positions=(
            lambda c: c.positions == "sinusoidal" and c.d_model % 2, "none")))


@mistake(CONFIG, "not frozen", looks="`@dataclass` without `frozen=True`",
         shows="a number is changed after the check, and saved with the model",
         find="assign a field", hint="the dataclass must be frozen")
@dataclass
class ThawedConfig:
    vocab_size: int
    d_model: int = 128
    num_heads: int = 4
    num_layers: int = 2
    d_ff: int = 512
    max_len: int = 128
    num_labels: int = 6
    dropout: float = 0.1
    positions: str = "learned"
    num_segments: int = 0
    norm_first: bool = False
    pooling: str = "mean"
    layer_norm_eps: float = 1e-12

    def __post_init__(self):
        EmoformerConfig(**vars(self))


@mistake(CONFIG, "segments refused", looks="one loop, `value < 1`, for all sizes",
         shows="the default of 0 segments cannot be made", find="make one with the defaults",
         hint="num_segments")
@dataclass(frozen=True)
class SegmentsNeeded(EmoformerConfig):
    def __post_init__(self):
        super().__post_init__()
        self._require("num_segments", self.num_segments >= 1, "at least 1")


@mistake(CONFIG, "other defaults", looks="`dropout: float = 0.0`",
         shows="trained models overfit, and no number of the book fits",
         find="print a fresh config", hint="the default of dropout")
@dataclass(frozen=True)
class OtherDefaults(EmoformerConfig):
    dropout: float = 0.0


@right(CONFIG, "written by hand")
@dataclass(frozen=True)
class HandMade:
    vocab_size: int
    d_model: int = 128
    num_heads: int = 4
    num_layers: int = 2
    d_ff: int = 512
    max_len: int = 128
    num_labels: int = 6
    dropout: float = 0.1
    positions: str = "learned"
    num_segments: int = 0
    norm_first: bool = False
    pooling: str = "mean"
    layer_norm_eps: float = field(default=1e-12)

    def __post_init__(self):
        for name in ("vocab_size", "d_model", "num_heads", "num_layers", "d_ff",
                     "max_len", "num_labels"):
            if type(getattr(self, name)) is not int:
                raise TypeError(name)
            assert getattr(self, name) > 0, name
        assert type(self.num_segments) is int and self.num_segments >= 0
        if self.d_model % self.num_heads:
            raise ValueError("num_heads")
        if self.positions == "sinusoidal" and self.d_model % 2:
            raise ValueError("d_model")
        {"learned": 0, "sinusoidal": 0, "none": 0}[self.positions]
        {"mean": 0, "max": 0, "cls": 0}[self.pooling]
        if not isinstance(self.norm_first, bool):
            raise TypeError("norm_first")
        if not (0 <= self.dropout < 1 and self.layer_norm_eps > 0):
            raise ValueError("a number")


# TransformerForSequenceClassification


class Steps(TransformerForSequenceClassification):
    """Our model in separate steps, each of which a mistake can replace."""

    def forward(self, input_ids, attention_mask=None, segment_ids=None,
                return_weights=False):
        hidden = self.encode(input_ids, attention_mask, segment_ids, return_weights)
        if return_weights:
            hidden, weights = hidden
        logits = self.score(self.summary(hidden, attention_mask))
        return (logits, weights) if return_weights else logits

    def encode(self, input_ids, attention_mask=None, segment_ids=None,
               return_weights=False):
        x = self.below(input_ids, segment_ids)
        return self.above(x, attention_mask, return_weights)

    def below(self, input_ids, segment_ids):
        return self.dropout(self.embedding_norm(self.embedding(input_ids, segment_ids)))

    def above(self, x, mask, wanted):
        return self.encoder(x, mask, wanted)

    def summary(self, hidden, mask):
        return book_pool(hidden, mask, self.config.pooling)

    def score(self, summary):
        return self.head(self.dropout(summary))


right(MODEL, "step by step")(Steps)


@mistake(MODEL, "softmax inside", looks="`return logits.softmax(-1)`",
         shows="`cross_entropy` does a second one: the loss stays near 1.5",
         find="row sums of the output: logits do not sum to 1",
         hint="a softmax is inside the model")
class SoftmaxInside(Steps):
    def score(self, summary):
        return super().score(summary).softmax(-1)


@mistake(MODEL, "mask not passed to the encoder", looks="`self.encoder(x)`",
         shows="padding is listened to; scores depend on the company", find=COMPANY,
         hint="the mask is not passed on to the encoder")
class EncoderUnmasked(Steps):
    def above(self, x, mask, wanted):
        return self.encoder(x, None, wanted)


@mistake(MODEL, "mask not passed to the pooling", looks="`hidden.mean(dim=1)`",
         shows="as above, but quieter", find=COMPANY,
         hint="the mask is not used in the pooling")
class PoolUnmasked(Steps):
    def summary(self, hidden, mask):
        return super().summary(hidden, None)


@mistake(MODEL, "no norm after the embedding", looks="`self.encoder(self.embedding(ids))`",
         shows="the first layer gets vectors dozens of times smaller than the others",
         find="`x.std()` before the first layer", hint="the norm after the embedding is")
class NoNorm(Steps):
    def below(self, input_ids, segment_ids):
        return self.dropout(self.embedding(input_ids, segment_ids))


@mistake(MODEL, "weights not initialised", looks="`self.apply(init_weights)` forgotten",
         shows="the first loss is far above ln 6", find="first loss, before training",
         hint="no weight is drawn by init_weights")
class NotInitialised(Steps):
    def apply(self, function):
        return self


@mistake(MODEL, "initialised too early", looks="`self.apply(init_weights)` before the head",
         shows="the head begins too loud", find="`head.weight.abs().max()`",
         hint="the head keeps PyTorch's own first weights")
class TooEarly(Steps):
    def __init__(self, config, **parts):
        super().__init__(config, **parts)
        self.head = nn.Linear(config.d_model, config.num_labels)


@mistake(MODEL, "a fixed number of classes", looks="`nn.Linear(d_model, 6)`",
         shows="four classes are trained with six scores", find="num_labels=4",
         hint="take the number from the config")
class SixClasses(Steps):
    def __init__(self, config, **parts):
        super().__init__(config, **parts)
        self.head = nn.Linear(config.d_model, 6).apply(init_weights)


@mistake(MODEL, "dropout behind the head", looks="`self.dropout(self.head(pooled))`",
         shows="in training a class's score is 0 by chance; the loss is noisy",
         find="zeros among the logits, in training", hint="dropout stands behind the head")
class DropoutBehind(Steps):
    def score(self, summary):
        return self.dropout(self.head(summary))


@mistake(MODEL, "pooling of the config ignored", looks="`pool(hidden, mask)`",
         shows="cls, mean and max score exactly alike", find="compare two poolings",
         hint="whatever config.pooling says")
class PoolingIgnored(Steps):
    def summary(self, hidden, mask):
        return book_pool(hidden, mask)


@mistake(MODEL, "the pooler left in", looks="`torch.tanh(self.pooler(pooled))`",
         shows="more parameters than counted; nothing trains them beforehand",
         find="`count_parameters`", hint="BERT's pooler")
class WithPooler(Steps):
    def __init__(self, config, **parts):
        super().__init__(config, **parts)
        self.pooler = nn.Linear(config.d_model, config.d_model).apply(init_weights)

    def score(self, summary):
        return super().score(torch.tanh(self.pooler(summary)))


@mistake(MODEL, "segments not passed on", looks="`self.embedding(input_ids)`",
         shows="sentence pairs run together", find="other segment ids, same vectors",
         hint="segment_ids are not passed on")
class NoSegments(Steps):
    def below(self, input_ids, segment_ids):
        return super().below(input_ids, None)


@mistake(MODEL, "dropout of a fixed size", looks="`nn.Dropout(0.1)`",
         shows="config.dropout changes the encoder only", find="dropout=0, twice in training",
         hint="a fixed number in place of the argument")
class FixedDropout(Steps):
    def __init__(self, config, **parts):
        super().__init__(config, **parts)
        self.dropout = nn.Dropout(0.1)


@mistake(MODEL, "layers put in are lost", looks="`encoder(…)` without `attention=attention`",
         shows="your own attention is never used, without an error", find="`print(model)`",
         hint="is not passed on to the encoder: a layer put in there")
class PartsLost(Steps):
    def __init__(self, config, *, encoder=TransformerEncoder, **parts):
        super().__init__(
            config, encoder=lambda attention=None, **options: encoder(**options), **parts)


@mistake(MODEL, "encode with another beginning", looks="the norm in `forward` only",
         shows="pretraining fits one model, fine-tuning another",
         find="compare `encode` with `forward`", hint="encode and forward give the encoder")
class TwoBeginnings(Steps):
    def encode(self, input_ids, attention_mask=None, segment_ids=None,
               return_weights=False):
        x = self.dropout(self.embedding(input_ids, segment_ids))
        return self.above(x, attention_mask, return_weights)

    def forward(self, input_ids, attention_mask=None, segment_ids=None,
                return_weights=False):
        x = self.below(input_ids, segment_ids)
        hidden = self.above(x, attention_mask, return_weights)
        if return_weights:
            hidden, weights = hidden
        logits = self.score(self.summary(hidden, attention_mask))
        return (logits, weights) if return_weights else logits


@right(MODEL, "other names, written differently")
class OtherNames(nn.Module):
    def __init__(self, config, embedding=Embedding, encoder=TransformerEncoder,
                 layer=EncoderLayer, attention=MultiHeadSelfAttention,
                 feedforward=FeedForward, norm=LayerNorm):
        super().__init__()
        c = self.config = config
        shared = dict(d_model=c.d_model)
        self.first = nn.ModuleList([
            embedding(**shared, vocab_size=c.vocab_size, max_len=c.max_len,
                      positions=c.positions, num_segments=c.num_segments),
            norm(c.d_model, eps=c.layer_norm_eps),
        ])
        self.body = encoder(
            **shared, num_layers=c.num_layers, num_heads=c.num_heads, d_ff=c.d_ff,
            dropout=c.dropout, norm_first=c.norm_first, layer_norm_eps=c.layer_norm_eps,
            layer=layer, attention=attention, feedforward=feedforward, norm=norm)
        self.classifier = nn.Sequential(
            nn.Dropout(c.dropout), nn.Linear(c.d_model, c.num_labels))
        for module in self.modules():
            init_weights(module)

    def encode(self, ids, attention_mask=None, segment_ids=None, return_weights=False):
        x = self.first[1](self.first[0](ids, segment_ids=segment_ids))
        x = F.dropout(x, self.config.dropout, self.training)
        return self.body(x, attention_mask=attention_mask, return_weights=return_weights)

    def forward(self, ids, attention_mask=None, segment_ids=None, return_weights=False):
        out = self.encode(ids, attention_mask, segment_ids, return_weights)
        hidden = out[0] if return_weights else out
        logits = self.classifier(
            einsum_pool(hidden, attention_mask, self.config.pooling))
        return (logits, out[1]) if return_weights else logits


# count_parameters


def count_with(change):
    """Our count with one part changed and the total made to fit."""
    def count_parameters(config):
        parts = book_count(config)
        parts.pop("total")
        parts |= change(config, parts)
        return parts | {"total": sum(parts.values())}
    return count_parameters


def the_count(name, change, *, looks, shows, find=BUILD, hint):
    """Put a wrong count into the bank."""
    mistake(COUNT, name, looks=looks, shows=shows, find=find, hint=hint)(count_with(change))


the_count(
    "biases of attention forgotten",
    lambda c, p: {"attention": c.num_layers * 4 * c.d_model**2},
    looks="`4 * d * d`", shows="a little too few", hint="biases of the four projections")
the_count(
    "num_heads multiplied",
    lambda c, p: {"attention": p["attention"] * c.num_heads},
    looks="`num_heads * 4 * d * d`", shows="far too many", hint="num_heads multiplies")
the_count(
    "layers forgotten",
    lambda c, p: {"feed-forward": p["feed-forward"] // c.num_layers},
    looks="`2 * d * f + f + d`", shows="one layer instead of all",
    hint="the number of layers is forgotten")
the_count(
    "sinusoidal positions counted",
    lambda c, p: {"embedding": (c.vocab_size + c.num_segments + c.max_len + 2) * c.d_model},
    looks="`max_len * d` for all", shows="right for learned positions only",
    hint="although they are not learned")
the_count(
    "last norm of pre-norm forgotten",
    lambda c, p: {"norms": c.num_layers * 4 * c.d_model},
    looks="`num_layers * 4 * d`", shows="right for post-norm only",
    hint="pre-norm has one norm more")
the_count(
    "norms without bias",
    lambda c, p: {"norms": p["norms"] // 2},
    looks="`d` a norm", shows="half of the norms", hint="a weight and a bias")


@mistake(COUNT, "the total counts itself", looks="`counts['total'] = …` inside the loop",
         shows="twice as many", find=BUILD, hint="counts itself as well")
def doubled_count_parameters(config):
    counts = book_count(config)
    counts["total"] = sum(counts.values())
    return counts


@right(COUNT, "by building the model")
def built_count_parameters(config):
    model = TransformerForSequenceClassification(config)
    sizes = dict.fromkeys(("embedding", "attention", "feed-forward", "norms", "head"), 0)
    for name, parameter in model.named_parameters():
        part = ("embedding" if name.startswith("embedding") else "norms" if "norm" in name
                else "attention" if "attention" in name
                else "feed-forward" if "feedforward" in name else "head")
        sizes[part] += parameter.numel()
    sizes["total"] = sum(p.numel() for p in model.parameters())
    return sizes


# Exercises

BALANCE, WORDS, CHOOSER, MOVES, WORK = (
    "balance_width", "words_only", "AttentionPool", "padding_moves", "count_multiplications")


def tipping_width(vocab_size, max_len, num_layers, start, attention=True):
    d = start
    while True:
        counts = book_count(EmoformerConfig(
            vocab_size=vocab_size, max_len=max_len, num_layers=num_layers, d_model=d,
            num_heads=1, d_ff=4 * d))
        if counts["attention"] * attention + counts["feed-forward"] > counts["embedding"]:
            return d
        d += 4


@mistake(BALANCE, "attention forgotten", looks="`counts['feed-forward'] > …`",
         shows="half as wide again", find="estimate it by the formula",
         hint="only feed-forward is weighed")
def feedforward_balance_width(vocab_size, max_len, num_layers):
    return tipping_width(vocab_size, max_len, num_layers, 4, attention=False)


@mistake(BALANCE, "one step short", looks="`return d - 4`", shows="the scale has not tipped",
         find="count at the width found", hint="the last width at which the embedding")
def short_balance_width(vocab_size, max_len, num_layers):
    return tipping_width(vocab_size, max_len, num_layers, 4) - 4


@right(BALANCE, "by the book's count")
def counted_balance_width(vocab_size, max_len, num_layers):
    return tipping_width(vocab_size, max_len, num_layers, 4)


@mistake(WORDS, "by place", looks="`mask[:, 1:-1]`: first and last column",
         shows="[SEP] of short texts still counts", find="a batch of two lengths",
         hint="[SEP] is still counted")
def place_words_only(input_ids, attention_mask):
    return attention_mask & (input_ids != 2)


@mistake(WORDS, "padding counted", looks="`(ids != CLS_ID) & (ids != SEP_ID)`",
         shows="short texts are mostly padding", find="sum the mask of a short text",
         hint="padding is counted")
def padded_words_only(input_ids, attention_mask):
    return (input_ids != 2) & (input_ids != 3)


@mistake(WORDS, "or in place of and", looks="`(ids != CLS_ID) | (ids != SEP_ID)`",
         shows="nothing is left out", find="sum the mask", hint="or in place of and")
def or_words_only(input_ids, attention_mask):
    return attention_mask & ((input_ids != 2) | (input_ids != 3))


@right(WORDS, "by isin")
def isin_words_only(input_ids, attention_mask):
    return attention_mask & ~torch.isin(input_ids, torch.tensor([2, 3]))


class Chooser(nn.Module):
    def __init__(self, d_model):
        super().__init__()
        self.score = nn.Linear(d_model, 1)

    def forward(self, hidden, attention_mask):
        scores = self.score(hidden).squeeze(-1)
        weights = self.weights(scores, attention_mask)
        return torch.einsum("bs,bsd->bd", weights, hidden)

    def weights(self, scores, mask):
        real = mask.any(dim=1, keepdim=True)
        scores = scores.masked_fill(~mask & real, -torch.inf)
        return scores.softmax(dim=1) * real


right(CHOOSER, "by einsum")(Chooser)


@mistake(CHOOSER, "mask forgotten", looks="`scores.softmax(dim=1)`",
         shows="padding is listened to", find=COMPANY, hint="padding gets a weight")
class UnmaskedAttentionPool(Chooser):
    def weights(self, scores, mask):
        return scores.softmax(dim=1)


@mistake(CHOOSER, "softmax over one score", looks="`self.score(hidden).softmax(dim=-1)`",
         shows="all weights are 1: a sum, not a mean", find="sum of the weights",
         hint="an axis of length 1")
class LoneAttentionPool(Chooser):
    def weights(self, scores, mask):
        return scores[..., None].softmax(-1)[..., 0] * mask


def answers(model, input_ids, attention_mask, extra):
    model.eval()
    with torch.no_grad():
        before = model(input_ids, attention_mask)
        after = model(F.pad(input_ids, (0, extra)), F.pad(attention_mask, (0, extra)))
    return after - before


@right(MOVES, "by pad")
def pad_padding_moves(model, input_ids, attention_mask, extra=3):
    return answers(model, input_ids, attention_mask, extra).abs().max().item()


@mistake(MOVES, "falls overlooked", looks="`(after - before).max()`",
         shows="0 for scores that only fall", find="look at the difference itself",
         hint="taken with their sign")
def signed_padding_moves(model, input_ids, attention_mask, extra=3):
    return answers(model, input_ids, attention_mask, extra).max().item()


@mistake(MOVES, "dropout measured", looks="`model.eval()` forgotten",
         shows="never 0, and another number each time", find="call it twice",
         hint="stays in it, so dropout is measured")
def training_padding_moves(model, input_ids, attention_mask, extra=3):
    with torch.no_grad():
        before = model(input_ids, attention_mask)
        after = model(F.pad(input_ids, (0, extra)), F.pad(attention_mask, (0, extra)))
    return (after - before).abs().max().item()


def book_work(c, n):
    d, layers = c.d_model, c.num_layers
    return {"projections": layers * 4 * n * d * d, "scores": layers * n * n * d,
            "values": layers * n * n * d, "feed-forward": layers * 2 * n * d * c.d_ff,
            "head": d * c.num_labels}


@right(WORK, "by formula")
def formula_count_multiplications(config, seq_len):
    counts = book_work(config, seq_len)
    return counts | {"total": sum(counts.values())}


@mistake(WORK, "heads multiplied", looks="`num_heads * seq_len ** 2 * d_model`",
         shows="long texts look dearer than they are", find="PyTorch's own counter",
         hint="num_heads multiplies")
def headed_count_multiplications(config, seq_len):
    counts = book_work(config, seq_len)
    counts["scores"] *= config.num_heads
    return counts | {"total": sum(counts.values())}


@mistake(WORK, "scores that grow with the length only", looks="`seq_len * d_model`",
         shows="long texts look cheap", find="double the length",
         hint="not with its square")
def linear_count_multiplications(config, seq_len):
    counts = book_work(config, seq_len)
    counts["scores"] //= seq_len
    return counts | {"total": sum(counts.values())}
