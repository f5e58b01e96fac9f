"""The training loop that every stage shares: step, guard, snapshot, progress; readable top to bottom."""

from __future__ import annotations

import dataclasses
import json
import logging
import signal
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor, nn
from tqdm import tqdm

from . import optimizer as optimizers
from . import parallel, run_folder, snapshot
from .base_model import load_autoencoder
from .clearsr_model import weights_in
from .latents import weights_hash

log = logging.getLogger("clearsr.training")

NON_FINITE_LIMIT = 5
# What may differ when a run goes on: it does not change what is trained, or only how long.
FREE = {
    *("steps", "device", "threads", "workers", "memory_gb"),
    *("snapshot_every", "validate_every", "keep", "best", "tensorboard"),
    *("accumulation", "checkpointing", "compile", "degrade_on"),
}

Batch = TypeVar("Batch", bound=tuple, covariant=True)


def check_counts(settings: object, **least: int) -> None:
    """Refuse settings that count something and are below the least they can be."""
    for name, number in least.items():
        if getattr(settings, name) < number:
            raise ValueError(f"--{name}={getattr(settings, name)}: give {number} or more.")


@dataclass(frozen=True)
class LoopSettings:
    """What the loop itself needs to know, whatever it trains."""

    stage = ""  # its name in presets; no setting

    steps: int  # of the optimiser, from the first on; a stopped run goes on to the same number
    learning_rate: float  # at its highest
    out: Path  # folder of the run: snapshots, log, and what comes out
    # A ClearSR file, an autoencoder's folder or that of another run, whose weights to start from; empty = from nothing.
    init: Path = Path()
    seed: int = 0  # of everything random
    batch: int = 8  # samples of one step, in all processes together
    accumulation: int = 1  # parts in which a process computes its share of the batch, to save memory
    warmup: int = 500  # steps from zero to the full learning rate
    decay: Literal["constant", "linear"] = "constant"  # the paper, or linear to zero at the last step
    optimizer: optimizers.Kind = "adamw"  # adamw8bit needs bitsandbytes and a GPU
    clip: float = 1.0  # largest gradient norm
    ema: float = 0.0  # decay of the averaged weights; 0 = off
    precision: Literal["float32", "bfloat16"] = "float32"  # of the forward pass; weights and moments are float32
    compile: bool = False  # torch.compile: minutes at the start, faster steps on a GPU
    snapshot_every: int = 500  # steps between two snapshots, from which a stopped run goes on
    keep: int = 2  # newest snapshots on disk
    best: Literal["none", "psnr", "ssim", "niqe"] = "none"  # also keep the snapshot with the best validation
    validate_every: int = 0  # 0 = never
    tensorboard: bool = False  # write curves into the folder `tensorboard` of the run
    threads: int = 0  # 0 = torch's default
    device: str = "cpu"  # cpu, or cuda: the GPU of this process

    def __post_init__(self) -> None:
        check_counts(self, batch=1, accumulation=1, snapshot_every=1, keep=1)
        check_counts(self, steps=0, warmup=0, validate_every=0, threads=0)
        if not (self.clip > 0.0 and self.learning_rate > 0.0):
            name = "clip" if self.learning_rate > 0.0 else "learning_rate"
            raise ValueError(f"--{name}={getattr(self, name)}: give a number above 0.")
        if not 0.0 <= self.ema < 1.0:
            raise ValueError(f"--ema={self.ema}: give 0 for off, or a number below 1, as 0.999.")
        if self.best != "none" and not self.validate_every:
            raise ValueError(f"--best={self.best} looks at validations: give --validate_every=STEPS.")


class Stage(Protocol[Batch]):
    """One thing to train: it says what moves, makes batches on the CPU, and its module turns them into a loss."""

    @property
    def module(self) -> nn.Module:
        """Holds every parameter that moves; module(batch) -> (loss, figures), scalars."""
        ...

    @property
    def given(self) -> dict[str, str]:
        """What the stage was given beside its settings, as pictures and models that hold still -> a digest of each."""
        ...

    @property
    def begun_from(self) -> dict[str, str]:
        """Where the stage itself took first weights from, as snapshots note it; empty: nowhere."""
        ...

    def trainable(self) -> dict[str, nn.Parameter]:
        """Return exactly the parameters that move, by the names under which they are stored."""
        ...

    def weights(self) -> dict[str, nn.Parameter]:
        """Return what `init` sets: the trainable parameters, and those of the same parts that are held still."""
        ...

    def start(self, rows: range) -> None:
        """Prepare for batches, of which this process computes `rows`; weights are in place."""
        ...

    def batch(self, step: int) -> Batch:
        """Return this process's rows of the batch of `step`; it follows from (seed, step).

        A NamedTuple of tensors (rows, ...), and of what all rows share.
        """
        ...

    def validate(self, step: int, folder: Path) -> dict[str, float]:
        """Write pictures to `folder` and return figures for the log."""
        ...

    def finish(self, folder: Path, made: dict[str, Any]) -> None:
        """Write what the next stage takes from `folder`; runs after the last step, with averaged weights.

        `made` says what it comes from, for whoever finds it: `snapshot.TrainingState.notes`.
        """
        ...


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


def refuse_other(settings: LoopSettings, identity: dict[str, object]) -> None:
    """Refuse to go on with a run of other settings, or beyond its end: at once, before anything is prepared.

    More steps and other hardware are not other settings.
    """
    path = snapshot.latest(settings.out)
    if path is not None:
        begun = snapshot.read_notes(path)
        _check_same_run(begun.settings, identity, settings.out)
        if begun.step > settings.steps:
            raise snapshot.SnapshotError(
                f"{settings.out} holds a run that has done {begun.step} steps, and --steps={settings.steps} asks for "
                f"fewer. Give --steps={begun.step} or more, or another --out; training.export makes a file of each of "
                "its snapshots."
            )


def _check_same_run(stored: dict[str, object], current: dict[str, object], folder: Path) -> None:
    differing = sorted(
        key for key in stored.keys() | current.keys() if key not in FREE and stored.get(key) != current.get(key)
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
    """Train in this process alone; see `run_with`."""
    with parallel.processes(settings.device, settings.precision) as accelerator:
        return run_with(accelerator, stage, settings, identity)


def run_with(accelerator: Accelerator, stage: Stage, settings: LoopSettings, identity: dict[str, object]) -> bool:
    """Train `stage` until `settings.steps`, continuing the newest snapshot in `settings.out`.

    Args:
        accelerator: the processes that share the work.
        stage: what to train.
        settings: how long, how fast, where.
        identity: everything that a snapshot must agree with to be continued.

    Returns:
        True when all steps are done, False when a signal ended the run early (state saved).
    """
    if settings.threads:
        torch.set_num_threads(settings.threads)
    rows = parallel.rows_of(accelerator, settings.batch, settings.accumulation)
    main, out = accelerator.is_main_process, settings.out
    with run_folder.only_writer(out) if main else nullcontext():
        # Weights: of the newest snapshot, else of `init`, else as the stage made them.
        given = stage.given
        state = _newest(settings, identity, given)
        step = state.step if state is not None else 0
        begun_from = state.begun_from if state is not None else stage.begun_from
        if state is not None:
            _take(state, "model", stage.trainable())
            _take(state, "held", _held(stage))
        elif settings.init != Path():
            begun_from = _start_from(settings.init, stage.weights())
        if state is not None and settings.init != Path():
            log.info(
                "--init=%s is where a run begins; %s has begun and goes on from its own weights.", settings.init, out
            )
        for name, parameter in stage.weights().items():
            parameter.requires_grad_(name in stage.trainable())
        optimizer = optimizers.build(settings.optimizer, stage.trainable().values(), settings.learning_rate)
        if main:
            # A launcher numbers the devices, and a command takes no number.
            run_folder.write_settings(
                out, settings.stage, dataclasses.replace(settings, device=accelerator.device.type)
            )
        with accelerator.local_main_process_first():  # the others find what the first one encoded
            stage.start(rows)

        # What the processes share: after `prepare` a parameter may be a part of itself.
        if settings.compile:
            stage.module.compile()
        module, optimizer = accelerator.prepare(stage.module, optimizer)
        parameters = stage.trainable()
        held = _held(stage)
        averaged = {name: value.detach().clone() for name, value in parameters.items()} if settings.ema else {}
        if state is not None:
            _take(state, "ema", averaged)
            snapshot.restore_optimizer(optimizer, parameters, state.tensors, parallel.like)
            state = None

        def save() -> Path:
            names = {id(parameter): name for name, parameter in parameters.items()}
            tensors = {f"model.{name}": parallel.whole(value) for name, value in parameters.items()}
            tensors |= {f"held.{name}": parallel.whole(value) for name, value in held.items()}
            tensors |= {f"ema.{name}": parallel.whole(value) for name, value in averaged.items()}
            tensors |= snapshot.optimizer_tensors(optimizer, names, parallel.whole)
            state = snapshot.TrainingState(step, tensors, identity, given, begun_from)
            return snapshot.write(out, state, settings.keep) if main else out

        def validate() -> dict[str, float]:
            # Averaged weights first: what is gathered are copies.
            with torch.no_grad(), _swapped(parameters, averaged), parallel.gathered(module):
                if main:
                    return stage.validate(step, out)
                if parallel.is_sharded(accelerator):  # every process has a part of what is needed
                    with tempfile.TemporaryDirectory() as nowhere:
                        return stage.validate(step, Path(nowhere))
            return {}

        non_finite = 0
        began, first = time.monotonic(), step
        with (
            _stop_requests() as stops,
            run_folder.Log(out, step, tensorboard=settings.tensorboard, active=main) as stats,
            tqdm(
                total=settings.steps, initial=step, desc=out.name, unit="step", mininterval=5, disable=not main
            ) as bar,
        ):
            bar.set_description(out.name)
            stop = False
            while step < settings.steps and not stop:
                # One step. Its batch depends on (seed, step) only, so a resumed run takes the same step.
                for group in optimizer.param_groups:
                    group["lr"] = optimizers.learning_rate_at(
                        step, settings.learning_rate, settings.warmup, settings.steps, settings.decay
                    )
                optimizer.zero_grad(set_to_none=True)
                loss, own = _gradients(accelerator, module, stage.batch(step), settings.accumulation)
                norm = parallel.whole(torch.nn.utils.clip_grad_norm_(parameters.values(), settings.clip))
                (mean_loss, *means), stop = parallel.means_and_any(
                    accelerator, torch.stack([loss, *own.values()]), bool(stops)
                )
                if torch.isfinite(norm) and torch.isfinite(torch.tensor(mean_loss)):
                    optimizer.step()
                    non_finite = 0
                    for name, value in averaged.items():
                        # Short averages first, so that the random start is forgotten.
                        decay = min(settings.ema, (step + 1) / (step + 10))
                        value.lerp_(parameters[name].detach(), 1.0 - decay)
                else:
                    non_finite += 1
                    log.warning("Step %d: loss %s, gradient norm %s; step skipped.", step, mean_loss, float(norm))
                    if non_finite >= NON_FINITE_LIMIT:
                        raise FloatingPointError(
                            f"The loss was not finite in {NON_FINITE_LIMIT} steps in a row (last: step {step}). Lower "
                            f"--learning_rate or look for broken pictures in the data. The last snapshot in {out} is "
                            "sound."
                        )
                step += 1

                # Log, look, save.
                figures = {"loss": mean_loss, "norm": float(norm), **dict(zip(own, means, strict=True))}
                pace = {
                    "learning_rate": optimizer.param_groups[0]["lr"],
                    "steps_per_second": (step - first) / (time.monotonic() - began),
                }
                stats.step(step, {**pace, **figures})
                bar.set_postfix({name: f"{value:.4f}" for name, value in figures.items()}, refresh=False)
                bar.update()
                better = False
                if settings.validate_every and step % settings.validate_every == 0:
                    paused = time.monotonic()
                    found = validate()
                    began += time.monotonic() - paused  # the rate is that of the steps
                    better = parallel.means_and_any(
                        accelerator, loss[None], main and _is_better(found, out, settings.best)
                    )[1]
                    stats.validation(step, found)
                if step % settings.snapshot_every == 0 or better:
                    stats.flush()
                    path = save()
                    if better and main:
                        snapshot.keep_as_best(path)
            if step > first:
                stats.flush()
                save()
        accelerator.wait_for_everyone()  # the snapshot is there for all of them
        if step < settings.steps:
            log.info("Stopped at step %d of %d; run the same command again to continue.", step, settings.steps)
            return False
        if main and not parallel.is_sharded(accelerator):
            with torch.no_grad(), _swapped(parameters, averaged):
                stage.finish(out, snapshot.TrainingState(step, {}, identity, given, begun_from).notes)
        accelerator.wait_for_everyone()
        return True


def finish_from_snapshot(stage: Stage, settings: LoopSettings, identity: dict[str, object]) -> None:
    """Write the result of a finished run from its newest snapshot, in one process: it is made of whole weights."""
    state = _newest(settings, identity, stage.given)
    if state is None:
        raise snapshot.SnapshotError(f"{settings.out} holds no snapshot to make a result of.")
    _take(state, "ema" if settings.ema else "model", stage.trainable())
    _take(state, "held", _held(stage))
    with torch.no_grad():
        stage.finish(settings.out, state.notes)


def _gradients(
    accelerator: Accelerator, module: nn.Module, batch: tuple[object, ...], parts: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the gradients of a batch in `parts` pieces; return its mean loss, and the means of its figures."""
    size = next(len(value) for value in batch if isinstance(value, Tensor)) // parts
    losses: list[Tensor] = []
    figures: dict[str, list[Tensor]] = {}
    for part in range(parts):
        share = slice(part * size, (part + 1) * size)
        piece = type(batch)(*(value[share] if isinstance(value, Tensor) else value for value in batch))  # type: ignore[call-arg]
        last = part == parts - 1
        # Gradients travel between the processes once, with the last piece.
        with nullcontext() if last else accelerator.no_sync(module):
            loss, found = module(send_to_device(piece, accelerator.device))
            (loss / parts).backward()
        losses.append(loss.detach().float())
        for name, value in found.items():
            figures.setdefault(name, []).append(value.detach().float())
    return torch.stack(losses).mean(), {name: torch.stack(values).mean() for name, values in figures.items()}


def _is_better(found: dict[str, float], out: Path, measure: str) -> bool:
    """Tell whether a validation beats all earlier ones of the run in `measure`."""
    if measure not in found:
        return False
    sign = -1.0 if measure == "niqe" else 1.0
    return all(sign * found[measure] > sign * value for value in run_folder.validations(out, measure))


@contextmanager
def _swapped(parameters: dict[str, nn.Parameter], averaged: dict[str, Tensor]) -> Iterator[None]:
    """Show the averaged weights to whatever runs inside, then put the trained ones back."""
    kept = {name: parameters[name].detach().clone() for name in averaged}
    for name, value in averaged.items():
        parameters[name].data.copy_(value)
    try:
        yield
    finally:
        for name, value in kept.items():
            parameters[name].data.copy_(value)


def _start_from(source: Path, weights: dict[str, nn.Parameter]) -> dict[str, str]:
    """Take the weights of a file, of an autoencoder's folder, or of another run, averaged ones if it has them.

    Returns:
        Name of the source, and a digest of the weights that were taken.
    """
    if source.is_file():
        found = weights_in(source)
    elif (source / "config.json").is_file():
        found = load_autoencoder(source).state_dict()
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
                there = "missing there" if stored is None else f"{'x'.join(map(str, stored.shape))} there"
                raise snapshot.SnapshotError(
                    f"--init={source} holds another model: {name} is {there}, "
                    f"{'x'.join(map(str, parameter.shape))} here. Give the settings that it was trained with (rank, "
                    "widths, parts), or another --init."
                )
            parameter.copy_(stored)
    return {"name": source.resolve().name, "weights": weights_hash(*weights.values())}


def _newest(
    settings: LoopSettings, identity: dict[str, object], given: dict[str, str]
) -> snapshot.TrainingState | None:
    """Return the newest snapshot of the run's folder, which must be of the same run, or None."""
    refuse_other(settings, identity)
    out = settings.out
    path = snapshot.latest(out)
    if path is None:
        return None
    state = snapshot.read(path)
    others = sorted(name for name in state.given.keys() | given.keys() if state.given.get(name) != given.get(name))
    if others:
        raise snapshot.SnapshotError(
            f"{out} holds a run on another {', another '.join(others)}. Give what it was begun with to go on, or "
            "another --out."
        )
    log.info("Continuing %s from step %d.", out, state.step)
    return state


def _held(stage: Stage) -> dict[str, nn.Parameter]:
    """Return the weights that a snapshot keeps although they do not move."""
    trainable = stage.trainable()
    return {name: value for name, value in stage.weights().items() if name not in trainable}


@torch.no_grad()
def _take(state: snapshot.TrainingState, kind: str, targets: Mapping[str, Tensor]) -> None:
    """Copy one kind of a snapshot's tensors into their places."""
    for name, target in targets.items():
        stored = state.tensors.get(f"{kind}.{name}")
        if stored is None or stored.shape != target.shape:
            raise snapshot.SnapshotError(
                f"The snapshot of step {state.step} is of another model: {name} does not fit. Give another --out."
            )
        target.copy_(parallel.like(stored, target))
