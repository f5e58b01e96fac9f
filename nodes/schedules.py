"""SIGMAS of spaced DDPM (decision 0007) beside the host's own schedulers."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import comfy.samplers
import torch
from torch import Tensor

from ..clearsr_core.schedule import NUM_TRAIN_TIMESTEPS, Spacing, last_timesteps

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

SPACINGS = {"ddpm_leading": "leading", "ddpm_linspace": "linspace", "ddpm_trailing": "trailing"}
DEFAULT_SCHEDULER = "ddpm_leading"
SCHEDULER_TOOLTIP = (
    "ddpm_leading: evenly spaced training steps as in the paper's code line (981, 961, ..., 1 for 50 steps). "
    "ddpm_linspace and ddpm_trailing: other spacings of the same. The rest are ComfyUI's own schedulers."
)


def scheduler_names() -> list[str]:
    """Return ours, then the host's, which other packs may have added to."""
    return [*SPACINGS, *comfy.samplers.KSampler.SCHEDULERS]


def spaced_sigmas(node: str, model: ModelPatcher, steps: int, scheduler: str, denoise: float = 1.0) -> Tensor:
    """Return (steps + 1,) falling noise levels of `model`, the last one 0; below `denoise` 1 without the highest."""
    sampling = model.get_model_object("model_sampling")
    table = getattr(sampling, "sigmas", None)
    if table is None or len(table) != NUM_TRAIN_TIMESTEPS:
        found = "no" if table is None else len(table)
        raise ValueError(
            f"{node}: {scheduler} needs a model with {NUM_TRAIN_TIMESTEPS} timesteps, but this one has {found}. "
            "Choose one of ComfyUI's schedulers, for example 'simple'."
        )
    if not 1 <= steps <= NUM_TRAIN_TIMESTEPS:
        raise ValueError(
            f"{node}: steps is {steps}; {scheduler} has at most {NUM_TRAIN_TIMESTEPS} steps and at least 1."
        )
    try:
        timesteps = last_timesteps(steps, denoise, cast(Spacing, SPACINGS[scheduler]))
    except ValueError as error:
        raise ValueError(f"{node}: {error}.") from None
    return torch.cat([table.cpu()[timesteps].float(), torch.zeros(1)])


def schedule_sigmas(node: str, model: ModelPatcher, steps: int, sampler: str, scheduler: str, denoise: float) -> Tensor:
    """Return the noise levels of a run; the host's own rules for its samplers included."""
    if scheduler in SPACINGS:
        return spaced_sigmas(node, model, steps, scheduler, denoise)
    return comfy.samplers.KSampler(model, steps, torch.device("cpu"), sampler, scheduler, denoise).sigmas
