"""The image prompt encoder of self-contained models, in CLIP's place: LR image -> image-level feature p (Sec. 3.1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import Factory
from .operations import Operations

IMAGE_SIDE = 64  # pixels; p is one feature of the whole image, so a thumbnail suffices
_WIDTHS = (32, 64, 128, 256)
_GROUPS = 8


def thumbnail(image: Tensor) -> Tensor:
    """Shrink (B, C, H, W) to the (B, C, 64, 64) that the encoder sees of it; what is so small stays as it is."""
    return F.interpolate(image, size=(IMAGE_SIDE, IMAGE_SIDE), mode="area")


class ImagePromptEncoder(nn.Module):
    """Four convolutions of stride 2 on a thumbnail, projected to one token (averaged) or to one per patch."""

    def __init__(
        self,
        context_dim: int,
        *,
        patch: bool = False,  # a token per cell of the 4 x 4 grid instead of their average
        ops: Operations = nn,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.patch = patch
        factory = Factory(ops, dtype=dtype, device=device)
        inputs = (3, *_WIDTHS[:-1])
        self.convs = nn.ModuleList([factory.conv(a, b, 3, stride=2) for a, b in zip(inputs, _WIDTHS, strict=True)])
        self.norms = nn.ModuleList([factory.group_norm(_GROUPS, width, eps=1e-5) for width in _WIDTHS])
        self.projection = factory.linear(_WIDTHS[-1], context_dim)

    def forward(self, image: Tensor) -> Tensor:
        """Encode.

        Args:
            image: (B, 3, H, W) RGB in [0, 1], any size, in the dtype to compute in.

        Returns:
            The image prompt p: (B, 1, context_dim), or (B, 16, context_dim) with `patch`, row by row.
        """
        if image.ndim != 4 or image.shape[1] != 3:
            raise ValueError(f"image {tuple(image.shape)} must be (B, 3, H, W)")
        x = thumbnail(image) * 2.0 - 1.0
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.silu(norm(conv(x)))  # (B, C, 32, 32) down to (B, 256, 4, 4)
        tokens = x.flatten(2).transpose(1, 2)  # (B, 16, 256)
        return self.projection(tokens if self.patch else tokens.mean(dim=1, keepdim=True))
