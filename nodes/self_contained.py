"""Builds MODEL and VAE from a self-contained file: the host's own classes at other widths, nothing registered."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import comfy.latent_formats
import comfy.model_base
import comfy.model_detection
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.supported_models
import comfy.utils
import torch
from torch import Tensor

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher
    from comfy.sd import VAE

    from ..clearsr_core.config import ClearSRConfig


def patcher_class(disable_dynamic: bool = False) -> type[ModelPatcher]:
    """Return the host's class for core models; looked up at call time, because main.py may rebind it."""
    plain = comfy.model_patcher.ModelPatcher
    return plain if disable_dynamic else getattr(comfy.model_patcher, "CoreModelPatcher", plain)


def is_dynamic(patcher: ModelPatcher) -> bool:
    """Tell whether the host loads this model's weights lazily (newer hosts on NVIDIA only)."""
    return bool(getattr(patcher, "is_dynamic", bool)())


def set_norm_groups(network: torch.nn.Module, groups: int) -> None:
    """Give the group norms of this one network the file's number of groups; the host builds all of them with 32."""
    for module in network.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.num_groups = groups


def build_model(state_dict: dict[str, Tensor], config: ClearSRConfig, disable_dynamic: bool = False) -> ModelPatcher:
    """Return a MODEL with the file's UNet, in the host's names without prefix."""
    networks = config.networks

    class LatentFormat(comfy.latent_formats.SD15):
        def __init__(self) -> None:
            super().__init__(scale_factor=config.latent_scale)
            self.latent_channels = config.control.latent_channels
            # SD's tiny preview decoder and colour factors know other latents than these.
            self.taesd_decoder_name = None
            self.latent_rgb_factors = None if config.latent_rgb is None else [list(row) for row in config.latent_rgb]

    class NarrowSD2(comfy.supported_models.SD20):
        # The number of channels per head cannot be read from weights.
        unet_extra_config = {  # noqa: RUF012 - the host's form
            **comfy.supported_models.SD20.unet_extra_config,
            "num_head_channels": networks.head_channels,
        }
        latent_format = LatentFormat
        # The host's estimate is for 320 channels.
        memory_usage_factor = comfy.supported_models.SD20.memory_usage_factor * networks.unet_widths[0] / 320

        def model_type(self, state_dict: dict, prefix: str = "") -> comfy.model_base.ModelType:
            # The host guesses v-prediction from a bias whose spread means nothing at these widths.
            return comfy.model_base.ModelType.EPS

        def inpaint_model(self) -> bool:
            # The host takes any UNet with more than 4 input channels for one, and would add a mask to its input.
            return False

    management = comfy.model_management
    host_config = NarrowSD2(comfy.model_detection.detect_unet_config(state_dict, ""))
    device, offload = management.get_torch_device(), management.unet_offload_device()
    parameters = comfy.utils.calculate_parameters(state_dict)
    dtype = management.unet_dtype(
        model_params=parameters, supported_dtypes=list(host_config.supported_inference_dtypes)
    )
    host_config.set_inference_dtype(
        dtype, management.unet_manual_cast(dtype, device, host_config.supported_inference_dtypes)
    )
    model = host_config.get_model(state_dict, "", device=offload)
    set_norm_groups(model.diffusion_model, networks.norm_groups)
    patcher = patcher_class(disable_dynamic)(model, load_device=device, offload_device=offload)
    assign: dict[str, Any] = {"assign": True} if is_dynamic(patcher) else {}
    model.load_model_weights(dict(state_dict), "", **assign)
    return patcher


def build_vae(state_dict: dict[str, Tensor], config: ClearSRConfig) -> VAE:
    """Return a VAE with the file's autoencoder, in the host's names without prefix; f8, fp32."""
    networks = config.networks
    first = networks.vae_widths[0]
    layout = {
        "double_z": True,
        "z_channels": config.control.latent_channels,
        "resolution": 256,
        "in_channels": 3,
        "out_ch": 3,
        "ch": first,
        "ch_mult": [width // first for width in networks.vae_widths],
        "num_res_blocks": networks.vae_blocks,
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    vae = comfy.sd.VAE(
        sd=dict(state_dict),
        config={"params": {"ddconfig": layout, "embed_dim": config.control.latent_channels}},
        dtype=torch.float32,  # it is small, and half precision would cost more than it saves
    )
    set_norm_groups(cast("torch.nn.Module", vae.first_stage_model), networks.norm_groups)
    vae.latent_channels = config.control.latent_channels  # the host reads it from weights only where it has no config
    # The host's estimates are for 128 channels.
    share = first / 128
    encode, decode = vae.memory_used_encode, vae.memory_used_decode
    vae.memory_used_encode = lambda shape, dtype: encode(shape, dtype) * share
    vae.memory_used_decode = lambda shape, dtype: decode(shape, dtype) * share
    return vae
