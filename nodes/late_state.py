"""Keeps the sampler's state where the late phase begins, so that moving only beta repeats only the last steps.

One state is kept (a latent: some hundred kilobytes), and it is used only where everything that led to it is the
same: model, x_lr, conditioning, seed, schedule, sampler, guidance, alpha. Anything that cannot be compared by value
(a ControlNet or a hook in the conditioning), or that may remember earlier steps (a node that caches the model's output)
means that nothing is kept: what is recalled must be what a whole run would give.
"""

from __future__ import annotations

import hashlib
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from ..clearsr_core.lsa import phase_lengths
from . import host_random
from .compat import HostObject
from .sockets import KEY

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

    from ..clearsr_core.lsa import LSAConfig


@dataclass(frozen=True)
class Remembered:
    """State of the sampler (in its own scale) and of every generator before the first late step."""

    key: str
    model: weakref.ref  # identity; weak, so that a forgotten model can be freed
    patches: object  # the host's id of the model's weight patches at that time
    x: Tensor
    noise: Tensor  # (B, n): states of the generators
    host_random: tuple[Tensor, ...]  # states of torch's global generators, as of `host_random.states`


# In model_options: places where other nodes hook in.
_HOOKS = ("model_function_wrapper", "sampler_cfg_function", "sampler_pre_cfg_function", "sampler_post_cfg_function",
          "sampler_calc_cond_batch_function")  # fmt: skip
_last: list[Remembered] = []  # holds at most one


def starts_late_alike(model: ModelPatcher, steps: int, lsa: LSAConfig) -> bool:
    """Tell whether a run that begins with the late phase does the same there as one that began at the first step.

    Not so where a control that is computed at every n-th step only would be older than the late phase, and where other
    nodes hook into the sampling: EasyCache and its like compare with the steps before.
    """
    every = (model.get_attachment(KEY) or {}).get("control_every", 1)
    if (steps - phase_lengths(steps, lsa)[1]) % every:
        return False
    options = cast("dict[str, Any]", model.model_options)
    wrappers = [model.wrappers, options.get("transformer_options", {}).get("wrappers", {})]
    foreign = any(key != KEY and hooks for table in wrappers for kind in table.values() for key, hooks in kind.items())
    return not foreign and not any(options.get(name) for name in _HOOKS)


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
            Remembered(
                self.key,
                weakref.ref(self.model),
                self.model.patches_uuid,
                x.detach().cpu().clone(),
                noise,
                host_random.states(x.device),
            )
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
