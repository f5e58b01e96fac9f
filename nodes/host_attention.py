"""The host's attention kernels behind the one function that clearsr_core asks for."""

from __future__ import annotations

import comfy.ldm.modules.attention
import torch
from torch import Tensor


def host_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Attend with the kernel that the host chose for its own UNet.

    The host's choice by device would do on a GPU; on a CPU it is the slow kernel whatever the UNet uses. With a bias
    (relative positions, masked padding) the kernel for small masked inputs is taken: flash attention falls back with a
    warning at every masked call, and sage attention of older hosts may ignore the mask. Logits and softmax are float32
    in every kernel, unless the user forbids that (--dont-upcast-attention).

    Args:
        q: (B, heads, L, D).
        k, v: (B, heads, M, D).
        bias: broadcastable to (B, heads, L, M), added to the logits; None = none.

    Returns:
        (B, heads, L, D).
    """
    host = comfy.ldm.modules.attention
    kernel = host.optimized_attention
    if bias is not None:
        kernel = host.optimized_attention_for_device(q.device, mask=True, small_input=True)
    return kernel(
        q,
        k,
        v,
        heads=q.shape[1],
        mask=bias,
        attn_precision=torch.float32,  # as the host's own UNet for SD 2, whose logits leave the range of float16
        skip_reshape=True,
        skip_output_reshape=True,
    )
