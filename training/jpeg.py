"""What a baseline JPEG file does to pixels, without the file and on any device (ITU-T T.81, colour at half resolution).

Every step is integer arithmetic, part of it held in float64, that rounds where libjpeg-turbo rounds: the pixels are
those that Pillow reads back from a file of the same quality, bit for bit.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 8  # side of a block in pixels
UNIT = 16  # side of what four blocks of brightness and one of each colour cover
# T.81, Annex K.1: steps of quantisation at quality 50, by frequency downwards and to the right.
LUMA = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
CHROMA = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    *((99,) * 8,) * 4,
)
COLOUR_BITS = 16  # fraction of the fixed-point numbers that convert colours
HALF = 2 ** (COLOUR_BITS - 1)
DCT_BITS = 13  # fraction of those of the transform
KEPT_BITS = 2  # fraction that is kept between the transform along rows and along columns
NARROW = 2  # colour columns up to which libjpeg repeats colours instead of interpolating them


def _fixed(value: float, bits: int) -> int:
    return math.floor(value * 2**bits + 0.5)


def _shift(values: Tensor, bits: int) -> Tensor:
    """Divide by 2^bits and round, halves upwards; `values` are integers in float64."""
    return torch.floor((values + 2.0 ** (bits - 1)) * 2.0**-bits)


def _steps(basic: tuple[tuple[int, ...], ...], quality: int) -> Tensor:
    """Return the steps of quantisation at `quality` 1 .. 100 by the IJG's formula, (8, 8) integers in 1 .. 255."""
    percent = 5000 // quality if quality < 50 else 200 - 2 * quality
    return ((torch.tensor(basic) * percent + 50) // 100).clamp(1, 255)


@functools.cache
def _dct(device: torch.device) -> Tensor:
    """Return sqrt(8) x DCT, (8 frequencies, 8 places), as float64 integers in units of 2^-13.

    libjpeg uses the fast transform of Loeffler, Ligtenberg and Moschytz with rounded constants. In exact integers that
    is one product with a matrix, whose entries are the sums of these constants: up to 2 away from the rounded cosines.
    """
    c = [math.cos(k * math.pi / 16) * math.sqrt(2) for k in range(8)]

    def constant(value: float) -> int:
        return _fixed(value, DCT_BITS)

    # Frequencies 2 and 6 turn the two differences of the folded input; 1, 3, 5 and 7 share five products.
    turn = constant(c[6])
    near, far = turn + constant(c[2] - c[6]), turn - constant(c[2] + c[6])
    shared = constant(c[3])
    outer, inner = shared - constant(c[3] - c[7]), shared - constant(c[1] + c[3])
    odd, even = shared - constant(c[3] + c[5]), shared - constant(c[3] - c[5])
    one = 2**DCT_BITS
    folded = torch.tensor(
        [
            [one, one, one, one],
            [constant(c[1] + c[3] - c[5] - c[7]) + outer + even - shared, shared, even, outer],
            [near, turn, -turn, -near],
            [shared, constant(c[1] + c[3] + c[5] - c[7]) + inner + odd - shared, inner, odd],
            [one, -one, -one, one],
            [even, inner, constant(c[1] + c[3] - c[5] + c[7]) + inner + even - shared, shared],
            [turn, far, -far, -turn],
            [outer, odd, shared, constant(-c[1] + c[3] + c[5] - c[7]) + outer + odd - shared],
        ],
        dtype=torch.float64,
    )
    sign = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(4)[:, None]  # odd frequencies are odd functions
    return torch.cat([folded, sign * folded.flip(1)], dim=1).to(device)


def _weighted(planes: tuple[Tensor, ...], weights: tuple[float, ...], offset: int) -> Tensor:
    """Sum int32 planes, weighted in fixed point; `offset` is in units of 2^-16."""
    total = torch.full_like(planes[0], offset)
    for plane, weight in zip(planes, weights, strict=True):
        total = total + plane * _fixed(weight, COLOUR_BITS)
    return total >> COLOUR_BITS


def _to_ycc(rgb: Tensor) -> tuple[Tensor, Tensor]:
    """Split (B, 3, H, W) int32 RGB in 0 .. 255 into Y (B, 1, H, W) and Cb, Cr (B, 2, H, W) (JFIF 1.02)."""
    planes = rgb.unbind(1)
    luma = _weighted(planes, (0.29900, 0.58700, 0.11400), HALF)
    centre = (128 << COLOUR_BITS) + HALF - 1  # one less, so that the strongest colour is 255 and not 256
    blueness = _weighted(planes, (-0.16874, -0.33126, 0.50000), centre)
    redness = _weighted(planes, (0.50000, -0.41869, -0.08131), centre)
    return luma[:, None], torch.stack([blueness, redness], dim=1)


def _to_rgb(luma: Tensor, chroma: Tensor) -> Tensor:
    """Return RGB (B, 3, H, W) int32 in 0 .. 255 from Y (B, 1, H, W) and Cb, Cr (B, 2, H, W), all int32."""
    planes = (chroma - 128).unbind(1)
    red = _weighted(planes, (0.0, 1.40200), HALF)
    green = _weighted(planes, (-0.34414, -0.71414), HALF)
    blue = _weighted(planes, (1.77200, 0.0), HALF)
    return (luma + torch.stack([red, green, blue], dim=1)).clamp_(0, 255)


def _halve(chroma: Tensor, last_row: Tensor) -> Tensor:
    """Average (B, 2, H, W) int32 over 2 x 2 pixels; rows below `last_row` (B,) of the result repeat that one."""
    batch, channels, height, width = chroma.shape
    sums = chroma.view(batch, channels, height // 2, 2, width // 2, 2).sum((3, 5), dtype=torch.int32)
    # Halves are rounded down in even and up in odd columns, so that no colour drifts.
    rounding = 1 + torch.arange(width // 2, dtype=torch.int32, device=chroma.device) % 2
    rows = torch.arange(height // 2, device=chroma.device).minimum(last_row[:, None])
    return _rows((sums + rounding) >> 2, rows)


def _rows(planes: Tensor, rows: Tensor) -> Tensor:
    """Pick rows (B, R) of (B, C, H, W): (B, C, R, W)."""
    return planes.gather(2, rows[:, None, :, None].expand(-1, planes.shape[1], -1, planes.shape[3]))


def _columns(planes: Tensor, columns: Tensor) -> Tensor:
    """Pick columns (B, R) of (B, C, H, W): (B, C, H, R)."""
    return _rows(planes.mT, columns).mT


def _double(chroma: Tensor, last_row: Tensor, last_column: Tensor) -> Tensor:
    """Enlarge (B, 2, H, W) int32 twofold: 3/4 of the nearer and 1/4 of the farther neighbour along either axis.

    Pictures end at `last_row` and `last_column`, both (B,). Those of at most `NARROW` columns repeat their colours.
    """
    batch, channels, height, width = chroma.shape
    reach = (last_column >= NARROW).long()[:, None]  # (B, 1): 0 makes every pixel its own neighbour

    def neighbours(length: int, last: Tensor) -> tuple[Tensor, Tensor]:
        place = torch.arange(length, device=chroma.device)
        return (place - reach).clamp_min(0), (place + reach).minimum(last[:, None])

    above, below = neighbours(height, last_row)
    left, right = neighbours(width, last_column)
    tall = torch.stack([3 * chroma + _rows(chroma, above), 3 * chroma + _rows(chroma, below)], dim=3)
    tall = tall.view(batch, channels, 2 * height, width)
    wide = torch.stack([3 * tall + _columns(tall, left) + 8, 3 * tall + _columns(tall, right) + 7], dim=4)
    return wide.view(batch, channels, 2 * height, 2 * width) >> 4


def _quantised(planes: Tensor, steps: Tensor) -> Tensor:
    """Round the frequencies of (B, C, H, W) int32, whole blocks in 0 .. 255, to multiples of `steps` (B, 8, 8)."""
    batch, channels, height, width = planes.shape
    blocks = planes.view(batch, channels, height // BLOCK, BLOCK, width // BLOCK, BLOCK)
    blocks = blocks.transpose(3, 4).double() - 128.0  # (B, C, rows, columns, 8, 8)
    dct, steps = _dct(planes.device), steps[:, None, None, None].double()

    # To frequencies, times 8.
    rows = _shift(blocks @ dct.T, DCT_BITS - KEPT_BITS)
    frequencies = _shift(dct @ rows, DCT_BITS + KEPT_BITS)

    # Quantised, halves away from zero.
    magnitude = torch.floor((frequencies.abs() + 4.0 * steps) / (8.0 * steps))
    frequencies = frequencies.sign() * magnitude * steps

    # And back.
    columns = _shift(dct.T @ frequencies, DCT_BITS - KEPT_BITS)
    blocks = _shift(columns @ dct, DCT_BITS + KEPT_BITS + 3) + 128.0
    return blocks.clamp_(0.0, 255.0).to(torch.int32).transpose(3, 4).reshape(batch, channels, height, width)


def round_trip(images: Sequence[Tensor], qualities: Sequence[int]) -> list[Tensor]:
    """Return what a JPEG file of each picture holds; pictures of different sizes go together.

    Args:
        images: each (3, H, W) float32 in [0, 1], all on one device; rounded to 8 bits first.
        qualities: 1 .. 100 for each picture.

    Returns:
        For each picture (3, H, W) float32, k / 255 with the same k in 0 .. 255 on every device.
    """
    device, sizes = images[0].device, [image.shape[-2:] for image in images]
    height, width = (-(-max(side) // UNIT) * UNIT for side in zip(*sizes, strict=True))

    # What differs from picture to picture: steps of quantisation, and where the halved colours end.
    luma_steps, chroma_steps = (
        torch.stack([_steps(basic, quality) for quality in qualities]).to(device, non_blocking=True)
        for basic in (LUMA, CHROMA)
    )
    last_row, last_column = ((torch.tensor(sizes).T - 1) // 2).to(device, non_blocking=True)

    # One tensor of whole units in 8 bits; beyond its edge a picture repeats it.
    padded = [
        F.pad(image, (0, width - w, 0, height - h), "replicate") for image, (h, w) in zip(images, sizes, strict=True)
    ]
    pixels = (torch.stack(padded) * 255.0).round_().clamp_(0.0, 255.0).to(torch.int32)  # (B, 3, height, width)

    luma, chroma = _to_ycc(pixels)
    luma = _quantised(luma, luma_steps)
    chroma = _quantised(_halve(chroma, last_row), chroma_steps)
    decoded = _to_rgb(luma, _double(chroma, last_row, last_column)).float().div_(255.0)
    return [whole[:, :h, :w] for whole, (h, w) in zip(decoded, sizes, strict=True)]
