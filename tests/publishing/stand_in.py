"""A hub on this machine: what huggingface_hub asks when a model is published, and what it sent."""

from __future__ import annotations

import base64
import hashlib
import json
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import unquote

TOKEN, COMMIT = "hf_secret", "0123456789abcdef0123456789abcdef01234567"
SMALL = 2000  # bytes that go into the commit itself


class Hub(BaseHTTPRequestHandler):
    """Repositories, branches, large files by their SHA-256, commits."""

    address: str
    refused: set[str]  # large files that are not taken, by a part of their bytes' SHA-256 or "all"
    stored: dict[str, bytes]
    repositories: dict[str, dict[str, Any]]
    commits: list[dict[str, bytes]]  # file -> bytes, of each commit
    asked: list[str]

    def do_POST(self) -> None:
        body, path = self.body(), unquote(self.path.partition("?")[0])
        self.asked.append(f"POST {path}")
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.send(401, {"error": "Invalid username or password."})
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            if name.startswith("closed/"):
                return self.send(403, {"error": "You don't have the rights to create a model under closed"})
            self.repositories.setdefault(name, {"private": asked.get("private") or asked.get("visibility") == "private",
                                                "branches": {"main"}})
            return self.send(200, {"url": f"{self.address}/{name}", "name": name, "id": "1"})
        if path == "/api/validate-yaml":
            return self.send(200, {"warnings": [], "errors": []})
        if path.endswith(".git/info/lfs/objects/batch"):
            wanted = json.loads(body)["objects"]
            return self.send(200, {"transfer": "basic", "objects": [self.large(one) for one in wanted]})
        _, _, _, owner, name, action, *rest = path.split("/")
        repository = self.repositories[f"{owner}/{name}"]
        if action == "branch":
            repository["branches"].add(rest[0])
            return self.send(200, {})
        assert rest[0] in repository["branches"], path
        if action == "preupload":
            return self.send(200, {"files": [
                {"path": f["path"], "uploadMode": "lfs" if f["size"] > SMALL else "regular", "shouldIgnore": False}
                for f in json.loads(body)["files"]]})
        assert action == "commit", path
        self.commits.append(dict(self.file(json.loads(line)) for line in body.splitlines()[1:]))
        return self.send(200, {"commitUrl": f"{self.address}/{owner}/{name}/commit/{COMMIT}", "commitOid": COMMIT,
                               "pullRequestUrl": None})

    def do_PUT(self) -> None:
        oid, body = self.path.rpartition("/")[2], self.body()
        self.asked.append(f"PUT {oid}")
        if oid in self.refused or hashlib.sha256(body).hexdigest() != oid:
            return self.send(403, {"error": "no"})
        self.stored[oid] = body
        self.send(200, {})

    def large(self, asked: dict[str, Any]) -> dict[str, Any]:
        if asked["oid"] in self.stored:
            return asked
        return asked | {"actions": {"upload": {"href": f"{self.address}/large/{asked['oid']}", "header": {}}}}

    def file(self, line: dict[str, Any]) -> tuple[str, bytes]:
        value = line["value"]
        if line["key"] == "lfsFile":
            return value["path"], self.stored[value["oid"]]
        assert line["key"] == "file" and value["encoding"] == "base64", line
        return value["path"], base64.b64decode(value["content"])

    def body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def send(self, status: int, found: dict[str, Any]) -> None:
        data = json.dumps(found).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass
