"""A pair follows from (seed, number) alone: on either path, in any batch, in any order."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from training import degradation
from training.degradation import LIGHT, PRESETS, degrade
from training.pairs import DegradeOn, degrade_pairs
from training.randomness import generator_for

both_paths = pytest.mark.parametrize("degrade_on", ["cpu", "device"])


def crops(count: int, height: int = 64, width: int = 64, seed: int = 0) -> Tensor:
    """(count, 3, height, width) in [0, 1]: soft shapes with edges, flat places and a little texture."""
    source = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 6, 7, generator=source) * 1.6 - 0.3
    soft = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic")
    soft[:, :, height // 2 :] = soft[:, :, height // 2 :].mul(4).round().div(4)
    return (soft + 0.02 * torch.randn(soft.shape, generator=source)).clamp(0, 1)


@both_paths
@settings(max_examples=12, deadline=None)
@given(
    numbers=st.lists(st.integers(0, 10**9), min_size=4, max_size=4),
    seed=st.integers(0, 10**6),
    order=st.permutations(range(4)),
)
def test_a_pair_depends_on_its_crop_seed_and_number_alone(
    degrade_on: DegradeOn, numbers: list[int], seed: int, order: list[int]
) -> None:
    hq = crops(4, 48, 48)
    together = degrade_pairs(hq, numbers, seed, degrade_on=degrade_on)
    mixed = degrade_pairs(hq[order], [numbers[place] for place in order], seed, degrade_on=degrade_on)
    assert torch.equal(mixed, together[order])
    for place, number in enumerate(numbers):
        alone = degrade_pairs(hq[place : place + 1], [number], seed, degrade_on=degrade_on)
        assert torch.equal(alone[0], together[place])


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(("height", "width", "scale"), [(64, 64, 4), (45, 70, 4), (33, 47, 2), (9, 4, 4)])
def test_both_paths_make_the_same_pairs(preset: str, height: int, width: int, scale: int) -> None:
    """On the CPU every operation is the same or exact: no difference is the size of a recipe's, and none is allowed."""
    hq, numbers = crops(16, height, width), range(100, 116)
    one, other = (degrade_pairs(hq, numbers, 5, PRESETS[preset], scale, path) for path in ("cpu", "device"))
    assert one.shape == (16, 3, height // scale, width // scale)
    assert torch.equal(one, other)


def test_the_cpu_path_is_the_degradation_of_one_picture() -> None:
    hq = crops(3)
    pairs = degrade_pairs(hq, torch.tensor([4, 9, 2]), 1, LIGHT)
    for image, pair, number in zip(hq, pairs, (4, 9, 2), strict=True):
        assert torch.equal(pair, degrade(image, generator_for(1, number), LIGHT))


def test_rounding_of_another_device_hardly_changes_a_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another device rounds filters and resizing otherwise: here they are off by up to four units in the last place."""
    hq, numbers = crops(32), range(32)
    expected = degrade_pairs(hq, numbers, 0)
    noise = torch.Generator().manual_seed(9)
    for name in ("blur", "resize"):
        plain = getattr(degradation, name)

        def off(image: Tensor, *options: object, plain=plain) -> Tensor:
            result = plain(image, *options)
            return result * (1 + 2.4e-7 * (2 * torch.rand(result.shape, generator=noise) - 1))

        monkeypatch.setattr(degradation, name, off)
    difference = (degrade_pairs(hq, numbers, 0, degrade_on="device") - expected).abs() * 255
    assert 0 < float((difference > 0.5).float().mean()) < 0.01
    assert float(difference.mean()) < 0.02


def test_the_device_is_never_asked_for_a_value() -> None:
    """Tensors of the meta device hold no values, so that whatever waits for one fails."""
    hq = crops(8, 40, 56).to("meta")
    pairs = degrade_pairs(hq, range(8), 0, degrade_on="device")
    assert pairs.shape == (8, 3, 10, 14)
    assert pairs.device.type == "meta"
    recipes = [degradation.draw(generator_for(0, number)) for number in range(8)]
    stages = [stage for recipe in recipes for stage in (recipe.first, recipe.second)]
    assert {(stage.noise, stage.grey_noise) for stage in stages} == {
        (noise, grey) for noise in ("gaussian", "poisson") for grey in (True, False)
    }
    assert {recipe.jpeg_last for recipe in recipes} == {True, False}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_makes_nearly_the_same_pairs_without_being_waited_for() -> None:
    hq, numbers = crops(32), range(32)
    on_gpu = hq.cuda()
    degrade_pairs(on_gpu, numbers, 0, degrade_on="device")  # the constant tables are sent once
    torch.cuda.set_sync_debug_mode("error")
    try:
        pairs = degrade_pairs(on_gpu, numbers, 0, degrade_on="device")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    difference = (pairs.cpu() - degrade_pairs(hq, numbers, 0)).abs() * 255
    assert float((difference > 0.5).float().mean()) < 0.05
    assert float(difference.mean()) < 0.1


@both_paths
def test_results_have_8_bits_no_gradient_and_leave_the_crops_alone(degrade_on: DegradeOn) -> None:
    hq = crops(2)
    before = hq.clone()
    pairs = degrade_pairs(hq.requires_grad_(), [0, 1], 0, degrade_on=degrade_on)
    assert not pairs.requires_grad
    assert torch.equal((pairs * 255).round() / 255, pairs)
    assert float(pairs.min()) >= 0
    assert float(pairs.max()) <= 1
    assert torch.equal(hq, before)


@both_paths
def test_the_global_generator_is_neither_read_nor_moved(degrade_on: DegradeOn) -> None:
    hq = crops(2)
    state = torch.get_rng_state()
    first = degrade_pairs(hq, [0, 1], 0, degrade_on=degrade_on)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(1)
    assert torch.equal(first, degrade_pairs(hq, [0, 1], 0, degrade_on=degrade_on))


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 1, 8, 8), (2, 3, 3, 8), (1, 3, 8, 8)])
def test_wrong_shapes_are_refused_with_the_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected \(B, 3, H, W\) with B numbers"):
        degrade_pairs(torch.zeros(shape), [1, 2], 0)
