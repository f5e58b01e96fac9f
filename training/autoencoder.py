"""Stage 1 of a base model from nothing: a narrow KL autoencoder (Stable Diffusion's, f8)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor, nn

from clearsr_core.config import LATENT_SCALE

from . import provenance, run_folder, snapshot
from .base_model import save_network
from .batches import Ahead, DataSettings, check_widths
from .clearsr_model import ClearSRModel, require_file
from .degradation import Preset
from .discriminator import PatchDiscriminator, adversarial_losses
from .linear_start import fit_ends, start_linear
from .loop import check_counts
from .models import build_autoencoder
from .perceptual import EffLite
from .photographs import Photographs
from .pipeline import GRID
from .randomness import generator_for
from .restored import RestoredCrops


@dataclass(frozen=True)
class AutoencoderSettings(DataSettings):
    """Settings of the autoencoder stage."""

    stage = "autoencoder"

    widths: tuple[int, ...] = (32, 32, 64, 128)  # channels per level, finest first
    latent_channels: int = 4  # of the latent; 4 are those of Stable Diffusion
    norm_groups: int = 8  # of every group norm; a group of one or two channels loses the colours
    blocks: int = 1  # residual blocks per encoder level (the decoder has one more)
    batch: int = 4
    crop: int = 96  # pixels, a multiple of 8
    freeze_encoder: bool = False  # the decoder alone learns: latents, and all that was trained on them, stay valid
    candidates: int = 3  # crops drawn for each one used, the most detailed is taken; of restored ones always two
    kl_weight: float = 1e-6  # of the pull towards a unit Gaussian
    perceptual_weight: float = 0.15  # of the EffLite distance, beside an L1 of weight 1
    coarse_weight: float = 0.5  # of the L1 between 8x8 means; without it a short training spends the latent on edges
    restored_by: Path = Path()  # a finished file: the decoder sees what its sampler leaves of degraded crops, too
    restored_share: float = 0.75  # of the crops of a batch, on average
    restored_crops: int = 2048  # different ones, degraded and sampled once
    restored_cache: Path = Path("runs/restored.safetensors")  # their latents
    restore_steps: int = 7  # of the sampler
    restore_denoise: float = 0.35  # of the sampler; 1 = the whole way
    degradation: Preset = "light"  # of the crops that are restored
    latent_noise: float = 0.0  # largest deviation of the noise on the latents that the decoder sees, model units
    adversarial_weight: float = 0.0  # of a patch discriminator's judgement; 0 = no discriminator
    adversarial_start: int = 0  # step from which the decoder hears it; it learns from the first one on
    discriminator_width: int = 32  # channels after its first convolution

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(
            self,
            latent_channels=4,
            norm_groups=1,
            blocks=1,
            discriminator_width=1,
            adversarial_start=0,
            restore_steps=1,
        )
        check_widths(self.widths, self.norm_groups)
        for name in ("kl_weight", "perceptual_weight", "coarse_weight", "latent_noise", "adversarial_weight"):
            if not getattr(self, name) >= 0.0:
                raise ValueError(f"--{name}={getattr(self, name)}: give 0 or more.")


class CropBatch(NamedTuple):
    """Everything random of one step."""

    images: Tensor  # (B, 3, crop, crop) in [-1, 1]
    noise: Tensor  # (B, C, crop / 8, crop / 8), of the posteriors, unit variance
    disturbance: Tensor  # (B, C, crop / 8, crop / 8) in model units, of another strength for every crop
    restored: Tensor  # (B, C, crop / 8, crop / 8) in model units: latents as a sampler left them
    is_restored: Tensor  # (B,) whether they take the place of those of E
    heard: bool  # the decoder hears the discriminator already


class Reconstruction(nn.Module):
    """What the autoencoder makes of crops, held against them; w are the settings of these names.

    L1 + w_perceptual EffLite + w_coarse L1 of 8x8 means + w_kl KL to a unit Gaussian, and with a discriminator
    w_adversarial (its own loss + what the decoder hears of it).
    """

    def __init__(
        self, settings: AutoencoderSettings, model: AutoencoderKL, discriminator: PatchDiscriminator | None
    ) -> None:
        super().__init__()
        self.settings, self.model, self.perceptual = settings, model, EffLite()
        self.discriminator = discriminator

    def forward(self, batch: CropBatch) -> tuple[Tensor, dict[str, Tensor]]:
        settings, images = self.settings, batch.images
        with torch.set_grad_enabled(torch.is_grad_enabled() and not settings.freeze_encoder):
            posterior = self.model.encode(images).latent_dist
        encoded = posterior.mean + posterior.std * batch.noise
        latents = torch.where(batch.is_restored[:, None, None, None], batch.restored / LATENT_SCALE, encoded)
        restored = self.model.decode(latents + batch.disturbance / LATENT_SCALE).sample
        l1 = (restored - images).abs().mean()
        perceptual = self.perceptual.distance(restored, images).mean()
        kl = posterior.kl().mean()
        coarse = torch.nn.functional.avg_pool2d(restored - images, 8).abs().mean()
        loss = l1 + settings.perceptual_weight * perceptual + settings.coarse_weight * coarse + settings.kl_weight * kl
        psnr = -10 * torch.log10((restored.detach() - images).square().mean() / 4 + 1e-12)
        figures = {"l1": l1, "coarse": coarse, "efflite": perceptual, "psnr": psnr}
        if self.discriminator is not None:
            heard, judge = adversarial_losses(self.discriminator, restored, images)
            # Adam does not care how the judge's own loss is scaled; the common limit of the gradient's norm does.
            loss = loss + settings.adversarial_weight * judge
            if batch.heard:
                loss = loss + settings.adversarial_weight * heard
            figures |= {"adversarial": heard, "judge": judge}
        return loss, {name: value.detach() for name, value in figures.items()}


class AutoencoderStage:
    """The autoencoder, from a linear start."""

    def __init__(self, settings: AutoencoderSettings) -> None:
        self.settings = settings
        if settings.best not in ("none", "psnr"):
            raise ValueError(f"--best={settings.best}: this stage measures psnr alone.")
        if settings.freeze_encoder and settings.init == Path():
            raise ValueError(
                "--freeze_encoder=true trains the decoder on latents of an encoder that has learned already: give "
                "--init=, a ClearSR file or the `vae` folder of a finished run."
            )
        begun = snapshot.latest(settings.init) if settings.freeze_encoder else None
        if begun is not None and not snapshot.read(begun).settings.get("freeze_encoder"):
            raise ValueError(
                f"--init={settings.init} is a run, whose snapshots hold the latents as they were before the last step "
                f"normalised them. To train the decoder alone give its result, --init={settings.init / 'vae'}, or a "
                "ClearSR file."
            )
        if settings.restored_by != Path():
            require_file(settings.restored_by)
            if not settings.freeze_encoder:
                raise ValueError("--restored_by needs --freeze_encoder=true: its latents are those of a fixed encoder.")
            if settings.crop % GRID or settings.restored_crops < 1:
                raise ValueError(
                    f"--restored_by needs --crop in multiples of {GRID} pixels and at least one of --restored_crops, "
                    f"not {settings.crop} and {settings.restored_crops}."
                )
            if not 0.0 <= settings.restored_share <= 1.0:
                raise ValueError(f"--restored_share={settings.restored_share}: give a number from 0 to 1.")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)  # torch's layers draw from nothing else; fork_rng puts it back
            self.model = build_autoencoder(
                settings.widths, settings.blocks, settings.norm_groups, settings.latent_channels
            )
            start_linear(self.model)
            judge = PatchDiscriminator(settings.discriminator_width) if settings.adversarial_weight else None
        self.photographs = settings.photographs(settings.crop)
        fit_ends(self.model, self.photographs.crops(32, settings.crop, torch.Generator().manual_seed(settings.seed)))
        self.module = Reconstruction(settings, self.model, judge).to(settings.device)

    @property
    def given(self) -> dict[str, str]:
        found = {"set of photographs": provenance.digest(self.photographs.identity)}
        if self.settings.restored_by != Path():
            found["file for --restored_by"] = provenance.sha256(self.settings.restored_by)
        return found

    @property
    def begun_from(self) -> dict[str, str]:
        return {}

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        decoder = ("decoder.", "post_quant_conv.")
        still = self.settings.freeze_encoder
        moved = {name: value for name, value in self.weights().items() if not still or name.startswith(decoder)}
        judge = self.module.discriminator
        if judge is not None:
            moved |= {f"discriminator.{name}": value for name, value in judge.named_parameters()}
        return moved

    def weights(self) -> dict[str, torch.nn.Parameter]:
        """Return the autoencoder alone: the discriminator is of no use to other runs, and begins anew in each."""
        return dict(self.model.named_parameters())

    def start(self, rows: range) -> None:
        self.rows = rows
        self.restored = None if self.settings.restored_by == Path() else self.restored_crops()
        self.batches = Ahead(self.make, self.settings.steps, self.settings.workers)

    def batch(self, step: int) -> CropBatch:
        return self.batches.get(step)

    def make(self, step: int) -> CropBatch:
        """Draw everything random of a step; each crop follows from its number among all samples of the run."""
        settings = self.settings
        numbers = [step * settings.batch + row for row in self.rows]
        images = torch.stack(
            [
                self.photographs.crop(
                    settings.crop, generator_for(settings.seed + 1, number), settings.candidates, number
                )
                for number in numbers
            ]
        )
        shape = (settings.batch, settings.latent_channels, settings.crop // 8, settings.crop // 8)
        generator = generator_for(settings.seed, step)
        noise = torch.randn(shape, generator=generator)
        strength = settings.latent_noise * torch.rand((settings.batch, 1, 1, 1), generator=generator)
        disturbance = strength * torch.randn(shape, generator=generator)
        share, heard = slice(self.rows.start, self.rows.stop), step >= settings.adversarial_start
        restored, is_restored = torch.zeros(shape), torch.zeros(settings.batch, dtype=torch.bool)
        if self.restored is not None:
            is_restored = torch.rand(settings.batch, generator=generator) < settings.restored_share
            chosen = torch.randint(self.restored.count, (settings.batch,), generator=generator)
            restored = self.restored.latents[chosen]
            theirs = self.restored.images(chosen[share])
            images = torch.where(is_restored[share, None, None, None], theirs, images)
        return CropBatch(images, noise[share], disturbance[share], restored[share], is_restored[share], heard)

    def restored_crops(self) -> RestoredCrops:
        """Have the finished file's sampler restore degraded crops.

        Raises:
            ValueError: the file's autoencoder gives other latents than this run's.
        """
        settings = self.settings
        model = ClearSRModel.from_checkpoint(settings.restored_by)
        theirs = model.vae.state_dict()
        for name, value in self.model.state_dict().items():
            # Finished files hold half precision.
            if name.startswith(("encoder.", "quant_conv.")) and not torch.equal(
                value.cpu().half(), theirs[name].half()
            ):
                raise ValueError(
                    f"--restored_by={settings.restored_by} has another encoder than this run ({name} differs), so its "
                    "latents mean something else. Give --init= that file, or a run that began with it, and "
                    "--freeze_encoder=true."
                )
        return RestoredCrops(
            self.photographs,
            model,
            settings.crop,
            settings.restored_crops,
            settings.seed,
            steps=settings.restore_steps,
            denoise=settings.restore_denoise,
            degradation=settings.degradation,
            cache=settings.restored_cache,
            device=settings.device,
        )

    def validate(self, step: int, folder: Path) -> dict[str, float]:
        size = min(256, *(min(size) for size in self.photographs.sizes)) // 8 * 8
        images = self.photographs.crops(4, size, torch.Generator().manual_seed(1), candidates=4).to(
            self.settings.device
        )
        restored = self.model.decode(self.model.encode(images).latent_dist.mode()).sample.clamp(-1, 1)
        sheet = torch.cat([torch.cat(list(images), dim=2), torch.cat(list(restored), dim=2)], dim=1)
        pixels = ((sheet + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()
        Image.fromarray(pixels).save(folder / f"validation_{step:08d}.png")
        return {"psnr": float(-10 * torch.log10((restored - images).square().mean() / 4))}

    def finish(self, folder: Path, made: dict[str, Any]) -> None:
        """Write `folder/vae` in diffusers' layout, with latents normalised as Stable Diffusion expects."""
        if not self.settings.freeze_encoder:
            normalise_latents(self.model, self.photographs, self.settings.crop)
        save_network(self.model, folder / "vae")
        run_folder.note(folder, made)


def normalise_latents(model: AutoencoderKL, photographs: Photographs, crop: int, count: int = 512) -> None:
    """Fold an affine map per channel into `quant_conv` / `post_quant_conv`, so that latent * 0.18215 is standardised.

    The autoencoder stays the same function of the image. Every latent channel gets mean 0 and standard deviation
    1 / 0.18215, measured on `count` crops: Stable Diffusion's scale then holds for this model too.
    """
    generator = torch.Generator().manual_seed(0)
    device = model.quant_conv.weight.device
    latents = torch.cat(
        [model.encode(photographs.crops(16, crop, generator).to(device)).latent_dist.mode() for _ in range(count // 16)]
    )
    mean, std = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    gain = 1.0 / (std * LATENT_SCALE)
    channels = mean.shape[0]
    quant, post = model.quant_conv, model.post_quant_conv
    # Moments are (mean, log variance) in channel order: z' = gain (z - mean), log var' = log var + 2 log gain.
    quant.weight.data[:channels] *= gain[:, None, None, None]
    quant.bias.data[:channels] = (quant.bias.data[:channels] - mean) * gain
    quant.bias.data[channels:] += 2.0 * gain.log()
    # The decoder undoes it: z = z' / gain + mean.
    post.bias.data += (post.weight.data[:, :, 0, 0] * mean).sum(dim=1)
    post.weight.data /= gain[None, :, None, None]
