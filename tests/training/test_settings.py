"""Presets and overrides: every preset builds, and a wrong setting is answered in words."""

from __future__ import annotations

from pathlib import Path

import pytest

from training import config
from training.autoencoder import AutoencoderSettings
from training.base import BaseSettings
from training.clearsr import ClearSRSettings

KINDS = {"autoencoder": AutoencoderSettings, "base": BaseSettings, "clearsr": ClearSRSettings}


@pytest.mark.parametrize("path", sorted(config.PRESET_FOLDER.glob("*.toml")), ids=lambda path: path.stem)
def test_every_preset_builds_and_names_its_command(path: Path) -> None:
    table = config.read_preset(path.stem)
    settings = config.build(KINDS[str(table.pop("stage"))], table, {"out": "runs/x"})
    assert settings.steps > 0
    assert f"--preset={path.stem}" in path.read_text(encoding="utf-8").splitlines()[0]


def test_override_wins_and_is_converted() -> None:
    settings = config.build(
        AutoencoderSettings, {"steps": 5, "learning_rate": 1}, {"out": "x", "steps": "7", "widths": "32,64"}
    )
    assert (settings.steps, settings.learning_rate, settings.widths, settings.out) == (7, 1.0, (32, 64), Path("x"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"stepz": "5"}, "Did you mean --steps"),
        ({"steps": "many"}, "--steps takes int"),
        ({}, "--out="),
    ],
)
def test_wrong_settings_are_named(overrides: dict[str, str], message: str) -> None:
    with pytest.raises(config.ConfigError, match=message):
        config.build(AutoencoderSettings, {"steps": 5, "learning_rate": 1e-3}, overrides)


def test_arguments_and_presets_speak_clearly(tmp_path: Path) -> None:
    with pytest.raises(config.ConfigError, match="--key=value"):
        config.parse_overrides(["steps", "5"])
    with pytest.raises(config.ConfigError, match="nano_autoencoder"):
        config.read_preset("nonsense")
    broken = tmp_path / "broken.toml"
    broken.write_text("steps = = 5")
    with pytest.raises(config.ConfigError, match="not valid TOML"):
        config.read_preset(str(broken))


def test_booleans() -> None:
    assert (
        config.build(ClearSRSettings, {"steps": 1, "learning_rate": 1e-3, "out": "x"}, {"use_spm": "false"}).use_spm
        is False
    )
    with pytest.raises(config.ConfigError, match="true or false"):
        config.build(ClearSRSettings, {"steps": 1, "learning_rate": 1e-3, "out": "x"}, {"use_spm": "perhaps"})


def test_choices_are_named() -> None:
    with pytest.raises(config.ConfigError, match=r"--control_time takes t or fixed, not 'sometimes'"):
        config.build(ClearSRSettings, {"steps": 1, "learning_rate": 1e-3, "out": "x"}, {"control_time": "sometimes"})
