"""Window cross-attention is Eq. 2 token by token, at any size, and sees only its own cell."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clearsr_core.layers import Factory, WindowCrossAttention

CHANNELS, HEAD = 32, 16


def layer(query_window, ratio, relative_bias=True, **factory):
    """A window attention with weights that matter everywhere, W_o included."""
    attention = WindowCrossAttention(
        CHANNELS,
        4,
        HEAD,
        query_window=query_window,
        ratio=ratio,
        relative_bias=relative_bias,
        factory=Factory(**factory),
    )
    generator = torch.Generator().manual_seed(query_window or 0)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return attention


def inputs(height, width, ratio, batch=2, seed=0):
    """Features of the level whose grid is 1 / ratio of an LR latent of height x width, and that latent."""
    rows, columns, shrink = height, width, ratio
    while shrink > 1:
        rows, columns, shrink = (rows + 1) // 2, (columns + 1) // 2, shrink // 2
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, rows * columns, CHANNELS, generator=generator)
    return x, (rows, columns), torch.randn(batch, height, width, 4, generator=generator)


def by_hand(attention, x, size, x_lr):
    """Eq. 2 in loops over query tokens: keys are the LR tokens of the same cell that exist, B by their offset."""
    window, ratio = attention.query_window, attention.ratio
    lr_window = window * ratio
    side = 2 * lr_window - ratio
    out = torch.zeros_like(x)
    q, k, v = attention.to_q(x), attention.to_k(x_lr), attention.to_v(x_lr)
    for row in range(size[0]):
        for column in range(size[1]):
            top, left = row // window * lr_window, column // window * lr_window
            keys = k[:, top : top + lr_window, left : left + lr_window]
            values = v[:, top : top + lr_window, left : left + lr_window].flatten(1, 2)
            for head in range(CHANNELS // HEAD):
                part = slice(head * HEAD, (head + 1) * HEAD)
                token = row * size[1] + column
                logits = torch.einsum("bd,bhwd->bhw", q[:, token, part], keys[..., part]) / HEAD**0.5
                if attention.relative_bias is not None:
                    for key_row in range(keys.shape[1]):
                        for key_column in range(keys.shape[2]):
                            down = key_row - ratio * (row % window) + ratio * (window - 1)
                            right = key_column - ratio * (column % window) + ratio * (window - 1)
                            logits[:, key_row, key_column] += attention.relative_bias.weight[down * side + right, head]
                weights = logits.flatten(1).softmax(-1)
                out[:, token, part] = torch.einsum("bn,bnd->bd", weights, values[..., part])
    return attention.to_out(out)


@pytest.mark.parametrize(("query_window", "ratio"), [(4, 1), (2, 2), (1, 4)])
@pytest.mark.parametrize("size", [(8, 4), (5, 7), (1, 1), (4, 9)])
@pytest.mark.parametrize("relative_bias", [True, False])
@torch.no_grad()
def test_equals_equation_2_by_hand(query_window, ratio, size, relative_bias):
    """Padding, masking and cropping leave exactly the sum over the tokens that exist."""
    attention = layer(query_window, ratio, relative_bias)
    x, grid, x_lr = inputs(*size, ratio)
    torch.testing.assert_close(attention(x, grid, x_lr), by_hand(attention, x, grid, x_lr), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("query_window", "ratio"), [(8, 1), (4, 2), (2, 4), (1, 8)])
@torch.no_grad()
def test_crop_at_multiples_of_eight_equals_crop_of_the_whole(query_window, ratio):
    """Tiles see the same windows as the image. Matrix products block rows by their number, hence 1e-6, not bits."""
    attention = layer(query_window, ratio)
    x, grid, x_lr = inputs(32, 24, ratio)
    whole = attention(x, grid, x_lr).unflatten(1, grid)
    features = x.unflatten(1, grid)
    for top, left, height, width in [(0, 0, 8, 8), (8, 16, 24, 8), (16, 8, 16, 16), (24, 0, 8, 24)]:
        cut = (slice(None), slice(top // ratio, (top + height) // ratio), slice(left // ratio, (left + width) // ratio))
        crop = features[cut]
        result = attention(crop.flatten(1, 2), crop.shape[1:3], x_lr[:, top : top + height, left : left + width])
        torch.testing.assert_close(result.unflatten(1, crop.shape[1:3]), whole[cut], rtol=0, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(height=st.integers(1, 19), width=st.integers(1, 19), level=st.integers(0, 3))
@torch.no_grad()
def test_any_size_is_finite_and_local(height, width, level):
    """No NaN from padding, and moving one LR token moves only the queries of its own cell."""
    ratio = 2**level
    attention = layer(8 // ratio, ratio)
    x, grid, x_lr = inputs(height, width, ratio, batch=1)
    before = attention(x, grid, x_lr)
    assert before.isfinite().all()
    moved = x_lr.clone()
    moved[0, height - 1, width - 1] += 1.0
    changed = (attention(x, grid, moved) - before)[0].abs().amax(-1).unflatten(0, grid) > 0
    last_cell = torch.zeros(grid, dtype=torch.bool)
    last_cell[(height - 1) // 8 * 8 // ratio :, (width - 1) // 8 * 8 // ratio :] = True
    assert not changed[~last_cell].any()
    assert changed[last_cell].any()


@torch.no_grad()
def test_one_global_window_sees_everything():
    """The ablation without windows: every query depends on every LR token."""
    attention = layer(None, 2, relative_bias=False)
    x, grid, x_lr = inputs(9, 5, 2, batch=1)
    before = attention(x, grid, x_lr)
    moved = x_lr.clone()
    moved[0, 8, 4] += 3.0
    assert ((attention(x, grid, moved) - before)[0].abs().amax(-1) > 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_masks_without_nan(dtype):
    """The mask is the lowest number of the dtype itself: no overflow to -inf."""
    attention = layer(4, 2).to(dtype)
    x, grid, x_lr = inputs(9, 5, 2)
    result = attention(x.to(dtype), grid, x_lr.to(dtype))
    assert result.dtype == dtype and result.isfinite().all()


@torch.no_grad()
def test_the_injected_attention_gets_the_bias():
    """A host's attention receives (B N, H, S^2, D), (B N, H, s^2, D) and one float bias that broadcasts."""
    seen = []

    def attention(q, k, v, bias=None):
        seen.append((q.shape, k.shape, bias.shape, bias.dtype))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)

    window = layer(4, 2, attention=attention)
    window(*inputs(16, 8, 2))
    window(*inputs(9, 8, 2))
    assert seen[0] == ((4, 2, 16, 16), (4, 2, 64, 16), (1, 2, 16, 64), torch.float32)
    assert seen[1] == ((4, 2, 16, 16), (4, 2, 64, 16), (4, 2, 16, 64), torch.float32)
