"""The work folder of a reproduction: pictures of a split, models, restored pictures, measured values; nothing twice."""

from __future__ import annotations

import functools
import json
import logging
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from clearsr_core.whole_files import replacing

from .. import evaluate, provenance
from ..config import first
from ..evaluate import Pair
from ..photographs import Photographs
from ..provenance import sha256, write_json
from ..tables import REFERENCE, EvaluationError
from . import results
from .experiments import Budget

log = logging.getLogger("clearsr.training")

TUNED_ON = 20  # the first pictures by name; all others are for the last table only


@dataclass
class Work:
    """Where everything lies, and which pictures it is about."""

    folder: Path
    checkpoint: Path  # the model that is looked into, and the base of the ablations
    split: str
    pairs: list[Pair]
    data: Path  # photographs to train on
    budget: Budget
    seeds: tuple[int, ...]  # of the trainings of each variant
    results: Path  # folder of the results, with those that are there already
    efflite: bool = True
    sha256: str = field(init=False)  # of the checkpoint

    def __post_init__(self) -> None:
        self.sha256 = sha256(self.checkpoint)

    @functools.cached_property
    def photographs(self) -> str:
        """Return a digest of the pictures to train on, of their names, sizes and pixels."""
        return provenance.digest(Photographs(self.data, smallest=1, memory_gb=0.0).identity)

    @property
    def here(self) -> Path:
        """Return the folder of what belongs to this split."""
        return self.folder / self.split

    @property
    def names(self) -> list[str]:
        """Return the names of the split's pictures, in order."""
        return sorted(pair.name for pair in self.pairs)

    @property
    def hr(self) -> Path:
        """Return the folder of the split's good pictures."""
        return self.here / "pairs" / "hr"

    @property
    def lr(self) -> Path:
        """Return the folder of the split's small pictures."""
        return self.here / "pairs" / "lr"


def choose(hr: Path, lr: Path, split: str, limit: int = 0) -> list[Pair]:
    """Return the pairs of a split: the first `TUNED_ON` by name, all others, or (photographs) every pair.

    Args:
        hr: folder of good pictures.
        lr: folder of small ones.
        split: one of `results.SPLITS`.
        limit: only the first of them; 0 = all.
    """
    pairs = evaluate.find_pairs(hr, lr)
    if split != results.PHOTOGRAPHS:
        pairs = pairs[:TUNED_ON] if split == results.TUNING else pairs[TUNED_ON:]
    if not pairs:
        raise EvaluationError(f"--hr={hr} has no more than {TUNED_ON} pictures: nothing is left for --split={split}.")
    return list(first(pairs, limit))


def gather(work: Work) -> None:
    """Copy the split's pictures into the work folder, so that every stage sees these and no others.

    Pictures of an earlier, smaller `--limit` stay; a picture that is there and is another one is refused.
    """
    copied = []
    for pair in work.pairs:
        target = Pair(pair.name, work.hr / f"{pair.name}{pair.hr.suffix}", work.lr / f"{pair.name}{pair.lr.suffix}")
        for source, copy in ((pair.hr, target.hr), (pair.lr, target.lr)):
            if not copy.is_file():
                with replacing(copy) as unfinished:
                    shutil.copyfile(source, unfinished)
            elif copy.read_bytes() != source.read_bytes():
                raise EvaluationError(f"{copy} is another picture than {source}. Give another --work.")
        copied.append(target)
    work.pairs = copied


def read_json(path: Path) -> dict[str, Any]:
    """Return the table that `write_json` wrote; an empty one where there is no file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def measured(work: Work, method: str, folder: Path | None, kept: Path) -> dict[str, dict[str, float]]:
    """Return measure -> picture -> value of the finished pictures in `folder`.

    Values are kept beside a hash of the picture, so that only new pictures are measured.

    Args:
        work: its pairs are what is measured.
        method: its name, for messages.
        folder: of PNG files by the pairs' names; None = the good pictures themselves.
        kept: the file of the values.
    """
    table = read_json(kept)
    found: dict[str, dict[str, float]] = {}
    for pair in tqdm(work.pairs, unit="picture", desc=f"measuring {method}", leave=False):
        path = pair.hr if folder is None else folder / f"{pair.name}.png"
        source = sha256(path)
        entry = table.get(pair.name, {})
        if entry.get("picture") != source or entry.get("efflite") != work.efflite:
            image = evaluate.read_picture(path)
            if folder is None:
                values = evaluate.measure_alone(image)
            else:
                values = evaluate.measure(image, evaluate.read_picture(pair.hr), work.efflite)
            entry = table[pair.name] = {"picture": source, "efflite": work.efflite, "values": values}
            write_json(kept, table)
        for key, value in entry["values"].items():
            found.setdefault(key, {})[pair.name] = value
    return found


def measured_reference(work: Work) -> dict[str, dict[str, float]]:
    """Return the same of the good pictures themselves."""
    return measured(work, REFERENCE, None, work.here / "measured" / f"{REFERENCE}.json")


class Progress:
    """Says before each part of long work which one it is, and how much time is left by those that were done."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.worked, self.spent = total, 0, 0, 0.0

    def begin(self, what: str) -> None:
        """Announce the next part."""
        self._started = time.monotonic()
        left = self.spent / self.worked * (self.total - self.done) if self.worked else None
        time_left = "" if left is None else f"; about {left / 60:.0f} minutes left"
        log.info("%d of %d: %s%s", self.done + 1, self.total, what, time_left)

    def end(self, repeated: bool = False) -> None:
        """Note that it is done; one that only had to be looked up says nothing about the others."""
        self.done += 1
        if not repeated:
            self.worked, self.spent = self.worked + 1, self.spent + time.monotonic() - self._started
