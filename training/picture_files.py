"""Picture files: reading any of them as RGB, upright; writing PNGs whole; sizes without decoding."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, PngImagePlugin
from torch import Tensor

from clearsr_core.whole_files import replacing

from . import provenance

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}
ROTATED = {5, 6, 7, 8}  # values of the EXIF orientation that swap height and width
ORIENTATION = 0x0112  # the EXIF tag


def read_rgb(file: Path | io.BytesIO) -> np.ndarray:
    """Read a picture as (H, W, 3) uint8: upright, grey, CMYK, palette and 16 bit converted, alpha on white."""
    with Image.open(file) as picture:
        kind = picture.format
        picture = ImageOps.exif_transpose(picture)
        if picture.mode.startswith(("I", "F")):
            values = np.asarray(picture, dtype=np.float32)
            grey = np.clip(values * _scale_to_bytes(picture.mode, kind, values) + 0.5, 0, 255).astype(np.uint8)
            return np.repeat(grey[..., None], 3, axis=2)
        if "A" in picture.mode or "transparency" in picture.info:
            picture = picture.convert("RGBA")
            background = Image.new("RGBA", picture.size, "white")
            picture = Image.alpha_composite(background, picture)
        return np.asarray(picture.convert("RGB"))


def _scale_to_bytes(mode: str, kind: str | None, values: np.ndarray) -> float:
    """Return what brings grey of more than 8 bits to 0 .. 255.

    Where the mode says what white is, that decides: the highest value of a dark picture says nothing. Floats and whole
    numbers of 32 bits have no agreed white, and their range has to tell.
    """
    if mode.startswith("I;16") or (mode == "I" and kind == "PNG"):  # older Pillows open PNGs of 16 bits as I
        return 1.0 / 257.0
    if mode == "F" and values.max() <= 1.0:
        return 255.0
    return 1.0 / 257.0 if values.max() > 255.0 else 1.0


def read_named(path: Path) -> np.ndarray:
    """Read a picture as `read_rgb`, (H, W, 3) uint8.

    Raises:
        ValueError: it cannot be read; the message says which and why.
    """
    try:
        return read_rgb(path)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # SyntaxError: of broken PNGs
        raise ValueError(f"{path} cannot be read ({reason(error)}). Replace it, or take it out.") from error


def read_pixels(path: Path) -> Tensor:
    """Read a picture as (1, 3, H, W) float32 in [0, 1].

    Raises:
        ValueError: as `read_named`.
    """
    return torch.from_numpy(read_named(path).copy()).permute(2, 0, 1)[None].float() / 255.0


def to_bytes(pixels: Tensor) -> np.ndarray:
    """Round (3, H, W) in [0, 1] to (H, W, 3) uint8."""
    return np.ascontiguousarray((pixels * 255.0).round().byte().permute(1, 2, 0).cpu().numpy())


def write_png(image: np.ndarray, path: Path, made_from: str = "") -> None:
    """Write (H, W, 3) uint8 whole or not at all, so that what a stopped run leaves can be kept.

    `made_from`, the SHA-256 of the file that it was made from, goes into the PNG for `provenance.is_made_from`.
    """
    text = PngImagePlugin.PngInfo()
    if made_from:
        text.add_text(provenance.MADE_FROM, made_from)
    with replacing(path) as unfinished:
        Image.fromarray(image).save(unfinished, "PNG", pnginfo=text)


def upright_size(picture: Image.Image) -> tuple[int, int]:
    """Return (height, width) of an open picture as `read_rgb` will give it, from its header alone."""
    width, height = picture.size
    if picture.format == "TIFF":
        return height, width  # upright already
    if picture.format == "PNG" and not {"exif", "XML:com.adobe.xmp"} & picture.info.keys():
        return height, width  # Pillow would decode the whole file to look for a late EXIF block
    return (width, height) if picture.getexif().get(ORIENTATION) in ROTATED else (height, width)


def header_size(file: Path | io.BytesIO) -> tuple[int, int]:
    """Return (height, width) of a picture file as `read_rgb` will give it, from its header alone."""
    with Image.open(file) as picture:
        return upright_size(picture)


def reason(error: Exception) -> str:
    """Say in a few words why a picture file could not be read."""
    text = str(error)
    if isinstance(error, Image.UnidentifiedImageError):
        return "no picture, or damaged at its start"
    if "truncated" in text.lower() or isinstance(error, EOFError):
        return "cut off"
    return text.split("\n")[0][:80] or type(error).__name__
