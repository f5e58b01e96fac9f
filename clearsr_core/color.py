"""Colour transfer (the paper is silent, decision 0012): colours of the low-resolution picture for the result.

All take (B, H, W, C) in [0, 1], the result and a reference of the same size, and may leave that range.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

ColorMethod = Literal["adain", "wavelet", "lab"]

WAVELET_LEVELS = 5


def adain(image: Tensor, reference: Tensor) -> Tensor:
    """Give each channel of `image` the mean and spread of `reference` (decision 0012); both (B, H, W, C)."""
    mean, spread = _statistics(image)
    wanted_mean, wanted_spread = _statistics(reference)
    return (image - mean) / spread * wanted_spread + wanted_mean


def _statistics(image: Tensor) -> tuple[Tensor, Tensor]:
    count = image.shape[1] * image.shape[2]
    variance = image.var(dim=(1, 2), keepdim=True, correction=1 if count > 1 else 0)
    return image.mean(dim=(1, 2), keepdim=True), (variance + 1e-5).sqrt()


def wavelet(image: Tensor, reference: Tensor) -> Tensor:
    """Keep the fine bands of `image`, take the coarse one of `reference` (decision 0012); both (B, H, W, C)."""
    return image - _low_band(image) + _low_band(reference)


def _low_band(image: Tensor) -> Tensor:
    """Blur with [1 2 1] / 4 in both directions at dilations 1, 2, 4, 8, 16 ("a trous")."""
    band = image.movedim(-1, 1)
    channels = band.shape[1]
    row = torch.tensor([1.0, 2.0, 1.0], device=band.device, dtype=band.dtype) / 4.0
    kernel = (row[:, None] * row[None, :]).expand(channels, 1, 3, 3)
    for level in range(WAVELET_LEVELS):
        step = 2**level
        padded = F.pad(band, (step, step, step, step), mode="replicate")
        band = F.conv2d(padded, kernel, groups=channels, dilation=step)
    return band.movedim(1, -1)


def lab(image: Tensor, reference: Tensor) -> Tensor:
    """Keep the lightness of `image`, take the coarse colour (a, b of CIELAB) of `reference`; both (B, H, W, 3)."""
    ours, theirs = _rgb_to_lab(image), _rgb_to_lab(reference)
    return _lab_to_rgb(torch.cat([ours[..., :1], wavelet(ours[..., 1:], theirs[..., 1:])], dim=-1))


# sRGB (D65) <-> XYZ, rows X, Y, Z relative to the white point (IEC 61966-2-1).
_RGB_TO_XYZ = ((0.4124564, 0.3575761, 0.1804375), (0.2126729, 0.7151522, 0.0721750), (0.0193339, 0.1191920, 0.9503041))
_WHITE = (0.95047, 1.0, 1.08883)
_LAB_EDGE = 6.0 / 29.0


def _rgb_to_lab(image: Tensor) -> Tensor:
    linear = torch.where(image <= 0.04045, image / 12.92, ((image + 0.055) / 1.055).clamp(min=0.0) ** 2.4)
    xyz = linear @ image.new_tensor(_RGB_TO_XYZ).T / image.new_tensor(_WHITE)
    root = torch.where(xyz > _LAB_EDGE**3, xyz.clamp(min=1e-9) ** (1 / 3), xyz / (3 * _LAB_EDGE**2) + 4 / 29)
    x, y, z = root.unbind(-1)
    return torch.stack([116.0 * y - 16.0, 500.0 * (x - y), 200.0 * (y - z)], dim=-1)


def _lab_to_rgb(values: Tensor) -> Tensor:
    lightness, a, b = values.unbind(-1)
    y = (lightness + 16.0) / 116.0
    root = torch.stack([y + a / 500.0, y, y - b / 200.0], dim=-1)
    xyz = torch.where(root > _LAB_EDGE, root**3, 3 * _LAB_EDGE**2 * (root - 4 / 29)) * values.new_tensor(_WHITE)
    linear = (xyz @ values.new_tensor(_RGB_TO_XYZ).inverse().T).clamp(0.0, 1.0)
    return torch.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear.clamp(min=1e-9) ** (1 / 2.4) - 0.055)


def transfer(method: ColorMethod, image: Tensor, reference: Tensor) -> Tensor:
    """Give `image` the colours of `reference` by a method; where the reference is grey, so is the result.

    Args:
        method: "adain", "wavelet" or "lab".
        image, reference: (B, H, W, 3).

    Returns:
        (B, H, W, 3) in [0, 1].
    """
    fixed = METHODS[method](image, reference).clamp(0.0, 1.0)
    # No method takes all of the fine colour away, and a black-and-white photograph has none.
    is_grey = (reference == reference[..., :1]).flatten(1).all(dim=1)[:, None, None, None]
    luma = fixed @ fixed.new_tensor(_LUMA)[:, None]
    return torch.where(is_grey, luma.expand_as(fixed), fixed)


_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as a picture is made grey
METHODS: dict[ColorMethod, Callable[[Tensor, Tensor], Tensor]] = {"adain": adain, "wavelet": wavelet, "lab": lab}
