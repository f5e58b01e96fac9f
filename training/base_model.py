"""The frozen Stable Diffusion 2 model that ClearSR stands on, from whatever form the user has it in."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, ModelMixin, UNet2DConditionModel
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from clearsr_core import checkpoint
from clearsr_core.checkpoint import Checkpoint
from clearsr_core.config import SD21_NETWORKS, BaseConfig
from clearsr_core.key_maps import unet_from_host, vae_from_host
from clearsr_core.safetensors_header import read_safetensors_header
from clearsr_core.whole_files import replacing

from .base_files import (
    NULL_TEXT_FILE,
    RANDOM,
    SPREAD_IN_DIFFUSERS,
    check_part,
    check_unet_config,
    folder_null_text,
    random_networks,
    text_file_null_text,
)
from .models import build_autoencoder, build_unet
from .single_file import HELP, read_single_file, refuse_v_prediction

_TOKENS = 77


@dataclass
class BaseModel:
    """A Stable Diffusion 2 model as ClearSR stands on it: frozen UNet, frozen VAE, the empty prompt."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    null_text: Tensor  # (tokens, context width)

    @classmethod
    def load(cls, source: Path, widths: tuple[int, ...] = SD21_NETWORKS.unet_widths, seed: int = 0) -> BaseModel:
        """Read a base model to the CPU in float32; nothing is downloaded, and only safetensors files are read.

        Args:
            source: a folder in diffusers' layout, a checkpoint in the original layout, a self-contained ClearSR file,
                or `random`: weights drawn from `seed`, for a trial run without any model.
            widths: of the random UNet.
            seed: of the random weights.

        Raises:
            ValueError: it is something else; one sentence that says what, and what to do.
        """
        if source == RANDOM and not source.exists():
            return cls.random(random_networks(widths), seed)
        if source.is_dir():
            return cls.from_folder(source)
        header = read_safetensors_header(source, "Stable Diffusion 2.1-base")
        if "clearsr.format" in header.metadata:
            return cls.from_checkpoint(checkpoint.read(source))
        return cls.from_single_file(source)

    @classmethod
    def from_folder(cls, folder: Path) -> BaseModel:
        """Read a folder with `unet` and `vae` (diffusers layout), and `null_text.safetensors` or `text_encoder`."""
        for part in ("unet", "vae"):
            check_part(folder, part)
        check_unet_config(folder)
        null_text = folder_null_text(folder)
        try:
            unet, unet_report = UNet2DConditionModel.from_pretrained(folder / "unet", **_options(folder / "unet"))
            vae, vae_report = AutoencoderKL.from_pretrained(folder / "vae", **_options(folder / "vae"))
        except (OSError, SafetensorError, RuntimeError) as error:
            raise ValueError(f"--base={folder} cannot be read ({error}). Please download or copy it again.") from error
        for part, report in (("unet", unet_report), ("vae", vae_report)):
            # diffusers would go on with random numbers in their place.
            absent = sorted(report["missing_keys"])
            if absent:
                raise ValueError(f"--base={folder} lacks {len(absent)} weights in {part} ({absent[0]}, ...). {HELP}")
        refuse_v_prediction(folder, unet.state_dict().get(SPREAD_IN_DIFFUSERS), unet.config.block_out_channels)
        width = unet.config.cross_attention_dim
        if null_text.ndim != 2 or null_text.shape[1] != width:
            raise ValueError(
                f"--base={folder} has an empty prompt of the shape {tuple(null_text.shape)}, but its UNet reads text "
                f"that is {width} wide: text encoder and UNet are of different models."
            )
        return cls(unet.float().eval(), vae.float().eval(), null_text)

    @classmethod
    def from_single_file(cls, path: Path, networks: BaseConfig = SD21_NETWORKS) -> BaseModel:
        """Read a checkpoint in the original layout, as ComfyUI's Load Checkpoint takes it."""
        unet_weights, vae_weights, text = read_single_file(path, networks)
        null_text = text_file_null_text(path, text)
        model = cls._empty(networks, null_text)
        model.unet.load_state_dict(unet_weights, assign=True)
        model.vae.load_state_dict(vae_weights, assign=True)
        return model

    @classmethod
    def from_checkpoint(cls, stored: Checkpoint) -> BaseModel:
        """Take the base out of a self-contained ClearSR file."""
        networks, tensors = stored.config.base, stored.tensors
        if networks is None:
            raise ValueError(
                "This ClearSR file carries no base model: give --base=FOLDER of Stable Diffusion 2.1-base."
            )
        model = cls._empty(networks, tensors["null_text"][""].float())
        unet = unet_from_host(tensors["base.unet"], stored.config.control)
        vae = vae_from_host(tensors["base.vae"], networks)
        # The file holds half precision.
        model.unet.load_state_dict({name: value.float() for name, value in unet.items()}, assign=True)
        model.vae.load_state_dict({name: value.float() for name, value in vae.items()}, assign=True)
        return model

    @classmethod
    def random(cls, networks: BaseConfig, seed: int) -> BaseModel:
        """Draw every weight from `seed`; torch's own generator is left as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            unet, vae = _build(networks)
            null_text = torch.randn(_TOKENS, networks.context_dim)
        return cls(unet.eval(), vae.eval(), null_text)

    @classmethod
    def _empty(cls, networks: BaseConfig, null_text: Tensor) -> BaseModel:
        """Build the networks without weights, which drawing and overwriting would cost a minute for."""
        with torch.device("meta"):
            unet, vae = _build(networks)
        return cls(unet.eval(), vae.eval(), null_text)

    def save(self, folder: Path) -> None:
        """Write the folder that `load` reads; files of an earlier one are replaced by whole ones."""
        save_network(self.unet, folder / "unet")
        save_network(self.vae, folder / "vae")
        with replacing(folder / NULL_TEXT_FILE) as unfinished:
            save_file({"null_text": self.null_text.detach().float().contiguous()}, unfinished)


def _build(networks: BaseConfig) -> tuple[UNet2DConditionModel, AutoencoderKL]:
    groups, latent = networks.norm_groups, networks.latent_channels
    unet = build_unet(networks.unet_widths, networks.head_channels, networks.context_dim, groups, latent)
    return unet, build_autoencoder(networks.vae_widths, networks.vae_blocks, groups, latent)


def save_network(network: ModelMixin, folder: Path) -> None:
    """Write a network in diffusers' layout so that a stop leaves no file half written, also where there is one."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".unfinished-") as unfinished:
        network.save_pretrained(unfinished)
        for file in sorted(Path(unfinished).iterdir()):
            with replacing(folder / file.name) as whole:
                os.replace(file, whole)


def load_autoencoder(source: Path) -> AutoencoderKL:
    """Read an autoencoder: a `vae` folder in diffusers' layout, or that of a self-contained ClearSR file.

    Raises:
        ValueError: it is neither; one sentence that says what, and what to do.
    """
    advice = "Give the `vae` folder of a finished autoencoder run, or a ClearSR file that carries its base model."
    if source.is_file():
        header = read_safetensors_header(source, "a ClearSR file")
        if "clearsr.format" not in header.metadata:
            raise ValueError(f"--vae={source} is no ClearSR file. {advice}")
        stored = checkpoint.read(source)
        if stored.config.base is None:
            raise ValueError(f"--vae={source} is a ClearSR file without a base model. {advice}")
        return BaseModel.from_checkpoint(stored).vae
    if not (source / "config.json").is_file():
        raise ValueError(f"--vae={source} holds no autoencoder: there is no {source}/config.json. {advice}")
    try:
        return AutoencoderKL.from_pretrained(source, local_files_only=True, use_safetensors=True)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ValueError(f"--vae={source} cannot be read ({error}). {advice}") from error


def _options(path: Path) -> dict[str, str | bool]:
    """Return how to read a part; repositories that hold half precision only mark it in the names of the files."""
    half = all(".fp16." in file.name for file in path.glob("*.safetensors"))
    options: dict[str, str | bool] = {"local_files_only": True, "use_safetensors": True, "output_loading_info": True}
    return {**options, "variant": "fp16"} if half else options
