"""Tables out of what was measured: medians, and medians of ratios between turns of one round."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

BARE, HOST, NAIVE, EACH, ONCE = "bare UNet", "host sampler", "naive ControlNet", "ours", "ours, control once"
UNET, CONTROL, VAE = "UNet", ("DPM", "SPM"), ("VAE encode", "VAE decode")
PAPER_STEPS = 50
Turns = Sequence[dict]


def seconds(turns: Turns) -> list[float]:
    """Return the seconds of each round."""
    return [turn["seconds"] for turn in turns]


def ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """Return the median over rounds of one number over another."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def together(*rows: Sequence[float]) -> list[float]:
    """Add up round by round."""
    return [sum(values) for values in zip(*rows, strict=True)]


def outside(turns: Turns) -> float:
    """Return the share of a run that was spent outside of all networks: sampler, host, nodes, guidance."""
    return statistics.median(1.0 - sum(turn["inside"].values()) / turn["seconds"] for turn in turns)


def image_of_fifty(series: dict, name: str, steps: int) -> list[float] | None:
    """Return, for each round, the seconds of a whole image in the paper's 50 steps: encoding, sampling, decoding.

    Sampling is what was measured for `steps`: the steps without control, and every call of the control, are counted up
    to 50. None where the VAE was not measured.
    """
    ways, parts = series["ways"], series["parts"]
    if not all(name in parts for name in VAE) or name not in ways:
        return None
    rest = together(*(seconds(parts[part]) for part in VAE))
    if name in (BARE, HOST):
        return [PAPER_STEPS / steps * taken + vae for taken, vae in zip(seconds(ways[name]), rest, strict=True)]
    images = []
    for turn, vae in zip(ways[name], rest, strict=True):
        control = sum(turn["inside"][part] for part in CONTROL)
        calls = turn["calls"][CONTROL[0]]
        every = math.ceil(steps / calls) if calls < steps else 1
        fifty = calls / steps * PAPER_STEPS if calls >= steps else 1 if calls == 1 else math.ceil(PAPER_STEPS / every)
        images.append(PAPER_STEPS / steps * (turn["seconds"] - control) + fifty / calls * control + vae)
    return images


def goals(series: dict, steps: int) -> list[tuple[str, float, float]]:
    """Return (what, measured, at most) of the ratios that the design asks for, where they were measured."""
    ways, parts = series["ways"], series["parts"]
    found: list[tuple[str, float, float]] = []
    if EACH in ways and UNET in parts:
        whole = together(*(seconds(parts[part]) for part in (UNET, *CONTROL)))
        step = [taken / steps for taken in seconds(ways[EACH])]
        found.append(("a step with control over the sum of its networks, each alone", ratio(step, whole), 1.05))
    if EACH in ways:
        found.append(("share of that run outside of all networks", outside(ways[EACH]), 0.02))
    if HOST in ways and BARE in ways:
        found.append(("host sampler over bare loop", ratio(seconds(ways[HOST]), seconds(ways[BARE])), 1.02))
    bare, naive, once = (image_of_fifty(series, name, steps) for name in (BARE, NAIVE, ONCE))
    if once and bare:
        found.append(("image of 50 steps, control once, over bare UNet", ratio(once, bare), 1.10))
    if once and naive and series["cfg"] != 1.0:
        found.append(("the same over naive ControlNet", ratio(once, naive), 0.75))
    return found


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _known(value: float | None, form: Callable[[float], str]) -> str:
    return "" if value is None else form(value)


def ways_table(series: dict, steps: int) -> str:
    """One row for each way to sample."""
    bare = series["ways"].get(BARE)
    bare_image = image_of_fifty(series, BARE, steps)
    rows = []
    for name, turns in series["ways"].items():
        peaks = [turn["peak"] for turn in turns if turn["peak"] is not None]
        image = image_of_fifty(series, name, steps) if "tiles" not in name and "guidance" not in name else None
        rows.append(
            [
                name,
                f"{statistics.median(seconds(turns)) / steps:.3f}",
                _known(ratio(seconds(turns), seconds(bare)) if bare else None, "{:.2f}".format),
                _known(statistics.median(image) if image else None, "{:.1f}".format),
                _known(ratio(image, bare_image) if image and bare_image else None, "{:.2f}".format),
                f"{100 * outside(turns):.1f} %",
                f"{turns[0]['calls'][CONTROL[0]]}",
                _known(max(peaks) / 2**20 if peaks else None, "{:.0f}".format),
            ]
        )
    heads = ["Way", "Seconds a step", "Ratio", f"Image of {PAPER_STEPS} steps", "Ratio", "Outside networks"]
    return table([*heads, "Control calls", "Peak memory, MiB"], rows)


def parts_table(series: dict) -> str:
    """One row for each network alone."""
    rows = []
    for name, turns in series["parts"].items():
        taken, work = statistics.median(seconds(turns)), series["operations"][name]
        rows.append([name, f"{taken:.3f}", f"{work / 1e9:.1f}", f"{work / taken / 1e9:.0f}"])
    return table(["Forward", "Seconds", "GMAC", "GMAC per second"], rows)


def markdown(result: dict) -> str:
    """Return everything as one page."""
    request, machine = result["request"], result["machine"]
    sizes = ", ".join(f"{name} {count / 1e6:.1f} M" for name, count in result["parameters"].items())
    text = (
        f"Model {request['size']} ({sizes}), {machine['dtype']}, {machine['device']}, {machine['threads']} threads, "
        f"ComfyUI {machine['comfyui']}, torch {machine['torch']}, {machine['date']}. {request['steps']} steps, "
        f"{request['clock']} clock.\n"
    )
    for series in result["series"]:
        rounds = len(next(iter(series["ways"].values())))
        text += f"\n## {series['pixels']} x {series['pixels']} pixels, cfg {series['cfg']:g}, {rounds} rounds\n\n"
        text += ways_table(series, request["steps"])
        if series["parts"]:
            text += "\n" + parts_table(series)
        reached = [
            [what, f"{value:.3f}", f"{most:g}", "met" if value <= most else f"missed by {value - most:.3f}"]
            for what, value, most in goals(series, request["steps"])
        ]
        if reached:
            text += "\n" + table(["Goal", "Measured", "At most", ""], reached)
    return text


def counts_table(result: dict) -> str:
    """Return the multiply-adds of one step: of the UNet alone, which is the limit, and with the control."""
    rows = []
    for row in result["rows"]:
        control = row["dpm"] + row["spm"]
        counted = (row["unet"], row["dpm"], row["spm"], row["unet"] + control)
        rows.append([f"{row['pixels']}", row["way"], *(f"{count / 1e9:.1f}" for count in counted)])
        rows[-1].append(f"{1 + control / row['unet']:.2f}")
    heads = ["Pixels", "Way", "UNet, GMAC", "DPM", "SPM", "A step with control", "Over UNet"]
    return table(heads, rows)
