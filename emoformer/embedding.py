"""Token ids become vectors that know where they stand."""
# ---- imports
import math

import torch
from torch import nn


# ---- sinusoid
def sinusoidal_positions(max_len, d_model):
    """Compute the table of sinusoidal positions.

    Column 2i holds sin(position / 10000^(2i / d_model)), column 2i + 1 the
    cosine of the same angle.

    Args:
        max_len: number of positions, at least 1.
        d_model: width of a vector, even and at least 2.

    Returns:
        A float32 tensor (max_len, d_model) with values in [-1, 1].

    Raises:
        ValueError: ``max_len`` is below 1, or ``d_model`` is odd or below 2.

    Source: Vaswani et al. (2017), section 3.5.
    """
    if max_len < 1:
        raise ValueError(f"max_len must be at least 1, but it is {max_len}")
    if d_model < 2 or d_model % 2:
        raise ValueError(
            "d_model must be even and at least 2, since each frequency takes "
            f"a sine and a cosine, but it is {d_model}"
        )
    position = torch.arange(max_len, dtype=torch.float64)[:, None]
    pair = torch.arange(0, d_model, 2, dtype=torch.float64)
    angle = position * torch.exp(-math.log(10_000) * pair / d_model)
    table = torch.stack([angle.sin(), angle.cos()], dim=-1)
    # (max_len, d_model / 2, 2) -> (max_len, d_model): sine, cosine, sine, …
    return table.flatten(start_dim=1).float()


# ---- class
class Embedding(nn.Module):
    """Token vectors plus position vectors (plus segment vectors).

    BERT's norm and dropout come after it, in the whole model (chapter 07).

    Args:
        vocab_size: number of tokens, at least 1.
        d_model: width of the vectors; even for sinusoidal positions.
        max_len: the longest sequence, at least 1.
        positions: ``"learned"`` (BERT), ``"sinusoidal"`` (Vaswani et al.;
            token vectors are then scaled by √d_model, as they do) or
            ``"none"``.
        num_segments: segments, as in BERT's sentence pairs; 0 for none.

    Source: Vaswani et al. (2017), sections 3.4 and 3.5; Devlin et al.
    (2019), section 3.
    """

    def __init__(
        self, *, vocab_size, d_model, max_len,
        positions="learned", num_segments=0,
    ):
        super().__init__()
        if positions not in ("learned", "sinusoidal", "none"):
            raise ValueError(
                "positions must be learned, sinusoidal or none, but it is "
                f"{positions!r}"
            )
        self.max_len = max_len
        self.token = nn.Embedding(vocab_size, d_model)
        self.position = self.segment = None
        self.scale = 1.0
        if positions == "learned":
            self.position = nn.Embedding(max_len, d_model)
        elif positions == "sinusoidal":
            self.scale = math.sqrt(d_model)
            # A buffer moves with the model; not saved, since it is computed.
            self.register_buffer(
                "table", sinusoidal_positions(max_len, d_model),
                persistent=False,
            )
        self.positions = positions
        if num_segments:
            self.segment = nn.Embedding(num_segments, d_model)

    def forward(self, input_ids, segment_ids=None):
        """Look up the vectors.

        Args:
            input_ids: (batch, seq_len) int64 in 0 … vocab_size - 1. The
                range is checked by `make_batch`, not here.
            segment_ids: (batch, seq_len) int64; all 0 when not given. Only
                with ``num_segments``.

        Returns:
            (batch, seq_len, d_model) in the dtype of the weights.

        Raises:
            TypeError: the ids are not int64.
            ValueError: the ids are not of rank 2, longer than ``max_len``,
                or segments are given to an embedding without any.
        """
        if input_ids.dtype != torch.int64:
            raise TypeError(
                f"input_ids must be int64, but they are {input_ids.dtype}"
            )
        if input_ids.ndim != 2:
            raise ValueError(
                "input_ids must be (batch, seq_len), but their shape is "
                f"{tuple(input_ids.shape)}"
            )
        seq_len = input_ids.shape[1]
        if seq_len > self.max_len:
            raise ValueError(
                f"seq_len must be at most max_len={self.max_len}, but it is "
                f"{seq_len}"
            )
        if segment_ids is not None and self.segment is None:
            raise ValueError(
                "segment_ids need num_segments of at least 1, but it is 0"
            )
        x = self.token(input_ids) * self.scale  # (batch, seq_len, d_model)
        if self.positions == "learned":
            x = x + self.position.weight[:seq_len]  # broadcast over the batch
        elif self.positions == "sinusoidal":
            x = x + self.table[:seq_len].to(x.dtype)
        if self.segment is not None:
            if segment_ids is None:
                segment_ids = torch.zeros_like(input_ids)
            x = x + self.segment(segment_ids)
        return x
