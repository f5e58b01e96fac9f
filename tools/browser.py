"""Finds a Chromium and the playwright-core package for the editor tests."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from .environment import ROOT
from .terminal import ToolError, say

FOLDER = ROOT / "tests" / "browser"
_PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge")
_INSTALLED = (
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "C:/Program Files/Google/Chrome/Application/chrome.exe",
    "C:/Program Files (x86)/Microsoft/Edge/Application/msedge.exe",
)


def chromium() -> str | None:
    """Return a Chromium to drive: the one named in CLEARSR_CHROMIUM, or one that is installed."""
    named = os.environ.get("CLEARSR_CHROMIUM")
    if named:
        return named
    found = next((path for name in _PROGRAMS if (path := shutil.which(name))), None)
    return found or next((path for path in _INSTALLED if Path(path).exists()), None)


def missing() -> str | None:
    """Say what the editor tests lack; None if they can run."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        return "Node.js with npm is not installed"
    if chromium() is None:
        return "no Chromium is installed (CLEARSR_CHROMIUM can name one)"
    if not (FOLDER / "node_modules" / "playwright-core" / "package.json").is_file():
        return "playwright-core is not installed: npm ci in tests/browser"
    return None


def ensure_playwright() -> None:
    """Install the pinned playwright-core beside the tests, once. It drives the system's Chromium and downloads none."""
    npm = shutil.which("npm")
    if npm is None or (FOLDER / "node_modules" / "playwright-core" / "package.json").is_file():
        return
    say("installing playwright-core")
    done = subprocess.run([npm, "ci", "--no-audit", "--no-fund"], cwd=FOLDER, capture_output=True, text=True)
    if done.returncode:
        raise ToolError(f"npm ci in tests/browser failed:\n{done.stderr[-800:]}")


def node() -> str:
    """Return the program that runs the editor tests."""
    return shutil.which("node") or sys.exit("Node.js is not installed")
