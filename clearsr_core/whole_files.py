"""Files that are written whole or not at all, also where the power fails."""

from __future__ import annotations

import os
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
