"""JPEG without a file gives what Pillow reads back from one, bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from training.degradation import jpeg as through_a_file
from training.jpeg import round_trip


def picture(height: int, width: int, seed: int) -> Tensor:
    """(3, height, width) in [0, 1]: soft shapes, saturated places and a little noise, as photographs have them."""
    source = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 2 + height // 12, 2 + width // 12, generator=source) * 1.6 - 0.3
    soft = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic")[0]
    return (soft + 0.03 * torch.randn(3, height, width, generator=source)).clamp(0, 1)


@pytest.mark.parametrize("quality", [*range(30, 96, 5), 1, 49, 50, 100])
def test_every_quality_is_exact(quality: int) -> None:
    image = picture(61, 83, quality)
    assert torch.equal(round_trip([image], [quality])[0], through_a_file(image, quality))


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 70), st.integers(1, 70), st.integers(1, 100)), min_size=1, max_size=4),
    seed=st.integers(0, 1000),
)
def test_pictures_of_any_sizes_go_together_exactly(shapes: list[tuple[int, int, int]], seed: int) -> None:
    images = [picture(height, width, seed + place) for place, (height, width, _) in enumerate(shapes)]
    qualities = [quality for *_, quality in shapes]
    for image, quality, result in zip(images, qualities, round_trip(images, qualities), strict=True):
        assert torch.equal(result, through_a_file(image, quality))


@pytest.mark.parametrize("value", [0.0, 1.0, 0.5])
def test_flat_and_extreme_pictures_are_exact(value: float) -> None:
    flat = torch.full((3, 17, 40), value)
    noise = torch.rand(
        3, 40, 17, generator=torch.Generator().manual_seed(0)
    ).round()  # the eight corners of the colours
    for image in (flat, noise, noise * torch.tensor([1.0, 0.0, value])[:, None, None]):
        for quality in (5, 60, 95):
            assert torch.equal(round_trip([image], [quality])[0], through_a_file(image, quality))
