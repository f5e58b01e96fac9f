"""What a run of LSA KSampler would do other than it seems to: nothing here is an error."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..clearsr_core.config import RecommendedSampling
from ..clearsr_core.lsa import LSAConfig
from .control_hooks import is_controlled
from .lsa_patch import is_patched
from .lsa_sampler import Target
from .schedules import SPACINGS
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


def other_than_recommended(
    node: str,
    model: ModelPatcher,
    *,
    scheduler: str,
    steps: int,
    cfg: float,
    denoise: float,
    start_from_lr: bool,
    missing_text: list[str],
) -> str | None:
    """Return a warning where a run differs from what the controlling file was made for so much that it shows.

    Fewer steps, more or less guidance and other samplers are the user's choice, within a factor; none of these settings
    raises an error, and each makes the result worse.

    Args:
        node: its name, for the message.
        model: controlled by DPM/SPM Control Apply, or not.
        scheduler, steps, cfg, denoise, start_from_lr: widgets of the run.
        missing_text: which of the inputs "positive" and "negative" are not connected.
    """
    attachment = model.get_attachment(KEY) or {}
    made_for: RecommendedSampling | None = attachment.get("recommended")
    if made_for is None or not is_controlled(model):
        return None
    found: list[str] = []
    wanted = next(name for name, spacing in SPACINGS.items() if spacing == made_for.spacing)
    if scheduler != wanted:
        found.append(f"scheduler is {scheduler} instead of {wanted}")
    if 3 * steps < made_for.steps:
        found.append(f"steps is {steps}, far below {made_for.steps}")
    if (cfg <= 1.0 < made_for.cfg) or cfg > 2.0 * made_for.cfg:
        found.append(f"cfg is {cfg:g} instead of {made_for.cfg:g}")
    if denoise >= 1.0 and start_from_lr != (made_for.start == "lr"):
        found.append(f"start_from_lr is {'on instead of off' if start_from_lr else 'off instead of on'}")
    if made_for.text and missing_text:
        found.append(f"{' and '.join(missing_text)} {'is' if len(missing_text) == 1 else 'are'} not connected")
    if not found:
        return None
    return (
        f"{node}: '{attachment['file']}' was made for other settings, and its result is worse with these: "
        f"{'; '.join(found)}."
    )


def _equal(first: Tensor, second: Tensor) -> bool:
    return first is second or (first.shape == second.shape and torch.equal(first, second.to(first)))
