"""Crops of photographs, the same ones in memory or decoded as needed; which picture comes when."""

from __future__ import annotations

import functools
import hashlib
import logging
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from . import shards
from .picture_files import read_rgb
from .picture_sources import open_source, report
from .randomness import generator_for

log = logging.getLogger("clearsr.training")

LOOKED_AT = 32  # pictures whose pixels tell one set of photographs from another

Order = Literal["area", "chunked"]


@dataclass(frozen=True, eq=False)
class ChunkedOrder:
    """Crop number -> picture, so that every chunk (shard) is read once per epoch.

    In each epoch the chunks come in a random order, and the pictures of a chunk in a random order; a picture comes once
    per `typical` pixels of its area, rounded, at least once. Everything follows from (seed, number).

    Args:
        sizes: (height, width) of every picture.
        chunks: numbers of the pictures that lie together.
        seed: decides the orders.
    """

    sizes: list[tuple[int, int]]
    chunks: list[range]
    seed: int

    @functools.cached_property
    def _turns(self) -> list[Tensor]:
        """For every chunk its picture numbers, each as often as an epoch shows it."""
        areas = torch.tensor([float(height * width) for height, width in self.sizes], dtype=torch.float64)
        times = (areas / areas.median()).round().clamp_min(1).long()
        return [torch.arange(c.start, c.stop).repeat_interleave(times[c.start : c.stop]) for c in self.chunks]

    @property
    def epoch_length(self) -> int:
        """Number of crops in one epoch."""
        return sum(len(turns) for turns in self._turns)

    @functools.lru_cache(maxsize=2)  # noqa: B019 - one order lives as long as the run
    def epoch(self, number: int) -> Tensor:
        """Return the picture numbers of epoch `number`, (epoch_length,) int64."""
        generator = generator_for(self.seed + 3, number)
        shuffled = []
        for chunk in torch.randperm(len(self.chunks), generator=generator).tolist():
            turns = self._turns[chunk]
            shuffled.append(turns[torch.randperm(len(turns), generator=generator)])
        return torch.cat(shuffled)

    def picture(self, number: int) -> int:
        """Return the picture that crop `number` is cut from."""
        epoch, place = divmod(number, self.epoch_length)
        return int(self.epoch(epoch)[place])


class _Decoded:
    """The pictures used last, up to a number of bytes; safe for threads."""

    def __init__(self, limit: float) -> None:
        self.limit, self.bytes = limit, 0
        self._pictures: OrderedDict[int, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, index: int) -> np.ndarray | None:
        with self._lock:
            picture = self._pictures.get(index)
            if picture is not None:
                self._pictures.move_to_end(index)
            return picture

    def put(self, index: int, picture: np.ndarray) -> None:
        with self._lock:
            if index not in self._pictures:
                self._pictures[index] = picture
                self.bytes += picture.nbytes
            while self.bytes > self.limit and len(self._pictures) > 1:
                self.bytes -= self._pictures.popitem(last=False)[1].nbytes


class Photographs:
    """All usable photographs of a folder or of shards.

    What fits into `memory_gb` as 8-bit RGB is decoded once, at the start; of more, the pictures used last are kept. The
    same crop comes out either way, and from shards as from the folder that they were made of.

    Args:
        data: a folder of picture files, searched with everything below it, or of shards; or `synthetic`.
        smallest: pictures with a side under this many pixels are left out, and reported.
        memory_gb: most memory that decoded pictures take, in 1e9 bytes.
        order: "area": every pixel is equally likely in every crop drawn; "chunked": see `ChunkedOrder`.
        seed: of the chunked order.
    """

    def __init__(self, data: Path, smallest: int, memory_gb: float = 4.0, order: Order = "area", seed: int = 0) -> None:
        self.order = order
        self._source = open_source(data, smallest)
        self._numbers = list(range(len(self._source.names)))  # of the pictures in use
        self._decoded = _Decoded(memory_gb * 1e9)
        self._unreadable: set[int] = set()
        if sum(height * width * 3 for height, width in self._source.sizes) <= memory_gb * 1e9:
            self._decode_all()
        else:
            log.info("Decoded, these pictures take more than --memory_gb=%g: they are read as needed.", memory_gb)
        self.sizes = [self._source.sizes[number] for number in self._numbers]
        areas = np.array([height * width for height, width in self.sizes], dtype=np.float64)
        self._cumulative = torch.from_numpy(np.cumsum(areas) / areas.sum())
        self._chunked = ChunkedOrder(self._source.sizes, self._source.chunks, seed) if order == "chunked" else None
        log.info("%d photographs, %.0f megapixels", len(self), self.megapixels)

    def _decode_all(self) -> None:
        with ThreadPoolExecutor(4) as pool:
            whole = list(pool.map(self._decode, self._numbers))
        found = [number for number, picture in enumerate(whole) if picture is not None]
        broken = [self._source.names[number] for number, picture in enumerate(whole) if picture is None]
        report(broken, "are cut off or damaged")
        self._numbers = found
        if not self._numbers:
            raise ValueError(f"All {len(broken)} pictures are cut off or damaged; training.prepare says what is wrong.")

    def _decode(self, number: int) -> np.ndarray | None:
        """Decode a picture into the cache and return it, (H, W, 3) uint8; None if it is damaged."""
        try:
            picture = read_rgb(self._source.open(number))
        except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
            # An errno means that the disk or the network failed, not the picture: leaving it out would change the run.
            if isinstance(error, shards.ShardError) or getattr(error, "errno", None):
                raise
            log.debug("%s: %s", self._source.names[number], error)
            return None
        self._decoded.put(number, picture)
        return picture

    def __len__(self) -> int:
        return len(self._numbers)

    @property
    def listing(self) -> list[tuple[str, tuple[int, int, int]]]:
        """Name and shape (H, W, 3) of every picture: what decides which crops there are."""
        return [(self._source.names[number], (*self._source.sizes[number], 3)) for number in self._numbers]

    @functools.cached_property
    def identity(self) -> list[object]:
        """What decides every crop: the pictures and what is in them, and in the chunked order their chunks.

        Names and sizes alone are not enough: `00000.png` of 1024 x 1024 pixels is in more than one data set. Of many
        pictures some stand for all, decoded, as shards may hold them in another file format.
        """
        found: list[object] = [*self.listing, self._content()]
        if self._chunked is None:
            return found
        return [*found, self.order, [len(chunk) for chunk in self._chunked.chunks]]

    def _content(self) -> str:
        """Return a digest of the pixels of at most `LOOKED_AT` pictures, spread over all."""
        digest, count = hashlib.sha256(), len(self._numbers)
        chosen = range(count) if count <= LOOKED_AT else [place * count // LOOKED_AT for place in range(LOOKED_AT)]
        for number in (self._numbers[place] for place in chosen):
            picture = self._decoded.get(number)
            picture = self._decode(number) if picture is None else picture
            digest.update(b"" if picture is None else picture.tobytes())
        return digest.hexdigest()

    @property
    def megapixels(self) -> float:
        """Sum of all pictures."""
        return sum(height * width for height, width in self.sizes) / 1e6

    def crop(self, size: int, generator: torch.Generator, candidates: int = 1, number: int | None = None) -> Tensor:
        """Return a random (3, size, size) crop in [-1, 1], flipped at random.

        Every pixel of the folder is equally likely, with one of `candidates`. Of more the most detailed one is taken:
        skies and blurred backgrounds fill most of a photograph and teach a small super-resolver little.

        In the chunked order `number`, the crop's place in an endless row, decides which picture it is cut from.
        """
        picture = self._chunked.picture(number) if self._chunked and number is not None else None
        patches = [self._draw(size, generator, picture) for _ in range(candidates)]
        patch = max(patches, key=_detail) if candidates > 1 else patches[0]
        if float(torch.rand((), generator=generator)) < 0.5:
            patch = patch[:, ::-1]
        return torch.from_numpy(np.ascontiguousarray(patch)).permute(2, 0, 1).float().div_(127.5).sub_(1.0)

    def crops(
        self, count: int, size: int, generator: torch.Generator, candidates: int = 1, first: int | None = None
    ) -> Tensor:
        """Return `count` crops as (count, 3, size, size) in [-1, 1]; `first` is the number of the first of them."""
        numbers = [None if first is None else first + index for index in range(count)]
        return torch.stack([self.crop(size, generator, candidates, number) for number in numbers])

    def _draw(self, size: int, generator: torch.Generator, picture: int | None) -> np.ndarray:
        where, top, left = torch.rand(3, generator=generator, dtype=torch.float64).tolist()
        if picture is None:
            picture = self._numbers[min(int(torch.searchsorted(self._cumulative, where)), len(self) - 1)]
        image = self._image(picture)
        y = int(top * (image.shape[0] - size + 1))
        x = int(left * (image.shape[1] - size + 1))
        return image[y : y + size, x : x + size]

    def _image(self, number: int) -> np.ndarray:
        """Return a picture, (H, W, 3) uint8; in place of one that cannot be decoded, always the next that can."""
        for step in range(len(self._source.names)):
            candidate = (number + step) % len(self._source.names)
            if candidate in self._unreadable:
                continue
            image = self._decoded.get(candidate)
            if image is None:
                image = self._decode(candidate)
            if image is not None:
                return image
            self._unreadable.add(candidate)
            log.warning(
                "%s is cut off or damaged; the next picture takes its place. Run training.prepare to find all such.",
                self._source.names[candidate],
            )
        raise ValueError("No picture can be decoded any more; training.prepare says what is wrong.")


def _detail(patch: np.ndarray) -> float:
    """Return the mean absolute difference of neighbours in the green channel."""
    green = patch[..., 1].astype(np.int16)
    return float(np.abs(np.diff(green, axis=0)).mean() + np.abs(np.diff(green, axis=1)).mean())
