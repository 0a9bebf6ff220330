"""Weights for native code, as they lie in files, against the tensors that the same entries load."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import fewbits
from fewbits import _native, arch, codecs, containers
from fewbits.checkpoint import Checkpoint, Entry
from fewbits.codecs.floats import Float
from fewbits.containers.gguf import Gguf
from fewbits.qtensor import QTensor
from fewbits.runtime import decoder, interleaved, weights
from fewbits.runtime.cpu import Native
from fewbits.solvers import solve
from fewbits.stored import Apart
from tests.arch.models import MODELS, SMALL, directory, tiny

FAMILIES = ("llama", "gemma3", "phi3", "gpt2", "gpt_neox", "qwen3_moe", "gpt_oss")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def float_model(name: str, folder: Path, to: str) -> Checkpoint:
    source = folder / name
    if not source.exists():
        directory(tiny(MODELS[name]), source)
    if to == "directory":
        return containers.open(source)
    path = folder / f"{name}.gguf"
    if not path.exists():
        containers.write(Gguf(), path, containers.open(source))
    return containers.open(path)


def decoded(weight: weights.Weight, shape: tuple[int, ...]) -> torch.Tensor:
    assert isinstance(weight, _native.Weight)
    out = torch.empty(shape)
    weight.rows(torch.arange(shape[0]), out, 1)
    return out


def entry_of(q: QTensor) -> Entry:
    return Entry("w", q.shape, q.codec, lambda: q)


@pytest.mark.parametrize("to", ["directory", "gguf"])
@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_stored_is_what_is_loaded(name: str, to: str, folder: Path) -> None:
    """Rows in other orders, in turns, stacked; norms plus one."""
    model = float_model(name, folder, to)
    for entry in model.entries.values():
        stored, want = entry.stored(), entry.load().dequantize().numpy()
        if to == "directory" and arch.transposed(model.config, entry.name):
            assert stored is None, "directories hold it as [in, out]"
        else:
            assert stored is not None and np.array_equal(stored.values().reshape(entry.shape), want), entry.name
        found = weights.vector(entry)
        assert found.dtype == np.float32 and np.array_equal(found, want), entry.name


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "qwen3_moe", "gpt_oss"])
def test_few_bits_in_every_order_of_rows(name: str, folder: Path, tmp_path: Path) -> None:
    source = float_model(name, folder, "directory")
    fewbits.quantize(source, tmp_path / "m.gguf", "Q8_0", calibration="none")
    found = {e.name: e for e in containers.open(tmp_path / "m.gguf").entries.values() if e.codec.name == "Q8_0"}
    assert {len(e.shape) for e in found.values()} == ({2} if name in ("llama", "gpt_neox") else {2, 3})
    for entry in found.values():
        want = entry.load().dequantize()
        several = weights.matrices(entry) if want.ndim == 3 else [weights.matrix(entry)]
        for weight, one in zip(several, want if want.ndim == 3 else [want], strict=True):
            torch.testing.assert_close(decoded(weight, tuple(one.shape)), one, rtol=1e-6, atol=0)


@pytest.mark.parametrize("codec", ["Q4_K", "int4-g32", "nf4", "nf4-dq", "int8-g64-asym"])
def test_rows_of_a_fused_matrix(codec: str) -> None:
    q = solve(torch.randn(60, 256, generator=torch.Generator().manual_seed(0)), codecs.get(codec), "nearest")
    index = np.random.default_rng(0).permutation(60)[:23]
    found = weights.matrix(entry_of(q), index)
    torch.testing.assert_close(decoded(found, (23, 256)), q.dequantize()[torch.from_numpy(index)], rtol=1e-6, atol=1e-7)


def test_what_has_no_native_form_is_decoded() -> None:
    crossing = solve(torch.randn(6, 96), codecs.get("nf4"), "nearest")
    q = solve(torch.randn(6, 64), codecs.get("int4-g32"), "nearest")
    ordered = QTensor(q.codec, q.shape, q.planes, torch.stack([torch.randperm(64) for _ in range(6)]))
    for q in (crossing, ordered):
        for rows in (None, np.array([5, 0])):
            assert isinstance(weights.matrix(entry_of(q), rows), _native.Floats)


def test_experts_with_orders_of_columns_are_decoded() -> None:
    q = solve(torch.randn(2, 6, 64), codecs.get("int4-g32"), "nearest")
    q = QTensor(q.codec, q.shape, q.planes, torch.stack([torch.randperm(64) for _ in range(2)]))
    assert {type(w) for w in weights.matrices(entry_of(q))} == {_native.Floats}


def test_orders_are_for_decoders() -> None:
    q = solve(torch.randn(6, 64), codecs.get("int4-g32"), "nearest")
    ordered = weights.matrix(entry_of(QTensor(q.codec, q.shape, q.planes, torch.randperm(64))))
    fine = weights.matrix(entry_of(solve(torch.randn(6, 64), codecs.get("int8"), "nearest")))
    for weight in (ordered, fine):
        assert isinstance(weight, _native.Weight)
        with pytest.raises(ValueError, match="are for plans of decoders"):
            _native.multiply([weight], _native.Rounded(torch.randn(1, 64), 1), [torch.empty(1, 6)], [None], 1)
    for wrong in ([0] * 63, [0] * 63 + [64], [0] * 63 + [-1]):
        with pytest.raises(ValueError, match="columns|column -?\\d+ of 64"):
            planes = Native(q, torch.float32).matrices[0]
            interleaved.weight(planes.form, 6, 64, 32, "f16", planes.planes, np.array(wrong, np.int32))


def test_experts_that_no_file_holds_in_order() -> None:
    q = solve(torch.randn(3, 20, 64), codecs.get("int4-g32"), "nearest")
    for weight, one in zip(weights.matrices(entry_of(q)), q.dequantize(), strict=True):
        torch.testing.assert_close(decoded(weight, (20, 64)), one, rtol=1e-6, atol=1e-7)


def test_floats_stay_in_the_mapped_file(folder: Path) -> None:
    entry = float_model("llama", folder, "gguf").entries["model.layers.0.mlp.up_proj.weight"]
    stored = entry.stored()
    assert stored is not None and np.shares_memory(stored.bytes(), stored.data[0])
    assert not stored.data[0].flags.owndata
    assert isinstance(weights.matrix(entry), _native.Floats)
    part = stored.part(3, 9)
    assert np.shares_memory(part.bytes(), stored.data[0])
    assert np.array_equal(part.values(), stored.values()[3:9])
    assert np.array_equal(stored.pick(np.array([7, 2])).part(1, 2).values(), stored.values()[2:3])


@pytest.mark.parametrize("kind", ["F16", "BF16", "F32"])
def test_values_of_every_float(kind: str, tmp_path: Path) -> None:
    model = tiny(MODELS["qwen2"])
    directory(model.to({"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}[kind]), tmp_path / "m")
    for entry in containers.open(tmp_path / "m").entries.values():
        assert isinstance(entry.codec, Float) and entry.codec.kind == kind
        assert np.array_equal(weights.vector(entry), entry.load().dequantize().numpy())


def test_another_tensor_under_the_same_name_is_not_in_the_file(folder: Path) -> None:
    entry = next(iter(float_model("llama", folder, "gguf").entries.values()))
    assert entry.as_(name="other").stored() is not None
    other = QTensor(entry.codec, entry.shape, {k: p + 1 for k, p in entry.load().planes.items()})
    changed = entry.as_(load=lambda: other)
    assert changed.stored() is None
    assert np.array_equal(weights.vector(changed), other.dequantize().numpy())


def test_the_decoder_computes_with_what_is_stored(folder: Path) -> None:
    """Queries and keys lie in another order in GGUF files; the results are the same bits."""
    tokens = list(range(40))
    first, second = (decoder.compile(float_model("llama", folder, to)).logits(tokens) for to in ("directory", "gguf"))
    assert np.array_equal(first, second)


@pytest.mark.parametrize("recipe", ["Q4_K_M", "Q8_0", "int4-g32", "int8", "nf4-dq"])
def test_no_torch_from_the_file_to_the_kernels(recipe: str, tmp_path: Path) -> None:
    sizes, out = SMALL | {"hidden_size": 256, "intermediate_size": 512}, tmp_path / "out.gguf"
    out = out if recipe.startswith("Q") else out.with_suffix("")
    fewbits.quantize(directory(tiny(type(MODELS["llama"])(**sizes)), tmp_path / "m"), out, recipe, calibration="none")
    code = ("import sys; from fewbits import containers; from fewbits.runtime import weights\n"
            f"entries = containers.open({str(out)!r}).entries.values()\n"
            "assert len({e.codec.name for e in entries}) > 1\n"
            "for e in entries: (weights.matrix if len(e.shape) == 2 else weights.vector)(e)\n"
            "assert not {'torch', 'transformers'} & sys.modules.keys(), sorted(sys.modules)")
    subprocess.run([sys.executable, "-c", code], check=True)


APART = [("gptq-v1", "int4-g32"), ("gptq-v1", "int8-g128"), ("gptq-v2", "int4-g64-asym"), ("gptq-v1", "int2-g32"),
         ("gptq-v2", "int2-g64-asym"), ("gptq-v1", "int8-row"), ("bitsandbytes", "nf4"), ("bitsandbytes", "nf4-dq"),
         ("bitsandbytes", "fp4-b128"), ("bitsandbytes", "int8"), ("gptq-v1", "int4-g128-sbf16")]


@pytest.mark.parametrize("container, codec", APART)
def test_codes_and_scales_that_lie_apart(container: str, codec: str, folder: Path, tmp_path: Path) -> None:
    source = wide(folder)
    for name, entry in source.entries.items():
        if "_proj.weight" in name:
            q = solve(entry.load().dequantize(), codecs.get(codec), "nearest")
            source.entries[name] = entry.as_(codec=q.codec, load=lambda q=q: q)
    found = containers.write(containers.by_name(container), tmp_path / "m", source)
    checked = 0
    for entry in (e for e in found.entries.values() if "_proj.weight" in e.name):
        assert isinstance(entry.stored(), Apart) and entry.codec.name == codec
        q = entry.load()
        weight, want = weights.matrix(entry), weights.matrix(entry_of(q))
        a, b = (decoded(w, tuple(entry.shape)) for w in (weight, want))
        assert torch.equal(a, b), entry.name
        checked += 1
    assert checked == 14


def wide(folder: Path) -> Checkpoint:
    """Groups of 128 columns fit; keys have 24 rows."""
    if not (folder / "wide").exists():
        sizes = SMALL | {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 16,
                         "num_key_value_heads": 1, "head_dim": 24}
        directory(tiny(type(MODELS["llama"])(**sizes)), folder / "wide")
    return containers.open(folder / "wide")


def test_orders_of_columns_come_from_torch(folder: Path, tmp_path: Path) -> None:
    source = wide(folder)
    for name, entry in source.entries.items():
        if "_proj.weight" in name:
            order = torch.randperm(entry.shape[1])
            q = solve(entry.load().dequantize()[:, order], codecs.get("int4-g32"), "nearest")
            q = QTensor(q.codec, q.shape, q.planes, order)
            source.entries[name] = entry.as_(codec=q.codec, load=lambda q=q: q)
    found = containers.write(containers.by_name("gptq"), tmp_path / "m", source)
    entry = found.entries["model.layers.0.mlp.up_proj.weight"]
    assert entry.stored() is None and isinstance(weights.matrix(entry), _native.Weight)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux's /proc")
def test_the_pages_of_what_was_prepared_are_let_go(folder: Path, tmp_path: Path) -> None:
    """4 MB of Q8_0: the file's pages are no longer this process's, and its bytes are there again when asked for."""
    config = type(MODELS["llama"])(**(SMALL | {"hidden_size": 512, "intermediate_size": 4096, "num_hidden_layers": 1}))
    source = containers.open(directory(tiny(config), tmp_path / "m"))
    fewbits.quantize(source, tmp_path / "m.gguf", "Q8_0", calibration="none")
    entry = containers.open(tmp_path / "m.gguf").entries["model.layers.0.mlp.up_proj.weight"]
    stored = entry.stored()
    assert stored is not None
    address, before = stored.data[0].ctypes.data, stored.data[0].copy()
    assert resident(address) > 0
    weights.matrix(entry)
    assert resident(address) < before.nbytes / 10
    assert np.array_equal(stored.data[0], before)


def resident(address: int) -> int:
    """Bytes of the mapping around an address that are in this process's memory."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, _, rest = line.partition("-")
        if rest and " " in rest and ":" not in first:
            inside = int(first, 16) <= address < int(rest.split()[0], 16)
        elif inside and line.startswith("Rss:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("not mapped")
