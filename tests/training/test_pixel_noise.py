"""Noise of the degradation: as strong as asked for, truly Poisson, and drawn without a look at the picture."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from training.pixel_noise import add_gaussian_noise, add_poisson_noise, alias_tables

Add = Callable[[Tensor, float, bool, torch.Generator], Tensor]
both = pytest.mark.parametrize("add", [add_gaussian_noise, add_poisson_noise])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@both
def test_grey_noise_is_equal_in_all_channels_and_coloured_noise_is_not(add: Add) -> None:
    flat = torch.full((3, 32, 32), 128 / 255)
    grey = add(flat, 0.2, True, generator()) - flat
    coloured = add(flat, 0.2, False, generator()) - flat
    assert torch.allclose(grey[0], grey[1], atol=1e-6)
    assert not torch.allclose(coloured[0], coloured[1], atol=1e-4)


@both
@pytest.mark.parametrize("grey", [True, False])
def test_the_generator_moves_on_by_the_size_alone(add: Add, grey: bool) -> None:
    """Otherwise a first JPEG that is off by one level would change all noise of the second stage."""
    states = []
    for image in (torch.zeros(3, 20, 31), torch.rand(3, 20, 31, generator=generator(1))):
        source = generator()
        add(image, 0.5, grey, source)
        states.append(source.get_state())
    assert torch.equal(*states)


@both
def test_a_changed_pixel_changes_the_noise_of_no_other(add: Add) -> None:
    image = torch.rand(3, 40, 40, generator=generator(1))
    swapped = image.clone()
    swapped[:, 20, 20], swapped[:, 7, 30] = image[:, 7, 30], image[:, 20, 20]
    differs = (add(image, 0.5, False, generator()) != add(swapped, 0.5, False, generator())).any(0)
    assert differs.nonzero().tolist() == [[7, 30], [20, 20]]


def test_gaussian_noise_has_the_strength_that_was_asked_for() -> None:
    middle = torch.full((3, 128, 128), 0.5)
    assert float(add_gaussian_noise(middle, 10.0, False, generator()).std()) == pytest.approx(10 / 255, rel=0.03)


@pytest.mark.parametrize("levels", [1, 2, 3, 64, 65, 129])
def test_shot_noise_counts_as_many_photons_as_there_are_levels(levels: int) -> None:
    """A count of n photons has variance n: sqrt(value / photons) of the value."""
    chosen = (torch.arange(levels) + 60) / 255
    image = chosen.repeat_interleave(-(-40_000 // levels)).expand(3, 1, -1)
    photons = 2 ** math.ceil(math.log2(levels))
    noise = add_poisson_noise(image, 0.05, False, generator()) - image
    expected = 0.05 * math.sqrt(float(image.mean()) / photons)
    assert float(noise.std()) == pytest.approx(expected, rel=0.03)
    assert abs(float(noise.mean())) < 5 * expected / math.sqrt(noise.numel())


def test_counts_follow_the_poisson_distribution() -> None:
    """One level, so one photon: the counts of a mean of 1/2 have the shares exp(-1/2) (1/2)^k / k!."""
    image = torch.full((3, 200, 200), 128 / 255)
    noise = add_poisson_noise(image, 0.01, False, generator()) - image
    counts = (noise / 0.01 + 128 / 255).round().long().flatten()
    total, mean = counts.numel(), 128 / 255
    for count in range(6):
        expected = math.exp(-mean) * mean**count / math.factorial(count)
        tolerance = 5 * math.sqrt(expected * (1 - expected) / total)
        assert float((counts == count).double().mean()) == pytest.approx(expected, abs=tolerance)


def test_black_stays_black() -> None:
    assert not add_poisson_noise(torch.zeros(3, 30, 30), 3.0, False, generator()).any()


@pytest.mark.parametrize("seed", range(3))
def test_alias_tables_hold_exactly_their_distributions(seed: int) -> None:
    source = np.random.default_rng(seed)
    weights = source.random((20, 33)) ** source.integers(1, 40, (20, 1))
    weights[0], weights[1, 1:], weights[2, :-1] = 1.0, 0.0, 0.0  # even; all at either end
    probabilities = weights / weights.sum(axis=1, keepdims=True)
    keep, alias = alias_tables(probabilities)
    held = keep.copy()
    np.add.at(held, (np.arange(20)[:, None].repeat(33, axis=1), alias), 1.0 - keep)
    np.testing.assert_allclose(held / 33, probabilities, atol=1e-13)
