"""Sampling a picture in overlapping tiles (decision 0021): the host's context handler, and what a run knows about it.

At every model call the latent is cut, the host computes the predictions of each tile, and their blend goes back to the
host, which applies guidance to it. So the sampler, LSA, masks, previews and post-CFG patches see the whole picture.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import comfy.context_windows
import comfy.model_management
import torch
from torch import Tensor

from ..clearsr_core import tiles
from ..clearsr_core.tiles import GRID, Layout, Tile
from .compat import HostObject, out_of_memory
from .tile_conds import ControlCuts, Size, cut_conditioning, has_areas, obstacle
from .tile_progress import RunProgress

NODE = "DPM/SPM Control Apply"
PLAN, TILE = "clearsr_tiles", "clearsr_tile"  # in transformer_options: of a run, of one model call
HANDLER = "context_handler"  # the host's slot in model_options; there is one
PIXELS = 8  # per latent pixel
CONTROL_SHARE = 1.5  # memory of a model call with DPM and SPM over one without

AUTOMATIC_SIDE = 96  # latent pixels
AUTOMATIC_AREA = 128 * 128  # up to here one piece costs less than tiles do (decision 0021)
_SMALLER_SIDES = (96, 64, 48, 32)  # tried in this order when memory runs out


@dataclass(frozen=True)
class TilingSettings:
    """The node's widgets, in latent pixels."""

    side: int = 0  # 0 = by the size of the picture
    overlap: int = 8
    batch: int = 1  # tiles in one model call
    say: Callable[[str, int], None] = field(default=lambda _text, _level: None)  # to the user, at a level of logging

    def first_side(self, size: Size) -> int:
        """Return the side of the tiles for a latent of `size`, or 0 = in one piece."""
        if self.side:
            return self.side if max(size) > self.side else 0
        return AUTOMATIC_SIDE if size[0] * size[1] > AUTOMATIC_AREA else 0

    def call_shape(self, shape: Sequence[int]) -> list[int]:
        """Return the shape of the latent in one model call, for a whole latent of `shape` (B, C, H, W)."""
        side = self.first_side((shape[-2], shape[-1])) if len(shape) == 4 else 0
        if not side:
            return list(shape)
        counts = [len(tiles.spans(length, side, self.overlap)) for length in shape[2:]]
        return [shape[0] * min(self.batch, math.prod(counts)), shape[1], *(min(length, side) for length in shape[2:])]


@dataclass
class TilePlan:
    """How one run is cut; made when it starts, made smaller when memory runs out, gone when it ends."""

    settings: TilingSettings
    side: int  # 0 = one piece
    overlap: int
    batch: int
    forget: Callable[[], None]  # what is remembered of the tiles before
    progress: RunProgress
    obstacle: str | None = None  # what forbids tiles
    controls: ControlCuts = field(default_factory=ControlCuts)
    cuts: dict[tuple, Layout] = field(default_factory=dict)

    def is_cut(self, size: Size) -> bool:
        """Tell whether a latent of `size` is cut."""
        return bool(self.side) and max(size) > self.side

    def layout(self, size: Size, device: torch.device) -> Layout | None:
        """Return the cut of a latent of `size` with its shares on `device`, or None where it is one piece."""
        if not self.is_cut(size):
            return None
        key = (size, self.side, device)
        if key not in self.cuts:
            cut = tiles.layout(*size, self.side, self.overlap)
            self.cuts[key] = dataclasses.replace(cut, shares=tuple(share.to(device) for share in cut.shares))
        return self.cuts[key]

    def shrink(self, size: Size) -> bool:
        """Take fewer tiles at a time, then smaller tiles; tell the user, or return False where nothing is left."""
        self.forget()
        self.progress.restart()
        self.controls, self.cuts = ControlCuts(), {}
        if self.side and self.batch > 1:
            self.batch //= 2
            self._say(f"fewer tiles at a time ({self.batch})")
            return True
        current = self.side or max(size)
        smaller = next((side for side in _SMALLER_SIDES if side < current), None)
        if smaller is None or self.obstacle is not None:
            return False
        self.side, self.overlap, self.batch = smaller, min(self.overlap, smaller // 2 // GRID * GRID), 1
        self._say(f"tiles of {smaller * PIXELS} x {smaller * PIXELS} pixels, one at a time")
        return True

    def exhausted(self, size: Size) -> str:
        """Say to the user that nothing smaller can be tried for a latent of `size`."""
        if self.obstacle is not None:
            return (
                f"{NODE}: out of memory, and the picture cannot be cut into tiles, because there is {self.obstacle}. "
                "Take it out, or make the picture smaller."
            )
        height, width = (min(length, self.side or length) * PIXELS for length in size)
        piece = f"a tile of {width} x {height}" if self.is_cut(size) else f"{width} x {height}"
        return (
            f"{NODE}: out of memory even for {piece} pixels, the least that one model call can be. Close other "
            "programs; with a graphics card, start ComfyUI with --lowvram or --novram."
        )

    def _say(self, change: str) -> None:
        self.settings.say(f"{NODE}: out of memory; this run goes on with {change}.", logging.WARNING)


def start_tiling(
    settings: TilingSettings,
    model_options: dict,
    guider: HostObject,
    start: Tensor,
    steps: int,
    forget: Callable[[], None],
) -> None:
    """Decide how a run is cut, say so, and put the handler into this run's own model_options.

    What was asked for and cannot be done raises ValueError. What was chosen automatically gives way.

    Args:
        settings: the node's.
        model_options: of this run; written to.
        guider: the host's, with the run's conditionings bound.
        start: x_lr, (B, C, H, W) in model units: the shape of the latent, and what previews show at first.
        steps: of the schedule.
        forget: called when the cut changes, so that nothing of the old one stays in memory.
    """
    if start.ndim != 4:
        return
    shape, size = start.shape, (start.shape[-2], start.shape[-1])
    side, hindrance = settings.first_side(size), obstacle(guider.conds)
    other = model_options.get(HANDLER)
    if other is not None:
        if settings.side and side:
            raise ValueError(
                f"{NODE}: tile_size is {settings.side * PIXELS}, but another node has put a context handler of its own "
                f"on this MODEL ({type(other).__name__}), and only one can cut the latent. Remove that node, or set "
                "tile_size to 0."
            )
        return
    if side and hindrance is not None:
        if settings.side:
            raise ValueError(
                f"{NODE}: tile_size is {settings.side * PIXELS}, but there is {hindrance}. Take it out, or set "
                f"tile_size to {max(size) * PIXELS} or more: then the picture is sampled in one piece."
            )
        settings.say(f"{NODE}: sampled in one piece, because there is {hindrance}.", logging.WARNING)
        side = 0
    at_once = settings.call_shape(shape)[0] // shape[0] if side else 1
    progress = RunProgress(NODE, settings.say, guider.inner_model.latent_format, start)
    plan = TilePlan(settings, side, settings.overlap, at_once, forget, progress, hindrance)
    model_options[HANDLER] = TileHandler()
    model_options["transformer_options"][PLAN] = plan
    _announce(plan, guider, shape, steps)


def _announce(plan: TilePlan, guider: HostObject, shape: Sequence[int], steps: int) -> None:
    """Tell before the first step what a run will be: tiles, model calls, memory."""
    height, width = shape[-2], shape[-1]
    rows, *sides = plan.settings.call_shape(shape) if plan.side else shape
    kinds = 1 if getattr(guider, "cfg", 1.0) == 1.0 else len(guider.conds)
    needed = guider.inner_model.memory_required([rows * kinds, *sides]) * CONTROL_SHARE
    how = f"in one piece, {steps} step{'' if steps == 1 else 's'}"
    if plan.side:
        cut = tiles.layout(height, width, plan.side, plan.overlap)
        calls = -(-len(cut.tiles) // plan.batch)
        how = (
            f"in {cut.columns} x {cut.rows} tiles of {sides[-1] * PIXELS} x {sides[-2] * PIXELS}, {plan.batch} at a "
            f"time: {calls} model calls in each of {steps} steps"
        )
    plan.settings.say(
        f"{NODE}: {width * PIXELS} x {height * PIXELS} pixels {how}. Memory beside the models, as ComfyUI estimates "
        f"it: {max(1.0, needed / 2**20):.0f} MiB.",
        logging.INFO,
    )


class TileHandler(comfy.context_windows.ContextHandlerABC):
    """Cuts and blends around the host's calculation; holds nothing, a run's plan travels in transformer_options."""

    def should_use_context(
        self, model: HostObject, conds: HostObject, x_in: Tensor, timestep: Tensor, model_options: dict
    ) -> bool:
        return x_in.ndim == 4 and _plan(model_options) is not None

    def get_resized_cond(
        self, cond_in: list[dict] | None, x_in: Tensor, window: HostObject, device: HostObject = None
    ) -> HostObject:
        """Cut one kind of conditioning to one tile (a `Tile`)."""
        return cut_conditioning(cond_in, (x_in.shape[-2], x_in.shape[-1]), x_in.shape[0], [window], ControlCuts())

    def execute(
        self,
        calc_cond_batch: Callable[..., list[Tensor]],
        model: HostObject,
        conds: list[list[dict] | None],
        x_in: Tensor,
        timestep: Tensor,
        model_options: dict,
    ) -> list[Tensor]:
        """Return one prediction (B, C, H, W) for each kind of conditioning.

        In one piece this is the host's own call. When memory runs out, the whole model call is repeated with less at a
        time, and so is the rest of the run.
        """
        plan = _plan(model_options)
        assert plan is not None
        size = (x_in.shape[-2], x_in.shape[-1])
        while True:
            if plan.progress.measures:
                plan.progress.model_call(*_position(timestep, model_options))
            try:
                cut = plan.layout(size, x_in.device)
                if cut is None:
                    return calc_cond_batch(model, conds, x_in, timestep, model_options)
                return _blended(plan, cut, calc_cond_batch, model, conds, x_in, timestep, model_options)
            except Exception as error:
                if not out_of_memory(error):
                    raise
                if not plan.shrink(size):
                    # The host's own kind of error: it then frees the memory of all models.
                    raise comfy.model_management.OOM_EXCEPTION(plan.exhausted(size)) from error
            # Outside of the handler above: the error holds every tensor of the failed call.
            comfy.model_management.soft_empty_cache()


def _plan(model_options: dict) -> TilePlan | None:
    return model_options.get("transformer_options", {}).get(PLAN)


def _blended(
    plan: TilePlan,
    cut: Layout,
    calc_cond_batch: Callable[..., list[Tensor]],
    model: HostObject,
    conds: list[list[dict] | None],
    x_in: Tensor,
    timestep: Tensor,
    model_options: dict,
) -> list[Tensor]:
    size, batch = (x_in.shape[-2], x_in.shape[-1]), x_in.shape[0]
    canvases = [torch.zeros_like(x_in, dtype=torch.float32) for _ in conds]
    batches = _batches(cut.tiles, 1 if has_areas(conds) else plan.batch)
    step, steps = _position(timestep, model_options)
    count = 0
    for number, indices in enumerate(batches, start=1):
        comfy.model_management.throw_exception_if_processing_interrupted()
        now = [cut.tiles[index] for index in indices]
        outputs = calc_cond_batch(
            model,
            [cut_conditioning(kind, size, batch, now, plan.controls) for kind in conds],
            torch.cat([tile.of(x_in) for tile in now]),  # (tiles * B, C, h, w)
            timestep.repeat(len(now)),
            {**model_options, "transformer_options": {**model_options["transformer_options"], TILE: tuple(now)}},
        )
        for canvas, output in zip(canvases, outputs, strict=True):
            for index, values in zip(indices, output.split(batch), strict=True):
                tiles.add(canvas, cut.tiles[index], cut.shares[index], values)
        count += len(now)
        plan.progress.tiles_done(step, steps, number, len(batches), canvases[0], cut, count)
    plan.progress.step_done(canvases[0])
    return [canvas.to(x_in.dtype) for canvas in canvases]


def _position(timestep: Tensor, model_options: dict) -> tuple[int, int]:
    """Return the step of the schedule that a model call belongs to, and how many there are."""
    schedule = model_options["transformer_options"]["sample_sigmas"]
    steps = max(1, len(schedule) - 1)
    step = int((schedule >= float(timestep[0]) * (1.0 - 1e-5)).sum()) - 1
    return min(max(step, 0), steps - 1), steps


def _batches(all_tiles: Sequence[Tile], most: int) -> list[list[int]]:
    """Return indices of neighbouring tiles of one size, at most `most` together."""
    batches: list[list[int]] = []
    for index, tile in enumerate(all_tiles):
        last = batches[-1] if batches else []
        same = last and (all_tiles[last[0]].height, all_tiles[last[0]].width) == (tile.height, tile.width)
        if same and len(last) < most:
            last.append(index)
        else:
            batches.append([index])
    return batches
