"""The model card beside an exported file: what it is, how it was made, how good it is, how to use it."""

from __future__ import annotations

import hashlib
import importlib.metadata
import logging
import os
import re
from pathlib import Path
from typing import Any

import torch

from clearsr_core.checkpoint import Checkpoint
from clearsr_core.config import ClearSRConfig, ControlConfig
from clearsr_core.whole_files import replacing

from .config import to_toml

log = logging.getLogger("clearsr.training")

_PARTS = {
    "base.unet": "UNet (base)",
    "base.vae": "autoencoder (base)",
    "dpm": "DPM",
    "spm": "SPM",
    "unet_lora": "LoRA of the UNet's decoder",
    "vae_lora": "LoRA of the VAE's encoder",
    "image_encoder": "image prompt encoder",
    "image_projection": "projection of CLIP's patches",
    "null_text": "empty prompt",
}
_SEAL = "<!-- Written by training.export; sha256 of what is above: {digest}. A card that was edited is kept. -->\n"


def versions() -> dict[str, str]:
    """Return the versions of the packages that decide what a training run computes."""
    return {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "peft")}


def hardware(device: torch.device) -> str:
    """Return what `device` is, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{os.cpu_count()} CPU cores" if device.type == "cpu" else device.type


def write(file: Path, stored: Checkpoint, overwrite: bool = False) -> Path:
    """Write the card of `file` beside it, as .md: whole or not at all.

    Args:
        file: the exported checkpoint.
        stored: what is in it.
        overwrite: replace a card that somebody has edited or written, too.

    Returns:
        The path of the card, written or kept.
    """
    path = file.with_suffix(".md")
    if path.exists() and not overwrite and _edited(path.read_text(encoding="utf-8", errors="replace")):
        log.warning("%s was edited by hand and is kept as it is; give --overwrite_card=true for a new one.", path)
        return path
    text = card(file.name, file.stat().st_size, stored)
    with replacing(path) as unfinished:
        unfinished.write_text(text + _SEAL.format(digest=_digest(text)), encoding="utf-8", newline="\n")
    return path


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _edited(text: str) -> bool:
    """Say whether a card is not, to the letter, what `write` has left."""
    above, seal, _ = text.rpartition(_SEAL.partition("{")[0])
    return not seal or text != above + _SEAL.format(digest=_digest(above))


def card(name: str, size: int, stored: Checkpoint) -> str:
    """Return the card as Markdown.

    Args:
        name: of the file.
        size: of the file, in bytes.
        stored: what is in it.
    """
    config, training = stored.config, stored.training
    imported: dict[str, str] | None = training.get("imported")
    counts = {
        part: sum(tensor.numel() for key, tensor in stored.tensors[part].items() if not key.endswith(".alpha"))
        for part in _PARTS
        if part in stored.tensors
    }
    dtype = str(next(iter(stored.tensors["null_text"].values())).dtype).removeprefix("torch.")
    facts = [
        ("Task", "enlarging small, blurred, noisy or compressed photographs four times"),
        ("Method", imported["network"] if imported else "ClearSR (arXiv 2410.14279)"),
        ("Base", _base(config)),
        ("File", f"safetensors, {dtype}, {size / 1e6:.1f} MB"),
        ("Parameters", f"{sum(counts.values()) / 1e6:.2f} M"),
        (
            "Licence",
            f"{imported['licence']}; the base model has its own"
            if imported
            else "**to be filled in** (it also depends on the base model and on the photographs)",
        ),
    ]
    parts = [(_PARTS[part], f"{count:,}") for part, count in counts.items()]
    sections = [
        f"# {Path(name).stem}\n\n{_what(imported)}\n\n{_table(('', ''), facts)}",
        f"## Use\n\n{_use(name, config, imported)}",
        "## Intended use and limits\n\n"
        "For making photographs larger and clearer. Like every diffusion upscaler it invents detail: its pictures are\n"
        "no evidence, no basis of a diagnosis, and no means to identify people. What it has not seen in training it\n"
        "restores worst; look at faces and text before you show them. Other factors than four work, but it was not\n"
        "trained for them.\n",
        f"## Configuration\n\n{_method(config, training.get('settings', {}))}",
        f"## Parameters\n\n{_table(('Part', 'Numbers'), parts)}",
    ]
    if imported:
        sections.append(f"## Origin\n\n{_table(('', ''), _origin(training))}")
    else:
        sections.append(f"## Training\n\n{_training(training)}")
        sections.append(f"## Figures\n\n{_figures(training.get('metrics', {}))}")
    return "\n".join(sections) + "\n"


def _what(imported: dict[str, str] | None) -> str:
    if not imported:
        return "A ClearSR model for ComfyUI."
    return (
        f"The control network of {imported['network']} as a file for the ClearSR nodes of ComfyUI. It is not a ClearSR "
        "model:\nit has neither SPM nor window attention nor LoRA. The weights are unchanged; only their names differ."
    )


def _origin(training: dict[str, Any]) -> list[tuple[str, str]]:
    imported = training["imported"]
    return [
        ("Network", imported["network"]),
        ("Authors", imported["authors"]),
        ("Imported file", f"`{imported['file']}`"),
        ("SHA-256 of that file", f"`{imported['sha256']}`"),
        ("Code", f"version {training['code']}"),
    ]


def _table(head: tuple[str, str], rows: list[tuple[str, str]]) -> str:
    return (
        "\n".join([f"| {head[0]} | {head[1]} |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows)]) + "\n"
    )


def _base(config: ClearSRConfig) -> str:
    if config.base is not None:
        widths = ", ".join(map(str, config.base.unet_widths))
        return f"inside the file: a UNet of widths {widths} and its autoencoder"
    if config.base_fingerprint:
        return f"Stable Diffusion 2.1-base, not inside; fingerprint `{config.base_fingerprint[:40]}...`"
    return "Stable Diffusion 2.1-base, not inside; fingerprint not recorded"


def _needs_clip(config: ClearSRConfig) -> bool:
    return config.prompt_mode != "null" and not config.image_encoder


def _use(name: str, config: ClearSRConfig, imported: dict[str, str] | None) -> str:
    steps = [f"Put `{name}` into `ComfyUI/models/clearsr` and choose it in **ClearSR Loader**."]
    if config.base is None:
        steps.append("Connect MODEL and VAE of Stable Diffusion 2.1-base (Load Checkpoint) to the loader.")
    else:
        steps.append("Nothing else is needed: leave the loader's model and vae unconnected.")
    if _needs_clip(config):
        steps.append("Connect CLIP Vision Encode (CLIP ViT-H/14, `crop = none`, on the IMAGE of LR Latent Encode).")
    if imported:
        return _numbered([*steps, "Open the workflow `restore_sd21_diffbir`, which has the settings it was made for."])
    steps.append(
        "LR Latent Encode, DPM/SPM Control Apply, LSA KSampler, VAE Decode, ClearSR Color Fix: the workflow "
        + ("`clearsr_x4`." if config.base is not None else "`clearsr_x4_sd21`.")
    )
    return _numbered(steps)


def _numbered(steps: list[str]) -> str:
    return "\n".join(f"{number}. {step}" for number, step in enumerate(steps, start=1)) + "\n"


def _method(config: ClearSRConfig, settings: dict[str, Any]) -> str:
    control = config.control
    networks = " and ".join(name for name, used in (("DPM", control.use_dpm), ("SPM", control.use_spm)) if used)
    text = "" if control.control_text == "null" else " It reads the text of each conditioning."
    seen = "x_lr alone" if control.control_input == "lr" else "the noisy latent with x_lr added"
    time = "at every step anew" if control.control_time == "t" else f"once, at timestep {control.fixed_timestep}"
    prompts = {
        "pooled": "one token of the whole picture",
        "patch": "a token for every patch of the picture",
        "null": "none, the empty prompt",
    }
    maker = ""
    if config.prompt_mode != "null":
        maker = ", made by the file's own encoder" if config.image_encoder else ", made by CLIP ViT-H/14"
    # A LoRA that training held at zero is in the file all the same.
    places = {"vae_lora": "the VAE's encoder", "unet_lora": "the attention of the UNet's decoder"}
    adapted = [key for key in places if config.lora_rank and settings.get(key, True)]
    with_lora = config.anchor == "lr_encoder" and "vae_lora" in adapted
    anchor = "the encoder with LoRA" if with_lora else "the plain encoder"
    lines = [
        f"Control by {networks}, which see {seen}; computed {time}.{text}",
        _windows(control),
        f"LoRA of rank {config.lora_rank} on {' and on '.join(places[key] for key in adapted)}."
        if adapted
        else "No LoRA.",
        f"Image prompt: {prompts[config.prompt_mode]}{maker}.",
        f"Start and latent space adjustment use x_lr of {anchor}.",
    ]
    return "\n".join(f"- {line}" for line in lines) + "\n"


def _windows(control: ControlConfig) -> str:
    if not (control.use_dpm and control.window_attention):
        return "No cross-attention to x_lr."
    if not control.query_windows:
        return "Cross-attention to x_lr over the whole picture."
    windows = ", ".join(map(str, control.query_windows))
    bias = "with aligned relative bias" if control.relative_bias == "aligned" else "without relative bias"
    return f"DPM attends to x_lr in windows of {windows} tokens per level, {bias}."


def _training(training: dict[str, Any]) -> str:
    settings = training.get("settings", {})
    rows = []
    if "photographs" in training:
        size = f" ({training['megapixels']} megapixels)" if "megapixels" in training else ""
        source = f", of `{training['data']}`" if "data" in training else ""
        rows.append(("Photographs", f"{training['photographs']}{size}{source}"))
    steps = training.get("step", settings.get("steps"))
    if steps is not None:
        rows.append(("Steps", f"{steps:,}"))
        if "batch" in settings:
            rows.append(("Pairs drawn", f"{steps * settings['batch']:,} of {settings.get('crop', '?')} pixels"))
    averaged = "averaged" if settings.get("ema") else "of the last step"
    rows.append(("Weights", training.get("weights", averaged if settings else "not recorded")))
    begun = training.get("begun_from")
    if begun:
        rows.append(("Begun from", _begun_from(begun)))
    nothing = hashlib.sha256().hexdigest()  # of a CLIP that is not there
    given = {what: digest for what, digest in training.get("given", {}).items() if digest != nothing}
    rows += [(what[:1].upper() + what[1:], f"SHA-256 {digest[:12]}...") for what, digest in given.items()]
    rows.append(("Hardware", training.get("hardware") or "not recorded"))
    if "code" in training:
        rows.append(("Code", f"version {training['code']}"))
    made_with = training.get("versions", {})
    rows.append(("Versions", ", ".join(f"{key} {value}" for key, value in made_with.items()) or "not recorded"))
    text = _table(("", ""), rows)
    if settings:
        listed = to_toml(dict(sorted(settings.items())))
        text += f"\nSettings of the last stage, a preset but for its paths:\n\n```toml\n{listed}```\n"
    return text + "\nWhere the photographs come from and under which licences: **to be filled in**.\n"


def _begun_from(begun: dict[str, str]) -> str:
    if "weights" in begun:
        return f"{begun['name']}, SHA-256 of its weights {begun['weights'][:12]}..."
    whose = ", ".join(begun[key] for key in ("network", "licence") if key in begun)
    source = f"{begun['name']} ({whose})" if whose else begun["name"]
    return f"{begun['part']} of {source}, SHA-256 {begun['sha256'][:12]}..."


def _figures(metrics: dict[str, Any]) -> str:
    rows = [
        (" ".join(re.sub(r"[_.]", " ", name).split()), f"{value:.4f}" if isinstance(value, float) else str(value))
        for name, value in _flat(metrics)
    ]
    measured = _table(("During training", ""), rows) if rows else "None were recorded during training.\n"
    return f"{measured}\nOn other pictures: `python -m training.evaluate` (**to be filled in**).\n"


def _flat(table: dict[str, Any], before: str = "") -> list[tuple[str, Any]]:
    flat = []
    for key, value in table.items():
        flat += _flat(value, f"{before}{key}.") if isinstance(value, dict) else [(before + key, value)]
    return flat
