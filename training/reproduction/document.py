"""docs/REPRODUCTION.md from the experiments' files and the stored results: nothing is run for it."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

from .. import published, tables
from ..tables import DIGITS, Results
from . import experiments, pictures, results
from .experiments import Check, Experiment
from .results import Stored
from .verdicts import SEEDS_TO_CLAIM, Judgement, judge, overall
from .work import TUNED_ON

DOCUMENT = "REPRODUCTION.md"
PLOTS = Path("images") / "reproduction"  # beside the document
MEASURES = {**tables.TITLES, "d_kl": "D_kl (nats)", "high": "High frequencies (log power)"}
PLACES = {**DIGITS, "d_kl": 4, "high": 3}
SPLITS = {
    results.HELD_OUT: "held out: RealSR crops that nothing was tuned on",
    results.PHOTOGRAPHS: "held out: photographs that nothing was tuned on, degraded",
    results.TUNING: "tuning: of the first 20 RealSR crops, by which settings and models were chosen",
}

_HEAD = """# The paper's tables and figures, made again

Written by `python -m training.reproduce --render` from `training/reproduction` (claims and settings) and
`docs/reproduction/results` (measured values); do not edit. How to make the results:
[TRAINING.md](TRAINING.md#the-papers-tables-and-figures-made-again).

"""

_RULES = f"""## How to read this

**The model** is nano: trained from nothing on two CPU cores, with a base of its own instead of Stable Diffusion. It can
show whether a mechanism of the paper works in the direction that the paper reports. It cannot show how good ClearSR is.

**A claim** is a difference between two ways on the same picture, whose sign the paper printed. It **agrees** where the
95 % interval of the mean difference lies wholly on the claimed side, **disagrees** where it lies wholly on the other
side, and is **too close to call** otherwise. Between models trained for the comparison, the interval over at
least {SEEDS_TO_CLAIM} trainings has to lie on that side too. A table disagrees if one of its claims does, and agrees
if all do. Nothing is corrected for the number of claims: one interval in twenty misses by chance.

**Pictures.** Tuning and looking happen on the first {TUNED_ON} RealSR crops. The other 80, and photographs that no
training saw, are for the last table only. Which were used is said everywhere. `python -m training.overlap` looks for
training pictures among them.
"""


def together(stored: Stored) -> Results:
    """Return method -> measure -> picture -> value, the mean over the trainings where there are several."""
    first = stored.runs[0]
    return {
        method: {
            key: {name: statistics.fmean(run[method][key][name] for run in stored.runs) for name in values}
            for key, values in table.items()
        }
        for method, table in first.items()
    }


def judged(experiment: Experiment, stored: Stored) -> list[tuple[Check, Judgement | None]]:
    """Return every claim with what came out; None for one whose methods were not run."""
    found = []
    for check in experiment.checks:
        differences = stored.differences(check.measure, check.method, check.against)
        judgement = None
        if differences is not None:
            judgement = judge(differences, check.direction, check.least, trained=experiment.trained)
        found.append((check, judgement))
    return found


def verdict(experiment: Experiment, stored: Stored | None) -> str:
    """Return the word for a whole table or figure."""
    if stored is None:
        return "not run yet"
    return overall(["too close to call" if one is None else one.verdict for _, one in judged(experiment, stored)])


def _signed(mean: float, half_width: float, digits: int) -> str:
    if not math.isfinite(mean):
        return "–"
    spread = f" ± {half_width:.{digits}f}" if math.isfinite(half_width) else ""
    return f"{mean:+.{digits}f}{spread}"


def _checks(experiment: Experiment, stored: Stored) -> str:
    heading = ["Claim", "Difference", "Paper", "Here"]
    rows = [[*heading, "Over trainings", "Verdict"] if experiment.trained else [*heading, "Verdict"]]
    for check, one in judged(experiment, stored):
        row = [check.text, f"{MEASURES[check.measure]}: {check.method} minus {check.against}", check.paper]
        if one is None:
            rows.append([*row, "–", *(["–"] if experiment.trained else []), "not measured"])
            continue
        digits = PLACES[check.measure] + 1
        row.append(_signed(one.pictures.mean, one.pictures.half_width, digits))
        if one.seeds is not None:
            row.append(_signed(one.seeds.mean, one.seeds.half_width, digits))
        rows.append([*row, one.verdict])
    return tables.aligned(rows)


def _values(found: Results) -> str:
    table = tables.summaries(found)
    shown = [key for key in MEASURES if any(key in row for row in table.values())]
    rows = [["", *(tables.title(key) if key in tables.TITLES else MEASURES[key] for key in shown)]]
    for method, row in table.items():
        cells = []
        for key in shown:
            one = row.get(key)
            if one is None or one.count == 0:
                cells.append("–")
            else:
                spread = f" ± {one.half_width:.{PLACES[key]}f}" if math.isfinite(one.half_width) else ""
                cells.append(f"{one.mean:.{PLACES[key]}f}{spread}")
        rows.append([method, *cells])
    return tables.aligned(rows)


def command(experiment: Experiment, split: str = results.TUNING) -> str:
    """Return the command that makes a result."""
    data = " --data=PHOTOGRAPHS" if experiment.trained else ""
    return f"python -m training.reproduce --run={experiment.name} --hr=HR --lr=LR{data} --work=FOLDER --split={split}"


def _made(experiment: Experiment, stored: Stored) -> str:
    made = stored.made
    versions = ", ".join(f"{name} {version}" for name, version in made.versions.items())
    seeds = f", {len(stored.seeds)} trainings of each" if experiment.trained else ""
    budget = "" if made.budget == "full" else f" **Budget {made.budget}: no result, a trial of the machinery.**"
    return (
        f"{len(stored.pictures)} pictures ({SPLITS[stored.split]}){seeds}. `{made.checkpoint}`, sha256 "
        f"{made.sha256[:12]}; {made.date}, {made.hardware}, {versions}.{budget}"
    )


def section(experiment: Experiment, stored: Stored | None, plots: bool) -> str:
    """Return the text of one table or figure."""
    text = f"## {experiment.title}\n\n**Paper.** {experiment.claim}\n\n**Here.** {experiment.setup}\n\n"
    if experiment.paper_table:
        printed = tables.aligned([list(row) for row in experiment.paper_table])
        text += f"As printed, on DRealSR, not measured here:\n\n{printed}\n"
    if stored is None:
        text += f"**Not run yet.** About {experiment.hours:g} hours on two CPU cores:\n\n    {command(experiment)}\n\n"
        return f"{text}**What it will be able to say.** {experiment.limits}\n"
    text += (
        f"Measured here; mean ± half of the 95 % interval of the mean over pictures:\n\n{_values(together(stored))}\n"
    )
    text += f"{_made(experiment, stored)}\n"
    if experiment.published:
        known = published.data_set(experiment.published)
        text += published.markdown(known, {}, len(stored.pictures)).replace("\n## ", "\n### ", 1)
    text += (
        f"\nThe same picture both ways, mean difference ± half of its 95 % interval:\n\n{_checks(experiment, stored)}\n"
    )
    for note in stored.notes:
        text += f"- {note}\n"
    if stored.notes:
        text += "\n"
    if plots:
        text += f"![{experiment.title}]({(PLOTS / experiment.name).as_posix()}.png)\n\n"
    return f"{text}**Verdict: {verdict(experiment, stored)}.** {experiment.limits}\n"


def text(folder: Path, plots: bool = True) -> str:
    """Return the whole document.

    Args:
        folder: of the results.
        plots: link them.
    """
    found = [(experiments.experiment(name), results.shown(folder, name)) for name in experiments.names()]
    rows = [["", "Verdict", "Pictures", "Made"]]
    for experiment, stored in found:
        where = ["–", "–"] if stored is None else [f"{len(stored.pictures)}, {stored.split}", stored.made.date]
        rows.append([experiment.title, verdict(experiment, stored), *where])
    sections = [section(experiment, stored, plots) for experiment, stored in found]
    return "\n".join([f"{_HEAD}{tables.aligned(rows)}", _RULES, *sections])


def render(folder: Path, document: Path) -> None:
    """Write the document and its plots from the stored results alone."""
    document.parent.mkdir(parents=True, exist_ok=True)
    for name in experiments.names():
        stored = results.shown(folder, name)
        if stored is not None:
            pictures.write(
                document.parent / PLOTS / f"{name}.png", experiments.experiment(name), stored, together(stored)
            )
    document.write_text(text(folder), encoding="utf-8")
