"""Pixels: what a user's IMAGE must be, resizing and padding. Torch only, (B, H, W, C) in [0, 1]."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .finite import VAE_HELP

Resize = Literal["bicubic", "bilinear", "area", "nearest-exact"]

PADDING = 64  # pixels: 8 latent pixels, the side of one window at every level


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
