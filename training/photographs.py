"""A folder of photographs as random-access RGB pictures, with a report of what could not be used."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

log = logging.getLogger("clearsr.training")

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}


def read_rgb(path: Path) -> np.ndarray:
    """Read a picture as (H, W, 3) uint8: upright, grey, CMYK, palette and 16 bit converted, alpha on white."""
    with Image.open(path) as picture:
        picture = ImageOps.exif_transpose(picture)
        if picture.mode.startswith(("I", "F")):
            values = np.asarray(picture, dtype=np.float32)
            scale = 255.0 / 65535.0 if values.max() > 255 else 1.0
            grey = np.clip(values * scale + 0.5, 0, 255).astype(np.uint8)
            return np.repeat(grey[..., None], 3, axis=2)
        if "A" in picture.mode or "transparency" in picture.info:
            picture = picture.convert("RGBA")
            background = Image.new("RGBA", picture.size, "white")
            picture = Image.alpha_composite(background, picture)
        return np.asarray(picture.convert("RGB"))


def read_pixels(path: Path) -> Tensor:
    """Read a picture as (1, 3, H, W) float32 in [0, 1]."""
    return torch.from_numpy(read_rgb(path).copy()).permute(2, 0, 1)[None].float() / 255.0


def to_bytes(pixels: Tensor) -> np.ndarray:
    """Round (3, H, W) in [0, 1] to (H, W, 3) uint8."""
    return np.ascontiguousarray((pixels * 255.0).round().byte().permute(1, 2, 0).cpu().numpy())


def write_png(image: np.ndarray, path: Path) -> None:
    """Write (H, W, 3) uint8 whole or not at all, so that what a stopped run leaves can be kept."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    Image.fromarray(image).save(unfinished, "PNG")
    os.replace(unfinished, path)


class Photographs:
    """All usable photographs of a folder, decoded once and kept in memory as uint8.

    Args:
        folder: searched recursively for picture files.
        smallest: pictures with a side under this many pixels are left out, and reported.
    """

    def __init__(self, folder: Path, smallest: int) -> None:
        if not folder.is_dir():
            raise ValueError(f"--data={folder} is not a folder. Give a folder of photographs.")
        paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
        if not paths:
            raise ValueError(f"No pictures in {folder} (looked for {', '.join(sorted(SUFFIXES))}).")
        self.images: list[np.ndarray] = []
        self.paths: list[Path] = []
        broken, small = [], []
        with ThreadPoolExecutor(4) as pool:
            for path, image in zip(paths, pool.map(_read_or_none, paths), strict=True):
                if image is None:
                    broken.append(path.name)
                elif min(image.shape[:2]) < smallest:
                    small.append(path.name)
                else:
                    self.images.append(image)
                    self.paths.append(path)
        for kind, names in (("cannot be read", broken), (f"have a side under {smallest} pixels", small)):
            if names:
                log.warning("%d pictures %s and are left out: %s", len(names), kind, ", ".join(names[:10]))
        if not self.images:
            raise ValueError(f"None of the {len(paths)} pictures in {folder} can be used (smallest side {smallest}).")
        areas = np.array([image.shape[0] * image.shape[1] for image in self.images], dtype=np.float64)
        self._cumulative = torch.from_numpy(np.cumsum(areas) / areas.sum())
        log.info("%d photographs, %.0f megapixels", len(self.images), areas.sum() / 1e6)

    def __iter__(self) -> Iterator[tuple[Path, np.ndarray]]:
        """Go through file and picture, (H, W, 3) uint8."""
        return iter(zip(self.paths, self.images, strict=True))

    @property
    def megapixels(self) -> float:
        """Sum of all pictures."""
        return sum(image.shape[0] * image.shape[1] for image in self.images) / 1e6

    def crop(self, size: int, generator: torch.Generator, candidates: int = 1) -> Tensor:
        """Return a random (3, size, size) crop in [-1, 1], flipped at random.

        Every pixel of the folder is equally likely. With `candidates` > 1 as many crops are drawn and the most detailed
        one is taken: skies and blurred backgrounds fill most of a photograph and teach a super-resolver little.
        """
        patches = [self._draw(size, generator) for _ in range(candidates)]
        patch = max(patches, key=_detail) if candidates > 1 else patches[0]
        if float(torch.rand((), generator=generator)) < 0.5:
            patch = patch[:, ::-1]
        return torch.from_numpy(np.ascontiguousarray(patch)).permute(2, 0, 1).float().div_(127.5).sub_(1.0)

    def crops(self, count: int, size: int, generator: torch.Generator, candidates: int = 1) -> Tensor:
        """Return `count` crops as (count, 3, size, size) in [-1, 1]."""
        return torch.stack([self.crop(size, generator, candidates) for _ in range(count)])

    def _draw(self, size: int, generator: torch.Generator) -> np.ndarray:
        where, top, left = torch.rand(3, generator=generator, dtype=torch.float64).tolist()
        index = min(int(torch.searchsorted(self._cumulative, where)), len(self.images) - 1)
        image = self.images[index]
        y = int(top * (image.shape[0] - size + 1))
        x = int(left * (image.shape[1] - size + 1))
        return image[y : y + size, x : x + size]


def _detail(patch: np.ndarray) -> float:
    """Return the mean absolute difference of neighbours in the green channel."""
    green = patch[..., 1].astype(np.int16)
    return float(np.abs(np.diff(green, axis=0)).mean() + np.abs(np.diff(green, axis=1)).mean())


def _read_or_none(path: Path) -> np.ndarray | None:
    try:
        return read_rgb(path)
    except Exception as error:  # Pillow raises many kinds for damaged files; one bad file must not end a run.
        log.debug("%s: %s", path, error)
        return None
