"""A NaN is named where it is made (decision 0022): encode, DPM, SPM, UNet, decode; and the next run works."""

from __future__ import annotations

import clearsr_rig as rig
import comfy.model_management
import pytest
import torch

HUGE = 3e38  # times a weight near 1: the product is infinite in float32

# part of the file -> weights that are made to overflow
OVERFLOW = {
    "encode": ("base.vae", "encoder.conv_out.weight"),
    "DPM": ("dpm", "controlnet_mid_block.weight"),
    "SPM": ("spm", "controlnet_mid_block.weight"),
    "UNet": ("base.unet", "out.2.weight"),
    # Not a convolution: whether its sum is NaN or infinite, which the host clamps, depends on the order of its terms.
    # What is infinite before SiLU is NaN after it on any processor.
    "decode": ("base.vae", "decoder.norm_out.weight"),
}


def overflowing(stage: str, factor: float = HUGE):
    """Load the tiny model with one weight so large that what it makes is infinite."""
    file = rig.tiny_checkpoint(rig.tiny_config())
    part, name = OVERFLOW[stage]
    largest = float(file.tensors[part][name].abs().max())
    file.tensors[part][name] = file.tensors[part][name] / largest * factor
    return rig.run("ClearSRLoader", checkpoint=rig.write("overflowing.safetensors", file))


def pipeline(loaded, image=None, sampler="ClearSRLSAKSampler", **settings):
    """LR Latent Encode to ClearSR Color Fix."""
    model, vae, clearsr = loaded
    latent, enlarged = rig.run("ClearSRLREncode", clearsr=clearsr, image=rig.images() if image is None else image)
    model = rig.run("ClearSRControlApply", model=model, clearsr=clearsr, lr_latent=latent, **settings)
    if sampler == "KSampler":
        text = rig.run("ClearSREmptyPrompt", clearsr=clearsr)
        latent = rig.run(
            "KSampler",
            model=model,
            seed=3,
            steps=2,
            cfg=1.0,
            sampler_name="euler",
            scheduler="normal",
            positive=text,
            negative=text,
            latent_image=latent,
            denoise=1.0,
        )
    else:
        latent = rig.run(sampler, model=model, lr_latent=latent, seed=1, steps=2)
    decoded = rig.run("VAEDecode", samples=latent, vae=vae)
    return rig.run("ClearSRColorFix", image=decoded, reference=enlarged)


@pytest.fixture
def healthy(tiny):
    loaded = (tiny["model"], tiny["vae"], tiny["clearsr"])
    return lambda: pipeline(loaded)


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        ("encode", "LR Latent Encode: the encoder of 'overflowing.safetensors' made values that are not numbers"),
        ("DPM", "DPM/SPM Control Apply: DPM made values that are not numbers"),
        ("SPM", "DPM/SPM Control Apply: SPM made values that are not numbers"),
        ("UNet", "DPM/SPM Control Apply: the UNet made values that are not numbers"),
        ("decode", r"ClearSR Color Fix: image contains \d+ values that are not numbers.*stage: decode.*--fp32-vae"),
    ],
)
def test_the_stage_is_named_and_the_next_run_works(healthy, stage, said) -> None:
    before = healthy()
    with pytest.raises(ValueError, match=said):
        pipeline(overflowing(stage))
    assert torch.equal(healthy(), before)


def test_a_control_that_is_huge_and_still_finite_is_named_by_what_it_does() -> None:
    """Its numbers are numbers; the UNet's are none because of them."""
    with pytest.raises(ValueError, match="the UNet under the control of DPM and SPM, and not without it, made values"):
        pipeline(overflowing("SPM", 1e37))


def test_other_samplers_and_tiles_are_told_too() -> None:
    loaded = overflowing("DPM")
    with pytest.raises(ValueError, match="Apply: DPM made values"):
        pipeline(loaded, sampler="KSampler")
    with pytest.raises(ValueError, match="Apply: DPM made values"):
        pipeline(loaded, image=rig.images(1, 96, 64), tile_size=256)


@pytest.mark.parametrize(
    ("dtype", "help_"), [(torch.float16, "--bf16-unet or --fp32-unet"), (torch.float32, "full pre")]
)
def test_what_to_do_follows_the_precision(monkeypatch, dtype, help_) -> None:
    """The very weights that overflow in float16 are fine in float32."""
    monkeypatch.setattr(comfy.model_management, "unet_dtype", lambda *_a, **_o: dtype)
    monkeypatch.setattr(comfy.model_management, "unet_manual_cast", lambda *_a, **_o: None)
    loaded = overflowing("SPM", 1e5 if dtype == torch.float16 else HUGE)
    with pytest.raises(ValueError, match=f"SPM made values.*{dtype}".replace("torch.", "")) as told:
        pipeline(loaded)
    assert help_ in str(told.value)
    if dtype == torch.float16:
        monkeypatch.setattr(comfy.model_management, "unet_dtype", lambda *_a, **_o: torch.float32)
        assert pipeline(overflowing("SPM", 1e5)).isfinite().all()


def test_a_module_that_is_off_is_not_asked() -> None:
    assert pipeline(overflowing("DPM"), dpm_strength=0.0).isfinite().all()
    with pytest.raises(ValueError, match="Apply: SPM made values"):
        pipeline(overflowing("SPM"), dpm_strength=0.0)


def test_numbers_lost_after_the_first_step_are_told_at_the_end(monkeypatch, tiny, lr) -> None:
    """By the control where its residuals say so, otherwise by the UNet or the sampler."""
    model, clearsr = tiny["model"], tiny["clearsr"]
    controlled = rig.run("ClearSRControlApply", model=model, clearsr=clearsr, lr_latent=lr["latent"])
    net, inner, calls = clearsr.control.model, clearsr.control.model.forward, []

    def second_call_overflows(*args, **options):
        residuals = inner(*args, **options)
        calls.append(1)
        return residuals if len(calls) < 2 else type(residuals)(residuals.down, residuals.mid * float("inf"))

    with monkeypatch.context() as patch:
        patch.setattr(net, "forward", second_call_overflows)
        with pytest.raises(ValueError, match=r"DPM or SPM made values .* after the first step"):
            rig.run("ClearSRLSAKSampler", model=controlled, lr_latent=lr["latent"], steps=3)
    late = controlled.clone()
    late.set_model_sampler_post_cfg_function(
        lambda args: args["denoised"] * (float("nan") if float(args["sigma"].max()) < 5.0 else 1.0)
    )
    with pytest.raises(ValueError, match=r"the UNet or the sampler made values .* after the first step"):
        rig.run("ClearSRLSAKSampler", model=late, lr_latent=lr["latent"], steps=3)
    plain = model.clone()
    plain.set_model_sampler_post_cfg_function(lambda args: args["denoised"] * float("nan"))
    with pytest.raises(ValueError, match="LSA KSampler: sampling ended in values that are not numbers"):
        rig.run("ClearSRLSAKSampler", model=plain, lr_latent=lr["latent"], steps=3)


def test_broken_inputs_are_refused_before_anything_runs(tiny, lr) -> None:
    model, clearsr = tiny["model"], tiny["clearsr"]
    nan = lr["latent"]["samples"] * float("nan")
    with pytest.raises(ValueError, match=r"lr_latent contains values.*stage: encode"):
        rig.run("ClearSRControlApply", model=model, clearsr=clearsr, lr_latent={**lr["latent"], "samples": nan})
    entry = lr["latent"]["clearsr"]
    broken = {**entry, "image_prompt": entry["image_prompt"] * float("inf")}
    with pytest.raises(ValueError, match="the image prompt contains values that are not numbers"):
        rig.run("ClearSRControlApply", model=model, clearsr=clearsr, lr_latent={**lr["latent"], "clearsr": broken})
    controlled = rig.run("ClearSRControlApply", model=model, clearsr=clearsr, lr_latent=lr["latent"])
    text = rig.run("ClearSREmptyPrompt", clearsr=clearsr)
    with pytest.raises(ValueError, match="the latent that is to be sampled holds values"):
        rig.run(
            "KSampler",
            model=controlled,
            seed=3,
            steps=2,
            cfg=1.0,
            sampler_name="euler",
            scheduler="normal",
            positive=text,
            negative=text,
            latent_image={"samples": nan},
            denoise=0.5,
        )


@pytest.mark.parametrize("steps", [1, 6])
def test_the_checks_wait_for_the_device_a_fixed_number_of_times(monkeypatch, controlled, lr, steps) -> None:
    """Two stages of the first step and the result, however many steps there are."""
    finite = rig.module("nodes.finite")
    seen = []
    inner = finite.broken
    monkeypatch.setattr(finite, "broken", lambda *tensors: seen.append(1) or inner(*tensors))
    rig.run("ClearSRLSAKSampler", model=controlled, lr_latent=lr["latent"], steps=steps)
    assert len(seen) == 3  # control, prediction, result
