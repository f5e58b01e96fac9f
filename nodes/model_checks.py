"""Tells users in one sentence which model they connected and which one is needed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import comfy.model_base
import comfy.utils
import torch

from ..clearsr_core.fingerprint import SAME, SAMPLED, fingerprint_distance, unet_fingerprint
from ..clearsr_core.key_maps import rename, unet_prefixes
from ..clearsr_core.shapes import unet_shapes

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher
    from comfy.sd import VAE

    from ..clearsr_core.config import ClearSRConfig

BASE_HELP = (
    "Load a Stable Diffusion 2.1-base checkpoint (512 px, eps-prediction; usually v2-1_512-ema-pruned.safetensors) "
    "with Load Checkpoint and connect its MODEL and VAE."
)


def describe_model(model: ModelPatcher) -> str:
    """Name the family of a MODEL as its user knows it."""
    unet = model.model.model_config.unet_config
    context = unet.get("context_dim")
    prediction = getattr(getattr(model.model, "model_type", None), "name", "unknown")
    if unet.get("in_channels", 4) != unet.get("out_channels", 4):
        return f"an inpainting or edit model with {unet['in_channels']} input channels"
    if context == 768:
        return "Stable Diffusion 1.x"
    if context == 2048:
        return "SDXL"
    if context == 1024 and prediction == "V_PREDICTION":
        return "Stable Diffusion 2.1-768 (v-prediction)"
    if "model_channels" in unet and context is not None:
        return f"a UNet with {unet['model_channels']} channels, {context}-wide text and {prediction} prediction"
    return f"{type(model.model).__name__} ({prediction} prediction)"


def check_model(node: str, model: ModelPatcher, config: ClearSRConfig, file: str) -> None:
    """Refuse a MODEL that the control networks of `file` do not fit."""
    unet = model.model.model_config.unet_config
    channels = unet.get("model_channels")
    widths = () if channels is None else tuple(channels * factor for factor in unet.get("channel_mult", ()))
    wanted = config.networks
    fits = (
        widths == wanted.unet_widths
        and unet.get("context_dim") == wanted.context_dim
        and unet.get("in_channels") == config.control.latent_channels
        and getattr(model.model, "model_type", None) == comfy.model_base.ModelType.EPS
    )
    if fits:
        return
    if config.base is not None:
        raise ValueError(
            f"{node}: the connected MODEL is {describe_model(model)}, but '{file}' works only with the model that it "
            "carries itself. Use the MODEL output of ClearSR Loader."
        )
    raise ValueError(
        f"{node}: the connected MODEL is {describe_model(model)}, but '{file}' belongs to Stable Diffusion 2.1-base. "
        f"{BASE_HELP}"
    )


def base_fingerprint(model: ModelPatcher, config: ClearSRConfig) -> str:
    """Return the fingerprint of a MODEL's UNet as it was loaded; "" where its weights cannot be compared.

    Patches (LoRA) do not count: where the host has merged them, it keeps the weight from before. Quantised weights,
    GGUF and weights that the host has not loaded are not compared, nor are UNets with fewer layers than SD 2.1's.
    """
    prefixes = unet_prefixes(config.control)
    there = unet_shapes(config.control)
    weights = {}
    for name in SAMPLED:
        if name not in there:
            return ""
        key = f"diffusion_model.{rename(name, prefixes)}"
        kept = model.backup.get(key)
        weight = comfy.utils.get_attr(model.model, key) if kept is None else kept.weight
        if weight.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16) or weight.is_meta:
            return ""
        weights[name] = weight
    return unet_fingerprint(weights)


def other_base(node: str, found: str, wanted: str, file: str) -> str | None:
    """Say so where a MODEL of the right size is not the one that `file` was trained on; it may still work.

    Args:
        node: for the message.
        found, wanted: fingerprints; "" where there is none, which nothing is said about.
        file: name of the ClearSR file.
    """
    distance = fingerprint_distance(wanted, found)
    if distance is None or distance < SAME:
        return None
    return (
        f"{node}: the connected MODEL is not the base model that '{file}' was trained on (their weights differ by "
        f"about {distance:.1%}). Results may be worse than they could be; the original is "
        "Stable Diffusion 2.1-base, 512 px."
    )


def check_vae(node: str, vae: VAE, config: ClearSRConfig, file: str) -> None:
    """Refuse a VAE whose latents have another number of channels, or are not an eighth of the size."""
    channels, ratio = vae.latent_channels, vae.downscale_ratio
    if channels != config.control.latent_channels or ratio != 8:
        raise ValueError(
            f"{node}: the connected VAE makes latents of {channels} channels at 1/{ratio} of the size, but '{file}' "
            f"needs {config.control.latent_channels} channels at 1/8. {BASE_HELP}"
        )
