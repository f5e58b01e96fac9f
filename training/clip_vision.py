"""CLIP's vision model as the source of the image prompt p: frozen, and in ComfyUI the user's own CLIP vision file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from clearsr_core.clip_features import clip_pixels, projected_tokens
from clearsr_core.safetensors_header import read_safetensors_header

from .openclip import renamed_blocks

HELP = "Please give CLIP ViT-H/14 (CLIP-ViT-H-14-laion2B-s32B-b79K), as a folder or as .safetensors."
_WANTED = "CLIP ViT-H/14"
_HEAD_CHANNELS = 80  # of ViT-H/14: 1280 in 16 heads
_OPENCLIP = {
    "class_embedding": "embeddings.class_embedding",
    "conv1.weight": "embeddings.patch_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_pre.weight": "pre_layrnorm.weight",
    "ln_pre.bias": "pre_layrnorm.bias",
    "ln_post.weight": "post_layernorm.weight",
    "ln_post.bias": "post_layernorm.bias",
}


class ClipImagePrompt(nn.Module):
    """LR image -> p, from frozen CLIP features."""

    def __init__(self, clip: CLIPVisionModelWithProjection, *, patch: bool) -> None:
        super().__init__()
        self.clip = clip.eval().requires_grad_(False)
        self.patch = patch

    @property
    def hidden_width(self) -> int:
        """Width of the hidden states: 1280 of ViT-H/14."""
        return self.clip.config.hidden_size

    @property
    def context_dim(self) -> int:
        """Width of p: 1024 of ViT-H/14."""
        return self.clip.config.projection_dim

    @classmethod
    def load(cls, source: Path, *, patch: bool, context_dim: int) -> ClipImagePrompt:
        """Read a folder of transformers, or one file in transformers' or OpenCLIP's names, to the CPU in float32.

        Args:
            source: `--clip_vision`.
            patch: p is every token instead of the pooled embedding.
            context_dim: width of the UNet's text, which p must have.

        Raises:
            ValueError: it is something else, or of another width.
        """
        clip = _from_folder(source) if source.is_dir() else _from_file(source)
        if clip.config.projection_dim != context_dim:
            raise ValueError(
                f"--clip_vision={source} gives features {clip.config.projection_dim} wide, but the base model reads "
                f"{context_dim}. {HELP}"
            )
        return cls(clip, patch=patch)

    def projection(self) -> dict[str, Tensor]:
        """Return what turns hidden states into tokens, by its names in the checkpoint file."""
        norm = self.clip.vision_model.post_layernorm
        return {
            "norm.weight": norm.weight.detach(),
            "norm.bias": norm.bias.detach(),
            "projection.weight": self.clip.visual_projection.weight.detach(),
        }

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Encode.

        Args:
            images: (B, 3, H, W) RGB in [0, 1], any size.

        Returns:
            p: (B, 1, context_dim), or with `patch` (B, 257, context_dim), of which the first is the pooled embedding.
        """
        side = cast("int", self.clip.config.image_size)
        features = self.clip(pixel_values=clip_pixels(images.float(), side))
        if self.patch:
            return projected_tokens(features.last_hidden_state, self.projection())
        return features.image_embeds[:, None]


def _from_folder(folder: Path) -> CLIPVisionModelWithProjection:
    # Image encoders of diffusers' pipelines lie in a folder of their own.
    if not (folder / "config.json").is_file() and (folder / "image_encoder" / "config.json").is_file():
        folder = folder / "image_encoder"
    files = sorted(folder.glob("*.safetensors"))
    if not (folder / "config.json").is_file() or not files:
        raise ValueError(f"--clip_vision={folder} has no config.json with .safetensors beside it. {HELP}")
    for file in files:
        read_safetensors_header(file, _WANTED)
    try:
        loaded: Any = CLIPVisionModelWithProjection.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
        clip, report = loaded
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        raise ValueError(f"--clip_vision={folder} cannot be read ({error}). {HELP}") from error
    if report["missing_keys"]:
        raise ValueError(f"--clip_vision={folder} lacks {min(report['missing_keys'])} and maybe more. {HELP}")
    return clip


def _from_file(path: Path) -> CLIPVisionModelWithProjection:
    shapes = read_safetensors_header(path, _WANTED).shapes
    if not any(key.startswith(("vision_model.", "visual.")) for key in shapes):
        raise ValueError(f"--clip_vision={path} is no CLIP vision model (neither vision_model nor visual). {HELP}")
    try:
        stored = {name: value.float() for name, value in load_file(path).items()}
        weights = _from_openclip(stored) if "visual.conv1.weight" in stored else stored
        config = _config(weights)
        with torch.device("meta"):
            clip = CLIPVisionModelWithProjection(config)
        wanted = clip.state_dict().keys()
        clip.load_state_dict({name: value for name, value in weights.items() if name in wanted}, assign=True)
    except (SafetensorError, KeyError, RuntimeError, ValueError) as error:
        raise ValueError(f"--clip_vision={path} is no CLIP vision model that can be used ({error}). {HELP}") from error
    # Positions are counted, not stored, and so were left on the meta device.
    embeddings = clip.vision_model.embeddings
    embeddings.register_buffer("position_ids", torch.arange(embeddings.num_positions)[None], persistent=False)
    return clip


def _config(weights: Mapping[str, Tensor]) -> CLIPVisionConfig:
    """Read the sizes from the shapes; the heads, which leave no trace, have ViT-H/14's size or 64 channels."""
    patch = weights["vision_model.embeddings.patch_embedding.weight"]  # (C, 3, side, side)
    width, side = patch.shape[0], patch.shape[-1]
    positions = weights["vision_model.embeddings.position_embedding.weight"].shape[0]  # 1 + cells
    layers = 1 + max(int(n.split(".")[3]) for n in weights if n.startswith("vision_model.encoder.layers."))
    heads = width // (_HEAD_CHANNELS if width % _HEAD_CHANNELS == 0 else 64)
    return CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=weights["vision_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=layers,
        num_attention_heads=max(1, heads),
        image_size=round((positions - 1) ** 0.5) * side,
        patch_size=side,
        projection_dim=weights["visual_projection.weight"].shape[0],
        hidden_act="gelu",
    )


def _from_openclip(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename `visual.*`; the projection is stored transposed there."""
    blocks = "visual.transformer.resblocks."
    layers = 1 + max(int(name.split(".")[3]) for name in weights if name.startswith(blocks))
    named = {f"vision_model.{ours}": weights[f"visual.{theirs}"] for theirs, ours in _OPENCLIP.items()}
    named |= renamed_blocks(weights, blocks, "vision_model.encoder.layers.", layers)
    return {**named, "visual_projection.weight": weights["visual.proj"].T.contiguous()}
