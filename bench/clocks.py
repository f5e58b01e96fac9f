"""Seconds and bytes: of a piece of work, and of single networks within it; on the CPU and on a GPU."""

from __future__ import annotations

import contextlib
import ctypes
import ctypes.util
import gc
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


# Of a CPU: what a watch on the wall shows, or the seconds this process computed, which a busy machine stretches less.
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "processor": time.process_time}


@dataclass
class Turn:
    """What one piece of work took."""

    seconds: float = 0.0
    peak: int | None = None  # bytes at most beyond what was held before; None = this system does not tell
    inside: dict[str, float] = field(default_factory=dict)  # seconds within each watched network
    calls: dict[str, int] = field(default_factory=dict)  # how often each was called


@dataclass
class Watch:
    """Times every forward of some networks by hooks, without waiting for a GPU before the work is over."""

    device: torch.device
    networks: dict[str, nn.Module]
    clock: str = "wall"
    _marks: dict[str, list] = field(default_factory=dict)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Time the networks while inside."""
        self._marks = {name: [] for name in self.networks}
        handles = []
        for name, network in self.networks.items():
            note = self._noter(name)
            handles += [network.register_forward_pre_hook(note), network.register_forward_hook(note)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _noter(self, name: str) -> Callable[..., None]:
        def note(*_arguments: object) -> None:
            self._marks[name].append(self._now())

        return note

    def _now(self) -> float | torch.cuda.Event:
        if self.device.type != "cuda":
            return CLOCKS[self.clock]()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def inside(self) -> dict[str, float]:
        """Return the seconds within each network; call it when the device has finished."""
        return {
            name: sum(_between(begin, end) for begin, end in zip(marks[::2], marks[1::2], strict=True))
            for name, marks in self._marks.items()
        }

    def calls(self) -> dict[str, int]:
        """Return how often each network was called."""
        return {name: len(marks) // 2 for name, marks in self._marks.items()}


def _between(begin: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
    if isinstance(begin, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
        return begin.elapsed_time(end) / 1000.0
    assert isinstance(begin, float) and isinstance(end, float)
    return end - begin


def measure(device: torch.device, work: Callable[[], object], watch: Watch | None = None, clock: str = "wall") -> Turn:
    """Do the work once and tell what it took."""
    gc.collect()
    before = _forget_peak(device)
    with contextlib.nullcontext() if watch is None else watch.watching():
        began = CLOCKS[clock]()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = CLOCKS[clock]() - began
    peak = _peak(device)
    turn = Turn(seconds, None if before is None or peak is None else max(0, peak - before))
    if watch is not None:
        turn.inside, turn.calls = watch.inside(), watch.calls()
    return turn


def _forget_peak(device: torch.device) -> int | None:
    """Start to look for the peak anew; return what is held now."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    if not sys.platform.startswith("linux"):
        return None
    _give_back()
    try:
        _CLEAR.write_text("5")  # Linux: the peak of resident memory becomes what is resident now
    except OSError:
        return None
    return _resident("VmRSS")


def _peak(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _resident("VmHWM") if sys.platform.startswith("linux") else None


def _give_back() -> None:
    """Let the C library return freed memory to the system; it counts as resident until then."""
    library = ctypes.CDLL(ctypes.util.find_library("c"))
    trim = getattr(library, "malloc_trim", None)
    if trim is not None:
        trim(0)


def _resident(name: str) -> int | None:
    found = re.search(rf"{name}:\s+(\d+) kB", _STATUS.read_text())
    return int(found.group(1)) * 1024 if found else None
