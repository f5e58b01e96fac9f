"""Published values stand beside ours, marked as such, and a folder of another method's outputs beside its own row."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from training import evaluate, published
from training.config import ConfigError
from training.tables import TITLES, Summary


def test_every_row_is_whole_and_names_its_source() -> None:
    for name in ("realsr", "drealsr", "div2k-val"):
        rows = published.data_set(name).rows
        assert len({row.method for row in rows}) == len(rows) == 11
        for row in rows:
            assert row.source
            assert {"psnr", "ssim", "lpips", "niqe", "musiq"} <= row.values.keys() <= TITLES.keys()
            assert 20 < row.values["psnr"] < 32
            assert all(0 < row.values[key] < 1 for key in ("ssim", "lpips"))


def test_values_are_those_of_the_papers() -> None:
    """The full model of Table 4, printed a second time there, is ClearSR's row; OSEDiff's is the one to reproduce."""
    clearsr = published.data_set("DRealSR").row("clearsr")
    assert clearsr is not None
    assert [clearsr.values[key] for key in ("psnr", "ssim", "niqe", "maniqa")] == [28.22, 0.7538, 6.0867, 0.6246]
    osediff = published.data_set("realsr").row("OSEDiff")
    assert osediff is not None
    assert [osediff.values[key] for key in ("psnr", "ssim", "niqe")] == [25.15, 0.7341, 5.6476]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [("osediff", "OSEDiff"), ("realesrgan", "Real-ESRGAN"), ("clearsr-star", "ClearSR*"), ("ClearSR", "ClearSR")],
)
def test_names_match_in_other_spellings(ours: str, theirs: str) -> None:
    row = published.data_set("realsr").row(ours)
    assert row is not None
    assert row.method == theirs


def test_a_data_set_without_values_is_told() -> None:
    with pytest.raises(ConfigError, match="--published=set5: values are kept for realsr, drealsr, div2k-val"):
        published.data_set("set5")


def test_difference_to_the_published_row_is_printed_with_its_sign() -> None:
    ours = {"osediff": {"psnr": Summary(25.40, 0.1, 100), "niqe": Summary(5.5476, 0.1, 100)}}
    text = published.markdown(published.data_set("realsr"), ours, 100)
    beside = text.partition("## Measured beside published")[2]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in beside.splitlines() if line.startswith("|")]
    assert rows[0] == ["Method", "", "PSNR (dB) ↑", "NIQE ↓"]
    assert rows[2:] == [
        ["osediff", "measured", "25.40", "5.55"],
        ["OSEDiff", "published", "25.15", "5.65"],
        ["", "difference", "+0.25", "-0.10"],
    ]
    assert "partly the pictures'" not in text
    assert "Measured on 7 of 100 pictures" in published.markdown(published.data_set("realsr"), ours, 7)


def test_a_folder_of_outputs_gets_its_published_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole command, with a made folder in place of OSEDiff's outputs."""
    random = np.random.default_rng(0)
    for folder, side in (("hr", 192), ("lr", 48), ("outputs", 192)):
        (tmp_path / folder).mkdir()
        Image.fromarray(random.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(tmp_path / folder / "a.png")
    arguments = [f"--hr={tmp_path}/hr", f"--lr={tmp_path}/lr", f"--out={tmp_path}/out", "--efflite=false"]
    arguments += [f"--methods=bicubic,osediff={tmp_path}/outputs", "--published=realsr"]
    assert evaluate.main(arguments) == 0
    text = capsys.readouterr().out
    ours, _, theirs = text.partition("## Published on RealSR, not measured here")
    assert "SeeSR" in theirs
    assert "SeeSR" not in ours
    assert "| osediff | measured" in theirs
    assert "| OSEDiff | published  | 25.15" in theirs
    assert (tmp_path / "out" / "evaluation.md").read_text(encoding="utf-8") == text
