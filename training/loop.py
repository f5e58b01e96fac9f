"""The training loop that every stage shares: step, guard, snapshot, progress; readable top to bottom."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from . import snapshot
from .clearsr_model import weights_in
from .randomness import generator_for

log = logging.getLogger("clearsr.training")

NON_FINITE_LIMIT = 5


@dataclass(frozen=True)
class LoopSettings:
    """What the loop itself needs to know, whatever it trains."""

    steps: int
    learning_rate: float
    out: Path
    init: Path = Path()  # folder of another run, or a ClearSR file, whose weights to start from; empty = from nothing
    seed: int = 0
    warmup: int = 500  # steps from zero to the full learning rate
    decay: Literal["constant", "linear"] = "constant"  # the paper, or linear to zero at the last step
    clip: float = 1.0  # largest gradient norm
    ema: float = 0.0  # decay of the averaged weights; 0 = off
    snapshot_every: int = 500
    validate_every: int = 0  # 0 = never
    threads: int = 0  # 0 = torch's default
    device: str = "cpu"


class Stage(Protocol):
    """One thing to train: it says what moves, and turns (step, generator) into a loss."""

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """Return exactly the parameters that move, by the names under which they are stored."""
        ...

    def weights(self) -> dict[str, torch.nn.Parameter]:
        """Return what `init` sets: the trainable parameters, and those of the same parts that are held still."""
        ...

    def loss(self, step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        """Return the scalar loss of step `step` and figures for the log; all randomness comes from `generator`."""
        ...

    def validate(self, step: int, folder: Path) -> dict[str, float]:
        """Write pictures to `folder` and return figures for the log."""
        ...

    def finish(self, folder: Path) -> None:
        """Write what the next stage takes from `folder`; runs after the last step, with averaged weights."""
        ...


def learning_rate_at(step: int, settings: LoopSettings) -> float:
    """Return the learning rate of `step` (counted from 0): linear warm-up, then constant or linear to zero."""
    rate = settings.learning_rate * min(1.0, (step + 1) / max(1, settings.warmup))
    if settings.decay == "linear":
        rate *= max(0.0, 1.0 - step / settings.steps)
    return rate


@contextmanager
def _stop_requests() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM instead of dying, so that the loop can save and leave."""
    received: list[int] = []
    previous = {
        number: signal.signal(number, lambda number, _frame: received.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _check_same_run(stored: dict[str, object], current: dict[str, object], folder: Path) -> None:
    """Refuse to continue a snapshot of other settings; more steps and other hardware are not other settings."""
    free = {"steps", "out", "snapshot_every", "validate_every", "threads", "device", "data", "memory_gb", "workers"}
    differing = sorted(
        key for key in stored.keys() | current.keys() if key not in free and stored.get(key) != current.get(key)
    )
    if differing:
        pairs = ", ".join(f"{key}: {stored.get(key)!r} there, {current.get(key)!r} now" for key in differing)
        raise snapshot.SnapshotError(
            f"{folder} holds a run with other settings ({pairs}). Give another --out, or delete it."
        )


def plain(settings: object) -> dict[str, object]:
    """Return a dataclass as a table that JSON can hold, without its paths: they say nothing about the run itself."""
    table = dataclasses.asdict(settings)  # type: ignore[call-overload]
    return json.loads(json.dumps({key: value for key, value in table.items() if not isinstance(value, Path)}))


def run(stage: Stage, settings: LoopSettings, identity: dict[str, object]) -> bool:
    """Train `stage` until `settings.steps`, continuing the newest snapshot in `settings.out`.

    Args:
        stage: what to train.
        settings: how long, how fast, where.
        identity: everything that a snapshot must agree with to be continued.

    Returns:
        True when all steps are done, False when a signal ended the run early (state saved).
    """
    if settings.threads:
        torch.set_num_threads(settings.threads)
    out = settings.out
    out.mkdir(parents=True, exist_ok=True)
    parameters = stage.trainable()
    held = {name: value for name, value in stage.weights().items() if name not in parameters}
    names = {id(parameter): name for name, parameter in parameters.items()}
    optimizer = torch.optim.AdamW(
        list(parameters.values()), lr=settings.learning_rate, betas=(0.9, 0.999), weight_decay=0.0, foreach=True
    )
    averaged = {name: value.detach().clone() for name, value in parameters.items()} if settings.ema else {}
    if settings.init != Path():
        _start_from(settings.init, stage.weights(), averaged)
    step = _resume(out, parameters, held, averaged, optimizer, identity)
    _forget_after(out / "stats.jsonl", step)

    def save() -> None:
        tensors = {f"model.{name}": value for name, value in parameters.items()}
        tensors |= {f"held.{name}": value for name, value in held.items()}
        tensors |= {f"ema.{name}": value for name, value in averaged.items()}
        tensors |= snapshot.optimizer_tensors(optimizer, names)
        snapshot.write(out, snapshot.TrainingState(step, tensors, identity))

    non_finite = 0
    began, first = time.monotonic(), step
    with (
        _stop_requests() as stops,
        open(out / "stats.jsonl", "a", encoding="utf-8") as stats,
        tqdm(total=settings.steps, initial=step, desc=out.name, unit="step", mininterval=5, smoothing=0.05) as bar,
    ):
        while step < settings.steps and not stops:
            # One step. The generator depends on (seed, step) only, so a resumed run draws the same numbers.
            for group in optimizer.param_groups:
                group["lr"] = learning_rate_at(step, settings)
            loss, figures = stage.loss(step, generator_for(settings.seed, step))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(parameters.values(), settings.clip)
            finite = bool(torch.isfinite(loss)) and bool(torch.isfinite(norm))
            if finite:
                optimizer.step()
                non_finite = 0
                for name, value in averaged.items():
                    # Short averages first, so that the random start is forgotten.
                    decay = min(settings.ema, (step + 1) / (step + 10))
                    value.lerp_(parameters[name].detach(), 1.0 - decay)
            else:
                non_finite += 1
                log.warning(
                    "Step %d: loss %s, gradient norm %s; step skipped.", step, float(loss.detach()), float(norm)
                )
                if non_finite >= NON_FINITE_LIMIT:
                    raise FloatingPointError(
                        f"The loss was not finite in {NON_FINITE_LIMIT} steps in a row (last: step {step}). Lower "
                        f"--learning_rate or look for broken pictures in the data. The last snapshot in {out} is sound."
                    )
            step += 1

            # Log, look, save.
            figures = {"loss": float(loss.detach()), "norm": float(norm), **figures}
            rate = (step - first) / (time.monotonic() - began)
            row = {
                "step": step,
                "rate": round(rate, 4),
                **{k: round(v, 6) for k, v in figures.items() if math.isfinite(v)},
            }
            stats.write(json.dumps(row) + "\n")
            bar.set_postfix({k: f"{v:.4f}" for k, v in figures.items()}, refresh=False)
            bar.update()
            if settings.validate_every and step % settings.validate_every == 0:
                with torch.no_grad(), _swapped(parameters, averaged):
                    stats.write(json.dumps({"step": step, "validation": stage.validate(step, out)}) + "\n")
            if step % settings.snapshot_every == 0:
                stats.flush()
                save()
        if step > first:
            save()
    if step < settings.steps:
        log.info("Stopped at step %d of %d; run the same command again to continue.", step, settings.steps)
        return False
    with torch.no_grad(), _swapped(parameters, averaged):
        stage.finish(out)
    return True


def _forget_after(stats: Path, step: int) -> None:
    """Drop the rows of steps that a kill undid and that are now done again."""
    if stats.is_file():
        lines = stats.read_text(encoding="utf-8").splitlines()
        # A kill can also leave half a line at the end.
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
        stats.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")


@contextmanager
def _swapped(parameters: dict[str, torch.nn.Parameter], averaged: dict[str, Tensor]) -> Iterator[None]:
    """Show the averaged weights to whatever runs inside, then put the trained ones back."""
    kept = {name: parameters[name].detach().clone() for name in averaged}
    for name, value in averaged.items():
        parameters[name].data.copy_(value)
    try:
        yield
    finally:
        for name, value in kept.items():
            parameters[name].data.copy_(value)


def _start_from(source: Path, weights: dict[str, torch.nn.Parameter], averaged: dict[str, Tensor]) -> None:
    """Take the weights of a file or another run, averaged ones if it has them; its optimiser and steps stay there."""
    if source.is_file():
        found = weights_in(source)
    else:
        path = snapshot.latest(source)
        if path is None:
            raise snapshot.SnapshotError(f"--init={source} holds no snapshot to start from.")
        state = snapshot.read(path).tensors
        kinds = ("ema", "model", "held")
        found = {
            name: state[f"{kind}.{name}"] for kind in reversed(kinds) for name in weights if f"{kind}.{name}" in state
        }
    with torch.no_grad():
        for name, parameter in weights.items():
            stored = found.get(name)
            if stored is None or stored.shape != parameter.shape:
                raise snapshot.SnapshotError(f"--init={source} holds another model: {name} does not fit.")
            parameter.copy_(stored)
            if name in averaged:
                averaged[name].copy_(stored)


def _resume(
    out: Path,
    parameters: dict[str, torch.nn.Parameter],
    held: dict[str, torch.nn.Parameter],
    averaged: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    identity: dict[str, object],
) -> int:
    """Load the newest snapshot of `out` into everything that it decides; return the step to go on from."""
    path = snapshot.latest(out)
    if path is None:
        return 0
    state = snapshot.read(path)
    _check_same_run(state.settings, identity, out)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state.tensors[f"model.{name}"])
        for name, parameter in held.items():
            parameter.copy_(state.tensors[f"held.{name}"])
        for name, value in averaged.items():
            value.copy_(state.tensors[f"ema.{name}"])
    snapshot.restore_optimizer(optimizer, dict(parameters), state.tensors)
    log.info("Continuing %s from step %d.", out, state.step)
    return state.step
