"""ClearSR for ComfyUI. Nothing heavier may stand here: every test run and every start of the host reads this file."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from comfy_api.latest import ComfyExtension

WEB_DIRECTORY = "./web"


async def comfy_entrypoint() -> ComfyExtension:
    """Hand ComfyUI the node list. The import stands inside so that the package can be imported without a host."""
    from .nodes import ClearSRExtension

    return ClearSRExtension()
