"""The inspection command at tiny size: parts of the control, both forms of Diff, spectra and sheets."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from training import analysis, inspection, models, provenance
from training.clearsr_model import ClearSRModel
from training.picture_files import read_pixels
from training.pipeline import encode_lr, pad_to_grid, upscale_lr


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


def test_the_file_says_what_it_is_of_and_gives_way_to_no_other(
    chain: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file, other = chain / "nano" / "clearsr.safetensors", folder / "other.safetensors"
    other.write_bytes(file.read_bytes())
    command = [f"--checkpoint={file}", f"--lr={folder}/lr", f"--out={folder}/out", "--limit=1", "--sheets=0"]
    whole = [*command, f"--against={other}", f"--hr={folder}/hr", f"--results={folder}/hr"]
    assert inspection.main([*whole, "--threads=1"]) == 0
    assert inspection.main([*whole, "--sheets=1"]) == 0  # the same again, and a sheet beside it
    text = (folder / "out" / "inspection.json").read_text(encoding="utf-8")
    settings = json.loads(text)["settings"]
    assert settings["checkpoint"] == {"file": "clearsr.safetensors", "sha256": provenance.sha256(file)}
    assert settings["against"] == {"file": "other.safetensors", "sha256": provenance.sha256(file)}
    for name in ("lr", "hr"):
        assert settings[name] == provenance.pictures_record([folder / name / "a.png"])
    assert settings["results"] == settings["hr"]
    assert str(folder) not in text

    other.write_bytes(file.read_bytes() + b" ")
    for changed, named in (
        ([*whole, f"--checkpoint={other}", f"--against={file}"], "another checkpoint:"),
        ([*whole, f"--against={other}"], "another against:"),
        ([*command, f"--against={file}"], "another hr, results:"),
        ([*whole, f"--against={file}", "--timestep=3"], "another timestep:"),
    ):
        assert inspection.main(changed) == 1
        assert named in caplog.messages[-1]
    assert (folder / "out" / "inspection.json").read_text(encoding="utf-8") == text


def test_a_failed_run_claims_nothing(chain: Path, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    command = [f"--lr={folder}/lr", f"--out={folder}/out"]
    assert inspection.main([*command, f"--checkpoint={chain}/nano"]) == 1
    assert "nano is a folder" in caplog.messages[-1]
    good = f"--checkpoint={chain}/nano/clearsr.safetensors"
    assert inspection.main([*command, good, f"--against={folder}/missing"]) == 1
    assert "There is no file" in caplog.messages[-1]
    assert not (folder / "out").exists()


@pytest.mark.parametrize("size", [(32, 16), (11, 9)])
def test_distances_of_both_encoders_from_the_good_picture(chain: Path, tmp_path: Path, size: tuple[int, int]) -> None:
    """E(LR) and E'(LR) against E(HR), and each other, on the same grid whatever the size."""
    model = ClearSRModel.from_checkpoint(chain / "nano" / "clearsr.safetensors")
    width, height = size
    noise = np.random.default_rng(0).integers(0, 256, (4 * height, 4 * width, 3), dtype=np.uint8)
    for name, sides in {"hr": (4 * width, 4 * height), "lr": size}.items():
        Image.fromarray(noise).resize(sides, Image.Resampling.BICUBIC).save(tmp_path / f"{name}.png")
    encoded = encode_lr(model, read_pixels(tmp_path / "lr.png"))
    found = inspection.encoder_distances(model, encoded, inspection.encode_good(model, tmp_path / "hr.png"))
    with torch.no_grad():
        wanted = models.encode(model.vae, pad_to_grid(read_pixels(tmp_path / "hr.png")) * 2.0 - 1.0)
        up = pad_to_grid(upscale_lr(read_pixels(tmp_path / "lr.png"), (4 * height, 4 * width))) * 2.0 - 1.0
        plain, adapted = models.encode(model.vae, up), model.lr_encoder(up)
    assert found == {
        "plain": pytest.approx(float((plain - wanted).square().mean())),
        "adapted": pytest.approx(float((adapted - wanted).square().mean())),
        "moved": pytest.approx(float((adapted - plain).square().mean())),
    }
    assert found["moved"] > 0.0


def test_distances_are_written_with_their_mean_difference(
    chain: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    file = chain / "nano" / "clearsr.safetensors"
    command = [f"--checkpoint={file}", f"--against={file}", f"--lr={folder}/lr", "--sheets=0", "--threads=1"]
    assert inspection.main([*command, f"--out={folder}/out", f"--hr={folder}/hr"]) == 0
    with (folder / "out" / "encoders.csv").open(encoding="utf-8") as written:
        rows = list(csv.DictReader(written))
    assert [(row["picture"], row["model"]) for row in rows] == [
        (name, model) for name in "ab" for model in ("checkpoint", "against")
    ]
    means = json.loads((folder / "out" / "inspection.json").read_text(encoding="utf-8"))["encoders"]
    assert means["checkpoint"] == means["against"]
    assert list(means["checkpoint"]) == ["plain", "adapted", "moved", "adapted_minus_plain"]
    ours = [row for row in rows if row["model"] == "checkpoint"]
    for key in ("plain", "adapted", "moved"):
        assert means["checkpoint"][key]["mean"] == pytest.approx(np.mean([float(row[key]) for row in ours]), abs=2e-6)
    gap = means["checkpoint"]["adapted"]["mean"] - means["checkpoint"]["plain"]["mean"]
    assert means["checkpoint"]["adapted_minus_plain"]["mean"] == pytest.approx(gap)
    assert means["checkpoint"]["adapted_minus_plain"]["count"] == 2
    assert "E' minus E" in caplog.text

    # Without good pictures there is nothing to be held against.
    assert inspection.main([*command, f"--out={folder}/alone", "--limit=1"]) == 0
    assert not (folder / "alone" / "encoders.csv").exists()
    assert "encoders" not in json.loads((folder / "alone" / "inspection.json").read_text(encoding="utf-8"))


def test_good_pictures_of_another_size_are_named_before_the_model_is_read(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Image.new("RGB", (128, 68)).save(folder / "hr" / "b.png")
    command = [f"--checkpoint={folder}/missing", f"--lr={folder}/lr", f"--out={folder}/out", f"--hr={folder}/hr"]
    assert inspection.main(command) == 1
    assert "b.png is 128 x 68 and b.png 32 x 16; expected 4 to 1." in caplog.messages[-1]


def test_pictures_too_small_to_say_much_are_named_once(
    chain: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Image.new("RGB", (64, 64), "red").save(folder / "lr" / "b.png")
    Image.new("RGB", (640, 63), "red").save(folder / "lr" / "c.png")
    inspection.warn_of_small([folder / "lr" / f"{name}.png" for name in "abc"])
    assert len(caplog.records) == 1
    assert "a.png (32 x 16), c.png (640 x 63)" in caplog.text
    assert "64 pixels" in caplog.text
    caplog.clear()
    inspection.warn_of_small([folder / "lr" / "b.png"])
    assert not caplog.records
    command = [f"--checkpoint={chain}/nano/clearsr.safetensors", f"--lr={folder}/lr", f"--out={folder}/out"]
    assert inspection.main([*command, "--limit=1", "--sheets=0", "--threads=1"]) == 0
    assert "a.png (32 x 16)" in caplog.text


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
