"""Our spaced DDPM walks diffusers' trajectory, with the same noise, at every spacing."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler

from clearsr_core.schedule import add_noise, alphas_cumprod, ddpm_step, lr_start, spaced_timesteps

pytestmark = pytest.mark.parity

SPACINGS = ["leading", "linspace", "trailing"]


def make_scheduler(spacing, dtype=torch.float64):
    """SD 2.1's scheduler; in float64 with our table, since its own is summed up in float32."""
    scheduler = DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        variance_type="fixed_small",
        clip_sample=False,
        timestep_spacing=spacing,
        steps_offset=1,
    )
    if dtype == torch.float64:
        scheduler.alphas_cumprod = alphas_cumprod()
        scheduler.one = torch.ones((), dtype=dtype)
    return scheduler


def model(x, timestep):
    """Some function of state and time in the place of a network."""
    return torch.tanh(x * (1 + timestep / 500)) + 0.1 * x.flip(-1)


def diffusers_trajectory(scheduler, steps, start, seed):
    scheduler.set_timesteps(steps)
    generator, x, states = torch.Generator().manual_seed(seed), start, []
    for timestep in scheduler.timesteps:
        x = scheduler.step(model(x, int(timestep)), timestep, x, generator=generator).prev_sample
        states.append(x)
    return states


def our_trajectory(timesteps, start, seed):
    generator, x, states = torch.Generator().manual_seed(seed), start, []
    for timestep, previous in zip(timesteps, [*timesteps[1:], -1], strict=True):
        noise = torch.randn(x.shape, generator=generator, dtype=x.dtype)
        x = ddpm_step(x, model(x, timestep), timestep, previous, noise)
        states.append(x)
    return states


def start(dtype):
    return torch.randn(2, 4, 5, 3, generator=torch.Generator().manual_seed(0), dtype=dtype)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [2, 7, 20, 30, 49, 50, 333])
def test_the_trajectory_is_diffusers(spacing, steps):
    """Every state on the way, numbers of steps that divide 1000 or not; diffusers floors a variance at 1e-20."""
    timesteps = spaced_timesteps(steps, spacing).tolist()
    scheduler = make_scheduler(spacing)
    theirs = diffusers_trajectory(scheduler, steps, start(torch.float64), seed=4)
    assert timesteps == scheduler.timesteps.tolist()
    ours = our_trajectory(timesteps, start(torch.float64), seed=4)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_single_precision_with_the_stock_scheduler(spacing):
    """As users run it; the tables differ in the sixth digit."""
    theirs = diffusers_trajectory(make_scheduler(spacing, torch.float32), 50, start(torch.float32), seed=4)
    ours = our_trajectory(spaced_timesteps(50, spacing).tolist(), start(torch.float32), seed=4)
    torch.testing.assert_close(ours[-1], theirs[-1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_all_numbers_of_steps_have_diffusers_timesteps(spacing):
    """Except 1, which has its own rule, and 1000 `leading`, where the offset would leave the table."""
    scheduler = make_scheduler(spacing)
    for steps in range(2, 1000):
        scheduler.set_timesteps(steps)
        assert spaced_timesteps(steps, spacing).tolist() == scheduler.timesteps.tolist()[:steps], steps


def test_noising_and_the_lr_start():
    """add_noise of both agree, one timestep per item; the LR start is add_noise at 999."""
    x0, noise = start(torch.float32), start(torch.float32).flip(0)
    timesteps = torch.tensor([3, 999])
    theirs = make_scheduler("leading", torch.float32).add_noise(x0, noise, timesteps)
    torch.testing.assert_close(add_noise(x0, noise, timesteps), theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lr_start(x0, noise)[1:], theirs[1:], rtol=1e-5, atol=1e-5)


def test_our_table_is_diffusers():
    torch.testing.assert_close(
        alphas_cumprod().float(), make_scheduler("leading", torch.float32).alphas_cumprod, rtol=1e-4, atol=0
    )
