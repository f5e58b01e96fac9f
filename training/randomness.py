"""The one rule that random numbers follow: a generator for each (seed, number), never the global one."""

from __future__ import annotations

import torch


def generator_for(seed: int, step: int) -> torch.Generator:
    """Return the CPU generator of one step: the same (seed, step) gives the same numbers, resumed or not."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step * 7_919 + 17) % (2**63))
