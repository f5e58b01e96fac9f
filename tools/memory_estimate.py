"""What ComfyUI itself expects full size to need on a graphics card in half precision: computed, not measured.

    python -m tools.memory_estimate [--comfyui=0.3.75]

Asks the host's own functions (`memory_required` of its SD 2 model, `memory_used_*` of its VAE, what it keeps back for
computing) and the pack's own (tiles, room for DPM and SPM), as it would be with flash attention. No weights are needed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path

from . import environment, hosts
from .environment import ROOT
from .hosts import Host
from .terminal import ToolError, run_command, say

SIDES = (512, 1024, 1536, 2048, 4096)
CARD = 8.0  # GiB

# Order of imports as in tools/bench_start.py.
_PROGRAM = """
import asyncio, importlib, json, math, sys
tree, base, pack, sides = *sys.argv[1:4], json.loads(sys.argv[4])
sys.path[:] = [tree, *(entry for entry in sys.path if entry not in ("", pack))]
from comfy.cli_args import args
args.cpu, args.base_directory, args.disable_api_nodes = True, base, True
args.database_url = "sqlite:///:memory:"
import utils.extra_config, nodes, server
loop = asyncio.new_event_loop()
asyncio.set_event_loop(loop)
server.PromptServer(loop)
assert loop.run_until_complete(nodes.load_custom_node(pack))
import torch, comfy.model_detection, comfy.model_management as management, comfy.sd, comfy.supported_models

name = next(key for key in sys.modules if key.startswith(pack.replace(".", "_x_")))
part = lambda module: importlib.import_module(f"{name}.{module}")
config, shapes, keys = part("clearsr_core.config"), part("clearsr_core.shapes"), part("clearsr_core.key_maps")
hooks = part("nodes.tiled_diffusion")
meta = lambda table: {key: torch.empty(shape, device="meta", dtype=torch.float16) for key, shape in table.items()}
unet = keys.unet_to_host(meta(shapes.unet_shapes(config.SD21_BASE)), config.SD21_BASE)
file = shapes.checkpoint_shapes(config.ClearSRConfig(lora_rank=16))
size = lambda table: 2 * sum(math.prod(shape) for shape in table.values())

host_config = comfy.supported_models.SD20(comfy.model_detection.detect_unet_config(unet, ""))
host_config.set_inference_dtype(torch.float16, None)
model = host_config.get_model({}, "", device=torch.device("meta"))
management.pytorch_attention_flash_attention = lambda: True
vae_table = shapes.vae_shapes(config.SD21_NETWORKS)
zeros = {key: torch.zeros(shape, dtype=torch.bfloat16) for key, shape in vae_table.items()}
vae = comfy.sd.VAE(sd=keys.vae_to_host(zeros, config.SD21_NETWORKS), dtype=torch.bfloat16)

rows = []
for side in sides:
    latent = [1, 4, side // 8, side // 8]
    call = hooks.TilingSettings().call_shape(latent)
    asked = [math.ceil(call[0] * hooks.CONTROL_SHARE), *call[1:]]
    rows.append({
        "side": side, "call": call[-1] * 8, "activations": model.memory_required(asked),
        "encode": vae.memory_used_encode([1, 3, side, side], torch.bfloat16),
        "decode": vae.memory_used_decode(latent, torch.bfloat16),
    })
print(json.dumps({
    "unet": size(shapes.unet_shapes(config.SD21_BASE)), "control": size(file["dpm"]) + size(file["spm"]),
    "vae": size(vae_table), "least": management.minimum_inference_memory(),
    "kept": management.extra_reserved_memory(), "rows": rows,
}))
"""


def ask(host: Host) -> dict:
    """Return bytes of weights and activations, in a new process."""
    env = {**os.environ, "PYTHONPATH": str(host.frontend or "")}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "custom_nodes").mkdir()
        command = [str(host.python), "-c", _PROGRAM, str(host.tree), folder, str(ROOT), json.dumps(SIDES)]
        done = subprocess.run(command, cwd=host.tree, env=env, capture_output=True, text=True)
    if done.returncode:
        raise ToolError(f"ComfyUI {host.version} gave no estimate:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def table(estimate: dict) -> list[str]:
    """Lay the estimate out: what sampling needs with all weights on the card, and what the VAE needs by itself."""
    weights = estimate["unet"] + estimate["control"]
    lines = [
        "| result | one model call | activations | sampling in all | VAE encode | VAE decode |",
        "|---|---|---|---|---|---|",
    ]
    for row in estimate["rows"]:
        room = max(estimate["least"], row["activations"] + estimate["kept"])
        whole = (weights + room) / 2**30
        vae = [(estimate["vae"] + estimate["kept"] + row[part]) / 2**30 for part in ("encode", "decode")]
        cells = [f"{row['side']}²", f"{row['call']}²", f"{row['activations'] / 2**30:.2f}", f"{whole:.2f}"]
        cells += [f"{value:.2f}" if value <= CARD else f"{value:.1f}: in tiles" for value in vae]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main(arguments: list[str]) -> int:
    """Print the table of one host or of both."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.memory_estimate", description="Memory, as ComfyUI expects it."
    )
    parser.add_argument("--comfyui", choices=hosts.VERSIONS, help="test host to ask (default: each)")
    options = parser.parse_args(arguments)
    python = environment.ensure("test")
    for version in hosts.VERSIONS if options.comfyui is None else (options.comfyui,):
        estimate = ask(hosts.ensure(version, python))
        parts = ", ".join(f"{part} {estimate[part] / 2**30:.2f}" for part in ("unet", "control", "vae"))
        say(f"ComfyUI {version}, computed, GiB. Weights in half precision: {parts}; least for computing:")
        print(f"  {estimate['least'] / 2**30:.2f}, of which {estimate['kept'] / 2**30:.2f} for other programs")
        print("\n".join(table(estimate)))
    return 0


if __name__ == "__main__":
    run_command(main)
