"""Pairs per second of every way to degrade crops: `python -m training.bench_data --data=PHOTOGRAPHS`.

Machines are noisy, so that the ways take turns, and every figure is a ratio to the first way of the same round.
"""

from __future__ import annotations

import logging
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from . import command_line, config, degradation
from .batches import Ahead
from .degradation import Preset
from .pairs import DegradeOn, degrade_pairs
from .photographs import Photographs
from .randomness import generator_for

log = logging.getLogger("clearsr.training")


@dataclass(frozen=True)
class BenchDataSettings:
    """What to measure."""

    data: Path  # folder of pictures, or of shards
    crop_sizes: tuple[int, ...] = (128, 512)  # pixels
    degradation: Preset = "paper"  # ranges of blur, noise and JPEG: docs/TRAINING.md
    batch: int = 8  # pairs
    batches: int = 4  # in each turn of each way
    rounds: int = 5  # turns of each way, one after the other
    workers: int = 2  # threads that make batches
    device: str = "cpu"  # of the way that takes a batch together
    seed: int = 0  # of crops and degradations
    memory_gb: float = 1.0  # most memory that decoded pictures take


@dataclass(frozen=True)
class Row:
    """One way at one size of crops."""

    crop: int  # pixels
    way: str
    rate: float  # pairs per second, median of the rounds
    ratio: float  # to the first way of the same round, median
    lowest: float
    highest: float


def _ways(hq: Tensor, settings: BenchDataSettings) -> dict[str, Callable[[int], None]]:
    """Return name -> function that degrades the batches of a round."""
    preset = degradation.PRESETS[settings.degradation]
    there = hq.to(settings.device)

    def make(images: Tensor, batch: int, degrade_on: DegradeOn) -> Tensor:
        numbers = range(batch * len(images), (batch + 1) * len(images))
        return degrade_pairs(images, numbers, settings.seed, preset, degrade_on=degrade_on)

    def one_thread(turn: int) -> None:
        for batch in range(settings.batches):
            make(hq, turn * settings.batches + batch, "cpu")

    def workers(turn: int) -> None:
        first = turn * settings.batches
        ahead = Ahead(lambda batch: make(hq, first + batch, "cpu"), settings.batches, settings.workers)
        for batch in range(settings.batches):
            ahead.get(batch)

    def together(turn: int) -> None:
        partners = [make(there, turn * settings.batches + batch, "device") for batch in range(settings.batches)]
        torch.cat(partners).cpu()  # waits until they are done

    return {
        "one after the other, 1 thread": one_thread,
        f"one after the other, {settings.workers} workers": workers,
        f"together on {settings.device}": together,
    }


def measure(photographs: Photographs, crop: int, settings: BenchDataSettings) -> list[Row]:
    """Time every way on the same crops and recipes, with one of torch's threads in each thread.

    Crops are cut beforehand, and enlargement is not included.
    """
    generators = [generator_for(settings.seed + 1, number) for number in range(settings.batch)]
    hq = (torch.stack([photographs.crop(crop, generator) for generator in generators]) + 1.0) / 2.0
    ways = _ways(hq, settings)
    for way in ways.values():
        way(0)  # tables, plans and threads are made on first use
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(1, settings.rounds + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way(turn)
            seconds[name].append(time.perf_counter() - start)

    pairs, first = settings.batch * settings.batches, next(iter(seconds.values()))
    rows = []
    for name, taken in seconds.items():
        ratios = [reference / own for reference, own in zip(first, taken, strict=True)]
        rate = pairs / statistics.median(taken)
        rows.append(Row(crop, name, rate, statistics.median(ratios), min(ratios), max(ratios)))
    return rows


def table(rows: list[Row]) -> str:
    """Return a markdown table."""
    lines = ["| crop | way | pairs per second | ratio | lowest to highest |", "|---|---|---|---|---|"]
    lines += [
        f"| {row.crop} | {row.way} | {row.rate:.1f} | {row.ratio:.2f} | {row.lowest:.2f} to {row.highest:.2f} |"
        for row in rows
    ]
    return "\n".join(lines)


def run(settings: BenchDataSettings) -> list[Row]:
    """Measure every size of crops."""
    if min(*settings.crop_sizes, settings.batch, settings.batches, settings.rounds, settings.workers) < 1:
        raise config.ConfigError("--crop_sizes, --batch, --batches, --rounds and --workers take 1 or more.")
    photographs = Photographs(settings.data, max(settings.crop_sizes), settings.memory_gb)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [row for crop in settings.crop_sizes for row in measure(photographs, crop, settings)]
    finally:
        torch.set_num_threads(threads)


@command_line.command()
def main(arguments: list[str]) -> int:
    """Run from the command line; return the exit status."""
    log.info("%s", table(run(command_line.settings(BenchDataSettings, arguments, __doc__))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
