"""The embedding against PyTorch's lookup, and its positions against the formula."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from emoformer.embedding import Embedding, sinusoidal_positions

POSITIONS = ("none", "learned", "sinusoidal")
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


def make(seed=0, **changes):
    """A small embedding of odd sizes."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 11, "d_model": 6, "max_len": 9}
    return Embedding(**(sizes | changes))


def draw_ids(batch=3, seq_len=7, below=11, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(below, (batch, seq_len), generator=generator)


# The sinusoidal table


@pytest.mark.parametrize(("max_len", "d_model"), [(1, 2), (7, 6), (4999, 10)])
def test_table_is_the_formula(max_len, d_model):
    table = sinusoidal_positions(max_len, d_model)
    assert table.shape == (max_len, d_model)
    assert table.dtype == torch.float32
    for p in {0, 1, max_len // 2, max_len - 1} & set(range(max_len)):
        for i in range(d_model // 2):
            angle = p / 10_000 ** (2 * i / d_model)
            # Far below the 1e-4 that angles in float32 would be off by.
            assert table[p, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-6)
            assert table[p, 2 * i + 1].item() == pytest.approx(
                math.cos(angle), abs=1e-6
            )


@given(st.integers(0, 400), st.integers(-400, 400), st.integers(1, 9))
@settings(deadline=None, max_examples=50)
def test_a_shift_is_one_rotation_for_all_places(p, k, pairs):
    d_model = 2 * pairs
    q = p + k
    table = sinusoidal_positions(max(p, q, 0) + 1, d_model)
    angles = [k / 10_000 ** (2 * i / d_model) for i in range(pairs)]
    turn = torch.block_diag(*(
        torch.tensor([[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]])
        for a in angles
    ))
    if q >= 0:
        torch.testing.assert_close(table[p] @ turn, table[q], rtol=0, atol=1e-5)


def test_similarity_depends_on_the_distance_alone():
    table = sinusoidal_positions(64, 32)
    similarity = table @ table.T
    for distance in range(64):
        diagonal = similarity.diagonal(distance)
        torch.testing.assert_close(
            diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-4
        )
    torch.testing.assert_close(similarity.diagonal(), torch.full((64,), 16.0))


def test_a_longer_table_begins_with_the_shorter_one():
    assert torch.equal(sinusoidal_positions(50, 8)[:13], sinusoidal_positions(13, 8))


# Parity with PyTorch


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("num_segments", [0, 3])
@pytest.mark.parametrize("positions", POSITIONS)
def test_equals_torch_lookups_with_gradients(positions, num_segments, dtype):
    ours = make(positions=positions, num_segments=num_segments).to(dtype)
    ids, segments = draw_ids(), draw_ids(below=3, seed=1)
    places = torch.arange(7).expand(3, 7)
    weights = {
        name: p.detach().clone().requires_grad_()
        for name, p in ours.named_parameters()
    }
    expected = F.embedding(ids, weights["token.weight"])
    if positions == "learned":
        expected = expected + F.embedding(places, weights["position.weight"])
    elif positions == "sinusoidal":
        table = sinusoidal_positions(9, 6).to(dtype)
        expected = expected * math.sqrt(6) + F.embedding(places, table)
    if num_segments:
        expected = expected + F.embedding(segments, weights["segment.weight"])
    got = ours(ids, segments if num_segments else None)
    assert got.dtype == dtype
    tolerance = {"rtol": 0, "atol": TOLERANCE[dtype]}
    torch.testing.assert_close(got, expected, **tolerance)
    got.pow(3).sum().backward()
    expected.pow(3).sum().backward()
    assert len(weights) == 1 + (positions == "learned") + bool(num_segments)
    for name, parameter in ours.named_parameters():
        assert parameter.grad.abs().max() > 0
        # A cube's slopes reach hundreds, and sums run in another order.
        torch.testing.assert_close(
            parameter.grad, weights[name].grad, rtol=0,
            atol=100 * TOLERANCE[dtype],
        )


@given(st.lists(st.integers(0, 10), min_size=1, max_size=9), st.integers(0, 99))
@settings(deadline=None, max_examples=30)
def test_only_the_rows_looked_up_get_a_gradient(ids, seed):
    layer = make(seed, positions="learned")
    slopes = torch.randn(len(ids), 6, generator=torch.Generator().manual_seed(seed))
    layer(torch.tensor([ids])).backward(slopes[None])
    one_hot = F.one_hot(torch.tensor(ids), 11).float()
    torch.testing.assert_close(layer.token.weight.grad, one_hot.T @ slopes)
    learns = (layer.token.weight.grad != 0).any(dim=1)
    assert learns.nonzero().flatten().tolist() == sorted(set(ids))
    learns = (layer.position.weight.grad != 0).any(dim=1)
    assert learns.nonzero().flatten().tolist() == list(range(len(ids)))


# Behaviour


@given(st.permutations(range(7)), st.integers(0, 99))
@settings(deadline=None, max_examples=30)
def test_without_positions_order_is_invisible_and_with_them_it_is_not(order, seed):
    ids = torch.arange(7)[None]
    shuffled = ids[:, order]
    for positions in POSITIONS:
        layer = make(seed, positions=positions)
        x, y = layer(ids)[:, order], layer(shuffled)
        moved = torch.tensor(order) != torch.arange(7)
        if positions == "none":
            moved = torch.zeros(7, dtype=torch.bool)
        assert torch.equal((x != y).any(dim=-1)[0], moved)
        # The sum never sees the order: that takes a bend.
        torch.testing.assert_close(x.sum(dim=1), y.sum(dim=1), rtol=0, atol=1e-4)


@pytest.mark.parametrize("positions", POSITIONS)
def test_a_row_does_not_depend_on_its_batch_nor_a_token_on_its_neighbours(positions):
    layer, ids = make(positions=positions), draw_ids()
    whole = layer(ids)
    assert whole.shape == (3, 7, 6)
    assert torch.equal(layer(ids[1:2]), whole[1:2])
    assert torch.equal(layer(ids[:, :4]), whole[:, :4])


def test_a_text_of_exactly_max_len_passes():
    assert make()(draw_ids(seq_len=9)).shape == (3, 9, 6)


def test_only_sinusoidal_positions_scale_the_tokens():
    ids = draw_ids()
    for positions in POSITIONS:
        layer = make(positions=positions)
        before = layer(ids)
        with torch.no_grad():
            layer.token.weight.add_(1.0)
        grown = layer(ids) - before
        factor = math.sqrt(6) if positions == "sinusoidal" else 1.0
        torch.testing.assert_close(grown, torch.full_like(grown, factor))
        assert layer.scale == factor


def test_segments_are_0_when_not_given_and_matter_when_given():
    layer, ids = make(num_segments=2), draw_ids()
    zeros = torch.zeros_like(ids)
    assert torch.equal(layer(ids), layer(ids, zeros))
    some = zeros.clone()
    some[1, 2] = 1
    changed = (layer(ids, some) != layer(ids, zeros)).any(dim=-1)
    assert torch.equal(changed, some.bool())


# Where the table lives


def test_the_table_is_moved_but_neither_trained_nor_saved():
    layer = make(positions="sinusoidal")
    assert list(layer.state_dict()) == ["token.weight"]
    assert [name for name, _ in layer.named_parameters()] == ["token.weight"]
    assert not layer.table.requires_grad
    longer = make(positions="sinusoidal", max_len=20)
    longer.load_state_dict(layer.state_dict())  # strict
    assert torch.equal(longer(draw_ids()), layer(draw_ids()))
    assert layer.to("meta").table.device.type == "meta"


def test_learned_tables_are_saved_under_stable_names():
    layer = make(num_segments=2)
    assert {k: tuple(v.shape) for k, v in layer.state_dict().items()} == {
        "token.weight": (11, 6), "position.weight": (9, 6),
        "segment.weight": (2, 6),
    }


@pytest.mark.parametrize("positions", POSITIONS)
def test_bfloat16_in_bfloat16_out(positions):
    layer = make(positions=positions, num_segments=2).to(torch.bfloat16)
    assert layer(draw_ids()).dtype == torch.bfloat16


def test_in_bfloat16_the_table_is_the_exact_one_rounded_once():
    layer = make(positions="sinusoidal", max_len=512, d_model=128)
    exact = layer.table.clone()
    layer.to(torch.bfloat16)
    assert layer.table.dtype == torch.bfloat16
    assert torch.equal(layer.table, exact.to(torch.bfloat16))
    assert (layer.table.float() - exact).abs().max() <= 2**-9
    assert len(layer.table.unique(dim=0)) == 512


def test_output_has_the_dtype_of_the_weights_where_only_they_changed():
    layer = make(positions="sinusoidal")
    layer.token.to(torch.bfloat16)
    assert layer.table.dtype == torch.float32
    assert layer(draw_ids()).dtype == torch.bfloat16


@pytest.mark.parametrize("positions", POSITIONS)
def test_forward_never_reads_a_value(positions):
    # A meta tensor has no values: a range check in forward would raise.
    layer = make(positions=positions, num_segments=2).to("meta")
    ids = draw_ids().to("meta")
    assert layer(ids, ids).shape == (3, 7, 6)


# Errors


@pytest.mark.parametrize(("arguments", "message"), [
    ((0, 6), "max_len must be at least 1, but it is 0"),
    ((4, 7), "d_model must be even and at least 2.*it is 7"),
    ((4, 0), "d_model must be even and at least 2.*it is 0"),
])
def test_impossible_table_quotes_rule_and_value(arguments, message):
    with pytest.raises(ValueError, match=message):
        sinusoidal_positions(*arguments)


@pytest.mark.parametrize(("changes", "message"), [
    ({"vocab_size": 0}, "vocab_size must be at least 1, but it is 0"),
    ({"d_model": 0}, "d_model must be at least 1, but it is 0"),
    ({"max_len": 0}, "max_len must be at least 1, but it is 0"),
    ({"num_segments": -1}, "num_segments must be at least 0, but it is -1"),
    ({"positions": "rotary"},
     "positions must be learned, sinusoidal or none, but it is 'rotary'"),
    ({"positions": "sinusoidal", "d_model": 7}, "d_model must be even.*it is 7"),
])
def test_impossible_embedding_quotes_rule_and_value(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


@pytest.mark.parametrize("positions", POSITIONS)
def test_odd_width_is_fine_without_sinusoids_and_max_len_holds_for_all(positions):
    layer = make(positions=positions, d_model=6 if positions == "sinusoidal" else 7)
    with pytest.raises(ValueError, match="at most max_len=9, but it is 10"):
        layer(draw_ids(seq_len=10))


def test_wrong_input_quotes_rule_and_value():
    layer, ids = make(num_segments=2), draw_ids()
    with pytest.raises(TypeError, match="input_ids must be int64.*torch.int32"):
        layer(ids.int())
    with pytest.raises(ValueError, match=r"\(batch, seq_len\).*shape is \(7,\)"):
        layer(ids[0])
    with pytest.raises(TypeError, match="segment_ids must be int64.*torch.bool"):
        layer(ids, ids > 3)
    with pytest.raises(
        ValueError, match=r"segment_ids .* \(3, 7\), but their shape is \(1, 7\)"
    ):
        layer(ids, torch.zeros_like(ids[:1]))
    with pytest.raises(ValueError, match="num_segments of at least 1, but it is 0"):
        make()(ids, torch.zeros_like(ids))
