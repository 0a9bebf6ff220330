"""As much of a WebSocket client as Chromium's debugging protocol needs: one JSON message each way."""

from __future__ import annotations

import base64
import json
import os
import socket
import struct
from typing import Any
from urllib.parse import urlsplit


class Browser:
    """One tab of a browser that takes commands: `call("Page.navigate", url=…)`."""

    def __init__(self, address: str):
        parts = urlsplit(address)
        self.socket = socket.create_connection((parts.hostname, parts.port), timeout=120)
        self.reader = self.socket.makefile("rb")
        self.socket.sendall((f"GET {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\nUpgrade: websocket\r\n"
                             f"Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
                             f"Sec-WebSocket-Key: {base64.b64encode(os.urandom(16)).decode()}\r\n\r\n").encode())
        if b" 101 " not in self.reader.readline():
            raise OSError("the browser refuses the connection")
        while self.reader.readline().strip():
            pass
        self.last, self.events = 0, []  # type: int, list[dict[str, Any]]

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """What the browser answers."""
        self.last += 1
        self._send(json.dumps({"id": self.last, "method": method, "params": parameters}).encode())
        while True:
            message = self._receive()
            if message.get("id") == self.last:
                if "error" in message:
                    raise OSError(f"{method}: {message['error']}")
                return message["result"]
            self.events.append(message)

    def wait(self, event: str) -> None:
        """Until an event comes, or at once where it came since the last wait."""
        while not any(e.get("method") == event for e in self.events):
            self.events.append(self._receive())
        self.events.clear()

    def _send(self, data: bytes) -> None:
        """One masked text frame."""
        mask = os.urandom(4)
        size = bytes([0x80 | len(data)]) if len(data) < 126 else bytes([0x80 | 126]) + struct.pack(
            ">H", len(data)) if len(data) < 1 << 16 else bytes([0x80 | 127]) + struct.pack(">Q", len(data))
        self.socket.sendall(b"\x81" + size + mask + bytes(b ^ mask[i % 4] for i, b in enumerate(data)))

    def _receive(self) -> dict[str, Any]:
        """The next whole message."""
        data = b""
        while True:
            first, second = self.reader.read(2)
            count = second & 0x7F
            if count == 126:
                (count,) = struct.unpack(">H", self.reader.read(2))
            elif count == 127:
                (count,) = struct.unpack(">Q", self.reader.read(8))
            part = self.reader.read(count)
            if first & 0x0F == 8:
                raise OSError("the browser closed the connection")
            if first & 0x0F in (0, 1):
                data += part
                if first & 0x80:
                    return json.loads(data)
