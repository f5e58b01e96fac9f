"""One plot for each table and figure, from stored results."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

from .. import plots, sweep, tables
from ..tables import REFERENCE, Results, Summary
from .experiments import Experiment
from .results import Stored

CURVES = ("psnr", "ssim", "niqe", "efflite")


def write(path: Path, experiment: Experiment, stored: Stored, found: Results) -> None:
    """Write the plot of an experiment.

    Args:
        path: of the PNG.
        experiment: its kind decides the plot.
        stored: its result.
        found: the same, averaged over trainings: method -> measure -> picture -> value.
    """
    if experiment.kind == "steps":
        _steps(path, found)
    elif experiment.kind == "spectra":
        _spectra(path, stored)
    elif experiment.kind == "divergence":
        _diff(path, experiment, found)
    elif experiment.kind == "grid" and len(_strengths(found, "alpha")) > 2:
        _sweep(path, found)
    else:
        _differences(path, experiment, found)


def _differences(path: Path, experiment: Experiment, found: Results) -> None:
    """Write every method's differences to the one that most claims compare with, of those that were run."""
    run = [check.against for check in experiment.checks if check.against in found]
    against = statistics.mode(run or [name for name in found if name != REFERENCE])
    moved = tables.differences(found, against)
    panels = [
        plots.DotPanel(
            tables.title(key),
            [plots.Dot(name, table[key].mean, table[key].half_width) for name, table in moved.items() if key in table],
            [("", 0.0)],
        )
        for key in tables.TITLES
        if key in found[against]
    ]
    plots.write_dots(path, panels, list(moved), f"minus {against}")


def _strengths(found: Results, of: str) -> list[float]:
    """Return the values of alpha or beta at which the other strength is 0."""
    places = [_place(name) for name in found if name.startswith("alpha")]
    if of == "beta":
        places = [(beta, alpha) for alpha, beta in places]
    return sorted(moved for moved, other in places if other == 0.0)


def _place(name: str) -> tuple[float, float]:
    """Return alpha and beta of `sweep.setting_name`."""
    alpha, _, beta = name.removeprefix("alpha").partition("_beta")
    return float(alpha), float(beta)


def _sweep(path: Path, found: Results) -> None:
    """Write how the measures move along alpha and along beta, from where both are 0."""
    moved = tables.differences(found, sweep.setting_name(0.0, 0.0))
    panels = []
    for key in CURVES:
        curves = []
        for of in ("alpha", "beta"):
            strengths = _strengths(found, of)
            names = [sweep.setting_name(*((x, 0.0) if of == "alpha" else (0.0, x))) for x in strengths]
            cells = [
                moved[name][key] if name in moved and key in moved[name] else Summary(0.0, 0.0, 0) for name in names
            ]
            curves.append(
                plots.Curve(of, strengths, [cell.mean for cell in cells], [_known(cell.half_width) for cell in cells])
            )
        if any(key in table for table in moved.values()):
            panels.append(plots.Panel(tables.title(key), curves, "strength, the other at 0", "minus both 0"))
    plots.write_curves(path, panels)


def _known(half_width: float) -> float:
    return half_width if math.isfinite(half_width) else 0.0


def _steps(path: Path, found: Results) -> None:
    """Write the measures of the estimate of x_0 along the steps."""
    numbers = sorted(int(name.removeprefix("step ")) for name in found if name != REFERENCE)
    panels = []
    for key in ("psnr", "niqe"):
        cells = [tables.summarise(list(found[f"step {number}"][key].values())) for number in numbers]
        curve = plots.Curve(
            "estimate of x_0", numbers, [cell.mean for cell in cells], [_known(cell.half_width) for cell in cells]
        )
        good = found[REFERENCE].get(key)
        across = [("HR", tables.summarise(list(good.values())).mean)] if good else []
        panels.append(plots.Panel(tables.title(key), [curve], "steps done", across=across))
    plots.write_curves(path, panels)


def _spectra(path: Path, stored: Stored) -> None:
    """Write the mean spectra, one panel for each size of map."""
    panels = [
        plots.Panel(
            panel,
            [plots.Curve(name, x, y) for name, (x, y) in curves.items()],
            "frequency, share of the highest",
            "log power minus value at 0",
        )
        for panel, curves in stored.curves.items()
        if panel != "latents"
    ]
    plots.write_curves(path, panels)


def _diff(path: Path, experiment: Experiment, found: Results) -> None:
    """Write Diff of Eq. 5 for every picture."""
    check = experiment.checks[0]
    ours, other = found[check.method][check.measure], found[check.against][check.measure]
    diff = {name: value - other[name] for name, value in ours.items()}
    title = f"Diff = D_kl({check.method}) - D_kl({check.against})"
    plots.write_bars(path, title, "nats", list(diff), list(diff.values()))
