"""Upscale a folder with the reference pipeline: `python -m training.restore --checkpoint=... --lr=... --out=...`."""

from __future__ import annotations

import logging
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

from clearsr_core.lsa import LSAConfig

from . import command_line, config, loop, provenance
from .clearsr_model import ClearSRModel, require_file
from .config import first
from .picture_files import SUFFIXES, read_pixels, to_bytes, write_png
from .pipeline import ColorFix, restore, sampling_schedule

log = logging.getLogger("clearsr.training")

_MAY_CHANGE = ("limit", "threads")  # what changes no picture


@dataclass(frozen=True)
class RestoreSettings:
    """What to upscale, with which file, how."""

    checkpoint: Path  # a self-contained ClearSR file
    lr: Path  # folder of low-resolution pictures
    out: Path  # folder for the results, under the same names; those of the same pictures are kept
    limit: int = 0  # 0 = all
    scale: int = 4  # results are so many times the size of the pictures
    steps: int = 50  # of the sampler
    seed: int = 0  # of the noise
    denoise: float = 1.0  # below 1: start part of the way, from x_lr
    ela_strength: float = 0.0  # the paper's alpha
    lla_strength: float = 0.0  # the paper's beta
    ela_end: float = 0.3  # share of the steps in which alpha acts
    lla_start: float = 0.88  # share of the steps after which beta acts
    accumulate: Literal["per_step", "over_phase"] = "per_step"  # over_phase: the same look at any number of steps
    color_fix: ColorFix = "none"  # wavelet, adain or lab: as the node ClearSR Color Fix
    threads: int = 0  # of the CPU; 0 = torch's default


def run(settings: RestoreSettings) -> None:
    """Upscale every picture that has no result yet; a result that is not of this very file is made anew.

    Raises:
        ConfigError: settings that cannot be; then, as with a file that cannot be used, nothing is written.
        ValueError: no pictures, equal names, one that cannot be read, or results of other settings in `out`.
        CheckpointError: the file is no self-contained ClearSR file.
    """
    if settings.scale < 1:
        raise config.ConfigError(f"--scale={settings.scale}: give 1 or more, how many times larger the results are.")
    sampling_schedule(settings.steps, "leading", settings.denoise)  # refuses what cannot be
    if settings.threads:
        torch.set_num_threads(settings.threads)
    lsa = LSAConfig(
        settings.ela_strength,
        settings.lla_strength,
        settings.ela_end,
        settings.lla_start,
        settings.accumulate,
    )
    if not settings.lr.is_dir():
        raise ValueError(f"--lr={settings.lr} is not a folder.")
    paths = sorted(path for path in settings.lr.iterdir() if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise ValueError(f"No pictures in --lr={settings.lr}.")
    name, times = Counter(path.stem for path in paths).most_common(1)[0]
    if times > 1:
        raise ValueError(f"{times} pictures in --lr={settings.lr} are called {name}. Rename all but one.")
    paths = first(paths, settings.limit)
    require_file(settings.checkpoint)
    made_with = {key: value for key, value in loop.plain(settings).items() if key not in _MAY_CHANGE}
    made_with["checkpoint"] = provenance.sha256(settings.checkpoint)
    provenance.refuse_other(settings.out, made_with)
    model = ClearSRModel.from_checkpoint(settings.checkpoint)
    # Not before the file has proved good: the claim of a run that made nothing would refuse the right command.
    provenance.claim(settings.out, made_with)
    for path in tqdm(paths, unit="picture"):
        target, source = settings.out / f"{path.stem}.png", provenance.sha256(path)
        if provenance.is_made_from(target, source):
            continue
        restored = restore(
            model,
            read_pixels(path),
            settings.seed,
            scale=settings.scale,
            steps=settings.steps,
            denoise=settings.denoise,
            lsa=lsa,
            color_fix=settings.color_fix,
        )
        write_png(to_bytes(restored[0]), target, source)


@command_line.command(command_line.GOES_ON)
def main(arguments: list[str]) -> int:
    """Run from the command line; return the exit status."""
    run(command_line.settings(RestoreSettings, arguments, __doc__))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
