"""The feed-forward layer: each token thinks for itself."""
# ---- imports
import math

import torch
from torch import nn


# ---- relu
def relu(x):
    """Replace negative numbers by 0.

    Args:
        x: any floating tensor.

    Returns:
        A tensor shaped like ``x``.
    """
    return x.clamp(min=0)


# ---- gelu
def gelu(x):
    """Multiply x by the chance that a standard normal number is below it.

    The exact form: x · ½ · (1 + erf(x / √2)).

    Args:
        x: any floating tensor.

    Returns:
        A tensor shaped like ``x``.

    Source: Hendrycks and Gimpel (2016).
    """
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def gelu_tanh(x):
    """Approximate `gelu` by a hyperbolic tangent.

    Args:
        x: any floating tensor.

    Returns:
        A tensor shaped like ``x``.

    Source: Hendrycks and Gimpel (2016), section 2.
    """
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    return x * 0.5 * (1 + torch.tanh(inner))


# ---- class
class FeedForward(nn.Module):
    """Widen each token's vector, bend it, and bring it back.

    Args:
        d_model: width of the vectors that come in and go out.
        d_ff: width in between; usually 4 · ``d_model``.
        activation: a function from tensor to tensor, elementwise.

    Source: Vaswani et al. (2017), section 3.3; BERT's activation is GELU.
    """

    def __init__(self, *, d_model, d_ff, activation=gelu):
        super().__init__()
        self.expand = nn.Linear(d_model, d_ff)
        self.contract = nn.Linear(d_ff, d_model)
        self.activation = activation

    def forward(self, x):
        """Apply the layer to each token alone.

        Args:
            x: (…, d_model).

        Returns:
            A tensor shaped like ``x``.

        Raises:
            ValueError: the last axis is not ``d_model`` wide.
        """
        if x.shape[-1] != self.expand.in_features:
            raise ValueError(
                f"the last axis of x must be d_model="
                f"{self.expand.in_features} wide, but its shape is "
                f"{tuple(x.shape)}"
            )
        hidden = self.activation(self.expand(x))  # (…, d_ff)
        return self.contract(hidden)  # (…, d_model)
