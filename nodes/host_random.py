"""torch's global generators, which foreign patches (ToMe, HyperTile) draw from; a run leaves them as they were."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import Tensor

from .compat import HostObject


def states(device: torch.device) -> tuple[Tensor, ...]:
    """Return the state of the processor's global generator, and of the device's where it has one."""
    found = [torch.get_rng_state()]
    if device.type == "mps":
        found.append(torch.mps.get_rng_state())
    elif (module := _accelerator(device)) is not None:
        found.append(module.get_rng_state(device))
    return tuple(found)


def restore(before: tuple[Tensor, ...], device: torch.device) -> None:
    """Put back what `states` returned."""
    torch.set_rng_state(before[0])
    if device.type == "mps":
        torch.mps.set_rng_state(before[1])
    elif (module := _accelerator(device)) is not None:
        module.set_rng_state(before[1], device)


@contextmanager
def seeded(seed: int, device: torch.device) -> Generator[None, None, None]:
    """Let the global generators begin from `seed`, and put them back afterwards: one seed is one picture."""
    before = states(device)
    torch.default_generator.manual_seed(seed)
    if device.type == "mps":
        torch.mps.manual_seed(seed)
    elif (module := _accelerator(device)) is not None:
        with module.device(device):
            module.manual_seed(seed)
    try:
        yield
    finally:
        restore(before, device)


def _accelerator(device: torch.device) -> HostObject | None:
    """Return torch's module of a kind of device that has a generator for each device."""
    return getattr(torch, device.type) if device.type in ("cuda", "xpu") else None
