"""Checks for chapter 05: the bends, and the layer around them."""

import copy
import math

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

# The bends

GRID = torch.linspace(-6, 6, 121, dtype=torch.float64)  # 0 is in it
C, ROOT = 0.044715, math.sqrt(2 / math.pi)


def phi(x):
    """The chance that a standard normal number is below x."""
    return 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def density(x):
    return torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def tanh_form(x, *, c=C, root=ROOT, power=3):
    """The approximation of GELU, right or with one change."""
    return 0.5 * x * (1 + torch.tanh(root * (x + c * x**power)))


# Names of other bends: the hint says which one came out.
BENDS = {
    "ReLU": torch.relu,
    "the exact GELU": F.gelu,
    "the tanh approximation of GELU": tanh_form,
    "SiLU, x · sigmoid(x)": F.silu,
    "the quick GELU, x · sigmoid(1.702 x)": lambda x: x * torch.sigmoid(1.702 * x),
    "tanh": torch.tanh,
    "the sigmoid": torch.sigmoid,
    "ELU": F.elu,
    "SELU": F.selu,
    "softplus": F.softplus,
    "Mish": F.mish,
    "a leaky ReLU (slope 0.01 below zero)": F.leaky_relu,
    "a leaky ReLU (slope 0.1 below zero)": lambda x: F.leaky_relu(x, 0.1),
    "a leaky ReLU (slope 0.2 below zero)": lambda x: F.leaky_relu(x, 0.2),
    "ReLU6: cut off above 6, or at another number": F.relu6,
    "the squared ReLU": lambda x: torch.relu(x).square(),
    "erf(x)": torch.erf,
    "x as it is: nothing bends": lambda x: x,
}


def bend_causes(but, x=GRID):
    """Other bends than the one that was asked for."""
    return [
        (f"this is {name}", lambda bend=bend: bend(x))
        for name, bend in BENDS.items() if name != but
    ]


def expect_bend(function, wanted, causes, otherwise):
    """Compare a bend on a grid, in float64 and then in float32."""
    given = GRID.float()
    out = function(given)
    expect_own(out, given)
    explain(out, wanted, causes, otherwise)
    explain(
        function(GRID.clone()), wanted, causes,
        "in float64 it is right to five digits only: a constant is typed with too few "
        "digits, or a part of it is computed in float32. Write math.sqrt(2) and math.pi",
        tolerance=1e-7,
    )


def expect_own(out, given):
    """Refuse an output that is the input, changed in place."""
    expect(
        not isinstance(out, torch.Tensor) or out.numel() == 0
        or out.data_ptr() != given.data_ptr(),
        "it returns the very tensor that it was given: the input was changed in place, "
        "and whoever passed it has lost it. Look for +=, x[...] = … or a method whose "
        "name ends in _",
    )


def expect_everywhere(function, reference):
    """Refuse a bend that knows one shape or dtype only, or has a wrong slope."""
    for shape in ((), (1,), (2, 3, 4), (0, 3)):
        x = sample(24, seed=1)[:math.prod(shape)].view(shape)
        out = function(x.clone())
        expect_tensor(out, shape)
        row = function(x.flatten().clone())
        expect_tensor(row, (x.numel(),))
        expect(
            near(out, row.view(shape)) and (
                x.numel() == 0 or near(row[-1:], function(x.flatten()[-1:].clone()))),
            f"in the shape {shape} a number gives something else than in a row, or than "
            "alone: a bend treats each number alone, whatever the axes",
        )
    for dtype in (torch.float64, torch.bfloat16):
        expect_tensor(function(sample(5, seed=2).to(dtype)), (5,), dtype)
    x = (GRID + 0.013).requires_grad_()
    out = function(x)
    expect(
        out.requires_grad,
        "no gradient flows back: look for .detach(), .data, .item() or torch.tensor(…)",
    )
    if not near(out, reference(x), 1e-7):
        raise Skip("the values differ already; mend the row above first")
    got, = torch.autograd.grad(out.sum(), x)
    again = (GRID + 0.013).requires_grad_()
    wanted, = torch.autograd.grad(reference(again).sum(), again)
    expect(
        near(got, wanted, 1e-6),
        "the values are right, but their slopes are not: a part of the way back is cut "
        "off by .detach(), .data or torch.no_grad()",
    )
    out = function(torch.tensor([-1e4, -60.0, 60.0, 1e4]))
    expect(
        near(out, torch.tensor([0.0, 0.0, 60.0, 1e4])),
        "far from zero it goes wrong (overflow, or 0 · infinity): at -10,000 it must be "
        f"0 and at 10,000 that same number, but it gives {out.tolist()}",
    )


relu_battery = Battery("relu", "relu(x) -> like x", chapter=5, takes=("x",))


@relu_battery.property("keeps what is above zero, and gives 0 below")
def relu_values(function):
    causes = bend_causes("ReLU")
    causes += [
        ("the negative side is kept and the positive side lost: min and max have "
         "changed places", lambda: GRID.clamp(max=0)),
        ("it is the absolute value: below zero it must be 0, not -x", GRID.abs),
        ("the sign is wrong: below zero it must be 0", lambda: -GRID.clamp(max=0)),
        ("it gives 1 above zero, the slope of ReLU: the number itself must pass",
         lambda: (GRID > 0).double()),
        ("it is cut off above as well", lambda: GRID.clamp(0, 1)),
        ("the bend is at 1, not at 0: numbers below 1 are lost too",
         lambda: GRID * (GRID >= 1)),
        ("below the bend it gives 1, not 0", lambda: GRID.clamp(min=1)),
        ("it bends at the mean of the numbers: each number must be treated alone",
         lambda: (GRID - GRID.mean()).clamp(min=0)),
    ]
    expect_bend(function, GRID.clamp(min=0), causes,
                f"for [-2, -0.5, 0, 0.5, 2] it must give [0, 0, 0, 0.5, 2], but it gives "
                f"{shown(function)}")


def shown(function):
    """What a function gives for five numbers, in short."""
    try:
        out = function(torch.tensor([-2.0, -0.5, 0.0, 0.5, 2.0]))
        return [round(v, 3) for v in out.tolist()]
    except Exception:
        return "nothing"


@relu_battery.property("for any shape and dtype, slopes too")
def relu_everywhere(function):
    expect_everywhere(function, torch.relu)


gelu_battery = Battery("gelu", "gelu(x) -> like x", chapter=5, takes=("x",))


@gelu_battery.property("is x times the chance Φ(x), exactly")
def gelu_values(function):
    x = GRID
    causes = [
        ("this is the tanh approximation: the exact GELU takes erf, and differs by up "
         "to half a thousandth", lambda: tanh_form(x)),
        ("this is the quick GELU, x · sigmoid(1.702 x), an approximation: take erf",
         lambda: x * torch.sigmoid(1.702 * x)),
        ("this is SiLU, x · sigmoid(x): GELU takes the normal distribution's Φ",
         lambda: F.silu(x)),
        ("erf is taken of x: it must be erf(x / √2)",
         lambda: x * 0.5 * (1 + torch.erf(x))),
        ("erf is taken of x / 2: it must be erf(x / √2)",
         lambda: x * 0.5 * (1 + torch.erf(x / 2))),
        ("erf is taken of x · √2: divide, erf(x / √2)",
         lambda: x * 0.5 * (1 + torch.erf(x * math.sqrt(2)))),
        ("erf is taken of x / √π: it must be erf(x / √2)",
         lambda: x * 0.5 * (1 + torch.erf(x / math.sqrt(math.pi)))),
        ("the ½ is missing, so everything is twice as large", lambda: 2 * x * phi(x)),
        ("the 1 of 1 + erf is missing", lambda: x * 0.5 * torch.erf(x / math.sqrt(2))),
        ("the 1 of 1 + erf is missing, and the ½ too",
         lambda: x * torch.erf(x / math.sqrt(2))),
        ("the factor x is missing: this is Φ(x) alone", lambda: phi(x)),
        ("the brackets are wrong: x · ½ · 1 + erf(…)",
         lambda: x * 0.5 + torch.erf(x / math.sqrt(2))),
        ("the brackets are wrong: ½ · x is added to erf instead of multiplied by 1 + erf",
         lambda: 0.5 * (x + torch.erf(x / math.sqrt(2)))),
        ("the sign inside erf is wrong (or erfc is taken in place of erf): this is "
         "x · Φ(-x)", lambda: x * phi(-x)),
        ("x is multiplied by the height of the normal curve at x, not by the area below "
         "it: the density is not Φ", lambda: x * density(x)),
        ("this is the slope of GELU", lambda: phi(x) + x * density(x)),
        ("the sign is wrong", lambda: -x * phi(x)),
        ("tanh is taken in place of erf, without the constants of the approximation",
         lambda: x * 0.5 * (1 + torch.tanh(x / math.sqrt(2)))),
        ("tanh is taken in place of erf, without the constants of the approximation",
         lambda: x * 0.5 * (1 + torch.tanh(x))),
        ("this is the tanh approximation without its cubic term",
         lambda: tanh_form(x, c=0)),
        *bend_causes("the exact GELU"),
    ]
    expect_bend(
        function, x * phi(x), causes,
        "it is not x · ½ · (1 + erf(x / √2)): for [-2, -0.5, 0, 0.5, 2] it must give "
        f"[-0.046, -0.154, 0, 0.346, 1.954], but it gives {shown(function)}",
    )


@gelu_battery.property("for any shape and dtype, slopes too")
def gelu_everywhere(function):
    expect_everywhere(function, F.gelu)


tanh_battery = Battery("gelu_tanh", "gelu_tanh(x) -> like x", chapter=5, takes=("x",))


@tanh_battery.property("is the approximation by tanh")
def tanh_values(function):
    x = GRID
    causes = [
        ("this is the exact GELU: the approximation takes tanh, not erf", lambda: F.gelu(x)),
        ("this is the other approximation, x · sigmoid(1.702 x)",
         lambda: x * torch.sigmoid(1.702 * x)),
        ("the cubic term 0.044715 x³ is missing", lambda: tanh_form(x, c=0)),
        ("the cubic term is a square: x³, not x²", lambda: tanh_form(x, power=2)),
        ("the cubic term has no coefficient: 0.044715 x³", lambda: tanh_form(x, c=1)),
        ("a zero is missing in the coefficient: 0.044715", lambda: tanh_form(x, c=0.44715)),
        ("a zero too many in the coefficient: 0.044715", lambda: tanh_form(x, c=0.0044715)),
        ("a digit of the coefficient is missing or wrong: 0.044715",
         lambda: tanh_form(x, c=0.04715)),
        ("a digit of the coefficient is missing or wrong: 0.044715",
         lambda: tanh_form(x, c=0.04475)),
        ("the coefficient is rounded: 0.044715", lambda: tanh_form(x, c=0.0447)),
        ("the coefficient is rounded: 0.044715", lambda: tanh_form(x, c=0.045)),
        ("the cubic term is subtracted: add it", lambda: tanh_form(x, c=-C)),
        ("the factor √(2/π) is missing", lambda: tanh_form(x, root=1)),
        ("the factor is √(2/π), not √(π/2): upside down",
         lambda: tanh_form(x, root=math.sqrt(math.pi / 2))),
        ("the factor is √(2/π), not 2/π: the root is missing",
         lambda: tanh_form(x, root=2 / math.pi)),
        ("the factor is √(2/π), not √2/π: the root goes over both",
         lambda: tanh_form(x, root=math.sqrt(2) / math.pi)),
        ("the factor is √(2/π), not 2/√π", lambda: tanh_form(x, root=2 / math.sqrt(math.pi))),
        ("the factor is √(2/π), not 1/√2", lambda: tanh_form(x, root=1 / math.sqrt(2))),
        ("the factor is √(2/π), not √(2π)", lambda: tanh_form(x, root=math.sqrt(2 * math.pi))),
        ("the factor √(2/π) goes with x only: it multiplies the cubic term as well",
         lambda: 0.5 * x * (1 + torch.tanh(ROOT * x + C * x**3))),
        ("the factor √(2/π) goes with the cubic term only: it multiplies x as well",
         lambda: 0.5 * x * (1 + torch.tanh(x + ROOT * C * x**3))),
        ("the coefficient is inside the cube: 0.044715 · x³, not (0.044715 x)³",
         lambda: 0.5 * x * (1 + torch.tanh(ROOT * (x + (C * x)**3)))),
        ("the factor √(2/π) stands outside tanh",
         lambda: 0.5 * x * (1 + ROOT * torch.tanh(x + C * x**3))),
        ("the ½ is missing, so everything is twice as large", lambda: 2 * tanh_form(x)),
        ("the 1 of 1 + tanh is missing",
         lambda: 0.5 * x * torch.tanh(ROOT * (x + C * x**3))),
        ("the factor x is missing",
         lambda: 0.5 * (1 + torch.tanh(ROOT * (x + C * x**3)))),
        ("a sigmoid stands where ½ (1 + tanh) belongs: with a sigmoid what is inside "
         "must be doubled", lambda: x * torch.sigmoid(ROOT * (x + C * x**3))),
        ("a sigmoid stands in place of tanh",
         lambda: 0.5 * x * (1 + torch.sigmoid(ROOT * (x + C * x**3)))),
        ("erf stands in place of tanh",
         lambda: 0.5 * x * (1 + torch.erf(ROOT * (x + C * x**3)))),
        ("the sign is wrong inside tanh",
         lambda: 0.5 * x * (1 - torch.tanh(ROOT * (x + C * x**3)))),
        *bend_causes("the tanh approximation of GELU"),
    ]
    expect_bend(
        function, tanh_form(x), causes,
        "it is not x · ½ · (1 + tanh(√(2/π) (x + 0.044715 x³))): for [-2, -0.5, 0, 0.5, 2] "
        f"it must give [-0.045, -0.154, 0, 0.346, 1.955], but it gives {shown(function)}",
    )


@tanh_battery.property("for any shape and dtype, slopes too")
def tanh_everywhere(function):
    expect_everywhere(function, lambda x: F.gelu(x, approximate="tanh"))


# FeedForward

ffn = Battery(
    "FeedForward", "FeedForward(*, d_model, d_ff, activation=gelu), called with (x)",
    chapter=5, makes=("d_model", "d_ff", "activation"), takes=("x",),
)
D, H = 6, 10  # d_model, d_ff
X = sample(3, 4, D, seed=3)


def bend(x):
    """A bend of our own, unlike any that a reader would choose."""
    return torch.sin(1.3 * x) + 0.4 * x


IS_FUNCTION = (
    "activation is a function from tensor to tensor: keep it as it is and call it on the "
    "hidden units. It is no class to be made (nn.GELU without brackets) and no name. "
)


def build(layer, activation=None):
    """Make the reader's layer, with our bend or its default."""
    named = {} if activation is None else {"activation": activation}
    try:
        return layer.make(d_model=D, d_ff=H, **named)
    except Broke as broke:
        if activation is None:
            raise
        layer.make(d_model=D, d_ff=H)  # where the default works, it is the activation
        raise Wrong(IS_FUNCTION + f"It {broke}") from None


def apply(layer, module, x):
    """Call the reader's layer under watch; expect a tensor like x."""
    given = x.clone()
    try:
        out = layer.run(module, given)
    except Broke as broke:
        if "mat1 and mat2" in str(broke) or "normalized_shape" in str(broke):
            sizes = [(m.in_features, m.out_features) for m in module.modules()
                     if isinstance(m, nn.Linear)]
            if sizes and sizes[0][0] != x.shape[-1]:
                raise Wrong(
                    "its first Linear does not take vectors of d_model numbers: are the "
                    "two swapped? The first goes from d_model to d_ff, the second back; "
                    f"nn.Linear takes (in, out), and here they are {sizes}. It {broke}"
                ) from None
            if len(sizes) > 1 and sizes[0][1] != sizes[1][0]:
                raise Wrong(
                    "the second Linear does not take what the first one gives: the "
                    f"first goes from d_model to d_ff, the second back; here they are "
                    f"{sizes}. It {broke}"
                ) from None
        if isinstance(layer.last_error, TypeError) and any(
            words in str(broke) for words in (
                "not callable", "required positional argument", "must be Tensor, not")
        ):
            raise Wrong(IS_FUNCTION + f"It {broke}") from None
        raise
    expect(
        not isinstance(out, tuple), "it returns more than one thing: return x alone"
    )
    if isinstance(out, torch.Tensor) and out.shape[-1:] == (H,) and out.ndim == x.ndim:
        raise Wrong(
            f"the output is d_ff = {H} wide: the second layer, which brings it back to "
            f"d_model = {D}, is not applied (or its sizes are wrong)"
        )
    expect_own(out, given)
    if isinstance(out, torch.Tensor) and x.ndim > 2 and out.shape == (
        x[..., 0].numel(), x.shape[-1]
    ):
        raise Wrong(
            f"the axes in front are flattened and stay flat: {tuple(x.shape)} came in, "
            f"{tuple(out.shape)} comes out. A Linear takes any axes in front as they are"
        )
    expect_tensor(out, x.shape)
    return out


def weights_of(module):
    """Read (w1, b1, w2, b2) off a module, in every way that fits; biases may be None."""
    matrices, vectors = [], []
    for p in module.parameters():
        value = p.detach().clone().double()
        if value.ndim > 2:  # a convolution of width 1
            value = value.squeeze(-1) if value.shape[-1] == 1 else value
        (matrices if value.ndim == 2 else vectors).append(value)
    if len(matrices) != 2:
        return
    b1 = next((v for v in vectors if v.shape == (H,)), None)
    b2 = next((v for v in vectors if v.shape == (D,)), None)
    for first, second in (matrices, matrices[::-1]):
        first = first if first.shape == (H, D) else first.T
        second = second if second.shape == (D, H) else second.T
        if first.shape == (H, D) and second.shape == (D, H):
            yield first, b1, second, b2


def forward(p, x, f=bend, *, between=None, after=None, before=None):
    """The layer in float64, right or with one change."""
    w1, b1, w2, b2 = p
    x = x.double()
    x = before(x) if before else x
    hidden = x @ w1.T + (0 if b1 is None else b1)
    hidden = f(hidden) if f else hidden
    hidden = between(hidden) if between else hidden
    out = hidden @ w2.T + (0 if b2 is None else b2)
    return after(out) if after else out


def layer_causes(p, x, f, default=False):
    """What wrong layers give; p is one reading of the parameters."""
    w1, b1, w2, b2 = p

    def norm(t):
        return F.layer_norm(t, t.shape[-1:])

    def add(hint, value):
        causes.append((hint, value))

    causes = []
    where = "" if default else (
        ". (The activation that was passed must be used)")
    add("there is no activation: without a bend the two matrices melt into one",
        lambda: forward(p, x, None))
    add("the activation comes after the second layer: it belongs between the two",
        lambda: forward(p, x, None, after=f))
    add("the activation comes after the second layer as well: the last step is linear, "
        "so that the output can have any sign", lambda: forward(p, x, f, after=f))
    add("the activation comes before the first layer: it belongs between the two",
        lambda: forward(p, x, None, before=f))
    add("the activation comes before the first layer as well: it belongs between the "
        "two", lambda: forward(p, x, f, before=f))
    add("the activation is applied twice", lambda: forward(p, x, f, between=f))
    if not default:
        for name, other in BENDS.items():
            add(f"the activation that was passed is not used: this is {name}",
                lambda other=other: forward(p, x, other))
    else:
        for name, other in BENDS.items():
            add(f"the default activation is {name}, but it must be the exact GELU",
                lambda other=other: forward(p, x, other))
    for name, g in (("", f), (" And there is no activation.", None)):
        add("the residual is inside (x + …): it belongs to the encoder layer, which "
            "adds it once more." + name, lambda g=g: x.double() + forward(p, x, g))
    add("a norm is applied to the output: it belongs to the encoder layer",
        lambda: forward(p, x, f, after=norm))
    add("residual and norm are inside: they belong to the encoder layer",
        lambda: norm(x.double() + forward(p, x, f)))
    add("residual and norm are inside: they belong to the encoder layer",
        lambda: x.double() + forward(p, x, f, before=norm))
    add("a norm is applied to the input: it belongs to the encoder layer",
        lambda: forward(p, x, f, before=norm))
    add("a norm is applied to the hidden units" + where,
        lambda: forward(p, x, f, between=norm))
    add("a softmax is applied to the hidden units",
        lambda: forward(p, x, f, between=lambda t: t.softmax(-1)))
    add("the bias of the first layer is not added",
        lambda: forward((w1, None, w2, b2), x, f))
    add("the bias of the second layer is not added",
        lambda: forward((w1, b1, w2, None), x, f))
    add("the biases are not added", lambda: forward((w1, None, w2, None), x, f))
    if b1 is not None:
        add("the bias of the first layer is added after the activation, not before it",
            lambda: forward((w1, None, w2, b2), x, f, between=lambda t: t + b1))
        add("the bias of the first layer is subtracted",
            lambda: forward((w1, -b1, w2, b2), x, f))
    if b2 is not None:
        add("the bias of the second layer is added twice",
            lambda: forward(p, x, f) + b2)
    add("the hidden units are multiplied by the root of d_model",
        lambda: forward(p, x, f, between=lambda t: t * math.sqrt(D)))
    add("the hidden units are divided by the root of d_ff",
        lambda: forward(p, x, f, between=lambda t: t / math.sqrt(H)))
    add("the tokens of a text are averaged: each token is treated alone",
        lambda: forward(p, x, f).mean(-2, keepdim=True).expand(x.shape))
    add("the hidden units are averaged over the tokens: each token is treated alone",
        lambda: forward(p, x, f, between=lambda t: t.mean(-2, keepdim=True).expand_as(t)))
    add("the activation's result is multiplied by what went into it (a gate): the layer "
        "takes f(hidden) alone",
        lambda: forward(p, x, lambda t: t * f(t)))
    add("negative outputs are cut off", lambda: forward(p, x, f, after=torch.relu))
    add("the output is squashed by tanh", lambda: forward(p, x, f, after=torch.tanh))
    add("the output is multiplied by the input", lambda: forward(p, x, f) * x.double())
    add("an nn.Linear's weight is used without its transpose, or regrouped by a view",
        lambda: bend(x.double() @ w1.reshape(D, H) + (0 if b1 is None else b1))
        @ w2.reshape(H, D) + (0 if b2 is None else b2))
    return causes


@ffn.property("can be made and called: x's shape comes out, whatever its axes")
def ffn_shape(layer):
    module = build(layer).eval()
    out = apply(layer, module, X)
    expect(
        out.dtype == torch.float32,
        f"the output of a float32 layer must be float32, but it is {out.dtype}",
    )
    for shape in ((1, 1, D), (D,), (4, D), (2, 3, 5, D), (2, 0, D)):
        try:
            out = apply(layer, module, sample(*shape, seed=4))
        except Broke as broke:
            raise Wrong(
                f"it works for (batch, seq_len, d_model), but not for {shape}: count the "
                f"axes from the end, and don't unpack x.shape. It {broke}"
            ) from None
    out, across = apply(layer, module, X), X.transpose(0, 1)  # not contiguous
    if near(apply(layer, module, X), out):  # chance is for a later row
        expect(
            near(apply(layer, module, across), out.transpose(0, 1)),
            "numbers of different tokens are mixed: look for a view or a reshape that "
            "does not keep the last axis, or for a mean along the tokens",
        )


@ffn.property("has two matrices and two biases, all registered")
def ffn_parameters(layer):
    module = build(layer)
    count = sum(p.numel() for p in module.parameters())
    wanted = 2 * D * H + H + D
    norms = [m for m in module.modules()
             if isinstance(m, (nn.LayerNorm, nn.BatchNorm1d, nn.RMSNorm))]
    expect(
        not norms,
        "it holds a norm: norm and residual belong to the encoder layer around it",
    )
    wide = 4 * D
    hints = {
        0: "it has no parameters: the two Linear layers must be attributes of the "
           "module, not kept in a plain list or dict or made in forward",
        wanted - H - D: "the layers have no biases: they need them (bias=True)",
        wanted - H: "the first layer has no bias (bias=True)",
        wanted - D: "the second layer has no bias (bias=True)",
        wanted - D * H: "the two layers share one matrix: each has its own",
        wanted - D * H - D: "the second layer is missing, or is not registered",
        wanted - D * H - H: "the first layer is missing, or is not registered",
        D * H + H: "the second layer is missing, or is not registered",
        wanted + D * H: "it has a third matrix (a gate?): the layer has two",
        wanted + D * H + H: "it has a third layer (a gate?): the layer has two",
        wanted + H * H + H: "it has a third layer, from d_ff to d_ff: the layer has two",
        wanted + D * D + D: "it has a third layer, from d_model to d_model: two are all",
        2 * D * wide + wide + D: "d_ff is ignored: the hidden width is always 4 · d_model",
        2 * (D * D + D): "d_ff is ignored: the hidden width is d_model",
        2 * H * H + 2 * H: "d_model and d_ff are mixed up in the sizes",
        wanted + 2 * D: "it has 2 · d_model numbers too many: a norm? It belongs to the "
                        "encoder layer",
    }
    expect(count == wanted, hints.get(
        count,
        f"d_model={D} and d_ff={H} need two matrices and two biases, {wanted} numbers, "
        f"but it has {count}",
    ))
    frozen = [n for n, p in module.named_parameters() if not p.requires_grad]
    expect(not frozen, f"{frozen} are not trained: their requires_grad is False")


def readings(layer, activation=bend):
    """A scrambled layer and the readings of its parameters."""
    module = scramble(build(layer, activation), seed=6, size=0.6).eval()
    found = list(weights_of(module))
    if not found:
        raise Skip(
            "the numbers cannot be compared: no two matrices (d_ff, d_model) and "
            "(d_model, d_ff) were found; look at the row above"
        )
    return module, found


def expect_layer(layer, module, found, f, default=False):
    """Compare with the formula for any reading of the parameters."""
    out = apply(layer, module, X)
    wanted = [forward(p, X, f) for p in found]
    if any(near(out, w) for w in wanted):
        return
    columns = torch.stack([X.double().flatten(), wanted[0].flatten()], dim=1)
    target = out.detach().double().flatten()[:, None]
    fit = torch.linalg.lstsq(columns, target)[0]
    a, b = fit.flatten().tolist()
    explain(
        out, wanted[0],
        [c for p in found for c in layer_causes(p, X, f, default)],
        f"the output is {b:.3g} times what the formula gives plus {a:.3g} times x: it "
        "must be the formula alone" if near(columns @ fit, target, 1e-4) else
        "with its own weights it does not give W₂ f(W₁ x + b₁) + b₂. Compare step by step "
        "on one token: hidden, bent, output",
    )


@ffn.property("is W₂ f(W₁ x + b₁) + b₂ with the activation that was passed")
def ffn_formula(layer):
    if "activation" in layer.lacks:
        raise Wrong(
            "it takes no activation: it is a function that the layer is given. The "
            "expected signature is " + ffn.signature
        )
    module, found = readings(layer)
    expect_layer(layer, module, found, bend)
    for other in (nn.Tanh(), torch.relu):
        module = scramble(build(layer, other), seed=7, size=0.6).eval()
        found = list(weights_of(module))
        expect_layer(layer, module, found, other)


@ffn.property("without an activation passed, the bend is the exact GELU")
def ffn_default(layer):
    module, found = readings(layer, None)
    expect_layer(layer, module, found, F.gelu, default=True)


@ffn.property("treats each token alone")
def ffn_alone(layer):
    module, _ = readings(layer)
    out = apply(layer, module, X)
    changed = X.clone()
    changed[-1, -1] += 1.0
    moved = (apply(layer, module, changed) - out).abs().amax(-1) > 1e-5
    own = moved[-1, -1].item()
    moved[-1, -1] = False
    expect(
        not moved[:-1].any(),
        "a token in one text changes the output of another text: an axis is mixed up "
        "with the batch, or something is averaged over it",
    )
    expect(
        not moved.any(),
        "a changed token changes the outputs of other tokens of its text: look for a "
        "mean, a softmax or a norm along the tokens, a transpose, or a view",
    )
    expect(own, "a changed token does not change its own output")
    expect(
        near(apply(layer, module, X[1:2, 2:3]), out[1:2, 2:3])
        and near(apply(layer, module, X.flip(1)), out.flip(1))
        and near(apply(layer, module, X.flip(0)), out.flip(0)),
        "a token's output depends on where it stands or who is with it: each token must "
        "be treated alone",
    )


@ffn.property("holds no chance: no dropout inside")
def ffn_chance(layer):
    module, _ = readings(layer)
    many = X[:1, :1].expand(8, 40, D)
    quiet = apply(layer, module.eval(), many)
    expect(
        near(quiet, apply(layer, module, many)) and near(
            quiet, quiet[:1, :1].expand_as(quiet)),
        "in evaluation the same token gives another answer each time: dropout is active "
        "there (F.dropout has training=True as its default). And here it has no place: "
        "the encoder layer drops out what this layer adds",
    )
    expect(
        near(apply(layer, module.train(), many), quiet),
        "in training something is dropped: dropout inside the layer is not what the "
        "book builds. The encoder layer drops out what this layer adds, and twice is "
        "too much",
    )


@ffn.property("learns: gradients reach every parameter and the input")
def ffn_learning(layer):
    module, found = readings(layer)
    expect_learning(layer, module, module, X)
    out = apply(layer, module, X)
    p = next((p for p in found if near(out, forward(p, X))), None)
    if p is None:
        raise Skip("the outputs differ already; mend that first")
    x, leaf = X.clone().requires_grad_(), X.double().requires_grad_()
    tilt = sample(*X.shape, seed=9)
    mine, = torch.autograd.grad((layer.run(module, x) * tilt).sum(), x)
    wanted, = torch.autograd.grad((forward(p, leaf) * tilt).sum(), leaf)
    expect(
        near(mine, wanted, 1e-4),
        "the outputs are right, but the gradients are not: part of the way back is cut "
        "off by .detach() or .data",
    )


@ffn.property("moves to other devices and dtypes")
def ffn_moves(layer):
    expect_to_move(layer, lambda: build(layer), X)
    half = build(layer).to(torch.bfloat16)
    out = layer.run(half, X.to(torch.bfloat16))
    expect_tensor(out, X.shape, torch.bfloat16)


@ffn.property("two layers are drawn apart, and restored by load_state_dict")
def ffn_saved(layer):
    module, other = build(layer).eval(), build(layer).eval()
    expect(
        not near(apply(layer, module, X), apply(layer, other, X)),
        "two new layers are the same: weights are filled with a constant, a seed is set "
        "inside, or both share one tensor",
    )
    state = {k: v.clone() for k, v in module.state_dict().items()}
    layer.run(other.load_state_dict, state)
    expect(
        near(apply(layer, module, X), apply(layer, other, X)),
        "a new layer that loads the state_dict of the old one gives something else: part "
        "of what it computes with is not saved",
    )


@ffn.property("refuses vectors of another width")
def ffn_refuses(layer):
    module = build(layer).eval()
    apply(layer, module, X)
    for width in (5, 1, H, 2 * D):
        try:
            layer.run(module, sample(2, 3, width))
        except Broke:
            continue
        raise Wrong(
            f"x of the shape (2, 3, {width}) must be refused by a ValueError when "
            f"d_model is {D}, but it goes through: look for lazy layers, a view, or "
            "broadcasting"
        )


# Exercises


class Stub(nn.Module):
    """A feed-forward layer of ours, for exercises that are given one."""

    def __init__(self, d_model, d_ff, activation):
        super().__init__()
        self.expand = nn.Linear(d_model, d_ff)
        self.contract = nn.Linear(d_ff, d_model)
        self.activation = activation

    def forward(self, x):
        return self.contract(self.activation(self.expand(x)))


dead = Battery(
    "dead_units", "dead_units(layer, x) -> silent, untaught (two whole numbers)",
    chapter=5, takes=("layer", "x"),
)


def halting(activation):
    """A layer with silent units, half-silent ones and busy ones, and its tokens."""
    layer = scramble(Stub(4, 9, activation), seed=10, size=0.3)
    with torch.no_grad():
        layer.expand.bias.copy_(torch.tensor([-4.5, -4.5, -4.5, 0, 0, 0, 0, 0, 9]))
    return layer, sample(2, 30, 4, seed=11)


@dead.property("counts silent units, and those that learn nothing")
def dead_right(function):
    for activation, wanted in ((torch.relu, (3, 3)), (F.gelu, (0, 0))):
        layer, x = halting(activation)
        result = function(layer, x)
        expect(
            isinstance(result, (tuple, list)) and len(result) == 2,
            "it must return two numbers: how many units are silent, and how many get no "
            "gradient",
        )
        silent, untaught = (int(v) for v in result)
        hidden = activation(layer.expand(x)).flatten(0, 1)
        sometimes = int((hidden == 0).any(0).sum())
        for wrong, hint in (
            (sometimes, "it counts units that are 0 for some token: silent means 0 for "
             "every token (all, along all axes but the last)"),
            (9 - wanted[0], "it counts the units that do speak"),
            (int((hidden == 0).sum()), "it counts numbers, not units: a unit is a column"),
            (int((hidden == 0).all(1).sum()), "it counts tokens whose units are all 0: "
             "look along the tokens, not along the units"),
            (int((layer.expand(x) < 0).flatten(0, 1).all(0).sum()),
             "it looks before the bend: with GELU a unit that is always negative is not "
             "0"),
        ):
            expect(silent == wanted[0] or silent != wrong, hint)
        expect(
            silent == wanted[0],
            f"with {activation.__name__} {wanted[0]} of 9 units are 0 for every token, but "
            f"it counts {silent}: is it after the activation?",
        )
        for wrong, hint in (
            (9 - wanted[1], "it counts the units that do get a gradient"),
            (9, "no unit gets a gradient: call backward before you look at "
             "layer.expand.weight.grad"),
        ):
            expect(untaught == wanted[1] or untaught != wrong, hint)
        expect(
            untaught == wanted[1],
            f"with {activation.__name__} the rows of expand.weight.grad that are all 0 "
            f"are {wanted[1]} of 9, but it counts {untaught}: GELU's slope is small below "
            "zero, and not 0",
        )


@dead.property("is not misled by gradients that were there before")
def dead_fresh(function):
    layer, x = halting(torch.relu)
    if tuple(int(v) for v in function(layer, x)) != (3, 3):
        raise Skip("the counts differ already; mend the row above first")
    layer(x).sum().backward()
    for p in layer.parameters():
        p.grad = torch.ones_like(p.grad)
    silent, untaught = (int(v) for v in function(layer, x))
    expect(
        (silent, untaught) == (3, 3),
        "gradients of an earlier backward are counted as well: backward adds to .grad. "
        "Set them to zero first, or use torch.autograd.grad",
    )


slope = Battery("gelu_slope", "gelu_slope(x) -> like x", chapter=5, takes=("x",))


@slope.property("is the slope of GELU")
def slope_right(function):
    x = GRID
    explain(
        function(x.clone()), phi(x) + x * density(x),
        [("the second term is missing: a product has two, and x Φ(x) gives "
          "Φ(x) + x Φ'(x)", lambda: phi(x)),
         ("the first term is missing: a product has two, and x Φ(x) gives "
          "Φ(x) + x Φ'(x)", lambda: x * density(x)),
         ("the slope of Φ is the normal density: the 1/√(2π) is missing",
          lambda: phi(x) + x * torch.exp(-x * x / 2)),
         ("the density is exp(-x²/2), with the 2 below",
          lambda: phi(x) + x * torch.exp(-x * x) / math.sqrt(2 * math.pi)),
         ("the density has 1/√(2π), not 1/√π (the √2 inside erf has a slope too)",
          lambda: phi(x) + x * torch.exp(-x * x / 2) / math.sqrt(math.pi)),
         ("the density is not multiplied by x", lambda: phi(x) + density(x)),
         ("the two terms must be added", lambda: phi(x) - x * density(x)),
         ("erf is taken of x: it must be erf(x / √2)",
          lambda: 0.5 * (1 + torch.erf(x)) + x * density(x)),
         ("this is GELU itself", lambda: x * phi(x)),
         ("this is the slope of ReLU", lambda: (x > 0).double())],
        "it is not Φ(x) + x · φ(x), where φ is the height of the normal curve",
        tolerance=1e-6,
    )
    expect(
        near(function(x.float()), phi(x) + x * density(x)),
        "in float64 it is right, and in float32 it is not: a difference of two near "
        "numbers (a difference quotient) loses its digits. Use the product rule",
    )


@slope.property("by a formula: it needs no graph")
def slope_plain(function):
    with torch.no_grad():
        try:
            out = function(torch.tensor([0.0, 1.0]))
        except Broke as broke:
            raise Wrong(
                "it asks autograd: write the slope down by the product rule, as a "
                f"formula of x. It {broke}"
            ) from None
    expect_tensor(out, (2,), torch.float32)
    expect(not out.requires_grad, "the slope itself need not require a gradient")


width = Battery(
    "widest_layer", "widest_layer(d_model, budget) -> a whole number", chapter=5,
    takes=("d_model", "budget"),
)


@width.property("is the widest d_ff that keeps to the budget")
def width_right(function):
    for d, budget in ((128, 66_048), (8, 1000), (1, 100), (10, 241), (10, 240), (7, 500)):
        got = function(d, budget)
        expect(got is not None, "it returns None: is there a return at the end?")
        expect(
            float(got) == int(got),
            f"a width is a whole number, but it gives {got}: round down",
        )
        got = int(got)
        wanted = (budget - d) // (2 * d + 1)
        for wrong, hint in (
            (wanted + 1, "that is one too wide: rounding up, or to the nearest, gives more "
             "parameters than the budget allows"),
            (budget // (2 * d + 1), "the bias of the second layer is forgotten: d_model "
             "numbers"),
            ((budget - d) // (2 * d), "the bias of the first layer is forgotten: d_ff "
             "numbers"),
            (budget // (2 * d), "the biases of the two layers are forgotten"),
            ((budget - d) // (d + 1), "the layer has two matrices: d_model · d_ff counts "
             "twice"),
            (budget // d, "the layer has two matrices: d_model · d_ff counts twice"),
            (2 * d, "twice d_model is the answer for attention's budget only"),
            (4 * d, "four times d_model is the usual width, whatever the budget"),
            (wanted - 1, "that is one too narrow: a layer that takes the whole budget "
             "keeps to it"),
        ):
            expect(got == wanted or got != wrong, hint)
        expect(
            got == wanted,
            f"for d_model={d}, d_ff={got} gives {2 * d * got + got + d:,} parameters of a "
            f"budget of {budget:,}: it must be as wide as possible without having more",
        )


memory = Battery(
    "build_memory", "build_memory(keys, values) -> a FeedForward", chapter=5,
    takes=("keys", "values"),
)


def unit_rows(n, d, seed):
    """n rows at right angles, of length 1."""
    return torch.linalg.qr(sample(d, n, seed=seed))[0].T


@memory.property("answers each key with its value")
def memory_right(function):
    for keys in (torch.eye(5)[:3], unit_rows(3, 5, 12)):
        values = sample(3, 5, seed=13)
        made = function(keys.clone(), values.clone())
        expect(callable(made), "it must return a layer that can be called")
        out = function.run(made, keys.clone())
        explain(
            out, values,
            [("keys and values have changed places: the rows of expand.weight are the "
              "keys", lambda keys=keys, values=values: (
                  (keys @ values.T).relu() @ keys)),
             ("nothing was stored: the matrices are not the given ones",
              lambda values=values: 0 * values),
             ("the activation is GELU: with relu a key passes whole",
              lambda keys=keys, values=values: F.gelu(keys @ keys.T) @ values)],
            "the answer to a key is not its value: the keys are the rows of "
            "expand.weight, the values the columns of contract.weight, and the biases 0",
        )
        if isinstance(made, nn.Module):
            count = sum(p.numel() for p in made.parameters())
            expect(
                count == 2 * 3 * 5 + 3 + 5,
                "three entries need d_ff = 3: a layer with two matrices of 3 × 5 numbers "
                f"and two biases has {2 * 3 * 5 + 3 + 5} parameters, but this has {count}",
            )


@memory.property("forgets what matches no key, and what points the other way")
def memory_other(function):
    keys, values = torch.eye(5)[:3], sample(3, 5, seed=13)
    made = function(keys.clone(), values.clone())
    out = function.run(made, torch.eye(5)[3:])
    expect(
        near(out, torch.zeros(2, 5)),
        "an input at right angles to every key must be answered by zeros: are both "
        "biases 0?",
    )
    expect(
        near(function.run(made, -keys), torch.zeros(3, 5)),
        "the opposite of a key must be answered by zeros: that is what relu is for",
    )
    expect(
        near(function.run(made, keys[:1] + keys[1:2]), values[:1] + values[1:2]),
        "two keys at once must be answered by both values",
    )


by_hand = Battery(
    "ffn_gradients",
    "ffn_gradients(x, w1, b1, w2, b2, slopes) -> gradients of x, w1, b1, w2, b2",
    chapter=5, takes=("x", "w1", "b1", "w2", "b2", "slopes"),
)


@by_hand.property("gives what autograd gives")
def by_hand_right(function):
    for n, d, h in ((5, 3, 7), (1, 4, 2)):
        x, slopes = sample(n, d, seed=14), sample(n, d, seed=15)
        w1, b1 = sample(h, d, seed=16), sample(h, seed=17)
        w2, b2 = sample(d, h, seed=18), sample(d, seed=19)
        leaves = [v.clone().requires_grad_() for v in (x, w1, b1, w2, b2)]
        lx, lw1, lb1, lw2, lb2 = leaves
        (torch.relu(lx @ lw1.T + lb1) @ lw2.T + lb2).backward(slopes)
        result = function(x, w1, b1, w2, b2, slopes)
        expect(
            isinstance(result, (tuple, list)) and len(result) == 5,
            "it must return five tensors, the gradients of x, w1, b1, w2, b2",
        )
        compare_gradients(result, leaves, x, w1, b1, w2, slopes)


def compare_gradients(result, leaves, x, w1, b1, w2, slopes):
    """Compare five gradients, the last layer's first: mistakes are passed down."""
    before = x @ w1.T + b1
    hidden, open_ = before.relu(), (before > 0).float()
    down = slopes @ w2
    through = down * open_
    no_gate = "the slope of ReLU is missing: where the hidden unit was cut off, nothing " \
        "comes back"
    mean = "the slopes are averaged over the tokens: they must be summed"
    causes = {
        "w2": [("the gradient of w2 is transposed", lambda: hidden.T @ slopes),
               ("w2's gradient is made with the hidden units before the bend: it was "
                "multiplied by what came out of relu", lambda: slopes.T @ before),
               (mean, lambda: slopes.T @ hidden / len(x))],
        "b2": [(mean, lambda: slopes.mean(0))],
        "w1": [(no_gate, lambda: down.T @ x),
               ("the gate is that of the slopes: ReLU lets through where the hidden unit "
                "was above zero, not where the slope is", lambda: down.relu().T @ x),
               (mean, lambda: through.T @ x / len(x)),
               ("the gate multiplies by the hidden unit, not by 0 or 1",
                lambda: (down * hidden).T @ x)],
        "b1": [(no_gate, lambda: down.sum(0)),
               ("the gate is that of the slopes: ReLU lets through where the hidden unit "
                "was above zero, not where the slope is", lambda: down.relu().sum(0)),
               (mean, lambda: through.mean(0)),
               ("the gate multiplies by the hidden unit, not by 0 or 1",
                lambda: (down * hidden).sum(0))],
        "x": [(no_gate, lambda: down @ w1),
              ("the gate multiplies by the hidden unit, not by 0 or 1",
               lambda: (down * hidden) @ w1)],
    }
    names = ("x", "w1", "b1", "w2", "b2")
    got = dict(zip(names, result, strict=True))
    for name in ("b2", "w2", "b1", "w1", "x"):
        leaf = leaves[names.index(name)]
        expect_tensor(got[name], what=f"the gradient of {name}")
        turned = got[name].T if got[name].ndim == 2 else got[name]
        expect(
            got[name].shape == leaf.shape or turned.shape != leaf.shape,
            f"the gradient of {name} is transposed: it must have the shape of {name}, "
            f"{tuple(leaf.shape)}",
        )
        expect_tensor(got[name], leaf.shape, what=f"the gradient of {name}")
        explain(
            got[name], leaf.grad, causes[name],
            f"the gradient of {name} is wrong, and those after it are right: go through "
            "the layer backwards, one step at a time",
        )


points = Battery(
    "through_points", "through_points(xs, ys) -> a FeedForward(d_model=1, …)", chapter=5,
    takes=("xs", "ys"),
)


@points.property("passes through every point")
def points_right(function):
    xs = torch.tensor([-2.0, -0.5, 0.0, 1.5, 4.0])
    ys = torch.tensor([1.0, 3.0, -1.0, -1.0, 2.0])
    made = function(xs.clone(), ys.clone())
    expect(callable(made), "it must return a layer that can be called")
    out = function.run(made, xs[:, None])
    expect_tensor(out, (5, 1), what="the layer's output")
    out = out[:, 0].detach()
    if near(out, ys, 1e-4):
        return
    steps = (ys[1:] - ys[:-1]) / (xs[1:] - xs[:-1])
    change = torch.cat([steps[:1], steps[1:] - steps[:-1]])
    bends = (xs[:, None] - xs[:-1]).relu()
    explain(
        out, ys,
        [("the start is missing: the last bias must be the first y",
          lambda: bends @ change),
         ("each unit must add the *change* of the slope at its point: before it the "
          "earlier units have given a slope already", lambda: ys[0] + bends @ steps),
         ("the steps are not divided by the distance of the points",
          lambda: ys[0] + bends @ torch.cat(
              [ys[1:2] - ys[:1], (ys[2:] - ys[1:-1]) - (ys[1:-1] - ys[:-2])])),
         ("the bends are at +x of each point: the bias of expand is -x",
          lambda: ys[0] + (xs[:, None] + xs[:-1]).relu() @ change),
         ("each unit bends one point too late: unit j bends at point j, the first at the "
          "first", lambda: ys[0] + (xs[:, None] - xs[1:]).relu() @ change),
         ("the activation is GELU, which rounds the corners: take relu",
          lambda: ys[0] + F.gelu(xs[:, None] - xs[:-1]) @ change)],
        f"at the xs {xs.tolist()} it gives {[round(v, 3) for v in out.tolist()]}, and "
        f"not the ys {ys.tolist()}",
        tolerance=1e-4,
    )


@points.property("is straight in between, with as many units as there are steps")
def points_between(function):
    xs, ys = torch.tensor([0.0, 1.0, 3.0]), torch.tensor([2.0, 0.0, 4.0])
    made = function(xs.clone(), ys.clone())
    out = function.run(made, torch.tensor([[0.5], [2.0], [2.5]]))
    expect(
        near(out[:, 0], torch.tensor([1.0, 2.0, 3.0]), 1e-4),
        "between two points it must run straight",
    )
    if isinstance(made, nn.Module):
        units = [p.numel() for p in made.parameters()]
        expect(
            sum(units) <= 3 * 3 + 1,
            "three points need two units (three at most): one for each step from point to "
            f"point. The layer has {sum(units)} parameters",
        )


experts = Battery(
    "MixtureOfExperts",
    "MixtureOfExperts(*, d_model, d_ff, num_experts), with the attributes router and "
    "experts, called with (x)",
    chapter=5, makes=("d_model", "d_ff", "num_experts"), takes=("x",),
)


def make_experts(layer):
    module = layer.make(d_model=D, d_ff=H, num_experts=3)
    for name in ("router", "experts"):
        expect(
            hasattr(module, name),
            f"it has no attribute {name}: router is an nn.Linear(d_model, num_experts), "
            "experts an nn.ModuleList of feed-forward layers",
        )
    expect(
        isinstance(module.experts, nn.ModuleList) and len(module.experts) == 3,
        "experts must be an nn.ModuleList of num_experts layers: a plain list hides "
        "their parameters from the optimizer",
    )
    return scramble(module, seed=20, size=0.7).eval()


@experts.property("gives each token to its best expert, times the chance of it")
def experts_right(layer):
    module = make_experts(layer)
    out = layer.run(module, X.clone())
    # Their own parts compute the reference: only the mixing is looked at.
    copied = copy.deepcopy(module)
    with torch.no_grad():
        scores = layer.run(copied.router, X)
        each = torch.stack([layer.run(e, X) for e in copied.experts], dim=-2)
    expect_tensor(scores, (3, 4, 3), what="what the router gives")
    chance, best = scores.softmax(-1), scores.argmax(-1)
    expect(len(best.unique()) == 3, "every token goes to the same expert")
    pick = F.one_hot(best, 3).float()
    explain(
        out, (each * (chance * pick)[..., None]).sum(-2),
        [("the expert's answer is not multiplied by the router's chance for it: so the "
          "router gets no gradient and never learns",
          lambda: (each * pick[..., None]).sum(-2)),
         ("all experts are mixed: only the best one of each token answers",
          lambda: (each * chance[..., None]).sum(-2)),
         ("the answer is multiplied by the score, not by its chance: a softmax is "
          "missing", lambda: (each * (scores * pick)[..., None]).sum(-2)),
         ("the softmax runs over the tokens: it must run over the experts",
          lambda: (each * (scores.softmax(-2) * pick)[..., None]).sum(-2)),
         ("the chance is a sigmoid of each score: the experts must compete, by a softmax",
          lambda: (each * (scores.sigmoid() * pick)[..., None]).sum(-2)),
         ("the token goes to its worst expert: argmax, not argmin",
          lambda: (each * (chance * F.one_hot(scores.argmin(-1), 3))[..., None]).sum(-2)),
         ("all tokens of a text go to one expert: each token has its own",
          lambda: (each * (chance * F.one_hot(
              scores.mean(1, keepdim=True).argmax(-1).expand(3, 4), 3))[..., None]).sum(-2)),
         ("all tokens of a text go to one expert: each token has its own",
          lambda: (each * (lambda c: c * F.one_hot(c.argmax(-1), 3))(
              scores.mean(1, keepdim=True).softmax(-1))[..., None]).sum(-2)),
         ("the residual is inside: it belongs to the encoder layer",
          lambda: X + (each * (chance * pick)[..., None]).sum(-2))],
        "a token's output is not chance[best] · experts[best](token), where chance is "
        "softmax(router(token))",
    )


@experts.property("an expert works on its own tokens only")
def experts_sparse(layer):
    module = make_experts(layer)
    rows = [0, 0, 0]
    for i, expert in enumerate(module.experts):
        def count(_module, inputs, _output, i=i):
            rows[i] += inputs[0].numel() // D
        expert.register_forward_hook(count)
    layer.run(module, X.clone())
    wanted = torch.bincount(module.router(X).argmax(-1).flatten(), minlength=3).tolist()
    expect(
        rows == wanted,
        f"of the 12 tokens the experts should see {wanted}, but they see {rows}: compute "
        "an expert on the tokens that were given to it, x[mask], and put its answers back "
        "in place. Otherwise nothing is saved",
    )


@experts.property("the router learns, and so do the experts")
def experts_learn(layer):
    module = make_experts(layer)
    expect_learning(layer, module, module, X)
