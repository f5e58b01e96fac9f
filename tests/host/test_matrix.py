"""ClearSR's control together with what else a graph may hold (docs/COMPATIBILITY.md), in one piece and in tiles.

Each cell is compared with the composition by hand, and leaves the models as they were.
"""

from __future__ import annotations

import clearsr_rig as rig
import comfy.samplers
import comfy.utils
import folder_paths
import pytest
import torch
from clearsr_runs import (
    NEGATIVE,
    OVERLAP,
    POSITIVE,
    SIDE,
    SMALL,
    apply,
    by_hand,
    conditioning,
    noise_like,
    predict,
    sample,
    tiles,
)

HEIGHT, WIDTH = 24, 16  # latent pixels: two tiles, one above the other
CUT = tiles.layout(HEIGHT, WIDTH, SIDE, OVERLAP)
HOW = {"one piece": {}, "tiles": {**SMALL, "tiles_per_batch": 2}}
OTHER = conditioning(6)

both = pytest.mark.parametrize("how", HOW)


FILES = {
    "ClearSR": {},
    "imported": {
        "control_input": "lr+xt",
        "control_text": "conditioning",
        "control_use_spm": False,
        "control_window_attention": False,
        "lora_rank": 0,
        "prompt_mode": "null",
        "image_encoder": False,
    },
}


@pytest.fixture(scope="module", params=FILES)
def config(request):
    """Configurations of both kinds of control: trained by this pack, and imported from DiffBIR."""
    return rig.tiny_config(**FILES[request.param])


@pytest.fixture(scope="module")
def loaded(config):
    """Each kind of control, loaded: name, model, vae, clearsr."""
    name = rig.write("matrix.safetensors", rig.tiny_checkpoint(config))
    model, vae, clearsr = rig.run("ClearSRLoader", checkpoint=name)
    return {"name": name, "model": model, "vae": vae, "clearsr": clearsr}


@pytest.fixture(scope="module")
def tall(loaded):
    """x_lr of one picture, 24 x 16 latent."""
    latent, _ = rig.run("ClearSRLREncode", clearsr=loaded["clearsr"], image=rig.images(1, 48, 32), scale=4.0)
    assert latent["samples"].shape == (1, 4, HEIGHT, WIDTH)
    return latent


@pytest.fixture(scope="module")
def noise(tall):
    return noise_like(tall)


@pytest.fixture(scope="module")
def plain(loaded, tall, noise):
    """The prediction of each way with nothing beside the control."""
    return {how: predict(apply(loaded, tall, **settings), noise, cfg=2.0) for how, settings in HOW.items()}


@pytest.fixture(autouse=True)
def left_as_it_was(loaded, tall, noise, plain):
    """After every cell: nothing hangs on the MODEL, and the plain run gives the same bits as before."""
    yield
    assert not any(loaded["model"].wrappers.values()) and loaded["model"].get_additional_models() == []
    assert set(loaded["model"].model_options) == {"transformer_options"}
    assert torch.equal(predict(apply(loaded, tall, **HOW["tiles"]), noise, cfg=2.0), plain["tiles"])


def close(one, other, tolerance=1e-3):
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def differs(one, other):
    return bool(one.isfinite().all()) and float((one - other).abs().mean()) > 1e-4


# ---- the model ------------------------------------------------------------------------------------------------------

LORA_KEYS = (
    "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight",
    "middle_block.1.transformer_blocks.0.attn1.to_q.weight",
    "output_blocks.5.1.transformer_blocks.0.attn1.to_v.weight",  # which ClearSR's own LoRA changes too
    "output_blocks.5.0.in_layers.2.weight",
)


@pytest.fixture(scope="module")
def lora(config):
    """An ordinary LoRA file, and the model that has it in its weights."""
    checkpoint = rig.tiny_checkpoint(config)
    generator, file = torch.Generator().manual_seed(21), {}
    for key in LORA_KEYS:
        weight = checkpoint.tensors["base.unet"][key]
        up = torch.randn(weight.shape[0], 2, generator=generator) / 2
        down = torch.randn(2, weight[0].numel(), generator=generator) / weight[0].numel() ** 0.5
        name = "diffusion_model." + key.removesuffix(".weight")
        file |= {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down, f"{name}.alpha": torch.tensor(2.0)}
        checkpoint.tensors["base.unet"][key] = weight + 0.8 * (up @ down).reshape(weight.shape)
    folder = rig.BASE / "models" / "loras"
    folder.mkdir(exist_ok=True)
    comfy.utils.save_torch_file(file, str(folder / "ordinary.safetensors"))
    folder_paths.filename_list_cache.clear()
    model, _, clearsr = rig.run("ClearSRLoader", checkpoint=rig.write("with_lora.safetensors", checkpoint))
    return {"model": model, "clearsr": clearsr}


@both
@pytest.mark.parametrize("order", ["before", "after"])
def test_lora(loaded, tall, noise, plain, lora, how, order) -> None:
    """A LoRA before or behind the control is the model with that LoRA in its weights."""

    def add(model):
        return rig.run("LoraLoaderModelOnly", model=model, lora_name="ordinary.safetensors", strength_model=0.8)

    if order == "before":
        model = apply(loaded, tall, model=add(loaded["model"]), **HOW[how])
    else:
        model = add(apply(loaded, tall, **HOW[how]))
    result = predict(model, noise, cfg=2.0)
    close(result, predict(apply(lora, tall, **HOW[how]), noise, cfg=2.0))
    assert differs(result, plain[how])


@both
@pytest.mark.parametrize("node", ["FreeU", "FreeU_V2"])
def test_freeu(loaded, tall, noise, plain, how, node) -> None:
    """Before and behind the control are one; in tiles each tile is what it is alone."""

    def free(model):
        # The tiny model has no level of four times its width, where b1 and s1 act.
        return rig.run(node, model=model, b1=1.3, b2=1.4, s1=0.9, s2=0.2)

    result = predict(free(apply(loaded, tall, **HOW[how])), noise, cfg=2.0)
    assert torch.equal(result, predict(apply(loaded, tall, model=free(loaded["model"]), **HOW[how]), noise, cfg=2.0))
    assert differs(result, plain[how])
    if how == "tiles":
        close(result, by_hand(loaded, tall, noise, CUT, patched=free, cfg=2.0))


def test_compiled(loaded, tall, noise, plain) -> None:
    """TorchCompileModel behind the control: both act; the MODEL before it stays as it is. test_large.py also traces."""
    controlled = apply(loaded, tall)
    compiled = rig.run("TorchCompileModel", model=controlled, backend="inductor")
    with torch.compiler.set_stance("force_eager"):
        assert torch.equal(predict(compiled, noise, cfg=2.0), plain["one piece"])
    assert torch.equal(predict(controlled, noise, cfg=2.0), plain["one piece"])


# ---- guidance -------------------------------------------------------------------------------------------------------


def model_units(model, latent):
    """What the sampler worked with, of a latent that came out of a run."""
    return model.model.process_latent_in(latent)


def halves(model, noise, negative=NEGATIVE):
    """The positive and the negative prediction as the plain run has them, in model units."""
    seen = {}

    def record(values):
        seen.update(positive=values["cond_denoised"], negative=values["uncond_denoised"])
        return values["denoised"]

    watched = model.clone()
    watched.set_model_sampler_post_cfg_function(record)
    predict(watched, noise, cfg=2.0, negative=negative)
    return seen["positive"], seen["negative"]


@both
def test_guidance_is_of_the_whole_picture(loaded, tall, noise, plain, how) -> None:
    model = apply(loaded, tall, **HOW[how])
    positive, negative = halves(model, noise)
    close(model_units(model, plain[how]), negative + 2.0 * (positive - negative))
    close(model_units(model, predict(model, noise, cfg=1.0)), positive)


@both
def test_rescale_cfg(loaded, tall, noise, plain, how) -> None:
    """The spread of the whole v-prediction is rescaled, not that of each tile."""
    model, sigma, share = apply(loaded, tall, **HOW[how]), 3.0, 0.7
    result = predict(rig.run("RescaleCFG", model=model, multiplier=share), noise, cfg=2.0)
    x = noise * sigma  # the state, from which a latent of zeros was noised
    scale = (sigma**2 + 1) ** 0.5

    def velocity(denoised):
        return (x / scale**2 - denoised) * scale / sigma

    positive, negative = map(velocity, halves(model, noise))
    guided = negative + 2.0 * (positive - negative)
    rescaled = guided * positive.std(dim=(1, 2, 3), keepdim=True) / guided.std(dim=(1, 2, 3), keepdim=True)
    close(model_units(model, result), x / scale**2 - (share * rescaled + (1 - share) * guided) * sigma / scale)
    assert differs(result, plain[how])


def perpendicular(positive, negative, empty, cfg, scale):
    """Perp-Neg: of the negative direction only what is perpendicular to the positive one counts."""
    ahead, away = positive - empty, negative - empty
    return empty + cfg * (ahead - scale * (away - (away * ahead).sum() / ahead.norm() ** 2 * ahead))


@both
@pytest.mark.parametrize("node", ["PerpNegGuider", "PerpNeg"])
def test_perp_neg(loaded, tall, noise, plain, how, node) -> None:
    """Three predictions; those of the negative and of the empty prompt read their own text in the decoder."""
    model = apply(loaded, tall, **HOW[how])
    if node == "PerpNeg":
        patched = rig.run("PerpNeg", model=model, empty_conditioning=OTHER, neg_scale=0.7)
        result = predict(patched, noise, cfg=2.0)
    else:
        guider = rig.run(
            "PerpNegGuider",
            model=model,
            positive=POSITIVE,
            negative=NEGATIVE,
            empty_conditioning=OTHER,
            cfg=2.0,
            neg_scale=0.7,
        )
        euler = comfy.samplers.sampler_object("euler")
        sigmas = torch.tensor([3.0, 0.0])
        result = guider.sample(noise, torch.zeros_like(noise), euler, sigmas, disable_pbar=True, seed=0)
    positive, negative = halves(model, noise)
    _, empty = halves(model, noise, negative=OTHER)
    close(model_units(model, result), perpendicular(positive, negative, empty, 2.0, 0.7))
    assert differs(result, plain[how])


# ---- conditionings --------------------------------------------------------------------------------------------------


@both
def test_several_conditionings(loaded, tall, noise, how) -> None:
    """Two of full strength count alike."""
    model = apply(loaded, tall, **HOW[how])
    combined = rig.run("ConditioningCombine", conditioning_1=POSITIVE, conditioning_2=OTHER)
    alone = [predict(model, noise, positive=one) for one in (POSITIVE, OTHER)]
    assert differs(*alone)
    close(predict(model, noise, positive=combined), (alone[0] + alone[1]) / 2)


@both
def test_mask_conditioning(loaded, tall, noise, how) -> None:
    """Each pixel is the mean of the predictions by their masks."""
    model = apply(loaded, tall, **HOW[how])
    mask = torch.rand(HEIGHT, WIDTH, generator=torch.Generator().manual_seed(5)) * 0.8 + 0.1
    combined = [
        *rig.run("ConditioningSetMask", conditioning=POSITIVE, mask=mask, strength=1.0, set_cond_area="default"),
        *rig.run("ConditioningSetMask", conditioning=OTHER, mask=1.0 - mask, strength=1.0, set_cond_area="default"),
    ]
    one, other = (predict(model, noise, positive=alone) for alone in (POSITIVE, OTHER))
    close(predict(model, noise, positive=combined), mask * one + (1.0 - mask) * other)


def left_and_right(height):
    """Two conditionings, each of one half of a latent of that height."""
    area = {"width": WIDTH * 4, "height": height * 8, "y": 0, "strength": 1.0}
    return [
        *rig.run("ConditioningSetArea", conditioning=POSITIVE, x=0, **area),
        *rig.run("ConditioningSetArea", conditioning=OTHER, x=WIDTH * 4, **area),
    ]


@both
def test_area_conditioning(loaded, tall, noise, how) -> None:
    """Two areas side by side: each is what its part of the picture, x_lr and tile is alone."""
    result = predict(apply(loaded, tall, **HOW[how]), noise, positive=left_and_right(HEIGHT))
    if how == "tiles":
        expected = by_hand(loaded, tall, noise, CUT, make_positive=lambda tile: left_and_right(tile.height))
    else:
        expected = torch.empty_like(noise)
        for part, text in ((slice(0, WIDTH // 2), POSITIVE), (slice(WIDTH // 2, WIDTH), OTHER)):
            entry = {**tall, "samples": tall["samples"][..., part]}
            expected[..., part] = predict(apply(loaded, entry), noise[..., part].clone(), positive=text)
    close(result, expected)


@both
def test_timestep_range(loaded, tall, noise, how) -> None:
    """A conditioning for the first half of the run and one for the second."""
    model = apply(loaded, tall, **HOW[how])
    combined = [
        *rig.run("ConditioningSetTimestepRange", conditioning=POSITIVE, start=0.0, end=0.5),
        *rig.run("ConditioningSetTimestepRange", conditioning=OTHER, start=0.5, end=1.0),
    ]
    for sigma, text in ((10.0, POSITIVE), (0.5, OTHER)):
        close(predict(model, noise, positive=combined, sigma=sigma), predict(model, noise, positive=text, sigma=sigma))


def test_controlnet(loaded, tall, noise, plain, stock_controlnet, monkeypatch) -> None:
    """Two chained ControlNets beside ours: the UNet gets the sum of what each gives alone."""
    network, given = loaded["model"].model.diffusion_model, []
    inner = network.forward

    def forward(x, *more, control=None, **options):
        given.append({kind: list(values) for kind, values in (control or {}).items()})  # the UNet empties the lists
        return inner(x, *more, control=control, **options)

    def chain(*seeds):
        positive, negative = POSITIVE, NEGATIVE
        for seed in seeds:
            positive, negative = rig.run(
                "ControlNetApplyAdvanced",
                positive=positive,
                negative=negative,
                control_net=stock_controlnet,
                image=rig.images(1, HEIGHT * 8, WIDTH * 8, seed),
                strength=0.7,
                start_percent=0.0,
                end_percent=1.0,
            )
        return positive

    monkeypatch.setattr(network, "forward", forward)
    controlled, alone = apply(loaded, tall), loaded["model"]
    together = predict(controlled, noise, positive=chain(11, 12))
    for model, positive in ((controlled, POSITIVE), (alone, chain(11)), (alone, chain(12))):
        predict(model, noise, positive=positive)
    monkeypatch.undo()
    assert len(given) == 4
    for kind, count in (("output", 12), ("middle", 1)):
        assert [len(control[kind]) for control in given] == [count] * 4
        for total, *parts in zip(*(control[kind] for control in given), strict=True):
            close(total, sum(parts), 1e-4)
    assert differs(together, plain["one piece"])


# ---- the latent -----------------------------------------------------------------------------------------------------


@both
def test_one_picture_several_times(loaded, tall, how) -> None:
    """x_lr repeated by a stock node, or x_lr of one picture under a larger batch: each row is what it is alone."""
    repeated = rig.run("RepeatLatentBatch", samples=tall, amount=2)
    noise = noise_like(repeated, seed=17)
    for latent in (repeated, tall):
        result = predict(apply(loaded, latent, **HOW[how]), noise, cfg=2.0)
        for row in range(2):
            close(result[row : row + 1], predict(apply(loaded, tall, **HOW[how]), noise[row : row + 1], cfg=2.0))


@both
def test_noise_mask_and_differential_diffusion(loaded, tall, how) -> None:
    """What the mask keeps is x_lr to the end; the gradient of Differential Diffusion is not that of a plain mask."""
    mask = torch.zeros(1, HEIGHT * 8, WIDTH * 8)
    mask[:, 64:128], mask[:, 128:] = 0.5, 1.0
    masked = rig.run("SetLatentNoiseMask", samples=tall, mask=mask)
    model = apply(loaded, tall, **HOW[how])
    whole = sample(model, tall, cfg=2.0)
    results = [
        sample(one, masked, cfg=2.0)
        for one in (
            rig.run("DifferentialDiffusion", model=model),
            apply(loaded, tall, model=rig.run("DifferentialDiffusion", model=loaded["model"]), **HOW[how]),
            model,
        )
    ]
    assert torch.equal(results[0], results[1])
    assert differs(results[0], results[2]) and differs(results[0], whole)
    for result in results:
        close(result[..., :8, :], tall["samples"][..., :8, :], 1e-4)
        assert differs(result[..., 16:, :], tall["samples"][..., 16:, :])
