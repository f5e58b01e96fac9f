"""Tells whether two UNets are the same base model, from a few numbers that survive a change of precision.

A fingerprint is a string: "1:" and, for each of a few weights, its size (root mean square) and three fixed projections
of a sample of it. Rounding to float16 moves these numbers by 0.02 % of the size, to bfloat16 by 0.15 %; a fine-tune
moves them by as much as it moved the weights. So fingerprints are compared by distance, never for equality: a hash of
rounded numbers would differ wherever a number lies on the edge of a rounding step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

# diffusers' names. Matrices and convolutions: Adam moves every weight by about the same amount, so that small weights
# change most for their size, norms least. Encoder, middle and decoder, in all kinds of layers.
SAMPLED = (
    "conv_in.weight",
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight",
    "down_blocks.1.resnets.0.conv1.weight",
    "down_blocks.2.attentions.1.transformer_blocks.0.attn2.to_k.weight",
    "mid_block.resnets.1.conv2.weight",
    "up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_v.weight",
    "up_blocks.2.resnets.1.conv1.weight",
    "up_blocks.3.attentions.2.transformer_blocks.0.attn1.to_out.0.weight",
)
SAME = 0.005  # distances below this are rounding
_SAMPLE = 4096  # numbers of each weight, evenly spaced
_PROJECTIONS = 3
_VERSION = "1"


def unet_fingerprint(unet: Mapping[str, Tensor]) -> str:
    """Return the fingerprint of a UNet.

    Args:
        unet: weights in diffusers' names, at least those of SAMPLED, on any device, in any floating-point dtype. Only
            the sample of each is copied to the CPU; nothing is written.
    """
    numbers: list[float] = []
    for name in SAMPLED:
        weight = unet[name].detach().flatten()
        sample = weight[:: max(1, weight.numel() // _SAMPLE)][:_SAMPLE].to("cpu", torch.float64)
        root = math.sqrt(sample.numel())
        numbers.append(float(sample.square().mean().sqrt()))
        # Sums over every third number: orthogonal, and no random numbers that a version of torch could draw otherwise.
        numbers += [
            float(sample[start::_PROJECTIONS].sum()) * math.sqrt(_PROJECTIONS) / root for start in range(_PROJECTIONS)
        ]
    return f"{_VERSION}:" + ",".join(f"{number:.6g}" for number in numbers)


def fingerprint_distance(first: str, second: str) -> float | None:
    """Return how far apart two UNets are: 0 for the same, about the relative change of the weights for a fine-tune.

    Unrelated models are about 1 apart. None: at least one of the two is missing, or of a version that is not known.
    """
    ours, theirs = _numbers(first), _numbers(second)
    if ours is None or theirs is None:
        return None
    total, step = 0.0, 1 + _PROJECTIONS
    for start in range(0, len(ours), step):
        size = max(ours[start], theirs[start], 1e-12)
        pairs = zip(ours[start : start + step], theirs[start : start + step], strict=True)
        total += sum(((a - b) / size) ** 2 for a, b in pairs)
    return math.sqrt(total / len(ours))


def _numbers(fingerprint: str) -> list[float] | None:
    """Read the numbers of a fingerprint; None if it is empty, unknown or damaged."""
    version, _, text = fingerprint.partition(":")
    try:
        numbers = [float(number) for number in text.split(",")]
    except ValueError:
        return None
    whole = len(numbers) == len(SAMPLED) * (1 + _PROJECTIONS) and all(map(math.isfinite, numbers))
    return numbers if version == _VERSION and whole else None
