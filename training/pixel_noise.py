"""Sensor noise of the degradation (Wang et al. 2021, Sec. 3.3): drawn equal for every device.

The random numbers come from a CPU generator and are copied to where the picture lies. How many are drawn depends on the
size of the picture alone, never on what it shows, so that the noise follows from the generator.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

LEVELS = 256
EXPONENTS = 9  # of the photon count of white: 2^0 .. 2^8
COUNTS = 512  # photon counts that are told apart: 16 standard deviations above the highest mean


def _drawn(values: Tensor, device: torch.device) -> Tensor:
    """Copy drawn numbers to `device` without waiting for the work that is queued there."""
    if device.type == "cuda":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


def add_gaussian_noise(image: Tensor, sigma: float, grey: bool, generator: torch.Generator) -> Tensor:
    """Add normal noise of `sigma` grey levels to (3, H, W) in [0, 1] on any device."""
    noise = torch.randn((1 if grey else 3, *image.shape[-2:]), generator=generator)
    return (image + _drawn(noise, image.device) * (sigma / 255.0)).clamp_(0.0, 1.0)


def alias_tables(probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Turn distributions into tables from which one uniform number draws a value without a search (Walker 1977).

    A row of K probabilities becomes K columns of equal width. The lower `keep` of column k stands for the value k, what
    lies above for the value `alias`.

    Args:
        probabilities: (R, K) float64, each row with sum 1.

    Returns:
        keep (R, K) float64 in [0, 1], alias (R, K) int64 in 0 .. K - 1.
    """
    rows, last = np.arange(len(probabilities)), probabilities.shape[1] - 1
    share = probabilities * probabilities.shape[1]
    order = np.argsort(share > 1.0, axis=1, kind="stable")  # columns with room first, then those with too much
    rooms = (share <= 1.0).sum(axis=1)
    keep, alias = np.ones_like(share), np.tile(np.arange(last + 1), (len(rows), 1))

    # One column is closed per turn: the next with room, filled up by the giver, or the giver once it has room itself.
    room, place = np.zeros_like(rooms), np.minimum(rooms, last)
    giver = order[rows, place]
    rest = share[rows, giver]
    for _ in range(last):
        gives = (rest > 1.0) & (room < rooms)
        successor = order[rows, np.minimum(place + 1, last)]
        column = np.where(gives, order[rows, np.minimum(room, last)], giver)
        keep[rows, column] = np.where(gives, share[rows, column], rest).clip(0.0, 1.0)
        alias[rows, column] = np.where(gives, giver, successor)
        rest += share[rows, np.where(gives, column, successor)] - 1.0
        giver = np.where(gives, giver, successor)
        room, place = room + gives, np.minimum(place + ~gives, last)
    return keep, alias


@functools.cache
def _poisson_tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the alias tables of all Poisson distributions that a pixel can have, by (exponent, level, count), flat."""
    means = 2.0 ** np.arange(EXPONENTS)[:, None] * np.arange(LEVELS) / (LEVELS - 1.0)
    mean, count = torch.from_numpy(means).flatten()[:, None], torch.arange(COUNTS, dtype=torch.float64)
    probabilities = torch.exp(torch.xlogy(count, mean) - mean - torch.lgamma(count + 1.0))
    keep, alias = alias_tables(probabilities.numpy())
    return torch.from_numpy(keep).float().flatten().to(device), torch.from_numpy(alias).short().flatten().to(device)


def add_poisson_noise(image: Tensor, scale: float, grey: bool, generator: torch.Generator) -> Tensor:
    """Add `scale` times the shot noise of (3, H, W) in [0, 1] on any device.

    The photon count of white is the number of distinct 8-bit levels in the picture, rounded up to a power of two:
    a flat picture is a noisy one.
    """
    source = image
    if grey:
        red, green, blue = image
        source = (0.299 * red + 0.587 * green + 0.114 * blue)[None]  # (1, H, W)
    levels = (source.clamp(0.0, 1.0) * 255.0).round_()

    # Photons of white, without asking the device how many there are.
    seen = torch.zeros(LEVELS, device=image.device).scatter_(0, levels.flatten().long(), 1.0)
    powers = 1 << torch.arange(EXPONENTS, device=image.device)
    exponent = (seen.sum() > powers[:-1]).sum(0, keepdim=True)

    # Counts: the table's column by the first 9 bits of a uniform number, value or alias by the others.
    position = _drawn(torch.rand(source.shape, generator=generator), image.device) * COUNTS
    column = position.floor()
    keep, alias = _poisson_tables(image.device)
    index = (levels * COUNTS + column).flatten().int() + (exponent * (LEVELS * COUNTS)).int()
    kept = (position - column).flatten() < keep.index_select(0, index)
    counts = torch.where(kept, column.flatten(), alias.index_select(0, index)).view_as(levels)
    noise = counts / powers.index_select(0, exponent) - levels / 255.0
    return (image + scale * noise).clamp_(0.0, 1.0)
