"""The loop loses nothing: killed or stopped at any step and run again, it ends with the same weights, bit for bit."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from training import loop, run_folder, snapshot
from training.randomness import generator_for

ROOT = Path(__file__).resolve().parents[2]


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

    def finish(self, folder: Path) -> None:
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


def test_killed_and_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    """kill -9 in the middle of a step: only what came after the last snapshot is done again."""
    whole = settings(tmp_path / "whole")
    loop.run(Toy(), whole, {})
    script = (
        "import sys; sys.path[:0] = [sys.argv[1], sys.argv[1] + '/tests/training']\n"
        "from pathlib import Path\nimport test_loop\nfrom training import loop\n"
        "loop.run(test_loop.Toy(pause=0.05), test_loop.settings(Path(sys.argv[2])), {})\n"
    )
    killed = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, "-c", script, str(ROOT), str(killed)], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while snapshot.latest(killed) is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.wait()
    path = snapshot.latest(killed)
    assert path is not None
    assert snapshot.read(path).step < 30
    assert loop.run(Toy(), settings(killed), {})
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
        def finish(self, folder: Path) -> None:
            seen.update({name: value.detach().clone() for name, value in self.trainable().items()})

    loop.run(Looker(), settings(tmp_path), {})
    stored = final_state(tmp_path)
    for name, value in seen.items():
        assert torch.equal(value, stored[f"ema.{name}"])
        assert not torch.equal(value, stored[f"model.{name}"])


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
