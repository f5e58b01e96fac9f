"""What the autoencoder learns from: its loss, term by term, as it is written down in the settings."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from clearsr_core.config import LATENT_SCALE
from training import config
from training.autoencoder import AutoencoderSettings, CropBatch, Reconstruction
from training.models import build_autoencoder
from training.perceptual import EffLite

WEIGHTS = {"kl_weight": 1e-6, "perceptual_weight": 0.15, "coarse_weight": 0.5}


def _settings(**changes: float) -> AutoencoderSettings:
    table: dict[str, object] = {"steps": 1, "learning_rate": 1e-4, "data": Path("unused"), "out": Path("unused")}
    return config.build(AutoencoderSettings, {**table, **changes}, {})


def _module(latent_channels: int = 4, **changes: float) -> Reconstruction:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # torch's layers draw their first weights from nothing else; fork_rng puts it back
        return Reconstruction(_settings(**changes), build_autoencoder((32, 32, 32, 32), 1, 8, latent_channels), None)


def _batch(latent_channels: int = 4) -> CropBatch:
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(3, 3, 64, 64, generator=generator) * 2 - 1
    noise, disturbance, restored = torch.randn(3, 3, latent_channels, 8, 8, generator=generator)
    return CropBatch(images, noise, 0.2 * disturbance, restored, torch.tensor([False, True, False]), heard=False)


def _terms(module: Reconstruction, batch: CropBatch) -> dict[str, Tensor]:
    """Return the terms of the loss, from the formulas."""
    moments = module.model.quant_conv(module.model.encoder(batch.images))
    mean, log_variance = moments.chunk(2, dim=1)
    latents = mean + (0.5 * log_variance).exp() * batch.noise
    latents = torch.stack([latents[0], batch.restored[1] / LATENT_SCALE, latents[2]]) + batch.disturbance / LATENT_SCALE
    made = module.model.decoder(module.model.post_quant_conv(latents))
    error = made - batch.images
    blocks = error.unfold(2, 8, 8).unfold(3, 8, 8).mean(dim=(-2, -1))
    return {
        "l1": error.abs().mean(),
        "perceptual_weight": EffLite().distance(made, batch.images).mean(),
        "coarse_weight": blocks.abs().mean(),
        "kl_weight": 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).flatten(1).sum(dim=1).mean(),
    }


def test_the_weights_are_those_that_are_documented() -> None:
    settings = _settings()
    assert {name: getattr(settings, name) for name in WEIGHTS} == WEIGHTS


@torch.no_grad()
@pytest.mark.parametrize(("alone", "latent_channels"), [*((name, 4) for name in (None, *WEIGHTS)), (None, 16)])
def test_the_loss_is_the_sum_of_its_weighted_terms(alone: str | None, latent_channels: int) -> None:
    """L1 with weight 1, and every other term with its own; each is looked at alone, so that none hides the next."""
    weights = WEIGHTS if alone is None else {name: 2.0 * (name == alone) for name in WEIGHTS}
    module, batch = _module(latent_channels, **weights), _batch(latent_channels)
    terms = _terms(module, batch)
    expected = terms["l1"] + sum(weight * terms[name] for name, weight in weights.items())
    loss, figures = module(batch)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(figures["l1"], terms["l1"])
    torch.testing.assert_close(figures["coarse"], terms["coarse_weight"])
    torch.testing.assert_close(figures["efflite"], terms["perceptual_weight"])
