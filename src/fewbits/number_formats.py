"""The bits of one number in the floating point formats of machine learning. Exact: fractions, no float arithmetic."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from fewbits.errors import FewbitsError


@dataclass(frozen=True)
class Format:
    """A sign bit, `exponent` bits, `mantissa` bits."""

    name: str
    exponent: int
    mantissa: int
    finite: bool = False  # e4m3fn: no infinities, and one mantissa of the last exponent is NaN

    @property
    def width(self) -> int:
        return 1 + self.exponent + self.mantissa

    @property
    def bias(self) -> int:
        return (1 << (self.exponent - 1)) - 1

    @property
    def least(self) -> int:
        """The exponent of the smallest normal number, and of all below it."""
        return 1 - self.bias

    @property
    def largest(self) -> Fraction:
        top = (1 << self.exponent) - (1 if self.finite else 2) - self.bias
        steps = (2 << self.mantissa) - (2 if self.finite else 1)
        return Fraction(steps) * Fraction(2) ** (top - self.mantissa)


FORMATS = (Format("fp32", 8, 23), Format("tf32", 8, 10), Format("bf16", 8, 7), Format("fp16", 5, 10),
           Format("fp8-e5m2", 5, 2), Format("fp8-e4m3", 4, 3, finite=True))
BY_NAME = {f.name: f for f in FORMATS}
OF_DIGITS = {8: "fp32", 4: "bf16", 2: "fp8-e4m3"}  # what hexadecimal digits are read as unless it is said


@dataclass(frozen=True)
class Stored:
    """A number as one format holds it. `error` is relative to the number, None where that means nothing."""

    format: str
    sign: str
    exponent: str
    mantissa: str
    hex: str
    value: float
    error: float | None
    kind: str  # normal, subnormal, zero, infinite, NaN
    note: str = ""


def store(value: float, form: Format) -> Stored:
    """Round to nearest, ties to even, as IEEE 754 says; beyond the largest number lies infinity, NaN where the format
    has none."""
    code = encode(value, form)
    got = decode(code, form)
    bits = f"{code:0{form.width}b}"
    note = ""
    if math.isfinite(value) and not math.isfinite(got):
        note = f"too large: {form.name} ends at {float(form.largest):g}" \
            + (", has no infinity, and converters clamp or give NaN" if form.finite else "")
    elif value and not got and not math.isnan(got):
        note = f"too small: {form.name} begins at {float(Fraction(2) ** (form.least - form.mantissa)):.3g}"
    relative = float(abs(Fraction(got) - Fraction(value)) / abs(Fraction(value))) \
        if value and math.isfinite(value) and math.isfinite(got) else None if value or math.isnan(value) else 0.0
    kind = ("NaN" if math.isnan(got) else "infinite" if math.isinf(got) else "zero" if not got
            else "normal" if "1" in bits[1:1 + form.exponent] else "subnormal")
    digits = -(-form.width // 4)
    return Stored(form.name, bits[0], bits[1:1 + form.exponent], bits[1 + form.exponent:], f"0x{code:0{digits}x}", got,
                  relative, kind, note)


def encode(value: float, form: Format) -> int:
    """The bits of the nearest number."""
    negative = math.copysign(1.0, value) < 0
    sign = int(negative) << (form.width - 1)
    special = (1 << (form.exponent + form.mantissa)) - 1  # all ones
    infinity = special if form.finite else special >> form.mantissa << form.mantissa
    if math.isnan(value):
        return sign | (special if form.finite else infinity | 1 << (form.mantissa - 1))
    if math.isinf(value):
        return sign | infinity
    exact = abs(Fraction(value))
    exponent = max(form.least, math.frexp(value)[1] - 1) if value else form.least
    steps = round(exact / Fraction(2) ** (exponent - form.mantissa))  # Python rounds ties to even
    code = steps + ((exponent - form.least) << form.mantissa)  # a mantissa that runs over raises the exponent
    limit = special if form.finite else infinity
    return sign | (code if code < limit else infinity)


def decode(code: int, form: Format) -> float:
    """The number that bits stand for."""
    mantissa = code & ((1 << form.mantissa) - 1)
    exponent = (code >> form.mantissa) & ((1 << form.exponent) - 1)
    sign = -1.0 if code >> (form.width - 1) else 1.0
    last = exponent == (1 << form.exponent) - 1
    if last and form.finite and mantissa == (1 << form.mantissa) - 1:
        return math.nan
    if last and not form.finite:
        return math.nan if mantissa else sign * math.inf
    steps = mantissa + ((1 << form.mantissa) if exponent else 0)
    return sign * float(Fraction(steps) * Fraction(2) ** (max(exponent, 1) - form.bias - form.mantissa))


def parse(text: str, reading: str | None = None) -> tuple[float, str]:
    """A number, and how its text was read: decimal, inf, nan, or the bits of a format in hexadecimal (`0x3dcc`).

    Raises:
        FewbitsError: no number, or no format of that name or width.
    """
    plain = text.strip().lower().replace("_", "")
    if reading is not None and reading not in BY_NAME:
        raise FewbitsError(f"unknown format {reading!r}", "one of: " + ", ".join(BY_NAME))
    if not plain.startswith("0x"):
        if reading is not None:
            raise FewbitsError(f"{text} is no bits to be read as {reading}", "bits are hexadecimal: 0x3dcc")
        try:
            return float(plain), ""
        except ValueError:
            raise FewbitsError(f"{text!r} is no number") from None
    digits = plain[2:]
    try:
        code = int(digits, 16)
    except ValueError:
        raise FewbitsError(f"{text!r} is no hexadecimal number") from None
    name = reading or OF_DIGITS.get(len(digits))
    if name is None:
        raise FewbitsError(f"{text}: {len(digits)} hexadecimal digits are the bits of no format",
                           "8 are fp32, 4 bf16 or fp16, 2 fp8; or say which with --as")
    form = BY_NAME[name]
    if code >> form.width:
        raise FewbitsError(f"{text} has more than the {form.width} bits of {name}")
    return decode(code, form), f"{text} read as the bits of {name}"
