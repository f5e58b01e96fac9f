"""The inspection command at tiny size: parts of the control, both forms of Diff, spectra and sheets."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from training import analysis, inspection
from training.clearsr_model import ClearSRModel
from training.pipeline import encode_lr


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two small pictures, and good partners of them."""
    noise = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    for name, size in {"hr": (128, 64), "lr": (32, 16)}.items():
        (tmp_path / name).mkdir()
        for picture, pixels in zip("ab", noise, strict=True):
            Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(tmp_path / name / f"{picture}.png")
    return tmp_path


def test_parts_are_what_the_model_adds(chain: Path) -> None:
    """DPM + SPM is the control itself, and window attention is seen once per layer."""
    model = ClearSRModel.from_checkpoint(chain / "nano" / "clearsr.safetensors")
    encoded = encode_lr(model, torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)))
    with inspection.window_attention_features(model) as attention:
        parts = inspection.control_parts(model, encoded, 300, 0)
    with torch.no_grad():
        whole = model.control(encoded.lr_latent, torch.tensor([300]), model.null_text.expand(1, -1, -1), None)
    for found, expected in zip(parts[inspection.WHOLE], (*whole.down, whole.mid), strict=True):
        assert torch.equal(found, expected[0])
    assert len(attention) == 7
    assert attention[0][0].shape[1:] == encoded.lr_latent.shape[2:]
    assert all(before.shape == after.shape for before, after in attention)
    with inspection.window_attention_features(model) as attention:
        pass
    inspection.control_parts(model, encoded, 300, 0)
    assert attention == []


def test_one_file(chain: Path, folder: Path) -> None:
    command = [f"--checkpoint={chain}/nano/clearsr.safetensors", f"--lr={folder}/lr", f"--out={folder}/out"]
    more = [f"--hr={folder}/hr", f"--results={folder}/hr", "--sheets=1", "--threads=1"]
    assert inspection.main([*command, *more]) == 0
    out = folder / "out"
    assert {path.name for path in out.glob("*.png")} == {"dkl.png", "pca_a.png", "spectrum_a.png", "spectra.png"}
    written = json.loads((out / "inspection.json").read_text(encoding="utf-8"))
    assert list(written["d_kl"]["checkpoint"]) == ["DPM", "SPM", "DPM + SPM"]
    assert "diff" not in written
    rows = list(csv.DictReader((out / "dkl.csv").open(encoding="utf-8")))
    assert len(rows) == 2 * 3 * 13
    spectra = list(csv.DictReader((out / "spectra.csv").open(encoding="utf-8")))
    assert {row["curve"] for row in spectra if row["of"] == "latents"} == {"x_lr", "HR", "result"}
    assert {float(row["log_power_minus_value_at_0"]) for row in spectra if float(row["frequency"]) == 0.0} == {0.0}


def test_two_files_differ_by_equation_5(chain: Path, folder: Path) -> None:
    """Diff is D_kl(against) - D_kl(checkpoint): 0 for a file against itself."""
    file = chain / "nano" / "clearsr.safetensors"
    command = [f"--checkpoint={file}", f"--against={file}", f"--lr={folder}/lr", f"--out={folder}/out", "--sheets=0"]
    assert inspection.main([*command, "--limit=1", "--threads=1"]) == 0
    written = json.loads((folder / "out" / "inspection.json").read_text(encoding="utf-8"))
    assert written["diff"]["pictures"] == {"a": 0.0}
    assert written["diff"]["above_zero"] == 0
    findings = inspection.Findings()
    findings.divergences += [
        ("a", "checkpoint", "DPM", [9.0, 9.0]),
        ("a", "checkpoint", inspection.WHOLE, [1.0, 2.0]),
        ("a", "against", "DPM", [3.0, 5.0]),
    ]
    assert inspection.differences(findings) == {"a": 2.5}


def test_missing_partners_and_impossible_times_are_told(
    chain: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    command = [f"--checkpoint={chain}/nano/clearsr.safetensors", f"--lr={folder}/lr", f"--out={folder}/out"]
    (folder / "hr" / "b.png").unlink()
    assert inspection.main([*command, f"--hr={folder}/hr"]) == 1
    assert "no HR picture for b" in caplog.text
    assert inspection.main([*command, "--timestep=1000"]) == 1
    assert "0 .. 999" in caplog.text


def test_curves_of_maps_of_two_sizes_are_averaged_on_the_smaller() -> None:
    rings = [analysis.relative_spectrum(torch.rand(2, side, side)) for side in (16, 8)]
    radii, values = inspection.mean_curve(rings)
    assert len(radii) == len(values) == 5
    assert values[-1] == pytest.approx(float(rings[0][1][-1] + rings[1][1][-1]) / 2)


def test_a_negative_limit_is_refused(chain: Path, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    command = [f"--checkpoint={chain}/nano/clearsr.safetensors", f"--lr={folder}/lr", f"--out={folder}/out"]
    assert inspection.main([*command, "--limit=-1", "--sheets=0"]) == 1
    assert "--limit=-1" in caplog.text
