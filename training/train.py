"""Command line of every training stage: `python -m training.train --preset=NAME --data=FOLDER --out=FOLDER`."""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Callable
from pathlib import Path

if not __package__:  # `accelerate launch training/train.py` runs this file as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    __package__ = "training"

import torch

from . import command_line, loop, parallel, plan
from .stages import stage_of

log = logging.getLogger("clearsr.training")

DRY_RUN = "--dry-run"


def train(stage_kind: Callable[..., loop.Stage], settings: loop.LoopSettings) -> bool:
    """Train in all processes of the launcher; return True when all steps are done."""
    identity = loop.plain(settings)
    with parallel.processes(settings.device, settings.precision) as accelerator:
        if not accelerator.is_main_process:
            log.setLevel(logging.ERROR)  # everything is said once
        here = dataclasses.replace(settings, device=str(accelerator.device))
        if settings.threads:  # before anything is encoded
            torch.set_num_threads(settings.threads)
        _check_paths(settings)
        parallel.rows_of(accelerator, settings.batch, settings.accumulation)
        loop.refuse_other(settings, identity)
        stage = stage_kind(here)
        finished = loop.run_with(accelerator, stage, here, identity)
        sharded, main = parallel.is_sharded(accelerator), accelerator.is_main_process
    if finished and sharded and main:
        del stage  # which holds parts of weights
        loop.finish_from_snapshot(stage_kind(settings), settings, identity)
    return finished


def _check_paths(settings: loop.LoopSettings) -> None:
    """Refuse what could not be read or written, before pictures are decoded and crops encoded."""
    if settings.init != Path() and not settings.init.exists():
        raise ValueError(f"--init={settings.init} is not there.")
    try:
        settings.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out={settings.out} cannot be a folder of a run ({error.strerror}).") from error


@command_line.command(command_line.GOES_ON)  # before the first step, or while the result is written
def main(arguments: list[str]) -> int:
    """Run one stage, or with `--dry-run` say what it would be; return the exit status."""
    if DRY_RUN in arguments:
        return plan.main([argument for argument in arguments if argument != DRY_RUN])
    preset, others = command_line.preset(arguments, __doc__)
    settings_kind, stage_kind = stage_of(str(preset.pop("stage", "")))
    finished = train(stage_kind, command_line.settings(settings_kind, others, __doc__, preset))
    return 0 if finished else command_line.STOPPED  # Ctrl-C in the loop is no exception: it saves and ends by itself


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
