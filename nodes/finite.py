"""Says where numbers stopped being numbers (decision 0022).

Half precision overflows in some models, and a NaN goes through everything after it: the user sees a black picture and
nothing else. So each stage is looked at where that costs next to nothing, and the error names the stage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..clearsr_core.control import ControlResiduals

VAE_HELP = "start ComfyUI with --fp32-vae (or --bf16-vae)"
_WHAT = "values that are not numbers (NaN or infinite)"


def broken(*tensors: Tensor | None) -> bool:
    """Tell whether any number is NaN or infinite. Waits for the device."""
    return not all(bool(torch.isfinite(tensor).all()) for tensor in tensors if tensor is not None)


def flat(residuals: ControlResiduals) -> tuple[Tensor, ...]:
    """Return every residual of a control, finest first, the middle last."""
    return (*residuals.down, residuals.mid)


def name_of(dtype: torch.dtype) -> str:
    """Return a dtype as people write it: float16."""
    return str(dtype).removeprefix("torch.")


def unet_help(dtype: torch.dtype) -> str:
    """Say what to do about a UNet, DPM or SPM that overflows in `dtype`."""
    if dtype == torch.float32:
        return (
            "That is full precision, so the cause is the model, a LoRA or another patch on it, or a setting that is "
            "far too large (cfg, alpha, beta, a strength): take out what was added last."
        )
    wider = "--bf16-unet or --fp32-unet" if dtype == torch.float16 else "--fp32-unet"
    return f"This precision is too coarse for the model: start ComfyUI with {wider}."


def encoder_error(node: str, file: str, dtype: torch.dtype) -> ValueError:
    """Return the error for x_lr."""
    if dtype == torch.float32:
        advice = "That is full precision, so the VAE is damaged or does not belong to the file: load it anew."
    else:
        advice = f"Set encoder_precision of ClearSR Loader to float32, or {VAE_HELP}."
    return ValueError(f"{node}: the encoder of '{file}' made {_WHAT} in {name_of(dtype)} (stage: encode). {advice}")


def sampling_error(node: str, dtype: torch.dtype) -> ValueError:
    """Return the error for a sampled latent that would decode to a black picture."""
    return ValueError(f"{node}: sampling ended in {_WHAT}, computed in {name_of(dtype)}. {unet_help(dtype)}")


class RunCheck:
    """The checks of one sampling run: the first control, the first prediction, the result.

    Overflow shows at the first step or nearly never. The first control and prediction are waited for, once per run;
    after that only the result is looked at, when the run is over anyway.
    """

    def __init__(self, node: str, file: str, dtype: torch.dtype) -> None:
        self.node, self.file, self.dtype = node, file, dtype
        self._control_seen = self._prediction_seen = False

    def control(self, residuals: ControlResiduals, alone: Mapping[str, Callable[[], ControlResiduals]]) -> None:
        """Look at the first control of the run.

        Args:
            residuals: of DPM and SPM together.
            alone: name -> computes the residuals of that one again; asked only where there is an error to name.
        """
        if self._control_seen:
            return
        self._control_seen = True
        if broken(*flat(residuals)):
            wrong = [name for name, compute in alone.items() if broken(*flat(compute()))]
            raise self._error(" and ".join(wrong) or "the sum of DPM and SPM")

    def prediction(self, x: Tensor, denoised: Tensor, uncontrolled: Callable[[], Tensor]) -> None:
        """Look at the first prediction of the run.

        Args:
            x: noisy latent that it was made from.
            denoised: the prediction.
            uncontrolled: makes it again without DPM and SPM; asked only where there is an error to name.
        """
        if self._prediction_seen:
            return
        self._prediction_seen = True
        if not broken(denoised):
            return
        if broken(x):
            raise ValueError(
                f"{self.node}: the latent that is to be sampled holds {_WHAT} before the first step. The node that "
                "made it is broken."
            )
        if broken(uncontrolled()):
            raise self._error("the UNet")
        raise self._error("the UNet under the control of DPM and SPM, and not without it,")

    def result(self, samples: Tensor, last_control: Iterable[tuple[ControlResiduals, Tensor | None]]) -> None:
        """Look at the result of the run.

        Args:
            samples: (B, 4, h, w).
            last_control: residuals that are still at hand, each with the x_t that they were computed from.
        """
        if not broken(samples):
            return
        by_control = any(broken(*flat(residuals)) and not broken(x_t) for residuals, x_t in last_control)
        raise self._error("DPM or SPM" if by_control else "the UNet or the sampler", " after the first step")

    def _error(self, stage: str, when: str = "") -> ValueError:
        return ValueError(
            f"{self.node}: {stage} made {_WHAT} in {name_of(self.dtype)}{when} ('{self.file}'). {unet_help(self.dtype)}"
        )
