"""The whole model: from token ids to one score per emotion."""
# ---- imports
from dataclasses import dataclass

import torch
from torch import nn

from emoformer.attention import MultiHeadSelfAttention
from emoformer.embedding import Embedding
from emoformer.encoder import EncoderLayer, LayerNorm
from emoformer.encoder import TransformerEncoder, init_weights
from emoformer.feedforward import FeedForward


# ---- pool
def pool(hidden, attention_mask=None, how="mean"):
    """Turn one vector per token into one vector per text.

    Padding never counts. A row of nothing but padding gives zeros.

    Args:
        hidden: (batch, seq_len, d_model).
        attention_mask: (batch, seq_len) bool, True = a real token; None
            where all are.
        how: ``"mean"`` or ``"max"`` over the real tokens, or ``"cls"`` for
            the first token.

    Returns:
        (batch, d_model).

    Raises:
        ValueError: ``how`` is none of the three.
    """
    if how not in ("cls", "mean", "max"):
        raise ValueError(f"how must be cls, mean or max, but it is {how!r}")
    if how == "cls":
        return hidden[:, 0]
    if attention_mask is None:
        return hidden.mean(dim=1) if how == "mean" else hidden.amax(dim=1)
    real = attention_mask[:, :, None]  # (batch, seq_len, 1)
    if how == "mean":
        total = hidden.masked_fill(~real, 0.0).sum(dim=1)
        return total / real.sum(dim=1).clamp(min=1)
    top = hidden.masked_fill(~real, float("-inf")).amax(dim=1)
    return top.masked_fill(~real.any(dim=1), 0.0)  # not -inf


# ---- config
@dataclass(frozen=True)
class EmoformerConfig:
    """Every number that shapes the model, checked when it is made.

    Args:
        vocab_size: number of tokens.
        d_model: width of the residual stream.
        num_heads: attention heads; must divide ``d_model``.
        num_layers: encoder layers.
        d_ff: width inside the feed-forward layers.
        max_len: the longest sequence.
        num_labels: classes; anger, joy, optimism, sadness, fear, love.
        dropout: share dropped in training, in [0, 1).
        positions: learned, sinusoidal or none.
        num_segments: segment vectors, as in BERT's sentence pairs; 0: none.
        norm_first: False for post-norm (BERT), True for pre-norm.
        pooling: mean, max or cls.
        layer_norm_eps: LayerNorm's eps, above 0.

    Raises:
        ValueError: a number breaks its rule.
    """

    vocab_size: int
    d_model: int = 128
    num_heads: int = 4
    num_layers: int = 2
    d_ff: int = 512
    max_len: int = 128
    num_labels: int = 6
    dropout: float = 0.1
    positions: str = "learned"
    num_segments: int = 0
    norm_first: bool = False
    pooling: str = "mean"
    layer_norm_eps: float = 1e-12

    def __post_init__(self):
        for name in (
            "vocab_size", "d_model", "num_heads", "num_layers", "d_ff",
            "max_len", "num_labels",
        ):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        self._require(
            "num_heads", self.d_model % self.num_heads == 0,
            f"a divisor of d_model={self.d_model}",
        )
        self._require("num_segments", self.num_segments >= 0, "at least 0")
        self._require("dropout", 0 <= self.dropout < 1, "in [0, 1)")
        self._require("layer_norm_eps", self.layer_norm_eps > 0, "above 0")
        for name, choices in (
            ("positions", ("learned", "sinusoidal", "none")),
            ("pooling", ("mean", "max", "cls")),
        ):
            self._require(
                name, getattr(self, name) in choices, "one of "
                + ", ".join(choices),
            )

    def _require(self, name, holds, rule):
        """Raise ValueError with the rule and the value unless it holds."""
        if not holds:
            raise ValueError(
                f"{name} must be {rule}, but it is {getattr(self, name)!r}"
            )


# ---- count
def count_parameters(config):
    """Count the model's parameters by formula, without building it.

    Args:
        config: an `EmoformerConfig`.

    Returns:
        A dict with one number for each part, and their ``total``.
    """
    d, f = config.d_model, config.d_ff
    norm = 2 * d
    rows = config.vocab_size + config.num_segments
    if config.positions == "learned":
        rows += config.max_len
    counts = {
        "embedding": rows * d + norm,
        "attention": config.num_layers * 4 * (d * d + d),
        "feed-forward": config.num_layers * (2 * d * f + f + d),
        "norms": config.num_layers * 2 * norm + config.norm_first * norm,
        "head": d * config.num_labels + config.num_labels,
    }
    return counts | {"total": sum(counts.values())}


# ---- model
class TransformerForSequenceClassification(nn.Module):
    """Embedding, encoder, pooling and a head: text in, scores out.

    Args:
        config: an `EmoformerConfig`.
        embedding: class of the embedding.
        encoder: class of the stack.
        layer: class of the encoder layers.
        attention: class of the attention sublayers.
        feedforward: class of the feed-forward sublayers.
        norm: class of the norms.

    Source: Devlin et al. (2019), section 3.2, with a choice of pooling.
    """

    def __init__(
        self, config, *, embedding=Embedding, encoder=TransformerEncoder,
        layer=EncoderLayer, attention=MultiHeadSelfAttention,
        feedforward=FeedForward, norm=LayerNorm,
    ):
        super().__init__()
        self.config = config
        self.embedding = embedding(
            vocab_size=config.vocab_size, d_model=config.d_model,
            max_len=config.max_len, positions=config.positions,
            num_segments=config.num_segments,
        )
        self.embedding_norm = norm(config.d_model, eps=config.layer_norm_eps)
        self.encoder = encoder(
            num_layers=config.num_layers, d_model=config.d_model,
            num_heads=config.num_heads, d_ff=config.d_ff,
            dropout=config.dropout, norm_first=config.norm_first,
            layer_norm_eps=config.layer_norm_eps, layer=layer,
            attention=attention, feedforward=feedforward, norm=norm,
        )
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(config.d_model, config.num_labels)
        self.apply(init_weights)

    def forward(
        self, input_ids, attention_mask=None, segment_ids=None,
        return_weights=False,
    ):
        """Score a batch of texts.

        Args:
            input_ids: (batch, seq_len) int64.
            attention_mask: (batch, seq_len) bool, True = a real token; None
                where all are.
            segment_ids: (batch, seq_len) int64, only with segments.
            return_weights: whether to return the attention weights as well.

        Returns:
            Logits (batch, num_labels); with ``return_weights`` also a list
            of (batch, num_heads, seq_len, seq_len), one a layer.
        """
        hidden = self.encode(
            input_ids, attention_mask, segment_ids, return_weights
        )
        if return_weights:
            hidden, weights = hidden
        pooled = pool(hidden, attention_mask, self.config.pooling)
        logits = self.head(self.dropout(pooled))  # (batch, num_labels)
        return (logits, weights) if return_weights else logits

    def encode(
        self, input_ids, attention_mask=None, segment_ids=None,
        return_weights=False,
    ):
        """Give one vector per token: the model without pooling and head.

        Args and shapes are those of `forward`.

        Returns:
            (batch, seq_len, d_model); with ``return_weights`` also the list
            of weights.
        """
        x = self.embedding(input_ids, segment_ids)
        x = self.dropout(self.embedding_norm(x))
        return self.encoder(x, attention_mask, return_weights)
