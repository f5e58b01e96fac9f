"""Large pictures. Minutes and gigabytes, so only when asked for: `python -m tools.test host -- -m large -s`.

Each prints what it measured, which is what it is run for: pytest shows that with -s.

CLEARSR_PHOTOGRAPH names a picture to use instead of a drawn one, CLEARSR_OUT a folder for the results.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import clearsr_rig as rig
import numpy as np
import pytest
import torch
from clearsr_runs import apply, noise_like, predict, seam_score, textured, tiles
from PIL import Image

pytestmark = [pytest.mark.large, pytest.mark.timeout(3600)]

NANO = "clearsr-nano.safetensors"


@pytest.fixture(autouse=True, scope="module")
def all_cores():
    assert rig.args.use_pytorch_cross_attention, "spell it `-m large`, as two words: the rig looks for them"
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def nano():
    model, vae, clearsr = rig.run("ClearSRLoader", checkpoint=NANO)
    return {"model": model, "vae": vae, "clearsr": clearsr}


def small_picture(height, width):
    """A low-resolution picture (1, height, width, 3): the middle of the photograph, or drawn."""
    path = os.environ.get("CLEARSR_PHOTOGRAPH")
    if path is None:
        return textured(1, height, width)
    with Image.open(path) as photograph:
        # Photographs are softest where they are made smaller: as small as the crop allows, but not more than by 2.
        factor = max(height / photograph.height, width / photograph.width, 0.5)
        size = (max(width, round(photograph.width * factor)), max(height, round(photograph.height * factor)))
        pixels = torch.from_numpy(np.asarray(photograph.convert("RGB").resize(size, Image.Resampling.LANCZOS)).copy())
    top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    return pixels[None, top : top + height, left : left + width].float() / 255.0


def save(name, picture):
    folder = os.environ.get("CLEARSR_OUT")
    if folder is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        Image.fromarray((picture[0] * 255).round().byte().numpy()).save(Path(folder) / f"{name}.png")


def peak_memory():
    """The most that this process has held, in GiB; nothing where the system does not say."""
    if sys.platform == "win32":
        return float("nan")
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def upscaled(loaded, image, scale=4.0, steps=2, denoise=0.35, encode_tile=0, **settings):
    """The whole graph, as the shipped workflow sets it except for the number of steps."""
    seconds, started = {}, time.monotonic()

    def lap(name):
        nonlocal started
        seconds[name], started = round(time.monotonic() - started, 1), time.monotonic()

    latent, enlarged = rig.run(
        "ClearSRLREncode", clearsr=loaded["clearsr"], image=image, scale=scale, tile_size=encode_tile
    )
    lap("encode")
    model = apply(loaded, latent, **settings)
    result = rig.run("ClearSRLSAKSampler", model=model, lr_latent=latent, seed=0, steps=steps, denoise=denoise)
    lap("sample")
    decoded = rig.run("VAEDecode", samples=result, vae=loaded["vae"])
    lap("decode")
    fixed = rig.run("ClearSRColorFix", image=decoded, reference=enlarged)
    lap("colours")
    size = f"{fixed.shape[2]} x {fixed.shape[1]}"
    print(f"\n{size}, {settings or 'automatic'}, {steps} steps: {seconds} s, peak {peak_memory():.1f} GiB so far")
    return fixed


@pytest.mark.parametrize("height", [512, 2048, 4096])
def test_a_picture_4096_pixels_wide(nano, height) -> None:
    """Nano, automatic tiles: exactly four times the input, and finite."""
    encode_tile = 1024 if height > 2048 else 0
    picture = upscaled(nano, small_picture(height // 4, 1024), encode_tile=encode_tile)
    save(f"wide_{height}", picture)
    assert picture.shape == (1, height, 4096, 3) and picture.isfinite().all()


@pytest.mark.parametrize("tile_size", [768, 512])
@pytest.mark.parametrize("overlap", [128, 64])
@pytest.mark.parametrize(("steps", "denoise"), [(3, 0.35), (20, 1.0)])
def test_seams_of_larger_tiles(nano, tile_size, overlap, steps, denoise) -> None:
    """Two tiles that overlap by exactly `overlap`, against one piece at the same borders."""
    width = 2 * tile_size - overlap
    image = small_picture(128, width // 4)
    whole = upscaled(nano, image, steps=steps, denoise=denoise, tile_size=16384)
    picture = upscaled(nano, image, steps=steps, denoise=denoise, tile_size=tile_size, tile_overlap=overlap)
    save(f"{width}_{steps}_one_piece", whole)
    save(f"{width}_{steps}_tiles_{tile_size}", picture)
    cut = tiles.layout(whole.shape[1] // 8, width // 8, tile_size // 8, overlap // 8)
    assert [(tile.top, tile.left) for tile in cut.tiles] == [(0, 0), (0, (tile_size - overlap) // 8)]
    scores = [seam_score(one, cut) for one in (whole, picture)]
    difference = float((picture - whole).abs().mean())
    # The numbers of decision 0021; the assertion below only says that the goal is met.
    print(
        f"{tile_size}, {overlap}, {denoise}: {scores[1] / scores[0]:.3f} ({scores}), mean difference {difference:.4f}"
    )
    assert scores[1] / scores[0] < 1.05


@pytest.mark.parametrize(
    ("height", "width", "scale"), [(2048, 2048, 1.0), (513, 511, 4.0), (1000, 1000, 2.0), (512, 512, 8.0)]
)
def test_large_sizes(tiny, height, width, scale) -> None:
    """The tiny model, one step: exactly scale x input up to 4096 x 4096."""
    encode_tile = 1024 if height * width * scale**2 > 2048**2 else 0  # all at once takes some 10 GiB
    picture = upscaled(tiny, rig.images(1, height, width), scale=scale, steps=1, encode_tile=encode_tile)
    assert picture.shape == (1, round(height * scale), round(width * scale), 3) and picture.isfinite().all()


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_compiled(tiny, backend) -> None:
    """TorchCompileModel behind the control, traced and for this processor: the picture of the plain run."""
    latent, _ = rig.run("ClearSRLREncode", clearsr=tiny["clearsr"], image=rig.images(1, 48, 32), scale=4.0)
    controlled, noise = apply(tiny, latent), noise_like(latent)
    compiled = rig.run("TorchCompileModel", model=controlled, backend=backend)
    expected = predict(controlled, noise, cfg=2.0)
    started = time.monotonic()
    result = predict(compiled, noise, cfg=2.0)
    print(f"\n{backend}: first call {time.monotonic() - started:.0f} s")
    torch.testing.assert_close(result, expected, rtol=1e-2, atol=1e-2)
    assert torch.equal(predict(controlled, noise, cfg=2.0), expected)
