"""Sheets to look at: one row for each picture, the low-resolution one, what every method made of it, the good one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from .tables import DIGITS, REFERENCE, Results

GAP = 6  # pixels around every picture
LINE = 13  # height of a line of the caption, in pixels
SHOWN = ("psnr", "niqe", "efflite")  # measures under each picture
LR = "LR"

Reader = Callable[[str], np.ndarray]  # name of a picture -> (H, W, 3) uint8


def middle(image: np.ndarray, side: int) -> np.ndarray:
    """Return the middle `side` x `side` of a picture (H, W, 3), or as much as there is; all of it where `side` is 0."""
    if side == 0:
        return image
    top, left = (max(0, (length - side) // 2) for length in image.shape[:2])
    return image[top : top + side, left : left + side]


def caption(results: Results, method: str, name: str) -> str:
    """Return the measures of one picture in a line."""
    found = results.get(method, {})
    values = [f"{key} {found[key][name]:.{DIGITS[key]}f}" for key in SHOWN if name in found.get(key, {})]
    return "  ".join(values)


def pages(names: list[str], rows: int) -> Iterator[list[str]]:
    """Yield the names of each page."""
    for start in range(0, len(names), rows):
        yield names[start : start + rows]


def write(folder: Path, names: list[str], readers: dict[str, Reader], results: Results, rows: int, side: int) -> None:
    """Write `comparison_01.png` and on into `folder`.

    Args:
        folder: for the sheets; older ones in it are removed.
        names: of the pictures.
        readers: LR first, then the methods, then the good pictures (HR), as the columns. The low-resolution
            pictures are enlarged without smoothing to the size of the others.
        results: method -> measure -> picture -> value.
        rows: pictures on a sheet.
        side: of the middle that is shown, in pixels of the result; 0 = everything.
    """
    for old in folder.glob("comparison_*.png"):
        old.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    for number, page in enumerate(pages(names, rows), start=1):
        table = [_row(name, readers, side) for name in page]
        widths = [max(row[column].width for row in table) + 2 * GAP for column in range(len(readers))]
        heights = [max(image.height for image in row) + 2 * LINE + 2 * GAP for row in table]
        sheet = Image.new("RGB", (sum(widths), sum(heights)), "white")
        draw = ImageDraw.Draw(sheet)
        for index, (name, row) in enumerate(zip(page, table, strict=True)):
            top = sum(heights[:index]) + GAP
            for column, (method, image) in enumerate(zip(readers, row, strict=True)):
                left = sum(widths[:column]) + GAP
                sheet.paste(image, (left, top))
                title = f"{method}: {name}" if method in (LR, REFERENCE) else method
                for line, text in enumerate((title, caption(results, method, name))):
                    draw.text((left, top + image.height + 1 + line * LINE), text, fill="black")
        sheet.save(folder / f"comparison_{number:02d}.png", "PNG")


def _row(name: str, readers: dict[str, Reader], side: int) -> list[Image.Image]:
    height, width = readers[REFERENCE](name).shape[:2]
    row = []
    for method, read in readers.items():
        image = Image.fromarray(read(name))
        if method == LR:
            image = image.resize((width, height), Image.Resampling.NEAREST)
        row.append(Image.fromarray(np.ascontiguousarray(middle(np.asarray(image), side))))
    return row
