"""The data sets of the paper (Sec. 4.1): how to know them in a folder tree, and what belongs to them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import PurePath

OTHER = "other"


@dataclass(frozen=True)
class Layout:
    """One published data set.

    Args:
        name: as in the paper.
        folder: pattern that the name of some folder above a picture matches, whatever its case.
        numbers: (first, last) of the training pictures' numbers; None where files are not numbered through.
        held_out: (first, last) of pictures that results are measured on, and nothing must learn from.
        count: number of training pictures.
        classes: names of the folders that sort the pictures.
    """

    name: str
    folder: str
    count: int
    numbers: tuple[int, int] | None = None
    held_out: tuple[int, int] | None = None
    classes: tuple[str, ...] = field(default=())

    def number(self, path: PurePath) -> int | None:
        """Return a picture's number, or None if its name is not one."""
        match = re.fullmatch(r"(\d+)(?:x\d+)?", path.stem)
        return int(match.group(1)) if self.numbers and match else None


LAYOUTS = (
    Layout("DIV2K", r"div2k", 800, numbers=(1, 800), held_out=(801, 900)),
    Layout("Flickr2K", r"flickr2k", 2650, numbers=(1, 2650)),
    Layout("DIV8K", r"div8k", 1500, numbers=(1, 1500)),
    Layout(
        "OST",
        r"^ost($|[_-])|outdoorscenetrain",
        10_324,
        classes=("animal", "building", "grass", "mountain", "plant", "sky", "water"),
    ),
    Layout("FFHQ", r"ffhq|^images1024x1024$", 10_000, numbers=(0, 69_999)),
)
# Folders of ready-made low-resolution partners, as in DIV2K_train_LR_bicubic and Flickr2K_LR_unknown.
LOW_RESOLUTION = re.compile(r"(^|_)LR(_|$)", re.IGNORECASE)


def layout_of(path: PurePath) -> Layout | None:
    """Return the data set that the folders above a picture name, the nearest folder first."""
    for part in reversed(path.parent.parts):
        for layout in LAYOUTS:
            if re.search(layout.folder, part.lower()):
                return layout
    return None


def why_left_out(path: PurePath, layout: Layout | None, limit_ffhq: int) -> str | None:
    """Say why a sound picture is no training data, or None if it is.

    Args:
        path: from the data folder's own name on.
        layout: what `layout_of` says.
        limit_ffhq: the paper trains on the first 10,000 faces of FFHQ; 0 = all.
    """
    if any(LOW_RESOLUTION.search(part) for part in path.parent.parts):
        return "low-resolution copy"
    number = layout.number(path) if layout else None
    if layout is None or number is None:
        return None
    if layout.held_out and layout.held_out[0] <= number <= layout.held_out[1]:
        return "held out for measuring"
    if layout.name == "FFHQ" and limit_ffhq and number >= limit_ffhq:
        return f"not among the first {limit_ffhq:,}"
    return None


def remarks(layout: Layout, paths: Iterable[PurePath], limit_ffhq: int) -> list[str]:
    """Compare the training pictures found with what the data set holds; one sentence for each thing to know."""
    paths = list(paths)
    expected = limit_ffhq or 70_000 if layout.name == "FFHQ" else layout.count
    said = [f"{layout.name}: {len(paths):,} of {expected:,} training pictures."]
    if layout.numbers:
        numbers = Counter(number for path in paths if (number := layout.number(path)) is not None)
        first = layout.numbers[0]
        missing = [number for number in range(first, first + expected) if number not in numbers]
        if missing:
            more = ", ..." if len(missing) > 5 else ""
            said.append(f"Missing {len(missing):,}: numbers {', '.join(map(str, missing[:5]))}{more}.")
        strange = [path.name for path in paths if layout.number(path) is None]
        if strange:
            said.append(f"{len(strange):,} files have no number of {layout.name} as name, for example {strange[0]}.")
    if layout.classes:
        folders = {part.lower() for path in paths for part in path.parent.parts}
        absent = [name for name in layout.classes if not any(name in folder for folder in folders)]
        if absent:
            said.append(f"No folder for {', '.join(absent)}.")
    return said
