"""A fixed set of random crops with their encoded latents, kept on disk so that no crop is encoded twice."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from . import models
from .loop import generator_for
from .photographs import Photographs

log = logging.getLogger("clearsr.training")


class FixedCrops:
    """Crops 0 .. count-1 of a photograph folder: pixels on demand, latents from a cache.

    Args:
        photographs: where the crops come from.
        vae: the frozen autoencoder E.
        size: side of a crop in pixels, a multiple of 8.
        count: how many crops there are.
        seed: decides which.
        cache: file to keep the latents in; made anew when it belongs to another set or another autoencoder.
    """

    def __init__(
        self, photographs: Photographs, vae: AutoencoderKL, size: int, count: int, seed: int, cache: Path, device: str
    ) -> None:
        self.photographs, self.size, self.count, self.seed = photographs, size, count, seed
        identity = self._identity(vae)
        if cache.is_file():
            stored = load_file(cache)
            if bytes(stored["identity"].tolist()).decode() == identity:
                self.latents = stored["latents"]
                return
        self.latents = self._encode(vae, device).contiguous()
        cache.parent.mkdir(parents=True, exist_ok=True)
        partial = cache.with_suffix(".part")
        save_file({"latents": self.latents, "identity": torch.tensor(list(identity.encode()))}, partial)
        partial.replace(cache)

    def _identity(self, vae: AutoencoderKL) -> str:
        weights = hashlib.sha256()
        for value in (*vae.encoder.state_dict().values(), *vae.quant_conv.state_dict().values()):
            weights.update(value.detach().cpu().numpy().tobytes())
        pictures = [(path.name, image.shape) for path, image in self.photographs]
        listing = hashlib.sha256(json.dumps([pictures, self.size, self.count, self.seed]).encode())
        return weights.hexdigest() + listing.hexdigest()

    def _encode(self, vae: AutoencoderKL, device: str) -> Tensor:
        batch, latents = 16, []
        for start in tqdm(range(0, self.count, batch), desc="encoding crops", unit="batch", mininterval=5):
            images = self.images(torch.arange(start, min(start + batch, self.count)))
            latents.append(models.encode(vae, images.to(device)).cpu())
        return torch.cat(latents)

    def image(self, index: int) -> Tensor:
        """Return crop `index` as (3, size, size) in [-1, 1]."""
        return self.photographs.crop(self.size, generator_for(self.seed + 1, index), candidates=2)

    def images(self, indices: Tensor) -> Tensor:
        """Return crops as (B, 3, size, size) in [-1, 1]."""
        return torch.stack([self.image(int(index)) for index in indices])

    def draw(self, batch: int, generator: torch.Generator) -> Tensor:
        """Return `batch` crop numbers."""
        return torch.randint(self.count, (batch,), generator=generator)
