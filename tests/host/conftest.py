"""Host tests run inside one ComfyUI per process: the one that COMFYUI_PATH names.

Without that variable the tests in this folder are not collected; `test_hosts.py` stands for them and runs the folder
once per host that it finds, each in a process of its own.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

INSIDE = "COMFYUI_PATH" in os.environ
collect_ignore_glob = ["test_hosts.py"] if INSIDE else ["test_[!h]*.py", "test_h[!o]*.py", "rig.py", "runs.py"]

if INSIDE:
    for name in ("rig", "runs"):
        spec = importlib.util.spec_from_file_location(f"clearsr_{name}", Path(__file__).with_name(f"{name}.py"))
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)

    import clearsr_rig as rig
    import comfy.cldm.cldm
    import comfy.controlnet
    import comfy.model_management
    import comfy.ops
    import torch

    @pytest.fixture(autouse=True)
    def inference_mode() -> Iterator[None]:
        """The host runs nodes so; tests that call its functions directly must too."""
        with torch.inference_mode():
            yield

    @pytest.fixture(scope="session")
    def tiny() -> dict[str, Any]:
        """A loaded self-contained model of width 32: name, model, vae, clearsr."""
        name = rig.write("tiny.safetensors", rig.tiny_checkpoint(rig.tiny_config()))
        model, vae, clearsr = rig.run("ClearSRLoader", checkpoint=name)
        return {"name": name, "model": model, "vae": vae, "clearsr": clearsr}

    @pytest.fixture(scope="session")
    def silent() -> dict[str, Any]:
        """The same as an untrained model: zero output convolutions, zero LoRA, no image prompt."""
        config = rig.tiny_config(prompt_mode="null", image_encoder=False)
        name = rig.write("silent.safetensors", rig.tiny_checkpoint(config, silent=True))
        model, vae, clearsr = rig.run("ClearSRLoader", checkpoint=name)
        return {"name": name, "model": model, "vae": vae, "clearsr": clearsr}

    @pytest.fixture(scope="session")
    def lr(tiny: dict[str, Any]) -> dict[str, Any]:
        """x_lr of one picture, 8 x 8 latent."""
        latent, image = rig.run("ClearSRLREncode", clearsr=tiny["clearsr"], image=rig.images(), scale=4.0)
        return {"latent": latent, "image": image}

    @pytest.fixture(scope="session")
    def controlled(tiny: dict[str, Any], lr: dict[str, Any]) -> Any:
        """The MODEL under control of that picture."""
        return rig.run("ClearSRControlApply", model=tiny["model"], clearsr=tiny["clearsr"], lr_latent=lr["latent"])

    @pytest.fixture(scope="session")
    def wide(tiny: dict[str, Any]) -> dict[str, Any]:
        """x_lr of two pictures, 32 x 24 latent: 3 x 2 small tiles."""
        latent, _ = rig.run("ClearSRLREncode", clearsr=tiny["clearsr"], image=rig.images(2, 60, 45), scale=4.0)
        assert latent["samples"].shape == (2, 4, 32, 24)
        return latent

    @pytest.fixture(scope="session")
    def stock_controlnet(tiny: dict[str, Any]) -> Any:
        """A ControlNet of the host's own class, random, of the tiny UNet's layout."""
        config = dict(tiny["model"].model.model_config.unet_config)
        config.pop("out_channels")
        network = comfy.cldm.cldm.ControlNet(**config, hint_channels=3, operations=comfy.ops.manual_cast, device="cpu")
        rig.module("nodes.self_contained").set_norm_groups(network, 8)
        shapes = {name: tuple(value.shape) for name, value in network.state_dict().items()}
        network.load_state_dict(rig.draw(shapes, torch.Generator().manual_seed(9)))
        network.requires_grad_(False)
        network.dtype = torch.float32
        device = comfy.model_management.get_torch_device()
        return comfy.controlnet.ControlNet(network, load_device=device, manual_cast_dtype=torch.float32)
