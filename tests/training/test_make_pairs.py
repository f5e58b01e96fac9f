"""Pairs to measure on, made of photographs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from training import evaluate, make_pairs


def _photograph(path: Path, width: int, height: int, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def _read(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_the_middle_is_the_good_picture_and_a_quarter_of_its_size_the_small_one(tmp_path: Path) -> None:
    _photograph(tmp_path / "photographs" / "below" / "wide.png", 602, 203)
    assert make_pairs.main([f"--data={tmp_path}/photographs", f"--out={tmp_path}/pairs"]) == 0
    hr, lr = (_read(tmp_path / "pairs" / kind / "wide.png") for kind in ("hr", "lr"))
    assert hr.shape == (200, 512, 3)
    assert lr.shape == (50, 128, 3)
    assert np.array_equal(hr, _read(tmp_path / "photographs" / "below" / "wide.png")[1:201, 45:557])
    assert [pair.name for pair in evaluate.find_pairs(tmp_path / "pairs" / "hr", tmp_path / "pairs" / "lr")] == ["wide"]


def test_a_pair_depends_on_its_photograph_name_and_seed_alone(tmp_path: Path) -> None:
    _photograph(tmp_path / "one" / "b.png", 200, 200)
    for name in ("a", "b"):
        _photograph(tmp_path / "two" / f"{name}.png", 200, 200)
    options = {"one": [], "two": [], "again": ["--seed=1"], "light": ["--degradation=light"]}
    for out, more in options.items():
        data = tmp_path / ("two" if out == "two" else "one")
        assert make_pairs.main([f"--data={data}", f"--out={tmp_path}/out/{out}", *more]) == 0
    small = {out: _read(tmp_path / "out" / out / "lr" / "b.png") for out in options}
    assert np.array_equal(small["one"], small["two"])
    assert not np.array_equal(small["one"], small["again"])
    assert not np.array_equal(small["one"], small["light"])
    assert not np.array_equal(small["two"], _read(tmp_path / "out" / "two" / "lr" / "a.png"))


def test_what_is_there_is_kept(tmp_path: Path) -> None:
    _photograph(tmp_path / "photographs" / "a.png", 200, 200)
    command = [f"--data={tmp_path}/photographs", f"--out={tmp_path}/pairs"]
    assert make_pairs.main(command) == 0
    before = (tmp_path / "pairs" / "lr" / "a.png").stat().st_mtime_ns
    assert make_pairs.main(command) == 0
    assert (tmp_path / "pairs" / "lr" / "a.png").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("files", "options", "said"),
    [
        ({"a.png": (191, 300)}, [], "191 x 300 pixels"),
        ({"a.png": (200, 200), "b/a.jpg": (200, 200)}, [], "2 photographs"),
        ({}, [], "No photographs"),
        ({"a.png": (200, 200)}, ["--crop=198"], "multiple of 4"),
        ({"a.png": (200, 200)}, ["--crop=64"], "from 192"),
    ],
)
def test_what_cannot_be_is_said(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    files: dict[str, tuple[int, int]],
    options: list[str],
    said: str,
) -> None:
    (tmp_path / "photographs").mkdir()
    for name, size in files.items():
        _photograph(tmp_path / "photographs" / name, *size)
    assert make_pairs.main([f"--data={tmp_path}/photographs", f"--out={tmp_path}/pairs", *options]) == 1
    assert said in caplog.text
    assert not (tmp_path / "pairs").exists()


def test_a_broken_photograph_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnot a picture")
    assert make_pairs.main([f"--data={tmp_path}", f"--out={tmp_path}/pairs"]) == 1
    assert "broken.png cannot be read" in caplog.text
    assert make_pairs.main([f"--data={tmp_path}/nowhere", f"--out={tmp_path}/pairs"]) == 1
    assert "is not a folder" in caplog.text


def test_a_pair_of_another_photograph_of_the_same_name_is_made_anew(tmp_path: Path) -> None:
    for seed, folder in enumerate(("one", "other")):
        _photograph(tmp_path / folder / "a.png", 200, 200, seed)
        assert make_pairs.main([f"--data={tmp_path}/{folder}", f"--out={tmp_path}/pairs"]) == 0
        assert np.array_equal(_read(tmp_path / "pairs" / "hr" / "a.png"), _read(tmp_path / folder / "a.png"))


def test_what_failed_before_its_first_pair_leaves_no_claim(tmp_path: Path) -> None:
    _photograph(tmp_path / "photographs" / "a.png", 191, 300)
    (tmp_path / "pairs").mkdir()
    command = [f"--data={tmp_path}/photographs", f"--out={tmp_path}/pairs"]
    assert make_pairs.main([*command, "--seed=1"]) == 1
    _photograph(tmp_path / "photographs" / "a.png", 200, 200)
    assert make_pairs.main(command) == 0
