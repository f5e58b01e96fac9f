"""Measured values as small JSON files, with what they were made with."""

from __future__ import annotations

import datetime
import json
import logging
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import tomllib
import torch

from clearsr_core.whole_files import replacing

from .. import model_card
from ..provenance import sha256
from ..tables import EvaluationError, Results

log = logging.getLogger("clearsr.training")

HELD_OUT, TUNING, PHOTOGRAPHS = "held_out", "tuning", "photographs"
SPLITS = (HELD_OUT, PHOTOGRAPHS, TUNING)  # the document shows the first of them that has results
DIGITS = 5  # behind the point, of every value


@dataclass(frozen=True)
class Made:
    """What decides the values, and what is good to know about them."""

    checkpoint: str  # name of the file
    sha256: str  # of the file
    settings: dict[str, Any]
    budget: str
    date: str  # of the day, ISO 8601
    hardware: str
    versions: dict[str, str]


@dataclass(frozen=True)
class Stored:
    """The result of one experiment on one split."""

    experiment: str
    split: str
    made: Made
    seeds: tuple[int, ...]  # of each entry of `runs`
    runs: tuple[Results, ...]  # one, or one for each training seed: method -> measure -> picture -> value
    curves: dict[str, dict[str, list[list[float]]]] = field(default_factory=dict)  # panel -> curve -> (x, y)
    notes: tuple[str, ...] = ()

    @property
    def pictures(self) -> list[str]:
        """Return the names of the pictures, in order."""
        found = {name for table in self.runs[0].values() for values in table.values() for name in values}
        return sorted(found)

    def differences(self, measure: str, method: str, against: str) -> list[dict[str, float]] | None:
        """Return for each run picture -> difference of two methods; None if a method was not run."""
        if any(measure not in run.get(side, {}) for run in self.runs for side in (method, against)):
            return None
        tables = [(run[method][measure], run[against][measure]) for run in self.runs]
        return [{name: ours[name] - other[name] for name in ours if name in other} for ours, other in tables]


def made_with(checkpoint: Path, settings: dict[str, Any], budget: str) -> Made:
    """Describe a run that ends now."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))
    return Made(
        checkpoint.name,
        sha256(checkpoint),
        settings,
        budget,
        datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        model_card.hardware(torch.device("cpu")),
        {"clearsr": project["project"]["version"], **model_card.versions()},
    )


def _shortened(value: Any) -> Any:  # noqa: ANN401 - a tree of what JSON holds
    """Round every number of a tree; JSON has no NaN and no infinity, so these become null."""
    if isinstance(value, dict):
        return {key: _shortened(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_shortened(item) for item in value]
    if isinstance(value, float):
        return round(value, DIGITS) if math.isfinite(value) else None
    return value


def path_of(folder: Path, experiment: str, split: str) -> Path:
    """Return where a result lies."""
    return folder / f"{experiment}.{split}.json"


def write(folder: Path, stored: Stored) -> Path:
    """Write a result; the one of the same experiment and split is replaced."""
    table = asdict(stored)
    table["made"]["settings"] = json.loads(json.dumps(stored.made.settings))
    for key in ("runs", "curves"):
        table[key] = _shortened(table[key])
    path = path_of(folder, stored.experiment, stored.split)
    with replacing(path) as unfinished:
        unfinished.write_text(_compact(table) + "\n", encoding="utf-8")
    return path


def _compact(table: dict[str, Any]) -> str:
    """Return JSON with one line for each leaf table, so that a difference between two versions can be read."""

    def lines(value: Any, indent: str) -> str:  # noqa: ANN401 - a tree of what JSON holds
        branches = isinstance(value, dict) and any(isinstance(item, dict | list) for item in value.values())
        if branches or (isinstance(value, list) and any(isinstance(item, dict) for item in value)):
            inner = indent + "  "
            pairs = value.items() if isinstance(value, dict) else [("", item) for item in value]
            rows = [f"{inner}{json.dumps(key) + ': ' if key else ''}{lines(item, inner)}" for key, item in pairs]
            opening, closing = "{}" if isinstance(value, dict) else "[]"
            return f"{opening}\n" + ",\n".join(rows) + f"\n{indent}{closing}"
        return json.dumps(value, ensure_ascii=False)

    return lines(table, "")


def read(path: Path) -> Stored:
    """Read a result.

    Raises:
        EvaluationError: the file is no result.
    """
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        runs = tuple(
            {
                method: {
                    key: {name: math.nan if value is None else float(value) for name, value in values.items()}
                    for key, values in measures.items()
                }
                for method, measures in run.items()
            }
            for run in table["runs"]
        )
        made = Made(**table["made"])
        return Stored(
            table["experiment"],
            table["split"],
            made,
            tuple(table["seeds"]),
            runs,
            table["curves"],
            tuple(table["notes"]),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise EvaluationError(f"{path} is no result of training.reproduce ({error}).") from error


def seeds_of(
    folder: Path, experiment: str, split: str, checkpoint: str, settings: dict[str, Any], pictures: list[str]
) -> dict[int, Results]:
    """Return seed -> values of the trainings that a stored result already holds.

    Args:
        folder: of the results.
        experiment: its name.
        split: its pictures.
        checkpoint: SHA-256 of the file that has to be the base.
        settings: what it has to be made with.
        pictures: names of all that have to be measured, in order.

    A result made with anything else is named in a warning.
    """
    path = path_of(folder, experiment, split)
    if not path.is_file():
        return {}
    stored = read(path)
    other = {
        "checkpoint": stored.made.sha256 != checkpoint,
        "settings": stored.made.settings != settings,
        "pictures": stored.pictures != pictures,
    }
    if any(other.values()):
        differs = ", ".join(name for name, changed in other.items() if changed)
        log.warning("%s is of another %s: none of its seeds is taken, and a new result replaces it.", path, differs)
        return {}
    return dict(zip(stored.seeds, stored.runs, strict=True))


def shown(folder: Path, experiment: str) -> Stored | None:
    """Return the result that the document shows: held out before tuning; None if there is none."""
    for split in SPLITS:
        path = path_of(folder, experiment, split)
        if path.is_file():
            return read(path)
    return None
