"""The loop: what it says of its work, how it goes on after being killed, what ends it before it begins."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import fewbits
from fewbits import containers, solvers
from fewbits.containers import safetensors
from fewbits.errors import FewbitsError
from fewbits.jobs import job
from fewbits.jobs.store import Store

OPTIONS = {"samples": 4, "length": 64}


@pytest.fixture(scope="module")
def whole(tiny: Path, english: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The result of an unbroken calibrated run."""
    return fewbits.quantize(tiny, tmp_path_factory.mktemp("whole") / "out", "int4-g32", calibration=english, **OPTIONS)


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def beside(out: Path, ending: str) -> Path:
    return out.with_name(out.name + ending)


# what is said ---------------------------------------------------------------------------------------------------------
def test_error_of_a_layer_is_that_of_its_outputs(whole: Any, tiny: Path) -> None:
    """Of the first block's queries, whose inputs no rounding has changed, in float64 from Transformers' own model."""
    log = [json.loads(line) for line in beside(whole.path, ".log.jsonl").read_text().splitlines()]
    assert log[0]["event"] == "begins" and log[-1]["event"] == "ends"
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny).double()
    from fewbits.calibration import sources

    text = Path(__file__).resolve().parents[2] / "examples" / "sample.txt"
    batches = sources.calibration(text, containers.open(tiny), **OPTIONS).batches
    layer = model.model.layers[0]
    seen: list[torch.Tensor] = []
    layer.self_attn.q_proj.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0][0]))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
        x, w = torch.cat(seen), layer.self_attn.q_proj.weight
        q = containers.open(whole.path).entries["model.layers.0.self_attn.q_proj.weight"].load().dequantize().double()
        want = float((x @ (w - q).T).square().sum() / (x @ w.T).square().sum())
    row = next(t for t in whole.tensors if t["name"] == "model.layers.0.self_attn.q_proj.weight")
    assert row["error"] == pytest.approx(want, rel=1e-4) and row["error_of"] == "outputs"


def test_error_without_statistics_is_that_of_the_weights(tiny: Path, tmp_path: Path) -> None:
    result = fewbits.quantize(tiny, tmp_path / "out", "nf4")
    source, got = containers.open(tiny), containers.open(result.path)
    for row in (t for t in result.tensors if t["solver"]):
        w, q = (c.entries[row["name"]].load().dequantize().double() for c in (source, got))
        assert row["error"] == pytest.approx(float((w - q).square().sum() / w.square().sum()), rel=1e-4)
        assert row["error_of"] == "weights"
    assert result.error and result.error[1] == "weights"


def test_summary_and_log_lie_beside_the_output(whole: Any) -> None:
    summary = json.loads(beside(whole.path, ".quantization.json").read_text())
    assert summary == json.loads(json.dumps(whole.to_json()))
    assert summary["calibration"].endswith("4 x 64 tokens, seed 0")
    solved = [t for t in summary["tensors"] if t["solver"]]
    assert len(solved) == 14 and all(t["seconds"] > 0 and t["error"] > 0 for t in solved)
    events = [json.loads(line)["event"] for line in beside(whole.path, ".log.jsonl").read_text().splitlines()]
    assert events.count("tensor") == 14 and events.count("block") == 2
    assert sorted(p.name for p in whole.path.parent.iterdir()) == ["out", "out.log.jsonl", "out.quantization.json"]
    assert containers.open(whole.path).container == "gptq"


def test_progress_rises_to_its_end(tiny: Path, tmp_path: Path, english: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    fewbits.quantize(tiny, tmp_path / "out", "int4-g32", calibration=english, **OPTIONS,
                     progress=lambda *report: seen.append(report))
    steps = [s for s in seen if s[0].startswith("quantizing")]
    assert [s[1] for s in steps] == sorted(s[1] for s in steps)
    assert steps[-1][1] == steps[-1][2] and len({s[2] for s in steps}) == 1
    assert any(s[0].startswith("quantizing: block 2 of 2, error 0.0") for s in steps)


# killed and resumed ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("after", [3, 6, 13])
def test_a_run_that_ends_anywhere_resumes_and_ends_equal(after: int, whole: Any, tiny: Path, tmp_path: Path,
                                                         english: Path) -> None:
    out, folder = tmp_path / "out", tmp_path / ".out.work"

    def stops(what: str, done: int, total: int) -> None:
        if len(list(folder.glob("*.safetensors"))) >= after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fewbits.quantize(tiny, out, "int4-g32", calibration=english, **OPTIONS, progress=stops)
    assert not out.exists() and len(list(folder.glob("*.safetensors"))) == after
    again = fewbits.quantize(tiny, out, "int4-g32", calibration=english, **OPTIONS)
    assert weights(out) == weights(whole.path)
    for mine, other in zip(again.tensors, whole.tensors, strict=True):
        assert {k: v for k, v in mine.items() if k != "seconds"} == {k: v for k, v in other.items() if k != "seconds"}
    events = [json.loads(line)["event"] for line in beside(out, ".log.jsonl").read_text().splitlines()]
    assert events[0] == "begins" and events.count("resumes") == 1 and events.count("tensor") == 14


KILLED = """
import os, signal, sys
from pathlib import Path
import fewbits

def kill(what, done, total):
    if len(list((Path(sys.argv[2]).parent / ".out.work").glob("*.safetensors"))) == 10:
        os.kill(os.getpid(), signal.SIGKILL)

fewbits.quantize(sys.argv[1], sys.argv[2], "int4-g32", calibration=sys.argv[3], samples=4, length=64, progress=kill)
"""


def test_a_killed_process_resumes_and_ends_equal(whole: Any, tiny: Path, tmp_path: Path, english: Path,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    run = subprocess.run([sys.executable, "-c", KILLED, tiny, out, english], env=os.environ | threads, timeout=300)
    assert run.returncode == -signal.SIGKILL and not out.exists()
    solved: list[int] = []
    real = solvers.solve_and_measure
    monkeypatch.setattr(solvers, "solve_and_measure", lambda *a: (solved.append(1), real(*a))[1])
    fewbits.quantize(tiny, out, "int4-g32", calibration=english, **OPTIONS)
    assert weights(out) == weights(whole.path) and len(solved) == 8 - 5


def test_another_job_does_not_take_what_is_stored(tiny: Path, tmp_path: Path, english: Path) -> None:
    """Other text, other solver: what a killed run left is solved again."""
    out, folder = tmp_path / "out", tmp_path / ".out.work"

    def stops(what: str, done: int, total: int) -> None:
        if len(list(folder.glob("*.safetensors"))) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fewbits.quantize(tiny, out, "int4-g32", calibration=english, samples=2, length=64, progress=stops)
    plain = fewbits.quantize(tiny, out, "int4-g32", solver="nearest")
    assert {t["solver"] for t in plain.tensors if t["solver"]} == {"nearest"}
    events = [json.loads(line) for line in beside(out, ".log.jsonl").read_text().splitlines()]
    assert events[0]["event"] == "begins" and events[0]["solved"] == 0


def full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("where", ["store", "output"])
def test_a_full_disk_is_one_line_and_the_same_command_resumes(where: str, whole: Any, tiny: Path, tmp_path: Path,
                                                              english: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, written = tmp_path / "out", []
    real = Store.put

    def put(self: Store, *rest: Any) -> None:
        written.append(1)
        if len(written) > 7:
            full()
        real(self, *rest)

    with monkeypatch.context() as patch:
        if where == "store":
            patch.setattr(Store, "put", put)
        else:
            patch.setattr(safetensors.Writer, "write", full)
        with pytest.raises(FewbitsError, match=r"disk is full; what was solved is kept in .*\.out\.work") as caught:
            fewbits.quantize(tiny, out, "int4-g32", calibration=english, **OPTIONS)
    assert caught.value.hint == "free some space: the same command resumes"
    assert [p.name for p in tmp_path.iterdir()] == [".out.work"]
    fewbits.quantize(tiny, out, "int4-g32", calibration=english, **OPTIONS)
    assert weights(out) == weights(whole.path)


# what does not begin --------------------------------------------------------------------------------------------------
def test_too_little_memory_shows_at_once(tiny: Path, tmp_path: Path, english: Path,
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "free_bytes", lambda device: 1_000_000)
    with pytest.raises(FewbitsError, match=r"block 0 with 256 calibration tokens needs about 0\.00 GB of memory") as e:
        fewbits.quantize(tiny, tmp_path / "out", "int4-g32", calibration=english, **OPTIONS)
    assert "--samples" in (e.value.hint or "")
    assert not list((tmp_path / ".out.work").glob("*.safetensors"))


def test_the_largest_block_is_tried_out_first(tmp_path: Path, tiny: Path, english: Path,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose third block is the largest: experts only there."""
    torch.manual_seed(0)
    config = transformers.Qwen2MoeConfig(
        vocab_size=300, hidden_size=32, intermediate_size=32, moe_intermediate_size=32,
        shared_expert_intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=2,
        num_experts=4, num_experts_per_tok=2, mlp_only_layers=[0, 1], max_position_embeddings=128)
    transformers.Qwen2MoeForCausalLM(config).save_pretrained(tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "model" / name).write_bytes((tiny / name).read_bytes())
    order: list[str] = []
    real = job.Job._weight
    monkeypatch.setattr(job.Job, "_weight", lambda self, name: (order.append(name), real(self, name))[1])
    fewbits.quantize(tmp_path / "model", tmp_path / "out", "int4-g32", calibration=english, samples=2, length=32)
    assert ".layers.2." in order[0] and ".layers.0." in order[1]


def test_out_of_memory_is_one_line(tiny: Path, tmp_path: Path, english: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    monkeypatch.setattr(solvers, "solve_and_measure", fails)
    with pytest.raises(FewbitsError, match="out of memory; what was solved is kept in") as caught:
        fewbits.quantize(tiny, tmp_path / "out", "int4-g32", calibration=english, **OPTIONS)
    assert "the same command resumes" in (caught.value.hint or "")
