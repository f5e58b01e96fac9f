"""A run as it stands, as the file that ComfyUI loads.

    python -m training.export --run=runs/nano --base=runs/nano_base --out=nano.safetensors

exports the newest snapshot of a run, without training further. A finished run has done so by itself.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import command_line, models, run_folder, snapshot
from .base_model import BaseModel
from .clearsr import ClearSRSettings, control_config, noted
from .clearsr_file import export, latent_rgb
from .clearsr_model import ClearSRModel
from .clip_vision import ClipImagePrompt
from .config import build as build_settings
from .latents import base_hash, weights_hash
from .photographs import Photographs
from .randomness import generator_for

log = logging.getLogger("clearsr.training")


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
    if settings.out.suffix != ".safetensors":
        raise ValueError(f"--out={settings.out}: ComfyUI lists files that end in .safetensors.")
    path = settings.snapshot if settings.snapshot != Path() else snapshot.latest(settings.run)
    if path is not None and path.resolve().parent != settings.run.resolve():
        raise ValueError(
            f"--snapshot={path} is none of --run={settings.run}, whose log goes into the card. Give both of one run."
        )
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

    notes = {**noted(state.notes, settings.base), "metrics": _figures(settings.run, state.step)}
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
