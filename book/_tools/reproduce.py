"""Measure results/ again: python book/_tools/reproduce.py [rung].

Without a rung, all of them, each in a process of its own (so that its peak
memory is its own). A rung that was stopped goes on where it stopped: what is
finished lies under runs/.
"""

import json
import os
import resource
import subprocess
import sys
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score
from tqdm import tqdm

from emoformer.classifier import EmoformerConfig, count_parameters
from emoformer.data import held_out_keys, load_tweet_eval, remove_held_out, source_of
from emoformer.pretraining import (
    PretrainingConfig,
    PretrainingModel,
    label_table,
    load_half,
    load_mixture,
    pretrain,
    save_half,
    training_flops,
)
from emoformer.tokens import train_tokenizer
from emoformer.training import (
    TrainingConfig,
    load_tensors,
    make_baseline,
    predict,
    save_atomically,
    train_from_scratch,
)

ROOT = Path(__file__).resolve().parents[2]
RESULTS, RUNS = ROOT / "results", ROOT / "runs"
MODELS = ROOT / "book" / "_static" / "models"
SEEDS = [0, 1, 2, 3, 4]
BASELINES = ["majority", "tfidf-words", "tfidf-words-chars"]
PACKAGES = ("torch", "tokenizers", "accelerate", "scikit-learn", "numpy")

# What each variant changes in the recipe: fields of the model, fields of the
# training, and whether the labels are shuffled.
VARIANTS = {
    "scratch": {},
    "mean-pooling": {"pooling": "mean"},
    "cls-pooling": {"pooling": "cls"},
    "pre-norm": {"norm_first": True},
    "no-positions": {"positions": "none"},
    "one-head": {"num_heads": 1},
    "one-layer": {"num_layers": 1},
    "class-weights": {"class_weights": True},
    "shuffled-labels": {},
}


def emotion():
    """The reported task, its train split free of held-out texts."""
    dataset = load_tweet_eval("emotion")
    if source_of(dataset) == "sample":
        raise SystemExit(
            "results/ is measured on TweetEval itself: set EMOFORMER_DATA to "
            "a folder that holds it, or connect to the Hub"
        )
    dataset["train"] = remove_held_out(dataset["train"], held_out_keys())
    return dataset


def score(labels, chosen, num_labels):
    """The one function that every rung is scored by."""
    return {
        "macro_f1": f1_score(
            labels, chosen, average="macro", labels=range(num_labels),
            zero_division=0,
        ),
        "accuracy": accuracy_score(labels, chosen),
    }


def write_json(value, path):
    """Write JSON whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_atomically(json.dumps(value, indent=1) + "\n", path)


def write_rung(rung, scores, validation, chosen, *, seeds, minutes, parameters):
    """Put a rung into results/ladder.json and its predictions beside it."""
    path = RESULTS / "ladder.json"
    ladder = json.loads(path.read_text()) if path.exists() else []
    ladder = [row for row in ladder if (row["rung"], row["task"]) != (rung, "emotion")]
    ladder.append({
        "rung": rung, "task": "emotion", "split": "test", "seeds": seeds,
        "macro_f1": [s["macro_f1"] for s in scores],
        "accuracy": [s["accuracy"] for s in scores],
        "validation_macro_f1": validation,
        "parameters": parameters, "minutes": minutes,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
        "extra_data": [], "command": f"make reproduce RUNG={rung}",
        "versions": {name: version(name) for name in PACKAGES},
    })
    order = [*BASELINES, "scratch"]
    ladder.sort(key=lambda row: order.index(row["rung"]))
    write_json(ladder, path)
    for seed, ids in zip(seeds, chosen, strict=True):
        target = RESULTS / "predictions" / rung / f"emotion-seed{seed}.txt"
        target.parent.mkdir(parents=True, exist_ok=True)
        save_atomically("".join(f"{int(i)}\n" for i in ids), target)


def baseline(rung):
    """Fit a baseline; its one setting is chosen on validation."""
    dataset, start = emotion(), time.perf_counter()
    classes = dataset["train"].features["label"].num_classes
    tried = []
    for strength in [1.0] if rung == "majority" else [0.03, 0.1, 0.3, 1.0, 3.0]:
        model = make_baseline(rung, strength)
        model.fit(dataset["train"]["text"], dataset["train"]["label"])
        chosen = model.predict(dataset["validation"]["text"])
        f1 = score(dataset["validation"]["label"], chosen, classes)["macro_f1"]
        tried.append((f1, strength, model))
    best, strength, model = max(tried, key=lambda row: row[0])
    chosen = model.predict(dataset["test"]["text"])
    scores = score(dataset["test"]["label"], chosen, classes)
    weights = getattr(model[-1], "coef_", None)
    print(f"{rung}: C = {strength}, {scores}")
    write_rung(
        rung, [scores], [best], [chosen], seeds=[0],
        minutes=[(time.perf_counter() - start) / 60],
        parameters=0 if weights is None else weights.size + len(weights),
    )


def one_run(variant, seed, dataset):
    """Train one seed of one variant, or read what an earlier call measured."""
    folder = RUNS / variant / f"seed{seed}"
    done = folder / "measured.json"
    if done.exists():
        return json.loads(done.read_text())
    changes = dict(VARIANTS[variant])
    balanced = changes.pop("class_weights", False)
    if variant == "shuffled-labels":
        order = torch.randperm(
            len(dataset["train"]), generator=torch.Generator().manual_seed(seed)
        ).tolist()
        labels = dataset["train"]["label"]
        shuffled = dataset["train"].remove_columns("label").add_column(
            "label", [labels[i] for i in order],
            feature=dataset["train"].features["label"],
        )
        dataset = type(dataset)(dataset | {"train": shuffled})
    start = time.perf_counter()
    model, tokenizer, history = train_from_scratch(
        dataset, folder, TrainingConfig(seed=seed, class_weights=balanced),
        tracker=None, **changes,
    )
    minutes = (time.perf_counter() - start) / 60
    chosen = predict(model, tokenizer, list(dataset["test"]["text"])).argmax(-1)
    measured = {
        "history": history, "minutes": minutes, "chosen": chosen.tolist(),
        "parameters": count_parameters(model.config)["total"],
        "validation_macro_f1": max(row["macro_f1"] for row in history),
        **score(dataset["test"]["label"], chosen, model.config.num_labels),
    }
    write_json(measured, done)
    return measured


def variant(name):
    """Train a variant over all seeds and write what was measured."""
    dataset = emotion()
    runs = [one_run(name, seed, dataset) for seed in tqdm(SEEDS, desc=name)]
    labels = dataset["test"]["label"]
    summary = {
        "seeds": SEEDS,
        **{
            key: [run[key] for run in runs]
            for key in ("validation_macro_f1", "macro_f1", "accuracy", "minutes")
        },
        "parameters": runs[0]["parameters"],
    }
    if name == "scratch":
        summary["history"] = [run["history"] for run in runs]
        summary["confusion"] = sum(
            confusion_matrix(labels, run["chosen"]) for run in runs
        ).tolist()
        write_rung(
            name, runs, summary["validation_macro_f1"],
            [run["chosen"] for run in runs], seeds=SEEDS,
            minutes=summary["minutes"], parameters=summary["parameters"],
        )
    path = RESULTS / "scratch.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    kept[name] = summary
    write_json({known: kept[known] for known in VARIANTS if known in kept}, path)


# The pretrained model: few enough parameters that two models in half precision
# fit into 16 MB. No dropout: each text is met four times only.
ENCODER = {
    "d_model": 256, "num_heads": 4, "num_layers": 3, "d_ff": 1024,
    "max_len": 64, "dropout": 0.0, "norm_first": True, "pooling": "mean",
}


def real_mixture():
    """The pieces to pretrain on and what is missing of them; never the sample."""
    mixture, missing = load_mixture()
    if "sample" in mixture:
        raise SystemExit("pretraining needs the real data: set EMOFORMER_DATA")
    return mixture, missing


def fresh_encoder(mixture, tokenizer, seed=0):
    """A model with one output for each label of the mixture."""
    names, _ = label_table(mixture)
    torch.manual_seed(seed)
    model = PretrainingModel(EmoformerConfig(
        vocab_size=tokenizer.get_vocab_size(), num_labels=max(1, len(names)),
        **ENCODER,
    ))
    return model, names


def mixture_tokenizer(mixture):
    """A tokenizer from all texts that may be trained on."""
    texts = [text for piece in mixture.values() for text in piece["text"]]
    return train_tokenizer(texts, vocab_size=5000, min_frequency=30)


def pretraining():
    """Pretrain the encoder on the mixture, and save it."""
    mixture, missing = real_mixture()
    tokenizer = mixture_tokenizer(mixture)
    model, names = fresh_encoder(mixture, tokenizer)
    config, folder = PretrainingConfig(epochs=4), RUNS / "pretraining"
    state = folder / "pretraining_state.pt"
    before = load_tensors(state)["history"][-1]["tokens"] if state.exists() else 0
    start = time.perf_counter()
    history = pretrain(model, tokenizer, mixture, config, folder)
    seconds, tokens = time.perf_counter() - start, history[-1]["tokens"]
    done = folder / "measured.json"
    if done.exists():
        rate, peak = json.loads(done.read_text()).values()
    else:  # of the part that this call ran
        rate = (tokens - before) / seconds
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
        write_json({"tokens_per_second": rate, "peak_mib": peak}, done)
    save_half(MODELS / "pretrained", model.eval(), tokenizer, names)
    texts = config.batch_size * history[-1]["step"]
    write_part("pretraining.json", "main", {
        "history": history, "tokens": tokens, "tokens_per_second": rate,
        "minutes": tokens / rate / 60, "peak_mib": peak,
        "parameters": sum(p.numel() for p in model.parameters()),
        "flops": training_flops(
            model.config, tokens, seq_len=tokens / texts,
            chosen_share=config.share,
        ),
        "config": asdict(config), "model": asdict(model.config),
        "pieces": {name: len(piece) for name, piece in mixture.items()},
        "missing": missing,
    })


def write_part(file, part, value):
    """Put one part into a JSON file of results/, and leave the others."""
    path = RESULTS / file
    kept = json.loads(path.read_text()) if path.exists() else {}
    write_json(kept | {part: value}, path)


STAGES = {"pretraining": pretraining}


def main(names):
    """Measure the named rungs, or all of them in processes of their own."""
    known = [*BASELINES, *VARIANTS, *STAGES]
    for name in names:
        if name not in known:
            raise SystemExit(f"a rung must be one of {', '.join(known)}: {name!r}")
        if name in BASELINES:
            baseline(name)
        elif name in VARIANTS:
            variant(name)
        else:
            STAGES[name]()
    if not names:
        for name in tqdm(known, desc="rungs"):
            subprocess.run([sys.executable, __file__, name], check=True)
        tools = Path(__file__).parent
        subprocess.run([sys.executable, tools / "prose_numbers.py", "--write"], check=True)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main(sys.argv[1:])
