"""The rules by which the control is looked at: D_kl, PCA and power spectra, on identities that need no model."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from training import analysis


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def orthogonal(size: int, seed: int = 0) -> torch.Tensor:
    return torch.linalg.qr(random(size, size, seed=seed).double())[0]


def mixed(matrix: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    return torch.einsum("dc,chw->dhw", matrix, features.double())


def test_kl_is_zero_for_equal_maps_and_positive_otherwise() -> None:
    first, second = random(5, 64).log_softmax(1), random(5, 64, seed=1).log_softmax(1)
    assert torch.equal(analysis.kl_divergence(first, first), torch.zeros(5))
    assert (analysis.kl_divergence(first, second) > 0).all()


def test_kl_by_hand() -> None:
    p, q = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
    expected = 0.5 * torch.log(torch.tensor(2.0)) + 0.5 * torch.log(torch.tensor(2.0 / 3.0))
    torch.testing.assert_close(analysis.kl_divergence(p, q), expected)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.floats(0.01, 100.0), st.floats(-50.0, 50.0))
def test_an_affine_change_of_x_lr_does_not_move_d_kl(seed: int, scale: float, shift: float) -> None:
    lr_latent, residual = random(4, 16, 16, seed=seed).double(), random(12, 8, 8, seed=seed + 1)
    changed = lr_latent.clone()
    changed[seed % 4] = scale * changed[seed % 4] + shift
    before = analysis.level_divergence(lr_latent, residual)
    assert analysis.level_divergence(changed, residual) == pytest.approx(before, rel=1e-7)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.floats(0.01, 100.0))
def test_what_a_pca_leaves_open_does_not_move_d_kl(seed: int, scale: float) -> None:
    """Signs, order, a rotation of the channels, and a factor of the whole control."""
    lr_latent, residual = random(4, 16, 16, seed=seed), random(12, 8, 8, seed=seed + 1).double()
    before = analysis.level_divergence(lr_latent, residual)
    for changed in (-residual, residual.flip(0), scale * residual, mixed(orthogonal(12, seed), residual)):
        assert analysis.level_divergence(lr_latent, changed) == pytest.approx(before, rel=1e-6)


def test_a_control_that_holds_x_lr_has_d_kl_zero_and_one_that_does_not_has_more() -> None:
    lr_latent = random(4, 16, 16)
    held = mixed(random(9, 4, seed=1).double(), lr_latent)
    unrelated = random(9, 16, 16, seed=2)
    assert analysis.level_divergence(lr_latent, lr_latent) == pytest.approx(0.0, abs=1e-12)
    assert analysis.level_divergence(lr_latent, held) == pytest.approx(0.0, abs=1e-12)
    noisy = held + 0.3 * held.std() * unrelated
    assert 0.01 < analysis.level_divergence(lr_latent, noisy) < analysis.level_divergence(lr_latent, unrelated)


def test_a_control_of_zeros_says_nothing() -> None:
    """P_c is uniform: D_kl = log n - entropy of P_lr."""
    lr_latent = random(4, 8, 8).double()
    log_p = analysis.z_score(lr_latent).flatten(1).log_softmax(1)
    entropy = -(log_p.exp() * log_p).sum(1)
    expected = float((torch.log(torch.tensor(64.0, dtype=torch.float64)) - entropy).mean())
    assert analysis.level_divergence(lr_latent, torch.zeros(6, 8, 8)) == pytest.approx(expected)


def test_d_kl_of_a_control_has_one_value_per_residual() -> None:
    residuals = [random(8, 16, 16), random(8, 8, 8), random(8, 2, 2)]
    values = analysis.control_divergence(random(4, 16, 16), residuals)
    assert len(values) == 3
    assert all(value >= -1e-12 for value in values)  # to rounding
    with pytest.raises(ValueError, match="more than 4"):
        analysis.control_divergence(random(5, 16, 16), residuals)


@pytest.mark.parametrize("count", [3, 8])
def test_components_are_orthonormal_and_padded_to_the_count(count: int) -> None:
    scores = analysis.principal_components(random(5, 9, 7), count).flatten(1)
    expected = torch.eye(count, dtype=torch.float64)
    expected[5:] = 0.0
    torch.testing.assert_close(scores @ scores.T, expected)
    assert scores.sum(1).abs().max() < 1e-9


def test_a_flipped_map_gives_the_same_pca_picture() -> None:
    features = random(6, 8, 8)
    picture = analysis.pca_picture(features)
    assert picture.shape == (8, 8, 3)
    assert picture.min() == 0.0
    assert picture.max() == 1.0
    torch.testing.assert_close(analysis.pca_picture(-features), picture)


def test_a_map_of_one_colour_has_a_black_pca_picture_and_a_flat_spectrum() -> None:
    assert not analysis.pca_picture(torch.full((5, 6, 6), 0.7)).any()
    assert not analysis.relative_spectrum(torch.zeros(5, 6, 6))[1].any()


def test_white_noise_is_flat() -> None:
    radii, values = analysis.radial_mean(analysis.power_spectrum(random(64, 32, 32)))
    assert radii[0] == 0.0
    assert radii[-1] == 1.0
    # Frequency 0 and the highest ones are real numbers, whose logarithm has another mean: compare those between.
    assert (values[1:-1] - values[1:-1].mean()).abs().max() < 0.15


@pytest.mark.parametrize(("size", "waves"), [((32, 32), 5), ((32, 48), 8), ((40, 24), 3)])
def test_a_sinusoid_peaks_at_its_frequency(size: tuple[int, int], waves: int) -> None:
    """`waves` on the shorter side is the ring `waves`, at the radius 2 waves / side."""
    height, width = size
    side = min(size)
    along = torch.arange(height)[:, None] if height == side else torch.arange(width)[None, :]
    wave = torch.cos(2 * torch.pi * waves * along / side).expand(1, height, width)
    radii, values = analysis.radial_mean(analysis.power_spectrum(wave))
    assert int(values.argmax()) == waves
    assert float(radii[waves]) == pytest.approx(2 * waves / side)


def test_power_of_a_constant_lies_in_the_middle() -> None:
    spectrum = analysis.power_spectrum(torch.ones(2, 8, 6))
    assert int(spectrum.argmax()) == 4 * 6 + 3
    assert float(spectrum.max()) == pytest.approx(2 * torch.log(torch.tensor(48.0)).item())


def test_a_factor_does_not_move_the_relative_spectrum() -> None:
    features = random(3, 16, 16)
    torch.testing.assert_close(analysis.relative_spectrum(7.0 * features)[1], analysis.relative_spectrum(features)[1])
