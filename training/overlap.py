"""Look for pictures of one folder in another, whole or as a part: training data must hold nothing that is measured on.

    python -m training.overlap --data=PHOTOGRAPHS --held=HR,MORE_HR --report=overlap.json

A picture is found again after a change of size, JPEG, brightness or contrast, mirrored, and cut out of a larger one
as long as its side is a quarter or more of the shorter side there. Rotated or painted over it is not.
"""

from __future__ import annotations

import logging
import math
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from . import command_line, config, provenance
from .config import first
from .picture_files import SUFFIXES, read_named, read_rgb, reason

log = logging.getLogger("clearsr.training")

CELLS = 32  # a picture is looked at in so many cells each way
KEPT = 8  # lowest frequencies each way that make the hash
_LONG_SIDE = 512  # pictures are searched at this size
_SIDES = (1.0, 0.84, 0.71, 0.59, 0.5, 0.42, 0.35, 0.3, 0.25)  # of the windows, in shorter sides
_STRIDES = 12  # windows lie a twelfth of their side apart
_PROMISING = 14  # bits in which a window may differ at first; between windows, the right place differs in up to 14
_ROUNDS = 3  # of moving a promising window about, each with half the distances of the one before


@dataclass(frozen=True)
class OverlapSettings:
    """Where to look for what."""

    data: Path  # what is trained on
    held: tuple[Path, ...]  # what is measured on
    report: Path = Path()  # JSON file; empty = none
    limit: int = 0  # only the first pictures of each folder in `held`; 0 = all
    distance: int = 6  # hashes of 63 bits that differ in so many or fewer are looked at again
    likeness: float = 0.85  # correlation of 32 x 32 cells from which on these are of the same picture


@dataclass(frozen=True)
class Match:
    """A picture of `held` that looks like one of `data`, or like a part of it."""

    held: str
    data: str
    distance: int  # bits that differ
    likeness: float  # correlation
    window: tuple[int, int, int, int]  # left, top, width, height in pixels of the picture in `data`


def _cosines() -> np.ndarray:
    """Return the lowest rows of the discrete cosine transform, (KEPT, CELLS)."""
    places = (np.arange(CELLS) + 0.5) * math.pi / CELLS
    return np.cos(np.arange(KEPT)[:, None] * places)


def hashes(cells: np.ndarray) -> np.ndarray:
    """Return perceptual hashes: the signs of the lowest frequencies against their median, without the mean grey.

    Args:
        cells: (n, CELLS, CELLS) grey.

    Returns:
        (n, 63) bool.
    """
    cosines = _cosines()
    spectra = np.einsum("ui,nij,vj->nuv", cosines, cells, cosines, optimize=True).reshape(len(cells), -1)[:, 1:]
    return spectra > np.median(spectra, axis=1, keepdims=True)


def grey(picture: np.ndarray, long_side: int = _LONG_SIDE) -> np.ndarray:
    """Return (H, W, 3) uint8 as grey floats with a long side of at most `long_side`."""
    image = Image.fromarray(picture).convert("L")
    image.thumbnail((long_side, long_side), Image.Resampling.BOX)
    return np.asarray(image, dtype=np.float64)


def windows(height: int, width: int) -> Iterator[tuple[float, float, float, float]]:
    """Yield the places that are looked at, (left, top, width, height): the whole, and squares of every size."""
    yield 0.0, 0.0, float(width), float(height)
    for share in _SIDES:
        side = share * min(height, width)
        for top in np.arange(0.0, height - side + 0.5, max(side / _STRIDES, 1.0)):
            for left in np.arange(0.0, width - side + 0.5, max(side / _STRIDES, 1.0)):
                yield float(left), float(top), side, side


def summed(picture: np.ndarray) -> np.ndarray:
    """Return the table of sums over all that lies above and to the left, (h + 1, w + 1), of an (h, w) picture."""
    return np.pad(picture.cumsum(axis=0).cumsum(axis=1), ((1, 0), (1, 0)))


def cells_of(sums: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Return the means of CELLS x CELLS cells of each place.

    Args:
        sums: (h + 1, w + 1), of `summed`.
        places: (n, 4) left, top, width, height in pixels; what lies outside of the picture counts as black.

    Returns:
        (n, CELLS, CELLS).
    """
    edges = np.linspace(0.0, 1.0, CELLS + 1)
    x = (places[:, :1] + edges * places[:, 2:3]).clip(0.0, sums.shape[1] - 1)
    y = (places[:, 1:2] + edges * places[:, 3:4]).clip(0.0, sums.shape[0] - 1)
    corners = _between(sums, y, x)  # (n, CELLS + 1, CELLS + 1)
    area = (places[:, 2] * places[:, 3])[:, None, None] / CELLS**2
    return np.diff(np.diff(corners, axis=1), axis=2) / area


def _between(sums: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Return the table of sums at fractional places, bilinearly: sums up to parts of pixels."""
    rows, columns = np.minimum(y.astype(int), sums.shape[0] - 2), np.minimum(x.astype(int), sums.shape[1] - 2)
    down, right = (y - rows)[:, :, None], (x - columns)[:, None, :]
    rows, columns = rows[:, :, None], columns[:, None, :]
    above = sums[rows, columns] * (1.0 - right) + sums[rows, columns + 1] * right
    below = sums[rows + 1, columns] * (1.0 - right) + sums[rows + 1, columns + 1] * right
    return above * (1.0 - down) + below * down


def signatures(picture: np.ndarray) -> np.ndarray:
    """Return the cells of a whole picture (H, W, 3) uint8, as it is and mirrored: (2, CELLS, CELLS)."""
    small = grey(picture)
    place = np.array([[0.0, 0.0, small.shape[1], small.shape[0]]])
    return np.concatenate([cells_of(summed(one), place) for one in (small, small[:, ::-1])])


def correlations(cells: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return the correlation of each of (n, CELLS, CELLS) with (CELLS, CELLS), -1 .. 1; 0 where one is flat."""
    first, second = cells.reshape(len(cells), -1), other.ravel()
    first, second = first - first.mean(axis=1, keepdims=True), second - second.mean()
    lengths = np.linalg.norm(first, axis=1) * np.linalg.norm(second)
    return (first @ second) / np.where(lengths > 0.0, lengths, np.inf)


class Found(NamedTuple):
    """The place in a picture that is nearest to each of n others."""

    distances: np.ndarray  # (n,) bits that differ
    likenesses: np.ndarray  # (n,) correlation of the cells
    places: np.ndarray  # (n, 4) left, top, width, height


def search(picture: np.ndarray, looked_for: np.ndarray) -> Found:
    """Look for pictures in another one.

    Args:
        picture: (H, W, 3) uint8.
        looked_for: (n, 2, CELLS, CELLS), of `signatures`.
    """
    wanted = hashes(looked_for.reshape(-1, CELLS, CELLS)).reshape(len(looked_for), 2, -1)
    small = grey(picture)
    sums, places = summed(small), np.array(list(windows(*small.shape)))
    differ = _differing(hashes(cells_of(sums, places)), wanted)  # (places, n)
    nearest = differ.argmin(axis=0)
    fewest, best = differ[nearest, np.arange(len(wanted))], places[nearest]
    for number in np.flatnonzero((fewest <= _PROMISING) & (fewest > 0)):
        for halved in range(_ROUNDS):
            around = _around(best[number], 0.5**halved / (2 * _STRIDES))
            found = _differing(hashes(cells_of(sums, around)), wanted[number : number + 1])[:, 0]
            if found.min() < fewest[number]:
                fewest[number], best[number] = found.min(), around[found.argmin()]
    cells = cells_of(sums, best)
    likenesses = [correlations(both, one).max() for both, one in zip(looked_for, cells, strict=True)]
    return Found(fewest, np.array(likenesses), best * (picture.shape[1] / small.shape[1]))


def _differing(found: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return in how many bits hashes (m, bits) differ from pictures (n, 2, bits), mirrored or not: (m, n)."""
    bits = wanted.shape[-1]
    # Of two rows of +1 and -1, the product is (bits - 2 x the bits that differ).
    products = (2.0 * found - 1.0) @ (2.0 * wanted.reshape(-1, bits) - 1.0).T
    return ((bits - products) / 2.0).round().astype(int).reshape(len(found), -1, 2).min(axis=2)


def _around(place: np.ndarray, step: float) -> np.ndarray:
    """Return places near one (left, top, width, height), moved by a step and scaled by two, in its sides: (m, 4)."""
    moves = np.array([-1.0, 0.0, 1.0]) * step
    scales, x, y = (axis.ravel()[:, None] for axis in np.meshgrid(1.0 + 2.0 * moves, moves, moves))
    size = scales * place[2:]
    centre = place[:2] + place[2:] / 2.0 + np.concatenate([x, y], axis=1) * place[2:]
    return np.concatenate([centre - size / 2.0, size], axis=1)


def _pictures(folder: Path) -> list[Path]:
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not found:
        raise config.ConfigError(f"{folder} holds no pictures ({', '.join(sorted(SUFFIXES))}).")
    return found


def _provide_for(report: Path) -> None:
    """Make the folder of the report and try to write there: after hours of search it would be too late to fail.

    Raises:
        ConfigError: no file can be written at that place.
    """
    if report.is_dir():
        raise config.ConfigError(f"--report={report} is a folder. Give the path of a file, as {report}/overlap.json.")
    try:
        report.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=report.parent):
            pass
    except OSError as error:
        raise config.ConfigError(
            f"--report={report} cannot be written ({error.strerror or error}). Give a file at another place."
        ) from error


def run(settings: OverlapSettings) -> list[Match]:
    """Look for every picture of `held` in every picture of `data`; return what was found, likest first."""
    held = [path for folder in settings.held for path in first(_pictures(folder), settings.limit)]
    if not held:
        raise config.ConfigError("--held names no folder.")
    if settings.report != Path():
        _provide_for(settings.report)
    wanted = np.stack([signatures(read_named(path)) for path in held])
    matches, nearest = [], np.full(len(held), KEPT**2)
    searched = _pictures(settings.data)
    for path in tqdm(searched, unit="picture"):
        try:
            picture = read_rgb(path)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            log.warning("%s cannot be read (%s); training leaves it out as well.", path.name, reason(error))
            continue
        found = search(picture, wanted)
        nearest = np.minimum(nearest, found.distances)
        alike = (found.distances <= settings.distance) & (found.likenesses >= settings.likeness)
        for number in np.flatnonzero(alike):
            left, top, width, height = (int(value) for value in found.places[number].round())
            distance, likeness = int(found.distances[number]), round(float(found.likenesses[number]), 3)
            matches.append(Match(held[number].name, path.name, distance, likeness, (left, top, width, height)))
    matches.sort(key=lambda match: -match.likeness)
    if settings.report != Path():
        content = {
            "held": len(held),
            "data": len(searched),
            "distance": settings.distance,
            "likeness": settings.likeness,
            "nearest": np.bincount(nearest).tolist(),  # number of pictures in `held` by the fewest bits that differ
            "matches": [asdict(match) for match in matches],
        }
        provenance.write_json(settings.report, content, indent=2)
    log.info("%d pictures looked for in %d; the nearest differs in %d bits.", len(held), len(searched), nearest.min())
    return matches


@command_line.command()
def main(arguments: list[str]) -> int:
    """Look, tell; the exit status is 1 where something was found."""
    matches = run(command_line.settings(OverlapSettings, arguments, __doc__))
    for match in matches:
        log.warning("%s is in %s at %s: correlation %g.", match.held, match.data, match.window, match.likeness)
    if matches:
        log.warning("%d found: look at them, and take them out.", len(matches))
    else:
        log.info("Nothing was found.")
    return 1 if matches else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
