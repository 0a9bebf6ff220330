"""The encoders of the native extension beside the reference in Python, with every set of instructions."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from fewbits import _native, codecs, instructions
from fewbits.codecs import ggml, iq4, kquants, native, pieces
from fewbits.codecs.base import decode_units, encode_units, fit_units

_spec = importlib.util.spec_from_file_location("codec_registry", Path(__file__).with_name("registry.py"))
assert _spec and _spec.loader
registry = sys.modules.setdefault("codec_registry", importlib.util.module_from_spec(_spec))
_spec.loader.exec_module(registry)

SEARCHED = (*ggml.TYPES, *kquants.TYPES, *iq4.TYPES, "int2", "int3", "int4", "int4-g32", "int8-g128", "int2-asym",
            "int3-g32-asym", "int4-asym", "int8-g64-asym", "int4-row", "int4-g16-sbf16", "int4-g48-asym-sf32", "int8",
            "nf4", "nf4-b32", "nf4-dq", "fp4", "fp4-dq")
BLOCKS = (*ggml.TYPES, *kquants.TYPES, *iq4.TYPES)
WORST = 1.008  # our error over the reference's: up to 1.004 (Q6_K) on weights of SmolLM2 and Gemma 3


@pytest.fixture(params=_native.usable())
def instruction_set(request):
    before = _native.current()
    instructions.use(request.param)
    yield request.param
    instructions.use(before)


@pytest.fixture
def reference(monkeypatch):
    """A function that calls another without the extension."""

    def call(function, *arguments):
        with monkeypatch.context() as m:
            m.setattr(native, "here", lambda x: False)
            return function(*arguments)

    return call


def weights(codec, rows: int = 64) -> torch.Tensor:
    return registry.weights(codec, rows=rows, ragged=True)


def error(codec, w, params, importance) -> float:
    decoded = decode_units(encode_units(w, codec, params), codec, params)
    return float(((w - decoded).double().square() * (1 if importance is None else importance)).sum())


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", SEARCHED)
def test_as_good_as_the_reference(name, weighted, instruction_set, reference, monkeypatch):
    codec = registry.get(name)
    w = weights(codec)
    importance = registry.importances(w.shape[1]) if weighted else None
    state, asked = codec.begin(w, importance), []
    run = native.Search.fit

    def watched(*arguments):
        asked.append(run(*arguments))
        return asked[-1]

    monkeypatch.setattr(native.Search, "fit", watched)
    ours = fit_units(w, codec, importance, state)
    assert asked and all(found is not None for found in asked)
    theirs = reference(fit_units, w, codec, importance, state)
    assert ours.keys() == theirs.keys()
    assert all(ours[k].dtype == theirs[k].dtype and ours[k].shape == theirs[k].shape for k in ours)
    assert error(codec, w, ours, importance) <= WORST * error(codec, w, theirs, importance)


@pytest.mark.parametrize("name", SEARCHED)
def test_any_strides_and_threads(name, monkeypatch):
    """As GPTQ asks: weights column by column in memory, one importance for all rows."""
    codec = registry.get(name)
    unit = codec.unit(512)
    w = torch.randn(unit, 67, generator=torch.Generator().manual_seed(0)).T
    importance = registry.importances(unit)
    state = codec.begin(w, importance)
    state = state and {k: s[:, 0] for k, s in state.items()}
    want = codec.fit(w.contiguous(), importance.expand(67, unit).contiguous(), state)
    for threads in (1, 2, 7):
        monkeypatch.setattr(native, "threads", lambda count=threads: count)
        got = codec.fit(w, importance, state)
        assert all(torch.equal(got[k], want[k]) for k in want)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", BLOCKS)
def test_search_gives_the_bytes_of_its_parts(name, dtype, threads, instruction_set, monkeypatch):
    monkeypatch.setattr(native, "threads", lambda: threads)
    codec = registry.get(name)
    w = registry.weights(codec, 33).to(dtype)
    known = registry.importances(w.shape[1])
    for matrix, importance in ((w, None), (w, known), (w.T.contiguous().T, known * torch.rand(33, 1)), (w[:0], None)):
        params = fit_units(matrix.float(), codec, importance, None) if len(matrix) else {}
        found = codec.search(matrix, importance)
        if not len(matrix):
            assert found is None
            continue
        codes = encode_units(matrix.float(), codec, params)
        want = codec.pack(codes, params, tuple(w.shape))["blocks"]
        assert torch.equal(found.planes["blocks"], want)
        scale = 1 if importance is None else importance
        off = ((w.float() - decode_units(codes, codec, params)).double().square() * scale).sum()
        assert found.loss == pytest.approx(float(off / (w.double().square() * scale).sum()), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_counts_what_is_no_number(dtype):
    x = torch.full((3, 5000), torch.finfo(dtype).max, dtype=dtype)
    assert native.nonfinite(x) == 0
    x[:, 1:4998] = torch.tensor([torch.nan, torch.inf, -torch.inf], dtype=dtype)[:, None]
    assert native.nonfinite(x.T) == 3 * 4997


@pytest.mark.parametrize("rows", [0, 1, 15, 17])
@pytest.mark.parametrize("name", ["Q4_K", "Q6_K", "Q4_1", "Q4_0", "IQ4_XS", "int4-asym", "nf4"])
def test_every_unit_for_itself(name, rows, instruction_set):
    codec = registry.get(name)
    w = registry.weights(codec, 17)[:rows, :codec.unit(512)]
    every = codec.fit(w, None)
    assert all(len(p) == rows for p in every.values())
    for i in range(rows):
        alone = codec.fit(w[i:i + 1], None)
        assert all(torch.equal(alone[k][0], every[k][i]) for k in alone)


@pytest.mark.parametrize("name", SEARCHED)
def test_weights_and_importances_that_are_zero_or_tiny_or_huge(name, instruction_set):
    codec = registry.get(name)
    w = weights(codec, 5)
    for size in (0.0, 1e-44, 1e-38, 1e-20, 1e20, 1e35):
        for importance in (None, torch.zeros(w.shape[1]), torch.full((w.shape[1],), 1e-44),
                           torch.full((w.shape[1],), 1e38)):
            x = w * size
            params = fit_units(x, codec, importance, codec.begin(x, importance))
            decoded = decode_units(encode_units(x, codec, params), codec, params)
            assert decoded.isfinite().all()
            if codec.family != "ggml" and 1e-3 < size * 0.02 < 1e3 or size == 0:
                assert (decoded - x).abs().max() <= 0.5 * x.abs().max()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", SEARCHED)
def test_what_is_no_number_harms_only_its_unit(name, bad, instruction_set):
    codec = registry.get(name)
    if codec.name.endswith("-dq"):
        pytest.skip("one mean of the whole tensor")
    w = weights(codec, 20)
    hurt = w.clone()
    hurt[0, 3] = bad
    good, found = fit_units(w, codec, None, None), fit_units(hurt, codec, None, None)
    encode_units(hurt, codec, found)
    for k in good:
        same = (good[k] == found[k]).flatten(0, 1).all(-1)
        assert int((~same).sum()) <= 1


@pytest.mark.parametrize("name", [n for n in registry.ALL if n not in ("kmeans2", "kmeans3", "kmeans4")])
def test_codes_and_bytes_are_the_references(name, instruction_set, reference):
    """Bit for bit, with zero, negative and infinite scales too."""
    codec = registry.get(name)
    w = registry.weights(codec, 40)
    params = {k: p.clone() for k, p in fit_units(w, codec, None, codec.begin(w, None)).items()}
    for k in codec.linear:
        params[k][0], params[k][1], params[k][2] = 0.0, -params[k][1], torch.inf
    shape = tuple(w.shape)
    codes = encode_units(w, codec, params)
    assert torch.equal(codes, reference(encode_units, w, codec, params))
    got, want = decode_units(codes, codec, params), reference(decode_units, codes, codec, params)
    assert torch.equal(got.nan_to_num(123.0), want.nan_to_num(123.0))
    packed, same = codec.pack(codes, params, shape), reference(codec.pack, codes, params, shape)
    assert all(torch.equal(packed[k], same[k]) for k in same)
    back, again = codec.unpack(packed, shape), reference(codec.unpack, packed, shape)
    assert torch.equal(back[0], again[0]) and torch.equal(back[0], codes)


def test_the_reference_takes_what_the_extension_cannot():
    codec = codecs.get("Q4_0")
    w = registry.weights(codec)
    assert native.even("d", 4).fit(w.to("meta"), None, torch.float16) is None
    assert pieces.fit_pieces(lambda p: {"d": p.stored(p.peak)}, w[:, :32], None, torch.float16)["d"].shape == (6, 1)


def _scale(**changes):
    given = dict(w=torch.zeros(2, 3, 8), importance=None, storage=1, threads=1, packer=None, blocks=None, low=-8.0,
                 high=7.0, bounds=torch.zeros(0), rises=torch.zeros(0), parts=torch.ones(2), kept=4, rounds=2,
                 positive=False, scale=torch.zeros(6, 1)) | changes
    _native.fit_scale(*given.values())


def _lines(**changes):
    given = dict(w=torch.zeros(2, 3, 32), importance=None, storage=1, threads=1, packer=None, blocks=None, top=15.0,
                 parts=torch.ones(2), drops=torch.ones(2), kept=4, rounds=2, subs=4, most=63.0, steps=torch.ones(1),
                 minima=1, near=torch.zeros(1, 2), descents=1, d=torch.zeros(6, 1), dmin=torch.zeros(6, 1),
                 scales=torch.zeros(6, 4, dtype=torch.uint8), mins=torch.zeros(6, 4, dtype=torch.uint8)) | changes
    _native.fit_lines(*given.values())


def _packed(**changes):
    """Eight codes and a float16 as they are."""
    packer = dict(terms=torch.tensor([[0, 2, 16, 0, 255], [16, 0, 2, 0, 255]], dtype=torch.int32),
                  constant=torch.zeros(18, dtype=torch.uint8), raw=18, order=torch.zeros(0, dtype=torch.uint8))
    packer |= {k: changes.pop(k) for k in packer.keys() & changes.keys()}
    _scale(**dict(w=torch.zeros(2, 3, 16), packer=_native.Packer(**packer),
                  blocks=torch.zeros(6, 18, dtype=torch.uint8)) | changes)


def _codes(**changes):
    given = dict(w=torch.zeros(2, 8), threads=1, scale=torch.ones(2, 2), offset=None, zero=None, middle=0.0, factor=1.0,
                 low=0.0, high=15.0, bounds=torch.zeros(0), order=torch.zeros(0, dtype=torch.uint8),
                 codes=torch.zeros(2, 8, dtype=torch.uint8)) | changes
    _native.codes(*given.values())


def _values(**changes):
    given = dict(codes=torch.zeros(2, 8, dtype=torch.uint8), threads=1, scale=torch.ones(2, 2), offset=None, zero=None,
                 middle=0.0, factor=1.0, table=torch.zeros(0), values=torch.zeros(2, 8)) | changes
    _native.values(*given.values())


def _unplanes(**changes):
    given = dict(packed=torch.zeros(8, dtype=torch.uint8), threads=1, bits=4, parts=2, run=4,
                 codes=torch.zeros(16, dtype=torch.uint8)) | changes
    _native.unplanes(*given.values())


@pytest.mark.parametrize("call, changes", [
    (_values, {"table": torch.zeros(16)}), (_values, {"scale": torch.ones(2, 3)}),
    (_values, {"scale": torch.ones(3, 2)}), (_values, {"values": torch.zeros(2, 7)}),
    (_values, {"offset": torch.zeros(2, 1)}), (_unplanes, {"parts": 3}),
    (_unplanes, {"run": 3}), (_unplanes, {"codes": torch.zeros(15, dtype=torch.uint8)}), (_unplanes, {"bits": 0}),
    (_scale, {"threads": 0}), (_scale, {"threads": 257}), (_scale, {"storage": 3}), (_scale, {"kept": 5}),
    (_scale, {"rounds": 0}), (_scale, {"scale": torch.zeros(5, 1)}), (_scale, {"importance": torch.zeros(2, 3, 7)}),
    (_scale, {"bounds": torch.zeros(3)}), (_scale, {"parts": torch.zeros(0)}), (_scale, {"w": torch.zeros(2, 3, 0)}),
    (_scale, {"low": 7.0}), (_lines, {"subs": 5}), (_lines, {"subs": 32}), (_lines, {"minima": 5}),
    (_lines, {"most": 300.0}), (_lines, {"drops": torch.ones(3)}), (_lines, {"near": torch.zeros(1, 3)}),
    (_lines, {"mins": torch.zeros(6, 3, dtype=torch.uint8)}), (_lines, {"descents": 0}),
    (_packed, {"blocks": None}), (_packed, {"packer": None}),
    (_packed, {"blocks": torch.zeros(6, 17, dtype=torch.uint8)}),
    (_packed, {"raw": 17}), (_packed, {"raw": 19}), (_packed, {"constant": torch.zeros(17, dtype=torch.uint8)}),
    (_packed, {"terms": torch.tensor([[-1, 0, 1, 0, 1]], dtype=torch.int32)}), (_packed, {"storage": 0}),
    (_packed, {"terms": torch.tensor([[0, 0, 1, 8, 1]], dtype=torch.int32)}), (_packed, {"w": torch.zeros(2, 3, 8)}),
    (_packed, {"bounds": torch.zeros(1), "rises": torch.ones(1)}),
    (_codes, {"scale": torch.ones(2, 3)}), (_codes, {"scale": torch.ones(1, 2)}), (_codes, {"high": 256.0}),
    (_codes, {"zero": torch.ones(2, 1)}), (_codes, {"codes": torch.zeros(2, 7, dtype=torch.uint8)}),
    (_codes, {"bounds": torch.ones(3)})])
def test_arguments_that_do_not_fit(call, changes):
    call()
    with pytest.raises(ValueError):
        call(**changes)


@pytest.mark.parametrize("changes", [{"w": torch.zeros(2, 3, 8, dtype=torch.float64)}, {"w": torch.zeros(3, 8)},
                                     {"scale": torch.zeros(6, 1, dtype=torch.uint8)}])
def test_types_that_do_not_fit(changes):
    with pytest.raises(TypeError):
        _scale(**changes)
