"""What a comparison says: means with intervals and differences picture by picture, as Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path

from . import provenance

# Every measure that there is, in the order of the columns.
TITLES = {
    "psnr": "PSNR (dB)",
    "ssim": "SSIM",
    "lpips": "LPIPS",
    "dists": "DISTS",
    "niqe": "NIQE",
    "musiq": "MUSIQ",
    "maniqa": "MANIQA",
    "clipiqa": "CLIPIQA",
    "efflite": "EffLite",
    "sharpness": "Sharpness",
}
BETTER = {
    "psnr": "higher",
    "ssim": "higher",
    "lpips": "lower",
    "dists": "lower",
    "niqe": "lower",
    "musiq": "higher",
    "maniqa": "higher",
    "clipiqa": "higher",
    "efflite": "lower",
}
DIGITS = {
    "psnr": 2,
    "ssim": 4,
    "lpips": 4,
    "dists": 4,
    "niqe": 2,
    "musiq": 2,
    "maniqa": 4,
    "clipiqa": 4,
    "efflite": 3,
    "sharpness": 2,
}
REFERENCE = "HR"  # the row of the good pictures themselves
WRITTEN = "evaluation.json"

# method -> measure -> picture -> value
Results = dict[str, dict[str, dict[str, float]]]


class EvaluationError(ValueError):
    """The folders cannot be compared; the message says why and what to do."""


@dataclass(frozen=True)
class Summary:
    """Mean of one measure over the pictures that have a finite value, and the half-width of its 95 % interval."""

    mean: float
    half_width: float
    count: int


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


def summaries(results: Results) -> dict[str, dict[str, Summary]]:
    """Return method -> measure -> `Summary`."""
    return {
        method: {key: summarise(list(values.values())) for key, values in table.items()}
        for method, table in results.items()
    }


def differences(results: Results, against: str) -> dict[str, dict[str, Summary]]:
    """Return method -> measure -> `Summary` of (method minus `against`) on the same picture, for all other methods.

    Pictures differ far more from each other than methods do on one picture, so that these intervals are much narrower
    than those of two means beside each other.
    """
    other = results[against]
    return {
        method: {
            key: summarise([value - other[key][name] for name, value in values.items() if name in other[key]])
            for key, values in table.items()
            if key in other
        }
        for method, table in results.items()
        if method not in (REFERENCE, against)
    }


def verdict(key: str, difference: Summary) -> str:
    """Return "better" or "worse" where 0 lies outside the interval of a difference; otherwise nothing."""
    if key not in BETTER or not abs(difference.mean) > difference.half_width:
        return ""
    return "better" if (difference.mean > 0) == (BETTER[key] == "higher") else "worse"


def title(key: str) -> str:
    """Return the name of a measure with an arrow that points where it is better."""
    return TITLES[key] + {"higher": " ↑", "lower": " ↓", "": ""}[BETTER.get(key, "")]


def aligned(rows: list[list[str]]) -> str:
    """Return a Markdown table, its first row the heading, its columns aligned for reading as plain text."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines) + "\n"


def shown_measures(table: dict[str, dict[str, Summary]]) -> list[str]:
    """Return the measures that at least one row has, in the order of the columns."""
    return [key for key in TITLES if any(key in row for row in table.values())]


def markdown(results: Results, against: str | None) -> str:
    """Return the means, and under them each method's differences to `against`."""
    table = summaries(results)
    shown = shown_measures(table)
    count = len(picture_names(results))
    rows = [["Method", *map(title, shown)]]
    rows += [[method, *(_cell(row.get(key), DIGITS[key]) for key in shown)] for method, row in table.items()]
    noun = "picture" if count == 1 else "pictures"
    text = f"{aligned(rows)}\n{count} {noun}; mean ± half of the 95 % confidence interval of the mean.\n"
    moved = differences(results, against) if against is not None else {}
    if moved:
        rows = [[f"Minus {against}", *map(title, shown)]]
        rows += [[method, *(_difference(key, row.get(key)) for key in shown)] for method, row in moved.items()]
        text += f"\n{aligned(rows)}\nDifference on the same picture, mean ± half of its 95 % interval; "
        text += "▲ better, ▼ worse: 0 lies outside.\n"
    return text


def _cell(summary: Summary | None, digits: int) -> str:
    if summary is None or summary.count == 0:
        return "–"
    spread = "" if math.isnan(summary.half_width) else f" ± {summary.half_width:.{digits}f}"
    return f"{summary.mean:.{digits}f}{spread}"


def _difference(key: str, summary: Summary | None) -> str:
    if summary is None or summary.count == 0:
        return "–"
    sign = "+" if summary.mean >= 0 else ""
    return sign + _cell(summary, DIGITS[key]) + {"better": " ▲", "worse": " ▼", "": ""}[verdict(key, summary)]


def picture_names(results: Results) -> list[str]:
    """Return the names of the pictures, in the order in which they were measured."""
    return list(next(iter(results[REFERENCE].values())))


def _csv(results: Results) -> str:
    """Return one line per picture and method."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    measures = [key for key in TITLES if any(key in table for table in results.values())]
    writer.writerow(["picture", "method", *measures])
    for name in picture_names(results):
        for method, table in results.items():
            writer.writerow([name, method, *(f"{table[key][name]:.6f}" if key in table else "" for key in measures)])
    return text.getvalue()


def as_json(table: dict[str, dict[str, Summary]]) -> dict[str, dict[str, dict[str, float | int | None]]]:
    """Return `summaries` as JSON can hold them: values that are not finite become null."""

    def number(value: float) -> float | None:
        return value if math.isfinite(value) else None  # JSON has no NaN

    return {
        method: {
            key: {"mean": number(one.mean), "half_width": number(one.half_width), "count": one.count}
            for key, one in row.items()
        }
        for method, row in table.items()
    }


def write_tables(
    out: Path,
    settings: dict[str, object],
    results: Results,
    against: str | None = None,
    appendix: str = "",
) -> str:
    """Write evaluation.md, .csv (every picture) and .json (means, differences) to `out`; return the Markdown.

    Args:
        out: made if it is not there.
        settings: what the figures were made with, for evaluation.json.
        results: every value.
        against: the method that the others are compared with; None takes the first.
        appendix: Markdown to put under the tables.
    """
    against = against or next((method for method in results if method != REFERENCE), None)
    text = markdown(results, against) + appendix
    content: dict[str, object] = {
        "settings": settings,
        "pictures": picture_names(results),
        "methods": as_json(summaries(results)),
        "against": against,
        "differences": as_json(differences(results, against)) if against is not None else {},
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "evaluation.md").write_text(text, encoding="utf-8")
    (out / "evaluation.csv").write_text(_csv(results), encoding="utf-8")
    (out / WRITTEN).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return text


def refuse_other(out: Path, settings: dict[str, object], free: tuple[str, ...]) -> None:
    """Refuse an `out` that holds the evaluation of other settings; those in `free` may differ.

    Raises:
        EvaluationError: it would be overwritten; the message names what differs.
    """
    path = out / WRITTEN
    if not path.is_file():
        return
    advice = "Give another --out, or --overwrite=true to replace it."
    try:
        before = json.loads(path.read_text(encoding="utf-8"))["settings"]
        keys = before.keys() | settings.keys()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise EvaluationError(f"--out={out} holds an {WRITTEN} that cannot be read. {advice}") from error
    then, now = provenance.identity(before), provenance.identity(settings)
    changed = sorted(key for key in keys if key not in free and then.get(key) != now.get(key))
    if changed:
        raise EvaluationError(f"--out={out} holds the evaluation of another {', '.join(changed)}. {advice}")
