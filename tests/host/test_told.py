"""What would be wrong without an error is told: controls and sliders that do nothing, pictures that are mixed up."""

from __future__ import annotations

import clearsr_rig as rig
import comfy.patcher_extension
import pytest
import torch
from clearsr_runs import apply


@pytest.fixture(autouse=True)
def forget() -> None:
    """Each test starts without a remembered state."""
    rig.module("nodes.late_state")._last.clear()


def sample(model, latent, **settings):
    values = {"seed": 3, "steps": 4, "alpha": 0.0, "beta": 0.0, **settings}
    return rig.run("ClearSRLSAKSampler", model=model, lr_latent=latent, **values)["samples"]


@pytest.mark.parametrize(
    ("settings", "never"),
    [
        ({"end_percent": 0.1}, True),
        ({"start_percent": 0.4, "end_percent": 0.6}, True),  # of 4 steps both limits are nearest to the second
        ({"start_percent": 0.9}, True),
        ({"end_percent": 0.3}, False),
        ({"end_percent": 0.1, "dpm_strength": 0.0, "spm_strength": 0.0}, False),  # off is off
        ({}, False),
    ],
)
def test_a_range_without_a_step_is_told_when_the_run_begins(tiny, lr, caplog, settings, never) -> None:
    sample(apply(tiny, lr["latent"], **settings), lr["latent"])
    assert ("holds no step of this run of 4 steps, so the control never acts" in caplog.text) == never


def test_a_model_without_control_is_told(tiny, lr, controlled, caplog) -> None:
    sample(controlled, lr["latent"])
    assert "DPM/SPM Control Apply is missing" not in caplog.text
    sample(tiny["model"], lr["latent"])
    assert "LSA KSampler: DPM/SPM Control Apply is missing" in caplog.text


def test_a_foreign_model_needs_no_control(lr, tiny, caplog) -> None:
    text = rig.run("ClearSREmptyPrompt", clearsr=tiny["clearsr"])
    foreign = tiny["model"].clone()
    foreign.remove_attachments("clearsr")
    sample(foreign, lr["latent"], positive=text, negative=text)
    assert "is missing" not in caplog.text


def encoded(tiny, seed):
    latent, _ = rig.run("ClearSRLREncode", clearsr=tiny["clearsr"], image=rig.images(seed=seed), scale=4.0)
    return latent


def test_another_picture_than_that_of_the_control_is_told(tiny, lr, controlled, caplog) -> None:
    same, other = encoded(tiny, 5), encoded(tiny, 6)
    sample(controlled, same)
    second = {**same, "samples": sample(controlled, same)}  # a second sampler begins with the first one's result
    sample(controlled, second)
    sample(controlled, {"samples": other["samples"]})  # nothing tells where it comes from
    assert "another picture" not in caplog.text
    sample(controlled, other)
    assert "LSA KSampler: lr_latent was encoded from another picture than the one that controls" in caplog.text


@pytest.mark.parametrize("name", ["alpha", "beta"])
def test_a_black_mask_is_told(controlled, lr, caplog, name) -> None:
    black, white = torch.zeros(1, 64, 64), torch.ones(1, 64, 64)
    sample(controlled, lr["latent"], **{name: 0.1, f"{name}_mask": white})
    sample(controlled, lr["latent"], **{f"{name}_mask": black})  # the slider is off anyway
    assert "black everywhere" not in caplog.text
    sample(controlled, lr["latent"], **{name: 0.1, f"{name}_mask": black})
    assert f"LSA KSampler: {name}_mask is black everywhere, so {name} does nothing" in caplog.text


def test_pictures_that_were_put_together_as_latents_are_told(tiny, lr, caplog) -> None:
    apply(tiny, rig.run("RepeatLatentBatch", samples=lr["latent"], amount=2))
    assert "image prompt" not in caplog.text
    both = rig.run("LatentBatch", samples1=lr["latent"], samples2=encoded(tiny, 6))
    apply(tiny, both)
    assert "lr_latent holds 2 pictures, but the image prompt of 1" in caplog.text


def test_a_latent_without_our_entry_misses_its_own_image_prompt(tiny, lr, caplog) -> None:
    """Of a file with an image encoder of its own; CLIP would be refused."""
    apply(tiny, {"samples": lr["latent"]["samples"]})
    assert "lr_latent does not come from LR Latent Encode" in caplog.text
    assert "CLIP" not in caplog.text


def test_a_patch_before_the_sampler_acts_with_either_target_or_is_told(controlled, lr, caplog) -> None:
    patched = rig.run("ClearSRLSAPatch", model=controlled, lr_latent=lr["latent"], alpha=0.5, beta=0.5)
    for target in ("step (paper)", "x0 (denoised)"):
        assert not torch.allclose(sample(patched, lr["latent"], target=target), sample(controlled, lr["latent"]))
    assert "LSA Patch" not in caplog.text
    sample(patched, lr["latent"], target="x0 (denoised)", alpha=0.1)
    assert "replace those of LSA Patch" in caplog.text


def test_color_fix_tells_how_much_it_cuts(caplog) -> None:
    rig.run("ClearSRColorFix", image=rig.images(1, 100, 100), reference=rig.images(1, 90, 80))
    assert "10 rows and 20 columns were cut off" in caplog.text


def drawing_patch(model):
    """A MODEL that another node has patched with what it draws from torch's global generator, as ToMe does."""
    clone = model.clone()

    def draws(query, context, value, _options):
        return query + 0.3 * torch.randn(query.shape), context, value

    clone.set_model_attn1_patch(draws)
    return clone


def test_patches_that_draw_numbers_draw_the_same_for_a_seed(controlled, lr) -> None:
    patched = drawing_patch(controlled)
    torch.rand(3)
    before = torch.get_rng_state()
    first = sample(patched, lr["latent"], seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    rig.module("nodes.late_state")._last.clear()
    torch.rand(5)
    assert torch.equal(sample(patched, lr["latent"], seed=3), first)
    assert not torch.equal(sample(patched, lr["latent"], seed=4), first)


@pytest.mark.parametrize("sampler_name", ["ddpm", "euler"])
def test_a_recalled_run_draws_what_a_whole_one_would(controlled, lr, sampler_name) -> None:
    patched = drawing_patch(controlled)
    settings = {"steps": 6, "alpha": 0.05, "sampler_name": sampler_name, "lla_start": 0.5}
    calls: list[int] = []

    def counted(executor, *arguments, **options):
        calls.append(1)
        return executor(*arguments, **options)

    patched.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "clearsr", counted)
    sample(patched, lr["latent"], beta=0.0, **settings)
    whole_calls = len(calls)
    recalled = sample(patched, lr["latent"], beta=0.1, **settings)
    assert len(calls) - whole_calls < whole_calls  # it was recalled
    rig.module("nodes.late_state")._last.clear()
    assert torch.equal(sample(patched, lr["latent"], beta=0.1, **settings), recalled)


def test_stock_noise_masks_keep_what_was_painted_where_the_picture_is_padded(tiny) -> None:
    """65 pixels become 260 and are padded to 320: the lower half is latent rows 16.25 to 40, not 20 to 40."""
    latent, _ = rig.run("ClearSRLREncode", clearsr=tiny["clearsr"], image=rig.images(1, 65, 65), scale=4.0)
    mask = torch.zeros(1, 65, 65)
    mask[:, 33:] = 1.0
    masked = rig.run("SetLatentNoiseMask", samples=latent, mask=mask)
    result = sample(apply(tiny, latent), masked)
    changed = (result - latent["samples"]).abs().amax(dim=(0, 1, 3)) > 1e-4
    assert int(changed.float().argmax()) in (15, 16)
