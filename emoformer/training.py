"""Training: from random weights to a model that tells emotions apart."""
# ---- imports
import json
import math
import os
import pickle
import random
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from sklearn.dummy import DummyClassifier
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics import accuracy_score, f1_score
from sklearn.pipeline import make_pipeline, make_union
from sklearn.svm import LinearSVC
from tokenizers import Tokenizer
from tqdm.auto import tqdm

from emoformer.classifier import EmoformerConfig
from emoformer.classifier import TransformerForSequenceClassification
from emoformer.tokens import CLS_ID, MASK_ID, SEP_ID, SPECIAL_TOKENS, UNK_ID
from emoformer.tokens import bucket_by_length, encode, make_batch
from emoformer.tokens import train_tokenizer


# ---- loss
def cross_entropy(logits, labels, class_weights=None):
    """Measure how surprised the model is by the right labels.

    Args:
        logits: (batch, num_labels), floating.
        labels: (batch,) int64 in 0 … num_labels - 1.
        class_weights: optional, (num_labels,): how much each class counts.

    Returns:
        A scalar: the mean over the batch of -log p(label), weighted where
        weights are given.
    """
    log_probabilities = logits - logits.logsumexp(dim=-1, keepdim=True)
    surprise = -log_probabilities.gather(1, labels[:, None])[:, 0]  # (batch,)
    if class_weights is None:
        return surprise.mean()
    weights = class_weights[labels]  # (batch,)
    return (weights * surprise).sum() / weights.sum()


# ---- schedule
def learning_rate_factor(step, *, warmup, total):
    """Share of the full learning rate at a step: up in a line, then down.

    Args:
        step: number of steps done, 0 … ``total``.
        warmup: steps of the way up.
        total: steps of the whole run.

    Returns:
        A float in [0, 1].

    Source: Devlin et al. (2019), appendix A.2.
    """
    if step < warmup:
        return (step + 1) / warmup
    return max(0.0, (total - step) / max(1, total - warmup))


# ---- groups
def parameter_groups(model, weight_decay):
    """Split parameters into those that are decayed and those that are not.

    Matrices are decayed. Biases and the norms' vectors are not: pulling
    them to zero would change what the layer computes, not simplify it.

    Args:
        model: any module.
        weight_decay: AdamW's decay for the matrices, at least 0.

    Returns:
        Two groups in the form that ``torch.optim`` takes.
    """
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    return [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]


# ---- hide
def hide_tokens(input_ids, share, generator):
    """Replace a random share of the tokens by [MASK]; special ones stay.

    Args:
        input_ids: (batch, seq_len) int64; left as it is.
        share: the chance of each token to be hidden, in [0, 1).
        generator: a ``torch.Generator`` on the CPU.

    Returns:
        A new tensor like ``input_ids``.
    """
    chance = torch.rand(input_ids.shape, generator=generator)
    hidden = (chance < share) & (input_ids >= len(SPECIAL_TOKENS))
    return input_ids.masked_fill(hidden, MASK_ID)


# ---- cut
class WordCutter:
    """Encode texts a little differently each time (BPE-dropout).

    Each time a merge could be made it is passed over with a small chance,
    so that a word falls into other pieces in every epoch, and its pieces
    learn to stand for it too.

    Args:
        tokenizer: a tokenizer from `train_tokenizer`.
        texts: a list of strings.
        dropout: the chance to pass a merge over, in [0, 1).
        max_len: the most tokens a text may keep, at least 3.

    Source: Provilkov, Emelianenko and Voita (2020). The ``tokenizers``
    library has it too, but cannot be seeded.
    """

    def __init__(self, tokenizer, texts, *, dropout, max_len):
        self.tokenizer, self.texts = tokenizer, texts
        self.dropout, self.max_len = dropout, max_len
        model = json.loads(tokenizer.to_str())["model"]
        self.vocab = model["vocab"]
        self.ranks = {tuple(pair): i for i, pair in enumerate(model["merges"])}

    def __call__(self, seed):
        """Encode all texts.

        Args:
            seed: an int; the same seed cuts the same way.

        Returns:
            A list of lists of token ids, as from `encode`.
        """
        if self.dropout == 0:
            return encode(self.tokenizer, self.texts, max_len=self.max_len)
        rng = random.Random(seed)
        rows = []
        for text in self.texts:
            text = self.tokenizer.normalizer.normalize_str(text)
            row = [CLS_ID]
            for word, _ in self.tokenizer.pre_tokenizer.pre_tokenize_str(text):
                for piece in self.cut(word, rng):
                    token = self.vocab.get(piece, UNK_ID)
                    if token != UNK_ID or row[-1] != UNK_ID:  # fuse unknowns
                        row.append(token)
            rows.append(row[: self.max_len - 1] + [SEP_ID])
        return rows

    def cut(self, word, rng):
        """Cut one word into pieces.

        Args:
            word: a non-empty string, normalised.
            rng: a ``random.Random``.

        Returns:
            A list of strings; the pieces after the first start with ``##``.
        """
        pieces = [word[0]] + ["##" + character for character in word[1:]]
        while True:
            merges = [
                (self.ranks[pair], place)
                for place, pair in enumerate(zip(pieces, pieces[1:]))
                if pair in self.ranks and rng.random() >= self.dropout
            ]
            if not merges:
                return pieces
            _, place = min(merges)  # the merge that was learned first
            joined = pieces[place] + pieces[place + 1].removeprefix("##")
            pieces[place : place + 2] = [joined]


# ---- config
@dataclass(frozen=True)
class TrainingConfig:
    """Every number that shapes a training run.

    Args:
        seed: decides the order of batches and all that is left to chance.
        epochs: passes over the training set, at least 1.
        batch_size: posts per step, at least 1.
        learning_rate: AdamW's, at its highest.
        warmup: share of the steps in which the learning rate rises, [0, 1].
        weight_decay: AdamW's, for matrices.
        clip: the largest norm that all gradients together may have.
        hide: share of the tokens hidden in training, in [0, 1).
        bpe_dropout: chance to pass over a merge in training, in [0, 1).
        class_weights: whether rare classes count more (see `balance`).
        precision: ``"auto"``, ``"bf16"`` or ``"no"`` (float32).

    Raises:
        ValueError: a number breaks its rule.
    """

    seed: int = 0
    epochs: int = 12
    batch_size: int = 32
    learning_rate: float = 1e-3
    warmup: float = 0.1
    weight_decay: float = 0.01
    clip: float = 1.0
    hide: float = 0.3
    bpe_dropout: float = 0.1
    class_weights: bool = False
    precision: str = "auto"

    def __post_init__(self):
        for name, holds, rule in (
            ("epochs", self.epochs >= 1, "at least 1"),
            ("batch_size", self.batch_size >= 1, "at least 1"),
            ("learning_rate", self.learning_rate > 0, "above 0"),
            ("warmup", 0 <= self.warmup <= 1, "in [0, 1]"),
            ("weight_decay", self.weight_decay >= 0, "at least 0"),
            ("clip", self.clip > 0, "above 0"),
            ("hide", 0 <= self.hide < 1, "in [0, 1)"),
            ("bpe_dropout", 0 <= self.bpe_dropout < 1, "in [0, 1)"),
            ("precision", self.precision in ("auto", "bf16", "no"),
             "auto, bf16 or no"),
        ):
            if not holds:
                raise ValueError(
                    f"{name} must be {rule}, but it is {getattr(self, name)!r}"
                )


# ---- precision
def choose_precision(wish="auto"):
    """Choose between bfloat16 and float32 for the matrix products.

    Args:
        wish: ``"bf16"`` or ``"no"`` is granted; ``"auto"`` takes bfloat16
            where the processor multiplies in it, several times faster.

    Returns:
        ``"bf16"`` or ``"no"``.
    """
    if wish != "auto":
        return wish
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported() else "no"
    can = torch.cpu.get_capabilities()
    fast = can.get("avx512_bf16") or can.get("amx_bf16")
    return "bf16" if fast else "no"


# ---- data
def epoch_batches(
    rows, labels, config, model_config, *, seed, process=0, processes=1
):
    """Make the batches of one epoch: shuffled, bucketed, some tokens hidden.

    Everything left to chance follows from the seed, so a run that was
    killed and resumed meets the same batches.

    Args:
        rows: a list of lists of token ids.
        labels: a list of ints, as long as ``rows``.
        config: a `TrainingConfig`.
        model_config: an `EmoformerConfig`.
        seed: an int, another one for each epoch.
        process: which of the processes this is, from 0.
        processes: how many share the batches; each gets as many as the
            others, so that none waits in vain at the end.

    Yields:
        Dicts from `make_batch`, with ``labels``.
    """
    batches = bucket_by_length(
        [len(row) for row in rows], batch_size=config.batch_size, seed=seed
    )
    batches += batches[: -len(batches) % processes]
    generator = torch.Generator().manual_seed(seed + process)
    for indices in batches[process::processes]:
        batch = make_batch(
            [rows[i] for i in indices], vocab_size=model_config.vocab_size,
            labels=[labels[i] for i in indices],
            num_labels=model_config.num_labels,
        )
        batch["input_ids"] = hide_tokens(
            batch["input_ids"], config.hide, generator
        )
        yield batch


# ---- predict
@torch.no_grad()
def predict(model, tokenizer, texts, *, batch_size=128):
    """Score texts with a model.

    Args:
        model: a `TransformerForSequenceClassification`.
        tokenizer: the tokenizer it was trained with.
        texts: a list of strings, of any length; the model reads the first
            ``max_len`` tokens of each.
        batch_size: texts per forward pass.

    Returns:
        Probabilities (texts, num_labels), float32, on the CPU, in the order
        of ``texts``; each row sums to 1.
    """
    was_training = model.training
    model.eval()
    config, device = model.config, next(model.parameters()).device
    rows = encode(tokenizer, texts, max_len=config.max_len)
    result = torch.zeros(len(rows), config.num_labels)
    for indices in bucket_by_length(
        [len(row) for row in rows], batch_size=batch_size
    ):
        batch = make_batch(
            [rows[i] for i in indices], vocab_size=config.vocab_size
        )
        logits = model(**{k: v.to(device) for k, v in batch.items()})
        result[indices] = logits.float().softmax(dim=-1).cpu()
    model.train(was_training)
    return result


# ---- evaluate
def evaluate(model, tokenizer, dataset):
    """Measure a model on a split.

    Args:
        model: a `TransformerForSequenceClassification`.
        tokenizer: the tokenizer it was trained with.
        dataset: a Dataset with the columns ``text`` and ``label``.

    Returns:
        A dict with ``loss`` (mean cross-entropy), ``macro_f1`` and
        ``accuracy``, floats.
    """
    probabilities = predict(model, tokenizer, list(dataset["text"]))
    labels = torch.tensor(dataset["label"])
    chosen = probabilities.argmax(dim=-1)
    right = probabilities.gather(1, labels[:, None])
    return {
        "loss": -right.clamp_min(1e-12).log().mean().item(),
        "macro_f1": f1_score(
            labels, chosen, average="macro", zero_division=0,
            labels=range(model.config.num_labels),
        ),
        "accuracy": accuracy_score(labels, chosen),
    }


# ---- save
def save_atomically(value, path):
    """Write a file whole or not at all.

    The bytes go to a file beside it, which then takes its name: whoever
    reads ``path`` finds the old content or the new, never half of it.

    Args:
        value: a string, or anything for ``torch.save``.
        path: the file to write; its folder must exist.
    """
    path = Path(path)
    draft = path.with_name(path.name + ".part")
    if isinstance(value, str):
        draft.write_text(value, encoding="utf-8")
    else:
        torch.save(value, draft)
    os.replace(draft, path)


def load_tensors(path):
    """Read what `save_atomically` wrote with ``torch.save``.

    Only tensors and plain values are read: a file that would run code is
    refused by ``weights_only=True``.

    Args:
        path: the file.

    Returns:
        What was saved, on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, or is no such file at all.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (
        RuntimeError, OSError, EOFError, ValueError, pickle.UnpicklingError
    ) as error:
        raise ValueError(
            f"{path} must be a whole file written by torch.save that holds "
            "tensors only; it is cut off, of another kind, or would run "
            "code. Nothing was loaded. Copy it again, or train again."
        ) from error


# ---- folder
def save_model(folder, model, tokenizer, label_names):
    """Save a model so that `load_model` needs nothing else.

    Writes ``config.json``, ``tokenizer.json`` and ``best_model.pt``.

    Args:
        folder: created where it is missing.
        model: a `TransformerForSequenceClassification`.
        tokenizer: its tokenizer.
        label_names: one name for each label.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    described = asdict(model.config) | {"label_names": list(label_names)}
    save_atomically(json.dumps(described, indent=1) + "\n", folder / "config.json")
    save_atomically(tokenizer.to_str(), folder / "tokenizer.json")
    save_atomically(model.state_dict(), folder / "best_model.pt")


def load_model(folder):
    """Load what `save_model` wrote.

    Args:
        folder: the folder.

    Returns:
        The model in evaluation mode, its tokenizer, and the list of label
        names.

    Raises:
        FileNotFoundError: the folder or one of its three files is missing.
        ValueError: a file is damaged, or the files do not fit each other.
    """
    folder = Path(folder)
    for name in ("config.json", "tokenizer.json", "best_model.pt"):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"a saved model needs config.json, tokenizer.json and "
                f"best_model.pt, but {folder / name} is missing"
            )
    try:
        described = json.loads((folder / "config.json").read_text("utf-8"))
        label_names = described.pop("label_names")
        config = EmoformerConfig(**described)
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # tokenizers raises bare Exceptions
        raise ValueError(
            f"config.json and tokenizer.json in {folder} must be those that "
            f"save_model wrote: {error}"
        ) from error
    weights = load_tensors(folder / "best_model.pt")
    model = TransformerForSequenceClassification(config)
    try:
        model.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise ValueError(
            f"the weights in {folder / 'best_model.pt'} must fit "
            f"config.json beside it: {error}"
        ) from error
    return model.eval(), tokenizer, label_names


# ---- train
def balance(labels, num_labels):
    """Weigh each class by how rare it is, 1 on average over the posts.

    Args:
        labels: a list of ints.
        num_labels: number of classes.

    Returns:
        (num_labels,) float32: posts / (classes · posts of the class).
    """
    counts = torch.bincount(torch.tensor(labels), minlength=num_labels)
    return len(labels) / (num_labels * counts.clamp_min(1).float())


def _tracker_options(tracker, folder):
    """Options for a tracker; W&B never asks for a login.

    Without WANDB_MODE or WANDB_API_KEY it writes to the folder only.
    """
    if tracker != "wandb":
        return {}
    known = "online" if os.environ.get("WANDB_API_KEY") else "offline"
    mode = os.environ.get("WANDB_MODE", known)
    return {"wandb": {"mode": mode, "dir": str(folder)}}


def _resume(folder, settings, model, optimizer):
    """Load the state of a run that was stopped; return its history."""
    path = folder / "training_state.pt"
    if not path.is_file():
        return []
    state = load_tensors(path)
    if state["settings"] != settings:
        raise ValueError(
            f"a run can be resumed with its own settings only, but {folder} "
            f"holds one with {state['settings']}, not {settings}. Take "
            "another folder, or delete this one."
        )
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["history"]


def training_step(model, batch, optimizer, config, accelerator, weights=None):
    """Take one step: forward, loss, backward, clip, update.

    Args:
        model: the prepared model, in training mode.
        batch: a dict from `make_batch`, with ``labels``.
        optimizer: the prepared optimizer.
        config: a `TrainingConfig`.
        accelerator: an ``accelerate.Accelerator``.
        weights: optional class weights, (num_labels,).

    Returns:
        The loss, a scalar without gradient.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    batch = dict(batch)
    labels = batch.pop("labels")
    half = choose_precision(config.precision) == "bf16"
    with torch.autocast(accelerator.device.type, torch.bfloat16, enabled=half):
        logits = model(**batch)
    loss = cross_entropy(logits.float(), labels, weights)
    optimizer.zero_grad()
    accelerator.backward(loss)
    accelerator.clip_grad_norm_(model.parameters(), config.clip)
    optimizer.step()
    return loss.detach()


def train(
    model, tokenizer, dataset, config, folder, *, tracker="tensorboard"
):
    """Train a classifier, keep the best epoch, and survive being killed.

    After every epoch the folder holds the best model so far (by macro-F1 on
    the validation split; see `load_model`) and the state of the run. Called
    again with the same arguments, it goes on after the last whole epoch and
    ends exactly as if it had never stopped.

    Args:
        model: a `TransformerForSequenceClassification`.
        tokenizer: its tokenizer.
        dataset: a DatasetDict with ``train`` and ``validation``.
        config: a `TrainingConfig`.
        folder: where the run is kept.
        tracker: ``"tensorboard"`` (local files), ``"wandb"`` or None.

    Returns:
        The history: a dict for each epoch with ``epoch``, ``train_loss``,
        ``loss``, ``macro_f1`` and ``accuracy``. The model then holds the
        weights of the best epoch.

    Raises:
        ValueError: the folder holds a run with other settings, or the
            labels do not fit the model.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator(log_with=tracker, project_dir=folder)
    plain = model  # the same weights, without accelerate's wrapper
    optimizer = torch.optim.AdamW(
        parameter_groups(model, config.weight_decay), lr=config.learning_rate
    )
    model, optimizer = accelerator.prepare(model, optimizer)
    labels = list(dataset["train"]["label"])
    cutter = WordCutter(
        tokenizer, list(dataset["train"]["text"]),
        dropout=config.bpe_dropout, max_len=plain.config.max_len,
    )
    weights = None
    if config.class_weights:
        weights = balance(labels, plain.config.num_labels)
        weights = weights.to(accelerator.device)
    settings = {
        "training": asdict(config), "model": asdict(plain.config),
        "posts": len(labels),
    }
    history = _resume(folder, settings, plain, optimizer)
    if tracker:
        accelerator.init_trackers(
            "emoformer", config=asdict(config),
            init_kwargs=_tracker_options(tracker, folder),
        )

    processes = accelerator.num_processes
    steps = math.ceil(math.ceil(len(labels) / config.batch_size) / processes)
    total = config.epochs * steps
    step = len(history) * steps
    bar = tqdm(
        total=total, initial=step, desc="training", unit="step",
        disable=None if accelerator.is_main_process else True,
    )
    for epoch in range(len(history), config.epochs):
        seed = 1_000_003 * config.seed + 1009 * epoch
        torch.manual_seed(seed + accelerator.process_index)  # for dropout
        model.train()
        losses = []
        for batch in epoch_batches(
            cutter(seed), labels, config, plain.config, seed=seed,
            process=accelerator.process_index, processes=processes,
        ):
            factor = learning_rate_factor(
                step, warmup=round(config.warmup * total), total=total
            )
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * factor
            batch = {k: v.to(accelerator.device) for k, v in batch.items()}
            losses.append(training_step(
                model, batch, optimizer, config, accelerator, weights
            ))
            step += 1
            bar.update()
        history.append({
            "epoch": epoch + 1,
            "train_loss": torch.stack(losses).mean().item(),
            **evaluate(plain, tokenizer, dataset["validation"]),
        })
        accelerator.log(history[-1], step=epoch + 1)
        bar.set_postfix(macro_f1=f"{history[-1]['macro_f1']:.3f}")
        if accelerator.is_main_process:
            names = dataset["train"].features["label"].names
            if history[-1] is max(history, key=lambda row: row["macro_f1"]):
                save_model(folder, plain, tokenizer, names)
            save_atomically(
                {
                    "settings": settings, "history": history,
                    "model": plain.state_dict(),
                    "optimizer": optimizer.state_dict(),
                },
                folder / "training_state.pt",
            )
        accelerator.wait_for_everyone()
    bar.close()
    if tracker:
        accelerator.end_training()
    plain.load_state_dict(load_tensors(folder / "best_model.pt"))
    return history


# ---- recipe
SCRATCH = {
    "d_model": 128, "num_heads": 4, "num_layers": 2, "d_ff": 512,
    "max_len": 64, "dropout": 0.3, "pooling": "max",
}


def train_from_scratch(
    dataset, folder, config, *, vocab_size=4000, tracker="tensorboard",
    **changes,
):
    """Train tokenizer and model from nothing but a dataset.

    Args:
        dataset: a DatasetDict with ``train`` and ``validation``.
        folder: where the run is kept.
        config: a `TrainingConfig`.
        vocab_size: size of the tokenizer's vocabulary.
        tracker: see `train`.
        changes: fields of `EmoformerConfig` that shall differ from
            ``SCRATCH``.

    Returns:
        The model at its best epoch, its tokenizer, and the history.
    """
    tokenizer = train_tokenizer(
        dataset["train"]["text"], vocab_size=vocab_size
    )
    torch.manual_seed(config.seed)
    model = TransformerForSequenceClassification(EmoformerConfig(
        vocab_size=tokenizer.get_vocab_size(),
        num_labels=dataset["train"].features["label"].num_classes,
        **SCRATCH | changes,
    ))
    history = train(
        model, tokenizer, dataset, config, folder, tracker=tracker
    )
    return model, tokenizer, history


# ---- baseline
def make_baseline(kind, strength=1.0):
    """Make a classifier that has never heard of Transformers.

    The SVM weighs classes by how rare they are, since macro-F1 counts them
    all alike.

    Args:
        kind: ``"majority"`` (always the most frequent class),
            ``"tfidf-words"`` (words and word pairs, linear SVM) or
            ``"tfidf-words-chars"`` (the same with runs of 2 to 5
            characters).
        strength: the SVM's C, above 0: how little it is regularised.

    Returns:
        A scikit-learn pipeline with ``fit(texts, labels)`` and
        ``predict(texts)``.

    Raises:
        ValueError: ``kind`` is none of the three.
    """
    if kind == "majority":
        return make_pipeline(DummyClassifier(strategy="most_frequent"))
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    characters = TfidfVectorizer(
        analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True
    )
    features = {
        "tfidf-words": words,
        "tfidf-words-chars": make_union(words, characters),
    }
    if kind not in features:
        raise ValueError(
            "kind must be majority, tfidf-words or tfidf-words-chars, but it "
            f"is {kind!r}"
        )
    svm = LinearSVC(C=strength, class_weight="balanced")
    return make_pipeline(features[kind], svm)
