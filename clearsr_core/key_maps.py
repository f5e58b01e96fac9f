"""Names of the same weights in diffusers and in the host (ldm), for both base networks and both LoRAs.

Pure functions of strings and dictionaries. Weights keep their values; only the linear layers of the autoencoder's
attention change shape, because the host holds them as 1x1 convolutions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from .config import BaseConfig, ControlConfig

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_LORA_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


def unet_to_host(state_dict: Mapping[str, Tensor], config: ControlConfig) -> dict[str, Tensor]:
    """Rename a UNet's state dict from diffusers to the host ("conv_in.weight" -> "input_blocks.0.0.weight")."""
    return _renamed(state_dict, unet_prefixes(config), "UNet")


def unet_from_host(state_dict: Mapping[str, Tensor], config: ControlConfig) -> dict[str, Tensor]:
    """Undo `unet_to_host`."""
    return _renamed(state_dict, _inverse(unet_prefixes(config)), "UNet")


def vae_to_host(state_dict: Mapping[str, Tensor], config: BaseConfig) -> dict[str, Tensor]:
    """Rename an autoencoder's state dict from diffusers to the host; its attention becomes 1x1 convolutions."""
    shaped = {key: _reshaped_attention(key, value, dimensions=4) for key, value in state_dict.items()}
    return _renamed(shaped, vae_prefixes(config), "VAE")


def vae_from_host(state_dict: Mapping[str, Tensor], config: BaseConfig) -> dict[str, Tensor]:
    """Undo `vae_to_host`."""
    named = _renamed(state_dict, _inverse(vae_prefixes(config)), "VAE")
    return {key: _reshaped_attention(key, value, dimensions=2) for key, value in named.items()}


def unet_lora_targets(config: ControlConfig) -> list[str]:
    """List the modules of the UNet's decoder that carry LoRA, in diffusers' names: 72 in SD 2.x.

    All four projections of both attentions of every transformer in up_blocks ("attention layers of the decoder").
    """
    return [
        f"up_blocks.{block}.attentions.{index}.transformer_blocks.0.{attention}.{projection}"
        for block, attends in enumerate(reversed(config.attention_levels))
        if attends
        for index in range(config.layers_per_block + 1)
        for attention in ("attn1", "attn2")
        for projection in _LORA_ATTENTION
    ]


def vae_lora_targets(config: BaseConfig) -> list[str]:
    """List the modules of the autoencoder's encoder that carry LoRA, in diffusers' names: 31 in SD.

    Every convolution of the encoder, shortcuts included, and the four projections of its attention.
    """
    names = ["encoder.conv_in"]
    for level, (below, width) in enumerate(_steps(config.vae_widths)):
        for index in range(config.vae_blocks):
            resnet = f"encoder.down_blocks.{level}.resnets.{index}"
            names += [f"{resnet}.conv1", f"{resnet}.conv2"]
            if index == 0 and below != width:
                names.append(f"{resnet}.conv_shortcut")
        if level < len(config.vae_widths) - 1:
            names.append(f"encoder.down_blocks.{level}.downsamplers.0.conv")
    names += [f"encoder.mid_block.resnets.{index}.{conv}" for index in (0, 1) for conv in ("conv1", "conv2")]
    names += [f"encoder.mid_block.attentions.0.{projection}" for projection in _LORA_ATTENTION]
    return [*names, "encoder.conv_out"]


def unet_lora_map(config: ControlConfig) -> dict[str, str]:
    """Map PEFT base names of the UNet LoRA to weights of the host's UNet ("output_blocks.3.1....to_q.weight")."""
    prefixes = unet_prefixes(config)
    return {name: f"{rename(name, prefixes)}.weight" for name in unet_lora_targets(config)}


def vae_lora_map(config: BaseConfig) -> dict[str, str]:
    """Map PEFT base names of the VAE LoRA to weights of the host's autoencoder ("encoder.mid.attn_1.q.weight")."""
    prefixes = vae_prefixes(config)
    return {name: f"{rename(name, prefixes)}.weight" for name in vae_lora_targets(config)}


def unet_prefixes(config: ControlConfig) -> dict[str, str]:
    """Map module prefixes of a diffusers UNet to the host's: input_blocks and output_blocks are numbered through."""
    layers, last = config.layers_per_block, config.levels - 1
    prefixes = {
        "conv_in": "input_blocks.0.0",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "mid_block.attentions.0": "middle_block.1",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    for index in (0, 1):
        prefixes |= _under(f"mid_block.resnets.{index}", f"middle_block.{2 * index}", _RESNET)

    # Encoder: block 0 is conv_in, then each level has its layers and a block for the Downsample.
    for level in range(config.levels):
        for index in range(layers):
            block = 1 + level * (layers + 1) + index
            prefixes |= _under(f"down_blocks.{level}.resnets.{index}", f"input_blocks.{block}.0", _RESNET)
            prefixes[f"down_blocks.{level}.attentions.{index}"] = f"input_blocks.{block}.1"
        if level < last:
            prefixes[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{(level + 1) * (layers + 1)}.0.op"

    # Decoder, coarsest first: the upsampler shares a block with the last layer and comes after its attention.
    for level, attends in enumerate(reversed(config.attention_levels)):
        for index in range(layers + 1):
            block = level * (layers + 1) + index
            prefixes |= _under(f"up_blocks.{level}.resnets.{index}", f"output_blocks.{block}.0", _RESNET)
            prefixes[f"up_blocks.{level}.attentions.{index}"] = f"output_blocks.{block}.1"
        if level < last:
            place = f"output_blocks.{level * (layers + 1) + layers}.{2 if attends else 1}"
            prefixes[f"up_blocks.{level}.upsamplers.0.conv"] = f"{place}.conv"
    return prefixes


def controlnet_prefixes(config: ControlConfig) -> dict[str, str]:
    """Map module prefixes of DPM (diffusers' ControlNetModel) to an ldm ControlNet's.

    `conv_in` and `conv_in_lr` are one convolution there, "input_blocks.0.0", of x_t and the condition side by side.
    """
    outputs = config.levels * (config.layers_per_block + 1)
    prefixes = {f"controlnet_down_blocks.{index}": f"zero_convs.{index}.0" for index in range(outputs)}
    return unet_prefixes(config) | prefixes | {"controlnet_mid_block": "middle_block_out.0"}


def vae_prefixes(config: BaseConfig) -> dict[str, str]:
    """Map module prefixes of a diffusers AutoencoderKL to the host's, which numbers the decoder finest first."""
    levels = len(config.vae_widths)
    prefixes = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    for half in ("encoder", "decoder"):
        prefixes |= _under(half, half, {"conv_in": "conv_in", "conv_norm_out": "norm_out", "conv_out": "conv_out"})
        prefixes |= _under(f"{half}.mid_block.attentions.0", f"{half}.mid.attn_1", _VAE_ATTENTION)
        for index in (0, 1):
            prefixes[f"{half}.mid_block.resnets.{index}"] = f"{half}.mid.block_{index + 1}"

    for level in range(levels):
        theirs, ours = f"encoder.down.{level}", f"encoder.down_blocks.{level}"
        prefixes |= _vae_resnets(ours, theirs, config.vae_blocks)
        prefixes[f"{ours}.downsamplers.0.conv"] = f"{theirs}.downsample.conv"
        theirs, ours = f"decoder.up.{levels - 1 - level}", f"decoder.up_blocks.{level}"
        prefixes |= _vae_resnets(ours, theirs, config.vae_blocks + 1)
        prefixes[f"{ours}.upsamplers.0.conv"] = f"{theirs}.upsample.conv"
    return prefixes


def _vae_resnets(ours: str, theirs: str, blocks: int) -> dict[str, str]:
    """Map the ResBlocks of one autoencoder level; only the shortcut has another name inside."""
    prefixes: dict[str, str] = {}
    for index in range(blocks):
        prefixes[f"{ours}.resnets.{index}"] = f"{theirs}.block.{index}"
        prefixes[f"{ours}.resnets.{index}.conv_shortcut"] = f"{theirs}.block.{index}.nin_shortcut"
    return prefixes


def _steps(widths: tuple[int, ...]) -> Iterable[tuple[int, int]]:
    """Pair each width with the one that enters its level; the first level is entered by its own."""
    return zip((widths[0], *widths[:-1]), widths, strict=True)


def _under(ours: str, theirs: str, names: Mapping[str, str]) -> dict[str, str]:
    return {f"{ours}.{a}": f"{theirs}.{b}" for a, b in names.items()}


def _inverse(prefixes: Mapping[str, str]) -> dict[str, str]:
    return {theirs: ours for ours, theirs in prefixes.items()}


def _renamed(state_dict: Mapping[str, Tensor], prefixes: Mapping[str, str], network: str) -> dict[str, Tensor]:
    """Rename every key by its longest known prefix; a key that has none raises ValueError."""
    try:
        return {rename(key, prefixes): value for key, value in state_dict.items()}
    except KeyError as error:
        raise ValueError(f"{error.args[0]!r} is no weight of a {network} of this layout") from error


def rename(key: str, prefixes: Mapping[str, str]) -> str:
    """Replace the longest prefix of `key` (whole name components) that the map knows; none raises KeyError."""
    cut = len(key)
    while cut > 0:
        if key[:cut] in prefixes:
            return prefixes[key[:cut]] + key[cut:]
        cut = key.rfind(".", 0, cut)
    raise KeyError(key)


def _reshaped_attention(key: str, value: Tensor, dimensions: int) -> Tensor:
    """Turn (C, C) into (C, C, 1, 1) or back if `key` (diffusers' name) is a projection of the VAE's attention."""
    is_projection = ".attentions.0." in key and ".group_norm." not in key and key.endswith(".weight")
    if not is_projection or value.ndim == dimensions:
        return value
    return value[:, :, None, None] if dimensions == 4 else value[:, :, 0, 0]
