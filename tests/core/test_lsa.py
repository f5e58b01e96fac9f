"""Eqs. 3 and 4, their phases, and strengths that keep their effect at any number of steps."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clearsr_core.lsa import LSAConfig, adjust, ela, lla, per_step_strength, phase, phase_lengths


def latents(seed=0, batch=2):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(batch, 4, 5, 3, generator=generator, dtype=torch.float64) for _ in range(2))


def test_equations_as_printed():
    """Eq. 3: (1 - alpha) x + alpha x_lr. Eq. 4: (1 + beta) x - beta x_lr."""
    x, x_lr = latents()
    torch.testing.assert_close(ela(x, x_lr, 0.03), 0.97 * x + 0.03 * x_lr)
    torch.testing.assert_close(lla(x, x_lr, 0.01), 1.01 * x - 0.01 * x_lr)


@settings(max_examples=50, deadline=None)
@given(alpha=st.floats(0.0, 0.95))
def test_lla_undoes_ela(alpha):
    """LLA with beta = alpha / (1 - alpha) undoes ELA with alpha."""
    x, x_lr = latents()
    torch.testing.assert_close(lla(ela(x, x_lr, alpha), x_lr, alpha / (1 - alpha)), x)


def test_strength_zero_changes_no_bit_and_one_is_x_lr():
    x, x_lr = latents()
    assert torch.equal(ela(x, x_lr, 0.0), x) and torch.equal(lla(x, x_lr, 0.0), x)
    assert torch.equal(ela(x, x_lr, 1.0), x_lr)
    off = LSAConfig(0.0, 0.0)
    assert all(adjust(x, x_lr, step, 20, off) is x for step in range(20))


def test_maps_act_pixel_by_pixel():
    """A map (1, 1, h, w) equals the number where it has that value, also as a factor in `adjust`."""
    x, x_lr = latents()
    mask = torch.zeros(1, 1, 5, 3)
    mask[..., 0] = 1.0
    mixed = ela(x, x_lr, 0.2 * mask)
    torch.testing.assert_close(mixed[..., 0], ela(x, x_lr, 0.2)[..., 0])
    assert torch.equal(mixed[..., 1:], x[..., 1:])
    lsa = LSAConfig(0.2, 0.1)
    torch.testing.assert_close(adjust(x, x_lr, 0, 50, lsa, ela_map=mask), mixed)
    late = adjust(x, x_lr, 49, 50, lsa, lla_map=mask)
    torch.testing.assert_close(late[..., 0], lla(x, x_lr, 0.1)[..., 0])
    assert torch.equal(late[..., 1:], x[..., 1:])


def test_inputs_are_never_written_to_and_x_lr_broadcasts():
    x, x_lr = latents()
    copies = x.clone(), x_lr.clone()
    torch.testing.assert_close(ela(x, x_lr[:1], 0.5)[1:], ela(x[1:], x_lr[:1], 0.5))
    assert torch.equal(x, copies[0]) and torch.equal(x_lr, copies[1])
    assert ela(x.half(), x_lr, 0.5).dtype == torch.float16


def test_phases_of_fifty_steps():
    """Shares 0.3 and 0.12 of 50 steps: 15 early, 6 late."""
    lsa = LSAConfig()
    phases = [phase(step, 50, lsa) for step in range(50)]
    assert phases == ["early"] * 15 + ["middle"] * 29 + ["late"] * 6
    x, x_lr = latents()
    assert torch.equal(adjust(x, x_lr, 14, 50, lsa), ela(x, x_lr, 0.01))
    assert adjust(x, x_lr, 15, 50, lsa) is x
    assert torch.equal(adjust(x, x_lr, 44, 50, lsa), lla(x, x_lr, 0.01))


@pytest.mark.parametrize(
    ("steps", "early", "late"),
    [(1, 0, 1), (2, 1, 1), (4, 1, 1), (5, 2, 1), (7, 2, 1), (15, 5, 2), (20, 6, 2), (25, 8, 3), (50, 15, 6)],
)
def test_a_phase_is_the_nearest_number_of_steps_and_one_at_least(steps, early, late):
    """0.3 x 5 = 1.5 rounds up, 0.3 x 7 = 2.1 down, 0.12 x 4 = 0.48 would be none and is one."""
    assert phase_lengths(steps, LSAConfig()) == (early, late)


@settings(max_examples=100, deadline=None)
@given(steps=st.integers(1, 200), limits=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_phases_are_in_order_and_exist_where_there_is_room(steps, limits):
    lsa = LSAConfig(ela_end=min(limits), lla_start=max(limits))
    early, late = phase_lengths(steps, lsa)
    phases = [phase(step, steps, lsa) for step in range(steps)]
    assert phases == ["early"] * early + ["middle"] * (steps - early - late) + ["late"] * late
    assert (late > 0) == (lsa.lla_start < 1)
    assert early > 0 or lsa.ela_end == 0 or late == steps


@settings(max_examples=60, deadline=None)
@given(steps=st.integers(2, 150), alpha=st.floats(0.001, 0.2), beta=st.floats(0.001, 0.2))
def test_over_the_phase_keeps_the_product(steps, alpha, beta):
    """(1 - alpha')^n' = (1 - alpha)^n and (1 + beta')^n' = (1 + beta)^n, n of the reference number of steps."""
    lsa = LSAConfig(alpha, beta, accumulate="over_phase")
    ela_strength, lla_strength = per_step_strength(lsa, steps)
    early, late = phase_lengths(steps, lsa)
    assert (1 - ela_strength) ** early == pytest.approx((1 - alpha) ** 15)
    assert (1 + lla_strength) ** late == pytest.approx((1 + beta) ** 6)


def test_the_two_rules_agree_at_the_reference():
    per_step, over_phase = LSAConfig(0.03, 0.01), LSAConfig(0.03, 0.01, accumulate="over_phase")
    assert per_step_strength(over_phase, 50) == pytest.approx(per_step_strength(per_step, 50))
    assert per_step_strength(per_step, 10) == (0.03, 0.01)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ela_strength": float("inf")}, "ela_strength is inf"),
        ({"lla_strength": -0.1}, "lla_strength is -0.1"),
        ({"ela_strength": float("nan")}, "ela_strength is nan"),
        ({"ela_end": 0.9, "lla_start": 0.5}, "overlap"),
        ({"accumulate": "sometimes"}, "sometimes"),
        ({"reference_steps": 0}, "reference_steps"),
    ],
)
def test_impossible_settings_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        LSAConfig(**values)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="do not fit together"):
        ela(torch.zeros(2, 4, 8, 8), torch.zeros(2, 4, 8, 9), 0.1)
    with pytest.raises(ValueError, match="do not fit together"):
        ela(torch.zeros(3, 4, 8, 8), torch.zeros(2, 4, 8, 8), 0.1)
    with pytest.raises(ValueError, match="not in 0"):
        phase(5, 5, LSAConfig())


def test_strengths_above_one_stay_real():
    """alpha 1 leaves x_lr alone, above 1 overshoots it; over the phase nothing more than everything can be pulled."""
    x, x_lr = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ela(x, x_lr, 1.5), 1.5 * x_lr - 0.5 * x)
    assert per_step_strength(LSAConfig(1.5, 2.0, accumulate="over_phase"), 20)[0] == 1.0
    assert per_step_strength(LSAConfig(1.5, 2.0), 20) == (1.5, 2.0)
