"""The empty prompt's text embedding, by Stable Diffusion 2's text encoder (OpenCLIP ViT-H/14) in transformers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from .openclip import renamed_blocks

_HEAD_CHANNELS = 64
_PAD = 0  # Stable Diffusion 2 fills up with token 0 ("!"), not with the end token as version 1 does


def from_folder(folder: Path) -> Tensor:
    """Return (77, context width) of a `text_encoder` folder of diffusers."""
    loaded: Any = CLIPTextModel.from_pretrained(
        folder, local_files_only=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True
    )
    model, report = loaded
    if report["missing_keys"]:
        raise ValueError(f"{folder} lacks {min(report['missing_keys'])} and maybe more. Please copy it again.")
    return _encode(model)


def from_openclip(weights: Mapping[str, Tensor]) -> Tensor:
    """Return (tokens, context width) of OpenCLIP's text encoder.

    Stable Diffusion 2 reads the output of the last layer but one, through the final norm: the last layer is left out.

    Args:
        weights: OpenCLIP's names, float32; those that the text does not need are ignored.
    """
    vocabulary, width = weights["token_embedding.weight"].shape
    tokens = weights["positional_embedding"].shape[0]
    layers = 1 + max(int(name.split(".")[2]) for name in weights if name.startswith("transformer.resblocks."))
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=weights["transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
        num_hidden_layers=layers - 1,
        num_attention_heads=max(1, width // _HEAD_CHANNELS),
        max_position_embeddings=tokens,
        hidden_act="gelu",
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
    )
    with torch.device("meta"):
        model = CLIPTextModel(config)
    named = {
        "embeddings.token_embedding.weight": weights["token_embedding.weight"],
        "embeddings.position_embedding.weight": weights["positional_embedding"],
        "final_layer_norm.weight": weights["ln_final.weight"],
        "final_layer_norm.bias": weights["ln_final.bias"],
    }
    named |= renamed_blocks(weights, "transformer.resblocks.", "encoder.layers.", layers - 1)
    model.load_state_dict(named, assign=True)
    # Positions are counted, not stored, and so were left on the meta device.
    model.embeddings.register_buffer("position_ids", torch.arange(tokens)[None], persistent=False)
    return _encode(model)


@torch.no_grad()
def _encode(model: CLIPTextModel) -> Tensor:
    """Encode start, end and padding: what every tokeniser makes of the empty prompt, so that none is needed."""
    config = model.config
    start, end = config.vocab_size - 2, config.vocab_size - 1  # 49406, 49407
    tokens = torch.full((1, config.max_position_embeddings), _PAD)
    tokens[0, :2] = torch.tensor([start, end])
    return model.eval()(input_ids=tokens).last_hidden_state[0].clone()
