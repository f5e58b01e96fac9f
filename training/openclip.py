"""OpenCLIP: names of its transformer blocks in transformers, which text and vision share; weights of its text part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def renamed_blocks(weights: Mapping[str, Tensor], theirs: str, ours: str, layers: int) -> dict[str, Tensor]:
    """Return the first `layers` blocks under transformers' names; the joint projection of q, k and v is split.

    Args:
        weights: OpenCLIP's names.
        theirs: prefix of the numbered blocks there ("transformer.resblocks.").
        ours: prefix in transformers ("encoder.layers.").
        layers: how many.
    """
    named: dict[str, Tensor] = {}
    for layer in range(layers):
        for kind in ("weight", "bias"):
            joint = weights[f"{theirs}{layer}.attn.in_proj_{kind}"]
            for name, part in zip("qkv", joint.chunk(3), strict=True):
                named[f"{ours}{layer}.self_attn.{name}_proj.{kind}"] = part
            for name, new in _BLOCK.items():
                named[f"{ours}{layer}.{new}.{kind}"] = weights[f"{theirs}{layer}.{name}.{kind}"]
    return named


@dataclass(frozen=True)
class TextSizes:
    """Sizes of a text encoder; the defaults are ViT-H/14's, which Stable Diffusion 2 reads."""

    vocabulary: int = 49408
    tokens: int = 77
    width: int = 1024
    layers: int = 24


def text_shapes(sizes: TextSizes) -> dict[str, tuple[int, ...]]:
    """Return the weights of OpenCLIP's text encoder, in its own names."""
    width = sizes.width
    shapes: dict[str, tuple[int, ...]] = {
        "token_embedding.weight": (sizes.vocabulary, width),
        "positional_embedding": (sizes.tokens, width),
        "ln_final.weight": (width,),
        "ln_final.bias": (width,),
        "text_projection": (width, width),
    }
    layers = {"attn.out_proj": (width, width), "mlp.c_fc": (4 * width, width), "mlp.c_proj": (width, 4 * width)}
    for layer in range(sizes.layers):
        block = f"transformer.resblocks.{layer}"
        for norm in ("ln_1", "ln_2"):
            shapes |= {f"{block}.{norm}.weight": (width,), f"{block}.{norm}.bias": (width,)}
        shapes |= {f"{block}.attn.in_proj_weight": (3 * width, width), f"{block}.attn.in_proj_bias": (3 * width,)}
        for name, sides in layers.items():
            shapes |= {f"{block}.{name}.weight": sides, f"{block}.{name}.bias": sides[:1]}
    return shapes
