"""The workflow for an imported control network runs on live servers, with small networks in place of the real files."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from clearsr_core import checkpoint
from clearsr_core.key_maps import controlnet_prefixes, rename
from clearsr_core.shapes import checkpoint_shapes
from tests.live_hosts import server
from tools.demo import only_node

pytestmark = pytest.mark.host

ROOT = Path(__file__).resolve().parents[2]
NANO = ROOT / "models" / "clearsr-nano.safetensors"
API = ROOT / "workflows" / "api"


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A control network of DiffBIR's layout at nano's size, random, through the import command."""
    folder = tmp_path_factory.mktemp("imported")
    config = checkpoint.read_header(NANO).config
    control = dataclasses.replace(config.control, control_input="lr+xt", window_attention=False, use_spm=False)
    shapes = checkpoint_shapes(dataclasses.replace(config, control=control))["dpm"]
    prefixes, generator = controlnet_prefixes(control), torch.Generator().manual_seed(0)
    weights = {
        rename(name, prefixes): 0.05 * torch.randn(shape, generator=generator)
        for name, shape in shapes.items()
        if not name.startswith("conv_in_lr")
    }
    weights["input_blocks.0.0.weight"] = 0.05 * torch.randn(control.widths[0], 8, 3, 3, generator=generator)
    torch.save(weights, folder / "v2.pth")
    out = folder / "diffbir-v2.safetensors"
    command = [sys.executable, "-m", "training.import_control", f"--weights={folder / 'v2.pth'}", f"--base={NANO}"]
    subprocess.run([*command, f"--out={out}"], cwd=ROOT, check=True, capture_output=True)
    return out


def upscale_model(path: Path) -> None:
    """Save a network of a class that ComfyUI's upscale loader knows (SRVGGNetCompact), 4x, 8 channels, random."""
    generator = torch.Generator().manual_seed(1)
    shapes = {0: (8, 3, 3, 3), 1: (8,), 2: (8, 8, 3, 3), 3: (8,), 4: (48, 8, 3, 3)}
    weights = {f"body.{n}.weight": 0.02 * torch.randn(shape, generator=generator) for n, shape in shapes.items()}
    weights |= {f"body.{n}.bias": torch.zeros(shape[0]) for n, shape in shapes.items() if len(shape) > 1}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights, path)


def narrow(name: str) -> dict:
    """Return a workflow with the imported file's own base in place of SD 2.1-base, whose text encoder it lacks."""
    prompt = json.loads((API / f"{name}.json").read_text("utf-8"))
    base, _ = only_node(prompt, "CheckpointLoaderSimple")
    loader, loaded = only_node(prompt, "ClearSRLoader")
    texts = [node for node, box in prompt.items() if box["class_type"] == "CLIPTextEncode"]
    for node in (base, *texts):
        del prompt[node]
    del loaded["model"], loaded["vae"]
    prompt["empty"] = {"class_type": "ClearSREmptyPrompt", "inputs": {"clearsr": [loader, 2]}}
    prompt["zero"] = {"class_type": "ConditioningZeroOut", "inputs": {"conditioning": ["empty", 0]}}
    only_node(prompt, "ClearSRLSAKSampler")[1].update(positive=["empty", 0], negative=["zero", 0])
    only_node(prompt, "UpscaleModelLoader")[1]["model_name"] = "tiny_x4.safetensors"
    return prompt


def warnings(version: str) -> int:
    return server(version).log.read_text("utf-8", errors="replace").count("was made for other settings")


@pytest.mark.parametrize("name", ["restore_sd21_diffbir_fast", "restore_sd21_diffbir"])
def test_it_runs_to_an_image_of_four_times_the_size(version, client, imported, tmp_path, name) -> None:
    models = server(version).base / "models"
    upscale_model(models / "upscale_models" / "tiny_x4.safetensors")
    (models / "clearsr").mkdir(parents=True, exist_ok=True)
    (models / "clearsr" / imported.name).write_bytes(imported.read_bytes())
    prompt, before = narrow(name), warnings(version)
    only_node(prompt, "ClearSRLSAKSampler")[1]["steps"] = 17  # the fewest that are not warned of
    run = client.run(prompt)
    saved = run.outputs[only_node(prompt, "SaveImage")[0]]["images"][0]
    result = Image.open(client.download(saved, tmp_path / "result.png"))
    source = Image.open(server(version).base / "input" / "example.png")
    assert result.size == (4 * source.width, 4 * source.height)
    assert max(high - low for low, high in result.convert("RGB").getextrema()) > 10
    log = server(version).log.read_text("utf-8", errors="replace")
    assert "this is DiffBIR's control network" in log
    assert warnings(version) == before, "the shipped settings are those that the file was made for"

    only_node(prompt, "ClearSRLSAKSampler")[1].update(scheduler="ddpm_leading", steps=2, start_from_lr=True)
    client.run(prompt)
    assert warnings(version) == before + 1
