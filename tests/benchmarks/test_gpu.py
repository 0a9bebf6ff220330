"""The benchmark of a GPU goes through all it has without one; it times nothing that is wrong and hides no miss."""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from tests.conftest import ROOT

CPU = torch.device("cpu")
SCRIPT = ROOT / "benchmarks" / "gpu.py"


def script(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *map(str, words)], capture_output=True, text=True,
                          env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""})


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch):
    """A module of the benchmarks by name."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))

    def find(name: str) -> ModuleType:
        return importlib.import_module(name)

    return find


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict]:
    """What it says, and what it writes."""
    file = tmp_path_factory.mktemp("gpu") / "gpu.json"
    done = script("--rehearse", "--json", file)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads(file.read_text())


@pytest.mark.parametrize("section, goals", [
    ("products", {"of bandwidth", "x cuBLAS"}), ("peers", {"x"}), ("model", {"of bandwidth", "x bfloat16"}),
    ("qlora", set()), ("gptq", set())])
def test_a_rehearsal_goes_through_every_section(rehearsal: tuple[str, dict], section: str, goals: set[str]) -> None:
    rows = [row for row in rehearsal[1]["rows"] if row["section"] == section]
    assert rows and goals <= {name for row in rows for name in row["goals"]}
    for row in rows:
        assert row["figures"] or row["note"] in ("not installed", "needs a GPU")


def test_a_rehearsal_has_no_figures(rehearsal: tuple[str, dict]) -> None:
    said, found = rehearsal
    assert said.count("rehearsal: no figures") == 2 and "FAILED" not in said and "reached" not in said
    assert found["rehearsed"]
    assert {value for row in found["rows"] for value in (*row["figures"].values(), *row["reached"].values())} == {None}


def test_without_a_gpu_it_says_so_and_ends_with_two() -> None:
    done = script("--only", "products")
    assert done.returncode == 2 and not done.stdout
    first, second = done.stderr.splitlines()
    assert first.startswith("no GPU: ") and second.startswith("hint: --rehearse")


def test_goals_are_reached_missed_or_not_measured_and_kept_at_once(benchmark, tmp_path: Path, capsys) -> None:
    bench = benchmark("gpu").Bench(CPU, rehearsed=False, target=tmp_path / "x.json")
    bench.row("products", "a", {"us": 3.0, "x": 1.25}, {"x": 1.0})
    bench.row("products", "b", {"x": 0.5, "y": math.nan}, {"x": 1.0, "y": 2.0})
    bench.failed("products", "c", "wrong\nand more")
    rows = json.loads((tmp_path / "x.json").read_text())["rows"]
    assert [row["reached"] for row in rows] == [{"x": True}, {"x": False, "y": None}, {}]
    assert rows[1]["figures"] == {"x": 0.5, "y": None} and rows[2]["note"] == "FAILED: wrong"
    said = capsys.readouterr().out.splitlines()
    assert "x 1.25 (goal 1: reached)" in said[0] and "x 0.5 (goal 1: MISSED); y - (goal 2: not measured)" in said[1]
    assert bench.summary().splitlines() == ["1 of 2 goals reached, 1 FAILED", "MISSED b: x"]


def test_wrong_products_are_told(benchmark) -> None:
    bench, products = benchmark("gpu").Bench(CPU, rehearsed=True), benchmark("gpu_products")
    torch.manual_seed(0)
    weight, x = torch.randn(40, 64), torch.randn(3, 64).half()
    assert products.is_right(bench, "products", "right", partial(F.linear, weight=weight.half()), weight, x, 1e-6)
    assert not bench.failures
    other = weight.clone()
    other[17, 5] += 1
    assert not products.is_right(bench, "products", "wrong", partial(F.linear, weight=other.half()), weight, x, 1e-6)
    nothing = partial(F.linear, weight=torch.full_like(other, math.nan).half())
    assert not products.is_right(bench, "products", "nan", nothing, weight, x, 1e-6)
    assert bench.failures == 2 and "wrong, a normalised error" in bench.rows[0]["note"]


def test_torchs_own_kernel_computes_what_its_reference_says(benchmark) -> None:
    bench, peers = benchmark("gpu").Bench(CPU, rehearsed=True), benchmark("gpu_peers")
    torch.manual_seed(0)
    products, weight = peers.torch_int4((32, 256), bench)
    x = torch.randn(4, 256, dtype=torch.bfloat16)
    meant = x.double() @ weight.double().T
    assert products
    for product in products:
        assert float((product(x).double() - meant).square().sum() / meant.square().sum()) < peers.MOST_ERROR


def test_the_made_model_is_a_llama_of_eight_billion_weights(benchmark) -> None:
    bench, llama = benchmark("gpu").Bench(CPU, rehearsed=False), benchmark("gpu_llama")
    made = llama.checkpoint(bench, "int4-g128")
    assert made.parameters == 8_030_261_248
    looked_up = made.entries[llama.LOOKED_UP]
    assert llama.token_bytes(made) == made.nbytes - looked_up.nbytes
    assert {e.codec.name for e in made.entries.values()} == {"int4-g128", "BF16"}
    bench.layers = 2
    assert sum("q_proj" in name for name in llama.checkpoint(bench, "nf4").entries) == 2
