"""Ways to sample, side by side: the plain one is the pipeline's, and each option does what its name says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from training.clearsr_model import ClearSRModel
from training.config import ConfigError
from training.pipeline import bound_eps, encode_lr, noise_sources, restore, sample
from training.reproduction.sampling import Way, restored, ways

PLAIN = Way(steps=3)
ANCHORS = ("file", "lr_encoder", "plain")


@pytest.fixture(scope="module")
def model(chain: Path) -> ClearSRModel:
    return ClearSRModel.from_checkpoint(chain / "nano" / "clearsr.safetensors")


@pytest.fixture(scope="module")
def picture() -> torch.Tensor:
    return torch.rand((1, 3, 16, 24), generator=torch.Generator().manual_seed(5))


def test_the_plain_way_is_that_of_restore(model: ClearSRModel, picture: torch.Tensor) -> None:
    assert torch.equal(restored(model, picture, PLAIN), restore(model, picture, 0, steps=3))


@pytest.mark.parametrize(
    "differs",
    [
        {"cfg": 2.0},
        {"start_from_lr": False},
        {"spacing": "trailing"},
        {"alpha": 0.3},
        {"alpha": 0.3, "target": "x0"},
        {"beta": 0.3},
        {"denoise": 0.5},
        {"seed": 1},
    ],
    ids=str,
)
def test_every_option_changes_the_picture(model: ClearSRModel, picture: torch.Tensor, differs: dict) -> None:
    assert not torch.equal(restored(model, picture, replace(PLAIN, **differs)), restored(model, picture, PLAIN))


def test_the_anchor_of_the_file_is_one_of_the_two(model: ClearSRModel, picture: torch.Tensor) -> None:
    """With alpha, whose anchor shows; E' of the chain has learnt, so the two differ."""
    named = {anchor: restored(model, picture, replace(PLAIN, alpha=0.5, anchor=anchor)) for anchor in ANCHORS}
    assert torch.equal(named["file"], named[model.anchor])
    assert not torch.equal(named["lr_encoder"], named["plain"])


def test_guidance_of_one_is_none(model: ClearSRModel, picture: torch.Tensor) -> None:
    encoded = encode_lr(model, picture)
    x_t, timesteps = torch.randn_like(encoded.lr_latent), torch.tensor([500])
    with torch.no_grad():
        plain = bound_eps(model, encoded)(x_t, timesteps)
        half, whole = (bound_eps(model, encoded, cfg)(x_t, timesteps) for cfg in (1.5, 2.0))
        empty = bound_eps(model, encoded, 0.0)(x_t, timesteps)
    # Guidance is linear in its scale, from the empty prompt at 0 through p at 1.
    torch.testing.assert_close(half - plain, (whole - plain) / 2, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(whole - plain, plain - empty, rtol=1e-4, atol=1e-5)
    assert not torch.equal(plain, empty)


@pytest.mark.parametrize("denoise", [1.0, 0.4])
def test_an_estimate_that_is_all_x_lr_ends_in_x_lr(model: ClearSRModel, picture: torch.Tensor, denoise: float) -> None:
    """alpha 1 on the estimate in every step: the last step's estimate, which is the result's mean, is the anchor."""
    encoded = encode_lr(model, picture)
    way = replace(PLAIN, alpha=1.0, ela_end=1.0, lla_start=1.0, target="x0", denoise=denoise)
    noise, generator = noise_sources(encoded.lr_latent.shape, 0)
    x_0 = sample(
        bound_eps(model, encoded),
        encoded.lr_latent,
        noise,
        generator,
        steps=3,
        denoise=denoise,
        lsa=way.lsa,
        target="x0",
        anchor=encoded.anchor,
    )
    torch.testing.assert_close(x_0, encoded.anchor, rtol=0, atol=1e-4)


def test_ways_share_what_they_do_not_name() -> None:
    named = ways({"steps": 7, "seed": 2, "ways": {"plain": {}, "guided": {"cfg": 2.0}}})
    assert named == {"plain": Way(steps=7, seed=2), "guided": Way(steps=7, seed=2, cfg=2.0)}


@pytest.mark.parametrize(
    ("differs", "message"),
    [
        ({"target": "x_0"}, "target"),
        ({"anchor": "none"}, "anchor"),
        ({"strength": 1}, "Unknown setting --strength"),
        ({"cfg": "high"}, "cfg"),
    ],
)
def test_a_wrong_way_is_named(differs: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ways({"ways": {"wrong": differs}})
