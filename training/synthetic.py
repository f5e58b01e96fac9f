"""Pictures drawn from a seed, for trial runs without photographs: dead leaves, with the statistics of photographs."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from .randomness import generator_for

SYNTHETIC = Path("synthetic")
_COUNT, _SIDE = 16, 768
_LEAVES = 8000
_LARGEST, _SMALLEST = 0.3, 0.004  # radii, in sides of the picture


class DeadLeaves:
    """Discs and quadrilaterals of every size that cover each other: edges at all scales, spectrum 1 / f.

    Sizes follow the power law (density r^-3) for which the picture looks the same at every distance.

    Args:
        smallest: pixels that each side has at least.
    """

    def __init__(self, smallest: int) -> None:
        side = max(_SIDE, smallest)
        self.names = [f"synthetic_{index:02d}.png" for index in range(_COUNT)]
        self.sizes = [(side, side)] * _COUNT
        self.chunks = [range(_COUNT)]

    def open(self, index: int) -> io.BytesIO:
        """Draw picture `index` and return it as a PNG."""
        side = 2 * self.sizes[index][0]  # halved at the end, so that edges are smooth
        picture = Image.new("RGB", (side, side), (128, 128, 128))
        draw = ImageDraw.Draw(picture)
        generator = generator_for(0, index)
        for _ in range(_LEAVES):
            u, x, y, *rest = torch.rand(11, generator=generator).tolist()
            # The inverse of the distribution function of the density r^-3.
            radius = side * (_SMALLEST**-2 - u * (_SMALLEST**-2 - _LARGEST**-2)) ** -0.5
            x, y = x * side, y * side
            grey, tint = rest[0], rest[1:4]
            colour = tuple(int(255 * (0.7 * grey + 0.3 * value)) for value in tint)
            if rest[4] < 0.5:
                draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
            else:
                a, b, c = (radius * (0.5 + value) for value in rest[5:8])
                draw.polygon([(x - a, y), (x, y - b), (x + c, y + 0.3 * a), (x - 0.2 * b, y + c)], fill=colour)
        file = io.BytesIO()
        picture.reduce(2).save(file, "PNG", compress_level=1)
        file.seek(0)
        return file
