"""The Python environment in `.venv`: pinned, made once, checked in milliseconds afterwards.

    python -m tools.environment [demo|test]

`demo` holds what a CPU ComfyUI needs, `test` adds the test tools and everything that training needs. torch comes first
and pinned, because every other package would pull its own choice of it.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

from .terminal import ToolError, run_command, say

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
STAMP = VENV / "clearsr-environment.json"
CONSTRAINTS = ROOT / "constraints.txt"

# The three are built for each other. An index with smaller CPU builds can be named in CLEARSR_TORCH_INDEX.
TORCH = ("torch==2.13.0", "torchvision==0.28.0", "torchaudio==2.11.0")
PROFILES = {
    "demo": (ROOT / "tools" / "host_requirements.txt",),
    "test": (
        ROOT / "tools" / "host_requirements.txt",
        ROOT / "requirements-dev.txt",
        ROOT / "training" / "requirements.txt",
    ),
}
OLDEST_PYTHON = (3, 11)

# torch without CUDA beside a torchvision wheel that was built with it: its compiled operators cannot load. The Python
# code of both packages, all that ComfyUI calls here, works once the operators registered at import are declared.
_MEND = '''
import pathlib, subprocess, sys, sysconfig
import torch
packages = pathlib.Path(sysconfig.get_paths()["purelib"])
imports = lambda name: subprocess.run([sys.executable, "-c", "import " + name], capture_output=True).returncode == 0
if torch.version.cuda is None and not imports("torchvision"):
    with open(packages / "torchvision" / "extension.py", "a", encoding="utf-8") as file:
        file.write("""

if not _has_ops():  # CPU build of torch: declare the operators that are registered at import
    _cpu_definitions = torch.library.Library("torchvision", "DEF")
    for _name in ("nms", "qnms"):
        _cpu_definitions.define(_name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
""")
if not imports("torchaudio"):
    for library in (packages / "torchaudio" / "lib").glob("*.so"):
        library.unlink()  # an absent library is a case that its own loader handles
for name in ("torchvision", "torchaudio"):
    if not imports(name):
        sys.exit(name + " cannot be imported beside torch " + torch.__version__)
print(torch.__version__)
'''


def venv_python(venv: Path = VENV) -> Path:
    """Return the interpreter of a virtual environment on this system."""
    return venv / "Scripts" / "python.exe" if os.name == "nt" else venv / "bin" / "python"


def fingerprint(profile: str) -> str:
    """Hash everything that decides what a profile installs: a changed pin makes the environment stale."""
    digest = hashlib.sha256(" ".join(TORCH).encode() + _MEND.encode())
    for path in (CONSTRAINTS, *PROFILES[profile]):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _stamp() -> dict[str, str]:
    """Read which profiles are complete; an unreadable stamp means none."""
    try:
        stamp = json.loads(STAMP.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}


def _call(command: list[str], what: str, tries: int = 1) -> str:
    """Run a command quietly; on failure raise with the end of what it said."""
    output = ""
    for _ in range(tries):
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1", "PYTHONUTF8": "1"},
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="replace",
        )
        if done.returncode == 0:
            return done.stdout
        output = (done.stdout + done.stderr).strip()
    tail = "\n".join(output.splitlines()[-12:])
    raise ToolError(f"{what} failed:\n{tail}\n\nRun the same command again; what is done already is kept.")


def _create_venv() -> None:
    """Make `.venv` with the Python that runs this program, unless it is there and works."""
    python = venv_python()
    if python.exists() and subprocess.run([str(python), "-m", "pip", "--version"], capture_output=True).returncode == 0:
        return
    if sys.version_info < OLDEST_PYTHON:
        raise ToolError(
            f"this is Python {sys.version.split()[0]}, but the environment needs Python "
            f"{'.'.join(map(str, OLDEST_PYTHON))} or newer. Install one and name it: make PYTHON=python3.11 ..."
        )
    say(f"creating .venv with Python {sys.version.split()[0]}")
    command = [sys.executable, "-m", "venv", "--clear", str(VENV)]
    _call(command, "Creating .venv (on Debian and Ubuntu install the package python3-venv)")


def ensure(profile: str) -> Path:
    """Bring `.venv` up to a profile and return its interpreter.

    Nothing is done, and no package index is asked, when the stamp says that exactly these pins are installed.
    """
    wanted = fingerprint(profile)
    if _stamp().get(profile) == wanted and venv_python().exists():
        return venv_python()

    python = str(venv_python())
    pip = [python, "-m", "pip", "install", "--quiet"]
    if not any(_stamp().get(name) == fingerprint(name) for name in PROFILES):
        _create_venv()
        torch_index = os.environ.get("CLEARSR_TORCH_INDEX")
        say(f"installing {', '.join(TORCH)}")
        _call([*pip, *TORCH, *(["--index-url", torch_index] if torch_index else [])], "Installing torch", tries=2)
        say(f"torch {_call([python, '-c', _MEND], 'Making torchvision and torchaudio importable').strip()}")

    files = PROFILES[profile]
    say(f"installing {', '.join(path.relative_to(ROOT).as_posix() for path in files)}")
    requirements = [argument for path in files for argument in ("-r", str(path))]
    # torch is named again so that no other package can exchange it.
    _call([*pip, *TORCH, "-c", str(CONSTRAINTS), *requirements], "Installing the packages", tries=2)

    stamp = {**_stamp(), profile: wanted}
    if profile == "test":
        stamp["demo"] = fingerprint("demo")  # `test` contains all of `demo`
    STAMP.write_text(json.dumps(stamp), encoding="utf-8")
    say("environment ready")
    return venv_python()


def main(arguments: list[str]) -> int:
    """Make the environment of the named profile."""
    profile = arguments[0] if arguments else "test"
    if profile not in PROFILES:
        raise ToolError(f"unknown profile {profile!r}: {' or '.join(PROFILES)}")
    say(f"{profile} environment: {ensure(profile)}")
    return 0


if __name__ == "__main__":
    run_command(main)
