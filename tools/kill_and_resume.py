"""Show that training loses nothing: kill it again and again, and end with the weights of a run that nobody disturbed.

    python -m tools.kill_and_resume --data=FOLDER [--kills=20] [--steps=120] [training settings as --key=value ...]

Both runs train ClearSR on a narrow random base with every part of the real loop: crops, degradation, both LoRAs, EMA,
snapshots. The second run is killed (SIGKILL) at random moments after it started to step. Then the last snapshots are
compared, bit for bit. It took eight minutes on two busy cores.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import subprocess
import time
from pathlib import Path

from . import environment
from .environment import ROOT
from .terminal import ProgressBar, ToolError, run_command, say

BASE = ("--preset=nano", "--base=random", "--base_widths=32,32,64,64", "--crop=64", "--batch=2", "--crops=16")


def content(path: Path) -> tuple[object, str]:
    """Return what a safetensors file holds: its header as a table, and the hash of all bytes behind it."""
    with path.open("rb") as handle:
        header = json.loads(handle.read(int.from_bytes(handle.read(8), "little")))
        return header, hashlib.file_digest(handle, "sha256").hexdigest()


def last_step(out: Path) -> int:
    """Return the step of the newest snapshot, 0 for none."""
    return max((int(path.stem.removeprefix("state_")) for path in out.glob("state_*.safetensors")), default=0)


def run_until_killed(command: list[str], out: Path, moment: float) -> bool:
    """Start a run, kill it `moment` seconds after its first new snapshot; return False when it ended by itself."""
    before = last_step(out)
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and last_step(out) == before:
            time.sleep(0.02)
        try:
            process.wait(moment)
        except subprocess.TimeoutExpired:
            process.kill()
            return True
    if process.returncode:
        raise ToolError(f"the run failed with status {process.returncode}: {' '.join(command)}")
    return False


def main(arguments: list[str]) -> int:
    """Train twice, compare, say so."""
    parser = argparse.ArgumentParser(prog="python -m tools.kill_and_resume", description="Does training lose anything?")
    parser.add_argument("--data", type=Path, required=True, help="folder of photographs")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "kill_and_resume")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options, settings = parser.parse_known_args(arguments)
    python = environment.ensure("test")
    whole, killed = options.out / "whole", options.out / "killed"
    if whole.exists() or killed.exists():
        raise ToolError(f"{options.out} holds an earlier comparison: delete it, or give another --out")
    cache = f"--cache={options.out / 'latents.safetensors'}"
    command = [str(python), "-m", "training.train", *BASE, f"--data={options.data}", cache, f"--steps={options.steps}"]
    command += ["--snapshot_every=2", "--validate_every=0", *settings]

    say(f"one run of {options.steps} steps without disturbance")
    subprocess.run([*command, f"--out={whole}"], cwd=ROOT, check=True)
    moments = random.Random(options.seed)
    bar = ProgressBar("kills")
    kills = 0
    while kills < options.kills and run_until_killed([*command, f"--out={killed}"], killed, moments.uniform(0.0, 1.5)):
        kills += 1
        bar.update(kills, options.kills)
    bar.close()
    reached = last_step(killed)
    subprocess.run([*command, f"--out={killed}"], cwd=ROOT, check=True)

    name = f"state_{options.steps:08d}.safetensors"
    same = content(whole / name) == content(killed / name)
    say(f"{kills} kills up to step {reached} of {options.steps}: {'the same weights' if same else 'OTHER weights'}")
    return 0 if same and kills == options.kills else 1


if __name__ == "__main__":
    run_command(main)
