"""What the files of a base model say about it, without building its networks: kind, sizes, empty prompt, fingerprint.

Needs neither diffusers nor peft, so that `training.import_control` runs in the Python of a ComfyUI.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from clearsr_core import checkpoint
from clearsr_core.checkpoint import Checkpoint
from clearsr_core.config import SD21_NETWORKS, BaseConfig
from clearsr_core.fingerprint import SAMPLED, unet_fingerprint
from clearsr_core.safetensors_header import read_safetensors_header

from . import empty_prompt
from .single_file import HELP, ZERO_SNR, read_part_of_single_file, refuse_v_prediction

NULL_TEXT_FILE = "null_text.safetensors"
RANDOM = Path("random")
SPREAD_IN_DIFFUSERS = "up_blocks.3.attentions.2.transformer_blocks.0.norm1.bias"


@dataclass(frozen=True)
class BaseFacts:
    """What a file made for a base model records of it."""

    networks: BaseConfig
    null_text: Tensor  # (tokens, context width)
    fingerprint: str  # of the UNet; "" where the base goes into the new file
    contained: Checkpoint | None = None  # a self-contained ClearSR file, whose base goes into the new file

    @classmethod
    def read(cls, source: Path) -> BaseFacts:
        """Read a diffusers folder, a checkpoint in the original layout, or a self-contained ClearSR file.

        Of the first two only the weights that are needed are read; the text encoder alone is built, if the folder
        stores no empty prompt.

        Raises:
            ValueError: it is something else; one sentence that says what, and what to do.
        """
        if not source.exists():
            raise ValueError(f"--base={source}: there is no such file or folder. {HELP}")
        networks = networks_of(source)
        if source.is_file() and "clearsr.format" in read_safetensors_header(source).metadata:
            stored = checkpoint.read(source)
            return cls(networks, stored.tensors["null_text"][""], "", stored)
        if source.is_dir():
            null_text = folder_null_text(source)
            sampled = _folder_weights(source / "unet", (*SAMPLED, SPREAD_IN_DIFFUSERS))
        else:
            sampled, text = read_part_of_single_file(source, networks, (*SAMPLED, SPREAD_IN_DIFFUSERS))
            null_text = text_file_null_text(source, text)
        refuse_v_prediction(source, sampled.get(SPREAD_IN_DIFFUSERS), networks.unet_widths)
        missing = [name for name in SAMPLED if name not in sampled]
        if missing:
            raise ValueError(f"--base={source} lacks {missing[0]} in its UNet. {HELP}")
        return cls(networks, null_text, unet_fingerprint(sampled))


def _folder_weights(folder: Path, names: Iterable[str]) -> dict[str, Tensor]:
    """Return the named weights of a network in diffusers' layout, however many files it lies in."""
    wanted, found = set(names), {}
    try:
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt", device="cpu") as file:
                found |= {name: file.get_tensor(name) for name in wanted & set(file.keys()) - found.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{folder} is damaged ({error}). Please download or copy it again.") from error
    return found


def text_file_null_text(path: Path, text: Mapping[str, Tensor]) -> Tensor:
    """Return the empty prompt by the text encoder of a checkpoint in the original layout, (tokens, context width).

    Raises:
        ValueError: it has no text encoder, or none that can be used.
    """
    if not text:
        raise ValueError(
            f"{path} has no text encoder (cond_stage_model.model), which the empty prompt comes from. Please give "
            "a checkpoint that has one, or a folder in diffusers' layout with null_text.safetensors."
        )
    try:
        return empty_prompt.from_openclip(text)
    except (KeyError, RuntimeError, ValueError) as error:
        raise ValueError(f"{path} has a text encoder that cannot be used ({error}). {HELP}") from error


def layout(unet: Mapping[str, Any], vae: Mapping[str, Any]) -> BaseConfig:
    """Return the sizes of a base model's networks, from diffusers' configurations of the two.

    Raises:
        ValueError: they do not go together, or no host could open them.
    """
    norm_groups = unet["norm_num_groups"]
    of_vae = vae.get("norm_num_groups", 32)  # diffusers' default, which older configurations leave out
    if of_vae != norm_groups:
        raise ValueError(
            f"The autoencoder has {of_vae} norm groups, the UNet {norm_groups}: they must agree. Train the base model "
            f"with --norm_groups={of_vae}."
        )
    of_vae = vae.get("latent_channels", 4)
    if of_vae != unet["in_channels"]:
        raise ValueError(
            f"The autoencoder's latents have {of_vae} channels, the UNet reads {unet['in_channels']}: they belong to "
            "different models."
        )
    widths = tuple(unet["block_out_channels"])
    # diffusers keeps the number of heads under this name, one for all levels or one each.
    heads = unet["attention_head_dim"]
    return BaseConfig(
        widths,
        widths[0] // (heads if isinstance(heads, int) else heads[0]),
        unet["cross_attention_dim"],
        tuple(vae["block_out_channels"]),
        vae["layers_per_block"],
        norm_groups,
        of_vae,
    )


def random_networks(widths: tuple[int, ...]) -> BaseConfig:
    """Return SD 2.1's networks with another UNet: as wide as `widths`, autoencoder in proportion, text 1024 wide."""
    if widths == SD21_NETWORKS.unet_widths:
        return SD21_NETWORKS
    if len(widths) != len(SD21_NETWORKS.unet_widths) or any(width < 32 for width in widths):
        raise ValueError(f"--base_widths={','.join(map(str, widths))}: give four numbers of at least 32.")
    head = next((channels for channels in (64, 32) if all(width % channels == 0 for width in widths)), 32)
    first = max(32, SD21_NETWORKS.vae_widths[0] * widths[0] // SD21_NETWORKS.unet_widths[0] // 32 * 32)
    try:
        return BaseConfig(widths, head, SD21_NETWORKS.context_dim, (first, 2 * first, 4 * first, 4 * first), 2)
    except ValueError as error:
        raise ValueError(f"--base_widths={','.join(map(str, widths))}: {error}.") from error


def networks_of(source: Path, widths: tuple[int, ...] = SD21_NETWORKS.unet_widths) -> BaseConfig:
    """Return the sizes of the networks that `BaseModel.load` would read, without reading their weights.

    Raises:
        ValueError: there is no such base model.
    """
    if source == RANDOM and not source.exists():
        return random_networks(widths)
    if source.is_dir():
        configs = []
        for part in ("unet", "vae"):
            check_part(source, part)
            configs.append(json.loads((source / part / "config.json").read_text(encoding="utf-8")))
        check_unet_config(source)
        return layout(*configs)
    header = read_safetensors_header(source, "Stable Diffusion 2.1-base")
    if "clearsr.format" not in header.metadata:
        return SD21_NETWORKS
    networks = checkpoint.read(source).config.base
    if networks is None:
        raise ValueError(f"--base={source} is a ClearSR file without a base model. {HELP}")
    return networks


def check_part(folder: Path, part: str) -> None:
    """Refuse a folder whose part is missing or has no safetensors; then whole files, because diffusers says less."""
    path = folder / part
    if not (path / "config.json").is_file():
        raise ValueError(
            f"--base={folder} has no {part}/config.json. Give a folder in diffusers' layout, the out folder of a "
            "finished base stage, a .safetensors checkpoint, or --base=random for a trial run."
        )
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise ValueError(f"--base={folder} has no .safetensors in {part}; pickles (.bin, .ckpt) are not read.")
    for file in files:
        read_safetensors_header(file, f"{part} of Stable Diffusion 2.1-base")


def check_unet_config(folder: Path) -> None:
    """Tell the models that are often given instead by their configuration, before gigabytes are read."""
    config = json.loads((folder / "unet" / "config.json").read_text(encoding="utf-8"))
    found = None
    if config.get("addition_embed_type") == "text_time" or (folder / "text_encoder_2").exists():
        found = "SDXL"
    elif config.get("cross_attention_dim") == 768:
        found = "Stable Diffusion 1.x (its text is 768 wide)"
    elif config.get("in_channels", 4) != config.get("out_channels", 4):
        found = f"an inpainting, depth or edit model with {config['in_channels']} input channels"
    elif not config.get("use_linear_projection", False) or config.get("class_embed_type") is not None:
        found = "no Stable Diffusion 2 model, by the configuration of its UNet"
    scheduler = folder / "scheduler" / "scheduler_config.json"
    if found is None and scheduler.is_file():
        settings = json.loads(scheduler.read_text(encoding="utf-8"))
        prediction = settings.get("prediction_type", "epsilon")
        if prediction != "epsilon":
            found = f"a model with {prediction} (Stable Diffusion 2.1-768 is one); ClearSR needs epsilon"
        elif settings.get("rescale_betas_zero_snr", False):
            found = f"a model with {ZERO_SNR}"
    if found is not None:
        raise ValueError(f"--base={folder} is {found}. {HELP}")


def folder_null_text(folder: Path) -> Tensor:
    """Return the empty prompt of a folder: stored, or made by its text encoder."""
    if (folder / NULL_TEXT_FILE).is_file():
        stored = load_file(folder / NULL_TEXT_FILE)
        if "null_text" not in stored:
            raise ValueError(f"{folder / NULL_TEXT_FILE} holds no tensor null_text. Please write it again.")
        return stored["null_text"].float()
    if not (folder / "text_encoder" / "config.json").is_file():
        raise ValueError(
            f"--base={folder} has neither {NULL_TEXT_FILE} nor text_encoder, one of which the empty prompt comes from. "
            "Please copy the folder text_encoder of Stable Diffusion 2.1-base into it."
        )
    check_part(folder, "text_encoder")
    return empty_prompt.from_folder(folder / "text_encoder")
