"""What every check is built from: batteries, a reader's layer under watch, a report.

Written by hand, unlike the modules beside this folder.
"""

import contextlib
import copy
import inspect
import linecache
import random
import re
import signal
import sys
import threading
import traceback
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn

# Folders whose code is not the reader's: PyTorch's and ours.
_NOT_THEIRS = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
SECONDS = 5.0  # how long one property may take before it counts as hanging
BATTERIES = {}

# Other names for the book's arguments. A reader's layer may use them.
SYNONYMS = {
    "d_model": ("embed_dim", "emb_dim", "embedding_dim", "model_dim", "n_embd",
                "dim", "hidden_size", "hidden_dim", "width", "d"),
    "num_heads": ("n_heads", "n_head", "nhead", "heads", "num_attention_heads",
                  "h"),
    "d_ff": ("dim_feedforward", "ff_dim", "ffn_dim", "hidden_dim", "d_hidden",
             "intermediate_size", "inner_dim", "hidden_size"),
    "dropout": ("p", "dropout_p", "drop", "dropout_rate", "p_dropout"),
    "max_len": ("max_length", "max_seq_len", "block_size", "seq_len",
                "max_position_embeddings"),
    "num_layers": ("n_layers", "n_layer", "depth", "layers", "num_hidden_layers"),
    "vocab_size": ("n_vocab", "num_embeddings", "vocab"),
    "num_labels": ("num_classes", "n_classes", "n_labels", "classes"),
    "norm_first": ("pre_norm", "prenorm"),
    "eps": ("epsilon", "layer_norm_eps", "variance_epsilon"),
    "layer_norm_eps": ("eps", "epsilon", "norm_eps"),
    "attention_mask": ("mask", "attn_mask", "padding_mask"),
    "return_weights": ("need_weights", "output_attentions", "return_attention"),
}


class Wrong(Exception):  # noqa: N818
    """A property does not hold; the text is the hint for the reader."""


class Skip(Exception):  # noqa: N818
    """A property cannot be looked at here; the text says why."""


class TimeUp(BaseException):  # noqa: N818
    """The reader's code takes too long. No ``except Exception`` stops it."""


# Reports


@dataclass
class Row:
    """One property and what became of it.

    Args:
        name: the property.
        passed: True, False, or None where it could not be looked at.
        hint: for a failure the likely cause, else the reason it was skipped.
        error: the exception that the reader's code raised, for a debugger.
    """

    name: str
    passed: bool | None
    hint: str = ""
    error: BaseException | None = None


@dataclass
class Report:
    """What a check found.

    Args:
        name: the reader's class or function.
        battery: what it was checked as.
        rows: one row a property, with ``name``, ``passed`` (None where it could
            not be looked at) and ``hint``.
        notes: things the reader should know that are no failure.
    """

    name: str
    battery: str
    rows: list = field(default_factory=list)
    notes: list = field(default_factory=list)

    @property
    def passed(self):
        """Whether no property failed."""
        return all(row.passed is not False for row in self.rows)

    @property
    def failures(self):
        """The rows that failed."""
        return [row for row in self.rows if row.passed is False]

    def __str__(self):
        as_what = "" if self.name == self.battery else f", as {self.battery}"
        lines = [f"{self.name}{as_what}"]
        given = set()
        for row in self.rows:
            mark = {True: "pass", False: "FAIL", None: "skip"}[row.passed]
            lines.append(f"  {mark}  {row.name}")
            if row.hint and row.hint in given:
                lines.append("        (the hint above)")
            elif row.hint:
                lines += _wrap(row.hint)
                given.add(row.hint)
        lines += [f"  note: {note}" for note in self.notes]
        held = sum(row.passed is True for row in self.rows)
        looked = sum(row.passed is not None for row in self.rows)
        lines.append(f"{held} of {looked} hold.")
        return "\n".join(lines)

    def __repr__(self):
        verdict = "passed" if self.passed else f"{len(self.failures)} failed"
        return f"<Report on {self.name}: {verdict}>"

    def _ipython_display_(self):
        """Show nothing: `check` has printed it already."""


def _wrap(text, width=76):
    """Break a hint into indented lines."""
    lines, line = [], "        "
    for word in text.split():
        if len(line) + len(word) > width and line.strip():
            lines.append(line.rstrip())
            line = "        "
        line += word + " "
    return [*lines, line.rstrip()]


# Batteries


class Battery:
    """The properties that a layer or a function must have.

    Args:
        name: the book's name of it.
        signature: how it is made and called, as the reader is told.
        chapter: number of the chapter that teaches it.
        kind: ``"class"`` or ``"function"``.
        makes: for a class, the keyword arguments of its constructor.
        takes: the names of the arguments it is called with.
    """

    def __init__(self, name, signature, *, chapter, makes=(), takes=()):
        self.name, self.signature, self.chapter = name, signature, chapter
        self.kind = "class" if makes else "function"
        self.makes, self.takes = tuple(makes), tuple(takes)
        self.properties = []
        BATTERIES[name] = self

    def property(self, name):
        """Add a function of one `Subject` as a property with this name."""
        def add(test):
            self.properties.append((name, test))
            return test
        return add


def find_battery(thing, name=None):
    """Find what a reader's class or function is meant to be.

    ``MyMultiHeadSelfAttention``, ``multi_head_self_attention2`` and the like
    are recognised; the longest name that fits wins.

    Raises:
        ValueError: there is no check by that name, or none that fits.
    """
    if isinstance(thing, nn.Module) or not callable(thing):
        raise ValueError(
            "a class or a function must be checked, not what was made from it, "
            f"but this is a {type(thing).__name__} object: pass the class itself"
        )
    own = name or getattr(thing, "__name__", type(thing).__name__)
    plain = re.sub(r"[\W_]", "", own).lower()
    kind = "class" if inspect.isclass(thing) else "function"
    fits = [
        battery for battery in BATTERIES.values()
        if (battery.name == name if name else battery.kind == kind
            and battery.name.replace("_", "").lower() in plain)
    ]
    if not fits:
        known = ", ".join(b.name for b in BATTERIES.values() if b.kind == kind)
        raise ValueError(
            f"the name of a {kind} must say what it is to be checked as, but "
            f"{own!r} holds none of: {known}. Rename it, or name it: "
            f'check(…, "{next(iter(BATTERIES))}")'
        )
    return max(fits, key=lambda battery: len(battery.name))


# The reader's code under watch


def describe(error):
    """Say in a line what was raised and where in the reader's own code."""
    frames = [
        frame for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(_NOT_THEIRS)
    ]
    text = " ".join(str(error).split()) or "no message"
    if "before Module.__init__() call" in text:
        text = "super().__init__() must come first in the constructor, before any layer"
    line = f"raises {type(error).__name__}: {text[:300]}"
    if frames:
        last = frames[-1]
        source = (last.line or linecache.getline(last.filename, last.lineno or 0))
        line += f", at line {last.lineno} in {last.name}: {source.strip()[:100]}"
    return line


class Broke(Wrong):
    """The reader's code raised something."""


class Subject:
    """A reader's class or function; everything of theirs runs through it."""

    def __init__(self, thing, battery):
        self.thing, self.battery = thing, battery
        self.names = {}  # the book's argument -> the reader's
        self.lacks = set()  # the book's arguments that they do not take
        self.notes, self.manners = [], {}
        self.last_error = None
        self._fit()

    def _fit(self):
        """Find out which of the book's argument names the reader takes."""
        if not self.battery.makes:
            return
        try:
            taken = inspect.signature(self.thing).parameters
        except (TypeError, ValueError):
            return
        if any(p.kind is p.VAR_KEYWORD for p in taken.values()):
            return
        used = set(taken) & set(self.battery.makes)
        for name in self.battery.makes:
            if name in taken:
                self.names[name] = name
                continue
            other = next(
                (o for o in SYNONYMS.get(name, ()) if o in taken and o not in used),
                None,
            )
            if other is None:
                self.lacks.add(name)
                continue
            used.add(other)
            self.names[name] = other
            self.notes.append(
                f"read {other} as {name}; the book's signature is "
                f"{self.battery.signature}"
            )

    def make(self, **arguments):
        """Construct the reader's class; their errors become hints.

        Arguments that the class does not take are left out.
        """
        renamed = {
            self.names.get(name, name): value
            for name, value in arguments.items() if name not in self.lacks
        }
        made = self.run(self.thing, **renamed)
        if not isinstance(made, nn.Module):
            raise Wrong(
                "the class must be a torch.nn.Module: write "
                f"class {self.thing.__name__}(nn.Module), and "
                "super().__init__() first in its constructor"
            )
        return made

    def run(self, function, *arguments, **named):
        """Call something of the reader's under watch; return what it returns.

        Inputs that were changed are put right again; that, printing and
        touched global state are written down for the last row of the report.
        """
        given = [*arguments, *named.values()]
        before = [_snapshot(value) for value in given]
        world = _world()
        voice = _Listening(sys.stdout)
        try:
            with contextlib.redirect_stdout(voice), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return function(*arguments, **named)
        except (TimeUp, Wrong, Skip):
            raise
        except NotImplementedError as error:
            self.last_error = error
            raise Broke("not written yet: it raises NotImplementedError") from None
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # SystemExit too: this is a check
            self.last_error = error
            hint = describe(error)
            if isinstance(error, TypeError) and (
                "argument" in str(error) or "positional" in str(error)
            ):
                hint += f". The expected signature is {self.battery.signature}"
            raise Broke(hint) from None
        finally:
            if voice.heard:
                self.manners["print"] = (
                    "it prints: take the print out of the layer, and look at "
                    "values with a debugger or outside it"
                )
            for value, was in zip(given, before, strict=True):
                if _restore(value, was):
                    self.manners["input"] = (
                        "it changes its input: whoever passed that tensor or "
                        "list finds other values in it afterwards. Look for "
                        "an operation in place: +=, *=, x[...] = …, a method "
                        "whose name ends in _ , or sort/append on a list"
                    )
            for key, now in _world().items():
                if now != world[key]:
                    self.manners[key] = (
                        f"it changes PyTorch's global state ({key}): a layer "
                        "must leave that to whoever calls it"
                    )

    def __call__(self, *arguments, **named):
        """Call the reader's function, for batteries of functions."""
        return self.run(self.thing, *arguments, **named)


class _Listening:
    """A stream that passes everything on and remembers that it was used.

    What is printed is still shown, and a debugger's prompt too.
    """

    def __init__(self, stream):
        self.stream, self.heard = stream, False

    def write(self, text):
        self.heard = self.heard or bool(text.strip()) and sys.gettrace() is None
        return self.stream.write(text)

    def __getattr__(self, name):
        return getattr(self.stream, name)


def _world():
    """The global state that a layer has to leave alone."""
    return {
        "seed": torch.initial_seed(),
        "grad mode": torch.is_grad_enabled(),
        "default dtype": torch.get_default_dtype(),
        "number of threads": torch.get_num_threads(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
    }


def _snapshot(value):
    """Remember a tensor or a list as it is."""
    if isinstance(value, torch.Tensor):
        return None if value.is_meta else value.detach().clone()
    if type(value) in (list, dict, set):  # a subclass may compare by identity
        try:
            return copy.deepcopy(value)
        except Exception:
            return None
    return None


def _restore(value, was):
    """Put an argument right again; say whether it had been changed."""
    if was is None:
        return False
    if isinstance(value, torch.Tensor):
        if value.shape == was.shape and torch.equal(
            value.detach().nan_to_num(), was.nan_to_num()
        ):
            return False
        if value.shape == was.shape:
            value.data.copy_(was)
        return True
    try:
        changed = value != was
    except Exception:
        return False
    if changed is True:
        value.clear()
        value.extend(was) if isinstance(value, list) else value.update(was)
        return True
    return False


@contextlib.contextmanager
def untouched():
    """Run a block, then put seeds and PyTorch's global state back."""
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    numpy_state, dtype = np.random.get_state(), torch.get_default_dtype()
    threads, grad = torch.get_num_threads(), torch.is_grad_enabled()
    strict = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        torch.set_grad_enabled(True)
        torch.set_default_dtype(torch.float32)
        yield
    finally:
        torch.set_rng_state(torch_state)
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(grad)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        now = torch.are_deterministic_algorithms_enabled()
        if now != strict:  # the call is slow the first time
            torch.use_deterministic_algorithms(strict, warn_only=warn_only)


@contextlib.contextmanager
def time_limit(seconds):
    """Raise `TimeUp` in a block that runs too long.

    By an alarm signal: only in the main thread, and not on Windows. While a
    debugger is at work nothing happens, however long one thinks.
    """
    can = hasattr(signal, "setitimer") and (
        threading.current_thread() is threading.main_thread()
    )
    if not can:
        yield
        return

    def ring(_number, _frame):
        if sys.gettrace() is None:
            raise TimeUp

    before = signal.signal(signal.SIGALRM, ring)
    # It rings again: a bare except may have swallowed the first.
    waiting = signal.setitimer(signal.ITIMER_REAL, seconds, 0.5)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *waiting)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def unhurried():
    """Stop the clock of `time_limit` for a block: a first import may take seconds."""
    if not hasattr(signal, "setitimer"):
        yield
        return
    waiting = signal.setitimer(signal.ITIMER_REAL, 0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *waiting)


def run_battery(thing, battery):
    """Check one class or function; return a `Report`."""
    report = Report(getattr(thing, "__name__", type(thing).__name__), battery.name)
    with untouched():
        # PyTorch loads a good deal at the first of these: not on the reader's clock.
        torch.empty(1, device="meta") * 2.0
        subject = Subject(thing, battery)
        for name, test in battery.properties:
            torch.manual_seed(2024)
            random.seed(2024)
            subject.last_error = None
            row = Row(name, True)
            try:
                with time_limit(SECONDS):
                    test(subject)
            except Skip as reason:
                row.passed, row.hint = None, str(reason)
            except Wrong as wrong:
                row.passed, row.hint = False, str(wrong)
                row.error = subject.last_error
            except TimeUp:
                row.passed = False
                row.hint = (
                    f"not done after {SECONDS:g} seconds: it hangs. Look for a "
                    "while whose condition never becomes false, or a loop over "
                    "something that grows. The rest was not looked at"
                )
            except Exception as error:
                row.passed, row.error = False, error
                row.hint = (
                    "the check cannot work with what came back "
                    f"({type(error).__name__}: {' '.join(str(error).split())[:200]})"
                    f". The expected signature is {battery.signature}"
                )
            row.hint = " ".join(row.hint.split())  # a value may print in lines
            report.rows.append(row)
            torch.set_grad_enabled(True)
            torch.set_default_dtype(torch.float32)
            if row.passed is False and (
                "it hangs" in row.hint or "not written yet" in row.hint
            ):
                break
        else:
            hint = ". ".join(subject.manners.values())
            report.rows.append(Row(
                "leaves inputs, global state and the screen alone", not hint, hint
            ))
        report.notes = subject.notes
    return report


# What the batteries say


def expect(holds, hint):
    """Raise `Wrong` with the hint unless something holds."""
    if not holds:
        raise Wrong(hint)


def expect_tensor(value, shape=None, dtype=None, what="the output"):
    """Refuse what is no tensor, or of another shape or dtype."""
    if value is None:
        raise Wrong(f"{what} is None: is there a return at the end?")
    expect(
        isinstance(value, torch.Tensor),
        f"{what} must be a tensor, but it is a {type(value).__name__}"
        + (" of " + str(len(value)) if isinstance(value, (tuple, list)) else ""),
    )
    if shape is not None:
        expect(
            tuple(value.shape) == tuple(shape),
            f"{what} must have the shape {tuple(shape)}, but it has "
            f"{tuple(value.shape)}",
        )
    if dtype is not None:
        expect(
            value.dtype == dtype,
            f"{what} must be {dtype}, as its input is, but it is {value.dtype}: "
            "look for a conversion, or a tensor made with a dtype of its own",
        )


def near(actual, wanted, tolerance=1e-5):
    """Whether two tensors have the same shape and nearly the same values."""
    if not isinstance(actual, torch.Tensor) or actual.shape != wanted.shape:
        return False
    actual, wanted = actual.detach().double(), wanted.detach().double()
    return torch.allclose(
        actual, wanted, rtol=tolerance, atol=tolerance, equal_nan=True
    )


def explain(actual, wanted, causes, otherwise, tolerance=1e-5):
    """Raise `Wrong` with the cause that reproduces a wrong result.

    Args:
        actual: what the reader's layer gave.
        wanted: what is right.
        causes: pairs of a hint and a function without arguments that gives
            what the layer would give with that mistake.
        otherwise: the hint where none of them fits.
        tolerance: how near is equal.
    """
    expect_tensor(actual, wanted.shape)
    if near(actual, wanted, tolerance):
        return
    for hint, mistaken in causes:
        try:
            value = mistaken()
        except Exception:
            continue
        if near(actual, value, tolerance):
            raise Wrong(hint)
    raise Wrong(otherwise)


# Properties that many layers share


def sample(*shape, seed=0, dtype=torch.float32):
    """Draw normal numbers from a generator of their own."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def scramble(module, seed=0, size=0.5):
    """Give all parameters random values, biases and norms too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(
                size * torch.randn(parameter.shape, generator=generator)
            )
    return module


def expect_learning(subject, module, forward, *inputs, but=()):
    """Refuse a layer some of whose parameters or inputs get no gradient.

    Args:
        subject: the `Subject`.
        module: the reader's module.
        forward: what to call with the inputs; gives a tensor.
        inputs: floating tensors that must get a gradient as well.
        but: parts of names whose gradient may be zero.
    """
    inputs = [value.clone().requires_grad_() for value in inputs]
    out = subject.run(forward, *inputs)
    expect_tensor(out)
    expect(
        out.requires_grad,
        "no gradient flows back: the output is cut off from the graph. Look for "
        ".detach(), .data, .item(), .numpy(), torch.tensor(…) around a result, "
        "or torch.no_grad()",
    )
    tilt = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view(out.shape)
    (out * tilt).sum().backward()
    for value in inputs:
        expect(
            value.grad is not None and value.grad.abs().max() > 0,
            "the parameters get a gradient, but the input gets none, so the "
            "layers below would never learn. Look for .detach() or .data",
        )
    for name, parameter in module.named_parameters():
        if any(part in name for part in but):
            continue
        expect(
            parameter.grad is not None and parameter.grad.abs().max() > 0,
            f"the parameter {name} gets no gradient: it is made, but the output "
            "does not depend on it, or it is cut off by .detach() or .data",
        )


def expect_to_move(subject, make, *inputs):
    """Refuse a layer that stays behind on the CPU or in float32.

    Args:
        subject: the `Subject`.
        make: makes the reader's module.
        inputs: what it is called with; floating ones are converted.
    """
    module = make().double().eval()
    wide = [v.double() if v.is_floating_point() else v for v in inputs]
    out = subject.run(module, *wide)
    out = out[0] if isinstance(out, tuple) else out
    expect_tensor(out, dtype=torch.float64, what="the output of a float64 layer")
    # "meta" is a device without memory: whatever was left behind meets it.
    module = make().to("meta").eval()
    try:
        out = subject.run(module, *(value.to("meta") for value in inputs))
    except Broke as broke:
        text = str(broke)
        if "meta" not in text and "device" not in text:
            raise
        if "Cannot copy out of meta" in text or "meta tensors" in text:
            raise Wrong(
                "it looks at values inside a tensor (.item(), .tolist(), an if on "
                "a tensor): on a GPU that stalls every step. " + text
            ) from None
        raise Wrong(
            "part of it stays behind on the CPU when the model moves to another "
            "device: keep tensors that are no parameters with register_buffer, "
            f"and make new ones on the input's device. It {text}"
        ) from None
    out = out[0] if isinstance(out, tuple) else out
    expect(
        isinstance(out, torch.Tensor) and out.device.type == "meta",
        "its output is not on the device of its input: look for .cpu() or a "
        "tensor made without device=x.device",
    )


def expect_dropout(subject, make, forward, *, linear=True):
    """Refuse dropout that is missing, always on, or not made up for.

    Args:
        subject: the `Subject`.
        make: makes the module for a dropout.
        forward: calls a module, under watch, on one fixed input; gives a
            tensor (copies, …) of many copies of one text.
        linear: whether dropout leaves the mean as it is.
    """
    if "dropout" in subject.lacks:
        raise Wrong(
            "it takes no dropout. The expected signature is "
            + subject.battery.signature
        )
    module = make(0.5)
    quiet = forward(module.eval())
    expect(
        near(quiet, forward(module)) and near(quiet[1:], quiet[:-1]),
        "in evaluation it gives another answer each time: dropout is active there. "
        "Use nn.Dropout, or F.dropout with training=self.training (its default "
        "is True)",
    )
    noisy = forward(module.train())
    expect(
        not near(noisy[1:], noisy[:-1]) or not near(noisy, quiet),
        "in training with dropout 0.5 nothing is dropped: is the dropout layer "
        "made but never called, or a plain number passed where "
        "self.training belongs?",
    )
    off = make(0.0).train()
    off.load_state_dict(module.state_dict())
    expect(
        near(forward(off), quiet),
        "with dropout 0 it is not the same in training as in evaluation: a "
        "fixed share is dropped instead of the argument, or the values are "
        "rescaled a second time",
    )
    if linear:
        error = (noisy.mean(dim=0) - quiet[0]).norm()
        spread = noisy.std(dim=0).norm() / len(noisy) ** 0.5
        expect(
            error < 6 * spread + 1e-6,
            "with dropout its mean over many passes is not what it gives in "
            "evaluation: what is kept must be divided by 1 - dropout (nn.Dropout "
            "does), and it must be applied to the weights after the softmax, not "
            "to the scores before it",
        )
