"""Models of full size made of random numbers: SD 2.1-base, a ClearSR file for it, and CLIP ViT-H.

    python -m training.full_size --out=FOLDER [--parts=base,clearsr,clip_vision] [--seed=0]

They show shapes, memory and speed where the real weights are not at hand; their pictures mean nothing. The folder is
laid out like ComfyUI/models and the files have the names that workflows/api/clearsr_x4_sd21.json asks for, so that it
runs as it ships (`python -m tools.full_size`). One seed and one version of torch give the same numbers. The three files
take 6.3 GB; making them takes 10 GB of memory and a few minutes.
"""

from __future__ import annotations

import logging
import math
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from clearsr_core.config import SD21_NETWORKS, BaseConfig, ClearSRConfig, ControlConfig
from clearsr_core.key_maps import unet_to_host, vae_to_host
from clearsr_core.safetensors_header import read_safetensors_header
from clearsr_core.shapes import checkpoint_shapes, unet_shapes, vae_shapes
from clearsr_core.whole_files import replacing

from . import command_line
from .base_model import BaseModel
from .clearsr_file import export
from .clearsr_model import ClearSRModel
from .openclip import TextSizes, text_shapes
from .single_file import SPREAD, TEXT, UNET, VAE

log = logging.getLogger("clearsr.training")

# Below ComfyUI/models, as the shipped workflow names them.
FILES = {
    "base": "checkpoints/v2-1_512-ema-pruned.safetensors",
    "clearsr": "clearsr/clearsr-sd21.safetensors",
    "clip_vision": "clip_vision/CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors",
}
NOTE = "Random weights, not trained: for measuring ClearSR at full size."
RANK = 16  # of the paper's LoRAs
_GAIN = 0.3  # of what an untrained ClearSR model has at zero: its control is felt, and does not drown the UNet
_V_PREDICTION_BIAS = 0.2


@dataclass(frozen=True)
class FullSizeSettings:
    """What to make, and where."""

    out: Path  # a folder like ComfyUI/models
    parts: tuple[str, ...] = tuple(FILES)  # which files to make
    seed: int = 0  # of the random weights
    v_prediction: bool = False  # a base that ComfyUI takes for SD 2.1-768, to see that it is refused


def _vit_h() -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=1280,
        intermediate_size=5120,
        num_hidden_layers=32,
        num_attention_heads=16,
        image_size=224,
        patch_size=14,
        projection_dim=1024,
        hidden_act="gelu",
    )


@dataclass(frozen=True)
class Sizes:
    """Sizes of everything made here; tests make small ones."""

    base: BaseConfig = SD21_NETWORKS
    text: TextSizes = field(default_factory=TextSizes)
    vision: CLIPVisionConfig = field(default_factory=_vit_h)
    rank: int = RANK


def make(settings: FullSizeSettings, sizes: Sizes | None = None) -> None:
    """Write the files that `settings` name, each whole or not at all.

    Raises:
        ValueError: a part has no such name, a file is there already, or the disk is too full; one sentence.
        CheckpointError: the disk gives back other bytes than were written.
    """
    sizes = sizes or Sizes()
    unknown = [part for part in settings.parts if part not in FILES]
    if unknown or not settings.parts:
        raise ValueError(f"--parts={','.join(settings.parts)}: give some of {', '.join(FILES)}.")
    paths = {part: settings.out / FILES[part] for part in FILES}
    for part in settings.parts:
        if paths[part].exists():
            raise ValueError(f"{paths[part]} is there already: delete it, or give another --out.")
    if "clearsr" in settings.parts and "base" not in settings.parts and not paths["base"].is_file():
        raise ValueError(f"A ClearSR file needs its base, and {paths['base']} is not there: add base to --parts.")
    settings.out.mkdir(parents=True, exist_ok=True)
    check_space(settings.out, sum(expected_bytes(sizes)[part] for part in settings.parts))

    if "base" in settings.parts:
        log.info("Drawing the base model.")
        _write(paths["base"], base_tensors(sizes, settings.seed, settings.v_prediction))
    if "clearsr" in settings.parts:
        log.info("Drawing DPM, SPM and both LoRAs for it.")
        write_clearsr(paths["clearsr"], paths["base"], sizes, settings.seed)
    if "clip_vision" in settings.parts:
        log.info("Drawing the CLIP vision model.")
        _write(paths["clip_vision"], vision_tensors(sizes, settings.seed))
    for part in settings.parts:
        log.info("%s: %s", paths[part], counted(paths[part]))


def control_config(networks: BaseConfig) -> ControlConfig:
    """Return DPM and SPM of the paper for a base."""
    return ControlConfig(
        widths=networks.unet_widths,
        head_channels=networks.head_channels,
        context_dim=networks.context_dim,
        norm_groups=networks.norm_groups,
    )


def parameters(sizes: Sizes) -> dict[str, int]:
    """Return how many numbers each network has, without making any."""
    config = ClearSRConfig(control=control_config(sizes.base), lora_rank=sizes.rank, prompt_mode="pooled")
    lora = {
        part: {name: shape for name, shape in lora_part.items() if not name.endswith(".alpha")}
        for part, lora_part in checkpoint_shapes(config).items()
        if part.endswith("_lora")
    }
    tables = {
        "UNet": unet_shapes(config.control),
        "VAE": vae_shapes(sizes.base),
        "text encoder": text_shapes(sizes.text),
        "DPM": checkpoint_shapes(config)["dpm"],
        "SPM": checkpoint_shapes(config)["spm"],
        "decoder LoRA": lora["unet_lora"],
        "encoder LoRA": lora["vae_lora"],
        "CLIP vision": {name: tuple(value.shape) for name, value in _vision(sizes.vision).items()},
    }
    return {name: sum(map(math.prod, shapes.values())) for name, shapes in tables.items()}


def expected_bytes(sizes: Sizes) -> dict[str, int]:
    """Return the size of each file without its header: half precision, the ClearSR file float32 (decision 0014)."""
    count = parameters(sizes)
    return {
        "base": 2 * (count["UNet"] + count["VAE"] + count["text encoder"]),
        "clearsr": 4 * (count["DPM"] + count["SPM"] + count["decoder LoRA"] + count["encoder LoRA"]),
        "clip_vision": 2 * count["CLIP vision"],
    }


def check_space(folder: Path, needed: int) -> None:
    """Refuse to begin what the disk cannot hold."""
    free = shutil.disk_usage(folder).free
    if free < 1.02 * needed:
        raise ValueError(
            f"--out={folder}: {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free on that disk. Make room, "
            "or give a folder on another one."
        )


def base_tensors(sizes: Sizes, seed: int, v_prediction: bool = False) -> dict[str, Tensor]:
    """Draw a checkpoint in the original layout, float16, with OpenCLIP as its text encoder."""
    base, control = BaseModel.random(sizes.base, seed), control_config(sizes.base)
    for network in (base.unet, base.vae):
        network.half()
    tensors = {UNET + name: value for name, value in unet_to_host(base.unet.state_dict(), control).items()}
    tensors |= {VAE + name: value for name, value in vae_to_host(base.vae.state_dict(), sizes.base).items()}
    generator = torch.Generator().manual_seed(seed)
    tensors |= {TEXT + name: value for name, value in _drawn(text_shapes(sizes.text), generator).items()}
    if v_prediction:  # what hosts tell it by is the spread of this bias, which is zero here
        bias = tensors[UNET + SPREAD]
        tensors[UNET + SPREAD] = torch.full_like(bias, _V_PREDICTION_BIAS) * (1 - 2 * (torch.arange(len(bias)) % 2))
    return tensors


def write_clearsr(path: Path, base_path: Path, sizes: Sizes, seed: int) -> None:
    """Write a ClearSR file for a base, by the code that training writes it with.

    What a new model has at zero (output convolutions, window attention, LoRA B) is drawn, so that everything acts.
    """
    if sizes.base == SD21_NETWORKS:
        base = BaseModel.load(base_path)
    else:
        base = BaseModel.from_single_file(base_path, sizes.base)
    model = ClearSRModel(base, control_config(sizes.base), sizes.rank, "null", seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.trainable().values():
            if parameter.ndim > 1 and not parameter.any():
                spread = _GAIN / math.sqrt(parameter[0].numel())
                parameter.copy_(spread * torch.randn(parameter.shape, generator=generator))
    notes = {"note": NOTE, "seed": seed}
    export(model, path, rank=sizes.rank, prompt_mode="pooled", anchor="lr_encoder", training=notes)


def vision_tensors(sizes: Sizes, seed: int) -> dict[str, Tensor]:
    """Draw a CLIP vision model in transformers' names, float16."""
    shapes = {name: tuple(value.shape) for name, value in _vision(sizes.vision).items()}
    return _drawn(shapes, torch.Generator().manual_seed(seed + 1))


def _vision(config: CLIPVisionConfig) -> dict[str, Tensor]:
    with torch.device("meta"):
        return CLIPVisionModelWithProjection(config).state_dict()


def _drawn(shapes: dict[str, tuple[int, ...]], generator: torch.Generator) -> dict[str, Tensor]:
    """Draw weights that keep the size of what passes through them: norms at identity, biases 0; float16."""
    tensors: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        if len(shape) > 1:
            tensors[name] = (torch.randn(shape, generator=generator) / math.sqrt(math.prod(shape[1:]))).half()
        elif name.endswith("bias"):
            tensors[name] = torch.zeros(shape, dtype=torch.float16)
        else:
            tensors[name] = torch.ones(shape, dtype=torch.float16)
    return tensors


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file and put it in place when it is whole."""
    with replacing(path) as unfinished:
        save_file({name: value.contiguous() for name, value in tensors.items()}, unfinished, {"note": NOTE})


def counted(path: Path) -> str:
    """Say how many numbers each part of a file has, by its header."""
    counts: dict[str, int] = {}
    for name, shape in read_safetensors_header(path, NOTE).shapes.items():
        part = next((part for part in (UNET, VAE, TEXT) if name.startswith(part)), name.split(".")[0])
        counts[part] = counts.get(part, 0) + math.prod(shape)
    listed = ", ".join(f"{part.rstrip('.')} {count / 1e6:.1f} M" for part, count in counts.items())
    return f"{path.stat().st_size / 1e9:.2f} GB; {listed}"


@command_line.command()
def main(arguments: list[str]) -> int:
    """Run from the command line; return the exit status."""
    make(command_line.settings(FullSizeSettings, arguments, __doc__))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
