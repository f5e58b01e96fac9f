"""Stable Diffusion's noise schedule, its respaced timesteps, and the spaced DDPM step (paper Sec. 3.3)."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

NUM_TRAIN_TIMESTEPS = 1000

Spacing = Literal["leading", "linspace", "trailing"]


@lru_cache(maxsize=1)
def _alphas_cumprod() -> tuple[float, ...]:
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, NUM_TRAIN_TIMESTEPS, dtype=torch.float64) ** 2
    return tuple(float(abar) for abar in (1.0 - betas).cumprod(0))


def alphas_cumprod() -> Tensor:
    """Return abar_t for t = 0..999, (1000,) float64: scaled linear betas 0.00085..0.012."""
    return torch.tensor(_alphas_cumprod(), dtype=torch.float64)


def sigmas() -> Tensor:
    """Return sqrt((1 - abar_t) / abar_t) for t = 0..999, (1000,) float64: 0.029 rising to 14.6."""
    abar = alphas_cumprod()
    return ((1.0 - abar) / abar).sqrt()


def spaced_timesteps(steps: int, spacing: Spacing = "leading") -> Tensor:
    """Choose `steps` of the 1000 training timesteps.

        leading    0, r, 2r, ... + 1 with r = floor(1000 / steps)    981, 961, ..., 21, 1 for 50 steps
        linspace   0 .. 999, ends included, rounded                  999, 979, ..., 20, 0
        trailing   1000, 1000 - 1000 / steps, ... - 1, rounded       999, 979, ..., 39, 19

    A single step has no spacing: it is 999 in every mode, because a lone 1 or 0 would leave pure noise as it is.

    Args:
        steps: 1..1000; need not divide 1000.
        spacing: as above.

    Returns:
        (steps,) int64, strictly falling, in 0..999.
    """
    total = NUM_TRAIN_TIMESTEPS
    if not 1 <= steps <= total:
        raise ValueError(f"steps is {steps}; it must be in 1..{total}")
    if spacing == "leading":
        chosen = np.arange(steps) * (total // steps)
        offset = min(1, total - 1 - int(chosen[-1]))  # 1000 steps leave no room for the offset of 1
        chosen = chosen[::-1] + offset
    elif spacing == "linspace":
        chosen = np.linspace(0, total - 1, steps).round()[::-1]
    elif spacing == "trailing":
        chosen = np.round(np.arange(total, 0, -total / steps))[:steps] - 1
    else:
        raise ValueError(f"spacing is {spacing!r}; it must be 'leading', 'linspace' or 'trailing'")
    if steps == 1:
        chosen = np.array([total - 1])
    return torch.tensor([int(timestep) for timestep in chosen], dtype=torch.int64)


def last_timesteps(steps: int, denoise: float, spacing: Spacing = "leading") -> Tensor:
    """Choose timesteps for a run that starts part of the way, from x_lr noised to the first of them.

    They are the last `steps` of floor(steps / denoise) spaced ones, so that denoise 0.5 starts half way at the same
    distance between the steps, as in the host's KSampler.

    Args:
        steps: 1 or more.
        denoise: (0, 1]; 1 gives `spaced_timesteps(steps)`.
        spacing: as in `spaced_timesteps`.

    Returns:
        (steps,) int64, strictly falling, in 0..999.
    """
    if not 0.0 < denoise <= 1.0:
        raise ValueError(f"denoise is {denoise}; it must be above 0 and at most 1")
    total = math.floor(steps / denoise)
    if total > NUM_TRAIN_TIMESTEPS:
        raise ValueError(
            f"{steps} steps at denoise {denoise} are taken from {total} steps, and there are at most "
            f"{NUM_TRAIN_TIMESTEPS}: fewer steps, or more denoise"
        )
    return spaced_timesteps(total, spacing)[-steps:]


def add_noise(x0: Tensor, noise: Tensor, timestep: int | Tensor) -> Tensor:
    """Noise a latent to a timestep: sqrt(abar_t) x0 + sqrt(1 - abar_t) noise.

    Args:
        x0: (B, 4, h, w) in model units.
        noise: standard normal, as x0.
        timestep: 0..999, one for all or (B,) int64.

    Returns:
        (B, 4, h, w) with the dtype and device of `x0`, in the variance-preserving scale.
    """
    if isinstance(timestep, Tensor):
        abar = alphas_cumprod()[timestep.cpu()].reshape(-1, 1, 1, 1)
        return abar.sqrt().to(x0) * x0 + (1.0 - abar).sqrt().to(x0) * noise
    abar = _alphas_cumprod()[timestep]
    return math.sqrt(abar) * x0 + math.sqrt(1.0 - abar) * noise


def lr_start(x_lr: Tensor, noise: Tensor) -> Tensor:
    """Return the start of sampling from the LR embedding: x_lr noised to t = 999, 0.0683 x_lr + 0.9977 noise."""
    return add_noise(x_lr, noise, NUM_TRAIN_TIMESTEPS - 1)


def ddpm_step(x_t: Tensor, eps: Tensor, timestep: int, previous: int, noise: Tensor | None) -> Tensor:
    """Draw x_{t-1} of spaced DDPM: posterior mean plus `fixed_small` variance, nothing clipped.

    Args:
        x_t: (B, 4, h, w) in model units, variance-preserving scale.
        eps: the model's noise prediction, as x_t.
        timestep: t of this step, 0..999.
        previous: t of the next (less noisy) step, or -1 on the last step, which returns the estimate of x_0.
        noise: standard normal, as x_t; not read (may be None) on the last step.

    Returns:
        (B, 4, h, w) with the dtype of `x_t`.
    """
    if not -1 <= previous < timestep < NUM_TRAIN_TIMESTEPS:
        raise ValueError(f"timestep {timestep} -> {previous}: must fall, within 999..0, with -1 for the end")
    table = _alphas_cumprod()
    abar, abar_previous = table[timestep], table[previous] if previous >= 0 else 1.0
    alpha_step = abar / abar_previous
    x0 = (x_t - math.sqrt(1.0 - abar) * eps) / math.sqrt(abar)
    if previous < 0:
        return x0
    if noise is None:
        raise ValueError(f"noise is missing for the step {timestep} -> {previous}")
    weight_x0 = math.sqrt(abar_previous) * (1.0 - alpha_step) / (1.0 - abar)
    weight_x_t = math.sqrt(alpha_step) * (1.0 - abar_previous) / (1.0 - abar)
    variance = (1.0 - abar_previous) / (1.0 - abar) * (1.0 - alpha_step)
    return weight_x0 * x0 + weight_x_t * x_t + math.sqrt(variance) * noise


def ve_to_vp(x: Tensor, sigma: float | Tensor) -> Tensor:
    """Turn a variance-exploding sampler state into the variance-preserving scale: x / sqrt(1 + sigma^2)."""
    return x / (sigma**2 + 1.0) ** 0.5


def vp_to_ve(x: Tensor, sigma: float | Tensor) -> Tensor:
    """Turn a variance-preserving state into the variance-exploding scale of samplers: x sqrt(1 + sigma^2)."""
    return x * (sigma**2 + 1.0) ** 0.5
