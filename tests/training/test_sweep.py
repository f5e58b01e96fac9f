"""The sweep of alpha and beta: shared work changes no bit, a stopped run goes on, and files that can be read."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clearsr_core.lsa import LSAConfig
from training import restore as restore_command
from training import sweep
from training.clearsr_model import ClearSRModel
from training.picture_files import read_rgb, to_bytes
from training.pipeline import ColorFix, encode_lr, restore
from training.provenance import pictures_record, sha256

STEPS = 4
PHASES = {"ela_end": 0.25, "lla_start": 0.5}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One pair, 96 x 192 and 24 x 48: the smallest that NIQE takes."""
    root = tmp_path_factory.mktemp("pairs")
    noise = np.random.default_rng(0).integers(0, 256, (96, 192, 3), dtype=np.uint8)
    for name, size in {"hr": (192, 96), "lr": (48, 24)}.items():
        (root / name).mkdir()
        Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(root / name / "a.png")
    return root


def command(chain: Path, pairs: Path, out: Path, *more: str) -> list[str]:
    shared = [f"--checkpoint={chain}/nano/clearsr.safetensors", f"--lr={pairs}/lr", f"--out={out}", "--threads=1"]
    return [*shared, f"--steps={STEPS}", *(f"--{key}={value}" for key, value in PHASES.items()), *more]


@pytest.fixture(scope="module")
def model(chain: Path) -> ClearSRModel:
    return ClearSRModel.from_checkpoint(chain / "nano" / "clearsr.safetensors")


@pytest.mark.parametrize(
    ("ela_end", "lla_start", "accumulate", "denoise", "color_fix"),
    [
        (0.3, 0.5, "per_step", 1.0, "none"),
        (0.3, 0.5, "over_phase", 0.4, "wavelet"),
        (0, 0, "per_step", 1.0, "none"),
    ],
)
def test_shared_work_changes_no_bit(
    model: ClearSRModel, ela_end: float, lla_start: float, accumulate: str, denoise: float, color_fix: ColorFix
) -> None:
    """A late phase of two steps of three, by both rules of strength, part of the way too; and one from the first on."""
    image = torch.rand(1, 3, 12, 10, generator=torch.Generator().manual_seed(0))
    grid = [LSAConfig(0.2, beta, ela_end, lla_start, accumulate) for beta in (0.3, 0.0)]  # type: ignore[arg-type]
    shared = list(sweep.over_betas(model, encode_lr(model, image), 5, 3, grid, denoise, color_fix))
    for lsa, result in zip(grid, shared, strict=True):
        assert torch.equal(result, restore(model, image, 5, steps=3, denoise=denoise, lsa=lsa, color_fix=color_fix))
    assert not torch.equal(*shared)


def test_settings_that_share_nothing_are_refused(model: ClearSRModel) -> None:
    with pytest.raises(ValueError, match="more than beta"):
        next(sweep.over_betas(model, None, 0, 3, [LSAConfig(0.1, 0.1), LSAConfig(0.2, 0.1)]))  # type: ignore[arg-type]


def test_the_command_gives_the_pictures_of_restore_and_goes_on(
    chain: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "sweep"
    arguments = command(chain, pairs, out, f"--hr={pairs}/hr", "--efflite=false", "--alphas=0,0.1")
    assert sweep.main([*arguments, "--betas=0"]) == 0
    first = {path: path.stat().st_mtime_ns for path in out.glob("alpha*/*.png")}
    assert len(first) == 2

    # A finer grid restores only what is new.
    made: list[float] = []
    over_betas = sweep.over_betas
    monkeypatch.setattr(
        sweep, "over_betas", lambda *given: (made.extend(lsa.lla_strength for lsa in given[4]), over_betas(*given))[1]
    )
    assert sweep.main([*arguments, "--betas=0,0.3"]) == 0
    assert made == [0.3, 0.3]
    assert all(path.stat().st_mtime_ns == time for path, time in first.items())

    # The same picture as by `training.restore`.
    strengths = ["--ela_strength=0.1", "--lla_strength=0.3"]
    assert restore_command.main(command(chain, pairs, tmp_path / "restored", *strengths)) == 0
    assert np.array_equal(read_rgb(tmp_path / "restored" / "a.png"), read_rgb(out / "alpha0.1_beta0.3" / "a.png"))

    # What is written.
    rows = list(csv.DictReader((out / "sweep.csv").open(encoding="utf-8")))
    assert [(row["alpha"], row["beta"]) for row in rows] == [
        ("0.0", "0.0"),
        ("0.0", "0.3"),
        ("0.1", "0.0"),
        ("0.1", "0.3"),
    ]
    table = json.loads((out / "sweep.json").read_text(encoding="utf-8"))
    assert table["grid"][3]["psnr"] == float(rows[3]["psnr"])
    assert str(tmp_path) not in json.dumps(table)
    # Both files say which model and which pictures they are of.
    file = chain / "nano" / "clearsr.safetensors"
    evaluation = json.loads((out / "evaluation.json").read_text(encoding="utf-8"))
    assert evaluation["settings"] == table["settings"]
    assert table["settings"]["checkpoint"] == {"file": "clearsr.safetensors", "sha256": sha256(file)}
    for name in ("hr", "lr"):
        assert table["settings"][name] == pictures_record([pairs / name / "a.png"])
    for name in ("sweep_alpha", "sweep_beta", "sweep_grid"):
        assert Image.open(out / f"{name}.png").size > (300, 200)

    # Pictures of another run are not mixed in.
    assert sweep.main([*arguments, "--seed=3"]) == 1
    assert "another seed" in caplog.text


@pytest.mark.parametrize(("wrong", "message"), [("--alphas=", "--alphas"), ("--betas=0.1,0.1", "--betas")])
def test_a_grid_without_places_or_with_equal_ones_is_refused(
    chain: Path, pairs: Path, tmp_path: Path, wrong: str, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert sweep.main(command(chain, pairs, tmp_path, f"--hr={pairs}/hr", wrong)) == 1
    assert message in caplog.text


def test_pixels_are_rounded_as_always() -> None:
    pixels = torch.tensor([0.0, 0.5, 1.0]).expand(3, 1, 3)
    assert to_bytes(pixels)[0, :, 0].tolist() == [0, 128, 255]


def test_pictures_of_another_source_are_made_anew_and_a_failed_run_claims_nothing(
    chain: Path, pairs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "sweep"
    more = [f"--hr={pairs}/hr", "--efflite=false", "--alphas=0", "--betas=0", "--steps=1"]
    assert sweep.main(command(chain, pairs, out, *more, "--steps=0")) == 1
    assert sweep.main(command(chain, pairs, out, *more, f"--checkpoint={chain}/nano")) == 1
    assert "nano is a folder" in caplog.messages[-1]
    assert sweep.main(command(chain, pairs, out, *more, "--limit=-1")) == 1
    assert not out.exists()
    assert sweep.main(command(chain, pairs, out, *more)) == 0
    picture = out / "alpha0_beta0" / "a.png"
    first, time = read_rgb(picture), picture.stat().st_mtime_ns
    assert sweep.main(command(chain, pairs, out, *more)) == 0
    assert picture.stat().st_mtime_ns == time
    (tmp_path / "lr").mkdir()
    Image.new("RGB", (48, 24), "red").save(tmp_path / "lr" / "a.png")
    assert sweep.main(command(chain, pairs, out, *more, f"--lr={tmp_path}/lr")) == 0
    assert not np.array_equal(read_rgb(picture), first)


def test_sizes_are_checked_before_the_first_picture(
    chain: Path, pairs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "lr").mkdir()
    Image.new("RGB", (48, 25)).save(tmp_path / "lr" / "a.png")
    more = [f"--hr={pairs}/hr", f"--lr={tmp_path}/lr", "--efflite=false"]
    assert sweep.main(command(chain, pairs, tmp_path / "out", *more)) == 1
    assert "a.png is 192 x 96" in caplog.text
    assert not (tmp_path / "out").exists()
