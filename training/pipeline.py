"""The reference sampler: spaced DDPM by diffusers' own scheduler, LR start, LSA between the steps (Sec. 3.3, 4.1)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from clearsr_core.color import ColorMethod, transfer
from clearsr_core.lsa import LSAConfig, adjust
from clearsr_core.schedule import Spacing, last_timesteps

from . import models
from .clearsr_model import ClearSRModel

ColorFix = Literal["none", ColorMethod]
Target = Literal["step", "x0"]  # what LSA moves: the state behind each step, or the estimate of x_0 (decision 0008)

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


@dataclass(frozen=True)
class EncodedLR:
    """What sampling needs of a batch of LR pictures, and what is needed to cut its result to size."""

    lr_latent: Tensor  # (B, 4, h, w) x_lr of the control, model units
    anchor: Tensor  # x_lr of start and LSA, as lr_latent
    prompt: Tensor  # (B, n, C) image prompt p
    upscaled: Tensor  # (B, 3, H, W) in [0, 1]: the pictures in the size of the result; the latent may cover more


@torch.no_grad()
def encode_lr(model: ClearSRModel, lr_images: Tensor, scale: int = 4) -> EncodedLR:
    """Upscale (B, 3, h, w) pictures in [0, 1], pad them to the grid and encode them."""
    size = (lr_images.shape[-2] * scale, lr_images.shape[-1] * scale)
    upscaled = upscale_lr(lr_images, size)
    padded = pad_to_grid(upscaled) * 2.0 - 1.0
    lr_latent = model.lr_encoder(padded)
    anchor = models.encode(model.vae, padded) if model.anchor == "plain" else lr_latent
    return EncodedLR(lr_latent, anchor, model.image_prompt(upscaled), upscaled)


def bound_eps(model: ClearSRModel, encoded: EncodedLR, guidance: float = 1.0) -> Callable[[Tensor, Tensor], Tensor]:
    """Return eps(x_t, timesteps) of one batch: x_lr and p bound into it.

    `guidance` other than 1 is classifier-free guidance away from the empty prompt (decision 0006), at twice the cost.
    """

    def eps(x_t: Tensor, timesteps: Tensor) -> Tensor:
        return model.eps(x_t, timesteps, encoded.lr_latent, encoded.prompt)

    def guided(x_t: Tensor, timesteps: Tensor) -> Tensor:
        empty = model.null_text.expand(x_t.shape[0], -1, -1)
        unconditional = model.eps(x_t, timesteps, encoded.lr_latent, empty)
        return unconditional + guidance * (eps(x_t, timesteps) - unconditional)

    return eps if guidance == 1.0 else guided


def to_pixels(model: ClearSRModel, latents: Tensor, encoded: EncodedLR, color_fix: ColorFix = "none") -> Tensor:
    """Decode (B, 4, h, w) in model units, cut it to size, and give it the colours of the LR picture.

    Returns:
        (B, 3, H, W) in [0, 1].
    """
    height, width = encoded.upscaled.shape[-2:]
    image = (models.decode(model.vae, latents)[..., :height, :width] + 1.0) / 2.0
    if color_fix == "none":
        return image
    channels_last = (image.movedim(1, -1), encoded.upscaled.movedim(1, -1))
    return transfer(color_fix, *channels_last).movedim(-1, 1)


@torch.no_grad()
def restore_latents(
    model: ClearSRModel,
    encoded: EncodedLR,
    seed: int,
    *,
    steps: int = 50,
    denoise: float = 1.0,
    lsa: LSAConfig | None = None,
) -> Tensor:
    """Sample x_0 of a batch, (B, 4, h, w) in model units; seed, steps, denoise and lsa as in `restore`."""
    start_noise, generator = noise_sources(encoded.lr_latent.shape, seed)
    return sample(
        bound_eps(model, encoded),
        encoded.lr_latent,
        start_noise,
        generator,
        steps=steps,
        denoise=denoise,
        lsa=lsa,
        anchor=encoded.anchor,
    )


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
    color_fix: ColorFix = "none",
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
        color_fix: none, which is the paper's, or a method of the node ClearSR Color Fix.

    Returns:
        (B, 3, scale h, scale w) in [0, 1].
    """
    encoded = encode_lr(model, lr_images, scale)
    x_0 = restore_latents(model, encoded, seed, steps=steps, denoise=denoise, lsa=lsa)
    return to_pixels(model, x_0, encoded, color_fix)


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
    target: Target = "step",
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
        target: what LSA moves; "step" is the paper's.
        anchor: x_lr of start and LSA, when it is not that of the control.
        start_from_lr: x_T = add_noise(x_lr, noise, 999) as SeeSR does; otherwise plain noise.

    Returns:
        (B, 4, h, w) x_0 in model units.
    """
    scheduler = sampling_schedule(steps, spacing, denoise)
    anchor = lr_latent if anchor is None else anchor
    x_t = start_noise.to(lr_latent)
    if denoise < 1.0 or start_from_lr:
        x_t = start_state(scheduler, anchor, x_t, denoise)
    for output in trajectory(eps, scheduler, x_t, anchor, generator, lsa=lsa, target=target):
        x_t = output.state
    return x_t


def start_state(scheduler: DDPMScheduler, anchor: Tensor, start_noise: Tensor, denoise: float = 1.0) -> Tensor:
    """Return x_T, (B, 4, h, w): x_lr noised to t = 999 as SeeSR does, or to the first timestep of a partial run."""
    timesteps = scheduler.timesteps[:1] if denoise < 1.0 else torch.tensor([START_TIMESTEP])
    return scheduler.add_noise(anchor, start_noise.to(anchor), timesteps)  # type: ignore[arg-type]


class StepOutput(NamedTuple):
    """What one step of the sampler gives; both (B, 4, h, w) in model units, variance-preserving scale."""

    step: int  # 0 is the first, noisiest one
    state: Tensor  # x_{t-1}, moved by LSA
    x0: Tensor  # the estimate of x_0 that the step was made with: before LSA of the state, moved by LSA of the estimate


@torch.no_grad()
def trajectory(
    eps: Callable[[Tensor, Tensor], Tensor],
    scheduler: DDPMScheduler,
    x_t: Tensor,
    anchor: Tensor,
    generator: torch.Generator,
    *,
    lsa: LSAConfig | None = None,
    target: Target = "step",
    first: int = 0,
    last: int | None = None,
) -> Iterator[StepOutput]:
    """Yield the output of the steps `first` to before `last`, Eq. 3 or 4 applied where the phase demands it.

    A run that is cut and continued is the run that was not cut, bit for bit.

    Args:
        eps: as in `sample`.
        scheduler: of `sampling_schedule`; it keeps nothing from step to step.
        x_t: (B, 4, h, w) the state before step `first`.
        anchor: (B, 4, h, w) x_lr of LSA, model units.
        generator: CPU generator of the step noise, at the place where step `first` finds it.
        lsa: strengths and phases; None = off.
        target: what LSA moves.
        first: step to begin with, 0 .. steps - 1.
        last: step to stop before; None = to the end.
    """
    steps = len(scheduler.timesteps)
    for step in range(first, steps if last is None else last):
        timestep = scheduler.timesteps[step]
        predicted = eps(x_t, timestep.expand(x_t.shape[0]).to(x_t.device))
        if lsa is not None and target == "x0":
            abar = scheduler.alphas_cumprod[int(timestep)]
            x_0 = (x_t - (1.0 - abar).sqrt() * predicted) / abar.sqrt()
            # The scheduler takes noise: that with which the same state has the moved estimate.
            predicted = predicted - (abar / (1.0 - abar)).sqrt() * (adjust(x_0, anchor, step, steps, lsa) - x_0)
        output = scheduler.step(predicted, timestep, x_t, generator=generator)  # type: ignore[arg-type]
        x_t = output.prev_sample
        if lsa is not None and target == "step":
            x_t = adjust(x_t, anchor, step, steps, lsa)
        yield StepOutput(step, x_t, output.pred_original_sample)
