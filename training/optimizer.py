"""Adam as the paper uses it (Sec. 4.1), in full or 8-bit moments, and its learning rate over the steps."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Literal

import torch

Kind = Literal["adamw", "adamw8bit"]


def learning_rate_at(step: int, rate: float, warmup: int, steps: int, decay: Literal["constant", "linear"]) -> float:
    """Return the learning rate of `step` (counted from 0): linear warm-up, then constant or linear to zero."""
    rate *= min(1.0, (step + 1) / max(1, warmup))
    if decay == "linear":
        rate *= max(0.0, 1.0 - step / steps)
    return rate


def build(kind: Kind, parameters: Iterable[torch.nn.Parameter], rate: float) -> torch.optim.Optimizer:
    """Return Adam: AdamW without weight decay; "adamw8bit" keeps its two moments in 8 bits (a quarter of the memory).

    Raises:
        ValueError: the package of the 8-bit optimiser is missing.
    """
    options = {"lr": rate, "betas": (0.9, 0.999), "weight_decay": 0.0}
    if kind == "adamw":
        # Fused: no temporary copies of all parameters, as the loop over them (foreach) makes.
        return torch.optim.AdamW(list(parameters), fused=True, **options)
    try:
        library = importlib.import_module("bitsandbytes")
    except ImportError as error:
        raise ValueError(
            "--optimizer=adamw8bit needs the package bitsandbytes and a GPU: pip install bitsandbytes, or take adamw."
        ) from error
    return library.optim.AdamW8bit(list(parameters), **options)
