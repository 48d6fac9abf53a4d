"""LayerNorm, layer and stack against PyTorch's, and their behaviour."""

import math
import shutil
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from emoformer.attention import MultiHeadSelfAttention
from emoformer.encoder import EncoderLayer, LayerNorm, TransformerEncoder, init_weights
from emoformer.feedforward import FeedForward, relu

SIZES = {"d_model": 6, "num_heads": 3, "d_ff": 11}
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
BOTH = pytest.mark.parametrize("norm_first", [False, True])
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE)
MASK = torch.tensor([
    [True, True, True, True, True],
    [True, True, True, False, False],
    [True, False, False, False, False],
])


def close(ours, theirs, dtype):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE[dtype])


def scramble(module):
    """Give every parameter, norms and biases too, a value of its own."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


def stack(num_layers=2, seed=0, **options):
    torch.manual_seed(seed)
    options = SIZES | {"dropout": 0.0} | options
    return scramble(TransformerEncoder(num_layers=num_layers, **options))


def torch_layer(ours, norm_first, activation="gelu", eps=1e-12):
    """PyTorch's layer with our layer's weights, copied by name."""
    theirs = nn.TransformerEncoderLayer(
        6, 3, 11, dropout=0.0, activation=activation, layer_norm_eps=eps,
        batch_first=True, norm_first=norm_first,
    ).to(ours.attention_norm.weight.dtype)
    theirs.load_state_dict(torch_tensors(ours, lambda p: p.detach()))
    return theirs


def torch_tensors(ours, get):
    """What ``get`` takes of our parameters, under PyTorch's names."""
    attention = ours.attention
    qkv = (attention.query, attention.key, attention.value)
    tensors = {
        "self_attn.in_proj_weight": torch.cat([get(p.weight) for p in qkv]),
        "self_attn.in_proj_bias": torch.cat([get(p.bias) for p in qkv]),
    }
    for name, part in {
        "self_attn.out_proj": attention.output,
        "linear1": ours.feedforward.expand,
        "linear2": ours.feedforward.contract,
        "norm1": ours.attention_norm,
        "norm2": ours.feedforward_norm,
    }.items():
        tensors[f"{name}.weight"] = get(part.weight)
        tensors[f"{name}.bias"] = get(part.bias)
    return tensors


def compare(ours, theirs, pairs, dtype, mask):
    """Outputs at real positions, and the gradients of input and weights."""
    x = torch.randn(3, 5, 6, dtype=dtype, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    mine = ours(x, mask)
    other = theirs(y, src_key_padding_mask=None if mask is None else ~mask)
    real = torch.ones_like(MASK) if mask is None else mask
    close(mine[real], other[real], dtype)
    # Not a sum: after a norm the sum is the same for every input.
    target = torch.randn(3, 5, 6, dtype=dtype)
    (mine - target)[real].square().mean().backward()
    (other - target)[real].square().mean().backward()
    close(x.grad, y.grad, dtype)
    for our_layer, their_layer in pairs:
        gradients = torch_tensors(our_layer, lambda p: p.grad)
        names = dict(their_layer.named_parameters())
        assert gradients.keys() == names.keys()
        for name, gradient in gradients.items():
            assert gradient.abs().max() > 0, name
            close(gradient, names[name].grad, dtype)


# --- LayerNorm


@DTYPES
@pytest.mark.parametrize("eps", [1e-12, 1e-5, 0.5])
def test_norm_equals_torch_with_gradients(dtype, eps):
    torch.manual_seed(0)
    ours = scramble(LayerNorm(7, eps=eps).to(dtype))
    theirs = nn.LayerNorm(7, eps=eps, dtype=dtype)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 5, 7, dtype=dtype).mul(2).add(1).requires_grad_()
    y = x.detach().clone().requires_grad_()
    close(ours(x), theirs(y), dtype)
    pull = torch.randn(2, 3, 5, 7, dtype=dtype)
    (ours(x) * pull).mean().backward()
    (theirs(y) * pull).mean().backward()
    close(x.grad, y.grad, dtype)
    close(ours.weight.grad, theirs.weight.grad, dtype)
    close(ours.bias.grad, theirs.bias.grad, dtype)


def test_norm_by_hand():
    normal = LayerNorm(4)(torch.tensor([1.0, 7, 7, 9]))
    torch.testing.assert_close(normal, torch.tensor([-5.0, 1, 1, 3]) / 3)


def test_norm_has_berts_eps():
    assert LayerNorm(4).eps == 1e-12
    layer = TransformerEncoder(num_layers=1, **SIZES).layers[0]
    assert layer.attention_norm.eps == layer.feedforward_norm.eps == 1e-12


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64]
)
def test_norm_of_a_constant_vector_is_a_number(dtype):
    x = torch.full((2, 5), 3.0, dtype=dtype, requires_grad=True)
    out = LayerNorm(5).to(dtype)(x)
    assert out.dtype == dtype
    assert (out == 0).all()
    out.sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_norm_computes_in_32_bits_inside(dtype):
    torch.manual_seed(0)
    x = (torch.randn(64, 128) * 300 + 100).to(dtype)  # squares beyond float16
    exact = LayerNorm(128)(x.float())
    out = LayerNorm(128).to(dtype)(x)
    # Rounded once, at the end: half a step of the last bit.
    step = torch.finfo(dtype).eps * exact.abs().clamp(min=0.01)
    assert ((out.float() - exact).abs() <= 0.51 * step).all()


@given(
    st.integers(0, 2**16), st.floats(0.5, 20.0), st.floats(-20.0, 20.0),
    st.sampled_from([-1.0, 1.0]),
)
@settings(deadline=None, max_examples=25)
def test_norm_forgets_scale_and_shift_but_not_sign(seed, scale, shift, sign):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 9, generator=generator, dtype=torch.float64)
    norm = LayerNorm(9).double()
    torch.testing.assert_close(
        norm(sign * scale * x + shift), sign * norm(x), rtol=0, atol=1e-8
    )


def test_norm_takes_away_the_mean_before_it_squares():
    torch.manual_seed(0)
    x = torch.randn(8, 128) + 5000
    exact = LayerNorm(128).double()(x.double()).float()
    torch.testing.assert_close(LayerNorm(128)(x), exact, rtol=0, atol=1e-3)


def test_norm_wrong_width_quotes_rule_and_value():
    with pytest.raises(ValueError, match=r"d_model=6 wide.*\(2, 3, 5\)"):
        LayerNorm(6)(torch.randn(2, 3, 5))


# --- parity


@BOTH
@DTYPES
@pytest.mark.parametrize("mask", [None, MASK], ids=["no mask", "mask"])
def test_layer_equals_torch_with_gradients(norm_first, dtype, mask):
    torch.manual_seed(1)
    ours = scramble(
        EncoderLayer(dropout=0.0, norm_first=norm_first, **SIZES).to(dtype)
    )
    theirs = torch_layer(ours, norm_first)
    compare(ours, theirs, [(ours, theirs)], dtype, mask)


@BOTH
@DTYPES
@pytest.mark.parametrize("mask", [None, MASK], ids=["no mask", "mask"])
def test_stack_equals_torch_with_gradients(norm_first, dtype, mask):
    ours = stack(num_layers=3, norm_first=norm_first).to(dtype)
    theirs = nn.TransformerEncoder(
        torch_layer(ours.layers[0], norm_first), 3,
        norm=nn.LayerNorm(6, eps=1e-12, dtype=dtype) if norm_first else None,
        enable_nested_tensor=False,
    )
    for mine, other in zip(ours.layers, theirs.layers, strict=True):
        other.load_state_dict(torch_tensors(mine, lambda p: p.detach()))
    if norm_first:
        theirs.norm.load_state_dict(ours.final_norm.state_dict())
    pairs = list(zip(ours.layers, theirs.layers, strict=True))
    compare(ours, theirs, pairs, dtype, mask)
    if norm_first:
        close(ours.final_norm.weight.grad, theirs.norm.weight.grad, dtype)
        close(ours.final_norm.bias.grad, theirs.norm.bias.grad, dtype)


@BOTH
def test_eps_reaches_every_norm(norm_first):
    ours = stack(num_layers=2, norm_first=norm_first, layer_norm_eps=0.5)
    norms = [m for m in ours.modules() if isinstance(m, LayerNorm)]
    assert [norm.eps for norm in norms] == [0.5] * (4 + norm_first)


@BOTH
def test_stack_is_its_layers_in_a_row(norm_first):
    ours = stack(num_layers=3, norm_first=norm_first)
    x = y = torch.randn(3, 5, 6)
    for layer in ours.layers:
        y = layer(y, MASK)
    y = ours.final_norm(y) if norm_first else y
    assert torch.equal(ours(x, MASK), y)


# --- behaviour


@BOTH
@given(st.integers(0, 2**16), st.floats(-1e3, 1e3))
@settings(deadline=None, max_examples=15)
def test_padding_never_changes_real_positions(norm_first, seed, filler):
    ours = stack(norm_first=norm_first, seed=seed).eval()
    x = torch.randn(3, 5, 6)
    y = x.clone()
    y[~MASK] = torch.randn(6) + filler
    a, b = ours(x, MASK), ours(y, MASK)
    torch.testing.assert_close(a[MASK], b[MASK], rtol=0, atol=1e-5)
    without = ours(y)  # and the mask is what does it
    assert (without[MASK] - b[MASK]).abs().max() > 1e-3


@BOTH
@given(st.integers(0, 2**16), st.integers(1, 5), st.integers(0, 4))
@settings(deadline=None, max_examples=15)
def test_text_alone_equals_text_in_batch(norm_first, seed, length, more):
    ours = stack(norm_first=norm_first, seed=seed).eval()
    text = torch.randn(1, length, 6)
    batch = torch.randn(3, length + more, 6)
    batch[1, :length] = text[0]
    mask = torch.ones(3, length + more, dtype=torch.bool)
    mask[1, length:] = False
    torch.testing.assert_close(
        ours(batch, mask)[1, :length], ours(text)[0], rtol=0, atol=1e-5
    )


@BOTH
@given(st.integers(0, 2**16), st.permutations(range(5)))
@settings(deadline=None, max_examples=15)
def test_shuffled_tokens_give_shuffled_outputs(norm_first, seed, order):
    ours = stack(norm_first=norm_first, seed=seed).eval()
    x = torch.randn(3, 5, 6)
    torch.testing.assert_close(
        ours(x[:, order], MASK[:, order]), ours(x, MASK)[:, order],
        rtol=0, atol=1e-5,
    )


@BOTH
def test_tokens_do_see_each_other(norm_first):
    ours = stack(norm_first=norm_first).eval()
    x = torch.randn(1, 5, 6)
    y = x.clone()
    y[0, 4] = torch.randn(6)
    assert ((ours(x) - ours(y))[0].abs().amax(dim=-1) > 1e-4).all()


@BOTH
def test_all_padding_row_is_finite_and_alone(norm_first):
    ours = stack(norm_first=norm_first)
    mask = MASK.clone()
    mask[1] = False
    x = torch.randn(3, 5, 6, requires_grad=True)
    watched, weights = ours(x, mask, return_weights=True)
    for out in (watched, ours(x, mask)):
        assert out.isfinite().all()
        (out * torch.randn(3, 5, 6)).sum().backward(retain_graph=True)
    assert all((layer[1] == 0).all() for layer in weights)
    assert x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in ours.parameters())
    rest = [0, 2]
    torch.testing.assert_close(
        ours(x, mask)[rest], ours(x[rest], mask[rest]), rtol=0, atol=1e-5
    )


@BOTH
def test_dropout_only_in_training(norm_first):
    ours = stack(norm_first=norm_first, dropout=0.5)
    x = torch.randn(3, 5, 6)
    assert not torch.equal(ours(x, MASK), ours(x, MASK))
    ours.eval()
    assert torch.equal(ours(x, MASK), ours(x, MASK))


@BOTH
def test_dropout_drops_what_is_added_and_never_the_stream(norm_first):
    ours = stack(num_layers=1, norm_first=norm_first).train()
    layer = ours.layers[0]
    layer.dropout.p = 1.0  # all that the sublayers add
    x = torch.randn(3, 5, 6)
    expected = x
    if not norm_first:
        expected = layer.feedforward_norm(layer.attention_norm(x))
    torch.testing.assert_close(layer(x, MASK), expected)


def test_dropout_reaches_attention_and_stream():
    layer = EncoderLayer(dropout=0.25, **SIZES)
    assert layer.attention.dropout.p == layer.dropout.p == 0.25
    assert EncoderLayer(**SIZES).dropout.p == 0.1


@BOTH
def test_every_parameter_gets_a_gradient(norm_first):
    ours = stack(num_layers=3, norm_first=norm_first)
    ours(torch.randn(3, 5, 6), MASK)[MASK].pow(3).sum().backward()
    for name, parameter in ours.named_parameters():
        size = parameter.grad.abs().max()
        if name.endswith("attention.key.bias"):
            # It moves all scores of a query alike, and softmax forgets that.
            assert size < 1e-4, name
        else:
            assert size > 1e-3, name


@BOTH
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_keeps_dtype_and_stays_close(norm_first, dtype):
    ours = stack(norm_first=norm_first).eval()
    x = torch.randn(3, 5, 6)
    exact = ours(x, MASK)
    out = ours.to(dtype)(x.to(dtype), MASK)
    assert out.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float64 else 0.15
    torch.testing.assert_close(
        out[MASK].float(), exact[MASK], rtol=0, atol=tolerance
    )


@BOTH
def test_weights_come_from_every_layer(norm_first):
    ours = stack(num_layers=3, norm_first=norm_first).eval()
    x = torch.randn(3, 5, 6)
    out, weights = ours(x, MASK, return_weights=True)
    close(out, ours(x, MASK), torch.float32)
    assert [tuple(w.shape) for w in weights] == [(3, 3, 5, 5)] * 3
    for layer, given_weights in zip(ours.layers, weights, strict=True):
        read = layer.attention_norm(x) if norm_first else x
        _, expected = layer.attention(read, MASK, return_weights=True)
        torch.testing.assert_close(given_weights, expected)
        x = layer(x, MASK)


# --- compiled


@BOTH
def test_compiled_graph_equals_eager_with_gradients(norm_first):
    torch._dynamo.reset()
    ours = stack(num_layers=1, norm_first=norm_first)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    x = torch.randn(3, 5, 6)
    target = torch.randn(3, 5, 6)
    results = []
    for model in (ours, compiled):
        ours.zero_grad()
        out = model(x, MASK)[MASK]
        (out - target[MASK]).square().mean().backward()
        results.append([out, *(p.grad.clone() for p in ours.parameters())])
    for eager, other in zip(*results, strict=True):
        close(eager, other, torch.float32)


@pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")),
    reason="inductor needs a C++ compiler, and none is found",
)
def test_compiled_code_equals_eager():
    torch._dynamo.reset()
    ours = stack(num_layers=1, norm_first=True).eval()
    compiled = torch.compile(ours, backend="inductor", fullgraph=True)
    x = torch.randn(3, 5, 6)
    with torch.no_grad():
        close(compiled(x, MASK)[MASK], ours(x, MASK)[MASK], torch.float32)


# --- parts put in from outside


def test_partial_feedforward_equals_torch_with_relu():
    torch.manual_seed(2)
    ours = scramble(EncoderLayer(
        dropout=0.0, feedforward=partial(FeedForward, activation=relu), **SIZES
    ))
    theirs = torch_layer(ours, False, activation="relu")
    compare(ours, theirs, [(ours, theirs)], torch.float32, MASK)


@BOTH
def test_torch_norm_fits_in_every_place(norm_first):
    ours = stack(norm_first=norm_first)
    other = stack(norm_first=norm_first, norm=nn.LayerNorm)
    assert not any(isinstance(m, LayerNorm) for m in other.modules())
    other.load_state_dict(ours.state_dict())
    x = torch.randn(3, 5, 6)
    close(ours(x, MASK), other(x, MASK), torch.float32)


def test_every_class_receives_its_numbers():
    calls = []

    def spy(name, made):
        def make(*args, **kwargs):
            calls.append((name, args, kwargs))
            return made(*args, **kwargs)

        return make

    attention = spy("attention", MultiHeadSelfAttention)
    feedforward = spy("feedforward", FeedForward)
    norm = spy("norm", LayerNorm)
    TransformerEncoder(
        num_layers=2, layer=spy("layer", EncoderLayer), attention=attention,
        feedforward=feedforward, norm=norm, dropout=0.3, norm_first=True,
        layer_norm_eps=0.5, **SIZES,
    )
    layer = (
        ("layer", (), SIZES | {
            "dropout": 0.3, "norm_first": True, "layer_norm_eps": 0.5,
            "attention": attention, "feedforward": feedforward, "norm": norm,
        }),
        ("attention", (), {"d_model": 6, "num_heads": 3, "dropout": 0.3}),
        ("feedforward", (), {"d_model": 6, "d_ff": 11}),
        ("norm", (6,), {"eps": 0.5}),
        ("norm", (6,), {"eps": 0.5}),
    )
    assert calls == [*layer, *layer, ("norm", (6,), {"eps": 0.5})]


def test_layers_do_not_share_weights():
    ours = stack(num_layers=3)
    pointers = [p.data_ptr() for p in ours.parameters()]
    assert len(pointers) == len(set(pointers)) == 3 * 16


# --- counts, errors, start


@BOTH
@pytest.mark.parametrize("num_layers", [1, 3])
def test_parameter_count_is_the_formula(norm_first, num_layers):
    d, f = 128, 512
    model = TransformerEncoder(
        num_layers=num_layers, d_model=d, num_heads=4, d_ff=f,
        norm_first=norm_first,
    )
    layer = 4 * (d * d + d) + 2 * d * f + f + d + 4 * d
    assert layer == 198_272
    count = sum(p.numel() for p in model.parameters())
    assert count == num_layers * layer + (2 * d if norm_first else 0)


@pytest.mark.parametrize("num_layers", [0, -2])
def test_too_few_layers_quotes_rule_and_value(num_layers):
    with pytest.raises(ValueError, match=f"at least 1, but it is {num_layers}$"):
        TransformerEncoder(num_layers=num_layers, **SIZES)


def test_a_misspelt_option_is_refused():
    with pytest.raises(TypeError, match="drop_out"):
        TransformerEncoder(num_layers=1, drop_out=0.1, **SIZES)


@pytest.mark.parametrize("kind", [nn.Linear, nn.Embedding])
@pytest.mark.parametrize("std", [0.02, 1.0])
def test_start_is_cut_at_two_standard_deviations(kind, std):
    torch.manual_seed(0)
    module = kind(300, 400)
    init_weights(module, std=std)
    weight = module.weight.detach()
    density = math.exp(-2) / math.sqrt(2 * math.pi)
    narrower = math.sqrt(1 - 4 * density / math.erf(math.sqrt(2)))
    assert 1.99 * std < weight.abs().max() <= 2 * std
    assert weight.std().item() == pytest.approx(narrower * std, rel=0.01)
    assert abs(weight.mean().item()) < 0.02 * std
    # Cut, not clipped: no pile at the edge.
    assert (weight.abs() > 1.999 * std).float().mean() < 0.001


def test_start_has_no_biases_and_leaves_the_rest_alone():
    model = scramble(nn.Sequential(
        nn.Linear(5, 4), nn.Linear(4, 3, bias=False), LayerNorm(3),
        nn.Conv1d(3, 3, 1),
    ))
    norm = {k: v.clone() for k, v in model[2].state_dict().items()}
    convolution = model[3].weight.clone()
    model.apply(init_weights)
    assert (model[0].bias == 0).all()
    assert model[1].weight.abs().max() <= 0.04
    assert all(torch.equal(norm[k], v) for k, v in model[2].state_dict().items())
    assert torch.equal(convolution, model[3].weight)


def test_start_of_a_stack_is_berts():
    torch.manual_seed(0)
    model = TransformerEncoder(num_layers=2, norm_first=True, **SIZES)
    model.apply(init_weights)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            expected = 1.0 if name.endswith("weight") else 0.0
            assert (parameter == expected).all(), name
        elif name.endswith("bias"):
            assert (parameter == 0).all(), name
        else:
            assert 0.01 < parameter.std() < 0.025, name
