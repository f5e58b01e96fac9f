"""Add channels to a trained autoencoder: `python -m training.grow_autoencoder --vae= --out=`.

A larger autoencoder then begins with what the smaller one has learned. New channels read all others at random; the old
ones read them faintly. At zero they would not learn: neither side of a product of two zeros has a gradient.
"""

from __future__ import annotations

import logging
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from diffusers import AutoencoderKL
from torch import nn

from clearsr_core.config import LATENT_SCALE

from . import command_line
from .base_model import load_autoencoder, save_network
from .linear_start import LOG_VARIANCE
from .models import build_autoencoder

log = logging.getLogger("clearsr.training")

# Of torch's default: weights by which old channels read new ones. Measured on an image of 33.1 dB: 31.7 dB with 12
# more latent channels; 30.3 dB with widths half as large again, and 22 dB if those were read at 0.2 too.
FAINT_LATENT = 0.2
FAINT = 0.05


@dataclass(frozen=True)
class GrowSettings:
    """Which autoencoder, and how large it becomes."""

    vae: Path  # the `vae` folder of a run, or a self-contained ClearSR file
    out: Path  # folder for the larger one, for --init= of the autoencoder stage
    latent_channels: int = 16  # of the larger latent
    widths: tuple[int, ...] = ()  # channels per level, finest first; empty = as they are
    seed: int = 0  # of the new channels' weights


@torch.no_grad()
def grow(small: AutoencoderKL, widths: tuple[int, ...], latent_channels: int) -> AutoencoderKL:
    """Return a larger autoencoder with almost the same output.

    Old norm groups keep their channels, so all widths grow by the same factor, and the number of groups with them.

    Raises:
        ValueError: the sizes are smaller, or the widths are not all the same multiple; one sentence that says which.
    """
    config = small.config
    old_widths, groups = tuple(config.block_out_channels), config.norm_num_groups
    new_groups = groups * widths[0] // old_widths[0]
    if (
        len(widths) != len(old_widths)
        or new_groups < groups
        or any(new * groups != old * new_groups for new, old in zip(widths, old_widths, strict=True))
    ):
        raise ValueError(
            f"--widths={','.join(map(str, widths))}: all four must grow from {old_widths} by the same factor, by "
            f"which {groups} norm groups become a whole number."
        )
    old_latent = config.latent_channels
    if latent_channels < old_latent:
        raise ValueError(f"--latent_channels={latent_channels}: the autoencoder has {old_latent} already.")
    large = build_autoencoder(widths, config.layers_per_block, new_groups, latent_channels)
    nn.init.kaiming_normal_(large.encoder.conv_out.weight)  # torch's default is faint beside the posterior's noise
    quant, post_quant = cast(nn.Conv2d, large.quant_conv), cast(nn.Conv2d, large.post_quant_conv)
    for parameter in (*quant.parameters(), *post_quant.parameters()):
        parameter.zero_()
    added = torch.arange(old_latent, latent_channels)
    quant.weight[added, added] = 1.0 / LATENT_SCALE
    post_quant.weight[added, added] = 1.0
    cast(nn.Parameter, quant.bias)[latent_channels:] = LOG_VARIANCE
    moments = torch.tensor([*range(old_latent), *range(latent_channels, latent_channels + old_latent)])
    new = large.state_dict()
    for name, value in small.state_dict().items():
        rows = moments if name.startswith(("encoder.conv_out", "quant_conv")) else torch.arange(value.shape[0])
        if value.ndim == 1:
            new[name][rows] = value
        else:
            columns = moments if name == "quant_conv.weight" else torch.arange(value.shape[1])
            new[name][rows] *= FAINT_LATENT if name == "decoder.conv_in.weight" else FAINT
            new[name][rows[:, None], columns] = value
    for half in (large.encoder, large.decoder):
        query = half.mid_block.attentions[0].to_q
        # Scores are divided by the root of the width. New queries are zero: the scores stay those of the old channels.
        for parameter in query.parameters():
            parameter[old_widths[-1] :] = 0.0
            parameter *= math.sqrt(widths[-1] / old_widths[-1])
    return large


def run(settings: GrowSettings) -> None:
    """Write `out`, in diffusers' layout."""
    small = load_autoencoder(settings.vae)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        large = grow(small, settings.widths or tuple(small.config.block_out_channels), settings.latent_channels)
    save_network(large, settings.out)
    log.info("Wrote %s, norm_groups %d.", settings.out, large.config.norm_num_groups)


@command_line.command()
def main(arguments: list[str]) -> int:
    """Run from the command line; return the exit status."""
    run(command_line.settings(GrowSettings, arguments, __doc__))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
