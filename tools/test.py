"""Run every test there is, each part in the process it needs, and say at the end how all of them went.

    python -m tools.test [part ...] [-- pytest options]

Parts: ruff, types, core, host, editor; none named means all. `format` lets ruff lay out the code, only when named.
A part that fails does not stop the next one. Two processes run at a time where there are two cores, and each shows what
it said when it ends; CLEARSR_TEST_JOBS=1 runs one after the other and shows lines as they come.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from . import browser, environment, hosts
from .environment import ROOT
from .terminal import ToolError, run_command, say

PARTS = ("ruff", "types", "core", "host", "editor")
_COUNT = re.compile(r"(\d+) (passed|failed|errors?|skipped|xfailed|xpassed)\b")


@dataclass
class Outcome:
    """How one part went: its closing line, whether it is well, how many tests of each kind."""

    name: str
    passed: bool
    line: str
    seconds: float
    counts: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """One process to run: its name, its command, what it needs in its environment."""

    name: str
    command: tuple[str, ...]
    env: dict[str, str]
    is_pytest: bool

    def run(self, live: bool) -> Outcome:
        """Run to the end. Its lines are shown as they come (`live`), or all together at the end."""
        heading = f"\n===== {self.name} " + "=" * (70 - len(self.name))
        print(heading if live else f"started: {self.name}", flush=True)
        started, lines = time.monotonic(), []
        with subprocess.Popen(
            self.command,
            cwd=ROOT,
            env={**os.environ, "PYTHONUTF8": "1", **self.env},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
        ) as process:
            for line in process.stdout or ():
                lines.append(line)
                if live:
                    print(line, end="", flush=True)
        if not live:
            print("".join([f"{heading}\n", *lines]), end="", flush=True)
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        counts = count(last) if self.is_pytest else {}
        summary = last.strip("= ") or f"exit status {process.returncode}"
        return Outcome(self.name, process.returncode == 0, summary, time.monotonic() - started, counts)


def count(line: str) -> dict[str, int]:
    """Read the closing line of pytest: tests by outcome."""
    counts: dict[str, int] = {}
    for number, kind in _COUNT.findall(line):
        kind = "failed" if kind.startswith("error") else kind
        counts[kind] = counts.get(kind, 0) + int(number)
    return counts


class Runner:
    """Collects what is to be run in the test environment, runs it, and says how it went."""

    def __init__(self, python: Path, pytest_options: Sequence[str]) -> None:
        self.python = python
        self.pytest_options = tuple(pytest_options)
        self.jobs: list[Job] = []
        self.outcomes: list[Outcome] = []

    def command(self, name: str, *arguments: str | Path) -> None:
        """Add a Python module that checks the whole tree."""
        self.jobs.append(Job(name, (str(self.python), "-m", *map(str, arguments)), {}, is_pytest=False))

    def pytest(self, name: str, *paths: str, env: dict[str, str] | None = None) -> None:
        """Add the tests in some folders as one process."""
        absent = [path for path in paths if not (ROOT / path).exists()]
        if absent:
            self.outcomes.append(Outcome(name, False, f"not there: {', '.join(absent)}", 0.0))
            return
        options = ["-q", "-ra", "--durations=5", "--timeout=600", *self.pytest_options]
        # Tiny tensors: more threads than one only wait for each other.
        env = {"OMP_NUM_THREADS": "1", **(env or {})}
        command = (str(self.python), "-m", "pytest", *options, *paths)
        self.jobs.append(Job(name, command, env, is_pytest=True))

    def run(self, at_once: int) -> None:
        """Run what has been added since the last call, `at_once` processes at a time, in the order of adding."""
        jobs, self.jobs = self.jobs, []
        with ThreadPoolExecutor(at_once) as pool:
            self.outcomes += pool.map(lambda job: job.run(live=at_once == 1), jobs)

    def summary(self) -> int:
        """Print a line per part and the sum of all tests; return the exit status."""
        print("\n===== summary " + "=" * 64)
        for outcome in self.outcomes:
            verdict = "ok    " if outcome.passed else "FAILED"
            print(f"  {verdict} {outcome.name:22} {outcome.seconds:6.0f} s  {outcome.line}")
        kinds = ("passed", "failed", "skipped")
        passed, failed, skipped = (sum(outcome.counts.get(kind, 0) for outcome in self.outcomes) for kind in kinds)
        # A part can fail without a failed test (ruff, a crash): it counts as one.
        failed += sum(not outcome.passed and not outcome.counts.get("failed") for outcome in self.outcomes)
        print(f"\n{passed} passed, {failed} failed, {skipped} skipped", flush=True)
        return 1 if failed else 0


def host_environment(host: hosts.Host) -> dict[str, str]:
    """Environment of a process that imports ComfyUI itself."""
    return {"COMFYUI_PATH": str(host.tree), "PYTHONPATH": str(host.frontend)}


def main(arguments: list[str]) -> int:
    """Run the named parts, or all."""
    split = arguments.index("--") if "--" in arguments else len(arguments)
    parts, pytest_options = arguments[:split] or list(PARTS), arguments[split + 1 :]
    unknown = [part for part in parts if part not in (*PARTS, "format")]
    if unknown:
        raise ToolError(f"unknown part {unknown[0]!r}: {', '.join(PARTS)}, format")

    started = time.monotonic()
    python = environment.ensure("test")
    # pyright reads ComfyUI's types in the newest host, the other parts run in it.
    needed = hosts.VERSIONS if {"host", "editor"} & set(parts) else (hosts.NEWEST,) if "types" in parts else ()
    available = [hosts.ensure(version, python) for version in needed]
    runner = Runner(python, pytest_options)

    at_once = int(os.environ.get("CLEARSR_TEST_JOBS") or min(2, os.cpu_count() or 1))

    if "format" in parts:
        runner.command("ruff format", "ruff", "format", ".")
        runner.run(1)
    if "ruff" in parts:
        runner.command("ruff", "ruff", "check", ".")
    if "core" in parts:
        # Whatever lies beside the folders, so that a new file cannot be forgotten here.
        alone = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").glob("test_*.py"))
        runner.pytest("documents and layers", *alone)
        runner.pytest("training", "tests/training")  # by far the longest: the others run beside it
        runner.pytest("core", "tests/core")
        runner.pytest("parity", "tests/parity")
    if "types" in parts:
        runner.command("pyright", "pyright", "--pythonpath", python)
    if "host" in parts:
        for host in available:
            runner.pytest(f"host {host.version}", "tests/host", env=host_environment(host))
    runner.run(min(at_once, max(1, len(runner.jobs))))
    if "editor" in parts:
        browser.ensure_playwright()
        # Nobody asked for fewer tests: a missing host is a failure here, not a skip.
        runner.pytest("workflows and editor", "tests/workflows", "tests/browser", env={"CLEARSR_REQUIRE_HOSTS": "1"})
        runner.run(1)  # alone: a browser is watched while it waits
    status = runner.summary()
    say(f"all parts took {time.monotonic() - started:.0f} s")
    return status


if __name__ == "__main__":
    sys.stdout.flush()
    run_command(main)
