"""LR Latent Encode: a low-resolution picture becomes x_lr, the latent LR embedding (paper Sec. 3.1)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import comfy.model_management
from comfy_api.latest import io
from torch import Tensor

from ..clearsr_core.image_encoder import thumbnail
from . import pictures
from .compat import notice, out_of_memory, schema, widget
from .finite import broken, encoder_error
from .sockets import KEY, ClearSRSocket, LREntry

if TYPE_CHECKING:
    from comfy.sd import VAE

    from .sockets import ClearSRBundle

NODE = "LR Latent Encode"
TILE_OVERLAP = 64  # pixels
_TILE_UNIT = 64  # pixels: half a tile and a quarter of one are whole latents then, which the host does not look after
_SMALLEST_TILE = 128
_SMALLER_TILES = (512, 256, 128)  # tried in this order when memory runs out


def tile_side(given: int, say: Callable[[str], None]) -> int:
    """Bring the widget `tile_size` to what x_lr can be made in, 0 = in one piece; say so where it moved."""
    side = given and max(_SMALLEST_TILE, round(given / _TILE_UNIT) * _TILE_UNIT)
    if side != given:
        say(
            f"{NODE}: tile_size is {given}, but tiles have a multiple of {_TILE_UNIT} pixels, at least "
            f"{_SMALLEST_TILE}, so {side} is used."
        )
    return side


def encode(vae: VAE, image: Tensor, tile: int, say: Callable[[str], None]) -> Tensor:
    """Encode to the posterior's mode; where memory runs out, in smaller and smaller tiles.

    Args:
        vae: E or E'.
        image: (B, H, W, 3) in [0, 1].
        tile: side in pixels, as of `tile_side`; 0 = in one piece, which the host itself does in tiles of 512 where
            memory runs out.
        say: tells the user that tiles became smaller.

    Returns:
        (B, 4, H/8, W/8) in VAE units.
    """
    size = max(image.shape[1:3])
    while True:
        try:
            if tile == 0 or size <= tile:
                return vae.encode(image)
            # The host also cuts into tiles of half this width: the overlap must stay below that.
            return vae.encode_tiled(image, tile_x=tile, tile_y=tile, overlap=min(TILE_OVERLAP, tile // 4))
        except Exception as error:
            smaller = next((side for side in _SMALLER_TILES if side < min(tile or size, size)), None)
            if not out_of_memory(error) or smaller is None:
                raise
        # Outside of the handler above: the error holds every tensor of the failed call.
        comfy.model_management.soft_empty_cache()
        tile = smaller
        say(f"{NODE}: out of memory; encoding goes on in tiles of {tile} pixels.")


def image_prompt(bundle: ClearSRBundle, image: Tensor) -> Tensor | None:
    """Return p from the file's own image encoder, (B, 1, context width), or None where the file has none."""
    if bundle.image_encoder is None:
        return None
    patcher = bundle.image_encoder
    comfy.model_management.load_models_gpu([patcher])
    # Shrunk before it goes to the card: a batch of large pictures has no place there.
    return patcher.model(thumbnail(image.movedim(-1, 1)).to(patcher.load_device)).float().cpu()


class ClearSRLREncode(io.ComfyNode):
    """CLEARSR, IMAGE -> LATENT x_lr, upscaled IMAGE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ClearSRLREncode",
            display_name="LR Latent Encode",
            description=(
                "Enlarges the low-resolution picture to its final size and encodes it with the adapted encoder. The "
                "LATENT is an ordinary one: VAE Decode shows what the model sees. Odd sizes are padded by reflection "
                "at the right and the bottom; ClearSR Color Fix cuts them back to exactly scale x input."
            ),
            search_aliases=["clearsr", "vae encode", "upscale", "lr embedding", "x_lr"],
            inputs=[
                widget(ClearSRSocket, "clearsr", tooltip="From ClearSR Loader."),
                widget(io.Image, "image", tooltip="The low-resolution picture, any size; a batch is encoded together."),
                widget(
                    io.Float,
                    "scale",
                    default=4.0,
                    min=0.25,
                    max=16.0,
                    step=0.25,
                    round=0.001,
                    tooltip="How many times wider and higher the result is. The models are trained for 4.",
                ),
                widget(
                    io.Int,
                    "width",
                    default=0,
                    min=0,
                    max=16384,
                    step=1,
                    tooltip="Width of the result in pixels instead of the scale; 0 = not given. With only one of "
                    "width and height the shape is kept.",
                ),
                widget(
                    io.Int,
                    "height",
                    default=0,
                    min=0,
                    max=16384,
                    step=1,
                    tooltip="Height of the result in pixels instead of the scale; 0 = not given.",
                ),
                widget(
                    io.Combo,
                    "resize",
                    options=["bicubic", "bilinear", "area", "nearest-exact"],
                    default="bicubic",
                    tooltip="How the picture is enlarged before it is encoded. The models are trained with bicubic.",
                ),
                widget(
                    io.Int,
                    "tile_size",
                    default=0,
                    min=0,
                    max=4096,
                    step=64,
                    advanced=True,
                    tooltip="Encode in tiles of this many pixels to save memory; 0 = in one piece, which is exact. "
                    "512 is the size the models are trained at. Where memory runs out, tiles become smaller.",
                ),
            ],
            outputs=[
                io.Latent.Output(display_name="LR_LATENT", tooltip="x_lr, for DPM/SPM Control Apply and LSA KSampler."),
                io.Image.Output(
                    display_name="IMAGE",
                    tooltip="The enlarged picture, unpadded: the reference for ClearSR Color Fix and for comparisons.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        clearsr: ClearSRBundle,
        image: Tensor,
        scale: float = 4.0,
        width: int = 0,
        height: int = 0,
        resize: pictures.Resize = "bicubic",
        tile_size: int = 0,
    ) -> io.NodeOutput:
        image, notices = pictures.usable_image(NODE, "image", image)
        for text in notices:
            notice(cls, text)
        content = pictures.target_size((image.shape[1], image.shape[2]), scale, width, height)
        enlarged = pictures.resize(image, content, resize)
        padded = pictures.pad_to_multiple(enlarged)
        say = functools.partial(notice, cls)
        tile = tile_side(tile_size, say)
        samples = encode(clearsr.lr_encoder, padded, tile, say)
        plain_anchor = clearsr.config.anchor == "plain"
        entry: LREntry = {
            "encoded": samples,
            "image_prompt": image_prompt(clearsr, enlarged),
            "anchor": encode(clearsr.vae, padded, tile, say) if plain_anchor else None,
            "content_size": content,
            "padded_size": (padded.shape[1], padded.shape[2]),
        }
        if broken(samples, entry["anchor"]):
            raise encoder_error(NODE, clearsr.name, clearsr.lr_encoder.vae_dtype)
        return io.NodeOutput({"samples": samples, KEY: entry}, enlarged)
