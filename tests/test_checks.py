"""The reader's bench: each mistake gets its hint, and a check disturbs nothing."""

import importlib
import inspect
import pdb
import random
import subprocess
import sys
import threading
import time
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from torch import nn

import mistakes
from emoformer import checks
from emoformer.attention import MultiHeadSelfAttention
from emoformer.checks import bench, check, use
from emoformer.checks.bench import BATTERIES, find_battery, run_battery
from emoformer.checks.swap import Refused, sockets
from emoformer.classifier import EmoformerConfig, TransformerForSequenceClassification
from emoformer.encoder import EncoderLayer, LayerNorm
from tests.bank import hint_given, load, quietly
from tests.bank.attention import Fused, HeadByHead, MaskInverted, ResidualInside, Written

ROOT = Path(__file__).resolve().parents[1]
MISTAKES, RIGHT = load()
MODULES = ("data", "tokens", "embedding", "attention", "feedforward", "encoder",
           "classifier", "training", "evaluation", "pretraining", "finetuning")
CONFIG = EmoformerConfig(vocab_size=20, d_model=12, num_heads=3, d_ff=20)


def public():
    """Every class and function that a chapter exports."""
    for module in map(importlib.import_module, (f"emoformer.{m}" for m in MODULES)):
        for name in module.__all__:
            thing = getattr(module, name)
            if inspect.isclass(thing) or inspect.isfunction(thing):
                yield pytest.param(thing, id=name)


# The bank


@pytest.mark.parametrize("entry", MISTAKES, ids=lambda m: f"{m.layer}: {m.name}")
def test_mistake_gets_its_hint(entry):
    report = quietly(entry.thing, entry.layer)
    assert not report.passed
    assert hint_given(entry, report)[1], str(report)
    for row in report.failures:  # words and names, never a trace
        assert row.hint and "\n" not in row.hint and "Traceback" not in row.hint


@pytest.mark.parametrize(
    ("layer", "thing"), [pytest.param(r[0], r[2], id=f"{r[0]}: {r[1]}") for r in RIGHT]
)
def test_right_variant_passes(layer, thing):
    report = quietly(thing, layer)
    assert report.passed, str(report)


@pytest.mark.parametrize("thing", public())
def test_the_books_own_passes_in_under_two_seconds(thing):
    assert thing.__name__ in BATTERIES, "there is no check for it"
    start = time.process_time()
    report = quietly(thing, thing.__name__)
    assert time.process_time() - start < 2
    assert report.passed and all(row.passed for row in report.rows), str(report)


def test_bank_is_large_and_covers_every_battery():
    assert len(MISTAKES) >= 60
    assert {m.layer for m in MISTAKES} == set(BATTERIES)
    names = [(m.layer, m.name) for m in MISTAKES]
    assert len(names) == len(set(names))
    for m in MISTAKES:
        assert all((m.looks, m.shows, m.find)) and len(m.hint) > 8


def test_bank_prints_a_row_a_mistake_and_fails_when_one_slips_through(monkeypatch, capsys):
    from tests.bank import __main__ as command

    entries, variants = MISTAKES[:2], RIGHT[:1]
    monkeypatch.setattr(command, "load", lambda: (entries, variants))
    assert command.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and "caught" in lines[0]
    slipping = entries + [type(entries[0])(
        "masked_softmax", "none", "a", "b", "c", "nothing of the kind", RIGHT[0][2])]
    monkeypatch.setattr(command, "load", lambda: (slipping, variants))
    assert command.main() == 1
    assert "SLIPPED THROUGH" in capsys.readouterr().out
    refused = [("masked_softmax", "wrong", entries[0].thing)]
    monkeypatch.setattr(command, "load", lambda: (entries, refused))
    assert command.main() == 1
    assert "REFUSED" in capsys.readouterr().out


def test_appendix_is_written_from_the_bank():
    assert mistakes.PAGE.read_text("utf-8") == mistakes.page(), (
        "run: python book/_tools/mistakes.py")


# What a reader's code may do to a check


def softmax_with(action):
    """A right softmax that does something on the side."""
    def masked_softmax(scores, mask=None):
        action(scores)
        return importlib.import_module("emoformer.attention").masked_softmax(scores, mask)
    return masked_softmax


def failing(thing, name="masked_softmax"):
    report = quietly(thing, name)
    assert not report.passed
    return "\n".join(row.hint for row in report.failures)


def raise_it(error):
    raise error


@pytest.mark.parametrize(("action", "hint"), [
    (lambda s: print("hello"), "it prints"),
    (lambda s: s.add_(1), "it changes its input"),
    (lambda s: torch.manual_seed(0), "global state (seed)"),
    (lambda s: torch.set_grad_enabled(False), "global state (grad mode)"),
    (lambda s: torch.set_default_dtype(torch.float64), "global state (default dtype)"),
    (lambda s: raise_it(KeyError("lost")), "raises KeyError: 'lost', at line"),
    (lambda s: raise_it(NotImplementedError()), "not written yet"),
    (lambda s: sys.exit(3), "raises SystemExit"),
    (lambda s: s.nope, "raises AttributeError"),
])
def test_bad_manners_are_reported(action, hint):
    before = torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_rng_state()
    assert hint in failing(softmax_with(action))
    after = torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_rng_state()
    assert before[:2] == after[:2] and torch.equal(before[2], after[2])


@pytest.mark.parametrize(("value", "hint"), [
    (None, "is there a return"), (3.5, "must be a tensor"), ("x", "must be a tensor"),
    (torch.zeros(2, 2), "must have the shape"),
])
def test_wrong_types_and_shapes_are_reported(value, hint):
    assert hint in failing(lambda scores, mask=None: value)


def test_a_hanging_layer_is_stopped(monkeypatch):
    monkeypatch.setattr(bench, "SECONDS", 0.2)

    def endless(scores, mask=None):
        while True:
            try:
                time.sleep(0.01)
            except Exception:
                pass

    def stubborn(scores, mask=None):
        while True:
            try:
                time.sleep(0.01)
            except:  # noqa: E722
                time.sleep(0.1)
                raise

    for thing in (endless, stubborn):
        start = time.monotonic()
        report = quietly(thing, "masked_softmax")
        assert time.monotonic() - start < 3
        assert len(report.rows) == 1 and "it hangs" in report.rows[0].hint


def test_the_time_limit_leaves_alarms_as_they_were():
    signal = pytest.importorskip("signal")
    if not hasattr(signal, "setitimer"):
        pytest.skip("no alarm signal here")
    rung = []
    before = signal.signal(signal.SIGALRM, lambda *_: rung.append(1))
    try:
        signal.setitimer(signal.ITIMER_REAL, 100)
        quietly(softmax_with(lambda s: None), "masked_softmax")
        assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= 100
        assert signal.getsignal(signal.SIGALRM) is not signal.SIG_DFL
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_a_debugger_gets_time_and_its_prompt(monkeypatch, capsys):
    monkeypatch.setattr(bench, "SECONDS", 0.1)
    stopped = []

    def masked_softmax(scores, mask=None):
        if not stopped:
            stopped.append(True)
            sys.settrace(lambda *_: None)
            pdb.Pdb(stdout=sys.stdout).message("(Pdb) here")
            time.sleep(0.4)
            sys.settrace(None)
        return importlib.import_module("emoformer.attention").masked_softmax(scores, mask)

    tracing = sys.gettrace()
    try:
        assert check(masked_softmax).passed
    finally:
        sys.settrace(tracing)
    assert "(Pdb) here" in capsys.readouterr().out


def test_a_check_changes_nothing_global():
    torch.manual_seed(11)
    random.seed(11)
    np.random.seed(11)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    threads, seed = torch.get_num_threads(), torch.initial_seed()
    with torch.no_grad():
        assert quietly(MultiHeadSelfAttention, None).passed
        assert not torch.is_grad_enabled()
    torch.set_default_dtype(torch.float64)
    try:
        assert quietly(MultiHeadSelfAttention, None).passed
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]
    assert (threads, seed) == (torch.get_num_threads(), torch.initial_seed())


def test_a_check_gives_the_same_report_twice_and_in_a_thread():
    first = str(quietly(Written, "MultiHeadSelfAttention"))
    found = []
    thread = threading.Thread(
        target=lambda: found.append(str(run_battery(
            Written, BATTERIES["MultiHeadSelfAttention"]))))
    thread.start()
    thread.join()
    assert found == [first]


def test_names_are_recognised():
    class MyMultiHeadSelfAttention2(Written):
        pass

    def my_masked_softmax(scores, mask=None):
        pass

    assert find_battery(MyMultiHeadSelfAttention2).name == "MultiHeadSelfAttention"
    assert find_battery(my_masked_softmax).name == "masked_softmax"
    assert find_battery(Fused, "MultiHeadSelfAttention").name == "MultiHeadSelfAttention"
    with pytest.raises(ValueError, match="'Fused' holds none of.*MultiHeadSelfAttention"):
        find_battery(Fused)
    with pytest.raises(ValueError, match="pass the class itself"):
        find_battery(LayerNorm(4), "LayerNorm")


def test_report_prints_each_property_and_shows_nothing_twice(capsys):
    report = check(MaskInverted, "MultiHeadSelfAttention")
    out = capsys.readouterr().out
    assert out.rstrip("\n") == str(report)
    assert "FAIL  does not look at padding" in out and "  pass  " in out
    assert report._ipython_display_() is None
    assert repr(report).startswith("<Report on MaskInverted: ")
    assert check(Written, "MultiHeadSelfAttention").passed is True


def test_other_argument_names_are_read_and_noted():
    report = quietly(HeadByHead, "MultiHeadSelfAttention")
    assert report.passed
    assert any("read n_heads as num_heads" in note for note in report.notes)

    class Early(nn.Module):
        def __init__(self, dim, num_heads, dropout=0.1):
            self.query = nn.Linear(dim, dim)

    assert "super().__init__() must come first" in failing(Early, "MultiHeadSelfAttention")

    class Odd(nn.Module):
        def __init__(self, alpha, beta):
            super().__init__()

    hint = failing(Odd, "MultiHeadSelfAttention")
    assert "expected signature is MultiHeadSelfAttention(*, d_model, num_heads" in hint


def test_checks_do_not_import_the_chapters():
    """In the student's copy there is nothing to import."""
    code = (
        "import sys, emoformer.checks\n"
        f"print([m for m in {MODULES!r} if 'emoformer.' + m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


# The command


def run_file(tmp_path, source, *options):
    path = tmp_path / "my_layers.py"
    path.write_text(source)
    return subprocess.run(
        [sys.executable, "-m", "emoformer.checks", path, *options],
        capture_output=True, text=True,
    )


GOOD = "import torch\ndef my_relu(x):\n    return torch.relu(x)\n"
BAD = "def relu(x):\n    return abs(x)\n"


def test_command_checks_a_file(tmp_path):
    done = run_file(tmp_path, GOOD)
    assert done.returncode == 0 and "my_relu, as relu" in done.stdout
    report = tmp_path / "report.xml"
    done = run_file(tmp_path, GOOD + BAD, "--junit", report)
    assert done.returncode == 1 and "2 checked, 1 failed: relu" in done.stdout
    root = ElementTree.parse(report).getroot()
    assert {s.get("name"): int(s.get("failures")) > 0 for s in root} == {
        "my_relu": False, "relu": True}
    assert root.find(".//failure").get("message")
    assert not (tmp_path / "report.xml.part").exists()


@pytest.mark.parametrize(("source", "status", "text"), [
    ("x = 1\n", 2, "defines nothing that there is a check for"),
    ("import nowhere\n", 1, "cannot be imported: it raises ModuleNotFoundError"),
    ("def relu(x:\n", 1, "cannot be imported: it raises SyntaxError"),
    ("raise SystemExit(0)\n", 1, "cannot be imported: it raises SystemExit"),
    ("from torch import relu\n", 2, "defines nothing"),
])
def test_command_says_what_is_wrong_with_a_file(tmp_path, source, status, text):
    done = run_file(tmp_path, source)
    assert done.returncode == status
    assert text in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_command_says_that_there_is_no_file(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "emoformer.checks", tmp_path / "none.py"],
        capture_output=True, text=True,
    )
    assert done.returncode == 1 and "must be an existing .py file" in done.stderr


# Use mine


def attention_of(model):
    return {type(layer.attention) for layer in model.encoder.layers}


@pytest.mark.parametrize("mine", [Written, Fused, HeadByHead])
def test_models_built_in_the_block_run_on_the_readers_layer(mine):
    with use(MultiHeadSelfAttention=mine):
        model = TransformerForSequenceClassification(CONFIG)
        layer = EncoderLayer(d_model=12, num_heads=3, d_ff=20)
        other = EncoderLayer(
            d_model=12, num_heads=3, d_ff=20, attention=ResidualInside)
    assert attention_of(model) == {mine} and type(layer.attention) is mine
    assert type(other.attention) is ResidualInside, "what is asked for by name stays"
    assert attention_of(TransformerForSequenceClassification(CONFIG)) == {
        MultiHeadSelfAttention}
    ids = torch.randint(5, 20, (2, 4))
    assert model(ids).shape == (2, 6)


def test_a_wrong_layer_is_refused_with_the_failing_check():
    with pytest.raises(Refused, match="does not look at padding.*mask is inverted") as caught:
        with use(MultiHeadSelfAttention=MaskInverted):
            pytest.fail("the block must not run")
    assert not caught.value.report.passed
    assert attention_of(TransformerForSequenceClassification(CONFIG)) == {
        MultiHeadSelfAttention}
    with pytest.raises(Refused, match="must be one of.*LayerNorm.*but it is 'pool'"):
        with use(pool=print):
            pass


def test_parity_is_checked_again(monkeypatch):
    """A layer that its check would let through is stopped by the comparison."""
    monkeypatch.setitem(BATTERIES, "MultiHeadSelfAttention", bench.Battery.__new__(
        bench.Battery))
    battery = BATTERIES["MultiHeadSelfAttention"]
    battery.name, battery.properties, battery.makes = "MultiHeadSelfAttention", [], ()
    battery.kind, battery.signature = "class", ""
    with pytest.raises(Refused, match="outputs of an encoder built with .* differ"):
        with use(MultiHeadSelfAttention=ResidualInside):
            pass


def test_undone_after_errors_in_blocks_within_blocks_and_in_threads():
    built, go, done = {}, threading.Event(), threading.Event()

    def other():
        go.wait(30)
        built["other"] = attention_of(TransformerForSequenceClassification(CONFIG))
        done.set()

    thread = threading.Thread(target=other)
    thread.start()
    with pytest.raises(ZeroDivisionError):
        with use(MultiHeadSelfAttention=Written):
            go.set()
            assert done.wait(30)
            with use(LayerNorm=type("MyLayerNorm", (LayerNorm,), {})):
                model = TransformerForSequenceClassification(CONFIG)
                assert attention_of(model) == {Written}
                assert type(model.embedding_norm).__name__ == "MyLayerNorm"
            model = TransformerForSequenceClassification(CONFIG)
            assert attention_of(model) == {Written}
            assert type(model.embedding_norm) is LayerNorm
            1 / 0  # noqa: B018
    thread.join()
    assert built["other"] == {MultiHeadSelfAttention}
    assert attention_of(TransformerForSequenceClassification(CONFIG)) == {
        MultiHeadSelfAttention}
    assert not checks.swap._PATCHED
    for holder, _ in sockets()["MultiHeadSelfAttention"]:
        assert holder.__init__.__qualname__ == f"{holder.__name__}.__init__"
        assert not hasattr(holder.__init__, "__wrapped__")


def test_every_layer_has_a_socket():
    assert set(sockets()) >= {
        "Embedding", "MultiHeadSelfAttention", "FeedForward", "gelu", "LayerNorm",
        "EncoderLayer", "TransformerEncoder"}


def test_saved_weights_load_into_the_readers_layer():
    from emoformer.pretraining import PretrainingModel, load_half

    folder = ROOT / "book" / "_static" / "models" / "pretrained"
    ids = torch.randint(5, 100, (2, 7))
    with torch.no_grad():
        wanted = load_half(folder, PretrainingModel)[0](ids)[0]
        with use(MultiHeadSelfAttention=Written):
            model, _, _ = load_half(folder, PretrainingModel)
        assert attention_of(model.classifier) == {Written}
        torch.testing.assert_close(model(ids)[0], wanted, rtol=0, atol=1e-4)


def test_training_runs_on_the_readers_layer(tmp_path):
    from emoformer.data import load_sample
    from emoformer.training import TrainingConfig, train_from_scratch

    dataset = load_sample()
    dataset["train"] = dataset["train"].select(range(64))
    config = TrainingConfig(epochs=1, precision="no")
    calls = []

    class MyMultiHeadSelfAttention(Written):
        def finish(self, x):
            if self.training:
                calls.append(1)
            return super().finish(x)

    with use(MultiHeadSelfAttention=MyMultiHeadSelfAttention):
        calls.clear()
        model, _, history = train_from_scratch(
            dataset, tmp_path, config, vocab_size=400, tracker=None,
            d_model=16, num_heads=2, d_ff=32,
        )
    assert attention_of(model) == {MyMultiHeadSelfAttention}
    assert len(history) == 1 and len(calls) == 4  # two steps, two layers
