"""Crops, and the latents that a finished file's sampler makes of their degraded partners."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from .clearsr_model import ClearSRModel
from .degradation import PRESETS, Preset
from .latents import encoded_once, weights_hash
from .pairs import degrade_pairs
from .photographs import Photographs
from .pipeline import encode_lr, restore_latents
from .randomness import generator_for


class RestoredCrops:
    """A fixed set of crops; each is degraded, encoded and sampled once, without LSA, and the latents are kept on disk.

    Args:
        photographs: where the crops come from.
        model: a trained model.
        size: side of a crop in pixels, a multiple of 64, so that nothing is padded.
        count: how many crops there are.
        seed: decides crops, degradations and the sampler's noise.
        steps, denoise: of the sampler.
        degradation: name of a preset.
        cache: file to keep the latents in; made anew when it belongs to another set or another model.
        device: where to compute.
    """

    def __init__(
        self,
        photographs: Photographs,
        model: ClearSRModel,
        size: int,
        count: int,
        seed: int,
        *,
        steps: int,
        denoise: float,
        degradation: Preset,
        cache: Path,
        device: str,
    ) -> None:
        self.photographs, self.size, self.count, self.seed = photographs, size, count, seed
        model.to(device)

        def encode(indices: Tensor) -> dict[str, Tensor]:
            hq = (self.images(indices) + 1.0) / 2.0
            lr_images = degrade_pairs(hq, indices, seed + 4, PRESETS[degradation]).to(device)
            # One generator draws the noise of a batch, so its first number stands for all of them.
            encoded = encode_lr(model, lr_images)
            return {"latents": restore_latents(model, encoded, seed + int(indices[0]), steps=steps, denoise=denoise)}

        identity = json.dumps(
            [weights_hash(model), photographs.identity, size, count, seed, steps, denoise, degradation]
        )
        self.latents = encoded_once(cache, identity, count, encode, "restoring crops")["latents"]

    def images(self, indices: Tensor) -> Tensor:
        """Return crops as (B, 3, size, size) in [-1, 1]."""
        drawn = ((int(index), generator_for(self.seed + 1, int(index))) for index in indices)
        return torch.stack([self.photographs.crop(self.size, rng, candidates=2, number=index) for index, rng in drawn])
