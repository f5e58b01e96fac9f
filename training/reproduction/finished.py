"""Experiments on the finished model: LSA grids beside baselines, the sampler step by step, spectra of the control."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from .. import calibrate, config, evaluate, inspection, provenance, sweep
from ..baselines import upscaler
from ..clearsr_model import ClearSRModel
from ..picture_files import write_png
from ..tables import REFERENCE, Results
from . import results, work
from .experiments import Experiment
from .work import Work

HIGH_BAND = 0.5  # frequencies from here on, as a share of the highest one, count as high


@dataclass(frozen=True)
class GridRun:
    """What a grid of alpha and beta is run with."""

    steps: int
    denoise: float
    accumulate: str
    alphas: tuple[float, ...]
    betas: tuple[float, ...]
    color_fix: str = "none"
    baselines: tuple[str, ...] = ()  # restored and measured beside it
    seed: int = 0


def grid(experiment: Experiment, here: Work) -> results.Stored:
    """Restore the pictures at every place of the grid, and by the baselines; measure all."""
    run = config.build(GridRun, experiment.settings(here.budget))
    folder = here.here / "lsa"
    progress = work.Progress(len(run.alphas) + len(run.baselines) + 1)
    for alpha in run.alphas:
        progress.begin(f"{experiment.name}, alpha {alpha:g}")
        sweep.restore_grid(
            config.build(
                sweep.SweepSettings,
                {
                    "checkpoint": here.checkpoint,
                    "hr": here.hr,
                    "lr": here.lr,
                    "out": folder,
                    "alphas": (alpha,),
                    "betas": run.betas,
                    "limit": len(here.pairs),
                    "steps": run.steps,
                    "denoise": run.denoise,
                    "seed": run.seed,
                    "accumulate": run.accumulate,
                    "color_fix": run.color_fix,
                },
            )
        )
        progress.end()
    methods = {
        sweep.setting_name(alpha, beta): folder / sweep.setting_name(alpha, beta)
        for alpha in run.alphas
        for beta in run.betas
    }
    for name in run.baselines:
        progress.begin(f"{experiment.name}, {name}")
        methods = {name: enlarged(here, name), **methods}
        progress.end()
    progress.begin(f"{experiment.name}, measures")
    found: Results = {REFERENCE: work.measured_reference(here)}
    for name, pictures in methods.items():
        found[name] = work.measured(here, name, pictures, here.here / "measured" / f"{name}.json")
    progress.end()
    return store(experiment, here, found)


def enlarged(here: Work, name: str) -> Path:
    """Let a baseline enlarge every picture that it has not enlarged yet; return their folder."""
    folder = here.here / name
    upscale = None
    for pair in tqdm(here.pairs, unit="picture", desc=name, leave=False):
        if not (folder / f"{pair.name}.png").is_file():
            upscale = upscale or upscaler(name)
            if upscale is None:
                raise config.ConfigError(f"There is no baseline {name!r}: bicubic or realesrgan.")
            folder.mkdir(parents=True, exist_ok=True)
            write_png(upscale(evaluate.read_picture(pair.lr)), folder / f"{pair.name}.png")
    return folder


def store(experiment: Experiment, here: Work, found: Results, **more: Any) -> results.Stored:  # noqa: ANN401
    """Return the result of an experiment for which nothing was trained."""
    made = results.made_with(here.checkpoint, experiment.settings(here.budget), here.budget)
    return results.Stored(experiment.name, here.split, made, (0,), (found,), **more)


def step_name(step: int) -> str:
    """Return the name of a step in the results."""
    return f"step {step}"


@dataclass(frozen=True)
class StepsRun:
    """What the sampler is looked at with, step by step."""

    steps: int
    every: int
    seed: int = 0


def steps(experiment: Experiment, here: Work) -> results.Stored:
    """Measure the estimate of x_0 that the steps of the sampler make, without LSA (Fig. 5)."""
    run = config.build(StepsRun, experiment.settings(here.budget))
    settings = calibrate.CalibrateSettings(
        here.checkpoint, here.lr, here.here, here.hr, every=run.every, steps=run.steps, seed=run.seed
    )
    folder = here.here / "steps"
    provenance.claim(folder, {**experiment.settings(here.budget), "checkpoint": here.sha256})
    model = None
    found: Results = {REFERENCE: work.measured_reference(here)}
    progress = work.Progress(len(here.pairs))
    for pair in here.pairs:
        kept = folder / f"{pair.name}.json"
        progress.begin(f"{experiment.name}, {pair.name}")
        repeated = kept.is_file()
        if not repeated:
            model = model or ClearSRModel.from_checkpoint(here.checkpoint)
            provenance.write_json(
                kept, calibrate.measure_picture(model, pair.lr, evaluate.read_picture(pair.hr), settings)
            )
        for key, curve in work.read_json(kept).items():
            for step, value in curve.items():
                found.setdefault(step_name(int(step)), {}).setdefault(key, {})[pair.name] = float(value)
        progress.end(repeated)
    return store(experiment, here, found, notes=phase_limits(found, run.steps))


def phase_limits(found: Results, steps: int) -> tuple[str, ...]:
    """Say which phase limits the mean curve gives by the paper's rule, or why it gives none."""
    niqe = {int(name.split()[1]): _mean(table["niqe"]) for name, table in found.items() if name != REFERENCE}
    limits = calibrate.phase_limits(niqe, _mean(found[REFERENCE]["niqe"]), steps)
    said = [
        f"`{name}` by the paper's rule: {'none' if value is None else f'{value:g}'}."
        for name, value in (("ela_end", limits.ela_end), ("lla_start", limits.lla_start))
    ]
    return (*said, *limits.notes)


def _mean(values: dict[str, float]) -> float:
    finite = [value for value in values.values() if math.isfinite(value)]
    return statistics.fmean(finite) if finite else math.nan


@dataclass(frozen=True)
class SpectraRun:
    """Where in time the control is looked into."""

    timestep: int = 500
    seed: int = 0


BEFORE, AFTER = "before window attention", "after window attention"


def spectra(experiment: Experiment, here: Work) -> results.Stored:
    """Measure power spectra inside the control, and D_kl of its parts (Figs. 4 and 9)."""
    run = config.build(SpectraRun, experiment.settings(here.budget))
    settings = inspection.InspectSettings(
        here.checkpoint, here.lr, here.here, timestep=run.timestep, seed=run.seed, sheets=0
    )
    folder = here.here / "spectra"
    provenance.claim(folder, {**experiment.settings(here.budget), "checkpoint": here.sha256})
    model = None
    found: Results = {}
    rings: dict[tuple[str, str], list[tuple[Tensor, Tensor]]] = {}
    for pair in tqdm(here.pairs, unit="picture", desc=experiment.name):
        kept = folder / f"{pair.name}.json"
        if not kept.is_file():
            model = model or ClearSRModel.from_checkpoint(here.checkpoint)
            provenance.write_json(kept, _look_into(model, pair.name, pair.lr, settings))
        table = work.read_json(kept)
        for method, values in table["values"].items():
            for key, value in values.items():
                found.setdefault(method, {}).setdefault(key, {})[pair.name] = value
        for panel, curve, x, y in table["curves"]:
            rings.setdefault((panel, curve), []).append((torch.tensor(x), torch.tensor(y)))
    curves: dict[str, dict[str, list[list[float]]]] = {}
    for (panel, curve), pairs in rings.items():
        x, y = inspection.mean_curve(pairs)
        curves.setdefault(panel, {})[curve] = [x.tolist(), y.tolist()]
    return store(experiment, here, found, curves=curves, notes=by_size(curves))


def by_size(curves: dict[str, dict[str, list[list[float]]]]) -> tuple[str, ...]:
    """Say for maps of each size by how much the high frequencies of the mean curves differ."""
    said = []
    for panel, table in curves.items():
        for ours, other in (("after", "before"), ("DPM", "SPM")):
            if ours in table and other in table:
                levels = [high_band(*map(np.array, table[name])) for name in (ours, other)]
                said.append(f"{panel[0].upper()}{panel[1:]}: {ours} minus {other} {levels[0] - levels[1]:+.2f}.")
    return tuple(said)


def _look_into(model: ClearSRModel, name: str, lr: Path, settings: inspection.InspectSettings) -> dict[str, Any]:
    """Return the values and the curves of one picture."""
    findings = inspection.Findings()
    with torch.no_grad():
        inspection.inspect_picture(name, {inspection.OURS: model}, lr, settings, findings, sheet=False)
    values: dict[str, dict[str, float]] = {}
    for _, _, part, divergences in findings.divergences:
        values.setdefault(part, {})["d_kl"] = statistics.fmean(divergences)
    high: dict[str, list[float]] = {}
    curves = []
    for (panel, curve), found in findings.spectra.items():
        x, y = inspection.mean_curve(found)
        curves.append([panel, curve, x.tolist(), y.tolist()])
        method = {"before": BEFORE, "after": AFTER}.get(curve, curve)
        if panel != "latents":
            high.setdefault(method, []).append(high_band(x, y))
    for method, levels in high.items():
        values.setdefault(method, {})["high"] = statistics.fmean(levels)
    return {"values": values, "curves": curves}


def high_band(radii: np.ndarray, relative: np.ndarray) -> float:
    """Return the mean of a relative log spectrum over the frequencies from `HIGH_BAND` on."""
    return float(relative[radii >= HIGH_BAND].mean())
