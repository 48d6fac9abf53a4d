"""Checks for chapter 07: pooling, the config, the whole model, its size."""

import dataclasses
import math
from types import SimpleNamespace

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
)
from .encoder import ALWAYS_ON, apart, ask, cut_at, dropped, even, expect_dropped, expect_mask

NOTHING = float("-inf")


def refused(function, *arguments, **named):
    """Whether a call is refused on purpose, and not by a slip."""
    try:
        function(*arguments, **named)
    except Broke as broke:
        return "not written yet" not in str(broke)
    return False


def on_purpose(subject):
    """Whether the last error is one that says no, not a slip of the code."""
    return isinstance(
        subject.last_error, (ValueError, AssertionError, TypeError, KeyError)
    )


# pool

pool_battery = Battery(
    "pool", 'pool(hidden, attention_mask=None, how="mean") -> (batch, d_model)',
    chapter=7, takes=("hidden", "attention_mask", "how"),
)
# Below zero at some places for all tokens: a maximum filled up with 0 shows.
HIDDEN = sample(3, 5, 4, seed=21) - torch.tensor([0.0, 3.0, 0.5, 1.0])
REAL = torch.tensor([[True] * 5, [True] * 3 + [False] * 2, [True] + [False] * 4])
HOLES = torch.tensor([[False, True, True, True, True], [True, False, True, False, True],
                      [False, False, True, True, False]])


def pooled(hidden, mask, how):
    """Pool in float64, one text after the other."""
    rows = []
    for vectors, real in zip(hidden.double(), mask, strict=True):
        kept = vectors[real]
        if how == "cls":
            rows.append(vectors[0])
        elif not len(kept):
            rows.append(torch.zeros_like(vectors[0]))
        else:
            rows.append(kept.mean(0) if how == "mean" else kept.amax(0))
    return torch.stack(rows)


def pool_causes(hidden, mask, how):
    """What wrong poolings give."""
    h, every = hidden.double(), torch.ones_like(mask)
    real = mask[:, :, None]
    count = mask.sum(1, keepdim=True).double()
    zeroed = h.masked_fill(~real, 0)
    without_ends = mask.clone()
    without_ends[:, 0] = False
    to_last = mask.clone()
    to_last[torch.arange(len(mask)), (mask * torch.arange(mask.shape[1])).argmax(1)] = False
    both = without_ends & to_last
    causes = [
        ("the mask is inverted: True = a real token", lambda: pooled(h, ~mask, how)),
        ("the mask is not used: padding counts", lambda: pooled(h, every, how)),
        ("padding is set to 0, but counted: the sum is divided by seq_len, not by "
         "the number of real tokens", lambda: zeroed.mean(1)),
        ("padding counts in the sum: only the number below the line leaves it out",
         lambda: h.sum(1) / count),
        ("the sum is not divided by the number of real tokens", lambda: zeroed.sum(1)),
        ("the sum is divided by the number of real tokens in the whole batch: each "
         "text has its own", lambda: zeroed.sum(1) / mask.sum()),
        ("the sum is divided by one more than the number of real tokens",
         lambda: zeroed.sum(1) / (count + 1)),
        ("the sum is divided by 2 at least: a text of one token is halved",
         lambda: zeroed.sum(1) / count.clamp(min=2)),
        *[("a number is added below the line: it is small, but every mean is a "
           "little wrong", lambda e=e: zeroed.sum(1) / (count + e))
          for e in (0.5, 0.1, 1e-2, 1e-3, 1e-4)],
        ("the sum is divided by one less than the number of real tokens",
         lambda: zeroed.sum(1) / (count - 1)),
        ("the sum is divided by the root of the number of real tokens",
         lambda: zeroed.sum(1) / count.sqrt()),
        ("the sum is divided by the length of the longest text of the batch",
         lambda: zeroed.sum(1) / count.max()),
        ("the sum is divided by d_model, not by the number of real tokens",
         lambda: zeroed.sum(1) / h.shape[-1]),
        ("the first token is left out: [CLS] is a real token",
         lambda: pooled(h, without_ends, how)),
        ("the last real token is left out: [SEP] is a real token",
         lambda: pooled(h, to_last, how)),
        ("the first and the last real token are left out: [CLS] and [SEP] are real "
         "tokens", lambda: pooled(h, both, how)),
        ("padding is set to 0 before the maximum: where all real numbers are below "
         "0 it wins. Fill with minus infinity", lambda: zeroed.amax(1)),
        ("padding is set to -1 before the maximum: fill with minus infinity",
         lambda: h.masked_fill(~real, -1).amax(1)),
        ("this is the least number, not the largest",
         lambda: h.masked_fill(~real, math.inf).amin(1)),
        ("the largest is taken without the sign",
         lambda: zeroed.abs().amax(1)),
        ("these are the places of the largest numbers: take .values, or amax",
         lambda: h.masked_fill(~real, NOTHING).argmax(1).double()),
        ("the vectors are summed, not pooled by their maximum", lambda: zeroed.sum(1)),
        ("this is the softmax-weighted mean, not the maximum",
         lambda: (h.masked_fill(~real, NOTHING).softmax(1) * zeroed).sum(1)),
        ("this is the last token's vector (it may be padding): [CLS] is the first, "
         "hidden[:, 0]", lambda: h[:, -1]),
        ("this is the second token's vector: counting begins at 0",
         lambda: h[:, 1]),
        ("the first token is multiplied by its mask", lambda: zeroed[:, 0]),
        ("this is the last real token's vector: [CLS] is the first, hidden[:, 0]",
         lambda: h[torch.arange(len(h)), (mask * torch.arange(mask.shape[1])).argmax(1)]),
        ("these are the vectors of the first text, whatever the text: hidden[0] "
         "takes the first along the batch; hidden[:, 0] takes the first token",
         lambda: h[0][:len(h)]),
        ("each text gets the vector of its first real token: with how=\"cls\" it is "
         "the first token, whatever the mask",
         lambda: h[torch.arange(len(h)), mask.double().argmax(1)]),
    ]
    for other in ("mean", "max", "cls"):
        if other != how:
            causes.append((
                f'how="{how}" gives the pooling "{other}": how is not used, or the '
                "branches are mixed up", lambda other=other: pooled(h, mask, other)))
    return causes


def pool_shape(function, hidden, *arguments, **named):
    """Call the reader's function; expect (batch, d_model)."""
    out = function(hidden.clone(), *arguments, **named)
    batch, seq_len, d_model = hidden.shape
    if isinstance(out, tuple):
        raise Wrong(
            "it returns a tuple: max(dim=…) gives values and places; take .values, "
            "or use amax"
        )
    expect_tensor(out)
    hints = {
        (batch, seq_len): "the last axis is gone: that is d_model, and it must stay. "
        "Pool over the tokens, dim=1",
        (seq_len, d_model): "the batch is gone: the texts are mixed into each other. "
        "Pool over the tokens, dim=1 (the first token is hidden[:, 0], not hidden[0])",
        (batch, 1, d_model): "the pooled axis is still there, with length 1: leave "
        "keepdim out",
        (d_model,): "the batch is gone: there must be a vector a text. Pool over the "
        "tokens alone, dim=1",
        (batch,): "there is one number a text: d_model must stay",
        (): "there is one number in all: pool over the tokens alone, dim=1",
    }
    shape = tuple(out.shape)
    if shape != (batch, d_model):
        raise Wrong(hints.get(
            shape, f"the result must be (batch, d_model) = {(batch, d_model)}, but its "
            f"shape is {shape}"
        ))
    return out


@pool_battery.property("gives one vector a text: (batch, d_model)")
def pool_shapes(function):
    for how in ("mean", "max", "cls"):
        pool_shape(function, HIDDEN, REAL.clone(), how)
        pool_shape(function, sample(1, 1, 6), torch.ones(1, 1, dtype=torch.bool), how)
    pool_shape(function, HIDDEN)


OTHERWISE = {
    "mean": "the mean over the real tokens is wrong: their sum, divided by their number",
    "max": "the maximum over the real tokens is wrong: place by place the largest",
    "cls": "cls must be the first token's vector, hidden[:, 0]",
}


def expect_pool(function, how):
    """Refuse another pooling, without padding and with it."""
    every = torch.ones_like(REAL)
    explain(
        pool_shape(function, HIDDEN, every.clone(), how), pooled(HIDDEN, every, how),
        pool_causes(HIDDEN, every, how), OTHERWISE[how] + " (without any padding)",
    )
    for mask in (REAL, HOLES):
        explain(
            pool_shape(function, HIDDEN, mask.clone(), how), pooled(HIDDEN, mask, how),
            pool_causes(HIDDEN, mask, how), OTHERWISE[how],
        )


@pool_battery.property("mean: the sum of the real tokens by their number")
def pool_mean(function):
    expect_pool(function, "mean")


@pool_battery.property("max: the largest of the real tokens, place by place")
def pool_max(function):
    expect_pool(function, "max")


@pool_battery.property("cls: the first token")
def pool_cls(function):
    expect_pool(function, "cls")


@pool_battery.property("without a mask all tokens are real; the mean is the default")
def pool_defaults(function):
    every = torch.ones_like(REAL)
    for how in ("mean", "max", "cls"):
        explain(
            pool_shape(function, HIDDEN, how=how), pooled(HIDDEN, every, how), [],
            "without a mask it does not pool over all tokens",
        )
    silent = HIDDEN.clone()
    silent[0, 1] = 0.0
    expect(
        near(pool_shape(function, silent), pooled(silent, every, "mean")),
        "without a mask, a vector of zeros is taken for padding: zeros can be a token, "
        "and only the mask says what is padding",
    )
    out = pool_shape(function, HIDDEN, REAL.clone())
    for how in ("max", "cls"):
        expect(
            not near(out, pooled(HIDDEN, REAL, how)),
            f'the default of how is "{how}": it is "mean"',
        )


@pool_battery.property("never looks at padding, whatever stands there")
def pool_padding(function):
    for how in ("mean", "max", "cls"):
        for noise, name in ((1e6, "a large number"), (NOTHING, "minus infinity"),
                            (float("nan"), "NaN")):
            noisy = HIDDEN.masked_fill(~REAL[:, :, None], noise)
            out = pool_shape(function, noisy, REAL.clone(), how)
            expect(
                near(out, pooled(HIDDEN, REAL, how)),
                f"with {name} in the padding, {how} gives something else" + (
                    ": a mask that is multiplied lets it through, for NaN or infinity "
                    "times 0 is NaN. Fill the padding instead"
                    if not math.isfinite(noise) else
                    ": the padding is not left out"
                ),
            )


    broken = HIDDEN.clone()
    broken[1, 1] = float("nan")
    for how in ("mean", "max"):
        expect(
            bool(pool_shape(function, broken, REAL.clone(), how)[1].isnan().all()),
            f"{how} hides a NaN of a real token (nan_to_num, or a comparison that it "
            "loses): what has gone wrong below must stay visible",
        )


@pool_battery.property("gives a text of nothing but padding zeros, not NaN")
def pool_empty(function):
    mask = REAL.clone()
    mask[1] = False
    for how in ("mean", "max"):
        hidden = HIDDEN.clone().requires_grad_()
        out = function(hidden, mask.clone(), how)
        expect_tensor(out, (3, 4))
        expect(
            not out[1].isnan().any(),
            f"{how} of a text without any real token is NaN, by 0 / 0: divide by at "
            "least 1, or choose another way for such a row",
        )
        expect(
            bool(out[1].isfinite().all()),
            f"{how} of a text without any real token is infinite: what the padding "
            "was filled with comes through. Such a row gives zeros",
        )
        expect(
            bool((out[1] == 0).all()),
            f"{how} of a text without any real token must be zeros, but it is "
            f"{[round(v, 3) for v in out[1].tolist()]}: its padding comes through, "
            "or what it was filled with",
        )
        expect(
            near(out[[0, 2]], pooled(HIDDEN, mask, how)[[0, 2]]),
            "a text without any real token changes the results of the others",
        )
        (out * sample(3, 4, seed=22)).sum().backward()
        expect(
            hidden.grad is not None and bool(hidden.grad.isfinite().all()),
            f"with {how}, a text without any real token gives zeros, but its gradient "
            "is NaN: repairing NaN afterwards (nan_to_num, where) does not repair the "
            "way back. Avoid 0 / 0 instead",
        )


class Called(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, hidden, mask=None):
        return self.function(hidden, mask)


@pool_battery.property("lets gradients through, and keeps dtype and device")
def pool_gradient(function):
    for how in ("mean", "max", "cls"):
        hidden = HIDDEN.double().requires_grad_()
        out = function(hidden, REAL.clone(), how)
        expect_tensor(out, (3, 4), torch.float64)
        expect(
            out.requires_grad,
            "no gradient flows back: look for .detach(), .data, torch.tensor(…) "
            "around a result, or torch.no_grad()",
        )
        tilt = sample(3, 4, seed=23, dtype=torch.float64)
        mine, = torch.autograd.grad((out * tilt).sum(), hidden)
        other = HIDDEN.double().requires_grad_()
        wanted, = torch.autograd.grad((pooled(other, REAL, how) * tilt).sum(), other)
        expect(
            near(mine, wanted, 1e-6),
            f"the result of {how} is right, but its gradient is not: part of the way "
            "back is cut off",
        )
        for dtype in (torch.bfloat16, torch.float16):
            try:
                half = function(HIDDEN.to(dtype), REAL.clone(), how)
            except Broke as broke:
                if "overflow" not in str(broke):
                    raise
                raise Wrong(
                    f"{how} fails in 16 bits: the padding is filled with a number that "
                    f"they cannot hold. Minus infinity they can. It {broke}"
                ) from None
            expect_tensor(half, (3, 4), dtype)
            expect(
                near(half, pooled(HIDDEN.to(dtype), REAL, how), 0.05),
                f"{how} is right in 32 bits and wrong in {dtype}: is there a number "
                "that 16 bits cannot hold?",
            )
    expect_to_move(function, lambda: Called(function.thing), HIDDEN, REAL)
    expect_to_move(function, lambda: Called(function.thing), HIDDEN)


@pool_battery.property("refuses an unknown how, and shapes that do not fit")
def pool_refuses(function):
    for how in ("sum", "Mean", None):
        try:
            function(HIDDEN.clone(), REAL.clone(), how)
        except Broke:
            if on_purpose(function):
                continue
            raise
        raise Wrong(
            f"how={how!r} is none of mean, max and cls, and it gives an answer all the "
            "same: an else that takes the rest. Refuse it by a ValueError"
        )
    short = torch.ones(3, 1, dtype=torch.bool)
    expect(
        refused(function, HIDDEN.clone(), short, "mean"),
        "a mask of (batch, 1) for 5 tokens is stretched over them without a word: "
        "refuse a mask that is not (batch, seq_len) by a ValueError",
    )
    expect(
        all(refused(function, other.clone(), None, how)
            for how in ("mean", "max", "cls") for other in (HIDDEN[0], HIDDEN[None])),
        "hidden without a batch axis, or with one too many, is taken without a word: "
        "refuse by a ValueError what is not (batch, seq_len, d_model)",
    )
    for how in ("mean", "max"):
        try:
            out = function(HIDDEN.clone(), REAL.long(), how)
        except Broke:
            continue
        expect(
            near(out, pooled(HIDDEN, REAL, how)),
            "a mask of 0 and 1 (int64) gives another answer than the same mask as "
            "bool, and no error: ~ turns 1 into -2, which still counts as true. "
            "Refuse a mask that is not bool by a TypeError",
        )


# EmoformerConfig

config_battery = Battery(
    "EmoformerConfig",
    "EmoformerConfig(vocab_size, d_model=128, num_heads=4, num_layers=2, d_ff=512, "
    "max_len=128, num_labels=6, dropout=0.1, positions='learned', num_segments=0, "
    "norm_first=False, pooling='mean', layer_norm_eps=1e-12)",
    chapter=7, makes=("vocab_size",),
)
DEFAULTS = {
    "d_model": 128, "num_heads": 4, "num_layers": 2, "d_ff": 512, "max_len": 128,
    "num_labels": 6, "dropout": 0.1, "positions": "learned", "num_segments": 0,
    "norm_first": False, "pooling": "mean", "layer_norm_eps": 1e-12,
}
SIZES = {
    "vocab_size": 50, "d_model": 6, "num_heads": 3, "num_layers": 1, "d_ff": 10,
    "max_len": 9, "num_labels": 5, "dropout": 0.3, "positions": "sinusoidal",
    "num_segments": 2, "norm_first": True, "pooling": "max", "layer_norm_eps": 1e-5,
}


def make_config(config, **named):
    """A reader's config."""
    return config.run(config.thing, **{"vocab_size": 50} | named)


def fields_of(made):
    """What a reader's config holds, by name."""
    for name in ("vocab_size", *DEFAULTS):
        expect(
            hasattr(made, name),
            f"it has no field {name}: the parts of the model read it by that name",
        )
    return {name: getattr(made, name) for name in ("vocab_size", *DEFAULTS)}


@config_battery.property("holds what it is given")
def config_holds(config):
    held = fields_of(make_config(config, **SIZES))
    for name, value in SIZES.items():
        expect(
            held[name] == value,
            f"made with {name}={value!r}, it holds {name}={held[name]!r}",
        )


@config_battery.property("has the book's defaults, but none for vocab_size")
def config_defaults(config):
    held = fields_of(make_config(config))
    for name, value in DEFAULTS.items():
        expect(
            held[name] == value and type(held[name]) is type(value),
            f"the default of {name} is {held[name]!r}: it must be {value!r}",
        )
    expect(
        refused(config.run, config.thing),
        "vocab_size has a default: it depends on the tokenizer, and must be given",
    )


@config_battery.property("cannot be changed, and can be copied with replace")
def config_frozen(config):
    made = make_config(config)
    expect(
        dataclasses.is_dataclass(made),
        "it is no dataclass: without @dataclass there is no replace, no comparison "
        "and no readable print",
    )
    try:
        made.d_model = 256
    except Exception:
        pass
    else:
        raise Wrong(
            "a field can be assigned after it was checked (d_model = 256), and no "
            "rule is asked: the dataclass must be frozen"
        )
    other = config.run(dataclasses.replace, made, d_model=64)
    expect(
        other.d_model == 64 and made.d_model == 128,
        "replace(config, d_model=64) does not give a new config with that width",
    )
    expect(
        make_config(config) == make_config(config),
        "two configs of the same numbers are not equal: leave eq of the dataclass on",
    )
    expect(
        refused(config.run, dataclasses.replace, made, num_heads=3),
        "replace(config, num_heads=3) makes a config that breaks a rule: check in "
        "__post_init__, which replace calls too",
    )


def expect_refused(config, rule, *cases):
    """Refuse a config that takes what breaks a rule."""
    for case in cases:
        try:
            made = make_config(config, **case)
        except Broke:
            if on_purpose(config):
                continue
            raise
        shown = ", ".join(f"{name}={value!r}" for name, value in case.items())
        name = next(iter(case))
        hint = f"{shown} is accepted, but {rule}: refuse it by a ValueError"
        if hasattr(made, name) and getattr(made, name) != case[name]:
            hint = f"{shown} is quietly changed into {getattr(made, name)!r}: {hint}"
        raise Wrong(hint)


@config_battery.property("refuses sizes that are no whole numbers of at least 1")
def config_sizes(config):
    for name in ("vocab_size", "d_model", "num_heads", "num_layers", "d_ff", "max_len",
                 "num_labels"):
        rule = f"{name} must be a whole number of at least 1"
        expect_refused(config, rule, {name: 0}, {name: -4})
        expect_refused(config, rule, {name: 51.2}, {name: "8"})
    rule = "num_segments must be a whole number of at least 0"
    expect_refused(config, rule, {"num_segments": -1}, {"num_segments": 1.5})


@config_battery.property("refuses num_heads that does not divide d_model")
def config_heads(config):
    expect_refused(
        config, "num_heads must divide d_model", {"d_model": 130},
        {"num_heads": 3}, {"d_model": 4, "num_heads": 8}, {"d_model": 1, "num_heads": 2},
    )


@config_battery.property("refuses other choices than those it knows")
def config_choices(config):
    expect_refused(
        config, "positions must be learned, sinusoidal or none", {"positions": "rotary"},
        {"positions": "Learned"}, {"positions": None},
    )
    expect_refused(
        config, "pooling must be mean, max or cls", {"pooling": "sum"},
        {"pooling": "CLS"}, {"pooling": None},
    )
    expect_refused(
        config, "norm_first must be True or False (a text such as 'post' counts as "
        "true in Python)", {"norm_first": "post"}, {"norm_first": None},
    )


@config_battery.property("refuses an odd width for sinusoidal positions")
def config_odd(config):
    expect_refused(
        config, "sinusoidal positions need an even d_model, a sine and a cosine each",
        {"d_model": 7, "num_heads": 7, "positions": "sinusoidal"},
    )


@config_battery.property("refuses dropout outside [0, 1), and eps that is not above 0")
def config_numbers(config):
    expect_refused(
        config, "dropout must be in [0, 1): 1 itself drops everything",
        {"dropout": 1.0}, {"dropout": -0.1}, {"dropout": 1.5},
    )
    expect_refused(
        config, "layer_norm_eps must be above 0", {"layer_norm_eps": 0.0},
        {"layer_norm_eps": -1e-5},
    )


@config_battery.property("accepts all that is allowed, up to the edges")
def config_accepts(config):
    for case in (
        {"dropout": 0.0}, {"dropout": 0.99}, {"num_segments": 2}, {"num_labels": 1},
        {"num_heads": 1}, {"num_heads": 128}, {"max_len": 1}, {"vocab_size": 1},
        {"d_model": 7, "num_heads": 7}, {"norm_first": True}, {"pooling": "cls"},
        {"d_model": 7, "num_heads": 1, "positions": "none"}, {"pooling": "max"},
        {"d_model": 6, "num_heads": 3, "positions": "sinusoidal"}, {"d_ff": 5},
        {"layer_norm_eps": 1e-5}, {"num_layers": 24}, {"dropout": 0},
        {"d_model": 1, "num_heads": 1, "d_ff": 1, "num_layers": 1},
    ):
        shown = ", ".join(f"{name}={value!r}" for name, value in case.items())
        try:
            make_config(config, **case)
        except Broke as broke:
            if not on_purpose(config):
                raise
            raise Wrong(f"{shown} is refused, but it is allowed. It {broke}") from None


# TransformerForSequenceClassification: parts under watch

model_battery = Battery(
    "TransformerForSequenceClassification",
    "TransformerForSequenceClassification(config, *, embedding=…, encoder=…, layer=…, "
    "attention=…, feedforward=…, norm=…), called with (input_ids, "
    "attention_mask=None, segment_ids=None, return_weights=False); it also has encode "
    "with the same arguments",
    chapter=7,
    makes=("config", "embedding", "encoder", "layer", "attention", "feedforward", "norm"),
    takes=("input_ids", "attention_mask", "segment_ids", "return_weights"),
)
IDS = torch.tensor([[2, 7, 9, 4, 3], [2, 8, 3, 0, 0], [2, 3, 0, 0, 0]])
SEGMENTS = torch.tensor([[0, 0, 0, 1, 1], [0, 1, 1, 0, 0], [0, 0, 0, 0, 0]])
WIDTH, LABELS = 12, 5
PARTS = {"embedding": ("vocab_size", "d_model", "max_len", "positions", "num_segments"),
         "encoder": ("num_layers", "d_model", "num_heads", "d_ff", "dropout",
                     "norm_first", "layer_norm_eps", "layer", "attention",
                     "feedforward", "norm"),
         "norm": ("d_model", "eps")}
UNMADE = "its parts are not made as they should be; mend that first"


def settings(**changed):
    """A config with fields of the book's names, none of them a default."""
    return SimpleNamespace(**{
        "vocab_size": 11, "d_model": WIDTH, "num_heads": 3, "num_layers": 2, "d_ff": 20,
        "max_len": 9, "num_labels": LABELS, "dropout": 0.0, "positions": "learned",
        "num_segments": 3, "norm_first": False, "pooling": "mean",
        "layer_norm_eps": 1e-3,
    } | changed)


class Sublayer:
    """A class to be passed on; nothing of it is ever made."""

    def __init__(self, *positional, **named):
        raise Wrong(
            "a sublayer is made although the encoder's class was passed in: the class "
            "that the model gets as encoder= is not used (a class of a fixed name is)"
        )


class Watch:
    """Classes of the model's parts, and a record of how they were used."""

    def __init__(self):
        self.made, self.calls = [], []
        watch = self

        class Part(nn.Module):
            kind = ""

            def __init__(self, *positional, **named):
                super().__init__()
                wanted = PARTS[self.kind]
                if self.kind == "norm":
                    named = dict(zip(wanted[:1], positional[:1], strict=False)) | named
                    positional = positional[1:]
                expect(
                    not positional and set(named) <= set(wanted),
                    f"the {self.kind} is made with " + (
                        "a width first, and then eps by name"
                        if self.kind == "norm" else ", ".join(wanted) + ", all by name"
                    ) + "; here " + (
                        f"{len(positional)} arguments come without a name" if positional
                        else f"it gets {', '.join(sorted(set(named) - set(wanted)))}"
                    ),
                )
                expect("d_model" in named, f"the {self.kind} is made without d_model")
                self.given = named
                self.build(**named)
                for parameter in self.parameters():
                    nn.init.constant_(parameter, 5.0)
                watch.made.append(self)

            def note(self, x, out, **heard):
                watch.calls.append(SimpleNamespace(
                    kind=self.kind, module=self, input=x.detach().clone(),
                    output=out.detach().clone(), **heard,
                ))

        class Embedding(Part):
            kind = "embedding"

            def build(self, d_model, **others):
                self.token = nn.Embedding(others.get("vocab_size", 11), d_model)
                self.segment = nn.Embedding(2, d_model)

            def forward(self, input_ids, segment_ids=None):
                out = self.token(input_ids)
                places = torch.arange(input_ids.shape[1], device=input_ids.device)
                out = out + torch.sin(places + 1.0).to(out)[:, None]
                if segment_ids is None:
                    chosen = torch.zeros_like(input_ids)
                else:
                    chosen = segment_ids.long() % 2
                out = out + self.segment(chosen)
                self.note(input_ids, out, segments=segment_ids)
                return out

        class Norm(Part):
            kind = "norm"

            def build(self, d_model, **others):
                self.weight = nn.Parameter(torch.ones(d_model))
                self.bias = nn.Parameter(torch.zeros(d_model))

            def forward(self, x):
                out = F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)
                self.note(x, out)
                return out

        class Encoder(Part):
            kind = "encoder"

            def build(self, d_model, **others):
                self.own = nn.Linear(d_model, d_model)
                self.mix = nn.Linear(d_model, d_model)

            def forward(self, x, attention_mask=None, return_weights=False):
                right = (isinstance(attention_mask, torch.Tensor)
                         and attention_mask.dtype == torch.bool
                         and attention_mask.shape == x.shape[:2])
                scores = self.mix(x) @ x.mT / 10
                if right:
                    scores = scores.masked_fill(~attention_mask[:, None], NOTHING)
                weights = scores.softmax(-1).nan_to_num()
                out = torch.tanh(self.own(x) + weights @ x)
                self.note(x, out, mask=attention_mask, asked=return_weights)
                weights = weights[:, None].expand(-1, 3, -1, -1)
                return (out, [weights, weights.mT]) if return_weights is True else out

        self.Embedding, self.Norm, self.Encoder = Embedding, Norm, Encoder

    def of(self, kind):
        """All parts of a kind that were made."""
        return [part for part in self.made if part.kind == kind]

    def called(self, kind):
        """All calls of a kind, in order."""
        return [call for call in self.calls if call.kind == kind]


def make_model(model, **changed):
    """The reader's model with parts under watch."""
    watch = Watch()
    made = model.make(
        config=settings(**changed), embedding=watch.Embedding, encoder=watch.Encoder,
        layer=Sublayer, attention=Sublayer, feedforward=Sublayer, norm=watch.Norm,
    )
    return made, watch


def head_of(made, watch):
    """The reader's head: the one Linear layer, with a bias, that is no part of ours."""
    ours = {id(m) for part in watch.made for m in part.modules()}
    found = [m for m in made.modules() if isinstance(m, nn.Linear) and id(m) not in ours]
    return found[0] if len(found) == 1 and found[0].bias is not None else None


def watch_model(model, **changed):
    """The same with random weights, in evaluation; skip what cannot be watched."""
    if model.lacks & {"embedding", "encoder", "norm"}:
        raise Skip(UNMADE)
    try:
        made, watch = make_model(model, **changed)
    except Wrong as wrong:
        if isinstance(wrong, Broke):
            raise
        raise Skip(UNMADE) from None
    counts = [len(watch.of(kind)) for kind in ("embedding", "norm", "encoder")]
    if counts[0] != 1 or counts[2] != 1:
        raise Skip(UNMADE)
    return scramble(made).eval(), watch


def call(model, function, *arguments, what="the logits", shape=None, **named):
    """Call something of the reader's; expect one tensor."""
    out = model.run(function, *(
        a.clone() if isinstance(a, torch.Tensor) else a for a in arguments
    ), **named)
    if isinstance(out, tuple):
        raise Wrong(
            "it returns a tuple where only one thing was asked for: the weights come "
            "with return_weights=True alone"
        )
    expect_tensor(out, what=what)
    if shape is None:
        shape = (len(arguments[0]), LABELS)
        if out.shape == (*arguments[0].shape, LABELS):
            raise Wrong(
                "there are scores for each token: pool the tokens into one vector a "
                "text before the head"
            )
    expect_tensor(out, shape, what=what)
    return out


@model_battery.property("makes an embedding, a norm, an encoder and a head")
def model_parts(model):
    absent = sorted(model.lacks)
    expect(
        not absent,
        f"the constructor takes no {', '.join(absent)}. The expected signature is "
        + model_battery.signature,
    )
    made, watch = make_model(model)
    inside = {id(m) for m in made.modules()}
    for kind in ("embedding", "encoder"):
        parts = watch.of(kind)
        expect(
            len(parts) > 0,
            f"the class that it gets as {kind}= is not used: make the part from the "
            "argument, not from a class of a fixed name",
        )
        expect(len(parts) == 1, f"{len(parts)} parts are made as {kind}=: one is enough")
    for part in watch.made:
        expect(
            id(part) in inside,
            f"the {part.kind} is made but not registered: make it an attribute of the "
            "module, not an element of a plain list or dict",
        )
    linears = [
        m for m in made.modules() if isinstance(m, nn.Linear)
        and all(m is not ours for part in watch.made for ours in part.modules())
    ]
    heads = [m for m in linears if m.out_features == LABELS]
    if not heads and linears:
        raise Wrong(
            f"the head gives {linears[-1].out_features} scores where num_labels is "
            f"{LABELS}: take the number from the config"
        )
    expect(
        len(linears) <= 1,
        f"there are {len(linears)} Linear layers beside the encoder: the head is one. "
        "BERT's pooler (a further Linear with tanh) is left out here",
    )
    ours = sum(p.numel() for part in watch.made for p in part.parameters())
    count = sum(p.numel() for p in made.parameters()) - ours
    wanted = LABELS * WIDTH + LABELS
    expect(count != LABELS * WIDTH, "the head has no bias")
    expect(
        count == wanted,
        f"beside embedding, norm and encoder there must be a head of {wanted} "
        f"parameters (num_labels × d_model, and a bias each), but there are {count}",
    )


@model_battery.property("makes them of the config's numbers")
def model_config(model):
    if model.lacks & {"embedding", "encoder", "norm"}:
        raise Skip(UNMADE)
    others = {
        "positions": "sinusoidal", "norm_first": True, "dropout": 0.25, "num_layers": 4,
        "num_heads": 2, "d_ff": 7, "max_len": 6, "num_segments": 0, "vocab_size": 10,
        "layer_norm_eps": 1e-7, "pooling": "max", "num_labels": 3,
    }
    for changed in ({}, others):
        config = settings(**changed)
        made, watch = make_model(model, **changed)
        for part in watch.made:
            for name in PARTS[part.kind]:
                field = "layer_norm_eps" if name == "eps" else name
                if name in ("layer", "attention", "feedforward", "norm"):
                    wanted = watch.Norm if name == "norm" else Sublayer
                    expect(
                        part.given.get(name) is wanted,
                        f"the class that the model gets as {name}= is not passed on "
                        "to the encoder: a layer put in there would never be used",
                    )
                    continue
                expect(
                    name in part.given,
                    f"{field} is not passed on to the {part.kind}: it takes its own "
                    "default, whatever the config says",
                )
                expect(
                    part.given[name] == getattr(config, field),
                    f"the {part.kind} gets {name}={part.given[name]!r} where the config "
                    f"says {field}={getattr(config, field)!r}: a fixed number, or "
                    "another field",
                )
        held = getattr(made, "config", None)
        expect(
            held is not None,
            "the model does not keep its config: self.config = config. Saving and "
            "loading need it",
        )
        expect(
            vars(held) == vars(config) if isinstance(held, SimpleNamespace) else False,
            "self.config is not the config that the model was made with",
        )


def stages(model, made, watch, mask):
    """Call the model, and give its logits and the record of the parts."""
    watch.calls.clear()
    out = call(model, made, IDS, mask)
    for kind in ("embedding", "encoder"):
        count = len(watch.called(kind))
        expect(
            count > 0, f"the {kind} is made, but never called",
        )
        expect(count == 1, f"the {kind} is called {count} times: once is enough")
    return out, watch.called("embedding")[0], watch.called("encoder")[0]


@model_battery.property("embedding, then its norm, then the encoder")
def model_below(model):
    made, watch = watch_model(model)
    again = call(model, made, IDS, REAL)
    out, embedded, encoded = stages(model, made, watch, REAL)
    expect(near(again, out), ALWAYS_ON)
    expect(
        torch.equal(embedded.input, IDS),
        "the embedding gets other ids than those passed in",
    )
    norms = watch.called("norm")
    expect(
        watch.of("norm"),
        "the norm after the embedding is missing" if near(encoded.input, embedded.output)
        else "no norm is made from the class that the model gets as norm=",
    )
    expect(
        norms,
        "the norm after the embedding is made, but never called",
    )
    expect(
        len(watch.of("norm")) == 1 and len(norms) <= 2,
        f"{len(watch.of('norm'))} norms are made beside the encoder: there is one, "
        "right after the embedding",
    )
    first = norms[0]
    expect(
        near(first.input, embedded.output),
        "the norm reads something else than the embedding's vectors: it stands "
        "between embedding and encoder. Is something added or multiplied on the way, "
        "such as positions a second time?",
    )
    explain(
        encoded.input, first.output, [
            ("the norm after the embedding is called, but its result is not used",
             lambda: embedded.output),
            ("the embedding's vectors are added to their norm: here is no residual",
             lambda: embedded.output + first.output),
            ("the vectors are multiplied by the root of d_model: the embedding does "
             "what scaling there is", lambda: first.output * math.sqrt(WIDTH)),
            ("padded positions are set to 0 before the encoder: the mask does it, "
             "inside attention", lambda: first.output * REAL[:, :, None]),
        ],
        "the encoder must read the norm of the embedding's vectors, and it reads "
        "something else",
    )
    expect(
        len(norms) == 1,
        "the norm is called a second time: it stands after the embedding only",
    )


def model_pooled(hidden, mask, how):
    """Pool what the encoder gave; without a mask all tokens are real."""
    if mask is None:
        mask = torch.ones(hidden.shape[:2], dtype=torch.bool)
    return pooled(hidden, mask, how)


def above_causes(hidden, read, mask, how, logits, normed):
    """What wrong ways from the encoder's vectors to the logits give."""
    right = model_pooled(hidden, mask, how)
    inside = " is inside the model: it gives logits, and the loss has the softmax inside"
    causes = [
        ("a softmax" + inside, lambda: logits(right).softmax(-1)),
        ("a log-softmax" + inside, lambda: logits(right).log_softmax(-1)),
        ("a softmax, over the texts," + inside, lambda: logits(right).softmax(0)),
        ("a sigmoid is inside the model: it gives logits",
         lambda: logits(right).sigmoid()),
        ("a tanh stands behind the head: logits may be any numbers",
         lambda: logits(right).tanh()),
        ("a ReLU stands behind the head: logits may be below 0",
         lambda: logits(right).relu()),
        ("the bias of the head is not added",
         lambda: logits(right) - logits(torch.zeros_like(right))),
        ("a tanh stands between pooling and head: BERT's pooler is left out here",
         lambda: logits(right.tanh())),
        ("a ReLU stands between pooling and head", lambda: logits(right.relu())),
        ("a GELU stands between pooling and head", lambda: logits(F.gelu(right))),
        ("the pooled vector is normalised before the head: the norm stands after the "
         "embedding only", lambda: logits(F.layer_norm(right, (WIDTH,)))),
        ("the pooled vector gets length 1 before the head",
         lambda: logits(F.normalize(right, dim=-1))),
        ("the pooled vector goes through the embedding's norm",
         lambda: logits(normed(right))),
        ("the encoder's vectors go through the embedding's norm before the pooling",
         lambda: logits(model_pooled(normed(hidden), mask, how))),
        ("the mask is not used in the pooling: padding counts",
         lambda: logits(model_pooled(hidden, None, how))),
        ("the embedding is pooled, not what the encoder gives",
         lambda: logits(model_pooled(read, mask, how))),
        ("the logits of all tokens are pooled, not their vectors: pool first, then "
         "the head", lambda: model_pooled(logits(hidden), mask, how)),
    ]
    if mask is None:
        causes.append((
            "without a mask padding is guessed from the ids: None means that all "
            "tokens are real", lambda: logits(model_pooled(hidden, IDS != 0, how)),
        ))
    for other in ("mean", "max", "cls"):
        ignored = f'the pooling is "{other}" whatever config.pooling says'
        if other != how:
            causes += [
                (ignored, lambda o=other: logits(model_pooled(hidden, mask, o))),
                (ignored + ", and padding counts",
                 lambda o=other: logits(model_pooled(hidden, None, o))),
            ]
    real = torch.ones_like(REAL) if mask is None else mask
    for hint, value in pool_causes(hidden, real, how):
        causes.append((f"in the pooling, {hint}", lambda v=value: logits(v())))
    return causes


@model_battery.property("pools the real tokens as config.pooling says, then the head")
def model_above(model):
    for how in ("mean", "max", "cls"):
        made, watch = watch_model(model, pooling=how)
        head = head_of(made, watch)
        if head is None:
            raise Skip("no single Linear layer was found as the head; mend that first")
        w, b = head.weight.detach().double(), head.bias.detach().double()

        def logits(vector, w=w, b=b):
            return vector @ w.T + b

        norms = watch.of("norm")

        def normed(vector, norms=norms):
            return F.layer_norm(vector, (WIDTH,), norms[0].weight.double(),
                                norms[0].bias.double(), 1e-5).detach()

        for mask in (None, REAL, HOLES):
            out, _, encoded = stages(model, made, watch, mask)
            hidden = encoded.output.double()
            explain(
                out, logits(model_pooled(hidden, mask, how)),
                above_causes(
                    hidden, encoded.input.double(), mask, how, logits, normed
                ),
                f"the logits must be the head of the encoder's vectors, pooled by "
                f"{how}, and they are something else", tolerance=3e-5,
            )


@model_battery.property("passes mask and segments on")
def model_mask(model):
    made, watch = watch_model(model)
    call(model, made, IDS, REAL, SEGMENTS)
    expect_mask(watch.called("encoder")[-1], "the encoder", REAL)
    segments = watch.called("embedding")[-1].segments
    expect(
        segments is not None,
        "segment_ids are not passed on to the embedding: both sentences of a pair "
        "look alike",
    )
    expect(
        isinstance(segments, torch.Tensor) and torch.equal(segments, SEGMENTS),
        "the embedding gets something else as segment_ids: are the arguments in "
        "another order (input_ids, attention_mask, segment_ids, return_weights)?",
    )
    call(model, made, IDS, attention_mask=REAL.clone(), segment_ids=SEGMENTS.clone())
    expect_mask(watch.called("encoder")[-1], "the encoder", REAL)
    call(model, made, IDS)
    last = watch.called("encoder")[-1]
    expect(
        last.mask is None
        or isinstance(last.mask, torch.Tensor) and bool(last.mask.all()),
        "without a mask the encoder gets one: pass None on",
    )
    expect(
        watch.called("embedding")[-1].segments is None
        or not bool(torch.as_tensor(watch.called("embedding")[-1].segments).any()),
        "without segment_ids the embedding gets some: pass None on",
    )


@model_battery.property("gives a text the same scores alone and in company")
def model_company(model):
    for how in ("mean", "max", "cls"):
        made, watch = watch_model(model, pooling=how)
        together = call(model, made, IDS, REAL)
        for row, length in enumerate(REAL.sum(1).tolist()):
            alone = call(model, made, IDS[row:row + 1, :length],
                         REAL[row:row + 1, :length])
            expect(
                near(alone, together[row:row + 1]),
                "a text gets other scores in a batch than alone: padding counts "
                f"somewhere, in the encoder or in the pooling ({how})",
            )
        expect(
            near(call(model, made, IDS.flip(0), REAL.flip(0)), together.flip(0)),
            "a text's scores depend on its place in the batch",
        )


@model_battery.property("encode gives one vector a token, without pooling and head")
def model_encode(model):
    made, watch = watch_model(model)
    expect(
        callable(getattr(made, "encode", None)),
        "it has no method encode: later chapters train the encoder before there is a "
        "head. " + model_battery.signature,
    )
    out = call(model, made.encode, IDS, REAL, SEGMENTS, what="what encode gives",
               shape=(3, 5, WIDTH))
    last = watch.called("encoder")[-1]
    expect(
        near(out, last.output),
        "encode must give what the encoder gives, unchanged",
    )
    expect_mask(last, "the encoder (from encode)", REAL)
    expect(
        watch.called("embedding")[-1].segments is not None,
        "encode does not pass segment_ids on to the embedding",
    )
    forward = [c.input for c in watch.called("encoder")]
    call(model, made, IDS, REAL, SEGMENTS)
    expect(
        near(watch.called("encoder")[-1].input, forward[-1]),
        "encode and forward give the encoder different vectors: is the norm, or the "
        "scaling, in one of them only?",
    )
    result = ask(
        model, made.encode, lambda: watch.called("encoder")[-1], "the encoder", IDS, REAL
    )
    expect(
        near(result[0], watch.called("encoder")[-1].output),
        "encode with return_weights=True must return the vectors and the list of "
        "weights",
    )


@model_battery.property("returns the list of weights when asked")
def model_weights(model):
    made, watch = watch_model(model)
    out = call(model, made, IDS, REAL)
    result = ask(
        model, made, lambda: watch.called("encoder")[-1], "the encoder", IDS, REAL
    )
    last = watch.called("encoder")[-1]
    if isinstance(result[0], (list, tuple)):
        raise Wrong("the logits come first, and the list of weights second")
    expect(
        isinstance(result[0], torch.Tensor) and near(result[0], out),
        "the logits differ when the weights are asked for",
    )
    with torch.no_grad():
        wanted = last.module(last.input, last.mask, True)[1]
    got = result[1]
    expect(
        isinstance(got, (list, tuple)) and len(got) == 2
        and all(near(g, w) for g, w in zip(got, wanted, strict=True)),
        "the weights must come as the encoder gives them: a list, one tensor a layer",
    )


@model_battery.property("begins with small weights everywhere, by init_weights")
def model_start(model):
    if model.lacks & {"embedding", "encoder", "norm"}:
        raise Skip(UNMADE)
    made, watch = make_model(model, d_model=96, vocab_size=60)
    head = head_of(made, watch)
    if head is None or [len(watch.of(k)) for k in ("embedding", "encoder")] != [1, 1]:
        raise Skip(UNMADE)
    (embedding,), (encoder,) = watch.of("embedding"), watch.of("encoder")
    fresh = (head.weight.detach().double() * math.sqrt(96)).flatten().sort().values
    weights = {
        "the embedding": embedding.token.weight, "the encoder": encoder.own.weight,
        "the head": head.weight,
    }
    left = [
        what for what, weight in weights.items()
        if bool((weight == 5).all()) or (
            what == "the head" and weight.abs().max() > 0.0405
            and apart(fresh, even(1)) < 2.5 / math.sqrt(len(fresh))
        )
    ]
    expect(
        len(left) < 3,
        "no weight is drawn by init_weights: self.apply(init_weights) is missing, or "
        "it stands before the parts are made. It must be the constructor's last line",
    )
    expect(
        "the head" not in left or len(left) > 1,
        "the head keeps PyTorch's own first weights, so the model begins too loud: is "
        "it made after init_weights was applied, or was that applied to the other "
        "parts only?",
    )
    expect(
        not left,
        f"{' and '.join(left)} keep the weights that they came with: apply "
        "init_weights to the whole model (self.apply), at the end of the constructor",
    )
    for what, weight in weights.items():
        values = (weight.detach().double() / 0.02).flatten().sort().values
        expect(
            apart(values, cut_at(2)) < 2.5 / math.sqrt(len(values)),
            f"the weights of {what} are not BERT's first weights (a normal "
            "distribution with standard deviation 0.02, cut off at two of them): their "
            f"standard deviation is {weight.std().item():.3g}. Does init_weights pass "
            "its own check?",
        )
    for what, bias in (("head", head.bias), ("encoder", encoder.own.bias)):
        expect(
            bias is None or bool((bias == 0).all()),
            f"the {what}'s bias does not start at 0",
        )
    norm = watch.of("norm")
    expect(
        not norm or bool((norm[0].weight == 5).all()),
        "the norm's weight is drawn or set anew: init_weights leaves norms alone",
    )


@model_battery.property("drops before the encoder and before the head, in training")
def model_dropout(model):
    share = 0.25
    made, watch = watch_model(model, dropout=share)
    head = head_of(made, watch)
    if head is None or len(watch.of("norm")) != 1:
        raise Skip(UNMADE)
    many = IDS[:1].repeat(40, 1)
    quiet = call(model, made, many)
    expect(near(call(model, made, many), quiet), ALWAYS_ON)
    heard = []
    hook = head.register_forward_pre_hook(lambda _, given: heard.append(given[0]))
    try:
        watch.calls.clear()
        out = call(model, made.train(), many)
    finally:
        hook.remove()
    if not heard or not watch.called("norm"):
        raise Skip(UNMADE)
    (encoded,), norm = watch.called("encoder"), watch.called("norm")[0]
    embedded = watch.called("embedding")[0]
    vectors = heard[-1].detach()
    right = pooled(encoded.output, torch.ones(40, 5, dtype=torch.bool), "mean").to(vectors)
    w, b = head.weight.detach(), head.bias.detach()
    behind = dropped(out.detach(), vectors @ w.T + b)
    expect(
        behind is None or behind[0] == 0,
        "dropout stands behind the head, on the logits: a class whose score is set to "
        "0 tells nothing. It stands before the head",
    )
    expect_dropped(
        encoded.input, norm.output, share, "what the encoder reads", [
            ("dropout stands between the embedding and its norm: it comes after the "
             "norm", norm.input, embedded.output),
        ],
    )
    if vectors.shape == right.shape:
        expect_dropped(vectors, right, share, "what the head reads", [
            ("dropout falls on the encoder's vectors before the pooling: it stands "
             "between pooling and head", vectors, vectors),
        ])
    quietly = make_model(model, dropout=0.0)[0].train()
    scramble(quietly)
    expect(
        near(call(model, quietly, many), call(model, quietly, many)),
        "with config.dropout = 0 it still draws by chance in training: a fixed share is "
        "dropped",
    )


@model_battery.property("learns in all its parts")
def model_learns(model):
    made, _ = watch_model(model)
    expect_learning(model, made, lambda: made(IDS, REAL, SEGMENTS))


@model_battery.property("moves to other devices and dtypes")
def model_moves(model):
    expect_to_move(model, lambda: watch_model(model)[0], IDS, REAL)


# count_parameters

count_battery = Battery(
    "count_parameters", "count_parameters(config) -> dict of numbers, with a total",
    chapter=7, takes=("config",),
)
NAMES = ("embedding", "attention", "feed-forward", "norms", "head")


def count(c, *, rows=None, embedding_norm=True, biases=True, attention=4, ff_biases=True,
          norms=None, head_bias=True, layers=None, heads=1):
    """Count by formula, right or with one mistake."""
    d, f = c.d_model, c.d_ff
    layers = c.num_layers if layers is None else layers
    if rows is None:
        rows = c.vocab_size + c.num_segments + (
            c.max_len if c.positions == "learned" else 0)
    if norms is None:
        norms = 2 * layers + c.norm_first
    counts = {
        "embedding": rows * d + 2 * d * embedding_norm,
        "attention": layers * (attention * d * d + attention * d * biases) * heads,
        "feed-forward": layers * (2 * d * f + (f + d) * ff_biases),
        "norms": norms * 2 * d,
        "head": d * c.num_labels + c.num_labels * head_bias,
    }
    return counts | {"total": sum(counts.values())}


def part_causes(c):
    """For each part, wrong counts and their hints."""
    d, f, n = c.d_model, c.d_ff, c.num_layers
    right = count(c)
    segments, places = c.num_segments, c.max_len
    learned = c.positions == "learned"
    inner = c.vocab_size + segments + places * learned
    every_layer = "the number of layers is forgotten: this is one layer"
    return {
        "embedding": [
            ("the embedding's norm is not counted with the embedding",
             inner * d),
            ("the embedding's norm has a weight and a bias: 2 · d_model",
             inner * d + d),
            ("positions are counted although they are not learned"
             if not learned else "positions are counted twice",
             (inner + places) * d + 2 * d),
            ("the positions are missing: where they are learned, max_len counts",
             (inner - places * learned) * d + 2 * d),
            ("the segments are missing", (inner - segments) * d + 2 * d),
            ("positions and segments are missing", c.vocab_size * d + 2 * d),
            ("only the tokens are counted", c.vocab_size * d),
        ],
        "attention": [
            (every_layer, right["attention"] // n),
            ("the biases of the four projections are not counted", n * 4 * d * d),
            ("the output projection is not counted: four matrices, not three",
             n * 3 * (d * d + d)),
            ("num_heads multiplies: all heads share the d_model numbers, and split "
             "them", right["attention"] * c.num_heads),
            ("num_heads divides: all heads together have d_model numbers",
             right["attention"] // c.num_heads),
            ("one projection is counted: there are four", n * (d * d + d)),
            ("four matrices, but one bias: each has its own",
             n * (4 * d * d + d)),
        ],
        "feed-forward": [
            (every_layer, right["feed-forward"] // n),
            ("the biases are not counted", n * 2 * d * f),
            ("one of the two matrices is counted", n * (d * f + f + d)),
            ("one of the two matrices is counted", n * d * f),
            ("the bias of the second matrix is d_model long, not d_ff",
             n * (2 * d * f + 2 * f)),
            ("the bias of the first matrix is d_ff long, not d_model",
             n * (2 * d * f + 2 * d)),
            ("the bias of the second matrix is missing", n * (2 * d * f + f)),
            ("the bias of the first matrix is missing", n * (2 * d * f + d)),
            ("d_ff is taken as 4 · d_model: read it from the config",
             n * (8 * d * d + 5 * d)),
        ],
        "norms": [
            ("pre-norm has one norm more, after the last layer", 2 * n * 2 * d),
            ("post-norm has no norm after the last layer", (2 * n + 1) * 2 * d),
            ("the number of layers is forgotten", (2 + c.norm_first) * 2 * d),
            ("a norm has a weight and a bias: 2 · d_model each",
             right["norms"] // 2),
            ("a layer has two norms, not one", (n + c.norm_first) * 2 * d),
            ("the embedding's norm is counted here: it belongs to the embedding",
             right["norms"] + 2 * d),
            ("the last norm of pre-norm is counted once a layer", 3 * n * 2 * d),
        ],
        "head": [
            ("the head's biases are not counted", d * c.num_labels),
            ("the head has one bias a class, num_labels in all, not d_model",
             d * c.num_labels + d),
            ("a pooler is counted: this model has none",
             d * c.num_labels + c.num_labels + d * d + d),
            ("the number of classes is not read from the config", d * 6 + 6),
            ("the number of classes is not read from the config", d * 4 + 4),
        ],
    }


CASES = (
    {}, {"norm_first": True}, {"positions": "sinusoidal"}, {"positions": "none"},
    {"num_segments": 0}, {"num_layers": 1, "num_labels": 3},
    {"vocab_size": 4000, "d_model": 128, "num_heads": 4, "d_ff": 512, "num_labels": 6,
     "max_len": 128, "num_segments": 0},
)


def counted(function, **changed):
    """The reader's count of a config, as a dict."""
    given = function(settings(**(changed or {"num_layers": 3})))
    expect(given is not None, "it returns None: is there a return at the end?")
    expect(
        isinstance(given, dict),
        f"it must return a dict from part to number, but it is a "
        f"{type(given).__name__}",
    )
    return given


@count_battery.property("names the parts and their total")
def count_names(function):
    given = counted(function)
    missing = [name for name in (*NAMES, "total") if name not in given]
    expect(
        not missing,
        f"the dict has no {', '.join(map(repr, missing))}: its keys are "
        f"{', '.join((*NAMES, 'total'))}",
    )
    unknown = [str(name) for name in given if name not in (*NAMES, "total")]
    expect(not unknown, f"the dict has keys that are no part: {', '.join(unknown)}")
    for name, value in given.items():
        expect(
            isinstance(value, int) and not isinstance(value, bool),
            f"{name} must be a whole number, but it is {value!r}: divide nothing, and "
            "use // where you must",
        )


def add_part(part):
    """Add the property that one part is counted right."""
    @count_battery.property(f"counts {part if part != 'head' else 'the head'}")
    def counts(function):
        seen = []
        for changed in CASES:
            config = settings(**(changed or {"num_layers": 3}))
            got = counted(function, **changed).get(part)
            seen.append((config, got, count(config)[part]))
        off = [case for case in seen if case[1] != case[2]]
        if not off:
            return
        # A mistake that explains all of it; else the first that explains one.
        wrong = [[value for _, value in part_causes(c)[part]] for c, *_ in seen]
        hints = [hint for hint, _ in part_causes(off[0][0])[part]]
        fitting = [
            i for i in range(len(hints))
            if all(values[i] == got for values, (_, got, _) in zip(wrong, seen, strict=True))
        ] or [
            i for i, (_, value) in enumerate(part_causes(off[0][0])[part])
            if value == off[0][1] != off[0][2]
        ]
        if fitting:
            raise Wrong(f"{part}: {hints[fitting[0]]}")
        config, got, wanted = off[0]
        shown = ", ".join(f"{k}={v!r}" for k, v in vars(config).items())
        raise Wrong(f"{part} must be {wanted}, but it is {got}, for {shown}")
    return counts


for _part in NAMES:
    add_part(_part)


@count_battery.property("adds them up")
def count_total(function):
    for changed in CASES:
        given = counted(function, **changed)
        parts = sum(given.get(name, 0) for name in NAMES)
        total = given.get("total")
        expect(
            total != 2 * parts or parts == 0,
            "the total counts itself as well: add up before it is put into the dict",
        )
        expect(
            total == parts,
            f"the total is {total}, but the parts add up to {parts}",
        )


# Exercises

balance = Battery(
    "balance_width",
    "balance_width(vocab_size, max_len, num_layers) -> the least d_model, a multiple "
    "of 4",
    chapter=7, takes=("vocab_size", "max_len", "num_layers"),
)


def tipping(vocab_size, max_len, num_layers, *, step=4, enough=None, embedding=None):
    """The least width from which the layers hold more than the embedding."""
    d = step
    while True:
        below = embedding(d) if embedding else (vocab_size + max_len) * d + 2 * d
        above = num_layers * (4 * (d * d + d) + 2 * d * 4 * d + 4 * d + d)
        if enough(above, below) if enough else above > below:
            return d
        d += step


@balance.property("is the least width at which the layers hold more")
def balance_value(function):
    for case in ((4000, 128, 2), (30522, 512, 12), (100, 16, 1), (4000, 128, 1)):
        got = function(*case)
        if isinstance(got, torch.Tensor):
            got = got.item()
        expect(got is not None, "it returns None: is there a return at the end?")
        wanted = tipping(*case)
        vocab_size, max_len, num_layers = case
        wrong = (
            ("widths that are no multiple of 4 are tried: step by 4",
             tipping(*case, step=1)),
            ("it is the last width at which the embedding still holds more: one step "
             "more", wanted - 4),
            ("num_layers is not used", tipping(vocab_size, max_len, 2)),
            ("max_len is not used: 128 in its place", tipping(vocab_size, 128, num_layers)),
            ("vocab_size is not used: 4,000 in its place",
             tipping(4000, max_len, num_layers)),
            ("the positions are left out of the embedding",
             tipping(*case, embedding=lambda d, v=vocab_size: v * d)),
            ("only feed-forward is weighed against the embedding: attention counts too",
             tipping(*case, enough=lambda above, below: above * 2 / 3 > below)),
            ("only attention is weighed against the embedding: feed-forward counts too",
             tipping(*case, enough=lambda above, below: above / 3 > below)),
            ("d_ff is fixed: it is 4 · d_model, and grows with it", 0),
        )
        if got != wanted:
            shown = ", ".join(map(str, case))
            for hint, value in wrong:
                if got == value:
                    raise Wrong(f"for ({shown}): {hint}")
            raise Wrong(
                f"for (vocab_size, max_len, num_layers) = ({shown}) it must be {wanted}, "
                f"but it is {got!r}: is d_ff = 4 · d_model, and are attention and "
                "feed-forward compared with the embedding?"
            )


words_battery = Battery(
    "words_only", "words_only(input_ids, attention_mask) -> bool mask (batch, seq_len)",
    chapter=7, takes=("input_ids", "attention_mask"),
)
POSTS = torch.tensor([[2, 7, 1, 4, 3], [2, 8, 3, 0, 0], [2, 3, 0, 0, 0], [2, 9, 3, 2, 3]])
HELD = torch.tensor([[True] * 5, [True] * 3 + [False] * 2, [True] * 2 + [False] * 3,
                     [True] * 3 + [False] * 2])


@words_battery.property("is True for real tokens that are neither [CLS] nor [SEP]")
def words_value(function):
    out = function(POSTS.clone(), HELD.clone())
    expect_tensor(out, POSTS.shape, what="the mask")
    expect(
        out.dtype == torch.bool,
        f"the mask must be bool, but it is {out.dtype}: combine masks by &, not by *",
    )
    cls, sep = POSTS == 2, POSTS == 3
    wrong = (
        ("[SEP] is still counted", HELD & ~cls),
        ("[CLS] is still counted", HELD & ~sep),
        ("padding is counted: combine with attention_mask",
         ~cls & ~sep),
        ("padding is counted: combine with attention_mask", ~cls & ~sep & (POSTS != 0)),
        ("[UNK] and [MASK] are left out as well: they stand for words", HELD & (POSTS > 4)),
        ("[UNK] is left out as well: it stands for a word", HELD & (POSTS > 3)),
        ("[UNK] is left out as well: it stands for a word",
         HELD & ~cls & ~sep & (POSTS != 1)),
        ("[MASK] is left out as well: it stands for a word",
         HELD & ~cls & ~sep & (POSTS != 4)),
        ("the mask is inverted: True = a token that counts", ~(HELD & ~cls & ~sep)),
        ("it marks [CLS] and [SEP], not the others", HELD & (cls | sep)),
        ("a mask with or in place of and: a token is not [CLS] and not [SEP]",
         HELD & (~cls | ~sep)),
    )
    right = HELD & ~cls & ~sep
    if not torch.equal(out, right):
        for hint, value in wrong:
            if torch.equal(out, value):
                raise Wrong(hint)
        raise Wrong(
            "the mask must be True exactly for real tokens that are neither [CLS] nor "
            f"[SEP]: for ids {POSTS[1].tolist()} that is {right[1].tolist()}, but it is "
            f"{out[1].tolist()}. Look at the ids, not at the places"
        )


choosing = Battery(
    "AttentionPool", "AttentionPool(d_model), called with (hidden, attention_mask)",
    chapter=7, makes=("d_model",), takes=("hidden", "attention_mask"),
)


def make_chooser(layer, width=4):
    """A reader's pooling, and its one Linear layer."""
    module = layer.make(d_model=width)
    found = [m for m in module.modules() if isinstance(m, nn.Linear)]
    expect(
        len(found) == 1 and found[0].weight.shape == (1, width),
        "it must hold one nn.Linear(d_model, 1), which gives each token its score",
    )
    return module, found[0]


def chosen(hidden, mask, scores):
    """The weighted mean by given scores."""
    hidden = hidden.double().masked_fill(~mask[:, :, None], 0)
    weights = scores.double().masked_fill(~mask, NOTHING).softmax(-1).nan_to_num()
    return (weights[:, :, None] * hidden).sum(1)


@choosing.property("weighs the real tokens by a softmax of their scores")
def choosing_value(layer):
    module, linear = make_chooser(layer)
    scramble(module, size=1.0)
    w, b = linear.weight.detach().double(), linear.bias
    b = 0.0 if b is None else b.detach().double()
    scores = (HIDDEN.double() @ w.T + b).squeeze(-1)
    every = torch.ones_like(REAL)
    h = HIDDEN.double()
    for mask in (every, REAL, HOLES):
        out = layer.run(module, HIDDEN.clone(), mask.clone())
        expect_tensor(out)
        expect(
            out.shape != (3, 1, 4),
            "the token axis is still there, with length 1: squeeze it out",
        )
        real = mask[:, :, None]
        explain(
            out, chosen(HIDDEN, mask, scores), [
                ("the mask is not used: padding gets a weight",
                 lambda: chosen(HIDDEN, every, scores)),
                ("the mask is inverted: True = a real token",
                 lambda mask=mask: chosen(HIDDEN, ~mask, scores)),
                ("the mask is applied after the softmax: the weights no longer sum to 1",
                 lambda real=real: (scores.softmax(-1)[:, :, None] * h * real).sum(1)),
                ("padded scores are set to 0, but e^0 is 1: fill with minus infinity",
                 lambda mask=mask: ((scores * mask).softmax(-1)[:, :, None] * h).sum(1)),
                ("there is no softmax: the scores themselves weigh the tokens",
                 lambda real=real: (scores[:, :, None] * h * real).sum(1)),
                ("the softmax runs over the texts, not over the tokens",
                 lambda mask=mask, real=real: (scores.masked_fill(~mask, NOTHING)
                                               .softmax(0).nan_to_num()[:, :, None]
                                               * h * real).sum(1)),
                ("the softmax runs over an axis of length 1, so every weight is 1: "
                 "take the scores as (batch, seq_len) first",
                 lambda real=real: (h * real).sum(1)),
                ("each score goes through a sigmoid alone: tokens must compete",
                 lambda real=real: (scores.sigmoid()[:, :, None] * h * real).sum(1)),
                ("the weighted vectors are averaged: the weights sum to 1 already",
                 lambda mask=mask: chosen(HIDDEN, mask, scores) / 5),
                ("the sign is wrong: the highest score gets the least weight",
                 lambda mask=mask: chosen(HIDDEN, mask, -scores)),
                ("the scores are not used: this is the plain mean",
                 lambda mask=mask: pooled(HIDDEN, mask, "mean")),
            ],
            "it must be the sum of the vectors, each times the masked softmax of its "
            "score", tolerance=3e-5,
        )


@choosing.property("is the masked mean while all scores are equal")
def choosing_equal(layer):
    module, linear = make_chooser(layer)
    nn.init.zeros_(linear.weight)
    out = layer.run(module, HIDDEN.clone(), REAL.clone())
    expect(
        near(out, pooled(HIDDEN, REAL, "mean")),
        "with a Linear layer of zeros all scores are equal, and it must be the mean of "
        "the real tokens",
    )
    mask = REAL.clone()
    mask[1] = False
    out = layer.run(module, HIDDEN.clone(), mask)
    expect_tensor(out, (3, 4))
    expect(
        not out[1].isnan().any(),
        "a text of nothing but padding gives NaN: masked_softmax of chapter 04 gives "
        "such a row zeros",
    )


moves = Battery(
    "padding_moves",
    "padding_moves(model, input_ids, attention_mask, extra=3) -> the largest change of "
    "a logit when extra padded columns are added",
    chapter=7, takes=("model", "input_ids", "attention_mask", "extra"),
)


class Toy(nn.Module):
    """A model whose logits depend on padding as wished."""

    def __init__(self, leak, fall=False):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, -2.0]))
        self.leak, self.fall, self.seen = leak, fall, []

    def forward(self, input_ids, attention_mask=None, segment_ids=None,
                return_weights=False):
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids, dtype=torch.bool)
        self.seen.append((input_ids.clone(), attention_mask.clone(), self.training,
                          torch.is_grad_enabled()))
        real = (input_ids * attention_mask).sum(1)
        padded = (~attention_mask.bool()).sum(1)
        if self.training:
            real = real + 100 * torch.rand(len(real))
        # The first logit falls where the second rises, the last text most of all.
        rows = torch.arange(1.0, len(real) + 1)
        return torch.stack([
            real * self.weight[0] - self.leak * padded * rows,
            real * self.weight[1] + (self.leak * 0.5) * padded,
        ], dim=1)


@moves.property("finds 0 where padding does not count, and the change where it does")
def moves_value(function):
    for leak in (0.0, 0.25, -0.25):
        toy = Toy(leak).eval()
        value = number(function(toy, IDS.clone(), REAL.clone(), extra=4))
        wanted = abs(leak) * 4 * 3
        expect(
            not toy.seen[0][2],
            "the model answers in training mode here: call eval() first, or dropout is "
            "measured",
        )
        expect(
            len(toy.seen) == 2,
            f"the model is called {len(toy.seen)} times: twice is enough, without the "
            "further padding and with it",
        )
        (a, mask_a, *_), (b, mask_b, *_) = sorted(toy.seen, key=lambda s: s[0].shape[1])
        expect(
            b.shape[1] - a.shape[1] == 4 and a.shape[1] == 5,
            f"with extra=4 the texts are {a.shape[1]} and {b.shape[1]} tokens long: "
            "they must be as given, and 4 longer",
        )
        expect(
            torch.equal(b[:, :5], a) and not bool(mask_b[:, 5:].any()),
            "the new columns must stand at the end, and be False in the mask",
        )
        expect(bool((b[:, 5:] == 0).all()), "the new columns hold other ids than [PAD], 0")
        expect(torch.equal(mask_a, REAL), "the mask is not passed on as it is")
        signed = max(leak * -1 * 4, leak * 4 * 3 * -1, leak * 2)
        for hint, wrong in (
            ("changes are taken with their sign: a fall counts as well; take abs()",
             signed),
            ("this is the mean change: the largest is asked for",
             abs(leak) * 4 * (6 + 1.5) / 6),
            ("only the first text is looked at", abs(leak) * 4),
            ("this is the sum of all changes: the largest is asked for",
             abs(leak) * 4 * 7.5),
        ):
            if not math.isclose(value, wanted, abs_tol=1e-4) and math.isclose(
                value, wrong, abs_tol=1e-4
            ):
                raise Wrong(hint)
        expect(
            math.isclose(value, wanted, abs_tol=1e-4),
            f"for a model whose logits change by {wanted:g} it gives {value:g}",
        )


def number(value):
    """A reader's result as a float."""
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    expect(
        isinstance(value, (int, float)),
        f"it must return one number, but it returns {type(value).__name__}",
    )
    return float(value)


@moves.property("asks in evaluation mode, without gradients")
def moves_mode(function):
    toy = Toy(0.25).train()
    value = number(function(toy, IDS.clone(), REAL.clone()))
    expect(
        not any(training for _, _, training, _ in toy.seen),
        "a model in training mode stays in it, so dropout is measured as well: call "
        "eval() first",
    )
    expect(
        not any(grad for *_, grad in toy.seen),
        "gradients are recorded: put the calls into torch.no_grad()",
    )
    expect(
        math.isclose(value, 0.25 * 3 * 3, abs_tol=1e-4),
        "without an argument extra is not 3",
    )


work = Battery(
    "count_multiplications",
    "count_multiplications(config, seq_len) -> dict of numbers, with a total, for one "
    "text",
    chapter=7, takes=("config", "seq_len"),
)
WORKERS = ("projections", "scores", "values", "feed-forward", "head")


def multiplications(c, n):
    """Count by formula."""
    d, f, layers = c.d_model, c.d_ff, c.num_layers
    counts = {
        "projections": layers * 4 * n * d * d,
        "scores": layers * n * n * d,
        "values": layers * n * n * d,
        "feed-forward": layers * 2 * n * d * f,
        "head": d * c.num_labels,
    }
    return counts | {"total": sum(counts.values())}


WORK_CASES = (({"num_layers": 3}, 7), ({"num_heads": 4, "d_ff": 30}, 1),
              ({"d_model": 768, "num_heads": 12, "d_ff": 3072, "num_layers": 12}, 128))


def worked(function, changed, seq_len):
    """The reader's count, as a dict with all its parts."""
    given = function(settings(**changed), seq_len)
    expect(
        isinstance(given, dict),
        f"it must return a dict, but it returns {type(given).__name__}",
    )
    missing = [name for name in (*WORKERS, "total") if name not in given]
    expect(
        not missing,
        f"the dict has no {', '.join(map(repr, missing))}: its keys are "
        f"{', '.join((*WORKERS, 'total'))}",
    )
    return given


@work.property("counts projections and feed-forward, which grow with the length")
def work_linear(function):
    for changed, n in WORK_CASES:
        given, c = worked(function, changed, n), settings(**changed)
        right, d = multiplications(c, n), c.d_model
        for part, hints in {
            "projections": (
                ("one layer is counted: num_layers times", right["projections"] // c.num_layers),
                ("seq_len is forgotten: each token is projected",
                 right["projections"] // n),
                ("three of the four projections are counted",
                 right["projections"] * 3 // 4),
                ("num_heads multiplies: all heads together are d_model wide",
                 right["projections"] * c.num_heads),
                ("multiplications and additions are counted: multiplications only",
                 2 * right["projections"]),
                ("the biases are counted: adding them multiplies nothing",
                 c.num_layers * n * 4 * (d * d + d)),
            ),
            "feed-forward": (
                ("one layer is counted: num_layers times",
                 right["feed-forward"] // c.num_layers),
                ("seq_len is forgotten: each token goes through",
                 right["feed-forward"] // n),
                ("one of the two matrices is counted", right["feed-forward"] // 2),
                ("multiplications and additions are counted: multiplications only",
                 2 * right["feed-forward"]),
            ),
            "head": (
                ("the head is counted for each token: after the pooling there is one "
                 "vector", right["head"] * n),
                ("multiplications and additions are counted: multiplications only",
                 2 * right["head"]),
                ("the biases are counted: adding them multiplies nothing",
                 right["head"] + c.num_labels),
            ),
        }.items():
            expect_count(given, right, part, hints, n)


def expect_count(given, right, part, hints, n):
    """Refuse another number for a part."""
    if given[part] == right[part]:
        return
    for hint, value in hints:
        if given[part] == value:
            raise Wrong(f"{part}: {hint}")
    raise Wrong(
        f"{part}: it must be {right[part]} for a text of {n} tokens, but it is "
        f"{given[part]}"
    )


@work.property("counts scores and values, which grow with its square")
def work_square(function):
    for changed, n in WORK_CASES:
        given, c = worked(function, changed, n), settings(**changed)
        right = multiplications(c, n)
        for part in ("scores", "values"):
            hints = (
                ("one layer is counted: num_layers times", right[part] // c.num_layers),
                ("it grows with the length, not with its square: each query meets "
                 "every key", right[part] // n),
                ("one head is counted: all heads together are d_model wide",
                 right[part] // c.num_heads),
                ("num_heads multiplies: each head is only d_head = d_model / num_heads "
                 "wide", right[part] * c.num_heads),
                ("multiplications and additions are counted: multiplications only",
                 2 * right[part]),
            )
            expect_count(given, right, part, hints, n)


@work.property("adds them up")
def work_total(function):
    for changed, n in WORK_CASES:
        given = worked(function, changed, n)
        parts = sum(given[name] for name in WORKERS)
        expect(
            given["total"] == parts,
            f"the total is {given['total']}, but the parts add up to {parts}",
        )
