"""What the paper looks at inside the model: D_kl of the control (Eq. 5, App. B), its PCA, power spectra (App. C).

The paper names these without defining them; decision 0017 is how they are read here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

COMPONENTS = 4  # as many as x_lr has channels


def principal_components(features: Tensor, count: int) -> Tensor:
    """Return the first `count` principal components of a feature map, the pixels being the samples.

    Args:
        features: (C, h, w).
        count: 1 or more.

    Returns:
        (count, h, w) float64 scores: each sums to 0 and has length 1, all are orthogonal; 0 from the rank of the map
        on. A score's sign is free in a PCA; here its largest value by magnitude is positive.
    """
    samples = features.double().flatten(1).T  # (h w, C)
    samples = samples - samples.mean(dim=0)
    scores, strengths, _ = torch.linalg.svd(samples, full_matrices=False)
    real = strengths > strengths[0] * max(samples.shape) * torch.finfo(features.dtype).eps
    scores = (scores * real)[:, :count].T  # (up to count, h w)
    scores = F.pad(scores, (0, 0, 0, count - scores.shape[0]))
    largest = scores.gather(1, scores.abs().argmax(dim=1, keepdim=True))
    return torch.where(largest < 0, -scores, scores).reshape(count, *features.shape[1:])


def z_score(maps: Tensor) -> Tensor:
    """Bring each (h, w) of (n, h, w) to mean 0 and deviation 1; a flat one becomes 0."""
    centred = maps - maps.mean(dim=(1, 2), keepdim=True)
    deviation = centred.square().mean(dim=(1, 2), keepdim=True).sqrt()
    flat = deviation <= torch.finfo(maps.dtype).eps * maps.abs().amax(dim=(1, 2), keepdim=True)
    return torch.where(flat, 0.0, centred / torch.where(flat, 1.0, deviation))


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return KL(P || Q) = sum P (log P - log Q) over the last axis, in nats; at least 0, and 0 for P = Q."""
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)


def level_divergence(lr_latent: Tensor, residual: Tensor) -> float:
    """Return D_kl of one control residual: KL(P_lr || P_c), mean over the channels of x_lr.

    P_lr is the softmax over space of the z-scored x_lr, area-resized to the size of c_k. P_c is the same of what the
    first four principal components of c_k hold of x_lr: its orthogonal projection onto their span. The projection takes
    from a PCA only what it fixes, so order, signs and rotations of the components, and any orthogonal mixing of the
    channels of c_k, change nothing. A control of zeros gives a uniform P_c.

    Args:
        lr_latent: (4, h, w) x_lr; an affine change of a channel with a positive factor changes nothing.
        residual: (C, h_k, w_k) c_k.
    """
    if lr_latent.shape[0] > COMPONENTS:
        raise ValueError(f"x_lr {tuple(lr_latent.shape)} has more than {COMPONENTS} channels")
    resized = F.interpolate(lr_latent.double()[None], residual.shape[1:], mode="area")[0]
    wanted = z_score(resized).flatten(1)  # (4, h_k w_k)
    basis = principal_components(residual, COMPONENTS).flatten(1)  # (4, h_k w_k), orthonormal or zero rows
    found = z_score((wanted @ basis.T @ basis).reshape(resized.shape)).flatten(1)
    return float(kl_divergence(wanted.log_softmax(dim=1), found.log_softmax(dim=1)).mean())


def control_divergence(lr_latent: Tensor, residuals: Sequence[Tensor]) -> list[float]:
    """Return D_kl of every residual c_1, c_2, ... of one picture; their mean is the D_kl of Eq. 5.

    Args:
        lr_latent: (4, h, w).
        residuals: (C_k, h_k, w_k) each.
    """
    return [level_divergence(lr_latent, residual) for residual in residuals]


def pca_picture(features: Tensor) -> Tensor:
    """Return the first three principal components of (C, h, w) as RGB: (h, w, 3) in [0, 1], stretched one by one."""
    components = principal_components(features, 3).flatten(1)
    low, high = components.amin(dim=1, keepdim=True), components.amax(dim=1, keepdim=True)
    span = torch.where(high > low, high - low, 1.0)
    return ((components - low) / span).reshape(3, *features.shape[1:]).permute(1, 2, 0)


def power_spectrum(features: Tensor) -> Tensor:
    """Return log |FFT2|^2, mean over the channels, the frequency 0 moved to the middle.

    Args:
        features: (C, h, w).

    Returns:
        (h, w) float64. Powers under 1e-12 of the largest one count as that.
    """
    power = torch.fft.fft2(features.double()).abs().square()
    floor = power.max() * 1e-12
    logarithm = torch.log(power.clamp(min=float(floor) or 1.0))
    return torch.fft.fftshift(logarithm.mean(dim=0))


def radial_mean(spectrum: Tensor) -> tuple[Tensor, Tensor]:
    """Average a shifted spectrum over rings around the frequency 0.

    Args:
        spectrum: (h, w) of `power_spectrum`.

    Returns:
        Two (n,) float64, n = min(h, w) // 2 + 1: the radius of each ring as a share of the highest frequency of the
        grid (0 .. 1; 1 is one wave on two pixels), and the mean on it. The corners beyond 1 are not used.
    """
    height, width = spectrum.shape
    fy = torch.fft.fftshift(torch.fft.fftfreq(height, dtype=torch.float64))[:, None]
    fx = torch.fft.fftshift(torch.fft.fftfreq(width, dtype=torch.float64))[None, :]
    side = min(height, width)
    rings = (side * (fy.square() + fx.square()).sqrt()).round().long().flatten()
    count = side // 2 + 1
    totals = torch.zeros(int(rings.max()) + 1, dtype=torch.float64).index_add_(0, rings, spectrum.double().flatten())
    sizes = torch.bincount(rings)
    return torch.arange(count) * 2.0 / side, (totals / sizes.clamp(min=1))[:count]


def relative_spectrum(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rings' radii and the radial mean of (C, h, w) minus its value at 0, as Figs. 4 and 9 compare them."""
    radii, means = radial_mean(power_spectrum(features))
    return radii, means - means[0]
