"""Colour transfer."""

from __future__ import annotations

import pytest
import torch

from clearsr_core import color


def test_color_methods_do_what_they_say() -> None:
    image, reference = torch.rand(2, 1, 40, 50, 3, generator=torch.Generator().manual_seed(1))
    fixed = color.adain(image, reference)
    torch.testing.assert_close(fixed.mean(dim=(1, 2)), reference.mean(dim=(1, 2)), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(fixed.std(dim=(1, 2)), reference.std(dim=(1, 2)), rtol=1e-2, atol=1e-3)
    for method in (color.adain, color.wavelet, color.lab):
        torch.testing.assert_close(method(reference, reference), reference, rtol=1e-3, atol=1e-3)
    # A uniform shift of colour is undone by both wavelets, the fine detail survives.
    torch.testing.assert_close(color.wavelet(reference + 0.1, reference), reference, rtol=1e-4, atol=1e-4)
    lightness = color._rgb_to_lab(image)[..., 0]
    kept = color._rgb_to_lab(color.lab(image, image.flip(-1)).clamp(0, 1))[..., 0]
    assert float((lightness - kept).abs().mean()) < 3.0


def test_the_coarse_band_is_the_one_that_is_written_down() -> None:
    """Decision 0012: [1 2 1] / 4 in both directions at dilations 1 to 16, edges repeated; here as sums of shifts."""
    image, reference = torch.rand(2, 1, 45, 37, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def coarse(band: torch.Tensor) -> torch.Tensor:
        for step in (1, 2, 4, 8, 16):
            for dim in (1, 2):
                index = torch.arange(band.shape[dim])
                before, after = (
                    band.index_select(dim, (index + way).clamp(0, len(index) - 1)) for way in (-step, step)
                )
                band = (before + 2 * band + after) / 4
        return band

    torch.testing.assert_close(color.wavelet(image, reference), image - coarse(image) + coarse(reference))
    ours, theirs = color._rgb_to_lab(image), color._rgb_to_lab(reference)
    colours = ours[..., 1:] - coarse(ours[..., 1:]) + coarse(theirs[..., 1:])
    expected = color._lab_to_rgb(torch.cat([ours[..., :1], colours], dim=-1))
    torch.testing.assert_close(color.lab(image, reference), expected)


def test_only_coarse_colour_is_taken() -> None:
    """Detail of the reference below the coarse band does not reach the result: nothing of a checkerboard."""
    rows, columns = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    fine = ((rows + columns) % 2).float()[None, :, :, None].expand(1, 64, 64, 3) * 0.2
    flat = torch.full((1, 64, 64, 3), 0.5)
    for method in (color.wavelet, color.lab):
        taken = method(flat, flat - 0.1 + fine)[:, 16:48, 16:48]
        assert float(taken.std()) < 1e-3
        assert float(taken.mean()) == pytest.approx(0.5, abs=1e-2)
