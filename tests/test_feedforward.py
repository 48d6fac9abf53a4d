"""The feed-forward layer against PyTorch's parts, and its behaviour."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from emoformer.feedforward import FeedForward, gelu, gelu_tanh, relu

PAIRS = [
    (relu, nn.ReLU()),
    (gelu, nn.GELU()),
    (gelu_tanh, nn.GELU(approximate="tanh")),
]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_activation_equals_torch_with_gradient(ours, theirs, dtype):
    x = torch.linspace(-12, 12, 241, dtype=dtype, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    ours(x).sum().backward()
    theirs(y).sum().backward()
    tolerance = {"rtol": 0, "atol": TOLERANCE[dtype]}
    torch.testing.assert_close(ours(x), theirs(y), **tolerance)
    inside = x.detach() != 0  # ReLU has no slope at 0
    torch.testing.assert_close(x.grad[inside], y.grad[inside], **tolerance)


def test_exact_gelu_is_not_the_approximation():
    x = torch.linspace(-4, 4, 81)
    assert (gelu(x) - gelu_tanh(x)).abs().max() > 1e-4


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_layer_equals_torch_parts_with_gradients(ours, theirs, dtype):
    torch.manual_seed(0)
    layer = FeedForward(d_model=7, d_ff=11, activation=ours).to(dtype)
    parts = nn.Sequential(nn.Linear(7, 11), theirs, nn.Linear(11, 7)).to(dtype)
    parts.load_state_dict({
        "0.weight": layer.expand.weight, "0.bias": layer.expand.bias,
        "2.weight": layer.contract.weight, "2.bias": layer.contract.bias,
    })
    x = torch.randn(3, 5, 7, dtype=dtype)
    tolerance = {"rtol": 0, "atol": TOLERANCE[dtype]}
    torch.testing.assert_close(layer(x), parts(x), **tolerance)
    layer(x).square().sum().backward()
    parts(x).square().sum().backward()
    for mine, other in zip(layer.parameters(), parts.parameters(), strict=True):
        assert mine.grad.abs().max() > 0
        torch.testing.assert_close(mine.grad, other.grad, **tolerance)


@given(st.integers(1, 4), st.integers(1, 6), st.integers(0, 2**16))
@settings(deadline=None, max_examples=25)
def test_no_token_sees_another(batch, seq_len, seed):
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    layer = FeedForward(d_model=6, d_ff=10)
    x = torch.randn(batch, seq_len, 6, generator=generator)
    changed = x.clone()
    changed[-1, -1] += 1.0
    same = torch.isclose(layer(x), layer(changed), atol=1e-6).all(dim=-1)
    expected = torch.ones(batch, seq_len, dtype=torch.bool)
    expected[-1, -1] = False
    assert torch.equal(same, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_keeps_dtype_and_shape(dtype):
    layer = FeedForward(d_model=6, d_ff=10).to(dtype)
    out = layer(torch.randn(2, 3, 6, dtype=dtype))
    assert out.shape == (2, 3, 6)
    assert out.dtype == dtype


def test_parameter_count_is_the_formula():
    layer = FeedForward(d_model=128, d_ff=512)
    count = sum(p.numel() for p in layer.parameters())
    assert count == 2 * 128 * 512 + 512 + 128


def test_wrong_width_quotes_rule_and_value():
    layer = FeedForward(d_model=6, d_ff=10)
    with pytest.raises(ValueError, match=r"d_model=6 wide.*\(2, 3, 5\)"):
        layer(torch.randn(2, 3, 5))
