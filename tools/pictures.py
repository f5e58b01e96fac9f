"""Picture work of the demo. Runs in the host's Python, which has Pillow:

python tools/pictures.py shrink PHOTOGRAPH TARGET LONG_SIDE
python tools/pictures.py side_by_side INPUT RESULT UPSCALED_TARGET PAIR_TARGET
python tools/pictures.py thumbnail UPSCALED RESULT TARGET
python tools/pictures.py compress PICTURE TARGET
python tools/pictures.py describe PICTURE
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps, ImageStat

_GAP = 8
_CAPTION_HEIGHT = 34
_THUMBNAIL = 400  # pixels


def shrink(photograph: Path, target: Path, long_side: int) -> None:
    """Save a photograph as RGB with at most `long_side` pixels on its longer side, averaged over areas."""
    with Image.open(photograph) as file:
        image = ImageOps.exif_transpose(file).convert("RGB")
    factor = long_side / max(image.size)
    if factor < 1:
        size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
        image = image.resize(size, Image.Resampling.BOX)
    image.save(target)


def side_by_side(small: Path, result: Path, upscaled_target: Path, pair_target: Path) -> None:
    """Save the input enlarged bicubically to the result's size, and both pictures beside each other with captions."""
    right = Image.open(result).convert("RGB")
    source = Image.open(small).convert("RGB")
    left = source.resize(right.size, Image.Resampling.BICUBIC)
    left.save(upscaled_target)

    canvas = Image.new("RGB", (2 * right.width + _GAP, right.height + _CAPTION_HEIGHT), (24, 24, 24))
    canvas.paste(left, (0, _CAPTION_HEIGHT))
    canvas.paste(right, (right.width + _GAP, _CAPTION_HEIGHT))
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(18)
    captions = ((0, f"input {source.width} x {source.height}, bicubic"), (right.width + _GAP, "ClearSR"))
    for x, caption in captions:
        draw.text((x + 8, 6), caption, fill=(235, 235, 235), font=font)
    canvas.save(pair_target)


def thumbnail(upscaled: Path, result: Path, target: Path) -> None:
    """Save a square JPEG for the template browser: the left half as it was, the right half as it became."""
    before = Image.open(upscaled).convert("RGB")
    after = Image.open(result).convert("RGB")
    after.paste(before.crop((0, 0, after.width // 2, after.height)), (0, 0))
    ImageDraw.Draw(after).line([(after.width // 2, 0), (after.width // 2, after.height)], fill="white", width=3)
    ImageOps.fit(after, (_THUMBNAIL, _THUMBNAIL), Image.Resampling.LANCZOS).save(target, quality=88)


def compress(picture: Path, target: Path) -> None:
    """Save a picture as JPEG, for documents."""
    Image.open(picture).convert("RGB").save(target, quality=92)


def describe(picture: Path) -> None:
    """Print a picture's width, height, and mean and standard deviation of its channels (0 to 255) as JSON."""
    image = Image.open(picture).convert("RGB")
    statistics = ImageStat.Stat(image)
    print(json.dumps({"size": image.size, "mean": statistics.mean, "spread": statistics.stddev}))


if __name__ == "__main__":
    action, *arguments = sys.argv[1:]
    if action == "shrink":
        shrink(Path(arguments[0]), Path(arguments[1]), int(arguments[2]))
    elif action == "side_by_side":
        side_by_side(*map(Path, arguments))
    elif action == "compress":
        compress(*map(Path, arguments))
    elif action == "describe":
        describe(*map(Path, arguments))
    else:
        thumbnail(*map(Path, arguments))
