"""A file is the one before or the new one, never a part of it."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from clearsr_core.whole_files import remove_unfinished, replacing


def test_a_file_appears_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "a.txt"
    with replacing(path) as unfinished:
        unfinished.write_text("half", encoding="utf-8")
        assert not path.exists()
        unfinished.write_text("whole", encoding="utf-8")
    assert path.read_text(encoding="utf-8") == "whole"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "Ctrl-C"])
def test_after_an_error_everything_is_as_it_was(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "a.txt"
    path.write_text("before", encoding="utf-8")
    with pytest.raises(type(error)), replacing(path) as unfinished:
        unfinished.write_text("ha", encoding="utf-8")
        raise error
    assert path.read_text(encoding="utf-8") == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_what_another_process_is_writing_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    with replacing(path) as other:
        other.write_text("other", encoding="utf-8")
        with monkeypatch.context() as patch:
            patch.setattr(os, "getpid", lambda: -1)
            with replacing(path) as ours:
                ours.write_text("ours", encoding="utf-8")
        assert path.read_text(encoding="utf-8") == "ours"
        assert other.read_text(encoding="utf-8") == "other"
    assert path.read_text(encoding="utf-8") == "other"


@pytest.mark.skipif(os.name == "nt", reason="Windows has no permissions of groups and others")
def test_weights_can_be_read_by_everybody(tmp_path: Path) -> None:
    with replacing(tmp_path / "a.safetensors") as unfinished:
        save_file({"a": torch.zeros(1)}, unfinished)
    assert stat.S_IMODE((tmp_path / "a.safetensors").stat().st_mode) == 0o644


def test_what_a_killed_process_left_can_be_removed(tmp_path: Path) -> None:
    ours, young, other = (tmp_path / f".{name}.7.part" for name in ("a.txt", "a.txt.begun", "b.txt"))
    for path in (ours, young, other):
        path.write_text("half", encoding="utf-8")
    os.utime(ours, (0, 0))
    assert remove_unfinished(tmp_path, "a.txt*", older_than=60.0) == [ours]
    assert remove_unfinished(tmp_path, "a.txt*") == [young]
    assert list(tmp_path.iterdir()) == [other]
    assert remove_unfinished(tmp_path / "nowhere", "*") == []
