"""The three stages of training, by the name that presets give them."""

from __future__ import annotations

from collections.abc import Callable

from . import config, loop


def stage_of(name: str) -> tuple[type[loop.LoopSettings], Callable[..., loop.Stage]]:
    """Return the settings and the stage that a preset names; a stage's libraries are imported with it."""
    if name == "autoencoder":
        from .autoencoder import AutoencoderSettings, AutoencoderStage

        return AutoencoderSettings, AutoencoderStage
    if name == "base":
        from .base import BaseSettings, BaseStage

        return BaseSettings, BaseStage
    if name == "clearsr":
        from .clearsr import ClearSRSettings, ClearSRStage

        return ClearSRSettings, ClearSRStage
    raise config.ConfigError(f"Unknown stage {name!r}: autoencoder, base or clearsr.")
