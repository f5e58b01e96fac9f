"""LSA KSampler, LSA Patch, ClearSR Sampler and Scheduler: against plain loops, against the host's own samplers."""

from __future__ import annotations

import functools

import clearsr_rig as rig
import comfy.k_diffusion.sampling
import comfy.model_management
import comfy.model_sampling
import comfy.patcher_extension
import comfy.samplers
import comfy.utils
import pytest
import torch
from clearsr_runs import apply

lsa_module = rig.module("clearsr_core.lsa")
schedule = rig.module("clearsr_core.schedule")
lsa_sampler = rig.module("nodes.lsa_sampler")
late_state = rig.module("nodes.late_state")


@pytest.fixture(autouse=True)
def forget() -> None:
    """Each test starts without a remembered state."""
    late_state._last.clear()


@pytest.fixture
def text(tiny):
    return rig.run("ClearSREmptyPrompt", clearsr=tiny["clearsr"])


def sample(model, lr, **settings):
    values = {"seed": 3, "steps": 4, "alpha": 0.0, "beta": 0.0, **settings}
    return rig.run("ClearSRLSAKSampler", model=model, lr_latent=lr["latent"], **values)["samples"]


def stock_ksampler(model, latent, text, sampler_name, denoise):
    """ComfyUI's own KSampler with the settings of `sample`."""
    return rig.run(
        "KSampler",
        model=model,
        seed=3,
        steps=4,
        cfg=1.0,
        sampler_name=sampler_name,
        scheduler="normal",
        positive=text,
        negative=text,
        latent_image=latent,
        denoise=denoise,
    )["samples"]


def custom(model, text, sampler, sigmas, latent, add_noise=True):
    """ComfyUI's SamplerCustom with the settings of `sample`."""
    return rig.run(
        "SamplerCustom",
        model=model,
        add_noise=add_noise,
        noise_seed=3,
        cfg=1.0,
        positive=text,
        negative=text,
        sampler=sampler,
        sigmas=sigmas,
        latent_image=latent,
    )[0]


def reference_loop(loaded, lr, steps, lsa, spacing="leading", seed=3, from_lr=True, denoise=1.0):
    """Spaced DDPM with LSA in the variance-preserving scale, written with clearsr_core alone (decisions 0007, 0008)."""
    comfy.model_management.load_models_gpu([loaded["model"]])
    base = loaded["model"].model
    context = loaded["clearsr"].null_text[None]
    x_lr = lr["latent"]["samples"] * 0.18215
    noise = torch.randn(x_lr.shape, generator=torch.Generator().manual_seed(seed))
    step_noise = torch.Generator().manual_seed(seed + 1)
    x_t = schedule.lr_start(x_lr, noise) if from_lr else noise
    timesteps = schedule.last_timesteps(steps, denoise, spacing).tolist()
    if denoise < 1.0:
        x_t = schedule.add_noise(x_lr, noise, timesteps[0])
    for step, (now, after) in enumerate(zip(timesteps, [*timesteps[1:], -1], strict=True)):
        eps = base.diffusion_model(x_t, torch.tensor([float(now)]), context=context)
        drawn = torch.randn(x_lr.shape, generator=step_noise) if after >= 0 else None
        x_t = schedule.ddpm_step(x_t, eps, now, after, drawn)
        x_t = lsa_module.adjust(x_t, x_lr, step, steps, lsa)
    return x_t / 0.18215


def close(actual, expected, tolerance=1e-3):
    """Relative to the size of the whole latent."""
    assert float((actual - expected).norm() / expected.norm()) < tolerance


# ---- equations ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "spacing", "alpha", "beta"),
    [
        (10, "leading", 0.05, 0.05),
        (7, "linspace", 0.3, 0.0),
        (7, "trailing", 0.0, 0.4),
        (1, "leading", 0.2, 0.2),
        (3, "leading", 1.0, 1.0),
        (3, "leading", 1.5, 2.0),
        (4, "leading", 0.0, 0.0),
    ],
)
def test_step_target_equals_a_plain_loop(tiny, lr, steps, spacing, alpha, beta) -> None:
    """VE state of the host, VP state of the paper: the same trajectory."""
    lsa = lsa_module.LSAConfig(ela_strength=alpha, lla_strength=beta)
    expected = reference_loop(tiny, lr, steps, lsa, spacing)
    close(sample(tiny["model"], lr, steps=steps, scheduler=f"ddpm_{spacing}", alpha=alpha, beta=beta), expected)


def test_over_the_phase_and_start_from_noise_equal_a_plain_loop(tiny, lr) -> None:
    lsa = lsa_module.LSAConfig(ela_strength=0.02, lla_strength=0.02, accumulate="over_phase")
    expected = reference_loop(tiny, lr, 6, lsa, from_lr=False)
    actual = sample(
        tiny["model"], lr, steps=6, alpha=0.02, beta=0.02, strength_rule="over the phase", start_from_lr=False
    )
    close(actual, expected)


@pytest.mark.parametrize("denoise", [0.5, 0.3])
def test_denoise_starts_part_of_the_way_from_the_lr_latent(tiny, lr, denoise) -> None:
    """Whatever start_from_lr says: without the noisiest steps nothing but x_lr tells what the picture is."""
    lsa = lsa_module.LSAConfig(ela_strength=0.05, lla_strength=0.05)
    expected = reference_loop(tiny, lr, 4, lsa, denoise=denoise)
    settings = {"steps": 4, "alpha": 0.05, "beta": 0.05, "denoise": denoise}
    close(sample(tiny["model"], lr, **settings), expected)
    late_state._last.clear()
    close(sample(tiny["model"], lr, **settings, start_from_lr=False), expected)


def test_denoise_takes_at_most_a_thousand_steps(tiny, lr) -> None:
    with pytest.raises(ValueError, match=r"LSA KSampler: 300 steps at denoise 0\.1 are taken from 3000 steps"):
        sample(tiny["model"], lr, steps=300, denoise=0.1)


def test_lr_start_is_the_cores() -> None:
    x_lr, noise = torch.randn(2, 1, 4, 8, 8).unbind()
    sigmas = schedule.sigmas()
    first = sigmas[981].float()
    ours = schedule.ve_to_vp(lsa_sampler.lr_start(x_lr, noise, float(sigmas[-1]), first), first)
    torch.testing.assert_close(ours, schedule.lr_start(x_lr, noise))


@pytest.mark.parametrize(("alpha", "beta"), [(0.1, 0.0), (0.0, 0.1), (0.1, 0.1)])
def test_both_sliders_move_the_result(controlled, lr, alpha, beta) -> None:
    assert not torch.allclose(sample(controlled, lr), sample(controlled, lr, alpha=alpha, beta=beta), atol=1e-3)


def test_alpha_pulls_towards_and_beta_pushes_away(controlled, lr) -> None:
    def distance(**settings):
        return float((sample(controlled, lr, ela_end=0.5, lla_start=0.5, **settings) - lr["latent"]["samples"]).norm())

    assert distance(alpha=1.0) < distance(alpha=0.5) < distance()
    assert distance(beta=0.4) > distance(beta=0.2) > distance()


# ---- identities -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sampler_name", ["euler", "dpmpp_2m", "heun", "dpmpp_2m_sde", "uni_pc", "ddim", "dpm_2", "lms"]
)
def test_off_equals_the_stock_ksampler(controlled, lr, text, sampler_name) -> None:
    """alpha = beta = 0 from noise alone is KSampler on an empty latent, bit for bit."""
    empty = {"samples": torch.zeros_like(lr["latent"]["samples"])}
    stock = stock_ksampler(controlled, empty, text, sampler_name, denoise=1.0)
    ours = sample(controlled, lr, sampler_name=sampler_name, scheduler="normal", start_from_lr=False)
    assert torch.equal(ours, stock)


@pytest.mark.parametrize("sampler_name", ["euler", "dpmpp_2m"])
def test_off_below_full_denoise_equals_the_stock_ksampler(controlled, lr, text, sampler_name) -> None:
    """alpha = beta = 0 at denoise 0.6 is KSampler on x_lr, bit for bit."""
    stock = stock_ksampler(controlled, lr["latent"], text, sampler_name, denoise=0.6)
    assert torch.equal(sample(controlled, lr, sampler_name=sampler_name, scheduler="normal", denoise=0.6), stock)


def test_off_equals_the_hosts_ddpm(controlled, lr, text) -> None:
    """The stock ddpm function, given our start and our noise, makes the same picture bit for bit."""
    sigmas = rig.run("ClearSRScheduler", model=controlled, steps=5, spacing="ddpm_leading")
    generator = torch.Generator().manual_seed(4)

    def host_ddpm(model, x, sigmas, **options):
        x_lr = model.inner_model.inner_model.process_latent_in(lr["latent"]["samples"])
        top = float(model.inner_model.inner_model.model_sampling.sigma_max)
        start = lsa_sampler.lr_start(x_lr, model.noise, top, sigmas[0])
        options["noise_sampler"] = lambda _now, _next: torch.randn(x.shape, generator=generator)
        return comfy.k_diffusion.sampling.sample_ddpm(model, start, sigmas, **options)

    expected = custom(controlled, text, comfy.samplers.KSAMPLER(host_ddpm), sigmas, lr["latent"])["samples"]
    assert torch.equal(sample(controlled, lr, steps=5), expected)


def test_clearsr_sampler_and_scheduler_equal_the_ksampler(controlled, lr, text) -> None:
    """SamplerCustom with our SIGMAS and SAMPLER is LSA KSampler without the adjustment."""
    sampler = rig.run("ClearSRSampler", start_from_lr=True)
    sigmas = rig.run("ClearSRScheduler", model=controlled, steps=4, spacing="ddpm_leading")
    ours = custom(controlled, text, sampler, sigmas, lr["latent"])["samples"]
    assert torch.equal(ours, sample(controlled, lr))


def test_cutting_is_exact_for_memoryless_samplers(tiny, lr, monkeypatch) -> None:
    """Step by step or in one call: the same bits, for every sampler that is said to be so."""
    monkeypatch.setattr(lsa_sampler, "_adjust_state", lambda x, *_: x)
    for name in sorted(lsa_sampler.MEMORYLESS):
        settings = {"sampler_name": name, "scheduler": "normal", "ela_end": 0.5, "lla_start": 0.75}
        late_state._last.clear()
        whole = sample(tiny["model"], lr, steps=3, **settings)
        late_state._last.clear()
        assert torch.equal(sample(tiny["model"], lr, steps=3, alpha=0.1, beta=0.1, **settings), whole), name


def ideal(tiny, lr):
    """The model that always sees x_lr in the noise: every sampler must end there, cut or not."""
    model = tiny["model"].clone()
    target = tiny["model"].model.process_latent_in(lr["latent"]["samples"])
    model.set_model_unet_function_wrapper(lambda _apply, given: target.expand_as(given["input"]).to(given["input"]))
    return model


def test_every_sampler_of_the_host_arrives_when_it_is_cut(tiny, lr) -> None:
    """With a perfect model the result is x_lr; samplers that cannot be cut say why, and work without strengths."""
    model, x_lr = ideal(tiny, lr), lr["latent"]["samples"]
    settings = {"steps": 20, "scheduler": "normal", "start_from_lr": False}
    for name in comfy.samplers.KSampler.SAMPLERS:
        if name not in lsa_sampler.UNCUTTABLE:
            for strength in (0.0, 0.01):
                result = sample(model, lr, sampler_name=name, alpha=strength, beta=strength, **settings)
                error = float((result - x_lr).norm() / x_lr.norm())
                assert error < 0.1, (name, strength, error)
            continue
        with pytest.raises(ValueError, match=f"sampler {name} .*nothing can be adjusted between"):
            sample(model, lr, sampler_name=name, beta=0.01)
        sample(model, lr, sampler_name=name, alpha=0.01, target="x0 (denoised)", **settings)


@pytest.mark.parametrize("sampler_name", ["euler_cfg_pp", "dpmpp_2m_cfg_pp", "res_multistep_cfg_pp"])
def test_hooks_of_a_sampler_do_not_pile_up_from_slice_to_slice(controlled, lr, monkeypatch, sampler_name) -> None:
    seen = []
    inner = lsa_sampler._shifted

    def counting(callback, start, bar):
        report = inner(callback, start, bar)

        def count(values):
            seen.append(start)
            report(values)

        return count

    hooks = []
    real = comfy.model_patcher.set_model_options_post_cfg_function

    def counted(options, *more, **named):
        changed = real(options, *more, **named)
        hooks.append(len(changed["sampler_post_cfg_function"]))
        return changed

    monkeypatch.setattr(lsa_sampler, "_shifted", counting)
    monkeypatch.setattr(comfy.model_patcher, "set_model_options_post_cfg_function", counted)
    sample(controlled, lr, sampler_name=sampler_name, steps=6, alpha=0.01, ela_end=0.5)
    assert len(set(seen)) > 1
    assert set(hooks) == {1}


def test_same_seed_same_picture(controlled, lr) -> None:
    first = sample(controlled, lr, alpha=0.05, beta=0.05)
    late_state._last.clear()
    assert torch.equal(sample(controlled, lr, alpha=0.05, beta=0.05), first)
    assert not torch.allclose(sample(controlled, lr, alpha=0.05, beta=0.05, seed=4), first, atol=1e-2)


@pytest.mark.parametrize("sampler_name", ["ddpm", "euler_ancestral", "dpmpp_2m_sde", "dpmpp_sde", "lcm", "euler"])
@pytest.mark.parametrize("start_from_lr", [True, False])
def test_a_picture_of_a_batch_is_what_it_is_alone(tiny, sampler_name, start_from_lr) -> None:
    """Also the one that LatentFromBatch takes out, and the late phase that is recalled."""
    latent, _ = rig.run("ClearSRLREncode", clearsr=tiny["clearsr"], image=rig.images(3), scale=4.0)
    first, last = ({**latent, "samples": latent["samples"][row : row + 1]} for row in (0, 2))
    last["batch_index"] = [2]
    model = apply(tiny, latent)
    settings = {"sampler_name": sampler_name, "alpha": 0.05, "start_from_lr": start_from_lr, "scheduler": "normal"}
    sample(model, {"latent": latent}, beta=0.0, **settings)
    whole = sample(model, {"latent": latent}, beta=0.1, **settings)
    for row, one in ((0, first), (2, last)):
        alone = apply(tiny, one)
        close(sample(alone, {"latent": one}, beta=0.1, **settings)[0], whole[row], 1e-4)
    assert not torch.allclose(whole[0], whole[2], atol=1e-2)


def test_global_random_state_does_not_matter(controlled, lr) -> None:
    """Nor is it moved: what other nodes draw after a run is what they would have drawn before it."""
    first = sample(controlled, lr)
    late_state._last.clear()  # nothing of it is recalled
    torch.rand(7)
    before = torch.get_rng_state()
    assert torch.equal(sample(controlled, lr), first)
    assert torch.equal(torch.get_rng_state(), before)


def test_no_node_moves_the_global_random_state(tiny) -> None:
    before = torch.get_rng_state()
    model, vae, clearsr = rig.run("ClearSRLoader", checkpoint=tiny["name"])
    latent, enlarged = rig.run("ClearSRLREncode", clearsr=clearsr, image=rig.images(), scale=4.0)
    result = {"samples": sample(apply({"model": model, "clearsr": clearsr}, latent), {"latent": latent}, cfg=2.0)}
    decoded = rig.run("VAEDecode", samples=result, vae=vae)
    rig.run("ClearSRColorFix", image=decoded, reference=enlarged)
    assert torch.equal(torch.get_rng_state(), before)


def test_noise_of_the_first_step_is_not_the_start_noise(lr) -> None:
    generator = torch.Generator().manual_seed(lsa_sampler.row_seeds(3, [0])[0])
    shape = lr["latent"]["samples"].shape
    drawn = torch.randn(shape, generator=generator)
    assert not torch.equal(drawn, torch.randn(shape, generator=torch.Generator().manual_seed(3)))


# ---- where a run begins ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start_from_lr", [True, False])
@pytest.mark.parametrize("sampler_name", ["ddpm", "euler"])
def test_what_a_mask_keeps_is_x_lr(tiny, lr, start_from_lr, sampler_name) -> None:
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., 4:] = 1.0
    latent = {**lr["latent"], "noise_mask": mask}
    result = sample(tiny["model"], {"latent": latent}, sampler_name=sampler_name, start_from_lr=start_from_lr)
    kept = (result - lr["latent"]["samples"])[..., :3].abs().max()
    assert float(kept) < 1e-3
    assert float((result - lr["latent"]["samples"])[..., 5:].abs().max()) > 1e-2


@pytest.mark.parametrize("start_from_lr", [True, False])
def test_ddim_is_euler(controlled, lr, start_from_lr) -> None:
    """The host gives ddim other noise to fill masks with; the start is made of that of the seed all the same."""
    settings = {"scheduler": "normal", "start_from_lr": start_from_lr}
    ddim, euler = (sample(controlled, lr, sampler_name=name, **settings) for name in ("ddim", "euler"))
    assert torch.equal(ddim, euler)


def test_schedules_that_begin_at_the_top_are_told_from_parts(controlled) -> None:
    sampling = controlled.get_model_object("model_sampling")
    top = lsa_sampler.begins_at_the_top
    for spacing in ("ddpm_leading", "ddpm_linspace", "ddpm_trailing"):
        for steps in [*range(1, 60), 100, 333, 500, 999, 1000]:
            sigmas = rig.run("ClearSRScheduler", model=controlled, steps=steps, spacing=spacing)
            assert top(sampling, sigmas), (spacing, steps)
            if steps >= 10:
                assert not top(sampling, sigmas[steps // 2 :]), (spacing, steps)
    for name in comfy.samplers.KSampler.SCHEDULERS:
        for steps in (4, 7, 20, 50):
            sigmas = comfy.samplers.calculate_sigmas(sampling, name, steps)
            assert top(sampling, sigmas), (name, steps)
            part = rig.run("BasicScheduler", model=controlled, scheduler=name, steps=steps, denoise=0.4)
            if float(sampling.timestep(part[0])) < 800:  # linear_quadratic goes almost to the top all the same
                assert not top(sampling, part), (name, steps)


def test_clearsr_sampler_goes_on_with_a_part_of_the_schedule(tiny, lr, text) -> None:
    """The rest of a split schedule, or a part for denoising a picture, is not begun anew from noise."""
    model = ideal(tiny, lr)
    sigmas = rig.run("ClearSRScheduler", model=model, steps=10, spacing="ddpm_leading")
    from_lr, as_given = (rig.run("ClearSRSampler", start_from_lr=value) for value in (True, False))
    first = custom(model, text, from_lr, sigmas[:6], lr["latent"])
    for latent, rest, add_noise in (
        (first, sigmas[5:], False),  # SplitSigmas and DisableNoise
        (lr["latent"], sigmas[6:], True),  # image to image
    ):
        on, off = (custom(model, text, sampler, rest, latent, add_noise)["samples"] for sampler in (from_lr, as_given))
        assert torch.equal(on, off)
    # A whole schedule is still started from x_lr at the last training step.
    on, off = (custom(model, text, sampler, sigmas[:2], lr["latent"])["samples"] for sampler in (from_lr, as_given))
    assert not torch.equal(on, off)


# ---- x0 target and LSA Patch ----------------------------------------------------------------------------------------


def test_x0_target_equals_the_patch(controlled, lr, text) -> None:
    patched = rig.run("ClearSRLSAPatch", model=controlled, lr_latent=lr["latent"], alpha=0.2, beta=0.3)
    ours = sample(controlled, lr, target="x0 (denoised)", alpha=0.2, beta=0.3)
    assert torch.equal(sample(patched, lr), ours)
    assert not torch.equal(ours, sample(controlled, lr, alpha=0.2, beta=0.3))


def test_patch_with_alpha_one_returns_the_reference(tiny, lr, text) -> None:
    """x0 = x_lr at every step, under any sampler, also between the sigmas of the schedule."""
    for sampler_name in ("heun", "dpmpp_2m", "ddpm"):
        patched = rig.run(
            "ClearSRLSAPatch",
            model=tiny["model"],
            lr_latent=lr["latent"],
            alpha=1.0,
            beta=0.0,
            ela_end=1.0,
            lla_start=1.0,
        )
        result = rig.run(
            "KSampler",
            model=patched,
            seed=1,
            steps=3,
            cfg=2.0,
            sampler_name=sampler_name,
            scheduler="karras",
            positive=text,
            negative=text,
            latent_image={"samples": torch.zeros_like(lr["latent"]["samples"])},
            denoise=1.0,
        )["samples"]
        close(result, lr["latent"]["samples"], 1e-4)


def test_patching_again_replaces_and_leaves_the_input_alone(tiny, lr) -> None:
    settings = {"lr_latent": lr["latent"], "beta": 0.0}
    once = rig.run("ClearSRLSAPatch", model=tiny["model"], alpha=0.5, **settings)
    twice = rig.run("ClearSRLSAPatch", model=once, alpha=0.1, **settings)
    fresh = rig.run("ClearSRLSAPatch", model=tiny["model"], alpha=0.1, **settings)
    assert torch.equal(sample(twice, lr, steps=2), sample(fresh, lr, steps=2))
    assert len(twice.model_options["sampler_post_cfg_function"]) == 1
    assert "sampler_post_cfg_function" not in tiny["model"].model_options


def test_patch_keeps_the_hooks_of_others(tiny, lr) -> None:
    model = tiny["model"].clone()
    model.set_model_sampler_post_cfg_function(lambda values: values["denoised"])
    patched = rig.run("ClearSRLSAPatch", model=model, lr_latent=lr["latent"])
    assert len(patched.model_options["sampler_post_cfg_function"]) == 2


# ---- masks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["step (paper)", "x0 (denoised)"])
@pytest.mark.parametrize(
    ("mask_name", "other", "strengths"),
    [
        ("alpha_mask", "beta_mask", {"alpha": 0.5, "ela_end": 1.0, "lla_start": 1.0}),
        ("beta_mask", "alpha_mask", {"beta": 0.5, "ela_end": 0.0, "lla_start": 0.0}),
    ],
)
def test_masks(controlled, lr, mask_name, other, strengths, target) -> None:
    """Black is off, white is on; a half mask moves its half of the latent at the adjusted step; each has its own."""
    settings = {"steps": 1, "target": target, **strengths}
    mask = torch.zeros(1, 64, 64)
    mask[:, :, 32:] = 1.0

    def run(**more):
        late_state._last.clear()
        return sample(controlled, lr, **more)

    off, on = run(steps=1), run(**settings)
    assert not torch.allclose(off, on, rtol=0.05)
    assert torch.equal(run(**{mask_name: torch.zeros(1, 64, 64)}, **settings), off)
    torch.testing.assert_close(run(**{mask_name: torch.ones(32, 20)}, **settings), on)
    half = run(**{mask_name: mask}, **settings)
    torch.testing.assert_close(half[..., :3], off[..., :3])
    torch.testing.assert_close(half[..., 5:], on[..., 5:])
    assert torch.equal(run(**{other: torch.zeros(1, 64, 64)}, **settings), on)


def test_mask_lies_on_the_picture_not_on_its_padding() -> None:
    strength_map = functools.partial(rig.module("nodes.masks").strength_map, "LSA KSampler")
    latent = {
        "samples": torch.zeros(1, 4, 8, 16),
        "clearsr": {"content_size": (64, 64), "padded_size": (64, 128)},
    }
    mask = torch.zeros(1, 10, 10)
    mask[:, :, 5:] = 1.0
    grid = strength_map(mask, latent, "alpha_mask")
    assert grid.shape == (1, 1, 8, 16)
    assert float(grid[..., :3].max()) < 0.1 and float(grid[..., 5:].min()) > 0.9
    with pytest.raises(ValueError, match="alpha_mask contains"):
        strength_map(torch.full((1, 4, 4), float("nan")), latent, "alpha_mask")
    with pytest.raises(ValueError, match="holds 3 masks"):
        strength_map(torch.zeros(3, 4, 4), latent, "alpha_mask")


# ---- progress, interruption, the late state -------------------------------------------------------------------------


def test_one_progress_bar_over_all_slices(controlled, lr, monkeypatch) -> None:
    """Values 1..steps of one total, whatever the cuts."""
    # Newer hosts drop what comes within a tenth of a second, and steps of the tiny model do on a fast machine.
    monkeypatch.setattr(comfy.utils, "PROGRESS_THROTTLE_MIN_INTERVAL", 0.0, raising=False)
    rig.progress.clear()
    sample(controlled, lr, steps=5, alpha=0.1, beta=0.1, ela_end=0.4, lla_start=0.6)
    values = [value for value, total, _ in rig.progress if total == 5]
    assert len(values) == len(rig.progress) and values == sorted(values)
    assert values[-1] == 5 and set(range(1, 6)) <= set(values)


def test_preview_has_the_colours_of_the_file(tiny) -> None:
    """A self-contained file brings its own preview factors; SD's tiny decoder is never used for its latents."""
    import latent_preview
    from comfy.cli_args import LatentPreviewMethod, args

    before = args.preview_method
    args.preview_method = LatentPreviewMethod.Auto
    try:
        previewer = latent_preview.get_previewer(torch.device("cpu"), tiny["model"].model.latent_format)
        factors = previewer.latent_rgb_factors
    finally:
        args.preview_method = before
    assert tiny["model"].model.latent_format.taesd_decoder_name is None
    torch.testing.assert_close(factors.T, torch.tensor(tiny["clearsr"].config.latent_rgb))


def test_interrupt_leaves_nothing_behind(controlled, lr, monkeypatch) -> None:
    """Interrupted in the middle: the host's own exception comes out, the next run is as if nothing had been."""
    settings = {"steps": 5, "alpha": 0.1, "beta": 0.1, "lla_start": 0.6}
    expected = sample(controlled, lr, **settings)
    late_state._last.clear()
    prepare = rig.module("nodes.sampling").latent_preview.prepare_callback

    def interrupting(model, steps, *rest):
        inner = prepare(model, steps, *rest)

        def callback(step, *values):
            inner(step, *values)
            if step == 2:
                comfy.model_management.interrupt_current_processing()

        return callback

    with monkeypatch.context() as patch:
        patch.setattr(rig.module("nodes.sampling").latent_preview, "prepare_callback", interrupting)
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            sample(controlled, lr, **settings)
    comfy.model_management.interrupt_current_processing(False)
    assert torch.equal(sample(controlled, lr, **settings), expected)


@pytest.mark.parametrize(
    ("sampler_name", "target"),
    [("ddpm", "step (paper)"), ("ddpm", "x0 (denoised)"), ("dpmpp_2m", "step (paper)"), ("dpmpp_sde", "step (paper)")],
)
def test_moving_only_beta_repeats_only_the_late_steps(controlled, lr, sampler_name, target) -> None:
    """From the state at LLA's start, and exactly as a whole run would have it."""
    settings = {
        "steps": 5,
        "alpha": 0.05,
        "lla_start": 0.6,
        "sampler_name": sampler_name,
        "target": target,
        "scheduler": "normal",
    }
    base = controlled.model
    sample(controlled, lr, beta=0.0, **settings)
    with rig.count_calls(base, "apply_model") as calls:
        quick = sample(controlled, lr, beta=0.2, **settings)
    per_step = 2 if sampler_name == "dpmpp_sde" else 1
    assert len(calls) <= 2 * per_step
    with rig.count_calls(base, "apply_model") as calls:
        assert torch.equal(sample(controlled, lr, beta=0.2, **settings), quick)
    assert len(calls) <= 2 * per_step
    late_state._last.clear()
    with rig.count_calls(base, "apply_model") as calls:
        assert torch.equal(sample(controlled, lr, beta=0.2, **settings), quick)
    assert len(calls) > 2 * per_step


@pytest.mark.parametrize("every", [1, 2, 3, 4, 50])
def test_what_is_recalled_is_what_a_whole_run_would_give(tiny, lr, every) -> None:
    """A control that is computed now and then must be as old in the late phase as it would have been."""
    model = apply(tiny, lr["latent"], control_every=every)
    settings = {"steps": 8, "alpha": 0.05, "lla_start": 0.5}  # the late phase begins at step 4
    sample(model, lr, beta=0.0, **settings)
    with rig.count_calls(model.model, "apply_model") as calls:
        recalled = sample(model, lr, beta=0.2, **settings)
    assert len(calls) == (8 if 4 % every else 4)
    late_state._last.clear()
    assert torch.equal(sample(model, lr, beta=0.2, **settings), recalled)


def test_nothing_is_recalled_where_other_nodes_may_remember_steps(controlled, lr) -> None:
    """EasyCache and its like compare a step with those before: a run that begins late would have none."""

    def untouched(executor, *args, **named):
        return executor(*args, **named)

    wrapped, hooked, replaced = controlled.clone(), controlled.clone(), controlled.clone()
    wrapped.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.PREDICT_NOISE, "another pack", untouched)
    hooked.set_model_sampler_post_cfg_function(lambda values: values["denoised"])
    replaced.set_model_unet_function_wrapper(
        lambda apply, given: apply(given["input"], given["timestep"], **given["c"])
    )
    for model, expected in ((controlled, 2), (wrapped, 4), (hooked, 4), (replaced, 4)):
        sample(model, lr, alpha=0.05, beta=0.0, lla_start=0.5)
        with rig.count_calls(model.model, "apply_model") as calls:
            sample(model, lr, alpha=0.05, beta=0.1, lla_start=0.5)
        assert len(calls) == expected


def test_anything_else_repeats_everything(tiny, controlled, lr, text) -> None:
    """Seed, alpha, steps, model, x_lr, conditioning or cfg: the kept state is not used."""
    settings = {"alpha": 0.05, "beta": 0.1, "steps": 4, "lla_start": 0.5}
    other_lr = {"latent": {**lr["latent"], "samples": lr["latent"]["samples"] * 1.01}}
    other_text = [[text[0][0] + 0.1, {}]]
    uncomparable = [[text[0][0], {"control_hooks": object()}]]
    for change in (
        {"seed": 5},
        {"alpha": 0.06},
        {"steps": 6},
        {"lla_start": 0.6},
        {"cfg": 2.0},
        {"positive": other_text},
        {"positive": uncomparable},
        {"model": controlled.clone()},
        {"lr": other_lr},
        {"alpha_mask": torch.ones(1, 8, 8)},
    ):
        sample(controlled, lr, **settings)
        model, picture = change.pop("model", controlled), change.pop("lr", lr)
        with rig.count_calls(controlled.model, "apply_model") as calls:
            sample(model, picture, **{**settings, **change})
        assert len(calls) >= 4, change


def test_every_input_but_beta_and_its_mask_repeats_everything(controlled, lr, text) -> None:
    """Asked of the node itself, so that a new input cannot be forgotten in what the state is remembered by."""
    other_text = [[text[0][0] + 0.1, {}]]
    changes = {
        "model": controlled.clone(),
        "lr_latent": {**lr["latent"], "samples": lr["latent"]["samples"] * 1.01},
        "seed": 5,
        "steps": 8,
        "cfg": 3.0,
        "sampler_name": "euler",
        "scheduler": "karras",
        "denoise": 0.8,
        "alpha": 0.06,
        "ela_end": 0.5,
        "lla_start": 0.75,
        "target": "x0 (denoised)",
        "start_from_lr": False,
        "strength_rule": "over the phase",
        "positive": other_text,
        "negative": other_text,
        "alpha_mask": torch.ones(1, 8, 8) * 0.5,
        "cfg_start": 0.3,
        "cfg_end": 0.7,
    }
    node = rig.nodes.NODE_CLASS_MAPPINGS["ClearSRLSAKSampler"]
    inputs = {widget.id for widget in node.define_schema().inputs}
    assert inputs - {"beta", "beta_mask"} == changes.keys()
    settings = {"model": controlled, "lr_latent": lr["latent"], "seed": 3, "steps": 6, "cfg": 2.0, "alpha": 0.05}
    settings |= {"beta": 0.1, "lla_start": 0.5}
    for name, value in changes.items():
        rig.run("ClearSRLSAKSampler", **settings)
        remembered = late_state._last[0]
        rig.run("ClearSRLSAKSampler", **{**settings, name: value})
        assert not late_state._last or late_state._last[0] is not remembered, name
    rig.run("ClearSRLSAKSampler", **settings)
    remembered = late_state._last[0]
    mask = torch.ones(1, 8, 8) * 0.5
    for change in ({"beta": 0.2}, {"beta_mask": mask}):
        with rig.count_calls(controlled.model, "apply_model") as calls:
            rig.run("ClearSRLSAKSampler", **{**settings, **change})
        assert len(calls) == 3


# ---- bad input ------------------------------------------------------------------------------------------------------


def test_impossible_settings_are_refused(tiny, lr) -> None:
    for settings, words in (
        ({"ela_end": 0.9, "lla_start": 0.5}, r"ela_end 0\.9 lies after lla_start 0\.5"),
        ({"alpha": -0.1}, "alpha is -0.1"),
        ({"beta": float("nan")}, "beta is nan"),
    ):
        with pytest.raises(ValueError, match=words):
            sample(tiny["model"], lr, **settings)
        with pytest.raises(ValueError, match=words):
            rig.run("ClearSRLSAPatch", model=tiny["model"], lr_latent=lr["latent"], **settings)


def test_missing_conditioning_says_what_to_connect(lr) -> None:
    bare = rig.host_model(comfy.supported_models.SD15, {"model_channels": 320, "context_dim": 768})
    with pytest.raises(ValueError, match=r"positive is not connected.*CLIP Text Encode"):
        sample(bare, lr)


def test_flow_models_are_refused_for_the_step_target(lr, text) -> None:
    class Flow(comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST):
        pass

    bare = rig.host_model(comfy.supported_models.SD15, {"model_channels": 320, "context_dim": 768})
    bare.add_object_patch("model_sampling", Flow())
    with pytest.raises(ValueError, match=r"flow model.*x0"):
        sample(bare, lr, alpha=0.1, positive=text, negative=text)


def test_latents_of_another_model_are_refused(tiny, lr, text) -> None:
    wrong = {"latent": {"samples": torch.zeros(1, 16, 8, 8)}}
    with pytest.raises(ValueError, match=r"16 channels, but the model's latents have 4"):
        sample(tiny["model"], wrong)
    patched = rig.run("ClearSRLSAPatch", model=tiny["model"], lr_latent={"samples": torch.zeros(1, 4, 8, 16)})
    with pytest.raises(ValueError, match="does not fit the latent being sampled"):
        sample(patched, lr)


def test_scheduler(tiny) -> None:
    """Sigmas of the model at the core's timesteps, for any number of steps."""
    table = tiny["model"].model.model_sampling.sigmas
    for steps in (1, 3, 30, 50, 999, 1000):
        for spacing in ("leading", "linspace", "trailing"):
            sigmas = rig.run("ClearSRScheduler", model=tiny["model"], steps=steps, spacing=f"ddpm_{spacing}")
            expected = table[schedule.spaced_timesteps(steps, spacing)].float()
            assert torch.equal(sigmas[:-1], expected) and float(sigmas[-1]) == 0.0
            assert bool((sigmas.diff() < 0).all())
