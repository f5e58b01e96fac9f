"""From trained modules to the one file that ComfyUI loads (docs/CHECKPOINT.md), with its model card.

    python -m training.export --run=runs/nano --base=runs/nano_base --out=nano.safetensors

exports the newest snapshot of a run as it is, without training further. A finished run has done so by itself.
"""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clearsr_core import checkpoint
from clearsr_core.checkpoint import Checkpoint, CheckpointError
from clearsr_core.config import SD21_NETWORKS, BaseConfig, ClearSRConfig
from clearsr_core.fingerprint import unet_fingerprint
from clearsr_core.key_maps import unet_to_host, vae_to_host
from clearsr_core.whole_files import replacing

from . import command_line, model_card, models, run_folder, snapshot
from .base_model import BaseModel
from .clearsr_model import ClearSRModel
from .clip_vision import ClipImagePrompt
from .config import build as build_settings
from .latents import base_hash, weights_hash
from .photographs import Photographs
from .randomness import generator_for

log = logging.getLogger("clearsr.training")


def base_config(model: ClearSRModel) -> BaseConfig:
    """Return the layout of the frozen base."""
    control, vae = model.control.config, model.vae.config
    if vae.norm_num_groups != control.norm_groups:
        raise ValueError(
            f"The autoencoder has {vae.norm_num_groups} norm groups, the UNet {control.norm_groups}: they must agree."
        )
    return BaseConfig(
        control.widths,
        control.head_channels,
        control.context_dim,
        tuple(vae.block_out_channels),
        vae.layers_per_block,
        control.norm_groups,
    )


def lora_tensors(module: torch.nn.Module, rank: int) -> dict[str, Tensor]:
    """Return a LoRA as the file holds it: `<layer>.lora_A.weight`, `<layer>.lora_B.weight`, `<layer>.alpha`."""
    tensors = {name: value.detach() for name, value in models.lora_parameters(module).items()}
    layers = {name.rpartition(".lora_")[0] for name in tensors}
    # Trained with alpha = rank; without the tensor, readers disagree about what a missing alpha means.
    return tensors | {f"{layer}.alpha": torch.tensor(float(rank)) for layer in layers}


def is_contained(model: ClearSRModel) -> bool:
    """Return whether the base goes into the file: it is not of Stable Diffusion 2.1's size, which hosts have."""
    return base_config(model) != SD21_NETWORKS


def latent_rgb(latents: Tensor, images: Tensor) -> tuple[tuple[float, ...], ...]:
    """Fit latent -> RGB for live previews by least squares.

    Args:
        latents: (B, 4, h, w) model units.
        images: (B, 3, 8h, 8w) in [-1, 1].

    Returns:
        4 rows of 3 factors.
    """
    small = torch.nn.functional.avg_pool2d(images, 8)
    solution = torch.linalg.lstsq(latents.movedim(1, -1).reshape(-1, 4), small.movedim(1, -1).reshape(-1, 3)).solution
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
    networks = base_config(model)
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
    notes = json.loads(json.dumps({**training, **made, "versions": model_card.versions()}))
    stored = Checkpoint(config, notes, plain)
    with replacing(path) as unverified:
        checkpoint.write(unverified, stored)
        verify(unverified, stored, path)
    card = model_card.write(path, stored, overwrite_card)
    log.info("Wrote %s (%.1f MB) and %s.", path, path.stat().st_size / 1e6, card.name)
    log.info("Put the file into ComfyUI/models/clearsr; fill in the licence in the card before you share it.")


def verify(path: Path, meant: Checkpoint, target: Path) -> None:
    """Compare a file with what was to be written: configuration, notes, and every number, bit for bit.

    Raises:
        CheckpointError: something differs; the message says what.
    """
    found = checkpoint.read(path)
    differing = [name for name in ("config", "training") if getattr(found, name) != getattr(meant, name)]
    for part in sorted(meant.tensors.keys() | found.tensors.keys()):
        here, there = meant.tensors.get(part, {}), found.tensors.get(part, {})
        for name in sorted(here.keys() | there.keys()):
            same = name in here and name in there and here[name].dtype == there[name].dtype
            if not same or not torch.equal(here[name], there[name]):
                differing.append(f"{part}.{name}".rstrip("."))
    if differing:
        raise CheckpointError(
            f"{target} reads back other than it was written ({', '.join(differing[:3])}; {len(differing)} in all) and "
            "was not put in place. The disk may be damaged: please export to another one."
        )


@dataclass(frozen=True)
class ExportSettings:
    """Which run to export, and where to."""

    run: Path  # out folder of a ClearSR run, finished or not
    out: Path  # the file
    base: Path  # the base model that the run was trained on
    snapshot: Path = Path()  # a snapshot of the run; empty = the newest
    clip_vision: Path = Path()  # as in training; asked for only where the file holds CLIP's projection (patch)
    data: Path = Path()  # photographs for the colours of live previews of a self-contained file; empty = without
    overwrite_card: bool = False  # replace a model card that was edited by hand


def export_run(settings: ExportSettings) -> None:
    """Export a snapshot: its averaged weights where it has some.

    Raises:
        ValueError: the snapshot does not belong to the stage or to the base.
        SnapshotError: there is none, or it cannot be read.
        CheckpointError: as `export`.
    """
    from .clearsr import ClearSRSettings, control_config  # which imports this module

    if settings.out.suffix != ".safetensors":
        raise ValueError(f"--out={settings.out}: ComfyUI lists files that end in .safetensors.")
    path = settings.snapshot if settings.snapshot != Path() else snapshot.latest(settings.run)
    if path is None:
        raise snapshot.SnapshotError(f"--run={settings.run} holds no snapshot (state_*.safetensors).")
    state = snapshot.read(path)
    if "prompt_mode" not in state.settings:
        raise ValueError(f"{path} is no snapshot of the ClearSR stage; only those make a file for ComfyUI.")
    paths = {"base": settings.base, "clip_vision": settings.clip_vision, "out": settings.run}
    trained = build_settings(ClearSRSettings, state.settings, paths)
    kinds = [kind for kind in ("held", "model", "ema") if any(name.startswith(f"{kind}.") for name in state.tensors)]
    weights = {
        name.removeprefix(f"{kind}."): value
        for kind in kinds  # later ones count
        for name, value in state.tensors.items()
        if name.startswith(f"{kind}.")
    }

    base = BaseModel.load(settings.base, trained.base_widths, trained.seed)
    control = control_config(trained, base)
    _check_given(path, state.given, "base model", base_hash(base), f"--base={settings.base}")
    own_encoder = any(name.startswith("image_encoder.") for name in weights)
    clip = None
    if trained.prompt_mode == "patch" and not own_encoder:
        if settings.clip_vision == Path():
            raise ValueError(f"{path} was trained on patches of CLIP, whose projection goes along: give --clip_vision.")
        clip = ClipImagePrompt.load(settings.clip_vision, patch=True, context_dim=control.context_dim)
        _check_given(
            path, state.given, "image encoder of CLIP", weights_hash(clip), f"--clip_vision={settings.clip_vision}"
        )
    mode = trained.prompt_mode if own_encoder or clip is not None else "null"
    model = ClearSRModel(base, control, trained.rank, mode, trained.seed, clip)
    with torch.no_grad():
        for name, parameter in model.trainable().items():
            value = weights.get(name)
            if value is None or value.shape != parameter.shape:
                raise ValueError(f"{path} does not fit --base={settings.base} ({name}); give the base of that run.")
            parameter.copy_(value)

    notes: dict[str, Any] = {
        "settings": state.settings,
        "step": state.step,
        "metrics": _figures(settings.run, state.step),
    }
    notes["weights"] = "averaged" if "ema" in kinds else "of the last step"
    preview = None
    if settings.data != Path():
        photographs = Photographs(settings.data, trained.crop, trained.memory_gb)
        notes |= {"photographs": len(photographs), "megapixels": round(photographs.megapixels)}
        crops = photographs.crops(16, trained.crop, generator_for(trained.seed, -1))
        with torch.no_grad():
            preview = latent_rgb(models.encode(model.vae, crops), crops)
    export(
        model,
        settings.out,
        rank=trained.rank,
        prompt_mode=trained.prompt_mode,
        anchor=trained.anchor,
        training=notes,
        preview=preview,
        hardware="",
        overwrite_card=settings.overwrite_card,
    )


def _check_given(path: Path, given: dict[str, str], what: str, found: str, setting: str) -> None:
    """Refuse a model that is not the one that the run of a snapshot was given."""
    if given.get(what, found) != found:
        raise ValueError(f"{setting} is another {what} than that of the run of {path}. Give the one it was begun with.")


def _figures(run: Path, step: int) -> dict[str, Any]:
    """Return the last validation up to `step` and the mean loss of the hundred steps before it, as far as logged."""
    rows = [row for row in run_folder.rows(run) if row["step"] <= step]
    figures: dict[str, Any] = {}
    losses = [row["loss"] for row in rows if "loss" in row and row["step"] > step - 100]
    if losses:
        figures["mean loss of the last steps"] = sum(losses) / len(losses)
    validations = [row for row in rows if "validation" in row]
    if validations:
        figures |= {"validation": validations[-1]["validation"], "validation at step": validations[-1]["step"]}
    return figures


@command_line.command()
def main(arguments: list[str]) -> int:
    """Export from the command line; return the exit status."""
    export_run(command_line.settings(ExportSettings, arguments, __doc__))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
