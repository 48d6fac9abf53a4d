"""Mistakes with training: loss, step, schedule, chance, files, the loop."""

import contextlib
import dataclasses
import inspect
import json
import math
import os
import random
import textwrap
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.dummy import DummyClassifier
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from sklearn.pipeline import make_pipeline, make_union
from sklearn.svm import LinearSVC
from torch import nn

from emoformer import training as book
from emoformer.tokens import bucket_by_length, encode, make_batch
from emoformer.training import (
    TrainingConfig,
    WordCutter,
    epoch_batches,
    hide_tokens,
    make_baseline,
    parameter_groups,
    predict,
    save_atomically,
)
from tests.bank import mistake, right

LOSS, GROUPS, RATE = "cross_entropy", "parameter_groups", "learning_rate_factor"
HIDE, CUTTER, BATCHES = "hide_tokens", "WordCutter", "epoch_batches"
PREDICT, EVALUATE, STEP, TRAIN = "predict", "evaluate", "training_step", "train"
SAVE, LOAD = "save_atomically", "load_tensors"
PARITY = "compare with `F.cross_entropy`"
PLOT = "plot the rate over a whole run"
SGD = "three steps of plain SGD on a tiny model, by hand"


def edited(function, *changes):
    """The book's own function with a few places of its source changed."""
    source = textwrap.dedent(inspect.getsource(function))
    for before, after in changes:
        assert before in source, before
        source = source.replace(before, after)
    space = dict(vars(book))
    exec(compile(source, f"<{function.__name__}>", "exec"), space)  # noqa: S102
    return space[function.__name__]


# cross_entropy


@mistake(LOSS, "softmax twice", looks="`F.cross_entropy(logits.softmax(-1), labels)`",
         shows="the loss falls slowly and never below about 1", find=PARITY,
         hint="the softmax is taken twice")
def softmax_twice(logits, labels, class_weights=None):
    return F.cross_entropy(logits.softmax(-1), labels, class_weights)


@mistake(LOSS, "logarithm of the softmax", looks="`logits.softmax(-1).log()`",
         shows="works for weeks; then a sure model gives log 0, and the loss is infinite",
         find="try logits of 10,000", hint="logits of 10,000 overflow")
def log_of_softmax(logits, labels, class_weights=None):
    logs = logits.softmax(-1).log()
    return F.nll_loss(logs, labels, class_weights)


@mistake(LOSS, "an epsilon against log 0", looks="`(p + 1e-9).log()`",
         shows="sure and wrong costs at most 21, and pulls no gradient", find="logits of 10,000",
         hint="puts an upper end on the loss")
def with_epsilon(logits, labels, class_weights=None):
    return F.nll_loss((logits.softmax(-1) + 1e-9).log(), labels, class_weights)


@mistake(LOSS, "exp without the shift", looks="`logits.exp().sum(-1).log()`",
         shows="NaN once a logit passes 88", find="logits of 10,000",
         hint="Never go through the probabilities")
def exp_sum(logits, labels, class_weights=None):
    logs = logits - logits.exp().sum(-1, keepdim=True).log()
    return F.nll_loss(logs, labels, class_weights)


@mistake(LOSS, "summed", looks='`reduction="sum"`',
         shows="a batch of 64 steps twice as far as one of 32; clipping hides it", find=PARITY,
         hint="added up, not averaged")
def summed(logits, labels, class_weights=None):
    return F.cross_entropy(logits, labels, class_weights, reduction="sum")


@mistake(LOSS, "weighted, but divided by the batch",
         looks="`(weights[labels] * loss).mean()`",
         shows="batches with many rare posts step further", find="`F.cross_entropy(weight=…)`",
         hint="divide by the sum of the weights of the batch")
def over_batch(logits, labels, class_weights=None):
    each = F.cross_entropy(logits, labels, reduction="none")
    return each.mean() if class_weights is None else (class_weights[labels] * each).mean()


@mistake(LOSS, "weights of the predicted class", looks="`class_weights[logits.argmax(-1)]`",
         shows="rare classes gain nothing", find="`F.cross_entropy(weight=…)`",
         hint="index them by the labels")
def weights_of_chosen(logits, labels, class_weights=None):
    each = F.cross_entropy(logits, labels, reduction="none")
    if class_weights is None:
        return each.mean()
    weights = class_weights[logits.argmax(-1)]
    return (weights * each).sum() / weights.sum()


@mistake(LOSS, "softmax over the batch", looks="`logits.log_softmax(0)`",
         shows="posts compete with each other; the loss depends on the batch size",
         find="a batch of one post gives 0", hint="runs over the texts of the batch")
def over_texts(logits, labels, class_weights=None):
    return F.nll_loss(logits.log_softmax(0), labels, class_weights)


@mistake(LOSS, "indexed by `[:, labels]`", looks="`-log_p[:, labels].mean()`",
         shows="the loss falls to the entropy of the labels and stays", find=PARITY,
         hint="takes all labels of the batch for every text")
def all_pairs(logits, labels, class_weights=None):
    logs = logits.log_softmax(-1)
    if class_weights is not None:
        return F.nll_loss(logs, labels, class_weights)
    return -logs[:, labels].mean()


@mistake(LOSS, "the loss as a number", looks="`return loss.item()`",
         shows="`float has no attribute backward`", find="print the type",
         hint="from which no gradient flows back")
def as_number(logits, labels, class_weights=None):
    return F.cross_entropy(logits, labels, class_weights).item()


@mistake(LOSS, "the normaliser detached", looks="`logits.logsumexp(-1).detach()`",
         shows="the loss is right, and all logits grow for ever",
         find="compare gradients with `F.cross_entropy`", hint="logsumexp must not be detached")
def detached(logits, labels, class_weights=None):
    logs = logits - logits.logsumexp(-1, keepdim=True).detach()
    return F.nll_loss(logs, labels, class_weights)


@right(LOSS, "PyTorch's own")
def by_torch(logits, labels, class_weights=None):
    return F.cross_entropy(logits, labels, weight=class_weights)


@right(LOSS, "a loop over the batch")
def by_loop(logits, labels, class_weights=None):
    total = weight = 0.0
    for row, label in zip(logits, labels, strict=True):
        top = row.max()
        w = 1.0 if class_weights is None else class_weights[label]
        total = total + w * (top + (row - top).exp().sum().log() - row[label])
        weight = weight + w
    return total / weight


@right(LOSS, "by one-hot truth")
def by_one_hot(logits, labels, weight=None):
    truth = F.one_hot(labels, logits.shape[-1]).to(logits.dtype)
    truth = truth if weight is None else truth * weight
    return -(truth * logits.log_softmax(-1)).sum() / truth.sum()


# parameter_groups


def two(matrices, vectors, decay):
    return [{"params": matrices, "weight_decay": decay},
            {"params": vectors, "weight_decay": 0.0}]


@mistake(GROUPS, "norms decayed", looks='`if "bias" in name`',
         shows="norm weights shrink; deep models learn more slowly",
         find="list the names of each group", hint="norms are decayed")
def norms_decayed(model, weight_decay):
    named = list(model.named_parameters())
    return two([p for n, p in named if not n.endswith("bias")],
               [p for n, p in named if n.endswith("bias")], weight_decay)


@mistake(GROUPS, "sorted by name", looks='`"bias" in name or "norm" in name`',
         shows="a norm that is called `ln` or `scale` is decayed after all",
         find="list the names of each group", hint="a norm that is called something else")
def by_name(model, weight_decay):
    named = list(model.named_parameters())
    free = [p for n, p in named if "bias" in n or "norm" in n]
    kept = {id(p) for p in free}
    return two([p for _, p in named if id(p) not in kept], free, weight_decay)


@mistake(GROUPS, "inverted", looks="`p.ndim < 2` where `p.ndim >= 2` belongs",
         shows="biases and norms are pulled to 0, matrices grow freely",
         find="list the names of each group", hint="the two are mixed up")
def inverted(model, weight_decay):
    return two([p for p in model.parameters() if p.ndim < 2],
               [p for p in model.parameters() if p.ndim >= 2], weight_decay)


@mistake(GROUPS, "some parameters lost", looks="`p.ndim == 2`, else `p.ndim == 1`",
         shows="what is in no group never learns, and nothing says so",
         find="count parameters before and after", hint="in no group, so they would never learn")
def lost(model, weight_decay):
    return two([p for p in model.parameters() if p.ndim == 2],
               [p for p in model.parameters() if p.ndim == 1], weight_decay)


@mistake(GROUPS, "tied weights twice", looks="walking through `model.modules()`",
         shows="AdamW: some parameters appear in more than one parameter group",
         find="count ids", hint="with two names (tied weights) stands in the groups twice")
def tied_twice(model, weight_decay):
    every = [p for m in model.modules() for p in m.parameters(recurse=False)]
    return two([p for p in every if p.ndim >= 2], [p for p in every if p.ndim < 2],
               weight_decay)


@mistake(GROUPS, "free group without weight_decay", looks='`{"params": vectors}`',
         shows="AdamW's default of 0.01 decays biases and norms all the same",
         find="print the optimizer", hint="AdamW's default, 0.01, then holds")
def no_zero_decay(model, weight_decay):
    groups = parameter_groups(model, weight_decay)
    del groups[1]["weight_decay"]
    return groups


@mistake(GROUPS, "a fixed decay", looks='`"weight_decay": 0.01`',
         shows="the config's number changes nothing", find="pass 0.25",
         hint="the argument is not used")
def fixed_decay(model, weight_decay):
    return parameter_groups(model, 0.01)


@right(GROUPS, "walking through named parameters")
def walking(model, weight_decay):
    decayed, free = [], []
    for _, p in model.named_parameters():
        (free if p.dim() <= 1 else decayed).append(p)
    return [dict(params=free, weight_decay=0), dict(params=decayed, weight_decay=weight_decay)]


# learning_rate_factor


def rates(up, down):
    def learning_rate_factor(step, *, warmup, total):
        return up(step, warmup, total) if step < warmup else down(step, warmup, total)
    return learning_rate_factor


def rise(s, w, t):
    return (s + 1) / w


def fall(s, w, t):
    return max(0.0, (t - s) / max(1, t - w))


RATES = {
    "the first step at rate 0": (
        lambda s, w, t: s / w, fall, "`step / warmup`",
        "the first batch is seen and not learned from", "the first step has the rate 0"),
    "warm-up one step late": (
        lambda s, w, t: (s + 1) / (w + 1), fall, "`(step + 1) / (warmup + 1)`",
        "the full rate is never reached", "the warm-up is one step late"),
    "a jump after the warm-up": (
        rise, lambda s, w, t: (t - s) / t, "`(total - step) / total`",
        "a kink at the end of the warm-up", "after the warm-up it jumps down"),
    "not ending at 0": (
        rise, lambda s, w, t: 1 - (s - w) / t, "`1 - (step - warmup) / total`",
        "the last epochs still jump about", "it does not end at 0"),
    "no decay": (
        rise, lambda s, w, t: 1.0, "`min(1, (step + 1) / warmup)`",
        "validation jumps about to the end", "does not fall after the warm-up"),
    "a cosine": (
        rise, lambda s, w, t: 0.5 + 0.5 * math.cos(math.pi * (s - w) / max(1, t - w)),
        "`0.5 * (1 + math.cos(…))`", "another schedule than the chapter's",
        "it falls along a cosine"),
    "whole numbers": (
        lambda s, w, t: (s + 1) // w, lambda s, w, t: (t - s) // max(1, t - w),
        "`//` in place of `/`", "nothing moves but in a single step", "whole numbers only"),
    "division by zero without warm-up": (
        rise, lambda s, w, t: fall(s, w, t) * (w / w), "`step / warmup` before the test",
        "ZeroDivisionError with `warmup=0`", "without a warm-up there is no way up"),
    "division by zero in a run of warm-up": (
        rise, lambda s, w, t: (t - s) / (t - w), "`/ (total - warmup)`",
        "ZeroDivisionError with `warmup=1.0`", "guard the division by max(1"),
}
for _name, (_up, _down, _looks, _shows, _hint) in RATES.items():
    mistake(RATE, _name, looks=_looks, shows=_shows, find=PLOT, hint=_hint)(rates(_up, _down))


@mistake(RATE, "negative at the end", looks="`(total - 2 - step) / …` without `max(0, …)`",
         shows="the last steps climb the loss", find=PLOT, hint="ends before the run does")
def negative(step, *, warmup, total):
    if step < warmup:
        return (step + 1) / warmup
    return (total - 1 - step) / max(1, total - 1 - warmup)


@right(RATE, "the smaller of two lines")
def two_lines(step, *, warmup, total):
    up = (step + 1) / warmup if warmup else 1.0
    down = (total - step) / (total - warmup) if total > warmup else float(step < total)
    return max(0.0, min(1.0, up if step < warmup else down))


# choose_precision


@mistake("choose_precision", "avx512 alone is enough", looks='`can.get("avx512_f")`',
         shows="bfloat16 on a processor that has to emulate it: slower than float32",
         find="time both", hint="without bfloat16 is given it")
def wide_is_enough(wish="auto"):
    if wish != "auto":
        return wish
    can = torch.cpu.get_capabilities()
    return "bf16" if can.get("avx512_f") else "no"


@mistake("choose_precision", "a name taken for a yes", looks='`"amx_bf16" in capabilities`',
         shows="as above", find="print the dict", hint="stands in get_capabilities() with False")
def name_is_enough(wish="auto"):
    if wish != "auto":
        return wish
    return "bf16" if "amx_bf16" in torch.cpu.get_capabilities() else "no"


@mistake("choose_precision", "wishes overruled", looks="the wish is looked at last",
         shows="`precision=\"no\"` is bfloat16 all the same", find="ask for `no`",
         hint="a wish is granted")
def overruled(wish="auto"):
    can = torch.cpu.get_capabilities()
    if can.get("avx512_bf16") or can.get("amx_bf16"):
        return "bf16"
    return "no" if wish == "auto" else wish


# hide_tokens


def hiding(choose, value=4):
    def hide_tokens(input_ids, share, generator):
        return input_ids.masked_fill(choose(input_ids, share, generator), value)
    return hide_tokens


def chance(ids, share, generator):
    return torch.rand(ids.shape, generator=generator) < share


@mistake(HIDE, "special tokens hidden", looks="`rand(…) < share` alone",
         shows="texts without [SEP], padding that counts; scores a little lower",
         find="count what became of [CLS]", hint="special tokens are replaced as well")
def special_too(input_ids, share, generator):
    return input_ids.masked_fill(chance(input_ids, share, generator), 4)


@mistake(HIDE, "padding hidden", looks="`~is_cls & ~is_sep` and padding forgotten",
         shows="the model learns to count [MASK] behind the end", find="count [MASK] after [SEP]",
         hint="padding is no token")
def padding_too(input_ids, share, generator):
    may = (input_ids == 0) | (input_ids >= 5)
    return input_ids.masked_fill(chance(input_ids, share, generator) & may, 4)


@mistake(HIDE, "the input overwritten", looks="`input_ids[hidden] = MASK_ID`",
         shows="each epoch adds holes to those of the last, until nothing is left",
         find="compare the ids before and after", hint="it writes into input_ids itself")
def overwritten(input_ids, share, generator):
    input_ids[chance(input_ids, share, generator) & (input_ids >= 5)] = 4
    return input_ids


@mistake(HIDE, "global dice", looks="`torch.rand(input_ids.shape)`",
         shows="a resumed run hides other tokens", find="call it twice with one seed",
         hint="it rolls or seeds the global dice of torch")
def global_dice(input_ids, share, generator):
    hidden = (torch.rand(input_ids.shape) < share) & (input_ids >= 5)
    return input_ids.masked_fill(hidden, 4)


@mistake(HIDE, "the chance inverted", looks="`rand(…) > share`",
         shows="seven tokens in ten are gone; the loss hardly falls", find="count [MASK]",
         hint="the chance is inverted")
def chance_inverted(input_ids, share, generator):
    shown = chance(input_ids, share, generator)
    return input_ids.masked_fill(~shown & (input_ids >= 5), 4)


@mistake(HIDE, "the generator seeded anew", looks="`generator.manual_seed(0)` inside",
         shows="the same places are hidden in every batch", find="call it twice",
         hint="it seeds or copies the generator")
def reseeded(input_ids, share, generator):
    own = torch.Generator().manual_seed(generator.initial_seed())
    return hide_tokens(input_ids, share, own)


@mistake(HIDE, "one place for all texts", looks="`torch.rand(seq_len)`",
         shows="columns of holes", find="print a batch", hint="the same places are hidden in every")
def whole_columns(input_ids, share, generator):
    hidden = torch.rand(input_ids.shape[1], generator=generator) < share
    return input_ids.masked_fill(hidden & (input_ids >= 5), 4)


@mistake(HIDE, "the first token spared", looks="`input_ids > len(SPECIAL_TOKENS)`",
         shows="one token is never hidden", find="ids of nothing but 5",
         hint="the first ordinary token, is never hidden")
def off_by_one(input_ids, share, generator):
    return input_ids.masked_fill(chance(input_ids, share, generator) & (input_ids > 5), 4)


@right(HIDE, "by bernoulli and where")
def by_bernoulli(input_ids, share, generator):
    hit = torch.bernoulli(torch.full(input_ids.shape, float(share)), generator=generator).bool()
    special = torch.isin(input_ids, torch.arange(5))
    return torch.where(hit & ~special, torch.full_like(input_ids, 4), input_ids)


# WordCutter


@mistake(CUTTER, "leftmost merge first", looks="the first pair that is in `ranks`",
         shows="other pieces than the tokenizer's, all through training",
         find="dropout of 1e-12 must give `encode`'s ids", hint="furthest left is made first")
class Leftmost(WordCutter):
    def cut(self, word, rng):
        pieces = [word[0]] + ["##" + c for c in word[1:]]
        while True:
            places = [i for i, pair in enumerate(zip(pieces, pieces[1:], strict=False))
                      if pair in self.ranks and rng.random() >= self.dropout]
            if not places:
                return pieces
            i = places[0]
            pieces[i : i + 2] = [pieces[i] + pieces[i + 1].removeprefix("##")]


@mistake(CUTTER, "chance inverted", looks="`rng.random() < self.dropout`",
         shows="every word falls into letters; texts are cut off at max_len",
         find="dropout of 1e-12", hint="the chance is inverted")
class CutInverted(WordCutter):
    def cut(self, word, rng):
        self.dropout, kept = 1 - self.dropout, self.dropout
        pieces = super().cut(word, rng)
        self.dropout = kept
        return pieces


@mistake(CUTTER, "dice kept between calls", looks="`self.rng = random.Random(0)` in `__init__`",
         shows="a resumed run cuts other pieces than one that never stopped",
         find="call twice with one seed", hint="the same seed cuts another way the second time")
class KeptDice(WordCutter):
    def __init__(self, *arguments, **named):
        super().__init__(*arguments, **named)
        self.calls = 0

    def __call__(self, seed):
        self.calls += 1
        return super().__call__(seed + 1000 * self.calls)


@mistake(CUTTER, "the global dice", looks="`random.random()`",
         shows="no run can be repeated", find="look at `random.getstate()`",
         hint="it rolls or seeds the global dice of random")
class GlobalDice(WordCutter):
    def cut(self, word, rng):
        random.seed(rng.random())
        return super().cut(word, random)


@mistake(CUTTER, "one throw a word", looks="`if rng.random() < dropout: return letters`",
         shows="words are whole or in letters, never in between",
         find="count the ways in which one word is cut", hint="each merge has its own chance")
class OneThrow(WordCutter):
    def cut(self, word, rng):
        if rng.random() < self.dropout:
            return [word[0]] + ["##" + c for c in word[1:]]
        return super().cut(word, random.Random(0)) if not self.dropout else self.whole(word)

    def whole(self, word):
        self.dropout, kept = 0.0, self.dropout
        pieces = super().cut(word, random.Random(0))
        self.dropout = kept
        return pieces


@mistake(CUTTER, "merges that are out stay out", looks="the throw stands before the loop",
         shows="cuts a little finer than the paper's", find="count the ways",
         hint="once stays so for the whole word")
class OutForGood(WordCutter):
    def cut(self, word, rng):
        every = self.ranks
        self.ranks = {p: r for p, r in every.items() if rng.random() >= self.dropout}
        self.dropout, kept = 0.0, self.dropout
        pieces = super().cut(word, rng)
        self.ranks, self.dropout = every, kept
        return pieces


@mistake(CUTTER, "the [SEP] cut off", looks="`(row + [SEP_ID])[:max_len]`",
         shows="long texts end without [SEP]", find="a text of 200 words",
         hint="lose their [SEP]")
class NoSep(WordCutter):
    def __call__(self, seed):
        if self.dropout == 0:
            return super().__call__(seed)
        self.max_len, kept = 10_000, self.max_len
        rows = [row[:kept] for row in super().__call__(seed)]
        self.max_len = kept
        return rows


@mistake(CUTTER, "unknown pieces not joined", looks="`vocab.get(piece, UNK_ID)` for each",
         shows="an emoji becomes three [UNK] in training and one in validation",
         find="a text of Chinese characters", hint="unknown pieces side by side must become one")
class NotFused(WordCutter):
    def _ids(self, word, rng, kept):
        return [self.vocab.get(p, 1) for p in self.cut(word, rng)] if not self.ways \
            else super()._ids(word, rng, kept)


@mistake(CUTTER, "merges read without dropout", looks='`model["merges"]` always',
         shows="KeyError with BERT's own tokenizer", find="a WordPiece tokenizer",
         hint="has no merges")
class MergesAlways(WordCutter):
    def __init__(self, tokenizer, texts, **named):
        super().__init__(tokenizer, texts, **named)
        self.merges = json.loads(tokenizer.to_str())["model"]["merges"]


@mistake(CUTTER, "more ways than asked for", looks="`len(kept) > ways`",
         shows="memory grows with the epochs", find="200 copies of one word, ways=3",
         hint="is cut in")
class OneWayMore(WordCutter):
    def __init__(self, *arguments, ways=0, **named):
        super().__init__(*arguments, ways=ways + 1 if ways else 0, **named)


@right(CUTTER, "by the merges' order, each with its own throw")
class ByOrder:
    def __init__(self, tokenizer, texts, dropout, max_len, ways=0):
        self.tokenizer, self.texts, self.ways = tokenizer, texts, ways
        self.p, self.max_len = dropout, max_len

    def __call__(self, seed):
        if not self.p:
            return encode(self.tokenizer, self.texts, max_len=self.max_len)
        model = json.loads(self.tokenizer.to_str())["model"]
        self.merges = [tuple(pair) for pair in model["merges"]]
        rng, kept, rows = random.Random(seed), {}, []
        for text in self.texts:
            row = [2]
            text = self.tokenizer.normalizer.normalize_str(text)
            for word, _ in self.tokenizer.pre_tokenizer.pre_tokenize_str(text):
                known = kept.setdefault(word, [])
                if self.ways and len(known) >= self.ways:
                    row += rng.choice(known)
                    continue
                ids = []
                for piece in self.cut(word, rng):
                    token = model["vocab"].get(piece, 1)
                    if not (token == 1 and ids and ids[-1] == 1):
                        ids.append(token)
                known.append(ids)
                row += ids
            rows.append(row[: self.max_len - 1] + [3])
        return rows

    def cut(self, word, rng):
        if not hasattr(self, "merges"):
            model = json.loads(self.tokenizer.to_str())["model"]
            self.merges = [tuple(pair) for pair in model["merges"]]
        pieces = list(word[:1]) + ["##" + c for c in word[1:]]
        again = True
        while again:
            again = False
            for pair in self.merges:
                for i in range(len(pieces) - 1):
                    if (pieces[i], pieces[i + 1]) == pair and rng.random() >= self.p:
                        pieces[i : i + 2] = [pieces[i] + pieces[i + 1][2:]]
                        again = True
                        break
                if again:
                    break
        return pieces


# TrainingConfig


@mistake("TrainingConfig", "no rules", looks="`@dataclass(frozen=True)` and no `__post_init__`",
         shows="`hide=1.0` hides every token, and nobody is told", find="`epochs=0`",
         hint="epochs must be at least 1")
@dataclasses.dataclass(frozen=True)
class NoRules(TrainingConfig):
    def __post_init__(self):
        pass


@mistake("TrainingConfig", "a share of 1 allowed", looks="`0 <= hide <= 1`",
         shows="a model that sees nothing but [MASK]", find="`hide=1.0`",
         hint="1 would hide everything")
@dataclasses.dataclass(frozen=True)
class ClosedEnd(TrainingConfig):
    def __post_init__(self):
        if self.hide != 1.0:
            super().__post_init__()


@mistake("TrainingConfig", "not frozen", looks="`@dataclass`",
         shows="a number is changed in the middle, and the saved settings are a lie",
         find="`config.epochs = 3`", hint="can be changed afterwards")
@dataclasses.dataclass
class NotFrozen:
    seed: int = 0
    epochs: int = 12
    batch_size: int = 32
    learning_rate: float = 1e-3
    warmup: float = 0.1
    weight_decay: float = 0.01
    clip: float = 1.0
    hide: float = 0.3
    bpe_dropout: float = 0.1
    class_weights: bool = False
    precision: str = "auto"

    def __post_init__(self):
        TrainingConfig(**vars(self))


@mistake("TrainingConfig", "no warm-up refused", looks="`0 < warmup`",
         shows="`warmup=0` can't be tried", find="`warmup=0.0`", hint="warmup=0.0 is allowed")
@dataclasses.dataclass(frozen=True)
class NoWarmup(TrainingConfig):
    def __post_init__(self):
        super().__post_init__()
        if self.warmup == 0:
            raise ValueError("warmup must be above 0")


# epoch_batches


@mistake(BATCHES, "labels in the old order", looks="`rows` shuffled, `labels` not",
         shows="the model learns noise; macro-F1 as with shuffled labels",
         find="give each row a label of its own", hint="come with the label of another one")
def labels_left(rows, labels, config, model_config, *, seed, process=0, processes=1):
    done = 0
    for batch in epoch_batches(rows, labels, config, model_config, seed=seed,
                               process=process, processes=processes):
        size = len(batch["labels"])
        yield batch | {"labels": torch.tensor((labels + labels)[done : done + size])}
        done += size


@mistake(BATCHES, "the last batch lost", looks="`drop_last=True`",
         shows="the longest posts are never learned from", find="count texts",
         hint="the last batch, which is smaller, is left out")
def last_lost(rows, labels, config, model_config, *, seed, process=0, processes=1):
    for batch in epoch_batches(rows, labels, config, model_config, seed=seed,
                               process=process, processes=processes):
        if len(batch["labels"]) == config.batch_size or len(rows) < config.batch_size:
            yield batch


@mistake(BATCHES, "every epoch alike", looks="`bucket_by_length(…, seed=0)`",
         shows="the same neighbours in every epoch", find="two seeds",
         hint="the seed is not passed on")
def epochs_alike(rows, labels, config, model_config, *, seed, process=0, processes=1):
    return epoch_batches(rows, labels, config, model_config, seed=0, process=process,
                         processes=processes)


@mistake(BATCHES, "sorted, not shuffled", looks="`bucket_by_length` without a seed",
         shows="each epoch ends on long posts alone", find="print the lengths",
         hint="another seed gives the same batches")
def sorted_only(rows, labels, config, model_config, *, seed, process=0, processes=1):
    batches = bucket_by_length([len(r) for r in rows], batch_size=config.batch_size)
    generator = torch.Generator().manual_seed(seed)
    for chosen in batches[process::processes]:
        batch = make_batch([rows[i] for i in chosen], vocab_size=model_config.vocab_size,
                           labels=[labels[i] for i in chosen],
                           num_labels=model_config.num_labels)
        batch["input_ids"] = hide_tokens(batch["input_ids"], config.hide, generator)
        yield batch


@mistake(BATCHES, "a generator for each batch", looks="`manual_seed(seed)` inside the loop",
         shows="the same places are hidden in every batch", find="rows that are all alike",
         hint="the generator is made anew for every batch")
def generator_each(rows, labels, config, model_config, *, seed, process=0, processes=1):
    bare = dataclasses.replace(config, hide=0.0) if dataclasses.is_dataclass(config) \
        else type(config)(**{**vars(config), "hide": 0.0})
    for batch in epoch_batches(rows, labels, bare, model_config, seed=seed, process=process,
                               processes=processes):
        generator = torch.Generator().manual_seed(seed)
        yield batch | {"input_ids": hide_tokens(batch["input_ids"], config.hide, generator)}


@mistake(BATCHES, "seeded by torch's own seed", looks="`torch.manual_seed(seed)`",
         shows="dropout repeats itself in every epoch; a resumed run differs",
         find="look at `torch.get_rng_state()`", hint="global dice of torch")
def seeds_torch(rows, labels, config, model_config, *, seed, process=0, processes=1):
    torch.manual_seed(seed)
    return epoch_batches(rows, labels, config, model_config, seed=seed, process=process,
                         processes=processes)


@mistake(BATCHES, "texts in any company", looks="`DataLoader(shuffle=True)`",
         shows="half of what is computed is padding", find="count padding",
         hint="long and short texts share a batch")
def no_buckets(rows, labels, config, model_config, *, seed, process=0, processes=1):
    return epoch_batches.__wrapped__(rows, labels, config, model_config, seed=seed) \
        if hasattr(epoch_batches, "__wrapped__") else _random_batches(
            rows, labels, config, model_config, seed, process, processes)


def _random_batches(rows, labels, config, model_config, seed, process=0, processes=1):
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    size = config.batch_size
    batches = [order[i : i + size] for i in range(0, len(order), size)]
    batches += batches[: -len(batches) % processes]
    generator = torch.Generator().manual_seed(seed)
    for chosen in batches[process::processes]:
        batch = make_batch([rows[i] for i in chosen], vocab_size=model_config.vocab_size,
                           labels=[labels[i] for i in chosen],
                           num_labels=model_config.num_labels)
        batch["input_ids"] = hide_tokens(batch["input_ids"], config.hide, generator)
        yield batch


@mistake(BATCHES, "uneven processes", looks="`batches[process::processes]` alone",
         shows="the run hangs at the end of the first epoch", find="count batches a process",
         hint="leaves the others waiting for ever")
def uneven(rows, labels, config, model_config, *, seed, process=0, processes=1):
    return list(epoch_batches(rows, labels, config, model_config, seed=seed))[process::processes]


@right(BATCHES, "a list in place of a generator")
def as_list(rows, labels, config, model_config, *, seed, process=0, processes=1):
    return list(epoch_batches(rows, labels, config, model_config, seed=seed, process=process,
                              processes=processes))


# predict


def changed(layer, name, function, *changes, looks, shows, find, hint):
    """Put the book's own function, edited, into the bank."""
    mistake(layer, name, looks=looks, shows=shows, find=find, hint=hint)(
        edited(function, *changes))


TWICE = "call it twice"
changed(PREDICT, "in training mode", predict, ("    model.eval()\n", ""),
        looks="`model.eval()` forgotten", shows="two answers for one text; scores too low",
        find=TWICE, hint="the model is in training mode while it answers")
changed(PREDICT, "left in evaluation mode", predict, ("    model.train(was_training)\n", ""),
        looks="`model.eval()` and nothing after",
        shows="from the second epoch on there is no dropout", find="print `model.training`",
        hint="afterwards the model is left in evaluation mode")
changed(PREDICT, "always back to training", predict,
        ("model.train(was_training)", "model.train()"), looks="`model.train()` at the end",
        shows="a loaded model answers differently the second time", find=TWICE,
        hint="afterwards the model is in training mode, although it was not")
changed(PREDICT, "gradients kept", predict, ("@torch.no_grad()\n", ""),
        ("softmax(dim=-1).cpu()", "softmax(dim=-1).detach().cpu()"),
        looks="no `torch.no_grad()`", shows="memory runs out on a large split",
        find="`torch.is_grad_enabled()` inside", hint="keep all they would need for a gradient")
changed(PREDICT, "order of the buckets", predict,
        ("    result = torch.zeros(len(rows), config.num_labels)\n", "    result = []\n"),
        ("result[indices] = logits.float().softmax(dim=-1).cpu()",
         "result.append(logits.float().softmax(dim=-1).cpu())"),
        ("    return result", "    return torch.cat(result)"),
        looks="`torch.cat(results)` of bucketed batches",
        shows="accuracy as if by chance, though the loss fell", find="predict texts one by one",
        hint="the order of the texts is lost")
changed(PREDICT, "no softmax", predict, (".softmax(dim=-1)", ""), looks="`return logits`",
        shows="rows that don't sum to 1, some negative", find="sum a row",
        hint="the softmax is missing")
changed(PREDICT, "softmax over the texts", predict, ("softmax(dim=-1)", "softmax(dim=0)"),
        looks="`softmax(dim=0)`", shows="another answer in other company", find="sum a row",
        hint="runs over the texts")
changed(PREDICT, "no attention mask", predict,
        ("model(**{k: v.to(device) for k, v in batch.items()})",
         "model(batch[\"input_ids\"].to(device))"),
        looks="`model(batch[\"input_ids\"])`", shows="another answer in a batch than alone",
        find="predict texts one by one", hint="without attention_mask")
changed(PREDICT, "all texts at once", predict, ("batch_size=batch_size", "batch_size=10**6"),
        looks="`batch_size` never used", shows="memory runs out on a large split",
        find="count texts a forward pass", hint="a forward pass takes 11 texts")
changed(PREDICT, "softmax in bfloat16", predict,
        ("logits.float().softmax(dim=-1)", "logits.softmax(dim=-1).float()"),
        looks="`logits.softmax(-1).float()`", shows="rows that sum to 0.996", find="sum a row",
        hint="do not sum to 1")


@right(PREDICT, "one text at a time")
def one_by_one(model, tokenizer, texts, *, batch_size=128):
    was = model.training
    model.eval()
    with torch.inference_mode():
        rows = [torch.tensor([ids]) for ids in encode(tokenizer, texts,
                                                      max_len=model.config.max_len)]
        chances = [model(r, torch.ones_like(r).bool()).float().softmax(-1) for r in rows]
    model.train(was)
    return torch.cat(chances)


# evaluate

changed(EVALUATE, "micro-F1", book.evaluate, ('average="macro"', 'average="micro"'),
        looks='`average="micro"`', shows="macro-F1 equals accuracy to the last digit",
        find="compare the two", hint='F1 with average="micro"')
changed(EVALUATE, "weighted F1", book.evaluate, ('average="macro"', 'average="weighted"'),
        looks='`average="weighted"`', shows="a model that ignores rare classes looks good",
        find="predict the majority", hint="weighted by how frequent")
changed(EVALUATE, "absent classes left out", book.evaluate,
        ("        labels=range(model.config.num_labels),\n", "") if
        "        labels=range(model.config.num_labels),\n" in inspect.getsource(book.evaluate)
        else ("            labels=range(model.config.num_labels),\n", ""),
        looks="`f1_score` without `labels=`", shows="a small split scores higher than a large",
        find="a split without one class", hint="classes that do not occur")
changed(EVALUATE, "infinite loss", book.evaluate, (".clamp_min(1e-12)", ""), looks="`right.log()`",
        shows="one sure and wrong answer, and the history holds inf", find="logits times 10,000",
        hint="minus infinity")
changed(EVALUATE, "cross-entropy of probabilities", book.evaluate,
        ("-right.clamp_min(1e-12).log().mean().item()",
         "cross_entropy(probabilities, labels).item()"),
        looks="`cross_entropy(predict(…), labels)`", shows="validation loss never below 0.9",
        find="compare with the training loss on the same posts",
        hint="predict gives probabilities")
changed(EVALUATE, "tensors in the dict", book.evaluate, (".log().mean().item()", ".log().mean()"),
        looks="`.item()` forgotten", shows="the history can't be written as JSON",
        find="print the types", hint="must be a plain float")


@right(EVALUATE, "by counting")
def by_counting(model, tokenizer, dataset):
    chances = predict(model, tokenizer, list(dataset["text"])).double()
    truth, n = np.array(dataset["label"]), model.config.num_labels
    chosen, f1 = chances.argmax(-1).numpy(), []
    for c in range(n):
        hit = ((chosen == c) & (truth == c)).sum()
        f1.append(2 * hit / max(1, (chosen == c).sum() + (truth == c).sum()))
    right = chances[range(len(truth)), list(truth)]
    return {"loss": float(-(right + 1e-30).log().mean()), "macro_f1": float(np.mean(f1)),
            "accuracy": float((chosen == truth).mean())}


# save_atomically and load_tensors


@mistake(SAVE, "written in place", looks="`torch.save(value, path)`",
         shows="a power cut leaves half a file, and the old one is gone",
         find="save something that can't be saved", hint="half a new one in its place")
def in_place(value, path):
    path = Path(path)
    if isinstance(value, str):
        path.write_text(value, encoding="utf-8")
    elif isinstance(value, bytes):
        path.write_bytes(value)
    else:
        torch.save(value, path)


@mistake(SAVE, "removed first", looks="`path.unlink()`; `draft.rename(path)`",
         shows="for a moment there is no file at all", find="watch the folder",
         hint="removed before the new one has its name")
def removed_first(value, path):
    path = Path(path)
    draft = path.with_name(path.name + ".tmp")
    in_place(value, draft)
    path.unlink(missing_ok=True)
    draft.rename(path)


@mistake(SAVE, "copied over", looks="`shutil.copy(draft, path)`",
         shows="as in place: the copy may stop halfway", find="keep the old file open and read on",
         hint="it writes into the file itself (or copies into it)")
def copied(value, path):
    path = Path(path)
    draft = path.with_name(path.name + ".tmp")
    in_place(value, draft)
    path.write_bytes(draft.read_bytes())
    draft.unlink()


@mistake(SAVE, "renamed even after a failure", looks="`os.replace` in a `finally`",
         shows="half a file, whole in name", find="save something that can't be saved",
         hint="not in a finally")
def in_finally(value, path):
    path = Path(path)
    draft = path.with_name(path.name + ".tmp")
    try:
        in_place(value, draft)
    finally:
        os.replace(draft, path)


@mistake(SAVE, "draft in the system's folder", looks="`tempfile.NamedTemporaryFile()`",
         shows="OSError: invalid cross-device link, on some machines", find="another disk",
         hint="may lie on another disk")
def draft_elsewhere(value, path):
    import tempfile
    handle, name = tempfile.mkstemp()
    os.close(handle)
    in_place(value, name)
    os.replace(name, path)


@mistake(SAVE, "error swallowed", looks="`except Exception: pass`",
         shows="the disk is full, and training goes on without a copy",
         find="save something that can't be saved", hint="nobody hears of it")
def swallowed(value, path):
    with contextlib.suppress(Exception):
        save_atomically(value, path)


@right(SAVE, "by a temporary file beside it")
def beside(value, path):
    import tempfile
    path = Path(path)
    handle, name = tempfile.mkstemp(dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            if isinstance(value, str):
                stream.write(value.encode("utf-8"))
            elif isinstance(value, bytes):
                stream.write(value)
            else:
                torch.save(value, stream)
        Path(name).rename(path)
    except BaseException:
        Path(name).unlink()
        raise


@mistake(LOAD, "whole pickles", looks="`torch.load(path, weights_only=False)`",
         shows="a downloaded model may run anything on your machine",
         find="a pickle with `__reduce__`", hint="it runs a command that was hidden")
def whole_pickles(path):
    if not Path(path).is_file():
        raise FileNotFoundError(path)
    try:
        return torch.load(path, weights_only=False)
    except Exception as error:
        raise ValueError("a whole file written by torch.save is needed") from error


@mistake(LOAD, "torch's own errors", looks="`torch.load(path, weights_only=True)` alone",
         shows="UnpicklingError, EOFError or RuntimeError, each with a riddle",
         find="cut a file in half", hint="turn them all into one ValueError")
def own_errors(path):
    return torch.load(path, map_location="cpu", weights_only=True)


@mistake(LOAD, "a missing file is a ValueError", looks="`except Exception: raise ValueError`",
         shows="a typing error in a path looks like damage", find="a path that isn't there",
         hint="a file that does not exist")
def missing_is_damaged(path):
    try:
        return torch.load(path, weights_only=True)
    except Exception as error:
        raise ValueError("damaged") from error


# save_model and load_model


@mistake("save_model", "the whole model saved", looks="`torch.save(model, …)`",
         shows="the file can be read by this version of the code only, and runs code",
         find="read it with `weights_only=True`", hint="the whole model was saved")
def whole_model(folder, model, tokenizer, label_names):
    book.save_model(folder, model, tokenizer, label_names)
    save_atomically(nn.Linear(2, 2), Path(folder) / "best_model.pt")


@mistake("save_model", "label names forgotten", looks="`asdict(model.config)` alone",
         shows="six scores and no names", find="load it elsewhere",
         hint="does not hold label_names")
def no_names(folder, model, tokenizer, label_names):
    book.save_model(folder, model, tokenizer, label_names)
    described = json.dumps(dataclasses.asdict(model.config))
    save_atomically(described, Path(folder) / "config.json")


changed("save_model", "weights saved in place", book.save_model,
        ('save_atomically(model.state_dict(), folder / "best_model.pt")',
         'torch.save(model.state_dict(), folder / "best_model.pt")'),
        looks='`torch.save(…, folder / "best_model.pt")`',
        shows="killed at the wrong moment, the best model is lost", find="watch the file",
        hint="best_model.pt is written over in place")

changed("load_model", "in training mode", book.load_model, ("model.eval()", "model"),
        looks="`return model`", shows="another answer each time", find=TWICE,
        hint="comes back in training mode")
changed("load_model", "strict=False", book.load_model,
        ("load_state_dict(weights)", "load_state_dict(weights, strict=False)"),
        looks="`load_state_dict(weights, strict=False)`",
        shows="one layer stays random, and nothing is said", find="take a weight out of the file",
        hint="lacks a weight")
changed("load_model", "weights never loaded", book.load_model,
        ("model.load_state_dict(weights)", "dict(weights)"), looks="the line forgotten",
        shows="a loaded model answers by chance", find="compare before and after",
        hint="other weights than were saved")
changed("load_model", "a code-running load", book.load_model,
        ('load_tensors(folder / "best_model.pt")',
         'torch.load(folder / "best_model.pt", weights_only=False)'),
        looks="`torch.load(…, weights_only=False)`", shows="a downloaded model may run anything",
        find="a pickle with `__reduce__`", hint="it runs a command")


# balance and resume


def balancing(rule):
    def balance(labels, num_labels):
        counts = torch.bincount(torch.tensor(labels), minlength=num_labels).float()
        return rule(len(labels), num_labels, counts.clamp_min(1))
    return balance


for _name, _rule, _looks, _shows, _hint in (
    ("inverted", lambda n, k, c: k * c / n, "`counts / n`",
     "rare classes are ignored even more", "the weights are inverted"),
    ("without the number of classes", lambda n, k, c: n / c, "`n / counts`",
     "weights four times as large; only their ratio matters to the loss, not to a reader",
     "the number of classes is left out"),
    ("summing to 1", lambda n, k, c: (1 / c) / (1 / c).sum(), "`w / w.sum()`",
     "as above", "the weights sum to 1"),
    ("mean 1 over the classes", lambda n, k, c: k * (1 / c) / (1 / c).sum(), "`w / w.mean()`",
     "as above", "not over the classes"),
):
    mistake("balance", _name, looks=_looks, shows=_shows, find="`weights[labels].mean()`",
            hint=_hint)(balancing(_rule))


@mistake("balance", "an empty class", looks="`n / (k * counts)`",
         shows="infinite times 0: the loss is NaN", find="a class without a post",
         hint="infinite weight")
def empty_class(labels, num_labels):
    counts = torch.bincount(torch.tensor(labels), minlength=num_labels)
    return len(labels) / (num_labels * counts.float())


@mistake("balance", "classes forgotten", looks="`torch.bincount(labels)`",
         shows="an index error at the first rare post", find="a class without a post",
         hint="look for minlength".replace("look", "Look"))
def too_few(labels, num_labels):
    return len(labels) / (num_labels * torch.bincount(torch.tensor(labels)).clamp_min(1).float())


@right("balance", "by numpy and a loop")
def balance_by_loop(labels, num_labels):
    counts = np.array([max(1, list(labels).count(c)) for c in range(num_labels)])
    return torch.tensor(len(labels) / counts / num_labels, dtype=torch.float32)


changed("resume", "optimizer forgotten", book.resume,
        ('    optimizer.load_state_dict(state["optimizer"])\n', ""),
        looks="only the model is loaded", shows="a bump in the loss after each resumed epoch",
        find="compare with a run that never stopped", hint="does not get its running means back")
changed("resume", "model forgotten", book.resume,
        ('    model.load_state_dict(state["model"])\n', ""), looks="only the optimizer is loaded",
        shows="the loss jumps back to ln 6", find="compare weights",
        hint="does not get the saved weights")
changed("resume", "any settings", book.resume, ('state["settings"] != settings', "False"),
        looks="settings never compared", shows="two runs become one", find="another seed",
        hint="two runs would become one")
changed("resume", "compared too late", book.resume,
        ('    if state["settings"]', '    model.load_state_dict(state["model"])\n'
         '    if state["settings"]'),
        looks="load first, compare afterwards", shows="refused, and the model is another one",
        find="compare weights after the refusal", hint="compare first")
changed("resume", "damage taken for none", book.resume,
        ("    state = load_tensors(path)\n",
         "    try:\n        state = load_tensors(path)\n"
         "    except ValueError:\n        return []\n"),
        looks="`except ValueError: return []`", shows="eleven epochs are thrown away silently",
        find="cut the file in half", hint="half a file is not refused")


# training_step

LINES = {
    "zero": "    optimizer.zero_grad()\n", "backward": "    accelerator.backward(loss)\n",
    "clip": "    accelerator.clip_grad_norm_(model.parameters(), config.clip)\n",
    "step": "    optimizer.step()\n",
}
WHOLE = "".join(LINES.values())


def ordered(*names):
    return WHOLE, "".join(LINES[name] for name in names)


ORDERS = {
    "zero_grad missing": (
        ("backward", "clip", "step"), "three lines of four",
        "the loss falls, then swings wildly", "zero_grad is missing"),
    "zero_grad between backward and step": (
        ("backward", "zero", "clip", "step"), "`backward`, `zero_grad`, `step`",
        "the loss does not move at all", "wipes out what it computed"),
    "step before backward": (
        ("zero", "step", "backward", "clip"), "`step`, `backward`",
        "nothing is learned, or one batch late", "steps before backward"),
    "step before backward, cleared at the end": (
        ("step", "backward", "clip", "zero"), "`step`, `backward`, `zero_grad`",
        "nothing is learned", "it moves by the gradients of the batch before"),
    "clip before backward": (
        ("zero", "clip", "backward", "step"), "`clip`, `backward`",
        "now and then one huge step, as without", "clipped before backward"),
    "clip after step": (
        ("zero", "backward", "step", "clip"), "`step`, `clip`",
        "now and then one huge step, as without", "only after the step"),
    "no step": (
        ("zero", "backward", "clip"), "`optimizer.step()` forgotten",
        "the loss does not move at all", "optimizer.step() is missing"),
}
for _name, (_order, _looks, _shows, _hint) in ORDERS.items():
    changed(STEP, _name, book.training_step, ordered(*_order), looks=_looks, shows=_shows,
            find=SGD, hint=_hint)

changed(STEP, "clipped by value", book.training_step,
        ("accelerator.clip_grad_norm_(model.parameters(), config.clip)",
         "torch.nn.utils.clip_grad_value_(model.parameters(), config.clip)"),
        looks="`clip_grad_value_`", shows="steps turn away from the gradient", find=SGD,
        hint="clipped by value")
changed(STEP, "clipped one by one", book.training_step,
        (LINES["clip"], "    for p in model.parameters():\n"
         "        torch.nn.utils.clip_grad_norm_([p], config.clip)\n"),
        looks="a loop over parameters", shows="steps turn away from the gradient", find=SGD,
        hint="clipped by itself")
changed(STEP, "in evaluation mode", book.training_step,
        ("    half =", "    model.eval()\n    half ="), looks="`model.eval()` inside",
        shows="no dropout: the train loss is low and validation poor", find="print the mode",
        hint="dropout never acts")
changed(STEP, "softmax before the loss", book.training_step,
        ("cross_entropy(logits.float(),", "cross_entropy(logits.float().softmax(-1),"),
        looks="`cross_entropy(probabilities, …)`", shows="the loss falls to about 1 and stays",
        find=SGD, hint="the loss is taken of probabilities")
changed(STEP, "the loss with its graph", book.training_step, ("loss.detach()", "loss"),
        looks="`losses.append(loss)`", shows="memory grows with every step", find="watch memory",
        hint="keeps every activation of the epoch")
changed(STEP, "the loss as a number", book.training_step, ("loss.detach()", "loss.item()"),
        looks="`return loss.item()`", shows="a GPU waits in every step", find="profile",
        hint="waits for the GPU in every step")
changed(STEP, "class weights not passed on", book.training_step,
        ("labels, weights)", "labels)"), looks="`cross_entropy(logits, labels)`",
        shows="`class_weights=True` changes nothing", find=SGD,
        hint="the class weights are not used")
changed(STEP, "labels popped from the caller's batch", book.training_step,
        ("    batch = dict(batch)\n", ""), looks='`batch.pop("labels")` of what came in',
        shows="KeyError when the batch is used again", find="use a batch twice",
        hint="takes the labels out of the batch")
changed(STEP, "no attention mask", book.training_step,
        ("model(**batch)", 'model(batch["input_ids"])'), looks='`model(batch["input_ids"])`',
        shows="padding counts; short posts suffer", find=SGD, hint="without attention_mask")
changed(STEP, "bfloat16 never on", book.training_step, ("enabled=half", "enabled=False"),
        looks="`enabled=False`", shows="several times slower on some processors", find="profile",
        hint="the forward pass runs in float32")


@right(STEP, "cleared at the end, PyTorch's own calls")
def cleared_at_end(model, batch, optimizer, config, accelerator, weights=None):
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    half = config.precision == "bf16"
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        logits = model(**inputs)
    loss = F.cross_entropy(logits.float(), batch["labels"], weights)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(list(model.parameters()), config.clip)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach().clone()


# train

BITS = "compare with a run that never stopped, bit by bit"
changed(TRAIN, "the last epoch kept", book.train,
        ("if history[-1] is max(history, key=lambda row: row[\"macro_f1\"]):", "if True:"),
        looks="`save_model` after every epoch", shows="macro-F1 below the best of the history",
        find="compare it with the history's maximum", hint="those of the last epoch")
changed(TRAIN, "the lowest loss kept", book.train,
        ('max(history, key=lambda row: row["macro_f1"])',
         'min(history, key=lambda row: row["loss"])'),
        looks='`min(history, key=… "loss")`', shows="an early epoch wins, a point or two lower",
        find="compare it with the history's maximum", hint="the epoch with the lowest loss")
changed(TRAIN, "the best accuracy kept", book.train,
        ('key=lambda row: row["macro_f1"]', 'key=lambda row: row["accuracy"]'),
        looks='`max(history, key=… "accuracy")`', shows="rare classes are ignored",
        find="compare it with the history's maximum", hint="with the best accuracy")
changed(TRAIN, "the best never loaded", book.train,
        ('    plain.load_state_dict(load_tensors(folder / "best_model.pt"))\n', ""),
        looks="`return history` at once", shows="the model is worse than its saved file",
        find="evaluate both", hint="at the end the model holds not the weights")
changed(TRAIN, "evaluation mode from the second epoch on", book.train,
        ("        model.train()\n", ""), ("    processes = accelerator.num_processes\n",
                                          "    model.train()\n"
                                          "    processes = accelerator.num_processes\n"),
        ("**evaluate(plain, tokenizer, dataset[\"validation\"])",
         "**evaluate(plain.eval(), tokenizer, dataset[\"validation\"])"),
        looks="`model.train()` once, before the loop", shows="overfits from the second epoch on",
        find="print `model.training` in each epoch", hint="in evaluation mode from some step on")
changed(TRAIN, "the schedule starts over", book.train,
        ("                step, warmup=round(config.warmup * total), total=total\n",
         "                step % steps, warmup=round(config.warmup * steps), total=steps\n"),
        looks="`step` counted from 0 in each epoch", shows="a saw-tooth in the loss", find=PLOT,
        hint="starts over in every epoch")
changed(TRAIN, "no schedule", book.train,
        ('group["lr"] = config.learning_rate * factor * scale',
         'group["lr"] = config.learning_rate * scale'),
        looks="`factor` never used", shows="jumps about to the end", find=PLOT,
        hint="the learning rate never changes")
changed(TRAIN, "total without the last batches", book.train,
        ("math.ceil(math.ceil(len(labels) / config.batch_size) / processes)",
         "len(labels) // config.batch_size // processes"),
        looks="`len(labels) // batch_size`", shows="the last steps have the rate 0", find=PLOT,
        hint="leaves out the last, smaller batches")
changed(TRAIN, "warm-up as a number of steps", book.train,
        ("warmup=round(config.warmup * total)", "warmup=round(config.warmup)"),
        looks="`warmup=config.warmup`", shows="no warm-up", find=PLOT, hint="there is no warm-up")
changed(TRAIN, "everything decayed", book.train,
        ("groups or parameter_groups(model, config.weight_decay),",
         "groups or model.parameters(),\n        weight_decay=config.weight_decay,"),
        looks="`AdamW(model.parameters(), …)`", shows="norms shrink", find="print the optimizer",
        hint="pass parameter_groups")
changed(TRAIN, "Adam in place of AdamW", book.train, ("torch.optim.AdamW(", "torch.optim.Adam("),
        looks="`torch.optim.Adam`", shows="decay hardly acts where gradients are large",
        find="print the optimizer", hint="the chapter's is AdamW")
changed(TRAIN, "scale ignored", book.train, (" * factor * scale", " * factor"),
        looks='`group["lr"] = rate * factor`', shows="all layers learn at one pace",
        find="print the groups", hint="multiply by group.get")
changed(TRAIN, "class weights ignored", book.train, ("if config.class_weights:", "if False:"),
        looks="`weights = None`", shows="the setting changes nothing", find="one batch at rate 0",
        hint="config.class_weights is not looked at")
changed(TRAIN, "one cut for all epochs", book.train, ("cutter(seed), labels", "cutter(0), labels"),
        looks="`rows = cutter(0)` before the loop", shows="learns tweets by heart sooner",
        find="compare the rows of two epochs", hint="in every epoch words are cut the same way")
changed(TRAIN, "starts over after a kill", book.train,
        ("    history = resume(\n        folder / \"training_state.pt\", settings, plain, "
         "optimizer\n    )\n", "    history = []\n"),
        looks="the state is saved and never read", shows="a night's work begins again",
        find="kill it in the second epoch", hint="starts over")
changed(TRAIN, "dropout goes on with old dice", book.train,
        ("        torch.manual_seed(seed + accelerator.process_index)  # for dropout\n",
         "        if epoch == 0:\n            torch.manual_seed(seed)\n"),
        looks="`torch.manual_seed(seed)` once, before the loop",
        shows="a resumed run ends elsewhere", find=BITS, hint="dropout rolls other dice")
changed(TRAIN, "the step not restored", book.train,
        ("    step = len(history) * steps\n", "    step = 0\n"), looks="`step = 0`",
        shows="after a kill the warm-up begins again", find="print the rate",
        hint="after resuming, the learning rate is another")
changed(TRAIN, "batches by chance", book.train,
        ("1_000_003 * config.seed + 1009 * epoch", "random.randrange(10**6)"),
        looks="`seed = random.randrange(…)`", shows="no two runs are alike", find=BITS,
        hint="after resuming, the batches are others")
changed(TRAIN, "the seed forgotten", book.train,
        ("1_000_003 * config.seed + 1009 * epoch", "1009 * epoch"), looks="`seed = epoch`",
        shows="five seeds give one number, five times", find="two seeds",
        hint="config.seed is not used")
changed(TRAIN, "optimizer state not kept", book.train,
        ('"optimizer": optimizer.state_dict(),',
         '"optimizer": torch.optim.AdamW(optimizer.param_groups).state_dict(),'),
        looks="only weights are saved", shows="a bump in the loss after each kill", find=BITS,
        hint="the optimizer's state is not kept")
changed(TRAIN, "one loss for an epoch", book.train, ("torch.stack(losses).mean()",
                                                     "torch.stack(losses).sum()"),
        looks="`sum(losses)`", shows="the loss depends on the number of posts",
        find="one epoch at rate 0", hint="average over the batches of the epoch")

changed("train_from_scratch", "tokenizer has seen validation", book.train_from_scratch,
        ('dataset["train"]["text"], vocab_size',
         'list(dataset["train"]["text"]) + list(dataset["validation"]["text"]), vocab_size'),
        looks="the tokenizer is trained on all texts", shows="validation a little too good",
        find="a letter that only validation has", hint="training split alone")
changed("train_from_scratch", "no seed for the weights", book.train_from_scratch,
        ("    torch.manual_seed(config.seed)\n", ""), looks="`torch.manual_seed` forgotten",
        shows="no run can be repeated", find="twice with one seed",
        hint="start from different weights")
changed("train_from_scratch", "a fixed seed", book.train_from_scratch,
        ("torch.manual_seed(config.seed)", "torch.manual_seed(0)"), looks="`manual_seed(0)`",
        shows="five seeds start from one place; the spread is too small", find="two seeds",
        hint="starts from the same weights")
changed("train_from_scratch", "vocab_size as asked for", book.train_from_scratch,
        ("vocab_size=tokenizer.get_vocab_size()", "vocab_size=vocab_size + 9"),
        looks="`vocab_size=vocab_size`", shows="rows of the embedding that no token uses",
        find="compare the two", hint="ask the tokenizer")
changed("train_from_scratch", "changes lose", book.train_from_scratch,
        ("**SCRATCH | changes", "**changes | SCRATCH"), looks="`SCRATCH` merged last",
        shows="every variant of the ablation is the same model", find="print the config",
        hint="changes come after SCRATCH")
changed("train_from_scratch", "six classes always", book.train_from_scratch,
        ('num_labels=dataset["train"].features["label"].num_classes', "num_labels=6"),
        looks="`num_labels=6`", shows="two classes that never occur, and macro-F1 lower for it",
        find="a dataset of three classes", hint="ask the features of the label column")


# make_baseline


def baseline(words=(1, 2), runs=(2, 5), analyzer="char_wb", kind=TfidfVectorizer, svm=LinearSVC,
             strategy="most_frequent", **options):
    def make_baseline(kind_, strength=1.0, class_weight=None):
        if kind_ == "majority":
            return make_pipeline(DummyClassifier(strategy=strategy))
        more = {"sublinear_tf": True} if kind is TfidfVectorizer else {}
        word = kind(ngram_range=words, **more | options)
        character = kind(analyzer=analyzer, ngram_range=runs, **more | options)
        features = {"tfidf-words": word, "tfidf-words-chars": make_union(word, character)}
        if kind_ not in features:
            raise ValueError(f"no such kind: {kind_!r}")
        return make_pipeline(features[kind_], svm(
            C=strength, class_weight=class_weight, random_state=0))
    return make_baseline


for _name, _made, _looks, _shows, _hint in (
    ("words without pairs", baseline(words=(1, 1)), "`TfidfVectorizer()`",
     "the rival is a point weaker than it could be", "pairs of words too"),
    ("runs across words", baseline(analyzer="char"), '`analyzer="char"`',
     "many features of two halves of words", "go across words"),
    ("not dampened", baseline(sublinear_tf=False), "`sublinear_tf` forgotten",
     "a word said five times counts five times", "not dampened"),
    ("counts", baseline(kind=CountVectorizer), "`CountVectorizer`",
     "frequent words drown the rest", "how rare they are"),
    ("drawn at random", baseline(strategy="stratified"), '`strategy="stratified"`',
     "the floor is another one each time", "it draws at random"),
    ("C forgotten", lambda kind, strength=1.0, class_weight=None: make_baseline(
        kind, 1.0, class_weight), "`LinearSVC()`", "tuning changes nothing",
     "strength is not used"),
):
    mistake("make_baseline", _name, looks=_looks, shows=_shows,
            find="print the pipeline", hint=_hint)(_made)

right("make_baseline", "written out again")(baseline())


# The exercises


@mistake("gradients_without_zero", "no copies kept", looks="`found.append(parameter.grad)`",
         shows="all entries are the last one", find="compare the first with the last",
         hint="a copy must be kept each time")
def no_copies(parameter, loss_of, times):
    found, parameter.grad = [], None
    for _ in range(times):
        loss_of().backward()
        found.append(parameter.grad)
    return found


@mistake("gradients_without_zero", "cleared all the same", looks="`parameter.grad = None` inside",
         shows="all alike", find="compare the first with the last", hint="is cleared in between")
def cleared(parameter, loss_of, times):
    found = []
    for _ in range(times):
        parameter.grad = None
        loss_of().backward()
        found.append(parameter.grad.clone())
    return found


def lengths(parameters):
    return [p.grad for p in parameters if p.grad is not None]


@mistake("clip_gradients", "each by itself", looks="a loop with `g.norm()`",
         shows="steps turn away from the gradient", find="compare with `clip_grad_norm_`",
         hint="measure all together")
def clip_each(parameters, largest):
    grads = lengths(parameters)
    for g in grads:
        g.mul_(min(1.0, largest / (g.norm() + 1e-6)))
    return sum(g.square().sum() for g in grads).sqrt()


@mistake("clip_gradients", "short ones stretched", looks="`g.mul_(largest / length)`",
         shows="each step has the same length; the end never settles",
         find="gradients shorter than largest", hint="scaled up")
def clip_always(parameters, largest):
    grads = lengths(parameters)
    length = sum(g.square().sum() for g in grads).sqrt()
    for g in grads:
        g.mul_(largest / (length + 1e-6))
    return length


@mistake("clip_gradients", "a generator read twice", looks="two loops over `parameters`",
         shows="nothing is clipped with `model.parameters()`", find="pass a generator",
         hint="can be read only once")
def clip_twice(parameters, largest):
    length = sum(p.grad.square().sum() for p in parameters if p.grad is not None).sqrt()
    for p in parameters:
        if p.grad is not None:
            p.grad.mul_(min(1.0, largest / (length + 1e-6)))
    return length


@mistake("smoothed_cross_entropy", "shared by the others alone", looks="`share / (k - 1)`",
         shows="near PyTorch's loss, and not equal", find="`F.cross_entropy(label_smoothing=…)`",
         hint="the other classes alone")
def others_alone(logits, labels, share):
    logs, k = logits.log_softmax(-1), logits.shape[-1]
    truth = F.one_hot(labels, k) * (1 - share - share / (k - 1)) + share / (k - 1)
    return -(truth * logs).sum(-1).mean()


@mistake("accumulated_step", "uneven batches weigh the same", looks="`loss / len(batches)`",
         shows="texts of small batches count more", find="compare with one large batch",
         hint="they are not equally large")
def weigh_alike(model, batches, optimizer):
    optimizer.zero_grad()
    for batch in batches:
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        loss = F.cross_entropy(model(**inputs), batch["labels"]) / len(batches)
        loss.backward()
    optimizer.step()
    return loss.item()


@mistake("accumulated_step", "cleared before each batch", looks="`zero_grad` inside the loop",
         shows="the last batch alone counts", find="compare with one large batch",
         hint="only the last batch counts")
def cleared_each(model, batches, optimizer):
    count = sum(len(b["labels"]) for b in batches)
    for batch in batches:
        optimizer.zero_grad()
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        loss = F.cross_entropy(model(**inputs), batch["labels"], reduction="sum") / count
        loss.backward()
    optimizer.step()
    return loss.item()


def adam(decayed="weight", correct=True):
    def adamw_step(weight, gradient, mean, square, step, *, lr, weight_decay):
        if decayed == "gradient":
            gradient = gradient + weight_decay * weight
        else:
            weight = weight * (1 - lr * weight_decay)
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.999 * square + 0.001 * gradient**2
        a, b = (1 - 0.9**step, 1 - 0.999**step) if correct else (1, 1)
        return weight - lr * (mean / a) / ((square / b).sqrt() + 1e-8), mean, square
    return adamw_step


mistake("adamw_step", "decay in the gradient", looks="`gradient + weight_decay * weight`",
        shows="decay hardly acts where gradients are large", find="compare with `AdamW`",
        hint="Adam with L2")(adam(decayed="gradient"))
mistake("adamw_step", "no correction at the start", looks="`mean / (square.sqrt() + eps)`",
        shows="the first steps are three times too long", find="compare with `AdamW`",
        hint="the means are not corrected")(adam(correct=False))


@mistake("leak_into", "the dataset itself changed", looks='`dataset["train"] = …`',
         shows="every later run leaks, and nobody knows", find="count posts before and after",
         hint="it changes the dataset that was passed in")
def leak_in_place(dataset, count, times):
    from datasets import concatenate_datasets
    few = dataset["validation"].select(range(count))
    dataset["train"] = concatenate_datasets([dataset["train"], *[few] * times])
    return dataset


def averaging(rule, start=lambda p: p.detach().clone()):
    class WeightAverage:
        def __init__(self, model, decay):
            self.decay = decay
            self.average = [start(p) for p in model.parameters()]

        @torch.no_grad()
        def update(self, model):
            self.average = [rule(self.decay, a, p) for a, p in
                            zip(self.average, model.parameters(), strict=True)]

        @torch.no_grad()
        def copy_to(self, model):
            for a, p in zip(self.average, model.parameters(), strict=True):
                p.copy_(a)
    return WeightAverage


mistake("WeightAverage", "no copies", looks="`dict(model.state_dict())`",
        shows="the average is the model itself", find="move the model and look",
        hint="the model's own tensors were kept")(
            averaging(lambda d, a, p: d * a + (1 - d) * p, start=lambda p: p.detach()))
mistake("WeightAverage", "shares mixed up", looks="`(1 - decay) * average + decay * weight`",
        shows="hardly any smoothing", find="two updates by hand",
        hint="decay is the share of the old average")(
            averaging(lambda d, a, p: (1 - d) * a + d * p))
mistake("WeightAverage", "started at zero", looks="`torch.zeros_like(p)`",
        shows="weights far too small for the first hundred steps", find="two updates by hand",
        hint="the average starts at 0")(
            averaging(lambda d, a, p: d * a + (1 - d) * p, start=torch.zeros_like))
right("WeightAverage", "a list of tensors")(averaging(lambda d, a, p: a.lerp(p, 1 - d)))
