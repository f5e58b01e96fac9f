"""Latent Space Adjustment: Eqs. 3 and 4 and the phases of sampling in which they act (paper Sec. 3.3)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Phase = Literal["early", "middle", "late"]


@dataclass(frozen=True)
class LSAConfig:
    """Strengths and phase limits. Limits are shares of the sampling steps: 0 = start, 1 = end."""

    ela_strength: float = 0.01  # the paper's alpha, 0 = off; 1 replaces the state by x_lr, above 1 overshoots it
    lla_strength: float = 0.01  # the paper's beta, 0 = off, no upper limit
    ela_end: float = 0.3  # Eq. 3 acts on the steps before it
    lla_start: float = 0.88  # Eq. 4 acts on the steps from it on
    accumulate: Literal["per_step", "over_phase"] = "per_step"  # "over_phase": the same look at any number of steps
    reference_steps: int = 50  # the number of steps at which the two rules agree

    def __post_init__(self) -> None:
        for name in ("ela_strength", "lla_strength"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be a number from 0 up")
        for name in ("ela_end", "lla_start"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be in 0..1")
        if self.ela_end > self.lla_start:
            raise ValueError(f"ela_end {self.ela_end} lies after lla_start {self.lla_start}: the phases would overlap")
        if self.accumulate not in ("per_step", "over_phase"):
            raise ValueError(f"accumulate is {self.accumulate!r}; it must be 'per_step' or 'over_phase'")
        if self.reference_steps < 1:
            raise ValueError(f"reference_steps is {self.reference_steps}; it must be 1 or more")


def ela(x: Tensor, x_lr: Tensor, strength: float | Tensor) -> Tensor:
    """Pull a latent towards the LR latent: (1 - alpha) x + alpha x_lr (Eq. 3).

    Args:
        x: (B, 4, h, w) sampler state in the variance-preserving scale, or denoised estimate; model units.
        x_lr: (1 or B, 4, h, w) LR latent in model units.
        strength: alpha, a number or a map (1 or B, 1, h, w), [0, 1].

    Returns:
        (B, 4, h, w) with the dtype and device of `x`, which is never written to.
    """
    return _move(x, x_lr, strength)


def lla(x: Tensor, x_lr: Tensor, strength: float | Tensor) -> Tensor:
    """Push a latent away from the LR latent: (1 + beta) x - beta x_lr (Eq. 4).

    Arguments as in `ela`. Undoes `ela(x, x_lr, alpha)` for strength = alpha / (1 - alpha).
    """
    return _move(x, x_lr, -strength)


def _move(x: Tensor, x_lr: Tensor, weight: float | Tensor) -> Tensor:
    """Return x + weight (x_lr - x): both equations, with a signed weight."""
    if x.shape[1:] != x_lr.shape[1:] or x_lr.shape[0] not in (1, x.shape[0]):
        raise ValueError(f"x {tuple(x.shape)} and x_lr {tuple(x_lr.shape)} do not fit together")
    if isinstance(weight, Tensor):
        weight = weight.to(x)
    return torch.lerp(x, x_lr.to(x).expand_as(x), weight)


def _phase_length(share: float, steps: int) -> int:
    """Return how many of `steps` a share of them is: the nearest number, but a phase that exists has a step."""
    return 0 if share <= 0.0 else max(1, math.floor(share * steps + 0.5))


def phase_lengths(steps: int, lsa: LSAConfig) -> tuple[int, int]:
    """Return the numbers of early and late steps out of `steps`; the late phase wins where both claim a step."""
    late = min(steps, _phase_length(1.0 - lsa.lla_start, steps))
    return min(steps - late, _phase_length(lsa.ela_end, steps)), late


def phase(step: int, steps: int, lsa: LSAConfig) -> Phase:
    """Tell in which phase step 0..steps-1 lies; its output is what `adjust` moves."""
    if not 0 <= step < steps:
        raise ValueError(f"step {step} is not in 0..{steps - 1}")
    early, late = phase_lengths(steps, lsa)
    if step < early:
        return "early"
    return "late" if step >= steps - late else "middle"


def per_step_strength(lsa: LSAConfig, steps: int) -> tuple[float, float]:
    """Return (alpha, beta) of a single step when sampling in `steps` steps.

    Eqs. 3 and 4 compound: n steps leave (1 - alpha)^n of the distance to x_lr, or (1 + beta)^n. "over_phase" keeps
    that product of `reference_steps` steps: (1 - alpha')^n' = (1 - alpha)^n and (1 + beta')^n' = (1 + beta)^n. From
    alpha = 1 on nothing is left of the distance, and alpha' is 1.
    """
    if lsa.accumulate == "per_step":
        return lsa.ela_strength, lsa.lla_strength
    early, late = phase_lengths(steps, lsa)
    reference_early, reference_late = phase_lengths(lsa.reference_steps, lsa)
    remaining = max(0.0, 1.0 - lsa.ela_strength)
    ela_strength = 1.0 - remaining ** (reference_early / early) if early else 0.0
    lla_strength = (1.0 + lsa.lla_strength) ** (reference_late / late) - 1.0 if late else 0.0
    return ela_strength, lla_strength


def adjust(
    x: Tensor,
    x_lr: Tensor,
    step: int,
    steps: int,
    lsa: LSAConfig,
    ela_map: Tensor | None = None,
    lla_map: Tensor | None = None,
) -> Tensor:
    """Apply Eq. 3 or Eq. 4 to the output of one step, as its phase demands.

    Args:
        x: (B, 4, h, w) output of step `step`, variance-preserving scale or denoised estimate; model units.
        x_lr: (1 or B, 4, h, w) LR latent in model units.
        step: 0..steps-1.
        steps: number of sampling steps.
        lsa: strengths and limits.
        ela_map: (1 or B, 1, h, w) in [0, 1], multiplies alpha; None = 1 everywhere.
        lla_map: the same for beta.

    Returns:
        (B, 4, h, w); `x` itself where nothing is to be done, so that strength 0 changes no bit.
    """
    ela_strength, lla_strength = per_step_strength(lsa, steps)
    current = phase(step, steps, lsa)
    if current == "early" and ela_strength:
        return ela(x, x_lr, ela_strength if ela_map is None else ela_strength * ela_map)
    if current == "late" and lla_strength:
        return lla(x, x_lr, lla_strength if lla_map is None else lla_strength * lla_map)
    return x
