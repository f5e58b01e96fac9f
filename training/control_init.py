"""Warm start of stage 3: DPM begins with the weights of an imported control network (`--control_init`).

Only a file of `training.import_control` will do: DPM alone, which reads x_t and the condition, without window
attention. Everything else of the run (SPM, window attention, LoRAs, image encoder) begins as without it.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from clearsr_core import checkpoint
from clearsr_core.checkpoint import Header
from clearsr_core.config import LATENT_SCALE, ControlConfig
from clearsr_core.control import ClearSRControl
from clearsr_core.safetensors_header import read_safetensors_header

from . import provenance

MADE_BY = "python -m training.import_control makes one"
# An imported control network is this, and no trained file of ours is: those have LoRAs.
_IMPORTED = {
    "use_dpm": True,
    "use_spm": False,
    "window_attention": False,
    "control_input": "lr+xt",
}
_SIZES = (
    *("widths", "attention_levels", "layers_per_block"),
    *("head_channels", "context_dim", "latent_channels", "norm_groups"),
)


def check(path: Path, control: ControlConfig) -> Header:
    """Refuse a file whose DPM cannot start a run with `control`; only the header of the file is read.

    Raises:
        ValueError: it is missing, damaged, something else, or of other sizes; one sentence.
    """
    if not path.is_file():
        raise ValueError(f"--control_init={path}: there is no such file; {MADE_BY}.")
    if "clearsr.format" not in read_safetensors_header(path, f"an imported control network ({MADE_BY})").metadata:
        raise ValueError(f"--control_init={path} is not a ClearSR file; {MADE_BY} of DiffBIR's weights.")
    header = checkpoint.read_header(path)
    config = header.config
    found = {name: getattr(config.control, name) for name in _IMPORTED} | {"lora_rank": config.lora_rank}
    others = [
        f"{name} {found[name]!r}" for name, value in {**_IMPORTED, "lora_rank": 0}.items() if found[name] != value
    ]
    if others:
        raise ValueError(
            f"--control_init={path} is a ClearSR file, but not an imported control network ({', '.join(others)}); "
            "to train a ClearSR file further, give it as --init."
        )
    theirs = {name: getattr(config.control, name) for name in _SIZES} | {"latent_scale": config.latent_scale}
    ours = {name: getattr(control, name) for name in _SIZES} | {"latent_scale": LATENT_SCALE}
    differing = [f"{name} {theirs[name]} instead of {ours[name]}" for name in theirs if theirs[name] != ours[name]]
    if differing:
        raise ValueError(
            f"--control_init={path} does not fit the base model of this run: it has {', '.join(differing)}."
        )
    return header


def start_dpm(control: ClearSRControl, path: Path) -> dict[str, str]:
    """Copy the imported weights into DPM, in place.

    Returns:
        The record of the first weights for the run's notes: file, SHA-256, imported network, licence.

    Raises:
        ValueError: as `check`, or a weight is not a finite number.
    """
    header = check(path, control.config)
    weights = checkpoint.read(path).tensors["dpm"]
    if control.config.control_input == "lr":
        weights = _without_x_t(weights)
    assert control.dpm is not None  # a run without DPM is refused with its settings
    parameters = dict(control.dpm.named_parameters())
    with torch.no_grad():
        for name, value in weights.items():
            parameters[name].copy_(value)
    imported = header.training.get("imported", {})
    origin = {name: str(imported[name]) for name in ("network", "licence") if name in imported}
    return {"name": path.name, "part": "DPM", **origin, "sha256": provenance.sha256(path)}


def _without_x_t(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights for a DPM that reads x_lr alone.

    The bias stays: it belongs to the sum conv_in(x_t) + conv_in_lr(x_lr), and the import put it into conv_in only
    because it had to go somewhere. What is left is the imported network at x_t = 0.
    """
    kept = {name: value for name, value in weights.items() if not name.startswith("conv_in_lr.")}
    return kept | {
        "conv_in.weight": weights["conv_in_lr.weight"],
        "conv_in.bias": weights["conv_in.bias"] + weights["conv_in_lr.bias"],
    }
