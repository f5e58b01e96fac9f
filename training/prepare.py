"""Check photographs and pack them into shards: `python -m training.prepare --data=FOLDER[,FOLDER] [--out=SHARDS]`."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import itertools
import json
import logging
import statistics
import sys
import warnings
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePath

from PIL import Image
from tqdm import tqdm

from . import command_line, config, layouts, shards
from .picture_files import ORIENTATION, SUFFIXES, read_rgb, reason, upright_size

log = logging.getLogger("clearsr.training")

SIDES = (256, 512, 1024, 2048, 4096)  # borders of the histogram of shorter sides
COPIED = {"JPEG": ".jpg", "PNG": ".png"}  # formats that go into shards byte for byte
# What to do about each kind of picture that is left out.
ADVICE = {
    "broken": "Fetch them again, or delete them.",
    "cut off": "The download or copy stopped early: fetch them again.",
    "small": "They are too small for --smallest; lower it if your crops are smaller.",
    "same content": "Only the first of each is used; --keep_duplicates=true keeps all.",
    "low-resolution copy": "Training makes its own low-resolution pictures.",
    "held out for measuring": "Results are measured on them; a model must not have seen them.",
}


@dataclass(frozen=True)
class PrepareSettings:
    """What to check, and what to make of it."""

    data: tuple[Path, ...]  # folders, searched with everything below them
    out: Path = Path()  # folder for the shards; empty = only check
    report: Path = Path()  # JSON file with the whole report; empty = report.json among the shards
    smallest: int = 512  # pictures with a side under this many pixels, shrunk or not, are left out
    shard_mb: int = 256  # size of one shard, in 1e6 bytes
    long_side: int = 0  # larger pictures are shrunk to this many pixels, as PNG; 0 = never
    limit_ffhq: int = 10_000  # the paper takes the first 10,000 faces; 0 = all
    keep_duplicates: bool = False  # keep pictures whose files are equal byte for byte
    threads: int = 4  # that read and decode


@dataclass(frozen=True)
class Finding:
    """What the check found out about one file."""

    path: Path
    name: str  # path below the data folder; with several data folders their names come first
    where: PurePath  # path with the data folder's name in any case
    data_set: str  # a name of `layouts`, or "other"
    bytes: int
    sha256: str = ""
    height: int = 0  # upright
    width: int = 0
    format: str = ""  # Pillow's name
    mode: str = ""  # Pillow's name
    rotated: bool = False  # EXIF says that the file lies on its side or head
    left_out: str = ""  # why, a key of `ADVICE` or free text; empty = used
    detail: str = ""


def examine(path: Path, name: str, where: PurePath, settings: PrepareSettings) -> Finding:
    """Read and decode one file from its first to its last byte, and judge it; arguments as the fields of `Finding`."""
    layout = layouts.layout_of(where)
    data_set = layout.name if layout else layouts.OTHER
    try:
        data = path.read_bytes()
    except OSError as error:
        return Finding(path, name, where, data_set, 0, left_out="broken", detail=error.strerror or reason(error))
    found = Finding(path, name, where, data_set, len(data), hashlib.sha256(data).hexdigest())
    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(data)) as picture:
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            height, width = upright_size(picture)
            found = dataclasses.replace(
                found,
                height=height,
                width=width,
                format=picture.format or "",
                mode=picture.mode,
                rotated=picture.getexif().get(ORIENTATION, 1) != 1,
            )
            picture.load()
    except Exception as error:  # Pillow raises many kinds for damaged files; each belongs into the report.
        why = reason(error)
        return dataclasses.replace(found, left_out="cut off" if why == "cut off" else "broken", detail=why)
    final = _shrunk(height, width, settings.long_side)
    if min(final) < settings.smallest:
        shrunk = "" if final == (height, width) else f", shrunk to {final[1]}x{final[0]}"
        return dataclasses.replace(found, left_out="small", detail=f"{width}x{height}{shrunk}")
    return dataclasses.replace(found, left_out=layouts.why_left_out(where, layout, settings.limit_ffhq) or "")


def _shrunk(height: int, width: int, long_side: int) -> tuple[int, int]:
    """Return (height, width) with a longer side of at most `long_side` pixels (0 = any) and the same shape."""
    if not 0 < long_side < max(height, width):
        return height, width
    factor = long_side / max(height, width)
    return max(1, round(height * factor)), max(1, round(width * factor))


def _files(settings: PrepareSettings) -> tuple[list[tuple[Path, str, PurePath]], int]:
    """Return picture files with their names and places, in the order of training, and the number of other files."""
    files: list[tuple[Path, str, PurePath]] = []
    others = 0
    for folder in settings.data:
        if not folder.is_dir():
            raise ValueError(f"--data={folder} is not a folder. Give folders of photographs, separated by commas.")
        root = PurePath(folder.resolve().name)
        everything = sorted(path for path in folder.rglob("*") if path.is_file())
        pictures = [path for path in everything if path.suffix.lower() in SUFFIXES]
        if not pictures:
            raise ValueError(
                f"No pictures in {folder}: {len(everything)} files, none of them {', '.join(sorted(SUFFIXES))}."
            )
        for path in pictures:
            below = path.relative_to(folder)
            files.append((path, (root / below if len(settings.data) > 1 else below).as_posix(), root / below))
        others += len(everything) - len(pictures)
    return files, others


def survey(settings: PrepareSettings) -> tuple[list[Finding], int]:
    """Examine every picture; return the findings in the order of training, and the number of files passed over."""
    files, others = _files(settings)
    findings: list[Finding] = []
    first: dict[str, str] = {}
    with ThreadPoolExecutor(max(1, settings.threads)) as pool:
        examined = pool.map(lambda file: examine(file[0], file[1], file[2], settings), files)
        for finding in tqdm(examined, total=len(files), desc="checking", unit="picture", mininterval=1):
            if not finding.left_out and not settings.keep_duplicates:
                original = first.setdefault(finding.sha256, finding.name)
                if original != finding.name:
                    finding = dataclasses.replace(finding, left_out="same content", detail=f"as {original}")
            findings.append(finding)
    return findings, others


def _kinds(finding: Finding) -> list[str]:
    """Name what is special about a picture's pixels; all of these are usable."""
    mode = finding.mode
    names = {"RGB": "RGB", "RGBA": "with alpha", "LA": "grey with alpha", "L": "grey", "CMYK": "CMYK", "P": "palette"}
    kind = "16 bit" if mode.startswith("I") else "floating point" if mode == "F" else names.get(mode, mode)
    return [kind, *(["rotated by EXIF"] if finding.rotated else [])]


def _sides(pictures: Sequence[Finding]) -> dict[str, int]:
    """Count pictures by their shorter side."""
    labels = [f"under {SIDES[0]}", *(f"{a} to {b - 1}" for a, b in itertools.pairwise(SIDES))]
    counts = Counter(sum(min(p.height, p.width) >= side for side in SIDES) for p in pictures)
    return {label: counts[place] for place, label in enumerate([*labels, f"{SIDES[-1]} and more"])}


def _summary(name: str, found: Sequence[Finding]) -> dict[str, object]:
    """Return the row of one data set."""
    used = [finding for finding in found if not finding.left_out]
    row: dict[str, object] = {"name": name, "pictures": len(found), "used": len(used)}
    if used:
        by_area = sorted(used, key=lambda finding: finding.height * finding.width)
        row["megapixels"] = round(sum(f.height * f.width for f in used) / 1e6, 1)
        row["bytes"] = sum(finding.bytes for finding in used)
        for label, finding in (("least", by_area[0]), ("largest", by_area[-1])):
            row[label] = f"{finding.width}x{finding.height}"
        middle = (statistics.median(getattr(finding, side) for finding in used) for side in ("width", "height"))
        row["median"] = "x".join(f"{value:.0f}" for value in middle)
        row["shorter_side"] = _sides(used)
    return row


def report(findings: Sequence[Finding], others: int, settings: PrepareSettings) -> dict[str, object]:
    """Return everything that there is to say about the data, as a table that JSON can hold."""
    sets: dict[str, list[Finding]] = defaultdict(list)
    left_out: dict[str, list[str]] = defaultdict(list)
    same_name: dict[str, list[str]] = defaultdict(list)
    for finding in findings:
        sets[finding.data_set].append(finding)
        if finding.left_out:
            left_out[finding.left_out].append(f"{finding.name} ({finding.detail})" if finding.detail else finding.name)
        else:
            same_name[PurePath(finding.name).name.lower()].append(finding.name)
    said = []
    for layout in layouts.LAYOUTS:
        if layout.name in sets:
            paths = [finding.where for finding in sets[layout.name] if not finding.left_out]
            said += layouts.remarks(layout, paths, settings.limit_ffhq)
    return {
        "data_sets": [_summary(name, found) for name, found in sorted(sets.items())],
        "total": _summary("total", findings),
        "colour": dict(Counter(kind for f in findings if not f.left_out for kind in _kinds(f)).most_common()),
        "left_out": left_out,
        "same_name": {name: names for name, names in same_name.items() if len(names) > 1},
        "other_files": others,
        "remarks": said,
    }


def as_text(table: dict[str, object]) -> str:
    """Lay a report out for reading."""
    columns = ("name", "pictures", "used", "megapixels", "least", "median", "largest")
    summaries = [*table["data_sets"], table["total"]]  # type: ignore[misc]
    rows = [columns, *([_cell(row.get(column, "")) for column in columns] for row in summaries)]
    widths = [max(len(row[place]) for row in rows) for place in range(len(columns))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    sides: dict[str, int] = table["total"].get("shorter_side", {})  # type: ignore[attr-defined]
    if sides:
        lines += ["", "Shorter side in pixels:"]
        most = max(sides.values())
        lines += [f"  {label:>13}  {count:>7,}  {'#' * round(30 * count / most)}" for label, count in sides.items()]
    colour: dict[str, int] = table["colour"]  # type: ignore[assignment]
    if colour:
        lines += ["", "Colour: " + ", ".join(f"{count:,} {kind}" for kind, count in colour.items()) + "."]
    left_out: dict[str, list[str]] = table["left_out"]  # type: ignore[assignment]
    for why, names in left_out.items():
        lines += ["", f"Left out, {why}: {len(names):,}. {ADVICE.get(why, '')}".rstrip()]
        lines += [f"  {name}" for name in names[:10]]
        lines += [f"  and {len(names) - 10:,} more (all are in the JSON report)"] * (len(names) > 10)
    same: dict[str, list[str]] = table["same_name"]  # type: ignore[assignment]
    if same:
        lines += ["", f"{len(same):,} names occur more than once with other content, for example:"]
        lines += [f"  {', '.join(names)}" for names in list(same.values())[:3]]
    if table["other_files"]:
        lines += ["", f"{table['other_files']:,} files are no pictures and are passed over."]
    lines += ["", *remarks] if (remarks := list(table["remarks"])) else []  # type: ignore[call-overload]
    return "\n".join(lines)


def _cell(value: object) -> str:
    return f"{value:,}" if isinstance(value, int | float) else str(value)


def _entry(finding: Finding, long_side: int) -> shards.Entry:
    """Return a picture as it goes into a shard: its own bytes where possible, else pixels as PNG."""
    data = finding.path.read_bytes()
    if hashlib.sha256(data).hexdigest() != finding.sha256:
        raise ValueError(f"{finding.path} has changed since it was checked. Run the command again.")
    height, width = _shrunk(finding.height, finding.width, long_side)
    shrink = (height, width) != (finding.height, finding.width)
    if finding.format in COPIED and not shrink:
        return shards.Entry(finding.name, COPIED[finding.format], data, finding.height, finding.width)
    picture = Image.fromarray(read_rgb(io.BytesIO(data)))
    if shrink:
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    picture.save(file, "PNG")
    return shards.Entry(finding.name, ".png", file.getvalue(), picture.height, picture.width)


def pack(findings: Sequence[Finding], settings: PrepareSettings) -> shards.ShardIndex:
    """Write the usable pictures as shards into `settings.out`, or go on with that."""
    used = [finding for finding in findings if not finding.left_out]
    content = [[(finding.name, finding.sha256) for finding in used], settings.shard_mb, settings.long_side]
    plan = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    size = sum(finding.bytes for finding in used)
    with tqdm(total=size, desc="packing", unit="B", unit_scale=True, mininterval=1) as bar:

        def advance(number: int) -> None:
            bar.update(used[number].bytes)

        def entry(number: int) -> shards.Entry:
            return _entry(used[number], settings.long_side)

        return shards.write_shards(settings.out, len(used), entry, plan, settings.shard_mb * 1_000_000, advance)


def run(settings: PrepareSettings) -> dict[str, object]:
    """Check the data, say what was found, write the shards if asked; return the report."""
    packs = settings.out != Path()
    if settings.shard_mb < 1:
        raise config.ConfigError(f"--shard_mb={settings.shard_mb}: give the size of a shard in megabytes, 1 or more.")
    if 0 < settings.long_side < settings.smallest:
        raise config.ConfigError(
            f"--long_side={settings.long_side} would shrink pictures below --smallest={settings.smallest}."
        )
    if packs and any(settings.out.absolute().is_relative_to(folder.absolute()) for folder in settings.data):
        raise config.ConfigError(f"--out={settings.out} lies inside --data. Give a folder outside of it.")
    findings, others = survey(settings)
    table = report(findings, others, settings)
    log.info("%s", as_text(table))
    if not any(not finding.left_out for finding in findings):
        raise ValueError(f"None of the {len(findings)} pictures can be used; the list above says why.")
    if packs:
        index = pack(findings, settings)
        members = sum(len(shard.members) for shard in index.shards)
        table["shards"] = {"count": len(index.shards), "pictures": members, "bytes": sum(s.bytes for s in index.shards)}
        log.info("%d pictures in %d shards: train with --data=%s", members, len(index.shards), settings.out)
    target = settings.report if settings.report != Path() else settings.out / "report.json" if packs else None
    if target:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(table, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return table


@command_line.command("Stopped. The same command goes on behind the last whole shard.")
def main(arguments: list[str]) -> int:
    """Run from the command line; return the exit status."""
    run(command_line.settings(PrepareSettings, arguments, __doc__))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
