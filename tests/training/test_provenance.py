"""What was made with other settings is refused, in words, and never mixed with what is made now."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from training import make_pairs, provenance, restore
from training.picture_files import write_png


def test_the_same_settings_go_on_and_others_are_named(tmp_path: Path) -> None:
    provenance.claim(tmp_path, {"steps": 7, "alphas": (0.0, 1.0)})
    provenance.claim(tmp_path, {"steps": 7, "alphas": (0.0, 1.0)})
    with pytest.raises(provenance.OtherSettingsError, match="another alphas, steps"):
        provenance.claim(tmp_path, {"steps": 8, "alphas": (0.0, 2.0)})
    with pytest.raises(provenance.OtherSettingsError, match="another seed"):
        provenance.claim(tmp_path, {"steps": 7, "alphas": (0.0, 1.0), "seed": 1})
    provenance.claim(tmp_path, {"steps": 7, "alphas": (0.0, 1.0)})


@pytest.mark.parametrize("damage", ["{", "[1]", ""])
def test_a_damaged_note_is_refused_in_words(tmp_path: Path, damage: str) -> None:
    (tmp_path / provenance.NAME).write_text(damage)
    with pytest.raises(provenance.OtherSettingsError, match="cannot be read: give another folder"):
        provenance.claim(tmp_path, {"steps": 7})


def test_records_name_files_without_their_place_and_are_told_apart_by_content(tmp_path: Path) -> None:
    folder, again = (
        small_pictures(tmp_path / "lr", "a.png", "b.png"),
        small_pictures(tmp_path / "again", "a.png", "b.png"),
    )
    pictures = {
        name: provenance.pictures_record(sorted(path.iterdir()))
        for name, path in {"lr": folder, "again": again}.items()
    }
    assert pictures["lr"]["folder"] == "lr"
    assert pictures["lr"]["files"] == ["a.png", "b.png"]
    file = provenance.file_record(folder / "a.png")
    assert file == {"file": "a.png", "sha256": provenance.sha256(folder / "a.png")}
    assert str(tmp_path) not in json.dumps([pictures, file])

    # Another folder of the same pictures is the same; another picture under the same name is not.
    def identity(table: dict[str, object]) -> object:
        return provenance.identity({"steps": 7, "lr": table, "more": {"deep": table}})

    assert identity(pictures["lr"]) == identity(pictures["again"])
    (again / "b.png").write_bytes((again / "a.png").read_bytes())
    assert identity(pictures["lr"]) != identity(provenance.pictures_record(sorted(again.iterdir())))


def small_pictures(folder: Path, *names: str) -> Path:
    folder.mkdir()
    for index, name in enumerate(names):
        pixels = np.random.default_rng(index).integers(0, 255, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    return folder


def test_results_of_other_settings_or_of_another_file_are_not_kept_as_these(
    chain: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = chain / "nano" / "clearsr.safetensors"
    command = [f"--lr={small_pictures(tmp_path / 'lr', 'a.png', 'b.png')}", f"--out={tmp_path}/sr", "--threads=1"]
    first = [*command, f"--checkpoint={file}", "--steps=1"]
    assert restore.main([*first, "--limit=1"]) == 0
    written = (tmp_path / "sr" / "a.png").stat().st_mtime_ns
    assert restore.main(first) == 0  # more pictures are no other settings
    assert (tmp_path / "sr" / "b.png").is_file()
    assert restore.main([*first, "--ela_strength=0.5"]) == 1
    assert "another ela_strength" in caplog.text
    (tmp_path / "other.safetensors").write_bytes(file.read_bytes() + b" ")
    assert restore.main([*command, "--steps=1", f"--checkpoint={tmp_path}/other.safetensors"]) == 1
    assert "another checkpoint" in caplog.text
    assert (tmp_path / "sr" / "a.png").stat().st_mtime_ns == written


def test_pictures_that_cannot_be_told_apart_or_read_are_named(
    chain: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    command = [f"--checkpoint={chain}/nano/clearsr.safetensors", f"--out={tmp_path}/sr", "--steps=1", "--threads=1"]
    assert restore.main([*command, f"--lr={tmp_path}/missing"]) == 1
    assert "missing is not a folder" in caplog.text
    assert restore.main([*command, f"--lr={small_pictures(tmp_path / 'twice', 'a.png', 'a.jpg')}"]) == 1
    assert "are called a. Rename all but one." in caplog.text
    broken = small_pictures(tmp_path / "broken", "a.png") / "a.png"
    broken.write_bytes(broken.read_bytes()[:60])
    assert restore.main([*command, f"--lr={broken.parent}"]) == 1
    assert f"{broken} cannot be read" in caplog.text


def test_pairs_of_another_degradation_are_not_mixed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "photographs").mkdir()
    Image.effect_noise((200, 200), 60).convert("RGB").save(tmp_path / "photographs" / "a.png")
    command = [f"--data={tmp_path}/photographs", f"--out={tmp_path}/pairs"]
    assert make_pairs.main([*command, "--degradation=light"]) == 0
    assert make_pairs.main([*command, "--degradation=paper"]) == 1
    assert "another degradation" in caplog.text


def test_a_picture_of_another_source_is_made_anew(chain: Path, tmp_path: Path) -> None:
    """Kept is what was made of the very same file; a result without the note is made anew too."""
    one, other = small_pictures(tmp_path / "one", "a.png", "b.png"), tmp_path / "other"
    other.mkdir()
    (other / "a.png").write_bytes((one / "b.png").read_bytes())
    (other / "b.png").write_bytes((one / "b.png").read_bytes())
    command = [f"--checkpoint={chain}/nano/clearsr.safetensors", f"--out={tmp_path}/sr", "--steps=1", "--threads=1"]
    assert restore.main([*command, f"--lr={one}"]) == 0
    results = {name: tmp_path / "sr" / f"{name}.png" for name in "ab"}
    first, kept = np.asarray(Image.open(results["a"])), results["b"].stat().st_mtime_ns
    assert restore.main([*command, f"--lr={other}"]) == 0
    assert not np.array_equal(np.asarray(Image.open(results["a"])), first)
    assert np.array_equal(np.asarray(Image.open(results["a"])), np.asarray(Image.open(results["b"])))
    assert results["b"].stat().st_mtime_ns == kept
    Image.new("RGB", (64, 64)).save(results["b"])
    assert restore.main([*command, f"--lr={other}"]) == 0
    assert np.array_equal(np.asarray(Image.open(results["a"])), np.asarray(Image.open(results["b"])))


def test_what_failed_before_its_first_picture_leaves_no_claim(
    chain: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = chain / "nano" / "clearsr.safetensors"
    (tmp_path / "wrong.safetensors").write_bytes(file.read_bytes()[:5000])
    command = [f"--lr={small_pictures(tmp_path / 'lr', 'a.png')}", f"--out={tmp_path}/sr", "--threads=1"]
    for wrong in (
        [f"--checkpoint={file}", "--steps=0"],
        [f"--checkpoint={file}", "--steps=1", "--denoise=2"],
        [f"--checkpoint={file}", "--steps=1", "--scale=0"],
        [f"--checkpoint={tmp_path}/wrong.safetensors", "--steps=1"],
    ):
        assert restore.main([*command, *wrong]) == 1
        assert not (tmp_path / "sr").exists()
    assert "--scale=0: give 1 or more" in caplog.text
    assert restore.main([*command, f"--checkpoint={file}", "--steps=1"]) == 0


def test_a_folder_or_nothing_in_place_of_the_file_is_told(
    chain: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    command = [f"--lr={small_pictures(tmp_path / 'lr', 'a.png')}", f"--out={tmp_path}/sr", "--steps=1"]
    assert restore.main([*command, f"--checkpoint={chain}/nano"]) == 1
    assert "nano is a folder; a .safetensors file is wanted" in caplog.messages[-1]
    assert restore.main([*command, f"--checkpoint={chain}/missing.safetensors"]) == 1
    assert "There is no file" in caplog.messages[-1]


def test_a_negative_limit_is_refused(chain: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    command = [f"--lr={small_pictures(tmp_path / 'lr', 'a.png', 'b.png')}", f"--out={tmp_path}/sr", "--steps=1"]
    assert restore.main([*command, f"--checkpoint={chain}/nano/clearsr.safetensors", "--limit=-1"]) == 1
    assert "--limit=-1" in caplog.text
    assert not (tmp_path / "sr").exists()


def test_pictures_say_what_they_were_made_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However large they are, and without a word for what is missing, damaged or has no note."""
    write_png(np.zeros((40, 40, 3), dtype=np.uint8), tmp_path / "a.png", "abc")
    write_png(np.zeros((4, 4, 3), dtype=np.uint8), tmp_path / "plain.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert provenance.is_made_from(tmp_path / "a.png", "abc")
    assert not provenance.is_made_from(tmp_path / "a.png", "abcd")
    assert not any(provenance.is_made_from(tmp_path / f"{name}.png", "abc") for name in ("plain", "broken", "none"))
