"""The one file format of ClearSR: a safetensors file with its configuration as metadata (see docs/CHECKPOINT.md).

Keys are "<part>.<weight>", or "<part>" for a part that is one tensor. Everything is checked before it is handed out.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor

from .config import ClearSRConfig
from .safetensors_header import FLOATS, CheckpointError, SafetensorsHeader, Shape, read_safetensors_header
from .shapes import ANY, checkpoint_shapes
from .whole_files import replacing

FORMAT = 1
_AT_ONCE = 64  # tensors that are compared before the file is closed and opened again
PARTS = (
    "dpm",
    "spm",
    "unet_lora",
    "vae_lora",
    "null_text",
    "image_encoder",
    "image_projection",
    "base.unet",
    "base.vae",
)

__all__ = ["FORMAT", "PARTS", "Checkpoint", "CheckpointError", "Header", "read", "read_header", "verify", "write"]


@dataclass(frozen=True)
class Header:
    """What a checkpoint says about itself."""

    config: ClearSRConfig
    training: dict[str, Any]  # how it was made: steps, data, commit, metrics; for people, nothing depends on it


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint in memory."""

    config: ClearSRConfig
    training: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]]  # part -> weight -> tensor; "null_text" -> {"": (n, context_dim)}


def read_header(path: str | os.PathLike[str]) -> Header:
    """Read configuration and training notes, and check format, keys and shapes; no tensor is read.

    Raises:
        CheckpointError: with the reason, what was expected, and what to do.
    """
    header, _ = _read_checked(Path(path))
    return header


def read(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a checkpoint to the CPU, in the dtypes of the file.

    Raises:
        CheckpointError: as `read_header`, and for weights that are not finite numbers.
    """
    path = Path(path)
    header, raw = _read_checked(path)
    tensors: dict[str, dict[str, Tensor]] = {}
    for key, value in _tensors(path, raw.shapes).items():
        part, name = _split(key)
        tensors.setdefault(part, {})[name] = value
    _check_finite(str(path), tensors)
    return Checkpoint(header.config, header.training, tensors)


def write(path: str | os.PathLike[str], checkpoint: Checkpoint) -> None:
    """Write a checkpoint; the file appears whole or not at all, and only if `read` will accept it.

    Raises:
        CheckpointError: the tensors are not those that the configuration asks for, or not finite.
    """
    path = Path(path)
    owner = f"The checkpoint for {path}"
    shapes = {part: {k: tuple(t.shape) for k, t in weights.items()} for part, weights in checkpoint.tensors.items()}
    _check_shapes(owner, checkpoint.config, shapes)
    _check_finite(owner, checkpoint.tensors)
    flat = {
        _join(part, name): _standalone(tensor)
        for part, weights in checkpoint.tensors.items()
        for name, tensor in weights.items()
    }
    metadata = {
        "clearsr.format": str(FORMAT),
        "clearsr.config": json.dumps(checkpoint.config.to_dict()),
        "clearsr.training": json.dumps(checkpoint.training),
        "format": "pt",
    }
    try:
        with replacing(path) as unfinished:
            save_file(flat, unfinished, metadata=metadata)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path.parent} cannot take a checkpoint ({error}). Free some space, or choose another folder; a file that "
            "was there before is as it was."
        ) from error


def verify(path: Path, meant: Checkpoint, target: Path) -> None:
    """Compare a written file with the intended checkpoint: configuration, notes and every number, bit for bit.

    Few tensors are read at a time, so that a large file needs little memory.

    Args:
        path: the file, under a temporary name.
        meant: what was written.
        target: the name that it is to get, for messages.

    Raises:
        CheckpointError: something differs; the message says what.
    """
    header, raw = _read_checked(path)
    differing = [name for name in ("config", "training") if getattr(header, name) != getattr(meant, name)]
    wanted = {_join(part, name): value for part, table in meant.tensors.items() for name, value in table.items()}
    differing += sorted(raw.shapes.keys() ^ wanted.keys())
    both = sorted(raw.shapes.keys() & wanted.keys())
    for start in range(0, len(both), _AT_ONCE):
        keys = both[start : start + _AT_ONCE]
        for key, found in _tensors(path, keys).items():
            if found.dtype != wanted[key].dtype or not torch.equal(found, wanted[key].cpu()):
                differing.append(key)
    if differing:
        raise CheckpointError(
            f"{target} reads back other than it was written ({', '.join(differing[:3])}; {len(differing)} in all) and "
            "was not put in place. The disk may be damaged: please export to another one."
        )


def _tensors(path: Path, keys: Iterable[str]) -> dict[str, Tensor]:
    """Read tensors by their keys to the CPU; what they are mapped into is given back with the last of them."""
    try:
        with cast("Any", safe_open)(path, framework="pt", device="cpu") as file:
            return {key: file.get_tensor(key) for key in keys}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged ({error}). Please download or copy it again.") from error


def _read_checked(path: Path) -> tuple[Header, SafetensorsHeader]:
    raw = read_safetensors_header(path)
    _check_format(path, raw)
    try:
        table = json.loads(raw.metadata["clearsr.config"])
        training = json.loads(raw.metadata.get("clearsr.training", "{}"))
        if not isinstance(table, dict) or not isinstance(training, dict):
            raise TypeError("clearsr.config and clearsr.training must be JSON objects")
        config = ClearSRConfig.from_dict(cast("dict[str, Any]", table))
    except (KeyError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{path} has a configuration that cannot be used ({error}). Please export or download it again."
        ) from error
    shapes: dict[str, dict[str, Shape]] = {}
    for key, shape in raw.shapes.items():
        part, name = _split(key)
        shapes.setdefault(part, {})[name] = shape
    _check_shapes(str(path), config, shapes)
    for key, dtype in raw.dtypes.items():
        if dtype not in FLOATS:
            raise CheckpointError(
                f"{path} holds {key} as {dtype}; ClearSR reads {', '.join(FLOATS)}. "
                "Please export it again as one of these."
            )
    return Header(config, cast("dict[str, Any]", training)), raw


def _check_format(path: Path, raw: SafetensorsHeader) -> None:
    """Refuse safetensors files that are not ours, or of a format that this version does not know."""
    found = raw.metadata.get("clearsr.format")
    if found is None:
        diffusion = any(key.startswith(("model.diffusion_model.", "first_stage_model.")) for key in raw.shapes)
        kind = "a Stable Diffusion checkpoint: open it with Load Checkpoint instead" if diffusion else "something else"
        raise CheckpointError(
            f"{path} is a safetensors file but no ClearSR checkpoint (its metadata has no clearsr.format); "
            f"it looks like {kind}. Please choose a file that ClearSR's training exported."
        )
    if not found.isdecimal() or int(found) < 1:
        raise CheckpointError(f"{path} has the checkpoint format {found!r}; expected {FORMAT}. Please export it again.")
    if int(found) > FORMAT:
        raise CheckpointError(
            f"{path} has the checkpoint format {found}; this version of ClearSR reads up to {FORMAT}. "
            "Please update ClearSR."
        )


def _check_shapes(owner: str, config: ClearSRConfig, found: Mapping[str, Mapping[str, Shape]]) -> None:
    """Compare keys and shapes with what the configuration implies."""
    expected = checkpoint_shapes(config)
    expected_keys = {_join(part, name): shape for part, weights in expected.items() for name, shape in weights.items()}
    found_keys = {_join(part, name): shape for part, weights in found.items() for name, shape in weights.items()}
    missing = [key for key in expected_keys if key not in found_keys]
    if missing:
        raise CheckpointError(
            f"{owner} lacks {len(missing)} of the {len(expected_keys)} weights that its configuration asks for "
            f"({_some(missing)}). Please export or download it again."
        )
    extra = [key for key in found_keys if key not in expected_keys]
    if extra:
        raise CheckpointError(
            f"{owner} holds {len(extra)} weights that its configuration does not know ({_some(extra)}); "
            "configuration and weights are of different models. Please export it again."
        )
    for key, shape in expected_keys.items():
        if not _fits(found_keys[key], shape):
            wanted = str(shape).replace(str(ANY), "any")
            raise CheckpointError(
                f"{owner} holds {key} with the shape {found_keys[key]}; its configuration asks for {wanted}. "
                "Please export it again with the configuration that it was trained with."
            )


def _check_finite(owner: str, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
    bad = [_join(p, name) for p, weights in tensors.items() for name, t in weights.items() if not t.isfinite().all()]
    if bad:
        raise CheckpointError(
            f"{owner} holds NaN or infinite numbers in {len(bad)} weights ({_some(bad)}): the training that made it "
            "diverged or the file is damaged. Please use an earlier snapshot or download it again."
        )


def _fits(found: Shape, expected: Shape) -> bool:
    """Compare shapes; ANY stands for one or more."""
    if len(found) != len(expected):
        return False
    return all(side == wanted or (wanted == ANY and side >= 1) for side, wanted in zip(found, expected, strict=True))


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")


def _split(key: str) -> tuple[str, str]:
    """Turn a key of the file into (part, weight); what belongs to no part becomes a part of its own."""
    part = next((part for part in PARTS if key.startswith(f"{part}.")), None)
    return (key, "") if part is None else (part, key[len(part) + 1 :])


def _join(part: str, name: str) -> str:
    return f"{part}.{name}" if name else part


def _standalone(tensor: Tensor) -> Tensor:
    """Return the tensor on the CPU in a storage of its own size, as the format needs it."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
