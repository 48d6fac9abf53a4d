"""Mistakes with pretraining: holes, two heads, a run, and files."""

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from datasets import concatenate_datasets
from safetensors.torch import load
from safetensors.torch import save as to_bytes
from tokenizers import Tokenizer
from torch import nn

from emoformer import pretraining as book
from emoformer.classifier import EmoformerConfig, TransformerForSequenceClassification, pool
from emoformer.data import (
    held_out_keys,
    load_go_emotions,
    load_sample,
    load_tweet_eval,
    remove_held_out,
)
from emoformer.encoder import init_weights
from emoformer.pretraining import MaskedLanguageHead, PretrainingConfig, PretrainingModel
from emoformer.tokens import bucket_by_length, make_batch
from emoformer.training import WordCutter, learning_rate_factor, parameter_groups, save_atomically
from emoformer.training import resume as resume_run
from tests.bank import mistake, right

CORRUPT, HEAD, LOSS, MODEL = (
    "corrupt", "MaskedLanguageHead", "masked_language_loss", "PretrainingModel")
MIXTURE, TABLE, SLICED = "load_mixture", "label_table", "sliced_cross_entropy"
CONFIG, RUN, FLOPS = "PretrainingConfig", "pretrain", "training_flops"
SAVE, LOAD = "save_half", "load_half"
COUNT = "spoil one sentence 20,000 times and count"
TWICE = "call it twice with generators of one seed"


# corrupt


class Corrupt:
    """Our function in steps, each of which a mistake can replace."""

    def __call__(self, input_ids, *, vocab_size, share, generator):
        self.check(vocab_size, share)
        self.ids, self.vocab_size, self.generator = input_ids, vocab_size, generator
        chosen = self.choose(share)
        spoilt = self.spoil(chosen)
        return spoilt, self.answer(spoilt, chosen)

    def check(self, vocab_size, share):
        if not 0 <= share <= 1:
            raise ValueError("share must be in [0, 1]")
        if vocab_size <= 5:
            raise ValueError("no ordinary tokens")

    def dice(self):
        return torch.rand(self.ids.shape, generator=self.generator)

    def draw(self):
        return torch.randint(5, self.vocab_size, self.ids.shape, generator=self.generator)

    def ordinary(self):
        return self.ids >= 5

    def choose(self, share):
        return (self.dice() < share) & self.ordinary()

    def parts(self, chosen):
        fate = self.dice()
        return chosen & (fate < 0.8), chosen & (fate >= 0.8) & (fate < 0.9)

    def spoil(self, chosen):
        masked, other = self.parts(chosen)
        return torch.where(other, self.draw(), self.ids.masked_fill(masked, 4))

    def answer(self, spoilt, chosen):
        return chosen


def as_function(cls):
    """A function with the book's signature from one of these classes."""
    def corrupt(input_ids, *, vocab_size, share, generator):
        return cls()(input_ids, vocab_size=vocab_size, share=share, generator=generator)
    return corrupt


def wrong(layer, name, **texts):
    """Put a class in steps into the bank, as a function."""
    def add(cls):
        mistake(layer, name, **texts)(as_function(cls))
        return cls
    return add


right(CORRUPT, "in steps")(as_function(Corrupt))


@wrong(CORRUPT, "special tokens chosen", looks="`chosen = dice < share`",
       shows="the model learns to guess [CLS] and padding: the loss looks good",
       find="`share=1`: chosen must be `ids >= 5`",
       hint="special tokens are chosen: [PAD], [UNK], [CLS], [SEP], [MASK]")
class SpecialChosen(Corrupt):
    def ordinary(self):
        return torch.ones_like(self.ids).bool()


@wrong(CORRUPT, "only padding spared", looks="`dice < share) & (ids != PAD_ID)`",
       shows="[CLS] and [SEP] are hidden now and then", find="`share=1`",
       hint="special tokens are chosen: [UNK], [CLS]")
class PaddingSpared(Corrupt):
    def ordinary(self):
        return self.ids != 0


@wrong(CORRUPT, "the first ordinary token spared", looks="`ids > len(SPECIAL_TOKENS)`",
       shows="one token is never asked for", find="a batch of nothing but id 5",
       hint="it is >= 5, not > 5")
class FirstSpared(Corrupt):
    def ordinary(self):
        return self.ids > 5


@wrong(CORRUPT, "drawn from 0", looks="`torch.randint(vocab_size, shape)`",
       shows="[PAD] and [CLS] in the middle of a text",
       find="smallest id among the replaced", hint="special tokens are drawn")
class DrawnFromZero(Corrupt):
    def draw(self):
        return torch.randint(self.vocab_size, self.ids.shape, generator=self.generator)


@wrong(CORRUPT, "the last token never drawn", looks="`torch.randint(5, vocab_size - 1, …)`",
       shows="nothing that one sees", find="largest id among the replaced",
       hint="is never drawn: the end of torch.randint")
class LastNeverDrawn(Corrupt):
    def draw(self):
        return torch.randint(5, self.vocab_size - 1, self.ids.shape, generator=self.generator)


@wrong(CORRUPT, "one replacement for all", looks="`torch.randint(5, vocab_size, (1,))`",
       shows="one word stands everywhere in a batch", find="count the replaced ids",
       hint="not drawn evenly")
class OneReplacement(Corrupt):
    def draw(self):
        return torch.randint(5, self.vocab_size, (1,), generator=self.generator)


@wrong(CORRUPT, "all chosen masked", looks="`ids.masked_fill(chosen, MASK_ID)`",
       shows="good at holes; in real work, without [MASK], a little worse", find=COUNT,
       hint="all chosen tokens become [MASK]")
class AllMasked(Corrupt):
    def parts(self, chosen):
        return chosen, chosen & False


@wrong(CORRUPT, "two independent dice",
       looks="`masked = chosen & (rand < 0.8)`; `other = chosen & ~masked & (rand2 < 0.1)`",
       shows="80, 2, 18: too many answers stand in the question", find=COUNT,
       hint="80, 2, 18")
class TwoDice(Corrupt):
    def parts(self, chosen):
        masked = chosen & (self.dice() < 0.8)
        return masked, chosen & ~masked & (self.dice() < 0.1)


@wrong(CORRUPT, "no token kept", looks="`other = chosen & ~masked`",
       shows="the model may trust that a chosen word is never right", find=COUNT,
       hint="no chosen token stays as it is")
class NoneKept(Corrupt):
    def parts(self, chosen):
        masked = chosen & (self.dice() < 0.8)
        return masked, chosen & ~masked


@wrong(CORRUPT, "rates of all tokens", looks="`masked = rand < 0.8` without `chosen &`",
       shows="nearly the whole text is gone, and few places are asked for",
       find="compare the unchosen places with the input",
       hint="that were not chosen")
class RatesOfAll(Corrupt):
    def parts(self, chosen):
        fate = self.dice()
        return self.ordinary() & (fate < 0.8), (fate >= 0.8) & (fate < 0.9) & self.ordinary()


@wrong(CORRUPT, "the input spoilt", looks="`input_ids[masked] = MASK_ID`",
       shows="the labels are [MASK]; the loss falls to 0 at once",
       find="clone before, compare after", hint="the input itself is spoilt")
class InputSpoilt(Corrupt):
    def spoil(self, chosen):
        masked, other = self.parts(chosen)
        drawn = self.draw()
        self.ids[masked] = 4
        self.ids[other] = drawn[other]
        return self.ids


@wrong(CORRUPT, "the kept tenth lost", looks="`chosen = spoilt != input_ids`",
       shows="the model is never asked where the word still stands",
       find=COUNT, hint="chosen holds only the positions whose token has changed")
class KeptLost(Corrupt):
    def answer(self, spoilt, chosen):
        return spoilt != self.ids


@wrong(CORRUPT, "labels in place of a mask",
       looks="`return spoilt, ids.masked_fill(~chosen, -100)`",
       shows="an error about indices far away", find="dtype of what comes back",
       hint="must be bool")
class LabelsReturned(Corrupt):
    def answer(self, spoilt, chosen):
        return self.ids.masked_fill(~chosen, -100)


@wrong(CORRUPT, "the generator forgotten in one draw", looks="`torch.rand(shape)`",
       shows="a run that was killed ends elsewhere", find=TWICE,
       hint="gives other holes each time")
class GlobalDice(Corrupt):
    def dice(self):
        return torch.rand(self.ids.shape)


@wrong(CORRUPT, "share ignored", looks="`chance < 0.15`", shows="sweeps over share are flat",
       find="`share=1`", hint="share is ignored")
class ShareIgnored(Corrupt):
    def choose(self, share):
        return super().choose(0.15)


@wrong(CORRUPT, "the same holes in all texts", looks="`torch.rand(seq_len)`",
       shows="less variety than the numbers say", find="mean over a column of chosen",
       hint="the same positions are chosen in all texts")
class SameHoles(Corrupt):
    def dice(self):
        return torch.rand(self.ids.shape[1], generator=self.generator).expand(self.ids.shape)


@wrong(CORRUPT, "the seed set inside", looks="`generator.manual_seed(0)`",
       shows="the same holes in each epoch", find="two calls with one generator",
       hint="the same holes")
class SeedInside(Corrupt):
    def choose(self, share):
        self.generator.manual_seed(0)
        return super().choose(share)


@wrong(CORRUPT, "nothing refused", looks="no check of share",
       shows="15 in place of 0.15 hides everything", find="`share=15`",
       hint="must be refused by a ValueError")
class NothingRefused(Corrupt):
    def check(self, vocab_size, share):
        pass

    def draw(self):
        return torch.randint(5, max(6, self.vocab_size), self.ids.shape,
                             generator=self.generator)


@right(CORRUPT, "a loop over tokens")
def corrupt_loop(input_ids, *, vocab_size, share, generator):
    if not (0 <= share <= 1) or vocab_size < 6:
        raise ValueError("share or vocab_size")
    dice = torch.rand(3, input_ids.numel(), generator=generator).tolist()
    flat, chosen = input_ids.flatten().tolist(), [False] * input_ids.numel()
    for i, (chance, fate, drawn) in enumerate(zip(*dice, strict=True)):
        if flat[i] >= 5 and chance < share:
            chosen[i] = True
            if fate < 0.8:
                flat[i] = 4
            elif fate < 0.9:
                flat[i] = 5 + int(drawn * (vocab_size - 5))
    shape = input_ids.shape
    return torch.tensor(flat).view(shape), torch.tensor(chosen).view(shape)


@right(CORRUPT, "by Bernoulli, the rest halved")
def corrupt_bernoulli(input_ids, vocab_size, share, generator):
    if share < 0 or share > 1 or vocab_size <= 5:
        raise ValueError("no")
    odds = torch.full(input_ids.shape, float(share))
    odds[input_ids < 5] = 0
    chosen = torch.bernoulli(odds, generator=generator).bool()
    masked = torch.bernoulli(torch.full(odds.shape, 0.8), generator=generator).bool() & chosen
    other = chosen & ~masked & torch.bernoulli(
        torch.full(odds.shape, 0.5), generator=generator).bool()
    out = input_ids.clone()
    out[masked] = 4
    out[other] = torch.randint(5, vocab_size, (int(other.sum()),), generator=generator)
    return out, chosen


# MaskedLanguageHead


class Head(MaskedLanguageHead):
    """Our head in steps."""

    def forward(self, hidden):
        return self.score(self.norm(self.bend(self.turn(hidden))))

    def turn(self, hidden):
        return self.dense(hidden)

    def bend(self, x):
        return F.gelu(x)

    def score(self, x):
        return self.decoder(x)


right(HEAD, "step by step")(Head)


@mistake(HEAD, "not tied", looks="`self.decoder = nn.Linear(d_model, vocab_size)`",
         shows="a third more parameters, and rare words learn less",
         find="`head.decoder.weight is embedding.weight`", hint="has a table of its own")
class NotTied(Head):
    def __init__(self, token_weight):
        super().__init__(token_weight)
        self.decoder = nn.Linear(*token_weight.shape[::-1])


@mistake(HEAD, "tied to a copy", looks="`nn.Parameter(token_weight.clone())`",
         shows="equal at the first step, apart after it", find="train one step and compare",
         hint="has a copy of the table")
class TiedCopy(Head):
    def __init__(self, token_weight):
        super().__init__(token_weight)
        self.decoder.weight = nn.Parameter(token_weight.detach().clone())


@mistake(HEAD, "the values copied in", looks="`self.decoder.weight.data.copy_(token_weight)`",
         shows="as above", find="as above", hint="has a copy of the table")
class ValuesCopied(Head):
    def __init__(self, token_weight):
        super().__init__(token_weight)
        self.decoder = nn.Linear(*token_weight.shape[::-1])
        self.decoder.weight.data.copy_(token_weight)


@mistake(HEAD, "wrapped again", looks="`nn.Parameter(token_weight.data)`",
         shows="the optimizer moves one table twice", find="`parameters()` lists it twice",
         hint="wrapped in a Parameter of its own")
class WrappedAgain(Head):
    def __init__(self, token_weight):
        super().__init__(token_weight)
        self.decoder.weight = nn.Parameter(token_weight.data)


@mistake(HEAD, "the table redrawn", looks="`self.apply(init_weights)` after tying",
         shows="a loaded embedding is lost when the head is made",
         find="the table before and after", hint="overwrites the embedding's table")
class TableRedrawn(Head):
    def __init__(self, token_weight):
        super().__init__(token_weight)
        self.apply(init_weights)


@mistake(HEAD, "the table detached", looks="`F.linear(x, self.decoder.weight.detach())`",
         shows="the holes teach no word vectors", find="gradient of the embedding",
         hint="table gets no gradient")
class TableDetached(Head):
    def score(self, x):
        return F.linear(x, self.decoder.weight.detach(), self.decoder.bias)


@mistake(HEAD, "no GELU", looks="`self.norm(self.dense(hidden))`",
         shows="a little worse; BERT's weights give other guesses",
         find="compare with the formula", hint="the GELU is missing")
class NoGelu(Head):
    def bend(self, x):
        return x


@mistake(HEAD, "tanh in place of GELU", looks="`torch.tanh(self.dense(hidden))`",
         shows="as above (BERT's pooler has the tanh)", find="as above", hint="uses tanh in")
class Tanh(Head):
    def bend(self, x):
        return torch.tanh(x)


@mistake(HEAD, "no norm", looks="`self.decoder(gelu(self.dense(hidden)))`",
         shows="scores grow during training", find="as above", hint="but not applied")
class NoNorm(Head):
    def forward(self, hidden):
        return self.score(self.bend(self.turn(hidden)))


@mistake(HEAD, "no bias for the words", looks="`hidden @ self.token_weight.T`",
         shows="word frequencies are learned late and clumsily",
         find="count the parameters", hint="bias of each word is missing")
class NoWordBias(Head):
    def __init__(self, token_weight):
        super().__init__(token_weight)
        self.decoder.bias = None


@mistake(HEAD, "softmax inside", looks="`return scores.softmax(-1)`",
         shows="the loss starts right and hardly falls", find="row sums: they must not be 1",
         hint="returns chances")
class SoftmaxInside(Head):
    def score(self, x):
        return super().score(x).softmax(-1)


@mistake(HEAD, "norm over the tokens", looks="`nn.LayerNorm` over another axis",
         shows="a guess depends on the other holes", find="score one place alone",
         hint="wrong axis")
class NormOverTokens(Head):
    def forward(self, hidden):
        x = self.bend(self.turn(hidden))
        x = (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt()
        return self.score(x * self.norm.weight + self.norm.bias)


@right(HEAD, "nn.Sequential, other names, the table held as it is")
class SequentialHead(nn.Module):
    def __init__(self, weight):
        super().__init__()
        vocab, d = weight.shape
        self.transform = nn.Sequential(nn.Linear(d, d), nn.GELU(), nn.LayerNorm(d))
        self.table, self.bias = weight, nn.Parameter(torch.zeros(vocab))

    def forward(self, x):
        return torch.einsum("...d,vd->...v", self.transform(x), self.table) + self.bias


# masked_language_loss


def labels_of(logits, input_ids, chosen):
    labels = input_ids[chosen]
    if len(labels) != len(logits):
        raise ValueError("logits and places")
    return labels


@mistake(LOSS, "a sum", looks="`reduction='sum'`",
         shows="long batches count more; the learning rate no longer fits",
         find="twice the batch: the same loss", hint="it is the sum over the chosen")
def loss_sum(logits, input_ids, chosen):
    labels = labels_of(logits, input_ids, chosen)
    return F.cross_entropy(logits, labels, reduction="sum")


@mistake(LOSS, "averaged over all places", looks="`total / input_ids.numel()`",
         shows="the loss looks seven times too good", find="ln of the vocabulary at the start",
         hint="divided by all places")
def loss_all_places(logits, input_ids, chosen):
    labels = labels_of(logits, input_ids, chosen)
    return F.cross_entropy(logits, labels, reduction="sum") / chosen.numel()


@mistake(LOSS, "NaN where nothing is chosen", looks="`F.cross_entropy(logits, labels)`",
         shows="one short batch, and every weight is NaN", find="`chosen` of nothing but False",
         hint="the mean of no numbers")
def loss_nan(logits, input_ids, chosen):
    return F.cross_entropy(logits, labels_of(logits, input_ids, chosen))


@mistake(LOSS, "a bare zero", looks="`return torch.tensor(0.0)`",
         shows="backward() raises at the first batch without holes",
         find="as above, with `backward`", hint="the loss is a bare 0")
def loss_bare_zero(logits, input_ids, chosen):
    labels = labels_of(logits, input_ids, chosen)
    return F.cross_entropy(logits, labels) if len(labels) else torch.tensor(0.0)


@mistake(LOSS, "labels column by column", looks="`input_ids.T[chosen.T]`",
         shows="the model can't learn, and every shape is right",
         find="a batch of two texts by hand", hint="column by column")
def loss_columns(logits, input_ids, chosen):
    labels = labels_of(logits, input_ids.T, chosen.T)
    return F.cross_entropy(logits, labels) if len(labels) else logits.sum()


@mistake(LOSS, "softmax twice", looks="`F.cross_entropy(logits.softmax(-1), labels)`",
         shows="the loss falls a little and stays near ln of the vocabulary",
         find="a sure and right answer must cost 0", hint="a softmax is applied before")
def loss_softmax_twice(logits, input_ids, chosen):
    labels = labels_of(logits, input_ids, chosen)
    return F.cross_entropy(logits.softmax(-1), labels) if len(labels) else logits.sum()


@mistake(LOSS, "log of the softmax", looks="`-logits.softmax(-1).log()`",
         shows="inf as soon as the model is sure and wrong", find="logits of 1,000",
         hint="loud scores give an infinite loss")
def loss_log_softmax(logits, input_ids, chosen):
    labels = labels_of(logits, input_ids, chosen)
    if not len(labels):
        return logits.sum()
    return -logits.softmax(-1).gather(1, labels[:, None]).log().mean()


@mistake(LOSS, "a clamp against log(0)", looks="`(p + 1e-9).log()`",
         shows="very wrong answers teach nothing", find="logits of 1,000",
         hint="a clamp or an eps")
def loss_clamp(logits, input_ids, chosen):
    labels = labels_of(logits, input_ids, chosen)
    if not len(labels):
        return logits.sum()
    return -(logits.softmax(-1).gather(1, labels[:, None]) + 1e-9).log().mean()


@mistake(LOSS, "a wrong count accepted", looks="`logits[: len(labels)]`",
         shows="answers are compared with the wrong questions",
         find="one row of logits too many", hint="must be refused by a ValueError")
def loss_cut(logits, input_ids, chosen):
    labels = input_ids[chosen]
    count = min(len(labels), len(logits))
    return F.cross_entropy(logits[:count], labels[:count]) if count else logits.sum()


@mistake(LOSS, "an ignored label", looks="`ignore_index=0`",
         shows="harmless here, until 0 is a word", find="a chosen place with id 0",
         hint="chosen places with a small id are left out")
def loss_ignore(logits, input_ids, chosen):
    labels = labels_of(logits, input_ids, chosen)
    return F.cross_entropy(logits, labels, ignore_index=0) if len(labels) else logits.sum()


@mistake(LOSS, "mean of the texts' means", looks="a loop over texts, then `.mean()`",
         shows="a text with one hole counts as much as one with ten",
         find="texts with different numbers of holes", hint="each text's mean is taken first")
def loss_by_text(logits, input_ids, chosen):
    labels = labels_of(logits, input_ids, chosen)
    if not len(labels):
        return logits.sum()
    rows = chosen.nonzero()[:, 0]
    each = F.cross_entropy(logits, labels, reduction="none")
    return torch.stack([each[rows == row].mean() for row in rows.unique()]).mean()


@right(LOSS, "by log_softmax and nll_loss")
def loss_nll(logits, input_ids, chosen):
    labels = labels_of(logits, input_ids, chosen)
    total = F.nll_loss(logits.log_softmax(-1), labels, reduction="sum")
    return total / max(1, len(labels))


@right(LOSS, "a loop over places")
def loss_loop(logits, input_ids, chosen):
    places = chosen.nonzero().tolist()
    assert len(places) == len(logits), "one row a place"
    total = logits.sum() * 0
    for row, (b, t) in zip(logits, places, strict=True):
        total = total + row.logsumexp(0) - row[input_ids[b, t]]
    return total / (len(places) or 1)


# PretrainingModel


class Model(PretrainingModel):
    """Our model in steps."""

    def forward(self, input_ids, attention_mask=None, chosen=None):
        if chosen is None:
            chosen = torch.ones_like(input_ids).bool()
        hidden = self.classifier.encode(input_ids, attention_mask)
        return self.labels(hidden, attention_mask), self.words(hidden, chosen)

    def labels(self, hidden, mask):
        pooled = pool(hidden, mask, self.config.pooling)
        return self.classifier.head(self.classifier.dropout(pooled))

    def words(self, hidden, chosen):
        return self.masked_head(hidden[chosen])


right(MODEL, "step by step")(Model)


@mistake(MODEL, "all places scored", looks="`self.masked_head(hidden)`",
         shows="memory grows sevenfold", find="shape of the words' logits",
         hint="all places are scored")
class AllScored(Model):
    def words(self, hidden, chosen):
        return self.masked_head(hidden)


@mistake(MODEL, "the mask not passed on", looks="`self.classifier.encode(input_ids)`",
         shows="answers depend on the neighbours in the batch",
         find="a text alone and in a batch", hint="mask is not passed to the encoder")
class MaskLost(Model):
    def forward(self, input_ids, attention_mask=None, chosen=None):
        if chosen is None:
            chosen = torch.ones_like(input_ids).bool()
        hidden = self.classifier.encode(input_ids)
        return self.labels(hidden, attention_mask), self.words(hidden, chosen)


@mistake(MODEL, "padding pooled", looks="`pool(hidden, None, …)`",
         shows="short texts in long batches get other labels", find="as above",
         hint="the mean is taken over padding")
class PaddingPooled(Model):
    def labels(self, hidden, mask):
        return super().labels(hidden, None)


@mistake(MODEL, "pooling fixed", looks="`hidden[:, 0]`",
         shows="config.pooling changes nothing", find="two poolings, two answers",
         hint="the pooling is cls")
class PoolingFixed(Model):
    def labels(self, hidden, mask):
        return self.classifier.head(self.classifier.dropout(hidden[:, 0]))


@mistake(MODEL, "read twice", looks="`self.classifier(ids, mask)` and `encode(ids, mask)`",
         shows="twice as slow; with dropout two different readings",
         find="a hook that counts", hint="the encoder reads 2 times")
class ReadTwice(Model):
    def forward(self, input_ids, attention_mask=None, chosen=None):
        _, words = super().forward(input_ids, attention_mask, chosen)
        return self.classifier(input_ids, attention_mask), words


@mistake(MODEL, "not tied", looks="`MaskedLanguageHead(nn.Parameter(…))`",
         shows="a third more parameters", find="count them",
         hint="does not hold the embedding's own table")
class ModelNotTied(Model):
    def __init__(self, config, **classes):
        super().__init__(config, **classes)
        table = self.classifier.embedding.token.weight
        self.masked_head = MaskedLanguageHead(nn.Parameter(table.detach().clone()))


@mistake(MODEL, "no dropout before the head", looks="`self.classifier.head(pooled)`",
         shows="the head learns the training labels by heart", find="a hook on the dropout",
         hint="does not pass the classifier's dropout")
class NoHeadDropout(Model):
    def labels(self, hidden, mask):
        return self.classifier.head(pool(hidden, mask, self.config.pooling))


@mistake(MODEL, "classes not passed on", looks="`TransformerForSequenceClassification(config)`",
         shows="your own layer is checked, and never used", find="`isinstance` of a sublayer",
         hint="do not reach the classifier")
class ClassesLost(Model):
    def __init__(self, config, **classes):
        super().__init__(config)


@mistake(MODEL, "the labels detached", looks="`head(pooled.detach())`",
         shows="the labels teach the head and nothing below", find="gradients of the encoder",
         hint="do not teach the encoder")
class LabelsDetached(Model):
    def labels(self, hidden, mask):
        return super().labels(hidden.detach(), mask)


@mistake(MODEL, "answers exchanged", looks="`return words, labels`",
         shows="an error about shapes in the loss", find="shapes",
         hint="the two answers are exchanged")
class Exchanged(Model):
    def forward(self, *arguments, **named):
        return super().forward(*arguments, **named)[::-1]


# load_mixture


def mixture(*, splits=("train", "validation", "test"), clean=lambda dataset, keys: (
            remove_held_out(dataset, keys)), keys=held_out_keys, whole=False, catch=(
            FileNotFoundError, ConnectionError), last=None, more=()):
    """Our function with one part replaced."""
    pieces, missing, keys = {}, [], keys()
    for name in ("go_emotions", "emoji", "sentiment", "hate", "irony", "offensive", *more):
        parts = []
        for split in splits:
            try:
                if name == "go_emotions":
                    parts.append(load_go_emotions()[split])
                elif whole:
                    parts.append(load_tweet_eval(name)[split])
                else:
                    parts.append(load_tweet_eval(name, [split])[split])
            except catch:
                missing.append(f"{name}/{split}")
        if parts:
            pieces[name] = clean(concatenate_datasets(parts), keys)
    if not pieces:
        return {"sample": load_sample()["train"]}, missing
    if last is None:
        train = remove_held_out(load_tweet_eval("emotion")["train"], keys)
        pieces["unlabelled"] = train.select_columns("text")
    else:
        pieces["unlabelled"] = last(keys)
    return pieces, missing


@mistake(MIXTURE, "held-out texts left in", looks="no `remove_held_out`",
         shows="a test score a little too good: the model has seen the exam",
         find="count `comparison_key(text) in held_out_keys()`", hint="may not be trained on")
def mixture_dirty():
    return mixture(clean=lambda dataset, keys: dataset)


@mistake(MIXTURE, "compared letter by letter", looks="`text not in held_out_texts`",
         shows="retweets with another full stop slip in", find="as above",
         hint="disguised copies")
def mixture_exact():
    def clean(dataset, keys):
        return dataset.select(
            [i for i, text in enumerate(dataset["text"]) if text not in keys])
    return mixture(clean=clean)


@mistake(MIXTURE, "one task held out only", looks="keys of `emotion` alone",
         shows="GoEmotions holds the test set of `six`, with its labels", find="as above",
         hint="of the task six are left")
def mixture_one_task():
    def keys():
        return {key for key in held_out_keys() if key.startswith("emotion")}
    return mixture(keys=keys)


@mistake(MIXTURE, "unlabelled not cleaned", looks="`load_tweet_eval('emotion')['train']`",
         shows="a test tweet that stands in train too is read", find="as above",
         hint="the piece unlabelled still holds")
def mixture_unlabelled_dirty():
    return mixture(last=lambda keys: concatenate_datasets([
        load_tweet_eval("emotion")["train"].select_columns("text")]))


@mistake(MIXTURE, "validation tweets read", looks="all splits of `emotion`",
         shows="the model has read what it is chosen by", find="as above",
         hint="the piece unlabelled")
def mixture_all_emotion():
    return mixture(last=lambda keys: concatenate_datasets([
        load_tweet_eval("emotion")[s].select_columns("text") for s in ("train", "validation")]))


@mistake(MIXTURE, "labels of the reported task", looks="no `select_columns('text')`",
         shows="pretraining learns what fine-tuning is to be measured by",
         find="`column_names`", hint="the piece unlabelled has labels")
def mixture_labelled():
    return mixture(last=lambda keys: remove_held_out(load_tweet_eval("emotion")["train"], keys))


@mistake(MIXTURE, "train splits only", looks="`load_tweet_eval(task)['train']`",
         shows="a fifth of the texts is given away", find="count the texts",
         hint="split are lost: all splits")
def mixture_train_only():
    return mixture(splits=("train",))


@mistake(MIXTURE, "all splits or none", looks="`load_tweet_eval(task)` in one try",
         shows="one file is missing, and a piece of 60,000 tweets is gone",
         find="a folder without one split", hint="missing splits must be named")
def mixture_whole():
    return mixture(whole=True)


@mistake(MIXTURE, "every error passed over", looks="`except Exception: continue`",
         shows="a broken file looks like a missing one", find="spoil a labels file",
         hint="a malformed file is passed over")
def mixture_catches_all():
    return mixture(catch=Exception)


right(MIXTURE, "written out")(lambda: mixture())


# label_table


def rows_of(pieces):
    return [(piece, d.features["label"].names) for piece, d in pieces.items()
            if "label" in d.column_names]


@mistake(TABLE, "counted from 1", looks="`start = 1`", shows="the first output is never taught",
         find="`slices` of the first piece", hint="counted from 1")
def table_from_one(mixture):
    names, slices, start = [], {}, 1
    for piece, labels in rows_of(mixture):
        slices[piece] = range(start, start + len(labels))
        start += len(labels)
        names += [f"{piece}/{label}" for label in labels]
    return names, slices


@mistake(TABLE, "one too long", looks="`range(start, start + len(labels) + 1)`",
         shows="a text may choose a label of the next piece", find="length of each range",
         hint="one too long")
def table_long(mixture):
    names, slices = [], {}
    for piece, labels in rows_of(mixture):
        slices[piece] = range(len(names), len(names) + len(labels) + 1)
        names += [f"{piece}/{label}" for label in labels]
    return names, slices


@mistake(TABLE, "every piece from 0", looks="`range(len(labels))`",
         shows="all questions share the first outputs", find="do the ranges overlap?",
         hint="every piece begins at output 0")
def table_zero(mixture):
    names = [f"{piece}/{label}" for piece, labels in rows_of(mixture) for label in labels]
    return names, {piece: range(len(labels)) for piece, labels in rows_of(mixture)}


@mistake(TABLE, "counted after adding", looks="`range(len(names), …)` after `names +=`",
         shows="an index error, or the wrong question", find="as above", hint="Here mood has")
def table_late(mixture):
    names, slices = [], {}
    for piece, labels in rows_of(mixture):
        names += [f"{piece}/{label}" for label in labels]
        slices[piece] = range(len(names), len(names) + len(labels))
    return names, slices


@mistake(TABLE, "only labels that occur", looks="`sorted(set(dataset['label']))`",
         shows="label numbers and outputs no longer fit", find="a label that nobody has",
         hint="only labels that occur")
def table_occurring(mixture):
    names, slices = [], {}
    for piece, dataset in mixture.items():
        if "label" in dataset.column_names:
            labels = [dataset.features["label"].names[i] for i in sorted(set(dataset["label"]))]
            slices[piece] = range(len(names), len(names) + len(labels))
            names += [f"{piece}/{label}" for label in labels]
    return names, slices


@mistake(TABLE, "same names shared", looks="`if label not in names`",
         shows="two pieces teach one output different things",
         find="two pieces with one label name", hint="share one output")
def table_shared(mixture):
    names, slices = [], {}
    for piece, labels in rows_of(mixture):
        slices[piece] = range(len(names), len(names) + len(labels))
        names += [label for label in labels if label not in names]
    return names, slices


@mistake(TABLE, "a range for the unlabelled", looks="`slices[piece] = range(n, n)`",
         shows="`-1` is looked up in an empty range", find="keys of the dict",
         hint="the piece without labels is in the dict")
def table_unlabelled(mixture):
    names, slices = book.label_table(mixture)
    return names, slices | {"bare": range(3, 3)}


@right(TABLE, "by itertools")
def table_accumulate(mixture):
    from itertools import accumulate

    rows = rows_of(mixture)
    ends = list(accumulate(len(labels) for _, labels in rows))
    return [f"{p}/{x}" for p, labels in rows for x in labels], {
        piece: range(end - len(labels), end)
        for (piece, labels), end in zip(rows, ends, strict=True)
    }


# sliced_cross_entropy


@mistake(SLICED, "outputs not closed", looks="`F.cross_entropy(logits, labels)`",
         shows="whoever labelled the mood is taken to have said: not ironic",
         find="exercise 4", hint="other pieces are not closed")
def sliced_open(logits, labels, allowed):
    keep = labels >= 0
    if not keep.any():
        return logits.sum() * 0
    return F.cross_entropy(logits[keep], labels[keep], reduction="sum") / len(labels)


@mistake(SLICED, "closed by zero", looks="`logits * allowed`",
         shows="closed outputs still take a share: e⁰ is 1", find="compare with two heads",
         hint="set to 0, but e^0 is 1")
def sliced_zero(logits, labels, allowed):
    keep = labels >= 0
    if not keep.any():
        return logits.sum() * 0
    return F.cross_entropy((logits * allowed)[keep], labels[keep], reduction="sum") / len(labels)


@mistake(SLICED, "divided by the labelled", looks="`F.cross_entropy(…)` of the labelled alone",
         shows="a batch with two labels shouts as loud as one with a hundred",
         find="add a text without a label", hint="divided by the labelled texts")
def sliced_labelled(logits, labels, allowed):
    keep = labels >= 0
    if not keep.any():
        return logits.sum() * 0
    return F.cross_entropy(logits.masked_fill(~allowed, -torch.inf)[keep], labels[keep])


@mistake(SLICED, "-1 counted", looks="`gather` with -1, or `labels.clamp(0)`",
         shows="texts without a label teach label 0", find="add a text without a label",
         hint="as if their label were 0")
def sliced_minus_one(logits, labels, allowed):
    keep = labels >= 0
    if not keep.any():
        return logits.sum() * 0
    shut = logits.masked_fill(~allowed & keep[:, None], -torch.inf)
    return F.cross_entropy(shut, labels.clamp(min=0))


@mistake(SLICED, "NaN without labels", looks="`cross_entropy(logits[keep], labels[keep])`",
         shows="a batch of unlabelled texts, and all is NaN", find="labels of nothing but -1",
         hint="the mean of no numbers")
def sliced_nan(logits, labels, allowed):
    keep = labels >= 0
    shut = logits.masked_fill(~allowed, -torch.inf)[keep]
    return F.cross_entropy(shut, labels[keep]) * keep.float().mean()


@mistake(SLICED, "mask inverted", looks="`masked_fill(allowed, -inf)`",
         shows="the loss is infinite at once", find="one text by hand",
         hint="the mask is inverted")
def sliced_inverted(logits, labels, allowed):
    return book.sliced_cross_entropy(logits, labels, ~allowed)


@mistake(SLICED, "infinity times 0", looks="`-(one_hot * log_probs).sum()`",
         shows="0 · -inf is NaN", find="compare with two heads",
         hint="it is not the sum of -log")
def sliced_inf_times_zero(logits, labels, allowed):
    keep = labels >= 0
    if not keep.any():
        return logits.sum() * 0
    log = logits.masked_fill(~allowed, -torch.inf)[keep].log_softmax(-1)
    hot = F.one_hot(labels[keep], logits.shape[1])
    return -(hot * log).sum() / len(labels)


@mistake(SLICED, "closed by -100", looks="`masked_fill(~allowed, -100)`",
         shows="leaks for loud scores, and a little gradient", find="scores of 1,000",
         hint="closed outputs need minus infinity")
def sliced_hundred(logits, labels, allowed):
    keep = labels >= 0
    if not keep.any():
        return logits.sum() * 0
    shut = logits.masked_fill(~allowed, -100.0)[keep]
    return F.cross_entropy(shut, labels[keep], reduction="sum") / len(labels)


@mistake(SLICED, "a sum", looks="`reduction='sum'`", shows="larger batches, larger steps",
         find="twice the batch: the same loss", hint="it is the sum over the texts")
def sliced_sum(logits, labels, allowed):
    return book.sliced_cross_entropy(logits, labels, allowed) * len(labels)


@right(SLICED, "by ignore_index")
def sliced_ignore(logits, labels, allowed):
    shut = logits.masked_fill(~(allowed | (labels < 0)[:, None]), float("-inf"))
    return F.cross_entropy(shut, labels, ignore_index=-1, reduction="sum") / labels.numel()


@right(SLICED, "a loop over texts")
def sliced_loop(logits, labels, allowed):
    total = logits.sum() * 0
    for row, label, mine in zip(logits, labels, allowed, strict=True):
        if label >= 0:
            total = total + row[mine].logsumexp(0) - row[label]
    return total / len(labels)


# PretrainingConfig


@mistake(CONFIG, "not frozen", looks="`@dataclass`", shows="a checked value is changed later",
         find="`config.epochs = 9`", hint="can be changed after")
@dataclass
class Thawed(PretrainingConfig.__mro__[1]):
    seed: int = 0
    epochs: int = 4
    steps: int | None = None
    batch_size: int = 128
    learning_rate: float = 1e-3
    warmup: float = 0.05
    weight_decay: float = 0.01
    clip: float = 1.0
    share: float = 0.15
    words: float = 1.0
    labels: float = 1.0
    bpe_dropout: float = 0.1
    precision: str = "auto"

    def __post_init__(self):
        PretrainingConfig(**asdict(self))


@mistake(CONFIG, "nothing checked", looks="no `__post_init__`",
         shows="15 in place of 0.15 trains for an hour on nothing",
         find="`PretrainingConfig(share=15)`", hint="Check it in __post_init__")
@dataclass(frozen=True)
class Unchecked(PretrainingConfig):
    def __post_init__(self):
        pass


@mistake(CONFIG, "zero refused as missing", looks="`if not self.words: raise`",
         shows="a loss can't be switched off", find="`words=0`", hint="but it is allowed")
@dataclass(frozen=True)
class ZeroRefused(PretrainingConfig):
    def __post_init__(self):
        super().__post_init__()
        if not self.words:
            raise ValueError("words is missing")


@mistake(CONFIG, "a message without the value", looks="`raise ValueError('bad config')`",
         shows="which of thirteen numbers is it?", find="read the message",
         hint="does not name the setting")
@dataclass(frozen=True)
class Silent(PretrainingConfig):
    def __post_init__(self):
        try:
            super().__post_init__()
        except ValueError:
            raise ValueError("bad config") from None


# pretrain


def run(model, tokenizer, mixture, config, folder, *, report=100, **how):
    """Our loop in plain PyTorch; ``how`` says which part is done wrongly."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    texts, labels, pieces, allowed = book._spread_out(mixture)
    if how.get("check", True) and allowed.shape[1] != model.config.num_labels:
        raise ValueError("num_labels")
    optimizer = torch.optim.AdamW(
        how.get("groups", parameter_groups)(model, config.weight_decay),
        lr=config.learning_rate)
    settings = {"run": asdict(config), "texts": len(texts)}
    if how.get("settings") == "none":
        settings = {}
    path = folder / "state.pt"
    history = resume_run(path, settings, model, optimizer) if how.get("resume", True) else []
    if how.get("moments") == "lost" and history:
        optimizer = torch.optim.AdamW(
            parameter_groups(model, config.weight_decay), lr=config.learning_rate)
    done = history[-1]["step"] if history else 0
    tokens = history[-1]["tokens"] if history else 0
    if how.get("tokens") == "restarted":
        tokens = 0
    size = config.batch_size
    an_epoch = math.ceil(len(texts) / size)
    total = config.epochs * an_epoch
    if how.get("steps", True):
        total = min(total, config.steps or total)
    cutter = WordCutter(tokenizer, texts, dropout=how.get("cut", config.bpe_dropout),
                        max_len=model.config.max_len, ways=6)
    model.train(how.get("train", True))
    sums = [0.0, 0.0]
    since = done
    for epoch in range(math.ceil(total / an_epoch)):
        seed = 1_000_003 * config.seed + (0 if how.get("epoch") == "same" else 1009 * epoch)
        if how.get("seed") == "ignored":
            seed = 7 + 1009 * epoch
        rows = cutter(seed)
        batches = bucket_by_length([len(r) for r in rows], batch_size=size, seed=seed)
        if how.get("last") == "dropped":
            batches = [b for b in batches if len(b) == size]
        for step, which in enumerate(batches, start=epoch * an_epoch):
            if step < done or step >= total:
                continue
            batch = make_batch([rows[i] for i in which], vocab_size=model.config.vocab_size)
            number = seed + (0 if how.get("holes") == "same" else step)
            if how.get("dice", True):
                torch.manual_seed(number)
            share = how.get("share", config.share)
            ids = batch["input_ids"]
            spoilt, chosen = book.corrupt(
                ids, vocab_size=model.config.vocab_size, share=share,
                generator=torch.Generator().manual_seed(number))
            at = step + how.get("late", 0)
            factor = how.get("factor", learning_rate_factor)(
                at, warmup=round(config.warmup * total), total=total)
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * factor
            shown = ids if how.get("shown") == "all" else spoilt
            mask = None if how.get("mask") == "none" else batch["attention_mask"]
            label_logits, word_logits = model(shown, mask, chosen)
            asked = spoilt if how.get("asked") == "spoilt" else ids
            of_words = book.masked_language_loss(word_logits, asked, chosen)
            order = sorted(which) if how.get("rows") == "sorted" else which
            open_ = allowed[pieces[order]]
            if how.get("slices") == "none":
                open_ = torch.ones_like(open_)
            of_labels = book.sliced_cross_entropy(label_logits, labels[order], open_)
            w, x = how.get("weights", (config.words, config.labels))
            loss = w * of_words + x * of_labels
            if how.get("finite", True) and not loss.isfinite():
                raise FloatingPointError("loss")
            if how.get("zero", True):
                optimizer.zero_grad()
            loss.backward()
            if how.get("clip", True):
                nn.utils.clip_grad_norm_(model.parameters(), how.get("norm", config.clip))
            optimizer.step()
            tokens += ids.numel() if how.get("tokens") == "padded" else int(
                batch["attention_mask"].sum())
            factor_of = (w, x) if how.get("told") == "weighted" else (1, 1)
            sums = [sums[0] + factor_of[0] * of_words.item(),
                    sums[1] + factor_of[1] * of_labels.item()]
            last = step + 1 == total and how.get("end", True)
            if (step + 1) % report == 0 or last:
                count = step + 1 - since if how.get("mean", True) else report
                history.append({"step": step + 1, "tokens": tokens,
                                "words": sums[0] / count, "labels": sums[1] / count})
                since = step + 1
                if how.get("reset", True):
                    sums = [0.0, 0.0]
                save_atomically({
                    "settings": settings, "history": history, "model": model.state_dict(),
                    "optimizer": optimizer.state_dict()}, path)
    return history


def runner(**how):
    """A pretrain with one part done wrongly."""
    def pretrain(model, tokenizer, mixture, config, folder, *, report=100):
        return run(model, tokenizer, mixture, config, folder, report=report, **how)
    return pretrain


right(RUN, "in plain PyTorch")(runner())
REPLAY = "take three steps by hand and compare the weights"
for _name, _how, _looks, _shows, _find, _hint in (
    ("zero_grad forgotten", {"zero": False}, "no `optimizer.zero_grad()`",
     "the loss falls, then jumps about", REPLAY, "zero_grad"),
    ("not clipped", {"clip": False}, "no `clip_grad_norm_`",
     "now and then a step that throws it back", REPLAY, "gradients are not clipped"),
    ("clipped to 1", {"norm": 1.0}, "`clip_grad_norm_(…, 1.0)`", "config.clip is ignored",
     REPLAY, "clipped to 1, not to config.clip"),
    ("constant learning rate", {"factor": lambda *_, **__: 1.0}, "`lr=config.learning_rate`",
     "a rough start, and noise at the end", REPLAY, "learning rate never changes"),
    ("learning rate one step late", {"late": 1}, "`factor(step + 1)`",
     "nothing that one sees", REPLAY, "one step ahead"),
    ("biases decayed", {"groups": lambda m, d: [{"params": m.parameters(), "weight_decay": d}]},
     "`AdamW(model.parameters(), weight_decay=…)`", "norms pulled to 0", REPLAY,
     "biases and norms are decayed"),
    ("weights of the losses ignored", {"weights": (1.0, 1.0)}, "`loss = words + labels`",
     "words=0 still learns words", REPLAY, "config.words and config.labels"),
    ("the spoilt ids asked for", {"asked": "spoilt"}, "`loss(logits, spoilt, chosen)`",
     "the answer to most holes is [MASK]: the loss is near 0", "look at the loss's start",
     "asks for the spoilt ids"),
    ("unspoilt text shown", {"shown": "all"}, "`model(batch['input_ids'], …)`",
     "the answer stands in the question", "the loss falls far too fast",
     "is shown the words"),
    ("no mask passed", {"mask": "none"}, "`model(spoilt, chosen=chosen)`", "padding is read",
     "a text alone and in a batch", "no attention mask"),
    ("all outputs open", {"slices": "none"}, "`allowed` not used",
     "57 classes in place of 28", "the loss's start: ln 28, not ln 57",
     "among the outputs of all pieces"),
    ("labels in another order", {"rows": "sorted"}, "labels of `sorted(batch)`",
     "the labels' loss stays where it was", "one batch by heart",
     "at the first step the words' loss must be"),
    ("evaluation mode", {"train": False}, "no `model.train()`", "dropout is off",
     "`model.training` in the loop", "in evaluation mode while it learns"),
    ("last batch dropped", {"last": "dropped"}, "`if len(batch) == batch_size`",
     "some texts are never read", "count the texts of an epoch", "steps, but there are"),
    ("every epoch the same", {"epoch": "same"}, "`seed = config.seed`",
     "the same holes and the same order each time", "compare two epochs",
     "in the same order"),
    ("every step the same holes", {"holes": "same"}, "`generator.manual_seed(seed)`",
     "places are chosen by their number in the batch", "compare two steps",
     "every step has the same holes"),
    ("global dice not set", {"dice": False}, "no `torch.manual_seed(step)`",
     "dropout differs after a resume", "kill and resume", "dropout would fall otherwise"),
    ("share ignored", {"share": 0.15}, "`share=0.15`", "sweeps are flat", "count the holes",
     "is config.share passed"),
    ("BPE-dropout ignored", {"cut": 0.0}, "`encode(…)` in place of `WordCutter`",
     "rare pieces get no practice", "lengths of the rows", "words must fall into more pieces"),
    ("seed ignored", {"seed": "ignored"}, "`seed=7`", "five seeds, one run",
     "two seeds", "config.seed is not used"),
    ("begins again", {"resume": False}, "nothing loaded", "a power cut costs the night",
     "kill and resume", "begins again from the first step"),
    ("moments lost", {"moments": "lost"}, "optimizer's state not saved",
     "a bump in the loss after each resume", "kill and resume",
     "optimizer's"),
    ("tokens from 0 again", {"tokens": "restarted"}, "`tokens = 0` after a resume",
     "the curve jumps back", "kill and resume", "not that of an unbroken one"),
    ("padding counted", {"tokens": "padded"}, "`input_ids.numel()`",
     "the speed looks better than it is", "sum the masks", "padding is counted"),
    ("weighted losses reported", {"told": "weighted"}, "`sums += weight * loss`",
     "runs with other weights can't be compared", "set a weight of 2",
     "reported with their weights"),
    ("sums not set back", {"reset": False}, "no `sums = [0, 0]`",
     "the curve rises and rises", "report=1 against report=3", "must give the mean loss"),
    ("the last report divided wrongly", {"mean": False}, "`sums / report`",
     "the last point lies too low", "steps that report does not divide",
     "must give the mean loss"),
    ("last steps not reported", {"end": False}, "`if step % report == 0` alone",
     "the last steps are lost, and done again", "steps that report does not divide",
     "the last one too"),
    ("steps ignored", {"steps": False}, "`total = epochs * an_epoch`",
     "a short run is a long one", "count the steps", "steps=5 must end the run"),
    ("NaN unnoticed", {"finite": False}, "no check of the loss",
     "an hour later all weights are NaN", "a NaN in a weight", "a loss of NaN goes unnoticed"),
    ("another run taken up", {"settings": "none"}, "settings not compared",
     "two runs mixed up in one folder", "call it with another learning rate",
     "two runs would be mixed up"),
    ("too few outputs accepted", {"check": False}, "no check of num_labels",
     "labels without an output, or outputs without a label", "a model with 7 outputs for 5",
     "must be refused by a ValueError where"),
):
    mistake(RUN, _name, looks=_looks, shows=_shows, find=_find, hint=_hint)(runner(**_how))


# training_flops


def counted(c, tokens, seq_len, chosen_share, *, back=3, plus=2, attention=4, once=True,
            share=None, seq=None):
    d, f = c.d_model, c.d_ff
    layer = plus * (4 * d * d + 2 * d * f) + attention * (seq or seq_len) * d
    guess = plus * (d * d + d * c.vocab_size)
    head = plus * d * c.num_labels / (seq_len if once else 1)
    share = chosen_share if share is None else share
    return back * tokens * (c.num_layers * layer + share * guess + head)


def counter(**how):
    def training_flops(config, tokens, *, seq_len, chosen_share=0.0):
        return counted(config, tokens, seq_len, chosen_share, **how)
    return training_flops


right(FLOPS, "in other words")(counter())
ORACLE = "PyTorch's FlopCounterMode"
for _name, _how, _looks, _hint in (
    ("backward forgotten", {"back": 1}, "`tokens * forward`", "the backward pass is missing"),
    ("backward as much as forward", {"back": 2}, "`2 * tokens * forward`",
     "backward is counted as much as forward"),
    ("times and plus as one", {"plus": 1, "attention": 2}, "`d * d` a matrix",
     "counted as one"),
    ("attention's products forgotten", {"attention": 0}, "6 · parameters",
     "attention's two products are missing"),
    ("one of attention's products", {"attention": 2}, "`2 * seq_len * d_model`",
     "only one of attention's two products"),
    ("the labels' head for each token", {"once": False}, "`2 * d * num_labels`",
     "head is counted for each token"),
    ("every word guessed", {"share": 1.0}, "chosen_share not used",
     "every token's word is guessed"),
):
    mistake(FLOPS, _name, looks=_looks, shows="a wrong number in a table", find=ORACLE,
            hint=_hint)(counter(**_how))


# save_half and load_half

TIED = "masked_head.decoder.weight"


def saver(*, wide=False, tied=True, hashes=("model.safetensors", "tokenizer.json"),
          first=False, atomic=True, early=False, check=True, finite=True, ruin=False,
          pickle=False, wrong_hash=False):
    """A save_half with one part done wrongly."""
    def save_half(folder, model, tokenizer, label_names):
        folder, label_names = Path(folder), list(label_names)
        if early:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "tokenizer.json").write_text(tokenizer.to_str(), "utf-8")
        if check and len(label_names) != model.config.num_labels:
            raise ValueError("label names")
        if ruin:
            model.half()
        weights = {
            k: v.detach().clone() if wide else v.detach().half().contiguous()
            for k, v in model.state_dict().items() if not (tied and k == TIED)}
        if finite and not all(v.isfinite().all() for v in weights.values()):
            raise ValueError("not finite")
        folder.mkdir(parents=True, exist_ok=True)
        if pickle:
            import io

            buffer = io.BytesIO()
            torch.save(weights, buffer)
            raw = buffer.getvalue()
        else:
            raw = to_bytes(weights)
        contents = {"model.safetensors": raw, "tokenizer.json": tokenizer.to_str().encode()}
        kind = hashlib.md5 if wrong_hash else hashlib.sha256
        config = json.dumps({
            "model": asdict(model.config), "label_names": label_names,
            "sha256": {n: kind(contents[n]).hexdigest() for n in hashes},
        }).encode()
        files = [*contents.items(), ("config.json", config)]
        for name, content in reversed(files) if first else files:
            if atomic:
                save_atomically(content, folder / name)
            else:
                (folder / name).write_bytes(content)
    return save_half


right(SAVE, "in one loop")(saver())
for _name, _how, _looks, _shows, _find, _hint in (
    ("float32 saved", {"wide": True}, "no `.half()`", "twice the space", "size of the file",
     "half precision is float16"),
    ("the tied table twice", {"tied": False}, "`model.state_dict()` whole",
     "a third more space", "names in the file", "stands in the file twice"),
    ("no hash of the tokenizer", {"hashes": ("model.safetensors",)}, "one hash only",
     "a mixed-up tokenizer goes unnoticed", "change a byte of each file",
     "no hash of tokenizer.json"),
    ("another hash", {"wrong_hash": True}, "`hashlib.md5`", "every load is refused",
     "load what was saved", "another hash"),
    ("config.json first", {"first": True}, "config written before the weights",
     "a half-written folder looks finished", "stop it half way",
     "it must come last"),
    ("written in place", {"atomic": False}, "`path.write_bytes(…)`",
     "killed while saving: neither the old nor the new model", "as above",
     "is overwritten in place"),
    ("written before the check", {"early": True}, "checks after the first file",
     "a refused model leaves rubbish", "refuse one, look into the folder",
     "refused after files were written"),
    ("names not counted", {"check": False}, "no check of label_names",
     "labels under the wrong name", "one name too few", "three label names for four outputs"),
    ("infinities saved", {"finite": False}, "no `isfinite`",
     "a weight of 70,000 is inf in float16", "a large bias", "becomes infinite in float16"),
    ("the model halved", {"ruin": True}, "`model.half()`",
     "the model at hand is ruined by saving it", "dtype afterwards",
     "itself is in half precision"),
    ("pickled", {"pickle": True}, "`torch.save(weights)`", "a file that may run code",
     "load it with safetensors", "is no safetensors file"),
):
    mistake(SAVE, _name, looks=_looks, shows=_shows, find=_find, hint=_hint)(saver(**_how))


def loader(*, check=("tokenizer.json", "model.safetensors"), half=False, train=False,
           strict=True, untie=False, classes=True, names=True, missing=True, wrap=True,
           fresh=False):
    """A load_half with one part done wrongly."""
    def load_half(folder, model_class=TransformerForSequenceClassification, **options):
        folder, contents = Path(folder), {}
        for name in ("config.json", "tokenizer.json", "model.safetensors"):
            if missing and not (folder / name).is_file():
                raise FileNotFoundError(folder / name)
            if not missing and not (folder / name).is_file():
                raise ValueError(f"{name} is not there")
            contents[name] = (folder / name).read_bytes()
        try:
            described = json.loads(contents["config.json"])
            config = EmoformerConfig(**described["model"])
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError("config.json") from error
        if names and len(described["label_names"]) != config.num_labels:
            raise ValueError("label names")
        for name in check:
            if hashlib.sha256(contents[name]).hexdigest() != described["sha256"][name]:
                raise ValueError(f"{name} is damaged")
        tokenizer = Tokenizer.from_str(contents["tokenizer.json"].decode())
        model = model_class(config, **options) if classes else model_class(config)
        weights = load(contents["model.safetensors"])
        if not half:
            weights = {k: v.float() for k, v in weights.items()}
        table = "classifier.embedding.token.weight"
        if TIED in model.state_dict() and table in weights:
            weights[TIED] = weights[table].clone()
        if half:
            model.half()
        if not fresh:
            try:
                model.load_state_dict(weights, strict=strict, assign=untie)
            except RuntimeError as error:
                if not wrap:
                    raise
                raise ValueError("weights") from error
        return model.train(train), tokenizer, described["label_names"]
    return load_half


right(LOAD, "in other words")(loader())
for _name, _how, _looks, _shows, _find, _hint in (
    ("hash not compared", {"check": ()}, "the hashes are read and forgotten",
     "a damaged model answers nonsense", "change one bit", "one bit of model.safetensors"),
    ("tokenizer not checked", {"check": ("model.safetensors",)}, "one hash only",
     "another tokenizer, and every word is another", "swap the file",
     "tokenizer.json is changed"),
    ("left in half precision", {"half": True}, "no `.float()`",
     "slow on a CPU, and training fails", "dtype of the weights", "stay in half precision"),
    ("left in training mode", {"train": True}, "no `.eval()`", "two answers for one text",
     "`model.training`", "is in training mode"),
    ("strict=False", {"strict": False}, "`load_state_dict(…, strict=False)`",
     "half the model is random, without a word", "load another class", "is strict=False set"),
    ("untied on loading", {"untie": True}, "`assign=True`",
     "the two tables part in the next training", "`is` on the two tables",
     "part on loading"),
    ("classes not passed on", {"classes": False}, "`model_class(config)`",
     "your own layer is never used", "`isinstance` of a sublayer",
     "do not reach the model's constructor"),
    ("names not counted", {"names": False}, "no check of label_names",
     "an index error on the first rare label", "cut a name out of the config",
     "three label names for four outputs"),
    ("the wrong error for a missing file", {"missing": False}, "`ValueError`",
     "a typo in a path looks like a damaged model", "delete a file", "raises ValueError"),
    ("a bare RuntimeError", {"wrap": False}, "no `try` around `load_state_dict`",
     "two pages of names", "load another class", "do not fit the class"),
    ("weights never loaded", {"fresh": True}, "the model returned as it was made",
     "answers by chance", "compare one weight", "does not hold the saved"),
):
    mistake(LOAD, _name, looks=_looks, shows=_shows, find=_find, hint=_hint)(loader(**_how))



# The exercises


def words_corrupted(input_ids, continues, share, generator, *, whole=True, special=False):
    ordinary = input_ids >= 5 if not special else input_ids >= 0
    starts = ~(ordinary & continues[input_ids])
    number = starts.long().cumsum(dim=1) - 1
    dice = torch.rand(input_ids.shape, generator=generator)
    chosen = ordinary & ((dice.gather(1, number) if whole else dice) < share)
    return input_ids.masked_fill(chosen, 4), chosen


right("corrupt_words", "by a running sum")(words_corrupted)


@mistake("corrupt_words", "one die a piece", looks="`dice < share`", shows="half words hidden",
         find="pieces of one word", hint="a word is cut")
def words_by_piece(input_ids, continues, share, generator):
    return words_corrupted(input_ids, continues, share, generator, whole=False)


@mistake("corrupt_words", "special tokens chosen", looks="no `>= 5`",
         shows="[CLS] is hidden now and then", find="`share=1`", hint="special tokens are chosen")
def words_special(input_ids, continues, share, generator):
    return words_corrupted(input_ids, continues, share, generator, special=True)


@mistake("untied", "the original untied", looks="no `deepcopy`",
         shows="the model at hand grows by a table", find="`is` on the original",
         hint="the model itself is untied")
def untied_itself(model):
    model.masked_head.decoder.weight = nn.Parameter(
        model.masked_head.decoder.weight.detach().clone())
    return model


@mistake("untied", "a bare copy", looks="`copy.deepcopy(model)`",
         shows="deepcopy keeps the tie", find="`is` on the copy", hint="still tied")
def untied_not(model):
    import copy
    return copy.deepcopy(model)


@mistake("two_losses", "exchanged", looks="`return without, with`", shows="the wrong conclusion",
         find="the smaller one has slices", hint="the two losses are exchanged")
def losses_exchanged(logits, labels, allowed):
    return F.cross_entropy(logits, labels), book.sliced_cross_entropy(logits, labels, allowed)


@mistake("train_at", "share ignored", looks="`share=0.15`", shows="four equal curves",
         find="count the holes", hint="five times the share")
def train_at_fixed(share, steps=120):
    return 7.0 - 0.01 * steps, 100 * steps


@mistake("with_piece", "not cleaned", looks="`{**mixture, name: dataset}`",
         shows="the exam is in the book", find="a disguised held-out text",
         hint="a held-out text is still in it")
def piece_dirty(mixture, name, dataset, keys):
    if name in mixture:
        raise ValueError("twice")
    return mixture | {name: dataset}


@mistake("with_piece", "the mixture changed", looks="`mixture[name] = …`",
         shows="the next run has a piece more", find="the dict before and after",
         hint="is changed: return a new dict")
def piece_in_place(mixture, name, dataset, keys):
    mixture[name] = remove_held_out(dataset, keys)
    return mixture


@mistake("to_eight_bits", "one scale for all", looks="`weight.abs().max() / 127`",
         shows="rows of small numbers become 0", find="rows of very different size",
         hint="one scale serves the whole matrix")
def eight_one_scale(weight):
    scale = (weight.abs().max() / 127).expand(len(weight), 1)
    return (weight / scale).round().to(torch.int8), scale


@mistake("to_eight_bits", "cut off, not rounded", looks="`(weight / scale).to(torch.int8)`",
         shows="everything shrinks a little", find="the error: half a step at most",
         hint="round to the nearest")
def eight_cut(weight):
    scale = weight.abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
    return (weight / scale * 1.00001).to(torch.int8), scale


@right("to_eight_bits", "as in the book")
def eight_right(weight):
    scale = weight.abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / 127
    return (weight / scale).round().to(torch.int8), scale


@mistake("corrupt_spans", "each token on its own", looks="`rand < share`",
         shows="no spans", find="mean length of the runs", hint="choose a start and a length")
def spans_single(input_ids, share, longest, generator):
    chosen = (torch.rand(input_ids.shape, generator=generator) < share) & (input_ids >= 5)
    return input_ids.masked_fill(chosen, 4), chosen


def spans_corrupted(input_ids, share, longest, generator, special=False):
    chosen = torch.zeros_like(input_ids, dtype=torch.bool)
    ordinary = input_ids >= (0 if special else 5)
    for row, free in zip(chosen, ordinary, strict=True):
        wanted = round(share * int(free.sum()))
        while int(row.sum()) < wanted:
            start = int(torch.randint(len(row), (1,), generator=generator))
            length = int(torch.randint(1, longest + 1, (1,), generator=generator))
            for at in range(start, min(start + length, len(row))):
                if not free[at] or int(row.sum()) >= wanted:
                    break
                row[at] = True
    return input_ids.masked_fill(chosen, 4), chosen


right("corrupt_spans", "text by text")(spans_corrupted)


@mistake("corrupt_spans", "special tokens in a run", looks="a run over [SEP]",
         shows="padding is guessed", find="`share=1`", hint="special tokens are chosen")
def spans_special(input_ids, share, longest, generator):
    return spans_corrupted(input_ids, share, longest, generator, special=True)
