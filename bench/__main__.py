"""Measure speed and memory of the nodes against a bare UNet, as ratios within one run.

    python -m bench [--size=nano] [--device=cpu] [--pixels=512,1024] [--cfg=1,2] [--steps=20] [--rounds=5]

Starts a ComfyUI process without a server, loads the pack into it and takes turns: a bare loop around the UNet, the
host's sampler, a naive ControlNet, the nodes in each mode, every network alone. `--size=full` has the widths of Stable
Diffusion 2.1 and random weights (3 GB on disk while it runs, 10 GB of memory on a CPU): there few `--steps` do.
`--count` counts the multiply-adds at every size instead, which takes seconds and no memory.
Writes bench.json and bench.md into `--out`. What the pack adds to ComfyUI's start is tools/bench_start.py's.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from bench import report
from tools import environment, hosts
from tools.environment import ROOT
from tools.terminal import ToolError, run_command, say

SIZES = ("nano", "full", "toy")


def numbers(kind: type, text: str) -> list:
    """Read "512,1024"."""
    try:
        return [kind(part) for part in text.split(",") if part]
    except ValueError:
        raise ToolError(f"{text!r}: expected numbers, separated by commas") from None


def request_of(options: argparse.Namespace) -> dict:
    """Check the options and return what the ComfyUI process is asked for."""
    pixels, cfgs = numbers(int, options.pixels), numbers(float, options.cfg)
    if not pixels or any(side < 128 or side % 64 for side in pixels):
        raise ToolError(f"--pixels={options.pixels}: sides from 128 up, multiples of 64")
    if options.clock == "processor" and options.device != "cpu":
        raise ToolError("--clock=processor is of a CPU; leave it out for a GPU")
    if not cfgs or options.steps < 1 or options.rounds < 1:
        raise ToolError("--cfg needs a number, --steps and --rounds at least 1")
    return {
        "size": options.size,
        "device": options.device,
        "pixels": pixels,
        "cfgs": cfgs,
        "steps": options.steps,
        "rounds": options.rounds,
        "tile": options.tile,
        "vae_pixels": options.vae_pixels,
        "only": [name for name in options.only.split(";") if name],
        "parts": not options.no_parts,
        "clock": options.clock,
        "count": options.count,
    }


def measured(host: hosts.Host, request: dict, limit: float | None) -> dict:
    """Let a ComfyUI process of this host measure, and return what it found.

    After `limit` seconds it is ended, and the rounds until then count.
    """
    with tempfile.TemporaryDirectory(prefix="clearsr_bench_") as folder:
        path = Path(folder) / "request.json"
        path.write_text(json.dumps({**request, "tree": str(host.tree)}), encoding="utf-8")
        (Path(folder) / "custom_nodes").mkdir()
        command = [str(host.python), str(ROOT / "bench" / "host_process.py"), str(path)]
        # Threads that wait asleep: on a busy machine spinning takes the processor from those that are waited for.
        surroundings = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ, "PYTHONUTF8": "1"}
        surroundings["PYTHONPATH"] = str(host.frontend or "")
        try:
            status = subprocess.run(command, cwd=host.tree, env=surroundings, timeout=limit).returncode
        except subprocess.TimeoutExpired:
            status = 0
            say(f"stopped after {limit:.0f} s")
        result = path.with_name("result.json")
        if status:
            raise ToolError(f"ComfyUI {host.version} ended with status {status} (-9 or 137: out of memory).")
        if not result.exists():
            raise ToolError("the time was over before the first round was: a longer --limit, fewer --steps or ways")
        return json.loads(result.read_text(encoding="utf-8"))


def main(arguments: list[str]) -> int:
    """Measure, show and write the table."""
    parser = argparse.ArgumentParser(prog="python -m bench", description="Speed and memory against a bare UNet.")
    parser.add_argument("--size", default="nano", choices=SIZES, help="of the model (default nano)")
    parser.add_argument("--comfyui", default=hosts.NEWEST, choices=hosts.VERSIONS)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--pixels", default="512", help="sides of the output (default 512)")
    parser.add_argument("--cfg", default="1,2", help="guidance (default 1,2)")
    parser.add_argument("--steps", type=int, default=20, help="of each run (default 20)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each way (default 5)")
    parser.add_argument("--tile", type=int, default=512, help="pixels of a tile (default 512)")
    parser.add_argument("--vae_pixels", type=int, default=1024, help="largest side that the VAE is measured at")
    parser.add_argument("--only", default="", help="ways to measure, separated by semicolons (default all)")
    parser.add_argument("--no_parts", action="store_true", help="do not measure the networks alone")
    parser.add_argument(
        "--clock", default="wall", choices=("wall", "processor"), help="processor: steadier where a CPU is shared"
    )
    parser.add_argument("--limit", type=float, help="seconds after which the finished rounds are reported")
    parser.add_argument("--count", action="store_true", help="count multiply-adds instead of measuring")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "bench")
    options = parser.parse_args(arguments)
    request = request_of(options)

    result = measured(hosts.ensure(options.comfyui, environment.ensure("test")), request, options.limit)
    text = report.counts_table(result) if options.count else report.markdown(result)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "bench.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (options.out / "bench.md").write_text(text, encoding="utf-8")
    sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    run_command(main)
