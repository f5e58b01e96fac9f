"""Counts the bytes of tensors that are alive at the same time: of real ones, or of ones that have only a shape."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

Workspace = Callable[[Any, tuple[Any, ...], Any], int]


class LiveMemory(TorchDispatchMode):
    """Knows, while it is active, how many bytes of tensors are alive, and how many were at most.

    It sees every operation below autograd. What is kept for the backward pass therefore counts until it is let go, and
    a view counts nothing: memory is of storages, each once, from the operation that made it until it is freed.

    Args:
        workspace: bytes that an operation takes for itself while it runs, from (operation, arguments, result);
            None = nothing.

    Attributes:
        live: bytes alive now.
        peak: the most that were alive at once.
        operations: floating point operations of all matrix products and convolutions so far.
        parameters: whose gradients to tell apart.
        gradients_at_peak: bytes of their gradients that were there when the peak was reached.
    """

    def __init__(self, workspace: Workspace | None = None) -> None:
        super().__init__()
        self.live = self.peak = self.operations = 0
        self.parameters: list[Tensor] = []
        self.gradients_at_peak = 0
        self._workspace = workspace
        self._known: set[int] = set()

    def count(self, tensors: Iterable[Tensor]) -> None:
        """Count tensors that were made before."""
        for tensor in tensors:
            self._count(tensor)
        self._look(self.live)

    def forget_peak(self) -> None:
        """Look for the peak anew, from what is alive now."""
        self.peak = 0
        self._look(self.live)

    def gradients(self) -> int:
        """Return the bytes of the gradients that are there now."""
        return sum(p.grad.untyped_storage().nbytes() for p in self.parameters if p.grad is not None)

    def _look(self, taken: int) -> None:
        if taken > self.peak:
            self.peak, self.gradients_at_peak = taken, self.gradients()

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._known:
            size = storage.nbytes()
            self._known.add(key)
            self.live += size
            # The Python object of a storage lives as long as the storage, also where only autograd holds it.
            weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        """Run an operation; count what it makes, and what it takes meanwhile."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf)
        self._look(self.live + (self._workspace(func, args, result) if self._workspace else 0))
        self.operations += _operations(func, args, result)
        return result


def _operations(func: Any, args: tuple[Any, ...], result: Any) -> int:  # noqa: ANN401 - see Workspace
    # torch's own list has the attention of GPUs only.
    if func is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default:
        return sdpa_flop_count(*(tensor.shape for tensor in args[:3]))
    if func is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default:
        return sdpa_backward_flop_count(*(tensor.shape for tensor in args[:4]))
    count = flop_registry.get(getattr(func, "overloadpacket", None))
    return 0 if count is None else count(*args, out_val=result)


class Answers(TorchDispatchMode):
    """Answers what code asks of tensors without content: False, or 1.

    Reading a number out of such a tensor is otherwise an error. False ends loops that draw until nothing is left to
    draw; 1 can be divided by.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        """Run an operation, unless it reads a number."""
        if func is torch.ops.aten._local_scalar_dense.default:
            return args[0].dtype != torch.bool
        return func(*args, **(kwargs or {}))
