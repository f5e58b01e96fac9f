"""Keeps the sampler's state where the late phase begins, so that moving only beta repeats only the last steps.

One state is kept (a latent: some hundred kilobytes), and it is used only where everything that led to it is the
same: model, x_lr, conditioning, seed, schedule, sampler, guidance, alpha. Anything that cannot be compared by value
(a ControlNet or a hook in the conditioning) means that nothing is kept.
"""

from __future__ import annotations

import hashlib
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from .compat import HostObject

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher


@dataclass(frozen=True)
class Remembered:
    """State of the sampler (in its own scale) and of the noise generator before the first late step."""

    key: str
    model: weakref.ref  # identity; weak, so that a forgotten model can be freed
    patches: object  # the host's id of the model's weight patches at that time
    x: Tensor
    noise: Tensor


_last: list[Remembered] = []  # holds at most one


class LateState:
    """The memory of one run: `recall` before sampling, `remember` when the late phase begins."""

    def __init__(self, key: str, model: ModelPatcher) -> None:
        self.key, self.model = key, model

    def recall(self, like: Tensor) -> Remembered | None:
        """Return what an equal run left behind, or None."""
        if not _last:
            return None
        last = _last[0]
        same = last.key == self.key and last.model() is self.model and last.patches == self.model.patches_uuid
        return last if same and last.x.shape == like.shape else None

    def remember(self, x: Tensor, noise: Tensor) -> None:
        """Keep a copy of the state; the one of the run before is dropped."""
        _last[:] = [
            Remembered(self.key, weakref.ref(self.model), self.model.patches_uuid, x.detach().cpu().clone(), noise)
        ]


def fingerprint(*values: HostObject) -> str | None:
    """Return a digest of nested plain values and tensors, or None where something cannot be compared by value."""
    digest = hashlib.sha256()
    try:
        for value in values:
            _feed(digest, value)
    except TypeError:
        return None
    return digest.hexdigest()


def _feed(digest: HostObject, value: HostObject) -> None:
    if isinstance(value, Tensor):
        digest.update(f"tensor{tuple(value.shape)}{value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().float().numpy().tobytes())
    elif isinstance(value, dict):
        digest.update(b"dict")
        for key in sorted(value, key=repr):
            _feed(digest, key)
            _feed(digest, value[key])
    elif isinstance(value, list | tuple):
        digest.update(f"list{len(value)}".encode())
        for item in value:
            _feed(digest, item)
    elif value is None or isinstance(value, bool | int | float | str):
        digest.update(f"{type(value).__name__}:{value!r};".encode())
    else:
        raise TypeError(type(value).__name__)
