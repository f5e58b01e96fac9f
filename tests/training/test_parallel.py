"""One run in several processes: data parallel through the launcher, and with sharded weights, equals one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.training import sharded_run, toy
from training import loop, parallel, run_folder, snapshot, train

ROOT = Path(__file__).resolve().parents[2]


def launch(*arguments: str | Path) -> None:
    """Run a Python program in two processes on the CPU."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    # Both processes of a test share whatever cores there are.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, *map(str, arguments)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-3000:]


def losses(out: Path) -> list[float]:
    return [row["loss"] for row in run_folder.rows(out) if "loss" in row]


def test_two_processes_train_the_run_of_one(chain: Path, tmp_path: Path) -> None:
    """Same loss at every step to 1e-5, with the paper's rate; the second half is gone on with by the other number."""

    def settings(out: str, steps: int) -> list[str]:
        shared = ["--crop=64", "--batch=4", "--crops=0", "--validate_every=0", "--learning_rate=5e-5", "--warmup=500"]
        places = [f"--data={chain}/photographs", f"--base={chain}/base", f"--out={tmp_path / out}"]
        return ["--preset=nano", "--decay=constant", "--threads=1", f"--steps={steps}", *shared, *places]

    assert train.main(settings("one", 4)) == 0
    launch("-m", "training.train", *settings("two", 3), "--accumulation=2", "--validate_every=3")
    assert train.main(settings("two", 4)) == 0
    torch.testing.assert_close(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=0.0, atol=1e-5)
    one, two = (snapshot.read(tmp_path / out / "state_00000004.safetensors").tensors for out in ("one", "two"))
    for name, value in one.items():
        # Adam's first steps are the signs of gradients, so where one is almost zero only the rate bounds a weight.
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=4 * 5e-5 * 4 / 500, msg=name)


def test_sharded_weights_train_the_run_of_one_and_are_stored_whole(tmp_path: Path) -> None:
    """FSDP: a run that is stopped, gone on with and finished in two processes with parts of every weight each."""
    assert loop.run(sharded_run.Looking(), toy.settings(tmp_path / "one", **sharded_run.CHANGES), {})
    launch(sharded_run.__file__, tmp_path / "two")
    whole, sharded = (snapshot.read(tmp_path / out / "state_00000012.safetensors").tensors for out in ("one", "two"))
    assert whole.keys() == sharded.keys()
    for name, value in whole.items():
        torch.testing.assert_close(sharded[name], value, rtol=1e-4, atol=1e-6, msg=name)
    validated = [row for row in map(json.loads, (tmp_path / "two" / "stats.jsonl").open()) if "validation" in row]
    assert [row["step"] for row in validated] == [4, 8, 12]


def test_kinds_of_parallelism_that_the_loop_does_not_know_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "_KNOWN", set())
    with pytest.raises(ValueError, match="data parallel and FSDP"), parallel.processes("cpu", "float32"):
        pass
