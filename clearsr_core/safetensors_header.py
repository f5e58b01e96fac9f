"""The first bytes of a safetensors file: what it holds, or what the file really is if it is none."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

Shape = tuple[int, ...]

FLOATS = ("F64", "F32", "F16", "BF16")  # dtypes of weights, in the format's spelling
_MAX_HEADER = 100_000_000  # bytes, the format's own limit
# How files begin that people rename or download by mistake.
_LOOKS_LIKE = {
    b"PK\x03\x04": "a pickle of PyTorch (.pt, .pth, .ckpt, .bin) or another zip archive",
    b"\x80\x02": "a pickle of PyTorch (.pt, .pth, .ckpt)",
    b"\x80\x04": "a Python pickle",
    b"\x80\x05": "a Python pickle",
    b"version https://git-lfs": "a Git LFS pointer, the note that stands where the real file was not fetched",
    b"<": "a web page, as a download link gives that needs a login or was copied wrongly",
    b"GGUF": "a GGUF file",
    b"{": "a JSON file",
}


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message is one sentence or two for the user: what is wrong and what to do."""


@dataclass(frozen=True)
class SafetensorsHeader:
    """Metadata, and per tensor its dtype ("F32", "BF16", ...) and shape."""

    metadata: dict[str, str]
    dtypes: dict[str, str]
    shapes: dict[str, Shape]


def read_safetensors_header(path: Path, wanted: str = "the ClearSR checkpoint") -> SafetensorsHeader:
    """Read the header and check that the file holds everything that it lists; tensors are not read.

    Args:
        path: the file.
        wanted: what the user was asked for, for the message where the file is something else.

    Raises:
        CheckpointError: the file is missing, empty, something else than safetensors, or cut off.
    """
    try:
        if not path.is_file():
            raise CheckpointError(f"There is no file {path}.")
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(64)
            header_size = int.from_bytes(start[:8], "little")
            _refuse_other_formats(path, start, size, header_size, wanted)
            file.seek(8)
            header = file.read(header_size)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from error
    if len(header) < header_size:
        raise _cut_off(path, f"its header alone needs {8 + header_size} bytes", size)
    entries = _parse(path, header)
    try:
        metadata = {str(key): str(value) for key, value in dict(entries.pop("__metadata__", {})).items()}
        dtypes = {key: str(entry["dtype"]) for key, entry in entries.items()}
        shapes = {key: tuple(int(side) for side in entry["shape"]) for key, entry in entries.items()}
        end = 8 + header_size + max((int(entry["data_offsets"][1]) for entry in entries.values()), default=0)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise _damaged(path) from error
    if size < end:
        raise _cut_off(path, f"it lists {end} bytes", size)
    return SafetensorsHeader(metadata, dtypes, shapes)


def _refuse_other_formats(path: Path, start: bytes, size: int, header_size: int, wanted: str) -> None:
    """Raise for a file that is no safetensors at all, saying what it looks like."""
    if size == 0:
        raise CheckpointError(f"{path} is empty. Please download or copy it again.")
    if start[8:9] == b"{" and header_size <= _MAX_HEADER:
        return
    if size < 8 + 2:
        raise _cut_off(path, "even an empty safetensors file has 10 bytes", size)
    looks = next((kind for magic, kind in _LOOKS_LIKE.items() if start.lstrip().startswith(magic)), None)
    if looks is None:
        raise CheckpointError(f"{path} is not a safetensors file, whatever its name says. Please choose {wanted}.")
    reason = "Pickles can run code, so they are refused. " if "pickle" in looks else ""
    raise CheckpointError(
        f"{path} is not a safetensors file but looks like {looks}. {reason}Please get {wanted} itself, as .safetensors."
    )


def _parse(path: Path, header: bytes) -> dict[str, Any]:
    try:
        entries = json.loads(header)
    except ValueError as error:
        raise _damaged(path) from error
    if not isinstance(entries, dict):
        raise _damaged(path)
    return cast("dict[str, Any]", entries)


def _damaged(path: Path) -> CheckpointError:
    return CheckpointError(f"{path} has a damaged safetensors header. Please download or copy it again.")


def _cut_off(path: Path, needs: str, size: int) -> CheckpointError:
    return CheckpointError(f"{path} is cut off: {needs}, but the file has {size}. Please download or copy it again.")
