"""Pixels: what a user's IMAGE must be, resizing, padding and colour transfer. Torch only, (B, H, W, C) in [0, 1]."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .finite import VAE_HELP

Resize = Literal["bicubic", "bilinear", "area", "nearest-exact"]

PADDING = 64  # pixels: 8 latent pixels, the side of one window at every level
WAVELET_LEVELS = 5


def usable_image(node: str, socket: str, image: Tensor) -> tuple[Tensor, list[str]]:
    """Turn an IMAGE of any kind into (B, H, W, 3) float32 in [0, 1].

    Returns:
        The picture and a sentence for each change that its user should know about. NaN and infinities raise
        ValueError: nothing sensible can be made of them.
    """
    if image.ndim != 4 or 0 in image.shape:
        raise ValueError(f"{node}: {socket} has the shape {tuple(image.shape)}; an IMAGE is (batch, height, width, 3).")
    notices = []
    channels = image.shape[-1]
    if channels in (2, 4):
        notices.append(f"{node}: {socket} has an alpha channel; it was left out.")
        image = image[..., : channels - 1]
    if image.shape[-1] == 1:
        image = image.expand(-1, -1, -1, 3)
    if image.shape[-1] != 3:
        raise ValueError(f"{node}: {socket} has {channels} channels; it must be grey, RGB or RGBA (1 to 4).")
    image = image.float()
    if not bool(image.isfinite().all()):
        count = int((~image.isfinite()).sum())
        raise ValueError(
            f"{node}: {socket} contains {count} values that are not numbers (NaN or infinite). The node before it is "
            f"broken or ran out of precision (stage: decode, where that is a VAE Decode: then {VAE_HELP})."
        )
    low, high = float(image.min()), float(image.max())
    if low < 0.0 or high > 1.0:
        notices.append(f"{node}: {socket} goes from {low:.3g} to {high:.3g}; it was cut to 0..1.")
        image = image.clamp(0.0, 1.0)
    return image, notices


def resize(image: Tensor, size: tuple[int, int], method: Resize) -> Tensor:
    """Resize to (height, width); (B, H, W, 3) in and out, cut to [0, 1]."""
    if tuple(image.shape[1:3]) == tuple(size):
        return image
    smooth = method in ("bicubic", "bilinear")
    resized = F.interpolate(
        image.movedim(-1, 1), size, mode=method, **({"antialias": True, "align_corners": False} if smooth else {})
    )
    return resized.movedim(1, -1).clamp(0.0, 1.0)  # bicubic overshoots at edges


def target_size(size: tuple[int, int], scale: float, width: int, height: int) -> tuple[int, int]:
    """Return (height, width): of `width` x `height` where given (one alone keeps the shape), else scale x input."""
    rows, columns = size
    if width and height:
        return height, width
    if width:
        return max(1, round(rows * width / columns)), width
    if height:
        return height, max(1, round(columns * height / rows))
    return max(1, round(rows * scale)), max(1, round(columns * scale))


def pad_to_multiple(image: Tensor, multiple: int = PADDING) -> Tensor:
    """Extend (B, H, W, 3) at the right and the bottom by reflection, to multiples of `multiple`.

    At right and bottom only, so that cutting back to the old size needs to know nothing but that size. Pictures
    smaller than their padding are reflected back and forth; one row or column alone can only be repeated.
    """
    rows = _reflected(image.shape[1], multiple, image.device)
    columns = _reflected(image.shape[2], multiple, image.device)
    return image.index_select(1, rows).index_select(2, columns)


def _reflected(length: int, multiple: int, device: torch.device) -> Tensor:
    padded = -(-length // multiple) * multiple
    index = torch.arange(padded, device=device)
    if length == 1:
        return torch.zeros_like(index)
    period = 2 * length - 2  # a triangular wave that does not repeat its ends
    index = index % period
    return torch.minimum(index, period - index)


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
    linear = (xyz @ torch.linalg.inv(values.new_tensor(_RGB_TO_XYZ)).T).clamp(0.0, 1.0)
    return torch.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear.clamp(min=1e-9) ** (1 / 2.4) - 0.055)
