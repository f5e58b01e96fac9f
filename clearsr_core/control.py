"""DPM and SPM, and their sum: the control x_c = DPM(x_lr) + SPM(x_lr), a residual per level of the UNet (Fig. 3)."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from .config import ControlConfig
from .layers import Downsample, Factory, ResBlock, SpatialTransformer, TimestepEmbedding, WindowCrossAttention
from .operations import Attention, Operations, scaled_dot_product


class ControlResiduals(NamedTuple):
    """x_c: what is added to the skips of the UNet (`down`, finest first) and to its middle block (`mid`).

    SD 2.1 has 12 + 1: (B, C_k, ceil(h / 2^k), ceil(w / 2^k)), three per level; the middle as the coarsest level.
    """

    down: tuple[Tensor, ...]
    mid: Tensor


class EncoderLevel(nn.Module):
    """ResBlocks (with transformers where `transformers` holds any), then Downsample except at the coarsest level."""

    def __init__(self, resnets: list[nn.Module], transformers: list[nn.Module], downsample: Downsample | None) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(transformers) if transformers else None
        self.downsamplers = nn.ModuleList([downsample]) if downsample is not None else None

    def forward(self, x: Tensor, time: Tensor, context: Tensor, x_lr: Tensor) -> list[Tensor]:
        """Return the output of every ResBlock or transformer, and of the Downsample; the last one goes on."""
        outputs: list[Tensor] = []
        for index, resnet in enumerate(self.resnets):
            x = resnet(x, time)
            if self.attentions is not None:
                x = self.attentions[index](x, context, x_lr)
            outputs.append(x)
        if self.downsamplers is not None:
            outputs.append(self.downsamplers[0](x))
        return outputs


class MiddleBlock(nn.Module):
    """ResBlock, transformer (DPM only), ResBlock at the coarsest level."""

    def __init__(self, resnets: list[nn.Module], transformer: SpatialTransformer | None) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList([transformer]) if transformer is not None else None

    def forward(self, x: Tensor, time: Tensor, context: Tensor, x_lr: Tensor) -> Tensor:
        x = self.resnets[0](x, time)
        if self.attentions is not None:
            x = self.attentions[0](x, context, x_lr)
        return self.resnets[1](x, time)


class ControlEncoder(nn.Module):
    """A copy of the UNet's encoder and middle block with a zero-initialised 1x1 convolution at every output."""

    def __init__(self, config: ControlConfig, factory: Factory, *, transformers: bool) -> None:
        super().__init__()
        widths, time = config.widths, 4 * config.widths[0]
        self.conv_in = factory.conv(config.latent_channels, widths[0], 3)
        both = config.control_input == "lr+xt"
        self.conv_in_lr = factory.conv(config.latent_channels, widths[0], 3) if both else None
        self.time_embedding = TimestepEmbedding(widths[0], factory)

        # Levels, finest first.
        levels: list[nn.Module] = []
        output_widths = [widths[0]]
        for level, width in enumerate(widths):
            below = widths[max(level - 1, 0)]
            inputs = [below] + [width] * (config.layers_per_block - 1)
            resnets = [ResBlock(channels, width, time, config.norm_groups, factory) for channels in inputs]
            attends = transformers and config.attention_levels[level]
            blocks = [_transformer(config, level, factory) for _ in resnets] if attends else []
            last = level == config.levels - 1
            levels.append(EncoderLevel([*resnets], [*blocks], None if last else Downsample(width, factory)))
            output_widths += [width] * (config.layers_per_block + (not last))
        self.down_blocks = nn.ModuleList(levels)

        # Middle.
        pair: list[nn.Module] = [ResBlock(widths[-1], widths[-1], time, config.norm_groups, factory) for _ in range(2)]
        self.mid_block = MiddleBlock(pair, _transformer(config, config.levels - 1, factory) if transformers else None)

        # Outputs, zero-initialised.
        self.controlnet_down_blocks = nn.ModuleList([factory.conv(width, width, 1) for width in output_widths])
        self.controlnet_mid_block = factory.conv(widths[-1], widths[-1], 1)

    def forward(self, x_lr: Tensor, timestep: Tensor, context: Tensor, x_t: Tensor | None) -> ControlResiduals:
        """Encode; arguments as in `ClearSRControl.forward`, already expanded to the batch."""
        time = self.time_embedding(timestep, x_lr.dtype)  # (B, 4 C)
        x_lr_last = x_lr.movedim(1, -1)  # (B, h, w, 4)
        x = self.conv_in(x_lr) if self.conv_in_lr is None else self.conv_in(x_t) + self.conv_in_lr(x_lr)

        features = [x]
        for level in self.down_blocks:
            features += level(features[-1], time, context, x_lr_last)
        middle = self.mid_block(features[-1], time, context, x_lr_last)

        down = tuple(conv(feature) for conv, feature in zip(self.controlnet_down_blocks, features, strict=True))
        return ControlResiduals(down, self.controlnet_mid_block(middle))


class DetailPreservingModule(ControlEncoder):
    """DPM: a ControlNet whose transformers also attend, window by window, to x_lr (paper Sec. 3.2)."""

    def __init__(self, config: ControlConfig, factory: Factory) -> None:
        super().__init__(config, factory, transformers=True)


class StructurePreservingModule(ControlEncoder):
    """SPM: the ControlNet's ResBlocks alone, without any attention, so that the structure of x_lr survives."""

    def __init__(self, config: ControlConfig, factory: Factory) -> None:
        super().__init__(config, factory, transformers=False)


class ClearSRControl(nn.Module):
    """x_c = DPM(x_lr) + SPM(x_lr).

    The constructor does no initialisation of its own: load a state dict, or see `initialise`.
    """

    def __init__(
        self,
        config: ControlConfig,
        *,
        ops: Operations = nn,  # layer classes: torch.nn, or a host's
        attention: Attention = scaled_dot_product,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        factory = Factory(ops, attention, dtype, device)
        self.dpm = DetailPreservingModule(config, factory) if config.use_dpm else None
        self.spm = StructurePreservingModule(config, factory) if config.use_spm else None

    def forward(
        self,
        lr_latent: Tensor,
        timestep: Tensor,
        context: Tensor,
        x_t: Tensor | None = None,
        *,
        dpm_strength: float = 1.0,
        spm_strength: float = 1.0,
    ) -> ControlResiduals:
        """Compute the control of one step.

        Args:
            lr_latent: (B, 4, h, w) x_lr in model units, any h, w, in the dtype to compute in. (Where a norm group is
                a single channel, torch refuses to normalise one pixel of one image, as it does in the UNet.)
            timestep: (B,) or (1,), 0..999; not read when `control_time` is "fixed".
            context: (B or 1, n, context_dim) null-text tokens, read by DPM's text cross-attention.
            x_t: (B, 4, h, w) noisy latent, variance-preserving scale; read when `control_input` is "lr+xt".
            dpm_strength: factor of DPM's residuals; at 0 DPM is not run.
            spm_strength: factor of SPM's residuals; at 0 SPM is not run.

        Returns:
            Residuals in the dtype of `lr_latent`; all zero as long as the output convolutions are.
        """
        batch, channels = lr_latent.shape[:2]
        if lr_latent.ndim != 4 or channels != self.config.latent_channels:
            raise ValueError(f"lr_latent {tuple(lr_latent.shape)} must be (B, {self.config.latent_channels}, h, w)")
        if context.ndim != 3 or context.shape[-1] != self.config.context_dim:
            raise ValueError(f"context {tuple(context.shape)} must be (B, n, {self.config.context_dim})")
        if self.config.control_input == "lr+xt" and (x_t is None or x_t.shape != lr_latent.shape):
            found = None if x_t is None else tuple(x_t.shape)
            raise ValueError(f"x_t {found} must be like lr_latent {tuple(lr_latent.shape)}: control_input is 'lr+xt'")
        if self.config.control_time == "fixed":
            timestep = torch.full_like(timestep, self.config.fixed_timestep)
        timestep = timestep.to(lr_latent.device).reshape(-1).expand(batch)
        context = context.to(lr_latent).expand(batch, -1, -1)

        modules = [(self.dpm, dpm_strength), (self.spm, spm_strength)]
        present = [(cast(nn.Module, module), strength) for module, strength in modules if module is not None]
        # A module at strength 0 costs nothing, but one must run to give the shapes.
        active = [(module, strength) for module, strength in present if strength != 0.0] or present[-1:]
        outputs = [_scaled(module(lr_latent, timestep, context, x_t), strength) for module, strength in active]
        return outputs[0] if len(outputs) == 1 else _sum(outputs[0], outputs[1])


def _transformer(config: ControlConfig, level: int, factory: Factory) -> SpatialTransformer:
    """Build the transformer of one level, with the window attention that aligns this level's grid with x_lr's."""
    channels = config.widths[level]
    window_attention = None
    if config.window_attention:
        window_attention = WindowCrossAttention(
            channels,
            config.latent_channels,
            config.head_channels,
            query_window=config.query_windows[level] if config.query_windows else None,
            ratio=2**level,
            relative_bias=config.relative_bias == "aligned",
            factory=factory,
        )
    return SpatialTransformer(
        channels, config.context_dim, config.head_channels, config.norm_groups, window_attention, factory
    )


def _scaled(residuals: ControlResiduals, strength: float) -> ControlResiduals:
    if strength == 1.0:
        return residuals
    return ControlResiduals(tuple(residual * strength for residual in residuals.down), residuals.mid * strength)


def _sum(detail: ControlResiduals, structure: ControlResiduals) -> ControlResiduals:
    down = tuple(d + s for d, s in zip(detail.down, structure.down, strict=True))
    return ControlResiduals(down, detail.mid + structure.mid)
