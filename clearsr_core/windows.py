"""Aligned windows: a query grid and the finer LR grid cut into the same N cells, and the bias index between them.

Eq. 2 demands L = N S^2 query tokens and l = N s^2 LR tokens with one N, so a query window of side S and an LR window
of side s = r S cover the same cell of the picture. Grids that do not divide are padded and the padding is masked.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


def window_counts(height: int, width: int, window: int) -> tuple[int, int]:
    """Return how many windows of side `window` cover a grid, (rows, columns), rounded up."""
    return -(-height // window), -(-width // window)


def partition(grid: Tensor, window: int, counts: tuple[int, int]) -> Tensor:
    """Cut a grid into windows, row by row; zeros fill what the grid does not reach.

    Args:
        grid: (B, h, w, C).
        window: side of a window in tokens.
        counts: (rows, columns) of windows; rows * window >= h, columns * window >= w.

    Returns:
        (B * rows * columns, window^2, C).
    """
    rows, columns = counts
    below, right = rows * window - grid.shape[1], columns * window - grid.shape[2]
    if below < 0 or right < 0:
        raise ValueError(f"a grid of {tuple(grid.shape[1:3])} does not fit {counts} windows of side {window}")
    if below or right:
        grid = F.pad(grid, (0, 0, 0, right, 0, below))
    return rearrange(grid, "b (n p) (m q) c -> (b n m) (p q) c", p=window, q=window)


def merge(windows: Tensor, window: int, counts: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Undo `partition`: (B * rows * columns, window^2, C) -> (B, h, w, C) with (h, w) = size; padding is cut off."""
    rows, columns = counts
    grid = rearrange(windows, "(b n m) (p q) c -> b (n p) (m q) c", n=rows, m=columns, p=window, q=window)
    return grid[:, : size[0], : size[1]]


def real_tokens(height: int, width: int, window: int, device: torch.device) -> Tensor | None:
    """Mark which tokens of each window are not padding.

    Every window holds at least one real token, because `window_counts` only rounds up.

    Returns:
        (rows * columns, window^2) bool, True = real; None where the grid divides and nothing is padded.
    """
    if height % window == 0 and width % window == 0:
        return None
    inside = torch.ones(1, height, width, 1, dtype=torch.bool, device=device)
    return partition(inside, window, window_counts(height, width, window))[..., 0]


def bias_table_side(query_window: int, ratio: int) -> int:
    """Return the side of the relative bias table: 2 s - r distinct offsets per axis (15, 14, 12, 8 for s = 8)."""
    return 2 * query_window * ratio - ratio


def relative_index(query_window: int, ratio: int, device: torch.device) -> Tensor:
    """Return where in the bias table each (query, LR token) pair of a window looks (B of Eq. 2).

    Per axis, on the fine grid, with the query at the first of the r fine tokens that it covers:

        index = k - r q + r (S - 1)      in 0 .. 2 s - r - 1

    For r = 1 this is Swin's relative position index; for S = 1 it still tells the s^2 LR tokens apart.

    Args:
        query_window: S, side of a query window.
        ratio: r = s / S, the ratio of the two resolutions.
        device: where to build it (on the fly: the networks hold no buffers).

    Returns:
        (S^2, s^2) int64 into a table of `bias_table_side`^2 rows.
    """
    queries = torch.arange(query_window, device=device)
    keys = torch.arange(query_window * ratio, device=device)
    axis = keys[None, :] - ratio * queries[:, None] + ratio * (query_window - 1)  # (S, s)
    pairs = axis[:, None, :, None] * bias_table_side(query_window, ratio) + axis[None, :, None, :]  # (S, S, s, s)
    return rearrange(pairs, "qy qx ky kx -> (qy qx) (ky kx)")
