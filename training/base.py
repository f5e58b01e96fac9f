"""Stage 2 of a base model from nothing: a narrow Stable Diffusion 2 UNet on the latents of stage 1, without text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMScheduler
from PIL import Image
from torch import Tensor

from . import models
from .base_model import BaseModel
from .batches import DataSettings
from .latents import FixedCrops


@dataclass(frozen=True)
class BaseSettings(DataSettings):
    """Settings of the base stage; `vae` is the folder that the autoencoder stage wrote."""

    vae: Path = Path("runs/nano_autoencoder/vae")
    cache: Path = Path("runs/latents.safetensors")  # encoded crops, shared with the ClearSR stage
    widths: tuple[int, ...] = (64, 64, 128, 128)  # multiples of the first; Stable Diffusion 2.1: 320, 640, 1280, 1280
    norm_groups: int = 8  # of every group norm, as in the autoencoder; Stable Diffusion 2.1: 32
    head_channels: int = 32  # Stable Diffusion 2.1: 64
    context_dim: int = 64  # Stable Diffusion 2.1: 1024
    batch: int = 32
    crop: int = 128  # pixels
    crops: int = 12_000  # number of different crops


def noise_schedule() -> DDPMScheduler:
    """Return Stable Diffusion's training schedule."""
    return DDPMScheduler(
        num_train_timesteps=1000, beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False
    )


class BaseStage:
    """Plain noise prediction (the first term of every latent diffusion model), with a learned empty prompt."""

    def __init__(self, settings: BaseSettings) -> None:
        self.settings = settings
        self.schedule = noise_schedule()
        vae = AutoencoderKL.from_pretrained(settings.vae, local_files_only=True, use_safetensors=True)
        self.vae = vae.to(settings.device).eval().requires_grad_(False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.unet = models.build_unet(
                settings.widths, settings.head_channels, settings.context_dim, settings.norm_groups
            )
            self.null_text = torch.nn.Parameter(torch.randn(1, settings.context_dim))
        self.unet.to(settings.device)
        self.null_text.data = self.null_text.data.to(settings.device)
        photographs = settings.photographs(settings.crop)
        self.crops = FixedCrops(
            photographs, self.vae, settings.crop, settings.crops, settings.seed, settings.cache, settings.device
        )

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        return {**{f"unet.{name}": value for name, value in self.unet.named_parameters()}, "null_text": self.null_text}

    def weights(self) -> dict[str, torch.nn.Parameter]:
        return self.trainable()

    def loss(self, step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        settings = self.settings
        latents = self.crops.latents[self.crops.draw(step, settings.batch, generator)]
        noise = torch.randn(latents.shape, generator=generator)
        timesteps = torch.randint(1000, (settings.batch,), generator=generator)
        x_t = self.schedule.add_noise(latents, noise, timesteps).to(settings.device)
        context = self.null_text.expand(settings.batch, -1, -1)
        eps = self.unet(x_t, timesteps.to(settings.device), context).sample
        return torch.nn.functional.mse_loss(eps, noise.to(settings.device)), {}

    def validate(self, step: int, folder: Path) -> dict[str, float]:
        """Write a sheet of unconditional samples."""
        generator = torch.Generator().manual_seed(1)
        sampler = DDPMScheduler.from_config(self.schedule.config, timestep_spacing="leading", steps_offset=1)
        sampler.set_timesteps(25)
        side = self.settings.crop // 8
        x_t = torch.randn(8, 4, side, side, generator=generator).to(self.settings.device)
        for timestep in sampler.timesteps:
            eps = self.unet(x_t, timestep, self.null_text.expand(8, -1, -1)).sample
            x_t = sampler.step(eps, timestep, x_t, generator=generator).prev_sample
        images = models.decode(self.vae, x_t)
        sheet = torch.cat([torch.cat(list(images[:4]), dim=2), torch.cat(list(images[4:]), dim=2)], dim=1)
        pixels = ((sheet + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()
        Image.fromarray(pixels).save(folder / f"validation_{step:08d}.png")
        return {"latent_std": float(x_t.std())}

    def finish(self, folder: Path) -> None:
        """Write `folder` as a base model: `unet`, `vae`, `null_text.safetensors`."""
        BaseModel(self.unet, self.vae, self.null_text).save(folder)
