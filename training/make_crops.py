"""Cut photographs into crops of a given size in bytes: `python -m training.make_crops --data=FOLDER --out=FOLDER`.

For a machine that a folder of whole photographs does not reach: training takes crops anyway, and `--data` takes their
folder as it does the photographs'.
"""

from __future__ import annotations

import io
import logging
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from clearsr_core.whole_files import replacing

from . import command_line, config, loop, provenance
from .photographs import Photographs
from .picture_files import to_bytes
from .randomness import generator_for

log = logging.getLogger("clearsr.training")

_MAY_CHANGE = ("megabytes", "memory_gb")  # what changes no crop


@dataclass(frozen=True)
class MakeCropsSettings:
    """Which photographs, how large the crops, how many bytes in all."""

    data: Path  # folder of photographs, or of shards
    out: Path  # folder for the crops; those that are there are kept
    crop: int = 384  # pixels of a side; training cuts its own, smaller crops out of these
    megabytes: float = 60.0  # of all crops together, in 1e6 bytes; as many are made as fit
    quality: int = 92  # of JPEG, without subsampling of colour
    candidates: int = 2  # crops drawn for each one kept; the most detailed is taken
    seed: int = 0  # of where crops are taken
    memory_gb: float = 4.0  # for decoded photographs


def compressed(image: Tensor, quality: int) -> bytes:
    """Return (3, H, W) in [-1, 1] as a JPEG file."""
    file = io.BytesIO()
    Image.fromarray(to_bytes((image + 1.0) / 2.0)).save(file, "JPEG", quality=quality, subsampling=0, optimize=True)
    return file.getvalue()


def run(settings: MakeCropsSettings) -> int:
    """Write crops until the next one would not fit; return how many there are.

    Crop N follows from the photographs, the settings and N alone: a stopped run goes on, a larger `megabytes` adds.

    Raises:
        ValueError: settings that cannot be, no usable photographs, or crops of other settings in `out`.
    """
    if settings.crop < 64 or not 1 <= settings.quality <= 100 or settings.candidates < 1 or settings.megabytes <= 0:
        raise config.ConfigError(
            "--crop takes 64 pixels or more, --quality 1 to 100, --candidates 1 or more, --megabytes more than 0."
        )
    photographs = Photographs(settings.data, settings.crop, settings.memory_gb)
    made_with = {key: value for key, value in loop.plain(settings).items() if key not in _MAY_CHANGE}
    provenance.claim(settings.out, {**made_with, "photographs": provenance.digest(photographs.identity)})
    limit, used, number = settings.megabytes * 1e6, 0, 0
    with tqdm(
        total=settings.megabytes, unit="MB", bar_format="{l_bar}{bar}| {n:.1f}/{total:.1f} MB {remaining}"
    ) as bar:
        while True:
            path = settings.out / f"crop_{number:06d}.jpg"
            if path.is_file():
                size = path.stat().st_size
                if used + size > limit:
                    raise ValueError(
                        f"--out={settings.out} holds more than {settings.megabytes:g} MB already. Give another folder, "
                        "or take its last crops out."
                    )
            else:
                generator = generator_for(settings.seed + 1, number)
                data = compressed(photographs.crop(settings.crop, generator, settings.candidates), settings.quality)
                size = len(data)
                if used + size > limit:
                    break
                with replacing(path) as unfinished:
                    unfinished.write_bytes(data)
            used, number = used + size, number + 1
            bar.update(size / 1e6)
    log.info("%d crops of %d pixels, %.1f MB, in %s.", number, settings.crop, used / 1e6, settings.out)
    return number


@command_line.command()
def main(arguments: list[str]) -> int:
    """Run from the command line; return the exit status."""
    with torch.no_grad():
        if run(command_line.settings(MakeCropsSettings, arguments, __doc__)) == 0:
            raise config.ConfigError("Not one crop fits into --megabytes.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
