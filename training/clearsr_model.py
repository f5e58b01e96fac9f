"""Everything of one ClearSR training step: the frozen base, and the parts that move (Sec. 3.1)."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import Tensor, nn

from clearsr_core import checkpoint
from clearsr_core.checkpoint import Checkpoint, CheckpointError
from clearsr_core.config import LATENT_SCALE, SD21_BASE, ClearSRConfig, ControlConfig
from clearsr_core.control import ClearSRControl
from clearsr_core.image_encoder import ImagePromptEncoder
from clearsr_core.initialise import initialise_fresh, initialise_from_unet

from . import models
from .base_model import BaseModel
from .clip_vision import ClipImagePrompt

log = logging.getLogger("clearsr.training")


class ClearSRModel(nn.Module):
    """Everything of one training step: the frozen base, and what moves: DPM, SPM, both LoRAs, an encoder of p."""

    anchor = "lr_encoder"  # x_lr of start and LSA: of E', or of the plain E

    def __init__(
        self,
        base: BaseModel,
        control: ControlConfig,
        rank: int,
        prompt_mode: str,
        seed: int,
        clip: ClipImagePrompt | None = None,  # p comes from CLIP, and no image encoder of our own is trained
    ) -> None:
        super().__init__()
        self.clip = clip
        self.null_text: Tensor
        self.unet, self.vae = base.unet, base.vae
        self.register_buffer("null_text", base.null_text)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.control = ClearSRControl(control)
            initialise_from_unet(self.control, base.unet.state_dict(), torch.Generator().manual_seed(seed))
            # Seeded again, as variants of the control, compared at one seed, have to begin with the same LoRAs and
            # image encoder; peft draws from the global generator, which fork_rng puts back afterwards.
            torch.manual_seed(seed)
            self.lr_encoder = models.LREncoder(base.vae, rank)
            models.add_decoder_lora(base.unet, rank)
            self.image_encoder = (
                ImagePromptEncoder(control.context_dim, patch=prompt_mode == "patch")
                if prompt_mode != "null" and clip is None
                else None
            )
            if self.image_encoder is not None:
                initialise_fresh(self.image_encoder, torch.Generator().manual_seed(seed))
        self.decoder_prompt = models.DecoderPrompt(base.unet)
        # peft and deepcopy leave requires_grad as they like it; say what moves, once.
        self.requires_grad_(False)
        for parameter in self.trainable().values():
            parameter.requires_grad_(True)

    @classmethod
    def from_checkpoint(
        cls, path: Path, base: BaseModel | None = None, clip: ClipImagePrompt | None = None
    ) -> ClearSRModel:
        """Rebuild a trained model from its file, in diffusers' and peft's modules.

        Args:
            path: a checkpoint as `export` writes it.
            base: the base model; None takes the one inside the file.
            clip: source of p for a file without an image encoder; None leaves the decoder the empty prompt.

        Raises:
            CheckpointError: `path` is no file, or none that can be used.
            ValueError: the file's networks are laid out otherwise than those of Stable Diffusion 2.1.
        """
        require_file(path)
        stored = checkpoint.read(path)
        config, tensors = stored.config, stored.tensors
        _check_layout(path, config)
        if clip is None and not config.image_encoder and config.prompt_mode != "null":
            log.warning(
                "%s was trained with CLIP features, and there are no CLIP features here: the decoder reads the empty "
                "prompt. The nodes with a CLIP_VISION_OUTPUT give another picture.",
                path,
            )
        if config.control.control_text == "conditioning":
            log.warning(
                "%s reads the text of each conditioning in ComfyUI, where it is used with guidance: this command gives "
                "its control the empty prompt and no guidance, so the results are not those of ComfyUI.",
                path,
            )
        base = base or BaseModel.from_checkpoint(stored)
        mode = config.prompt_mode if config.image_encoder else "null"
        model = cls(base, config.control, config.lora_rank, mode, 0, clip)
        model.null_text = tensors["null_text"][""].float()  # self-contained files hold half precision
        model.anchor = config.anchor
        values = _trained_weights(stored)
        with torch.no_grad():
            for name, parameter in model.trainable().items():
                parameter.copy_(values[name])
        return model.eval()

    def trainable(self) -> dict[str, nn.Parameter]:
        """Return DPM, SPM, both LoRAs and the small image encoder, by their names in the checkpoint file."""
        named = dict(self.control.named_parameters())
        named |= {f"unet_lora.{name}": value for name, value in models.lora_parameters(self.unet).items()}
        named |= {f"vae_lora.{name}": value for name, value in models.lora_parameters(self.lr_encoder).items()}
        if self.image_encoder is not None:
            named |= {f"image_encoder.{name}": value for name, value in self.image_encoder.named_parameters()}
        return named

    def image_prompt(self, lr_images: Tensor) -> Tensor:
        """Return p of (B, 3, H, W) pictures in [0, 1], (B, n, C); the empty prompt where nothing makes one."""
        if self.clip is not None:
            return self.clip(lr_images)
        if self.image_encoder is None:
            return self.null_text.expand(lr_images.shape[0], -1, -1)
        return self.image_encoder(lr_images)

    def eps(self, x_t: Tensor, timesteps: Tensor, lr_latent: Tensor, prompt: Tensor) -> Tensor:
        """Predict the noise: eps_theta'(x_t, x_c, p, t) with x_c = DPM(x_lr) + SPM(x_lr) (Eq. 1).

        Args:
            x_t: (B, 4, h, w) noisy latent, model units.
            timesteps: (B,) integers 0 .. 999.
            lr_latent: (B, 4, h, w) x_lr, model units.
            prompt: (B, n, C) image prompt p, read by the UNet's decoder only.
        """
        context = self.null_text.expand(x_t.shape[0], -1, -1)
        residuals = self.control(lr_latent, timesteps, context, x_t)
        self.decoder_prompt.prompt = prompt
        # No graph grows through the UNet's encoder: nothing there moves and the residuals enter after it.
        return self.unet(
            x_t,
            timesteps,
            context,
            down_block_additional_residuals=residuals.down,
            mid_block_additional_residual=residuals.mid,
        ).sample


def require_file(path: Path) -> None:
    """Say what is wrong where a checkpoint is asked for and `path` is a folder, or nothing.

    Raises:
        CheckpointError: it is no file.
    """
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder; a .safetensors file is wanted. Give the path of the file in it.")
    if not path.is_file():
        raise CheckpointError(f"There is no file {path}.")


def _check_layout(path: Path, config: ClearSRConfig) -> None:
    """Refuse networks that the nodes can build of a file, but `models` cannot."""
    names = ("attention_levels", "layers_per_block")
    found = {name: getattr(config.control, name) for name in names} | {"latent_scale": config.latent_scale}
    wanted = {name: getattr(SD21_BASE, name) for name in names} | {"latent_scale": LATENT_SCALE}
    differing = [f"{name} {found[name]} instead of {wanted[name]}" for name in found if found[name] != wanted[name]]
    if differing:
        raise ValueError(
            f"{path} has {', '.join(differing)}. The commands of `training` know networks laid out like those of "
            "Stable Diffusion 2.1, at any width; ComfyUI's nodes open others too."
        )


def _trained_weights(stored: Checkpoint) -> dict[str, Tensor]:
    """Return a file's weights by `PART.NAME`; LoRAs as strong as the file says, at the alpha = rank that ours have."""
    values = {f"{part}.{name}": value for part, table in stored.tensors.items() for name, value in table.items()}
    for name, value in values.items():
        layer = name.removesuffix(".lora_B.weight")
        if layer != name:
            values[name] = value.float() * (float(values[f"{layer}.alpha"]) / stored.config.lora_rank)
    return values


def weights_in(path: Path) -> dict[str, Tensor]:
    """Return all weights of a ClearSR file by the names that the training stages give them.

    Raises:
        ValueError: as `ClearSRModel.from_checkpoint`.
    """
    stored = checkpoint.read(path)
    _check_layout(path, stored.config)
    values = _trained_weights(stored)
    if stored.config.base is not None:
        base = BaseModel.from_checkpoint(stored)
        values |= base.vae.state_dict()
        values |= {f"unet.{name}": value for name, value in base.unet.state_dict().items()}
        values["null_text"] = base.null_text
    return values
