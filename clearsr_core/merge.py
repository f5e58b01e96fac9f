"""The mathematics of a low-rank adapter on one weight, as a reference for what hosts and peft do."""

from __future__ import annotations

from torch import Tensor


def merged(weight: Tensor, lora_a: Tensor, lora_b: Tensor, alpha: float | Tensor, strength: float = 1.0) -> Tensor:
    """Return W + strength (alpha / r) B A.

    A convolution counts as a matrix of its flattened kernels, so k x k and 1 x 1 convolutions, linear layers, and a
    linear adapter on a 1 x 1 convolution (the autoencoder's attention in the host) need no special case.

    Args:
        weight: W, (out, in) or (out, in, k, k).
        lora_a: A, (r, in) or (r, in, k, k).
        lora_b: B, (out, r) or (out, r, 1, 1).
        alpha: scale; the adapter acts with alpha / r.
        strength: the user's factor; 0 = off, may be negative.

    Returns:
        As `weight`, which is never written to; the product is taken in the adapter's dtype.
    """
    rank = lora_a.shape[0]
    product = lora_b.flatten(1) @ lora_a.flatten(1)  # (out, in k k)
    if lora_b.shape[1] != rank or product.numel() != weight.numel():
        raise ValueError(
            f"adapters A {tuple(lora_a.shape)} and B {tuple(lora_b.shape)} do not fit a weight {tuple(weight.shape)}"
        )
    return weight + (strength * float(alpha) / rank * product).reshape(weight.shape).to(weight)
