"""Samples per second and peak memory of training, against a plain loop: `python -m training.bench --size=nano`.

The plain loop has the same mathematics and nothing else: float32, gradients through the whole UNet, every crop encoded
when it is used, pairs degraded one after the other between the steps. Every way runs in a process of its own, and the
ways take turns, so that what is compared was measured side by side. `--device=cuda` measures a GPU's memory.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from . import command_line, config, loop, models
from .bench_step import held
from .clearsr import ClearSRSettings, ClearSRStage, PairBatch, lr_partners
from .randomness import generator_for

log = logging.getLogger("clearsr.training")

SIZES: dict[str, dict[str, Any]] = {
    "nano": {"base_widths": (64, 64, 128, 128), "crop": 128, "batch": 8, "crops": 64},
    "full": {"crop": 512, "batch": 1, "crops": 8},
}
WAYS: dict[str, dict[str, Any]] = {
    "ours": {},
    "ours + encoder checkpointed": {"checkpointing": "encoder"},
    "ours + bfloat16": {"precision": "bfloat16"},
    "ours + bfloat16 + encoder checkpointed": {"precision": "bfloat16", "checkpointing": "encoder"},
    "ours + bfloat16 + all checkpointed": {"precision": "bfloat16", "checkpointing": "all"},
}
GPU_WAYS: dict[str, dict[str, Any]] = {
    "ours + bfloat16 + degraded on the GPU": {"precision": "bfloat16", "degrade_on": "device"},
    "ours + bfloat16 + degraded on the GPU + compiled": {
        "precision": "bfloat16", "degrade_on": "device", "compile": True
    },
}  # fmt: skip
PLAIN = "plain loop"


@dataclass(frozen=True)
class BenchSettings:
    """What to measure."""

    size: Literal["nano", "full"] = "nano"  # of the model: nano, or that of Stable Diffusion 2.1 with random weights
    crop: int = 0  # pixels; 0 = that of the size
    batch: int = 0  # 0 = that of the size
    steps: int = 6  # timed, after one that is not
    rounds: int = 3  # turns of each way, one after the other
    ways: tuple[str, ...] = ()  # beside the plain loop; empty = all that the device can run
    workers: int = 1  # threads that make batches
    device: str = "cpu"  # cpu, or cuda
    data: str = "synthetic"  # folder of pictures, or of shards; synthetic = drawn pictures
    out: Path = Path()  # folder for bench.json and bench.md; empty = the table is only shown


@dataclass(frozen=True)
class Turn:
    """What one way took in one round."""

    rate: float  # samples per second, median of the steps
    memory: int  # bytes: of main memory above Python's and torch's own, or of the GPU
    data_rate: float  # samples per second that one thread crops and degrades


def plain_steps(stage: ClearSRStage) -> Iterator[None]:
    """Train by the plain loop, for ever; yields before each step."""
    settings, model = stage.settings, stage.model
    parameters = stage.trainable()
    optimizer = torch.optim.AdamW(parameters.values(), settings.learning_rate, weight_decay=0.0)
    schedule = stage.module.schedule
    for step in range(sys.maxsize):
        yield
        generator = generator_for(settings.seed, step)
        indices = stage.crops.draw(step, settings.batch, generator)
        hq_images = stage.crops.images(indices)
        lr_images = lr_partners(hq_images, indices, settings).to(settings.device)
        x_0 = models.encode(model.vae, hq_images.to(settings.device))
        noise = torch.randn(x_0.shape, generator=generator).to(settings.device)
        timesteps = torch.randint(1000, (settings.batch,), generator=generator).to(settings.device)
        # A gradient that is wanted at the UNet's input is one that goes through all of it.
        x_t = schedule.add_noise(x_0, noise, timesteps).requires_grad_(True)
        lr_latents = model.lr_encoder(lr_images * 2.0 - 1.0)
        eps = model.eps(x_t, timesteps, lr_latents, model.image_prompt(lr_images))
        loss = torch.nn.functional.mse_loss(eps, noise)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), settings.clip)
        optimizer.step()
        float(loss.detach())


class _Watched(ClearSRStage):
    """Notes when each batch is asked for, and what memory has been needed until then."""

    def batch(self, step: int) -> PairBatch:
        _note(self.times, self.peaks, self.settings.device)
        return super().batch(step)

    times: list[float]
    peaks: list[int]


def _note(times: list[float], peaks: list[int], device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()
        peaks.append(torch.cuda.max_memory_allocated())
    else:
        peaks.append(held("VmHWM"))
    times.append(time.perf_counter())


def measure(way: str, settings: ClearSRSettings) -> Turn:
    """Take `settings.steps` steps in this process; the first is not timed, and the last only ends the one before."""
    start = held("VmRSS") if settings.device == "cpu" else 0
    stage = _Watched(settings)
    times, peaks = [], []
    stage.times, stage.peaks = times, peaks
    if way == PLAIN:
        for step, _ in enumerate(plain_steps(stage)):
            _note(times, peaks, settings.device)
            if step == settings.steps - 1:
                break
    else:
        loop.run(stage, settings, {})
    stage.start(range(settings.batch))
    began = time.perf_counter()
    for step in range(3):
        stage.make(step)
    data_rate = 3 * settings.batch / (time.perf_counter() - began)
    seconds = [later - earlier for earlier, later in itertools.pairwise(times[1:])]
    return Turn(settings.batch / statistics.median(seconds), peaks[-1] - start, data_rate)


def _child(way: str, values: dict[str, Any]) -> Turn:
    """Measure one way in a process of its own."""
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, way, json.dumps(plain)], stdout=subprocess.PIPE, text=True, encoding="utf-8"
    )
    if done.returncode:
        raise ValueError(f"{way} ended with status {done.returncode} (-9 or 137: out of memory).")
    return Turn(**json.loads(done.stdout.splitlines()[-1]))


_PROGRAM = """
import dataclasses, json, sys
from training import bench, config
from training.clearsr import ClearSRSettings
settings = config.build(ClearSRSettings, json.loads(sys.argv[2]))
sys.stdout.write(json.dumps(dataclasses.asdict(bench.measure(sys.argv[1], settings))))
"""


def run(settings: BenchSettings) -> dict[str, list[Turn]]:
    """Measure every way in every round."""
    ways = {**WAYS, **(GPU_WAYS if settings.device != "cpu" else {})}
    unknown = [name for name in settings.ways if name not in ways]
    if unknown or settings.steps < 2 or settings.rounds < 1:
        raise config.ConfigError(
            f"--ways={','.join(settings.ways)}, --steps={settings.steps}, --rounds={settings.rounds}: give steps from "
            f"2, rounds from 1, and ways out of: {'; '.join(ways)}."
        )
    chosen = {PLAIN: {}, **{name: ways[name] for name in settings.ways or ways}}
    turns: dict[str, list[Turn]] = {name: [] for name in chosen}
    with tempfile.TemporaryDirectory() as folder:
        values = {
            "base": "random", "data": settings.data, "device": settings.device, "workers": settings.workers,
            **SIZES[settings.size], "steps": settings.steps + 2, "learning_rate": 1e-5, "prompt_dropout": 0.0,
            "snapshot_every": sys.maxsize, "cache": f"{folder}/latents.safetensors",
        }  # fmt: skip
        values |= {name: getattr(settings, name) for name in ("crop", "batch") if getattr(settings, name)}
        for number in range(settings.rounds):
            for index, (way, changes) in enumerate(chosen.items()):
                # A folder for each: what is there already would be gone on with.
                turns[way].append(_child(way, {**values, **changes, "out": f"{folder}/{number}_{index}"}))
                log.info("round %d, %s: %.3f samples per second", number + 1, way, turns[way][-1].rate)
    return turns


def table(turns: dict[str, list[Turn]]) -> str:
    """Return a markdown table: medians, and ratios to the plain loop of the same round."""
    plain = turns[PLAIN]
    lines = [
        "| Way | Samples per second | Ratio | Peak memory, GiB | Ratio | Data alone, samples per second |",
        "|---|---|---|---|---|---|",
    ]
    for way, own in turns.items():
        rate, memory, data = (statistics.median(getattr(turn, name) for turn in own) for name in _FIGURES)
        faster = statistics.median(turn.rate / base.rate for turn, base in zip(own, plain, strict=True))
        smaller = statistics.median(turn.memory / base.memory for turn, base in zip(own, plain, strict=True))
        lines.append(f"| {way} | {rate:.3f} | {faster:.2f} | {memory / 2**30:.2f} | {smaller:.2f} | {data:.1f} |")
    return "\n".join(lines) + "\n"


_FIGURES = tuple(field.name for field in dataclasses.fields(Turn))


@command_line.command()
def main(arguments: list[str]) -> int:
    """Measure, show and write the table; return the exit status."""
    settings = command_line.settings(BenchSettings, arguments, __doc__)
    turns = run(settings)
    text = table(turns)
    if settings.out != Path():
        settings.out.mkdir(parents=True, exist_ok=True)
        (settings.out / "bench.md").write_text(text, encoding="utf-8")
        content = {way: [dataclasses.asdict(turn) for turn in own] for way, own in turns.items()}
        stored = {"settings": loop.plain(settings), "torch": torch.__version__, "ways": content}
        (settings.out / "bench.json").write_text(json.dumps(stored, indent=2) + "\n", encoding="utf-8")
    sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
