"""The layers of a ControlNet for SD 2.x, and the window cross-attention that DPM adds to them (Eq. 2, paper Sec. 3.2).

Module and parameter names are those of diffusers' ControlNetModel, so that weights of a UNet load by name.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .operations import Attention, Operations, scaled_dot_product
from .windows import bias_table_side, merge, partition, real_tokens, relative_index, window_counts


@dataclass(frozen=True)
class Factory:
    """Everything that all layers of one network are built with."""

    ops: Operations = nn
    attention: Attention = scaled_dot_product
    dtype: torch.dtype | None = None
    device: torch.device | str | None = None

    def linear(self, channels_in: int, channels_out: int, bias: bool = True) -> nn.Linear:
        return self.ops.Linear(channels_in, channels_out, bias=bias, dtype=self.dtype, device=self.device)

    def conv(self, channels_in: int, channels_out: int, side: int, stride: int = 1) -> nn.Conv2d:
        """Convolution of an odd side that keeps the size, up to the stride."""
        return self.ops.Conv2d(
            channels_in, channels_out, side, stride=stride, padding=side // 2, dtype=self.dtype, device=self.device
        )

    def group_norm(self, groups: int, channels: int, eps: float) -> nn.GroupNorm:
        return self.ops.GroupNorm(groups, channels, eps=eps, affine=True, dtype=self.dtype, device=self.device)

    def layer_norm(self, channels: int) -> nn.LayerNorm:
        return self.ops.LayerNorm(channels, dtype=self.dtype, device=self.device)

    def embedding(self, rows: int, columns: int) -> nn.Embedding:
        return self.ops.Embedding(rows, columns, dtype=self.dtype, device=self.device)


def timestep_features(timestep: Tensor, channels: int) -> Tensor:
    """Return sinusoids of a timestep, cosines first, as SD does: (B,) -> (B, channels) float32."""
    half = channels // 2
    exponent = -math.log(10000.0) * torch.arange(half, dtype=torch.float32, device=timestep.device) / half
    angles = timestep.float()[:, None] * exponent.exp()[None, :]  # (B, channels / 2)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimestepEmbedding(nn.Module):
    """Timestep (B,) -> time features (B, 4 C)."""

    def __init__(self, channels: int, factory: Factory) -> None:
        super().__init__()
        self.channels = channels
        self.linear_1 = factory.linear(channels, 4 * channels)
        self.linear_2 = factory.linear(4 * channels, 4 * channels)

    def forward(self, timestep: Tensor, dtype: torch.dtype) -> Tensor:
        features = timestep_features(timestep, self.channels).to(dtype)  # float32 up to here: t = 999 needs it
        return self.linear_2(F.silu(self.linear_1(features)))


class ResBlock(nn.Module):
    """norm, SiLU, conv, + time; norm, SiLU, conv; + shortcut: (B, C_in, h, w) -> (B, C_out, h, w)."""

    def __init__(self, channels_in: int, channels_out: int, time: int, groups: int, factory: Factory) -> None:
        super().__init__()
        self.norm1 = factory.group_norm(groups, channels_in, eps=1e-5)
        self.conv1 = factory.conv(channels_in, channels_out, 3)
        self.time_emb_proj = factory.linear(time, channels_out)
        self.norm2 = factory.group_norm(groups, channels_out, eps=1e-5)
        self.conv2 = factory.conv(channels_out, channels_out, 3)
        self.conv_shortcut = factory.conv(channels_in, channels_out, 1) if channels_in != channels_out else None

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time_emb_proj(F.silu(time))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Downsample(nn.Module):
    """Halve the grid, rounding up: (B, C, h, w) -> (B, C, ceil(h / 2), ceil(w / 2))."""

    def __init__(self, channels: int, factory: Factory) -> None:
        super().__init__()
        self.conv = factory.conv(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class CrossAttention(nn.Module):
    """Multi-head attention of tokens (B, L, C) to a context (B, n, D); to themselves where it is None."""

    def __init__(self, channels: int, context: int, head_channels: int, factory: Factory) -> None:
        super().__init__()
        self.heads = channels // head_channels
        self.attention = factory.attention
        self.to_q = factory.linear(channels, channels, bias=False)
        self.to_k = factory.linear(context, channels, bias=False)
        self.to_v = factory.linear(context, channels, bias=False)
        self.to_out = nn.ModuleList([factory.linear(channels, channels)])

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        q, k, v = (split_heads(t, self.heads) for t in (self.to_q(x), self.to_k(context), self.to_v(context)))
        return self.to_out[0](join_heads(self.attention(q, k, v)))


class WindowCrossAttention(nn.Module):
    """Attend from each window of features to the window of x_lr on the same cell of the picture (Eq. 2).

        CA(Q, K, V) = softmax(Q K^T / sqrt(d_k) + B) V,   Q = W_q x_d,   K = W_k x_lr,   V = W_v x_lr

    followed by W_o, which starts at zero, so that an untrained DPM is a ControlNet.
    """

    def __init__(
        self,
        channels: int,
        lr_channels: int,
        head_channels: int,
        *,
        query_window: int | None,  # S; None = one window over everything (ablation)
        ratio: int,  # r = s / S
        relative_bias: bool,  # B; never with query_window None
        factory: Factory,
    ) -> None:
        super().__init__()
        self.heads = channels // head_channels
        self.query_window = query_window
        self.ratio = ratio
        self.attention = factory.attention
        self.to_q = factory.linear(channels, channels, bias=False)
        self.to_k = factory.linear(lr_channels, channels, bias=False)
        self.to_v = factory.linear(lr_channels, channels, bias=False)
        self.to_out = factory.linear(channels, channels)
        self.relative_bias = None
        if relative_bias and query_window is not None:
            # An embedding rather than a parameter: hosts move and cast leaf layers only.
            self.relative_bias = factory.embedding(bias_table_side(query_window, ratio) ** 2, self.heads)

    def forward(self, x: Tensor, size: tuple[int, int], x_lr: Tensor) -> Tensor:
        """Attend.

        Args:
            x: (B, L, C) normalised features, row by row, L = size[0] * size[1].
            size: grid of x, (ceil(h / r), ceil(w / r)) up to rounding level by level.
            x_lr: (B, h, w, 4) LR latent, channels last, in model units.

        Returns:
            (B, L, C).
        """
        q, k, v = self.to_q(x), self.to_k(x_lr), self.to_v(x_lr)  # (B, L, C), (B, h, w, C) twice
        if self.query_window is None:
            q, k, v = split_heads(q, self.heads), *(split_heads(t.flatten(1, 2), self.heads) for t in (k, v))
            return self.to_out(join_heads(self.attention(q, k, v)))

        # Windows: N per item of the batch, the same N on both grids.
        lr_window = self.query_window * self.ratio
        height, width = x_lr.shape[1:3]
        counts = window_counts(height, width, lr_window)
        q = partition(q.unflatten(1, size), self.query_window, counts)  # (B N, S^2, C)
        k, v = (partition(t, lr_window, counts) for t in (k, v))  # (B N, s^2, C)

        q, k, v = (split_heads(t, self.heads) for t in (q, k, v))  # (B N, H, S^2 or s^2, D)
        attended = self.attention(q, k, v, self._bias(q, real_tokens(height, width, lr_window, x.device)))
        attended = merge(join_heads(attended), self.query_window, counts, size)  # (B, h_k, w_k, C)
        return self.to_out(attended.flatten(1, 2))

    def _bias(self, q: Tensor, real: Tensor | None) -> Tensor | None:
        """Return B plus the mask of padded LR tokens, (1 or B N, H, S^2, s^2) in q's dtype, or None for neither."""
        bias = None
        if self.relative_bias is not None and self.query_window is not None:
            table = self.relative_bias(relative_index(self.query_window, self.ratio, q.device))  # (S^2, s^2, H)
            bias = rearrange(table, "q k h -> 1 h q k").to(q.dtype)
        if real is None:
            return bias
        if bias is None:
            bias = q.new_zeros(1, self.heads, q.shape[2], real.shape[1])
        # The lowest finite number, not -inf: chunked attention would make NaN of a chunk of padding.
        bias = bias.masked_fill(~real[:, None, None, :], torch.finfo(q.dtype).min)  # (N, H, S^2, s^2)
        return bias.repeat(q.shape[0] // real.shape[0], 1, 1, 1)


class GEGLU(nn.Module):
    """Linear to twice the channels; one half gates the other through GELU."""

    def __init__(self, channels_in: int, channels_out: int, factory: Factory) -> None:
        super().__init__()
        self.proj = factory.linear(channels_in, 2 * channels_out)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """GEGLU to four times the channels and back."""

    def __init__(self, channels: int, factory: Factory) -> None:
        super().__init__()
        # The identity stands where diffusers has a dropout, which gives the last layer its index.
        self.net = nn.ModuleList(
            [GEGLU(channels, 4 * channels, factory), nn.Identity(), factory.linear(4 * channels, channels)]
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.net:
            x = layer(x)
        return x


class TransformerBlock(nn.Module):
    """Self-attention, text cross-attention, window cross-attention to x_lr (DPM's addition), feed-forward."""

    def __init__(
        self,
        channels: int,
        context: int,
        head_channels: int,
        window_attention: WindowCrossAttention | None,  # None: a plain ControlNet's block (ablation)
        factory: Factory,
    ) -> None:
        super().__init__()
        self.norm1 = factory.layer_norm(channels)
        self.attn1 = CrossAttention(channels, channels, head_channels, factory)
        self.norm2 = factory.layer_norm(channels)
        self.attn2 = CrossAttention(channels, context, head_channels, factory)
        self.norm_window = factory.layer_norm(channels) if window_attention is not None else None
        self.window_attention = window_attention
        self.norm3 = factory.layer_norm(channels)
        self.ff = FeedForward(channels, factory)

    def forward(self, x: Tensor, size: tuple[int, int], context: Tensor, x_lr: Tensor) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        if self.window_attention is not None and self.norm_window is not None:
            x = x + self.window_attention(self.norm_window(x), size, x_lr)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """One transformer block on a feature map (B, C, h, w), with a residual around it."""

    def __init__(
        self,
        channels: int,
        context: int,
        head_channels: int,
        groups: int,
        window_attention: WindowCrossAttention | None,
        factory: Factory,
    ) -> None:
        super().__init__()
        self.norm = factory.group_norm(groups, channels, eps=1e-6)
        self.proj_in = factory.linear(channels, channels)
        block = TransformerBlock(channels, context, head_channels, window_attention, factory)
        self.transformer_blocks = nn.ModuleList([block])
        self.proj_out = factory.linear(channels, channels)

    def forward(self, x: Tensor, context: Tensor, x_lr: Tensor) -> Tensor:
        height, width = x.shape[2:]
        tokens = self.proj_in(rearrange(self.norm(x), "b c h w -> b (h w) c"))
        for block in self.transformer_blocks:
            tokens = block(tokens, (height, width), context, x_lr)
        return x + rearrange(self.proj_out(tokens), "b (h w) c -> b c h w", h=height, w=width)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, L, H D) -> (B, H, L, D)."""
    return rearrange(x, "b l (h d) -> b h l d", h=heads)


def join_heads(x: Tensor) -> Tensor:
    """(B, H, L, D) -> (B, L, H D)."""
    return rearrange(x, "b h l d -> b l (h d)")
