"""The fingerprint of a base model: the same in every precision and layout, another for a fine-tune."""

from __future__ import annotations

import pytest
import torch

from clearsr_core.config import NANO, TINY
from clearsr_core.fingerprint import SAME, SAMPLED, fingerprint_distance, unet_fingerprint
from clearsr_core.key_maps import unet_from_host, unet_to_host
from clearsr_core.shapes import unet_shapes


def unet(seed=0, config=NANO, scale=0.03):
    """Random weights of a UNet at the spread that trained ones have."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) * scale for name, shape in unet_shapes(config).items()}


def fine_tuned(weights, amount, seed=9):
    """Move every weight by `amount` of its size."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: value + amount * value.square().mean().sqrt() * torch.randn(value.shape, generator=generator)
        for name, value in weights.items()
    }


def distance(first, second):
    return fingerprint_distance(unet_fingerprint(first), unet_fingerprint(second))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("scale", [0.002, 0.03, 1.0])
@pytest.mark.parametrize("dtypes", [(torch.float16,), (torch.bfloat16,), (torch.float16, torch.bfloat16)])
def test_a_copy_in_another_precision_is_the_same_model(seed, scale, dtypes):
    weights = unet(seed, scale=scale)
    copy = weights
    for dtype in dtypes:
        copy = {name: value.to(dtype) for name, value in copy.items()}
    assert distance(weights, copy) < SAME / 2
    assert distance(copy, copy) == 0.0


def test_the_layout_of_the_host_gives_the_same_fingerprint():
    weights = unet()
    assert unet_fingerprint(unet_from_host(unet_to_host(weights, NANO), NANO)) == unet_fingerprint(weights)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("amount", [0.02, 0.1, 0.5])
def test_a_fine_tune_is_another_model_by_about_its_change(seed, amount):
    weights = unet(seed)
    found = distance(weights, fine_tuned(weights, amount))
    assert found > SAME
    assert amount / 3 < found < amount * 3


def test_unrelated_models_are_far_apart_and_a_scaled_one_is_another():
    assert distance(unet(1), unet(2)) > 0.5
    assert distance(unet(1), {name: 1.1 * value for name, value in unet(1).items()}) > SAME


def test_distance_is_symmetric_and_memory_layout_does_not_matter():
    first, second = unet(1), unet(2)
    assert distance(first, second) == distance(second, first)
    strided = {
        name: value.to(memory_format=torch.channels_last) if value.ndim == 4 else value for name, value in first.items()
    }
    assert unet_fingerprint(strided) == unet_fingerprint(first)


@pytest.mark.parametrize("other", ["", "2:1,2,3", "1:", "1:1,2", "1:a,b", "no", "1:" + ",".join(["nan"] * 32)])
def test_what_is_no_fingerprint_is_not_compared(other):
    mine = unet_fingerprint(unet(config=TINY))
    assert fingerprint_distance(mine, other) is None
    assert fingerprint_distance(other, mine) is None


def test_every_configuration_has_the_sampled_weights():
    assert set(SAMPLED) <= set(unet_shapes(TINY))
