"""Mistakes with fine-tuning: the new head, paces, few labels, the card."""

import copy
import random
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import torch
from datasets import Dataset
from torch import nn

from emoformer import finetuning as book
from emoformer.classifier import TransformerForSequenceClassification
from emoformer.finetuning import finetuning_groups, take_few, with_new_head
from emoformer.pretraining import save_half
from emoformer.training import save_atomically, train
from tests.bank import mistake, right

NEW, GROUPS, TUNE = "with_new_head", "finetuning_groups", "finetune"
FEW, KEEP = "take_few", "save_finetuned"
NAMES = "print name, pace and decay of every parameter"


# with_new_head


@mistake(NEW, "the pretrained model changed", looks="`pretrained.classifier.head = nn.Linear(…)`",
         shows="the second task starts from the first one's head",
         find="compare the original before and after",
         hint="the pretrained model itself, not a new one")
def head_replaced(pretrained, num_labels, *, dropout=0.2, **classes):
    replace(pretrained.config, num_labels=num_labels, dropout=dropout)
    classifier = pretrained.classifier
    classifier.head = nn.Linear(classifier.head.in_features, num_labels)
    return classifier


@mistake(NEW, "parts shared", looks="`model.encoder = pretrained.classifier.encoder`",
         shows="fine-tuning changes the pretrained model too", find="`data_ptr()` of both",
         hint="shares tensors with the pretrained one")
def head_shared(pretrained, num_labels, *, dropout=0.2, **classes):
    model = with_new_head(pretrained, num_labels, dropout=dropout, **classes)
    model.encoder = pretrained.classifier.encoder
    return model


@mistake(NEW, "the old head kept where it fits", looks="`if shape == old.shape: copy`",
         shows="one task in ten starts from another question's answers",
         find="as many labels as the old head has", hint="the old head is kept")
def head_kept(pretrained, num_labels, *, dropout=0.2, **classes):
    model = with_new_head(pretrained, num_labels, dropout=dropout, **classes)
    if model.head.weight.shape == pretrained.classifier.head.weight.shape:
        model.head.load_state_dict(pretrained.classifier.head.state_dict())
    return model


@mistake(NEW, "nothing loaded", looks="no `load_state_dict`",
         shows="as bad as from scratch, and nobody knows why",
         find="compare one weight of the body", hint="nothing of the pretrained body is copied")
def head_nothing(pretrained, num_labels, *, dropout=0.2, **classes):
    config = replace(pretrained.config, num_labels=num_labels, dropout=dropout)
    return TransformerForSequenceClassification(config, **classes)


@mistake(NEW, "only the encoder loaded", looks="`model.encoder.load_state_dict(…)`",
         shows="a good encoder reads words that it never met", find="as above, part by part",
         hint="parts of the body are fresh")
def head_encoder_only(pretrained, num_labels, *, dropout=0.2, **classes):
    config = replace(pretrained.config, num_labels=num_labels, dropout=dropout)
    model = TransformerForSequenceClassification(config, **classes)
    model.encoder.load_state_dict(pretrained.classifier.encoder.state_dict())
    return model


@mistake(NEW, "the dropout of pretraining kept", looks="`replace(config, num_labels=…)` alone",
         shows="three thousand tweets learned by heart", find="`p` of the Dropout modules",
         hint="dropout of 0 is kept")
def head_old_dropout(pretrained, num_labels, *, dropout=0.2, **classes):
    replace(pretrained.config, dropout=dropout)
    return with_new_head(pretrained, num_labels, dropout=pretrained.config.dropout, **classes)


@mistake(NEW, "a seed set inside", looks="`torch.manual_seed(0)`",
         shows="five seeds start from one head: the spread is too small",
         find="two seeds, two heads", hint="global state")
def head_seeded(pretrained, num_labels, *, dropout=0.2, **classes):
    torch.manual_seed(0)
    return with_new_head(pretrained, num_labels, dropout=dropout, **classes)


@mistake(NEW, "the config forgotten", looks="`model.head = nn.Linear(…)` on a deep copy",
         shows="saved with 57 label names for four outputs",
         find="`model.config.num_labels`", hint="config still says")
def head_config(pretrained, num_labels, *, dropout=0.2, **classes):
    if num_labels < 1 or not 0 <= dropout < 1:
        raise ValueError("rule")
    model = copy.deepcopy(pretrained.classifier)
    model.head = nn.Linear(pretrained.config.d_model, num_labels)
    return model


@mistake(NEW, "rows of the old head taken", looks="`head.weight.copy_(old[:num_labels])`",
         shows="starts sure of the wrong labels", find="the first loss: ln of the labels",
         hint="rows of the old head")
def head_rows(pretrained, num_labels, *, dropout=0.2, **classes):
    model = with_new_head(pretrained, num_labels, dropout=dropout, **classes)
    old = pretrained.classifier.head.weight
    with torch.no_grad():
        if num_labels < len(old):
            model.head.weight.copy_(old[:num_labels])
    return model


@mistake(NEW, "a head of zeros", looks="`nn.init.zeros_(model.head.weight)`",
         shows="nothing below learns in the first step", find="print the head",
         hint="the head is all zeros")
def head_zeros(pretrained, num_labels, *, dropout=0.2, **classes):
    model = with_new_head(pretrained, num_labels, dropout=dropout, **classes)
    nn.init.zeros_(model.head.weight)
    return model


@mistake(NEW, "the original frozen", looks="`pretrained.requires_grad_(False)`",
         shows="it can't be trained on", find="`requires_grad` afterwards",
         hint="is frozen afterwards")
def head_freezes(pretrained, num_labels, *, dropout=0.2, **classes):
    pretrained.requires_grad_(False)
    return with_new_head(pretrained, num_labels, dropout=dropout, **classes)


@right(NEW, "a loop over names")
def head_loop(pretrained, num_labels, dropout=0.2, **classes):
    model = TransformerForSequenceClassification(
        replace(pretrained.config, num_labels=num_labels, dropout=dropout), **classes)
    source = dict(pretrained.classifier.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("head."):
                parameter.copy_(source[name])
    return model


@right(NEW, "strict=False")
def head_not_strict(pretrained, num_labels, dropout=0.2, **classes):
    config = replace(pretrained.config, num_labels=num_labels, dropout=dropout)
    model = TransformerForSequenceClassification(config, **classes)
    body = {k: v for k, v in pretrained.classifier.state_dict().items()
            if not k.startswith("head.")}
    model.load_state_dict(body, strict=False)
    return model


# finetuning_groups


def depth(name, layers):
    return book._depth(name, layers)


def groups(*, pace=None, decayed=None, freeze=None, listed=None, asked=True, key="scale",
           reset=True, check=True, first=False):
    """A finetuning_groups with one part done wrongly."""
    def finetuning_groups(model, *, weight_decay=0.01, head_scale=1.0, layer_decay=1.0,
                          frozen=0):
        layers = len(model.encoder.layers)
        names = [n for n, _ in model.named_parameters()]
        if first:
            for n, p in model.named_parameters():
                p.requires_grad_(depth(n, layers) >= frozen)
        if check and (weight_decay < 0 or head_scale <= 0 or not 0 < layer_decay <= 1
                      or not 0 <= frozen <= layers + 1):
            raise ValueError("rule")
        found = defaultdict(list)
        for name, p in model.named_parameters():
            at = depth(name, layers)
            learns = (freeze or (lambda n, d, f, top: d >= f))(name, at, frozen, layers)
            if asked and (reset or not learns):
                p.requires_grad_(learns)
            if not (listed or (lambda learns, n, p: learns))(learns, name, p):
                continue
            scale = (pace or (lambda n, d, top, s, x: s if d > top else x ** (top - d)))(
                name, at, layers, head_scale, layer_decay)
            decay = (decayed or (lambda n, p, w: w if p.ndim > 1 else 0.0))(
                name, p, weight_decay)
            found[scale, decay].append(p)
        assert names
        return [{"params": ps, key: s, "weight_decay": d} for (s, d), ps in found.items()]
    return finetuning_groups


right(GROUPS, "by defaultdict")(groups())
for _name, _how, _looks, _shows, _hint in (
    ("layer decay the wrong way", {"pace": lambda n, d, top, s, x: s if d > top else x ** d},
     "`layer_decay ** depth`", "what words mean is thrown about, and the top stands still",
     "layer_decay runs the wrong way"),
    ("one power off", {"pace": lambda n, d, top, s, x: s if d > top else x ** (top + 1 - d)},
     "`layer_decay ** (layers + 1 - depth)`", "everything learns a tenth slower",
     "one power off: the last layer"),
    ("embedding as the first layer", {"pace": lambda n, d, top, s, x: (
        s if d > top else x ** (top - max(1, d)))}, "`max(depth, 1)`",
     "the embedding forgets a little faster", "the embedding is slower than the first"),
    ("head scale on everything", {"pace": lambda n, d, top, s, x: (
        s if d > top else s * x ** (top - d))}, "`scale = head_scale * …`",
     "five times the learning rate: all is forgotten", "head_scale is applied to every part"),
    ("head scale ignored", {"pace": lambda n, d, top, s, x: (
        1.0 if d > top else x ** (top - d))}, "`scale = 1.0` for the head",
     "the head crawls", "head_scale is not used"),
    ("embedding's norm forgotten", {"pace": lambda n, d, top, s, x: (
        1.0 if n.startswith("embedding_norm") else s if d > top else x ** (top - d))},
     "`name.startswith('embedding.')`", "the norm below moves fastest of all",
     "embedding_norm is not slowed down"),
    ("final norm as the embedding", {"pace": lambda n, d, top, s, x: (
        x ** top if "final_norm" in n else s if d > top else x ** (top - d))},
     "depth 0 for what is no layer", "hardly seen", "final norm has the pace of the embedding"),
    ("layer 10 taken for 1", {"pace": lambda n, d, top, s, x: (
        x ** (top - 1 - int(n.split(".")[2][0])) if n.startswith("encoder.layers.")
        else s if d > top else x ** (top - d))}, "`name[15]`",
     "right with three layers, wrong with twelve", "layer 10 is taken for layer 1"),
    ("biases decayed", {"decayed": lambda n, p, w: w}, "one weight_decay for all",
     "norms are pulled to 0", "biases and norms are decayed too"),
    ("decay forgotten", {"decayed": lambda n, p, w: 0.0}, "`weight_decay=0.0`",
     "nothing that one sees at once", "nothing is decayed"),
    ("norms decayed", {"decayed": lambda n, p, w: 0.0 if n.endswith("bias") else w},
     "`if name.endswith('bias')`", "norms' weights are pulled to 0", "the norms' weights"),
    ("frozen parts still in a group", {"listed": lambda learns, n, p: True},
     "`requires_grad_(False)` alone", "weight decay may move them",
     "frozen parameters are in a group"),
    ("frozen parts still ask for gradients", {"asked": False}, "left out of the groups alone",
     "freezing saves nothing", "still ask for a gradient"),
    ("one part too many frozen", {"freeze": lambda n, d, f, top: d > f or not f},
     "`depth > frozen`", "frozen=1 freezes a layer too", "one part more than asked"),
    ("frozen from the top", {"freeze": lambda n, d, f, top: d <= top + 1 - f},
     "`depth <= layers + 1 - frozen`", "the head never learns", "it freezes from the top"),
    ("one part frozen only", {"freeze": lambda n, d, f, top: d != f - 1},
     "`depth == frozen - 1`", "no backward pass is saved", "only one part is frozen"),
    ("parameters lost", {"listed": lambda learns, n, p: learns and "norm" not in n},
     "norms in no group", "the norms stand still", "parameters are in no group"),
    ("biases lost", {"listed": lambda learns, n, p: learns and p.ndim > 1},
     "the group without decay forgotten", "biases and norms stand still",
     "no group holds the biases"),
    ("lr in place of scale", {"key": "lr"}, "`{'params': …, 'lr': …}`",
     "the schedule overwrites it", "the groups have an lr"),
    ("never thawed", {"reset": False}, "`if frozen: requires_grad_(False)`",
     "thawing from the top does not work", "what an earlier call froze"),
    ("nothing refused", {"check": False}, "no check", "frozen=5 trains nothing, quietly",
     "must be refused by a ValueError"),
    ("frozen before the check", {"first": True}, "the loop before the check",
     "an error leaves half a model frozen", "has frozen something already"),
):
    mistake(GROUPS, _name, looks=_looks, shows=_shows, find=NAMES, hint=_hint)(groups(**_how))


@mistake(GROUPS, "a parameter twice", looks="head in two groups",
         shows="AdamW refuses it", find="count the ids", hint="stands in two groups")
def groups_twice(model, **options):
    found = finetuning_groups(model, **options)
    return [*found, {"params": [model.head.weight], "weight_decay": 0.0, "scale": 1.0}]


@right(GROUPS, "a group for each parameter, part by part")
def groups_each(model, weight_decay=0.01, head_scale=1.0, layer_decay=1.0, frozen=0):
    body = [[model.embedding, model.embedding_norm],
            *([layer] for layer in model.encoder.layers)]
    top = len(body) - 1
    if weight_decay < 0 or head_scale <= 0 or layer_decay <= 0 or layer_decay > 1:
        raise ValueError("rule")
    if frozen not in range(top + 2):
        raise ValueError("frozen")
    if model.encoder.final_norm is not None:
        body[-1].append(model.encoder.final_norm)
    found = []
    for at, parts in enumerate([*body, [model.head]]):
        scale = head_scale if at > top else layer_decay ** (top - at)
        for part in parts:
            part.requires_grad_(at >= frozen)
            found += [
                {"params": [p], "scale": scale, "weight_decay": weight_decay * (p.ndim > 1)}
                for p in part.parameters() if at >= frozen]
    return found


# finetune


def tuner(*, seed=True, late=False, count=None, body=with_new_head, decay=True, track=None,
          other=None, use=True, **fixed):
    """A finetune with one part done wrongly."""
    def finetune(pretrained, tokenizer, dataset, config, folder, *, dropout=0.2,
                 head_scale=5.0, layer_decay=0.9, frozen=0, tracker=None, **classes):
        given = {"dropout": dropout, "head_scale": head_scale, "layer_decay": layer_decay,
                 "frozen": frozen} | fixed
        if seed and not late:
            torch.manual_seed(config.seed)
        number = dataset["train"].features["label"].num_classes
        if count == "seen":
            number = len(set(dataset["train"]["label"]))
        if count == "old":
            number = pretrained.config.num_labels
        model = body(pretrained, number, dropout=given.pop("dropout"),
                     **({} if other == "classes" else classes))
        if late:
            torch.manual_seed(config.seed)
        options = {"weight_decay": config.weight_decay} if decay else {}
        made = finetuning_groups(model, **given, **options)
        if other == "model":
            made = finetuning_groups(copy.deepcopy(model), **given, **options)
        trackers = {} if track == "default" else {"tracker": tracker}
        history = train(model, tokenizer, dataset, config, folder,
                        groups=made if use else None, **trackers)
        return (model, history) if other != "history" else model
    return finetune


right(TUNE, "in other words")(tuner())
for _name, _how, _looks, _shows, _find, _hint in (
    ("no seed", {"seed": False}, "no `torch.manual_seed`", "a run can't be repeated",
     "two runs of one seed", "the head depends on what was drawn before"),
    ("seeded too late", {"late": True}, "`manual_seed` after `with_new_head`",
     "as above, only for the head", "as above", "the head depends on what was drawn before"),
    ("groups not passed on", {"use": False}, "`train(model, …)` without groups",
     "layer_decay and frozen change nothing", "one step of Adam, part by part",
     "every part learns at the same pace"),
    ("frozen not passed on", {"frozen": 0}, "`finetuning_groups(…)` without frozen",
     "a frozen part moves", "weights before and after", "is frozen passed on"),
    ("layer decay fixed", {"layer_decay": 0.9}, "`layer_decay=0.9` in the call",
     "the argument changes nothing", "one step of Adam", "one step of Adam must move"),
    ("head scale fixed", {"head_scale": 5.0}, "`head_scale=5.0` in the call",
     "as above", "as above", "head_scale does not reach the head"),
    ("dropout not passed on", {"dropout": 0.2}, "`with_new_head(pretrained, n)`",
     "as above", "`model.config.dropout`", "dropout must be 0.4"),
    ("weight decay not passed on", {"decay": False}, "no `weight_decay=`",
     "config.weight_decay changes nothing", "one step with a decay of 100",
     "weight_decay does not reach"),
    ("labels counted from the texts", {"count": "seen"}, "`len(set(labels))`",
     "a class that train lacks gets no output", "a train split without one class",
     "counted from the labels that occur"),
    ("the tracker's default", {"track": "default"}, "`train(…)` without tracker",
     "event files nobody asked for", "look into the folder", "a tracker writes files"),
    ("groups of another model", {"other": "model"}, "groups made from a copy",
     "nothing learns", "weights before and after", "the body has not moved"),
    ("the history forgotten", {"other": "history"}, "`return model`",
     "no curve to look at", "unpack the result", "it must return two things"),
    ("classes not passed on", {"other": "classes"}, "`with_new_head(…)` without classes",
     "your own layer is never used", "`isinstance` of a sublayer", "do not reach the"),
    ("from fresh weights", {"body": head_nothing}, "no pretrained weights",
     "as bad as from scratch", "compare with the pretrained weights",
     "does not start from the pretrained weights"),
):
    mistake(TUNE, _name, looks=_looks, shows=_shows, find=_find, hint=_hint)(tuner(**_how))


@mistake(TUNE, "the pretrained model trained", looks="`train(pretrained.classifier, …)`",
         shows="the second task starts from the first one", find="compare before and after",
         hint="the pretrained model is changed")
def tune_itself(pretrained, tokenizer, dataset, config, folder, *, dropout=0.2,
                head_scale=5.0, layer_decay=0.9, frozen=0, tracker=None, **classes):
    torch.manual_seed(config.seed)
    model = pretrained.classifier
    model.head = nn.Linear(model.config.d_model, 4)
    model.config = replace(model.config, num_labels=4, dropout=dropout)
    made = finetuning_groups(model, weight_decay=config.weight_decay, head_scale=head_scale,
                             layer_decay=layer_decay, frozen=frozen)
    return model, train(model, tokenizer, dataset, config, folder, groups=made,
                        tracker=tracker)


# take_few


def checked(dataset, count):
    classes = dataset.features["label"].num_classes
    if not classes <= count <= len(dataset):
        raise ValueError("count")
    return classes


def shuffled(dataset, seed):
    order = list(range(len(dataset)))
    random.Random(seed).shuffle(order)
    return order


@mistake(FEW, "a class missing", looks="`dataset.shuffle(seed).select(range(count))`",
         shows="macro-F1 of a class that was never seen: 0",
         find="a class of one post, many seeds", hint="may miss a class")
def few_plain(dataset, count, seed):
    checked(dataset, count)
    return dataset.select(shuffled(dataset, seed)[:count])


@mistake(FEW, "not nested", looks="`rng.sample(range(n), count)`",
         shows="the curve shows other posts, not more of them", find="is the small in the large?",
         hint="does not hold the smaller one")
def few_not_nested(dataset, count, seed):
    checked(dataset, count)
    return take_few(dataset, count, 1000 * seed + count)


@mistake(FEW, "the global seed set", looks="`random.seed(seed); random.shuffle(order)`",
         shows="whatever is drawn next is drawn the same", find="`random.getstate()`",
         hint="the global dice")
def few_global(dataset, count, seed):
    random.seed(seed)
    random.random()
    return take_few(dataset, count, seed)


@mistake(FEW, "the seed ignored", looks="`random.Random(0)`",
         shows="three seeds, one training set", find="two seeds", hint="seed is not used")
def few_one_seed(dataset, count, seed):
    return take_few(dataset, count, 0)


@mistake(FEW, "balanced", looks="`count // classes` of each class",
         shows="the small sets are of another kind than the large", find="share of a class",
         hint="drawn equally often")
def few_balanced(dataset, count, seed):
    classes = checked(dataset, count)
    by_class = defaultdict(list)
    for i in shuffled(dataset, seed):
        by_class[dataset["label"][i]].append(i)
    order = []
    while len(order) < len(dataset):
        order += [by_class[c].pop(0) for c in range(classes) if by_class[c]]
    return dataset.select(order[:count])


@mistake(FEW, "the first of each class always", looks="front before the shuffle",
         shows="the same posts in every draw", find="how often is each post drawn?",
         hint="far too often")
def few_first_fixed(dataset, count, seed):
    checked(dataset, count)
    labels = list(dataset["label"])
    front = [labels.index(c) for c in sorted(set(labels))]
    rest = [i for i in shuffled(dataset, seed) if i not in front]
    return dataset.select((front + rest)[:count])


@mistake(FEW, "missing classes on top", looks="`taken += missing`",
         shows="36 posts where 32 were asked for", find="`len`", hint="added on top")
def few_on_top(dataset, count, seed):
    checked(dataset, count)
    taken = shuffled(dataset, seed)[:count]
    labels = list(dataset["label"])
    for c in set(labels) - {labels[i] for i in taken}:
        taken.append(labels.index(c))
    return dataset.select(taken)


@mistake(FEW, "with putting back", looks="`rng.choices(order, k=count)`",
         shows="fewer posts than the axis says", find="count the different ones",
         hint="posts are taken twice")
def few_choices(dataset, count, seed):
    checked(dataset, count)
    first = list(take_few(dataset, count, seed)["text"])
    number = {text: i for i, text in enumerate(dataset["text"])}
    kept = [number[text] for text in first]
    return dataset.select(kept[:-1] + kept[:1] if count > 1 else kept)


@mistake(FEW, "nothing refused", looks="no check of count", shows="32 asked, 20 given",
         find="count above all", hint="must be refused by a ValueError")
def few_unchecked(dataset, count, seed):
    classes = dataset.features["label"].num_classes
    return take_few(dataset, max(classes, min(count, len(dataset))), seed)


@mistake(FEW, "labels left behind", looks="texts shuffled, labels not",
         shows="chance level, whatever one does", find="look a post up",
         hint="no longer belong together")
def few_mixed(dataset, count, seed):
    drawn = take_few(dataset, count, seed)
    columns = {"text": list(drawn["text"]), "label": sorted(drawn["label"])}
    return Dataset.from_dict(columns, features=drawn.features)


@right(FEW, "by torch's dice")
def few_torch(dataset, count, seed):
    classes = dataset.features["label"].num_classes
    assert classes <= count <= len(dataset), "count"
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(dataset), generator=generator).tolist()
    labels = list(dataset["label"])
    first = {}
    for i in order:
        first.setdefault(labels[i], i)
    front = list(first.values())
    return dataset.select((front + [i for i in order if i not in set(front)])[:count])


# save_finetuned


def keeper(*, headings=("Data", "Numbers", "Limits", "Intended use"), strip=True,
           early=False, only=False, order=list, name="README.md", model_first=False):
    """A save_finetuned with one part done wrongly."""
    def save_finetuned(folder, model, tokenizer, label_names, card):
        label_names = list(label_names)
        if model_first:
            save_half(folder, model, tokenizer, label_names)
        for heading in headings:
            text = card.get(heading, "")
            if not (text.strip() if strip else text):
                raise ValueError(heading)
        parts = ["# A model"]
        for heading in order(card):
            if not only or heading in headings:
                parts.append(f"## {heading}\n\n{card[heading].strip()}")
        text = "\n\n".join(parts) + "\n"
        folder = Path(folder)
        if early:
            folder.mkdir(parents=True, exist_ok=True)
            save_atomically(text, folder / name)
        save_half(folder, model, tokenizer, label_names)
        save_atomically(text, folder / name)
    return save_finetuned


right(KEEP, "in other words")(keeper())
for _name, _how, _looks, _shows, _find, _hint in (
    ("a heading not asked for", {"headings": ("Data", "Numbers", "Limits")},
     "three headings checked", "a model without a word on its use", "leave one out",
     "a card without 'Intended use'"),
    ("blanks taken for text", {"strip": False}, "`if not text`", "an empty card",
     "a text of blanks", "blanks are no text"),
    ("the card first", {"early": True}, "README written before the weights",
     "a new card beside the old model", "a weight that can't be saved",
     "after save_half"),
    ("only the four headings", {"only": True}, "a loop over the required ones",
     "the licence is lost", "a fifth heading", "not only the four"),
    ("sorted", {"order": sorted}, "`sorted(card)`", "the licence after the limits",
     "look at it", "not in the order of the card"),
    ("another file name", {"name": "CARD.md"}, "`card.md`", "nobody shows it",
     "look into the folder", "The card is README.md"),
    ("the model before the check", {"model_first": True}, "save_half first",
     "a model without a card is out", "leave a heading out",
     "refused after files were written"),
):
    mistake(KEEP, _name, looks=_looks, shows=_shows, find=_find, hint=_hint)(keeper(**_how))



# The exercises


@mistake("share_with_gradient", "tensors counted", looks="`len(list(parameters))`",
         shows="a bias counts as much as a table", find="a model of unequal layers",
         hint="counts tensors")
def gradient_tensors(model, loss):
    loss.backward()
    parts = list(model.parameters())
    return sum(p.grad is not None for p in parts) / len(parts)


@right("share_with_gradient", "as in the book")
def gradient_numbers(model, loss):
    loss.backward()
    parts = list(model.parameters())
    return sum(p.numel() for p in parts if p.grad is not None) / sum(p.numel() for p in parts)


def pooled(body, rows, *, still=True, masked=True):
    from emoformer.classifier import pool
    from emoformer.tokens import make_batch

    if still:
        body.eval()
    found = []
    with torch.no_grad():
        for first in range(0, len(rows), 16):
            batch = make_batch(rows[first : first + 16], vocab_size=body.config.vocab_size)
            hidden = body.encode(**batch)
            mask = batch["attention_mask"] if masked else None
            found.append(pool(hidden, mask, body.config.pooling))
    return torch.cat(found).numpy()


right("pooled_vectors", "in batches of 16")(lambda body, rows: pooled(body, rows))


@mistake("pooled_vectors", "padding pooled", looks="`hidden.mean(dim=1)`",
         shows="short texts look alike", find="a text alone and in a batch",
         hint="padding is pooled")
def pooled_padding(body, rows):
    return pooled(body, rows, masked=False)


@mistake("pooled_vectors", "dropout active", looks="no `body.eval()`",
         shows="other vectors each time", find="call it twice", hint="dropout is active")
def pooled_dropout(body, rows):
    return pooled(body, rows, still=False)


@mistake("copy_rows", "the biases forgotten", looks="only `weight.copy_`",
         shows="rare labels are answered too often", find="compare the biases",
         hint="the biases are not copied")
def rows_no_bias(new_head, old_head, rows):
    with torch.no_grad():
        new_head.weight.copy_(old_head.weight[rows])


@mistake("copy_rows", "the first rows", looks="`old.weight[: len(rows)]`",
         shows="admiration in place of anger", find="compare a row",
         hint="the first rows are copied")
def rows_first(new_head, old_head, rows):
    with torch.no_grad():
        new_head.weight.copy_(old_head.weight[: len(rows)])
        new_head.bias.copy_(old_head.bias[: len(rows)])


def thawed(model, tokenizer, dataset, config, folder, order):
    histories = []
    for frozen in order(len(model.encoder.layers)):
        made = finetuning_groups(model, frozen=frozen)
        histories.append(train(model, tokenizer, dataset, config, Path(folder) / str(frozen),
                               groups=made, tracker=None))
    return histories


@right("thaw", "from the top")
def thaw_right(model, tokenizer, dataset, config, folder):
    return thawed(model, tokenizer, dataset, config, folder, lambda n: range(n + 1, -1, -1))


@mistake("thaw", "everything from the start", looks="`frozen=0` in each stage",
         shows="the fresh head shakes the body", find="how far each part moved",
         hint="the embedding moves as far")
def thaw_all(model, tokenizer, dataset, config, folder):
    return [
        train(model, tokenizer, dataset, config, Path(folder) / str(i),
              groups=finetuning_groups(model), tracker=None) for i in range(4)]


@mistake("thaw", "one folder for all stages", looks="`train(…, folder)`",
         shows="the second stage is refused, or nothing is trained", find="count the folders",
         hint="with its own settings only")
def thaw_one_folder(model, tokenizer, dataset, config, folder):
    return [
        train(model, tokenizer, dataset, config, folder,
              groups=finetuning_groups(model, frozen=f), tracker=None) for f in (3, 2, 1, 0)]


def mixed(old, new, share, head=True):
    return {
        n: w if (head and n.startswith("head.")) or not w.is_floating_point()
        else torch.lerp(old[n], w, share) for n, w in new.items()}


right("mix", "by lerp")(lambda old, new, share: mixed(old, new, share))


@mistake("mix", "shares exchanged", looks="`lerp(new, old, share)`",
         shows="the curve runs backwards", find="share=1 must be the new",
         hint="the shares are exchanged")
def mix_exchanged(old, new, share):
    return mixed(old, new, 1 - share)


def rehearsed(reader, batch, labels, *, vocab_size, generator, weight=0.3, asked="before",
              shown="spoilt"):
    from emoformer.pretraining import corrupt, masked_language_loss

    ids = batch["input_ids"]
    spoilt, chosen = corrupt(ids, vocab_size=vocab_size, share=0.15, generator=generator)
    of_labels, of_words = reader(
        spoilt if shown == "spoilt" else ids, batch["attention_mask"], chosen)
    return nn.functional.cross_entropy(of_labels, labels) + weight * masked_language_loss(
        of_words, ids if asked == "before" else spoilt, chosen)


right("rehearsal_loss", "as in the book")(rehearsed)


@mistake("rehearsal_loss", "the spoilt ids asked for", looks="`loss(…, spoilt, chosen)`",
         shows="the answer to most holes is [MASK]", find="the loss of the words alone",
         hint="asks for the spoilt ids")
def rehearsal_spoilt(reader, batch, labels, **options):
    return rehearsed(reader, batch, labels, asked="spoilt", **options)


@mistake("rehearsal_loss", "the weight forgotten", looks="`labels + words`",
         shows="words drown the labels", find="weight=0", hint="weight of the words' loss")
def rehearsal_weight(reader, batch, labels, *, vocab_size, generator, weight=0.3):
    return rehearsed(reader, batch, labels, vocab_size=vocab_size, generator=generator, weight=1.0)


@right("distillation_loss", "by kl_div")
def distil_kl(logits, teacher_logits, temperature):
    return temperature**2 * nn.functional.kl_div(
        (logits / temperature).log_softmax(-1),
        (teacher_logits.detach() / temperature).softmax(-1), reduction="batchmean")


@mistake("distillation_loss", "no T²", looks="`kl_div(…)` alone",
         shows="at a high temperature it hardly learns", find="two temperatures",
         hint="the factor T² is missing")
def distil_plain(logits, teacher_logits, temperature):
    return distil_kl(logits, teacher_logits, temperature) / temperature**2


@mistake("distillation_loss", "mean over the classes", looks="`reduction='mean'`",
         shows="four times too small", find="compare with the formula", hint="over the classes")
def distil_mean(logits, teacher_logits, temperature):
    return distil_kl(logits, teacher_logits, temperature) / logits.shape[1]


@mistake("distillation_loss", "the teacher learns", looks="no `detach`",
         shows="the teacher makes itself easy", find="gradient of the teacher",
         hint="the teacher gets a gradient")
def distil_teacher(logits, teacher_logits, temperature):
    return temperature**2 * nn.functional.kl_div(
        (logits / temperature).log_softmax(-1), (teacher_logits / temperature).softmax(-1),
        reduction="batchmean")
