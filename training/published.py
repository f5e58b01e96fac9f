"""Published values beside our own: read from `data/published.toml`, and always marked as not measured here."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomllib

from .config import ConfigError
from .tables import DIGITS, REFERENCE, TITLES, Summary, aligned, title

TABLE = Path(__file__).parent / "data" / "published.toml"


@dataclass(frozen=True)
class Row:
    """What somebody has printed about one method."""

    method: str
    source: str
    values: dict[str, float]  # measure -> mean over the data set


@dataclass(frozen=True)
class DataSet:
    """Every published row on one data set."""

    title: str
    pictures: int
    rows: tuple[Row, ...]

    def row(self, method: str) -> Row | None:
        """Return the row of a method of ours, whose name may be spelt otherwise: osediff is OSEDiff."""
        return next((row for row in self.rows if _key(row.method) == _key(method)), None)


def _key(method: str) -> str:
    """Return a name without what spellings differ in: ClearSR* is clearsr-star."""
    return "".join(letter for letter in method.lower().replace("*", "star") if letter.isalnum())


@functools.lru_cache(maxsize=1)
def _table() -> dict[str, Any]:
    return tomllib.loads(TABLE.read_text(encoding="utf-8"))


def data_set(name: str) -> DataSet:
    """Return what is published on a data set: "realsr", "drealsr" or "div2k-val", in any case.

    Raises:
        ConfigError: nothing is; the message names the data sets.
    """
    table = _table()
    known = table["data"].get(name.lower())
    if known is None:
        raise ConfigError(f"--published={name}: values are kept for {', '.join(table['data'])}.")
    rows = tuple(
        Row(row["method"], row["source"], {key: float(row[key]) for key in TITLES if key in row})
        for row in table["rows"]
        if row["data"] == name.lower()
    )
    return DataSet(known["title"], known["pictures"], rows)


def markdown(published: DataSet, measured: dict[str, dict[str, Summary]], count: int) -> str:
    """Return the published rows, and our methods of the same names beside theirs.

    Args:
        published: of the data set that was measured.
        measured: method -> measure -> mean, of `tables.summaries`.
        count: number of pictures that were measured.
    """
    shown = [key for key in TITLES if any(key in row.values for row in published.rows)]
    text = f"\n## Published on {published.title}, not measured here\n\n"
    rows = [["Method", *map(title, shown), "Source"]]
    rows += [[row.method, *(_number(row.values.get(key), key) for key in shown), row.source] for row in published.rows]
    text += aligned(rows)
    pairs = [(method, row) for method in measured if method != REFERENCE and (row := published.row(method)) is not None]
    if not pairs:
        return text
    ours = [key for key in shown if any(key in measured[method] and key in row.values for method, row in pairs)]
    rows = [["Method", "", *map(title, ours)]]
    for method, row in pairs:
        means = {key: measured[method][key].mean for key in ours if key in measured[method]}
        off = {key: means[key] - row.values[key] for key in means if key in row.values}
        rows.append([method, "measured", *(_number(means.get(key), key) for key in ours)])
        rows.append([row.method, "published", *(_number(row.values.get(key), key) for key in ours)])
        rows.append(["", "difference", *(_number(off.get(key), key, "+") for key in ours)])
    text += f"\n## Measured beside published\n\n{aligned(rows)}"
    if count != published.pictures:
        text += f"\nMeasured on {count} of {published.pictures} pictures: the differences are partly the pictures'.\n"
    return text


def _number(value: float | None, key: str, sign: str = "") -> str:
    return "–" if value is None or math.isnan(value) else f"{value:{sign}.{DIGITS[key]}f}"
