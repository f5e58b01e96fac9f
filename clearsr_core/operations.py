"""What the networks borrow from their surroundings: layer classes and an attention function."""

from __future__ import annotations

from typing import Protocol

import torch.nn.functional as F
from torch import Tensor, nn


class Operations(Protocol):
    """Where layers come from: `torch.nn` itself, or a host's drop-in classes with their own casting and loading.

    Layers of a host may hold no weight until a state dict is loaded, so the networks only ever call them.
    """

    @property
    def Linear(self) -> type[nn.Linear]: ...  # noqa: N802 (torch.nn's name)
    @property
    def Conv2d(self) -> type[nn.Conv2d]: ...  # noqa: N802
    @property
    def GroupNorm(self) -> type[nn.GroupNorm]: ...  # noqa: N802
    @property
    def LayerNorm(self) -> type[nn.LayerNorm]: ...  # noqa: N802
    @property
    def Embedding(self) -> type[nn.Embedding]: ...  # noqa: N802


class Attention(Protocol):
    """softmax(q k^T / sqrt(D) + bias) v for (B, H, L, D) tensors; bias broadcasts to (B, H, L_q, L_k)."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor: ...


def scaled_dot_product(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Attend with torch's own kernel: (B, H, L_q, D)."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
