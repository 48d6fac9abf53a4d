"""Three encoders with the same weights: ours, PyTorch's and Hugging Face's."""

import torch
from torch import nn
from transformers import BertConfig, BertModel

from emoformer.bert import name_table
from emoformer.classifier import EmoformerConfig, TransformerForSequenceClassification

SIZES = {"d_model": 192, "num_heads": 4, "num_layers": 3, "d_ff": 768}
VOCAB_SIZE = 4000


def bert_config(config):
    """Describe one of our models in Hugging Face's words."""
    return BertConfig(
        vocab_size=config.vocab_size, hidden_size=config.d_model,
        num_hidden_layers=config.num_layers, num_attention_heads=config.num_heads,
        intermediate_size=config.d_ff, max_position_embeddings=config.max_len,
        hidden_dropout_prob=config.dropout, attention_probs_dropout_prob=config.dropout,
        layer_norm_eps=config.layer_norm_eps, num_labels=config.num_labels,
        attn_implementation="sdpa",
    )


def copy_to_bert(ours, bert):
    """Give a `BertModel` the weights of a classifier of ours."""
    mine, theirs = ours.state_dict(), bert.state_dict()
    for name, other in name_table("bert", ours.config).items():
        name = name.removeprefix("classifier.")
        if name in mine and other in theirs:
            theirs[other] = mine[name]
    theirs["embeddings.token_type_embeddings.weight"] = torch.zeros(2, ours.config.d_model)
    bert.load_state_dict(theirs)


class TorchEncoder(nn.Module):
    """Our embedding under ``nn.TransformerEncoder``, with our weights."""

    def __init__(self, ours):
        super().__init__()
        config = ours.config
        self.embedding, self.norm = ours.embedding, ours.embedding_norm
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(
            config.d_model, config.num_heads, config.d_ff, config.dropout,
            activation="gelu", layer_norm_eps=config.layer_norm_eps, batch_first=True,
        ), config.num_layers)
        for mine, theirs in zip(ours.encoder.layers, self.encoder.layers, strict=True):
            theirs.load_state_dict(torch_names(mine))

    def forward(self, input_ids, attention_mask):
        x = self.norm(self.embedding(input_ids))
        return self.encoder(x, src_key_padding_mask=~attention_mask)


def torch_names(layer):
    """The weights of our layer, under the names of PyTorch's."""
    qkv = [layer.attention.query, layer.attention.key, layer.attention.value]
    weights = {
        "self_attn.in_proj_weight": torch.cat([part.weight for part in qkv]),
        "self_attn.in_proj_bias": torch.cat([part.bias for part in qkv]),
    }
    for name, part in {
        "self_attn.out_proj": layer.attention.output,
        "linear1": layer.feedforward.expand, "linear2": layer.feedforward.contract,
        "norm1": layer.attention_norm, "norm2": layer.feedforward_norm,
    }.items():
        weights |= {f"{name}.weight": part.weight, f"{name}.bias": part.bias}
    return weights


def our_encoder(max_len=256, **changes):
    """A post-norm encoder, without dropout so that all three compute the same."""
    torch.manual_seed(0)
    return TransformerForSequenceClassification(EmoformerConfig(
        vocab_size=VOCAB_SIZE, num_labels=4, max_len=max_len, dropout=0.0,
        **SIZES | changes,
    )).eval()


def make_rival(name):
    """Build one of the three.

    Args:
        name: ``"ours"``, ``"torch"`` or ``"transformers"``.

    Returns:
        A module and a function of ``(input_ids, attention_mask)`` that gives
        the tokens' vectors, (batch, seq_len, d_model).
    """
    ours = our_encoder()
    if name == "ours":
        return ours, ours.encode
    if name == "torch":
        theirs = TorchEncoder(ours).eval()
        return theirs, theirs
    bert = BertModel(bert_config(ours.config), add_pooling_layer=False).eval()
    copy_to_bert(ours, bert)
    return bert, lambda ids, mask: bert(ids, attention_mask=mask).last_hidden_state


RIVALS = ("ours", "torch", "transformers")


def make_input(batch, seq_len, shortest=0.87, seed=0):
    """Draw texts of different lengths, padded to ``seq_len``.

    Args:
        batch: number of texts.
        seq_len: length of the longest; there is one.
        shortest: length of the shortest, as a share of ``seq_len``. With
            0.87 some 93 % of the tokens are real, as in the book's batches
            (see `bucket_by_length`); with 0.15 57 %, as without bucketing.
        seed: an int.

    Returns:
        ``input_ids`` int64 and ``attention_mask`` bool, (batch, seq_len).
    """
    generator = torch.Generator().manual_seed(seed)
    low = max(1, round(shortest * seq_len))
    lengths = torch.randint(low, seq_len + 1, (batch, 1), generator=generator)
    lengths[0] = seq_len
    ids = torch.randint(5, VOCAB_SIZE, (batch, seq_len), generator=generator)
    mask = torch.arange(seq_len) < lengths
    return ids * mask, mask
