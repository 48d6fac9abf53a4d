"""Mistakes with tokens: normaliser, words, tokenizer, ids, batches, buckets."""

import json
import random
from collections import Counter

import numpy as np
import torch
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from torch.nn.utils.rnn import pad_sequence

from emoformer import tokens as book
from emoformer.tokens import (
    SPECIAL_TOKENS,
    bucket_by_length,
    make_batch,
    make_normalizer,
    make_pre_tokenizer,
    train_tokenizer,
)
from tests.bank import mistake, right

NORMAL, WORDS, TRAIN = "make_normalizer", "make_pre_tokenizer", "train_tokenizer"
ENCODE, BATCH, BUCKET = "encode", "make_batch", "bucket_by_length"
replace = normalizers.Replace


# make_normalizer: the book's fourteen steps, one of them changed or moved


def steps(change=None, order=None):
    """The book's steps with some replaced, in another order."""
    full = list(make_normalizer())
    for i, step in (change or {}).items():
        full[i] = step
    full = [full[i] for i in order or range(len(full))]
    return normalizers.Sequence([step for step in full if step is not None])


@mistake(NORMAL, "NFKC before the quotes", looks="`Sequence([NFKC(), Replace('´', …)])`",
         shows="`don´t` becomes two words, one of them a lone accent",
         find="`don´t`", hint="NFKC comes before the apostrophes")
def normal_early_nfkc():
    return steps(order=[8, *range(8), *range(9, 14)])


@mistake(NORMAL, "&amp; undone first", looks="`&amp;` at the head of the list",
         shows="two layers of entities are peeled off", find="`&amp;lt;`",
         hint="&amp; must be undone last")
def normal_amp_first():
    return steps(order=[0, 5, 1, 2, 3, 4, *range(6, 14)])


@mistake(NORMAL, "no lower case", looks="`Lowercase()` forgotten",
         shows="`Happy`, `HAPPY` and `happy` share nothing", find="`RELAX`",
         hint="capitals are left as they are")
def normal_case():
    return steps({10: None})


@mistake(NORMAL, "accents stripped", looks="`NFKD(), StripAccents()`",
         shows="*naïve* is *naive*, and in other languages words fall together",
         find="`naïve`", hint="accents are stripped")
def normal_accents():
    return steps({8: normalizers.Sequence([
        normalizers.NFKD(), normalizers.StripAccents()])})


@mistake(NORMAL, "an @ inside a word", looks="`Regex(r'@\\w+')`",
         shows="`me@mail.org` holds a mention", find="an e-mail address",
         hint="an @ inside a word is taken for a mention")
def normal_mail():
    return steps({12: replace(Regex(r"@\w+"), "@user")})


@mistake(NORMAL, "links before lower case", looks="`Lowercase()` after the links",
         shows="`HTTPS://…` stays whole: a dozen odd tokens", find="a link in capitals",
         hint="links are found before lower-casing")
def normal_link_order():
    return steps(order=[*range(10), 11, 10, 12, 13])


@mistake(NORMAL, "two kept of a stretched letter", looks="`(?=\\1\\1)`",
         shows="*soo* and *sooooo* are the same", find="`soooo`",
         hint="two are kept")
def normal_two():
    return steps({13: replace(Regex(r"([^\s\d])(?=\1\1)"), "")})


@mistake(NORMAL, "digits cut too", looks="`(\\S)(?=\\1\\1\\1)`",
         shows="100000 becomes 1000", find="`cost 100000`",
         hint="digits are cut too")
def normal_digits():
    return steps({13: replace(Regex(r"(\S)(?=\1\1\1)"), "")})


@mistake(NORMAL, "variation selectors left", looks="`Regex(r'\\p{Cf}')` alone",
         shows="❤ from one phone and ❤ from another are two tokens",
         find="`len('❤\\ufe0f')`", hint="the variation selectors stay")
def normal_selectors():
    return steps({9: replace(Regex(r"\p{Cf}"), "")})


@mistake(NORMAL, "invisible characters become spaces", looks="`Replace(…, ' ')`",
         shows="words are cut where nobody sees why", find="`un\\u200bseen`",
         hint="invisible characters are replaced by spaces")
def normal_spaces():
    return steps({9: replace(Regex(r"[\p{Cf}\ufe0e\ufe0f]"), " ")})


@mistake(NORMAL, "a real newline looked for", looks="`Replace('\\n', ' ')`",
         shows="TweetEval's two signs stay, and their n sticks to the next word",
         find="`'so\\\\nsad'`", hint="the two signs")
def normal_newline():
    return steps({0: replace("\n", " ")})


@right(NORMAL, "fewer patterns, html entities in another order")
def normal_other():
    return normalizers.Sequence([
        replace(Regex("&quot;|[“”]"), '"'), replace(Regex("&#0{0,1}39;|&apos;"), "'"),
        replace("&gt;", ">"), replace("&lt;", "<"), replace("&amp;", "&"),
        replace(Regex(r"\\n"), " "), replace(Regex("[`´’‘]"), "'"),
        normalizers.Lowercase(), normalizers.NFKC(), normalizers.Lowercase(),
        replace(Regex(r"\p{Cf}|\x{FE0E}|\x{FE0F}"), ""),
        replace(Regex(r"(?:https?://|www\.)[^\s]*"), "http"),
        replace(Regex(r"(?<![\p{L}\p{N}_])@[\p{L}\p{N}_]+"), "@user"),
        replace(Regex(r"([^\s\d])(?=\1{3})"), ""),
    ])


# make_pre_tokenizer


def words_by(pattern):
    """Keep what matches a pattern."""
    return pre_tokenizers.Split(Regex(pattern), behavior="removed", invert=True)


@mistake(WORDS, "only white space", looks="`WhitespaceSplit()`",
         shows="*happy*, *happy!* and *happy,* share nothing", find="`wait!!`",
         hint="signs stick to the word")
def words_space():
    return pre_tokenizers.WhitespaceSplit()


@mistake(WORDS, "signs together", looks="`Whitespace()`",
         shows="every `!!!` and `:-)` is a word of its own", find="`wait!!`",
         hint="signs in a row stay together")
def words_whitespace():
    return pre_tokenizers.Whitespace()


@mistake(WORDS, "cut at apostrophes", looks="no `(?:'\\p{L}+)?`",
         shows="*can't* is three words", find="`can't`",
         hint="a word is cut at its apostrophe")
def words_apostrophe():
    return words_by(r"@user|[\p{L}\p{M}]+|\p{N}+|[^\s\p{L}\p{M}\p{N}\p{Cc}]")


@mistake(WORDS, "the hashtag in one piece", looks="`#\\w+` in the pattern",
         shows="`#happy` has a vector of its own with few examples", find="`#happy`",
         hint="the # sticks to its word")
def words_hashtag():
    return words_by(r"@user|#[\p{L}_]+|[\p{L}\p{M}]+(?:'\p{L}+)?|\p{N}+"
                    r"|[^\s\p{L}\p{M}\p{N}\p{Cc}]")


@mistake(WORDS, "\\w for letters", looks="`\\w+`", shows="`42pm` and `small_wins` are words",
         find="`7:42pm`", hint="the underscore is taken for a letter")
def words_w():
    return words_by(r"@user|[\w\p{M}]+(?:'\p{L}+)?|[^\s\w\p{M}\p{Cc}]")


@mistake(WORDS, "@user falls apart", looks="no `@user` in the pattern",
         shows="each mention costs two tokens", find="`@user hi`",
         hint="@user falls apart")
def words_mention():
    return words_by(r"[\p{L}\p{M}]+(?:'\p{L}+)?|\p{N}+|[^\s\p{L}\p{M}\p{N}\p{Cc}]")


@mistake(WORDS, "invert forgotten", looks="`Split(pattern, behavior='removed')`",
         shows="the words are thrown away and the spaces kept", find="print the words",
         hint="invert=True keeps")
def words_invert():
    return pre_tokenizers.Split(Regex(r"@user|[\p{L}\p{M}]+(?:'\p{L}+)?|\p{N}+"
                                      r"|[^\s\p{L}\p{M}\p{N}\p{Cc}]"), behavior="removed")


@mistake(WORDS, "ASCII letters", looks="`[a-z]+`", shows="*naïve* is three words",
         find="`naïve`", hint="letters beyond a to z are taken for signs")
def words_ascii():
    return words_by(r"@user|[a-z]+(?:'[a-z]+)?|[0-9]+|[^\sa-z0-9\p{Cc}]")


@right(WORDS, "a sequence of splits")
def words_sequence():
    return pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"[\s\p{Cc}]+"), behavior="removed"),
        words_by(r"@user|\p{N}+|[\p{L}\p{M}]+(?:'\p{L}+)?|[^\p{L}\p{M}\p{N}]"),
    ])


# train_tokenizer: the book's, in parts that a mistake can replace


def trained(texts, *, vocab_size=4000, min_frequency=2, known=None, forms=True,
            plain=True, specials=SPECIAL_TOKENS, unk="[UNK]", fuse=True,
            template=True, pre=True, normal=True, prefix="##"):
    """Train as the book does, with one thing changed."""
    if isinstance(texts, str):
        raise TypeError("texts must be a list of strings")
    texts = book._as_list(texts)
    if not texts:
        raise ValueError("no texts")
    tokenizer = Tokenizer(models.BPE(
        unk_token=unk, continuing_subword_prefix=prefix, fuse_unk=fuse))
    if normal:
        tokenizer.normalizer = make_normalizer()
    if pre:
        tokenizer.pre_tokenizer = make_pre_tokenizer()
    if template:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    words = [w for text in texts for w, _ in make_pre_tokenizer().pre_tokenize_str(
        make_normalizer().normalize_str(text))]
    counts = Counter("".join(words))
    alphabet = sorted(c for c, n in counts.items() if n >= (known or min_frequency))
    inside = set("".join(word[1:] for word in words))
    marked = [(prefix or "") + c for c in alphabet
              if c in inside or (forms and c.isalnum())]
    if vocab_size < len(specials) + len(alphabet) + len(marked):
        raise ValueError("vocab_size is too small")
    named = marked if plain and prefix else []
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, min_frequency=min_frequency,
        special_tokens=[*specials, *named], initial_alphabet=alphabet,
        limit_alphabet=len(alphabet), continuing_subword_prefix=prefix,
        show_progress=False))
    state = json.loads(tokenizer.to_str())
    if plain:
        state["added_tokens"] = state["added_tokens"][: len(specials)]
    return Tokenizer.from_str(json.dumps(state))


@mistake(TRAIN, "chance decides ties", looks="the trainer as it comes",
         shows="the same texts, another tokenizer: yesterday's model reads nonsense",
         find="train twice and compare `to_str()`", hint="in the order of a hash map")
def train_chance(texts, **options):
    return trained(texts, plain=False, **options)


@mistake(TRAIN, "no pre-tokenizer", looks="`tokenizer.pre_tokenizer` not set",
         shows="pieces such as `of the` across words", find="look for spaces in tokens",
         hint="the tokenizer has no pre_tokenizer")
def train_no_words(texts, **options):
    return trained(texts, pre=False, **options)


@mistake(TRAIN, "no normaliser", looks="`tokenizer.normalizer` not set",
         shows="three vectors for *Happy*, *HAPPY* and *happy*", find="encode `SAD`",
         hint="the tokenizer has no normalizer")
def train_no_normal(texts, **options):
    return trained(texts, normal=False, **options)


@mistake(TRAIN, "special tokens in another order",
         looks="`['[UNK]', '[CLS]', '[SEP]', '[PAD]', '[MASK]']`",
         shows="padding gets the vector of [UNK]: other chapters rely on the numbers",
         find="`token_to_id('[PAD]')`", hint="are in another order")
def train_order(texts, **options):
    return trained(texts, specials=("[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"),
                   **options)


@mistake(TRAIN, "no template", looks="`post_processor` not set",
         shows="no [CLS] to read a text off, and empty rows for empty texts",
         find="print the tokens", hint="set a post_processor")
def train_template(texts, **options):
    return trained(texts, template=False, **options)


@mistake(TRAIN, "unknown characters vanish", looks="`BPE()` without `unk_token`",
         shows="a text in another script is empty", find="encode `日本`",
         hint="unknown characters vanish")
def train_no_unk(texts, **options):
    return trained(texts, unk=None, **options)


@mistake(TRAIN, "a known letter unknown inside", looks="only the ## forms that were seen",
         shows="`jazz` holds [UNK]s, although `zoo` was read", find="encode `jazz`",
         hint="give each known letter its ## form")
def train_forms(texts, **options):
    return trained(texts, forms=False, **options)


@mistake(TRAIN, "[UNK] never trained", looks="no limit on the alphabet",
         shows="the vector of [UNK] is noise on the day it is needed",
         find="count [UNK] in the training rows", hint="a character that occurs once")
def train_everything(texts, **options):
    return trained(texts, known=1, **options)


@mistake(TRAIN, "## characters left special", looks="no repair of `added_tokens`",
         shows="a post with `##s` is cut there", find="`added_tokens` in the file",
         hint="besides the five")
def train_left_special(texts, **options):
    tokenizer = train_tokenizer(texts, **options)
    tokenizer.add_special_tokens(
        [t for t in tokenizer.get_vocab() if t.startswith("##") and len(t) == 3])
    return tokenizer


@mistake(TRAIN, "special tokens come on top", looks="`add_special_tokens` after training",
         shows="five more ids than the embedding has rows", find="`get_vocab_size()`",
         hint="[PAD], [UNK], [CLS], [SEP], [MASK]")
def train_on_top(texts, *, vocab_size=4000, min_frequency=2):
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]", continuing_subword_prefix="##"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = make_normalizer(), make_pre_tokenizer()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, min_frequency=min_frequency, show_progress=False,
        continuing_subword_prefix="##"))
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return tokenizer


@mistake(TRAIN, "WordPiece", looks="`models.WordPiece`, `WordPieceTrainer`",
         shows="other pieces than the chapter's", find="`type(tokenizer.model)`",
         hint="it must be BPE")
def train_wordpiece(texts, *, vocab_size=4000, min_frequency=2):
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = make_normalizer(), make_pre_tokenizer()
    tokenizer.train_from_iterator(book._as_list(texts), trainers.WordPieceTrainer(
        vocab_size=vocab_size, min_frequency=min_frequency, show_progress=False,
        special_tokens=list(SPECIAL_TOKENS)))
    return tokenizer


@right(TRAIN, "merges learned by hand, then handed to BPE")
def train_by_hand(texts, *, vocab_size=4000, min_frequency=2):
    texts = book._as_list(texts)
    assert texts, "no texts"
    counts = Counter(
        word for text in texts for word, _ in make_pre_tokenizer().pre_tokenize_str(
            make_normalizer().normalize_str(text)))
    letters = Counter()
    for word, n in counts.items():
        for c in word:
            letters[c] += n
    known = {c for c, n in letters.items() if n >= min_frequency}
    vocab = [*SPECIAL_TOKENS, *sorted(known), *("##" + c for c in sorted(known))]
    assert len(vocab) <= vocab_size, "vocab_size is too small"
    words = {(w[0], *("##" + c for c in w[1:])): n for w, n in counts.items()
             if set(w) <= known}
    merges = []
    while len(vocab) < vocab_size:
        pairs = Counter()
        for pieces, n in words.items():
            for pair in zip(pieces, pieces[1:], strict=False):
                pairs[pair] += n
        best = min(pairs, key=lambda p: (-pairs[p], p), default=None)
        if best is None or pairs[best] < min_frequency:
            break
        merges.append(best)
        new = best[0] + best[1][2:]
        vocab += [new] if new not in vocab else []
        after = Counter()
        for pieces, n in words.items():
            out = []
            for piece in pieces:
                if out and (out[-1], piece) == best:
                    out[-1] = new
                else:
                    out.append(piece)
            after[tuple(out)] += n
        words = after
    tokenizer = Tokenizer(models.BPE(
        vocab={t: i for i, t in enumerate(vocab)}, merges=merges, unk_token="[UNK]",
        continuing_subword_prefix="##", fuse_unk=True))
    tokenizer.normalizer, tokenizer.pre_tokenizer = make_normalizer(), make_pre_tokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return tokenizer


# encode


def plain_rows(tokenizer, texts, max_len):
    """Rows before cutting, with the checks."""
    texts = book._as_list(texts)
    if max_len < 3:
        raise ValueError("max_len must be at least 3")
    tokenizer.encode_special_tokens = True
    return [encoding.ids for encoding in tokenizer.encode_batch(texts)]


@mistake(ENCODE, "[SEP] cut off", looks="`row[:max_len]`",
         shows="long texts have no end", find="print the last id of a long row",
         hint="loses its [SEP]")
def encode_no_sep(tokenizer, texts, *, max_len=128):
    return [row[:max_len] for row in plain_rows(tokenizer, texts, max_len)]


@mistake(ENCODE, "the name of a token taken for it", looks="no `encode_special_tokens`",
         shows="whoever types [MASK] puts the real token into the model",
         find="encode `my [MASK] slipped`", hint="encode_special_tokens = True")
def encode_hole(tokenizer, texts, *, max_len=128):
    plain_rows(tokenizer, texts, max_len)
    tokenizer.encode_special_tokens = False
    rows = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
    return [r if len(r) <= max_len else [*r[: max_len - 1], r[-1]] for r in rows]


@mistake(ENCODE, "one token too long", looks="`row[:max_len] + row[-1:]`",
         shows="a position beyond the table, once in a thousand posts",
         find="`max(map(len, rows))`", hint="stays one token too long")
def encode_long(tokenizer, texts, *, max_len=128):
    rows = plain_rows(tokenizer, texts, max_len)
    return [r if len(r) <= max_len else r[:max_len] + r[-1:] for r in rows]


@mistake(ENCODE, "one token too short", looks="`row[: max_len - 2] + [SEP_ID]`",
         shows="a token of each long text is lost for nothing",
         find="`max(map(len, rows))`", hint="loses one token too many")
def encode_short(tokenizer, texts, *, max_len=128):
    rows = plain_rows(tokenizer, texts, max_len)
    return [r if len(r) <= max_len else r[: max_len - 2] + r[-1:] for r in rows]


@mistake(ENCODE, "special tokens twice", looks="`[CLS_ID, *row, SEP_ID]`",
         shows="[CLS] [CLS] … [SEP] [SEP]", find="print the tokens",
         hint="are put there twice")
def encode_twice(tokenizer, texts, *, max_len=128):
    rows = [[2, *row, 3] for row in plain_rows(tokenizer, texts, max_len)]
    return [r if len(r) <= max_len else r[: max_len - 1] + r[-1:] for r in rows]


@mistake(ENCODE, "padded here", looks="`tokenizer.enable_padding()`",
         shows="make_batch takes the padding for real tokens",
         find="print the rows of a long and a short text", hint="is make_batch's work")
def encode_padded(tokenizer, texts, *, max_len=128):
    rows = book.encode(tokenizer, texts, max_len=max_len)
    width = max(map(len, rows), default=0)
    return [row + [0] * (width - len(row)) for row in rows]


@mistake(ENCODE, "one string accepted", looks="no check",
         shows="a row for each letter", find="`encode(tokenizer, 'sad')`",
         hint="one string must be refused")
def encode_string(tokenizer, texts, *, max_len=128):
    return book.encode(tokenizer, list(texts), max_len=max_len)


@mistake(ENCODE, "sorted on the way", looks="`sorted(rows, key=len)`",
         shows="labels belong to other texts: the model learns nothing",
         find="encode one text alone and in a list", hint="the rows are sorted by length")
def encode_sorted(tokenizer, texts, *, max_len=128):
    return sorted(book.encode(tokenizer, texts, max_len=max_len), key=len)


@mistake(ENCODE, "tokens, not ids", looks="`encoding.tokens`",
         shows="an error in the embedding", find="print a row", hint="take .ids")
def encode_tokens(tokenizer, texts, *, max_len=128):
    book.encode(tokenizer, texts, max_len=max_len)
    return [encoding.tokens[:max_len] for encoding in tokenizer.encode_batch(texts)]


@right(ENCODE, "the library's truncation, switched off after")
def encode_truncated(tokenizer, texts, *, max_len=128):
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise TypeError("texts must be strings")
    assert max_len >= 3, "max_len must be at least 3"
    tokenizer.encode_special_tokens = True
    tokenizer.enable_truncation(max_len)
    try:
        return [tokenizer.encode(text.encode().decode()).ids for text in texts]
    finally:
        tokenizer.no_truncation()


@right(ENCODE, "special tokens put there by hand")
def encode_by_hand(tokenizer, texts, max_len=128):
    book._as_list(texts)
    if max_len < 3:
        raise ValueError(max_len)
    tokenizer.encode_special_tokens = True
    found = tokenizer.encode_batch(texts, add_special_tokens=False)
    return [[2, *e.ids[: max_len - 2], 3] for e in found]


# make_batch


def changed(name, change):
    """The book's make_batch, with one tensor changed."""
    def batch(rows, *, vocab_size, labels=None, num_labels=None):
        made = make_batch(rows, vocab_size=vocab_size, labels=labels,
                          num_labels=num_labels)
        if name in made:
            made[name] = change(made[name], rows)
        return made
    return batch


@mistake(BATCH, "padding on the left", looks="`[*pads, *row]`",
         shows="[CLS] stands anywhere, and positions mean nothing",
         find="print the first column", hint="the padding stands on the left")
def batch_left(rows, *, vocab_size, labels=None, num_labels=None):
    made = make_batch(rows, vocab_size=vocab_size, labels=labels, num_labels=num_labels)
    for i, row in enumerate(rows):
        shift = made["input_ids"].shape[1] - len(row)
        made["input_ids"][i] = made["input_ids"][i].roll(shift)
        made["attention_mask"][i] = made["attention_mask"][i].roll(shift)
    return made


@mistake(BATCH, "padded with -100", looks="`pad_sequence(…, padding_value=-100)`",
         shows="index out of range in the embedding", find="`input_ids.min()`",
         hint="padded with -100")
def batch_minus(rows, *, vocab_size, labels=None, num_labels=None):
    made = make_batch(rows, vocab_size=vocab_size, labels=labels, num_labels=num_labels)
    made["input_ids"] = made["input_ids"].masked_fill(~made["attention_mask"], -100)
    return made


@mistake(BATCH, "padded with [UNK]", looks="`fill = 1`",
         shows="padding and unknown words share a vector", find="print a short row",
         hint="padded with 1")
def batch_unk(rows, *, vocab_size, labels=None, num_labels=None):
    made = make_batch(rows, vocab_size=vocab_size, labels=labels, num_labels=num_labels)
    made["input_ids"] = made["input_ids"].masked_fill(~made["attention_mask"], 1)
    return made


@mistake(BATCH, "mask inverted", looks="`positions >= lengths`",
         shows="the model reads padding only, and learns nothing",
         find="`mask.sum(1)` must give the lengths", hint="the mask is inverted")
def batch_inverted(rows, **options):
    return changed("attention_mask", lambda m, _: ~m)(rows, **options)


@mistake(BATCH, "mask of 0 and 1", looks="`.long()`",
         shows="`~mask` is -1 and -2: both count as true", find="`mask.dtype`",
         hint="the mask must be bool")
def batch_numbers(rows, **options):
    return changed("attention_mask", lambda m, _: m.long())(rows, **options)


@mistake(BATCH, "mask from the ids", looks="`input_ids != 0`",
         shows="right as long as no row holds the id 0 itself",
         find="a row with a 0 inside", hint="the mask is made from the ids")
def batch_nonzero(rows, **options):
    made = make_batch(rows, **options)
    made["attention_mask"] = made["input_ids"] != 0
    return made


@mistake(BATCH, "mask one too long", looks="`positions <= lengths`",
         shows="one padding in each row is read", find="`mask.sum(1)`",
         hint="the mask is one too long")
def batch_off(rows, **options):
    return changed("attention_mask", lambda m, rows: torch.arange(
        m.shape[1]) <= torch.tensor([len(r) for r in rows])[:, None])(rows, **options)


@mistake(BATCH, "padded to a fixed length", looks="`max_len` instead of the longest row",
         shows="a short batch costs as much as the longest text there is",
         find="`input_ids.shape`", hint="padded to a fixed length")
def batch_fixed(rows, **options):
    made = make_batch([*rows, [0] * 128], **{**options, "labels": None})
    made = {name: value[:-1] for name, value in made.items()}
    checked = make_batch(rows, **options)
    made["attention_mask"] = torch.nn.functional.pad(
        checked["attention_mask"], (0, 128 - checked["attention_mask"].shape[1]))
    return {**checked, **made}


@mistake(BATCH, "rows overwritten", looks="`row += [PAD_ID] * missing`",
         shows="padding is real in the next epoch, and grows",
         find="print the rows after the call", hint="it changes its input")
def batch_in_place(rows, *, vocab_size, labels=None, num_labels=None):
    made = make_batch(rows, vocab_size=vocab_size, labels=labels, num_labels=num_labels)
    for row in rows:
        row += [0] * (made["input_ids"].shape[1] - len(row))
    return made


@mistake(BATCH, "ids up to vocab_size accepted", looks="`if max(ids) > vocab_size`",
         shows="index out of range, far from its cause", find="an id of vocab_size",
         hint="compare with >=, not >")
def batch_vocab(rows, *, vocab_size, labels=None, num_labels=None):
    return make_batch(rows, vocab_size=vocab_size + 1, labels=labels,
                      num_labels=num_labels)


@mistake(BATCH, "labels unchecked", looks="`torch.tensor(labels)`",
         shows="-100 is PyTorch's *ignore*: a spoiled file trains on less and less",
         find="a label of -100", hint="the label 4 must be refused")
def batch_labels(rows, *, vocab_size, labels=None, num_labels=None):
    made = make_batch(rows, vocab_size=vocab_size)
    if labels is not None:
        made["labels"] = torch.tensor(labels)
    return made


@mistake(BATCH, "floats made ints", looks="`torch.tensor(rows).long()`",
         shows="3.5 is token 3, and nobody hears of it", find="a row of floats",
         hint="ids that are no ints")
def batch_floats(rows, **options):
    return make_batch([[int(i) for i in row] for row in rows], **options)


@right(BATCH, "pad_sequence")
def batch_padded(rows, vocab_size, labels=None, num_labels=None):
    assert rows and all(rows), "no tokens"
    if not all(isinstance(i, int) for row in rows for i in row):
        raise TypeError("ids must be ints")
    assert all(0 <= i < vocab_size for row in rows for i in row), "ids out of range"
    ids = pad_sequence([torch.tensor(r) for r in rows], batch_first=True)
    mask = pad_sequence([torch.ones(len(r), dtype=torch.bool) for r in rows], True)
    batch = dict(input_ids=ids, attention_mask=mask)
    if labels is not None:
        if num_labels is None or len(labels) != len(rows):
            raise ValueError("labels")
        for label in labels:
            if not isinstance(label, int):
                raise TypeError("labels must be ints")
            if not 0 <= label < num_labels:
                raise ValueError("labels out of range")
        batch["labels"] = torch.as_tensor(labels)
    return batch


@right(BATCH, "a tensor of zeros, filled row by row")
def batch_filled(rows, *, vocab_size, labels=None, num_labels=None):
    made = make_batch(rows, vocab_size=vocab_size, labels=labels, num_labels=num_labels)
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    mask = ids.bool()
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = True
    return {**made, "input_ids": ids, "attention_mask": mask}


# bucket_by_length


def bucketed(lengths, batch_size, seed, *, pool=16, shuffle=True, texts=True,
             drop=False, dice=None):
    """The book's way, with one thing changed."""
    if batch_size < 1:
        raise ValueError("batch_size must be at least 1")
    order, dice = list(range(len(lengths))), dice or random.Random(seed)
    width = len(order) or 1
    if seed is not None:
        if texts:
            dice.shuffle(order)
        width = pool * batch_size if pool else width
    batches = []
    for start in range(0, len(order), width):
        part = sorted(order[start : start + width], key=lengths.__getitem__)
        batches += [part[i : i + batch_size] for i in range(0, len(part), batch_size)]
    if drop:
        batches = [b for b in batches if len(b) == batch_size]
    if seed is not None and shuffle:
        dice.shuffle(batches)
    return batches


@mistake(BUCKET, "the global dice seeded", looks="`random.seed(seed)`",
         shows="dropout and all that is random repeats in each epoch",
         find="`random.random()` after two calls", hint="it rolls or seeds the global dice")
def bucket_global(lengths, *, batch_size, seed=None):
    if seed is None:
        return bucket_by_length(lengths, batch_size=batch_size)
    random.seed(seed)
    return bucketed(lengths, batch_size, seed, dice=random)


@mistake(BUCKET, "seed 0 taken for none", looks="`if seed:`",
         shows="with seed 0, everybody's favourite, nothing is mixed",
         find="compare seed 0 with none", hint="0 counts as False")
def bucket_zero(lengths, *, batch_size, seed=None):
    return bucket_by_length(lengths, batch_size=batch_size, seed=seed or None)


@mistake(BUCKET, "the last batch lost", looks="`range(0, n - batch_size + 1, batch_size)`",
         shows="some texts get no prediction, and scores are of fewer",
         find="count the indices", hint="smaller batch is lost")
def bucket_lost(lengths, *, batch_size, seed=None):
    return bucketed(lengths, batch_size, seed, drop=True)


@mistake(BUCKET, "equal lengths mixed up", looks="`lengths.index(length)`",
         shows="of equally long texts one is seen often and the others never",
         find="count how often each index occurs", hint="texts of equal length are mixed up")
def bucket_index(lengths, *, batch_size, seed=None):
    batches = bucket_by_length(lengths, batch_size=batch_size, seed=seed)
    return [[lengths.index(lengths[i]) for i in batch] for batch in batches]


@mistake(BUCKET, "lengths, not places", looks="`sorted(lengths)`",
         shows="texts 0 … 60 are seen again and again", find="`max` of all indices",
         hint="the batches hold lengths")
def bucket_lengths(lengths, *, batch_size, seed=None):
    batches = bucket_by_length(lengths, batch_size=batch_size, seed=seed)
    return [[lengths[i] for i in batch] for batch in batches]


@mistake(BUCKET, "all sorted at once", looks="no pools",
         shows="the same texts meet in each epoch; batches are all short or all long",
         find="compare two seeds", hint="all texts are sorted at once")
def bucket_no_pools(lengths, *, batch_size, seed=None):
    return bucketed(lengths, batch_size, seed, pool=None)


@mistake(BUCKET, "pools of 16 texts", looks="`pool = 16`",
         shows="much of the padding stays", find="share of padding",
         hint="the pools are too small")
def bucket_small_pools(lengths, *, batch_size, seed=None):
    if seed is None or batch_size > 16:
        return bucket_by_length(lengths, batch_size=batch_size)
    return bucketed(lengths, batch_size, seed, pool=max(16 // batch_size, 1))


@mistake(BUCKET, "batches not shuffled", looks="no second `shuffle`",
         shows="each pool goes from short to long: the loss has a saw's teeth",
         find="print the widths of the batches", hint="the batches are not shuffled")
def bucket_ramp(lengths, *, batch_size, seed=None):
    return bucketed(lengths, batch_size, seed, shuffle=False)


@mistake(BUCKET, "texts not shuffled", looks="only the batches are shuffled",
         shows="the same texts meet in each epoch", find="compare two seeds",
         hint="shuffle the texts before they are sorted")
def bucket_same(lengths, *, batch_size, seed=None):
    return bucketed(lengths, batch_size, seed, texts=False)


@mistake(BUCKET, "shuffled without a seed", looks="`random.Random(None).shuffle(order)`",
         shows="evaluation differs from run to run", find="call it twice",
         hint="without a seed it gives other batches each time")
def bucket_unseeded(lengths, *, batch_size, seed=None):
    seed = random.SystemRandom().randrange(10**6) if seed is None else seed
    return bucketed(lengths, batch_size, seed)


@mistake(BUCKET, "nothing sorted", looks="`DataLoader(shuffle=True)`'s batches",
         shows="a third and more of all positions is padding", find="share of padding",
         hint="nothing is sorted")
def bucket_random(lengths, *, batch_size, seed=None):
    if seed is None:
        return bucket_by_length(lengths, batch_size=batch_size)
    return bucketed([0] * len(lengths), batch_size, seed)


@right(BUCKET, "numpy, the longest first")
def bucket_numpy(lengths, *, batch_size, seed=None):
    assert batch_size >= 1, "batch_size must be at least 1"
    lengths = np.asarray(lengths, dtype=int)
    if seed is None:
        order = np.argsort(-lengths, kind="stable").tolist()
        return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    dice = np.random.default_rng(seed)
    order, batches = dice.permutation(len(lengths)), []
    for start in range(0, len(order), 16 * batch_size):
        pool = order[start : start + 16 * batch_size]
        pool = pool[np.argsort(lengths[pool])].tolist()
        batches += [pool[i : i + batch_size] for i in range(0, len(pool), batch_size)]
    return [batches[i] for i in dice.permutation(len(batches))]


@right(BUCKET, "torch's generator")
def bucket_torch(lengths, batch_size, seed=None):
    if batch_size < 1:
        raise ValueError(batch_size)
    if seed is None:
        return bucketed(lengths, batch_size, None)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(lengths), generator=generator).tolist()
    size = 16 * batch_size
    key = {i: (k // size, lengths[i]) for k, i in enumerate(order)}
    order.sort(key=key.get)
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator)]


# Exercises


@mistake("make_hump_normalizer", "after lower-casing", looks="`Sequence([normal, humps])`",
         shows="no capital is left to be found", find="`#SmallWins`",
         hint="lower-casing comes first")
def humps_late():
    return normalizers.Sequence([
        make_normalizer(), replace(Regex(r"(?<=\p{Ll})(?=\p{Lu})"), " ")])


@right("make_hump_normalizer", "with all steps in one list")
def humps_flat():
    return normalizers.Sequence([
        replace(Regex(r"(?<=\p{Ll})(?=\p{Lu})"), " "), *make_normalizer()])


def by_bytes(texts, vocab_size, alphabet, normal=True):
    tokenizer = Tokenizer(models.BPE())
    if normal:
        tokenizer.normalizer = make_normalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, min_frequency=2, show_progress=False,
        initial_alphabet=alphabet))
    return tokenizer


@mistake("train_byte_tokenizer", "only the bytes that were seen",
         looks="no `initial_alphabet`", shows="new emoji vanish without a trace",
         find="encode an emoji of another script", hint="must hold all 256 bytes")
def bytes_seen(texts, *, vocab_size):
    return by_bytes(texts, vocab_size, [])


@mistake("train_byte_tokenizer", "no normaliser", looks="`normalizer` not set",
         shows="three tokens for Happy, HAPPY and happy", find="encode `SO sad`",
         hint="must give the same ids")
def bytes_normal(texts, *, vocab_size):
    return by_bytes(texts, vocab_size, pre_tokenizers.ByteLevel.alphabet(), False)


@right("train_byte_tokenizer", "with the alphabet sorted")
def bytes_right(texts, *, vocab_size):
    return by_bytes(texts, vocab_size, sorted(pre_tokenizers.ByteLevel.alphabet()))


@mistake("bucket_in_pools", "pools counted in texts", looks="`range(0, n, pool)`",
         shows="much more padding than expected", find="a pool of all batches",
         hint="pool counts batches")
def pools_texts(lengths, batch_size, pool, seed=0):
    order, batches = list(range(len(lengths))), []
    random.Random(seed).shuffle(order)
    pool = -(-pool // batch_size) * batch_size
    for start in range(0, len(order), pool):
        part = sorted(order[start : start + pool], key=lengths.__getitem__)
        batches += [part[i : i + batch_size] for i in range(0, len(part), batch_size)]
    return batches


@right("bucket_in_pools", "by a key")
def pools_key(lengths, batch_size, pool, seed=0):
    order = list(range(len(lengths)))
    random.Random(seed).shuffle(order)
    place = {i: k // (pool * batch_size) for k, i in enumerate(order)}
    order.sort(key=lambda i: (place[i], lengths[i]))
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


@mistake("cut_greedily", "the shortest piece first", looks="`for end in range(start + 1, …)`",
         shows="every word falls into letters", find="`happy`",
         hint="try the longest first")
def greedy_short(word, vocab):
    pieces, start = [], 0
    while start < len(word):
        for end in range(start + 1, len(word) + 1):
            piece = ("##" if start else "") + word[start:end]
            if piece in vocab:
                pieces.append(piece)
                start = end
                break
        else:
            return ["[UNK]"]
    return pieces


@mistake("cut_greedily", "only the rest unknown", looks="`pieces.append('[UNK]')`",
         shows="pieces of a word that BERT would not read", find="`unhappyq`",
         hint="with WordPiece the whole word")
def greedy_rest(word, vocab):
    for end in range(len(word), 0, -1):
        whole = greedy_right(word[:end], vocab)
        if whole != ["[UNK]"]:
            return whole + ["[UNK]"] * (end < len(word))
    return ["[UNK]"]


@right("cut_greedily", "by recursion")
def greedy_right(word, vocab, mark=""):
    for end in range(len(word), 0, -1):
        if mark + word[:end] in vocab:
            rest = greedy_right(word[end:], vocab, "##") if word[end:] else []
            return rest if rest == ["[UNK]"] else [mark + word[:end], *rest]
    return ["[UNK]"]


def slow(counts, num_merges, tie=lambda pair, number: tuple(map(number.get, pair))):
    words = {(w[0], *("##" + c for c in w[1:])): n for w, n in counts.items()}
    alphabet = {p for pieces in words for p in pieces}
    ordered = sorted(alphabet, key=lambda p: (not p.startswith("##"), p))
    number, merges = {p: i for i, p in enumerate(ordered)}, []
    for _ in range(num_merges):
        pairs = Counter()
        for pieces, n in words.items():
            for pair in zip(pieces, pieces[1:], strict=False):
                pairs[pair] += n
        if not pairs:
            break
        best = min(pairs, key=lambda p: (-pairs[p], tie(p, number)))
        merges.append(best)
        number.setdefault(best[0] + best[1][2:], len(number))
        after = Counter()
        for pieces, n in words.items():
            after[glued(pieces, best)] += n
        words = after
    return merges


def glued(pieces, pair):
    out = []
    for piece in pieces:
        if out and (out[-1], piece) == pair:
            out[-1] += piece[2:]
        else:
            out.append(piece)
    return tuple(out)


@mistake("learn_merges_fast", "still counting all", looks="`count_pairs(words)` in the loop",
         shows="hours for a real corpus", find="time 250 merges",
         hint="touch only those words")
def fast_slow(counts, num_merges):
    return slow(counts, num_merges)


@mistake("learn_merges_fast", "ties by alphabet", looks="`min(pairs, key=lambda p: (-n[p], p))`",
         shows="another tokenizer than the loop's", find="the eighth merge of the diary",
         hint="a tie goes by alphabet")
def fast_alphabet(counts, num_merges):
    return slow(counts, num_merges, lambda pair, number: pair)


@right("learn_merges_fast", "counts kept, words noted")
def fast_right(counts, num_merges):
    words = [(w[0], *("##" + c for c in w[1:])) for w in counts]
    times = list(counts.values())
    alphabet = {p for pieces in words for p in pieces}
    ordered = sorted(alphabet, key=lambda p: (not p.startswith("##"), p))
    number, merges = {p: i for i, p in enumerate(ordered)}, []
    pairs, where = Counter(), {}

    def add(i, sign):
        for pair in zip(words[i], words[i][1:], strict=False):
            pairs[pair] += sign * times[i]
            where.setdefault(pair, set()).add(i)

    for i in range(len(words)):
        add(i, 1)
    for _ in range(num_merges):
        best = min(pairs, default=None,
                   key=lambda p: (-pairs[p], number[p[0]], number[p[1]]))
        if best is None or pairs[best] < 1:
            break
        merges.append(best)
        number.setdefault(best[0] + best[1][2:], len(number))
        for i in list(where[best]):
            add(i, -1)
            words[i] = glued(words[i], best)
            add(i, 1)
        for pair in [pair for pair, n in pairs.items() if n < 1]:
            del pairs[pair]
    return merges
