"""Checks for chapter 11: a new head, a pace for each depth, few labels, a card."""

import contextlib
import io
import random
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from .bench import Battery, Broke, Wrong, expect, near, scramble, unhurried
from .pretraining import (
    LABEL_NAMES,
    SMALL,
    Shape,
    Stub,
    Watched,
    dataset_of,
    needs,
    own_dice,
    refused,
    same,
    tensors_of,
    transformer,
    working,
    world,
)

# with_new_head

head_battery = Battery(
    "with_new_head",
    "with_new_head(pretrained, num_labels, *, dropout=0.2, **classes) -> model",
    chapter=11, takes=("pretrained", "num_labels", "dropout", "classes"),
)


class Body(nn.Module):
    """What a pretrained model is to chapter 11: a config, a classifier, a second head."""

    def __init__(self, shape):
        super().__init__()
        self.config = shape
        self.classifier = transformer(shape)
        self.masked_head = nn.Linear(shape.d_model, shape.vocab_size)
        self.masked_head.weight = self.classifier.embedding.token.weight


OLD = Shape(norm_first=True)  # seven labels
IDS = torch.randint(5, 30, (3, 6), generator=torch.Generator().manual_seed(61))
REAL = torch.arange(6) < torch.tensor([6, 3, 4])[:, None]


def renewed(function, pretrained, num_labels=4, **options):
    """Call the reader's with_new_head."""
    model = function.run(lambda: function.thing(pretrained, num_labels, **options))
    expect(model is not None, "it returns None: is there a return at the end?")
    expect(
        isinstance(model, nn.Module),
        f"it must return the new model, but it returns a {type(model).__name__}",
    )
    expect(model is not pretrained and model is not pretrained.classifier,
           "it returns the pretrained model itself, not a new one: that would be changed "
           "by fine-tuning")
    kind = type(pretrained.classifier)
    expect(
        isinstance(model, kind),
        f"it must be a {kind.__name__}, with one head, but it is a {type(model).__name__}",
    )
    return model


@head_battery.property("has a head for the new task, and says so in its config")
def head_shape(function):
    body = Body(OLD)
    for count in (4, 1, 9):
        model = renewed(function, body, count)
        shape = tuple(model.head.weight.shape)
        expect(
            shape == (count, OLD.d_model),
            f"the head must be ({count}, {OLD.d_model}) for {count} labels, but it is "
            f"{shape}" + (": the old head is kept" if shape[0] == OLD.num_labels else ""),
        )
        expect(
            model.config.num_labels == count,
            f"the model's config still says {model.config.num_labels} labels: replace("
            "config, num_labels=…). Whoever saves and loads the model relies on it",
        )
    with torch.no_grad():
        out = model.eval()(IDS, REAL)
    expect(tuple(out.shape) == (3, 9), f"the logits must be (3, 9), but they are "
           f"{tuple(out.shape)}")
    model = renewed(function, body, 4, dropout=0.35)
    found, wanted = model.config, replace(OLD, num_labels=4, dropout=0.35)
    different = [
        name for name in ("vocab_size", "d_model", "num_heads", "num_layers", "d_ff",
                          "max_len", "positions", "norm_first", "pooling")
        if getattr(found, name) != getattr(wanted, name)
    ]
    expect(not different, f"the config lost {', '.join(different)}: take the pretrained "
           "one's, and replace only num_labels and dropout")


@head_battery.property("keeps everything that is not the head")
def head_body(function):
    body = Body(OLD)
    model = renewed(function, body)
    old, new = tensors_of(body.classifier), tensors_of(model)
    expect(set(old) == set(new), "its weights have other names than the pretrained "
           "classifier's: "
           + ", ".join(sorted(set(old) ^ set(new))[:4]))
    lost = [n for n in old if not n.startswith("head.") and not torch.equal(old[n], new[n])]
    if lost:
        kept = [n for n in old if not n.startswith("head.") and n not in lost]
        parts = sorted({".".join(n.split(".")[:2]) for n in lost})
        raise Wrong(
            "nothing of the pretrained body is copied, all is fresh: load its state_dict "
            "(of pretrained.classifier)" if not kept else
            "the values of the body are changed: it must be an exact copy"
            if all(near(old[n], new[n], 0.05) for n in lost) else
            f"parts of the body are fresh, not the pretrained ones: {', '.join(parts[:4])}"
        )
    with torch.no_grad():
        before = body.classifier.eval().encode(IDS, REAL)
        after = model.eval().encode(IDS, REAL)
    expect(near(before, after), "the same weights, but the body gives other vectors")


@head_battery.property("draws a fresh head from the global seed")
def head_fresh(function):
    body = Body(OLD)
    heads = []
    for seed in (1, 1, 2):
        with own_dice():
            torch.manual_seed(seed)
            heads.append(tensors_of(renewed(function, body, OLD.num_labels).head)["weight"])
    old = body.classifier.head.weight
    expect(
        not torch.equal(heads[0], old),
        "where the new task has as many labels as the old outputs, the old head is kept: "
        "the head must always be fresh, for it answers another question",
    )
    expect(bool((heads[0] != 0).any()), "the head is all zeros: it must be drawn at random")
    expect(torch.equal(heads[0], heads[1]), "the same global seed gives another head: a "
           "run could not be repeated")
    expect(
        not torch.equal(heads[0], heads[2]),
        "the head is the same whatever the seed: a seed is set inside, so all runs start "
        "from one head",
    )
    with torch.no_grad():
        rows = renewed(function, body, 4).head.weight
    expect(
        not any(near(row, other) for row in rows for other in old),
        "rows of the old head are copied into the new one: it must be fresh",
    )


@head_battery.property("leaves the pretrained model as it is, and shares nothing with it")
def head_copy(function):
    body = Body(OLD).train()
    before, config = tensors_of(body), body.config
    model = renewed(function, body)
    expect(
        tuple(body.classifier.head.weight.shape) == (OLD.num_labels, OLD.d_model),
        "the head of the pretrained model itself is replaced: make a new model, the old "
        "one is still needed",
    )
    expect(same(tensors_of(body), before), "the pretrained model's weights are changed")
    expect(body.config == config, "the pretrained model's config is changed")
    expect(all(p.requires_grad for p in body.parameters()), "the pretrained model is "
           "frozen afterwards: leave it as it is")
    expect(body.training, "the pretrained model is in evaluation mode afterwards")
    theirs = {p.data_ptr() for p in body.parameters()}
    shared = [n for n, p in model.named_parameters() if p.data_ptr() in theirs]
    expect(
        not shared,
        "the new model shares tensors with the pretrained one, so fine-tuning would "
        f"change both: {', '.join(shared[:3])}. Copy the values (load_state_dict does, "
        "assigning a module or a Parameter does not)",
    )
    expect(all(p.requires_grad for p in model.parameters()), "the new model's parameters "
           "ask for no gradient: freezing is up to finetuning_groups")


@head_battery.property("gives the whole model the new dropout")
def head_dropout(function):
    body = Body(replace(OLD, dropout=0.0))
    for options, wanted in (({"dropout": 0.45}, 0.45), ({}, 0.2)):
        model = renewed(function, body, **options)
        rates = {m.p for m in model.modules() if isinstance(m, nn.Dropout)}
        if rates == {0.0}:
            raise Wrong("the pretrained model's dropout of 0 is kept: fine-tuning on few "
                        "texts needs it, so make the model with the new one")
        expect(
            not rates or rates == {wanted},
            f"dropout {wanted:g} must reach every part, but the parts have "
            f"{sorted(rates)}" + ("; 0.2 is its default" if not options else ""),
        )
        expect(
            model.config.dropout == wanted,
            f"the config says dropout {model.config.dropout:g}, not {wanted:g}",
        )


@head_battery.property("passes sublayers' classes on, and refuses what makes no sense")
def head_refuses(function):
    class Norm(nn.LayerNorm):
        """A norm of our own."""

    body = Body(OLD)
    model = renewed(function, body, norm=Norm)
    expect(isinstance(model.embedding_norm, Norm), "classes passed to it do not reach the "
           "new model: pass **classes on")
    for arguments, what in (
        ({"num_labels": 0}, "num_labels=0"), ({"num_labels": 3, "dropout": 1.0}, "dropout=1"),
        ({"num_labels": 3, "dropout": -0.1}, "dropout=-0.1"),
    ):
        refused(
            function, lambda a=arguments: function.thing(body, **a),
            f"{what} must be refused by a ValueError: making the config anew does that",
        )


# finetuning_groups

groups_battery = Battery(
    "finetuning_groups",
    "finetuning_groups(model, *, weight_decay=0.01, head_scale=1.0, layer_decay=1.0, "
    "frozen=0) -> list of groups", chapter=11,
    takes=("model", "weight_decay", "head_scale", "layer_decay", "frozen"),
)


class Layer(nn.Module):
    """An encoder layer's parameters, by the book's names."""

    def __init__(self, d):
        super().__init__()
        self.attention = nn.ModuleDict({
            n: nn.Linear(d, d) for n in ("query", "key", "value", "output")})
        self.feedforward = nn.ModuleDict({
            "expand": nn.Linear(d, 3), "contract": nn.Linear(3, d)})
        self.attention_norm, self.feedforward_norm = nn.LayerNorm(d), nn.LayerNorm(d)


class Skeleton(nn.Module):
    """A classifier's parameters, by the book's names, without any reading."""

    def __init__(self, layers=3, norm_first=True, labels=4):
        super().__init__()
        self.config = Shape(num_layers=layers, d_model=4, num_labels=labels)
        self.embedding = nn.Module()
        self.embedding.token = nn.Embedding(9, 4)
        self.embedding.position = nn.Embedding(5, 4)
        self.embedding_norm = nn.LayerNorm(4)
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(Layer(4) for _ in range(layers))
        self.encoder.final_norm = nn.LayerNorm(4) if norm_first else None
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(4, labels)


def depth_of(name, layers):
    """0 the embedding, then the layers, the head last."""
    if name.startswith("embedding"):
        return 0
    if name.startswith("encoder.layers."):
        return 1 + int(name.split(".")[2])
    return layers + 1 if name.startswith("head.") else layers


def table(groups, model):
    """A dict from each parameter's name to its (scale, decay)."""
    names = {id(p): n for n, p in model.named_parameters()}
    expect(
        isinstance(groups, (list, tuple)) and all(isinstance(g, dict) for g in groups),
        "it must return a list of dicts, as torch.optim takes them",
    )
    found = {}
    for group in groups:
        for key in ("params", "weight_decay", "scale"):
            if key == "scale" and "lr" in group and key not in group:
                raise Wrong("the groups have an lr: give them a scale, train multiplies "
                            "the run's learning rate by it at each step")
            expect(key in group, f"a group lacks {key!r}: each has params, weight_decay "
                   "and scale")
        for parameter in group["params"]:
            expect(id(parameter) in names, "a group holds something that is no parameter "
                   "of the model (a copy, or a pair of name and parameter)")
            name = names[id(parameter)]
            expect(name not in found, f"{name} stands in two groups: an optimizer refuses "
                   "that, or moves it twice")
            found[name] = (float(group["scale"]), float(group["weight_decay"]))
    return found


def grouped(function, model, **options):
    """Call the reader's finetuning_groups; give the table."""
    return table(function.run(lambda: function.thing(model, **options)), model)


def scale_causes(layers, scale, decay):
    """Wrong paces: hint, function from a name and its depth to a pace."""
    def right(depth):
        return scale if depth > layers else decay ** (layers - depth)

    def is_final(name):
        return "final_norm" in name

    return [
        ("layer_decay runs the wrong way: the last layer learns at the run's rate, each one "
         "below it slower, the embedding slowest",
         lambda n, d: scale if d > layers else decay ** d),
        ("layer_decay runs the wrong way: the last layer learns at the run's rate, each one "
         "below it slower, the embedding slowest",
         lambda n, d: scale if d > layers else decay ** max(0, d - 1)),
        ("the pace is one power off: the last layer learns at the run's own rate, "
         "layer_decay to the power of 0",
         lambda n, d: scale if d > layers else decay ** (layers + 1 - d)),
        ("the pace is one power off: the embedding is slower than the first layer, "
         "layer_decay to the power of the number of layers",
         lambda n, d: right(max(1, d)) if d <= layers else scale),
        ("head_scale is applied to every part: it is the head's alone",
         lambda n, d: scale if d > layers else scale * decay ** (layers - d)),
        ("head_scale is applied to every part: it is the head's alone",
         lambda n, d: scale),
        ("head_scale divides the head's pace: it multiplies it",
         lambda n, d: 1 / scale if d > layers else right(d)),
        ("head_scale is not used: the head learns at the run's rate",
         lambda n, d: 1.0 if d > layers else right(d)),
        ("the head is one power of layer_decay faster or slower as well: its pace is "
         "head_scale",
         lambda n, d: scale * decay if d > layers else right(d)),
        ("the head is one power of layer_decay faster or slower as well: its pace is "
         "head_scale",
         lambda n, d: scale / decay if d > layers else right(d)),
        ("layer_decay is not used: all layers have one pace",
         lambda n, d: scale if d > layers else 1.0),
        ("the embedding is not slowed down: it is the deepest part",
         lambda n, d: 1.0 if d == 0 else right(d)),
        ("embedding_norm is not slowed down: it belongs to the embedding",
         lambda n, d: 1.0 if n.startswith("embedding_norm") else right(d)),
        ("embedding_norm has the pace of the first layer: it belongs to the embedding",
         lambda n, d: right(1) if n.startswith("embedding_norm") else right(d)),
        ("the encoder's final norm has the pace of the embedding: it stands above the last "
         "layer, and learns as fast as that",
         lambda n, d: right(0) if is_final(n) else right(d)),
        ("the encoder's final norm has the pace of the head: it belongs to the last layer",
         lambda n, d: scale if is_final(n) else right(d)),
        ("the pace falls in a straight line: it is multiplied by layer_decay from layer to "
         "layer", lambda n, d: scale if d > layers else max(0.0, 1 - (1 - decay) * (layers - d))),
        ("every layer is slowed down once, whatever its depth: layer_decay to the power of "
         "the distance from the last layer",
         lambda n, d: scale if d > layers else (1.0 if d == layers else decay)),
        ("the pace is divided by layer_decay from layer to layer: it is multiplied",
         lambda n, d: scale if d > layers else decay ** (d - layers)),
        ("layers are counted from the first digit of their number, so that layer 10 is "
         "taken for layer 1", lambda n, d: right(
             1 + int(n.split(".")[2][0]) if n.startswith("encoder.layers.") else d)),
        ("layers are put in order by name, where 10 comes before 2",
         lambda n, d: right(1 + sorted(map(str, range(layers))).index(n.split(".")[2])
                            if n.startswith("encoder.layers.") else d)),
    ]


def decay_causes(decay):
    """Wrong weight decays: hint, function from a name and a rank to a decay."""
    def vector(name):
        return name.endswith("bias") or "norm" in name

    return [
        ("biases and norms are decayed too: only matrices are", lambda n, r: decay),
        ("nothing is decayed: weight_decay is not used", lambda n, r: 0.0),
        ("it decays biases and norms, and not the matrices: the other way round",
         lambda n, r: decay if r < 2 else 0.0),
        ("the norms' weights are decayed: they are vectors, as biases are",
         lambda n, r: 0.0 if n.endswith("bias") else decay),
        ("the biases are decayed: only matrices are",
         lambda n, r: 0.0 if "norm" in n else decay),
        ("the embedding is not decayed: its tables are matrices",
         lambda n, r: 0.0 if vector(n) or n.startswith("embedding") else decay),
        ("the head's matrix is not decayed", lambda n, r: 0.0 if vector(n) or n.startswith(
            "head") else decay),
        ("only the head is decayed", lambda n, r: decay if n == "head.weight" else 0.0),
        ("the weight decay is fixed at 0.01: pass weight_decay on",
         lambda n, r: 0.01 if r >= 2 else 0.0),
    ]


@groups_battery.property("holds every parameter exactly once")
def groups_whole(function):
    for model in (Skeleton(3), Skeleton(2, norm_first=False), Skeleton(1)):
        found = grouped(function, model, layer_decay=0.5, head_scale=3.0)
        lost = [n for n, _ in model.named_parameters() if n not in found]
        if not lost:
            continue
        parts = sorted({".".join(n.split(".")[:2]) for n in lost})
        raise Wrong(
            "no group holds the biases and norms: they need a group without weight decay"
            if set(lost) == {n for n, p in model.named_parameters() if p.ndim < 2} else
            f"parameters are in no group, so they would never learn: {', '.join(parts[:5])}"
        )


@groups_battery.property("gives each depth its pace")
def groups_pace(function):
    for layers, options in (
        (3, {"layer_decay": 0.5, "head_scale": 3.0}),
        (3, {"layer_decay": 0.7, "head_scale": 1.0}),
        (12, {"layer_decay": 0.8, "head_scale": 2.0}),
        (3, {}),
    ):
        for norm_first in (True, False):
            model = Skeleton(layers, norm_first)
            found = {n: s for n, (s, _) in grouped(function, model, **options).items()}
            decay, scale = options.get("layer_decay", 1.0), options.get("head_scale", 1.0)

            def right(name, d, layers=layers, decay=decay, scale=scale):
                return scale if d > layers else decay ** (layers - d)

            def fits(pace, found=found, layers=layers):
                try:
                    return all(abs(s - pace(n, depth_of(n, layers))) < 1e-9
                               for n, s in found.items())
                except (ValueError, ArithmeticError):
                    return False

            if fits(right):
                continue
            for hint, pace in scale_causes(layers, scale, decay):
                if fits(pace):
                    raise Wrong(hint)
            if not options:
                raise Wrong("where nothing is said every part must have the pace 1")
            name = next(n for n, s in found.items()
                        if abs(s - right(n, depth_of(n, layers))) >= 1e-9)
            raise Wrong(
                f"with {layers} layers, layer_decay={decay:g} and head_scale={scale:g} the "
                f"pace of {name} must be {right(name, depth_of(name, layers)):.4g}, but it "
                f"is {found[name]:.4g}"
            )


@groups_battery.property("decays matrices, and neither biases nor norms")
def groups_decay(function):
    for options in ({"weight_decay": 0.3}, {"weight_decay": 0.2, "layer_decay": 0.5}, {}):
        model = Skeleton(3)
        rank = {n: p.ndim for n, p in model.named_parameters()}
        table_ = grouped(function, model, **options)
        found = {n: d for n, (_, d) in table_.items()}
        decay = options.get("weight_decay", 0.01)

        def fits(rule, found=found, rank=rank):
            return all(abs(d - rule(n, rank[n])) < 1e-9 for n, d in found.items())

        if fits(lambda n, r, decay=decay: decay if r >= 2 else 0.0):
            continue
        for hint, rule in decay_causes(decay):
            if fits(rule):
                raise Wrong(hint)
        if all(abs(d - (decay * table_[n][0] if rank[n] >= 2 else 0)) < 1e-9
               for n, d in found.items()):
            raise Wrong("the weight decay is multiplied by the pace: AdamW multiplies it by "
                        "the learning rate already")
        if not options:
            raise Wrong("where nothing is said the weight decay of matrices must be 0.01")
        name = next(n for n, d in found.items()
                    if abs(d - (decay if rank[n] >= 2 else 0.0)) >= 1e-9)
        raise Wrong(f"the weight decay of {name} must be "
                    f"{decay if rank[name] >= 2 else 0:g}, but it is {found[name]:g}")


def freezing_hint(found, asks, depth, layers, frozen):
    """Say what is wrong with what is frozen."""
    wanted = {n for n, d in depth.items() if d >= frozen}
    differ = asks ^ wanted
    causes = [
        (asks == set(depth) and found == wanted,
         "frozen parameters are in no group, but still ask for a gradient: the backward "
         "pass costs as much as before. Set requires_grad_(False)"),
        (asks == wanted and found == set(depth),
         "frozen parameters are in a group: an optimizer may still move them (weight decay "
         "does). Leave them out"),
    ]
    for hint, rule in (
        ("one part more than asked is frozen: 0 none, 1 the embedding, 2 the first layer as "
         "well", lambda d: d > frozen),
        ("one part less than asked is frozen: 1 is the embedding, 2 the first layer as well",
         lambda d: d >= frozen - 1),
        ("it freezes from the top: begin with the embedding",
         lambda d: d <= layers + 1 - frozen),
        ("only one part is frozen: all parts below it as well", lambda d: d != frozen - 1),
        ("the frozen parts are the ones that learn: turned round", lambda d: d < frozen),
        ("nothing is frozen", lambda d: True),
        ("everything is frozen: the parts above must learn", lambda d: False),
    ):
        causes.append((asks != wanted and asks == {n for n, d in depth.items() if rule(d)},
                       hint))
    causes += [
        (differ and all(n.startswith(part) for n in differ), hint)
        for hint, part in (
            ("the encoder's final norm is frozen too early, or never: it belongs to the last "
             "layer", "encoder.final_norm"),
            ("embedding_norm is not frozen with the embedding, or too late",
             "embedding_norm"),
            ("the head is frozen: it is the one part that always learns", "head"),
            ("the embedding's positions are not frozen with its tokens",
             "embedding.position"),
        )
    ]
    where = f"with {layers} layers and frozen={frozen} "
    causes += [
        (layers > 9 and differ and all(depth[n] in (1, 2, 3, 10, 11) for n in differ),
         "layer 10 is taken for layer 1: compare whole numbers, not the beginning of a "
         "name"),
        (differ, where + "the wrong parameters learn: " + ", ".join(sorted(differ)[:3])),
        (True, where + "the groups do not hold exactly what still learns: "
         + ", ".join(sorted(found ^ wanted)[:3])),
    ]
    return next(hint for holds, hint in causes if holds)


@groups_battery.property("freezes from the bottom, and only that")
def groups_frozen(function):
    for layers, norm_first in ((3, True), (2, False), (11, True)):
        for frozen in (0, 1, 2, layers, layers + 1):
            model = Skeleton(layers, norm_first)
            found = set(grouped(function, model, frozen=frozen, layer_decay=0.5))
            depth = {n: depth_of(n, layers) for n, _ in model.named_parameters()}
            asks = {n for n, p in model.named_parameters() if p.requires_grad}
            if not found == asks == {n for n, d in depth.items() if d >= frozen}:
                raise Wrong(freezing_hint(found, asks, depth, layers, frozen))


@groups_battery.property("can be called again, with other numbers")
def groups_again(function):
    model = Skeleton(3)
    before = tensors_of(model)
    for frozen in (4, 2, 0):
        found = grouped(function, model, frozen=frozen)
        expect(
            len(found) == sum(depth_of(n, 3) >= frozen for n in before),
            "what an earlier call froze stays frozen: set requires_grad of every parameter, "
            "True or False, so that a model can be thawed step by step",
        )
        expect(
            all(p.requires_grad == (depth_of(n, 3) >= frozen)
                for n, p in model.named_parameters()),
            "what an earlier call froze still asks for no gradient: set requires_grad of "
            "every parameter, True or False",
        )
    expect(same(tensors_of(model), before), "the weights themselves are changed")
    with unhurried():  # the first optimizer of a process imports much
        torch.optim.SGD([
            {"params": list(g["params"]), "lr": 0.1 * g["scale"],
             "weight_decay": g["weight_decay"]}
            for g in function.run(lambda: function.thing(model, layer_decay=0.9))
        ])


@groups_battery.property("refuses numbers that break a rule")
def groups_refuses(function):
    for options, rule in (
        ({"weight_decay": -0.1}, "at least 0"), ({"head_scale": 0.0}, "above 0"),
        ({"head_scale": -1.0}, "above 0"), ({"layer_decay": 0.0}, "in (0, 1]"),
        ({"layer_decay": 1.5}, "in (0, 1]: the deeper, the slower"),
        ({"frozen": -1}, "at least 0"),
        ({"frozen": 5}, "at most 4 with three layers: the head always learns"),
    ):
        (name, value), = options.items()
        model = Skeleton(3)
        refused(
            function, lambda model=model, options=options: function.thing(model, **options),
            f"{name}={value:g} must be refused by a ValueError: it must be {rule}",
        )
        expect(
            all(p.requires_grad for p in model.parameters()),
            "a call that is refused has frozen something already: check first",
        )
    for options in ({"layer_decay": 1.0}, {"weight_decay": 0.0}, {"frozen": 4}):
        (name, value), = options.items()
        try:
            grouped(function, Skeleton(3), **options)
        except Broke:
            raise Wrong(f"{name}={value:g} is refused, but it is allowed") from None


# finetune

finetune_battery = Battery(
    "finetune",
    "finetune(pretrained, tokenizer, dataset, config, folder, *, dropout=0.2, "
    "head_scale=5.0, layer_decay=0.9, frozen=0, tracker=None, **classes) -> model, history",
    chapter=11, takes=("pretrained", "tokenizer", "dataset", "config", "folder", "dropout",
                       "head_scale", "layer_decay", "frozen", "tracker"),
)
RATE = 1e-3


@dataclass(frozen=True)
class Recipe:
    """What `TrainingConfig` holds."""

    seed: int = 0
    epochs: int = 1
    batch_size: int = 32
    learning_rate: float = RATE
    warmup: float = 0.0
    weight_decay: float = 0.0
    clip: float = 1.0
    hide: float = 0.0
    bpe_dropout: float = 0.0
    class_weights: bool = False
    precision: str = "no"


def task():
    """A small task: four named classes, of which the texts have three."""
    from datasets import DatasetDict

    w, names = world(), ["p", "q", "r", "s"]
    return DatasetDict({
        "train": dataset_of(w.texts[:12], [i % 3 for i in range(12)], names),
        "validation": dataset_of(w.texts[12:20], [i % 3 for i in range(8)], names),
    })


def reading_body():
    """A pretrained model whose vocabulary is the small world's; without dropout."""
    with unhurried():
        return Body(replace(world().shape, norm_first=True, num_layers=2, dropout=0.0))


def tune(function, body, config=None, **options):
    """Call the reader's finetune on the small task; model, history, files."""
    def call(folder):
        with own_dice():
            torch.manual_seed(options.pop("world_seed", 17))
            with contextlib.redirect_stdout(io.StringIO()):
                return function.thing(
                    body, world().tokenizer, task(), config or Recipe(), folder, **options)

    with tempfile.TemporaryDirectory() as folder:
        try:
            result = function.run(call, folder)
        except Broke:
            if isinstance(function.last_error, NotImplementedError):
                train = needs(8, "training", "train")
                working(8, "train", lambda: train(
                    transformer(replace(body.config, num_labels=4)), world().tokenizer, task(),
                    Recipe(), Path(folder) / "x", tracker=None))
            raise
        files = [str(p.relative_to(folder)) for p in Path(folder).rglob("*") if p.is_file()]
    expect(
        isinstance(result, tuple) and len(result) == 2,
        "it must return two things, the model and the history of train",
    )
    model, history = result
    expect(isinstance(model, nn.Module), "the first result must be the model, but it is a "
           f"{type(model).__name__}")
    expect(isinstance(history, list), "the second result must be the history of train, a "
           f"list, but it is a {type(history).__name__}")
    return model, history, files


def moved(function, body, **options):
    """How far each part moved in one step of Adam, in learning rates."""
    options = {"dropout": 0.0} | options
    model = tune(function, body, **options)[0]
    old, new = tensors_of(body.classifier), tensors_of(model)
    steps = {}
    for name in new:
        if name.startswith("head."):
            continue
        part = {0: "embedding", 1: "first layer", 2: "last layer"}[depth_of(name, 2)]
        if "final_norm" in name:
            part = "final norm"
        if name.startswith("embedding_norm"):
            part = "embedding's norm"
        step = ((new[name] - old[name]).abs().max() / RATE).item()
        steps[part] = max(steps.get(part, 0.0), step)
    return steps, new


@finetune_battery.property("returns the model for the new task, and the history")
def finetune_shape(function):
    body = reading_body()
    before = tensors_of(body)
    model, history, files = tune(function, body, Recipe(epochs=2))
    expect(len(history) == 2, f"two epochs give a history of two, not {len(history)}")
    count = model.head.weight.shape[0]
    expect(
        count == 4,
        "the number of labels is counted from the labels that occur: the dataset names "
        "four, features['label'].num_classes" if count == 3 else
        f"the head must have four outputs, one for each class, but it has {count}",
    )
    expect(
        same(tensors_of(body), before),
        "the pretrained model is changed by fine-tuning: train a copy with a new head "
        "(with_new_head)",
    )
    expect(all(p.requires_grad for p in body.parameters()), "the pretrained model is frozen "
           "afterwards")
    expect(bool(files), "nothing is written into the folder: pass it to train")
    expect(
        not any("events" in name for name in files),
        "a tracker writes files though none was asked for: pass tracker=tracker to train, "
        "whose own default is tensorboard",
    )
    new = tensors_of(model)
    old = tensors_of(body.classifier)
    expect(
        any(not torch.equal(old[n], new[n]) for n in old if not n.startswith("head.")),
        "the body has not moved at all: does train get the same model that the groups were "
        "made from?",
    )
    near_old = all(near(old[n], new[n], 0.05) for n in old if not n.startswith("head."))
    expect(near_old, "the model does not start from the pretrained weights")


@finetune_battery.property("gives each depth its pace, by default 5 and 0.9")
def finetune_pace(function):
    body = reading_body()
    for options in ({}, {"head_scale": 3.0, "layer_decay": 0.5}):
        steps, _ = moved(function, body, **options)
        decay = options.get("layer_decay", 0.9)
        wanted = {"embedding": decay**2, "embedding's norm": decay**2, "first layer": decay,
                  "last layer": 1.0, "final norm": 1.0}
        wrong = [p for p, s in steps.items() if abs(s - wanted[p]) > 0.03 * wanted[p]]
        if not wrong:
            continue
        if all(abs(s - 1) < 0.03 for s in steps.values()):
            raise Wrong(
                "every part learns at the same pace: pass groups=groups to train, made by "
                "finetuning_groups with layer_decay" if options else
                "every part learns at the same pace: layer_decay is 0.9 where nothing is "
                "said, and the groups must reach train")
        if abs(steps["last layer"] - 1) > 0.03:
            raise Wrong(
                "the last layer does not learn at config.learning_rate: in one step of Adam "
                f"it moved by {steps['last layer']:.2f} learning rates")
        part = wrong[0]
        raise Wrong(
            f"with layer_decay={decay:g} one step of Adam must move the {part} by "
            f"{wanted[part]:.3g} learning rates, but it moves it by {steps[part]:.3g}"
            + (": its default must be 0.9" if not options else ""))
    heads = {}
    for scale in (None, 3.0, 1.0):
        options = {} if scale is None else {"head_scale": scale}
        heads[scale] = moved(function, body, **options)[1]["head.weight"]
    apart = ((heads[3.0] - heads[1.0]).abs().max() / RATE).item()
    expect(
        abs(apart - 2) < 0.1,
        "head_scale does not reach the head: a head at pace 3 must move two learning rates "
        f"farther in one step of Adam than one at pace 1, but it moves {apart:.2f} farther",
    )
    apart = ((heads[None] - heads[1.0]).abs().max() / RATE).item()
    expect(abs(apart - 4) < 0.1, "where nothing is said the head must learn 5 times as fast, "
           f"but it learns {apart + 1:.2g} times as fast")


@finetune_battery.property("freezes, decays and drops as it is told")
def finetune_passes(function):
    body = reading_body()
    steps, _ = moved(function, body, frozen=2)
    expect(
        steps["embedding"] == steps["first layer"] == 0 and steps["last layer"] > 0,
        "frozen=2 must keep the embedding and the first layer where they are, and let the "
        "last one learn: is frozen passed on to finetuning_groups?",
    )
    old = tensors_of(body.classifier)
    heavy = Recipe(weight_decay=100.0)
    new = tensors_of(tune(function, body, heavy, dropout=0.0)[0])
    name = "encoder.layers.1.attention.value.weight"
    if name in new:
        shrunk = (old[name] * (1 - RATE * 100)).sub(new[name]).abs().max() / RATE
        expect(
            shrunk < 1.1,
            "the run's weight_decay does not reach the matrices: pass "
            "config.weight_decay to finetuning_groups",
        )
    for options, wanted in (({}, 0.2), ({"dropout": 0.4}, 0.4)):
        model = tune(function, body, Recipe(learning_rate=1e-12), **options)[0]
        expect(
            model.config.dropout == wanted,
            f"dropout must be {wanted:g}" + (" where nothing is said" if not options else
                                             ": pass it to with_new_head")
            + f", but it is {model.config.dropout:g}",
        )

    class Norm(nn.LayerNorm):
        """A norm of our own."""

    model = tune(function, body, norm=Norm)[0]
    expect(isinstance(model.embedding_norm, Norm), "classes passed to it do not reach the "
           "model: pass **classes to with_new_head")


@finetune_battery.property("draws everything from the run's seed")
def finetune_seed(function):
    body = reading_body()
    still = Recipe(learning_rate=1e-12)
    heads = [
        tensors_of(tune(function, body, replace(still, seed=seed), world_seed=other)[0])
        for seed, other in ((0, 1), (0, 2), (1, 1))
    ]
    expect(
        near(heads[0]["head.weight"], heads[1]["head.weight"]),
        "the head depends on what was drawn before: set torch.manual_seed(config.seed) "
        "before the head is made",
    )
    expect(
        not near(heads[0]["head.weight"], heads[2]["head.weight"]),
        "every seed begins with the same head: set the seed of the run, config.seed, before "
        "it is made",
    )


# take_few

few_battery = Battery(
    "take_few", "take_few(dataset, count, seed) -> Dataset", chapter=11,
    takes=("dataset", "count", "seed"),
)


def posts(labels, classes=4):
    """A Dataset of numbered posts with these labels."""
    return dataset_of(
        [f"post {i}" for i in range(len(labels))], labels, list("abcdefg")[:classes])


LABELS = [0] * 24 + [1] * 12 + [2] * 3 + [3]


def few(function, dataset, count, seed):
    """Call the reader's take_few; the Dataset and its row numbers."""
    drawn = function.run(lambda: function.thing(dataset, count, seed))
    expect(drawn is not None, "it returns None: is there a return at the end?")
    expect(
        hasattr(drawn, "features") and "text" in drawn.column_names,
        f"it must return a Dataset, but it returns a {type(drawn).__name__}: "
        "dataset.select(indices)",
    )
    return drawn, [int(text.split()[1]) for text in drawn["text"]]


@few_battery.property("takes count different posts, text and label together")
def few_count(function):
    dataset = posts(LABELS)
    for count in (4, 5, 17, 40):
        for seed in range(2):
            drawn, rows = few(function, dataset, count, seed)
            if len(rows) != count:
                missing = count - len(rows)
                raise Wrong(
                    f"{count} posts were asked for, but it takes {len(rows)}: "
                    + ("the missing classes are added on top of the draw" if missing < 0
                       else "are duplicates taken out after the draw, or counts of classes "
                       "rounded down?"))
            expect(len(set(rows)) == count, "posts are taken twice: draw without putting "
                   "back (shuffle or sample, not choices)")
            expect(
                list(drawn["label"]) == [LABELS[row] for row in rows],
                "texts and labels no longer belong together",
            )
    expect(drawn.features["label"].names == list("abcd"), "the label names are lost: select "
           "rows of the Dataset, do not build a new one")
    expect(len(dataset) == 40, "the dataset itself is changed")


@few_battery.property("misses no class")
def few_classes(function):
    dataset = posts(LABELS)
    for seed in range(12):
        for count in (4, 6):
            _, rows = few(function, dataset, count, seed)
            lost = {0, 1, 2, 3} - {LABELS[row] for row in rows}
            expect(
                not lost,
                "a small draw may miss a class: put the first post of each class to the "
                "front of the shuffled order, then the rest",
            )


@few_battery.property("draws a larger set that holds the smaller")
def few_nested(function):
    dataset = posts(LABELS)
    for seed in range(4):
        draws = [set(few(function, dataset, count, seed)[1]) for count in (4, 5, 9, 20, 40)]
        for smaller, larger in zip(draws, draws[1:], strict=False):
            expect(
                smaller <= larger,
                "a larger draw with the same seed does not hold the smaller one: a curve "
                "would show other posts, not more of them. Bring all into one order that "
                "does not depend on count, and cut it",
            )


@few_battery.property("depends on its seed alone, and draws from everywhere")
def few_seed(function):
    dataset = posts(LABELS)
    random.seed(987), np.random.seed(987)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    one = few(function, dataset, 15, 3)[1]
    expect(
        random.getstate() == states[0]
        and np.random.get_state()[1].tolist() == states[1]
        and torch.equal(torch.get_rng_state(), states[2]),
        "it sets or uses the global dice (random.seed, random.shuffle, np.random, torch): "
        "whoever draws next gets other numbers. Use random.Random(seed)",
    )
    random.random(), np.random.rand(), torch.rand(1)
    expect(
        few(function, dataset, 15, 3)[1] == one,
        "the same seed gives another draw: something is drawn from global dice, or from a "
        "set, whose order may change",
    )
    draws = [few(function, dataset, 15, seed)[1] for seed in range(60)]
    expect(len({tuple(sorted(rows)) for rows in draws}) > 20, "every seed gives the same "
           "posts: seed is not used")
    counts = np.bincount(np.concatenate(draws), minlength=40)
    expect(
        counts.min() > 0,
        f"post {int(counts.argmin())} is never drawn in 60 draws of 15 from 40: are the "
        "first ones taken, or only a part shuffled?",
    )
    first = counts[:24]
    expect(
        first.max() < 40,
        f"post {int(first.argmax())} is drawn far too often: the first post of a class in "
        "the dataset is always taken; shuffle before",
    )
    share = np.mean([[LABELS[row] == 0 for row in rows] for rows in draws])
    if share < 0.45:
        raise Wrong("the classes are drawn equally often: the draw must be random, with one "
                    "of each class assured and the rest as frequent as in the whole")
    expect(share < 0.7, "the most frequent class is drawn too often")
    spread = np.std([sum(LABELS[row] == 0 for row in rows) for rows in draws])
    expect(
        spread > 0.5,
        "every draw has the same number of posts of each class: beyond the first of each it "
        "must be random, so that the scatter shows this luck too",
    )


@few_battery.property("refuses counts below the number of classes and above all")
def few_refuses(function):
    dataset = posts(LABELS)
    for count in (3, 0, -2, 41):
        refused(
            function, lambda count=count: function.thing(dataset, count, 0),
            f"count={count} must be refused by a ValueError: with four classes and 40 posts "
            "it must lie in 4 … 40",
        )
    _, rows = few(function, posts([0, 1, 1], 2), 3, 0)
    expect(sorted(rows) == [0, 1, 2], "all posts may be taken, but not all are")


# save_finetuned

card_battery = Battery(
    "save_finetuned", "save_finetuned(folder, model, tokenizer, label_names, card)",
    chapter=11, takes=("folder", "model", "tokenizer", "label_names", "card"),
)
CARD = {
    "Licence": " CC BY 4.0 \n", "Data": "ours, ünd theirs", "Numbers": "none so far",
    "Limits": "many", "Intended use": "tests",
}


def can_save():
    """Skip where chapter 10's save_half is not there."""
    save_half = needs(10, "pretraining", "save_half")
    with tempfile.TemporaryDirectory() as folder:
        working(10, "save_half", lambda: save_half(
            folder, Stub(SMALL), world().tokenizer, list(LABEL_NAMES)))


def keep(function, folder, card=None, model=None, names=LABEL_NAMES):
    """Call the reader's save_finetuned."""
    model = scramble(Stub(SMALL), 4) if model is None else model
    function.run(lambda: function.thing(
        folder, model, world().tokenizer, names, dict(CARD if card is None else card)))


@card_battery.property("writes the model in half precision, and the card beside it")
def card_files(function):
    from safetensors.torch import load

    can_save()
    model = scramble(Stub(SMALL), 4)
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "new" / "folder"
        keep(function, folder, model=model)
        expect(folder.is_dir(), "it does not create the folder")
        names = sorted(p.name for p in folder.iterdir())
        wanted = ["README.md", "config.json", "model.safetensors", "tokenizer.json"]
        lacking = [n for n in wanted if n not in names]
        expect(not lacking, f"files are missing: {', '.join(lacking)}"
               + (". The card is README.md" if "README.md" in lacking else
                  ". save_half writes them"))
        expect(names == wanted, "files are left behind: "
               + ", ".join(n for n in names if n not in wanted))
        weights = load((folder / "model.safetensors").read_bytes())
        expect(
            all(torch.equal(weights[n], v.half()) for n, v in model.state_dict().items()),
            "the weights that are saved are not the model's",
        )
        try:
            (folder / "README.md").read_text("utf-8")
        except UnicodeDecodeError:
            raise Wrong("the card is not UTF-8: say encoding='utf-8'") from None
        keep(function, Path(root) / "it", names=iter(LABEL_NAMES))
        expect((Path(root) / "it" / "config.json").is_file(), "label names that are no list "
               "are not taken")


@card_battery.property("puts every heading and text on the card, in order")
def card_text(function):
    can_save()
    with tempfile.TemporaryDirectory() as root:
        keep(function, Path(root))
        text = (Path(root) / "README.md").read_text("utf-8")
    lines = text.splitlines()
    places = []
    for heading, content in CARD.items():
        where = [i for i, line in enumerate(lines)
                 if line.lstrip("#").strip() == heading and line.startswith("#")]
        expect(where, f"the heading {heading!r} is not on the card as a line of its own, "
               f"## {heading}" + (
                   ": all of the card's headings belong there, not only the four that it "
                   "must have" if heading == "Licence" else ""))
        after = "\n".join(lines[where[0] + 1:]).split("\n#")[0]
        expect(content.strip() in after, f"the text under {heading!r} is not on the card")
        places.append(where[0])
    expect(places == sorted(places), "the headings are not in the order of the card")


@card_battery.property("refuses a card with a hole, and writes nothing then")
def card_refuses(function):
    can_save()
    cards = [({k: v for k, v in CARD.items() if k != h}, f"a card without {h!r}")
             for h in ("Data", "Numbers", "Limits", "Intended use")]
    cards += [(CARD | {h: text}, f"a card with an empty text under {h!r}")
              for h in ("Data", "Intended use", "Numbers", "Limits") for text in ("", " \n")]
    for card, what in cards:
        with tempfile.TemporaryDirectory() as root:
            folder = Path(root) / "f"
            refused(
                function, lambda folder=folder, card=card: function.thing(
                    folder, Stub(SMALL), world().tokenizer, LABEL_NAMES, card),
                f"{what} must be refused by a ValueError"
                + (": blanks are no text, strip them first" if "empty" in what else ""),
                kinds=(ValueError, AssertionError),
            )
            expect(
                not folder.exists() or not list(folder.iterdir()),
                f"{what} is refused after files were written: check the card first",
            )


@card_battery.property("leaves an old folder whole where the model cannot be saved")
def card_whole(function):
    can_save()
    broken = scramble(Stub(SMALL), 4)
    with torch.no_grad():
        broken.head.bias[0] = 1e6
    good = scramble(Stub(SMALL), 4)
    for model, names, what in ((broken, LABEL_NAMES, "a weight too large for half precision"),
                               (good, LABEL_NAMES[:2], "two label names for four outputs")):
        with tempfile.TemporaryDirectory() as root:
            keep(function, Path(root))
            before = {p.name: p.read_bytes() for p in Path(root).iterdir()}
            refused(
                function, lambda root=root, model=model, names=names: function.thing(
                    root, model, world().tokenizer, names, CARD | {"Data": "other"}),
                f"{what} must be refused, as save_half does",
            )
            after = {p.name: p.read_bytes() for p in Path(root).iterdir()}
        expect(
            before == after,
            "the model could not be saved, but the old card is gone: it must be written "
            "after save_half",
        )




# The exercises of chapter 11

gradient_battery = Battery(
    "share_with_gradient", "share_with_gradient(model, loss) -> float", chapter=11,
    takes=("model", "loss"),
)


@gradient_battery.property("counts numbers, after one backward")
def gradient_share(function):
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 5), nn.Linear(5, 2))  # 15, 20, 12
    for frozen, wanted in ((0, 1.0), (1, 32 / 47), (2, 12 / 47)):
        model.zero_grad()
        for i, layer in enumerate(model):
            layer.requires_grad_(i >= frozen)
        loss = model(torch.ones(1, 4)).sum()
        share = function.run(lambda loss=loss: function.thing(model, loss))
        expect(isinstance(share, (int, float)), "it must return a number in [0, 1]")
        if abs(share - wanted) < 1e-6:
            continue
        tensors = (6 - 2 * frozen) / 6
        raise Wrong(
            "it counts tensors, not the numbers in them: p.numel()"
            if abs(share - tensors) < 1e-6 else
            "no parameter has a gradient: call loss.backward() first" if share == 0 else
            "all parameters are counted: those without a gradient have p.grad None"
            if share == 1 else
            "it is a percentage: give a share" if abs(share - 100 * wanted) < 1e-3 else
            "it gives the share that gets no gradient" if abs(1 - share - wanted) < 1e-6 else
            f"with {frozen} of three layers frozen it must be {wanted:.3f}, but it is "
            f"{share:.3f}")


pooled_battery = Battery(
    "pooled_vectors", "pooled_vectors(body, rows) -> (texts, d_model)", chapter=11,
    takes=("body", "rows"),
)


class Encoding(nn.Module):
    """A body whose vectors are easy to check: a table, dropout, and noise on padding."""

    def __init__(self):
        super().__init__()
        self.config = Shape(vocab_size=30, d_model=5, pooling="mean")
        self.table, self.dropout = nn.Embedding(30, 5), nn.Dropout(0.5)

    def encode(self, input_ids, attention_mask=None):
        """Look up; padding is 9, so that whoever pools it is found out."""
        x = self.dropout(self.table(input_ids))
        if attention_mask is not None:
            x = x.masked_fill(~attention_mask[:, :, None], 9.0)
        return x


@pooled_battery.property("gives each text the mean of its own vectors, in order")
def pooled_equal(function):
    dice = random.Random(3)
    rows = [[2, *(dice.randrange(5, 30) for _ in range(dice.randint(1, 9))), 3]
            for _ in range(70)]
    body = scramble(Encoding()).train()
    found = function.run(lambda: function.thing(body, [list(row) for row in rows]))
    found = torch.as_tensor(found)
    expect(not found.requires_grad, "the vectors hang on a graph: torch.no_grad()")
    with torch.no_grad():
        wanted = torch.stack([body.table(torch.tensor(row)).mean(0) for row in rows])
        first = body.table(torch.tensor([row[0] for row in rows]))
    expect(tuple(found.shape) == (70, 5), f"70 texts of width 5 must give (70, 5), but they "
           f"give {tuple(found.shape)}: pool to one vector a text, and keep every batch")
    if near(found, wanted, 1e-4):
        return
    again = torch.as_tensor(function.run(lambda: function.thing(body, rows)))
    raise Wrong(
        "it gives other vectors each time: dropout is active. Call body.eval() first"
        if not near(found, again) else
        "the texts come back in another order" if near(
            found.sort(0).values, wanted.sort(0).values, 1e-4) else
        "padding is pooled: pass the attention mask to pool" if (
            found.abs().max() > wanted.abs().max() + 0.5) else
        "only the first token's vector is taken" if near(found, first, 1e-4) else
        "the vectors are not the mean over each text's real tokens")


rows_battery = Battery("copy_rows", "copy_rows(new_head, old_head, rows)", chapter=11,
                       takes=("new_head", "old_head", "rows"))


@rows_battery.property("copies weights and biases of the named rows, in their order")
def rows_equal(function):
    old, new = scramble(nn.Linear(4, 9), 1), nn.Linear(4, 3)
    before, rows = tensors_of(old), [7, 0, 4]
    parameters = list(new.parameters())
    function.run(lambda: function.thing(new, old, list(rows)))
    expect(same(tensors_of(old), before), "the old head is changed")
    weight, bias = new.weight.detach(), new.bias.detach()
    expect(tuple(weight.shape) == (3, 4), f"the new head has the shape {tuple(weight.shape)}")
    expect(not near(weight, old.weight[:3]), "the first rows are copied, not the named ones")
    expect(near(weight, old.weight[rows]), "rows of the weights are not those that were "
           "named, or in another order: the order of the new labels counts")
    expect(near(bias, old.bias[rows]), "the biases are not copied")
    expect(
        all(p.requires_grad and p.is_leaf for p in new.parameters())
        and all(a is b for a, b in zip(new.parameters(), parameters, strict=True)),
        "the new head's parameters were replaced or cut off from learning: copy_ the numbers "
        "under torch.no_grad()",
    )
    with torch.no_grad():
        old.weight.add_(1)
    expect(near(new.weight, weight), "old and new head share memory")


thaw_battery = Battery(
    "thaw", "thaw(model, tokenizer, dataset, config, folder) -> list of histories",
    chapter=11, takes=("model", "tokenizer", "dataset", "config", "folder"),
)


@thaw_battery.property("begins with the head alone, and frees a part in each stage")
def thaw_stages(function):
    needs(8, "training", "train")
    with unhurried():
        model = transformer(replace(world().shape, num_labels=4, num_layers=2, dropout=0.0))
        needs(11, "finetuning", "finetuning_groups")
        old = tensors_of(model)

    def call(folder):
        with own_dice(), contextlib.redirect_stdout(io.StringIO()):
            return function.thing(model, world().tokenizer, task(), Recipe(), folder)

    with tempfile.TemporaryDirectory() as folder, unhurried():
        histories = function.run(call, folder)
    expect(isinstance(histories, (list, tuple)), "it must return the histories, one a stage")
    expect(
        len(histories) == 4,
        "a model of two layers has four stages (the head, the last layer too, the first "
        f"too, the embedding too), but there are {len(histories)}",
    )
    new, steps = tensors_of(model), {}
    for name in new:
        depth = depth_of(name, 2)
        step = ((new[name] - old[name]).abs().max() / RATE).item()
        steps[depth] = max(steps.get(depth, 0.0), step)
    expect(steps[0] > 0, "the embedding never learns: the last stage frees everything")
    expect(steps[3] > 0, "the head never learns")
    expect(
        steps[2] > 1.2 * steps[0],
        "the embedding moves as far as the last layer: it must learn in the last stage only. "
        "frozen goes down from layers + 1 to 0",
    )
    expect(steps[0] < 1.1, f"the embedding moved by {steps[0]:.1f} learning rates, though it "
           "may learn in one stage only, of one step here: is it thawed too early?")
    expect(all(p.requires_grad for p in model.parameters()), "something is still frozen in the "
           "end")


mix_battery = Battery("mix", "mix(old, new, share) -> weights", chapter=11,
                      takes=("old", "new", "share"))


@mix_battery.property("mixes the bodies number by number, and keeps the new head")
def mix_equal(function):
    one, other = scramble(nn.Linear(3, 2), 1), scramble(nn.Linear(3, 2), 2)
    steps = torch.tensor(3)
    old = {"body.weight": one.weight.detach(), "head.weight": one.bias.detach()[:, None],
           "body.steps": steps}
    new = {"body.weight": other.weight.detach(), "head.weight": other.bias.detach(),
           "body.steps": torch.tensor(8)}
    kept = [{k: v.clone() for k, v in weights.items()} for weights in (old, new)]
    for share in (0.0, 0.25, 1.0):
        mixed = function.run(lambda share=share: function.thing(old, new, share))
        expect(isinstance(mixed, dict) and set(mixed) == set(new), "it must return a dict with "
               "the names of the new weights")
        expect(
            near(mixed["head.weight"], new["head.weight"]),
            "the head is mixed: the old one answered another question (its shape may not "
            "even fit). Take the new one",
        )
        wanted = (1 - share) * old["body.weight"] + share * new["body.weight"]
        if not near(mixed["body.weight"], wanted):
            turned = share * old["body.weight"] + (1 - share) * new["body.weight"]
            raise Wrong("the shares are exchanged: share is the new weights' part"
                        if near(mixed["body.weight"], turned) else
                        f"with share={share:g} the body must be (1 - share) parts old and "
                        "share parts new")
        expect(not mixed["body.steps"].is_floating_point(), "whole numbers are mixed: take "
               "those of the new weights as they are")
    expect(same(old, kept[0]) and same(new, kept[1]), "the weights that were given are changed")


rehearsal_battery = Battery(
    "rehearsal_loss",
    "rehearsal_loss(reader, batch, labels, *, vocab_size, generator, weight=0.3) -> scalar",
    chapter=11, takes=("reader", "batch", "labels", "vocab_size", "generator", "weight"),
)


@rehearsal_battery.property("asks for the labels, and for the hidden words with a weight")
def rehearsal_equal(function):
    shape = Shape(vocab_size=30, num_labels=4)
    ids = torch.randint(5, 30, (8, 12), generator=torch.Generator().manual_seed(2))
    mask = torch.arange(12) < torch.tensor([12, 9, 5, 12, 7, 12, 8, 11])[:, None]
    ids = ids.masked_fill(~mask, 0)
    labels = torch.tensor([0, 3, 1, 2, 2, 0, 1, 3])
    for options, weight in (({}, 0.3), ({"weight": 2.0}, 2.0), ({"weight": 0.0}, 0.0)):
        reader = Watched(shape)
        batch = {"input_ids": ids.clone(), "attention_mask": mask.clone()}
        loss = function.run(lambda r=reader, b=batch, o=options: function.thing(
            r, b, labels.clone(), vocab_size=30,
            generator=torch.Generator().manual_seed(4), **o))
        expect(isinstance(loss, torch.Tensor) and loss.ndim == 0, "it must return a scalar "
               "tensor")
        expect(torch.equal(batch["input_ids"], ids), "the batch is changed")
        expect(len(reader.log) == 1, f"the model reads {len(reader.log)} times: one reading "
               "of the spoilt text answers both")
        seen = reader.log[0]
        expect(seen["mask"] is not None and torch.equal(seen["mask"], mask), "the attention "
               "mask does not reach the model")
        expect(seen["chosen"] is not None, "the chosen places do not reach the model")
        chosen = seen["chosen"]
        expect(
            0 < int(chosen.sum()) < 40 and not torch.equal(seen["ids"], ids),
            "the model is shown the unspoilt text, or everything is chosen: spoil it with "
            "corrupt, at the usual share of 0.15",
        )
        label_logits, word_logits = reader(seen["ids"], mask, chosen)
        right = nn.functional.cross_entropy(label_logits, labels)
        words = nn.functional.cross_entropy(word_logits, ids[chosen])
        spoilt = nn.functional.cross_entropy(word_logits, seen["ids"][chosen])
        for value, hint in (
            (right + weight * words, None),
            (right + words, "the weight of the words' loss is not used"),
            (right, "the words are not asked for"),
            (weight * words, "the labels are not asked for"),
            (right + weight * spoilt, "the words' loss asks for the spoilt ids: the answers "
             "are the ids before"),
            (weight * right + words, "the weight stands at the wrong loss"),
            ((1 - weight) * right + weight * words, "the labels' loss is weighted too: it is "
             "labels + weight · words"),
            (right + 0.3 * words, "the weight is fixed at 0.3"),
        ):
            if near(loss, value):
                if hint is None:
                    break
                raise Wrong(hint)
        else:
            raise Wrong("it is not cross_entropy of the labels + weight · "
                        f"masked_language_loss: here {right + weight * words:.4f}, but it is "
                        f"{loss:.4f}" + ("; its default weight is 0.3" if not options else ""))
        expect(loss.requires_grad, "no gradient flows back")


distil_battery = Battery(
    "distillation_loss",
    "distillation_loss(logits, teacher_logits, temperature) -> scalar", chapter=11,
    takes=("logits", "teacher_logits", "temperature"),
)
STUDENT = torch.tensor([[2.0, -1.0, 0.5], [0.0, 1.0, -2.0]])
TEACHER = torch.tensor([[1.0, 1.5, -1.0], [3.0, 0.0, 0.2]])


def distil(student, teacher, t):
    """T² · KL(teacher ‖ student), both softened; the mean over the texts."""
    p, q = (teacher / t).log_softmax(-1), (student / t).log_softmax(-1)
    return t * t * (p.exp() * (p - q)).sum(-1).mean()


@distil_battery.property("is T² times the divergence from the teacher's softened answers")
def distil_equal(function):
    for t in (1.0, 3.0):
        p, q = (TEACHER / t).log_softmax(-1), (STUDENT / t).log_softmax(-1)
        each = (p.exp() * (p - q)).sum(-1)
        wanted = t * t * each.mean()
        loss = function(STUDENT.clone(), TEACHER.clone(), t)
        expect(isinstance(loss, torch.Tensor) and loss.ndim == 0, "it must return a scalar "
               "tensor")
        for value, hint in (
            (wanted, None),
            (each.mean(), "the factor T² is missing: softening divides the gradients by it"),
            (t * each.mean(), "the factor is T, not T²"),
            (t * t * each.sum(), "it is the sum over the texts: take the mean (F.kl_div with "
             "reduction='batchmean')"),
            (t * t * each.mean() / 3, "it is the mean over the classes as well: reduction="
             "'batchmean', not 'mean'"),
            (t * t * (q.exp() * (q - p)).sum(-1).mean(), "student and teacher are exchanged: "
             "the teacher's chances are the weights"),
            (t * t * -(p.exp() * q).sum(-1).mean(), "the teacher's own entropy is not taken "
             "off: a student who answers as the teacher does must have a loss of 0"),
            (t * t * (TEACHER.softmax(-1) * (TEACHER.log_softmax(-1) - q)).sum(-1).mean(),
             "only the student is softened: divide both logits by T"),
            (t * t * (p.exp() * (p - STUDENT.log_softmax(-1))).sum(-1).mean(), "only the "
             "teacher is softened: divide both logits by T"),
            (distil(STUDENT, TEACHER, 1 / t), "the logits are multiplied by T, not divided"),
        ):
            if near(loss, value, 1e-4):
                if hint is None:
                    break
                raise Wrong(hint)
        else:
            raise Wrong(f"with T={t:g} it must be {wanted:.4f} here, but it is {loss:.4f}: "
                        "T² · Σ p · (log p − log q), p the teacher's and q the student's "
                        "chances at T, and the mean over the texts")


@distil_battery.property("teaches the student, not the teacher")
def distil_gradient(function):
    student, teacher = STUDENT.clone().requires_grad_(), TEACHER.clone().requires_grad_()
    loss = function(student, teacher, 2.0)
    expect(loss.requires_grad, "no gradient flows back")
    loss.backward()
    expect(student.grad is not None and student.grad.abs().max() > 0, "the student gets no "
           "gradient")
    expect(teacher.grad is None or teacher.grad.abs().max() == 0, "the teacher gets a "
           "gradient: it would learn to be easy to imitate. Detach its logits")
