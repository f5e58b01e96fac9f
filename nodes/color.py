"""ClearSR Color Fix: colours of the low-resolution picture for the result, and its exact size."""

from __future__ import annotations

from comfy_api.latest import io
from torch import Tensor

from ..clearsr_core.color import METHODS, ColorMethod, transfer
from . import pictures
from .compat import notice, schema, widget

NODE = "ClearSR Color Fix"


def cut_to_reference(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Cut off the padding of LR Latent Encode, which lies at the right and the bottom and is less than 64 pixels.

    This is how a graph ends at exactly scale x input without a setting: LR Latent Encode gives out its upscaled
    picture unpadded, and a result that is larger than it by less than one unit of padding can only be its padded
    version. Any other size is the user's own doing and stays.
    """
    height, width = size
    extra_rows, extra_columns = image.shape[1] - height, image.shape[2] - width
    if 0 <= extra_rows < pictures.PADDING and 0 <= extra_columns < pictures.PADDING:
        return image[:, :height, :width]
    return image


def is_padded(size: tuple[int, int], content: tuple[int, int]) -> bool:
    """Return whether `size` is `content`, or `content` brought to a multiple of 64: (height, width) in pixels each."""
    unit = pictures.PADDING
    return size == content or size == tuple(-(-side // unit) * unit for side in content)


class ClearSRColorFix(io.ComfyNode):
    """IMAGE, reference IMAGE -> IMAGE of the reference's size and colours."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ClearSRColorFix",
            display_name="ClearSR Color Fix",
            description=(
                "Gives the result the colours of the low-resolution picture and cuts off the padding, so that the size "
                "is exactly scale x input. Connect the IMAGE of LR Latent Encode as the reference."
            ),
            search_aliases=["color transfer", "colour fix", "adain", "wavelet", "match color", "crop padding"],
            inputs=[
                widget(io.Image, "image", tooltip="The decoded result."),
                widget(
                    io.Image,
                    "reference",
                    tooltip="The picture whose colours and size are right: the IMAGE output of LR Latent Encode. One "
                    "for all results, or one each.",
                ),
                widget(
                    io.Combo,
                    "method",
                    options=list(METHODS),
                    default="wavelet",
                    tooltip="wavelet: coarse colour of the reference, fine detail of the result. adain: only the mean "
                    "and the spread of each channel. lab: like wavelet, but the result keeps its lightness.",
                ),
                widget(
                    io.Float,
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="1 = all of it, 0 = keep the colours and only cut to size.",
                ),
            ],
            outputs=[io.Image.Output(display_name="IMAGE", tooltip="The result in its final size.")],
        )

    @classmethod
    def execute(
        cls, image: Tensor, reference: Tensor, method: ColorMethod = "wavelet", strength: float = 1.0
    ) -> io.NodeOutput:
        image, notices = pictures.usable_image(NODE, "image", image)
        reference, more = pictures.usable_image(NODE, "reference", reference)
        for text in notices + more:
            notice(cls, text)
        if reference.shape[0] not in (1, image.shape[0]):
            raise ValueError(
                f"{NODE}: {image.shape[0]} results and {reference.shape[0]} reference pictures. Connect one "
                "reference, or one for each result."
            )
        whole, wanted = (image.shape[1], image.shape[2]), (reference.shape[1], reference.shape[2])
        image = cut_to_reference(image, wanted)
        if image.shape[1:3] != wanted or not is_padded(whole, wanted):
            rows, columns = whole[0] - image.shape[1], whole[1] - image.shape[2]
            cut = f" {rows} rows and {columns} columns were cut off." if rows or columns else ""
            notice(
                cls,
                f"{NODE}: the reference has {wanted[1]} x {wanted[0]} pixels and the result {whole[1]} x {whole[0]}, "
                f"which no padding explains.{cut} Connect the IMAGE of LR Latent Encode as the reference.",
            )
        if strength == 0.0:
            return io.NodeOutput(image)
        size = (image.shape[1], image.shape[2])
        reference = pictures.resize(reference.to(image), size, "bicubic").expand(image.shape[0], -1, -1, -1)
        return io.NodeOutput(image.lerp(transfer(method, image, reference), strength))
