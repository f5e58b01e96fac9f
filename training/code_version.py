"""Which state of this project's code made something."""

from __future__ import annotations

import subprocess
from pathlib import Path

import tomllib

_ROOT = Path(__file__).parents[1]


def code_version() -> str:
    """Return the version of the project, with the commit where the code is a clone of its repository."""
    project = tomllib.loads((_ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    version = str(project["project"]["version"])
    commit = _git("rev-parse", "HEAD")
    if not commit or not (_ROOT / ".git").exists():  # or git answers for a repository around this folder
        return version
    changed = ", changed since" if _git("status", "--porcelain", "--untracked-files=no") else ""
    return f"{version}, commit {commit[:12]}{changed}"


def _git(*arguments: str) -> str:
    """Return what git says, or nothing where there is no git or no repository."""
    try:
        return subprocess.run(
            ["git", "-C", str(_ROOT), *arguments], capture_output=True, check=True, text=True, timeout=30
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
