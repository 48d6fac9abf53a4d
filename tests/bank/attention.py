"""Mistakes with attention, single and multi-head."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from emoformer.attention import MultiHeadSelfAttention, masked_softmax
from tests.bank import mistake, right

SOFTMAX, WEIGHTS = "masked_softmax", "attention_weights"
FUNCTION, MULTI = "scaled_dot_product_attention", "MultiHeadSelfAttention"
ROWS = "print `weights.sum(-1)`: each row must give 1"
NOISE = "put noise into the padding: real outputs must not move"
PARITY = "compare with `nn.MultiheadAttention` on the same weights"


def filled(scores, mask, value=float("-inf")):
    return scores if mask is None else scores.masked_fill(~mask, value)


# masked_softmax


@mistake(SOFTMAX, "no shift by the largest score",
         looks="`e = scores.exp()`; `e / e.sum(-1, keepdim=True)`",
         shows="works for weeks; then a loud score gives inf / inf, and the loss is NaN",
         find="try scores of 1,000", hint="Subtract the row's largest score")
def no_shift(scores, mask=None):
    e = filled(scores, mask).exp()
    total = e.sum(-1, keepdim=True)
    return e / total.masked_fill(total == 0, 1.0)


@mistake(SOFTMAX, "an empty row gives NaN",
         looks="`scores.masked_fill(~mask, -inf).softmax(-1)`",
         shows="one text of nothing but padding, and the whole model is NaN",
         find="a mask with a row of False", hint="where a row has no True at all it gives NaN")
def empty_nan(scores, mask=None):
    return filled(scores, mask).softmax(-1)


@mistake(SOFTMAX, "NaN repaired afterwards",
         looks="`w = (scores + bias).softmax(-1)`; `torch.where(w.isnan(), 0, w)`",
         shows="the output looks right, and the gradient is NaN",
         find="call `backward` with an empty row", hint="their gradient is NaN")
def nan_repaired(scores, mask=None):
    if mask is not None:
        scores = scores + torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))
    weights = scores.softmax(-1)
    return torch.where(weights.isnan(), 0.0, weights)


@mistake(SOFTMAX, "masked after the softmax",
         looks="`scores.softmax(-1) * mask`",
         shows="the more padding, the smaller the outputs", find=ROWS,
         hint="the mask is applied after the softmax")
def masked_after(scores, mask=None):
    weights = scores.softmax(-1)
    return weights if mask is None else weights * mask


@mistake(SOFTMAX, "masked scores set to 0",
         looks="`(scores * mask).softmax(-1)`",
         shows="padding still gets a share: e⁰ is 1", find=NOISE,
         hint="e^0 is 1, not 0")
def masked_zero(scores, mask=None):
    return (scores if mask is None else scores * mask).softmax(-1)


@mistake(SOFTMAX, "the whole tensor's sum", looks="`e / e.sum()`",
         shows="weights shrink as the batch grows", find=ROWS,
         hint="normalises over the whole tensor")
def whole_sum(scores, mask=None):
    e = (filled(scores, mask) - scores.max()).exp()
    return e / e.sum()


@mistake(SOFTMAX, "a large number instead of infinity",
         looks="`masked_fill(~mask, -1e4)`",
         shows="an empty row looks like one of equal scores; small leaks in 16 bits",
         find="a mask with a row of False", hint="with one large negative number")
def minus_ten_thousand(scores, mask=None):
    return filled(scores, mask, -1e4).softmax(-1)


@mistake(SOFTMAX, "the scores are overwritten", looks="`scores[~mask] = -inf`",
         shows="whoever passed the scores finds them changed",
         find="clone the input before, compare after", hint="it changes its input")
def overwritten(scores, mask=None):
    if mask is not None:
        scores.masked_fill_(~mask, float("-inf"))
    return masked_softmax(scores, mask)


@right(SOFTMAX, "by where and logsumexp")
def by_logsumexp(scores, mask=None):
    if mask is None:
        return (scores - scores.logsumexp(-1, keepdim=True)).exp()
    real = mask.expand(scores.shape)
    safe = torch.where(real.any(-1, keepdim=True), filled(scores, mask), 0.0)
    return torch.where(real, safe.softmax(-1), 0.0)


# attention_weights and the function


@mistake(WEIGHTS, "softmax over the queries", looks="`scores.softmax(dim=-2)`",
         shows="some queries get more than everything, others starve", find=ROWS,
         hint="runs over the queries")
def over_queries(query, key, mask=None):
    scores = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])
    return filled(scores, mask).softmax(-2)


@mistake(WEIGHTS, "scaled by the number of keys", looks="`/ math.sqrt(key.shape[-2])`",
         shows="a text's attention is flatter the longer it is",
         find="two texts of different length", hint="root of the number of keys")
def scaled_by_length(query, key, mask=None):
    scores = query @ key.transpose(-2, -1) / math.sqrt(key.shape[-2])
    return masked_softmax(scores, mask)


@mistake(FUNCTION, "no scaling", looks="`(query @ key.transpose(-2, -1)).softmax(-1)`",
         shows="wide heads saturate at the start, and learn slowly or not at all",
         find="variance of the scores: it must be near 1, not d_head",
         hint="not divided by the root of d_head")
def unscaled(query, key, value, mask=None):
    weights = masked_softmax(query @ key.transpose(-2, -1), mask)
    return weights @ value, weights


@mistake(FUNCTION, "multiplied by the root", looks="`scores * math.sqrt(d_head)`",
         shows="one token takes all from the first step", find="as above",
         hint="multiplied by the root")
def multiplied(query, key, value, mask=None):
    weights = masked_softmax(
        query @ key.transpose(-2, -1) * math.sqrt(query.shape[-1]), mask)
    return weights @ value, weights


@mistake(FUNCTION, "mask transposed", looks="`mask.transpose(-2, -1)`",
         shows="with a triangle every token sees the future and not the past",
         find="gradient of output i by input j", hint="the mask is transposed")
def mask_transposed(query, key, value, mask=None):
    scores = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])
    if mask is not None and mask.shape[-1] == mask.shape[-2]:
        mask = mask.transpose(-2, -1)
    weights = masked_softmax(scores, mask)
    return weights @ value, weights


@right(FUNCTION, "by einsum")
def by_einsum(query, key, value, mask=None):
    scores = torch.einsum("...qd,...kd->...qk", query, key) * query.shape[-1] ** -0.5
    weights = masked_softmax(scores, mask)
    return torch.einsum("...qk,...kd->...qd", weights, value), weights


# MultiHeadSelfAttention


class Written(MultiHeadSelfAttention):
    """Our layer in separate steps, each of which a mistake can replace."""

    def forward(self, x, attention_mask=None, return_weights=False):
        query, key, value = (
            self.heads(part(x)) for part in (self.query, self.key, self.value)
        )
        scores = self.scores(query, key)
        weights = self.weights(scores, attention_mask)
        out = self.finish(self.joined(self.dropout(weights) @ value))
        return (out, weights) if return_weights else out

    def heads(self, x):
        return self._split(x)

    def scores(self, query, key):
        return query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])

    def weights(self, scores, mask):
        if mask is not None:
            if mask.dtype != torch.bool:
                raise TypeError("bool!")
            mask = mask[:, None, None, :]
        return masked_softmax(scores, mask)

    def joined(self, heads):
        return heads.transpose(1, 2).flatten(2)

    def finish(self, x):
        return self.output(x)


right(MULTI, "step by step")(Written)


@mistake(MULTI, "mask inverted", looks="`masked_fill(mask, -inf)`",
         shows="real tokens see only padding; without padding NaN", find=NOISE,
         hint="the mask is inverted")
class MaskInverted(Written):
    def weights(self, scores, mask):
        return super().weights(scores, mask if mask is None else ~mask)


@mistake(MULTI, "mask forgotten", looks="`attention_mask` is taken and never used",
         shows="a text's score depends on its neighbours in the batch", find=NOISE,
         hint="the mask is not used")
class MaskForgotten(Written):
    def weights(self, scores, mask):
        return super().weights(scores, None)


@mistake(MULTI, "mask on the queries", looks="`mask[:, None, :, None]`",
         shows="padding counts for real tokens; padded rows are empty", find=NOISE,
         hint="hides padded queries")
class MaskOnQueries(Written):
    def weights(self, scores, mask):
        if mask is None:
            return super().weights(scores, None)
        return masked_softmax(scores, mask[:, None, :, None])


@mistake(MULTI, "masked after the softmax", looks="`weights = weights * mask`",
         shows="outputs shrink with the share of padding", find=ROWS,
         hint="the mask is applied after the softmax")
class MaskAfter(Written):
    def weights(self, scores, mask):
        weights = super().weights(scores, None)
        return weights if mask is None else weights * mask[:, None, None, :]


@mistake(MULTI, "mask added as 0 and 1", looks="`scores + mask`",
         shows="padding is a little less liked, no more", find=NOISE,
         hint="added to the scores as numbers 0 and 1")
class MaskAdded(Written):
    def weights(self, scores, mask):
        if mask is not None:
            scores = scores + mask[:, None, None, :].float()
        return super().weights(scores, None)


@mistake(MULTI, "scaled by √d_model", looks="`/ math.sqrt(d_model)`",
         shows="attention too flat; a loaded BERT is quietly worse", find=PARITY,
         hint="root of d_model, not of d_head")
class ScaledByWidth(Written):
    def scores(self, query, key):
        return query @ key.transpose(-2, -1) / math.sqrt(self.query.in_features)


@mistake(MULTI, "scaled twice",
         looks="`F.scaled_dot_product_attention(q / math.sqrt(d), …)`",
         shows="attention too flat", find=PARITY, hint="not by its root")
class ScaledTwice(Written):
    def scores(self, query, key):
        return super().scores(query, key) / math.sqrt(query.shape[-1])


@mistake(MULTI, "not scaled", looks="`query @ key.transpose(-2, -1)`",
         shows="wide heads saturate at the start", find=PARITY,
         hint="not divided by the root of d_head")
class NotScaled(Written):
    def scores(self, query, key):
        return query @ key.transpose(-2, -1)


@mistake(MULTI, "softmax over the heads", looks="`F.softmax(scores, dim=1)`",
         shows="heads compete with each other, tokens don't", find=ROWS,
         hint="runs over the heads")
class OverHeads(Written):
    def weights(self, scores, mask):
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None, :], -1e9)
        return scores.softmax(1)


@mistake(MULTI, "heads split by a wrong view",
         looks="`x.view(batch, num_heads, seq_len, d_head)`",
         shows="all shapes right, the loss falls; tokens are mixed up",
         find="shuffle the tokens: the outputs must be shuffled alike",
         hint="split by a view that mixes tokens")
class WrongView(Written):
    def heads(self, x):
        return x.view(len(x), self.num_heads, x.shape[1], -1)


@mistake(MULTI, "heads joined without transposing back",
         looks="`heads.reshape(batch, seq_len, d_model)`",
         shows="as above", find="shuffle the tokens",
         hint="without the transpose back")
class NoTransposeBack(Written):
    def joined(self, heads):
        return heads.reshape(len(heads), heads.shape[2], -1)


@mistake(MULTI, "d_head and num_heads swapped", looks="`view(…, d_head, num_heads)`",
         shows="trains well, and no checkpoint of others fits", find=PARITY,
         hint="every num_heads-th number")
class Swapped(Written):
    def heads(self, x):
        return x.view(*x.shape[:2], -1, self.num_heads).permute(0, 3, 1, 2)


@mistake(MULTI, "no output projection", looks="`self.output` made, never called",
         shows="heads never meet; one parameter group gets no gradient",
         find="list parameters without a gradient", hint="output projection is missing")
class NoOutput(Written):
    def finish(self, x):
        return x


@mistake(MULTI, "key made by the query's projection",
         looks="`key = self.query(x)`: a copied line",
         shows="each token likes itself best; `key` gets no gradient",
         find="list parameters without a gradient", hint="a copied line was not changed")
class KeyIsQuery(Written):
    def forward(self, x, attention_mask=None, return_weights=False):
        q, v = self.heads(self.query(x)), self.heads(self.value(x))
        weights = self.weights(self.scores(q, q), attention_mask)
        out = self.finish(self.joined(self.dropout(weights) @ v))
        return (out, weights) if return_weights else out


@mistake(MULTI, "projections in a plain list",
         looks="`self.parts = [nn.Linear(…) for _ in range(4)]`",
         shows="the optimizer sees no parameters, the loss stays",
         find="`sum(p.numel() for p in layer.parameters())`", hint="plain list")
class PlainList(nn.Module):
    def __init__(self, *, d_model, num_heads, dropout=0.1):
        super().__init__()
        if d_model % num_heads:
            raise ValueError("num_heads must divide d_model")
        self.parts = [nn.Linear(d_model, d_model) for _ in range(4)]
        self.num_heads, self.p = num_heads, dropout

    def forward(self, x, attention_mask=None, return_weights=False):
        q, k, v = (
            part(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for part in self.parts[:3]
        )
        mask = None if attention_mask is None else attention_mask[:, None, None]
        out = F.scaled_dot_product_attention(q, k, v, mask)
        return self.parts[3](out.transpose(1, 2).flatten(2))


@mistake(MULTI, "dropout active in evaluation",
         looks="`F.dropout(weights, self.p)`",
         shows="two predictions for one text; validation noisy and low",
         find="call it twice in `eval()`", hint="dropout is active there")
class AlwaysDropping(MultiHeadSelfAttention):
    def forward(self, x, attention_mask=None, return_weights=False):
        self._check(x, attention_mask)
        q, k, v = (self._split(p(x)) for p in (self.query, self.key, self.value))
        mask = None if attention_mask is None else attention_mask[:, None, None]
        weights = masked_softmax(q @ k.mT / math.sqrt(q.shape[-1]), mask)
        out = F.dropout(weights, self.dropout.p) @ v
        out = self.output(out.transpose(1, 2).flatten(2))
        return (out, weights) if return_weights else out


@mistake(MULTI, "dropout on the scores", looks="`self.dropout(scores).softmax(-1)`",
         shows="a dropped score is 0, not minus infinity: nothing is dropped",
         find="mean over many passes in training", hint="not to the scores before it")
class DropoutOnScores(Written):
    def forward(self, x, attention_mask=None, return_weights=False):
        q, k, v = (self.heads(p(x)) for p in (self.query, self.key, self.value))
        weights = self.weights(self.dropout(self.scores(q, k)), attention_mask)
        out = self.finish(self.joined(weights @ v))
        clean = self.weights(self.scores(q, k), attention_mask)
        return (out, clean) if return_weights else out


@mistake(MULTI, "residual inside", looks="`return x + self.output(heads)`",
         shows="the layer adds it once more: x counts twice", find=PARITY,
         hint="the residual belongs to the encoder")
class ResidualInside(Written):
    def forward(self, x, attention_mask=None, return_weights=False):
        out, weights = super().forward(x, attention_mask, True)
        return (x + out, weights) if return_weights else x + out


@mistake(MULTI, "causal mask left in", looks="`is_causal=True`",
         shows="early tokens know nothing of later ones; [CLS] sees only itself",
         find="shuffle the tokens", hint="a causal mask hides the later tokens")
class Causal(Written):
    def scores(self, query, key):
        scores = super().scores(query, key)
        triangle = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        return scores.masked_fill(~triangle, float("-inf"))


@mistake(MULTI, "indivisible width accepted", looks="`d_head = d_model // num_heads`",
         shows="an error about shapes far away, or a lost part of each vector",
         find="d_model = 10 with 3 heads", hint="10 // 3 would lose")
class NoRefusal(Written):
    def __init__(self, *, d_model, num_heads, dropout=0.1):
        width = d_model - d_model % num_heads
        super().__init__(d_model=width, num_heads=num_heads, dropout=dropout)


@mistake(MULTI, "a mask of numbers accepted", looks="`masked_fill(~mask == 0, …)`",
         shows="a tokenizer's mask of 0 and 1 hides nothing, without an error",
         find="pass `mask.long()`", hint="Refuse a mask that is not bool")
class NumbersAccepted(Written):
    def weights(self, scores, mask):
        if mask is not None:
            scores = scores.masked_fill((~mask)[:, None, None, :] == 0, -torch.inf) \
                if mask.dtype != torch.bool else scores.masked_fill(
                    ~mask[:, None, None, :], -torch.inf)
        return masked_softmax(scores, scores > -torch.inf)


@mistake(MULTI, "weights after dropout returned", looks="`return out, self.dropout(weights)`",
         shows="attention pictures with holes that nobody put there",
         find="row sums in training", hint="those after dropout")
class WeightsAfterDropout(Written):
    def weights(self, scores, mask):
        return self.dropout(super().weights(scores, mask))

    def forward(self, x, attention_mask=None, return_weights=False):
        q, k, v = (self.heads(p(x)) for p in (self.query, self.key, self.value))
        weights = self.weights(self.scores(q, k), attention_mask)
        out = self.finish(self.joined(weights @ v))
        return (out, weights) if return_weights else out


@right(MULTI, "by einsum")
class Einsum(Written):
    def heads(self, x):
        return torch.einsum("bshd->bhsd", x.unflatten(-1, (self.num_heads, -1)))

    def scores(self, query, key):
        return torch.einsum("bhqd,bhkd->bhqk", query * query.shape[-1] ** -0.5, key)


@right(MULTI, "one fused projection")
class Fused(nn.Module):
    def __init__(self, d_model, num_heads, dropout=0.1):
        super().__init__()
        assert d_model % num_heads == 0, "num_heads must divide d_model"
        self.num_heads, self.p = num_heads, dropout
        self.qkv = nn.Linear(d_model, 3 * d_model)
        self.proj = nn.Linear(d_model, d_model)

    def forward(self, x, mask=None, return_weights=False):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        weights = q @ k.mT / math.sqrt(q.shape[-1])
        if mask is not None:
            weights = weights.masked_fill(mask[:, None, None, :] == 0, -1e9)
        weights = weights.softmax(-1)
        out = F.dropout(weights, self.p, self.training) @ v
        out = self.proj(out.transpose(1, 2).flatten(2))
        return (out, weights) if return_weights else out


@right(MULTI, "a loop over heads, other names")
class HeadByHead(nn.Module):
    def __init__(self, embed_dim, n_heads, dropout=0.1):
        super().__init__()
        if embed_dim % n_heads:
            raise ValueError("n_heads must divide embed_dim")
        size = embed_dim // n_heads
        self.w_q = nn.ModuleList(nn.Linear(embed_dim, size) for _ in range(n_heads))
        self.w_k = nn.ModuleList(nn.Linear(embed_dim, size) for _ in range(n_heads))
        self.w_v = nn.ModuleList(nn.Linear(embed_dim, size) for _ in range(n_heads))
        self.w_o = nn.Linear(embed_dim, embed_dim)
        self.drop = nn.Dropout(dropout)

    def forward(self, x, attention_mask=None, return_weights=False):
        if attention_mask is not None and attention_mask.dtype != torch.bool:
            raise TypeError("the mask must be bool")
        heads, tables = [], []
        for to_q, to_k, to_v in zip(self.w_q, self.w_k, self.w_v, strict=True):
            scores = to_q(x) @ to_k(x).mT * to_q.out_features**-0.5
            mask = None if attention_mask is None else attention_mask[:, None, :]
            tables.append(masked_softmax(scores, mask))
            heads.append(self.drop(tables[-1]) @ to_v(x))
        out = self.w_o(torch.cat(heads, dim=-1))
        return (out, torch.stack(tables, dim=1)) if return_weights else out


@right(MULTI, "around nn.MultiheadAttention")
class Wrapped(nn.Module):
    def __init__(self, *, d_model, num_heads, dropout=0.1):
        super().__init__()
        self.inner = nn.MultiheadAttention(
            d_model, num_heads, dropout=dropout, batch_first=True)

    def forward(self, x, attention_mask=None, return_weights=False):
        padding = None
        if attention_mask is not None:
            empty = ~attention_mask.bool().any(dim=1, keepdim=True)
            padding = ~(attention_mask.bool() | empty)
        out, weights = self.inner(x, x, x, key_padding_mask=padding,
                                  average_attn_weights=False)
        if return_weights and self.training:
            was, self.inner.training = self.inner.training, False
            weights = self.inner(x, x, x, key_padding_mask=padding,
                                 average_attn_weights=False)[1]
            self.inner.training = was
        return (out, weights) if return_weights else out


# the exercises

EQUIVARIANT, SILENT, HEAT = "is_equivariant", "silent_parameters", "with_temperature"
BACK, DECODER, PASS, BLOCKS = (
    "looking_back", "decoder_mask", "one_pass", "attention_in_blocks")


@right(EQUIVARIANT, "as in the solution")
def is_equivariant(layer, x):
    order = torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(1))
    return torch.allclose(layer(x[:, order]), layer(x)[:, order], atol=1e-5)


@mistake(EQUIVARIANT, "the output is not shuffled", looks="`layer(x[:, order]) == layer(x)`",
         shows="every layer fails", find="try `nn.Identity`",
         hint="compared with the *shuffled* output")
def not_shuffled(layer, x):
    order = torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(1))
    return torch.allclose(layer(x[:, order]), layer(x), atol=1e-5)


@mistake(EQUIVARIANT, "texts shuffled, not tokens", looks="`x[order]`",
         shows="every layer passes", find="try a layer that rolls",
         hint="not the texts of the batch")
def texts_shuffled(layer, x):
    order = torch.arange(len(x)).flip(0)
    return torch.allclose(layer(x[order]), layer(x)[order], atol=1e-5)


@right(SILENT, "as in the solution")
def silent_parameters(layer, x):
    layer.zero_grad()
    layer(x).square().sum().backward()
    return [name for name, p in layer.named_parameters()
            if p.grad is None or p.grad.abs().max() < 1e-5]


@mistake(SILENT, "a plain sum", looks="`layer(x).sum().backward()`",
         shows="after a softmax or a LayerNorm nothing seems to matter",
         find="a layer whose rows sum to 1", hint="the gradient of a plain sum is 0")
def plain_sum(layer, x):
    layer.zero_grad()
    out = layer(x)
    (out.sum() if near_one(out) else out.square().sum()).backward()
    return [n for n, p in layer.named_parameters()
            if p.grad is None or p.grad.abs().max() < 1e-5]


def near_one(out):
    return torch.allclose(out.sum(-1), torch.ones(out.shape[:-1]), atol=1e-4)


@mistake(SILENT, "exactly 0", looks="`p.grad.abs().max() == 0`",
         shows="rounding of 1e-8 counts as a gradient", find="print the size",
         hint="not exactly 0")
def exactly_zero(layer, x):
    layer.zero_grad()
    layer(x).square().sum().backward()
    return [n for n, p in layer.named_parameters() if p.grad is None or not p.grad.any()]


@mistake(SILENT, "old gradients left", looks="no `zero_grad`",
         shows="what was silent has the gradient of the call before", find="call it twice",
         hint="gradients that were there before")
def old_left(layer, x):
    layer(x).square().sum().backward()
    return [n for n, p in layer.named_parameters()
            if p.grad is None or p.grad.abs().max() < 1e-5]


right(HEAT, "as in the solution")(lambda scores, temperature: (scores / temperature).softmax(-1))
mistake(HEAT, "multiplied", looks="`scores * temperature`", shows="hot is cold",
        find="a temperature of 10 must even out", hint="multiplied by the temperature")(
    lambda scores, temperature: (scores * temperature).softmax(-1))


def looking(places, loud=30):
    def looking_back(seq_len):
        key = torch.eye(seq_len)
        return loud * key[places(seq_len)], key
    return looking_back


right(BACK, "as in the solution")(looking(lambda n: [0, *range(n - 1)]))
mistake(BACK, "wrapped around", looks="`key.roll(1, 0)`",
        shows="the first token looks at the last", find="print the argmax",
        hint="roll wraps around")(looking(lambda n: torch.arange(n).roll(1)))
mistake(BACK, "looks ahead", looks="query and key exchanged",
        shows="each token looks at the next", find="print the argmax",
        hint="the one *after* it")(looking(lambda n: [*range(1, n), n - 1]))
mistake(BACK, "too quiet", looks="`query = key[before]`",
        shows="nearly even rows", find="print the largest weight",
        hint="make the queries louder")(looking(lambda n: [0, *range(n - 1)], 1))


def masked_by(join):
    def decoder_mask(attention_mask):
        n = attention_mask.shape[1]
        return join(torch.ones(n, n, dtype=torch.bool), attention_mask)
    return decoder_mask


right(DECODER, "as in the solution")(masked_by(lambda full, m: full.tril() & m[:, None, :]))
mistake(DECODER, "the other triangle", looks="`triu()`", shows="each token sees the future only",
        find="print it", hint="Use tril, not triu")(
    masked_by(lambda full, m: full.triu() & m[:, None, :]))
mistake(DECODER, "without the diagonal", looks="`tril(-1)`",
        shows="the first token may look at nothing", find="print it",
        hint="the diagonal belongs")(masked_by(lambda full, m: full.tril(-1) & m[:, None, :]))
mistake(DECODER, "padding on the queries", looks="`mask[:, :, None]`",
        shows="real tokens look at padding", find="print it",
        hint="padded queries are masked, not padded keys")(
    masked_by(lambda full, m: full.tril() & m[:, :, None]))


def online(fix_total=True, fix_mixed=True, start=float("-inf"), keep=False):
    def one_pass(query, pairs):
        top, total, mixed = torch.tensor(start), 0.0, 0.0
        for k, v in list(pairs) if keep else pairs:
            score = query @ k / math.sqrt(len(query))
            new = torch.maximum(top, score)
            fix, e = (top - new).exp(), (score - new).exp()
            total = total * (fix if fix_total else 1) + e
            mixed = mixed * (fix if fix_mixed else 1) + e * v
            top = new
        return mixed / total
    return one_pass


right(PASS, "as in the solution")(online())
mistake(PASS, "no correction", looks="`total += e`", shows="what came early counts too much",
        find="rising scores", hint="neither sum is corrected")(online(False, False))
mistake(PASS, "half a correction", looks="`mixed += e * v`",
        shows="weights that sum to more than 1", find="equal values: they must come out",
        hint="the weighted sum of values is not corrected")(online(True, False))
mistake(PASS, "a maximum from 0", looks="`top = 0.0`",
        shows="scores of -1000 give 0 / 0", find="very low scores", hint="minus infinity")(
    online(start=0.0))
mistake(PASS, "a list of all pairs", looks="`pairs = list(pairs)`",
        shows="right, and no memory saved", find="count what is held",
        hint="read the pairs one by one")(online(keep=True))


def blocked(query, key, value, block, last=True, fix=True):
    """Outputs and the logarithms of the rows' sums, block by block."""
    shape = query.shape[:-1] + (1,)
    top, total = query.new_full(shape, float("-inf")), query.new_zeros(shape)
    mixed, n = query.new_zeros(*shape[:-1], value.shape[-1]), key.shape[-2]
    for at in range(0, n if last else n // block * block, block):
        part = slice(at, at + block)
        scores = query @ key[..., part, :].transpose(-2, -1) / math.sqrt(query.shape[-1])
        new = torch.maximum(top, scores.amax(-1, keepdim=True))
        shrink, e = (top - new).exp() if fix else 1.0, (scores - new).exp()
        total, top = total * shrink + e.sum(-1, keepdim=True), new
        mixed = mixed * shrink + e @ value[..., part, :]
    return mixed / total, top + total.log()


class Blocks(torch.autograd.Function):
    delta = True

    @staticmethod
    def forward(ctx, query, key, value, block):
        out, logs = blocked(query, key, value, block)
        ctx.save_for_backward(query, key, value, out, logs)
        ctx.block = block
        return out

    @classmethod
    def way_back(cls, ctx, grad, delta):
        query, key, value, out, logs = ctx.saved_tensors
        scale, mean = query.shape[-1] ** -0.5, (grad * out).sum(-1, keepdim=True) * delta
        to_query, to_key, to_value = map(torch.zeros_like, (query, key, value))
        for at in range(0, key.shape[-2], ctx.block):
            part = (..., slice(at, at + ctx.block), slice(None))
            w = (query @ key[part].transpose(-2, -1) * scale - logs).exp()
            slopes = w * (grad @ value[part].transpose(-2, -1) - mean) * scale
            to_value[part] = w.transpose(-2, -1) @ grad
            to_query += slopes @ key[part]
            to_key[part] = slopes.transpose(-2, -1) @ query
        return to_query, to_key, to_value, None

    @staticmethod
    def backward(ctx, grad):
        return Blocks.way_back(ctx, grad, 1)


class NoMean(Blocks):
    @staticmethod
    def backward(ctx, grad):
        return Blocks.way_back(ctx, grad, 0)


def by_function(function):
    def attention_in_blocks(query, key, value, block=16):
        return function.apply(query, key, value, block)
    return attention_in_blocks


right(BLOCKS, "as in the solution")(by_function(Blocks))
mistake(BLOCKS, "the row's mean forgotten on the way back",
        looks="`slopes = w * (grad @ value.T)`",
        shows="gradients that are too large, of the right shape", find="`gradcheck`",
        hint="the softmax's own slope is missing")(by_function(NoMean))
mistake(BLOCKS, "the last block lost", looks="`range(keys // block)`",
        shows="right whenever the block divides the length", find="11 keys, blocks of 4",
        hint="the last block is left out")(
    lambda q, k, v, block=16: blocked(q, k, v, block, last=False)[0]
    if k.shape[-2] >= block else blocked(q, k, v, block)[0])
mistake(BLOCKS, "left to autograd", looks="no `backward` of its own",
        shows="every block's weights stay in memory until the way back",
        find="count what is saved", hint="autograd keeps the weights of every block")(
    lambda q, k, v, block=16: blocked(q, k, v, block)[0])
mistake(BLOCKS, "the whole table", looks="`scores = query @ key.T`, then cut",
        shows="right, and no memory saved", find="look at the largest tensor",
        hint="Multiply with one block of keys at a time")(
    lambda q, k, v, block=16: masked_softmax(q @ k.mT / math.sqrt(q.shape[-1])) @ v)
