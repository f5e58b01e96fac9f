"""Open the ComfyUI editor with the pack in it and leave it running.

python -m tools.serve [--port=8188] [--listen=127.0.0.1] [--comfyui=0.3.75] [ComfyUI options]
"""

from __future__ import annotations

import argparse
import shutil

from . import demo, hosts
from .environment import ROOT
from .server import LOCALHOST, PACK_FOLDER, Server
from .terminal import run_command, say


def main(arguments: list[str]) -> int:
    """Serve until the user stops it; input, output and settings stay in out/editor for the next time."""
    parser = argparse.ArgumentParser(prog="make serve", description="Open the ComfyUI editor with the pack in it.")
    parser.add_argument("--port", type=int, default=8188)
    parser.add_argument("--listen", default=LOCALHOST)
    parser.add_argument("--comfyui", choices=hosts.VERSIONS, help="test host to use (default: your own, or the newest)")
    options, more = parser.parse_known_args(arguments)

    host = hosts.for_demo(options.comfyui)
    server = Server(host, ROOT / "out" / "editor", port=options.port, listen=options.listen)
    server.prepare()
    photograph = demo.sample_photograph(host.python, ROOT / "out")
    shutil.copyfile(photograph, server.base / "input" / "example.png")
    say(f"starting ComfyUI {host.version} with the pack")
    try:
        server.start(tuple(more))
        say(f"open {server.client.url}")
        say(f"the workflows are in the template browser, under {PACK_FOLDER}; Ctrl-C stops")
        return server.wait()
    finally:
        server.stop()


if __name__ == "__main__":
    run_command(main)
