"""Measure what the pack does to real photographs: every picture through the nodes of a real ComfyUI, then one table.

    python -m tools.quality --hr=FOLDER --lr=FOLDER [--limit=20] [--alpha=0,0.02] [--beta=0,0.02] [--set=cfg=2]

`--hr` holds photographs, `--lr` the same at a quarter of the size, paired by name as training.evaluate does.
Pictures that are already there are not made again, so a stopped run continues. The table stands beside bicubic
enlargement and Real-ESRGAN x4plus (where its package is installed): PSNR, SSIM, NIQE, EffLite distance, sharpness.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
from pathlib import Path

from . import environment, hosts
from .demo import WORKFLOW, choose_checkpoint, only_node
from .environment import ROOT
from .server import Prompt, Server, running
from .terminal import ProgressBar, ToolError, run_command, say

Setting = tuple[float, float]  # alpha, beta


def settings_of(alphas: list[float], betas: list[float]) -> list[Setting]:
    """Return the cross of both sweeps: each alpha without beta, each beta without alpha; off first.

    The betas come before the alphas: LSA KSampler repeats only the last steps when nothing but beta changes.
    """
    sweeps = [(0.0, 0.0), *((0.0, beta) for beta in betas), *((alpha, 0.0) for alpha in alphas)]
    return list(dict.fromkeys(sweeps))


def folder_of(out: Path, setting: Setting) -> Path:
    """Return where the pictures of one setting go."""
    return out / f"alpha{setting[0]:g}_beta{setting[1]:g}"


def change(prompt: Prompt, setting: str) -> None:
    """Set a widget of a workflow, as "cfg=2", or "ClearSRControlApply.tile_size=512" where two nodes have one."""
    name, _, text = setting.partition("=")
    node, _, widget = name.rpartition(".")
    found = [
        inputs
        for inputs in (one["inputs"] for one in prompt.values() if node in ("", one["class_type"]))
        if widget in inputs and not isinstance(inputs[widget], list)
    ]
    if len(found) != 1:
        widgets = sorted(
            f"{one['class_type']}.{key}"
            for one in prompt.values()
            for key, value in one["inputs"].items()
            if not isinstance(value, list)
        )
        raise ToolError(
            f"--set={setting}: {len(found)} widgets of the workflow are named so. There are: {', '.join(widgets)}"
        )
    before = found[0][widget]
    try:
        if isinstance(before, bool):
            found[0][widget] = {"true": True, "false": False}[text]
        else:
            found[0][widget] = type(before)(text)
    except (ValueError, KeyError):
        raise ToolError(f"--set={setting}: {text!r} cannot stand in for {before!r}") from None


def upscale(server: Server, prompt: Prompt, picture: Path, settings: list[Setting], out: Path, name: str) -> int:
    """Run one picture at every setting that has no result yet; return how many were made."""
    missing = [setting for setting in settings if not (folder_of(out, setting) / name).exists()]
    if not missing:
        return 0
    only_node(prompt, "LoadImage")[1]["image"] = server.client.upload(picture)
    sampler = only_node(prompt, "ClearSRLSAKSampler")[1]
    for setting in missing:
        sampler["alpha"], sampler["beta"] = setting
        run = server.client.run(prompt)
        target = folder_of(out, setting) / name
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(".part")
        server.client.download(run.outputs[only_node(prompt, "SaveImage")[0]]["images"][0], partial)
        partial.replace(target)
    return len(missing)


def evaluate(python: Path, options: argparse.Namespace, methods: list[str], out: Path) -> int:
    """Measure `methods` on the pairs and write the tables; return the exit status of training.evaluate."""
    command = [str(python), "-m", "training.evaluate", f"--hr={options.hr}", f"--lr={options.lr}"]
    # The folder is named after what made its pictures: tables of fewer settings or pictures may go.
    command += [f"--limit={options.limit}", f"--methods={','.join(methods)}", f"--out={out}", "--overwrite=true"]
    return subprocess.run(command, cwd=ROOT).returncode


def main(arguments: list[str]) -> int:
    """Upscale, measure, print."""
    parser = argparse.ArgumentParser(prog="python -m tools.quality", description="Measure the nodes on photographs.")
    parser.add_argument("--hr", type=Path, required=True, help="folder of photographs")
    parser.add_argument("--lr", type=Path, required=True, help="folder of the same at a quarter of the size")
    parser.add_argument("--limit", type=int, default=20, help="how many pairs, in the order of names (default 20)")
    parser.add_argument("--alpha", default="0,0.02,0.05", help="alphas to try with beta 0")
    parser.add_argument("--beta", default="0,0.02,0.05", help="betas to try with alpha 0")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="WIDGET=VALUE",
        help="another setting than the workflow's, as steps=20 or cfg=2; again for each",
    )
    parser.add_argument("--checkpoint", type=Path, help="self-contained ClearSR file to use instead of the shipped one")
    parser.add_argument("--comfyui", default=hosts.NEWEST, choices=hosts.VERSIONS)
    parser.add_argument("--baselines", default="bicubic,realesrgan")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "quality")
    options = parser.parse_args(arguments)
    for name in ("hr", "lr"):
        if not getattr(options, name).is_dir():
            raise ToolError(f"--{name}={getattr(options, name)} is not a folder")
    if options.checkpoint is not None and not options.checkpoint.is_file():
        raise ToolError(f"--checkpoint={options.checkpoint}: no such file")
    pictures = sorted(path for path in options.lr.iterdir() if path.suffix.lower() == ".png")[: options.limit]
    if not pictures:
        raise ToolError(f"no PNG pictures in --lr={options.lr}")
    settings = settings_of(*([float(value) for value in text.split(",")] for text in (options.alpha, options.beta)))

    prompt: Prompt = json.loads(WORKFLOW.read_text(encoding="utf-8"))
    checkpoint = options.checkpoint or ROOT / "models" / only_node(prompt, "ClearSRLoader")[1]["checkpoint"]
    if options.checkpoint is not None:
        choose_checkpoint(prompt, checkpoint)
    identity = hashlib.sha256(checkpoint.read_bytes()).hexdigest()[:12]
    for setting in options.set:
        change(prompt, setting)
    workflow = json.dumps(prompt, indent=2, sort_keys=True) + "\n"
    out = options.out.resolve() / f"{identity}_{hashlib.sha256(workflow.encode()).hexdigest()[:8]}_{options.comfyui}"
    out.mkdir(parents=True, exist_ok=True)
    (out / "workflow.json").write_text(workflow, encoding="utf-8")
    say(f"{' '.join(options.set) or 'settings of the workflow'}: {out}")

    python = environment.ensure("test")
    baselines = options.baselines.split(",")
    names = [f"{picture.stem}.png" for picture in pictures]
    if any(not (folder_of(out, setting) / name).exists() for setting in settings for name in names):
        # First, so that a package that they miss is told before minutes of sampling; their pictures are kept.
        if (status := evaluate(python, options, baselines, out)) != 0:
            return status
        host = hosts.ensure(options.comfyui, python)
        say(f"{len(pictures)} pictures at {len(settings)} settings through ComfyUI {host.version}")
        bar = ProgressBar("pictures")
        with running(host, out / "comfyui") as server:
            for index, (picture, name) in enumerate(zip(pictures, names, strict=True)):
                upscale(server, prompt, picture, settings, out, name)
                bar.update(index + 1, len(pictures))
        bar.close()

    made = [f"{folder_of(out, setting).name}={folder_of(out, setting)}" for setting in settings]
    return evaluate(python, options, [*baselines, *made], out)


if __name__ == "__main__":
    run_command(main)
