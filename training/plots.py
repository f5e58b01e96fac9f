"""Every plot of the analysis commands, as PNG files; the one file that knows matplotlib."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

DPI = 120
MAX_COLUMNS = 3

_STYLE = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 9.0,
    "grid.alpha": 0.3,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Curve:
    """One line of a panel."""

    label: str
    x: Sequence[float]
    y: Sequence[float]  # NaN leaves a gap
    spread: Sequence[float] = ()  # half-width of the band around it; empty = none
    dashed: bool = False


@dataclass(frozen=True)
class Panel:
    """One small diagram: curves and lines across it, drawn dotted and named in the legend."""

    title: str
    curves: Sequence[Curve]
    x_label: str = ""
    y_label: str = ""
    across: Sequence[tuple[str, float]] = ()  # (name, y)
    upright: Sequence[tuple[str, float]] = ()  # (name, x)


@dataclass(frozen=True)
class Table:
    """One coloured table: `values[row][column]`, with NaN left empty."""

    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float]]
    digits: int
    row_label: str = ""
    column_label: str = ""


@dataclass(frozen=True)
class Dot:
    """One value with its interval, under a name."""

    name: str
    value: float
    half_width: float  # NaN = unknown


@dataclass(frozen=True)
class DotPanel:
    """One small diagram: values under each other, and lines through all of them."""

    title: str
    dots: Sequence[Dot]
    upright: Sequence[tuple[str, float]] = ()  # (name, x); "" leaves it out of the legend


@dataclass(frozen=True)
class Point:
    """One place of a plane, with half-widths of its intervals along both axes."""

    name: str
    place: tuple[float, float]
    half_widths: tuple[float, float] = (math.nan, math.nan)  # NaN = unknown


def _sheet(count: int, width: float, height: float, columns: int = MAX_COLUMNS) -> tuple[Figure, list[Axes]]:
    """Return a figure with `count` places, each `width` x `height` inches."""
    across = min(count, columns)
    down = math.ceil(count / across)
    figure = Figure(figsize=(across * width, down * height), layout="constrained")
    places = figure.subplots(down, across, squeeze=False).ravel().tolist()
    for place in places[count:]:
        figure.delaxes(place)
    return figure, places[:count]


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)


@mpl.rc_context(_STYLE)  # type: ignore[arg-type]
def write_curves(path: Path, panels: Sequence[Panel]) -> None:
    """Write panels of curves side by side."""
    figure, places = _sheet(len(panels), 3.8, 3.0)
    for place, panel in zip(places, panels, strict=True):
        for index, curve in enumerate(panel.curves):
            x, y = np.asarray(curve.x, dtype=float), np.asarray(curve.y, dtype=float)
            style = "--" if curve.dashed else "-"
            marker = "o" if len(x) <= 20 else None
            place.plot(x, y, style, color=f"C{index % 10}", marker=marker, markersize=3, label=curve.label or None)
            if len(curve.spread):
                spread = np.asarray(curve.spread, dtype=float)
                place.fill_between(x, y - spread, y + spread, color=f"C{index % 10}", alpha=0.15, linewidth=0)
        for index, (name, value) in enumerate(panel.across):
            place.axhline(value, color="0.35", linestyle=(":", "-.")[index % 2], label=name)
        for index, (name, value) in enumerate(panel.upright):
            place.axvline(value, color=("#8c3b3b", "#3b5f8c")[index % 2], linestyle="--", linewidth=1, label=name)
        place.set(title=panel.title, xlabel=panel.x_label, ylabel=panel.y_label)
        # A band of few pictures is wider than anything there is to see: the curves decide what is shown.
        shown = np.concatenate([np.asarray(curve.y, dtype=float) for curve in panel.curves])
        shown = np.append(shown, [value for _, value in panel.across])
        shown = shown[np.isfinite(shown)]
        if len(shown):
            margin = 0.25 * (shown.max() - shown.min()) or 0.05 * abs(shown[0]) or 1.0
            place.set_ylim(shown.min() - margin, shown.max() + margin)
        if place.get_legend_handles_labels()[0]:
            place.legend(fontsize=7)
    _save(figure, path)


@mpl.rc_context(_STYLE)  # type: ignore[arg-type]
def write_tables(path: Path, tables: Sequence[Table]) -> None:
    """Write coloured tables side by side, with the number in every cell."""
    longest = max(len(table.columns) for table in tables)
    figure, places = _sheet(len(tables), max(3.2, 0.7 * longest + 1.2), 0.45 * len(tables[0].rows) + 1.6)
    for place, table in zip(places, tables, strict=True):
        values = np.asarray(table.values, dtype=float)
        place.grid(visible=False)
        place.imshow(values, cmap="viridis", aspect="auto")
        low, high = (np.nanmin(values), np.nanmax(values)) if np.isfinite(values).any() else (0.0, 0.0)
        for (row, column), value in np.ndenumerate(values):
            if math.isfinite(value):
                bright = high > low and (value - low) / (high - low) > 0.6
                text = f"{value:.{table.digits}f}"
                place.text(
                    column, row, text, ha="center", va="center", fontsize=8, color="black" if bright else "white"
                )
        place.set_xticks(range(len(table.columns)), table.columns)
        place.set_yticks(range(len(table.rows)), table.rows)
        place.set(title=table.title, xlabel=table.column_label, ylabel=table.row_label)
    _save(figure, path)


@mpl.rc_context(_STYLE)  # type: ignore[arg-type]
def write_bars(path: Path, title: str, y_label: str, names: Sequence[str], values: Sequence[float]) -> None:
    """Write one bar for every name, positive ones in another colour than negative ones."""
    figure, (place,) = _sheet(1, max(4.0, min(14.0, 0.35 * len(names) + 1.5)), 3.4)
    place.bar(range(len(names)), values, color=["C0" if value > 0 else "C3" for value in values])
    place.axhline(0.0, color="0.2", linewidth=0.8)
    place.set(title=title, ylabel=y_label)
    if len(names) <= 40:
        place.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=7)
    else:
        place.set(xlabel="picture")
    _save(figure, path)


@mpl.rc_context(_STYLE)  # type: ignore[arg-type]
def write_dots(path: Path, panels: Sequence[DotPanel], names: Sequence[str], x_label: str = "") -> None:
    """Write values with their intervals, one panel beside the other.

    Args:
        path: of the PNG.
        panels: at least one.
        names: of the dots; their order is that of the colours, so that a name has one colour in several files.
        x_label: under every panel.
    """
    rows = [name for name in names if any(dot.name == name for panel in panels for dot in panel.dots)]
    figure, places = _sheet(len(panels), 3.4, 0.3 * len(rows) + 1.2)
    for place, panel in zip(places, panels, strict=True):
        for dot in panel.dots:
            spread = dot.half_width if math.isfinite(dot.half_width) else 0.0
            colour = f"C{names.index(dot.name) % 10}"
            place.errorbar(dot.value, rows.index(dot.name), xerr=spread, fmt="o", color=colour, markersize=4, capsize=3)
        for index, (name, value) in enumerate(panel.upright):
            label = name or None
            place.axvline(value, color="0.35", linestyle=(":", "-.")[index % 2], linewidth=1, label=label)
        place.set_yticks(range(len(rows)), rows)
        place.set_ylim(len(rows) - 0.5, -0.5)
        place.locator_params(axis="x", nbins=4)  # more of "-0.0025" lie on one another
        place.set(title=panel.title, xlabel=x_label)
        if place.get_legend_handles_labels()[0]:
            place.legend(fontsize=7)
    _save(figure, path)


@mpl.rc_context(_STYLE)  # type: ignore[arg-type]
def write_points(
    path: Path,
    labels: tuple[str, str],
    points: Sequence[Point],
    printed: Sequence[Point] = (),
    across: tuple[str, float] | None = None,
) -> None:
    """Write measured points with both intervals, and numbers for those of others; the vertical axis is upside down.

    Args:
        path: of the PNG.
        labels: of the axes.
        points: measured; named beside the marker.
        printed: published elsewhere; named in a legend of their own.
        across: (name, y) of a line.
    """
    figure, (place,) = _sheet(1, 6.2 + 1.6 * bool(printed), 4.8)
    for index, point in enumerate(points):
        spread = [half if math.isfinite(half) else 0.0 for half in point.half_widths]
        place.errorbar(
            *point.place, xerr=spread[0], yerr=spread[1], fmt="o", color=f"C{index % 10}", capsize=2, elinewidth=0.8
        )
        place.annotate(point.name, point.place, xytext=(5, 5), textcoords="offset points", fontsize=8)
    handles = [
        place.plot(*point.place, linestyle="", marker=f"${index}$", color="0.4", markersize=7, label=point.name)[0]
        for index, point in enumerate(printed, start=1)
    ]
    if handles:
        figure.legend(handles=handles, loc="outside right upper", fontsize=7, title="published,\nnot measured here")
    if across is not None and math.isfinite(across[1]):
        line = place.axhline(across[1], color="0.35", linestyle=":", label=across[0])
        place.legend(handles=[line], fontsize=7)
    place.set(xlabel=labels[0], ylabel=labels[1])
    place.invert_yaxis()
    _save(figure, path)


@mpl.rc_context(_STYLE)  # type: ignore[arg-type]
def write_pictures(path: Path, rows: Iterable[tuple[str, Sequence[tuple[str, np.ndarray]]]]) -> None:
    """Write rows of pictures, each (H, W, 3) or (H, W) in [0, 1] under its own title; a row begins with its name."""
    rows = list(rows)
    columns = max(len(pictures) for _, pictures in rows)
    figure, places = _sheet(len(rows) * columns, 1.15, 1.4, columns)
    for index, (name, pictures) in enumerate(rows):
        for column in range(columns):
            place = places[index * columns + column]
            place.grid(visible=False)
            place.set_xticks([])
            place.set_yticks([])
            for side in place.spines.values():
                side.set_visible(False)
            if column == 0:
                place.set_ylabel(name, fontsize=7)
            if column < len(pictures):
                title, picture = pictures[column]
                place.imshow(picture, cmap="gray", interpolation="nearest")
                place.set_title(title, fontsize=7)
    _save(figure, path)
