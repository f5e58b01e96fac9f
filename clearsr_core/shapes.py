"""The names and shapes of every weight that a configuration implies, without making any of them."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import cast

from torch import Tensor, nn

from .config import BaseConfig, ClearSRConfig, ControlConfig
from .control import ClearSRControl
from .image_encoder import ImagePromptEncoder
from .key_maps import rename, unet_lora_targets, unet_prefixes, vae_lora_targets, vae_prefixes
from .operations import Operations

Shape = tuple[int, ...]
ANY = -1  # a side that may have any length


def _unfilled(layer: type[nn.Module]) -> type[nn.Module]:
    """Return the layer without its initialisation: drawing numbers on the meta device first imports for seconds."""
    return type(layer.__name__, (layer,), {"reset_parameters": _nothing})


def _nothing(layer: nn.Module) -> None:
    """Stand in for `reset_parameters`."""


_LAYERS = (nn.Linear, nn.Conv2d, nn.GroupNorm, nn.LayerNorm, nn.Embedding)
_SHAPES_ONLY = cast(Operations, SimpleNamespace(**{layer.__name__: _unfilled(layer) for layer in _LAYERS}))


def checkpoint_shapes(config: ClearSRConfig) -> dict[str, dict[str, Shape]]:
    """Return part -> weight -> shape of a checkpoint file; a part that is one tensor has the weight "".

    `null_text` may have any number of tokens, written as ANY.
    """
    control = ClearSRControl(config.control, ops=_SHAPES_ONLY, device="meta")
    unet, vae = unet_shapes(config.control), vae_shapes(config.networks)
    parts: dict[str, dict[str, Shape]] = {"null_text": {"": (ANY, config.control.context_dim)}}
    if control.dpm is not None:
        parts["dpm"] = _shapes(control.dpm)
    if control.spm is not None:
        parts["spm"] = _shapes(control.spm)
    if config.lora_rank:
        parts["unet_lora"] = lora_shapes(unet_lora_targets(config.control), unet, config.lora_rank)
        parts["vae_lora"] = lora_shapes(vae_lora_targets(config.networks), vae, config.lora_rank)
    if config.image_encoder:
        parts["image_encoder"] = _shapes(
            ImagePromptEncoder(config.control.context_dim, ops=_SHAPES_ONLY, device="meta")
        )
    if config.clip_width:
        parts["image_projection"] = _layer("norm", config.clip_width) | _layer(
            "projection", config.control.context_dim, config.clip_width, bias=False
        )
    if config.base is not None:
        parts["base.unet"] = _in_host(unet, unet_prefixes(config.control))
        parts["base.vae"] = _in_host(vae, vae_prefixes(config.base))
    return parts


def lora_shapes(targets: list[str], weights: Mapping[str, Shape], rank: int) -> dict[str, Shape]:
    """Return the tensors of a PEFT adapter on each target, with the scale that hosts otherwise take for 1.

    A (rank, in, k, k) and B (out, rank, 1, 1) on a convolution, (rank, in) and (out, rank) on a linear layer, alpha ().
    """
    shapes: dict[str, Shape] = {}
    for target in targets:
        out, inputs, *kernel = weights[f"{target}.weight"]
        shapes[f"{target}.lora_A.weight"] = (rank, inputs, *kernel)
        shapes[f"{target}.lora_B.weight"] = (out, rank, *(1 for _ in kernel))
        shapes[f"{target}.alpha"] = ()
    return shapes


def unet_shapes(config: ControlConfig) -> dict[str, Shape]:
    """Return the weights of the SD 2.x UNet that `config` controls, in diffusers' names."""
    widths, layers, time = config.widths, config.layers_per_block, 4 * config.widths[0]
    coarsest = widths[-1]
    shapes = _layer("conv_in", widths[0], config.latent_channels, 3, 3)
    shapes |= _layer("time_embedding.linear_1", time, widths[0]) | _layer("time_embedding.linear_2", time, time)

    # Encoder.
    skips = [widths[0]]
    for level, width in enumerate(widths):
        name = f"down_blocks.{level}"
        for index in range(layers):
            shapes |= _resnet(f"{name}.resnets.{index}", skips[-1], width, time)
            if config.attention_levels[level]:
                shapes |= _transformer(f"{name}.attentions.{index}", width, config.context_dim)
            skips.append(width)
        if level < config.levels - 1:
            shapes |= _layer(f"{name}.downsamplers.0.conv", width, width, 3, 3)
            skips.append(width)

    # Middle.
    shapes |= _resnet("mid_block.resnets.0", coarsest, coarsest, time)
    shapes |= _transformer("mid_block.attentions.0", coarsest, config.context_dim)
    shapes |= _resnet("mid_block.resnets.1", coarsest, coarsest, time)

    # Decoder: every layer takes one skip of the encoder, last in, first out.
    current = coarsest
    for block, level in enumerate(reversed(range(config.levels))):
        name, width = f"up_blocks.{block}", widths[level]
        for index in range(layers + 1):
            shapes |= _resnet(f"{name}.resnets.{index}", current + skips.pop(), width, time)
            if config.attention_levels[level]:
                shapes |= _transformer(f"{name}.attentions.{index}", width, config.context_dim)
            current = width
        if level > 0:
            shapes |= _layer(f"{name}.upsamplers.0.conv", width, width, 3, 3)
    return shapes | _layer("conv_norm_out", widths[0]) | _layer("conv_out", config.latent_channels, widths[0], 3, 3)


def vae_shapes(config: BaseConfig) -> dict[str, Shape]:
    """Return the weights of SD's KL autoencoder (RGB), in diffusers' names."""
    widths, latent = config.vae_widths, config.latent_channels
    finest, coarsest = widths[0], widths[-1]
    shapes = _layer("quant_conv", 2 * latent, 2 * latent, 1, 1) | _layer("post_quant_conv", latent, latent, 1, 1)

    # Encoder, finest first; decoder, coarsest first, with one block more per level.
    shapes |= _layer("encoder.conv_in", finest, 3, 3, 3) | _layer("decoder.conv_in", coarsest, latent, 3, 3)
    shapes |= _vae_levels("encoder.down_blocks", widths, config.vae_blocks, "downsamplers")
    shapes |= _vae_levels("decoder.up_blocks", widths[::-1], config.vae_blocks + 1, "upsamplers")
    for half in ("encoder", "decoder"):
        attention = f"{half}.mid_block.attentions.0"
        shapes |= _layer(f"{attention}.group_norm", coarsest)
        for projection in ("to_q", "to_k", "to_v", "to_out.0"):
            shapes |= _layer(f"{attention}.{projection}", coarsest, coarsest)
        for index in (0, 1):
            shapes |= _resnet(f"{half}.mid_block.resnets.{index}", coarsest, coarsest)
    shapes |= _layer("encoder.conv_norm_out", coarsest) | _layer("encoder.conv_out", 2 * latent, coarsest, 3, 3)
    return shapes | _layer("decoder.conv_norm_out", finest) | _layer("decoder.conv_out", 3, finest, 3, 3)


def _vae_levels(name: str, widths: Shape, blocks: int, resampler: str) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {}
    current = widths[0]
    for level, width in enumerate(widths):
        for index in range(blocks):
            shapes |= _resnet(f"{name}.{level}.resnets.{index}", current, width)
            current = width
        if level < len(widths) - 1:
            shapes |= _layer(f"{name}.{level}.{resampler}.0.conv", width, width, 3, 3)
    return shapes


def _layer(name: str, *weight: int, bias: bool = True) -> dict[str, Shape]:
    """Return a convolution, linear layer or norm: a weight, and a bias of its first side."""
    shapes: dict[str, Shape] = {f"{name}.weight": weight}
    if bias:
        shapes[f"{name}.bias"] = weight[:1]
    return shapes


def _resnet(name: str, inputs: int, outputs: int, time: int | None = None) -> dict[str, Shape]:
    shapes = _layer(f"{name}.norm1", inputs) | _layer(f"{name}.conv1", outputs, inputs, 3, 3)
    shapes |= _layer(f"{name}.norm2", outputs) | _layer(f"{name}.conv2", outputs, outputs, 3, 3)
    if time is not None:
        shapes |= _layer(f"{name}.time_emb_proj", outputs, time)
    if inputs != outputs:
        shapes |= _layer(f"{name}.conv_shortcut", outputs, inputs, 1, 1)
    return shapes


def _transformer(name: str, width: int, context: int) -> dict[str, Shape]:
    block = f"{name}.transformer_blocks.0"
    shapes = _layer(f"{name}.norm", width) | _layer(f"{name}.proj_in", width, width)
    for attention, source in (("attn1", width), ("attn2", context)):
        shapes |= _layer(f"{block}.{attention}.to_q", width, width, bias=False)
        shapes |= _layer(f"{block}.{attention}.to_k", width, source, bias=False)
        shapes |= _layer(f"{block}.{attention}.to_v", width, source, bias=False)
        shapes |= _layer(f"{block}.{attention}.to_out.0", width, width)
    for index in (1, 2, 3):
        shapes |= _layer(f"{block}.norm{index}", width)
    shapes |= _layer(f"{block}.ff.net.0.proj", 8 * width, width) | _layer(f"{block}.ff.net.2", width, 4 * width)
    return shapes | _layer(f"{name}.proj_out", width, width)


def _shapes(network: nn.Module) -> dict[str, Shape]:
    tensors: dict[str, Tensor] = network.state_dict()
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _in_host(shapes: Mapping[str, Shape], prefixes: Mapping[str, str]) -> dict[str, Shape]:
    """Rename to the host; the autoencoder's attention is made of 1x1 convolutions there."""
    renamed: dict[str, Shape] = {}
    for key, shape in shapes.items():
        name = rename(key, prefixes)
        renamed[name] = (*shape, 1, 1) if ".mid.attn_1." in name and len(shape) == 2 else shape
    return renamed
