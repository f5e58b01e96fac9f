"""The image prompt encoder and the reference mathematics of LoRA."""

from __future__ import annotations

import pytest
import torch

from clearsr_core.image_encoder import ImagePromptEncoder
from clearsr_core.initialise import initialise_fresh
from clearsr_core.merge import merged


@pytest.mark.parametrize("size", [(1, 1), (7, 5), (64, 64), (130, 90)])
@torch.no_grad()
def test_the_image_prompt_is_one_token_of_any_image(size):
    encoder = ImagePromptEncoder(24)
    initialise_fresh(encoder, torch.Generator().manual_seed(0))
    image = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1))
    prompt = encoder(image)
    assert prompt.shape == (2, 1, 24) and prompt.isfinite().all()
    assert not torch.allclose(prompt, encoder(image.flip(1)))


@torch.no_grad()
def test_the_image_prompt_depends_on_the_thumbnail_alone():
    """Area resizing: an image enlarged by repeating pixels gives the same prompt."""
    encoder = ImagePromptEncoder(24)
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    large = image.repeat_interleave(3, dim=2).repeat_interleave(3, dim=3)
    torch.testing.assert_close(encoder(large), encoder(image), rtol=1e-4, atol=1e-5)


def test_the_image_prompt_refuses_other_layouts():
    with pytest.raises(ValueError, match=r"must be \(B, 3, H, W\)"):
        ImagePromptEncoder(24)(torch.zeros(1, 64, 64, 3))


def test_lora_strength_and_scale():
    """W + strength alpha / r B A, off at strength 0, and W itself is left alone."""
    generator = torch.Generator().manual_seed(0)
    weight, a, b = (torch.randn(s, generator=generator) for s in [(6, 5), (2, 5), (6, 2)])
    before = weight.clone()
    torch.testing.assert_close(merged(weight, a, b, 4.0, 0.5), weight + 0.5 * (4.0 / 2) * b @ a)
    assert torch.equal(merged(weight, a, b, torch.tensor(4.0), 0.0), before)
    assert torch.equal(weight, before)


def test_a_linear_adapter_on_a_1x1_convolution():
    """The host holds the autoencoder's attention as convolutions; the adapter stays linear."""
    generator = torch.Generator().manual_seed(0)
    weight, a, b = (torch.randn(s, generator=generator) for s in [(6, 5), (2, 5), (6, 2)])
    conv = merged(weight[:, :, None, None], a, b, 2.0)
    assert torch.equal(conv[:, :, 0, 0], merged(weight, a, b, 2.0))


def test_adapters_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="do not fit a weight"):
        merged(torch.zeros(6, 5), torch.zeros(2, 4), torch.zeros(6, 2), 1.0)
    with pytest.raises(ValueError, match="do not fit a weight"):
        merged(torch.zeros(6, 5), torch.zeros(2, 5), torch.zeros(7, 2), 1.0)
