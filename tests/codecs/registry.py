"""Every codec that can be fitted, for tests that hold for all of them."""

from __future__ import annotations

import torch

from fewbits import codecs
from fewbits.codecs import ggml, iq4, kquants, mxfp4, ternary
from fewbits.codecs.base import Codec, Params, decode_units, encode_units, fit_units

K_QUANTS = tuple(kquants.TYPES)
GGML = (*ggml.TYPES, *K_QUANTS, *iq4.TYPES, *mxfp4.TYPES, *ternary.TYPES)
FLAT = ("int2", "int3", "int4", "int8-g128", "int4-g32", "int2-asym", "int3-g32-asym", "int4-asym", "int8-g64-asym",
        "int4-row", "int4-g16-sbf16", "int4-g48-asym-sf32", "int8", "nf4", "nf4-b32", "nf4-dq", "nf4-b128-dq", "fp4",
        "fp4-dq", "fp8-e4m3", "fp8-e5m2", "fp8-e4m3-b128", "fp8-e4m3-b48", "kmeans4", "kmeans3", "kmeans2",
        "w8a8", "w8a8-static", "w8a8-asym")
ALL = (*GGML, *FLAT)


def weights(codec: Codec, rows: int = 6, seed: int = 0, ragged: bool = False) -> torch.Tensor:
    """Normal values with a few outliers; K-quants need columns by 256."""
    columns = 512 if codec.family == "ggml" else 300 if ragged else 384
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=generator) * 0.02
    w[torch.rand(w.shape, generator=generator) < 0.005] *= 8
    return w.reshape(codec.matrix((rows, columns)))


def importances(columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(columns, generator=torch.Generator().manual_seed(seed)).mul(1.5).exp()


def fit(codec: Codec, w: torch.Tensor, importance: torch.Tensor | None = None) -> tuple[torch.Tensor, Params]:
    """Codes and params of a matrix."""
    params = fit_units(w, codec, importance, codec.begin(w, importance))
    return encode_units(w, codec, params), params


def values(codec: Codec, w: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
    codes, params = fit(codec, w, importance)
    return decode_units(codes, codec, params)


def get(name: str) -> Codec:
    return codecs.get(name)
