"""Number formats by name: `get("Q4_K")`, `get("int4-g128-asym")`, `get("nf4-b64-dq")`, `get("int8")`, `get("bf16")`."""

from __future__ import annotations

from functools import cache
from importlib import import_module

from fewbits.codecs.base import Codec
from fewbits.errors import FewbitsError

# modules that parse the names of their own codecs, imported as far as a name needs them
FAMILIES = ("floats", "ggml", "kquants", "iq4", "mxfp4", "ternary", "affine", "w8a8", "table", "float8", "codebook",
            "decode_only")


@cache
def get(name: str) -> Codec:
    """The codec called `name` (case does not matter).

    Raises:
        FewbitsError: no codec has that name.
    """
    for family in FAMILIES:
        codec: Codec | None = import_module(f"fewbits.codecs.{family}").parse(name)
        if codec is not None:
            return codec
    raise FewbitsError(f"unknown codec {name!r}", "for example: int4-g128, int3-g32-asym, int8, nf4, nf4-dq, fp4, "
                       "fp8-e4m3, fp8-e4m3-b128, kmeans4, "
                       "Q4_0, Q8_0, Q2_K, Q4_K, Q6_K, IQ4_XS, MXFP4, TQ2_0, f16, bf16")
