"""The benchmark's plain loop has the mathematics of the real one, and its table compares within a round."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from training import bench, config, train
from training.clearsr import ClearSRSettings, ClearSRStage


def settings(chain: Path, out: Path) -> ClearSRSettings:
    values = {"data": chain / "photographs", "base": chain / "base", "cache": chain / "latents.safetensors"}
    small = {"crop": 64, "batch": 2, "crops": 4, "steps": 3, "learning_rate": 1e-4, "prompt_dropout": 0.0, "threads": 1}
    return config.build(ClearSRSettings, {**values, **small, "out": out})


def test_the_plain_loop_moves_the_same_parameters(chain: Path, tmp_path: Path) -> None:
    stage = ClearSRStage(settings(chain, tmp_path))
    before = {name: value.detach().clone() for name, value in stage.module.named_parameters()}
    for step, _ in enumerate(bench.plain_steps(stage)):
        if step == 3:
            break
    moving = {id(value) for value in stage.trainable().values()}
    after = dict(stage.module.named_parameters())
    moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert moved
    assert moved <= {name for name, value in after.items() if id(value) in moving}


def test_both_ways_are_measured(chain: Path, tmp_path: Path) -> None:
    for way in (bench.PLAIN, "ours"):
        turn = bench.measure(way, settings(chain, tmp_path / way))
        assert turn.rate > 0
        assert turn.data_rate > 0
        assert turn.memory > 0


def test_every_turn_has_a_folder_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A turn in the folder of another would find a finished run, and no step to time."""
    folders: list[object] = []

    def child(way: str, values: dict[str, object]) -> bench.Turn:
        folders.append(values["out"])
        return bench.Turn(1.0, 2**30, 1.0)

    monkeypatch.setattr(bench, "_child", child)
    turns = bench.run(bench.BenchSettings(rounds=2))
    assert set(turns) == {bench.PLAIN, *bench.WAYS}
    assert len(set(folders)) == len(folders) == 2 * len(turns)


def test_ratios_are_of_one_round() -> None:
    """A machine that halves its pace in the second round changes no ratio."""
    turns = {
        bench.PLAIN: [bench.Turn(1.0, 2**31, 5.0), bench.Turn(0.5, 2**31, 5.0)],
        "ours": [bench.Turn(3.0, 2**30, 5.0), bench.Turn(1.5, 2**30, 5.0)],
    }
    assert bench.table(turns).splitlines()[-1] == "| ours | 2.250 | 3.00 | 1.00 | 0.50 | 5.0 |"


def test_a_dry_run_plans_and_leaves_nothing(chain: Path, tmp_path: Path, caplog) -> None:
    command = ["--preset=nano", f"--data={chain}/photographs", f"--base={chain}/base", "--crop=64", "--crops=4"]
    with caplog.at_level("INFO"):
        assert train.main([*command, f"--out={tmp_path / 'run'}", "--dry-run"]) == 0
    assert "steps in an epoch" in caplog.text
    assert "DPM" in caplog.text
    assert not (tmp_path / "run").exists()


def test_every_way_can_be_asked_for_by_its_name():
    names = (*bench.WAYS, *bench.GPU_WAYS)
    for asked in ((names[0],), names):
        settings = config.build(bench.BenchSettings, config.parse_overrides([f"--ways={','.join(asked)}"]))
        assert settings.ways == asked
