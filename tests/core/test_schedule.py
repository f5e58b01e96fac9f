"""The noise schedule, respaced timesteps and the spaced DDPM step."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clearsr_core.schedule import (
    add_noise,
    alphas_cumprod,
    ddpm_step,
    last_timesteps,
    lr_start,
    sigmas,
    spaced_timesteps,
    ve_to_vp,
    vp_to_ve,
)

SPACINGS = ["leading", "linspace", "trailing"]


def test_known_values_of_stable_diffusion():
    """abar_0 = 0.99915, sigma from 0.029 to 14.61, and the LR start 0.0683 x_lr + 0.9977 noise."""
    abar = alphas_cumprod()
    assert abar.dtype == torch.float64 and abar.shape == (1000,)
    assert float(abar[0]) == pytest.approx(1 - 0.00085)
    assert float(sigmas()[0]) == pytest.approx(0.0292, abs=1e-4)
    assert float(sigmas()[-1]) == pytest.approx(14.6146, abs=1e-3)
    one, zero = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
    assert float(lr_start(one, zero)) == pytest.approx(0.0683, abs=1e-4)
    assert float(lr_start(zero, one)) == pytest.approx(0.9977, abs=1e-4)


def test_fifty_steps_as_printed():
    """981, 961, ..., 21, 1."""
    assert spaced_timesteps(50, "leading").tolist() == list(range(981, 0, -20))
    assert spaced_timesteps(50, "trailing").tolist() == list(range(999, 0, -20))
    linspace = spaced_timesteps(50, "linspace").tolist()
    assert linspace[0] == 999 and linspace[-1] == 0


@settings(max_examples=150, deadline=None)
@given(steps=st.integers(1, 1000), spacing=st.sampled_from(SPACINGS))
def test_any_number_of_steps_gives_that_many_falling_timesteps(steps, spacing):
    timesteps = spaced_timesteps(steps, spacing)
    assert timesteps.dtype == torch.int64 and len(timesteps) == steps
    assert int(timesteps.min()) >= 0 and int(timesteps.max()) <= 999
    assert (timesteps.diff() < 0).all()


@pytest.mark.parametrize("spacing", SPACINGS)
def test_one_step_starts_from_pure_noise(spacing):
    assert spaced_timesteps(1, spacing).tolist() == [999]


@settings(max_examples=150, deadline=None)
@given(steps=st.integers(1, 200), denoise=st.floats(0.2, 1.0), spacing=st.sampled_from(SPACINGS))
def test_part_of_the_way_keeps_the_distance_between_steps(steps, denoise, spacing):
    timesteps = last_timesteps(steps, denoise, spacing)
    whole = spaced_timesteps(int(steps / denoise), spacing)
    assert timesteps.tolist() == whole.tolist()[-steps:]
    assert len(timesteps) == steps


def test_half_of_the_way_as_printed():
    assert last_timesteps(5, 0.5).tolist() == [401, 301, 201, 101, 1]
    assert last_timesteps(50, 1.0).tolist() == spaced_timesteps(50).tolist()


@pytest.mark.parametrize(
    ("steps", "denoise", "message"), [(5, 0.0, "denoise is 0.0"), (5, 1.2, "1.2"), (600, 0.5, "1200")]
)
def test_impossible_ways_are_refused(steps, denoise, message):
    with pytest.raises(ValueError, match=message):
        last_timesteps(steps, denoise)


@pytest.mark.parametrize("steps", [0, -3, 1001])
def test_impossible_numbers_of_steps_are_refused(steps):
    with pytest.raises(ValueError, match=f"steps is {steps}"):
        spaced_timesteps(steps)


def test_an_unknown_spacing_is_refused():
    with pytest.raises(ValueError, match="quadratic"):
        spaced_timesteps(10, "quadratic")


@settings(max_examples=50, deadline=None)
@given(sigma=st.floats(0.0, 20.0))
def test_the_two_scales_invert_each_other(sigma):
    x = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(ve_to_vp(vp_to_ve(x, sigma), sigma), x)
    torch.testing.assert_close(ve_to_vp(x, sigma), ve_to_vp(x, torch.tensor(sigma, dtype=torch.float64)))


@pytest.mark.parametrize("timestep", [0, 1, 500, 999])
def test_noising_in_both_scales_is_the_same(timestep):
    """x0 + sigma noise of the variance-exploding samplers is add_noise after conversion."""
    generator = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(2, 4, 3, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    sigma = sigmas()[timestep]
    torch.testing.assert_close(ve_to_vp(x0 + sigma * noise, sigma), add_noise(x0, noise, timestep))
    mixed = add_noise(x0, noise, torch.tensor([timestep, 7]))
    torch.testing.assert_close(mixed[:1], add_noise(x0[:1], noise[:1], timestep))
    torch.testing.assert_close(mixed[1:], add_noise(x0[1:], noise[1:], 7))
    assert add_noise(x0.half(), noise.half(), torch.tensor([1, 2])).dtype == torch.float16


def test_a_perfect_prediction_ends_at_x0():
    """The last step returns the estimate of x_0; with the true noise that is x_0 itself."""
    generator = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(1, 4, 3, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    torch.testing.assert_close(ddpm_step(add_noise(x0, noise, 999), noise, 999, -1, None), x0)


def test_the_posterior_matches_bayes():
    """Mean weights and variance of q(x_s | x_t, x_0), computed the long way for t = 600 -> s = 400."""
    abar = alphas_cumprod()
    t, s = float(abar[600]), float(abar[400])
    ratio = t / s
    precision = 1 / (1 - s) + ratio / (1 - ratio)  # of x_s: from the prior around x_0, and from x_t
    x_t, eps, noise = torch.tensor([0.7]), torch.tensor([-0.2]), torch.tensor([1.3])
    x0 = (0.7 + 0.2 * math.sqrt(1 - t)) / math.sqrt(t)
    mean = (math.sqrt(s) * x0 / (1 - s) + math.sqrt(ratio) * 0.7 / (1 - ratio)) / precision
    expected = mean + 1.3 / math.sqrt(precision)
    assert float(ddpm_step(x_t, eps, 600, 400, noise)) == pytest.approx(expected, rel=1e-5)


def test_steps_that_do_not_fall_are_refused():
    x = torch.zeros(1)
    for timestep, previous in [(5, 5), (5, 6), (1000, 3), (5, -2)]:
        with pytest.raises(ValueError, match="must fall"):
            ddpm_step(x, x, timestep, previous, x)
    with pytest.raises(ValueError, match="noise is missing"):
        ddpm_step(x, x, 5, 3, None)
