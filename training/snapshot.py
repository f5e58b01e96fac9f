"""Training state on disk: one safetensors file, written whole or not at all, that resumes a run exactly."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from clearsr_core.whole_files import replacing

FORMAT = 1
_NAME = "state_{step:08d}.safetensors"
_TABLES = ("settings", "given", "begun_from")  # of a state, in the file's metadata


class SnapshotError(ValueError):
    """A snapshot cannot be written, or does not belong to this run; the message says what to do."""


@dataclass
class TrainingState:
    """Everything that decides the rest of a run; random numbers come from (seed, step) and need no state."""

    step: int
    tensors: dict[str, Tensor]
    settings: dict[str, object]
    given: dict[str, str] = field(default_factory=dict)  # pictures and models that the run stands on -> digests
    begun_from: dict[str, str] = field(default_factory=dict)  # name, digest, ... of the first weights; empty = random

    @property
    def notes(self) -> dict[str, Any]:
        """Return what a finished file says about the run that it comes from."""
        begun_from = {"begun_from": self.begun_from} if self.begun_from else {}
        return {"step": self.step, "settings": self.settings, "given": self.given, **begun_from}


def write(folder: Path, state: TrainingState, keep: int = 2) -> Path:
    """Write `state` atomically (temporary file, fsync, rename) and keep the newest `keep` snapshots.

    Raises:
        SnapshotError: when the disk is full or the folder cannot be written; older snapshots stay intact.
    """
    target = folder / _NAME.format(step=state.step)
    metadata = {"format": str(FORMAT), "step": str(state.step)}
    metadata |= {name: json.dumps(getattr(state, name), sort_keys=True) for name in _TABLES}
    try:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.tensors.items()}
        with replacing(target) as unfinished:
            save_file(tensors, unfinished, metadata)
    except Exception as error:
        raise SnapshotError(
            f"Could not write the snapshot {target}: {error}. Earlier snapshots are intact; free some space and run "
            "the same command again to continue."
        ) from error
    for old in sorted(folder.glob("state_*.safetensors"))[:-keep]:
        old.unlink()
    return target


def keep_as_best(path: Path) -> Path:
    """Keep a snapshot under a name of its own, beyond the newest ones, in place of the best one so far."""
    target = path.with_name(path.name.replace("state_", "best_"))
    if not target.exists():
        with replacing(target) as unfinished:
            try:
                os.link(path, unfinished)  # the same bytes under two names
            except OSError:
                shutil.copyfile(path, unfinished)  # file systems without links
    for old in target.parent.glob("best_*.safetensors"):
        if old != target:
            old.unlink()
    return target


def latest(folder: Path) -> Path | None:
    """Return the newest complete snapshot of `folder`, or None."""
    return max(folder.glob("state_*.safetensors"), default=None)


def read(path: Path) -> TrainingState:
    """Read a snapshot written by `write`."""
    with _opened(path) as (file, state):
        state.tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return state


def read_notes(path: Path) -> TrainingState:
    """Read all of a snapshot but its tensors, which takes no time."""
    with _opened(path) as (_, state):
        return state


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, TrainingState]]:
    """Open a snapshot; its state has no tensors yet."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if int(metadata.get("format", 0)) != FORMAT:
                raise SnapshotError(
                    f"{path} has snapshot format {metadata.get('format')}; this version reads {FORMAT}. Go on with the "
                    "version that wrote it, or give another --out."
                )
            tables = {name: json.loads(metadata.get(name, "{}")) for name in _TABLES}
            yield file, TrainingState(int(metadata["step"]), {}, **tables)
    except SnapshotError:
        raise
    except Exception as error:
        raise SnapshotError(f"{path} cannot be read: {error}. Delete it to continue from the one before.") from error


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: dict[int, str], whole: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """Flatten the optimiser's state into named tensors.

    Args:
        optimizer: any whose state is tensors and whole numbers.
        names: id(parameter) -> its name.
        whole: puts together a tensor of which this process holds a part.
    """
    tensors: dict[str, Tensor] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            for key, value in optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{key}.{names[id(parameter)]}"] = whole(torch.as_tensor(value))
    return tensors


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    parameters: dict[str, torch.nn.Parameter],
    tensors: dict[str, Tensor],
    like: Callable[[Tensor, Tensor], Tensor],
) -> None:
    """Put back what `optimizer_tensors` flattened; `like` gives this process's part of a whole tensor."""
    for full_name, stored in tensors.items():
        kind, _, rest = full_name.partition(".")
        key, _, name = rest.partition(".")
        if kind == "optimizer" and name in parameters:
            parameter = parameters[name]
            # A whole number was a plain one: only tensors of floats or of 8-bit codes are tensors in an optimiser.
            plain = stored.ndim == 0 and not stored.is_floating_point()
            optimizer.state[parameter][key] = int(stored) if plain else like(stored.clone(), parameter)
