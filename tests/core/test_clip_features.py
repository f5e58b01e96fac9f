"""What is done to pictures and to CLIP's hidden states, beside CLIP itself."""

from __future__ import annotations

import pytest
import torch

from clearsr_core.clip_features import CLIP_MEAN, CLIP_STD, clip_pixels, projected_tokens


@pytest.mark.parametrize("size", [(224, 224), (16, 16), (300, 57), (1, 1)])
def test_pixels_are_a_square_of_8_bit_steps(size):
    pixels = clip_pixels(torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0)))
    assert pixels.shape == (2, 3, 224, 224)
    steps = (pixels * torch.tensor(CLIP_STD).view(3, 1, 1) + torch.tensor(CLIP_MEAN).view(3, 1, 1)) * 255.0
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-3)
    assert steps.min() > -0.01
    assert steps.max() < 255.01


def test_every_token_is_normed_and_projected_alone():
    generator = torch.Generator().manual_seed(0)
    norm = torch.nn.LayerNorm(12)
    norm.weight.data, norm.bias.data = torch.randn(2, 12, generator=generator)
    projection = torch.randn(8, 12, generator=generator)
    weights = {"norm.weight": norm.weight, "norm.bias": norm.bias, "projection.weight": projection}
    hidden = torch.randn(2, 5, 12, generator=generator)
    tokens = projected_tokens(hidden, weights)
    assert tokens.shape == (2, 5, 8)
    for index in range(5):
        torch.testing.assert_close(tokens[:, index], norm(hidden[:, index]) @ projection.T)
    assert projected_tokens(hidden.half(), weights).dtype == torch.float16
