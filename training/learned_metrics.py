"""Learned measures (LPIPS, DISTS, MUSIQ, MANIQA, CLIPIQA) of the package pyiqa, from weight files that are there.

pyiqa fetches what it lacks by itself. Here every file is looked up before it is asked, and while it builds its networks
no connection can be opened. Its licence (PolyForm Noncommercial) and those of its weights are not this project's, and
its weights are pickles, which can run code: take them from their authors only.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch

REQUIREMENTS = "training/requirements-pyiqa.txt"


@dataclass(frozen=True)
class Source:
    """How pyiqa calls a measure, and what it reads for it."""

    name: str
    reference: bool  # compares with the good picture
    files: tuple[str, ...]  # under torch's hub folder
    hub: str = ""  # repository in the cache of Hugging Face, of which model.safetensors is read


# The variants that published tables of real-world super-resolution use; file names of pyiqa 0.1.16.
SOURCES = {
    "lpips": Source("lpips", True, ("pyiqa/LPIPS_v0.1_alex-df73285e.pth", "checkpoints/alexnet-owt-7be5be79.pth")),
    "dists": Source("dists", True, ("pyiqa/DISTS_weights-f5e65c96.pth", "checkpoints/vgg16-397923af.pth")),
    "musiq": Source("musiq", False, ("pyiqa/musiq_koniq_ckpt-e95806b9.pth",)),
    "maniqa": Source(
        "maniqa-pipal", False, ("pyiqa/MANIQA_PIPAL-ae6d356b.pth",), "timm/vit_base_patch8_224.augreg2_in21k_ft_in1k"
    ),
    "clipiqa": Source("clipiqa", False, ("clip/RN50.pt",)),
}


class LearnedMetricMissingError(ValueError):
    """A learned measure cannot be computed; the message names the package or the file, and what to do."""


def _missing_files(name: str, folder: Path) -> list[str]:
    """Return what pyiqa would download for a measure: paths, or the name of a repository."""
    source = SOURCES[name]
    missing = [str(folder / file) for file in source.files if not (folder / file).is_file()]
    if source.hub:
        from huggingface_hub import try_to_load_from_cache

        if not isinstance(try_to_load_from_cache(source.hub, "model.safetensors"), str):
            missing.append(f"model.safetensors of {source.hub} in the cache of Hugging Face")
    return missing


@contextlib.contextmanager
def _no_connections() -> Iterator[None]:
    """Let every attempt to look up a host or to open a connection fail."""

    def refuse(*_: object, **__: object) -> NoReturn:
        raise OSError("no connection is opened here")

    kept = socket.getaddrinfo, socket.socket.connect
    socket.getaddrinfo = socket.socket.connect = refuse  # type: ignore[assignment]
    try:
        yield
    finally:
        socket.getaddrinfo, socket.socket.connect = kept  # type: ignore[method-assign]


class LearnedMetrics:
    """Measures of pyiqa by our names.

    Args:
        names: which.
        folder: torch's hub folder with `pyiqa`, `checkpoints` and `clip` in it; empty = where torch has it.
        device: where the networks run.

    Raises:
        LearnedMetricMissingError: the package or a file is missing or damaged.
    """

    def __init__(self, names: tuple[str, ...], folder: Path, device: str) -> None:
        unknown = [name for name in names if name not in SOURCES]
        if unknown:
            raise LearnedMetricMissingError(f"--pyiqa={unknown[0]} is not known here: {', '.join(SOURCES)}.")
        self._device = torch.device(device)
        self._metrics: dict[str, Any] = {}
        if folder != Path():
            if not folder.is_dir():
                raise LearnedMetricMissingError(f"--pyiqa_weights={folder} is not a folder.")
            torch.hub.set_dir(folder.resolve())  # pyiqa and torchvision look here; pyiqa when it is imported
        package = _package()
        hub = Path(torch.hub.get_dir())
        missing = [file for name in dict.fromkeys(names) for file in _missing_files(name, hub)]
        if missing:
            raise LearnedMetricMissingError(
                f"--pyiqa={','.join(names)} lacks {', '.join(missing)}. Nothing is downloaded here: fetch it where you "
                "may (docs/TRAINING.md says from where), or leave that measure out."
            )
        for name in names:
            self._metrics[name] = self._make(package, name)

    def _make(self, package: Any, name: str) -> Any:  # noqa: ANN401 - pyiqa has no types
        # It prints, and draws weights that it then overwrites.
        with contextlib.redirect_stdout(sys.stderr), torch.random.fork_rng(devices=[]), _no_connections():
            try:
                return package.create_metric(SOURCES[name].name, device=self._device)
            except Exception as error:
                source = SOURCES[name]
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
                files = ", ".join(filter(None, (*source.files, source.hub)))
                raise LearnedMetricMissingError(
                    f"pyiqa cannot make {name} ({reason}). It reads {files}: fetch what is damaged again, and install "
                    f"{REQUIREMENTS} in its versions."
                ) from error

    def measure(self, image: np.ndarray, reference: np.ndarray | None) -> dict[str, float]:
        """Return every measure of one (H, W, 3) uint8 picture; without a reference only those that need none."""
        values = {}
        with torch.no_grad():
            for name, metric in self._metrics.items():
                if not SOURCES[name].reference:
                    values[name] = float(metric(self._tensor(image)))
                elif reference is not None:
                    values[name] = float(metric(self._tensor(image), self._tensor(reference)))
        return values

    def _tensor(self, pixels: np.ndarray) -> torch.Tensor:
        """Return (1, 3, H, W) float32 in [0, 1]."""
        return torch.from_numpy(pixels.astype(np.float32) / 255.0).permute(2, 0, 1)[None].to(self._device)


def _package() -> Any:  # noqa: ANN401 - pyiqa has no types
    install = f"pip install --no-deps -r {REQUIREMENTS}"
    if importlib.util.find_spec("pyiqa") is None:
        raise LearnedMetricMissingError(f"--pyiqa needs the package pyiqa, which is not free for all uses: {install}")
    try:
        return importlib.import_module("pyiqa")
    except ImportError as error:
        raise LearnedMetricMissingError(f"pyiqa cannot be imported ({error}): {install}") from error
