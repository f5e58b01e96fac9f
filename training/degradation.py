"""Make a low-quality picture as Real-ESRGAN does: blur, resize, noise and JPEG, twice (Wang et al. 2021, Sec. 3)."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from .blur_kernels import BlurKernel, chance, choose, draw_blur, draw_sinc, uniform
from .pixel_noise import add_gaussian_noise, add_poisson_noise

RESIZE_MODES = {"area": 1.0, "bilinear": 1.0, "bicubic": 1.0}


@dataclass(frozen=True)
class StageSettings:
    """Ranges of one of the two stages; every pair is (lowest, highest)."""

    blur_probability: float
    blur_sigma: tuple[float, float]  # pixels
    resize_shares: tuple[float, float, float]  # enlarge, shrink, keep
    resize_range: tuple[float, float]  # factor; shrink draws below 1, enlarge above
    gaussian_probability: float  # otherwise Poisson
    gaussian_sigma: tuple[float, float]  # grey levels of 255
    poisson_scale: tuple[float, float]
    grey_probability: float  # the same noise in all three channels
    jpeg_quality: tuple[int, int]  # both ends included


@dataclass(frozen=True)
class DegradationSettings:
    """Ranges of the whole degradation."""

    first: StageSettings
    second: StageSettings
    sinc_probability: float = 0.1  # a blur kernel is a sinc filter
    final_sinc_probability: float = 0.8
    generalised_shape: tuple[float, float] = (0.5, 4.0)
    plateau_shape: tuple[float, float] = (1.0, 2.0)


PAPER = DegradationSettings(
    first=StageSettings(
        blur_probability=1.0,
        blur_sigma=(0.2, 3.0),
        resize_shares=(0.2, 0.7, 0.1),
        resize_range=(0.15, 1.5),
        gaussian_probability=0.5,
        gaussian_sigma=(1.0, 30.0),
        poisson_scale=(0.05, 3.0),
        grey_probability=0.4,
        jpeg_quality=(30, 95),
    ),
    second=StageSettings(
        blur_probability=0.8,
        blur_sigma=(0.2, 1.5),
        resize_shares=(0.3, 0.4, 0.3),
        resize_range=(0.3, 1.2),
        gaussian_probability=0.5,
        gaussian_sigma=(1.0, 25.0),
        poisson_scale=(0.05, 2.5),
        grey_probability=0.4,
        jpeg_quality=(30, 95),
    ),
)

LIGHT = DegradationSettings(
    first=StageSettings(
        blur_probability=1.0,
        blur_sigma=(0.2, 3.0),
        resize_shares=(0.2, 0.7, 0.1),
        resize_range=(0.3, 1.5),
        gaussian_probability=0.5,
        gaussian_sigma=(1.0, 15.0),
        poisson_scale=(0.05, 2.0),
        grey_probability=0.4,
        jpeg_quality=(60, 95),
    ),
    second=StageSettings(
        blur_probability=0.5,
        blur_sigma=(0.2, 1.5),
        resize_shares=(0.3, 0.4, 0.3),
        resize_range=(0.6, 1.2),
        gaussian_probability=0.5,
        gaussian_sigma=(1.0, 12.0),
        poisson_scale=(0.05, 1.0),
        grey_probability=0.4,
        jpeg_quality=(60, 100),
    ),
)

# As far from the good picture as what a camera at a shorter focal length takes: little noise and JPEG (decision 0011).
CAMERA = DegradationSettings(
    first=StageSettings(
        blur_probability=1.0,
        blur_sigma=(0.2, 3.0),
        resize_shares=(0.1, 0.5, 0.4),
        resize_range=(0.4, 1.3),
        gaussian_probability=0.5,
        gaussian_sigma=(0.0, 4.0),
        poisson_scale=(0.0, 0.3),
        grey_probability=0.4,
        jpeg_quality=(85, 100),
    ),
    second=StageSettings(
        blur_probability=0.5,
        blur_sigma=(0.2, 1.5),
        resize_shares=(0.2, 0.3, 0.5),
        resize_range=(0.6, 1.2),
        gaussian_probability=0.5,
        gaussian_sigma=(0.0, 3.0),
        poisson_scale=(0.0, 0.2),
        grey_probability=0.4,
        jpeg_quality=(85, 100),
    ),
    final_sinc_probability=0.2,
)

# One settings, or several of which each picture draws one, all alike.
Degradation = DegradationSettings | tuple[DegradationSettings, ...]

Preset = Literal["paper", "light", "camera", "mixed"]
PRESETS: dict[Preset, Degradation] = {"paper": PAPER, "light": LIGHT, "camera": CAMERA, "mixed": (CAMERA, LIGHT)}


@dataclass(frozen=True)
class Stage:
    """What one stage does to one picture; `kernel` None means no blur."""

    kernel: BlurKernel | None
    resize_factor: float
    resize_mode: str
    noise: str  # "gaussian" or "poisson"
    noise_strength: float  # grey levels of 255, or the Poisson scale
    grey_noise: bool
    jpeg_quality: int


@dataclass(frozen=True)
class Recipe:
    """Every drawn number of one degradation but the noise of each pixel."""

    first: Stage
    second: Stage
    final_mode: str  # of the resize to the final size
    final_sinc: BlurKernel | None
    jpeg_last: bool  # resize + sinc, then JPEG; else JPEG first


def _draw_stage(generator: torch.Generator, stage: StageSettings, settings: DegradationSettings) -> Stage:
    kernel = None
    if chance(generator, stage.blur_probability):
        kernel = draw_blur(
            generator,
            sigma=stage.blur_sigma,
            sinc_probability=settings.sinc_probability,
            generalised_shape=settings.generalised_shape,
            plateau_shape=settings.plateau_shape,
        )
    low, high = stage.resize_range
    ranges = {"enlarge": (1.0, high), "shrink": (low, 1.0), "keep": (1.0, 1.0)}
    direction = choose(generator, dict(zip(ranges, stage.resize_shares, strict=True)))
    gaussian = chance(generator, stage.gaussian_probability)
    lowest, highest = stage.jpeg_quality
    return Stage(
        kernel=kernel,
        resize_factor=uniform(generator, *ranges[direction]),
        resize_mode=choose(generator, RESIZE_MODES),
        noise="gaussian" if gaussian else "poisson",
        noise_strength=uniform(generator, *(stage.gaussian_sigma if gaussian else stage.poisson_scale)),
        grey_noise=chance(generator, stage.grey_probability),
        jpeg_quality=int(torch.randint(lowest, highest + 1, (), generator=generator)),
    )


def draw(generator: torch.Generator, settings: Degradation = PAPER) -> Recipe:
    """Draw one recipe from `generator`; of several settings first the ones that it follows."""
    if isinstance(settings, tuple):
        settings = settings[int(torch.randint(len(settings), (), generator=generator))]
    return Recipe(
        first=_draw_stage(generator, settings.first, settings),
        second=_draw_stage(generator, settings.second, settings),
        final_mode=choose(generator, RESIZE_MODES),
        final_sinc=(
            draw_sinc(generator, lowest=math.pi / 3) if chance(generator, settings.final_sinc_probability) else None
        ),
        jpeg_last=chance(generator, 0.5),
    )


def _pad(image: Tensor, margin: int) -> Tensor:
    """Reflect `margin` pixels at every side of (C, H, W); sides too short to reflect repeat their edge."""
    mode = "reflect" if min(image.shape[-2:]) > margin else "replicate"
    return F.pad(image[None], (margin,) * 4, mode=mode)[0]


def blur(image: Tensor, kernel: Tensor) -> Tensor:
    """Filter (3, H, W) on any device with a (k, k) kernel that is symmetric about its centre, as `BlurKernel`s are."""
    height, width = image.shape[-2:]
    kernel = kernel.to(image.device, non_blocking=True)
    k = kernel.shape[0]
    padded = _pad(image, k // 2)  # (3, H + k - 1, W + k - 1)
    # By FFT: the same millisecond for every kernel size, 4 times faster than direct filtering at 21 x 21.
    size = [-(-side // 16) * 16 for side in padded.shape[-2:]]
    product = torch.fft.rfft2(padded, s=size) * torch.fft.rfft2(kernel, s=size)
    return torch.fft.irfft2(product, s=size)[:, k - 1 : k - 1 + height, k - 1 : k - 1 + width]


def resize(image: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """Resize (3, H, W) to `size` = (height, width) without antialiasing, as Real-ESRGAN does."""
    if image.shape[-2:] == size:
        return image
    align_corners = None if mode == "area" else False
    return F.interpolate(image[None], size=size, mode=mode, align_corners=align_corners)[0]


def jpeg(image: Tensor, quality: int) -> Tensor:
    """Send (3, H, W) in [0, 1] on the CPU through a real JPEG file in memory (8 bit, colour at half resolution)."""
    pixels = (image * 255.0).round_().clamp_(0, 255).to(torch.uint8).permute(1, 2, 0).contiguous()
    file = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(file, "JPEG", quality=quality)
    with Image.open(file) as decoded:
        return torch.from_numpy(np.array(decoded)).permute(2, 0, 1).float().div_(255.0).contiguous()


def _apply_noise(image: Tensor, stage: Stage, generator: torch.Generator) -> Tensor:
    add = add_gaussian_noise if stage.noise == "gaussian" else add_poisson_noise
    return add(image, stage.noise_strength, stage.grey_noise, generator)


def until_first_jpeg(hq: Tensor, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """Blur, resize and add noise in the size of the good picture (3, H, W), on its device."""
    stage = recipe.first
    image = blur(hq, stage.kernel.weights()) if stage.kernel else hq
    image = resize(image, _scaled(hq.shape[-2:], stage.resize_factor), stage.resize_mode)
    return _apply_noise(image, stage, generator)


def until_second_jpeg(image: Tensor, recipe: Recipe, final: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Blur, resize and add noise in the size of the low-quality picture, `final`; end it if the JPEG comes last."""
    stage = recipe.second
    if stage.kernel:
        image = blur(image, stage.kernel.weights())
    image = resize(image, _scaled(final, stage.resize_factor), stage.resize_mode)
    image = _apply_noise(image, stage, generator)
    return _end(image, recipe, final) if recipe.jpeg_last else image


def after_second_jpeg(image: Tensor, recipe: Recipe, final: tuple[int, int]) -> Tensor:
    """Return the low-quality picture, (3, *final): ended here unless the JPEG came last, in 8 bits like a real file."""
    if not recipe.jpeg_last:
        image = _end(image, recipe, final)
    return (image * 255.0).round_().clamp_(0.0, 255.0).div_(255.0)


def _end(image: Tensor, recipe: Recipe, final: tuple[int, int]) -> Tensor:
    """Resize to the final size and add ringing."""
    image = resize(image, final, recipe.final_mode)
    return blur(image, recipe.final_sinc.weights()) if recipe.final_sinc else image


def final_size(hq: Tensor, scale: int) -> tuple[int, int]:
    """Return (height, width) of the partner of (..., H, W)."""
    return hq.shape[-2] // scale, hq.shape[-1] // scale


def apply(hq: Tensor, recipe: Recipe, generator: torch.Generator, scale: int = 4) -> Tensor:
    """Follow `recipe`, with shapes as in `degrade`; `generator` gives the noise of each pixel."""
    final = final_size(hq, scale)
    image = jpeg(until_first_jpeg(hq, recipe, generator), recipe.first.jpeg_quality)
    image = jpeg(until_second_jpeg(image, recipe, final, generator), recipe.second.jpeg_quality)
    return after_second_jpeg(image, recipe, final)


def _scaled(size: Sequence[int], factor: float) -> tuple[int, int]:
    return max(1, int(size[0] * factor)), max(1, int(size[1] * factor))


def degrade(hq: Tensor, generator: torch.Generator, settings: Degradation = PAPER, scale: int = 4) -> Tensor:
    """Make one low-quality picture; the same generator state gives the same picture.

    Args:
        hq: (3, H, W) float32 in [0, 1] on the CPU, H and W at least `scale`; never written to.
        generator: CPU generator that every random number comes from.
        settings: ranges; `PAPER`, the milder `LIGHT` and `CAMERA`, or several of which the picture draws one.
        scale: how many times smaller the result is.

    Returns:
        (3, H // scale, W // scale) float32 in [0, 1], multiples of 1 / 255.
    """
    if hq.ndim != 3 or hq.shape[0] != 3 or min(hq.shape[-2:]) < scale:
        raise ValueError(f"hq is {tuple(hq.shape)}; expected (3, H, W) with H and W at least scale = {scale}")
    return apply(hq, draw(generator, settings), generator, scale)


def sharpen(image: Tensor, weight: float = 0.5, radius: int = 25, threshold: float = 10.0) -> Tensor:
    """Sharpen a target by unsharp masking, only where it already has contrast (Real-ESRGAN Sec. 3.4, an option).

    Args:
        image: (3, H, W) in [0, 1].
        weight: share of the lost detail that is added again.
        radius: of the Gaussian in pixels.
        threshold: smallest contrast that is sharpened, in grey levels of 255.

    Returns:
        (3, H, W) in [0, 1].
    """
    sigma = 0.3 * (radius - 1) + 0.8
    kernel = BlurKernel("isotropic", 2 * radius + 1, (sigma, sigma)).weights()
    detail = image - blur(image, kernel)
    mask = blur((detail.abs() * 255.0 > threshold).float(), kernel)
    return torch.lerp(image, (image + weight * detail).clamp(0.0, 1.0), mask).clamp_(0.0, 1.0)
