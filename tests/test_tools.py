"""The commands around the pack: what they read, say and speak, without a package index and without ComfyUI."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tools import demo, environment, hosts, quality, server, test
from tools.terminal import ToolError
from tools.websocket import WebSocket

ACCEPT = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"


def frame(opcode: int, payload: bytes, last: bool = True) -> bytes:
    """One unmasked frame as a server sends it."""
    head = bytes([(0x80 if last else 0) | opcode])
    if len(payload) < 126:
        return head + bytes([len(payload)]) + payload
    if len(payload) < 65536:
        return head + b"\x7e" + struct.pack("!H", len(payload)) + payload
    return head + b"\x7f" + struct.pack("!Q", len(payload)) + payload


@pytest.fixture
def speak():
    """A websocket server that sends the given bytes to its only client and keeps what it hears."""
    listener = socket.create_server(("127.0.0.1", 0))
    heard = []

    def serve(data: bytes) -> int:
        def run() -> None:
            connection, _ = listener.accept()
            request = b""
            while b"\r\n\r\n" not in request:
                request += connection.recv(4096)
            key = re.search(rb"Sec-WebSocket-Key: (\S+)", request).group(1)
            accept = base64.b64encode(hashlib.sha1(key + ACCEPT.encode()).digest())
            connection.sendall(
                b"HTTP/1.1 101 Switching Protocols\r\nSec-WebSocket-Accept: " + accept + b"\r\n\r\n" + data
            )
            connection.settimeout(2)
            heard.append(connection.recv(4096))
            connection.close()

        threading.Thread(target=run, daemon=True).start()
        return listener.getsockname()[1]

    yield serve, heard
    listener.close()


def test_websocket_reads_texts_previews_long_and_split_messages_and_answers_pings(speak):
    serve, heard = speak
    long, huge = b"x" * 300, b"y" * 70000
    data = frame(1, b'{"type": "status"}') + frame(2, b"\x00\x01") + frame(9, b"ping") + frame(1, long)
    data += frame(1, "ä".encode()[:1], last=False) + frame(0, "ä".encode()[1:]) + frame(2, huge) + frame(8, b"")
    with WebSocket("127.0.0.1", serve(data), "/ws", timeout=5) as messages:
        received = list(messages)
    assert received == ['{"type": "status"}', b"\x00\x01", long.decode(), "ä", huge]
    time.sleep(0.1)
    pong = heard[0]
    assert pong[0] == 0x8A
    assert bytes(byte ^ pong[2 + i % 4] for i, byte in enumerate(pong[6:10])) == b"ping"


def test_websocket_says_so_when_the_server_hangs_up(speak):
    serve, _ = speak
    with (
        WebSocket("127.0.0.1", serve(frame(1, b"whole") + b"\x81\x05ha"), "/ws", timeout=5) as messages,
        pytest.raises(ConnectionError, match="closed"),
    ):
        messages._send(0x9, b"")  # lets the server go on and close
        list(messages)


def test_a_refused_workflow_names_node_and_input():
    body = {
        "error": {"message": "Prompt outputs failed validation"},
        "node_errors": {"3": {"errors": [{"message": "Value not in list", "details": "checkpoint: 'x' not in []"}]}},
    }
    text = server._refusal_text({"3": {"class_type": "ClearSRLoader", "inputs": {}}}, json.dumps(body).encode())
    assert "ClearSRLoader (3): Value not in list: checkpoint: 'x' not in []" in text


def test_a_failed_node_is_named_with_its_message():
    data = {"node_id": "4", "node_type": "ClearSRLoader", "exception_message": "no base", "traceback": ["line\n"]}
    assert server._failure_text("execution_error", data).startswith("ClearSRLoader (4): no base")


def test_the_environment_is_stale_as_soon_as_a_pin_changes(tmp_path, monkeypatch):
    constraints = tmp_path / "constraints.txt"
    constraints.write_text("numpy==1\n")
    monkeypatch.setattr(environment, "CONSTRAINTS", constraints)
    before = environment.fingerprint("demo")
    assert environment.fingerprint("demo") == before
    assert environment.fingerprint("test") != before
    constraints.write_text("numpy==2\n")
    assert environment.fingerprint("demo") != before


def test_a_complete_environment_costs_no_command(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "VENV", tmp_path)
    python = environment.venv_python(tmp_path)
    python.parent.mkdir(parents=True)
    python.touch()
    monkeypatch.setattr(environment, "venv_python", lambda: python)
    monkeypatch.setattr(environment, "STAMP", tmp_path / "stamp.json")
    monkeypatch.setattr(environment, "_call", lambda *_, **__: pytest.fail("a command was run"))
    (tmp_path / "stamp.json").write_text(json.dumps({"demo": environment.fingerprint("demo")}))
    assert environment.ensure("demo") == python


def test_every_requirement_has_a_pinned_version():
    def name(line: str) -> str:
        return re.split(r"[=<>~#\s]", line, maxsplit=1)[0].lower().replace("_", "-")

    pinned = {name(line) for line in environment.CONSTRAINTS.read_text("utf-8").splitlines() if "==" in line}
    for path in environment.PROFILES["test"]:
        wanted = {name(line) for line in path.read_text("utf-8").splitlines() if line and not line.startswith("#")}
        assert wanted <= pinned, path.name


def test_requirements_pin_the_same_versions_as_the_constraints():
    pins = {}
    for path in (environment.CONSTRAINTS, *environment.PROFILES["test"]):
        for name, version in re.findall(r"^([\w-]+)==([\w.]+)", path.read_text("utf-8"), re.MULTILINE):
            assert pins.setdefault(name.lower(), version) == version, (path.name, name)


def test_a_folder_without_comfyui_is_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    with pytest.raises(ToolError, match="holds no ComfyUI"):
        hosts.chosen()


def test_the_version_of_a_tree_is_read_and_half_a_tree_is_none(tmp_path):
    (tmp_path / "comfyui_version.py").write_text('__version__ = "0.3.75"\n')
    assert hosts.tree_version(tmp_path) is None
    (tmp_path / "main.py").touch()
    assert hosts.tree_version(tmp_path) == "0.3.75"


def test_linking_twice_is_harmless_and_unlinking_keeps_the_pack(tmp_path):
    pack, base = tmp_path / "pack", tmp_path / "base"
    (base / "custom_nodes").mkdir(parents=True)
    pack.mkdir()
    (pack / "kept.txt").touch()
    link = base / "custom_nodes" / server.PACK_FOLDER
    server.link_folder(pack, link)
    server.link_folder(pack, link)
    assert (link / "kept.txt").exists()
    server.remove_links(base)
    assert not link.exists()
    assert (pack / "kept.txt").exists()


def test_a_taken_port_is_refused_before_comfyui_starts(tmp_path):
    host = hosts.Host("0.3.75", tmp_path, tmp_path / "python", None)
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ToolError, match="is taken"):
        server.Server(host, tmp_path / "base", port=taken.getsockname()[1]).start()


@pytest.mark.parametrize("available", [False, True])
def test_a_comfyui_of_ones_own_is_told_to_use_the_cpu_where_torch_sees_nothing_else(tmp_path, monkeypatch, available):
    (tmp_path / "torch.py").write_text(
        f"class cuda:\n    is_available = staticmethod(lambda: {available})\nclass backends:\n    pass\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    own = server.Server(hosts.Host("0.3.75", tmp_path, Path(sys.executable), None), tmp_path / "base")
    assert ("--cpu" in own.command()) is not available
    assert own.command(("--cpu",)).count("--cpu") == 1


def test_a_host_whose_torch_cannot_be_asked_decides_itself(tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text("raise ImportError\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    own = server.Server(hosts.Host("0.3.75", tmp_path, Path(sys.executable), None), tmp_path / "base")
    assert "--cpu" not in own.command()


@pytest.mark.parametrize(
    ("line", "counts"),
    [
        ("== 3 passed, 1 skipped in 0.52s ==", {"passed": 3, "skipped": 1}),
        ("1 failed, 2 passed, 2 errors in 1.00s", {"failed": 3, "passed": 2}),
        ("no tests ran in 0.01s", {}),
    ],
)
def test_the_closing_line_of_pytest_is_counted(line, counts):
    assert test.count(line) == counts


def _script(name: str, text: str) -> test.Job:
    return test.Job(name, (sys.executable, "-c", text), {}, is_pytest=False)


def test_parts_that_run_side_by_side_keep_their_lines_together(capfd):
    runner = test.Runner(Path(sys.executable), ())
    meet = "import time; print('{0} begins', flush=True); time.sleep(0.5); print('{0} ends'); raise SystemExit({1})"
    runner.jobs = [_script("left", meet.format("left", 0)), _script("right", meet.format("right", 3))]
    started = time.monotonic()
    runner.run(2)
    seconds = time.monotonic() - started
    shown = capfd.readouterr().out
    assert "left begins\nleft ends\n" in shown
    assert "right begins\nright ends\n" in shown
    assert [(outcome.name, outcome.passed, outcome.line) for outcome in runner.outcomes] == [
        ("left", True, "left ends"),
        ("right", False, "right ends"),
    ]
    assert sum(outcome.seconds for outcome in runner.outcomes) > seconds  # they did run side by side
    assert runner.summary() == 1


def test_demo_upscales_with_a_file_of_ones_own(tmp_path, monkeypatch):
    """ComfyUI sees the file and nothing of its folder, in which its own files may lie; another file takes its place."""
    monkeypatch.setenv("CLEARSR_CHECKPOINT", "")
    prompt = json.loads(demo.WORKFLOW.read_text(encoding="utf-8"))
    live = server.Server(hosts.Host("0.30.0", tmp_path, Path(sys.executable), None), tmp_path / "out" / "comfyui")
    shown = live.base / "models" / "clearsr"
    for folder, content in ((tmp_path, b"one"), (tmp_path / "other", b"two")):
        folder.mkdir(exist_ok=True)
        mine = folder / "mine.safetensors"
        mine.write_bytes(content)
        demo.choose_checkpoint(prompt, mine)
        assert demo.only_node(prompt, "ClearSRLoader")[1]["checkpoint"] == "mine.safetensors"
        live.prepare()
        assert [path.relative_to(shown) for path in shown.rglob("*")] == [Path("mine.safetensors")]
        assert (shown / "mine.safetensors").read_bytes() == content


def test_a_link_to_the_folder_of_the_checkpoint_goes_and_the_checkpoint_stays(tmp_path):
    mine = tmp_path / "mine.safetensors"
    mine.write_bytes(b"one")
    server.link_folder(tmp_path, tmp_path / "shown")
    server.link_file(mine, tmp_path / "shown")
    assert not mine.is_symlink()
    assert mine.read_bytes() == b"one"
    assert (tmp_path / "shown" / "mine.safetensors").read_bytes() == b"one"


def test_a_checkpoint_is_copied_where_links_are_not_allowed(tmp_path, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise OSError("a required privilege is not held by the client")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    (tmp_path / "mine.safetensors").write_bytes(b"one")
    server.link_file(tmp_path / "mine.safetensors", tmp_path / "shown")
    assert (tmp_path / "shown" / "mine.safetensors").read_bytes() == b"one"


def test_demo_names_a_checkpoint_that_is_not_there(tmp_path):
    with pytest.raises(ToolError, match="no such file"):
        demo.main([f"--checkpoint={tmp_path / 'none.safetensors'}"])


def test_quality_changes_the_widget_that_is_named_and_keeps_its_kind():
    prompt = json.loads(demo.WORKFLOW.read_text(encoding="utf-8"))
    sampler = demo.only_node(prompt, "ClearSRLSAKSampler")[1]
    for setting in ("steps=20", "cfg=2", "strength_rule=over the phase", "start_from_lr=false"):
        quality.change(prompt, setting)
    changed = [sampler[name] for name in ("steps", "cfg", "strength_rule", "start_from_lr")]
    assert changed == [20, 2.0, "over the phase", False]
    assert [type(value) for value in changed] == [int, float, str, bool]
    quality.change(prompt, "ClearSRControlApply.tile_size=512")
    assert demo.only_node(prompt, "ClearSRControlApply")[1]["tile_size"] == 512
    assert demo.only_node(prompt, "ClearSRLREncode")[1]["tile_size"] == 0


def test_quality_tells_what_the_baselines_miss_before_it_samples(tmp_path, monkeypatch):
    for folder in ("hr", "lr"):
        (tmp_path / folder).mkdir()
    (tmp_path / "lr" / "a.png").touch()
    commands = []

    def run(command, **_):
        commands.append(command)
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(quality.subprocess, "run", run)
    monkeypatch.setattr(environment, "ensure", lambda _: Path("python"))
    monkeypatch.setattr(hosts, "ensure", lambda *_: pytest.fail("a host was made ready"))
    folders = [f"--hr={tmp_path}/hr", f"--lr={tmp_path}/lr", f"--out={tmp_path}/out"]
    assert quality.main([*folders, "--baselines=realesrgan"]) == 1
    assert len(commands) == 1
    assert "--methods=realesrgan" in commands[0]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("tile_size=512", "2 widgets"),
        ("guidance=2", "0 widgets.*ClearSRLSAKSampler.cfg"),
        ("ClearSRLSAKSampler.model=2", "0 widgets"),
        ("steps=many", "'many' cannot stand in for 7"),
        ("start_from_lr=maybe", "cannot stand in for True"),
    ],
)
def test_quality_refuses_a_setting_that_means_nothing(setting, message):
    prompt = json.loads(demo.WORKFLOW.read_text(encoding="utf-8"))
    with pytest.raises(ToolError, match=message):
        quality.change(prompt, setting)
