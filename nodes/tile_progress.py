"""What a run tells its user: what it will be, how far it is, the picture as it grows, how long it will still take."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import comfy.utils
import latent_preview
import torch
from torch import Tensor

from ..clearsr_core.tiles import Layout
from .compat import HostObject

PREVIEW_SECONDS = 0.5  # at least this long from one preview within a step to the next,
PREVIEW_REST = 10.0  # and this many times as long as the last one took, so that previews cost no time to speak of
TELL_SECONDS = 10.0  # a run that ends sooner needs no estimate


class RunProgress:
    """One run's bar, previews and estimate; made when the run starts, gone when it ends.

    Args:
        node: whose name the messages bear.
        say: tells the user a sentence at a level of logging.
        latent_format: the host's, of the model; it chooses the previewer.
        start: (B, C, h, w) in model units, shown where no tile has been computed yet: x_lr.
    """

    def __init__(self, node: str, say: Callable[[str, int], None], latent_format: HostObject, start: Tensor) -> None:
        self._node, self._say = node, say
        self._latent_format = latent_format
        self._previewer: HostObject = None
        self._previewer_known = False
        self._shown_before = start
        self._next_preview = 0.0
        self._bar = comfy.utils.ProgressBar(1)
        self._share = 0.0  # of the run, that the bar has reached
        self._began: tuple[int, float] | None = None  # step and second of the first model call
        self.measures = True  # until the estimate has been told

    def model_call(self, step: int, steps: int) -> None:
        """Note that a model call of `step` begins; once a step has passed, tell how long the others will take."""
        now = time.monotonic()
        if self._began is None:
            self._began = (step, now)
        first, began = self._began
        if step <= first:
            return
        self.measures = False
        each, more = (now - began) / (step - first), steps - step
        if each * more >= TELL_SECONDS:
            left = f"about {duration(each * more)} left for {more} {'step' if more == 1 else 'steps'}"
            self._say(f"{self._node}: a step takes {duration(each)}; {left}.", logging.INFO)

    def restart(self) -> None:
        """Measure anew: the run goes on in other tiles."""
        self._began, self.measures = None, True

    def tiles_done(
        self, step: int, steps: int, number: int, calls: int, canvas: Tensor, cut: Layout, count: int
    ) -> None:
        """Move the bar of the running node within a step; whole steps are the sampler's own to report.

        Both tell a share of the run. Samplers that call the model more than once in a step do not move it back.

        Args:
            step, steps: of the schedule.
            number, calls: model calls of this step that are done, and all.
            canvas: (B, C, h, w) the blend so far, in model units.
            cut: its tiles, of which the first `count` are done.
        """
        value, total = step * calls + number, steps * calls
        if number < calls and value / total > self._share:
            self._share = value / total
            self._bar.update_absolute(value, total, self._preview(canvas, cut, count))

    def step_done(self, estimate: Tensor) -> None:
        """Keep a whole picture (B, C, h, w) as what is shown where the next step has not been yet."""
        if self._previewer is not None:
            self._shown_before = estimate

    def _preview(self, canvas: Tensor, cut: Layout, count: int) -> HostObject:
        """Return the host's preview of the tiles done over the picture before, or None where none is due."""
        if not self._previewer_known:
            self._previewer = latent_preview.get_previewer(canvas.device, self._latent_format)
            self._previewer_known = True
        started = time.monotonic()
        if self._previewer is None or started < self._next_preview:
            return None
        image = self._previewer.decode_latent_to_preview_image("JPEG", grown(canvas, self._shown_before, cut, count))
        now = time.monotonic()
        self._next_preview = now + max(PREVIEW_SECONDS, PREVIEW_REST * (now - started))
        return image


def grown(canvas: Tensor, before: Tensor, cut: Layout, count: int) -> Tensor:
    """Fill up a blend of the first `count` tiles with the picture before, by the shares that are still missing.

    Args:
        canvas: (B, C, h, w) sum of the tiles done times their shares; not changed.
        before: (B, C, h, w).
    """
    missing = torch.ones(canvas.shape[-2:], device=canvas.device)
    for tile, share in zip(cut.tiles[:count], cut.shares[:count], strict=True):
        tile.of(missing).sub_(share)
    return canvas + missing * before.to(canvas)


def duration(seconds: float) -> str:
    """Spell a time as its reader would: 8.2 s, 45 s, 12 min, 1 h 5 min."""
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"
