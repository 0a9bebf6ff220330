"""What holds for every codec: names, sizes, packing, grids, and that a fit is never worse than the plain choice."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from fewbits.codecs.base import Codec, Params, decode_units, encode_units, fit_units, refit_units
from fewbits.errors import FewbitsError
from fewbits.qtensor import QTensor

_spec = importlib.util.spec_from_file_location("codec_registry", Path(__file__).with_name("registry.py"))
assert _spec and _spec.loader
registry = sys.modules.setdefault("codec_registry", importlib.util.module_from_spec(_spec))
_spec.loader.exec_module(registry)


@pytest.fixture(params=registry.ALL)
def codec(request) -> Codec:
    return registry.get(request.param)


def error(w: torch.Tensor, decoded: torch.Tensor, importance: torch.Tensor | None) -> float:
    return float(((w - decoded).double().square() * (1 if importance is None else importance)).sum())


def test_names_are_stable(codec):
    assert registry.get(codec.name) == codec
    assert registry.get(codec.name.lower()) is registry.get(codec.name.lower())


@pytest.mark.parametrize("name", ["int5", "int4-g", "int4-gx", "Q7_0", "nf4-dq-b64", "int4-asym-g32", "", "nf8"])
def test_unknown_names(name):
    with pytest.raises(FewbitsError, match="unknown codec"):
        registry.get(name)


@pytest.mark.parametrize("name", ["int4-g0", "nf4-b0", "nf4-b63"])
def test_impossible_blocks(name):
    with pytest.raises(FewbitsError, match=name):
        registry.get(name)


@pytest.mark.parametrize("ragged", [False, True])
def test_planes_are_what_is_announced(codec, ragged):
    w = registry.weights(codec, ragged=ragged)
    shape = tuple(w.shape)
    codes, params = registry.fit(codec, w)
    packed = QTensor.pack(codec, shape, codes, params)
    announced = codec.planes(shape)
    assert {k: (str(p.dtype).removeprefix("torch."), tuple(p.shape)) for k, p in packed.planes.items()} == announced
    assert packed.nbytes == codec.nbytes(shape)
    back, same = packed.unpack()
    assert torch.equal(back, codes)
    assert same.keys() == params.keys()
    assert all(torch.equal(same[k], params[k]) and same[k].dtype == params[k].dtype for k in params)
    assert torch.equal(packed.dequantize(), decode_units(codes, codec, params))


def test_encoding_decoded_values_returns_them(codec):
    w = registry.weights(codec, ragged=True)
    codes, params = registry.fit(codec, w)
    decoded = decode_units(codes, codec, params)
    assert torch.equal(decode_units(encode_units(decoded, codec, params), codec, params), decoded)


def test_encode_takes_the_nearest_level(codec):
    w = registry.weights(codec, rows=2)
    _, params = registry.fit(codec, w)
    best = torch.full_like(w, torch.inf)
    for code in range(1 if codec.name == "int8" else 0, 3 if codec.name.startswith("TQ") else 1 << codec.integer_bits):
        level = decode_units(torch.full(w.shape, code, dtype=torch.uint8), codec, params)
        best = torch.fmin(best, (level - w).abs())  # float8 has codes for NaN
    got = (decode_units(encode_units(w, codec, params), codec, params) - w).abs()
    assert torch.allclose(got, best, rtol=1e-5, atol=1e-7 * float(w.abs().max()))


def test_columns_of_a_grid(codec):
    w = registry.weights(codec)
    _, params = registry.fit(codec, w)
    unit = codec.unit(w.shape[1])
    first = {k: p[:, 0] for k, p in params.items()}  # [rows, k], as GPTQ asks
    grid = codec.grid(first, unit)
    codes = grid.encode(w[:, :unit])
    for index in (slice(0, 1), slice(unit - 1, unit), slice(1, unit, 3), torch.tensor([unit - 1, 0, unit // 2])):
        part = grid.columns(index)
        assert torch.equal(part.encode(w[:, :unit][:, index]), codes[:, index])
        assert torch.equal(part.decode(codes[:, index]), grid.decode(codes)[:, index])


def plain(codec: Codec, w: torch.Tensor) -> torch.Tensor:
    """Values of each family's usual quantizer: absmax, or smallest to largest value, rounded to storage."""
    rows, columns = w.shape
    codec = getattr(codec, "weights", codec)
    if codec.family == "codebook":
        params = {"levels": torch.stack([torch.linspace(*row.aminmax(), 1 << codec.bits) for row in w]).half()[:, None]}
        return decode_units(encode_units(w, codec, params), codec, params)
    if codec.name == "IQ4_XS":
        x = w.reshape(rows, -1, 8, 32)
        extreme = x.gather(-1, x.abs().argmax(-1, keepdim=True))[..., 0] / -127
        d = (extreme.gather(-1, extreme.abs().argmax(-1, keepdim=True)) / -32).half()
        params = {"d": d, "scales": (extreme / d.float()).round().clamp(-32, 31).to(torch.int8)}
        return decode_units(encode_units(w, codec, params), codec, params)
    if codec.family == "ggml" and codec.name.endswith("K"):
        subs = codec.subs
        x = w.reshape(rows, -1, subs, 256 // subs)
        if codec.name in ("Q3_K", "Q6_K"):
            extreme = x.gather(-1, x.abs().argmax(-1, keepdim=True))[..., 0] / -(1 << (codec.bits - 1))
            least = -32 if codec.name == "Q3_K" else -128
            d = (extreme.gather(-1, extreme.abs().argmax(-1, keepdim=True)) / least).half()
            params: Params = {"d": d, "scales": (extreme / d.float()).round().clamp(least, -1 - least).to(torch.int8)}
        else:
            low, high = x.amin(-1).clamp(max=0), x.amax(-1)
            s = (high - low) / ((1 << codec.integer_bits) - 1)
            most = 15 if codec.name == "Q2_K" else 63
            d, dmin = (s.amax(-1, True) / most).half(), (-low.amin(-1, True) / most).half()
            params = {"d": d, "dmin": dmin, "scales": (s / d.float()).round().clamp(0, most).to(torch.uint8),
                      "mins": (-low / dmin.float()).round().clamp(0, most).to(torch.uint8)}
        return decode_units(encode_units(w, codec, params), codec, params)
    parts = []
    unit, bits = codec.unit(columns), codec.integer_bits
    for at in range(0, columns, unit):
        x = w[:, at:at + unit]
        peak = x.abs().amax(1, keepdim=True)
        extreme = x.gather(1, x.abs().argmax(1, keepdim=True))
        middle = 1 << (bits - 1)
        if codec.family in ("table", "int8"):
            params = {"absmax": peak}
        elif codec.family.startswith("fp8"):
            params = {"scale": peak / codec.kind.top}
        elif codec.name == "MXFP4":
            params = {"exponent": (peak.log2().floor() + 125).to(torch.uint8)}
        elif codec.name in ("TQ1_0", "TQ2_0", "Q1_0"):
            params = {"d": peak.half()}
        elif codec.name == "IQ4_NL":
            params = {"d": (extreme / -127).half()}
        elif codec.name in ("Q4_1", "Q5_1"):
            low = x.amin(1, True)
            params = {"d": ((x.amax(1, True) - low) / ((1 << bits) - 1)).half(), "m": low.half()}
        elif codec.family == "ggml":
            params = {"d": (peak / 127 if bits == 8 else extreme / -middle).half()}
        elif codec.symmetric:
            zero = torch.full(peak.shape, middle, dtype=torch.uint8)
            params = {"scale": (extreme / -middle).to(codec.dtype), "zero": zero}
        else:
            low, high = x.amin(1, True).clamp(max=0), x.amax(1, True).clamp(min=0)
            s = ((high - low) / codec.top).to(codec.dtype)
            params = {"scale": s, "zero": (-low / s.float()).round().clamp(0, codec.top).to(torch.uint8)}
        grid = codec.grid(params, x.shape[1])
        parts.append(grid.decode(grid.encode(x)))
    return torch.cat(parts, 1)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", [n for n in registry.ALL if not n.endswith("-dq") and not n.startswith("fp8-e4m3-b")])
def test_fit_is_never_worse_than_plain(name, weighted):
    """Unit by unit; nested absmax is rounded, so it has a bound of its own below."""
    codec = registry.get(name)
    w = registry.weights(codec, rows=12)
    importance = registry.importances(w.shape[1]) if weighted else None
    scale = 1 if importance is None else importance
    unit = codec.unit(w.shape[1])
    got = ((registry.values(codec, w, importance) - w).double().square() * scale).reshape(12, -1, unit).sum(-1)
    want = ((plain(codec, w) - w).double().square() * scale).reshape(12, -1, unit).sum(-1)
    assert (got <= want * (1 + 1e-5)).all(), f"worst unit: {float((got / want).max())} times the plain error"
    assert got.sum() < want.sum() * (0.995 if codec.integer_bits == 8 and unit == w.shape[1] else 0.99)


@pytest.mark.parametrize("name", ["nf4-dq", "fp4-dq", "nf4-b128-dq"])
def test_nested_absmax_costs_little(name):
    codec, flat = registry.get(name), registry.get(name.removesuffix("-dq"))
    w = registry.weights(codec, rows=64)
    nested, direct = error(w, registry.values(codec, w), None), error(w, registry.values(flat, w), None)
    assert nested < 1.1 * direct  # measured 1.03-1.06


def test_refit_never_hurts(codec):
    w = registry.weights(codec)
    importance = registry.importances(w.shape[1])
    codes, params = registry.fit(codec, w)
    new = refit_units(w, codes, codec, params, importance)
    before, after = (error(w, decode_units(codes, codec, p), importance) for p in (params, new))
    assert after <= before * (1 + 1e-6)


ODD = {
    "zeros": lambda w: w * 0,
    "constant": lambda w: w * 0 + 0.25,
    "negative constant": lambda w: w * 0 - 0.25,
    "denormal": lambda w: w * 1e-40,
    "large": lambda w: w * 0 - 65504.0,
    "one element": lambda w: torch.where(w == w.amax(1, True), w, 0),
    "half zeros": lambda w: torch.where(w > 0, w, 0),
    "a zero unit": lambda w: torch.cat([w[:1] * 0, w[1:]]),
}


@pytest.mark.parametrize("kind", ODD)
def test_units_that_are_odd(codec, kind):
    w = ODD[kind](registry.weights(codec, rows=4))
    half = registry.importances(w.shape[1])
    half[: len(half) // 2] = 0
    for importance in (None, half, torch.zeros(w.shape[1])):
        decoded = registry.values(codec, w, importance)
        assert decoded.isfinite().all()
        assert (decoded[w.abs().amax(1) == 0] == 0).all()
        used = slice(len(half) // 2, None) if importance is half else slice(None)
        if kind != "denormal":  # below what fp16 scales hold: those become 0
            # without a zero, zeros that do not count become what the others need
            most = {"Q1_0": 4, "TQ1_0": 0.5, "TQ2_0": 0.5}.get(codec.name, 0.35 if codec.integer_bits == 2 else 0.2)
            assert error(w[:, used], decoded[:, used], None) <= most * error(w[:, used], 0 * w[:, used], None)
        assert (decoded.abs() <= 1.5 * w.abs().max() + 1e-7).all()


@pytest.mark.parametrize("name", registry.GGML)
def test_a_scale_beyond_fp16_saturates(name):
    codec = registry.get(name)
    decoded = registry.values(codec, registry.weights(codec) * 1e36)
    assert decoded.isfinite().all()
    top = 1 if name in ("TQ1_0", "TQ2_0", "Q1_0") else 6.2
    assert decoded.abs().max() >= top * 65504  # the largest scale that fp16 has, on an outer level


def test_importance_moves_error_where_it_does_not_count(codec):
    w = registry.weights(codec, rows=16)
    importance = registry.importances(w.shape[1])
    assert error(w, registry.values(codec, w, importance), importance) < error(w, registry.values(codec, w), importance)


def test_one_unit_alone_fits_as_in_the_matrix(codec):
    """GPTQ hands over `[rows, unit]`."""
    w = registry.weights(codec)
    state = codec.begin(w, None)
    whole = fit_units(w, codec, None, state)
    unit = codec.unit(w.shape[1])
    known = None if state is None else {k: s[:, 1 % s.shape[1]] for k, s in state.items()}
    at = unit if w.shape[1] > unit else 0
    alone = codec.fit(w[:, at:at + unit], None, known)
    assert all(torch.allclose(alone[k].float(), whole[k][:, at // unit].float(), rtol=1e-5) for k in whole)


@pytest.mark.parametrize("name", registry.K_QUANTS)
def test_what_a_k_quant_holds_comes_back(name):
    """Weights that were in the type already lose next to nothing when they are put into it again."""
    codec = registry.get(name)
    w = registry.weights(codec, rows=32)
    once = registry.values(codec, w)
    assert error(once, registry.values(codec, once), None) < 0.02 * error(w, once, None)  # measured: 0 to 0.01
