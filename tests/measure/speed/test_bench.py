"""Workers that really run, on a tiny model; what is refused before any of them starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

import fewbits
from fewbits.errors import FewbitsError
from fewbits.measure.speed import bench, benching, choosing
from tests.cli.conftest import Run
from tests.cli.conftest import fewbits as fewbits_command  # noqa: F401

FIELDS = {"candidate", "engine", "kernel", "prompt", "generate", "batch", "cache", "train", "reason", "repeats",
          "import_seconds", "load_seconds", "first_token_seconds", "prefill_tokens_per_second",
          "decode_tokens_per_second", "token_seconds_median", "token_seconds_95", "forward_seconds", "backward_seconds",
          "resident_bytes", "anonymous_bytes", "gpu_bytes", "spread", "circumstances"}
LITTLE: dict[str, Any] = {"prompts": (6,), "generate": (3,), "repeats": 2, "threads": 1}


@pytest.fixture(scope="module")
def gguf(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(fewbits.convert(tiny, tmp_path_factory.mktemp("gguf") / "tiny.gguf", "gguf").path)


@pytest.fixture
def broken(tmp_path: Path) -> str:
    """A Python that dies."""
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho it broke >&2\nexit 3\n")
    script.chmod(0o755)
    return str(script)


def test_everything_at_once(tiny: Path, gguf: Path, broken: str) -> None:
    said: list[tuple[str, int, int]] = []
    found = bench([gguf, tiny], **LITTLE, batches=(2, 1), cache=(True, False), peers={"llama.cpp": broken},
                  progress=lambda *what: said.append(what))
    assert [(r.batch, r.cache) for r in found[::4]] == [(1, True), (1, False), (2, True), (2, False)]
    for rows in (found[i:i + 4] for i in range(0, 16, 4)):
        assert [(r.candidate, r.engine) for r in rows] == [
            ("tiny.gguf", "fewbits"), ("tiny.gguf", "llama.cpp"), ("tiny", "fewbits"), ("tiny", "llama.cpp")]
        assert all(r.reason == "its process died (exit code 3): it broke" for r in rows[1::2])
        for row in rows[::2]:
            assert row.reason is None and row.kernel == "decoder" and row.repeats == 2
            assert min(row.prefill_tokens_per_second, row.decode_tokens_per_second, row.load_seconds) > 0
            assert row.token_seconds_median <= row.token_seconds_95
            assert row.resident_bytes > 1 << 20
    told = json.loads(json.dumps(found[0].to_json()))
    assert set(told) == FIELDS
    about = told["circumstances"]
    assert about["models"][0]["name"] == "tiny.gguf" and len(about["models"][0]["sha256"]) == 64
    assert (about["threads"], about["machine"]["threads"], about["seed"]) == (1, 1, 0)
    assert [done for _, done, _ in said] == list(range(48)) and {total for _, _, total in said} == {48}
    assert said[0][0] == "measuring: tiny.gguf, prompt of 6 tokens, 3 after it, batch 1"


def test_modules_and_training(tiny: Path) -> None:
    found = bench(tiny, **LITTLE, kernels=("decoded",), train=True)
    assert [(r.engine, r.kernel, r.train, r.reason) for r in found] == [
        ("fewbits", "decoded", False, None), ("fewbits", "decoded", True, None)]
    generated, trained = found
    assert generated.decode_tokens_per_second > 0 and generated.forward_seconds is None
    assert min(trained.forward_seconds, trained.backward_seconds) > 0 and trained.decode_tokens_per_second is None
    assert generated.load_seconds == trained.load_seconds, "the same process"
    assert set(generated.circumstances["engine_versions"]) == {"torch", "transformers"}


@pytest.mark.parametrize(("options", "why"), [
    ({"prompts": (250,), "generate": (7,)}, "tiny: a prompt of 250 tokens, 7 after it, batch 1 is longer than its "
     "context of 256 tokens"),
    ({"prompts": (0,)}, "prompts: 0 is less than 1"), ({"generate": (-1,)}, "tokens to generate: -1"),
    ({"batches": (0,)}, "batches: 0"), ({"repeats": 0}, "0 repeats"), ({"threads": 0}, "0 threads"),
    ({"kernels": ("fastest",)}, "no kernel is called 'fastest'"), ({"peers": {"vllm": None}}, "no peer is called"),
    ({"peers": {"gptqmodel": None}}, "gptqmodel is not installed here"),
    ({"peers": {"llama.cpp": "/nowhere/python"}}, "llama.cpp: no Python at /nowhere/python")])
def test_refused_before_anything_runs(options: dict[str, Any], why: str, tiny: Path,
                                      monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benching, "Runner", None)
    monkeypatch.setattr(choosing, "find_spec", lambda name: None)
    with pytest.raises(FewbitsError, match=why):
        bench(tiny, **LITTLE | options)


def test_memory_is_looked_at_before_anything_runs(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benching, "Runner", None)
    with pytest.raises(FewbitsError, match=r"tiny \(fewbits\) takes about \d+\.\d GB, \d+\.\d GB are free"):
        bench(tiny, **LITTLE | {"batches": (10**9,)})
    with pytest.raises(FewbitsError, match="no model"):
        bench([])
    with pytest.raises(FewbitsError, match="is there twice"):
        bench([tiny, tiny])


def test_models_that_do_not_fit_together_take_turns(tiny: Path, gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benching, "available_bytes", lambda: 0)
    found = bench([gguf, tiny], **LITTLE)
    assert [(r.candidate, r.reason, r.repeats) for r in found] == [("tiny.gguf", None, 2), ("tiny", None, 2)]


def test_names_tell_files_apart(tiny: Path, gguf: Path, tmp_path: Path) -> None:
    for folder in ("a/m", "b/m", "c/n"):
        (tmp_path / folder).parent.mkdir(exist_ok=True)
        (tmp_path / folder).symlink_to(tiny)
    assert list(choosing.opened([tmp_path / "a/m", tmp_path / "b/m", tmp_path / "c/n"])) == ["a/m", "b/m", "n"]


def test_works_go_from_small_to_large() -> None:
    found = choosing.works((8, 2), (0, 4), (2, 1), (True, False))
    sizes = [w.batch * (w.prompt + w.generate) for w in found]
    assert sizes == sorted(sizes) and len(found) == len(set(found)) == 12  # without tokens after it no cache to leave


def test_models_that_write_no_text(fewbits_command: Run, tmp_path: Path) -> None:  # noqa: F811
    config = transformers.BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                                     intermediate_size=64, max_position_embeddings=32)
    transformers.BertModel(config).save_pretrained(tmp_path)
    code, out, _ = fewbits_command("bench", tmp_path, "--prompt", 4, "--generate", 1, "--repeats", 1)
    assert code == 1 and "fewbits: not measured: BertModel writes no text" in out


def test_the_command(fewbits_command: Run, gguf: Path, tiny: Path, broken: str) -> None:  # noqa: F811
    little = ("--prompt", "6,4", "--generate", "2", "--repeats", 1, "--threads", 1)
    code, out, err = fewbits_command("bench", gguf, tiny, *little, "--peer", f"llama.cpp={broken}")
    assert code == 0, err
    lines = out.splitlines()
    assert lines[0] == "prompt of 4 tokens, 2 after it, batch 1 (1 repetitions)"
    assert lines[1].split()[:2] == ["model", "engine"] and len({len(line) for line in lines[1:4]}) == 1
    assert lines[2].startswith("tiny.gguf  fewbits") and "  1.00  " in lines[2] and lines[3].startswith("tiny ")
    assert lines[4] == "tiny.gguf, llama.cpp: not measured: its process died (exit code 3): it broke"
    assert sum(line.startswith("prompt of") for line in lines) == 2 and "threads: 1" in lines[-1]
    code, out, _ = fewbits_command("bench", gguf, *little, "--json")
    assert code == 0 and [row["prompt"] for row in json.loads(out)["rows"]] == [4, 6]
    code, _, err = fewbits_command("bench", gguf, *little, "--kernel", "decoder", "--kernel", "best")
    assert code == 1 and err.startswith("error: no kernel is called 'best'\nhint: one of: decoder, modules, native,")
    code, _, err = fewbits_command("bench", gguf, "--prompt", "some")
    assert code == 1 and err == "error: --prompt 'some': no number, or several with commas\n" \
                                "hint: for example --prompt 32,512\n"


def test_the_decoder_alone_goes_to_a_device(tiny: Path) -> None:
    found = choosing.candidates(choosing.opened([tiny]), ["decoder", "modules"], {"transformers": None}, device="cuda")
    assert [(c.engines, c.device) for c in found] == [(("decoder",), "cuda"), (("modules",), None),
                                                      (("transformers",), None)]
