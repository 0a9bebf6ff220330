"""Peers on the same rows as ours: their engines compute the same tokens, and what they cannot read is said."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import fewbits
from fewbits import containers
from fewbits.measure.speed import bench
from fewbits.measure.speed.process import WORKER
from fewbits.runtime import decoder

pytestmark = pytest.mark.peer
PROMPTS = [[5, 9, 60, 17, 8], [44, 3, 3, 250, 9]]
# one engine without a process of its own: tokens with the cache, and of the whole text without it
TOKENS = """
import json, sys
sys.path[0] = sys.argv[1]
from worker.talk import ENGINES
name, model, prompts = sys.argv[2], sys.argv[3], json.loads(sys.argv[4])
job = {"model": model, "kernel": None, "threads": 1}
engine = ENGINES[name](job)
engine.load(job)
out = []
for way in engine.ways:
    engine.take(way)
    engine.make_room(len(prompts), 16)
    rows = [engine.begin(prompts, 16)]
    for _ in range(4):
        rows.append(engine.step(rows[-1]))
    out.append([rows, engine.whole([p + [r[k] for r in rows] for k, p in enumerate(prompts)])])
print(json.dumps(out))
"""


@pytest.fixture(scope="module")
def gguf(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(fewbits.convert(tiny, tmp_path_factory.mktemp("gguf") / "tiny.gguf", "gguf").path)


def meant(model: Path, count: int) -> list[list[int]]:
    """The most likely tokens, by our decoder, a prompt at a time."""
    made, found = decoder.compile(containers.open(model)), []
    for prompt in PROMPTS:
        text = list(prompt)
        for _ in range(count):
            text.append(int(made.logits(text, last_only=True).argmax()))
        found.append(text[len(prompt):])
    return found


@pytest.mark.parametrize(("engine", "environment"), [("llama.cpp", "llama"), ("transformers", "bnb")])
def test_engines_of_peers_take_the_same_tokens(engine: str, environment: str, peer: Callable[[str], str], tiny: Path,
                                               gguf: Path) -> None:
    model = gguf if engine == "llama.cpp" else tiny
    ran = subprocess.run([peer(environment), "-c", TOKENS, str(WORKER.parent), engine, str(model), json.dumps(PROMPTS)],
                         capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    wanted = meant(tiny, 6)
    for rows, after in json.loads(ran.stdout.splitlines()[-1]):
        assert [[row[k] for row in rows] for k in range(2)] == [tokens[:5] for tokens in wanted]
        assert after == [tokens[5] for tokens in wanted]


def test_llama_cpp_beside_ours(peer: Callable[[str], str], tiny: Path, gguf: Path) -> None:
    found = bench([gguf, tiny], prompts=(8,), generate=(20,), batches=(1, 3), cache=(True, False), repeats=2, threads=1,
                  peers={"llama.cpp": peer("llama")})
    for row in found:
        if (row.engine, row.candidate) == ("llama.cpp", "tiny"):
            assert row.reason == "it reads GGUF files only"
        else:
            assert row.reason is None and row.repeats == 2
            assert min(row.prefill_tokens_per_second, row.decode_tokens_per_second, row.anonymous_bytes) > 0
    assert found[1].circumstances["engine_versions"]["llama_cpp_python"]


@pytest.mark.parametrize(("recipe", "engine", "environment"), [
    ("nf4", "bitsandbytes", "bnb"), ("int8", "bitsandbytes", "bnb"), ("int4-g32", "gptqmodel", "gptq")])
def test_layouts_of_peers(recipe: str, engine: str, environment: str, peer: Callable[[str], str],
                          little_llama: Callable[[Path, int], Path], tmp_path: Path) -> None:
    plain = little_llama(tmp_path / "m", 128)
    out = Path(fewbits.quantize(plain, tmp_path / "q", recipe, calibration="none").path)
    found = bench([out, plain], prompts=(8,), generate=(2,), repeats=1, threads=1, peers={engine: peer(environment)})
    ours, theirs, _, wrong = found
    assert ours.reason is None and theirs.reason is None
    assert ours.decode_tokens_per_second > 0 and theirs.decode_tokens_per_second > 0
    assert wrong.reason == "the weights are not quantized"
