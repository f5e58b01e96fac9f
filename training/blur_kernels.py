"""Random blur kernels of Real-ESRGAN (Wang et al. 2021, Sec. 3): Gaussian families and the circular sinc filter."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

SIZES = tuple(range(7, 22, 2))
SMALL = 13  # below this side a sinc kernel must not cut lower than pi / 3, or it holds less than one ring

# Kind of kernel -> its share among the kernels that are not sinc.
SHARES = {
    "isotropic": 0.45,
    "anisotropic": 0.25,
    "generalised isotropic": 0.12,
    "generalised anisotropic": 0.03,
    "plateau isotropic": 0.12,
    "plateau anisotropic": 0.03,
}


@dataclass(frozen=True)
class BlurKernel:
    """The numbers of one kernel.

    Args:
        kind: a key of `SHARES`, or "sinc".
        size: side in pixels, odd.
        sigma: standard deviations along the two axes before rotation, in pixels (Gaussian families only).
        angle: rotation in radians, counter-clockwise (anisotropic kinds only).
        shape: exponent beta of the generalised and the plateau Gaussian; 1 for the plain one.
        cutoff: cut-off frequency of the sinc filter in radians per pixel, up to pi.
    """

    kind: str
    size: int
    sigma: tuple[float, float] = (0.0, 0.0)
    angle: float = 0.0
    shape: float = 1.0
    cutoff: float = math.pi

    def weights(self) -> Tensor:
        """Return the kernel as (size, size) float32 with sum 1, symmetric about its centre.

        With q = p^T Sigma^-1 p of the pixel offset p and r = |p|:

            Gaussian and generalised   exp(-q^beta / 2)
            plateau                    1 / (1 + q^beta)
            sinc                       cutoff J1(cutoff r) / (2 pi r),  cutoff^2 / (4 pi) at r = 0
        """
        offsets = torch.arange(self.size, dtype=torch.float64) - self.size // 2
        y, x = offsets[:, None], offsets[None, :]
        if self.kind == "sinc":
            r = torch.sqrt(x * x + y * y)
            rings = self.cutoff * torch.special.bessel_j1(self.cutoff * r) / (2 * math.pi * r.clamp_min(1e-12))
            values = torch.where(r == 0, torch.full_like(r, self.cutoff**2 / (4 * math.pi)), rings)
        else:
            along = math.cos(self.angle) * x + math.sin(self.angle) * y
            across = math.cos(self.angle) * y - math.sin(self.angle) * x
            q = (along / self.sigma[0]).square() + (across / self.sigma[1]).square()
            values = 1 / (1 + q**self.shape) if self.kind.startswith("plateau") else torch.exp(-0.5 * q**self.shape)
        return (values / values.sum()).float()


def uniform(generator: torch.Generator, low: float, high: float) -> float:
    """Draw one number in [low, high)."""
    return low + (high - low) * float(torch.rand((), generator=generator, dtype=torch.float64))


def chance(generator: torch.Generator, probability: float) -> bool:
    """Draw True with the given probability."""
    return uniform(generator, 0.0, 1.0) < probability


def choose(generator: torch.Generator, shares: dict[str, float]) -> str:
    """Draw a key of `shares` with probability proportional to its value."""
    position = uniform(generator, 0.0, sum(shares.values()))
    for name, share in shares.items():
        position -= share
        if position < 0:
            return name
    return next(reversed(shares))


def _draw_size(generator: torch.Generator) -> int:
    return SIZES[int(torch.randint(len(SIZES), (), generator=generator))]


def draw_sinc(generator: torch.Generator, *, lowest: float | None = None) -> BlurKernel:
    """Draw a sinc kernel; the cut-off starts at `lowest`, or at pi / 3 for small and pi / 5 for large kernels."""
    size = _draw_size(generator)
    low = lowest if lowest is not None else math.pi / (3 if size < SMALL else 5)
    return BlurKernel("sinc", size, cutoff=uniform(generator, low, math.pi))


def draw_blur(
    generator: torch.Generator,
    *,
    sigma: tuple[float, float],
    sinc_probability: float,
    generalised_shape: tuple[float, float],
    plateau_shape: tuple[float, float],
) -> BlurKernel:
    """Draw one kernel of any kind; ranges are (low, high), `sigma` in pixels."""
    if chance(generator, sinc_probability):
        return draw_sinc(generator)
    size = _draw_size(generator)
    kind = choose(generator, SHARES)
    first = uniform(generator, *sigma)
    anisotropic = kind.endswith("anisotropic")
    second = uniform(generator, *sigma) if anisotropic else first
    angle = uniform(generator, -math.pi, math.pi) if anisotropic else 0.0
    shape = 1.0
    if kind.startswith(("generalised", "plateau")):
        low, high = generalised_shape if kind.startswith("generalised") else plateau_shape
        # Real-ESRGAN draws flat-topped and peaked kernels equally often: half of the exponents lie below 1.
        shape = uniform(generator, low, 1.0) if chance(generator, 0.5) else uniform(generator, 1.0, high)
    return BlurKernel(kind, size, (first, second), angle, shape)
