"""Put the decoder of a run into a finished file: `python -m training.replace_decoder --checkpoint= --run= --out=`."""

from __future__ import annotations

import dataclasses
import logging
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from clearsr_core import checkpoint
from clearsr_core.key_maps import vae_to_host

from . import command_line, snapshot

log = logging.getLogger("clearsr.training")

DECODER = ("decoder.", "post_quant_conv.")  # of the file's autoencoder, in the host's names


@dataclass(frozen=True)
class ReplaceSettings:
    """Which file, which decoder, where to."""

    checkpoint: Path  # a self-contained ClearSR file
    run: Path  # folder of a run of the autoencoder stage with freeze_encoder
    out: Path  # the new file
    share: float = 1.0  # of the run's weights, between 0 and 1; the rest stays the file's own decoder


def run(settings: ReplaceSettings) -> None:
    """Write `out`: the file as it is, but for the decoder.

    The run's settings go into the file's training notes, over those of a decoder that came from a run before.

    Raises:
        ValueError: the run is not one of this file's decoder; the message says why.
    """
    if not 0.0 < settings.share <= 1.0:
        raise ValueError(f"--share={settings.share}: give a number above 0 and at most 1.")
    stored = checkpoint.read(settings.checkpoint)
    networks = stored.config.base
    if networks is None:
        raise ValueError(f"--checkpoint={settings.checkpoint} has no autoencoder inside, so no decoder to replace.")
    last = snapshot.latest(settings.run)
    if last is None or not (settings.run / "vae" / "config.json").is_file():
        raise ValueError(
            f"--run={settings.run} is no finished run of the autoencoder stage: it has no vae or no state."
        )
    vae = AutoencoderKL.from_pretrained(settings.run / "vae", local_files_only=True, use_safetensors=True)
    ours = stored.tensors["base.vae"]
    found = (tuple(vae.config.block_out_channels), vae.config.layers_per_block, vae.config.latent_channels)
    wanted = (networks.vae_widths, networks.vae_blocks, networks.latent_channels)
    if found != wanted:
        raise ValueError(
            f"--run={settings.run} has an autoencoder of (widths, blocks, latent_channels) {found}, --checkpoint="
            f"{settings.checkpoint} one of {wanted}: train the decoder with --init= that file and "
            "--freeze_encoder=true."
        )
    trained = vae_to_host(vae.state_dict(), networks)
    theirs = {
        name: torch.lerp(ours[name].float(), value, settings.share).to(torch.float16) for name, value in trained.items()
    }
    moved = [name for name, value in ours.items() if not torch.equal(value, theirs[name])]
    others = [name for name in moved if not name.startswith(DECODER)]
    if others:
        raise ValueError(
            f"The encoder of --run={settings.run} is not that of --checkpoint={settings.checkpoint} ({others[0]} "
            "differs): latents would mean something else. Train the decoder with --init= that file and "
            "--freeze_encoder=true."
        )
    state = snapshot.read(last)
    decoder = {"settings": state.settings, "steps": state.step, "share": settings.share}
    if "decoder" in stored.training:  # the rest of the share is itself a decoder that came from a run
        decoder["over"] = stored.training["decoder"]
    notes = {**stored.training, "decoder": decoder}
    tensors = {**stored.tensors, "base.vae": theirs}
    checkpoint.write(settings.out, dataclasses.replace(stored, training=notes, tensors=tensors))
    checkpoint.read(settings.out)
    log.info("Wrote %s: %d tensors of the decoder are new.", settings.out, len(moved))


@command_line.command()
def main(arguments: list[str]) -> int:
    """Run from the command line; return the exit status."""
    run(command_line.settings(ReplaceSettings, arguments, __doc__))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
