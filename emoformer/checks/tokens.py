"""Checks for chapter 02: normaliser, words, tokenizer, ids, batches, buckets."""

import copy
import json
import os
import random
import time
from collections import Counter
from collections.abc import Mapping
from functools import partial
from unittest.mock import patch

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors

from .bench import Battery, Broke, TimeUp, Wrong, expect, expect_tensor, explain
from .data import refuses, short, tell

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
PAD, UNK, CLS, SEP, MASK = range(5)

# make_normalizer

normalizer_battery = Battery(
    "make_normalizer", "make_normalizer() -> a tokenizers normalizer", chapter=2
)
LITERAL = "(A pattern needs Regex(…) round it: a string is taken letter by letter)"
# property -> (before, after, [(hint, what that mistake gives)], otherwise)
NORMAL = {
    "undoes the HTML entities": [
        ("&lt;3 a &gt; b", "<3 a > b", [
            ("the entities &lt; and &gt; are left as they are", "&lt;3 a &gt; b"),
        ], "&lt; and &gt; must become < and >"),
        ("&quot;so&quot;", '"so"', [], "&quot; must become a quotation mark"),
        ("it&#39;s it&#039;s it&apos;s", "it's it's it's", [
            ("of three ways to write an apostrophe only one is known: &#39;, &#039; "
             "and &apos;", "it's it&#039;s it&apos;s"),
            ("&apos; is not known", "it's it's it&apos;s"),
            ("&#039; is not known: the zero may stand there or not",
             "it's it&#039;s it's"),
        ], "&#39;, &#039; and &apos; must all become an apostrophe"),
        ("fish &amp; chips", "fish & chips", [
            ("&amp; is left as it is", "fish &amp; chips"),
        ], "&amp; must become &"),
        ("&amp;lt;", "&lt;", [
            ("two layers are peeled off: whoever writes about &lt; types &amp;lt;, so "
             "&amp; must be undone last", "<"),
        ], "&amp; must be undone last, after the other entities"),
    ],
    "straightens quotes before NFKC": [
        ("don´t don’t don‘t don`t", "don't don't don't don't", [
            ("NFKC comes before the apostrophes: it takes the lone accent ´ for a "
             "space with an accent on it. Straighten quotes first",
             "don \u0301t don't don't don't"),
            ("only ’ is made an apostrophe: ‘, ´ and ` are meant too",
             "don \u0301t don't don‘t don`t"),
            ("the backtick is not made an apostrophe", "don't don't don't don`t"),
            ("the accent ´ is not made an apostrophe, and NFKC splits it",
             "don \u0301t don't don't don`t"),
            ("the quotes are left as they are", "don \u0301t don’t don‘t don`t"),
        ], "the four kinds of apostrophe must become one, and before NFKC, which "
           "splits ´ in two"),
        ("“so”", '"so"', [
            ("curly quotation marks become apostrophes", "'so'"),
        ], "curly quotation marks must become straight ones"),
    ],
    "maps fancy letters by NFKC": [
        ("ｓａｄ 𝓱𝓪𝓹𝓹𝔂", "sad happy", [
            ("letters in fancy dress are left as they are: NFC or NFD does not map "
             "them, NFKC does", "ｓａｄ 𝓱𝓪𝓹𝓹𝔂"),
        ], "NFKC maps letters in fancy dress to plain ones"),
        ("wait…", "wait...", [], "NFKC makes three dots of …"),
        ("cafe\u0301", "café", [
            ("the letters are left apart from their accents: that is NFKD or NFD, and "
             "NFKC puts them together", "cafe\u0301"),
            ("accents are stripped: we keep them (BERT's lower-case model does not)",
             "cafe"),
            ("what is not ASCII is thrown away, emoji and other scripts too", "caf"),
        ], "NFKC puts a letter and its accent together"),
        ("naïve", "naïve", [
            ("accents are stripped: we keep them", "naive"),
            ("the letters are taken apart from their accents: that is NFKD, not NFKC",
             "nai\u0308ve"),
        ], "accents must stay"),
    ],
    "removes what nobody can see": [
        ("❤\ufe0f ❤\ufe0e", "❤ ❤", [
            ("the variation selectors stay (U+FE0E, U+FE0F): they are no format "
             "characters, so \\p{Cf} does not find them. " + LITERAL,
             "❤\ufe0f ❤\ufe0e"),
            ("only one of two variation selectors is removed", "❤ ❤\ufe0e"),
            ("invisible characters are replaced by spaces: remove them, or a word is "
             "cut in two", "❤  ❤ "),
        ], "the variation selectors U+FE0E and U+FE0F must go"),
        ("👩🏽\u200d🚒", "👩🏽🚒", [
            ("the zero width joiner stays, so each composed emoji is rare",
             "👩🏽\u200d🚒"),
            ("the skin tone is removed: it is a sign of its own and stays", "👩🚒"),
            ("emoji are removed", ""),
        ], "the zero width joiner must go, the skin tone must stay"),
        ("un\u200bse\u00aden\ufeff", "unseen", [
            ("invisible characters are replaced by spaces: remove them, or a word is "
             "cut in two", "un se en "),
            ("only some of the format characters are removed: the class is \\p{Cf}",
             "unse\u00aden\ufeff"),
            ("only some of the format characters are removed: the class is \\p{Cf}",
             "unse\u00aden"),
        ], "all format characters (\\p{Cf}) must go, without a space in their place"),
        ("\U0001f3f4\U000e0067\U000e007f", "\U0001f3f4", [],
         "the tags inside some flags are format characters too (\\p{Cf}) and must go"),
    ],
    "lower-cases": [
        ("RELAX, Relax", "relax, relax", [
            ("capitals are left as they are", "RELAX, Relax"),
        ], "all letters must be small"),
        ("ÄRGER ЖУК", "ärger жук", [
            ("only A to Z are made small: use Lowercase, which knows all letters",
             "Ärger ЖУК"),
            ("only A to Z are made small", "ÄrGER ЖУК"),
        ], "letters beyond A to Z must be small too"),
    ],
    "turns links into http": [
        ("see https://x.org/A?b=c now", "see http now", [
            ("links are left as they are. " + LITERAL, "see https://x.org/a?b=c now"),
            ("only the beginning of a link is replaced: it ends at the next space",
             "see httpx.org/a?b=c now"),
            ("https is not known as the start of a link", "see https://x.org/a?b=c now"),
            ("links are removed: TweetEval writes http in their place", "see  now"),
            ("links become something else than http", "see [url] now"),
            ("links become something else than http", "see <url> now"),
            ("links become https: TweetEval writes http", "see https now"),
            ("everything from the link to the end is gone: \\S* ends at a space, .* "
             "does not", "see http"),
        ], "https://… must become http, up to the next space"),
        ("HTTP://X.org! www.x.org", "http http", [
            ("links are found before lower-casing, so HTTP:// is none: lower-case "
             "first", "http://x.org! http"),
            ("www. is not known as the start of a link", "http www.x.org"),
            ("links are left as they are", "http://x.org! www.x.org"),
        ], "HTTP:// and www. begin links too"),
        ("httpx http www", "httpx http www", [], "only what has :// or www. is a link"),
    ],
    "turns mentions into @user": [
        ("@Ann_B9! hi @Bo", "@user! hi @user", [
            ("mentions are left as they are. " + LITERAL, "@ann_b9! hi @bo"),
            ("a name ends too early: it may hold digits and underscores, so \\w+",
             "@user_b9! hi @user"),
            ("a name ends at the next space only, so it swallows signs: \\w+",
             "@user hi @user"),
            ("the @ is lost: TweetEval writes @user", "user! hi user"),
            ("mentions are removed: TweetEval writes @user", "! hi "),
        ], "each @name must become @user"),
        ("me@mail.org", "me@mail.org", [
            ("an @ inside a word is taken for a mention: it belongs to an e-mail "
             "address. Look behind it, (?<!\\w)", "me@user.org"),
        ], "an @ inside a word belongs to an e-mail address and stays"),
        ("@ home", "@ home", [
            ("a lone @ is taken for a mention: at least one letter, \\w+",
             "@user home"),
        ], "a lone @ stays"),
    ],
    "keeps at most three of a letter or sign in a row": [
        ("so soo sooo soooo soooooooo", "so soo sooo sooo sooo", [
            ("stretched words are left as they are. " + LITERAL,
             "so soo sooo soooo soooooooo"),
            ("the replacement is taken letter by letter: Replace knows no \\1 there. "
             "Remove the letters that are followed by three of themselves, "
             "(?=\\1\\1\\1)", r"so soo sooo s\1\1\1 s\1\1\1"),
            ("two are kept: sooo says more than so, so keep three",
             "so soo soo soo soo"),
            ("a single letter is kept: then soo and so are the same",
             "so so so so so"),
            ("four are kept: keep three", "so soo sooo soooo soooo"),
            ("three are cut to two, but longer ones are not",
             "so soo soo soo soooooo"),
        ], "more than three of a letter must become three, and three or fewer stay"),
        ("!!!!!! 😂😂😂😂", "!!! 😂😂😂", [
            ("only letters are cut, signs and emoji are not", "!!!!!! 😂😂😂😂"),
            ("emoji are not cut", "!!! 😂😂😂😂"),
        ], "signs and emoji in a row must be cut too"),
        ("cost 100000", "cost 100000", [
            ("digits are cut too: 100000 must stay what it is, so except \\d",
             "cost 1000"),
        ], "digits must be left alone"),
        ("SoOoOoOo", "sooo", [
            ("letters are cut before lower-casing: SoOoO has no two equal letters in "
             "a row. Lower-case first", "sooooooo"),
        ], "stretching must be cut after lower-casing"),
    ],
    "knows how TweetEval writes a line break": [
        ("so\\nsad", "so sad", [
            ("the two signs \\ and n are left in the text, and the n sticks to the "
             "next word. In Python the two are \"\\\\n\"", "so\\nsad"),
            ("the line break is removed, so two words grow together: put a space",
             "sosad"),
            ("a real newline is put in its place: a space is meant", "so\nsad"),
        ], "TweetEval writes a line break as the two signs \\ and n; they must become "
           "a space"),
        ("so happy\tfor you, nancy", None, [], "plain words must be left alone"),
    ],
}


def the_step(function, call, what):
    """Call the reader's maker; expect something of the library's kind."""
    step = function()
    if step is None:
        raise Wrong("it gives None: is there a return at the end?")
    expect(
        hasattr(step, call),
        f"it must give a {what} of the library tokenizers, with a method {call}, so "
        f"that it can be saved with the tokenizer; it gives a {type(step).__name__}",
    )
    return step


def add_normal(name, probes):
    """One property of `make_normalizer`."""
    @normalizer_battery.property(name)
    def test(function):
        step = the_step(function, "normalize_str", "normalizer")
        for before, after, causes, otherwise in probes:
            actual = function.run(step.normalize_str, before)
            if after is None:  # only what separates words may change
                actual, after = " ".join(actual.split()), " ".join(before.split())
            tell(actual, after, causes, otherwise, before)


for _name, _probes in NORMAL.items():
    add_normal(_name, _probes)


@normalizer_battery.property("can be saved with a tokenizer")
def normal_saved(function):
    step = the_step(function, "normalize_str", "normalizer")
    text = "@Ann SOOOOO &lt;3 ❤\ufe0f"

    def through_a_file():
        tokenizer = Tokenizer(models.BPE())
        tokenizer.normalizer = step
        loaded = Tokenizer.from_str(tokenizer.to_str())
        return loaded.normalizer.normalize_str(text)

    try:
        again = function.run(through_a_file)
    except Broke as broke:
        raise Wrong(
            "it cannot be saved inside a tokenizer: build it from the library's own "
            f"steps, not from a Python class. It {broke}"
        ) from None
    tell(again, step.normalize_str(text), (), "saved and loaded it does another thing")


# make_pre_tokenizer

words_battery = Battery(
    "make_pre_tokenizer", "make_pre_tokenizer() -> a tokenizers pre-tokenizer",
    chapter=2,
)
WORDS = {
    "cuts at spaces, which fall away": [
        ("so  sad\ttoday", ["so", "sad", "today"], [
            ("spaces are kept as words, or at words: behavior='removed'",
             ["so", "  ", "sad", "\t", "today"]),
            ("spaces stick to the words: behavior='removed', not 'isolated' or "
             "'merged'", ["so", " ", " ", "sad", "\t", "today"]),
            ("the words are thrown away and the spaces kept: invert=True keeps what "
             "the pattern matches", ["  ", "\t"]),
            ("the text is not cut at all", ["so  sad\ttoday"]),
            ("spaces become part of the words, as in byte-level BPE (Ġ)",
             ["so", "Ġ", "Ġsad", "ĉ", "today"]),
        ], "white space must part words and fall away"),
        (" \t\n ", [], [], "a text of nothing but white space has no words"),
        ("", [], [], "an empty text has no words"),
    ],
    "gives each sign alone": [
        ("wait!!", ["wait", "!", "!"], [
            ("signs in a row stay together: each is a word of its own, or every !!! "
             "would be a token", ["wait", "!!"]),
            ("signs stick to the word before them", ["wait!!"]),
            ("signs are thrown away: they carry feeling", ["wait"]),
        ], "each sign must be a word of its own"),
        ("so:-) ok", ["so", ":", "-", ")", "ok"], [
            ("signs in a row stay together", ["so", ":-)", "ok"]),
        ], "each sign must be a word of its own"),
        ("👍🏽🙂", ["👍", "🏽", "🙂"], [
            ("emoji in a row stay together", ["👍🏽🙂"]),
            ("emoji and skin tone stay together: the tone is a token of its own",
             ["👍🏽", "🙂"]),
            ("emoji are thrown away", []),
        ], "each emoji is a sign of its own"),
    ],
    "parts a hashtag and its word": [
        ("#happy", ["#", "happy"], [
            ("the # sticks to its word, so #happy shares nothing with happy",
             ["#happy"]),
            ("the # is thrown away: the model should still see it", ["happy"]),
        ], "a hashtag is the sign # and then the plain word"),
        ("#small_wins", ["#", "small", "_", "wins"], [
            ("the underscore is taken for a letter: \\w holds it and digits, \\p{L} "
             "holds letters only", ["#", "small_wins"]),
            ("the underscore is thrown away", ["#", "small", "wins"]),
        ], "an underscore is a sign"),
    ],
    "keeps @user in one piece": [
        ("@user hi", ["@user", "hi"], [
            ("@user falls apart: name it in the pattern, before the letters",
             ["@", "user", "hi"]),
        ], "a mention is one word"),
        ("@user's", ["@user", "'", "s"], [
            ("a mention takes the apostrophe along", ["@user's"]),
        ], "a mention ends after @user"),
        ("a @ b", ["a", "@", "b"], [], "an @ alone is a sign"),
        ("me@mail", ["me", "@", "mail"], [
            ("any @ takes the letters after it along: only @user is a mention here, "
             "the rest is an e-mail address", ["me", "@mail"]),
        ], "only @user is a mention: the normaliser has made all of them so"),
    ],
    "keeps one apostrophe inside a word": [
        ("can't", ["can't"], [
            ("a word is cut at its apostrophe: one among letters belongs to it",
             ["can", "'", "t"]),
            ("a word is cut at its apostrophe, as GPT-2 does: one among letters "
             "belongs to it", ["can", "'t"]),
            ("a word is cut at its apostrophe, which gets lost", ["can", "t"]),
        ], "an apostrophe among letters belongs to the word"),
        ("'quoted'", ["'", "quoted", "'"], [
            ("apostrophes at the ends of a word are taken into it: only one among "
             "letters belongs to it", ["'quoted'"]),
            ("an apostrophe at the end is taken into the word: letters must follow it",
             ["'", "quoted'"]),
            ("apostrophes are thrown away", ["quoted"]),
        ], "apostrophes at the ends of a word are signs"),
        ("rock'n'roll", ["rock'n", "'", "roll"], [
            ("a word may hold several apostrophes: at most one, so ?, not *",
             ["rock'n'roll"]),
        ], "at most one apostrophe may stand inside a word"),
    ],
    "parts digits from letters": [
        ("7:42pm", ["7", ":", "42", "pm"], [
            ("digits and letters stay together: \\w holds both", ["7", ":", "42pm"]),
            ("each digit is a word of its own: digits in a row stay together",
             ["7", ":", "4", "2", "pm"]),
            ("digits are thrown away", [":", "pm"]),
        ], "a run of digits is a word of its own"),
    ],
    "knows letters beyond a to z": [
        ("naïve жук 日本", ["naïve", "жук", "日本"], [
            ("letters beyond a to z are taken for signs: \\p{L} knows them",
             ["na", "ï", "ve", *"жук", *"日本"]),
            ("letters beyond a to z are thrown away: \\p{L} knows them", ["na", "ve"]),
            ("Chinese characters are cut one by one", ["naïve", "жук", "日", "本"]),
        ], "letters of every script are letters: \\p{L}"),
        ("ru\u0308b", ["ru\u0308b"], [
            ("an accent on its own (\\p{M}) is taken for a sign, or cuts the word: it "
             "belongs to the letters", ["ru", "\u0308", "b"]),
            ("an accent on its own (\\p{M}) is lost, and cuts the word", ["ru", "b"]),
        ], "accents on their own (\\p{M}) belong to the letters"),
    ],
    "drops control characters": [
        ("a\x00b\x07", ["a", "b"], [
            ("control characters are taken for signs: except \\p{Cc}",
             ["a", "\x00", "b", "\x07"]),
        ], "control characters must fall away like white space"),
    ],
}


def add_words(name, probes):
    """One property of `make_pre_tokenizer`."""
    @words_battery.property(name)
    def test(function):
        step = the_step(function, "pre_tokenize_str", "pre-tokenizer")
        for text, wanted, causes, otherwise in probes:
            words = [w for w, _ in function.run(step.pre_tokenize_str, text)]
            tell(words, wanted, causes, otherwise, text)


for _name, _probes in WORDS.items():
    add_words(_name, _probes)


@words_battery.property("can be saved with a tokenizer")
def words_saved(function):
    step = the_step(function, "pre_tokenize_str", "pre-tokenizer")

    def through_a_file():
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = step
        loaded = Tokenizer.from_str(tokenizer.to_str())
        return [w for w, _ in loaded.pre_tokenizer.pre_tokenize_str("so sad!!")]

    try:
        words = function.run(through_a_file)
    except Broke as broke:
        raise Wrong(
            "it cannot be saved inside a tokenizer: build it from the library's own "
            f"steps, not from a Python class. It {broke}"
        ) from None
    tell(words, ["so", "sad", "!", "!"], (), "saved and loaded it does another thing")


# train_tokenizer

train_battery = Battery(
    "train_tokenizer",
    "train_tokenizer(texts, *, vocab_size=4000, min_frequency=2) -> "
    "tokenizers.Tokenizer", chapter=2, takes=("texts", "vocab_size", "min_frequency"),
)


def some_texts(count, seed=0):
    """Sentences of made-up words, some common, all of small letters."""
    chance = random.Random(seed)
    parts = ["so", "hap", "py", "sad", "er", "ly", "ma", "d", "st", "un", "qui", "z"]
    words = ["".join(chance.choices(parts, k=chance.randint(1, 3))) for _ in range(60)]
    weights = [1 / (i + 1) for i in range(60)]
    return [" ".join(chance.choices(words, weights, k=9)) for _ in range(count)]


TRAINING = some_texts(40)


def characters(word):
    """The characters of a word, those that continue it with ##."""
    return (word[0], *("##" + c for c in word[1:]))


def glue(pieces, pair):
    """Merge a pair wherever it stands in a word, from the left."""
    out = []
    for piece in pieces:
        if out and (out[-1], piece) == pair:
            out[-1] += piece.removeprefix("##")
        else:
            out.append(piece)
    return tuple(out)


def count_pairs(words):
    """How often each pair of neighbours occurs."""
    pairs = Counter()
    for pieces, count in words.items():
        for pair in zip(pieces, pieces[1:], strict=False):
            pairs[pair] += count
    return pairs


# Threads cost more than they save on a few sentences.
ONE_THREAD = patch.dict(os.environ, TOKENIZERS_PARALLELISM="false")


def trained(function, texts=None, **options):
    """Call the reader's function; expect a tokenizer."""
    with ONE_THREAD:
        tokenizer = function(list(TRAINING if texts is None else texts), **options)
    if tokenizer is None:
        raise Wrong("it gives None: is there a return at the end? (training changes "
                    "the tokenizer in place and gives nothing back)")
    expect(
        isinstance(tokenizer, Tokenizer),
        f"it must give a tokenizers.Tokenizer, but it gives a "
        f"{type(tokenizer).__name__}",
    )
    return tokenizer


def tokens_of(tokenizer, text):
    """The tokens of a text without [CLS] and [SEP]."""
    return tokenizer.encode(text, add_special_tokens=False).tokens


@train_battery.property("gives the special tokens the ids 0 to 4")
def train_special(function):
    tokenizer = trained(function)
    ids = [tokenizer.token_to_id(token) for token in SPECIAL]
    tell(ids, list(range(5)), [
        ("the special tokens are not in the vocabulary: name them to the trainer, "
         "special_tokens=[…]", [None] * 5),
        ("the special tokens are in another order: [PAD], [UNK], [CLS], [SEP], "
         "[MASK] have the ids 0 to 4", lambda: [ids[i] for i in range(5)]
         if sorted(ids) == list(range(5)) else None),
    ], "the special tokens [PAD], [UNK], [CLS], [SEP], [MASK] must have the ids 0 to 4, "
       "named first, in this order")
    vocab = tokenizer.get_vocab()
    expect(sorted(vocab.values()) == list(range(len(vocab))), "the ids have gaps, or "
           "two tokens share one: they must be 0, 1, 2, …")


@train_battery.property("puts [CLS] before and [SEP] after each text")
def train_template(function):
    tokenizer = trained(function)
    expect(
        not json.loads(tokenizer.to_str())["model"].get("dropout"),
        "dropout is switched on in the model: the same text is cut in another way each "
        "time. That is an idea for training, but here ids must be the same",
    )
    ids = tokenizer.encode("so sad").ids
    inside = tokenizer.encode("so sad", add_special_tokens=False).ids
    tell(ids, [CLS, *inside, SEP], [
        ("no special tokens are put round a text: set a post_processor, "
         "TemplateProcessing", inside),
        ("[SEP] is missing at the end", [CLS, *inside]),
        ("[CLS] is missing at the beginning", [*inside, SEP]),
        ("[CLS] and [SEP] have changed places", [SEP, *inside, CLS]),
        ("the ids given to TemplateProcessing are not those of the tokens",
         lambda: [ids[0], *inside, ids[-1]]),
    ], "a text must become [CLS] … [SEP]")
    tell(tokenizer.encode("").ids, [CLS, SEP], (), "an empty text must be [CLS] [SEP]")


def model_of(tokenizer):
    """The model's part of a tokenizer's file."""
    model = json.loads(tokenizer.to_str())["model"]
    expect(
        model["type"] == "BPE",
        f"the model is {model['type']}, but it must be BPE: pairs of neighbours are "
        "merged, the most frequent first",
    )
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m)
              for m in model["merges"]]
    return model, merges


@train_battery.property("marks pieces that continue a word with ##")
def train_mark(function):
    tokenizer = trained(function, ["ab ab ab cd"] * 2, vocab_size=13)
    vocab = tokenizer.get_vocab()
    expect(
        any(t.startswith("##") for t in vocab),
        "no piece is marked with ##, so nobody sees where words begin: pass "
        "continuing_subword_prefix='##' to the model and to the trainer; the tokens "
        f"are {short(repr(sorted(vocab)))}",
    )
    model, _ = model_of(tokenizer)
    expect(
        model["continuing_subword_prefix"] == "##",
        "the trainer marks pieces with ##, but the model does not know: pass "
        "continuing_subword_prefix='##' to models.BPE too, or encoding finds no piece",
    )
    pieces = [*tokens_of(tokenizer, "ba")]
    tell(pieces, ["b", "##a"], [
        ("in encoding a continuing character is unknown", ["[UNK]"]),
    ], "two letters that were never merged must be two pieces, the second with ##")


@train_battery.property("merges a most frequent pair, again and again")
def train_merges(function):
    tokenizer = trained(function)
    _, merges = model_of(tokenizer)
    expect(tokenizer.pre_tokenizer is not None, "the tokenizer has no pre_tokenizer, so "
           "merges cross from word to word: set tokenizer.pre_tokenizer = "
           "make_pre_tokenizer() before training")
    counts = Counter(word for text in TRAINING for word in text.split())
    words = {characters(word): n for word, n in counts.items()}
    expect(bool(merges), "there are no merges: is the tokenizer trained, with "
           "train_from_iterator(texts, trainer)?")
    for number, pair in enumerate(merges, start=1):
        pairs = count_pairs(words)
        best = max(pairs.values(), default=0)
        expect(
            pairs[pair] == best,
            f"merge number {number} joins {pair[0]} and {pair[1]}, which occur "
            f"together {pairs[pair]} times, while {max(pairs, key=pairs.get)} occurs "
            f"{best} times: count pairs over all texts, as often as each word occurs, "
            "and count again after every merge",
        )
        expect(best >= 2, f"merge number {number} joins a pair that occurs only once: "
               "min_frequency is not passed to the trainer")
        merged = {}
        for pieces, n in words.items():
            pieces = glue(pieces, pair)
            merged[pieces] = merged.get(pieces, 0) + n
        words = merged
    left = max(count_pairs(words).values(), default=0)
    expect(
        left < 2,
        f"after {len(merges)} merges a pair is left that occurs {left} times, and "
        "there was room: is vocab_size passed on, or another min_frequency used?",
    )
    for pieces in list(words)[:20]:
        word = pieces[0] + "".join(p.removeprefix("##") for p in pieces[1:])
        tell(tokens_of(tokenizer, word), list(pieces), (), "a word of the training "
             "texts is cut otherwise than its merges say: a dropout in the model?",
             word)


@train_battery.property("normalises, and cuts words, as the two makers do")
def train_steps(function):
    texts = ["so sad, so happy! #happy don't &"] * 3
    tokenizer = trained(function, texts)
    expect(tokenizer.normalizer is not None, "the tokenizer has no normalizer: set "
           "tokenizer.normalizer = make_normalizer() before training")
    expect(tokenizer.pre_tokenizer is not None, "the tokenizer has no pre_tokenizer: "
           "set tokenizer.pre_tokenizer = make_pre_tokenizer() before training")
    happy = tokens_of(tokenizer, "happy")
    for text, wanted, hint in (
        ("SAD", tokens_of(tokenizer, "sad"), "capitals are not made small: is the "
         "normalizer set?"),
        ("&amp;", tokens_of(tokenizer, "&"), "an HTML entity is not undone: is the "
         "normalizer make_normalizer's?"),
        ("happy!!", [*happy, "!", "!"], "signs are not cut off one by one: is the "
         "pre_tokenizer make_pre_tokenizer's?"),
        ("#happy", ["#", *happy], "a hashtag does not share its word: is the "
         "pre_tokenizer make_pre_tokenizer's?"),
        ("Don’t", ["don't"], "a curly apostrophe cuts a word: is the normalizer "
         "make_normalizer's, and set before training?"),
    ):
        tell(tokens_of(tokenizer, text), wanted, (), hint, text)
    merged = [t for t in tokenizer.get_vocab() if " " in t or "Ġ" in t]
    expect(not merged, f"merges cross from word to word, as in {merged[:3]}: set the "
           "pre_tokenizer before training")


@train_battery.property("keeps to vocab_size, special tokens included")
def train_size(function):
    letters = {c for text in TRAINING for c in text} - {" "}
    for size in (5 + 2 * len(letters) + 4, 70):
        tokenizer = trained(function, vocab_size=size)
        got = tokenizer.get_vocab_size()
        expect(
            got <= size,
            f"vocab_size={size}, but there are {got} tokens: the special tokens and "
            "the ## characters count as well, so the trainer has to make all of them",
        )
        expect(got == size, f"vocab_size={size} and texts enough, but there are only "
               f"{got} tokens: is the argument passed on to the trainer?")
    large, small = trained(function), trained(function, vocab_size=70)
    for i in range(70):
        expect(
            small.id_to_token(i) == large.id_to_token(i),
            f"the first 70 tokens differ between vocab_size=70 and 4000 (id {i}: "
            f"{small.id_to_token(i)} and {large.id_to_token(i)}). " + CHANCE,
        )


CHANCE = (
    "The trainer numbers the continuing characters in the order of a hash map, "
    "another one in each training, and ties go to the lower number. Name those "
    "characters as special tokens, in a fixed order, and make them ordinary "
    "afterwards; sort what comes out of a set or a dict of counts"
)


@train_battery.property("gives the same tokenizer each time")
def train_again(function):
    texts = [*TRAINING, "jklm vwxy bcfg wvut kjgf ycbx"] * 2
    all_ = [trained(function, texts).to_str() for _ in range(4)]
    expect(
        len(set(all_)) == 1,
        "the same texts give another tokenizer in each training, so yesterday's ids "
        "mean something else today. " + CHANCE,
    )


@train_battery.property("makes rare characters [UNK], and knows the others everywhere")
def train_rare(function):
    texts = ["zest zeal 7 so", "jam ham 7 so", "so 🦑 q"] * 2 + ["so w 🦊"]
    tokenizer = trained(function, texts)
    for text, wanted, hint in (
        ("w", ["[UNK]"], "a character that occurs once must be [UNK]: below "
         "min_frequency it can't teach its vector anything, and [UNK] itself would "
         "never be trained. Limit the alphabet to the known ones (limit_alphabet)"),
        ("🦊", ["[UNK]"], "a sign that occurs once must be [UNK]"),
        ("🦑", ["🦑"], "a sign that occurs twice must be known"),
        ("q", ["q"], "a letter that occurs twice must be known"),
    ):
        tell(tokens_of(tokenizer, text), wanted, [
            ("unknown characters vanish without a trace: pass unk_token='[UNK]' to "
             "models.BPE", []),
        ], hint, text)
    expect(
        "[UNK]" not in tokens_of(tokenizer, "jazz"),
        "z is known at the beginning of words, but inside a word it is [UNK], since "
        "training never saw it there: give each known letter its ## form too",
    )
    tell(tokens_of(tokenizer, "日本"), ["[UNK]"], [
        ("each unknown character of a word becomes an [UNK] of its own: "
         "fuse_unk=True makes it one", ["[UNK]", "[UNK]"]),
        ("unknown characters vanish without a trace: pass unk_token='[UNK]'", []),
    ], "several unknown characters in one word must become a single [UNK]", "日本")
    once = trained(function, texts, min_frequency=1)
    tell(tokens_of(once, "w"), ["w"], [
        ("with min_frequency=1 a character that occurs once is still unknown: is 2 "
         "written into the code?", ["[UNK]"]),
    ], "with min_frequency=1 every character is known", "w")


@train_battery.property("leaves only five tokens special")
def train_five(function):
    tokenizer = trained(function)
    added = [t["content"] for t in json.loads(tokenizer.to_str())["added_tokens"]]
    extra = [t for t in added if t not in SPECIAL]
    expect(
        not extra,
        f"besides the five, {short(repr(extra), 60)} are special: a text that holds "
        "such a string would be cut there. If the ## characters were named as special "
        "to fix their order, make them ordinary again in the saved form",
    )
    tell(sorted(added), sorted(SPECIAL), (), "the five special tokens must be marked "
         "as special: name them to the trainer as special_tokens")


@train_battery.property("can be saved and loaded")
def train_saved(function):
    tokenizer = trained(function)
    loaded = Tokenizer.from_str(tokenizer.to_str())
    for text in (*TRAINING[:5], "", "SO sad!!", "日本"):
        tell(loaded.encode(text).ids, tokenizer.encode(text).ids, (),
             "after saving and loading it gives other ids", text)
    state = json.loads(tokenizer.to_str())
    expect(
        not state.get("padding"),
        "padding is switched on in the tokenizer: rows are padded where batches are "
        "made, and encode_batch would pad them before",
    )
    expect(
        not state.get("truncation"),
        "truncation is switched on in the tokenizer: encode cuts, to its own max_len",
    )
    if tokenizer.decoder is None or tokenizer.decode(
            tokenizer.encode("so sad").ids) != "so sad":
        function.notes.append(
            "decode does not give the text back: the book sets a decoder, WordPiece "
            "with the prefix ##"
        )


@train_battery.property("takes any iterable of texts")
def train_iterable(function):
    wanted = trained(function).get_vocab_size()
    try:
        one = function.run(lambda: function.thing(iter(TRAINING)))
    except Broke as broke:
        raise Wrong(
            "it wants a list, but texts may be any iterable, a generator for instance: "
            f"take list(texts) first. It {broke}"
        ) from None
    expect(
        isinstance(one, Tokenizer) and one.get_vocab_size() == wanted,
        "from a generator it learns another tokenizer: the texts are gone through "
        "twice, and the second time a generator is empty. Take list(texts) first",
    )


@train_battery.property("refuses what are no texts, and too small a vocabulary")
def train_refuses(function):
    for texts, hint in (
        ("so sad", "one string must be refused, by a TypeError: it would be taken for "
         "a list of letters"),
        (["so sad", 7], "a list that holds something else than strings must be "
         "refused by a TypeError"),
        (["so sad", None], "a list that holds None must be refused by a TypeError"),
        ([], "an empty list must be refused by a ValueError: nothing can be learned"),
    ):
        refuses(function, lambda texts=texts: function.thing(texts), hint)
    refuses(
        function, lambda: function.thing(list(TRAINING), vocab_size=12),
        "a vocab_size of 12 must be refused by a ValueError: the special tokens and "
        "the known characters, in both forms, need more; the library quietly makes "
        "more tokens than asked for, or forgets letters", (ValueError, AssertionError),
    )


# encode

encode_battery = Battery(
    "encode", "encode(tokenizer, texts, *, max_len=128) -> a list of lists of ints",
    chapter=2, takes=("tokenizer", "texts", "max_len"),
)
KNOWN = "not sad just happy so a b c d e f g h".split()


def small_tokenizer():
    """A tokenizer of ours, as it comes from a file: one id a known word."""
    vocab = {token: i for i, token in enumerate([*SPECIAL, *KNOWN])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)],
    )
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in SPECIAL])
    return Tokenizer.from_str(tokenizer.to_str())


def ids_of(text):
    """The ids of a text of known words, without [CLS] and [SEP]."""
    return [5 + KNOWN.index(word) if word in KNOWN else UNK for word in text.split()]


def rows_of(function, texts, **options):
    """Call the reader's function; expect rows of ints."""
    tokenizer = small_tokenizer()
    before = tokenizer.to_str()
    rows = function(tokenizer, list(texts), **options)
    if tokenizer.to_str() != before and not any(
            "tokenizer changed" in note for note in function.notes):
        function.notes.append(
            "the tokenizer changed: truncation or padding stays switched on in it, "
            "for whoever uses or saves it next (no_truncation() undoes it)"
        )
    if rows is None:
        raise Wrong("it gives None: is there a return at the end?")
    expect(
        not isinstance(rows, torch.Tensor),
        "it gives a tensor: rows have different lengths, so give lists of ints; "
        "make_batch pads them",
    )
    expect(isinstance(rows, list), "it must give a list of lists, but it gives a "
           f"{type(rows).__name__}")
    for row in rows:
        expect(
            isinstance(row, list),
            f"each row must be a list of ints, but it is a {type(row).__name__}: "
            + ("are all rows joined into one list?" if isinstance(row, int) else
               "take .ids of what the library gives, or list(…)"),
        )
        expect(
            all(isinstance(i, int) for i in row),
            f"a row must hold ints, but it holds {sorted({type(i).__name__ for i in row})}"
            ": take .ids, not .tokens",
        )
    return rows


def encode_causes(texts, max_len=128):
    """What wrong ways of encoding give."""
    inside = [ids_of(text) for text in texts]
    full = [[CLS, *row, SEP] for row in inside]
    longest = max(map(len, full), default=0)

    def each(rule, rows=full):
        return [rule(row) for row in rows]

    def cut(row):
        return row if len(row) <= max_len else [*row[: max_len - 1], SEP]

    right = each(cut)
    kept = max(map(len, right), default=0)
    return [
        ("[CLS] and [SEP] are missing: the tokenizer puts them round a text, unless "
         "add_special_tokens=False", each(lambda r: r[:max_len], inside)),
        ("[CLS] and [SEP] are missing, and long texts are cut for them all the same",
         each(lambda r: r[: max_len - 2], inside)),
        ("[CLS] and [SEP] are put there twice: the tokenizer has done it already",
         [[CLS, *r, SEP] for r in right]),
        ("[CLS] and [SEP] are put there twice: the tokenizer has done it already",
         [cut([CLS, *r, SEP]) for r in full]),
        ("[SEP] is missing at the end", each(lambda r: [CLS, *r][:max_len], inside)),
        ("[CLS] is missing at the beginning", each(lambda r: [*r, SEP], inside)),
        ("a text that is too long loses its [SEP]: cut to max_len - 1 and put [SEP] "
         "after it", each(lambda r: r[:max_len])),
        ("long texts are not cut at all", full),
        ("a text that is cut stays one token too long: [SEP] counts as well, so cut to "
         "max_len - 1", each(lambda r: r if len(r) <= max_len else [*r[:max_len], SEP])),
        ("a text that is cut loses one token too many: [CLS] was there already, so cut "
         "to max_len - 1 and put [SEP] after it",
         each(lambda r: r if len(r) <= max_len else [*r[: max_len - 2], SEP])),
        ("the text is cut, max_len characters of it: max_len counts tokens",
         [[CLS, *ids_of(t[:max_len])[: max_len - 2], SEP] for t in texts]),
        ("[SEP] is put at the end of every row, where it stands already: only a row "
         "that was cut has lost it", [cut([*r, SEP]) for r in full]),
        ("[SEP] is put at the end of every row, where it stands already: only a row "
         "that was cut has lost it", each(lambda r: [*r[: max_len - 1], SEP])),
        ("a text of exactly max_len tokens fits and must not be cut: <=, not <",
         each(lambda r: r if len(r) < max_len else [*r[: max_len - 2], SEP])),
        ("max_len counts the words only: [CLS] and [SEP] count as well",
         each(lambda r: [CLS, *r[:max_len], SEP], inside)),
        ("a long text loses its beginning: its end is to go",
         each(lambda r: r if len(r) <= max_len else [CLS, *r[-(max_len - 1):]])),
        ("a long text loses its beginning, [CLS] too: its end is to go",
         each(lambda r: r[-max_len:])),
        ("a long text is dropped: it must be cut",
         [r for r in full if len(r) <= max_len]),
        ("a long text is cut, but max_len is another number than the argument",
         each(lambda r: r if len(r) <= 128 else [*r[:127], SEP])),
        ("rows are padded to the longest: that is make_batch's work",
         [r + [PAD] * (kept - len(r)) for r in right]),
        ("rows are padded to the longest and then cut: padding is make_batch's work",
         each(lambda r: cut(r + [PAD] * (longest - len(r))))),
        ("rows are padded to max_len: that is make_batch's work",
         [r + [PAD] * (max_len - len(r)) for r in right]),
        ("the rows are sorted by length: they must stand in the order of the texts",
         sorted(right, key=len)),
        ("the rows are sorted by length, the longest first: keep the order of the texts",
         sorted(right, key=len, reverse=True)),
        ("the rows come in reversed order", right[::-1]),
        ("texts that stand twice are encoded once",
         [r for i, r in enumerate(right) if r not in right[:i]]),
        ("empty texts are left out: each text must give a row, or labels slip",
         [r for r, i in zip(right, inside, strict=True) if i]),
        ("an empty text gives an empty row: it must be [CLS] [SEP], since no layer "
         "can do with a row without tokens",
         [r if i else [] for r, i in zip(right, inside, strict=True)]),
        ("unknown words are left out: they must be [UNK]",
         each(lambda r: cut([t for t in r if t != UNK]))),
        ("all rows are put into one list", sum(right, [])),
        ("only the first text is encoded", right[:1]),
        ("only the first text is encoded", right[0] if right else None),
    ]


ENCODE = ["just happy", "", "so sad so sad so", "a", "not sad squid just happy", "a"]


@encode_battery.property("gives a row of ids for each text, in order")
def encode_plain(function):
    rows = rows_of(function, ENCODE)
    tell(rows, [[CLS, *ids_of(t), SEP] for t in ENCODE], encode_causes(ENCODE),
         "the ids are not those that the tokenizer gives", ENCODE)
    tell(rows_of(function, []), [], (), "no texts must give no rows")


@encode_battery.property("cuts the end of a long text, and leaves its [SEP]")
def encode_long(function):
    texts = ["a b c", "a b c d e f g h", "", "a b c d", "h g f e d c b a", "so"]
    for max_len in (6, 5, 3):
        wanted = [[CLS, *ids_of(t)[: max_len - 2], SEP] for t in texts]
        rows = rows_of(function, texts, max_len=max_len)
        tell(rows, wanted, encode_causes(texts, max_len),
             f"with max_len={max_len} a text must keep [CLS], its first "
             f"{max_len - 2} tokens and [SEP]", texts)
    long = [" ".join(random.Random(0).choices(KNOWN, k=300))]
    rows = rows_of(function, long)
    tell(rows, [[CLS, *ids_of(long[0])[:126], SEP]],
         [("without max_len a long text is not cut: the default is 128",
           [[CLS, *ids_of(long[0]), SEP]]), *encode_causes(long), *[
             (f"max_len is {n} where nothing is passed: the book's default is 128",
              [[CLS, *ids_of(long[0])[: n - 2], SEP]])
             for n in (16, 32, 50, 64, 100, 126, 127, 129, 130, 256, 280)]],
         "without max_len a text may keep 128 tokens")
    again = [rows_of(function, texts, max_len=n) for n in (4, 10)]
    tell([max(map(len, rows)) for rows in again], [4, 10], [
        ("the max_len of an earlier call stays in force", [4, 4])],
         "max_len must hold for this call only")


@encode_battery.property("takes the name of a special token in a text for text")
def encode_names(function):
    for name, number in zip(SPECIAL, range(5), strict=True):
        text = f"a {name} b"
        [row] = rows_of(function, [text])
        a, b = ids_of("a b")
        if row == [CLS, a, UNK, UNK, UNK, b, SEP]:  # [, the name, ]
            continue
        if number != UNK and number in row[1:-1]:
            raise Wrong(
                f"somebody types {name} in a post, and the model gets the real token "
                f"with id {number}: set tokenizer.encode_special_tokens = True inside "
                "the function, since a saved tokenizer forgets it"
            )
        tell(row, [CLS, a, UNK, UNK, UNK, b, SEP], [
            (f"{name} in a post is taken for the real token: set "
             "tokenizer.encode_special_tokens = True", [CLS, a, UNK, b, SEP]),
            (f"{name} is removed from the text: it is only text, and its signs are "
             "tokens like others", [CLS, a, b, SEP]),
        ], f"{name} in a post must be cut like any other text", text)


@encode_battery.property("refuses what are no texts, and too short rows")
def encode_refuses(function):
    for texts, hint in (
        ("just happy", "one string must be refused, by a TypeError: it would be taken "
         "for a list of letters, one row for each"),
        (["a", None], "a list that holds None must be refused by a TypeError"),
        (["a", 7], "a list that holds a number must be refused by a TypeError"),
        ([["a", "b"]], "a list of lists must be refused by a TypeError"),
        ([("a", "b")], "a pair must be refused by a TypeError: the library takes it "
         "for two texts in one row"),
        (["cut \ud83d"], "half a character, as '\\ud83d', must be refused by a "
         "ValueError"),
    ):
        refuses(function, lambda texts=texts: function.thing(small_tokenizer(), texts),
                hint)
    for max_len in (2, 1, 0, -1):
        refuses(
            function,
            lambda n=max_len: function.thing(small_tokenizer(), ["a b"], max_len=n),
            f"max_len={max_len} must be refused by a ValueError: [CLS], a token and "
            "[SEP] need 3", (ValueError, AssertionError),
        )


# make_batch

batch_battery = Battery(
    "make_batch",
    "make_batch(rows, *, vocab_size, labels=None, num_labels=None) -> dict with "
    "input_ids, attention_mask and, where given, labels", chapter=2,
    takes=("rows", "vocab_size", "labels", "num_labels"),
)
ROWS = [[2, 7, 3], [2, 6, 8, 7, 6, 3], [2, 3], [2, 5, 5, 5, 3]]


def batch_of(function, rows, **options):
    """Call the reader's function; expect a dict of tensors."""
    batch = function(copy.deepcopy(rows), **options)
    if batch is None:
        raise Wrong("it gives None: is there a return at the end?")
    expect(
        isinstance(batch, Mapping),
        f"it must give a dict, but it gives a {type(batch).__name__}",
    )
    wanted = {"input_ids", "attention_mask"}
    wanted |= {"labels"} if options.get("labels") is not None else set()
    expect(
        set(batch) == wanted,
        f"the dict must hold {', '.join(sorted(wanted))}, but it holds "
        f"{', '.join(map(str, batch))}" + (
            ": labels belong there only where they were given"
            if "labels" in set(batch) - wanted else ""),
    )
    for name, value in batch.items():
        expect_tensor(value, what=name)
    return batch


def padded(rows, length=None, fill=PAD, left=False):
    """Rows as a tensor."""
    length = length or max(map(len, rows))
    pads = [[fill] * (length - len(row)) for row in rows]
    return torch.tensor([
        [*p, *r][:length] if left else [*r, *p][:length]
        for p, r in zip(pads, rows, strict=True)
    ])


def shape_hint(name, value, rows, extra=0):
    """Say why a tensor has another shape than the batch."""
    batch, seq_len = len(rows), max(map(len, rows))
    if tuple(value.shape) == (batch, seq_len):
        return
    shape = tuple(value.shape)
    hints = {
        (seq_len, batch): f"{name} is transposed: it must be (batch, seq_len)",
        (batch, len(rows[0])): "the length of the first row is taken for that of the "
        "batch: take the longest",
        (batch, min(map(len, rows))): "the rows are cut to the shortest: pad them to "
        "the longest",
        (batch, seq_len + 1): "the batch is one position too long",
        (batch, seq_len - 1): "the batch is one position too short",
        (batch, 1, 1, seq_len): f"{name} has more axes than (batch, seq_len): layers "
        "add those that they need",
        (batch, 1, seq_len): f"{name} has more axes than (batch, seq_len): layers add "
        "those that they need",
        (sum(map(len, rows)),): "the rows are joined into one",
    }
    hint = hints.get(shape) or (
        "the rows are padded to a fixed length: the longest row of the batch is "
        "enough, and the rest would be computed for nothing"
        if len(shape) == 2 and shape[0] == batch and shape[1] > seq_len
        else "the shape is wrong")
    raise Wrong(f"{hint}. {name} must be {(batch, seq_len)}, but it is {shape}")


@batch_battery.property("pads on the right to the longest row, with id 0")
def batch_ids(function):
    ids = batch_of(function, ROWS, vocab_size=10)["input_ids"]
    shape_hint("input_ids", ids, ROWS)
    order = sorted(ROWS, key=len, reverse=True)
    explain(ids, padded(ROWS), [
        ("the padding stands on the left: the first token must be [CLS], so pad on "
         "the right", lambda: padded(ROWS, left=True)),
        *[(f"it is padded with {name} instead of [PAD], whose id is 0",
           lambda fill=fill: padded(ROWS, fill=fill))
          for fill, name in ((1, "1, [UNK]"), (2, "2, [CLS]"), (3, "3, [SEP]"),
                             (4, "4, [MASK]"), (-1, "-1"), (-100, "-100"),
                             (10, "vocab_size"), (9, "the last id"))],
        ("the rows are sorted by length: keep their order, or labels slip",
         lambda: padded(order)),
        ("the rows are sorted by length: keep their order, or labels slip",
         lambda: padded(sorted(ROWS, key=len))),
        ("all rows are the last one", lambda: padded([ROWS[-1]] * 4, 6)),
        ("all rows are the first one", lambda: padded([ROWS[0]] * 4, 6)),
        ("the last token of each row is lost", lambda: padded([r[:-1] for r in ROWS], 6)),
        ("each row begins with its own length", lambda: padded(
            [[len(r), *r] for r in ROWS], 6)),
        ("the rows are cut to the shortest and then padded",
         lambda: padded([r[:2] for r in ROWS], 6)),
    ], f"the rows {ROWS} must become {padded(ROWS).tolist()}, but they become "
       f"{short(repr(ids.tolist()))}")
    expect(
        ids.dtype == torch.int64,
        f"input_ids must be int64, but it is {ids.dtype}: "
        + ("an embedding refuses floats; torch.zeros makes them unless dtype=torch.long"
           if ids.is_floating_point() else
           "that is what an embedding and other libraries expect"),
    )


@batch_battery.property("marks the real tokens: a bool mask, True = real")
def batch_mask(function):
    mask = batch_of(function, ROWS, vocab_size=10)["attention_mask"]
    shape_hint("attention_mask", mask, ROWS)
    real = padded([[1] * len(r) for r in ROWS]).bool()
    explain(mask, real, [
        ("the mask is inverted: True must stand at real tokens, not at padding",
         lambda: ~real),
        ("the mask is shifted by one: the last real token, [SEP], is masked out. "
         "Compare the positions 0, 1, … with <",
         lambda: padded([[1] * (len(r) - 1) for r in ROWS], 6)),
        ("the mask is one too long: the first padding counts as real. Compare the "
         "positions 0, 1, … with <, not <=",
         lambda: padded([[1] * min(len(r) + 1, 6) for r in ROWS], 6)),
        ("the mask says that everything is real", lambda: torch.ones_like(real)),
        ("the mask says that nothing is real", lambda: torch.zeros_like(real)),
        ("the mask fits padding on the left, the ids are padded on the right",
         lambda: padded([[1] * len(r) for r in ROWS], left=True)),
        ("the mask holds the ids themselves", lambda: padded(ROWS)),
        ("[CLS] and [SEP] are masked out: they are real tokens",
         lambda: padded([[0, *[1] * (len(r) - 2), 0] for r in ROWS])),
        ("[CLS] is masked out: it is a real token",
         lambda: padded([[0, *[1] * (len(r) - 1)] for r in ROWS])),
        ("the mask is a number to add to scores: 0 and minus infinity. Give bool",
         lambda: torch.zeros(real.shape).masked_fill(~real, float("-inf"))),
    ], "True must stand at the real tokens of each row, False at its padding; it is "
       f"{short(repr(mask.int().tolist()))}")
    expect(
        mask.dtype == torch.bool,
        f"the mask must be bool, but it is {mask.dtype}: ~ and masked_fill need bool, "
        "and with 0 and 1 as numbers ~ gives -1 and -2, which both count as true",
    )


@batch_battery.property("counts a real token with id 0 as real")
def batch_zero(function):
    rows = [[2, 0, 3, 0], [0], [2, 5, 6, 7, 3]]
    batch = batch_of(function, rows, vocab_size=10)
    real = padded([[1] * len(r) for r in rows]).bool()
    explain(batch["attention_mask"].bool(), real, [
        ("the mask is made from the ids, ids != 0: a row may hold the id 0 itself, "
         "and is then full of holes. Make it from the lengths of the rows",
         lambda: padded(rows) != 0),
    ], "with the id 0 inside a row the mask is wrong: make it from the lengths")
    explain(batch["input_ids"], padded(rows), [], "with the id 0 inside a row the ids "
            "are wrong")


@batch_battery.property("works for one row, and for rows of one length")
def batch_small(function):
    for rows in ([[2, 8, 3]], [[2]], [[2, 3], [4, 5]]):
        batch = batch_of(function, rows, vocab_size=10)
        for name in ("input_ids", "attention_mask"):
            shape_hint(name, batch[name], rows)
        explain(batch["input_ids"], torch.tensor(rows), [], f"the rows {rows} need no "
                "padding, and must be left as they are")
        expect(bool(batch["attention_mask"].all()), f"the rows {rows} have no padding, "
               "but the mask says so")


@batch_battery.property("takes the labels along")
def batch_labels(function):
    labels = batch_of(
        function, ROWS, vocab_size=10, labels=[3, 0, 1, 3], num_labels=4
    )["labels"]
    wanted = torch.tensor([3, 0, 1, 3])
    expect(
        tuple(labels.shape) == (4,),
        f"labels must have the shape (batch,), here (4,), but it is "
        f"{tuple(labels.shape)}: give the numbers, not rows of 0 and 1",
    )
    explain(labels, wanted, [
        ("the labels are sorted", lambda: wanted.sort().values),
        ("the labels are counted from 1", lambda: wanted + 1),
        ("the labels are those of other rows: sorted with the rows by length?",
         lambda: torch.tensor([0, 3, 3, 1])),
        ("the labels are those of other rows: sorted with the rows by length?",
         lambda: torch.tensor([1, 3, 3, 0])),
    ], f"the labels [3, 0, 1, 3] become {short(repr(labels.tolist()))}")
    expect(labels.dtype == torch.int64, f"labels must be int64, but they are "
           f"{labels.dtype}: cross-entropy takes class numbers as int64")
    labels = batch_of(function, [[2]], vocab_size=10, labels=[0], num_labels=1)
    explain(labels["labels"], torch.tensor([0]), [], "a label 0 gets lost")


BAD_ROWS = (
    ([], "an empty list of rows must be refused: a batch of nothing"),
    ([[2, 3], []], "an empty row must be refused: attention would have nothing to look "
     "at, and give NaN"),
    ([[2, 10], [3]], "the id 10 must be refused where vocab_size is 10: ids go up to 9, "
     "so compare with >=, not >"),
    ([[2], [3, 99]], "an id far outside the vocabulary must be refused here, in every "
     "row: it comes from another tokenizer, and a GPU would stop the whole process"),
    ([[2, -1], [3]], "the id -1 must be refused: ids begin at 0"),
    ([[-1], [3, 4]], "the id -1 must be refused, in the first place too"),
)


@batch_battery.property("refuses ids that cannot be right")
def batch_bad_ids(function):
    for rows, hint in BAD_ROWS:
        refuses(function, lambda rows=rows: function.thing(rows, vocab_size=10),
                f"{hint}. ValueError, as the rows are {rows}",
                (ValueError, AssertionError))
    for rows in ([[2.0, 3.0]], [[2, 3.5], [2]], [["2", "3"]]):
        refuses(
            function, lambda rows=rows: function.thing(rows, vocab_size=10),
            f"ids that are no ints must be refused by a TypeError, as in {rows}: a "
            "conversion would silently make other tokens of them",
        )
    try:
        batch = batch_of(function, [[0, 9], [9]], vocab_size=10)
    except Broke as broke:
        raise Wrong(
            "the ids 0 and 9 are right where vocab_size is 10, and are refused: ids go "
            f"from 0 to vocab_size - 1. It {broke}"
        ) from None
    expect_tensor(batch["input_ids"], (2, 2))


@batch_battery.property("refuses labels that cannot be right")
def batch_bad_labels(function):
    for labels, number, hint in (
        ([0, 4], 4, "the label 4 must be refused where num_labels is 4: compare with "
         ">=, not >"),
        ([0, -1], 4, "the label -1 must be refused"),
        ([-100, 1], 4, "the label -100 must be refused: to PyTorch it means ignore this "
         "one, so a spoiled file would train on less and less data"),
        ([0], 4, "one label for two rows must be refused"),
        ([0, 1, 2], 4, "three labels for two rows must be refused"),
        ([], 4, "no labels for two rows must be refused: an empty list is not None"),
        ([0, 1], None, "labels without num_labels must be refused: nothing can be "
         "checked then"),
    ):
        refuses(
            function, lambda labels=labels, number=number: function.thing(
                [[2, 3], [2]], vocab_size=10, labels=labels, num_labels=number),
            f"{hint}. ValueError, as labels={labels} and num_labels={number}",
        )
    refuses(
        function, lambda: function.thing([[2, 3], [2]], vocab_size=10,
                                         labels=[0.0, 1.0], num_labels=4),
        "labels that are no ints must be refused by a TypeError: cross-entropy takes "
        "floats for something else",
    )
    try:
        batch_of(function, [[2, 3], [2]], vocab_size=10, labels=[0, 3], num_labels=4)
    except Broke as broke:
        raise Wrong(
            "the labels 0 and 3 are right where num_labels is 4, and are refused: they "
            f"go from 0 to num_labels - 1. It {broke}"
        ) from None


# bucket_by_length

bucket_battery = Battery(
    "bucket_by_length",
    "bucket_by_length(lengths, *, batch_size, seed=None) -> lists of indices",
    chapter=2, takes=("lengths", "batch_size", "seed"),
)


def some_lengths(count, seed=0, longest=60):
    """Lengths of texts, many of them equal."""
    chance = random.Random(seed)
    return [chance.randint(2, longest) for _ in range(count)]


def dice():
    """The state of all global dice."""
    return (random.getstate(), (np.random.get_state()[1].tobytes(), np.random.get_state()[2]),
            torch.get_rng_state().numpy().tobytes())


def batches_of(function, lengths, batch_size, **options):
    """Call the reader's function; expect lists of ints."""
    before = dice()
    batches = function(list(lengths), batch_size=batch_size, **options)
    after = dice()
    if before != after:
        which = ("random", "numpy's", "torch's")[
            [a != b for a, b in zip(before, after, strict=True)].index(True)]
        raise Wrong(
            f"it rolls or seeds the global dice ({which}): dropout and everything else "
            "that is random goes another way after each call. Make dice of your own, "
            "random.Random(seed) or torch.Generator().manual_seed(seed)"
        )
    if batches is None:
        raise Wrong("it gives None: is there a return at the end? (shuffle and sort "
                    "change a list in place and give nothing back)")
    expect(isinstance(batches, list), "it must give a list of lists, but it gives a "
           f"{type(batches).__name__}" + (": wrap it in list(…)"
                                          if hasattr(batches, "__next__") else ""))
    for batch in batches:
        expect(
            isinstance(batch, (list, tuple)),
            f"each batch must be a list of indices, but it is a {type(batch).__name__}",
        )
        expect(
            all(isinstance(i, int) and not isinstance(i, bool) for i in batch),
            "a batch must hold ints, places in lengths, but it holds "
            f"{sorted({type(i).__name__ for i in batch})}: .tolist() makes ints of a "
            "tensor or an array",
        )
    return [list(batch) for batch in batches]


def expect_parted(batches, lengths, batch_size):
    """Refuse batches in which a text is missing or stands twice."""
    count, all_ = len(lengths), [i for batch in batches for i in batch]
    if Counter(all_) != Counter(range(count)):
        places = set(all_)
        if all_ and Counter(all_) == Counter(lengths):
            raise Wrong("the batches hold lengths: places in lengths are wanted, 0 … "
                        f"{count - 1}")
        if Counter(all_) == Counter(range(1, count + 1)):
            raise Wrong("the places are counted from 1: they begin at 0")
        full = count // batch_size * batch_size
        missing = sorted(set(range(count)) - places)
        if len(all_) == full == len(places) and full < count:
            raise Wrong(
                f"the last, smaller batch is lost: {count} texts in batches of "
                f"{batch_size} leave {count - full} over, and they count as well"
            )
        twice = [i for i, n in Counter(all_).items() if n > 1]
        if twice and missing:
            raise Wrong(
                f"texts of equal length are mixed up: text {twice[0]} stands in several "
                f"batches and text {missing[0]} in none. list.index and a dict by "
                "length find one text for each length; sort the places instead"
            )
        if twice:
            raise Wrong(f"text {twice[0]} stands in more than one batch: do the slices "
                        "overlap? (step and width must both be batch_size)")
        raise Wrong(
            f"of {count} texts {len(missing)} stand in no batch, text {missing[0]} for "
            "one: each must stand in exactly one"
            if missing else "the batches hold places that lengths does not have")
    sizes = sorted(map(len, batches))
    expect(min(sizes, default=1) > 0, "one batch is empty")
    expect(
        max(sizes, default=0) <= batch_size,
        f"a batch holds {max(sizes, default=0)} texts, but batch_size is {batch_size}"
        + (": is it taken for the number of batches, or for a number of tokens?"
           if len(batches) < -(-count // batch_size) else ""),
    )
    expect(
        all(size == batch_size for size in sizes[1:]),
        f"batches have the sizes {sizes[:6]} …: one may be smaller than {batch_size}, "
        "the others must be full. Does every pool or every length get a remainder of "
        "its own?",
    )


def positions(batches, lengths):
    """What the batches cost, padding included."""
    return sum(len(b) * max(lengths[i] for i in b) for b in batches)


@bucket_battery.property("puts each text into exactly one batch")
def bucket_parted(function):
    for count, size in ((37, 4), (8, 4), (5, 8), (3, 1), (200, 3), (1, 4)):
        lengths = some_lengths(count, seed=count)
        for seed in (None, 5):
            batches = batches_of(function, lengths, size, seed=seed)
            expect_parted(batches, lengths, size)
    for seed in (None, 1):
        batches = batches_of(function, [7] * 10, 4, seed=seed)
        expect_parted(batches, [7] * 10, 4)
        tell(batches_of(function, [], 4, seed=seed), [], [
            ("no texts give one empty batch: they must give none", [[]])],
             "no texts must give no batches")


@bucket_battery.property("sorts all texts by length where no seed is given")
def bucket_sorted(function):
    for count, size in ((40, 4), (411, 5)):
        lengths = some_lengths(count, seed=1, longest=90)
        batches = batches_of(function, lengths, size)
        expect_parted(batches, lengths, size)
        again = batches_of(function, lengths, size)
        expect(
            batches == again,
            "without a seed it gives other batches each time: evaluation must not "
            "depend on chance, so shuffle only where a seed is given",
        )
        spans = [(min(lengths[i] for i in b), max(lengths[i] for i in b))
                 for b in batches]
        rising = sorted(spans)
        parted = all(a[1] <= b[0] for a, b in zip(rising, rising[1:], strict=False))
        in_order = [list(range(i, min(i + size, count))) for i in range(0, count, size)]
        expect(
            "input" not in function.manners or batches != in_order,
            "lengths itself is sorted, in place, and then nobody knows whose length "
            "stands where: sort the places 0, 1, 2, … by their length (key=)",
        )
        expect(batches != in_order, "the texts are not sorted: the batches are cut in "
               "the order in which the texts came")
        expect(
            parted,
            "without a seed all texts must be sorted by length, but a batch holds both "
            "shorter and longer texts than another one: is only each pool, or only "
            "each batch, sorted? Or are the places themselves sorted (key=)?",
        )


@bucket_battery.property("mixes with a seed, the same for the same seed")
def bucket_seeded(function):
    lengths = some_lengths(400, seed=2)
    plain = batches_of(function, lengths, 8)
    company, first = {}, batches_of(function, lengths, 8, seed=0)
    for seed in (0, 1, 2):
        batches = batches_of(function, lengths, 8, seed=seed)
        expect_parted(batches, lengths, 8)
        random.seed(seed + 77)
        np.random.seed(seed + 77)
        torch.manual_seed(seed + 77)
        expect(
            batches == batches_of(function, lengths, 8, seed=seed),
            f"with seed={seed} it gives other batches each time: is seed passed to the "
            "dice that shuffle?",
        )
        expect(
            batches != plain and sorted(map(sorted, batches)) != sorted(
                map(sorted, plain)),
            f"with seed={seed} nothing is shuffled" + (
                ", since 0 counts as False: ask `if seed is not None`" if seed == 0
                else ": the same texts meet as without a seed, so training sees the "
                     "same batches in each epoch"),
        )
        company[seed] = {frozenset(batch) for batch in batches}
        expect(
            seed == 0 or company[seed] != company[0] or batches != first,
            "every seed gives the same batches: is seed used, or a fixed number?",
        )
    expect(
        len(company[1] & company[2]) < 10 and len(company[0] & company[1]) < 10,
        "with another seed the same texts meet in a batch again: shuffle the texts "
        "before they are sorted, not only the batches after",
    )


@bucket_battery.property("sorts inside pools of 16 batches, then shuffles the batches")
def bucket_pools(function):
    size, count = 8, 8 * 16 * 8
    lengths = list(range(1, count + 1))
    random.Random(3).shuffle(lengths)
    batches = batches_of(function, lengths, size, seed=4)
    expect_parted(batches, lengths, size)
    spread = sum(
        max(lengths[i] for i in b) - min(lengths[i] for i in b) for b in batches
    ) / len(batches)
    # Texts of a sorted pool of k batches lie count / k / size apart in a batch.
    pool = count * (size - 1) / size / max(spread, 1e-9)
    expect(
        pool < 0.9 * len(batches),
        "all texts are sorted at once: then a batch is all short or all long and the "
        "same texts meet in each epoch. Shuffle, cut into pools of 16 batches, and "
        "sort inside each pool",
    )
    expect(
        pool > 1.8,
        "with a seed nothing is sorted: batches hold short and long texts side by side, "
        "and most positions are padding. Sort each pool by length",
    )
    expect(
        pool > 7,
        f"the pools are too small, about {pool:.0f} batches: 16 batches, that is "
        "16 * batch_size texts, not 16 texts",
    )
    expect(
        pool < 34, f"the pools are too large, about {pool:.0f} batches instead of 16",
    )
    longest = [max(lengths[i] for i in b) for b in batches]
    pairs = list(zip(longest, longest[1:], strict=False))
    rising = sum(b > a for a, b in pairs) / len(pairs)
    expect(
        0.3 < rising < 0.7,
        "the batches are not shuffled: their lengths climb (or fall) from batch to "
        "batch inside each pool, so training sees short texts first, then long ones. "
        "Shuffle the list of batches at the end",
    )


@bucket_battery.property("refuses a batch_size below 1")
def bucket_refuses(function):
    for size in (0, -1):
        refuses(
            function, lambda size=size: function.thing([3, 4, 5], batch_size=size),
            f"batch_size={size} must be refused by a ValueError" + (
                ": with a negative step nothing comes out, and no text is ever seen"
                if size < 0 else " that names the rule"),
            (ValueError, AssertionError),
        )


# Exercises

humps_battery = Battery(
    "make_hump_normalizer", "make_hump_normalizer() -> a tokenizers normalizer",
    chapter=2,
)


@humps_battery.property("parts a small letter from the capital after it")
def humps_part(function):
    step = the_step(function, "normalize_str", "normalizer")
    for text, wanted, causes, otherwise in (
        ("#SmallWins", "#small wins", [
            ("lower-casing comes first, and then no capital is left to be found: put "
             "the new step before make_normalizer's", "#smallwins"),
            ("nothing is put between small letter and capital", "#smallwins"),
            ("the two letters are replaced: look round the empty place, "
             "(?<=\\p{Ll})(?=\\p{Lu})", "#smal ins"),
            ("a space stands before every capital: only after a small letter",
             "# small wins"),
            ("the rest of the normaliser is missing: put the new step before "
             "make_normalizer's", "#Small Wins"),
        ], "a space must stand between small letter and capital"),
        ("HAPPY days", "happy days", [
            ("a space stands between all capitals: only after a small letter",
             "h a p p y days"),
        ], "words in capitals must stay whole"),
        ("ÜberÄrger", "über ärger", [
            ("only a to z and A to Z are known: \\p{Ll} and \\p{Lu} know all letters",
             "überärger")], "letters beyond a to z count too"),
        ("so sad 7Up", "so sad 7up", [
            ("digits count as small letters", "so sad 7 up")],
         "only a small letter counts"),
    ):
        tell(function.run(step.normalize_str, text), wanted, causes, otherwise, text)


@humps_battery.property("does all that make_normalizer does")
def humps_rest(function):
    step = the_step(function, "normalize_str", "normalizer")
    for before, after in (
        ("@Ann soooo &lt;3", "@user sooo <3"), ("don´t ❤\ufe0f", "don't ❤"),
    ):
        tell(function.run(step.normalize_str, before), after, (), "the steps of "
             "make_normalizer must follow: Sequence([the new step, make_normalizer()])",
             before)


bytes_battery = Battery(
    "train_byte_tokenizer",
    "train_byte_tokenizer(texts, *, vocab_size) -> tokenizers.Tokenizer", chapter=2,
    takes=("texts", "vocab_size"),
)


@bytes_battery.property("knows every text, and the way back")
def bytes_all(function):
    tokenizer = trained(function, vocab_size=320)
    for text in ("🦑", "日本", "so sad", "жук"):
        encoding = tokenizer.encode(text, add_special_tokens=False)
        expect(
            set(encoding.tokens) - {"Ġ"} and "[UNK]" not in encoding.tokens,
            f"{text!r} is lost or unknown: the alphabet must hold all 256 bytes, seen "
            "or not: initial_alphabet=pre_tokenizers.ByteLevel.alphabet()",
        )
    squid = tokenizer.encode("🦑", add_special_tokens=False)
    size = len([t for t in squid.tokens if t != "Ġ"])
    expect(
        1 < size <= 4 and all(len(t) <= 4 for t in squid.tokens) and
        "🦑" not in squid.tokens,
        "an emoji that training never saw must fall into its bytes: use "
        f"pre_tokenizers.ByteLevel. Its tokens are {squid.tokens}",
    )


@bytes_battery.property("has vocab_size tokens, learned from the texts")
def bytes_size(function):
    for size in (280, 320):
        got = trained(function, vocab_size=size).get_vocab_size()
        tell(got, size, [
            ("there are only the 256 bytes: no merge is learned", 256),
            ("vocab_size is not passed to the trainer", max(got, size + 1)),
        ], "the vocabulary has another size than vocab_size")
    tokenizer = trained(function, vocab_size=400)
    word = Counter(w for t in TRAINING for w in t.split()).most_common(1)[0][0]
    count = len(tokenizer.encode(word, add_special_tokens=False).ids)
    expect(count <= 2, f"the commonest word, {word!r}, takes {count} tokens: are the "
           "merges learned from the texts?")


@bytes_battery.property("keeps our normaliser")
def bytes_normal(function):
    tokenizer = trained(function, vocab_size=320)
    for one, other in (("SO sad", "so sad"), ("soooooo", "sooo"), ("&lt;3", "<3")):
        expect(
            tokenizer.encode(one).ids == tokenizer.encode(other).ids,
            f"{one!r} and {other!r} must give the same ids: set tokenizer.normalizer = "
            "make_normalizer() before training",
        )


pools_battery = Battery(
    "bucket_in_pools",
    "bucket_in_pools(lengths, batch_size, pool, seed=0) -> lists of indices",
    chapter=2, takes=("lengths", "batch_size", "pool", "seed"),
)


@pools_battery.property("puts each text into exactly one batch")
def pools_parted(function):
    for count, size, pool in ((37, 4, 3), (64, 8, 1), (30, 8, 16), (5, 8, 2)):
        lengths = some_lengths(count, seed=count)
        batches = function(list(lengths), size, pool)
        tell(isinstance(batches, list), True, (), "it must give a list of lists")
        expect_parted([list(b) for b in batches], lengths, size)


@pools_battery.property("sorts inside pools of that many batches")
def pools_spread(function):
    size, count = 4, 4 * 64
    lengths = list(range(1, count + 1))
    random.Random(3).shuffle(lengths)

    def spread(pool):
        batches = function(list(lengths), size, pool)
        return sum(max(lengths[i] for i in b) - min(lengths[i] for i in b)
                   for b in batches) / len(batches)

    found = {pool: spread(pool) for pool in (1, 2, 8, 64)}
    one = count * (size - 1) / (size + 1)  # random batches
    expect(
        abs(found[1] - one) < 0.15 * one,
        "a pool of one batch must be a random batch: its texts lie "
        f"{found[1]:.0f} lengths apart where {one:.0f} are to be expected. Is pool "
        "counted in batches, and is the list shuffled before?",
    )
    expect(
        abs(found[64] - (size - 1)) < 0.5,
        "one pool of all 64 batches must be fully sorted, but the texts of a batch lie "
        f"{found[64]:.1f} lengths apart: pool counts batches, so a pool holds "
        "pool * batch_size texts",
    )
    for pool in (2, 8):
        wanted = count * (size - 1) / (pool * size + 1)
        expect(
            0.75 < found[pool] / wanted < 1.35,
            f"with pools of {pool} batches the texts of a batch lie "
            f"{found[pool]:.1f} lengths apart, but it should be about {wanted:.1f}: a "
            "pool must hold pool * batch_size texts, sorted inside",
        )


@pools_battery.property("follows the seed")
def pools_seed(function):
    lengths = some_lengths(80)
    one, same_, other = (function(list(lengths), 4, 4, seed=s) for s in (1, 1, 2))
    expect(one == same_, "the same seed gives other batches: random.Random(seed)")
    expect(one != other, "every seed gives the same batches: is seed used?")


greedy_battery = Battery(
    "cut_greedily", "cut_greedily(word, vocab) -> a list of pieces", chapter=2,
    takes=("word", "vocab"),
)
PIECES = {"un", "u", "##n", "unhappy", "##happ", "##happy", "##i", "##est", "##iest",
          "h", "happy", "##h", "##a", "##p", "##y", "happ", "s", "##s", "##e", "##t",
          "est", "iest", "a", "b", "ab", "##bc"}


def cut_by(word, vocab, *, longest=True, unknown="[UNK]", mark="##"):
    """Greedy cutting, right or with one mistake."""
    pieces, start = [], 0
    while start < len(word):
        ends = range(len(word), start, -1) if longest else range(start + 1, len(word) + 1)
        for end in ends:
            piece = (mark if start else "") + word[start:end]
            if piece in vocab:
                pieces.append(piece)
                start = end
                break
        else:
            if unknown == "whole":
                return ["[UNK]"]
            if unknown == "stop":
                return [*pieces, "[UNK]"]
            if unknown == "skip":
                start += 1
                continue
            pieces.append("[UNK]")
            start += 1
    return pieces


@greedy_battery.property("takes the longest piece first, from the left")
def greedy_right(function):
    for word in ("happy", "unhappy", "unhappiest", "happiest", "sappy", "h"):
        wanted = cut_by(word, PIECES, unknown="whole")
        tell(function(word, set(PIECES)), wanted, [
            ("the shortest piece is taken first: try the longest first",
             cut_by(word, PIECES, longest=False, unknown="whole")),
            ("pieces inside a word are looked up without ##: after the first, put ## "
             "before them", cut_by(word, PIECES, mark="", unknown="whole")),
            ("pieces inside a word are found, but given back without ##",
             [p.removeprefix("##") for p in wanted]),
            ("the word is cut from its end", wanted[::-1]),
            ("it gives one string: a list of pieces is wanted", " ".join(wanted)),
            ("only the first piece is given: go on with the rest of the word",
             wanted[:1]),
            ("a word that is no piece itself is [UNK]: cut it", ["[UNK]"]),
        ], "the longest piece of the vocabulary that fits must be taken, again and "
           "again, with ## before all but the first", word)


@greedy_battery.property("makes a word with an unknown rest one [UNK]")
def greedy_unknown(function):
    for word in ("unhappyq", "qun", "abc", "xyz"):
        tell(function(word, set(PIECES)), cut_by(word, PIECES, unknown="whole"), [
            ("only the unknown character becomes [UNK]: with WordPiece the whole word "
             "does", cut_by(word, PIECES)),
            ("only the unknown rest becomes [UNK]: with WordPiece the whole word does",
             cut_by(word, PIECES, unknown="stop")),
            ("unknown characters are skipped: with WordPiece the whole word is [UNK]",
             cut_by(word, PIECES, unknown="skip")),
            ("it goes back and tries a shorter piece: greedy means that what is taken "
             "stays taken", ["a", "##bc"]),
            ("an unknown word gives an empty list: it must be ['[UNK]']", []),
        ], "a word whose rest no piece fits must be ['[UNK]']", word)


fast_battery = Battery(
    "learn_merges_fast", "learn_merges_fast(counts, num_merges) -> a list of pairs",
    chapter=2, takes=("counts", "num_merges"),
)
DIARY = {"happy": 7, "happier": 2, "sad": 4, "sadder": 2, "mad": 2, "nap": 1, "sappy": 1}


def slow_merges(counts, num_merges, tie=None):
    """The chapter's way: count every pair again after each merge."""
    words = [(characters(word), count) for word, count in counts.items()]
    alphabet = sorted({piece for pieces, _ in words for piece in pieces},
                      key=lambda p: (not p.startswith("##"), p))
    number = {piece: i for i, piece in enumerate(alphabet)}
    merges = []
    for _ in range(num_merges):
        pairs = Counter()
        for pieces, count in words:
            for pair in zip(pieces, pieces[1:], strict=False):
                pairs[pair] += count if tie != "words" else 1
        if not pairs:
            break
        if tie == "first":
            best = pairs.most_common(1)[0][0]
        elif tie == "alphabet":
            best = min(pairs, key=lambda p: (-pairs[p], p))
        elif tie == "last":
            best = max(pairs, key=lambda p: (pairs[p], number[p[0]], number[p[1]]))
        else:
            best = min(pairs, key=lambda p: (-pairs[p], number[p[0]], number[p[1]]))
        merges.append(best)
        number.setdefault(best[0] + best[1].removeprefix("##"), len(number))
        words = [(glue(pieces, best), count) for pieces, count in words]
    return merges


def parted(merges):
    """Merges as a list of pairs of strings."""
    if merges is None:
        raise Wrong("it gives None: is there a return at the end?")
    return [tuple(pair) for pair in merges]


@fast_battery.property("learns the merges of the slow loop")
def fast_same(function):
    counts = Counter(word for text in some_texts(20, 3) for word in text.split())
    for name, words, number in (
        ("the diary", DIARY, 12), ("made-up words", counts, 40),
        ("words with doubled letters", {"aaaa": 3, "aaa": 2, "baaab": 2, "abab": 4}, 5),
    ):
        wanted = slow_merges(words, number)
        tell(parted(function(dict(words), number)), wanted, [
            ("a tie goes to the pair that was seen first: the rule is lower numbers "
             "first (continuing characters, then beginnings, then new pieces as they "
             "are made)", partial(slow_merges, words, number, "first")),
            ("a tie goes by alphabet: the rule is lower numbers first (continuing "
             "characters, then beginnings, then new pieces as they are made)",
             partial(slow_merges, words, number, "alphabet")),
            ("a tie goes to the higher numbers", partial(slow_merges, words, number, "last")),
            ("each word counts once, however often it occurs: a pair counts as often "
             "as its words do", partial(slow_merges, words, number, "words")),
            ("one merge too many", partial(slow_merges, words, number + 1)),
            ("one merge is missing", wanted[:-1]),
            ("these are the new pieces: the pairs are wanted",
             [a + b.removeprefix("##") for a, b in wanted]),
        ], f"on {name} it learns other merges than the chapter's loop. When a pair is "
           "merged in a word, take all the word's old pairs off the counts, and add all "
           "its new ones: counting only the neighbours goes wrong where a letter is "
           "doubled")


@fast_battery.property("stops where no pair is left")
def fast_end(function):
    try:
        merges = parted(function({"ab": 2, "c": 1}, 5))
    except Broke as broke:
        raise Wrong(
            f"after the last possible merge it must stop and give what it has. It {broke}"
        ) from None
    tell(merges, [("a", "##b")], (), "one merge is possible in 'ab' and 'c'")


@fast_battery.property("is far faster than counting all again")
def fast_time(function):
    chance = random.Random(0)
    counts = {
        "".join(chance.choices("abcdefgh", k=chance.randint(6, 12))):
        chance.randint(1, 50) for _ in range(900)
    }
    start = time.process_time()
    wanted = slow_merges(counts, 40)
    limit = 0.6 * (time.process_time() - start)
    hint = (
        "40 merges of 900 words take about as long as counting all pairs again after "
        "each: keep the counts of all pairs, note for each pair which words hold it, "
        "and after a merge touch only those words"
    )
    start = time.process_time()
    try:
        merges = parted(function(dict(counts), 40))
    except TimeUp:
        raise Wrong(hint) from None
    took = time.process_time() - start
    expect(merges == wanted, "on 900 words it learns other merges than the slow loop")
    expect(took < limit, hint)
