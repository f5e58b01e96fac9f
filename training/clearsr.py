"""Stage 3, the paper: DPM, SPM and both LoRAs trained together on a frozen base model (Sec. 3, Eq. 1)."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from torch import Tensor, nn

from clearsr_core.config import ControlConfig

from . import degradation, models
from .base import noise_schedule
from .base_model import BaseModel
from .batches import Ahead, DataSettings
from .clearsr_model import ClearSRModel
from .clip_vision import ClipImagePrompt
from .export import export, latent_rgb
from .latents import FixedCrops, FixedPairs
from .loop import plain
from .pipeline import sample, upscale_lr
from .randomness import generator_for


@dataclass(frozen=True)
class ClearSRSettings(DataSettings):
    """Settings of the ClearSR stage; names that the paper gives carry its values as defaults."""

    base: Path = Path("runs/nano_base")  # the frozen base model: a folder, a file, or `random` for a trial run
    base_widths: tuple[int, ...] = (320, 640, 1280, 1280)  # of the random base model
    clip_vision: Path = Path()  # folder or file of CLIP ViT-H/14, whose features are p; empty = an encoder of our own
    cache: Path = Path("runs/latents.safetensors")  # encoded crops
    batch: int = 8
    crop: int = 512  # pixels
    crops: int = 12_000  # number of different crops; the degradation is drawn anew each time
    freeze_encoders: bool = False  # hold E' and the image encoder still: each crop is degraded and encoded only once
    pair_cache: Path = Path("runs/pairs.safetensors")  # what freeze_encoders keeps
    rank: int = 16  # of both LoRAs
    vae_lora: bool = True  # off: x_lr comes from the plain encoder (Tab. 3)
    unet_lora: bool = True  # off: the UNet's decoder stays as it is (Tab. 3)
    prompt_dropout: float = 0.1  # share of batches that see the empty prompt instead of p
    degradation: Literal["paper", "light"] = "paper"
    usm: bool = False  # sharpen every crop by unsharp masking before it is encoded and degraded
    workers: int = 0  # threads that degrade the crops of later steps
    control_input: Literal["lr", "lr+xt"] = "lr"
    control_time: Literal["t", "fixed"] = "t"
    use_dpm: bool = True
    use_spm: bool = True
    window_attention: bool = True
    relative_bias: Literal["aligned", "none"] = "aligned"
    query_windows: tuple[int, ...] = (8, 4, 2, 1)  # empty: one global window (needs relative_bias none)
    fixed_timestep: int = 0  # for control_time fixed
    prompt_mode: Literal["pooled", "patch", "null"] = "pooled"  # p: one token, a grid of tokens, or the empty prompt
    anchor: Literal["lr_encoder", "plain"] = "lr_encoder"  # x_lr of start and LSA at inference: of E', or of E


def control_config(settings: ClearSRSettings, base: BaseModel) -> ControlConfig:
    """Return the configuration of DPM and SPM that fits the base model's UNet."""
    unet = base.unet.config
    widths = tuple(unet.block_out_channels)
    return ControlConfig(
        widths=widths,
        head_channels=widths[0] // unet.attention_head_dim[0],
        context_dim=unet.cross_attention_dim,
        norm_groups=unet.norm_num_groups,
        control_input=settings.control_input,
        control_time=settings.control_time,
        use_dpm=settings.use_dpm,
        use_spm=settings.use_spm,
        window_attention=settings.window_attention,
        relative_bias=settings.relative_bias,
        query_windows=settings.query_windows,
        fixed_timestep=settings.fixed_timestep,
    )


@dataclass(frozen=True)
class Batch:
    """Everything random of one step."""

    indices: Tensor  # (B,) crop numbers
    noise: Tensor  # (B, 4, h, w)
    timesteps: Tensor  # (B,) 0 .. 999
    keep_prompt: bool  # else the whole batch sees the empty prompt
    lr_images: Tensor | None  # (B, 3, crop, crop) in [0, 1]; None where the pairs are fixed


class ClearSRStage:
    """Eq. 1 on pairs of crops and their Real-ESRGAN degradations."""

    def __init__(self, settings: ClearSRSettings) -> None:
        self.settings = settings
        base = BaseModel.load(settings.base, settings.base_widths, settings.seed)
        self.schedule = noise_schedule()
        self.degradation = degradation.PRESETS[settings.degradation]
        photographs = settings.photographs(settings.crop)
        base.vae.to(settings.device)
        self.crops = FixedCrops(
            photographs,
            base.vae,
            settings.crop,
            settings.crops,
            settings.seed,
            settings.cache,
            settings.device,
            settings.usm,
        )
        control = control_config(settings, base)
        clip = None
        if settings.clip_vision != Path():
            if settings.prompt_mode == "null":
                raise ValueError("--prompt_mode=null has no use for --clip_vision: leave one of them out.")
            patch = settings.prompt_mode == "patch"
            clip = ClipImagePrompt.load(settings.clip_vision, patch=patch, context_dim=control.context_dim)
        self.model = ClearSRModel(base, control, settings.rank, settings.prompt_mode, settings.seed, clip)
        self.model.to(settings.device)
        self.batches = Ahead(self.batch, settings.seed, settings.steps, settings.workers)

    def trainable(self) -> dict[str, nn.Parameter]:
        settings = self.settings
        held = {
            "vae_lora.": settings.freeze_encoders or not settings.vae_lora,
            "image_encoder.": settings.freeze_encoders,
            "unet_lora.": not settings.unet_lora,
        }
        still = tuple(part for part, stands in held.items() if stands)
        return {name: value for name, value in self.weights().items() if not name.startswith(still)}

    def weights(self) -> dict[str, nn.Parameter]:
        return self.model.trainable()

    @functools.cached_property
    def fixed_pairs(self) -> FixedPairs:
        """Every crop's partner, encoded; made on first use, when the weights are in place."""
        settings = self.settings
        return FixedPairs(self.crops, self.pairs, self.model, settings.degradation, settings.seed, settings.pair_cache)

    def pairs(self, indices: Tensor, generator: torch.Generator) -> Tensor:
        """Return the degraded, upscaled crops of `indices`: (B, 3, crop, crop) in [0, 1]."""
        hq_images = (self.crops.images(indices) + 1.0) / 2.0
        lr_images = torch.stack([degradation.degrade(image, generator, self.degradation) for image in hq_images])
        return upscale_lr(lr_images, (self.settings.crop, self.settings.crop))

    def batch(self, step: int, generator: torch.Generator) -> Batch:
        """Draw everything random of one step, and degrade its crops unless their partners are fixed."""
        indices = self.crops.draw(step, self.settings.batch, generator)
        noise = torch.randn(self.crops.latents[indices].shape, generator=generator)
        timesteps = torch.randint(1000, (len(indices),), generator=generator)
        keep = float(torch.rand((), generator=generator)) >= self.settings.prompt_dropout
        lr_images = None if self.settings.freeze_encoders else self.pairs(indices, generator)
        return Batch(indices, noise, timesteps, keep, lr_images)

    def loss(self, step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        """Return Eq. 1 for one batch."""
        device = self.settings.device
        batch = self.batches.get(step, generator)
        indices, noise, timesteps = batch.indices, batch.noise, batch.timesteps
        x_t = self.schedule.add_noise(self.crops.latents[indices], noise, timesteps).to(device)

        figures = {}
        if batch.lr_images is None:
            lr_latent, prompt = (
                self.fixed_pairs.latents[indices].to(device),
                self.fixed_pairs.prompts[indices].to(device),
            )
        else:
            lr_images = batch.lr_images.to(device)
            lr_latent, prompt = self.model.lr_encoder(lr_images * 2.0 - 1.0), self.model.image_prompt(lr_images)
            if step % 50 == 0:
                # Nothing in Eq. 1 keeps E' near E, and the decoder only knows E: watch the distance.
                plain = models.encode(self.model.vae, lr_images * 2.0 - 1.0)
                figures["encoder_drift"] = float((lr_latent.detach() - plain).square().mean().sqrt())
        # p is dropped now and then, so that the empty prompt stays meaningful (guidance, missing image encoder). The
        # whole batch at once: p and the empty prompt need not have the same number of tokens.
        if not batch.keep_prompt:
            prompt = self.model.null_text.expand(len(indices), -1, -1)
        eps = self.model.eps(x_t, timesteps.to(device), lr_latent, prompt)
        return torch.nn.functional.mse_loss(eps, noise.to(device)), figures

    def validate(self, step: int, folder: Path) -> dict[str, float]:
        """Restore four fixed pairs in 20 steps; write upscaled input, result and target as one sheet."""
        indices = torch.arange(4)
        generator = generator_for(self.settings.seed, -1)
        lr_images = self.pairs(indices, generator).to(self.settings.device)
        lr_latent = self.model.lr_encoder(lr_images * 2.0 - 1.0)
        prompt = self.model.image_prompt(lr_images)
        x_0 = sample(
            lambda x_t, timesteps: self.model.eps(x_t, timesteps, lr_latent, prompt),
            lr_latent,
            torch.randn(lr_latent.shape, generator=generator),
            generator,
            steps=20,
        )
        restored = models.decode(self.model.vae, x_0).cpu()
        hq_images = self.crops.images(indices)
        rows = [lr_images.cpu() * 2.0 - 1.0, restored, hq_images]
        sheet = torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1)
        pixels = ((sheet + 1.0) * 127.5).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / f"validation_{step:08d}.png")
        error = (restored - hq_images).square().mean() / 4.0
        distance = (x_0.cpu() - self.crops.latents[indices]).square().mean().sqrt()
        return {"psnr": float(-10.0 * torch.log10(error)), "latent_error": float(distance)}

    def finish(self, folder: Path) -> None:
        """Write `folder/clearsr.safetensors`, the file that ComfyUI loads."""
        indices = torch.arange(min(64, self.crops.count))
        export(
            self.model,
            folder / "clearsr.safetensors",
            rank=self.settings.rank,
            prompt_mode=self.settings.prompt_mode,
            anchor=self.settings.anchor,
            training={
                "settings": plain(self.settings),
                "photographs": len(self.crops.photographs),
                "megapixels": round(self.crops.photographs.megapixels),
                "metrics": {"validation": self.validate(self.settings.steps, folder)},
            },
            preview=latent_rgb(self.crops.latents[indices], self.crops.images(indices)),
        )
