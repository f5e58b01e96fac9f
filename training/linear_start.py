"""The start of a small autoencoder: a linear one that already shows a blurred picture in its colours."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

# Of the regression. Less gives a better fit with larger weights, which the first steps of training then upset.
_RIDGE = 0.1
_CONSTANT = 0.25  # of the constant channels; about the size of the others
LOG_VARIANCE = -6.0  # of the posterior at the start; at torch's default (near 0) the noise drowns the untrained mean


@torch.no_grad()
def start_linear(model: AutoencoderKL) -> None:
    """Average on the way down, repeat on the way up, silence the residual branches; in place.

    A random start spends its first thousand steps finding out how to pass a colour through. Architecture and loss are
    those of any other start.
    """
    for module in model.modules():
        if isinstance(module, ResnetBlock2D):
            _silence(module.conv2)
        elif isinstance(module, Attention):
            _silence(cast(nn.ModuleList, module.to_out)[0])
        elif isinstance(module, Downsample2D):
            # A 3x3 kernel with stride 2, padded at the right and bottom: the mean of the 2x2 cell, per channel.
            conv = cast(nn.Conv2d, module.conv)
            _silence(conv)
            for channel in range(conv.out_channels):
                conv.weight[channel, channel, :2, :2] = 0.25
        elif isinstance(module, Upsample2D):
            conv = cast(nn.Conv2d, module.conv)
            _silence(conv)
            nn.init.dirac_(conv.weight)
    # One channel of each norm group is constant on the finest level of the decoder. A norm takes the mean and the scale
    # of its group away; beside a constant of their own size the other channels keep most of theirs.
    last = cast(nn.Conv2d, model.decoder.up_blocks[-2].upsamplers[0].conv)
    size = last.out_channels // model.config.norm_num_groups
    last.weight[::size] = 0.0
    cast(Tensor, last.bias)[::size] = _CONSTANT


@torch.no_grad()
def fit_ends(model: AutoencoderKL, images: Tensor) -> None:
    """Solve the last convolution of encoder and decoder for `images` (B, 3, H, W) in [-1, 1], by ridge regression.

    Afterwards three latent channels hold the mean colour of their 8x8 cell and the decoder draws it. A gradient step
    moves a weight by no more than the learning rate: it takes hundreds to find what one solve gives.
    """
    means = nn.functional.avg_pool2d(images, images.shape[-1] // model.encode(images).latent_dist.mean.shape[-1])
    _solve(model.encoder.conv_out, means, lambda: model.encoder(images))
    quant, post_quant = cast(nn.Conv2d, model.quant_conv), cast(nn.Conv2d, model.post_quant_conv)
    for conv in (quant, post_quant):
        _silence(conv)
        nn.init.dirac_(conv.weight)
    channels = model.config.latent_channels
    quant.weight[channels:] = 0.0
    cast(Tensor, quant.bias)[channels:] = LOG_VARIANCE
    _solve(model.decoder.conv_out, images, lambda: model.decode(model.encode(images).latent_dist.mode()))


def _silence(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        parameter.zero_()


def _solve(layer: nn.Conv2d, targets: Tensor, run: Callable[[], object]) -> None:
    """Set the first output channels of a 3x3 convolution to what best gives `targets` (B, C, h, w) when `run` runs."""
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    run()
    handle.remove()
    inputs = nn.functional.unfold(seen[0], 3, padding=1).transpose(1, 2).flatten(0, 1).double()
    inputs = torch.cat([inputs, torch.ones_like(inputs[:, :1])], dim=1)  # (positions, 9 C + 1)
    wanted = targets.flatten(2).transpose(1, 2).flatten(0, 1).double()  # (positions, channels)
    ridge = _RIDGE * len(inputs) * torch.eye(inputs.shape[1], dtype=torch.float64)
    solution = torch.linalg.solve(inputs.T @ inputs + ridge, inputs.T @ wanted).float()
    channels = targets.shape[1]
    layer.weight[:channels] = solution[:-1].T.reshape(channels, *layer.weight.shape[1:])
    cast(Tensor, layer.bias)[:channels] = solution[-1]
