"""The nodes in ComfyUI and the diffusers reference pipeline give the same picture from the same file and seed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import clearsr_rig as rig
import pytest
import torch
from safetensors.torch import load_file, save_file

SCALE = 0.18215  # host LATENTs are VAE units, the reference keeps model units


def reference(tmp_path: Path, name: str, image: torch.Tensor, *arguments: object) -> dict[str, torch.Tensor]:
    source, target = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    save_file({"image": image.contiguous()}, source)
    script = Path(__file__).with_name("reference.py")
    command = [sys.executable, script, rig.ROOT, rig.MODELS / name, source, target, *arguments]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return load_file(target)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    ("steps", "ela", "lla", "denoise", "target"),
    [
        (50, 0.0, 0.0, 1.0, "step"),
        (50, 0.02, 0.03, 1.0, "step"),
        (7, 0.05, 0.05, 1.0, "step"),
        (7, 0.05, 0.05, 0.4, "step"),
        (7, 0.2, 0.3, 0.4, "x0"),
    ],
)
def test_host_sampling_equals_the_reference_pipeline(
    tiny: dict[str, Any], tmp_path: Path, steps: int, ela: float, lla: float, denoise: float, target: str
) -> None:
    """Same weights, same noise, same steps; 1e-3 relative on the final latent and on the finished picture."""
    image = rig.images(1, 24, 20)
    expected = reference(tmp_path, tiny["name"], image, 11, steps, ela, lla, denoise, target)
    latent, enlarged = rig.run("ClearSRLREncode", clearsr=tiny["clearsr"], image=image, scale=4.0)
    assert relative(latent["samples"] * SCALE, expected["lr_latent"]) < 1e-4
    model = rig.run("ClearSRControlApply", model=tiny["model"], clearsr=tiny["clearsr"], lr_latent=latent)
    settings = {"seed": 11, "steps": steps, "alpha": ela, "beta": lla, "denoise": denoise}
    settings["target"] = {"step": "step (paper)", "x0": "x0 (denoised)"}[target]
    sampled = rig.run("ClearSRLSAKSampler", model=model, lr_latent=latent, **settings)
    assert relative(sampled["samples"] * SCALE, expected["x_0"]) < 1e-3
    decoded = rig.run("VAEDecode", vae=tiny["vae"], samples=sampled)
    assert decoded.shape[1:3] == (128, 128)  # 96 x 80 and its padding
    for method in ("adain", "wavelet", "lab"):
        fixed = rig.run("ClearSRColorFix", image=decoded, reference=enlarged, method=method)
        assert relative(fixed, expected[method]) < 1e-3, method
        # The same size without any colours of the reference is something else.
        cut = rig.run("ClearSRColorFix", image=decoded, reference=enlarged, method=method, strength=0.0)
        assert relative(cut, expected["none"]) < 1e-3
        assert relative(fixed, expected["none"]) > 0.05
        half = rig.run("ClearSRColorFix", image=decoded, reference=enlarged, method=method, strength=0.5)
        torch.testing.assert_close(half, (cut + fixed) / 2)
