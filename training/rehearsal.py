"""A training step on weights and batches that have a shape and nothing in them: what it will take, before it is taken.

The stage's own module runs, forward and backward, with the optimiser of the run. Batch, crop, precision, checkpointing
and accumulation are therefore in the estimate because they are in the step.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from clearsr_core.config import BaseConfig

from . import control_init, models, optimizer
from .autoencoder import AutoencoderSettings, AutoencoderStage, CropBatch, Reconstruction
from .base import BaseSettings, BaseStage, LatentBatch, NoisePrediction, noise_schedule
from .base_files import networks_of
from .base_model import BaseModel
from .batches import DataSettings
from .checkpointing import checkpoint_blocks
from .clearsr import ClearSRObjective, ClearSRSettings, ClearSRStage, PairBatch, control_config
from .clearsr_model import ClearSRModel
from .clip_vision import ClipImagePrompt
from .discriminator import PatchDiscriminator
from .live_memory import Answers, LiveMemory
from .loop import Stage

_BLOCK = 256  # values that share a scale in the moments of 8-bit Adam
_SMALL = 4096  # parameters with fewer values keep moments in float32 there


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that one process holds when a step needs most; `total` is their sum."""

    weights: int  # trained and frozen
    gradients: int  # those that are there at that moment
    optimizer: int  # Adam's moments
    averaged: int  # EMA
    batch: int
    activations: int  # kept for the backward pass, and what the operation of that moment needs
    operations: int  # floating point operations of the step's matrix products, forward and backward
    on_gpu: bool

    @property
    def tensors(self) -> int:
        """What torch's tensors take."""
        return self.weights + self.gradients + self.optimizer + self.averaged + self.batch + self.activations

    @property
    def rest(self) -> int:
        """What a process takes on a CPU beside its tensors: code of libraries, gaps in the allocator.

        Fitted to five measurements of `training.bench_step`, from 1 to 16 GiB (docs/TRAINING.md); none was on a GPU.
        """
        return 0 if self.on_gpu else 2**28 + self.tensors // 8

    @property
    def total(self) -> int:
        return self.tensors + self.rest

    def table(self) -> str:
        """Return the parts in GiB, on one line."""
        names = [field.name for field in dataclasses.fields(self)[:-2]]
        parts = {name: getattr(self, name) for name in (*names, "rest")}
        return ", ".join(f"{name} {size / 2**30:.2f}" for name, size in parts.items() if size)


def shapes_of(settings: DataSettings) -> Stage[Any]:
    """Build a stage as its class does, without data, and with weights on the meta device.

    Raises:
        ValueError: the base model or the autoencoder that the settings name is not there, or settings do not fit it.
    """
    # Read before tensors lose their content.
    networks = None
    if isinstance(settings, ClearSRSettings):
        networks = networks_of(settings.base, settings.base_widths)
    elif isinstance(settings, BaseSettings) and settings.vae.is_file():
        networks = networks_of(settings.vae)
    with torch.device("meta"), Answers(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*copying from a non-meta parameter")  # nothing is to be copied
        if isinstance(settings, ClearSRSettings) and networks is not None:
            return _ClearSR(settings, networks)
        if isinstance(settings, BaseSettings):
            return _Base(settings, networks)
        if isinstance(settings, AutoencoderSettings):
            return _Autoencoder(settings)
    raise TypeError(type(settings).__name__)


class _ClearSR(ClearSRStage):
    def __init__(self, settings: ClearSRSettings, networks: BaseConfig) -> None:
        self.settings = settings
        base = BaseModel.random(networks, 0)
        control = control_config(settings, base)
        if settings.control_init != Path():
            control_init.check(settings.control_init, control)
        clip = None
        if settings.clip_vision != Path():
            # ViT-H/14, the one that fits Stable Diffusion 2.1.
            vision = CLIPVisionConfig(
                hidden_size=1280,
                intermediate_size=5120,
                num_hidden_layers=32,
                num_attention_heads=16,
                image_size=224,
                patch_size=14,
                projection_dim=control.context_dim,
                hidden_act="gelu",
            )
            clip = ClipImagePrompt(CLIPVisionModelWithProjection(vision), patch=settings.prompt_mode == "patch")
        self.model = ClearSRModel(base, control, settings.rank, settings.prompt_mode, 0, clip)
        checkpoint_blocks(self.model, settings.checkpointing)
        self.module = ClearSRObjective(self.model, settings)

    def start(self, rows: range) -> None:
        self.rows = rows

    def batch(self, step: int) -> PairBatch:
        settings, count, side = self.settings, len(self.rows), self.settings.crop // 8
        latents = torch.empty(count, self.model.control.config.latent_channels, side, side)
        images = torch.empty(count, 3, settings.crop, settings.crop)
        hq = torch.empty_like(latents) if settings.crops else torch.empty_like(images)
        timesteps = torch.empty(count, dtype=torch.long)
        if settings.freeze_encoders:
            prompts = torch.empty(count, 1, self.model.null_text.shape[-1])
            lr_latents = torch.empty_like(latents)
            return PairBatch(hq, latents, timesteps, None, None, None, lr_latents, prompts, True, False)
        return PairBatch(hq, latents, timesteps, images, None, None, None, None, True, watch=step % 50 == 0)


class _Base(BaseStage):
    def __init__(self, settings: BaseSettings, networks: BaseConfig | None) -> None:
        self.settings = settings
        if networks is not None:
            self.vae = models.build_autoencoder(
                networks.vae_widths, networks.vae_blocks, networks.norm_groups, networks.latent_channels
            )
        elif (settings.vae / "config.json").is_file():
            self.vae = AutoencoderKL.from_config(AutoencoderKL.load_config(settings.vae))
        else:
            raise ValueError(
                f"--vae={settings.vae} holds no autoencoder: give the folder vae of an autoencoder's run, or a ClearSR "
                "file that carries its base model."
            )
        self.vae.requires_grad_(False)
        self.unet = models.build_unet(
            settings.widths,
            settings.head_channels,
            settings.context_dim,
            settings.norm_groups,
            self.vae.config.latent_channels,
        )
        self.module = NoisePrediction(self.unet, self.vae, torch.empty(1, settings.context_dim))

    def start(self, rows: range) -> None:
        self.rows = rows

    def batch(self, step: int) -> LatentBatch:
        count, crop, side = len(self.rows), self.settings.crop, self.settings.crop // 8
        noise = torch.empty(count, self.unet.config.in_channels, side, side)
        hq = torch.empty_like(noise) if self.settings.crops else torch.empty(count, 3, crop, crop)
        return LatentBatch(hq, noise, torch.empty(count, dtype=torch.long))


class _Autoencoder(AutoencoderStage):
    def __init__(self, settings: AutoencoderSettings) -> None:
        self.settings = settings
        self.model = models.build_autoencoder(
            settings.widths, settings.blocks, settings.norm_groups, settings.latent_channels
        )
        judge = PatchDiscriminator(settings.discriminator_width) if settings.adversarial_weight else None
        self.module = Reconstruction(settings, self.model, judge)

    def start(self, rows: range) -> None:
        self.rows = rows

    def batch(self, step: int) -> CropBatch:
        count, crop = len(self.rows), self.settings.crop
        noise = torch.empty(count, self.settings.latent_channels, crop // 8, crop // 8)
        disturbance, restored = torch.empty_like(noise), torch.empty_like(noise)
        is_restored = torch.zeros(count, dtype=torch.bool, device=noise.device)
        return CropBatch(torch.empty(count, 3, crop, crop), noise, disturbance, restored, is_restored, heard=True)


def step(
    module: nn.Module,
    batch: tuple[Any, ...],
    moments: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    settings: DataSettings,
) -> Tensor:
    """Take one step as the loop does, in one process and without its checks; return the mean loss.

    Args:
        module: of the stage.
        batch: this process's rows.
        moments: the optimiser.
        parameters: those that move.
        settings: precision, accumulation and the largest norm of the gradient.
    """
    moments.zero_grad(set_to_none=True)
    parts, losses = settings.accumulation, []
    size = next(len(value) for value in batch if isinstance(value, Tensor)) // parts
    for part in range(parts):
        share = slice(part * size, (part + 1) * size)
        piece = type(batch)(*(value[share] if isinstance(value, Tensor) else value for value in batch))
        kind = settings.device.partition(":")[0]
        with torch.autocast(kind, torch.bfloat16, enabled=settings.precision == "bfloat16"):
            loss, _ = module(piece)
        (loss / parts).backward()
        losses.append(loss.detach())
    torch.nn.utils.clip_grad_norm_(parameters.values(), settings.clip)
    moments.step()
    return torch.stack(losses).mean()


def estimate(settings: DataSettings, processes: int = 1) -> MemoryEstimate:
    """Rehearse a run's second step, and return what it takes in each of `processes` processes.

    Everything is counted that torch's tensors take, on the device or, on a CPU, in main memory, where an allowance for
    the process is added. Not counted are Python and torch themselves, CUDA and cuDNN, and decoded photographs.

    Raises:
        ValueError: as `shapes_of`, or the batch cannot be shared out evenly.
    """
    rows = share_of(settings, processes)
    stage = shapes_of(settings)
    on_gpu = settings.device != "cpu"
    # Tensors without content take the CPU's way through torch; where a GPU's differs, it is added here.
    here = dataclasses.replace(settings, device="cpu")
    memory = LiveMemory(None if on_gpu else convolution_workspace)
    if on_gpu and settings.precision == "bfloat16":
        _norms_in_float32(stage.module)
    with FakeTensorMode(), Answers(), memory:
        _give_shapes(stage.module)
        parameters = stage.trainable()
        for name, parameter in stage.weights().items():
            parameter.requires_grad_(name in parameters)
        weights = sum(value.nbytes for value in (*stage.module.parameters(), *stage.module.buffers()))
        built = memory.live
        memory.parameters = list(parameters.values())
        averaged = [value.detach().clone() for value in parameters.values()] if settings.ema else []
        with_average = memory.live
        stage.start(rows)
        batch = stage.batch(1)
        with_batch = memory.live
        moments = _optimizer(settings, parameters.values())
        step(stage.module, batch, moments, parameters, here)  # the moments come into being
        moments.zero_grad(set_to_none=True)
        memory.forget_peak()
        memory.operations = 0
        step(stage.module, batch, moments, parameters, here)
        state = memory.live - with_batch - memory.gradients()
        del averaged
    named = weights + (with_batch - built) + state + memory.gradients_at_peak
    return MemoryEstimate(
        weights=weights,
        gradients=memory.gradients_at_peak,
        optimizer=state,
        averaged=with_average - built,
        batch=with_batch - with_average,
        activations=memory.peak - named,
        operations=memory.operations,
        on_gpu=on_gpu,
    )


def share_of(settings: DataSettings, processes: int) -> range:
    """Return the rows that the first of `processes` processes computes.

    Raises:
        ValueError: the batch cannot be shared out evenly.
    """
    parts = processes * settings.accumulation
    if settings.accumulation < 1 or processes < 1 or settings.batch % parts:
        raise ValueError(
            f"--batch={settings.batch} cannot be shared out evenly among {processes} processes with "
            f"--accumulation={settings.accumulation}: give a multiple of {max(1, parts)}."
        )
    return range(settings.batch // processes)


def _give_shapes(module: nn.Module) -> None:
    """Put tensors of the CPU without content in place of those on the meta device."""
    for part in module.modules():
        for name, value in part._parameters.items():
            if value is not None:
                part._parameters[name] = nn.Parameter(torch.empty(value.shape, dtype=value.dtype), value.requires_grad)
        for name, value in part._buffers.items():
            if value is not None:
                part._buffers[name] = torch.empty(value.shape, dtype=value.dtype)
        if hasattr(part, "schedule"):
            part.schedule = noise_schedule()


def _optimizer(settings: DataSettings, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Return the optimiser of the run; that of 8 bits, which needs its package and a GPU, by what it keeps."""
    if settings.optimizer == "adamw8bit":
        return _EightBitMoments(parameters, {})
    return optimizer.build(settings.optimizer, parameters, settings.learning_rate)


class _EightBitMoments(torch.optim.Optimizer):
    """Takes the memory that bitsandbytes' 8-bit Adam takes."""

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            state, values = self.state[parameter], parameter.numel()
            if state or parameter.grad is None:
                continue
            small = values < _SMALL
            for moment in ("exp_avg", "exp_avg_sq"):
                state[moment] = torch.empty_like(parameter, dtype=torch.float32 if small else torch.uint8)
                if not small:
                    state[f"{moment}_scales"] = torch.empty(-(-values // _BLOCK))


def _norms_in_float32(module: nn.Module) -> None:
    """Let norms compute as autocast on a GPU has them: in float32. On the CPU they compute in bfloat16."""
    for part in module.modules():
        if isinstance(part, nn.GroupNorm | nn.LayerNorm):
            wrapped: Any = functools.partial(_in_float32, part.forward)
            part.forward = wrapped


def _in_float32(forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return forward(x.float())


def convolution_workspace(func: Any, args: tuple[Any, ...], result: Any) -> int:  # noqa: ANN401 - torch's operators have no type
    """Return the bytes that a convolution on the CPU takes for copies in its own layout, while it runs."""
    if func is torch.ops.aten.convolution.default:
        image, weight = args[:2]
        return _bytes(image) + _bytes(weight) + _bytes(result)
    if func is torch.ops.aten.convolution_backward.default:
        gradient, image, weight = args[:3]
        return _bytes(gradient) + _bytes(image) + _bytes(weight)
    return 0


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
