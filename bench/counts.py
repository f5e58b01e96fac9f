"""Multiply-adds of the networks at any size, counted on tensors without content: what time is held against."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import comfy.ldm.modules.diffusionmodules.openaimodel as openaimodel
import comfy.model_detection
import comfy.ops
import comfy.supported_models
import torch
from torch.utils.flop_counter import FlopCounterMode

from ..clearsr_core import tiles
from ..clearsr_core.config import ClearSRConfig
from ..clearsr_core.control import ClearSRControl
from ..clearsr_core.shapes import checkpoint_shapes
from ..nodes.tiled_diffusion import TilingSettings
from . import subjects

META = torch.device("meta")


@dataclass(frozen=True)
class Counts:
    """Multiply-adds of one forward of each network at one latent side."""

    unet: float
    dpm: float
    spm: float


def networks(config: ClearSRConfig) -> tuple[torch.nn.Module, ClearSRControl]:
    """Return the host's UNet and the control networks without weights."""
    shapes = checkpoint_shapes(config)["base.unet"]
    weights = {name: torch.empty(shape, device=META) for name, shape in shapes.items()}
    unet_config = {
        **comfy.model_detection.detect_unet_config(weights, ""),
        **comfy.supported_models.SD20.unet_extra_config,
        "num_head_channels": config.networks.head_channels,
    }
    unet = openaimodel.UNetModel(**unet_config, device=META, operations=comfy.ops.disable_weight_init)
    return unet, ClearSRControl(config.control, device=META)


def counted(config: ClearSRConfig, side: int) -> Counts:
    """Count one forward of each network for one picture of `side` x `side` latent pixels."""
    unet, control = networks(config)
    x = torch.empty(1, config.control.latent_channels, side, side, device=META)
    text = torch.empty(1, subjects.TOKENS, config.control.context_dim, device=META)
    timestep = torch.empty(1, device=META)
    found = []
    for work in (
        lambda: unet(x, timestep, context=text, transformer_options={}),
        lambda: control.dpm and control.dpm(x, timestep, text, x),
        lambda: control.spm and control.spm(x, timestep, text, x),
    ):
        counter = FlopCounterMode(display=False)
        with counter:
            work()
        found.append(counter.get_total_flops() / 2)
    return Counts(*found)


def in_tiles(config: ClearSRConfig, side: int, tile: int) -> Counts:
    """Count one step of a picture of `side` x `side` latent pixels, cut into tiles of `tile`."""
    number = len(tiles.layout(side, side, tile, TilingSettings().overlap).tiles)
    one = counted(config, min(side, tile))
    return Counts(number * one.unet, number * one.dpm, number * one.spm)


def of_guidance(one: Counts, texts: int) -> Counts:
    """Count one step with guidance: the UNet for both halves, the control for each text that it reads."""
    return Counts(2 * one.unet, texts * one.dpm, texts * one.spm)


def run(size: str, pixels: list[int]) -> dict:
    """Count at every side, in one piece, in tiles of 512 and 768 pixels, and with an imported control.

    Returns:
        Plain values for JSON.
    """
    config = subjects.config_of(size)
    rows = []
    for side in pixels:
        ways = {"one piece": counted(config, side // 8)}
        ways |= {f"tiles of {tile}": in_tiles(config, side // 8, tile // 8) for tile in (512, 768) if tile < side}
        imported = counted(subjects.imported_config(config), side // 8)
        ways |= {
            "one piece, guidance": of_guidance(ways["one piece"], texts=1),
            "imported control": imported,
            "imported control, guidance, two texts": of_guidance(imported, texts=2),
        }
        rows += [{"pixels": side, "way": way, **dataclasses.asdict(counts)} for way, counts in ways.items()]
    return {"size": size, "rows": rows}
