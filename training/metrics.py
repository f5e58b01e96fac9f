"""Measures of a restored picture: PSNR, SSIM and NIQE exactly as published tables have them, EffLite and sharpness.

Details make published numbers differ between papers, so they are fixed here. PSNR: limited-range Y, not rounded. SSIM:
the same Y rounded, 11 x 11 Gaussian of sigma 1.5, only whole windows. NIQE: full-range Y rounded, no border cropped;
its model of pristine photographs is `data/niqe_pristine.safetensors`, the 36 means and 36 x 36 covariances which
basicsr 1.4.2 (PyPI, Apache-2.0) publishes as `metrics/niqe_pris_params.npz`. Pictures are (H, W, 3) uint8 RGB.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors.numpy import load_file

if TYPE_CHECKING:
    from .perceptual import EffLite

NIQE_PRISTINE = Path(__file__).parent / "data" / "niqe_pristine.safetensors"
NIQE_BLOCK = 96  # side in pixels at full size, half of it at half size


def _check(*images: np.ndarray) -> None:
    for image in images:
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise ValueError(f"expected (H, W, 3) uint8, got {image.shape} {image.dtype}")
    if len({image.shape for image in images}) > 1:
        raise ValueError("the two pictures differ in size: " + " and ".join(str(image.shape) for image in images))


def _weighted(image: np.ndarray, weights: tuple[int, int, int]) -> np.ndarray:
    """Return the weighted sum of the channels as (H, W) int64.

    Whole numbers, because sums of fractions depend on the memory layout in the last bit: one pixel in a thousand lies
    exactly between two grey levels, and how those are rounded moves the NIQE of a picture by up to 0.01.
    """
    red, green, blue = (image[..., channel].astype(np.int64) for channel in range(3))
    return weights[0] * red + weights[1] * green + weights[2] * blue


def limited_luma(image: np.ndarray) -> np.ndarray:
    """Return Y of ITU-R BT.601 as (H, W) float64 in [16, 235], not rounded."""
    return _weighted(image, (65_481, 128_553, 24_966)) / 255_000.0 + 16.0


def full_luma(image: np.ndarray) -> np.ndarray:
    """Return Y as (H, W) float64 in [0, 255], rounded to whole numbers."""
    return np.round(_weighted(image, (299, 587, 114)) / 1000.0)


def _filter_valid(image: np.ndarray, taps: np.ndarray) -> np.ndarray:
    """Filter (H, W) with the separable kernel `taps` x `taps`, whole windows only: (H - n + 1, W - n + 1)."""
    n = len(taps)
    rows = image.shape[0] - n + 1
    columns = image.shape[1] - n + 1
    down = sum(tap * image[i : i + rows] for i, tap in enumerate(taps))
    return sum(tap * down[:, i : i + columns] for i, tap in enumerate(taps))  # type: ignore[return-value]


def _gaussian(size: int, sigma: float) -> np.ndarray:
    offsets = np.arange(size) - size // 2
    taps = np.exp(-0.5 * (offsets / sigma) ** 2)
    return taps / taps.sum()


def psnr_y(image: np.ndarray, reference: np.ndarray) -> float:
    """Return the peak signal-to-noise ratio of Y in dB; infinite for equal pictures."""
    _check(image, reference)
    error = float(np.mean((limited_luma(image) - limited_luma(reference)) ** 2))
    return math.inf if error == 0 else 10.0 * math.log10(255.0**2 / error)


def ssim_y(image: np.ndarray, reference: np.ndarray) -> float:
    """Return the structural similarity of Y (Wang et al. 2004), at most 1.

    ssim = (2 m1 m2 + c1) / (m1^2 + m2^2 + c1) * max(0, (2 s12 + c2) / (s1^2 + s2^2 + c2))
    """
    _check(image, reference)
    taps = _gaussian(11, 1.5)
    if min(image.shape[:2]) < len(taps):
        raise ValueError(f"SSIM needs at least {len(taps)} x {len(taps)} pixels, got {image.shape}")
    c1, c2 = (0.01 * 255.0) ** 2, (0.03 * 255.0) ** 2
    first, second = np.round(limited_luma(image)), np.round(limited_luma(reference))
    mean1, mean2 = _filter_valid(first, taps), _filter_valid(second, taps)
    variance1 = _filter_valid(first * first, taps) - mean1 * mean1
    variance2 = _filter_valid(second * second, taps) - mean2 * mean2
    covariance = _filter_valid(first * second, taps) - mean1 * mean2
    luminance = (2.0 * mean1 * mean2 + c1) / (mean1 * mean1 + mean2 * mean2 + c1)
    structure = (2.0 * covariance + c2) / (variance1 + variance2 + c2)
    return float(np.mean(luminance * np.maximum(structure, 0.0)))


def sharpness(image: np.ndarray) -> float:
    """Return the mean gradient magnitude of Y in grey levels per pixel: 0 for a flat picture."""
    _check(image)
    luma = limited_luma(image)
    if min(luma.shape) < 2:
        return 0.0
    down = luma[1:, :-1] - luma[:-1, :-1]
    right = luma[:-1, 1:] - luma[:-1, :-1]
    return float(np.mean(np.hypot(down, right)))


def efflite(image: np.ndarray, reference: np.ndarray) -> float:
    """Return the EffLite distance to `reference` (see `perceptual.EffLite`): 0 for equal pictures."""
    import torch

    _check(image, reference)

    def tensor(pixels: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(pixels.astype(np.float32) / 127.5 - 1.0).permute(2, 0, 1)[None]  # (1, 3, H, W)

    with torch.no_grad():
        return float(_efflite_network().distance(tensor(image), tensor(reference)))


@functools.lru_cache(maxsize=1)
def _efflite_network() -> EffLite:
    from .perceptual import EffLite

    return EffLite()


@functools.lru_cache(maxsize=1)
def _pristine() -> tuple[np.ndarray, np.ndarray]:
    stored = load_file(NIQE_PRISTINE)
    return stored["mean"], stored["covariance"]


@functools.lru_cache(maxsize=1)
def _shape_table() -> tuple[np.ndarray, np.ndarray]:
    """Return the candidate shapes of the AGGD, and E|x|^2 / E x^2 of a symmetric one of that shape (rises with it)."""
    shapes = np.arange(200, 10_001) / 1000.0
    log_gamma = np.vectorize(math.lgamma)
    ratios = np.exp(2 * log_gamma(2 / shapes) - log_gamma(1 / shapes) - log_gamma(3 / shapes))
    return shapes, ratios


def fit_aggd(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Fit an asymmetric generalised Gaussian to each row of `values` by moments (Lasmar et al. 2009).

    Args:
        values: (n, k).

    Returns:
        Three (n,) arrays: shape, left scale, right scale. NaN where a row has no value on one side of zero.
    """

    def deviation(side: np.ndarray) -> np.ndarray:
        count = side.sum(axis=1)
        squares = np.where(side, values * values, 0.0).sum(axis=1)
        return np.sqrt(np.divide(squares, count, out=np.full(len(values), np.nan), where=count > 0))

    left, right = deviation(values < 0), deviation(values > 0)
    gamma = left / right
    with np.errstate(invalid="ignore"):  # 0 / 0 of a flat row: NaN, as documented
        r = np.mean(np.abs(values), axis=1) ** 2 / np.mean(values * values, axis=1)
    wanted = r * (gamma**3 + 1) * (gamma + 1) / (gamma**2 + 1) ** 2
    shapes, ratios = _shape_table()
    shape = np.full(len(values), np.nan)
    usable = np.isfinite(wanted)
    shape[usable] = shapes[np.abs(ratios[None, :] - wanted[usable, None]).argmin(axis=1)]
    log_gamma = np.vectorize(math.lgamma, otypes=[np.float64])
    scale = np.full(len(values), np.nan)
    scale[usable] = np.exp(0.5 * (log_gamma(1 / shape[usable]) - log_gamma(3 / shape[usable])))
    return shape, left * scale, right * scale


def _normalised(luma: np.ndarray) -> np.ndarray:
    """Return the mean-subtracted, contrast-normalised luma: (I - mean) / (deviation + 1) of a 7 x 7 Gaussian window."""
    taps = _gaussian(7, 7 / 6)
    padded = np.pad(luma, 3, mode="edge")
    mean = _filter_valid(padded, taps)
    variance = _filter_valid(padded * padded, taps) - mean * mean
    return (luma - mean) / (np.sqrt(np.abs(variance)) + 1.0)


def _halved(luma: np.ndarray) -> np.ndarray:
    """Halve (H, W), both even, by an antialiased bicubic filter over mirrored edges, as MATLAB's `imresize`."""
    # The cubic (a = -0.5) at distances 0.25, 0.75, 1.25, 1.75 of the eight pixels around each new one.
    near, far = np.array([0.25, 0.75]), np.array([1.25, 1.75])
    half = np.concatenate([1.5 * near**3 - 2.5 * near**2 + 1, -0.5 * far**3 + 2.5 * far**2 - 4 * far + 2]) / 2
    return _filter_valid(np.pad(luma, 3, mode="symmetric"), np.concatenate([half[::-1], half]))[::2, ::2]


def _block_features(normalised: np.ndarray, side: int) -> np.ndarray:
    """Return (blocks, 18) NIQE features of (H, W) cut into side x side blocks: row by row from the top left."""
    height, width = normalised.shape
    blocks = normalised.reshape(height // side, side, width // side, side).swapaxes(1, 2).reshape(-1, side, side)
    shape, left, right = fit_aggd(blocks.reshape(len(blocks), -1))
    features = [shape, (left + right) / 2]
    for shift in ((0, 1), (1, 0), (1, 1), (1, -1)):
        products = blocks * np.roll(blocks, shift, axis=(1, 2))
        shape, left, right = fit_aggd(products.reshape(len(blocks), -1))
        mean = np.array(
            [math.nan if math.isnan(a) else math.exp(math.lgamma(2 / a) - math.lgamma(1 / a)) for a in shape]
        )
        features += [shape, (right - left) * mean, left, right]
    return np.stack(features, axis=1)


def niqe(image: np.ndarray) -> float:
    """Return the naturalness distance NIQE (Mittal et al. 2013): lower is more natural, 3 to 6 for good photographs.

    Args:
        image: at least two blocks of 96 x 96; what does not fill a block at the right and the bottom is not seen.

    Returns:
        sqrt(d^T ((C_pristine + C_image) / 2)^-1 d) with d the difference of the mean features; NaN for a picture with
        fewer than two blocks that are not flat.
    """
    _check(image)
    rows, columns = image.shape[0] // NIQE_BLOCK, image.shape[1] // NIQE_BLOCK
    if rows * columns < 2:
        raise ValueError(f"NIQE needs at least two blocks of {NIQE_BLOCK} x {NIQE_BLOCK} pixels, got {image.shape}")
    luma = full_luma(image)[: rows * NIQE_BLOCK, : columns * NIQE_BLOCK]
    features = np.concatenate(
        [
            _block_features(_normalised(luma), NIQE_BLOCK),
            _block_features(_normalised(_halved(luma)), NIQE_BLOCK // 2),
        ],
        axis=1,
    )  # (blocks, 36)
    whole = features[np.isfinite(features).all(axis=1)]
    if len(whole) < 2:
        return math.nan
    mean, covariance = _pristine()
    difference = mean - np.nanmean(features, axis=0)
    inverse = np.linalg.pinv((covariance + np.cov(whole, rowvar=False)) / 2)
    return float(np.sqrt(difference @ inverse @ difference))
