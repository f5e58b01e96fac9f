"""A larger autoencoder begins with what the smaller one has learned, and its new channels can learn."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL

from training import grow_autoencoder
from training.base_model import load_autoencoder
from training.linear_start import LOG_VARIANCE
from training.models import build_autoencoder

WIDTHS = (8, 8, 16, 16)


def _small() -> AutoencoderKL:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # torch's layers draw from nothing else; fork_rng puts it back
        return build_autoencoder(WIDTHS, 1, 4)


@pytest.mark.parametrize("widths", [WIDTHS, (12, 12, 24, 24), (16, 16, 32, 32)])
def test_the_output_changes_little_and_new_channels_learn(
    monkeypatch: pytest.MonkeyPatch, widths: tuple[int, ...]
) -> None:
    """Unread, the new channels change nothing at all; but then neither they nor what reads them would get far."""
    small = _small()
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    before = small.encode(images).latent_dist
    for name in ("FAINT", "FAINT_LATENT"):
        monkeypatch.setattr(grow_autoencoder, name, 0.0)
    unread = grow_autoencoder.grow(small, widths, 16)
    after = unread.encode(images).latent_dist
    torch.testing.assert_close(after.mean[:, :4], before.mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(after.logvar[:, :4], before.logvar, rtol=1e-4, atol=1e-5)
    assert after.mean[:, 4:].std() > 0.1
    assert (after.logvar[:, 4:] == LOG_VARIANCE).all()
    made = unread.decode(after.mean).sample
    torch.testing.assert_close(made, small.decode(before.mean).sample, rtol=1e-4, atol=1e-4)
    monkeypatch.undo()
    large = grow_autoencoder.grow(small, widths, 16)
    large.decode(large.encode(images).latent_dist.mean).sample.square().mean().backward()
    for layer in (large.encoder.conv_out, large.decoder.conv_in):
        assert layer.weight.grad is not None and layer.weight.grad[4:16].any(), layer
    assert large.decoder.conv_in.weight.grad[:, 4:].any()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--latent_channels=3"], "has 4 already"),
        (["--widths=12,12,24,32"], "by the same factor"),
        (["--widths=4,4,8,8"], "by the same factor"),
        (["--widths=12,12,24"], "by the same factor"),
    ],
)
def test_what_cannot_grow_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, options: list, said: str
) -> None:
    _small().save_pretrained(tmp_path / "vae")
    assert grow_autoencoder.main([f"--vae={tmp_path}/vae", f"--out={tmp_path}/large", *options]) != 0
    assert said in caplog.text
    assert not (tmp_path / "large").exists()


def test_the_command_writes_what_the_autoencoder_stage_begins_with(tmp_path: Path) -> None:
    _small().save_pretrained(tmp_path / "vae")
    command = [f"--vae={tmp_path}/vae", f"--out={tmp_path}/large", "--latent_channels=8", "--widths=12,12,24,24"]
    assert grow_autoencoder.main(command) == 0
    large = load_autoencoder(tmp_path / "large")
    assert (large.config.latent_channels, large.config.norm_num_groups) == (8, 6)
