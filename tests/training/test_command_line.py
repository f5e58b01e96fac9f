"""`--help` of every command: what it does, and every setting with its values, its default and what it means."""

from __future__ import annotations

import dataclasses
import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from clearsr_core.safetensors_header import CheckpointError
from training import command_line, config
from training.baselines import BaselineMissingError
from training.learned_metrics import LearnedMetricMissingError
from training.snapshot import SnapshotError

COMMANDS = sorted(
    path.stem
    for path in Path(command_line.__file__).parent.glob("*.py")
    if path.stem != "command_line" and "command_line.settings(" in path.read_text(encoding="utf-8")
)


@dataclass(frozen=True)
class Extended:
    """Settings that others extend."""

    steps: int  # of the sampler
    # how far it goes,
    # in shares of the way
    share: float = 0.5


@dataclass(frozen=True)
class Example(Extended):
    """Settings of every kind."""

    share: float = 0.25
    folder: Path = Path()  # empty = none
    way: Literal["fast", "slow"] = "slow"  # how
    sides: tuple[int, ...] = (8, 4)  # in pixels
    sure: bool = True  # whether


def settings_without_comment(kind: type) -> list[str]:
    said = command_line.comments(kind)
    return [field.name for field in dataclasses.fields(kind) if not said.get(field.name)]


def test_help_shows_values_defaults_and_comments() -> None:
    text = command_line.help_text("Does a thing.", Example, {"sure": False})
    assert text.splitlines() == [
        "Does a thing.",
        "",
        "Settings, in any order:",
        "",
        "  --steps=N  (needed)",
        "        of the sampler",
        "  --share=X  (0.25)",
        "        how far it goes, in shares of the way",
        "  --folder=PATH",
        "        empty = none",
        "  --way=fast|slow  (slow)",
        "        how",
        "  --sides=N,...  (8,4)",
        "        in pixels",
        "  --sure=true|false  (false)",
        "        whether",
    ]


def test_long_comments_are_wrapped() -> None:
    assert max(map(len, command_line.help_text("", Example, width=30).splitlines())) <= 30


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("asked", command_line.HELP)
def test_every_command_explains_itself(name: str, asked: str, capsys: pytest.CaptureFixture[str]) -> None:
    module = importlib.import_module(f"training.{name}")
    with pytest.raises(SystemExit) as ended:
        module.main([asked])
    shown = capsys.readouterr().out
    assert ended.value.code == 0
    assert shown.startswith((module.__doc__ or "").splitlines()[0])
    assert "Settings, in any order:" in shown or "Presets;" in shown


def test_every_setting_of_every_command_has_a_comment() -> None:
    kinds = {
        kind
        for name in [*COMMANDS, "autoencoder", "base", "clearsr"]
        for kind in vars(importlib.import_module(f"training.{name}")).values()
        if isinstance(kind, type) and dataclasses.is_dataclass(kind) and kind.__name__.endswith("Settings")
        and kind.__name__ not in ("StageSettings", "DegradationSettings")  # fixed in code, not set on a command line
    }  # fmt: skip
    assert {"ClearSRSettings", "RestoreSettings"} <= {kind.__name__ for kind in kinds}
    missing = {kind.__name__: settings_without_comment(kind) for kind in kinds}
    assert {name: fields for name, fields in missing.items() if fields} == {}


def test_help_without_a_preset_lists_the_presets(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command_line.preset(["--help"], "Trains.")
    shown = capsys.readouterr().out
    for path in config.PRESET_FOLDER.glob("*.toml"):
        assert f"\n  {path.stem}\n" in shown
        assert f"--preset={path.stem}" in shown


def test_help_beside_a_preset_shows_its_values(capsys: pytest.CaptureFixture[str]) -> None:
    from training import train

    with pytest.raises(SystemExit):
        train.main(["--preset=paper", "--help"])
    shown = capsys.readouterr().out
    assert "  --steps=N  (150000)\n" in shown
    assert "  --crop=N  (512)\n" in shown


def test_the_last_value_is_taken() -> None:
    assert command_line.taken(["--a=1", "--b=2", "--a=3"], "a", "0") == ("3", ["--b=2"])
    assert command_line.taken(["--b=2"], "a", "0") == ("0", ["--b=2"])


def test_commands_are_found() -> None:
    assert {"train", "plan", "reproduce", "restore", "export"} <= set(COMMANDS)


ERRORS = [
    config.ConfigError("--steps=x: give a number."),
    CheckpointError("v1.safetensors is cut off."),
    SnapshotError("runs/a holds no snapshot."),
    BaselineMissingError("Real-ESRGAN is not installed."),
    LearnedMetricMissingError("musiq is not installed."),
    FloatingPointError("The loss is not a number at step 3."),
    PermissionError(13, "Permission denied", "runs/a"),
]


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("error", [*ERRORS, KeyboardInterrupt()], ids=lambda error: type(error).__name__)
def test_every_command_ends_in_a_sentence(
    name: str, error: BaseException, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_arguments: object) -> None:
        raise error

    monkeypatch.setattr(command_line, "settings", fails)
    monkeypatch.setattr(command_line, "preset", fails)

    status = importlib.import_module(f"training.{name}").main([])

    interrupted = isinstance(error, KeyboardInterrupt)
    assert status == (130 if interrupted else 1)
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 1
    if isinstance(error, OSError):
        assert told[0] == "runs/a: Permission denied. Look at the path, its permissions and the free space there."
    else:
        assert told[0].startswith("Stopped") if interrupted else told[0] == str(error)


def test_what_is_wrong_in_the_program_itself_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_arguments: object) -> None:
        raise KeyError("up_blocks.0")

    monkeypatch.setattr(command_line, "settings", fails)
    with pytest.raises(KeyError, match="up_blocks"):
        importlib.import_module("training.restore").main([])
