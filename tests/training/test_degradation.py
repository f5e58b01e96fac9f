"""The Real-ESRGAN degradation: reproducible from its generator, and drawn from the published ranges."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from training import blur_kernels
from training.blur_kernels import BlurKernel
from training.degradation import (
    LIGHT,
    PAPER,
    PRESETS,
    DegradationSettings,
    Recipe,
    StageSettings,
    add_gaussian_noise,
    add_poisson_noise,
    blur,
    degrade,
    degrade_batch,
    draw,
    jpeg,
    sharpen,
)

DRAWS = 5_000


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def picture(height: int = 96, width: int = 96) -> Tensor:
    """(3, height, width) in [0, 1]: a ramp, stripes and a few edges."""
    y = torch.linspace(0, 1, height)[:, None].expand(height, width)
    x = torch.linspace(0, 1, width)[None, :].expand(height, width)
    return torch.stack([y, (x * 12).sin() * 0.5 + 0.5, ((x * 5).floor() + (y * 5).floor()) % 2])


@pytest.fixture(scope="module")
def recipes() -> list[Recipe]:
    source = generator(7)
    return [draw(source, PAPER) for _ in range(DRAWS)]


@pytest.fixture(scope="module")
def light_recipes() -> list[Recipe]:
    source = generator(8)
    return [draw(source, LIGHT) for _ in range(DRAWS)]


def share(hits: int, total: int) -> float:
    return hits / total


def near(expected: float, total: int) -> object:
    """Within five standard errors of a share over `total` draws."""
    return pytest.approx(expected, abs=5 * math.sqrt(expected * (1 - expected) / total) + 1e-9)


def covers(values: list[float], low: float, high: float) -> None:
    """Every value lies in [low, high], and the outer twentieths of the range are reached."""
    margin = (high - low) / 20
    assert low <= min(values) <= low + margin
    assert high - margin <= max(values) <= high


def evenly(values: list[float], low: float, high: float) -> None:
    """The values lie in [low, high], and mean and spread are those of a uniform draw within five standard errors."""
    covers(values, low, high)
    width, total = high - low, len(values)
    mean = sum(values) / total
    assert mean == pytest.approx((low + high) / 2, abs=5 * width / math.sqrt(12 * total))
    # Var((x - middle)^2) = width^4 / 180 for a uniform x.
    square = sum((value - (low + high) / 2) ** 2 for value in values) / total
    assert square == pytest.approx(width**2 / 12, abs=5 * width**2 / math.sqrt(180 * total))


def test_same_generator_state_gives_the_same_picture_and_another_state_another() -> None:
    hq = picture()
    first, again, other = (degrade(hq, generator(seed)) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_global_generator_is_neither_read_nor_moved() -> None:
    hq = picture()
    torch.manual_seed(1)
    first = degrade(hq, generator())
    state = torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(first, degrade(hq, generator()))
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("name", sorted(PRESETS))
@pytest.mark.parametrize(("height", "width", "scale"), [(96, 96, 4), (64, 130, 4), (33, 47, 2), (16, 16, 4)])
def test_result_has_the_small_size_8_bits_and_leaves_the_target_alone(
    name: str, height: int, width: int, scale: int
) -> None:
    hq = picture(height, width)
    before = hq.clone()
    source = generator()
    for _ in range(4):
        lr = degrade(hq, source, PRESETS[name], scale)
        assert lr.shape == (3, height // scale, width // scale)
        assert lr.dtype == torch.float32
        assert float(lr.min()) >= 0
        assert float(lr.max()) <= 1
        assert torch.allclose(lr * 255, (lr * 255).round(), atol=1e-4)
    assert torch.equal(hq, before)


def test_batch_gives_each_picture_its_own_recipe() -> None:
    hq = picture().expand(3, -1, -1, -1)
    batch = degrade_batch(hq, generator())
    assert batch.shape == (3, 3, 24, 24)
    assert not torch.equal(batch[0], batch[1])
    assert torch.equal(batch[0], degrade(hq[0], generator()))


def test_wrong_shapes_are_refused_with_the_shape() -> None:
    with pytest.raises(ValueError, match=r"\(1, 3, 8, 8\)"):
        degrade(torch.zeros(1, 3, 8, 8), generator())
    with pytest.raises(ValueError, match="scale = 4"):
        degrade(torch.zeros(3, 8, 3), generator())


def test_kernel_kinds_and_sizes_follow_the_published_shares(recipes: list[Recipe]) -> None:
    kernels = [recipe.first.kernel for recipe in recipes]
    assert all(kernel is not None for kernel in kernels)
    kinds = Counter(kernel.kind for kernel in kernels if kernel)
    assert share(kinds["sinc"], DRAWS) == near(0.1, DRAWS)
    published = (0.45, 0.25, 0.12, 0.03, 0.12, 0.03)
    for (kind, _), expected in zip(blur_kernels.SHARES.items(), published, strict=True):
        assert share(kinds[kind], DRAWS) == near(0.9 * expected, DRAWS)
    sizes = Counter(kernel.size for kernel in kernels if kernel)
    assert sorted(sizes) == [7, 9, 11, 13, 15, 17, 19, 21]
    for count in sizes.values():
        assert share(count, DRAWS) == near(1 / 8, DRAWS)


@pytest.mark.parametrize(("stage", "low", "high"), [("first", 0.2, 3.0), ("second", 0.2, 1.5)])
def test_gaussian_widths_angles_and_shapes(recipes: list[Recipe], stage: str, low: float, high: float) -> None:
    drawn = [getattr(recipe, stage).kernel for recipe in recipes]
    gaussian = [kernel for kernel in drawn if kernel and kernel.kind != "sinc"]
    covers([kernel.sigma[0] for kernel in gaussian], low, high)
    for kernel in gaussian:
        if kernel.kind.endswith("anisotropic"):
            assert kernel.sigma[0] != kernel.sigma[1]
        else:
            assert kernel.sigma[0] == kernel.sigma[1]
            assert kernel.angle == 0
    covers([kernel.angle for kernel in gaussian if kernel.kind == "anisotropic"], -math.pi, math.pi)
    covers([kernel.shape for kernel in gaussian if kernel.kind.startswith("generalised")], 0.5, 4.0)
    covers([kernel.shape for kernel in gaussian if kernel.kind.startswith("plateau")], 1.0, 2.0)
    assert {kernel.shape for kernel in gaussian if kernel.kind in ("isotropic", "anisotropic")} == {1.0}


def test_sinc_cutoffs_depend_on_the_size_and_the_last_one_does_not(recipes: list[Recipe]) -> None:
    sinc = [recipe.first.kernel for recipe in recipes if recipe.first.kernel and recipe.first.kernel.kind == "sinc"]
    covers([kernel.cutoff for kernel in sinc if kernel.size < 13], math.pi / 3, math.pi)
    covers([kernel.cutoff for kernel in sinc if kernel.size >= 13], math.pi / 5, math.pi)
    last = [recipe.final_sinc for recipe in recipes if recipe.final_sinc]
    assert share(len(last), DRAWS) == near(0.8, DRAWS)
    covers([kernel.cutoff for kernel in last], math.pi / 3, math.pi)


@pytest.mark.parametrize(
    ("stage", "shares", "low", "high"),
    [("first", (0.2, 0.7, 0.1), 0.15, 1.5), ("second", (0.3, 0.4, 0.3), 0.3, 1.2)],
)
def test_resize_directions_ranges_and_modes(
    recipes: list[Recipe], stage: str, shares: tuple[float, float, float], low: float, high: float
) -> None:
    factors = [getattr(recipe, stage).resize_factor for recipe in recipes]
    counts = (sum(f > 1 for f in factors), sum(f < 1 for f in factors), sum(f == 1 for f in factors))
    for count, expected in zip(counts, shares, strict=True):
        assert share(count, DRAWS) == near(expected, DRAWS)
    covers(factors, low, high)
    modes = Counter(getattr(recipe, stage).resize_mode for recipe in recipes)
    assert set(modes) == {"area", "bilinear", "bicubic"}
    for count in modes.values():
        assert share(count, DRAWS) == near(1 / 3, DRAWS)


@pytest.mark.parametrize(
    ("stage", "sigma", "scale"), [("first", (1.0, 30.0), (0.05, 3.0)), ("second", (1.0, 25.0), (0.05, 2.5))]
)
def test_noise_and_jpeg_ranges(
    recipes: list[Recipe], stage: str, sigma: tuple[float, float], scale: tuple[float, float]
) -> None:
    stages = [getattr(recipe, stage) for recipe in recipes]
    gaussian = [s.noise_strength for s in stages if s.noise == "gaussian"]
    assert share(len(gaussian), DRAWS) == near(0.5, DRAWS)
    covers(gaussian, *sigma)
    covers([s.noise_strength for s in stages if s.noise == "poisson"], *scale)
    assert share(sum(s.grey_noise for s in stages), DRAWS) == near(0.4, DRAWS)
    qualities = Counter(s.jpeg_quality for s in stages)
    assert sorted(qualities) == list(range(30, 96))


def test_second_blur_and_order_of_the_last_steps(recipes: list[Recipe]) -> None:
    sizes = Counter(recipe.final_sinc.size for recipe in recipes if recipe.final_sinc)
    assert sorted(sizes) == list(range(7, 22, 2))
    assert all(share(count, sizes.total()) == near(1 / 8, sizes.total()) for count in sizes.values())
    modes = Counter(recipe.final_mode for recipe in recipes)
    assert all(share(modes[mode], DRAWS) == near(1 / 3, DRAWS) for mode in ("area", "bilinear", "bicubic"))
    assert share(sum(recipe.second.kernel is not None for recipe in recipes), DRAWS) == near(0.8, DRAWS)
    assert share(sum(recipe.jpeg_last for recipe in recipes), DRAWS) == near(0.5, DRAWS)


@pytest.mark.parametrize("stage", ["first", "second"])
def test_kernels_of_both_stages_have_the_same_shares(recipes: list[Recipe], stage: str) -> None:
    kernels = [kernel for recipe in recipes if (kernel := getattr(recipe, stage).kernel)]
    kinds, sizes = Counter(kernel.kind for kernel in kernels), Counter(kernel.size for kernel in kernels)
    for kind, expected in {"sinc": 0.1, **{kind: 0.9 * part for kind, part in blur_kernels.SHARES.items()}}.items():
        assert share(kinds[kind], len(kernels)) == near(expected, len(kernels))
    for size in range(7, 22, 2):
        assert share(sizes[size], len(kernels)) == near(1 / 8, len(kernels))


PUBLISHED = {
    # preset, stage: sigma of the blur, its probability, resize, Gaussian noise, Poisson noise, JPEG
    ("paper", "first"): ((0.2, 3.0), 1.0, (0.15, 1.5), (1, 30), (0.05, 3.0), (30, 95)),
    ("paper", "second"): ((0.2, 1.5), 0.8, (0.3, 1.2), (1, 25), (0.05, 2.5), (30, 95)),
    ("light", "first"): ((0.2, 3.0), 1.0, (0.3, 1.5), (1, 15), (0.05, 2.0), (60, 95)),
    ("light", "second"): ((0.2, 1.5), 0.5, (0.6, 1.2), (1, 12), (0.05, 1.0), (60, 100)),
}


@pytest.mark.parametrize(("preset", "stage"), PUBLISHED)
def test_every_range_is_drawn_evenly(
    recipes: list[Recipe], light_recipes: list[Recipe], preset: str, stage: str
) -> None:
    sigma, blurred, scales, gaussian, poisson, (lowest, highest) = PUBLISHED[preset, stage]
    stages = [getattr(recipe, stage) for recipe in (recipes if preset == "paper" else light_recipes)]
    kernels = [each.kernel for each in stages if each.kernel]
    assert share(len(kernels), DRAWS) == near(blurred, DRAWS)
    evenly([kernel.sigma[0] for kernel in kernels if kernel.kind != "sinc"], *sigma)
    evenly([each.resize_factor for each in stages if each.resize_factor > 1], 1.0, scales[1])
    evenly([each.resize_factor for each in stages if each.resize_factor < 1], scales[0], 1.0)
    evenly([each.noise_strength for each in stages if each.noise == "gaussian"], *gaussian)
    evenly([each.noise_strength for each in stages if each.noise == "poisson"], *poisson)
    qualities = Counter(each.jpeg_quality for each in stages)
    assert sorted(qualities) == list(range(lowest, highest + 1))
    for count in qualities.values():
        assert share(count, DRAWS) == near(1 / (highest - lowest + 1), DRAWS)


def test_light_ranges_lie_inside_the_paper_ranges_and_do_less_damage() -> None:
    def inside(narrow: tuple[float, float], wide: tuple[float, float]) -> bool:
        return narrow != wide and wide[0] <= narrow[0] and narrow[1] <= wide[1]

    for stage in ("first", "second"):
        light: StageSettings = getattr(LIGHT, stage)
        paper: StageSettings = getattr(PAPER, stage)
        assert inside(light.resize_range, paper.resize_range)
        assert inside(light.gaussian_sigma, paper.gaussian_sigma)
        assert inside(light.poisson_scale, paper.poisson_scale)
        assert light.jpeg_quality[0] > paper.jpeg_quality[0]
    assert LIGHT.second.blur_probability == 0.5

    hq = picture()
    reference = torch.nn.functional.interpolate(hq[None], scale_factor=0.25, mode="area")[0]

    def damage(settings: DegradationSettings) -> float:
        source = generator(5)
        return sum(float((degrade(hq, source, settings) - reference).square().mean()) for _ in range(25))

    assert damage(LIGHT) < damage(PAPER)


@pytest.mark.parametrize("kind", [*blur_kernels.SHARES, "sinc"])
def test_kernels_sum_to_one_and_are_symmetric_about_the_centre(kind: str) -> None:
    weights = BlurKernel(kind, 15, (2.5, 0.8), 0.6, 1.7, 1.4).weights()
    assert weights.shape == (15, 15)
    assert float(weights.sum()) == pytest.approx(1, abs=1e-5)
    assert torch.allclose(weights, weights.flip(0, 1), atol=1e-7)


def test_gaussian_kernel_has_the_width_and_direction_that_were_asked_for() -> None:
    weights = BlurKernel("anisotropic", 21, (2.5, 0.9), math.pi / 6).weights().double()
    offsets = torch.arange(21, dtype=torch.float64) - 10
    y, x = offsets[:, None], offsets[None, :]
    along = math.cos(math.pi / 6) * x + math.sin(math.pi / 6) * y
    across = math.cos(math.pi / 6) * y - math.sin(math.pi / 6) * x
    assert float((weights * along**2).sum()) == pytest.approx(2.5**2, rel=0.01)
    assert float((weights * across**2).sum()) == pytest.approx(0.9**2, rel=0.01)
    assert float((weights * along * across).sum()) == pytest.approx(0, abs=0.01)


def test_sinc_passes_low_frequencies_and_stops_high_ones() -> None:
    weights = BlurKernel("sinc", 21, cutoff=math.pi / 2).weights()
    positions = torch.arange(64, dtype=torch.float32).expand(3, 64, 64)
    for frequency, low, high in ((math.pi / 4, 0.85, 1.15), (math.pi * 0.8, 0.0, 0.15)):
        wave = torch.cos(positions * frequency)
        ratio = blur(wave, weights)[:, :, 16:-16].std() / wave[:, :, 16:-16].std()
        assert low <= float(ratio) <= high


def test_blur_by_fft_equals_direct_filtering() -> None:
    image = torch.rand(3, 40, 29, generator=generator())
    weights = BlurKernel("plateau anisotropic", 13, (2.0, 0.7), 1.1, 1.5).weights()
    padded = torch.nn.functional.pad(image[None], (6, 6, 6, 6), mode="reflect")
    direct = torch.nn.functional.conv2d(padded, weights.expand(3, 1, 13, 13), groups=3)[0]
    assert torch.allclose(blur(image, weights), direct, atol=1e-5)


@pytest.mark.parametrize("add", [add_gaussian_noise, add_poisson_noise])
def test_grey_noise_is_equal_in_all_channels_and_coloured_noise_is_not(
    add: Callable[[Tensor, float, bool, torch.Generator], Tensor],
) -> None:
    flat = torch.full((3, 32, 32), 128 / 255)
    grey = add(flat, 0.2, True, generator()) - flat
    coloured = add(flat, 0.2, False, generator()) - flat
    assert torch.allclose(grey[0], grey[1], atol=1e-6)
    assert not torch.allclose(coloured[0], coloured[1], atol=1e-4)


def test_noise_has_the_strength_that_was_asked_for() -> None:
    middle = torch.full((3, 128, 128), 0.5)
    assert float(add_gaussian_noise(middle, 10.0, False, generator()).std()) == pytest.approx(10 / 255, rel=0.03)
    # Shot noise of a count n has variance n: sqrt(0.5 / photons) here, with 256 distinct levels.
    ramp = torch.linspace(0.4, 0.6, 128).expand(3, 128, 128)
    levels = len(torch.unique((ramp * 255).round()))
    photons = 2 ** math.ceil(math.log2(levels))
    noise = add_poisson_noise(ramp, 0.5, False, generator()) - ramp
    assert float(noise.std()) == pytest.approx(0.5 * math.sqrt(0.5 / photons), rel=0.05)


def test_jpeg_loses_more_at_lower_quality() -> None:
    image = torch.rand(3, 48, 48, generator=generator())
    low, high = (float((jpeg(image, quality) - image).square().mean()) for quality in (30, 95))
    assert low > high > 0


def test_sharpening_is_the_published_formula() -> None:
    """51 x 51 Gaussian with OpenCV's width for that side, weight 0.5, threshold 10, soft mask (Real-ESRGAN)."""
    image = torch.rand(3, 70, 60, generator=generator()) * 0.2 + 0.4
    image[:, :, 30:] += 0.2
    x = torch.arange(-25, 26, dtype=torch.float64)
    line = torch.exp(-x.square() / (2 * (0.3 * ((51 - 1) / 2 - 1) + 0.8) ** 2))
    kernel = (line[:, None] * line / line.sum() ** 2).float()

    def smooth(values: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(values[None], (25,) * 4, mode="reflect")
        return torch.nn.functional.conv2d(padded, kernel.expand(3, 1, 51, 51), groups=3)[0]

    residual = image - smooth(image)
    mask = smooth((residual.abs() * 255 > 10).float())
    expected = mask * (image + 0.5 * residual).clamp(0, 1) + (1 - mask) * image
    assert torch.allclose(sharpen(image), expected, atol=1e-5)


def test_sharpening_steepens_edges_and_leaves_flat_areas_alone() -> None:
    image = torch.full((3, 120, 160), 0.4)
    image[:, :, 80:] = 0.6
    sharp = sharpen(image)
    assert torch.allclose(sharp[:, :, :20], image[:, :, :20], atol=1e-5)
    assert float(sharp[0, 60, 80]) > 0.61
    assert float(sharp[0, 60, 79]) < 0.39
    assert float(sharp.min()) >= 0
    assert float(sharp.max()) <= 1
