"""Convert DiffBIR's public control network of Stable Diffusion 2.1-base into a file that ClearSR Loader opens.

    python -m training.import_control --from=diffbir --weights=v2.pth --base=SD21_BASE --out=diffbir-v2.safetensors

DiffBIR's control network is a ControlNet that reads x_t and the VAE latent of the restored image side by side: DPM with
`control_input` "lr+xt", without window attention, without SPM, and with the text of each conditioning. The weights keep
their values and their precision; only names change, and the first convolution is split in two. docs/FULL_SIZE.md says
where the files come from and where they go.

Needs torch, safetensors and transformers, all of which ComfyUI brings: its own Python can run this file as a script.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import pickle
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

if not __package__:  # run as a script, by a Python that does not look into the current folder
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    __package__ = "training"

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from clearsr_core import checkpoint
from clearsr_core.checkpoint import Checkpoint
from clearsr_core.config import SD21_NETWORKS, ClearSRConfig, ControlConfig, RecommendedSampling
from clearsr_core.key_maps import controlnet_prefixes, rename
from clearsr_core.safetensors_header import FLOATS, read_safetensors_header
from clearsr_core.shapes import Shape, checkpoint_shapes
from clearsr_core.whole_files import replacing

from . import command_line, model_card, provenance
from .base_files import HELP, BaseFacts
from .code_version import code_version

log = logging.getLogger("clearsr.training")

# DiffBIR's README and inference.py at 3f8b530 (v2), inference.py at f754473 (v1, whose prompt is empty).
VERSIONS = {
    "v2": RecommendedSampling("linspace", 50, 4.0, "noise", text=True),
    "v1_general": RecommendedSampling("linspace", 50, 1.0, "noise", text=False),
    "v1_face": RecommendedSampling("linspace", 50, 1.0, "noise", text=False),
}
_FIRST = "input_blocks.0.0"  # convolution of x_t and the condition, side by side
_TEXT_PROJECTION = "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
_FLOAT_TYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
WANTED = "The control network of DiffBIR v2 (v2.pth), v1_general or v1_face can be imported."


@dataclass(frozen=True)
class ImportSettings:
    """What to import, for which base model, and where to."""

    weights: Path  # the public file: v2.pth, v1_general.pth or v1_face.pth, or the same weights as .safetensors
    base: Path  # Stable Diffusion 2.1-base: a .safetensors checkpoint or a diffusers folder, with its text encoder
    out: Path  # the file to write, in ComfyUI/models/clearsr
    from_: Literal["diffbir"] = "diffbir"  # whose layout
    version: str = "v2"  # v2, v1_general or v1_face: their files look alike, and so does v2.1, which cannot be used
    overwrite_card: bool = False  # replace a model card that was edited by hand


class Weights(NamedTuple):
    """A ControlNet's weights in ldm names, each read when it is asked for."""

    shapes: dict[str, Shape]
    dtypes: dict[str, str]  # in the spelling of safetensors
    read: Callable[[str], Tensor]


def import_control(settings: ImportSettings) -> None:
    """Read, check, rename, write, and compare what was written.

    Raises:
        ValueError: the weights or the base are something else, `out` exists, or it cannot be written; one sentence.
    """
    _check_settings(settings)
    log.info("1/4 Reading the names in %s.", settings.weights)
    weights = open_weights(settings.weights)
    log.info("2/4 Reading the empty prompt and the fingerprint of %s.", settings.base)
    config, base = _config(settings)
    sources = _sources(settings.weights, weights, config)
    log.info("3/4 Computing the SHA-256 of %s.", settings.weights)
    notes = _notes(settings, provenance.sha256(settings.weights))
    tensors = {"dpm": _dpm(weights, sources, config.control.latent_channels), "null_text": {"": base.null_text}}
    if base.contained is not None:
        tensors |= {part: base.contained.tensors[part] for part in ("base.unet", "base.vae")}
    log.info("4/4 Writing and comparing %s.", settings.out)
    stored = Checkpoint(config, notes, tensors)
    with replacing(settings.out) as unverified:
        checkpoint.write(unverified, stored)
        checkpoint.verify(unverified, stored, settings.out)
    card = model_card.write(settings.out, stored, settings.overwrite_card)
    log.info("Wrote %s (%.1f MB) and %s.", settings.out, settings.out.stat().st_size / 1e6, card.name)
    log.info("Put the file into ComfyUI/models/clearsr and open the workflow restore_sd21_diffbir.")


def _check_settings(settings: ImportSettings) -> None:
    if "2.1" in settings.version or re.search(r"v2[._-]?1", settings.weights.stem):
        raise ValueError(
            "DiffBIR v2.1 predicts v, on a schedule with zero terminal SNR and for a base model of its own, so it does "
            f"not work with Stable Diffusion 2.1-base. {WANTED}"
        )
    if settings.version not in VERSIONS:
        raise ValueError(f"--version={settings.version}: give one of {', '.join(VERSIONS)}.")
    if settings.out.suffix != ".safetensors":
        raise ValueError(f"--out={settings.out}: ComfyUI lists files that end in .safetensors.")
    if settings.out.exists():
        raise ValueError(f"--out={settings.out} exists. Delete it, or give another name.")
    if not settings.weights.is_file():
        raise ValueError(f"--weights={settings.weights}: there is no such file. {WANTED}")


def _config(settings: ImportSettings) -> tuple[ClearSRConfig, BaseFacts]:
    """Return the configuration of the new file, and what it takes from the base."""
    base = BaseFacts.read(settings.base)
    networks, contained = base.networks, base.contained
    if contained is None and networks != SD21_NETWORKS:
        raise ValueError(f"--base={settings.base} has networks of other sizes than Stable Diffusion 2.1-base. {HELP}")
    control = ControlConfig(
        widths=networks.unet_widths,
        head_channels=networks.head_channels,
        context_dim=networks.context_dim,
        norm_groups=networks.norm_groups,
        control_input="lr+xt",
        control_text="conditioning",
        window_attention=False,
        use_spm=False,
    )
    start = ClearSRConfig(base_fingerprint=base.fingerprint) if contained is None else contained.config
    config = dataclasses.replace(
        start,
        control=control,
        lora_rank=0,
        prompt_mode="null",
        anchor="lr_encoder",
        image_encoder=False,
        clip_width=0,
        recommended=VERSIONS[settings.version],
    )
    return config, base


def _notes(settings: ImportSettings, digest: str) -> dict[str, Any]:
    """Return what the file says about its origin."""
    return {
        "about": (
            f"this is DiffBIR's control network ({settings.version}, Apache-2.0), imported; not a ClearSR model. Its "
            "settings are in the workflow restore_sd21_diffbir"
        ),
        "imported": {
            "network": f"DiffBIR {settings.version}",
            "authors": "XPixelGroup, https://github.com/XPixelGroup/DiffBIR, arXiv 2308.15070",
            "licence": "Apache-2.0",
            "file": settings.weights.name,
            "sha256": digest,
        },
        "code": code_version(),
    }


def open_weights(path: Path) -> Weights:
    """List the weights of a ControlNet file; a pickle is read without running any code in it.

    Wrappers of training (`state_dict`, `module.`) are taken off; of a whole model only its `control_model.` counts.

    Raises:
        ValueError: the file is damaged, cannot be read safely, or is of another kind; one sentence that says which.
    """
    read: Callable[[str], Tensor]
    if path.suffix == ".safetensors":
        header = read_safetensors_header(path, "DiffBIR's control network")
        if "clearsr.format" in header.metadata:
            raise ValueError(f"{path} is a ClearSR file already: put it into ComfyUI/models/clearsr as it is.")
        shapes, dtypes = header.shapes, header.dtypes
        read = functools.partial(_read_tensor, path)
    else:
        table = _read_pickle(path)
        shapes = {key: tuple(value.shape) for key, value in table.items()}
        dtypes = {key: _FLOAT_TYPES.get(value.dtype, str(value.dtype)) for key, value in table.items()}
        read = table.__getitem__
    kind = _other_kind(shapes)
    if kind is not None:
        raise ValueError(f"{path} is {kind}. {WANTED}")
    keys = _unwrapped(shapes)
    return Weights(
        {name: shapes[key] for name, key in keys.items()},
        {name: dtypes[key] for name, key in keys.items()},
        lambda name: read(keys[name]),
    )


def _read_tensor(path: Path, key: str) -> Tensor:
    """Read one tensor of a safetensors file."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return file.get_tensor(key)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}). Please download or copy it again.") from error


def _read_pickle(path: Path) -> dict[str, Tensor]:
    """Read a .pth or .ckpt by torch's loader of weights, which refuses all but tensors and plain containers."""
    with path.open("rb") as file:
        start = file.read(64).lstrip()
    if not start or start.startswith((b"<", b"version https://git-lfs")):
        what = "empty" if not start else "a web page" if start[:1] == b"<" else "a Git LFS pointer"
        raise ValueError(f"{path} is {what}, not the weights. Please download it again.")
    try:
        # The weights are published as a pickle; weights_only refuses all code in it. Memory-mapped, so that each weight
        # is read when it is written, except pickles of old versions of torch, which cannot be.
        loaded: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=start.startswith(b"PK\x03\x04"))
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"a pickle that holds code ({code.group(1)})" if code else "damaged, or a pickle of more than weights"
        raise ValueError(
            f"{path} is {what}, so it was refused, and nothing of it was run. Please get the weights from their "
            "authors, or convert the file to .safetensors where you trust it."
        ) from None
    except Exception as error:  # whatever a damaged archive makes torch raise
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} is damaged or cut off ({first}). Please download or copy it again.") from None
    if isinstance(loaded, Mapping) and isinstance(loaded.get("state_dict"), Mapping):  # Lightning's checkpoint
        loaded = loaded["state_dict"]
    if not isinstance(loaded, Mapping):
        raise ValueError(f"{path} holds {type(loaded).__name__} instead of a table of weights. {WANTED}")
    return {str(key): value for key, value in loaded.items() if isinstance(value, Tensor)}


def _unwrapped(keys: Iterable[str]) -> dict[str, str]:
    """Return the name in a plain ControlNet -> the key in the file."""
    keys = list(keys)
    inside = [key for key in keys if "control_model." in key]
    return {key.removeprefix("module.").removeprefix("control_model."): key for key in inside or keys}


def _other_kind(shapes: Mapping[str, Shape]) -> str | None:
    """Name the files that are often given instead, by the names of their weights."""

    def some(*parts: str) -> bool:
        return any(part in key for key in shapes for part in parts)

    if some("structcond_stage_model.", ".spade."):
        return "StableSR, whose condition enters the UNet through layers of its own"
    if some("image_attentions."):
        return "SeeSR, whose networks also read the tokens of an image"
    if some("pixel_attentions.", "controlnet_cond_embedding.to_rgbs."):
        return "PASD, whose UNet has layers of its own"
    if some("cond_encoder.") and not some("preprocess_model."):
        return "CCSR, which has a condition encoder, a decoder and a sampler of its own"
    if some("lora_", "hada_"):
        return "a LoRA, not a control network"
    if some("controlnet_cond_embedding.", "input_hint_block."):
        widths = {shape[-1] for key, shape in shapes.items() if key.endswith("attn2.to_k.weight")}
        of = {768: " of Stable Diffusion 1.x", 2048: " of SDXL"}.get(max(widths, default=0), "")
        return f"a ControlNet{of} that reads an RGB image; ComfyUI's Load ControlNet Model opens those"
    if not some("zero_convs.0.0.weight"):
        return "no control network in DiffBIR's layout (it has no zero_convs)"
    return None


def _sources(path: Path, weights: Weights, config: ClearSRConfig) -> dict[str, str]:
    """Return weight of DPM -> its name in the file, for all but the half of `conv_in` that DPM holds by itself.

    Raises:
        ValueError: the weights are not those of a DiffBIR control network for this base.
    """
    channels = config.control.latent_channels
    text_width = weights.shapes.get(_TEXT_PROJECTION, (0, 0))[-1]
    if text_width != config.control.context_dim:
        of = {768: "Stable Diffusion 1.x", 2048: "SDXL"}.get(text_width, "another model")
        raise ValueError(f"{path} is a control network of {of} (its text is {text_width} wide). {WANTED}")
    if weights.shapes.get(f"{_FIRST}.weight", (0, 0))[1] == channels:
        raise ValueError(f"{path} is a control network that reads x_t alone, without the latent of an image. {WANTED}")

    wanted, prefixes = checkpoint_shapes(config)["dpm"], controlnet_prefixes(config.control)
    sources = {name: rename(name, prefixes) for name in wanted if not name.startswith("conv_in_lr.")}
    missing = [source for source in sources.values() if source not in weights.shapes]
    extra = sorted(weights.shapes.keys() - set(sources.values()))
    if missing or extra:
        what = f"lacks {len(missing)} weights ({missing[0]})" if missing else f"has {len(extra)} more ({extra[0]})"
        raise ValueError(f"{path} is not DiffBIR's control network: it {what}. {WANTED}")
    for name, source in sources.items():
        out, *sides = wanted[name]
        expected = (out, 2 * channels, *sides[1:]) if name == "conv_in.weight" else (out, *sides)
        if weights.shapes[source] != expected:
            raise ValueError(
                f"{path} holds {source} with the shape {weights.shapes[source]}; for this base model it must be "
                f"{expected}. {WANTED}"
            )
        if weights.dtypes[source] not in FLOATS:
            raise ValueError(f"{path} holds {source} as {weights.dtypes[source]}; {', '.join(FLOATS)} can be imported.")
    return sources


def _dpm(weights: Weights, sources: Mapping[str, str], latent_channels: int) -> dict[str, Tensor]:
    """Return the weights of DPM; the first convolution is split into that of x_t, which keeps the bias, and of x_lr."""
    tensors = {name: weights.read(source) for name, source in sources.items()}
    of_x_t, of_condition = tensors["conv_in.weight"].split(latent_channels, dim=1)
    return tensors | {
        "conv_in.weight": of_x_t.contiguous(),
        "conv_in_lr.weight": of_condition.contiguous(),
        "conv_in_lr.bias": torch.zeros_like(tensors["conv_in.bias"]),
    }


@command_line.command()
def main(arguments: list[str]) -> int:
    """Import from the command line; return the exit status."""
    import_control(command_line.settings(ImportSettings, arguments, __doc__))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
