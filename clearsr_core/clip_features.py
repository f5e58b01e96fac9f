"""What stands between a picture, CLIP's vision model and the image prompt p; CLIP itself is not ours (Sec. 3.1)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

CLIP_SIDE = 224  # pixels, of ViT-H/14
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_EPS = 1e-5  # of CLIP's layer norms


def clip_pixels(images: Tensor, side: int = CLIP_SIDE) -> Tensor:
    """Make pictures what CLIP's vision model reads, number for number as ComfyUI's CLIP Vision Encode with crop "none".

    Args:
        images: (B, 3, H, W) RGB in [0, 1], any size; the whole picture is squeezed to a square.
        side: of the square, in pixels.

    Returns:
        (B, 3, side, side), 8-bit steps, normalised by CLIP's mean and deviation.
    """
    if images.shape[-2:] != (side, side):
        images = F.interpolate(images, size=(side, side), mode="bicubic", antialias=True)
    images = (images * 255.0).clamp(0.0, 255.0).round() / 255.0
    mean, std = (torch.tensor(values).to(images).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return (images - mean) / std


def projected_tokens(hidden: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    """Bring CLIP's last hidden states to the width of its image embedding: its own last norm and projection, per token.

    CLIP itself does this with the first (class) token only, and that is the pooled embedding; here every token gets it.

    Args:
        hidden: (B, tokens, C) last hidden states, before the last norm.
        weights: `norm.weight` (C,), `norm.bias` (C,), `projection.weight` (context_dim, C).

    Returns:
        (B, tokens, context_dim) in the dtype of `hidden`.
    """
    norm_weight, norm_bias, projection = (
        weights[name].to(hidden) for name in ("norm.weight", "norm.bias", "projection.weight")
    )
    return F.linear(F.layer_norm(hidden, hidden.shape[-1:], norm_weight, norm_bias, _EPS), projection)
