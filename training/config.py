"""Settings of a training run: a TOML preset, then `--key=value` overrides, checked before anything is allocated."""

from __future__ import annotations

import dataclasses
import difflib
import json
import keyword
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_type_hints

import tomllib

PRESET_FOLDER = Path(__file__).parent / "presets"
_KINDS = {int: "a whole number", float: "a number", Path: "a path"}  # in messages

Settings = TypeVar("Settings")
_Item = TypeVar("_Item")


class ConfigError(ValueError):
    """A setting is unknown, has the wrong type or contradicts another; the message says which and what to do."""


def presets() -> list[str]:
    """Return the names of the presets that come along."""
    return sorted(path.stem for path in PRESET_FOLDER.glob("*.toml"))


def read_preset(name: str) -> dict[str, Any]:
    """Return the table of a preset: a name in `training/presets`, or the path of a TOML file.

    With `extends = "OTHER"` the table is that of the preset OTHER, and the file's own settings win over it. A path
    there is seen from the folder of the file that names it.

    Raises:
        ConfigError: there is no such preset, it is no TOML, or it extends itself.
    """
    table: dict[str, Any] = {}
    seen: list[Path] = []
    path = preset_path(name)
    while path.resolve() not in seen:
        seen.append(path.resolve())
        own = _read_toml(path)
        parent = own.pop("extends", None)
        table = {**own, **table}
        if parent is None:
            return table
        path = preset_path(str(parent), path.parent)
    raise ConfigError(f"Preset {name!r} extends itself: {' -> '.join(each.stem for each in (*seen, path))}.")


def preset_path(name: str, beside: Path = Path()) -> Path:
    """Return the file of a preset: of a name in `training/presets`, or a path that ends in .toml, seen from `beside`.

    Raises:
        ConfigError: there is no such file.
    """
    path = beside / name if name.endswith(".toml") else PRESET_FOLDER / f"{name}.toml"
    if path.is_file():
        return path
    known = ", ".join(presets())
    if name.endswith(".toml"):
        raise ConfigError(f"There is no preset {path}. Give the path of a .toml file, or one of: {known}.")
    nearest = difflib.get_close_matches(name, presets(), n=1)
    suggestion = f"Did you mean {nearest[0]}? " if nearest else ""
    raise ConfigError(f"No preset {name!r}. {suggestion}Presets here: {known}; or give the path of a .toml file.")


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"Preset {path} is not valid TOML: {error}.") from error


def to_toml(table: Mapping[str, object]) -> str:
    """Return settings as the lines of a preset; paths and tuples are spelled as `build` takes them back."""
    return "".join(f"{key} = {_spelled(value)}\n" for key, value in table.items())


def _spelled(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{', '.join(_spelled(item) for item in cast('Sequence[object]', value))}]"
    # A basic string of TOML is a string of JSON.
    return json.dumps(str(value), ensure_ascii=False) if isinstance(value, str | Path) else str(value)


def parse_overrides(arguments: list[str]) -> dict[str, str]:
    """Turn `["--steps=100", "--data=photos"]` into a table of strings, keeping the order given."""
    overrides: dict[str, str] = {}
    for argument in arguments:
        key, separator, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or not separator:
            raise ConfigError(f"Cannot read {argument!r}: settings are written --key=value, and --help lists them.")
        key = key.replace("-", "_")
        overrides[f"{key}_" if keyword.iskeyword(key) else key] = value
    return overrides


def _convert(key: str, value: object, kind: Any) -> object:  # noqa: ANN401 - a type, or a generic alias of one
    """Give `value` (from TOML or the command line) the type that the setting declares."""
    if kind is bool:
        if isinstance(value, bool):
            return value
        if str(value).lower() in ("true", "yes", "1", "on"):
            return True
        if str(value).lower() in ("false", "no", "0", "off"):
            return False
        raise ConfigError(f"--{key} takes true or false, not {value!r}.")
    origin = getattr(kind, "__origin__", None)
    if origin is Literal:
        if value in kind.__args__:
            return value
        raise ConfigError(f"--{key} takes {' or '.join(map(str, kind.__args__))}, not {value!r}.")
    if origin is tuple:
        if isinstance(value, str):
            value = [item for item in value.split(",") if item]
        if not isinstance(value, list | tuple):
            raise ConfigError(f"--{key} takes a list, not {value!r}.")
        items = cast("list[object]", value)
        item_kind = kind.__args__[0]
        return tuple(_convert(key, item, item_kind) for item in items)
    if kind in (int, float) and (isinstance(value, bool) or (kind is int and isinstance(value, float) and value % 1)):
        raise ConfigError(f"--{key} takes {_KINDS.get(kind, kind.__name__)}, not {value!r}.")
    try:
        return kind(cast("Any", value))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"--{key} takes {_KINDS.get(kind, kind.__name__)}, not {value!r}.") from error


def build(kind: type[Settings], *tables: dict[str, Any]) -> Settings:
    """Make settings of dataclass `kind` from tables; a later table wins over an earlier one.

    Raises:
        ConfigError: for an unknown key (names the nearest one), a value of the wrong type, a missing required key.
    """
    hints = get_type_hints(kind)
    merged: dict[str, Any] = {}
    for table in tables:
        for key, value in table.items():
            if key not in hints:
                nearest = difflib.get_close_matches(key, hints, n=1)
                suggestion = f" Did you mean --{nearest[0]}?" if nearest else f" Known: {', '.join(sorted(hints))}."
                raise ConfigError(f"Unknown setting --{key} for {kind.__name__}.{suggestion}")
            merged[key] = _convert(key.rstrip("_"), value, hints[key])
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]
    missing = [
        field.name
        for field in fields
        if field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
        and field.name not in merged
    ]
    if missing:
        raise ConfigError("Please give " + ", ".join(f"--{name}=..." for name in missing) + ".")
    return kind(**merged)


def first(items: Sequence[_Item], limit: int) -> Sequence[_Item]:
    """Return what `--limit` leaves of `items`: the first of them, or all where it is 0.

    Raises:
        ConfigError: it is negative.
    """
    if limit < 0:
        raise ConfigError(f"--limit={limit}: give the number of pictures to take, or 0 for all.")
    return items[: limit or None]
