"""DPM/SPM Control Apply: x_c = DPM(x_lr) + SPM(x_lr) and the image prompt p for any sampler (paper Sec. 3.1, 3.2)."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from comfy_api.latest import io
from torch import Tensor

from ..clearsr_core import tiles
from ..clearsr_core.clip_features import projected_tokens
from .compat import HostObject, notice, schema, widget
from .control_hooks import ControlSettings, attach_control
from .finite import VAE_HELP, broken
from .model_checks import base_fingerprint, check_model, other_base
from .sockets import KEY, ClearSRSocket, LREntry, encoded_rows
from .tiled_diffusion import AUTOMATIC_SIDE, NODE, PIXELS, TilingSettings

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

    from .sockets import ClearSRBundle


def parse_level_weights(text: str, levels: int = 4, layers_per_block: int = 2) -> tuple[float, ...]:
    """Read the advanced widget: nothing, one number per level and one for the middle, or one per residual.

    Args:
        text: of the widget.
        levels, layers_per_block: of the UNet's encoder. A level has a skip for each ResBlock and for what enters it.

    Returns:
        levels (layers_per_block + 1) + 1 numbers: the skips from fine to coarse, then the middle.
    """
    per_level = layers_per_block + 1
    skips = levels * per_level
    parts = text.split(",") if "," in text else text.split()  # an empty place between commas is no number
    try:
        numbers = [float(part) for part in parts]
    except ValueError:
        numbers = None
    if numbers == []:
        return (1.0,) * (skips + 1)
    if numbers is not None and len(numbers) == levels + 1:
        numbers = [number for number in numbers[:-1] for _ in range(per_level)] + numbers[-1:]
    if numbers is None or len(numbers) != skips + 1 or not all(abs(number) < float("inf") for number in numbers):
        raise ValueError(
            f"{NODE}: level_weights is '{text}'. Leave it empty, or write {levels + 1} numbers (the levels from fine "
            f"to coarse and the middle) or {skips + 1} numbers (each residual), separated by commas."
        )
    return tuple(numbers)


def decoder_prompt(bundle: ClearSRBundle, clip_vision: HostObject, lr_latent: dict) -> tuple[Tensor | None, str | None]:
    """Choose the image prompt p (decision 0005).

    Returns:
        (B, n, context width) or None for the empty prompt, and a sentence for the user where that is a fallback.
    """
    mode, width = bundle.config.prompt_mode, bundle.config.control.context_dim
    if mode == "null":
        return None, None
    if clip_vision is None:
        entry: LREntry | None = lr_latent.get(KEY)
        if entry is not None and entry["image_prompt"] is not None:
            rows = encoded_rows(entry, lr_latent["samples"])
            if rows is not None:
                return entry["image_prompt"][rows], None
            pictures, prompts = len(lr_latent["samples"]), len(entry["image_prompt"])
            if prompts == 1 < pictures:
                return entry["image_prompt"], (
                    f"{NODE}: lr_latent holds {pictures} pictures, but the image prompt of 1, which all of them get. "
                    "Put pictures together as IMAGE, before LR Latent Encode."
                )
            return entry["image_prompt"], None
        if bundle.image_encoder is not None:
            return None, (
                f"{NODE}: lr_latent does not come from LR Latent Encode, or lost on the way what that node wrote into "
                "it, so the decoder reads the empty prompt instead of the picture. Connect LR Latent Encode directly."
            )
        return None, (
            f"{NODE}: no CLIP_VISION_OUTPUT is connected, so the decoder reads the empty prompt instead of the "
            f"picture. '{bundle.name}' was trained with CLIP ViT-H/14 image features."
        )
    if bundle.image_encoder is not None:
        raise ValueError(f"{NODE}: '{bundle.name}' has its own image encoder; disconnect the clip_vision_output input.")
    projection = bundle.image_projection if mode == "patch" else None
    name = "image_embeds" if mode == "pooled" else "last_hidden_state"
    wanted = width if projection is None else bundle.config.clip_width
    features = clip_vision[name]
    if features is None or features.shape[-1] != wanted:
        found = "none" if features is None else str(features.shape[-1])
        raise ValueError(
            f"{NODE}: the CLIP_VISION_OUTPUT has {found} features ({name}), but '{bundle.name}' needs {wanted}. Use "
            "the CLIP vision model ViT-H/14 (CLIP-ViT-H-14-laion2B-s32B-b79K)."
        )
    tokens = (features[:, None] if features.ndim == 2 else features).float()  # (B, n, wanted)
    if projection is not None:
        tokens = projected_tokens(tokens, projection)  # (B, n, width)
    return tokens, None


def tiling_settings(
    tile_size: int, tile_overlap: int, tiles_per_batch: int, say: Callable[[str, int], None]
) -> TilingSettings:
    """Bring the widgets, in pixels, to the grid of windows; what had to be rounded is told through `say`."""
    unit, smallest = tiles.GRID * PIXELS, tiles.MIN_SIDE * PIXELS
    size = tile_size and max(smallest, round(tile_size / unit) * unit)
    tile = size or AUTOMATIC_SIDE * PIXELS
    if tile_overlap >= tile:
        raise ValueError(
            f"{NODE}: tile_overlap is {tile_overlap}, but a tile has only {tile} pixels, so the next one would not get "
            f"further. Set tile_overlap to {max(unit, tile // 2 // unit * unit)} or less."
        )
    overlap = min(max(unit, -(-tile_overlap // unit) * unit), tile - unit)
    grid, least = f"tiles lie on a grid of {unit} pixels", f"a tile has at least {smallest} pixels"
    for name, given, used, why in (
        ("tile_size", tile_size, size, least if 0 < tile_size < smallest else grid),
        ("tile_overlap", tile_overlap, overlap, grid),
    ):
        if given != used:
            say(f"{NODE}: {name} is {given}, but {why}, so {used} is used.", logging.WARNING)
    return TilingSettings(size // PIXELS, overlap // PIXELS, max(1, tiles_per_batch), say)


def check_same_loader(model: ModelPatcher, bundle: ClearSRBundle, say: Callable[[str], None]) -> None:
    """Compare the MODEL with the one that ClearSR Loader made beside `bundle`: two loaders can be mixed up.

    Raises:
        ValueError: it is another one, and the file carries its own.
    """
    attachment = model.get_attachment(KEY) or {}
    found = attachment["base"] if "base" in attachment else base_fingerprint(model, bundle.config)
    contained = bundle.config.base is not None
    # A MODEL that comes past the loader was not compared with the file yet, one that comes from it was.
    wanted = bundle.base if contained or attachment else bundle.config.base_fingerprint
    difference = other_base(NODE, found, wanted, bundle.name)
    if difference is not None and contained:
        raise ValueError(
            f"{NODE}: the connected MODEL is another one than '{bundle.name}' carries. Use the MODEL output of the "
            "ClearSR Loader that loads this file."
        )
    if difference is not None:
        say(difference)


class ClearSRControlApply(io.ComfyNode):
    """MODEL, CLEARSR, LATENT x_lr -> MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ClearSRControlApply",
            display_name="DPM/SPM Control Apply",
            description=(
                "Lets the low-resolution picture control the diffusion model: DPM carries its detail, SPM its "
                "structure, and the decoder reads an image prompt instead of text. Works with any sampler; applying "
                "it again replaces the earlier one."
            ),
            search_aliases=["clearsr", "controlnet", "dpm", "spm", "detail preserving", "structure preserving"],
            inputs=[
                widget(io.Model, "model", tooltip="The MODEL of ClearSR Loader."),
                widget(ClearSRSocket, "clearsr", tooltip="From ClearSR Loader."),
                widget(io.Latent, "lr_latent", tooltip="From LR Latent Encode."),
                widget(
                    io.Float,
                    "dpm_strength",
                    default=1.0,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    tooltip="Strength of the Detail Preserving Module. 1 = as trained, 0 = off (saves its time).",
                ),
                widget(
                    io.Float,
                    "spm_strength",
                    default=1.0,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    tooltip="Strength of the Structure Preserving Module. 1 = as trained, 0 = off (saves its time).",
                ),
                widget(
                    io.Float,
                    "start_percent",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Where in the sampling the control begins: 0 = from the first step.",
                ),
                widget(
                    io.Float,
                    "end_percent",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Where in the sampling the control ends: 1 = after the last step.",
                ),
                widget(
                    io.Int,
                    "control_every",
                    default=1,
                    min=1,
                    max=50,
                    step=1,
                    advanced=True,
                    tooltip="Compute the control anew at every n-th step only. 1 = at each step, exact; 2 saves about "
                    "a sixth of the time, large numbers lose detail. Models trained with a fixed control time compute "
                    "it once by themselves.",
                ),
                widget(
                    io.String,
                    "level_weights",
                    default="",
                    advanced=True,
                    tooltip="Factors for the residuals, separated by commas: 5 numbers (four levels from fine to "
                    "coarse, then the middle) or 13 (each of the 12 skips, then the middle). Empty = all 1.",
                ),
                widget(
                    io.ClipVisionOutput,
                    "clip_vision_output",
                    optional=True,
                    tooltip="CLIP ViT-H/14 features of the low-resolution picture: the image prompt of SD 2.1 files. "
                    "Self-contained files bring their own. Without it the decoder reads the empty prompt.",
                ),
                widget(
                    io.Int,
                    "tile_size",
                    default=0,
                    min=0,
                    max=16384,
                    step=64,
                    optional=True,
                    advanced=True,
                    tooltip="Sample in overlapping tiles of this many pixels, which saves memory. 0 = automatic: one "
                    "piece up to 1024 x 1024 pixels, tiles of 768 above that. As large as the picture = one piece.",
                ),
                widget(
                    io.Int,
                    "tile_overlap",
                    default=64,
                    min=64,
                    max=8192,
                    step=64,
                    optional=True,
                    advanced=True,
                    tooltip="By how many pixels neighbouring tiles overlap at least. More = softer borders, slower.",
                ),
                widget(
                    io.Int,
                    "tiles_per_batch",
                    default=1,
                    min=1,
                    max=64,
                    optional=True,
                    advanced=True,
                    tooltip="Tiles in one model call. More is faster on a large graphics card and needs more memory.",
                ),
            ],
            outputs=[io.Model.Output(display_name="MODEL", tooltip="The controlled MODEL, for any sampler.")],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        clearsr: ClearSRBundle,
        lr_latent: dict,
        dpm_strength: float = 1.0,
        spm_strength: float = 1.0,
        start_percent: float = 0.0,
        end_percent: float = 1.0,
        control_every: int = 1,
        level_weights: str = "",
        clip_vision_output: HostObject = None,
        tile_size: int = 0,
        tile_overlap: int = 64,
        tiles_per_batch: int = 1,
    ) -> io.NodeOutput:
        check_model(NODE, model, clearsr.config, clearsr.name)
        check_same_loader(model, clearsr, functools.partial(notice, cls))
        samples = lr_latent["samples"]
        if samples.ndim != 4 or samples.shape[1] != clearsr.config.control.latent_channels:
            raise ValueError(
                f"{NODE}: lr_latent has the shape {tuple(samples.shape)}; connect the LR_LATENT of LR Latent Encode "
                f"({clearsr.config.control.latent_channels} channels)."
            )
        if broken(samples):
            raise ValueError(
                f"{NODE}: lr_latent contains values that are not numbers (NaN or infinite). The node that made it is "
                f"broken or ran out of precision (stage: encode; if that is a VAE Encode, {VAE_HELP})."
            )
        if start_percent > end_percent:
            raise ValueError(
                f"{NODE}: start_percent {start_percent} lies after end_percent {end_percent}, so the control would "
                "never act. Swap them, or set both strengths to 0 for no control."
            )
        if start_percent == end_percent:
            notice(cls, f"{NODE}: start_percent and end_percent are both {start_percent}, so the control never acts.")
        prompt, fallback = decoder_prompt(clearsr, clip_vision_output, lr_latent)
        if fallback is not None:
            notice(cls, fallback)
        if broken(prompt):
            raise ValueError(
                f"{NODE}: the image prompt contains values that are not numbers (NaN or infinite). The CLIP vision "
                "model ran out of precision or its file is damaged: load it anew, or disconnect clip_vision_output."
            )
        if prompt is not None and prompt.shape[0] not in (1, samples.shape[0]):
            raise ValueError(
                f"{NODE}: the image prompt was made from {prompt.shape[0]} pictures, but lr_latent holds "
                f"{samples.shape[0]}. Choose and repeat pictures as IMAGE, before LR Latent Encode and CLIP Vision "
                "Encode."
            )
        settings = ControlSettings(
            dpm_strength,
            spm_strength,
            start_percent,
            end_percent,
            control_every,
            parse_level_weights(level_weights, clearsr.config.control.levels, clearsr.config.control.layers_per_block),
            tiling_settings(tile_size, tile_overlap, tiles_per_batch, functools.partial(notice, cls)),
        )
        controlled = attach_control(model, clearsr, samples, prompt, settings)
        # The samplers below find the empty prompt here, whatever happened to the MODEL in between.
        attachment = {
            "null_text": clearsr.null_text,
            "base": clearsr.base,
            "file": clearsr.name,
            "recommended": clearsr.config.recommended,
            "control_every": control_every,
            "encoded": lr_latent[KEY]["encoded"] if KEY in lr_latent else None,
        }
        controlled.set_attachments(KEY, attachment)
        return io.NodeOutput(controlled)
