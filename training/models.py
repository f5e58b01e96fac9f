"""The networks of diffusers that a base model has, and what ClearSR adds to them by peft (Sec. 3.1, Appendix A)."""

from __future__ import annotations

import copy
import re

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from clearsr_core.config import LATENT_SCALE

# Appendix A: every convolution and attention layer of the VAE encoder; attention layers of the UNet decoder only.
UNET_LORA_TARGETS = r"up_blocks\.\d+\.attentions\.\d+\.transformer_blocks\.\d+\.attn[12]\.(to_q|to_k|to_v|to_out\.0)"
VAE_LORA_TARGETS = r"encoder\.(.*\.)?(conv_in|conv_out|conv|conv1|conv2|conv_shortcut|to_q|to_k|to_v|to_out\.0)"


def build_unet(
    widths: tuple[int, ...], head_channels: int, context_dim: int, norm_groups: int = 32, latent_channels: int = 4
) -> UNet2DConditionModel:
    """Return Stable Diffusion 2.1's UNet at the given widths (SD 2.1: 320, 640, 1280, 1280; heads of 64; 1024)."""
    return UNet2DConditionModel(
        in_channels=latent_channels,
        out_channels=latent_channels,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        block_out_channels=widths,
        layers_per_block=2,
        # diffusers takes the number of heads under this name for SD 2 models.
        attention_head_dim=tuple(width // head_channels for width in widths),
        cross_attention_dim=context_dim,
        use_linear_projection=True,
        norm_num_groups=norm_groups,
    )


def build_autoencoder(
    widths: tuple[int, ...], blocks: int, norm_groups: int = 32, latent_channels: int = 4
) -> AutoencoderKL:
    """Return Stable Diffusion's autoencoder at the given widths, randomly initialised."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        layers_per_block=blocks,
        latent_channels=latent_channels,
        norm_num_groups=norm_groups,
    )


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Encode (B, 3, H, W) in [-1, 1] to the posterior's mode, (B, 4, H/8, W/8) float32 in model units.

    Float32 under autocast too: diffusers gives the noise schedule the type of the latents, and bfloat16 has so few
    digits that the first steps would have no noise at all, and others a fifth too much or too little.
    """
    return vae.encode(images).latent_dist.mode().float() * LATENT_SCALE


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Decode (B, 4, h, w) in model units to (B, 3, 8h, 8w) in [-1, 1]."""
    return vae.decode(latents / LATENT_SCALE).sample.clamp(-1.0, 1.0)


class LREncoder(nn.Module):
    """E' = E + LoRA (Sec. 3.1): the VAE's encoder, adapted to low-resolution images; its own copy of the weights."""

    def __init__(self, vae: AutoencoderKL, rank: int) -> None:
        super().__init__()
        self.encoder = copy.deepcopy(vae.encoder).requires_grad_(False)
        self.quant_conv = copy.deepcopy(vae.quant_conv).requires_grad_(False)
        _inject_lora(self, VAE_LORA_TARGETS, rank)

    def forward(self, images: Tensor) -> Tensor:
        """Encode (B, 3, H, W) in [-1, 1] to x_lr = mode of E', (B, 4, H/8, W/8) in model units."""
        return self.quant_conv(self.encoder(images)).chunk(2, dim=1)[0] * LATENT_SCALE


def add_decoder_lora(unet: UNet2DConditionModel, rank: int) -> None:
    """Add LoRA to the attention layers of the UNet decoder (Appendix A), in place."""
    _inject_lora(unet, UNET_LORA_TARGETS, rank)


def _inject_lora(module: nn.Module, targets: str, rank: int) -> None:
    if not rank:  # a file without LoRAs, as an imported one; peft knows no rank 0
        return
    inject_adapter_in_model(
        LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, init_lora_weights="gaussian"), module
    )


def lora_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return LoRA parameters by their file name: `<layer>.lora_A.weight` and `<layer>.lora_B.weight`."""
    return {
        re.sub(r"\.lora_([AB])\.default\.weight$", r".lora_\1.weight", name): parameter
        for name, parameter in module.named_parameters()
        if ".lora_" in name
    }


def without_lora(module: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of a module as it was before LoRA was added."""
    return {
        name.replace(".base_layer.", "."): value for name, value in module.state_dict().items() if ".lora_" not in name
    }


class DecoderPrompt:
    """Replaces the text context by the image prompt p in the UNet's decoder, and nowhere else (Sec. 3.1)."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        self.prompt: Tensor | None = None
        for name, module in unet.named_modules():
            if name.startswith("up_blocks") and name.endswith("attn2"):
                module.register_forward_pre_hook(self._replace, with_kwargs=True)

    def _replace(self, _module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if self.prompt is not None:
            kwargs = {**kwargs, "encoder_hidden_states": self.prompt}
        return args, kwargs
