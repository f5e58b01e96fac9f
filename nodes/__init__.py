"""The ComfyUI side of ClearSR: the node list, in menu order. This folder alone imports the host."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .color import ClearSRColorFix
from .control import ClearSRControlApply
from .custom_sampling import ClearSREmptyPrompt, ClearSRSampler, ClearSRScheduler
from .encode import ClearSRLREncode
from .loader import ClearSRLoader, register_model_folder
from .lsa_patch import ClearSRLSAPatch
from .sampling import ClearSRLSAKSampler


class ClearSRExtension(ComfyExtension):
    """Registers the models folder and the nodes; `on_load` is not called by ComfyUI 0.3.75, so it stays unused."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        register_model_folder()
        return [
            ClearSRLoader,
            ClearSRLREncode,
            ClearSRControlApply,
            ClearSRLSAKSampler,
            ClearSRLSAPatch,
            ClearSRColorFix,
            ClearSRScheduler,
            ClearSRSampler,
            ClearSREmptyPrompt,
        ]
