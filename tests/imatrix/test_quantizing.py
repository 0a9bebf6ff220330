"""Quantizing with an importance matrix: every tensor is what a search weighted by its own importances gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import fewbits
from fewbits import codecs, containers, imatrix, solvers
from fewbits.errors import FewbitsError
from fewbits.imatrix import Diagonal
from tests.arch.models import MODELS, directory, tiny
from tests.imatrix.test_collecting import text


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory):
    """`made("llama")`: a directory and the file of its importance matrix."""

    def make(name: str, suffix: str = "gguf") -> tuple[Path, Path]:
        folder = tmp_path_factory.mktemp(name)
        path = directory(tiny(MODELS[name]), folder / "m")
        imatrix.write(folder / f"i.{suffix}", imatrix.collect(containers.open(path), text(4, 60)))
        return path, folder / f"i.{suffix}"

    return make


def importances(folder: Path, file: Path) -> dict[str, np.ndarray]:
    return {n: d.values.numpy() for n, d in imatrix.read(file).statistics(containers.open(folder)).items()}


@pytest.mark.parametrize("suffix", ["gguf", "dat"])
def test_each_tensor_is_searched_by_its_own_importances(suffix: str, made, tmp_path: Path) -> None:
    folder, file = made("llama", suffix)
    result = fewbits.quantize(folder, tmp_path / "q.gguf", "Q4_0", imatrix=file)
    source, got, known = containers.open(folder), containers.open(tmp_path / "q.gguf"), importances(folder, file)
    assert len(known) == 14
    absent = sorted(r["name"] for r in result.tensors if r["solver"] and r["name"] not in known)
    assert absent == ["lm_head.weight", "model.embed_tokens.weight"]
    assert any("2 tensors" in n and "not in the importance matrix" in n for n in result.notes)
    for row in result.tensors:
        entry, w = got.entries[row["name"]], source.entries[row["name"]].load().dequantize()
        if row["solver"] is None:
            continue
        assert row["solver"] == "search"
        weights = Diagonal(torch.from_numpy(known[row["name"]])) if row["name"] in known else None
        meant = solvers.solve(w, entry.codec, "search", weights).dequantize()
        assert torch.equal(entry.load().dequantize(), meant), row["name"]
        if weights is not None:
            plain = solvers.solve(w, entry.codec, "search").dequantize()
            error = [float(((w - q).square() * weights.values).sum()) for q in (meant, plain)]
            assert error[0] < error[1], row["name"]


@pytest.mark.parametrize("recipe, out", [("Q4_0", "q.gguf"), ("int4-g32", "q")])
def test_experts_have_importances_of_their_own(recipe: str, out: str, made, tmp_path: Path) -> None:
    """In a file that stacks them, and in one that holds them apart."""
    folder, file = made("mixtral")
    fewbits.quantize(folder, tmp_path / out, recipe, imatrix=file)
    source, got, known = containers.open(folder), containers.open(tmp_path / out), importances(folder, file)
    for part in ("w1", "w2", "w3"):
        name = f"model.layers.1.block_sparse_moe.experts.{part}.weight"
        w, values = source.entries[name].load().dequantize(), got.entries[name].load().dequantize()
        codec = codecs.get(recipe)
        assert known[name].shape == (4, w.shape[-1])
        for i in range(4):
            one = solvers.solve(w[i], codec, "search", Diagonal(torch.from_numpy(known[name][i]))).dequantize()
            assert torch.allclose(values[i], one, rtol=2e-3 if out == "q" else 0, atol=1e-6), (name, i)


def test_stacks_are_solved_as_their_experts() -> None:
    """For every codec that a stack can take; blocks of nf4 at this width cross rows, and end with the matrix."""
    draw = torch.Generator().manual_seed(0)
    w = torch.randn(3, 8, 96, generator=draw)
    values = torch.rand(3, 96, generator=draw) ** 4
    for name in ("Q4_0", "Q8_0", "int3-g32", "nf4", "kmeans3", "int8", "fp8-e4m3"):
        codec = codecs.get(name)
        assert codec.check((3, 8, 96)) is None and codec.stacks((3, 8, 96)), name
        whole = solvers.solve(w, codec, "search", Diagonal(values)).dequantize()
        for i in range(3):
            assert torch.equal(whole[i], solvers.solve(w[i], codec, "search", Diagonal(values[i])).dequantize()), name


@pytest.mark.parametrize("name", ["Q4_0", "Q4_K", "Q2_K", "Q6_K", "IQ4_XS", "int4-g128", "int2-g64-asym", "nf4",
                                  "kmeans2", "MXFP4"])
def test_inputs_that_are_never_used(name: str) -> None:
    """Sums of zero: of single inputs, of a whole unit, of all. What counts is kept; nothing becomes NaN."""
    draw = torch.Generator().manual_seed(0)
    w, codec = torch.randn(4, 512, generator=draw), codecs.get(name)
    values = torch.rand(512, generator=draw)
    for dead in (slice(5, 9), slice(0, 256), slice(0, 512)):
        weights = values.clone()
        weights[dead] = 0
        got = solvers.solve(w, codec, "search", Diagonal(weights)).dequantize()
        assert bool(got.isfinite().all())
        error = float(((w - got).square() * weights).sum() / (w.square() * weights).sum().clamp(min=1e-9))
        assert error < (0.35 if codec.bits_per_weight((4, 512)) < 3 else 0.05)


def test_a_diagonal_is_not_enough_for_gptq(made, tmp_path: Path) -> None:
    folder, file = made("llama")
    for solver in ("gptq", "gptq-act-order"):
        with pytest.raises(FewbitsError, match=f"solver {solver} needs calibration text"):
            fewbits.quantize(folder, tmp_path / "q", "int4-g32", imatrix=file, solver=solver)
        with pytest.raises(FewbitsError, match="an importance matrix is only the diagonal"):
            solvers.solve(torch.randn(8, 64), codecs.get("int4-g32"), solver, Diagonal(torch.ones(64)))


def test_bad_files_are_refused_before_any_work(made, tmp_path: Path) -> None:
    folder, _ = made("llama")
    _, other = made("qwen3_moe")
    for file, message in ((other, "statistics of another model"), (folder / "config.json", "neither a GGUF file"),
                          (tmp_path / "none.gguf", "no such file")):
        with pytest.raises(FewbitsError, match=message):
            fewbits.quantize(folder, tmp_path / "q.gguf", "Q4_0", imatrix=file)
    assert not any(p for p in tmp_path.iterdir())
