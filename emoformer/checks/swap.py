"""Run the book on a reader's own layers: ``with use(LayerNorm=MyNorm): …``."""

import contextlib
import contextvars
import functools
import importlib
import inspect
import sys
import threading

import torch
from torch import nn

from .bench import Subject, find_battery, near, run_battery, sample, scramble, untouched

MODULES = (
    "embedding", "attention", "feedforward", "encoder", "classifier", "training",
    "pretraining", "finetuning",
)
# What each thread, and each asyncio task, has put in at the moment.
_CHOSEN = contextvars.ContextVar("chosen", default={})  # noqa: B039
_LOCK = threading.Lock()
_PATCHED = {}  # class -> (how many blocks need it, its own constructor)


class Refused(ValueError):  # noqa: N818
    """The layer fails its check, or cannot be put in.

    Args:
        text: why.
        report: the report of the check, where that failed.
    """

    def __init__(self, text, report=None):
        super().__init__(text)
        self.report = report


def _book_modules():
    """The chapters' modules that are there; in a student's copy not all are."""
    found = []
    for name in MODULES:
        try:
            found.append(importlib.import_module(f"emoformer.{name}"))
        except ModuleNotFoundError:
            continue
    return found


def sockets():
    """Find every constructor argument of the book that takes a sublayer.

    Returns:
        A dict from the name of a class or function to a list of pairs: a
        class, and the name of its constructor's argument with that default.
    """
    found = {}
    for module in _book_modules():
        for holder in vars(module).values():
            if not (inspect.isclass(holder) and issubclass(holder, nn.Module)
                    and holder.__module__ == module.__name__):
                continue
            parameters = inspect.signature(_own_constructor(holder)).parameters
            for argument, parameter in parameters.items():
                default = parameter.default
                if callable(default) and getattr(
                    default, "__module__", ""
                ).startswith("emoformer.") and default is not parameter.empty:
                    found.setdefault(default.__name__, []).append((holder, argument))
    return found


def _own_constructor(holder):
    """A class's constructor as its chapter wrote it."""
    return _PATCHED[holder][1] if holder in _PATCHED else holder.__init__


def _plug(holder):
    """Let a class ask, at each construction, what is to be put in."""
    constructor = _own_constructor(holder)
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(constructor).parameters.items()
        if callable(parameter.default) and parameter.default is not parameter.empty
    }

    @functools.wraps(constructor)
    def ask_first(self, *arguments, **named):
        for argument, default in defaults.items():
            mine = _CHOSEN.get().get(getattr(default, "__name__", None))
            if mine is not None and named.get(argument, default) is default:
                named[argument] = mine
        constructor(self, *arguments, **named)

    count, _ = _PATCHED.get(holder, (0, None))
    _PATCHED[holder] = (count + 1, constructor)
    holder.__init__ = ask_first


def _unplug(holder):
    """Undo `_plug` when the last block that needs it ends."""
    count, constructor = _PATCHED[holder]
    if count > 1:
        _PATCHED[holder] = (count - 1, constructor)
        return
    del _PATCHED[holder]
    holder.__init__ = constructor


def _fitted(thing, name):
    """A reader's class under the book's argument names."""
    if not inspect.isclass(thing):
        return thing
    subject = Subject(thing, find_battery(thing, name))
    if all(mine == book for book, mine in subject.names.items()) and not subject.lacks:
        return thing

    @functools.wraps(thing, updated=())
    def make(*arguments, **named):
        return thing(*arguments, **{
            subject.names.get(key, key): value
            for key, value in named.items() if key not in subject.lacks
        })

    return make


def _torch_names(weights, layers):
    """Our encoder's weights under the names of nn.TransformerEncoder."""
    renamed = {}
    for i in range(layers):
        ours, theirs = f"layers.{i}.", f"layers.{i}."
        for kind in ("weight", "bias"):
            renamed[theirs + f"self_attn.in_proj_{kind}"] = torch.cat([
                weights[ours + f"attention.{part}.{kind}"]
                for part in ("query", "key", "value")
            ])
            for their_name, our_name in (
                ("self_attn.out_proj", "attention.output"),
                ("linear1", "feedforward.expand"),
                ("linear2", "feedforward.contract"),
                ("norm1", "attention_norm"), ("norm2", "feedforward_norm"),
            ):
                renamed[f"{theirs}{their_name}.{kind}"] = weights[
                    f"{ours}{our_name}.{kind}"
                ]
    return renamed


def _parity(names):
    """Compare an encoder built here and now with nn.TransformerEncoder.

    Returns:
        An empty string where both agree, or where the layer is none of the
        encoder's; a note where the weights cannot be mapped.

    Raises:
        Refused: outputs or gradients differ.
    """
    if not set(names) & {
        "MultiHeadSelfAttention", "FeedForward", "gelu", "LayerNorm", "EncoderLayer",
        "TransformerEncoder",
    }:
        return ""
    try:
        book = importlib.import_module("emoformer.encoder")
    except ModuleNotFoundError:
        return "chapter 06 is not there yet: compared layer by layer only"
    # Through the classifier's socket where the whole stack is the reader's.
    stack = _CHOSEN.get().get("TransformerEncoder", book.TransformerEncoder)
    ours = stack(num_layers=2, d_model=12, num_heads=3, d_ff=20, dropout=0.0)
    ours = scramble(ours, size=0.3).double().eval()
    theirs = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(
            12, 3, 20, dropout=0.0, activation="gelu", batch_first=True,
            layer_norm_eps=1e-12,
        ), 2, enable_nested_tensor=False,
    ).double().eval()
    try:
        theirs.load_state_dict(_torch_names(ours.state_dict(), 2))
    except (KeyError, RuntimeError):
        return (
            "its parameters have other names than the book's: models trained from "
            "the start run on it, but saved weights will not load"
        )
    x = sample(2, 5, 12, dtype=torch.float64)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    tilt = sample(2, 5, 12, seed=1, dtype=torch.float64) * mask[:, :, None]
    results = []
    for forward in (
        lambda v: ours(v, mask),
        lambda v: theirs(v, src_key_padding_mask=~mask),  # True = padding there
    ):
        leaf = x.clone().requires_grad_()
        out = forward(leaf)
        slope, = torch.autograd.grad((out * tilt).sum(), leaf)
        results.append((out[mask].detach(), slope))
    for what, (mine, wanted) in zip(
        ("outputs", "gradients"), zip(*results, strict=True), strict=True
    ):
        if not near(mine, wanted, 1e-5):
            raise Refused(
                f"the {what} of an encoder built with {', '.join(names)} differ from "
                "those of nn.TransformerEncoder with the same weights, by up to "
                f"{(mine - wanted).abs().max():.1e}"
            )
    return ""


@contextlib.contextmanager
def use(**layers):
    """Build the book's models on your own layers for the length of a block.

    ``with use(MultiHeadSelfAttention=MyAttention): …``: whatever is built in
    the block takes ``MyAttention`` wherever the book would take its own,
    through the constructor arguments that name a sublayer's class. First the
    layer is checked, then an encoder with it is compared with PyTorch's. A
    model keeps its layers after the block; the book's own come back, in this
    thread alone and after an error as well.

    Args:
        layers: the book's name of a class or function, and yours.

    Yields:
        A list of notes.

    Raises:
        ValueError: (a ``Refused``, whose ``report`` is the failed check's)
            there is no place for such a name, a layer fails its check, or
            the encoder differs from PyTorch's.
    """
    places = sockets()
    for name, thing in layers.items():
        if name not in places:
            raise Refused(
                f"the name must be one of {', '.join(sorted(places))}, for which some "
                f"constructor has an argument, but it is {name!r}"
            )
        report = run_battery(thing, find_battery(thing, name))
        if not report.passed:
            row = report.failures[0]
            raise Refused(
                f"{report.name} cannot be used as {name}: it fails at “{row.name}”. "
                f"{row.hint}", report,
            )
    holders = {holder for name in layers for holder, _ in places[name]}
    with _LOCK:
        for holder in holders:
            _plug(holder)
    token = _CHOSEN.set(
        _CHOSEN.get() | {name: _fitted(thing, name) for name, thing in layers.items()}
    )
    try:
        with untouched():
            note = _parity(layers)
        if note:
            print(f"note: {note}", file=sys.stderr)
        yield [note] if note else []
    finally:
        _CHOSEN.reset(token)
        with _LOCK:
            for holder in holders:
                _unplug(holder)
