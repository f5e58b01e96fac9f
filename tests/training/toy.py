"""A network small enough to train a thousand steps a second, as a stage of the training loop."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from training import loop
from training.randomness import generator_for


class ToyBatch(NamedTuple):
    inputs: Tensor
    targets: Tensor
    broken: bool


class ToyObjective(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.network = nn.Sequential(nn.Linear(6, 8), nn.SiLU(), nn.Linear(8, 6))

    def forward(self, batch: ToyBatch) -> tuple[Tensor, dict[str, Tensor]]:
        loss = (self.network(batch.inputs) - batch.targets).square().mean()
        return loss * float("nan") if batch.broken else loss, {}


class Toy:
    """Fits a small network to random targets; draws everything from (seed, step)."""

    def __init__(self, fail_at: frozenset[int] = frozenset(), stop_at: int | None = None, pause: float = 0.0) -> None:
        self.module = ToyObjective()
        self.fail_at, self.stop_at, self.pause = fail_at, stop_at, pause
        self.finished = False

    @property
    def given(self) -> dict[str, str]:
        return {"set of numbers": "random"}

    @property
    def begun_from(self) -> dict[str, str]:
        return {}

    def trainable(self) -> dict[str, nn.Parameter]:
        return dict(self.module.network.named_parameters())

    def weights(self) -> dict[str, nn.Parameter]:
        return self.trainable()

    def start(self, rows: range) -> None:
        self.rows = slice(rows.start, rows.stop)

    def batch(self, step: int) -> ToyBatch:
        time.sleep(self.pause)
        if step == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        both = torch.randn(2, 8, 6, generator=generator_for(0, step))
        return ToyBatch(both[0, self.rows], both[1, self.rows], step in self.fail_at)

    def validate(self, step: int, folder: Path) -> dict[str, float]:
        return {"psnr": float(-((step - 14) ** 2))}

    def finish(self, folder: Path, made: dict[str, Any]) -> None:
        self.finished = True


def settings(out: Path, **changes: object) -> loop.LoopSettings:
    values: dict[str, object] = {
        "steps": 30,
        "learning_rate": 1e-2,
        "out": out,
        "warmup": 5,
        "decay": "linear",
        "ema": 0.9,
        "snapshot_every": 7,
    }
    return loop.LoopSettings(**{**values, **changes})  # type: ignore[arg-type]
