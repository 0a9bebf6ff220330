"""`tune` finds the fastest configuration by a clock of the test's own, keeps it, goes on after a stop."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from fewbits import codecs
from fewbits.checkpoint import Checkpoint, Entry
from fewbits.codecs.floats import BF16
from fewbits.errors import FewbitsError
from fewbits.runtime.triton import configs, tuning
from fewbits.runtime.triton.configs import Config
from fewbits.runtime.triton.timing import Timed

CPU = torch.device("cpu")
INT4 = codecs.get("int4-g128")
BEST = {"matvec": Config(32, 1, 4, 2, 4), "tile": Config(128, 32, 2, 8, 2), "decode": Config(64, 1, 1, 8, 3)}


class Made:
    """A machine of known speed, with a kernel that asks for configurations as the real one does."""

    name = "triton"

    def __init__(self):
        self.asked: list[tuple[str, Config]] = []
        self.measured = 0

    def supports(self, q, device):
        return None

    def prepare(self, q, dtype):
        self.weight = q.dequantize()
        return self

    def matmul(self, x, bias):
        rows, (out, columns) = len(x), self.weight.shape
        few = rows == 1
        decoded = not few and rows >= configs.dense(4, 128, out, columns, CPU)
        kernel = "matvec" if few else "decode" if decoded else "tile"
        config = configs.lookup(kernel, 4, 128, 1 if decoded else rows, out, columns, CPU)
        self.asked.append((kernel, config))
        if config.warps == 16:
            raise RuntimeError("out of resources")
        wrong = config.stages == 5  # and this is the fastest of all
        return x.float() @ self.weight.T * (1.5 if wrong else 1)

    def clock(self, rounds, device):
        """Farther from the best in any field: slower. Products of many rows are slower than decoding from 128 on."""
        self.measured += 1
        rounds[0][0]()
        kernel, config = self.asked[-1]
        apart = sum(abs(math.log2(getattr(config, name) / getattr(BEST[kernel], name)))
                    for name in tuning.FIELDS[kernel])
        rows = len(rounds[0][0].args[0])
        seconds = 1e-6 * (1 + apart / 10) * (100 if kernel == "decode" else rows) * (0.1 if config.stages == 5 else 1)
        return [Timed(seconds, True)]


@pytest.fixture
def made(monkeypatch, tmp_path):
    found = Made()
    monkeypatch.setattr(tuning, "choose", lambda q, device, only: found)
    monkeypatch.setattr(tuning, "medians", found.clock)
    monkeypatch.setenv("FEWBITS_CACHE", str(tmp_path / "cache"))
    configs.forget()
    yield found
    configs.forget()


def tuned(**more):
    return tuning.tune([(64, 256)], [INT4], device=CPU, **more)


def test_the_fastest_that_runs_and_is_right_is_found_kept_and_used(made):
    said = []
    found = tuned(progress=lambda what, done, total: said.append((what, done, total)))
    for entry in found.entries:
        for name in tuning.FIELDS[entry.key.kernel]:
            assert getattr(entry.config, name) == getattr(BEST[entry.key.kernel], name), entry
    assert {e.key.kernel for e in found.entries} == set(BEST)
    assert [e.key.rows for e in found.entries] == [1, 16, 32, 64, 128, 256, 1]
    assert [(k.rows, k.out, k.columns) for k in found.dense] == [(128, 64, 256)]
    tile = next(e.config for e in found.entries if e.key.kernel == "tile" and e.key.rows == 16)
    assert configs.lookup("tile", 4, 128, 16, 64, 256, CPU) == tile == BEST["tile"]
    assert configs.dense(4, 128, 64, 256, CPU) == 128
    assert [done for _, done, _ in said] == [*range(8)][:len(said)] and said[-1][1] == said[-1][2]
    assert said[0][0] == "tuning: int4-g128 64x256, 1 rows"


def test_a_stopped_run_goes_on_and_what_is_known_is_measured_again_only_when_asked(made, monkeypatch):
    def stop(what, done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tuned(progress=stop)
    file = configs.own_file("interpreter")
    assert [e.key.rows for e in configs.read(file).entries] == [1, 16]
    before = made.measured
    whole = tuned()
    on_the_way = made.measured - before
    assert configs.to_json(tuned()) == configs.to_json(whole) and made.measured == before + on_the_way
    tuned(again=True, rows=[1])
    assert made.measured > before + on_the_way and len(configs.read(file).entries) == 1
    document = json.loads(file.read_text())
    file.write_text(json.dumps(document | {"triton": "0.1"}))
    assert [e.key.rows for e in tuned(rows=[2]).entries] == [16]  # another Triton's figures do not count


def test_a_file_for_the_package_leaves_the_cache_alone(made, tmp_path):
    found = tuned(out=tmp_path / "gpu.json", rows=[1])
    assert len(found.entries) == 1 and configs.read(tmp_path / "gpu.json").entries[0].config == found.entries[0].config
    assert not configs.own_file("interpreter").exists()


def test_the_kernels_of_the_package_ask_for_what_is_tuned(monkeypatch, tmp_path):
    monkeypatch.setattr(tuning, "medians", lambda rounds, device: [Timed(1.0, True)])
    found = tuning.tune([(16, 128)], [INT4, codecs.get("nf4")], device=CPU, rows=[1, 5], out=tmp_path / "x.json")
    asked = {("matvec", 1), ("tile", 16)}
    assert {(e.key.kernel, e.key.rows) for e in found.entries if e.key.group == 128} == asked
    assert {(e.key.kernel, e.key.rows) for e in found.entries if e.key.group == 64} == asked
    with pytest.raises(FewbitsError, match="no kernel computes F16"):
        tuning.tune([(16, 128)], [codecs.get("F16")], device=CPU)


def test_neighbours_differ_in_one_field_that_the_kernel_has_and_keep_within_limits():
    assert set(tuning.neighbours("tile", Config(16, 16, 1, 4, 3))) == {
        Config(32, 16, 1, 4, 3), Config(16, 32, 1, 4, 3), Config(16, 16, 2, 4, 3), Config(16, 16, 1, 2, 3),
        Config(16, 16, 1, 8, 3), Config(16, 16, 1, 4, 2), Config(16, 16, 1, 4, 4)}
    assert set(tuning.neighbours("decode", Config(16))) == {
        Config(8), Config(32), Config(16, warps=2), Config(16, warps=8)}
    full = Config(128, 64, warps=1)  # 256 sums a thread
    assert not any(c.n * c.m > 128 * 64 * c.warps for c in tuning.neighbours("tile", full))
    assert {Config(64, 64, warps=1), Config(128, 64, warps=2)} <= set(tuning.neighbours("tile", full))


def test_products_of_a_model_with_those_computed_as_one():
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 256, "num_hidden_layers": 2,
              "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 688, "vocab_size": 1000,
              "tie_word_embeddings": False}
    entries = {"lm_head.weight": Entry("lm_head.weight", (1000, 256), BF16, None)}
    made = Checkpoint(Path("x"), "safetensors", config, entries)
    assert set(tuning.shapes_of(made)) == {(512, 256), (256, 256), (1376, 256), (256, 688), (1000, 256)}
    with pytest.raises(FewbitsError, match="not known"):
        tuning.shapes_of(Checkpoint(Path("x"), "safetensors", {"model_type": "other"}, entries))
