"""What travels between the nodes: the CLEARSR socket, and our entry in a LATENT."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, TypedDict

import torch
from comfy_api.latest import io
from torch import Tensor

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher
    from comfy.sd import VAE

    from ..clearsr_core.config import ClearSRConfig

KEY = "clearsr"  # of everything that we hang on host objects: wrappers, attachments, additional models, LATENT entry

ClearSRSocket = io.Custom("CLEARSR")


class LREntry(TypedDict):
    """LATENT["clearsr"], beside the ordinary `samples` that stock nodes decode. It survives sampling."""

    encoded: Tensor  # (B, 4, h, w), VAE units: `samples` as they were when the rest of this was made
    image_prompt: Tensor | None  # (B, 1, context width): p of the file's own image encoder
    anchor: Tensor | None  # (B, 4, h, w), VAE units: x_lr of start and LSA where it is not `samples`
    content_size: tuple[int, int]  # (height, width) in pixels of the upscaled picture
    padded_size: tuple[int, int]  # (height, width) in pixels that was encoded: 8 times the latent's size


def encoded_rows(entry: LREntry, samples: Tensor) -> list[int] | None:
    """Return which of the encoded pictures each row of `samples` is, or None where one of them is something else.

    Stock nodes choose, repeat and reorder the rows of a LATENT, and leave our entry as it was.
    """
    encoded = entry["encoded"]
    if samples is encoded:
        return list(range(len(encoded)))
    if samples.shape[1:] != encoded.shape[1:]:
        return None
    rows: list[int] = []
    for row in samples:
        found = next((index for index, one in enumerate(encoded) if torch.equal(row.to(one), one)), None)
        if found is None:
            return None
        rows.append(found)
    return rows


@dataclasses.dataclass(frozen=True, eq=False)
class ClearSRBundle:
    """All that a loaded file brings, except the MODEL and the plain VAE's own sockets.

    Frozen: nodes share one bundle. The host's caches and memory accounting find the models through `patcher`,
    `get_models()` and `get_ram_usage()`.
    """

    name: str  # of the file, for messages
    config: ClearSRConfig
    control: ModelPatcher  # DPM + SPM
    vae: VAE  # E: plain, in the precision that x_lr is made in
    lr_encoder: VAE  # E' = E + LoRA; shares the weights of `vae`
    null_text: Tensor  # (tokens, context width): the empty prompt
    base: str  # fingerprint of the MODEL that was loaded with it; "" where it cannot be compared
    image_encoder: ModelPatcher | None  # of self-contained files
    image_projection: dict[str, Tensor] | None = None  # makes patch tokens of CLIP's hidden states

    @property
    def patcher(self) -> ModelPatcher:
        return self.control

    def get_models(self) -> list[ModelPatcher]:
        """Return every model behind this socket that holds weights of its own, and the encoder's clone."""
        models = [self.control, self.vae.patcher, self.lr_encoder.patcher]
        return models if self.image_encoder is None else [*models, self.image_encoder]

    def get_ram_usage(self) -> int:
        """Return bytes held by weights; `lr_encoder` shares those of `vae` and is not counted again."""
        return sum(model.model_size() for model in self.get_models() if model is not self.lr_encoder.patcher)
