"""What a run tells its user: what it will be, how far it is, the picture as it grows, how long it will still take."""

from __future__ import annotations

import logging
import types

import clearsr_rig as rig
import comfy.cli_args
import comfy.model_management
import comfy.utils
import pytest
import torch
from clearsr_runs import SIDE, SMALL, apply, sample

tiled = rig.module("nodes.tiled_diffusion")
progress = rig.module("nodes.tile_progress")


class Clock:
    """Stands still unless it is moved."""

    def __init__(self):
        self.now = 100.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(tiny, monkeypatch):
    """A clock on which each call of the control network takes `call_seconds`, 5 unless set."""
    clock = Clock()
    clock.call_seconds = 5.0
    monkeypatch.setattr(progress, "time", types.SimpleNamespace(monotonic=clock.monotonic))
    network = tiny["clearsr"].control.model
    inner = network.forward

    def forward(*more, **options):
        clock.now += clock.call_seconds
        return inner(*more, **options)

    monkeypatch.setattr(network, "forward", forward)
    return clock


@pytest.fixture
def previews(monkeypatch):
    """Every latent that is shown within a step; the host's previews are on."""
    monkeypatch.setattr(rig.args, "preview_method", comfy.cli_args.LatentPreviewMethod.Auto)
    inner, shown = progress.grown, []

    def watched(*arguments):
        shown.append(inner(*arguments))
        return shown[-1]

    monkeypatch.setattr(progress, "grown", watched)
    return shown


# ---- before the first step ------------------------------------------------------------------------------------------


def announcements(caplog):
    return [record.message for record in caplog.records if "Memory beside the models" in record.message]


def test_the_run_is_announced(tiny, wide, caplog) -> None:
    """In tiles and in one piece: one line, with tiles, calls, steps and memory."""
    caplog.set_level(logging.INFO)
    sample(apply(tiny, wide, **SMALL, tiles_per_batch=4), wide, steps=5)
    (text,) = announcements(caplog)
    assert "192 x 256 pixels in 2 x 3 tiles of 128 x 128, 4 at a time: 2 model calls in each of 5 steps" in text
    caplog.clear()
    sample(apply(tiny, wide), wide)
    (text,) = announcements(caplog)
    assert "192 x 256 pixels in one piece, 2 steps." in text and "tiles" not in caplog.text


@pytest.mark.parametrize(("cfg", "rows"), [(1.0, 2), (3.0, 4)])
def test_announced_memory_is_the_hosts_estimate_and_the_control_beside_it(tiny, wide, caplog, cfg, rows) -> None:
    caplog.set_level(logging.INFO)
    for settings, pictures, sides in (({}, 1, (32, 24)), ({**SMALL, "tiles_per_batch": 4}, 4, (16, 16))):
        caplog.clear()
        model = apply(tiny, wide, **settings)
        sample(model, wide, cfg=cfg, steps=1)
        needed = model.model.memory_required([rows * pictures, 4, *sides]) * tiled.CONTROL_SHARE / 2**20
        assert f"estimates it: {max(1.0, needed):.0f} MiB" in announcements(caplog)[0]


# ---- while it runs --------------------------------------------------------------------------------------------------


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


def test_the_time_left_is_told_once_after_the_first_step(tiny, wide, clock, caplog) -> None:
    """Measured, not guessed: six tiles of 5 seconds are a step of 30, and four are left. Short runs are left alone."""
    caplog.set_level(logging.INFO)
    sample(apply(tiny, wide, **SMALL), wide, steps=5)
    told = [record.message for record in caplog.records if "left" in record.message]
    assert told == ["DPM/SPM Control Apply: a step takes 30 s; about 2 min left for 4 steps."]
    caplog.clear()
    sample(apply(tiny, wide), wide, steps=5)
    assert "a step takes 5.0 s; about 20 s left for 4 steps" in caplog.text
    caplog.clear()
    sample(apply(tiny, wide, **SMALL), wide, steps=2)
    assert "about 30 s left for 1 step." in caplog.text
    caplog.clear()
    clock.call_seconds = 0.1
    sample(apply(tiny, wide, **SMALL), wide, steps=5)
    assert "left" not in caplog.text


def test_time_is_measured_anew_when_the_tiles_change(tiny, wide, clock, caplog, monkeypatch) -> None:
    """What was lost until memory ran out says nothing about the steps to come."""
    monkeypatch.setattr(tiled, "_SMALLER_SIDES", (SIDE,))
    network = tiny["clearsr"].control.model
    inner = network.forward

    def forward(x_lr, *more, **options):
        if x_lr.shape[-1] > SIDE:
            clock.now += 1000.0
            raise comfy.model_management.OOM_EXCEPTION("out of memory")
        return inner(x_lr, *more, **options)

    monkeypatch.setattr(network, "forward", forward)
    caplog.set_level(logging.INFO)
    sample(apply(tiny, wide, tile_overlap=64), wide, steps=3)
    assert "a step takes 30 s; about 1 min left for 2 steps" in caplog.text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.31, "0.3 s"),
        (9.96, "10 s"),
        (59.0, "59 s"),
        (59.6, "1 min"),
        (3500, "58 min"),
        (3600, "1 h 0 min"),
        (9000, "2 h 30 min"),
    ],
)
def test_durations(seconds, text) -> None:
    assert progress.duration(seconds) == text


def test_the_preview_grows_tile_by_tile(tiny, wide, previews, monkeypatch) -> None:
    """Where no tile has been yet, it shows x_lr, and from the second step on what the step before has made."""
    monkeypatch.setattr(progress, "PREVIEW_SECONDS", 0.0)
    monkeypatch.setattr(progress, "PREVIEW_REST", 0.0)
    rig.progress.clear()
    sample(apply(tiny, wide, **SMALL), wide, steps=2)
    assert len(previews) == 10  # the sixth of six tiles ends the step, which the sampler itself reports
    assert sum(with_preview for _, _, with_preview in rig.progress) == 12
    x_lr = tiny["model"].model.process_latent_in(wide["samples"])
    cut = rig.module("clearsr_core.tiles").layout(32, 24, SIDE, 8)
    for count, shown in enumerate(previews[:5], start=1):
        untouched = outside(cut.tiles[:count])
        torch.testing.assert_close(shown[..., untouched], x_lr[..., untouched])
        changed = (shown - x_lr).abs()[..., ~untouched]
        assert float((changed > 1e-3).float().mean()) > 0.5  # at the rim of a tile its share is next to nothing
    # The second step begins on the whole picture of the first, of which only the last tile had not been shown.
    same = outside([cut.tiles[0], cut.tiles[-1]])
    assert bool(same.any())
    torch.testing.assert_close(previews[5][..., same], previews[4][..., same])


def outside(some):
    """The pixels of a 32 x 24 latent that none of the tiles covers."""
    free = torch.ones(32, 24, dtype=torch.bool)
    for tile in some:
        tile.of(free).fill_(False)
    return free


def test_previews_cost_no_time_to_speak_of(tiny, wide, clock, previews, monkeypatch) -> None:
    """Tiles of 0.2 seconds: every third is shown; a previewer that takes a second is used less often still."""
    clock.call_seconds = 0.2
    sample(apply(tiny, wide, **SMALL), wide, steps=1)
    assert len(previews) == 2  # of tiles 1 to 5, the first and the fourth
    previews.clear()
    inner = progress.grown

    def slow(*arguments):
        clock.now += 1.0
        return inner(*arguments)

    monkeypatch.setattr(progress, "grown", slow)
    sample(apply(tiny, wide, **SMALL), wide, steps=3)
    assert len(previews) == 1


def test_without_previews_nothing_is_kept_or_drawn(tiny, wide, monkeypatch) -> None:
    monkeypatch.setattr(progress, "grown", lambda *_: pytest.fail("drawn"))
    rig.progress.clear()
    sample(apply(tiny, wide, **SMALL), wide)
    assert rig.progress and not any(with_preview for _, _, with_preview in rig.progress)
