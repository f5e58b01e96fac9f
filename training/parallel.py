"""Processes of one run through Hugging Face accelerate: who computes which part of a batch, and whole tensors again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, DistributedType
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

_PRECISIONS = {"float32": "no", "bfloat16": "bf16"}
_KNOWN = {
    DistributedType.NO,
    DistributedType.MULTI_CPU,
    DistributedType.MULTI_GPU,
    DistributedType.MULTI_XPU,
    DistributedType.FSDP,
}


@contextmanager
def processes(device: str, precision: str) -> Iterator[Accelerator]:
    """Join the other processes of `accelerate launch`, or stand alone; leave them at the end.

    Args:
        device: "cpu", or "cuda" for the one that the launcher assigns to this process (xpu and mps where torch has
            them).
        precision: "float32" or "bfloat16" (autocast; weights, gradients and moments stay float32).

    Raises:
        ValueError: the launcher asks for a kind of parallelism that this loop does not know, or torch sees no such
            device.
    """
    if device not in ("cpu", "cuda", "xpu", "mps"):
        raise ValueError(
            f"--device={device}: give cpu or cuda. Which of several GPUs it is says the launcher, or the environment "
            "variable CUDA_VISIBLE_DEVICES."
        )
    # A gradient that is a view of its bucket saves a copy of all gradients.
    keywords = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
    accelerator = Accelerator(cpu=device == "cpu", mixed_precision=_PRECISIONS[precision], kwargs_handlers=[keywords])
    try:
        if accelerator.device.type != device:
            raise ValueError(
                f"--device={device}, but torch {torch.__version__} finds no such device. Look at the driver and at "
                "the build of torch, or give --device=cpu."
            )
        if accelerator.distributed_type not in _KNOWN:
            raise ValueError(
                f"accelerate launch asks for {accelerator.distributed_type.value}; this loop knows data parallel and "
                "FSDP. Choose one of them in `accelerate config`."
            )
        if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
            raise ValueError("accelerate launch asks for the first version of FSDP; add --fsdp_version=2.")
        yield accelerator
        accelerator.end_training()  # not after an error: the other processes would wait for ever
    finally:
        # The state is one for the process: a later run in it may want another precision.
        AcceleratorState._reset_state(reset_partial_state=True)


def is_sharded(accelerator: Accelerator) -> bool:
    """Tell whether every process holds a part of each weight only."""
    return accelerator.distributed_type == DistributedType.FSDP


def rows_of(accelerator: Accelerator, batch: int, accumulation: int) -> range:
    """Return which rows of a batch this process computes.

    Raises:
        ValueError: the batch cannot be shared out evenly.
    """
    parts = accelerator.num_processes * accumulation
    if accumulation < 1 or batch % parts:
        raise ValueError(
            f"--batch={batch} cannot be shared out evenly among {accelerator.num_processes} processes with "
            f"--accumulation={accumulation}: give a multiple of {max(1, parts)}."
        )
    share = batch // accelerator.num_processes
    return range(accelerator.process_index * share, (accelerator.process_index + 1) * share)


def whole(value: Tensor) -> Tensor:
    """Return all of a tensor of which this process may hold a part; every process must ask."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def like(value: Tensor, parameter: Tensor) -> Tensor:
    """Return the part of a whole tensor that this process holds of `parameter`, on its device."""
    value = value.to(parameter.device)
    if isinstance(parameter, DTensor) and value.shape == parameter.shape:
        return distribute_tensor(value, parameter.device_mesh, parameter.placements)
    return value


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Let parts of a sharded module be called by themselves, as validation does; every process must take part."""
    sharded = [part for part in module.modules() if isinstance(part, FSDPModule)]
    for part in sharded:
        part.unshard()
    try:
        yield
    finally:
        for part in sharded:
            part.reshard()


def means_and_any(accelerator: Accelerator, values: Tensor, flag: bool) -> tuple[list[float], bool]:
    """Return the means of numbers (n,) over all processes, and whether any of them raised its flag."""
    together = torch.cat([values.detach().float(), torch.tensor([float(flag)], device=values.device)])
    if accelerator.num_processes > 1:
        together = cast("Tensor", accelerator.reduce(together, reduction="mean"))
    *means, share = together.tolist()
    return means, share > 0.0
