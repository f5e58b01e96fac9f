"""Plots that a reader can read: labels do not lie on one another."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from training import plots
from training.plots import Dot, DotPanel


@pytest.mark.parametrize("spread", [0.0047, 0.17, 0.9, 130.0])
def test_the_numbers_under_dots_do_not_touch(spread: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: drawn.append(figure))
    dots = [Dot("vae_lora", -0.98 * spread, 0.38 * spread), Dot("unet_lora", 0.53 * spread, 0.47 * spread)]
    panels = [DotPanel(name, dots, [("", 0.0)]) for name in ("PSNR", "SSIM", "NIQE")]

    plots.write_dots(tmp_path / "dots.png", panels, [dot.name for dot in dots], "minus full")

    canvas = FigureCanvasAgg(drawn[0])
    canvas.draw()
    for place in drawn[0].axes:
        boxes = [label.get_window_extent(canvas.get_renderer()) for label in place.get_xticklabels()]
        boxes = sorted((box for box in boxes if box.width > 1), key=lambda box: box.x0)
        assert len(boxes) >= 3  # there is something to read
        assert all(right.x0 - left.x1 >= 3.0 for left, right in pairwise(boxes))
