"""Running ComfyUI servers with the pack, one for each supported version, shared by all tests of a process."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tools import hosts
from tools.hosts import VERSIONS
from tools.server import Server, remove_links
from tools.terminal import stop_servers_when_terminated

__all__ = ["VERSIONS", "example_picture", "object_info", "server"]


def example_picture(path: Path, size: tuple[int, int] = (40, 32)) -> Path:
    """Save a small picture with edges and gradients, (width, height) pixels."""
    columns, rows = np.meshgrid(np.linspace(0, 1, size[0]), np.linspace(0, 1, size[1]))
    discs = (np.hypot(columns - 0.4, rows - 0.5) < 0.25).astype(float)
    rgb = np.stack([columns, rows, discs], axis=-1)  # (H, W, 3) in [0, 1]
    Image.fromarray((rgb * 255).round().astype(np.uint8)).save(path)
    return path


@functools.cache
def server(version: str) -> Server:
    """Start ComfyUI of a version once; it stops with the test process. Skips where it is not installed, fails in CI."""
    if not hosts.present(version):
        text = f"ComfyUI {version} is not there: python -m tools.hosts"
        (pytest.fail if os.environ.get("CLEARSR_REQUIRE_HOSTS") else pytest.skip)(text)
    host = hosts.ensure(version, Path(sys.executable))
    base = Path(tempfile.mkdtemp(prefix="clearsr_")) / "comfyui"
    live = Server(host, base)

    def end() -> None:
        live.stop()
        remove_links(base)
        shutil.rmtree(base.parent, ignore_errors=True)

    stop_servers_when_terminated()
    atexit.register(end)
    live.prepare()
    example_picture(base / "input" / "example.png")
    live.start()
    return live


@functools.cache
def object_info(version: str) -> dict:
    """What the server of a version says about its nodes: the live schema."""
    return server(version).client.json("/object_info")
