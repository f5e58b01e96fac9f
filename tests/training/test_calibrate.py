"""Calibration of the phase limits: the rule on made-up curves, the curve of a model, and honest words without one."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from clearsr_core.lsa import LSAConfig, phase
from training import calibrate
from training.calibrate import phase_limits, watched_steps
from training.clearsr_model import ClearSRModel
from training.picture_files import to_bytes
from training.pipeline import restore
from training.provenance import sha256


@given(st.integers(3, 200).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n - 1), st.integers(2, n))))
def test_limits_of_a_curve_with_one_peak_are_the_phases_of_the_sampler(shape: tuple[int, int, int]) -> None:
    """NIQE rises to step `peak` and is under NIQE(HR) from step `crossing` on: LSA then acts just there."""
    steps, peak, crossing = shape
    crossing = max(crossing, peak + 1)
    curve = {
        step: 6.0 + step / peak if step <= peak else 7.0 - 0.5 * step / steps if step < crossing else 4.0
        for step in range(1, steps + 1)
    }
    limits = phase_limits(curve, 5.0, steps)
    assert limits.ela_end is not None
    assert limits.lla_start is not None
    lsa = LSAConfig(0.01, 0.01, limits.ela_end, limits.lla_start)
    phases = [phase(step, steps, lsa) for step in range(steps)]
    assert phases == ["early"] * peak + ["middle"] * (crossing - 1 - peak) + ["late"] * (steps - crossing + 1)


@given(st.lists(st.floats(1.0, 20.0), min_size=1, max_size=60), st.floats(1.0, 20.0))
def test_any_curve_gives_limits_in_order_or_says_why_not(values: list[float], niqe_hr: float) -> None:
    limits = phase_limits(dict(enumerate(values, start=1)), niqe_hr, len(values))
    assert limits.ela_end is not None
    assert max(values) == values[round(limits.ela_end * len(values)) - 1]
    if limits.lla_start is None:
        assert limits.notes
    else:
        assert limits.ela_end <= limits.lla_start < 1.0
        assert values[round(limits.lla_start * len(values))] < niqe_hr


@pytest.mark.parametrize(
    ("values", "niqe_hr", "note"),
    [
        ([5, 8, 7, 6], 4.0, "does not fall below"),
        ([5, 8, 7, 6], 9.0, "whole curve lies below"),
        ([5, 6, 7, 8], 4.0, "highest at the last"),
        ([8, 7, 6, 5], 5.5, "highest at the first"),
        ([5, 8, 3, 6], 4.0, "above NIQE(HR) again"),
        ([5, 8, 3, 3], math.nan, "not known"),
        ([math.nan], 4.0, "No step has"),
    ],
)
def test_odd_curves_are_told(values: list[float], niqe_hr: float, note: str) -> None:
    assert any(note in text for text in phase_limits(dict(enumerate(values, 1)), niqe_hr, len(values)).notes)


def test_a_plain_curve_has_no_notes() -> None:
    assert phase_limits({1: 5.0, 2: 8.0, 3: 6.0, 4: 3.0}, 4.0, 4) == calibrate.PhaseLimits(0.5, 0.75)


@given(st.integers(1, 100), st.integers(1, 120))
def test_watched_steps_hold_both_ends(steps: int, every: int) -> None:
    watched = watched_steps(steps, every)
    assert watched[0] == 1
    assert watched[-1] == steps
    assert all(step % every == 0 for step in watched[1:-1])


@pytest.mark.parametrize("of", ["x0", "state"])
def test_the_last_picture_is_the_result_of_the_sampler(chain: Path, of: str) -> None:
    model = ClearSRModel.from_checkpoint(chain / "nano" / "clearsr.safetensors")
    image = torch.rand(1, 3, 12, 10, generator=torch.Generator().manual_seed(0))
    pictures = dict(calibrate.step_pictures(model, image, 2, 3, 2, of))  # type: ignore[arg-type]
    assert sorted(pictures) == [1, 2, 3]
    # The last step adds no noise: its state and its estimate of x_0 are the same to rounding.
    difference = pictures[3].astype(int) - to_bytes(restore(model, image, 2, steps=3)[0])
    assert np.abs(difference).max() <= (0 if of == "state" else 1)


def test_the_command_writes_the_curve(chain: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    noise = np.random.default_rng(0).integers(0, 256, (96, 192, 3), dtype=np.uint8)
    for name, size in {"hr": (192, 96), "lr": (48, 24)}.items():
        (tmp_path / name).mkdir()
        Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(tmp_path / name / "a.png")
    command = [f"--checkpoint={chain}/nano/clearsr.safetensors", f"--lr={tmp_path}/lr", f"--out={tmp_path}/out"]
    command += ["--steps=3", "--threads=1"]
    assert calibrate.main(command) == 1
    assert "--niqe_hr=NUMBER" in caplog.text
    assert calibrate.main([*command, f"--hr={tmp_path}/hr"]) == 0
    written = json.loads((tmp_path / "out" / "calibration.json").read_text(encoding="utf-8"))
    assert set(written["curves"]) == {"niqe", "psnr"}
    assert list(written["curves"]["psnr"]) == ["1", "2", "3"]
    assert written["pictures"] == 1
    assert "ela_end" in caplog.text
    assert Image.open(tmp_path / "out" / "calibration.png").size > (300, 200)
    other = [*command, f"--out={tmp_path}/other", "--niqe_hr=4.5", "--every=3"]
    assert calibrate.main(other) == 0
    written = json.loads((tmp_path / "other" / "calibration.json").read_text(encoding="utf-8"))
    assert (set(written["curves"]), list(written["curves"]["niqe"]), written["niqe_hr"]) == ({"niqe"}, ["1", "3"], 4.5)


def test_the_file_says_what_it_is_of_and_gives_way_to_no_other(
    chain: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (96, 192, 3), dtype=np.uint8)
    for name, size in {"hr": (192, 96), "lr": (48, 24)}.items():
        (tmp_path / name).mkdir()
        Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(tmp_path / name / "a.png")
    file = chain / "nano" / "clearsr.safetensors"
    command = [f"--checkpoint={file}", f"--lr={tmp_path}/lr", f"--out={tmp_path}/out", "--steps=1"]
    measured = [*command, f"--hr={tmp_path}/hr"]
    assert calibrate.main([*measured, "--threads=1"]) == 0
    assert calibrate.main(measured) == 0  # the same again
    text = (tmp_path / "out" / "calibration.json").read_text(encoding="utf-8")
    settings = json.loads(text)["settings"]
    assert settings["checkpoint"] == {"file": "clearsr.safetensors", "sha256": sha256(file)}
    assert (settings["lr"]["folder"], settings["lr"]["files"]) == ("lr", ["a.png"])
    assert settings["hr"]["sha256"] != settings["lr"]["sha256"]
    assert settings["niqe_hr"] is None
    assert str(tmp_path) not in text

    (tmp_path / "other.safetensors").write_bytes(file.read_bytes() + b" ")
    for more, named in (
        ([f"--checkpoint={tmp_path}/other.safetensors"], "another checkpoint:"),
        (["--steps=2"], "another steps:"),
        (["--niqe_hr=4.5"], "another niqe_hr:"),
    ):
        assert calibrate.main([*measured, *more]) == 1
        assert named in caplog.messages[-1]
    assert (tmp_path / "out" / "calibration.json").read_text(encoding="utf-8") == text
    Image.new("RGB", (48, 24), "red").save(tmp_path / "lr" / "a.png")
    assert calibrate.main(measured) == 1
    assert "another lr:" in caplog.messages[-1]


def test_sizes_are_checked_before_the_model_is_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name, (width, height) in {"hr": (192, 96), "lr": (48, 25)}.items():
        (tmp_path / name).mkdir()
        Image.new("RGB", (width, height)).save(tmp_path / name / "a.png")
    command = [f"--checkpoint={tmp_path}/missing", f"--lr={tmp_path}/lr", f"--out={tmp_path}/out"]
    assert calibrate.main([*command, f"--hr={tmp_path}/hr"]) == 1
    assert "a.png is 192 x 96 and a.png 48 x 25; expected 4 to 1" in caplog.messages[-1]
    Image.new("RGB", (47, 24)).save(tmp_path / "lr" / "a.png")
    assert calibrate.main([*command, "--niqe_hr=4"]) == 1
    assert "a.png is 47 x 24" in caplog.messages[-1]
    assert "24 x 48" in caplog.messages[-1]
    Image.new("RGB", (48, 24)).save(tmp_path / "lr" / "a.png")
    assert calibrate.main([*command, "--niqe_hr=4", "--limit=-1"]) == 1
    assert "--limit=-1" in caplog.messages[-1]
