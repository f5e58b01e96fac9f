"""Run the tests of this folder inside every ComfyUI at hand, each in a process of its own.

Hosts come from CLEARSR_HOSTS="name=tree:frontend,..." or from `.hosts` (made by `python -m tools.hosts`).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXPECTED = ("c0375", "c0300")


def hosts() -> dict[str, tuple[Path, Path]]:
    """Return name -> (tree, folder with the frontend package)."""
    named = os.environ.get("CLEARSR_HOSTS")
    if named:
        pairs = (entry.split("=", 1) for entry in named.split(","))
        return {name: tuple(Path(part) for part in paths.rsplit(":", 1)) for name, paths in pairs}
    folder = ROOT / ".hosts"
    return {name: (folder / name, folder / name.replace("c", "fe_", 1)) for name in EXPECTED}


@pytest.mark.host
@pytest.mark.slow
@pytest.mark.parametrize("name", hosts())
def test_nodes_inside(name: str) -> None:
    """All host tests pass inside this ComfyUI."""
    tree, frontend = hosts()[name]
    if not (tree / "nodes.py").is_file():
        reason = f"ComfyUI {name} is not at {tree}: run python -m tools.hosts"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    environment = {**os.environ, "COMFYUI_PATH": str(tree), "PYTHONPATH": str(frontend)}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", str(Path(__file__).parent)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    print(done.stdout[-6000:])
    assert done.returncode == 0, f"host tests failed inside {name}; the end of their output:\n{done.stdout[-6000:]}"
