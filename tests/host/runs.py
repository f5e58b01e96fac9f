"""Runs of the tiny model that several files of tests share: in one piece, in tiles, and each tile by hand.

Imported by conftest.py under the name `clearsr_runs`.
"""

from __future__ import annotations

import itertools

import clearsr_rig as rig
import comfy.sample
import comfy.samplers
import torch

tiles = rig.module("clearsr_core.tiles")

SIDE, OVERLAP = 16, 8  # latent pixels: 128 and 64 in the picture
SMALL = {"tile_size": 128, "tile_overlap": 64}


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


def by_hand(loaded, latent, noise, cut, make_positive=lambda _tile: POSITIVE, patched=lambda model: model, **settings):
    """Each tile sampled as a picture of its own, by the controlled MODEL with `patched` upon it; then blended."""
    result = torch.zeros_like(noise)
    for tile, share in zip(cut.tiles, cut.shares, strict=True):
        entry = {"samples": tile.of(latent["samples"]).clone(), "clearsr": latent["clearsr"]}
        model = patched(apply(loaded, entry, tile_size=1024))
        alone = predict(model, tile.of(noise).clone(), positive=make_positive(tile), **settings)
        tiles.add(result, tile, share, alone)
    return result


def with_controls(*controls):
    """POSITIVE with a chain of ControlNets."""
    for before, one in itertools.pairwise(controls):
        one.set_previous_controlnet(before)
    return [[POSITIVE[0][0], {"control": controls[-1], "control_apply_to_uncond": True}]]


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
