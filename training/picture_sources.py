"""The pictures that a run trains on, by number: a folder with everything below it, or shards; nothing is decoded."""

from __future__ import annotations

import io
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from . import shards, synthetic
from .picture_files import SUFFIXES, header_size, reason

log = logging.getLogger("clearsr.training")

CHUNK = 64  # pictures that the chunked order takes together where there are no shards


class Source(Protocol):
    """Pictures that can be opened by number."""

    @property
    def names(self) -> list[str]:
        """File names without folders."""
        ...

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(height, width) of every picture."""
        ...

    @property
    def chunks(self) -> list[range]:
        """Numbers that lie together and are best read together."""
        ...

    def open(self, index: int) -> Path | io.BytesIO:
        """Return picture `index` as something that Pillow opens."""
        ...


class _Folder:
    """A folder with everything below it."""

    def __init__(self, folder: Path, smallest: int) -> None:
        paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
        if not paths:
            raise ValueError(
                f"No pictures in {folder} (looked for {', '.join(sorted(SUFFIXES))}), and no shards (*.tar)."
            )
        broken, small = [], []
        self.paths: list[Path] = []
        self.sizes: list[tuple[int, int]] = []
        with ThreadPoolExecutor(4) as pool:
            for path, size in zip(paths, pool.map(_size_or_reason, paths), strict=True):
                if isinstance(size, str):
                    broken.append(f"{path.name} ({size})")
                elif min(size) < smallest:
                    small.append(f"{path.name} ({size[1]}x{size[0]})")
                else:
                    self.paths.append(path)
                    self.sizes.append(size)
        report(broken, "cannot be read")
        report(small, f"have a side under {smallest} pixels")
        if not self.paths:
            raise ValueError(f"None of the {len(paths)} pictures in {folder} can be used (smallest side {smallest}).")
        self.names = [path.name for path in self.paths]
        self.chunks = [range(start, min(start + CHUNK, len(self.paths))) for start in range(0, len(self.paths), CHUNK)]

    def open(self, index: int) -> Path:
        return self.paths[index]


class _Shards:
    """A folder of tar files; memory holds the index only."""

    def __init__(self, folder: Path, smallest: int) -> None:
        index = shards.open_index(folder)
        self.names: list[str] = []
        self.sizes: list[tuple[int, int]] = []
        self.chunks: list[range] = []
        self._places: list[tuple[Path, int, int]] = []
        small = []
        for shard in index.shards:
            first = len(self.names)
            for member in shard.members:
                size = (member.height, member.width)
                if min(size) < smallest:
                    small.append(f"{member.name} ({member.width}x{member.height})")
                    continue
                self.names.append(Path(member.name).name)
                self.sizes.append(size)
                self._places.append((folder / shard.name, member.offset, member.bytes))
            if len(self.names) > first:
                self.chunks.append(range(first, len(self.names)))
        report(small, f"have a side under {smallest} pixels")
        if not self.names:
            raise ValueError(f"None of the pictures in the shards of {folder} can be used (smallest side {smallest}).")

    def open(self, index: int) -> io.BytesIO:
        return io.BytesIO(shards.read_member(*self._places[index]))


def open_source(data: Path, smallest: int) -> Source:
    """Find the pictures whose sides have at least `smallest` pixels; headers are read, nothing is decoded.

    Raises:
        ValueError: there are none, or `data` is no folder.
    """
    if data == synthetic.SYNTHETIC and not data.exists():
        return synthetic.DeadLeaves(smallest)
    if not data.is_dir():
        raise ValueError(
            f"--data={data} is not a folder. Give a folder of photographs, or of shards; or {synthetic.SYNTHETIC} for "
            "a trial run."
        )
    return (_Shards if shards.is_shard_folder(data) else _Folder)(data, smallest)


def report(names: list[str], what: str) -> None:
    """Warn of pictures that are left out: the names of at most ten, and what is wrong with them."""
    if names:
        more = f" and {len(names) - 10} more (training.prepare lists them all)" if len(names) > 10 else ""
        log.warning("%d pictures %s and are left out: %s%s", len(names), what, ", ".join(names[:10]), more)


def _size_or_reason(path: Path) -> tuple[int, int] | str:
    try:
        return header_size(path)
    except Exception as error:  # Pillow raises many kinds for damaged files; one bad file must not end a run.
        return reason(error)
