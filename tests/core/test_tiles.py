"""Tiles cover every pixel, lie on the window grid, and their shares make one whole of what was computed on them."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clearsr_core.tiles import GRID, Layout, Tile, add, gaussian, layout, spans

LENGTHS = st.integers(1, 300)
SIDES = st.integers(2, 12).map(lambda count: count * GRID)


@st.composite
def cuts(draw):
    """(side, overlap) that the node can ask for."""
    side = draw(SIDES)
    return side, draw(st.integers(1, side // GRID - 1)) * GRID


def blended(cut: Layout, canvas: torch.Tensor, values) -> torch.Tensor:
    """Blend `values(tile)` over all tiles."""
    result = torch.zeros_like(canvas)
    for tile, share in zip(cut.tiles, cut.shares, strict=True):
        add(result, tile, share, values(tile))
    return result


@settings(max_examples=200, deadline=None)
@given(length=LENGTHS, cut=cuts())
def test_spans_lie_on_the_grid_overlap_and_reach_the_end(length, cut):
    side, overlap = cut
    pieces = spans(length, side, overlap)
    assert pieces[0][0] == 0 and sum(pieces[-1]) == length
    for start, size in pieces:
        assert start % GRID == 0 and 0 < size <= side
    for (start, size), (following, _) in itertools.pairwise(pieces):
        assert size == side and start < following <= start + side - overlap
    if length % GRID == 0 and length >= side:
        assert {size for _, size in pieces} == {side}


@settings(max_examples=60, deadline=None)
@given(length=LENGTHS, cut=cuts())
def test_no_more_pieces_than_needed(length, cut):
    side, overlap = cut
    if length > side:
        padded = -(-(length - side) // GRID) * GRID + side
        assert len(spans(length, side, overlap)) == -(-(padded - overlap) // (side - overlap))


@settings(max_examples=60, deadline=None)
@given(height=LENGTHS, width=LENGTHS, cut=cuts())
def test_shares_are_positive_and_sum_to_one_at_every_pixel(height, width, cut):
    parts = layout(height, width, *cut)
    assert len(parts.tiles) == parts.rows * parts.columns
    assert all(bool((share > 0).all()) for share in parts.shares)
    canvas = torch.zeros(1, 1, height, width)
    total = blended(parts, canvas, lambda tile: torch.ones(1, 1, tile.height, tile.width))
    torch.testing.assert_close(total, torch.ones_like(canvas), rtol=0, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(height=LENGTHS, width=LENGTHS, cut=cuts(), value=st.floats(-100, 100, width=32))
def test_blending_what_each_tile_sees_gives_the_whole(height, width, cut, value):
    parts = layout(height, width, *cut)
    canvas = torch.linspace(-1, 1, 2 * height * width).reshape(1, 2, height, width) + value
    torch.testing.assert_close(blended(parts, canvas, lambda tile: tile.of(canvas)), canvas, rtol=1e-6, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(height=st.integers(1, 64), width=st.integers(1, 64))
def test_one_tile_is_the_identity_bit_for_bit(height, width):
    parts = layout(height, width, 64, 16)
    assert parts.tiles == (Tile(0, 0, height, width),)
    canvas = torch.randn(2, 4, height, width, generator=torch.Generator().manual_seed(height))
    assert torch.equal(blended(parts, canvas, lambda tile: tile.of(canvas)), canvas)


def test_a_pixel_of_one_tile_alone_is_that_tile_bit_for_bit():
    parts = layout(112, 64, 64, 16)
    assert [tile.top for tile in parts.tiles] == [0, 48]
    canvas = torch.randn(1, 4, 112, 64, generator=torch.Generator().manual_seed(1))
    result = blended(parts, canvas, lambda tile: tile.of(canvas) * 3.0)
    assert torch.equal(result[:, :, :48], canvas[:, :, :48] * 3.0)
    assert torch.equal(result[:, :, 64:], canvas[:, :, 64:] * 3.0)


def test_weights_as_specified():
    """exp(-d^2 / (2 * 0.01)) with d in units of the side: about 1e-5 at the edge."""
    weights = gaussian(101)
    for index in (0, 40, 50, 61, 100):
        assert float(weights[index]) == pytest.approx(math.exp(-(((index - 50) / 101) ** 2) / 0.02), rel=1e-12)


def test_shares_fall_from_one_tile_to_the_next():
    """Across an overlap the earlier tile gives way to the later one, half and half in the middle."""
    first, second = (share[0] for share in layout(32, 112, 64, 16).shares)
    overlap = first[48:]
    assert bool((overlap.diff() < 0).all())
    torch.testing.assert_close(overlap, second[:16].flip(0))
    assert float(overlap[0]) > 0.99 and float(overlap[-1]) < 0.01


@pytest.mark.parametrize(("side", "overlap"), [(64, 64), (64, 0), (60, 16), (64, 12), (8, 8), (0, 8)])
def test_what_does_not_lie_on_the_grid_is_refused(side, overlap):
    with pytest.raises(ValueError, match="do not lie on a grid of 8"):
        layout(100, 100, side, overlap)


def test_nothing_to_cut_is_refused():
    with pytest.raises(ValueError, match="nothing to cut"):
        layout(0, 10, 64, 16)
