"""Mistakes with layer normalisation, the encoder layer, the stack and the start."""

import copy

import torch
import torch.nn.functional as F
from torch import nn

from emoformer.attention import MultiHeadSelfAttention
from emoformer.encoder import EncoderLayer, LayerNorm, TransformerEncoder
from emoformer.feedforward import FeedForward
from tests.bank import mistake, right

NORM, LAYER, STACK, START = (
    "LayerNorm", "EncoderLayer", "TransformerEncoder", "init_weights")
PARITY = "compare with `nn.LayerNorm` on the same weights"
TORCH = "compare with `nn.TransformerEncoderLayer` on the same weights"
TRACE = "print what each sublayer receives"
COUNT = "`sum(p.numel() for p in layer.parameters())`"


# LayerNorm


class Steps(LayerNorm):
    """Our norm in separate steps, each of which a mistake can replace."""

    axes = (-1,)

    def forward(self, x):
        if x.shape[-1] != self.weight.shape[0]:
            raise ValueError("another width")
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return self.finish(self.normal(wide)).to(x.dtype)

    def normal(self, x):
        mean = x.mean(dim=self.axes, keepdim=True)
        return (x - mean) / self.below(x, mean)

    def below(self, x, mean):
        return ((x - mean).square().mean(dim=self.axes, keepdim=True) + self.eps).sqrt()

    def finish(self, normal):
        return normal * self.weight + self.bias


right(NORM, "step by step")(Steps)


@mistake(NORM, "unbiased variance", looks="`x.var(-1, keepdim=True)`, or `x.std(…)`",
         shows="every output a little too small; a loaded BERT is quietly worse",
         find=PARITY, hint="divided by d_model - 1")
class Unbiased(Steps):
    def below(self, x, mean):
        return (x.var(-1, keepdim=True) + self.eps).sqrt()


@mistake(NORM, "std and eps, as in many tutorials",
         looks="`(x - mean) / (x.std(-1, keepdim=True) + eps)`",
         shows="as above; and a constant vector has no gradient", find=PARITY,
         hint="divided by d_model - 1")
class StdPlusEps(Steps):
    def below(self, x, mean):
        return x.std(-1, keepdim=True) + self.eps


@mistake(NORM, "eps outside the root", looks="`variance.sqrt() + eps`",
         shows="one padded row of zeros, and the gradient is NaN",
         find="call `backward` on a constant vector", hint="outside the root")
class EpsOutside(Steps):
    def below(self, x, mean):
        return (x - mean).square().mean(-1, keepdim=True).sqrt() + self.eps


@mistake(NORM, "eps ignored", looks="`eps=1e-5` written into `forward`",
         shows="a checkpoint made with another eps gives other vectors",
         find="norm a small vector with a large eps", hint="the argument eps is not used")
class EpsFixed(Steps):
    def below(self, x, mean):
        return ((x - mean).square().mean(-1, keepdim=True) + 1e-5).sqrt()


@mistake(NORM, "PyTorch's eps as the default", looks="`def __init__(self, d_model, eps=1e-5)`",
         shows="fresh embeddings come out too small", find="norm a vector of size 1e-6",
         hint="PyTorch's: BERT's is 1e-12")
class TorchDefault(LayerNorm):
    def __init__(self, d_model, *, eps=1e-5):
        super().__init__(d_model, eps=eps)


@mistake(NORM, "normalised over the batch", looks="`x.mean(dim=0)`",
         shows="a text's answer depends on its neighbours; a batch of one gives zeros",
         find="norm a text alone and in a batch", hint="over the texts of the batch")
class OverBatch(Steps):
    axes = (0,)


@mistake(NORM, "normalised over all tokens of a text",
         looks="`nn.LayerNorm(x.shape[1:])`, or `dim=(1, 2)`",
         shows="padding changes real tokens", find="norm one token alone",
         hint="over all tokens of a text")
class OverText(Steps):
    axes = (1, 2)

    def forward(self, x):
        self.axes = tuple(range(1, x.ndim)) or (0,)
        return super().forward(x)


@mistake(NORM, "normalised over everything", looks="`x.mean()`, `x.var()`",
         shows="as above, and across texts", find="norm one token alone",
         hint="over the whole tensor")
class OverAll(Steps):
    def normal(self, x):
        return (x - x.mean()) / (x.var(correction=0) + self.eps).sqrt()


@mistake(NORM, "the mean stays", looks="`x * torch.rsqrt(x.square().mean(-1, keepdim=True))`",
         shows="that is RMSNorm: it trains, and no BERT fits", find=PARITY,
         hint="this is RMSNorm")
class NoMean(Steps):
    def normal(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)


@mistake(NORM, "divided by the variance", looks="`(x - mean) / (variance + eps)`",
         shows="loud vectors become silent, silent ones loud",
         find="variance of the output: it must be 1", hint="by the variance, not by its root")
class NoRoot(Steps):
    def below(self, x, mean):
        return super().below(x, mean) ** 2


@mistake(NORM, "weight and bias as plain tensors", looks="`self.weight = torch.ones(d_model)`",
         shows="they never learn, and stay behind when the model moves",
         find="`list(norm.parameters())`", hint="plain tensors")
class PlainTensors(Steps):
    def __init__(self, d_model, *, eps=1e-12):
        super().__init__(d_model, eps=eps)
        del self.weight, self.bias
        self.weight, self.bias = torch.ones(d_model), torch.zeros(d_model)


@mistake(NORM, "no bias", looks="only `self.weight`", shows="half of BERT's norms is missing",
         find="`len(list(norm.parameters()))`", hint="starts at 0, is missing")
class NoBias(Steps):
    def __init__(self, d_model, *, eps=1e-12):
        super().__init__(d_model, eps=eps)
        del self.bias
        self.bias = 0.0


@mistake(NORM, "bias before weight", looks="`(normal + bias) * weight`",
         shows="learns as well; a checkpoint's bias counts wrongly", find=PARITY,
         hint="added before the weight multiplies")
class BiasFirst(Steps):
    def finish(self, normal):
        return (normal + self.bias) * self.weight


@mistake(NORM, "weight starts at 0", looks="`nn.Parameter(torch.zeros(d_model))` twice",
         shows="every layer gives zeros; nothing below learns",
         find="look at the output of a fresh norm", hint="the weight must start at 1")
class ZeroWeight(Steps):
    def __init__(self, d_model, *, eps=1e-12):
        super().__init__(d_model, eps=eps)
        nn.init.zeros_(self.weight)


@mistake(NORM, "16 bits all the way", looks="no conversion to float32",
         shows="NaN after some steps of half precision",
         find="norm a constant vector in float16", hint="gives NaN")
class NotWidened(Steps):
    def forward(self, x):
        return self.finish(self.normal(x))


@mistake(NORM, "one pass over the data", looks="`x.square().mean(-1) - mean ** 2`",
         shows="NaN where numbers are far from 0", find="norm `x + 3000`",
         hint="mean of the squares minus the square of the mean")
class OnePass(Steps):
    def below(self, x, mean):
        variance = x.square().mean(-1, keepdim=True) - mean.square()
        return (variance.clamp(min=0) + self.eps).sqrt()


@mistake(NORM, "statistics cut off", looks="`mean = x.mean(-1, keepdim=True).detach()`",
         shows="outputs right, gradients wrong: learns worse, and nobody sees why",
         find="compare gradients with `nn.LayerNorm`", hint="no gradient flows through the mean")
class Detached(Steps):
    def normal(self, x):
        with torch.no_grad():
            mean = x.mean(-1, keepdim=True)
            below = self.below(x, mean)
        return (x - mean) / below


@mistake(NORM, "any width accepted", looks="no check, and broadcasting",
         shows="a missing axis goes unnoticed", find="norm vectors of width 1",
         hint="without a word")
class AnyWidth(Steps):
    def forward(self, x):
        return self.finish(self.normal(x.to(torch.promote_types(x.dtype, torch.float32)))) \
            .to(x.dtype)


@right(NORM, "around F.layer_norm, other names")
class Functional(nn.Module):
    def __init__(self, hidden_size, eps=1e-12):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(hidden_size))
        self.beta = nn.Parameter(torch.zeros(hidden_size))
        self.variance_epsilon = eps

    def forward(self, x):
        return F.layer_norm(x, self.gamma.shape, self.gamma, self.beta, self.variance_epsilon)


@right(NORM, "by var_mean and einsum")
class ByEinsum(Steps):
    def normal(self, x):
        variance, mean = torch.var_mean(x, dim=-1, correction=0, keepdim=True)
        return torch.einsum("...d,...->...d", x - mean, (variance + self.eps).pow(-0.5)[..., 0])


@right(NORM, "a subclass of nn.LayerNorm")
class Inherited(nn.LayerNorm):
    def __init__(self, d_model, eps=1e-12):
        super().__init__(d_model, eps=eps)


# EncoderLayer


class Spelt(EncoderLayer):
    """Our layer in separate steps, each of which a mistake can replace."""

    def forward(self, x, attention_mask=None, return_weights=False):
        self.asked = (attention_mask, return_weights)
        self.weights = None
        out = self.pre(x) if self.norm_first else self.post(x)
        return (out, self.weights) if return_weights else out

    def attend(self, x):
        mask, wanted = self.asked
        out = self.attention(x, mask, wanted)
        if wanted:
            out, self.weights = out
        return self.dropout(out)

    def feed(self, x):
        return self.dropout(self.feedforward(x))

    def post(self, x):
        x = self.attention_norm(x + self.attend(x))
        return self.feedforward_norm(x + self.feed(x))

    def pre(self, x):
        x = x + self.attend(self.attention_norm(x))
        return x + self.feed(self.feedforward_norm(x))


right(LAYER, "step by step")(Spelt)


@mistake(LAYER, "no residual", looks="`x = norm(attention(x))`",
         shows="tokens grow alike within a few layers; deep stacks do not learn",
         find=TORCH, hint="the residual around attention is missing")
class NoResidual(Spelt):
    def post(self, x):
        x = self.attention_norm(self.attend(x))
        return self.feedforward_norm(self.feed(x))


@mistake(LAYER, "no residual around feed-forward", looks="`x = norm(feedforward(x))`",
         shows="what attention has heard is lost on the way", find=TORCH,
         hint="the residual around feed-forward is missing")
class HalfResidual(Spelt):
    def post(self, x):
        x = self.attention_norm(x + self.attend(x))
        return self.feedforward_norm(self.feed(x))


@mistake(LAYER, "norm on the branch", looks="`x + norm(attention(x))`",
         shows="neither post- nor pre-norm: the stream grows, no checkpoint fits",
         find=TORCH, hint="the norm stands on the branch")
class NormOnBranch(Spelt):
    def post(self, x):
        x = x + self.attention_norm(self.attend(x))
        return x + self.feedforward_norm(self.feed(x))


@mistake(LAYER, "residual after the norm", looks="`x = norm(x)`; `x = x + attention(x)`",
         shows="in pre-norm: the stream is normalised at every station after all",
         find=TRACE, hint="is taken after the norm")
class ResidualAfterNorm(Spelt):
    def pre(self, x):
        x = self.attention_norm(x)
        x = x + self.attend(x)
        x = self.feedforward_norm(x)
        return x + self.feed(x)


@mistake(LAYER, "the second residual takes the layer's input",
         looks="`out = norm2(x + feedforward(h))`",
         shows="what attention adds reaches the end only through feed-forward",
         find=TRACE, hint="the second residual adds the layer's input")
class WrongResidual(Spelt):
    def post(self, x):
        h = self.attention_norm(x + self.attend(x))
        return self.feedforward_norm(x + self.feed(h))


@mistake(LAYER, "one norm used twice", looks="`self.norm` at both places",
         shows="fewer parameters; BERT's second norm has nowhere to go", find=COUNT,
         hint="only one norm is made")
class OneNorm(Spelt):
    def __init__(self, *, norm=LayerNorm, **named):
        made = []

        def once(width, eps):
            made.append(made[0] if made else norm(width, eps=eps))
            return made[0]

        super().__init__(norm=once, **named)


@mistake(LAYER, "the first norm in both places", looks="`self.norm1` twice: a copied line",
         shows="one norm gets no gradient", find="list parameters without a gradient",
         hint="one norm works in both places")
class FirstNormTwice(Spelt):
    def post(self, x):
        x = self.attention_norm(x + self.attend(x))
        return self.attention_norm(x + self.feed(x))


@mistake(LAYER, "dropout forgotten", looks="`self.dropout` made, never called",
         shows="overfits sooner than it should", find="call it twice in training",
         hint="nothing of what attention adds is dropped")
class NoDropout(Spelt):
    def attend(self, x):
        keep, self.dropout = self.dropout, nn.Identity()
        out = super().attend(x)
        self.dropout = keep
        return out

    def feed(self, x):
        return self.feedforward(x)


@mistake(LAYER, "dropout on the stream", looks="`x = self.dropout(x + attention(x))`",
         shows="each layer wipes out a tenth of what was there: deep stacks suffer",
         find="in training compare what the norm reads with x",
         hint="dropout falls on the stream")
class DropoutOnStream(Spelt):
    def post(self, x):
        plain = super()
        drop, self.dropout = self.dropout, nn.Identity()
        a = plain.attend(x)
        x = self.attention_norm(drop(x + a))
        out = self.feedforward_norm(drop(x + plain.feed(x)))
        self.dropout = drop
        return out


@mistake(LAYER, "dropout of a fixed size", looks="`nn.Dropout(0.1)`",
         shows="tuning dropout changes nothing", find="dropout 0.9, and look for zeros",
         hint="a fixed number in place of the argument")
class FixedDropout(Spelt):
    def __init__(self, **named):
        super().__init__(**named)
        self.dropout = nn.Dropout(0.1 if named.get("dropout", 0.1) else 0.0)


@mistake(LAYER, "dropout not passed on", looks="`attention(d_model=…, num_heads=…)`",
         shows="attention always drops its default share", find="print the made sublayer",
         hint="dropout is not passed on to an attention sublayer")
class DropoutKept(Spelt):
    def __init__(self, *, attention=MultiHeadSelfAttention, **named):
        super().__init__(
            attention=lambda d_model, num_heads, dropout: attention(
                d_model=d_model, num_heads=num_heads), **named)


@mistake(LAYER, "mask not passed on", looks="`self.attention(x)`",
         shows="a text's score depends on its neighbours in the batch",
         find="put noise into the padding", hint="the mask is not passed on to attention")
class MaskDropped(Spelt):
    def attend(self, x):
        self.asked = (None, self.asked[1])
        return super().attend(x)


@mistake(LAYER, "mask turned round", looks="`~attention_mask`, PyTorch's convention",
         shows="real tokens hear only padding", find="put noise into the padding",
         hint="inverted on its way to attention")
class MaskTurned(Spelt):
    def attend(self, x):
        mask, wanted = self.asked
        self.asked = (mask if mask is None else ~mask, wanted)
        return super().attend(x)


@mistake(LAYER, "norm_first turned round", looks="`if norm_first: return self.post(x)`",
         shows="trains, but is the other model", find=TORCH, hint="norm_first is not used")
class TurnedRound(Spelt):
    def forward(self, x, attention_mask=None, return_weights=False):
        self.norm_first = not self.norm_first
        try:
            return super().forward(x, attention_mask, return_weights)
        finally:
            self.norm_first = not self.norm_first


@mistake(LAYER, "both sublayers read the input",
         looks="`x + attention(norm1(x)) + feedforward(norm2(x))`",
         shows="the layer of some other models: half as deep, no BERT fits", find=TRACE,
         hint="side by side")
class Parallel(Spelt):
    def pre(self, x):
        return x + self.attend(self.attention_norm(x)) + self.feed(self.feedforward_norm(x))


@mistake(LAYER, "feed-forward first", looks="the two lines exchanged",
         shows="trains as well, and no checkpoint fits", find=TRACE,
         hint="feed-forward runs before attention")
class FeedFirst(Spelt):
    def post(self, x):
        x = self.attention_norm(x + self.feed(x))
        return self.feedforward_norm(x + self.attend(x))


@mistake(LAYER, "sublayers of a fixed name", looks="`self.attention = MultiHeadSelfAttention(…)`",
         shows="a layer of your own is never used, without an error",
         find="`print(layer)`", hint="the class that it gets as attention= is not used")
class FixedSublayers(Spelt):
    def __init__(self, *, attention=None, feedforward=None, norm=None, **named):
        super().__init__(**named)


@mistake(LAYER, "a tuple, always", looks="`return x, weights`",
         shows="the stack fails at the second layer", find="look at the type of the output",
         hint="it returns a tuple where only the output")
class AlwaysTuple(Spelt):
    def forward(self, x, attention_mask=None, return_weights=False):
        out = super().forward(x, attention_mask, return_weights)
        return out if return_weights else (out, None)


@mistake(LAYER, "x changed in place", looks="`x += self.attention(x)`",
         shows="whoever passed x finds it changed", find="clone the input before, compare after",
         hint="it changes its input")
class InPlace(Spelt):
    def forward(self, x, attention_mask=None, return_weights=False):
        out = super().forward(x, attention_mask, return_weights)
        if not x.requires_grad:
            x += 1
        return out


@right(LAYER, "residuals in a module of their own")
class WithConnection(nn.Module):
    class Around(nn.Module):
        def __init__(self, norm, p, first):
            super().__init__()
            self.norm, self.drop, self.first = norm, nn.Dropout(p), first

        def forward(self, x, sublayer):
            if self.first:
                return x + self.drop(sublayer(self.norm(x)))
            return self.norm(x + self.drop(sublayer(x)))

    def __init__(self, d_model, num_heads, d_ff, dropout=0.1, norm_first=False,
                 layer_norm_eps=1e-12, attention=MultiHeadSelfAttention,
                 feedforward=FeedForward, norm=LayerNorm):
        super().__init__()
        self.attend = attention(d_model=d_model, num_heads=num_heads, dropout=dropout)
        self.think = feedforward(d_model=d_model, d_ff=d_ff)
        self.parts = nn.ModuleList(
            self.Around(norm(d_model, eps=layer_norm_eps), dropout, norm_first)
            for _ in range(2)
        )

    def forward(self, x, attention_mask=None, return_weights=False):
        kept = []

        def look(y):
            out = self.attend(y, attention_mask=attention_mask, return_weights=return_weights)
            if return_weights:
                out, weights = out
                kept.append(weights)
            return out

        x = self.parts[1](self.parts[0](x, look), self.think)
        return (x, *kept) if return_weights else x


@right(LAYER, "asks for the weights always, drops by F.dropout")
class AlwaysAsks(Spelt):
    def attend(self, x):
        out, self.weights = self.attention(x, self.asked[0], True)
        return F.dropout(out, self.dropout.p, self.training)


# TransformerEncoder


class Looped(TransformerEncoder):
    """Our stack in separate steps, each of which a mistake can replace."""

    def forward(self, x, attention_mask=None, return_weights=False):
        x, weights = self.run_all(x, attention_mask, return_weights)
        x = self.finish(x)
        return (x, weights) if return_weights else x

    def run_all(self, x, mask, wanted):
        kept = []
        for layer in self.layers:
            x = layer(x, mask, wanted)
            if wanted:
                x, weights = x
                kept.append(weights)
        return x, kept

    def finish(self, x):
        return x if self.final_norm is None else self.final_norm(x)


right(STACK, "step by step")(Looped)


@mistake(STACK, "the same layer n times", looks="`nn.ModuleList([layer(…)] * num_layers)`",
         shows="a model of twelve layers has the parameters of one", find=COUNT,
         hint="the same at every height")
class SameLayer(Looped):
    def __init__(self, *, num_layers, **named):
        super().__init__(num_layers=num_layers, **named)
        self.layers = nn.ModuleList([self.layers[0]] * num_layers)


@mistake(STACK, "layers in a plain list", looks="`self.layers = [layer(…) for …]`",
         shows="the optimizer sees no parameters, the loss stays", find=COUNT,
         hint="a plain list hides them")
class PlainList(Looped):
    def __init__(self, **named):
        super().__init__(**named)
        layers = list(self.layers)
        del self.layers
        self.layers = layers


@mistake(STACK, "last norm in post-norm too", looks="`self.final_norm = norm(d_model)`",
         shows="a norm of a norm, and parameters that no BERT has", find=COUNT,
         hint="post-norm has a norm behind the last layer")
class AlwaysNorm(Looped):
    def __init__(self, *, d_model, layer_norm_eps=1e-12, norm=LayerNorm, **named):
        super().__init__(d_model=d_model, layer_norm_eps=layer_norm_eps, norm=norm, **named)
        if self.final_norm is None:
            self.final_norm = norm(d_model, eps=layer_norm_eps)


@mistake(STACK, "no last norm in pre-norm", looks="`return x` after the loop",
         shows="outputs grow with the depth; the head begins too loud",
         find="size of the output after 24 layers", hint="the last norm of pre-norm is missing")
class NoLastNorm(Looped):
    def __init__(self, **named):
        super().__init__(**named)
        self.final_norm = None


@mistake(STACK, "last norm made, not called", looks="`self.final_norm` only in `__init__`",
         shows="as above; one norm gets no gradient", find="list parameters without a gradient",
         hint="the last norm is made, but never called")
class NormNotCalled(Looped):
    def finish(self, x):
        return x


@mistake(STACK, "mask to the first layer only", looks="`attention_mask` lost in the loop",
         shows="padding leaks in from layer 2 on", find="put noise into the padding",
         hint="reaches some layers and not others")
class MaskOnce(Looped):
    def run_all(self, x, mask, wanted):
        kept = []
        for i, layer in enumerate(self.layers):
            x = layer(x, mask if i == 0 else None, wanted)
            if wanted:
                x, weights = x
                kept.append(weights)
        return x, kept


@mistake(STACK, "every layer reads the input", looks="`out = layer(x)` in the loop",
         shows="twelve layers compute as much as one", find=TRACE,
         hint="every layer reads the stack's input")
class NoChain(Looped):
    def run_all(self, x, mask, wanted):
        kept, out = [], x
        for layer in self.layers:
            out = layer(x, mask, wanted)
            if wanted:
                out, weights = out
                kept.append(weights)
        return out, kept


@mistake(STACK, "the last layer left out", looks="`for i in range(num_layers - 1)`",
         shows="one layer gets no gradient", find="list parameters without a gradient",
         hint="only 2 are called")
class OneShort(Looped):
    def run_all(self, x, mask, wanted):
        whole, self.layers = self.layers, self.layers[:-1] or self.layers
        try:
            return super().run_all(x, mask, wanted)
        finally:
            self.layers = whole


@mistake(STACK, "options not passed on", looks="`layer(d_model=d_model)` without `**options`",
         shows="dropout and d_ff stay at some default", find="`print(encoder)`",
         hint="dropout is not passed on to the layers")
class OptionsLost(Looped):
    def __init__(self, *, layer=EncoderLayer, **named):
        super().__init__(
            layer=lambda dropout=None, **options: layer(**options), **named)


@mistake(STACK, "weights of the last layer only", looks="`return x, weights`",
         shows="attention of the lower layers can't be shown",
         find="`len(weights)`", hint="only one layer's weights come back")
class LastWeights(Looped):
    def run_all(self, x, mask, wanted):
        x, kept = super().run_all(x, mask, wanted)
        return x, kept[-1] if wanted else kept


@mistake(STACK, "an empty stack accepted", looks="no check of `num_layers`",
         shows="the model is an embedding with a head, and trains",
         find="`num_layers=0`", hint="an empty stack")
class EmptyAccepted(Looped):
    def __init__(self, *, num_layers, **named):
        super().__init__(num_layers=max(num_layers, 1), **named)
        if num_layers < 1:
            self.layers = nn.ModuleList()


@right(STACK, "explicit arguments, copies of one layer")
class Copied(nn.Module):
    def __init__(self, *, num_layers, d_model, num_heads=4, d_ff=512, dropout=0.1,
                 norm_first=False, layer_norm_eps=1e-12, attention=None, feedforward=None,
                 layer=EncoderLayer, norm=LayerNorm):
        super().__init__()
        if num_layers < 1:
            raise ValueError("num_layers must be at least 1")
        parts = {"attention": attention, "feedforward": feedforward}
        first = layer(
            d_model=d_model, num_heads=num_heads, d_ff=d_ff, dropout=dropout,
            norm_first=norm_first, layer_norm_eps=layer_norm_eps, norm=norm,
            **{name: part for name, part in parts.items() if part is not None},
        )
        self.stack = nn.Sequential(*(copy.deepcopy(first) for _ in range(num_layers)))
        self.last = norm(d_model, eps=layer_norm_eps) if norm_first else nn.Identity()

    def forward(self, x, attention_mask=None, return_weights=False):
        weights = ()
        for layer in self.stack:
            x = layer(x, attention_mask=attention_mask, return_weights=return_weights)
            if return_weights:
                weights, x = (*weights, x[1]), x[0]
        x = self.last(x)
        return (x, list(weights)) if return_weights else x


# init_weights


@mistake(START, "bounds as multiples of std",
         looks="`trunc_normal_(weight, std=0.02, a=-2, b=2)`",
         shows="nothing is cut: some weights lie four standard deviations out",
         find="`weight.abs().max()`", hint="cuts nothing")
def uncut(module, *, std=0.02):
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.trunc_normal_(module.weight, std=std)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


@mistake(START, "the embedding forgotten", looks="`isinstance(module, nn.Linear)`",
         shows="embeddings of size 1 beside weights of 0.02",
         find="`embedding.weight.std()`", hint="the weights of an nn.Embedding are left")
def no_embedding(module, *, std=0.02):
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


@mistake(START, "biases forgotten", looks="only `module.weight`",
         shows="PyTorch's random biases stay", find="`layer.bias.abs().max()`",
         hint="bias of an nn.Linear is left")
def no_bias(module, *, std=0.02):
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)


@mistake(START, "norms drawn as well", looks="`if hasattr(module, 'weight')`",
         shows="norms begin near 0, and hardly anything comes through",
         find="look at a norm's weight", hint="the weight or bias of a norm is drawn")
def norms_too(module, *, std=0.02):
    if getattr(module, "weight", None) is not None:
        nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
    if getattr(module, "bias", None) is not None:
        nn.init.zeros_(module.bias)


@mistake(START, "std ignored", looks="`std=0.02` in the body",
         shows="another std changes nothing", find="std=1, and look",
         hint="whatever std says")
def fixed_std(module, *, std=0.02):
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.trunc_normal_(module.weight, std=0.02, a=-0.04, b=0.04)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


@mistake(START, "a seed inside", looks="`torch.manual_seed(0)` in the function",
         shows="all layers of one size begin alike", find="compare two layers",
         hint="a seed is set inside")
def seeded(module, *, std=0.02):
    torch.manual_seed(0)
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


@mistake(START, "a layer without bias", looks="`nn.init.zeros_(module.bias)` unasked",
         shows="an error for nn.Linear(…, bias=False)", find="a Linear without bias",
         hint="one nn.Linear has no bias")
def bias_expected(module, *, std=0.02):
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
    if isinstance(module, nn.Linear):
        module.bias.data.zero_()


@right(START, "drawn again until all lie inside")
def redrawn(module, *, std=0.02):
    with torch.no_grad():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            weight = module.weight.normal_(0, std)
            while (beyond := weight.abs() > 2 * std).any():
                weight[beyond] = torch.randn_like(weight[beyond]) * std
        if getattr(module, "bias", None) is not None:
            if isinstance(module, nn.Linear):
                module.bias.fill_(0)
            elif isinstance(module, nn.LayerNorm):
                module.bias.zero_()
                module.weight.fill_(1)


# Exercises

ONE_PASS, RATIO, RMS, BY_MEAN, SHARED, BACK = (
    "one_pass_variance", "last_gradient_ratio", "RMSNorm", "learn_by_mean", "shared_stack",
    "layer_norm_backward")


@mistake(ONE_PASS, "centred after all", looks="`(x - mean).square().mean(-1)`",
         shows="exact, so there is nothing to see", find="numbers near 5000",
         hint="it is not the short formula")
def two_pass_one_pass_variance(x):
    return (x - x.mean(-1, keepdim=True)).square().mean(-1, keepdim=True)


@mistake(ONE_PASS, "the other way round", looks="`x.mean(-1) ** 2 - (x ** 2).mean(-1)`",
         shows="a variance below 0, and NaN in the root", find="look at the sign",
         hint="the other way round")
def turned_one_pass_variance(x):
    return x.mean(-1, keepdim=True).square() - x.square().mean(-1, keepdim=True)


@right(ONE_PASS, "by sums")
def summed_one_pass_variance(x):
    n = x.shape[-1]
    return (x * x).sum(-1, keepdim=True) / n - (x.sum(-1, keepdim=True) / n) ** 2


@mistake(RATIO, "upside down", looks="`shallow / deep`",
         shows="pre-norm's gradient seems to grow", find="think of 32 layers",
         hint="upside down")
def upside_down_last_gradient_ratio(norm_first, seeds=5):
    return 2.4 if norm_first else 0.6


@mistake(RATIO, "norm_first not passed on", looks="`probe(seed, num_layers=n)`",
         shows="both norms give the same", find="compare the two",
         hint="norm_first is not passed on")
def post_only_last_gradient_ratio(norm_first, seeds=5):
    return 1.6


@mistake(RMS, "LayerNorm in disguise", looks="`x = x - x.mean(-1, keepdim=True)` left in",
         shows="as LayerNorm without a bias", find="norm `x + 5`: it must not be norm `x`",
         hint="RMSNorm leaves it")
class CentredRMSNorm(nn.Module):
    def __init__(self, d_model, *, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(d_model)), eps

    def forward(self, x):
        x = x - x.mean(-1, keepdim=True)
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


@mistake(RMS, "the square left on", looks="`x / (mean_square + eps)`",
         shows="loud vectors become silent", find="mean square of the output: it must be 1",
         hint="by the mean square, not by its root")
class SquareRMSNorm(CentredRMSNorm):
    def forward(self, x):
        return x / (x.square().mean(-1, keepdim=True) + self.eps) * self.weight


@right(RMS, "around nn.RMSNorm")
class TorchRMSNorm(nn.Module):
    def __init__(self, d_model, *, eps):
        super().__init__()
        self.inner = nn.RMSNorm(d_model, eps=eps)

    def forward(self, x):
        return self.inner(x)


class Mean(nn.Module):
    """Attention that does not choose."""

    def __init__(self, *, d_model, num_heads, dropout):
        super().__init__()
        self.value = nn.Linear(d_model, d_model)

    def forward(self, x, attention_mask=None, return_weights=False):
        return self.value(x).mean(1, keepdim=True).expand_as(x)


def trained(steps, **options):
    """Twelve layers learn nothing for some steps."""
    torch.manual_seed(0)
    stack = TransformerEncoder(
        num_layers=12, d_model=32, num_heads=4, d_ff=64, dropout=0.0, **options)
    head, losses = nn.Linear(32, 2), []
    for _ in range(steps):
        logits = head(stack(torch.randn(8, 4, 32)).mean(1))
        losses.append(F.cross_entropy(0.1 * logits, torch.randint(2, (8,))).item())
    return losses


@mistake(BY_MEAN, "the attention not put in", looks="`learn(0, norm_first=True)`",
         shows="it learns quickly: that is real attention", find="count the Linear layers",
         hint="the book's own attention is at work")
def own_learn_by_mean(steps=160):
    return trained(steps, norm_first=True)


@right(BY_MEAN, "written anew")
def new_learn_by_mean(steps=160):
    return trained(steps, norm_first=True, attention=Mean)


@mistake(SHARED, "a new layer each time", looks="`layer=EncoderLayer`",
         shows="twelve times the parameters", find=COUNT, hint="a new layer is made each")
def new_shared_stack(num_layers, **sizes):
    return TransformerEncoder(num_layers=num_layers, **sizes)


@mistake(SHARED, "one layer, run once", looks="`TransformerEncoder(num_layers=1, …)`",
         shows="the parameters are right, the depth is not", find="count the calls",
         hint="the one layer runs 1 times")
def low_shared_stack(num_layers, **sizes):
    return TransformerEncoder(num_layers=1, **sizes)


@right(SHARED, "by setting the list afterwards")
def later_shared_stack(num_layers, **sizes):
    stack = TransformerEncoder(num_layers=1, **sizes)
    stack.layers = nn.ModuleList([stack.layers[0]] * num_layers)
    return stack


def book_backward(x, weight, eps, grad):
    """The three parts of the way back."""
    centred = x - x.mean(-1, keepdim=True)
    scale = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    normal, inner = centred * scale, grad * weight
    through_mean = inner.mean(-1, keepdim=True)
    through_variance = normal * (inner * normal).mean(-1, keepdim=True)
    return normal, inner, scale, through_mean, through_variance


@mistake(BACK, "mean and variance as constants", looks="`grad * weight * scale`",
         shows="training still works, and is worse", find="`torch.autograd.gradcheck`",
         hint="taken as constants")
def constant_layer_norm_backward(x, weight, eps, grad):
    normal, inner, scale, *_ = book_backward(x, weight, eps, grad)
    lead = tuple(range(x.ndim - 1))
    return inner * scale, (grad * normal).sum(lead), grad.sum(lead)


@mistake(BACK, "averaged over the batch", looks="`grad.mean((0, 1))` for the bias",
         shows="weight and bias learn too slowly, the more so in large batches",
         find="compare with autograd", hint="the gradient of the bias is averaged")
def averaged_layer_norm_backward(x, weight, eps, grad):
    normal, inner, scale, mean, variance = book_backward(x, weight, eps, grad)
    lead = tuple(range(x.ndim - 1))
    return (inner - mean - variance) * scale, (grad * normal).mean(lead), grad.mean(lead)


@right(BACK, "by autograd of the formula")
def formula_layer_norm_backward(x, weight, eps, grad):
    with torch.enable_grad():
        x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
        bias = torch.zeros_like(weight, requires_grad=True)
        centred = x - x.mean(-1, keepdim=True)
        normal = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
        return torch.autograd.grad(normal * weight + bias, (x, weight, bias), grad)
