"""What a ClearSR model is: the frozen configurations that its checkpoint carries and its networks are built from."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, cast

LATENT_SCALE = 0.18215  # of Stable Diffusion 1 and 2: model units = VAE latent * LATENT_SCALE

Config = TypeVar("Config", "ControlConfig", "BaseConfig", "RecommendedSampling", "ClearSRConfig")


@dataclass(frozen=True)
class ControlConfig:
    """DPM and SPM, and through them the UNet that they control (paper Sec. 3.1 and 3.2).

    The host UNet has the same levels: `widths[k]` channels on a grid of ceil(h / 2^k) x ceil(w / 2^k) latent pixels,
    `layers_per_block` ResBlocks per level of the encoder, transformers at the levels marked in `attention_levels`.
    """

    widths: tuple[int, ...] = (320, 640, 1280, 1280)  # channels per level, multiples of norm_groups
    attention_levels: tuple[bool, ...] = (True, True, True, False)  # levels with transformers, as has the middle
    layers_per_block: int = 2  # ResBlocks per level
    head_channels: int = 64  # channels per attention head; divides the width of every level with attention
    context_dim: int = 1024  # width of the text (and image prompt) tokens
    latent_channels: int = 4
    norm_groups: int = 32
    query_windows: tuple[int, ...] = (8, 4, 2, 1)  # S per level, s = S * 2**level; () = one global window
    window_attention: bool = True  # False: a plain ControlNet (ablation)
    relative_bias: Literal["aligned", "none"] = "aligned"  # B of Eq. 2
    control_input: Literal["lr", "lr+xt"] = "lr"  # what the networks see: x_lr, or x_t with x_lr added
    control_time: Literal["t", "fixed"] = "t"  # "fixed": the control is the same at every step
    control_text: Literal["null", "conditioning"] = "null"  # DPM's text: the empty prompt, or that of each conditioning
    fixed_timestep: int = 0  # for control_time "fixed"; 0 is where the UNet's encoder met latents as clean as x_lr
    use_dpm: bool = True  # at least one of the two; both in the paper's full model
    use_spm: bool = True

    def __post_init__(self) -> None:
        _check_choice("relative_bias", self.relative_bias, ("aligned", "none"))
        _check_choice("control_input", self.control_input, ("lr", "lr+xt"))
        _check_choice("control_time", self.control_time, ("t", "fixed"))
        _check_choice("control_text", self.control_text, ("null", "conditioning"))
        _check_positive(
            layers_per_block=self.layers_per_block,
            head_channels=self.head_channels,
            context_dim=self.context_dim,
            latent_channels=self.latent_channels,
            norm_groups=self.norm_groups,
            levels=len(self.widths),
        )
        for width in self.widths:
            if width <= 0 or width % self.norm_groups:
                raise ValueError(f"width {width} of {self.widths} is not a multiple of norm_groups {self.norm_groups}")
        if self.widths[0] % 2:
            raise ValueError(f"the first width {self.widths[0]} must be even: it is the size of the time embedding")
        if len(self.attention_levels) != len(self.widths):
            raise ValueError(f"{len(self.attention_levels)} attention_levels for {len(self.widths)} widths")
        for width, attends in zip(self.widths, (*self.attention_levels[:-1], True), strict=True):
            if attends and width % self.head_channels:
                raise ValueError(f"head_channels {self.head_channels} does not divide the width {width}")
        if self.query_windows and len(self.query_windows) != len(self.widths):
            raise ValueError(f"{len(self.query_windows)} query_windows for {len(self.widths)} widths (or none at all)")
        if any(window < 1 for window in self.query_windows):
            raise ValueError(f"query_windows {self.query_windows} must be 1 or more")
        if not self.query_windows and self.window_attention and self.relative_bias != "none":
            raise ValueError("one global window (query_windows=()) has no relative bias: set relative_bias='none'")
        if not 0 <= self.fixed_timestep <= 999:
            raise ValueError(f"fixed_timestep {self.fixed_timestep} is not in 0..999")
        if not (self.use_dpm or self.use_spm):
            raise ValueError("use_dpm and use_spm are both off: nothing is left to control with")
        if self.control_text == "conditioning" and not self.use_dpm:
            raise ValueError("control_text is 'conditioning', but without DPM (use_dpm) nothing reads text")

    @property
    def levels(self) -> int:
        """Number of resolutions."""
        return len(self.widths)

    def to_dict(self) -> dict[str, Any]:
        """Return a table of plain values that JSON can hold."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> ControlConfig:
        """Rebuild from `to_dict`'s table; an unknown key or an impossible value raises ValueError."""
        return _build(cls, table)


@dataclass(frozen=True)
class BaseConfig:
    """The diffusion UNet and the KL autoencoder underneath: of SD 2.1, or of a self-contained checkpoint."""

    unet_widths: tuple[int, ...]  # channels per UNet level
    head_channels: int  # channels per attention head of the UNet
    context_dim: int  # width of the UNet's text tokens
    vae_widths: tuple[int, ...]  # channels per autoencoder level, finest first; 4 levels make f8
    vae_blocks: int  # ResBlocks per encoder level (the decoder has one more)
    norm_groups: int = 32  # of every group norm of both networks
    latent_channels: int = 4  # of both networks

    def __post_init__(self) -> None:
        _check_positive(
            head_channels=self.head_channels,
            context_dim=self.context_dim,
            vae_blocks=self.vae_blocks,
            norm_groups=self.norm_groups,
            latent_channels=self.latent_channels,
        )
        for name, widths in (("unet_widths", self.unet_widths), ("vae_widths", self.vae_widths)):
            if not widths or any(width <= 0 or width % self.norm_groups for width in widths):
                raise ValueError(f"{name} {widths} must be multiples of norm_groups {self.norm_groups}")
            if any(width % widths[0] for width in widths):
                raise ValueError(f"{name} {widths} must be multiples of the first: hosts know them as such")

    def to_dict(self) -> dict[str, Any]:
        """Return a table of plain values that JSON can hold."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> BaseConfig:
        """Rebuild from `to_dict`'s table; an unknown key or an impossible value raises ValueError."""
        return _build(cls, table)


@dataclass(frozen=True)
class RecommendedSampling:
    """Sampling settings that the weights were made for; others give a worse result without any error."""

    spacing: Literal["leading", "linspace", "trailing"]  # of the timesteps of spaced DDPM
    steps: int
    cfg: float  # guidance scale; 1 = without guidance
    start: Literal["lr", "noise"]  # x_lr noised to the last timestep, or noise alone
    text: bool  # a positive and a negative prompt

    def __post_init__(self) -> None:
        _check_choice("spacing", self.spacing, ("leading", "linspace", "trailing"))
        _check_choice("start", self.start, ("lr", "noise"))
        if not 1 <= self.steps <= 1000:
            raise ValueError(f"recommended steps {self.steps} are not in 1..1000")
        if not 1.0 <= self.cfg <= 100.0:
            raise ValueError(f"recommended cfg {self.cfg} is not in 1..100")

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> RecommendedSampling:
        """Rebuild from a table; an unknown key or an impossible value raises ValueError."""
        return _build(cls, table)


@dataclass(frozen=True)
class ClearSRConfig:
    """A whole checkpoint: control networks, LoRAs, image prompt, and the base that they belong to."""

    control: ControlConfig = field(default_factory=lambda: SD21_BASE)
    lora_rank: int = 16  # of both LoRAs; 0 = none trained
    prompt_mode: Literal["pooled", "patch", "null"] = "pooled"  # image prompt p: pooled feature, patch tokens, or none
    anchor: Literal["lr_encoder", "plain"] = "lr_encoder"  # x_lr of the start and LSA: with LoRA, or without
    latent_scale: float = LATENT_SCALE  # model units = VAE latent * latent_scale; another one needs a base of its own
    prediction: Literal["eps"] = "eps"
    base: BaseConfig | None = None  # None: needs the user's SD 2.1-base; else the file carries these networks
    base_fingerprint: str = ""  # of the UNet that it was trained on (fingerprint.py); "" = not recorded
    latent_rgb: tuple[tuple[float, ...], ...] | None = (
        None  # a row of 3 per channel: latent -> RGB for previews of a narrow base
    )
    image_encoder: bool = False  # the file carries its own image prompt encoder
    clip_width: int = 0  # of CLIP's hidden states, which image_projection makes patch tokens of; 0 = the file has none
    recommended: RecommendedSampling | None = None  # None: the defaults of the nodes

    def __post_init__(self) -> None:
        _check_choice("prompt_mode", self.prompt_mode, ("pooled", "patch", "null"))
        _check_choice("anchor", self.anchor, ("lr_encoder", "plain"))
        _check_choice("prediction", self.prediction, ("eps",))
        if self.lora_rank < 0:
            raise ValueError(f"lora_rank {self.lora_rank} is negative")
        if self.clip_width and (self.clip_width < 0 or self.image_encoder or self.prompt_mode != "patch"):
            raise ValueError(
                f"clip_width is {self.clip_width}, but prompt_mode {self.prompt_mode!r} with image_encoder "
                f"{self.image_encoder} takes no hidden states of CLIP"
            )
        if not self.latent_scale > 0:
            raise ValueError(f"latent_scale {self.latent_scale} must be above 0")
        if self.base is None and self.latent_scale != LATENT_SCALE:
            raise ValueError(f"latent_scale is {self.latent_scale}, but that of SD 2.1-base is {LATENT_SCALE}")
        rows = self.latent_rgb
        if rows is not None and (len(rows) != self.control.latent_channels or any(len(row) != 3 for row in rows)):
            raise ValueError(f"latent_rgb must have {self.control.latent_channels} rows of 3 numbers, not {rows}")
        networks, control = self.networks, self.control
        names = ("head_channels", "context_dim", "norm_groups", "latent_channels")
        theirs = (networks.unet_widths, *(getattr(networks, name) for name in names))
        ours = (control.widths, *(getattr(control, name) for name in names))
        if theirs != ours:
            owner = "SD 2.1-base" if self.base is None else "the base"
            raise ValueError(f"{owner} has (widths, {', '.join(names)}) {theirs}, the control networks {ours}")

    @property
    def networks(self) -> BaseConfig:
        """The base networks, also where the file does not carry them."""
        return self.base or SD21_NETWORKS

    def to_dict(self) -> dict[str, Any]:
        """Return a table of plain values that JSON can hold."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> ClearSRConfig:
        """Rebuild from `to_dict`'s table; an unknown key or an impossible value raises ValueError."""
        values = dict(table)
        if isinstance(values.get("control"), Mapping):
            values["control"] = ControlConfig.from_dict(values["control"])
        if isinstance(values.get("base"), Mapping):
            values["base"] = BaseConfig.from_dict(values["base"])
        if isinstance(values.get("recommended"), Mapping):
            values["recommended"] = RecommendedSampling.from_dict(values["recommended"])
        return _build(cls, values)


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(map(repr, choices))}")


def _check_positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be 1 or more")


def _build(kind: type[Config], table: Mapping[str, Any]) -> Config:
    """Construct `kind` from JSON values: lists become tuples, unknown keys and wrong types raise ValueError."""
    known = [item.name for item in dataclasses.fields(kind)]
    for key in table:
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else f"; known keys: {', '.join(known)}"
            raise ValueError(f"unknown key {key!r} in {kind.__name__}{hint}")
    try:
        values: dict[str, Any] = {key: _tuples(value) for key, value in table.items()}
        return kind(**values)
    except TypeError as error:
        raise ValueError(f"{kind.__name__} cannot be built: {error}") from error


def _tuples(value: object) -> object:
    """Turn JSON's lists into tuples, at every depth."""
    return tuple(_tuples(item) for item in cast("list[object]", value)) if isinstance(value, list | tuple) else value


# Sizes in use. SD 2.1-base (the paper's), the small model of this repository, and one for tests.
SD21_BASE = ControlConfig()
SD21_NETWORKS = BaseConfig((320, 640, 1280, 1280), 64, 1024, (128, 256, 512, 512), 2)
NANO = ControlConfig(widths=(64, 64, 128, 128), head_channels=32, context_dim=64, norm_groups=8)
TINY = ControlConfig(widths=(32, 32, 32, 32), head_channels=16, context_dim=16)
