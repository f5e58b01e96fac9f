"""Names of OpenCLIP's transformer blocks in transformers; text and vision share them."""

from __future__ import annotations

from collections.abc import Mapping

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
