"""Files that are written whole or not at all, also where the power fails."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Generator[Path, None, None]:
    """Give a file beside `path` to write; at the end it takes the place of `path`, and after an error nothing changes.

    Its bytes are on disk before it gets its name. Two processes that write the same `path` do not meet before that.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield unfinished
        with unfinished.open("rb+") as file:
            os.fsync(file.fileno())
        unfinished.chmod(0o644)  # safetensors makes files that only their owner may read; models are shared
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def remove_unfinished(folder: Path, name: str, older_than: float = 0.0) -> list[Path]:
    """Remove what `replacing` could not, as its process was killed; return what was removed.

    Args:
        folder: where the files were to be; nothing happens where it is not there.
        name: of the files that were to be written, a pattern as of `Path.glob`.
        older_than: seconds since anything was written to them. 0 is for who alone writes here: an unfinished file of
            a process that lives is taken away from it too.
    """
    removed: list[Path] = []
    for path in sorted(folder.glob(f".{name}.*.part")):
        with contextlib.suppress(OSError):  # another process was faster, or has it open
            if time.time() - path.stat().st_mtime >= older_than:
                path.unlink()
                removed.append(path)
    return removed
