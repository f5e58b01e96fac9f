"""Memory of a step by batch and checkpointing, as a markdown table: `python -m training.memory_table --preset=paper`.

Takes further settings as `training.train` does; weights and data are not needed. One process; GPU memory in GiB.
"""

from __future__ import annotations

import dataclasses
import logging
import sys

from . import command_line, rehearsal
from .clearsr import ClearSRSettings

log = logging.getLogger("clearsr.training")

BATCHES = (1, 2, 4, 8)
CHECKPOINTING = ("none", "encoder", "all")


@command_line.command()
def main(arguments: list[str]) -> int:
    """Print the table row by row; return the exit status."""
    preset, others = command_line.preset(arguments, __doc__, "paper")
    preset.pop("stage", "")
    settings = command_line.settings(ClearSRSettings, others, __doc__, {"out": "runs/table", "base": "random"}, preset)
    log.info("| crops at once | %s | TFLOP of a step |", " | ".join(CHECKPOINTING))
    log.info("|---%s|", "|---" * (len(CHECKPOINTING) + 1))
    for batch in BATCHES:
        found = [
            rehearsal.estimate(dataclasses.replace(settings, batch=batch, accumulation=1, checkpointing=what))
            for what in CHECKPOINTING
        ]
        cells = [f"{estimate.total / 2**30:.1f}" for estimate in found]
        operations = ", ".join(f"{estimate.operations / 1e12:.1f}" for estimate in found)
        log.info("| %d | %s | %s |", batch, " | ".join(cells), operations)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
