"""LR Latent Encode and ClearSR Color Fix: every IMAGE, and exactly scale x input at the end."""

from __future__ import annotations

import clearsr_rig as rig
import comfy.model_management
import numpy as np
import pytest
import torch
from clearsr_runs import textured

pictures = rig.module("nodes.pictures")


def encode(loaded, image, **settings):
    return rig.run("ClearSRLREncode", clearsr=loaded["clearsr"], image=image, **settings)


@pytest.mark.parametrize(
    ("height", "width", "scale"),
    [(1, 1, 4.0), (7, 5, 4.0), (16, 16, 4.0), (64, 4096, 0.25), (33, 17, 2.5), (3, 70, 3.0)],
)
def test_any_size_ends_at_exactly_scale_times_input(tiny, height, width, scale) -> None:
    """Encode, decode, Color Fix: no setting is needed for the exact size."""
    latent, enlarged = encode(tiny, rig.images(1, height, width), scale=scale)
    size = (round(height * scale), round(width * scale))
    assert tuple(enlarged.shape) == (1, *size, 3)
    rows, columns = latent["samples"].shape[-2:]
    assert rows % 8 == 0 and columns % 8 == 0
    assert (rows * 8, columns * 8) == latent["clearsr"]["padded_size"]
    assert latent["clearsr"]["content_size"] == size
    decoded = rig.run("VAEDecode", samples=latent, vae=tiny["vae"])
    for method in ("wavelet", "adain", "lab"):
        fixed = rig.run("ClearSRColorFix", image=decoded, reference=enlarged, method=method)
        assert tuple(fixed.shape) == (1, *size, 3) and fixed.isfinite().all()
        assert float(fixed.min()) >= 0.0 and float(fixed.max()) <= 1.0


def test_latent_is_an_ordinary_one_of_the_adapted_encoder(tiny) -> None:
    """samples = the LoRA encoder's mode of the padded picture; the plain VAE is not touched by it."""
    image = rig.images(1, 16, 16)
    before = tiny["vae"].encode(pictures.pad_to_multiple(pictures.resize(image, (64, 64), "bicubic")))
    latent, enlarged = encode(tiny, image, scale=4.0)
    after = tiny["vae"].encode(enlarged)
    assert torch.equal(before, after)
    assert latent["samples"].shape == before.shape and not torch.allclose(latent["samples"], before, rtol=1e-2)


def test_padding_reflects_as_numpy_does() -> None:
    for height, width in ((5, 7), (2, 63), (64, 65), (1, 3)):
        image = rig.images(2, height, width)
        padded = pictures.pad_to_multiple(image)
        down, right = padded.shape[1] - height, padded.shape[2] - width
        # numpy repeats reflections; a single row or column can only be repeated.
        expected = image.numpy()
        for axis, (length, extra) in ((1, (height, down)), (2, (width, right))):
            mode = "edge" if length == 1 else "reflect"
            expected = np.pad(expected, [(0, extra if i == axis else 0) for i in range(4)], mode=mode)
        np.testing.assert_array_equal(padded.numpy(), expected)


def test_grey_rgba_and_range(tiny, caplog) -> None:
    """Grey becomes RGB, alpha is left out and values outside 0..1 are cut, both with a notice."""
    image = rig.images()
    reference, _ = encode(tiny, image)
    rgba, _ = encode(tiny, torch.cat([image, torch.rand(1, 16, 16, 1)], dim=-1))
    assert torch.equal(rgba["samples"], reference["samples"]) and "alpha" in caplog.text
    caplog.clear()
    grey, enlarged = encode(tiny, image[..., :1])
    assert torch.equal(enlarged[..., 0], enlarged[..., 2]) and not caplog.text
    wild, enlarged = encode(tiny, image * 3.0 - 1.0)
    assert float(enlarged.min()) >= 0.0 and float(enlarged.max()) <= 1.0 and "0..1" in caplog.text
    assert grey["samples"].isfinite().all() and wild["samples"].isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_pixels_are_refused(tiny, value) -> None:
    image = rig.images()
    image[0, 3, 4, 1] = value
    with pytest.raises(ValueError, match=r"LR Latent Encode: image contains 1 values that are not numbers"):
        encode(tiny, image)
    with pytest.raises(ValueError, match="not numbers"):
        rig.run("ClearSRColorFix", image=image, reference=rig.images())


def test_other_shapes_are_refused(tiny) -> None:
    for image in (torch.rand(1, 16, 16, 5), torch.rand(16, 16, 3), torch.rand(0, 16, 16, 3)):
        with pytest.raises(ValueError, match=r"LR Latent Encode: image has"):
            encode(tiny, image)


@pytest.mark.parametrize(("given", "used"), [(64, 128), (129, 128), (144, 128), (200, 192), (264, 256), (300, 320)])
def test_a_tile_size_is_brought_to_the_grid_and_told(tiny, caplog, given, used) -> None:
    """Beside it the host cuts the latents of neighbouring tiles apart by a pixel, or into none at all."""
    image = rig.images(1, 96, 80)
    latent, _ = encode(tiny, image, tile_size=given)
    assert f"LR Latent Encode: tile_size is {given}" in caplog.text and f"so {used} is used" in caplog.text
    expected, _ = encode(tiny, image, tile_size=used)
    assert torch.equal(latent["samples"], expected["samples"])


def test_target_size(tiny) -> None:
    for settings, size in (
        ({"width": 50}, (100, 50)),
        ({"height": 30}, (30, 15)),
        ({"width": 20, "height": 90}, (90, 20)),
        ({"scale": 0.25}, (4, 2)),
    ):
        _, enlarged = encode(tiny, rig.images(1, 16, 8), **settings)
        assert tuple(enlarged.shape[1:3]) == size


@pytest.mark.parametrize("method", ["bicubic", "bilinear", "area", "nearest-exact"])
def test_the_picture_is_enlarged_by_the_chosen_method(tiny, method) -> None:
    """Against torch; bicubic, of training and paper, unless another one is chosen."""
    image = torch.rand(1, 9, 12, 3, generator=torch.Generator().manual_seed(2))
    smooth = {"antialias": True, "align_corners": False} if method.startswith("bi") else {}
    expected = torch.nn.functional.interpolate(image.movedim(-1, 1), (36, 48), mode=method, **smooth)
    _, enlarged = encode(tiny, image, resize=method)
    torch.testing.assert_close(enlarged, expected.movedim(1, -1).clamp(0, 1))
    _, default = encode(tiny, image)
    assert torch.equal(default, enlarged) == (method == "bicubic")


def test_tiles_that_overlap_hide_their_borders(monkeypatch) -> None:
    """Nano's x_lr in tiles is close to that in one piece, closer than tiles that overlap by 8 pixels are."""
    _, _, clearsr = rig.run("ClearSRLoader", checkpoint="clearsr-nano.safetensors")
    image = textured(1, 96, 80)
    whole, _ = encode({"clearsr": clearsr}, image, scale=4.0)
    apart, module = [], rig.module("nodes.encode")
    for overlap in (module.TILE_OVERLAP, 8):
        monkeypatch.setattr(module, "TILE_OVERLAP", overlap)
        tiled, _ = encode({"clearsr": clearsr}, image, scale=4.0, tile_size=192)
        apart.append(float((tiled["samples"] - whole["samples"]).square().mean().sqrt() / whole["samples"].std()))
    assert 0.0 < apart[0] < 0.8 * apart[1]


def test_tiled_encoding_is_close_and_small_pictures_are_not_tiled(tiny) -> None:
    whole, _ = encode(tiny, rig.images(1, 64, 48))
    tiled, _ = encode(tiny, rig.images(1, 64, 48), tile_size=192)
    small, _ = encode(tiny, rig.images(1, 64, 48), tile_size=256)
    assert torch.equal(small["samples"], whole["samples"])
    assert tiled["samples"].shape == whole["samples"].shape and not torch.equal(tiled["samples"], whole["samples"])


@pytest.mark.parametrize("tile_size", [0, 192])
def test_out_of_memory_encodes_in_smaller_tiles(tiny, caplog, monkeypatch, tile_size) -> None:
    """The fallback gives what asking for the smaller tiles gives; with nothing smaller left the error comes through."""
    image = rig.images(1, 64, 48)
    expected, _ = encode(tiny, image, tile_size=128)
    network, limit = tiny["clearsr"].lr_encoder.first_stage_model, [128 * 128]
    inner = network.encode

    def limited(pixels, *more):
        if pixels.shape[-1] * pixels.shape[-2] > limit[0]:
            raise comfy.model_management.OOM_EXCEPTION("out of memory")
        return inner(pixels, *more)

    monkeypatch.setattr(network, "encode", limited)
    latent, _ = encode(tiny, image, tile_size=tile_size)
    assert torch.equal(latent["samples"], expected["samples"])
    assert "out of memory; encoding goes on in tiles of 128 pixels" in caplog.text
    limit[0] = 0
    with pytest.raises(comfy.model_management.OOM_EXCEPTION):
        encode(tiny, image, tile_size=tile_size)


def test_batch_of_different_pictures(tiny) -> None:
    latent, enlarged = encode(tiny, torch.cat([rig.images(seed=1), rig.images(seed=2) * 0.1]))
    assert latent["samples"].shape[0] == 2 and latent["clearsr"]["image_prompt"].shape == (2, 1, 16)
    assert enlarged.shape[0] == 2


def test_plain_anchor(tiny) -> None:
    """anchor "plain": start and adjustment use E, the control uses E'."""
    name = rig.write("plain_anchor.safetensors", rig.tiny_checkpoint(rig.tiny_config(anchor="plain")))
    _, vae, clearsr = rig.run("ClearSRLoader", checkpoint=name)
    latent, enlarged = encode({"clearsr": clearsr}, rig.images())
    torch.testing.assert_close(latent["clearsr"]["anchor"], vae.encode(pictures.pad_to_multiple(enlarged)))
    assert not torch.allclose(latent["clearsr"]["anchor"], latent["samples"])
    chosen = rig.module("nodes.lsa_patch").check_channels
    assert torch.equal(chosen("Node", tiny["model"], latent), latent["clearsr"]["anchor"])
    repeated = rig.run("RepeatLatentBatch", samples=latent, amount=3)
    assert torch.equal(chosen("Node", tiny["model"], repeated), latent["clearsr"]["anchor"].repeat(3, 1, 1, 1))
    # A result, or a latent that was changed, is what the user means: a second pass begins with it.
    for changed in (latent["samples"] * 0.9, latent["samples"][..., :4]):
        assert torch.equal(chosen("Node", tiny["model"], {**latent, "samples": changed}), changed)


@pytest.mark.parametrize("anchor", ["plain", "lr_encoder"])
def test_a_second_pass_begins_with_the_result_of_the_first(anchor) -> None:
    name = rig.write(f"second_{anchor}.safetensors", rig.tiny_checkpoint(rig.tiny_config(anchor=anchor)))
    model, _, clearsr = rig.run("ClearSRLoader", checkpoint=name)
    latent, _ = encode({"clearsr": clearsr}, rig.images())
    settings = {"model": model, "steps": 4, "denoise": 0.25, "alpha": 0.0, "beta": 0.0}
    first = rig.run("ClearSRLSAKSampler", lr_latent=latent, **{**settings, "denoise": 1.0})
    second = rig.run("ClearSRLSAKSampler", lr_latent=first, **settings)["samples"]
    alone = rig.run("ClearSRLSAKSampler", lr_latent={"samples": first["samples"]}, **settings)["samples"]
    assert torch.equal(second, alone)
    assert not torch.equal(second, rig.run("ClearSRLSAKSampler", lr_latent=latent, **settings)["samples"])


def test_stock_nodes_may_choose_and_repeat_pictures_of_a_batch(tiny) -> None:
    """The rows of the image prompt follow those of the latent."""
    latent, _ = encode(tiny, torch.cat([rig.images(seed=1), rig.images(seed=2)]))
    second, _ = encode(tiny, rig.images(seed=2))
    chosen = rig.run("LatentFromBatch", samples=latent, batch_index=1, length=1)
    repeated = rig.run("RepeatLatentBatch", samples=latent, amount=2)
    prompt = rig.module("nodes.control").decoder_prompt
    own = latent["clearsr"]["image_prompt"]
    assert torch.equal(prompt(tiny["clearsr"], None, chosen)[0], own[1:])
    assert torch.equal(prompt(tiny["clearsr"], None, repeated)[0], own[[0, 1, 0, 1]])
    torch.testing.assert_close(own[1:], second["clearsr"]["image_prompt"])
    for picked in (chosen, repeated):
        rig.run("ClearSRControlApply", model=tiny["model"], clearsr=tiny["clearsr"], lr_latent=picked)
    strange = {**chosen, "samples": torch.cat([chosen["samples"] * 0.5] * 3)}
    with pytest.raises(ValueError, match=r"made from 2 pictures, but lr_latent holds 3.*before LR Latent Encode"):
        rig.run("ClearSRControlApply", model=tiny["model"], clearsr=tiny["clearsr"], lr_latent=strange)


def test_image_encoder_gets_a_thumbnail(tiny, monkeypatch) -> None:
    """It sees no more of it, and whole pictures of a large batch would not fit beside the model on the card."""
    encoder = tiny["clearsr"].image_encoder.model
    image = rig.images(height=160, width=96)
    expected = encoder(image.movedim(-1, 1))
    seen = []
    real = type(encoder).forward
    monkeypatch.setattr(type(encoder), "forward", lambda self, x: seen.append(tuple(x.shape)) or real(self, x))
    assert torch.equal(rig.module("nodes.encode").image_prompt(tiny["clearsr"], image), expected)
    assert seen == [(1, 3, 64, 64)]


def test_color_fix_sizes_and_strength() -> None:
    image = rig.images(2, 128, 128)
    cut = rig.run("ClearSRColorFix", image=image, reference=rig.images(1, 100, 70), strength=0.0)
    assert torch.equal(cut, image[:, :100, :70])
    other = rig.run("ClearSRColorFix", image=image, reference=rig.images(1, 32, 32))
    assert other.shape == image.shape
    with pytest.raises(ValueError, match="2 results and 3 reference"):
        rig.run("ClearSRColorFix", image=image, reference=rig.images(3, 32, 32))


@pytest.mark.parametrize("method", ["wavelet", "adain", "lab"])
def test_a_grey_picture_stays_grey(method) -> None:
    """A model that draws coloured fringes must not colour a black-and-white photograph; only that one is grey."""
    image, reference = rig.images(2, 64, 64, seed=1), rig.images(2, 64, 64, seed=2)
    reference[0] = reference[0].mean(dim=-1, keepdim=True)
    fixed = rig.run("ClearSRColorFix", image=image, reference=reference, method=method)
    assert float((fixed[0].amax(dim=-1) - fixed[0].amin(dim=-1)).max()) < 1e-6
    assert float(fixed[0].std()) > 0.01
    assert float((fixed[1].amax(dim=-1) - fixed[1].amin(dim=-1)).max()) > 0.1
    kept = rig.run("ClearSRColorFix", image=image, reference=reference, method=method, strength=0.0)
    assert torch.equal(kept, image)


@pytest.mark.parametrize(
    ("size", "reference", "said"),
    [
        ((128, 128), (100, 70), False),  # the padding of LR Latent Encode
        ((128, 128), (128, 128), False),
        ((128, 128), (32, 32), True),  # the picture before it was enlarged
        ((64, 64), (17, 23), False),
        ((128, 64), (17, 23), True),
        ((100, 100), (90, 90), True),
    ],
)
def test_a_reference_of_another_size_is_told(caplog, size, reference, said) -> None:
    rig.run("ClearSRColorFix", image=rig.images(1, *size), reference=rig.images(1, *reference))
    assert ("which no padding explains" in caplog.text) == said
