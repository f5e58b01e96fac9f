"""What is claimed and what is run, read from the TOML files of this folder: one for each table or figure."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tomllib

from ..config import ConfigError, build

FOLDER = Path(__file__).parent
SHARED = "training"  # training.toml: how the ablations are trained; it is no experiment

Kind = Literal["grid", "steps", "spectra", "ablation", "divergence", "sampling"]
Budget = Literal["full", "tiny"]


@dataclass(frozen=True)
class Check:
    """One claim as a difference: `measure` of `method` minus that of `against` has the sign that the paper printed."""

    text: str
    measure: str
    method: str
    against: str
    sign: Literal["+", "-"]
    paper: str  # the difference that the paper printed, or where it says so
    least: float = 0.0  # the difference is at least so large

    @property
    def direction(self) -> Literal[-1, 1]:
        """Return the sign as a number."""
        return 1 if self.sign == "+" else -1


@dataclass(frozen=True)
class Experiment:
    """One table or figure."""

    name: str
    title: str
    kind: Kind
    order: int  # place in the document
    claim: str  # of the paper, in a sentence with its numbers
    setup: str  # what is run here
    limits: str  # what size and budget allow to say
    hours: float  # estimated, on two CPU cores, with the full budget
    checks: tuple[Check, ...]
    run: dict[str, Any]  # settings of its kind
    tiny: dict[str, Any] = field(default_factory=dict)  # what replaces them in the tests' budget
    paper_table: tuple[tuple[str, ...], ...] = ()  # as printed, the heading first
    published: str = ""  # data set whose published rows are shown

    @property
    def trained(self) -> bool:
        """Say whether models are trained for it."""
        return self.kind in ("ablation", "divergence")

    def settings(self, budget: Budget) -> dict[str, Any]:
        """Return what it is run with."""
        return {**self.run, **(self.tiny if budget == "tiny" else {})}


def _read(name: str) -> dict[str, Any]:
    path = FOLDER / f"{name}.toml"
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error


def names() -> list[str]:
    """Return the names of all experiments, in the order of the document."""
    found = [path.stem for path in FOLDER.glob("*.toml") if path.stem != SHARED]
    return sorted(found, key=lambda name: (_read(name)["order"], name))


def experiment(name: str) -> Experiment:
    """Read one experiment.

    Raises:
        ConfigError: there is none of that name, or its file is wrong.
    """
    if name == SHARED or not (FOLDER / f"{name}.toml").is_file():
        raise ConfigError(f"There is no table or figure {name!r}: {', '.join(names())}.")
    table = _read(name)
    checks = tuple(build(Check, check) for check in table.pop("checks", []))
    rows = tuple(tuple(map(str, row)) for row in table.pop("paper_table", []))
    try:
        found = Experiment(name=name, checks=checks, paper_table=rows, **table)
    except TypeError as error:
        raise ConfigError(f"{name}.toml: {error}") from error
    if not found.checks:
        raise ConfigError(f"{name}.toml has no [[checks]]: nothing could agree or disagree.")
    return found


@dataclass(frozen=True)
class Training:
    """One way in which the variants of an ablation are trained, all at the same budget."""

    settings: dict[str, Any]  # of stage 3
    variants: dict[str, dict[str, Any]]  # name -> what differs


def training(way: str, budget: Budget) -> Training:
    """Read how the variants of an ablation are trained.

    Raises:
        ConfigError: there is no such way.
    """
    table = _read(SHARED)
    if way not in table["ways"]:
        raise ConfigError(f"{SHARED}.toml has no way {way!r}: {', '.join(table['ways'])}.")
    found = table["ways"][way]
    settings = {**found["settings"], **(table["tiny"] if budget == "tiny" else {})}
    return Training(settings, table["variants"])
