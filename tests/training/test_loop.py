"""The loop loses nothing: killed or stopped at any step and run again, it ends with the same weights, bit for bit."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import random
import sys
import time
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.training.toy import Toy, ToyBatch, settings
from training import config, loop, optimizer, parallel, run_folder, snapshot


def final_state(out: Path) -> dict[str, Tensor]:
    path = snapshot.latest(out)
    assert path is not None
    return snapshot.read(path).tensors


@pytest.mark.parametrize("stop_at", [0, 6, 7, 19, 29])
def test_stopped_and_resumed_equals_uninterrupted(tmp_path: Path, stop_at: int) -> None:
    whole = settings(tmp_path / "whole")
    assert loop.run(Toy(), whole, loop.plain(whole))
    halves = settings(tmp_path / "halves")
    first = loop.run(Toy(stop_at=stop_at), halves, loop.plain(dataclasses.replace(halves, out=whole.out)))
    assert first is (stop_at == 29)
    assert loop.run(Toy(), halves, loop.plain(dataclasses.replace(halves, out=whole.out)))
    expected, found = final_state(whole.out), final_state(halves.out)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name


def life(out: Path) -> None:
    """Train until somebody kills this process."""
    torch.set_num_threads(1)
    loop.run(Toy(pause=0.01), settings(out, steps=200, snapshot_every=3), {})


def test_killed_at_twenty_random_moments_equals_uninterrupted(tmp_path: Path) -> None:
    """kill -9 at any moment, also while a snapshot is written: only what came after the last one is done again."""
    whole, killed = settings(tmp_path / "whole", steps=200, snapshot_every=3), tmp_path / "killed"
    loop.run(Toy(), whole, {})
    moments = random.Random(7)
    # A server that has imported torch already: a new life costs a fork, not seconds.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.training.toy"])
    kills = 0
    while kills < 20:
        process = context.Process(target=life, args=(killed,))
        process.start()
        seen, deadline = snapshot.latest(killed), time.monotonic() + 60
        while snapshot.latest(killed) == seen and process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.002)
        process.join(moments.uniform(0.0, 0.05))
        if not process.is_alive():
            break
        process.kill()
        process.join()
        kills += 1
    path = snapshot.latest(killed)
    assert kills == 20
    assert path is not None
    assert snapshot.read(path).step < 200
    assert loop.run(Toy(), settings(killed, steps=200, snapshot_every=3), {})
    for name, value in final_state(whole.out).items():
        assert torch.equal(value, final_state(killed)[name]), name


def test_one_bad_loss_is_skipped_many_stop_with_a_diagnosis(tmp_path: Path) -> None:
    assert loop.run(Toy(fail_at=frozenset({3, 9})), settings(tmp_path / "few"), {})
    assert all(torch.isfinite(value).all() for value in final_state(tmp_path / "few").values())
    with pytest.raises(FloatingPointError, match="learning_rate"):
        loop.run(Toy(fail_at=frozenset(range(10, 30))), settings(tmp_path / "many"), {})
    assert snapshot.latest(tmp_path / "many") is not None


def test_other_settings_refuse_to_continue(tmp_path: Path) -> None:
    first = settings(tmp_path, steps=8)
    loop.run(Toy(), first, loop.plain(first))
    longer = settings(tmp_path, steps=10)
    assert loop.run(Toy(), longer, loop.plain(longer))
    other = settings(tmp_path, steps=12, learning_rate=0.5)
    with pytest.raises(snapshot.SnapshotError, match=r"learning_rate: 0\.01 there, 0\.5 now"):
        loop.run(Toy(), other, loop.plain(other))


def test_fewer_steps_than_are_done_are_refused(tmp_path: Path) -> None:
    """Or the weights of step 8 were written as those of step 5."""
    loop.run(Toy(), settings(tmp_path, steps=8), {})
    again = Toy()
    with pytest.raises(snapshot.SnapshotError, match="done 8 steps, and --steps=5 asks for fewer"):
        loop.run(again, settings(tmp_path, steps=5), {})
    assert not again.finished
    assert loop.run(again, settings(tmp_path, steps=8), {})


def test_what_a_killed_process_left_goes_with_the_next_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Seven gigabytes each at the paper's size, under a name that no file manager shows."""
    loop.run(Toy(), settings(tmp_path, steps=7), {})
    left = tmp_path / ".state_00000008.safetensors.4711.part"
    left.write_bytes(b"half")
    other = tmp_path / ".exported.safetensors.4712.part"
    other.write_bytes(b"of a process that writes now")
    with caplog.at_level("INFO"):
        loop.run(Toy(), settings(tmp_path, steps=8), {})
    assert not left.exists()
    assert other.exists()
    assert f"Removed {left}" in caplog.text


def test_the_written_settings_name_a_device_that_a_command_takes(tmp_path: Path) -> None:
    """A launcher numbers the devices; --device=cuda:0 is refused."""
    numbered = settings(tmp_path, steps=1, device="cpu:0")
    with parallel.processes("cpu", "float32") as accelerator:
        loop.run_with(accelerator, Toy(), numbered, {})
    assert config.read_preset(str(tmp_path / "settings.toml"))["device"] == "cpu"


def test_the_log_says_with_which_learning_rate_each_step_was_taken(tmp_path: Path) -> None:
    own = settings(tmp_path)
    loop.run(Toy(), own, {})
    for row in run_folder.rows(tmp_path):
        expected = optimizer.learning_rate_at(row["step"] - 1, own.learning_rate, own.warmup, own.steps, own.decay)
        assert row["learning_rate"] == pytest.approx(expected, rel=1e-5)


def test_a_run_knows_what_its_first_weights_came_from(tmp_path: Path) -> None:
    """Also after a stop, when --init is no longer looked at."""
    made: list[dict[str, Any]] = []

    class Noting(Toy):
        def finish(self, folder: Path, made_now: dict[str, Any]) -> None:
            made.append(made_now)

    loop.run(Toy(), settings(tmp_path / "first", steps=4), {})
    loop.run(Noting(), settings(tmp_path / "second", steps=2, init=tmp_path / "first"), {"seed": 0})
    loop.run(Noting(), settings(tmp_path / "second", steps=4), {"seed": 0})
    loop.run(Noting(), settings(tmp_path / "alone", steps=2), {})
    begun, gone_on, alone = made
    assert begun["begun_from"]["name"] == "first"
    assert (begun["step"], gone_on["step"]) == (2, 4)
    assert begun["begun_from"] == gone_on["begun_from"]
    assert gone_on["given"] == {"set of numbers": "random"}
    assert gone_on["settings"] == {"seed": 0}
    assert "begun_from" not in alone


def test_full_disk_keeps_the_last_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop.run(Toy(), settings(tmp_path, steps=7), {})
    before = snapshot.latest(tmp_path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(snapshot, "save_file", full)
    with pytest.raises(snapshot.SnapshotError, match="free some space"):
        loop.run(Toy(), settings(tmp_path, steps=14), {})
    assert snapshot.latest(tmp_path) == before
    assert not list(tmp_path.glob("*.part"))


def test_finish_sees_the_averaged_weights(tmp_path: Path) -> None:
    seen: dict[str, Tensor] = {}

    class Looker(Toy):
        def finish(self, folder: Path, made: dict[str, Any]) -> None:
            seen.update({name: value.detach().clone() for name, value in self.trainable().items()})

    loop.run(Looker(), settings(tmp_path), {})
    stored = final_state(tmp_path)
    for name, value in seen.items():
        assert torch.equal(value, stored[f"ema.{name}"])
        assert not torch.equal(value, stored[f"model.{name}"])


def written_down(settings: loop.LoopSettings) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the toy's weights and their averages after the run of `settings`, by the formulas alone, in float64."""
    toy = Toy()
    toy.start(range(settings.batch))
    toy.module.double()
    values = {name: value.detach().clone() for name, value in toy.trainable().items()}
    averages = {name: value.clone() for name, value in values.items()}
    first, second = ({name: torch.zeros_like(value) for name, value in values.items()} for _ in range(2))
    for step in range(settings.steps):
        for name, parameter in toy.trainable().items():
            parameter.data.copy_(values[name])
            parameter.grad = None
        inputs, targets, broken = toy.batch(step)
        toy.module(ToyBatch(inputs.double(), targets.double(), broken))[0].backward()
        gradients = {name: parameter.grad.clone() for name, parameter in toy.trainable().items()}  # type: ignore[union-attr]
        norm = torch.cat([gradient.flatten() for gradient in gradients.values()]).norm()
        rate = settings.learning_rate * min(1.0, (step + 1) / settings.warmup)
        if settings.decay == "linear":
            rate *= (settings.steps - step) / settings.steps
        for name, gradient in gradients.items():
            clipped = gradient * min(1.0, settings.clip / norm)
            first[name] = 0.9 * first[name] + 0.1 * clipped
            second[name] = 0.999 * second[name] + 0.001 * clipped**2
            mean, square = first[name] / (1 - 0.9 ** (step + 1)), second[name] / (1 - 0.999 ** (step + 1))
            values[name] = values[name] - rate * mean / (square.sqrt() + 1e-8)
            kept = min(settings.ema, (step + 1) / (step + 10))
            averages[name] = kept * averages[name] + (1 - kept) * values[name]
    return values, averages


@pytest.mark.parametrize(
    "changes", [{"clip": 0.2}, {"decay": "constant", "clip": 100.0}, {"ema": 0.5}, {"steps": 3, "warmup": 10}]
)
def test_a_run_is_adam_with_clipping_schedule_and_average_as_written(
    tmp_path: Path, changes: dict[str, object]
) -> None:
    """Adam (beta 0.9, 0.999), the gradient's norm cut, warm-up, decay to zero, and the average that begins short."""
    ours = settings(tmp_path, **changes)
    loop.run(Toy(), ours, {})
    stored = final_state(tmp_path)
    values, averages = written_down(ours)
    for name, value in values.items():
        torch.testing.assert_close(stored[f"model.{name}"].double(), value, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(stored[f"ema.{name}"].double(), averages[name], rtol=1e-4, atol=1e-6)


def test_a_result_made_from_a_snapshot_is_of_the_averaged_weights(tmp_path: Path) -> None:
    for kind, ema in (("ema", 0.9), ("model", 0.0)):
        ours, toy = settings(tmp_path / kind, ema=ema), Toy()
        loop.run(Toy(), ours, {})
        loop.finish_from_snapshot(toy, ours, {})
        assert toy.finished
        stored = final_state(tmp_path / kind)
        assert all(torch.equal(value, stored[f"{kind}.{name}"]) for name, value in toy.trainable().items())
    with pytest.raises(snapshot.SnapshotError, match="no snapshot to make a result of"):
        loop.finish_from_snapshot(Toy(), settings(tmp_path / "nothing"), {})


def test_starting_from_another_run_takes_its_averaged_weights(tmp_path: Path) -> None:
    loop.run(Toy(), settings(tmp_path / "first"), {})
    stored = final_state(tmp_path / "first")
    begun = Toy()
    loop.run(begun, settings(tmp_path / "second", init=tmp_path / "first", steps=0), {})
    for name, value in begun.trainable().items():
        assert torch.equal(value, stored[f"ema.{name}"]), name
    with pytest.raises(snapshot.SnapshotError, match="holds no snapshot"):
        loop.run(Toy(), settings(tmp_path / "third", init=tmp_path / "nothing"), {})


def test_resumed_log_repeats_no_step(tmp_path: Path) -> None:
    loop.run(Toy(), settings(tmp_path, steps=7), {})
    with (tmp_path / "stats.jsonl").open("a", encoding="utf-8") as stats:
        stats.write('{"step": 8, "loss": 1.0}\n{"step": 9, "lo')  # what a kill leaves behind
    loop.run(Toy(), settings(tmp_path, steps=12), {})
    steps = [json.loads(line)["step"] for line in (tmp_path / "stats.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 13))


def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path: Path) -> None:
    for parts in (1, 2, 8):
        loop.run(Toy(), settings(tmp_path / str(parts), accumulation=parts), {})
    expected = final_state(tmp_path / "1")
    for parts in (2, 8):
        for name, value in final_state(tmp_path / str(parts)).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match=r"--batch=8 .* --accumulation=3"):
        loop.run(Toy(), settings(tmp_path / "3", accumulation=3), {})


def test_the_best_validation_is_kept_beyond_the_newest_snapshots(tmp_path: Path) -> None:
    """The toy's PSNR peaks at step 14; a run that was killed after it knows so too."""
    changes = {"validate_every": 2, "snapshot_every": 4, "best": "psnr", "keep": 3}
    for steps in (17, 30):
        loop.run(Toy(), settings(tmp_path, steps=steps, decay="constant", **changes), {})
    assert [path.name for path in sorted(tmp_path.glob("best_*"))] == ["best_00000014.safetensors"]
    assert snapshot.read(tmp_path / "best_00000014.safetensors").step == 14
    assert len(list(tmp_path.glob("state_*.safetensors"))) == 3
    assert max(run_folder.validations(tmp_path, "psnr")) == 0.0


@pytest.mark.parametrize(("measure", "kept"), [("psnr", 14), ("ssim", 14), ("niqe", 6)])
def test_the_best_is_the_highest_but_for_niqe_the_lowest(tmp_path: Path, measure: str, kept: int) -> None:
    class Measured(Toy):
        def validate(self, step: int, folder: Path) -> dict[str, float]:
            return {measure: float(-((step - 14) ** 2) if measure != "niqe" else (step - 6) ** 2)}

    loop.run(Measured(), settings(tmp_path, validate_every=2, best=measure), {})
    assert [path.name for path in tmp_path.glob("best_*")] == [f"best_{kept:08d}.safetensors"]


def test_one_folder_takes_one_run(tmp_path: Path) -> None:
    with (
        run_folder.only_writer(tmp_path),
        pytest.raises(snapshot.SnapshotError, match="Another run is writing"),
    ):
        loop.run(Toy(), settings(tmp_path), {})
    assert loop.run(Toy(), settings(tmp_path), {})


def test_curves_for_tensorboard_hold_every_step_once(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for steps in (7, 12):
        loop.run(Toy(), settings(tmp_path, steps=steps, tensorboard=True, validate_every=4), {})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(1, 13))
    assert [event.step for event in events.Scalars("validation/psnr")] == [4, 8, 12]


def test_half_precision_is_autocast_around_float32_weights(tmp_path: Path) -> None:
    seen = []

    class Looker(Toy):
        def batch(self, step: int) -> ToyBatch:
            self.module.network[0].register_forward_hook(lambda _module, _inputs, output: seen.append(output.dtype))
            return super().batch(step)

    assert loop.run(Looker(), settings(tmp_path, steps=1, precision="bfloat16"), {})
    assert seen[0] == torch.bfloat16
    assert {value.dtype for value in final_state(tmp_path).values()} == {torch.float32}


def test_compiled_modules_keep_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a backend that compiles nothing: what counts here is that the run stays the same run."""
    compiled = []

    def compile_in_place(module: nn.Module) -> None:
        compiled.append(module)
        module._compiled_call_impl = torch.compile(module._call_impl, backend="eager")

    monkeypatch.setattr(nn.Module, "compile", compile_in_place)
    loop.run(Toy(), settings(tmp_path / "compiled", compile=True), {})
    loop.run(Toy(), settings(tmp_path / "plain"), {})
    assert len(compiled) == 1
    expected, found = final_state(tmp_path / "plain"), final_state(tmp_path / "compiled")
    assert expected.keys() == found.keys()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


class EightBit(torch.optim.SGD):
    """Has the state of bitsandbytes' AdamW8bit: codes of 8 bits, their scales, and a plain number of steps."""

    def __init__(
        self, parameters: list[nn.Parameter], lr: float, betas: tuple[float, float], weight_decay: float
    ) -> None:
        assert betas == (0.9, 0.999)
        assert weight_decay == 0.0
        super().__init__(parameters, lr=lr)

    def step(self, closure: None = None) -> None:
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            state["step"] = state.get("step", 0) + 1
            assert isinstance(state["step"], int)
            codes = state.get("state1", torch.zeros(parameter.numel(), dtype=torch.uint8))
            assert codes.dtype == torch.uint8
            state["state1"] = codes + 3
            parameter.data.add_(codes.float().view_as(parameter), alpha=-1e-4 * state["step"])


def test_eight_bit_moments_are_stored_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = types.SimpleNamespace(optim=types.SimpleNamespace(AdamW8bit=EightBit))
    monkeypatch.setitem(sys.modules, "bitsandbytes", library)
    loop.run(Toy(), settings(tmp_path / "whole", steps=12, optimizer="adamw8bit"), {})
    for steps in (5, 12):
        loop.run(Toy(), settings(tmp_path / "halves", steps=steps, optimizer="adamw8bit"), {})
    expected, found = final_state(tmp_path / "whole"), final_state(tmp_path / "halves")
    assert expected.keys() == found.keys()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match="pip install bitsandbytes"):
        loop.run(Toy(), settings(tmp_path / "none", optimizer="adamw8bit"), {})


def test_a_run_on_other_pictures_or_models_is_not_continued(tmp_path: Path) -> None:
    class Elsewhere(Toy):
        @property
        def given(self) -> dict[str, str]:
            return {"set of numbers": "others"}

    loop.run(Toy(), settings(tmp_path, steps=8), {})
    with pytest.raises(snapshot.SnapshotError, match="a run on another set of numbers"):
        loop.run(Elsewhere(), settings(tmp_path, steps=10), {})
    assert loop.run(Toy(), settings(tmp_path, steps=10), {})


def test_a_snapshot_that_lacks_a_weight_is_refused_in_words(tmp_path: Path) -> None:
    loop.run(Toy(), settings(tmp_path, steps=7), {})
    path = snapshot.latest(tmp_path)
    assert path is not None
    state = snapshot.read(path)
    name = next(name for name in state.tensors if name.startswith("model."))
    for damaged in (None, torch.zeros(3, 3, 3)):
        tensors = {key: value for key, value in state.tensors.items() if key != name}
        if damaged is not None:
            tensors[name] = damaged
        snapshot.write(tmp_path, snapshot.TrainingState(7, tensors, state.settings, state.given))
        with pytest.raises(snapshot.SnapshotError, match="is of another model"):
            loop.run(Toy(), settings(tmp_path, steps=9), {})


def test_validation_gathers_the_averaged_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of sharded weights a copy is gathered: averages that come into the parts afterwards are not in it."""
    seen: list[bool] = []
    inside = [False]

    @contextmanager
    def swapped(*_: object) -> Iterator[None]:
        inside[0] = True
        yield
        inside[0] = False

    @contextmanager
    def gathered(_: object) -> Iterator[None]:
        seen.append(inside[0])
        yield

    monkeypatch.setattr(loop, "_swapped", swapped)
    monkeypatch.setattr(loop.parallel, "gathered", gathered)
    loop.run(Toy(), settings(tmp_path, steps=4, validate_every=2), {})
    assert seen == [True, True]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"snapshot_every": 0}, "--snapshot_every=0"),
        ({"batch": 0}, "--batch=0"),
        ({"accumulation": 0}, "--accumulation=0"),
        ({"keep": 0}, "--keep=0"),
        ({"steps": -1}, "--steps=-1"),
        ({"best": "ssim"}, "--validate_every"),
        ({"clip": 0.0}, "--clip=0.0"),
        ({"clip": -1.0}, "--clip=-1.0"),
        ({"learning_rate": 0.0}, "--learning_rate=0.0"),
        ({"ema": 1.5}, "--ema=1.5"),
        ({"warmup": -5}, "--warmup=-5"),
    ],
)
def test_settings_that_cannot_be_are_refused_at_once(tmp_path: Path, changes: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        settings(tmp_path, **changes)


def test_figures_are_those_of_the_whole_batch(tmp_path: Path) -> None:
    """Not of the part that was computed last."""

    class Telling(Toy):
        def __init__(self) -> None:
            super().__init__()
            forward = self.module.forward

            def with_figure(batch: ToyBatch) -> tuple[Tensor, dict[str, Tensor]]:
                return forward(batch)[0], {"first input": batch.inputs[:, 0].mean()}

            self.module.forward = with_figure  # type: ignore[method-assign]

    for parts in (1, 4):
        loop.run(Telling(), settings(tmp_path / str(parts), steps=3, accumulation=parts), {})
    whole, pieces = (
        [row["first input"] for row in run_folder.rows(tmp_path / parts) if "first input" in row]
        for parts in ("1", "4")
    )
    assert len(whole) == 3
    assert pieces == pytest.approx(whole, rel=1e-4, abs=1e-6)


def test_a_run_that_goes_on_says_that_init_is_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    loop.run(Toy(), settings(tmp_path / "first", steps=4), {})
    loop.run(Toy(), settings(tmp_path / "second", steps=2, init=tmp_path / "first"), {})
    with caplog.at_level("INFO"):
        loop.run(Toy(), settings(tmp_path / "second", steps=4, init=tmp_path / "first"), {})
    assert f"--init={tmp_path / 'first'} is where a run begins" in caplog.text


def test_the_rate_is_that_of_the_steps(tmp_path: Path) -> None:
    class Slow(Toy):
        def validate(self, step: int, folder: Path) -> dict[str, float]:
            time.sleep(0.5)
            return super().validate(step, folder)

    loop.run(Slow(), settings(tmp_path, steps=4, validate_every=1), {})
    rates = [row["steps_per_second"] for row in run_folder.rows(tmp_path) if "steps_per_second" in row]
    assert rates[-1] > 8.0  # with the two seconds of looking it would be below 2


def test_a_device_that_is_not_there_is_refused(tmp_path: Path) -> None:
    absent = "mps" if torch.cuda.is_available() else "cuda"  # no machine has both
    with pytest.raises(ValueError, match="finds no such device"):
        loop.run(Toy(), settings(tmp_path, device=absent), {})
    with pytest.raises(ValueError, match="CUDA_VISIBLE_DEVICES"):
        loop.run(Toy(), settings(tmp_path, device="cuda:1"), {})
    assert loop.run(Toy(), settings(tmp_path), {})  # nothing is left behind
