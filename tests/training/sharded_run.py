"""Run by test_parallel in two processes: the toy with every weight cut in two by FSDP.

accelerate offers FSDP on GPUs only, so that its part is played here by torch's own `fully_shard`.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed import (
    all_reduce,
    barrier,
    destroy_process_group,
    get_rank,
    get_world_size,
    init_process_group,
)
from torch.distributed.fsdp import fully_shard

from tests.training import toy
from training import loop

CHANGES = {"steps": 12, "validate_every": 4, "snapshot_every": 3}


class Sharding:
    """What the loop asks of accelerate."""

    distributed_type = DistributedType.FSDP
    device = torch.device("cpu")

    def __init__(self) -> None:
        self.num_processes, self.process_index = get_world_size(), get_rank()
        self.is_main_process = self.process_index == 0

    @contextlib.contextmanager
    def local_main_process_first(self) -> Iterator[None]:
        yield

    def prepare(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        for part in module.network:
            if list(part.parameters()):
                fully_shard(part)
        fully_shard(module)
        return module, torch.optim.AdamW(module.parameters(), weight_decay=0.0, fused=True)

    @contextlib.contextmanager
    def no_sync(self, module: Any) -> Iterator[None]:
        module.set_requires_gradient_sync(False)
        yield
        module.set_requires_gradient_sync(True)

    def reduce(self, value: torch.Tensor, reduction: str) -> torch.Tensor:
        assert reduction == "mean"
        all_reduce(value)
        return value / self.num_processes

    def wait_for_everyone(self) -> None:
        barrier()


class Looking(toy.Toy):
    """Calls a part of its sharded module by itself, as validation does, and ends with its own result or none."""

    def validate(self, step: int, folder: Path) -> dict[str, float]:
        return {"psnr": float(self.module.network(torch.ones(1, 6)).sum())}


def main(folder: Path) -> None:
    """Train to step 12 in two pieces, then write the result in one process."""
    together = toy.settings(folder, accumulation=2, **CHANGES)
    for stop_at in (6, None):
        stage = Looking(stop_at=stop_at)
        finished = loop.run_with(Sharding(), stage, together, {})  # type: ignore[arg-type]
        assert finished is (stop_at is None)
        assert not stage.finished
    if get_rank() == 0:
        whole = Looking()
        loop.finish_from_snapshot(whole, together, {})
        assert whole.finished


if __name__ == "__main__":
    init_process_group("gloo")
    main(Path(sys.argv[1]))
    barrier()
    destroy_process_group()
    # Every assertion has held. FSDP's meshes still refer to the group, whose C++ threads the end of the interpreter
    # destroys in any order: seen on a busy machine, rarely, as "terminate called without an active exception".
    sys.stdout.flush()
    os._exit(0)
