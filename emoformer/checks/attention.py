"""Checks for chapter 04: attention, single and multi-head."""

import itertools
import math
import re
import weakref

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from .bench import (
    Battery,
    Broke,
    Skip,
    Wrong,
    expect,
    expect_dropout,
    expect_learning,
    expect_tensor,
    expect_to_move,
    explain,
    near,
    sample,
    scramble,
)

MINUS = float("-inf")
FIRST = "the comparison without a mask fails as well; mend that first"


def lengths_mask(lengths, seq_len):
    """(batch, seq_len) bool, True = a real token."""
    return torch.arange(seq_len) < torch.tensor(lengths)[:, None]


# masked_softmax

softmax = Battery(
    "masked_softmax", "masked_softmax(scores, mask=None) -> tensor like scores",
    chapter=4, takes=("scores", "mask"),
)
SCORES = 2 * sample(3, 4, 5, seed=1)
MASK = lengths_mask([5, 3, 1], 5)[:, None, :]  # (3, 1, 5), broadcast over queries


def softmax_causes(scores, mask):
    """What wrong softmaxes of masked scores give."""
    full = scores if mask is None else scores.masked_fill(~mask, MINUS)
    causes = [
        (f"it normalises over the wrong axis ({axis}): each row, along the last "
         "axis, must sum to 1; look at dim=", lambda axis=axis: full.softmax(axis))
        for axis in range(scores.ndim - 1)
    ]
    causes += [
        ("the exponentials are not divided by their sum",
         lambda: (full - full.amax(-1, keepdim=True)).exp()),
        ("the exponentials are not divided by their sum", full.exp),
        ("it normalises over the whole tensor: sum along the last axis only, "
         "with dim=-1, keepdim=True",
         lambda: full.exp() / full.exp().sum()),
        ("these are logarithms of the weights: exponentiate them",
         lambda: full.log_softmax(-1)),
        ("each score is squashed on its own by a sigmoid: scores must compete, so "
         "divide by the sum of the row", full.sigmoid),
        ("the sign is wrong: the largest score gets the smallest weight",
         lambda: (-scores if mask is None
                  else (-scores).masked_fill(~mask, MINUS)).softmax(-1)),
        ("scores are divided by their sum: take exponentials first",
         lambda: scores / scores.sum(-1, keepdim=True)),
    ]
    if mask is None:
        return causes
    real = mask.expand(scores.shape)
    plain = scores.softmax(-1)
    return [
        ("the mask is inverted: True = may be attended to, so the places where "
         "it is False are filled; look for a missing or a needless ~",
         lambda: scores.masked_fill(mask, MINUS).softmax(-1)),
        ("the mask is not used at all", lambda: plain),
        ("the mask is applied after the softmax: the weights of a row no longer "
         "sum to 1. Fill the scores with minus infinity before",
         lambda: plain * real),
        ("masked scores are set to 0 before the softmax, but e^0 is 1, not 0: "
         "fill with minus infinity",
         lambda: (scores * real).softmax(-1)),
        ("the mask is added to the scores as numbers 0 and 1: it must be minus "
         "infinity where False", lambda: (scores + real.float()).softmax(-1)),
        ("masked scores are set to a number that is not small enough (-1): fill "
         "with minus infinity",
         lambda: scores.masked_fill(~mask, -1.0).softmax(-1)),
        ("masked scores are set to a tiny positive number: to the softmax that is "
         "about 0, and e^0 is 1. Fill with minus infinity",
         lambda: scores.masked_fill(~mask, 1e-9).softmax(-1)),
        ("the sum below the line still counts the masked scores: fill them with "
         "minus infinity before taking exponentials",
         lambda: (plain * real)),
        *causes,
    ]


@softmax.property("is the softmax along the last axis")
def softmax_plain(function):
    wanted = SCORES.softmax(-1)
    explain(
        function(SCORES.clone()), wanted, softmax_causes(SCORES, None),
        "it is not exp(score) divided by the sum of exp over the last axis, for "
        f"these scores: {SCORES[0, 0].tolist()} must give {wanted[0, 0].tolist()}",
    )


@softmax.property("gives masked places exactly nothing")
def softmax_masked(function):
    wanted = SCORES.masked_fill(~MASK, MINUS).softmax(-1)
    weights = function(SCORES.clone(), MASK.clone())
    explain(
        weights, wanted, softmax_causes(SCORES, MASK),
        "with a mask the weights are wrong: the real places must share 1 as if the "
        "others were not there" if near(function(SCORES.clone()), SCORES.softmax(-1))
        else FIRST,
    )
    expect(
        bool((weights[~MASK.expand(weights.shape)] == 0).all()),
        "a masked weight is small, but not exactly 0: fill with minus infinity, not "
        "with a large negative number",
    )


@softmax.property("gives a row without any real place zeros, not NaN")
def softmax_empty(function):
    mask = lengths_mask([5, 0, 2], 5)[:, None, :]
    scores = SCORES.clone().requires_grad_()
    weights = function(scores, mask)
    expect_tensor(weights, SCORES.shape)
    expect(
        not weights.isnan().any(),
        "where a row has no True at all it gives NaN: minus infinity minus minus "
        "infinity, or 0 / 0. Shift such a row by 0 and divide it by 1",
    )
    expect(
        bool((weights[1] == 0).all()),
        "where a row has no True at all it must give zeros, but it gives "
        f"{weights[1, 0].tolist()}: with one large negative number for all, the row "
        "looks like one of equal scores",
    )
    weights.square().sum().backward()
    expect(
        scores.grad is not None and scores.grad.isfinite().all(),
        "the weights of an empty row are right, but their gradient is NaN: "
        "repairing NaN afterwards (nan_to_num, where) does not repair the way "
        "back. Avoid 0 / 0 instead",
    )


@softmax.property("does not overflow")
def softmax_large(function):
    scores = torch.tensor([[1000.0, 999.0, -1000.0], [-1000.0, -1000.0, -1001.0]])
    weights = function(scores.clone())
    expect_tensor(weights, scores.shape)
    explain(
        weights, scores.softmax(-1),
        [("the largest score of the whole tensor is subtracted, not that of each "
          "row: use amax(dim=-1, keepdim=True)",
          lambda: (scores - scores.max()).exp()
          / (scores - scores.max()).exp().sum(-1, keepdim=True))],
        "scores of 1000 or -1000 overflow: e^1000 is infinite and e^-1000 is 0. "
        "Subtract the row's largest score before the exponential",
        tolerance=1e-3,
    )


@softmax.property("keeps dtype, and lets gradients through")
def softmax_dtype(function):
    for dtype in (torch.float64, torch.bfloat16):
        out = function(SCORES.to(dtype), MASK.clone())
        expect_tensor(out, SCORES.shape, dtype)
    scores = SCORES.double().requires_grad_()
    out = function(scores)
    expect(out.requires_grad, "no gradient flows back: look for .detach() around "
           "more than the shift, .data, or torch.no_grad()")
    tilt = sample(*SCORES.shape, seed=9, dtype=torch.float64)
    gradient, = torch.autograd.grad((out * tilt).sum(), scores)
    again = SCORES.double().requires_grad_()
    wanted, = torch.autograd.grad((again.softmax(-1) * tilt).sum(), again)
    expect(
        near(gradient, wanted, 1e-6),
        "the weights are right, but their gradient is not: part of the way back is "
        "cut off. Only the shift by the largest score may be detached",
    )


# attention_weights and scaled_dot_product_attention


def weights_of(query, key, mask=None, scale=None, axis=-1):
    """Attention weights, by PyTorch."""
    scores = query @ key.transpose(-2, -1)
    scores = scores / (math.sqrt(query.shape[-1]) if scale is None else scale)
    if mask is not None:
        scores = scores.masked_fill(~mask, MINUS)
    return scores.softmax(axis).nan_to_num()


def scale_causes(make, d_head, d_model=None):
    """What wrong scalings give; ``make(scale)`` gives the result for one."""
    causes = [
        ("the scores are not divided by the root of d_head: without it they grow "
         "with the width, and the softmax saturates", lambda: make(1.0)),
        ("the scores are divided by d_head, not by its root", lambda: make(d_head)),
        ("the scores are multiplied by the root of d_head, not divided by it",
         lambda: make(1 / math.sqrt(d_head))),
        ("the scores are scaled twice: F.scaled_dot_product_attention divides by "
         "itself", lambda: make(d_head)),
    ]
    if d_model is not None:
        causes += [
            ("the scores are divided by the root of d_model, not of d_head: each "
             "head's dot product has only d_head terms",
             lambda: make(math.sqrt(d_model))),
            ("the scores are divided by d_model, not by the root of d_head",
             lambda: make(d_model)),
        ]
    return causes


QUERY, KEY, VALUE = 2 * sample(2, 4, 6, seed=2), sample(2, 5, 6, seed=3), sample(2, 5, 3, seed=4)
KEYS = lengths_mask([5, 3], 5)[:, None, :]  # (2, 1, 5)


def score_causes(finish, query, key, mask):
    """What wrong weights give, through ``finish(weights)``."""
    plain = weights_of(query, key)
    causes = scale_causes(
        lambda s: finish(weights_of(query, key, mask, s)), query.shape[-1]
    )
    causes += [
        (f"the scores are divided by the root of the number of {what}, not of "
         f"d_head", lambda n=n: finish(weights_of(query, key, mask, math.sqrt(n))))
        for what, n in (("keys", key.shape[-2]), ("queries", query.shape[-2]))
    ]
    causes += [
        ("the softmax runs over the queries, not over the keys: each row must sum "
         "to 1, so use the last axis",
         lambda: finish(weights_of(query, key, mask, axis=-2))),
        ("there is no softmax: these are the scores themselves",
         lambda: finish(query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1]))),
    ]
    if mask is not None:
        scores = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])
        causes = [
            (hint, lambda value=value: finish(value()))
            for hint, value in softmax_causes(scores, mask)
        ] + causes
    causes += [
        ("the dot products are of the keys with themselves: query is not used",
         lambda: finish(weights_of(key, key))),
        ("the dot products are of the queries with themselves: key is not used",
         lambda: finish(weights_of(query, query))),
        ("the mask is not used at all", lambda: finish(plain)),
    ]
    return causes


weights_battery = Battery(
    "attention_weights",
    "attention_weights(query, key, mask=None) -> (…, queries, keys)",
    chapter=4, takes=("query", "key", "mask"),
)


@weights_battery.property("is the softmax of scaled dot products")
def weights_plain(function):
    explain(
        function(QUERY.clone(), KEY.clone()), weights_of(QUERY, KEY),
        score_causes(lambda w: w, QUERY, KEY, None),
        "it is not softmax(query · key / √d_head) with a row for each query",
    )


@weights_battery.property("gives masked keys nothing")
def weights_masked(function):
    weights = function(QUERY.clone(), KEY.clone(), KEYS.clone())
    good = near(function(QUERY.clone(), KEY.clone()), weights_of(QUERY, KEY))
    explain(
        weights, weights_of(QUERY, KEY, KEYS),
        score_causes(lambda w: w, QUERY, KEY, KEYS),
        "with a mask the weights are wrong: keys that are False must get 0, and "
        "the others share 1" if good else FIRST,
    )


@weights_battery.property("works with any number of axes in front")
def weights_axes(function):
    query, key = sample(4, 6, seed=5), sample(5, 6, seed=6)
    for lead in ((), (2, 3)):
        q, k = query.expand(*lead, 4, 6).clone(), key.expand(*lead, 5, 6).clone()
        explain(
            function(q, k), weights_of(q, k), [],
            f"it goes wrong with {len(lead)} axes before (queries, d_head): count "
            "axes from the end, as in key.transpose(-2, -1)",
        )


function_battery = Battery(
    "scaled_dot_product_attention",
    "scaled_dot_product_attention(query, key, value, mask=None) -> outputs, weights",
    chapter=4, takes=("query", "key", "value", "mask"),
)


def attend(function, *arguments):
    """Call the reader's function; expect two tensors."""
    result = function(*(a.clone() for a in arguments))
    expect(
        isinstance(result, tuple) and len(result) == 2,
        "it must return two tensors, the outputs and the weights: "
        "return weights @ value, weights",
    )
    return result


@function_battery.property("gives each query a weighted mean of the values")
def function_plain(function):
    out, weights = attend(function, QUERY, KEY, VALUE)
    wanted = weights_of(QUERY, KEY) @ VALUE
    explain(
        out, wanted, score_causes(lambda w: w @ VALUE, QUERY, KEY, None),
        "the outputs are not weights @ value",
    )
    explain(
        weights, weights_of(QUERY, KEY),
        score_causes(lambda w: w, QUERY, KEY, None),
        "the outputs are right, but the weights that come with them are not",
    )


@function_battery.property("gives masked keys nothing")
def function_masked(function):
    out, weights = attend(function, QUERY, KEY, VALUE, KEYS)
    good = near(
        attend(function, QUERY, KEY, VALUE)[0], weights_of(QUERY, KEY) @ VALUE
    )
    explain(
        out, weights_of(QUERY, KEY, KEYS) @ VALUE,
        score_causes(lambda w: w @ VALUE, QUERY, KEY, KEYS),
        "with a mask the outputs are wrong: keys that are False must not count"
        if good else FIRST,
    )
    explain(
        weights, weights_of(QUERY, KEY, KEYS), [],
        "with a mask the outputs are right, but the weights returned are not: "
        "return those after masking",
    )


@function_battery.property("takes a mask for each query, such as a triangle")
def function_causal(function):
    mask = torch.ones(4, 4, dtype=torch.bool).tril()
    key, value = KEY[:, :4], VALUE[:, :4]
    out, _ = attend(function, QUERY, key, value, mask)
    explain(
        out, weights_of(QUERY, key, mask) @ value,
        [("the mask is transposed: its rows are queries and its columns keys",
          lambda: weights_of(QUERY, key, mask.T) @ value)],
        "it goes wrong with a mask of (queries, keys): let it broadcast against the "
        "scores as it is",
    )


# MultiHeadSelfAttention

multi_head = Battery(
    "MultiHeadSelfAttention",
    "MultiHeadSelfAttention(*, d_model, num_heads, dropout=0.1), called with "
    "(x, attention_mask=None, return_weights=False)",
    chapter=4, makes=("d_model", "num_heads", "dropout"),
    takes=("x", "attention_mask", "return_weights"),
)
D_MODEL, HEADS, D_HEAD = 12, 3, 4
X = sample(2, 5, D_MODEL, seed=7)
PADDED = lengths_mask([5, 3], 5)  # (2, 5)
NOISE = {"w", "weight", "weights", "bias", "proj", "projection", "projections",
         "to", "linear", "lin", "layer", "layers", "head", "heads", "fc", "mat",
         "matrix", "attn", "attention", "net", "c", "all", "self", "mha", "b", "of"}


def role_of(name):
    """Tell from a parameter's name what it is: q, k, v, o, qkv, or ?"""
    words = [
        w for w in re.split(r"[._\d]+", re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower())
        if w and w not in NOISE
    ]
    text = re.sub(r"^w(?=[qkvo]$)|(?:s|proj)$", "", "".join(words)) if words else "o"
    if text in ("qkv", "in", "kqv", "inproj") or "qkv" in text:
        return "qkv"
    for role, starts in (("q", ("q",)), ("k", ("k",)), ("v", ("v",)),
                         ("o", ("o", "out", "unify", "merge", "mix", "final"))):
        if text.startswith(starts):
            return role
    return "?"


def readings(module):
    """Read the four projections off a module's parameters.

    Yields:
        Dicts from q, k, v, o to a pair (weight (d, d), bias (d) or None), one
        for each way in which the parameters can be understood.
    """
    weights, biases, order = {}, {}, []
    for name, value in module.named_parameters():
        role, value = role_of(name), value.detach().double()
        bias = name.rsplit(".")[-1].lower().startswith("b") or name.endswith("bias") \
            or value.ndim == 1
        raw = not bias and not name.endswith("weight")
        if value.ndim == 3 and not bias:  # (heads, d_model, d_head)
            value = value.transpose(1, 2).flatten(0, 1)
            raw = False
        pieces = (biases if bias else weights).setdefault(role, [])
        pieces.append((value.flatten() if bias else value, raw))
        order.append((name, value, bias))

    def joined(pieces):
        if not pieces:
            return [None]
        first, raw = pieces[0]
        whole = torch.cat([p for p, _ in pieces], dim=0) if len(pieces) > 1 else first
        return [whole, whole.T] if raw and whole.ndim == 2 else [whole]

    def square(value):
        return value is not None and tuple(value.shape) == (D_MODEL, D_MODEL)

    def pair(roles, chosen):
        found = {}
        for role, weight in zip(roles, chosen, strict=True):
            bias = joined(biases.get(role))[0]
            if not square(weight) or (bias is not None and len(bias) != D_MODEL):
                return None
            found[role] = (weight, bias)
        return found

    if "qkv" in weights:
        for fused in joined(weights["qkv"]):
            if fused.shape != (3 * D_MODEL, D_MODEL):
                continue
            bias = joined(biases.get("qkv"))[0]
            bias = torch.zeros(3 * D_MODEL).double() if bias is None else bias
            blocks = [torch.arange(3 * D_MODEL).view(3, -1),
                      torch.arange(3 * D_MODEL).view(HEADS, 3, D_HEAD)
                      .transpose(0, 1).reshape(3, -1),
                      torch.arange(3 * D_MODEL).view(D_MODEL, 3).T]
            for places, order_ in itertools.product(
                blocks, ("qkv", "kqv", "vqk", "qvk", "kvq", "vkq")
            ):
                found = {r: (fused[i], bias[i])
                         for r, i in zip(order_, places, strict=True)}
                if "o" in weights:
                    last = pair("o", joined(weights["o"])[:1])
                    if last:
                        yield found | last
        return
    if set("qkvo") <= set(weights):
        for chosen in itertools.product(*(joined(weights[r]) for r in "qkvo")):
            if found := pair("qkvo", chosen):
                yield found
        return
    matrices = [v for _, v, bias in order if not bias]
    vectors = [v for _, v, bias in order if bias]
    if len(matrices) == 4 and all(map(square, matrices)):
        vectors = vectors if len(vectors) == 4 else [None] * 4
        yield dict(zip("qkvo", zip(matrices, vectors, strict=True), strict=True))


def linear(x, projection):
    """x @ weight.T + bias, in float64."""
    weight, bias = projection
    out = x.double() @ weight.T
    return out if bias is None else out + bias


def by_reference(p, x, mask=None, *, scale=None, axis=-1, split="right",
                 merge="right", output="o", q="q", k="k", v="v", keys=None,
                 weights_only=False, soft=True):
    """Multi-head attention in float64, right or with one mistake."""
    batch, seq_len, d_model = x.shape

    def heads(t):
        if split == "view":
            return t.view(batch, HEADS, seq_len, D_HEAD)
        if split == "inner":  # (…, d_head, heads)
            return t.view(batch, seq_len, D_HEAD, HEADS).permute(0, 3, 1, 2)
        if split == "one":
            return t[:, None]
        return t.view(batch, seq_len, HEADS, D_HEAD).transpose(1, 2)

    query, key, value = (
        heads(linear(x, p[r]) if r else x.double()) for r in (q, k, v)
    )
    scores = query @ key.transpose(-2, -1)
    scores = scores / (math.sqrt(query.shape[-1]) if scale is None else scale)
    if keys is not None:
        scores = keys(scores)
    elif mask is not None:
        scores = scores.masked_fill(~mask[:, None, None, :], MINUS)
    weights = scores.softmax(axis).nan_to_num() if soft else scores
    if keys is not None and hasattr(keys, "after"):
        weights = keys.after(weights)
    if weights_only:
        return weights
    out = weights @ value
    if split == "one":
        out = out[:, 0]
    elif merge == "no transpose":
        out = out.reshape(batch, seq_len, d_model)
    elif split == "view":
        out = out.reshape(batch, seq_len, d_model) if merge == "view" else (
            out.transpose(1, 2).reshape(batch, seq_len, d_model))
    elif merge == "inner":
        out = out.permute(0, 2, 3, 1).reshape(batch, seq_len, d_model)
    else:
        out = out.transpose(1, 2).reshape(batch, seq_len, d_model)
    return linear(out, p[output]) if output else out


def structure_causes(readings_, x):
    """What wrong structures give, without a mask."""
    causes = []
    for p in readings_:
        def add(hint, p=p, to=causes, after=lambda t: t, **mistake):
            to.append((hint, lambda: after(by_reference(p, x, **mistake))))

        causes += scale_causes(
            lambda s, p=p: by_reference(p, x, scale=s), D_HEAD, D_MODEL
        )
        add("the softmax runs over the queries (dim=-2): it must run over the keys, "
            "the last axis", axis=-2)
        add("the softmax runs over the heads (dim=1): it must run over the keys, the "
            "last axis", axis=1)
        add("the softmax runs over the texts of the batch (dim=0): it must run over "
            "the keys, the last axis", axis=0)
        add("there is no softmax: the scores themselves weigh the values", soft=False)
        wrong_view = (
            "the heads are split by a view that mixes tokens: view(batch, "
            "num_heads, seq_len, d_head) reads the numbers in memory order. "
            "First view(batch, seq_len, num_heads, d_head), then transpose(1, 2)"
        )
        add(wrong_view, split="view")
        add(wrong_view, split="view", merge="view")
        add("the heads are put together without the transpose back: do "
            "transpose(1, 2) before the reshape to d_model", merge="no transpose")
        inner = (
            "the heads take every num_heads-th number instead of d_head neighbours: "
            "view(…, num_heads, d_head), not view(…, d_head, num_heads)"
        )
        add(inner, split="inner")
        add(inner, split="inner", merge="inner")
        add("the heads are put together with d_head before num_heads: "
            "transpose(1, 2) gives (batch, seq_len, num_heads, d_head); flatten that",
            merge="inner")
        one = ("num_heads is ignored: there is one attention over the whole width "
               "instead of one in each slice of d_head")
        add(one, split="one")
        add(one, split="one", scale=math.sqrt(D_HEAD))
        add("the output projection is missing, or made but never called: the heads "
            "are put side by side and not mixed", output=None)
        for wrong, instead in itertools.permutations("qkv", 2):
            names = {"q": "query", "k": "key", "v": "value"}
            add(f"the {names[wrong]} is computed with the {names[instead]}'s "
                "projection: a copied line was not changed", **{wrong: instead})
        add("query and key have changed places: row i must hold what token i, as "
            "the query, takes from the keys", q="k", k="q")
        add("key and value have changed places", k="v", v="k")
        add("query and value have changed places", q="v", v="q")
        for r, name in zip("qkv", ("query", "key", "value"), strict=True):
            add(f"the {name} projection is not applied: x itself is taken",
                **{r: None})
        add("the input is added to the output: the residual belongs to the encoder "
            "layer (chapter 06), not in here", after=lambda t: t + x.double())
        triangle = torch.ones(5, 5, dtype=torch.bool).tril()

        def causal(scores, m=triangle):
            return scores.masked_fill(~m, MINUS)

        add("a causal mask hides the later tokens: this is an encoder, every token "
            "sees all (is_causal must be False)", keys=causal)
        causes.append((
            "a norm is applied to the output: that belongs to the encoder layer "
            "(chapter 06), not in here",
            lambda p=p: F.layer_norm(by_reference(p, x), (D_MODEL,)),
        ))
        for r in "qkvo":
            if p[r][1] is not None:
                bare = p | {r: (p[r][0], None)}
                causes.append((
                    f"the bias of the {dict(q='query', k='key', v='value', o='output')[r]}"
                    " projection is not added",
                    lambda bare=bare: by_reference(bare, x),
                ))
    return causes


def mask_causes(readings_, x, mask):
    """What wrong masks give."""
    real = mask[:, None, None, :]
    rows = mask[:, None, :, None]

    def fill(where, value):
        return lambda scores: scores.masked_fill(where, value)

    def times_after(scores):
        return scores
    times_after.after = lambda w: w * real

    causes = []
    for p in readings_:
        def add(hint, keys, p=p):
            causes.append((hint, lambda: by_reference(p, x, keys=keys)))

        add("the mask is inverted: here True = a real token, so the places where it "
            "is False are filled. (nn.MultiheadAttention's key_padding_mask is the "
            "opposite.) Look for a missing or a needless ~", fill(real, MINUS))
        add("the mask is not used at all", lambda s: s)
        add("the mask hides padded queries, not padded keys: it must be "
            "(batch, 1, 1, seq_len), broadcast over the queries", fill(~rows, MINUS))
        add("the mask hides padded queries, not padded keys: it must be "
            "(batch, 1, 1, seq_len), broadcast over the queries", fill(~rows, -1e9))
        add("the mask is applied after the softmax: the rows no longer sum to 1. "
            "Fill the scores with minus infinity before", times_after)
        add("masked scores are set to 0 before the softmax, but e^0 is 1, not 0: "
            "fill with minus infinity", lambda s: s * real)
        add("the mask is added to the scores as numbers 0 and 1: it must be minus "
            "infinity where it is False", lambda s: s + real.double())
        for value in (-1.0, 1e-9, -1e-9, -10.0):
            add("masked scores are set to a number that is not small enough: fill "
                "with minus infinity", fill(~real, value))
    return causes


def make_layer(layer, dropout=0.0):
    """The reader's layer with random weights, in evaluation mode."""
    module = layer.make(d_model=D_MODEL, num_heads=HEADS, dropout=dropout)
    return scramble(module).eval()


def call(layer, module, *arguments, **named):
    """Call the reader's layer, and expect a tensor shaped like x."""
    out = layer.run(module, *(
        a.clone() if isinstance(a, torch.Tensor) else a for a in arguments
    ), **named)
    if isinstance(out, tuple):
        raise Wrong(
            "it returns a tuple where only the output was asked for: the weights "
            "come with return_weights=True alone"
        )
    expect_tensor(out, arguments[0].shape)
    return out


def torch_like(p, x, mask):
    """The same by nn.MultiheadAttention with the reader's weights."""
    theirs = nn.MultiheadAttention(D_MODEL, HEADS, batch_first=True).double().eval()
    with torch.no_grad():
        for i, r in enumerate("qkv"):
            part = slice(i * D_MODEL, (i + 1) * D_MODEL)
            theirs.in_proj_weight[part] = p[r][0]
            theirs.in_proj_bias[part] = 0 if p[r][1] is None else p[r][1]
        theirs.out_proj.weight.copy_(p["o"][0])
        theirs.out_proj.bias.copy_(
            torch.zeros(D_MODEL) if p["o"][1] is None else p["o"][1]
        )
    # key_padding_mask is the opposite of ours: True = padding.
    padding = None if mask is None else ~mask
    x = x.double().requires_grad_()
    out = theirs(x, x, x, key_padding_mask=padding, need_weights=False)[0]
    return out, x


def understood(module):
    """All readings of a module's parameters, or a reason to skip."""
    found = list(readings(module))
    if not found:
        raise Skip(
            "the numbers cannot be compared: no four projections were found. The "
            "book's are Linear layers named query, key, value and output"
        )
    return found


@multi_head.property("can be made and called: (batch, seq_len, d_model) comes out")
def multi_shape(layer):
    module = make_layer(layer)
    call(layer, module, X)
    for batch, seq_len in ((1, 1), (3, 7), (3, 3)):
        call(layer, module, sample(batch, seq_len, D_MODEL))


@multi_head.property("has four projections with biases, all registered")
def multi_parameters(layer):
    module = make_layer(layer)
    count = sum(p.numel() for p in module.parameters())
    wanted = 4 * (D_MODEL**2 + D_MODEL)
    missing = wanted - count
    hints = {
        wanted: "it has no parameters: the projections must be attributes of the "
        "module, not kept in a plain list or dict or made in forward; use "
        "nn.ModuleList for a list",
        D_MODEL**2 + D_MODEL: "one of the four projections is missing (the one after "
        "the heads are put together is often forgotten), or two share one Linear",
        4 * D_MODEL: "the projections have no biases: BERT's have (bias=True)",
        3 * D_MODEL: "three of the projections have no biases: BERT's have",
        D_MODEL: "one of the projections has no bias: BERT's have",
    }
    expect(missing == 0, hints.get(
        missing,
        f"d_model={D_MODEL} needs four matrices of d_model × d_model and four biases, "
        f"{wanted} numbers, but it has {count}",
    ))


@multi_head.property("refuses num_heads that does not divide d_model")
def multi_divide(layer):
    try:
        layer.make(d_model=10, num_heads=3, dropout=0.0)
    except Broke:
        if isinstance(layer.last_error, (ValueError, AssertionError)):
            return
        raise
    raise Wrong(
        "d_model=10 with 3 heads must be refused by a ValueError in the constructor: "
        "10 // 3 would lose a part of each vector silently"
    )


@multi_head.property("is softmax(QKᵀ / √d_head) V in each head, then a projection")
def multi_equal(layer):
    module = make_layer(layer)
    found = understood(module)
    out = call(layer, module, X)
    for p in found:
        if near(out, by_reference(p, X)):
            return
    explain(
        out, by_reference(found[0], X).to(out.dtype),
        structure_causes(found[:6], X),
        "with its own weights it does not give what the formula gives, and none of "
        "the usual mistakes explains it. Compare step by step on a text of two "
        "tokens: scores, weights, heads, output",
    )


@multi_head.property("does not care in which order tokens and texts come")
def multi_order(layer):
    module = make_layer(layer)
    out = call(layer, module, X)
    order = torch.tensor([3, 0, 4, 1, 2])
    shuffled = call(layer, module, X[:, order])
    expect(
        near(shuffled, out[:, order]),
        "shuffling the tokens does not just shuffle the outputs: somewhere numbers "
        "of different tokens are mixed by a view or a reshape, or the order counts "
        "(a causal mask, a position). Look at how the heads are split and put "
        "together",
    )
    expect(
        near(call(layer, module, X.flip(0)), out.flip(0)),
        "one text changes the answer for another one: an axis is mixed up with the "
        "batch",
    )


@multi_head.property("does not look at padding")
def multi_padding(layer):
    module = make_layer(layer)
    out = call(layer, module, X, PADDED)
    found = list(readings(module))
    right = not found or any(near(call(layer, module, X), by_reference(p, X)) for p in found)
    matching = [p for p in found if near(call(layer, module, X), by_reference(p, X))]
    for p in matching or found[:6]:
        if near(out[PADDED], by_reference(p, X, PADDED)[PADDED]):
            break
    else:
        causes = mask_causes(matching or found[:6], X, PADDED)
        for hint, value in causes:
            if near(out, value()):
                raise Wrong(hint)
        for hint, value in causes:  # padded rows may hold anything
            if near(out[PADDED], value()[PADDED]):
                raise Wrong(hint)
    other = X.clone()
    other[~PADDED] = 3 + sample(2, 5, D_MODEL, seed=11)[~PADDED]
    expect(
        near(call(layer, module, other, PADDED)[PADDED], out[PADDED]),
        "what stands at padded positions changes the outputs of real tokens: the "
        "scores of padded keys must become minus infinity before the softmax",
    )
    alone = call(layer, module, X[1:, :3])
    expect(
        near(alone, out[1:, :3]),
        "a text gives other outputs in a batch than alone: the real keys must share "
        "all of the weight among them" if right else FIRST,
    )
    full = call(layer, module, X, torch.ones_like(PADDED))
    expect(
        near(full, call(layer, module, X)),
        "a mask of nothing but True must change nothing",
    )


@multi_head.property("stays finite: all padding, and loud scores")
def multi_finite(layer):
    module = make_layer(layer)
    out = call(layer, module, X, lengths_mask([5, 0], 5))
    expect(
        bool(out.isfinite().all()),
        "a text of nothing but padding gives NaN, and one NaN spoils every "
        "parameter in the next step: a softmax over nothing but minus infinity is "
        "0 / 0",
    )
    out = call(layer, module, 100 * X)
    expect(
        bool(out.isfinite().all()),
        "loud scores overflow: subtract the row's largest score before the "
        "exponential (torch's softmax does)",
    )


@multi_head.property("returns the weights when asked")
def multi_weights(layer):
    module = make_layer(layer)
    result = layer.run(module, X.clone(), PADDED.clone(), True)
    expect(
        isinstance(result, tuple) and len(result) == 2,
        "with return_weights=True it must return two tensors, the output and the "
        "weights. The expected signature is " + multi_head.signature,
    )
    out, weights = result
    expect_tensor(weights, (2, HEADS, 5, 5), what="the weights")
    expect(
        near(weights.sum(-1), torch.ones(2, HEADS, 5)),
        "the weights returned do not sum to 1 over the keys: return them after the "
        "softmax, rows for queries and columns for keys",
    )
    expect(
        bool((weights.masked_select(~PADDED[:, None, None, :]) == 0).all()),
        "the weights returned give padded keys something: mask them here too",
    )
    expect(
        near(out, call(layer, module, X, PADDED)),
        "the output differs when the weights are asked for: the two ways must "
        "compute the same",
    )
    plain = call(layer, module, X)  # where that is wrong already, it was told above
    found = [p for p in readings(module) if near(plain, by_reference(p, X))]
    expect(
        not found or any(
            near(weights, by_reference(p, X, PADDED, weights_only=True)) for p in found
        ),
        "the weights returned are not those that the output was made with: return "
        "(batch, num_heads, seq_len, seq_len), one table a head, not their mean and "
        "not the scores",
    )
    dropping = make_layer(layer, 0.5).train()
    result = layer.run(dropping, X.clone(), None, True)
    expect(
        near(result[1].sum(-1), torch.ones(2, HEADS, 5)),
        "in training the weights returned are those after dropout: return them "
        "before",
    )


@multi_head.property("drops weights in training only")
def multi_dropout(layer):
    many = X[:1].expand(600, -1, -1)
    expect_dropout(
        layer, lambda p: make_layer(layer, p), lambda module: call(layer, module, many),
    )


@multi_head.property("equals nn.MultiheadAttention, gradients too")
def multi_gradient(layer):
    module = make_layer(layer)
    expect_learning(layer, module, module, X, but=_key_bias(module))
    found = [p for p in understood(module) if near(call(layer, module, X), by_reference(p, X))]
    if not found:
        raise Skip("the outputs differ already; mend that first")
    theirs, leaf = torch_like(found[0], X, PADDED)
    x = X.clone().requires_grad_()
    out = layer.run(module, x, PADDED.clone())
    tilt = sample(*X.shape, seed=12) * PADDED[:, :, None]
    mine, = torch.autograd.grad((out * tilt).sum(), x)
    wanted, = torch.autograd.grad((theirs * tilt).sum(), leaf)
    expect(
        near(mine, wanted, 1e-4),
        "the outputs are right, but the gradients are not: part of the way back is "
        "cut off by .detach() or .data",
    )


def _key_bias(module):
    """The bias of the keys gets no gradient: the softmax does not see it."""
    return [n for n, p in module.named_parameters()
            if p.ndim == 1 and role_of(n) in ("k", "qkv", "?")]


@multi_head.property("moves to other devices and dtypes")
def multi_moves(layer):
    expect_to_move(layer, lambda: make_layer(layer), X, PADDED)


@multi_head.property("refuses a mask of numbers")
def multi_mask_dtype(layer):
    module = make_layer(layer)
    out = call(layer, module, X, PADDED)
    try:
        other = call(layer, module, X, PADDED.long())
    except Broke:
        return
    expect(
        near(other[PADDED], out[PADDED]),
        "a mask of 0 and 1 (int64) gives another answer than the same mask as bool, "
        "and no error: ~ turns 1 into -2, which still counts as true. Refuse a mask "
        "that is not bool by a TypeError",
    )


# The exercises of the chapter

equivariant = Battery(
    "is_equivariant", "is_equivariant(layer, x) -> bool", chapter=4, takes=("layer", "x"),
)


class Toy(nn.Module):
    """A layer that is a function, for exercises that are given a layer."""

    def __init__(self, function, size=6):
        super().__init__()
        self.weight = nn.Parameter(sample(size, size, seed=31))
        self.function = function

    def forward(self, x, *_):
        return self.function(x, self.weight)


def self_attention(x, weight):
    return (x @ weight @ x.transpose(-2, -1)).softmax(-1) @ x


def wrong_heads(x, weight):
    """Two heads by the wrong view: with two heads the texts fall into halves."""
    batch, seq_len, d_model = x.shape
    heads = (x @ weight).view(batch, 2, seq_len, d_model // 2)
    out = (heads @ heads.transpose(-2, -1)).softmax(-1) @ heads
    return out.reshape(x.shape)


@equivariant.property("says True of layers that only shuffle along")
def equivariant_true(function):
    for name, layer in (
        ("attention", self_attention), ("a matrix for each token", torch.matmul),
        ("the mean of all tokens", lambda x, w: x.mean(1, keepdim=True).expand_as(x)),
    ):
        for shape in ((1, 5, 6), (3, 4, 6)):
            answer = function(Toy(layer), sample(*shape, seed=32))
            expect(isinstance(answer, (bool, int)) or torch.is_tensor(answer)
                   and answer.numel() == 1, "it must return True or False")
            expect(
                bool(answer),
                f"it says False of {name}, which is equivariant. Is the output compared "
                "with the *shuffled* output of the tokens in order? And with a tolerance "
                "(torch.allclose): sums in another order differ in the last digit",
            )


@equivariant.property("says False of layers that care about the order")
def equivariant_false(function):
    for name, layer in (
        ("heads split by the wrong view", wrong_heads),
        ("a sum of all tokens so far", lambda x, w: x.cumsum(1)),
        ("a layer that looks one token back", lambda x, w: x.roll(1, 1)),
        ("a layer that adds positions",
         lambda x, w: x + torch.arange(x.shape[1])[:, None]),
        ("a layer that turns the text round", lambda x, w: x.flip(1)),
        ("a layer that looks at the last token only",
         lambda x, w: x[:, -1:].expand_as(x)),
    ):
        for shape in ((1, 6, 6), (2, 6, 6)):
            expect(
                not bool(function(Toy(layer), sample(*shape, seed=33))),
                f"it says True of {name}, which is not equivariant. Are the tokens "
                "shuffled at all, and along axis 1, not the texts of the batch? Is the "
                "order one that moves every token (a reversal alone does not find "
                "everything)? Are values compared, not shapes?",
            )


silent = Battery(
    "silent_parameters", "silent_parameters(layer, x) -> list of names", chapter=4,
    takes=("layer", "x"),
)


class Partly(nn.Module):
    """A layer with a parameter that matters, and some that do not."""

    def __init__(self, reduce):
        super().__init__()
        self.heard = nn.Parameter(sample(6, 6, seed=34))
        self.shift = nn.Parameter(sample(1, seed=35))  # a softmax does not see it
        self.unused = nn.Parameter(torch.ones(3))
        self.times_zero = nn.Parameter(torch.ones(6))
        self.tail = nn.Parameter(sample(6, seed=36))
        self.reduce = reduce

    def forward(self, x):
        out = (x @ self.heard + self.shift).softmax(-1)
        if self.reduce:
            return out + 0 * self.times_zero  # each row sums to 1
        return out @ self.heard + 0 * self.times_zero + self.tail


@silent.property("names the parameters that the output does not depend on")
def silent_names(function):
    wanted = {"shift", "unused", "times_zero"}
    layer = Partly(False)
    names = function(layer, sample(2, 5, 6, seed=37))
    expect(isinstance(names, (list, tuple, set)), "it must return a list of names, but it "
           f"returns a {type(names).__name__}")
    expect(all(isinstance(name, str) for name in names), "it must return the names of the "
           "parameters (named_parameters), not the parameters")
    names = set(names)
    expect(names != {"heard", "tail"}, "it names the parameters that do have a gradient")
    missing, extra = wanted - names, names - wanted
    expect("unused" in names or not missing, "a parameter that is never used has no gradient "
           "at all, parameter.grad is None: it is silent too")
    expect("shift" not in missing, "the shift of a softmax is not named: its gradient is not "
           "exactly 0 but about 1e-8, by rounding. Compare with a small number such as 1e-5")
    expect(not missing, f"{', '.join(sorted(missing))} is not named, though its gradient is 0")
    expect(not extra, f"{', '.join(sorted(extra))} is named, but the output depends on it: "
           "the largest absolute value of the gradient tells, not its mean or sum")


@silent.property("is not fooled by outputs that always sum to the same")
def silent_sum(function):
    names = {str(n) for n in function(Partly(True), sample(2, 5, 6, seed=38))}
    expect(
        "heard" not in names,
        "it says that nothing matters, for a layer whose rows sum to 1: the gradient of a "
        "plain sum is 0 there, though the output changes. Take the squares, or weigh the "
        "outputs by random numbers, before the sum",
    )


@silent.property("starts from clean gradients")
def silent_clean(function):
    layer = Partly(False)
    for parameter in layer.parameters():
        parameter.grad = torch.ones_like(parameter)
    names = {str(n) for n in function(layer, sample(2, 5, 6, seed=37))}
    expect({"shift", "times_zero", "unused"} <= names, "gradients that were there before are "
           "added to: call layer.zero_grad() first, or use torch.autograd.grad")


temperature = Battery(
    "with_temperature", "with_temperature(scores, temperature) -> weights", chapter=4,
    takes=("scores", "temperature"),
)


@temperature.property("is the softmax of the scores over the temperature")
def temperature_weights(function):
    for heat in (0.5, 1.0, 4.0):
        explain(
            function(SCORES.clone(), heat), (SCORES / heat).softmax(-1),
            [("the scores are multiplied by the temperature, not divided: hot must mean "
              "even", lambda heat=heat: (SCORES * heat).softmax(-1)),
             ("the temperature is not used", lambda: SCORES.softmax(-1)),
             ("there is no softmax: these are scores", lambda heat=heat: SCORES / heat),
             ("the exponentials are not divided by their sum",
              lambda heat=heat: (SCORES / heat).exp()),
             ("the weights are divided, not the scores: they no longer sum to 1",
              lambda heat=heat: SCORES.softmax(-1) / heat),
             ("the scores are divided by the root of the temperature",
              lambda heat=heat: (SCORES / heat**0.5).softmax(-1)),
             ("the softmax runs over the wrong axis",
              lambda heat=heat: (SCORES / heat).softmax(-2)),
             ("the softmax runs over the wrong axis",
              lambda heat=heat: (SCORES / heat).softmax(0))],
            f"with temperature {heat} it is not softmax(scores / {heat}) along the last "
            "axis",
        )


back = Battery(
    "looking_back", "looking_back(seq_len) -> query, key, each (seq_len, d_head)",
    chapter=4, takes=("seq_len",),
)


@back.property("each token looks at the one before it, the first at itself")
def back_weights(function):
    for seq_len in (6, 3, 11):
        result = function(seq_len)
        expect(isinstance(result, (tuple, list)) and len(result) == 2,
               "it must return two tensors, query and key")
        query, key = result
        for value, what in ((query, "the queries"), (key, "the keys")):
            expect(isinstance(value, torch.Tensor) and value.ndim == 2
                   and len(value) == seq_len,
                   f"{what} must be a tensor of (seq_len, d_head) with {seq_len} rows")
        expect(query.shape == key.shape, "queries and keys must have the same d_head")
        weights = weights_of(query.float(), key.float())
        before = torch.tensor([0, *range(seq_len - 1)])
        looked, most = weights.argmax(-1), weights.amax(-1)
        ahead = torch.tensor([*range(1, seq_len), seq_len - 1])
        for hint, wrong in (
            ("each token looks at itself: query i must fit the key of token i - 1",
             torch.arange(seq_len)),
            ("each token looks at the one *after* it: are query and key exchanged, or is "
             "the shift in the wrong direction?", ahead),
            ("the first token looks at the last one (roll wraps around): it must look at "
             "itself", torch.arange(seq_len).roll(1)),
            ("the last token looks at the first one (roll wraps around), and all look "
             "ahead", torch.arange(seq_len).roll(-1)),
        ):
            expect(not looked.equal(wrong), hint)
        expect(
            looked.equal(before),
            f"with {seq_len} tokens they look at {looked.tolist()}, but it must be "
            f"{before.tolist()}",
        )
        expect(
            most[0] > 0.9 or most[1:].min() < 0.9,
            "the first token looks at nobody in particular: its query must fit its own key",
        )
        expect(
            most.min() > 0.9,
            f"they look where they should, but with a weight of {most.min():.2f} only: make "
            "the queries louder. (The scores are divided by √d_head)",
        )


decoder = Battery(
    "decoder_mask",
    "decoder_mask(attention_mask) -> (batch, seq_len, seq_len) bool, True = look",
    chapter=4, takes=("attention_mask",),
)


@decoder.property("lets each token look at the real tokens up to itself")
def decoder_both(function):
    real = torch.tensor([[True] * 6, [True] * 4 + [False] * 2, [False] * 2 + [True] * 4])
    triangle = torch.ones(6, 6, dtype=torch.bool).tril()
    mask = function(real.clone())
    expect_tensor(mask, what="the mask")
    expect(mask.dtype == torch.bool, f"the mask must be bool, but it is {mask.dtype}")
    expect(
        tuple(mask.shape) != (6, 6),
        "it is (seq_len, seq_len), the same for all texts: the padding is not in it",
    )
    expect(
        tuple(mask.shape) in {(3, 6, 6), (3, 1, 6, 6)},
        f"the mask must be (batch, seq_len, seq_len) = (3, 6, 6), but it is "
        f"{tuple(mask.shape)}: unsqueeze the padding mask, [:, None, :]",
    )
    mask = mask.view(3, 6, 6)
    keys, queries = real[:, None, :], real[:, :, None]
    if mask.equal(triangle & keys):
        return
    for hint, wrong in (
        ("the triangle is the wrong one: each token sees itself and what comes *after*. "
         "Use tril, not triu", triangle.T & keys),
        ("no token sees itself: the diagonal belongs to the triangle (tril(), not "
         "tril(-1))", triangle.tril(-1) & keys),
        ("each token peeks at the next one: tril(), not tril(1)",
         torch.ones(6, 6, dtype=torch.bool).tril(1) & keys),
        ("the padding is not masked", triangle.expand(3, 6, 6)),
        ("nothing keeps a token from looking ahead: the triangle is missing",
         keys.expand(3, 6, 6)),
        ("padded queries are masked, not padded keys: use [:, None, :]",
         triangle & queries),
        ("padded queries are masked as well: only keys are, so that nothing but real "
         "tokens is looked at", triangle & keys & queries),
        ("the two are joined by *or*: a token must be both real and not later",
         triangle | keys),
        ("it is upside down: True = may be looked at", ~(triangle & keys)),
        ("the padding is upside down: True = a real token", triangle & ~keys),
        ("the two are joined by *exclusive or*", triangle ^ keys),
    ):
        expect(not mask.equal(wrong.expand(3, 6, 6)), hint)
    raise Wrong("the mask is wrong: (text, i, j) must be True where j is at most i and token "
                f"j is real. For the second text it is {mask[1].int().tolist()}")


def one_by_one(key, value, living, most):
    """Give pairs once, and note how many keys are held at a time."""
    for k, v in zip(key, value, strict=True):
        k, v = k.clone(), v.clone()
        living.append(weakref.ref(k))
        yield k, v
        del k, v
        most[0] = max(most[0], sum(ref() is not None for ref in living))


one_pass_battery = Battery(
    "one_pass", "one_pass(query, pairs) -> (d_value,), pairs an iterator of (key, value)",
    chapter=4, takes=("query", "pairs"),
)


def passed(function, query, key, value):
    """Call the reader's one_pass on pairs that come once."""
    living, most = [], [0]
    out = function(query.clone(), one_by_one(key, value, living, most))
    expect_tensor(out)
    expect(
        out.numel() == value.shape[-1],
        f"it must return one value, ({value.shape[-1]},), but its shape is "
        f"{tuple(out.shape)}",
    )
    return out.flatten(), most[0]


@one_pass_battery.property("is attention for one query")
def one_pass_equal(function):
    query, key, value = 3 * sample(6, seed=40), sample(20, 6, seed=41), sample(20, 3, seed=42)
    scores = key @ query / math.sqrt(6)
    tops = torch.cat([torch.tensor([MINUS]), scores.cummax(0).values])

    def by_hand(fix_total=True, fix_mixed=True, divide=True, s=scores, wrong=False):
        top, total, mixed = torch.tensor(MINUS), torch.tensor(0.0), torch.zeros(3)
        for score, v in zip(s, value, strict=True):
            new = torch.maximum(top, score)
            fix = (top - new).exp() if not wrong else (new - top).nan_to_num(0, 0, 0).exp()
            e = (score - new).exp()
            total = total * (fix if fix_total else 1) + e
            mixed = mixed * (fix if fix_mixed else 1) + e * v
            top = new
        return mixed / total if divide else mixed

    raw = key @ query
    out, _ = passed(function, query, key, value)
    explain(out, scores.softmax(0) @ value, [
        ("the scores are not divided by √d_head", lambda: raw.softmax(0) @ value),
        ("the scores are divided by d_head, not its root",
         lambda: (raw / 6).softmax(0) @ value),
        ("the scores are divided by √d_value: it must be √d_head",
         lambda: (raw / math.sqrt(3)).softmax(0) @ value),
        ("when a new largest score arrives, neither sum is corrected: both were shifted "
         "by the old one", lambda: by_hand(False, False)),
        ("when a new largest score arrives, the weighted sum of values is not corrected",
         lambda: by_hand(True, False)),
        ("when a new largest score arrives, the sum of exponentials is not corrected",
         lambda: by_hand(False, True)),
        ("the correction goes the wrong way: it is e^(old - new), at most 1",
         lambda: by_hand(wrong=True)),
        ("the weighted sum is not divided by the sum of exponentials",
         lambda: by_hand(divide=False)),
        ("the last pair is not counted", lambda: scores[:-1].softmax(0) @ value[:-1]),
        ("the first pair is not counted", lambda: scores[1:].softmax(0) @ value[1:]),
        ("all weights are equal: this is the plain mean", lambda: value.mean(0)),
        ("only the best key's value is given", lambda: value[scores.argmax()]),
        ("a sum of weights, not of values: value is not used",
         lambda: scores.softmax(0)[:3]),
        ("each exponential is shifted by its own score",
         lambda: (scores - tops[1:]).exp() @ value / (scores - tops[1:]).exp().sum()),
    ], "it is not softmax(query · key / √d_head) times the values, for a single query")


@one_pass_battery.property("cannot overflow, rising or falling")
def one_pass_loud(function):
    value = sample(20, 3, seed=43)
    for scores in (torch.linspace(-300, 300, 20), torch.linspace(300, -300, 20),
                   -1000 + torch.linspace(0, 1, 20)):
        query, key = torch.tensor([2.0, 0, 0, 0]), torch.zeros(20, 4)
        key[:, 0] = scores
        out, _ = passed(function, query, key, value)
        expect(not out.isnan().any() and out.isfinite().all(), "loud scores overflow: shift "
               "every exponential by the largest score so far, and start with minus "
               "infinity, not with 0")
        expect(near(out, scores.softmax(0) @ value, 1e-4), "with loud scores (from -300 to "
               "300) it is wrong: does the largest score so far start at minus infinity?")


@one_pass_battery.property("keeps no more than it needs")
def one_pass_memory(function):
    _, most = passed(function, sample(6, seed=40), sample(40, 6, seed=41),
                     sample(40, 3, seed=42))
    expect(most < 10, f"it holds {most} keys at a time: read the pairs one by one, and keep "
           "the largest score, the sum of exponentials and the weighted sum only. (No list "
           "of pairs)")


blocks_battery = Battery(
    "attention_in_blocks", "attention_in_blocks(query, key, value, block=16) -> outputs",
    chapter=4, takes=("query", "key", "value", "block"),
)


class Sizes(TorchDispatchMode):
    """Notes how large the tensors are that come into being."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, torch.Tensor):
                self.largest = max(self.largest, value.numel())
        return out


def block_inputs(queries=5, keys=11, d_head=6, d_value=3, lead=(2,), dtype=torch.float64):
    return (2 * sample(*lead, queries, d_head, seed=50, dtype=dtype),
            sample(*lead, keys, d_head, seed=51, dtype=dtype),
            sample(*lead, keys, d_value, seed=52, dtype=dtype))


@blocks_battery.property("gives the outputs of attention, whatever the block")
def blocks_equal(function):
    q, k, v = block_inputs()
    for block in (4, 1, 11, 16):
        out = function(q.clone(), k.clone(), v.clone(), block)
        whole = 11 // block * block

        def cut(q=q, k=k, v=v, n=whole):
            return weights_of(q, k[:, :n]) @ v[:, :n]

        def apart(q=q, k=k, v=v, b=block):
            return sum(weights_of(q, k[:, i:i + b]) @ v[:, i:i + b] for i in range(0, 11, b))

        explain(out, weights_of(q, k) @ v, [
            ("the last block is left out, where the block does not divide the number of "
             "keys", cut),
            ("each block has a softmax of its own: they must share one sum", apart),
            ("each block has a softmax of its own: they must share one sum",
             lambda b=block, apart=apart: apart() / -(-11 // b)),
            *score_causes(lambda w, v=v: w @ v, q, k, None),
        ], f"with a block of {block} and 11 keys the outputs are not those of attention: "
           "when a new largest score arrives, both sums must be corrected by e^(old - new)",
           1e-6)
    q, k, v = block_inputs(lead=())
    explain(function(q.clone(), k.clone(), v.clone(), 4), weights_of(q, k) @ v, [],
            "without a batch axis it goes wrong: count axes from the end")
    q, k, v = block_inputs()
    out = function(400 * q, k.clone(), v.clone(), 4)
    expect(near(out, weights_of(400 * q, k) @ v, 1e-4), "loud scores overflow, or a maximum "
           "that starts at 0 instead of minus infinity")


@blocks_battery.property("gives the gradients of attention")
def blocks_gradient(function):
    inputs = [t.requires_grad_() for t in block_inputs()]
    again = [t.detach().clone().requires_grad_() for t in inputs]
    out = function(*inputs, 4)
    expect(out.requires_grad, "no gradient flows back: what a Function returns has one only "
           "by .apply(…), and what stands under torch.no_grad() has none")
    tilt = sample(*out.shape, seed=53, dtype=torch.float64)
    found = torch.autograd.grad((out * tilt).sum(), inputs, allow_unused=True)
    q, k, v = again
    weights = weights_of(q, k)
    wanted = torch.autograd.grad(((weights @ v) * tilt).sum(), again)
    to_weights = tilt @ v.transpose(-2, -1)
    no_delta = weights * to_weights / math.sqrt(6)
    slopes = weights * (to_weights - (weights * to_weights).sum(-1, keepdim=True))
    causes = {
        "query": [
            ("the softmax's own slope is missing in part: from the slope of each weight "
             "subtract the row's mean, Σ w · slope, which is (grad · out).sum(-1)",
             no_delta @ k),
            ("the way back lacks the factor 1 / √d_head", slopes @ k),
        ],
        "key": [
            ("the softmax's own slope is missing in part: from the slope of each weight "
             "subtract the row's mean, Σ w · slope, which is (grad · out).sum(-1)",
             no_delta.transpose(-2, -1) @ q),
            ("the way back lacks the factor 1 / √d_head", slopes.transpose(-2, -1) @ q),
        ],
        "value": [],
    }
    for name, mine, right in zip(("query", "key", "value"), found, wanted, strict=True):
        expect(mine is not None, f"the {name} gets no gradient: backward must return one for "
               "each input, in their order, and None for block")
        explain(mine, right,
                [(hint, lambda t=t: t) for hint, t in causes[name]],
                f"the outputs are right, but the gradient of the {name} is wrong. Take the "
                "steps of the way back one at a time, values, softmax, product, and compare "
                "each with autograd's on a few tokens, in float64", 1e-6)


@blocks_battery.property("never makes the table of all weights")
def blocks_table(function):
    q, k, v = block_inputs(64, 64, 4, 4, lead=(), dtype=torch.float32)
    inputs = [t.requires_grad_() for t in (q, k, v)]
    with Sizes() as forward:
        out = function(*inputs, 8)
    expect(forward.largest < 64 * 64 // 2, f"on the way there a tensor of {forward.largest} "
           "numbers is made, for 64 queries and 64 keys in blocks of 8: the whole table, or "
           "half of it. Multiply with one block of keys at a time")
    with Sizes() as backward:
        torch.autograd.grad(out.sum(), inputs, allow_unused=True)
    expect(backward.largest < 64 * 64 // 2, f"on the way back a tensor of {backward.largest} "
           "numbers is made: go block by block there too")


@blocks_battery.property("keeps no weights for the way back")
def blocks_saved(function):
    q, k, v = block_inputs(64, 64, 4, 4, lead=(), dtype=torch.float32)
    kept = {}

    def pack(tensor):
        kept[tensor.data_ptr(), tensor.shape] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function(*(t.requires_grad_() for t in (q, k, v)), 8)
    expect(
        sum(kept.values()) < 64 * 64 // 2,
        f"for the way back {sum(kept.values())} numbers are kept, for 64 queries and 64 keys: "
        "autograd keeps the weights of every block. Write a torch.autograd.Function that "
        "keeps the inputs, the outputs and the logarithm of each row's sum, and computes the "
        "weights again in backward",
    )
