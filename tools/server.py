"""A private ComfyUI with the pack in it, and a client for its HTTP and websocket API.

The server gets its own base directory (`custom_nodes`, `input`, `output`, `user`), so neither a test host nor a ComfyUI
that the user owns is written to.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .environment import ROOT
from .hosts import Host, must_run_on_cpu
from .terminal import ProgressBar, ToolError, say
from .websocket import WebSocket

PACK_FOLDER = "ComfyUI-ClearSR"
LOCALHOST = "127.0.0.1"
START_SECONDS = 240
STOP_SECONDS = 10
_FINAL_EVENTS = {"execution_success", "execution_error", "execution_interrupted"}
# A fresh ComfyUI opens its template browser over the canvas and tells its news; a test and a demo want the canvas.
_QUIET_SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.InstalledVersion": "1.0.0",
    "Comfy.Release.Status": "skipped",
}

Prompt = dict[str, dict[str, Any]]


def link_folder(target: Path, link: Path) -> None:
    """Make `link` show `target`: a symbolic link, or on Windows a junction, which needs no privilege."""
    if link.is_symlink() or link.exists():
        return
    if sys.platform == "win32":
        import _winapi

        _winapi.CreateJunction(str(target), str(link))
    else:
        link.symlink_to(target, target_is_directory=True)


def link_file(target: Path, folder: Path) -> None:
    """Let `folder` show `target` under its name, and nothing of the folder that `target` lies in."""
    if folder.is_symlink():
        folder.unlink()
    elif folder.resolve() != folder.parent.resolve() / folder.name:
        folder.rmdir()  # a junction of Windows: it goes, what it shows stays
    folder.mkdir(parents=True, exist_ok=True)
    link = folder / target.name
    link.unlink(missing_ok=True)
    try:
        link.symlink_to(target)
    except OSError:  # Windows gives the privilege to few
        shutil.copyfile(target, link)


def free_port() -> int:
    """Ask the system for a port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind((LOCALHOST, 0))
        return int(probe.getsockname()[1])


@dataclass
class Run:
    """What became of one prompt: outputs by node id, every event with the second it came at, seconds in all."""

    outputs: dict[str, dict[str, Any]]
    events: list[tuple[float, str, dict[str, Any]]] = field(default_factory=list)
    seconds: float = 0.0


class RefusedError(ToolError):
    """ComfyUI answered a request with an error; `body` is what it said."""

    def __init__(self, path: str, code: int, body: bytes) -> None:
        super().__init__(f"ComfyUI answered {path} with error {code}: {body.decode(errors='replace')[:500]}")
        self.body = body


class Client:
    """Talks to a running ComfyUI as the editor does."""

    def __init__(self, port: int, host: str = LOCALHOST) -> None:
        self.host, self.port = host, port
        self.url = f"http://{host}:{port}"

    def request(self, path: str, body: bytes | None = None, content_type: str = "application/json") -> bytes:
        """GET a path, or POST a body to it.

        Raises:
            RefusedError: the server answered with an error.
        """
        request = urllib.request.Request(self.url + path, data=body, headers={"Content-Type": content_type})
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.read()
        except urllib.error.HTTPError as error:
            raise RefusedError(path, error.code, error.read()) from None

    def json(self, path: str, value: object = None) -> Any:  # noqa: ANN401 - whatever the server says
        """GET a path, or POST a value as JSON to it, and read the answer as JSON."""
        return json.loads(self.request(path, None if value is None else json.dumps(value).encode()))

    def upload(self, image: Path, name: str | None = None) -> str:
        """Put a picture into the server's input folder; return the name that Load Image knows it by."""
        boundary = secrets.token_hex(16)
        head = (
            f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="{name or image.name}"\r\n'
            "Content-Type: application/octet-stream\r\n\r\n"
        )
        overwrite = (
            f'\r\n--{boundary}\r\nContent-Disposition: form-data; name="overwrite"\r\n\r\ntrue\r\n--{boundary}--\r\n'
        )
        body = head.encode() + image.read_bytes() + overwrite.encode()
        answer = json.loads(self.request("/upload/image", body, f"multipart/form-data; boundary={boundary}"))
        return answer["name"]

    def download(self, picture: dict[str, str], target: Path) -> Path:
        """Save a picture that an output node named."""
        query = urllib.parse.urlencode({key: picture[key] for key in ("filename", "subfolder", "type")})
        target.write_bytes(self.request(f"/view?{query}"))
        return target

    def run(self, prompt: Prompt, *, show: bool = False, silence_seconds: float = 600) -> Run:
        """Run an API-format prompt to its end.

        Args:
            prompt: nodes by id, as the editor's "Export (API)" writes them.
            show: print which node runs, its steps and its time.
            silence_seconds: give up when the server says nothing for this long.
        """
        client_id = secrets.token_hex(16)
        started = time.monotonic()
        with WebSocket(self.host, self.port, f"/ws?clientId={client_id}", silence_seconds) as messages:
            prompt_id = self._queue(prompt, client_id)
            reporter = _Reporter(prompt) if show else None
            run = Run(outputs={})
            for message in messages:
                if isinstance(message, bytes):
                    continue  # a live preview
                event = json.loads(message)
                kind, data = event["type"], event.get("data") or {}
                if data.get("prompt_id") not in (None, prompt_id):
                    continue
                run.events.append((time.monotonic() - started, kind, data))
                if reporter is not None:
                    reporter.event(kind, data)
                if kind in _FINAL_EVENTS:
                    break
            if reporter is not None:
                reporter.finish()
        run.seconds = time.monotonic() - started
        kind, data = (run.events[-1][1:]) if run.events else ("", {})
        if kind != "execution_success":
            raise ToolError(_failure_text(kind, data))
        run.outputs = self._history(prompt_id)["outputs"]
        return run

    def _queue(self, prompt: Prompt, client_id: str) -> str:
        try:
            return self.json("/prompt", {"prompt": prompt, "client_id": client_id})["prompt_id"]
        except RefusedError as error:
            raise ToolError(_refusal_text(prompt, error.body)) from None

    def _history(self, prompt_id: str) -> dict[str, Any]:
        """Read the record of a finished prompt, which the server writes a moment after its last event."""
        for _ in range(200):
            record = self.json(f"/history/{prompt_id}").get(prompt_id)
            if record:
                return record
            time.sleep(0.05)
        raise ToolError("ComfyUI finished the workflow but keeps no record of it.")


def _refusal_text(prompt: Prompt, body: bytes) -> str:
    """Say which input of which node ComfyUI refused."""
    try:
        answer = json.loads(body)
    except ValueError:
        return f"ComfyUI refused the workflow: {body[:500].decode(errors='replace')}"
    lines = [f"ComfyUI refused the workflow: {answer.get('error', {}).get('message', answer)}"]
    for node_id, problem in (answer.get("node_errors") or {}).items():
        title = prompt.get(node_id, {}).get("class_type", "?")
        lines += [f"  {title} ({node_id}): {error['message']}: {error['details']}" for error in problem["errors"]]
    return "\n".join(lines)


def _failure_text(kind: str, data: dict[str, Any]) -> str:
    """Say which node failed and with what."""
    if kind == "execution_error":
        lines = [line for text in data.get("traceback") or [] for line in text.splitlines() if line.strip(" ^~")]
        where = "\n".join(lines[-6:])
        return f"{data.get('node_type')} ({data.get('node_id')}): {data.get('exception_message', '').strip()}\n{where}"
    if kind == "execution_interrupted":
        return f"the run was interrupted at {data.get('node_type')} ({data.get('node_id')})"
    return "the connection to ComfyUI closed before the workflow ended"


class _Reporter:
    """Prints a run as it goes: a line per node with its time, a bar while it counts steps."""

    def __init__(self, prompt: Prompt) -> None:
        self._prompt = prompt
        self._node: str | None = None
        self._started = time.monotonic()
        self._bar: ProgressBar | None = None

    def event(self, kind: str, data: dict[str, Any]) -> None:
        """Follow one event of the server."""
        if kind == "executing":
            self.finish()
            self._node, self._started = data.get("node"), time.monotonic()
        elif kind == "progress" and data.get("max", 0) > 1:
            self._bar = self._bar or ProgressBar("steps")
            self._bar.update(int(data["value"]), int(data["max"]))

    def finish(self) -> None:
        """Close the line of the node that ran last."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        if self._node is not None:
            node = self._prompt.get(self._node, {})
            title = node.get("_meta", {}).get("title") or node.get("class_type", self._node)
            say(f"  {title}: {time.monotonic() - self._started:.1f} s")
            self._node = None


class Server:
    """One ComfyUI process. `base` keeps its private folders; the log is `base/comfyui.log`.

    `models`: a folder laid out like ComfyUI/models, which is all that this ComfyUI has beside the pack.
    """

    def __init__(
        self, host: Host, base: Path, *, port: int | None = None, listen: str = LOCALHOST, models: Path | None = None
    ) -> None:
        self.host, self.base, self.listen, self.models = host, base, listen, models
        self.port = port or free_port()
        # A server on every address of the machine is reached at its own; 0.0.0.0 is none to open in a browser.
        first = listen.partition(",")[0]
        self.client = Client(self.port, LOCALHOST if first in ("0.0.0.0", "::") else first)
        self.log = base / "comfyui.log"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def prepare(self) -> None:
        """Lay out the base directory: the pack linked in, the settings of somebody who has used the editor before."""
        for folder in ("custom_nodes", "input", "output", "temp", "user/default"):
            (self.base / folder).mkdir(parents=True, exist_ok=True)
        link_folder(ROOT, self.base / "custom_nodes" / PACK_FOLDER)
        for folder in self.models.iterdir() if self.models is not None else ():
            if folder.is_dir():
                (self.base / "models").mkdir(exist_ok=True)
                link_folder(folder.resolve(), self.base / "models" / folder.name)
        own_checkpoint = os.environ.get("CLEARSR_CHECKPOINT")  # a ClearSR file beside the shipped one
        if own_checkpoint:
            # The file alone: its folder may hold `base`, and ComfyUI would follow the link round for ever.
            link_file(Path(own_checkpoint).resolve(), self.base / "models" / "clearsr")
        settings = self.base / "user" / "default" / "comfy.settings.json"
        if not settings.exists():
            settings.write_text(json.dumps(_QUIET_SETTINGS), encoding="utf-8")

    def command(self, arguments: tuple[str, ...] = ()) -> list[str]:
        """The command line that starts ComfyUI; `arguments` are ComfyUI's own options, and the last word is theirs."""
        command = [str(self.host.python), "main.py", "--listen", self.listen, "--port", str(self.port)]
        command += ["--base-directory", str(self.base), "--database-url", "sqlite:///:memory:"]
        command += ["--disable-api-nodes", "--disable-auto-launch"]
        if "--cpu" not in arguments and must_run_on_cpu(self.host):
            command.append("--cpu")
        if self.host.frontend is not None:
            # On a CPU, torch's attention took less processor time than ComfyUI's own choice, most of all for handing
            # out memory; a user's own ComfyUI chooses itself.
            command.append("--use-pytorch-cross-attention")
        return [*command, *arguments]

    def start(self, arguments: tuple[str, ...] = ()) -> float:
        """Start ComfyUI and wait until it answers. Returns the seconds it took."""
        with socket.socket() as probe:
            if probe.connect_ex((LOCALHOST, self.port)) == 0:
                raise ToolError(f"port {self.port} is taken: stop what listens there, or choose another port")
        self.prepare()
        command = self.command(arguments)
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1"}
        if self.host.frontend is not None:
            environment["PYTHONPATH"] = str(self.host.frontend)
        started = time.monotonic()
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                command, cwd=self.host.tree, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        try:
            self._wait_until_ready(started)
        except BaseException:
            self.stop()
            raise
        return time.monotonic() - started

    def _wait_until_ready(self, started: float) -> None:
        while time.monotonic() - started < START_SECONDS:
            if self._process is None or self._process.poll() is not None:
                raise ToolError(f"ComfyUI {self.host.version} did not start:\n{self.log_tail()}")
            with contextlib.suppress(OSError):
                self.client.request("/system_stats")
                return
            time.sleep(0.25)
        raise ToolError(f"ComfyUI {self.host.version} was not ready after {START_SECONDS} s:\n{self.log_tail()}")

    def peak_memory(self) -> int | None:
        """Return the most memory that the process has held so far, in bytes (Linux: VmHWM); None where nobody says."""
        if self._process is None:
            return None
        try:
            status = Path(f"/proc/{self._process.pid}/status").read_text(encoding="ascii", errors="replace")
        except OSError:
            return None
        found = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
        return int(found.group(1)) * 1024 if found else None

    def log_tail(self, lines: int = 30) -> str:
        """Return the end of the server's log."""
        text = self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""
        return "\n".join(text.splitlines()[-lines:])

    def wait(self) -> int:
        """Wait until ComfyUI ends by itself."""
        return self._process.wait() if self._process is not None else 0

    def stop(self) -> None:
        """End ComfyUI, politely at first."""
        process, self._process = self._process, None
        if process is None or process.poll() is not None:
            return
        process.terminate()
        try:
            process.wait(timeout=STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextlib.contextmanager
def running(host: Host, base: Path, arguments: tuple[str, ...] = (), *, models: Path | None = None) -> Iterator[Server]:
    """Start a ComfyUI in an empty base directory, hand it over, stop it; arguments as of `Server`."""
    if base.exists():
        remove_links(base)
        shutil.rmtree(base)
    server = Server(host, base, models=models)
    try:
        server.start(arguments)
        yield server
    finally:
        server.stop()


def remove_links(base: Path) -> None:
    """Take the links out of a base directory before the directory is deleted: the links, never what they show."""
    for link in (base / "custom_nodes" / PACK_FOLDER, *(base / "models").glob("*")):
        if link.is_symlink():
            link.unlink()
        elif link.is_dir():
            with contextlib.suppress(OSError):  # a folder of its own, which may go with the base directory
                os.rmdir(link)  # a Windows junction: rmdir removes the junction alone
