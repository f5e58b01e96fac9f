"""LSA KSampler, and its parts for SamplerCustom: SIGMAS, SAMPLER, the empty prompt (paper Sec. 3.3, decision 0008)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
from .control_hooks import is_controlled
from .finite import broken, sampling_error
from .guidance import guide_between
from .late_state import LateState, fingerprint, starts_late_alike
from .lsa_patch import check_channels, is_patched, lsa_config, patch_denoised, strength_inputs
from .lsa_sampler import UNCUTTABLE, LSARun, LSASampler, Target, preserves_variance
from .schedules import (
    DEFAULT_SCHEDULER,
    SCHEDULER_TOOLTIP,
    SPACINGS,
    schedule_sigmas,
    scheduler_names,
    spaced_sigmas,
)
from .sockets import KEY, ClearSRSocket

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

    from .sockets import ClearSRBundle

NODE = "LSA KSampler"
TARGETS: dict[str, Target] = {"step (paper)": "step", "x0 (denoised)": "x0"}


def strength_map(mask: Tensor | None, latent: dict, name: str) -> Tensor | None:
    """Bring a MASK to the latent's grid.

    Args:
        mask: (H, W) or (B, H, W) in [0, 1], painted on the picture without padding, at any size; None = none.
        latent: LATENT x_lr; its entry tells which part of it is padding.
        name: of the socket, for messages.

    Returns:
        (B, 1, h, w) in [0, 1]; the padding repeats the mask's last row and column.
    """
    if mask is None:
        return None
    mask = mask.reshape(-1, 1, *mask.shape[-2:]).float()  # (B, 1, H, W)
    if not bool(mask.isfinite().all()):
        raise ValueError(f"{NODE}: {name} contains values that are not numbers (NaN or infinite).")
    pictures = latent["samples"].shape[0]
    if mask.shape[0] not in (1, pictures):
        raise ValueError(
            f"{NODE}: {name} holds {mask.shape[0]} masks, but lr_latent {pictures} picture{'s' * (pictures > 1)}. "
            "Connect one mask for all, or one for each picture."
        )
    return torch.nn.functional.avg_pool2d(padded_mask(mask, latent), 8).clamp(0.0, 1.0)


def padded_mask(mask: Tensor, latent: dict) -> Tensor:
    """Lay a mask over the picture without its padding: (B, 1, H, W) of any size becomes (B, 1, 8 h, 8 w)."""
    rows, columns = latent["samples"].shape[-2:]
    entry = latent.get(KEY)
    shares = (1.0, 1.0)
    if entry is not None:
        pairs = zip(entry["content_size"], entry["padded_size"], strict=True)
        shares = tuple(content / padded for content, padded in pairs)
    content = tuple(max(1, round(size * 8 * share)) for size, share in zip((rows, columns), shares, strict=True))
    mask = torch.nn.functional.interpolate(mask, content, mode="bilinear", align_corners=False)
    right, bottom = columns * 8 - content[1], rows * 8 - content[0]
    return torch.nn.functional.pad(mask, (0, right, 0, bottom), mode="replicate")


def noise_mask_of(latent: dict) -> Tensor | None:
    """Return the host's mask of what may change, laid over the picture where that is padded; else as it is."""
    mask, entry = latent.get("noise_mask"), latent.get(KEY)
    if mask is None or entry is None or entry["content_size"] == entry["padded_size"]:
        return mask
    return padded_mask(mask.reshape(-1, 1, *mask.shape[-2:]).float(), latent)


def empty_prompt(null_text: Tensor) -> list:
    """Return the CONDITIONING of the empty prompt, (1, tokens, width), that ClearSR files carry."""
    return [[null_text[None], {}]]


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


def _mistakes(
    model: ModelPatcher, lr_latent: dict, lsa: LSAConfig, target: Target, maps: dict[str, tuple[float, Tensor | None]]
) -> Iterator[str]:
    """Yield a sentence for everything that will do nothing, or something else than it seems to."""
    attachment = model.get_attachment(KEY)
    if attachment is not None and not is_controlled(model):
        yield (
            f"{NODE}: DPM/SPM Control Apply is missing between ClearSR Loader and this node, or bypassed, so the model "
            "does not see the low-resolution picture."
        )
    entry, controls = lr_latent.get(KEY), (attachment or {}).get("encoded")
    if entry is not None and controls is not None and not _equal(entry["encoded"], controls):
        yield (
            f"{NODE}: lr_latent was encoded from another picture than the one that controls this MODEL, or otherwise. "
            "Connect the same LR Latent Encode to DPM/SPM Control Apply and to this node."
        )
    for name, (strength, map_) in maps.items():
        if strength and map_ is not None and not bool(map_.any()):
            yield (
                f"{NODE}: {name}_mask is black everywhere, so {name} does nothing. Paint white where it shall act, or "
                "disconnect the mask."
            )
    if target == "x0" and (lsa.ela_strength or lsa.lla_strength) and is_patched(model):
        yield f"{NODE}: with this target alpha and beta of this node replace those of LSA Patch."


def _equal(first: Tensor, second: Tensor) -> bool:
    return first is second or (first.shape == second.shape and torch.equal(first, second.to(first)))


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
        positive = _conditioning(model, positive, "positive")
        negative = _conditioning(model, negative, "negative")
        ela_map = strength_map(alpha_mask, lr_latent, "alpha_mask")
        lla_map = strength_map(beta_mask, lr_latent, "beta_mask")
        for text in _mistakes(model, lr_latent, lsa, moved, {"alpha": (alpha, ela_map), "beta": (beta, lla_map)}):
            notice(cls, text)
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


class ClearSRScheduler(io.ComfyNode):
    """MODEL -> SIGMAS of spaced DDPM."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ClearSRScheduler",
            display_name="ClearSR Scheduler",
            description=(
                "The noise levels of spaced DDPM for SamplerCustom and SamplerCustomAdvanced, exact for any number of "
                "steps."
            ),
            search_aliases=["clearsr", "sigmas", "spaced ddpm", "timestep respacing"],
            inputs=[
                widget(
                    io.Model,
                    "model",
                    tooltip="Whose noise levels: SD 1.5, SD 2.1, SDXL or another with 1000 timesteps.",
                ),
                widget(io.Int, "steps", default=50, min=1, max=1000, tooltip="Sampling steps. The paper uses 50."),
                widget(
                    io.Combo, "spacing", options=list(SPACINGS), default=DEFAULT_SCHEDULER, tooltip=SCHEDULER_TOOLTIP
                ),
            ],
            outputs=[io.Sigmas.Output(display_name="SIGMAS", tooltip="steps + 1 noise levels, the last one 0.")],
        )

    @classmethod
    def execute(cls, model: ModelPatcher, steps: int = 50, spacing: str = DEFAULT_SCHEDULER) -> io.NodeOutput:
        return io.NodeOutput(spaced_sigmas("ClearSR Scheduler", model, steps, spacing))


class ClearSRSampler(io.ComfyNode):
    """-> SAMPLER: the host's ddpm with the LR start and noise of its own."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ClearSRSampler",
            display_name="ClearSR Sampler",
            description=(
                "Spaced DDPM for SamplerCustom and SamplerCustomAdvanced. Give x_lr as the latent_image. With ClearSR "
                "Scheduler it is LSA KSampler without the adjustment, but for files whose start is the plain encoder's "
                "x_lr: give theirs from VAE Encode. Add LSA Patch for the adjustment."
            ),
            search_aliases=["clearsr", "ddpm", "sampler"],
            inputs=[
                widget(
                    io.Boolean,
                    "start_from_lr",
                    default=True,
                    tooltip="Start from the latent_image noised to the last training step, as SeeSR does, where the "
                    "SIGMAS begin at the top and noise is added. Off, and elsewhere: noised to exactly the first noise "
                    "level of the SIGMAS.",
                ),
            ],
            outputs=[io.Sampler.Output(display_name="SAMPLER", tooltip="For SamplerCustom or SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(cls, start_from_lr: bool = True) -> io.NodeOutput:
        off = LSAConfig(ela_strength=0.0, lla_strength=0.0)
        return io.NodeOutput(LSASampler("ddpm", LSARun(off, start="lr_at_top" if start_from_lr else "host")))


class ClearSREmptyPrompt(io.ComfyNode):
    """CLEARSR -> CONDITIONING of the empty prompt."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ClearSREmptyPrompt",
            display_name="ClearSR Empty Prompt",
            description=(
                "The empty prompt that a ClearSR file carries, for stock samplers: no text encoder is needed. LSA "
                "KSampler takes it by itself."
            ),
            search_aliases=["clearsr", "conditioning", "null text", "unconditional", "empty"],
            inputs=[widget(ClearSRSocket, "clearsr", tooltip="From ClearSR Loader.")],
            outputs=[io.Conditioning.Output(display_name="CONDITIONING", tooltip="Positive and negative alike.")],
        )

    @classmethod
    def execute(cls, clearsr: ClearSRBundle) -> io.NodeOutput:
        return io.NodeOutput(empty_prompt(clearsr.null_text))
