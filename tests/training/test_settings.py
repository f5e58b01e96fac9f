"""Presets and overrides: every preset builds, and a wrong setting is answered in words."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from training import command_line, config
from training.autoencoder import AutoencoderSettings
from training.base import BaseSettings
from training.clearsr import ClearSRSettings
from training.loop import LoopSettings

KINDS = {"autoencoder": AutoencoderSettings, "base": BaseSettings, "clearsr": ClearSRSettings}


@pytest.mark.parametrize("path", sorted(config.PRESET_FOLDER.glob("*.toml")), ids=lambda path: path.stem)
def test_every_preset_builds_and_names_its_command(path: Path) -> None:
    table = config.read_preset(path.stem)
    settings = config.build(KINDS[str(table.pop("stage"))], table, {"out": "runs/x"})
    assert settings.steps > 0
    assert f"--preset={path.stem}" in path.read_text(encoding="utf-8").splitlines()[0]


def test_override_wins_and_is_converted() -> None:
    settings = config.build(
        AutoencoderSettings, {"steps": 5, "learning_rate": 1}, {"out": "x", "steps": "7", "widths": "32,64,64,64"}
    )
    assert (settings.steps, settings.learning_rate, settings.widths, settings.out) == (
        7,
        1.0,
        (32, 64, 64, 64),
        Path("x"),
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"stepz": "5"}, "Did you mean --steps"),
        ({"steps": "many"}, "--steps takes a whole number"),
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
    with pytest.raises(config.ConfigError, match=r"Did you mean smoke\?"):
        config.read_preset("smok")
    with pytest.raises(config.ConfigError, match=r"no preset nowhere\.toml"):
        config.read_preset("nowhere.toml")
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe")
    with pytest.raises(config.ConfigError, match=r"binary\.toml is not valid TOML"):
        config.read_preset(str(binary))
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


def test_the_warm_start_differs_from_the_paper_by_where_dpm_begins_and_what_it_reads() -> None:
    assert difference("paper_warm", "paper") == {
        "control_init": Path("diffbir-v2.safetensors"),
        "control_input": "lr+xt",
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


def test_a_preset_finds_the_one_beside_it(tmp_path: Path) -> None:
    """Wherever the command is given."""
    (tmp_path / "parent.toml").write_text('extends = "smoke"\nbatch = 1\n')
    (tmp_path / "child.toml").write_text('extends = "parent.toml"\n')
    assert config.read_preset(str(tmp_path / "child.toml")) == {**config.read_preset("smoke"), "batch": 1}
    (tmp_path / "loop.toml").write_text(f'extends = "../{tmp_path.name}/loop.toml"\n')
    with pytest.raises(config.ConfigError, match="extends itself"):
        config.read_preset(str(tmp_path / "loop.toml"))


def test_a_preset_without_a_stage_is_told_by_its_file(tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text("[clearsr]\nsteps = 3\n")
    with pytest.raises(config.ConfigError, match=r"own\.toml says no stage"):
        command_line.preset([f"--preset={tmp_path}/own.toml"], "")


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        (BaseSettings, {"crops": -5}, "--crops=-5: give 0 or more"),
        (BaseSettings, {"widths": (64, 96, 128, 128)}, "--widths=64,96,128,128 with --head_channels=32: 96"),
        (BaseSettings, {"head_channels": 48}, "--head_channels=48: 64"),
        (BaseSettings, {"widths": (64, 64, 128)}, "give 4 numbers"),
        (BaseSettings, {"norm_groups": 7}, "a multiple of --norm_groups=7"),
        (ClearSRSettings, {"crops": -5}, "--crops=-5: give 0 or more"),
        (ClearSRSettings, {"crops": 0, "freeze_encoders": True}, "--crops=NUMBER above 0"),
        (ClearSRSettings, {"crop": 128, "best": "niqe", "validate_every": 1}, "--best=niqe needs crops of 192"),
        (AutoencoderSettings, {"widths": (32, 32)}, "give 4 numbers"),
        (AutoencoderSettings, {"blocks": 0}, "--blocks=0: give 1 or more"),
        (AutoencoderSettings, {"discriminator_width": 0}, "--discriminator_width=0: give 1 or more"),
        (AutoencoderSettings, {"kl_weight": -1.0}, "--kl_weight=-1.0: give 0 or more"),
        (AutoencoderSettings, {"memory_gb": float("nan")}, "--memory_gb=nan: give 0 or more"),
    ],
)
def test_settings_that_no_network_can_have_are_refused_at_once(
    kind: type[LoopSettings], changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        kind(steps=1, learning_rate=1e-3, out=Path("x"), **changes)


def test_settings_are_spelled_as_a_preset_that_gives_them_back(tmp_path: Path) -> None:
    settings = ClearSRSettings(
        steps=3, learning_rate=1e-4, out=Path('C:\\runs "a"'), query_windows=(), relative_bias="none", usm=True
    )
    table = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    (tmp_path / "own.toml").write_text(config.to_toml(table), encoding="utf-8")
    assert config.build(ClearSRSettings, config.read_preset(str(tmp_path / "own.toml"))) == settings


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("steps = 1.9", "--steps takes a whole number, not 1.9"),
        ("steps = true", "--steps takes a whole number, not True"),
        ("query_windows = 8", "--query_windows takes a list, not 8"),
    ],
)
def test_a_preset_with_a_value_of_another_kind_is_refused(tmp_path: Path, text: str, said: str) -> None:
    """What TOML reads as another type is not bent into the one that is wanted."""
    (tmp_path / "own.toml").write_text(text)
    table = {"learning_rate": 1e-4, "out": "x", "steps": 1, **config.read_preset(str(tmp_path / "own.toml"))}
    with pytest.raises(config.ConfigError, match=said):
        config.build(ClearSRSettings, table)
