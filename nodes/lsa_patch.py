"""LSA Patch: Eqs. 3 and 4 on the denoised estimate, for any model and any sampler (paper Sec. 3.3, decision 0008)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from comfy_api.latest import io
from torch import Tensor

from ..clearsr_core.lsa import LSAConfig, adjust
from .compat import schema, widget
from .sockets import KEY, LREntry, encoded_rows

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

NODE = "LSA Patch"
_POST_CFG = "sampler_post_cfg_function"  # in model_options
_MARK = "clearsr_lsa"

ALPHA_TOOLTIP = (
    "Fidelity (Eq. 3): how far each early step is pulled towards the low-resolution picture. 0 = off; the paper uses "
    "0.01 to 0.03; 1 = the early steps are the low-resolution picture."
)
BETA_TOOLTIP = (
    "Detail (Eq. 4): how far each late step is pushed away from the low-resolution picture. 0 = off; the paper uses "
    "0.01; large values overdo it."
)
ELA_END_TOOLTIP = "Alpha acts on the steps before this share of the run. 0.3 = the first 30 percent of the steps."
LLA_START_TOOLTIP = "Beta acts on the steps after this share of the run. 0.88 = the last 12 percent of the steps."
RULE_TOOLTIP = (
    "per step (paper): each step is moved by alpha or beta, so more steps move more. over the phase: keeps the look "
    "of 50 steps at any number of steps."
)
RULES: dict[str, Literal["per_step", "over_phase"]] = {"per step (paper)": "per_step", "over the phase": "over_phase"}


def lsa_config(node: str, alpha: float, beta: float, ela_end: float, lla_start: float, rule: str) -> LSAConfig:
    """Build the core's configuration from widgets; impossible ones raise ValueError in the user's words."""
    if ela_end > lla_start:
        raise ValueError(
            f"{node}: ela_end {ela_end} lies after lla_start {lla_start}, so a step would be pulled and pushed at "
            "once. Set ela_end to at most lla_start."
        )
    for name, value in (("alpha", alpha), ("beta", beta)):
        if not 0.0 <= value < float("inf"):
            raise ValueError(f"{node}: {name} is {value}; it must be 0 or more.")
    return LSAConfig(
        ela_strength=alpha, lla_strength=beta, ela_end=ela_end, lla_start=lla_start, accumulate=RULES[rule]
    )


def patch_denoised(
    model: ModelPatcher,
    lr_latent: Tensor,
    lsa: LSAConfig,
    ela_map: Tensor | None = None,
    lla_map: Tensor | None = None,
) -> ModelPatcher:
    """Return a clone of `model` whose denoised estimate is moved after guidance; an earlier patch of ours is replaced.

    Args:
        model: any MODEL; never changed.
        lr_latent: (1 or B, C, h, w) in VAE units.
        lsa: strengths and phases, by the steps of the run.
        ela_map, lla_map: (1 or B, 1, h, w) in [0, 1], multiply the strengths.
    """
    clone = model.clone()
    others = [hook for hook in clone.model_options.get(_POST_CFG, []) if not hasattr(hook, _MARK)]
    hook = _post_cfg(lr_latent, lsa, ela_map, lla_map)
    setattr(hook, _MARK, True)
    cast("dict[str, Any]", clone.model_options)[_POST_CFG] = [*others, hook]
    return clone


def is_patched(model: ModelPatcher) -> bool:
    """Return whether LSA Patch moves this model's estimates."""
    return any(hasattr(hook, _MARK) for hook in model.model_options.get(_POST_CFG, []))


def _post_cfg(
    lr_latent: Tensor, lsa: LSAConfig, ela_map: Tensor | None, lla_map: Tensor | None
) -> Callable[[dict[str, Any]], Tensor]:
    def post_cfg(values: dict[str, Any]) -> Tensor:
        denoised = values["denoised"]
        schedule = values["model_options"].get("transformer_options", {}).get("sample_sigmas")
        if schedule is None or len(schedule) < 2:
            return denoised  # called outside a run: there are no steps
        if denoised.shape[1:] != lr_latent.shape[1:] or lr_latent.shape[0] not in (1, denoised.shape[0]):
            raise ValueError(
                f"{NODE}: lr_latent {_described(lr_latent)} does not fit the latent being sampled "
                f"{_described(denoised)}. Both must have the same size and be made with the VAE of this model."
            )
        # Samplers may call the model between two sigmas of the schedule: such a call belongs to the step it is in.
        sigma = float(values["sigma"].flatten()[0])
        step = int((schedule >= sigma * (1.0 - 1e-5)).sum()) - 1
        steps = len(schedule) - 1
        reference = values["model"].process_latent_in(lr_latent).to(denoised)
        return adjust(denoised, reference, min(max(step, 0), steps - 1), steps, lsa, ela_map, lla_map)

    return post_cfg


def _described(latent: Tensor) -> str:
    sides = " x ".join(map(str, reversed(latent.shape[2:])))
    return f"({sides} latent pixels, {latent.shape[1]} channels, batch of {latent.shape[0]})"


class ClearSRLSAPatch(io.ComfyNode):
    """MODEL, LATENT x_lr -> MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ClearSRLSAPatch",
            display_name="LSA Patch (any sampler)",
            description=(
                "Latent Space Adjustment for any model and any sampler: alpha pulls the early steps towards a "
                "reference picture (fidelity), beta pushes the late steps away from it (detail). Acts on the denoised "
                "estimate; LSA KSampler moves the sampler's state itself, as in the paper."
            ),
            search_aliases=["clearsr", "lsa", "latent space adjustment", "alpha", "beta", "fidelity", "detail"],
            inputs=[
                widget(io.Model, "model", tooltip="Any diffusion model: SD 1.5, SDXL, SD 2.1, Flux, ..."),
                widget(
                    io.Latent,
                    "lr_latent",
                    tooltip="The reference picture in this model's latents and at the sampled size: LR Latent Encode, "
                    "or VAE Encode of an enlarged picture.",
                ),
                *strength_inputs(),
            ],
            outputs=[io.Model.Output(display_name="MODEL", tooltip="The MODEL with the adjustment, for any sampler.")],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        lr_latent: dict,
        alpha: float = 0.01,
        beta: float = 0.01,
        ela_end: float = 0.3,
        lla_start: float = 0.88,
        strength_rule: str = "per step (paper)",
    ) -> io.NodeOutput:
        lsa = lsa_config(NODE, alpha, beta, ela_end, lla_start, strength_rule)
        samples = check_channels(NODE, model, lr_latent)
        return io.NodeOutput(patch_denoised(model, samples, lsa))


def check_channels(node: str, model: ModelPatcher, lr_latent: dict) -> Tensor:
    """Return x_lr for start and adjustment, (B, C, h, w) in VAE units, or say why it cannot belong to `model`."""
    samples = lr_latent["samples"]
    entry: LREntry | None = lr_latent.get(KEY)
    if entry is not None and entry["anchor"] is not None:
        # Only while the latent is what was encoded. After a sampler, or a change, it is the picture that is meant.
        rows = encoded_rows(entry, samples)
        if rows is not None:
            samples = entry["anchor"][rows]
    wanted = model.get_model_object("latent_format").latent_channels
    if samples.shape[1] != wanted:
        raise ValueError(
            f"{node}: lr_latent has {samples.shape[1]} channels, but the model's latents have {wanted}. Encode the "
            "picture with the VAE that belongs to this model."
        )
    if not torch.isfinite(samples).all():
        raise ValueError(f"{node}: lr_latent contains values that are not numbers (NaN or infinite).")
    return samples


def strength_inputs() -> list[io.Input]:
    """Return the widgets that LSA Patch and LSA KSampler share."""
    return [
        widget(io.Float, "alpha", default=0.01, min=0.0, max=1.0, step=0.005, round=0.001, tooltip=ALPHA_TOOLTIP),
        widget(io.Float, "beta", default=0.01, min=0.0, max=10.0, step=0.005, round=0.001, tooltip=BETA_TOOLTIP),
        widget(io.Float, "ela_end", default=0.3, min=0.0, max=1.0, step=0.01, tooltip=ELA_END_TOOLTIP),
        widget(io.Float, "lla_start", default=0.88, min=0.0, max=1.0, step=0.01, tooltip=LLA_START_TOOLTIP),
        widget(
            io.Combo,
            "strength_rule",
            options=list(RULES),
            default="per step (paper)",
            advanced=True,
            tooltip=RULE_TOOLTIP,
        ),
    ]
