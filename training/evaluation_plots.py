"""The plots of a comparison: every measure with its intervals, differences picture by picture, PSNR against NIQE."""

from __future__ import annotations

import math
from pathlib import Path

from . import plots
from .published import DataSet
from .tables import REFERENCE, Results, Summary, differences, shown_measures, summaries, title


def _panels(table: dict[str, dict[str, Summary]], reference: dict[str, Summary], zero: bool) -> list[plots.DotPanel]:
    panels = []
    for key in shown_measures(table):
        rows = [(name, row[key]) for name, row in table.items() if key in row and math.isfinite(row[key].mean)]
        if rows:
            dots = [plots.Dot(name, one.mean, one.half_width) for name, one in rows]
            lines = [("", 0.0)] if zero else []
            if key in reference and math.isfinite(reference[key].mean):
                lines.append((REFERENCE, reference[key].mean))
            panels.append(plots.DotPanel(title(key), dots, lines))
    return panels


def write(out: Path, results: Results, against: str, published: DataSet | None) -> None:
    """Write evaluation_measures.png, evaluation_tradeoff.png and, of several methods, evaluation_differences.png."""
    means = summaries(results)
    reference = means.pop(REFERENCE)
    plots.write_dots(out / "evaluation_measures.png", _panels(means, reference, zero=False), list(means))
    moved = differences(results, against)
    if moved:
        plots.write_dots(
            out / "evaluation_differences.png", _panels(moved, {}, zero=True), list(means), f"minus {against}"
        )
    points = [
        plots.Point(name, (row["psnr"].mean, row["niqe"].mean), (row["psnr"].half_width, row["niqe"].half_width))
        for name, row in means.items()
        if math.isfinite(row["psnr"].mean) and math.isfinite(row["niqe"].mean)
    ]
    printed = [
        plots.Point(row.method, (row.values["psnr"], row.values["niqe"]))
        for row in (published.rows if published is not None else ())
        if "psnr" in row.values and "niqe" in row.values
    ]
    plots.write_points(
        out / "evaluation_tradeoff.png",
        (title("psnr"), title("niqe")),
        points,
        printed,
        ("HR", reference["niqe"].mean),
    )
