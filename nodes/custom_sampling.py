"""The parts of LSA KSampler for SamplerCustom: SIGMAS, SAMPLER, the empty prompt (decision 0007)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from comfy_api.latest import io
from torch import Tensor

from ..clearsr_core.lsa import LSAConfig
from .compat import schema, widget
from .lsa_sampler import LSARun, LSASampler
from .schedules import DEFAULT_SCHEDULER, SCHEDULER_TOOLTIP, SPACINGS, spaced_sigmas
from .sockets import ClearSRSocket

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

    from .sockets import ClearSRBundle


def empty_prompt(null_text: Tensor) -> list:
    """Return the CONDITIONING of the empty prompt, (1, tokens, width), that ClearSR files carry."""
    return [[null_text[None], {}]]


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
