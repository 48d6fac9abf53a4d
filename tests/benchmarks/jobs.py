"""Whole jobs, from texts to a trained model or to labels, against the library's way."""

import random
import tempfile
import time
from statistics import median

import torch
import transformers
from transformers import (
    BertForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    pipeline,
)

from emoformer.classifier import EmoformerConfig, TransformerForSequenceClassification
from emoformer.data import load_tweet_eval
from emoformer.tokens import train_tokenizer
from emoformer.training import TrainingConfig, predict, train
from tests.benchmarks.rivals import SIZES, bert_config, copy_to_bert

ROUNDS = 5
transformers.logging.set_verbosity_error()


def our_classifier(tokenizer, num_labels=4):
    """A fresh classifier of the benchmark's size, with dropout as in BERT."""
    torch.manual_seed(0)
    return TransformerForSequenceClassification(EmoformerConfig(
        vocab_size=tokenizer.get_vocab_size(), num_labels=num_labels, max_len=128,
        **SIZES,
    ))


def their_classifier(ours):
    """Hugging Face's classifier with the same body."""
    theirs = BertForSequenceClassification(bert_config(ours.config))
    body = TransformerForSequenceClassification(ours.config)
    body.load_state_dict(ours.state_dict())
    pooler = theirs.bert.pooler
    theirs.bert.pooler = None
    copy_to_bert(body, theirs.bert)
    theirs.bert.pooler = pooler
    return theirs


def their_tokenizer(tokenizer):
    """Our tokenizer in Hugging Face's wrapper: the same ids."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=128, pad_token="[PAD]",
        cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]", mask_token="[MASK]",
        model_input_names=["input_ids", "attention_mask"],
    )


def our_epoch(dataset, tokenizer, precision):
    """Tokenise, train for an epoch, score the validation split, and save."""
    config = TrainingConfig(epochs=1, hide=0.0, bpe_dropout=0.0, precision=precision)
    model = our_classifier(tokenizer, dataset["train"].features["label"].num_classes)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        train(model, tokenizer, dataset, config, folder, tracker=None)
        return time.perf_counter() - start


def their_epoch(dataset, tokenizer, precision):
    """The same by `Trainer` as it is, in batches of 32."""
    classes = dataset["train"].features["label"].num_classes
    model = their_classifier(our_classifier(tokenizer, classes))
    wrapped = their_tokenizer(tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        rows = {
            split: dataset[split].map(
                lambda batch: wrapped(batch["text"], truncation=True), batched=True,
                load_from_cache_file=False,
            )
            for split in ("train", "validation")
        }
        Trainer(
            model,
            TrainingArguments(
                folder, num_train_epochs=1, per_device_train_batch_size=32,
                per_device_eval_batch_size=128, eval_strategy="epoch",
                save_strategy="epoch", bf16=precision == "bf16", use_cpu=True,
                report_to=[], disable_tqdm=True,
            ),
            train_dataset=rows["train"], eval_dataset=rows["validation"],
            data_collator=DataCollatorWithPadding(wrapped),
        ).train()
        return time.perf_counter() - start


def race(ours, theirs, rounds):
    """Time two jobs in turn; say how many times as fast the first is."""
    seconds = {"ours": [], "transformers": []}
    order, chance = [("ours", ours), ("transformers", theirs)], random.Random(0)
    for _ in range(rounds):
        chance.shuffle(order)
        for name, job in order:
            seconds[name].append(job())
    ratios = [t / o for o, t in zip(seconds["ours"], seconds["transformers"], strict=True)]
    return {
        "seconds": {name: median(times) for name, times in seconds.items()},
        "ratio": median(ratios), "lowest": min(ratios), "highest": max(ratios),
        "rounds": rounds,
    }


def train_an_epoch(dataset=None, rounds=ROUNDS):
    """Race through one epoch of the emotion task, in both precisions."""
    dataset = dataset or load_tweet_eval("emotion")
    tokenizer = train_tokenizer(dataset["train"]["text"], vocab_size=4000)
    return [
        {
            "precision": precision, "tweets": len(dataset["train"]),
            **race(
                lambda precision=precision: our_epoch(dataset, tokenizer, precision),
                lambda precision=precision: their_epoch(dataset, tokenizer, precision),
                rounds,
            ),
        }
        for precision in ("no", "bf16")
    ]


def classify(texts=None, rounds=ROUNDS, batch_size=128):
    """Race through the labels of 10,000 tweets."""
    emotion = load_tweet_eval("emotion")
    texts = texts or list(load_tweet_eval("emoji", ["test"])["test"]["text"])[:10_000]
    tokenizer = train_tokenizer(emotion["train"]["text"], vocab_size=4000)
    ours = our_classifier(tokenizer).eval()
    wrapped = their_tokenizer(tokenizer)
    pipe = pipeline(
        "text-classification", model=their_classifier(ours).eval(), tokenizer=wrapped,
        device="cpu",
    )

    def by_us():
        start = time.perf_counter()
        predict(ours, tokenizer, texts, batch_size=batch_size)
        return time.perf_counter() - start

    def by_them():
        start = time.perf_counter()
        pipe(texts, batch_size=batch_size, truncation=True)
        return time.perf_counter() - start

    return {"tweets": len(texts), "batch_size": batch_size, **race(by_us, by_them, rounds)}
