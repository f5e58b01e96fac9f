"""Just enough of RFC 6455 to listen to ComfyUI: text and binary messages in, pongs out."""

from __future__ import annotations

import base64
import os
import socket
import struct
from collections.abc import Iterator

_TEXT, _BINARY, _CLOSE, _PING, _PONG = 0x1, 0x2, 0x8, 0x9, 0xA
_MAXIMUM_LINE = 65536


class WebSocket:
    """A client connection. Messages arrive by iterating; silence longer than `timeout` raises TimeoutError."""

    def __init__(self, host: str, port: int, path: str, timeout: float) -> None:
        self._socket = socket.create_connection((host, port), timeout=timeout)
        self._stream = self._socket.makefile("rb")
        key = base64.b64encode(os.urandom(16)).decode()
        request = (
            f"GET {path} HTTP/1.1\r\nHost: {host}:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n"
        )
        self._socket.sendall(request.encode())
        status = self._stream.readline(_MAXIMUM_LINE)
        if b" 101 " not in status:
            raise ConnectionError(f"no websocket at {host}:{port}{path}: {status.decode(errors='replace').strip()}")
        while self._stream.readline(_MAXIMUM_LINE).strip():
            pass  # the rest of the response header

    def __enter__(self) -> WebSocket:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Hang up."""
        self._stream.close()
        self._socket.close()

    def _send(self, opcode: int, payload: bytes) -> None:
        """Send a short control frame; a client's frames must be masked."""
        mask = os.urandom(4)
        masked = bytes(byte ^ mask[i % 4] for i, byte in enumerate(payload))
        self._socket.sendall(struct.pack("!BB", 0x80 | opcode, 0x80 | len(payload)) + mask + masked)

    def _read(self, count: int) -> bytes:
        data = self._stream.read(count)
        if data is None or len(data) < count:
            raise ConnectionError("the server closed the websocket")
        return data

    def _frame(self) -> tuple[bool, int, bytes]:
        """Read one frame: is it the last of its message, what is it, what does it hold."""
        first, second = self._read(2)
        length = second & 0x7F
        if length == 126:
            (length,) = struct.unpack("!H", self._read(2))
        elif length == 127:
            (length,) = struct.unpack("!Q", self._read(8))
        return bool(first & 0x80), first & 0x0F, self._read(length)

    def __iter__(self) -> Iterator[str | bytes]:
        """Yield messages (text as str, previews as bytes) until the server closes."""
        kind, parts = _TEXT, []
        while True:
            last, opcode, payload = self._frame()
            if opcode == _CLOSE:
                return
            if opcode == _PING:
                self._send(_PONG, payload)
            if opcode >= _CLOSE:
                continue
            if opcode:
                kind, parts = opcode, []
            parts.append(payload)
            if last:
                message = b"".join(parts)
                yield message if kind == _BINARY else message.decode("utf-8")
