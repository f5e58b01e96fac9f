"""What a run will be, before it begins: settings, data, parameters, memory, length. `--dry-run`, and on its own:

python -m training.plan --preset=NAME --data=FOLDER [--processes=4]
"""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
from pathlib import Path

import torch

from . import command_line, config, rehearsal
from .base import BaseSettings
from .batches import DataSettings
from .clearsr import ClearSRSettings
from .loop import Stage
from .picture_sources import open_source
from .stages import stage_of

log = logging.getLogger("clearsr.training")

_GIB = 2**30
# What the names of parameters begin with, and the part that these belong to.
_PARTS = {
    "model.unet.": "UNet",
    "model.vae.": "VAE",
    "model.lr_encoder.": "E', a copy of the VAE's encoder",
    "model.control.dpm.": "DPM",
    "model.control.spm.": "SPM",
    "model.image_encoder.": "image encoder",
    "model.clip.": "CLIP",
    "unet.": "UNet",
    "vae.": "VAE",
    "null_text": "empty prompt",
    "perceptual.": "EffLite",
    "model.": "autoencoder",
    "discriminator.": "discriminator",
}
_LORAS = {"model.unet.": "UNet LoRA", "model.lr_encoder.": "VAE LoRA"}


def describe(settings: DataSettings, processes: int = 1) -> str:
    """Return the plan of a run as text of several lines; nothing is written, and no picture is decoded.

    Args:
        settings: of any stage.
        processes: how many share the batch.

    Raises:
        ValueError: data, base model or settings are such that the run could not begin.
    """
    for name in ("init", "clip_vision"):
        source = getattr(settings, name, Path())
        if source != Path() and not source.exists():
            raise ValueError(f"--{name}={source} is not there.")
    stage = rehearsal.shapes_of(settings)
    needed = rehearsal.estimate(settings, processes)
    sections = {
        "Settings": [f"{name} = {_written(value)}" for name, value in _values(settings).items()],
        "Data and length": _data(settings),
        "Parameters, millions (trained, frozen)": _parameters(stage),
        f"Memory of each of {processes} processes, GiB": _memory(settings, needed, processes),
    }
    return "\n".join(line for title, lines in sections.items() for line in (title, *(f"  {line}" for line in lines)))


def _values(settings: DataSettings) -> dict[str, object]:
    return {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}


def _written(value: object) -> str:
    """Return a setting as it is given on the command line."""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    if isinstance(value, bool):
        return str(value).lower()
    return "" if value == Path() else str(value)


def _data(settings: DataSettings) -> list[str]:
    sizes = open_source(settings.data, settings.crop).sizes
    pixels = sum(height * width for height, width in sizes)
    samples, what = max(1, round(pixels / settings.crop**2)), "as many as there are pixels for"
    if isinstance(settings, BaseSettings | ClearSRSettings) and settings.crops:
        samples, what = settings.crops, "the fixed set"
    per_epoch = samples / settings.batch
    return [
        f"{len(sizes)} pictures, {pixels / 1e6:.1f} megapixels",
        f"{samples} crops of {settings.crop} pixels in an epoch ({what})",
        f"{per_epoch:.1f} steps in an epoch; {settings.steps} steps are {settings.steps / per_epoch:.1f} epochs",
    ]


def _parameters(stage: Stage) -> list[str]:
    moving = {id(parameter) for parameter in stage.trainable().values()}
    counts: dict[str, list[int]] = {}
    for name, parameter in stage.module.named_parameters():
        prefix = next(prefix for prefix in _PARTS if name.startswith(prefix))
        part = _LORAS[prefix] if ".lora_" in name else _PARTS[prefix]
        counts.setdefault(part, [0, 0])[id(parameter) not in moving] += parameter.numel()
    counts["total"] = [sum(column) for column in zip(*counts.values(), strict=True)]
    return [f"{part:32}{trained / 1e6:10.2f}{frozen / 1e6:10.2f}" for part, (trained, frozen) in counts.items()]


def _memory(settings: DataSettings, needed: rehearsal.MemoryEstimate, processes: int) -> list[str]:
    device = "main memory" if settings.device == "cpu" else "the GPU"
    rows = {
        "weights, trained and frozen": needed.weights,
        "gradients, at the peak": needed.gradients,
        "optimiser": needed.optimizer,
        "averaged weights": needed.averaged,
        "batch": needed.batch,
        "activations and temporaries, at the peak": needed.activations,
        "the process beside its tensors": needed.rest,
        f"sum, on {device}": needed.total,
    }
    decoded = sum(3 * height * width for height, width in open_source(settings.data, settings.crop).sizes)
    kept = min(decoded, int(settings.memory_gb * 1e9)) + 2 * settings.workers * needed.batch
    if isinstance(settings, BaseSettings | ClearSRSettings):
        kept += settings.crops * 4 * (settings.crop // 8) ** 2 * 4
    rows["decoded pictures, latents and coming batches, in main memory"] = kept
    lines = [f"{name:62}{size / _GIB:8.2f}" for name, size in rows.items()]
    lines.append(f"{needed.operations / 1e12:.1f} TFLOP in a step of {settings.batch // processes} samples")
    return lines


@command_line.command()
def main(arguments: list[str]) -> int:
    """Print the plan of the run that the same arguments would begin; return the exit status."""
    processes, others = command_line.taken(arguments, "processes", os.environ.get("WORLD_SIZE", "1"))
    preset, others = command_line.preset(others, __doc__)
    kind, _ = stage_of(str(preset.pop("stage", "")))
    settings = command_line.settings(kind, others, __doc__, {"out": "runs/plan"}, preset)
    assert isinstance(settings, DataSettings)
    with torch.random.fork_rng(devices=[]):
        if not processes.isdecimal() or int(processes) < 1:
            raise config.ConfigError(f"--processes={processes}: give a number from 1 on.")
        log.info("%s", describe(settings, int(processes)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
