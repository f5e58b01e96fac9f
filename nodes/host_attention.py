"""The host's attention kernels behind the one function that clearsr_core asks for."""

from __future__ import annotations

import torch
from comfy.ldm.modules.attention import optimized_attention_for_device
from torch import Tensor


def host_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Attend with the kernel that the host chose for this device.

    With a bias (relative positions, masked padding) the kernel for small masked inputs is taken: flash attention
    falls back with a warning at every masked call, and sage attention of older hosts may ignore the mask. Logits and
    softmax are float32 in every kernel, unless the user forbids that (--dont-upcast-attention).

    Args:
        q: (B, heads, L, D).
        k, v: (B, heads, M, D).
        bias: broadcastable to (B, heads, L, M), added to the logits; None = none.

    Returns:
        (B, heads, L, D).
    """
    masked = bias is not None
    kernel = optimized_attention_for_device(q.device, mask=masked, small_input=masked)
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
