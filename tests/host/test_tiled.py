"""Tiled diffusion on a real host: one tile is the plain run, many are the blend of what each tile alone would be."""

from __future__ import annotations

import clearsr_rig as rig
import comfy.conds
import comfy.context_windows
import comfy.controlnet
import comfy.model_management
import comfy.utils
import pytest
import torch
from clearsr_runs import (
    OVERLAP,
    POSITIVE,
    SIDE,
    SMALL,
    apply,
    by_hand,
    noise_like,
    predict,
    sample,
    seam_score,
    textured,
    with_controls,
)

tiles = rig.module("clearsr_core.tiles")
tiled = rig.module("nodes.tiled_diffusion")
tile_conds = rig.module("nodes.tile_conds")


@pytest.fixture
def plain(monkeypatch):
    """Sampling without any handler of ours."""

    def without(run, *arguments, **settings):
        with monkeypatch.context() as patch:
            patch.setattr(rig.module("nodes.control_hooks"), "start_tiling", lambda *_: None)
            return run(*arguments, **settings)

    return without


@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize("tile_size", [0, 256, 16384])
def test_one_tile_is_untiled_bit_for_bit(tiny, wide, plain, cfg, tile_size) -> None:
    model = apply(tiny, wide, tile_size=tile_size)
    assert torch.equal(sample(model, wide, cfg), plain(sample, model, wide, cfg))


@pytest.mark.parametrize(("cfg", "batch"), [(1.0, 1), (3.0, 1), (1.0, 4), (3.0, 64)])
def test_tiles_are_the_blend_of_tiles_sampled_alone(tiny, wide, cfg, batch) -> None:
    """x_lr and control are those of the tile, guidance acts on the blend, for a batch of two pictures."""
    noise = noise_like(wide)
    cut = tiles.layout(32, 24, SIDE, OVERLAP)
    assert (cut.rows, cut.columns) == (3, 2)
    with rig.count_calls(tiny["clearsr"].control.model, "forward") as calls:
        result = predict(apply(tiny, wide, **SMALL, tiles_per_batch=batch), noise, cfg)
    expected_rows = {1: [2] * 6, 4: [8, 4], 64: [12]}[batch]
    assert [args[0].shape for args, _ in calls] == [(rows, 4, SIDE, SIDE) for rows in expected_rows]
    torch.testing.assert_close(result, by_hand(tiny, wide, noise, cut, cfg=cfg), rtol=1e-3, atol=1e-3)


def test_conditioning_of_each_picture_stays_with_it(tiny, wide) -> None:
    """Texts that differ within the batch are repeated tile by tile, not row by row."""
    texts = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(7))
    noise, cut = noise_like(wide), tiles.layout(32, 24, SIDE, OVERLAP)
    together = predict(apply(tiny, wide, **SMALL, tiles_per_batch=6), noise, positive=[[texts, {}]])
    expected = by_hand(tiny, wide, noise, cut, make_positive=lambda _tile: [[texts, {}]])
    torch.testing.assert_close(together, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("height", "width"), [(19, 27), (33, 16), (5, 40), (17, 17)])
def test_sizes_off_the_grid(tiny, height, width) -> None:
    """Latents that other nodes made: the last tile is shorter, the windows stay where they are."""
    latent = {"samples": torch.randn(1, 4, height, width, generator=torch.Generator().manual_seed(1))}
    noise, cut = noise_like(latent), tiles.layout(height, width, SIDE, OVERLAP)
    result = predict(apply(tiny, latent, **SMALL, tiles_per_batch=3), noise)
    expected = torch.zeros_like(noise)
    for tile, share in zip(cut.tiles, cut.shares, strict=True):
        model = apply(tiny, {"samples": tile.of(latent["samples"]).clone()})
        tiles.add(expected, tile, share, predict(model, tile.of(noise).clone()))
    torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("settings", [{}, {"control_every": 3}])
def test_control_of_each_tile_is_reused(wide, settings) -> None:
    """A fixed control is computed once for each tile of a picture, not once for each step; to the same bits."""
    config = rig.tiny_config(control_time="t" if settings else "fixed")
    name = rig.write(f"tiled_{config.control.control_time}.safetensors", rig.tiny_checkpoint(config))
    model, _, clearsr = rig.run("ClearSRLoader", checkpoint=name)
    loaded = {"model": model, "clearsr": clearsr}
    controlled = apply(loaded, wide, **SMALL, tiles_per_batch=2, **settings)
    hooks = rig.module("nodes.control_hooks")
    with rig.count_calls(clearsr.control.model, "forward") as calls:
        reused = sample(controlled, wide, cfg=2.0, steps=3)
    assert len(calls) == 3  # six tiles, two at a time
    if not settings:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(hooks, "_same", lambda *_: False)
            with rig.count_calls(clearsr.control.model, "forward") as calls:
                assert torch.equal(sample(controlled, wide, cfg=2.0, steps=3), reused)
        assert len(calls) == 9


def test_unneeded_control_is_not_kept(tiny, wide, monkeypatch) -> None:
    """A control that depends on the step is held for one batch of tiles only."""
    hooks, held = rig.module("nodes.control_hooks"), []
    inner = hooks._cache

    def watched(run, *more):
        cache = inner(run, *more)
        held.append(len(run.cache))
        return cache

    monkeypatch.setattr(hooks, "_cache", watched)
    sample(apply(tiny, wide, **SMALL), wide)
    assert len(held) == 12 and set(held) == {1}


# ---- other things in the conditioning -------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "cfg"), [(1, 1.0), (3, 2.5)])
def test_chained_controlnets_see_their_part_of_the_picture(tiny, wide, stock_controlnet, batch, cfg) -> None:
    noise, cut = noise_like(wide), tiles.layout(32, 24, SIDE, OVERLAP)
    hints = [rig.images(count, 256, 192, seed).movedim(-1, 1) for count, seed in ((1, 11), (2, 12))]

    def chain(pictures):
        return with_controls(*(stock_controlnet.copy().set_cond_hint(hint, 0.7) for hint in pictures))

    def of_tile(tile):
        inside = tiles.Tile(*(8 * side for side in (tile.top, tile.left, tile.height, tile.width)))
        return chain([inside.of(hint) for hint in hints])

    controlled = apply(tiny, wide, **SMALL, tiles_per_batch=batch)
    result = predict(controlled, noise, cfg, positive=chain(hints))
    torch.testing.assert_close(result, by_hand(tiny, wide, noise, cut, of_tile, cfg=cfg), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(result, predict(controlled, noise, cfg), rtol=1e-2)


def test_controlnets_are_cut_once_and_stay_as_they_were(tiny, wide, stock_controlnet) -> None:
    one = stock_controlnet.copy().set_cond_hint(rig.images(1, 100, 90).movedim(-1, 1))
    before = one.cond_hint_original
    with rig.count_calls(comfy.utils, "common_upscale") as calls:
        predict(apply(tiny, wide, **SMALL), noise_like(wide), positive=with_controls(one))
    # The whole picture once by us; each tile once by the host, where it has its size already.
    assert len(calls) == 1 + 6
    assert one.cond_hint_original is before and one.cond_hint is None


class Foreign(comfy.controlnet.ControlBase):
    """A ControlNet as other packs define them."""

    def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
        return None

    def get_models(self):
        return []

    def copy(self):
        return self


def test_a_controlnet_that_cannot_be_cut(tiny, wide, caplog, monkeypatch) -> None:
    """Asked for tiles: an error that says what to do. Chosen automatically: one piece, and a notice."""
    foreign = Foreign().set_cond_hint(torch.zeros(1, 3, 64, 64))
    with pytest.raises(
        ValueError, match=r"tile_size is 128, but there is a ControlNet of the kind Foreign.*256 or more"
    ):
        predict(apply(tiny, wide, **SMALL), noise_like(wide), positive=with_controls(foreign))
    whole = predict(apply(tiny, wide), noise_like(wide), positive=with_controls(foreign))
    monkeypatch.setattr(tiled, "AUTOMATIC_AREA", 1)
    assert torch.equal(predict(apply(tiny, wide), noise_like(wide), positive=with_controls(foreign)), whole)
    assert "sampled in one piece, because there is a ControlNet of the kind Foreign" in caplog.text


def test_gligen_boxes_are_refused(tiny, wide) -> None:
    assert "GLIGEN" in tile_conds.obstacle({"positive": [{"gligen": ()}]})
    assert tile_conds.obstacle({"positive": [{}], "negative": []}) is None


def test_areas_and_masks_are_cut(tiny, wide) -> None:
    """An area that is exactly one tile wide, and a mask, act where they act in one piece."""
    value = torch.arange(2 * 32 * 24, dtype=torch.float32).reshape(2, 1, 32, 24)
    conds = [
        {"model_conds": {"x": comfy.conds.CONDNoiseShape(value)}, "area": (16, 9, 4, 10), "uuid": 1},
        {"model_conds": {"x": comfy.conds.CONDNoiseShape(value)}, "mask": value[:, 0], "uuid": 2},
        {"model_conds": {}, "area": (4, 4, 0, 20), "uuid": 3},
    ]
    tile = tiles.Tile(8, 8, 16, 16)
    cut = tile_conds.cut_conditioning(conds, (32, 24), 2, [tile], tile_conds.ControlCuts())
    assert [piece["uuid"] for piece in cut] == [1, 2]  # the third lies outside
    assert cut[0]["area"] == (12, 9, 0, 2)
    seen = cut[0]["model_conds"]["x"].process_cond(batch_size=2, area=list(cut[0]["area"])).cond
    assert torch.equal(seen, value[:, :, 8:20, 10:19])
    assert torch.equal(cut[1]["mask"], value[:, 0, 8:24, 8:24])
    assert conds[0]["area"] == (16, 9, 4, 10) and "area" not in conds[1]


def test_areas_in_a_run(tiny, wide) -> None:
    """With areas every tile is a call of its own, and predictions outside of all areas stay zero, as in one piece."""
    left = [POSITIVE[0][0], {"area": (32, 8, 0, 0), "strength": 1.0, "set_area_to_bounds": False}]
    with rig.count_calls(tiny["clearsr"].control.model, "forward") as calls:
        result = predict(apply(tiny, wide, **SMALL, tiles_per_batch=6), noise_like(wide), positive=[left])
    assert {tuple(args[0].shape) for args, _ in calls} == {(2, 4, 16, 8)}
    assert bool((result[..., 8:] == 0).all()) and bool((result[..., :8] != 0).any())
    # A mask of ones is nothing.
    masked = [POSITIVE[0][0], {"mask": torch.ones(1, 32, 24), "mask_strength": 1.0, "set_area_to_bounds": False}]
    model = apply(tiny, wide, **SMALL, tiles_per_batch=6)
    torch.testing.assert_close(
        predict(model, noise_like(wide), positive=[masked]), predict(model, noise_like(wide)), rtol=1e-4, atol=1e-4
    )


# ---- what goes wrong ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["control", "UNet"])
def test_interrupt_in_the_middle_of_a_tile_and_the_next_run(tiny, wide, monkeypatch, stage) -> None:
    """Stopped in the third tile, before its UNet comes to an end; nothing is left behind, the next run is as before."""
    model = apply(tiny, wide, **SMALL)
    expected = sample(model, wide)
    unet = tiny["model"].model.diffusion_model
    network = tiny["clearsr"].control.model if stage == "control" else unet.middle_block[0]
    inner, calls = network.forward, []

    def forward(*more, **options):
        calls.append(1)
        if len(calls) == 3:
            comfy.model_management.interrupt_current_processing(True)
        return inner(*more, **options)

    with monkeypatch.context() as patch, rig.count_calls(unet.out, "forward") as finished:
        patch.setattr(network, "forward", forward)
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            sample(model, wide)
    assert len(calls) == 3 and len(finished) == 2
    assert "context_handler" not in model.model_options
    assert not any(str(key).startswith("clearsr") for key in model.model_options["transformer_options"])
    assert torch.equal(sample(model, wide), expected)


def test_a_second_context_handler(tiny, wide) -> None:
    """Asked for tiles: an error. Automatic: the other one is in charge."""

    class Handler(comfy.context_windows.ContextHandlerABC):
        called = 0

        def __deepcopy__(self, memo):
            return self

        def should_use_context(self, model, conds, x_in, timestep, model_options):
            Handler.called += 1
            return False

        def get_resized_cond(self, cond_in, x_in, window, device=None):
            raise NotImplementedError

        def execute(self, calc_cond_batch, model, conds, x_in, timestep, model_options):
            raise NotImplementedError

    for before in (True, False):
        model = tiny["model"].clone()
        if before:
            model.model_options["context_handler"] = Handler()
        asked, automatic = (apply(tiny, wide, model=model, **settings) for settings in (SMALL, {}))
        if not before:
            for one in (asked, automatic):
                one.model_options["context_handler"] = Handler()
        with pytest.raises(ValueError, match=r"another node has put a context handler.*\(Handler\).*tile_size to 0"):
            sample(asked, wide)
        sample(automatic, wide)
    assert Handler.called


def test_nothing_stays_on_the_model(tiny, wide) -> None:
    model = apply(tiny, wide, **SMALL)
    sample(model, wide)
    assert "context_handler" not in model.model_options
    assert not any(str(key).startswith("clearsr") for key in model.model_options["transformer_options"])


def test_widgets_are_brought_to_the_grid(tiny, wide, caplog) -> None:
    model = apply(tiny, wide, tile_size=150, tile_overlap=40)
    assert "tile_size is 150, but tiles lie on a grid of 64 pixels, so 128 is used" in caplog.text
    assert "tile_overlap is 40, but tiles lie on a grid of 64 pixels, so 64 is used" in caplog.text
    assert torch.equal(sample(model, wide), sample(apply(tiny, wide, **SMALL), wide))
    apply(tiny, wide, tile_size=64, tile_overlap=64)
    assert "tile_size is 64, but a tile has at least 128 pixels, so 128 is used" in caplog.text
    apply(tiny, wide, tile_size=128, tile_overlap=100)
    assert "tile_overlap is 100, but tiles lie on a grid of 64 pixels, so 64 is used" in caplog.text
    for size, overlap in ((128, 128), (512, 1024), (0, 768)):
        with pytest.raises(ValueError, match=rf"tile_overlap is {overlap}, but a tile has only {size or 768} pixels"):
            apply(tiny, wide, tile_size=size, tile_overlap=overlap)


def test_memory_is_asked_for_one_batch_of_tiles(tiny, wide) -> None:
    for settings, rows, sides in (
        ({}, 3, (32, 24)),
        (SMALL, 3, (16, 16)),
        ({**SMALL, "tiles_per_batch": 4}, 12, (16, 16)),
        ({**SMALL, "tiles_per_batch": 64}, 18, (16, 16)),
    ):
        model = apply(tiny, wide, **settings)
        with rig.count_calls(model.model, "memory_required") as calls:
            sample(model, wide, steps=1)
        assert list(calls[0][0][0]) == [2 * rows, 4, *sides]


def test_memory_is_asked_for_the_whole_where_it_cannot_be_cut(tiny, wide, monkeypatch) -> None:
    monkeypatch.setattr(tiled, "AUTOMATIC_AREA", 1)
    monkeypatch.setattr(tiled, "AUTOMATIC_SIDE", SIDE)
    foreign = Foreign().set_cond_hint(torch.zeros(1, 3, 64, 64))
    for positive, sides in ((POSITIVE, (16, 16)), (with_controls(foreign), (32, 24))):
        model = apply(tiny, wide, tile_overlap=64)
        with rig.count_calls(model.model, "memory_required") as calls:
            predict(model, noise_like(wide), positive=positive)
        assert list(calls[0][0][0]) == [2 * 3, 4, *sides]


# ---- what is seen ---------------------------------------------------------------------------------------------------


def test_seams_cannot_be_seen() -> None:
    """Nano, many tiles: no more gradient across borders than at the same places of the picture in one piece."""
    model, vae, clearsr = rig.run("ClearSRLoader", checkpoint="clearsr-nano.safetensors")
    latent, _ = rig.run("ClearSRLREncode", clearsr=clearsr, image=textured(2, 64, 48), scale=4.0)
    cut = tiles.layout(32, 24, SIDE, OVERLAP)
    scores = []
    for settings in ({}, SMALL):
        controlled = apply({"model": model, "clearsr": clearsr}, latent, **settings)
        result = rig.run("ClearSRLSAKSampler", model=controlled, lr_latent=latent, seed=3, steps=5, denoise=0.5)
        picture = rig.run("VAEDecode", samples=result, vae=vae)
        assert picture.isfinite().all() and float(picture.std()) > 0.05
        scores.append(seam_score(picture, cut))
    assert scores[1] / scores[0] < 1.05, scores


def test_a_seam_is_found() -> None:
    """The measure itself: a step of one percent between tiles is far above the limit."""
    cut = tiles.layout(32, 24, SIDE, OVERLAP)
    picture = textured(2, 256, 192)
    stepped = picture.clone()
    for start, _ in sorted({(tile.left, tile.width) for tile in cut.tiles})[1:]:
        stepped[:, :, 8 * start :] += 0.01
    assert seam_score(stepped, cut) / seam_score(picture, cut) > 1.05


def test_automatic_tiles_are_for_large_pictures() -> None:
    settings = tiled.TilingSettings()
    assert [settings.first_side(size) for size in ((128, 128), (64, 256), (136, 128), (96, 375))] == [0, 0, 96, 96]
