"""Checks for chapter 08: loss, step, schedule, what is left to chance, files, loop."""

import contextlib
import copy
import dataclasses
import functools
import importlib
import io
import json
import math
import os
import pickle
import random
import tempfile
import traceback
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from .bench import (
    Battery,
    Broke,
    Skip,
    Wrong,
    expect,
    expect_tensor,
    explain,
    near,
    sample,
    unhurried,
)

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
PAD, UNK, CLS, SEP, MASK = range(5)


# What all of them use


def ready(*modules):
    """Import what takes long, outside the time that the reader's code is given."""
    with unhurried():
        for name in modules:
            importlib.import_module(name)
        torch.zeros(1).to("meta").logsumexp(0)  # the first such sum imports much
        return torch.optim.AdamW([torch.zeros(1, requires_grad=True)])


def lean(subject, function, *arguments, **named):
    """Call the reader's code where it calls their code of other chapters.

    What is not written there yet is no failure here.
    """
    try:
        return subject.run(function, *arguments, **named)
    except Broke:
        error = subject.last_error
        if isinstance(error, NotImplementedError):
            frames = traceback.extract_tb(error.__traceback__)
            inner = frames[-1].name
            own = getattr(subject.thing, "__name__", "")
            if inner not in (own, "__init__", "__call__", "cut"):
                raise Skip(
                    f"it calls {inner}, which is not written yet: that comes first"
                ) from None
        raise


def book(module, name, chapter):
    """Something of the chapters' code, where nothing can stand in for it."""
    try:
        return getattr(importlib.import_module(f"emoformer.{module}"), name)
    except (ImportError, AttributeError, NotImplementedError):
        raise Skip(f"needs {name} of chapter {chapter:02}") from None


def must_refuse(subject, kind, hint, function, *arguments, **named):
    """Refuse code that takes what it must not take, or breaks by accident."""
    kinds = (kind, AssertionError) if kind is ValueError else (kind,)
    try:
        result = lean(subject, function, *arguments, **named)
    except Broke as broke:
        if isinstance(subject.last_error, kinds):
            return
        raise Wrong(
            f"{hint}. It must be a {kind.__name__} that says so, but it {broke}"
        ) from None
    if hasattr(result, "__next__"):
        return must_refuse(subject, kind, hint, list, result)
    raise Wrong(f"{hint}. It must raise a {kind.__name__}, but it raises nothing")


def dice():
    """The state of all global dice."""
    return (random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist())


@contextlib.contextmanager
def own_dice():
    """Refuse code that rolls dice that belong to everyone."""
    before = dice()
    yield
    rolled = [
        name for name, a, b in zip(
            ("random", "numpy", "torch"), before, dice(), strict=True
        ) if a != b
    ]
    if rolled:
        raise Wrong(
            f"it rolls or seeds the global dice of {rolled[0]}: then a resumed run "
            "meets other batches, and everything else that is random goes another way. "
            "Draw from the generator that is passed in, or make one of its own with the "
            "seed: random.Random(seed), torch.Generator().manual_seed(seed)"
        )


def expect_number(value, what):
    """Refuse what is no plain number."""
    expect(value is not None, f"{what} is None: is there a return at the end?")
    expect(
        isinstance(value, (int, float)) and not isinstance(value, bool),
        f"{what} must be a plain float, but it is a {type(value).__name__}"
        + (": end with .item()" if isinstance(value, torch.Tensor) else ""),
    )


@dataclasses.dataclass(frozen=True)
class Shape:
    """The fields of a model's config; nothing here looks at most of them."""

    vocab_size: int = 40
    d_model: int = 6
    num_heads: int = 2
    num_layers: int = 1
    d_ff: int = 8
    max_len: int = 12
    num_labels: int = 3
    dropout: float = 0.0
    positions: str = "learned"
    num_segments: int = 0
    norm_first: bool = False
    pooling: str = "mean"
    layer_norm_eps: float = 1e-12


class Stub(nn.Module):
    """A small model with a classifier's face, which remembers how it was called."""

    def __init__(self, shape=None, seed=0, answer=None):
        super().__init__()
        self.config = shape or Shape()
        size = self.config.d_model
        self.embedding = nn.Embedding(self.config.vocab_size, size)
        self.norm = nn.LayerNorm(size)
        self.dropout = nn.Dropout(self.config.dropout)
        self.head = nn.Linear(size, self.config.num_labels)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator))
        self.answer, self.calls = answer, []

    def forward(self, input_ids, attention_mask=None):
        kind = input_ids.device.type
        self.calls.append(SimpleNamespace(
            training=self.training, grad=torch.is_grad_enabled(), ids=input_ids.clone(),
            half=torch.is_autocast_enabled(kind), masked=attention_mask is not None,
        ))
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids, dtype=torch.bool)
        real = attention_mask[:, :, None].float()
        mean = (self.embedding(input_ids) * real).sum(1) / real.sum(1).clamp_min(1)
        logits = self.head(self.dropout(self.norm(mean)))
        return logits if self.answer is None else self.answer(logits)

    def __deepcopy__(self, memo):
        new = type(self)(self.config, answer=self.answer)
        new.load_state_dict(self.state_dict())
        return new.train(self.training)


MERGES = [
    ("##f", "##g"), ("a", "##b"), ("##c", "##d"), ("ab", "##cd"), ("##b", "##c"),
    ("e", "##f"), ("##fg", "##h"), ("e", "##fgh"), ("b", "##a"),
]


def tiny_tokenizer(kind="bpe"):
    """A tokenizer of the letters a to h, made by hand."""
    tokens = [*SPECIAL, *"abcdefgh", *("##" + c for c in "abcdefgh")]
    tokens += [a + b.removeprefix("##") for a, b in MERGES]
    vocab = {token: i for i, token in enumerate(tokens)}
    if kind == "bpe":
        model = models.BPE(
            vocab, MERGES, unk_token="[UNK]", continuing_subword_prefix="##",
            fuse_unk=True,
        )
    else:
        model = models.WordPiece(vocab, unk_token="[UNK]")
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)],
    )
    return tokenizer


def ids_of(tokenizer, texts, max_len):
    """What a tokenizer gives, cut off at the end but for its [SEP]."""
    rows = [tokenizer.encode(text).ids for text in texts]
    return [r if len(r) <= max_len else r[: max_len - 1] + [SEP] for r in rows]


TEXTS = [
    "abcd efgh", "a", "ABCD bad cab", "", "ab zz abz zyab !", "efgh dead beef " * 4,
    "hfgc", "face bee", "b b b b b",
]


# cross_entropy

loss_battery = Battery(
    "cross_entropy", "cross_entropy(logits, labels, class_weights=None) -> a scalar",
    chapter=8, takes=("logits", "labels", "class_weights"),
)
LOGITS = 2 * sample(7, 4, seed=81)
LABELS = torch.tensor([2, 0, 3, 2, 1, 0, 2])
CLASS_WEIGHTS = torch.tensor([1.0, 0.5, 3.0, 2.0])


def loss_of(function, logits, labels, *weights):
    """Call the reader's loss; expect one number in a tensor."""
    loss = function(logits, labels, *weights)
    if isinstance(loss, (float, int, np.floating)):
        raise Wrong(
            "the loss is a plain number, from which no gradient flows back: return the "
            "tensor, and let the caller print .item()"
        )
    expect_tensor(loss, what="the loss")
    if loss.shape == logits.shape[:1]:
        raise Wrong("it gives one loss a text: the mean over the batch is missing")
    expect_tensor(loss, (), what="the loss, one number,")
    return loss


def loss_causes(logits, labels, weights=None):
    """What wrong losses give."""
    n, k = logits.shape
    logs, p = logits.log_softmax(-1), logits.softmax(-1)
    w = torch.ones(n).to(logits) if weights is None else weights[labels].to(logits)
    hot = F.one_hot(labels, k).to(logits)

    def pick(table):
        return table.gather(1, labels[:, None])[:, 0]

    def mean(each):
        return (w * each).sum() / w.sum()

    causes = [
        ("the softmax is taken twice: probabilities are given to something that takes "
         "logits", lambda: mean(-pick(p.log_softmax(-1)))),
        ("the losses are added up, not averaged: with larger batches the steps would "
         "grow", lambda: (w * -pick(logs)).sum()),
        ("the sign is wrong: it must be minus the logarithm, else training makes the "
         "right label less likely", lambda: mean(pick(logs))),
        ("the logarithm is missing: this is (minus) the mean probability of the right "
         "label", lambda: mean(-pick(p))),
        ("the logarithm is missing: this is the mean probability of the right label",
         lambda: mean(pick(p))),
        ("the logarithm is missing: this is one minus the probability of the right label",
         lambda: mean(1 - pick(p))),
        ("the softmax runs over the texts of the batch (dim=0): it must run over the "
         "classes, the last axis", lambda: mean(-pick(logits.log_softmax(0)))),
        ("it normalises over the whole batch at once: logsumexp must run over the "
         "classes of each text, dim=-1, keepdim=True",
         lambda: mean(-pick(logits - logits.logsumexp((0, 1))))),
        ("nothing is normalised: this is the mean of the right logits; the logsumexp of "
         "all logits of a text must be taken off",
         lambda: mean(-pick(logits))),
        ("the mean runs over texts and classes: average over the batch alone, the label "
         "picks one class a text", lambda: mean(-pick(logs)) / k),
        ("every class's surprise counts, not that of the right label alone: labels are "
         "not used", lambda: (-logs).mean()),
        ("indexing by [:, labels] takes all labels of the batch for every text: pick one "
         "a text, with gather or with a pair of index tensors",
         lambda: (-logs[:, labels]).mean()),
        ("it indexes whole rows by the labels: the label picks a column, one in each row "
         "(gather along dim 1)", lambda: (-logs[labels]).mean()),
        ("logarithm to base 2: the book counts in nats, by the natural logarithm",
         lambda: mean(-pick(logs)) / math.log(2)),
        ("logarithm to base 10: the book counts in nats, by the natural logarithm",
         lambda: mean(-pick(logs)) / math.log(10)),
        ("the mean is taken before the logarithm: it must be the mean of the "
         "logarithms", lambda: -mean(pick(p)).log()),
        ("each class is judged on its own by a sigmoid (binary cross-entropy): here one "
         "label is right, and classes compete through a softmax",
         lambda: F.binary_cross_entropy_with_logits(logits, hot)),
        ("each class is judged on its own by a sigmoid: classes must compete through a "
         "softmax", lambda: mean(-pick(logits.sigmoid().log()))),
        ("the wrong classes count as well, by log(1 - p): the cross-entropy of one right "
         "label is minus the logarithm of its probability alone",
         lambda: F.binary_cross_entropy(p, hot)),
        ("the wrong classes count as well, by log(1 - p): the cross-entropy of one right "
         "label is minus the logarithm of its probability alone",
         lambda: F.binary_cross_entropy(p, hot, reduction="sum") / n),
        ("this is the squared distance to the truth, not its cross-entropy",
         lambda: F.mse_loss(p, hot)),
        ("this is the squared distance to the truth, not its cross-entropy",
         lambda: (p - hot).square().sum(-1).mean()),
        ("this is the squared distance to the truth, not its cross-entropy",
         lambda: F.mse_loss(logits, hot)),
        ("it measures the class that the model would choose (argmax), not the right one",
         lambda: -logs.max(-1).values.mean()),
        ("this is the model's own entropy: labels are not used",
         lambda: -(p * logs).sum(-1).mean()),
        ("labels are shifted by one: class 0 is the first column",
         lambda: mean(-pick(logs.roll(1, 1)))),
        ("labels are shifted by one: class 0 is the first column",
         lambda: mean(-pick(logs.roll(-1, 1)))),
        ("the exponential of the loss is returned (the perplexity)",
         lambda: mean(-pick(logs)).exp()),
        ("only the first text of the batch is looked at", lambda: -logs[0, labels[0]]),
        ("only the last text of the batch is looked at", lambda: -logs[-1, labels[-1]]),
        ("the largest loss of the batch is taken, not the mean",
         lambda: (-pick(logs)).max()),
        ("the median of the batch is taken, not the mean",
         lambda: (-pick(logs)).median()),
        ("the sum is divided by one less than the number of texts",
         lambda: (-pick(logs)).sum() / (n - 1)),
        ("the labels are smoothed by 0.1: the truth is 1 for the right class here",
         lambda: F.cross_entropy(logits, labels, label_smoothing=0.1)),
        ("sure texts count less (a focal loss): here each text counts the same",
         lambda: ((1 - pick(p)).square() * -pick(logs)).mean()),
        ("the label's logit is left out of the logsumexp: the sum runs over all classes",
         lambda: mean(logits.masked_fill(hot.bool(), -math.inf).logsumexp(-1)
                      - pick(logits))),
        ("the probabilities are cut off or moved by a small number: subtract the "
         "logsumexp instead of taking log(p + eps)",
         lambda: mean(-(pick(p) + 1e-3).log())),
    ]
    if weights is None:
        return causes
    plain = -pick(logs)
    return [
        ("the class weights are not used", lambda: plain.mean()),
        ("the weighted sum is divided by the number of texts: divide by the sum of the "
         "weights of the batch, or rare classes change the size of the steps",
         lambda: (w * plain).mean()),
        ("the weighted sum is not divided by anything", lambda: (w * plain).sum()),
        ("the weighted sum is divided by the sum of the weights of all classes: divide "
         "by the sum over the texts of the batch",
         lambda: (w * plain).sum() / weights.sum()),
        ("the weighted sum is divided by the number of classes",
         lambda: (w * plain).sum() / k),
        ("the weights are inverted: a larger weight must count more",
         lambda: (plain / w).sum() / (1 / w).sum()),
        ("the weights are inverted: a larger weight must count more",
         lambda: (plain / w).mean()),
        ("the weights are taken in the order of the texts: index them by the labels",
         lambda: (weights.repeat(n)[:n] * plain).sum() / weights.repeat(n)[:n].sum()),
        ("the weights belong to the class that the model would choose: index them by the "
         "labels", lambda: (weights[logits.argmax(-1)] * plain).sum()
         / weights[logits.argmax(-1)].sum()),
        ("the weights multiply the logits: they must multiply each text's loss",
         lambda: F.cross_entropy(logits * weights, labels)),
        ("the weights multiply the probabilities: they must multiply each text's loss",
         lambda: mean(-pick((p * weights).log())) * w.sum() / n),
        ("the weights multiply the probabilities: they must multiply each text's loss",
         lambda: -pick((p * weights).log()).mean()),
        ("the weights are squared, or applied twice",
         lambda: (w * w * plain).sum() / w.sum()),
        ("the weights are squared, or applied twice",
         lambda: (w * w * plain).sum() / (w * w).sum()),
        ("the weighted sum is divided twice: by the weights and by the batch",
         lambda: (w * plain).sum() / w.sum() / n),
        ("the mean of the losses is multiplied by the mean weight: each text's loss must "
         "be multiplied by its own", lambda: plain.mean() * w.mean()),
        ("the weights are put through a softmax first",
         lambda: F.cross_entropy(logits, labels, weights.softmax(-1).to(logits))),
        *causes,
    ]


@loss_battery.property("is the mean of -log p at the right labels")
def loss_plain(function):
    explain(
        loss_of(function, LOGITS.clone(), LABELS.clone()),
        F.cross_entropy(LOGITS, LABELS), loss_causes(LOGITS, LABELS),
        "it is not the mean over the batch of logsumexp(logits) - logit of the right "
        "label. Try one text of three classes by hand: logits 2, 1, 0 and label 1 give "
        "1.408",
    )
    one = loss_of(function, LOGITS[:1].clone(), LABELS[:1].clone())
    expect(
        near(one, F.cross_entropy(LOGITS[:1], LABELS[:1])),
        "a batch of one text gives another loss than it must: look for a squeeze() "
        "without an axis, or a division by the batch size minus one",
    )
    square = LOGITS[:4]
    expect(
        near(loss_of(function, square.clone(), LABELS[:4].clone()),
             F.cross_entropy(square, LABELS[:4])),
        "it goes wrong where there are as many texts as classes: axes are mixed up",
    )


@loss_battery.property("weighs each class, and divides by the weights")
def loss_weighted(function):
    wanted = F.cross_entropy(LOGITS, LABELS, CLASS_WEIGHTS)
    good = near(function(LOGITS.clone(), LABELS.clone()), F.cross_entropy(LOGITS, LABELS))
    explain(
        loss_of(function, LOGITS.clone(), LABELS.clone(), CLASS_WEIGHTS.clone()), wanted,
        loss_causes(LOGITS, LABELS, CLASS_WEIGHTS),
        "with class weights it is not the weighted mean: each text's loss times the "
        "weight of its class, divided by the sum of those weights" if good else
        "the comparison without weights fails as well; mend that first",
    )
    same = loss_of(function, LOGITS.clone(), LABELS.clone(), torch.full((4,), 3.0))
    expect(
        near(same, F.cross_entropy(LOGITS, LABELS)),
        "weights that are all alike must change nothing, whatever their size",
    )


@loss_battery.property("does not overflow, and does not cut losses off")
def loss_large(function):
    logits = torch.tensor([[1e4, -1e4, 0.0], [300.0, 0.0, 299.0]]).requires_grad_()
    labels = torch.tensor([1, 1])
    loss = loss_of(function, logits, labels)
    wanted = F.cross_entropy(logits, labels).detach()
    if not near(loss, wanted, 1e-4):
        raise Wrong(
            "logits of 10,000 overflow: e^10000 is infinite, and the logarithm of a "
            "probability that was rounded to 0 too. Never go through the probabilities: "
            "logits - logits.logsumexp(…), which takes the largest off first"
            if not loss.isfinite() else
            f"a sure and wrong answer must cost {wanted:.0f} here, but it costs "
            f"{loss.item():.1f}: a small number added to p, or a clamp, puts an upper end "
            "on the loss, and there its gradient vanishes. Subtract the logsumexp"
        )
    small = torch.tensor([[-1e4, -1e4 + 1]])
    expect(
        near(loss_of(function, small, torch.tensor([0])),
             F.cross_entropy(small, torch.tensor([0])), 1e-4),
        "logits of -10,000 go wrong: e^-10000 is rounded to 0. Take the largest logit of "
        "each text off first (logsumexp does)",
    )
    loss.backward()
    expect(
        logits.grad is not None and bool(logits.grad.isfinite().all()),
        "for large logits the loss is right, but its gradient is NaN or infinite: "
        "repairing values afterwards does not repair the way back",
    )


@loss_battery.property("its gradient is belief minus truth")
def loss_gradient(function):
    for weights in ((), (CLASS_WEIGHTS.double(),)):
        logits = LOGITS.double().requires_grad_()
        loss = loss_of(function, logits, LABELS.clone(), *weights)
        expect(
            loss.requires_grad,
            "no gradient flows back, so nothing can be learned: look for .detach(), "
            ".item(), .data, argmax, torch.tensor(…) around a result, or "
            "torch.no_grad()",
        )
        mine, = torch.autograd.grad(loss, logits)
        again = LOGITS.double().requires_grad_()
        wanted, = torch.autograd.grad(
            F.cross_entropy(again, LABELS, *weights), again
        )
        expect(
            near(mine, wanted, 1e-6),
            "the gradient is not (probability - truth) / batch: part of the way back is "
            "cut off (the logsumexp must not be detached), or the loss itself is wrong",
        )


@loss_battery.property("keeps the dtype of the logits")
def loss_dtype(function):
    loss = loss_of(function, LOGITS.double(), LABELS.clone())
    expect_tensor(loss, (), torch.float64, "the loss")
    ordinary = LABELS.clone()
    loss_of(function, LOGITS.clone(), ordinary)
    ready()
    try:
        function(LOGITS.to("meta"), LABELS.to("meta"))
    except Broke as broke:
        if "device" in str(broke) and "item" not in str(broke):
            raise Wrong(
                "a tensor is made on the CPU whatever device the logits are on: make it "
                f"with device=logits.device. It {broke}"
            ) from None


# parameter_groups

groups_battery = Battery(
    "parameter_groups", "parameter_groups(model, weight_decay) -> two groups for AdamW",
    chapter=8, takes=("model", "weight_decay"),
)


class _Gain(nn.Module):
    """A norm whose name does not say so, as a reader's own may be."""

    def __init__(self, size):
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(size)), nn.Parameter(torch.zeros(size))


class _Parts(nn.Module):
    """Every kind of parameter that a model of the book, or a reader's, has."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(9, 4)
        self.query = nn.Linear(4, 4)
        self.heads = nn.Parameter(torch.ones(2, 4, 2))  # (heads, d_model, d_head)
        self.attention_norm = nn.LayerNorm(4)
        self.gain = _Gain(4)
        self.temperature = nn.Parameter(torch.tensor(1.0))
        self.output = nn.Linear(4, 9)
        self.output.weight = self.embedding.weight  # tied: one parameter, two names


def groups_of(function, model, decay):
    """Call the reader's function; expect groups, and lists in them."""
    groups = function(model, decay)
    expect(groups is not None, "it gives None: is there a return at the end?")
    expect(
        isinstance(groups, (list, tuple)) and all(isinstance(g, dict) for g in groups),
        'it must give a list of dicts, {"params": […], "weight_decay": …}: the form '
        f"that torch.optim takes; it gives {type(groups).__name__}",
    )
    for group in groups:
        expect("params" in group, 'a group lacks "params"')
    groups = [group | {"params": list(group["params"])} for group in groups]
    for p in (p for group in groups for p in group["params"]):
        expect(
            isinstance(p, torch.Tensor),
            f"params must hold the parameters themselves, not {type(p).__name__}s: "
            "named_parameters() gives pairs of a name and a parameter",
        )
    return groups


@groups_battery.property("holds every parameter once")
def groups_once(function):
    model = _Parts()
    names = {id(p): name for name, p in model.named_parameters()}
    groups = groups_of(function, model, 0.1)
    held = [p for group in groups for p in group["params"]]
    strange = [p for p in held if id(p) not in names]
    expect(
        not strange,
        "a group holds tensors that are no parameters of the model, such as copies: the "
        "optimizer would move those, and the model would stay as it is. Look for "
        ".clone(), .data, .detach(), or a model made anew",
    )
    count = Counter(id(p) for p in held)
    lost = [name for i, name in names.items() if i not in count]
    expect(
        not lost,
        f"in no group, so they would never learn: {', '.join(lost)}. What is not in the "
        "one group must be in the other: ask one question (p.ndim >= 2) and its opposite",
    )
    double = [names[i] for i, c in count.items() if c > 1]
    tied = double == ["embedding.weight"]
    expect(
        not double,
        "a parameter with two names (tied weights) stands in the groups twice: "
        "model.parameters() gives each once, state_dict() and walking through modules "
        "do not" if tied else
        f"in more than one group, or twice in one: {', '.join(double)}. The optimizer "
        "would refuse it or move it twice",
    )


@groups_battery.property("decays matrices, and neither biases nor norms")
def groups_decay(function):
    model = _Parts()
    names = {id(p): name for name, p in model.named_parameters()}
    matrices = {n for n, p in model.named_parameters() if p.ndim >= 2}
    groups = groups_of(function, model, 0.1)
    for group in groups:
        expect(
            "weight_decay" in group,
            "a group says nothing of weight_decay: AdamW's default, 0.01, then holds for "
            'it. Write "weight_decay": 0.0',
        )
    decayed = {
        names.get(id(p)) for g in groups if g["weight_decay"] for p in g["params"]
    }
    everything = set(names.values())
    vectors = everything - matrices
    biases = {n for n in vectors if n.endswith("bias")}
    norms = {n for n in vectors if "norm" in n}
    for hint, wrong in (
        ("the two are mixed up: biases and norms are decayed, matrices are not", vectors),
        ("everything is decayed: biases and norms must have weight_decay 0", everything),
        ("nothing is decayed: the matrices' group needs weight_decay", set()),
        ("norms are decayed: only biases are left out. A norm's weight is a vector too, "
         "and pulling it to 0 changes what the layer computes", everything - biases),
        ("biases are decayed: only norms are left out", everything - norms),
        ("biases are decayed: only norms are left out", everything - norms
         - {"gain.scale", "gain.shift"}),
        ("parameters are told apart by their names, so that a norm that is called "
         "something else is decayed: a vector can be told by p.ndim < 2",
         everything - biases - norms),
        ("parameters are told apart by their names or by their layers' classes, so that "
         "a norm of the reader's own is decayed: a vector can be told by p.ndim < 2",
         everything - biases - norms - {"temperature"}),
        ("embeddings are not decayed: every matrix is", matrices - {"embedding.weight"}),
        ("only matrices of exactly two axes are decayed: ask for p.ndim >= 2",
         matrices - {"heads"}),
        ("only what is called weight is decayed, norms' weights included: ask for "
         "p.ndim >= 2", {n for n in everything if n.endswith("weight")}),
        ("only what is called weight is decayed: ask for p.ndim >= 2",
         {n for n in matrices if n.endswith("weight")}),
        ("only the weights of Linear layers are decayed: every matrix is",
         {"query.weight"}),
        ("a single number (p.ndim == 0) is decayed", matrices | {"temperature"}),
        ("vectors are decayed and single numbers are not: ask for p.ndim >= 2",
         everything - {"temperature"}),
    ):
        expect(decayed != wrong, hint)
    missing, extra = sorted(matrices - decayed), sorted(decayed - matrices)
    expect(not extra, f"decayed, although a vector: {', '.join(extra)}")
    expect(not missing, f"not decayed, although a matrix: {', '.join(missing)}")


@groups_battery.property("takes the decay it is given, and none is 0")
def groups_values(function):
    for decay in (0.25, 0.0):
        groups = groups_of(function, _Parts(), decay)
        expect(
            len(groups) == 2,
            f"it must give two groups, matrices and the rest, but it gives {len(groups)}",
        )
        values = sorted(float(g.get("weight_decay", 0.01)) for g in groups)
        expect(
            values[-1] == decay,
            f"with weight_decay={decay} the matrices get {values[-1]}: the argument is "
            "not used" if values[-1] in (0.01, 0.1, 0.25) else
            f"with weight_decay={decay} the matrices get {values[-1]}",
        )
        expect(values[0] == 0.0, f"biases and norms must get 0.0, but they get {values[0]}")


@groups_battery.property("fits torch.optim.AdamW")
def groups_optimizer(function):
    ready()
    model = nn.Linear(3, 2)
    groups = function(model, 0.1)
    try:
        optimizer = torch.optim.AdamW(groups, lr=0.1)
    except Exception as error:
        raise Wrong(f"AdamW refuses the groups: {error}") from None
    held = sum(len(g["params"]) for g in optimizer.param_groups)
    expect(
        held == 2,
        f"a Linear layer has two parameters, but AdamW finds {held} in the groups: a "
        "generator can be read only once; make lists",
    )
    expect(
        all(g["lr"] == 0.1 for g in optimizer.param_groups),
        "a group has a learning rate of its own: the run's decides that",
    )


# learning_rate_factor

rate_battery = Battery(
    "learning_rate_factor",
    "learning_rate_factor(step, *, warmup, total) -> float in [0, 1]",
    chapter=8, takes=("step", "warmup", "total"),
)


def rate(step, warmup, total):
    """Up in a line, then down."""
    if step < warmup:
        return (step + 1) / warmup
    return max(0.0, (total - step) / max(1, total - warmup))


RATES = [
    ("the first step has the rate 0 and is wasted: up to step 0 no step is done, and "
     "the rate must already be one part of the way up, (step + 1) / warmup",
     lambda s, w, t: s / w if s < w else (t - s) / (t - w)),
    ("the warm-up is one step late: the last of its steps, number warmup - 1, must have "
     "the full rate. Look for + 1 in the numbers below the line",
     lambda s, w, t: (s + 1) / (w + 1) if s < w else (t - s) / (t - w)),
    ("there is no warm-up: it falls from the first step", lambda s, w, t: (t - s) / t),
    ("it does not fall after the warm-up", lambda s, w, t: min(1, (s + 1) / w)),
    ("it does not fall after the warm-up", lambda s, w, t: min(1, s / w)),
    ("it is always 1: there is neither warm-up nor decay", lambda s, w, t: 1.0),
    ("after the warm-up it jumps down: it falls as if from step 0. Divide by the steps "
     "that are left after the warm-up, total - warmup",
     lambda s, w, t: (s + 1) / w if s < w else (t - s) / t),
    ("after the warm-up it starts above 1: the steps left are divided by total - warmup "
     "only where step counts from the end of the warm-up",
     lambda s, w, t: (s + 1) / w if s < w else 1 - s / t),
    ("it does not end at 0: after the warm-up, the steps done since are divided by the "
     "whole run", lambda s, w, t: (s + 1) / w if s < w else 1 - (s - w) / t),
    ("it ends before the run does: at the last step, total - 1, something must be left",
     lambda s, w, t: (s + 1) / w if s < w else (t - s - 1) / (t - w)),
    ("it ends before the run does: at the last step, total - 1, something must be left",
     lambda s, w, t: (s + 1) / w if s < w else (t - 1 - s) / (t - 1 - w)),
    ("it falls along a cosine: here it falls in a line",
     lambda s, w, t: (s + 1) / w if s < w
     else 0.5 * (1 + math.cos(math.pi * (s - w) / (t - w)))),
    ("it falls with the root of the step, as in the first Transformer: here it falls in "
     "a line to 0", lambda s, w, t: min((s + 1) / w, (w / (s + 1)) ** 0.5)),
    ("it falls with the root of the step, as in the first Transformer: here it falls in "
     "a line to 0", lambda s, w, t: (s + 1) / w if s < w else (w / max(s, 1)) ** 0.5),
    ("it falls along a root: here it falls in a line",
     lambda s, w, t: (s + 1) / w if s < w else ((t - s) / (t - w)) ** 0.5),
    ("it falls along a parabola: here it falls in a line",
     lambda s, w, t: (s + 1) / w if s < w else ((t - s) / (t - w)) ** 2),
    ("it does not end at 0: a tenth is left. Here it falls to 0",
     lambda s, w, t: (s + 1) / w if s < w else max(0.1, (t - s) / (t - w))),
    ("the warm-up is one step early: its first step has 1 / warmup",
     lambda s, w, t: min(1, (s + 2) / w) if s < w else (t - s) / (t - w)),
    ("it rises again after the warm-up: look at the sign of the way down",
     lambda s, w, t: (s + 1) / w if s < w else (s - w) / (t - w)),
    ("it is whole numbers only: // divides and throws the rest away, / does not",
     lambda s, w, t: (s + 1) // w if s < w else (t - s) // (t - w)),
    ("it falls geometrically: here it falls in a line",
     lambda s, w, t: (s + 1) / w if s < w else 0.9 ** (s - w)),
    ("warmup is taken for a share of the run, but it is a number of steps",
     lambda s, w, t: (s + 1) / (w * t) if s < w * t else (t - s) / (t - w * t)),
    ("the warm-up is a parabola: here it rises in a line",
     lambda s, w, t: ((s + 1) / w) ** 2 if s < w else (t - s) / (t - w)),
    ("rise and fall are multiplied: after the warm-up the fall starts from 1",
     lambda s, w, t: min(1, (s + 1) / w) * (t - s) / t),
    ("it stays at 1 for one step too many after the warm-up",
     lambda s, w, t: min(1, (s + 1) / w) if s <= w else (t - s) / (t - w)),
    ("warmup and total are mixed up",
     lambda s, w, t: (s + 1) / t if s < t else 0.0),
    ("it falls first and rises afterwards",
     lambda s, w, t: 1 - (s + 1) / w if s < w else 1 - (t - s) / (t - w)),
]


def rates_of(function, warmup, total):
    """All rates of a run, last step first: it must not count by itself."""
    values = []
    for step in [*reversed(range(total + 1)), total // 2]:
        try:
            value = function(step, warmup=warmup, total=total)
        except Broke:
            if isinstance(function.last_error, ZeroDivisionError):
                raise Wrong(
                    f"it divides by zero at step {step} with warmup={warmup} and "
                    f"total={total}: "
                    + ("without a warm-up there is no way up; test for step < warmup "
                       "before dividing by it" if warmup == 0 else
                       "where the whole run is warm-up there is no way down; guard the "
                       "division by max(1, …)")
                ) from None
            raise
        if isinstance(value, (torch.Tensor, np.generic)) and getattr(value, "ndim", 0) == 0:
            value = value.item()
        expect_number(value, "the factor")
        values.append(float(value))
    again = values.pop()
    expect(
        again == values[::-1][total // 2],
        "the same step gets another factor the second time: it counts by itself. It must "
        "follow from step, warmup and total alone",
    )
    return torch.tensor(values[::-1], dtype=torch.float64)


@rate_battery.property("rises in a line, then falls in a line to 0")
def rate_plain(function):
    for warmup, total in ((4, 14), (3, 20), (5, 6)):
        mine = rates_of(function, warmup, total)
        wanted = torch.tensor(
            [rate(s, warmup, total) for s in range(total + 1)], dtype=torch.float64
        )
        causes = [
            (hint, lambda f=f, w=warmup, t=total: torch.tensor(
                [float(f(s, w, t)) for s in range(t + 1)], dtype=torch.float64))
            for hint, f in RATES
        ]
        causes += [(hint, lambda f=f: f().clamp(0, 1)) for hint, f in causes]
        shown = ", ".join(f"{value:.2f}" for value in mine.tolist())
        explain(
            mine, wanted, causes,
            f"with warmup={warmup} and total={total} it gives {shown}; wanted is "
            f"{', '.join(f'{v:.2f}' for v in wanted.tolist())}", 1e-9,
        )


@rate_battery.property("takes no warm-up, and nothing but warm-up")
def rate_edges(function):
    for warmup, total, otherwise in (
        (0, 10, "without a warm-up it must start at 1 and fall to 0"),
        (10, 10, "where the whole run is warm-up it must rise to 1 and be 0 after it"),
        (0, 1, "a run of one step without warm-up must take it at the full rate"),
        (1, 1, "a run of one step, a warm-up, must take it at the full rate"),
        (1, 8, "with a warm-up of one step, the first step has the full rate already"),
    ):
        mine = rates_of(function, warmup, total)
        wanted = torch.tensor(
            [rate(s, warmup, total) for s in range(total + 1)], dtype=torch.float64
        )
        expect(
            near(mine[:-1], wanted[:-1], 1e-9),
            otherwise + "; it gives " + ", ".join(f"{v:.2f}" for v in mine.tolist()),
        )
        expect(
            abs(mine[-1]) < 1e-9,
            f"after the last step it must be 0, but with warmup={warmup} and "
            f"total={total} it is {mine[-1]:.2f}",
        )


@rate_battery.property("stays in [0, 1]")
def rate_range(function):
    for warmup, total in ((0, 7), (1, 7), (6, 7), (7, 7), (100, 1000)):
        mine = rates_of(function, warmup, total)
        expect(
            bool((mine >= 0).all()),
            f"it becomes negative ({mine.min():.2f} with warmup={warmup}, total={total}): "
            "the model would climb the loss. Guard it with max(0.0, …)",
        )
        expect(
            bool((mine <= 1 + 1e-12).all()),
            f"it exceeds 1 ({mine.max():.2f} with warmup={warmup}, total={total})",
        )


# choose_precision

precision_battery = Battery(
    "choose_precision", 'choose_precision(wish="auto") -> "bf16" or "no"', chapter=8,
    takes=("wish",),
)


@contextlib.contextmanager
def machine(cpu=(), gpu=None, seen=None):
    """Pretend to be another machine."""
    asked = [] if seen is None else seen

    def capabilities():
        asked.append("cpu")
        return {"avx2": True, "avx512_f": True, "amx_tile": True, "avx512_bf16": False,
                "amx_bf16": False, **dict.fromkeys(cpu, True)}

    with mock.patch.multiple(
        torch.cuda, is_available=lambda: gpu is not None,
        is_bf16_supported=lambda *_, **__: gpu == "new",
        get_device_capability=lambda *_: (8, 0) if gpu == "new" else (7, 0),
    ), mock.patch.object(torch.cpu, "get_capabilities", capabilities):
        yield asked


@precision_battery.property("grants a wish")
def precision_wish(function):
    for wish in ("bf16", "no"):
        for cpu in ((), ("avx512_bf16",)):
            with machine(cpu):
                got = function(wish)
            expect(got is not None, "it gives None: is there a return on every way out?")
            expect(
                got == wish,
                f"{wish!r} is wished for, but it gives {got!r}: only \"auto\" is to be "
                "decided here; a wish is granted, slow or not",
            )


@precision_battery.property("auto: bfloat16 where the processor multiplies in it")
def precision_auto(function):
    got = function()
    expect(got is not None, "it gives None for \"auto\": is there a return on every way out?")
    expect(got in ("bf16", "no"), f'it must give "bf16" or "no", but it gives {got!r}')
    for cpu, wanted, hint in (
        ((), "no", "a processor without bfloat16 is given it, which is slower than "
         "float32: avx512_f and amx_tile alone do not do it, and a name that stands in "
         "get_capabilities() with False means no"),
        (("avx512_bf16",), "bf16", "avx512_bf16 is not taken for bfloat16"),
        (("amx_bf16",), "bf16", "amx_bf16 is not taken for bfloat16: either of the two is "
         "enough"),
        (("avx512_bf16", "amx_bf16"), "bf16", "a processor with both avx512_bf16 and "
         "amx_bf16 is refused"),
    ):
        with machine(cpu) as asked:
            got = function("auto")
        if not asked:  # it asks in another way, or does not ask at all
            real = torch.cpu.get_capabilities() if torch.backends.cpu else {}
            wanted = "bf16" if real.get("avx512_bf16") or real.get("amx_bf16") else "no"
            expect(
                torch.cuda.is_available() or got == wanted,
                f"on this machine \"auto\" must give {wanted!r}, but it gives {got!r}, and "
                "it does not ask torch.cpu.get_capabilities()",
            )
            continue
        expect(got == wanted, hint)


@precision_battery.property("auto: a GPU decides where there is one")
def precision_gpu(function):
    for gpu, cpu, wanted in (("old", ("amx_bf16",), "no"), ("new", (), "bf16")):
        with machine(cpu, gpu):
            got = function("auto")
        expect(
            got == wanted,
            f"with a GPU that is {'not ' if gpu == 'old' else ''}able to do bfloat16 it "
            f"gives {got!r}: ask torch.cuda.is_available() first, then "
            "torch.cuda.is_bf16_supported(); the processor does not matter then",
        )


# hide_tokens

hide_battery = Battery(
    "hide_tokens", "hide_tokens(input_ids, share, generator) -> tensor like input_ids",
    chapter=8, takes=("input_ids", "share", "generator"),
)


def some_ids(rows=60, columns=50):
    """Ids with every special token among them, and the first ordinary one."""
    ids = torch.randint(5, 60, (rows, columns), generator=dice_of(80))
    ids[:, 0], ids[:, -1] = CLS, PAD
    ids[:, 10], ids[:, 20], ids[:, 30], ids[:, 40] = SEP, UNK, MASK, 5
    return ids


def dice_of(seed):
    """A generator with a seed."""
    return torch.Generator().manual_seed(seed)


def hidden_by(function, ids, share, seed=1):
    """Call the reader's function; expect ids."""
    given = ids.clone()
    with own_dice():
        out = function(given, share, dice_of(seed))
    expect_tensor(out, ids.shape, torch.int64, "what it gives")
    return out


@hide_battery.property("hides ordinary tokens, never special ones")
def hide_special(function):
    ids = some_ids()
    out = hidden_by(function, ids, 0.5)
    changed = out != ids
    names = {i: int((changed & (ids == i)).sum()) for i in range(5)}
    hit = [SPECIAL[i] for i, count in names.items() if count]
    if hit == ["[PAD]"] or (hit and "[PAD]" in hit and len(hit) < 3):
        raise Wrong(
            f"{' and '.join(hit)} is replaced: padding is no token. Special tokens have "
            "the ids below 5; all of them stay"
        )
    expect(
        not hit,
        f"special tokens are replaced as well: {', '.join(hit)}. All ids below 5 stay "
        "([MASK] too, and [UNK]: what is unknown is hidden already)",
    )
    expect(
        bool(changed.any()),
        "nothing is hidden at all: is the result of masked_fill kept? It is not in place",
    )
    expect(
        bool((changed & (ids == 5)).any()),
        "the id 5, the first ordinary token, is never hidden: ids from 5 on are ordinary. "
        "Look for > where >= belongs",
    )
    new = set(out[changed].tolist())
    expect(
        new == {MASK},
        "hidden tokens must become [MASK], which has the id 4, but they become "
        + ("[PAD], id 0: the model would take them for padding" if new == {PAD} else
           "[UNK], id 1" if new == {UNK} else
           f"{sorted(new)[:6]}: random tokens belong to pretraining (chapter 10)"),
    )


@hide_battery.property("hides each token with the chance share")
def hide_share(function):
    ids = some_ids(100, 60)
    ordinary = ids >= 5
    n = int(ordinary.sum())
    for share in (0.2, 0.9, 0.0):
        hidden = hidden_by(function, ids, share) != ids
        got = hidden.sum().item() / n
        spare = 5 * math.sqrt(share * (1 - share) / n)
        if share == 0.2 and bool(hidden.any()):
            rows = (hidden & ordinary).sum(1) / ordinary.sum(1)
            columns = (hidden & ordinary)[:, ordinary.all(0)].float().mean(0)
            expect(
                not bool(((rows == 0) | (rows == 1)).all()),
                "a text is hidden whole or not at all: draw a number for each token",
            )
            expect(
                not bool(((columns == 0) | (columns == 1)).all()),
                "the same places are hidden in every text: draw a number for each token of "
                "each text, of the shape of input_ids",
            )
            plain = torch.full((60, 50), 9)
            expect(
                (hidden_by(function, plain, share) != plain).float().mean(1).std() > 0.01,
                "every text has exactly as many hidden tokens as the others: each token has "
                "its own chance, and a text may have more or fewer",
            )
        text = f"with share {share} it hides {got:.0%} of the ordinary tokens"
        expect(
            abs(got - share) <= spare,
            text + (
                ": the chance is inverted; hide where the random number is below share"
                if abs(got - (1 - share)) < 0.02 else
                ": each is hidden or kept by one throw for the whole text or batch"
                if got in (0.0, 1.0) and share else
                ": look for a fixed number, for the normal distribution (randn) in place "
                "of the even one (rand), or for a share of all tokens"
            ),
        )


@hide_battery.property("follows the generator that is passed in, and no other")
def hide_generator(function):
    ids = some_ids()
    one, same = (hidden_by(function, ids, 0.5, seed=3) for _ in range(2))
    other = hidden_by(function, ids, 0.5, seed=4)
    expect(
        torch.equal(one, same),
        "two generators with the same seed hide other tokens: the generator is not used, "
        "so no run can be repeated; pass generator=generator on",
    )
    expect(
        not torch.equal(one, other),
        "another seed hides the same tokens: the generator is not used, or is seeded anew "
        "inside",
    )
    generator = dice_of(3)
    first, second = (function(ids.clone(), 0.5, generator) for _ in range(2))
    expect(
        not torch.equal(first, second),
        "called twice with one generator it hides the same tokens: it seeds or copies "
        "the generator. It must only draw from it, so that each batch is another",
    )


@hide_battery.property("gives a new tensor and leaves its input")
def hide_input(function):
    ids = some_ids()
    before, out = ids.clone(), function(ids, 0.5, dice_of(5))
    expect_tensor(out, before.shape, torch.int64, "what it gives")
    # `run` puts a changed input right again, but the output is the same tensor then.
    expect(
        out.data_ptr() != ids.data_ptr() and "input" not in function.manners,
        "it writes into input_ids itself: the next epoch would find the holes of this "
        "one. Use masked_fill or where, or clone first",
    )


# WordCutter

cutter_battery = Battery(
    "WordCutter",
    "WordCutter(tokenizer, texts, *, dropout, max_len, ways=0), called with (seed) -> a "
    "list of lists of ids", chapter=8,
    makes=("tokenizer", "texts", "dropout", "max_len", "ways"), takes=("seed",),
)
RANKS = {pair: i for i, pair in enumerate(MERGES)}


def join(pieces, place):
    """Merge the pieces at a place."""
    joined = pieces[place] + pieces[place + 1].removeprefix("##")
    return (*pieces[:place], joined, *pieces[place + 2:])


def pairs_of(pieces, ranks=RANKS):
    """(rank, place) of each merge that could be made, first learned first."""
    return sorted(
        (ranks[pair], i) for i, pair in enumerate(zip(pieces, pieces[1:], strict=False))
        if pair in ranks
    )


def letters(word, prefix="##"):
    """A word in single characters."""
    return (word[0], *(prefix + c for c in word[1:]))


def by_merges(word, how="first"):
    """Cut a word without dropout, right or with one mistake."""
    pieces = letters(word)
    while found := pairs_of(pieces):
        place = {
            "first": found[0][1], "last": found[-1][1], "once": found[0][1],
            "left": min(p for _, p in found), "right": max(p for _, p in found),
        }[how]
        pieces = join(pieces, place)
        if how == "once":
            break
    return pieces


def encoded(texts, cut=by_merges, max_len=12, lower=True, fuse=True, ends=True, keep=True,
            unknown=True, words=True):
    """Encode texts with a way to cut words, right or with one mistake."""
    vocab = tiny_tokenizer().get_vocab()
    rows = []
    for text in texts:
        text = text.lower() if lower else text
        row = []
        splits = pre_tokenizers.Whitespace().pre_tokenize_str(text)
        for word in [w for w, _ in splits] if words else text.split():
            ids = [vocab.get(piece, UNK) for piece in cut(word)]
            if fuse:
                ids = [t for t, b in zip(ids, [None, *ids], strict=False)
                       if t != UNK or b != UNK]
            row += ids if unknown else [t for t in ids if t != UNK]
        if not ends:
            rows.append(row[:max_len])
        elif keep:
            rows.append([CLS, *row][: max_len - 1] + [SEP])
        else:
            rows.append([CLS, *row, SEP][:max_len])
    return rows


def greedy(word):
    """The longest known piece from the left, as WordPiece does."""
    vocab, pieces = tiny_tokenizer().get_vocab(), []
    while word:
        for end in range(len(word), 0, -1):
            piece = ("##" if pieces else "") + word[:end]
            if piece in vocab or end == 1:
                pieces.append(piece)
                word = word[end:]
                break
    return tuple(pieces)


def cutter_of(subject, texts=TEXTS, tokenizer=None, *, dropout, max_len=12, **named):
    """Make the reader's cutter."""
    return lean(subject, subject.thing, tokenizer or tiny_tokenizer(), list(texts),
                dropout=dropout, max_len=max_len, **named)


def cut_by(subject, cutter, seed):
    """Call the reader's cutter; expect a list of lists of ids."""
    with own_dice():
        rows = lean(subject, cutter, seed)
    expect(rows is not None, "it gives None: is there a return at the end of __call__?")
    expect(
        isinstance(rows, list) and all(
            isinstance(r, (list, tuple)) and all(isinstance(i, int) for i in r)
            for r in rows),
        "it must give a list of lists of ints, a row a text: token ids, not pieces",
    )
    return [list(row) for row in rows]


def expect_rows(actual, wanted, causes, otherwise):
    """Compare ids, and name the mistake that reproduces them."""
    if actual == wanted:
        return
    for hint, mistaken in causes:
        expect(actual != mistaken(), hint)
    place = next((i for i, (a, b) in enumerate(zip(actual, wanted, strict=False)) if a != b),
                 None)
    raise Wrong(otherwise + (
        f": it gives {len(actual)} rows for {len(wanted)} texts" if place is None else
        f": the first text that differs is {TEXTS[place]!r}: {actual[place]}, wanted "
        f"{wanted[place]}" if len(wanted) == len(TEXTS) else ""
    ))


@cutter_battery.property("without dropout gives the tokenizer's own ids")
def cutter_zero(subject):
    for kind in ("bpe", "wordpiece"):
        try:
            cutter = cutter_of(subject, tokenizer=tiny_tokenizer(kind), dropout=0.0)
            rows = cut_by(subject, cutter, 0)
        except Broke as broke:
            if kind == "bpe" or not isinstance(subject.last_error, KeyError):
                raise
            raise Wrong(
                "a WordPiece tokenizer (BERT's, chapter 12) has no merges, and without "
                f"dropout none are needed: read them only where dropout is above 0. It {broke}"
            ) from None
        expect_rows(
            rows, ids_of(tiny_tokenizer(kind), TEXTS, 12),
            [("texts that are too long lose their [SEP]: keep max_len - 1 tokens and put "
              "[SEP] after them", lambda: encoded(TEXTS, keep=False)),
             ("texts are not cut to max_len",
              lambda: ids_of(tiny_tokenizer(), TEXTS, 9999))],
            "with dropout 0 the rows must be what encode gives",
        )


@cutter_battery.property("with next to no dropout gives the tokenizer's own ids")
def cutter_tiny(subject):
    rows = cut_by(subject, cutter_of(subject, dropout=1e-12), 0)
    wanted = encoded(TEXTS)
    causes = [
        ("the chance is inverted: nearly every merge is passed over. Keep a merge where "
         "the random number is at least dropout", lambda: encoded(TEXTS, letters)),
        ("the merge that stands furthest left is made first: make the one that was "
         "learned first, the smallest place in the list of merges",
         lambda: encoded(TEXTS, lambda w: by_merges(w, "left"))),
        ("the merge that stands furthest right is made first: make the one that was "
         "learned first", lambda: encoded(TEXTS, lambda w: by_merges(w, "right"))),
        ("the merge that was learned last is made first: take the smallest place in the "
         "list of merges (min, not max)",
         lambda: encoded(TEXTS, lambda w: by_merges(w, "last"))),
        ("only one merge is made in a word: go on until none is left",
         lambda: encoded(TEXTS, lambda w: by_merges(w, "once"))),
        ("the longest known piece is taken from the left, as WordPiece does: BPE makes "
         "its merges in the order in which they were learned",
         lambda: encoded(TEXTS, greedy)),
        ("pieces inside a word lack their ##", lambda: encoded(
            TEXTS, lambda w: tuple(p.removeprefix("##") for p in by_merges(w)))),
        ("pieces inside a word lack their ##",
         lambda: encoded(TEXTS, lambda w: letters(w, ""))),
        ("texts are not normalised: capitals become [UNK]. Use tokenizer.normalizer first",
         lambda: encoded(TEXTS, lower=False)),
        ("unknown pieces side by side must become one [UNK], as the tokenizer does",
         lambda: encoded(TEXTS, fuse=False)),
        ("unknown pieces are left out: they must become [UNK]",
         lambda: encoded(TEXTS, unknown=False)),
        ("[CLS] and [SEP] are missing", lambda: encoded(TEXTS, ends=False)),
        ("[CLS] is missing at the beginning",
         lambda: [[*r[:11], SEP] if len(r) > 11 else [*r, SEP]
                  for r in encoded(TEXTS, ends=False, max_len=11)]),
        ("[SEP] is missing at the end",
         lambda: [[CLS, *r][:12] for r in encoded(TEXTS, ends=False, max_len=99)]),
        ("texts that are too long lose their [SEP]: keep max_len - 1 tokens and put [SEP] "
         "after them", lambda: encoded(TEXTS, keep=False)),
        ("texts are cut to one or two tokens fewer than max_len: max_len counts [CLS] and "
         "[SEP] too", lambda: encoded(TEXTS, max_len=11)),
        ("texts are cut to one or two tokens fewer than max_len: max_len counts [CLS] and "
         "[SEP] too", lambda: encoded(TEXTS, max_len=10)),
        ("max_len does not count [CLS] and [SEP]: rows become longer than it allows",
         lambda: encoded(TEXTS, max_len=14)),
        ("max_len does not count [SEP]: rows become longer than it allows",
         lambda: encoded(TEXTS, max_len=13)),
        ("texts are not cut to max_len", lambda: encoded(TEXTS, max_len=9999)),
        ("texts are cut at spaces alone: use tokenizer.pre_tokenizer, which parts "
         "punctuation too", lambda: encoded(TEXTS, words=False)),
        ("words are not cut apart: merges must stay inside a word",
         lambda: encoded([t.replace(" ", "") for t in TEXTS])),
        ("each character stands alone: merges that are not passed over must be made",
         lambda: encoded(TEXTS, letters)),
    ]
    expect_rows(rows, wanted, causes, "with a dropout of 1e-12 the rows must be what the "
                "tokenizer itself gives")


@cutter_battery.property("with nearly full dropout gives single characters")
def cutter_full(subject):
    rows = cut_by(subject, cutter_of(subject, dropout=1 - 1e-12, max_len=99), 0)
    wanted = encoded(TEXTS, letters, max_len=99)
    expect_rows(
        rows, wanted,
        [("dropout is not used: every merge is made", lambda: encoded(TEXTS, max_len=99)),
         ("all is hidden or left out, not cut: a word without merges is its characters",
          lambda: [[CLS, SEP]] * len(TEXTS))],
        "where every merge is passed over, a word must fall into its characters, those "
        "after the first with ##",
    )


def spread(pieces, dropout, how="anew"):
    """The chance of each way to cut, as {pieces: chance}."""
    result = Counter()
    found = pairs_of(pieces)
    if how == "once":  # a merge that was passed over stays so
        rules = [pair for pair in MERGES if set("".join(pair)) <= set("abcd##")]
        for bits in range(2 ** len(rules)):
            kept = {p: RANKS[p] for i, p in enumerate(rules) if bits >> i & 1}
            cut = pieces
            while left := pairs_of(cut, kept):
                cut = join(cut, left[0][1])
            result[cut] += ((1 - dropout) ** len(kept)
                            * dropout ** (len(rules) - len(kept)))
        return result
    if not found:
        return Counter({pieces: 1.0})
    if how == "word":
        cut = by_merges("".join(p.removeprefix("##") for p in pieces))
        return Counter({pieces: dropout, cut: 1 - dropout})
    if how == "stop":
        found = found[:1]
    if how in ("left", "random"):
        for bits in range(2 ** len(found)):
            kept = [m for i, m in enumerate(found) if bits >> i & 1]
            chance = (1 - dropout) ** len(kept) * dropout ** (len(found) - len(kept))
            if not kept:
                result[pieces] += chance
            chosen = kept if how == "random" else sorted(kept, key=lambda m: m[1])[:1]
            for _, place in chosen:
                for cut, share in spread(join(pieces, place), dropout, how).items():
                    result[cut] += chance * share / len(chosen)
        return result
    result[pieces] += dropout ** len(found)
    for i, (_, place) in enumerate(found):
        for cut, share in spread(join(pieces, place), dropout, how).items():
            result[cut] += dropout**i * (1 - dropout) * share
    return result


@cutter_battery.property("passes each merge over with the chance dropout, each time anew")
def cutter_chance(subject):
    count, dropout = 2000, 0.35
    tokenizer = tiny_tokenizer()
    rows = cut_by(
        subject, cutter_of(subject, ["abcd"] * count, dropout=dropout, max_len=9), 7
    )
    seen = Counter(
        tuple(tokenizer.id_to_token(i) for i in row[1:-1]) for row in rows
    )
    expect(
        len(seen) > 1,
        "two thousand copies of one word are all cut alike: the cut must be drawn anew "
        "for each word, from dice that are made once a call, not once a word or a text "
        "(and with ways=0 nothing is kept)",
    )

    def apart(chances):
        return sum(abs(seen[c] / count - chances.get(c, 0.0))
                   for c in set(seen) | set(chances)) / 2

    start = letters("abcd")
    right = apart(spread(start, dropout))
    wrong = [
        ("the chance is inverted: with dropout 0.1 nine merges in ten would be passed "
         "over", spread(start, 1 - dropout)),
        ("a merge that was passed over once stays so for the whole word: throw again in "
         "each round", spread(start, dropout, "once")),
        ("it stops at the first merge that is passed over: go on to the next best one, "
         "and stop only where none is left", spread(start, dropout, "stop")),
        ("a word is cut as ever or into single characters: each merge has its own chance",
         spread(start, dropout, "word")),
        ("of the merges that are left, one further left is made: take the one that was "
         "learned first", spread(start, dropout, "left")),
        ("of the merges that are left, any one is made: take the one that was learned "
         "first", spread(start, dropout, "random")),
    ] + [
        (f"merges are passed over with a fixed chance of about {other}, not with dropout",
         spread(start, other)) for other in (0.1, 0.3, 0.5) if other != 0.3
    ]
    if right > 0.06:
        nearest = min(wrong, key=lambda pair: apart(pair[1]))
        raise Wrong(
            nearest[0] if apart(nearest[1]) < min(0.06, right / 2) else
            "the shares of the ways in which a word is cut are not those of BPE-dropout: "
            "in each round throw once for each merge that could be made, pass it over "
            "with the chance dropout, and make the first-learned one of the rest"
        )


@cutter_battery.property("cuts the same way for the same seed")
def cutter_seed(subject):
    texts = ["abcdefgh bad cab", "efgh abcd"] * 10
    one = cutter_of(subject, texts, dropout=0.5, max_len=40)
    a, b, c = (cut_by(subject, one, seed) for seed in (1, 2, 1))
    expect(
        a == c,
        "the same seed cuts another way the second time: draw from dice that are made "
        "anew at each call, random.Random(seed), and keep no cuts from one call to the "
        "next",
    )
    expect(
        a != b,
        "another seed cuts the same way: the seed is not used, or cuts are kept from one "
        "call to the next",
    )
    again = cut_by(subject, cutter_of(subject, texts, dropout=0.5, max_len=40), 1)
    expect(again == a, "two cutters with the same seed cut differently: something other "
           "than the seed decides, such as the order of a set")


@cutter_battery.property("keeps order, length and spelling")
def cutter_order(subject):
    tokenizer = tiny_tokenizer()
    texts = ["abcd efgh", "face", "", "ab " * 50, "hfgc bad", "dead beef cab bad"]
    rows = cut_by(subject, cutter_of(subject, texts, dropout=0.6, max_len=20), 3)
    expect(len(rows) == len(texts), f"{len(texts)} texts give {len(rows)} rows")
    for text, row in zip(texts, rows, strict=True):
        expect(
            len(row) <= 20 and row[:1] == [CLS] and row[-1:] == [SEP],
            f"a row must start with [CLS], end with [SEP] and be no longer than max_len, "
            f"20, but one of {text[:12]!r} has {len(row)} tokens and goes from "
            f"{row[:1]} to {row[-1:]}: cut the row after its words were cut anew",
        )
        spelled = "".join(
            tokenizer.id_to_token(i).removeprefix("##") for i in row[1:-1]
        )
        expect(
            text.replace(" ", "").startswith(spelled) and (len(row) == 20 or len(spelled)
                                                          == len(text.replace(" ", ""))),
            f"the pieces do not spell the text: {text!r} became {spelled!r}. The order "
            "of texts and of letters must stay",
        )


@cutter_battery.property("ways: keeps that many cuts of a word, and draws from them")
def cutter_ways(subject):
    texts = ["abcdefgh"] * 200
    for ways in (3, 0):
        cutter = cutter_of(subject, texts, dropout=0.5, max_len=20, ways=ways)
        rows = cut_by(subject, cutter, 5)
        kinds = Counter(map(tuple, rows))
        if ways:
            expect(
                len(kinds) <= ways,
                f"with ways={ways} a word is cut in {len(kinds)} ways: keep the first "
                f"{ways} and draw one of them after that",
            )
            expect(
                len(set(map(tuple, rows[3:]))) > 1 or len(kinds) == 1,
                "after the first cuts the same one is always taken: draw one of those "
                "kept",
            )
            expect(len(kinds) > 1, f"with ways={ways} all copies of a word are cut alike")
            expect(
                cut_by(subject, cutter, 5) == rows,
                "with ways the second call with the same seed differs: what was kept must "
                "be forgotten at each call",
            )
        else:
            expect(len(kinds) > 3, "with ways=0 nothing must be kept: cut anew each time")


@cutter_battery.property("cut gives the pieces of one word")
def cutter_cut(subject):
    cutter = cutter_of(subject, dropout=1e-12)
    if not hasattr(cutter, "cut"):
        raise Skip("there is no method cut(word, rng), which chapter 08 shows")
    for word in ("abcd", "h", "efgh", "zab"):
        pieces = lean(subject, cutter.cut, word, random.Random(0))
        expect(
            isinstance(pieces, (list, tuple)) and tuple(pieces) == by_merges(word),
            f"cut({word!r}, rng) must give the pieces {list(by_merges(word))}, but it "
            f"gives {pieces}",
        )


# TrainingConfig

DEFAULTS = {
    "seed": 0, "epochs": 12, "batch_size": 32, "learning_rate": 1e-3, "warmup": 0.1,
    "weight_decay": 0.01, "clip": 1.0, "hide": 0.3, "bpe_dropout": 0.1,
    "class_weights": False, "precision": "auto",
}
config_battery = Battery(
    "TrainingConfig",
    "TrainingConfig(" + ", ".join(f"{k}={v!r}" for k, v in DEFAULTS.items()) + ")",
    chapter=8, makes=tuple(DEFAULTS),
)


@config_battery.property("holds the chapter's numbers")
def config_defaults(subject):
    made = subject.run(subject.thing)
    for name, value in DEFAULTS.items():
        expect(hasattr(made, name), f"the field {name} is missing")
        got = getattr(made, name)
        expect(
            got == value and isinstance(got, bool) == isinstance(value, bool),
            f"the default of {name} is {got!r}, but the chapter's recipe has {value!r}",
        )
    changed = subject.run(subject.thing, epochs=3, hide=0.0, precision="no")
    expect(
        (changed.epochs, changed.hide, changed.precision) == (3, 0.0, "no"),
        "what is passed in is not what it holds afterwards",
    )


RULES = {
    "epochs": ((0, -1), (1,), "at least 1"), "batch_size": ((0, -4), (1,), "at least 1"),
    "learning_rate": ((0.0, -1e-3), (1e-9, 2.0), "above 0"),
    "warmup": ((-0.1, 1.1), (0.0, 1.0), "in [0, 1]: it is a share of the steps"),
    "weight_decay": ((-0.01,), (0.0, 2.0), "at least 0"),
    "clip": ((0.0, -1.0), (1e-9, 100.0), "above 0"),
    "hide": ((1.0, 1.5, -0.1), (0.0, 0.99), "in [0, 1): 1 would hide everything"),
    "bpe_dropout": ((1.0, 1.5, -0.1), (0.0, 0.99), "in [0, 1): 1 would undo every merge"),
    "precision": (("fp16", "", "half"), ("auto", "bf16", "no"), "auto, bf16 or no"),
}


@config_battery.property("refuses what breaks a rule")
def config_refuses(subject):
    for name, (bad, _, rule) in RULES.items():
        for value in bad:
            must_refuse(
                subject, ValueError, f"{name} must be {rule}, but {value!r} is taken",
                subject.thing, **{name: value},
            )


@config_battery.property("takes the ends of what is allowed")
def config_takes(subject):
    for name, (_, good, rule) in RULES.items():
        for value in good:
            try:
                subject.run(subject.thing, **{name: value})
            except Broke as broke:
                raise Wrong(
                    f"{name}={value!r} is allowed ({rule}), but it is refused: look for < "
                    f"in place of <= or the other way round. It {broke}"
                ) from None


@config_battery.property("is a frozen dataclass")
def config_frozen(subject):
    made = subject.run(subject.thing)
    expect(
        dataclasses.is_dataclass(made),
        "it is no dataclass: train writes its fields down with asdict; put @dataclass "
        "above it",
    )
    held = dataclasses.asdict(made)
    expect(set(held) >= set(DEFAULTS), "asdict finds not all fields: each needs a "
           f"type, as in epochs: int = 12. Missing: {sorted(set(DEFAULTS) - set(held))}")
    try:
        made.epochs = 99
    except (AttributeError, TypeError):
        return
    raise Wrong(
        "its fields can be changed afterwards, past every rule: frozen=True in "
        "@dataclass(…)"
    )


# epoch_batches

batches_battery = Battery(
    "epoch_batches",
    "epoch_batches(rows, labels, config, model_config, *, seed, process=0, processes=1) "
    "-> dicts with input_ids, attention_mask and labels", chapter=8,
    takes=("rows", "labels", "config", "model_config", "seed", "process", "processes"),
)
COUNT = 151  # no multiple of the batch size
_LENGTHS = random.Random(88)
ROWS = [[CLS, *[5 + i] * _LENGTHS.randint(1, 30), SEP] for i in range(COUNT)]
OF_ROW = [(7 * i + i // 9) % 11 for i in range(COUNT)]  # a label that goes with its row
BIG = Shape(vocab_size=5 + COUNT, num_labels=11, max_len=40)


def settings(**changed):
    """A training config."""
    return SimpleNamespace(**{**DEFAULTS, "hide": 0.0, "bpe_dropout": 0.0,
                              "precision": "no", "batch_size": 8, **changed})


def batches_of(function, rows=ROWS, labels=OF_ROW, shape=BIG, seed=1, config=None, **named):
    """All batches of an epoch by the reader's function."""
    def everything(rows, labels):
        made = function.thing(rows, labels, config or settings(), shape, seed=seed, **named)
        return made if made is None else list(made)

    with own_dice():
        batches = lean(
            function, everything, [list(row) for row in rows], list(labels)
        )
    if batches is None:
        raise Wrong("it gives None: yield each batch, or return a list of them")
    for batch in batches:
        expect(
            isinstance(batch, dict), "each batch must be a dict, as from make_batch, but "
            f"one is a {type(batch).__name__}",
        )
        for key, dtype in (("input_ids", torch.int64), ("attention_mask", torch.bool),
                           ("labels", torch.int64)):
            expect(key in batch, f"a batch lacks {key!r}; it has {sorted(batch)}")
            expect_tensor(batch[key], dtype=dtype, what=key)
        expect(
            config is not None or not bool((batch["input_ids"] == MASK).any()),
            "with config.hide = 0 tokens are hidden all the same: take config.hide",
        )
    return batches


def row_of(batch):
    """Which rows stand in a batch: each has a token of its own."""
    return [int(ids[1]) - 5 for ids in batch["input_ids"]]


@batches_battery.property("holds every text once, the last small batch too")
def batches_once(function):
    batches = batches_of(function)
    held = Counter(i for b in batches for i in row_of(b))
    lost = COUNT - len(held)
    expect(
        lost == 0,
        "the last batch, which is smaller, is left out: some texts are never seen" if
        lost == COUNT % 8 else f"{lost} of {COUNT} texts stand in no batch",
    )
    double = sum(held.values()) - COUNT
    expect(
        double == 0,
        f"{double} texts are seen twice in an epoch: the last batch may be smaller and "
        "must not be filled up" if double == -COUNT % 8 else
        f"{double} texts stand in more than one batch",
    )
    sizes = sorted({len(b["labels"]) for b in batches})
    expect(
        sizes == [COUNT % 8, 8],
        f"with batch_size 8 the batches have {sizes} texts: all but one must have 8",
    )


@batches_battery.property("keeps each label with its text")
def batches_labels(function):
    batches = batches_of(function)
    pairs = [(i, int(y)) for b in batches for i, y in zip(row_of(b), b["labels"], strict=True)]
    wrong = sum(OF_ROW[i] != y for i, y in pairs)
    expect(
        not wrong,
        f"{wrong} of {len(pairs)} texts come with the label of another one: texts are "
        "shuffled and labels are not, or in another order. Take both by the same indices",
    )


@batches_battery.property("pads each batch to its own longest text")
def batches_padding(function):
    batches = batches_of(function)
    for batch in batches:
        ids, mask = batch["input_ids"], batch["attention_mask"]
        expect_tensor(mask, ids.shape, what="attention_mask")
        lengths = torch.tensor([len(ROWS[i]) for i in row_of(batch)])
        right = torch.arange(ids.shape[1]) < lengths[:, None]
        expect(
            not torch.equal(mask, ~right) or bool(right.all()),
            "attention_mask is inverted: True = a real token",
        )
        expect(
            ids.shape[1] == int(lengths.max()),
            f"a batch whose longest text has {int(lengths.max())} tokens is padded to "
            f"{ids.shape[1]}: pad each batch to its own longest text, or time is spent "
            "on padding" if ids.shape[1] > int(lengths.max()) else
            "texts are cut off inside a batch",
        )
        expect(torch.equal(mask, right), "attention_mask does not mark the real tokens")
        wanted = [ROWS[i] + [PAD] * (ids.shape[1] - len(ROWS[i])) for i in row_of(batch)]
        expect(
            ids.tolist() == wanted,
            "with hide=0 the ids of a batch are not those of the rows, padded with 0: "
            + ("tokens are hidden all the same" if bool((ids == MASK).any()) else
               "look at what changes them"),
        )


@batches_battery.property("shuffles by the seed, and only by it")
def batches_seed(function):
    def order(seed, **named):
        return [row_of(b) for b in batches_of(function, seed=seed, **named)]

    one, same, other = order(1), order(1), order(2)
    expect(
        one == same,
        "the same seed gives other batches the second time: a run that was killed and "
        "resumed would not meet the same ones. All that is random must follow from seed",
    )
    expect(
        one != other,
        "another seed gives the same batches: the seed is not passed on to "
        "bucket_by_length, so every epoch looks like the first",
    )
    flat = [i for b in one for i in b]
    expect(flat != list(range(COUNT)), "texts are not shuffled: pass seed on to "
           "bucket_by_length")
    members, others = ({frozenset(b) for b in x} for x in (one, other))
    expect(
        len(members & others) < len(members) / 2,
        "the same texts share a batch in every epoch: shuffle before bucketing, not the "
        "batches alone",
    )
    means = [sum(len(ROWS[i]) for i in b) / len(b) for b in one]
    expect(
        means not in (sorted(means), sorted(means, reverse=True)),
        "the batches come sorted by length: the model would end each epoch on long texts "
        "alone. Without a seed bucket_by_length does not shuffle",
    )


@batches_battery.property("puts texts of similar length together")
def batches_buckets(function):
    rows = [[CLS, *[5 + i % COUNT] * (1 + 37 * i % 60), SEP] for i in range(400)]
    batches = batches_of(function, rows, [0] * 400)
    padding = sum(int((~b["attention_mask"]).sum()) for b in batches)
    total = sum(b["attention_mask"].numel() for b in batches)
    expect(
        padding < 0.25 * total,
        f"{padding / total:.0%} of what the model reads is padding: long and short texts "
        "share a batch. Make the batches with bucket_by_length",
    )


@batches_battery.property("hides a share of the tokens, others in each batch and epoch")
def batches_hidden(function):
    rows = [[CLS, *range(5, 45), SEP]] * 96  # alike, so that their order shows nothing
    config = settings(hide=0.3)

    def ids(seed):
        return torch.cat([
            b["input_ids"] for b in batches_of(
                function, rows, [0] * 96, seed=seed, config=config)
        ])

    one, same, other = ids(1), ids(1), ids(2)
    hidden = one == MASK
    share = hidden[:, 1:-1].float().mean().item()
    expect(share > 0, "no token is hidden: hide_tokens is not called, or what it gives is "
           "not put into the batch")
    expect(
        abs(share - 0.3) < 0.04,
        f"with hide=0.3, {share:.0%} of the tokens are hidden: take config.hide",
    )
    expect(
        not bool(hidden[:, [0, -1]].any()), "[CLS] or [SEP] is hidden: only ordinary "
        "tokens may be",
    )
    expect(
        torch.equal(one, same),
        "the same seed hides other tokens the second time: a resumed run would differ. "
        "Make the generator from the seed",
    )
    expect(not torch.equal(one, other), "in each epoch the same tokens are hidden: the "
           "generator must come from the epoch's seed")
    expect(
        not torch.equal(one[:8], one[8:16]),
        "in each batch the same places are hidden: the generator is made anew for every "
        "batch. Make it once, before the loop",
    )


@batches_battery.property("shares the batches among processes")
def batches_processes(function):
    parts = [
        [row_of(b) for b in batches_of(function, process=p, processes=3)] for p in range(3)
    ]
    counts = [len(part) for part in parts]
    whole = {frozenset(row_of(b)) for b in batches_of(function)}
    expect(
        not (parts[0] == parts[1] or counts[0] > len(whole) // 2),
        "each of three processes gets all batches: they would do the same work three "
        "times. Process p takes every third one, from p on",
    )
    expect(
        len(set(counts)) == 1,
        f"three processes get {counts} batches: the one with fewer leaves the others "
        "waiting for ever. Let some batches be taken twice",
    )
    got = {frozenset(b) for part in parts for b in part}
    expect(
        got == whole,
        "together the processes must get the batches that one alone would get: make all "
        "batches with the same seed in every process, then share them out",
    )


# predict

predict_battery = Battery(
    "predict",
    "predict(model, tokenizer, texts, *, batch_size=128) -> (texts, num_labels) "
    "probabilities", chapter=8, takes=("model", "tokenizer", "texts", "batch_size"),
)
SMALL = Shape(vocab_size=tiny_tokenizer().get_vocab_size(), num_labels=3, max_len=12)


def answers(model, texts=TEXTS, how=None):
    """Each text alone through a model, in evaluation."""
    was = model.training
    model.eval()
    with torch.no_grad():
        logits = torch.cat([
            nn.Module.__call__(model, torch.tensor([ids]))
            for ids in ids_of(tiny_tokenizer(), texts, model.config.max_len)
        ])
    model.train(was)
    model.calls.clear()
    return logits if how == "logits" else logits.softmax(-1)


def predicted(function, model, texts=TEXTS, **named):
    """Call the reader's function; expect probabilities."""
    out = lean(function, function.thing, model, tiny_tokenizer(), list(texts), **named)
    if isinstance(out, (list, np.ndarray)):
        raise Wrong(f"it gives a {type(out).__name__}: it must give a tensor")
    expect_tensor(out, (len(texts), model.config.num_labels), what="what it gives")
    return out


def expect_texts(calls):
    """Refuse ids that are not those of the whole texts."""
    expect(
        not any(bool((call.ids == MASK).any()) for call in calls),
        "tokens are hidden while it answers: that belongs to training",
    )
    expect(
        all(call.ids.shape[1] <= SMALL.max_len for call in calls),
        "texts longer than the model's max_len reach the model: encode(…, "
        "max_len=config.max_len)",
    )


@predict_battery.property("gives each text's probabilities, in the order of the texts")
def predict_plain(function):
    model = Stub(SMALL).eval()
    wanted, logits = answers(model), answers(model, how="logits")
    by_length = sorted(
        range(len(TEXTS)), key=lambda i: len(ids_of(tiny_tokenizer(), [TEXTS[i]], 12)[0])
    )
    for size in (2, 4, 128):
        out = predicted(function, model, batch_size=size)
        expect_texts(model.calls)
        expect(
            not bool((out == 0).all(1).any()),
            "some texts get no answer, only zeros: is the last, smaller batch lost?",
        )
        moved = [
            [i for i, row in enumerate(wanted) if near(row, mine)] for mine in out.float()
        ]
        expect(
            near(out.float(), wanted) or not all(moved),
            "the order of the texts is lost: bucketing sorts them, so each batch's rows must "
            "be put back to where its texts stood, result[indices] = …",
        )
        explain(out.float(), wanted, [
            ("these are logits: the softmax is missing", lambda: logits),
            ("these are logarithms of probabilities", lambda: logits.log_softmax(-1)),
            ("the softmax is taken twice", lambda: wanted.softmax(-1)),
            ("each class is squashed on its own by a sigmoid: take the softmax over the "
             "classes", logits.sigmoid),
            ("the softmax runs over the texts (dim=0), not over the classes",
             lambda: logits.softmax(0)),
            ("the softmax runs over the texts (dim=0), not over the classes",
             lambda size=size: torch.cat([
                 part.softmax(0) for part in logits[by_length].split(size)
             ])[torch.tensor(by_length).argsort()]),
            ("the order of the texts is lost: bucketing sorts them, so each batch's rows "
             "must be put back to where its texts stood, result[indices] = …",
             lambda: wanted[by_length]),
            ("the order of the texts is lost: bucketing sorts them, and this is the "
             "reverse of sorting, applied the wrong way round",
             lambda: wanted[torch.tensor(by_length).argsort()]),
            ("it gives ones and zeros, the chosen class: give probabilities",
             lambda: F.one_hot(wanted.argmax(-1), 3).float()),
        ], "these are not the probabilities that the model gives each text by itself. Look "
           "at the attention mask (pass it on), at the order of the texts, at texts longer "
           "than max_len, and at empty ones"
           if all(call.masked for call in model.calls) else
           "the model is called without attention_mask, so padding counts as text: a text "
           "gets another answer in a batch than alone")
        model.calls.clear()
    expect(
        not bool(out.isnan().any()), "it gives NaN")
    expect_tensor(out, dtype=torch.float32, what="what it gives")


@predict_battery.property("works in evaluation, and leaves the model as it was")
def predict_mode(function):
    model = Stub(dataclasses.replace(SMALL, dropout=0.5))
    wanted = answers(model)
    for training in (True, False):
        model.train(training)
        out = predicted(function, model)
        expect(
            not any(call.training for call in model.calls),
            "the model is in training mode while it answers: dropout is active, and two "
            "calls give two answers. model.eval() first",
        )
        expect(near(out.float(), wanted), "with a model that has dropout it gives another "
               "answer: was the model really in evaluation mode?")
        expect(
            model.training == training,
            "afterwards the model is left in evaluation mode: whoever was training goes on "
            "without dropout. Remember model.training, and put it back" if training else
            "afterwards the model is in training mode, although it was not before: "
            "remember model.training and put it back",
        )
        expect(
            all(m.training == training for m in model.modules()),
            "some layers are left in another mode: use model.train(was), which reaches "
            "all of them",
        )


@predict_battery.property("keeps no gradient")
def predict_gradient(function):
    model = Stub(SMALL).eval()
    out = predicted(function, model)
    expect(
        all(p.requires_grad and p.grad is None for p in model.parameters()),
        "it freezes the parameters (requires_grad = False): they could not be trained "
        "afterwards. torch.no_grad() is enough",
    )
    expect(
        not any(call.grad for call in model.calls),
        "the forward passes keep all they would need for a gradient, which costs memory: "
        "call the model under torch.no_grad() or torch.inference_mode()",
    )
    expect(not out.requires_grad, "what it gives still hangs on the graph: torch.no_grad()")


@predict_battery.property("takes no more than batch_size texts at a time")
def predict_batches(function):
    model = Stub(SMALL).eval()
    texts = [f"{'ab ' * (i % 5)}cab" for i in range(11)]
    out = predicted(function, model, texts, batch_size=4)
    largest = max((len(call.ids) for call in model.calls), default=0)
    expect(
        largest <= 4,
        f"with batch_size 4 a forward pass takes {largest} texts: a large split would not "
        "fit into memory",
    )
    expect(near(out.float(), answers(model, texts)), "with several batches some answers "
           "are wrong or missing: is the last, smaller batch lost?")


@predict_battery.property("gives float32 on the CPU, whatever the model computes in")
def predict_dtype(function):
    for dtype in (torch.bfloat16, torch.float64):
        model = Stub(SMALL, answer=lambda logits, d=dtype: logits.to(d)).eval()
        out = predicted(function, model)
        expect_tensor(out, dtype=torch.float32, what="what it gives")
        expect(
            near(out.sum(-1), torch.ones(len(TEXTS)), 1e-5),
            "with a model that answers in bfloat16 the probabilities do not sum to 1: turn "
            "the logits into float32 before the softmax",
        )


# evaluate

evaluate_battery = Battery(
    "evaluate",
    "evaluate(model, tokenizer, dataset) -> dict with loss, macro_f1 and accuracy",
    chapter=8, takes=("model", "tokenizer", "dataset"),
)
SPLIT = ["abcd efgh", "a", "bad cab", "dead", "face bee", "b b", "hfgc", "efgh bad", "cab a",
         "deed fed", "gag", "hag abcd"]
TRUE = [0, 1, 2, 0, 2, 2, 1, 0, 0, 2, 1, 2]


def split_of(texts, labels, classes):
    """A Dataset with texts and labels."""
    ready("datasets")
    # A copy each time: the code that is checked may set the format of its own.
    return split_once(tuple(texts), tuple(labels), classes).with_format(None)


@functools.cache
def split_once(texts, labels, classes):
    """Make a Dataset once: it takes longer than the training that follows."""
    from datasets import ClassLabel, Dataset, Features, Value

    names = [f"class {chr(97 + i)}" for i in range(classes)]
    return Dataset.from_dict(
        {"text": list(texts), "label": list(labels)},
        features=Features({"text": Value("string"), "label": ClassLabel(names=names)}),
    )


def scores_of(truth, p, classes, average="macro", over=None):
    """Loss, F1 and accuracy by hand."""
    chosen = p.argmax(-1)
    truth = torch.tensor(truth)
    f1, weights = [], []
    for c in range(classes):
        hits = int(((chosen == c) & (truth == c)).sum())
        total = int((chosen == c).sum() + (truth == c).sum())
        if total == 0 and over == "present":
            continue
        if not bool((truth == c).any()) and over == "true":
            continue
        f1.append(2 * hits / total if total else 0.0)
        weights.append(int((truth == c).sum()))
    if average == "weighted":
        return sum(f * w for f, w in zip(f1, weights, strict=True)) / sum(weights)
    return sum(f1) / len(f1)


@evaluate_battery.property("gives loss, macro-F1 and accuracy of a split")
def evaluate_plain(function):
    # One class has no text here, and one is never chosen.
    shape = dataclasses.replace(SMALL, num_labels=5)
    model = Stub(shape, answer=lambda z: z - torch.tensor([0.0, 0.0, 0.0, 90.0, 90.0])).eval()
    p = answers(model, SPLIT)
    got = lean(function, function.thing, model, tiny_tokenizer(), split_of(SPLIT, TRUE, 5))
    expect(got is not None, "it gives None: is there a return at the end?")
    expect(isinstance(got, dict), f"it must give a dict, but it gives a {type(got).__name__}")
    for key in ("loss", "macro_f1", "accuracy"):
        expect(key in got, f"the key {key!r} is missing; it has {sorted(got)}")
        expect_number(got[key], key)
    truth = torch.tensor(TRUE)
    right = p.gather(1, truth[:, None])[:, 0]
    wanted = {
        "loss": -right.log().mean().item(), "macro_f1": scores_of(TRUE, p, 5),
        "accuracy": (p.argmax(-1) == truth).float().mean().item(),
    }
    causes = {
        "loss": [
            ("the loss is added up, not averaged", -right.log().sum().item()),
            ("the softmax is taken twice: predict gives probabilities, and the loss of "
             "chapter 08 takes logits", F.cross_entropy(p, truth).item()),
            ("the loss is that of the class the model chooses, not of the right one",
             -p.max(-1).values.log().mean().item()),
            ("the logarithm is missing", 1 - right.mean().item()),
            ("the sign of the loss is wrong", right.log().mean().item()),
            ("the loss is minus the mean probability", -right.mean().item()),
            ("the logarithm of the mean is taken: it must be the mean of the logarithms",
             -right.mean().log().item()),
            ("the loss is in bits: use the natural logarithm",
             -right.log2().mean().item()),
        ],
        "macro_f1": [
            ("this is the accuracy (F1 with average=\"micro\"): use average=\"macro\"",
             wanted["accuracy"]),
            ("F1 is weighted by how frequent the classes are: use average=\"macro\", each "
             "class counts the same", scores_of(TRUE, p, 5, "weighted")),
            ("classes that do not occur in the split are left out of the mean: all "
             "num_labels classes count, so that scores of two splits can be compared; "
             "name them with labels=", scores_of(TRUE, p, 5, over="present")),
            ("classes that do not occur in the split are left out of the mean: name all "
             "num_labels of them with labels=", scores_of(TRUE, p, 5, over="true")),
        ],
        "accuracy": [
            ("this is macro-F1: accuracy is the share of right answers",
             wanted["macro_f1"]),
            ("this is the share of wrong answers", 1 - wanted["accuracy"]),
            ("this is the number of right answers, not their share",
             wanted["accuracy"] * len(TRUE)),
        ],
    }
    for key, value in wanted.items():
        if abs(got[key] - value) < 1e-5:
            continue
        expect(abs(got[key] - 100 * value) > 1e-3 or key == "loss",
               f"{key} is in percent: give a number from 0 to 1")
        for hint, wrong in causes[key]:
            expect(abs(got[key] - wrong) > 1e-5, hint)
        cut = key == "loss" and any(
            abs(got[key] + right.clamp_min(10.0**-i).log().mean()) < 1e-4
            or abs(got[key] + (right + 10.0**-i).log().mean()) < 1e-4 for i in range(1, 9))
        expect(not cut, "small probabilities are cut off, or moved, by a number that is too "
               "large: 1e-12 keeps the logarithm finite and changes nothing else")
        raise Wrong(f"{key} is {got[key]:.4f}, but it must be {value:.4f} here")


@evaluate_battery.property("stays finite where the model is sure and wrong")
def evaluate_finite(function):
    model = Stub(SMALL, answer=lambda z: z * 1e4).eval()
    got = lean(function, function.thing, model, tiny_tokenizer(), split_of(SPLIT, TRUE, 3))
    expect(
        math.isfinite(got["loss"]),
        f"the loss is {got['loss']}: a probability was rounded to 0, and its logarithm is "
        "minus infinity. Guard it with clamp_min",
    )
    expect(got["loss"] > 4, "a sure and wrong answer costs too little: the clamp is too "
           f"high, the loss is {got['loss']:.2f}")


@evaluate_battery.property("works in evaluation, whatever mode the model is in")
def evaluate_mode(function):
    model = Stub(dataclasses.replace(SMALL, dropout=0.5)).train()
    split = split_of(SPLIT, TRUE, 3)
    one, two = (
        lean(function, function.thing, model, tiny_tokenizer(), split) for _ in range(2)
    )
    expect(
        one == two and not any(call.training for call in model.calls),
        "dropout is active while it measures: the model must be in evaluation mode",
    )
    expect(model.training, "afterwards the model is left in evaluation mode, and training "
           "would go on without dropout")


# save_atomically and load_tensors

save_battery = Battery(
    "save_atomically", "save_atomically(value, path): writes a file whole or not at all",
    chapter=8, takes=("value", "path"),
)


class _Boom:
    """Something that cannot be saved, which shows when half of it is written."""

    def __reduce__(self):
        raise OSError("the disk is full")


@contextlib.contextmanager
def folder():
    """A folder of its own; files made in the system's one would be noticed."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name) / "run"
        place.mkdir()
        yield place


def listing(place):
    """The files in a folder, by name."""
    return sorted(path.name for path in place.iterdir())


VALUES = [
    ("a string", "naïve ☕\nend", "x.json"), ("bytes", b"\x00\xff\r\n", "x.bin"),
    ("tensors", {"w": sample(3, 2), "history": [{"epoch": 1, "loss": 0.5}]}, "x.pt"),
]


def content(path, value):
    """Read a file back as what its value was."""
    if isinstance(value, str):
        return path.read_bytes().decode("utf-8").replace("\r\n", "\n")
    if isinstance(value, bytes):
        return path.read_bytes()
    return torch.load(path, weights_only=True)


def same(a, b):
    """Whether two values that were saved are alike."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(
            same(a[k], b[k]) for k in a)
    return type(a) is type(b) and a == b


@save_battery.property("writes strings, bytes, and anything else by torch.save")
def save_values(function):
    with folder() as place:
        for kind, value, name in VALUES:
            for path in (place / name, str(place / name)):
                function(value, path)
                path = Path(path)
                expect(
                    path.is_file(),
                    f"there is no file {path.name} afterwards, but {listing(place)}: the "
                    "file beside it must take its name at the end (os.replace)",
                )
                try:
                    got = content(path, value)
                except Exception as error:
                    raise Wrong(
                        f"{kind} cannot be read back ({type(error).__name__}): a string is "
                        "written as text in UTF-8, bytes as they are, anything else by "
                        "torch.save"
                    ) from None
                expect(
                    same(got, value),
                    f"{kind} is read back as {str(got)[:60]!r}: a string is written as "
                    "text in UTF-8, bytes as they are, anything else by torch.save",
                )
        expect(
            listing(place) == ["x.bin", "x.json", "x.pt"],
            f"it leaves other files behind: {listing(place)}",
        )


@save_battery.property("leaves the old file whole when writing fails")
def save_fails(function):
    for kind, good, bad in (
        ("torch.save", {"w": torch.ones(2)}, {"w": torch.zeros(2), "x": _Boom()}),
        ("a text", "old", "new \ud800"),
    ):
        with folder() as place:
            path = place / "x.pt"
            function(good, path)
            failed = False
            try:
                function(bad, path)
            except Broke:
                failed = True
            expect(
                path.is_file(),
                "when writing fails, the old file is gone: it is removed before the new "
                "one is whole",
            )
            try:
                whole = same(content(path, good), good)
            except Exception:
                whole = False
            expect(
                whole,
                f"{kind} fails in the middle, and the old file is lost, half a new one in "
                "its place. Write to another name in the same folder, and rename at the "
                "very end (not in a finally)",
            )
            expect(
                failed, "writing fails, and nobody hears of it: it swallows the error, and "
                "the caller believes that the new state is saved",
            )
            try:
                function(good, path)
            except Broke as broke:
                raise Wrong(
                    f"after a failure the next save fails as well: it {broke}. Write over "
                    "a draft that was left behind"
                ) from None


@save_battery.property("puts a whole new file in place of the old one, in one step")
def save_replaces(function):
    removed, real = [], os.unlink

    def watch(path, *arguments, **named):
        removed.append(Path(os.fspath(path)).name)
        return real(path, *arguments, **named)

    with folder() as place:
        path = place / "x.pt"
        for _, value, _ in VALUES:
            path.write_bytes(b"old")
            stream = path.open("rb") if os.name == "posix" else None
            try:
                with mock.patch.object(os, "unlink", watch), mock.patch.object(
                    os, "remove", watch
                ), mock.patch.object(tempfile, "tempdir", str(place / "nowhere")):
                    function(value, path)
            except Broke as broke:
                if "nowhere" in str(broke):
                    raise Wrong(
                        "the draft is made in the system's folder for temporary files: "
                        "that may lie on another disk, from which a file cannot be "
                        "renamed, only copied. Make it beside the file itself"
                    ) from None
                raise
            finally:
                still = stream.read() if stream else b"old"
                if stream:
                    stream.close()
            expect(
                "x.pt" not in removed,
                "the old file is removed before the new one has its name: a power cut in "
                "between leaves none. os.replace does both in one step",
            )
            expect(
                still == b"old",
                "it writes into the file itself (or copies into it): whoever reads it at "
                "that moment, or after a power cut, finds half. Write a file beside it, "
                "then os.replace",
            )


load_battery = Battery(
    "load_tensors", "load_tensors(path) -> what torch.save wrote", chapter=8, takes=("path",)
)


class _Trap:
    """A pickle that makes a folder when it is read."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@load_battery.property("reads tensors and plain values")
def load_values(function):
    value = VALUES[2][1] | {"n": 3, "name": "a", "flag": True, "t": (1, None)}
    with folder() as place:
        torch.save(value, place / "x.pt")
        for path in (place / "x.pt", str(place / "x.pt")):
            got = function(path)
            expect(got is not None, "it gives None: is there a return at the end?")
            expect(same(value, got), f"what was saved comes back changed: {str(got)[:80]}")


@load_battery.property("runs no code that a file holds")
def load_trap(function):
    with folder() as place:
        torch.save({"w": torch.ones(2), "x": _Trap(place / "ran")}, place / "x.pt")
        (place / "y.pt").write_bytes(pickle.dumps(_Trap(place / "ran")))
        for name in ("x.pt", "y.pt"):
            failed = None
            try:
                function(place / name)
            except Broke as broke:
                failed = broke
            expect(
                not (place / "ran").exists(),
                "it runs a command that was hidden in a file: a pickle may hold any. "
                "torch.load with weights_only=True reads tensors and plain values alone",
            )
            expect(failed is not None, "a file that would run code is read without an error")
            expect(
                isinstance(function.last_error, ValueError),
                f"a file that would run code must be refused by a ValueError, but it "
                f"{failed}: catch pickle.UnpicklingError too",
            )


@load_battery.property("refuses broken and missing files")
def load_broken(function):
    with folder() as place:
        must_refuse(
            function, FileNotFoundError, "a file that does not exist is not refused "
            "rightly", function.thing, place / "none.pt",
        )
        torch.save(VALUES[2][1], place / "x.pt")
        whole = (place / "x.pt").read_bytes()
        for what, part in (
            ("a file that was cut off in the middle", whole[: len(whole) // 2]),
            ("a file that lacks its last bytes", whole[:-9]),
            ("an empty file", b""), ("a text that is no such file", b"not a model"),
            ("a single byte", whole[:1]), ("the beginning of a pickle", b"\x80\x02}q\x00("),
        ):
            (place / "bad.pt").write_bytes(part)
            must_refuse(
                function, ValueError, f"{what} is not refused rightly: torch.load raises "
                "RuntimeError, EOFError, UnpicklingError and others; turn them all into "
                "one ValueError that names the file", function.thing, place / "bad.pt",
            )


# save_model and load_model

FILES = ["best_model.pt", "config.json", "tokenizer.json"]
NAMES = ["wütend", "joy", "sad"]
keep_battery = Battery(
    "save_model",
    "save_model(folder, model, tokenizer, label_names): config.json, tokenizer.json and "
    "best_model.pt", chapter=8, takes=("folder", "model", "tokenizer", "label_names"),
)


@keep_battery.property("writes config, tokenizer and weights")
def keep_files(function):
    model = Stub(SMALL)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with folder() as place:
        new = place / "deep" / "new"
        for where in (new, str(new)):  # the second time over the first
            function(where, model, tiny_tokenizer(), tuple(NAMES))
        expect(new.is_dir(), "the folder is not made where it is missing")
        missing = [name for name in FILES if name not in listing(new)]
        expect(not missing, f"{', '.join(missing)} is missing; it wrote {listing(new)}")
        others = sorted(set(listing(new)) - set(FILES))
        expect(not others, f"it leaves other files behind: {others}")
        try:
            config = json.loads((new / "config.json").read_text("utf-8"))
        except ValueError:
            raise Wrong("config.json is not JSON in UTF-8: write json.dumps(…)") from None
        expect(
            isinstance(config, dict) and list(config.get("label_names", ())) == NAMES,
            "config.json does not hold label_names in their order: without them nobody "
            f"knows what a score means. It holds {str(config)[:120]}",
        )
        wrong = {
            k for k, v in dataclasses.asdict(SMALL).items()
            if not isinstance(config, dict) or config.get(k, "missing") != v
        }
        expect(
            not wrong, "config.json lacks fields of model.config, from which the model is "
            f"built again: {', '.join(sorted(wrong))}; asdict gives them all",
        )
        try:
            same_tokenizer = Tokenizer.from_file(str(new / "tokenizer.json"))
        except Exception:
            raise Wrong("tokenizer.json is no tokenizer: tokenizer.to_str() is its text"
                        ) from None
        expect(
            ids_of(same_tokenizer, TEXTS, 99) == ids_of(tiny_tokenizer(), TEXTS, 99),
            "the saved tokenizer cuts texts differently: save all of it "
            "(tokenizer.to_str()), not its vocabulary alone",
        )
        try:
            weights = torch.load(new / "best_model.pt", weights_only=True)
        except Exception:
            raise Wrong(
                "best_model.pt cannot be read with weights_only=True: the whole model was "
                "saved, a pickle of its code, not its weights (model.state_dict())"
            ) from None
        expect(
            isinstance(weights, dict) and same(dict(weights), before),
            "best_model.pt does not hold the model's weights under their names: save "
            "model.state_dict()",
        )
    expect(same(dict(model.state_dict()), before), "saving changes the model's weights")


@keep_battery.property("never leaves half a file")
def keep_atomically(function):
    if os.name != "posix":
        raise Skip("looked at on Linux and macOS only")
    with folder() as place:
        for name in FILES:
            (place / name).write_bytes(b"old")
        streams = {name: (place / name).open("rb") for name in FILES}
        function(place, Stub(SMALL), tiny_tokenizer(), NAMES)
        kept = {name: stream.read() for name, stream in streams.items()}
        for stream in streams.values():
            stream.close()
    for name in FILES:
        expect(
            kept[name] == b"old",
            f"{name} is written over in place: if the machine stops then, neither the old "
            "model nor the new one is left. Use save_atomically for all three",
        )


fetch_battery = Battery(
    "load_model", "load_model(folder) -> model, tokenizer, label_names", chapter=8,
    takes=("folder",),
)


def saved(place, seed=0, **changed):
    """Write a folder as save_model would, with the reader's own classifier."""
    config_class = book("classifier", "EmoformerConfig", 7)
    model_class = book("classifier", "TransformerForSequenceClassification", 7)
    shape = {"vocab_size": SMALL.vocab_size, "d_model": 8, "num_heads": 2, "d_ff": 8,
             "num_layers": 1, "max_len": 12, "num_labels": 3, "dropout": 0.5, **changed}
    torch.manual_seed(seed)
    try:
        config = config_class(**shape)
        model = model_class(config)
    except NotImplementedError:
        raise Skip("needs the classifier of chapter 07, which is not written yet") from None
    described = dataclasses.asdict(config) | {"label_names": NAMES}
    (place / "config.json").write_text(json.dumps(described), "utf-8")
    (place / "tokenizer.json").write_text(tiny_tokenizer().to_str(), "utf-8")
    torch.save(model.state_dict(), place / "best_model.pt")
    return model


@fetch_battery.property("names the file that is missing")
def fetch_missing(function):
    with folder() as place:
        must_refuse(
            function, FileNotFoundError, "a folder that does not exist is not refused "
            "rightly", function.thing, place / "none",
        )
        saved(place)
        for name in FILES:
            kept = (place / name).read_bytes()
            (place / name).unlink()
            must_refuse(
                function, FileNotFoundError, f"{name} is missing, which is not refused "
                "rightly: look for all three files first", function.thing, place,
            )
            expect(
                name in str(function.last_error),
                f"the error does not say that {name} is missing: name the file",
            )
            (place / name).write_bytes(kept)


@fetch_battery.property("gives back model, tokenizer and names")
def fetch_whole(function):
    with folder() as place:
        model = saved(place, seed=5)
        for where in (place, str(place)):
            result = lean(function, function.thing, where)
            expect(result is not None, "it gives None: is there a return at the end?")
            expect(
                isinstance(result, tuple) and len(result) == 3,
                "it must return three things: model, tokenizer, label_names",
            )
            loaded, tokenizer, names = result
            expect(
                isinstance(loaded, nn.Module) and isinstance(tokenizer, Tokenizer),
                "it must return model, tokenizer and label_names, in this order",
            )
            expect(list(names) == NAMES, f"the label names come back as {names}")
            expect(
                same(dict(model.state_dict()), dict(loaded.state_dict())),
                "the model that comes back has other weights than were saved: "
                "load_state_dict is missing, or its result is not the model that is "
                "returned",
            )
            expect(
                not loaded.training,
                "the model comes back in training mode, with dropout active: .eval()",
            )
            expect(
                dataclasses.asdict(loaded.config) == dataclasses.asdict(model.config),
                "the model comes back with another config than was saved",
            )
            expect(
                ids_of(tokenizer, TEXTS, 99) == ids_of(tiny_tokenizer(), TEXTS, 99),
                "the tokenizer that comes back cuts texts differently",
            )


@fetch_battery.property("runs no code that the weights' file holds")
def fetch_trap(function):
    with folder() as place:
        saved(place)
        torch.save({"w": _Trap(place / "ran")}, place / "best_model.pt")
        with contextlib.suppress(Broke):
            function(place)
        expect(not (place / "ran").exists(), "it runs a command that was hidden in "
               "best_model.pt: read it with load_tensors")


@fetch_battery.property("refuses damaged files, and files that do not fit")
def fetch_damaged(function):
    with folder() as place:
        model = saved(place)
        good = {name: (place / name).read_bytes() for name in FILES}
        config = json.loads(good["config.json"])
        bare = {k: v for k, v in config.items() if k != "label_names"}
        weights = dict(model.state_dict())
        first = next(iter(weights))
        fewer = {k: v for k, v in weights.items() if k != first}
        cases = [
            ("config.json", b"{", "half a config.json"),
            ("config.json", json.dumps(bare).encode(), "a config.json without label_names"),
            ("config.json", json.dumps(config | {"n_embd": 3}).encode(),
             "a config.json with a field that the model does not know"),
            ("config.json", json.dumps(config | {"num_heads": 3}).encode(),
             "a config.json that breaks a rule of the config"),
            ("tokenizer.json", b"{}", "a tokenizer.json that holds no tokenizer"),
            ("best_model.pt", good["best_model.pt"][:900], "half a best_model.pt"),
            ("best_model.pt", fewer, "a best_model.pt that lacks a weight (strict=False "
             "would leave it random)"),
            ("best_model.pt", weights | {"more": torch.ones(1)},
             "a best_model.pt with a weight that the model does not know"),
            ("best_model.pt", weights | {first: torch.ones(2, 2)},
             "a best_model.pt with a weight of another shape"),
            ("best_model.pt", torch.ones(3), "a best_model.pt that holds one tensor alone"),
        ]
        for name, bad, what in cases:
            if isinstance(bad, bytes):
                (place / name).write_bytes(bad)
            else:
                torch.save(bad, place / name)
            must_refuse(
                function, ValueError, f"{what} is not refused rightly", function.thing, place
            )
            (place / name).write_bytes(good[name])


# balance

balance_battery = Battery(
    "balance", "balance(labels, num_labels) -> (num_labels,) float32", chapter=8,
    takes=("labels", "num_labels"),
)


@balance_battery.property("weighs each class by how rare it is, 1 on average over the posts")
def balance_plain(function):
    labels = [0] * 7 + [2] * 2 + [1] * 3 + [3] + [0]
    counts = torch.tensor([8.0, 3.0, 2.0, 1.0])
    n, k = counts.sum(), 4
    weights = function(list(labels), k)
    if isinstance(weights, (list, np.ndarray)):
        raise Wrong("it must give a tensor, float32")
    explain(weights, n / (k * counts), [
        ("the weights are inverted: frequent classes count more", lambda: counts / n),
        ("the weights are inverted: frequent classes count more", lambda: k * counts / n),
        ("the weights are inverted: frequent classes count more",
         lambda: counts / counts.max()),
        ("these are the counts: divide the number of posts by them", lambda: counts),
        ("the weights are one over the counts: multiply by posts / classes, so that a post "
         "weighs 1 on average", lambda: 1 / counts),
        ("the number of classes is left out below the line: a post would weigh as much as "
         "there are classes, on average", lambda: n / counts),
        ("the weights sum to 1: they must be 1 on average over the posts",
         lambda: (1 / counts) / (1 / counts).sum()),
        ("the weights sum to the number of classes: they must be 1 on average over the "
         "posts, not over the classes", lambda: k * (1 / counts) / (1 / counts).sum()),
        ("the rarest class weighs 1: they must be 1 on average over the posts",
         lambda: counts.min() / counts),
        ("the most frequent class weighs 1: they must be 1 on average over the posts",
         lambda: counts.max() / counts),
        ("a root is taken: each class's weight times its posts must be the same",
         lambda: (n / (k * counts)).sqrt()),
        ("the logarithm is taken: the weights are posts / (classes · posts of the class)",
         lambda: (n / counts).log()),
        ("this is one minus the share: divide by the share instead",
         lambda: 1 - counts / n),
        ("one is added to every count, which is right for an empty class alone",
         lambda: n / (k * (counts + 1))),
        ("all classes weigh the same", lambda: torch.ones(4)),
        ("the weights are whole numbers: // throws the rest away",
         lambda: n // (k * counts)),
    ], "it is not posts / (classes · posts of the class)")
    expect_tensor(weights, dtype=torch.float32, what="the weights")
    expect(
        abs(weights[torch.tensor(labels)].mean() - 1) < 1e-5, "a post does not weigh 1 on "
        "average",
    )


@balance_battery.property("has a weight for each class, one without a post too")
def balance_empty(function):
    weights = function([0, 0, 2, 2, 2, 0], 5)
    expect_tensor(weights, what="the weights")
    expect(
        tuple(weights.shape) == (5,),
        f"five classes need five weights, but it gives {tuple(weights.shape)}: classes "
        "without a post are forgotten. Look for minlength=num_labels",
    )
    expect(
        bool(weights.isfinite().all()),
        "a class without a post gets an infinite weight, and infinite times 0 is NaN in the "
        "loss: count at least 1",
    )
    expect(
        bool((weights[[0, 2]] - 0.4).abs().max() < 1e-5),
        "with empty classes the others get other weights than posts / (classes · posts): "
        "all num_labels classes count below the line",
    )


# resume

resume_battery = Battery(
    "resume",
    "resume(path, settings, model, optimizer) -> history; the file holds settings, "
    "history, model and optimizer", chapter=8,
    takes=("path", "settings", "model", "optimizer"),
)
SETTINGS = {"training": {"epochs": 3, "hide": 0.3}, "model": {"d_model": 6}, "posts": 9}
HISTORY = [{"epoch": 1, "loss": 1.5}, {"epoch": 2, "loss": 1.25}]


def run_state(place, seed=0):
    """A model and an optimizer two steps old, and the file that keeps them."""
    model = Stub(SMALL, seed=seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(2):
        model(torch.tensor([[CLS, 6, SEP]])).square().sum().backward()
        optimizer.step()
    torch.save({
        "settings": SETTINGS, "history": HISTORY, "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
    }, place / "state.pt")
    return model, optimizer


def fresh_run():
    """A model and an optimizer that have not begun."""
    model = Stub(SMALL, seed=9)
    return model, torch.optim.Adam(model.parameters(), lr=0.01)


def moments(optimizer):
    """An optimizer's running means, by place."""
    return {k: v["exp_avg"] for k, v in optimizer.state_dict()["state"].items()}


@resume_battery.property("begins a new run where there is no file")
def resume_new(function):
    ready()
    with folder() as place:
        model, optimizer = fresh_run()
        before = {k: v.clone() for k, v in model.state_dict().items()}
        history = function(place / "state.pt", copy.deepcopy(SETTINGS), model, optimizer)
        expect(history is not None, "without a file it gives None: it must give an empty "
               "history, []")
        expect(history == [], f"without a file the history must be empty, but it is {history}")
        expect(same(before, dict(model.state_dict())), "without a file the model changes")


@resume_battery.property("brings back history, weights and the optimizer's memory")
def resume_whole(function):
    ready()
    with folder() as place:
        old, old_optimizer = run_state(place)
        model, optimizer = fresh_run()
        history = function(place / "state.pt", copy.deepcopy(SETTINGS), model, optimizer)
    expect(history is not None, "it gives None: is there a return of the history at the end?")
    expect(
        history == HISTORY,
        "the history is lost: it gives an empty list, and training would start over"
        if history == [] else f"the history comes back as {str(history)[:80]}",
    )
    expect(
        same(dict(old.state_dict()), dict(model.state_dict())),
        "the model does not get the saved weights: it would go on from random ones",
    )
    expect(
        same(moments(old_optimizer), moments(optimizer)),
        "the optimizer does not get its running means back: the first steps after "
        "resuming differ from those of a run that never stopped",
    )


@resume_battery.property("refuses a run with other settings, and a damaged file")
def resume_refuses(function):
    ready()
    for other in (
        SETTINGS | {"posts": 10}, SETTINGS | {"training": {"epochs": 4, "hide": 0.3}},
        SETTINGS | {"model": {"d_model": 8}}, {**SETTINGS, "groups": [1]},
    ):
        with folder() as place:
            run_state(place)
            model, optimizer = fresh_run()
            before = {k: v.clone() for k, v in model.state_dict().items()}
            must_refuse(
                function, ValueError, "a folder with a run of other settings is not "
                "refused rightly: two runs would become one. Compare all settings, nested "
                "ones too", function.thing, place / "state.pt", other, model, optimizer,
            )
            expect(
                same(before, dict(model.state_dict())),
                "a run with other settings is refused only after its weights were loaded: "
                "compare first",
            )
    with folder() as place:
        run_state(place)
        whole = (place / "state.pt").read_bytes()
        (place / "state.pt").write_bytes(whole[: len(whole) // 2])
        must_refuse(
            function, ValueError, "half a file is not refused rightly: read it with "
            "load_tensors, and don't take a damaged one for none", function.thing,
            place / "state.pt", SETTINGS, *fresh_run(),
        )


# training_step

step_battery = Battery(
    "training_step",
    "training_step(model, batch, optimizer, config, accelerator, weights=None) -> the "
    "loss, without gradient", chapter=8,
    takes=("model", "batch", "optimizer", "config", "accelerator", "weights"),
)


class _Accelerator:
    """What a step asks of accelerate, on one CPU."""

    device = torch.device("cpu")
    sync_gradients = is_main_process = True
    num_processes, process_index, mixed_precision = 1, 0, "no"

    def backward(self, loss, **named):
        loss.backward(**named)

    def clip_grad_norm_(self, parameters, max_norm, norm_type=2):
        return nn.utils.clip_grad_norm_(parameters, max_norm, norm_type)

    def clip_grad_value_(self, parameters, clip_value):
        nn.utils.clip_grad_value_(parameters, clip_value)

    def unwrap_model(self, model):
        return model

    def __getattr__(self, name):  # whatever else someone may ask
        ready("accelerate")
        return getattr(importlib.import_module("accelerate").Accelerator(cpu=True), name)


def step_batches():
    """Three batches of four texts with some padding."""
    batches = []
    for seed in range(3):
        ids = torch.randint(5, SMALL.vocab_size, (4, 6), generator=dice_of(seed))
        mask = torch.arange(6) < torch.tensor([6, 3, 5, 2])[:, None]
        batches.append({
            "input_ids": ids.masked_fill(~mask, PAD), "attention_mask": mask,
            "labels": torch.tensor([[0, 2, 1, 1], [2, 2, 0, 1], [1, 0, 0, 2]][seed]),
        })
    return batches


STEP_WEIGHTS = torch.tensor([0.25, 1.0, 4.0])
RIGHT_ORDER = ("zero", "backward", "clip", "step")


def stepped(clip, order=RIGHT_ORDER, weights=None, loss=F.cross_entropy, bound="norm",
            masked=True, zero_first=False):
    """The weights after each of three steps, right or with one mistake."""
    model = Stub(SMALL, seed=1).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    parameters, after = list(model.parameters()), []

    def cut():
        grads = [p.grad for p in parameters if p.grad is not None]
        if bound == "norm":
            nn.utils.clip_grad_norm_(parameters, clip)
        elif bound == "value":
            nn.utils.clip_grad_value_(parameters, clip)
        elif bound == "each":
            for p in parameters:
                nn.utils.clip_grad_norm_([p], clip)
        elif bound == "always" and grads:
            total = sum(g.square().sum() for g in grads).sqrt()
            for g in grads:
                g.mul_(clip / total)
        elif isinstance(bound, float):
            nn.utils.clip_grad_norm_(parameters, bound)
        elif bound in ("1", "inf"):
            nn.utils.clip_grad_norm_(parameters, clip, float(bound))

    for number, batch in enumerate(step_batches()):
        logits = model(batch["input_ids"], batch["attention_mask"] if masked else None)
        value = loss(logits, batch["labels"], weights)
        for what in order:
            if what == "zero" and not (zero_first and number):
                optimizer.zero_grad()
            elif what == "backward":
                value.backward(retain_graph=order.count("backward") > 1)
            elif what == "clip":
                cut()
            elif what == "step":
                optimizer.step()
        after.append(torch.cat([p.detach().flatten() for p in parameters]))
    return torch.stack(after)


def steps_by(function, clip, weights=None, **changed):
    """The same by the reader's step; their losses too."""
    ready()
    model = Stub(dataclasses.replace(SMALL, dropout=changed.pop("dropout", 0.0)), seed=1)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    config, after, losses = settings(clip=clip, **changed), [], []
    model.events, real = [], nn.utils.clip_grad_norm_

    def heard(name, call):
        def noted(*arguments, **named):
            model.events.append(name)
            return call(*arguments, **named)
        return noted

    optimizer.zero_grad = heard("zero", optimizer.zero_grad)
    optimizer.step = heard("step", optimizer.step)
    model.head.bias.register_post_accumulate_grad_hook(
        lambda _: model.events.append("backward"))
    for batch in step_batches():
        model.events.clear()
        function.manners.pop("input", None)
        with mock.patch.object(nn.utils, "clip_grad_norm_", heard("clip", real)):
            loss = function(
                model, batch, optimizer, config, _Accelerator(),
                *(() if weights is None else (weights,)),
            )
        if "input" in function.manners:
            function.manners.pop("input")
            raise Wrong(
                "it takes the labels out of the batch that was passed in: whoever uses "
                "that batch again finds none. Copy it first, batch = dict(batch)"
            )
        losses.append(loss)
        after.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    return torch.stack(after), losses, model


def expect_order(events):
    """Say what is wrong with the order of the lines of a step, if anything."""
    first = {name: events.index(name) for name in events[::-1]}
    last = {name: i for i, name in enumerate(events)}
    expect("backward" in first, "no gradients are computed: backward is missing")
    expect("step" in first, "the weights never move: optimizer.step() is missing")
    expect(
        first["step"] > first["backward"],
        "the optimizer steps before backward: it moves by the gradients of the batch "
        "before, or by none. The order is zero_grad, backward, clip, step",
    )
    expect(
        not any(first["backward"] < i < first["step"] for i, name in enumerate(events)
                if name == "zero"),
        "nothing is learned: zero_grad comes after backward and wipes out what it "
        "computed. Clear first, then backward, clip and step",
    )
    expect(events.count("step") == 1, "the optimizer steps twice")
    expect(
        last.get("clip", last["backward"]) >= last["backward"],
        "the gradients are clipped before backward computes them: clip between backward "
        "and step",
    )
    expect(
        first.get("clip", 0) < first["step"],
        "the gradients are clipped only after the step, when they have done their work: "
        "clip between backward and step",
    )


def order_causes(clip, weights):
    """What wrong orders and losses give."""
    def wrong(hint, **mistake):
        mistake.setdefault("weights", weights)
        return hint, lambda: stepped(clip, **mistake)

    def over_batch(logits, labels, w):
        each = F.cross_entropy(logits, labels, reduction="none")
        return (each if w is None else each * w[labels]).mean()

    no_zero = ("zero_grad is missing: PyTorch adds each step's gradients to those of all "
               "steps before")
    return [
        wrong(no_zero, order=("backward", "clip", "step")),
        wrong(no_zero, zero_first=True),
        wrong(no_zero, order=("backward", "step")),
        wrong("the gradients of the step do not reach the weights: they never move",
              order=("zero",)),
        wrong("the gradients are not clipped: clip between backward and step",
              order=("zero", "backward", "step")),
        wrong("the gradients are clipped by value, each number alone, which turns their "
              "direction: clip the length of all together (clip_grad_norm_)", bound="value"),
        wrong("each parameter's gradient is clipped by itself, which turns the direction of "
              "the step: clip the length of all together", bound="each"),
        wrong("small gradients are scaled up: only where the length exceeds config.clip is "
              "it scaled down to it", bound="always"),
        wrong("gradients are clipped at a fixed 1.0: take config.clip", bound=1.0),
        wrong("the largest gradient is clipped, not the length of all (norm_type)",
              bound="inf"),
        wrong("the sum of absolute gradients is clipped, not their length (norm_type)",
              bound="1"),
        wrong("backward is called twice: the gradients are doubled",
              order=("zero", "backward", "backward", "clip", "step")),
        wrong("the loss is taken of probabilities: cross_entropy takes logits, and the "
              "softmax is in it",
              loss=lambda z, y, w: F.cross_entropy(z.softmax(-1), y, w)),
        wrong("the loss is added up, not averaged",
              loss=lambda z, y, w: F.cross_entropy(z, y, w, reduction="sum")),
        wrong("the class weights are not used: pass weights on", weights=None),
        wrong("the weighted loss is divided by the size of the batch, not by the sum of the "
              "weights", loss=over_batch),
        wrong("the sign of the loss is wrong: the model climbs",
              loss=lambda z, y, w: -F.cross_entropy(z, y, w)),
        wrong("the model is called without attention_mask: padding counts as text",
              masked=False),
        wrong("labels are smoothed, which chapter 08 does only in an exercise",
              loss=lambda z, y, w: F.cross_entropy(z, y, w, label_smoothing=0.1)),
        wrong("the loss is scaled down by the size of the batch, or by the number of "
              "steps", loss=lambda z, y, w: F.cross_entropy(z, y, w) / len(y)),
    ]


@step_battery.property("clears, computes gradients, and moves by them")
def step_plain(function):
    for weights in (None, STEP_WEIGHTS):
        after, _, model = steps_by(function, 1e4, weights)
        if not near(after, stepped(1e4, weights=weights)):
            expect_order(model.events)
            expect(
                not any(call.half for call in model.calls),
                "with precision=\"no\" the forward pass runs in bfloat16: enabled=… must "
                "depend on choose_precision(config.precision)",
            )
        explain(
            after, stepped(1e4, weights=weights), order_causes(1e4, weights),
            "after three steps with plain SGD the weights are not where they must be. The "
            "order: forward, loss, zero_grad, backward, clip, step"
            + ("" if weights is None else "; without class weights they are"),
        )


@step_battery.property("clips the length of all gradients together, between the two")
def step_clip(function):
    after, _, model = steps_by(function, 0.05)
    if not near(after, stepped(0.05)):
        expect_order(model.events)
    explain(
        after, stepped(0.05), order_causes(0.05, None),
        "where gradients are longer than config.clip the weights do not move as they must: "
        "after backward and before step, the length of all gradients as one vector must be "
        "scaled down to config.clip",
    )


@step_battery.property("gives the loss of the batch, without its graph")
def step_loss(function):
    _, losses, _ = steps_by(function, 1e4, STEP_WEIGHTS)
    model = Stub(SMALL, seed=1)
    batch = step_batches()[0]
    wanted = F.cross_entropy(
        model(batch["input_ids"], batch["attention_mask"]), batch["labels"], STEP_WEIGHTS
    )
    loss = losses[0]
    if isinstance(loss, (float, int)):
        raise Wrong(
            "the loss is a plain number: .item() waits for the GPU in every step. Return "
            "the tensor, detached; whoever prints it takes .item()"
        )
    if isinstance(loss, torch.Tensor) and loss.requires_grad:
        raise Wrong(
            "the loss comes back with its whole graph: a list of such losses keeps every "
            "activation of the epoch in memory. Return loss.detach()"
        )
    expect_tensor(loss, (), torch.float32, "the loss")
    expect(
        near(loss, wanted.detach()),
        f"the loss must be {wanted.item():.4f} here, but it is {loss.item():.4f}: that of "
        "this batch, before the step",
    )


@step_battery.property("trains in training mode")
def step_mode(function):
    _, _, model = steps_by(function, 1e4, dropout=0.5)
    expect(
        all(call.training for call in model.calls),
        "the model is put into evaluation mode, so dropout never acts: leave the mode to "
        "the caller, who says model.train()",
    )
    expect(model.training, "after the step the model is left in evaluation mode")
    expect(
        len(model.calls) == 3,
        f"three steps take {len(model.calls)} forward passes: one a step is enough",
    )
    expect(
        all(call.grad for call in model.calls),
        "the forward pass is made without gradients: no torch.no_grad() here",
    )


@step_battery.property("multiplies in bfloat16 where the config says so, and there alone")
def step_precision(function):
    _, _, model = steps_by(function, 1e4, precision="no")
    expect(
        not any(call.half for call in model.calls),
        "with precision=\"no\" the forward pass runs in bfloat16: enabled=… must depend on "
        "choose_precision(config.precision)",
    )
    _, losses, model = steps_by(function, 1e4, precision="bf16")
    expect(
        all(call.half for call in model.calls),
        "with precision=\"bf16\" the forward pass runs in float32: put it under "
        "torch.autocast(accelerator.device.type, torch.bfloat16, enabled=…)",
    )
    expect(
        all(p.dtype == torch.float32 for p in model.parameters()),
        "the parameters themselves become bfloat16, which loses small steps: autocast "
        "converts for the products alone",
    )
    expect(
        losses[0].dtype == torch.float32,
        f"the loss is computed in {losses[0].dtype}: turn logits into float32 first, "
        "logits.float()",
    )


# train

train_battery = Battery(
    "train",
    "train(model, tokenizer, dataset, config, folder, *, groups=None, "
    'tracker="tensorboard") -> history', chapter=8,
    takes=("model", "tokenizer", "dataset", "config", "folder", "groups", "tracker"),
)
Run = dataclasses.make_dataclass(
    "Run", [(k, type(v), v) for k, v in DEFAULTS.items()], frozen=True
)
QUICK = {"epochs": 3, "batch_size": 8, "hide": 0.0, "bpe_dropout": 0.0, "precision": "no",
         "learning_rate": 0.05, "warmup": 0.25}


class PowerCut(KeyboardInterrupt):
    """The machine stops."""


def posts(count, seed=0, classes=3):
    """Texts whose first letter is their class."""
    chance = random.Random(seed)
    labels = [chance.choice([0, 0, 1, 2][: classes + 1]) for _ in range(count)]
    return [
        "abc"[y] + " " + " ".join(
            "".join(chance.choices("defgh", k=chance.randint(1, 5)))
            for _ in range(chance.randint(1, 4))
        ) for y in labels
    ], labels


def splits(train=22, validation=9, labels=None):
    """A DatasetDict with a training and a validation split."""
    first, second = posts(train), posts(validation, seed=1)
    made = {"train": split_of(*first, 3),
            "validation": split_of(second[0], labels or second[1], 3)}
    return importlib.import_module("datasets").DatasetDict(made)


@contextlib.contextmanager
def watched(steps, stop_at=None):
    """Write down every step that any optimizer takes."""
    def note(optimizer, _arguments, _named):
        if type(optimizer).__name__ == "AcceleratedOptimizer":
            return
        if len(steps) + 1 == stop_at:
            raise PowerCut
        grads = [
            p.grad for g in optimizer.param_groups for p in g["params"]
            if p.grad is not None
        ]
        steps.append(SimpleNamespace(
            lr=[float(g["lr"]) for g in optimizer.param_groups], kind=type(optimizer),
            length=float(sum(g.square().sum() for g in grads) ** 0.5),
            decay={id(p): g["weight_decay"] for g in optimizer.param_groups
                   for p in g["params"]},
        ))

    handle = register_optimizer_step_pre_hook(note)
    try:
        yield
    finally:
        handle.remove()


def run_of(function, place, model, dataset=None, stop_at=None, groups=None, **changed):
    """Train by the reader's function; what came of it, and each step."""
    ready("datasets", "accelerate", "tqdm", "sklearn.metrics")
    run, steps = Run(**{**QUICK, **changed}), []
    named = {} if groups is None else {"groups": groups}
    dataset, history = dataset or splits(), None
    with watched(steps, stop_at), contextlib.redirect_stderr(io.StringIO()):
        try:
            # Not as arguments: two equal datasets are not equal to `run`.
            history = lean(function, lambda: function.thing(
                model, tiny_tokenizer(), dataset, run, place, tracker=None, **named
            ))
        except PowerCut:
            pass
        finally:
            # A run may set the seed: it decides what is left to chance in it.
            function.manners.pop("seed", None)
    if stop_at is None:
        expect(
            isinstance(history, list) and all(isinstance(row, dict) for row in history),
            "it must return the history, a list of dicts, one an epoch; it returns "
            f"{type(history).__name__}",
        )
    return SimpleNamespace(history=history, steps=steps, model=model, run=run)


@train_battery.property("runs every epoch over every post, and measures after each")
def train_history(function):
    with folder() as place:
        new = place / "a" / "new"
        done = run_of(function, new, Stub(SMALL))
        expect(
            len(done.steps) == 9,
            f"22 posts in batches of 8, three epochs: 9 steps, but {len(done.steps)} are "
            "taken" + (": the last, smaller batch is left out" if len(done.steps) == 6
                       else ": one epoch only" if len(done.steps) == 3 else ""),
        )
        history = done.history
        expect(len(history) == 3, f"three epochs, but the history has {len(history)} rows")
        for row in history:
            for key in ("epoch", "train_loss", "loss", "macro_f1", "accuracy"):
                expect(key in row, f"a row of the history lacks {key!r}: {sorted(row)}")
                expect_number(row[key], f"{key} in the history")
        numbers = [row["epoch"] for row in history]
        expect(numbers == [1, 2, 3], f"the epochs are numbered {numbers}, not from 1")
        seen = [call for call in done.model.calls if not call.training]
        texts = sum(len(call.ids) for call in seen)
        expect(
            texts >= 3 * 9,
            "the validation split is not measured after each epoch in evaluation mode",
        )
        asked = {tuple(i for i in row.tolist() if i != PAD) for call in seen for row in call.ids}
        expect(
            asked >= set(map(tuple, ids_of(tiny_tokenizer(), posts(9, seed=1)[0], 12))),
            "what is measured after each epoch is not the validation split: on the train "
            "split a model that learns by heart looks best",
        )
        missing = [name for name in FILES if name not in listing(new)]
        expect(not missing, f"the folder lacks {', '.join(missing)}: save_model")


@train_battery.property("learns: the loss falls, and the model answers better")
def train_learns(function):
    with folder() as place:
        model = Stub(SMALL)
        done = run_of(function, place, model, epochs=8, learning_rate=0.1)
        losses = [row["train_loss"] for row in done.history]
        expect(
            losses[-1] < 0.6 * losses[0],
            f"the training loss goes from {losses[0]:.2f} to {losses[-1]:.2f}, on posts "
            "that a tiny model learns at once: look at training_step, and whether labels "
            "stay with their texts",
        )
        taught = [call for call in model.calls if call.grad]
        expect(
            bool(taught) and all(call.training for call in taught),
            "the model trains in evaluation mode from some step on: evaluation leaves it "
            "there. model.train() at the beginning of each epoch",
        )


@train_battery.property("train_loss is the mean of the epoch, weighted where asked")
def train_weights(function):
    texts, labels = posts(22)
    truth = torch.tensor(labels)
    counts = torch.bincount(truth, minlength=3)
    logits = answers(Stub(SMALL).eval(), texts, "logits")
    weighted = F.cross_entropy(logits, truth, len(truth) / (3 * counts))
    plain = F.cross_entropy(logits, truth)
    with folder() as place:
        for on, wanted in ((False, plain), (True, weighted)):
            got = run_of(
                function, place / str(on), Stub(SMALL), epochs=1, batch_size=32,
                learning_rate=1e-12, class_weights=on,
            ).history[0]["train_loss"]
            if abs(got - wanted) < 1e-4:
                continue
            expect(
                not on or abs(got - plain) > 1e-4,
                "config.class_weights is not looked at: the loss is the same with it as "
                "without",
            )
            raise Wrong(
                f"with class_weights={on} an epoch of one batch at next to no learning rate "
                f"must have the loss {wanted:.4f}, but train_loss is {got:.4f}"
                + (": weigh by balance(labels, num_labels)" if on else
                   ": weights are used although they are off" if abs(got - weighted) < 1e-4
                   else "")
            )
        got = run_of(
            function, place / "more", Stub(SMALL), epochs=1, learning_rate=1e-12
        ).history[0]["train_loss"]
        expect(
            abs(got - plain) < 0.25 * plain,
            f"train_loss is {got:.3f} where the posts' mean loss is {plain:.3f}: average "
            "over the batches of the epoch, not their sum and not the last one",
        )


def schedule_causes(warmup, total=12, epoch=3):
    """What wrong schedules give over a run of four epochs of three steps."""
    first, short = round(warmup * total), round(warmup * epoch)
    again = "the schedule starts over in every epoch: count steps over the whole run"
    return [
        (hint, lambda f=f: torch.tensor([float(f(s)) for s in range(total)]))
        for hint, f in (
            ("the learning rate never changes: set it in every group before each step",
             lambda s: 1.0),
            (again, lambda s: rate(s % epoch, max(1, short), epoch)),
            (again, lambda s: rate(s % epoch, short, epoch)),
            (again, lambda s: rate(s % epoch, first, total)),
            ("the rate changes once an epoch: set it before each step",
             lambda s: rate(s // epoch * epoch, first, total)),
            ("the schedule counts epochs, not steps",
             lambda s: rate(s // epoch, first, total)),
            ("the schedule counts epochs, not steps",
             lambda s: rate(s // epoch, round(4 * warmup), 4)),
            ("the rate is one step late: set it before the step, from the number of steps "
             "done", lambda s: rate(max(s - 1, 0), first, total)),
            ("the rate is one step early: step counts what is done, from 0",
             lambda s: rate(s + 1, first, total)),
            ("warmup is a share of the steps: multiply by their number",
             lambda s: rate(s, warmup, total)),
            ("there is no warm-up: pass warmup=round(config.warmup * total)",
             lambda s: rate(s, 0, total)),
            ("total is the steps of one epoch: it must be those of the whole run",
             lambda s: rate(s, short, epoch)),
            ("total leaves out the last, smaller batches: 22 posts in batches of 8 are 3 "
             "steps; round up", lambda s: rate(s, round(8 * warmup), 8)),
        )
    ]


@train_battery.property("moves the learning rate up and down, step by step")
def train_rates(function):
    with folder() as place:
        for warmup in (0.25, 0.0):
            done = run_of(function, place / str(warmup), Stub(SMALL), epochs=4, warmup=warmup)
            mine = torch.tensor([step.lr[0] for step in done.steps]) / 0.05
            if len(mine) != 12:
                raise Wrong(f"four epochs of three batches are 12 steps, not {len(mine)}")
            wanted = torch.tensor([rate(s, round(12 * warmup), 12) for s in range(12)])
            explain(
                mine, wanted, schedule_causes(warmup),
                "the learning rates of the steps are not config.learning_rate times "
                "learning_rate_factor(step, warmup=…, total=…): "
                + ", ".join(f"{v:.2f}" for v in mine.tolist()),
            )


@train_battery.property("uses AdamW, decays matrices alone, and clips")
def train_optimizer(function):
    with folder() as place:
        model = Stub(SMALL)
        done = run_of(function, place, model, clip=1e-3, weight_decay=0.3, epochs=1)
        kind = done.steps[0].kind
        expect(
            issubclass(kind, torch.optim.AdamW) or "adamw" in kind.__name__.lower(),
            f"the optimizer is {kind.__name__}: the chapter's is AdamW, in which the decay "
            "is apart from the gradient",
        )
        decays = done.steps[0].decay
        for name, p in model.named_parameters():
            expect(id(p) in decays, f"{name} is not in the optimizer: it never learns")
            wanted = 0.3 if p.ndim >= 2 else 0.0
            expect(
                decays[id(p)] == wanted,
                f"{name} has weight_decay {decays[id(p)]}, but it must be {wanted}: pass "
                "parameter_groups(model, config.weight_decay) to AdamW",
            )
        longest = max(step.length for step in done.steps)
        expect(
            longest < 1.01e-3,
            f"with clip=0.001 a step is taken with gradients of length {longest:.4f}: they "
            "are not clipped before the step",
        )


@train_battery.property("takes groups of parameters, each at its scale")
def train_groups(function):
    with folder() as place:
        model = Stub(SMALL)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        groups = [
            {"params": [model.head.weight], "weight_decay": 0.1, "scale": 0.5},
            {"params": [model.head.bias], "weight_decay": 0.0},
        ]
        done = run_of(function, place, model, groups=groups, epochs=1, warmup=0.0)
        moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
        expect(
            moved == {"head.weight", "head.bias"},
            "groups is not used: with groups of the head alone, "
            f"{', '.join(sorted(moved)) or 'nothing'} moves",
        )
        first = done.steps[0].lr
        expect(
            abs(first[0] - 0.025) < 1e-9 and abs(first[1] - 0.05) < 1e-9,
            f"a group with scale 0.5 and one without have the rates {first} where 0.05 is "
            "the run's: multiply by group.get(\"scale\", 1.0)",
        )


@train_battery.property("hides tokens and cuts words anew in training only")
def train_chance(function):
    with folder() as place:
        model = Stub(SMALL)
        run_of(function, place / "hide", model, hide=0.6, epochs=2)
        taught = [call.ids for call in model.calls if call.grad]
        asked = [call.ids for call in model.calls if not call.grad]
        expect(
            any(bool((ids == MASK).any()) for ids in taught),
            "config.hide is not used: no token is hidden in training",
        )
        expect(
            not any(bool((ids == MASK).any()) for ids in asked),
            "tokens are hidden when it measures: that belongs to training alone",
        )

        def rows(calls):
            return Counter(
                tuple(i for i in row.tolist() if i != PAD) for ids in calls for row in ids
            )

        for count, name in ((0.0, "plain"), (0.5, "cut")):
            model = Stub(SMALL)
            run_of(function, place / name, model, bpe_dropout=count, epochs=2)
            taught = [call.ids for call in model.calls if call.grad]
            first, second = rows(taught[:3]), rows(taught[3:])
            if not count:
                expect(first == second, "with hide=0 and bpe_dropout=0 the epochs hold "
                       "different posts")
                wanted = rows([torch.tensor([r]) for r in ids_of(
                    tiny_tokenizer(), posts(22)[0], 12)])
                expect(first == wanted, "an epoch does not hold each post once, as encode "
                       "cuts it")
            else:
                expect(first != wanted, "config.bpe_dropout is not used: words are cut as "
                       "ever in training")
                expect(
                    first != second,
                    "in every epoch words are cut the same way: cut them anew, with "
                    "another seed for each epoch",
                )


class _Scripted(Stub):
    """Answers by a script, one line an epoch, so that we know which is best."""

    epoch, snapshots = 0, ()

    def forward(self, input_ids, attention_mask=None):
        learned = super().forward(input_ids, attention_mask)
        if self.training:
            self.fresh = True
            return learned
        if getattr(self, "fresh", False):
            self.fresh, self.epoch = False, self.epoch + 1
            self.snapshots = (*self.snapshots, {
                k: v.clone() for k, v in self.state_dict().items()})
        return torch.stack([
            self.line(input_ids.new_tensor(row).tolist())
            for row in input_ids.tolist()
        ])

    def line(self, row):
        # The validation texts are "a d", "b d", … : label, then which of its class.
        right, place = row[1] - 5, len([i for i in row if i != PAD]) - 3
        chosen, sure = {
            1: (right if place < 2 else (right + 1) % 3, 1.0),  # least loss
            2: (right if right or place < 4 else 1, 9.0),  # best macro-F1
            3: (0, 9.0),  # best accuracy
            4: ((right + 1) % 3, 9.0),
        }[min(max(self.epoch, 1), 4)]
        return sure * F.one_hot(torch.tensor(chosen), 3).float()


@train_battery.property("keeps the epoch with the best macro-F1, in the model and the file")
def train_best(function):
    ready("datasets")
    # Nine of class 0, one of 1, two of 2: accuracy and macro-F1 disagree.
    truth = [0] * 9 + [1] + [2] * 2
    place_of = [*range(9), 0, 0, 1]
    texts = ["abc"[y] + " d" * (p + 1) for y, p in zip(truth, place_of, strict=True)]
    dataset = importlib.import_module("datasets").DatasetDict({
        "train": split_of(*posts(22), 3), "validation": split_of(texts, truth, 3)})
    with folder() as place:
        model = _Scripted(SMALL)
        done = run_of(function, place, model, dataset, epochs=4)
        if len(model.snapshots) < 4 or len(done.history) != 4:
            raise Wrong("the validation split is not measured once after every epoch")
        shots = model.snapshots[:4]
        f1 = [row["macro_f1"] for row in done.history]
        kept = torch.load(place / "best_model.pt", weights_only=True) if (
            place / "best_model.pt").is_file() else {}
    if max(range(4), key=f1.__getitem__) != 1:
        raise Wrong(f"macro-F1 in the history is {[round(v, 3) for v in f1]}, but the "
                    "second epoch is the best: look at evaluate first")
    for what, weights in (("the model holds", dict(model.state_dict())),
                          ("best_model.pt holds", dict(kept))):
        found = [i for i, shot in enumerate(shots) if same(shot, weights)]
        if found == [1]:
            continue
        reason = {
            3: "those of the last epoch. Save only where macro-F1 is better than in all "
               "epochs before, and load that file at the end",
            0: "those of the epoch with the lowest loss, or of the first: macro-F1 decides",
            2: "those of the epoch with the best accuracy: macro-F1 decides",
        }
        raise Wrong(
            f"at the end {what} not the weights of the epoch with the best macro-F1, but "
            + (reason[found[0]] if found else "others: they must not move after the last "
               "epoch was measured")
        )


@train_battery.property("goes on after a kill as if it had never stopped")
def train_resume(function):
    odds = {"hide": 0.3, "bpe_dropout": 0.2, "clip": 1e6}
    shape = dataclasses.replace(SMALL, dropout=0.3)
    with folder() as place:
        whole = run_of(function, place / "whole", Stub(shape), **odds)
        run_of(function, place / "killed", Stub(shape), stop_at=5, **odds)
        again = run_of(function, place / "killed", Stub(shape), **odds)
        expect(
            len(again.steps) < len(whole.steps),
            "a run that was killed in its second epoch starts over: after every epoch the "
            "folder must hold the state of the run, and train must look for it first",
        )
        expect(
            len(again.history) == 3,
            f"after resuming, the history has {len(again.history)} rows for 3 epochs: it "
            "holds those before the kill as well",
        )
        rates = [[s.lr[0] for s in run.steps[-len(again.steps):]] for run in (whole, again)]
        expect(
            near(*map(torch.tensor, rates), 1e-9),
            "after resuming, the learning rate is another: the step goes on from the "
            "epochs that are done, len(history) * steps",
        )
        seen = [
            [call.ids for call in run.model.calls if call.grad][-len(again.steps):]
            for run in (whole, again)
        ]
        expect(
            all(torch.equal(a, b) for a, b in zip(*seen, strict=True)),
            "after resuming, the batches are others: all that is random must follow from "
            "the seed and the number of the epoch, not from what was drawn before",
        )
        expect(
            again.history[:1] == whole.history[:1],
            "after resuming, the epochs before the kill have other rows in the history than "
            "before",
        )
        first = [run.steps[-len(again.steps)].length for run in (whole, again)]
        expect(
            abs(first[0] - first[1]) < 1e-4 * first[0],
            "after resuming, the first batch is the same, but its gradient is another: "
            "dropout rolls other dice (set torch's seed at the beginning of each epoch), or "
            "the model does not have the weights that it had at the kill",
        )
        expect(
            again.history == whole.history
            and same(dict(whole.model.state_dict()), dict(again.model.state_dict())),
            "after resuming, the same batches and gradients lead to other weights: the "
            "optimizer's state is not kept, or the best epoch is forgotten",
        )
        idle = run_of(function, place / "whole", Stub(shape), **odds)
        expect(
            not idle.steps,
            "called again on a run that is finished, it trains on: there is nothing to do",
        )
        expect(
            same(dict(whole.model.state_dict()), dict(idle.model.state_dict())),
            "called again on a run that is finished, the model does not get the best "
            "epoch's weights",
        )
        other = Run(**{**QUICK, **odds, "epochs": 5})
        with contextlib.redirect_stderr(io.StringIO()):
            must_refuse(
                function, ValueError, "a folder with a run of other settings is not refused "
                "rightly: two runs would be mixed", lambda: function.thing(
                    Stub(shape), tiny_tokenizer(), splits(), other, place / "whole",
                    tracker=None,
                ),
            )
        function.manners.pop("seed", None)


@train_battery.property("its seed decides, and nothing else")
def train_seed(function):
    with folder() as place:
        shape = dataclasses.replace(SMALL, dropout=0.3)

        def weights(name, start, **changed):
            torch.manual_seed(start)
            done = run_of(function, place / name, Stub(shape), epochs=1, hide=0.2, **changed)
            return dict(done.model.state_dict())

        one = weights("1", 1, seed=3)
        expect(
            same(one, weights("2", 2, seed=3)),
            "two runs with the same config end differently: set torch's seed from "
            "config.seed and the epoch, for dropout too",
        )
        expect(
            not same(one, weights("3", 1, seed=4)),
            "config.seed is not used: another seed gives the same run",
        )


# train_from_scratch

scratch_battery = Battery(
    "train_from_scratch",
    'train_from_scratch(dataset, folder, config, *, vocab_size=4000, tracker="tensorboard", '
    "**changes) -> model, tokenizer, history", chapter=8,
    takes=("dataset", "folder", "config", "vocab_size", "tracker"),
)


def scratch(function, place, dataset=None, vocab_size=24, changes=None, **changed):
    """Call the reader's function on a handful of posts."""
    ready("datasets", "accelerate", "tqdm", "sklearn.metrics")
    book("classifier", "TransformerForSequenceClassification", 7)
    book("tokens", "train_tokenizer", 2)
    run, dataset = Run(**{**QUICK, "epochs": 1, **changed}), dataset or splits()
    changes = {"d_model": 8, "num_heads": 2, "d_ff": 8, **(changes or {})}
    with contextlib.redirect_stderr(io.StringIO()):
        try:
            result = lean(function, lambda: function.thing(
                dataset, place, run, vocab_size=vocab_size, tracker=None, **changes
            ))
        finally:
            function.manners.pop("seed", None)
    expect(result is not None, "it gives None: is there a return at the end?")
    expect(
        isinstance(result, tuple) and len(result) == 3,
        "it must return three things: model, tokenizer, history",
    )
    return result


@scratch_battery.property("gives a model, a tokenizer that fits it, and the history")
def scratch_whole(function):
    with folder() as place:
        model, tokenizer, history = scratch(function, place, epochs=2)
        expect(
            isinstance(model, nn.Module) and isinstance(tokenizer, Tokenizer)
            and isinstance(history, list),
            "it must return model, tokenizer and history, in this order",
        )
        expect(len(history) == 2, f"two epochs, but the history has {len(history)} rows")
        expect(
            model.config.vocab_size == tokenizer.get_vocab_size(),
            f"the model knows {model.config.vocab_size} tokens and the tokenizer "
            f"{tokenizer.get_vocab_size()}: a small training set gives fewer than "
            "vocab_size; ask the tokenizer",
        )
        expect(
            tokenizer.get_vocab_size() <= 24,
            f"vocab_size=24, but the tokenizer has {tokenizer.get_vocab_size()} tokens",
        )
        expect(
            model.config.num_labels == 3,
            f"the dataset has 3 classes, the model {model.config.num_labels}: ask the "
            "features of the label column",
        )
        missing = [name for name in FILES if not (place / name).is_file()]
        expect(not missing, f"the folder lacks {', '.join(missing)}")
        kept = torch.load(place / "best_model.pt", weights_only=True)
        expect(
            same(dict(kept), dict(model.state_dict())),
            "the model that comes back is not the one of the best epoch, which the folder "
            "holds: was another model trained than is returned?",
        )


@scratch_battery.property("takes the chapter's recipe, and changes to it")
def scratch_recipe(function):
    with folder() as place:
        model, *_ = scratch(function, place / "a")
        wanted = {"d_model": 8, "num_heads": 2, "d_ff": 8, "num_layers": 2, "max_len": 64,
                  "dropout": 0.3, "pooling": "max"}
        for name, value in wanted.items():
            got = getattr(model.config, name)
            expect(
                got == value,
                f"{name}={value!r} was passed in, but the model has {got!r}: changes come "
                "after SCRATCH" if name in ("d_model", "num_heads", "d_ff") else
                f"{name} is {got!r}, but the recipe SCRATCH has {value!r}",
            )
        model, *_ = scratch(function, place / "b", changes={
            "num_layers": 1, "pooling": "cls", "dropout": 0.0})
        expect(
            (model.config.num_layers, model.config.pooling, model.config.dropout)
            == (1, "cls", 0.0), "changes to the recipe are not taken: SCRATCH wins over them",
        )


@scratch_battery.property("learns its tokenizer from the training split alone")
def scratch_leak(function):
    ready("datasets")
    dataset = splits()
    texts = [text + " qqq qq" for text in dataset["validation"]["text"]]
    dataset["validation"] = split_of(texts, list(dataset["validation"]["label"]), 3)
    with folder() as place:
        _, tokenizer, _ = scratch(function, place, dataset)
    expect(
        tokenizer.token_to_id("q") is None,
        "the tokenizer knows a letter that only the validation split has: train it on the "
        "training split alone, or scores say too much",
    )


@scratch_battery.property("starts from weights that config.seed decides")
def scratch_seed(function):
    with folder() as place:
        def weights(name, start, seed):
            torch.manual_seed(start)
            model, *_ = scratch(function, place / name, learning_rate=1e-12, seed=seed)
            return dict(model.state_dict())

        one = weights("1", 1, 3)
        expect(
            same(one, weights("2", 2, 3)),
            "two runs with the same config start from different weights: "
            "torch.manual_seed(config.seed) before the model is made",
        )
        expect(
            not any(near(a, b) and a.ndim > 1 for a, b in zip(
                one.values(), weights("3", 1, 4).values(), strict=True)),
            "another seed starts from the same weights: the seed must be config.seed",
        )


# make_baseline

baseline_battery = Battery(
    "make_baseline",
    "make_baseline(kind, strength=1.0, class_weight=None) -> a scikit-learn pipeline",
    chapter=8, takes=("kind", "strength", "class_weight"),
)


def svm(chars=True, words=(1, 2), runs=(2, 5), analyzer="char_wb", strength=1.0,
        class_weight=None, lower=True, sublinear=True, count=False, stop=None, **named):
    """A pipeline, right or with one mistake."""
    from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
    from sklearn.pipeline import make_pipeline, make_union
    from sklearn.svm import LinearSVC

    kind = CountVectorizer if count else TfidfVectorizer
    more = {} if count else {"sublinear_tf": sublinear, **named}
    parts = []
    if words:
        parts.append(kind(ngram_range=words, lowercase=lower, stop_words=stop, **more))
    if chars:
        parts.append(kind(analyzer=analyzer, ngram_range=runs, lowercase=lower, **more))
    return make_pipeline(
        make_union(*parts) if len(parts) > 1 else parts[0],
        LinearSVC(C=strength, class_weight=class_weight, random_state=0),
    )


SVM_TEXTS = [
    "so happy today", "happy happy day I love it", "so sad and so alone", "sad day today",
    "I AM furious about it", "furious and mad, so mad", "what a lovely happy morning",
    "crying and sad again", "he is mad at me", "the happiest of all days",
]
SVM_LABELS = [1, 1, 3, 3, 0, 0, 1, 3, 0, 1]


def margins(pipeline):
    """What a fitted pipeline gives for new texts."""
    pipeline.fit(SVM_TEXTS, SVM_LABELS)
    new = ["happily mad", "a sad furious day", "So happy!", "", "it is the morning of it"]
    return torch.tensor(pipeline.decision_function(new)).double()


def baseline_by(function, *arguments, **named):
    """Make the reader's pipeline; expect that it can be fitted."""
    ready("sklearn.svm", "sklearn.feature_extraction.text", "sklearn.pipeline")
    made = function(*arguments, **named)
    expect(made is not None, "it gives None: is there a return on every way out?")
    expect(
        hasattr(made, "fit") and hasattr(made, "predict"),
        "it must give a scikit-learn pipeline with fit(texts, labels) and predict(texts), "
        f"but it gives a {type(made).__name__}",
    )
    return made


@baseline_battery.property("majority: always the most frequent class")
def baseline_majority(function):
    made = baseline_by(function, "majority")
    function.run(made.fit, ["a", "b", "c", "d", "e"], [2, 0, 2, 1, 2])
    got = [int(y) for y in function.run(made.predict, ["x", "", "a", "b"] * 20)]
    expect(
        got == [2] * 80,
        "it does not always answer the most frequent class: "
        + ("it draws at random; strategy=\"most_frequent\"" if len(set(got)) > 1 else
           f"it answers {got[0]} where 2 is the most frequent"),
    )


@baseline_battery.property("tfidf-words and tfidf-words-chars: TF-IDF and a linear SVM")
def baseline_svm(function):
    for kind, chars in (("tfidf-words", False), ("tfidf-words-chars", True)):
        for strength, weight in ((1.0, None), (0.2, "balanced")):
            made = baseline_by(function, kind, strength, weight)
            if not hasattr(made, "decision_function"):
                raise Wrong("the last step must be a linear SVM (LinearSVC)")
            given = {"chars": chars, "strength": strength, "class_weight": weight}
            mine = function.run(margins, made)
            wrong = [
                ("strength is not used: it is the SVM's C", {"strength": 1.0}),
                ("strength is inverted: C is strength itself", {"strength": 1 / strength}),
                ("class_weight is not used", {"class_weight": None}),
                ("class_weight is \"balanced\" although nobody asked for it",
                 {"class_weight": "balanced"}),
                ("it counts single words only: pairs of words too, ngram_range=(1, 2)",
                 {"words": (1, 1)}),
                ("it counts pairs of words only: single words too, ngram_range=(1, 2)",
                 {"words": (2, 2)}),
                ("it counts runs of three words too: ngram_range=(1, 2)", {"words": (1, 3)}),
                ("runs of characters are missing", {"chars": False}),
                ("words are missing: put words and characters side by side (make_union)",
                 {"words": None}),
                ("tfidf-words has runs of characters too", {"chars": True}),
                ("runs of characters go across words: analyzer=\"char_wb\"",
                 {"analyzer": "char"}),
                ("counts are not dampened: sublinear_tf=True", {"sublinear": False}),
                ("words are counted, but not weighed by how rare they are: TF-IDF",
                 {"count": True}),
                ("capitals are kept apart: lowercase=True is the default",
                 {"lower": False}),
                ("stop words are taken out: they tell something here", {"stop": "english"}),
                ("rare words are not weighed: use_idf=True is the default",
                 {"use_idf": False}),
            ] + [(f"runs of characters have {a} to {b} characters: 2 to 5",
                  {"runs": (a, b)}) for a, b in ((1, 5), (2, 4), (3, 5), (2, 6), (3, 3), (1, 4))]
            explain(
                mine, margins(svm(**given)),
                [(hint, lambda c=c, g=given: margins(svm(**{**g, **c}))) for hint, c in wrong],
                f"{kind} is not what the chapter describes: TF-IDF of words and word pairs "
                "(sublinear)" + (", and of runs of 2 to 5 characters inside words," if chars
                                 else "") + " and a LinearSVC", 2e-3,
            )


@baseline_battery.property("refuses another kind")
def baseline_refuses(function):
    for kind in ("svm", "", "tfidf", "Majority"):
        must_refuse(
            function, ValueError, f"kind={kind!r} is not refused rightly", function.thing, kind
        )


@baseline_battery.property("makes a new one each time")
def baseline_fresh(function):
    one, two = (baseline_by(function, "tfidf-words") for _ in range(2))
    expect(one is not two, "the same pipeline is given out twice: one task would overwrite "
           "what another has learned")


# The exercises


def letters_loss(model):
    """A function that computes a fresh loss of a small model."""
    batch = step_batches()[0]
    return lambda: F.cross_entropy(
        model(batch["input_ids"], batch["attention_mask"]), batch["labels"]
    )


zero_battery = Battery(
    "gradients_without_zero",
    "gradients_without_zero(parameter, loss_of, times) -> a list of copies of "
    "parameter.grad", chapter=8, takes=("parameter", "loss_of", "times"),
)


@zero_battery.property("after each backward, the sum of all gradients so far")
def zero_sums(function):
    model = Stub(SMALL, seed=1)
    loss = letters_loss(model)
    one, = torch.autograd.grad(loss(), model.head.weight)
    grads = function(model.head.weight, loss, 3)
    expect(
        isinstance(grads, (list, tuple)) and len(grads) == 3,
        "it must return a list of three tensors for times=3",
    )
    for grad in grads:
        expect_tensor(grad, one.shape, what="each gradient")
    factors = [float((g * one).sum() / (one * one).sum()) for g in grads]
    expect(
        [round(f, 3) for f in factors] != [3, 3, 3],
        "all three are the last one: parameter.grad is one tensor that grows, so a copy "
        "must be kept each time (.clone())",
    )
    expect(
        [round(f, 3) for f in factors] != [1, 1, 1],
        "all three are alike: the gradient is cleared in between, which is just what must "
        "not happen here",
    )
    expect(
        [round(f, 3) for f in factors] == [1, 2, 3],
        f"they are {', '.join(f'{f:.2f}' for f in factors)} times one gradient, where 1, 2 "
        "and 3 times are wanted: one backward each time, and the weights must not move",
    )


clip_battery = Battery(
    "clip_gradients", "clip_gradients(parameters, largest) -> the length before", chapter=8,
    takes=("parameters", "largest"),
)


def clipped(function, largest, size=1.0, generator=False):
    """Gradients and length after the reader's clipping."""
    parameters = [nn.Parameter(torch.zeros(s)) for s in ((3, 2), (4,), (2,))]
    for i, p in enumerate(parameters[:2]):  # the third has none
        p.grad = size * sample(*p.shape, seed=20 + i)
    length = function.run(
        function.thing, iter(parameters) if generator else parameters, largest
    )
    return [p.grad for p in parameters[:2]], length


@clip_battery.property("scales all gradients together, where they are too long")
def clip_plain(function):
    grads = [sample(3, 2, seed=20), sample(4, seed=21)]
    total = sum(g.square().sum() for g in grads).sqrt()
    flat = torch.cat([g.flatten() for g in grads])
    for generator in (False, True):
        mine, length = clipped(function, 0.5, generator=generator)
        got = torch.cat([g.flatten() for g in mine])
        expect(
            not generator or not near(got, flat),
            "with model.parameters(), which can be read only once, nothing is scaled: make "
            "a list first",
        )
        explain(got, flat * 0.5 / total, [
            ("nothing is scaled: g = g * … makes a new tensor and leaves p.grad as it was; "
             "use mul_, or assign p.grad", lambda: flat),
            ("each parameter's gradient is scaled by its own length: measure all together, "
             "as one vector", lambda: torch.cat([(g * 0.5 / g.norm()).flatten()
                                                 for g in grads])),
            ("each number is cut off by itself, which turns the direction",
             lambda: flat.clamp(-0.5, 0.5)),
            ("the root is missing: the length is the root of the sum of squares",
             lambda: flat * 0.5 / total**2),
            ("the lengths of the parameters are added up: add their squares, then take the "
             "root", lambda: flat * 0.5 / sum(g.norm() for g in grads)),
            ("it scales down to length 1: to largest", lambda: flat / total),
            ("it scales by largest itself", lambda: flat * 0.5),
        ], "with largest=0.5 the gradients must keep their direction and have the length "
           "0.5 together", 1e-4)
        expect(length is not None, "it gives None: return the length before clipping")
        expect(
            abs(float(length) - total) < 1e-4,
            f"it must return the length before clipping, {total:.3f}, but it returns "
            f"{float(length):.3f}",
        )


@clip_battery.property("leaves short gradients alone")
def clip_short(function):
    mine, length = clipped(function, 100.0)
    expect(
        near(mine[0], sample(3, 2, seed=20), 1e-4),
        "gradients shorter than largest are scaled up: scale by min(1, …)",
    )
    mine, _ = clipped(function, 1.0, size=0.0)
    expect(bool(mine[0].isfinite().all()), "gradients of 0 become NaN: 0 / 0; add 1e-6 below "
           "the line, or test first")


smooth_battery = Battery(
    "smoothed_cross_entropy", "smoothed_cross_entropy(logits, labels, share) -> a scalar",
    chapter=8, takes=("logits", "labels", "share"),
)


@smooth_battery.property("the truth is 1 - share for the label, and share for all")
def smooth_plain(function):
    logs = LOGITS.log_softmax(-1)
    right = logs.gather(1, LABELS[:, None])[:, 0]
    n, k = LOGITS.shape
    for share in (0.1, 0.6):
        explain(
            loss_of(function, LOGITS.clone(), LABELS.clone(), share),
            F.cross_entropy(LOGITS, LABELS, label_smoothing=share), [
                ("nothing is smoothed", lambda: -right.mean()),
                ("share is not used: it is always 0.1",
                 lambda: F.cross_entropy(LOGITS, LABELS, label_smoothing=0.1)),
                ("the share goes to the other classes alone: here all classes share it, the "
                 "right one too", lambda s=share: -(
                     (1 - s) * right + s * (logs.sum(-1) - right) / (k - 1)).mean()),
                ("every class gets the whole share: they divide it among them",
                 lambda s=share: -((1 - s) * right + s * logs.sum(-1)).mean()),
                ("the right label keeps all of its 1, and the share comes on top",
                 lambda s=share: -(right + s * logs.mean(-1)).mean()),
                ("share and 1 - share are mixed up",
                 lambda s=share: -(s * right + (1 - s) * logs.mean(-1)).mean()),
                ("the losses are added up, not averaged",
                 lambda s=share: -((1 - s) * right + s * logs.mean(-1)).sum()),
                ("the sign is wrong",
                 lambda s=share: ((1 - s) * right + s * logs.mean(-1)).mean()),
                ("probabilities are averaged, not their logarithms",
                 lambda s=share: -((1 - s) * right + s * logs.exp().mean(-1).log()).mean()),
            ],
            f"with share={share} it is not the cross-entropy with a truth of 1 - share for "
            "the label plus share / classes for each class",
        )
    expect(
        near(loss_of(function, LOGITS.clone(), LABELS.clone(), 0.0), -right.mean()),
        "with share=0 it is not plain cross-entropy",
    )


accumulate_battery = Battery(
    "accumulated_step", "accumulated_step(model, batches, optimizer) -> the mean loss",
    chapter=8, takes=("model", "batches", "optimizer"),
)


def uneven():
    """Eleven texts in batches of 5, 4 and 2."""
    whole = {k: torch.cat([b[k] for b in step_batches()])[:11] for k in step_batches()[0]}
    return whole, [{k: v[a:b] for k, v in whole.items()} for a, b in ((0, 5), (5, 9), (9, 11))]


@accumulate_battery.property("one step, as if all texts stood in one batch")
def accumulate_plain(function):
    ready()
    whole, parts = uneven()

    def losses(model, batch=whole):
        return F.cross_entropy(
            model(batch["input_ids"], batch["attention_mask"]), batch["labels"],
            reduction="none",
        )

    def moved(*objectives, lr=0.5):
        model = Stub(SMALL, seed=1)
        optimizer = torch.optim.SGD(model.parameters(), lr=lr)
        for objective in objectives:
            optimizer.zero_grad()
            objective(model).backward()
            optimizer.step()
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    model = Stub(SMALL, seed=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses(model).sum().backward()  # what the step before has left behind
    given, steps, real = [dict(part) for part in parts], [], optimizer.step
    optimizer.step = lambda *a, **k: (steps.append(1), real(*a, **k))[1]
    loss = function(model, given, optimizer)
    expect(
        len(steps) < 2,
        f"it takes {len(steps)} steps: one alone, after the last batch",
    )
    if "input" in function.manners:
        function.manners.pop("input")
        raise Wrong("it takes the labels out of the batches that were passed in: copy each "
                    "first, batch = dict(batch)")
    mine = torch.cat([p.detach().flatten() for p in model.parameters()])
    even = [lambda m, part=part: losses(m, part).mean() for part in parts]
    explain(mine, moved(lambda m: losses(m).mean()), [
        ("nothing moves: optimizer.step() is missing, or the gradients are wiped out before "
         "it", lambda: moved()),
        ("each batch weighs the same, but they are not equally large: weigh each batch's "
         "mean loss by its share of all texts", lambda: moved(
             lambda m: sum(e(m) for e in even) / 3)),
        ("the batches' mean losses are added up: weigh each by its share of all texts",
         lambda: moved(lambda m: sum(e(m) for e in even))),
        ("the losses of all texts are added up, not averaged",
         lambda: moved(lambda m: losses(m).sum())),
        ("it takes a step for each batch: one step, after the last",
         lambda: moved(*even)),
        ("only the last batch counts: zero_grad comes before each batch, and wipes out the "
         "others", lambda: moved(even[-1])),
        ("only the last batch counts: zero_grad comes before each batch, and wipes out the "
         "others", lambda: moved(lambda m: even[-1](m) * 2 / 11)),
        ("only the first batch counts", lambda: moved(even[0])),
        ("the gradients of the step before are still there: clear them once, before the "
         "first batch", lambda: moved(lambda m: losses(m).mean() + losses(m).sum())),
        ("the gradients of the step before are still there, and each batch weighs the same",
         lambda: moved(lambda m: sum(e(m) for e in even) / 3 + losses(m).sum())),
        ("the loss is divided by the number of batches, of a sum over the texts",
         lambda: moved(lambda m: losses(m).sum() / 3)),
    ], "the weights are not where one step on all texts together would bring them")
    expect(loss is not None, "it gives None: return the mean loss over all texts")
    wanted = losses(Stub(SMALL, seed=1)).mean().item()
    expect(
        abs(float(loss) - wanted) < 1e-4,
        f"the step is right, but the loss it returns is {float(loss):.4f} where the texts' "
        f"mean is {wanted:.4f}",
    )
    sizes = [len(call.ids) for call in model.calls[1:]]
    expect(
        max(sizes) <= 5, "the batches are put together into one: then the memory that this "
        "is to save is needed all the same",
    )


adamw_battery = Battery(
    "adamw_step",
    "adamw_step(weight, gradient, mean, square, step, *, lr, weight_decay) -> weight, mean, "
    "square", chapter=8,
    takes=("weight", "gradient", "mean", "square", "step", "lr", "weight_decay"),
)


def adamw(steps, lr=0.1, decay=0.2, b1=0.9, b2=0.999, eps=1e-8, correct=True, mode="w",
          inside=False, root=True, late=0):
    """Weights after each step, right or with one mistake."""
    weight, mean, square, after = sample(4, 3, seed=30), 0.0, 0.0, []
    for t in range(1, steps + 1):
        g = sample(4, 3, seed=30 + t) * 10.0 ** (t % 3 - 2)
        if mode == "l2":
            g = g + decay * weight
        mean = b1 * mean + (1 - b1) * g
        square = b2 * square + (1 - b2) * g * g
        count = t + late
        m = mean / (1 - b1**count) if correct is True or correct == "mean" else mean
        s = square / (1 - b2**count) if correct is True or correct == "square" else square
        below = (s + eps).sqrt() if inside else s.sqrt() + eps if root else s + eps
        move = lr * m / below
        if mode == "w":
            weight = weight * (1 - lr * decay) - move
        elif mode == "bare":  # the decay without the learning rate
            weight = weight * (1 - decay) - move
        elif mode == "after":
            weight = (weight - move) * (1 - lr * decay)
        elif mode == "up":
            weight = weight * (1 - lr * decay) + move
        else:
            weight = weight - move
        after.append(weight)
    return torch.stack(after)


@adamw_battery.property("is torch.optim.AdamW, written out")
def adamw_plain(function):
    weight = sample(4, 3, seed=30)
    mean, square, after = torch.zeros(4, 3), torch.zeros(4, 3), []
    for t in range(1, 6):
        g = sample(4, 3, seed=30 + t) * 10.0 ** (t % 3 - 2)
        result = function(weight, g, mean, square, t, lr=0.1, weight_decay=0.2)
        expect(
            isinstance(result, tuple) and len(result) == 3,
            "it must return three tensors: weight, mean, square",
        )
        weight, mean, square = result
        expect_tensor(weight, (4, 3), what="the weight")
        after.append(weight.detach().clone())
    explain(torch.stack(after), adamw(5), [
        ("the means are not corrected: they start at 0, so in the first steps they must be "
         "divided by 1 - beta ** step", lambda: adamw(5, correct=False)),
        ("the mean of the squares is not corrected for its start at 0",
         lambda: adamw(5, correct="mean")),
        ("the mean of the gradients is not corrected for its start at 0",
         lambda: adamw(5, correct="square")),
        ("the decay is added to the gradient, and then divided away: that is Adam with L2. "
         "In AdamW the weight itself shrinks", lambda: adamw(5, mode="l2")),
        ("the weight does not decay", lambda: adamw(5, mode="none")),
        ("the decay is not multiplied by the learning rate", lambda: adamw(5, mode="bare")),
        ("the weight decays after it has moved: shrink it first",
         lambda: adamw(5, mode="after")),
        ("the sign is wrong: it climbs", lambda: adamw(5, mode="up")),
        ("the root of the mean square is missing below the line",
         lambda: adamw(5, root=False)),
        ("the betas are mixed up: 0.9 for the gradients, 0.999 for the squares",
         lambda: adamw(5, b1=0.999, b2=0.9)),
        ("a beta is 0.99: 0.9 for the gradients, 0.999 for the squares",
         lambda: adamw(5, b2=0.99)),
        ("step counts from 1 here: the first has 1 - beta ** 1",
         lambda: adamw(5, late=1)),
    ], "after five steps the weights are not those of torch.optim.AdamW"
       + (": the first step is right, so look at what is kept for the next one. The means "
          "must come back as they are kept, not as they were corrected"
          if near(after[0], adamw(1)[0]) else ""))
    zero = function(torch.ones(2), torch.zeros(2), torch.zeros(2), torch.zeros(2), 1,
                    lr=0.1, weight_decay=0.0)[0]
    expect(bool(zero.isfinite().all()), "without any gradient it gives NaN, 0 / 0: add eps, "
           "1e-8, to the root")
    tiny = torch.full((2,), 1e-8)
    small = function(torch.ones(2), tiny, torch.zeros(2), torch.zeros(2), 1, lr=0.1,
                     weight_decay=0.0)[0]
    expect(
        near(small, torch.full((2,), 1 - 0.1 * 0.5), 1e-3),
        "eps stands inside the root, or has another size: root of the mean square, plus 1e-8",
    )


leak_battery = Battery(
    "leak_into", "leak_into(dataset, count, times) -> a new DatasetDict", chapter=8,
    takes=("dataset", "count", "times"),
)


@leak_battery.property("adds validation posts, with their labels, to the train split")
def leak_plain(function):
    dataset = splits()
    before = {k: [(r["text"], r["label"]) for r in v] for k, v in dataset.items()}
    leaky = function.run(lambda: function.thing(dataset, 4, 3))
    expect(leaky is not None, "it gives None: is there a return at the end?")
    expect(
        hasattr(leaky, "keys") and {"train", "validation"} <= set(leaky),
        "it must return a DatasetDict with all splits",
    )
    after = {k: [(r["text"], r["label"]) for r in leaky[k]] for k in before}
    expect(
        {k: [(r["text"], r["label"]) for r in v] for k, v in dataset.items()} == before,
        "it changes the dataset that was passed in: every later run would leak. Make a new "
        "DatasetDict",
    )
    expect(
        after["validation"] == before["validation"],
        "the validation split changes: it must stay, or nothing can be measured with it",
    )
    added = Counter(after["train"]) - Counter(before["train"])
    wanted = Counter()
    for post in before["validation"][:4]:
        wanted[post] += 3
    expect(not Counter(before["train"]) - Counter(after["train"]), "posts of the train split "
           "are lost")
    expect(
        added.total() == 12,
        f"with count=4 and times=3, twelve posts must be added, but {added.total()} are: "
        "each of the posts so many times over",
    )
    expect({t for t, _ in added} == {t for t, _ in wanted}, "other posts are added than the "
           "first of the validation split")
    expect(added == wanted, "the posts are added with other labels than their own, or not "
           "equally often")


average_battery = Battery(
    "WeightAverage",
    "WeightAverage(model, decay), with update(model) and copy_to(model)", chapter=8,
    makes=("model", "decay"),
)


def vector(model):
    """All weights of a model, copied."""
    return torch.cat([p.detach().flatten().clone() for p in model.parameters()])


def move(model, seed):
    """Let a model's weights move, as training does: in place."""
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.add_(sample(*p.shape, seed=100 * seed + i))
    return vector(model)


@average_battery.property("is decay · average + (1 - decay) · weights, from the first weights on")
def average_plain(subject):
    model, decay = Stub(SMALL), 0.7
    path = [vector(model)]
    average = subject.run(subject.thing, model, decay)
    for name in ("update", "copy_to"):
        expect(hasattr(average, name), f"the method {name}(model) is missing")
    for seed in range(1, 4):
        path.append(move(model, seed))
        subject.run(average.update, model)
    expect(near(vector(model), path[-1]), "update changes the model: it must only look at it")
    out = Stub(SMALL, seed=8)
    subject.run(average.copy_to, out)

    def mean(decay=decay, start=path[0], steps=path[1:]):
        value = start
        for step in steps:
            value = decay * value + (1 - decay) * step
        return value

    explain(vector(out), mean(), [
        ("the average is the model itself: it keeps the model's own tensors, which move "
         "with it. Copy them (.clone()) at the start", lambda: path[-1]),
        ("decay and 1 - decay are mixed up: decay is the share of the old average",
         lambda: mean(1 - decay)),
        ("the average starts at 0: start from the model's first weights",
         lambda: mean(start=torch.zeros_like(path[0]))),
        ("the average never moves: update does not keep what it computes",
         lambda: path[0]),
        ("all weights count the same: later ones must count more",
         lambda: torch.stack(path).mean(0)),
        ("all weights count the same: later ones must count more",
         lambda: torch.stack(path[1:]).mean(0)),
        ("the first update takes the weights whole: at the start the model's own tensors "
         "were kept, which move with it. Copy them (.clone())",
         lambda: mean(start=path[1], steps=path[2:])),
        ("copy_to does not change the model it is given: write into its parameters "
         "(load_state_dict, or copy_ under no_grad)", lambda: vector(Stub(SMALL, seed=8))),
        ("the shares do not sum to 1",
         lambda: decay * (decay * (decay * path[0] + path[1]) + path[2]) + path[3]),
    ], "after three updates it is not decay · average + (1 - decay) · weights, three times")
    expect(all(p.requires_grad for p in out.parameters()), "after copy_to the model's "
           "parameters can no longer be trained")


@average_battery.property("stays apart from the models it meets")
def average_apart(subject):
    model = Stub(SMALL)
    average = subject.run(subject.thing, model, 0.5)
    move(model, 1)
    subject.run(average.update, model)
    out = Stub(SMALL, seed=8)
    subject.run(average.copy_to, out)
    first = vector(out)
    move(out, 2)
    again = Stub(SMALL, seed=9)
    subject.run(average.copy_to, again)
    expect(
        near(vector(again), first),
        "after copy_to the model and the average share their tensors: training on would "
        "move the average. Copy the values",
    )
    model(torch.tensor([[CLS, 6, SEP]])).sum().backward()
    subject.run(average.update, model)
    held = [v for v in vars(average).values()]
    tensors = [t for v in held for t in (
        v.values() if isinstance(v, dict) else v.parameters() if isinstance(v, nn.Module)
        else v if isinstance(v, (list, tuple)) else [v]) if isinstance(t, torch.Tensor)]
    expect(
        not any(t.grad_fn is not None for t in tensors),
        "the average hangs on the graph, which grows with every update: detach, or work "
        "under torch.no_grad()",
    )
