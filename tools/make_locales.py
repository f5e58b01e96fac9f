"""Write locales/en/nodeDefs.json, the English texts of all nodes, from the schema that a live ComfyUI reads.

    python -m tools.make_locales

A translator copies it to locales/<language>/nodeDefs.json and keeps the keys. English itself stays in the
nodes' schema; a test keeps the two the same.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from . import environment, hosts
from .environment import ROOT
from .make_workflows import inputs_of, options_of
from .server import running
from .terminal import run_command, say

TARGET = ROOT / "locales" / "en" / "nodeDefs.json"
PREFIX = "ClearSR"


def definitions(object_info: dict[str, Any]) -> dict[str, Any]:
    """Return the texts of our nodes in the editor's form: names and tooltips of inputs and outputs."""
    texts: dict[str, Any] = {}
    for node_id, info in sorted(object_info.items()):
        if not node_id.startswith(PREFIX):
            continue
        inputs = {
            name: {"name": options_of(spec).get("display_name") or name, "tooltip": options_of(spec).get("tooltip", "")}
            for name, spec in inputs_of(info).items()
        }
        outputs = {
            str(index): {"name": name, "tooltip": tooltip}
            for index, (name, tooltip) in enumerate(zip(info["output_name"], info["output_tooltips"], strict=True))
        }
        texts[node_id] = {
            "display_name": info["display_name"],
            "description": info["description"],
            "inputs": inputs,
            "outputs": outputs,
        }
    return texts


def main(_arguments: list[str]) -> int:
    """Ask the newest ComfyUI and write the file."""
    python = environment.ensure("test")
    host = hosts.ensure(hosts.NEWEST, python)
    with tempfile.TemporaryDirectory() as folder, running(host, Path(folder) / "comfyui") as server:
        texts = definitions(server.client.json("/object_info"))
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    TARGET.write_text(json.dumps(texts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    say(f"wrote {TARGET.relative_to(ROOT).as_posix()}: {len(texts)} nodes")
    return 0


if __name__ == "__main__":
    run_command(main)
