"""Fixed sets of random crops, and of their degraded partners, encoded once and kept on disk."""

from __future__ import annotations

import glob
import hashlib
import logging
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from clearsr_core.whole_files import remove_unfinished, replacing

from . import models, provenance
from .base_model import BaseModel
from .clearsr_model import ClearSRModel
from .degradation import sharpen
from .photographs import Photographs
from .randomness import generator_for

log = logging.getLogger("clearsr.training")

BATCH = 16
KEEP_EVERY = 60.0  # seconds between two writes of what is encoded so far
_FORGOTTEN = 3600.0  # seconds without a byte, after which the writer of a file is taken for killed
_IDENTITY = "identity"


def weights_hash(*modules: nn.Module | Tensor | None) -> str:
    """Return a digest of the modules' weights, and of tensors."""
    digest = hashlib.sha256()
    for module in modules:
        values = [module] if isinstance(module, Tensor) else module.state_dict().values() if module is not None else []
        for value in values:
            digest.update(value.detach().cpu().numpy().tobytes())
    return digest.hexdigest()


def base_hash(base: BaseModel) -> str:
    """Return a digest of all that a base model is: UNet, autoencoder, empty prompt."""
    return weights_hash(base.unet, base.vae, base.null_text)


def encoded_once(
    cache: Path, identity: str, count: int, encode: Callable[[Tensor], dict[str, Tensor]], what: str
) -> dict[str, Tensor]:
    """Return what `encode` gives for the numbers 0 .. count-1, from `cache` as far as that is of the same identity.

    A file that holds more is enough, and one that holds fewer is gone on with: runs that take the same crops in
    different numbers share it. What is encoded so far is kept beside it now and then, and at Ctrl-C: the next call
    goes on from there.

    Args:
        cache: the file.
        identity: of everything that decides the result of a number.
        count: how many there are, 1 or more.
        encode: gives the tensors of at most `BATCH` numbers, rows in their order; they follow from the numbers alone.
        what: for the bar.
    """
    begun = cache.with_name(f"{cache.name}.begun")
    kept = max((_read(path, identity, count) for path in (cache, begun)), key=_rows)
    if _rows(kept) == count:
        return kept
    remove_unfinished(cache.parent, f"{glob.escape(cache.name)}*", older_than=_FORGOTTEN)
    first = _rows(kept) // BATCH * BATCH  # whole batches: what comes is then bit for bit what it is from nothing
    batches = [{name: value[:first] for name, value in kept.items()}] if first else []
    written = time.monotonic()
    bar = tqdm(
        range(first, count, BATCH), what, -(-count // BATCH), initial=first // BATCH, unit="batch", mininterval=5
    )
    with torch.no_grad():
        for start in bar:
            try:
                encoded = encode(torch.arange(start, min(start + BATCH, count)))
            except KeyboardInterrupt:
                if batches:
                    _write(begun, identity, batches)
                raise
            batches.append({name: value.cpu() for name, value in encoded.items()})
            if time.monotonic() - written > KEEP_EVERY:
                _write(begun, identity, batches)
                written = time.monotonic()
    tensors = _write(cache, identity, batches)
    begun.unlink(missing_ok=True)
    return tensors


def _write(path: Path, identity: str, batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Write batches as one file, whole or not at all, and return what is in it."""
    tensors = {name: torch.cat([batch[name] for batch in batches]).contiguous() for name in batches[0]}
    with replacing(path) as unfinished:
        save_file({**tensors, _IDENTITY: torch.tensor(list(identity.encode()))}, unfinished)
    return tensors


def _read(path: Path, identity: str, count: int) -> dict[str, Tensor]:
    """Return the first `count` rows of a file of this identity, or as many as it has; nothing of another's."""
    if not path.is_file() or _identity_of(path) != identity:
        return {}
    return {name: value[:count] for name, value in load_file(path).items() if name != _IDENTITY}


def _rows(tensors: dict[str, Tensor]) -> int:
    return min((len(value) for value in tensors.values()), default=0)


def _identity_of(cache: Path) -> str:
    """Read the identity alone: what else an outdated cache holds would take memory, and on Windows hold the file."""
    with safe_open(cache, framework="pt") as file:
        return bytes(file.get_tensor(_IDENTITY).tolist()).decode() if _IDENTITY in file.keys() else ""  # noqa: SIM118


class Crops:
    """Numbered crops of a photograph folder: pixels on demand; of a fixed set of them the latents too, once encoded.

    Numbers from 0 on are for training. Those below 0 are crops like them that are in no set and in no step.

    Args:
        photographs: where the crops come from.
        vae: the frozen autoencoder E.
        size: side of a crop in pixels, a multiple of 8.
        count: how many crops there are, encoded once; 0 = without end, each used once and encoded then.
        seed: decides which.
        cache: file to keep the latents in; made anew when it belongs to other crops or another autoencoder.
        usm: sharpen every crop before anything is made of it.
        candidates: crops drawn for each one used; the most detailed is taken.
    """

    def __init__(
        self,
        photographs: Photographs,
        vae: AutoencoderKL,
        size: int,
        count: int,
        seed: int,
        cache: Path,
        device: str,
        usm: bool = False,
        candidates: int = 1,
    ) -> None:
        self.photographs, self.size, self.count, self.seed = photographs, size, count, seed
        self.usm, self.candidates = usm, candidates
        self._vae, self._device, self._cache = vae, device, cache
        options = {"usm": usm, "candidates": candidates}
        # Not of their number: crop 7 is the same of ten and of a thousand.
        self.identity = provenance.digest([photographs.identity, size, seed, options])
        self._latents: Tensor | None = None

    def encode(self) -> None:
        """Encode a fixed set, or take it from the cache; nothing where there is no end of crops."""
        if self.count:
            identity = weights_hash(self._vae.encoder, self._vae.quant_conv) + self.identity
            self._latents = encoded_once(
                self._cache, identity, self.count, lambda i: {"latents": self.latents(i)}, "encoding crops"
            )["latents"]

    def latents(self, indices: Tensor) -> Tensor:
        """Return x_0 of crops, (B, 4, size / 8, size / 8) in model units on the CPU."""
        if self._latents is not None and int(indices.min()) >= 0:
            return self._latents[indices]
        return models.encode(self._vae, self.images(indices).to(self._device)).cpu()

    def hq(self, indices: Tensor) -> Tensor:
        """Return what a training step starts from: latents where they are kept, else pixels, which it encodes."""
        return self.images(indices) if self._latents is None else self._latents[indices]

    def image(self, index: int) -> Tensor:
        """Return crop `index` as (3, size, size) in [-1, 1]."""
        crop = self.photographs.crop(self.size, generator_for(self.seed + 1, index), self.candidates, number=index)
        return sharpen((crop + 1.0) / 2.0) * 2.0 - 1.0 if self.usm else crop

    def images(self, indices: Tensor) -> Tensor:
        """Return crops as (B, 3, size, size) in [-1, 1]."""
        return torch.stack([self.image(int(index)) for index in indices])

    def draw(self, step: int, batch: int, generator: torch.Generator) -> Tensor:
        """Return the `batch` crop numbers of a step: random ones of the fixed set, or the next ones.

        The next ones it is where there is no end of crops and, round and round the fixed set, in the chunked order.
        """
        following = torch.arange(step * batch, (step + 1) * batch)
        if not self.count:
            return following
        if self.photographs.order == "chunked":
            return following % self.count
        return torch.randint(self.count, (batch,), generator=generator)


class FixedPairs:
    """Low-resolution partners of fixed crops, degraded and encoded once; right as long as the encoders stand still.

    Args:
        crops: the crops, a fixed set, 1 or more.
        degraded: turns crop numbers into their degraded partners, (B, 3, size, size) in [0, 1].
        model: holds E' and the image encoder.
        degradation: name of the preset that `degraded` uses.
        seed: decides the degradations.
        cache: file to keep the result in.
    """

    def __init__(
        self,
        crops: Crops,
        degraded: Callable[[Tensor], Tensor],
        model: ClearSRModel,
        degradation: str,
        seed: int,
        cache: Path,
    ) -> None:
        device = model.null_text.device

        def encode(indices: Tensor) -> dict[str, Tensor]:
            lr_images = degraded(indices).to(device)
            return {"latents": model.lr_encoder(lr_images * 2.0 - 1.0), "prompts": model.image_prompt(lr_images)}

        identity = "-".join(
            [
                "by number",  # which degradation a crop gets
                weights_hash(model.lr_encoder, model.image_encoder, model.clip, model.null_text),
                crops.identity,
                degradation,
                str(seed),
            ]
        )
        if model.clip is not None and model.clip.patch:
            identity += "-patch"  # the same weights give other prompts
        encoded = encoded_once(cache, identity, crops.count, encode, "encoding pairs")
        self.latents, self.prompts = encoded["latents"], encoded["prompts"]
