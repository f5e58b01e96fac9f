"""Guidance on a part of the steps (cfg_start, cfg_end of LSA KSampler): against runs put together by hand."""

from __future__ import annotations

import clearsr_rig as rig
import comfy.sample
import comfy.samplers
import pytest
import torch

guidance = rig.module("nodes.guidance")
late_state = rig.module("nodes.late_state")


def sample(model, lr, **settings):
    values = {"seed": 3, "steps": 6, "cfg": 3.0, "alpha": 0.0, "beta": 0.0, "sampler_name": "euler", **settings}
    return rig.run("ClearSRLSAKSampler", model=model, lr_latent=lr["latent"], **values)["samples"]


def rows_of_each_call(model, work) -> list[int]:
    """Return how many rows the UNet got at each call."""
    with rig.count_calls(model.model.diffusion_model, "forward") as calls:
        work()
    return [args[0].shape[0] for args, _options in calls]


@pytest.mark.parametrize(("start", "end"), [(0.0, 0.5), (0.5, 1.0), (0.33, 0.67)])
def test_interval_equals_runs_put_together_by_hand(controlled, tiny, lr, start, end) -> None:
    """Euler on the pieces of the schedule with ComfyUI's own guider, each piece with its own cfg, bit for bit."""
    steps = 6
    empty = rig.run("ClearSREmptyPrompt", clearsr=tiny["clearsr"])
    sigmas = rig.run("ClearSRScheduler", model=controlled, steps=steps)
    whole = sample(controlled, lr, cfg_start=start, cfg_end=end, start_from_lr=False)

    latent = torch.zeros_like(lr["latent"]["samples"])
    x = comfy.sample.prepare_noise(latent, 3) * torch.sqrt(1.0 + sigmas[0] ** 2)
    first, last = round(start * steps), round(end * steps)
    for low, high, cfg in ((0, first, 1.0), (first, last, 3.0), (last, steps, 1.0)):
        if low < high:
            x = piece(controlled, x, sigmas[low : high + 1], cfg, empty)
    torch.testing.assert_close(whole, controlled.model.process_latent_out(x), rtol=1e-5, atol=1e-5)


def piece(model, x, sigmas, cfg, text):
    """Run euler from a state to a state, both in the sampler's own scale."""

    def function(model, _noise, sigmas, **options):
        return comfy.samplers.sampler_object("euler").sampler_function(model, x, sigmas, **options)

    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(text, text)
    guider.set_cfg(cfg)
    sampler = comfy.samplers.KSAMPLER(function)
    latent = torch.zeros_like(x)
    return model.model.process_latent_in(guider.sample(latent, latent, sampler, sigmas, seed=3))


def test_steps_without_guidance_compute_one_half(controlled, lr) -> None:
    rows = rows_of_each_call(controlled, lambda: sample(controlled, lr, cfg_start=0.5, cfg_end=0.83))
    assert rows == [1, 1, 1, 2, 2, 1]


def test_whole_schedule_is_the_plain_run(controlled, lr) -> None:
    assert guidance.guide_between(controlled, torch.linspace(10.0, 0.0, 7), 0.0, 1.0) is controlled
    whole = sample(controlled, lr)
    late_state._last.clear()  # nothing of it is recalled
    assert torch.equal(sample(controlled, lr, cfg_start=0.0, cfg_end=1.0), whole)


def test_an_empty_interval_is_no_guidance(controlled, lr) -> None:
    expected = sample(controlled, lr, cfg=1.0)
    assert torch.equal(sample(controlled, lr, cfg_start=0.5, cfg_end=0.5), expected)
    assert not torch.equal(sample(controlled, lr), expected)


def test_samplers_with_several_calls_in_a_step(controlled, lr) -> None:
    """dpm_2 looks at a point within the step: guided like its beginning. heun ends where the next step begins."""
    settings = {"cfg_end": 0.5, "steps": 4}
    rows = rows_of_each_call(controlled, lambda: sample(controlled, lr, sampler_name="dpm_2", **settings))
    assert rows == [2, 2, 2, 2, 1, 1, 1]
    rows = rows_of_each_call(controlled, lambda: sample(controlled, lr, sampler_name="heun", **settings))
    assert rows == [2, 2, 2, 1, 1, 1, 1]


def test_interrupted_run_leaves_the_model_guided(controlled, lr, monkeypatch) -> None:
    """The MODEL that went in carries nothing, whatever became of the run."""
    monkeypatch.setattr(controlled.model.diffusion_model, "forward", lambda *_a, **_o: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sample(controlled, lr, cfg_end=0.5)
    monkeypatch.undo()
    assert rows_of_each_call(controlled, lambda: sample(controlled, lr)) == [2] * 6


def test_interval_the_wrong_way_round_is_refused(controlled, lr) -> None:
    with pytest.raises(ValueError, match=r"cfg_start 0\.8 lies after cfg_end 0\.2"):
        sample(controlled, lr, cfg_start=0.8, cfg_end=0.2)


def test_changing_only_beta_still_asks_for_equal_intervals(controlled, lr) -> None:
    """The state before the late phase is kept for an equal run alone."""
    settings = {"steps": 6, "sampler_name": "ddpm"}
    first = sample(controlled, lr, cfg_end=0.5, **settings)
    assert torch.equal(first, sample(controlled, lr, cfg_end=0.5, **settings))
    assert not torch.equal(first, sample(controlled, lr, cfg_end=0.67, **settings))
