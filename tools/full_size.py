"""Run the shipped SD 2.1 workflow at full size in a real ComfyUI, and say what each node took.

    python -m tools.full_size [--workflow=clearsr_x4_sd21] [--comfyui=0.3.75] [--size=128] [--steps=2]
                              [--models=FOLDER] [ComfyUI's own options]

Uses models of random numbers, made once (`python -m training.full_size`), so it shows that everything fits together,
how long it takes and how much memory it needs; the picture means nothing. Options that this command does not know go
to ComfyUI: `--bf16-unet`, `--fp16-vae`, ... The result must have exactly four times the input's size and not be flat.
With --workflow=restore_sd21_diffbir the folder must hold an imported file (`python -m training.import_control`); stage
1, an upscale model, is left out.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import environment, hosts
from .demo import only_node, picture_work
from .environment import ROOT
from .hosts import Host
from .server import Prompt, Run, Server, running
from .terminal import ToolError, run_command, say

WORKFLOWS = ("clearsr_x4_sd21", "restore_sd21_diffbir", "restore_sd21_diffbir_fast")
PICTURE = ROOT / "workflows" / "clearsr_x4.jpg"
OUT = ROOT / "out" / "full_size"
MODELS = OUT / "models"
SCALE = 4
FLAT = 2.0  # standard deviation of a channel, of 255, below which a picture shows nothing
# What ComfyUI and the pack say about precision, memory and models that are not what a file was made for.
_TELLING = re.compile(
    r"model weight dtype.*|VAE load device.*|(ClearSR Loader|LR Latent Encode|DPM/SPM Control Apply|LSA KSampler): .*"
    r"|.*invalid value.*"
)


@dataclass
class Report:
    """What one run showed."""

    comfyui: str
    options: str
    result: tuple[int, int]  # pixels
    steps: int
    seconds: float
    nodes: dict[str, float]  # title -> seconds
    step_seconds: float | None  # between the first and the last step; None for a single one
    peak_gib: float | None


def shipped(name: str) -> Prompt:
    """Return a shipped workflow in the API's form, without stage 1 before LR Latent Encode, where it has one."""
    prompt: Prompt = json.loads((ROOT / "workflows" / "api" / f"{name}.json").read_text(encoding="utf-8"))
    kinds = {node["class_type"]: number for number, node in prompt.items()}
    if "UpscaleModelLoader" in kinds:
        restored = prompt.pop(kinds["ImageUpscaleWithModel"])
        del prompt[kinds["UpscaleModelLoader"]]
        only_node(prompt, "ClearSRLREncode")[1].update(image=restored["inputs"]["image"], scale=float(SCALE))
    return prompt


def ensure_models(prompt: Prompt, folder: Path, python: Path) -> None:
    """Make the files that `prompt` asks for where they are not there yet, except imported ones."""
    parts = {
        "CheckpointLoaderSimple": ("base", "checkpoints", "ckpt_name"),
        "ClearSRLoader": ("clearsr", "clearsr", "checkpoint"),
        "CLIPVisionLoader": ("clip_vision", "clip_vision", "clip_name"),
    }
    wanted = {
        part: folder / place / node["inputs"][name]
        for node in prompt.values()
        if node["class_type"] in parts
        for part, place, name in (parts[node["class_type"]],)
    }
    missing = sorted(part for part, path in wanted.items() if not path.is_file())
    if not missing:
        return
    if "clearsr" in missing and "clip_vision" not in wanted:
        raise ToolError(f"{wanted['clearsr']} is not there: make it with python -m training.import_control")
    say(f"making models of random numbers in {folder}: {', '.join(missing)}")
    command = [str(python), "-m", "training.full_size", f"--out={folder}", f"--parts={','.join(missing)}"]
    if subprocess.run(command, cwd=ROOT).returncode:
        raise ToolError("no models to run with; the reason stands above")


def node_seconds(run: Run, prompt: Prompt) -> dict[str, float]:
    """Return how long each node ran, by its title, from the server's own events."""
    started = [(moment, data.get("node")) for moment, kind, data in run.events if kind == "executing"]
    ends = [moment for moment, _ in started[1:]] + [run.seconds]
    seconds: dict[str, float] = {}
    for (moment, node), end in zip(started, ends, strict=True):
        if node is not None:
            title = prompt[node]["_meta"]["title"]
            seconds[title] = seconds.get(title, 0.0) + end - moment
    return seconds


def step_seconds(run: Run, sampler: str) -> float | None:
    """Return the mean time of a step after the first, which also loads the models."""
    moments = [
        moment
        for moment, kind, data in run.events
        if kind == "progress" and data.get("node") == sampler and float(data["value"]).is_integer() and data["value"]
    ]
    return (moments[-1] - moments[0]) / (len(moments) - 1) if len(moments) > 1 else None


def check_picture(described: dict[str, Any], small: tuple[int, int]) -> tuple[int, int]:
    """Return the size of the result, or say what is wrong with the picture."""
    wanted = (SCALE * small[0], SCALE * small[1])
    if tuple(described["size"]) != wanted:
        raise ToolError(f"the result has {described['size']} pixels, not {wanted}")
    if max(described["spread"]) < FLAT:
        raise ToolError(f"the result shows nothing: channel means {described['mean']}, spreads {described['spread']}")
    return wanted


def measure(host: Host, server: Server, prompt: Prompt, small: Path, steps: int, options: tuple[str, ...]) -> Report:
    """Run the workflow on a live server and check its picture."""
    only_node(prompt, "LoadImage")[1]["image"] = server.client.upload(small, "clearsr_full_size.png")
    sampler, settings = only_node(prompt, "ClearSRLSAKSampler")
    settings["steps"] = steps
    run = server.client.run(prompt, show=True)
    picture = run.outputs[only_node(prompt, "SaveImage")[0]]["images"][0]
    result = server.client.download(picture, server.base.parent / f"result_{host.name}.png")
    size = json.loads(picture_work(host.python, "describe", small))["size"]
    peak = server.peak_memory()
    return Report(
        host.version,
        " ".join(options),
        check_picture(json.loads(picture_work(host.python, "describe", result)), size),
        steps,
        run.seconds,
        node_seconds(run, prompt),
        step_seconds(run, sampler),
        None if peak is None else peak / 2**30,
    )


def tell(report: Report, log: str) -> None:
    """Print the report, what the log says about it, and its row of the table in docs/FULL_SIZE.md."""
    for line in log.splitlines():
        found = _TELLING.search(line)
        if found is not None:
            print(f"  log: {found.group().strip()}")
    parts = [f"{report.nodes.get(title, 0.0):.0f}" for title in ("LR Latent Encode", "LSA KSampler", "VAE Decode")]
    step = "-" if report.step_seconds is None else f"{report.step_seconds:.1f}"
    peak = "-" if report.peak_gib is None else f"{report.peak_gib:.1f}"
    width, height = report.result
    say(f"ComfyUI {report.comfyui}: {width} x {height} pixels, {report.steps} steps, {report.seconds:.0f} s")
    cells = [report.comfyui, report.options or "-", *parts, step, f"{report.seconds:.0f}", peak]
    print("| ComfyUI | options | encode s | sample s | decode s | s per step | all s | peak GiB |")
    print(f"| {' | '.join(cells)} |")


def main(arguments: list[str]) -> int:
    """Make what is missing, run, check, report."""
    parser = argparse.ArgumentParser(prog="python -m tools.full_size", description="Run SD 2.1 + ClearSR at full size.")
    parser.add_argument("--workflow", choices=WORKFLOWS, default=WORKFLOWS[0], help="shipped workflow to run")
    parser.add_argument("--comfyui", choices=hosts.VERSIONS, help="test host to use (default: your own, or the newest)")
    parser.add_argument("--image", type=Path, default=PICTURE, help="picture to enlarge (default: a shipped one)")
    parser.add_argument("--size", type=int, default=128, help="long side of the input, in pixels (default 128)")
    parser.add_argument("--steps", type=int, default=2, help="sampling steps (default 2)")
    parser.add_argument("--models", type=Path, default=MODELS, help="a folder like ComfyUI/models (default out/...)")
    parser.add_argument("--out", type=Path, default=OUT, help="folder for pictures and log")
    options, more = parser.parse_known_args(arguments)
    if not options.image.is_file():
        raise ToolError(f"--image={options.image}: no such file")
    if options.size < 8 or options.steps < 1:
        raise ToolError("--size takes at least 8 pixels, --steps at least 1")
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    prompt = shipped(options.workflow)
    ensure_models(prompt, options.models.resolve(), environment.ensure("test"))
    host = hosts.for_demo(options.comfyui)
    small = out / "input.png"
    picture_work(host.python, "shrink", options.image, small, options.size)
    say(f"starting ComfyUI {host.version} {' '.join(more)}".rstrip())
    began = time.monotonic()
    with running(host, out / f"comfyui_{host.name}", tuple(more), models=options.models.resolve()) as server:
        say(f"ready after {time.monotonic() - began:.0f} s; running {options.workflow}")
        report = measure(host, server, prompt, small, options.steps, tuple(more))
    tell(report, server.log.read_text(encoding="utf-8", errors="replace"))
    return 0


if __name__ == "__main__":
    run_command(main)
