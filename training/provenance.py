"""Folders say what their content was made with, so that results of two settings are never taken for one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import PngImagePlugin

from clearsr_core.whole_files import replacing

NAME = "made_with.json"
MADE_FROM = "made-from"  # PNG text of a picture that is kept: SHA-256 of the file that it was made from


class OtherSettingsError(ValueError):
    """A folder holds what was made with other settings; the message says which differ, and what to do."""


def claim(folder: Path, made_with: dict[str, Any]) -> None:
    """Note in `folder` what its content is made with; refuse to go on with what was made otherwise.

    Args:
        folder: made where there is none.
        made_with: everything that decides the content, as JSON can hold it.

    Raises:
        OtherSettingsError: as `refuse_other`.
    """
    refuse_other(folder, made_with)
    write_json(folder / NAME, made_with, indent=2)


def refuse_other(folder: Path, made_with: dict[str, Any]) -> None:
    """Refuse to go on with what was made otherwise, as `claim`, but note nothing: for what can still fail at its start.

    Raises:
        OtherSettingsError: the folder's note differs, or cannot be read.
    """
    made_with = json.loads(json.dumps(made_with))
    path = folder / NAME
    if path.is_file():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
            changed = sorted(key for key in made_with.keys() | before.keys() if made_with.get(key) != before.get(key))
        except (ValueError, AttributeError) as error:
            raise OtherSettingsError(f"{path} cannot be read: give another folder, or delete this one.") from error
        if changed:
            raise OtherSettingsError(
                f"{folder} holds what was made with another {', '.join(changed)}: give another folder, or delete it."
            )


def is_made_from(picture: Path, source: str) -> bool:
    """Return whether there is a picture that says it was made from the file of SHA-256 `source`.

    One that says nothing, as all made before pictures said so, counts as made from another file.
    """
    try:
        with PngImagePlugin.PngImageFile(picture) as kept:  # Image.open refuses results that are very large
            return kept.info.get(MADE_FROM) == source
    except (OSError, SyntaxError, ValueError):  # not there, or damaged: SyntaxError is of broken PNGs
        return False


def write_json(path: Path, content: object, indent: int | None = None) -> None:
    """Write JSON so that a stop leaves the file before it or the new one, never a half."""
    with replacing(path) as unfinished:
        unfinished.write_text(json.dumps(content, indent=indent) + "\n", encoding="utf-8")


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(content: object) -> str:
    """Return the SHA-256 of what JSON can hold, in hexadecimal."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def file_record(path: Path) -> dict[str, str]:
    """Return what a result says about a file that it is of: name and SHA-256, not the place on this machine."""
    return {"file": path.name, "sha256": sha256(path)}


def pictures_record(paths: Iterable[Path]) -> dict[str, Any]:
    """Return what a result says about its pictures: names of their folder and files, one SHA-256 of all the files.

    Args:
        paths: one or more files of one folder, in the order in which they are used.
    """
    paths = list(paths)
    contents = digest([[path.name, sha256(path)] for path in paths])
    return {"folder": paths[0].parent.resolve().name, "files": [path.name for path in paths], "sha256": contents}


def identity(settings: Any) -> Any:  # noqa: ANN401 - a tree of what JSON holds
    """Return settings with the SHA-256 alone in the place of each record: a renamed folder holds the same pictures."""
    if not isinstance(settings, dict):
        return settings
    return settings.get("sha256") or {key: identity(value) for key, value in settings.items()}
