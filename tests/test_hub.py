"""Hub ids, against a small hub on this machine: nothing leaves it."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest

from fewbits.errors import FewbitsError
from fewbits.hub import choose, locate

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAMES = ["README.md", "Model-Q4_K_M.gguf", "Model-Q4_K_S.gguf", "Model-IQ4_XS.gguf", "mmproj-F16.gguf",
         "Model-F16.gguf", "Model.imatrix.gguf", "Q8_0/Model-Q8_0-00001-of-00002.gguf",
         "Q8_0/Model-Q8_0-00002-of-00002.gguf"]
LOCATE = """
import json, sys
from fewbits import FewbitsError, hub
try:
    print(json.dumps([str(hub.locate(sys.argv[1], *json.loads(sys.argv[2]))), ""]))
except FewbitsError as error:
    print(json.dumps([str(error), error.hint]))
"""


# which file a tag means -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("tag", "files"), [
    ("Q4_K_M", ["Model-Q4_K_M.gguf"]), ("q4_k_s", ["Model-Q4_K_S.gguf"]), ("IQ4_XS", ["Model-IQ4_XS.gguf"]),
    ("F16", ["Model-F16.gguf"]), ("Q8_0", NAMES[-2:]), ("Model-F16.gguf", ["Model-F16.gguf"]),
    ("Q8_0/Model-Q8_0.gguf", NAMES[-2:]), ("Q8_0/Model-Q8_0-00002-of-00002.gguf", NAMES[-2:]),
    ("mmproj-F16.gguf", ["mmproj-F16.gguf"])])
def test_tags(tag, files):
    assert choose("org/name", tag, NAMES) == files


@pytest.mark.parametrize(("tag", "files", "message", "hint"), [
    ("Q4_K", NAMES, "no GGUF files are 'Q4_K'", "org/name:Model-Q4_K_M.gguf, org/name:Model-Q4_K_S.gguf"),
    ("XS", ["a-XS.gguf", "b-XS.gguf"], "2 GGUF files are 'XS'", "name one: org/name:a-XS.gguf, org/name:b-XS.gguf"),
    ("other.gguf", NAMES, "no GGUF files are 'other.gguf'", "org/name:Model-F16.gguf"),
    ("Q4_0", ["model.safetensors"], "holds no GGUF files", "leave out :Q4_0"),
    ("Q8_0", NAMES[:-1], "Model-Q8_0.gguf has 1 of 2 parts there", None),
    ("Q1", [f"m{i:03}.gguf" for i in range(40)], "no GGUF files are 'Q1'", "m029.gguf and 10 more")])
def test_tags_that_leave_a_choice_open(tag, files, message, hint):
    with pytest.raises(FewbitsError) as error:
        choose("org/name", tag, files)
    assert message in str(error.value) and (hint is None or hint in error.value.hint)


def test_paths_go_before_ids(tmp_path, monkeypatch):
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert locate("org/name") == Path("org/name")
    for wrong in ("nothing", "./a/b", "a/b/c:Q4_0", "/no/such"):
        with pytest.raises(FewbitsError, match="no such file or directory"):
            locate(wrong)


# downloads ------------------------------------------------------------------------------------------------------------
class Hub(BaseHTTPRequestHandler):
    """The four answers of the hub that downloads need."""

    files: dict[str, dict[str, bytes]]
    seen: list[tuple[str, str, str | None]]
    stall: int  # bytes of the first answer after which nothing more comes; 0: all come

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = unquote(self.path.split("?")[0])
        self.seen.append((self.command, path, self.headers.get("Range")))
        for name, files in self.files.items():
            if path.startswith(f"/api/models/{name}"):
                described = {"id": name, "sha": COMMIT, "siblings": [{"rfilename": f} for f in files]}
                tree = [{"type": "file", "path": f, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                        for f, data in files.items()]
                return self.send(200, json.dumps(tree if "/tree/" in path else described).encode(), body)
            for file, data in files.items():
                if path == f"/{name}/resolve/{COMMIT}/{file}" or path == f"/{name}/resolve/main/{file}":
                    return self.send(200, data, body, hashlib.sha256(data).hexdigest())
        return self.send(404, b"{}", body, error="RepoNotFound")

    def send(self, status: int, data: bytes, body: bool, etag: str | None = None, error: str | None = None) -> None:
        wanted = self.headers.get("Range")
        if wanted and etag:
            begin, _, end = wanted.removeprefix("bytes=").partition("-")
            total, data, status = len(data), data[int(begin):int(end) + 1 if end else None], 206
        self.send_response(status)
        if status == 206:
            self.send_header("Content-Range", f"bytes {begin}-{int(begin) + len(data) - 1}/{total}")
        for key, value in (("ETag", etag and f'"{etag}"'), ("X-Repo-Commit", COMMIT), ("X-Error-Code", error)):
            if value:
                self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body and self.stall and etag:
            self.wfile.write(data[:self.stall])
            type(self).stall = 0
            self.rfile.read(1)  # until the client is gone
        elif body:
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path):
    """`hub({"org/name": {file: bytes}})` -> a `locate` that asks this hub, and what was asked of it."""
    server = None

    def serve(files: dict[str, dict[str, bytes]], stall: int = 0):
        nonlocal server
        handler = type("Served", (Hub,), {"files": files, "seen": [], "stall": stall})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        environment = os.environ | {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "NO_PROXY": "127.0.0.1",
                                    "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
        for key in ("HF_HUB_OFFLINE", "HF_HUB_CACHE", "HF_TOKEN", "http_proxy", "HTTP_PROXY"):
            environment.pop(key, None)

        def ask(name: str, *more: object, wait: bool = True, **changes: str):
            running = subprocess.Popen([sys.executable, "-c", LOCATE, name, json.dumps(more)], text=True,
                                       stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment | changes)
            if not wait:
                return running
            out, err = running.communicate()
            assert running.returncode == 0, err[-2000:]
            return json.loads(out)
        return ask, handler.seen

    yield serve
    if server:
        server.shutdown()


def test_one_file_of_a_repository(hub):
    ask, seen = hub({"org/name": {name: name.encode() * 1000 for name in NAMES}})
    path, _ = ask("org/name:q4_k_m")
    assert Path(path).name == "Model-Q4_K_M.gguf" and Path(path).read_bytes() == b"Model-Q4_K_M.gguf" * 1000
    path, _ = ask("org/name:Q8_0")
    assert Path(path).name.startswith("Model-Q8_0-00001") and Path(path).with_name(Path(NAMES[-1]).name).exists()
    fetched = {path.rpartition("/")[2] for method, path, _ in seen if method == "GET" and "/resolve/" in path}
    assert fetched == {"Model-Q4_K_M.gguf", "Model-Q8_0-00001-of-00002.gguf", "Model-Q8_0-00002-of-00002.gguf"}
    seen.clear()
    again, _ = ask("org/name:Q4_K_M", HF_HUB_OFFLINE="1")
    assert Path(again).name == "Model-Q4_K_M.gguf" and not seen, "what is here needs no network"
    message, hint = ask("org/name")
    assert message == "org/name: holds 5 GGUF models and no safetensors" and "org/name:Model-IQ4_XS.gguf" in hint


def test_a_killed_download_resumes(hub, tmp_path):
    data = bytes(range(256)) * 100_000
    ask, seen = hub({"org/name": {"m-Q4_0.gguf": data}}, stall=22_000_000)
    running = ask("org/name:Q4_0", wait=False)
    partial, deadline = None, time.monotonic() + 60
    while not (partial and partial.stat().st_size >= 20_000_000) and time.monotonic() < deadline:
        partial = next((tmp_path / "home").rglob("*.partial"), None)
        time.sleep(0.02)
    running.kill()
    running.communicate()
    have = partial.stat().st_size
    assert 20_000_000 <= have < len(data) and partial.read_bytes() == data[:have]
    path, _ = ask("org/name:Q4_0")
    assert Path(path).read_bytes() == data and not partial.exists()
    ranges = [r for method, p, r in seen if method == "GET" and "/resolve/" in p]
    assert ranges == [None, f"bytes={have}-"]


def test_other_bytes_than_the_hub_says_are_refused(hub, tmp_path):
    data = bytes(range(256)) * 4096
    ask, _ = hub({"org/name": {"m-Q4_0.gguf": data}})
    blobs = tmp_path / "home" / "hub" / "models--org--name" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / f"{hashlib.sha256(data).hexdigest()}.partial").write_bytes(bytes(700_000))
    message, hint = ask("org/name:Q4_0")
    assert "m-Q4_0.gguf: arrived with another checksum" in message and hint == "try again"
    assert not list(blobs.glob("*.partial"))
    path, _ = ask("org/name:Q4_0")
    assert Path(path).read_bytes() == data


def test_directories_and_lone_files(hub):
    config, weights = b'{"model_type": "llama"}', b"weights"
    ask, seen = hub({"org/dense": {"config.json": config, "model.safetensors": weights, "big.bin": b"no",
                                   "modeling_own.py": b"x = 1"},
                     "org/lone": {"only-Q4_0.gguf": b"GGUF", "mmproj.gguf": b"GGUF"}})
    path, _ = ask("org/dense", False)
    assert not (Path(path) / "model.safetensors").exists() and (Path(path) / "config.json").read_bytes() == config
    path, _ = ask("org/dense")
    assert (Path(path) / "model.safetensors").read_bytes() == weights and not (Path(path) / "big.bin").exists()
    assert not (Path(path) / "modeling_own.py").exists(), "code is not fetched unasked"
    path, _ = ask("org/dense", True, True)
    assert (Path(path) / "modeling_own.py").read_bytes() == b"x = 1"
    path, _ = ask("org/lone")
    assert Path(path).name == "only-Q4_0.gguf", "one model leaves no choice open"


def test_what_is_not_there(hub):
    ask, _ = hub({"org/name": {"m.gguf": b"x"}})
    for name in ("org/other", "org/other:Q4_0"):
        message, hint = ask(name)
        assert message.startswith("org/other: no such path here, and it could not be downloaded") and "spelling" in hint
    message, _ = ask("org/name:Q4_0", HF_HUB_OFFLINE="1")
    assert message.startswith("org/name: no such path here") and "offline" in message.lower()
