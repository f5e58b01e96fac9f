"""Our networks are diffusers' with equal weights, and an untrained control leaves a UNet alone."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel

from clearsr_core.config import NANO, TINY
from clearsr_core.control import ClearSRControl
from clearsr_core.initialise import initialise_fresh, initialise_from_unet
from clearsr_core.shapes import unet_shapes

pytestmark = pytest.mark.parity

SHALLOW = dataclasses.replace(
    TINY,
    widths=(32, 64, 64),
    attention_levels=(True, False, True),
    layers_per_block=1,
    query_windows=(8, 4, 2),
)
CONFIGS = {"nano": NANO, "shallow": SHALLOW}


def diffusers_sizes(config):
    """The arguments of diffusers' models for our configuration; its `attention_head_dim` counts heads."""
    down = ["CrossAttnDownBlock2D" if attends else "DownBlock2D" for attends in config.attention_levels]
    return {
        "block_out_channels": config.widths,
        "down_block_types": tuple(down),
        "layers_per_block": config.layers_per_block,
        "attention_head_dim": [width // config.head_channels for width in config.widths],
        "cross_attention_dim": config.context_dim,
        "norm_num_groups": config.norm_groups,
        "use_linear_projection": True,
    }


def make_unet(config):
    up = ["CrossAttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(config.attention_levels)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return UNet2DConditionModel(up_block_types=tuple(up), **diffusers_sizes(config)).eval()


def randomise(module, seed=0):
    """Give every parameter numbers of a size that keeps activations near one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            norm = parameter.ndim == 1 and name.endswith("weight")
            parameter.copy_(1 + 0.1 * noise if norm else noise / max(1.0, parameter[0].numel() ** 0.5))


def inputs(config, height=16, width=16):
    generator = torch.Generator().manual_seed(1)
    lr_latent = torch.randn(2, 4, height, width, generator=generator)
    return lr_latent, torch.tensor([1, 981]), torch.randn(2, 7, config.context_dim, generator=generator)


def flat(residuals):
    return [*residuals.down, residuals.mid]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("size", [(16, 16), (13, 7)])
@torch.no_grad()
def test_silent_window_attention_leaves_diffusers_controlnet(name, size):
    """DPM with W_o = 0 equals ControlNetModel with the same weights (its RGB hint encoder ends in zeros)."""
    config = CONFIGS[name]
    control = ClearSRControl(dataclasses.replace(config, use_spm=False)).eval()
    randomise(control)
    for module_name, module in control.named_modules():
        if module_name.endswith("window_attention.to_out"):
            module.weight.zero_()
            module.bias.zero_()
    theirs = ControlNetModel(**diffusers_sizes(config)).eval()
    report = theirs.load_state_dict(control.dpm.state_dict(), strict=False)
    assert all(key.startswith("controlnet_cond_embedding.") for key in report.missing_keys)
    assert all("window" in key for key in report.unexpected_keys)

    lr_latent, timestep, context = inputs(config, *size)
    hint = torch.zeros(2, 3, 8 * size[0], 8 * size[1])
    down, mid = theirs(lr_latent, timestep, context, hint, return_dict=False)
    for ours, other in zip(flat(control(lr_latent, timestep, context)), [*down, mid], strict=True):
        assert ours.abs().max() > 0.1
        torch.testing.assert_close(ours, other, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("name", CONFIGS)
def test_our_table_of_unet_weights_is_diffusers_own(name):
    """Names and shapes, decoder included, with and without shortcuts."""
    unet = make_unet(CONFIGS[name])
    assert unet_shapes(CONFIGS[name]) == {key: tuple(value.shape) for key, value in unet.state_dict().items()}


@pytest.mark.parametrize("options", [{}, {"control_input": "lr+xt"}, {"window_attention": False}, {"use_dpm": False}])
@torch.no_grad()
def test_an_untrained_control_leaves_the_unet_bit_for_bit(options):
    """All outputs start at zero, also after copying the UNet; with other weights the UNet does change."""
    config = dataclasses.replace(NANO, **options)
    unet = make_unet(config)
    control = ClearSRControl(config)
    initialise_from_unet(control, unet.state_dict())
    lr_latent, timestep, context = inputs(config)
    x_t = lr_latent.flip(0)
    plain = unet(x_t, timestep, context).sample

    def controlled():
        residuals = control(lr_latent, timestep, context, x_t)
        return unet(
            x_t,
            timestep,
            context,
            down_block_additional_residuals=residuals.down,
            mid_block_additional_residual=residuals.mid,
        ).sample

    assert torch.equal(controlled(), plain)
    randomise(control)
    assert not torch.allclose(controlled(), plain, atol=1e-2)


@torch.no_grad()
def test_dpm_starts_as_the_unets_own_encoder():
    """Before its output convolutions, the fresh copy computes what the UNet's encoder computes on x_lr."""
    unet = make_unet(NANO)
    control = ClearSRControl(NANO)
    initialise_fresh(control, torch.Generator().manual_seed(9))
    initialise_from_unet(control, unet.state_dict())
    lr_latent, timestep, context = inputs(NANO)
    seen = {}
    unet.mid_block.register_forward_hook(lambda module, arguments, output: seen.update(unet=output))
    control.dpm.mid_block.register_forward_hook(lambda module, arguments, output: seen.update(dpm=output))
    unet(lr_latent, timestep, context)
    control(lr_latent, timestep, context)
    torch.testing.assert_close(seen["dpm"], seen["unet"], rtol=1e-5, atol=1e-5)
