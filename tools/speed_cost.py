"""Measure what a faster setting costs: each setting through the nodes of a real ComfyUI, time beside quality.

    python -m tools.speed_cost --hr=FOLDER --lr=FOLDER [--limit=20] [--only=paper,dpmpp_2m20] [--against=paper]

Every picture goes through all settings in turn, beginning with another one each time; the time is that of the sampler's
node, as a ratio to the reference on the same picture. PSNR, SSIM, NIQE and EffLite are training.evaluate's, with their
differences from the reference picture by picture. Pictures that are already there are not made again.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import itertools
import json
import statistics
import subprocess
from pathlib import Path
from typing import Any

from . import environment, hosts
from .demo import WORKFLOW, only_node
from .environment import ROOT
from .server import Prompt, Run, Server, running
from .terminal import ProgressBar, ToolError, run_command, say

SAMPLER, CONTROL = "ClearSRLSAKSampler", "ClearSRControlApply"
_PAPER = {"steps": 50, "denoise": 1.0}
_PHASE = {"strength_rule": "over the phase"}


def _few(sampler: str, steps: int, **more: object) -> dict[str, dict[str, Any]]:
    """Another sampler and number of steps on the paper's way, with LSA's strength carried over."""
    return {SAMPLER: {"sampler_name": sampler, "steps": steps, "denoise": 1.0, **_PHASE, **more}}


# Name -> class of node -> inputs; a node that the workflow lacks is put between control and sampler.
SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "paper": {SAMPLER: _PAPER},
    **{f"every{every}": {SAMPLER: _PAPER, CONTROL: {"control_every": every}} for every in (2, 5, 50)},
    **{f"ddpm{steps}": _few("ddpm", steps) for steps in (20, 10)},
    **{f"ddpm{steps}_per_step": _few("ddpm", steps, strength_rule="per step (paper)") for steps in (20, 10)},
    **{f"unipc{steps}": _few("uni_pc", steps, alpha=0.0, beta=0.0) for steps in (20, 10)},
    **{f"dpmpp_2m{steps}": _few("dpmpp_2m", steps) for steps in (20, 10)},
    **{f"dpmpp_2m_sde{steps}": _few("dpmpp_2m_sde", steps) for steps in (20, 10)},
    **{f"euler{steps}": _few("euler", steps) for steps in (20,)},
    **{
        f"dpmpp_2m_sde20_every{every}": {**_few("dpmpp_2m_sde", 20), CONTROL: {"control_every": every}}
        for every in (2, 5)
    },
    "ddpm20_once": {**_few("ddpm", 20), CONTROL: {"control_every": 20}},
    **{
        f"lazycache{name}": {SAMPLER: _PAPER, "LazyCache": {"reuse_threshold": value}}
        for name, value in (("005", 0.05), ("02", 0.2))
    },
    "cfg2": {SAMPLER: {**_PAPER, "cfg": 2.0}},
    "cfg2_first_half": {SAMPLER: {**_PAPER, "cfg": 2.0, "cfg_end": 0.5}},
    "cfg2_middle": {SAMPLER: {**_PAPER, "cfg": 2.0, "cfg_start": 0.2, "cfg_end": 0.7}},
    # Around the workflow's own setting.
    "nano": {},
    "nano_every2": {CONTROL: {"control_every": 2}},
    "nano_once": {CONTROL: {"control_every": 50}},
    "nano4": {SAMPLER: {"steps": 4}},
    "nano4_dpmpp_2m": {SAMPLER: {"steps": 4, "sampler_name": "dpmpp_2m"}},
}


def changed(workflow: Prompt, changes: dict[str, dict[str, Any]]) -> Prompt:
    """Return the workflow at a setting."""
    prompt = copy.deepcopy(workflow)
    for kind, inputs in changes.items():
        if any(node["class_type"] == kind for node in prompt.values()):
            only_node(prompt, kind)[1].update(inputs)
            continue
        sampler = only_node(prompt, SAMPLER)[1]
        name = f"new_{kind}"
        defaults = {"start_percent": 0.15, "end_percent": 0.95, "verbose": False}
        prompt[name] = {"class_type": kind, "inputs": {"model": sampler["model"], **defaults, **inputs}}
        sampler["model"] = [name, 0]
    return prompt


def sampling_seconds(run: Run, sampler: str) -> float:
    """Return how long the sampler's node was the one that runs."""
    starts = [(when, data.get("node")) for when, kind, data in run.events if kind == "executing"]
    taken = [later - when for (when, node), (later, _) in itertools.pairwise(starts) if node == sampler]
    if not taken:
        raise ToolError("ComfyUI did not run the sampler: it kept the result of an equal run")
    return sum(taken)


def upscale(server: Server, workflow: Prompt, picture: Path, names: list[str], out: Path) -> None:
    """Run one picture at the settings that have no result yet; the seconds lie beside the result."""
    workflow = copy.deepcopy(workflow)
    missing = [name for name in names if not (out / name / f"{picture.stem}.json").exists()]
    if missing:
        only_node(workflow, "LoadImage")[1]["image"] = server.client.upload(picture)
    for name in missing:
        prompt = changed(workflow, SETTINGS[name])
        run = server.client.run(prompt)
        (out / name).mkdir(parents=True, exist_ok=True)
        saved = run.outputs[only_node(prompt, "SaveImage")[0]]["images"][0]
        server.client.download(saved, out / name / f"{picture.stem}.png")
        seconds = sampling_seconds(run, only_node(prompt, SAMPLER)[0])
        (out / name / f"{picture.stem}.json").write_text(json.dumps(seconds), encoding="utf-8")


def times_table(out: Path, names: list[str], pictures: list[Path], against: str) -> str:
    """Return seconds and ratios of the sampler's node, medians over the pictures."""
    seconds = {
        name: [json.loads((out / name / f"{picture.stem}.json").read_text()) for picture in pictures] for name in names
    }
    lines = ["| Setting | Sampler, seconds | Ratio |", "|---|---|---|"]
    for name, own in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(own, seconds[against], strict=True))
        lines.append(f"| {name} | {statistics.median(own):.2f} | {ratio:.3f} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> int:
    """Upscale, measure, print."""
    parser = argparse.ArgumentParser(prog="python -m tools.speed_cost", description="What faster settings cost.")
    parser.add_argument("--hr", type=Path, required=True, help="folder of photographs")
    parser.add_argument("--lr", type=Path, required=True, help="folder of the same at a quarter of the size")
    parser.add_argument("--limit", type=int, default=20, help="how many pairs, in the order of names (default 20)")
    parser.add_argument("--only", default=",".join(SETTINGS), help=f"settings out of: {', '.join(SETTINGS)}")
    parser.add_argument("--against", default="paper", help="the reference, one of the settings (default paper)")
    parser.add_argument("--comfyui", default=hosts.NEWEST, choices=hosts.VERSIONS)
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "speed_cost")
    options = parser.parse_args(arguments)
    names = list(dict.fromkeys([options.against, *options.only.split(",")]))
    unknown = [name for name in names if name not in SETTINGS]
    if unknown:
        raise ToolError(f"unknown setting {unknown[0]!r}: {', '.join(SETTINGS)}")
    for name in ("hr", "lr"):
        if not getattr(options, name).is_dir():
            raise ToolError(f"--{name}={getattr(options, name)} is not a folder")
    pictures = sorted(path for path in options.lr.iterdir() if path.suffix.lower() == ".png")[: options.limit]
    if not pictures:
        raise ToolError(f"no PNG pictures in --lr={options.lr}")

    workflow: Prompt = json.loads(WORKFLOW.read_text(encoding="utf-8"))
    checkpoint = ROOT / "models" / only_node(workflow, "ClearSRLoader")[1]["checkpoint"]
    identity = hashlib.sha256(checkpoint.read_bytes()).hexdigest()[:12]
    out = options.out.resolve() / f"{identity}_{options.comfyui}"
    python = environment.ensure("test")
    host = hosts.ensure(options.comfyui, python)
    if any(not (out / name / f"{picture.stem}.json").exists() for name in names for picture in pictures):
        say(f"{len(pictures)} pictures at {len(names)} settings through ComfyUI {host.version}")
        bar = ProgressBar("pictures")
        with running(host, out / "comfyui") as server:
            for index, picture in enumerate(pictures):
                first = index % len(names)
                upscale(server, workflow, picture, names[first:] + names[:first], out)
                bar.update(index + 1, len(pictures))
        bar.close()

    command = [str(python), "-m", "training.evaluate", f"--hr={options.hr}", f"--lr={options.lr}", "--overwrite=true"]
    command += [f"--methods={','.join(f'{name}={out / name}' for name in names)}", f"--against={options.against}"]
    status = subprocess.run([*command, f"--limit={options.limit}", f"--out={out}"], cwd=ROOT).returncode
    text = times_table(out, names, pictures, options.against)
    (out / "times.md").write_text(text, encoding="utf-8")
    print("\n" + text, end="")
    return status


if __name__ == "__main__":
    run_command(main)
