"""Becomes a ComfyUI process with the pack in it, measures, and writes what it found.

    python host_process.py REQUEST.json

One request is one process: `bench/__main__.py` writes it and starts this file in the host's own Python. Nothing of the
pack's root may be importable here, because its `nodes` would hide the host's; the pack's modules, this folder
included, are reached through the package that ComfyUI makes of the pack.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import logging
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]


def load_pack(tree: Path, base: Path, device: str) -> ModuleType:
    """Start what a server starts, without listening, and let it load the pack; return the pack's package."""
    own = {Path(__file__).resolve().parent, ROOT}
    sys.path[:] = [str(tree), *(entry for entry in sys.path if Path(entry or ".").resolve() not in own)]

    # The host's arguments before anything that reads them, its `utils` before its `nodes`.
    from comfy.cli_args import args

    args.cpu, args.base_directory, args.disable_api_nodes = device == "cpu", str(base), True
    args.database_url = "sqlite:///:memory:"
    # As tools/server.py starts it: on a CPU torch's attention is the faster one.
    args.use_pytorch_cross_attention = device == "cpu"
    importlib.import_module("utils.extra_config")
    setattr(importlib.import_module("comfy.utils"), "PROGRESS_BAR_ENABLED", False)  # noqa: B010 - no type knows it
    nodes = importlib.import_module("nodes")
    server = importlib.import_module("server")

    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    server.PromptServer(loop).send_sync = lambda *_message: None
    loop.run_until_complete(nodes.init_public_apis())
    if not loop.run_until_complete(nodes.load_custom_node(str(ROOT))):
        raise SystemExit("ComfyUI could not load the pack; the lines above say why")
    return sys.modules[str(ROOT).replace(".", "_x_")]


def main(request: Path) -> None:
    """Do what the request says and put the result beside it."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("clearsr").setLevel(logging.INFO)
    wanted = json.loads(request.read_text(encoding="utf-8"))
    pack = load_pack(Path(wanted["tree"]), request.parent, wanted["device"])

    def keep(result: dict) -> None:
        # In one step: this process may be ended at any moment.
        partial = request.with_name("result.part")
        partial.write_text(json.dumps(result), encoding="utf-8")
        partial.replace(request.with_name("result.json"))

    if wanted["count"]:
        keep(importlib.import_module(f"{pack.__name__}.bench.counts").run(wanted["size"], wanted["pixels"]))
        return
    measure = importlib.import_module(f"{pack.__name__}.bench.measure")
    measure.run(measure.Request(**{key: wanted[key] for key in measure.Request.__dataclass_fields__}), keep)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
