"""Pictures are found again whole, changed, mirrored and as parts of others; other pictures are not."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from training import overlap
from training.synthetic import DeadLeaves


@pytest.fixture(scope="module")
def leaves() -> list[np.ndarray]:
    """Four pictures that share nothing."""
    source = DeadLeaves(256)
    return [np.asarray(Image.open(source.open(index)).convert("RGB")) for index in range(4)]


def jpeg(image: Image.Image, quality: int = 60) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(io.BytesIO(file.getvalue()))


CHANGES = {
    "smaller, as JPEG": lambda image: jpeg(image.resize((300, 300), Image.Resampling.BICUBIC)),
    "mirrored": lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    "brighter, with less contrast": lambda image: ImageEnhance.Contrast(
        ImageEnhance.Brightness(image).enhance(1.15)
    ).enhance(0.8),
    "a part": lambda image: image.crop((217, 101, 617, 501)),
    "a small part, mirrored, as JPEG": lambda image: jpeg(
        image.crop((431, 333, 671, 573)).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_picture_is_found_after(change: str, leaves: list[np.ndarray]) -> None:
    held = np.asarray(CHANGES[change](Image.fromarray(leaves[0])).convert("RGB"))
    wanted = overlap.signatures(held)[None]

    def same(picture: np.ndarray) -> bool:
        found = overlap.search(picture, wanted)
        settings = overlap.OverlapSettings
        return bool(found.distances[0] <= settings.distance and found.likenesses[0] >= settings.likeness)

    assert same(leaves[0])
    assert not any(same(other) for other in leaves[1:])


def test_the_correlation_ignores_brightness_and_contrast_and_knows_flat_pictures() -> None:
    cells = np.random.default_rng(0).random((2, overlap.CELLS, overlap.CELLS))
    assert overlap.correlations(cells, 2.0 * cells[0] + 5.0) == pytest.approx([1.0, 0.0], abs=0.1)
    assert overlap.correlations(cells, np.zeros_like(cells[0])).tolist() == [0.0, 0.0]


def test_the_place_of_a_part_is_told(leaves: list[np.ndarray]) -> None:
    wanted = overlap.signatures(leaves[1][120:420, 360:660])[None]
    assert overlap.search(leaves[1], wanted).places[0] == pytest.approx([360, 120, 300, 300], abs=40)


def test_cells_are_means_of_their_pixels() -> None:
    picture = np.random.default_rng(0).random((64, 96))
    cells = overlap.cells_of(overlap.summed(picture), np.array([[32.0, 0.0, 64.0, 64.0], [0.5, 0.0, 64.0, 64.0]]))
    expected = picture[:, 32:].reshape(32, 2, 32, 2).mean(axis=(1, 3))
    assert cells[0] == pytest.approx(expected)
    assert cells[1, 0, 0] == pytest.approx((picture[:2, :3] * [0.25, 0.5, 0.25]).sum() / 2)


def test_the_command_tells_and_writes_what_it_found(
    leaves: list[np.ndarray], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    for name, pictures in {"data": leaves[:2], "clean": leaves[2:3], "held": leaves[3:]}.items():
        (tmp_path / name).mkdir()
        for index, picture in enumerate(pictures):
            Image.fromarray(picture).save(tmp_path / name / f"{name}{index}.png")
    command = [f"--data={tmp_path}/data", f"--report={tmp_path}/report.json"]
    assert overlap.main([*command, f"--held={tmp_path}/held,{tmp_path}/clean"]) == 0
    assert "Nothing was found" in caplog.text

    Image.fromarray(leaves[1][200:600, 100:500]).save(tmp_path / "held" / "copied.png")
    (tmp_path / "data" / "broken.jpg").write_bytes(b"\xff\xd8no picture")
    assert overlap.main([*command, f"--held={tmp_path}/held"]) == 1
    assert "copied.png is in data1.png" in caplog.text
    assert "broken.jpg cannot be read" in caplog.text
    written = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert [(match["held"], match["data"]) for match in written["matches"]] == [("copied.png", "data1.png")]
    assert (written["held"], sum(written["nearest"])) == (2, 2)

    assert overlap.main([*command, f"--held={tmp_path}/nothing"]) == 1
    assert "holds no pictures" in caplog.text


def test_the_report_is_provided_for_before_the_search_and_a_broken_held_picture_is_named(
    leaves: list[np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for index, name in enumerate(("data", "held")):
        (tmp_path / name).mkdir()
        Image.fromarray(leaves[index]).save(tmp_path / name / "a.png")
    command = [f"--data={tmp_path}/data", f"--held={tmp_path}/held"]
    assert overlap.main([*command, f"--report={tmp_path}/new/deeper/x.json"]) == 0
    assert json.loads((tmp_path / "new" / "deeper" / "x.json").read_text(encoding="utf-8"))["matches"] == []
    assert [path.name for path in (tmp_path / "new" / "deeper").iterdir()] == ["x.json"]

    monkeypatch.setattr(overlap, "search", lambda *_: pytest.fail("searched before the report was checked"))
    for report in (tmp_path / "held", tmp_path / "held" / "a.png" / "x.json"):
        assert overlap.main([*command, f"--report={report}"]) == 1
        assert f"--report={report}" in caplog.messages[-1]
    assert overlap.main([*command, "--limit=-1"]) == 1
    assert "--limit=-1" in caplog.messages[-1]
    (tmp_path / "held" / "b.jpg").write_bytes(b"\xff\xd8no picture")
    assert overlap.main(command) == 1
    assert f"{tmp_path}/held/b.jpg cannot be read" in caplog.messages[-1]
