"""Stage 2 of a base model from nothing: a narrow Stable Diffusion 2 UNet on the latents of stage 1, without text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from PIL import Image
from torch import Tensor, nn

from . import models, provenance, run_folder
from .base_files import layout
from .base_model import BaseModel, load_autoencoder
from .batches import Ahead, DataSettings, check_widths
from .latents import Crops, weights_hash
from .loop import check_counts
from .randomness import generator_for


@dataclass(frozen=True)
class BaseSettings(DataSettings):
    """Settings of the base stage; `vae` is the folder that the autoencoder stage wrote, or a self-contained file."""

    stage = "base"

    vae: Path = Path("runs/nano_autoencoder/vae")  # folder that the autoencoder stage wrote, or a self-contained file
    cache: Path = Path(
        "runs/latents.safetensors"
    )  # encoded crops; the ClearSR stage takes them too where its set is the same
    widths: tuple[int, ...] = (64, 64, 128, 128)  # multiples of the first; Stable Diffusion 2.1: 320, 640, 1280, 1280
    norm_groups: int = 8  # of every group norm, as in the autoencoder; Stable Diffusion 2.1: 32
    head_channels: int = 32  # Stable Diffusion 2.1: 64
    context_dim: int = 64  # Stable Diffusion 2.1: 1024
    batch: int = 32
    crop: int = 128  # pixels
    crops: int = 12_000  # number of different crops, encoded once; 0 = a new one every time

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, crops=0, head_channels=1, context_dim=1, norm_groups=1)
        check_widths(self.widths, self.norm_groups)
        uneven = [width for width in self.widths if width % self.head_channels or width % self.widths[0]]
        if uneven:
            raise ValueError(
                f"--widths={','.join(map(str, self.widths))} with --head_channels={self.head_channels}: {uneven[0]} is "
                "no whole multiple of the first width and of --head_channels, as ComfyUI and the attention heads want."
            )


def noise_schedule() -> DDPMScheduler:
    """Return Stable Diffusion's training schedule."""
    return DDPMScheduler(
        num_train_timesteps=1000, beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False
    )


class LatentBatch(NamedTuple):
    """Everything random of one step."""

    hq: Tensor  # (B, C, h, w) latents in model units, or (B, 3, crop, crop) crops in [-1, 1] that are new every time
    noise: Tensor  # (B, C, h, w)
    timesteps: Tensor  # (B,) 0 .. 999


class NoisePrediction(nn.Module):
    """Plain noise prediction (the loss of every latent diffusion model), with a learned empty prompt."""

    def __init__(self, unet: UNet2DConditionModel, vae: AutoencoderKL, null_text: Tensor) -> None:
        super().__init__()
        self.unet, self.vae, self.null_text = unet, vae, nn.Parameter(null_text)
        self.schedule = noise_schedule()

    def forward(self, batch: LatentBatch) -> tuple[Tensor, dict[str, Tensor]]:
        x_0 = models.encode(self.vae, batch.hq) if batch.hq.shape[1] == 3 else batch.hq
        x_t = self.schedule.add_noise(x_0, batch.noise, batch.timesteps)
        eps = self.unet(x_t, batch.timesteps, self.null_text.expand(len(x_t), -1, -1)).sample
        return torch.nn.functional.mse_loss(eps.float(), batch.noise), {}


class BaseStage:
    """A narrow UNet on the latents of photographs."""

    def __init__(self, settings: BaseSettings) -> None:
        self.settings = settings
        if settings.best != "none":
            raise ValueError(f"--best={settings.best}: this stage draws pictures that have no partner to measure by.")
        self.vae = load_autoencoder(settings.vae).to(settings.device).eval().requires_grad_(False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)  # torch's layers draw from nothing else; fork_rng puts it back
            self.unet = models.build_unet(
                settings.widths,
                settings.head_channels,
                settings.context_dim,
                settings.norm_groups,
                self.vae.config.latent_channels,
            )
            null_text = torch.randn(1, settings.context_dim)
        layout(self.unet.config, self.vae.config)  # what does not fit is refused before anything is trained
        self.module = NoisePrediction(self.unet, self.vae, null_text).to(settings.device)
        photographs = settings.photographs(settings.crop)
        self.crops = Crops(
            photographs,
            self.vae,
            settings.crop,
            settings.crops,
            settings.seed,
            settings.cache,
            settings.device,
            candidates=settings.candidates,
        )

    @property
    def given(self) -> dict[str, str]:
        return {
            "set of photographs": provenance.digest(self.crops.photographs.identity),
            "autoencoder": weights_hash(self.vae),
        }

    @property
    def begun_from(self) -> dict[str, str]:
        return {}

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        unet = {f"unet.{name}": value for name, value in self.unet.named_parameters()}
        return {**unet, "null_text": self.module.null_text}

    def weights(self) -> dict[str, torch.nn.Parameter]:
        return self.trainable()

    def start(self, rows: range) -> None:
        self.rows = rows
        self.crops.encode()
        self.batches = Ahead(self.make, self.settings.steps, self.settings.workers)

    def batch(self, step: int) -> LatentBatch:
        return self.batches.get(step)

    def make(self, step: int) -> LatentBatch:
        """Draw everything random of one step, and return this process's rows of it."""
        batch, side = self.settings.batch, self.settings.crop // 8
        generator = generator_for(self.settings.seed, step)
        indices = self.crops.draw(step, batch, generator)
        noise = torch.randn((batch, self.unet.config.in_channels, side, side), generator=generator)
        timesteps = torch.randint(1000, (batch,), generator=generator)
        share = slice(self.rows.start, self.rows.stop)
        return LatentBatch(self.crops.hq(indices[share]), noise[share], timesteps[share])

    def validate(self, step: int, folder: Path) -> dict[str, float]:
        """Write a sheet of unconditional samples."""
        generator = torch.Generator().manual_seed(1)
        sampler = DDPMScheduler.from_config(self.module.schedule.config, timestep_spacing="leading", steps_offset=1)
        sampler.set_timesteps(25)
        side = self.settings.crop // 8
        x_t = torch.randn((8, self.unet.config.in_channels, side, side), generator=generator).to(self.settings.device)
        for timestep in sampler.timesteps:
            eps = self.unet(x_t, timestep, self.module.null_text.expand(8, -1, -1)).sample
            x_t = sampler.step(eps, timestep, x_t, generator=generator).prev_sample
        images = models.decode(self.vae, x_t)
        sheet = torch.cat([torch.cat(list(images[:4]), dim=2), torch.cat(list(images[4:]), dim=2)], dim=1)
        pixels = ((sheet + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()
        Image.fromarray(pixels).save(folder / f"validation_{step:08d}.png")
        return {"latent_std": float(x_t.std())}

    def finish(self, folder: Path, made: dict[str, Any]) -> None:
        """Write `folder` as a base model: `unet`, `vae`, `null_text.safetensors`."""
        BaseModel(self.unet, self.vae, self.module.null_text).save(folder)
        run_folder.note(folder, made)
