"""Bits of numbers, against torch's casts."""

from __future__ import annotations

import math

import pytest
import torch

from fewbits.errors import FewbitsError
from fewbits.number_formats import BY_NAME, FORMATS, decode, encode, parse, store

TORCH = {"fp32": (torch.float32, torch.int32), "bf16": (torch.bfloat16, torch.int16),
         "fp16": (torch.float16, torch.int16), "fp8-e5m2": (torch.float8_e5m2, torch.uint8),
         "fp8-e4m3": (torch.float8_e4m3fn, torch.uint8)}
VALUES = [0.0, -0.0, 0.1, -3.75e-3, 1.0, 1 / 3, 65504.0, 65519.9, 65520.0, 448.0, 463.9, 57344.0, 61439.0, 61440.0,
          1e-7, 6e-8, 2.9e-8, 5.96e-8, 2.0 ** -9, 2.0 ** -10, 1.5 * 2.0 ** -10, 2.0 ** -149, 1e-46, 3e38, 1e39, -1e39,
          17.0, 18.0, 19.0, 1.0625, 1.1875, math.inf, -math.inf]


@pytest.mark.parametrize("name", TORCH)
def test_bits_are_torchs(name):
    dtype, integer = TORCH[name]
    form = BY_NAME[name]
    more = (torch.randn(500, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 10).exp()
    values = VALUES + [float(v) for v in more] + [-float(v) for v in more]
    mask = (1 << form.width) - 1
    for v in values:
        if form.finite and abs(v) > 464:  # torch clamps or gives NaN, by its version
            assert math.isnan(decode(encode(v, form), form))
            continue
        single = float(torch.tensor(v, dtype=torch.float64).float())  # torch's casts to 8 bits round in single first
        cast = torch.tensor(single if form.width == 8 else v, dtype=torch.float64).to(dtype)
        assert encode(single if form.width == 8 else v, form) == int(cast.view(integer)) & mask, v
        got, meant = decode(encode(v, form), form), float(torch.tensor(v, dtype=torch.float64).to(dtype))
        assert form.width == 8 or got == meant or math.isnan(got) and math.isnan(meant)


@pytest.mark.parametrize("name", ["bf16", "fp16", "fp8-e5m2", "fp8-e4m3"])
def test_every_code(name):
    dtype, integer = TORCH[name]
    form = BY_NAME[name]
    codes = torch.arange(1 << form.width, dtype=torch.int32)
    meant = codes.to(torch.uint8 if form.width == 8 else torch.uint16).view(dtype).double().tolist()
    for code, value in enumerate(meant):
        got = decode(code, form)
        assert got == value or math.isnan(got) and math.isnan(value)
        if not math.isnan(got):
            assert encode(got, form) == code
    assert float(form.largest) == max(v for v in meant if math.isfinite(v))


def test_parts_by_hand():
    got = store(-3.75e-3, BY_NAME["bf16"])  # -1.92 * 2^-9: exponent 118, 0.92 * 128 = 117.76
    assert (got.sign, got.exponent, got.mantissa, got.hex) == ("1", "01110110", "1110110", "0xbb76")
    assert got.value == -(1 + 118 / 128) * 2.0 ** -9 and got.kind == "normal"
    assert got.error == pytest.approx((118 - 117.76) / 128 / 1.92)
    tf32 = store(0.1, BY_NAME["tf32"])  # 1.6 * 2^-4, 0.6 * 1024 = 614.4
    assert (tf32.sign, tf32.exponent, tf32.mantissa) == ("0", "01111011", f"{614:010b}")
    assert tf32.value == (1 + 614 / 1024) / 16


@pytest.mark.parametrize(("value", "name", "kind", "note"), [
    (1e-5, "fp16", "subnormal", ""), (1e-9, "fp16", "zero", "too small: fp16 begins at 5.96e-08"),
    (1e6, "fp16", "infinite", "too large: fp16 ends at 65504"), (500.0, "fp8-e4m3", "NaN", "fp8-e4m3 ends at 448"),
    (math.inf, "fp8-e4m3", "NaN", ""), (math.inf, "bf16", "infinite", ""), (math.nan, "fp32", "NaN", ""),
    (0.0, "fp32", "zero", "")])
def test_kinds(value, name, kind, note):
    got = store(value, BY_NAME[name])
    assert got.kind == kind and note in got.note and bool(note) == bool(got.note)
    assert got.error == (0.0 if value == 0 else None) or kind in ("subnormal", "zero")


@pytest.mark.parametrize(("text", "reading", "value"), [
    ("0.1", None, 0.1), ("-3.75e-3", None, -3.75e-3), ("inf", None, math.inf), ("0x3dcc", None, 0.099609375),
    ("0x3dcc", "fp16", 1.44921875), ("0x3f800000", None, 1.0), ("0x7e", None, 448.0), ("0x7C", "fp8-e5m2", math.inf),
    ("0x1", "fp8-e4m3", 2.0 ** -9)])
def test_texts(text, reading, value):
    assert parse(text, reading)[0] == value


@pytest.mark.parametrize(("text", "reading", "message"), [
    ("abc", None, "is no number"), ("0xzz", None, "is no hexadecimal number"), ("0x123", None, "3 hexadecimal digits"),
    ("0x1ff", "fp8-e4m3", "more than the 8 bits"), ("0.1", "bf16", "is no bits"), ("0x3d", "fp9", "unknown format")])
def test_texts_that_are_no_numbers(text, reading, message):
    with pytest.raises(FewbitsError, match=message):
        parse(text, reading)
    assert len(FORMATS) == len(BY_NAME)
