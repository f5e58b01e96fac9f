"""A VAE in float32 beside one that the host runs in half precision, for x_lr alone (decision 0022)."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import comfy.sd
import torch

if TYPE_CHECKING:
    from comfy.sd import VAE


def float32_vae(vae: VAE) -> VAE:
    """Return `vae` itself where it is float32, else a second one that computes in float32.

    The weights are those of `vae` as it was loaded, rounded as they are; without patches, which others may have put on
    it. They are copied: 335 MB for Stable Diffusion's, on the device only while it encodes.
    """
    if vae.vae_dtype == torch.float32:
        return vae
    backup = vae.patcher.backup
    weights = {
        name: (backup[name].weight if name in backup else value).to("cpu", torch.float32)
        for name, value in cast("torch.nn.Module", vae.first_stage_model).state_dict().items()
    }
    return comfy.sd.VAE(sd=weights, dtype=torch.float32)
