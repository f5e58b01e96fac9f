"""Conditionings made for a whole picture, cut to tiles: tensors, masks, areas, pictures of other ControlNets."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field

import comfy.controlnet
import comfy.utils
import torch
from torch import Tensor

from ..clearsr_core.tiles import Tile
from .compat import HostObject

Size = tuple[int, int]  # (height, width) in latent pixels


def obstacle(conds: dict[str, list[dict]]) -> str | None:
    """Return what in the conditionings of a run cannot be cut to tiles, as the middle of a sentence, or None."""
    for cond in (cond for kind in conds.values() for cond in kind):
        if "gligen" in cond:
            return "GLIGEN boxes in the conditioning, which are places in the whole picture"
        control = cond.get("control")
        while control is not None:
            if not _can_be_cut(control):
                return f"a ControlNet of the kind {type(control).__name__}, whose picture cannot be cut"
            control = control.previous_controlnet
    return None


def _can_be_cut(control: HostObject) -> bool:
    # Classes of other packs keep masks and keyframes beside the picture, which would stay those of the whole.
    picture = control.cond_hint_original
    own = type(control).__module__ == comfy.controlnet.ControlBase.__module__
    return own and isinstance(picture, Tensor) and picture.ndim >= 4


def has_areas(conds: Sequence[list[dict] | None]) -> bool:
    """Tell whether a conditioning acts on a part only, so that tiles differ in what they are made of."""
    return any("area" in cond for kind in conds for cond in kind or ())


@dataclass
class ControlCuts:
    """ControlNets cut to tiles in one run: made once for each place, and the same object for every conditioning.

    The host runs conditionings in one batch only if their ControlNet is one object.
    """

    pictures: dict[tuple, Tensor] = field(default_factory=dict)
    copies: dict[tuple, HostObject] = field(default_factory=dict)

    def cut(self, control: HostObject, extent: Size, boxes: tuple[Tile, ...], batch: int) -> HostObject:
        """Return `control`, and all that it is chained to, for the places `boxes` of a latent of size `extent`."""
        key = (control, extent, boxes, batch)
        if key not in self.copies:
            self.copies[key] = self._copy(control, extent, boxes, batch)
        return self.copies[key]

    def _copy(self, control: HostObject, extent: Size, boxes: tuple[Tile, ...], batch: int) -> HostObject:
        # Shallow: networks, and what the host set up when the run began, are shared; its own copy() drops the latter.
        copied = copy.copy(control)
        copied.cond_hint = None
        ratio = control.compression_ratio
        if control.vae is not None:
            ratio *= control.vae.spacial_compression_encode()
        scaled = [Tile(*(ratio * side for side in (box.top, box.left, box.height, box.width))) for box in boxes]

        def cut(name: str, picture: Tensor) -> Tensor:
            key = (control, name, extent)
            if key not in self.pictures:
                self.pictures[key] = comfy.utils.common_upscale(
                    picture, extent[1] * ratio, extent[0] * ratio, control.upscale_algorithm, "center"
                )
            return stacked([box.of(self.pictures[key]) for box in scaled], batch)

        copied.cond_hint_original = cut("picture", control.cond_hint_original)
        copied.extra_concat_orig = [
            cut(f"concatenated {number}", picture) for number, picture in enumerate(control.extra_concat_orig)
        ]
        if control.previous_controlnet is not None:
            copied.previous_controlnet = self.cut(control.previous_controlnet, extent, boxes, batch)
        clones = getattr(control, "multigpu_clones", None)  # one for each further device, newer hosts only
        if clones:
            copied.multigpu_clones = {device: self.cut(clone, extent, boxes, batch) for device, clone in clones.items()}
        return copied


def cut_conditioning(
    conds: list[dict] | None, size: Size, batch: int, tiles: Sequence[Tile], controls: ControlCuts
) -> list[dict] | None:
    """Cut one kind of conditioning (positive or negative) to tiles that are stacked along the batch, tile by tile.

    Args:
        conds: as the host's samplers hold them while a run goes on; never changed. None stays None.
        size: of the latent that they were made for.
        batch: pictures in that latent.
        tiles: of one size; only one if a conditioning has an area.
        controls: of this run.

    Returns:
        Conditionings for a latent of len(tiles) * batch rows. Those whose area misses the tile are left out.
    """
    if conds is None:
        return None
    pieces = []
    for cond in conds:
        piece, extent, boxes = dict(cond), size, tuple(tiles)
        if "area" in cond:
            height, width, top, left = cond["area"]
            extent = (min(height, size[0] - top), min(width, size[1] - left))
            shared = _shared_part(Tile(top, left, *extent), tiles[0])
            if shared is None:
                continue
            piece["area"] = (shared.height, shared.width, shared.top - tiles[0].top, shared.left - tiles[0].left)
            boxes = (Tile(shared.top - top, shared.left - left, shared.height, shared.width),)
        piece["model_conds"] = {
            name: _cut_value(value, size, batch, tiles) for name, value in cond["model_conds"].items()
        }
        if "mask" in cond:
            piece["mask"] = stacked([tile.of(cond["mask"][:batch]) for tile in tiles], batch)
        if cond.get("control") is not None:
            piece["control"] = controls.cut(cond["control"], extent, boxes, batch)
        pieces.append(piece)
    return pieces


def _shared_part(one: Tile, other: Tile) -> Tile | None:
    top, left = max(one.top, other.top), max(one.left, other.left)
    bottom = min(one.top + one.height, other.top + other.height)
    right = min(one.left + one.width, other.left + other.width)
    return Tile(top, left, bottom - top, right - left) if bottom > top and right > left else None


def _cut_value(value: HostObject, size: Size, batch: int, tiles: Sequence[Tile]) -> HostObject:
    """Cut one of the host's COND objects: tensors of the latent's size to the tiles, others repeated for each."""
    tensor = getattr(value, "cond", None)
    if not isinstance(tensor, Tensor) or tensor.ndim == 0:
        return value
    if tensor.ndim >= 4 and tuple(tensor.shape[-2:]) == size:
        return value._copy_with(stacked([tile.of(tensor) for tile in tiles], batch))
    if tensor.shape[0] == 1:
        return value  # the host repeats it
    return value._copy_with(stacked([tensor] * len(tiles), batch))


def stacked(parts: list[Tensor], batch: int) -> Tensor:
    """Put the parts of several tiles one after another along the batch, each with `batch` rows; one alone stays."""
    if len(parts) == 1:
        return parts[0]
    return torch.cat([comfy.utils.repeat_to_batch_size(part, batch) for part in parts])
