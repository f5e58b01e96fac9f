"""Guidance on a part of the steps: outside of it only the positive conditioning is computed, as with cfg 1."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from comfy.patcher_extension import WrappersMP
from torch import Tensor

from .compat import HostObject
from .sockets import KEY

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher


def guided_steps(steps: int, start: float, end: float) -> range:
    """Return the steps 0..steps-1 between two shares of the schedule, each limit at the nearest step."""
    first, last = (math.floor(share * steps + 0.5) for share in (start, end))
    return range(first, last)


def guide_between(model: ModelPatcher, sigmas: Tensor, start: float, end: float) -> ModelPatcher:
    """Return a clone of `model` whose guider guides only between two shares of the schedule.

    A model call belongs to the step whose noise levels it lies between; at the very end of a step (heun's second call)
    it belongs to the next one.

    Args:
        model: MODEL; never changed, and returned as it is where the whole schedule is meant.
        sigmas: (steps + 1,) falling noise levels of the run.
        start, end: in [0, 1], start <= end.
    """
    guided = guided_steps(len(sigmas) - 1, start, end)
    if len(guided) == len(sigmas) - 1:
        return model
    highest = math.inf if guided.start == 0 else _just_above(sigmas[guided.start])
    lowest = -math.inf if guided.stop == len(sigmas) - 1 else _just_above(sigmas[guided.stop])

    def predict(
        executor: HostObject, x: Tensor, timestep: Tensor, model_options: dict, seed: int | None = None
    ) -> Tensor:
        guider = executor.class_obj
        if guided and highest > float(timestep.flatten()[0]) > lowest:
            return executor(x, timestep, model_options, seed)
        # The guider belongs to this run; the host leaves out what cfg 1 does not need.
        cfg, guider.cfg = guider.cfg, 1.0
        try:
            return executor(x, timestep, model_options, seed)
        finally:
            guider.cfg = cfg

    clone = model.clone()
    clone.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, KEY, predict)
    return clone


def _just_above(sigma: Tensor) -> float:
    """Return a limit that this noise level stays below, however a device rounds it."""
    return float(sigma) * (1.0 + 1e-5)
