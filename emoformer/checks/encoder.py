"""Checks for chapter 06: layer normalisation, encoder layer, stack and start."""

import functools
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

WIDTH = 12
ALWAYS_ON = (
    "in evaluation it gives another answer each time: dropout is active there. Use "
    "nn.Dropout, or F.dropout with training=self.training (its default is True)"
)


# LayerNorm

norm_battery = Battery(
    "LayerNorm", "LayerNorm(d_model, *, eps=1e-12), called with (x)",
    chapter=6, makes=("d_model", "eps"), takes=("x",),
)
VECTORS = 2 * sample(2, 5, WIDTH, seed=1) + 1
SMALL = 0.7 * sample(2, 5, WIDTH, seed=2) + 1  # of a size that a large eps matters to


def make_norm(layer, width=WIDTH, **named):
    """The reader's norm: its width comes first, without a name."""
    if named and "eps" in layer.lacks:
        raise Wrong(
            "the constructor takes no eps. The expected signature is "
            + layer.battery.signature
        )
    named = {layer.names.get(key, key): value for key, value in named.items()}
    made = layer.run(layer.thing, width, **named)
    expect(
        isinstance(made, nn.Module),
        f"the class must be a torch.nn.Module: write class {layer.thing.__name__}"
        "(nn.Module), and super().__init__() first in its constructor",
    )
    return made


def normal(x, eps=0.0, *, axes=(-1,), correction=0, about="mean", centre=True,
           outside=False, power=0.5):
    """LayerNorm in float64 without weight and bias, right or with one mistake."""
    x = x.double()
    mean = x.mean(axes, keepdim=True)
    spread = x if about == "zero" else x - mean
    count = math.prod(x.shape[axis] for axis in axes)
    variance = spread.square().sum(axes, keepdim=True) / (count - correction)
    below = (variance.sqrt() + eps) if outside else (variance + eps) ** power
    return (x - mean if centre else x) / below


def shifted(x, axes):
    """LayerNorm with the mean along other axes than the variance."""
    spread = x.double() - x.double().mean(axes, keepdim=True)
    return spread / spread.square().mean(-1, keepdim=True).sqrt()


def normal_causes(x, finish=lambda t: t):
    """What wrong norms give, with an eps too small to see."""
    causes = [
        ("the variance is the one for samples, divided by d_model - 1: var() and "
         "std() do that unless told otherwise (correction=0). Here the vector is "
         "all there is", lambda: normal(x, correction=1)),
        ("everything is twice as large: is it multiplied by 1 + weight? The weight "
         "itself starts at 1", lambda: 2 * normal(x)),
        ("it divides by the root of the mean distance: square the distances first",
         lambda: (x - x.mean(-1, keepdim=True))
         / (x - x.mean(-1, keepdim=True)).abs().mean(-1, keepdim=True).sqrt()),
        *[(f"the mean is taken along another axis (dim={axis}) than the variance: "
           "both run along the last", lambda axis=axis: shifted(x, axis))
          for axis in range(x.ndim - 1)],
        ("the mean is that of the whole tensor: each vector has its own, along the "
         "last axis", lambda: shifted(x, tuple(range(x.ndim)))),
        ("the mean is not taken away", lambda: normal(x, centre=False)),
        ("the mean is not taken away: this is RMSNorm, which divides by the root "
         "of the mean square", lambda: normal(x, centre=False, about="zero")),
        ("the vector is centred, but divided by the root of the mean square of "
         "what came in: the variance is that of the centred numbers",
         lambda: normal(x, about="zero")),
        ("it divides by the variance, not by its root", lambda: normal(x, power=1)),
        ("it divides by the unbiased variance, not by the root of the biased one",
         lambda: normal(x, power=1, correction=1)),
        ("it multiplies by the standard deviation: divide by it",
         lambda: normal(x, power=-0.5)),
        ("the mean is taken away, and nothing is divided: the variance must "
         "become 1", lambda: normal(x, power=0)),
        ("each vector gets length 1, not variance 1: that is smaller by the root "
         "of d_model. Take the mean of the squares, not their sum",
         lambda: normal(x) / math.sqrt(x.shape[-1])),
        ("it divides by the mean distance from the mean, not by the standard "
         "deviation",
         lambda: (x - x.mean(-1, keepdim=True))
         / (x - x.mean(-1, keepdim=True)).abs().mean(-1, keepdim=True)),
        ("it stretches each vector to 0 … 1 by its least and largest number: take "
         "mean and standard deviation",
         lambda: (x - x.amin(-1, keepdim=True))
         / (x.amax(-1, keepdim=True) - x.amin(-1, keepdim=True))),
        ("this is a softmax, not a norm", lambda: x.softmax(-1)),
        ("nothing is normalised: the vector comes out as it came in", lambda: x),
        ("it is normalised twice, with the mean of the squares taken before",
         lambda: normal(normal(x), about="zero")),
    ]
    places = {
        (0,): "over the texts of the batch (dim=0): that is a batch norm",
        (1,): "over the tokens (dim=1)",
        (0, 1): "over all tokens of all texts, place by place: that is a batch "
                "norm, and a text's answer then depends on its neighbours",
        (1, 2): "over all tokens of a text together",
        (0, 1, 2): "over the whole tensor",
    }
    for axes, where in places.items():
        for correction in (0, 1):
            causes.append((
                f"mean and variance are taken {where}; each token's vector has its "
                "own, along the last axis: dim=-1, keepdim=True",
                lambda a=axes, c=correction: normal(x, axes=a, correction=c),
            ))
    return [(hint, lambda value=value: finish(value())) for hint, value in causes]


def weight_and_bias(module):
    """The parameters that start at 1 and at 0, or None."""
    parameters = [p for p in module.parameters() if p.numel() == WIDTH]
    ones = [p for p in parameters if bool((p == 1).all())]
    zeros = [p for p in parameters if bool((p == 0).all())]
    if len(parameters) == 2 and len(ones) == len(zeros) == 1:
        return ones[0], zeros[0]
    return None


@norm_battery.property("learns a weight that starts at 1 and a bias that starts at 0")
def norm_parameters(layer):
    module = make_norm(layer)
    parameters = list(module.parameters())
    count = sum(p.numel() for p in parameters)
    plain = [v for v in vars(module).values() if isinstance(v, torch.Tensor)]
    plain += list(module.buffers())
    if not parameters and plain:
        raise Wrong(
            "weight and bias are plain tensors: the optimizer does not see them. "
            "Make each an nn.Parameter (no buffer)"
        )
    expect(count > 0, "it has no weight and no bias to learn: each is an "
           "nn.Parameter of d_model numbers")
    if count == WIDTH:
        one = bool((parameters[0] == 1).all())
        name, wanted = ("bias", "0") if one else ("weight", "1")
        held = " (it is there as a plain tensor or a buffer)" if plain else ""
        raise Wrong(
            f"only one of weight and bias is a parameter: the {name}, which starts "
            f"at {wanted}, is missing{held}"
        )
    expect(
        count == 2 * WIDTH,
        f"weight and bias must have d_model = {WIDTH} numbers each, one a place, "
        f"but there are {count} parameters in all",
    )
    expect(
        all(p.requires_grad for p in parameters),
        "weight or bias is made with requires_grad=False: it would never learn",
    )
    starts = [p.unique().tolist() for p in parameters]
    expect(
        weight_and_bias(module) is not None,
        "the weight must start at 1 and the bias at 0, so that a fresh norm only "
        "normalises, but " + (
            f"they start at {starts[0][0]:g} and {starts[1][0]:g}"
            if all(len(s) == 1 for s in starts) else "they start at random numbers"
        ),
    )


@norm_battery.property("gives each token's vector mean 0 and variance 1")
def norm_plain(layer):
    module = make_norm(layer)
    try:
        out = layer.run(module, VECTORS.clone())
    except Broke as broke:
        if "must match the size" not in str(broke):
            raise
        raise Wrong(
            "mean or variance have lost an axis, so they do not fit x: keepdim=True "
            f"keeps it with length 1. It {broke}"
        ) from None
    expect_tensor(out, VECTORS.shape)
    expect(
        near(out, normal(VECTORS), 3e-5) or bool(out.any()),
        "a fresh norm gives nothing but zeros: the weight must start at 1, not at 0",
    )
    explain(
        out, normal(VECTORS), normal_causes(VECTORS),
        f"a fresh norm of {[round(v, 2) for v in VECTORS[0, 0].tolist()]} does not "
        "give (x - mean) / root of the variance, each of this vector's own numbers",
        tolerance=3e-5,
    )
    for lead in ((), (4,), (2, 3, 5)):
        x = 2 * sample(*lead, WIDTH, seed=3) + 1
        explain(
            layer.run(module, x.clone()), normal(x), [],
            f"it goes wrong with {len(lead)} axes before d_model: count the axes "
            "from the end, dim=-1", tolerance=3e-5,
        )


@norm_battery.property("takes eps into the root")
def norm_eps(layer):
    eps = 0.5
    module = make_norm(layer, eps=eps)
    fresh = layer.run(make_norm(layer, eps=1e-12), SMALL.clone())
    outside = (
        "eps is added to the standard deviation, outside the root: it must be "
        "added to the variance, inside. Outside, a constant vector has no gradient"
    )
    explain(
        layer.run(module, SMALL.clone()), normal(SMALL, eps), [
            (outside, lambda: normal(SMALL, eps, outside=True)),
            ("the variance is the one for samples (divided by d_model - 1), and eps "
             "is added outside the root: BERT's is divided by d_model, and has eps "
             "inside", lambda: normal(SMALL, eps, outside=True, correction=1)),
            ("the variance is the one for samples, divided by d_model - 1: var() "
             "and std() do that unless told otherwise (correction=0)",
             lambda: normal(SMALL, eps, correction=1)),
            ("eps is squared inside the root: it is added to the variance as it is",
             lambda: normal(SMALL, eps * eps)),
            ("the root of eps is added: it is added to the variance as it is",
             lambda: normal(SMALL, eps**0.5)),
            ("the variance is held above eps by clamp or max: eps is added to it",
             lambda: normal(SMALL) * (normal_root(SMALL) / normal_root(SMALL).clamp(
                 min=eps**0.5))),
            ("the standard deviation is held above eps by clamp or max: eps is "
             "added to the variance",
             lambda: normal(SMALL) * (normal_root(SMALL) / normal_root(SMALL).clamp(
                 min=eps))),
            ("eps is added to the result, or to x: it belongs to the variance, "
             "inside the root", lambda: normal(SMALL) + eps),
            ("eps is taken away from the variance: add it",
             lambda: normal(SMALL, -eps)),
            ("the argument eps is not used: the norm takes a number of its own",
             lambda: fresh),
            ("the argument eps is not used: there is none in the root",
             lambda: normal(SMALL)),
        ],
        "with eps=0.5 it is not (x - mean) / root(variance + eps)"
        if near(fresh, normal(SMALL), 3e-5)
        else "the norm fails with a small eps already; mend that first",
        tolerance=3e-5,
    )


def normal_root(x):
    """The standard deviation of each vector, in float64."""
    return x.double().var(-1, correction=0, keepdim=True).sqrt()


@norm_battery.property("has BERT's eps, 1e-12, if none is given")
def norm_default(layer):
    x = 1e-6 * sample(2, 5, WIDTH, seed=4)
    out = layer.run(make_norm(layer), x.clone())
    expect_tensor(out, x.shape)
    if near(out, normal(x, 1e-12), 1e-3):
        return
    plain = layer.run(make_norm(layer), VECTORS.clone())
    if not near(plain, normal(VECTORS), 1e-3):
        raise Skip("it is wrong for everyday numbers already; mend that first")
    # variance / (variance + eps) is what is left of the variance.
    variance = x.double().var(-1, correction=0)
    left = out.detach().double().var(-1, correction=0).clamp(min=1e-30)
    eps = (variance / left - variance).median().item()
    expect(
        eps > 1e-14,
        "without an argument there is no eps in the root, or it is lost: the default "
        "is BERT's 1e-12",
    )
    raise Wrong(
        f"the default of eps is about {eps:.0e}"
        + (", PyTorch's" if 0.9e-5 < eps < 1.1e-5 else "")
        + ": BERT's is 1e-12, and a loaded checkpoint needs its own. (If you wrote "
        "1e-12, look at its place: inside the root.)"
    )


@norm_battery.property("scales by the weight, then shifts by the bias")
def norm_affine(layer):
    module = make_norm(layer)
    found = weight_and_bias(module)
    if found is None:
        raise Skip("weight and bias were not found; mend that first")
    scramble(module)
    w, b = (p.detach().double().flatten() for p in found)
    n = normal(VECTORS)
    explain(
        layer.run(module, VECTORS.clone()), n * w + b, [
            ("the weight is made, but never used", lambda: n + b),
            ("the bias is made, but never used", lambda: n * w),
            ("weight and bias are made, but never used", lambda: n),
            ("the bias is added before the weight multiplies: scale first, then "
             "shift", lambda: (n + b) * w),
            ("weight and bias have changed places", lambda: n * b + w),
            ("it multiplies by 1 + weight: no saved weights would fit",
             lambda: n * (1 + w) + b),
            ("the bias is taken away: add it", lambda: n * w - b),
            ("it divides by the weight: multiply", lambda: n / w + b),
            ("x itself is scaled and shifted: the normalised vector is not used",
             lambda: VECTORS.double() * w + b),
            ("weight and bias are applied before the vector is normalised, not "
             "after", lambda: normal(VECTORS.double() * w + b)),
            ("weight and bias are applied twice", lambda: (n * w + b) * w + b),
            *normal_causes(VECTORS, lambda t: t * w + b),
        ],
        "with weight and bias it is not normal * weight + bias, place by place",
        tolerance=3e-5,
    )


@norm_battery.property("gives a constant vector 0, and a gradient that is a number")
def norm_constant(layer):
    module = make_norm(layer)
    x = VECTORS.clone()
    x[0, 1], x[1, 3] = 2.0, 0.0
    x.requires_grad_()
    out = layer.run(module, x)
    expect_tensor(out, x.shape)
    expect(
        bool(out.isfinite().all()),
        "a vector of equal numbers gives NaN or infinity: its variance is 0, and "
        "nothing keeps it from dividing by 0. Look at eps",
    )
    expect(
        near(out[0, 1], torch.zeros(WIDTH), 1e-3),
        "a vector of equal numbers must become zeros, for nothing is left once the "
        f"mean is taken away, but it gives {out[0, 1, 0].item():.3g}",
    )
    expect(out.requires_grad, "no gradient flows back: look for .detach(), .data or "
           "torch.no_grad()")
    (out * sample(*x.shape, seed=5)).sum().backward()
    expect(
        x.grad is not None and x.grad.isfinite().all(),
        "a vector of equal numbers has NaN as its gradient, and one NaN spoils all "
        "weights in the next step: the slope of a root at 0 is infinite. Is eps "
        "outside the root?",
    )


@norm_battery.property("is exact for numbers far from 0")
def norm_far(layer):
    x = (sample(2, 5, WIDTH, seed=6) + 3000)
    out = layer.run(make_norm(layer), x.clone())
    expect_tensor(out, x.shape)
    plain = layer.run(make_norm(layer), VECTORS.clone())
    if not near(plain, normal(VECTORS), 3e-5):
        raise Skip("it is wrong for everyday numbers already; mend that first")
    expect(
        near(out, normal(x), 1e-2),
        "for numbers near 3000 it is wrong: 32 bits hold about seven digits, and the "
        "mean of the squares minus the square of the mean needs more. Take the mean "
        "away first, and square then",
    )


@norm_battery.property("computes 16-bit numbers in 32 bits, and gives 16 back")
def norm_half(layer):
    for dtype in (torch.float16, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        module = make_norm(layer).to(dtype)
        constant = torch.full((2, WIDTH), 2.0, dtype=dtype)
        out = layer.run(module, constant)
        expect_tensor(out, constant.shape, dtype)
        expect(
            bool(out.isfinite().all()),
            f"in {name} a vector of equal numbers gives NaN: there 1e-12 is 0 or "
            "lost, so it divides 0 by 0. Convert x to float32 first, and the result "
            "back at the end",
        )
        loud = (300 * sample(4, 3, WIDTH, seed=7) + 100).to(dtype)
        far = (sample(4, 3, WIDTH, seed=8) + 20).to(dtype)
        for x, why in (
            (loud, "numbers of some hundreds overflow when squared in it"),
            (far, "the mean of numbers near 20 is rounded too coarsely in it"),
        ):
            wanted = normal(x)
            error = (layer.run(module, x.clone()).double() - wanted).abs()
            step = torch.finfo(dtype).eps * (wanted.abs() + 0.5)
            expect(
                bool((error <= 2 * step).all()),
                f"it is too inexact in {name}: {why}. Compute in float32 inside, and "
                "convert the result back",
            )


@norm_battery.property("refuses vectors of another width")
def norm_width(layer):
    for width, wrong in ((WIDTH, 1), (1, 5), (WIDTH, WIDTH - 2)):
        module = make_norm(layer, width)
        try:
            layer.run(module, sample(2, 5, wrong, seed=9))
        except Broke:
            continue
        raise Wrong(
            f"a norm for d_model={width} takes vectors {wrong} wide without a word: "
            "weight and bias are stretched over them. Refuse them by a ValueError"
        )


@norm_battery.property("treats each vector alone, in training as in evaluation")
def norm_alone(layer):
    module = make_norm(layer).train()
    for _ in range(3):
        first = layer.run(module, VECTORS.clone())
    expect_tensor(first, VECTORS.shape)
    expect(
        near(layer.run(module.eval(), VECTORS.clone()), first),
        "it answers otherwise in evaluation than in training: there are running "
        "means, as in a batch norm, or a dropout. A layer norm has neither",
    )
    expect(
        near(layer.run(module, VECTORS[1:].clone()), first[1:])
        and near(layer.run(module, VECTORS[:, :1].clone()), first[:, :1]),
        "a vector alone gives another answer than among others: mean and variance "
        "must come from its own numbers, along the last axis",
    )


@norm_battery.property("equals nn.LayerNorm, gradients too")
def norm_gradient(layer):
    module = make_norm(layer, eps=1e-3).double()
    found = weight_and_bias(module)
    if found is None:
        raise Skip("weight and bias were not found; mend that first")
    scramble(module)
    # eps large enough that a derivative which forgets it would show.
    theirs = nn.LayerNorm(WIDTH, eps=1e-3).double()
    with torch.no_grad():
        theirs.weight.copy_(found[0].flatten())
        theirs.bias.copy_(found[1].flatten())
    x = SMALL.double()
    mine, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    out, wanted = layer.run(module, mine), theirs(other)
    if not near(out, wanted, 1e-4):
        raise Skip("the outputs differ already; mend that first")
    expect(
        near(out, wanted, 1e-9),
        "a float64 norm is exact to seven digits only: it computes in float32 "
        "always. Widen 16-bit numbers, but do not narrow 64-bit ones",
    )
    tilt = sample(*x.shape, seed=10, dtype=torch.float64)
    expect(out.requires_grad, "no gradient flows back: look for .detach(), .data or "
           "torch.no_grad()")
    (out * tilt).sum().backward()
    (wanted * tilt).sum().backward()
    for name, parameter, right in (
        ("weight", found[0], theirs.weight), ("bias", found[1], theirs.bias)
    ):
        expect(
            parameter.grad is not None
            and near(parameter.grad.flatten(), right.grad, 1e-6),
            f"the output is right, but the {name}'s gradient is not: it is cut off, "
            "by .detach(), .data or torch.no_grad()",
        )
    spread = (x - x.mean(-1, keepdim=True))
    scale = (spread.square().mean(-1, keepdim=True) + 1e-3).rsqrt()
    inner = tilt * theirs.weight.detach()
    cut = {
        "mean and variance": inner * scale,
        "variance": (inner - inner.mean(-1, keepdim=True)) * scale,
    }
    for what, value in cut.items():
        expect(
            not near(mine.grad, value, 1e-6),
            f"the output is right, but no gradient flows through the {what}: they "
            "depend on x too. Look for .detach(), .data, .item() or no_grad",
        )
    expect(
        mine.grad is not None and near(mine.grad, other.grad, 1e-6),
        "the output is right, but the gradient is not: part of the way back is cut "
        "off by .detach(), .data or torch.no_grad()",
    )


@norm_battery.property("moves to other devices and dtypes")
def norm_moves(layer):
    expect_to_move(layer, lambda: make_norm(layer), VECTORS)


# Sublayers under watch: what was each made with, what did it hear, what did it say?

D_MODEL, HEADS, D_FF = 12, 3, 20
LISTED = {
    "attention": ("d_model", "num_heads", "dropout"),
    "feedforward": ("d_model", "d_ff"),
    "norm": ("d_model", "eps"),
    "layer": ("d_model", "norm_first", "layer_norm_eps", "norm", "num_heads", "d_ff",
              "dropout", "attention", "feedforward"),
}
CALLED = {
    "attention": "an attention sublayer", "feedforward": "a feed-forward sublayer",
    "norm": "a norm", "layer": "an encoder layer",
}


def take(kind, positional, named):
    """The arguments that a sublayer is made with, by name.

    Raises:
        Wrong: it is made with others than the book's.
    """
    listed = LISTED[kind]
    if kind == "norm":
        made_with = "a width first, and then eps by name"
        named = dict(zip(listed[:1], positional[:1], strict=False)) | named
        positional = positional[1:]
    else:
        made_with = ", ".join(listed) + ", all by name"
    expect(
        not positional,
        f"{CALLED[kind]} is made with {made_with}; here {len(positional)} of its "
        "arguments come without a name",
    )
    unknown = [name for name in named if name not in listed]
    expect(
        not unknown,
        f"{CALLED[kind]} is made with {made_with}; it takes no {', '.join(unknown)}",
    )
    expect(
        "d_model" in named,
        f"{CALLED[kind]} is made with {made_with}; d_model is missing",
    )
    return named


def heard(kind, mask, wrong):
    """Refuse a call with arguments that such a sublayer does not take."""
    expect(
        not wrong,
        f"{CALLED[kind]} is called with x, attention_mask and return_weights; it "
        f"takes no {', '.join(wrong)}",
    )
    right = isinstance(mask, torch.Tensor) and mask.dtype == torch.bool and mask.ndim == 2
    return mask if right else None


class Trace:
    """Classes of sublayers, and a record of how they were used."""

    def __init__(self):
        self.made, self.calls = [], []
        trace = self

        class Watched(nn.Module):
            kind = ""

            def __init__(self, *positional, **named):
                super().__init__()
                self.given = take(self.kind, positional, named)
                self.build(**self.given)
                trace.made.append(self)

            def note(self, x, out, mask=None, asked=False):
                trace.calls.append(SimpleNamespace(
                    kind=self.kind, module=self, input=x.detach().clone(),
                    output=out.detach().clone(), mask=mask, asked=asked,
                ))

        class Attention(Watched):
            kind = "attention"

            def build(self, d_model, **others):
                self.heads = others.get("num_heads", 1)
                self.query = nn.Linear(d_model, d_model)
                # A bias of the keys would get no gradient.
                self.key = nn.Linear(d_model, d_model, bias=False)
                self.value = nn.Linear(d_model, d_model)
                self.output = nn.Linear(d_model, d_model)

            def forward(self, x, attention_mask=None, return_weights=False, **wrong):
                mask = heard(self.kind, attention_mask, wrong)
                query, key, value = (
                    part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                    for part in (self.query, self.key, self.value)
                )
                scores = query @ key.mT / math.sqrt(query.shape[-1])
                if mask is not None and mask.shape == x.shape[:2]:
                    scores = scores.masked_fill(~mask[:, None, None, :], float("-inf"))
                weights = scores.softmax(-1)
                out = self.output((weights @ value).transpose(1, 2).flatten(2))
                self.note(x, out, attention_mask, return_weights)
                return (out, weights) if return_weights is True else out

        class FeedForward(Watched):
            kind = "feedforward"

            def build(self, d_model, **others):
                self.expand = nn.Linear(d_model, others.get("d_ff", d_model))
                self.contract = nn.Linear(others.get("d_ff", d_model), d_model)

            def forward(self, x, **wrong):
                heard("feedforward", None, wrong)
                out = self.contract(F.gelu(self.expand(x)))
                self.note(x, out)
                return out

        class Norm(Watched):
            kind = "norm"

            def build(self, d_model, **others):
                self.weight = nn.Parameter(torch.ones(d_model))
                self.bias = nn.Parameter(torch.zeros(d_model))
                self.eps = others.get("eps", 1e-12)

            def forward(self, x):
                out = F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
                self.note(x, out)
                return out

        class Layer(Watched):
            kind = "layer"

            def build(self, d_model, **others):
                self.heads = others.get("num_heads", 1)
                self.own = nn.Linear(d_model, d_model)
                self.mix = nn.Linear(d_model, d_model)

            def forward(self, x, attention_mask=None, return_weights=False, **wrong):
                mask = heard(self.kind, attention_mask, wrong)
                scores = self.mix(x) @ x.mT / 10
                if mask is not None and mask.shape == x.shape[:2]:
                    scores = scores.masked_fill(~mask[:, None, :], float("-inf"))
                weights = scores.softmax(-1)
                out = x + torch.tanh(self.own(x) + weights @ x)
                self.note(x, out, attention_mask, return_weights)
                weights = weights[:, None].expand(-1, self.heads, -1, -1)
                return (out, weights) if return_weights is True else out

        self.Attention, self.FeedForward = Attention, FeedForward
        self.Norm, self.Layer = Norm, Layer

    def of(self, kind):
        """All sublayers of a kind that were made."""
        return [module for module in self.made if module.kind == kind]

    def called(self, kind):
        """All calls of a kind, in order."""
        return [call for call in self.calls if call.kind == kind]


def call(layer, module, *arguments, **named):
    """Call the reader's module, and expect one tensor shaped like x."""
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


# EncoderLayer

layer_battery = Battery(
    "EncoderLayer",
    "EncoderLayer(*, d_model, num_heads, d_ff, dropout=0.1, norm_first=False, "
    "layer_norm_eps=1e-12, attention=…, feedforward=…, norm=…), called with "
    "(x, attention_mask=None, return_weights=False)",
    chapter=6,
    makes=("d_model", "num_heads", "d_ff", "dropout", "norm_first", "layer_norm_eps",
           "attention", "feedforward", "norm"),
    takes=("x", "attention_mask", "return_weights"),
)
X = sample(2, 5, D_MODEL, seed=11)
PADDED = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
UNWATCHED = "its sublayers are not made as they should be; mend that first"
POST, PRE = "post-norm (norm_first=False)", "pre-norm (norm_first=True)"


def make_layer(layer, **named):
    """The reader's encoder layer with sublayers under watch."""
    trace = Trace()
    sizes = {"d_model": D_MODEL, "num_heads": HEADS, "d_ff": D_FF}
    module = layer.make(**sizes | {
        "dropout": 0.0, "layer_norm_eps": 1e-12, "norm_first": False,
        "attention": trace.Attention, "feedforward": trace.FeedForward,
        "norm": trace.Norm,
    } | named)
    return module, trace


def watch(layer, **named):
    """The same with random weights, in evaluation; skip what cannot be watched."""
    if layer.lacks & {"attention", "feedforward", "norm"}:
        raise Skip(UNWATCHED)
    try:
        module, trace = make_layer(layer, **named)
    except Wrong as wrong:
        if isinstance(wrong, Broke):
            raise
        raise Skip(UNWATCHED) from None
    counts = [len(trace.of(kind)) for kind in ("attention", "feedforward", "norm")]
    if counts != [1, 1, 2]:
        raise Skip(UNWATCHED)
    return scramble(module).eval(), trace


@layer_battery.property("makes one attention, one feed-forward and two norms")
def layer_parts(layer):
    absent = [n for n in ("attention", "feedforward", "norm") if n in layer.lacks]
    expect(
        not absent,
        f"the constructor takes no {', '.join(absent)}: the classes of the sublayers "
        "are arguments, so that others can be put in. The expected signature is "
        + layer_battery.signature,
    )
    for norm_first in (False, True):
        module, trace = make_layer(layer, norm_first=norm_first)
        for kind in ("attention", "feedforward", "norm"):
            made, wanted = trace.of(kind), 2 if kind == "norm" else 1
            expect(
                len(made) > 0,
                f"the class that it gets as {kind}= is not used: make the sublayer "
                f"from the argument ({kind}(…)), not from a class of a fixed name",
            )
            if kind == "norm" and len(made) == 1:
                raise Wrong(
                    "only one norm is made: each of the two sublayers has its own, "
                    "since weight and bias are learned"
                )
            if kind == "norm" and len(made) > 2:
                raise Wrong(
                    f"{len(made)} norms are made: a layer has two. Pre-norm's last "
                    "norm belongs behind the last layer, into the stack"
                )
            expect(
                len(made) == wanted,
                f"{len(made)} sublayers are made as {kind}=: a layer has {wanted}",
            )
            inside = {id(m) for m in module.modules()}
            expect(
                all(id(m) in inside for m in made),
                f"{CALLED[kind]} is made but not registered: it must be an attribute "
                "of the module (or stand in an nn.ModuleList), not in a plain list "
                "or dict. Else the optimizer does not see its parameters",
            )
        theirs = sum(p.numel() for m in trace.made for p in m.parameters())
        count = sum(p.numel() for p in module.parameters())
        expect(
            count == theirs,
            f"beyond its sublayers it has {count - theirs} parameters of its own: a "
            "layer has none. Is there a projection too many?",
        )


@layer_battery.property("passes its arguments on to them")
def layer_arguments(layer):
    if layer.lacks & {"attention", "feedforward", "norm"}:
        raise Skip(UNWATCHED)
    for named in (
        {"dropout": 0.3, "layer_norm_eps": 1e-3}, {"norm_first": True, "d_ff": 7},
    ):
        for name in named:
            expect(
                name not in layer.lacks,
                f"the constructor takes no {name}. The expected signature is "
                + layer_battery.signature,
            )
        _, trace = make_layer(layer, **named)
        wanted = {"d_model": D_MODEL, "num_heads": HEADS, "d_ff": named.get("d_ff", D_FF),
                  "dropout": named.get("dropout", 0.0),
                  "eps": named.get("layer_norm_eps", 1e-12)}
        for part in trace.made:
            for name in LISTED[part.kind]:
                argument = "layer_norm_eps" if name == "eps" else name
                expect(
                    name in part.given,
                    f"{argument} is not passed on to {CALLED[part.kind]}: whatever "
                    "the layer is told, the sublayer takes its own default",
                )
                expect(
                    part.given[name] == wanted[name],
                    f"{CALLED[part.kind]} gets {name}={part.given[name]!r} where the "
                    f"layer was made with {argument}={wanted[name]!r}: a fixed "
                    "number, or another argument",
                )
    trace = Trace()
    module = layer.make(
        d_model=D_MODEL, num_heads=HEADS, d_ff=D_FF, attention=trace.Attention,
        feedforward=trace.FeedForward, norm=trace.Norm,
    )
    for kind, name, right in (("attention", "dropout", 0.1), ("norm", "eps", 1e-12)):
        for part in trace.of(kind):
            expect(
                part.given.get(name, right) == right,
                f"without an argument {name} is {part.given.get(name)!r}: the "
                f"default is {right!r}",
            )
    call(layer, scramble(module).eval(), X)
    post, by_name = make_layer(layer)
    call(layer, scramble(post).eval(), X)
    expect(
        [c.kind for c in trace.calls] == [c.kind for c in by_name.calls],
        "without an argument it is pre-norm: the default is norm_first=False, "
        "post-norm as in BERT",
    )


ORDER = {
    False: ["attention", "norm", "feedforward", "norm"],
    True: ["norm", "attention", "norm", "feedforward"],
}


def in_words(kinds):
    """A list of sublayers for a hint."""
    return ", ".join(kind.replace("feedforward", "feed-forward") for kind in kinds)


def expect_order(trace, norm_first):
    """Refuse an order of calls that is not the layer's."""
    kinds, wanted = [c.kind for c in trace.calls], ORDER[norm_first]
    style, other = (PRE, POST) if norm_first else (POST, PRE)
    for kind in ("attention", "feedforward"):
        expect(kind in kinds, f"{CALLED[kind]} is made, but never called")
        expect(
            kinds.count(kind) == 1,
            f"{CALLED[kind]} is called {kinds.count(kind)} times: once is enough",
        )
    if kinds == wanted:
        return
    expect(
        kinds != ORDER[not norm_first],
        f"it runs as {other} although it was made as {style}: norm_first is not "
        "used, or used the wrong way round",
    )
    expect(
        kinds.index("attention") < kinds.index("feedforward"),
        "feed-forward runs before attention: attention comes first",
    )
    norms = trace.called("norm")
    expect(norms, "the norms are made, but never called")
    if norm_first:
        second = [c for c in norms[1:] if near(c.input, X)]
        expect(
            not second or kinds[-1] == "norm",
            "attention and feed-forward both read the layer's input, side by side: "
            "feed-forward reads the stream after attention has added to it",
        )
        expect(
            kinds != [*wanted, "norm"],
            "a third norm stands at the end of the layer: in pre-norm nothing "
            "touches the stream but the two additions. The last norm belongs into "
            "the stack",
        )
        expect(
            kinds != ["norm", "attention", "feedforward"],
            "feed-forward reads the stream as it is: in pre-norm it reads the norm "
            "of it, as attention does",
        )
        expect(
            kinds != ["attention", "norm", "feedforward"],
            "attention reads the stream as it is: in pre-norm it reads the norm of "
            "it, as feed-forward does",
        )
        expect(
            kinds != ["norm", "attention", "feedforward", "norm"],
            "the first sublayer is pre-norm, but the second is post-norm",
        )
    else:
        expect(
            kinds != ["attention", "feedforward", "norm"],
            "the norm after attention is missing: in post-norm each addition is "
            "followed by one",
        )
        expect(
            kinds != ["attention", "norm", "feedforward"],
            "the norm after feed-forward is missing: in post-norm each addition is "
            "followed by one",
        )
        expect(
            kinds != ["attention", "norm", "norm", "feedforward"],
            "the first sublayer is post-norm, but the second is pre-norm",
        )
        expect(
            kinds != ["norm", *wanted],
            "a norm stands before attention too: in post-norm attention reads the "
            "stream as it is",
        )
    raise Wrong(
        f"it calls {in_words(kinds)}; as {style} the order is {in_words(wanted)}"
    )


def expect_two_norms(trace):
    """Refuse one norm at work in both places."""
    first, second = trace.called("norm")
    expect(
        first.module is not second.module,
        "one norm works in both places, and the other is never called: each sublayer "
        "has its own",
    )


MISSING = (
    "the residual around {} is missing: what it computes replaces the stream, and "
    "must be added to it"
)
TWICE = "x is added twice around {}: one residual is enough"


def expect_post(trace, x, out):
    """Follow the stream through a post-norm layer."""
    (a,), (f,) = trace.called("attention"), trace.called("feedforward")
    n1, n2 = trace.called("norm")
    branch = (
        "the norm stands on the branch: it normalises what {} gives, and the stream "
        "is added afterwards. In post-norm the sum is normalised"
    )
    explain(a.input, x, [], "attention must read x as it is; it reads something else")
    if near(n1.input, a.output):
        expect(not near(f.input, x + n1.output), branch.format("attention"))
    explain(
        n1.input, x + a.output, [
            (MISSING.format("attention"), lambda: a.output),
            (TWICE.format("attention"), lambda: 2 * x + a.output),
            ("what attention gives is taken away from the stream: add it",
             lambda: x - a.output),
            ("the stream is multiplied by what attention gives: add it",
             lambda: x * a.output),
            ("x and what attention gives are averaged: add them",
             lambda: (x + a.output) / 2),
            ("the first norm reads x, and attention's result comes later: normalise "
             "the sum", lambda: x),
        ],
        "the first norm must read x + attention(x), and it reads something else",
    )
    explain(
        f.input, n1.output, [
            ("feed-forward reads the sum before the norm: in post-norm it reads the "
             "normalised stream", lambda: n1.input),
            ("feed-forward reads the layer's input: it must read the stream after "
             "attention and its norm", lambda: x),
            ("feed-forward reads what attention gives, not the stream",
             lambda: a.output),
            ("x is added once more after the first norm: the stream goes through "
             "the norm, not around it", lambda: x + n1.output),
        ],
        "feed-forward must read what the first norm gives, and it reads something "
        "else",
    )
    if near(n2.input, f.output):
        for stream in (n1.output, x, n1.input):
            expect(not near(out, stream + n2.output), branch.format("feed-forward"))
    explain(
        n2.input, n1.output + f.output, [
            (MISSING.format("feed-forward"), lambda: f.output),
            ("the second residual adds the layer's input: by then the stream is "
             "what the first norm gave, and what attention has added is lost",
             lambda: x + f.output),
            ("the second residual adds the stream as it was before the first norm: "
             "in post-norm it goes through the norm", lambda: n1.input + f.output),
            ("the second residual adds what attention gave, not the stream",
             lambda: a.output + f.output),
            (TWICE.format("feed-forward"), lambda: 2 * n1.output + f.output),
            ("the layer's input is added once more in the second residual",
             lambda: x + n1.output + f.output),
            ("what feed-forward gives is taken away from the stream: add it",
             lambda: n1.output - f.output),
        ],
        "the second norm must read the stream plus feed-forward of it, and it reads "
        "something else",
    )
    explain(
        out, n2.output, [
            ("the stream is added once more after the last norm",
             lambda: n1.output + n2.output),
            ("the layer's input is added once more after the last norm",
             lambda: x + n2.output),
            ("the second norm is called, but its result is not used",
             lambda: n2.input),
            ("it returns the stream after attention: what feed-forward adds is lost",
             lambda: n1.output),
            ("it returns what feed-forward gives, not the stream", lambda: f.output),
            ("a ReLU stands behind the last norm: the bend is inside feed-forward",
             lambda: n2.output.relu()),
        ],
        "the output must be what the second norm gives, and it is something else",
    )


def expect_pre(trace, x, out):
    """Follow the stream through a pre-norm layer."""
    (a,), (f,) = trace.called("attention"), trace.called("feedforward")
    n1, n2 = trace.called("norm")
    around = (
        "the residual around {} is taken after the norm: in pre-norm the stream goes "
        "past the norm untouched, and only the sublayer reads the normalised copy"
    )
    explain(n1.input, x, [], "the first norm must read x, and it reads something else")
    explain(
        a.input, n1.output,
        [("the first norm is called, but attention reads x itself", lambda: x)],
        "attention must read what the first norm gives, and it reads something else",
    )
    stream = x + a.output
    explain(
        n2.input, stream, [
            (MISSING.format("attention"), lambda: a.output),
            (around.format("attention"), lambda: n1.output + a.output),
            ("feed-forward reads the layer's input (its norm), side by side with "
             "attention: it must read the stream after attention has added to it",
             lambda: x),
            (TWICE.format("attention"), lambda: 2 * x + a.output),
            (TWICE.format("attention"), lambda: x + n1.output + a.output),
            ("what attention gives is taken away from the stream: add it",
             lambda: x - a.output),
            ("the stream is multiplied by what attention gives: add it",
             lambda: x * a.output),
            ("x and what attention gives are averaged: add them",
             lambda: (x + a.output) / 2),
        ],
        "the second norm must read x + attention(norm(x)), and it reads something "
        "else",
    )
    explain(
        f.input, n2.output, [
            ("the second norm is called, but feed-forward reads the stream itself",
             lambda: n2.input),
            ("feed-forward reads what the first norm gave", lambda: n1.output),
        ],
        "feed-forward must read what the second norm gives, and it reads something "
        "else",
    )
    explain(
        out, stream + f.output, [
            (MISSING.format("feed-forward"), lambda: f.output),
            (around.format("feed-forward"), lambda: n2.output + f.output),
            ("the second residual adds the layer's input: what attention has added "
             "is lost", lambda: x + f.output),
            (TWICE.format("feed-forward"), lambda: 2 * stream + f.output),
            ("the layer's input is added once more in the second residual",
             lambda: x + stream + f.output),
            ("it returns the stream after attention: what feed-forward adds is lost",
             lambda: stream),
            ("what feed-forward gives is taken away from the stream: add it",
             lambda: stream - f.output),
            ("a ReLU stands on the stream: the bend is inside feed-forward",
             lambda: (stream + f.output).relu()),
        ],
        "the output must be the stream plus feed-forward of its norm, and it is "
        "something else",
    )


def expect_structure(layer, norm_first):
    """Refuse a layer that is put together in another way."""
    module, trace = watch(layer, norm_first=norm_first)
    if norm_first and "norm_first" in layer.lacks:
        raise Wrong(
            "the constructor takes no norm_first. The expected signature is "
            + layer_battery.signature
        )
    again = call(layer, module, X)
    trace.calls.clear()
    out = call(layer, module, X)
    expect_order(trace, norm_first)
    expect(near(out, again), ALWAYS_ON)
    expect_two_norms(trace)
    (expect_pre if norm_first else expect_post)(trace, X, out)


@layer_battery.property("post-norm: LN(x + f(x)), attention first, then feed-forward")
def layer_post(layer):
    expect_structure(layer, False)


@layer_battery.property("pre-norm: x + f(LN(x)), with nothing else on the stream")
def layer_pre(layer):
    expect_structure(layer, True)


@layer_battery.property("passes the mask on to attention, as it is")
def layer_mask(layer):
    for norm_first in (False, True):
        module, trace = watch(layer, norm_first=norm_first)
        call(layer, module, X, PADDED)
        expect_mask(trace.called("attention")[-1], "attention")
        call(layer, module, X, attention_mask=PADDED.clone())
        expect_mask(trace.called("attention")[-1], "attention")
        call(layer, module, X)
        mask = trace.called("attention")[-1].mask
        expect(
            mask is None or isinstance(mask, torch.Tensor) and bool(mask.all()),
            "without a mask attention gets one: pass None on",
        )


def expect_mask(heard_call, what, mask=PADDED):
    """Refuse another mask than the one given."""
    got = heard_call.mask
    expect(
        got is not None,
        f"the mask is not passed on to {what}: padding counts for all real tokens",
    )
    expect(
        isinstance(got, torch.Tensor),
        f"{what} gets {type(got).__name__} {got!r} as its mask: the arguments are in "
        "another order, x, attention_mask, return_weights",
    )
    expect(
        got.is_floating_point() is False or got.shape != heard_call.input.shape,
        f"{what} gets x as its mask: it is called with one x, for query, key and "
        "value are made inside",
    )
    expect(
        got.dtype == torch.bool,
        f"the mask is converted to {got.dtype} on its way to {what}: pass the bool "
        "mask on",
    )
    expect(
        got.shape == mask.shape,
        f"the mask is reshaped to {tuple(got.shape)} on its way to {what}: pass it on "
        f"as (batch, seq_len); {what} does the rest",
    )
    expect(
        not torch.equal(got, ~mask),
        f"the mask is inverted on its way to {what}: everywhere in the book True = a "
        "real token",
    )
    expect(
        torch.equal(got, mask), f"{what} gets another mask than the one passed in"
    )


def ask(subject, module, watched, what, *arguments):
    """Call the reader's module for the weights too; explain where it fails.

    Args:
        subject: the `Subject`.
        module: the reader's module.
        watched: gives the last call of the part that has the weights.
        what: the name of that part.
        arguments: what the module is called with.
    """
    lost = f"return_weights is not passed on to {what}, so no weights come back"
    try:
        result = subject.run(module, *(a.clone() for a in arguments), return_weights=True)
    except Broke:
        expect(watched().asked is True, lost)
        raise
    expect(watched().asked is True, lost)
    expect(
        isinstance(result, tuple) and len(result) == 2,
        "with return_weights=True it must return two things, the output and the "
        "weights. The expected signature is " + subject.battery.signature,
    )
    return result


@layer_battery.property("returns attention's weights when asked")
def layer_weights(layer):
    for norm_first in (False, True):
        module, trace = watch(layer, norm_first=norm_first)
        out = call(layer, module, X, PADDED)
        result = ask(
            layer, module, lambda t=trace: t.called("attention")[-1], "attention",
            X, PADDED,
        )
        last = trace.called("attention")[-1]
        if isinstance(result[0], torch.Tensor) and result[0].ndim == 4:
            raise Wrong("the output comes first, and the weights second")
        expect_tensor(result[1], (2, HEADS, 5, 5), what="what is returned as weights")
        with torch.no_grad():
            wanted = last.module(last.input, last.mask, True)[1]
        expect(
            near(result[1], wanted),
            "the weights returned are not those that attention gave",
        )
        expect(
            isinstance(result[0], torch.Tensor) and near(result[0], out),
            "the output differs when the weights are asked for: both ways must "
            "compute the same",
        )


def dropped(got, whole):
    """How much of a tensor was dropped, and how the rest was scaled.

    Returns:
        The share of zeros and the scale; None where it is not ``whole`` with
        some numbers dropped.
    """
    known = whole.abs() > 1e-3
    zero = got.abs() < 1e-6
    kept = known & ~zero
    if not kept.any():
        return 1.0, 1.0
    ratio = got[kept] / whole[kept]
    scale = ratio.median().item()
    if not torch.allclose(ratio, torch.full_like(ratio, scale), rtol=1e-2, atol=1e-3):
        return None
    return (zero & known).float().sum().item() / known.sum().item(), scale


def expect_dropped(got, whole, share, what, elsewhere=(), exact=True):
    """Refuse another dropout than the one on what a sublayer adds.

    Args:
        got: what was added.
        whole: what it is without dropout.
        share: the dropout asked for.
        what: its name in a hint.
        elsewhere: triples of a hint, a tensor and what it is without dropout.
        exact: whether the share has to be this one.
    """
    seen = dropped(got, whole)
    if seen is None or seen[0] == 0:
        for hint, value, without in elsewhere:
            other = dropped(value, without)
            if other is not None and other[0] > 0:
                raise Wrong(hint)
    expect(
        seen is not None,
        f"in training {what} is neither whole nor with some of its numbers set to 0: "
        "dropout must fall on it, and on nothing else",
    )
    zeros, scale = seen
    expect(
        zeros > 0,
        f"in training nothing of {what} is dropped: is the dropout made but never "
        "called there?",
    )
    if not exact:
        return
    expect(
        not math.isclose(scale, 1 / (1 - share) ** 2, rel_tol=0.02),
        f"{what} is dropped twice",
    )
    expect(
        not (math.isclose(scale, 1, rel_tol=0.01) and zeros < 0.9),
        f"of {what} some is dropped, but the rest is not divided by 1 - dropout: "
        "nn.Dropout does so, and the mean stays as it was",
    )
    expect(
        math.isclose(scale, 1 / (1 - share), rel_tol=0.02)
        and abs(zeros - share) < 0.15,
        f"with dropout={share} a share of {zeros:.2f} of {what} is dropped: a fixed "
        "number in place of the argument, or 1 - dropout",
    )
    if whole.ndim == 3:
        zero = got.abs() < 1e-6
        expect(
            not torch.equal(zero.all(-1), zero.any(-1)),
            f"whole tokens of {what} are dropped at once: drop numbers one by one, "
            "with nn.Dropout",
        )
        expect(
            len(zero) == 1 or not torch.equal(zero.all(0), zero.any(0)),
            f"the same numbers of {what} are dropped in every text: draw for each "
            "one anew",
        )


@layer_battery.property("drops some of what each sublayer adds, in training only")
def layer_dropout(layer):
    if "dropout" in layer.lacks:
        raise Wrong(
            "it takes no dropout. The expected signature is " + layer_battery.signature
        )
    many, share = sample(16, 7, D_MODEL, seed=12), 0.25
    for norm_first in (False, True):
        module, trace = watch(layer, norm_first=norm_first, dropout=share)
        quiet = call(layer, module, many)
        calls = list(trace.calls)
        expect(near(call(layer, module, many), quiet), ALWAYS_ON)
        if [c.kind for c in calls] != ORDER[norm_first]:
            raise Skip("the layer's order is wrong; mend that first")
        trace.calls.clear()
        out = call(layer, module.train(), many)
        (a,), (f,) = trace.called("attention"), trace.called("feedforward")
        n1, n2 = trace.called("norm")
        stream = "dropout falls on the stream, not only on what is added to it"
        if norm_first:
            after = n2.input
            expect_dropped(after - many, a.output, share, "what attention adds", [
                (stream, after, many + a.output),
                (stream, n1.input, many),
                ("dropout falls on what attention reads: it belongs on what it adds",
                 a.input, n1.output),
            ])
            expect_dropped(out - after, f.output, share, "what feed-forward adds", [
                (stream, out, after + f.output),
                ("dropout falls on what feed-forward reads: it belongs on what it "
                 "adds", f.input, n2.output),
            ])
            expect(
                near(a.input, n1.output) and near(f.input, n2.output)
                and near(n1.input, many),
                "in training more is dropped than what the sublayers add: what they "
                "read must stay whole",
            )
        else:
            expect_dropped(n1.input - many, a.output, share, "what attention adds", [
                (stream, n1.input, many + a.output),
                (stream + ": it stands after the norm", f.input, n1.output),
                ("dropout falls on what attention reads: it belongs on what it adds",
                 a.input, many),
            ])
            expect_dropped(
                n2.input - n1.output, f.output, share, "what feed-forward adds", [
                    (stream, n2.input, n1.output + f.output),
                    (stream + ": it stands after the norm", out, n2.output),
                    ("dropout falls on what feed-forward reads: it belongs on what "
                     "it adds", f.input, n1.output),
                ])
            expect(
                near(f.input, n1.output) and near(out, n2.output)
                and near(a.input, many),
                "in training the stream is dropped as well, after a norm: only what "
                "the sublayers add may be",
            )


def torch_layer(trace, norm_first):
    """PyTorch's layer with the weights of the watched sublayers."""
    (a,), (f,) = trace.of("attention"), trace.of("feedforward")
    theirs = nn.TransformerEncoderLayer(
        D_MODEL, HEADS, D_FF, dropout=0.0, activation="gelu", layer_norm_eps=1e-12,
        batch_first=True, norm_first=norm_first,
    ).double()
    pairs = [(theirs.self_attn.out_proj, a.output), (theirs.linear1, f.expand),
             (theirs.linear2, f.contract)]
    norms = [c.module for c in trace.called("norm")]
    pairs += [(theirs.norm1, norms[0]), (theirs.norm2, norms[1])]
    with torch.no_grad():
        theirs.self_attn.in_proj_weight.copy_(
            torch.cat([a.query.weight, a.key.weight, a.value.weight])
        )
        theirs.self_attn.in_proj_bias.copy_(
            torch.cat([a.query.bias, torch.zeros(D_MODEL), a.value.bias])
        )
        for other, mine in pairs:
            other.weight.copy_(mine.weight)
            other.bias.copy_(mine.bias)
    return theirs, pairs


@layer_battery.property("equals nn.TransformerEncoderLayer, gradients too")
def layer_torch(layer):
    for norm_first in (False, True):
        module, trace = watch(layer, norm_first=norm_first)
        call(layer, module, X)
        if [c.kind for c in trace.calls] != ORDER[norm_first]:
            raise Skip("the layer's order is wrong; mend that first")
        module = module.double()
        (a,), (f,) = trace.of("attention"), trace.of("feedforward")
        if f.expand.out_features != D_FF or a.heads != HEADS:
            raise Skip("the sublayers have other sizes; mend that first")
        theirs, pairs = torch_layer(trace, norm_first)
        mine, other = (X.double().requires_grad_() for _ in range(2))
        out = call_with_gradient(layer, module, mine)
        wanted = theirs(other, src_key_padding_mask=~PADDED)  # True = padding there
        expect(
            near(out[PADDED], wanted[PADDED], 1e-6),
            "with the same weights it does not give what PyTorch's layer gives; what "
            "fails above says why",
        )
        tilt = sample(*X.shape, seed=13, dtype=torch.float64) * PADDED[:, :, None]
        expect(out.requires_grad, "no gradient flows back: look for .detach(), .data "
               "or torch.no_grad()")
        (out * tilt).sum().backward()
        (wanted * tilt).sum().backward()
        cut = (
            "the output is right, but the gradient of {} is not: the way back is cut "
            "off by .detach(), .data or torch.no_grad()"
        )
        expect(
            mine.grad is not None and near(mine.grad, other.grad, 1e-6),
            cut.format("the input"),
        )
        for right, part in pairs:
            expect(
                part.weight.grad is not None
                and near(part.weight.grad, right.weight.grad, 1e-6),
                cut.format("a sublayer's weight"),
            )


def call_with_gradient(layer, module, x):
    """Call with a mask and an input that wants a gradient."""
    out = layer.run(module, x, PADDED.clone())
    expect_tensor(out, x.shape)
    return out


@layer_battery.property("moves to other devices and dtypes")
def layer_moves(layer):
    expect_to_move(layer, lambda: watch(layer)[0], X, PADDED)


# TransformerEncoder

stack_battery = Battery(
    "TransformerEncoder",
    "TransformerEncoder(*, num_layers, d_model, norm_first=False, "
    "layer_norm_eps=1e-12, layer=…, norm=…, **options), called with "
    "(x, attention_mask=None, return_weights=False)",
    chapter=6,
    makes=("num_layers", "d_model", "norm_first", "layer_norm_eps", "layer", "norm",
           "num_heads", "d_ff", "dropout", "attention", "feedforward"),
    takes=("x", "attention_mask", "return_weights"),
)
UNSTACKED = "its layers are not made as they should be; mend that first"


def make_stack(stack, num_layers=3, **named):
    """The reader's stack with layers and norms under watch."""
    trace = Trace()
    module = stack.make(**{
        "num_layers": num_layers, "d_model": D_MODEL, "num_heads": HEADS, "d_ff": D_FF,
        "dropout": 0.0, "norm_first": False, "layer_norm_eps": 1e-12,
        "layer": trace.Layer, "norm": trace.Norm,
    } | named)
    return module, trace


def layers_of(module):
    """The different watched layers inside a module; copies count too."""
    return [m for m in module.modules() if getattr(m, "kind", "") == "layer"]


def watch_stack(stack, num_layers=3, **named):
    """The same with random weights, in evaluation; skip what cannot be watched."""
    if stack.lacks & {"layer", "norm"}:
        raise Skip(UNSTACKED)
    try:
        module, trace = make_stack(stack, num_layers, **named)
    except Wrong as wrong:
        if isinstance(wrong, Broke):
            raise
        raise Skip(UNSTACKED) from None
    if len(layers_of(module)) != num_layers:
        raise Skip(UNSTACKED)
    return scramble(module).eval(), trace


@stack_battery.property("makes num_layers layers, each with weights of its own")
def stack_layers(stack):
    absent = [n for n in ("num_layers", "layer", "norm") if n in stack.lacks]
    expect(
        not absent,
        f"the constructor takes no {', '.join(absent)}. The expected signature is "
        + stack_battery.signature,
    )
    for number in (3, 1):
        module, trace = make_stack(stack, number)
        inside = layers_of(module)
        expect(
            trace.of("layer"),
            "the class that it gets as layer= is not used: make the layers from the "
            "argument, layer(…), not from a class of a fixed name",
        )
        expect(
            len(inside) > 0,
            "the layers are made but not registered: a plain list hides them from "
            "the optimizer, from .to(device) and from state_dict. Use "
            "nn.ModuleList",
        )
        if len(inside) == 1 and number > 1:
            raise Wrong(
                f"with num_layers={number} there is one layer, the same at every "
                "height ([layer] * n repeats the object), or the number is fixed: "
                "make a new one for each"
            )
        expect(
            len(inside) == number,
            f"with num_layers={number} there are {len(inside)} layers: is the number "
            "fixed, or one off?",
        )
    module, _ = make_stack(stack, 3)
    pointers = [p.data_ptr() for m in layers_of(module) for p in m.parameters()]
    expect(
        len(set(pointers)) == len(pointers),
        "the layers share their weights: make a new layer for each",
    )


@stack_battery.property("refuses num_layers below 1")
def stack_least(stack):
    for number in (0, -1):
        try:
            make_stack(stack, number)
        except Broke:
            if isinstance(stack.last_error, (ValueError, AssertionError, TypeError)):
                continue
            raise
        raise Wrong(
            f"num_layers={number} must be refused by a ValueError: an empty stack "
            "gives back its input, and nobody notices"
        )


@stack_battery.property("passes its arguments on to the layers")
def stack_arguments(stack):
    if stack.lacks & {"layer", "norm"}:
        raise Skip(UNSTACKED)
    trace = Trace()
    options = {
        "d_model": D_MODEL, "num_heads": HEADS, "d_ff": 7, "dropout": 0.3,
        "norm_first": True, "layer_norm_eps": 1e-3, "norm": trace.Norm,
        "attention": trace.Attention, "feedforward": trace.FeedForward,
    }
    for changed in ({}, {"norm_first": False, "d_ff": 9}):
        wanted = options | changed
        module = stack.make(num_layers=2, layer=trace.Layer, **wanted)
        if len(layers_of(module)) != 2:
            raise Skip(UNSTACKED)
        for part in layers_of(module):
            for name, value in wanted.items():
                expect(
                    name in part.given,
                    f"{name} is not passed on to the layers: they would take their "
                    "own default",
                )
                expect(
                    part.given[name] is value or part.given[name] == value,
                    f"the layers get {name}={part.given[name]!r} where the stack was "
                    f"made with {value!r}: a fixed value, or another argument",
                )
    trace = Trace()
    stack.make(num_layers=1, d_model=D_MODEL, layer=trace.Layer, norm=trace.Norm,
               num_heads=HEADS, d_ff=D_FF, dropout=0.0)
    if not trace.of("layer"):
        raise Skip(UNSTACKED)
    given = trace.of("layer")[0].given
    _, by_name = make_stack(stack)
    expect(
        not given.get("norm_first", False)
        and len(trace.of("norm")) == len(by_name.of("norm")),
        "without an argument it is pre-norm: the default is norm_first=False, "
        "post-norm as in BERT",
    )
    expect(
        given.get("layer_norm_eps", 1e-12) == 1e-12,
        f"without an argument layer_norm_eps is {given.get('layer_norm_eps')!r}: the "
        "default is BERT's 1e-12",
    )


def expect_run(stack, norm_first):
    """Refuse a stack that runs its layers in another way."""
    if norm_first and "norm_first" in stack.lacks:
        raise Wrong(
            "the constructor takes no norm_first. The expected signature is "
            + stack_battery.signature
        )
    module, trace = watch_stack(stack, norm_first=norm_first)
    again = call(stack, module, X)
    trace.calls.clear()
    out = call(stack, module, X)
    expect(near(out, again), ALWAYS_ON)
    layers, norms = trace.called("layer"), trace.called("norm")
    expect(layers, "the layers are made, but never called")
    expect(
        len({id(c.module) for c in layers}) == len(layers),
        "one layer is called more than once" + (
            ", and others never: look at the loop variable" if len(layers) == 3 else ""
        ),
    )
    expect(
        len(layers) == 3,
        f"of 3 layers only {len(layers)} are called: look at the range of the loop",
    )
    expect_chain(layers, norms, module)
    last = layers[-1].output
    if norm_first:
        expect_last_norm(trace, module, last, out)
        return
    expect(
        not trace.of("norm"),
        "post-norm has a norm behind the last layer: each layer ends with one "
        "already. Only pre-norm needs it",
    )
    explain(
        out, last, [
            ("the stack's input is added to its output: the residuals are inside the "
             "layers", lambda: X + last),
            ("the outputs of all layers are added up: return that of the last",
             lambda: sum(c.output for c in layers)),
            ("the outputs of all layers are averaged: return that of the last",
             lambda: sum(c.output for c in layers) / 3),
            ("it returns the output of the layer before the last",
             lambda: layers[-2].output),
            ("it returns its input: the results of the layers are thrown away",
             lambda: X),
            ("a norm without weights stands behind the last layer: post-norm ends "
             "with a norm already", lambda: normal(last)),
        ],
        "the output must be what the last layer gives, and it is something else",
    )


def expect_chain(layers, norms, module):
    """Refuse layers that do not read what the one before gave."""
    explain(
        layers[0].input, X, [
            ("a norm stands before the first layer: each layer has its own norms",
             lambda: norms[0].output),
            ("a norm stands before the first layer: each layer has its own norms",
             lambda: normal(X)),
        ],
        "the first layer must read x, and it reads something else",
    )
    places = {id(m): i for i, m in enumerate(layers_of(module))}
    order = [places[id(c.module)] for c in layers]
    for before, now in zip(layers, layers[1:], strict=False):
        explain(
            now.input, before.output, [
                ("every layer reads the stack's input: the result of one must "
                 "become the input of the next", lambda: X),
                ("the input of a layer is added to its output between the layers: "
                 "the residuals are inside the layers",
                 lambda now=now, before=before: before.input + before.output),
                ("the stack's input is added between the layers",
                 lambda before=before: X + before.output),
                *[("a norm stands between the layers: each layer has its own norms, "
                   "and the last one stands behind the last layer",
                   lambda c=c: c.output) for c in norms],
                ("a norm stands between the layers",
                 lambda before=before: normal(before.output)),
            ],
            "a layer must read what the layer before gave, and it reads something "
            "else",
        )
    expect(
        order != [2, 1, 0],
        "the layers run from the last to the first",
    )


def expect_last_norm(trace, module, last, out):
    """Refuse a pre-norm stack that does not end with one norm."""
    made = trace.of("norm")
    forgotten = (
        "the last norm of pre-norm is missing: nothing has normalised the stream on "
        "its way, so its size is whatever has piled up"
    )
    inside = {id(m) for m in module.modules()}
    kept = [norm for norm in made if id(norm) in inside]
    expect(kept or not near(out, last), forgotten)
    expect(
        made, "pre-norm needs a norm behind the last layer, made from the class that "
        "it gets as norm=" + (
            ": it is made from a class of a fixed name"
            if near(out, normal(last), 1e-3) else ""
        ),
    )
    expect(len(made) == 1, f"{len(made)} norms are made beside the layers: one is enough")
    expect(
        kept,
        "the last norm is made but not registered: make it an attribute of the module",
    )
    norms = trace.called("norm")
    expect(norms or not near(out, last), "the last norm is made, but never called")
    norm = made[0]
    with torch.no_grad():
        wanted = norm(last)
        explain(
            out, wanted, [
                ("the last norm is called, but its result is not used", lambda: last),
                ("the stream is added once more after the last norm",
                 lambda: last + wanted),
                ("the stack's input is added to its output", lambda: X + wanted),
                ("the stream is normalised twice at the end", lambda: norm(wanted)),
                ("the last norm reads the stack's input", lambda: norm(X)),
                ("the output of the layer before the last is normalised",
                 lambda: norm(trace.called("layer")[-2].output)),
            ],
            "in pre-norm the output must be the norm of what the last layer gives, "
            "and it is something else",
        )
    expect(
        "eps" in norm.given and norm.given["eps"] == 1e-12,
        "layer_norm_eps is not passed on to the last norm",
    )


@stack_battery.property("post-norm: the layers in a row, and nothing else")
def stack_post(stack):
    expect_run(stack, False)


@stack_battery.property("pre-norm: the layers in a row, and one last norm")
def stack_pre(stack):
    expect_run(stack, True)


@stack_battery.property("passes the mask on to every layer")
def stack_mask(stack):
    for norm_first in (False, True):
        module, trace = watch_stack(stack, norm_first=norm_first)
        call(stack, module, X, PADDED)
        calls = trace.called("layer")
        masks = [c.mask is not None for c in calls]
        expect(
            all(masks) or not any(masks),
            "the mask reaches some layers and not others: each one needs it",
        )
        for heard_call in calls:
            expect_mask(heard_call, "the layers")
        call(stack, module, X, attention_mask=PADDED.clone())
        expect_mask(trace.called("layer")[-1], "the layers")
        call(stack, module, X)
        mask = trace.called("layer")[-1].mask
        expect(
            mask is None or isinstance(mask, torch.Tensor) and bool(mask.all()),
            "without a mask the layers get one: pass None on",
        )


@stack_battery.property("returns one tensor of weights a layer when asked")
def stack_weights(stack):
    for norm_first in (False, True):
        module, trace = watch_stack(stack, norm_first=norm_first)
        out = call(stack, module, X, PADDED)
        trace.calls.clear()
        result = ask(
            stack, module, lambda t=trace: t.called("layer")[-1], "the layers",
            X, PADDED,
        )
        calls = list(trace.called("layer"))
        if isinstance(result[1], torch.Tensor) and result[1].shape == X.shape:
            raise Wrong("the output comes first, and the list of weights second")
        weights = result[1]
        if isinstance(weights, torch.Tensor) and weights.ndim == 4:
            raise Wrong(
                "only one layer's weights come back: a list is wanted, one tensor a "
                "layer"
            )
        expect(
            isinstance(weights, (list, tuple)) and len(weights) == 3,
            "the weights must come as a list with one tensor a layer, but it is a "
            f"{type(weights).__name__}"
            + (f" of {len(weights)}" if hasattr(weights, "__len__") else ""),
        )
        for each in weights:
            expect_tensor(each, (2, HEADS, 5, 5), what="each layer's weights")
        with torch.no_grad():
            wanted = [c.module(c.input, c.mask, True)[1] for c in calls]
        right = all(near(w, v) for w, v in zip(weights, wanted, strict=True))
        expect(
            right or not all(
                near(w, v) for w, v in zip(weights, wanted[::-1], strict=True)
            ),
            "the weights come in the opposite order: the first layer's first",
        )
        expect(
            right, "the weights returned are not those that the layers gave, layer by "
            "layer: is one of them kept more than once?"
        )
        expect(
            isinstance(result[0], torch.Tensor) and near(result[0], out),
            "the output differs when the weights are asked for: both ways must "
            "compute the same" + (
                ", with the last norm" if norm_first else ""
            ),
        )
        again = stack.run(module, X.clone(), PADDED.clone(), return_weights=True)
        expect(
            isinstance(again, tuple) and len(again[1]) == 3,
            "a second call returns more weights than layers: the list is kept from "
            "the call before. Begin a new one in forward",
        )


@stack_battery.property("learns at every height, and adds no parameters of its own")
def stack_learning(stack):
    for norm_first in (False, True):
        module, trace = watch_stack(stack, norm_first=norm_first)
        parts = [*layers_of(module), *trace.of("norm")]
        count = sum(p.numel() for p in module.parameters())
        theirs = sum(p.numel() for m in parts for p in m.parameters())
        expect(
            count == theirs,
            f"beyond its layers and the last norm it has {count - theirs} parameters "
            "of its own: a stack has none",
        )
        # A bias of the mixing scores moves all scores of a query together.
        expect_learning(stack, module, module, X)


@stack_battery.property("moves to other devices and dtypes")
def stack_moves(stack):
    expect_to_move(
        stack, lambda: watch_stack(stack, norm_first=True)[0], X, PADDED
    )


# init_weights

init_battery = Battery(
    "init_weights",
    "init_weights(module, *, std=0.02), used with model.apply(init_weights)",
    chapter=6, takes=("module", "std"),
)
STD = 0.02


def below(z):
    """The standard normal distribution function."""
    return 0.5 * (1 + torch.erf(z / math.sqrt(2)))


def cut_at(bound, scale=1.0):
    """Distribution function of a normal cut off at ± bound, drawn again beyond."""
    def cdf(z):
        z, edge = z / scale, torch.tensor(float(bound))
        inside = below(edge) - below(-edge)
        return ((below(z) - below(-edge)) / inside).clamp(0, 1)
    return cdf


def even(bound):
    """Distribution function of equally likely numbers in ± bound."""
    return lambda z: ((z + bound) / (2 * bound)).clamp(0, 1)


def apart(values, cdf):
    """Largest distance of sorted values' distribution from a given one."""
    ranks = torch.arange(len(values) + 1, dtype=torch.float64) / len(values)
    wanted = cdf(values)
    return torch.maximum(
        (ranks[1:] - wanted).abs().max(), (ranks[:-1] - wanted).abs().max()
    ).item()


def init(function, module, **named):
    """Apply the reader's function to a model, under watch."""
    thing = functools.partial(function.thing, **named) if named else function.thing
    function.run(module.apply, thing)
    return module


def expect_start(function, weight, before, std, what):
    """Refuse weights that are not drawn as BERT draws them."""
    expect(
        not torch.equal(weight, before),
        f"the weights of {what} are left as they were",
    )
    expect(bool(weight.isfinite().all()), f"the weights of {what} are not finite")
    values = (weight.detach().double() / std).flatten().sort().values
    largest = values.abs().max().item()
    enough = 2.5 / math.sqrt(values.numel())
    if apart(values, cut_at(2)) < enough:
        expect(
            largest <= 2.001,
            f"a weight of {what} lies {largest:.1f} standard deviations out: the cut "
            "is at two. The bounds of trunc_normal_ are values, not multiples of "
            "std: its -2 and 2 cut nothing here",
        )
        return
    if values.unique().numel() == 1:
        raise Wrong(f"{what}: all weights are equal; all units would learn the same")
    expect(
        (values.abs() > largest - 1e-4).double().mean() < 0.005,
        f"{what}: numbers beyond a bound are set to the bound (clamp), so many weights "
        "are equal: they must be drawn again",
    )
    expect(
        abs(values.mean().item()) < 0.2,
        f"{what}: the mean of the weights is {weight.mean().item():.2g}; it must be 0",
    )
    rows, columns = weight.shape
    scale = values.std().item()
    xavier, fan_in = math.sqrt(6 / (rows + columns)), 1 / math.sqrt(columns)
    candidates = [
        ("they are drawn from the whole normal distribution: BERT cuts it off at two "
         "standard deviations", below),
        ("the cut is at one standard deviation: it is at two", cut_at(1)),
        ("std is taken as the spread after the cut: it is the one before, so what "
         "comes out is narrower, 0.88 of it", cut_at(2, 1 / 0.87962566)),
        ("all numbers between -std and std are equally likely: draw from a normal "
         "distribution", even(1)),
        ("all numbers between -2 std and 2 std are equally likely: draw from a "
         "normal distribution", even(2)),
        ("all numbers are equally likely: draw from a normal distribution",
         even(math.sqrt(3))),
        ("these are Xavier's weights, whose spread depends on the matrix: BERT's is "
         "0.02 for all", even(xavier / std)),
        ("these are Xavier's weights, whose spread depends on the matrix: BERT's is "
         "0.02 for all", lambda z: below(z * std / math.sqrt(2 / (rows + columns)))),
        ("these are PyTorch's own first weights: nothing was drawn anew",
         even(fan_in / std)),
        ("these are Kaiming's weights, whose spread depends on the matrix",
         even(math.sqrt(6 / columns) / std)),
        ("these are Kaiming's weights, whose spread depends on the matrix",
         lambda z: below(z * std / math.sqrt(2 / columns))),
        ("std is taken as the variance: give it as the standard deviation",
         lambda z: below(z * std / math.sqrt(std))),
        ("std is taken as the variance: give it as the standard deviation",
         cut_at(2, math.sqrt(std) / std)),
        ("std is squared: give it as the standard deviation", cut_at(2, std)),
        ("std is squared: give it as the standard deviation",
         lambda z: below(z / std)),
        ("they have standard deviation 1: std is not used", lambda z: below(z * std)),
        ("they have standard deviation 0.02 whatever std says: the argument is not "
         "used", cut_at(2, 0.02 / std)),
        ("they have standard deviation 0.02 whatever std says: the argument is not "
         "used", lambda z: below(z * std / 0.02)),
        ("the cut is at ± 0.04 whatever std says: it must move with std",
         cut_at(0.04 / std)),
        ("only positive numbers are drawn: the mean must be 0",
         lambda z: (2 * below(z) - 1).clamp(min=0)),
    ]
    best, hint = min((apart(values, cdf), hint) for hint, cdf in candidates)
    if best < enough:
        if hint.startswith("they are drawn from the whole"):
            hint = (
                "the cut is at three standard deviations: it is at two"
                if largest < 3.001 and values.numel() > 10_000 else
                hint + ". With trunc_normal_: its bounds are values, not multiples "
                "of std, so that the default of ± 2 cuts nothing"
            )
        raise Wrong(f"{what}: {hint}")
    if apart(values, cut_at(2, scale / 0.87962566)) < enough:
        raise Wrong(
            f"{what}: the cut is right, but the standard deviation before it is "
            f"{std * scale / 0.87962566:.3g}: it must be std={std:g}"
            + (", the default" if std == STD else "")
        )
    raise Wrong(
        f"{what}: the weights are not drawn from a normal distribution with standard "
        f"deviation {std:g} that is cut off at two of them: their standard deviation "
        f"is {weight.std().item():.3g} (wanted {0.8796 * std:.3g}), their mean "
        f"{weight.mean().item():.2g}, the largest {weight.abs().max().item():.3g}"
    )


@init_battery.property("draws Linear and Embedding weights from a cut-off normal")
def init_drawn(function):
    for std in (STD, 0.5):
        named = {} if std == STD else {"std": std}
        model = nn.ModuleDict({
            "linear": nn.Linear(300, 200),
            "inner": nn.Sequential(nn.Embedding(150, 400)),
        })
        before = [p.detach().clone() for p in (
            model["linear"].weight, model["inner"][0].weight)]
        init(function, model, **named)
        for weight, was, what in zip(
            (model["linear"].weight, model["inner"][0].weight), before,
            ("an nn.Linear", "an nn.Embedding"), strict=True,
        ):
            expect_start(function, weight, was, std, what)


@init_battery.property("sets the biases of Linear to 0, where there are any")
def init_biases(function):
    model = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3, bias=False))
    nn.init.ones_(model[0].bias)
    try:
        init(function, model)
    except Broke as broke:
        raise Wrong(
            "it fails on a model in which one nn.Linear has no bias (bias=False: it "
            f"is None there): {broke}"
        ) from None
    expect(
        not bool((model[0].bias == 1).all()),
        "the bias of an nn.Linear is left as it was: it starts at 0",
    )
    expect(
        bool((model[0].bias == 0).all()),
        "the bias of an nn.Linear must be 0 exactly, but it is drawn, or set to "
        "another number",
    )


class Plain(nn.Module):
    """A module with weight and bias that is neither Linear nor Embedding."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.full((6, 5), 3.0))
        self.bias = nn.Parameter(torch.full((6,), 3.0))


@init_battery.property("leaves norms and all other modules alone")
def init_others(function):
    model = nn.ModuleDict({"plain": Plain(), "norm": nn.LayerNorm(6),
                           "conv": nn.Conv1d(4, 3, 2), "drop": nn.Dropout(0.1)})
    conv = model["conv"].weight.detach().clone()
    try:
        init(function, model)
    except Broke as broke:
        raise Wrong(
            "it fails on modules that are neither Linear nor Embedding: apply calls "
            f"it for each module, containers too. It {broke}"
        ) from None
    norm = model["norm"]
    expect(
        bool((norm.weight == 1).all() and (norm.bias == 0).all()),
        "the weight or bias of a norm is drawn too: norms start as the identity, "
        "with 1 and 0. Look at which modules are chosen (isinstance, not hasattr or "
        "all parameters)",
    )
    expect(
        bool((model["plain"].weight == 3).all() and (model["plain"].bias == 3).all())
        and torch.equal(model["conv"].weight, conv),
        "modules that are neither nn.Linear nor nn.Embedding are changed as well: "
        "choose by isinstance",
    )


@init_battery.property("draws anew for each layer, and keeps the parameters themselves")
def init_anew(function):
    model = nn.Sequential(nn.Linear(9, 9), nn.Linear(9, 9), nn.Embedding(9, 9))
    parameters = list(model.parameters())
    before = [p.detach().clone() for p in parameters]
    init(function, model)
    for parameter, was in zip(model.parameters(), before, strict=True):
        if parameter.ndim == 2 and (
            torch.equal(parameter, was) or parameter.unique().numel() == 1
        ):
            raise Skip("not all weights are drawn; mend that first")
    expect(
        all(a is b for a, b in zip(parameters, model.parameters(), strict=True)),
        "a parameter is replaced by a new one: an optimizer made before, and tied "
        "weights, would hold the old. Fill it in place",
    )
    expect(
        all(p.requires_grad and p.is_leaf for p in parameters),
        "a parameter can no longer learn: fill it in place, under no_grad",
    )
    weights = [p.detach() for p in parameters if p.ndim == 2]
    expect(
        not torch.equal(weights[0], weights[1]),
        "two layers of the same size get the same numbers: a seed is set inside",
    )
    once = weights[0].clone()
    init(function, model)
    expect(
        not torch.equal(once, weights[0]),
        "it draws the same numbers each time: a seed is set inside. Seeds belong to "
        "whoever calls",
    )
    tiny = init(function, nn.Linear(4, 4).double())
    expect(
        tiny.weight.dtype == torch.float64,
        "it changes the dtype of a float64 layer: fill the weight in place",
    )


# Exercises


def measured(subject, *arguments, **named):
    """Call a function that measures something: it may set a seed of its own."""
    try:
        return subject(*arguments, **named)
    finally:
        subject.manners.pop("seed", None)


def expect_number(value, what):
    """Refuse what is no finite number; give it as a float."""
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    expect(value is not None, f"{what} is None: is there a return at the end?")
    expect(
        isinstance(value, (int, float)) and math.isfinite(value),
        f"{what} must be one finite number, but it is {value!r}",
    )
    return float(value)


one_pass = Battery(
    "one_pass_variance", "one_pass_variance(x) -> variance along the last axis, (…, 1)",
    chapter=6, takes=("x",),
)


@one_pass.property("is the mean of the squares minus the square of the mean")
def one_pass_formula(function):
    x = VECTORS.double()
    mean, squares = x.mean(-1, keepdim=True), x.square().mean(-1, keepdim=True)
    out = function(x.clone())
    expect_tensor(out)
    expect(
        out.shape != x.shape[:-1],
        "the last axis is gone: keep it with length 1 (keepdim=True), so that the "
        "variance fits under x",
    )
    explain(
        out, squares - mean.square(), [
            ("it is the square of the mean minus the mean of the squares: the other "
             "way round", lambda: mean.square() - squares),
            ("this is the root: the variance itself is asked for",
             lambda: (squares - mean.square()).sqrt()),
            ("the mean itself is taken away, not its square", lambda: squares - mean),
            ("the square of the mean is not taken away", lambda: squares),
            ("it is divided by d_model - 1", lambda: x.var(-1, keepdim=True)),
            ("the squares are summed, not averaged",
             lambda: x.square().sum(-1, keepdim=True) - mean.square()),
        ],
        "for everyday numbers it must give the variance along the last axis (divided "
        "by d_model), and it gives something else",
    )


@one_pass.property("loses its digits near 5000, as the short formula must")
def one_pass_digits(function):
    x = sample(40, 128, seed=31) + 5000
    out = function(x.clone())
    expect_tensor(out, (40, 1), torch.float32)
    exact = x.double().var(-1, correction=0, keepdim=True)
    expect(
        bool(((out.double() - exact).abs() > 0.01).any()),
        "it is exact near 5000, so it is not the short formula in 32 bits: the mean is "
        "taken away before squaring, or it computes in 64 bits. Here the point is to "
        "see it fail",
    )


ratio = Battery(
    "last_gradient_ratio",
    "last_gradient_ratio(norm_first, seeds=5) -> gradient of the last of 32 layers, "
    "divided by that of the last of 2",
    chapter=6, takes=("norm_first", "seeds"),
)


@ratio.property("post-norm: the last gradient does not shrink; pre-norm: it does")
def ratio_bands(function):
    post, pre = (
        expect_number(measured(function, norm_first, seeds=2), "the ratio")
        for norm_first in (False, True)
    )
    if 0.8 < post < 3 and 0.1 < pre < 0.75:
        return
    shown = f" (post-norm gives {post:.2f}, pre-norm {pre:.2f})"
    expect(
        not math.isclose(post, pre, rel_tol=1e-3),
        "post-norm and pre-norm give the same: norm_first is not passed on to probe"
        + shown,
    )
    expect(
        not (0.8 < 1 / max(post, 1e-9) < 3 and 0.1 < 1 / max(pre, 1e-9) < 0.75),
        "it is upside down: the gradient of the deep stack stands above the line" + shown,
    )
    expect(
        not (0.8 < pre < 3 and 0.1 < post < 0.75),
        "post-norm and pre-norm have changed places: pass norm_first on as it is"
        + shown,
    )
    raise Wrong(
        "for post-norm the ratio must lie between 0.8 and 3, for pre-norm between 0.1 "
        "and 0.75: take the last layer (-1) and the feed-forward's column (0) of what "
        "probe gives, the mean of the seeds of each depth, and then the ratio" + shown
    )


rms = Battery(
    "RMSNorm", "RMSNorm(d_model, *, eps), called with (x)", chapter=6,
    makes=("d_model", "eps"), takes=("x",),
)


@rms.property("divides each vector by the root of its mean square")
def rms_plain(layer):
    for eps in (1e-6, 0.5):
        x = SMALL.double()

        def root(x=x, eps=eps, axes=-1):
            return (x.square().mean(axes, keepdim=True) + eps).sqrt()

        explain(
            layer.run(make_norm(layer, eps=eps), SMALL.clone()), x / root(), [
                ("the mean is taken away: that is LayerNorm. RMSNorm leaves it",
                 lambda x=x, eps=eps: normal(x, eps)),
                ("it divides by the standard deviation: by the root of the mean square, "
                 "without taking the mean away",
                 lambda x=x, eps=eps: normal(x, eps, centre=False)),
                ("it divides by the mean square, not by its root",
                 lambda x=x, root=root: x / root().square()),
                ("it multiplies by the root: divide by it",
                 lambda x=x, root=root: x * root()),
                ("eps is outside the root: add it to the mean square",
                 lambda x=x, eps=eps: x / (root(x, 0.0) + eps)),
                ("eps is not used", lambda x=x, root=root: x / root(x, 0.0)),
                ("the squares are summed, not averaged",
                 lambda x=x, eps=eps: x / (x.square().sum(-1, keepdim=True) + eps).sqrt()),
                *[(f"the mean square is taken along another axis (dim={axis}): each "
                   "vector has its own, along the last",
                   lambda x=x, root=root, eps=eps, axis=axis: x / root(x, eps, axis))
                  for axis in (0, 1)],
            ],
            f"with eps={eps:g} a fresh norm does not give x / root(mean square + eps)",
            tolerance=3e-5,
        )


@rms.property("has one weight, which starts at 1, and no bias")
def rms_weight(layer):
    module = make_norm(layer, eps=1e-6)
    parameters = list(module.parameters())
    expect(parameters, "it has no weight: an nn.Parameter of d_model numbers")
    count = sum(p.numel() for p in parameters)
    expect(count != 2 * WIDTH, "it has a bias as well: RMSNorm has none")
    expect(
        count == WIDTH,
        f"the weight must have d_model = {WIDTH} numbers, but there are {count}",
    )
    expect(bool((parameters[0] == 1).all()), "the weight must start at 1")
    scramble(module)
    x = VECTORS.double()
    plain = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    explain(
        layer.run(module, VECTORS.clone()), plain * parameters[0].detach().double(),
        [("the weight is made, but never used", lambda: plain)],
        "the normalised vector must be multiplied by the weight, place by place",
        tolerance=3e-5,
    )


@rms.property("moves to other devices and dtypes")
def rms_moves(layer):
    expect_to_move(layer, lambda: make_norm(layer, eps=1e-6), VECTORS)


by_mean = Battery(
    "learn_by_mean", "learn_by_mean(steps=160) -> list of losses, one a step",
    chapter=6, takes=("steps",),
)


@by_mean.property("trains 12 pre-norm layers whose attention is a mean")
def by_mean_layers(function):
    called = set()

    def see(module, given, out):
        if isinstance(module, nn.Linear) and module.in_features == module.out_features:
            called.add(module)

    hook = nn.modules.module.register_module_forward_hook(see)
    try:
        losses = measured(function, steps=2)
    finally:
        hook.remove()
    expect(losses is not None, "it returns None: is there a return at the end?")
    expect(
        isinstance(losses, (list, tuple)) and len(losses) == 2,
        "it must return the list of losses that learn gives, one a step, for as many "
        "steps as asked",
    )
    for loss in losses:
        value = expect_number(loss, "a loss")
        expect(
            0.3 < value < 1.5,
            f"the first losses must be near guessing (0.68), but one is {value:.2f}: is "
            "norm_first=True passed on?",
        )
    expect(
        len(called) != 48,
        "the book's own attention is at work (four square matrices a layer): pass "
        "attention=MeanAttention on",
    )
    expect(
        len(called) == 12,
        f"12 layers with one square matrix each are expected (MeanAttention's value), "
        f"but {len(called)} square matrices are at work",
    )


shared = Battery(
    "shared_stack",
    "shared_stack(num_layers, **sizes) -> a TransformerEncoder that runs one layer "
    "num_layers times",
    chapter=6, takes=("num_layers",),
)
STACKED = {"d_model": 8, "num_heads": 2, "d_ff": 20, "dropout": 0.0}


def made_stack(function, num_layers):
    """A reader's stack, in evaluation."""
    module = function(num_layers, **STACKED)
    expect(
        isinstance(module, nn.Module),
        f"it must return the stack, but it returns {type(module).__name__}",
    )
    return module.eval()


@shared.property("has the parameters of one layer, however high it is")
def shared_count(function):
    counts = [
        sum(p.numel() for p in made_stack(function, n).parameters()) for n in (1, 2, 6)
    ]
    expect(
        counts[0] == counts[1] == counts[2],
        f"with 1, 2 and 6 layers it has {counts} parameters: a new layer is made each "
        "time. What is given as layer= must return the same object at each call",
    )
    wanted = 4 * (8 * 8 + 8) + 2 * 8 * 20 + 20 + 8 + 4 * 8
    expect(
        counts[0] == wanted,
        f"one layer of these sizes has {wanted} parameters, but the stack has "
        f"{counts[0]}",
    )


@shared.property("runs that layer num_layers times")
def shared_runs(function):
    torch.manual_seed(0)
    for number in (1, 5):
        module = made_stack(function, number)
        calls = []
        whole = sum(p.numel() for p in module.parameters())
        for part in module.modules():
            if part is not module and not isinstance(part, nn.ModuleList) and (
                sum(p.numel() for p in part.parameters()) == whole
            ):
                part.register_forward_hook(
                    lambda m, given, out, calls=calls: calls.append(out))
        function.run(module, sample(2, 5, 8, seed=32), PADDED.clone())
        expect(
            len(calls) == number,
            f"with num_layers={number} the one layer runs {len(calls)} times",
        )


backward = Battery(
    "layer_norm_backward",
    "layer_norm_backward(x, weight, eps, grad) -> gradients of x, weight and bias",
    chapter=6, takes=("x", "weight", "eps", "grad"),
)


def by_autograd(x, weight, eps, grad):
    """The three gradients, by PyTorch."""
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    bias = torch.zeros_like(weight).requires_grad_()
    out = F.layer_norm(x, weight.shape, weight, bias, eps)
    return torch.autograd.grad(out, (x, weight, bias), grad)


def by_hand(function, x, weight, eps, grad):
    """The reader's three gradients."""
    with torch.no_grad():
        result = function(x.clone(), weight.clone(), eps, grad.clone())
    expect(
        isinstance(result, (tuple, list)) and len(result) == 3,
        "it must return three tensors: the gradients of x, of weight and of bias",
    )
    return result


WEIGHT = sample(WIDTH, seed=33, dtype=torch.float64)
PULL = sample(2, 5, WIDTH, seed=34, dtype=torch.float64)


@backward.property("the bias hears the sum over all vectors")
def backward_bias(function):
    *_, got = by_hand(function, VECTORS.double(), WEIGHT, 1e-3, PULL)
    explain(
        got, PULL.sum((0, 1)), [
            ("the gradient of the bias is averaged: it is summed, since each vector "
             "has added it once", lambda: PULL.mean((0, 1))),
            ("the gradient of the bias is multiplied by the weight: the bias is added "
             "after it", lambda: (PULL * WEIGHT).sum((0, 1))),
        ],
        "the gradient of the bias must be grad, summed over all axes but the last",
    )


@backward.property("the weight hears grad times the normalised vector")
def backward_weight(function):
    x = VECTORS.double()
    _, got, _ = by_hand(function, x, WEIGHT, 1e-3, PULL)
    explain(
        got, (PULL * normal(x, 1e-3)).sum((0, 1)), [
            ("x itself is taken, not the normalised vector",
             lambda: (PULL * x).sum((0, 1))),
            ("the centred vector is taken: it must be divided by the root as well",
             lambda: (PULL * (x - x.mean(-1, keepdim=True))).sum((0, 1))),
            ("the gradient of the weight is averaged: it is summed over all vectors",
             lambda: (PULL * normal(x, 1e-3)).mean((0, 1))),
            ("eps is left out", lambda: (PULL * normal(x)).sum((0, 1))),
            ("grad is multiplied by the weight as well",
             lambda: (PULL * WEIGHT * normal(x, 1e-3)).sum((0, 1))),
        ],
        "the gradient of the weight must be grad times the normalised vector, summed "
        "over all axes but the last",
    )


@backward.property("x hears it on three ways: itself, the mean, the variance")
def backward_input(function):
    x = SMALL.double()
    for eps in (1e-3, 0.3):
        got, _, _ = by_hand(function, x, WEIGHT, eps, PULL)
        inner, n = PULL * WEIGHT, normal(x, eps)
        scale = (x.var(-1, correction=0, keepdim=True) + eps).rsqrt()
        mean, along = inner.mean(-1, keepdim=True), (inner * n).mean(-1, keepdim=True)
        wanted, _, _ = by_autograd(x, WEIGHT, eps, PULL)
        parts = {"inner": inner, "n": n, "scale": scale, "mean": mean, "along": along}

        def value(make, parts=parts):
            return lambda: make(SimpleNamespace(**parts))

        explain(
            got, wanted, [
                ("mean and variance are taken as constants: both depend on x, and "
                 "each gives a term of its own", value(lambda v: v.inner * v.scale)),
                ("the way through the variance is missing",
                 value(lambda v: (v.inner - v.mean) * v.scale)),
                ("the way through the mean is missing",
                 value(lambda v: (v.inner - v.n * v.along) * v.scale)),
                ("the weight is forgotten: grad meets it first",
                 lambda eps=eps: by_autograd(x, torch.ones_like(WEIGHT), eps, PULL)[0]),
                ("it is not divided by the root of variance + eps",
                 value(lambda v: v.inner - v.mean - v.n * v.along)),
                ("the sums are not divided by d_model: take means",
                 value(lambda v: (v.inner - WIDTH * v.mean - v.n * WIDTH * v.along)
                       * v.scale)),
                ("the signs of the two further terms are wrong: both take away",
                 value(lambda v: (v.inner + v.mean + v.n * v.along) * v.scale)),
                ("it is divided by variance + eps, not by its root",
                 value(lambda v: (v.inner - v.mean - v.n * v.along) * v.scale**2)),
            ],
            f"the gradient of x is not what autograd finds (with eps={eps:g})",
        )
