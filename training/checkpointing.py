"""Gradient checkpointing: activations that are computed again on the way back instead of being kept."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Literal

from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import nn
from torch.utils.checkpoint import checkpoint

from clearsr_core.layers import ResBlock, SpatialTransformer

from .clearsr_model import ClearSRModel

Checkpointing = Literal["none", "encoder", "all"]  # nothing; the VAE encoder, where the peak is; all that has gradients


def checkpoint_blocks(model: ClearSRModel, what: Checkpointing) -> None:
    """Let the blocks of `model` keep their inputs only; names and results stay, the forward pass runs twice."""
    for block in _blocks(model, what):
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)


def _blocks(model: ClearSRModel, what: Checkpointing) -> Iterator[nn.Module]:
    if what == "none":
        return
    yield from _of_kind(model.lr_encoder, ResnetBlock2D, Attention)
    if what == "all":
        # The UNet's encoder and middle block hold no gradients.
        yield from _of_kind(model.unet.up_blocks, ResnetBlock2D, BasicTransformerBlock)
        yield from _of_kind(model.control, ResBlock, SpatialTransformer)


def _of_kind(parent: nn.Module, *kinds: type[nn.Module]) -> Iterator[nn.Module]:
    return (module for module in parent.modules() if isinstance(module, kinds))
