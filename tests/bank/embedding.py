"""Mistakes with token vectors, positions and segments."""

import copy
import math

import torch
import torch.nn.functional as F
from torch import nn

from emoformer.embedding import Embedding
from tests.bank import mistake, right

TABLE, EMBED = "sinusoidal_positions", "Embedding"
ROWS = "print the first two rows: 0, 1, 0, 1, … and then sine and cosine of 1"
PARITY = "compare with `token.weight[ids]` plus the table, on random weights"


def waves(max_len, d_model, *, base=10_000, start=0, divisor=None, step=2, halves=False,
          sign=-1.0):
    """The table, or with one change."""
    if max_len < 1 or d_model < 2 or d_model % 2:
        raise ValueError("sizes!")
    position = torch.arange(start, start + max_len, dtype=torch.float64)[:, None]
    i = torch.arange(d_model // 2, dtype=torch.float64)
    angle = position * base ** (sign * step * i / (divisor or d_model))
    if halves:
        return torch.cat([angle.sin(), angle.cos()], dim=-1).float()
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1).float()


# sinusoidal_positions


@mistake(TABLE, "halves in place of pairs", looks="`torch.cat([sine, cosine], dim=-1)`",
         shows="trains as well; no table of others fits, and `rotation` mixes hands",
         find=ROWS, hint="all sines stand first")
def table_halves(max_len, d_model):
    return waves(max_len, d_model, halves=True)


@mistake(TABLE, "the 2 counted twice",
         looks="`2 * torch.arange(0, d_model, 2) / d_model`",
         shows="half of all hands hardly move", find=ROWS, hint="the exponent is doubled")
def table_doubled(max_len, d_model):
    return waves(max_len, d_model, step=4)


@mistake(TABLE, "the 2 forgotten", looks="`torch.arange(d_model // 2) / d_model`",
         shows="the slowest hand is a hundred times too fast", find=ROWS,
         hint="it lacks the 2")
def table_no_two(max_len, d_model):
    return waves(max_len, d_model, step=1)


@mistake(TABLE, "the exponent off by two", looks="`range(1, d_model // 2 + 1)`",
         shows="no fast hand: neighbours are hard to tell apart", find=ROWS,
         hint="off by two")
def table_off_by_two(max_len, d_model):
    waves(max_len, d_model)
    i = torch.arange(1, d_model // 2 + 1, dtype=torch.float64)
    angle = torch.arange(max_len)[:, None] * 10_000 ** (-2 * i / d_model)
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1).float()


@mistake(TABLE, "base 1000", looks="`1000 ** (-2 * i / d_model)`",
         shows="late places repeat sooner", find=ROWS, hint="the base is 1000,")
def table_base(max_len, d_model):
    return waves(max_len, d_model, base=1000)


@mistake(TABLE, "places from 1", looks="`torch.arange(1, max_len + 1)`",
         shows="trains as well; shifted by one against everybody else's",
         find="row 0 must be 0, 1, 0, 1", hint="counted from 1")
def table_from_one(max_len, d_model):
    return waves(max_len, d_model, start=1)


@mistake(TABLE, "the minus forgotten", looks="`10000 ** (2 * i / d_model)`",
         shows="wild numbers: no two neighbours look alike", find=ROWS,
         hint="a minus is missing")
def table_plus(max_len, d_model):
    return waves(max_len, d_model, sign=1.0)


@mistake(TABLE, "i counts columns", looks="`10000 ** (2 * j / d_model)` for each column j",
         shows="a cosine is slower than its sine, so a shift is no rotation",
         find="sine² + cosine² of a pair must be 1", hint="i counts columns instead of pairs")
def table_columns(max_len, d_model):
    table = waves(max_len, d_model)
    for p in range(max_len):
        for j in range(0, d_model, 2):
            table[p, j] = math.sin(p / 10_000 ** (2 * j / d_model))
            table[p, j + 1] = math.cos(p / 10_000 ** (2 * (j + 1) / d_model))
    return table


@mistake(TABLE, "sine and cosine changed", looks="`table[:, 0::2] = angle.cos()`",
         shows="trains as well; no table of others fits", find=ROWS,
         hint="sine and cosine have changed places")
def table_swapped(max_len, d_model):
    return waves(max_len, d_model).unflatten(1, (-1, 2)).flip(2).flatten(1)


@mistake(TABLE, "places as shares of the length", looks="`position / max_len`",
         shows="one step means something else for each max_len",
         find="a longer table must begin with the shorter one", hint="divided by max_len")
def table_shares(max_len, d_model):
    waves(max_len, d_model)
    i = torch.arange(d_model // 2, dtype=torch.float64)
    angle = torch.arange(max_len)[:, None] / max_len * 10_000 ** (-2 * i / d_model)
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1).float()


@mistake(TABLE, "in 16 bits", looks="`torch.arange(max_len, dtype=torch.bfloat16)`",
         shows="late places are the same place", find="count the different rows",
         hint="more digits")
def table_short(max_len, d_model):
    if max_len < 1 or d_model < 2 or d_model % 2:
        raise ValueError("sizes!")
    position = torch.arange(max_len).to(torch.bfloat16).double()[:, None]
    i = torch.arange(d_model // 2, dtype=torch.float64)
    angle = position * 10_000 ** (-2 * i / d_model)
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1).float()


@mistake(TABLE, "a batch axis", looks="`return table.unsqueeze(0)`",
         shows="nothing here; trouble where rows are taken, `table[:seq_len]`",
         find="print the shape", hint="has a batch axis")
def table_batch(max_len, d_model):
    return waves(max_len, d_model)[None]


@mistake(TABLE, "in float64", looks="no `.float()` at the end",
         shows="the whole model becomes float64, and slow", find="print the dtype",
         hint="must be float32")
def table_wide(max_len, d_model):
    return waves(max_len, d_model).double()


@mistake(TABLE, "an odd width accepted", looks="`table[:, 1::2] = cosine[:, :d_model // 2]`",
         shows="the last hand has no cosine", find="`d_model=7`", hint="a sine and no cosine")
def table_odd(max_len, d_model):
    if max_len < 1 or d_model < 1:
        raise ValueError("sizes!")
    return waves(max_len, d_model + d_model % 2)[:, :d_model]


@right(TABLE, "as in the Annotated Transformer")
def table_annotated(max_len, d_model):
    if max_len < 1 or d_model < 1:
        raise ValueError("sizes!")
    pe = torch.zeros(max_len, d_model)
    position = torch.arange(0, max_len).unsqueeze(1)
    div_term = torch.exp(torch.arange(0, d_model, 2) * -(math.log(10000.0) / d_model))
    pe[:, 0::2] = torch.sin(position * div_term)
    pe[:, 1::2] = torch.cos(position * div_term)
    return pe


@right(TABLE, "number by number")
def table_loop(max_len, d_model):
    assert max_len > 0 and d_model > 0 and d_model % 2 == 0
    return torch.tensor([
        [(math.sin, math.cos)[j % 2](p / 10_000 ** ((j - j % 2) / d_model))
         for j in range(d_model)] for p in range(max_len)
    ])


# Embedding


class Written(Embedding):
    """Our class in separate steps, each of which a mistake can replace."""

    def forward(self, input_ids, segment_ids=None):
        # Only for its refusals:
        super().forward(input_ids, segment_ids)
        x = self.tokens(input_ids)
        x = self.places(x, input_ids)
        if self.segment is not None:
            x = self.add_segments(x, input_ids, segment_ids)
        return self.finish(x, input_ids)

    def tokens(self, ids):
        return self.token(ids) * self.scale

    def rows(self):
        table = self.position.weight if self.positions == "learned" else self.table
        return table.to(self.token.weight.dtype)

    def places(self, x, ids):
        return x if self.positions == "none" else x + self.rows()[:ids.shape[1]]

    def add_segments(self, x, ids, segments):
        return x + self.segment(torch.zeros_like(ids) if segments is None else segments)

    def finish(self, x, ids):
        return x


right(EMBED, "step by step")(Written)


@mistake(EMBED, "positions not added", looks="`self.position` made, never used",
         shows="word order is invisible; the table gets no gradient",
         find="list parameters without a gradient", hint="the positions are not added")
class NoPlaces(Written):
    def places(self, x, ids):
        return x


@mistake(EMBED, "positions added twice", looks="`x += p` here and in the model again",
         shows="trains a little worse, without an error", find=PARITY,
         hint="the positions are added twice")
class PlacesTwice(Written):
    def places(self, x, ids):
        return super().places(super().places(x, ids), ids)


@mistake(EMBED, "positions by the batch", looks="`torch.arange(input_ids.shape[0])`",
         shows="an error for most shapes; for batch = seq_len, nonsense",
         find="another batch size", hint="place in the batch")
class PlacesByBatch(Written):
    def places(self, x, ids):
        return x if self.positions == "none" else x + self.rows()[:len(ids)][:, None]


@mistake(EMBED, "positions from 1", looks="`self.position(places + 1)`",
         shows="a text of max_len crashes; a loaded BERT is wrong", find=PARITY,
         hint="counted from 1")
class PlacesFromOne(Written):
    def places(self, x, ids):
        if self.positions == "none":
            return x
        return x + self.rows().roll(-1, 0)[:ids.shape[1]]


@mistake(EMBED, "one position for all", looks="`self.rows[seq_len - 1]`",
         shows="word order is invisible", find="the same token twice must give two vectors",
         hint="the vector of the last place")
class OnePlace(Written):
    def places(self, x, ids):
        return x if self.positions == "none" else x + self.rows()[ids.shape[1] - 1]


@mistake(EMBED, "no √d_model", looks="`self.token(ids) + table`",
         shows="places some 35 times as loud as tokens at the start", find=PARITY,
         hint="not multiplied by the root of d_model")
class NoScale(Written):
    def tokens(self, ids):
        return self.token(ids)


@mistake(EMBED, "√d_model with learned positions too", looks="`* math.sqrt(d_model)` always",
         shows="a loaded BERT is wrong", find=PARITY,
         hint="multiplied by the root of d_model here too")
class AlwaysScaled(Written):
    def tokens(self, ids):
        return self.token(ids) * math.sqrt(self.token.embedding_dim)


@mistake(EMBED, "positions scaled as well", looks="`(x + p) * math.sqrt(d_model)`",
         shows="the balance of token and place is as without", find=PARITY,
         hint="the positions are multiplied by the root of d_model as well")
class SumScaled(NoScale):
    def places(self, x, ids):
        return super().places(x, ids) * self.scale


@mistake(EMBED, "the table a plain attribute", looks="`self.table = sinusoidal_positions(…)`",
         shows="works on the CPU, stops on a GPU", find="`layer.to(\"meta\")`",
         hint="stays behind on the CPU")
class PlainTable(Embedding):
    def __init__(self, **arguments):
        super().__init__(**arguments)
        if self.positions == "sinusoidal":
            table = self.table
            del self.table
            self.table = table


@mistake(EMBED, "the table a parameter", looks="`self.table = nn.Parameter(…)`",
         shows="training changes the sines; every checkpoint holds them",
         find="list the parameters", hint="the sinusoidal table is a parameter")
class TrainedTable(Embedding):
    def __init__(self, **arguments):
        super().__init__(**arguments)
        if self.positions == "sinusoidal":
            table = self.table
            del self.table
            self.table = nn.Parameter(table)


@mistake(EMBED, "the table in float64", looks="`register_buffer(\"table\", table.double())`",
         shows="all that follows is float64, twice as slow", find="print `out.dtype`",
         hint="lifts everything")
class WideTable(Written):
    def __init__(self, **arguments):
        super().__init__(**arguments)
        if self.positions == "sinusoidal":
            self.table = self.table.double()

    def rows(self):
        return self.table if self.positions == "sinusoidal" else super().rows()


@mistake(EMBED, "places counted in 16 bits", looks="`torch.arange(n, dtype=x.dtype)`",
         shows="in bfloat16 place 300 and place 301 are one",
         find="count the different rows in bfloat16", hint="late places are mixed up")
class CountedShort(Written):
    def rows(self):
        if self.positions == "learned":
            return super().rows()
        dtype, d = self.token.weight.dtype, self.token.embedding_dim
        places = torch.arange(self.max_len, dtype=dtype, device=self.token.weight.device)
        i = torch.arange(0, d, 2, device=places.device)
        angle = places[:, None] * (10_000 ** (-i / d)).to(dtype)
        return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1).to(dtype)


@mistake(EMBED, "padding zeroed", looks="`x * (input_ids != 0)[..., None]`",
         shows="[PAD] loses its row and its place; the mask has to do that",
         find=PARITY, hint="the vectors of id 0 are set to zero")
class PaddingZeroed(Written):
    def finish(self, x, ids):
        return x * (ids != 0)[..., None]


@mistake(EMBED, "one row too many", looks="`nn.Embedding(vocab_size + 1, d_model)`",
         shows="checkpoints of others don't load", find="print the shapes in `state_dict`",
         hint="look at the sizes")
class RowTooMany(Embedding):
    def __init__(self, *, vocab_size, **arguments):
        super().__init__(vocab_size=vocab_size, **arguments)
        self.token = nn.Embedding(vocab_size + 1, self.token.embedding_dim)


@mistake(EMBED, "the wrong padding_idx", looks="`nn.Embedding(…, padding_idx=1)`",
         shows="one token never learns", find="list rows without a gradient",
         hint="look for padding_idx")
class WrongPadding(Embedding):
    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.token.padding_idx = 1


@mistake(EMBED, "norm inside", looks="`return self.norm(x)`",
         shows="chapter 07 norms once more; a loaded BERT fits still", find="list the parameters",
         hint="it holds a norm")
class NormInside(Written):
    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.norm = nn.LayerNorm(self.token.embedding_dim)

    def finish(self, x, ids):
        return self.norm(x)


@mistake(EMBED, "dropout inside", looks="`return self.dropout(x)`",
         shows="dropped twice, since the model does it as well",
         find="compare `train()` and `eval()`", hint="twice is too much")
class DropoutInside(Written):
    def finish(self, x, ids):
        return F.dropout(x, 0.1, self.training)


@mistake(EMBED, "no segment when none is given", looks="`if segment_ids is not None: …`",
         shows="BERT's vectors are off by one row for every single text",
         find="compare with a row of zeros", hint="so row 0 is added")
class NoSegment(Written):
    def add_segments(self, x, ids, segments):
        return x if segments is None else x + self.segment(segments)


@mistake(EMBED, "segments ignored", looks="`self.segment(torch.zeros_like(input_ids))`",
         shows="pairs look like single texts", find="two different segment_ids",
         hint="every token gets segment 0")
class SegmentsIgnored(Written):
    def add_segments(self, x, ids, segments):
        return x + self.segment(torch.zeros_like(ids))


@mistake(EMBED, "too long a text accepted", looks="no check of seq_len",
         shows="with \"none\" nothing; with \"learned\" an error from deep inside",
         find="max_len + 1 tokens", hint="must be refused by a ValueError when max_len")
class TooLong(Embedding):
    def forward(self, input_ids, segment_ids=None):
        if self.positions == "none" and input_ids.ndim == 2:
            return self.token(input_ids) if self.segment is None else super().forward(
                input_ids, segment_ids)
        return super().forward(input_ids, segment_ids)


@mistake(EMBED, "≥ for >", looks="`if seq_len >= max_len: raise …`",
         shows="the longest texts are refused", find="a text of exactly max_len tokens",
         hint="one of exactly max_len tokens does not")
class OneTooShort(Embedding):
    def forward(self, input_ids, segment_ids=None):
        if input_ids.ndim == 2 and input_ids.shape[1] >= self.max_len:
            raise ValueError("too long")
        return super().forward(input_ids, segment_ids)


@mistake(EMBED, "places made on the CPU", looks="`self.position(torch.arange(seq_len))`",
         shows="works on the CPU, stops on a GPU", find="`layer.to(\"meta\")`, or a GPU",
         hint="torch.arange needs device")
class PlacesOnCpu(Written):
    def places(self, x, ids):
        if self.positions != "learned":
            return super().places(x, ids)
        return x + self.position(torch.arange(ids.shape[1], device="cpu"))


@mistake(EMBED, "another default", looks="`positions=\"sinusoidal\"` in the constructor",
         shows="nobody asked for it, and a loaded BERT doesn't fit",
         find="make one without the argument", hint="look at the default")
class OtherDefault(Embedding):
    def __init__(self, *, vocab_size, d_model, max_len, positions="sinusoidal",
                 num_segments=0):
        super().__init__(vocab_size=vocab_size, d_model=d_model, max_len=max_len,
                         positions=positions, num_segments=num_segments)


@mistake(EMBED, "an unknown kind passes for none", looks="`if positions == \"learned\": …`",
         shows="a typing error trains a bag of words", find="`positions=\"Learned\"`",
         hint="a typing error would pass")
class AnyKind(Embedding):
    def __init__(self, *, positions="learned", **arguments):
        known = ("learned", "sinusoidal", "none")
        super().__init__(
            positions=positions if positions in known else "none", **arguments)


@mistake(EMBED, "ids converted", looks="`input_ids.long()`",
         shows="scores in place of ids pass for tokens", find="pass floating numbers",
         hint="2.7 becomes token 2")
class Converted(Embedding):
    def forward(self, input_ids, segment_ids=None):
        return super().forward(input_ids.long(), segment_ids)


@right(EMBED, "lookups of arange, a saved table")
class ByArange(nn.Module):
    def __init__(self, vocab_size, d_model, max_len, positions="learned", num_segments=0):
        super().__init__()
        if min(vocab_size, d_model, max_len) < 1 or num_segments < 0:
            raise ValueError("sizes!")
        if positions not in ("learned", "sinusoidal", "none"):
            raise ValueError("positions!")
        self.kind, self.max_len = positions, max_len
        self.tok_emb = nn.Embedding(vocab_size, d_model, padding_idx=0)
        if positions == "learned":
            self.pos_emb = nn.Embedding(max_len, d_model)
        if positions == "sinusoidal":
            self.register_buffer("pe", table_annotated(max_len, d_model)[None])
        if num_segments:
            self.seg_emb = nn.Embedding(num_segments, d_model)
        self.num_segments = num_segments

    def forward(self, ids, token_type_ids=None):
        batch, n = ids.shape
        if n > self.max_len:
            raise ValueError("too long")
        x = self.tok_emb(ids)
        if self.kind == "learned":
            places = torch.arange(n, device=ids.device).unsqueeze(0).expand(batch, n)
            x = x + self.pos_emb(places)
        if self.kind == "sinusoidal":
            x = x * x.shape[-1] ** 0.5 + self.pe[:, :n]
        if token_type_ids is not None:
            if not self.num_segments or token_type_ids.shape != ids.shape:
                raise ValueError("segments!")
        if self.num_segments:
            x = x + self.seg_emb(ids * 0 if token_type_ids is None else token_type_ids)
        return x


@right(EMBED, "one-hot products, own parameters, a table made in each call")
class ByOneHot(nn.Module):
    def __init__(self, *, vocab_size, d_model, max_len, positions="learned",
                 num_segments=0):
        super().__init__()
        assert min(vocab_size, d_model, max_len) > 0 and num_segments >= 0
        assert positions in ("learned", "sinusoidal", "none")
        assert positions != "sinusoidal" or d_model % 2 == 0
        self.kind, self.max_len, self.segments = positions, max_len, num_segments
        self.lookup = nn.Linear(vocab_size, d_model, bias=False)
        if positions == "learned":
            self.places = nn.Parameter(torch.zeros(1, max_len, d_model))
        if num_segments:
            self.which = nn.Parameter(torch.randn(num_segments, d_model))

    def forward(self, input_ids, segment_ids=None):
        if input_ids.dtype != torch.int64:
            raise TypeError("ids!")
        if input_ids.ndim != 2 or input_ids.shape[1] > self.max_len:
            raise ValueError("ids!")
        weight = self.lookup.weight
        codes = torch.arange(weight.shape[1], device=input_ids.device)
        x = self.lookup((input_ids[..., None] == codes).to(weight.dtype))
        n, d = x.shape[1:]
        if self.kind == "learned":
            x = x + self.places[:, :n]
        if self.kind == "sinusoidal":
            p = torch.arange(n, device=x.device, dtype=torch.float32)[:, None]
            w = 10_000 ** (-torch.arange(0, d, 2, device=x.device) / d)
            table = torch.stack([(p * w).sin(), (p * w).cos()], dim=-1).flatten(1)
            x = math.sqrt(d) * x + table.to(x.dtype)
        if segment_ids is not None and (
            not self.segments or segment_ids.shape != input_ids.shape
        ):
            raise ValueError("segments!")
        if self.segments:
            x = x + (self.which[0] if segment_ids is None else self.which[segment_ids])
        return x


@right(EMBED, "one tall table")
class Tall(Embedding):
    def __init__(self, *, vocab_size, d_model, max_len, positions="learned",
                 num_segments=0):
        super().__init__(vocab_size=vocab_size, d_model=d_model, max_len=max_len,
                         positions=positions, num_segments=num_segments)
        self.token = self.position = self.segment = None
        self.starts = vocab_size, vocab_size + max_len * (positions == "learned")
        self.num_segments = num_segments
        self.all = nn.Embedding(self.starts[1] + num_segments, d_model)

    def forward(self, input_ids, segment_ids=None):
        if input_ids.dtype != torch.int64:
            raise TypeError("ids!")
        if input_ids.ndim != 2 or input_ids.shape[1] > self.max_len:
            raise ValueError("ids!")
        x = self.all(input_ids) * self.scale
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        if self.positions == "learned":
            x = x + self.all(places + self.starts[0])
        if self.positions == "sinusoidal":
            x = x + self.table[places]
        if segment_ids is not None and (
            not self.num_segments or segment_ids.shape != input_ids.shape
        ):
            raise ValueError("segments!")
        if self.num_segments:
            x = x + self.all(self.starts[1] + (
                torch.zeros_like(input_ids) if segment_ids is None else segment_ids))
        return x


# Exercises


@mistake("tokens_per_turn", "per radian", looks="`1 / speed`",
         shows="six times too few tokens", find="hand 0 needs a bit more than 6",
         hint="a full turn is 2π")
def turns_radian(d_model):
    return 10_000 ** (torch.arange(0, d_model, 2) / d_model)


@mistake("tokens_per_turn", "2π times the speed", looks="`2 * math.pi * speed`",
         shows="slow hands seem fast", find="the last hand needs the most",
         hint="divide by it")
def turns_times(d_model):
    return 2 * math.pi * 10_000 ** (-torch.arange(0, d_model, 2) / d_model)


@mistake("table_gradient", "each row written once", looks="`table[input_ids] += slopes`",
         shows="a token that stands twice learns from one of its places",
         find="the ids 3, 3, 3 with slopes of 1", hint="write each row once")
def gradient_once(input_ids, slopes, vocab_size):
    table = torch.zeros(vocab_size, slopes.shape[-1])
    table[input_ids.flatten()] += slopes.flatten(0, 1)
    return table


@right("table_gradient", "by the one-hot product")
def gradient_one_hot(input_ids, slopes, vocab_size):
    hot = F.one_hot(input_ids, vocab_size).to(slopes.dtype)
    return torch.einsum("btv,btd->vd", hot, slopes)


@right("table_gradient", "a loop")
def gradient_loop(input_ids, slopes, vocab_size):
    table = torch.zeros(vocab_size, slopes.shape[-1])
    for i, row in zip(input_ids.flatten().tolist(), slopes.flatten(0, 1), strict=True):
        table[i] += row
    return table


def turned(rows, k):
    d = rows.shape[-1]
    angle = k * 10_000 ** (-torch.arange(0, d, 2) / d)
    sine, cosine = rows[..., 0::2], rows[..., 1::2]
    s, c = angle.sin(), angle.cos()
    return torch.stack([sine * c + cosine * s, cosine * c - sine * s], dim=-1).flatten(-2)


@mistake("turn_back", "turned forward", looks="`rows @ rotation(k, d_model)`",
         shows="place p becomes p + k", find="k = 1 on the second row gives the first",
         hint="it turns forward")
def back_forward(rows, k):
    return turned(rows, k)


@right("turn_back", "by block matrices")
def back_blocks(rows, k):
    d = rows.shape[-1]
    blocks = []
    for i in range(d // 2):
        a = k * 10_000 ** (-2 * i / d)
        blocks.append(torch.tensor([[math.cos(a), math.sin(a)], [-math.sin(a), math.cos(a)]]))
    return rows @ torch.block_diag(*blocks)


def ones_at(input_ids, segment_ids, *starts, vocab_size, max_len, num_segments):
    places = torch.arange(input_ids.shape[1]).expand_as(input_ids)
    total = vocab_size + max_len + num_segments
    return sum(F.one_hot(s + c, total) for s, c in zip(
        starts, (input_ids, places, segment_ids), strict=True)).float()


@mistake("three_hot", "the segments right after the tokens",
         looks="`vocab_size + segment_ids`", shows="places 0 and 1 take the segments' part",
         find="multiply by the tall matrix", hint="the position table is in between")
def hot_segments(input_ids, segment_ids, *, vocab_size, max_len, num_segments):
    return ones_at(input_ids, segment_ids, 0, vocab_size, vocab_size,
                   vocab_size=vocab_size, max_len=max_len, num_segments=num_segments)


@right("three_hot", "by sums of one-hots")
def hot_right(input_ids, segment_ids, *, vocab_size, max_len, num_segments):
    return ones_at(input_ids, segment_ids, 0, vocab_size, vocab_size + max_len,
                   vocab_size=vocab_size, max_len=max_len, num_segments=num_segments)


@mistake("not_restored", "only the state_dict is looked at",
         looks="`for name in model.state_dict()`", shows="the one table that is lost is not seen",
         find="list the buffers as well", hint="it finds nothing")
def restored_saved(model):
    model = copy.deepcopy(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.to(torch.bfloat16).float().load_state_dict(before)
    return {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}


@mistake("not_restored", "the model itself is sent through",
         looks="`model.to(torch.bfloat16)` without a copy",
         shows="whoever passed it has lost digits", find="compare before and after",
         hint="copy.deepcopy")
def restored_itself(model):
    before = {k: v.clone() for k, v in [*model.named_parameters(), *model.named_buffers()]}
    saved = {k: v.clone() for k, v in model.state_dict().items()}
    model.to(torch.bfloat16).float().load_state_dict(saved)
    after = [*model.named_parameters(), *model.named_buffers()]
    return {k for k, v in after if not torch.equal(v, before[k])}


@right("not_restored", "on a copy, as a list")
def restored_list(model):
    twin = copy.deepcopy(model)
    twin.bfloat16().float().load_state_dict(model.state_dict())
    old = dict([*model.named_parameters(), *model.named_buffers()])
    return [k for k, v in [*twin.named_parameters(), *twin.named_buffers()]
            if not torch.equal(v, old[k])]


@mistake("unmix", "the nearest token first", looks="`torch.cdist(x, token_table).argmin(1)`",
         shows="wrong wherever the place is louder than the token",
         find="make the positions larger", hint="without a place")
def unmix_greedy(x, token_table, position_table):
    tokens = torch.cdist(x, token_table).argmin(1)
    return tokens, torch.cdist(x - token_table[tokens], position_table).argmin(1)


@mistake("unmix", "divided by the wrong size", looks="`best // max_len`",
         shows="numbers that look like tokens and are not", find="a text of one token",
         hint="taken apart by the wrong size")
def unmix_sizes(x, token_table, position_table):
    rest = x[:, None] - position_table
    best = torch.cdist(rest, token_table).flatten(1).argmin(1)
    return best % len(position_table), best // len(position_table)


@right("unmix", "by all sums")
def unmix_sums(x, token_table, position_table):
    sums = (token_table[:, None] + position_table).flatten(0, 1)
    best = torch.cdist(x, sums).argmin(1)
    return best // len(position_table), best % len(position_table)


def rotated(x, sign=1.0, axis=-2):
    n, d = x.shape[axis], x.shape[-1]
    places = torch.arange(n, dtype=torch.float64)[:, None]
    angle = sign * places * 10_000 ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
    s, c = angle.sin().to(x.dtype), angle.cos().to(x.dtype)
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack([a * c + b * s, b * c - a * s], dim=-1).flatten(-2)


@mistake("rotary", "the pairs come out apart", looks="`torch.cat([first, second], dim=-1)`",
         shows="dot products are right, each number stands elsewhere",
         find="compare with `x[p] @ rotation(p, d)`", hint="come out apart")
def rotary_cat(x):
    out = rotated(x)
    return torch.cat([out[..., 0::2], out[..., 1::2]], dim=-1)


@mistake("rotary", "turned the other way", looks="`rotation(-p, d)`",
         shows="works alone; no weights of others fit", find="as above",
         hint="it turns the other way")
def rotary_other(x):
    return rotated(x, -1.0)


@right("rotary", "by complex numbers")
def rotary_complex(x):
    n, d = x.shape[-2:]
    speeds = 10_000 ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
    angle = torch.arange(n).double()[:, None] * speeds
    turn = torch.polar(torch.ones_like(angle), -angle)
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)


def trained_reader(positions, *, bend=True, steps=150):
    generator = torch.Generator().manual_seed(7)
    texts = torch.rand(4000, 5, generator=generator).argsort(1)
    labels = (texts.eq(0).float().argmax(1) < texts.eq(1).float().argmax(1)).float()
    with torch.random.fork_rng():
        torch.manual_seed(7)
        embedding = Embedding(vocab_size=5, d_model=32, max_len=5, positions=positions)
        last = nn.Linear(32, 1)

    def read(ids):
        x = embedding(ids)
        return last((x.square() if bend else x).mean(1))[:, 0]

    optimizer = torch.optim.Adam([*embedding.parameters(), *last.parameters()], lr=0.03)
    for _ in range(steps):
        rows = torch.randint(3000, (128,), generator=generator)
        loss = F.binary_cross_entropy_with_logits(read(texts[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        right_ = (read(texts[3000:]) > 0) == labels[3000:].bool()
    return right_.float().mean().item()


@mistake("order_accuracy", "the mean without a bend", looks="`embedding(ids).mean(1)`",
         shows="0.5 for all three kinds", find="the sum of sums, in the text",
         hint="is there a bend")
def order_flat(positions):
    return trained_reader(positions, bend=False, steps=60)


@mistake("order_accuracy", "in percent", looks="`100 * accuracy`",
         shows="a number that no band fits", find="a share lies between 0 and 1",
         hint="is it in percent")
def order_percent(positions):
    return 100 * trained_reader(positions, steps=20)


@right("order_accuracy", "a square before the mean")
def order_square(positions):
    return trained_reader(positions)
