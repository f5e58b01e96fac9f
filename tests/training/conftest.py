"""What several tests of training share."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from training import train


@pytest.fixture(scope="session")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run all three stages for a few steps on two synthetic photographs; nobody writes into its folder."""
    root = tmp_path_factory.mktemp("chain")
    photographs = root / "photographs"
    photographs.mkdir()
    generator = np.random.default_rng(0)
    for index in range(2):
        coarse = generator.integers(0, 255, (12, 12, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((96, 80), Image.Resampling.BICUBIC).save(photographs / f"{index}.png")
    shared = [f"--data={photographs}", "--steps=2", "--threads=1", "--crop=64", "--batch=2", "--validate_every=0"]
    assert train.main(["--preset=nano_autoencoder", *shared, "--widths=32,32,32,32", f"--out={root}/autoencoder"]) == 0
    cache = f"--cache={root}/latents.safetensors"
    base = ["--widths=32,32,64,64", "--context_dim=16", f"--vae={root}/autoencoder/vae", f"--out={root}/base"]
    assert train.main(["--preset=nano_base", *shared, cache, "--crops=4", *base]) == 0
    assert train.main(["--preset=nano", *shared, cache, "--crops=4", f"--base={root}/base", f"--out={root}/nano"]) == 0
    return root


@pytest.fixture
def crops() -> Path:
    """The 100 RealSR crops, in `hr` and `lr`."""
    data = os.environ.get("CLEARSR_DATA", "")
    folder = Path(data) / "bench" / "realsr"
    if not data or not folder.is_dir():
        pytest.skip("set CLEARSR_DATA to a folder that holds bench/realsr/{hr,lr}")
    return folder
