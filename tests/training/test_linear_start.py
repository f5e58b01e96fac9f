"""The linear start of a small autoencoder: a blurred picture in its colours before the first step of training."""

from __future__ import annotations

import pytest
import torch

from training.linear_start import fit_ends, start_linear
from training.models import build_autoencoder


def coloured(seed: int) -> torch.Tensor:
    """Pictures of smooth colours, (12, 3, 64, 64) in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(12, 3, 4, 4, generator=generator) * 2 - 1
    return torch.nn.functional.interpolate(coarse, (64, 64), mode="bilinear", align_corners=False)


def error_of_means(groups: int, latent_channels: int = 4) -> float:
    """Mean error of the 8x8 means on pictures that the start has not seen."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build_autoencoder((32, 32, 64, 128), 1, groups, latent_channels)
    start_linear(model)
    fit_ends(model, coloured(1))
    images = coloured(2)
    with torch.no_grad():
        restored = model.decode(model.encode(images).latent_dist.mode()).sample
    return float(torch.nn.functional.avg_pool2d(restored - images, 8).abs().mean())


@pytest.mark.parametrize("latent_channels", [4, 16])
def test_starts_in_colour(latent_channels: int) -> None:
    """Measured: 0.18, where grey would be 0.35."""
    assert error_of_means(8, latent_channels) < 0.7 * float(torch.nn.functional.avg_pool2d(coloured(2), 8).abs().mean())


def test_single_channel_groups_lose_the_colours() -> None:
    """Decision 0013: with 32 norm groups of one channel the mean colour does not reach the output."""
    assert error_of_means(32) > 1.5 * error_of_means(8)


@pytest.mark.parametrize("groups", [8, 16])
def test_posterior_starts_sharp(groups: int) -> None:
    model = build_autoencoder((32, 32, 64, 128), 1, groups)
    start_linear(model)
    fit_ends(model, coloured(1))
    with torch.no_grad():
        posterior = model.encode(coloured(2)).latent_dist
    # torch's default start has a deviation near 1, three times that of the mean.
    assert posterior.std.max() < 0.2 * posterior.mean.std()
