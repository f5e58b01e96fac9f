"""Experiments on models trained for them: every variant from the same base, with the same budget, at several seeds."""

from __future__ import annotations

import json
import logging
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .. import config, inspection, provenance, restore, train
from ..clearsr_model import ClearSRModel
from ..stages import stage_of
from ..tables import REFERENCE, Results
from . import experiments, results, work
from .experiments import Experiment
from .work import Work

log = logging.getLogger("clearsr.training")


class TrainingStoppedError(KeyboardInterrupt):
    """Ctrl-C during a training: it has saved, and the same command goes on."""


@dataclass(frozen=True)
class AblationRun:
    """Which variants are compared, and what they are sampled with."""

    variants: tuple[str, ...]
    training: str  # which of the ways in training.toml
    steps: int = 50
    denoise: float = 1.0
    accumulate: str = "per_step"
    color_fix: str = "none"
    alpha: float = 0.0
    beta: float = 0.0
    timestep: int = 500  # of the control whose D_kl is taken
    seed: int = 0  # of the sampling noise


def trained(here: Work, way: str, variant: str, seed: int, progress: work.Progress) -> Path:
    """Train a variant, or go on with it, or find it trained; return its file.

    Raises:
        TrainingStoppedError: it was stopped on the way.
    """
    budget = experiments.training(way, here.budget)
    if variant not in budget.variants:
        raise config.ConfigError(f"training.toml has no variant {variant!r}: {', '.join(budget.variants)}.")
    folder = here.folder / "trained" / way / f"{variant}_seed{seed}"
    file = folder / "clearsr.safetensors"
    stage, table = resolved(budget.settings)
    table = {**table, **budget.variants[variant], "seed": seed}
    progress.begin(f"training {variant}, seed {seed}")
    repeated = file.is_file()
    provenance.claim(folder, {**table, "base": here.sha256, "photographs": here.photographs})
    if not repeated:
        settings_kind, stage_kind = stage_of(stage)
        settings = config.build(
            settings_kind,
            table,
            {
                "data": here.data,
                "base": here.checkpoint,
                "out": folder,
                "cache": here.folder / "trained" / way / f"latents_seed{seed}.safetensors",
                "pair_cache": here.folder / "trained" / way / f"pairs_seed{seed}.safetensors",
            },
        )
        if not train.train(stage_kind, settings):
            raise TrainingStoppedError
    progress.end(repeated)
    return file


def resolved(settings: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the stage of a way to train, and all of its settings: those of the preset that it extends, and its own."""
    table = config.read_preset(str(settings["extends"]))
    stage = str(table.pop("stage"))
    return stage, {**table, **{key: value for key, value in settings.items() if key != "extends"}}


def restored(here: Work, run: AblationRun, variant: str, seed: int, file: Path) -> Path:
    """Upscale the split's pictures with a trained variant; return their folder."""
    folder = here.here / "restored" / run.training / f"{variant}_seed{seed}"
    restore.run(
        config.build(
            restore.RestoreSettings,
            {
                "checkpoint": file,
                "lr": here.lr,
                "out": folder,
                "limit": len(here.pairs),
                "steps": run.steps,
                "denoise": run.denoise,
                "accumulate": run.accumulate,
                "color_fix": run.color_fix,
                "ela_strength": run.alpha,
                "lla_strength": run.beta,
                "seed": run.seed,
            },
        )
    )
    return folder


def divergences(here: Work, run: AblationRun, variant: str, seed: int, file: Path) -> dict[str, float]:
    """Return picture -> D_kl of the whole control of a trained variant."""
    kept = here.here / "d_kl" / run.training / f"{variant}_seed{seed}.json"
    made = {"checkpoint": provenance.sha256(file), "timestep": run.timestep}
    table = work.read_json(kept)
    if {key: table.get(key) for key in made} != made:
        table = {**made, "values": {}}
    settings = inspection.InspectSettings(file, here.lr, here.here, timestep=run.timestep, sheets=0)
    model = None
    for pair in tqdm(here.pairs, unit="picture", desc=f"D_kl of {variant}", leave=False):
        if pair.name not in table["values"]:
            model = model or ClearSRModel.from_checkpoint(file)
            findings = inspection.Findings()
            inspection.inspect_picture(pair.name, {inspection.OURS: model}, pair.lr, settings, findings, sheet=False)
            table["values"][pair.name] = statistics.fmean(findings.divergences[-1][3])  # the last part is the whole
            provenance.write_json(kept, table)
    return {pair.name: table["values"][pair.name] for pair in here.pairs}


def ablation(experiment: Experiment, here: Work) -> results.Stored:
    """Train every variant at every seed, restore and measure (Tables 2 and 3)."""
    run = config.build(AblationRun, experiment.settings(here.budget))

    def measure(variant: str, seed: int, file: Path) -> dict[str, dict[str, float]]:
        folder = restored(here, run, variant, seed, file)
        name = f"{variant}_seed{seed}"
        return work.measured(here, name, folder, here.here / "measured" / run.training / f"{name}.json")

    return _over_seeds(experiment, here, run, measure, lambda: {REFERENCE: work.measured_reference(here)})


def divergence(experiment: Experiment, here: Work) -> results.Stored:
    """Train every variant at every seed and compare what their controls hold of x_lr (Eq. 5, Figs. 2 and 8)."""
    run = config.build(AblationRun, experiment.settings(here.budget))
    return _over_seeds(
        experiment,
        here,
        run,
        lambda variant, seed, file: {"d_kl": divergences(here, run, variant, seed, file)},
        dict,
    )


def _over_seeds(
    experiment: Experiment,
    here: Work,
    run: AblationRun,
    measure: Callable[[str, int, Path], dict[str, dict[str, float]]],
    more: Callable[[], Results],
) -> results.Stored:
    """Measure every variant at every seed. All trainings of one seed come first: they are comparable by themselves.

    Seeds that the stored result holds, made with the same settings of the same pictures, are taken from there: a
    result grows over several machines, and no seed of it is lost.
    """
    budget = experiments.training(run.training, here.budget)
    described = {
        "training_settings": resolved(budget.settings)[1],
        "variants_settings": {variant: budget.variants[variant] for variant in run.variants},
        "photographs": here.photographs,
        "efflite": here.efflite,
        **experiment.settings(here.budget),
    }
    settings = json.loads(json.dumps(described))

    def kept() -> dict[int, Results]:
        return results.seeds_of(here.results, experiment.name, here.split, here.sha256, settings, here.names)

    missing = sorted(set(here.seeds) - set(kept()))
    progress = work.Progress(len(missing) * len(run.variants))
    for seed in missing:
        table: Results = more()
        for variant in run.variants:
            table[variant] = measure(variant, seed, trained(here, run.training, variant, seed, progress))
        # Read again: another process may have brought a seed meanwhile.
        results.write(here.results, _stored(experiment, here, settings, {**kept(), seed: table}))
    return results.read(results.path_of(here.results, experiment.name, here.split))


def _stored(experiment: Experiment, here: Work, settings: dict[str, Any], found: dict[int, Results]) -> results.Stored:
    made = results.made_with(here.checkpoint, settings, here.budget)
    seeds = tuple(sorted(found))
    return results.Stored(experiment.name, here.split, made, seeds, tuple(found[seed] for seed in seeds))
