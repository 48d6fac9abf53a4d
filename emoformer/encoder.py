"""Layer normalisation, residual stream, and the stack of layers."""
# ---- imports
import torch
from torch import nn

from emoformer.attention import MultiHeadSelfAttention
from emoformer.feedforward import FeedForward


# ---- norm
class LayerNorm(nn.Module):
    """Give each token's vector mean 0 and variance 1, then scale and shift.

    The variance is the biased one (divided by d_model), and eps stands
    inside the root, as in the paper.

    Args:
        d_model: width of the vectors.
        eps: a small number that keeps a constant vector from dividing by 0.

    Source: Ba, Kiros and Hinton (2016). BERT's eps is 1e-12.
    """

    def __init__(self, d_model, *, eps=1e-12):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d_model))
        self.bias = nn.Parameter(torch.zeros(d_model))
        self.eps = eps

    def forward(self, x):
        """Normalise over the last axis.

        Args:
            x: (…, d_model).

        Returns:
            A tensor shaped like ``x``.

        Raises:
            ValueError: the last axis is not ``d_model`` wide.
        """
        if x.shape[-1] != self.weight.shape[0]:
            raise ValueError(
                f"the last axis of x must be d_model={self.weight.shape[0]} "
                f"wide, but its shape is {tuple(x.shape)}"
            )
        centred = x - x.mean(dim=-1, keepdim=True)
        variance = centred.square().mean(dim=-1, keepdim=True)
        return centred * torch.rsqrt(variance + self.eps) * self.weight + self.bias


# ---- layer
class EncoderLayer(nn.Module):
    """Attention and feed-forward, each with a residual and a norm.

    Args:
        d_model: width of the residual stream.
        num_heads: attention heads; must divide ``d_model``.
        d_ff: width inside the feed-forward layer.
        dropout: share dropped in training, of attention weights and of
            what each sublayer adds.
        norm_first: False for post-norm (BERT), True for pre-norm.
        layer_norm_eps: LayerNorm's eps.
        attention: class of the attention sublayer.
        feedforward: class of the feed-forward sublayer.
        norm: class of the norms.

    Source: Vaswani et al. (2017), section 3.1; pre-norm: Xiong et al.
    (2020).
    """

    def __init__(
        self, *, d_model, num_heads, d_ff, dropout=0.1, norm_first=False,
        layer_norm_eps=1e-12, attention=MultiHeadSelfAttention,
        feedforward=FeedForward, norm=LayerNorm,
    ):
        super().__init__()
        self.norm_first = norm_first
        self.attention = attention(
            d_model=d_model, num_heads=num_heads, dropout=dropout
        )
        self.feedforward = feedforward(d_model=d_model, d_ff=d_ff)
        self.attention_norm = norm(d_model, eps=layer_norm_eps)
        self.feedforward_norm = norm(d_model, eps=layer_norm_eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, attention_mask=None, return_weights=False):
        """Read from the residual stream and add to it, twice.

        Args:
            x: (batch, seq_len, d_model).
            attention_mask: (batch, seq_len) bool, True = a real token.
            return_weights: whether to return the attention weights as well.

        Returns:
            (batch, seq_len, d_model); with ``return_weights`` also
            (batch, num_heads, seq_len, seq_len).
        """
        attended = self.attention(
            self.attention_norm(x) if self.norm_first else x,
            attention_mask, return_weights,
        )
        weights = None
        if return_weights:
            attended, weights = attended
        x = x + self.dropout(attended)
        if self.norm_first:
            x = x + self.dropout(self.feedforward(self.feedforward_norm(x)))
        else:
            x = self.attention_norm(x)
            x = self.feedforward_norm(x + self.dropout(self.feedforward(x)))
        return (x, weights) if return_weights else x


# ---- stack
class TransformerEncoder(nn.Module):
    """Encoder layers one after the other.

    Pre-norm leaves the residual stream unnormalised at the end, so a last
    norm follows there.

    Args:
        num_layers: number of layers, at least 1.
        layer: class of the layers.
        norm: class of all norms.
        options: further arguments of the layer: ``d_model``, ``num_heads``,
            ``d_ff``, ``dropout``, ``norm_first``, ``layer_norm_eps``,
            ``attention``, ``feedforward``.

    Raises:
        ValueError: ``num_layers`` is below 1.
    """

    def __init__(
        self, *, num_layers, d_model, norm_first=False, layer_norm_eps=1e-12,
        layer=EncoderLayer, norm=LayerNorm, **options,
    ):
        super().__init__()
        if num_layers < 1:
            raise ValueError(
                f"num_layers must be at least 1, but it is {num_layers}"
            )
        self.layers = nn.ModuleList(
            layer(
                d_model=d_model, norm_first=norm_first,
                layer_norm_eps=layer_norm_eps, norm=norm, **options,
            )
            for _ in range(num_layers)
        )
        self.final_norm = (
            norm(d_model, eps=layer_norm_eps) if norm_first else None
        )

    def forward(self, x, attention_mask=None, return_weights=False):
        """Run the layers.

        Args:
            x: (batch, seq_len, d_model).
            attention_mask: (batch, seq_len) bool, True = a real token.
            return_weights: whether to return the attention weights as well.

        Returns:
            (batch, seq_len, d_model); with ``return_weights`` also a list
            of (batch, num_heads, seq_len, seq_len), one a layer.
        """
        all_weights = []
        for layer in self.layers:
            x = layer(x, attention_mask, return_weights)
            if return_weights:
                x, weights = x
                all_weights.append(weights)
        if self.final_norm is not None:
            x = self.final_norm(x)
        return (x, all_weights) if return_weights else x


# ---- init
def init_weights(module, *, std=0.02):
    """Draw a module's weights as BERT does; use with ``model.apply``.

    Linear and embedding weights come from a normal distribution cut off at
    two standard deviations, biases are 0; norms start as the identity.

    Args:
        module: any module; others than Linear and Embedding are left alone.
        std: the standard deviation before the cut.

    Source: Devlin et al. (2019); their code's ``truncated_normal(0.02)``.
    """
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
