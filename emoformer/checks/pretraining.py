"""Checks for chapter 10: holes, many labels, a run, and a model in half the space."""

import contextlib
import copy
import hashlib
import importlib
import io
import json
import math
import os
import random
import tempfile
from dataclasses import FrozenInstanceError, asdict, dataclass, replace
from itertools import permutations
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from .bench import (
    Battery,
    Broke,
    Skip,
    Wrong,
    expect,
    expect_learning,
    expect_tensor,
    expect_to_move,
    explain,
    near,
    sample,
    scramble,
    unhurried,
)

PAD, UNK, CLS, SEP, MASK = range(5)
NAMES = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
MINUS = float("-inf")


# What several chapters' checks need


@dataclass(frozen=True)
class Shape:
    """What `EmoformerConfig` holds, so that no chapter is needed for it."""

    vocab_size: int = 30
    d_model: int = 8
    num_heads: int = 2
    num_layers: int = 2
    d_ff: int = 12
    max_len: int = 24
    num_labels: int = 7
    dropout: float = 0.1
    positions: str = "learned"
    num_segments: int = 0
    norm_first: bool = False
    pooling: str = "mean"
    layer_norm_eps: float = 1e-12

    def __post_init__(self):
        if self.num_labels < 1 or not 0 <= self.dropout < 1:
            raise ValueError("num_labels must be at least 1, dropout in [0, 1)")


def needs(chapter, module, name):
    """Fetch what another chapter exports, or skip."""
    try:
        return getattr(importlib.import_module(f"emoformer.{module}"), name)
    except Exception:
        raise Skip(f"needs chapter {chapter:02}: {name} is not there") from None


def working(chapter, name, call):
    """Call something of another chapter, or skip where it is not written."""
    try:
        return call()
    except Exception as error:
        raise Skip(
            f"needs chapter {chapter:02}: {name} does not work yet "
            f"({type(error).__name__})"
        ) from None


def transformer(shape=None):
    """Chapter 07's model for a shape, with random weights, or skip."""
    model_class = needs(7, "classifier", "TransformerForSequenceClassification")
    return working(
        7, "TransformerForSequenceClassification",
        lambda: scramble(model_class(shape or Shape()), size=0.3),
    )


def refused(subject, call, hint, kinds=(ValueError, TypeError, AssertionError)):
    """Expect a call to raise one of some exceptions."""
    try:
        subject.run(call)
    except Broke:
        if isinstance(subject.last_error, kinds):
            return subject.last_error
        raise
    raise Wrong(hint)


@contextlib.contextmanager
def own_dice():
    """Let a run set the global seed, and hear no progress bar."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]), contextlib.redirect_stderr(io.StringIO()):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def tensors_of(module):
    """A copy of all weights."""
    return {k: v.detach().cpu().clone() for k, v in module.state_dict().items()}


def same(one, two):
    """Whether two copies of weights are equal."""
    return one.keys() == two.keys() and all(torch.equal(v, two[k]) for k, v in one.items())


# corrupt

corrupt_battery = Battery(
    "corrupt", "corrupt(input_ids, *, vocab_size, share, generator) -> spoilt, chosen",
    chapter=10, takes=("input_ids", "vocab_size", "share", "generator"),
)
VOCAB = 50
COLUMNS = 60


def long_batch():
    """(400, 60) ids; some columns hold special tokens."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, VOCAB, (400, COLUMNS), generator=generator)
    ids[:, 0], ids[:, 20], ids[:, 21] = CLS, UNK, MASK
    ids[:, -5], ids[:, -4:] = SEP, PAD
    return ids


IDS = long_batch()
MANY = IDS.repeat(12, 1)  # for shares to a hundredth
ORDINARY = IDS >= 5
KEPT_ONLY = (
    "chosen holds only the positions whose token has changed: the tenth that is chosen "
    "and stays as it is must be in it as well, for it has to be guessed too"
)


def spoil(function, ids=IDS, share=0.15, seed=0, vocab_size=VOCAB, generator=None):
    """Call the reader's function on a copy; give ids, mask and the copy."""
    given = ids.clone()
    dice = torch.Generator().manual_seed(seed) if generator is None else generator
    result = function.run(lambda: function.thing(
        given, vocab_size=vocab_size, share=share, generator=dice,
    ))
    expect(
        isinstance(result, (tuple, list)) and len(result) == 2,
        "it must return two tensors, the spoilt ids and the mask of the chosen "
        f"positions, but it returns {type(result).__name__}",
    )
    spoilt, chosen = result
    expect_tensor(spoilt, ids.shape, what="the first result, the spoilt ids,")
    expect_tensor(chosen, ids.shape, what="the second result, the chosen positions,")
    return spoilt, chosen, given


@corrupt_battery.property("returns the spoilt ids and a bool mask, shaped like the input")
def corrupt_shape(function):
    for shape in ((3, 7), (1, 1), (400, COLUMNS)):
        ids = IDS[: shape[0], 1 : shape[1] + 1] if shape[1] < COLUMNS else IDS
        spoilt, chosen, _ = spoil(function, ids)
        expect(
            spoilt.dtype == torch.int64,
            f"the spoilt ids must be int64, but they are {spoilt.dtype}",
        )
        expect(
            chosen.dtype == torch.bool,
            f"the mask of the chosen positions must be bool, but it is {chosen.dtype}"
            + (": it seems to hold labels; the loss of this chapter takes a mask"
               if chosen.dtype == torch.int64 else ""),
        )


@corrupt_battery.property("leaves its input as it is")
def corrupt_input(function):
    spoilt, _, given = spoil(function, share=0.5)
    expect(
        torch.equal(given, IDS),
        "the input itself is spoilt: it holds the answers, so the loss would ask for "
        "[MASK]. Look for input_ids[…] = … or masked_fill_, and work on a clone",
    )
    expect(
        spoilt.data_ptr() != given.data_ptr(),
        "the spoilt ids are the input itself, not a new tensor",
    )


@corrupt_battery.property("chooses ordinary tokens only")
def corrupt_special(function):
    for share in (1.0, 0.5):
        _, chosen, _ = spoil(function, share=share)
        wrong = [
            name for i, name in enumerate(NAMES)
            if bool((chosen & (IDS == i)).any())
        ]
        expect(not wrong, (
            f"special tokens are chosen: {', '.join(wrong)}. There is nothing to learn "
            "from guessing them; only ids of 5 and above may be chosen"
            + (" (padding is an id like the others: 0)" if wrong == ["[PAD]"] else "")
            + (" (not >, and not the padding alone)" if len(wrong) > 1 else "")
        ))
    low = torch.full((40, 10), 5)
    _, chosen, _ = spoil(function, low, share=1.0)
    expect(
        bool(chosen.any()),
        "the first ordinary token, id 5, is never chosen: it is >= 5, not > 5",
    )


@corrupt_battery.property("chooses each ordinary token with the chance share")
def corrupt_share(function):
    _, chosen, _ = spoil(function, share=0.3)
    inside = chosen[ORDINARY].view(len(IDS), -1).float()
    some = 0.05 < inside.mean() < 0.95
    expect(
        not some or inside.std(dim=0).min() > 0.1,
        "the same positions are chosen in all texts: the dice must have the shape of "
        "input_ids, not of one row",
    )
    expect(
        not some or inside.std(dim=1).min() > 0.1,
        "texts are chosen whole or not at all: the dice must have the shape of "
        "input_ids, one for each token",
    )
    for share in (0.15, 0.5, 1.0):
        spoilt, chosen, _ = spoil(function, share=share)
        rate = (chosen & ORDINARY).sum() / ORDINARY.sum()
        room = 6 * math.sqrt(share * (1 - share) / int(ORDINARY.sum())) + 1e-6
        if abs(rate - share) <= room:
            continue
        moved = bool((spoilt != IDS)[chosen].all())

        def about(value, rate=rate):
            return abs(rate - value) < 0.02

        if moved and about(0.9 * share):
            raise Wrong(KEPT_ONLY)
        for value, hint in (
            (0.8 * share, "chosen holds the masked positions only: those that become "
             "another token or stay must be guessed too"),
            (1 - share, "the comparison is the wrong way round: a token is chosen where "
             "the die falls below share"),
            (0.15, "the argument share is ignored: 0.15 is written into the code"),
            (1.0, "all tokens are chosen: the argument share is not used"),
            (0.0, "nothing is chosen"),
        ):
            if about(value):
                raise Wrong(hint)
        raise Wrong(
            f"with share={share:g} {share:.0%} of the ordinary tokens must be chosen, "
            f"but {rate:.1%} are"
        )
    counts = inside.sum(dim=1)
    width = inside.shape[1] * 0.3 * 0.7
    expect(
        0.4 * width < counts.var() < 2.2 * width,
        "the number of chosen tokens varies too little or too much from text to text: "
        "here each token has a die of its own (BERT draws a fixed number a text)",
    )
    spoilt, chosen, _ = spoil(function, share=0.0)
    expect(
        not chosen.any() and torch.equal(spoilt, IDS),
        "with share=0 something is chosen or changed: nothing may be",
    )


def fates(function, share, seed=0, ids=IDS):
    """Shares of the chosen that were masked, replaced, kept; and the tensors."""
    spoilt, chosen, _ = spoil(function, ids, share=share, seed=seed)
    count = max(1, int(chosen.sum()))
    masked, kept = chosen & (spoilt == MASK), chosen & (spoilt == ids)
    other = chosen & ~masked & ~kept
    return [int(x.sum()) / count for x in (masked, other, kept)], spoilt, chosen, count


@corrupt_battery.property("masks 80, replaces 10 and keeps 10 in 100 of the chosen")
def corrupt_fates(function):
    for share, seed in ((1.0, 0), (0.4, 1)):
        found, _, chosen, count = fates(function, share, seed, MANY)
        again = 0.1 / (VOCAB - 5)  # drawn as it was
        wanted = (0.8, 0.1 - again, 0.1 + again)
        room = 6 * math.sqrt(0.16 / count)
        if all(abs(f - w) < room for f, w in zip(found, wanted, strict=True)):
            continue
        patterns = (
            ((1, 0, 0), "all chosen tokens become [MASK]: a tenth must become another "
             "token, and a tenth stay, for later there is no [MASK] in the input"),
            ((0.8, 0.2, 0), "no chosen token stays as it is: the last fifth must be cut "
             "in two, a tenth is replaced and a tenth kept"),
            ((0.8, 0, 0.2), "no chosen token becomes another one: the last fifth must "
             "be cut in two, a tenth is replaced and a tenth kept. (If the random ids "
             "are drawn but not used, look at the condition.)"),
            ((0.9, 0.1, 0), "nine tenths become [MASK] and none stays: the steps are "
             "0.8 and 0.9"),
            ((0.9, 0, 0.1), "no chosen token becomes another one: the [MASK] overwrites "
             "them, so its condition must end at 0.8"),
            ((0.8, 0.18, 0.02), "80, 18, 2: the die of the second question is thrown "
             "again among all chosen, or its step is 0.9. After 0.8 is used up, the "
             "rest must be halved: use one die, with the steps 0.8 and 0.9"),
            ((0.8, 0.02, 0.18), "80, 2, 18: the die of the second question is a new one, "
             "and its chance is 0.1 of the rest. The rest must be halved: use one die, "
             "with the steps 0.8 and 0.9, or a chance of 0.5"),
            ((0.72, 0.1, 0.18), "72, 10, 18: the random tokens overwrite some of the "
             "[MASK]: two dice that do not know of each other. Use one die"),
            ((0.81, 0.1, 0.09), "81, 10, 9: the kept tenth is a tenth of what is not "
             "replaced yet, by a second die. Use one die, with the steps 0.8 and 0.9"),
            ((0.1, 0.8, 0.1), "80 in 100 are replaced and 10 masked: the two are "
             "exchanged"),
            ((0.1, 0.1, 0.8), "10 in 100 are masked and 80 kept: the comparison is the "
             "wrong way round"),
            ((0.2, 0.4, 0.4), "the comparison with 0.8 is the wrong way round"),
            ((0, 0.1, 0.9), "nothing becomes [MASK]: its id is 4"),
            ((0, 0, 1), "nothing is spoilt: chosen is right, but the ids come back as "
             "they were"),
            ((0, 1, 0), "no chosen token becomes [MASK] (its id is 4) and none stays"),
            ((8 / 9, 1 / 9, 0), KEPT_ONLY),
            ((0, 0.9, 0.1), "nothing becomes [MASK]: its id is 4, but another one is "
             "put there"),
        )
        distance, hint = min(
            (max(abs(f - p) for f, p in zip(found, pattern, strict=True)), hint)
            for pattern, hint in patterns
        )
        if distance < 0.02:
            raise Wrong(hint)
        dice = ": the shares must be of the chosen tokens, not of all" if (
            abs(found[0] * share - 0.8) < 0.05) else ""
        masked, other, kept = (round(100 * f) for f in found)
        raise Wrong(
            f"of 100 chosen tokens {masked} are masked, {other} replaced and {kept} "
            f"kept, but 80, 10 and 10 it must be{dice}"
        )
    found, spoilt, chosen, _ = fates(function, 1.0)
    by_row = (spoilt == MASK)[ORDINARY].view(len(IDS), -1).float().mean(dim=1)
    expect(
        by_row.std() < 0.2,
        "a whole text has one fate: the die for masked, replaced or kept must be thrown "
        "for each token",
    )


@corrupt_battery.property("changes nothing that was not chosen")
def corrupt_rest(function):
    spoilt, chosen, _ = spoil(function, share=0.3)
    expect(
        torch.equal(spoilt[~chosen & ~ORDINARY], IDS[~chosen & ~ORDINARY]),
        "special tokens that were not chosen are changed",
    )
    changed = (spoilt != IDS) & ~chosen
    if not changed.any():
        return
    if bool((spoilt[changed] == MASK).all()):
        raise Wrong("tokens that were not chosen become [MASK]: look for a missing "
                    "chosen & in its condition")
    raise Wrong(
        f"{int(changed.sum())} tokens that were not chosen are changed: each of the "
        "conditions must hold for chosen positions only (chosen & …). The 80, 10 and "
        "10 in 100 are of the chosen"
    )


@corrupt_battery.property("draws other tokens from all ordinary ones, each anew")
def corrupt_drawn(function):
    spoilt, chosen, _ = spoil(function, share=1.0, seed=3)
    drawn = spoilt[chosen & (spoilt != MASK) & (spoilt != IDS)].long()
    if len(drawn) < 500:
        raise Skip("hardly any token is replaced; mend that first")
    shares = torch.bincount(drawn.clamp(0), minlength=VOCAB) / len(drawn)
    expect(
        shares.max() < 0.1,
        "the replacements are not drawn evenly: one token is drawn for a whole batch or "
        "far too often. Draw one for each position: torch.randint with the shape of "
        "input_ids",
    )
    expect(
        int(drawn.max()) < VOCAB,
        f"ids of {int(drawn.max())} are drawn, but the last one is vocab_size - 1: the "
        "end of torch.randint is not included, so no + 1",
    )
    expect(
        int(drawn.min()) >= 5,
        "special tokens are drawn as replacements: draw from 5 to vocab_size - 1, "
        "torch.randint(5, vocab_size, …), not from 0",
    )
    expect(
        int(drawn.max()) == VOCAB - 1,
        f"the last token, id {VOCAB - 1}, is never drawn: the end of torch.randint is "
        "not included already, so no - 1" if int(drawn.max()) == VOCAB - 2 else
        f"no id above {int(drawn.max())} is drawn, of {VOCAB} tokens: is vocab_size used?",
    )
    expect(
        int(drawn.min()) == 5,
        f"ids below {int(drawn.min())} are never drawn: the first ordinary one is 5",
    )
    values = spoilt.masked_fill(~(chosen & (spoilt != MASK) & (spoilt != IDS)), -1)
    several = [len(set(row[row >= 0].tolist())) for row in values if (row >= 0).sum() > 3]
    expect(
        sum(count > 1 for count in several) > 0.9 * len(several),
        "one replacement is drawn for a whole text: draw one for each position",
    )
    kept = [
        int((column[column >= 0]).unique().numel()) for column in values.T
        if (column >= 0).sum() > 10
    ]
    expect(
        min(kept) > 1,
        "one replacement is drawn for a column of all texts: draw one for each position",
    )
    before = torch.bincount(IDS[chosen & (spoilt != MASK) & (spoilt != IDS)], minlength=VOCAB)
    after = torch.bincount(drawn, minlength=VOCAB)
    expect(
        not torch.equal(before, after),
        "the replacements are the batch's own tokens in another order: draw them from "
        "the vocabulary",
    )


@corrupt_battery.property("takes all its chance from the generator")
def corrupt_generator(function):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = spoil(function, seed=7, share=0.3)
    after = torch.get_rng_state()
    torch.manual_seed(2)
    again = spoil(function, seed=7, share=0.3)
    if not (torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])):
        part = "which tokens are chosen" if not torch.equal(first[1], again[1]) else (
            "what becomes of the chosen")
        raise Wrong(
            f"the same generator gives other holes each time: {part} is drawn from "
            "PyTorch's global dice. Each torch.rand and randint needs generator=generator"
        )
    expect(
        torch.equal(before, after),
        "it draws from PyTorch's global dice as well, or sets their seed: each draw "
        "needs generator=generator, and no manual_seed",
    )
    other = spoil(function, seed=8, share=0.3)
    expect(
        not torch.equal(first[1], other[1]),
        "another generator gives the same holes: a seed is written into the code",
    )
    expect(
        not torch.equal(first[0], other[0]),
        "another generator gives the same replacements",
    )
    dice = torch.Generator().manual_seed(7)
    one = spoil(function, share=0.3, generator=dice)
    two = spoil(function, share=0.3, generator=dice)
    expect(
        not torch.equal(one[1], two[1]),
        "two calls with one generator give the same holes: it is set back or copied "
        "inside, so a model would see the same holes in every epoch",
    )


@corrupt_battery.property("refuses a share outside [0, 1] and too small a vocabulary")
def corrupt_refuses(function):
    for share in (-0.1, 1.5):
        refused(
            function, lambda share=share: function.thing(
                IDS[:2].clone(), vocab_size=VOCAB, share=share,
                generator=torch.Generator().manual_seed(0)),
            f"share={share:g} must be refused by a ValueError: it is a chance, in [0, 1]",
        )
    refused(
        function, lambda: function.thing(
            torch.tensor([[2, 3]]), vocab_size=5, share=0.5,
            generator=torch.Generator().manual_seed(0)),
        "vocab_size=5 must be refused by a ValueError: there are five special tokens, "
        "so there would be none to draw",
    )


# MaskedLanguageHead

head_battery = Battery(
    "MaskedLanguageHead", "MaskedLanguageHead(token_weight), called with (hidden)",
    chapter=10, makes=("token_weight",), takes=("hidden",),
)
WIDTH, WORDS = 6, 11
TABLE = sample(WORDS, WIDTH, seed=21)
HIDDEN = sample(2, 5, WIDTH, seed=22)


def new_head(head, table):
    """The reader's head for a Parameter."""
    module = head.run(lambda: head.thing(table))
    expect(
        isinstance(module, nn.Module),
        "the class must be a torch.nn.Module, and call super().__init__() first",
    )
    return module


def make_head(head):
    """The reader's head on a random table; the head and the Parameter."""
    table = nn.Parameter(TABLE.clone())
    module = new_head(head, table)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter is not table and parameter.shape != table.shape:
                parameter.copy_(
                    0.7 * torch.randn(parameter.shape, generator=generator))
    return module.eval(), table


def head_reference(parts, hidden, *, mistake=None):
    """Chapter 10's head in float64, right or with one mistake."""
    weight, bias, scale, shift, out_bias, table = (p.double() for p in parts)
    h = hidden.double()
    eps = 1e-5 if mistake == "eps" else 1e-12

    def norm(x):
        if mistake == "no norm":
            return x
        if mistake == "plain norm":
            return F.layer_norm(x, (WIDTH,), eps=eps)
        if mistake == "ddof":
            centred = x - x.mean(-1, keepdim=True)
            return centred / x.std(-1, keepdim=True) * scale + shift
        if mistake == "rms":
            return x / x.square().mean(-1, keepdim=True).sqrt() * scale + shift
        if mistake == "tokens":
            return F.layer_norm(x.transpose(0, 1), x.transpose(0, 1).shape[1:]).transpose(
                0, 1) * scale + shift
        return F.layer_norm(x, (WIDTH,), scale, shift, eps)

    gelu = {
        "no gelu": lambda x: x, "relu": torch.relu, "tanh": torch.tanh,
        "tanh gelu": lambda x: F.gelu(x, approximate="tanh"),
        "sigmoid": torch.sigmoid, "silu": F.silu,
    }.get(mistake, F.gelu)
    if mistake == "no dense":
        out = norm(gelu(h))
    elif mistake == "nothing":
        out = h
    elif mistake == "dense only":
        out = h @ weight.T + bias
    elif mistake == "no dense bias":
        out = norm(gelu(h @ weight.T))
    elif mistake == "norm first":
        out = gelu(norm(h @ weight.T + bias))
    elif mistake == "norm before dense":
        out = gelu(norm(h) @ weight.T + bias)
    elif mistake == "residual":
        out = norm(h + gelu(h @ weight.T + bias))
    elif mistake == "gelu twice":
        out = gelu(norm(gelu(h @ weight.T + bias)))
    else:
        out = norm(gelu(h @ weight.T + bias))
    if mistake == "residual after":
        out = out + h
    if mistake == "cosine":
        return F.normalize(out, dim=-1) @ F.normalize(table, dim=-1).T + out_bias
    scores = out @ table.T
    if mistake == "scaled":
        scores = scores / math.sqrt(WIDTH)
    if mistake != "no bias":
        scores = scores + out_bias
    if mistake == "bias twice":
        return scores + out_bias
    if mistake == "softmax":
        return scores.softmax(-1)
    if mistake == "log_softmax":
        return scores.log_softmax(-1)
    return scores


HEAD_MISTAKES = (
    ("no gelu", "the GELU is missing: dense, GELU, norm, table"),
    ("relu", "it uses ReLU in place of GELU"),
    ("tanh gelu", "it uses GELU's tanh approximation, not the exact one (erf)"),
    ("silu", "it uses SiLU (x · sigmoid) in place of GELU"),
    ("tanh", "it uses tanh in place of GELU"),
    ("sigmoid", "it uses a sigmoid in place of GELU"),
    ("no norm", "the norm is made but not applied: it comes after the GELU"),
    ("plain norm", "the norm's own scale and shift are not applied"),
    ("ddof", "the norm divides by the root of the unbiased variance (n - 1)"),
    ("rms", "the norm does not subtract the mean (an RMSNorm)"),
    ("no dense", "the Linear in front is made but not applied"),
    ("nothing", "Linear, GELU and norm are made but not applied: hidden goes straight "
     "to the table"),
    ("dense only", "GELU and norm are made but not applied"),
    ("no dense bias", "the Linear's bias is not added"),
    ("norm first", "the norm comes before the GELU: it is norm(gelu(dense(hidden)))"),
    ("norm before dense", "the norm comes before the Linear: it is "
     "norm(gelu(dense(hidden)))"),
    ("residual", "hidden is added again: this head has no residual"),
    ("residual after", "hidden is added again: this head has no residual"),
    ("gelu twice", "the GELU is applied twice, once more after the norm"),
    ("scaled", "the scores are divided by the root of d_model: here they are plain dot "
     "products"),
    ("cosine", "the scores are cosines: they must be plain dot products"),
    ("bias twice", "the bias of each word is added twice: a Linear adds it already"),
    ("no bias", "the bias of each word is not added to the scores: it is what learns "
     "how frequent a word is"),
    ("softmax", "it returns chances: return the scores (logits), the loss does the "
     "softmax"),
    ("log_softmax", "it returns log-chances: return the scores (logits), the loss does "
     "the softmax"),
)


def head_parts(module, table):
    """All ways to read dense, norm and bias off the reader's parameters."""
    square = [p for p in module.parameters() if tuple(p.shape) == (WIDTH, WIDTH)]
    named = [(n, p) for n, p in module.named_parameters() if tuple(p.shape) == (WIDTH,)]
    words = [p for p in module.parameters() if tuple(p.shape) == (WORDS,)]
    vectors = [p for _, p in named]
    if len(square) != 1 or len(vectors) != 3 or len(words) != 1:
        return []
    rows = []
    for weight in (square[0], square[0].T):
        rows += [
            [weight, *order, words[0], table] for order in permutations(vectors)
        ]
    return [[p.detach() for p in row] for row in rows]


@head_battery.property("gives a score for each word: (…, vocab_size)")
def head_shape(head):
    module, _ = make_head(head)
    for lead in ((2, 5), (3,), (0,), (2, 1, 4)):
        out = head.run(module, sample(*lead, WIDTH))
        expect_tensor(out, (*lead, WORDS), torch.float32)


@head_battery.property("uses the embedding's own table, the very same Parameter")
def head_tied(head):
    table = nn.Parameter(TABLE.clone())
    module = new_head(head, table)
    expect(
        torch.equal(table, TABLE),
        "making the head overwrites the embedding's table: draw the weights first "
        "(self.apply(init_weights)), and put the table in afterwards. It is not ours",
    )
    tables = [p for p in module.parameters() if tuple(p.shape) == (WORDS, WIDTH)]
    tables += [p for p in module.parameters() if tuple(p.shape) == (WIDTH, WORDS)]
    copies = [p for p in tables if p is not table]
    if copies:
        shared = any(p.data_ptr() == table.data_ptr() for p in copies)
        equal = any(p.shape == TABLE.shape and torch.equal(p, TABLE) for p in copies)
        raise Wrong(
            "the table is wrapped in a Parameter of its own: the optimizer would move "
            "the same numbers twice, and after .to(device) they part. Assign the "
            "Parameter itself" if shared else
            "the head has a copy of the table: after the first step the two part. "
            "Assign the Parameter itself, not a clone or its values" if equal else
            "the head has a table of its own: tie it, decoder.weight = token_weight. A "
            "Linear made for it keeps its own weight until then"
        )
    out = head.run(module.eval(), HIDDEN.clone())
    out.sum().backward()
    expect(
        table.grad is not None and table.grad.abs().max() > 0,
        "the embedding's table gets no gradient from the head: look for .data, .detach() "
        "or torch.no_grad(). Tied, every word learns from every hole",
    )
    with torch.no_grad():
        table.mul_(2)
    expect(
        not near(head.run(module, HIDDEN.clone()), out.detach()),
        "when the embedding learns, the scores do not change: the head works with a "
        "copy of the table",
    )


@head_battery.property("has a Linear, a norm and a bias for each word besides")
def head_parameters(head):
    module, table = make_head(head)
    expect(
        len(list(module.parameters())) > 0,
        "it has no parameters: make the layers in __init__ and keep them as attributes",
    )
    own = sum(p.numel() for p in module.parameters() if p is not table)
    square, vector = WIDTH * WIDTH, WIDTH
    wanted = square + 3 * vector + WORDS
    hints = {
        WORDS: "the bias of each word is missing: it is what learns how frequent a word "
        "is (a Linear with bias=True)",
        vector: "a bias or the norm's shift is missing: the Linear in front has a bias, "
        "and the norm a scale and a shift",
        2 * vector: "the norm is missing: LayerNorm(d_model) after the GELU",
        square + vector: "the Linear in front is missing: d_model to d_model",
        square + 3 * vector: "the Linear in front and the norm are missing",
        square + 3 * vector + WORDS: "Linear, norm and bias are all missing",
        WORDS + vector: "the Linear in front and the scores have no biases: both do here",
    }
    if own == wanted:
        return
    if any(p.shape in (TABLE.shape, TABLE.T.shape) and p is not table
           for p in module.parameters()):
        raise Wrong("it has a table of its own beside the embedding's: tie it")
    raise Wrong(hints.get(
        wanted - own,
        "it must have a Linear (d_model, d_model) with a bias, a norm, and a bias for "
        f"each word beside the table, {wanted} numbers here, but it has {own}",
    ))


@head_battery.property("is table · norm(gelu(dense(hidden))) + bias")
def head_equal(head):
    module, table = make_head(head)
    out = head.run(module, HIDDEN.clone())
    expect_tensor(out, (2, 5, WORDS))
    found = head_parts(module, table)
    if not found:
        raise Skip("the numbers cannot be compared: a Linear, a norm and a bias for "
                   "each word were not found among its parameters")
    for parts in found:
        for mistake in (None, "eps"):
            if near(out, head_reference(parts, HIDDEN, mistake=mistake), 1e-4):
                return
    causes = [
        (hint, lambda parts=parts, mistake=mistake: head_reference(
            parts, HIDDEN, mistake=mistake))
        for mistake, hint in HEAD_MISTAKES for parts in found
    ]
    explain(
        out, head_reference(found[0], HIDDEN).to(out.dtype), causes,
        "with its own weights it does not give what the formula gives: a Linear, the "
        "exact GELU, a LayerNorm over the last axis, then the dot product with each "
        "row of the table plus a bias. Compare one step after the other",
        tolerance=1e-4,
    )


@head_battery.property("treats each place alone, and teaches all its parts")
def head_learns(head):
    module, _ = make_head(head)
    out = head.run(module, HIDDEN.clone())
    expect(
        near(head.run(module, HIDDEN[:1, 2:4].clone()), out[:1, 2:4], 1e-4),
        "a place gets other scores when other places are there: the norm or the "
        "softmax runs over the wrong axis. It is the last one",
    )
    expect_learning(head, module, module, HIDDEN)


@head_battery.property("moves to other devices and dtypes")
def head_moves(head):
    expect_to_move(head, lambda: make_head(head)[0], HIDDEN)


# masked_language_loss

loss_battery = Battery(
    "masked_language_loss", "masked_language_loss(logits, input_ids, chosen) -> scalar",
    chapter=10, takes=("logits", "input_ids", "chosen"),
)
LOSS_IDS = torch.randint(
    5, WORDS, (4, 6), generator=torch.Generator().manual_seed(31))
CHOSEN = torch.tensor([
    [0, 1, 0, 0, 1, 0], [0, 0, 0, 0, 0, 0], [0, 1, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1],
]).bool()
LOGITS = 2 * sample(int(CHOSEN.sum()), WORDS, seed=32)


def scalar(value):
    """Expect a tensor of one number."""
    if isinstance(value, float):
        raise Wrong("the loss must be a tensor, but it is a float: no .item(), or "
                    "nothing can go back through it")
    expect_tensor(value)
    expect(
        value.ndim == 0,
        f"the loss must be one number, a scalar, but its shape is {tuple(value.shape)}: "
        "take the mean",
    )
    return value


@loss_battery.property("is the mean surprise at the chosen tokens")
def loss_equal(function):
    labels, n = LOSS_IDS[CHOSEN], int(CHOSEN.sum())
    rows = CHOSEN.nonzero()[:, 0]
    each = F.cross_entropy(LOGITS, labels, reduction="none")
    wanted = each.mean()

    def by_rows():
        return torch.stack([each[rows == r].mean() for r in rows.unique()]).mean()

    causes = [
        ("it is the sum over the chosen places: take their mean, or a longer batch "
         "counts more", each.sum),
        ("the sum is divided by all places, chosen or not: divide by the chosen ones",
         lambda: each.sum() / CHOSEN.numel()),
        ("the sum is divided by the number of texts: divide by the number of chosen "
         "places", lambda: each.sum() / len(CHOSEN)),
        ("each text's mean is taken first: average over all chosen places at once",
         by_rows),
        ("the sign is wrong: the loss is minus the logarithm", lambda: -wanted),
        ("the chances are averaged without the logarithm",
         lambda: -LOGITS.softmax(-1).gather(1, labels[:, None]).mean()),
        ("a softmax is applied before F.cross_entropy, which does one itself",
         lambda: F.cross_entropy(LOGITS.softmax(-1), labels)),
        ("there is no softmax: these are the scores of the right words, not their "
         "log-chances", lambda: -LOGITS.gather(1, labels[:, None]).mean()),
        ("the softmax runs over the places, not over the words",
         lambda: F.nll_loss(LOGITS.log_softmax(0), labels)),
        ("the labels are in the wrong order, column by column: logits come row by row, "
         "as input_ids[chosen] gives them",
         lambda: F.cross_entropy(LOGITS, LOSS_IDS.T[CHOSEN.T])),
        ("the labels are those of the places that were not chosen",
         lambda: F.cross_entropy(LOGITS, LOSS_IDS[~CHOSEN][:n])),
        ("the labels are the first tokens of the batch, not those of the chosen places",
         lambda: F.cross_entropy(LOGITS, LOSS_IDS.flatten()[:n])),
        ("the labels are those of the next token: this is no left-to-right model",
         lambda: F.cross_entropy(LOGITS, LOSS_IDS.roll(-1, 1)[CHOSEN])),
        ("the labels are all [MASK]: they must be the ids before they were spoilt",
         lambda: F.cross_entropy(LOGITS, torch.full_like(labels, MASK))),
        ("it is the perplexity: leave out the exp", lambda: wanted.exp()),
        ("the logarithm is to the base 2", lambda: wanted / math.log(2)),
        ("it is half a loss: a factor of its own", lambda: wanted / 2),
        ("label smoothing is on", lambda: F.cross_entropy(
            LOGITS, labels, label_smoothing=0.1)),
    ]
    causes += [
        (f"the sum is divided by {d} instead of the number of chosen places",
         lambda d=d: each.sum() / d) for d in (n - 1, n + 1)
    ]
    explain(
        scalar(function(LOGITS.clone(), LOSS_IDS.clone(), CHOSEN.clone())), wanted,
        causes,
        "it is not the mean of -log(chance of the right token) over the chosen places: "
        f"here it must be {wanted:.4f}",
    )


@loss_battery.property("does not look at places that were not chosen")
def loss_blind(function):
    loss = scalar(function(LOGITS.clone(), LOSS_IDS.clone(), CHOSEN.clone()))
    other = torch.where(CHOSEN, LOSS_IDS, torch.zeros_like(LOSS_IDS))
    expect(
        near(scalar(function(LOGITS.clone(), other, CHOSEN.clone())), loss),
        "other tokens at places that were not chosen, padding for example, change the "
        "loss: it must be asked for at the chosen places alone. (An id of 0 is not "
        "a sign for anything here.)",
    )
    zero = torch.where(CHOSEN & (LOSS_IDS == LOSS_IDS[CHOSEN][0]), 0, LOSS_IDS)
    labels = zero[CHOSEN]
    explain(
        scalar(function(LOGITS.clone(), zero, CHOSEN.clone())),
        F.cross_entropy(LOGITS, labels),
        [("chosen places with a small id are left out: whatever is chosen counts",
          lambda: F.cross_entropy(LOGITS, labels, ignore_index=0))],
        "a chosen place whose token is 0 is not counted like the others",
    )


@loss_battery.property("is 0 where nothing was chosen, and still part of the graph")
def loss_none(function):
    logits = torch.zeros(0, WORDS, requires_grad=True)
    none = torch.zeros_like(CHOSEN)
    loss = scalar(function(logits, LOSS_IDS.clone(), none))
    expect(
        not loss.isnan(),
        "where nothing was chosen the loss is NaN, the mean of no numbers, and one NaN "
        "spoils every weight: return 0 there",
    )
    expect(loss.item() == 0, "where nothing was chosen the loss must be 0, not "
           f"{loss.item():g}")
    expect(
        loss.requires_grad,
        "where nothing was chosen the loss is a bare 0 that backward() refuses: make it "
        "from the logits, logits.sum() of an empty tensor is 0 and part of the graph",
    )
    loss.backward()


@loss_battery.property("refuses more or fewer logits than chosen places")
def loss_refuses(function):
    for rows in (LOGITS[:-1], LOGITS[:1], torch.cat([LOGITS, LOGITS[:2]])):
        refused(
            function,
            lambda rows=rows: function.thing(rows.clone(), LOSS_IDS.clone(), CHOSEN.clone()),
            f"{len(rows)} rows of logits for {int(CHOSEN.sum())} chosen places must be "
            "refused by a ValueError: the answers would go to the wrong questions",
        )


@loss_battery.property("stays finite for loud scores, and lets gradients through")
def loss_gradient(function):
    loud = 1000 * LOGITS
    loss = scalar(function(loud.clone(), LOSS_IDS.clone(), CHOSEN.clone()))
    wanted = F.cross_entropy(loud, LOSS_IDS[CHOSEN])
    expect(
        bool(loss.isfinite()),
        "loud scores give an infinite loss or NaN: e^1000 overflows, and log(0) is "
        "minus infinity. Use log_softmax, logsumexp or F.cross_entropy",
    )
    expect(near(loss, wanted, 1e-4), "loud scores give a wrong loss: a clamp or an eps "
           "inside the logarithm hides how wrong a model is")
    logits = LOGITS.clone().requires_grad_()
    loss = scalar(function(logits, LOSS_IDS.clone(), CHOSEN.clone()))
    expect(loss.requires_grad, "no gradient flows back: look for .detach(), .item() or "
           "torch.no_grad()")
    gradient, = torch.autograd.grad(loss, logits)
    again = LOGITS.clone().requires_grad_()
    right, = torch.autograd.grad(F.cross_entropy(again, LOSS_IDS[CHOSEN]), again)
    expect(near(gradient, right), "the loss is right, but its gradient is not: part of "
           "the way back is cut off")


# PretrainingModel

model_battery = Battery(
    "PretrainingModel",
    "PretrainingModel(config, **classes), called with "
    "(input_ids, attention_mask=None, chosen=None) -> label logits, word logits",
    chapter=10, makes=("config",), takes=("input_ids", "attention_mask", "chosen"),
)
TEXTS = torch.randint(5, 30, (3, 7), generator=torch.Generator().manual_seed(41))
REAL = torch.arange(7) < torch.tensor([7, 4, 5])[:, None]
HOLES = torch.tensor([
    [0, 1, 0, 0, 1, 0, 1], [0, 0, 1, 0, 0, 0, 0], [0, 1, 0, 1, 1, 0, 0],
]).bool()


def make_reader(model, shape=None, **classes):
    """The reader's model with random weights, and its two parts."""
    transformer()  # skips where chapter 07 is not there
    shape = shape or Shape(dropout=0.0)
    module = model.run(lambda: model.thing(shape, **classes))
    expect(
        isinstance(module, nn.Module),
        "the class must be a torch.nn.Module",
    )
    for name in ("classifier", "masked_head"):
        expect(
            isinstance(getattr(module, name, None), nn.Module),
            f"it needs the attribute {name}: the saved weights of this book, and the next "
            "chapter, look for classifier (chapter 07's model) and masked_head",
        )
    return scramble(module, size=0.3).eval()


def two(model, module, *arguments, **named):
    """Call the reader's model; expect two tensors."""
    result = model.run(module, *(
        a.clone() if isinstance(a, torch.Tensor) else a for a in arguments), **named)
    expect(
        isinstance(result, (tuple, list)) and len(result) == 2,
        "it must return two tensors, the labels' logits and the words' logits",
    )
    for value in result:
        expect_tensor(value)
    return result


def by_parts(module, ids, mask, holes, pooling="mean"):
    """The two answers by the model's own parts, pooled by hand."""
    with torch.no_grad():
        hidden = module.classifier.encode(ids, mask)
        real = torch.ones_like(ids).bool() if mask is None else mask
        weight = real[:, :, None]
        pooled = {
            "mean": (hidden * weight).sum(1) / weight.sum(1),
            "max": hidden.masked_fill(~weight, MINUS).amax(1),
            "cls": hidden[:, 0], "all": hidden.mean(1), "sum": (hidden * weight).sum(1),
        }[pooling]
        return module.classifier.head(pooled), module.masked_head(
            hidden[holes]), hidden, pooled


def reading_causes(module, hidden, pooling):
    """What wrong readings give: for the words' logits, and for the labels'."""
    head, masked = module.classifier.head, module.masked_head

    def parts(mask=REAL, ids=TEXTS, how=pooling):
        return by_parts(module, ids, mask, HOLES, how)

    of_words = [
        ("the attention mask is not passed to the encoder, so padding is read",
         lambda: parts(mask=None)[1]),
        ("the words' head gets the embeddings, not what the encoder returns",
         lambda: masked(module.classifier.embedding(TEXTS)[HOLES])),
        ("the chosen vectors come column by column: index with the mask, "
         "hidden[chosen], which reads row by row",
         lambda: masked(hidden.transpose(0, 1)[HOLES.T])),
        ("the places that were not chosen are scored: look for a ~",
         lambda: masked(hidden[~HOLES])),
        ("the words' head gets the pooled vectors", lambda: masked(parts()[3])),
        ("the words' head gets the pooled vectors",
         lambda: masked(parts()[3][:, None].expand_as(hidden)[HOLES])),
        ("the chosen places are emptied before reading: corrupt has spoilt them "
         "already", lambda: parts(ids=TEXTS.masked_fill(HOLES, MASK))[1]),
        ("chosen is passed to the encoder in place of the attention mask",
         lambda: parts(mask=HOLES)[1]),
        ("the attention mask is inverted: True = a real token",
         lambda: parts(mask=~REAL)[1]),
        ("the words' logits are chances: return the scores, the loss does the softmax",
         lambda: parts()[1].softmax(-1)),
    ]
    of_labels = [
        (f"the pooling is {other}, whatever config.pooling says",
         lambda other=other: parts(how=other)[0])
        for other in ("mean", "max", "cls", "sum") if other != pooling
    ] + [
        ("the mean is taken over padding as well: pass the mask to pool",
         lambda: parts(how="all")[0]),
        ("padding is pooled as well: pass the mask to pool",
         lambda: head(hidden.amax(1))),
        ("the mask is not passed to the encoder", lambda: parts(mask=None)[0]),
        ("the labels' logits are chances: return the scores, the loss does the softmax",
         lambda: parts()[0].softmax(-1)),
        ("the labels are answered from the chosen places only",
         lambda: head((hidden * HOLES[:, :, None]).sum(1) / HOLES.sum(1, keepdim=True))),
        ("the labels are answered from the chosen places only",
         lambda: head(hidden.masked_fill(~HOLES[:, :, None], MINUS).amax(1))),
    ]
    return of_words, of_labels


@model_battery.property("answers twice: labels (batch, num_labels), words (chosen, vocab_size)")
def model_shape(model):
    module = make_reader(model)
    labels, words = two(model, module, TEXTS, REAL, HOLES)
    if tuple(labels.shape) == (int(HOLES.sum()), 30):
        raise Wrong("the two answers are exchanged: first the labels, then the words")
    expect_tensor(labels, (3, 7), what="the labels' logits")
    if tuple(words.shape) == (3, 7, 30):
        raise Wrong("all places are scored, not the chosen ones: index the encoder's "
                    "vectors with chosen before the head, hidden[chosen]")
    expect_tensor(words, (int(HOLES.sum()), 30), what="the words' logits")
    none = torch.zeros_like(HOLES)
    expect_tensor(two(model, module, TEXTS, REAL, none)[1], (0, 30),
                  what="without any chosen place, the words' logits")
    config = getattr(module, "config", None)
    expect(
        config is not None and config.num_labels == 7,
        "it must keep its config as self.config: training and saving look it up",
    )


@model_battery.property("reads once, and both heads look at the same reading")
def model_equal(model):
    for pooling in ("mean", "max", "cls"):
        module = make_reader(model, Shape(dropout=0.0, pooling=pooling))
        labels, words = two(model, module, TEXTS, REAL, HOLES)
        wanted_labels, wanted_words, hidden, _ = by_parts(
            module, TEXTS, REAL, HOLES, pooling)
        of_words, of_labels = reading_causes(module, hidden, pooling)
        with torch.no_grad():
            explain(
                words, wanted_words, of_words,
                "the words' logits are not masked_head(what the encoder returns at the "
                "chosen places)", tolerance=1e-4,
            )
            explain(
                labels, wanted_labels, of_labels,
                "the labels' logits are not classifier.head(the pooled vectors)",
                tolerance=1e-4,
            )
    calls = []
    hook = module.classifier.encoder.register_forward_hook(lambda *_: calls.append(1))
    two(model, module, TEXTS, REAL, HOLES)
    hook.remove()
    expect(len(calls) == 1, f"the encoder reads {len(calls)} times: once is enough for "
           "both heads, and twice costs twice as much")


@model_battery.property("without a mask reads all, without chosen places scores all")
def model_defaults(model):
    module = make_reader(model)
    labels, words = two(model, module, TEXTS)
    whole = torch.ones_like(HOLES)
    expect_tensor(words, (TEXTS.numel(), 30), what="the words' logits without chosen")
    wanted = by_parts(module, TEXTS, None, whole)
    expect(
        near(labels, wanted[0], 1e-4) and near(words, wanted[1], 1e-4),
        "without mask and chosen places it must read every token and score all of them, "
        "in reading order",
    )
    labels, words = two(model, module, TEXTS, REAL)
    expect_tensor(words, (TEXTS.numel(), 30), what="the words' logits without chosen")


@model_battery.property("ties its second head to the embedding")
def model_tied(model):
    module = make_reader(model)
    table = module.classifier.embedding.token.weight
    tied = any(p is table for p in module.masked_head.parameters())
    expect(
        tied, "the words' head does not hold the embedding's own table: pass "
        "classifier.embedding.token.weight itself, after the classifier is made",
    )
    count = sum(p.numel() for p in module.parameters())
    wanted = sum(p.numel() for p in module.classifier.parameters()) + (
        sum(p.numel() for p in module.masked_head.parameters()) - table.numel())
    expect(
        count == wanted,
        f"it has {count - wanted} parameters beside its classifier and its words' head: "
        "is a part made twice?",
    )


@model_battery.property("passes sublayers' classes on, and drops in training only")
def model_classes(model):
    class Norm(nn.LayerNorm):
        """A norm of our own."""

    module = make_reader(model, norm=Norm)
    expect(
        isinstance(module.classifier.embedding_norm, Norm),
        "classes passed to it do not reach the classifier: pass **classes on",
    )
    module = make_reader(model, Shape(dropout=0.5))
    many = TEXTS[:1].expand(300, -1)
    holes = HOLES[:1].expand(300, -1)
    calls = []
    hook = module.classifier.dropout.register_forward_hook(
        lambda _m, _i, out: calls.append(out.ndim))
    with torch.no_grad(), own_dice():
        quiet = two(model, module, many, None, holes)
        noisy = two(model, module.train(), many, None, holes)
    hook.remove()
    expect(near(quiet[0][1:], quiet[0][:-1], 1e-4), "in evaluation it gives another answer each "
           "time: dropout is active there")
    expect(not near(noisy[0], quiet[0]), "in training nothing is dropped")
    expect(
        2 in calls,
        "the pooled vector does not pass the classifier's dropout before its head, as it "
        "does in chapter 07: classifier.head(classifier.dropout(pooled))",
    )


@model_battery.property("lets both answers teach the encoder")
def model_learns(model):
    module = make_reader(model)
    for i, which in enumerate(("labels'", "words'")):
        module.zero_grad()
        out = two(model, module, TEXTS, REAL, HOLES)[i]
        expect(out.requires_grad, f"no gradient flows back from the {which} logits: look "
               "for .detach() or torch.no_grad()")
        (out * torch.linspace(-1, 2, out.numel()).view(out.shape)).sum().backward()
        reached = [
            p.grad is not None and bool(p.grad.abs().max() > 0)
            for p in module.classifier.encoder.parameters() if p.ndim == 2
        ]
        expect(
            all(reached), f"the {which} logits do not teach the encoder: they are cut off "
            "by .detach() or .data",
        )


# load_mixture

mixture_battery = Battery(
    "load_mixture", "load_mixture() -> dict of Datasets, list of missing splits", chapter=10,
    takes=(),
)
LABELS = {
    "go_emotions": ["admiration", "anger", "joy", "optimism", "sadness", "fear", "love"],
    "emoji": ["heart", "sun", "tree"], "sentiment": ["negative", "neutral", "positive"],
    "hate": ["not-hate", "hate"], "irony": ["not", "ironic"],
    "offensive": ["not-offensive", "offensive"],
    "emotion": ["anger", "joy", "optimism", "sadness"],
}
FILES = {"train": "train", "validation": "val", "test": "test"}


def invented_data(root, without=()):
    """Write a folder of invented posts in the layout of the real one.

    Every piece holds one disguised copy of a held-out text of each task.
    """
    held = ["emotion validation 1!", "EMOTION, test 2", "six  validation 0", "Six test 1."]
    for task, names in LABELS.items():
        for split, short in FILES.items():
            if f"{task}/{split}" in without:
                continue
            if task == "go_emotions":
                rows = [f"go {split} {i}\t0\tx{i}" for i in range(4)]
                six = [f"six {split} {i}\t{1 + i}\ty{i}" for i in range(3)]
                extra = [f"{text}\t0\tz" for text in held] if split == "train" else []
                path = root / task / f"{'dev' if short == 'val' else short}.tsv"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text("\n".join(rows + six + extra) + "\n", "utf-8")
                (root / task / "labels.txt").write_text("\n".join(names) + "\n", "utf-8")
                continue
            folder = root / "tweeteval" / task
            folder.mkdir(parents=True, exist_ok=True)
            texts = [f"{task} {split} {i}" for i in range(4)]
            if split == "train" or task != "emotion":
                texts += held
            labels = [str(i % len(names)) for i in range(len(texts))]
            (folder / f"{short}_text.txt").write_text("\n".join(texts) + "\n", "utf-8")
            (folder / f"{short}_labels.txt").write_text("\n".join(labels) + "\n", "utf-8")
            (folder / "mapping.txt").write_text(
                "".join(f"{i}\t{name}\n" for i, name in enumerate(names)), "utf-8")


@contextlib.contextmanager
def data_folder(without=()):
    """Let EMOFORMER_DATA name a folder of invented posts for a while."""
    before = os.environ.get("EMOFORMER_DATA")
    with tempfile.TemporaryDirectory() as root:
        invented_data(Path(root), without)
        os.environ["EMOFORMER_DATA"] = root
        try:
            yield Path(root)
        finally:
            os.environ.pop("EMOFORMER_DATA")
            if before is not None:
                os.environ["EMOFORMER_DATA"] = before


def mixture_of(function):
    """Call the reader's function on the invented folder; expect a dict and a list."""
    with unhurried():
        load = needs(1, "data", "load_tweet_eval")
        working(1, "load_tweet_eval", lambda: load("emotion"))
    result = function.run(function.thing)
    expect(
        isinstance(result, tuple) and len(result) == 2 and isinstance(result[0], dict),
        "it must return two things: the dict of pieces, and the list of missing splits",
    )
    return result


def whole_mixture(function):
    """The mixture where nothing is missing; computed once."""
    if not hasattr(function, "whole_mixture"):
        with data_folder():
            function.whole_mixture = mixture_of(function)
    return function.whole_mixture


@mixture_battery.property("collects six labelled pieces and one without labels")
def mixture_pieces(function):
    mixture, missing = whole_mixture(function)
    wanted = ["go_emotions", "emoji", "sentiment", "hate", "irony", "offensive"]
    lacking = [piece for piece in [*wanted, "unlabelled"] if piece not in mixture]
    expect(not lacking, f"pieces are missing: {', '.join(lacking)}")
    extra = sorted(set(mixture) - {*wanted, "unlabelled"})
    if "emotion" in extra:
        raise Wrong("the emotion task is in it with its labels: it is what the book "
                    "reports on, so only its train tweets may be read, without labels")
    expect(not extra, f"it holds pieces that do not belong: {', '.join(extra)}")
    for piece in wanted:
        expect(
            {"text", "label"} <= set(mixture[piece].column_names),
            f"the piece {piece} must have the columns text and label",
        )
        expect(
            list(mixture[piece].features["label"].names) == LABELS[piece],
            f"the labels of the piece {piece} have other names or another order than in "
            "its files",
        )
    expect(
        "label" not in mixture["unlabelled"].column_names,
        "the piece unlabelled has labels: take the text column alone, or the emotion "
        "task's labels are learned in pretraining",
    )
    expect(list(missing) == [], f"nothing is missing here, but it says {missing}")


@mixture_battery.property("takes all splits of the pieces, but only train of emotion")
def mixture_splits(function):
    mixture, _ = whole_mixture(function)
    for piece in LABELS:
        if piece == "emotion" or piece not in mixture:
            continue
        texts = list(mixture[piece]["text"])
        stem = "go" if piece == "go_emotions" else piece
        for split in FILES:
            wanted = [f"{stem} {split} {i}" for i in range(4)]
            lost = [text for text in wanted if text not in texts]
            expect(
                not lost, f"texts of {piece}'s {split} split are lost: all splits of these "
                "tasks may be learned from, since no score on them is reported"
                if len(lost) == 4 else
                f"{piece} has lost texts that are not held out, such as {lost[:1]}",
            )
        label = dict(zip(texts, mixture[piece]["label"], strict=True))
        expect(
            piece == "go_emotions" or label[f"{piece} test 1"] == 1,
            f"text and label of the piece {piece} do not belong together any more",
        )
    texts = set(mixture["unlabelled"]["text"]) if "unlabelled" in mixture else set()
    expect(
        not any("validation" in t or "test" in t for t in texts if t.startswith("emotion")),
        "validation or test tweets of the emotion task are in the piece unlabelled: only "
        "its train tweets may be read",
    )
    expect(
        all(f"emotion train {i}" in texts for i in range(4)),
        "the train tweets of the emotion task are not in the piece unlabelled",
    )


@mixture_battery.property("holds no validation or test text of a reported task")
def mixture_clean(function):
    mixture, _ = whole_mixture(function)

    def key(text):
        return " ".join(
            "".join(c if c.isalnum() else " " for c in text.casefold()).split())

    held = {f"{task} {split} {i}" for task in ("emotion", "six")
            for split in ("validation", "test") for i in range(4)}
    left = {
        piece: [text for text in dataset["text"] if key(text) in held]
        for piece, dataset in mixture.items()
    }
    dirty = [piece for piece, texts in left.items() if texts]
    if not dirty:
        return
    found = [text for texts in left.values() for text in texts]
    if dirty == ["unlabelled"]:
        raise Wrong("the piece unlabelled still holds held-out texts: the train tweets of "
                    "emotion must be cleaned too, some of them stand in its test split")
    if all(text.lower().startswith("emotion") for text in found):
        raise Wrong("held-out texts of the task emotion are left: both tasks count")
    if all(text.lower().startswith("six") for text in found):
        raise Wrong("held-out texts of the task six are left (they stand in GoEmotions "
                    "with all their labels): both tasks count")
    if all(key(text) != text for text in found):
        raise Wrong("disguised copies of held-out texts are left, with other case or "
                    "punctuation: compare comparison_key, not the bare text")
    raise Wrong(
        f"validation or test texts of emotion or six are left in {', '.join(dirty)}: a "
        "text that is tested on may not be trained on, not even with another label. Take "
        "them out with remove_held_out(…, held_out_keys())"
    )


@mixture_battery.property("leaves out a split that is not there, and names it")
def mixture_missing(function):
    gone = ("sentiment/train", "irony/train", "irony/validation", "irony/test")
    with data_folder(gone):
        mixture, missing = mixture_of(function)
        expect(
            sorted(missing) == sorted(gone),
            f"the missing splits must be named as {list(gone)}, but they are "
            f"{list(missing)}",
        )
        expect("irony" not in mixture, "a piece without any split is there all the same")
        expect(
            "sentiment" in mixture and "sentiment test 0" in list(mixture["sentiment"]["text"]),
            "where one split is missing the other two are lost as well: load split by "
            "split",
        )
    with data_folder() as root:
        (root / "tweeteval" / "hate" / "test_labels.txt").write_text("7\n" * 8, "utf-8")
        refused(
            function, function.thing,
            "a malformed file is passed over in silence: only FileNotFoundError and "
            "ConnectionError mean that a split is not there. Others must be seen",
            kinds=(Exception,),
        )


# label_table

table_battery = Battery(
    "label_table", "label_table(mixture) -> names, slices", chapter=10, takes=("mixture",),
)


def dataset_of(texts, labels=None, names=()):
    """A Dataset with texts, and labels where there are any."""
    from datasets import ClassLabel, Dataset, Features, Value

    if labels is None:
        return Dataset.from_dict({"text": list(texts)})
    return Dataset.from_dict(
        {"text": list(texts), "label": list(labels)},
        features=Features({"text": Value("string"), "label": ClassLabel(names=list(names))}),
    )


def three_pieces():
    """Mood with three labels (one never used), a piece without, irony with two."""
    return {
        "mood": dataset_of(["a", "b"], [2, 0], ["sad", "angry", "glad"]),
        "bare": dataset_of(["c", "d", "e"]),
        "irony": dataset_of(["f"], [1], ["no", "sad"]),
    }


@table_battery.property("names each output piece/label, in order")
def table_names(function):
    pieces = three_pieces()
    result = function.run(lambda: function.thing(pieces))
    expect(
        isinstance(result, (tuple, list)) and len(result) == 2,
        "it must return two things: the list of names, and the dict of ranges",
    )
    names = list(result[0])
    wanted = ["mood/sad", "mood/angry", "mood/glad", "irony/no", "irony/sad"]
    if names == wanted:
        return
    for mistaken, hint in (
        ([n.split("/")[1] for n in wanted], "the names lack their piece: two pieces may "
         "have a label of one name, so it is piece/label"),
        (["mood/glad", "mood/sad", "irony/sad"], "only labels that occur are named: a "
         "piece's labels stand in dataset.features['label'].names, used or not"),
        (["mood/sad", "mood/glad", "irony/sad"], "only labels that occur are named: a "
         "piece's labels stand in dataset.features['label'].names, used or not"),
        (sorted(wanted), "the names are sorted: keep the order of the mixture, and of "
         "each piece's label numbers"),
        (["irony/no", "irony/sad", "mood/sad", "mood/angry", "mood/glad"], "the pieces "
         "are sorted: keep the order of the mixture"),
        (["mood/angry", "mood/glad", "mood/sad", "irony/no", "irony/sad"], "the labels "
         "of a piece are sorted: keep the order of their numbers"),
        (["sad", "angry", "glad", "no"], "labels of the same name share one output: each "
         "piece has its own"),
        (wanted[:-1], "labels of the same name share one output: each piece has its own"),
        ([n.replace("/", "_") for n in wanted], "piece and label are joined by a slash"),
    ):
        if names == mistaken:
            raise Wrong(hint)
    if any("bare" in str(name) for name in names):
        raise Wrong("the piece without labels has an output: only pieces with the column "
                    "label get some")
    raise Wrong(f"the names must be {wanted}, but they are {names}")


@table_battery.property("gives each labelled piece the range of its outputs")
def table_slices(function):
    slices = function.run(lambda: function.thing(three_pieces()))[1]
    expect(isinstance(slices, dict), "the second result must be a dict from a piece to its "
           f"range, but it is a {type(slices).__name__}")
    expect(
        "bare" not in slices,
        "the piece without labels is in the dict: it has no outputs",
    )
    expect(
        set(slices) == {"mood", "irony"},
        f"the dict must have the keys mood and irony, but it has {sorted(slices)}",
    )
    found = {piece: (list(value) if not isinstance(value, slice)
                     else list(range(value.start, value.stop)))
             for piece, value in slices.items()}
    if found != {"mood": [0, 1, 2], "irony": [3, 4]}:
        starts = {piece: value[0] if value else None for piece, value in found.items()}
        if starts["irony"] == 0:
            hint = "every piece begins at output 0: the ranges must follow one another"
        elif starts["mood"] == 1:
            hint = "outputs are counted from 1: they are counted from 0"
        elif found["irony"] and found["irony"][0] > 3:
            hint = ("a gap lies between two pieces: the next one begins where the last one "
                    "ends (the end of a range is not included), and the piece without "
                    "labels takes no room")
        elif found["irony"] and found["irony"][0] < 3 and found["irony"][0] > 0:
            hint = ("the pieces overlap: the range of the next one must begin after all "
                    "labels of the last one, used or not")
        elif len(found["mood"]) == 2 or len(found["irony"]) == 1:
            hint = "a range is one short: the end of a range is not included already"
        elif len(found["mood"]) == 4 or len(found["irony"]) == 3:
            hint = "a range is one too long: the end of a range is not included already"
        else:
            hint = "the ranges do not fit the list of names"
        raise Wrong(f"{hint}. Here mood has 0 to 2 and irony 3 and 4, but they are "
                    f"{ {k: str(v) for k, v in slices.items()} }")
    expect(
        all(isinstance(value, range) for value in slices.values()),
        "the outputs of a piece must be a range, range(first, last + 1): its start and "
        "its numbers are both needed later",
    )


# sliced_cross_entropy

sliced_battery = Battery(
    "sliced_cross_entropy", "sliced_cross_entropy(logits, labels, allowed) -> scalar",
    chapter=10, takes=("logits", "labels", "allowed"),
)
OUTPUTS = 2 * sample(5, 5, seed=51)
ANSWERS = torch.tensor([1, 3, -1, 4, 0])
OPEN = torch.tensor([
    [1, 1, 0, 0, 0], [0, 0, 1, 1, 1], [0, 0, 0, 0, 0], [0, 0, 1, 1, 1], [1, 1, 0, 0, 0],
]).bool()
TWO = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 1]]).bool()


def sliced_reference(logits=OUTPUTS, labels=ANSWERS, allowed=OPEN):
    """Surprise of each labelled text among its own outputs."""
    keep = labels >= 0
    return F.cross_entropy(
        logits.masked_fill(~allowed, MINUS)[keep], labels[keep], reduction="none")


@sliced_battery.property("lets each text choose among its own outputs only")
def sliced_equal(function):
    each, n = sliced_reference(), len(ANSWERS)
    wanted = each.sum() / n
    keep = ANSWERS >= 0
    plain = F.cross_entropy(OUTPUTS[keep], ANSWERS[keep], reduction="none")
    zeroed = F.cross_entropy((OUTPUTS * OPEN)[keep], ANSWERS[keep], reduction="none")
    wrap = ANSWERS % 5

    def with_unlabelled(logits):
        return F.cross_entropy(logits, wrap, reduction="none").nan_to_num(posinf=0.0)

    inverted = F.cross_entropy(
        OUTPUTS.masked_fill(OPEN, MINUS)[keep], ANSWERS[keep], reduction="none")
    causes = []
    for values, text in (
        (plain, "the outputs of other pieces are not closed: a text would be punished for "
         "looking ironic though nobody asked. Fill them with minus infinity before the "
         "softmax"),
        (zeroed, "outputs of other pieces are set to 0, but e^0 is 1: fill them with minus "
         "infinity"),
        (inverted, "the mask is inverted: True = an output that the text may use"),
    ):
        causes += [(text, lambda v=values: v.sum() / n), (text, values.mean),
                   (text, values.sum)]
    causes += [
        ("the sum is divided by the labelled texts, not by the batch: a batch with few "
         "labels would shout", each.mean),
        ("it is the sum over the texts: divide it by the batch", each.sum),
        ("the sum is divided by the number of outputs, not by the batch",
         lambda: each.sum() / OUTPUTS.shape[1] if n != OUTPUTS.shape[1] else each.sum() / 7),
        ("texts without a label are counted: -1 picks the last output. Leave them out",
         lambda: with_unlabelled(OUTPUTS.masked_fill(~OPEN & keep[:, None], MINUS)).sum() / n),
        ("texts without a label are counted as if their label were 0",
         lambda: (each.sum() + F.cross_entropy(
             OUTPUTS[~keep], torch.zeros(int((~keep).sum())).long(), reduction="sum")) / n),
        ("the sign is wrong: the loss is minus the logarithm", lambda: -wanted),
        ("a softmax over all outputs comes first, and the chances of the text's own "
         "outputs are compared as if they were scores",
         lambda: F.cross_entropy(OUTPUTS.softmax(-1).masked_fill(~OPEN, MINUS)[keep],
                                 ANSWERS[keep], reduction="sum") / n),
        ("the chances of all outputs are masked after the softmax, so the text's own no "
         "longer sum to 1", lambda: plain.sum() / n),
        ("the sum is multiplied by the share of labelled texts once more",
         lambda: wanted * keep.float().mean()),
        ("it is divided by the labelled texts and by the batch",
         lambda: each.mean() / n),
    ]
    explain(
        scalar(function(OUTPUTS.clone(), ANSWERS.clone(), OPEN.clone())), wanted, causes,
        "it is not the sum of -log(chance of the right label among the text's own "
        f"outputs), divided by the batch: here it must be {wanted:.4f}",
    )


@sliced_battery.property("divides by the batch, labelled or not")
def sliced_batch(function):
    loss = scalar(function(OUTPUTS.clone(), ANSWERS.clone(), OPEN.clone()))
    keep = ANSWERS >= 0
    alone = scalar(function(OUTPUTS[keep], ANSWERS[keep], OPEN[keep]))
    expect(
        near(alone * 4 / 5, loss),
        "a text without a label must make the loss smaller by its share of the batch, 4 "
        "of 5 here: the sum is divided by the batch, not by the labelled texts"
        if near(alone, loss) else
        "a text without a label changes the loss by more than its share of the batch: it "
        "is counted as if it had one",
    )
    three = sample(6, 3, seed=52)
    labels, allowed = torch.tensor([0, -1, 2, -1, -1, 2]), torch.cat([TWO, TWO])
    allowed[5] = torch.tensor([False, True, True])
    wanted = sliced_reference(three, labels, allowed).sum() / 6
    expect(
        near(scalar(function(three.clone(), labels.clone(), allowed.clone())), wanted),
        "with a batch of six, three outputs and three labelled texts it is wrong: is the "
        "divisor the batch?",
    )


@sliced_battery.property("is 0, not NaN, where no text has a label")
def sliced_none(function):
    logits = OUTPUTS.clone().requires_grad_()
    for allowed in (torch.zeros_like(OPEN), OPEN):
        loss = scalar(function(logits, torch.full((5,), -1), allowed.clone()))
        expect(
            not loss.isnan(),
            "where no text has a label the loss is NaN, the mean of no numbers: return 0 "
            "there",
        )
        expect(loss.item() == 0, "where no text has a label the loss must be 0")
        expect(
            loss.requires_grad,
            "where no text has a label the loss is a bare 0 that backward() refuses: make "
            "it from the logits, logits.sum() * 0",
        )
        gradient, = torch.autograd.grad(loss, logits)
        expect(bool((gradient == 0).all()), "where no text has a label the logits get a "
               "gradient: it must be 0, or NaN where an output is closed")


@sliced_battery.property("teaches each text's own outputs, and no others")
def sliced_gradient(function):
    logits = OUTPUTS.clone().requires_grad_()
    loss = scalar(function(logits, ANSWERS.clone(), OPEN.clone()))
    expect(loss.requires_grad, "no gradient flows back: look for .detach() or .item()")
    gradient, = torch.autograd.grad(loss, logits)
    expect(
        bool(gradient.isfinite().all()),
        "the loss is right, but its gradient is NaN: minus infinity met 0 or another "
        "infinity on the way back (as in 0 * -inf, or a row that is closed as a whole). "
        "Leave out the texts without a label before the softmax",
    )
    expect(
        bool((gradient[~OPEN] == 0).all()),
        "outputs of other pieces get a gradient: they must be closed by minus infinity, "
        "not by a number that is only small",
    )
    again = OUTPUTS.clone().requires_grad_()
    right, = torch.autograd.grad(sliced_reference(again).sum() / 5, again)
    expect(near(gradient, right), "the gradient is wrong: it must be that of separate "
           "heads, divided by the batch")


@sliced_battery.property("stays finite for loud scores, and works in float64")
def sliced_loud(function):
    loud = 500 * OUTPUTS
    wanted = sliced_reference(loud).sum() / 5
    loss = scalar(function(loud.clone(), ANSWERS.clone(), OPEN.clone()))
    expect(
        bool(loss.isfinite()) and near(loss, wanted, 1e-4),
        "loud scores give a wrong or infinite loss: closed outputs need minus infinity "
        "(a number such as -1000 is not small enough), and log_softmax or logsumexp in "
        "place of log and exp",
    )
    low = scalar(function(OUTPUTS - 1000, ANSWERS.clone(), OPEN.clone()))
    expect(
        near(low, sliced_reference().sum() / 5, 1e-3),
        "scores that all lie near -1000 give another loss, though only their differences "
        "count: closed outputs need minus infinity, a number such as -100 or -1e4 is not "
        "small enough",
    )
    loss = scalar(function(OUTPUTS.double(), ANSWERS.clone(), OPEN.clone()))
    expect(near(loss, sliced_reference().sum() / 5, 1e-4), "float64 scores give another "
           "loss")


# PretrainingConfig

RULES = {
    "epochs": ((0, -1), (1,), "at least 1"),
    "steps": ((0,), (1, None), "None or at least 1"),
    "batch_size": ((0,), (1,), "at least 1"),
    "learning_rate": ((0.0, -1e-3), (1e-9,), "above 0"),
    "warmup": ((-0.1, 1.1), (0.0, 1.0), "in [0, 1]"),
    "weight_decay": ((-0.1,), (0.0,), "at least 0"),
    "clip": ((0.0,), (0.1,), "above 0"),
    "share": ((-0.1, 1.0), (0.0, 0.5), "in [0, 1): with all words hidden there is nothing "
              "to read"),
    "words": ((-0.5,), (0.0, 2.0), "at least 0; 0 switches the words' loss off"),
    "labels": ((-0.5,), (0.0, 2.0), "at least 0; 0 switches the labels' loss off"),
    "bpe_dropout": ((-0.1, 1.0), (0.0, 0.5), "in [0, 1)"),
    "precision": (("fp8", ""), ("auto", "bf16", "no"), "auto, bf16 or no"),
}
DEFAULTS = {
    "seed": 0, "epochs": 4, "steps": None, "batch_size": 128, "learning_rate": 1e-3,
    "warmup": 0.05, "weight_decay": 0.01, "clip": 1.0, "share": 0.15, "words": 1.0,
    "labels": 1.0, "bpe_dropout": 0.1, "precision": "auto",
}
config_battery = Battery(
    "PretrainingConfig", "PretrainingConfig(seed=0, epochs=4, …): a frozen dataclass",
    chapter=10, makes=tuple(DEFAULTS),
)


@config_battery.property("holds every number, with the book's defaults")
def config_defaults(config):
    made = config.run(config.thing)
    for name, value in DEFAULTS.items():
        expect(hasattr(made, name), f"the setting {name} is missing")
        expect(
            getattr(made, name) == value,
            f"{name} is {getattr(made, name)!r} where nothing else is said, but the book's "
            f"runs have {value!r}",
        )
    other = config.run(config.thing, words=0.25, steps=7, precision="no")
    expect(
        (other.words, other.steps, other.precision, other.epochs) == (0.25, 7, "no", 4),
        "a value that is given does not arrive",
    )


@config_battery.property("refuses each value that breaks its rule")
def config_refuses(config):
    for name, (bad, good, rule) in RULES.items():
        for value in bad:
            refused(
                config, lambda name=name, value=value: config.thing(**{name: value}),
                f"{name}={value!r} must be refused by a ValueError: it must be {rule}. "
                "Check it in __post_init__",
            )
        for value in good:
            try:
                config.run(config.thing, **{name: value})
            except Broke:
                raise Wrong(f"{name}={value!r} is refused, but it is allowed: {name} must "
                            f"be {rule}") from None
    error = refused(config, lambda: config.thing(clip=-3.0), "clip=-3 must be refused")
    expect(
        "clip" in str(error) and "-3" in str(error),
        "the error does not name the setting and its value: whoever reads it has to know "
        "which of a dozen numbers is wrong",
    )


@config_battery.property("is frozen, and can be compared and stored")
def config_frozen(config):
    made = config.run(config.thing)
    try:
        made.epochs = 9
    except (FrozenInstanceError, AttributeError, TypeError):
        pass
    else:
        raise Wrong("its values can be changed after they were checked: "
                    "@dataclass(frozen=True)")
    try:
        stored = asdict(made)
    except TypeError:
        raise Wrong("it is no dataclass: pretrain stores asdict(config) with the run, to "
                    "compare it when the run is taken up again") from None
    expect(
        config.run(config.thing, **stored) == made,
        "made again from its own values it is not equal to itself",
    )


# pretrain

pretrain_battery = Battery(
    "pretrain", "pretrain(model, tokenizer, mixture, config, folder, *, report=100) -> history",
    chapter=10, takes=("model", "tokenizer", "mixture", "config", "folder", "report"),
)


@dataclass(frozen=True)
class Settings:
    """What `PretrainingConfig` holds."""

    seed: int = 0
    epochs: int = 2
    steps: int | None = None
    batch_size: int = 6
    learning_rate: float = 1e-2
    warmup: float = 0.4
    weight_decay: float = 0.3
    clip: float = 1.6
    share: float = 0.3
    words: float = 2.1
    labels: float = 4.8
    bpe_dropout: float = 0.0
    precision: str = "no"


class PowerCut(BaseException):
    """What stops a run in the middle."""


class Watched(nn.Module):
    """A small model with two answers that writes down what it is given."""

    def __init__(self, shape, seed=3):
        super().__init__()
        self.config, self.log, self.stop_at = shape, [], None
        self.token = nn.Embedding(shape.vocab_size, shape.d_model)
        self.mix = nn.Linear(shape.d_model, shape.d_model)
        self.head = nn.Linear(shape.d_model, shape.num_labels)
        self.guess = nn.Linear(shape.d_model, shape.vocab_size)
        scramble(self, seed, 0.4)

    def forward(self, input_ids, attention_mask=None, chosen=None):
        """Answer, and remember the question."""
        if self.stop_at is not None and len(self.log) >= self.stop_at:
            raise PowerCut
        self.log.append({
            "ids": input_ids.detach().cpu().clone(), "training": self.training,
            "mask": None if attention_mask is None else attention_mask.cpu().clone(),
            "chosen": None if chosen is None else chosen.cpu().clone(),
            "dice": torch.rand(2),
        })
        hidden = self.token(input_ids)
        real = torch.ones_like(input_ids).bool() if attention_mask is None else attention_mask
        pooled = (hidden * real[:, :, None]).sum(1) / real.sum(1, keepdim=True)
        hidden = torch.tanh(self.mix(hidden + pooled[:, None]))
        if chosen is None:
            chosen = torch.ones_like(input_ids).bool()
        return self.head(pooled), self.guess(hidden[chosen])


ALPHABET = "abcdefghijklmnop"


def small_world():
    """Twenty-three posts in three pieces, and a tokenizer for them."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    dice = random.Random(8)
    words = ["".join(dice.choice(ALPHABET) for _ in range(4)) for _ in range(30)]
    texts = [" ".join(dice.choice(words) for _ in range(dice.randint(3, 9))) for _ in range(23)]
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]", continuing_subword_prefix="##",
                                     fuse_unk=True))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(texts * 3, trainers.BpeTrainer(
        vocab_size=110, special_tokens=list(NAMES), continuing_subword_prefix="##",
        show_progress=False,
    ))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)])
    mixture = {
        "mood": dataset_of(texts[:10], [i % 3 for i in range(10)], ["x", "y", "z"]),
        "bare": dataset_of(texts[10:15]),
        "irony": dataset_of(texts[15:], [i % 2 for i in range(8)], ["no", "yes"]),
    }
    answers = [*(i % 3 for i in range(10)), *[-1] * 5, *(3 + i % 2 for i in range(8))]
    return SimpleNamespace(
        texts=texts, tokenizer=tokenizer, mixture=mixture, answers=answers,
        rows=[tokenizer.encode(text).ids for text in texts],
        shape=Shape(vocab_size=tokenizer.get_vocab_size(), num_labels=5, max_len=40),
    )


_WORLD = []


def world():
    """The small world, made once."""
    if not _WORLD:
        with unhurried():
            for library in ("accelerate", "datasets", "sklearn.metrics", "torch._dynamo"):
                with contextlib.suppress(ImportError):
                    importlib.import_module(library)
            _WORLD.append(small_world())
    return _WORLD[0]


def run(function, model, config, folder, report=1, mixture=None):
    """Call the reader's pretrain; give the history."""
    w = world()

    def call():
        with own_dice():
            return function.thing(
                model, w.tokenizer, w.mixture if mixture is None else mixture, config,
                folder, report=report)

    history = function.run(call)
    expect(
        isinstance(history, list) and all(isinstance(row, dict) for row in history),
        "it must return the history, a list of dicts",
    )
    return history


def trial(function, config=None, report=1, shape=None):
    """Run on the small world in a folder of its own; model, history and start."""
    w = world()
    model = Watched(shape or w.shape)
    start = tensors_of(model)
    with tempfile.TemporaryDirectory() as folder:
        history = run(function, model, config or Settings(), folder, report)
    expect(model.log, "the model is never called: was it copied, and the copy trained?")
    return model, history, start


def found_rows(entry):
    """Which posts a batch holds: their numbers, by length and unspoilt tokens."""
    if "rows" in entry:
        return entry["rows"]
    w = world()
    ids, mask, chosen = entry["ids"], entry["mask"], entry["chosen"]
    if mask is None:
        raise Wrong("the model gets no attention mask: it would read padding")
    if chosen is None:
        raise Wrong("the model gets no chosen positions: it would guess every word, "
                    "seen or not")
    rows = []
    for line, real, holes in zip(ids, mask, chosen, strict=True):
        length = int(real.sum())
        fitting = [
            i for i, row in enumerate(w.rows) if len(row) == length and all(
                t == s or bool(h) for t, s, h in
                zip(row, line.tolist()[:length], holes.tolist()[:length], strict=True))
        ]
        free = [i for i in fitting if i not in rows]
        if not free:
            raise Wrong(
                "the model is given rows that are no texts of the mixture with the chosen "
                "positions spoilt: is chosen the mask of another batch, or is the text "
                "changed elsewhere?"
            )
        rows.append(free[0])
    entry["rows"] = rows
    return rows


def replay(model, start, config, mistake=None, steps=None):
    """Train a copy by hand on what the model was given; losses and weights."""
    w = world()
    own = Watched(w.shape)
    own.load_state_dict(start)
    decay = config.weight_decay
    matrices = [p for p in own.parameters() if p.ndim >= 2]
    vectors = [p for p in own.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": decay},
              {"params": vectors, "weight_decay": 0.0}]
    if mistake == "decay all":
        groups[1]["weight_decay"] = decay
    if mistake == "no decay":
        groups[0]["weight_decay"] = 0.0
    if mistake == "default decay":
        groups[0]["weight_decay"] = groups[1]["weight_decay"] = 0.01
    kind = torch.optim.Adam if mistake == "adam" else torch.optim.AdamW
    optimizer = (
        torch.optim.SGD(groups, lr=1.0) if mistake == "sgd" else kind(groups, lr=1.0))
    total = len(model.log)
    warm = round(config.warmup * total)
    losses = []
    slices = torch.zeros(2, 5, dtype=torch.bool)
    slices[0, :3], slices[1, 3:] = True, True
    for step, entry in enumerate(model.log[:steps]):
        rows = found_rows(entry)
        labels = torch.tensor([w.answers[i] for i in rows])
        length = entry["ids"].shape[1]
        truth = torch.tensor([w.rows[i] + [PAD] * (length - len(w.rows[i])) for i in rows])
        chosen = entry["chosen"]
        label_logits, word_logits = own(entry["ids"], entry["mask"], chosen)
        word_labels = entry["ids"][chosen] if mistake == "spoilt labels" else truth[chosen]
        of_words = F.cross_entropy(
            word_logits, word_labels,
            reduction="sum" if mistake == "word sum" else "mean")
        allowed = slices[(labels >= 3).long()]
        keep = labels >= 0
        closed = label_logits if mistake == "no slices" else label_logits.masked_fill(
            ~allowed, MINUS)
        of_labels = (F.cross_entropy(closed[keep], labels[keep], reduction="sum")
                     if keep.any() else label_logits.sum() * 0)
        of_labels = of_labels / (
            max(1, int(keep.sum())) if mistake == "labelled" else
            1 if mistake == "label sum" else len(rows))
        losses.append((of_words.item(), of_labels.item()))
        words, lab = config.words, config.labels
        if mistake == "no weights":
            words = lab = 1.0
        if mistake == "swapped":
            words, lab = lab, words
        if mistake in ("words only", "words alone"):
            words, lab = (words if mistake == "words only" else 1.0), 0.0
        if mistake in ("labels only", "labels alone"):
            words, lab = 0.0, (lab if mistake == "labels only" else 1.0)
        loss = words * of_words + lab * of_labels
        if mistake != "no zero_grad":
            own.zero_grad()
        loss.backward()
        if mistake == "value clip":
            nn.utils.clip_grad_value_(own.parameters(), config.clip)
        elif mistake != "no clip":
            nn.utils.clip_grad_norm_(
                own.parameters(), 1.0 if mistake == "clip one" else config.clip)

        def factor(at, warm=warm):
            if mistake == "constant":
                return 1.0
            if mistake == "no warmup":
                return (total - at) / total
            if mistake == "no fall":
                return min(1.0, (at + 1) / max(1, warm))
            if mistake == "warmup steps":
                return max(0.0, (total - at) / total)
            return (at + 1) / warm if at < warm else (total - at) / max(1, total - warm)

        at = step + 1 if mistake == "late" else step
        if mistake == "per epoch":
            at = step % -(-len(w.texts) // config.batch_size)
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * factor(at)
        optimizer.step()
    return losses, tensors_of(own)


RUN_MISTAKES = (
    ("no zero_grad", "old gradients are added to the new ones: call zero_grad before each "
     "backward"),
    ("no clip", "gradients are not clipped: clip their norm to config.clip, after backward "
     "and before the step"),
    ("value clip", "each gradient is clipped on its own: clip the norm of all together "
     "(clip_grad_norm_)"),
    ("clip one", "gradients are clipped to 1, not to config.clip"),
    ("constant", "the learning rate never changes: it must rise and fall with "
     "learning_rate_factor"),
    ("no warmup", "the learning rate does not rise at the beginning: config.warmup is a "
     "share of all steps"),
    ("no fall", "the learning rate never falls after the warmup"),
    ("late", "the learning rate is one step ahead: it must be set before the step, for the "
     "number of steps done"),
    ("per epoch", "the learning rate starts anew in each epoch: count the steps of the "
     "whole run"),
    ("decay all", "biases and norms are decayed too: use parameter_groups"),
    ("no decay", "weight_decay is not passed on"),
    ("default decay", "AdamW's own weight decay of 0.01 is used, for all parameters: use "
     "parameter_groups with config.weight_decay"),
    ("adam", "the optimizer is Adam, whose weight decay is another one: AdamW"),
    ("sgd", "the optimizer is SGD: AdamW is asked for"),
    ("no weights", "the weights of the two losses, config.words and config.labels, are not "
     "used"),
    ("swapped", "the weights of the two losses are exchanged"),
    ("words only", "only the words' loss teaches: the sum of both must go back"),
    ("labels only", "only the labels' loss teaches: the sum of both must go back"),
    ("words alone", "only the words' loss teaches: the sum of both must go back"),
    ("labels alone", "only the labels' loss teaches: the sum of both must go back"),
    ("spoilt labels", "the words' loss asks for the spoilt ids: the answers are the ids "
     "before corrupt"),
    ("word sum", "the words' loss is a sum, not a mean"),
    ("no slices", "the labels' loss lets a text choose among the outputs of all pieces"),
    ("labelled", "the labels' loss is divided by the labelled texts, not by the batch"),
    ("label sum", "the labels' loss is a sum over the texts: divide by the batch"),
)


@pretrain_battery.property("reads every text once an epoch, spoilt, with its mask")
def pretrain_batches(function):
    w = world()
    model, history, _ = trial(function)
    steps = -(-len(w.texts) // 6)
    expect(
        len(model.log) == 2 * steps,
        f"23 texts in batches of 6, two epochs: {2 * steps} steps, but there are "
        f"{len(model.log)}",
    )
    expect(
        all(entry["training"] for entry in model.log),
        "the model is in evaluation mode while it learns: call model.train() first",
    )
    orders = []
    for first in (0, steps):
        order = [i for entry in model.log[first : first + steps] for i in found_rows(entry)]
        if sorted(order) != list(range(len(w.texts))):
            raise Wrong("an epoch does not read every text exactly once: texts are left "
                        "out (the last batch is often smaller) or read twice")
        orders.append(order)
    expect(orders[0] != orders[1], "both epochs read the texts in the same order: the "
           "seed must be another one for each epoch")
    expect(
        all(entry["mask"].dtype == torch.bool for entry in model.log),
        "the attention mask is not bool: True = a real token",
    )
    chosen = torch.cat([entry["chosen"].flatten() for entry in model.log])
    real = torch.cat([(entry["mask"] & (entry["ids"] != CLS) & (entry["ids"] != SEP)).flatten()
                      for entry in model.log])
    rate = chosen.sum() / real.sum()
    expect(
        0.2 < rate < 0.4,
        f"share is 0.3, but {rate:.0%} of the tokens are chosen: is config.share passed to "
        "corrupt?",
    )
    spoilt = [
        s != t for entry in model.log for i, line, holes in zip(
            found_rows(entry), entry["ids"], entry["chosen"], strict=True)
        for s, t, h in zip(line.tolist(), w.rows[i], holes.tolist(), strict=False) if h
    ]
    expect(
        sum(spoilt) > 0.6 * len(spoilt),
        "the model is shown the words that it has to guess: give it the spoilt ids",
    )


@pretrain_battery.property("draws other holes in every step and epoch")
def pretrain_holes(function):
    same_text = {"bare": dataset_of(["abcd efgh ijkl mnop abcd efgh ijkl mnop"] * 12)}
    model = Watched(replace(world().shape, num_labels=1))
    with tempfile.TemporaryDirectory() as folder:
        run(function, model, Settings(), folder, mixture=same_text)
    holes = [entry["chosen"] for entry in model.log]
    if len(holes) != 4 or len({h.shape for h in holes}) > 1:
        raise Skip("twelve equal texts do not make four equal batches; mend that first")
    for i, one in enumerate(holes):
        for j in range(i):
            if torch.equal(one, holes[j]):
                raise Wrong(
                    "every epoch has the same holes: the generator's seed must depend on "
                    "the epoch too" if (i, j) in ((2, 0), (3, 1)) else
                    "every step has the same holes: the generator's seed must depend on "
                    "the number of the step"
                )


@pretrain_battery.property("reports both losses, each a mean since the last report")
def pretrain_history(function):
    model, history, start = trial(function)
    for key in ("step", "tokens", "words", "labels"):
        expect(
            all(key in row for row in history) and history,
            f"the history's rows must have {key}: step, tokens, words and labels",
        )
    expect(
        [row["step"] for row in history] == list(range(1, 9)),
        "with report=1 the steps of the history must be 1, 2, … 8, but they are "
        f"{[row['step'] for row in history]}",
    )
    real = torch.tensor([int(entry["mask"].sum()) for entry in model.log]).cumsum(0).tolist()
    found = [row["tokens"] for row in history]
    padded = torch.tensor([entry["ids"].numel() for entry in model.log]).cumsum(0).tolist()
    expect(found != padded or padded == real, "padding is counted among the tokens read: sum "
           "the mask")
    expect(
        found == real,
        "tokens must count the real tokens read since the beginning of the run: "
        f"{real[:3]} …, but it is {found[:3]} …",
    )
    wanted, _ = replay(model, start, Settings(), None, 1)
    first = history[0]
    if not (abs(first["words"] - wanted[0][0]) < 1e-3
            and abs(first["labels"] - wanted[0][1]) < 1e-3):
        for mistake, hint in RUN_MISTAKES:
            losses, _ = replay(model, start, Settings(), mistake, 1)
            if (abs(first["words"] - losses[0][0]) < 1e-3
                    and abs(first["labels"] - losses[0][1]) < 1e-3):
                raise Wrong(hint)
        s = Settings()
        if abs(first["words"] - s.words * wanted[0][0]) < 1e-3 or (
                abs(first["labels"] - s.labels * wanted[0][1]) < 1e-3):
            raise Wrong("the losses are reported with their weights: report them as they "
                        "are, so that runs can be compared")
        raise Wrong(
            "at the first step the words' loss must be "
            f"{wanted[0][0]:.3f} and the labels' {wanted[0][1]:.3f}, but they are "
            f"{first['words']:.3f} and {first['labels']:.3f}: compare the labels of each "
            "text (row numbers of the batch against those of the mixture), the outputs of "
            "its piece, and the chosen positions"
        )
    _, sparse, _ = trial(function, report=3)
    expect(
        [row["step"] for row in sparse] == [3, 6, 8],
        "with report=3 and eight steps the history must hold the steps 3, 6 and 8, the "
        f"last one too, but it holds {[row.get('step') for row in sparse]}",
    )
    for row, part in zip(sparse, (slice(0, 3), slice(3, 6), slice(6, 8)), strict=True):
        means = [sum(x) / len(x) for x in zip(
            *[(h["words"], h["labels"]) for h in history[part]], strict=True)]
        expect(
            abs(row["words"] - means[0]) < 1e-4 and abs(row["labels"] - means[1]) < 1e-4,
            "a report must give the mean loss since the last report: sums are not set back "
            "to 0, or divided by the wrong number of steps (the last report may cover "
            "fewer), or only the last step is given",
        )


@pretrain_battery.property("takes the steps that both losses ask for")
def pretrain_steps(function):
    config = Settings(batch_size=12)  # two steps an epoch
    model, _, start = trial(function, config)
    ended = tensors_of(model)

    def close(mistake=None):
        with unhurried():
            other = replay(model, start, config, mistake)[1]
            return all(near(v, other[k], 2e-4) for k, v in ended.items())

    function.steps_right = close()
    if function.steps_right:
        return
    expect(not same(ended, start), "the model's weights have not moved: does the optimizer "
           "hold this model's parameters, and is step() called?")
    for mistake, hint in RUN_MISTAKES:
        if close(mistake):
            raise Wrong(hint)
    raise Wrong(
        "the weights do not end where AdamW leads them on the batches that the model was "
        "given: zero_grad, backward, clip the norm to config.clip, set the learning rate "
        "of this step, step. Compare the first step"
    )


@pretrain_battery.property("ends at config.steps, and plans its learning rate for that")
def pretrain_ends(function):
    config = Settings(steps=5, epochs=3)
    model, history, start = trial(function, config, report=2)
    expect(
        len(model.log) == 5,
        f"steps=5 must end the run after 5 steps, in the second epoch, but it takes "
        f"{len(model.log)}",
    )
    expect(
        [row["step"] for row in history] == [2, 4, 5],
        "with steps=5 and report=2 the history must hold 2, 4 and 5, the last step too, "
        f"but it holds {[row['step'] for row in history]}",
    )
    ended = tensors_of(model)
    wanted = replay(model, start, config)[1]
    expect(
        not getattr(function, "steps_right", True)
        or all(near(v, wanted[k], 2e-4) for k, v in ended.items()),
        "with steps=5 the learning rate is planned for all epochs: total is the smaller "
        "of both",
    )
    config = Settings(steps=100, epochs=1)
    expect(
        len(trial(function, config)[0].log) == 4,
        "steps above what the epochs hold must not make the run longer",
    )


@pretrain_battery.property("goes on where it was killed, and ends the same")
def pretrain_resumes(function):
    w = world()
    unbroken, whole, _ = trial(function, report=2)
    for at in (3, 5):
        with tempfile.TemporaryDirectory() as folder:
            model = Watched(w.shape)
            model.stop_at = at
            try:
                with own_dice(), contextlib.redirect_stdout(io.StringIO()):
                    function.thing(model, w.tokenizer, w.mixture, Settings(), folder, report=2)
                raise Wrong("an exception in the middle of a step is swallowed")
            except PowerCut:
                pass
            again = Watched(w.shape)
            history = run(function, again, Settings(), folder, 2)
            once_more = Watched(w.shape)
            done = run(function, once_more, Settings(), folder, 2)
        expect(
            len(again.log) < 8,
            "it begins again from the first step: the state must be saved with each "
            "report, and loaded",
        )
        expect(
            len(again.log) == 8 - 2 * (at // 2),
            f"killed in step {at + 1} with a report every 2, it must take up "
            f"{8 - 2 * (at // 2)} steps, but it takes {len(again.log)}: steps are done "
            "twice or passed over",
        )
        expect(
            history == whole,
            "the history of a run that was killed is not that of an unbroken one: is it "
            "saved and loaded with the state, with the count of tokens?"
            if len(history) != len(whole) or [r["tokens"] for r in history] != [
                r["tokens"] for r in whole] else
            "the losses after a run is taken up again are other ones: everything random in "
            "a step must follow from its number, and the optimizer's moments must be saved",
        )
        expect(
            same(tensors_of(again), tensors_of(unbroken)),
            "a run that was killed ends elsewhere than an unbroken one: the optimizer's "
            "state must be saved too, and everything random must follow from the number "
            "of the step",
        )
        ours, theirs = again.log[-1]["dice"], unbroken.log[-1]["dice"]
        expect(
            torch.equal(ours, theirs),
            "dropout would fall otherwise after a run is taken up: set the global seed "
            "from the number of the step (torch.manual_seed) before the model is called",
        )
        expect(
            done == whole and not once_more.log,
            "a run that has ended is run again: called once more it must only load",
        )
        expect(
            same(tensors_of(once_more), tensors_of(unbroken)),
            "called after its end it does not put the saved weights into the model",
        )


@pretrain_battery.property("depends on its seed alone")
def pretrain_seed(function):
    short = Settings(steps=3)
    first, again = trial(function, short)[0], None
    torch.rand(5)
    again = trial(function, short)[0]
    expect(
        same(tensors_of(first), tensors_of(again)),
        "the same settings give another model each time: something is drawn from dice "
        "that the seed does not set",
    )
    other = trial(function, replace(short, seed=1))[0]
    expect(
        any(a["ids"].shape != b["ids"].shape or not torch.equal(a["ids"], b["ids"])
            for a, b in zip(first.log, other.log, strict=True)),
        "another seed gives the same batches: config.seed is not used",
    )
    cut = trial(function, replace(short, bpe_dropout=0.5))[0]
    before = sum(int(e["mask"].sum()) for e in first.log)
    after = sum(int(e["mask"].sum()) for e in cut.log)
    expect(
        after > before,
        "with bpe_dropout=0.5 words must fall into more pieces, but they do not: is it "
        "passed to WordCutter?",
    )


@pretrain_battery.property("refuses a folder of another run, too few outputs, and NaN")
def pretrain_refuses(function):
    w = world()
    with tempfile.TemporaryDirectory() as folder:
        short = Settings(steps=1)
        run(function, Watched(w.shape), short, folder)
        for other, what in (
            (replace(short, learning_rate=0.5), "another learning rate"),
            (replace(short, seed=4), "another seed"),
        ):
            refused(
                function, lambda other=other: _quiet(function, Watched(w.shape), other, folder),
                f"a folder that holds a run with {what} must be refused by a ValueError: "
                "two runs would be mixed up",
            )
    for count in (4, 7):
        with tempfile.TemporaryDirectory() as folder:
            hint = (f"a model with {count} outputs must be refused by a ValueError where the "
                    "mixture has 5 labels")
            try:
                refused(function, lambda count=count, folder=folder: _quiet(
                    function, Watched(replace(w.shape, num_labels=count)), Settings(),
                    folder), hint)
            except Broke:
                raise Wrong(f"{hint}, but far inside it {_last(function)}") from None
    broken = Watched(w.shape)
    with torch.no_grad():
        broken.mix.weight[0, 0] = float("nan")
    with tempfile.TemporaryDirectory() as folder:
        refused(
            function, lambda: _quiet(function, broken, Settings(), folder),
            "a loss of NaN goes unnoticed: raise a FloatingPointError before it spoils "
            "every weight", kinds=(FloatingPointError, ValueError),
        )


def _quiet(function, model, config, folder):
    with own_dice():
        w = world()
        return function.thing(model, w.tokenizer, w.mixture, config, folder, report=1)


# training_flops

flops_battery = Battery(
    "training_flops",
    "training_flops(config, tokens, *, seq_len, chosen_share=0.0) -> float",
    chapter=10, takes=("config", "tokens", "seq_len", "chosen_share"),
)


def flops(c, tokens, seq_len, share, *, back=3.0, plus=2, attention=4, head="text",
          guess="both", ff=2, linears=4, layers=None, vocab=None, seq=None, extra=0):
    """The formula, right or with one mistake."""
    d, f = c.d_model, c.d_ff
    seq = seq_len if seq is None else seq
    layer = plus * (linears * d * d + ff * d * f) + attention * seq * d
    words = {"both": d * d + d * c.vocab_size, "table": d * c.vocab_size, "none": 0,
             "dense": d * d}[guess] * plus
    of_head = plus * d * c.num_labels / {"text": seq_len, "token": 1, "none": math.inf}[head]
    layers = c.num_layers if layers is None else layers
    return back * tokens * (layers * layer + share * words + of_head + extra)


FLOPS_CONFIG = SimpleNamespace(
    d_model=12, d_ff=40, num_layers=3, num_heads=4, vocab_size=101, num_labels=7,
    max_len=64, dropout=0.0, positions="learned", num_segments=0, norm_first=True,
    pooling="mean",
)


@flops_battery.property("counts forward and backward, by the formula")
def flops_equal(function):
    for share in (0.0, 0.25):
        args = (FLOPS_CONFIG, 1000, 20, share)
        wanted = flops(*args)
        value = function.run(lambda share=share: function.thing(
            FLOPS_CONFIG, 1000, seq_len=20, chosen_share=share))
        expect(
            isinstance(value, (int, float)) and not isinstance(value, bool),
            f"it must return a number, but it returns a {type(value).__name__}",
        )
        if math.isclose(value, wanted, rel_tol=1e-9):
            continue
        d = FLOPS_CONFIG.d_model
        for hint, mistaken in (
            ("the backward pass is missing: it costs twice the forward pass again, so 3 "
             "times in all", dict(back=1)),
            ("backward is counted as much as forward: it computes two gradients, for the "
             "weights and for what came in, so it is 3 times in all", dict(back=2)),
            ("the backward pass alone is counted", dict(back=2.0)),
            ("forward is counted twice: 3 times in all, not 4", dict(back=4)),
            ("a multiplication and an addition are counted as one: each weight costs 2",
             dict(plus=1)),
            ("a multiplication and an addition are counted as one: each weight costs 2",
             dict(plus=1, attention=2)),
            ("attention's two products are missing: they have no weights, but they cost "
             "4 · seq_len · d_model", dict(attention=0)),
            ("only one of attention's two products is counted: query · key and weights · "
             "value", dict(attention=2)),
            ("attention's products are counted for all heads: together they are one times "
             "the width", dict(attention=4 * FLOPS_CONFIG.num_heads)),
            ("attention's products are counted for the square of seq_len, though it is "
             "for each token already", dict(attention=4 * 20)),
            ("the labels' head is counted for each token: it works once a text",
             dict(head="token")),
            ("the labels' head is missing", dict(head="none")),
            ("the words' head is missing", dict(guess="none")),
            ("the Linear in front of the words' table is missing", dict(guess="table")),
            ("the table of words is missing: each chosen token is compared with all of "
             "them", dict(guess="dense")),
            ("only one matrix of the feed-forward layer is counted: there are two",
             dict(ff=1)),
            ("the output projection of attention is missing: there are four matrices",
             dict(linears=3)),
            ("only one matrix of attention is counted: there are four", dict(linears=1)),
            ("one layer is counted, not num_layers", dict(layers=1)),
            ("the longest text is counted, not the mean length seq_len",
             dict(seq=FLOPS_CONFIG.max_len)),
            ("looking up the embedding is counted as a product: it costs none",
             dict(extra=2 * FLOPS_CONFIG.vocab_size * d)),
        ):
            if math.isclose(value, flops(*args, **mistaken), rel_tol=1e-9):
                raise Wrong(hint)
        for other, hint in ((1.0, "every token's word is guessed: multiply by "
                             "chosen_share"), (0.15, "chosen_share is ignored: 0.15 is "
                                               "written into the code")):
            if math.isclose(value, flops(FLOPS_CONFIG, 1000, 20, other), rel_tol=1e-9):
                raise Wrong(hint)
        if math.isclose(value * 1000, wanted, rel_tol=1e-9):
            raise Wrong("it counts one token: multiply by the number of tokens")
        if math.isclose(value, wanted * 20, rel_tol=1e-9):
            raise Wrong("it counts a text for each token: tokens is what was read already")
        raise Wrong(
            "a token costs, forward: in each layer 2 · (4 · d_model² + 2 · d_model · d_ff) "
            "+ 4 · seq_len · d_model; the words' head 2 · (d_model² + d_model · vocab_size) "
            "times chosen_share; the labels' head 2 · d_model · num_labels / seq_len; in "
            f"all three times that. Here that is {wanted:,.0f}, but it is {value:,.0f}"
        )


@flops_battery.property("is 0 for no tokens, and twice as much for twice as many")
def flops_linear(function):
    def call(tokens, **named):
        return function.run(
            lambda: function.thing(FLOPS_CONFIG, tokens, seq_len=20, **named))

    expect(call(0) == 0, "no tokens cost something")
    expect(math.isclose(call(500) * 2, call(1000), rel_tol=1e-9), "twice as many tokens do "
           "not cost twice as much: seq_len is the length of a text, tokens what was read")
    expect(
        math.isclose(call(1000), flops(FLOPS_CONFIG, 1000, 20, 0.0), rel_tol=1e-9)
        or not math.isclose(call(1000, chosen_share=0.0), flops(FLOPS_CONFIG, 1000, 20, 0.0),
                            rel_tol=1e-9),
        "where no share is given the words' head is counted: its default is 0",
    )
    big = function.run(lambda: function.thing(FLOPS_CONFIG, 10**12, seq_len=17.5))
    expect(math.isclose(big, flops(FLOPS_CONFIG, 10**12, 17.5, 0.0), rel_tol=1e-9),
           "with 10¹² tokens of texts with 17.5 tokens on average it is wrong: no whole "
           "divisions, no 32-bit numbers")


# save_half and load_half


class Stub(nn.Module):
    """A classifier with the book's names, of two matrices."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embedding = nn.Module()
        self.embedding.token = nn.Embedding(config.vocab_size, config.d_model)
        self.head = nn.Linear(config.d_model, config.num_labels)


class TiedStub(nn.Module):
    """A pretraining model with the book's names, its second head tied."""

    made_with = ()

    def __init__(self, config, **classes):
        super().__init__()
        type(self).made_with = classes
        self.config = config
        self.classifier = Stub(config)
        self.masked_head = nn.Module()
        self.masked_head.dense = nn.Linear(config.d_model, config.d_model)
        self.masked_head.decoder = nn.Linear(config.d_model, config.vocab_size)
        self.masked_head.decoder.weight = self.classifier.embedding.token.weight


SMALL = Shape(num_labels=4)
LABEL_NAMES = ["mood/sad", "mood/glad", "irony/no", "irony/ja ü"]
PARTS = ("config.json", "model.safetensors", "tokenizer.json")
TIED = "masked_head.decoder.weight"

save_battery = Battery(
    "save_half", "save_half(folder, model, tokenizer, label_names)", chapter=10,
    takes=("folder", "model", "tokenizer", "label_names"),
)


def stub_model(kind=TiedStub, shape=SMALL):
    """A stub with random weights, in training mode."""
    return scramble(kind(shape), seed=9).train()


def save(function, folder, model=None, names=LABEL_NAMES):
    """Call the reader's save_half."""
    model = stub_model() if model is None else model
    function.run(lambda: function.thing(folder, model, world().tokenizer, list(names)))
    return model


@save_battery.property("writes three files, the weights in float16")
def save_files(function):
    from safetensors.torch import load

    for kind in (TiedStub, Stub):
        with tempfile.TemporaryDirectory() as root:
            folder = Path(root) / "new" / "deeper"
            model = save(function, folder, stub_model(kind))
            expect(folder.is_dir(), "it does not create the folder")
            names = sorted(path.name for path in folder.iterdir())
            lacking = [name for name in PARTS if name not in names]
            expect(not lacking, f"files are missing: {', '.join(lacking)}")
            extra = [name for name in names if name not in PARTS]
            expect(
                not extra, f"files are left behind: {', '.join(extra)}: drafts must take "
                "their place (os.replace)",
            )
            raw = (folder / "model.safetensors").read_bytes()
            try:
                weights = load(raw)
            except Exception:
                raise Wrong("model.safetensors is no safetensors file: a pickle may run "
                            "code when it is read. Use safetensors.torch.save") from None
        wide = {str(v.dtype) for v in weights.values() if v.dtype != torch.float16}
        expect(not wide, f"weights are stored as {', '.join(wide)}: half precision is "
               "float16, .half()")
        wanted = {k: v for k, v in model.state_dict().items() if k != TIED}
        if TIED in weights:
            raise Wrong("the tied table stands in the file twice: leave out "
                        "masked_head.decoder.weight, it is the embedding's table")
        lost, more = sorted(set(wanted) - set(weights)), sorted(set(weights) - set(wanted))
        expect(
            not lost and not more,
            (f"weights are not saved: {', '.join(lost)}" if lost else
             f"unknown names are saved: {', '.join(more)}")
            + ". Keep the names of state_dict(), whatever class the model has",
        )
        for name, value in wanted.items():
            expect(
                torch.equal(weights[name], value.half()),
                f"the values of {name} are not those of the model, rounded to float16",
            )


@save_battery.property("describes the model, with a hash of each file")
def save_config(function):
    w = world()
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        save(function, folder)
        try:
            config = json.loads((folder / "config.json").read_text("utf-8"))
        except ValueError:
            raise Wrong("config.json is not JSON in UTF-8") from None
        for key in ("model", "label_names", "sha256"):
            expect(
                key in config, f"config.json lacks {key!r}: its keys are model (the "
                "config), label_names and sha256, as in the folder of the book's model",
            )
        expect(
            config["model"] == asdict(SMALL),
            "'model' must hold every number of the model's config, asdict(model.config)",
        )
        expect(config["label_names"] == LABEL_NAMES, "'label_names' must be the list of "
               "the label names, in their order")
        hashes = config["sha256"]
        expect(isinstance(hashes, dict), "'sha256' must be a dict from a file's name to "
               "its hash")
        for name in ("model.safetensors", "tokenizer.json"):
            expect(name in hashes, f"there is no hash of {name}: a damaged copy would not be "
                   "noticed")
            content = (folder / name).read_bytes()
            expect(
                hashes[name] == hashlib.sha256(content).hexdigest(),
                f"the hash of {name} is not the SHA-256 of its bytes, in hex"
                + (": it is another hash" if len(str(hashes[name])) != 64 else
                   ": hash exactly what is written"),
            )
        try:
            from tokenizers import Tokenizer
            again = Tokenizer.from_file(str(folder / "tokenizer.json"))
            same_ids = again.encode(w.texts[0]).ids == w.rows[0]
        except Exception:
            same_ids = False
        expect(same_ids, "tokenizer.json does not give the tokenizer back: write "
               "tokenizer.to_str()")


@save_battery.property("writes each file whole, and config.json last")
def save_order(function):
    for blocked in ("model.safetensors", "tokenizer.json"):
        with tempfile.TemporaryDirectory() as root:
            folder = Path(root)
            (folder / blocked).mkdir()  # nothing can be written there
            try:
                function.run(lambda folder=folder: function.thing(
                    folder, stub_model(), world().tokenizer, LABEL_NAMES))
            except Broke:
                pass
            else:
                raise Wrong(f"{blocked} cannot be written here, and no error is raised")
            expect(
                not (folder / "config.json").exists(),
                f"config.json is written though {blocked} could not be: it must come last, "
                "so that a folder without it is not finished",
            )
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "f"
        save(function, folder)
        for name in PARTS:
            try:
                os.link(folder / name, Path(root) / name)
            except OSError:
                raise Skip("this file system has no hard links") from None
        before = {name: (Path(root) / name).read_bytes() for name in PARTS}
        save(function, folder, stub_model(), LABEL_NAMES[::-1])
        other = scramble(stub_model(), seed=77)
        save(function, folder, other)
        for name in PARTS:
            expect(
                (Path(root) / name).read_bytes() == before[name],
                f"{name} is overwritten in place: killed half way, it would be neither the "
                "old nor the new file. Write a draft beside it and os.replace it "
                "(save_atomically)",
            )


@save_battery.property("refuses what cannot be saved, and writes nothing then")
def save_refuses(function):
    loud = stub_model()
    with torch.no_grad():
        loud.classifier.head.bias[0] = 1e6  # finite, but not in half precision
    broken = stub_model()
    with torch.no_grad():
        broken.classifier.head.weight[0, 0] = float("nan")
    for model, names, hint in (
        (stub_model(), LABEL_NAMES[:-1], "three label names for four outputs must be "
         "refused by a ValueError"),
        (stub_model(), [*LABEL_NAMES, "more"], "five label names for four outputs must be "
         "refused by a ValueError"),
        (loud, LABEL_NAMES, "a weight of 1,000,000 becomes infinite in float16: refuse it "
         "by a ValueError, after .half()"),
        (broken, LABEL_NAMES, "a weight that is NaN must be refused by a ValueError"),
    ):
        with tempfile.TemporaryDirectory() as root:
            folder = Path(root) / "f"
            refused(function, lambda folder=folder, model=model, names=names: function.thing(
                folder, model, world().tokenizer, names), hint)
            expect(
                not folder.exists() or not list(folder.iterdir()),
                "a model is refused after files were written: check first, then write",
            )


@save_battery.property("leaves the model as it is")
def save_keeps(function):
    model = stub_model()
    before = tensors_of(model)
    with tempfile.TemporaryDirectory() as root:
        save(function, Path(root), model)
    expect(
        all(p.dtype == torch.float32 for p in model.parameters()),
        "the model itself is in half precision afterwards: .half() on a module changes "
        "it, convert the tensors of its state_dict",
    )
    expect(same(tensors_of(model), before), "the model's weights are changed")
    expect(
        model.masked_head.decoder.weight is model.classifier.embedding.token.weight,
        "the model's tied table is torn apart",
    )
    expect(model.training, "the model is in evaluation mode afterwards: leave its mode")
    expect(all(p.requires_grad for p in model.parameters()), "the model's weights no "
           "longer ask for a gradient")


load_battery = Battery(
    "load_half",
    "load_half(folder, model_class=TransformerForSequenceClassification, **classes) "
    "-> model, tokenizer, label names", chapter=10,
    takes=("folder", "model_class", "classes"),
)


def write_half(folder, saved, names=LABEL_NAMES, **changes):
    """Write what `save_half` writes, without any chapter."""
    from safetensors.torch import save as to_bytes

    folder.mkdir(parents=True, exist_ok=True)
    weights = {k: v.detach().half().contiguous()
               for k, v in saved.state_dict().items() if k != TIED}
    contents = {"model.safetensors": to_bytes(weights),
                "tokenizer.json": world().tokenizer.to_str().encode()}
    config = {
        "model": asdict(saved.config), "label_names": list(names),
        "sha256": {n: hashlib.sha256(c).hexdigest() for n, c in contents.items()},
    } | changes
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", "utf-8")


def can_load():
    """Skip where chapter 07's config is not there."""
    config = needs(7, "classifier", "EmoformerConfig")
    working(7, "EmoformerConfig", lambda: config(vocab_size=9))


def loaded(function, folder, model_class=TiedStub, **classes):
    """Call the reader's load_half; expect three things."""
    result = function.run(lambda: function.thing(folder, model_class, **classes))
    expect(
        isinstance(result, tuple) and len(result) == 3,
        "it must return three things: the model, its tokenizer and the label names",
    )
    return result


@load_battery.property("gives back model, tokenizer and label names")
def load_round(function):
    can_load()
    w = world()
    for kind in (TiedStub, Stub):
        saved = stub_model(kind)
        with tempfile.TemporaryDirectory() as root:
            write_half(Path(root), saved)
            model, tokenizer, names = loaded(function, Path(root), kind)
            by_string = function.run(lambda root=root, kind=kind: function.thing(root, kind))
        expect(isinstance(model, kind), f"the model must be a {kind.__name__}, the class "
               f"that was asked for, but it is a {type(model).__name__}")
        expect(isinstance(by_string[0], kind), "a folder given as a string is not read")
        expect(
            all(p.dtype == torch.float32 for p in model.parameters()),
            "the weights stay in half precision: make them float32 again, .float(). On a "
            "CPU half precision is slow, and training in it fails",
        )
        expect(not model.training, "the model is in training mode: return model.eval()")
        for name, value in saved.state_dict().items():
            found = model.state_dict()[name]
            if name == TIED and not near(found, value.half().float()):
                raise Wrong("the tied table of the words' head does not hold the saved "
                            "embedding")
            expect(
                torch.equal(found, value.half().float()),
                f"{name} does not hold the saved numbers: are the weights loaded into the "
                "model, all of them (strict)?",
            )
        expect(list(names) == LABEL_NAMES and isinstance(names, list),
               "the label names must come back as a list, as they were saved")
        expect(
            hasattr(tokenizer, "encode") and tokenizer.encode(w.texts[0]).ids == w.rows[0],
            "the tokenizer is not the saved one: Tokenizer.from_str or from_file",
        )
        expect(
            model.config.num_labels == 4 and model.config.vocab_size == SMALL.vocab_size,
            "the model's config is not the saved one",
        )


@load_battery.property("keeps the table tied, and passes sublayers' classes on")
def load_tied(function):
    can_load()
    with tempfile.TemporaryDirectory() as root:
        write_half(Path(root), stub_model())
        model, _, _ = loaded(function, Path(root), TiedStub, norm=nn.LayerNorm)
    expect(
        model.masked_head.decoder.weight is model.classifier.embedding.token.weight,
        "the table of the words' head and the embedding's part on loading: copy the "
        "numbers into the model (load_state_dict), do not replace its parameters",
    )
    expect(
        TiedStub.made_with == {"norm": nn.LayerNorm},
        "classes passed to it do not reach the model's constructor: pass **classes on",
    )
    expect(all(p.requires_grad for p in model.parameters()), "its weights do not ask for a "
           "gradient: the model cannot be trained on")


@load_battery.property("refuses a damaged file, by its hash")
def load_damaged(function):
    can_load()

    def spoil_weights(folder):
        path = folder / "model.safetensors"
        raw = path.read_bytes()
        path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))

    def cut_weights(folder):
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    def spoil_tokenizer(folder):
        path = folder / "tokenizer.json"
        path.write_bytes(path.read_bytes() + b"\n")

    for spoilt, hint, kinds in (
        (spoil_weights, "one bit of model.safetensors is changed, and it is loaded all the "
         "same: compare its SHA-256 with the one in config.json, and raise a ValueError",
         (ValueError,)),
        (spoil_tokenizer, "tokenizer.json is changed, and it is loaded all the same: its "
         "hash stands in config.json too", (ValueError,)),
        (cut_weights, "model.safetensors is cut off, and no error is raised", (ValueError,)),
    ):
        with tempfile.TemporaryDirectory() as root:
            write_half(Path(root), stub_model())
            spoilt(Path(root))
            try:
                refused(function, lambda root=root: function.thing(Path(root), TiedStub),
                        hint, kinds)
            except Broke:
                raise Wrong(
                    f"a damaged file must be refused by a ValueError, but it {_last(function)}"
                    ": compare the hash before anything is read from the file"
                ) from None


def _last(function):
    return f"raises {type(function.last_error).__name__}"


@load_battery.property("refuses missing files, another class, and a config that does not fit")
def load_refuses(function):
    can_load()
    for name in PARTS:
        with tempfile.TemporaryDirectory() as root:
            write_half(Path(root), stub_model())
            (Path(root) / name).unlink()
            error = refused(
                function, lambda root=root: function.thing(Path(root), TiedStub),
                f"{name} is missing, and no FileNotFoundError is raised",
                kinds=(FileNotFoundError,),
            )
            expect(name in str(error), f"{name} is missing, but the error does not name it")
    with tempfile.TemporaryDirectory() as root:
        write_half(Path(root), stub_model())
        try:
            refused(
                function, lambda: function.thing(Path(root), Stub),
                "weights of one class are loaded into another, and no ValueError is "
                "raised: is strict=False set? Half of the model would be random",
                kinds=(ValueError,),
            )
        except Broke:
            raise Wrong("weights that do not fit the class must be refused by a "
                        f"ValueError that says so, but it {_last(function)}") from None
    for changes, what in (
        ({"label_names": LABEL_NAMES[:3]}, "three label names for four outputs"),
        ({"model": {"vocab_size": 30, "unknown": 1}}, "an unknown setting in 'model'"),
    ):
        with tempfile.TemporaryDirectory() as root:
            write_half(Path(root), stub_model(), **changes)
            try:
                refused(
                    function, lambda root=root: function.thing(Path(root), TiedStub),
                    f"a config.json with {what} is loaded: refuse it by a ValueError",
                    kinds=(ValueError,),
                )
            except Broke:
                raise Wrong(f"a config.json with {what} must be refused by a ValueError, "
                            f"but it {_last(function)}") from None
    with tempfile.TemporaryDirectory() as root:
        write_half(Path(root), stub_model())
        (Path(root) / "config.json").write_text("{", "utf-8")
        refused(function, lambda: function.thing(Path(root), TiedStub),
                "half a config.json is loaded", kinds=(ValueError,))


@load_battery.property("takes chapter 07's classifier where no class is named")
def load_default(function):
    can_load()
    model = transformer(Shape(num_labels=4))
    with tempfile.TemporaryDirectory() as root:
        write_half(Path(root), model)
        result = function.run(lambda: function.thing(Path(root)))
    expect(
        type(result[0]).__name__ == type(model).__name__,
        "without a class it must be a TransformerForSequenceClassification",
    )
    again = copy.deepcopy(result[0].state_dict())
    expect(
        all(torch.equal(again[k], v.half().float()) for k, v in model.state_dict().items()),
        "the weights of chapter 07's classifier do not come back as they were saved",
    )


# The exercises of chapter 10

words_battery = Battery(
    "corrupt_words",
    "corrupt_words(input_ids, continues, share, generator) -> spoilt, chosen",
    chapter=10, takes=("input_ids", "continues", "share", "generator"),
)
CONTINUES = torch.arange(VOCAB) % 3 == 0
CONTINUES[:6] = False


def spoil_words(function, share=0.15, seed=0, ids=IDS):
    """Call the reader's corrupt_words on a copy."""
    given = ids.clone()
    result = function.run(lambda: function.thing(
        given, CONTINUES.clone(), share, torch.Generator().manual_seed(seed)))
    expect(isinstance(result, tuple) and len(result) == 2, "it must return two tensors, "
           "the spoilt ids and the mask of the chosen positions")
    expect(torch.equal(given, ids), "the input itself is spoilt: it holds the answers")
    expect_tensor(result[0], ids.shape, torch.int64)
    expect_tensor(result[1], ids.shape, what="the mask")
    expect(result[1].dtype == torch.bool, "the mask must be bool")
    return result


@words_battery.property("chooses words whole, and masks all of their pieces")
def words_whole(function):
    spoilt, chosen = spoil_words(function, 0.4)
    inside = CONTINUES[IDS] & ORDINARY
    after_ordinary = inside & ORDINARY.roll(1, 1)
    expect(
        torch.equal(chosen[after_ordinary], chosen.roll(1, 1)[after_ordinary]),
        "a word is cut: a piece that continues a word must be chosen exactly when the piece "
        "before it is. Give each piece the number of its word (a running sum of the "
        "starts), and throw one die a word",
    )
    expect(not chosen[~ORDINARY].any(), "special tokens are chosen")
    expect(bool((spoilt[chosen] == MASK).all()), "a chosen piece does not become [MASK]")
    expect(torch.equal(spoilt[~chosen], IDS[~chosen]), "what was not chosen is changed")


@words_battery.property("chooses each word with the chance share, by the generator")
def words_share(function):
    starts = ORDINARY & ~(CONTINUES[IDS] & ORDINARY.roll(1, 1))
    for share in (0.15, 0.5):
        chosen = spoil_words(function, share, 1)[1]
        rate = (chosen & starts).sum() / starts.sum()
        room = 6 * math.sqrt(share * (1 - share) / int(starts.sum()))
        expect(
            abs(rate - share) < room,
            f"with share={share:g} {rate:.0%} of the words are chosen: one die a word, not "
            "one a piece (a word of many pieces would be chosen more often)",
        )
    neighbours = starts & starts.roll(1, 1)
    both = (chosen & chosen.roll(1, 1))[neighbours].float().mean()
    expect(abs(both - 0.25) < 0.05, "neighbouring words are chosen together: each has a die "
           "of its own")
    expect(chosen[:, 1:20].float().mean(0).std() < 0.2 and not all(
        torch.equal(row, chosen[0]) for row in chosen), "all texts have the same holes")
    expect(
        torch.equal(spoil_words(function, 0.5, 1)[1], chosen),
        "the same generator gives other holes: each draw needs generator=generator",
    )


untied_battery = Battery("untied", "untied(model) -> a copy with two tables", chapter=10,
                         takes=("model",))


@untied_battery.property("returns a copy whose second head has a table of its own")
def untied_copy(function):
    model = stub_model()
    before = tensors_of(model)
    table = model.classifier.embedding.token.weight
    copied = function.run(lambda: function.thing(model))
    expect(isinstance(copied, nn.Module), "it must return the model without a tie")
    expect(copied is not model, "the model itself is untied: work on copy.deepcopy(model)")
    expect(model.masked_head.decoder.weight is table, "the original is untied as well")
    expect(same(tensors_of(model), before), "the original's weights are changed")
    own = copied.masked_head.decoder.weight
    expect(
        own is not copied.classifier.embedding.token.weight,
        "the copy is still tied: deepcopy keeps what is shared shared. Give the decoder a "
        "new nn.Parameter",
    )
    expect(isinstance(own, nn.Parameter), "the new table is no Parameter: it would not learn")
    expect(own.data_ptr() != copied.classifier.embedding.token.weight.data_ptr(),
           "both Parameters share one memory: clone the numbers")
    count = sum(p.numel() for p in copied.parameters())
    wanted = sum(p.numel() for p in model.parameters()) + table.numel()
    expect(count == wanted, f"it must have vocab_size · d_model parameters more, {wanted}, "
           f"but it has {count}")
    expect(near(own, table), "the new table does not begin with the old numbers")


losses_battery = Battery(
    "two_losses", "two_losses(logits, labels, allowed) -> with slices, without", chapter=10,
    takes=("logits", "labels", "allowed"),
)


@losses_battery.property("gives the loss with slices, and the loss among all outputs")
def losses_equal(function):
    keep = ANSWERS >= 0
    logits, labels, allowed = OUTPUTS[keep], ANSWERS[keep], OPEN[keep]
    result = function(logits.clone(), labels.clone(), allowed.clone())
    expect(isinstance(result, (tuple, list)) and len(result) == 2, "it must return two losses")
    values = torch.tensor([float(v) for v in result])
    sliced = sliced_reference(logits, labels, allowed).mean()
    plain = F.cross_entropy(logits, labels)
    explain(
        values, torch.stack([sliced, plain]),
        [("the two losses are exchanged: first with slices",
          lambda: torch.stack([plain, sliced])),
         ("both are the loss with slices", lambda: torch.stack([sliced, sliced])),
         ("both are the loss without slices", lambda: torch.stack([plain, plain]))],
        "with slices each text may choose among its allowed outputs, without among all: "
        f"here {sliced:.3f} and {plain:.3f}",
    )


train_battery = Battery("train_at", "train_at(share, steps=120) -> loss, holes seen",
                        chapter=10, takes=("share", "steps"))


def trained(function, share, steps):
    """Call the reader's train_at for a few steps."""
    def call():
        with own_dice():
            return function.thing(share, steps)

    with unhurried():
        result = function.run(call)
    expect(isinstance(result, (tuple, list)) and len(result) == 2, "it must return two "
           "numbers: the loss at the holes of unseen posts, and how many holes were seen")
    return float(result[0]), int(result[1])


@train_battery.property("counts the holes, share by share")
def train_holes(function):
    low, high = trained(function, 0.1, 3), trained(function, 0.5, 3)
    twice = trained(function, 0.5, 6)
    expect(low[1] > 0, "no hole is counted: sum chosen in each step")
    expect(3.5 < high[1] / low[1] < 6.5, "five times the share must give about five times "
           f"the holes, but it gives {high[1] / low[1]:.1f} times: is share passed to corrupt, "
           "and are chosen places counted, not all [MASK] of one step?")
    expect(1.6 < twice[1] / high[1] < 2.4, "twice the steps must give about twice the holes: "
           "add them up over all steps")


@train_battery.property("measures every model on the same holes of unseen posts")
def train_measure(function):
    before, after = trained(function, 0.3, 1), trained(function, 0.3, 12)
    expect(math.isfinite(after[0]) and 1 < after[0] < 12, f"the loss is {after[0]:.2f}: it "
           "must be a mean over the holes, near ln of the vocabulary at the beginning")
    expect(after[0] < before[0], "after twelve steps the loss is no lower than after one: does "
           "the optimizer hold this model's parameters?")
    expect(trained(function, 0.3, 1) == before, "the same share and steps give another loss: "
           "begin with the same weights, and measure on the same holes, by seeds")


piece_battery = Battery("with_piece", "with_piece(mixture, name, dataset, keys) -> mixture",
                        chapter=10, takes=("mixture", "name", "dataset", "keys"))


@piece_battery.property("adds the piece at the end, without the held-out texts")
def piece_clean(function):
    pieces = three_pieces()
    before = dict(pieces)
    more = dataset_of(["kept one", "Held, OUT!", "kept two"], [0, 1, 1], ["n", "y"])
    grown = function.run(lambda: function.thing(pieces, "mine", more, {"held out"}))
    expect(isinstance(grown, dict), "it must return the mixture, a dict")
    expect(pieces == before, "the mixture that was given is changed: return a new dict, "
           "mixture | {name: …}")
    expect(list(grown) == [*before, "mine"], "the new piece must come last, after the others "
           "in their order, or the outputs of all pieces move")
    texts = list(grown["mine"]["text"])
    expect("Held, OUT!" not in texts, "a held-out text is still in it: comparison_key, in "
           "remove_held_out(dataset, keys)")
    expect(texts == ["kept one", "kept two"], "texts that are not held out are lost, or in "
           "another order")
    expect(list(grown["mine"]["label"]) == [0, 1], "texts and labels no longer fit")


@piece_battery.property("refuses a name that is there already")
def piece_refuses(function):
    refused(
        function, lambda: function.thing(three_pieces(), "mood", dataset_of(["a"]), set()),
        "a second piece of one name must be refused by a ValueError: it would replace the "
        "first in silence",
    )


eight_battery = Battery("to_eight_bits", "to_eight_bits(weight) -> numbers, scale", chapter=10,
                        takes=("weight",))


@eight_battery.property("gives whole numbers from -127 to 127 and a scale for each row")
def eight_equal(function):
    weight = sample(5, 9, seed=71) * torch.tensor([1e-3, 1.0, 40.0, 1.0, 0.0])[:, None]
    result = function(weight.clone())
    expect(isinstance(result, (tuple, list)) and len(result) == 2, "it must return two "
           "tensors, the whole numbers and the scales")
    numbers, scale = result
    expect_tensor(numbers, weight.shape, what="the numbers")
    expect(numbers.dtype == torch.int8, f"the numbers must be int8, or nothing is saved, but "
           f"they are {numbers.dtype}")
    expect_tensor(scale, (5, 1), what="the scale")
    expect(bool(scale.isfinite().all()), "a row of zeros gives a scale that is not finite")
    expect(int(numbers[:4].abs().max()) == 127 and int(numbers.min()) >= -127,
           "the largest number of a row must be 127: divide by its largest absolute value "
           "over 127. (128 does not fit into 8 bits, and would turn round to -128.)")
    right = weight.abs().amax(1, keepdim=True) / 127
    if not near(scale[:4], right[:4], 1e-4):
        raise Wrong(
            "one scale serves the whole matrix: a row of small numbers loses everything. "
            "Take the largest of each row, amax(dim=1, keepdim=True)"
            if near(scale[:4], right.max().expand(4, 1), 1e-4) else
            "the scale is not the row's largest absolute value divided by 127")
    again = numbers.float() * scale
    expect(
        bool(((again - weight).abs() <= right * 0.501 + 1e-9).all()),
        "numbers · scale is farther from the weight than half a step: round to the nearest "
        "whole number (.to(torch.int8) alone cuts off)",
    )


spans_battery = Battery(
    "corrupt_spans", "corrupt_spans(input_ids, share, longest, generator) -> spoilt, chosen",
    chapter=10, takes=("input_ids", "share", "longest", "generator"),
)


def spoil_spans(function, share=0.3, longest=4, seed=0):
    """Call the reader's corrupt_spans on a hundred texts."""
    given = IDS[:100].clone()
    result = function.run(lambda: function.thing(
        given, share, longest, torch.Generator().manual_seed(seed)))
    expect(isinstance(result, tuple) and len(result) == 2, "it must return two tensors, "
           "the spoilt ids and the mask of the chosen positions")
    expect(torch.equal(given, IDS[:100]), "the input itself is spoilt: it holds the answers")
    spoilt, chosen = result
    expect_tensor(spoilt, given.shape, torch.int64)
    expect_tensor(chosen, given.shape)
    expect(chosen.dtype == torch.bool, "the mask must be bool")
    return spoilt, chosen


def runs_of(chosen):
    """The lengths of all runs of neighbours that are chosen."""
    lengths = []
    for row in chosen.tolist():
        length = 0
        for at in [*row, False]:
            if at:
                length += 1
            elif length:
                lengths.append(length)
                length = 0
    return lengths


@spans_battery.property("masks runs of ordinary tokens, and nothing else")
def spans_masked(function):
    spoilt, chosen = spoil_spans(function)
    ids, ordinary = IDS[:100], ORDINARY[:100]
    expect(not chosen[~ordinary].any(), "special tokens are chosen: a run ends before them")
    expect(bool((spoilt[chosen] == MASK).all()), "a chosen token does not become [MASK]")
    expect(torch.equal(spoilt[~chosen], ids[~chosen]), "what was not chosen is changed")
    one = runs_of(spoil_spans(function, 0.1, 1)[1])
    mean, alone = sum(runs_of(chosen)) / len(runs_of(chosen)), sum(one) / len(one)
    expect(alone < 1.4, "with longest=1 there are runs of several tokens")
    expect(mean > 1.8, f"with longest=4 the runs have {mean:.1f} tokens on average: choose a "
           "start and a length, not each token on its own")


@spans_battery.property("chooses about share of each text, by the generator")
def spans_share(function):
    for share in (0.15, 0.5):
        chosen = spoil_spans(function, share)[1]
        rates = chosen.sum(1) / ORDINARY[:100].sum(1)
        expect(
            abs(rates.mean() - share) < 0.06 and rates.max() < share + 0.12,
            f"with share={share:g} {rates.mean():.0%} of a text are chosen on average, and at "
            f"most {rates.max():.0%}: go on until share of its ordinary tokens is chosen, "
            "counting overlaps once, and don't shoot far past it",
        )
    again = spoil_spans(function, 0.5)[1]
    expect(torch.equal(again, chosen), "the same generator gives other holes: draw with it "
           "alone")
    expect(not torch.equal(spoil_spans(function, 0.5, seed=1)[1], chosen), "another generator "
           "gives the same holes")
    expect(not any(torch.equal(chosen[0], row) for row in chosen[1:]), "texts have the same "
           "holes")
