"""Measure real training steps against their estimate: `python -m training.bench_step --crop=512 --batch=1`.

Takes the settings of the ClearSR stage. The base model is random and the photographs are synthetic unless others are
given. Nothing is written but the steps' own temporary folder. Works where /proc is: Linux.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import command_line, optimizer, rehearsal
from .clearsr import ClearSRSettings, ClearSRStage

log = logging.getLogger("clearsr.training")

_STATUS = Path("/proc/self/status")
_DEFAULTS: dict[str, Any] = {
    "base": "random",
    "data": "synthetic",
    "crops": 0,
    # Layers that start at zero let no gradient through before they have moved, and two of them lie behind each other.
    "steps": 3,
    "warmup": 0,
    "learning_rate": 1e-4,
    "prompt_dropout": 0.0,
    "batch": 1,
}


@dataclass(frozen=True)
class Measurement:
    """What real steps took."""

    start: int  # bytes of main memory before anything was built
    peak: int  # the most that the process held, bytes
    seconds: list[float]  # of each step
    losses: list[float]
    moved: list[str]  # parameters that changed
    still: list[str]  # parameters that were to move and did not
    strays: list[str]  # parameters that were not to move and did


def measure(settings: ClearSRSettings) -> Measurement:
    """Build the stage and take its steps, in this process.

    Raises:
        ValueError: the system does not say how much memory a process holds.
    """
    start = held("VmRSS")
    if settings.threads:
        torch.set_num_threads(settings.threads)
    stage = ClearSRStage(settings)
    stage.start(rehearsal.share_of(settings, 1))
    parameters = stage.trainable()
    for name, parameter in stage.weights().items():
        parameter.requires_grad_(name in parameters)
    before = _fingerprints(stage.module)
    moments = optimizer.build(settings.optimizer, parameters.values(), settings.learning_rate)
    seconds, losses = [], []
    for number in range(settings.steps):
        began = time.monotonic()
        loss = rehearsal.step(stage.module, stage.batch(number), moments, parameters, settings)
        losses.append(float(loss))
        seconds.append(time.monotonic() - began)
    peak = held("VmHWM")

    declared = {id(parameter) for parameter in parameters.values()}
    after = _fingerprints(stage.module)
    changed = {name for name in before if before[name] != after[name]}
    wanted = {name for name, value in stage.module.named_parameters() if id(value) in declared}
    return Measurement(
        start, peak, seconds, losses, sorted(changed), sorted(wanted - changed), sorted(changed - wanted)
    )


def held(kind: str) -> int:
    """Return the bytes of main memory that this process holds (VmRSS) or held at most (VmHWM)."""
    if not _STATUS.is_file():
        raise ValueError(f"training.bench_step reads {_STATUS}, which this system does not have: run it on Linux.")
    line = next(line for line in _STATUS.read_text(encoding="utf-8").splitlines() if line.startswith(kind))
    return int(line.split()[1]) * 1024


def _fingerprints(module: nn.Module) -> dict[str, int]:
    """Return a checksum of every parameter and buffer."""
    values: Mapping[str, Tensor] = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: zlib.crc32(value.detach().cpu().contiguous().numpy().data) for name, value in values.items()}


@command_line.command()
def main(arguments: list[str]) -> int:
    """Estimate, measure in a process of its own, compare; return the exit status: 1 where the wrong things moved."""
    with tempfile.TemporaryDirectory() as folder:
        defaults = {**_DEFAULTS, "out": folder}
        settings = command_line.settings(ClearSRSettings, arguments, __doc__, defaults)
        if settings.device != "cpu":
            raise ValueError("training.bench_step measures main memory: leave --device at cpu.")
        expected = rehearsal.estimate(settings)
        values = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
        plain = {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
        command = [sys.executable, "-c", _CHILD, json.dumps(plain)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, encoding="utf-8")
    if done.returncode:
        log.error("The measuring process ended with status %d (137 or -9: out of memory).", done.returncode)
        return 1
    found = Measurement(**json.loads(done.stdout.splitlines()[-1]))
    taken = found.peak - found.start
    gib = 2**30
    log.info("estimated %.3f GiB: %s", expected.total / gib, expected.table())
    log.info("measured  %.3f GiB above the %.3f GiB of Python and torch", taken / gib, found.start / gib)
    log.info("measured / estimated = %.3f", taken / expected.total)
    log.info("seconds per step: %s; losses: %s", _numbers(found.seconds), _numbers(found.losses))
    log.info("%d parameters moved, %d that should have did not, %d that should not have did",
             len(found.moved), len(found.still), len(found.strays))  # fmt: skip
    for name in found.still[:20]:
        log.info("  did not move: %s", name)
    for name in found.strays[:20]:
        log.error("  moved and should not have: %s", name)
    return 1 if found.strays else 0


_CHILD = """
import dataclasses, json, sys
from training import bench_step, config
from training.clearsr import ClearSRSettings
settings = config.build(ClearSRSettings, json.loads(sys.argv[1]))
sys.stdout.write(json.dumps(dataclasses.asdict(bench_step.measure(settings))))
"""


def _numbers(values: list[float]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
