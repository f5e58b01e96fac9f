"""What every command of `training` has: settings as `--key=value`, `--help`, and errors that end in a sentence."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import io
import itertools
import logging
import shutil
import sys
import textwrap
import tokenize
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from . import config

log = logging.getLogger("clearsr.training")

HELP = ("--help", "-h")
STOPPED = 130  # exit status after Ctrl-C, as shells have it
GOES_ON = "Stopped. The same command goes on where this was."

Main = Callable[[list[str]], int]


def command(stopped: str = "Stopped.") -> Callable[[Main], Main]:
    """Make a function the `main` of a command: what a user can mend ends in one sentence and status 1, no traceback.

    That is every ValueError and OSError, and a loss that is not a number. All else is a fault of the program and keeps
    its traceback.

    Args:
        stopped: what to say after Ctrl-C; the status is `STOPPED`.
    """

    def decorate(main: Main) -> Main:
        @functools.wraps(main)
        def guarded(arguments: list[str]) -> int:
            logging.basicConfig(level=logging.INFO, format="%(message)s")
            try:
                return main(arguments)
            except KeyboardInterrupt:
                log.warning("%s", stopped)
                return STOPPED
            except (ValueError, FloatingPointError) as error:
                log.error("%s", error)
                return 1
            except OSError as error:
                # Some of ours have a sentence of their own; the system's have a file and two words.
                advice = "Look at the path, its permissions and the free space there."
                said = f"{error.filename}: {error.strerror}. {advice}" if error.filename else error
                log.error("%s", said)
                return 1

        return guarded

    return decorate


def settings(
    kind: type[config.Settings], arguments: list[str], about: str | None, *tables: dict[str, Any]
) -> config.Settings:
    """Make settings of `kind` from tables of defaults and the command line; `--help` shows them instead and ends.

    Args:
        kind: a dataclass; what its fields mean stands in comments at them.
        arguments: of the command line, without the name of the program.
        about: what the command does, its module's docstring.
        tables: defaults that win over those of `kind`; a later table wins over an earlier one.

    Raises:
        ConfigError: as `config.build` and `config.parse_overrides`.
        SystemExit: with status 0, after the help.
    """
    show_help(arguments, about, kind, *tables)
    return config.build(kind, *tables, config.parse_overrides(arguments))


def taken(arguments: list[str], name: str, default: str) -> tuple[str, list[str]]:
    """Return the value that `--name=value` gives, or `default`, and the arguments without it."""
    start = f"--{name}="
    values = [argument.removeprefix(start) for argument in arguments if argument.startswith(start)]
    return [default, *values][-1], [argument for argument in arguments if not argument.startswith(start)]


def preset(arguments: list[str], about: str | None, default: str = "") -> tuple[dict[str, Any], list[str]]:
    """Return the table of the preset that `--preset` names, and the other arguments; `--help` alone lists the presets.

    Raises:
        ConfigError: as `config.read_preset`.
        SystemExit: with status 0, after the list.
    """
    name, others = taken(arguments, "preset", default)
    if not name and asks_for_help(arguments):
        _end_with(f"{inspect.cleandoc(about or '')}\n\n{presets_text()}")
    if not name:
        raise config.ConfigError(
            f"Please give --preset=NAME: {', '.join(config.presets())}; or the path of a .toml file."
        )
    table = config.read_preset(name)
    if "stage" not in table:
        raise config.ConfigError(
            f"Preset {config.preset_path(name)} says no stage. Its first lines, before any [table], need "
            'stage = "autoencoder", "base" or "clearsr", or extends = "PRESET".'
        )
    return table, others


def presets_text() -> str:
    """Return every preset with what its file says about it: the command, the time it takes, the outcome."""
    lines = ["Presets; with --preset=NAME beside --help the settings of that one:"]
    for path in sorted(config.PRESET_FOLDER.glob("*.toml")):
        about = itertools.takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines())
        lines += ["", f"  {path.stem}", *(f"      {line.lstrip('# ')}" for line in about)]
    return "\n".join(lines) + "\n"


def asks_for_help(arguments: list[str]) -> bool:
    """Return whether `--help` or `-h` is among the arguments."""
    return any(argument in HELP for argument in arguments)


def show_help(arguments: list[str], about: str | None, kind: type, *tables: dict[str, Any]) -> None:
    """If `--help` is among the arguments, write what the command does and takes, and end with status 0."""
    if asks_for_help(arguments):
        width = min(shutil.get_terminal_size((100, 24)).columns, 110)
        _end_with(help_text(about or "", kind, *tables, width=width))


def _end_with(text: str) -> NoReturn:
    sys.stdout.write(text)
    raise SystemExit(0)


def help_text(about: str, kind: type, *tables: dict[str, Any], width: int = 100) -> str:
    """Return the help of a command: `about`, then every setting of dataclass `kind` with its values and its comment.

    Args:
        tables: defaults that win over those of `kind`, as of a preset; a later table wins over an earlier one.
        width: characters of a line.
    """
    given = {key: value for table in tables for key, value in table.items()}
    hints, said = get_type_hints(kind), comments(kind)
    lines = [inspect.cleandoc(about), "", "Settings, in any order:", ""]
    for field in dataclasses.fields(kind):
        default = given.get(field.name, _default(field))
        lines.append(f"  --{field.name.rstrip('_')}={_values(hints[field.name])}{_shown(default)}")
        lines += textwrap.wrap(said.get(field.name, ""), width, initial_indent=" " * 8, subsequent_indent=" " * 8)
    return "\n".join(lines) + "\n"


def comments(kind: type) -> dict[str, str]:
    """Return setting -> the comment at its line or else right above it, of a dataclass and those that it extends.

    Where an extending class only gives another default, the comment of the extended one holds.
    """
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if dataclasses.is_dataclass(base):
            source = textwrap.dedent(inspect.getsource(base))
            tokens = tokenize.generate_tokens(io.StringIO(source).readline)
            lines = {token.start[0]: token for token in tokens if token.type == tokenize.COMMENT}
            body = ast.parse(source).body[0]
            assert isinstance(body, ast.ClassDef)
            for node in body.body:
                if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                    name = node.target.id
                    found[name] = _comment(lines, node.lineno, node.end_lineno or node.lineno) or found.get(name, "")
    return found


def _comment(lines: dict[int, tokenize.TokenInfo], first: int, last: int) -> str:
    if last in lines:
        return lines[last].string.lstrip("# ")
    above: list[str] = []
    while (token := lines.get(first - 1 - len(above))) and token.line.lstrip().startswith("#"):
        above.insert(0, token.string.lstrip("# "))
    return " ".join(above)


def _default(field: dataclasses.Field[Any]) -> object:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _shown(default: object) -> str:
    if default is dataclasses.MISSING:
        return "  (needed)"
    if isinstance(default, list | tuple):
        default = ",".join(map(str, default))
    text = str(default).lower() if isinstance(default, bool) else str(default)
    return f"  ({text})" if text not in ("", ".", "nan") else ""


def _values(kind: Any) -> str:  # noqa: ANN401 - a type, or a generic alias of one
    origin = get_origin(kind)
    if origin is Literal:
        return "|".join(map(str, get_args(kind)))
    if origin is tuple:
        return f"{_values(get_args(kind)[0])},..."
    return {bool: "true|false", int: "N", float: "X", Path: "PATH"}.get(kind, "TEXT")
