"""The folder of a run: one writer at a time, the log of its steps, and the curves for TensorBoard."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

from clearsr_core.whole_files import remove_unfinished, replacing

from . import config, model_card, provenance
from .code_version import code_version
from .snapshot import SnapshotError

log = logging.getLogger("clearsr.training")

_LOCK = "run.lock"
STATS = "stats.jsonl"
SETTINGS = "settings.toml"
NOTES = "made.json"


def _take(handle: IO[str]) -> None:
    """Lock an open file, or raise OSError; the system gives it back when the process ends, however it ends."""
    if sys.platform == "win32":
        import msvcrt

        msvcrt.locking(handle.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Hold `folder` for one run.

    Raises:
        SnapshotError: another process trains into it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / _LOCK, "a", encoding="utf-8") as handle:
        try:
            _take(handle)
        except OSError as error:
            raise SnapshotError(
                f"Another run is writing to {folder}. Wait for it, stop it, or give another --out."
            ) from error
        for name in ("state_*", "best_*"):  # what only the run itself writes
            for path in remove_unfinished(folder, name):
                log.info("Removed %s, which a process that was killed had left.", path)
        yield


def write_settings(folder: Path, stage: str, settings: object) -> None:
    """Write a run's settings as a preset that begins it again, and in its comments what else decides it.

    Args:
        folder: of the run.
        stage: name of its stage, as presets have it.
        settings: a dataclass; paths are as they were given.
    """
    table = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}  # type: ignore[arg-type]
    versions = ", ".join(f"{name} {version}" for name, version in model_card.versions().items())
    lines = [
        f"# python -m training.train --preset={folder / SETTINGS}",
        f"# Begun or gone on with by version {code_version()}; {versions}.",
    ]
    preset = config.to_toml({"stage": stage, **{key: value for key, value in table.items() if value != Path()}})
    with replacing(folder / SETTINGS) as unfinished:
        unfinished.write_text("\n".join([*lines, preset]), encoding="utf-8")


def note(folder: Path, made: dict[str, Any]) -> None:
    """Write beside a result what it comes from: `snapshot.TrainingState.notes`, and the code and packages of now."""
    versions = {"code": code_version(), "versions": model_card.versions()}
    provenance.write_json(folder / NOTES, {**made, **versions}, indent=2)


class Log:
    """Appends rows to stats.jsonl, and to TensorBoard's files where wanted; does nothing for the other processes."""

    def __init__(self, folder: Path, step: int, *, tensorboard: bool, active: bool) -> None:
        self._stack = ExitStack()
        self._file: IO[str] | None = None
        self._board: Any = None  # torch's SummaryWriter, whose package is only looked for when it is wanted
        if not active:
            return
        _forget_after(folder / STATS, step)
        self._file = self._stack.enter_context((folder / STATS).open("a", encoding="utf-8"))
        if tensorboard:
            self._board = self._stack.enter_context(_summary_writer(folder / "tensorboard", step))

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def step(self, step: int, figures: dict[str, float]) -> None:
        """Write the figures of one step, six digits of each; those that are not finite are left out."""
        finite = {name: float(f"{value:.6g}") for name, value in figures.items() if math.isfinite(value)}
        self._write({"step": step, **finite}, finite, step)

    def validation(self, step: int, figures: dict[str, float]) -> None:
        """Write what a validation found."""
        finite = {name: value for name, value in figures.items() if math.isfinite(value)}
        self._write(
            {"step": step, "validation": finite}, {f"validation/{name}": value for name, value in finite.items()}, step
        )

    def _write(self, row: dict[str, object], scalars: dict[str, float], step: int) -> None:
        if self._file is not None:
            self._file.write(json.dumps(row) + "\n")
        if self._board is not None:
            for name, value in scalars.items():
                self._board.add_scalar(name, value, step)

    def flush(self) -> None:
        """Put on disk what a snapshot is about to count on."""
        if self._file is not None:
            self._file.flush()


def _summary_writer(folder: Path, step: int) -> Any:  # noqa: ANN401 - see `Log`
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(
            "--tensorboard=true needs the package tensorboard: install training/requirements.txt, or set it to false."
        ) from error
    return SummaryWriter(str(folder), purge_step=step + 1)


def rows(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's log, up to the half line that a kill, or a run that goes on, has at the end."""
    path = folder / STATS
    found: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found


def validations(folder: Path, measure: str) -> list[float]:
    """Return every value of one validation measure so far."""
    found = [row["validation"].get(measure) for row in rows(folder) if "validation" in row]
    return [value for value in found if value is not None]


def _forget_after(stats: Path, step: int) -> None:
    """Drop the rows of steps that a kill undid and that are now done again."""
    if stats.is_file():
        kept = [row for row in rows(stats.parent) if row["step"] <= step]
        with replacing(stats) as unfinished:
            unfinished.write_text("".join(f"{json.dumps(row)}\n" for row in kept), encoding="utf-8")
