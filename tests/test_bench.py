"""The benchmark's arithmetic: ratios are of one round, images of 50 steps count every call, goals are the design's."""

from __future__ import annotations

import pytest

from bench import __main__ as command
from bench import report
from tools.terminal import ToolError


def turn(seconds, unet=0.0, control=0.0, calls=0, peak=2**20):
    """One turn; `control` seconds are DPM's, SPM has none."""
    inside = {"UNet": unet, "DPM": control, "SPM": 0.0}
    return {"seconds": seconds, "peak": peak, "inside": inside, "calls": {"UNet": 4, "DPM": calls, "SPM": calls}}


def series(cfg=2.0, pace=(1.0, 2.0)):
    """Four steps in two rounds, the second at half the pace: a UNet step takes 1, a control 0.5, the VAE 3."""
    ways = {
        "bare UNet": (4.0, 4.0, 0.0, 0),
        "host sampler": (4.04, 4.0, 0.0, 0),
        "naive ControlNet": (8.0, 4.0, 4.0, 4),
        "ours": (6.06, 4.0, 2.0, 4),
        "ours, control every 2": (5.06, 4.0, 1.0, 2),
        "ours, control once": (4.56, 4.0, 0.5, 1),
    }
    parts = {"UNet": 1.0, "DPM": 0.5, "SPM": 0.0001, "VAE encode": 1.0, "VAE decode": 2.0}
    return {
        "pixels": 512,
        "cfg": cfg,
        "ways": {
            name: [turn(factor * t, factor * u, factor * c, n) for factor in pace]
            for name, (t, u, c, n) in ways.items()
        },
        "parts": {name: [turn(factor * t) for factor in pace] for name, t in parts.items()},
        "operations": dict.fromkeys(parts, 1e9),
    }


def test_ratios_are_of_one_round() -> None:
    """A machine that halves its pace changes no ratio."""
    assert report.ratio([2.0, 6.0], [1.0, 3.0]) == 2.0
    # The median of the rounds' ratios 3, 2, 1: sums, means and medians before dividing all give something else.
    assert report.ratio([3.0, 20.0, 4.0], [1.0, 10.0, 4.0]) == 2.0
    assert report.outside(series()["ways"]["ours"]) == pytest.approx(0.06 / 6.06)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("bare UNet", 50.0 + 3.0),
        ("host sampler", 50.5 + 3.0),
        ("naive ControlNet", 100.0 + 3.0),
        ("ours", 50.75 + 25.0 + 3.0),
        ("ours, control every 2", 50.75 + 12.5 + 3.0),
        ("ours, control once", 50.75 + 0.5 + 3.0),
    ],
)
def test_an_image_of_fifty_steps_counts_every_control_call(name, expected) -> None:
    assert report.image_of_fifty(series(), name, 4) == pytest.approx([expected, 2 * expected])


def test_an_image_without_vae_is_not_told() -> None:
    one = series()
    del one["parts"]["VAE decode"]
    assert report.image_of_fifty(one, "ours", 4) is None


def test_goals() -> None:
    found = {what: (value, most) for what, value, most in report.goals(series(), 4)}
    assert [most for _value, most in found.values()] == [1.05, 0.02, 1.02, 1.10, 0.75]
    assert [value for value, _most in found.values()] == pytest.approx(
        [1.515 / 1.5001, 0.06 / 6.06, 1.01, 54.25 / 53, 54.25 / 103]
    )
    # Without guidance a naive ControlNet is evaluated for one row, as ours is.
    assert len(report.goals(series(cfg=1.0), 4)) == len(found) - 1


def test_the_page_says_what_was_met_and_what_was_missed() -> None:
    machine = {"dtype": "float32", "device": "a processor", "threads": 2, "comfyui": "0", "torch": "2", "date": "today"}
    one = series()
    one["ways"]["ours"] = [turn(9.0, 4.0, 2.0, 4), turn(18.0, 8.0, 4.0, 4)]
    result = {
        "request": {"size": "toy", "steps": 4, "rounds": 2, "clock": "wall"},
        "machine": machine,
        "parameters": {"UNet": 1e6},
    }
    page = report.markdown({**result, "series": [one]})
    assert "missed by" in page
    assert "met" in page
    assert "| ours, control once | 1.710 |" in page


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--pixels=500"], "multiples of 64"),
        (["--pixels=many"], "expected numbers"),
        (["--cfg="], "--cfg needs a number"),
        (["--rounds=0"], "at least 1"),
        (["--device=cuda", "--clock=processor"], "of a CPU"),
    ],
)
def test_impossible_options_are_refused_before_anything_starts(options, complaint, monkeypatch) -> None:
    monkeypatch.setattr(command, "measured", lambda *_: pytest.fail("a ComfyUI process was started"))
    with pytest.raises(ToolError, match=complaint):
        command.main(options)
