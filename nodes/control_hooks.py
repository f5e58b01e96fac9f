"""What DPM/SPM Control Apply hangs on a MODEL: three closures and no state of their own.

    SAMPLER_SAMPLE wrapper   once per run: binds x_lr and p to every conditioning, so that the host itself crops them to
                             areas, tiles and context windows, repeats and batches them; decides about tiles
    APPLY_MODEL wrapper      once per model call: computes the control and merges it with that of other ControlNets
    attn2 patch              in the UNet's decoder only: p instead of the text (paper Sec. 3.1)

Closures, because ComfyUI 0.3.75 deep-copies objects in model_options at every clone, weights included.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import comfy.conds
import comfy.model_management
import comfy.utils
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from .compat import HostObject, inference_dtype
from .finite import RunCheck
from .guidance import guided_steps
from .sockets import KEY
from .tile_conds import obstacle, stacked
from .tiled_diffusion import CONTROL_SHARE, HANDLER, NODE, PLAN, TILE, TilingSettings, start_tiling

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

    from ..clearsr_core.control import ClearSRControl, ControlResiduals
    from ..clearsr_core.tiles import Tile
    from .sockets import ClearSRBundle

LR, PROMPT, RUN = "clearsr_lr", "clearsr_prompt", "clearsr_run"  # names in model_conds and transformer_options
_CACHED_CONTROLS = 8  # areas, or tiles of another tiler, in one step; beyond that the oldest is computed again


@dataclass(frozen=True)
class ControlSettings:
    """The node's widgets."""

    dpm_strength: float = 1.0
    spm_strength: float = 1.0
    start_percent: float = 0.0
    end_percent: float = 1.0
    every: int = 1  # compute the control at every n-th step only
    level_weights: tuple[float, ...] = (1.0,) * 13  # the skips from fine to coarse (12 in SD 2.1), then the middle
    tiling: TilingSettings = field(default_factory=TilingSettings)

    @property
    def acts(self) -> bool:
        """Whether anything of the control is left with these strengths."""
        return bool(self.dpm_strength or self.spm_strength) and any(self.level_weights)

    def alone(self, net: ClearSRControl) -> dict[str, tuple[float, float]]:
        """Return the strengths of DPM and SPM that leave one of them alone, by its name."""
        each = {"DPM": (net.dpm, (self.dpm_strength, 0.0)), "SPM": (net.spm, (0.0, self.spm_strength))}
        return {name: strengths for name, (part, strengths) in each.items() if part is not None and any(strengths)}


@dataclass
class ControlRun:
    """What one sampling run knows; made when it starts and gone when it ends."""

    lr_latent: Tensor  # (B, 4, h, w) model units, on the sampling device
    sigmas: Tensor  # the run's schedule
    check: RunCheck
    cache: dict[tuple[Tile, ...] | None, list[CachedControl]] = field(default_factory=dict)  # by our own tiles

    def step(self, sigma: float) -> int:
        """Return the step of the schedule that a model call at `sigma` belongs to."""
        return max(0, int((self.sigmas >= sigma * (1.0 - 1e-5)).sum()) - 1)

    def last_control(self) -> list[tuple[ControlResiduals, Tensor | None]]:
        """Return the residuals that are still remembered, each with its x_t."""
        return [(entry.residuals, entry.inputs.x_t) for entries in self.cache.values() for entry in entries]


class ControlInputs(NamedTuple):
    """What the control of each row is computed from, beside the time; None: the networks do not read it."""

    lr_latent: Tensor  # (B, 4, h, w)
    x_t: Tensor | None = None  # (B, 4, h, w)
    text: Tensor | None = None  # (B, n, context width)

    def first(self, rows: int) -> ControlInputs:
        """Return the first `rows` rows."""
        x_t, text = (None if tensor is None else tensor[:rows] for tensor in (self.x_t, self.text))
        return ControlInputs(self.lr_latent[:rows], x_t, text)

    def repeats(self, rows: int) -> bool:
        """Return whether every group of `rows` rows equals the first one."""
        return all(tensor is None or _repeats(tensor, rows) for tensor in self)

    def equals(self, other: ControlInputs) -> bool:
        """Return whether all of it is equal, to the bit."""
        return all(_same(a, b) for a, b in zip(self, other, strict=True))


@dataclass(frozen=True)
class CachedControl:
    """Residuals with everything that they were computed from."""

    moment: tuple[int | float, ...]  # equal moments may share a control
    inputs: ControlInputs
    residuals: ControlResiduals


def attach_control(
    model: ModelPatcher,
    bundle: ClearSRBundle,
    lr_latent: Tensor,
    prompt: Tensor | None,
    settings: ControlSettings,
) -> ModelPatcher:
    """Return a clone of `model` that ClearSR controls; a control that we attached before is replaced.

    Args:
        model: MODEL; never changed.
        bundle: networks and configuration.
        lr_latent: (B, 4, h, w) x_lr in VAE units.
        prompt: (B, n, context width) image prompt p for the decoder, or None = the decoder reads the conditioning.
        settings: strengths and range.
    """
    clone = model.clone()
    for kind in (WrappersMP.SAMPLER_SAMPLE, WrappersMP.APPLY_MODEL, WrappersMP.PREPARE_SAMPLING):
        clone.remove_wrappers_with_key(kind, KEY)
    _remove_attn2_patch(clone)
    clone.set_additional_models(KEY, [bundle.control])
    clone.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, KEY, _bind(lr_latent, prompt, settings, bundle.name))
    clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, _control(bundle, settings))
    clone.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, KEY, _reserve_memory(settings.tiling))
    if prompt is not None:
        clone.set_model_attn2_patch(_decoder_reads_prompt)
    return clone


def _remove_attn2_patch(clone: ModelPatcher) -> None:
    options = clone.model_options["transformer_options"]
    patches = options.get("patches", {})
    if _decoder_reads_prompt in patches.get("attn2_patch", []):
        kept = [patch for patch in patches["attn2_patch"] if patch is not _decoder_reads_prompt]
        options["patches"] = {**patches, "attn2_patch": kept}


def _decoder_reads_prompt(query: Tensor, context: Tensor, value: Tensor | None, options: dict) -> tuple:
    """Replace the text of the cross-attention by p, in the UNet's decoder only (host: attn2_patch)."""
    prompt = options.get(PROMPT)
    if prompt is None or options["block"][0] != "output":
        return query, context, value
    prompt = prompt.to(query.dtype)
    return query, prompt, prompt


def is_controlled(model: ModelPatcher) -> bool:
    """Return whether DPM/SPM Control Apply is on this model."""
    return bool(model.wrappers.get(WrappersMP.APPLY_MODEL, {}).get(KEY))


def _bind(lr_latent: Tensor, prompt: Tensor | None, settings: ControlSettings, file: str) -> Callable[..., Tensor]:
    """Make the wrapper around a whole run (host: SAMPLER_SAMPLE)."""

    def bind(
        executor: HostObject,
        guider: HostObject,
        sigmas: Tensor,
        extra_args: dict,
        callback: HostObject,
        noise: Tensor,
        *rest: HostObject,
    ) -> Tensor:
        device, batch = noise.device, noise.shape[0]
        _check_size(lr_latent, noise)
        x_lr = guider.inner_model.process_latent_in(lr_latent).to(device, torch.float32)
        x_lr = comfy.utils.repeat_to_batch_size(x_lr, batch)
        for name, conds in guider.conds.items():
            bound = []
            for cond in conds:
                model_conds = {**cond["model_conds"], LR: comfy.conds.CONDNoiseShape(x_lr)}
                tokens = _prompt_tokens(prompt, model_conds.get("c_crossattn"), name, batch)
                if tokens is not None:
                    model_conds[PROMPT] = comfy.conds.CONDRegular(tokens.to(device))
                bound.append({**cond, "model_conds": model_conds})
            guider.conds[name] = bound
        # The run's memory rides in this run's own copy of transformer_options and ends with it.
        run = ControlRun(x_lr, sigmas, RunCheck(NODE, file, inference_dtype(guider.inner_model)))
        extra_args["model_options"]["transformer_options"][RUN] = run
        steps = len(sigmas) - 1
        if settings.acts and not guided_steps(steps, settings.start_percent, settings.end_percent):
            settings.tiling.say(
                f"{NODE}: the range from start_percent {settings.start_percent:g} to end_percent "
                f"{settings.end_percent:g} holds no step of this run of {steps} steps, so the control never acts. "
                "Widen it, or take more steps.",
                logging.WARNING,
            )
        start_tiling(settings.tiling, extra_args["model_options"], guider, x_lr, steps, run.cache.clear)
        samples = executor(guider, sigmas, extra_args, callback, noise, *rest)
        run.check.result(samples, run.last_control())
        return samples

    return bind


def _check_size(lr_latent: Tensor, noise: Tensor) -> None:
    if lr_latent.shape[1:] != noise.shape[1:]:
        ours, theirs = (f"{shape[-1] * 8} x {shape[-2] * 8} pixels" for shape in (lr_latent.shape, noise.shape))
        raise ValueError(
            f"{NODE}: its LR_LATENT is {ours} ({lr_latent.shape[1]} channels), but the latent being sampled is "
            f"{theirs} ({noise.shape[1]} channels). Connect the same LR Latent Encode output to both."
        )
    if lr_latent.shape[0] not in (1, noise.shape[0]):
        raise ValueError(
            f"{NODE}: its LR_LATENT holds {lr_latent.shape[0]} pictures, but {noise.shape[0]} are being sampled. "
            "Connect the same LR Latent Encode output to both."
        )


def _prompt_tokens(prompt: Tensor | None, text: HostObject, name: str, batch: int) -> Tensor | None:
    """Return what the decoder reads for one conditioning, (B, n, C).

    Negative conditionings, known by the names that the host's guiders give them, keep their own text there (decision
    0006). It is bound as well, and p is repeated to as many tokens, which changes nothing in attention: only equal
    shapes let the host run both halves of guidance in one batch.
    """
    if prompt is None:
        return None
    words = None if text is None else text.cond
    if "negative" in name and words is not None:
        return comfy.utils.repeat_to_batch_size(words, batch)
    if words is not None and prompt.shape[1] == 1:
        prompt = prompt.expand(-1, words.shape[1], -1)
    return comfy.utils.repeat_to_batch_size(prompt, batch)


def _control(bundle: ClearSRBundle, settings: ControlSettings) -> Callable[..., Tensor]:
    """Make the wrapper around a model call (host: APPLY_MODEL)."""
    config = bundle.config.control
    sees_x_t, reads_text = config.control_input == "lr+xt", config.control_text == "conditioning"
    constant = config.control_time == "fixed" and not sees_x_t
    null_text = bundle.null_text[None]  # (1, tokens, width)

    def control(
        executor: HostObject,
        x: Tensor,
        t: Tensor,
        c_concat: Tensor | None = None,
        c_crossattn: Tensor | None = None,
        control: dict | None = None,
        transformer_options: dict | None = None,
        **conds: HostObject,
    ) -> Tensor:
        options = dict(transformer_options or {})
        run: ControlRun | None = options.pop(RUN, None)
        options.pop(PLAN, None)
        tiles: tuple[Tile, ...] | None = options.pop(TILE, None)
        x_lr, prompt = conds.pop(LR, None), conds.pop(PROMPT, None)
        if prompt is not None:
            options[PROMPT] = prompt
        base = executor.class_obj  # the host's BaseModel on this device
        dtype = inference_dtype(base)
        if x_lr is None and run is not None:
            x_lr = run.lr_latent  # a conditioning that was made after the run had begun
            if tiles is not None:
                x_lr = stacked([tile.of(x_lr) for tile in tiles], x_lr.shape[0])
        x_lr = _window(x_lr, x, options)
        sampling = base.model_sampling
        sigma = float(t.flatten()[0])
        # Shares of this run, as the other widgets count: of a run that starts part of the way, too.
        in_range = run is None or run.step(sigma) in guided_steps(
            len(run.sigmas) - 1, settings.start_percent, settings.end_percent
        )
        merged = control
        if x_lr is not None and in_range and settings.acts:
            if x_lr.shape[-2:] != x.shape[-2:]:
                raise ValueError(
                    f"{NODE}: a node cut the latent to {tuple(x.shape[-2:])} without cutting x_lr "
                    f"{tuple(x_lr.shape[-2:])}. That node cannot be used together with ClearSR."
                )
            net: ClearSRControl = base.current_patcher.get_additional_models_with_key(KEY)[0].model
            x_lr = comfy.utils.repeat_to_batch_size(x_lr.to(x.device), x.shape[0])
            x_t = sampling.calculate_input(t, x) if sees_x_t else None
            moment: tuple[int | float, ...] = ()
            if not constant:
                # Reuse over several steps goes by the step; otherwise only calls at the very same sigma share.
                moment = (sigma,) if settings.every == 1 or run is None else (run.step(sigma) // settings.every,)

            def compute(
                inputs: ControlInputs,
                dpm_strength: float = settings.dpm_strength,
                spm_strength: float = settings.spm_strength,
            ) -> ControlResiduals:
                timestep = sampling.timestep(t[: inputs.lr_latent.shape[0]]).float()
                text = null_text if inputs.text is None else inputs.text
                return net(
                    inputs.lr_latent.to(dtype),
                    timestep,
                    text.to(x.device, dtype),
                    None if inputs.x_t is None else inputs.x_t.to(dtype),
                    dpm_strength=dpm_strength,
                    spm_strength=spm_strength,
                )

            if reads_text and c_crossattn is None:
                raise ValueError(
                    f"{NODE}: '{bundle.name}' reads the text of the conditioning, and a conditioning of this run has "
                    "none. Connect CLIP Text Encode to the sampler's positive and negative."
                )
            inputs = ControlInputs(x_lr, x_t, c_crossattn if reads_text else None)
            keep = constant or settings.every > 1
            cache = None if run is None else _cache(run, tiles, keep)
            halves = len(options.get("cond_or_uncond", [0]))
            residuals = _shared(cache, moment, inputs, halves, compute, ignore_x_t=settings.every > 1)
            if cache is not None and tiles is not None and keep:
                _move(cache, comfy.model_management.unet_offload_device())
            if run is not None:
                parts = settings.alone(net).items()
                again = {name: functools.partial(compute, inputs, *strengths) for name, strengths in parts}
                run.check.control(residuals, again)
            merged = _merged(control, residuals, settings.level_weights)
        denoised = executor(x, t, c_concat, c_crossattn, merged, options, **conds)
        if run is not None:
            uncontrolled = functools.partial(executor, x, t, c_concat, c_crossattn, control, options, **conds)
            run.check.prediction(x, denoised, uncontrolled)
        return denoised

    return control


def _window(x_lr: Tensor | None, x: Tensor, options: dict) -> Tensor | None:
    """Cut x_lr to the host's context window where the host did not do it itself (ComfyUI 0.3.75, 2-D windows)."""
    if x_lr is None or x_lr.shape[-2:] == x.shape[-2:] or "context_window" not in options:
        return x_lr
    window = options["context_window"]
    return window.get_tensor(x_lr, dim=window.dim)


def _cache(run: ControlRun, tiles: tuple[Tile, ...] | None, keep: bool) -> list[CachedControl]:
    """Return the memory of these tiles; what other tiles remember is dropped unless later steps can use it."""
    if not keep:
        for place in [place for place in run.cache if place != tiles]:
            del run.cache[place]
    return run.cache.setdefault(tiles, [])


def _move(cache: list[CachedControl], device: torch.device) -> None:
    """Let the residuals of tiles wait for the next step where the host lets weights wait: there is one for each."""
    cache[:] = [dataclasses.replace(entry, residuals=_on(entry.residuals, device)) for entry in cache]


def _on(residuals: ControlResiduals, device: torch.device) -> ControlResiduals:
    return type(residuals)(tuple(residual.to(device) for residual in residuals.down), residuals.mid.to(device))


def _shared(
    cache: list[CachedControl] | None,
    moment: tuple[int | float, ...],
    inputs: ControlInputs,
    halves: int,
    compute: Callable[[ControlInputs], ControlResiduals],
    ignore_x_t: bool,
) -> ControlResiduals:
    """Compute the control, once for what is equal.

    Conditional and unconditional rows of one batch see the same x_lr, and so may separate calls of one step, or all
    steps when the control's time is fixed. Equality is tested, not assumed: tilers order rows differently. Networks
    that read the text share only rows of equal text.

    Args:
        cache: of this run and these tiles; None = nothing is kept.
        moment: equal for calls that may share a control.
        inputs: of all rows.
        halves: groups of rows that may repeat one another, as of guidance.
        compute: makes the residuals.
        ignore_x_t: reuse a control although x_t has changed since, as between the computed steps of `every`.
    """
    batch = inputs.lr_latent.shape[0]
    rows = batch // halves if batch % halves == 0 else batch
    if rows < batch and not inputs.repeats(rows):
        rows = batch
    inputs = inputs.first(rows)
    compared = inputs._replace(x_t=None) if ignore_x_t else inputs

    for entry in cache or ():
        if entry.moment == moment and entry.inputs.equals(compared):
            return _repeated(_on(entry.residuals, inputs.lr_latent.device), batch // rows)
    residuals = compute(inputs)
    if cache is not None:
        fresh = [entry for entry in cache if entry.moment == moment][-(_CACHED_CONTROLS - 1) :]
        cache[:] = [*fresh, CachedControl(moment, compared, residuals)]
    return _repeated(residuals, batch // rows)


def _repeats(tensor: Tensor, rows: int) -> bool:
    first = tensor[:rows]
    return all(torch.equal(first, tensor[start : start + rows]) for start in range(rows, tensor.shape[0], rows))


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and a.device == b.device and torch.equal(a, b)


def _repeated(residuals: ControlResiduals, times: int) -> ControlResiduals:
    """Return the residuals of `times` equal groups of rows; of a single row as views, which cost no memory."""
    if times == 1:
        return residuals

    def repeated(residual: Tensor) -> Tensor:
        return residual.expand(times, -1, -1, -1) if len(residual) == 1 else residual.repeat(times, 1, 1, 1)

    return type(residuals)(tuple(map(repeated, residuals.down)), repeated(residuals.mid))


def _merged(control: dict | None, residuals: ControlResiduals, weights: tuple[float, ...]) -> dict[str, list]:
    """Add our residuals to those of other ControlNets.

    The lists are new at every call, because the UNet empties them; the host's order is ours, fine to coarse.
    """
    *down, mid = (
        None if weight == 0.0 else residual if weight == 1.0 else residual * weight
        for residual, weight in zip((*residuals.down, residuals.mid), weights, strict=True)
    )
    control = control or {}
    return {**control, "output": _added(control.get("output"), down), "middle": _added(control.get("middle"), [mid])}


def _added(theirs: list | None, ours: list) -> list:
    theirs = list(theirs or [])
    length = max(len(theirs), len(ours))
    theirs, ours = (values + [None] * (length - len(values)) for values in (theirs, list(ours)))
    return [b if a is None else a if b is None else a + b for a, b in zip(theirs, ours, strict=True)]


def _reserve_memory(tiling: TilingSettings) -> Callable[..., HostObject]:
    """Make the wrapper that asks the host for memory (host: PREPARE_SAMPLING).

    Room for the activations of one model call, a batch of tiles where there can be tiles, and for those of the control
    networks, which are half of the UNet's.
    """

    def reserve(
        executor: HostObject,
        model: HostObject,
        shape: HostObject,
        conds: dict[str, list[dict]],
        *rest: HostObject,
        **options: HostObject,
    ) -> HostObject:
        in_one_piece = HANDLER in model.model_options or obstacle(conds) is not None
        rows, *sides = shape if in_one_piece else tiling.call_shape(shape)
        return executor(model, [math.ceil(rows * CONTROL_SHARE), *sides], conds, *rest, **options)

    return reserve
