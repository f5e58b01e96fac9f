"""LSA KSampler: sampling with Latent Space Adjustment (paper Sec. 3.3, decision 0008)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from comfy_api.latest import io
from torch import Tensor

from ..clearsr_core.lsa import LSAConfig
from . import host_random
from .compat import HostObject, inference_dtype, notice, schema, widget
from .custom_sampling import empty_prompt
from .finite import broken, sampling_error
from .guidance import guide_between
from .late_state import LateState, fingerprint, starts_late_alike
from .lsa_patch import check_channels, lsa_config, patch_denoised, strength_inputs
from .lsa_sampler import UNCUTTABLE, LSARun, LSASampler, Target, preserves_variance
from .masks import noise_mask_of, strength_map
from .mistakes import mistakes, other_than_recommended
from .schedules import (
    DEFAULT_SCHEDULER,
    SCHEDULER_TOOLTIP,
    schedule_sigmas,
    scheduler_names,
)
from .sockets import KEY

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher


NODE = "LSA KSampler"
TARGETS: dict[str, Target] = {"step (paper)": "step", "x0 (denoised)": "x0"}


def _conditioning(model: ModelPatcher, given: list | None, socket: str) -> list:
    if given is not None:
        return given
    attachment = model.get_attachment(KEY)
    if attachment is None:
        raise ValueError(
            f"{NODE}: {socket} is not connected, and this MODEL does not come from ClearSR Loader, so there is no "
            "empty prompt to take instead. Connect a CONDITIONING, for example CLIP Text Encode with an empty text."
        )
    return empty_prompt(attachment["null_text"])


def _check_sampler(sampler_name: str, model: ModelPatcher, lsa: LSAConfig) -> None:
    """Refuse combinations in which Eqs. 3 and 4 have no state to move."""
    if not (lsa.ela_strength or lsa.lla_strength):
        return
    if sampler_name in UNCUTTABLE:
        raise ValueError(
            f"{NODE}: the sampler {sampler_name} {UNCUTTABLE[sampler_name]}. "
            "Choose another sampler_name, set target to 'x0 (denoised)', or set alpha and beta to 0."
        )
    if not preserves_variance(model.get_model_object("model_sampling")):
        raise ValueError(
            f"{NODE}: target 'step (paper)' is defined for diffusion models such as Stable Diffusion; this model is a "
            "flow model. Set target to 'x0 (denoised)' or use LSA Patch."
        )


class ClearSRLSAKSampler(io.ComfyNode):
    """MODEL, LATENT x_lr -> LATENT."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        alpha, beta, ela_end, lla_start, rule = strength_inputs()
        return schema(
            node_id="ClearSRLSAKSampler",
            display_name="LSA KSampler",
            description=(
                "Samples with Latent Space Adjustment: alpha pulls the early steps towards the low-resolution picture "
                "(fidelity), beta pushes the late steps away from it (detail). With alpha and beta 0 it is the plain "
                "sampler. Changing only beta repeats only the last steps."
            ),
            search_aliases=["clearsr", "ksampler", "sampler", "latent space adjustment", "lsa", "alpha beta"],
            inputs=[
                widget(io.Model, "model", tooltip="The MODEL of DPM/SPM Control Apply."),
                widget(io.Latent, "lr_latent", tooltip="x_lr from LR Latent Encode."),
                widget(
                    io.Int,
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="The noise. The same seed gives the same picture; noise is drawn on the CPU, but for "
                    "samplers that end in _gpu.",
                ),
                widget(io.Int, "steps", default=50, min=1, max=1000, tooltip="Sampling steps. The paper uses 50."),
                widget(
                    io.Float,
                    "cfg",
                    default=1.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="Guidance. 1 = off, the fastest; above it the empty or negative prompt steers the decoder.",
                ),
                widget(
                    io.Combo,
                    "sampler_name",
                    options=comfy.samplers.KSampler.SAMPLERS,
                    default="ddpm",
                    tooltip="ddpm is the paper's. Samplers that remember earlier steps (dpmpp_2m, lms, ...) start that "
                    "memory anew at every adjusted step.",
                ),
                widget(
                    io.Combo,
                    "scheduler",
                    options=scheduler_names(),
                    default=DEFAULT_SCHEDULER,
                    tooltip=SCHEDULER_TOOLTIP,
                ),
                widget(
                    io.Float,
                    "denoise",
                    default=1.0,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    round=0.01,
                    tooltip="1: the whole way, as in the paper. Less: start from the low-resolution latent part of the "
                    "way, with less noise; more faithful, less invented.",
                ),
                alpha,
                beta,
                ela_end,
                lla_start,
                widget(
                    io.Combo,
                    "target",
                    options=list(TARGETS),
                    default="step (paper)",
                    tooltip="What is adjusted. step: the sampler's state after each step, as in the paper. x0: the "
                    "denoised estimate, which is stronger at the same numbers.",
                ),
                widget(
                    io.Boolean,
                    "start_from_lr",
                    default=True,
                    tooltip="Start from the low-resolution latent plus noise, as SeeSR does; off = from noise alone. "
                    "With denoise below 1 it is always the low-resolution latent.",
                ),
                rule,
                widget(
                    io.Conditioning,
                    "positive",
                    optional=True,
                    tooltip="Text for the UNet. Not connected: the empty prompt that the ClearSR file carries.",
                ),
                widget(
                    io.Conditioning,
                    "negative",
                    optional=True,
                    tooltip="Negative text, read when cfg is above 1. Not connected: the empty prompt.",
                ),
                widget(
                    io.Mask,
                    "alpha_mask",
                    optional=True,
                    tooltip="Where alpha acts: white = full, black = not at all. Painted on the picture, any size.",
                ),
                widget(
                    io.Mask,
                    "beta_mask",
                    optional=True,
                    tooltip="Where beta acts: white = full, black = not at all. Painted on the picture, any size.",
                ),
                widget(
                    io.Float,
                    "cfg_start",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    advanced=True,
                    tooltip="Guidance acts after this share of the steps. Steps without it take half the time.",
                ),
                widget(
                    io.Float,
                    "cfg_end",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    advanced=True,
                    tooltip="Guidance acts until this share of the steps. 1 = to the end.",
                ),
            ],
            outputs=[
                io.Latent.Output(
                    display_name="LATENT", tooltip="For VAE Decode with the plain VAE, then ClearSR Color Fix."
                )
            ],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        lr_latent: dict,
        seed: int = 0,
        steps: int = 50,
        cfg: float = 1.0,
        sampler_name: str = "ddpm",
        scheduler: str = DEFAULT_SCHEDULER,
        denoise: float = 1.0,
        alpha: float = 0.01,
        beta: float = 0.01,
        ela_end: float = 0.3,
        lla_start: float = 0.88,
        target: str = "step (paper)",
        start_from_lr: bool = True,
        strength_rule: str = "per step (paper)",
        positive: list | None = None,
        negative: list | None = None,
        alpha_mask: Tensor | None = None,
        beta_mask: Tensor | None = None,
        cfg_start: float = 0.0,
        cfg_end: float = 1.0,
    ) -> io.NodeOutput:
        if cfg_start > cfg_end:
            raise ValueError(
                f"{NODE}: cfg_start {cfg_start} lies after cfg_end {cfg_end}, so guidance would never act. Swap them, "
                "or set cfg to 1 for no guidance."
            )
        lsa = lsa_config(NODE, alpha, beta, ela_end, lla_start, strength_rule)
        moved = TARGETS[target]
        x_lr = check_channels(NODE, model, lr_latent)  # (B, 4, h, w) VAE units
        if moved == "step":
            _check_sampler(sampler_name, model, lsa)
        missing_text = [name for name, text in (("positive", positive), ("negative", negative)) if text is None]
        positive = _conditioning(model, positive, "positive")
        negative = _conditioning(model, negative, "negative")
        ela_map = strength_map(NODE, alpha_mask, lr_latent, "alpha_mask")
        lla_map = strength_map(NODE, beta_mask, lr_latent, "beta_mask")
        for text in mistakes(NODE, model, lr_latent, lsa, moved, {"alpha": (alpha, ela_map), "beta": (beta, lla_map)}):
            notice(cls, text)
        departure = other_than_recommended(
            NODE,
            model,
            scheduler=scheduler,
            steps=steps,
            cfg=cfg,
            denoise=denoise,
            start_from_lr=start_from_lr,
            missing_text=missing_text,
        )
        if departure is not None:
            notice(cls, departure)
        sigmas = schedule_sigmas(NODE, model, steps, sampler_name, scheduler, denoise)

        whole = denoise >= 1.0
        batch_index = lr_latent.get("batch_index")
        # The numbers of the host's prepare_noise, which seeds torch's global generator with them.
        noise = comfy.sample.prepare_noise_inner(x_lr, torch.Generator().manual_seed(seed), batch_index)
        noise_mask = noise_mask_of(lr_latent)
        # Everything that leads to the late phase; beta and its mask come after it.
        key = None
        if noise_mask is None and starts_late_alike(model, len(sigmas) - 1, lsa):
            key = fingerprint(
                [
                    sampler_name,
                    sigmas,
                    seed,
                    batch_index,
                    cfg,
                    cfg_start,
                    cfg_end,
                    x_lr,
                    start_from_lr,
                    whole,
                    positive,
                    negative,
                ],
                [alpha, ela_end, lla_start, moved, strength_rule, ela_map],
            )
        process_in: Callable[[Tensor], Tensor] = cast(HostObject, model.get_model_object("latent_format")).process_in
        run = LSARun(
            lsa=lsa,
            target=moved,
            lr_latent=process_in(x_lr),
            ela_map=ela_map,
            lla_map=lla_map,
            rows=None if batch_index is None else tuple(batch_index),
            start="host" if not whole else "lr" if start_from_lr else "noise",
            late_state=None if key is None else LateState(key, model),
        )
        sampled = model
        if moved == "x0" and (alpha or beta):
            sampled = patch_denoised(model, x_lr, lsa, ela_map, lla_map)
        sampled = guide_between(sampled, sigmas, cfg_start, cfg_end)
        with host_random.seeded(seed, model.load_device):
            samples = comfy.sample.sample_custom(
                sampled,
                noise,
                cfg,
                LSASampler(sampler_name, run),
                sigmas,
                positive,
                negative,
                x_lr,
                noise_mask=noise_mask,
                callback=latent_preview.prepare_callback(model, len(sigmas) - 1),
                disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
                seed=seed,
            )
        if broken(samples):
            raise sampling_error(NODE, inference_dtype(model.model))
        return io.NodeOutput({**lr_latent, "samples": samples})
