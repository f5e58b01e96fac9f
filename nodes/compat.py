"""What differs between the supported ComfyUI versions (0.3.75 and later), and how a node talks to its user."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import logging
from typing import Any, TypeAlias

import comfy.model_management
import torch
from comfy_api.latest import io

log = logging.getLogger("clearsr")

HostObject: TypeAlias = Any  # an object of the host that it gives no useful type to

CATEGORY = "ClearSR"
_SCHEMA_FIELDS = frozenset(field.name for field in dataclasses.fields(io.Schema))


def schema(**fields: HostObject) -> io.Schema:
    """Build a Schema; fields that this host does not know yet (search_aliases before 0.4) are left out."""
    fields = {"category": CATEGORY, "hidden": [io.Hidden.unique_id], **fields}
    return io.Schema(**{name: value for name, value in fields.items() if name in _SCHEMA_FIELDS})


def widget(kind: HostObject, name: str, **fields: HostObject) -> io.Input:
    """Build an input of `kind`; arguments that this host does not know yet (advanced before 0.4) are left out."""
    known = _parameters(kind.Input)
    return kind.Input(name, **{key: value for key, value in fields.items() if key in known})


@functools.cache
def _parameters(kind: type) -> frozenset[str]:
    return frozenset(inspect.signature(kind.__init__).parameters)


def out_of_memory(error: BaseException) -> bool:
    """Tell whether `error` says that memory ran out, on any device; the host's own test where it has one (0.4)."""
    management = comfy.model_management
    known = getattr(management, "is_oom", None)
    if known is not None and known(error):
        return True
    kind = management.OOM_EXCEPTION
    if isinstance(error, MemoryError) or (kind is not Exception and isinstance(error, kind)):
        return True
    # Processors and Apple's devices raise a RuntimeError that only its text tells apart.
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)


def inference_dtype(base: HostObject) -> torch.dtype:
    """Return the dtype that the host computes a model in (its BaseModel), which need not be that of its weights."""
    return base.manual_cast_dtype or base.get_dtype()


def notice(node: type[io.ComfyNode], text: str, level: int = logging.WARNING) -> None:
    """Tell the user something that is not an error: in the log, and as text on the node where the host can."""
    log.log(level, "%s", text)
    hidden = getattr(node, "hidden", None)
    unique_id = getattr(hidden, "unique_id", None)
    if unique_id is None:
        return
    from server import PromptServer

    server = getattr(PromptServer, "instance", None)
    if server is not None and getattr(server, "client_id", None) is not None:
        server.send_progress_text(text, unique_id, server.client_id)
