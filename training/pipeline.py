"""The reference sampler: spaced DDPM by diffusers' own scheduler, LR start, LSA between the steps (Sec. 3.3, 4.1)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from clearsr_core.lsa import LSAConfig, adjust
from clearsr_core.schedule import Spacing, last_timesteps

from . import models
from .clearsr_model import ClearSRModel

GRID = 64  # pixels; the deepest level of the UNet then has whole windows
START_TIMESTEP = 999  # the LR start adds the noise of the last training step, whatever the first step of the schedule


def sampling_schedule(steps: int, spacing: Spacing, denoise: float = 1.0) -> DDPMScheduler:
    """Return Stable Diffusion's schedule respaced to `steps` (leading: offset 1), variance fixed_small, no clipping.

    `denoise` below 1 leaves the noisiest part of the schedule out; the distance between the steps stays.
    """
    scheduler = DDPMScheduler(
        num_train_timesteps=1000,
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        variance_type="fixed_small",
        timestep_spacing=spacing,
        steps_offset=1,
    )
    # diffusers' own choice, but for the ends of the range: one step, and a thousand with an offset (see schedule.py).
    scheduler.set_timesteps(timesteps=last_timesteps(steps, denoise, spacing).tolist())
    return scheduler


def upscale_lr(lr_images: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize (B, 3, h, w) in [0, 1] to `size` as the node LR Latent Encode does: bicubic, clamped."""
    return torch.nn.functional.interpolate(lr_images, size, mode="bicubic", antialias=True, align_corners=False).clamp(
        0.0, 1.0
    )


def pad_to_grid(images: Tensor) -> Tensor:
    """Pad (B, 3, H, W) at the bottom and right to multiples of 64 pixels, by reflection as far as that goes."""
    while images.shape[-2] % GRID or images.shape[-1] % GRID:
        height, width = images.shape[-2:]
        below, right = min(-height % GRID, height - 1), min(-width % GRID, width - 1)
        # A side of one pixel has nothing to reflect.
        mode = "reflect" if below + right else "replicate"
        below, right = (below, right) if below + right else (-height % GRID, -width % GRID)
        images = torch.nn.functional.pad(images, (0, right, 0, below), mode=mode)
    return images


def noise_sources(shape: torch.Size, seed: int) -> tuple[Tensor, torch.Generator]:
    """Return the start noise of a seed and the generator of its step noise, as the LSA KSampler draws them."""
    start_noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return start_noise, torch.Generator().manual_seed(seed + 1)


@torch.no_grad()
def restore(
    model: ClearSRModel,
    lr_images: Tensor,
    seed: int,
    *,
    scale: int = 4,
    steps: int = 50,
    denoise: float = 1.0,
    lsa: LSAConfig | None = None,
) -> Tensor:
    """Upscale pictures from pixels to pixels.

    Args:
        model: a trained model.
        lr_images: (B, 3, h, w) in [0, 1].
        seed: of all noise; the same seed gives the picture that the nodes give.
        scale: factor of the output size.
        steps: number of inference steps.
        denoise: share of the way that is sampled, from x_lr; 1 is the paper's.
        lsa: strengths and phases; None = off.

    Returns:
        (B, 3, scale h, scale w) in [0, 1].
    """
    height, width = lr_images.shape[-2] * scale, lr_images.shape[-1] * scale
    upscaled = upscale_lr(lr_images, (height, width))
    prompt = model.image_prompt(upscaled)
    padded = pad_to_grid(upscaled) * 2.0 - 1.0
    lr_latent = model.lr_encoder(padded)
    start_noise, generator = noise_sources(lr_latent.shape, seed)
    x_0 = sample(
        lambda x_t, t: model.eps(x_t, t, lr_latent, prompt),
        lr_latent,
        start_noise,
        generator,
        steps=steps,
        denoise=denoise,
        lsa=lsa,
        anchor=models.encode(model.vae, padded) if model.anchor == "plain" else None,
    )
    return (models.decode(model.vae, x_0)[..., :height, :width] + 1.0) / 2.0


@torch.no_grad()
def sample(
    eps: Callable[[Tensor, Tensor], Tensor],
    lr_latent: Tensor,
    start_noise: Tensor,
    generator: torch.Generator,
    *,
    steps: int = 50,
    spacing: Spacing = "leading",
    denoise: float = 1.0,
    lsa: LSAConfig | None = None,
    anchor: Tensor | None = None,
    start_from_lr: bool = True,
) -> Tensor:
    """Sample x_0 for the LR latents.

    Args:
        eps: (x_t (B, 4, h, w), timesteps (B,)) -> predicted noise; everything else is bound into it.
        lr_latent: (B, 4, h, w) x_lr, model units.
        start_noise: (B, 4, h, w) standard normal.
        generator: CPU generator of the noise of each step.
        steps: number of inference steps; 1 or more, need not divide 1000.
        spacing: "leading" (SeeSR's), "linspace" or "trailing".
        denoise: (0, 1]; below 1 sampling starts part of the way, from x_lr noised to the first timestep.
        lsa: strengths and phases of Eqs. 3 and 4; None = off.
        anchor: x_lr of start and LSA, when it is not that of the control.
        start_from_lr: x_T = add_noise(x_lr, noise, 999) as SeeSR does; otherwise plain noise.

    Returns:
        (B, 4, h, w) x_0 in model units.
    """
    scheduler = sampling_schedule(steps, spacing, denoise)
    anchor = lr_latent if anchor is None else anchor
    x_t = start_noise.to(lr_latent)
    if denoise < 1.0:
        x_t = scheduler.add_noise(anchor, x_t, scheduler.timesteps[:1])
    elif start_from_lr:
        x_t = scheduler.add_noise(anchor, x_t, torch.tensor([START_TIMESTEP]))
    for step, timestep in enumerate(scheduler.timesteps):
        predicted = eps(x_t, timestep.expand(x_t.shape[0]).to(x_t.device))
        x_t = scheduler.step(predicted, timestep, x_t, generator=generator).prev_sample
        if lsa is not None:
            x_t = adjust(x_t, anchor, step, steps, lsa)
    return x_t
