"""Tiled diffusion on a real host: one tile is the plain run, many are the blend of what each tile alone would be."""

from __future__ import annotations

import itertools
import logging

import clearsr_rig as rig
import comfy.cldm.cldm
import comfy.conds
import comfy.context_windows
import comfy.controlnet
import comfy.model_management
import comfy.ops
import comfy.sample
import comfy.samplers
import pytest
import torch

tiles = rig.module("clearsr_core.tiles")
tiled = rig.module("nodes.tiled_diffusion")
tile_conds = rig.module("nodes.tile_conds")

SIDE, OVERLAP = 16, 8  # latent pixels: 128 and 64 in the picture
SMALL = {"tile_size": 128, "tile_overlap": 64}


@pytest.fixture(scope="module")
def wide(tiny):
    """x_lr of two pictures, 32 x 24 latent: 3 x 2 tiles."""
    latent, _ = rig.run("ClearSRLREncode", clearsr=tiny["clearsr"], image=rig.images(2, 60, 45), scale=4.0)
    assert latent["samples"].shape == (2, 4, 32, 24)
    return latent


def apply(loaded, latent, model=None, **settings):
    model = model or loaded["model"]
    return rig.run("ClearSRControlApply", model=model, clearsr=loaded["clearsr"], lr_latent=latent, **settings)


def conditioning(seed, tokens=3):
    return [[torch.randn(1, tokens, 16, generator=torch.Generator().manual_seed(seed)), {}]]


POSITIVE, NEGATIVE = conditioning(1), conditioning(2)


def predict(model, noise, cfg=1.0, positive=POSITIVE, negative=NEGATIVE, sigma=3.0):
    """The model's estimate x0 of one noisy latent: one step of euler to sigma 0."""
    return comfy.sample.sample_custom(
        model,
        noise,
        cfg,
        comfy.samplers.sampler_object("euler"),
        torch.tensor([sigma, 0.0]),
        positive,
        negative,
        torch.zeros_like(noise),
        disable_pbar=True,
        seed=0,
    )


def noise_like(latent, seed=4):
    return torch.randn(latent["samples"].shape, generator=torch.Generator().manual_seed(seed))


def sample(model, latent, cfg=1.0, steps=2):
    """LSA KSampler with both phases active, going on from nothing that an earlier run left behind."""
    rig.module("nodes.late_state")._last.clear()
    return rig.run(
        "ClearSRLSAKSampler",
        model=model,
        lr_latent=latent,
        seed=3,
        steps=steps,
        cfg=cfg,
        ela_end=0.5,
        lla_start=0.5,
        positive=POSITIVE,
        negative=NEGATIVE,
    )["samples"]


def by_hand(loaded, latent, noise, cut, make_positive=lambda _tile: POSITIVE, **settings):
    """Each tile sampled as a picture of its own, then blended."""
    result = torch.zeros_like(noise)
    for tile, share in zip(cut.tiles, cut.shares, strict=True):
        entry = {"samples": tile.of(latent["samples"]).clone(), "clearsr": latent["clearsr"]}
        model = apply(loaded, entry, tile_size=1024)
        alone = predict(model, tile.of(noise).clone(), positive=make_positive(tile), **settings)
        tiles.add(result, tile, share, alone)
    return result


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


@pytest.fixture(scope="module")
def stock_controlnet(tiny):
    """A ControlNet of the host's own class, random, of the tiny UNet's layout."""
    config = dict(tiny["model"].model.model_config.unet_config)
    config.pop("out_channels")
    network = comfy.cldm.cldm.ControlNet(**config, hint_channels=3, operations=comfy.ops.manual_cast, device="cpu")
    rig.module("nodes.self_contained").set_norm_groups(network, 8)
    shapes = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    network.load_state_dict(rig.draw(shapes, torch.Generator().manual_seed(9)))
    network.requires_grad_(False)
    network.dtype = torch.float32
    device = comfy.model_management.get_torch_device()
    return comfy.controlnet.ControlNet(network, load_device=device, manual_cast_dtype=torch.float32)


def with_controls(*controls):
    """POSITIVE with a chain of ControlNets."""
    for before, one in itertools.pairwise(controls):
        one.set_previous_controlnet(before)
    return [[POSITIVE[0][0], {"control": controls[-1], "control_apply_to_uncond": True}]]


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


def test_out_of_memory_is_told_from_other_errors() -> None:
    known = rig.module("nodes.compat").out_of_memory
    assert known(comfy.model_management.OOM_EXCEPTION("CUDA out of memory")) and known(MemoryError())
    for text in ("MPS backend out of memory", "DefaultCPUAllocator: can't allocate memory: you tried to"):
        assert known(RuntimeError(text))
    interrupted = comfy.model_management.InterruptProcessingException()
    assert not any(map(known, (RuntimeError("sizes differ"), ValueError("out of memory"), interrupted)))


def test_out_of_memory_goes_on_with_less(tiny, wide, caplog, monkeypatch) -> None:
    """Fewer tiles at a time, then smaller tiles; the result is what those settings give, and the next run is new."""
    model = apply(tiny, wide, tile_size=192, tile_overlap=64, tiles_per_batch=4)
    expected = sample(apply(tiny, wide, **SMALL, tiles_per_batch=1), wide, cfg=2.0)
    monkeypatch.setattr(tiled, "_SMALLER_SIDES", (24, SIDE))
    network = tiny["clearsr"].control.model
    inner, shapes = network.forward, []

    def forward(x_lr, *more, **options):
        shapes.append(tuple(x_lr.shape))
        if x_lr.shape[-1] > SIDE:
            raise comfy.model_management.OOM_EXCEPTION("out of memory")
        return inner(x_lr, *more, **options)

    for _ in range(2):
        shapes.clear(), caplog.clear()
        monkeypatch.setattr(network, "forward", forward)
        assert torch.equal(sample(model, wide, cfg=2.0), expected)
        monkeypatch.setattr(network, "forward", inner)
        assert [shape for shape in shapes if shape[-1] > SIDE] == [(4, 4, 24, 24), (2, 4, 24, 24)]
        said = [record.message for record in caplog.records if "out of memory" in record.message]
        assert len(said) == 2 and "tiles at a time (1)" in said[0] and "128 x 128 pixels" in said[1]


def test_out_of_memory_in_one_piece_goes_on_in_tiles(tiny, wide, monkeypatch) -> None:
    expected = sample(apply(tiny, wide, **SMALL), wide)
    monkeypatch.setattr(tiled, "_SMALLER_SIDES", (SIDE,))
    network = tiny["clearsr"].control.model
    inner = network.forward

    def forward(x_lr, *more, **options):
        if x_lr.shape[-1] > SIDE:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
        return inner(x_lr, *more, **options)

    monkeypatch.setattr(network, "forward", forward)
    assert torch.equal(sample(apply(tiny, wide, tile_overlap=64), wide), expected)


def test_out_of_memory_with_nothing_smaller_and_other_errors(tiny, wide, monkeypatch) -> None:
    network = tiny["clearsr"].control.model
    for error in (comfy.model_management.OOM_EXCEPTION("out of memory"), RuntimeError("something else")):

        def forward(*_more, error=error, **_options):
            raise error

        monkeypatch.setattr(network, "forward", forward)
        with pytest.raises(type(error), match=str(error)):
            sample(apply(tiny, wide, **SMALL), wide)


def test_interrupt_between_tiles_and_the_next_run(tiny, wide, monkeypatch) -> None:
    model = apply(tiny, wide, **SMALL)
    expected = sample(model, wide)
    network = tiny["clearsr"].control.model
    inner, calls = network.forward, []

    def forward(*more, **options):
        calls.append(1)
        if len(calls) == 3:
            comfy.model_management.interrupt_current_processing(True)
        return inner(*more, **options)

    monkeypatch.setattr(network, "forward", forward)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sample(model, wide)
    assert len(calls) == 3
    monkeypatch.setattr(network, "forward", inner)
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
    for size, overlap in ((128, 128), (512, 1024), (0, 768)):
        with pytest.raises(ValueError, match=rf"tile_overlap is {overlap}, but a tile has only {size or 768} pixels"):
            apply(tiny, wide, tile_size=size, tile_overlap=overlap)


def test_the_run_is_announced(tiny, wide, caplog) -> None:
    caplog.set_level(logging.INFO)
    sample(apply(tiny, wide, **SMALL, tiles_per_batch=4), wide, steps=5)
    assert "192 x 256 pixels in 2 x 3 tiles of 128 x 128, 4 at a time: 2 model calls in each of 5 steps" in caplog.text
    caplog.clear()
    sample(apply(tiny, wide), wide)
    assert "tiles" not in caplog.text


def test_progress_moves_with_the_tiles(tiny, wide, monkeypatch) -> None:
    """One bar for the run, in sixths of a step; it never moves back, and only the sampler's own steps fill it."""
    monkeypatch.setattr(comfy.utils, "PROGRESS_THROTTLE_MIN_INTERVAL", 0.0, raising=False)
    monkeypatch.setattr(comfy.utils, "PROGRESS_THROTTLE_MIN_PERCENT", 0.0, raising=False)
    rig.progress.clear()
    sample(apply(tiny, wide, **SMALL), wide, steps=2)
    shares = [value / total for value, total, _ in rig.progress]
    assert shares == sorted(shares) and shares[-1] == 1.0
    assert set(range(1, 13)) <= {round(share * 12) for share in shares}
    assert {(1, 2), (2, 2)} <= {(value, total) for value, total, _ in rig.progress}


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


# ---- what is seen ---------------------------------------------------------------------------------------------------


def textured(count, height, width):
    """Pictures with the 1/f spectrum of photographs: random grids of every size, coarse ones strongest."""
    generator = torch.Generator().manual_seed(8)
    picture = torch.full((count, 3, height, width), 0.5)
    for octave in range(1, 7):
        grid = torch.rand(count, 3, 2**octave, 2**octave, generator=generator) - 0.5
        picture += torch.nn.functional.interpolate(grid, (height, width), mode="bicubic") * 0.5**octave * 1.5
    return picture.clamp(0, 1).movedim(1, -1)


def seam_score(picture, cut):
    """Mean gradient across the borders of tiles and the middles of their overlaps, over the mean gradient elsewhere."""
    luma, at_borders, elsewhere = picture.mean(dim=-1), [], []
    for dim, pieces in (
        (1, sorted({(tile.top, tile.height) for tile in cut.tiles})),
        (2, sorted({(tile.left, tile.width) for tile in cut.tiles})),
    ):
        borders = set()
        for (start, size), (following, _) in itertools.pairwise(pieces):
            borders |= {8 * following, 4 * (start + size + following), 8 * (start + size)}
        lines = luma.diff(dim=dim).abs().movedim(dim, 0).flatten(1).mean(dim=1)  # of line i: between i and i + 1
        crossing = torch.tensor([line + 1 in borders for line in range(len(lines))])
        at_borders.append(lines[crossing])
        elsewhere.append(lines[~crossing])
    return float(torch.cat(at_borders).mean() / torch.cat(elsewhere).mean())


def test_seams_cannot_be_seen() -> None:
    """Nano, many tiles: no more gradient across borders than at the same places of the picture in one piece."""
    model, vae, clearsr = rig.run("ClearSRLoader", checkpoint="clearsr-nano-v0.safetensors")
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
