"""Mistakes with the bends and the feed-forward layer."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from emoformer.feedforward import FeedForward, gelu, relu
from tests.bank import mistake, right

RELU, GELU, TANH, FFN = "relu", "gelu", "gelu_tanh", "FeedForward"
COMPARE = "compare with `F.gelu` on a grid from -6 to 6"
PARITY = "compare with `nn.Sequential` on the same weights"
ALONE = "change one token: only its own output may move"

# relu


@mistake(RELU, "min and max changed", looks="`x.clamp(max=0)`",
         shows="the loss still falls, since the next layer turns the sign",
         find="print it for five numbers", hint="min and max have changed places")
def relu_max(x):
    return x.clamp(max=0)


@mistake(RELU, "in place", looks="`x[x < 0] = 0; return x`",
         shows="the layer before loses its numbers; backward complains, or not",
         find="clone the input before, compare after", hint="it changes its input")
def relu_in_place(x):
    y = x.detach() if not x.requires_grad else x
    if x.requires_grad:
        return torch.relu(x)
    y[y < 0] = 0
    return y


@mistake(RELU, "the slope instead of the number", looks="`(x > 0).float()`",
         shows="no gradient: nothing below learns", find="print it for five numbers",
         hint="the slope of ReLU")
def relu_step(x):
    return (x > 0).to(x.dtype)


@mistake(RELU, "leaky", looks="`torch.where(x > 0, x, 0.01 * x)`",
         shows="trains well; a model made with ReLU gives other answers",
         find="compare with `torch.relu`", hint="leaky ReLU (slope 0.01")
def relu_leaky(x):
    return torch.where(x > 0, x, 0.01 * x)


@right(RELU, "by where")
def relu_where(x):
    return torch.where(x > 0, x, torch.zeros_like(x))


@right(RELU, "by a product")
def relu_product(x):
    return x * (x > 0)


# gelu


@mistake(GELU, "tanh in place of the exact form",
         looks="`F.gelu(x, approximate=\"tanh\")`",
         shows="off by up to half a thousandth; a loaded BERT is off a little more a layer",
         find=COMPARE, hint="this is the tanh approximation")
def gelu_by_tanh(x):
    return F.gelu(x, approximate="tanh")


@mistake(GELU, "quick GELU", looks="`x * torch.sigmoid(1.702 * x)`",
         shows="off by up to 0.02", find=COMPARE, hint="quick GELU")
def gelu_quick(x):
    return x * torch.sigmoid(1.702 * x)


@mistake(GELU, "SiLU", looks="`x * torch.sigmoid(x)`",
         shows="trains as well; no checkpoint fits", find=COMPARE, hint="this is SiLU")
def gelu_silu(x):
    return x * torch.sigmoid(x)


@mistake(GELU, "erf without the root of 2", looks="`torch.erf(x)`",
         shows="a steeper bend; no checkpoint fits", find=COMPARE,
         hint="erf is taken of x: ")
def gelu_no_root(x):
    return x * 0.5 * (1 + torch.erf(x))


@mistake(GELU, "the half is missing", looks="`x * (1 + torch.erf(x / math.sqrt(2)))`",
         shows="everything twice as large, layer after layer", find="`gelu(10)` must be 10",
         hint="the ½ is missing")
def gelu_double(x):
    return x * (1 + torch.erf(x / math.sqrt(2)))


@mistake(GELU, "Φ without x", looks="`0.5 * (1 + torch.erf(…))`",
         shows="outputs between 0 and 1, whatever comes in", find="`gelu(10)` must be 10",
         hint="the factor x is missing")
def gelu_phi(x):
    return 0.5 * (1 + torch.erf(x / math.sqrt(2)))


@mistake(GELU, "ReLU", looks="`torch.relu(x)`",
         shows="dead units, and no checkpoint fits", find="`gelu(-1)` must be -0.159",
         hint="this is ReLU")
def gelu_relu(x):
    return torch.relu(x)


@mistake(GELU, "the density, not the area", looks="`x * Normal(0, 1).log_prob(x).exp()`",
         shows="large numbers vanish", find="`gelu(10)` must be 10",
         hint="the density is not Φ")
def gelu_density(x):
    return x * torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)


@mistake(GELU, "the root of 2 typed by hand", looks="`x / 1.414`",
         shows="right to three digits", find="compare in float64 at 1e-7",
         hint="too few digits")
def gelu_typed(x):
    return x * 0.5 * (1 + torch.erf(x / 1.41421))


@mistake(GELU, "cut off from the graph", looks="`torch.erf(x.detach() / math.sqrt(2))`",
         shows="right values, wrong slopes: trains worse, without an error",
         find="`torch.autograd.gradcheck`", hint="their slopes are not")
def gelu_detached(x):
    return x * 0.5 * (1 + torch.erf(x.detach() / math.sqrt(2)))


@mistake(GELU, "in float32 whatever comes in", looks="`x.float()`",
         shows="a bfloat16 model becomes float32 from here on, and slow",
         find="look at `gelu(x.double()).dtype`", hint="look for a conversion")
def gelu_float(x):
    return F.gelu(x.float()) if x.dtype == torch.bfloat16 else F.gelu(x)


@right(GELU, "by torch's normal distribution function")
def gelu_ndtr(x):
    return x * torch.special.ndtr(x)


@right(GELU, "by erfc")
def gelu_erfc(x):
    return x * torch.erfc(-x * 0.5**0.5) / 2


# gelu_tanh


@mistake(TANH, "a square for the cube", looks="`0.044715 * x**2`",
         shows="no longer symmetric; small errors everywhere", find=COMPARE,
         hint="the cubic term is a square")
def tanh_square(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**2)))


@mistake(TANH, "a digit lost", looks="`0.44715`",
         shows="errors of several hundredths around 1", find=COMPARE,
         hint="a zero is missing")
def tanh_digit(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.44715 * x**3)))


@mistake(TANH, "the root upside down", looks="`math.sqrt(math.pi / 2)`",
         shows="a steeper bend", find=COMPARE, hint="upside down")
def tanh_upside(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(math.pi / 2) * (x + 0.044715 * x**3)))


@mistake(TANH, "the root over one part", looks="`math.sqrt(2) / math.pi`",
         shows="a flatter bend", find=COMPARE, hint="the root goes over both")
def tanh_part(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2) / math.pi * (x + 0.044715 * x**3)))


@mistake(TANH, "brackets", looks="`math.sqrt(2 / math.pi) * x + 0.044715 * x**3`",
         shows="small errors around 2", find=COMPARE, hint="goes with x only")
def tanh_brackets(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * x + 0.044715 * x**3))


@mistake(TANH, "the exact form", looks="`F.gelu(x)`",
         shows="GPT-2's weights give slightly other answers",
         find="compare with `F.gelu(x, approximate=\"tanh\")`",
         hint="this is the exact GELU")
def tanh_exact(x):
    return F.gelu(x)


@right(TANH, "by a sigmoid, with what is inside doubled")
def tanh_sigmoid(x):
    return x * torch.sigmoid(2 * (2 / math.pi)**0.5 * x * (1 + 0.044715 * x * x))


# FeedForward


class Written(FeedForward):
    """Our layer in separate steps, each of which a mistake can replace."""

    def forward(self, x):
        if x.shape[-1] != self.expand.in_features:
            raise ValueError("width!")
        return self.finish(self.contract(self.hidden(x)))

    def hidden(self, x):
        return self.activation(self.expand(x))

    def finish(self, x):
        return x


right(FFN, "step by step")(Written)


@mistake(FFN, "no activation", looks="`self.contract(self.expand(x))`",
         shows="trains, and is no better than one matrix",
         find="twice the input minus the constant gives twice the output",
         hint="there is no activation")
class NoBend(Written):
    def hidden(self, x):
        return self.expand(x)


@mistake(FFN, "activation after the second layer",
         looks="`self.activation(self.contract(self.expand(x)))`",
         shows="the layer can add hardly anything negative", find=PARITY,
         hint="the activation comes after the second layer: ")
class BendLate(NoBend):
    def finish(self, x):
        return self.activation(x)


@mistake(FFN, "activation after both", looks="`nn.Sequential(a, f, b, f)`",
         shows="as above", find=PARITY, hint="after the second layer as well")
class BendTwice(Written):
    def finish(self, x):
        return self.activation(x)


@mistake(FFN, "the activation passed is ignored", looks="`F.gelu(self.expand(x))`",
         shows="`activation=relu` changes nothing, and no experiment says so",
         find="pass `torch.tanh` and compare", hint="the activation that was passed is not used")
class AlwaysGelu(Written):
    def hidden(self, x):
        return F.gelu(self.expand(x))


@mistake(FFN, "activation taken for a class", looks="`self.activation()(hidden)`",
         shows="works with `nn.GELU`, stops with any function", find="pass `torch.tanh`",
         hint="It is no class to be made")
class MadeInside(Written):
    def hidden(self, x):
        return self.activation()(self.expand(x))


@mistake(FFN, "ReLU as the default", looks="`activation=torch.relu`",
         shows="a loaded BERT is wrong", find=PARITY, hint="the default activation is ReLU")
class DefaultRelu(Written):
    def __init__(self, *, d_model, d_ff, activation=relu):
        super().__init__(d_model=d_model, d_ff=d_ff, activation=activation)


@mistake(FFN, "the tanh form as the default", looks="`nn.GELU(approximate=\"tanh\")`",
         shows="off in the fourth digit", find=PARITY,
         hint="the default activation is the tanh approximation")
class DefaultTanh(Written):
    def __init__(self, *, d_model, d_ff, activation=gelu_by_tanh):
        super().__init__(d_model=d_model, d_ff=d_ff, activation=activation)


@mistake(FFN, "residual inside", looks="`return x + self.contract(hidden)`",
         shows="the encoder layer adds it once more: x counts twice", find=PARITY,
         hint="the residual is inside")
class ResidualInside(Written):
    def forward(self, x):
        return x + super().forward(x)


@mistake(FFN, "dropout active in evaluation", looks="`F.dropout(hidden, 0.1)`",
         shows="two predictions for one text", find="call it twice in `eval()`",
         hint="dropout is active")
class AlwaysDropping(Written):
    def hidden(self, x):
        return F.dropout(super().hidden(x), 0.1)


@mistake(FFN, "dropout inside as well", looks="`self.dropout(self.activation(…))`",
         shows="twice the noise of the paper; small models learn slowly",
         find="compare `train()` and `eval()`", hint="in training something is dropped")
class DropoutInside(Written):
    def hidden(self, x):
        return F.dropout(super().hidden(x), 0.1, self.training)


@mistake(FFN, "expand and contract swapped",
         looks="`self.expand = nn.Linear(d_ff, d_model)`",
         shows="an error about shapes, or none when d_ff = d_model",
         find="print `layer.expand.weight.shape`", hint="does not take vectors of d_model")
class SwappedSizes(FeedForward):
    def __init__(self, *, d_model, d_ff, activation=gelu):
        super().__init__(d_model=d_ff, d_ff=d_model, activation=activation)

    def forward(self, x):
        return self.contract(self.activation(self.expand(x)))


@mistake(FFN, "no biases", looks="`nn.Linear(d_model, d_ff, bias=False)`",
         shows="slightly worse; BERT's biases have no home", find="count the parameters",
         hint="the layers have no biases")
class NoBias(Written):
    def __init__(self, *, d_model, d_ff, activation=gelu):
        super().__init__(d_model=d_model, d_ff=d_ff, activation=activation)
        self.expand = nn.Linear(d_model, d_ff, bias=False)
        self.contract = nn.Linear(d_ff, d_model, bias=False)


@mistake(FFN, "d_ff ignored", looks="`nn.Linear(d_model, 4 * d_model)`",
         shows="every width costs the same", find="count the parameters",
         hint="d_ff is ignored")
class FixedWidth(FeedForward):
    def __init__(self, *, d_model, d_ff, activation=gelu):
        super().__init__(d_model=d_model, d_ff=4 * d_model, activation=activation)


@mistake(FFN, "one matrix for both", looks="`hidden @ self.expand.weight`",
         shows="half the parameters, a weaker layer", find="count the parameters",
         hint="the two layers share one matrix")
class Tied(Written):
    def __init__(self, *, d_model, d_ff, activation=gelu):
        super().__init__(d_model=d_model, d_ff=d_ff, activation=activation)
        self.contract = None
        self.bias = nn.Parameter(torch.zeros(d_model))

    def forward(self, x):
        return self.hidden(x) @ self.expand.weight + self.bias


@mistake(FFN, "tokens mixed", looks="`hidden.softmax(dim=1)`, or a norm along dim 1",
         shows="padding changes real tokens", find=ALONE,
         hint="outputs of other tokens of its text")
class Mixing(Written):
    def hidden(self, x):
        hidden = super().hidden(x)
        if hidden.ndim < 3:
            return hidden
        return hidden - hidden.mean(dim=1, keepdim=True)


@mistake(FFN, "batch norm inside", looks="`nn.BatchNorm1d(d_ff)`",
         shows="a text's score depends on its batch", find=ALONE, hint="it holds a norm")
class BatchNormInside(Written):
    def __init__(self, *, d_model, d_ff, activation=gelu):
        super().__init__(d_model=d_model, d_ff=d_ff, activation=activation)
        self.norm = nn.BatchNorm1d(d_ff)

    def hidden(self, x):
        hidden = super().hidden(x)
        return self.norm(hidden.flatten(0, -2)).view_as(hidden)


@mistake(FFN, "the layers in a plain list", looks="`self.layers = [nn.Linear(…), …]`",
         shows="the optimizer sees nothing, the loss stays", find="count the parameters",
         hint="plain list")
class PlainList(nn.Module):
    def __init__(self, *, d_model, d_ff, activation=gelu):
        super().__init__()
        self.layers = [nn.Linear(d_model, d_ff), nn.Linear(d_ff, d_model)]
        self.activation = activation

    def forward(self, x):
        return self.layers[1](self.activation(self.layers[0](x)))


@mistake(FFN, "cut off from the graph", looks="`self.activation(hidden).detach()`",
         shows="the first matrix never changes", find="list parameters without a gradient",
         hint="the input gets none")
class Detached(Written):
    def hidden(self, x):
        return super().hidden(x).detach()


@mistake(FFN, "the second layer forgotten", looks="`return self.activation(self.expand(x))`",
         shows="an error in the next layer, or none when d_ff = d_model",
         find="print the output's shape", hint="is not applied")
class HalfWay(Written):
    def forward(self, x):
        return self.hidden(x)


@right(FFN, "nn.Sequential, positional arguments, other names")
class Sequential(nn.Module):
    def __init__(self, embed_dim, hidden_dim, activation=F.gelu):
        super().__init__()
        self.up = nn.Linear(embed_dim, hidden_dim)
        self.down = nn.Linear(hidden_dim, embed_dim)
        self.act = activation

    def forward(self, x):
        return self.down(self.act(self.up(x)))


@right(FFN, "own matrices, by einsum")
class Einsum(nn.Module):
    def __init__(self, d_model, d_ff, activation=None):
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(d_model, d_ff) * d_model**-0.5)
        self.b1 = nn.Parameter(torch.zeros(d_ff))
        self.w2 = nn.Parameter(torch.randn(d_ff, d_model) * d_ff**-0.5)
        self.b2 = nn.Parameter(torch.zeros(d_model))
        self.activation = activation or nn.GELU()

    def forward(self, x):
        if x.shape[-1] != self.w1.shape[0]:
            raise ValueError("wrong width")
        hidden = self.activation(torch.einsum("...d,dh->...h", x, self.w1) + self.b1)
        return torch.einsum("...h,hd->...d", hidden, self.w2) + self.b2


@right(FFN, "two convolutions of width 1")
class Convolutions(nn.Module):
    def __init__(self, d_model, d_ff, activation=F.gelu):
        super().__init__()
        self.conv1 = nn.Conv1d(d_model, d_ff, 1)
        self.conv2 = nn.Conv1d(d_ff, d_model, 1)
        self.activation = activation

    def forward(self, x):
        flat = x.reshape(-1, x.shape[-1], 1)
        return self.conv2(self.activation(self.conv1(flat))).view(x.shape)


# Exercises


@mistake("dead_units", "silent for some token", looks="`(hidden == 0).any(0)`",
         shows="nearly all units count as dead", find="one busy unit and one token",
         hint="silent means 0 for every token")
def dead_any(layer, x):
    layer.zero_grad()
    layer(x).sum().backward()
    hidden = layer.activation(layer.expand(x)).flatten(0, -2)
    untaught = (layer.expand.weight.grad == 0).all(1).sum()
    return int((hidden == 0).any(0).sum()), int(untaught)


@mistake("dead_units", "old gradients", looks="`backward` without `zero_grad`",
         shows="the second call counts nothing", find="call it twice",
         hint="gradients of an earlier backward")
def dead_stale(layer, x):
    layer(x).sum().backward()
    hidden = layer.activation(layer.expand(x)).flatten(0, -2)
    untaught = (layer.expand.weight.grad == 0).all(1).sum()
    return int((hidden == 0).all(0).sum()), int(untaught)


@right("dead_units", "by autograd.grad")
def dead_functional(layer, x):
    hidden = layer.activation(layer.expand(x)).flatten(0, -2)
    grad, = torch.autograd.grad(layer(x).sum(), layer.expand.weight)
    return (hidden == 0).all(0).sum(), (grad == 0).all(1).sum()


@mistake("gelu_slope", "one half of the product rule", looks="`return phi`",
         shows="slopes too small near 1", find="compare with autograd",
         hint="the second term is missing")
def slope_half(x):
    return torch.special.ndtr(x)


@mistake("gelu_slope", "by autograd", looks="`gelu(x).sum().backward()`",
         shows="right, but nothing was derived", find="call it under `torch.no_grad()`",
         hint="it asks autograd")
def slope_autograd(x):
    x = x.clone().requires_grad_()
    gelu(x).sum().backward()
    return x.grad


@right("gelu_slope", "by the normal distribution")
def slope_normal(x):
    normal = torch.distributions.Normal(0.0, 1.0)
    return normal.cdf(x) + x * normal.log_prob(x).exp()


@mistake("widest_layer", "rounded to the nearest", looks="`round(…)`",
         shows="a few parameters more than allowed", find="count them",
         hint="one too wide")
def width_nearest(d_model, budget):
    return round((budget - d_model) / (2 * d_model + 1))


@mistake("widest_layer", "biases forgotten", looks="`budget // (2 * d_model)`",
         shows="close for large widths, far off for small", find="d_model = 1",
         hint="of the two layers are forgotten")
def width_no_bias(d_model, budget):
    return budget // (2 * d_model)


@right("widest_layer", "by trying")
def width_tried(d_model, budget):
    width = 0
    while 2 * d_model * (width + 1) + (width + 1) + d_model <= budget:
        width += 1
    return width


@mistake("build_memory", "biases left as drawn", looks="only the weights are set",
         shows="every answer is off a little", find="ask for a zero vector",
         hint="the biases 0")
def memory_biased(keys, values):
    layer = FeedForward(d_model=keys.shape[1], d_ff=len(keys), activation=relu)
    with torch.no_grad():
        layer.expand.weight.copy_(keys)
        layer.contract.weight.copy_(values.T)
    return layer


@mistake("build_memory", "the default bend", looks="`activation` not passed: GELU",
         shows="answers of 0.84 times the value",
         find="ask for a key", hint="the activation is GELU")
def memory_gelu(keys, values):
    layer = FeedForward(d_model=keys.shape[1], d_ff=len(keys))
    with torch.no_grad():
        layer.expand.weight.copy_(keys)
        layer.contract.weight.copy_(values.T)
        layer.expand.bias.zero_()
        layer.contract.bias.zero_()
    return layer


@right("build_memory", "by assignment")
def memory_assigned(keys, values):
    layer = FeedForward(d_model=keys.shape[1], d_ff=len(keys), activation=torch.relu)
    layer.expand.weight = nn.Parameter(keys)
    layer.contract.weight = nn.Parameter(values.T)
    for bias in (layer.expand.bias, layer.contract.bias):
        nn.init.zeros_(bias)
    return layer


def backwards(x, w1, b1, w2, b2, slopes, gate=True, mean=False):
    before = x @ w1.T + b1
    down = slopes @ w2
    if gate:
        down = down * (before > 0)
    share = 1 / len(x) if mean else 1.0
    return (down @ w1, share * down.T @ x, share * down.sum(0),
            share * slopes.T @ before.relu(), share * slopes.sum(0))


@mistake("ffn_gradients", "no gate", looks="`slopes @ w2 @ w1`",
         shows="silent units learn from tokens that they never saw",
         find="compare with autograd", hint="the slope of ReLU is missing")
def backwards_no_gate(x, w1, b1, w2, b2, slopes):
    return backwards(x, w1, b1, w2, b2, slopes, gate=False)


@mistake("ffn_gradients", "averaged over the tokens", looks="`slopes.mean(0)`",
         shows="the more tokens, the smaller the step", find="compare with autograd",
         hint="they must be summed")
def backwards_mean(x, w1, b1, w2, b2, slopes):
    return backwards(x, w1, b1, w2, b2, slopes, mean=True)


@right("ffn_gradients", "by einsum")
def backwards_einsum(x, w1, b1, w2, b2, slopes):
    before = torch.einsum("td,hd->th", x, w1) + b1
    down = torch.einsum("td,dh->th", slopes, w2) * (before > 0)
    return [down @ w1, torch.einsum("th,td->hd", down, x), down.sum(0),
            torch.einsum("td,th->dh", slopes, before.clamp(min=0)), slopes.sum(0)]


def line(xs, ys, changes, start):
    layer = FeedForward(d_model=1, d_ff=len(xs) - 1, activation=relu)
    with torch.no_grad():
        layer.expand.weight.fill_(1.0)
        layer.expand.bias.copy_(-xs[:-1])
        layer.contract.weight.copy_(changes[None])
        layer.contract.bias.fill_(start)
    return layer


@mistake("through_points", "slopes in place of their changes",
         looks="`contract.weight = slopes`", shows="right up to the second point",
         find="ask for the third point", hint="must add the *change* of the slope")
def points_slopes(xs, ys):
    return line(xs, ys, ys.diff() / xs.diff(), ys[0])


@mistake("through_points", "the start forgotten", looks="the last bias left at 0",
         shows="the whole line too low or too high", find="ask for the first point",
         hint="the start is missing")
def points_start(xs, ys):
    steps = ys.diff() / xs.diff()
    return line(xs, ys, torch.cat([steps[:1], steps.diff()]), 0.0)


@right("through_points", "as the solution, shortened")
def points_short(xs, ys):
    steps = ys.diff() / xs.diff()
    return line(xs, ys, steps.diff(prepend=torch.zeros(1)), ys[0])


class Experts(nn.Module):
    def __init__(self, *, d_model, d_ff, num_experts):
        super().__init__()
        self.router = nn.Linear(d_model, num_experts)
        self.experts = nn.ModuleList(
            FeedForward(d_model=d_model, d_ff=d_ff) for _ in range(num_experts))

    def weigh(self, chance, answer):
        return chance * answer

    def forward(self, x):
        chance, best = self.router(x).softmax(-1).max(-1)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            mine = best == i
            out[mine] = self.weigh(chance[mine][:, None], expert(x[mine]))
        return out


MOE = "MixtureOfExperts"
right(MOE, "a loop over experts")(Experts)


@mistake(MOE, "the chance is not multiplied in", looks="`out[mine] = expert(x[mine])`",
         shows="the router gets no gradient and stays as it was drawn",
         find="list parameters without a gradient", hint="never learns")
class ExpertsHard(Experts):
    def weigh(self, chance, answer):
        return answer


@mistake(MOE, "every expert works on every token", looks="`expert(x) * mask`",
         shows="right answers, and nothing saved", find="count the rows that it sees",
         hint="Otherwise nothing is saved")
class ExpertsDense(Experts):
    def forward(self, x):
        chance, best = self.router(x).softmax(-1).max(-1)
        return sum(expert(x) * (chance * (best == i))[..., None]
                   for i, expert in enumerate(self.experts))


@mistake(MOE, "all experts mixed", looks="`(chance[..., None] * answers).sum(-2)`",
         shows="num_experts times the cost", find="count the experts of one token",
         hint="all experts are mixed")
class ExpertsMixed(Experts):
    def forward(self, x):
        chance = self.router(x).softmax(-1)
        answers = torch.stack([expert(x) for expert in self.experts], dim=-2)
        return (chance[..., None] * answers).sum(-2)


@right(MOE, "sorted by expert")
class ExpertsFlat(Experts):
    def forward(self, x):
        flat = x.reshape(-1, x.shape[-1])
        chance = F.softmax(self.router(flat), dim=-1)
        best = chance.argmax(-1)
        rows = [torch.nonzero(best == i).flatten() for i in range(len(self.experts))]
        parts = torch.cat([e(flat[r]) for e, r in zip(self.experts, rows, strict=True)])
        order = torch.cat(rows)
        out = parts[order.argsort()] * chance.gather(1, best[:, None])
        return out.view_as(x)
