"""Multi-head self-attention."""
# ---- imports
import math

import torch
import torch.nn.functional as F
from torch import nn


# ---- softmax
def masked_softmax(scores, mask=None):
    """Turn scores into weights along the last axis.

    The largest score is subtracted first, so that nothing overflows. Where
    the mask is False the weight is exactly 0; a row with no True at all
    gets zeros, not NaN.

    Args:
        scores: (…, keys), floating.
        mask: bool, broadcastable to ``scores``; True = may be attended to.

    Returns:
        A tensor shaped and typed like ``scores``; each row sums to 1, or to
        0 where its mask has no True.

    Raises:
        TypeError: the mask is not bool.
    """
    if mask is not None:
        if mask.dtype != torch.bool:
            raise TypeError(f"the mask must be bool, but it is {mask.dtype}")
        scores = scores.masked_fill(~mask, float("-inf"))
    top = scores.amax(dim=-1, keepdim=True).detach()
    top = top.masked_fill(top == float("-inf"), 0.0)  # an empty row
    weights = (scores - top).exp()
    total = weights.sum(dim=-1, keepdim=True)
    return weights / total.masked_fill(total == 0, 1.0)


# ---- attention
def scaled_dot_product_attention(query, key, value, mask=None):
    """Let each query take a weighted mean of the values.

    Args:
        query: (…, queries, d_head), floating.
        key: (…, keys, d_head).
        value: (…, keys, d_value).
        mask: bool, broadcastable to (…, queries, keys); True = may be
            attended to.

    Returns:
        The outputs (…, queries, d_value) and the weights
        (…, queries, keys).

    Source: Vaswani et al. (2017), section 3.2.1.
    """
    d_head = query.shape[-1]
    scores = query @ key.transpose(-2, -1) / math.sqrt(d_head)
    weights = masked_softmax(scores, mask)
    return weights @ value, weights


# ---- class
class MultiHeadSelfAttention(nn.Module):
    """Several attentions side by side, each in its own slice of d_model.

    Args:
        d_model: width of the vectors that come in and go out.
        num_heads: number of heads; must divide ``d_model``.
        dropout: share of attention weights dropped in training, in [0, 1).

    Raises:
        ValueError: ``num_heads`` does not divide ``d_model``.

    Source: Vaswani et al. (2017), section 3.2.2.
    """

    def __init__(self, *, d_model, num_heads, dropout=0.1):
        super().__init__()
        if num_heads < 1 or d_model % num_heads:
            raise ValueError(
                "num_heads must divide d_model, but d_model is "
                f"{d_model} and num_heads is {num_heads}"
            )
        self.num_heads = num_heads
        self.query = nn.Linear(d_model, d_model)
        self.key = nn.Linear(d_model, d_model)
        self.value = nn.Linear(d_model, d_model)
        self.output = nn.Linear(d_model, d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, attention_mask=None, return_weights=False):
        """Mix the tokens of each sequence.

        Args:
            x: (batch, seq_len, d_model).
            attention_mask: (batch, seq_len) bool, True = a real token; None
                where all are.
            return_weights: whether to return the weights as well.

        Returns:
            (batch, seq_len, d_model); with ``return_weights`` also the
            weights (batch, num_heads, seq_len, seq_len), before dropout.

        Raises:
            TypeError: the mask is not bool.
            ValueError: a shape does not fit, or the mask is on another
                device.
        """
        self._check(x, attention_mask)
        query = self._split(self.query(x))
        key = self._split(self.key(x))
        value = self._split(self.value(x))
        mask = None
        if attention_mask is not None:
            mask = attention_mask[:, None, None, :]  # (batch, 1, 1, seq_len)
        if return_weights:
            _, weights = scaled_dot_product_attention(query, key, value, mask)
            heads = self.dropout(weights) @ value
        else:  # the same mathematics in one call of PyTorch's
            heads = F.scaled_dot_product_attention(
                query, key, value, attn_mask=mask,
                dropout_p=self.dropout.p if self.training else 0.0,
            )
        # (batch, num_heads, seq_len, d_head) -> (batch, seq_len, d_model)
        out = self.output(heads.transpose(1, 2).flatten(start_dim=2))
        return (out, weights) if return_weights else out

    def _split(self, x):
        """(batch, seq_len, d_model) -> (batch, num_heads, seq_len, d_head)."""
        batch, seq_len, d_model = x.shape
        d_head = d_model // self.num_heads
        return x.view(batch, seq_len, self.num_heads, d_head).transpose(1, 2)

    def _check(self, x, attention_mask):
        """Refuse shapes, dtypes and devices that do not fit."""
        d_model = self.query.in_features
        if x.ndim != 3 or x.shape[-1] != d_model:
            raise ValueError(
                f"x must be (batch, seq_len, d_model={d_model}), but its "
                f"shape is {tuple(x.shape)}"
            )
        if attention_mask is None:
            return
        if attention_mask.dtype != torch.bool:
            raise TypeError(
                "attention_mask must be bool with True = a real token, but "
                f"it is {attention_mask.dtype}"
            )
        if attention_mask.shape != x.shape[:2]:
            raise ValueError(
                f"attention_mask must be (batch, seq_len) = "
                f"{tuple(x.shape[:2])}, but its shape is "
                f"{tuple(attention_mask.shape)}"
            )
        if attention_mask.device != x.device:
            raise ValueError(
                f"attention_mask must be on the device of x, {x.device}, "
                f"but it is on {attention_mask.device}"
            )
