"""Write classifier.json: what a tiny model answers, layer by layer.

    python tests/reference/make_classifier.py

The weights come from a formula, not from a random generator, so the answers
outlive any version of PyTorch. Run this only when the model is meant to
change, and check that `tests/test_model_parity.py` passes afterwards: it
holds the same file against Hugging Face's BERT.
"""

import json
import math
import re
from pathlib import Path

import torch

from emoformer.classifier import EmoformerConfig, pool
from emoformer.classifier import TransformerForSequenceClassification as Model

PATH = Path(__file__).with_name("classifier.json")
CONFIG = {
    "vocab_size": 11, "d_model": 6, "num_heads": 2, "num_layers": 2,
    "d_ff": 10, "max_len": 7, "num_labels": 6, "dropout": 0.0,
    "num_segments": 2,
}
BATCH = {
    "input_ids": [[2, 7, 5, 9, 3], [2, 8, 3, 0, 0]],
    "attention_mask": [[True] * 5, [True] * 3 + [False] * 2],
    "segment_ids": [[0, 0, 1, 1, 1], [0, 0, 0, 0, 0]],
}
POOLINGS = ("mean", "max", "cls")


def by_formula(name, shape):
    """Make weights from a sine of their index, different for each name."""
    size = math.prod(shape)
    phase = sum(map(ord, name)) % 97
    waves = [math.sin(1.7 * i + 0.31 * i * i / size + phase) for i in range(size)]
    weights = 0.5 * torch.tensor(waves, dtype=torch.float64).reshape(shape)
    is_scale = name.endswith("norm.weight")
    return weights / 2 + 1 if is_scale else weights


def tiny_model(dtype=torch.float64, **changes):
    """Build the tiny model in evaluation mode."""
    model = Model(EmoformerConfig(**(CONFIG | changes))).to(dtype).eval()
    model.load_state_dict({
        name: by_formula(name, weight.shape).to(dtype)
        for name, weight in model.state_dict().items()
    })
    return model


def tiny_batch():
    """Build the batch: two texts, one of them padded."""
    return {name: torch.tensor(rows) for name, rows in BATCH.items()}


def run(model, batch):
    """Return the shape and the values that leave each named part."""
    outputs = {}

    def keep(name):
        def hook(_, __, output):
            outputs[name] = output.detach()
        return hook

    handles = [
        module.register_forward_hook(keep(name))
        for name, module in model.named_modules()
        if name and "dropout" not in name and not name.endswith(".layers")
    ]
    hidden = model.encode(**batch)
    for handle in handles:
        handle.remove()
    shapes = {name: list(output.shape) for name, output in outputs.items()}
    stages = ("embedding", "embedding_norm", "encoder.layers.0", "encoder")
    values = {name: outputs[name] for name in stages}
    for how in POOLINGS:
        pooled = pool(hidden, batch["attention_mask"], how)
        values[f"logits {how}"] = model.head(pooled)
    return shapes, values


def main():
    """Write the file."""
    with torch.no_grad():
        shapes, values = run(tiny_model(), tiny_batch())
    values = {
        name: [[round(x, 12) for x in row] for row in value.flatten(0, -2).tolist()]
        for name, value in values.items()
    }
    text = json.dumps(
        {"config": CONFIG, "batch": BATCH, "shapes": shapes, "values": values},
        indent=1,
    )
    # One line for each innermost list.
    text = re.sub(r"\[[^\[\]]*\]", lambda found: " ".join(found[0].split()), text)
    PATH.write_text(text + "\n")


if __name__ == "__main__":
    main()
