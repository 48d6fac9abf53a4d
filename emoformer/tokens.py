"""From text to padded batches of token ids."""
# ---- imports
import random

import torch
from tokenizers import Regex, Tokenizer, decoders, models
from tokenizers import normalizers, pre_tokenizers, processors, trainers

# ---- special
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
PAD_ID, UNK_ID, CLS_ID, SEP_ID, MASK_ID = range(5)


# ---- normalizer
def make_normalizer():
    """Make the normaliser of this book's tokenizer.

    It undoes HTML entities, turns URLs into ``http`` and mentions into
    ``@user`` (as TweetEval does), joins the parts of composed emoji, and
    lower-cases.

    Returns:
        A ``tokenizers`` normaliser.
    """
    replace = normalizers.Replace
    return normalizers.Sequence([
        replace("\\n", " "),  # TweetEval writes a line break as \ and n
        replace("&amp;", "&"), replace("&lt;", "<"), replace("&gt;", ">"),
        replace("&quot;", '"'), replace("&#39;", "'"),
        normalizers.NFKC(),
        replace(Regex(r"https?://\S*|www\.\S+"), "http"),
        replace(Regex(r"@\w+"), "@user"),
        replace(Regex("[‘’]"), "'"),
        replace(Regex("[\u200d\ufe0f]"), ""),  # emoji joiner and selector
        normalizers.Lowercase(),
    ])


# ---- train
def train_tokenizer(texts, *, vocab_size=4000, min_frequency=2):
    """Learn a byte-pair encoding from texts.

    Words, numbers, mentions and single symbols are cut apart first; merges
    never cross them. A piece that continues a word starts with ``##``.

    Args:
        texts: an iterable of strings, the training split's.
        vocab_size: the largest number of tokens, special ones included.
        min_frequency: how often a pair must occur to be merged.

    Returns:
        A ``tokenizers.Tokenizer`` that puts [CLS] before and [SEP] after
        each text. Characters never seen in ``texts`` become [UNK].

    Raises:
        TypeError: ``texts`` is one string.
        ValueError: ``vocab_size`` leaves no room beside the special tokens.

    Source: Sennrich, Haddow and Birch (2016).
    """
    if isinstance(texts, str):
        raise TypeError("texts must be an iterable of strings, not one string")
    if vocab_size <= len(SPECIAL_TOKENS):
        raise ValueError(
            f"vocab_size must be above {len(SPECIAL_TOKENS)}, the number of "
            f"special tokens, but it is {vocab_size}"
        )
    tokenizer = Tokenizer(models.BPE(
        unk_token="[UNK]", continuing_subword_prefix="##", fuse_unk=True
    ))
    tokenizer.normalizer = make_normalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(
        Regex(r"@user|[\p{L}\p{M}]+(?:'\p{L}+)?|\p{N}+|[^\s\p{L}\p{M}\p{N}]"),
        behavior="removed", invert=True,  # keep the matches, drop the rest
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", CLS_ID), ("[SEP]", SEP_ID)],
    )
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, min_frequency=min_frequency,
        special_tokens=list(SPECIAL_TOKENS),
        continuing_subword_prefix="##", show_progress=False,
    ))
    return tokenizer


# ---- encode
def encode(tokenizer, texts, *, max_len=128):
    """Turn texts into lists of token ids, none longer than ``max_len``.

    A text that is too long loses its end, not its [SEP]. An empty text
    becomes [CLS] [SEP].

    Args:
        tokenizer: a ``tokenizers.Tokenizer``.
        texts: a list of strings.
        max_len: the most tokens a text may keep, at least 3.

    Returns:
        A list of lists of ints, in the order of ``texts``.

    Raises:
        TypeError: ``texts`` is one string, or holds something else.
        ValueError: ``max_len`` is below 3.
    """
    if isinstance(texts, str) or any(not isinstance(t, str) for t in texts):
        raise TypeError(
            "texts must be a list of strings, but it is "
            + (repr(texts) if isinstance(texts, str) else
               f"a list that holds {[t for t in texts if not isinstance(t, str)][0]!r}")
        )
    if max_len < 3:
        raise ValueError(
            f"max_len must be at least 3, room for [CLS], a token and [SEP], "
            f"but it is {max_len}"
        )
    rows = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
    return [
        row if len(row) <= max_len else row[: max_len - 1] + row[-1:]
        for row in rows
    ]


# ---- batch
def make_batch(rows, *, vocab_size, labels=None, num_labels=None):
    """Pad lists of token ids to the longest and mark what is real.

    Ids and labels are checked here, once, on plain numbers: a layer that
    looked at the values inside a tensor would stall a GPU.

    Args:
        rows: a non-empty list of non-empty lists of ints in
            0 … ``vocab_size`` - 1.
        vocab_size: the number of tokens the model knows.
        labels: optional, a list of ints in 0 … ``num_labels`` - 1.
        num_labels: the number of classes; needed with ``labels``.

    Returns:
        A dict with ``input_ids`` (batch, seq_len) int64, padded with
        `PAD_ID`; ``attention_mask`` (batch, seq_len) bool, True = a real
        token; and, where given, ``labels`` (batch,) int64.

    Raises:
        ValueError: a row is empty, or an id or a label is out of range, or
            there are more or fewer labels than rows.
    """
    if not rows or not all(rows):
        raise ValueError(
            "a batch must hold at least one row, and every row at least one "
            f"token, but the row lengths are {[len(row) for row in rows]}"
        )
    low, high = min(map(min, rows)), max(map(max, rows))
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"token ids must lie in 0 … {vocab_size - 1}, but these lie in "
            f"{low} … {high}"
        )
    seq_len = max(map(len, rows))
    batch = {
        "input_ids": torch.tensor(
            [row + [PAD_ID] * (seq_len - len(row)) for row in rows]
        ),
        "attention_mask": torch.tensor(
            [[True] * len(row) + [False] * (seq_len - len(row)) for row in rows]
        ),
    }
    if labels is not None:
        if len(labels) != len(rows) or num_labels is None:
            raise ValueError(
                "labels need num_labels and one label a row, but there are "
                f"{len(labels)} labels, {len(rows)} rows and "
                f"num_labels={num_labels}"
            )
        if min(labels) < 0 or max(labels) >= num_labels:
            raise ValueError(
                f"labels must lie in 0 … {num_labels - 1}, but these lie in "
                f"{min(labels)} … {max(labels)}"
            )
        batch["labels"] = torch.tensor(labels)
    return batch


# ---- bucket
def bucket_by_length(lengths, *, batch_size, seed=None):
    """Group texts of similar length into batches, so that little is padded.

    With a seed the texts are shuffled, cut into pools of 16 batches, sorted
    by length inside each pool, and the batches shuffled again: mixed enough
    to learn from, sorted enough to waste little. Without a seed all texts
    are sorted, for evaluation.

    Args:
        lengths: a list of ints, the number of tokens of each text.
        batch_size: texts per batch, at least 1; the last may be smaller.
        seed: an int, or None for no shuffling.

    Returns:
        A list of lists of indices into ``lengths``; each index stands in
        exactly one of them.

    Raises:
        ValueError: ``batch_size`` is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, but it is {batch_size}")
    order = list(range(len(lengths)))
    pool = len(order) or 1
    if seed is not None:
        random.Random(seed).shuffle(order)
        pool = 16 * batch_size
    batches = []
    for start in range(0, len(order), pool):
        part = sorted(order[start : start + pool], key=lengths.__getitem__)
        batches += [
            part[i : i + batch_size] for i in range(0, len(part), batch_size)
        ]
    if seed is not None:
        random.Random(seed).shuffle(batches)
    return batches
