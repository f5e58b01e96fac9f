"""What the commands print: timed lines, one progress bar, one way to fail."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable

_START = time.monotonic()
_BAR_WIDTH = 28


class ToolError(Exception):
    """A failure whose text already tells the user what happened and what to do."""


def say(text: str) -> None:
    """Print one line, led by the seconds since the command started."""
    print(f"[{time.monotonic() - _START:6.1f} s] {text}", flush=True)


def stop_servers_when_terminated() -> None:
    """Turn a polite kill into an ordinary exit, so that what was started is stopped on the way out."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


def run_command(main: Callable[[list[str]], int]) -> None:
    """Run a command line program: exit with its status, print a ToolError as one clear text, stop quietly on Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:  # a Windows console may not know every character of a message
            reconfigure(errors="replace")
    stop_servers_when_terminated()
    try:
        sys.exit(main(sys.argv[1:]))
    except ToolError as error:
        print(f"\nerror: {error}", file=sys.stderr, flush=True)
        sys.exit(1)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)


class ProgressBar:
    """One line that is redrawn on a terminal; in a log file a line at every tenth."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._started = time.monotonic()
        self._live = sys.stdout.isatty()
        self._printed_tenth = -1
        self._drawn = False

    def update(self, value: int, total: int) -> None:
        """Show `value` of `total` steps."""
        total = max(total, 1)
        tenth = 10 * value // total
        if not self._live and tenth == self._printed_tenth:
            return
        self._printed_tenth = tenth
        filled = _BAR_WIDTH * value // total
        bar = "#" * filled + "." * (_BAR_WIDTH - filled)
        line = f"           {self._label} [{bar}] {value}/{total}  {time.monotonic() - self._started:.1f} s"
        print("\r" + line if self._live else line, end="" if self._live else "\n", flush=True)
        self._drawn = True

    def close(self) -> None:
        """Leave the bar as it is and go on below it."""
        if self._drawn and self._live:
            print(flush=True)
