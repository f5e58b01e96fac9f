"""The graph that users build, run by the host's own executor from its API form."""

from __future__ import annotations

import clearsr_rig as rig
import pytest
from PIL import Image


def graph(checkpoint: str, width: int, height: int, **sampler) -> dict:
    """EmptyImage -> the four nodes -> VAE Decode -> Color Fix -> Save Image."""
    empty = {"width": width, "height": height, "batch_size": 1, "color": 0x4060A0}
    sampling = {"seed": 1, "steps": 3, "cfg": 1.0, "sampler_name": "ddpm", "scheduler": "ddpm_leading"}
    sampling |= {"denoise": 1.0, "alpha": 0.01, "beta": 0.01, "ela_end": 0.3, "lla_start": 0.88}
    sampling |= {"target": "step (paper)", "start_from_lr": True, "strength_rule": "per step (paper)", **sampler}
    loader = {"checkpoint": checkpoint, "lora_strength": 1.0, "encoder_lora_strength": 1.0}
    encode = {"clearsr": ["1", 2], "image": ["2", 0], "scale": 4.0, "width": 0, "height": 0, "resize": "bicubic"}
    apply = {"model": ["1", 0], "clearsr": ["1", 2], "lr_latent": ["3", 0], "dpm_strength": 1.0, "spm_strength": 1.0}
    apply |= {"start_percent": 0.0, "end_percent": 1.0, "control_every": 1, "level_weights": ""}
    return {
        "1": {"class_type": "ClearSRLoader", "inputs": loader},
        "2": {"class_type": "EmptyImage", "inputs": empty},
        "3": {"class_type": "ClearSRLREncode", "inputs": {**encode, "tile_size": 0}},
        "4": {"class_type": "ClearSRControlApply", "inputs": apply},
        "5": {"class_type": "ClearSRLSAKSampler", "inputs": {"model": ["4", 0], "lr_latent": ["3", 0], **sampling}},
        "6": {"class_type": "VAEDecode", "inputs": {"samples": ["5", 0], "vae": ["1", 1]}},
        "7": {
            "class_type": "ClearSRColorFix",
            "inputs": {"image": ["6", 0], "reference": ["3", 1], "method": "wavelet", "strength": 1.0},
        },
        "8": {"class_type": "SaveImage", "inputs": {"images": ["7", 0], "filename_prefix": "clearsr"}},
    }


@pytest.mark.parametrize(("width", "height"), [(16, 16), (7, 5), (1, 1), (19, 30)])
def test_result_is_exactly_four_times_the_input(tiny, width, height) -> None:
    success, outputs, messages = rig.prompt(graph(tiny["name"], width, height))
    assert success, messages[-1]
    saved = outputs["8"]["images"][0]
    with Image.open(rig.BASE / "output" / saved["filename"]) as picture:
        assert picture.size == (4 * width, 4 * height)


def test_errors_reach_the_user(tiny) -> None:
    success, _, messages = rig.prompt(graph(tiny["name"], 16, 16, ela_end=0.95))
    assert not success
    assert "ela_end 0.95 lies after lla_start 0.88" in str(messages[-1])


def test_unknown_file_is_refused_before_anything_runs(tiny) -> None:
    with pytest.raises(ValueError, match=r"gone\.safetensors.*was not found"):
        rig.prompt(graph("gone.safetensors", 16, 16))
