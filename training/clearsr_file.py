"""From trained modules to the one file that ComfyUI loads (docs/CHECKPOINT.md), with its model card."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clearsr_core import checkpoint
from clearsr_core.checkpoint import Checkpoint
from clearsr_core.config import SD21_NETWORKS, ClearSRConfig
from clearsr_core.fingerprint import unet_fingerprint
from clearsr_core.key_maps import unet_to_host, vae_to_host
from clearsr_core.whole_files import replacing

from . import model_card, models
from .base_files import layout
from .clearsr_model import ClearSRModel
from .code_version import code_version

log = logging.getLogger("clearsr.training")


def lora_tensors(module: torch.nn.Module, rank: int) -> dict[str, Tensor]:
    """Return a LoRA as the file holds it: `<layer>.lora_A.weight`, `<layer>.lora_B.weight`, `<layer>.alpha`."""
    tensors = {name: value.detach() for name, value in models.lora_parameters(module).items()}
    layers = {name.rpartition(".lora_")[0] for name in tensors}
    # Trained with alpha = rank; without the tensor, readers disagree about what a missing alpha means.
    return tensors | {f"{layer}.alpha": torch.tensor(float(rank)) for layer in layers}


def is_contained(model: ClearSRModel) -> bool:
    """Return whether the base goes into the file: it is not of Stable Diffusion 2.1's size, which hosts have."""
    return layout(model.unet.config, model.vae.config) != SD21_NETWORKS


def latent_rgb(latents: Tensor, images: Tensor) -> tuple[tuple[float, ...], ...]:
    """Fit latent -> RGB for live previews by least squares.

    Args:
        latents: (B, C, h, w) model units.
        images: (B, 3, 8h, 8w) in [-1, 1].

    Returns:
        C rows of 3 factors.
    """
    small = torch.nn.functional.avg_pool2d(images, 8)
    rows = latents.movedim(1, -1).flatten(0, 2)
    solution = torch.linalg.lstsq(rows, small.movedim(1, -1).flatten(0, 2)).solution
    return tuple(tuple(round(float(value), 4) for value in row) for row in solution)


def export(
    model: ClearSRModel,
    path: Path,
    *,
    rank: int,
    prompt_mode: str,
    anchor: str,
    training: dict[str, Any],
    preview: tuple[tuple[float, ...], ...] | None = None,
    hardware: str | None = None,
    overwrite_card: bool = False,
) -> None:
    """Write the checkpoint, read it back, compare every number, and write its model card beside it.

    Args:
        model: trained modules; a base other than SD 2.1's size goes into the file with them.
        path: target, replaced only when the new file is complete.
        rank: of both LoRAs.
        prompt_mode: "pooled", "patch" or "null".
        anchor: "lr_encoder" or "plain".
        training: settings, data and figures, for whoever wonders where the file comes from.
        preview: latent -> RGB factors, for a base that hosts do not know.
        hardware: that the training ran on; None = where the model is now.
        overwrite_card: replace a model card that was edited by hand, too.

    Raises:
        CheckpointError: what would be in the file is not sound; a file that was there before is as it was.
    """
    networks = layout(model.unet.config, model.vae.config)
    contained = is_contained(model)
    config = ClearSRConfig(
        control=model.control.config,
        lora_rank=rank,
        prompt_mode=prompt_mode,  # type: ignore[arg-type]
        anchor=anchor,  # type: ignore[arg-type]
        base=networks if contained else None,
        base_fingerprint="" if contained else unet_fingerprint(models.without_lora(model.unet)),
        latent_rgb=preview if contained else None,
        image_encoder=model.image_encoder is not None,
        clip_width=model.clip.hidden_width if model.clip is not None and model.clip.patch else 0,
    )
    tensors: dict[str, dict[str, Tensor]] = {
        "unet_lora": lora_tensors(model.unet, rank),
        "vae_lora": lora_tensors(model.lr_encoder, rank),
        "null_text": {"": model.null_text},
    }
    for part in ("dpm", "spm"):
        module = getattr(model.control, part)
        if module is not None:
            tensors[part] = module.state_dict()
    if model.image_encoder is not None:
        tensors["image_encoder"] = model.image_encoder.state_dict()
    if config.clip_width and model.clip is not None:
        tensors["image_projection"] = model.clip.projection()
    if contained:
        tensors["base.unet"] = unet_to_host(models.without_lora(model.unet), config.control)
        tensors["base.vae"] = vae_to_host(model.vae.state_dict(), networks)
    # A self-contained file in half precision is small enough to be kept in git.
    dtype = torch.float16 if contained else torch.float32
    plain = {
        part: {name: value.detach().to("cpu", dtype) for name, value in table.items()}
        for part, table in tensors.items()
    }
    made = {"hardware": model_card.hardware(model.null_text.device) if hardware is None else hardware}
    made |= {"code": code_version()}
    notes = json.loads(json.dumps({**training, **made, "versions": model_card.versions()}))
    stored = Checkpoint(config, notes, plain)
    with replacing(path) as unverified:
        checkpoint.write(unverified, stored)
        checkpoint.verify(unverified, stored, path)
    card = model_card.write(path, stored, overwrite_card)
    log.info("Wrote %s (%.1f MB) and %s.", path, path.stat().st_size / 1e6, card.name)
    log.info("Put the file into ComfyUI/models/clearsr; fill in the licence in the card before you share it.")
