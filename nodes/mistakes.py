"""What a run of LSA KSampler would do other than it seems to: nothing here is an error."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..clearsr_core.lsa import LSAConfig
from .control_hooks import is_controlled
from .lsa_patch import is_patched
from .lsa_sampler import Target
from .sockets import KEY

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher


def mistakes(
    node: str,
    model: ModelPatcher,
    lr_latent: dict,
    lsa: LSAConfig,
    target: Target,
    maps: dict[str, tuple[float, Tensor | None]],
) -> Iterator[str]:
    """Yield a sentence for everything that will do nothing, or something else than it seems to.

    Args:
        node: its name, for messages.
        model, lr_latent, lsa, target: of the run.
        maps: "alpha" and "beta" -> the strength, and where it acts, (B, 1, h, w) in [0, 1] or None = everywhere.
    """
    attachment = model.get_attachment(KEY)
    if attachment is not None and not is_controlled(model):
        yield (
            f"{node}: DPM/SPM Control Apply is missing between ClearSR Loader and this node, or bypassed, so the model "
            "does not see the low-resolution picture."
        )
    entry, controls = lr_latent.get(KEY), (attachment or {}).get("encoded")
    if entry is not None and controls is not None and not _equal(entry["encoded"], controls):
        yield (
            f"{node}: lr_latent was encoded from another picture than the one that controls this MODEL, or otherwise. "
            "Connect the same LR Latent Encode to DPM/SPM Control Apply and to this node."
        )
    for name, (strength, map_) in maps.items():
        if strength and map_ is not None and not bool(map_.any()):
            yield (
                f"{node}: {name}_mask is black everywhere, so {name} does nothing. Paint white where it shall act, or "
                "disconnect the mask."
            )
    if target == "x0" and (lsa.ela_strength or lsa.lla_strength) and is_patched(model):
        yield f"{node}: with this target alpha and beta of this node replace those of LSA Patch."


def _equal(first: Tensor, second: Tensor) -> bool:
    return first is second or (first.shape == second.shape and torch.equal(first, second.to(first)))
