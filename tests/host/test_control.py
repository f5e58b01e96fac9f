"""DPM/SPM Control Apply on a real host: what it adds, when, to which rows, and what it leaves alone."""

from __future__ import annotations

import json

import clearsr_rig as rig
import comfy.clip_vision
import comfy.samplers
import pytest
import torch

hooks = rig.module("nodes.control_hooks")


def sample(model, conditioning, latent, steps=2, cfg=1.0, **more):
    """Stock KSampler, euler."""
    return rig.run(
        "KSampler",
        model=model,
        seed=3,
        steps=steps,
        cfg=cfg,
        sampler_name="euler",
        scheduler="normal",
        positive=conditioning,
        negative=more.pop("negative", conditioning),
        latent_image=latent,
        denoise=1.0,
    )["samples"]


@pytest.fixture
def text(tiny):
    return rig.run("ClearSREmptyPrompt", clearsr=tiny["clearsr"])


def apply(loaded, latent, model=None, **settings):
    model = model or loaded["model"]
    return rig.run("ClearSRControlApply", model=model, clearsr=loaded["clearsr"], lr_latent=latent, **settings)


def forwards(loaded):
    """Count the calls of the control network."""
    return rig.count_calls(loaded["clearsr"].control.model, "forward")


def test_untrained_control_changes_no_bit(silent, lr) -> None:
    """Zero-initialised output convolutions and LoRA: the patched UNet is the plain one."""
    text = rig.run("ClearSREmptyPrompt", clearsr=silent["clearsr"])
    plain, _, _ = rig.run("ClearSRLoader", checkpoint=silent["name"], lora_strength=0.0)
    controlled = apply(silent, lr["latent"])
    for cfg in (1.0, 3.0):
        assert torch.equal(sample(controlled, text, lr["latent"], cfg=cfg), sample(plain, text, lr["latent"], cfg=cfg))


def test_control_acts_and_applying_again_replaces(tiny, lr, text) -> None:
    plain = sample(tiny["model"], text, lr["latent"])
    once = apply(tiny, lr["latent"])
    first = sample(once, text, lr["latent"])
    assert not torch.allclose(first, plain, rtol=1e-2)
    twice = apply(tiny, lr["latent"], model=apply(tiny, lr["latent"], model=once))
    assert torch.equal(sample(twice, text, lr["latent"]), first)
    for kinds in twice.wrappers.values():
        assert all(len(wrappers) == 1 for wrappers in kinds.values())
    assert len(twice.model_options["transformer_options"]["patches"]["attn2_patch"]) == 1
    assert len(twice.get_additional_models_with_key("clearsr")) == 1


def test_input_model_stays_as_it_was(tiny, lr, text) -> None:
    before = sample(tiny["model"], text, lr["latent"])
    sample(apply(tiny, lr["latent"]), text, lr["latent"])
    assert torch.equal(sample(tiny["model"], text, lr["latent"]), before)
    assert not any(tiny["model"].wrappers.values())
    assert tiny["model"].get_additional_models() == []
    assert "patches" not in tiny["model"].model_options["transformer_options"]


@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_control_is_computed_once_per_step(tiny, lr, text, controlled, cfg) -> None:
    """Conditional and unconditional rows share one control of batch 1."""
    with forwards(tiny) as calls:
        sample(controlled, text, lr["latent"], steps=3, cfg=cfg)
    assert [args[0].shape[0] for args, _ in calls] == [1, 1, 1]


def test_batched_guidance_equals_separate_calls(tiny, lr, controlled, monkeypatch) -> None:
    """cfg > 1 with different texts: one batch of two rows, or two calls, are the same."""
    generator = torch.Generator().manual_seed(1)
    positive, negative = ([[torch.randn(1, 3, 16, generator=generator), {}]] for _ in range(2))
    together = sample(controlled, positive, lr["latent"], cfg=4.0, negative=negative)
    monkeypatch.setattr(comfy.samplers, "can_concat_cond", lambda one, other: one is other)
    with forwards(tiny) as calls:
        apart = sample(controlled, positive, lr["latent"], cfg=4.0, negative=negative)
    assert len(calls) == 2  # still once per step
    assert float((apart - together).norm() / together.norm()) < 1e-4


def test_image_prompt_reaches_the_decoder_only(tiny, lr, controlled) -> None:
    """Encoder and middle read the text, the decoder reads p for positive and its own text for negative rows."""
    generator = torch.Generator().manual_seed(1)
    positive, negative = (torch.randn(1, 3, 16, generator=generator) for _ in range(2))
    seen = []
    recorder = controlled.clone()

    def record(query, context, value, options):
        for row, kind in zip(context.chunk(len(options["cond_or_uncond"])), options["cond_or_uncond"], strict=True):
            seen.append((options["block"][0], kind, row.clone()))
        return query, context, value

    recorder.set_model_attn2_patch(record)
    sample(recorder, [[positive, {}]], lr["latent"], steps=1, cfg=4.0, negative=[[negative, {}]])
    prompt = lr["latent"]["clearsr"]["image_prompt"].expand(-1, 3, -1)
    expected = {("output", 0): prompt, ("output", 1): negative}
    assert {(place, kind) for place, kind, _ in seen} == {
        (place, kind) for place in ("input", "middle", "output") for kind in (0, 1)
    }
    for place, kind, row in seen:
        wanted = expected.get((place, kind), positive if kind == 0 else negative)
        torch.testing.assert_close(row, wanted)


def test_area_conditioning_gets_its_part_of_the_picture(tiny, lr, text, controlled) -> None:
    whole = text[0]
    left = [whole[0], {"area": (8, 4, 0, 4), "strength": 1.0, "set_area_to_bounds": False}]
    with forwards(tiny) as calls:
        sample(controlled, [whole, left], lr["latent"], steps=1)
    seen = {tuple(args[0].shape[-2:]): args[0] for args, _ in calls}
    assert set(seen) == {(8, 8), (8, 4)}
    torch.testing.assert_close(seen[8, 4][:1], seen[8, 8][:1, :, :, 4:])


@pytest.mark.parametrize(("every", "expected"), [(1, 6), (3, 2), (50, 1)])
def test_control_reuse(tiny, lr, text, every, expected) -> None:
    model = apply(tiny, lr["latent"], control_every=every)
    with forwards(tiny) as calls:
        sample(model, text, lr["latent"], steps=6)
    assert len(calls) == expected


@pytest.mark.parametrize("control_input", ["lr", "lr+xt"])
def test_fixed_time_is_computed_once_and_exactly(lr, text, control_input, monkeypatch) -> None:
    """`control_time` "fixed": one control per picture equals one per step, bit for bit."""
    config = rig.tiny_config(control_time="fixed", control_input=control_input)
    name = rig.write(f"fixed_{len(control_input)}.safetensors", rig.tiny_checkpoint(config))
    model, _, clearsr = rig.run("ClearSRLoader", checkpoint=name)
    loaded = {"model": model, "clearsr": clearsr}
    controlled = apply(loaded, lr["latent"])
    with forwards(loaded) as calls:
        cached = sample(controlled, text, lr["latent"], steps=3)
    assert len(calls) == (1 if control_input == "lr" else 3)
    monkeypatch.setattr(hooks, "_same", lambda *_: False)
    with forwards(loaded) as calls:
        assert torch.equal(sample(controlled, text, lr["latent"], steps=3), cached)
    assert len(calls) == 3


def test_range_of_the_control(tiny, lr, text) -> None:
    """Outside start_percent..end_percent the network does not run; strength 0 does not run it at all."""
    for settings, expected in (
        ({"end_percent": 0.5}, range(2, 3)),
        ({"start_percent": 0.5}, range(2, 3)),
        ({"start_percent": 0.25, "end_percent": 1.0}, range(3, 4)),
        ({"start_percent": 1.0, "end_percent": 1.0}, range(1)),
        ({"dpm_strength": 0.0, "spm_strength": 0.0}, range(1)),
        ({"level_weights": "0,0,0,0,0"}, range(1)),
    ):
        with forwards(tiny) as calls:
            sample(apply(tiny, lr["latent"], **settings), text, lr["latent"], steps=4)
        assert len(calls) in expected, settings


def test_the_range_is_one_of_this_run_where_it_starts_part_of_the_way(tiny, lr, caplog) -> None:
    """With denoise 0.35 the first two thirds of the training's timesteps do not exist."""
    settings = {"lr_latent": lr["latent"], "steps": 4, "denoise": 0.35, "alpha": 0.0, "beta": 0.0}
    for range_, expected in (
        ({"end_percent": 0.5}, 2),
        ({"start_percent": 0.5}, 2),
        ({}, 4),
        ({"end_percent": 0.0}, 0),
    ):
        caplog.clear()
        model = apply(tiny, lr["latent"], **range_)
        with forwards(tiny) as calls:
            rig.run("ClearSRLSAKSampler", model=model, **settings)
        assert len(calls) == expected, range_
        assert ("the control never acts" in caplog.text) == (expected == 0)


def test_level_weights() -> None:
    parse = rig.module("nodes.control").parse_level_weights
    assert parse("") == (1.0,) * 13
    assert parse("1, 0.5, 0.25, 0, 2") == (1.0,) * 3 + (0.5,) * 3 + (0.25,) * 3 + (0.0,) * 3 + (2.0,)
    assert parse(" ".join(map(str, range(13)))) == tuple(float(n) for n in range(13))
    for bad in ("1,2", "a,b,c,d,e", "1,1,1,1,nan", "1,1,1,1,inf"):
        with pytest.raises(ValueError, match=r"5 numbers .* or 13 numbers"):
            parse(bad)


@pytest.mark.parametrize("control_input", ["lr", "lr+xt"])
def test_what_the_networks_and_the_unet_are_given(lr, text, control_input, monkeypatch) -> None:
    """x_lr in model units, the state as the UNet itself reads it, the residuals with their weights in their places."""
    config = rig.tiny_config(control_input=control_input)
    name = rig.write(f"given_{len(control_input)}.safetensors", rig.tiny_checkpoint(config))
    model, _, clearsr = rig.run("ClearSRLoader", checkpoint=name)
    weights = [1.0, 0.5, 2.0, -1.0, 0.25, 1.5, 0.75, 0.0, 1.25, 3.0, 0.1, 0.9, 0.6]
    controlled = apply({"model": model, "clearsr": clearsr}, lr["latent"], level_weights=", ".join(map(str, weights)))
    unet, network = model.model.diffusion_model, clearsr.control.model
    forward, compute = unet.forward, network.forward
    read, sums = [], []

    def record(x, *more, control=None, **options):
        # The UNet takes the residuals out of the lists that it is given.
        read.append((x, {key: list(values) for key, values in control.items()}))
        return forward(x, *more, control=control, **options)

    def record_control(x_lr, timestep, context, x_t, **options):
        sums.append((x_lr, x_t, compute(x_lr, timestep, context, x_t, **options)))
        return sums[-1][2]

    monkeypatch.setattr(unet, "forward", record)
    monkeypatch.setattr(network, "forward", record_control)
    sample(controlled, text, lr["latent"], steps=2)
    assert len(read) == len(sums) == 2
    for (x, control), (x_lr, x_t, residuals) in zip(read, sums, strict=True):
        torch.testing.assert_close(x_lr, lr["latent"]["samples"] * 0.18215)
        assert x_t is None if control_input == "lr" else torch.equal(x_t, x)
        for found, residual, weight in zip(control["output"], residuals.down, weights[:12], strict=True):
            assert found is None if weight == 0.0 else torch.equal(found, residual * weight)
        assert torch.equal(control["middle"][0], residuals.mid * 0.6)


def test_merging_with_another_controlnet_makes_new_lists() -> None:
    residuals = rig.module("clearsr_core.control").ControlResiduals(
        tuple(torch.full((1, 1, 1, 1), float(n)) for n in range(12)), torch.full((1, 1, 1, 1), 12.0)
    )
    theirs = {"output": [torch.ones(1, 1, 1, 1)] * 12, "middle": [None], "input": ["kept"]}
    weights = (1.0,) * 11 + (0.0, 0.5)
    merged = hooks._merged(theirs, residuals, weights)
    assert [float(value) for value in merged["output"]] == [1.0 + n for n in range(11)] + [1.0]
    assert float(merged["middle"][0]) == 6.0 and merged["input"] == ["kept"]
    assert merged["output"] is not theirs["output"] and float(theirs["output"][3]) == 1.0
    assert hooks._merged(None, residuals, weights)["output"][11] is None


def test_stock_controlnet_beside_ours(tiny, lr, text, controlled) -> None:
    """A ControlNet in the conditioning and our control act together."""

    class Stub(comfy.controlnet.ControlBase):
        def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
            ones = [torch.full((x_noisy.shape[0], 32, 8, 8), 0.5)]
            return {"input": [], "middle": [], "output": ones}

        def get_models(self):
            return []

        def copy(self):
            return self

    with_stub = [[text[0][0], {"control": Stub(), "control_apply_to_uncond": True}]]
    ours = sample(controlled, text, lr["latent"])
    both = sample(controlled, with_stub, lr["latent"])
    theirs = sample(tiny["model"], with_stub, lr["latent"])
    assert not torch.allclose(both, ours) and not torch.allclose(both, theirs)


def test_wrong_size_and_batch_are_refused(tiny, lr, text, controlled) -> None:
    with pytest.raises(ValueError, match=r"64 x 64 pixels.*128 x 64 pixels"):
        sample(controlled, text, {"samples": torch.zeros(1, 4, 8, 16)})
    pair, _ = rig.run("ClearSRLREncode", clearsr=tiny["clearsr"], image=rig.images(2), scale=4.0)
    both = apply(tiny, pair)
    with pytest.raises(ValueError, match="2 pictures, but 3"):
        sample(both, text, {"samples": torch.zeros(3, 4, 8, 8)})


def test_batch_of_different_pictures_equals_single_ones(tiny, text) -> None:
    pictures = torch.cat([rig.images(seed=1), 1.0 - rig.images(seed=2)])
    latent, _ = rig.run("ClearSRLREncode", clearsr=tiny["clearsr"], image=pictures, scale=4.0)
    together = sample(apply(tiny, latent), text, {"samples": torch.zeros(2, 4, 8, 8)})
    assert not torch.allclose(together[0], together[1], rtol=0.1)
    for index in range(2):
        single, _ = rig.run("ClearSRLREncode", clearsr=tiny["clearsr"], image=pictures[index : index + 1], scale=4.0)
        torch.testing.assert_close(single["samples"], latent["samples"][index : index + 1], rtol=1e-4, atol=1e-4)
        # The second picture has the second noise: batch_index says so.
        one = sample(apply(tiny, single), text, {"samples": torch.zeros(1, 4, 8, 8), "batch_index": [index]})
        torch.testing.assert_close(one, together[index : index + 1], rtol=1e-3, atol=1e-3)


def test_clip_vision_prompt(tiny, lr) -> None:
    """SD 2.1 files take pooled CLIP features; their absence is told, a wrong width is an error."""
    choose = rig.module("nodes.control").decoder_prompt

    class Bundle:
        config = rig.tiny_config(image_encoder=False)
        image_encoder = None
        name = "file"

    embeds = torch.randn(2, 16)
    tokens, said = choose(Bundle, {"image_embeds": embeds, "last_hidden_state": None}, {})
    assert said is None and torch.equal(tokens, embeds[:, None])
    assert choose(Bundle, None, {})[0] is None and "CLIP_VISION" in choose(Bundle, None, {})[1]
    with pytest.raises(ValueError, match=r"768 features.*needs 16"):
        choose(Bundle, {"image_embeds": torch.randn(1, 768)}, {})
    with pytest.raises(ValueError, match="has its own image encoder"):
        choose(tiny["clearsr"], {"image_embeds": embeds}, lr["latent"])


def test_clip_patch_tokens(tmp_path) -> None:
    """The host's own CLIP model: pixels as training makes them, and hidden states projected by weights of the file."""
    layout = {
        "hidden_act": "gelu",
        "hidden_size": 24,
        "image_size": 28,
        "intermediate_size": 32,
        "model_type": "clip_vision_model",
        "num_attention_heads": 2,
        "num_channels": 3,
        "num_hidden_layers": 2,
        "patch_size": 14,
        "projection_dim": 16,
    }
    (tmp_path / "clip.json").write_text(json.dumps(layout))
    host = comfy.clip_vision.ClipVisionModel(str(tmp_path / "clip.json"))
    generator = torch.Generator().manual_seed(3)
    weights = {
        name: 0.3 * torch.randn(value.shape, generator=generator) for name, value in host.model.state_dict().items()
    }
    host.load_sd(weights)
    images = rig.images(2, 40, 25)
    ours = rig.module("clearsr_core.clip_features").clip_pixels(images.movedim(-1, 1), 28)
    assert torch.equal(ours, comfy.clip_vision.clip_preprocess(images, size=28, crop=False))

    class Bundle:
        config = rig.tiny_config(image_encoder=False, prompt_mode="patch", clip_width=24)
        image_encoder = None
        image_projection = {  # noqa: RUF012
            "norm.weight": weights["vision_model.post_layernorm.weight"],
            "norm.bias": weights["vision_model.post_layernorm.bias"],
            "projection.weight": weights["visual_projection.weight"],
        }
        name = "file"

    features = host.encode_image(images, crop=False)
    choose = rig.module("nodes.control").decoder_prompt
    tokens, said = choose(Bundle, features, {})
    assert said is None and tokens.shape == (2, 5, 16)
    # The first token is the class token, of which CLIP itself makes the pooled embedding.
    torch.testing.assert_close(tokens[:, 0], features["image_embeds"].float(), rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match=r"16 features \(last_hidden_state\).*needs 24"):
        choose(Bundle, {"last_hidden_state": torch.randn(1, 5, 16)}, {})


def test_start_after_end_is_refused(tiny, lr) -> None:
    with pytest.raises(ValueError, match=r"start_percent 0\.9 lies after end_percent 0\.1"):
        apply(tiny, lr["latent"], start_percent=0.9, end_percent=0.1)


def test_clones_share_the_networks(tiny, lr, controlled) -> None:
    """ComfyUI 0.3.75 deep-copies model_options at each clone: nothing of ours may drag weights along."""
    clone = controlled.clone().clone()
    assert clone.get_additional_models_with_key("clearsr")[0].model is tiny["clearsr"].control.model
    for kinds in clone.wrappers.values():
        for wrappers in kinds.values():
            assert all(not hasattr(wrapper, "to") for wrapper in wrappers)
