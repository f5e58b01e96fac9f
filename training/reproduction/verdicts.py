"""Whether a measured difference agrees with the sign that the paper printed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ..tables import Summary, summarise

Verdict = Literal["agrees", "disagrees", "too close to call"]
SEEDS_TO_CLAIM = 3  # trainings of both sides that a difference between trained models needs


@dataclass(frozen=True)
class Judgement:
    """One difference and what it says."""

    verdict: Verdict
    pictures: Summary  # of the difference on the same picture; the mean over seeds, where there are several
    seeds: Summary | None  # of the mean difference of each training; None where nothing was trained


def side(interval: Summary, threshold: float) -> int:
    """Return +1 or -1 where a 95 % interval lies wholly above or below `threshold`, and 0 where it holds it.

    An interval that is not known (one value, none that is finite) decides nothing.
    """
    if not math.isfinite(interval.mean) or not math.isfinite(interval.half_width):
        return 0
    if abs(interval.mean - threshold) <= interval.half_width:
        return 0
    return 1 if interval.mean > threshold else -1


def judge(
    differences: Sequence[dict[str, float]], direction: Literal[-1, 1], least: float = 0.0, *, trained: bool = False
) -> Judgement:
    """Judge one claim: "the difference is above `least`" (direction 1), or "below minus `least`" (direction -1).

    It agrees where the whole 95 % interval over the pictures lies on the claimed side, disagrees where it lies on the
    other one, and is too close to call in between. Between trained models the interval over the trainings must lie
    on the same side as well, and there must be `SEEDS_TO_CLAIM` of them: pictures say nothing about the luck of a run.

    Args:
        differences: for each training (one, where nothing was trained) picture -> difference; not finite = left out.
        direction: the sign that the paper printed.
        least: 0 or more.
        trained: the two sides are models trained for this.
    """
    names = [name for name in differences[0] if all(name in table for table in differences)]
    together = {name: statistics.fmean(table[name] for table in differences) for name in names}
    pictures = summarise(list(together.values()))
    shared = [name for name, value in together.items() if math.isfinite(value)]
    seeds = summarise([statistics.fmean(table[name] for name in shared) for table in differences]) if shared else None
    found = side(pictures, direction * least)
    if not trained:
        return Judgement(_verdict(found, direction), pictures, None)
    seeds = seeds or Summary(math.nan, math.nan, 0)
    if len(differences) < SEEDS_TO_CLAIM or side(seeds, direction * least) != found:
        found = 0
    return Judgement(_verdict(found, direction), pictures, seeds)


def _verdict(found: int, direction: int) -> Verdict:
    return "too close to call" if found == 0 else "agrees" if found == direction else "disagrees"


def overall(verdicts: Sequence[Verdict]) -> Verdict:
    """Return one word for all claims of a table: one that disagrees decides, then one that is open."""
    if "disagrees" in verdicts:
        return "disagrees"
    return "agrees" if verdicts and set(verdicts) == {"agrees"} else "too close to call"
