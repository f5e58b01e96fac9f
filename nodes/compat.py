"""What differs between the supported ComfyUI versions (0.3.75 and later), and how a node talks to its user."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import logging
from typing import Any, TypeAlias

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


def notice(node: type[io.ComfyNode], text: str) -> None:
    """Tell the user something that is not an error: in the log, and as text on the node where the host can."""
    log.warning("%s", text)
    hidden = getattr(node, "hidden", None)
    unique_id = getattr(hidden, "unique_id", None)
    if unique_id is None:
        return
    from server import PromptServer

    server = getattr(PromptServer, "instance", None)
    if server is not None and getattr(server, "client_id", None) is not None:
        server.send_progress_text(text, unique_id, server.client_id)
