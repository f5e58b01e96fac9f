"""Measure what the pack adds to the start of ComfyUI, with bytecode cached as after the first start.

    python -m tools.bench_start [--repeats=5]

Each repeat is a process of its own that imports ComfyUI, then times ComfyUI's own loading of the pack. Printed are
minimum, median and maximum, and the share of the import that came before.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
from pathlib import Path

from . import environment, hosts
from .environment import ROOT
from .hosts import Host
from .terminal import ToolError, run_command, say

# Order as in ComfyUI's main.py: arguments before anything that reads them, its `utils` before its `nodes`. The parser
# of pyproject.toml is the host's own cost: its extra nodes, loaded before any pack, bring that in.
_PROGRAM = """
import asyncio, json, sys, time
tree, base, pack = sys.argv[1:4]
sys.path[:] = [tree, *(entry for entry in sys.path if entry not in ("", pack))]
began = time.perf_counter()
from comfy.cli_args import args
args.cpu, args.base_directory, args.disable_api_nodes = True, base, True
args.database_url = "sqlite:///:memory:"
import utils.extra_config, nodes, server
loop = asyncio.new_event_loop()
asyncio.set_event_loop(loop)
server.PromptServer(loop)
loop.run_until_complete(nodes.init_public_apis())
from comfy_config import config_parser
host = time.perf_counter() - began
began = time.perf_counter()
loaded = loop.run_until_complete(nodes.load_custom_node(pack))
print(json.dumps({"loaded": loaded, "host": host, "pack": time.perf_counter() - began}))
"""


def measure(host: Host, base: Path) -> dict[str, float]:
    """Return the seconds of importing ComfyUI and of loading the pack, in a new process."""
    environment_ = {**os.environ, "PYTHONPATH": str(host.frontend or "")}
    environment_.pop("PYTHONDONTWRITEBYTECODE", None)
    command = [str(host.python), "-c", _PROGRAM, str(host.tree), str(base), str(ROOT)]
    done = subprocess.run(command, cwd=host.tree, env=environment_, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines or not json.loads(lines[-1])["loaded"]:
        raise ToolError(f"ComfyUI {host.version} could not load the pack:\n{done.stderr[-2000:]}")
    return json.loads(lines[-1])


def main(arguments: list[str]) -> int:
    """Measure on every host and print a line for each."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench_start", description="What the pack adds to the start.")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args(arguments)
    python = environment.ensure("test")
    for version in hosts.VERSIONS:
        host = hosts.ensure(version, python)
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "custom_nodes").mkdir()
            measure(host, Path(folder))  # fills the bytecode caches
            runs = [measure(host, Path(folder)) for _ in range(options.repeats)]
        pack = sorted(1000 * run["pack"] for run in runs)
        share = statistics.median(run["pack"] / run["host"] for run in runs)
        say(
            f"ComfyUI {version}: the pack takes {pack[0]:.0f} / {statistics.median(pack):.0f} / {pack[-1]:.0f} ms "
            f"(minimum / median / maximum of {len(pack)}), {100 * share:.1f} % of ComfyUI's own imports"
        )
    return 0


if __name__ == "__main__":
    run_command(main)
