"""Command line of every training stage: `python -m training.train --preset=NAME --data=FOLDER --out=FOLDER`."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

if not __package__:  # `accelerate launch training/train.py` runs this file as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    __package__ = "training"

from . import config, loop
from .snapshot import SnapshotError

log = logging.getLogger("clearsr.training")


def _stage(name: str, preset: dict[str, object], overrides: dict[str, str]) -> tuple[loop.Stage, loop.LoopSettings]:
    """Build the settings and the stage that a preset names."""
    if name == "autoencoder":
        from .autoencoder import AutoencoderSettings, AutoencoderStage

        settings = config.build(AutoencoderSettings, preset, overrides)
        return AutoencoderStage(settings), settings
    if name == "base":
        from .base import BaseSettings, BaseStage

        settings = config.build(BaseSettings, preset, overrides)
        return BaseStage(settings), settings
    if name == "clearsr":
        from .clearsr import ClearSRSettings, ClearSRStage

        settings = config.build(ClearSRSettings, preset, overrides)
        return ClearSRStage(settings), settings
    raise config.ConfigError(f"Unknown stage {name!r}: autoencoder, base or clearsr.")


def main(arguments: list[str]) -> int:
    """Run one stage; return the exit status."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        overrides = config.parse_overrides(arguments)
        preset = config.read_preset(overrides.pop("preset", ""))
        stage, settings = _stage(str(preset.pop("stage", "")), preset, overrides)
        finished = loop.run(stage, settings, loop.plain(settings))
    except (config.ConfigError, SnapshotError, FloatingPointError, ValueError) as error:
        log.error("%s", error)
        return 1
    return 0 if finished else 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
