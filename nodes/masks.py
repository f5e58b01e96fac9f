"""Masks that were painted on the picture, laid over its latent: the padding is no part of the painting."""

from __future__ import annotations

import torch
from torch import Tensor

from .sockets import KEY


def strength_map(node: str, mask: Tensor | None, latent: dict, name: str) -> Tensor | None:
    """Bring a MASK to the latent's grid.

    Args:
        node: its name, for messages.
        mask: (H, W) or (B, H, W) in [0, 1], painted on the picture without padding, at any size; None = none.
        latent: LATENT x_lr; its entry tells which part of it is padding.
        name: of the socket, for messages.

    Returns:
        (B, 1, h, w) in [0, 1]; the padding repeats the mask's last row and column.
    """
    if mask is None:
        return None
    mask = mask.reshape(-1, 1, *mask.shape[-2:]).float()  # (B, 1, H, W)
    if not bool(mask.isfinite().all()):
        raise ValueError(f"{node}: {name} contains values that are not numbers (NaN or infinite).")
    pictures = latent["samples"].shape[0]
    if mask.shape[0] not in (1, pictures):
        raise ValueError(
            f"{node}: {name} holds {mask.shape[0]} masks, but lr_latent {pictures} picture{'s' * (pictures > 1)}. "
            "Connect one mask for all, or one for each picture."
        )
    return torch.nn.functional.avg_pool2d(padded_mask(mask, latent), 8).clamp(0.0, 1.0)


def padded_mask(mask: Tensor, latent: dict) -> Tensor:
    """Lay a mask over the picture without its padding: (B, 1, H, W) of any size becomes (B, 1, 8 h, 8 w)."""
    rows, columns = latent["samples"].shape[-2:]
    entry = latent.get(KEY)
    shares = (1.0, 1.0)
    if entry is not None:
        pairs = zip(entry["content_size"], entry["padded_size"], strict=True)
        shares = tuple(content / padded for content, padded in pairs)
    content = tuple(max(1, round(size * 8 * share)) for size, share in zip((rows, columns), shares, strict=True))
    mask = torch.nn.functional.interpolate(mask, content, mode="bilinear", align_corners=False)
    right, bottom = columns * 8 - content[1], rows * 8 - content[0]
    return torch.nn.functional.pad(mask, (0, right, 0, bottom), mode="replicate")


def noise_mask_of(latent: dict) -> Tensor | None:
    """Return the host's mask of what may change, laid over the picture where that is padded; else as it is."""
    mask, entry = latent.get("noise_mask"), latent.get(KEY)
    if mask is None or entry is None or entry["content_size"] == entry["padded_size"]:
        return mask
    return padded_mask(mask.reshape(-1, 1, *mask.shape[-2:]).float(), latent)
