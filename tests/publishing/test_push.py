"""Publishing, against a small hub on this machine: every byte arrives, once; the card says what the model is."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest

from fewbits.errors import FewbitsError
from fewbits.publishing import push
from fewbits.quantizing import quantize
from tests.publishing.stand_in import COMMIT, TOKEN, Hub

Ask = Callable[..., tuple[int, str, str]]


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[Ask, type[Hub]]]:
    """A `fewbits push` that talks to a hub of the test's own, and that hub."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    address = f"http://127.0.0.1:{server.server_port}"
    server.RequestHandlerClass = kept = type("Kept", (Hub,), {
        "address": address, "refused": set(), "stored": {}, "repositories": {}, "commits": [], "asked": []})
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and k.lower() != "http_proxy"}
    environment |= {"HF_ENDPOINT": address, "NO_PROXY": "127.0.0.1", "HF_HOME": str(tmp_path / "home"),
                    "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}

    def ask(*arguments: object, **changes: str | None) -> tuple[int, str, str]:
        found = {k: v for k, v in (environment | changes).items() if v is not None}
        done = subprocess.run([sys.executable, "-m", "fewbits", "push", *map(str, arguments)], capture_output=True,
                              text=True, env=found)
        return done.returncode, done.stdout, done.stderr

    yield ask, kept
    server.shutdown()


@pytest.fixture(scope="module")
def packed(tiny: Path, english: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    quantize(tiny, folder / "quantized", "nf4", calibration="none", container="fewbits")
    return folder / "quantized"


def sums(folder: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.iterdir()}


def test_every_byte_arrives_with_card_and_checksums(hub, packed: Path) -> None:
    ask, kept = hub
    code, out, err = ask(packed, "org/model", "--base-model", "org/original", "--license", "mit", "--private", "--json")
    assert code == 0, err
    said = json.loads(out)
    assert said["url"].endswith(f"/org/model/commit/{COMMIT}") and said["files"] == sums(packed)
    assert kept.repositories == {"org/model": {"private": True, "branches": {"main"}}}
    (commit,) = kept.commits
    assert commit.keys() == {*sums(packed), "README.md", "SHA256SUMS"}
    for file in packed.iterdir():
        assert commit[file.name] == file.read_bytes()
    listed = dict(reversed(line.split("  ")) for line in commit["SHA256SUMS"].decode().splitlines())
    assert listed == sums(packed)
    card = huggingface_hub.ModelCard(commit["README.md"].decode())
    assert card.data.base_model == "org/original" and card.data.license == "mit"
    assert card.data.to_dict()["base_model_relation"] == "quantized" and "nf4" in card.data.tags


def test_a_branch(hub, packed: Path) -> None:
    ask, kept = hub
    code, out, err = ask(packed, "org/model", "--revision", "nf4")
    assert code == 0 and "3" not in err and COMMIT in out
    assert kept.repositories["org/model"]["branches"] == {"main", "nf4"}
    assert any(path.endswith("/commit/nf4") for path in kept.asked)


def test_what_is_there_is_not_sent_again(hub, packed: Path) -> None:
    ask, kept = hub
    large = {name: oid for name, oid in sums(packed).items() if (packed / name).stat().st_size > 2000}
    weights = large["model.safetensors"]
    kept.refused.add(weights)
    code, out, err = ask(packed, "org/model")
    assert code == 1 and not out and "not published" in err and len(err.splitlines()) == 2
    assert not kept.commits and kept.stored.keys() < set(large.values())
    sent = set(kept.stored)
    kept.refused.clear()
    kept.asked.clear()
    code, _, err = ask(packed, "org/model")
    assert code == 0, err
    put = {path.removeprefix("PUT ") for path in kept.asked if path.startswith("PUT")}
    assert weights in put and not put & sent and len(kept.commits) == 1


@pytest.mark.parametrize("repository, changes, message, hint", [
    ("org/model", {"HF_TOKEN": None}, "no token to write to the hub with", "HF_TOKEN"),
    ("org/model", {"HF_TOKEN": "wrong"}, "not published: ", "does the token allow"),
    ("closed/model", {}, "not published: ", "does the token allow"),
    ("org/model", {"HF_ENDPOINT": "http://127.0.0.1:9"}, "not published: ", "check the network"),
    ("org/model", {"HF_HUB_OFFLINE": "1"}, "not published: ", "check the network"),
    ("model", {}, "no id of the hub", "org/name"), ("a/b/c", {}, "no id of the hub", "org/name"),
])
def test_what_stands_in_the_way(hub, packed: Path, repository: str, changes: dict, message: str, hint: str) -> None:
    ask, kept = hub
    code, out, err = ask(packed, repository, "--base-model", "org/original", **changes)
    error = [line for line in err.splitlines() if not line.startswith("note:")]
    assert code == 1 and not out and not kept.commits, err
    assert len(error) == 2 and message in error[0] and hint in error[1]


# dry runs -------------------------------------------------------------------------------------------------------------
def test_a_dry_run_leaves_card_and_checksums(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "HfApi", None)
    found = push(packed, "org/model", dry_run=True, out=tmp_path / "card")
    assert found.url is None and {f.name for f in (tmp_path / "card").iterdir()} == {"README.md", "SHA256SUMS"}
    text = (tmp_path / "card" / "README.md").read_text()
    bits = f"{json.loads(packed.with_name('quantized.quantization.json').read_text())['bits_per_weight']:.3f}"
    assert f"| bits per weight | {bits}, over all |" in text and "| solver | search |" in text
    assert "fewbits run org/model" in text and "vllm" not in text  # nothing else reads this layout
    assert [("base model" in n, "divergence" in n) for n in found.notes] == [(True, False), (False, True)]
    assert push(packed, "org/model", dry_run=True, out=tmp_path / "card").files == found.files  # once more
    (tmp_path / "card" / "mine.txt").write_text("kept")
    with pytest.raises(FewbitsError, match="exists already"):
        push(packed, "org/model", dry_run=True, out=tmp_path / "card")


def test_divergence_measured_now_given_or_of_a_report(packed: Path, tiny: Path, english: Path, tmp_path: Path) -> None:
    from fewbits.measure import evaluate

    figures = evaluate(packed, tiny, text=english, chunks=1, context=128)
    (tmp_path / "eval.json").write_text(json.dumps(figures.to_json()))
    report = tmp_path / "report"
    report.mkdir()
    (report / "report.json").write_text(json.dumps({"candidates": [
        {"name": "Q8_0", "path": "", "quality": {"kl_mean": 9.0}},
        {"name": "nf4", "path": "", "quality": {"kl_mean": 0.125, "top1": 0.5}}]}))
    (report / "report.md").write_text("# t\n\n| format | size |\n|---|---:|\n| nf4 | 1 |\n")
    (report / "speed.png").write_bytes(b"picture")
    out = tmp_path / "card"
    push(packed, "org/model", measured=tmp_path / "eval.json", dry_run=True, out=out)
    text = (out / "README.md").read_text()
    assert f"| KL divergence, mean | {figures.kl_mean:.4g} ± " in text and "Measured on sample.txt, 127 tokens" in text
    push(packed, "org/model", report=report, dry_run=True, out=out)
    text = (out / "README.md").read_text()
    assert "| KL divergence, mean | 0.125 |" in text and "| same most likely token | 50.00 % |" in text
    assert "| nf4 | 1 |" in text and "![Speed](speed.png)" in text and (out / "speed.png").read_bytes() == b"picture"
    assert "speed.png" in (out / "SHA256SUMS").read_text()
    push(packed, "org/model", against=tiny, text=english, chunks=1, dry_run=True, out=out)
    assert "KL divergence, mean" in (out / "README.md").read_text()


def test_a_gguf_file_and_a_card_of_ones_own(tiny: Path, tmp_path: Path) -> None:
    quantize(tiny, tmp_path / "m-Q8_0.gguf", "Q8_0", calibration="none")
    push(tmp_path / "m-Q8_0.gguf", "org/model", dry_run=True)
    text = (tmp_path / "m-Q8_0.gguf.card" / "README.md").read_text()
    assert "llama-cli -hf org/model -hff m-Q8_0.gguf" in text and "fewbits run org/model:m-Q8_0.gguf" in text
    assert 'gguf_file="m-Q8_0.gguf"' in text and "library_name: gguf" in text
    (tmp_path / "mine.md").write_text("---\nlicense: mit\n---\n\n# Mine\n")
    push(tmp_path / "m-Q8_0.gguf", "org/model", own_card=tmp_path / "mine.md", dry_run=True)
    assert (tmp_path / "m-Q8_0.gguf.card" / "README.md").read_text() == (tmp_path / "mine.md").read_text()


@pytest.mark.parametrize("arguments, message", [
    ({"report": "nothing"}, "no report.json in it"), ({"measured": "nothing.json"}, "nothing.json: No such file"),
    ({"against": "model"}, "--against and --text go together"), ({"text": "text"}, "--against and --text go together")])
def test_what_goes_wrong(packed: Path, tmp_path: Path, arguments: dict, message: str) -> None:
    with pytest.raises(FewbitsError, match=message):
        push(packed, "org/model", dry_run=True, out=tmp_path / "card", **arguments)
    assert not (tmp_path / "card").exists()
