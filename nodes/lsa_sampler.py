"""A host SAMPLER that runs any k-diffusion sampler with Latent Space Adjustment between its steps (Eqs. 3 and 4).

The host's sampler functions advance a state through a list of sigmas. Ours calls the same function on slices of that
list and moves the state between the slices: the steps of an active phase run one by one, the others in one call. All
of it happens inside one call of the host's guider, so loading, conditioning, hooks and previews are the host's own.

Cutting changes nothing for samplers that use only the current state. Samplers that remember earlier steps (dpmpp_2m,
dpmpp_3m_sde, lms, ipndm, deis, res_multistep, gradient_estimation, er_sde) start that memory anew at each cut, as at
the first step of a run: inside an active phase they work at first order. heunpp2, which looks two steps ahead, does so
too. A few samplers cannot be cut at all: `UNCUTTABLE`.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

import comfy.k_diffusion.sampling
import comfy.model_sampling
import comfy.samplers
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..clearsr_core.lsa import LSAConfig, adjust, per_step_strength, phase_lengths
from ..clearsr_core.schedule import ve_to_vp, vp_to_ve
from . import host_random
from .compat import HostObject

if TYPE_CHECKING:
    from .late_state import LateState

Target = Literal["step", "x0"]
# Where a run begins. lr: x_lr noised to the last training timestep, whatever the first sigma is. lr_at_top: the same
# where the schedule begins at the top and noise is given, else as `host`. noise: N(0, 1) in the variance-preserving
# scale. host: the latent noised to exactly the first sigma, as the host does.
Start = Literal["lr", "lr_at_top", "noise", "host"]
SamplerFunction = Callable[..., Tensor]
_ROW_SEEDS = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: far from each other, and odd

# Host samplers whose noise is a Brownian path over the whole schedule; "_gpu" twins draw it on the device.
_BROWNIAN = frozenset({"dpmpp_sde", "dpmpp_2m_sde", "dpmpp_2m_sde_heun", "dpmpp_3m_sde"})
# Use only the current state, and no more of the schedule than the two ends of the step: cutting them is exact.
MEMORYLESS = frozenset(
    [
        "ddpm",
        "ddim",
        "euler",
        "euler_ancestral",
        "euler_cfg_pp",
        "heun",
        "dpm_2",
        "dpm_2_ancestral",
        "dpmpp_2s_ancestral",
        "dpmpp_sde",
        "lcm",
    ]
)
_OWN_STEPS = "chooses its own steps, so nothing can be adjusted between them"
_LATE_UPDATE = "moves the picture only when it knows the step after, so nothing can be adjusted between its steps"
# Samplers between whose steps there is no state to move, and why. uni_pc only looks in its first step, and moves in the
# second; sa_solver of ComfyUI 0.3.75 returns the state before its last step, so a single step is lost.
UNCUTTABLE = {
    "dpm_fast": _OWN_STEPS,
    "dpm_adaptive": _OWN_STEPS,
    "uni_pc": _LATE_UPDATE,
    "uni_pc_bh2": _LATE_UPDATE,
    "sa_solver": _LATE_UPDATE,
    "sa_solver_pece": _LATE_UPDATE,
}


@dataclass(frozen=True)
class LSARun:
    """What one run of the sampler needs beyond the host's own arguments."""

    lsa: LSAConfig
    target: Target = "step"  # "x0": the adjustment happens in a post-CFG patch, here only the start is ours
    lr_latent: Tensor | None = None  # (1 or B, 4, h, w) in model units; None = the latent that the host samples from
    ela_map: Tensor | None = None  # (1 or B, 1, h, w) in [0, 1]
    lla_map: Tensor | None = None
    start: Start = "lr"
    rows: tuple[int, ...] | None = None  # number of each picture, from which its noise follows; None = 0, 1, ...
    late_state: LateState | None = None  # remembers where the late phase begins


class LSASampler(comfy.samplers.KSAMPLER):
    """The host's KSAMPLER around `run`, whose start it makes of the noise that the host gives."""

    def __init__(self, name: str, run: LSARun) -> None:
        inner = comfy.samplers.sampler_object(name)
        super().__init__(
            _sampler_function(name, inner.sampler_function, run), inner.extra_options, inner.inpaint_options
        )
        self.run = run

    def max_denoise(self, model_wrap: HostObject, sigmas: Tensor) -> bool:
        return self.run.start == "noise"

    def sample(
        self,
        model_wrap: HostObject,
        sigmas: Tensor,
        extra_args: dict,
        callback: HostObject,
        noise: Tensor,
        latent_image: Tensor | None = None,
        denoise_mask: Tensor | None = None,
        disable_pbar: bool = False,
    ) -> Tensor:
        # The model that a sampler function gets has other noise for ddim: that which masks are filled with.
        run = copy.copy(self)
        run.extra_options = {**self.extra_options, "start_noise": noise}
        host = super(LSASampler, run)
        return host.sample(model_wrap, sigmas, extra_args, callback, noise, latent_image, denoise_mask, disable_pbar)


def _sampler_function(name: str, inner: SamplerFunction, run: LSARun) -> SamplerFunction:
    """Wrap a k-diffusion sampler; same signature, same scale (variance-exploding)."""

    def sample(
        model: HostObject,
        x: Tensor,
        sigmas: Tensor,
        extra_args: dict | None = None,
        callback: Callable[[dict], None] | None = None,
        disable: bool | None = None,
        start_noise: Tensor | None = None,
        **options: HostObject,
    ) -> Tensor:
        steps = len(sigmas) - 1
        if steps < 1:
            return x
        extra_args = extra_args or {}
        sampling = model.inner_model.inner_model.model_sampling
        lr_latent = model.latent_image if run.lr_latent is None else run.lr_latent.to(x)
        if start_noise is not None and preserves_variance(sampling):
            if run.start == "lr" or (
                run.start == "lr_at_top" and begins_at_the_top(sampling, sigmas) and bool(start_noise.any())
            ):
                x = lr_start(lr_latent, start_noise, float(sampling.sigma_max), sigmas[0])
            elif run.start == "noise":
                x = start_noise * torch.sqrt(1.0 + sigmas[0] ** 2)

        seeds = row_seeds(extra_args.get("seed"), run.rows or range(len(x)))
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        noise = _noise_sampler(name, inner, x, sigmas, seeds, generators)
        if noise is not None:
            options["noise_sampler"] = noise

        plan = slices(name, steps, run.lsa, run.target, run.late_state is not None)
        late_start = steps - phase_lengths(steps, run.lsa)[1]
        late_state = run.late_state if any(0 < start == late_start for start, _ in plan) else None
        remembered = late_state.recall(x) if late_state is not None else None
        if remembered is not None:
            x = remembered.x.to(x)
            plan = [(start, stop) for start, stop in plan if start >= late_start]
            for generator, state in zip(generators, remembered.noise, strict=True):
                generator.set_state(state.clone())  # torch refuses a part of another tensor
            host_random.restore(remembered.host_random, x.device)

        with tqdm(total=steps, initial=plan[0][0], disable=bool(disable)) as bar:
            for start, stop in plan:
                # dpmpp_2m and others treat the list's first sigma as a start; uni_pc writes into its last one: clone.
                x = inner(
                    model,
                    x,
                    sigmas[start : stop + 1].clone(),
                    extra_args=dict(extra_args),  # samplers put hooks of their own in
                    callback=_shifted(callback, start, bar),
                    disable=True,
                    **options,
                )
                if run.target == "step":
                    x = _adjust_state(x, lr_latent, stop - 1, steps, sigmas[stop], run)
                if stop == late_start and late_state is not None:
                    late_state.remember(x, torch.stack([generator.get_state() for generator in generators]))
        return x

    return sample


def slices(name: str, steps: int, lsa: LSAConfig, target: Target, cut_late: bool) -> list[tuple[int, int]]:
    """Cut steps 0..steps into (start, stop) pairs: each active step alone, everything between in one piece.

    Without any strength there is one piece: the plain sampler, bit for bit. The start of the late phase is a cut of
    its own (so that its state can be kept) where that is exact, or where the phases cut the schedule anyway.
    """
    early, late = phase_lengths(steps, lsa)
    ela_strength, lla_strength = per_step_strength(lsa, steps) if target == "step" else (0.0, 0.0)
    cuts = {0, steps}
    if ela_strength:
        cuts.update(range(early + 1))
    if lla_strength:
        cuts.update(range(steps - late, steps))
    if cut_late and (name in MEMORYLESS or (target == "step" and (ela_strength or lla_strength))):
        cuts.add(steps - late)
    ordered = sorted(cuts)
    return list(pairwise(ordered))


def preserves_variance(sampling: HostObject) -> bool:
    """Tell whether the sampler state is x_0 + sigma noise, whose variance-preserving form Eqs. 3 and 4 move."""
    return isinstance(sampling, comfy.model_sampling.EPS)


def begins_at_the_top(sampling: HostObject, sigmas: Tensor) -> bool:
    """Tell whether a schedule, or the first part of one, begins at the last training timestep but for a step of it.

    Leading timesteps begin below it by a step, and by what an even division of the 1000 leaves over.
    """
    first, second = (round(float(sampling.timestep(sigma))) for sigma in sigmas[:2])
    total = len(sampling.sigmas)
    step = max(1, first - second)
    left_over = max(total % step, total % (len(sigmas) - 1))
    # A single step to the picture itself says nothing about the distance of the steps.
    return total - 1 - first <= (step + left_over if float(sigmas[1]) > 0.0 else 0)


def lr_start(lr_latent: Tensor, noise: Tensor, sigma_max: float, first_sigma: Tensor) -> Tensor:
    """Return the LR start in the sampler's scale: x_lr noised to the last training timestep (decision 0007).

    In the variance-preserving scale that is `schedule.lr_start`; the first model call then takes it for a state at
    `first_sigma`, whatever timestep that is, as SeeSR does.
    """
    return vp_to_ve(ve_to_vp(lr_latent.to(noise) + sigma_max * noise, sigma_max), first_sigma)


def _adjust_state(x: Tensor, lr_latent: Tensor, step: int, steps: int, sigma: Tensor, run: LSARun) -> Tensor:
    """Apply Eq. 3 or 4 to the state after `step`, in the variance-preserving scale that the equations are about."""
    state = ve_to_vp(x, sigma)
    moved = adjust(state, lr_latent, step, steps, run.lsa, run.ela_map, run.lla_map)
    return x if moved is state else vp_to_ve(moved, sigma)


def row_seeds(seed: int | None, rows: Sequence[int]) -> list[int]:
    """Return a seed for the noise of the steps of each picture of a batch.

    They follow from the picture's number alone, so that it comes out as it does alone. Seed + 1 for the first: ComfyUI
    0.3.75 gives the first step the very noise that the run starts from; later versions add 1 too.

    Args:
        seed: of the run.
        rows: number of each picture in the batch that its noise counts from, as in the host's `batch_index`.
    """
    return [((seed or 0) + 1 + row * _ROW_SEEDS) % 2**64 for row in rows]


def _noise_sampler(
    name: str,
    inner: SamplerFunction,
    x: Tensor,
    sigmas: Tensor,
    seeds: list[int],
    generators: list[torch.Generator],
) -> Callable[[Tensor, Tensor], Tensor] | None:
    """Return one source of noise for all slices, or None for samplers that take none.

    Each slice left to itself would draw the same noise again. Noise comes from the CPU (but for the samplers that are
    there to draw it on the device): one seed, one picture, on any device.
    """
    if name.removesuffix("_gpu") in _BROWNIAN:
        low, high = sigmas[sigmas > 0].min(), sigmas.max()
        if low == high:
            return None  # a single step to zero draws no noise
        on_cpu = not name.endswith("_gpu")
        # The host's samplers begin the path of the first picture from the seed itself.
        paths = [(seed - 1) % 2**64 for seed in seeds]
        return comfy.k_diffusion.sampling.BrownianTreeNoiseSampler(
            x, low, high, seed=paths[0] if len(paths) == 1 else paths, cpu=on_cpu
        )
    if "noise_sampler" not in inspect.signature(inner).parameters:
        return None
    return lambda _sigma, _next: torch.cat(
        [torch.randn((1, *x.shape[1:]), dtype=x.dtype, generator=generator) for generator in generators]
    ).to(x.device)


def _shifted(
    callback: Callable[[dict], None] | None,
    start: int,
    bar: HostObject,
) -> Callable[[dict], None]:
    """Let a slice report its steps as steps of the whole run."""

    def report(values: dict) -> None:
        step = values["i"] + start
        bar.update(step + 1 - bar.n)
        if callback is not None:
            callback({**values, "i": step})

    return report
