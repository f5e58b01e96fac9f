"""The limits of LSA's phases, measured: NIQE and PSNR of every step of the sampler (Sec. 3.3, Fig. 5).

    python -m training.calibrate --checkpoint=FILE --lr=LR --hr=HR --out=out/calibration --limit=20

The paper ends ELA at the highest point of the NIQE curve and starts LLA where the curve falls below NIQE of the HR
pictures. Both are printed as shares of the steps: the widgets `ela_end` and `lla_start`. Sampling is without LSA.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from . import command_line, config, evaluate, loop, metrics, plots, provenance
from .clearsr_model import ClearSRModel, require_file
from .config import first
from .picture_files import read_pixels, to_bytes
from .pipeline import bound_eps, encode_lr, noise_sources, sampling_schedule, start_state, to_pixels, trajectory
from .tables import TITLES, Summary, summarise

log = logging.getLogger("clearsr.training")

_MAY_CHANGE = ("threads",)  # what changes no figure

Curve = dict[int, Summary]  # step, counted from 1 -> mean over the pictures


@dataclass(frozen=True)
class CalibrateSettings:
    """What to sample, which steps to look at, and what NIQE good pictures have."""

    checkpoint: Path  # a self-contained ClearSR file
    lr: Path  # pictures to upscale
    out: Path  # folder for calibration.json and calibration.png
    hr: Path = Path()  # their good partners, four times the size: PSNR, and NIQE(HR); empty = none
    niqe_hr: float = math.nan  # NIQE(HR) as a number, where there are no good pictures
    # x0: the estimate of x_0 that each step makes. It is the paper's curve: "the predicted latent embeddings of i-th
    # step", whose PSNR first rises and then falls. state: x_{t-1} with its noise, whose PSNR rises to the end.
    of: Literal["x0", "state"] = "x0"
    every: int = 1  # look at every k-th step only, and always at the first and the last one
    limit: int = 0  # only the first pictures by name; 0 = all
    steps: int = 50  # of the sampler
    seed: int = 0  # of the noise
    threads: int = 0  # of the CPU; 0 = torch's default


@dataclass(frozen=True)
class PhaseLimits:
    """The limits that a curve gives, as shares of the steps; None where it gives none, and then `notes` says why."""

    ela_end: float | None
    lla_start: float | None
    notes: tuple[str, ...] = ()


def watched_steps(steps: int, every: int) -> list[int]:
    """Return which steps, counted from 1, are looked at: every k-th, the first and the last one."""
    return sorted({1, *range(every, steps + 1, every), steps})


def phase_limits(niqe: dict[int, float], niqe_hr: float, steps: int) -> PhaseLimits:
    """Find the phase limits on a step-wise NIQE curve by the rule of Sec. 3.3.

    ELA moves the output of every step up to the highest point of the curve: step n of N gives ela_end = n / N. LLA
    moves the output of every step from the first one after it that lies below NIQE(HR): step m gives
    lla_start = (m - 1) / N.

    Args:
        niqe: NIQE of the outputs by step, 1 .. `steps`; steps may be missing, values need not be finite.
        niqe_hr: NIQE of good pictures; NaN = not known.
        steps: number of inference steps N.
    """
    curve = {step: value for step, value in sorted(niqe.items()) if math.isfinite(value)}
    if not curve:
        return PhaseLimits(None, None, ("No step has a finite NIQE: the pictures are too small or flat.",))
    peak = max(curve, key=curve.__getitem__)
    notes = []
    if peak == min(curve):
        notes.append("NIQE is highest at the first step: there is no rise for ELA to end with.")
    if peak == max(curve):
        notes.append("NIQE is highest at the last step: the curve never falls, and LLA has no place on it.")
    below = [step for step, value in curve.items() if step > peak and value < niqe_hr]
    if math.isnan(niqe_hr):
        notes.append("NIQE(HR) is not known: give --hr or --niqe_hr.")
    elif curve[peak] < niqe_hr:
        notes.append(f"The whole curve lies below NIQE(HR) = {niqe_hr:.2f}: it does not fall below it anywhere.")
        below = []
    elif not below and peak != max(curve):
        lowest = min(value for step, value in curve.items() if step > peak)
        notes.append(
            f"The curve does not fall below NIQE(HR) = {niqe_hr:.2f}; it ends at {curve[max(curve)]:.2f} and is never "
            f"under {lowest:.2f}. The model does not reach the naturalness of the HR pictures."
        )
    elif below and any(curve[step] >= niqe_hr for step in curve if step > below[0]):
        notes.append(f"The curve rises above NIQE(HR) again after step {below[0]}; the first crossing was taken.")
    return PhaseLimits(peak / steps, (below[0] - 1) / steps if below else None, tuple(notes))


@torch.no_grad()
def step_pictures(
    model: ClearSRModel, lr_images: Tensor, seed: int, steps: int, every: int, of: Literal["x0", "state"]
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (step from 1, (H, W, 3) uint8) of the steps that are watched, for one picture (1, 3, h, w) in [0, 1]."""
    encoded = encode_lr(model, lr_images, evaluate.SCALE)
    scheduler = sampling_schedule(steps, "leading")
    start_noise, generator = noise_sources(encoded.lr_latent.shape, seed)
    x_t = start_state(scheduler, encoded.anchor, start_noise)
    watched = set(watched_steps(steps, every))
    for output in trajectory(bound_eps(model, encoded), scheduler, x_t, encoded.anchor, generator):
        if output.step + 1 in watched:
            latent = output.x0 if of == "x0" else output.state
            yield output.step + 1, to_bytes(to_pixels(model, latent, encoded)[0])


def measure_picture(
    model: ClearSRModel, lr: Path, reference: np.ndarray | None, settings: CalibrateSettings
) -> dict[str, dict[int, float]]:
    """Return `niqe` and, with a reference (H, W, 3) uint8, `psnr` of the watched steps of one picture."""
    values: dict[str, dict[int, float]] = {"niqe": {}}
    pictures = step_pictures(model, read_pixels(lr), settings.seed, settings.steps, settings.every, settings.of)
    for step, picture in pictures:
        values["niqe"][step] = metrics.niqe(picture)
        if reference is not None:
            values.setdefault("psnr", {})[step] = metrics.psnr_y(picture, reference)
    return values


def find_pictures(settings: CalibrateSettings) -> list[tuple[Path, Path | None]]:
    """Return (picture, its good partner or None) of all that are sampled; only headers are read.

    Raises:
        EvaluationError: no pictures, a partner that is missing, or a size that does not fit.
    """
    if settings.hr != Path():
        found = evaluate.find_pairs(settings.hr, settings.lr, settings.limit)
        evaluate.check_sizes(found)
        return [(pair.lr, pair.hr) for pair in found]
    paths = first(list(evaluate.pictures(settings.lr, "--lr").values()), settings.limit)
    _check_lr_sizes(paths)
    return [(path, None) for path in paths]


def measure_steps(
    settings: CalibrateSettings, pairs: Sequence[tuple[Path, Path | None]]
) -> tuple[dict[str, Curve], float]:
    """Return the mean curves `niqe` and, where there are good pictures, `psnr`; and NIQE(HR), NaN if not known."""
    model = ClearSRModel.from_checkpoint(settings.checkpoint)
    values: dict[str, dict[int, list[float]]] = {"niqe": {}, "psnr": {}}
    good: list[float] = []
    for lr, hr in tqdm(pairs, unit="picture"):
        reference = None if hr is None else evaluate.read_picture(hr)
        if reference is not None:
            good.append(metrics.niqe(reference))
        for key, curve in measure_picture(model, lr, reference, settings).items():
            for step, value in curve.items():
                values[key].setdefault(step, []).append(value)
    curves = {key: {step: summarise(found) for step, found in table.items()} for key, table in values.items() if table}
    return curves, summarise(good).mean if math.isnan(settings.niqe_hr) else settings.niqe_hr


def _check_lr_sizes(paths: Sequence[Path]) -> None:
    """Refuse pictures whose results NIQE could not judge, before the first is sampled; only headers are read."""
    for path in paths:
        height, width = evaluate.picture_size(path)
        if not evaluate.enough_for_niqe(height * evaluate.SCALE, width * evaluate.SCALE):
            block = metrics.NIQE_BLOCK // evaluate.SCALE
            raise evaluate.EvaluationError(
                f"{path.name} is {width} x {height}; NIQE of its result needs {block} x {2 * block}. Take it out."
            )


def described(settings: CalibrateSettings, pairs: Sequence[tuple[Path, Path | None]]) -> dict[str, object]:
    """Return the settings with the model and the pictures that they name, as calibration.json says them."""
    good = [hr for _, hr in pairs if hr is not None]
    return {
        **loop.plain(settings),
        "niqe_hr": _number(settings.niqe_hr),
        "checkpoint": provenance.file_record(settings.checkpoint),
        "lr": provenance.pictures_record(lr for lr, _ in pairs),
        "hr": provenance.pictures_record(good) if good else None,
    }


def _number(value: float) -> float | None:
    """Return a value as JSON can hold it."""
    return value if math.isfinite(value) else None


def write_results(
    settings: CalibrateSettings,
    said: dict[str, object],
    curves: dict[str, Curve],
    niqe_hr: float,
    limits: PhaseLimits,
) -> None:
    """Write calibration.json, with the settings as `described` says them, and calibration.png."""
    content = {
        "settings": said,
        "niqe_hr": _number(niqe_hr),
        "ela_end": limits.ela_end,
        "lla_start": limits.lla_start,
        "notes": limits.notes,
        "curves": {key: {step: _number(cell.mean) for step, cell in curve.items()} for key, curve in curves.items()},
        "pictures": max(cell.count for cell in curves["niqe"].values()),
    }
    provenance.write_json(settings.out / "calibration.json", content, indent=2)

    upright = []
    if limits.ela_end is not None:
        upright.append((f"ela_end = {limits.ela_end:.3g}", limits.ela_end * settings.steps))
    if limits.lla_start is not None:
        upright.append((f"lla_start = {limits.lla_start:.3g}", limits.lla_start * settings.steps))
    panels = []
    for key, curve in curves.items():
        cells: Sequence[Summary] = list(curve.values())
        spread = [cell.half_width for cell in cells]
        panels.append(
            plots.Panel(
                TITLES[key],
                [
                    plots.Curve(
                        "predicted x_0" if settings.of == "x0" else "state x_{t-1}",
                        list(curve),
                        [cell.mean for cell in cells],
                        spread if all(map(math.isfinite, spread)) else (),
                    )
                ],
                "steps done",
                across=[("HR", niqe_hr)] if key == "niqe" and math.isfinite(niqe_hr) else [],
                upright=upright,
            )
        )
    plots.write_curves(settings.out / "calibration.png", panels)


def run(settings: CalibrateSettings) -> PhaseLimits:
    """Sample, measure, find the limits, write and tell them.

    Raises:
        ValueError: settings or pictures that cannot be, or the result of other ones in `out`.
        CheckpointError: the file is no self-contained ClearSR file; then `out` is as it was.
    """
    if settings.every < 1 or settings.steps < 1:
        raise config.ConfigError("--every and --steps are 1 or more.")
    if settings.hr == Path() and math.isnan(settings.niqe_hr):
        raise config.ConfigError("LLA's start needs NIQE of good pictures: give --hr=FOLDER, or --niqe_hr=NUMBER.")
    if settings.threads:
        torch.set_num_threads(settings.threads)
    pairs = find_pictures(settings)
    require_file(settings.checkpoint)
    said = described(settings, pairs)
    made_with = {key: value for key, value in provenance.identity(said).items() if key not in _MAY_CHANGE}
    provenance.refuse_other(settings.out, made_with)
    curves, niqe_hr = measure_steps(settings, pairs)
    limits = phase_limits({step: cell.mean for step, cell in curves["niqe"].items()}, niqe_hr, settings.steps)
    provenance.claim(settings.out, made_with)  # not before: a run that was stopped has made nothing
    write_results(settings, said, curves, niqe_hr, limits)
    for note in limits.notes:
        log.warning("%s", note)
    for name, value, otherwise in (("ela_end", limits.ela_end, 0.3), ("lla_start", limits.lla_start, 0.88)):
        log.info("%s: %s", name, f"none by this curve; the nodes' default is {otherwise}" if value is None else value)
    if limits.ela_end is not None and limits.lla_start is not None and settings.every > 1:
        log.info("Only every step of %d was looked at: both limits are that coarse.", settings.every)
    return limits


@command_line.command()
def main(arguments: list[str]) -> int:
    """Run from the command line; return the exit status."""
    settings = command_line.settings(CalibrateSettings, arguments, __doc__)
    run(settings)
    log.info("Written to %s: calibration.json, calibration.png.", settings.out)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
