"""First weights of the networks: copied from a UNet's encoder where it has them, drawn from a generator elsewhere."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from .control import ClearSRControl

# Parts that no UNet has. Those of _ZERO start at zero (of window_attention only to_out does), so that an untrained
# model is the plain UNet and an untrained DPM a plain ControlNet.
_ZERO = {"controlnet_down_blocks", "controlnet_mid_block", "conv_in_lr"}
_NEW = _ZERO | {"window_attention", "norm_window"}


def initialise_fresh(network: nn.Module, generator: torch.Generator) -> None:
    """Draw every parameter anew, in place and from `generator` alone.

    Norms start at identity, the zero-initialised layers of the method at zero, the relative bias as a normal
    distribution of deviation 0.02 truncated at 0.04, every other layer uniformly in +-1 / sqrt(fan_in).

    Args:
        network: `ClearSRControl`, or any module of convolutions, linear layers, norms and embeddings.
        generator: lives on the device of the parameters.
    """
    for name, module in cast("Iterable[tuple[str, nn.Module]]", network.named_modules()):
        zero = not _ZERO.isdisjoint(name.split(".")) or name.endswith("window_attention.to_out")
        _draw(module, generator, zero=zero)


def initialise_from_unet(
    control: ClearSRControl, unet: Mapping[str, Tensor], generator: torch.Generator | None = None
) -> None:
    """Copy conv_in, time embedding, encoder and middle block of a UNet into DPM and SPM, in place.

    What a UNet does not bring (window attention, output convolutions) is drawn as in `initialise_fresh`.

    Args:
        control: networks on a real device.
        unet: state dict of the UNet in diffusers' names; its decoder is ignored.
        generator: source of the new weights; None = one seeded with 0.
    """
    modules = {"dpm": control.dpm, "spm": control.spm}
    expected = {
        (part, name): parameter
        for part, module in modules.items()
        if module is not None
        for name, parameter in module.named_parameters()
        if not _is_new(name)
    }
    for (part, name), parameter in expected.items():
        if name not in unet:
            raise ValueError(f"the UNet has no {name!r}, which {part} copies: is the state dict in diffusers' names?")
        if unet[name].shape != parameter.shape:
            raise ValueError(f"{name!r} is {tuple(unet[name].shape)} in the UNet, {tuple(parameter.shape)} in {part}")
    device = next(control.parameters()).device
    initialise_fresh(control, generator or torch.Generator(device).manual_seed(0))
    with torch.no_grad():
        for (_, name), parameter in expected.items():
            parameter.copy_(unet[name])


def _is_new(name: str) -> bool:
    """Tell whether a parameter is one that a UNet does not have."""
    return not _NEW.isdisjoint(name.split("."))


def _draw(module: nn.Module, generator: torch.Generator, *, zero: bool) -> None:
    """Initialise the parameters of one leaf layer; containers have none of their own."""
    if isinstance(module, nn.Embedding):
        nn.init.trunc_normal_(module.weight, std=0.02, a=-0.04, b=0.04, generator=generator)
    elif isinstance(module, nn.GroupNorm | nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Linear | nn.Conv2d):
        bound = 0.0 if zero else 1.0 / math.sqrt(module.weight[0].numel())
        for parameter in (module.weight, module.bias):
            if parameter is not None:
                nn.init.uniform_(parameter, -bound, bound, generator=generator)
