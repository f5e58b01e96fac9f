"""Where a stage's batches come from: its data settings, and threads that make the batches of later steps."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Literal, TypeVar

import torch

from .loop import LoopSettings, check_counts
from .photographs import Photographs

SMALLEST_CROP = 32  # pixels; of smaller ones SSIM has no window, and the deepest level of the UNet no neighbours

LEVELS = 4  # of Stable Diffusion's UNet and of its autoencoder, which is an eighth in size for it

Batch = TypeVar("Batch")


@dataclass(frozen=True)
class DataSettings(LoopSettings):
    """What every stage asks about its photographs."""

    data: Path = Path("data")  # a folder of pictures, or of shards that training.prepare has written
    crop: int = 128  # side of a sample in pixels, a multiple of 8
    memory_gb: float = 4.0  # most memory that decoded pictures take; of more, those used last are kept
    candidates: int = 1  # crops drawn for each one used; the most detailed is taken
    order: Literal["area", "chunked"] = "area"  # every pixel equally likely, or one shard after the other
    workers: int = 0  # threads that make the batches of later steps

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.crop % 8 or self.crop < SMALLEST_CROP:
            raise ValueError(f"--crop={self.crop}: give a multiple of 8 from {SMALLEST_CROP} on.")
        check_counts(self, candidates=1, workers=0)
        if not self.memory_gb >= 0.0:
            raise ValueError(f"--memory_gb={self.memory_gb}: give 0 or more.")

    def photographs(self, smallest: int) -> Photographs:
        """Open the photographs whose sides have at least `smallest` pixels."""
        return Photographs(self.data, smallest, self.memory_gb, self.order, self.seed)


def check_widths(widths: tuple[int, ...], norm_groups: int) -> None:
    """Refuse channels that Stable Diffusion's networks, of four levels with group norms, cannot have."""
    if len(widths) != LEVELS or any(width < 1 or width % norm_groups for width in widths):
        raise ValueError(
            f"--widths={','.join(map(str, widths))}: give {LEVELS} numbers, each a multiple of "
            f"--norm_groups={norm_groups}."
        )


class Ahead(Generic[Batch]):
    """Makes the batches of coming steps in threads; order and content are as without.

    Args:
        make: turns a step into a batch that follows from the step alone.
        steps: number of steps of the run; nothing is made beyond it.
        workers: number of threads; 0 makes every batch when it is asked for.
    """

    def __init__(self, make: Callable[[int], Batch], steps: int, workers: int) -> None:
        self.make, self.steps, self.workers = make, steps, workers
        self._waiting: dict[int, Future[Batch]] = {}
        # Every step is work for one thread, so that torch's own threads would only get in each other's way.
        self._pool = ThreadPoolExecutor(workers, "batch", torch.set_num_threads, (1,)) if workers else None

    def get(self, step: int) -> Batch:
        """Return the batch of `step`."""
        if self._pool is None:
            return self.make(step)
        for other in [other for other in self._waiting if not step <= other < step + 2 * self.workers]:
            self._waiting.pop(other).cancel()
        for coming in range(step, max(step + 1, min(step + 2 * self.workers, self.steps))):
            if coming not in self._waiting:
                self._waiting[coming] = self._pool.submit(self.make, coming)
        return self._waiting.pop(step).result()
