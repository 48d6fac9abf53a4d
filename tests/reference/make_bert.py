"""Write bert_tiny.json: what a tiny checkpoint makes of two texts, height by height.

    python tests/reference/make_bert.py

The weights come from a formula, under BERT's names, so the answers outlive any
version of PyTorch. Run this only when the model is meant to change, and check that
`tests/test_bert.py` passes afterwards: it holds the same file against Hugging Face.
"""

import json
import re
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from reference.make_classifier import by_formula

from emoformer.bert import from_pretrained

PATH = Path(__file__).with_name("bert_tiny.json")
CONFIG = {
    "model_type": "bert", "vocab_size": 11, "hidden_size": 6, "num_hidden_layers": 2,
    "num_attention_heads": 2, "intermediate_size": 10, "max_position_embeddings": 7,
    "type_vocab_size": 2, "layer_norm_eps": 1e-12, "hidden_act": "gelu",
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "pad_token_id": 0,
}
PIECES = "[PAD] [UNK] [CLS] [SEP] [MASK] a b ##a ##b ! ?".split()
BATCH = {
    "input_ids": [[2, 7, 5, 9, 3], [2, 8, 3, 0, 0]],
    "attention_mask": [[True] * 5, [True] * 3 + [False] * 2],
    "segment_ids": [[0, 0, 1, 1, 1], [0, 0, 0, 0, 0]],
}
WIDTH, WIDER = CONFIG["hidden_size"], CONFIG["intermediate_size"]
SHAPES = {  # of the modules inside one layer: inputs, outputs; one number: a norm
    "attention.self.query": (WIDTH, WIDTH), "attention.self.key": (WIDTH, WIDTH),
    "attention.self.value": (WIDTH, WIDTH), "attention.output.dense": (WIDTH, WIDTH),
    "attention.output.LayerNorm": (WIDTH,), "intermediate.dense": (WIDTH, WIDER),
    "output.dense": (WIDER, WIDTH), "output.LayerNorm": (WIDTH,),
}


def make_weights():
    """Make all tensors of the checkpoint, float32, under BERT's names."""
    modules = {
        "bert.embeddings.LayerNorm": (WIDTH,), "bert.pooler.dense": (WIDTH, WIDTH),
        "cls.predictions.transform.dense": (WIDTH, WIDTH),
        "cls.predictions.transform.LayerNorm": (WIDTH,),
    }
    for i in range(CONFIG["num_hidden_layers"]):
        modules |= {f"bert.encoder.layer.{i}.{name}": s for name, s in SHAPES.items()}
    shapes = {"cls.predictions.bias": (CONFIG["vocab_size"],)}
    for table, rows in (
        ("word", "vocab_size"), ("position", "max_position_embeddings"),
        ("token_type", "type_vocab_size"),
    ):
        shapes[f"bert.embeddings.{table}_embeddings.weight"] = (CONFIG[rows], WIDTH)
    for name, shape in modules.items():
        shapes[f"{name}.weight"] = shape[::-1]
        shapes[f"{name}.bias"] = shape[-1:]
    return {
        # by_formula knows a norm by our spelling
        name: by_formula(name.replace("LayerNorm", "norm"), shape).float()
        for name, shape in shapes.items()
    }


def write_folder(folder):
    """Write the checkpoint, without Hugging Face's help."""
    folder = Path(folder)
    (folder / "config.json").write_text(json.dumps(CONFIG), "utf-8")
    (folder / "vocab.txt").write_text("\n".join(PIECES) + "\n", "utf-8")
    save_file(make_weights(), folder / "model.safetensors")
    return folder


def tiny_batch():
    """Build the batch: two texts, one of them padded."""
    return {name: torch.tensor(rows) for name, rows in BATCH.items()}


@torch.no_grad()
def run(model, batch):
    """Return what stands at each height, and what the heads say."""
    states = model.hidden_states(*batch.values())
    values = {f"height {i}": state for i, state in enumerate(states)}
    values["pooler"] = model.pooler(states[-1])
    values["words"] = model.masked_head(states[-1])
    return values


def main():
    """Write the file."""
    with tempfile.TemporaryDirectory() as folder:
        model, _, _ = from_pretrained(write_folder(folder))
    values = {
        name: [[round(x, 12) for x in row] for row in value.flatten(0, -2).tolist()]
        for name, value in run(model.double(), tiny_batch()).items()
    }
    text = json.dumps({"config": CONFIG, "batch": BATCH, "values": values}, indent=1)
    # One line for each innermost list.
    text = re.sub(r"\[[^\[\]]*\]", lambda found: " ".join(found[0].split()), text)
    PATH.write_text(text + "\n")


if __name__ == "__main__":
    main()
