"""Stage 3, the paper: DPM, SPM and both LoRAs trained together on a frozen base model (Sec. 3, Eq. 1)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from clearsr_core.config import ControlConfig

from . import control_init, degradation, metrics, models, provenance
from .base import noise_schedule
from .base_files import RANDOM, layout
from .base_model import BaseModel
from .batches import Ahead, DataSettings
from .checkpointing import Checkpointing, checkpoint_blocks
from .clearsr_file import export, is_contained, latent_rgb
from .clearsr_model import ClearSRModel
from .clip_vision import ClipImagePrompt
from .degradation import Preset
from .latents import Crops, FixedPairs, base_hash, weights_hash
from .loop import check_counts
from .pairs import DegradeOn, degrade_pairs
from .picture_files import to_bytes, write_png
from .pipeline import sample, upscale_lr
from .randomness import generator_for

NIQE_SIDE = 192  # smallest picture that NIQE can judge: it compares blocks of 96 pixels


@dataclass(frozen=True)
class ClearSRSettings(DataSettings):
    """Settings of the ClearSR stage; names that the paper gives carry its values as defaults."""

    stage = "clearsr"

    base: Path = Path("runs/nano_base")  # the frozen base model: a folder, a file, or `random` for a trial run
    base_widths: tuple[int, ...] = (320, 640, 1280, 1280)  # of the random base model
    control_init: Path = Path()  # an imported control network, whose weights DPM begins with; empty = as the UNet
    clip_vision: Path = Path()  # folder or file of CLIP ViT-H/14, whose features are p; empty = an encoder of our own
    cache: Path = Path("runs/latents.safetensors")  # encoded crops
    batch: int = 8
    crop: int = 512  # pixels
    crops: int = 12_000  # different crops, encoded once and degraded anew each time; 0 = a new crop every time
    freeze_encoders: bool = False  # hold E' and the image encoder still: each crop is degraded and encoded only once
    pair_cache: Path = Path("runs/pairs.safetensors")  # what freeze_encoders keeps
    rank: int = 16  # of both LoRAs
    vae_lora: bool = True  # off: x_lr comes from the plain encoder (Tab. 3)
    unet_lora: bool = True  # off: the UNet's decoder stays as it is (Tab. 3)
    prompt_dropout: float = 0.1  # share of batches that see the empty prompt instead of p
    degradation: Preset = "paper"  # ranges of blur, noise and JPEG: docs/TRAINING.md
    degrade_on: DegradeOn = "cpu"  # in the workers, or, for a GPU, on the device of the model
    usm: bool = False  # sharpen every crop by unsharp masking before it is encoded and degraded
    checkpointing: Checkpointing = "none"  # what is computed twice instead of kept for the gradients
    control_input: Literal["lr", "lr+xt"] = "lr"  # what DPM and SPM read: x_lr, or x_t beside it (decision 0001)
    control_time: Literal["t", "fixed"] = "t"  # t of the step, or always fixed_timestep (decision 0002)
    use_dpm: bool = True  # off: no Detail Preserving Module
    use_spm: bool = True  # off: no Structure Preserving Module (Tab. 2)
    window_attention: bool = True  # off: DPM without its extra cross-attention (Tab. 2)
    relative_bias: Literal["aligned", "none"] = "aligned"  # B of Eq. 2, or none (decision 0004)
    # S, the side of a window, per level, finest first (decision 0003); empty: one global one, with relative_bias none.
    query_windows: tuple[int, ...] = (8, 4, 2, 1)
    fixed_timestep: int = 0  # for control_time fixed
    prompt_mode: Literal["pooled", "patch", "null"] = "pooled"  # p: one token, a grid of tokens, or the empty prompt
    anchor: Literal["lr_encoder", "plain"] = "lr_encoder"  # x_lr of start and LSA at inference: of E', or of E

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, crops=0)
        if self.freeze_encoders and not self.crops:
            raise ValueError("--freeze_encoders=true encodes a fixed set of crops once: give --crops=NUMBER above 0.")
        if self.best == "niqe" and self.crop < NIQE_SIDE:
            raise ValueError(f"--best=niqe needs crops of {NIQE_SIDE} pixels or more, not --crop={self.crop}.")
        if self.rank < 1:
            raise ValueError(
                f"--rank={self.rank}: give 1 or more. To train without LoRA: --vae_lora=false --unet_lora=false."
            )
        if self.control_init != Path() and self.init != Path():
            raise ValueError(
                "--init sets the weights that --control_init would set, and all others: give one of the two."
            )
        if self.control_init != Path() and not self.use_dpm:
            raise ValueError("--use_dpm=false leaves DPM out, which --control_init is for: leave one of them out.")
        if not 0.0 <= self.prompt_dropout <= 1.0:
            raise ValueError(f"--prompt_dropout={self.prompt_dropout}: give a number from 0 to 1.")
        if self.prompt_mode == "null" and self.clip_vision != Path():
            raise ValueError("--prompt_mode=null has no use for --clip_vision: leave one of them out.")


def control_config(settings: ClearSRSettings, base: BaseModel) -> ControlConfig:
    """Return the configuration of DPM and SPM that fits the base model's UNet."""
    unet = base.unet.config
    widths = tuple(unet.block_out_channels)
    return ControlConfig(
        widths=widths,
        head_channels=widths[0] // unet.attention_head_dim[0],
        context_dim=unet.cross_attention_dim,
        latent_channels=unet.in_channels,
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


def noted(made: dict[str, Any], base: Path) -> dict[str, Any]:
    """Return the notes of a run as its file holds them: their settings are a preset, without what decided nothing."""
    settings = {"stage": ClearSRSettings.stage, **made["settings"]}
    if base != RANDOM:
        settings.pop("base_widths", None)
    return {**made, "settings": settings}


class PairBatch(NamedTuple):
    """Everything random of one step."""

    hq: Tensor  # (B, C, h, w) latents in model units, or (B, 3, crop, crop) crops in [-1, 1] that are new every time
    noise: Tensor  # (B, C, h, w)
    timesteps: Tensor  # (B,) 0 .. 999
    lr_images: Tensor | None  # (B, 3, crop, crop) in [0, 1]; None where the pairs are fixed, or made on the device
    hq_images: Tensor | None  # (B, 3, crop, crop) in [-1, 1], of which the device makes them where `hq` is latents
    numbers: Tensor | None  # (B,) of the samples, which decide the degradations
    lr_latents: Tensor | None  # (B, C, h, w) x_lr of fixed pairs
    prompts: Tensor | None  # (B, n, C) p of fixed pairs
    keep_prompt: bool  # else the whole batch sees the empty prompt
    watch: bool  # measure the distance of E' from E


class ClearSRObjective(nn.Module):
    """Eq. 1."""

    def __init__(self, model: ClearSRModel, settings: ClearSRSettings) -> None:
        super().__init__()
        self.model, self.settings = model, settings
        self.schedule = noise_schedule()

    def forward(self, batch: PairBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return Eq. 1 of a batch, and the distance of E' from E where it is wanted."""
        model, figures = self.model, {}
        x_0 = models.encode(model.vae, batch.hq) if batch.hq.shape[1] == 3 else batch.hq
        x_t = self.schedule.add_noise(x_0, batch.noise, batch.timesteps)
        if batch.lr_latents is not None and batch.prompts is not None:
            lr_latents, prompts = batch.lr_latents, batch.prompts
        else:
            lr_images = self._lr_images(batch)
            lr_latents, prompts = model.lr_encoder(lr_images * 2.0 - 1.0), model.image_prompt(lr_images)
            if batch.watch:
                figures["encoder_drift"] = encoder_drift(model, lr_images * 2.0 - 1.0, lr_latents)
        # p is dropped now and then, so that the empty prompt stays meaningful (guidance, missing image encoder). The
        # whole batch at once: p and the empty prompt need not have the same number of tokens.
        if not batch.keep_prompt:
            # Data parallelism wants a gradient, if zero, for all that moves.
            prompts = model.null_text.expand(len(x_t), -1, -1) + 0.0 * prompts.mean()
        eps = model.eps(x_t, batch.timesteps, lr_latents, prompts)
        return torch.nn.functional.mse_loss(eps.float(), batch.noise), figures

    def _lr_images(self, batch: PairBatch) -> Tensor:
        if batch.lr_images is not None:
            return batch.lr_images
        hq_images = batch.hq if batch.hq_images is None else batch.hq_images
        assert batch.numbers is not None
        return lr_partners(hq_images, batch.numbers, self.settings)


def lr_partners(hq_images: Tensor, numbers: Tensor, settings: ClearSRSettings) -> Tensor:
    """Degrade and enlarge crops.

    Args:
        hq_images: (B, 3, crop, crop) in [-1, 1].
        numbers: (B,) of the samples; with the seed they decide what happens to each crop.
        settings: of the run.

    Returns:
        (B, 3, crop, crop) in [0, 1].
    """
    preset = degradation.PRESETS[settings.degradation]
    hq = (hq_images + 1.0) / 2.0
    pairs = degrade_pairs(hq, numbers.tolist(), settings.seed + 4, preset, degrade_on=settings.degrade_on)
    return upscale_lr(pairs, (settings.crop, settings.crop))


@torch.no_grad()
def encoder_drift(model: ClearSRModel, lr_images: Tensor, lr_latents: Tensor) -> Tensor:
    """Return ||E'(LR) - E(LR)||, root mean square: nothing in Eq. 1 keeps it small, and the decoder knows E only."""
    return (lr_latents - models.encode(model.vae, lr_images)).float().square().mean().sqrt()


class ClearSRStage:
    """Eq. 1 on pairs of crops and their Real-ESRGAN degradations."""

    def __init__(self, settings: ClearSRSettings) -> None:
        self.settings = settings
        base = BaseModel.load(settings.base, settings.base_widths, settings.seed)
        layout(base.unet.config, base.vae.config)  # what no file could hold is refused before anything is trained
        control = control_config(settings, base)
        warm = settings.control_init != Path()
        if warm:
            control_init.check(settings.control_init, control)
        photographs = settings.photographs(settings.crop)
        base.vae.to(settings.device)
        self.crops = Crops(
            photographs,
            base.vae,
            settings.crop,
            settings.crops,
            settings.seed,
            settings.cache,
            settings.device,
            settings.usm,
            settings.candidates,
        )
        clip = None
        if settings.clip_vision != Path():
            patch = settings.prompt_mode == "patch"
            clip = ClipImagePrompt.load(settings.clip_vision, patch=patch, context_dim=control.context_dim)
        self.given = {
            "set of photographs": provenance.digest(photographs.identity),
            "base model": base_hash(base),
            "image encoder of CLIP": weights_hash(clip),
        }
        self.model = ClearSRModel(base, control, settings.rank, settings.prompt_mode, settings.seed, clip)
        self.begun_from: dict[str, str] = {}
        if warm:
            self.begun_from = control_init.start_dpm(self.model.control, settings.control_init)
            self.given["file for --control_init"] = self.begun_from["sha256"]
        checkpoint_blocks(self.model, settings.checkpointing)
        self.module = ClearSRObjective(self.model, settings).to(settings.device)

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

    def start(self, rows: range) -> None:
        settings = self.settings
        self.rows = rows
        self.crops.encode()
        self._silence_what_is_off()
        self.fixed_pairs = None
        if settings.freeze_encoders:
            self.fixed_pairs = FixedPairs(
                self.crops, self.degraded, self.model, settings.degradation, settings.seed, settings.pair_cache
            )
        self.batches = Ahead(self.make, settings.steps, settings.workers)

    def _silence_what_is_off(self) -> None:
        """Let a LoRA that is off add nothing, also where the weights that the run began with have one."""
        on = {"vae_lora.": self.settings.vae_lora, "unet_lora.": self.settings.unet_lora}
        silent = tuple(part for part, wanted in on.items() if not wanted)
        for name, value in self.weights().items():
            if name.startswith(silent) and name.endswith("lora_B.weight"):
                value.data.zero_()

    def degraded(self, numbers: Tensor) -> Tensor:
        """Return crops of the fixed set as they are degraded once: (B, 3, crop, crop) in [0, 1]."""
        return lr_partners(self.crops.images(numbers), numbers, self.settings)

    def batch(self, step: int) -> PairBatch:
        return self.batches.get(step)

    def make(self, step: int) -> PairBatch:
        """Draw everything random of one step; crop and degrade the rows of this process."""
        settings, side = self.settings, self.settings.crop // 8
        generator = generator_for(settings.seed, step)
        indices = self.crops.draw(step, settings.batch, generator)
        channels = self.model.control.config.latent_channels
        noise = torch.randn((settings.batch, channels, side, side), generator=generator)
        timesteps = torch.randint(1000, (settings.batch,), generator=generator)
        keep_prompt = float(torch.rand((), generator=generator)) >= settings.prompt_dropout

        share = slice(self.rows.start, self.rows.stop)
        indices, noise, timesteps = indices[share], noise[share], timesteps[share]
        hq = self.crops.hq(indices)
        batch = PairBatch(hq, noise, timesteps, None, None, None, None, None, keep_prompt, step % 50 == 0)
        if self.fixed_pairs is not None:
            pairs = self.fixed_pairs
            return batch._replace(lr_latents=pairs.latents[indices], prompts=pairs.prompts[indices])
        hq_images = None if hq.shape[1] == 3 else self.crops.images(indices)
        numbers = torch.arange(step * settings.batch, (step + 1) * settings.batch)[share]
        if settings.degrade_on == "device":
            return batch._replace(hq_images=hq_images, numbers=numbers)
        return batch._replace(lr_images=lr_partners(hq if hq_images is None else hq_images, numbers, settings))

    def validate(self, step: int, folder: Path) -> dict[str, float]:
        """Restore four pairs in 20 steps; write upscaled input, decoded x_lr, result and target as one sheet.

        Always the same four, of crops that no step trains on, of the same photographs.
        """
        numbers = torch.arange(-4, 0)
        generator = generator_for(self.settings.seed, -1)
        hq_images = self.crops.images(numbers)
        lr_images = lr_partners(hq_images, numbers, self.settings).to(self.settings.device)
        lr_latents = self.model.lr_encoder(lr_images * 2.0 - 1.0)
        prompts = self.model.image_prompt(lr_images)
        x_0 = sample(
            lambda x_t, timesteps: self.model.eps(x_t, timesteps, lr_latents, prompts),
            lr_latents,
            torch.randn(lr_latents.shape, generator=generator),
            generator,
            steps=20,
            anchor=models.encode(self.model.vae, lr_images * 2.0 - 1.0) if self.settings.anchor == "plain" else None,
        )
        restored = models.decode(self.model.vae, x_0).cpu()
        decoded = models.decode(self.model.vae, lr_latents).cpu()
        rows = [lr_images.cpu() * 2.0 - 1.0, decoded, restored, hq_images]
        sheet = torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1)
        write_png(to_bytes((sheet + 1.0) / 2.0), folder / f"validation_{step:08d}.png")

        pictures = [
            (to_bytes((r + 1.0) / 2.0), to_bytes((h + 1.0) / 2.0)) for r, h in zip(restored, hq_images, strict=True)
        ]
        found = {
            "psnr": [metrics.psnr_y(image, target) for image, target in pictures],
            "ssim": [metrics.ssim_y(image, target) for image, target in pictures],
        }
        if self.settings.crop >= NIQE_SIDE:
            found["niqe"] = [metrics.niqe(image) for image, _ in pictures]
        figures = {name: float(np.mean(values)) for name, values in found.items()}
        figures["latent_error"] = float((x_0.cpu() - self.crops.latents(numbers)).square().mean().sqrt())
        figures["encoder_drift"] = float(encoder_drift(self.model, lr_images * 2.0 - 1.0, lr_latents))
        return figures

    def finish(self, folder: Path, made: dict[str, Any]) -> None:
        """Write `folder/clearsr.safetensors`, the file that ComfyUI loads."""
        export(
            self.model,
            folder / "clearsr.safetensors",
            rank=self.settings.rank,
            prompt_mode=self.settings.prompt_mode,
            anchor=self.settings.anchor,
            training={
                **noted(made, self.settings.base),
                "data": self.settings.data.name,
                "photographs": len(self.crops.photographs),
                "megapixels": round(self.crops.photographs.megapixels),
                "metrics": {"validation": self.validate(self.settings.steps, folder)},
            },
            preview=self._preview() if is_contained(self.model) else None,
        )

    def _preview(self) -> tuple[tuple[float, ...], ...]:
        """Return latent -> RGB factors of a base that hosts do not know, fitted to the crops that come first."""
        pieces = torch.arange(min(64, self.crops.count) or 64).split(self.settings.batch)
        latents, images = (torch.cat([find(n) for n in pieces]) for find in (self.crops.latents, self.crops.images))
        return latent_rgb(latents, images)
