"""Presets and overrides: every preset builds, and a wrong setting is answered in words."""

from __future__ import annotations

import dataclasses
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


def table(name: str) -> dict[str, object]:
    return {"out": "runs/x", **config.read_preset(name)}


def difference(name: str, other: str) -> dict[str, object]:
    """Return the settings that `name` has and `other` has not, defaults included."""
    first, second = (
        config.build(ClearSRSettings, {key: value for key, value in table(preset).items() if key != "stage"})
        for preset in (name, other)
    )
    return {
        field.name: getattr(first, field.name)
        for field in dataclasses.fields(first)
        if getattr(first, field.name) != getattr(second, field.name)
    }


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("ablation_no_spm", {"use_spm": False}),
        ("ablation_no_cross_attention", {"window_attention": False}),
        ("ablation_no_windows", {"query_windows": (), "relative_bias": "none"}),
        ("ablation_no_lora", {"vae_lora": False, "unet_lora": False}),
        ("ablation_vae_lora", {"unet_lora": False}),
        ("ablation_unet_lora", {"vae_lora": False}),
    ],
)
def test_an_ablation_differs_by_its_row_of_tables_2_and_3_alone(name: str, row: dict[str, object]) -> None:
    assert difference(name, "ablation") == row


def test_the_ablations_differ_from_the_paper_by_length_and_rate_alone() -> None:
    assert difference("ablation", "paper") == {"steps": 50_000, "learning_rate": 1e-4}
    assert {path.stem for path in config.PRESET_FOLDER.glob("ablation_*.toml")} == {
        *("ablation_no_spm", "ablation_no_cross_attention", "ablation_no_windows"),
        *("ablation_no_lora", "ablation_vae_lora", "ablation_unet_lora"),
    }


def test_the_paper_preset_says_what_the_paper_says() -> None:
    """Sec. 4.1 and Appendix A."""
    paper = table("paper")
    assert (paper["steps"], paper["batch"], paper["learning_rate"], paper["crop"]) == (150_000, 8, 5e-5, 512)
    assert (paper["rank"], paper["degradation"], paper["ema"]) == (16, "paper", 0.0)


def test_a_preset_inherits_and_its_own_settings_win(tmp_path: Path) -> None:
    parent, child = tmp_path / "parent.toml", tmp_path / "child.toml"
    parent.write_text('stage = "clearsr"\nsteps = 5\nbatch = 2\n')
    child.write_text(f"extends = {str(parent)!r}\nsteps = 7\n")
    assert config.read_preset(str(child)) == {"stage": "clearsr", "steps": 7, "batch": 2}
    parent.write_text(f"extends = {str(child)!r}\n")
    with pytest.raises(config.ConfigError, match="extends itself"):
        config.read_preset(str(child))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("steps = 1.9", "--steps takes int, not 1.9"),
        ("steps = true", "--steps takes int, not True"),
        ("query_windows = 8", "--query_windows takes a list, not 8"),
    ],
)
def test_a_preset_with_a_value_of_another_kind_is_refused(tmp_path: Path, text: str, said: str) -> None:
    """What TOML reads as another type is not bent into the one that is wanted."""
    (tmp_path / "own.toml").write_text(text)
    table = {"learning_rate": 1e-4, "out": "x", "steps": 1, **config.read_preset(str(tmp_path / "own.toml"))}
    with pytest.raises(config.ConfigError, match=said):
        config.build(ClearSRSettings, table)
