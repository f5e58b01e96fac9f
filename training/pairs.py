"""Low-quality partners of a batch of crops, made one after the other on the CPU or together on the crops' device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from .degradation import (
    PAPER,
    Degradation,
    after_second_jpeg,
    degrade,
    draw,
    final_size,
    until_first_jpeg,
    until_second_jpeg,
)
from .jpeg import round_trip
from .randomness import generator_for

DegradeOn = Literal["cpu", "device"]


@torch.no_grad()
def degrade_pairs(
    hq: Tensor,
    numbers: Sequence[int] | Tensor,
    seed: int,
    settings: Degradation = PAPER,
    scale: int = 4,
    degrade_on: DegradeOn = "cpu",
) -> Tensor:
    """Return the low-quality partners of a batch of crops; each follows from its crop, `seed` and its number alone.

    Neither the other members of the batch nor their order, nor threads or processes matter. Recipe and noise come from
    `generator_for(seed, number)` on both paths. On the CPU the paths agree bit for bit. On another device filtering and
    resizing round differently in the last bits of a float, which the rounding to 8 bits mostly swallows.

    Args:
        hq: (B, 3, H, W) float32 in [0, 1] on any device, H and W at least `scale`; never written to.
        numbers: B sample numbers; a tensor of them lies on the CPU.
        seed: with a number it decides recipe and noise; one that no other draw uses (training adds 4 to the run's).
        settings: ranges of the degradation, or several of which each picture draws one.
        scale: how many times smaller the partners are.
        degrade_on: "cpu" takes the pictures one after the other through files of Pillow, in as many threads as call
            it; "device" works where `hq` lies, without waiting for it.

    Returns:
        (B, 3, H // scale, W // scale) float32 in [0, 1], multiples of 1 / 255, on the device of `hq`.
    """
    if hq.ndim != 4 or hq.shape[1] != 3 or min(hq.shape[-2:]) < scale or len(numbers) != len(hq) or not len(hq):
        raise ValueError(
            f"hq is {tuple(hq.shape)} with {len(numbers)} numbers; expected (B, 3, H, W) with B numbers, "
            f"H and W at least scale = {scale}"
        )
    generators = [generator_for(seed, int(number)) for number in numbers]
    if degrade_on == "cpu":
        on_cpu = zip(hq.cpu(), generators, strict=True)
        return torch.stack([degrade(image, generator, settings, scale) for image, generator in on_cpu]).to(hq.device)
    return _degrade_together(hq, generators, settings, scale)


def _degrade_together(hq: Tensor, generators: list[torch.Generator], settings: Degradation, scale: int) -> Tensor:
    """Degrade on the device of `hq`.

    Filters, resizing and noise take one picture after the other, at the picture's own size: what rounds, rounds as if
    the picture were alone. The files, most of the work, take all pictures together, which exact integers allow.
    """
    final = final_size(hq, scale)
    recipes = [draw(generator, settings) for generator in generators]
    drawn = list(zip(recipes, generators, strict=True))

    images = [until_first_jpeg(image, *each) for image, each in zip(hq, drawn, strict=True)]
    images = round_trip(images, [recipe.first.jpeg_quality for recipe in recipes])
    images = [
        until_second_jpeg(image, recipe, final, generator)
        for image, (recipe, generator) in zip(images, drawn, strict=True)
    ]
    images = round_trip(images, [recipe.second.jpeg_quality for recipe in recipes])
    return torch.stack([after_second_jpeg(image, recipe, final) for image, recipe in zip(images, recipes, strict=True)])
