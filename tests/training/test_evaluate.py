"""The comparison command: pairs by name, one table, readable files, and clear sentences for bad folders."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from training import baselines, evaluate
from training.evaluate import EvaluationError, EvaluationSettings, find_pairs, picture_name
from training.tables import summarise


def save(path: Path, size: tuple[int, int], seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Two pairs, 192 x 192 and 48 x 48."""
    for seed, name in enumerate(("a", "b")):
        save(tmp_path / "hr" / f"{name}_HR.png", (192, 192), seed)
        save(tmp_path / "lr" / f"{name}_LR4.png", (48, 48), seed + 10)
    return tmp_path / "hr", tmp_path / "lr"


@pytest.mark.parametrize("name", ["x.png", "x_HR.png", "x_LR4.png", "x_SR.jpg", "x_00001_.png", "x_LR4_00012_.png"])
def test_partners_share_one_name(name: str) -> None:
    assert picture_name(Path(name)) == "x"


def test_pairs_by_equal_names_too(tmp_path: Path) -> None:
    save(tmp_path / "hr" / "Canon_001_LR4.png", (8, 8), 0)
    save(tmp_path / "lr" / "Canon_001_LR4.png", (2, 2), 0)
    assert [pair.name for pair in find_pairs(tmp_path / "hr", tmp_path / "lr")] == ["Canon_001"]


def test_command_writes_table_csv_and_json(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hr, lr = folders
    out = tmp_path / "out"
    arguments = [f"--hr={hr}", f"--lr={lr}", f"--out={out}", f"--methods=bicubic,perfect={hr}", "--efflite=false"]
    assert evaluate.main(arguments) == 0
    table = (out / "evaluation.md").read_text(encoding="utf-8")
    assert table == capsys.readouterr().out
    assert "| bicubic" in table
    assert "PSNR (dB) ↑" in table
    rows = list(csv.DictReader((out / "evaluation.csv").open(encoding="utf-8")))
    assert [(row["picture"], row["method"]) for row in rows] == [
        (name, method) for name in ("a", "b") for method in ("HR", "bicubic", "perfect")
    ]
    assert rows[0]["psnr"] == ""
    assert rows[2]["psnr"] == "inf"
    content = json.loads((out / "evaluation.json").read_text(encoding="utf-8"))
    mean = content["methods"]["bicubic"]["psnr"]["mean"]
    assert mean == pytest.approx((float(rows[1]["psnr"]) + float(rows[4]["psnr"])) / 2, abs=1e-5)
    assert content["methods"]["perfect"]["ssim"]["mean"] == pytest.approx(1)
    assert content["methods"]["perfect"]["niqe"] == content["methods"]["HR"]["niqe"]


def test_baseline_pictures_are_made_once_and_again_when_the_source_changes(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hr, lr = folders
    made: list[int] = []

    def counting(image: np.ndarray) -> np.ndarray:
        made.append(1)
        return baselines.bicubic(image)

    monkeypatch.setattr(evaluate, "upscaler", lambda name: counting)
    settings = EvaluationSettings(hr=hr, lr=lr, out=tmp_path / "out", limit=1, efflite=False)
    first = evaluate.evaluate(settings)
    assert evaluate.evaluate(settings) == first
    assert len(made) == 1
    save(lr / "a_LR4.png", (48, 48), 99)
    assert evaluate.evaluate(settings) != first
    assert len(made) == 2


def test_limit_takes_the_first_names_and_asks_partners_only_for_those(folders: tuple[Path, Path]) -> None:
    hr, lr = folders
    (lr / "b_LR4.png").unlink()
    assert [pair.name for pair in find_pairs(hr, lr, limit=1)] == ["a"]
    with pytest.raises(EvaluationError, match="has no picture for b"):
        find_pairs(hr, lr)


def test_picture_without_its_good_partner_is_named(folders: tuple[Path, Path]) -> None:
    hr, lr = folders
    (hr / "a_HR.png").unlink()
    with pytest.raises(EvaluationError, match=r"hr has no picture for a\. Partners are X_HR\.png"):
        find_pairs(hr, lr)


@pytest.mark.parametrize(
    ("methods", "sentence"),
    [
        ("bilinear", "No baseline 'bilinear'"),
        ("bicubic,bicubic", "used twice"),
        ("HR", "reserved"),
        ("nano=nowhere", "is not a folder"),
        ("nano={empty}", "holds no pictures"),
        ("nano={partial}", "has no picture for b. Let nano make them first."),
        ("nano={small}", "nano's a is 96 x 192, the HR picture 192 x 192"),
    ],
)
def test_bad_methods_get_one_sentence_and_no_traceback(
    folders: tuple[Path, Path], tmp_path: Path, methods: str, sentence: str, caplog: pytest.LogCaptureFixture
) -> None:
    hr, lr = folders
    (tmp_path / "empty").mkdir()
    save(tmp_path / "partial" / "a.png", (192, 192), 0)
    for name in ("a", "b"):
        save(tmp_path / "small" / f"{name}.png", (192, 96), 0)
    given = methods.format(**{name: tmp_path / name for name in ("empty", "partial", "small")})
    arguments = [f"--hr={hr}", f"--lr={lr}", f"--out={tmp_path / 'out'}", f"--methods={given}", "--efflite=false"]
    assert evaluate.main(arguments) == 1
    assert sentence in caplog.text
    assert "\n" not in caplog.messages[-1]


def test_pair_of_wrong_scale_is_named(folders: tuple[Path, Path], tmp_path: Path) -> None:
    hr, lr = folders
    save(lr / "a_LR4.png", (96, 96), 0)
    with pytest.raises(EvaluationError, match=r"a_HR\.png is 192 x 192 and a_LR4\.png 96 x 96; expected 4 to 1"):
        evaluate.evaluate(EvaluationSettings(hr=hr, lr=lr, out=tmp_path / "out", efflite=False))


def test_missing_baseline_packages_are_told_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        baselines.BaselineMissingError, match=r"pip install --no-deps -r training/requirements-baselines\.txt"
    ):
        baselines.upscaler("realesrgan")
    assert (Path(baselines.__file__).parent / "requirements-baselines.txt").is_file()


def test_bicubic_keeps_flat_pictures_and_multiplies_sizes_by_four() -> None:
    flat = np.full((5, 7, 3), 93, dtype=np.uint8)
    assert np.array_equal(baselines.bicubic(flat), np.full((20, 28, 3), 93, dtype=np.uint8))


@pytest.mark.slow
def test_real_esrgan_enlarges_and_keeps_the_colour() -> None:
    try:
        enlarge = baselines.RealESRGAN(threads=1)
    except baselines.BaselineMissingError as error:
        pytest.skip(str(error))
    image = np.zeros((16, 24, 3), dtype=np.uint8)
    image[:, :12] = (200, 80, 30)
    result = enlarge(image)
    assert result.shape == (64, 96, 3)
    assert np.abs(result[24:40, 12:24].astype(int) - [200, 80, 30]).max() < 25
    assert result[24:40, 72:84].max() < 25


@pytest.mark.parametrize(("count", "quantile"), [(2, 12.706), (3, 4.303), (4, 3.182), (20, 2.093), (100, 1.984)])
def test_confidence_interval_uses_students_quantile(count: int, quantile: float) -> None:
    values = [float(index % 2) for index in range(count)]
    summary = summarise(values)
    deviation = math.sqrt(sum((value - summary.mean) ** 2 for value in values) / (count - 1))
    assert summary.half_width == pytest.approx(quantile * deviation / math.sqrt(count), rel=3e-3)


def test_summary_leaves_out_what_is_not_finite() -> None:
    assert summarise([1.0, 3.0, math.inf, math.nan]) == summarise([1.0, 3.0])
    assert (summarise([1.0, math.inf]).mean, summarise([1.0, math.inf]).count) == (1.0, 1)
    assert math.isnan(summarise([math.nan]).mean)
