"""Windows cut both grids into the same cells, for any size, and the bias index tells offsets apart."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clearsr_core.windows import bias_table_side, merge, partition, real_tokens, relative_index, window_counts

CPU = torch.device("cpu")
SIDES = st.integers(1, 21)


@settings(max_examples=60, deadline=None)
@given(height=SIDES, width=SIDES, window=st.sampled_from([1, 2, 4, 8]), batch=st.integers(1, 3))
def test_merge_undoes_partition_for_any_size(height, width, window, batch):
    """Nothing is lost, moved between items of the batch, or left of the padding."""
    grid = torch.arange(batch * height * width * 2).reshape(batch, height, width, 2)
    counts = window_counts(height, width, window)
    windows = partition(grid, window, counts)
    assert windows.shape == (batch * counts[0] * counts[1], window**2, 2)
    assert torch.equal(merge(windows, window, counts, (height, width)), grid)


@settings(max_examples=60, deadline=None)
@given(height=SIDES, width=SIDES, level=st.integers(0, 3))
def test_both_grids_have_the_same_windows(height, width, level):
    """Halving and rounding up level by level never needs another number of windows than the LR grid."""
    rows, columns = height, width
    for _ in range(level):
        rows, columns = (rows + 1) // 2, (columns + 1) // 2
    assert window_counts(rows, columns, 8 >> level) == window_counts(height, width, 8)


@settings(max_examples=60, deadline=None)
@given(height=SIDES, width=SIDES, window=st.sampled_from([1, 2, 4, 8]))
def test_every_window_has_a_real_token(height, width, window):
    """So no softmax ever runs over padding alone."""
    real = real_tokens(height, width, window, CPU)
    if height % window == 0 and width % window == 0:
        assert real is None
    else:
        assert real.any(dim=1).all()
        assert real.sum() == height * width


def test_cells_are_the_same_place_of_the_picture():
    """Query window n and LR window n cover the same cell: ratio 2, 2 x 3 cells."""
    rows, columns = torch.meshgrid(torch.arange(16), torch.arange(24), indexing="ij")
    cell = (rows // 8 * 3 + columns // 8)[None, :, :, None]
    fine = partition(cell, 8, (2, 3))
    coarse = partition(cell[:, ::2, ::2], 4, (2, 3))
    for number in range(6):
        assert (fine[number] == number).all() and (coarse[number] == number).all()


def test_a_grid_too_large_is_refused():
    with pytest.raises(ValueError, match="does not fit"):
        partition(torch.zeros(1, 9, 8, 1), 8, (1, 1))


def test_bias_table_sides_of_the_paper_sizes():
    """s = 8 at ratios 1, 2, 4, 8: 15, 14, 12, 8."""
    assert [bias_table_side(8 // r, r) for r in (1, 2, 4, 8)] == [15, 14, 12, 8]


@pytest.mark.parametrize(("query_window", "ratio"), [(8, 1), (4, 2), (2, 4), (1, 8), (3, 1), (2, 2)])
def test_relative_index_is_the_offset_and_uses_the_whole_table(query_window, ratio):
    """Two pairs share an entry exactly when their offsets agree, and no entry of the table is dead."""
    index = relative_index(query_window, ratio, CPU)
    side = query_window * ratio
    assert index.shape == (query_window**2, side**2)
    entries = {}
    for query in range(query_window**2):
        for key in range(side**2):
            offset = (
                key // side - ratio * (query // query_window),
                key % side - ratio * (query % query_window),
            )
            assert entries.setdefault(offset, int(index[query, key])) == int(index[query, key])
    assert sorted(entries.values()) == list(range(bias_table_side(query_window, ratio) ** 2))


def test_relative_index_is_swins_for_ratio_one():
    """Swin: (q - k + S - 1) per axis, in a table of side 2 S - 1; ours counts from the other end of each axis."""
    side = 4
    place = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")).flatten(1)  # (2, 16)
    offset = place[:, None, :] - place[:, :, None] + side - 1  # key minus query
    swin = offset[0] * (2 * side - 1) + offset[1]
    assert torch.equal(relative_index(side, 1, CPU), swin)
