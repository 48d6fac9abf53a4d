"""Attention against loops and PyTorch's layers, and its behaviour."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from emoformer.attention import (
    MultiHeadSelfAttention,
    attention_weights,
    masked_softmax,
    scaled_dot_product_attention,
)

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
PATHS = pytest.mark.parametrize("written", [False, True], ids=["fused", "written"])


def close(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def run(layer, x, mask, written):
    """Take the written-out path or the fused one; return the output."""
    return layer(x, mask, return_weights=True)[0] if written else layer(x, mask)


def make_mask(lengths, seq_len):
    return torch.arange(seq_len) < torch.tensor(lengths)[:, None]


def grads(output, inputs):
    """Gradients of an uneven function of the output, so that no sign cancels."""
    tilt = torch.linspace(-1, 2, output.numel(), dtype=output.dtype)
    return torch.autograd.grad((output * tilt.view(output.shape)).sum(), inputs)


# masked_softmax


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_softmax_equals_torch_with_gradient(dtype):
    torch.manual_seed(0)
    scores = (5 * torch.randn(3, 5, 7, dtype=dtype)).requires_grad_()
    mask = make_mask([7, 4, 1], 7)[:, None, :]
    for m in (None, mask):
        filled = scores if m is None else scores.masked_fill(~m, float("-inf"))
        ours, theirs = masked_softmax(scores, m), filled.softmax(dim=-1)
        close(ours, theirs, TOLERANCE[dtype])
        (mine,), (other,) = grads(ours, scores), grads(theirs, scores)
        assert mine.abs().max() > 1e-3
        close(mine, other, TOLERANCE[dtype])


def test_softmax_cannot_overflow():
    for loud in (1e2, 1e4, 1e30):
        scores = torch.tensor([[loud, 0.0, -loud], [-loud, -loud, -loud]])
        scores.requires_grad_()
        weights = masked_softmax(scores)
        close(weights, torch.tensor([[1.0, 0, 0], [1 / 3] * 3]))
        assert grads(weights, scores)[0].isfinite().all()


@given(st.integers(1, 4), st.integers(1, 7), st.integers(0, 2**16))
@settings(deadline=None, max_examples=40)
def test_softmax_shares_out_one_or_nothing(rows, keys, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = 10 * torch.randn(rows, keys, generator=generator)
    mask = torch.rand(rows, keys, generator=generator) < 0.5
    weights = masked_softmax(scores, mask)
    assert (weights >= 0).all()
    assert (weights[~mask] == 0).all()
    close(weights.sum(dim=-1), mask.any(dim=-1).float())


def test_softmax_leaves_its_input_alone():
    scores, mask = torch.randn(2, 3), torch.tensor([True, False, True])
    before = scores.clone()
    masked_softmax(scores, mask)
    assert torch.equal(scores, before)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16]
)
def test_softmax_of_nothing_is_zeros_with_finite_gradient(dtype):
    scores = torch.randn(3, 5).to(dtype).requires_grad_()
    mask = make_mask([5, 0, 2], 5)
    weights = masked_softmax(scores, mask)
    assert weights.dtype == dtype
    assert torch.equal(weights[1], torch.zeros(5, dtype=dtype))
    (gradient,) = grads(weights, scores)
    assert gradient.isfinite().all()
    assert (gradient[~mask] == 0).all()
    assert gradient[0].abs().max() > 0


# The functions


def attention_by_loop(query, key, value, mask):
    """Write the formula down with Python's own numbers."""
    out = torch.zeros(len(query), value.shape[-1], dtype=value.dtype)
    for i in range(len(query)):
        seen = [j for j in range(len(key)) if mask[i, j]]
        scores = [float(query[i] @ key[j]) / len(query[i]) ** 0.5 for j in seen]
        total = sum(math.exp(s) for s in scores)
        for j, s in zip(seen, scores, strict=True):
            out[i] += math.exp(s) / total * value[j]
    return out


def test_function_equals_loop():
    torch.manual_seed(1)
    query = torch.randn(4, 3, dtype=torch.float64)
    key = torch.randn(6, 3, dtype=torch.float64)
    value = torch.randn(6, 5, dtype=torch.float64)
    mask = torch.rand(4, 6) < 0.6
    mask[2] = False
    out, weights = scaled_dot_product_attention(query, key, value, mask)
    close(out, attention_by_loop(query, key, value, mask), 1e-10)
    close(weights @ value, out, 1e-10)
    assert torch.equal(weights, attention_weights(query, key, mask))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("masked", [False, True])
def test_function_equals_torch_with_gradients(dtype, masked):
    torch.manual_seed(2)
    shapes = (2, 3, 5, 4), (2, 3, 7, 4), (2, 3, 7, 6)
    inputs = [torch.randn(s, dtype=dtype, requires_grad=True) for s in shapes]
    mask = make_mask([7, 2], 7)[:, None, None, :] if masked else None
    ours, _ = scaled_dot_product_attention(*inputs, mask)
    theirs = F.scaled_dot_product_attention(*inputs, attn_mask=mask)
    close(ours, theirs, TOLERANCE[dtype])
    for mine, other in zip(grads(ours, inputs), grads(theirs, inputs), strict=True):
        assert mine.abs().max() > 1e-3
        close(mine, other, TOLERANCE[dtype])


def test_half_precision_scores_do_not_overflow_before_the_scaling():
    loud = torch.full((2, 64), 40.0, dtype=torch.float16)  # 64 · 40² > 65504
    close(attention_weights(loud, loud), torch.full((2, 2), 0.5).half())


# The class against PyTorch's


def twin_of(layer):
    """Make an nn.MultiheadAttention with the weights of our layer."""
    d_model = layer.query.in_features
    twin = nn.MultiheadAttention(d_model, layer.num_heads, batch_first=True)
    three = (layer.query, layer.key, layer.value)
    with torch.no_grad():
        twin.in_proj_weight.copy_(torch.cat([part.weight for part in three]))
        twin.in_proj_bias.copy_(torch.cat([part.bias for part in three]))
    twin.out_proj.load_state_dict(layer.output.state_dict())
    return twin


@PATHS
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("d_model", "num_heads"), [(6, 1), (12, 3), (15, 5)])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_layer_equals_torch_with_gradients(dtype, d_model, num_heads, masked, written):
    torch.manual_seed(3)
    layer = MultiHeadSelfAttention(d_model=d_model, num_heads=num_heads, dropout=0.0)
    for part in (layer.query, layer.key, layer.value, layer.output):
        nn.init.normal_(part.bias)
    layer, theirs = layer.to(dtype), twin_of(layer).to(dtype)
    x = torch.randn(3, 7, d_model, dtype=dtype, requires_grad=True)
    mask = make_mask([7, 4, 1], 7) if masked else None
    # Here the two conventions meet: theirs is True for padding.
    expected, expected_weights = theirs(
        x, x, x, key_padding_mask=~mask if masked else None,
        average_attn_weights=False,
    )
    out = run(layer, x, mask, written)
    close(out, expected, TOLERANCE[dtype])
    if written:
        weights = layer(x, mask, return_weights=True)[1]
        close(weights, expected_weights, TOLERANCE[dtype])

    parts = (layer.query, layer.key, layer.value)
    ours = [x, *(p.weight for p in parts), *(p.bias for p in parts),
            layer.output.weight, layer.output.bias]
    mine = grads(out, ours)
    other = grads(expected, [x, theirs.in_proj_weight, theirs.in_proj_bias,
                             theirs.out_proj.weight, theirs.out_proj.bias])
    tolerance = 10 * TOLERANCE[dtype]  # the gradients are sums of 21 rows
    close(mine[0], other[0], tolerance)
    close(torch.cat(mine[1:4]), other[1], tolerance)
    close(torch.cat(mine[4:7]), other[2], tolerance)
    close(mine[7], other[3], tolerance)
    close(mine[8], other[4], tolerance)
    # The bias of the keys shifts whole rows: no effect, so no gradient.
    assert all(g.abs().max() > 1e-3 for i, g in enumerate(mine) if i != 5)
    close(mine[5], torch.zeros_like(mine[5]), tolerance)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 5e-2)],
)
def test_fused_equals_written_with_gradients(dtype, tolerance):
    torch.manual_seed(4)
    layer = MultiHeadSelfAttention(d_model=6, num_heads=2, dropout=0.0).to(dtype)
    x = torch.randn(4, 5, 6).to(dtype).requires_grad_()
    mask = make_mask([5, 3, 1, 0], 5)  # the last text is empty
    fused, written = run(layer, x, mask, False), run(layer, x, mask, True)
    close(fused, written, tolerance)
    inputs = [x, *layer.parameters()]
    for one, two in zip(grads(fused, inputs), grads(written, inputs), strict=True):
        close(one, two, 10 * tolerance)


# Weights on request


def test_returned_weights_are_the_ones_used():
    torch.manual_seed(5)
    layer = MultiHeadSelfAttention(d_model=6, num_heads=2).eval()
    x, mask = torch.randn(3, 5, 6), make_mask([5, 2, 0], 5)
    out, weights = layer(x, mask, return_weights=True)
    assert weights.shape == (3, 2, 5, 5)
    assert (weights.transpose(1, 3)[~mask] == 0).all()
    close(weights[:2].sum(dim=-1), torch.ones(2, 2, 5))
    assert (weights[2] == 0).all()
    value = layer.value(x).view(3, 5, 2, 3)
    mixed = torch.einsum("bhqk,bkhd->bqhd", weights, value).flatten(start_dim=2)
    close(layer.output(mixed), out)
    assert (weights[0, 0] - weights[0, 1]).abs().max() > 1e-3  # heads differ


def test_returned_weights_are_before_dropout():
    torch.manual_seed(6)
    layer = MultiHeadSelfAttention(d_model=6, num_heads=2, dropout=0.5)
    x = torch.randn(2, 5, 6)
    _, training = layer.train()(x, return_weights=True)
    _, evaluation = layer.eval()(x, return_weights=True)
    close(training, evaluation)


# Dropout


@PATHS
def test_dropout_is_right_on_average_and_off_in_eval(written):
    torch.manual_seed(7)
    layer = MultiHeadSelfAttention(d_model=6, num_heads=2, dropout=0.4)
    x = torch.randn(1, 4, 6).expand(20_000, 4, 6)
    with torch.no_grad():
        noisy = run(layer.train(), x, None, written)
        quiet = run(layer.eval(), x, None, written)
    assert torch.equal(quiet[0], quiet[1])
    assert noisy.std(dim=0).min() > 1e-3
    close(noisy.mean(dim=0), quiet[0], 0.02)


@PATHS
def test_dropout_falls_on_weights_and_not_on_numbers(written):
    torch.manual_seed(8)
    layer = MultiHeadSelfAttention(d_model=6, num_heads=1, dropout=0.5)
    nn.init.eye_(layer.output.weight)
    nn.init.zeros_(layer.output.bias)
    x = torch.randn(6).expand(50, 3, 6)  # all tokens equal: heads are c · value
    with torch.no_grad():
        ratio = run(layer, x, None, written) / layer.value(x)
    close(ratio, ratio[..., :1].expand_as(ratio), 1e-4)
    shares = ratio[..., 0].unique().tolist()  # 0, 1, 2 or 3 of 3 weights kept
    kept = sorted({round(share * 3 / 2, 3) for share in shares})
    assert kept == [0, 1, 2, 3]


# Behaviour


def some_batch(batch, seq_len, seed, least=1):
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    layer = MultiHeadSelfAttention(d_model=6, num_heads=3).eval()
    x = torch.randn(batch, seq_len, 6, generator=generator)
    lengths = torch.randint(least, seq_len + 1, (batch,), generator=generator)
    return layer, x, make_mask(lengths.tolist(), seq_len), generator


SIZES = st.integers(1, 4), st.integers(1, 6), st.integers(0, 2**16), st.booleans()


@given(*SIZES)
@settings(deadline=None, max_examples=30)
def test_padding_never_matters(batch, seq_len, seed, written):
    layer, x, mask, _ = some_batch(batch, seq_len, seed)
    noisy = x.masked_fill(~mask[:, :, None], 1e4)
    out = run(layer, x, mask, written)
    close(run(layer, noisy, mask, written)[mask], out[mask])


@given(*SIZES)
@settings(deadline=None, max_examples=30)
def test_text_alone_equals_text_in_batch(batch, seq_len, seed, written):
    layer, x, mask, _ = some_batch(batch, seq_len, seed)
    out = run(layer, x, mask, written)
    for i, length in enumerate(mask.sum(dim=1).tolist()):
        alone = run(layer, x[i : i + 1, :length], None, not written)
        close(out[i, :length], alone[0])


@given(*SIZES)
@settings(deadline=None, max_examples=30)
def test_shuffled_in_shuffled_out(batch, seq_len, seed, written):
    layer, x, mask, generator = some_batch(batch, seq_len, seed, least=0)
    order = torch.randperm(seq_len, generator=generator)
    shuffled = run(layer, x[:, order], mask[:, order], written)
    close(shuffled, run(layer, x, mask, written)[:, order])


@PATHS
def test_every_token_sees_exactly_the_real_ones_of_its_text(written):
    torch.manual_seed(9)
    layer = MultiHeadSelfAttention(d_model=4, num_heads=2, dropout=0.0).double()
    mask = make_mask([5, 3], 5)
    slopes = torch.autograd.functional.jacobian(
        lambda x: run(layer, x, mask, written),
        torch.randn(2, 5, 4, dtype=torch.float64),
    )
    sees = slopes.abs().amax(dim=(2, 5)) > 1e-9  # (text, token, text, token)
    for text in range(2):
        expected = mask[text].repeat(5, 1)
        if text == 1:  # a padded query depends on itself: it still asks
            expected[3, 3] = expected[4, 4] = True
        assert torch.equal(sees[text, :, text], expected)
        assert not sees[text, :, 1 - text].any()


@PATHS
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16]
)
def test_empty_text_gets_zeros_before_the_projection(dtype, grad, written):
    torch.manual_seed(10)
    layer = MultiHeadSelfAttention(d_model=6, num_heads=2, dropout=0.0).to(dtype)
    x = torch.randn(3, 5, 6).to(dtype).requires_grad_()
    with torch.set_grad_enabled(grad):
        out = run(layer, x, make_mask([5, 0, 2], 5), written)
    assert out.dtype == dtype
    assert out.isfinite().all()
    assert torch.equal(out[1], layer.output.bias.expand(5, 6))
    if grad:
        gradients = grads(out, [x, *layer.parameters()])
        assert all(g.isfinite().all() for g in gradients)
        assert (gradients[0][1] == 0).all()
        assert gradients[0][0].abs().max() > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@PATHS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_empty_text_on_a_gpu(dtype, written):
    layer = MultiHeadSelfAttention(d_model=64, num_heads=2, dropout=0.0)
    layer = layer.to("cuda", dtype)
    x = torch.randn(3, 40, 64, device="cuda", dtype=dtype, requires_grad=True)
    out = run(layer, x, make_mask([40, 0, 2], 40).cuda(), written)
    assert torch.equal(out[1], layer.output.bias.expand(40, 64))
    out.sum().backward()
    assert x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize(("d_model", "num_heads"), [(128, 4), (6, 1), (6, 6)])
def test_parameter_count_is_the_formula(d_model, num_heads):
    layer = MultiHeadSelfAttention(d_model=d_model, num_heads=num_heads)
    assert sum(p.numel() for p in layer.parameters()) == 4 * (d_model**2 + d_model)


# Errors


@pytest.mark.parametrize("num_heads", [0, -2, 4, 7])
def test_heads_must_divide_the_width(num_heads):
    with pytest.raises(ValueError, match=rf"d_model is 6 and.* is {num_heads}$"):
        MultiHeadSelfAttention(d_model=6, num_heads=num_heads)


@pytest.mark.parametrize("shape", [(2, 3, 5), (3, 6), (1, 2, 3, 6)])
def test_wrong_input_shape_quotes_rule_and_value(shape):
    layer = MultiHeadSelfAttention(d_model=6, num_heads=2)
    with pytest.raises(ValueError, match="d_model=6") as error:
        layer(torch.randn(shape))
    assert str(shape) in str(error.value)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_mask_must_be_bool(dtype):
    mask = torch.ones(2, 3, dtype=dtype)
    layer = MultiHeadSelfAttention(d_model=6, num_heads=2)
    for written in (False, True):
        with pytest.raises(TypeError, match=f"bool with True.*{dtype}"):
            run(layer, torch.randn(2, 3, 6), mask, written)
    with pytest.raises(TypeError, match=f"bool, but it is {dtype}"):
        masked_softmax(torch.randn(2, 3), mask)


@pytest.mark.parametrize("shape", [(2, 4), (3, 2), (3,), (2, 1, 3), (1, 3)])
def test_mask_must_fit(shape):
    layer = MultiHeadSelfAttention(d_model=6, num_heads=2)
    with pytest.raises(ValueError, match=r"seq_len\) = \(2, 3\)") as error:
        layer(torch.randn(2, 3, 6), torch.ones(shape, dtype=torch.bool))
    assert str(shape) in str(error.value)


def test_mask_must_be_on_the_same_device():
    layer = MultiHeadSelfAttention(d_model=6, num_heads=2)
    mask = torch.ones(2, 3, dtype=torch.bool, device="meta")
    with pytest.raises(ValueError, match="device of x, cpu, but it is on meta"):
        layer(torch.randn(2, 3, 6), mask)
