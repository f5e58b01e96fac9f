"""The Real-ESRGAN degradation: reproducible from its generator, and drawn from the published ranges."""

from __future__ import annotations

import math
from collections import Counter
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from training import blur_kernels
from training.blur_kernels import BlurKernel
from training.degradation import (
    CAMERA,
    LIGHT,
    PAPER,
    PRESETS,
    DegradationSettings,
    Recipe,
    Stage,
    StageSettings,
    apply,
    blur,
    degrade,
    draw,
    jpeg,
    resize,
    sharpen,
)
from training.randomness import generator_for

DRAWS = 5_000


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def picture(height: int = 96, width: int = 96) -> Tensor:
    """(3, height, width) in [0, 1]: a ramp, stripes and a few edges."""
    y = torch.linspace(0, 1, height)[:, None].expand(height, width)
    x = torch.linspace(0, 1, width)[None, :].expand(height, width)
    return torch.stack([y, (x * 12).sin() * 0.5 + 0.5, ((x * 5).floor() + (y * 5).floor()) % 2])


@pytest.fixture(scope="module")
def drawn() -> dict[str, list[Recipe]]:
    """For each preset the recipes of the pairs 0 .. DRAWS-1, each from its own generator as in training."""
    return {
        name: [draw(generator_for(7, number), settings) for number in range(DRAWS)]
        for name, settings in PRESETS.items()
    }


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


def test_wrong_shapes_are_refused_with_the_shape() -> None:
    with pytest.raises(ValueError, match=r"\(1, 3, 8, 8\)"):
        degrade(torch.zeros(1, 3, 8, 8), generator())
    with pytest.raises(ValueError, match="scale = 4"):
        degrade(torch.zeros(3, 8, 3), generator())


class Published(NamedTuple):
    """Numbers of one stage, from the options of Real-ESRGAN x4plus; of the milder sets, from decision 0011."""

    sigma: tuple[float, float]
    blurred: float
    resize_shares: tuple[float, float, float]  # enlarged, shrunk, kept
    factors: tuple[float, float]
    gaussian: tuple[float, float]
    poisson: tuple[float, float]
    jpeg: tuple[int, int]


FIRST_RESIZE, SECOND_RESIZE = (0.2, 0.7, 0.1), (0.3, 0.4, 0.3)
PUBLISHED = {
    ("paper", "first"): Published((0.2, 3.0), 1.0, FIRST_RESIZE, (0.15, 1.5), (1, 30), (0.05, 3.0), (30, 95)),
    ("paper", "second"): Published((0.2, 1.5), 0.8, SECOND_RESIZE, (0.3, 1.2), (1, 25), (0.05, 2.5), (30, 95)),
    ("light", "first"): Published((0.2, 3.0), 1.0, FIRST_RESIZE, (0.3, 1.5), (1, 15), (0.05, 2.0), (60, 95)),
    ("light", "second"): Published((0.2, 1.5), 0.5, SECOND_RESIZE, (0.6, 1.2), (1, 12), (0.05, 1.0), (60, 100)),
    ("camera", "first"): Published((0.2, 3.0), 1.0, (0.1, 0.5, 0.4), (0.4, 1.3), (0, 4), (0, 0.3), (85, 100)),
    ("camera", "second"): Published((0.2, 1.5), 0.5, (0.2, 0.3, 0.5), (0.6, 1.2), (0, 3), (0, 0.2), (85, 100)),
}
RINGING = {"paper": 0.8, "light": 0.8, "camera": 0.2, "mixed": (0.2 + 0.8) / 2}
SIZES = (7, 9, 11, 13, 15, 17, 19, 21)
KINDS = {
    "sinc": 0.1,
    "isotropic": 0.9 * 0.45,
    "anisotropic": 0.9 * 0.25,
    "generalised isotropic": 0.9 * 0.12,
    "generalised anisotropic": 0.9 * 0.03,
    "plateau isotropic": 0.9 * 0.12,
    "plateau anisotropic": 0.9 * 0.03,
}
MODES = dict.fromkeys(("area", "bilinear", "bicubic"), 1 / 3)
every_stage = pytest.mark.parametrize(("preset", "stage"), PUBLISHED)


def shares_are(counts: Counter, expected: dict) -> None:
    """Exactly the expected outcomes occur, each as often as expected."""
    assert set(counts) == set(expected)
    for outcome, probability in expected.items():
        assert share(counts[outcome], counts.total()) == near(probability, counts.total()), outcome


def stages_of(drawn: dict[str, list[Recipe]], preset: str, stage: str) -> list[Stage]:
    return [getattr(recipe, stage) for recipe in drawn[preset]]


def kernels_of(drawn: dict[str, list[Recipe]], preset: str, stage: str) -> list[BlurKernel]:
    return [each.kernel for each in stages_of(drawn, preset, stage) if each.kernel]


@every_stage
def test_kernel_kinds_and_sizes_follow_the_published_shares(
    drawn: dict[str, list[Recipe]], preset: str, stage: str
) -> None:
    kernels = kernels_of(drawn, preset, stage)
    assert share(len(kernels), DRAWS) == near(PUBLISHED[preset, stage].blurred, DRAWS)
    shares_are(Counter(kernel.kind for kernel in kernels), KINDS)
    shares_are(Counter(kernel.size for kernel in kernels), dict.fromkeys(SIZES, 1 / 8))
    shares_are(Counter(kernel.size for kernel in kernels if kernel.kind == "sinc"), dict.fromkeys(SIZES, 1 / 8))


@every_stage
def test_gaussian_widths_and_angles_are_drawn_evenly(drawn: dict[str, list[Recipe]], preset: str, stage: str) -> None:
    gaussian = [kernel for kernel in kernels_of(drawn, preset, stage) if kernel.kind != "sinc"]
    anisotropic = [kernel for kernel in gaussian if kernel.kind.endswith("anisotropic")]
    evenly([kernel.sigma[0] for kernel in gaussian], *PUBLISHED[preset, stage].sigma)
    evenly([kernel.sigma[1] for kernel in anisotropic], *PUBLISHED[preset, stage].sigma)
    evenly([kernel.angle for kernel in anisotropic], -math.pi, math.pi)
    round_kernels = [kernel for kernel in gaussian if not kernel.kind.endswith("anisotropic")]
    assert {(kernel.sigma[0] - kernel.sigma[1], kernel.angle) for kernel in round_kernels} == {(0.0, 0.0)}


@every_stage
def test_half_of_the_shapes_lie_below_1_and_each_half_evenly(
    drawn: dict[str, list[Recipe]], preset: str, stage: str
) -> None:
    kernels = kernels_of(drawn, preset, stage)
    generalised = [kernel.shape for kernel in kernels if kernel.kind.startswith("generalised")]
    plateau = [kernel.shape for kernel in kernels if kernel.kind.startswith("plateau")]
    low = [shape for shape in generalised if shape < 1]
    assert share(len(low), len(generalised)) == near(0.5, len(generalised))
    evenly(low, 0.5, 1.0)
    evenly([shape for shape in generalised if shape >= 1], 1.0, 4.0)
    # The range of the plateau begins at 1, so that its lower half is that value.
    assert share(sum(shape == 1 for shape in plateau), len(plateau)) == near(0.5, len(plateau))
    evenly([shape for shape in plateau if shape > 1], 1.0, 2.0)
    assert {kernel.shape for kernel in kernels if kernel.kind in ("isotropic", "anisotropic", "sinc")} == {1.0}


@every_stage
def test_sinc_cutoffs_depend_on_the_size(drawn: dict[str, list[Recipe]], preset: str, stage: str) -> None:
    sinc = [kernel for kernel in kernels_of(drawn, preset, stage) if kernel.kind == "sinc"]
    evenly([kernel.cutoff for kernel in sinc if kernel.size < 13], math.pi / 3, math.pi)
    evenly([kernel.cutoff for kernel in sinc if kernel.size >= 13], math.pi / 5, math.pi)


@every_stage
def test_resize_noise_and_jpeg_follow_the_published_shares_and_ranges(
    drawn: dict[str, list[Recipe]], preset: str, stage: str
) -> None:
    published, stages = PUBLISHED[preset, stage], stages_of(drawn, preset, stage)
    factors = [each.resize_factor for each in stages]
    directions = Counter((factor > 1) - (factor < 1) for factor in factors)
    shares_are(directions, dict(zip((1, -1, 0), published.resize_shares, strict=True)))
    evenly([factor for factor in factors if factor > 1], 1.0, published.factors[1])
    evenly([factor for factor in factors if factor < 1], published.factors[0], 1.0)
    shares_are(Counter(each.resize_mode for each in stages), MODES)

    shares_are(Counter(each.noise for each in stages), {"gaussian": 0.5, "poisson": 0.5})
    evenly([each.noise_strength for each in stages if each.noise == "gaussian"], *published.gaussian)
    evenly([each.noise_strength for each in stages if each.noise == "poisson"], *published.poisson)
    for noise in ("gaussian", "poisson"):
        shares_are(Counter(each.grey_noise for each in stages if each.noise == noise), {True: 0.4, False: 0.6})

    lowest, highest = published.jpeg
    qualities = range(lowest, highest + 1)
    shares_are(Counter(each.jpeg_quality for each in stages), dict.fromkeys(qualities, 1 / len(qualities)))


@pytest.mark.parametrize("preset", PRESETS)
def test_the_last_steps_follow_the_published_shares(drawn: dict[str, list[Recipe]], preset: str) -> None:
    recipes = drawn[preset]
    ends = Counter((recipe.final_sinc is not None, recipe.jpeg_last) for recipe in recipes)
    share = {True: RINGING[preset] / 2, False: (1.0 - RINGING[preset]) / 2}
    shares_are(ends, {(ringing, jpeg_last): share[ringing] for ringing in share for jpeg_last in (True, False)})
    shares_are(Counter(recipe.final_mode for recipe in recipes), MODES)
    last = [recipe.final_sinc for recipe in recipes if recipe.final_sinc]
    shares_are(Counter(kernel.size for kernel in last), dict.fromkeys(SIZES, 1 / 8))
    evenly([kernel.cutoff for kernel in last], math.pi / 3, math.pi)


@pytest.mark.parametrize("preset", ["paper", "light", "camera"])
def test_the_two_stages_are_drawn_independently(drawn: dict[str, list[Recipe]], preset: str) -> None:
    noises = Counter((recipe.first.noise, recipe.second.noise) for recipe in drawn[preset])
    shares_are(noises, dict.fromkeys([(a, b) for a in ("gaussian", "poisson") for b in ("gaussian", "poisson")], 0.25))
    pairs = [(recipe.first.jpeg_quality, recipe.second.jpeg_quality) for recipe in drawn[preset]]
    correlation = torch.corrcoef(torch.tensor(pairs, dtype=torch.float64).T)[0, 1]
    assert abs(float(correlation)) < 5 / math.sqrt(DRAWS)


def test_a_mixed_recipe_follows_camera_or_light_in_both_stages_and_each_in_half_of_the_cases(
    drawn: dict[str, list[Recipe]],
) -> None:
    recipes = drawn["mixed"]
    of_camera, of_light = range(85, 101), range(60, 96)
    expected = dict.fromkeys(range(60, 101), 0.0)
    for qualities in (of_camera, of_light):
        for quality in qualities:
            expected[quality] += 0.5 / len(qualities)
    shares_are(Counter(recipe.first.jpeg_quality for recipe in recipes), expected)

    second = Counter(recipe.second.jpeg_quality for recipe in recipes if recipe.first.jpeg_quality not in of_light)
    shares_are(second, dict.fromkeys(of_camera, 1 / len(of_camera)))
    second = Counter(recipe.second.jpeg_quality for recipe in recipes if recipe.first.jpeg_quality not in of_camera)
    shares_are(second, dict.fromkeys(range(60, 101), 1 / 41))


def test_the_second_jpeg_comes_before_or_after_the_resize_and_ringing() -> None:
    """With everything else idle the order shows: a file of the final size has blocks of 8, an enlarged one has not."""
    idle = Stage(None, 1.0, "bicubic", "gaussian", 0.0, False, 100)
    strong = Stage(None, 0.5, "bicubic", "gaussian", 0.0, False, 5)
    hq = torch.rand(3, 128, 128, generator=generator())
    last, first = (
        apply(hq, Recipe(idle, strong, "bicubic", None, jpeg_last), generator()) for jpeg_last in (True, False)
    )
    small = resize(resize(jpeg(hq, 100), (16, 16), "bicubic"), (32, 32), "bicubic")
    assert torch.equal(last, jpeg(small, 5))
    assert not torch.equal(first, last)
    expected = resize(jpeg(resize(jpeg(hq, 100), (16, 16), "bicubic"), 5), (32, 32), "bicubic")
    assert torch.equal(first, (expected * 255.0).round().clamp(0, 255) / 255.0)


def test_light_ranges_lie_inside_the_paper_ranges_and_milder_presets_do_less_damage() -> None:
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

    assert damage(CAMERA) < damage(LIGHT) < damage(PAPER)


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
