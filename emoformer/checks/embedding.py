"""Checks for chapter 03: token vectors, positions, segments."""

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
    expect_tensor,
    expect_to_move,
    explain,
    near,
    sample,
)

LOG = math.log(10_000)


def refused(subject, call, hint):
    """Refuse code that lets bad input through; any exception of theirs will do."""
    try:
        call()
    except Broke:
        if isinstance(subject.last_error, NotImplementedError):
            raise
        return
    raise Wrong(hint)


# The sinusoidal table, right and wrong, in float64


def waves(places, speeds, *, cosine_speeds=None, layout="pairs", first=torch.sin,
          second=torch.cos):
    """Sines and cosines of places times speeds."""
    places = places.double()[:, None]
    sine = first(places * speeds)
    cosine = second(places * (speeds if cosine_speeds is None else cosine_speeds))
    if layout == "halves":
        return torch.cat([sine, cosine], dim=-1)
    return torch.stack([sine, cosine], dim=-1).flatten(1)


def table_of(max_len, d_model, **changes):
    """The right table, or with one change to `waves`."""
    i = torch.arange(d_model // 2, dtype=torch.float64)
    arguments = {"places": torch.arange(max_len),
                 "speeds": torch.exp(-LOG * 2 * i / d_model)}
    return waves(**(arguments | changes))


def table_causes(max_len, d_model):
    """Pairs of a hint and a function that gives the table with that mistake."""
    half = d_model // 2
    i = torch.arange(half, dtype=torch.float64)
    p = torch.arange(max_len)

    def speed(exponent, base=10_000):
        return base ** -exponent

    right = speed(2 * i / d_model)
    causes = []

    def add(hint, **changes):
        causes.append((hint, lambda: table_of(max_len, d_model, **changes)))

    halves = ("all sines stand first and then all cosines: they must alternate, sine "
              "in column 2i and cosine in column 2i + 1 (table[:, 0::2], "
              "table[:, 1::2])")
    swapped = ("sine and cosine have changed places: column 2i is the sine, column "
               "2i + 1 the cosine")
    add(swapped, first=torch.cos, second=torch.sin)
    add(halves, layout="halves")
    add("all cosines stand first and then all sines: they must alternate, sine in "
        "column 2i and cosine in column 2i + 1",
        layout="halves", first=torch.cos, second=torch.sin)
    add("both columns of a pair are sines: the second is the cosine",
        second=torch.sin)
    add("both columns of a pair are cosines: the first is the sine",
        first=torch.cos)
    add("the sine's sign is wrong: the angle must be positive",
        first=lambda a: -a.sin())
    add("the cosine's sign is wrong", second=lambda a: -a.cos())
    exponents = [
        ("the exponent is i / d_model: it lacks the 2 of 2i / d_model, so the "
         "slowest hand is much too fast", i / d_model),
        ("the exponent is doubled: i counts the pairs, and 2i / d_model is the "
         "exponent. With arange(0, d_model, 2) the 2 is in already",
         4 * i / d_model),
        ("the exponent is off by two: the pairs are counted from 1 (or d_model is "
         "not the divisor's start), but the first hand must have exponent 0 and "
         "turn by 1 radian a step", 2 * (i + 1) / d_model),
        ("the exponent is off by one: 2i + 1 in place of 2i", (2 * i + 1) / d_model),
        ("the exponent is off by one: 2i - 1 in place of 2i", (2 * i - 1) / d_model),
        ("the speeds run from 1 to exactly 1/10000, as in the authors' code: the "
         "paper's formula divides 2i by d_model, not by d_model - 2",
         2 * i / max(d_model - 2, 1)),
        ("the exponent is 2i / (d_model - 1): divide by d_model",
         2 * i / (d_model - 1)),
        ("the exponent is 2i / (d_model + 1): divide by d_model",
         2 * i / (d_model + 1)),
        ("the exponent divides by max_len: it must be d_model", 2 * i / max_len),
        ("the exponent is 2i: it is not divided by d_model", 2 * i),
        ("the exponent is i: it must be 2i / d_model", i),
        ("all hands turn at the same speed: the exponent does not depend on the "
         "column", 0 * i),
        ("the hands stand in reverse order: the first pair must turn fastest",
         2 * i.flip(0) / d_model),
        ("the exponent is rounded to a whole number: look for // or int",
         (2 * i / d_model).floor()),
    ]
    for hint, exponent in exponents:
        add(hint, speeds=speed(exponent))
        add(f"{halves}. And {hint}", speeds=speed(exponent), layout="halves")
    add("the angle is multiplied by 10000^(2i / d_model), not divided by it: a minus "
        "is missing in the exponent", speeds=speed(-2 * i / d_model))
    for base in (1000, 100_000, 100, 10, 1_000_000, 500_000, 1024, 2, math.e):
        add(f"the base is {base:.5g}, not 10000: count the zeros",
            speeds=speed(2 * i / d_model, base))
    add("each column has a speed of its own: the cosine must have the same angle as "
        "its sine. In 2i / d_model the i counts pairs, not columns",
        speeds=speed(2 * i / d_model), cosine_speeds=speed((2 * i + 1) / d_model))
    add("i counts columns instead of pairs: the exponent of column j is 2j / d_model "
        "here, so the hands slow down twice as fast and a cosine is slower than its "
        "sine. Columns 2i and 2i + 1 share the exponent 2i / d_model",
        speeds=speed(4 * i / d_model), cosine_speeds=speed((4 * i + 2) / d_model))
    add("each column has a speed of its own, and the cosine runs ahead of its sine: "
        "both take 2i / d_model",
        speeds=right, cosine_speeds=speed((2 * i + 2) / d_model))
    add("each column has a speed of its own: the cosine's exponent is off by one",
        speeds=right, cosine_speeds=speed((2 * i - 1) / d_model))
    for hint, places in (
        ("the places are counted from 1: the first is 0", p + 1),
        ("the places are counted from 2: the first is 0", p + 2),
        ("the places are counted from -1: the first is 0", p - 1),
        ("the places are counted backwards", p.flip(0)),
        ("the places run in the wrong direction: -p in place of p", -p),
        ("the places are divided by max_len: then a step means something else in "
         "each table", p / max_len),
        ("the places are divided by max_len - 1: then a step means something else "
         "in each table", p / max(max_len - 1, 1)),
        ("the angle is multiplied by 2π: a hand turns by ω radians in a step, "
         "not by ω turns", 2 * math.pi * p),
        ("the angle is multiplied by π", math.pi * p),
        ("the angle is taken as degrees: sine and cosine count in radians",
         p * math.pi / 180),
        ("every row is the first place's: the places are not used", 0 * p),
    ):
        add(hint, places=places)
        add(f"{halves}. And {hint}", places=places, layout="halves")
    wide = torch.arange(d_model, dtype=torch.float64)
    causes += [
        ("the angle is rounded down: look for // in place of /",
         lambda: torch.stack([
             (p[:, None] // (1 / right)).sin(), (p[:, None] // (1 / right)).cos()
         ], dim=-1).flatten(1)),
        ("only sines are there: the odd columns are still 0",
         lambda: table_of(max_len, d_model, second=torch.zeros_like)),
        ("only cosines are there: the even columns are still 0",
         lambda: table_of(max_len, d_model, first=torch.zeros_like)),
        ("these are the angles: sine and cosine are missing",
         lambda: table_of(max_len, d_model, first=lambda a: a, second=lambda a: a)),
        ("the table is empty (zeros): it is made and never filled",
         lambda: torch.zeros(max_len, d_model)),
        ("all columns are sines, each with a speed of its own",
         lambda: (p[:, None] * speed(wide / d_model)).sin()),
        ("all columns are sines, each with a speed of its own",
         lambda: (p[:, None] * speed(2 * wide / d_model)).sin()),
        ("the table is multiplied by the root of d_model: that belongs to the token "
         "vectors", lambda: table_of(max_len, d_model) * math.sqrt(d_model)),
        ("the table is divided by the root of d_model: its values are sines and "
         "cosines as they are",
         lambda: table_of(max_len, d_model) / math.sqrt(d_model)),
        ("the rows are scaled to length 1: values are sines and cosines as they are",
         lambda: F.normalize(table_of(max_len, d_model), dim=-1)),
        ("sine and cosine alternate along the places (rows), not along the columns",
         lambda: torch.where(
             (p % 2 == 0)[:, None],
             (p[:, None] * right).repeat_interleave(2, 1).sin(),
             (p[:, None] * right).repeat_interleave(2, 1).cos())),
    ]
    return causes


def diagnose(table, d_model):
    """Say where a table leaves the formula."""
    table = table.detach().double()
    wanted = table_of(len(table), d_model)
    if not near(table[0], wanted[0]):
        return ("row 0 must be 0, 1, 0, 1, … (every hand at twelve: sine 0, cosine 1), "
                f"but it is {[round(v, 3) for v in table[0].tolist()]}")
    if len(table) > 1:
        sine, cosine = table[1, 0::2], table[1, 1::2]
        turned = torch.atan2(sine, cosine)
        right = torch.exp(-LOG * torch.arange(0, d_model, 2) / d_model).double()
        if d_model > 2 and 0 < turned[1] < 1:
            base = float(turned[1]) ** (-d_model / 2)
            if near(turned, base ** (-torch.arange(0, d_model, 2) / d_model), 1e-3):
                return f"the hands turn as if the base were {base:.5g}, not 10000"
        for i in range(d_model // 2):
            if not near(torch.stack([sine[i], cosine[i]]), wanted[1, 2 * i:2 * i + 2]):
                return (f"from place 0 to place 1, hand {i} (columns {2 * i} and "
                        f"{2 * i + 1}) turns by {turned[i]:.4g} radians, but it must "
                        f"turn by 10000^(-{2 * i}/{d_model}) = {right[i]:.4g}")
    row = next((r for r in range(len(table)) if not near(table[r], wanted[r])), 0)
    return (f"row {row} is the first that is wrong: hand i must have turned by {row} "
            "times its speed 10000^(-2i / d_model)")


def expect_table(table, max_len, d_model):
    """Refuse what does not look like a table of positions."""
    if isinstance(table, torch.Tensor):
        shape = tuple(table.shape)
        expect(
            shape != (d_model, max_len) or max_len == d_model,
            f"the table is transposed: it has the shape {shape}, and it must have a "
            f"row for each place and a column for each number, {(max_len, d_model)}",
        )
        expect(
            shape not in ((1, max_len, d_model), (max_len, 1, d_model)),
            f"the table has a batch axis, {shape}: it is the same for every text, "
            f"so its shape is {(max_len, d_model)} and broadcasting does the rest",
        )
    expect_tensor(table, (max_len, d_model), what="the table")
    expect(
        table.dtype == torch.float32,
        f"the table must be float32, but it is {table.dtype}: compute in whatever "
        "you like, and round once at the end",
    )
    expect(
        not table.requires_grad,
        "the table requires a gradient: it is computed, and nothing in it is to be "
        "trained. Return a plain tensor, not an nn.Parameter",
    )


sinusoid = Battery(
    "sinusoidal_positions",
    "sinusoidal_positions(max_len, d_model) -> (max_len, d_model) float32",
    chapter=3, takes=("max_len", "d_model"),
)


@sinusoid.property("is a float32 table with a row for each place")
def sinusoid_shape(function):
    for max_len, d_model in ((7, 10), (1, 2), (4, 12)):
        expect_table(function(max_len, d_model), max_len, d_model)


@sinusoid.property("is the formula: sine, cosine, sine, cosine, …")
def sinusoid_formula(function):
    for max_len, d_model in ((7, 10), (13, 4), (3, 2), (40, 6)):
        table = function(max_len, d_model)
        expect_tensor(table, (max_len, d_model), what="the table")
        explain(
            table, table_of(max_len, d_model), table_causes(max_len, d_model),
            f"for max_len={max_len} and d_model={d_model}: "
            + diagnose(table, d_model),
            tolerance=3e-5,
        )


@sinusoid.property("a longer table begins with the shorter one")
def sinusoid_prefix(function):
    short, long = function(5, 8), function(50, 8)
    expect_tensor(short, (5, 8), what="the table")
    expect_tensor(long, (50, 8), what="the table")
    expect(
        near(long[:5], short),
        "place 3 has another vector in a longer table: the vector of a place must not "
        "depend on max_len. Look for a division by max_len, or places counted from "
        "the end",
    )
    expect(
        near(function(5, 8), short),
        "the second call gives another table than the first: nothing here is drawn by "
        "chance, and nothing may be kept between calls",
    )


@sinusoid.property("is still right at late places")
def sinusoid_late(function):
    table = function(1500, 4)
    expect_tensor(table, (1500, 4), what="the table")
    expect(
        near(table, table_of(1500, 4), 3e-3),
        "early places are right and late ones are not: 1,000 places need more digits "
        "than 16-bit numbers have, and a sum of many small steps drifts. Multiply the "
        "place by the speed in float32 or float64" if near(
            table[:7], table_of(7, 4), 1e-2) else
        "early places are wrong as well; mend the formula first",
    )


@sinusoid.property("refuses an odd width, and a table without rows")
def sinusoid_refuses(function):
    function(3, 4)
    refused(
        function, lambda: function(4, 7),
        "d_model=7 must be refused by a ValueError: the last hand would have a sine "
        "and no cosine. It returns a table instead",
    )
    for max_len, d_model, name in ((0, 4, "max_len"), (-1, 4, "max_len"), (4, 0, "d_model")):
        refused(
            function, lambda m=max_len, d=d_model: function(m, d),
            f"{name}={min(max_len, d_model)} must be refused by a ValueError, but it "
            "goes through and gives an empty table: the mistake would show far away",
        )


# Embedding

embed = Battery(
    "Embedding",
    'Embedding(*, vocab_size, d_model, max_len, positions="learned", num_segments=0), '
    "called with (input_ids, segment_ids=None)",
    chapter=3, makes=("vocab_size", "d_model", "max_len", "positions", "num_segments"),
    takes=("input_ids", "segment_ids"),
)
V, D, L, S = 11, 6, 9, 2  # vocab_size, d_model, max_len, num_segments
IDS = torch.tensor([[1, 7, 7, 3, 8], [4, 0, 2, 7, 5], [8, 6, 0, 1, 3]])
SEGMENTS = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 0, 1], [1, 0, 1, 0, 0]])
# As many texts as tokens: mixed-up axes go unnoticed by shapes here.
SQUARE = torch.tensor([[1, 7, 7, 3, 8], [4, 0, 2, 7, 5], [8, 6, 0, 1, 3],
                       [2, 2, 5, 4, 6], [3, 8, 1, 0, 7]])
KINDS = ("none", "learned", "sinusoidal")
ROOT = math.sqrt(D)


def build(layer, positions="learned", num_segments=0, **changes):
    """Make the reader's embedding."""
    if "positions" in layer.lacks and positions != "learned":
        raise Wrong(
            "it takes no argument positions, and it must know three kinds. The "
            "expected signature is " + embed.signature
        )
    if "num_segments" in layer.lacks and num_segments:
        raise Wrong(
            "it takes no argument num_segments. The expected signature is "
            + embed.signature
        )
    arguments = {"vocab_size": V, "d_model": D, "max_len": L} | changes
    return layer.make(positions=positions, num_segments=num_segments, **arguments)


class Tables:
    """The tables that a module holds, found by their sizes."""

    def __init__(self, module, num_segments=0):
        self.token = self.position = self.segment = None
        self.names, self.other, self.frozen = {}, {}, []
        sizes = {V: "token", L: "position", S: "segment"}
        for name, p in module.named_parameters():
            value = p.detach().clone().double()
            shape = [n for n in value.shape if n != 1]
            value = value.view(shape)
            if len(shape) == 2 and shape[0] == D:  # a Linear's weight
                value, shape = value.T, shape[::-1]
            joined = {V + L: (V, L), V + L + S: (V, L, S), V + S: (V, S)}
            if len(shape) != 2 or shape[1] != D:
                self.other[name] = value
            elif shape[0] in sizes:
                self._put(sizes[shape[0]], value, name, p)
            elif shape[0] in joined:
                for part in value.split(joined[shape[0]]):
                    self._put(sizes[len(part)], part, name, p)
            else:
                self.other[name] = value
        # token, position and segment in one table: gradients are not told apart
        self.separate = len(set(self.names.values())) == len(self.names)

    def _put(self, kind, value, name, parameter):
        if getattr(self, kind) is not None:
            self.other[name] = value
            return
        setattr(self, kind, value)
        self.names[kind] = name
        if not parameter.requires_grad:
            self.frozen.append(kind)


def build_random(layer, positions="learned", num_segments=0):
    """Make the reader's embedding, with random tables; give it and them."""
    module = build(layer, positions, num_segments).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in module.parameters():
            rows = {n for n in p.shape if n not in (1, D)}
            # A reader's sinusoidal table may be a parameter: leave it as it is.
            if positions == "sinusoidal" and rows == {L}:
                continue
            p.copy_(torch.randn(p.shape, generator=generator))
    return module, Tables(module)


def expect_vectors(out, batch, seq_len):
    """Refuse outputs of another shape, with the cause of the usual ones."""
    if isinstance(out, torch.Tensor):
        shape = tuple(out.shape)
        for wrong, hint in () if shape == (batch, seq_len, D) else (
            ((seq_len, batch, D), "batch and seq_len have changed places"),
            ((batch, D, seq_len), "seq_len and d_model have changed places: look for "
             "a transpose"),
            ((batch, seq_len, 2 * D), "token and position are put side by side: they "
             "must be added"),
            ((batch, seq_len, 3 * D), "token, position and segment are put side by "
             "side: they must be added"),
            ((batch, D), "the vectors of a text are averaged or summed: there must be "
             "one for each token"),
            ((batch, seq_len, V), "these are one-hot rows: multiply them by the table"),
            ((batch, batch, seq_len, D), "an axis too many: a position vector was "
             "looked up for each text and unsqueezed once too often"),
        ):
            if shape == wrong:
                raise Wrong(
                    f"{hint}. The output must have the shape (batch, seq_len, "
                    f"d_model) = {(batch, seq_len, D)}, but it has {shape}"
                )
    expect_tensor(out, (batch, seq_len, D))


def look_up(layer, module, ids, *more):
    """Call the reader's module under watch; expect vectors."""
    try:
        out = layer.run(module, ids.clone(), *(m.clone() for m in more))
    except Broke as broke:
        if "CUDA" in str(broke) or "cuda" in str(broke):
            raise Wrong(
                "a device is written into the layer: make new tensors where the ids are, "
                f"with device=input_ids.device. It {broke}"
            ) from None
        raise
    expect(
        not isinstance(out, tuple),
        "it returns more than one thing: return the vectors alone",
    )
    expect_vectors(out, *ids.shape)
    return out


def compare(layer, module, wanted, causes, otherwise, parts=()):
    """Compare with a reference; where axes do not fit, on as many texts as tokens.

    Args:
        wanted: gives the right answer for ids.
        causes: gives pairs for ids, as `explain` takes them.
        parts: the token's and the position's part of the right answer for IDS.
    """
    try:
        out = look_up(layer, module, IDS)
    except Broke as broke:
        if not isinstance(layer.last_error, RuntimeError):
            raise
        try:
            square = look_up(layer, module, SQUARE)
        except Wrong:
            raise broke from None
        explain(square, wanted(SQUARE), causes(SQUARE),
                f"with another number of texts than of tokens it {broke}")
        raise
    if not near(out, wanted(IDS)):
        expect(
            near(look_up(layer, module, IDS), out),
            "a second call gives something else: nothing here is left to chance, and "
            "nothing may be kept from call to call",
        )
    explain(out, wanted(IDS).to(out.dtype), causes(IDS),
            mixture(out, *parts) or otherwise)


def mixture(out, token=None, position=None):
    """Say so if an output is a·token + b·position with wrong a and b."""
    if token is None:
        return None
    columns = torch.stack([token.flatten(), position.flatten()], dim=1)
    target = out.detach().double().flatten()
    a, b = torch.linalg.lstsq(columns, target[:, None])[0][:, 0].tolist()
    if not near(columns @ torch.tensor([a, b]).double(), target, 1e-4):
        return None
    return (f"the output is {a:.3g} times the token's row plus {b:.3g} times the "
            "position's: look at what they are multiplied by")


def norm_causes(wanted, tables):
    """What a norm inside would give."""
    pair = [v for v in tables.other.values() if v.shape == (D,)]
    hint = ("a LayerNorm is applied inside: the class stops at the sum. BERT's norm and "
            "dropout come after it, in the whole model")
    causes = [(hint, lambda: F.layer_norm(wanted, (D,)))]
    if len(pair) == 2:
        causes += [(hint, lambda w=w, b=b: F.layer_norm(wanted, (D,), w, b))
                   for w, b in (pair, pair[::-1])]
    if len(pair) == 1:
        causes.append((
            "a bias is added to all vectors alike: a lookup has none (bias=False)",
            lambda: wanted + pair[0],
        ))
    return causes


def place_causes(ids, token, position, scale=1.0):
    """What wrong uses of a position table (max_len, d_model) give."""
    batch, n = ids.shape
    x, p = token[ids] * scale, position[:n]
    last = min(n, L - 1)
    causes = [
        ("the positions are not added: the output is the token vectors alone", lambda: x),
        ("the positions are added twice", lambda: x + 2 * p),
        ("the positions are subtracted", lambda: x - p),
        ("the positions are indexed by the text's place in the batch, not by the "
         "token's place in the text: use arange(seq_len), along axis 1",
         lambda: x + position[:batch][:, None]),
        ("the positions are counted from 1: the first is 0",
         lambda: x + position[1:n + 1]),
        ("the positions are counted from 2, as RoBERTa does: the first is 0",
         lambda: x + position[2:n + 2]),
        ("the positions run backwards", lambda: x + p.flip(0)),
        ("the positions are counted from the end of the table: take the first "
         "seq_len rows, not the last", lambda: x + position[-n:]),
        ("every token gets the vector of place 0", lambda: x + position[0]),
        ("every token gets one and the same position vector, that of place seq_len: "
         "take the rows 0 … seq_len - 1, [:seq_len]", lambda: x + position[last]),
        ("every token gets the vector of the last place: take the rows 0 … seq_len - 1",
         lambda: x + position[n - 1]),
        ("the position table is looked up by the token's id, not by its place",
         lambda: x + position[ids]),
        ("the positions count real tokens only, as RoBERTa does: here a place is a "
         "place, padding or not",
         lambda: x + position[(ids != 0).long().cumsum(1)]),
        ("the positions count real tokens only: here a place is a place, padding or not",
         lambda: x + position[((ids != 0).long().cumsum(1) - 1).clamp(min=0)]),
        ("padding gets no position: every place does", lambda: x + p * (ids != 0)[..., None]),
        ("the vectors of id 0 are set to zero: every id is looked up alike, and "
         "attention masks the padding later",
         lambda: (x + p) * (ids != 0)[..., None]),
        ("the token vectors of id 0 are set to zero: every id is looked up alike, and "
         "attention masks the padding later",
         lambda: x * (ids != 0)[..., None] + p),
        ("token and position are multiplied: they must be added", lambda: x * p),
        ("it is the mean of token and position, not their sum", lambda: (x + p) / 2),
        ("the token vectors are missing: the output is the positions alone",
         lambda: p.expand(batch, n, D)),
        ("the token table is looked up by the place, not by the id",
         lambda: token[:n] * scale + p + 0 * x),
        ("the ids are off by one", lambda: token[ids - 1] * scale + p),
        ("the ids are off by one", lambda: token[ids + 1] * scale + p),
        ("token vectors are scaled to length 1", lambda: F.normalize(x, dim=-1) + p),
        ("the mean over the tokens is taken off: each token is looked up alone",
         lambda: x + p - (x + p).mean(1, keepdim=True)),
        ("the sum is scaled to length 1", lambda: F.normalize(x + p, dim=-1)),
    ]
    if batch == n:
        causes.append((
            "the positions run along the batch, not along the text: a table of "
            "(seq_len, d_model) broadcasts by itself; look for an unsqueeze(1)",
            lambda: x + p[:, None]))
    return causes


def learned_causes(ids, tables):
    """What wrong embeddings with learned positions give."""
    token, position = tables.token, tables.position
    x, p = token[ids], position[:ids.shape[1]]
    fixed = table_of(L, D)[:ids.shape[1]]
    return place_causes(ids, token, position) + [
        ("the token vectors are multiplied by the root of d_model here too: that "
         "belongs to sinusoidal positions only", lambda: x * ROOT + p),
        ("the sum is multiplied by the root of d_model: learned positions need no "
         "scaling", lambda: (x + p) * ROOT),
        ("the token vectors are divided by the root of d_model: learned positions "
         "need no scaling", lambda: x / ROOT + p),
        ("the sum is divided by the root of d_model", lambda: (x + p) / ROOT),
        ("the position vectors are multiplied by the root of d_model",
         lambda: x + p * ROOT),
        ("sinusoidal positions are added where learned ones were asked for",
         lambda: x + fixed),
        ("sinusoidal positions are added where learned ones were asked for",
         lambda: x * ROOT + fixed),
        ("learned and sinusoidal positions are both added", lambda: x + p + fixed),
        *norm_causes(x + p, tables),
    ]


def sinusoidal_causes(ids, tables):
    """What wrong embeddings with sinusoidal positions give."""
    token, right = tables.token, table_of(L, D)
    n = ids.shape[1]
    x, p = token[ids], right[:n]
    lacks = "the token vectors are not multiplied by the root of d_model"
    causes = [
        (lacks + ": Vaswani et al. do that before they add sinusoidal positions",
         lambda: x + p),
        ("the positions are multiplied by the root of d_model as well: scale the token "
         "vectors first, then add", lambda: (x + p) * ROOT),
        ("the positions are multiplied by the root of d_model in place of the token "
         "vectors", lambda: x + p * ROOT),
        ("the token vectors are divided by the root of d_model: multiply",
         lambda: x / ROOT + p),
        ("the token vectors are multiplied by d_model, not by its root",
         lambda: x * D + p),
        ("the token vectors are multiplied by the root of d_model twice",
         lambda: x * D + p * ROOT),
        ("the token vectors are multiplied by the root of max_len, not of d_model",
         lambda: x * math.sqrt(L) + p),
        ("the token vectors are multiplied by the root of vocab_size, not of d_model",
         lambda: x * math.sqrt(V) + p),
        ("the token vectors are multiplied by the root of seq_len, not of d_model",
         lambda: x * math.sqrt(n) + p),
        ("the token vectors are multiplied by the root of d_model / 2",
         lambda: x * math.sqrt(D / 2) + p),
        ("the positions are not added, and the token vectors are not scaled: it does "
         'as for positions="none"', lambda: x),
        *place_causes(ids, token, right, ROOT),
    ]
    if tables.position is not None:
        q = tables.position[:n]
        causes += [
            ("learned positions are added where sinusoidal ones were asked for",
             lambda: x + q),
            ("learned positions are added where sinusoidal ones were asked for",
             lambda: x * ROOT + q),
        ]
    for hint, table in table_causes(L, D):
        causes += [
            ("in the sinusoidal table " + hint,
             lambda table=table: x * ROOT + table()[:n]),
            (f"{lacks}. And in the sinusoidal table {hint}",
             lambda table=table: x + table()[:n]),
        ]
    causes += [
        (f"{lacks}. And {hint}", wrong)
        for hint, wrong in place_causes(ids, token, right)
    ]
    return causes + norm_causes(x * ROOT + p, tables)


@embed.property("can be made and called: (batch, seq_len, d_model) comes out")
def embed_shape(layer):
    for kind in KINDS[::-1] if "positions" not in layer.lacks else ("learned",):
        module = build(layer, kind).eval()
        before = [p.detach().clone() for p in module.parameters()]
        for batch, seq_len in ((3, 5), (1, 1), (2, L), (4, 4)):
            ids = torch.arange(batch * seq_len).view(batch, seq_len) % V
            try:
                out = look_up(layer, module, ids)
            except Broke as broke:
                if seq_len != L:
                    raise
                raise Wrong(
                    "shorter texts pass, but one of exactly max_len tokens does not: is "
                    "it >= where > belongs, or a table with a row too few, or are the "
                    f"places counted from 1? It {broke}"
                ) from None
            expect(
                out.dtype == torch.float32,
                f"the output of a float32 layer must be float32, but it is {out.dtype}: "
                "a position table in float64 lifts everything that it is added to",
            )
            expect(
                bool(out.isfinite().all()),
                "the output is not finite: a table is made by torch.empty and never "
                "filled, or something is divided by 0",
            )
        expect(
            all(near(p, b) for p, b in zip(module.parameters(), before, strict=True)),
            "a call changes the tables themselves: look for += on rows that are a view "
            "of a table, or for max_norm",
        )
    out = look_up(layer, module, torch.arange(4)[:, None])[:, 0]
    expect(
        not near(out[1:], out[:-1]),
        "all tokens have the same vector at the start: the token table must be drawn "
        "by chance, as nn.Embedding does, not filled with one number",
    )


@embed.property("its defaults are learned positions and no segments")
def embed_defaults(layer):
    tables = Tables(layer.make(vocab_size=V, d_model=D, max_len=L))
    named = Tables(build(layer, "learned", 0))
    expect(
        (tables.position is None) == (named.position is None),
        'without the argument positions it must be "learned", as BERT has them: look at '
        "the default in the constructor",
    )
    expect(
        (tables.segment is None) == (named.segment is None) and tables.other == {}
        or named.other != {},
        "without the argument num_segments there must be no segments: its default is 0",
    )


@embed.property("holds one table each for tokens, learned positions and segments")
def embed_parameters(layer):
    kinds = KINDS if "positions" not in layer.lacks else ("learned",)
    for kind in kinds:
        for segments in ((0, S) if "num_segments" not in layer.lacks else (0,)):
            expect_tables(build(layer, kind, segments), kind, segments)


def expect_tables(module, kind, segments):
    """Refuse tables that are missing, too many, or of a wrong size."""
    tables = Tables(module)
    shapes = {n: tuple(v.shape) for n, v in tables.other.items()}
    buffers = [tuple(b.shape) for b in module.buffers()]
    expect(
        any(True for _ in module.parameters()),
        "it has no parameters: the tables must be nn.Embedding (or nn.Parameter) "
        "attributes of the module, not plain tensors and not in a plain list or dict",
    )
    norms = [m for m in module.modules() if isinstance(m, (nn.LayerNorm, nn.BatchNorm1d))]
    expect(
        not norms,
        "it holds a norm: the class stops at the sum. BERT's norm and dropout come "
        "after it, in the whole model",
    )
    for name, wanted, size in (
        ("token", True, V), ("position", kind == "learned", L),
        ("segment", bool(segments), S),
    ):
        table = getattr(tables, name)
        what = {"token": "vocab_size", "position": "max_len",
                "segment": "num_segments"}[name]
        if wanted and table is None:
            expect(
                (size, D) not in buffers and (1, size, D) not in buffers,
                f"the {name} table is a buffer, so it is never trained: make it an "
                "nn.Embedding or an nn.Parameter",
            )
            other = [s for s in shapes.values() if len(s) == 2] or [
                tuple(t.shape) for n, t, asked in (
                    ("position", tables.position, kind == "learned"),
                    ("segment", tables.segment, bool(segments))) if t is not None and not asked]
            raise Wrong(
                f'with positions="{kind}" and num_segments={segments} there is no '
                f"parameter of the shape ({what}, d_model) = ({size}, {D}) for the "
                f"{name}s" + (f", but there is one of {other[0]}: look at the sizes it "
                              "is made with" if other else
                              ": is it registered as nn.Embedding or nn.Parameter?")
            )
        expect(
            not wanted or name not in tables.frozen,
            f"the {name} table is not trained: its requires_grad is False",
        )
        if wanted or table is None:
            continue
        expect(
            name != "position" or kind != "sinusoidal" or "position" in tables.frozen,
            "the sinusoidal table is a parameter, so training would change it (or a "
            "learned table is made as well): keep it with register_buffer",
        )
        expect(
            name == "position" and kind == "sinusoidal",
            f'with positions="{kind}" and num_segments={segments} it still makes a '
            f"{name} table of {size} rows, which nobody asked for",
        )
    expect(
        () not in shapes.values(),
        "a single number is a parameter: the root of d_model is fixed, and training would "
        "change it",
    )
    expect(
        not shapes,
        f"it has parameters besides the tables, {shapes}: a lookup has no bias, and "
        "the sum needs no norm",
    )


@embed.property('learned: the token\'s row plus the place\'s row')
def embed_learned(layer):
    module, tables = build_random(layer)
    if tables.token is None or tables.position is None:
        raise Skip("its tables were not found; look at the row above")
    compare(
        layer, module,
        lambda ids: tables.token[ids] + tables.position[:ids.shape[1]],
        lambda ids: learned_causes(ids, tables),
        "with its own tables the output is not token.weight[id] + "
        "position.weight[place]. Look at a single token at place 0",
        (tables.token[IDS], tables.position[:IDS.shape[1]].expand(*IDS.shape, D)),
    )


@embed.property('none: the token\'s row and nothing else')
def embed_none(layer):
    module, tables = build_random(layer, "none")
    if tables.token is None:
        raise Skip("its token table was not found; look at the rows above")

    def causes(ids):
        x, fixed = tables.token[ids], table_of(L, D)[:ids.shape[1]]
        found = [
            ("the token vectors are multiplied by the root of d_model: that belongs to "
             "sinusoidal positions only", lambda: x * ROOT),
            ("the token vectors are divided by the root of d_model", lambda: x / ROOT),
            ("positions are added although none were asked for", lambda: x + fixed),
            ("positions are added although none were asked for",
             lambda: x * ROOT + fixed),
            *norm_causes(x, tables),
        ]
        return found + [
            (hint, lambda wrong=wrong: wrong())
            for hint, wrong in place_causes(ids, tables.token, torch.zeros(L, D))
        ]

    compare(
        layer, module, lambda ids: tables.token[ids], causes,
        'with positions="none" the output is not the rows of the token table',
    )


@embed.property("sinusoidal: √d_model times the token's row, plus the table")
def embed_sinusoidal(layer):
    module, tables = build_random(layer, "sinusoidal")
    if tables.token is None:
        raise Skip("its token table was not found; look at the rows above")
    compare(
        layer, module,
        lambda ids: tables.token[ids] * ROOT + table_of(L, D)[:ids.shape[1]],
        lambda ids: sinusoidal_causes(ids, tables),
        'with positions="sinusoidal" the output is not √d_model · token.weight[id] + '
        "table[place]. Check the table by check(sinusoidal_positions), then a single "
        "token at place 0",
        (tables.token[IDS], table_of(L, D)[:IDS.shape[1]].expand(*IDS.shape, D)),
    )


@embed.property("adds the segment's row; without segment_ids that of segment 0")
def embed_segments(layer):
    kinds = ("learned", "none", "sinusoidal") if "positions" not in layer.lacks else (
        "learned",)
    for kind in kinds:
        module, tables = build_random(layer, kind, S)
        if tables.token is None or tables.segment is None:
            raise Skip("its tables were not found; look at the rows above")
        n = IDS.shape[1]
        base = tables.token[IDS]
        places = {
            "learned": tables.position, "none": torch.zeros(L, D),
            "sinusoidal": table_of(L, D),
        }[kind]
        if places is None:
            raise Skip("its tables were not found; look at the rows above")
        if kind == "sinusoidal":
            base = base * ROOT
        base = base + places[:n]
        # A wrong base is for the rows above; here segments are looked at.
        without = look_up(layer, module, IDS, torch.zeros_like(IDS)).detach().double()
        if not near(without, base + tables.segment[0]):
            base = without - tables.segment[0]
            if not near(look_up(layer, build_random(layer, kind, 0)[0], IDS), base):
                base = tables.token[IDS] * (ROOT if kind == "sinusoidal" else 1) + places[:n]
        explain(
            look_up(layer, module, IDS, SEGMENTS), base + tables.segment[SEGMENTS],
            segment_causes(base, SEGMENTS, tables.segment, places),
            f'with positions="{kind}", segment_ids do not add segment.weight[segment] '
            "to each token's vector",
        )
        explain(
            look_up(layer, module, IDS), base + tables.segment[0],
            without_causes(base, tables.segment),
            "without segment_ids it does not give the same as with zeros",
        )


def without_causes(base, table):
    """What is given by mistake where there are no segment_ids."""
    return [
        ("without segment_ids no segment is added: all tokens are in segment 0 then, "
         "so row 0 is added. Otherwise a single text gets other vectors than the same "
         "text with a row of zeros", lambda: base),
        ("without segment_ids all tokens get segment 1: it must be 0",
         lambda: base + table[1]),
        ("without segment_ids the mean of the segments is added",
         lambda: base + table.mean(0)),
    ]


def segment_causes(base, segments, table, places):
    """What wrong uses of segments give."""
    right = table[segments]
    return [
        ("segment_ids are taken and never used", lambda: base),
        ("segment_ids are ignored: every token gets segment 0",
         lambda: base + table[0]),
        ("the segments are added twice", lambda: base + 2 * right),
        ("the segment vectors are multiplied by the root of d_model: only the token "
         "vectors are", lambda: base + right * ROOT),
        ("the segments are looked up in the position table",
         lambda: base + places[segments]),
        ("the segments are inverted: 0 and 1 have changed places",
         lambda: base + table[1 - segments]),
        ("the segments are subtracted", lambda: base - right),
        ("the segment takes the place of the position: all three are added",
         lambda: base - places[:base.shape[1]] + right),
        ("every token gets the segment of the text's first token",
         lambda: base + table[segments[:, :1]]),
        ("the segments of the first text are used for all texts",
         lambda: base + table[segments[0]]),
    ]


@embed.property("a token's vector depends on its id, place and segment alone")
def embed_alone(layer):
    kinds = KINDS if "positions" not in layer.lacks else ("learned",)
    for kind in kinds:
        module, _ = build_random(layer, kind)
        out = look_up(layer, module, IDS)
        expect(
            near(look_up(layer, module, IDS), out),
            "a second call gives something else: nothing may be kept from call to call",
        )
        expect(
            near(look_up(layer, module, IDS[1:2]), out[1:2])
            and near(look_up(layer, module, IDS.flip(0)), out.flip(0)),
            "a text gets other vectors in another batch: the batch axis is used as if "
            "it were the places, or something is averaged over the batch",
        )
        expect(
            near(look_up(layer, module, IDS[:, :3]), out[:, :3]),
            "the first tokens of a text get other vectors when the text is longer: "
            "positions must be counted from the start, and not be divided by the "
            "length; nor may the tokens be mixed here",
        )
        torch.manual_seed(0)
        expect(
            near(look_up(layer, module.train(), IDS), out),
            "in training it gives something else than in evaluation: the class stops at "
            "the sum. Dropout comes after it, in the whole model, and twice is too much",
        )


@embed.property("gives gradients to the rows that were looked up, and to no others")
def embed_gradient(layer):
    kinds = KINDS if "positions" not in layer.lacks else ("learned",)
    for kind in kinds:
        module, tables = build_random(layer, kind)
        out = look_up(layer, module, IDS)
        expect(
            out.requires_grad,
            "no gradient flows back to the tables, so nothing is learned: look for "
            ".data, .detach(), torch.no_grad() or torch.tensor(…) around a lookup",
        )
        tilt = sample(*out.shape, seed=8)
        try:
            (out * tilt).sum().backward()
        except RuntimeError as error:
            raise Wrong(
                "backward fails: something that it needs was changed in place after the "
                f"lookup. It says: {' '.join(str(error).split())[:160]}"
            ) from None
        if not tables.separate:
            continue
        place = {"learned": tables.position, "sinusoidal": table_of(L, D),
                 "none": torch.zeros(L, D)}[kind]
        if tables.token is None or place is None:
            continue
        wanted = tables.token[IDS] * (ROOT if kind == "sinusoidal" else 1.0)
        right = near(out, wanted + place[:IDS.shape[1]])
        grads = {n: p.grad for n, p in module.named_parameters()}
        for name in tables.names:
            if name == "position" and kind == "sinusoidal":
                continue
            expect_gradient(layer, name, grads[tables.names[name]], tilt, kind, right)


def expect_gradient(layer, name, got, tilt, kind, right):
    """Compare the gradient of the token or the position table.

    Args:
        right: whether the outputs are right; if not, there need only be one.
    """
    expect(
        got is not None and bool(got.abs().max() > 0) if got is None or not got.is_sparse
        else True,
        f"the {name} table gets no gradient: it is made, but the output does not depend "
        "on it, or it is cut off by .detach() or .data",
    )
    if not right:
        return
    got = got.to_dense() if got.is_sparse else got
    got = got.reshape([n for n in got.shape if n != 1])
    got = got.T if got.shape[0] == D else got
    if name == "position":
        wanted = torch.zeros(L, D)
        wanted[:IDS.shape[1]] = tilt.sum(0)
    else:
        wanted = torch.zeros(V, D).index_add(0, IDS.flatten(), tilt.flatten(0, 1))
        wanted = wanted * (ROOT if kind == "sinusoidal" else 1.0)
    if name == "token" and bool((got[0] == 0).all()) and near(got[1:], wanted[1:], 1e-4):
        note = ("row 0 of the token table gets no gradient (padding_idx=0?): harmless as "
                "long as id 0 is padding")
        if note not in layer.notes:
            layer.notes.append(note)
        return
    counts = torch.bincount(IDS.flatten(), minlength=V).clamp(min=1)[:, None]
    causes = [
        ("the gradient of a token is divided by how often it occurs: look for "
         "scale_grad_by_freq", lambda: wanted / counts),
        ("the gradient of the tokens is that of unscaled vectors: the scaling is cut "
         "off from the graph", lambda: wanted / ROOT),
    ]
    for row in range(len(wanted)):
        without = wanted.clone()
        without[row] = 0
        causes.append((
            f"row {row} of the {name} table gets no gradient, although it was looked "
            "up: look for padding_idx", lambda without=without: without))
    explain(
        got, wanted, causes,
        f"the {name} table gets a wrong gradient: each row must get the sum of the "
        "slopes at the places where it was looked up",
        tolerance=1e-4,
    )


@embed.property("moves to other devices and dtypes, the position table too")
def embed_moves(layer):
    kinds = ("sinusoidal", "learned", "none") if "positions" not in layer.lacks else (
        "learned",)
    segments = S if "num_segments" not in layer.lacks else 0
    for kind in kinds:
        inputs = (IDS, SEGMENTS) if segments else (IDS,)
        expect_to_move(layer, lambda kind=kind: build(layer, kind, segments), *inputs)
        expect_to_move(layer, lambda kind=kind: build(layer, kind, segments), IDS)
        expect_ids_to_move(layer, build(layer, kind, segments))
        half = build(layer, kind, segments).to(torch.bfloat16).eval()
        out = layer.run(half, IDS.clone())
        expect(
            out.dtype == torch.bfloat16,
            f"a bfloat16 model gets {out.dtype} from its embedding: a table that is no "
            "buffer stays in float32 and lifts the sum. Keep it with register_buffer, "
            "and make new tensors with dtype=x.dtype",
        )


def expect_ids_to_move(layer, module):
    """Refuse lookups in a moved table by places that stayed behind."""
    def look(_module, inputs):
        for value in inputs:
            if isinstance(value, torch.Tensor) and value.device.type != "meta":
                raise Wrong(
                    "the places are made on the CPU whatever device the model is on: "
                    "torch.arange needs device=input_ids.device"
                )

    module = module.to("meta").eval()
    for inner in module.modules():
        if inner is not module:
            inner.register_forward_pre_hook(look)
    layer.run(module, IDS.to("meta"))


@embed.property("tells late places apart in bfloat16 too")
def embed_late(layer):
    module = build(layer, "sinusoidal", max_len=512, d_model=16).eval()
    with torch.no_grad():
        for p in module.parameters():
            if 512 not in p.shape:
                p.zero_()
    module = module.to(torch.bfloat16)
    out = layer.run(module, torch.zeros(1, 512, dtype=torch.int64))
    expect_tensor(out, (1, 512, 16))
    wanted = table_of(512, 16)
    early = near(out[0, :8], wanted[:8], 0.02)
    expect(
        near(out[0], wanted, 0.02) or not early,
        "in a bfloat16 model late places are mixed up: the places are counted or the "
        "angles computed in 16 bits, which hold whole numbers only up to 256. Compute "
        "the table in float32 or float64, and round it once at the end",
    )
    if not early:
        raise Skip("early places differ already; mend the rows above first")


@embed.property("is restored by load_state_dict")
def embed_saved(layer):
    kinds = KINDS if "positions" not in layer.lacks else ("learned",)
    segments = S if "num_segments" not in layer.lacks else 0
    for kind in kinds:
        module, _ = build_random(layer, kind, segments)
        state = {k: v.clone() for k, v in module.state_dict().items()}
        other = build(layer, kind, segments).eval()
        layer.run(other.load_state_dict, state)
        expect(
            near(look_up(layer, other, IDS), look_up(layer, module, IDS)),
            "a new layer that loads the state_dict of the old one gives something else: "
            "a part of what it knows is not saved, or a row is reset afterwards",
        )
        if any(v.shape[-2:] == (L, D) for v in state.values()) and kind == "sinusoidal":
            layer.notes.append(
                "the sinusoidal table is saved with the model, so a model with another "
                "max_len cannot load it: register_buffer(…, persistent=False)")


@embed.property("refuses sizes and kinds that make no sense")
def embed_refuses_sizes(layer):
    build(layer)
    for name, value in (("vocab_size", 0), ("d_model", 0), ("max_len", 0),
                        ("vocab_size", -3), ("num_segments", -1)):
        if name in layer.lacks:
            continue
        refused(
            layer, lambda name=name, value=value: build(layer, **{name: value}),
            f"{name}={value} must be refused by a ValueError in the constructor that "
            "quotes the rule, but it goes through",
        )
    if "positions" in layer.lacks:
        return
    for kind in ("rotary", "Learned", None):
        refused(
            layer, lambda kind=kind: build(layer, kind),
            f"positions={kind!r} must be refused by a ValueError: it must be learned, "
            "sinusoidal or none, and a typing error would pass for one of them",
        )
    refused(
        layer, lambda: build(layer, "sinusoidal", d_model=7),
        "d_model=7 with sinusoidal positions must be refused by a ValueError: a hand "
        "needs a sine and a cosine",
    )
    try:
        look_up_odd(layer)
    except Broke as broke:
        raise Wrong(
            "an odd d_model must be fine with learned positions and with none: only "
            f"the sinusoidal table needs pairs. It {broke}"
        ) from None


def look_up_odd(layer):
    """An odd width, with positions that allow it."""
    for kind in ("learned", "none"):
        layer.run(build(layer, kind, d_model=7), IDS.clone())


@embed.property("refuses ids and segments that make no sense")
def embed_refuses_ids(layer):
    kinds = KINDS if "positions" not in layer.lacks else ("learned",)
    for kind in kinds:
        module = build(layer, kind).eval()
        whole = look_up(layer, module, torch.zeros(2, L, dtype=torch.int64))
        refused(
            layer, lambda module=module: layer.run(
                module, torch.zeros(2, L + 1, dtype=torch.int64)),
            f'with positions="{kind}" a text of {L + 1} tokens must be refused by a '
            f"ValueError when max_len is {L}, but it goes through",
        )
        expect(whole.shape[1] == L, "a text of exactly max_len tokens must pass")
        refused(
            layer, lambda module=module: layer.run(module, IDS[0].clone()),
            "ids without a batch axis must be refused by a ValueError, but they go "
            "through: a forgotten axis would show far away",
        )
        refused(
            layer, lambda module=module: layer.run(module, IDS + 0.7),
            "ids that are floating numbers must be refused by a TypeError: they are "
            "converted (by .long() or .int()), so 2.7 becomes token 2",
        )
        try:
            small = layer.run(module, IDS.int())
        except Broke:
            continue
        expect(
            near(small, look_up(layer, module, IDS)),
            "ids in int32 give other vectors than in int64: refuse them by a TypeError",
        )
    refused(
        layer, lambda: layer.run(build(layer), IDS.clone(), torch.zeros_like(IDS)),
        "segment_ids to an embedding without segments (num_segments=0) must be refused "
        "by a ValueError, but they are ignored",
    )
    if "num_segments" in layer.lacks:
        return
    module = build(layer, num_segments=S).eval()
    for wrong in (SEGMENTS[:1], SEGMENTS[0], SEGMENTS[:, :1]):
        refused(
            layer, lambda wrong=wrong: layer.run(module, IDS.clone(), wrong.clone()),
            f"segment_ids of the shape {tuple(wrong.shape)} for ids of "
            f"{tuple(IDS.shape)} must be refused by a ValueError: they are broadcast "
            "to texts that they were not written for",
        )


# Exercises

turns = Battery(
    "tokens_per_turn", "tokens_per_turn(d_model) -> (d_model / 2,)",
    chapter=3, takes=("d_model",),
)


@turns.property("says how many tokens each hand needs for a full turn")
def turns_right(function):
    for d_model in (8, 128):
        i = torch.arange(d_model // 2, dtype=torch.float64)
        grow = torch.exp(LOG * 2 * i / d_model)
        explain(
            function(d_model), 2 * math.pi * grow, turn_causes(grow),
            "hand i turns by ω = 10000^(-2i / d_model) in one step: how many steps "
            "make 2π?",
        )


def turn_causes(grow):
    """What wrong answers give; ``grow`` is 1 / speed."""
    full = 2 * math.pi
    return [
        ("these are the tokens for one radian: a full turn is 2π", lambda: grow),
        ("a full turn is 2π radians, not π", lambda: math.pi * grow),
        ("a full turn is 2π radians, not 360", lambda: 360 * grow),
        ("these are the speeds: the slower a hand, the more tokens it needs",
         lambda: 1 / grow),
        ("2π is multiplied by the speed: divide by it", lambda: full / grow),
        ("the speed is divided by 2π: it is 2π divided by the speed",
         lambda: 1 / grow / full),
        ("the hands stand in reverse order: hand 0 is the fastest",
         lambda: full * grow.flip(0)),
        ("the exponent lacks the 2 of 2i / d_model", lambda: full * grow.sqrt()),
        ("the exponent is doubled: i counts the pairs", lambda: full * grow.square()),
        ("the hands are counted from 1", lambda: full * grow * grow[1]),
    ]


row_sums = Battery(
    "table_gradient",
    "table_gradient(input_ids, slopes, vocab_size) -> (vocab_size, d_model)",
    chapter=3, takes=("input_ids", "slopes", "vocab_size"),
)


@row_sums.property("sums the slopes of all places where a token stands")
def row_sums_right(function):
    slopes = sample(*IDS.shape, 4, seed=11)
    flat, many = IDS.flatten(), slopes.flatten(0, 1)
    wanted = torch.zeros(V, 4).index_add(0, flat, many)
    counts = torch.bincount(flat, minlength=V).clamp(min=1)[:, None]
    last = torch.zeros(V, 4)
    first = torch.zeros(V, 4)
    for i, row in zip(flat, many, strict=True):
        last[i] = row
    for i, row in zip(flat.flip(0), many.flip(0), strict=True):
        first[i] = row
    once = ("a token that stands in two places gets the slopes of one of them only: "
            "table[ids] = … and table[ids] += … write each row once. Use index_add_, "
            "or the one-hot product")
    explain(
        function(IDS.clone(), slopes.clone(), V), wanted,
        [(once, lambda: last), (once, lambda: first),
         ("the slopes are averaged, not summed", lambda: wanted / counts),
         ("only the first text of the batch counts",
          lambda: torch.zeros(V, 4).index_add(0, IDS[0], slopes[0])),
         ("it counts how often a token stands there: sum the slopes instead",
          lambda: torch.bincount(flat, minlength=V)[:, None].expand(V, 4).float())],
        "row v must be the sum of the slopes at all places where token v stands, and 0 "
        "where it stands nowhere",
    )


@row_sums.property("is what autograd gives for a lookup")
def row_sums_autograd(function):
    for ids, width in ((torch.tensor([[3, 3, 3]]), 2), (torch.tensor([[0], [4]]), 3)):
        slopes = sample(*ids.shape, width, seed=12)
        table = torch.zeros(5, width, requires_grad=True)
        F.embedding(ids, table).backward(slopes)
        explain(function(ids, slopes, 5), table.grad, [],
                f"for ids {ids.tolist()} autograd gives another gradient")


back = Battery(
    "turn_back", "turn_back(rows, k) -> rows k places earlier", chapter=3,
    takes=("rows", "k"),
)


@back.property("moves rows of the table k places back")
def back_right(function):
    for k in (3, 0, 17, -5):
        rows = table_of(0, 8, places=torch.arange(20, 40))
        explain(
            function(rows.float(), k),
            table_of(0, 8, places=torch.arange(20, 40) - k), back_causes(rows, k),
            f"for k={k} it does not give the rows that stand k places earlier",
        )


def back_causes(rows, k):
    """What wrong turns of rows (n, 8) give."""
    i = torch.arange(4, dtype=torch.float64)
    a, b = rows[:, 0::2], rows[:, 1::2]

    def put(first, second):
        return torch.stack([first, second], dim=-1).flatten(1)

    def back(speeds, k=k):
        s, c = (k * speeds).sin(), (k * speeds).cos()
        return put(a * c - b * s, b * c + a * s)

    right = torch.exp(-LOG * 2 * i / 8)
    s, c = (k * right).sin(), (k * right).cos()
    return [
        ("it turns forward: to go back, turn by -k, or transpose the rotation",
         lambda: back(right, -k)),
        ("all hands turn at the speed of the first one", lambda: back(0 * i + 1)),
        ("the speeds lack the 2 of 2i / d_model", lambda: back(torch.exp(-LOG * i / 8))),
        ("the speeds are doubled in the exponent: i counts the pairs",
         lambda: back(torch.exp(-LOG * 4 * i / 8))),
        ("sine and cosine come out in each other's columns",
         lambda: put(b * c + a * s, a * c - b * s)),
        ("the sign of one of the four products is wrong",
         lambda: put(a * c - b * s, b * c - a * s)),
        ("the sign of one of the four products is wrong",
         lambda: put(a * c + b * s, b * c + a * s)),
        ("the rows come back as they were", lambda: rows),
        ("the rows are moved about (roll): turn each of them instead",
         lambda: rows.roll(k, 0)),
        ("the rows are moved about (roll): turn each of them instead",
         lambda: rows.roll(-k, 0)),
        ("the sines come out first and then the cosines: the two numbers of a hand "
         "stand next to each other",
         lambda: torch.cat([a * c - b * s, b * c + a * s], dim=-1)),
        ("the numbers are taken as halves: sine and cosine of a hand stand next to each "
         "other",
         lambda: torch.cat([rows[:, :4] * c - rows[:, 4:] * s,
                            rows[:, 4:] * c + rows[:, :4] * s], dim=-1)),
    ]


@back.property("undoes itself, and keeps lengths")
def back_undone(function):
    rows = sample(2, 5, 6, seed=13)  # any vectors, any axes in front
    there = function(rows.clone(), 4)
    expect_tensor(there, rows.shape)
    expect(near(function(there, -4), rows),
           "four places back and four places forward is not where it started")
    expect(near(there.norm(dim=-1), rows.norm(dim=-1)),
           "the vectors change their length: a rotation keeps it")


hot = Battery(
    "three_hot",
    "three_hot(input_ids, segment_ids, *, vocab_size, max_len, num_segments) -> "
    "(batch, seq_len, vocab_size + max_len + num_segments)",
    chapter=3, takes=("input_ids", "segment_ids"),
)


@hot.property("times the tall matrix is the embedding")
def hot_right(function):
    sizes = {"vocab_size": V, "max_len": L, "num_segments": S}
    token, position, segment = (sample(n, D, seed=n) for n in (V, L, S))
    got = function(IDS.clone(), SEGMENTS.clone(), **sizes)
    expect_tensor(got, (*IDS.shape, V + L + S), what="the rows")
    expect(got.is_floating_point(),
           f"the rows must be floating numbers to be multiplied, but they are {got.dtype}")
    places = torch.arange(IDS.shape[1]).expand(IDS.shape)

    def rows(*columns):
        out = torch.zeros(*IDS.shape, V + L + S)
        for c in columns:
            out = out.scatter_add(2, (c % (V + L + S))[..., None], torch.ones(*IDS.shape, 1))
        return out

    a, b, c = IDS, V + places, V + L + SEGMENTS
    explain(
        got, rows(a, b, c),
        [("the place's 1 is missing", lambda: rows(a, c)),
         ("the token's 1 is missing", lambda: rows(b, c)),
         ("the segment's 1 is missing", lambda: rows(a, b)),
         ("the places are counted from 1", lambda: rows(a, b + 1, c)),
         ("the segment's 1 stands right after the tokens: the position table is in "
          "between", lambda: rows(a, b, V + SEGMENTS)),
         ("the place's 1 stands among the tokens: its part begins at vocab_size",
          lambda: rows(a, places, c)),
         ("the segment's 1 begins at seq_len instead of max_len",
          lambda: rows(a, b, V + IDS.shape[1] + SEGMENTS)),
         ("the tables stand in another order: tokens, places, segments",
          lambda: rows(L + IDS, places, c)),
         ("the tables stand in another order: tokens, places, segments",
          lambda: rows(a, V + S + places, V + SEGMENTS)),
         ("every segment's 1 stands at segment 0", lambda: rows(a, b, 0 * c + V + L))],
        "each row must hold exactly three ones: at the id, at vocab_size + place, and "
        "at vocab_size + max_len + segment",
    )
    tall = torch.cat([token, position, segment])
    wanted = token[IDS] + position[:IDS.shape[1]] + segment[SEGMENTS]
    explain(got.float() @ tall, wanted, [], "times the tall matrix it is not the sum of lookups")


restored = Battery(
    "not_restored", "not_restored(model) -> set of names", chapter=3, takes=("model",),
)


class Mixed(nn.Module):
    """Parameters and buffers, saved and not, with and without many digits."""

    def __init__(self):
        super().__init__()
        self.token = nn.Embedding(5, 4)
        self.inner = nn.Module()
        self.inner.register_buffer("table", sample(6, 4, seed=14), persistent=False)
        self.register_buffer("kept", sample(3, seed=15))
        self.register_buffer("whole", torch.arange(4.0), persistent=False)
        self.register_buffer("counts", torch.arange(3), persistent=False)


@restored.property("names what loading does not bring back")
def restored_right(function):
    model = Mixed()
    names = function(model)
    expect(names is not None, "it returns None: is there a return at the end?")
    expect(not isinstance(names, str), "it returns one string: return a set of names")
    names = set(names)
    wanted = {"inner.table"}
    for hint, wrong in (
        ("it finds nothing: the state_dict holds only what was saved, and the place to "
         "look at is what was not. Go through named_parameters() and named_buffers()",
         set()),
        ("it names what bfloat16 changed: load what you saved before you compare",
         {"inner.table", "token.weight", "kept"}),
        ("it names every buffer: only those that are not exactly as before are asked for",
         {"inner.table", "kept", "whole", "counts"}),
        ("it names every buffer that is not saved: one whose numbers fit into bfloat16 "
         "comes back whole", {"inner.table", "whole", "counts"}),
        ("it names every buffer that is not saved: one whose numbers fit into bfloat16 "
         "comes back whole", {"inner.table", "whole"}),
        ("it names what did come back, not what did not",
         {"token.weight", "kept", "whole", "counts"}),
    ):
        expect(names != wrong, hint)
    expect(
        names == wanted,
        "for a model with one table that is not in its state_dict and does not fit into "
        f"bfloat16 it must give {wanted}, but it gives {names or 'an empty set'}",
    )


@restored.property("leaves the model as it was")
def restored_copy(function):
    model = Mixed()
    before = copy.deepcopy(model)
    function(model)
    for (name, now), (_, was) in zip(
        [*model.named_parameters(), *model.named_buffers()],
        [*before.named_parameters(), *before.named_buffers()], strict=True,
    ):
        expect(
            now.dtype == was.dtype and torch.equal(now, was),
            f"{name} of the model that was passed is another one afterwards: .to and "
            ".float() work on the module itself. Work on copy.deepcopy(model)",
        )


pairs = Battery(
    "unmix", "unmix(x, token_table, position_table) -> tokens, places", chapter=3,
    takes=("x", "token_table", "position_table"),
)


@pairs.property("finds token and place of each vector")
def pairs_right(function):
    token, position = sample(30, 16, seed=16), 2 * sample(12, 16, seed=17)
    ids = torch.tensor([4, 29, 0, 4, 17, 8])
    places = torch.tensor([3, 0, 11, 7, 7, 1])
    x = token[ids] + position[places] + 0.01 * sample(6, 16, seed=18)
    result = function(x.clone(), token.clone(), position.clone())
    expect(
        isinstance(result, (tuple, list)) and len(result) == 2,
        "it must return two tensors, the tokens and the places",
    )
    found, where = result
    expect_tensor(found, (6,), what="the first result")
    expect_tensor(where, (6,), what="the second result")
    found, where = found.long(), where.long()
    if torch.equal(found, ids) and torch.equal(where, places):
        return
    expect(
        not (torch.equal(found, places) and torch.equal(where, ids)),
        "tokens and places come in the wrong order: tokens first",
    )
    flat = places * len(token) + ids
    turned = ids * len(position) + places
    expect(
        not (torch.equal(found, flat % len(position))
             or torch.equal(found, flat // len(position))
             or torch.equal(found, turned % len(token))
             or torch.equal(found, turned // len(token))
             or (torch.equal(found, places) or torch.equal(where, ids))),
        "the number of the best pair is taken apart by the wrong size: divide by the "
        "size of the axis that runs fastest",
    )
    alone = torch.cdist(x, token).argmin(1)
    expect(
        not torch.equal(found, alone),
        "the nearest token is looked for without a place: a pair must be tried as a "
        "pair, since the place moves the vector away from its token",
    )
    pair = (token[:, None] + position).flatten(0, 1)
    best = (x @ pair.T).argmax(1)
    expect(
        not torch.equal(found, best // len(position)),
        "the pair with the largest dot product is taken: long vectors win whatever "
        "they are. Take the smallest distance",
    )
    expect(
        not torch.equal(where, torch.arange(6)),
        "it takes the row's own number as the place: find it from the vector",
    )
    raise Wrong(
        f"tokens {ids.tolist()} at places {places.tolist()} come out as "
        f"{found.tolist()} at {where.tolist()}: take the pair whose sum is nearest"
    )


turning = Battery(
    "rotary", "rotary(x) -> like x, (…, seq_len, d_head)", chapter=3, takes=("x",),
)


def turned_rows(x, speeds=None, places=None, sign=1.0):
    """Turn the vector at place p by p steps, as R(p) does with a row."""
    n, d = x.shape[-2:]
    i = torch.arange(d // 2, dtype=torch.float64)
    speeds = torch.exp(-LOG * 2 * i / d) if speeds is None else speeds
    places = torch.arange(n).double() if places is None else places.double()
    angle = sign * places[:, None] * speeds
    sine, cosine, x = angle.sin(), angle.cos(), x.double()
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack([a * cosine + b * sine, b * cosine - a * sine], dim=-1).flatten(-2)


@turning.property("multiplies the vector at place p by R(p)")
def turning_right(function):
    x = sample(2, 3, 7, 8, seed=19)
    i = torch.arange(4, dtype=torch.float64)
    half = torch.cat([x[..., 0::2], x[..., 1::2]], dim=-1)
    swapped = turned_rows(torch.stack([x[..., :4], x[..., 4:]], dim=-1).flatten(-2))
    other = turned_rows(x.transpose(1, 2)).transpose(1, 2)
    explain(
        function(x.clone()), turned_rows(x),
        [("it turns the other way: a row times R(p), as `rotation` is built. (Turning "
          "all the other way works as well, but then the tests of others do not fit)",
          lambda: turned_rows(x, sign=-1.0)),
         ("the places are counted from 1: the vector at place 0 is not turned at all",
          lambda: turned_rows(x, places=torch.arange(1, 8))),
         ("the hands are halves of the vector, as in some other code: here the "
          "two numbers of a hand stand next to each other",
          lambda: torch.cat([swapped[..., 0::2], swapped[..., 1::2]], dim=-1)),
         ("the hands are halves of the vector and turn the other way, as in some other "
          "code: here the two numbers of a hand stand next to each other",
          lambda: (lambda t: torch.cat([t[..., 0::2], t[..., 1::2]], dim=-1))(turned_rows(
              torch.stack([x[..., :4], x[..., 4:]], dim=-1).flatten(-2), sign=-1.0))),
         ("the sign of one of the four products is wrong, so that it is no rotation",
          lambda: torch.stack([turned_rows(x)[..., 0::2],
                               turned_rows(x, sign=-1.0)[..., 1::2]], -1).flatten(-2)),
         ("the sign of one of the four products is wrong, so that it is no rotation",
          lambda: torch.stack([turned_rows(x, sign=-1.0)[..., 0::2],
                               turned_rows(x)[..., 1::2]], -1).flatten(-2)),
         ("the two numbers of each hand come out apart: stack them and flatten the last "
          "two axes",
          lambda: torch.cat([turned_rows(x)[..., 0::2], turned_rows(x)[..., 1::2]], -1)),
         ("the numbers are regrouped before they are turned", lambda: turned_rows(half)),
         ("all hands turn at the same speed", lambda: turned_rows(x, 0 * i + 1)),
         ("the speeds lack the 2 of 2i / d", lambda: turned_rows(x, torch.exp(-LOG * i / 8))),
         ("the exponent is doubled: i counts the pairs",
          lambda: turned_rows(x, torch.exp(-LOG * 4 * i / 8))),
         ("the place is taken from a wrong axis: seq_len is the last but one",
          lambda: other),
         ("the table is added: multiply each vector by its rotation",
          lambda: x + table_of(7, 8)),
         ("nothing is turned", lambda: x)],
        "the vector at place p is not x[p] @ R(p)",
    )


@turning.property("dot products depend on the distance alone")
def turning_distance(function):
    q, k = sample(1, 6, seed=20).expand(9, 6), sample(1, 6, seed=21).expand(9, 6)
    q, k = function(q.clone()), function(k.clone())
    expect_tensor(q, (9, 6))
    expect_tensor(k, (9, 6))
    scores = q @ k.T
    for distance in range(-8, 9):
        row = scores.diagonal(distance)
        expect(
            near(row, row[:1].expand_as(row), 1e-4),
            "the same two vectors, the same distance apart, have another dot product at "
            "other places: a rotation by p in one and by q in the other leaves only "
            "q - p. Are both turned by the same speeds, and is the length kept?",
        )
    expect(not near(scores[0], scores[0, :1].expand(9)),
           "the dot product does not depend on the distance at all: nothing is turned")


@turning.property("keeps dtype, lets gradients through")
def turning_dtype(function):
    x = sample(2, 4, 6, seed=22, dtype=torch.float64).requires_grad_()
    out = function(x)
    expect_tensor(out, (2, 4, 6), torch.float64)
    expect(out.requires_grad, "no gradient flows back: look for .detach() or .data")
    expect(near(out.norm(dim=-1), x.norm(dim=-1)),
           "the vectors change their length: a rotation keeps it")


order = Battery(
    "order_accuracy", "order_accuracy(positions) -> share of unseen texts, 0 to 1",
    chapter=3, takes=("positions",),
)


def share(function, positions):
    """What the reader's experiment gives, as a number from 0 to 1."""
    value = function(positions)
    expect(value is not None, "it returns None: is there a return at the end?")
    try:
        value = float(value)
    except (TypeError, ValueError):
        raise Wrong(
            f"it must return one number, but it gives a {type(value).__name__}"
        ) from None
    expect(
        0 <= value <= 1,
        f"a share lies between 0 and 1, but it gives {value:.4g}: is it in percent, a "
        "count, or the loss?",
    )
    return value


@order.property("without positions it can only guess")
def order_none(function):
    value = share(function, "none")
    expect(
        value < 0.65,
        f"without positions it gets {value:.2f} right, where only guessing is possible: "
        "are the texts it is asked about those it was trained on, does the reader see "
        "the order in another way, or is one answer more frequent than the other?",
    )
    expect(
        value > 0.35,
        f"without positions it gets {value:.2f} right, less than by guessing: are the "
        "labels turned round, or few texts asked?",
    )


def order_found(function, positions):
    value = share(function, positions)
    expect(
        value > 0.8,
        f"with {positions} positions it gets only {value:.2f} right, and 0.8 is easy: "
        "is there a bend (such as a square) between the embedding and the mean? Is "
        "`positions` passed on to the embedding, are its parameters given to the "
        "optimizer, is the gradient set to zero in each step, are there enough steps?",
    )


@order.property("with learned positions it reads the order")
def order_learned(function):
    order_found(function, "learned")


@order.property("with sinusoidal positions it reads the order")
def order_sinusoidal(function):
    order_found(function, "sinusoidal")
