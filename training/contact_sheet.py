"""Look at training pairs and their drawn numbers: `python -m training.contact_sheet --data=FOLDER --out=sheet.png`."""

from __future__ import annotations

import logging
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from . import command_line, config, degradation
from .blur_kernels import BlurKernel
from .degradation import Preset
from .pairs import DegradeOn, degrade_pairs
from .photographs import Photographs
from .pipeline import upscale_lr
from .randomness import generator_for

log = logging.getLogger("clearsr.training")

GAP = 8  # pixels around every pair
LINE = 13  # height of a line of the caption, in pixels
LINES = 7
AMPLIFIED = 16  # times the difference of the two paths is shown


@dataclass(frozen=True)
class ContactSheetSettings:
    """Which pairs to show, and how."""

    data: Path  # folder of pictures, or of shards
    out: Path  # PNG file
    degradation: Preset = "paper"  # ranges of blur, noise and JPEG: docs/TRAINING.md
    usm: bool = False  # sharpen crops first, as --usm=true does in training
    candidates: int = 1  # crops drawn for each one shown; the most detailed is taken
    count: int = 8  # pairs
    columns: int = 2  # pairs beside each other
    crop: int = 256  # pixels
    seed: int = 0  # of crops and degradations
    enlarge: Literal["nearest", "bicubic"] = "nearest"  # pixels as they are, or as the encoder sees them
    degrade_on: Literal["cpu", "device", "both"] = "cpu"  # the path of the degradation; both: beside their difference
    device: str = "cpu"  # of the second path
    memory_gb: float = 1.0  # most memory that decoded pictures take


def _kernel(kernel: BlurKernel | None) -> str:
    if kernel is None:
        return "no blur"
    if kernel.kind == "sinc":
        return f"sinc {kernel.size}, cut-off {kernel.cutoff / math.pi:.2f} pi"
    anisotropic = kernel.kind.endswith("anisotropic")
    sigma = f"{kernel.sigma[0]:.2f}" + (f" / {kernel.sigma[1]:.2f}" if anisotropic else "")
    turned = f", {math.degrees(kernel.angle):.0f} deg" if anisotropic else ""
    shape = f", beta {kernel.shape:.2f}" if kernel.shape != 1.0 else ""
    return f"{kernel.kind} {kernel.size}, sigma {sigma}{turned}{shape}"


def _stage(stage: degradation.Stage) -> list[str]:
    colour = "grey" if stage.grey_noise else "coloured"
    return [
        _kernel(stage.kernel),
        f"{stage.resize_mode} x {stage.resize_factor:.2f}, {colour} {stage.noise} {stage.noise_strength:.2f}, "
        f"JPEG {stage.jpeg_quality}",
    ]


def caption(number: int, recipe: degradation.Recipe) -> list[str]:
    """Return the drawn numbers of one degradation as short lines."""
    order = "resize and sinc, then JPEG" if recipe.jpeg_last else "JPEG, then resize and sinc"
    last = _kernel(recipe.final_sinc) if recipe.final_sinc else "no sinc"
    first, second = _stage(recipe.first), _stage(recipe.second)
    return [
        f"crop {number}",
        *(f"1: {first[0]}", f"   {first[1]}"),
        *(f"2: {second[0]}", f"   {second[1]}"),
        f"end: {recipe.final_mode}, {last}",
        f"   {order}",
    ]


def _pixels(image: Tensor) -> Image.Image:
    """Return (3, H, W) in [0, 1] as a picture."""
    return Image.fromarray((image * 255.0).round().clamp(0, 255).byte().permute(1, 2, 0).contiguous().numpy())


def pair(
    photographs: Photographs, number: int, settings: ContactSheetSettings
) -> tuple[Tensor, list[Tensor], list[str]]:
    """Return a crop and what stands beside it.

    Returns:
        Crop `number`, (3, crop, crop) in [0, 1]; its partner of each path, and with both paths their difference around
        middle grey, each (3, crop / 4, crop / 4); the caption.
    """
    hq = photographs.crop(settings.crop, generator_for(settings.seed + 1, number), settings.candidates, number)
    hq = (hq + 1.0) / 2.0
    if settings.usm:
        hq = degradation.sharpen(hq)
    seed, preset = settings.seed + 4, degradation.PRESETS[settings.degradation]  # training takes this seed too
    lines = caption(number, degradation.draw(generator_for(seed, number), preset))
    paths: tuple[DegradeOn, ...] = ("cpu", "device") if settings.degrade_on == "both" else (settings.degrade_on,)
    partners = []
    for path in paths:
        where = settings.device if path == "device" else "cpu"
        partners.append(degrade_pairs(hq[None].to(where), [number], seed, preset, degrade_on=path)[0].cpu())
    if len(partners) == 2:
        difference = partners[1] - partners[0]
        lines[0] += f", paths differ by up to {float(difference.abs().max()) * 255:.0f} of 255"
        partners.append((0.5 + AMPLIFIED * difference).clamp(0.0, 1.0))
    return hq, partners, lines


def run(settings: ContactSheetSettings) -> None:
    """Write the sheet."""
    if settings.crop % 4 or settings.crop < 8 or settings.count < 1 or settings.columns < 1:
        raise config.ConfigError("--crop takes a multiple of 4 from 8 on, --count and --columns 1 or more.")
    photographs = Photographs(settings.data, settings.crop, settings.memory_gb)
    columns = min(settings.columns, settings.count)
    side, rows = settings.crop, -(-settings.count // columns)
    pictures = 4 if settings.degrade_on == "both" else 2
    width, height = pictures * side + 2 * GAP, side + LINES * LINE + 2 * GAP
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    draw = ImageDraw.Draw(sheet)
    for number in range(settings.count):
        hq, partners, lines = pair(photographs, number, settings)
        x, y = number % columns * width + GAP, number // columns * height + GAP
        sheet.paste(_pixels(hq), (x, y))
        for place, lr in enumerate(partners, start=1):
            if settings.enlarge == "bicubic":
                shown = _pixels(upscale_lr(lr[None], (side, side))[0])
            else:
                shown = _pixels(lr).resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(shown, (x + place * side, y))
        for place, line in enumerate(lines):
            draw.text((x, y + side + 2 + place * LINE), line, fill="black")
    settings.out.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(settings.out, "PNG")
    shown = (
        f"target, CPU path, device path, {AMPLIFIED} x their difference"
        if pictures == 4
        else "target, low-quality picture"
    )
    log.info("%s: %d pairs, each from left to right: %s", settings.out, settings.count, shown)


@command_line.command()
def main(arguments: list[str]) -> int:
    """Run from the command line; return the exit status."""
    with torch.no_grad():
        run(command_line.settings(ContactSheetSettings, arguments, __doc__))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
