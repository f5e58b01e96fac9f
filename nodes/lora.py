"""LoRA through the host's own maths, on MODEL and VAE clones; loading twice replaces, it never adds up."""

from __future__ import annotations

import copy
import uuid
from typing import TYPE_CHECKING

import comfy.lora
from torch import Tensor

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher
    from comfy.sd import VAE

ATTACHMENT = "clearsr.lora"


def add_lora(
    patcher: ModelPatcher, tensors: dict[str, Tensor], key_map: dict[str, str], strength: float, file: str
) -> ModelPatcher:
    """Return a clone of `patcher` with the LoRA added; one that we added before is taken off first.

    Args:
        patcher: MODEL or the VAE's patcher; never changed.
        tensors: PEFT names, `<layer>.lora_A.weight`, `<layer>.lora_B.weight`, `<layer>.alpha`.
        key_map: layer -> weight name in the host's model.
        strength: 0 = not added at all, which saves the host a pass over the weights.
        file: for the message.
    """
    clone = patcher.clone()
    _take_off(clone)
    if not tensors or strength == 0.0:
        return clone
    patches = comfy.lora.load_lora(tensors, key_map, log_missing=False)
    # The host drops keys that it does not know without a word; a LoRA that is half there must not pass.
    added = set(clone.add_patches(patches, strength))
    layers = {name.rsplit(".lora_A.", 1)[0] for name in tensors if ".lora_A." in name}
    missing = {key_map.get(layer, layer) for layer in layers} - added
    if missing:
        raise ValueError(
            f"ClearSR Loader: {len(missing)} LoRA layers of '{file}' have no place in the connected model, for example "
            f"'{min(missing)}'. The model and the file belong to different base models."
        )
    clone.set_attachments(ATTACHMENT, list(patches.values()))
    return clone


def add_vae_lora(vae: VAE, tensors: dict[str, Tensor], key_map: dict[str, str], strength: float, file: str) -> VAE:
    """Return a VAE that shares the weights of `vae` and encodes with the LoRA.

    The host swaps the patches when it loads the one or the other, so both can be used in turn. Hosts have no VAE
    clone: a shallow copy with a patcher of its own is what ComfyUI's own nodes do.
    """
    adapted = copy.copy(vae)
    adapted.patcher = add_lora(vae.patcher, tensors, key_map, strength, file)
    return adapted


def _take_off(clone: ModelPatcher) -> None:
    """Remove our patches of an earlier loader from a fresh clone; other LoRAs stay."""
    ours = clone.get_attachment(ATTACHMENT)
    if not ours:
        return
    for key, entries in list(clone.patches.items()):
        kept = [entry for entry in entries if not any(entry[1] is patch for patch in ours)]
        if kept:
            clone.patches[key] = kept
        else:
            del clone.patches[key]
    clone.patches_uuid = uuid.uuid4()  # tells the host that the loaded weights are no longer these
    clone.remove_attachments(ATTACHMENT)
