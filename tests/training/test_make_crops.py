"""Photographs cut into crops of a given size in bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from training import make_crops
from training.photographs import Photographs
from training.picture_files import to_bytes
from training.randomness import generator_for


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    folder = tmp_path / "photographs"
    folder.mkdir()
    for index, size in enumerate([(300, 200), (128, 150), (60, 400)]):
        noise = np.random.default_rng(index).integers(0, 256, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8)
        Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(folder / f"{index}.png")
    return folder


def command(photographs: Path, out: Path, *more: str) -> list[str]:
    return [f"--data={photographs}", f"--out={out}", "--crop=96", "--megabytes=0.05", *more]


def crops(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.glob("*.jpg"))}


def test_as_many_crops_as_fit_and_each_is_the_crop_of_its_number(photographs: Path, tmp_path: Path) -> None:
    assert make_crops.main(command(photographs, tmp_path / "out")) == 0
    made = crops(tmp_path / "out")
    sizes = [len(data) for data in made.values()]
    assert list(made) == [f"crop_{number:06d}.jpg" for number in range(len(made))]
    assert sum(sizes) <= 50_000 < sum(sizes) + 2 * max(sizes)
    source = Photographs(photographs, 96)
    for number, path in enumerate(sorted((tmp_path / "out").glob("*.jpg"))[:5]):
        expected = to_bytes((source.crop(96, generator_for(1, number), 2) + 1.0) / 2.0)
        with Image.open(path) as picture:
            assert (picture.format, picture.size, picture.mode) == ("JPEG", (96, 96), "RGB")
            assert np.abs(np.asarray(picture).astype(int) - expected).mean() < 4.0
    # What trains on the folder finds every one of them.
    assert len(Photographs(tmp_path / "out", 96)) == len(made)


def test_a_stopped_run_goes_on_and_more_bytes_add_crops(photographs: Path, tmp_path: Path) -> None:
    assert make_crops.main(command(photographs, tmp_path / "whole")) == 0
    whole = crops(tmp_path / "whole")
    assert make_crops.main(command(photographs, tmp_path / "parts", "--megabytes=0.02")) == 0
    part = crops(tmp_path / "parts")
    assert 0 < len(part) < len(whole)
    assert make_crops.main(command(photographs, tmp_path / "parts")) == 0
    assert crops(tmp_path / "parts") == whole


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--quality=80"], "another quality"),
        (["--seed=1"], "another seed"),
        (["--megabytes=0.01"], "more than 0.01 MB"),
        (["--crop=32"], "64 pixels or more"),
        (["--quality=0"], "1 to 100"),
    ],
)
def test_what_cannot_be_is_told(
    photographs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, more: list[str], message: str
) -> None:
    assert make_crops.main(command(photographs, tmp_path / "out")) == 0
    before = crops(tmp_path / "out")
    assert make_crops.main(command(photographs, tmp_path / "out", *more)) == 1
    assert message in caplog.text
    assert crops(tmp_path / "out") == before


def test_a_limit_under_one_crop_is_an_error(
    photographs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert make_crops.main(command(photographs, tmp_path / "out", "--megabytes=0.0001")) == 1
    assert "Not one crop" in caplog.text


@pytest.mark.parametrize("change", ["one is gone", "one of the same name and size"])
def test_other_photographs_are_other_crops(
    photographs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, change: str
) -> None:
    assert make_crops.main(command(photographs, tmp_path / "out")) == 0
    if change == "one is gone":
        (photographs / "0.png").unlink()
    else:
        with Image.open(photographs / "0.png") as picture:
            ImageOps.invert(picture.convert("RGB")).save(photographs / "0.png")
    assert make_crops.main(command(photographs, tmp_path / "out")) == 1
    assert "another photographs" in caplog.text
