"""Make pairs to measure on out of photographs: `python -m training.make_pairs --data=FOLDER --out=FOLDER`."""

from __future__ import annotations

import logging
import sys
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from . import command_line, config, provenance
from .degradation import PRESETS, Preset
from .pairs import degrade_pairs
from .picture_files import SUFFIXES, read_pixels, to_bytes, write_png

log = logging.getLogger("clearsr.training")

SMALLEST = 192  # pixels; NIQE cannot judge less
SCALE = 4


@dataclass(frozen=True)
class MakePairsSettings:
    """Which photographs, how large, how they are degraded."""

    data: Path  # folder of photographs, searched with everything below it
    out: Path  # gets hr/NAME.png and lr/NAME.png; pairs of the same photographs are kept
    crop: int = 512  # most pixels of a side: the middle is taken; 0 = whole photographs
    degradation: Preset = "paper"  # ranges of blur, noise and JPEG: docs/TRAINING.md
    seed: int = 0  # with a photograph's name it decides its degradation


def run(settings: MakePairsSettings) -> None:
    """Write every pair that is not there yet; one of another photograph of that name is made anew.

    Raises:
        ValueError: no photographs, equal names, one too small or unreadable, settings that cannot be, or pairs of other
            settings in `out`; nothing is written of that photograph.
    """
    if settings.crop and (settings.crop < SMALLEST or settings.crop % SCALE):
        raise config.ConfigError(f"--crop={settings.crop}: give 0, or a multiple of {SCALE} from {SMALLEST} on.")
    if not settings.data.is_dir():
        raise ValueError(f"--data={settings.data} is not a folder.")
    paths = sorted(path for path in settings.data.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise ValueError(f"No photographs in --data={settings.data}.")
    name, times = Counter(path.stem for path in paths).most_common(1)[0]
    if times > 1:
        raise ValueError(f"{times} photographs in --data={settings.data} are called {name}. Rename all but one.")
    made_with = {"crop": settings.crop, "degradation": settings.degradation, "seed": settings.seed}
    provenance.refuse_other(settings.out, made_with)
    for path in tqdm(paths, unit="pair"):
        hr, lr = (settings.out / kind / f"{path.stem}.png" for kind in ("hr", "lr"))
        source = provenance.sha256(path)
        if provenance.is_made_from(hr, source) and provenance.is_made_from(lr, source):
            continue
        pixels = read_pixels(path)
        height, width = (min(side, settings.crop or side) // SCALE * SCALE for side in pixels.shape[-2:])
        if min(height, width) < SMALLEST:
            raise ValueError(
                f"{path} has {pixels.shape[-1]} x {pixels.shape[-2]} pixels; at least {SMALLEST} are needed in both."
            )
        top, left = (pixels.shape[-2] - height) // 2, (pixels.shape[-1] - width) // 2
        hq = pixels[..., top : top + height, left : left + width]
        # By its name, so that other photographs beside it change nothing.
        number = zlib.crc32(path.stem.encode())
        small = degrade_pairs(hq, [number], settings.seed, PRESETS[settings.degradation], SCALE)
        provenance.claim(settings.out, made_with)
        for image, target in ((hq, hr), (small, lr)):
            target.parent.mkdir(parents=True, exist_ok=True)
            write_png(to_bytes(image[0]), target, source)


@command_line.command(command_line.GOES_ON)
def main(arguments: list[str]) -> int:
    """Run from the command line; return the exit status."""
    with torch.no_grad():
        run(command_line.settings(MakePairsSettings, arguments, __doc__))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
