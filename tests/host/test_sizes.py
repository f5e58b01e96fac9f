"""Exactly scale x input pixels, whatever the size: the whole graph with the tiny model, its arithmetic for all sizes.

Pictures up to 4096 x 4096 pixels: `test_large.py`.
"""

from __future__ import annotations

import clearsr_rig as rig
import pytest
import torch
from clearsr_runs import apply
from hypothesis import given, settings
from hypothesis import strategies as st

pictures = rig.module("nodes.pictures")
color = rig.module("nodes.color")

SIZES = (16, 33, 100, 511, 512, 513, 1000, 2048)
FACTORS = (1, 2, 3, 4, 8)
SAMPLED = [  # height, width, factor; the areas stay small, so that each run takes a second
    (16, 16, 8),
    (100, 33, 3),
    (16, 100, 8),
    (511, 16, 2),
    (16, 511, 3),
    (512, 33, 1),
    (16, 512, 4),
    (513, 16, 1),
    (33, 513, 2),
    (1000, 16, 2),
    (33, 1000, 1),
    (2048, 16, 1),
    (16, 2048, 2),
    (100, 100, 4),
]


def test_every_size_and_factor_is_sampled() -> None:
    heights, widths, factors = (set(values) for values in zip(*SAMPLED, strict=True))
    assert (heights, widths, factors) == (set(SIZES), set(SIZES), set(FACTORS))


@pytest.mark.parametrize("tile_size", [0, 256])
@pytest.mark.parametrize(("height", "width", "factor"), SAMPLED)
def test_the_whole_graph_ends_at_exactly_scale_times_input(tiny, height, width, factor, tile_size) -> None:
    image = rig.images(1, height, width)
    latent, enlarged = rig.run("ClearSRLREncode", clearsr=tiny["clearsr"], image=image, scale=float(factor))
    model = apply(tiny, latent, tile_size=tile_size)
    result = rig.run("ClearSRLSAKSampler", model=model, lr_latent=latent, seed=1, steps=1)
    decoded = rig.run("VAEDecode", samples=result, vae=tiny["vae"])
    fixed = rig.run("ClearSRColorFix", image=decoded, reference=enlarged)
    assert fixed.shape == (1, factor * height, factor * width, 3) and fixed.isfinite().all()
    assert float(fixed.std()) > 0.01


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 4096), st.integers(1, 4096), st.sampled_from(FACTORS))
def test_padding_is_cut_off_exactly(height, width, factor) -> None:
    """From 1 to 4096 pixels: padded to multiples of 64, which Color Fix takes for padding and nothing else."""
    size = pictures.target_size((height, width), float(factor), 0, 0)
    assert size == (factor * height, factor * width)
    padded = [len(pictures._reflected(length, pictures.PADDING, torch.device("cpu"))) for length in size]
    assert all(length % 64 == 0 and 0 <= length - wanted < 64 for length, wanted in zip(padded, size, strict=True))
    decoded = torch.zeros(1).expand(1, *padded, 3)  # no memory behind it
    assert color.cut_to_reference(decoded, size).shape == (1, *size, 3)
