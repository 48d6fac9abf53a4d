"""Loss, step, loop, files: what training must do, and what it must refuse."""

import math
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emoformer import training
from emoformer.classifier import EmoformerConfig, TransformerForSequenceClassification
from emoformer.data import load_sample
from emoformer.tokens import CLS_ID, MASK_ID, PAD_ID, SEP_ID, encode, train_tokenizer
from emoformer.training import (
    TrainingConfig,
    WordCutter,
    cross_entropy,
    epoch_batches,
    evaluate,
    hide_tokens,
    learning_rate_factor,
    load_model,
    load_tensors,
    make_baseline,
    parameter_groups,
    predict,
    save_atomically,
    save_model,
    train,
    train_from_scratch,
)

TINY = {"d_model": 16, "num_heads": 2, "d_ff": 32, "vocab_size": 300}


@pytest.fixture(scope="module")
def few():
    """Ninety-six training posts of the sample."""
    sample = load_sample()
    sample["train"] = sample["train"].select(range(96))
    sample["validation"] = sample["validation"].select(range(48))
    return sample


@pytest.fixture(scope="module")
def tokenizer(few):
    return train_tokenizer(few["train"]["text"], vocab_size=300)


@pytest.fixture
def model(tokenizer):
    torch.manual_seed(3)
    return TransformerForSequenceClassification(
        EmoformerConfig(
            vocab_size=tokenizer.get_vocab_size(), d_model=16, num_heads=2, d_ff=32
        )
    )


# -- the loss ---------------------------------------------------------------
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("weights", [None, [1.0, 0.5, 3.0]])
def test_cross_entropy_equals_torch_with_gradient(dtype, atol, weights):
    torch.manual_seed(0)
    logits = 30 * torch.randn(13, 3, dtype=dtype)
    labels = torch.randint(3, (13,))
    weights = None if weights is None else torch.tensor(weights, dtype=dtype)
    mine, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss = cross_entropy(mine, labels, weights)
    other = torch.nn.functional.cross_entropy(theirs, labels, weight=weights)
    torch.testing.assert_close(loss, other, rtol=0, atol=atol)
    loss.backward()
    other.backward()
    assert mine.grad.abs().max() > 0
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=0, atol=atol)


def test_gradient_is_belief_minus_truth():
    logits = torch.tensor([[2.0, 1.0, 0.0]], requires_grad=True)
    cross_entropy(logits, torch.tensor([1])).backward()
    expected = logits.detach().softmax(-1) - torch.tensor([[0.0, 1.0, 0.0]])
    torch.testing.assert_close(logits.grad, expected)


def test_huge_logits_do_not_overflow():
    loss = cross_entropy(torch.tensor([[1e4, -1e4]]), torch.tensor([1]))
    assert loss.item() == pytest.approx(2e4)


# -- schedule and groups ----------------------------------------------------
@given(st.integers(1, 400), st.floats(0, 1))
@settings(deadline=None)
def test_schedule_rises_falls_and_stays_in_range(total, share):
    warmup = round(share * total)
    values = [learning_rate_factor(s, warmup=warmup, total=total) for s in range(total + 1)]
    assert all(0 <= value <= 1 for value in values)
    assert values[:warmup] == sorted(values[:warmup])
    assert values[warmup:] == sorted(values[warmup:], reverse=True)
    assert max(values) == pytest.approx(1.0)
    assert values[-1] == 0.0


def test_only_matrices_are_decayed(model):
    decayed, free = parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    kept = {names[id(p)] for p in free["params"]}
    assert kept == {n for n in names.values() if n.endswith("bias") or "norm" in n}
    assert len(decayed["params"]) + len(kept) == len(names)


# -- what is left to chance -------------------------------------------------
def test_hiding_spares_special_tokens_and_its_input():
    ids = torch.randint(5, 50, (40, 60), generator=torch.Generator().manual_seed(0))
    ids[:, 0], ids[:, -2], ids[:, -1] = CLS_ID, SEP_ID, PAD_ID
    before = ids.clone()
    hidden = hide_tokens(ids, 0.3, torch.Generator().manual_seed(1))
    assert torch.equal(ids, before)
    special = ids < 5
    assert torch.equal(hidden[special], ids[special])
    changed = hidden != ids
    assert (hidden[changed] == MASK_ID).all()
    count, n = int(changed.sum()), int((~special).sum())
    assert abs(count - 0.3 * n) < 5 * math.sqrt(n * 0.3 * 0.7)


def test_cutter_without_dropout_is_the_tokenizer(few, tokenizer):
    texts = [*few["train"]["text"], "", "日本語 中文 ok日", "x" * 10_000]
    expected = encode(tokenizer, texts, max_len=24)
    for dropout in (0, 1e-12):  # the library's way, and ours
        cutter = WordCutter(tokenizer, texts, dropout=dropout, max_len=24)
        assert cutter(0) == expected


def test_cutter_cuts_finer_and_by_its_seed(few, tokenizer):
    texts = list(few["train"]["text"])
    cutter = WordCutter(tokenizer, texts, dropout=0.3, max_len=128)
    assert cutter(1) == cutter(1) != cutter(2)
    usual = encode(tokenizer, texts, max_len=128)
    assert sum(map(len, cutter(1))) > sum(map(len, usual))
    for row, same in zip(cutter(1), usual, strict=True):
        assert tokenizer.decode(row) == tokenizer.decode(same)


def test_cutter_draws_from_the_ways_it_kept(few, tokenizer):
    texts = ["disappointing"] * 200
    anew = WordCutter(tokenizer, texts, dropout=0.5, max_len=64)
    kept = WordCutter(tokenizer, texts, dropout=0.5, max_len=64, ways=3)
    assert kept(1) == kept(1) != kept(2)
    assert kept(1)[:3] == anew(1)[:3]  # the first three are cut as ever
    ways = {tuple(row) for row in kept(1)[:3]}
    assert {tuple(row) for row in kept(1)[3:]} == ways
    assert len({tuple(row) for row in anew(1)}) > 3


def test_cutter_breaks_a_word_whole_when_no_merge_survives(tokenizer):
    cutter = WordCutter(tokenizer, ["happy"], dropout=1 - 1e-12, max_len=16)
    assert cutter.cut("happy", random.Random(0)) == ["h", "##a", "##p", "##p", "##y"]


def test_batches_hold_every_post_once_and_follow_the_seed(few, tokenizer):
    rows = encode(tokenizer, list(few["train"]["text"]))
    labels = list(range(96))  # a label of its own marks each post
    shape = EmoformerConfig(vocab_size=300, num_labels=96)
    config = TrainingConfig(batch_size=7)

    def order(**options):
        batches = epoch_batches(rows, labels, config, shape, **options)
        return [label for batch in batches for label in batch["labels"].tolist()]

    assert sorted(order(seed=1)) == labels
    assert order(seed=1) == order(seed=1) != order(seed=2)
    shared = [order(seed=1, process=p, processes=3) for p in range(3)]
    assert set().union(*map(set, shared)) == set(labels)


def test_hidden_tokens_follow_the_seed():
    rows = [list(range(5, 25))] * 8  # alike, so that their order shows nothing
    shape = EmoformerConfig(vocab_size=300)
    config = TrainingConfig(batch_size=8)

    def ids(seed):
        return next(epoch_batches(rows, [0] * 8, config, shape, seed=seed))["input_ids"]

    assert torch.equal(ids(1), ids(1))
    assert not torch.equal(ids(1), ids(2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, but it is 0"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
        ({"hide": 1.0}, r"hide must be in \[0, 1\), but it is 1.0"),
        ({"precision": "fp16"}, "precision must be auto, bf16 or no, but it is 'fp16'"),
    ],
)
def test_config_quotes_rule_and_value(change, message):
    with pytest.raises(ValueError, match=message):
        replace(TrainingConfig(), **change)


# -- answers ----------------------------------------------------------------
def test_predict_keeps_the_order_and_takes_any_text(model, tokenizer):
    texts = ["a much longer post than the others", "", "short", "x " * 5000]
    together = predict(model.train(), tokenizer, texts, batch_size=2)
    alone = torch.cat([predict(model, tokenizer, [text]) for text in texts])
    assert model.training  # as it was
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)
    torch.testing.assert_close(together.sum(-1), torch.ones(4))


def test_evaluate_agrees_with_cross_entropy(model, tokenizer, few):
    measured = evaluate(model, tokenizer, few["validation"])
    chances = predict(model, tokenizer, list(few["validation"]["text"]))
    labels = torch.tensor(few["validation"]["label"])
    assert measured["loss"] == pytest.approx(cross_entropy(chances.log(), labels).item(), abs=1e-5)
    right = (chances.argmax(-1) == labels).float().mean().item()
    assert measured["accuracy"] == pytest.approx(right)


# -- files ------------------------------------------------------------------
def test_saved_model_answers_the_same(tmp_path, model, tokenizer):
    save_model(tmp_path / "new", model, tokenizer, list("abcdef"))
    loaded, same, names = load_model(tmp_path / "new")
    assert names == list("abcdef")
    texts = ["not sad, just happy", "不"]
    assert torch.equal(predict(loaded, same, texts), predict(model, tokenizer, texts))


@pytest.mark.parametrize("kept", [0, 1, 100, 0.5, 0.99])
def test_a_truncated_file_is_refused(tmp_path, model, tokenizer, kept):
    save_model(tmp_path, model, tokenizer, list("abcdef"))
    path = tmp_path / "best_model.pt"
    whole = path.read_bytes()
    path.write_bytes(whole[: kept if isinstance(kept, int) else int(kept * len(whole))])
    with pytest.raises(ValueError, match=r"best_model.pt must be a whole file"):
        load_model(tmp_path)


class _Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_file_that_would_run_code_is_refused_and_does_not(tmp_path):
    torch.save({"weight": _Trap(tmp_path / "ran")}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="would run code"):
        load_tensors(tmp_path / "model.pt")
    assert not (tmp_path / "ran").exists()


def test_foreign_and_mismatching_files_are_refused(tmp_path, model, tokenizer):
    save_model(tmp_path, model, tokenizer, list("abcdef"))
    for content in (torch.zeros(3), {"weight": torch.zeros(3)}, {}):
        torch.save(content, tmp_path / "best_model.pt")
        with pytest.raises(ValueError, match=r"must fit config.json"):
            load_model(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"must be those that save_model wrote"):
        load_model(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config.json is missing"):
        load_model(tmp_path)


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    save_atomically({"a": torch.ones(2)}, tmp_path / "x.pt")

    def half(value, path):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="disk full"):
        save_atomically({"a": torch.zeros(2)}, tmp_path / "x.pt")
    assert torch.equal(load_tensors(tmp_path / "x.pt")["a"], torch.ones(2))


def test_bytes_are_written_as_they_are(tmp_path):
    save_atomically(b"\x00\xff", tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == b"\x00\xff"


# -- the loop ---------------------------------------------------------------
def test_it_learns(few, tmp_path):
    config = TrainingConfig(
        epochs=15, hide=0.0, bpe_dropout=0.0, batch_size=16, learning_rate=5e-3
    )
    model, tokenizer, history = train_from_scratch(
        few, tmp_path, config, tracker=None, dropout=0.0, **TINY
    )
    assert len(history) == 15
    assert history[0]["train_loss"] == pytest.approx(math.log(6), abs=0.15)
    assert history[-1]["train_loss"] < 0.8 * history[0]["train_loss"]
    best = max(row["macro_f1"] for row in history)
    assert evaluate(model, tokenizer, few["validation"])["macro_f1"] == pytest.approx(best)


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("balanced", [False, True])
def test_precisions_and_class_weights_run(few, tmp_path, precision, balanced):
    config = TrainingConfig(epochs=1, precision=precision, class_weights=balanced)
    model, _, history = train_from_scratch(few, tmp_path, config, tracker=None, **TINY)
    assert math.isfinite(history[0]["loss"])
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_balance_is_one_on_average():
    labels = [0] * 6 + [1] * 3 + [2]
    weights = training.balance(labels, 3)
    assert weights[labels].mean().item() == pytest.approx(1.0)
    assert weights[2] == 6 * weights[0]


def test_groups_learn_at_their_scale(few, tokenizer, tmp_path):
    """Twice the rate at half the scale is the same run, bit by bit."""
    runs = []
    for rate, scale in ((1e-3, None), (2e-3, 0.5), (2e-3, None)):
        torch.manual_seed(3)
        shape = EmoformerConfig(vocab_size=300, d_model=16, num_heads=2, d_ff=32)
        model = TransformerForSequenceClassification(shape)
        groups = None
        if scale:
            groups = [g | {"scale": scale} for g in parameter_groups(model, 0.0)]
        config = TrainingConfig(epochs=1, learning_rate=rate, weight_decay=0.0)
        folder = tmp_path / str(len(runs))
        train(model, tokenizer, few, config, folder, groups=groups, tracker=None)
        runs.append(model.state_dict())
    plain, scaled, faster = runs
    assert all(torch.equal(plain[name], scaled[name]) for name in plain)
    assert not torch.equal(plain["head.weight"], faster["head.weight"])


def test_what_is_in_no_group_does_not_learn(few, tokenizer, model, tmp_path):
    before = {name: w.clone() for name, w in model.state_dict().items()}
    groups = [{"params": model.head.parameters(), "weight_decay": 0.1, "scale": 3.0}]
    config = TrainingConfig(epochs=1)
    train(model, tokenizer, few, config, tmp_path, groups=groups, tracker=None)
    moved = {n for n, w in model.state_dict().items() if not torch.equal(w, before[n])}
    assert moved == {"head.weight", "head.bias"}


def test_a_loss_that_is_not_finite_stops_the_run(few, tmp_path, monkeypatch):
    step, calls = training.training_step, []

    def breaks_in_the_second_epoch(*arguments):
        calls.append(1)
        loss = step(*arguments)
        return loss * float("nan") if len(calls) == 5 else loss

    monkeypatch.setattr(training, "training_step", breaks_in_the_second_epoch)
    config = TrainingConfig(epochs=3, batch_size=math.ceil(len(few["train"]) / 4))
    with pytest.raises(FloatingPointError, match="in epoch 2 it was nan: lower"):
        train_from_scratch(few, tmp_path, config, tracker=None, **TINY)
    assert len(training.load_tensors(tmp_path / "training_state.pt")["history"]) == 1
    assert training.load_model(tmp_path)


def test_other_settings_do_not_resume(few, tmp_path):
    train_from_scratch(few, tmp_path, TrainingConfig(epochs=1), tracker=None, **TINY)
    with pytest.raises(ValueError, match="own settings only"):
        train_from_scratch(few, tmp_path, TrainingConfig(epochs=2), tracker=None, **TINY)


SCRIPT = """
import sys
from emoformer.data import load_sample
from emoformer.training import TrainingConfig, train_from_scratch
sample = load_sample()
sample["train"] = sample["train"].select(range(96))
sample["validation"] = sample["validation"].select(range(48))
train_from_scratch(
    sample, sys.argv[1], TrainingConfig(epochs=int(sys.argv[2])), tracker={tracker},
    d_model=16, num_heads=2, d_ff=32, vocab_size=300,
)
print("finished")
"""


def start(tmp_path, folder, *, epochs, tracker=None, before=(), **environment):
    """Start the script as a process of its own."""
    script = tmp_path / "run.py"
    script.write_text(SCRIPT.format(tracker=repr(tracker)))
    return subprocess.Popen(
        [*(before or [sys.executable]), str(script), str(folder), str(epochs)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, cwd=tmp_path,
    )


def test_a_killed_run_ends_as_if_never_killed(tmp_path):
    """Kill -9 in the middle, resume, and compare every bit."""
    epochs = 12
    process = start(tmp_path, tmp_path / "killed", epochs=epochs)
    state = tmp_path / "killed" / "training_state.pt"
    deadline = time.monotonic() + 120
    while not state.exists() and time.monotonic() < deadline:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    reached = len(load_tensors(state)["history"])
    assert 1 <= reached < epochs, "the run was not killed in the middle"
    for folder in ("killed", "whole"):
        done = start(tmp_path, tmp_path / folder, epochs=epochs)
        out, err = done.communicate(timeout=300)
        assert "finished" in out, err
    one, two = (load_tensors(tmp_path / f / "training_state.pt") for f in ("killed", "whole"))
    assert one["history"] == two["history"]
    for key, tensor in one["model"].items():
        assert torch.equal(tensor, two["model"][key]), key
    best = [load_model(tmp_path / f)[0].state_dict() for f in ("killed", "whole")]
    assert all(torch.equal(best[0][key], best[1][key]) for key in best[0])


def test_two_processes_share_the_work(tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    process = start(tmp_path, tmp_path / "two", epochs=2, before=launch, ACCELERATE_USE_CPU="true")
    out, err = process.communicate(timeout=300)
    assert out.count("finished") == 2, err
    assert len(load_tensors(tmp_path / "two" / "training_state.pt")["history"]) == 2


def test_tensorboard_logs_are_local(few, tmp_path):
    train_from_scratch(few, tmp_path, TrainingConfig(epochs=1), **TINY)
    assert list(tmp_path.rglob("events.out.tfevents*"))


def test_wandb_never_asks_for_a_login(tmp_path):
    pytest.importorskip("wandb")
    process = start(
        tmp_path, tmp_path / "run", epochs=1, tracker="wandb",
        HOME=str(tmp_path), WANDB_API_KEY="", WANDB_SILENT="true",
    )
    out, err = process.communicate(timeout=300)
    assert "finished" in out, err
    assert list((tmp_path / "run").rglob("run-*.wandb"))


def test_baselines():
    texts = ["so happy today", "very happy", "so sad today", "very sad"] * 5
    labels = [1, 1, 0, 0] * 5
    for kind in ("tfidf-words", "tfidf-words-chars"):
        fitted = make_baseline(kind).fit(texts, labels)
        assert fitted.predict(["happy", "sad"]).tolist() == [1, 0]
    majority = make_baseline("majority").fit(texts, [0] * 3 + [1] * 17)
    assert majority.predict(["sad"]).tolist() == [1]
    weighed = make_baseline("tfidf-words", 0.3, "balanced")
    assert weighed[-1].C == 0.3
    assert weighed[-1].class_weight == "balanced"
    with pytest.raises(ValueError, match="kind must be majority"):
        make_baseline("best")
