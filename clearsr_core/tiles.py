"""Cutting a latent into overlapping tiles on the window grid, and blending what was computed on each (decision 0021).

Offsets are multiples of the key window, so a tile sees the windows of the whole picture. Each tile counts by a Gaussian
around its middle, and the weights of all tiles at one place sum to 1: blending is a sum of predictions times shares.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

GRID = 8  # latent pixels: the side of a key window
MIN_SIDE = 2 * GRID  # the smallest tile that leaves room for an overlap and for going forward
VARIANCE = 0.01  # of the Gaussian, in units of the tile's side


@dataclass(frozen=True)
class Tile:
    """A rectangle of the latent, in latent pixels."""

    top: int
    left: int
    height: int
    width: int

    def of(self, canvas: Tensor) -> Tensor:
        """Return a view of (..., H, W) that writes through, (..., height, width)."""
        return canvas[..., self.top : self.top + self.height, self.left : self.left + self.width]


@dataclass(frozen=True, eq=False)
class Layout:
    """How a latent is cut: tiles row by row, and the share of each at each of its pixels."""

    rows: int
    columns: int
    tiles: tuple[Tile, ...]
    shares: tuple[Tensor, ...]  # one (height, width) float32 for each tile, positive; all shares of a pixel sum to 1


def layout(height: int, width: int, side: int, overlap: int) -> Layout:
    """Cut a latent of `height` x `width` into tiles of at most `side` x `side`.

    Args:
        height, width: of the latent, at least 1.
        side: multiple of `GRID`, at least `MIN_SIDE`.
        overlap: by how much neighbours overlap at least; multiple of `GRID`, from `GRID` to side - `GRID`.
    """
    if side % GRID or side < MIN_SIDE or overlap % GRID or not GRID <= overlap < side:
        raise ValueError(f"tiles of {side} with an overlap of {overlap} do not lie on a grid of {GRID}")
    if height < 1 or width < 1:
        raise ValueError(f"a latent of {height} x {width} has nothing to cut")
    down, across = spans(height, side, overlap), spans(width, side, overlap)
    tiles = tuple(Tile(top, left, rows, columns) for (top, rows), (left, columns) in itertools.product(down, across))
    products = itertools.product(_axis_shares(height, down), _axis_shares(width, across))
    return Layout(len(down), len(across), tiles, tuple(rows[:, None] * columns for rows, columns in products))


def spans(length: int, side: int, overlap: int) -> list[tuple[int, int]]:
    """Cut one axis into (start, length) pieces.

    Starts are multiples of `GRID` and as evenly spread as that allows; the last piece ends where the axis ends. It is
    shorter than the others, by less than `GRID`, only where the axis is no multiple of `GRID`.
    """
    if length <= side:
        return [(0, length)]
    last = -(-(length - side) // GRID) * GRID
    gaps = -(-last // (side - overlap))
    starts = [number * last // gaps // GRID * GRID for number in range(gaps + 1)]
    return [(start, min(side, length - start)) for start in starts]


def gaussian(length: int) -> Tensor:
    """Return (length,) float64 weights exp(-d^2 / (2 `VARIANCE`)), d = distance from the middle over `length`."""
    distance = (torch.arange(length, dtype=torch.float64) - (length - 1) / 2) / length
    return torch.exp(-(distance**2) / (2 * VARIANCE))


def _axis_shares(length: int, pieces: list[tuple[int, int]]) -> list[Tensor]:
    """Normalise the Gaussians of one axis; a pixel of one piece alone has share 1 exactly."""
    total = torch.zeros(length, dtype=torch.float64)
    weights = [gaussian(size) for _, size in pieces]
    for (start, size), weight in zip(pieces, weights, strict=True):
        total[start : start + size] += weight
    return [
        (weight / total[start : start + size]).float() for (start, size), weight in zip(pieces, weights, strict=True)
    ]


def add(canvas: Tensor, tile: Tile, share: Tensor, values: Tensor) -> None:
    """Add one tile's share to the blend.

    Args:
        canvas: (B, C, H, W), written to; zero before the first tile.
        tile: where.
        share: (height, width) of the layout, on the canvas's device.
        values: (B, C, height, width) computed on this tile.
    """
    tile.of(canvas).add_(values.to(canvas.dtype) * share)
