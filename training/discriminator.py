"""A small patch discriminator, and the hinge losses of both sides as one sum that a single optimiser can move."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn


class PatchDiscriminator(nn.Module):
    """Says of every patch of 40 pixels how much it looks like a photograph.

    Every convolution is divided by the largest singular value of its weight, (out, in * kernel), so that the judgement
    stays smooth. The value is computed exactly each time: there is no state beside the parameters, and a resumed run
    is the same run.

    Args:
        width: channels after the first two convolutions; 2 and 4 times as many after the next.
    """

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [
                # At full resolution first: behind a stride, a grid of two pixels looks like none.
                nn.Conv2d(3, width, 3, padding=1),
                nn.Conv2d(width, width, 4, stride=2, padding=1),
                nn.Conv2d(width, 2 * width, 4, stride=2, padding=1),
                nn.Conv2d(2 * width, 4 * width, 4, stride=2, padding=1),
                nn.Conv2d(4 * width, 1, 3, padding=1),
            ]
        )

    def forward(self, pictures: Tensor, frozen: bool = False) -> Tensor:
        """Return (B, 1, H/8, W/8) judgements of pictures (B, 3, H, W) in [-1, 1]; high = photograph.

        With `frozen` no gradient reaches the discriminator's own weights.
        """
        features = pictures
        for index, layer in enumerate(cast("list[nn.Conv2d]", list(self.layers))):
            weight, bias = layer.weight / spectral_norm(layer.weight), cast("Tensor", layer.bias)
            if frozen:
                weight, bias = weight.detach(), bias.detach()
            if index:
                features = nn.functional.leaky_relu(features, 0.2)
            features = nn.functional.conv2d(features, weight, bias, layer.stride, padding=1)
        return features


def spectral_norm(weight: Tensor) -> Tensor:
    """Return the largest singular value of a convolution's weight as a matrix (out, in * kernel); a scalar."""
    # Autocast would multiply in bfloat16, which the eigenvalues of a GPU do not take.
    with torch.autocast(weight.device.type, enabled=False):
        matrix = weight.flatten(1).float()
        return torch.linalg.eigvalsh(matrix @ matrix.T)[-1].clamp_min(1e-12).sqrt()


def adversarial_losses(discriminator: PatchDiscriminator, restored: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the hinge losses of the decoder and of the discriminator, two scalars.

    The first moves only what made `restored`, the second only the discriminator: their sum can be given to one
    optimiser that holds the parameters of both.

    Args:
        discriminator: the judge.
        restored: (B, 3, H, W) decoded pictures, with their graph.
        images: (B, 3, H, W) the photographs.
    """
    decoder = -discriminator(restored, frozen=True).mean()
    real, fake = discriminator(torch.cat([images, restored.detach()])).chunk(2)
    return decoder, (1.0 - real).clamp_min(0.0).mean() + (1.0 + fake).clamp_min(0.0).mean()
